"""StreamMonitorCallback: what the streams of a model do while Trainer trains it, in its logs and in words."""

import inspect
import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..inspection.measure import StreamMeasurement, measure_gradients, summarize
from ..inspection.recording import Recording, record_streams
from ..inspection.sites import require_sites

logger = logging.getLogger(__name__)

# streams that differ by less are copies of each other ...
ASLEEP_SPREAD = 1e-6
# ... and by then, those of both conversion starts have parted
ASLEEP_AFTER = 100
# a diagonal lead of 8 in the logits leaves 1.0e-3 at n = 4 and 2.3e-3 at n = 8; one of 4, 4.9e-2 and 8.8e-2
FROZEN_LIVENESS = 3e-3
GAIN_RANGE = (0.1, 10.0)
_GAINS = ("forward_gain", "backward_gain", "composite_forward_gain", "composite_backward_gain")


class StreamMonitorCallback(TrainerCallback):
    """Logs how the streams are through `Trainer.log`, and warns in words when something is wrong with them.

    `Trainer(..., callbacks=[StreamMonitorCallback()])`. It looks at the first sequence of the batch, in the first step
    and in every `every`-th one, while the step runs: there is no forward pass of its own. In all other steps there are
    no hooks and no cost. Under DDP and FSDP2 each process looks at its own batch, and the first one's numbers are
    logged. Gradient norms are those that the optimizer gets, after clipping.

    The names ("streams/spread", "streams/composite_forward_gain", ...) are stable; docs/inspect.md explains each.

    Args:
        every: steps between two looks, >= 1.
        per_site: also log every number of every site, as "streams/{site}/{name}".
    Attributes:
        warnings: what was said so far, in order; each thing is said once.
        last: the newest `StreamMeasurement`, or None.
    Raises:
        ValueError: `every` is not a positive integer.
        InspectionError: training begins and the model has no hyper-connections.
    """

    def __init__(self, every: int = 100, per_site: bool = False):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be an integer >= 1, got {every!r}. To monitor nothing, leave it out.")
        self.every = every
        self.per_site = per_site
        self.warnings: list[str] = []
        self.last: StreamMeasurement | None = None
        self._said: set[str] = set()
        self._look = ExitStack()
        self._recording: Recording | None = None
        self._gradients: dict[str, dict[str, float]] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        require_sites(model)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # a step that failed and was caught outside may have left a look open
        self._look.close()
        if state.global_step and (state.global_step + 1) % self.every:
            return
        self._recording = self._look.enter_context(record_streams(model, max_sequences=1))
        if args.torch_compile:
            # compiled code runs without hooks: this one step goes without it
            self._look.enter_context(torch.compiler.set_stance("force_eager"))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._recording is not None:
            self._gradients = measure_gradients(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._recording is None:
            return
        self._look.close()
        recording, self._recording = self._recording, None
        self.last = summarize(recording, self._gradients)
        for key, words in find_problems(self.last, state.global_step, _projection_of(model)).items():
            if key not in self._said:
                self._said.add(key)
                self.warnings.append(words)
                if state.is_world_process_zero:
                    logger.warning("step %d: %s", state.global_step, words)
        scalars = self.last.summary() | (self.last.by_site() if self.per_site else {})
        _running_trainer(self).log(scalars)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._look.close()
        self._recording = None


def find_problems(measurement: StreamMeasurement, step: int, projection: str = "sinkhorn") -> dict[str, str]:
    """What is wrong with the streams, in words, by a key that is the same each time the same thing is found.

    Args:
        measurement: what `measure_streams` returned.
        step: optimizer steps made so far.
        projection: how the model makes H_res; only "sinkhorn" can be frozen by saturation.
    """
    if measurement.not_finite:
        first = measurement.not_finite[0]
        return {f"not finite {first}": f"The {first} hold NaN or infinity{_explain_not_finite(measurement, first)}."}
    problems = {}
    for index, site in enumerate(measurement.sites):
        bad = [name for name, norms in measurement.gradients.items() if not math.isfinite(norms[index])]
        if bad:
            problems[f"gradient {site}"] = f"The gradient of {site} ({', '.join(bad)}) holds NaN or infinity."
    spread = max(measurement.table["spread"])
    if step >= ASLEEP_AFTER and spread < ASLEEP_SPREAD:
        problems["asleep"] = (
            f"The streams are asleep: after {step} steps they differ by {spread:.1e} of their norm at most, so the "
            "model is its base at n times the cost. Streams that begin equal and are read alike stay equal: convert "
            'with start="orthogonal" or "copies", and check that the hyper-connections are trained.'
        )
    if projection == "sinkhorn":
        site, least = _find_extreme(measurement, "h_res_liveness", min)
        if least < FROZEN_LIVENESS:
            problems[f"frozen {site}"] = (
                f"H_res of {site} is frozen by saturation: its entries are within {least:.1e} of 0 and 1, where "
                "Sinkhorn-Knopp passes no gradient. Start from smaller leads in `bias`, or lower the learning rate of "
                "the hyper-connections."
            )
    low, high = GAIN_RANGE
    for name in _GAINS:
        for extreme in (min, max):
            site, gain = _find_extreme(measurement, name, extreme)
            if not low <= gain <= high:
                problems[f"{name} {site}"] = (
                    f"The {name.replace('_', ' ')} of {site} is {gain:.3g}, outside [{low:g}, {high:g}]: what passes "
                    f"there {'grows' if gain > high else 'fades'}."
                )
    return problems


def _explain_not_finite(measurement: StreamMeasurement, first: str) -> str:
    """Where NaN in the streams comes from: the branch before."""
    index = next(i for i, site in enumerate(measurement.sites) if first.endswith(f" {site}"))
    if first.startswith("maps"):
        return ", while the streams that it gets do not: look at its parameters"
    if index == 0:
        return ": they come from the embedding"
    return f": they come from {measurement.sites[index - 1]} or the branch that it wraps"


def _find_extreme(
    measurement: StreamMeasurement, name: str, extreme: Callable[[list[float]], float]
) -> tuple[str, float]:
    column = measurement.table[name]
    value = extreme(column)
    return measurement.sites[column.index(value)], value


def _projection_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "hc_projection", "sinkhorn")


def _running_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer that is calling `callback`. Callbacks are handed everything but it, and only it can log."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise RuntimeError("StreamMonitorCallback must be called by a Trainer. In a loop of your own call measure_streams.")
