"""MHCDecoderLayer: one decoder layer for all families.

It adopts the sub-modules of the family's own layer under their own names and puts a hyper-connection around each
branch. Streams travel flat between layers, [B, S, n*C]; the first layer widens the hidden states, the last one
collapses them, so that the family's own `Model.forward` runs untouched and its KV cache never hears of n.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mhc import MHCConfig
from .hyper_connection import HyperConnection
from .sublayers import Form, SubLayer


class MHCDecoderLayer(GradientCheckpointingLayer):
    """A family's decoder layer with hyper-connections in place of its residual additions.

    Args:
        base_layer: the family's layer; its sub-modules and plain attributes are taken over, not copied.
        config: configuration of the widened model.
        form: what its branches are made of.
        first_site: index of its first site in the whole model.
        widens: this is the first layer, and its input is [B, S, C].
        collapses: this is the last layer, and its output is [B, S, C].
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
        self.form = form
        self.hc_mult = config.hc_mult
        self.widens = widens
        self.collapses = collapses
        # names of the family's positional arguments after hidden_states
        self.argument_names = tuple(inspect.signature(type(base_layer).forward).parameters)[2:]
        for index, sub_layer in enumerate(form):
            self.add_module(sub_layer.site, HyperConnection(config, first_site + index))

    def forward(self, hidden_states: Tensor, *args: Any, **context: Any) -> Tensor:
        """[B, S, n*C] -> [B, S, n*C]; [B, S, C] where this layer widens (in) or collapses (out)."""
        context.update(zip(self.argument_names, args, strict=False))
        x = widen_streams(hidden_states, self.hc_mult) if self.widens else hidden_states
        for sub_layer in self.form:
            x = getattr(self, sub_layer.site)(x, partial(self._branch, sub_layer, context))
        return collapse_streams(x, self.hc_mult) if self.collapses else x

    def _branch(self, sub_layer: SubLayer, context: dict[str, Any], hidden_states: Tensor) -> Tensor:
        """F of one site. [B, S, C] -> [B, S, C]"""
        normed = getattr(self, sub_layer.norm)(hidden_states)
        branch = getattr(self, sub_layer.branch)
        if sub_layer.takes_context:
            out = branch(hidden_states=normed, **context)
        else:
            out = branch(normed)
        # attention answers (output, weights), a mixture of experts may answer (output, router logits)
        return out[0] if isinstance(out, tuple) else out


def widen_streams(hidden_states: Tensor, hc_mult: int) -> Tensor:
    """n equal streams. [B, S, C] -> [B, S, n*C]"""
    return hidden_states.repeat(1, 1, hc_mult)


def collapse_streams(streams: Tensor, hc_mult: int) -> Tensor:
    """The mean of the streams, at least in float32 and rounded once. [B, S, n*C] -> [B, S, C]"""
    x = streams.unflatten(-1, (hc_mult, -1))  # [B, S, n, C]
    return x.mean(-2, dtype=torch.promote_types(x.dtype, torch.float32)).to(streams.dtype)
