"""A site with random parameters, its outputs and gradients by any implementation, and the distance between two.

Shapes: n streams, C channels, `lead` any leading shape.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mhc_hf import ops
from mhc_hf.ops import reference

PUBLIC_OPS = tuple(name for name in ops.__all__ if callable(getattr(ops, name)) and name != "SiteRead")


def bind_ops(backend: str) -> SimpleNamespace:
    """The public ops, all on one backend."""
    return SimpleNamespace(**{name: partial(getattr(ops, name), backend=backend) for name in PUBLIC_OPS})


def make_site(n: int, num_channels: int, lead=(2, 7), dtype=torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """Streams of different size, a projection that moves every map, and a branch output."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = (n + 2) * n
    return {
        "x": (normal(*lead, n, num_channels) * torch.linspace(0.5, 2, n, dtype=torch.float64)[:, None]).to(dtype),
        "phi": (normal(rows, n * num_channels) / (n * num_channels) ** 0.5).float(),
        "bias": normal(rows).float(),
        "alpha": torch.tensor([0.7, -1.1, 1.3]),
        "branch_out": normal(*lead, num_channels).to(dtype),
    }


def widen(site: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float64."""
    return {name: tensor.detach().double() for name, tensor in site.items()}


def differentiate(function, site: dict[str, Tensor], seed: int = 1) -> dict[str, Tensor]:
    """Outputs of `function(**leaves)` and the gradients of a fixed random functional of them, by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in site.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    torch.autograd.backward(outputs, [c.to(o.dtype).to(o.device) for c, o in zip(cotangents, outputs, strict=True)])
    result: dict[str, Any] = {f"out{k}": output.detach() for k, output in enumerate(outputs)}
    result.update({f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    return result


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, Euclidean, in float64; NaN counts as infinite."""
    want = want.double().cpu()
    difference = torch.linalg.vector_norm(got.double().cpu() - want)
    error = (difference / torch.linalg.vector_norm(want).clamp_min(1e-30)).item()
    return error if error == error else float("inf")


def pass_site(ops=reference, **keywords):
    """A whole site, read and write, with a branch that is not linear."""

    def run(x, phi, bias, alpha, branch_out):
        branch_in, h_post, h_res = ops.mhc_pre_branch(x, phi, bias, alpha, **keywords)
        return ops.mhc_post_res(x, torch.tanh(branch_in) * branch_out, h_post, h_res)

    return run
