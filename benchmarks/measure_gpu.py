"""All that is claimed of a GPU, measured by one command: `python benchmarks/measure_gpu.py`, or `make bench-gpu`

It checks first, each number of streams in a process of its own: every op on the device against float64, values and
gradients, all dtypes, n from 2 to 8, odd sizes, fresh random inputs in memory that was poisoned before. Then, alone on
the device: the kernels (`bench_kernels.py`), other tiles for them (`tune_tiles.py`), a site beside its peers in every
cell (`bench_ops.py`), models of 1B and 8B shape beside their bases (`bench_model.py`). All of it goes into
benchmarks/results/gpu-DEVICE.json, with device and versions, and is held to what is aimed at: a line for each, passed
or failed, and an exit code. `--parts` runs some of it and keeps the rest of the file.

Without a GPU it says so. `--rehearse` runs every part at a tiny size in Triton's interpreter, where no time counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import RESULTS, describe_run, write_report

ROOT = Path(__file__).parents[1]
PEERS = ("transformers", "transformers compiled", "liger")
# the paper's training overhead at n = 4 is 6.7 %
TARGETS = {"of_copy_rate": 0.85, "forward_us": 250, "backward_us": 500, "layer": 1.067, "launches": 2, "decoding": 0.9}

CHECK = ["-m", "tests.ops.on_device"]
COMMANDS = {
    "kernels": ["benchmarks/bench_kernels.py"],
    "tiles": ["benchmarks/tune_tiles.py", "--rounds", "10"],
    "ops": ["benchmarks/bench_ops.py", "--rounds", "20"],
    "model-1b": ["benchmarks/bench_model.py", "--shape", "1b", "--decode-tokens", "32"],
    "model-8b": ["benchmarks/bench_model.py", "--shape", "8b", "--decode-tokens", "32"],
}
PARTS = ("checks", *COMMANDS)
# the same, for the interpreter, whose time is Sinkhorn's: with few streams
_TINY = ["--device", "cpu", "--dtype", "float32"]
_TINY_OP = ["--tokens", "8", "--channels", "32", "--streams", "2", "--rounds", "1"]
_TINY_MODEL = ["--shape", "tiny", "--layers", "2", "1", "--batch", "1", "--context", "16", "--rounds", "2", "--eager"]
REHEARSALS = {
    "kernels": [*COMMANDS["kernels"], *_TINY, *_TINY_OP],
    "tiles": [*COMMANDS["tiles"][:1], *_TINY, *_TINY_OP, "--few"],
    "ops": [*COMMANDS["ops"][:1], *_TINY, *_TINY_OP, "--eager"],
    "model-tiny": ["benchmarks/bench_model.py", *_TINY, *_TINY_MODEL, "--decode-tokens", "4", "--decode-batch", "1"],
}


def main() -> None:
    """Run the parts, write after each, judge."""
    arguments = parse_arguments()
    gpu = torch.cuda.is_available()
    if not gpu and not arguments.rehearse:
        sys.exit(
            "torch sees no GPU here, and there is nothing to measure without one. "
            "`--rehearse` runs every part at a tiny size in Triton's interpreter."
        )
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    report: dict[str, Any] = describe_run(device)
    name = "rehearsal" if arguments.rehearse else report["machine"]["device"].lower().replace(" ", "-")
    path = arguments.output / f"gpu-{name}.json"
    if arguments.parts != list(PARTS) and path.exists():
        report = json.loads(path.read_text()) | report
    commands = REHEARSALS if arguments.rehearse else COMMANDS
    start = time.perf_counter()
    if "checks" in arguments.parts:
        report["checks"] = run_checks(arguments.rehearse, commands)
    for part, command in commands.items():
        if part in arguments.parts or arguments.rehearse:
            report[part] = run_bench(command, arguments.rehearse)
            write_report(report, path)
    report["seconds"] = round(time.perf_counter() - start)
    report["verdict"] = judge(report)
    print_verdict(report["verdict"], arguments.rehearse)
    write_report(report, path)
    if any(line["passed"] is False for line in report["verdict"] if not arguments.rehearse or "target" not in line):
        sys.exit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes in Triton's interpreter, on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result")
    return parser.parse_args()


def start(command: list[str], rehearse: bool) -> subprocess.Popen:
    """A program of this repository, in a process of its own; what it says of errors is shown as it comes."""
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if rehearse else {})
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def run_checks(rehearse: bool, commands: dict[str, list[str]]) -> dict[str, Any]:
    """Every number of streams at once, while the models that are measured later are compiled into the caches."""
    streams = [3] if rehearse else range(2, 9)
    extra = ["--few", "--device", "cpu"] if rehearse else []
    running = {str(n): start([*CHECK, "--streams", str(n), *extra], rehearse) for n in streams}
    with tempfile.TemporaryDirectory() as scratch:
        warming = []
        for part, command in commands.items():
            if part.startswith("model") and not rehearse:
                # its numbers are thrown away: others use the device at the same time
                output = ["--rounds", "1", "--output", str(Path(scratch, part))]
                warming.append(start([*command, *output], rehearse))
        printed = {n: process.communicate()[0] for n, process in running.items()}
        for process in warming:
            process.communicate()
    return {
        n: json.loads(text[text.index("{") :]) if running[n].returncode == 0 else {"failed": running[n].returncode}
        for n, text in printed.items()
    }


def run_bench(command: list[str], rehearse: bool) -> dict[str, Any]:
    """The JSON that a bench writes, its tables printed; how it ended where it failed."""
    print(f"\n--- python {' '.join(command)}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "result.json")
        process = start([*command, "--output", str(output)], rehearse)
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith("written to"):
                print(line, end="", flush=True)
        found = json.loads(output.read_text()) if output.exists() else {}
    return found if process.wait() == 0 else found | {"failed": process.returncode}


# ---- what is held against what --------------------------------------------------------------------------------------


def judge(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Claim -> what was found and whether it holds; None where it was not measured."""
    verdict: list[dict[str, Any]] = []

    def claim(what: str, found: Any, passed: bool | None, target: Any = None) -> None:
        verdict.append({"claim": what, "found": found, "passed": passed} | ({"target": target} if target else {}))

    for n, checked in report.get("checks", {}).items():
        wrong = [name for name, case in checked.get("cases", {"all": {"passed": False}}).items() if not case["passed"]]
        claim(f"every op is right, n = {n}", ", ".join(wrong) or "all", not wrong)
    for part in (part for part in report if part.startswith("model")):
        claim(f"{part}: logits and gradients are the base's", *[report[part].get("check", {}).get("passed", False)] * 2)

    kernels = report.get("kernels", {})
    for key, what in (("same_bits", "the same run twice gives the same bits"), ("graph_same_bits", "a CUDA graph too")):
        claim(what, kernels.get(key), kernels.get(key))
    compiled = kernels.get("compilations_at_other_lengths")
    claim("another sequence length compiles nothing", compiled, None if compiled is None else compiled == 0)
    for row in kernels.get("kernels", []):
        if row["rows"] and row["of_copy_rate"] is not None:
            least = TARGETS["of_copy_rate"]
            what = f"{row['kernel']}, {row['direction']}: part of a copy's rate"
            claim(what, row["of_copy_rate"], row["of_copy_rate"] >= least, f">= {least}")
    for direction, microseconds in kernels.get("site_us", {}).items():
        most = TARGETS[f"{direction}_us"]
        claim(f"{direction} of a site with its norm, us", microseconds, microseconds <= most, f"<= {most}")
    launches = kernels.get("launches_a_site_decoding")
    if launches is not None:
        most = TARGETS["launches"]
        claim("launches a site of a decoded token, after the widening", launches, launches <= most, f"<= {most}")

    for cell in report.get("ops", {}).get("results", []):
        contenders = cell["contenders"]
        ours = contenders.get("mhc_hf triton", {})
        for kind in ("fwd", "fwd+bwd"):
            peers = {name: contenders[name][kind]["median_ms"] for name in PEERS if kind in contenders.get(name, {})}
            if kind in ours and peers:
                best = min(peers, key=lambda name: peers[name])
                ratio = peers[best] / ours[kind]["median_ms"]
                what = f"T = {cell['T']}, C = {cell['C']}, {kind}: times as fast as {best}, the best peer"
                claim(what, ratio, ratio > 1, "> 1")

    for part in ("model-1b", "model-8b", "model-tiny"):
        found = report.get(part, {})
        layer, most = found.get("layer", {}).get("widened"), TARGETS["layer"]
        if layer:
            ratio = layer["of_base"]["median"]
            # the figure is aimed at for 8B; others are told
            claim(f"{part}: a layer, times the base's", ratio, ratio <= most if "8b" in part else None, f"<= {most}")
        decoded, least = found.get("decode", {}).get("1", {}).get("widened"), TARGETS["decoding"]
        if decoded:
            ratio = decoded["of_base"]["median"]
            claim(f"{part}: decoding speed, times the base's", ratio, ratio >= least, f">= {least}")
    for part, found in report.items():
        if isinstance(found, dict) and "failed" in found:
            claim(f"{part} ran to its end", found["failed"], False)
    return verdict


def print_verdict(verdict: list[dict[str, Any]], rehearse: bool) -> None:
    """A line a claim. In a rehearsal nothing that has a target counts."""
    words = {True: "passed", False: "FAILED", None: "told"}
    print()
    for line in verdict:
        word = "told" if rehearse and "target" in line else words[line["passed"]]
        found = f"{line['found']:.3f}" if isinstance(line["found"], float) else str(line["found"])
        print(f"{word:8}{line['claim']}: {found} {line.get('target', '')}".rstrip())


if __name__ == "__main__":
    main()
