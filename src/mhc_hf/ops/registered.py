"""The ops as torch.library custom ops: one registration with fake and autograd, three implementations (torch,
native, triton).

Shapes: T tokens, n streams, C channels, m = (n+2)*n; x [T, n, C] contiguous, branch tensors [T, C] contiguous, numbers
a token token-last: h_pre [n, T], h_post [n, T], h_res [n, n, T], projected [m, T], inv_rms [T].

A backward is an op of its own, so that a compiled graph holds the two ends of it and nothing in between. Saved for it:
the streams, the branch output, and m + 1 numbers a token; the maps of a site are made again from those.

`link` is how one node comes to own all uses of x. It has the shape of x but no memory, and stands for "the streams
that the site mixes": `read` returns it, `write` takes it, and its gradient is the gradient of the streams after the
site, as it came. `read`'s backward then does what a write's would, H_res^T d_x_next and <d_x_next_i, x_j>, in the pass
that it makes over x anyway, and no partial d_x is written, read and added.
"""

import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from . import eager
from .sinkhorn import backpropagate_projection, project_doubly_stochastic

P = ParamSpec("P")
R = TypeVar("R")

# "mhc_hf"; a copy of this code that came with a model's weights goes by its own name, and may be loaded beside us
_NAMESPACE = re.sub(r"\W", "_", __name__.removesuffix(".ops.registered"), flags=re.ASCII)


@cache
def exempt_from_autocast(implementation: Callable[P, R]) -> Callable[P, R]:
    """Maps decide what of a stream survives a hundred sites: never in half precision, whatever autocast says."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        device_type = args[0].device.type  # type: ignore[attr-defined]
        if not torch.is_autocast_enabled(device_type):
            return implementation(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return implementation(*args, **kwargs)

    return call


@cache
def get_implementation(backend: str) -> ModuleType:
    """The module that computes: `eager` for "torch", else the launchers of the backend, imported here on first use."""
    return eager if backend == "torch" else import_module(f".{backend}.launch", __package__)


def register(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A custom op with its fake, exempt from autocast; its autograd formula is given afterwards."""
    op = torch.library.custom_op(
        f"{_NAMESPACE}::{name}", exempt_from_autocast(implementation), mutates_args=(), schema=schema
    )
    op.register_fake(fake)
    return op


# ---- Sinkhorn-Knopp alone -------------------------------------------------------------------------------------------


def _sinkhorn(logits, num_iters, backend):
    if backend == "torch":
        return project_doubly_stochastic(logits, num_iters)
    return get_implementation(backend).project_doubly_stochastic(logits, num_iters)


def _sinkhorn_backward(grad, logits, num_iters, backend):
    if backend == "torch":
        return backpropagate_projection(grad, logits, num_iters)[0]
    return get_implementation(backend).backpropagate_projection(grad, logits, num_iters)


sinkhorn = register(
    "sinkhorn",
    "(Tensor logits, int num_iters, str backend) -> Tensor",
    _sinkhorn,
    lambda logits, num_iters, backend: torch.empty_like(logits, memory_format=torch.contiguous_format),
)
sinkhorn_backward = register(
    "sinkhorn_backward",
    "(Tensor grad, Tensor logits, int num_iters, str backend) -> Tensor",
    _sinkhorn_backward,
    lambda grad, logits, num_iters, backend: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


def _save_sinkhorn(ctx, inputs, output):
    logits, ctx.num_iters, ctx.backend = inputs
    ctx.save_for_backward(logits)


def _differentiate_sinkhorn(ctx, grad):
    (logits,) = ctx.saved_tensors
    return sinkhorn_backward(grad.contiguous(), logits, ctx.num_iters, ctx.backend), None, None


sinkhorn.register_autograd(_differentiate_sinkhorn, setup_context=_save_sinkhorn)


# ---- what a site does before its branch -----------------------------------------------------------------------------

_READ_ARGUMENTS = "(Tensor x, Tensor phi, Tensor bias, Tensor alpha, int num_iters, float norm_eps, str backend)"


def _coefficients(x, phi, bias, alpha, num_iters, norm_eps, backend):
    return get_implementation(backend).coefficients(x, phi, bias, alpha, num_iters, norm_eps)


def _fake_coefficients(x, phi, bias, alpha, num_iters, norm_eps, backend):
    num_tokens, n, _ = x.shape
    shapes = ((n, num_tokens), (n, num_tokens), (n, n, num_tokens), (phi.shape[0], num_tokens), (num_tokens,))
    return tuple(phi.new_empty(shape) for shape in shapes)


def _read(x, phi, bias, alpha, num_iters, norm_eps, backend):
    outputs = get_implementation(backend).read(x, phi, bias, alpha, num_iters, norm_eps)
    return *outputs, new_link(x)


def fake_read(x, phi, bias, alpha, num_iters, norm_eps, backend):
    """What `read` returns, empty."""
    _, *others = _fake_coefficients(x, phi, bias, alpha, num_iters, norm_eps, backend)
    return x.new_empty(x.shape[0], x.shape[2]), *others, new_link(x)


def new_link(x):
    """The shape of x, one number of memory: what `read` hands to `write`."""
    return x.new_zeros(1).expand(x.shape)


coefficients = register(
    "coefficients", _READ_ARGUMENTS + " -> (Tensor, Tensor, Tensor, Tensor, Tensor)", _coefficients, _fake_coefficients
)
read = register("read", _READ_ARGUMENTS + " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _read, fake_read)


def _read_backward(
    x, phi, bias, alpha, projected, inv_rms, num_iters, d_branch_in, d_h_pre, d_h_post, d_h_res, d_x_next, backend
):
    return get_implementation(backend).backpropagate_read(
        x, phi, bias, alpha, projected, inv_rms, num_iters, d_branch_in, d_h_pre, d_h_post, d_h_res, d_x_next
    )


read_backward = register(
    "read_backward",
    "(Tensor x, Tensor phi, Tensor bias, Tensor alpha, Tensor projected, Tensor inv_rms, int num_iters,"
    " Tensor? d_branch_in, Tensor? d_h_pre, Tensor? d_h_post, Tensor? d_h_res, Tensor? d_x_next, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _read_backward,
    lambda x, phi, bias, alpha, *_: tuple(torch.empty_like(t) for t in (x, phi, bias, alpha)),
)


def _save_coefficients(ctx, inputs, output):
    *tensors, ctx.num_iters, _, ctx.backend = inputs
    projected, inv_rms = output[3:5]
    ctx.mark_non_differentiable(projected, inv_rms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, projected, inv_rms)


def _differentiate_coefficients(ctx, d_h_pre, d_h_post, d_h_res, _projected, _inv_rms):
    grads = (None, contiguous(d_h_pre), contiguous(d_h_post), contiguous(d_h_res), None)
    return *read_backward(*ctx.saved_tensors, ctx.num_iters, *grads, ctx.backend), None, None, None


def save_read(ctx, inputs, output):
    """What `read` keeps for backward."""
    *tensors, ctx.num_iters, _, ctx.backend = inputs
    projected, inv_rms = output[3:5]
    ctx.mark_non_differentiable(projected, inv_rms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, projected, inv_rms)


def differentiate_read(ctx, d_branch_in, d_h_post, d_h_res, _projected, _inv_rms, d_x_next):
    """Gradients of `read`'s inputs."""
    grads = (contiguous(d_branch_in), None, contiguous(d_h_post), contiguous(d_h_res), contiguous(d_x_next))
    return *read_backward(*ctx.saved_tensors, ctx.num_iters, *grads, ctx.backend), None, None, None


coefficients.register_autograd(_differentiate_coefficients, setup_context=_save_coefficients)
read.register_autograd(differentiate_read, setup_context=save_read)


# ---- H_pre x alone --------------------------------------------------------------------------------------------------

pre = register(
    "pre",
    "(Tensor x, Tensor h_pre, str backend) -> Tensor",
    lambda x, h_pre, backend: get_implementation(backend).pre(x, h_pre),
    lambda x, h_pre, backend: x.new_empty(x.shape[0], x.shape[2]),
)
pre_backward = register(
    "pre_backward",
    "(Tensor x, Tensor h_pre, Tensor d_branch_in, str backend) -> (Tensor, Tensor)",
    lambda x, h_pre, d_branch_in, backend: get_implementation(backend).backpropagate_pre(x, h_pre, d_branch_in),
    lambda x, h_pre, d_branch_in, backend: (torch.empty_like(x), torch.empty_like(h_pre)),
)


def _save_pre(ctx, inputs, output):
    x, h_pre, ctx.backend = inputs
    ctx.save_for_backward(x, h_pre)


def _differentiate_pre(ctx, d_branch_in):
    return *pre_backward(*ctx.saved_tensors, d_branch_in.contiguous(), ctx.backend), None


pre.register_autograd(_differentiate_pre, setup_context=_save_pre)


# ---- what a site does after its branch ------------------------------------------------------------------------------

post_res = register(
    "post_res",
    "(Tensor x, Tensor branch_out, Tensor h_post, Tensor h_res, str backend) -> Tensor",
    lambda x, branch_out, h_post, h_res, backend: get_implementation(backend).post_res(x, branch_out, h_post, h_res),
    lambda x, branch_out, h_post, h_res, backend: torch.empty_like(x),
)
write = register(
    "write",
    "(Tensor link, Tensor x, Tensor branch_out, Tensor h_post, Tensor h_res, str backend) -> Tensor",
    lambda link, x, branch_out, h_post, h_res, backend: get_implementation(backend).post_res(
        x, branch_out, h_post, h_res
    ),
    lambda link, x, branch_out, h_post, h_res, backend: torch.empty_like(x),
)
write_backward = register(
    "write_backward",
    "(Tensor branch_out, Tensor h_post, Tensor d_x_next, str backend) -> (Tensor, Tensor)",
    lambda branch_out, h_post, d_x_next, backend: get_implementation(backend).backpropagate_write(
        branch_out, h_post, d_x_next
    ),
    lambda branch_out, h_post, d_x_next, backend: (torch.empty_like(branch_out), torch.empty_like(h_post)),
)
mix_backward = register(
    "mix_backward",
    "(Tensor x, Tensor h_res, Tensor d_x_next, str backend) -> (Tensor, Tensor)",
    lambda x, h_res, d_x_next, backend: get_implementation(backend).backpropagate_mix(x, h_res, d_x_next),
    lambda x, h_res, d_x_next, backend: (torch.empty_like(x), torch.empty_like(h_res)),
)


def _save_post_res(ctx, inputs, output):
    x, branch_out, h_post, h_res, ctx.backend = inputs
    ctx.save_for_backward(x, branch_out, h_post, h_res)


def _differentiate_post_res(ctx, d_x_next):
    x, branch_out, h_post, h_res = ctx.saved_tensors
    d_x_next = d_x_next.contiguous()
    d_branch_out, d_h_post = write_backward(branch_out, h_post, d_x_next, ctx.backend)
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[3]):
        return None, d_branch_out, d_h_post, None, None
    d_x, d_h_res = mix_backward(x, h_res, d_x_next, ctx.backend)
    return d_x, d_branch_out, d_h_post, d_h_res, None


def save_write(ctx, inputs, output):
    """What `write` keeps for backward."""
    _, _, branch_out, h_post, _, ctx.backend = inputs
    ctx.save_for_backward(branch_out, h_post)


def differentiate_write(ctx, d_x_next):
    """Gradients of `write`'s inputs."""
    d_x_next = d_x_next.contiguous()
    d_branch_out, d_h_post = write_backward(*ctx.saved_tensors, d_x_next, ctx.backend)
    # x and h_res get theirs from `read`'s backward, to which the link carries d_x_next
    return d_x_next, None, d_branch_out, d_h_post, None, None


post_res.register_autograd(_differentiate_post_res, setup_context=_save_post_res)
write.register_autograd(differentiate_write, setup_context=save_write)


# ---- after one branch and before the next: the kernels fuse the two -------------------------------------------------

write_read = register(
    "write_read",
    "(Tensor link, Tensor x, Tensor branch_out, Tensor h_post, Tensor h_res, Tensor phi, Tensor bias, Tensor alpha,"
    " int num_iters, float norm_eps, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda link, x, branch_out, h_post, h_res, phi, bias, alpha, num_iters, norm_eps, backend: (
        *get_implementation(backend).write_read(x, branch_out, h_post, h_res, phi, bias, alpha, num_iters, norm_eps),
        new_link(x),
    ),
    lambda link, x, branch_out, h_post, h_res, phi, bias, alpha, num_iters, norm_eps, backend: (
        torch.empty_like(x),
        *fake_read(x, phi, bias, alpha, num_iters, norm_eps, backend),
    ),
)


def _save_write_read(ctx, inputs, output):
    _, _, branch_out, h_post, _, phi, bias, alpha, ctx.num_iters, _, ctx.backend = inputs
    x_next, _, _, _, projected, inv_rms, _ = output
    ctx.mark_non_differentiable(projected, inv_rms)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(branch_out, h_post, x_next, phi, bias, alpha, projected, inv_rms)


def _differentiate_write_read(ctx, d_x_next, d_branch_in, d_h_post, d_h_res, _projected, _inv_rms, d_x_after):
    branch_out, h_post, *saved = ctx.saved_tensors
    grads = (contiguous(d_branch_in), None, contiguous(d_h_post), contiguous(d_h_res), contiguous(d_x_after))
    d_x, d_phi, d_bias, d_alpha = read_backward(*saved, ctx.num_iters, *grads, ctx.backend)
    # someone outside the two sites read x_next too, a hook that records hidden states for one
    d_x = d_x if d_x_next is None else d_x + d_x_next
    d_branch_out, d_next_h_post = write_backward(branch_out, h_post, d_x, ctx.backend)
    return d_x, None, d_branch_out, d_next_h_post, None, d_phi, d_bias, d_alpha, None, None, None


write_read.register_autograd(_differentiate_write_read, setup_context=_save_write_read)


def contiguous(grad: Tensor | None) -> Tensor | None:
    """A gradient as the backward ops take it; None where there is none."""
    return None if grad is None else grad.contiguous()
