"""`convert_checkpoint`: a pretrained decoder into a widened one, without changing what it computes.

First everything is looked at and nothing written; then the folder is built aside; then it gets its name. Base weights
go over unread, so time and memory depend on the number of sites, not on the size of the model.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..modeling import HyperConnection
from . import companions, takeover
from .card import CARD, model_card
from .errors import DamagedCheckpoint, NotEnoughSpace
from .manifest import WrittenFile, describe, write_manifest
from .output import is_full, require_replaceable, require_space, resolve_output
from .plan import Plan, check_dtype, check_start, make_plan
from .report import ConversionReport
from .source import open_source
from .staging import staged
from .writing import must_rewrite, rewrite_shard, write_safetensors

MHC_SHARD = "mhc.safetensors"  # sorts after base-*: transformers takes an unstated dtype from the first shard


def convert_checkpoint(
    source: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    hc_mult: int = 4,
    start: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
    copy: bool = False,
    self_contained: bool = False,
) -> ConversionReport:
    """Widen a pretrained decoder into `hc_mult` residual streams, exactly preserving its function.

    Args:
        source: folder of a transformers checkpoint, or a Hub id. It is only read.
        output_dir: folder to be made; parents are made too.
        hc_mult: n, the number of residual streams, >= 2.
        start: "orthogonal" (n >= 3) or "copies"; None takes the first that n allows. See docs/math.md.
        dtype: cast the base's floating-point weights; None keeps every bit. mHC parameters are float32 either way.
        revision: branch, tag or commit of a Hub id.
        token: Hub token; None takes the one that `hf auth login` stored.
        overwrite: replace a folder that an earlier conversion wrote, if nothing in it is new or changed since.
        copy: copy the base's weights even where they could be shared.
        self_contained: write modelling code beside the weights, so that `trust_remote_code=True` loads the folder where
            this package is not installed. See docs/sharing.md.
    Returns:
        The report; `str()` of it is made to be printed.
    Raises:
        ConversionError: the conversion is not possible, or would damage something; the message says what, and how to
            mend it. Nothing has been written then.
        OSError: the disk failed. Nothing is left behind then either.
    """
    begin = time.monotonic()
    torch_dtype = check_dtype(dtype)
    check_start(hc_mult, start)
    opened = open_source(source, revision, token)
    final = resolve_output(output_dir, opened.folder, overwrite)
    plan = make_plan(opened, final, hc_mult, start, torch_dtype, overwrite, copy, self_contained)
    try:
        files = _build(plan)
    except OSError as error:
        if is_full(error):
            raise NotEnoughSpace(
                f"`output_dir`={str(final)!r}: the disk became full, and nothing is left there."
            ) from error
        raise
    count: Counter[str] = Counter()
    for file in files:
        count[file.how] += file.bytes
    return ConversionReport(
        output_dir=Path(output_dir),
        family=str(plan.config.base_model_type),
        hc_mult=plan.config.hc_mult,
        start=plan.config.hc_start,
        parameters_before=plan.checkpoint.parameters,
        parameters_added=plan.mhc_parameters,
        bytes_cloned=count["cloned"],
        bytes_linked=count["linked"],
        bytes_copied=count["copied"],
        bytes_written=count["written"],
        has_tokenizer=plan.tokenizer is not None,
        self_contained=plan.self_contained,
        seconds=time.monotonic() - begin,
    )


def _build(plan: Plan) -> list[WrittenFile]:
    """Build the folder aside and put it in place; what it holds, by file."""
    with staged(plan.final) as staging:
        folder = staging.path
        weights = _take_over(plan, folder)
        mhc = write_safetensors(folder / MHC_SHARD, plan.mhc_shapes, _start_values(plan.sites))
        weights.append(WrittenFile(MHC_SHARD, mhc.size, "written"))
        _write_index(plan, folder)
        plan.config.save_pretrained(folder)
        companions.carry(plan.source, plan.tokenizer, folder)
        (folder / CARD).write_text(model_card(plan), encoding="utf-8")
        files = describe(folder, weights)
        write_manifest(folder, _facts(plan), files)

        replace = plan.overwrite and plan.final.is_dir() and any(plan.final.iterdir())
        if replace:  # looked at again: the conversion may have taken an hour
            require_replaceable(plan.final, f"`output_dir`={str(plan.final)!r}")
        staging.publish(replace)
    return files


def _take_over(plan: Plan, folder: Path) -> list[WrittenFile]:
    """Bring the base's weights into `folder`, shared where that is possible."""
    taken, rest = [], []
    # sharing comes first: only then is it known how much must be written
    for shard in plan.checkpoint.shards:
        target = folder / plan.names[shard.name]
        how = takeover.share(shard.path.resolve(), target) if plan.shared(shard) else None
        if how is None:
            rest.append(shard)
        else:
            taken.append(WrittenFile(target.name, shard.size, how, shard.name))
    require_space(plan.final, plan.room(rest))

    total = plan.weight_bytes(rest)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Base weights", disable=None if rest else True) as bar:
        for shard in rest:
            target = folder / plan.names[shard.name]
            if must_rewrite(shard, plan.dtype):
                size = rewrite_shard(shard, target, plan.dtype, bar.update).size
                taken.append(WrittenFile(target.name, size, "written", shard.name))
            else:
                takeover.copy(shard.path.resolve(), target, bar.update)
                taken.append(WrittenFile(target.name, shard.size, "copied", shard.name))
    changed = [shard.path for shard in plan.checkpoint.shards if shard.path.stat().st_size != shard.size]
    if changed:
        raise DamagedCheckpoint(f"{changed[0]} changed while it was converted. Run again when nobody writes to it.")
    return taken


def _facts(plan: Plan) -> dict[str, Any]:
    """What the manifest says beside its files."""
    package = __name__.partition(".")[0]
    return {
        "base": plan.source.given,
        "base_revision": plan.source.asked_revision,
        "base_commit": plan.source.commit,
        "family": plan.config.base_model_type,
        "hc_mult": plan.config.hc_mult,
        "hc_start": plan.config.hc_start,
        "dtype": None if plan.dtype is None else str(plan.dtype).removeprefix("torch."),
        "versions": {
            package: sys.modules[package].__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _write_index(plan: Plan, folder: Path) -> None:
    weight_map = {tensor: plan.names[shard.name] for shard in plan.checkpoint.shards for tensor in shard.tensors}
    weight_map |= {tensor: plan.names[shard] for tensor, shard in plan.checkpoint.weight_map.items()}
    weight_map |= dict.fromkeys(plan.mhc_shapes, MHC_SHARD)
    metadata = {
        "total_parameters": plan.checkpoint.parameters + plan.mhc_parameters,
        "total_size": plan.weight_bytes(plan.checkpoint.shards) + 4 * plan.mhc_parameters,
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _start_values(sites: dict[str, HyperConnection]) -> Callable[[str], torch.Tensor]:
    @functools.lru_cache(maxsize=1)  # a site's tensors are asked for one after the other
    def values(site: str) -> dict[str, torch.Tensor]:
        return sites[site].start_values()

    def load(name: str) -> torch.Tensor:
        site, _, parameter = name.rpartition(".")
        return values(site)[parameter]

    return load
