"""MHCDecoderLayer: one decoder layer for all families.

It adopts the sub-modules of the family's own layer under their own names and puts a hyper-connection around each
branch. Streams travel flat between layers, [B, S, n*C]; the first layer widens the hidden states, the last one
collapses them, so that the family's own `Model.forward` runs untouched and its KV cache never hears of n.

Shapes: B batch, S sequence, n streams (expansion rate), C channels of one stream.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..ops.backends import runs_on_triton
from .branch_norm import is_hooked, is_llama_norm
from .configuration_mhc import MHCConfig
from .handing_on import widen_streams
from .hyper_connection import NO_KERNELS, Collapsed, HyperConnection, Joins
from .steps import Chain, Context, Form, resolve, run_chain


class MHCDecoderLayer(GradientCheckpointingLayer):
    """A family's decoder layer with hyper-connections in place of its residual additions.

    Args:
        base_layer: the family's layer; its sub-modules, parameters, buffers and plain attributes are taken over, not
            copied.
        config: configuration of the widened model.
        form: what its branches are made of.
        first_site: index of its first site in the whole model.
        widens: this is the first layer, and its input is [B, S, C].
        collapses: this is the last layer, and its output is [B, S, C].
    Raises:
        ValueError: the layer does not hold what the form names.
    """

    def __init__(
        self, base_layer: nn.Module, config: MHCConfig, form: Form, first_site: int, *, widens: bool, collapses: bool
    ):
        super().__init__()
        # the family's model reads attributes of its layers, such as `attention_type`, in its own forward
        for name, value in vars(base_layer).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, module in base_layer.named_children():
            self.add_module(name, module)
        for name, parameter in base_layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in base_layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in base_layer._non_persistent_buffers_set)
        self.hc_mult = config.hc_mult
        self.widens = widens
        self.collapses = collapses
        self.returns = form.returns
        self.stream_scale = form.stream_scale
        self.chains = {site: resolve(chain, base_layer) for site, chain in form.sites.items()}
        # by class, of those that a site may apply itself: a wrapper or another norm may take their place later
        self.leading_norms = {site: _llama_norm_class(chain, base_layer) for site, chain in self.chains.items()}
        # in a tuple, so that it is no sub-module of this layer
        self._next_site: tuple[HyperConnection, ...] = ()
        # the family's arguments after self and hidden_states, with their defaults
        parameters = list(inspect.signature(type(base_layer).forward).parameters.values())[2:]
        named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
        self.argument_names = tuple(p.name for p in named)
        self.argument_defaults = {p.name: None if p.default is p.empty else p.default for p in named}
        for index, site in enumerate(form.sites):
            self.add_module(site, HyperConnection(config, first_site + index))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, S, n*C] -> [B, S, n*C]; [B, S, C] where this layer widens (in) or collapses (out).

        Where the family's layer returns a tuple, so does this one, with what its attention answered besides.
        """
        given = kwargs | dict(zip(self.argument_names, args, strict=False))
        arguments = {name: given.pop(name, default) for name, default in self.argument_defaults.items()}
        context = Context(arguments, given)
        x = widen_streams(hidden_states, self.hc_mult, self._first_site()) if self.widens else hidden_states
        checkpointed = self.gradient_checkpointing and self.training
        has_kernels = runs_on_triton(x, self.hc_mult)
        for site, chain in self.chains.items():
            steps, joins = self._join(site, chain) if has_kernels else (chain, NO_KERNELS)
            x = getattr(self, site)(x, partial(self._branch, steps, context), checkpointed, joins)
        if self.stream_scale is not None:
            x = x * getattr(self, self.stream_scale)
        if isinstance(x, Collapsed):
            x = x.mean
        elif self.collapses:
            x = collapse_streams(x, self.hc_mult)
        if self.returns is None:
            return x
        return x, context.answer[self.returns] if len(context.answer) > self.returns else None

    def hand_on_to(self, layer: "MHCDecoderLayer") -> None:
        """Tell this layer which one reads its streams: it can do that one's projections with its last write."""
        if self.stream_scale is None and not self.collapses:
            self._next_site = (layer._first_site(),)

    def _first_site(self) -> Any:
        return getattr(self, next(iter(self.chains)))

    def _join(self, site: str, chain: Chain) -> tuple[Chain, Joins]:
        """The steps of a site's branch, and what the site may do besides, where kernels run."""
        kind = self.leading_norms[site]
        norm = None if kind is None else getattr(self, str(chain[0]))
        steps, norm = (chain[1:], norm) if type(norm) is kind else (chain, None)
        *_, last = self.chains
        # a hook on a site is to see streams that are written
        if site != last:
            return steps, Joins(norm, defers=not any(is_hooked(getattr(self, name)) for name in self.chains))
        if self._next_site:
            return steps, Joins(norm, next_site=self._next_site[0])
        collapses = self.collapses and self.stream_scale is None and not is_hooked(getattr(self, site))
        return steps, Joins(norm, collapses=collapses)

    def _branch(self, chain: Chain, context: Context, branch_in: Tensor) -> Tensor:
        """F of one site. [B, S, C] -> [B, S, C]"""
        # some mixtures of experts answer token by token, [B*S, C]
        return run_chain(chain, self, branch_in, context).view_as(branch_in)


def collapse_streams(streams: Tensor, hc_mult: int) -> Tensor:
    """The mean of the streams, at least in float32 and rounded once. [B, S, n*C] -> [B, S, C]"""
    x = streams.unflatten(-1, (hc_mult, -1)).to(torch.promote_types(streams.dtype, torch.float32))  # [B, S, n, C]
    first = x[..., 0, :]
    # from the first stream on: the mean of copies is then the copy, to the bit, for every n
    return (first + (x - first.unsqueeze(-2)).mean(-2)).to(streams.dtype)


def _llama_norm_class(chain: Chain, layer: nn.Module) -> type[nn.Module] | None:
    """The class of the norm that a chain begins with, where it is a plain weighted RMSNorm."""
    norm = getattr(layer, chain[0]) if isinstance(chain[0], str) else None
    return type(norm) if isinstance(norm, nn.Module) and is_llama_norm(norm) else None
