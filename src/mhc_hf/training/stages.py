"""A widened model cut into pipeline stages, each a run of its layers inside the family's own forward.

Shapes: B batch, S sequence, n streams, C channels of one stream. Between stages travels one tensor, [B, S, n*C].

A stage is a shallow twin of the model that owns some of its layers. Other layers are replaced by ones that pass their
input on, so that the family's own forward finds every layer at its index, with its mask and its rotary embeddings.
Whatever else that forward does to hidden states, before its layers or after them, must be done once and not on every
stage: what a stage receives enters right in front of its first layer and what it sends leaves right behind its last
one, and a stand-in [B, S, C] goes the rest of the way.
"""

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..modeling import MHCForCausalLM, MHCModel
from ..modeling.families import family_of, layers_of

# fields of a configuration by which layers use keys, values or indices that an earlier one has made
HANDED_ON: dict[str, Callable[[Any], bool]] = {
    "num_kv_shared_layers": bool,
    "indexer_types": lambda types: "shared" in (types or ()),
}


class PipelineStageModule(nn.Module):
    """Layers `first` to `end` (exclusive) of `model`, whose modules and parameters it shares under their own names.

    The stage that starts at layer 0 embeds, the one that ends at the last layer has the final norm and the head.
    """

    def __init__(self, model: MHCForCausalLM, first: int, end: int):
        super().__init__()
        decoder_name, decoder = _decoder_of(model)
        layers = layers_of(decoder)
        self.hidden_size = model.config.hidden_size
        # at the first and the last layer of the model nothing arrives and nothing departs
        self.arrival = Crossing(layers[first - 1], self.hidden_size) if first > 0 else None
        self.departure = Crossing(layers[end], self.hidden_size) if end < len(layers) else None

        own = nn.ModuleList(layer if first <= index < end else PassThrough(layer) for index, layer in enumerate(layers))
        if self.arrival is not None:
            own[first - 1] = self.arrival
        if self.departure is not None:
            own[end] = self.departure
        twin = _shallow_twin(decoder)
        setattr(twin, family_of(model.config.base_model_type).layers, own)
        embedding = decoder.get_input_embeddings()
        for name, module in decoder.named_children():
            elsewhere = self.arrival if module is embedding else self.departure if _is_norm(module) else None
            if elsewhere is not None:
                setattr(twin, name, nn.Identity())
        whole = _shallow_twin(model)
        setattr(whole, decoder_name, twin)
        if self.departure is not None:
            for name, module in model.named_children():
                if module is not decoder:
                    setattr(whole, name, nn.Identity())
        self.model = whole

    def forward(self, inputs: Tensor, **context: Any) -> Tensor:
        """One micro-batch.

        Args:
            inputs: [B, S] token ids where the stage embeds, else [B, S, n*C] streams.
            context: attention_mask, position_ids, ... of the micro-batch, the same on every stage.
        Returns:
            [B, S, n*C] streams, or [B, S, vocabulary] logits where the stage has the head.
        """
        run = self.model if self.departure is None else _decoder_of(self.model)[1]
        if self.arrival is None:
            outputs = run(input_ids=inputs, use_cache=False, **context)
        else:
            self.arrival.streams = inputs
            # read for its shape, dtype and device: masks and positions are made from it
            stand_in = inputs[..., : self.hidden_size].detach()
            outputs = run(inputs_embeds=stand_in, use_cache=False, **context)
        out = outputs.logits if self.departure is None else self.departure.streams
        for crossing in (self.arrival, self.departure):
            if crossing is not None:
                crossing.streams = None
        # schedules that split the backward detach what a stage returns in place, which a view does not allow
        return out.clone() if out._is_view() else out

    def checkpoint(self) -> dict[str, Tensor]:
        """The stage's share of the model's state dict, under the model's names."""
        return self.model.state_dict()


def split_into_stages(model: MHCForCausalLM, num_stages: int) -> list[PipelineStageModule]:
    """Cut a widened model into `num_stages` runs of layers, as even as can be, the longer ones first.

    Args:
        model: a widened causal language model. It is not changed; the stages share its modules and parameters.
        num_stages: 1 to the number of layers.
    Returns:
        The stages in order, to be wrapped by `torch.distributed.pipelining.PipelineStage`.
    Raises:
        ValueError: `num_stages` is out of range, or the model has parts besides embeddings, layers, norm and head.
    """
    if not isinstance(model, MHCForCausalLM):
        raise ValueError(
            f"`model` must be a widened causal language model, got a {type(model).__name__}. Widen it with "
            "MHCForCausalLM.from_base(model); merge PEFT adapters first."
        )
    _, decoder = _decoder_of(model)
    num_layers = len(layers_of(decoder))
    if isinstance(num_stages, bool) or not isinstance(num_stages, int) or not 1 <= num_stages <= num_layers:
        raise ValueError(
            f"`num_stages` must be an integer from 1 to the number of layers ({num_layers}), got {num_stages!r}. "
            "Take fewer ranks, or a schedule with one stage a rank."
        )
    for attribute, hands_on in HANDED_ON.items():
        if hands_on(getattr(model.config, attribute, None)):
            raise ValueError(
                f"`model` cannot be cut: with {attribute}={getattr(model.config, attribute)!r} its layers hand more to "
                "one another than their streams. Take FSDP2 or tensor parallelism."
            )
    known = {"embeddings": decoder.get_input_embeddings(), "layers": layers_of(decoder)}
    for name, module in decoder.named_children():
        if module in known.values() or not any(True for _ in module.parameters()):
            continue
        if "norm" in known or not _is_norm(module):
            raise ValueError(
                f"`model` must consist of embeddings, layers, a final norm and a head, got {type(module).__name__} "
                f"`{name}` beside them in a {type(model).__name__}. Take FSDP2 or tensor parallelism for this family."
            )
        known["norm"] = module
    shortest, longer = divmod(num_layers, num_stages)
    ends = [shortest * (index + 1) + min(index + 1, longer) for index in range(num_stages)]
    return [PipelineStageModule(model, first, end) for first, end in zip([0, *ends], ends, strict=False)]


class PassThrough(nn.Module):
    """Stands where a layer of another stage would be, with its plain attributes, and hands its input on."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        for name, value in vars(layer).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[B, S, C] -> [B, S, C], in a tuple where the family's layers answer so."""
        return hidden_states if self.returns is None else (hidden_states, None)


class Crossing(PassThrough):
    """Where streams [B, S, n*C] enter or leave a stage in the midst of the family's forward.

    Filled before the forward, it hands on `streams` and drops its input; empty, it keeps its input in `streams`, and
    hands on a stand-in.
    """

    def __init__(self, layer: nn.Module, hidden_size: int):
        super().__init__(layer)
        self.hidden_size = hidden_size
        self.streams: Any = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.streams is None:
            self.streams = hidden_states
            return super().forward(hidden_states[..., : self.hidden_size].detach())
        return super().forward(self.streams)


def _is_norm(module: nn.Module) -> bool:
    # one without weights may stand in front of the layers too (nanochat), and has nothing that a stage could own
    return "Norm" in type(module).__name__ and any(True for _ in module.parameters())


def _decoder_of(model: nn.Module) -> tuple[str, Any]:
    """(name, module) of the child that holds the layers."""
    return next((name, module) for name, module in model.named_children() if isinstance(module, MHCModel))


def _shallow_twin(module: Any) -> Any:
    """A copy that shares every child and parameter, and whose children can be replaced."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
