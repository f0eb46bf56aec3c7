"""Measures the WKV7 operator of flash-linear-attention (FLA) in the way of `wkv7.py`."""

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import torch
from fla.ops.rwkv7 import chunk_rwkv7


class FlaProgram:
    """A call on inputs in the device's memory. The first one compiles and tunes kernels."""

    def __init__(self, call: Callable[[], Sequence[torch.Tensor]]):
        start = time.perf_counter()
        self._call = call
        call()
        torch.cuda.synchronize()
        self.compile_seconds = time.perf_counter() - start

    def results(self) -> list[np.ndarray]:
        """Returns the output and, with the backward, the gradients."""
        return [x.detach().float().cpu().numpy() for x in self._call()]

    def seconds(self, calls: int) -> float:
        """Returns the mean time of a call."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            self._call()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end) / calls

    def memory(self) -> int:
        """Returns the peak of allocated bytes besides inputs and results."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = self._call()
        torch.cuda.synchronize()
        result_bytes = sum(x.nbytes for x in results)
        return torch.cuda.max_memory_allocated() - before - result_bytes


def make_fla_programs(
    inputs: Sequence[jax.Array], do: jax.Array, bound: float
) -> tuple[FlaProgram, FlaProgram]:
    """Returns FLA's programs for bounded decay: forward, and forward with backward."""
    dtype = getattr(torch, str(do.dtype))

    def on_gpu(x: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.array(x, np.float32)).to("cuda", dtype)

    tensors = [on_gpu(x).requires_grad_() for x in inputs]
    do_tensor = on_gpu(do)

    def forward() -> Sequence[torch.Tensor]:
        with torch.no_grad():
            return chunk_rwkv7(*tensors, output_final_state=True, lower_bound=bound)[:1]

    def forward_and_backward() -> Sequence[torch.Tensor]:
        o, _ = chunk_rwkv7(*tensors, output_final_state=True, lower_bound=bound)
        return o, *torch.autograd.grad(o, tensors, do_tensor)

    return FlaProgram(forward), FlaProgram(forward_and_backward)
