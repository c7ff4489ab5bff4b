"""What H_res may be made by, beside Sinkhorn-Knopp: for comparisons, and for others to follow."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from mhc_hf import HyperConnection, MHCConfig, MHCForCausalLM
from mhc_hf.modeling.projections import PROJECTIONS, compute_maps
from mhc_hf.ops.reference import rms_normalize

from ..conftest import tiny_config


def random_site(n=3, num_channels=5):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 7, n, num_channels), (n * (n + 2), n * num_channels), (n * (n + 2),), (3,)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_start_comes_back_as_the_map_it_was(projection):
    h_res = torch.softmax(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), -1)
    for _ in range(200):
        h_res = h_res / h_res.sum(0)
        h_res = h_res / h_res.sum(1, keepdim=True)
    wanted = torch.eye(4, dtype=torch.float64) if projection == "identity" else h_res
    chosen = PROJECTIONS[projection]
    torch.testing.assert_close(chosen.project(chosen.invert(h_res)[None], 20)[0], wanted)


def test_without_a_projection_h_res_is_that_of_the_original():
    """Eq. 5: alpha tanh(phi x) + b, from which nothing is taken away."""
    x, phi, bias, alpha = random_site()
    _, _, h_res = compute_maps(x, phi, bias, alpha, projection="none", num_iters=20, norm_eps=1e-6)
    wanted = alpha[2] * torch.tanh(rms_normalize(x.flatten(-2)) @ phi[6:].T) + bias[6:]
    torch.testing.assert_close(h_res, wanted.unflatten(-1, (3, 3)))
    assert float((h_res.sum(-1) - 1).abs().max()) > 0.1


def test_under_identity_streams_are_never_mixed():
    x, phi, bias, alpha = random_site()
    _, _, h_res = compute_maps(x, phi, bias, alpha, projection="identity", num_iters=20, norm_eps=1e-6)
    assert torch.equal(h_res, torch.eye(3, dtype=torch.float64).expand_as(h_res))


def test_reads_and_writes_do_not_depend_on_it():
    x, phi, bias, alpha = random_site()
    reads = [
        compute_maps(x, phi, bias, alpha, projection=name, num_iters=20, norm_eps=1e-6)[:2] for name in PROJECTIONS
    ]
    for h_pre, h_post in reads[1:]:
        torch.testing.assert_close(h_pre, reads[0][0])
        torch.testing.assert_close(h_post, reads[0][1])


@pytest.mark.parametrize("projection", ["none", "identity"])
@pytest.mark.parametrize("start", ["orthogonal", "copies"])
def test_conversions_are_exact_under_it_too(llama, token_ids, projection, start):
    widened = MHCForCausalLM.from_base(copy.deepcopy(llama), start=start, hc={"hc_projection": projection})
    with torch.no_grad():
        # logits of order 10 in float32: the same bound as for Sinkhorn-Knopp
        torch.testing.assert_close(widened(token_ids).logits, llama(token_ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("projection", ["none", "identity"])
def test_a_model_under_it_trains_saves_and_loads(tmp_path, token_ids, projection):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MHCConfig.from_base(tiny_config("llama"), hc_projection=projection))
    model(token_ids, labels=token_ids).loss.backward()
    for module in model.modules():
        if isinstance(module, HyperConnection):
            assert module.projection == projection
            assert float(module.phi.grad[:8].abs().max()) > 0
            assert (float(module.bias.grad[8:].abs().max()) > 0) == (projection == "none")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.hc_projection == projection
    assert torch.equal(again.eval()(token_ids).logits, model.eval()(token_ids).logits)


def test_an_unknown_projection_is_refused():
    with pytest.raises(ValueError, match="`hc_projection` must be one of 'sinkhorn', 'none', 'identity', got 'cayley'"):
        MHCConfig.from_base(tiny_config("llama"), hc_projection="cayley")


def test_recompute_is_for_sinkhorn_alone():
    with pytest.raises(ValueError, match="`hc_recompute` needs `hc_projection=\"sinkhorn\"`, got 'none'"):
        MHCConfig.from_base(tiny_config("llama"), hc_projection="none", hc_recompute=True)
