"""What belongs to a model beside its weights: tokenizer, chat template, generation config, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .errors import UnusableSource
from .source import Source

GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """The base's tokenizer as AutoTokenizer understands it, or None where the base has none.

    The class is not always the one that the files name: transformers corrects some by model type. So it is loaded and
    saved, not copied.

    Raises:
        UnusableSource: there are tokenizer files, but they do not load.
    """
    if not any((source.folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnusableSource(
            f"{source}: AutoTokenizer cannot load its tokenizer ({reason}). Install what it asks for, "
            "or mend the tokenizer's files; without any the model is converted alone."
        ) from error


def check_generation_config(source: Source) -> bool:
    """Whether the base has a generation config.

    Raises:
        UnusableSource: it has one that does not load.
    """
    if not (source.folder / GENERATION_CONFIG).is_file():
        return False
    try:
        GenerationConfig.from_pretrained(source.folder)
    except (ValueError, OSError, TypeError) as error:
        raise UnusableSource(f"{source}: {GENERATION_CONFIG} does not load ({error}). Mend or remove it.") from error
    return True


def carry(source: Source, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Put tokenizer, chat template, generation config and licence files of the base into `folder`."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for path in [source.folder / GENERATION_CONFIG, *legal_files(source)]:
        if path.is_file():
            # the file itself, not a link of the Hub cache; without its mode, which may be read-only
            shutil.copyfile(path, folder / path.name)


def legal_files(source: Source) -> list[Path]:
    """The base's licence and notices."""
    return sorted({path for pattern in _LEGAL for path in source.folder.glob(pattern) if path.is_file()})
