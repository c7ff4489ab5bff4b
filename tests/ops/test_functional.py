"""The public ops on a CPU's backends: values and every gradient against float64, and what a caller may hand in."""

import collections
import math

import pytest
import torch

from mhc_hf.ops import normed, reference, registered
from mhc_hf.ops.functional import BranchNorm

from .sites import bind_ops, differentiate, make_site, pass_site, relative_error, widen

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "native"])
def on(request):
    """The public ops on one backend."""
    return bind_ops(request.param)


def pass_linked_site(o):
    """A site that owns all gradients of its streams."""

    def run(x, phi, bias, alpha, branch_out):
        site = o.site_read(x, phi, bias, alpha)
        return o.site_write(x, torch.tanh(site.branch_in) * branch_out, site)

    return run


def pass_two_sites(o):
    """A layer: two sites, the second's read fused with the first's write where `o` can."""

    def run(x, phi, bias, alpha, branch_out):
        if o is reference:
            middle = pass_site(reference)(x, phi, bias, alpha, branch_out)
            return pass_site(reference)(middle, phi.flip(0), bias.flip(0), alpha, branch_out), middle
        site = o.site_read(x, phi, bias, alpha)
        branch = torch.tanh(site.branch_in) * branch_out
        middle, site = o.site_write_read(x, branch, site, phi.flip(0), bias.flip(0), alpha)
        return o.site_write(middle, torch.tanh(site.branch_in) * branch_out, site), middle

    return run


def assert_as_good_as_plain(function, plain, sites):
    """float32: 2e-6. Half precision: at most twice the error of the plain formula in the same dtype.

    Errors are pooled over `sites`: that of three numbers, alpha's gradient, is one throw of the dice on each.
    """
    ours, plains = collections.defaultdict(list), collections.defaultdict(list)
    for site in sites:
        want, got, in_kind = (
            differentiate(plain, widen(site)),
            differentiate(function, site),
            differentiate(plain, site),
        )
        assert got.keys() == want.keys()
        for name in want:
            ours[name].append(relative_error(got[name], want[name]))
            plains[name].append(relative_error(in_kind[name], want[name]))
    for name in ours:
        bound = 2e-6 if sites[0]["x"].dtype == torch.float32 else max(2 * math.hypot(*plains[name]), 2e-6)
        assert math.hypot(*ours[name]) <= bound, name


def make_sites(n, num_channels, dtype):
    return [make_site(n, num_channels, dtype=dtype, seed=seed) for seed in range(1 if dtype == torch.float32 else 4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", range(2, 9))
def test_a_site_matches_float64_in_values_and_all_gradients(on, n, dtype):
    sites = make_sites(n, 60, dtype)
    assert_as_good_as_plain(pass_site(on), pass_site(), sites)
    assert_as_good_as_plain(pass_linked_site(on), pass_site(), sites)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_sites_match_float64_although_the_streams_between_them_are_used_elsewhere(on, dtype):
    assert_as_good_as_plain(pass_two_sites(on), pass_two_sites(reference), make_sites(4, 60, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_op_alone_matches_float64(on, dtype):
    arguments: dict[str, list] = collections.defaultdict(list)
    for site in make_sites(3, 33, dtype):
        h_pre, h_post, h_res = reference.mhc_coefficients(site["x"], site["phi"], site["bias"], site["alpha"])
        x = {"x": site["x"]}
        arguments["mhc_coefficients"].append(x | {name: site[name] for name in ("phi", "bias", "alpha")})
        arguments["mhc_pre"].append(x | {"h_pre": h_pre})
        arguments["mhc_post_res"].append(x | {"branch_out": site["branch_out"], "h_post": h_post, "h_res": h_res})
    arguments["mhc_pre_branch"] = arguments["mhc_coefficients"]
    for name, sites in arguments.items():
        assert_as_good_as_plain(getattr(on, name), getattr(reference, name), sites)


def test_float64_streams_are_computed_in_float64():
    site = {name: tensor.double().requires_grad_() for name, tensor in make_site(3, 5, lead=(2,)).items()}
    assert torch.autograd.gradcheck(lambda *a: pass_linked_site(bind_ops("torch"))(*a), tuple(site.values()))


def test_the_gradient_of_a_normed_site_is_exact():
    ops = bind_ops("torch")
    site = {name: tensor.double().requires_grad_() for name, tensor in make_site(3, 5, lead=(2,)).items()}
    gain = torch.linspace(0.5, 2, 5, dtype=torch.float64, requires_grad=True)

    def run(x, phi, bias, alpha, branch_out, gain):
        norm = BranchNorm(gain, 1e-5)
        site = ops.site_read(x, phi, bias, alpha, branch_norm=norm)
        middle, site = ops.site_write_read(x, site.branch_in * branch_out, site, phi, bias, alpha, branch_norm=norm)
        return ops.site_write(middle, site.branch_in * branch_out, site)

    assert torch.autograd.gradcheck(run, (*site.values(), gain))


def test_a_norm_that_a_kernel_would_not_apply_as_the_module_does_is_refused(on):
    site = make_site(4, 8)
    norm = BranchNorm(torch.ones(8, dtype=torch.bfloat16), 1e-6)
    with pytest.raises(ValueError, match=r"weight of `branch_norm` must be torch\.float32 \[8\].*got torch\.bfloat16"):
        on.site_read(site["x"], site["phi"], site["bias"], site["alpha"], branch_norm=norm)


def test_h_res_goes_from_j_to_i(on):
    x = torch.randn(1, 1, 4, 6)
    h_res = torch.zeros(1, 1, 4, 4)
    h_res[..., 2, 0] = 1.0  # into stream 2, from stream 0
    out = on.mhc_post_res(x, torch.zeros(1, 1, 6), torch.zeros(1, 1, 4), h_res)
    assert torch.equal(out[0, 0, 2], x[0, 0, 0])
    assert out[0, 0, [0, 1, 3]].abs().max() == 0


def test_copied_streams_stay_copies(on):
    site = make_site(4, 32)
    x = site["x"][..., :1, :].expand(2, 7, 4, 32).contiguous()
    _, _, h_res = on.mhc_coefficients(x, site["phi"], site["bias"], site["alpha"])
    mixed = on.mhc_post_res(x, site["branch_out"], torch.zeros(2, 7, 4), h_res)
    torch.testing.assert_close(mixed, x, rtol=5e-7, atol=5e-7)


def test_half_precision_streams_of_1e4_do_not_overflow(on):
    n, num_channels = 4, 4096
    x = torch.full((1, 2, n, num_channels), 1e4, dtype=torch.float16)
    site = make_site(n, num_channels, lead=(1, 2))
    got = on.mhc_pre_branch(x, site["phi"], site["bias"], site["alpha"])
    want = reference.mhc_pre_branch(x.double(), site["phi"], site["bias"], site["alpha"])
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 1e-3  # branch_in is rounded to 11 bits


def test_zero_tokens_give_empty_results_and_zero_gradients(on):
    site = make_site(4, 8, lead=(2, 0))
    got = differentiate(pass_site(on), site)
    assert got["out0"].shape == (2, 0, 4, 8)
    assert got["d_phi"].abs().max() == 0


@pytest.mark.parametrize("view", ["transposed", "sliced", "flat", "expanded"])
def test_views_and_strided_streams_give_the_same_result(on, view):
    site = make_site(4, 16)
    x = site["x"]
    views = {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": lambda t: torch.cat([t, t], -1)[..., :16],
        "flat": lambda t: t.flatten(-2).unflatten(-1, (4, 16)),
        "expanded": lambda t: t,
    }
    if view == "expanded":
        x = x[:, :1].expand(2, 7, 4, 16)
    want = differentiate(pass_site(on), site | {"x": x.contiguous()})
    got = differentiate(lambda x, **rest: pass_site(on)(views[view](x), **rest), site | {"x": x.contiguous()})
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)


def test_autocast_lowers_nothing(on):
    site = make_site(4, 32)
    want = differentiate(pass_linked_site(on), site)
    with torch.autocast("cpu", torch.bfloat16):
        got = differentiate(pass_linked_site(on), site)
        no_grad = pass_linked_site(on)(**{name: tensor.detach() for name, tensor in site.items()})
    torch.testing.assert_close(no_grad, want["out0"], rtol=1e-6, atol=1e-6)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)


def test_the_same_run_twice_gives_the_same_bits(on):
    site = make_site(4, 64, lead=(3, 50), dtype=torch.bfloat16)
    first, second = differentiate(pass_linked_site(on), site), differentiate(pass_linked_site(on), site)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_streams_and_frozen_parameters_are_served(on):
    site = make_site(4, 16)
    want = differentiate(pass_linked_site(on), site)
    for trained in (["phi", "bias", "alpha"], ["branch_out"], ["x"]):
        leaves = {name: t.clone().requires_grad_(name in trained) for name, t in site.items()}
        pass_linked_site(on)(**leaves).backward(
            torch.randn(want["out0"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
        )
        for name in trained:
            torch.testing.assert_close(leaves[name].grad, want[f"d_{name}"], rtol=1e-5, atol=1e-6)


def test_a_checkpointed_site_has_the_same_gradients(on):
    from torch.utils.checkpoint import checkpoint

    def run(x, phi, bias, alpha, branch_out):
        return checkpoint(pass_two_sites(on), x, phi, bias, alpha, branch_out, use_reentrant=False)

    site = make_site(4, 16)
    want, got = differentiate(pass_two_sites(on), site), differentiate(run, site)
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_a_site_keeps_streams_once_branch_output_and_few_numbers_a_token(on):
    n, num_channels, tokens = 4, 256, 32
    site = {name: t.requires_grad_() for name, t in make_site(n, num_channels, lead=(tokens,)).items()}
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linked = on.site_read(site["x"], site["phi"], site["bias"], site["alpha"])
        on.site_write(site["x"], site["branch_out"], linked)
    parameters = sum(site[name].nbytes for name in ("phi", "bias", "alpha"))
    numbers_a_token = (n + 2) * n + 1 + n  # projections, 1/rms, h_post
    assert sum(saved.values()) <= parameters + 4 * tokens * (n * num_channels + num_channels + numbers_a_token)


def _op_arguments(backend):
    x, phi, bias, alpha, branch_out = (t.requires_grad_() for t in make_site(4, 12, lead=(5,)).values())
    h_post, h_res = torch.rand(4, 5, requires_grad=True), torch.rand(4, 4, 5, requires_grad=True)
    link = torch.zeros(1).expand(x.shape).requires_grad_()
    gain = torch.rand(12, requires_grad=True)
    site, given, numbers = (x, phi, bias, alpha), (x.detach(), branch_out, h_post, h_res.detach()), (20, 1e-6, backend)
    return {
        "sinkhorn": (h_res, 20, backend),
        "coefficients": (*site, *numbers),
        "read": (*site, *numbers),
        "pre": (x, h_post, backend),
        "post_res": (x, branch_out, h_post, h_res, backend),
        "write": (link, *given, backend),
        "write_read": (link, *given, phi, bias, alpha, *numbers),
        "read_normed": (*site, gain, 20, 1e-6, 1e-6, backend),
        "write_read_normed": (link, *given, phi, bias, alpha, gain, 20, 1e-6, 1e-6, backend),
    }


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("name", _op_arguments("torch"))
def test_registration_passes_opcheck(name, backend):
    registry = normed if name.endswith("_normed") else registered
    torch.library.opcheck(getattr(registry, name), _op_arguments(backend)[name])


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 40])
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_results_are_contiguous_as_the_compiler_is_told(num_tokens, copies, backend):
    site = make_site(4, 12, lead=(num_tokens,))
    x = site["x"][:, :1].expand(-1, 4, -1).contiguous() if copies else site["x"]
    *results, link = registered.read(x, site["phi"], site["bias"], site["alpha"], 20, 1e-6, backend)
    branch_in, h_post, h_res, *_ = results
    results.append(registered.write(link, x, branch_in, h_post, h_res, backend))
    assert all(result.is_contiguous() for result in results)


def test_a_layer_compiles_without_a_graph_break_and_for_every_length_at_once(on):
    torch._dynamo.reset()
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(pass_two_sites(on), fullgraph=True, dynamic=True, backend=count)
    for length in (5, 9, 17):
        site = make_site(4, 16, lead=(2, length))
        want, got = differentiate(pass_two_sites(on), site), differentiate(compiled, site)
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)
    assert len(graphs) == 1


def test_compiled_gradients_through_aot_are_the_same(on):
    torch._dynamo.reset()
    site = make_site(4, 16)
    compiled = torch.compile(pass_two_sites(on), fullgraph=True, backend="aot_eager")
    want, got = differentiate(pass_two_sites(on), site), differentiate(compiled, site)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)
