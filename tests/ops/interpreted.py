"""Every kernel under Triton's interpreter, in a process of its own: prints one JSON object of claims and their figures.

Run with TRITON_INTERPRET=1 by `test_interpreted.py`. Fresh memory is filled with NaN, so an element that a kernel
forgets shows. Shapes: n streams, C channels.
"""

import functools
import json
import sys

import torch

from mhc_hf.modeling.layer import collapse_streams
from mhc_hf.ops import ahead, functional, normed, reference, registered
from mhc_hf.ops.functional import BranchNorm
from mhc_hf.ops.triton import config, passes, record

from . import independent
from .sites import bind_ops, differentiate, make_site, relative_error, widen

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
torch.set_num_threads(1)

PUBLIC = ("sinkhorn_knopp", "mhc_coefficients", "mhc_pre", "mhc_post_res", "mhc_pre_branch")
on_triton = bind_ops("triton")


def pass_layer(x, phi, bias, alpha, branch_out, gain, num_iters=20, normed_site=0):
    """Two sites by all fused kernels; the branch of one of them begins with an RMSNorm."""
    first, second = ({"branch_norm": BranchNorm(gain, 1e-6)} if normed_site == index else {} for index in range(2))
    site = on_triton.site_read(x, phi, bias, alpha, num_iters=num_iters, **first)
    parameters = phi.flip(0), bias.flip(0), alpha
    branch = torch.tanh(site.branch_in) * branch_out
    middle, site = on_triton.site_write_read(x, branch, site, *parameters, num_iters=num_iters, **second)
    return on_triton.site_write(middle, torch.tanh(site.branch_in) * branch_out, site)


def pass_two_layers(x, phi, bias, alpha, branch_out, gain, num_iters=20, normed_site=0):
    """The same with a site a layer: the first one's write projects for the second, whose streams come by themselves."""
    first, second = ({"branch_norm": BranchNorm(gain, 1e-6)} if normed_site == index else {} for index in range(2))
    site = on_triton.site_read(x, phi, bias, alpha, num_iters=num_iters, **first)
    middle, projections = functional.site_write_project(x, torch.tanh(site.branch_in) * branch_out, site, phi.flip(0))
    parameters = projections._replace(phi=phi.flip(0)), bias.flip(0), alpha
    site = functional.site_read_projected(middle, *parameters, num_iters=num_iters, **second)
    return on_triton.site_write(middle, torch.tanh(site.branch_in) * branch_out, site)


def pass_layer_plainly(x, phi, bias, alpha, branch_out, gain, num_iters=20, normed_site=0):
    """The same by the reference, in any dtype; in float64 by a formula of its own."""
    for index, parameters in enumerate(((phi, bias, alpha), (phi.flip(0), bias.flip(0), alpha))):
        weight = gain if index == normed_site else None
        if x.dtype == torch.float64:

            def branch(u):
                return torch.tanh(u) * branch_out

            x = independent.pass_site(x, *parameters, branch, num_iters=num_iters, gain=weight)
            continue
        u, h_post, h_res = reference.mhc_pre_branch(x, *parameters, num_iters=num_iters)
        u = u if weight is None else reference.weighted_rms_norm(u, weight)
        x = reference.mhc_post_res(x, torch.tanh(u) * branch_out, h_post, h_res)
    return x


def make_normed_site(n, num_channels, **keywords):
    """`make_site`, and the weight of a norm."""
    site = make_site(n, num_channels, **keywords)
    gain = 1 + 0.3 * torch.randn(num_channels, generator=torch.Generator().manual_seed(3))
    return site | {"gain": gain.to(site["x"].dtype)}


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


def make_extreme_sites():
    """{name: site} of which every value and gradient must be finite, and values right."""
    sites = {name: make_normed_site(3, 16, lead=(5,)) for name in ("logits of 1e4", "one dominates", "all equal")}
    for site in sites.values():
        # the logits are the biases then, to the bit
        site["alpha"] = torch.zeros(3)
    sites["logits of 1e4"]["bias"] = 1e4 * torch.sign(sites["logits of 1e4"]["bias"])
    sites["one dominates"]["bias"] = torch.zeros(15)
    sites["one dominates"]["bias"][7] = 1e4
    sites["all equal"]["bias"] = torch.zeros(15)
    sites["denormal streams"] = make_normed_site(3, 16, lead=(5,))
    for name in ("x", "branch_out"):
        sites["denormal streams"][name] *= 1e-40
    # a sum of squares of 1.6e12: fp16 ends at 6.6e4
    sites["fp16 streams of 1e4"] = make_normed_site(4, 4096, lead=(2,), dtype=torch.float16)
    sites["fp16 streams of 1e4"]["x"] = torch.full((2, 4, 4096), 1e4, dtype=torch.float16)
    return sites


def pass_by_reference(**site):
    """`pass_layer_plainly` by logarithms in float64 too: the formula's exp ends at 700."""
    x, phi, bias, alpha, branch_out, gain = site.values()
    for index, parameters in enumerate(((phi, bias, alpha), (phi.flip(0), bias.flip(0), alpha))):
        u, h_post, h_res = reference.mhc_pre_branch(x, *parameters, num_iters=3)
        u = u if index else reference.weighted_rms_norm(u, gain)
        x = reference.mhc_post_res(x, torch.tanh(u) * branch_out, h_post, h_res)
    return x


def oppose(site, size):
    """Streams that cancel in what the branch reads, all but `size` of them."""
    x, n = site["x"], site["x"].shape[-2]
    noise = torch.randn(x[..., 0, :].shape, generator=torch.Generator().manual_seed(4))
    x[..., 1, :] = -x[..., 0, :] * (1 + size * noise)
    x[..., 2:, :] *= size
    site["bias"][:n] = 0.0
    site["phi"] *= 0.01
    return site


def tell_direction():
    """Distance of a write from H_res x, and from its transpose, DeepSeek-V4's `comb` taken for H_res."""
    x = make_site(4, 32)["x"]
    h_res = reference.sinkhorn_knopp(torch.randn(2, 7, 4, 4, generator=torch.Generator().manual_seed(5)), 20)
    got = on_triton.mhc_post_res(x, torch.zeros(2, 7, 32), torch.zeros(2, 7, 4), h_res)
    return [relative_error(got, (matrix @ x).double()) for matrix in (h_res, h_res.mT)]


@torch.no_grad()
def widen_and_compare(n, num_channels, dtype):
    """Widening with the first site's projections: whether it copies, and the errors of a read, and of a plain one."""
    site = make_normed_site(n, num_channels, lead=(2, 19), dtype=dtype)
    hidden, parameters = site["x"][..., 0, :], [site[name] for name in ("phi", "bias", "alpha")]
    x, projections = functional.widen_project(hidden, n, parameters[0])
    norm = BranchNorm(site["gain"], 1e-6)
    errors = []
    for keywords in ({}, {"branch_norm": norm}):
        got = functional.site_read_projected(x, projections, *parameters[1:], num_iters=4, **keywords)
        want, *maps = reference.mhc_pre_branch(x.double(), *(p.double() for p in parameters), num_iters=4)
        plain = on_triton.site_read(x, *parameters, num_iters=4, **keywords)
        if keywords:
            want = reference.weighted_rms_norm(want, norm.weight.double())
        pairs = zip(plain[:3], got[:3], (want, *(h.flatten(0, 1).movedim(0, -1) for h in maps)), strict=True)
        errors += [[relative_error(ours, exact), relative_error(other, exact)] for other, ours, exact in pairs]
    return [torch.equal(x, hidden.unsqueeze(-2).expand_as(x)), errors]


@torch.no_grad()
def collapse_and_compare(n, num_channels, dtype):
    """A write of the mean alone: its distance from write and mean in turn in units, and whether copies stay copies."""
    site = make_site(n, num_channels, lead=(2, 19), dtype=dtype)
    x, parameters = site["x"], [site[name] for name in ("phi", "bias", "alpha")]
    read = on_triton.site_read(x, *parameters, num_iters=4)
    want = collapse_streams(on_triton.site_write(x, site["branch_out"], read).flatten(-2), n)
    got = functional.site_write_collapse(x, site["branch_out"], read)
    unit = (got.double() - want.double()).abs() / want.double().abs().clamp_min(1e-3) / torch.finfo(dtype).eps
    copies = x[..., :1, :].expand_as(x).contiguous()
    read = read._replace(h_post=torch.ones_like(read.h_post), h_res=torch.full_like(read.h_res, 1 / n))
    written = on_triton.site_write(copies, site["branch_out"], read)
    same = torch.equal(functional.site_write_collapse(copies, site["branch_out"], read), written[..., 0, :])
    return [unit.max().item(), same]


def main() -> None:
    """All figures as JSON on standard output."""
    result = {}
    # the interpreter's time is Sinkhorn's: the full 20 iterations where logarithms are few (4) and many (8)
    cases = [(n, 60, (2, 19), torch.float32, 20 if n in (4, 8) else 4) for n in range(2, 9)]
    cases += [(4, 60, (2, 19), dtype, 4) for dtype in (torch.bfloat16, torch.float16)]
    cases += [(3, 576, (70,), torch.bfloat16, 4)]
    for n, num_channels, lead, dtype, num_iters in cases:
        site = make_normed_site(n, num_channels, lead=lead, dtype=dtype)
        # the norm in the first site for even n, in the second for odd
        keywords = {"num_iters": num_iters, "normed_site": n % 2}
        ours, plain = (functools.partial(f, **keywords) for f in (pass_layer, pass_layer_plainly))
        result[f"layer n={n} C={num_channels} {dtype}"] = compare(ours, plain, site)
    for n, dtype, normed_site in ((3, torch.float32, 0), (2, torch.float32, 1), (4, torch.bfloat16, 1)):
        site = make_normed_site(n, 60, lead=(2, 9), dtype=dtype)
        keywords = {"num_iters": 3, "normed_site": normed_site}
        ours, plain = (functools.partial(f, **keywords) for f in (pass_two_layers, pass_layer_plainly))
        result[f"layer n={n} handed on, {dtype}"] = compare(ours, plain, site)
    few = functools.partial(pass_layer, num_iters=3)
    few_plainly = functools.partial(pass_layer_plainly, num_iters=3)
    # sizes of a device, where one program has many tiles, one after the other
    programs, config._PROGRAMS = config._PROGRAMS, 1
    for dtype in (torch.float32, torch.bfloat16):
        site = make_normed_site(4, 72, lead=(70,), dtype=dtype)
        result[f"layer of long loops {dtype}"] = compare(few, few_plainly, site)
    config._PROGRAMS = programs
    result["opposed streams"] = compare(few, few_plainly, oppose(make_normed_site(4, 600, lead=(19,)), 3e-3))
    for name, site in make_extreme_sites().items():
        got, want = differentiate(few, site), differentiate(pass_by_reference, widen(site))
        finite = all(bool(torch.isfinite(value).all()) for value in got.values())
        result[f"extreme: {name}"] = [relative_error(got["out0"], want["out0"]), finite]
    for n, num_channels, dtype in ((2, 33, torch.float32), (4, 60, torch.bfloat16), (7, 60, torch.float16)):
        result[f"widened n={n}"] = widen_and_compare(n, num_channels, dtype)
        result[f"collapsed n={n}"] = collapse_and_compare(n, num_channels, dtype)
    result["direction"] = tell_direction()
    for name in PUBLIC:
        result[f"{name} n=3"] = compare_alone(name, make_site(3, 33, lead=(2, 5)))
    result["extremes"] = run_extremes()

    site = make_normed_site(4, 48, lead=(67,), dtype=torch.bfloat16)
    first, second = differentiate(few, site), differentiate(few, site)
    result["same bits"] = all(torch.equal(first[name], second[name]) for name in first)
    empty = differentiate(pass_layer, make_normed_site(4, 16, lead=(2, 0)))
    result["zero tokens"] = [list(empty["out0"].shape), empty["d_phi"].abs().max().item()]
    x, phi, bias, alpha, branch_out, gain = (t.requires_grad_() for t in make_normed_site(2, 16, lead=(5,)).values())
    parameters, numbers = (phi, bias, alpha), (3, 1e-6)
    h_post, h_res, link = torch.rand(2, 5), torch.rand(2, 2, 5), torch.zeros(1).expand(x.shape).requires_grad_()
    written = (link, x.detach(), branch_out, h_post.requires_grad_(), h_res)
    partial = passes.project_streams(x.detach(), phi.detach(), True)
    checked = {
        registered.read: (x, *parameters, *numbers),
        normed.read_normed: (x, *parameters, gain, *numbers, 1e-6),
        normed.write_read_normed: (*written, *parameters, gain, *numbers, 1e-6),
        ahead.write_project: (*written, phi.detach()),
        ahead.read_projected: (x, *parameters, partial, *numbers),
        ahead.read_projected_normed: (x, *parameters, gain, partial, *numbers, 1e-6),
    }
    result["opcheck"] = [torch.library.opcheck(op, (*arguments, "triton")) for op, arguments in checked.items()]
    with record.record_launches() as launches:
        differentiate(few, make_normed_site(2, 16, lead=(3,)))
    result["kernels run"] = sorted({one.kernel for one in launches})
    result["target"] = config.get_target()
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
