"""What the benches share: steps that take turns, medians and quartiles, the machine, tables and JSON.

Times are compared within one run only. Every step is timed once a round, so that whatever else the machine does falls
on all alike.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# rounds that are not counted: the first calls compile, fill caches and grow the allocator
_WARM_ROUNDS = 2
# before each timed step a GPU gets this many bytes to clear, this often: about 1 ms of work, behind which Python can
# queue the step, and more than any cache holds
_FLUSHED_BYTES, _FLUSHES = 2**30, 3


def time_in_turns(
    steps: Mapping[Any, Callable[[], object]], device: torch.device, num_rounds: int
) -> dict[Any, list[float]]:
    """Seconds of every step in every round; all steps take turns."""
    times: dict[Hashable, list[float]] = {name: [] for name in steps}
    for round_index in range(num_rounds + _WARM_ROUNDS):
        for name, step in steps.items():
            seconds = time_once(step, device)
            if round_index >= _WARM_ROUNDS:
                times[name].append(seconds)
    return times


def time_once(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call. On a GPU by its own clock, cold caches, and a queue that is not empty.

    So the time that Python needs to launch shows only where it is longer than the work.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    buffer = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)
    torch.cuda.synchronize(device)
    for _ in range(_FLUSHES):
        buffer.zero_()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def summarize_ms(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles in milliseconds."""
    low, middle, high = compute_quartiles([1e3 * value for value in seconds])
    return {"median_ms": middle, "quartiles_ms": [low, high]}


def compute_ratio(seconds: list[float], base_seconds: list[float]) -> dict[str, Any]:
    """Time over the base's time in the same round: median and quartiles."""
    low, middle, high = compute_quartiles([one / base for one, base in zip(seconds, base_seconds, strict=True)])
    return {"median": middle, "quartiles": [low, high]}


def compute_quartiles(values: list[float]) -> list[float]:
    """First quartile, median and third."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def measure_copy_rate(num_bytes: int, device: torch.device, num_rounds: int = 20) -> float:
    """Bytes a second of a copy within the device, those read and those written both counted."""
    source = torch.zeros(num_bytes, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    seconds = [time_once(lambda: target.copy_(source), device) for _ in range(num_rounds)]
    return 2 * num_bytes / statistics.median(seconds)


def describe_run(device: torch.device) -> dict[str, Any]:
    """Machine and command, with which every result begins."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _name_cpu()
    machine = {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "liger-kernel"):
        try:
            machine[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            machine[package] = None
    return {"machine": machine, "command": " ".join(["python", *sys.argv])}


def write_report(report: dict[str, Any], path: Path) -> None:
    """JSON that a person can read too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {path}")


def format_spread(median_ms: float, quartiles_ms: list[float], **_: float) -> str:
    """What `summarize_ms` found, as "12.34 [11.92, 12.80]"; further figures of the row are passed over."""
    low, high = quartiles_ms
    return f"{median_ms:.2f} [{low:.2f}, {high:.2f}]"


def _name_cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or 'unknown'} ({platform.machine()} CPU)"
