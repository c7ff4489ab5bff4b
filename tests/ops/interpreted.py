"""Every kernel under Triton's interpreter, in a process of its own: prints one JSON object of claims and their figures.

Run with TRITON_INTERPRET=1 by `test_interpreted.py`. Fresh memory is filled with NaN, so an element that a kernel
forgets shows. Shapes: n streams, C channels.
"""

import functools
import json
import sys

import torch

from mhc_hf.ops import reference, registered
from mhc_hf.ops.triton import config, record

from .sites import bind_ops, differentiate, make_site, relative_error, widen

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.set_num_threads(1)

PUBLIC = ("sinkhorn_knopp", "mhc_coefficients", "mhc_pre", "mhc_post_res", "mhc_pre_branch")
on_triton = bind_ops("triton")


def pass_layer(x, phi, bias, alpha, branch_out, num_iters=20):
    """Two sites by all fused kernels."""
    site = on_triton.site_read(x, phi, bias, alpha, num_iters=num_iters)
    branch = torch.tanh(site.branch_in) * branch_out
    middle, site = on_triton.site_write_read(x, branch, site, phi.flip(0), bias.flip(0), alpha, num_iters=num_iters)
    return on_triton.site_write(middle, torch.tanh(site.branch_in) * branch_out, site)


def pass_layer_plainly(x, phi, bias, alpha, branch_out, num_iters=20):
    """The same by the reference."""
    for weights in ((phi, bias), (phi.flip(0), bias.flip(0))):
        branch_in, h_post, h_res = reference.mhc_pre_branch(x, *weights, alpha, num_iters=num_iters)
        x = reference.mhc_post_res(x, torch.tanh(branch_in) * branch_out, h_post, h_res)
    return x


def compare(function, plain, site):
    """{name: [our error, the plain formula's error in the same dtype]} for values and gradients."""
    want, got, in_kind = differentiate(plain, widen(site)), differentiate(function, site), differentiate(plain, site)
    return {name: [relative_error(got[name], want[name]), relative_error(in_kind[name], want[name])] for name in want}


def compare_alone(name, site):
    """One public op by itself."""
    h_pre, h_post, h_res = reference.mhc_coefficients(site["x"].float(), site["phi"], site["bias"], site["alpha"])
    x = {"x": site["x"]}
    arguments = {
        "sinkhorn_knopp": {"logits": 2 * h_res.log().float() + h_pre[..., None]},
        "mhc_coefficients": x | {key: site[key] for key in ("phi", "bias", "alpha")},
        "mhc_pre_branch": x | {key: site[key] for key in ("phi", "bias", "alpha")},
        "mhc_pre": x | {"h_pre": h_pre},
        "mhc_post_res": x | {"branch_out": site["branch_out"], "h_post": h_post, "h_res": h_res},
    }
    return compare(getattr(on_triton, name), getattr(reference, name), arguments[name])


def run_extremes(device="cpu"):
    """Logits of +-1e4, one dominating, an empty row: distance from float64, and whether gradients are finite."""
    n = 4
    logits = torch.zeros(4, n, n)
    logits[0] = 1e4 * torch.sign(torch.randn(n, n, generator=torch.Generator().manual_seed(7)))
    logits[1, 0, 1] = 1e4
    logits[2, 0], logits[3, :, 0] = -1e4, -1e4
    logits = logits.to(device).requires_grad_()
    got = on_triton.sinkhorn_knopp(logits)
    got.square().sum().backward()
    error = (got.detach().double() - reference.sinkhorn_knopp(logits.detach().double())).abs().max().item()
    return {"error": error, "finite": bool(torch.isfinite(logits.grad).all())}


def main() -> None:
    """All figures as JSON on standard output."""
    result = {}
    # the interpreter's time is Sinkhorn's: the full 20 iterations where logarithms are few (4) and many (8)
    cases = [(n, 60, (2, 19), torch.float32, 20 if n in (4, 8) else 4) for n in range(2, 9)]
    cases += [(4, 60, (2, 19), dtype, 4) for dtype in (torch.bfloat16, torch.float16)]
    cases += [(3, 576, (70,), torch.bfloat16, 4)]
    for n, num_channels, lead, dtype, num_iters in cases:
        site = make_site(n, num_channels, lead=lead, dtype=dtype)
        ours, plain = (functools.partial(f, num_iters=num_iters) for f in (pass_layer, pass_layer_plainly))
        result[f"layer n={n} C={num_channels} {dtype}"] = compare(ours, plain, site)
    for name in PUBLIC:
        result[f"{name} n=3"] = compare_alone(name, make_site(3, 33, lead=(2, 5)))
    result["extremes"] = run_extremes()

    site = make_site(4, 48, lead=(67,), dtype=torch.bfloat16)
    few = functools.partial(pass_layer, num_iters=3)
    first, second = differentiate(few, site), differentiate(few, site)
    result["same bits"] = all(torch.equal(first[name], second[name]) for name in first)
    empty = differentiate(pass_layer, make_site(4, 16, lead=(2, 0)))
    result["zero tokens"] = [list(empty["out0"].shape), empty["d_phi"].abs().max().item()]
    x, phi, bias, alpha, _ = (t.requires_grad_() for t in make_site(2, 16, lead=(5,)).values())
    result["opcheck"] = torch.library.opcheck(registered.read, (x, phi, bias, alpha, 3, 1e-6, "triton"))
    with record.record_launches() as launches:
        differentiate(few, make_site(2, 16, lead=(3,)))
    result["kernels run"] = sorted({one.kernel for one in launches})
    result["target"] = config.get_target()
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
