"""Verification passes what is right, and names what is not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mhc_hf.conversion import ConversionError, UnusableSource, convert_checkpoint, verify_conversion
from tests.conftest import tiny_model

TEXT = "Names refer to objects. Names are introduced by name binding operations. " * 20


@pytest.fixture
def converted(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out", copy=True)
    return tmp_path / "out"


def edit(folder, name, change):
    """Replace every mHC tensor whose name ends so by `change(tensor)`; None takes it away."""
    path = folder / "mhc.safetensors"
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(name)]:
        tensors[key] = change(tensors[key])
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    for key in tensors.keys() - kept.keys():
        del content["weight_map"][key]
    index.write_text(json.dumps(content))


def set_rows(rows, value):
    def change(tensor):
        tensor[rows] = value
        return tensor

    return change


@pytest.mark.parametrize("hc_mult", [2, 3, 4, 8])
def test_a_conversion_is_verified(base, tmp_path, hc_mult):
    convert_checkpoint(base, tmp_path / "out", hc_mult=hc_mult)
    report = verify_conversion(base, tmp_path / "out")
    assert report, str(report)
    assert report.max_logit > 0.1 and report.max_difference <= 1e-5 * report.max_logit
    assert (report.agreement, report.steps, report.sites) == (128, 128, 6)
    assert report.same_tokenizer and report.text == "Python's language reference"
    assert str(report).endswith("verified") and "NOT" not in str(report)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_in_low_precision_it_is_measured_against_the_float32_base(base, converted, dtype):
    report = verify_conversion(base, converted, dtype=dtype)
    assert report and 0 < report.distance_ratio <= 1.05, str(report)


def test_a_conversion_that_casts_is_verified_against_the_cast_base(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out", dtype="bfloat16")
    report = verify_conversion(base, tmp_path / "out")
    assert report and report.changed == [], str(report)


def test_the_given_text_is_run(base, converted):
    report = verify_conversion(base, converted, text=TEXT)
    assert report and report.text == "the given text"


def test_a_short_text_is_run_in_full(base, converted):
    assert verify_conversion(base, converted, text="names").tokens < 6


def test_no_text_is_refused(base, converted):
    with pytest.raises(ConversionError, match="`text` has 0 tokens"):
        verify_conversion(base, converted, text="")


def test_without_a_tokenizer_random_tokens_are_run_and_it_is_said(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    report = verify_conversion(tmp_path / "base", tmp_path / "out")
    assert report and "random tokens" in str(report) and report.same_tokenizer is None


def test_another_function_is_out_of_tolerance(base, converted):
    edit(converted, "layers.0.ffn_hc.bias", set_rows(slice(4, 8), 0.1))
    report = verify_conversion(base, converted)
    assert not report and not report.same_function and "NOT VERIFIED" in str(report)


def test_the_tolerance_is_the_callers(base, converted):
    assert not verify_conversion(base, converted, tolerance=1e-12)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("alpha", torch.zeros_like, "alpha and phi of H_pre are both 0"),
        ("alpha", set_rows(2, 0.0), "alpha and phi of H_res are both 0"),
        ("bias", set_rows(slice(0, 4), -1.0986123), "every stream is read alike"),  # 1/4 each
        ("bias", set_rows(slice(8, None), 0.0), None),
        ("bias", lambda t: torch.cat([t[:8], 50 * torch.eye(4).flatten()]), "H_res is saturated"),
        ("bias", lambda t: torch.cat([torch.tensor([30.0, -30, -30, -30]), t[4:]]), "H_pre is saturated"),
        ("bias", lambda t: torch.cat([t[:4], 40 * torch.ones(4), t[8:]]), "H_post is saturated"),
    ],
)
def test_a_site_that_cannot_wake_is_named_with_the_reason(base, converted, name, change, reason):
    edit(converted, f"layers.1.attn_hc.{name}", change)
    report = verify_conversion(base, converted)
    if reason is None:
        assert not report.asleep
    else:
        assert list(report.asleep) == ["model.layers.1.attn_hc"]
        assert reason in report.asleep["model.layers.1.attn_hc"] and reason in str(report) and not report


def test_a_trained_phi_counts_as_awake_where_biases_are_alike(base, converted):
    edit(converted, "layers.1.attn_hc.bias", set_rows(slice(0, 4), -1.0986123))
    edit(converted, "layers.1.attn_hc.phi", lambda phi: 1e-3 * torch.randn(phi.shape))
    assert verify_conversion(base, converted).asleep == {}


def test_mhc_parameters_stored_in_bf16_are_not_float32(base, converted):
    edit(converted, "alpha", lambda tensor: tensor.bfloat16())
    report = verify_conversion(base, converted)
    assert not report.float32 and not report and "NOT float32" in str(report)


def test_a_base_tensor_with_another_bit_is_named(base, converted):
    path = converted / "base-00001-of-00001.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    report = verify_conversion(base, converted)
    assert report.changed == ["model.norm.weight"] and not report


def test_a_missing_mhc_tensor_is_named(base, converted):
    edit(converted, "layers.2.ffn_hc.alpha", lambda tensor: None)
    report = verify_conversion(base, converted)
    assert report.stray_keys == ["model.layers.2.ffn_hc.alpha"] and not report


def test_another_tokenizer_is_seen(base, converted):
    tokenizer = json.loads((converted / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (converted / "tokenizer.json").write_text(json.dumps(tokenizer))
    report = verify_conversion(base, converted)
    assert report.same_tokenizer is False and not report and "OTHER IDS" in str(report)


def test_a_fine_tuned_model_saved_into_the_folder_is_what_is_verified(base, converted):
    model = AutoModelForCausalLM.from_pretrained(converted)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(converted)
    report = verify_conversion(base, converted)
    assert report.changed == ["lm_head.weight"] and not report.same_function


def test_the_two_folders_the_wrong_way_round_are_refused(base, converted):
    with pytest.raises(UnusableSource, match="already widened"):
        verify_conversion(converted, base)


def test_a_folder_that_is_not_widened_is_refused(base):
    with pytest.raises(UnusableSource, match=r"`converted`=.* is not widened"):
        verify_conversion(base, base)


def test_the_base_of_another_family_is_refused(converted, tmp_path):
    tiny_model("mistral").save_pretrained(tmp_path / "other")
    with pytest.raises(UnusableSource, match="made from a 'llama'"):
        verify_conversion(tmp_path / "other", converted)


def test_a_folder_that_is_not_there_is_named_as_what_it_is(base, tmp_path):
    with pytest.raises(UnusableSource, match="`converted`="):
        verify_conversion(base, tmp_path / "nowhere")
