"""The vocabulary of forms: the steps that lead from a branch's input to its output, and how they are run.

A form lists the sites of one decoder layer in order, and of each the chain of its steps: norms, attention or MLP,
further norms, dropouts and scales. Names are attributes of the family's own layer, which `MHCDecoderLayer` adopts.
Which family has which form stands in `sublayers`.

Shapes: B batch, S sequence, C hidden size. Every chain leads from [B, S, C] to [B, S, C].
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn


@dataclass
class Context:
    """What a decoder layer was called with besides its hidden states.

    Attributes:
        arguments: those that the family's layer names, with its defaults.
        extra: those that its `**kwargs` carry on.
        answer: what the last attention answered, where it answered more than its output.
    """

    arguments: dict[str, Any]
    extra: dict[str, Any]
    answer: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Mixer:
    """A sub-module called with arguments of the layer: attention, a state space, a convolution.

    Attributes:
        module: its name.
        takes: the arguments it is given, {its name: the layer's name}; None gives it all.
        without: arguments of the layer that it is not given.
        extra: it is also given what the layer's `**kwargs` carry on.
    """

    module: str
    takes: dict[str, str] | None = None
    without: tuple[str, ...] = ()
    extra: bool = True

    def run(self, layer: nn.Module, x: Tensor, context: Context) -> Tensor:
        if self.takes is None:
            given = {name: value for name, value in context.arguments.items() if name not in self.without}
        else:
            given = {name: context.arguments[source] for name, source in self.takes.items()}
        if self.extra:
            given |= context.extra
        out = getattr(layer, self.module)(x, **given)
        if isinstance(out, tuple):
            context.answer = out
            return out[0]
        return out


@dataclass(frozen=True)
class Scale:
    """x times an attribute of the layer."""

    by: str

    def run(self, layer: nn.Module, x: Tensor, context: Context) -> Tensor:
        return x * getattr(layer, self.by)


@dataclass(frozen=True)
class Gate:
    """x times an argument of the layer, of which it takes its share."""

    argument: str

    def run(self, layer: nn.Module, x: Tensor, context: Context) -> Tensor:
        return x * context.arguments[self.argument]


@dataclass(frozen=True)
class Dropout:
    """Dropout with a probability that the layer holds as a number."""

    probability: str

    def run(self, layer: nn.Module, x: Tensor, context: Context) -> Tensor:
        return nn.functional.dropout(x, attrgetter(self.probability)(layer), layer.training)


@dataclass(frozen=True)
class RoutedExperts:
    """Gemma 4's experts: routed by x as it is, fed with its norm."""

    router: str
    norm: str
    experts: str

    def run(self, layer: nn.Module, x: Tensor, context: Context) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])  # [B*S, C]
        _, weights, experts = getattr(layer, self.router)(tokens)
        return getattr(layer, self.experts)(getattr(layer, self.norm)(tokens), experts, weights).view_as(x)


@dataclass(frozen=True)
class Sum:
    """Parallel chains on the same x, added up. A name that ends in "?" is left out where the layer does not hold it."""

    chains: tuple[Chain, ...]

    def __init__(self, *chains: Chain | Step):
        object.__setattr__(self, "chains", tuple(c if isinstance(c, tuple) else (c,) for c in chains))

    def run(self, layer: nn.Module, x: Tensor, context: Context) -> Tensor:
        first, *others = (run_chain(chain, layer, x, context) for chain in self.chains)
        return sum(others, start=first)


@dataclass(frozen=True)
class OneOf:
    """The one of several mixers whose module the layer holds: layers of a hybrid differ."""

    mixers: tuple[Mixer, ...]

    def __init__(self, *mixers: Mixer):
        object.__setattr__(self, "mixers", mixers)


@dataclass(frozen=True)
class ByType:
    """The step that stands under the layer's own type, an attribute of it: layers of a hybrid differ."""

    attribute: str
    steps: dict[Any, Step]


Step = str | Mixer | Scale | Gate | Dropout | RoutedExperts | Sum | OneOf | ByType
Chain = tuple[Step, ...]


@dataclass(frozen=True)
class Form:
    """The sites of a decoder layer, in order.

    Attributes:
        title: what the documentation calls it.
        formula: the residual additions, for the documentation.
        sites: name of each hyper-connection, and its branch F.
        returns: None where the layer returns its hidden states; i where it returns a tuple of them and of the i-th
            thing that its attention answers.
        stream_scale: attribute by which the layer's output, streams and all, is scaled.
    """

    title: str
    formula: str
    sites: dict[str, Chain]
    returns: int | None = None
    stream_scale: str | None = None


def run_chain(chain: Chain, layer: nn.Module, x: Tensor, context: Context) -> Tensor:
    """A chain that `resolve` has fitted to `layer`."""
    for step in chain:
        if isinstance(step, str):
            out = getattr(layer, step)(x)
            # a mixture of experts may answer (output, router logits)
            x = out[0] if isinstance(out, tuple) else out
        else:
            x = step.run(layer, x, context)  # type: ignore[union-attr]
    return x


def resolve(chain: Chain, layer: nn.Module) -> Chain:
    """The chain with every choice made that depends on the layer.

    Raises:
        ValueError: the layer does not hold what the table says of its family.
    """
    resolved: list[Step] = []
    for step in chain:
        if isinstance(step, OneOf):
            held = [mixer for mixer in step.mixers if _holds(layer, mixer.module)]
            if len(held) != 1:
                _does_not_hold(layer, " or ".join(mixer.module for mixer in step.mixers))
            resolved += held
        elif isinstance(step, ByType):
            kind = getattr(layer, step.attribute, None)
            if kind not in step.steps:
                _does_not_hold(layer, f"{step.attribute}` in `{list(step.steps)}")
            resolved += resolve((step.steps[kind],), layer)  # type: ignore[index]
        elif isinstance(step, Sum):
            chains = [resolve(_without_absent(inner, layer), layer) for inner in step.chains]
            resolved.append(Sum(*(inner for inner in chains if inner)))
        else:
            for name in _names(step):
                if not _holds(layer, name):
                    _does_not_hold(layer, name)
            resolved.append(step)
    return tuple(resolved)


def _without_absent(chain: Chain, layer: nn.Module) -> Chain:
    optional = [step for step in chain if isinstance(step, str) and step.endswith("?")]
    if any(not _holds(layer, step[:-1]) for step in optional):
        return ()
    return tuple(step[:-1] if step in optional else step for step in chain)  # type: ignore[index]


def _names(step: Step) -> tuple[str, ...]:
    if isinstance(step, str):
        return (step,)
    names = {
        Mixer: ("module",),
        Scale: ("by",),
        Dropout: ("probability",),
        RoutedExperts: ("router", "norm", "experts"),
    }
    return tuple(getattr(step, name).split(".")[0] for name in names.get(type(step), ()))


def _holds(layer: nn.Module, name: str) -> bool:
    return getattr(layer, name, None) is not None


def _does_not_hold(layer: nn.Module, what: str) -> None:
    raise ValueError(
        f"{type(layer).__name__} of the installed transformers has no `{what}`, by which mhc_hf knows the family's "
        "layers. Use a version of transformers from 5.17 to 5.23."
    )
