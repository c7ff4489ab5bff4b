"""Sites whose branch begins with a weighted RMSNorm: what the branch reads is normed in the pass that collapses it.

Shapes: T tokens, n streams, C channels, m = (n+2)*n; x [T, n, C] contiguous, gain [C] (the norm's weight, in the dtype
of x), numbers a token token-last: h_pre [n, T], h_post [n, T], h_res [n, n, T], projected [m, T], inv_rms [T].

With u = H_pre x and r = 1/rms(u) the branch reads gain * (u r). Saved for backward besides what `registered` saves:
branch_inv_rms = r [T] and read_dots = <x_i, u> [n, T]. docs/math.md has the derivation. Kernels fuse the norm;
elsewhere it follows the op without one, of any implementation.
"""

from typing import Any

import torch
from torch import Tensor

from .reference import weighted_rms_norm
from .registered import (
    contiguous,
    fake_read,
    get_implementation,
    new_link,
    register,
    write_backward,
)


def compute_read_normed(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    gain: Tensor,
    num_iters: int,
    norm_eps: float,
    gain_eps: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """branch_in [T, C], h_post, h_res, and for backward projected, inv_rms, branch_inv_rms, read_dots."""
    implementation: Any = get_implementation(backend)
    if backend == "triton":
        return implementation.read(x, phi, bias, alpha, num_iters, norm_eps, gain, gain_eps)
    u, *maps = implementation.read(x, phi, bias, alpha, num_iters, norm_eps)
    return _norm(x, u, maps, gain, gain_eps)


def compute_write_read_normed(
    x: Tensor,
    branch_out: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    gain: Tensor,
    num_iters: int,
    norm_eps: float,
    gain_eps: float,
    backend: str,
) -> tuple[Tensor, ...]:
    """The streams after one site, and the next site's `read` of them."""
    implementation: Any = get_implementation(backend)
    arguments = (x, branch_out, h_post, h_res, phi, bias, alpha, num_iters, norm_eps)
    if backend == "triton":
        return implementation.write_read(*arguments, gain, gain_eps)
    x_next, u, *maps = implementation.write_read(*arguments)
    return x_next, *_norm(x_next, u, maps, gain, gain_eps)


def _norm(x: Tensor, u: Tensor, maps: list[Tensor], gain: Tensor, gain_eps: float) -> tuple[Tensor, ...]:
    wide = u.to(maps[0].dtype)
    branch_inv_rms = torch.rsqrt(wide.square().mean(-1) + gain_eps)
    read_dots = torch.stack([(x_i.to(wide.dtype) * wide).sum(-1) for x_i in x.unbind(1)])
    return weighted_rms_norm(u, gain, gain_eps), *maps, branch_inv_rms, read_dots


def _backpropagate_read(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    gain: Tensor,
    projected: Tensor,
    inv_rms: Tensor,
    branch_inv_rms: Tensor,
    read_dots: Tensor,
    num_iters: int,
    d_branch_in: Tensor | None,
    d_h_post: Tensor | None,
    d_h_res: Tensor | None,
    d_x_next: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    implementation: Any = get_implementation(backend)
    saved = (x, phi, bias, alpha, projected, inv_rms, num_iters)
    if backend == "triton":
        grads = (d_branch_in, None, d_h_post, d_h_res, d_x_next)
        return implementation.backpropagate_read(*saved, *grads, gain, branch_inv_rms, read_dots)
    d_u, d_gain = None, torch.zeros_like(gain)
    if d_branch_in is not None:
        n = x.shape[1]
        h_pre = torch.sigmoid(alpha[0] * (projected[:n] * inv_rms) + bias[:n, None])
        wide, grad, r = implementation.pre(x.to(phi.dtype), h_pre), d_branch_in.to(phi.dtype), branch_inv_rms[:, None]
        d_gain = (wide * r * grad).sum(0).to(gain.dtype)
        grad = gain.to(phi.dtype) * grad
        d_u = r * grad - r**3 * (grad * wide).mean(-1, keepdim=True) * wide
    return *implementation.backpropagate_read(*saved, d_u, None, d_h_post, d_h_res, d_x_next), d_gain


def fake_read_normed(x, phi, bias, alpha, gain, num_iters, norm_eps, gain_eps, backend):
    """What `read_normed` returns, empty."""
    *outputs, link = fake_read(x, phi, bias, alpha, num_iters, norm_eps, backend)
    return *outputs, phi.new_empty(x.shape[0]), phi.new_empty(x.shape[1], x.shape[0]), link


_OUTPUTS = ", ".join(["Tensor"] * 8)

read_normed = register(
    "read_normed",
    "(Tensor x, Tensor phi, Tensor bias, Tensor alpha, Tensor gain, int num_iters, float norm_eps, float gain_eps,"
    f" str backend) -> ({_OUTPUTS})",
    lambda x, *others: (*compute_read_normed(x, *others), new_link(x)),
    fake_read_normed,
)
read_normed_backward = register(
    "read_normed_backward",
    "(Tensor x, Tensor phi, Tensor bias, Tensor alpha, Tensor gain, Tensor projected, Tensor inv_rms,"
    " Tensor branch_inv_rms, Tensor read_dots, int num_iters, Tensor? d_branch_in, Tensor? d_h_post, Tensor? d_h_res,"
    " Tensor? d_x_next, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backpropagate_read,
    lambda x, phi, bias, alpha, gain, *_: tuple(torch.empty_like(t) for t in (x, phi, bias, alpha, gain)),
)


def save_read_normed(ctx, inputs, output):
    """What `read_normed` keeps for backward."""
    *tensors, ctx.num_iters, _, _, ctx.backend = inputs
    numbers = output[3:7]
    ctx.mark_non_differentiable(*numbers)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *numbers)


def differentiate_read_normed(ctx, d_branch_in, d_h_post, d_h_res, *others):
    """Gradients of `read_normed`'s inputs."""
    grads = (contiguous(grad) for grad in (d_branch_in, d_h_post, d_h_res, others[-1]))
    return *read_normed_backward(*ctx.saved_tensors, ctx.num_iters, *grads, ctx.backend), None, None, None, None


read_normed.register_autograd(differentiate_read_normed, setup_context=save_read_normed)


write_read_normed = register(
    "write_read_normed",
    "(Tensor link, Tensor x, Tensor branch_out, Tensor h_post, Tensor h_res, Tensor phi, Tensor bias, Tensor alpha,"
    f" Tensor gain, int num_iters, float norm_eps, float gain_eps, str backend) -> (Tensor, {_OUTPUTS})",
    lambda link, x, *others: (*compute_write_read_normed(x, *others), new_link(x)),
    lambda link, x, branch_out, h_post, h_res, *others: (torch.empty_like(x), *fake_read_normed(x, *others)),
)


def _save_write_read(ctx, inputs, output):
    _, _, branch_out, h_post, _, *parameters, ctx.num_iters, _, _, ctx.backend = inputs
    x_next, numbers = output[0], output[4:8]
    ctx.mark_non_differentiable(*numbers)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(branch_out, h_post, x_next, *parameters, *numbers)


def _differentiate_write_read(ctx, d_x_next, d_branch_in, d_h_post, d_h_res, *others):
    branch_out, h_post, *saved = ctx.saved_tensors
    grads = (contiguous(grad) for grad in (d_branch_in, d_h_post, d_h_res, others[-1]))
    d_x, *d_parameters = read_normed_backward(*saved, ctx.num_iters, *grads, ctx.backend)
    # someone outside the two sites read x_next too, a hook that records hidden states for one
    d_x = d_x if d_x_next is None else d_x + d_x_next
    d_branch_out, d_next_h_post = write_backward(branch_out, h_post, d_x, ctx.backend)
    return d_x, None, d_branch_out, d_next_h_post, None, *d_parameters, None, None, None, None


write_read_normed.register_autograd(_differentiate_write_read, setup_context=_save_write_read)
