"""The kernels as launched: traffic against docs/kernels.md, and real compilations for devices that are not here."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from . import instructions, launches

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"
# op -> rows of C a token as a function of n
_TABLE_ROW = re.compile(r"^\| `([a-z_ ]+)` \|.*\| (\d*)n(?: ?\+ ?(\d+))? \|$", re.MULTILINE)


def _documented_rows(n):
    return {
        name: int(factor or 1) * n + int(constant or 0)
        for name, factor, constant in _TABLE_ROW.findall(DOCS.read_text())
    }


@pytest.mark.parametrize("n", [2, 4, 7])
def test_every_op_moves_the_rows_that_the_documentation_says(n):
    counted = {name: rows for name, rows in launches.count_op_rows(n).items() if rows}
    assert counted == _documented_rows(n)


@pytest.mark.parametrize("n", range(2, 9))
def test_a_layer_of_two_sites_moves_7n_plus_4_rows_forward_and_12n_plus_8_backward(n):
    rows = launches.count_op_rows(n)
    for normed in ("", "_normed"):
        assert rows[f"read{normed}"] + rows[f"write_read{normed}"] + rows["write"] == 7 * n + 4
        assert 2 * (rows[f"read{normed} backward"] + rows["write backward"]) == 12 * n + 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sizes_share_their_compilations(dtype):
    first, *others = (launches.list_compilations("sm_90", c, dtype) for c in (1024, 2048, 4096, 8192))
    assert all(other == first for other in others)


def test_another_sequence_length_compiles_nothing():
    def describe_all(num_tokens):
        ops = launches.record_ops(4, 4096, torch.bfloat16, num_tokens).values()
        return [launches.describe(one) for recorded in ops for one in recorded]

    assert describe_all(1) == describe_all(17) == describe_all(8192)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("target", "dtype"), [*((target, torch.bfloat16) for target in launches.TARGETS), ("sm_90", torch.float32)]
)
def test_every_kernel_compiles_for_the_target_and_spills_nothing_where_the_tiles_are_chosen_for_it(target, dtype):
    # one size stands for all: test_sizes_share_their_compilations
    for described in launches.list_compilations(target, 4096, dtype):
        resources = launches.read_resources(launches.compile_launch(described, target))
        if target in ("sm_90", "gfx942"):
            assert resources["spilled"] == 0, described[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_issue_few_enough_instructions_to_be_bound_by_memory_on_sm_90():
    found = instructions.measure_all(4, 4096, torch.bfloat16)
    assert {name for name in found if name.startswith("streams_bwd")} and "write_project gram" in found
    for name, density in found.items():
        assert density.bytes_an_instruction >= 6, name
        # a step of a product moves some 30 KB
        assert density.barriers <= 17, name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_programs_of_each_kernel_with_products_fit_into_a_multiprocessor_and_copy_tiles_ahead():
    for described in launches.list_compilations("sm_90", 4096, torch.bfloat16):
        kernel, _, constants, _ = described
        if constants.get("PRECISION") is None:
            continue
        compiled = launches.compile_launch(described, "sm_90")
        resources = launches.read_resources(compiled)
        assert 2 * 32 * constants["num_warps"] * resources["registers"] <= 65536, kernel
        assert 2 * (resources["shared"] + 1024) <= 227 * 1024, kernel
        loop = instructions.find_main_loop(instructions.disassemble(compiled))
        # 16 bytes a thread for each stream at least
        assert sum(name.startswith("LDGSTS") for name in loop) >= (1 if "widen" in kernel else constants["N"]), kernel
