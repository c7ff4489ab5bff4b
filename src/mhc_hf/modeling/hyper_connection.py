"""HyperConnection: the module at a site, one around each attention and each MLP.

Shapes: B batch, S sequence, n streams (expansion rate), C channels of one stream.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from ..ops import mhc_post_res, mhc_pre
from ..ops.backends import runs_on_triton
from ..ops.functional import (
    SiteRead,
    joins_ahead,
    pass_site_natively,
    site_read,
    site_read_projected,
    site_write,
    site_write_collapse,
    site_write_read,
)
from .branch_norm import take_norm
from .configuration_mhc import MHCConfig
from .handing_on import take_projections, write_ahead
from .projections import compute_maps
from .recompute import default_block_layers, find_block, hand_on, write_anew
from .starts import STARTS, bias_of


class Collapsed(NamedTuple):
    """The mean of the streams after the last site, [B, S, C]; they themselves have not been written."""

    mean: Tensor


class Unwritten(NamedTuple):
    """Streams after a site that the next site of the layer is to write, in the pass in which it reads them."""

    x: Tensor
    branch_out: Tensor
    site: SiteRead


@dataclass(frozen=True)
class Joins:
    """What kernels may join to a site's own passes.

    One object, and no arguments of their own: who moves a module's arguments to its device, as accelerate's hooks do,
    would move the modules among them.

    Attributes:
        norm: the first norm of F, where the branch begins after it: one for which `is_llama_norm` holds.
        defers: the caller gives the answer to the next site as it is, and the write is left to that one.
        next_site: who is to read the streams in the next layer.
        collapses: the caller wants the mean of the streams and nothing else.
    """

    norm: nn.Module | None = None
    defers: bool = False
    next_site: "HyperConnection | None" = None
    collapses: bool = False


_ALONE = Joins()
# a layer says so where no kernels run: it has asked for all of its sites
NO_KERNELS = Joins()


class HyperConnection(nn.Module):
    """x' = H_res x + H_post F(H_pre x), with maps computed from x itself (arXiv 2512.24880, Eq. 3, 7-9).

    The parameters are float32 whatever the model's dtype, and stay so under `.to(dtype)`: scalars near 1 do not move in
    bf16, where a step of 1e-3 is under half a unit in the last place.

    Args:
        config: configuration of the widened model.
        site: index of this site in the whole model, counted from 0; the starts turn with it.
    Attributes:
        phi: [(n+2)*n, n*C] float32, rows in the order pre, post, res.
        bias: [(n+2)*n] float32, same order.
        alpha: [3] float32, gating factors of the dynamic maps: pre, post, res.
    """

    def __init__(self, config: MHCConfig, site: int):
        super().__init__()
        self.site = site
        self.hc_mult = config.hc_mult
        self.hidden_size = config.hidden_size
        self.num_iters = config.hc_sinkhorn_iters
        self.norm_eps = config.hc_norm_eps
        self.projection = config.hc_projection
        self.start = config.hc_start
        self.alpha_init: Any = config.hc_alpha_init
        self.phi_std = getattr(config, "initializer_range", 0.02)
        self.recompute = config.hc_recompute
        layers = config.hc_recompute_layers or default_block_layers(self.hc_mult, config.num_hidden_layers)
        # two sites a layer, in the families that have most of them
        self.sites_per_block = 2 * layers
        num_logits = (self.hc_mult + 2) * self.hc_mult
        self.phi = nn.Parameter(torch.empty(num_logits, self.hc_mult * self.hidden_size, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(num_logits, dtype=torch.float32))
        self.alpha = nn.Parameter(torch.empty(3, dtype=torch.float32))

    def forward(
        self,
        streams: Tensor | Unwritten,
        branch: Callable[[Tensor], Tensor],
        checkpointed: bool = False,
        joins: Joins = _ALONE,
    ) -> Tensor | Unwritten | Collapsed:
        """One site, its branch included.

        Args:
            streams: [B, S, n*C], stream-major, or what the site before has deferred.
            branch: F, the sub-layer with its own norms: [B, S, C] -> [B, S, C].
            checkpointed: all of the layer is made again in backward, so that recompute has nothing to save.
            joins: what is joined, where kernels run.
        Returns:
            [B, S, n*C] in the dtype of `streams`; an Unwritten where the site defers, a Collapsed where it collapses.
        """
        if self.projection != "sinkhorn":
            assert isinstance(streams, Tensor)
            x = self._split(streams)  # [B, S, n, C]
            h_pre, h_post, h_res = self.maps(streams)
            branch_out = self._run(branch, joins.norm, mhc_pre(x, h_pre))
            return mhc_post_res(x, branch_out, h_post, h_res).flatten(-2)
        if joins is NO_KERNELS and isinstance(streams, Tensor):
            parameters = (self.phi, self.bias, self.alpha, self.num_iters, self.norm_eps)
            run = partial(self._run, branch, None)
            if (written := pass_site_natively(streams, self.hc_mult, *parameters, run)) is not None:
                return written
        recompute = self.recompute and not checkpointed and self.training and torch.is_grad_enabled()
        is_compiling = torch.compiler.is_compiling()
        if recompute and not is_compiling and isinstance(streams, Tensor):
            x = self._split(streams)
            block = find_block(streams, x, self.sites_per_block)
            with block.keeping_out(x):
                x, site, norm = self._read(streams, joins.norm)
            branch_out = self._run(branch, norm, site.branch_in)
            block.record(branch_out, site)
            return hand_on(block, site_write(x, branch_out, site).flatten(-2))
        x, site, norm = self._read(streams, joins.norm)
        branch_out = self._run(branch, norm, site.branch_in)
        if joins.defers and not recompute:
            return Unwritten(x, branch_out, site)
        if recompute and is_compiling and (self.site + 1) % self.sites_per_block != 0:
            return write_anew(x, branch_out, site).flatten(-2)
        if joins.collapses and joins_ahead(x, self.hc_mult):
            return Collapsed(site_write_collapse(x, branch_out, site))
        # where one trains and the other does not, PEFT has put a copy in the other's place: it would project in vain
        if joins.next_site is None or joins.next_site.phi.requires_grad != self.phi.requires_grad:
            return site_write(x, branch_out, site).flatten(-2)
        return write_ahead(x, branch_out, site, joins.next_site)

    def _read(self, streams: Tensor | Unwritten, norm: nn.Module | None) -> tuple[Tensor, SiteRead, nn.Module | None]:
        """The streams [B, S, n, C], what the site reads of them, and the norm unless it is applied already."""
        x = streams.x if isinstance(streams, Unwritten) else self._split(streams)
        keywords: Any = {"num_iters": self.num_iters, "norm_eps": self.norm_eps}
        if not runs_on_triton(x, self.hc_mult):
            assert isinstance(streams, Tensor)
            return x, site_read(x, self.phi, self.bias, self.alpha, **keywords), norm
        keywords["branch_norm"] = branch_norm = take_norm(norm, x)
        if isinstance(streams, Unwritten):
            x, site = site_write_read(*streams, self.phi, self.bias, self.alpha, **keywords)
        elif (projections := take_projections(streams, x, self.phi)) is not None:
            site = site_read_projected(x, projections, self.bias, self.alpha, **keywords)
        else:
            site = site_read(x, self.phi, self.bias, self.alpha, **keywords)
        return x, site, norm if branch_norm is None else None

    def _run(self, branch: Callable[[Tensor], Tensor], norm: nn.Module | None, branch_in: Tensor) -> Tensor:
        out = branch(branch_in if norm is None else norm(branch_in))
        # under autocast a branch may answer in a lower dtype than the streams have
        return out.to(branch_in.dtype)

    def maps(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H_pre [B, S, n], H_post [B, S, n] and H_res [B, S, n, n] at `streams` [B, S, n*C], to look at."""
        return compute_maps(
            self._split(streams),
            self.phi,
            self.bias,
            self.alpha,
            projection=self.projection,
            num_iters=self.num_iters,
            norm_eps=self.norm_eps,
        )

    def start_values(self) -> dict[str, Tensor]:
        """What the parameters begin with: float32 CPU tensors under their names, computed from the configuration alone.

        A phi of zeros is a single zero seen at full size; call `.contiguous()` on it before you write to it.
        """
        start = STARTS[self.start]
        shape = self.phi.shape
        phi = torch.zeros(()).expand(shape)
        if start.phi_is_random:
            phi = torch.empty(shape).normal_(std=self.phi_std)
        bias = bias_of(start.maps(self.hc_mult, self.site), self.projection)
        return {"phi": phi, "bias": bias, "alpha": torch.full((3,), float(self.alpha_init))}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to the start of the configuration; those that a checkpoint has filled are left alone."""
        with torch.device("cpu"):
            values = self.start_values()
        for name, value in values.items():
            # transformers' own `copy_` skips what from_pretrained has loaded
            init.copy_(getattr(self, name), value)

    def extra_repr(self) -> str:
        return f"hc_mult={self.hc_mult}, hidden_size={self.hidden_size}, site={self.site}"

    def _split(self, streams: Tensor) -> Tensor:
        return streams.unflatten(-1, (self.hc_mult, self.hidden_size))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "HyperConnection":
        def keep_float32(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if out.dtype == tensor.dtype or not out.is_floating_point():
                return out
            # not `out.float()`: the bits are gone there. Take the move to another device, leave the cast
            return tensor.to(out.device)

        return super()._apply(keep_float32, *args, **kwargs)
