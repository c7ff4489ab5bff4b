"""Measurements of models whose maps were put there by hand, against independent float64 computations."""

import math

import numpy as np
import pytest
import torch

from mhc_hf.inspection import InspectionError, measure_streams, record_streams
from mhc_hf.ops import reference

from .conftest import doubly_stochastic, set_maps, sites, tiny_transformers_model

# maps are float32 where streams are; here both are float64, and a bias holds 24 bits: 6e-8 a logit, six sites
TOLERANCE = 1e-6
READ, WRITE = [0.4, 0.3, 0.2, 0.1], [1.5, 0.5, 1.2, 0.8]


def static_model(widened, matrices):
    """`widened` with these doubly stochastic matrices as H_res, site by site."""
    for site, matrix in zip(sites(widened), matrices, strict=True):
        set_maps(site, READ, WRITE, np.log(np.maximum(matrix, 1e-40)))
    return widened


KNOWN = {
    "identity": [np.eye(4)] * 6,
    "permutation": [np.eye(4)[[2, 0, 3, 1]]] * 6,
    "uniform mixing": [np.full((4, 4), 0.25)] * 6,
    "known product": [doubly_stochastic(4, seed).numpy() for seed in range(6)],
}


@pytest.mark.parametrize("name", KNOWN)
def test_gains_and_distances_of_known_models(widened, token_ids, name):
    matrices = KNOWN[name]
    table = measure_streams(static_model(widened, matrices), input_ids=token_ids).table
    for k, h in enumerate(matrices):
        product = np.linalg.multi_dot([*matrices[k::-1], np.eye(4), np.eye(4)])
        rest = np.linalg.multi_dot([*matrices[: k - 1 if k else None : -1], np.eye(4), np.eye(4)])
        wanted = {
            "forward_gain": np.abs(h.sum(1)).max(),
            "backward_gain": np.abs(h.sum(0)).max(),
            "log_column_sum": np.abs(np.log(h.sum(0))).max(),
            "distance_doubly_stochastic": 0,
            "distance_identity": np.sqrt(((h - np.eye(4)) ** 2).sum()),
            "composite_forward_gain": np.abs(product.sum(1)).max(),
            "composite_backward_gain": np.abs(rest.sum(0)).max(),
            "composite_log_column_sum": np.abs(np.log(product.sum(0))).max(),
            "h_pre_min": 0.1,
            "h_pre_max": 0.4,
            "h_post_min": 0.5,
            "h_post_max": 1.5,
            "h_pre_entropy": -sum(p * math.log(p) for p in READ),
        }
        for column, value in wanted.items():
            assert table[column][k] == pytest.approx(value, abs=TOLERANCE), (column, k)


def test_dynamic_maps_are_averaged_over_tokens(widened, token_ids):
    """Every token its own maps: gains of products are means of gains, not gains of means."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in sites(widened):
            site.phi.copy_(0.3 * torch.randn(site.phi.shape, generator=generator))
            site.bias.add_(torch.randn(site.bias.shape, generator=generator))
    inputs = {}
    for site in sites(widened):
        # `update` answers None: a hook's answer would replace the input
        site.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0]}))
    table = measure_streams(widened, input_ids=token_ids).table
    products, spreads = np.eye(4), []
    for k, site in enumerate(sites(widened)):
        x = inputs[site].unflatten(-1, (4, -1))
        _, _, h_res = reference.mhc_coefficients(x, site.phi, site.bias, site.alpha)
        h_res = h_res.detach().flatten(0, 1).numpy()
        products = h_res @ products
        spreads.append(float((x - x.mean(2, keepdim=True)).norm() / x.norm()))
        assert table["backward_gain"][k] == pytest.approx(np.abs(h_res.sum(1)).max(1).mean(), abs=TOLERANCE)
        assert table["log_column_sum"][k] == pytest.approx(np.abs(np.log(h_res.sum(1))).max(), abs=TOLERANCE)
        assert table["composite_log_column_sum"][k] == pytest.approx(
            np.abs(np.log(products.sum(1))).max(), abs=TOLERANCE
        )
        assert table["spread"][k] == pytest.approx(spreads[k], abs=1e-12)
    assert table["composite_backward_gain"][0] == pytest.approx(np.abs(products.sum(1)).max(1).mean(), abs=TOLERANCE)
    assert np.std(h_res, 0).max() > 1e-2


def test_masked_tokens_are_left_out(widened, token_ids):
    """Padding on the right does not reach the tokens before it, so it must not reach the numbers either."""
    mask = torch.ones_like(token_ids)
    mask[:, 40:] = 0
    padded = measure_streams(widened, input_ids=token_ids, attention_mask=mask)
    cut = measure_streams(widened, input_ids=token_ids[:, :40])
    for column, values in cut.table.items():
        assert padded.table[column] == pytest.approx(values, abs=1e-9), column


def test_streams_of_zeros_are_copies(widened):
    measurement = measure_streams(widened, inputs_embeds=torch.zeros(1, 3, 60, dtype=torch.float64))
    assert measurement.table["spread"][0] == 0 and not measurement.not_finite


def test_the_summary_takes_the_worst_site_or_the_mean(widened, token_ids):
    measurement = measure_streams(widened, input_ids=token_ids)
    summary, table = measurement.summary(), measurement.table
    assert summary["streams/spread"] == pytest.approx(max(table["spread"]))
    assert summary["streams/cosine"] == pytest.approx(sum(table["cosine"]) / 6)
    assert summary["streams/h_pre_min"] == pytest.approx(min(table["h_pre_min"]))
    assert summary["streams/composite_backward_gain"] == table["composite_backward_gain"][0]
    assert measurement.by_site()["streams/layers.1.ffn_hc/spread"] == table["spread"][3]


def test_gradient_norms_are_those_of_the_parameters(widened, token_ids):
    assert not measure_streams(widened, input_ids=token_ids).gradients
    widened(token_ids, labels=token_ids).loss.backward()
    measurement = measure_streams(widened, input_ids=token_ids)
    for k, site in enumerate(sites(widened)):
        for name in ("phi", "bias", "alpha"):
            wanted = float(getattr(site, name).grad.norm())
            assert measurement.gradients[name][k] == pytest.approx(wanted, rel=1e-5), (name, k)
    total = math.sqrt(sum(float(site.phi.grad.double().square().sum()) for site in sites(widened)))
    assert measurement.summary()["streams/grad_norm_phi"] == pytest.approx(total, rel=1e-5)


def test_nothing_is_left_on_the_model(widened, token_ids):
    with record_streams(widened):
        assert any(module._forward_pre_hooks for module in widened.modules())
    assert not any(module._forward_pre_hooks for module in widened.modules())


def test_a_second_forward_is_let_pass(widened, token_ids):
    with torch.no_grad(), record_streams(widened) as recording:
        widened(token_ids)
        first = [reading.h_res for reading in recording.readings]
        widened(token_ids[:, :5])
    assert all(a is b.h_res for a, b in zip(first, recording.readings, strict=True))


def test_what_holds_nan_is_named(widened, token_ids):
    with torch.no_grad():
        widened.get_parameter("model.layers.1.mlp.down_proj.weight")[0] = math.nan
    assert measure_streams(widened, input_ids=token_ids).not_finite[0] == "streams into layers.2.attn_hc"
    with torch.no_grad():
        widened.get_parameter("model.layers.1.attn_hc.bias")[0] = math.nan
    assert measure_streams(widened, input_ids=token_ids).not_finite[0] == "maps of layers.1.attn_hc"


def test_a_plain_model_is_refused(llama, token_ids):
    with pytest.raises(InspectionError, match=r"hyper-connections, got a LlamaForCausalLM.*from_base"):
        measure_streams(llama, input_ids=token_ids)


@pytest.mark.parametrize("model_type", ["deepseek_v4", "glm5_next"])
def test_models_of_transformers_are_read_in_our_convention(model_type, token_ids):
    """Their streams after a site are H_res x + H_post F, with the maps as we read them."""
    model = tiny_transformers_model(model_type)
    layer = dict(model.named_modules())[next(n for n, _ in model.named_modules() if n.endswith("layers.1"))]
    seen = {}
    layer.attn_hc.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    layer.attn_hc.register_forward_hook(lambda module, args, out: seen.update(read=out[2]))
    layer.self_attn.register_forward_hook(
        lambda module, args, out: seen.update(y=out[0] if isinstance(out, tuple) else out)
    )
    layer.ffn_hc.register_forward_pre_hook(lambda module, args: seen.update(after=args[0]))
    with torch.no_grad(), record_streams(model) as recording:
        model(input_ids=token_ids)
    reading = recording.by_name["layers.1.attn_hc"]
    x, y, after, read = (seen[name].flatten(0, 1).double() for name in ("x", "y", "after", "read"))
    written = reading.h_post[..., None] * y[:, None]
    # float32 on their side: n + 1 products a number, of streams of order 1
    torch.testing.assert_close(reading.h_res @ x + written, after, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((reading.h_pre[..., None] * x).sum(1), read, atol=1e-5, rtol=1e-5)
    # the wrong direction would be seen
    assert float((reading.h_res.mT @ x + written - after).abs().max()) > 1e-2
    assert len(recording.readings) == 2 * 3
