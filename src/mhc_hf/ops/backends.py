"""Which backend runs: Triton for CUDA, ROCm and XPU tensors where it can, PyTorch everywhere else."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_TRITON_DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def choose_backend(backend: str, x: Tensor, n: int) -> str:
    """ "torch" or "triton" for streams like `x`. A backend that is named is taken or refused, never replaced.

    Raises:
        ValueError: `backend` is none of "auto", "torch", "triton".
        RuntimeError: `backend` is "triton" and cannot run; the message says why.
    """
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "torch" if x.device.type not in _TRITON_DEVICES or explain_no_triton(x, n) else "triton"
    if backend != "triton":
        raise ValueError(f'`backend` must be "auto", "torch" or "triton", got {backend!r}.')
    if reason := explain_no_triton(x, n):
        raise RuntimeError(f'`backend="triton"` cannot run: {reason}. Use backend="auto" or "torch".')
    return "triton"


def explain_no_triton(x: Tensor, n: int) -> str | None:
    """Why the kernels cannot run on streams like `x`; None where they can."""
    if not has_triton():
        return "the package `triton` is not installed (pip install mhc-hf[triton])"
    if x.device.type not in _TRITON_DEVICES and not _is_interpreted():
        return f"`x` is on {x.device}, and the kernels need a CUDA, ROCm or XPU device"
    if x.dtype not in _TRITON_DTYPES:
        return f"the kernels compute float32, bfloat16 and float16, and `x` is {x.dtype}"
    if not 2 <= n <= 8:
        return f"the kernels are made for 2 to 8 streams, and `x` has {n}"
    return None


@cache
def has_triton() -> bool:
    """Whether the package is there; it is not imported."""
    return find_spec("triton") is not None


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
