"""Sites of two layers joined where a graph is recorded: a write projects for the site that reads in the next layer.

Shapes: T tokens, n streams, C channels, m = (n+2)*n; x [T, n, C] contiguous, branch tensors and gain [T, C], [C],
numbers a token token-last, partial [splits, rows, T] as `triton/project.py` has it.

The projections are values that go ahead of their turn: they have no gradient, and who writes them gives none to phi.
The reader's node owns all uses of x and of its parameters, as `read`'s does, and its backward is the same. So a graph
that is cut between the layers (checkpointing, a pipeline, sharding) loses nothing but the saved pass.
"""

from typing import Any

from . import normed
from .registered import contiguous, fake_read, get_implementation, new_link, read_backward, register, write_backward


def _compute_write_project(link, x, branch_out, h_post, h_res, phi, backend):
    implementation: Any = get_implementation(backend)
    return implementation.write_project(x, branch_out, h_post, h_res, phi, True)


def _fake_write_project(link, x, branch_out, h_post, h_res, phi, backend):
    implementation: Any = get_implementation(backend)
    return x.new_empty(x.shape), phi.new_empty(implementation.shape_partial(x))


write_project = register(
    "write_project",
    "(Tensor link, Tensor x, Tensor branch_out, Tensor h_post, Tensor h_res, Tensor phi, str backend)"
    " -> (Tensor, Tensor)",
    _compute_write_project,
    _fake_write_project,
)


def _save_write_project(ctx, inputs, output):
    _, _, branch_out, h_post, _, _, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(branch_out, h_post)


def _differentiate_write_project(ctx, d_x_next, _partial):
    d_x_next = d_x_next.contiguous()
    d_branch_out, d_h_post = write_backward(*ctx.saved_tensors, d_x_next, ctx.backend)
    return d_x_next, None, d_branch_out, d_h_post, None, None, None


write_project.register_autograd(_differentiate_write_project, setup_context=_save_write_project)


def _compute_read(x, phi, bias, alpha, partial, num_iters, norm_eps, backend):
    implementation: Any = get_implementation(backend)
    return *implementation.read_projected(partial, x, bias, alpha, num_iters, norm_eps), new_link(x)


def _compute_read_normed(x, phi, bias, alpha, gain, partial, num_iters, norm_eps, gain_eps, backend):
    implementation: Any = get_implementation(backend)
    outputs = implementation.read_projected(partial, x, bias, alpha, num_iters, norm_eps, gain, gain_eps)
    return *outputs, new_link(x)


read_projected = register(
    "read_projected",
    "(Tensor x, Tensor phi, Tensor bias, Tensor alpha, Tensor partial, int num_iters, float norm_eps, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _compute_read,
    lambda x, phi, bias, alpha, partial, *numbers: fake_read(x, phi, bias, alpha, *numbers),
)
_NORMED_OUTPUTS = ", ".join(["Tensor"] * 8)
read_projected_normed = register(
    "read_projected_normed",
    "(Tensor x, Tensor phi, Tensor bias, Tensor alpha, Tensor gain, Tensor partial, int num_iters, float norm_eps,"
    f" float gain_eps, str backend) -> ({_NORMED_OUTPUTS})",
    _compute_read_normed,
    lambda x, phi, bias, alpha, gain, partial, *numbers: normed.fake_read_normed(x, phi, bias, alpha, gain, *numbers),
)


def _save_read(ctx, inputs, output):
    x, phi, bias, alpha, _, ctx.num_iters, _, ctx.backend = inputs
    numbers = output[3:5]
    ctx.mark_non_differentiable(*numbers)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, phi, bias, alpha, *numbers)


def _differentiate_read(ctx, d_branch_in, d_h_post, d_h_res, _projected, _inv_rms, d_x_next):
    grads = (contiguous(d_branch_in), None, contiguous(d_h_post), contiguous(d_h_res), contiguous(d_x_next))
    return *read_backward(*ctx.saved_tensors, ctx.num_iters, *grads, ctx.backend), None, None, None, None


def _save_read_normed(ctx, inputs, output):
    *tensors, _, ctx.num_iters, _, _, ctx.backend = inputs
    numbers = output[3:7]
    ctx.mark_non_differentiable(*numbers)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *numbers)


def _differentiate_read_normed(ctx, d_branch_in, d_h_post, d_h_res, *others):
    grads = (contiguous(grad) for grad in (d_branch_in, d_h_post, d_h_res, others[-1]))
    d_tensors = normed.read_normed_backward(*ctx.saved_tensors, ctx.num_iters, *grads, ctx.backend)
    return *d_tensors, None, None, None, None, None


read_projected.register_autograd(_differentiate_read, setup_context=_save_read)
read_projected_normed.register_autograd(_differentiate_read_normed, setup_context=_save_read_normed)
