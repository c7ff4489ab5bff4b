"""`convert_checkpoint`: a pretrained decoder into a widened one, without changing what it computes.

First everything is looked at and nothing written; then the folder is built aside; then it gets its name. Base weights
go over unread, so time and memory depend on the number of sites, not on the size of the model.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..modeling import HyperConnection
from . import companions, takeover
from .errors import DamagedCheckpoint, NotEnoughSpace
from .manifest import WrittenFile, describe, write_manifest
from .output import is_full, require_replaceable, require_space, resolve_output
from .plan import Plan, check_dtype, check_start, make_plan
from .report import ConversionReport
from .shard import Shard
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
    plan = make_plan(opened, final, hc_mult, start, torch_dtype, overwrite, copy)
    try:
        files = _build(plan)
    except OSError as error:
        if is_full(error):
            raise NotEnoughSpace(
                f"`output_dir`={str(final)!r}: the disk became full, and nothing is left there."
            ) from error
        raise
    count = {
        how: sum(file.bytes for file in files if file.how == how) for how in ("cloned", "linked", "copied", "written")
    }
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
        seconds=time.monotonic() - begin,
    )


def _build(plan: Plan) -> list[WrittenFile]:
    """Build the folder aside and put it in place."""
    with staged(plan.final) as staging:
        folder, shards = staging.path, plan.checkpoint.shards
        names = {s.name: takeover.base_name(position, len(shards)) for position, s in enumerate(shards, 1)}
        # what can be shared first: only then is it known how much must be written
        ways = {
            s.name: takeover.share(s.path.resolve(), folder / names[s.name]) if plan.shared(s) else None for s in shards
        }
        rest = [shard for shard in shards if ways[shard.name] is None]
        require_space(plan.final, plan.room(rest))
        written = [WrittenFile(names[s.name], s.size, str(ways[s.name]), s.name) for s in shards if s not in rest]
        written += _write_rest(plan, rest, names, folder)
        mhc = write_safetensors(folder / MHC_SHARD, plan.mhc_shapes, _start_values(plan.sites))
        written.append(WrittenFile(MHC_SHARD, mhc.size, "written"))

        _write_index(plan, names, folder)
        plan.config.save_pretrained(folder)
        companions.carry(plan.source, plan.tokenizer, folder)
        facts = {"base": plan.source.given, "base_commit": plan.source.commit, "family": plan.config.base_model_type}
        facts |= {"hc_mult": plan.config.hc_mult, "hc_start": plan.config.hc_start}
        facts |= {"dtype": str(plan.dtype).removeprefix("torch.") if plan.dtype else None}
        facts |= {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
        card = companions.model_card(
            plan.source, family=str(facts["family"]), hc_mult=plan.config.hc_mult, start=plan.config.hc_start
        )
        (folder / companions.CARD).write_text(card, encoding="utf-8")
        files = describe(folder, written)
        write_manifest(folder, facts, files)

        replace = plan.final.is_dir() and any(plan.final.iterdir())
        if replace:
            require_replaceable(plan.final, f"`output_dir`={str(plan.final)!r}")
        staging.publish(replace and plan.overwrite)
    return files


def _write_rest(plan: Plan, rest: list[Shard], names: dict[str, str], folder: Path) -> list[WrittenFile]:
    """Copy or rewrite the shards that could not be shared."""
    written = []
    with tqdm(
        total=plan.weight_bytes(rest), unit="B", unit_scale=True, desc="Base weights", disable=None if rest else True
    ) as bar:
        for shard in rest:
            target = folder / names[shard.name]
            if must_rewrite(shard, plan.dtype):
                size = rewrite_shard(shard, target, plan.dtype, bar.update).size
                written.append(WrittenFile(target.name, size, "written", shard.name))
            else:
                takeover.copy(shard.path.resolve(), target, bar.update)
                if target.stat().st_size != shard.size:
                    raise DamagedCheckpoint(f"{shard.path} changed while it was copied. Run the conversion again.")
                written.append(WrittenFile(target.name, shard.size, "copied", shard.name))
    return written


def _write_index(plan: Plan, names: dict[str, str], folder: Path) -> None:
    weight_map = {tensor: names[shard.name] for shard in plan.checkpoint.shards for tensor in shard.tensors}
    weight_map |= {tensor: names[shard] for tensor, shard in plan.checkpoint.weight_map.items()}
    weight_map |= dict.fromkeys(plan.mhc_shapes, MHC_SHARD)
    metadata = {
        "total_parameters": plan.checkpoint.parameters + plan.mhc_parameters,
        "total_size": plan.weight_bytes(plan.checkpoint.shards) + 4 * plan.mhc_parameters,
    }
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _start_values(sites: dict[str, HyperConnection]) -> Callable[[str], torch.Tensor]:
    def load(name: str) -> torch.Tensor:
        site, _, parameter = name.rpartition(".")
        return sites[site].start_values()[parameter]

    return load
