"""The WKV7 operator of flash-linear-attention, measured like those of `wkv7.py`."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import torch
from fla.ops.rwkv7 import chunk_rwkv7


class FlaProgram:
    """A call on inputs in the device's memory; the first one finds out how to run."""

    def __init__(self, call: Callable[[], Sequence[torch.Tensor]]):
        start = time.perf_counter()
        self._call = call
        call()
        torch.cuda.synchronize()
        self.compile_seconds = time.perf_counter() - start

    def results(self) -> list[np.ndarray]:
        """Output and gradients."""
        return [x.detach().float().cpu().numpy() for x in self._call()]

    def seconds(self, calls: int) -> float:
        """The mean over so many calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            self._call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls

    def memory(self) -> int:
        """Bytes besides inputs and results."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = self._call()
        torch.cuda.synchronize()
        of_results = sum(x.nbytes for x in results)
        return torch.cuda.max_memory_allocated() - before - of_results


def make_fla_programs(
    inputs: Sequence[jax.Array], do: jax.Array, bound: float
) -> tuple[FlaProgram, FlaProgram]:
    """Forward, and forward with backward, with the form for bounded decay."""
    dtype = getattr(torch, str(do.dtype))

    def on_gpu(x: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.array(x, np.float32)).to("cuda", dtype)

    tensors = [on_gpu(x).requires_grad_() for x in inputs]
    d_output = on_gpu(do)

    def forward() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return chunk_rwkv7(*tensors, output_final_state=True, lower_bound=bound)[:1]

    def forward_and_backward() -> Sequence[torch.Tensor]:
        o, _ = chunk_rwkv7(*tensors, output_final_state=True, lower_bound=bound)
        return o, *torch.autograd.grad(o, tensors, d_output)

    return FlaProgram(forward), FlaProgram(forward_and_backward)
