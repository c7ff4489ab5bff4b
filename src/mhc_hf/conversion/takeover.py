"""Base weights brought into a new folder without reading them: cloned, linked, or copied inside the kernel.

Links are a trap: safetensors up to 0.7 truncates the file that it writes, so saving through a hard link would write
into the base and into the Hub's cache. Here a linked file carries a name that no writer uses: `save_pretrained`,
Trainer, Accelerate and PEFT write and clean up `model*`, `pytorch_model*`, `adapter*`, `optimizer*`, never `base-*`.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

_FICLONE = 0x40049409  # linux/fs.h; the same on every architecture that torch runs on
_CHUNK = 64 * 2**20
# this filesystem cannot, or not between these two files: go on to the next way
_CANNOT = {
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EBADF,
}


def base_name(position: int, count: int) -> str:
    """The name of a base shard in a converted folder, `position` from 1; sorted like the base's own."""
    return f"base-{position:05d}-of-{count:05d}.safetensors"


def share(real: Path, target: Path) -> str | None:
    """Let `target` hold the bytes of `real` without copying: "cloned", "linked", or None where neither works."""
    if _clone(real, target):
        return "cloned"
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return None
    return "linked"


def copy(real: Path, target: Path, advance: Callable[[int], object]) -> None:
    """Copy `real` to the new file `target` inside the kernel, and flush it; `advance` hears of every piece in bytes."""
    with real.open("rb") as source, target.open("xb") as file:
        size = os.fstat(source.fileno()).st_size
        done, in_kernel = 0, hasattr(os, "copy_file_range")
        while done < size:
            if in_kernel:
                try:
                    count = os.copy_file_range(source.fileno(), file.fileno(), min(_CHUNK, size - done), done, done)
                except OSError as error:
                    if error.errno not in _CANNOT:
                        raise
                    in_kernel = False
                    continue
            else:
                source.seek(done)
                file.seek(done)
                count = file.write(source.read(_CHUNK))
            if count == 0:
                raise OSError(f"{real} became shorter while it was copied")
            done += count
            advance(count)
        file.flush()
        os.fsync(file.fileno())


def _clone(real: Path, target: Path) -> bool:
    """A copy-on-write clone, which no writer of either file can see through."""
    if sys.platform != "linux":
        return False
    import fcntl

    with real.open("rb") as source, target.open("xb") as file:
        try:
            fcntl.ioctl(file.fileno(), _FICLONE, source.fileno())
            os.fsync(file.fileno())
            return True
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
    target.unlink()
    return False
