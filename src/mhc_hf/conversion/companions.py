"""What belongs to a model beside its weights: tokenizer, chat template, generation config, licence, model card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .errors import UnusableSource
from .source import Source

GENERATION_CONFIG, CARD = "generation_config.json", "README.md"
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
_LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_LICENSE_FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag")


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
    names = [path for pattern in _LEGAL for path in source.folder.glob(pattern)]
    for path in [source.folder / GENERATION_CONFIG, *sorted(set(names))]:
        if path.is_file():
            # the file itself, not a link of the Hub cache; without its mode, which may be read-only
            shutil.copyfile(path, folder / path.name)


def model_card(source: Source, *, family: str, hc_mult: int, start: str) -> str:
    """README.md of the converted model, with the base's licence and language in its metadata."""
    from huggingface_hub import ModelCardData

    card = ModelCardData(
        library_name="transformers",
        tags=["mhc", "hyper-connections"],
        # a folder's name means nothing on the Hub
        base_model=source.given if source.from_hub else None,
        **_card_fields(source.folder / CARD),
    )
    base = source.given if source.from_hub else Path(source.given).expanduser().resolve().name
    at = f" at commit {source.commit}" if source.commit else ""
    return f"""---
{card.to_yaml()}
---

# {base}, widened into {hc_mult} residual streams

This is {base}{at} with manifold-constrained hyper-connections (mHC, arXiv 2512.24880): around every attention and MLP
a few float32 parameters read, write and mix {hc_mult} residual streams. As it stands it computes what {base} computes;
what the streams are good for comes with fine-tuning.

```python
import mhc_hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

| | |
|---|---|
| base family | {family} |
| residual streams (`hc_mult`) | {hc_mult} |
| start (`hc_start`) | {start} |
"""


def _card_fields(path: Path) -> dict[str, Any]:
    """Licence, language and task as the base's own card states them; a card without readable metadata states none."""
    import yaml
    from huggingface_hub import ModelCard

    if not path.is_file():
        return {}
    try:
        data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
    return {name: data[name] for name in _LICENSE_FIELDS if data.get(name) is not None}
