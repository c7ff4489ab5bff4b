"""Launch configurations by kernel, n, C, dtype and target: one small table, no autotuning, nothing that depends on T.

A configuration is tile sizes (BT tokens, BC or BK channels) and Triton's num_warps and num_stages. A first call
compiles in seconds; another batch or sequence length compiles nothing, for T never becomes a constant.
"""

from functools import cache

import torch
from triton import knobs

# kernel -> for n <= 4, for more, for 8 where that differs: (BT, BC, num_warps, num_stages). 8 channels a thread and
# stream make a 16-byte load in bf16. Kernels with products: BT >= 64 for the matrix units of sm_90, so that the work on
# phi is spread over many tokens, and no more registers than let two programs run at once (`tests/ops/instructions.py`)
_TILES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "project": ((128, 32, 8, 2), (64, 16, 4, 1)),
    "maps_fwd": ((16, 128, 4, 1), (16, 128, 4, 1)),
    "maps_bwd": ((32, 1, 1, 1), (32, 1, 1, 1)),
    "sinkhorn": ((32, 1, 1, 1), (32, 1, 1, 1)),
    "collapse": ((4, 256, 4, 1), (4, 256, 4, 1)),
    "widen_project": ((128, 32, 8, 2), (64, 16, 4, 1)),
    "write_collapse": ((4, 256, 4, 1), (4, 128, 4, 1)),
    "write": ((4, 256, 4, 1), (4, 128, 4, 1)),
    "write_project": ((64, 32, 4, 2), (64, 16, 4, 1), (32, 16, 8, 1)),
    "dots_bwd": ((4, 256, 4, 1), (4, 256, 4, 1)),
    # two programs a multiprocessor, each with two tiles on their way; under 99 KB, which every device since sm_80 has
    "streams_bwd": ((16, 64, 4, 3), (16, 16, 8, 2)),
}
# float32 and float16 streams are multiplied in float32 or in pieces of it: twice the registers a number, or more
_WIDE_TILES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "maps_fwd": ((16, 64, 4, 1), (16, 64, 4, 1)),
    "project": ((64, 16, 4, 2), (32, 16, 4, 1)),
    "widen_project": ((64, 16, 4, 2), (32, 16, 4, 1)),
    "write_project": ((64, 16, 8, 1), (32, 16, 8, 1)),
    "streams_bwd": ((16, 32, 4, 3), (16, 16, 8, 1)),
}
# wavefronts of 64 threads, and 512 registers for each where there are few of them
_HIP_TILES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "write_project": ((64, 32, 4, 1), (32, 16, 4, 1)),
    "streams_bwd": ((32, 32, 4, 1), (16, 16, 4, 1)),
}
# kernels whose channel tile is an operand of a matrix product: 16 is the least that Triton takes
_MATRIX_KERNELS = ("project", "widen_project", "write_project", "streams_bwd")
# programs that keep a large device busy; one number, so that sums are split alike on all devices
_PROGRAMS = 256
_MAX_SPLITS = 32


def choose_tiles(kernel: str, n: int, num_channels: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages of a kernel for n streams of C channels."""
    tiles = _TILES
    if kernel in _WIDE_TILES and dtype != torch.bfloat16:
        tiles = _WIDE_TILES
    if kernel in _HIP_TILES and get_target() == "hip":
        tiles = _HIP_TILES
    column = min((n > 4) + (n > 7), len(tiles[kernel]) - 1)
    tokens, channels, num_warps, num_stages = tiles[kernel][column]
    if channels == 1:
        return {"BT": tokens, "num_warps": num_warps, "num_stages": num_stages}
    least = 16 if kernel in _MATRIX_KERNELS else 32
    channels = min(channels, max(least, next_power_of_2(num_channels)))
    return {"BT": tokens, "BC": channels, "num_warps": num_warps, "num_stages": num_stages}


def can_reorder(tiles: dict[str, int], dtype: torch.dtype) -> bool:
    """Whether tiles are such that `place_operand` finds each thread's numbers where they are: 16 rows a warp."""
    has_bits = dtype == torch.bfloat16 and get_target() in ("cuda", "interpreter")
    return has_bits and tiles["BT"] == 16 * tiles["num_warps"] and tiles["BC"] == 32


def choose_precision(dtype: torch.dtype, target: str, n: int = 4) -> dict[str, str]:
    """How products of streams and float32 are made.

    bfloat16 streams: float32 in three bfloat16 pieces (2e-7). Others: tf32 three times on NVIDIA, float32 elsewhere.
    What is rounded to bfloat16 at once (OUT_PRECISION) needs one tf32 product (2e-4 against 4e-3); the
    pieces of another product with phi of 8 streams would fill more shared memory than most devices have.
    """
    wide = "tf32x3" if target == "cuda" else "ieee"
    if dtype == torch.bfloat16:
        return {"PRECISION": "split", "OUT_PRECISION": "tf32" if target == "cuda" else "ieee"}
    return {"PRECISION": wide, "OUT_PRECISION": wide if n < 8 else "ieee"}


def count_together(tiles: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """V: how many numbers of a tile a thread loads at once, 16 bytes or what there is for it."""
    return {"V": min(16 // dtype.itemsize, max(1, tiles["BT"] * tiles["BC"] // (32 * tiles["num_warps"])))}


def has_ptx() -> bool:
    """Whether kernels may have a few lines of PTX, NVIDIA's assembler, where the compiler's own are slower."""
    return get_target() == "cuda"


@cache
def get_target() -> str:
    """ "cuda", "hip" or "xpu"; "interpreter" where kernels are interpreted."""
    if knobs.runtime.interpret:
        return "interpreter"
    if torch.version.hip:
        return "hip"
    return "cuda" if torch.cuda.is_available() else "xpu"


def pad_rows(n: int) -> int:
    """MP: rows of phi padded to what a matrix product takes."""
    return max(16, next_power_of_2((n + 2) * n))


# triton's own two are made for kernels, and cost a decoder as much as a launcher does
def next_power_of_2(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << (number - 1).bit_length()


def cdiv(length: int, tile: int) -> int:
    """Tiles that cover a length."""
    return -(-length // tile)


def split_work(length: int, tile: int, num_programs: int, most: int) -> tuple[int, int]:
    """How a loop over `length` in steps of `tile` is shared by programs: (parts, tiles of a part)."""
    num_tiles = max(1, cdiv(length, tile))
    parts = max(1, min(most, num_tiles, cdiv(_PROGRAMS, max(1, num_programs))))
    tiles_per_part = cdiv(num_tiles, parts)
    return cdiv(num_tiles, tiles_per_part), tiles_per_part


def split_channels(length: int, tile: int, num_programs: int) -> tuple[int, int]:
    """`split_work` for the projections, whose parts are summed one after the other by every program that follows."""
    return split_work(length, tile, num_programs, _MAX_SPLITS)
