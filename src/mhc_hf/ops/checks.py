"""Checks of the public ops' arguments: each error names the argument, its value, the rule and the cure."""

import torch
from torch import Tensor

_STREAM_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_streams(x: Tensor) -> None:
    """`x` is [..., n, C] with at least one leading dimension, of a dtype that we compute."""
    if x.dim() < 3 or x.shape[-2] < 2 or x.shape[-1] < 1:
        raise ValueError(
            f"`x` must be [..., n, C] with n >= 2 streams, got {list(x.shape)}. "
            "Flat streams [B, S, n*C] are unflattened first: x.unflatten(-1, (n, -1))."
        )
    if x.dtype not in _STREAM_DTYPES:
        raise ValueError(f"`x` must be float16, bfloat16, float32 or float64, got {x.dtype}. Cast it first.")


def check_parameters(x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor) -> None:
    """Shapes follow from n and C of `x`; float32 always, float64 too where `x` is."""
    n, num_channels = x.shape[-2:]
    num_rows = (n + 2) * n
    expected = (("phi", phi, (num_rows, n * num_channels)), ("bias", bias, (num_rows,)), ("alpha", alpha, (3,)))
    for name, parameter, shape in expected:
        if parameter.shape != shape:
            raise ValueError(
                f"`{name}` must be {list(shape)} for `x` of {n} streams and {num_channels} channels, "
                f"got {list(parameter.shape)}. Was it made for another hc_mult or hidden size?"
            )
        _check_precision(name, parameter, x)


def check_maps(x: Tensor, **maps: Tensor) -> None:
    """h_pre, h_post are [..., n], h_res is [..., n, n] over the leading shape of `x`; float32, or float64 with it."""
    n = x.shape[-2]
    for name, h in maps.items():
        shape = (*x.shape[:-1], n) if name == "h_res" else x.shape[:-1]
        if h.shape != shape:
            raise ValueError(
                f"`{name}` must be {list(shape)} for `x` {list(x.shape)}, got {list(h.shape)}. "
                "Take it from mhc_coefficients of the same `x`."
            )
        _check_precision(name, h, x)


def check_branch(x: Tensor, branch_out: Tensor) -> None:
    """The branch returns what it read: [..., C] in the dtype of `x`."""
    shape = (*x.shape[:-2], x.shape[-1])
    if branch_out.shape != shape or branch_out.dtype != x.dtype:
        raise ValueError(
            f"`branch_out` must be {x.dtype} {list(shape)} for `x` {list(x.shape)}, "
            f"got {branch_out.dtype} {list(branch_out.shape)}. Cast it with branch_out.to(x.dtype)."
        )


def check_branch_norm(x: Tensor, weight: Tensor) -> None:
    """The weight of the norm that a branch begins with is [C], in the dtype of `x`."""
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"the weight of `branch_norm` must be {x.dtype} {list(x.shape[-1:])} for `x` {list(x.shape)}, "
            f"got {weight.dtype} {list(weight.shape)}. Leave `branch_norm` out and norm branch_in afterwards."
        )


def check_iters(num_iters: int) -> None:
    """At least one normalisation, or the result is not a mixing matrix."""
    if num_iters < 1:
        raise ValueError(f"`num_iters` must be an integer >= 1, got {num_iters!r}. The paper uses 20.")


def _check_precision(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.dtype == torch.float32 or (tensor.dtype == x.dtype == torch.float64):
        return
    raise ValueError(
        f"`{name}` must be float32, got {tensor.dtype} with `x` {x.dtype}. Half precision loses what a map learns: "
        "keep mHC parameters in float32 and cast with .float() where a wrapper lowered them."
    )
