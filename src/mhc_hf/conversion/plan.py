"""A conversion looked at from every side, with nothing written: possible, or refused with the reason and the cure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from ..modeling import HyperConnection, MHCConfig
from ..modeling.families import family_of
from ..modeling.starts import CONVERSION_STARTS, default_start
from ..sharing.modeling_code import auto_map
from . import companions
from .checkpoint import Checkpoint, read_checkpoint, read_config
from .errors import ConversionError, UnusableOutput, UnusableSource
from .output import can_share, require_space
from .shard import Shard
from .source import Source
from .takeover import base_name
from .writing import must_rewrite, tensor_bytes

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_SMALL_FILES_ROOM = 64 * 2**20  # index, tokenizer, card


@dataclass(frozen=True)
class Plan:
    """A conversion that has been found possible."""

    source: Source
    final: Path
    config: MHCConfig
    checkpoint: Checkpoint
    sites: dict[str, HyperConnection]  # on the meta device
    tokenizer: PreTrainedTokenizerBase | None
    dtype: torch.dtype | None
    overwrite: bool
    copy: bool
    self_contained: bool

    @property
    def names(self) -> dict[str, str]:
        """What each base shard is called in the converted folder."""
        shards = self.checkpoint.shards
        return {shard.name: base_name(position, len(shards)) for position, shard in enumerate(shards, 1)}

    @property
    def mhc_shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {
            f"{site}.{name}": (torch.float32, tuple(parameter.shape))
            for site, module in self.sites.items()
            for name, parameter in module.named_parameters(recurse=False)
        }

    @property
    def mhc_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for _, shape in self.mhc_shapes.values())

    def shared(self, shard: Shard) -> bool:
        """Whether the shard is to go over as a clone or a link, which takes no room."""
        return not self.copy and not must_rewrite(shard, self.dtype) and can_share(shard.path.resolve(), self.final)

    def room(self, shards: list[Shard]) -> int:
        """Bytes that the conversion writes if these are the shards that cannot be shared."""
        return self.weight_bytes(shards) + 4 * self.mhc_parameters + _SMALL_FILES_ROOM

    def weight_bytes(self, shards: list[Shard]) -> int:
        """Bytes of the tensors of these shards in the converted folder."""
        return sum(tensor_bytes(shard, self.dtype) for shard in shards)


def make_plan(
    source: Source,
    final: Path,
    hc_mult: int,
    start: str | None,
    dtype: torch.dtype | None,
    overwrite: bool,
    copy: bool,
    self_contained: bool,
) -> Plan:
    """Look at everything, write nothing."""
    raw_config = read_config(source)
    config = _widen_config(source, raw_config, hc_mult, start)
    if dtype is not None and raw_config.get("quantization_config") is not None:
        raise ConversionError(f"`dtype`={dtype} cannot cast the quantized weights of {source}. Leave `dtype` out.")
    tokenizer = companions.load_tokenizer(source)
    companions.check_generation_config(source)
    checkpoint = read_checkpoint(source, raw_config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sites = {name: module for name, module in model.named_modules() if isinstance(module, HyperConnection)}
    plan = Plan(source, final, config, checkpoint, sites, tokenizer, dtype, overwrite, copy, self_contained)
    already = sorted(plan.mhc_shapes.keys() & checkpoint.tensors.keys())
    if already:
        raise UnusableSource(
            f"{source} holds mHC parameters such as {already[0]!r} already. Convert the base it came from."
        )
    inside = [shard.path for shard in checkpoint.shards if shard.path.resolve().is_relative_to(final)]
    if inside:
        raise UnusableOutput(
            f"`output_dir`={str(final)!r} contains {inside[0].resolve().name}, to which the source links. Choose a "
            "folder of its own."
        )
    require_space(final, plan.room([shard for shard in checkpoint.shards if not plan.shared(shard)]))
    if dtype is not None:
        config.dtype = dtype
    if self_contained:
        config.auto_map = auto_map(str(config.base_model_type))
    return plan


def _widen_config(source: Source, raw: dict[str, Any], hc_mult: int, start: str | None) -> MHCConfig:
    family = raw["model_type"]
    if family == MHCConfig.model_type:
        raise UnusableSource(
            f"{source} is already widened (base_model_type={raw.get('base_model_type')!r}, "
            f"hc_mult={raw.get('hc_mult')}). Convert the base it came from."
        )
    try:
        family_of(family)
    except ValueError as error:
        raise UnusableSource(f"{source}: {error}") from error
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UnusableSource(
            f"{source}: transformers {transformers.__version__} cannot read its config.json: {error}"
        ) from error
    try:
        return MHCConfig.from_base(config, hc_mult=hc_mult, hc_start=start or default_start(hc_mult))
    except ValueError as error:
        raise ConversionError(str(error)) from error


def check_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in _DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype in _DTYPES:
        return _DTYPES[str(dtype)]
    raise ConversionError(f"`dtype` must be one of {', '.join(_DTYPES)}, or left out to keep every bit; got {dtype!r}.")


def check_start(hc_mult: int, start: str | None) -> None:
    if isinstance(hc_mult, bool) or not isinstance(hc_mult, int) or hc_mult < 2:
        raise ConversionError(
            f"`hc_mult` must be an integer >= 2, got {hc_mult!r}. For a plain residual model load the base checkpoint."
        )
    if start is not None and start not in CONVERSION_STARTS:
        raise ConversionError(
            f"`start` must be one of {', '.join(CONVERSION_STARTS)}, got {start!r}: only these keep the model's "
            "function and let its streams separate."
        )
    if start is not None and hc_mult < CONVERSION_STARTS[start].min_mult:
        raise ConversionError(
            f"`start`={start!r} needs `hc_mult` >= {CONVERSION_STARTS[start].min_mult}, got {hc_mult}. Take another "
            "start, or more streams."
        )
