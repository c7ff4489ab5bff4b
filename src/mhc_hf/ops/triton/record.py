"""How a kernel is launched, and how launches are recorded and their traffic counted.

Traffic is counted in rows: one row is T*C elements of the streams' dtype. Every kernel here touches each element of a
stream-sized argument once, so its rows are the sizes of those arguments; numbers a token and parameters are not rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

# arguments that are [T, n, C] or [T, C]
_ROW_ARGUMENTS = (
    *("x_ptr", "y_ptr", "out_ptr", "branch_in_ptr", "hidden_ptr", "mean_ptr"),
    *("g_ptr", "du_ptr", "d_x_ptr"),
)


class Launch(NamedTuple):
    """One launch: the kernel's name, its grid and all its arguments by name."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collect the launches made inside, in their order."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def run_kernel(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any]) -> None:
    """Launch on the device of the first tensor; an empty grid launches nothing, and neither do meta tensors."""
    if _recorded is not None:
        _recorded.append(Launch(kernel.__name__, grid, arguments | constants))
    if 0 in grid:
        return
    device = next(value for value in arguments.values() if value is not None).device
    if device.type == "meta":
        return
    if device.type == "cpu" or device.index == (devices := torch.get_device_module(device)).current_device():
        kernel[grid](**arguments, **constants)
    else:
        with devices.device(device):
            kernel[grid](**arguments, **constants)


def count_rows(launch: Launch, num_tokens: int, num_channels: int) -> int:
    """Rows of C elements a token that a launch reads and writes."""
    numbers = sum(
        value.numel()
        for name, value in launch.arguments.items()
        if name in _ROW_ARGUMENTS and isinstance(value, Tensor)
    )
    return numbers // (num_tokens * num_channels)
