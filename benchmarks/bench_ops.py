"""One site, forward and forward + backward: ours on each backend beside what a user would otherwise run.

    python benchmarks/bench_ops.py [--tokens 1024 ...] [--channels 512 ...] [--streams 4] [--dtype float32 bfloat16]

In one process: correctness first, against float64, and no number for what is wrong; then every contender in turn, round
after round, so that whatever else the machine does falls on all alike. Medians and quartiles; on a GPU also
bytes a second as a fraction of a copy measured in the same run. Prints a table and writes JSON to benchmarks/results/.
Contenders are transformers' DeepseekV4HyperConnection with its layer's mix (GLM-5.3's module is the same code), that
compiled, Liger's ops, and ours by backend, eager and compiled; who cannot run here is listed with the reason.
Shapes: T tokens, n streams, C channels.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from liger import explain_no_liger, make_liger_site
from timing import (
    RESULTS,
    describe_run,
    format_spread,
    measure_copy_rate,
    summarize_ms,
    time_in_turns,
    write_report,
)
from torch import Tensor
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from mhc_hf import ops
from mhc_hf.ops import reference
from mhc_hf.ops.backends import BACKENDS, explain_no_backend

# rows of C elements a token that a site's kernels move: docs/kernels.md; others' rows are not known, only their time
OUR_ROWS = {"fwd": lambda n: 4 * n + 2, "fwd+bwd": lambda n: 10 * n + 6}
# tokens whose truth is computed at once: float64 streams of a whole large cell would not fit some GPUs
_CHECKED_TOKENS = 2048


def main(argv: list[str] | None = None) -> None:
    """Measure every shape that was asked for, print and write."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    report = describe_run(device) | {"results": []}
    for dtype in (getattr(torch, name) for name in arguments.dtype):
        for num_channels in arguments.channels:
            for num_tokens in arguments.tokens:
                shape = {"T": num_tokens, "n": arguments.streams, "C": num_channels, "dtype": str(dtype)}
                rows = measure_shape(
                    num_tokens, arguments.streams, num_channels, dtype, device, arguments.rounds, arguments.eager
                )
                print_table(shape, rows)
                report["results"].append(shape | {"contenders": rows})
    write_report(report, arguments.output or RESULTS / f"ops-{device.type}.json")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384] if gpu else [1024])
    parser.add_argument("--channels", type=int, nargs="+", default=[1280, 2560, 4096, 7168] if gpu else [512])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"] if gpu else ["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--eager", action="store_true", help="leave out all that torch.compile makes")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def measure_shape(num_tokens, n, num_channels, dtype, device, num_rounds, eager) -> dict[str, dict]:
    """Contender -> correctness and times, or why it has none."""
    torch.manual_seed(0)
    x = torch.randn(1, num_tokens, n, num_channels, device=device).to(dtype).requires_grad_()
    gradient = torch.randn_like(x)
    rows: dict[str, dict] = {}
    steps: dict[tuple[str, str], Callable[[], object]] = {}
    for name, (run, direction, tolerance) in make_contenders(n, num_channels, x).items():
        if eager and name.endswith("compiled"):
            continue
        try:
            error = check(run, direction, x, gradient)
        except Exception as raised:
            if name.startswith("mhc_hf"):
                raise
            # another's failure is its row in the table, not the end of the run
            rows[name] = {"unable": f"{type(raised).__name__}: {raised}".splitlines()[0]}
            continue
        rows[name] = {"error": error}
        if not error <= tolerance:
            rows[name]["refused"] = f"error {error:.1e} is above {tolerance:.1e}"
            continue
        steps[name, "fwd"] = lambda run=run: run_forward(run, x)
        steps[name, "fwd+bwd"] = lambda run=run: run_both(run, x, gradient)
    absent = {"liger": explain_no_liger(x, n)}
    absent |= {f"mhc_hf {backend}": explain_no_backend(backend, x, n) for backend in BACKENDS[1:]}
    rows |= {name: {"unable": reason} for name, reason in absent.items() if reason}
    times = time_in_turns(steps, device, num_rounds)
    copy_rate = measure_copy_rate(x.nbytes, device) if device.type == "cuda" else None
    for (name, kind), seconds in times.items():
        rows[name][kind] = summarize_ms(seconds)
        if copy_rate and name.startswith("mhc_hf"):
            moved = OUR_ROWS[kind](n) * num_tokens * num_channels * x.element_size()
            rows[name][kind]["of_copy_rate"] = moved / (rows[name][kind]["median_ms"] / 1e3) / copy_rate
    return rows


def make_contenders(n, num_channels, x) -> dict[str, tuple[Callable[[Tensor], Tensor], str, float]]:
    """Name -> (site with an identity branch, whose H_res it applies, largest error it may have).

    All share parameters. V4's form adds 1e-6 to its divisors and transposes, and Liger's does not transpose: the truth
    of each is its own formula in float64.
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
        pre, post, comb = compute_v4_maps(v4, x)
        branch_in = torch.einsum("...n,...nc->...c", pre, x)
        mixed = torch.einsum("...ij,...ic->...jc", comb, x)
        return torch.einsum("...n,...c->...nc", post, branch_in) + mixed

    def run_liger_double(x):
        return reference.mhc_post_res(x, reference.mhc_pre(x, (maps := compute_v4_maps(v4, x))[0]), *maps[1:])

    # float32 is held to its own rounding, half precision to a few units in the last place
    tolerance = 1e-5 if x.dtype == torch.float32 else 4 * torch.finfo(x.dtype).eps
    contenders = {
        "transformers": (run_v4, run_v4_double, tolerance),
        "transformers compiled": (torch.compile(run_v4, dynamic=False), run_v4_double, tolerance),
    }
    if explain_no_liger(x, n) is None:
        contenders["liger"] = (make_liger_site(site_parameters, x, v4.hc_eps), run_liger_double, tolerance)
    for backend in BACKENDS[1:]:
        if explain_no_backend(backend, x, n) is None:
            run = make_ours(backend)
            contenders[f"mhc_hf {backend}"] = (run, run_reference, tolerance)
            contenders[f"mhc_hf {backend} compiled"] = (torch.compile(run, dynamic=False), run_reference, tolerance)
    return contenders


def compute_v4_maps(v4: DeepseekV4HyperConnection, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """pre, post and comb of DeepSeek-V4's form, in float64 (docs/math.md); V4 applies comb transposed."""
    n, eps = v4.hc_mult, v4.hc_eps
    gates = torch.cat([gate.expand(size) for gate, size in zip(v4.scale, (n, n, n * n), strict=True)])
    projected = reference.rms_normalize(x.flatten(-2), v4.input_norm.eps) @ v4.fn.double().T
    pre, post, comb = (projected * gates + v4.base).split([n, n, n * n], -1)
    comb = comb.unflatten(-1, (n, n)).softmax(-1) + eps
    for dim in (-2, *(-1, -2) * (v4.hc_sinkhorn_iters - 1)):
        comb = comb / (comb.sum(dim, keepdim=True) + eps)
    return pre.sigmoid() + eps, 2 * post.sigmoid(), comb


def check(run, run_truth, x, gradient) -> float:
    """The larger relative error of output and dx against the truth in float64, made for a block of tokens at a time."""
    got = run(x)
    (got_dx,) = torch.autograd.grad(got, x, gradient)
    squares = torch.zeros(2, 2, dtype=torch.float64, device=x.device)  # output and dx: of the difference, of the truth
    for block in torch.arange(x.shape[1], device=x.device).split(_CHECKED_TOKENS):
        wide = x[:, block].detach().double().requires_grad_()
        want = run_truth(wide)
        (want_dx,) = torch.autograd.grad(want, wide, gradient[:, block].double())
        for row, (g, w) in zip(squares, ((got, want), (got_dx, want_dx)), strict=True):
            row += torch.stack([(g[:, block] - w).square().sum(), w.square().sum()]).detach()
    errors = (squares[:, 0] / squares[:, 1]).sqrt()
    # a NaN is the largest error there is
    return errors.nan_to_num(nan=float("inf")).max().item()


def run_forward(run, x) -> Tensor:
    with torch.no_grad():
        return run(x)


def run_both(run, x, gradient) -> None:
    x.grad = None
    run(x).backward(gradient)


def print_table(shape, rows) -> None:
    """Medians with quartiles in milliseconds, and how many times as fast as transformers' eager."""
    print("\n" + ", ".join(f"{key} = {value}" for key, value in shape.items()))
    print(f"{'':26}{'error':>9}{'fwd ms':>22}{'fwd+bwd ms':>24}{'speed-up':>10}")
    for name, row in rows.items():
        if reason := row.get("unable") or row.get("refused"):
            print(f"{name:26}not measured: {reason}")
            continue
        cells = [format_spread(**row[kind]) for kind in ("fwd", "fwd+bwd")]
        baseline = rows["transformers"].get("fwd+bwd", {}).get("median_ms")
        ratio = f"{baseline / row['fwd+bwd']['median_ms']:9.1f}x" if baseline else ""
        print(f"{name:26}{row['error']:9.1e}{cells[0]:>22}{cells[1]:>24}{ratio:>10}")


if __name__ == "__main__":
    main()
