"""mHC in plain PyTorch (arXiv 2512.24880), one function an equation. Slow on purpose: this file is what correct means.

Shapes: B batch, S sequence, n streams (expansion rate), C channels of one stream; `...` stands for any leading shape.
Convention: h_res[..., i, j] carries input stream j into output stream i.
Precision: everything is computed in float32, or in float64 where `x` (or the logits) is float64.
"""

import torch
from torch import Tensor


def sinkhorn_knopp(logits: Tensor, num_iters: int = 20) -> Tensor:
    """Project exp(logits) onto the doubly stochastic matrices (Eq. 9), columns first and rows last.

    Args:
        logits: [..., n, n].
        num_iters: t_max; one iteration normalises the columns, then the rows.
    Returns:
        [..., n, n]: rows sum to 1 to rounding; what has not converged is left on the columns.
    """
    # log-domain: at logits of +-1e4 exp() underflows whole columns, and 0/0 is NaN
    log_m = logits.to(_compute_dtype(logits))
    for _ in range(num_iters):
        log_m = log_m.log_softmax(-2)
        # rows last: copies of one stream stay exact copies, or a conversion drifts with depth
        log_m = log_m.log_softmax(-1)
    return log_m.exp()


def rms_normalize(x_vec: Tensor, norm_eps: float = 1e-6) -> Tensor:
    """x_vec / rms(x_vec), one root mean square a token over all n*C entries, no weight (Eq. 7). [..., n*C]"""
    x_vec = x_vec.to(_compute_dtype(x_vec))
    return x_vec * torch.rsqrt(x_vec.square().mean(-1, keepdim=True) + norm_eps)


def mhc_coefficients(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, *, num_iters: int = 20, norm_eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """The three maps of a site from its streams (Eq. 7 and 8).

    Args:
        x: [..., n, C] streams.
        phi: [(n+2)*n, n*C] projection, rows in the order pre, post, res.
        bias: [(n+2)*n] static part of the logits, same order.
        alpha: [3] gating factors of the dynamic part: pre, post, res.
    Returns:
        h_pre [..., n] in (0, 1), h_post [..., n] in (0, 2), h_res [..., n, n] doubly stochastic.
    """
    n = x.shape[-2]
    dtype = _compute_dtype(x)
    phi, bias, alpha = phi.to(dtype), bias.to(dtype), alpha.to(dtype)
    projected = rms_normalize(x.flatten(-2), norm_eps) @ phi.T  # [..., (n+2)*n]
    pre, post, res = projected.split([n, n, n * n], -1)
    bias_pre, bias_post, bias_res = bias.split([n, n, n * n])
    h_pre = torch.sigmoid(alpha[0] * pre + bias_pre)
    h_post = 2 * torch.sigmoid(alpha[1] * post + bias_post)
    h_res = sinkhorn_knopp((alpha[2] * res + bias_res).unflatten(-1, (n, n)), num_iters)
    return h_pre, h_post, h_res


def mhc_pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """What the branch reads: H_pre x. [..., n, C], [..., n] -> [..., C] in the dtype of `x`."""
    dtype = _compute_dtype(x)
    return torch.einsum("...n,...nc->...c", h_pre.to(dtype), x.to(dtype)).to(x.dtype)


def mhc_post_res(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The streams after the site: x' = H_res x + H_post (outer) F (Eq. 3). [..., n, C] in the dtype of `x`."""
    dtype = _compute_dtype(x)
    mixed = torch.einsum("...ij,...jc->...ic", h_res.to(dtype), x.to(dtype))
    written = torch.einsum("...n,...c->...nc", h_post.to(dtype), branch_out.to(dtype))
    return (mixed + written).to(x.dtype)


def mhc_pre_branch(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, *, num_iters: int = 20, norm_eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """All that a site does before its branch: `mhc_coefficients`, then `mhc_pre`.

    Returns:
        branch_in [..., C] in the dtype of `x`, h_post [..., n], h_res [..., n, n].
    """
    h_pre, h_post, h_res = mhc_coefficients(x, phi, bias, alpha, num_iters=num_iters, norm_eps=norm_eps)
    return mhc_pre(x, h_pre), h_post, h_res


def weighted_rms_norm(branch_in: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """The norm that most branches begin with: weight * u / rms(u), the root mean square in float32. [..., C]

    Rounded to the dtype of `branch_in` before the weight, and after, as LLaMA and the families after it do in
    transformers.
    """
    u = branch_in.to(_compute_dtype(branch_in))
    normed = (u * torch.rsqrt(u.square().mean(-1, keepdim=True) + eps)).to(branch_in.dtype)
    return weight.to(branch_in.dtype) * normed


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
