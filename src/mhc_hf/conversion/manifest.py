"""mhc_conversion.json: what a conversion wrote, so that it can be told from what came later.

`--overwrite` replaces only a folder in which everything is still as a conversion left it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST = "mhc_conversion.json"
_FORMAT = 1


@dataclass(frozen=True)
class WrittenFile:
    """One file of a converted folder."""

    name: str  # with / between folders
    bytes: int
    how: str  # "cloned", "linked", "copied" or "written"
    base_file: str | None = None  # the base's file that holds the same tensors
    sha256: str | None = None  # of what is small enough to be edited by hand


def describe(folder: Path, weights: Iterable[WrittenFile]) -> list[WrittenFile]:
    """All files of `folder`: the weights as given, everything else with its digest."""
    known = {file.name: file for file in weights}
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in known and name != MANIFEST:
            known[name] = WrittenFile(name, path.stat().st_size, "written", sha256=_digest(path))
    return [known[name] for name in sorted(known)]


def write_manifest(folder: Path, facts: dict[str, Any], files: Iterable[WrittenFile]) -> None:
    listed = [{key: value for key, value in asdict(file).items() if value is not None} for file in files]
    content = {"format": _FORMAT, **facts, "files": listed}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a conversion wrote about itself; None where there is no such file that can be read."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return content if isinstance(content, dict) else None


def strangers(folder: Path) -> list[str] | None:
    """Names in `folder` that no conversion wrote or that were changed since; None where it is no conversion at all."""
    try:
        listed = (read_manifest(folder) or {})["files"]
        files = {entry["name"]: (entry["bytes"], entry.get("sha256")) for entry in listed}
    except (KeyError, TypeError, AttributeError):
        return None
    found = []
    for path in _files(folder):
        name = path.relative_to(folder).as_posix()
        if name == MANIFEST:
            continue
        size, digest = files.get(name, (None, None))
        same = not path.is_symlink() and path.is_file() and path.stat().st_size == size
        if not (same and digest in (None, _digest(path) if digest else None)):
            found.append(name)
    return sorted(found)


def _files(folder: Path) -> list[Path]:
    # a folder that is empty, or that is a link, is somebody's too
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir() or not any(path.iterdir())]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
