"""Which backend runs: Triton for CUDA, ROCm and XPU tensors, C for CPU tensors, PyTorch wherever those cannot."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .native import build

BACKENDS = ("auto", "torch", "native", "triton")
_TRITON_DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def choose_backend(backend: str, x: Tensor, n: int) -> str:
    """ "torch", "native" or "triton" for streams like `x`. A backend that is named is taken or refused, never replaced.

    Raises:
        ValueError: `backend` is none of "auto", "torch", "native", "triton".
        RuntimeError: the named backend cannot run; the message says why.
    """
    if backend == "auto":
        # interpreted kernels run on any device: who sets the variable wants to see them run
        fast = "triton" if x.device.type in _TRITON_DEVICES or _is_interpreted() else "native"
        return "torch" if explain_no_backend(fast, x, n) else fast
    if backend not in BACKENDS:
        raise ValueError(f'`backend` must be "auto", "torch", "native" or "triton", got {backend!r}.')
    if reason := explain_no_backend(backend, x, n):
        raise RuntimeError(f'`backend="{backend}"` cannot run: {reason}. Use backend="auto" or "torch".')
    return backend


def runs_on_triton(x: Tensor, n: int) -> bool:
    """Whether "auto" takes the Triton kernels for streams like `x`; where it does not, next to no time is lost."""
    if x.device.type not in _TRITON_DEVICES and not _is_interpreted():
        return False
    return has_triton() and _explain_no_kernel(x, n) is None


def explain_no_backend(backend: str, x: Tensor, n: int) -> str | None:
    """Why "torch", "native" or "triton" cannot run on streams like `x`; None where it can."""
    if backend == "torch":
        return None
    return explain_no_native(x, n) if backend == "native" else explain_no_triton(x, n)


def explain_no_triton(x: Tensor, n: int) -> str | None:
    """Why the kernels cannot run on streams like `x`; None where they can."""
    if not has_triton():
        return "the package `triton` is not installed (pip install mhc-hf[triton])"
    if x.device.type not in _TRITON_DEVICES and not _is_interpreted():
        return f"`x` is on {x.device}, and the kernels need a CUDA, ROCm or XPU device"
    return _explain_no_kernel(x, n)


def explain_no_native(x: Tensor, n: int) -> str | None:
    """Why the C cannot run on streams like `x`; None where it can. Compiles it, the first time."""
    if x.device.type != "cpu":
        return f"`x` is on {x.device}, and the C is for CPUs"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"`x` is a {type(x).__name__}, and the C needs tensors with memory of their own"
    if reason := _explain_no_kernel(x, n):
        return reason
    # n by comparison: torch.compile with dynamic sizes has no constant of its own for it
    for known in range(2, 9):
        if n == known:
            return _explain_no_library(known, x.dtype)
    return None


@cache
def has_triton() -> bool:
    """Whether the package is there; it is not imported."""
    return find_spec("triton") is not None


def _explain_no_kernel(x: Tensor, n: int) -> str | None:
    if x.dtype not in _DTYPES:
        return f"the kernels compute float32, bfloat16 and float16, and `x` is {x.dtype}"
    if not 2 <= n <= 8:
        return f"the kernels are made for 2 to 8 streams, and `x` has {n}"
    return None


# a compiler that traces the ops is to ask once, not to look into the building
@torch.compiler.assume_constant_result
def _explain_no_library(n: int, dtype: torch.dtype) -> str | None:
    return build.explain_no_library(n, dtype)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
