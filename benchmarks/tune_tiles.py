"""Other tiles for the kernels of a layer, timed beside those of the table: `python benchmarks/tune_tiles.py`

Nothing is tuned while a model runs: `ops/triton/config.py` has one table, and this is how its rows are chosen. Every
kernel of a layer's forward and backward is run with each of its candidates (tokens, channels, warps, stages) on the
arguments that the layer gives it. A candidate that spills registers, does not compile, or gives the layer another
result has no time. Printed and written to benchmarks/results/: per kernel the candidates, fastest first, as a
fraction of a copy measured in the same run. Without a GPU it runs in Triton's interpreter (TRITON_INTERPRET=1), where
times mean nothing. Shapes: T tokens, n streams, C channels.
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from bench_kernels import add_arguments, differentiate, find_kernels, prepare
from timing import RESULTS, describe_run, measure_copy_rate, time_once, write_report
from torch import Tensor, nn
from tqdm import tqdm

from mhc_hf.ops.triton import config, record

Tiles = tuple[int, int, int, int]
# kernel -> BT, BC, num_warps, num_stages that are tried in every combination
SPACES = {
    "project": ((64, 128), (32, 64), (4, 8), (1, 2, 3)),
    "maps_fwd": ((8, 16), (128, 256), (4, 8), (1, 2)),
    "write_project": ((64, 128), (16, 32), (4, 8), (1, 2)),
    "write": ((2, 4), (256, 512), (4,), (1,)),
    "collapse": ((2, 4), (256, 512), (4,), (1, 2)),
    "dots_bwd": ((2, 4), (256, 512), (4, 8), (1, 2)),
    "streams_bwd": ((16, 32), (16, 32, 64), (4, 8), (1, 2)),
}
_FEW = {name: tuple(values[:1] for values in space) for name, space in SPACES.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--few", action="store_true", help="one candidate a kernel")
    arguments = parser.parse_args(argv)
    layer, streams = prepare(arguments)
    copy_rate = measure_copy_rate(streams.nbytes, streams.device) if streams.device.type == "cuda" else None
    want = differentiate(layer, streams)
    report: dict[str, Any] = describe_run(streams.device) | {
        key: getattr(arguments, key) for key in ("tokens", "channels", "streams", "dtype")
    }
    report["tiles"] = {}
    spaces = _FEW if arguments.few else SPACES
    for kernel, space in spaces.items():
        report["tiles"][kernel] = found = []
        shipped = config.choose_tiles(kernel, arguments.streams, arguments.channels, streams.dtype)
        candidates = [(shipped["BT"], shipped["BC"], shipped["num_warps"], shipped["num_stages"])]
        candidates += [tiles for tiles in product(*space) if tiles not in candidates]
        for tiles in tqdm(candidates, desc=kernel):
            result = measure(kernel, tiles, layer, streams, want, copy_rate, arguments.rounds)
            found.append({"tiles": tiles, "shipped": tiles == candidates[0]} | result)
        print_candidates(kernel, found)
    write_report(report, arguments.output or RESULTS / f"tiles-{streams.device.type}.json")


def measure(
    kernel: str,
    tiles: Tiles,
    layer: nn.Module,
    streams: Tensor,
    want: tuple[Tensor, ...],
    copy_rate: float | None,
    num_rounds: int,
) -> dict[str, Any]:
    """Microseconds of all of the kernel's launches in a layer with these tiles, or why there are none."""
    name = f"{kernel}_fwd_kernel" if kernel == "project" else f"{kernel}_kernel"
    function = find_kernels()[name]
    with using(kernel, tiles):
        try:
            with record.record_launches() as launches:
                got = differentiate(layer, streams)
        except Exception as error:  # whatever a compiler says of tiles that it cannot take
            return {"refused": str(error).strip().splitlines()[-1][:120]}
    if not all(is_close(one, other) for one, other in zip(got, want, strict=True)):
        return {"refused": "another result"}
    microseconds, moved = 0.0, 0
    for launch in (launch for launch in launches if launch.kernel == name):
        if streams.device.type == "cuda":
            compiled = function[launch.grid](**launch.arguments)
            if compiled.n_spills:
                return {"refused": f"{compiled.n_spills} registers spilled"}
        seconds = [
            time_once(lambda launch=launch: function[launch.grid](**launch.arguments), streams.device)
            for _ in range(num_rounds)
        ]
        microseconds += 1e6 * statistics.median(seconds)
        num_channels = streams.shape[2] // layer.hc_mult
        rows = record.count_rows(launch, streams.shape[1], num_channels)
        moved += rows * streams.shape[1] * num_channels * streams.element_size()
    rate = 1e6 * moved / microseconds
    return {"us": microseconds, "of_copy_rate": copy_rate and rate / copy_rate}


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by no more than another order of sums explains."""
    distance = torch.linalg.vector_norm((one - other).float())
    unit = torch.finfo(one.dtype).eps if one.dtype != torch.float32 else 1e-5
    return bool(distance <= unit * torch.linalg.vector_norm(other.float()))


@contextmanager
def using(kernel: str, tiles: Tiles) -> Iterator[None]:
    """The kernel takes these tiles, for every n, dtype and target."""
    tables = (config._TILES, config._WIDE_TILES, config._HIP_TILES)
    before = [dict(table) for table in tables]
    for table in tables:
        table[kernel] = (tiles, tiles)
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


def print_candidates(kernel: str, found: list[dict[str, Any]]) -> None:
    """Fastest first; what the table has is marked."""
    timed = sorted((one for one in found if "us" in one), key=lambda one: one["us"])
    refused = [one for one in found if "us" not in one]
    print(f"\n{kernel}")
    for one in timed + refused:
        mark = "*" if one["shipped"] else " "
        part = f"{one['of_copy_rate']:8.0%}" if one.get("of_copy_rate") else ""
        result = f"{one['us']:10.1f} us{part}" if "us" in one else one["refused"]
        print(f"{mark} {'x'.join(map(str, one['tiles'])):16}{result}")


if __name__ == "__main__":
    main()
