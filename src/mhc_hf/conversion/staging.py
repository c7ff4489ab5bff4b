"""A folder built aside and put in place in one step, so that no half-made one ever carries the final name.

The staging folder is a hidden sibling of the output and locked while its process lives: whoever can take the lock may
remove it, for then its process was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import UnusableOutput

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


class Staging:
    """The folder under construction, `path`; `publish` gives it its final name."""

    def __init__(self, path: Path, final: Path) -> None:
        self.path = path
        self.final = final
        self.published = False

    def publish(self, replace: bool) -> None:
        """Flush everything to the disk and give the folder its final name, all at once.

        With `replace`, a folder that already has the name is exchanged for this one and then removed.

        Raises:
            UnusableOutput: somebody else put something there in the meantime.
        """
        for folder, _, files in os.walk(self.path):
            for path in (Path(folder, name) for name in files):
                # a linked file is the base's own: its bytes are on the disk, or on their way without us
                if path.stat().st_nlink == 1:
                    _flush(path)
            _flush(Path(folder))
        if replace and self.final.exists():
            self._replace()
        else:
            try:
                os.rename(self.path, self.final)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise UnusableOutput(
                    f"`output_dir`={str(self.final)!r} was written by somebody else while the conversion ran. Nothing "
                    "of it was changed; choose another name."
                ) from error
        self.published = True
        _flush(self.final.parent)

    def _replace(self) -> None:
        if _exchange(self.path, self.final):
            shutil.rmtree(self.path)
            return
        # without the exchange there is a moment with no folder under the final name, but never a half-made one
        aside = _sibling(self.final)
        os.rename(self.final, aside)
        os.rename(self.path, self.final)
        shutil.rmtree(aside)


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Staging]:
    """A locked staging folder beside `final`; whatever happens inside, only a published folder is left behind."""
    made = _make_parents(final.parent)
    remove_abandoned(final)
    path, lock = _make_locked(final)
    staging = Staging(path, final)
    try:
        yield staging
    finally:
        if not staging.published:
            shutil.rmtree(path, ignore_errors=True)
            for folder in made:
                with contextlib.suppress(OSError):  # not empty: somebody else uses it by now
                    folder.rmdir()
        if lock is not None:
            os.close(lock)


def remove_abandoned(final: Path) -> list[Path]:
    """Remove staging folders for `final` whose process is gone; those of a running conversion stay."""
    removed = []
    for path in final.parent.glob(glob.escape(_prefix(final)) + "*"):
        lock = _lock(path, wait=False)
        if lock is None:
            continue
        shutil.rmtree(path)
        os.close(lock)
        removed.append(path)
    return removed


def _prefix(final: Path) -> str:
    return f".{final.name}.mhc-"


def _sibling(final: Path) -> Path:
    return final.parent / f"{_prefix(final)}{secrets.token_hex(4)}"


def _make_parents(parent: Path) -> list[Path]:
    """Make the folder and whatever leads to it; the ones that were made, innermost first."""
    made: list[Path] = []
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        made.insert(0, folder)
    return made


def _make_locked(final: Path) -> tuple[Path, int | None]:
    while True:
        path = _sibling(final)
        path.mkdir()  # not tempfile.mkdtemp, whose mode would hide the result from everybody else
        lock = _lock(path, wait=True)
        # another run may have taken it for abandoned before it was locked
        if path.exists():
            return path, lock


def _lock(path: Path, wait: bool) -> int | None:
    """Hold the folder until the returned descriptor is closed or the process ends; None where it cannot be held."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system: abandoned folders stay
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the filesystem cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if renameat2(_AT_FDCWD, ctypes.c_char_p(names[0]), _AT_FDCWD, ctypes.c_char_p(names[1]), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


def _flush(path: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
