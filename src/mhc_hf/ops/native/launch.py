"""The launchers: the same functions as `ops/eager.py` has, computed by the C of this folder.

Shapes: T tokens, n streams, C channels of one stream, m = (n+2)*n. x [T, n, C], branch tensors [T, C], numbers a token
token-last: h_pre [n, T], h_post [n, T], h_res [n, n, T], projected [m, T], inv_rms [T]. All contiguous; streams and
branch tensors float32, bfloat16 or float16, the rest float32.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..sinkhorn import count_log_iters
from .build import load_library

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "write": (_INT, _SIZE, _SIZE, *(_POINTER,) * 5),
    "read": (_INT, _SIZE, _SIZE, _INT, _INT, _FLOAT, *(_POINTER,) * 14),
    "read_backward": (_INT, _SIZE, _SIZE, _INT, _INT, *(_POINTER,) * 15),
    "collapse": (_INT, _SIZE, _SIZE, *(_POINTER,) * 5),
    "spread": (_INT, _SIZE, _SIZE, *(_POINTER,) * 5),
    "mix_backward": (_INT, _SIZE, _SIZE, *(_POINTER,) * 5),
    "sinkhorn": (_INT, _SIZE, _INT, _INT, *(_POINTER,) * 3),
}


def project_doubly_stochastic(logits: Tensor, num_iters: int) -> Tensor:
    """`ops/sinkhorn.py` says what."""
    return _run_sinkhorn(logits, None, num_iters)


def backpropagate_projection(grad: Tensor, logits: Tensor, num_iters: int) -> Tensor:
    """`ops/sinkhorn.py` says what; the result itself is not returned again."""
    return _run_sinkhorn(logits, grad, num_iters)


def coefficients(
    x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float
) -> tuple[Tensor, ...]:
    """The three maps of a site: h_pre, h_post, h_res, and for backward projected, inv_rms. One pass, n rows."""
    h_pre = phi.new_empty(x.shape[1], x.shape[0])
    numbers = _read(x, None, phi, bias, alpha, num_iters, norm_eps, None, h_pre)
    return h_pre, *numbers


def read(x: Tensor, phi: Tensor, bias: Tensor, alpha: Tensor, num_iters: int, norm_eps: float) -> tuple[Tensor, ...]:
    """branch_in, h_post, h_res, and for backward projected, inv_rms. One pass, n+1 rows."""
    branch_in = x.new_empty(x.shape[0], x.shape[2])
    numbers = _read(x, None, phi, bias, alpha, num_iters, norm_eps, branch_in, None)
    return branch_in, *numbers


def write_read(
    x: Tensor,
    branch_out: Tensor,
    h_post: Tensor,
    h_res: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    num_iters: int,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    """`post_res`, then the next site's `read` of it: x_next and what `read` returns. One pass, 2n+2 rows."""
    x_next, branch_in = torch.empty_like(x), torch.empty_like(branch_out)
    written = (branch_out, h_post, h_res, x_next)
    numbers = _read(x, written, phi, bias, alpha, num_iters, norm_eps, branch_in, None)
    return x_next, branch_in, *numbers


def pre(x: Tensor, h_pre: Tensor) -> Tensor:
    """H_pre x. One pass, n+1 rows."""
    branch_in = x.new_empty(x.shape[0], x.shape[2])
    _call(x, "collapse", x, h_pre, None, branch_in, None)
    return branch_in


def post_res(x: Tensor, branch_out: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """x' = H_res x + H_post F. One pass, 2n+1 rows."""
    x_next = x.new_empty(x.shape)
    _call(x, "write", x, branch_out, h_post, h_res, x_next)
    return x_next


def backpropagate_pre(x: Tensor, h_pre: Tensor, d_branch_in: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and h_pre. One pass, 2n+1 rows."""
    d_x, d_h_pre = torch.empty_like(x), torch.empty_like(h_pre)
    _call(x, "spread", x, h_pre, d_branch_in, d_x, d_h_pre)
    return d_x, d_h_pre


def backpropagate_write(branch_out: Tensor, h_post: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of branch_out and h_post. One pass, n+2 rows."""
    d_branch_out, d_h_post = torch.empty_like(branch_out), torch.empty_like(h_post)
    _call(d_x_next, "collapse", d_x_next, h_post, branch_out, d_branch_out, d_h_post)
    return d_branch_out, d_h_post


def backpropagate_mix(x: Tensor, h_res: Tensor, d_x_next: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and h_res where no `read` owns x. One pass, 3n rows."""
    d_x, d_h_res = torch.empty_like(x), torch.empty_like(h_res)
    _call(x, "mix_backward", x, h_res, d_x_next, d_x, d_h_res)
    return d_x, d_h_res


def backpropagate_read(
    x: Tensor,
    phi: Tensor,
    bias: Tensor,
    alpha: Tensor,
    projected: Tensor,
    inv_rms: Tensor,
    num_iters: int,
    d_branch_in: Tensor | None,
    d_h_pre: Tensor | None,
    d_h_post: Tensor | None,
    d_h_res: Tensor | None,
    d_x_next: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, phi, bias, alpha. One pass, 3n+1 rows with the branch and the mix.

    Each thread adds what the parameters get in a sum of its own, and the sums are added in their order: the same run
    gives the same bits.
    """
    n = x.shape[1]
    d_x, d_phi, d_bias, d_alpha = (torch.empty_like(t) for t in (x, phi, bias, alpha))
    given = (x, phi, bias, alpha, projected, inv_rms, d_branch_in, d_h_pre, d_h_post, d_h_res, d_x_next)
    _call(x, "read_backward", num_iters, count_log_iters(n, num_iters), *given, d_x, d_phi, d_bias, d_alpha)
    return d_x, d_phi, d_bias, d_alpha


def _read(x, written, phi, bias, alpha, num_iters, norm_eps, branch_in, h_pre) -> tuple[Tensor, ...]:
    """h_post, h_res, projected, inv_rms; of x, or of what `written` says is to be made of it first."""
    num_tokens, n, _ = x.shape
    h_post, h_res = phi.new_empty(n, num_tokens), phi.new_empty(n, n, num_tokens)
    projected, inv_rms = phi.new_empty(phi.shape[0], num_tokens), phi.new_empty(num_tokens)
    iters = num_iters, count_log_iters(n, num_iters), norm_eps
    given = (x, *(written or (None,) * 4), phi, bias, alpha)
    _call(x, "read", *iters, *given, branch_in, h_pre, h_post, h_res, projected, inv_rms)
    return h_post, h_res, projected, inv_rms


def _run_sinkhorn(logits: Tensor, grad: Tensor | None, num_iters: int) -> Tensor:
    n, _, num_tokens = logits.shape
    out = torch.empty_like(logits)
    function = _load_functions(n, torch.float32)["sinkhorn"]
    iters = num_iters, count_log_iters(n, num_iters)
    addresses = logits.data_ptr(), None if grad is None else grad.data_ptr(), out.data_ptr()
    _check(function(torch.get_num_threads(), num_tokens, *iters, *addresses))
    return out


def _call(x: Tensor, name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function of the library for streams like `x`, with tensors as their addresses."""
    num_tokens, n, num_channels = x.shape
    addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    _check(_load_functions(n, x.dtype)[name](torch.get_num_threads(), num_tokens, num_channels, *addresses))


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("the native mHC ops found no memory for their buffers")


@cache
def _load_functions(n: int, dtype: torch.dtype) -> dict[str, Callable[..., int]]:
    """The library's functions with their signatures, by name."""
    library = load_library(n, dtype)
    functions = {}
    for name, signature in _SIGNATURES.items():
        function = getattr(library, f"mhc_{name}")
        function.argtypes, function.restype = signature, ctypes.c_int
        functions[name] = function
    return functions
