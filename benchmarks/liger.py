"""Liger-Kernel's mHC ops as a contender: Triton, forward and backward, for GPUs.

They apply V4's matrix as it is, where DeepSeek-V4 transposes it, and tile n by powers of two. Their truth is therefore
their own formula, in float64: same parameters, another layer.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from mhc_hf.ops.backends import explain_no_triton


def explain_no_liger(x: Tensor, n: int) -> str | None:
    """Why Liger's ops cannot run on streams like `x`; None where they can."""
    # what our kernels need, it needs
    if reason := explain_no_triton(x, n):
        return reason
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install liger-kernel)"
    if find_spec("liger_kernel.ops.mhc") is None:
        return "this liger-kernel has no mHC ops; 0.8.5 has"
    if n & (n - 1):
        return f"Liger's kernels take n = 2, 4, 8, not {n}"
    return None


def make_liger_site(parameters: tuple[Tensor, Tensor, Tensor], x: Tensor, eps: float) -> Callable[[Tensor], Tensor]:
    """A site with an identity branch: x [..., n, C] -> [..., n, C].

    Args:
        parameters: phi [(n+2)*n, n*C], bias and alpha of the site, which are copied as Liger keeps them: phi
            transposed, and in half precision where `x` is, as its documentation advises for speed.
        x: streams like those that it will get.
        eps: added where V4's formula adds it.
    """
    from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre

    phi, bias, alpha = (parameter.detach() for parameter in parameters)
    phi = phi.T.contiguous().to(x.dtype).requires_grad_()
    bias = bias.clone().requires_grad_()
    gates = [gate.clone().requires_grad_() for gate in alpha]

    def run(x: Tensor) -> Tensor:
        h_pre, h_post, h_res = liger_mhc_coeffs(
            x, phi, bias, *gates, allow_fp32=x.dtype == torch.float32, tmax=20, pre_eps=eps, sinkhorn_eps=eps
        )
        return liger_mhc_post_res(x, liger_mhc_pre(x, h_pre), h_post, h_res)

    return run
