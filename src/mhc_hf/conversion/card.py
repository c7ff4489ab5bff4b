"""README.md of a converted model: what it is, of which base, and how to load it.

Of the base's own card the metadata that hold for the widened model too are taken over, and not a word of its text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..sharing import CODE_FILE
from .companions import legal_files
from .plan import Plan
from .source import Source

CARD = "README.md"
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LOAD = """```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust})
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder"{trust})
```"""


def model_card(plan: Plan) -> str:
    """The text of the card, metadata included."""
    source, config = plan.source, plan.config
    base = source.given if source.from_hub else Path(source.given).expanduser().resolve().name
    at = f" at commit {source.commit}" if source.commit else ""
    cast = "" if plan.dtype is None else f", its weights cast to {str(plan.dtype).removeprefix('torch.')}"
    return f"""---
{_metadata(source).to_yaml()}
---

# {base}, widened into {config.hc_mult} residual streams

This is {base}{at}{cast}, with manifold-constrained hyper-connections (mHC, arXiv 2512.24880): around every attention
and MLP a few float32 parameters read, write and mix {config.hc_mult} residual streams.

As it was converted it computes what {base} computes: in float32 the logits are the same to rounding, and greedy
continuations are the same tokens. What the streams are good for comes with fine-tuning. What {base} was trained on,
what it is meant for and where it fails stands in its own card, and holds here.

## Load it

{_how_to_load(plan)}

| | |
|---|---|
| base | {base}{at} |
| base family | {config.base_model_type} |
| residual streams (`hc_mult`) | {config.hc_mult} |
| start (`hc_start`) | {config.hc_start} |
| parameters | {plan.checkpoint.parameters:,} of the base, {plan.mhc_parameters:,} of hyper-connections |
"""


def _how_to_load(plan: Plan) -> str:
    with_package = _LOAD.format(first="import mhc_hf\n", trust="")
    if not plan.self_contained:
        return f"With the package mhc_hf:\n\n{with_package}"
    alone = _LOAD.format(first="", trust=", trust_remote_code=True")
    return (
        f"With torch and transformers alone, by the code in `{CODE_FILE}`:\n\n{alone}\n\n"
        "With the package mhc_hf, which adds kernels and tools for training, and whose code is then taken:\n\n"
        f"{with_package}"
    )


def _metadata(source: Source) -> ModelCardData:
    card = _read_metadata(source.folder / CARD)
    carried = {name: card[name] for name in _CARRIED if card.get(name) is not None}
    legal = legal_files(source)
    if "license" not in carried and legal:
        # a text that we do not judge: it is beside the weights, and the card points to it
        carried |= {"license": "other", "license_link": legal[0].name}
    return ModelCardData(
        library_name="transformers",
        tags=["mhc", "hyper-connections"],
        # a folder's name means nothing on the Hub; what the folder was made from does
        base_model=source.given if source.from_hub else card.get("base_model"),
        **{"pipeline_tag": "text-generation"} | carried,
    )


def _read_metadata(path: Path) -> dict[str, Any]:
    """Metadata of the base's own card; one without any that can be read has none."""
    if not path.is_file():
        return {}
    try:
        return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError):
        return {}
