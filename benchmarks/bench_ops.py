"""One site, forward and forward + backward: ours on each backend beside what a user would otherwise run.

    python benchmarks/bench_ops.py [--tokens 1024 ...] [--channels 512 ...] [--streams 4] [--dtype float32 bfloat16]

In one process: correctness first, against float64, and no number for what is wrong; then every contender in turn, round
after round, so that whatever else the machine does falls on all alike. Medians and quartiles; on a GPU also
bytes a second as a fraction of a copy measured in the same run. Prints a table and writes JSON to benchmarks/results/.
Contenders are transformers' DeepseekV4HyperConnection with its layer's mix, that compiled, and ours by backend, eager
and compiled. Shapes: T tokens, n streams, C channels.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from mhc_hf import ops
from mhc_hf.ops import reference
from mhc_hf.ops.backends import BACKENDS, explain_no_backend

RESULTS = Path(__file__).parent / "results"
# rows of C elements a token that a site's kernels move: docs/kernels.md; others' rows are not known, only their time
OUR_ROWS = {"fwd": lambda n: 4 * n + 2, "fwd+bwd": lambda n: 10 * n + 6}


def main() -> None:
    """Measure every shape that was asked for, print and write."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    report = {"machine": describe_machine(device), "command": " ".join(["python", *sys.argv]), "results": []}
    for dtype in (getattr(torch, name) for name in arguments.dtype):
        for num_channels in arguments.channels:
            for num_tokens in arguments.tokens:
                shape = {"T": num_tokens, "n": arguments.streams, "C": num_channels, "dtype": str(dtype)}
                rows = measure_shape(num_tokens, arguments.streams, num_channels, dtype, device, arguments.rounds)
                print_table(shape, rows)
                report["results"].append(shape | {"contenders": rows})
    path = arguments.output or RESULTS / f"ops-{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {path}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384] if gpu else [1024])
    parser.add_argument("--channels", type=int, nargs="+", default=[1280, 2560, 4096, 7168] if gpu else [512])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"] if gpu else ["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def measure_shape(num_tokens, n, num_channels, dtype, device, num_rounds) -> dict[str, dict]:
    """Contender -> correctness and times, or why it has none."""
    torch.manual_seed(0)
    x = torch.randn(1, num_tokens, n, num_channels, device=device).to(dtype).requires_grad_()
    gradient = torch.randn_like(x)
    contenders, rows = make_contenders(n, num_channels, x), {}
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (run, direction, tolerance) in contenders.items():
        error = check(run, direction, x, gradient)
        rows[name] = {"error": error}
        if not error <= tolerance:
            rows[name]["refused"] = f"error {error:.1e} is above {tolerance:.1e}"
            continue
        steps[name, "fwd"] = lambda run=run: run_forward(run, x)
        steps[name, "fwd+bwd"] = lambda run=run: run_both(run, x, gradient)
    times = time_in_turns(steps, device, num_rounds)
    copy_rate = measure_copy(x, num_rounds) if device.type == "cuda" else None
    for (name, kind), seconds in times.items():
        quartiles = statistics.quantiles(seconds, n=4)
        rows[name][kind] = {"median_ms": 1e3 * quartiles[1], "quartiles_ms": [1e3 * quartiles[0], 1e3 * quartiles[2]]}
        if copy_rate and name.startswith("mhc_hf"):
            moved = OUR_ROWS[kind](n) * num_tokens * num_channels * x.element_size()
            rows[name][kind]["of_copy_rate"] = moved / quartiles[1] / copy_rate
    return rows


def make_contenders(n, num_channels, x) -> dict[str, tuple[Callable[[Tensor], Tensor], str, float]]:
    """Name -> (site with an identity branch, whose H_res it applies, largest error it may have).

    All share parameters. V4's form adds 1e-6 to its divisors and transposes: its truth is its own formula in float64.
    """
    config = SimpleNamespace(hc_mult=n, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, hidden_size=num_channels)
    v4 = DeepseekV4HyperConnection(config).to(x.device)
    with torch.no_grad():
        v4.fn.normal_(std=0.02)
        v4.base.normal_()
        v4.scale.fill_(1.0)
    site_parameters = (v4.fn, v4.base, v4.scale)

    def run_v4(x):
        post, comb, collapsed = v4(x)
        dtype = x.dtype
        mixed = torch.matmul(comb.to(dtype).transpose(-1, -2), x)
        return post.to(dtype).unsqueeze(-1) * collapsed.unsqueeze(-2) + mixed

    def make_ours(backend):
        def run(x):
            site = ops.site_read(x, *site_parameters, backend=backend)
            return ops.site_write(x, site.branch_in, site, backend=backend)

        return run

    def run_reference(x):
        branch_in, h_post, h_res = reference.mhc_pre_branch(x, *(p.double() for p in site_parameters))
        return reference.mhc_post_res(x, branch_in, h_post, h_res)

    def run_v4_double(x):
        return apply_v4_formula(v4, x)

    # float32 is held to its own rounding, half precision to a few units in the last place
    tolerance = 1e-5 if x.dtype == torch.float32 else 4 * torch.finfo(x.dtype).eps
    contenders = {
        "transformers": (run_v4, run_v4_double, tolerance),
        "transformers compiled": (torch.compile(run_v4, dynamic=False), run_v4_double, tolerance),
    }
    for backend in BACKENDS[1:]:
        if explain_no_backend(backend, x, n) is None:
            run = make_ours(backend)
            contenders[f"mhc_hf {backend}"] = (run, run_reference, tolerance)
            contenders[f"mhc_hf {backend} compiled"] = (torch.compile(run, dynamic=False), run_reference, tolerance)
    return contenders


def apply_v4_formula(v4: DeepseekV4HyperConnection, x: Tensor) -> Tensor:
    """DeepSeek-V4's form of a site with an identity branch, in float64 (docs/math.md)."""
    n, eps = v4.hc_mult, v4.hc_eps
    gates = torch.cat([gate.expand(size) for gate, size in zip(v4.scale, (n, n, n * n), strict=True)])
    projected = reference.rms_normalize(x.flatten(-2), v4.input_norm.eps) @ v4.fn.double().T
    pre, post, comb = (projected * gates + v4.base).split([n, n, n * n], -1)
    comb = comb.unflatten(-1, (n, n)).softmax(-1) + eps
    for dim in (-2, *(-1, -2) * (v4.hc_sinkhorn_iters - 1)):
        comb = comb / (comb.sum(dim, keepdim=True) + eps)
    branch_in = torch.einsum("...n,...nc->...c", pre.sigmoid() + eps, x)
    return torch.einsum("...n,...c->...nc", 2 * post.sigmoid(), branch_in) + torch.einsum("...ij,...ic->...jc", comb, x)


def check(run, run_truth, x, gradient) -> float:
    """The larger relative error of output and dx against the truth in float64."""
    wide = x.detach().double().requires_grad_()
    want = run_truth(wide)
    (want_dx,) = torch.autograd.grad(want, wide, gradient.double())
    got = run(x)
    (got_dx,) = torch.autograd.grad(got, x, gradient)
    pairs = ((got, want), (got_dx, want_dx))
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in pairs)


def run_forward(run, x) -> Tensor:
    with torch.no_grad():
        return run(x)


def run_both(run, x, gradient) -> None:
    x.grad = None
    run(x).backward(gradient)


def time_in_turns(steps, device, num_rounds) -> dict:
    """Seconds of every step in every round; all steps take turns, after two rounds that are not counted."""
    times: dict = {name: [] for name in steps}
    for round_index in range(num_rounds + 2):
        for name, step in steps.items():
            seconds = time_once(step, device)
            if round_index >= 2:
                times[name].append(seconds)
    return times


def time_once(step, device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def measure_copy(x, num_rounds) -> float:
    """Bytes a second of a device-to-device copy of the streams, read and written both counted."""
    target = torch.empty_like(x)
    seconds = [time_once(lambda: target.copy_(x.detach()), x.device) for _ in range(num_rounds)]
    return 2 * x.nbytes / statistics.median(seconds)


def describe_machine(device) -> dict[str, str]:
    """Device and versions, for the JSON."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"device": name, "threads": str(torch.get_num_threads()), "python": platform.python_version(), **versions}


def print_table(shape, rows) -> None:
    """Medians with quartiles in milliseconds, and the ratio to transformers' eager."""
    print("\n" + ", ".join(f"{key} = {value}" for key, value in shape.items()))
    print(f"{'':26}{'error':>9}{'fwd ms':>22}{'fwd+bwd ms':>24}{'speed-up':>10}")
    for name, row in rows.items():
        if "refused" in row:
            print(f"{name:26}{row['error']:9.1e}  refused: {row['refused']}")
            continue
        cells = []
        for kind in ("fwd", "fwd+bwd"):
            low, high = row[kind]["quartiles_ms"]
            cells.append(f"{row[kind]['median_ms']:8.2f} [{low:.2f}, {high:.2f}]")
        baseline = rows["transformers"].get("fwd+bwd", {}).get("median_ms")
        ratio = f"{baseline / row['fwd+bwd']['median_ms']:9.1f}x" if baseline else ""
        print(f"{name:26}{row['error']:9.1e}{cells[0]:>22}{cells[1]:>24}{ratio:>10}")


if __name__ == "__main__":
    main()
