"""WKV7 operators of others in PyTorch, which `wkv7.py` measures on the same inputs as ours.

If a run is stopped while torch compiles CUDA, a file `lock` stays in `TORCH_EXTENSIONS_DIR`. The
next run waits for it: remove it.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import torch

type Results = Sequence[torch.Tensor]
type Forward = Callable[..., torch.Tensor]

FLAGS = ("--use_fast_math", "-O3", "-Xptxas=-O3", "--extra-device-vectorization")


class TorchProgram:
    """A call on inputs in the device's memory. The first one may compile and tune kernels."""

    def __init__(self, call: Callable[[], Results]):
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


@functools.cache
def load_operator(name: str, sources: pathlib.Path | None, bound: float) -> Forward:
    """Returns the differentiable operator of a peer.

    Args:
      name: "FLA", "RWKV-LM" or "wind_rwkv".
      sources: folder with checkouts of RWKV-LM and wind_rwkv, whose CUDA is compiled.
      bound: of log decays.
    """
    if name == "FLA":
        from fla.ops.rwkv7 import chunk_rwkv7

        return lambda *inputs: chunk_rwkv7(*inputs, output_final_state=True, lower_bound=bound)[0]
    if sources is None:
        raise ValueError(f"{name} needs sources, the folder with its checkout; got None")
    return {"RWKV-LM": load_rwkv_lm, "wind_rwkv": load_wind_rwkv}[name](sources / name)


def load_wind_rwkv(checkout: pathlib.Path) -> Forward:
    """Returns the chunked operator of wind_rwkv."""
    sys.path.insert(0, str(checkout))
    from wind_rwkv.rwkv7 import attn_chunked_cuda, load_chunked_cuda

    load_chunked_cuda(64)
    return lambda *inputs: attn_chunked_cuda(*inputs)[0]


def load_rwkv_lm(checkout: pathlib.Path) -> Forward:
    """Returns the operator that RWKV-LM trains with on H100s."""
    from torch.utils.cpp_extension import load

    cuda = checkout / "RWKV-v7" / "train_temp" / "cuda"
    names = ("rwkv7_clampw_v3_for_h100.cu", "rwkv7_clampw_v3.cpp")
    load(
        name="rwkv_lm_wkv7",
        sources=[str(cuda / name) for name in names],
        is_python_module=False,
        extra_cuda_cflags=["-D_N_=64", "-D_CHUNK_LEN_=16", *FLAGS],
    )
    kernels = torch.ops.rwkv7_clampw_v3

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            B, T, H, K = inputs[0].shape
            o = torch.empty_like(inputs[0])
            states = torch.empty(B, H, T // 16, K, K, dtype=torch.float32, device="cuda")
            state_a = torch.empty(B, T, H, K, dtype=torch.float32, device="cuda")
            kernels.forward(*inputs, o, states, state_a)
            ctx.save_for_backward(*inputs, states, state_a)
            return o

        @staticmethod
        def backward(ctx, do):
            *inputs, states, state_a = ctx.saved_tensors
            gradients = [torch.empty_like(x) for x in inputs]
            kernels.backward(*inputs, do, states, state_a, *gradients)
            return tuple(gradients)

    return Operator.apply


def make_torch_programs(
    name: str,
    inputs: Sequence[jax.Array],
    do: jax.Array,
    bound: float,
    sources: pathlib.Path | None,
) -> tuple[TorchProgram, TorchProgram]:
    """Returns the programs of a peer: forward, and forward with backward.

    RWKV-LM and wind_rwkv take numbers that they make the decay from. Gradients are of these, and
    they are rounded, so that results are not those of `inputs`.
    """
    operator = load_operator(name, sources, bound)
    dtype = getattr(torch, str(do.dtype))

    def on_gpu(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to("cuda", dtype)

    arrays = [np.array(x, np.float32) for x in inputs]
    if name == "RWKV-LM":  # log decay = bound * sigmoid(w)
        share = np.clip(arrays[1] / bound, 1e-6, 1 - 1e-6)
        arrays[1] = np.log(share) - np.log1p(-share)
    elif name == "wind_rwkv":  # log decay = -exp(w)
        arrays[1] = np.log(-arrays[1])
    tensors = [on_gpu(x).requires_grad_() for x in arrays]
    do_tensor = on_gpu(np.array(do, np.float32))

    def forward() -> Results:
        with torch.no_grad():
            return [operator(*tensors)]

    def forward_and_backward() -> Results:
        o = operator(*tensors)
        return o, *torch.autograd.grad(o, tensors, do_tensor)

    return TorchProgram(forward), TorchProgram(forward_and_backward)
