"""Every kernel on a real device against float64, in a process of its own: prints one JSON object of claims and figures.

    python -m tests.ops.on_device --streams 4

The ops, formulas and poisoned memory are those of `interpreted`; what is new are fresh random inputs, sizes that only a
device can do, and token counts whose offsets pass 2^31. A float32 result may be 2e-6 a site off, one in half precision
twice as far as the plain formula in the same dtype, pooled over several inputs.
Shapes: T tokens, n streams, C channels.
"""

import argparse
import collections
import json
import math
import os
import random
import sys

# cuBLAS is deterministic with a workspace of its own only; read when the device is first used
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from .interpreted import (
    PUBLIC,
    compare,
    compare_alone,
    make_normed_site,
    on_triton,
    pass_layer,
    pass_layer_plainly,
    run_extremes,
)
from .sites import relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ODD_SIZES = ((63, 60), (257, 576), (5, 2880), (130, 4096))
BOUND = 2e-6
# inputs that errors are pooled over: that of three numbers, alpha's gradient, is one throw of the dice on each
_INPUTS = 3


def draw_site(n, num_channels, num_tokens, dtype, device):
    """A site of fresh random numbers."""
    site = make_normed_site(n, num_channels, lead=(num_tokens,), dtype=dtype, seed=random.getrandbits(32))
    return {name: tensor.to(device) for name, tensor in site.items()}


def pool(compare_once, num_inputs):
    """{name: [our error, the plain formula's]}, root mean squares over a few inputs."""
    pooled = collections.defaultdict(lambda: ([], []))
    for _ in range(num_inputs):
        for name, pair in compare_once().items():
            for errors, error in zip(pooled[name], pair, strict=True):
                errors.append(error)
    return {name: [math.hypot(*both) / math.sqrt(num_inputs) for both in pair] for name, pair in pooled.items()}


def judge(errors, dtype, num_sites=1):
    """The errors, and whether every one is within the rule."""
    bound = BOUND * num_sites
    within = [ours <= (bound if dtype == torch.float32 else max(bound, 2 * plain)) for ours, plain in errors.values()]
    return {"errors": errors, "passed": all(within)}


def check_far_tokens(device, num_channels=4096, n=4, num_last=64):
    """Streams of more than 2^31 numbers: the last tokens, forward and backward, against the reference of them alone."""
    num_tokens = 2**31 // (n * num_channels) + 2 * num_last
    site = draw_site(n, num_channels, num_last, torch.bfloat16, device)
    full = dict(site)
    for name in ("x", "branch_out"):
        # the same few tokens over and over
        times = -(-num_tokens // num_last)
        full[name] = site[name].repeat(times, *[1] * (site[name].dim() - 1))
    cotangent = torch.randn_like(site["x"])

    def differentiate(function, inputs, gradient):
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
        out = function(**leaves)
        return out.detach()[-num_last:], *(
            gradient[-num_last:] for gradient in torch.autograd.grad(out, (leaves["x"], leaves["branch_out"]), gradient)
        )

    got = differentiate(pass_layer, full, cotangent.repeat(len(full["x"]) // num_last, 1, 1))
    wide = {name: tensor.double() for name, tensor in site.items()}
    want = differentiate(pass_layer_plainly, wide, cotangent.double())
    plain = differentiate(pass_layer_plainly, site, cotangent)
    names = ("out0", "d_x", "d_branch_out")
    return {
        name: [relative_error(g, w), relative_error(p, w)]
        for name, g, p, w in zip(names, got, plain, want, strict=True)
    }


def check_direction(n, device):
    """Whether H_res[n - 1, 0] carries the first stream into the last."""
    x, zeros = torch.randn(3, n, 32, device=device), torch.zeros(3, n, n, device=device)
    h_res = zeros.clone()
    h_res[:, -1, 0] = 1
    out = on_triton.mhc_post_res(x, torch.zeros_like(x[:, 0]), zeros[..., 0].contiguous(), h_res)
    return torch.equal(out[:, -1], x[:, 0]) and not out[:, :-1].any().item()


def main() -> None:
    """Check one number of streams; all figures as JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, help="of the inputs (default: a fresh one, which is printed)")
    parser.add_argument("--few", action="store_true", help="one small case, for the interpreter")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().getrandbits(32)
    random.seed(seed)
    n, device = arguments.streams, torch.device(arguments.device)
    num_inputs, cases = 1 if arguments.few else _INPUTS, {}
    for dtype in DTYPES[:1] if arguments.few else DTYPES:
        sizes = ((7, 20),) if arguments.few else ODD_SIZES if n in (3, 4) else ODD_SIZES[:1]
        for num_tokens, num_channels in sizes:
            site = (n, num_channels, num_tokens, dtype, device)
            errors = pool(lambda site=site: compare(pass_layer, pass_layer_plainly, draw_site(*site)), num_inputs)
            cases[f"layer n={n} C={num_channels} T={num_tokens} {dtype}"] = judge(errors, dtype, num_sites=2)
        for name in () if arguments.few else PUBLIC:
            site = (n, 60, 63, dtype, device)
            errors = pool(lambda site=site, name=name: compare_alone(name, draw_site(*site)), num_inputs)
            cases[f"{name} n={n} C=60 T=63 {dtype}"] = judge(errors, dtype)
    if n == 4 and not arguments.few:
        cases["more than 2^31 numbers"] = judge(check_far_tokens(device), torch.bfloat16, num_sites=2)
    extremes = run_extremes(device)
    cases["extreme logits"] = extremes | {"passed": extremes["finite"] and extremes["error"] < 1e-6}
    cases["direction of H_res"] = {"passed": check_direction(n, device)}
    json.dump({"seed": seed, "streams": n, "cases": cases}, sys.stdout)


if __name__ == "__main__":
    main()
