"""What a model does with one text: its measurement, its mean maps, and which tokens move them.

Shapes: L sites in the order they run, T tokens, n streams.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from . import statistics
from .measure import StreamMeasurement, summarize
from .problems import find_problems, get_projection
from .recording import SiteReading, record_streams


@dataclass(frozen=True)
class Findings:
    """Everything a report shows, as NumPy arrays of float64.

    Attributes:
        measurement: the table by site.
        problems: what is wrong, in words.
        tokens: T pieces of text.
        h_res: [L, n, n], mean over tokens; `composites` the same for H_k ... H_1.
        h_pre, h_post: mean and standard deviation over tokens, [L, n] each.
        cosines: [L, n, n]. stream_rms: [L, n].
        movement: by map ("h_pre", "h_post", "h_res") [T, L], the norm of a token's map less the mean over the text's.
    """

    measurement: StreamMeasurement
    problems: list[str]
    tokens: list[str]
    h_res: np.ndarray
    composites: np.ndarray
    h_pre: tuple[np.ndarray, np.ndarray]
    h_post: tuple[np.ndarray, np.ndarray]
    cosines: np.ndarray
    stream_rms: np.ndarray
    movement: dict[str, np.ndarray]

    @property
    def num_streams(self) -> int:
        return self.h_res.shape[-1]

    @property
    def moved(self) -> np.ndarray:
        """[T, L], all three maps together."""
        return np.sqrt(sum(np.square(values) for values in self.movement.values()))

    @property
    def moved_tokens(self) -> np.ndarray:
        """[T], the root mean square over sites."""
        return np.sqrt(np.square(self.moved).mean(1))


@dataclass(frozen=True)
class Difference:
    """How a model differs from its base on the same text.

    Attributes:
        hidden: after each layer, |mean over streams - base's hidden state| / |base's hidden state|.
        base_losses, losses: of each token but the first, nats, [T - 1].
        max_logit: the largest absolute difference of two logits.
        kl: mean over tokens of KL(base || model), nats.
        agreement: share of tokens for which both expect the same next token.
    """

    hidden: list[float]
    base_losses: np.ndarray
    losses: np.ndarray
    max_logit: float
    kl: float
    agreement: float


@torch.no_grad()
def examine(model: PreTrainedModel, token_ids: Tensor, tokens: list[str]) -> Findings:
    """Run a model once over `token_ids` [S]."""
    device: Any = model.get_input_embeddings().weight.device
    with record_streams(model) as recording:
        model(input_ids=token_ids[None].to(device), use_cache=False)
    readings = recording.readings
    measurement = summarize(recording)
    h_res = torch.stack([reading.h_res.cpu() for reading in readings])  # [L, T, n, n]
    return Findings(
        measurement=measurement,
        problems=list(find_problems(measurement, projection=get_projection(model)).values()),
        tokens=tokens,
        h_res=h_res.mean(1).numpy(),
        composites=statistics.compose_from_first(h_res).mean(1).numpy(),
        h_pre=_mean_and_deviation(readings, "h_pre"),
        h_post=_mean_and_deviation(readings, "h_post"),
        cosines=torch.stack([reading.cosines.cpu() for reading in readings]).numpy(),
        stream_rms=torch.stack([reading.stream_rms.cpu() for reading in readings]).numpy(),
        movement={name: _movement(readings, name) for name in ("h_pre", "h_post", "h_res")},
    )


@torch.no_grad()
def compare(model: PreTrainedModel, base: PreTrainedModel, token_ids: Tensor) -> Difference:
    """Run both over `token_ids` [S], base first."""
    base_hidden, base_logits = _run(base, token_ids)
    hidden, logits = _run(model, token_ids)
    log_p, log_q = base_logits.log_softmax(-1), logits.log_softmax(-1)
    targets = token_ids[1:, None]
    return Difference(
        # the last one is normed and cut to one stream in both
        hidden=[float((one - other).norm() / other.norm()) for one, other in zip(hidden, base_hidden, strict=True)],
        base_losses=-log_p[:-1].gather(1, targets)[:, 0].numpy(),
        losses=-log_q[:-1].gather(1, targets)[:, 0].numpy(),
        max_logit=float((logits - base_logits).abs().max()),
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        agreement=float((logits.argmax(-1) == base_logits.argmax(-1)).double().mean()),
    )


def _run(model: PreTrainedModel, token_ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """Mean streams between layers, [S, C] each, and logits [S, vocabulary], in float64."""
    config: Any = model.config.get_text_config()
    device: Any = model.get_input_embeddings().weight.device
    out = model(input_ids=token_ids[None].to(device), output_hidden_states=True, use_cache=False)
    hidden = []
    for state in out.hidden_states:
        x = state[0].double().cpu()  # [S, C], [S, n*C] or [S, n, C]
        hidden.append(x.reshape(len(token_ids), -1, config.hidden_size).mean(1))
    return hidden, out.logits[0].double().cpu()


def _mean_and_deviation(readings: list[SiteReading], name: str) -> tuple[np.ndarray, np.ndarray]:
    maps = torch.stack([getattr(reading, name).cpu() for reading in readings])  # [L, T, n]
    return maps.mean(1).numpy(), maps.std(1, correction=0).numpy()


def _movement(readings: list[SiteReading], name: str) -> np.ndarray:
    maps = torch.stack([getattr(reading, name).cpu().flatten(1) for reading in readings], 1)  # [T, L, ...]
    return torch.linalg.vector_norm(maps - maps.mean(0), dim=-1).numpy()
