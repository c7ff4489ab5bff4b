"""StreamMonitorCallback: what the streams of a model do while Trainer trains it, in its logs and in words."""

import inspect
import logging
from contextlib import ExitStack
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..inspection.measure import StreamMeasurement, measure_gradients, summarize
from ..inspection.problems import find_problems, get_projection
from ..inspection.recording import Recording, record_streams
from ..inspection.sites import require_sites

logger = logging.getLogger(__name__)


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
        for key, words in find_problems(self.last, step=state.global_step, projection=get_projection(model)).items():
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


def _running_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer that is calling `callback`. Callbacks are handed everything but it, and only it can log."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back
    raise RuntimeError("StreamMonitorCallback must be called by a Trainer. In a loop of your own call measure_streams.")
