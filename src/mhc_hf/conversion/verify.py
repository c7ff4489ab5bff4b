"""`verify_conversion`: the same text through a base model and its conversion, and whether the conversion can learn."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling import HyperConnection, MHCConfig
from .awake import asleep
from .checkpoint import read_checkpoint, read_config
from .companions import load_tokenizer
from .compare import changed_tensors
from .errors import ConversionError, UnusableSource
from .manifest import read_manifest
from .observe import Observation, observe
from .plan import check_dtype
from .probe import SAMPLE, make_probe
from .source import Source, open_source
from .verdict import VerificationReport

TOLERANCE = 1e-5  # of the largest logit; float32 rounding is some 1e-6


def verify_conversion(
    source: str | os.PathLike[str],
    converted: str | os.PathLike[str],
    *,
    text: str | None = None,
    dtype: str | torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
) -> VerificationReport:
    """Run the same text through a base model and its conversion, and compare everything that should be the same.

    The models are loaded one after the other, on the accelerator if one is there and large enough, else on the CPU.

    Args:
        source: the base, a folder or a Hub id; of the latter the commit that was converted.
        converted: the folder that `convert_checkpoint` wrote.
        text: what to run; None takes the language reference that ships with Python. A base without a tokenizer gets
            random tokens.
        dtype: float32, bfloat16 or float16. In the last two the base runs in float32 as well, to measure against.
        tolerance: allowed max |dlogit| over max |logit| in float32.
    Raises:
        ConversionError: one of the two cannot be read, or there is too little text.
    """
    torch_dtype = _check_dtype(dtype)
    target = open_source(converted, argument="converted")
    manifest = read_manifest(target.folder) or {}
    # a Hub branch may have moved on since
    commit = manifest.get("base_commit") if manifest.get("base") == os.fspath(source) else None
    base = open_source(source, commit)
    base_config, target_config = read_config(base), read_config(target)
    _check_pair(base, base_config, target, target_config)
    base_weights, target_weights = read_checkpoint(base, base_config), read_checkpoint(target, target_config)
    cast = check_dtype(manifest.get("dtype"))

    tokenizer = load_tokenizer(base)
    model, base_info = _load(base, torch_dtype, cast)
    probe = make_probe(text, tokenizer, model.config)
    expected = exact = observe(model, probe)
    del model
    if torch_dtype != torch.float32:
        model, _ = _load(base, torch.float32, cast)
        exact = observe(model, probe, follow=expected)
        del model
    model, info = _load(target, torch_dtype, None)
    seen = observe(model, probe, follow=expected)

    sites = {name: module for name, module in model.named_modules() if isinstance(module, HyperConnection)}
    loaded = [parameter.dtype for site in sites.values() for parameter in site.parameters()]
    stored = [entry.dtype for name, entry in target_weights.tensors.items() if name not in base_weights.tensors]
    reasons = {name: reason for name, site in sites.items() if (reason := asleep(site)) is not None}
    return VerificationReport(
        text=probe.name,
        tokens=sum(len(tokens) for tokens in probe.texts),
        dtype=str(torch_dtype).removeprefix("torch."),
        max_difference=max(float((a - b).abs().max()) for a, b in zip(expected.logits, seen.logits, strict=True)),
        max_logit=max(float(logits.abs().max()) for logits in expected.logits),
        tolerance=tolerance,
        distance_ratio=None if exact is expected else _distance(seen, exact) / _distance(expected, exact),
        agreement=sum(
            int((one == other).sum()) for one, other in zip(expected.continuations, seen.continuations, strict=True)
        ),
        steps=sum(len(tokens) for tokens in expected.continuations),
        float32=set(stored) == {"F32"} and set(loaded) == {torch.float32},
        asleep=reasons,
        sites=len(sites),
        changed=changed_tensors(base_weights, target_weights, cast),
        stray_keys=sorted(
            key for kind in ("missing_keys", "unexpected_keys") for key in info[kind] if key not in base_info[kind]
        ),
        same_tokenizer=None if tokenizer is None else _same_ids(tokenizer, load_tokenizer(target)),
    )


def _check_pair(base: Source, base_config: dict[str, Any], target: Source, target_config: dict[str, Any]) -> None:
    family, widened = base_config["model_type"], MHCConfig.model_type
    if family == widened:
        raise UnusableSource(f"{base} is already widened. Give the base first, then its conversion.")
    if target_config["model_type"] != widened:
        found = target_config["model_type"]
        raise UnusableSource(f"{target} is not widened: its `model_type` is {found!r}, not {widened!r}.")
    if target_config.get("base_model_type") != family:
        raise UnusableSource(
            f"{target} was made from a {target_config.get('base_model_type')!r} model, and "
            f"{base} is {family!r}. Give the base that it was made from."
        )


def _load(source: Source, dtype: torch.dtype, cast: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model on the device that has room for it, and what `from_pretrained` says of its keys."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(source.folder, dtype=cast or dtype, output_loading_info=True)
    model, info = loaded
    model = model.eval()
    if getattr(model, "hf_quantizer", None) is None:
        # a quantised one has the dtype that its quantiser gave it
        model = model.to(dtype)
    if torch.cuda.is_available():
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        # half as much again for activations and logits
        if 1.5 * size < torch.cuda.mem_get_info()[0]:
            model = model.to("cuda")
    return model, info


def _distance(one: Observation, other: Observation) -> float:
    """Root mean square of all differences between logits."""
    difference = torch.cat([(a - b).flatten() for a, b in zip(one.logits, other.logits, strict=True)])
    return float(difference.double().square().mean().sqrt())


def _same_ids(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None) -> bool:
    return other is not None and one(SAMPLE).input_ids == other(SAMPLE).input_ids


def _check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = check_dtype(dtype)
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConversionError(f"`dtype` must be float32, bfloat16 or float16, got {dtype!r}.")
    return found
