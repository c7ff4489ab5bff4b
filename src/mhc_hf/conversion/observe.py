"""A model run on given tokens, so that two models can be compared: in one pass, and token by token through its cache.

Shapes: S sequence, V vocabulary. One sequence at a time, so a batch is always 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .probe import Probe


@dataclass(frozen=True)
class Observation:
    """What a model says, in float32 on the CPU."""

    passes: list[Tensor]  # [S, V] for each text
    steps: list[Tensor]  # [new tokens, V] for each prompt
    continuations: list[Tensor]  # [new tokens], the most likely token at each step

    @property
    def logits(self) -> list[Tensor]:
        return [*self.passes, *self.steps]


def observe(model: nn.Module, probe: Probe, follow: Observation | None = None) -> Observation:
    """Run `model` over the texts, and continue the prompts greedily with its cache.

    With `follow`, prompts go on with the tokens of that observation instead of the model's own: so every step can be
    compared, those after a near tie as well.
    """
    device = next(model.parameters()).device
    passes, steps, continuations = [], [], []
    with torch.no_grad():
        for text in probe.texts:
            passes.append(_cpu(model(text[None].to(device), use_cache=False).logits[0]))
        for index, prompt in enumerate(probe.prompts):
            forced = follow.continuations[index] if follow is not None else None
            logits = _continue(model, prompt.to(device), probe.new_tokens, forced)
            steps.append(logits)
            continuations.append(logits.argmax(-1))
    return Observation(passes, steps, continuations)


def _continue(model: nn.Module, prompt: Tensor, new_tokens: int, forced: Tensor | None) -> Tensor:
    rows, cache, cached, ids = [], None, True, prompt[None]
    for step in range(new_tokens):
        out = model(ids, past_key_values=cache, use_cache=True) if cached else model(ids, use_cache=False)
        rows.append(_cpu(out.logits[0, -1]))
        token = (rows[-1].argmax() if forced is None else forced[step]).to(prompt.device).view(1, 1)
        # a few families keep no cache that can be handed on (recurrent_gemma): they read everything again
        cache = out.get("past_key_values")
        cached = cache is not None
        ids = token if cached else torch.cat([ids, token], -1)
    return torch.stack(rows)


def _cpu(logits: Tensor) -> Tensor:
    return logits.float().cpu()
