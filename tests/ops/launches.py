"""Every launch of every op, made from meta tensors: nothing runs, everything about the launches is known.

Run as a program it prints the table of docs/kernels.md: `python -m tests.ops.launches`.
Shapes: T tokens, n streams, C channels, m = (n+2)*n.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhc_hf.ops.triton import collapse, config, ends, launch, maps, project, read_backward, record, sinkhorn, write

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
_KERNELS = {
    name: kernel
    for module in (collapse, ends, maps, project, read_backward, sinkhorn, write)
    for name, kernel in vars(module).items()
    if name.endswith("_kernel")
}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_OPTIONS = ("num_warps", "num_stages")
# constants that tell one compilation of a kernel from another, for the table
_FLAGS = ("COLLAPSE", "DOTS", "BRANCH", "MIX", "TRANSPOSED", "HAS_RES_DOTS", "HAS_H_RES", "GRAM", "NORM", "SAVES")


def record_ops(n: int, num_channels: int, dtype: torch.dtype, num_tokens: int = 1024) -> dict[str, list[record.Launch]]:
    """The launches of each op, forward and backward, by the op's name."""
    m = (n + 2) * n

    def numbers(*shape):
        return torch.empty(*shape, device="meta")

    x = torch.empty(num_tokens, n, num_channels, dtype=dtype, device="meta")
    branch = torch.empty(num_tokens, num_channels, dtype=dtype, device="meta")
    phi, bias, alpha = numbers(m, n * num_channels), numbers(m), numbers(3)
    h, h_res, projected, inv_rms = (
        numbers(n, num_tokens),
        numbers(n, n, num_tokens),
        numbers(m, num_tokens),
        numbers(num_tokens),
    )
    parameters, saved = (phi, bias, alpha), (projected, inv_rms, 20)
    norm, norm_saved = (branch.new_empty(num_channels), 1e-6), (branch.new_empty(num_channels), inv_rms, h)
    calls: dict[str, Any] = {
        "sinkhorn": lambda: launch.project_doubly_stochastic(h_res, 20),
        "sinkhorn backward": lambda: launch.backpropagate_projection(h_res, h_res, 20),
        "coefficients": lambda: launch.coefficients(x, *parameters, 20, 1e-6),
        "coefficients backward": lambda: launch.backpropagate_read(x, *parameters, *saved, None, h, h, h_res, None),
        "read": lambda: launch.read(x, *parameters, 20, 1e-6),
        "read backward": lambda: launch.backpropagate_read(x, *parameters, *saved, branch, None, h, None, x),
        "pre": lambda: launch.pre(x, h),
        "pre backward": lambda: launch.backpropagate_pre(x, h, branch),
        "write": lambda: launch.post_res(x, branch, h, h_res),
        "write backward": lambda: launch.backpropagate_write(branch, h, x),
        "mix backward": lambda: launch.backpropagate_mix(x, h_res, x),
        "write_read": lambda: launch.write_read(x, branch, h, h_res, *parameters, 20, 1e-6),
        "write_project": lambda: launch.write_project(x, branch, h, h_res, phi, True),
        "widen_project": lambda: launch.widen_project(branch, n, phi, True),
        "write_collapse": lambda: launch.write_collapse(x, branch, h, h_res),
        "read_projected": lambda: launch.read_projected(
            numbers(*launch.shape_partial(x)), x, bias, alpha, 20, 1e-6, *norm, saves=False
        ),
        "read_normed": lambda: launch.read(x, *parameters, 20, 1e-6, *norm),
        "read_normed backward": lambda: launch.backpropagate_read(
            x, *parameters, *saved, branch, None, h, None, x, *norm_saved
        ),
        "write_read_normed": lambda: launch.write_read(x, branch, h, h_res, *parameters, 20, 1e-6, *norm),
    }
    recorded = {}
    for name, call in calls.items():
        with record.record_launches() as launches:
            call()
        recorded[name] = launches
    return recorded


def count_op_rows(n: int, num_channels: int = 4096, num_tokens: int = 1024) -> dict[str, int]:
    """Rows of C elements a token that each op reads and writes."""
    return {
        name: sum(record.count_rows(one, num_tokens, num_channels) for one in launches)
        for name, launches in record_ops(n, num_channels, torch.bfloat16, num_tokens).items()
    }


def describe(one: record.Launch) -> tuple[str, dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """What decides the compilation of a launch: kernel, signature, constants, alignments."""
    kernel = _KERNELS[one.kernel]
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        name, value = parameter.name, one.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if not parameter.do_not_specialize and isinstance(value, int) and value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return one.kernel, signature, constants | {name: one.arguments[name] for name in _OPTIONS}, attributes


@contextmanager
def choosing_for(target: str) -> Iterator[None]:
    """Tiles and precision are those of a target, which need not be here."""
    before = config.get_target
    config.get_target = lambda: TARGETS[target].backend  # type: ignore[assignment]
    try:
        yield
    finally:
        config.get_target = before


def list_compilations(target: str, num_channels: int, dtype: torch.dtype, n: int = 4) -> list:
    """Every distinct compilation that the ops need on a target."""
    found: list = []
    with choosing_for(target):
        for launches in record_ops(n, num_channels, dtype).values():
            found += [described for one in launches if (described := describe(one)) not in found]
    return found


def list_flags(constants: dict[str, Any]) -> list[str]:
    """What tells one compilation of a kernel from another."""
    return [key.lower() for key in _FLAGS if constants.get(key)]


def compile_launch(described, target: str):
    """Compile for a target that need not be here, down to cubin or hsaco."""
    name, signature, constants, attributes = described
    constants = dict(constants)
    options = {option: constants.pop(option) for option in _OPTIONS}
    source = ASTSource(_KERNELS[name], signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def read_resources(compiled) -> dict[str, int]:
    """Registers a thread, bytes spilled a thread, shared memory a program; from the binary itself."""
    if "hsaco" in compiled.asm:
        numbers = dict(
            re.findall(r"\.(vgpr_count|vgpr_spill_count|group_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"])
        )
        return {
            "registers": int(numbers["vgpr_count"]),
            "spilled": 4 * int(numbers["vgpr_spill_count"]),
            "shared": int(numbers["group_segment_fixed_size"]),
        }
    text = run_tool("cuobjdump", "-res-usage", compiled)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared}


def run_tool(name: str, flag: str, compiled) -> str:
    """What one of the tools that Triton brings along says of a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print registers, spills and shared memory of every compilation as a Markdown table."""
    dtype = getattr(torch, sys.argv[1] if len(sys.argv) > 1 else "bfloat16")
    targets = sys.argv[2].split(",") if len(sys.argv) > 2 else list(TARGETS)
    print("| kernel | tiles | " + " | ".join(targets) + " |\n|---|---|" + "---|" * len(targets))
    rows: dict[str, dict[str, str]] = {}
    for target in targets:
        for described in list_compilations(target, 4096, dtype):
            name, _, constants, _ = described
            tiles = "x".join(str(constants[key]) for key in ("BT", "BC") if key in constants)
            name = " ".join([f"`{name.removesuffix('_kernel')}`", *list_flags(constants)])
            key = f"{name} | {tiles}, {constants['num_warps']} warps"
            found = read_resources(compile_launch(described, target))
            rows.setdefault(key, {})[target] = f"{found['registers']} / {found['spilled']} / {found['shared']}"
    for key, cells in rows.items():
        print(f"| {key} | " + " | ".join(cells.get(target, "") for target in targets) + " |", flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    main()
