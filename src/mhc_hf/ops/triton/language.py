"""What the kernels share: rounding, products as precise as float32, and a token's place in memory.

Shapes: BT tokens of a program, M = (N+2)*N rows of phi. Numbers a token are token-last: row k of token t is at k*T + t.
Tuples hold one [BT] vector a stream or a matrix entry, (i, j) at i*N + j: threads own tokens and exchange nothing.
"""

# kernels are Triton, whose tuples grow and whose pointers are not Python's: not for a type checker
# mypy: ignore-errors

import triton
import triton.language as tl

# the interpreter multiplies bfloat16 bit patterns and truncates where a device rounds: both are mended here
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def locate_tokens(T, BT: tl.constexpr):
    """Indices of this program's tokens, int64, which of them exist, and T as int64."""
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    return t, t < T, tl.cast(T, tl.int64)


@triton.jit
def narrow(value, dtype: tl.constexpr):
    """float32 to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        value = (bits & -65536).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def load_rows(pointer, first, t, exists, T, COUNT: tl.constexpr):
    """Rows first .. first + COUNT of token-last numbers, as a tuple; zero for tokens that do not exist."""
    rows = ()
    for k in tl.static_range(COUNT):
        rows += (tl.load(pointer + (first + k) * T + t, mask=exists, other=0.0),)
    return rows


@triton.jit
def store_rows(pointer, first, rows, t, exists, T, COUNT: tl.constexpr):
    """A tuple of [BT] into rows first .. first + COUNT of token-last numbers."""
    for k in tl.static_range(COUNT):
        tl.store(pointer + (first + k) * T + t, rows[k], mask=exists)


@triton.jit
def split_bf16(w):
    """float32 as three bfloat16 whose sum it is to 2^-24, largest first."""
    high = w.to(tl.bfloat16)
    rest = w - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot_streams(x, w, total, PRECISION: tl.constexpr):
    """total + x @ w, with x of the streams' dtype and w float32; smallest pieces first."""
    if PRECISION == "split":
        high, middle, low = split_bf16(w)
        if INTERPRETED:
            x, high = x.to(tl.float32), high.to(tl.float32)
            middle, low = middle.to(tl.float32), low.to(tl.float32)
        return tl.dot(x, high, tl.dot(x, middle, tl.dot(x, low, total)))
    else:
        return tl.dot(x.to(tl.float32), w, total, input_precision=PRECISION)
