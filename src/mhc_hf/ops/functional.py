"""The public ops: checks and choice of backend. What they compute is `reference`; how, `eager`, `native` and `triton`.

Shapes: n streams, C channels of one stream, m = (n+2)*n; `...` stands for any leading shape, T for its product.
Convention: h_res[..., i, j] carries input stream j into output stream i.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import ahead, normed, registered
from .backends import choose_backend, runs_on_triton
from .checks import check_branch, check_branch_norm, check_iters, check_maps, check_parameters, check_streams

Backend = Literal["auto", "torch", "native", "triton"]


def sinkhorn_knopp(logits: Tensor, num_iters: int = 20, *, backend: Backend = "auto") -> Tensor:
    """Project exp(logits) onto the doubly stochastic matrices (Eq. 9), columns first and rows last.

    Args:
        logits: [..., n, n], any floating dtype; computed in float32, or in float64 where they are float64.
        num_iters: t_max >= 1; one iteration normalises the columns, then the rows.
        backend: "auto", "torch", "native" or "triton"; one that is named runs or raises.
    Returns:
        [..., n, n] float32 (or float64): rows sum to 1 to rounding; what has not converged is left on the columns. The
        gradient is that of the unrolled iterations.
    Raises:
        ValueError: not square, n outside 2..8 on native or triton, not floating, or `num_iters` < 1.
    """
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2] or not logits.is_floating_point():
        raise ValueError(
            f"`logits` must be floating and end in a square [n, n], got {logits.dtype} {list(logits.shape)}. "
            "Unflatten the last n*n numbers first."
        )
    check_iters(num_iters)
    n = logits.shape[-1]
    token_last = logits.to(_compute_dtype(logits)).reshape(-1, n, n).permute(1, 2, 0).contiguous()
    chosen = choose_backend(backend, token_last, n)
    h_res = registered.sinkhorn(token_last, num_iters, chosen)
    return h_res.permute(2, 0, 1).unflatten(0, logits.shape[:-2])


def mhc_coefficients(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    num_iters: int = 20,
    norm_eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The three maps of a site from its streams (Eq. 7 and 8).

    Args:
        x: [..., n, C] streams, any floating dtype, any strides.
        phi: [(n+2)*n, n*C] projection, float32, rows in the order pre, post, res.
        bias: [(n+2)*n] static part of the logits, float32, same order.
        alpha: [3] gating factors of the dynamic part, float32: pre, post, res.
        num_iters: t_max of Sinkhorn-Knopp, >= 1.
        norm_eps: added to the mean square under the root.
        backend: "auto", "torch", "native" or "triton"; one that is named runs or raises.
    Returns:
        h_pre [..., n] in (0, 1), h_post [..., n] in (0, 2), h_res [..., n, n] with rows that sum to 1; float32, or
        float64 where `x` is.
    Raises:
        ValueError: shapes disagree, or a parameter is not float32.
        RuntimeError: the named backend cannot run here.
    """
    check_streams(x)
    check_parameters(x, phi, bias, alpha)
    check_iters(num_iters)
    chosen = choose_backend(backend, x, x.shape[-2])
    arguments = (_flatten_tokens(x), *_match(x, phi, bias, alpha), num_iters, norm_eps)
    h_pre, h_post, h_res, _, _ = _call("coefficients", chosen, *arguments)
    return _unflatten(h_pre, x), _unflatten(h_post, x), _unflatten(h_res, x)


def mhc_pre(x: Tensor, h_pre: Tensor, *, backend: Backend = "auto") -> Tensor:
    """What the branch reads: H_pre x.

    Args:
        x: [..., n, C] streams, any floating dtype.
        h_pre: [..., n], float32.
    Returns:
        [..., C] in the dtype of `x`; computed in float32 and rounded once.
    Raises:
        ValueError: shapes disagree, or the map is not float32.
    """
    check_streams(x)
    check_maps(x, h_pre=h_pre)
    chosen = choose_backend(backend, x, x.shape[-2])
    branch_in = _call("pre", chosen, _flatten_tokens(x), _flatten_map(h_pre, x))
    return _unflatten_branch(branch_in, x)


def mhc_post_res(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor, *, backend: Backend = "auto") -> Tensor:
    """The streams after the site: x' = H_res x + H_post (outer) F (Eq. 3).

    Args:
        x: [..., n, C] streams, any floating dtype.
        branch_out: [..., C], dtype of `x`.
        h_post: [..., n], float32.
        h_res: [..., n, n], float32, into stream i (row) from stream j (column).
    Returns:
        [..., n, C] in the dtype of `x`; computed in float32 and rounded once.
    Raises:
        ValueError: shapes or dtypes disagree, or a map is not float32.
    """
    check_streams(x)
    check_branch(x, branch_out)
    check_maps(x, h_post=h_post, h_res=h_res)
    chosen = choose_backend(backend, x, x.shape[-2])
    arguments = (_flatten_tokens(x), _flatten_branch(branch_out), _flatten_map(h_post, x), _flatten_map(h_res, x))
    return _call("post_res", chosen, *arguments).view_as(x)


def mhc_pre_branch(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    num_iters: int = 20,
    norm_eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """All that a site does before its branch: `mhc_coefficients`, then `mhc_pre`, in one op.

    Returns:
        branch_in [..., C] in the dtype of `x`, h_post [..., n], h_res [..., n, n]. Arguments and errors are those of
        `mhc_coefficients`.
    """
    site = site_read(x, phi, bias, alpha, num_iters=num_iters, norm_eps=norm_eps, backend=backend)
    return site.branch_in, _unflatten(site.h_post, x), _unflatten(site.h_res, x)


class BranchNorm(NamedTuple):
    """The RMSNorm that a branch begins with, `reference.weighted_rms_norm`: weight [C] in the dtype of the streams."""

    weight: Tensor
    eps: float


class SiteRead(NamedTuple):
    """What `site_read` hands to the branch (`branch_in` [..., C]) and to `site_write` (the rest, opaque)."""

    branch_in: Tensor
    h_post: Tensor
    h_res: Tensor
    link: Tensor | None


def site_read(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    num_iters: int = 20,
    norm_eps: float = 1e-6,
    branch_norm: BranchNorm | None = None,
    backend: Backend = "auto",
) -> SiteRead:
    """`mhc_pre_branch` for a site that writes with `site_write`: together they are one owner of all gradients of x.

    With `mhc_pre_branch` and `mhc_post_res`, two nodes each write a d_x that autograd adds: 3n rows of C a token more.
    Here one node makes d_x once, from the gradient that `site_write` passes back as it came. Values and gradients are
    the same. `site_write` must get the same `x`; h_post and h_res of a SiteRead are its messages, not to be edited.

    With `branch_norm` the branch's own first norm is applied too: branch_in is what `reference.weighted_rms_norm` makes
    of H_pre x, and the kernels need no pass of their own for it. Its weight is differentiated with the rest.

    Other arguments and errors are those of `mhc_coefficients`.
    """
    check_streams(x)
    check_parameters(x, phi, bias, alpha)
    check_iters(num_iters)
    chosen = choose_backend(backend, x, x.shape[-2])
    arguments = (_flatten_tokens(x), *_match(x, phi, bias, alpha))
    if branch_norm is None:
        outputs = _call("read", chosen, *arguments, num_iters, norm_eps)
    else:
        check_branch_norm(x, branch_norm.weight)
        numbers = (branch_norm.weight, num_iters, norm_eps, branch_norm.eps)
        outputs = _call("read_normed", chosen, *arguments, *numbers)
    return _make_site(outputs, x)


def site_write(x: Tensor, branch_out: Tensor, site: SiteRead, *, backend: Backend = "auto") -> Tensor:
    """`mhc_post_res` with the maps that `site_read` made from the same `x`.

    Args:
        x: [..., n, C] streams that `site_read` got.
        branch_out: [..., C], dtype of `x`.
        site: what `site_read` returned.
    Returns:
        [..., n, C] in the dtype of `x`.
    Raises:
        ValueError: shapes or dtypes disagree.
    """
    check_streams(x)
    check_branch(x, branch_out)
    chosen = choose_backend(backend, x, x.shape[-2])
    arguments = (_flatten_tokens(x), _flatten_branch(branch_out), site.h_post, site.h_res)
    if site.link is None:
        x_next = _call("post_res", chosen, *arguments)
    else:
        x_next = registered.write(site.link, *arguments, chosen)
    return x_next.view_as(x)


def site_write_read(
    x: Tensor,
    branch_out: Tensor,
    site: SiteRead,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    *,
    num_iters: int = 20,
    norm_eps: float = 1e-6,
    branch_norm: BranchNorm | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, SiteRead]:
    """`site_write`, then `site_read` of what it wrote by the next site of the layer, in one pass over the streams.

    Args:
        x, branch_out, site: as `site_write` takes them.
        phi, bias, alpha, num_iters, norm_eps, branch_norm: the next site's, as `site_read` takes them.
    Returns:
        The streams between the sites, [..., n, C] in the dtype of `x`, and the next site's SiteRead, to be given to
        `site_write` with them.
    Raises:
        ValueError: shapes or dtypes disagree, or a parameter is not float32.
    """
    check_streams(x)
    check_branch(x, branch_out)
    check_parameters(x, phi, bias, alpha)
    check_iters(num_iters)
    chosen = choose_backend(backend, x, x.shape[-2])
    maps = (site.h_post, site.h_res)
    arguments = (_flatten_tokens(x), _flatten_branch(branch_out), *maps, *_match(x, phi, bias, alpha))
    if site.link is None and _records_graph((*arguments, *(branch_norm or ()))):
        # the first site was read without a graph, so its x needs no gradient; this site's own parameters may
        x_next = site_write(x, branch_out, site, backend=backend)
        keywords: Any = {"num_iters": num_iters, "norm_eps": norm_eps, "branch_norm": branch_norm, "backend": backend}
        return x_next, site_read(x_next, phi, bias, alpha, **keywords)
    if branch_norm is not None:
        check_branch_norm(x, branch_norm.weight)
    if site.link is None and chosen == "triton":
        launch: Any = registered.get_implementation("triton")
        x_next, *outputs = launch.write_read(*arguments, num_iters, norm_eps, *(branch_norm or ()), saves=False)
        return x_next.view_as(x), _make_site(outputs, x)
    op: str
    numbers: tuple[Any, ...]
    if branch_norm is None:
        op, numbers = "write_read", (num_iters, norm_eps)
    else:
        op, numbers = "write_read_normed", (branch_norm.weight, num_iters, norm_eps, branch_norm.eps)
    if site.link is None:
        x_next, *outputs = _compute(op, chosen, *arguments, *numbers)
    else:
        x_next, *outputs = _get_op(op)(site.link, *arguments, *numbers, chosen)
    return x_next.view_as(x), _make_site(outputs, x)


def pass_site_natively(
    streams: Tensor,
    n: int,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    num_iters: int,
    norm_eps: float,
    branch: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """`site_read`, the branch and `site_write` of a model's own site, where no kernels run and no graph is recorded.

    A decoder's token costs less arithmetic than the checks and choices of two ops; a model has made them. None where
    something else runs. [..., n*C] -> [..., n*C]
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or phi.dtype != torch.float32:
        return None
    x = streams.reshape(-1, n, streams.shape[-1] // n).contiguous()
    if choose_backend("auto", x, n) != "native" or not phi.is_contiguous():
        return None
    launch: Any = registered.get_implementation("native")
    branch_in, h_post, h_res, _, _ = launch.read(x, phi, bias, alpha, num_iters, norm_eps)
    branch_out = branch(branch_in.view(*streams.shape[:-1], x.shape[-1]))
    written = launch.post_res(x, branch_out.reshape(branch_in.shape).contiguous(), h_post, h_res)
    return written.view(streams.shape)


class Projections(NamedTuple):
    """What a pass that writes streams has found for the site that reads them: opaque, and for that phi alone."""

    partial: Tensor
    phi: Tensor


def joins_ahead(x: Tensor, n: int) -> bool:
    """Whether the joins below can run on tensors like `x`: on kernels, and in inference."""
    return not torch.is_grad_enabled() and hands_on(x, n)


def hands_on(x: Tensor, n: int) -> bool:
    """Whether a write can project for another layer's site: on kernels, and not while a compiler traces."""
    return not torch.compiler.is_compiling() and runs_on_triton(x, n)


def widen_project(hidden_states: Tensor, n: int, phi: Tensor) -> tuple[Tensor, Projections]:
    """n equal streams, and in the same pass the projections by the `phi` of the site that will read them.

    Only where `joins_ahead`. [..., C] -> [..., n, C]
    """
    launch: Any = registered.get_implementation("triton")
    x, partial = launch.widen_project(_flatten_branch(hidden_states), n, *_match(hidden_states, phi), gram=True)
    return x.view(*hidden_states.shape[:-1], n, -1), Projections(partial, phi)


def site_write_project(x: Tensor, branch_out: Tensor, site: SiteRead, phi: Tensor) -> tuple[Tensor, Projections]:
    """`site_write`, and in the same pass the projections by the `phi` of the site that will read what is written.

    For two sites that cannot meet in `site_write_read`. Only where `hands_on`; arguments are `site_write`'s. phi gets
    no gradient here: all of it comes from `site_read_projected`.
    """
    check_branch(x, branch_out)
    arguments = (_flatten_tokens(x), _flatten_branch(branch_out), site.h_post, site.h_res)
    if site.link is None:
        launch: Any = registered.get_implementation("triton")
        x_next, partial = launch.write_project(*arguments, *_match(x, phi), gram=True)
    else:
        x_next, partial = ahead.write_project(site.link, *arguments, *_match(x, phi.detach()), "triton")
    return x_next.view_as(x), Projections(partial, phi)


def site_read_projected(
    x: Tensor,
    projections: Projections,
    bias: Tensor,
    alpha: Tensor,
    *,
    num_iters: int = 20,
    norm_eps: float = 1e-6,
    branch_norm: BranchNorm | None = None,
) -> SiteRead:
    """`site_read` of streams whose projections have been made with them, without a pass of its own for these."""
    partial, phi = projections
    streams, parameters = _flatten_tokens(x), _match(x, phi, bias, alpha)
    if not _records_graph((x, *parameters, *(branch_norm or ()))):
        launch: Any = registered.get_implementation("triton")
        arguments = (partial, streams, *parameters[1:], num_iters, norm_eps, *(branch_norm or ()))
        return _make_site(launch.read_projected(*arguments, saves=False), x)
    if branch_norm is None:
        outputs = ahead.read_projected(streams, *parameters, partial, num_iters, norm_eps, "triton")
    else:
        gain, gain_eps = branch_norm
        numbers = (num_iters, norm_eps, gain_eps, "triton")
        outputs = ahead.read_projected_normed(streams, *parameters, gain, partial, *numbers)
    return _make_site(outputs, x)


def site_write_collapse(x: Tensor, branch_out: Tensor, site: SiteRead) -> Tensor:
    """The mean of the streams that `site_write` would write, from the first on, rounded as if they had been.

    Only where `joins_ahead`; arguments are `site_write`'s. [..., n, C] -> [..., C]
    """
    check_branch(x, branch_out)
    launch: Any = registered.get_implementation("triton")
    mean = launch.write_collapse(_flatten_tokens(x), _flatten_branch(branch_out), site.h_post, site.h_res)
    return _unflatten_branch(mean, x)


def _call(name: str, backend: str, *arguments: Any) -> Any:
    """Run an op: through its registration where a graph is recorded, at once where only the value is wanted.

    A custom op's way through the dispatcher costs more than the arithmetic of one decoded token.
    """
    if _records_graph(arguments):
        return _get_op(name)(*arguments, backend)
    return _compute(name, backend, *arguments)


def _get_op(name: str) -> Any:
    return getattr(normed if name.endswith("_normed") else registered, name)


def _compute(name: str, backend: str, *arguments: Any) -> Any:
    """The value alone, by the implementation."""
    if name.endswith("_normed"):
        return registered.exempt_from_autocast(getattr(normed, f"compute_{name}"))(*arguments, backend)
    return registered.exempt_from_autocast(getattr(registered.get_implementation(backend), name))(*arguments)


def _make_site(outputs: Any, x: Tensor) -> SiteRead:
    """What a read of `x` returned; where a graph is recorded the link comes last."""
    branch_in, h_post, h_res, *others = outputs
    link = others[-1] if len(others) % 2 else None
    return SiteRead(_unflatten_branch(branch_in, x), h_post, h_res, link)


def _records_graph(arguments: tuple[Any, ...]) -> bool:
    """Whether an autograd node or a compiler is to see the op."""
    return torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _match(x: Tensor, *parameters: Tensor) -> list[Tensor]:
    dtype = _compute_dtype(x)
    # asked first: a conversion to what a tensor is already costs a decoder as much as a product
    return [p if p.dtype == dtype and p.is_contiguous() else p.to(dtype).contiguous() for p in parameters]


def _flatten_tokens(x: Tensor) -> Tensor:
    """[..., n, C] -> [T, n, C], copied only where strides leave no other way."""
    return x.flatten(0, -3).contiguous()


def _flatten_branch(branch_out: Tensor) -> Tensor:
    return branch_out.flatten(0, -2).contiguous()


def _unflatten_branch(branch: Tensor, x: Tensor) -> Tensor:
    """[T, C] -> [..., C], a view."""
    return branch.view(*x.shape[:-2], x.shape[-1])


def _flatten_map(h: Tensor, x: Tensor) -> Tensor:
    """[..., n] or [..., n, n] -> [n, T] or [n, n, T] in the dtype of the computation."""
    flat = h.to(_compute_dtype(x)).reshape(-1, *h.shape[x.dim() - 2 :])
    return flat.movedim(0, -1).contiguous()


def _unflatten(h: Tensor, x: Tensor) -> Tensor:
    """[n, T] or [n, n, T] -> [..., n] or [..., n, n], a view."""
    return h.movedim(-1, 0).unflatten(0, x.shape[:-2])
