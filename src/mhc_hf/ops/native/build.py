"""Compile the C of this folder with the system's compiler, keep what it made, load it.

One library for each number of streams and dtype of them: it takes about a second, once on a machine. Libraries lie in
a folder of the user's own, under a name made of all that decides their content, so that a home shared between machines
is no trouble; they are written under another name and renamed, so that processes may build at once. The name ends with
a checksum of the file, and what fails it, or belongs to someone else, is not loaded but made again.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
DTYPE_FLAGS = {
    torch.float32: ("-DSTREAM_BITS=32",),
    torch.bfloat16: ("-DSTREAM_BITS=16", "-DBFLOAT"),
    torch.float16: ("-DSTREAM_BITS=16",),
}
# not -ffast-math: NaN and infinity must come out as what they are
_FLAGS = ("-std=gnu11", "-O2", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing", "-Wno-psabi")
_OPENMP = re.compile(r"lib[gi]?omp")
_X86 = ("x86_64", "amd64", "i686")
_TIMEOUT_SECONDS = 300


class NativeBuildError(RuntimeError):
    """The native path cannot be had here; the message says why."""


@cache
def explain_no_library(n: int, dtype: torch.dtype) -> str | None:
    """Why there is no library for `n` streams of `dtype`; None where there is one. Builds it, the first time."""
    try:
        load_library(n, dtype)
    except NativeBuildError as error:
        if find_compiler():
            # with a compiler it should have worked
            warnings.warn(f"mhc_hf runs on PyTorch's own operations: {error}", RuntimeWarning, stacklevel=2)
        return str(error)
    return None


@cache
def load_library(n: int, dtype: torch.dtype) -> ctypes.CDLL:
    """The library for `n` streams of `dtype`, from the cache or newly built.

    Raises:
        NativeBuildError: no compiler, or it or the loader refused.
    """
    if os.name != "posix":
        raise NativeBuildError(f"the native path is made for Linux and macOS, and this is {platform.system()}")
    compiler = find_compiler()
    if compiler is None:
        wanted = f"`CC`={os.environ['CC']!r} names none" if os.environ.get("CC") else "there is no cc, gcc or clang"
        raise NativeBuildError(f"no C compiler was found: {wanted} (install gcc or clang, or set CC)")
    command = (*compiler, *_FLAGS, _tune_flag(), f"-DSTREAMS={n}", *DTYPE_FLAGS[dtype])
    name = f"n{n}-{str(dtype).removeprefix('torch.')}-{_make_key(command)}"
    folder = find_cache_folder()
    if folder is not None:
        return _load(_find_intact(folder, name) or _build(command, folder, name))
    # nowhere to keep it: a folder of our own, which need not outlive the loading
    with tempfile.TemporaryDirectory(prefix="mhc_hf-") as temporary:
        return _load(_build(command, Path(temporary), name))


@cache
def find_compiler() -> tuple[str, ...] | None:
    """The command of the C compiler: $CC where that is set, else the first of cc, gcc, clang on the path."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if program := shutil.which(command[0]):
            return program, *command[1:]
    return None


def find_cache_folder() -> Path | None:
    """$XDG_CACHE_HOME/mhc_hf or ~/.cache/mhc_hf, made if need be; None unless the user alone can write to it."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root / "mhc_hf"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):  # no home
        return None
    others_write = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if found.st_uid != os.getuid() or others_write or not os.access(folder, os.W_OK | os.X_OK):
        return None
    return folder


def _tune_flag() -> str:
    return "-march=native" if platform.machine().lower() in _X86 else "-mcpu=native"


@cache
def _make_key(command: tuple[str, ...]) -> str:
    """A hash of the sources, the command, and what the compiler says of itself and of this processor."""
    digest = hashlib.sha256("\0".join(command).encode())
    # every macro it defines: its version, and each instruction set it would use here
    macros = _run([*command, "-dM", "-E", "-x", "c", os.devnull])
    digest.update(macros)
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _build(command: tuple[str, ...], folder: Path, name: str) -> Path:
    """Compile to a temporary name and rename to one with the checksum."""
    try:
        handle, temporary = tempfile.mkstemp(prefix=name, suffix=".tmp", dir=folder)
        os.close(handle)
        try:
            _run([*command, "-shared", "-o", temporary, str(SOURCES / "mhc.c"), "-lm"])
            path = folder / f"{name}-{_compute_checksum(Path(temporary))}.so"
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as error:
        raise NativeBuildError(f"nothing could be written to {folder}: {error}") from error
    return path


def _find_intact(folder: Path, name: str) -> Path | None:
    """A library of this name that is the user's own and has the checksum it names."""
    for path in folder.glob(f"{name}-*.so"):
        try:
            if path.stat().st_uid == os.getuid() and path.stem == f"{name}-{_compute_checksum(path)}":
                return path
        except OSError:
            continue
    return None


def _compute_checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(f"{path} could not be loaded: {error}") from error
    if (region := _find_parallel_region()) is not None:
        library.mhc_use_pool(region)
    return library


@cache
def _find_parallel_region() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP library that PyTorch has loaded: its own pool of threads. None: one thread serves."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if _OPENMP.match(line.rpartition("/")[2]))
    # another package may have brought one of its own
    beside_torch = str(Path(torch.__file__).parent)
    for path in sorted(paths, key=lambda path: not path.startswith(beside_torch)):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None


def _run(command: list[str]) -> bytes:
    """Standard output of the compiler, or an error with the end of what it complained of."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"the C compiler {command[0]} could not be run: {error}") from error
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()[-500:]
        raise NativeBuildError(f"the C compiler {command[0]} failed with code {done.returncode}: {words}")
    return done.stdout
