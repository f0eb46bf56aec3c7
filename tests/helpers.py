"""What the tests of both packages share."""

from typing import Any

import numpy as np


def relative_rms(x: Any, reference: Any) -> float:
    """`||x - reference|| / ||reference||`, computed in float64; the shapes must be equal."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    assert x.shape == reference.shape, (x.shape, reference.shape)
    return float(np.linalg.norm(x - reference) / np.linalg.norm(reference))
