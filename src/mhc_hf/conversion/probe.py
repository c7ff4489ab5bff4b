"""What a verification runs: tokens of a real text, or random ones where there is no tokenizer."""

from __future__ import annotations

import pydoc_data.topics
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .errors import ConversionError

# the language reference that ships with every CPython, 465 kB of English; its beginning is enough
SAMPLE = "\n".join(pydoc_data.topics.topics.values())[:40_000]
_TEXTS, _LENGTH, _PROMPT, _NEW_TOKENS = 3, 128, 24, 64


@dataclass(frozen=True)
class Probe:
    """Token ids, [S] each."""

    name: str
    texts: list[Tensor]
    prompts: list[Tensor]
    new_tokens: int


def make_probe(text: str | None, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig) -> Probe:
    """Cut a few stretches out of `text`, short enough for the model's positions.

    Raises:
        ConversionError: the text has fewer than two tokens, or the tokenizer is larger than the model's vocabulary.
    """
    if tokenizer is None:
        name = "random tokens (the base has no tokenizer)"
        ids = torch.randint(config.vocab_size, (_TEXTS * _LENGTH,), generator=torch.Generator().manual_seed(0))
    else:
        name = "Python's language reference" if text is None else "the given text"
        ids = torch.tensor(tokenizer(SAMPLE if text is None else text, verbose=False).input_ids)
    if len(ids) < 2:
        raise ConversionError(f"`text` has {len(ids)} tokens, and at least 2 are needed. Give a longer one.")
    if ids.max() >= config.vocab_size:
        raise ConversionError(
            f"the base's tokenizer gives token {int(ids.max())}, and its model has {config.vocab_size} of them. They "
            "do not belong together; mend the base."
        )
    positions = getattr(config, "max_position_embeddings", None) or 2 * _LENGTH
    length = min(_LENGTH, positions, len(ids))
    # evenly spread, from the beginning to the end
    starts = sorted({(len(ids) - length) * index // (_TEXTS - 1) for index in range(_TEXTS)})
    texts = [ids[start : start + length] for start in starts]
    new_tokens = min(_NEW_TOKENS, positions // 2)
    prompt = min(_PROMPT, length, positions - new_tokens)
    return Probe(name, texts, [tokens[:prompt] for tokens in texts[:2]], new_tokens)
