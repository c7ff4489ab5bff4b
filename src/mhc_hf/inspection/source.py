"""What is inspected: a model, and a text as tokens that it can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .sites import InspectionError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(source: str | Path | PreTrainedModel) -> PreTrainedModel:
    """The model of a folder or Hub id, in the dtype it was saved in; a model that is given is taken as it is."""
    if isinstance(source, PreTrainedModel):
        return source
    _require_checkpoint(source)
    config = AutoConfig.from_pretrained(source)
    # GLM-5.3 reads images too, and has no class for text alone
    text_only = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto_class: Any = AutoModelForCausalLM if text_only else AutoModelForImageTextToText
    return auto_class.from_pretrained(source, dtype="auto").eval()


def load_tokenizer(source: str | Path | PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint; None where there is none."""
    name = str((source.name_or_path if isinstance(source, PreTrainedModel) else source) or "")
    if not name or (Path(name).is_dir() and not any((Path(name) / file).exists() for file in _TOKENIZER_FILES)):
        return None
    return AutoTokenizer.from_pretrained(name)


def encode_text(
    text: str, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel, max_tokens: int
) -> tuple[Tensor, list[str]]:
    """The beginning of a text as token ids [S] and, token by token, in letters.

    Where there is no tokenizer the text's bytes stand for tokens.

    Raises:
        InspectionError: the text is shorter than two tokens, or its tokens are not the model's.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 2:
        raise InspectionError(f"`max_tokens` must be an integer >= 2, got {max_tokens!r}. 512 is the default.")
    config: Any = model.config.get_text_config()
    max_tokens = min(max_tokens, getattr(config, "max_position_embeddings", None) or max_tokens)
    if tokenizer is None:
        data = text.encode()[:max_tokens]
        ids = torch.tensor([byte % config.vocab_size for byte in data], dtype=torch.long)
        letters = [chr(byte) if 32 <= byte < 127 or byte == 10 else f"\\x{byte:02x}" for byte in data]
    else:
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids[:max_tokens], dtype=torch.long)
        letters = [str(tokenizer.decode([int(token)])) for token in ids]
    if len(ids) < 2:
        raise InspectionError(f"`text` has {len(ids)} tokens, and at least 2 are needed. Give a longer one.")
    if int(ids.max()) >= config.vocab_size:
        raise InspectionError(
            f"The tokenizer gives token {int(ids.max())}, and the model has {config.vocab_size} of them. "
            "Give the tokenizer that belongs to the model."
        )
    return ids, letters


def _require_checkpoint(source: str | Path) -> None:
    path = Path(source)
    if path.is_dir() and not (path / "config.json").exists():
        raise InspectionError(f"`{source}` holds no config.json. Give the folder of a transformers checkpoint.")
    if not path.exists() and str(source).count("/") != 1:
        raise InspectionError(f"`{source}` does not exist. Give the folder of a transformers checkpoint, or a Hub id.")
