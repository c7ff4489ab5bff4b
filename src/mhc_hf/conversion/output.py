"""Whether the output folder may be written: everything about it that can be known before a byte is."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from .errors import NotEnoughSpace, UnusableOutput
from .manifest import MANIFEST, strangers
from .report import format_bytes


def resolve_output(output_dir: str | os.PathLike[str], source_folder: Path, overwrite: bool) -> Path:
    """The folder to be made, with symbolic links followed.

    Raises:
        UnusableOutput: it is the source, inside it or around it; or it holds something that may not be replaced.
    """
    given = os.fspath(output_dir)
    if not given:
        raise UnusableOutput("`output_dir` is empty. Name a folder to be made.")
    final, source = Path(given).expanduser().resolve(), source_folder.resolve()
    where = f"`output_dir`={given!r}"
    if final == source:
        raise UnusableOutput(f"{where} is the source itself. The base is kept as it is; choose another folder.")
    if final.is_relative_to(source):
        raise UnusableOutput(
            f"{where} is inside the source {source}. The base is kept as it is; choose a folder outside."
        )
    if source.is_relative_to(final):
        raise UnusableOutput(f"{where} contains the source {source}. Choose a folder of its own.")
    if final.exists() and not final.is_dir():
        raise UnusableOutput(f"{where} is a file. Choose another name.")
    if final.is_dir():
        _require_usable_folder(final, where, overwrite)
    parent = next(folder for folder in final.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UnusableOutput(f"{where}: {parent} is no folder that this user may write to. Choose another place.")
    return final


def require_replaceable(final: Path, where: str) -> None:
    """Refuse to overwrite anything but a folder in which everything is as a conversion left it."""
    found = strangers(final)
    if found is None:
        raise UnusableOutput(
            f"{where} was not written by a conversion (it has no {MANIFEST}), so `overwrite` does not touch it. Choose "
            f"another name, or remove it yourself. It holds: {_some(sorted(os.listdir(final)))}"
        )
    if found:
        raise UnusableOutput(
            f"{where} holds files that are new or changed since the conversion, which `overwrite` would lose: "
            f"{_some(found)}. Move them away, or choose another name."
        )


def require_space(final: Path, needed: int) -> None:
    """Refuse when the disk of `final` has less than `needed` bytes left."""
    folder = next(folder for folder in (final, *final.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NotEnoughSpace(
            f"`output_dir`={str(final)!r}: the conversion writes {format_bytes(needed)} ({needed} bytes), and that "
            f"disk has {format_bytes(free)} free. Make room, or choose a folder on the disk of the source: there, base "
            "weights are shared and take none (without `copy` and `dtype`)."
        )


def can_share(real: Path, final: Path) -> bool:
    """Whether `real` is on the filesystem of `final`, so that cloning or linking may work."""
    folder = next(folder for folder in (final, *final.parents) if folder.exists())
    return real.stat().st_dev == folder.stat().st_dev


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _require_usable_folder(final: Path, where: str, overwrite: bool) -> None:
    if final == Path.cwd() or os.path.ismount(final):
        kind = "the current working directory" if final == Path.cwd() else "a mount point"
        raise UnusableOutput(
            f"{where} is {kind}, which cannot be put in place in one step. Name a folder inside it, such as "
            f"{final / 'mhc'}."
        )
    if not any(final.iterdir()):
        return
    if not overwrite:
        raise UnusableOutput(
            f"{where} exists and is not empty. Choose another name, or pass `overwrite=True` (--overwrite) to replace "
            "what an earlier conversion wrote there."
        )
    require_replaceable(final, where)


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
