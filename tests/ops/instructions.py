"""How many instructions a kernel issues for the bytes it moves, read from its machine code: no device is needed.

A kernel that is to be bound by memory must not be bound by the issue of instructions first. A multiprocessor of sm_90
issues at most 4 warp instructions a clock and gets about 18 bytes a clock of an H200's memory, so 4.6 bytes an
instruction is the least, and twice that leaves room for waiting. Printed by `python -m tests.ops.instructions`.
"""

import re
import sys
from typing import NamedTuple

import torch

from mhc_hf.ops.triton import record

from . import launches

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*?)\s*;")
_LABEL = re.compile(r"^(\.L_\w+):", re.MULTILINE)
_WIDE = re.compile(r"(LDG|STG|LDGSTS)\.\S*(64|128)")


class Density(NamedTuple):
    """What a kernel's main loop, or all of it where it has none, issues and moves."""

    instructions: int  # of one warp
    barriers: int
    bytes_an_instruction: float


def measure(one: record.Launch, compiled, num_tokens: int, num_channels: int) -> Density:
    """Of a launch compiled for NVIDIA, whose every step moves its rows of a tile."""
    body = find_main_loop(disassemble(compiled))
    constants = one.arguments
    size = next(
        value.element_size() for name, value in constants.items() if name in ("x_ptr", "out_ptr") and value is not None
    )
    rows = record.count_rows(one, num_tokens, num_channels)
    moved = rows * constants["BT"] * constants["BC"] * size
    barriers = sum(instruction.startswith("BAR") for instruction in body)
    return Density(len(body), barriers, moved / (len(body) * constants["num_warps"]))


def disassemble(compiled) -> str:
    """The machine code as text, one function of it."""
    return launches.run_tool("nvdisasm", "-c", compiled)


def find_main_loop(text: str) -> list[str]:
    """Instructions of the last loop that moves streams, 8 bytes a thread or more; of everything if none does."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.search(line):
            instructions.append(instruction[1])
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"^BRA.*`\((\.L_\w+)\)", instruction)
        if target and labels.get(target[1], end + 1) <= end:
            loops.append(instructions[labels[target[1]] : end + 1])
    streaming = [body for body in loops if any(_WIDE.match(instruction) for instruction in body)]
    return streaming[-1] if streaming else instructions


def measure_all(n: int, num_channels: int, dtype: torch.dtype, num_tokens: int = 1024) -> dict[str, Density]:
    """Every kernel that moves rows, compiled for sm_90, by its name and flags."""
    found: dict[str, Density] = {}
    with launches.choosing_for("sm_90"):
        recorded = launches.record_ops(n, num_channels, dtype, num_tokens)
        for one in (one for ops in recorded.values() for one in ops):
            described = launches.describe(one)
            name = " ".join([one.kernel.removesuffix("_kernel"), *launches.list_flags(described[2])])
            if name not in found and record.count_rows(one, num_tokens, num_channels):
                compiled = launches.compile_launch(described, "sm_90")
                found[name] = measure(one, compiled, num_tokens, num_channels)
    return found


def main() -> None:
    """Print them as a Markdown table."""
    dtype = getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "bfloat16")
    n = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    print("| kernel | instructions a step | barriers | bytes an instruction |\n|---|---|---|---|")
    for name, density in measure_all(n, 4096, dtype).items():
        print(f"| `{name}` | {density.instructions} | {density.barriers} | {density.bytes_an_instruction:.1f} |")


if __name__ == "__main__":
    main()
