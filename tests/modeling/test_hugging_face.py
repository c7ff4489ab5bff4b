"""What Auto classes, checkpoints and pickles see of a widened model."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    CTRLConfig,
)

from mhc_hf import (
    MHCConfig,
    MHCForCausalLM,
    MHCForQuestionAnswering,
    MHCForSequenceClassification,
    MHCForTokenClassification,
    MHCModel,
)

from ..conftest import tiny_model


@pytest.fixture
def widened(llama):
    return MHCForCausalLM.from_base(copy.deepcopy(llama), hc_mult=3)


def test_state_dict_is_the_bases_plus_the_sites(llama, widened):
    base, wide = llama.state_dict(), widened.state_dict()
    for name, value in base.items():
        assert wide[name].dtype == value.dtype and torch.equal(wide[name], value), name
    added = set(wide) - set(base)
    assert added == {
        f"model.layers.{i}.{site}.{part}"
        for i in range(3)
        for site in ("attn_hc", "ffn_hc")
        for part in ("phi", "bias", "alpha")
    }
    assert wide["model.layers.0.attn_hc.phi"].shape == (15, 180)


@torch.no_grad()
@pytest.mark.parametrize("max_shard_size", ["5GB", "30KB"])
def test_save_and_reload_give_the_same_bits(widened, token_ids, tmp_path, max_shard_size):
    widened.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size != "5GB")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(loaded) is type(widened)
    assert torch.equal(loaded(token_ids).logits, widened(token_ids).logits)


def test_config_on_disk_is_the_bases_with_hc_fields(widened, tmp_path):
    widened.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["model_type"] == "mhc" and on_disk["base_model_type"] == "llama"
    assert on_disk["hc_mult"] == 3 and on_disk["hc_start"] == "orthogonal" and on_disk["hc_alpha_init"] == 1.0
    assert on_disk["hidden_size"] == 60 and on_disk["num_key_value_heads"] == 2
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MHCConfig) and config.to_diff_dict() == widened.config.to_diff_dict()


@torch.no_grad()
def test_from_base_loads_a_folder(llama, token_ids, tmp_path, recwarn):
    llama.save_pretrained(tmp_path)
    loaded, info = MHCForCausalLM.from_base(tmp_path, hc_mult=4, output_loading_info=True)
    assert not info["missing_keys"], "mHC parameters are missing by design, and are not reported"
    assert torch.equal(loaded(token_ids).logits, MHCForCausalLM.from_base(llama)(token_ids).logits)


def test_from_base_shares_the_bases_tensors(llama):
    base = copy.deepcopy(llama)
    base.model.embed_tokens.weight.requires_grad_(False)
    widened = MHCForCausalLM.from_base(base)
    for name, parameter in base.named_parameters():
        assert widened.get_parameter(name).data_ptr() == parameter.data_ptr(), name
        assert widened.get_parameter(name).requires_grad == parameter.requires_grad, name


def test_tied_embeddings_stay_tied(token_ids, tmp_path):
    base = tiny_model("llama", tie_word_embeddings=True)
    widened = MHCForCausalLM.from_base(base)
    assert widened.lm_head.weight is widened.model.embed_tokens.weight
    widened.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(token_ids).logits, widened(token_ids).logits)


def test_common_classes_give_the_familys(widened, tmp_path):
    widened.save_pretrained(tmp_path)
    assert type(MHCForCausalLM.from_pretrained(tmp_path)) is type(widened)
    assert type(MHCForCausalLM(widened.config)) is type(widened)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MHCModel)
    assert type(MHCConfig(base_model_type="llama", hidden_size=60)) is type(widened.config)


@pytest.mark.parametrize(
    ("auto_class", "kind"),
    [
        (AutoModelForSequenceClassification, MHCForSequenceClassification),
        (AutoModelForTokenClassification, MHCForTokenClassification),
        (AutoModelForQuestionAnswering, MHCForQuestionAnswering),
    ],
)
def test_task_heads_load_a_widened_checkpoint_and_train(widened, token_ids, tmp_path, auto_class, kind):
    widened.save_pretrained(tmp_path)
    model = auto_class.from_pretrained(tmp_path)
    assert isinstance(model, kind)
    decoder = getattr(model, model.base_model_prefix)
    assert isinstance(decoder, MHCModel)
    assert torch.equal(decoder.layers[1].ffn_hc.bias, widened.model.layers[1].ffn_hc.bias)
    out = model(token_ids)
    (out.logits if "logits" in out else out.start_logits + out.end_logits).sum().backward()
    assert float(decoder.layers[0].attn_hc.bias.grad.abs().max()) > 0


def test_pickles_and_copies(widened, token_ids):
    for twin in (pickle.loads(pickle.dumps(widened)), copy.deepcopy(widened)):
        assert type(twin) is type(widened)
        assert torch.equal(twin(token_ids).logits, widened(token_ids).logits)
    assert pickle.loads(pickle.dumps(widened.config)).to_dict() == widened.config.to_dict()


@pytest.mark.slow
def test_a_fresh_process_unpickles_a_model(widened, tmp_path):
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(widened))
    code = f"import pickle; print(type(pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))).__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "MHCLlamaForCausalLM"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(widened, token_ids, use_reentrant):
    def gradients():
        widened.zero_grad()
        widened.train()(token_ids, labels=token_ids).loss.backward()
        return {name: p.grad.clone() for name, p in widened.named_parameters()}

    plain = gradients()
    widened.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda llama: MHCForCausalLM.from_base(llama, hc_mult=1), "`hc_mult` must be an integer >= 2, got 1"),
        (lambda llama: MHCForCausalLM.from_base(llama, hc_mult=2.5), "`hc_mult` must be an integer >= 2, got 2.5"),
        (lambda llama: MHCForCausalLM.from_base(llama, start="uniform"), "`hc_start` must be one of"),
        (lambda llama: MHCForCausalLM.from_base(llama, start="paper"), "for training from scratch"),
        (lambda llama: MHCForCausalLM.from_base(llama, 2, "orthogonal"), "needs `hc_mult` >= 3, got 2"),
        (lambda llama: MHCForCausalLM.from_base(llama, dtype=torch.bfloat16), "dtype can be given with a path only"),
        (lambda llama: MHCForCausalLM.from_base(MHCForCausalLM.from_base(llama)), "already widened"),
        (lambda llama: MHCForCausalLM.from_base(llama.model), "must be a LlamaForCausalLM"),
        (lambda llama: MHCForCausalLM(llama.config), "must be a widened configuration"),
        (lambda llama: MHCConfig.from_base(CTRLConfig()), "'ctrl'` is not supported.*Supported: .*llama"),
        (lambda llama: MHCConfig.from_base(llama.config, num_layers=3), "takes hc_\\* fields only, got num_layers"),
        (lambda llama: MHCConfig.from_base(llama.config, hc_alpha_init=0.0), "`hc_alpha_init` must not be 0"),
        (
            lambda llama: MHCConfig.from_base(llama.config, hc_sinkhorn_iters=0),
            "`hc_sinkhorn_iters` must be an integer",
        ),
        (lambda llama: MHCConfig(base_model_type="no_such"), "got 'no_such'"),
        (lambda llama: MHCConfig.from_dict({"hidden_size": 4}), "`base_model_type` is missing"),
    ],
)
def test_bad_input_is_named_with_its_rule(llama, make, message):
    with pytest.raises(ValueError, match=message):
        make(llama)
