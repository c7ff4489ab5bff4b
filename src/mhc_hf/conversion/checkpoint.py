"""A base checkpoint found and checked as `from_pretrained` would find it, with no weight opened.

Whatever is missing, cut short or contradicts the index shows here, before anything is written.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import DamagedCheckpoint, UnusableSource
from .shard import Shard, TensorEntry, read_pickled_shard, read_shard
from .source import Source

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """All weights of a model; the shards are in the order in which transformers loads them."""

    shards: list[Shard]
    weight_map: dict[str, str] = field(default_factory=dict)  # tensor -> shard, as far as an index says

    @property
    def pickled(self) -> bool:
        return any(shard.pickled for shard in self.shards)

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor by name; one that two shards hold counts as transformers loads it, from the last."""
        return {name: entry for shard in self.shards for name, entry in shard.tensors.items()}

    @property
    def parameters(self) -> int:
        return sum(entry.numel for entry in self.tensors.values())


def read_config(source: Source) -> dict[str, Any]:
    """config.json of a checkpoint as a plain dict.

    Raises:
        UnusableSource: it is missing, not JSON, or names no model type.
    """
    path = source.folder / "config.json"
    if not path.is_file():
        raise UnusableSource(
            f"{source} has no config.json. Name a folder that `save_pretrained` wrote or a Hub id of a "
            "transformers model (an adapter must be merged first, a GGUF file converted)."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnusableSource(f"{source}: config.json is not valid JSON ({error}). Fetch it again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UnusableSource(f"{source}: config.json names no `model_type`, so the family is unknown.")
    return config


def read_checkpoint(source: Source, config: dict[str, Any]) -> Checkpoint:
    """Find the weights, fetch them if they are on the Hub, and check every one.

    Raises:
        DamagedCheckpoint: a shard is missing or cut short, or the index and the shards disagree.
        UnusableSource: there are no weights in a format that is read here.
    """
    # a config may name its weights; such a name is used alone
    explicit = config.get("transformers_weights")
    single = SINGLE if explicit is None else None if explicit.endswith(".index.json") else explicit
    index_name = INDEX if explicit is None else None if single else explicit

    # the order of preference is transformers': one file, then an index, then what is pickled
    found = _read_weights(source, single, index_name, pickled=False)
    if found is None and explicit is None:
        found = _read_weights(source, PICKLED, PICKLED_INDEX, pickled=True)
    if found is None:
        names = [explicit] if explicit else [SINGLE, INDEX, PICKLED, PICKLED_INDEX]
        raise UnusableSource(
            f"{source} has no weights: no {', no '.join(names)}. Save the model with `save_pretrained` first."
        )
    if not found.tensors:
        raise DamagedCheckpoint(f"{source}: its weight files hold no tensor. Save the model again.")
    return found


def _read_weights(source: Source, single: str | None, index_name: str | None, *, pickled: bool) -> Checkpoint | None:
    read = read_pickled_shard if pickled else read_shard
    if single is not None:
        _require_inside(source.folder, single, "`transformers_weights` in config.json")
    weight_map = _read_index(source.folder, index_name) if index_name is not None else None
    names = sorted(set(weight_map.values())) if weight_map else []
    source.fetch([*([single] if single else []), *names])
    if single is not None and (source.folder / single).is_file():
        return Checkpoint([read(source.folder, single)])
    if weight_map is None:
        return None

    missing = [name for name in names if not (source.folder / name).is_file()]
    if missing:
        raise DamagedCheckpoint(
            f"{index_name} in {source.folder} names {len(names)} shards, and {len(missing)} of them are missing: "
            f"{_some(missing)}. Download or save the checkpoint again."
        )
    checkpoint = Checkpoint([read(source.folder, name) for name in names], weight_map)
    holds = {shard.name: shard.tensors for shard in checkpoint.shards}
    absent = [tensor for tensor, name in weight_map.items() if tensor not in holds[name]]
    if absent:
        raise DamagedCheckpoint(
            f"{index_name} in {source.folder} lists {len(absent)} tensors that the shard it names does not hold: "
            f"{_some(absent)}. Index and shards are not of one checkpoint; download or save it again."
        )
    return checkpoint


def _read_index(folder: Path, name: str) -> dict[str, str] | None:
    path = _require_inside(folder, name, "`transformers_weights` in config.json")
    if not path.is_file():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("`weight_map` must give a file name for every tensor")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{name} in {folder} is no index of weights ({error!r}). Fetch it again.") from error
    for tensor, file in weight_map.items():
        _require_inside(folder, file, f"{name}, entry {tensor!r},")
    return weight_map


def _require_inside(folder: Path, name: str, where: str) -> Path:
    # by name only: the files of a Hub cache are links that lead out of their folder
    root = os.path.normpath(folder.absolute())
    path = Path(os.path.normpath(os.path.join(root, name)))
    if not path.is_relative_to(root) or path == Path(root) or "\\" in name:
        raise DamagedCheckpoint(
            f"{where} points to {name!r}, outside the folder {folder}. Nothing is read from there; put the file into "
            "the folder and correct the entry."
        )
    return path


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
