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
def widen(value, PTX: tl.constexpr):
    """To float32. Two bfloat16 of a register are one instruction each, where the compiler takes three for both."""
    if PTX and value.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=&r,=r,r", [value], tl.float32, is_pure=True, pack=2
        )
    else:
        return value.to(tl.float32)


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
def truncate(w):
    """float32 with the bits that bfloat16 has no room for set to zero."""
    return (w.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def take_upper_half(w):
    """`truncate` as bfloat16: half of the bits, and no conversion."""
    return (w.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def split_bf16(w):
    """float32 as three bfloat16 whose sum it is, largest first: 8 of its 24 bits each."""
    rest = w - truncate(w)
    return take_upper_half(w), take_upper_half(rest), take_upper_half(rest - truncate(rest))


@triton.jit
def unzip(x, V: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PTX: tl.constexpr):
    """[BT, BC] as a tuple of V [BT, BC/V], float32: the V numbers that a thread loads at once, apart.

    Sums over channels are then made of multiply-adds in one thread, one register for V numbers, and threads exchange
    only the last ones.
    """
    parts = (widen(x, PTX),)
    for level in tl.static_range(4):
        if (2 << level) <= V:
            halves = ()
            for k in tl.static_range(1 << level):
                first, second = tl.split(tl.reshape(parts[k], (BT, BC // (2 << level), 2)))
                halves += (first, second)
            parts = halves
    return parts


@triton.jit
def add_products(total, first, second, V: tl.constexpr):
    """total [BT, BC/V] plus the products of two tiles that `unzip` took apart."""
    for k in tl.static_range(V):
        total += first[k] * second[k]
    return total


@triton.jit
def place_tokens(t, first, BT: tl.constexpr, REORDER: tl.constexpr):
    """The tokens of the rows of `place_operand`, from those of a tile's, which begin with `first`."""
    if REORDER:
        row = tl.arange(0, BT)
        t = first + (row // 8 % 2) * (BT // 2) + row // 16 * 8 + row % 8
    return t


@triton.jit
def place_channels(BC: tl.constexpr, REORDER: tl.constexpr):
    """The channels of the columns of `place_operand`, counted from the first of the tile."""
    k = tl.arange(0, BC)
    if REORDER:
        k = k // 32 * 32 + k // 2 % 4 * 8 + k // 16 % 2 * 4 + k // 8 % 2 * 2 + k % 2
    return k


@triton.jit
def place_operand(x, BT: tl.constexpr, BC: tl.constexpr, REORDER: tl.constexpr):
    """A tile of 16-bit numbers [BT, BC] as the first operand of a product, with rows and columns in another order.

    A sum over channels may take them in any order. With REORDER it is the one in which sm_90's matrix units find in
    the registers of a thread what the thread has there already: 8 channels of two tokens, where the units want, of 16
    rows and columns, 2 columns and 8 after them of one row and 8 below it. Nothing moves then: no shared memory, no
    barrier, for all numbers that a product is made of.
    """
    if REORDER:
        x = tl.reshape(x, (2, BT // 16, 8, BC // 32, 4, 2, 2, 2))
        x = tl.reshape(tl.permute(x, (1, 0, 2, 3, 5, 6, 4, 7)), (BT, BC))
    return x


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
