"""Which backend runs in code that is shared beside weights: PyTorch, everywhere."""

from torch import Tensor


def choose_backend(backend: str, x: Tensor, n: int) -> str:
    """ "torch".

    Raises:
        ValueError: `backend` names another one.
    """
    if backend not in ("auto", "torch"):
        raise ValueError(f'`backend={backend!r}` comes with the package mhc_hf. Here it must be "auto" or "torch".')
    return "torch"


def runs_on_triton(x: Tensor, n: int) -> bool:
    """No: nothing is joined here."""
    return False
