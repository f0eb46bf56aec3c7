"""The notebook runs, with fewer steps than a reader takes."""

import pathlib

import nbclient
import nbformat
import pytest

NOTEBOOK = pathlib.Path(__file__).parents[1] / "examples" / "first_model.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Jupyter's own packages
def test_notebook_runs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameter,) = [cell for cell in notebook.cells if cell.source.startswith("STEPS = ")]
    parameter.source = "STEPS = 20"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": "."}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", ())]
    text = "".join(out.text for out in outputs if out.output_type == "stream")
    before, after = (float(x) for x in text.partition(" bits per byte")[0].split()[-3::2])
    assert 7.5 < before < 9
    assert after < before - 2
    pictures = [out for out in outputs if "image/png" in out.get("data", ())]
    assert len(pictures) == 3
