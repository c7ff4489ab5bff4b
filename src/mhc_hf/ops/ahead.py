"""Sites of two layers joined where a graph is recorded: a write projects for the site that reads in the next layer.

Shapes: T tokens, n streams, C channels, m = (n+2)*n; x [T, n, C] contiguous, branch tensors and gain [T, C], [C],
numbers a token token-last, partial [splits, rows, T] as `triton/project.py` has it.

The projections are values that go ahead of their turn: they have no gradient, and who writes them gives none to phi.
The reader's node owns all uses of x and of its parameters, as `read`'s does, and its backward is the same. So a graph
that is cut between the layers (checkpointing, a pipeline, sharding) loses nothing but the saved pass.
"""

from typing import Any

from . import normed
from .registered import (
    differentiate_read,
    differentiate_write,
    fake_read,
    get_implementation,
    new_link,
    register,
    save_read,
    save_write,
)


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
    *written, _, backend = inputs
    ctx.mark_non_differentiable(output[1])
    save_write(ctx, (*written, backend), output)


write_project.register_autograd(
    lambda ctx, d_x_next, _: (*differentiate_write(ctx, d_x_next), None), setup_context=_save_write_project
)


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


# what a read differentiates, but for `partial`, the last of the tensors; the one None more is its
read_projected.register_autograd(
    lambda ctx, *grads: (*differentiate_read(ctx, *grads), None),
    setup_context=lambda ctx, inputs, output: save_read(ctx, (*inputs[:4], *inputs[5:]), output),
)
read_projected_normed.register_autograd(
    lambda ctx, *grads: (*normed.differentiate_read_normed(ctx, *grads), None),
    setup_context=lambda ctx, inputs, output: normed.save_read_normed(ctx, (*inputs[:5], *inputs[6:]), output),
)
