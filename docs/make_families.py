"""Writes docs/families.md from the table in src/mhc_hf/modeling/sublayers.py: python docs/make_families.py"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from mhc_hf.modeling.sublayers import FAMILIES, REFUSED, Family  # noqa: E402
from tests.modeling.family_models import variants_of  # noqa: E402

HEAD = """# Families

Written by `python docs/make_families.py` from the table in `src/mhc_hf/modeling/sublayers.py`; not to be edited.

{count} model types of transformers can be widened. A model type that the installed transformers does not have yet is
left out of what `mhc-hf doctor` lists; everything else works all the same.

## What stands behind a row

`tests/modeling/test_families.py` builds a tiny random model of each, far from flat, in every configuration that changes
its form, and finds (float32, CPU):

- **layer**: the output of the family's own layer is its input plus the branches that the table names, within 1e-6;
- **logits** of the widened model within 1e-5 of the base's, for 4 streams (orthogonal start) and 2 (copies);
- **decoding**: 32 greedy tokens the same, with a cache, past the window and past the state, one of two prompts padded
  on the left; and with a static cache where transformers has one for the family;
- **gradients** of the base's parameters the same, within 1e-5;
- **streams** that differ after 5 steps of AdamW from copies;
- **disk**: what `save_pretrained` of the base writes loads with nothing missing, by `MHCForCausalLM.from_base(path)`
  and through `convert_checkpoint`; the widened model saved and loaded again gives the same bits.

The last column says what of the family was present in those models.

| model type | form | additions | sites a layer | looked at with |
|---|---|---|---|---|
"""
REFUSALS = """
## What does not fit

Hyper-connections take the place of additions `x + F(x)`. These families have none, or not only; they are refused with
the reason. A family in neither list has not been checked, and is refused too.

| model type | why |
|---|---|
"""
CONFIGURATIONS = """
Of families that fit, these configurations do not:

| model type | field | why |
|---|---|---|
"""
WINDOWS = ("sliding_window", "sliding_window_size", "window_size", "attention_window_size", "attention_chunk_size")


def looked_at(model_type: str) -> str:
    """What the tests' models of a family have, read off their configurations."""
    variants = variants_of(model_type)
    fields = {name: value for variant in variants for name, value in variant.items()}
    kinds = {kind for variant in variants for kind in variant.get("layer_types") or []}
    kinds |= set(fields.get("layers_block_type", [])) | set(fields.get("block_types", []))
    seen = []
    if any("expert" in name or "moe" in name for name in fields):
        seen.append("experts")
    if any(fields.get(name) for name in WINDOWS):
        seen.append("a window")
    if kinds & {"linear_attention", "conv", "recurrent"} or any(name.startswith("mamba") for name in fields):
        seen.append("a state")
    if "index_topk" in fields or "index_topk_blocks" in fields:
        seen.append("chosen keys")
    if "num_kv_shared_layers" in fields:
        seen.append("shared keys and values")
    if "residual_multiplier" in fields:
        seen.append("multipliers")
    if len(variants) > 1:
        seen.append(f"{len(variants)} configurations")
    return ", ".join(seen) or "dense attention"


def row(model_type: str, family: Family) -> str:
    titles = "; or ".join(dict.fromkeys(form.title for form in family.forms))
    formulas = "; or ".join(f"`{formula}`" for formula in dict.fromkeys(form.formula for form in family.forms))
    sites = "; or ".join(dict.fromkeys(", ".join(f"`{site}`" for site in form.sites) for form in family.forms))
    return f"| {model_type} | {titles} | {formulas} | {sites} | {looked_at(model_type)} |\n"


def page() -> str:
    rows = "".join(row(model_type, FAMILIES[model_type]) for model_type in sorted(FAMILIES))
    refused = "".join(f"| {model_type} | {reason} |\n" for model_type, reason in sorted(REFUSED.items()))
    unfit = "".join(
        f"| {model_type} | `{name}` other than {fitting[0]!r} | {why} |\n"
        for model_type, family in sorted(FAMILIES.items())
        for name, fitting, why in family.refuse
    )
    return HEAD.format(count=len(FAMILIES)) + rows + REFUSALS + refused + CONFIGURATIONS + unfit


if __name__ == "__main__":
    (ROOT / "docs" / "families.md").write_text(page())
