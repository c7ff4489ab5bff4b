"""What does not fit is refused with its reason before anything is built; nothing is guessed."""

import subprocess
import sys

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Gemma3Config, Qwen3_5Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mhc_hf import MHCConfig, MHCForCausalLM
from mhc_hf.conversion import ConversionError, convert_checkpoint
from mhc_hf.modeling import sublayers
from mhc_hf.modeling.families import supported_families
from mhc_hf.modeling.sublayers import FAMILIES, REFUSED, Family

from ..conftest import tiny_config, tiny_model
from .family_models import family_config, family_model


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_families_that_do_not_fit_say_why(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {model_type}")
    with pytest.raises(ValueError, match=r"cannot be widened: .*docs/families\.md") as error:
        MHCConfig.from_base(CONFIG_MAPPING[model_type]())
    assert REFUSED[model_type] in str(error.value)


@pytest.mark.parametrize("model_type", ["bert", "ctrl", "mamba"])
def test_families_that_are_not_listed_are_not_guessed(model_type):
    with pytest.raises(ValueError, match=r"is not supported: .*a guess could give wrong answers.*Supported: afmoe"):
        MHCConfig.from_base(CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_causal_language_model_is_in_the_table_or_refused_before_anything_is_written(model_type, tmp_path):
    if CONFIG_MAPPING[model_type].model_type in FAMILIES:
        return
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(ConversionError, match=r"cannot be widened: |is not supported: |is a composite one: "):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(ValueError, match=rf"`base_model_type='{model_type}'`"):
        MHCConfig(base_model_type=model_type)


def test_a_composite_checkpoint_names_its_decoder():
    with pytest.raises(ValueError, match=r"composite one: it holds a gemma3_text decoder beside"):
        MHCConfig(base_model_type="gemma3")


def test_a_learned_residual_scale_is_not_taken_for_a_plain_addition():
    """The family that fitted by its attributes' names and gave wrong answers."""
    doge = AutoModelForCausalLM.from_config(CONFIG_MAPPING["doge"](hidden_size=12, num_hidden_layers=1, vocab_size=9))
    with pytest.raises(ValueError, match="learned weights"):
        MHCForCausalLM.from_base(doge)


@pytest.mark.parametrize("config_class", [Gemma3Config, Qwen3_5Config])
def test_composite_configurations_name_the_part_to_pass(config_class):
    config = config_class()
    with pytest.raises(ValueError, match=r"composite one.*holds a \w+TextConfig.*get_text_config"):
        MHCConfig.from_base(config)
    assert MHCConfig.from_base(config.get_text_config()).base_model_type == config.get_text_config().model_type


@pytest.mark.parametrize(
    ("model_type", "field", "value"),
    [
        ("opt", "do_layer_norm_before", False),
        ("opt", "layerdrop", 0.1),
        ("xglm", "layerdrop", 0.1),
        ("biogpt", "layerdrop", 0.1),
        ("xglm", "add_cross_attention", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt_bigcode", "add_cross_attention", True),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(model_type, field, value):
    config = family_config(model_type, **{field: value})
    with pytest.raises(ValueError, match=f"`{field}={value!r}` of this {model_type} configuration cannot be widened"):
        MHCConfig.from_base(config)
    # nor is one that was written by hand
    fields = {name: v for name, v in config.to_dict().items() if name not in ("model_type", "transformers_version")}
    with pytest.raises(ValueError, match=f"`{field}={value!r}`"):
        MHCForCausalLM(MHCConfig(base_model_type=model_type, **fields))


def test_a_layer_that_transformers_has_changed_is_refused(monkeypatch):
    other = sublayers.pre_norm("input_layernorm", sublayers.attention(), "second_norm", "mlp")
    monkeypatch.setitem(FAMILIES, "llama", Family((other,)))
    with pytest.raises(ValueError, match="LlamaDecoderLayer of the installed transformers has no `second_norm`"):
        MHCForCausalLM.from_base(tiny_model("llama"))


def test_a_family_that_transformers_does_not_have_yet_breaks_nothing(monkeypatch):
    monkeypatch.setitem(FAMILIES, "llama_of_tomorrow", FAMILIES["llama"])
    assert "llama_of_tomorrow" not in supported_families() and "llama" in supported_families()
    assert isinstance(MHCForCausalLM.from_base(tiny_model("llama")), MHCForCausalLM)
    with pytest.raises(ValueError, match="must be a model type that this version of transformers knows"):
        MHCConfig(base_model_type="llama_of_tomorrow")


@pytest.mark.parametrize("model_type", ["stablelm", "gpt_neox", "falcon", "phi", "phi3", "starcoder2", "opt", "gpt2"])
def test_dropout_is_where_the_family_has_it(model_type):
    """In training the two models draw the same masks in the same order, so they agree while both drop."""
    rates = dict(hidden_dropout=0.4, attention_dropout=0.0, resid_pdrop=0.4, embd_pdrop=0.0, attn_pdrop=0.0)
    more = {"opt": dict(dropout=0.4), "starcoder2": dict(residual_dropout=0.4)}.get(model_type, {})
    base = family_model(model_type, **rates, **more)
    widened = MHCForCausalLM.from_base(base)
    tokens = torch.arange(2, 22)[None]
    logits = []
    for model in (base, widened):
        torch.manual_seed(0)
        with torch.no_grad():
            logits.append(model.train()(tokens).logits)
    assert not torch.allclose(logits[0], base.eval()(tokens).logits, atol=1e-2), "nothing was dropped"
    assert float((logits[1] - logits[0]).abs().max() / logits[0].abs().max()) <= 1e-5


def test_a_base_whose_modules_are_not_its_own_is_refused():
    """Its weights would be left out without a word."""
    peft = pytest.importorskip("peft")
    base = tiny_model("llama")
    base.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"not a LlamaForCausalLM as it was made: .*q_proj.*Merge or unload adapters"):
        MHCForCausalLM.from_base(base)


def test_aliases_and_names_of_classes(tmp_path):
    from mhc_hf.modeling import configuration_mhc, families

    # gpt-sw3 is another name for gpt2's configuration
    assert configuration_mhc.MHCGPT2Config.base_model_type == "gpt2"
    assert families.MHCGPTNeoXForCausalLM.config_class.base_model_type == "gpt_neox"
    with pytest.raises(AttributeError, match="MHCBertModel"):
        _ = families.MHCBertModel
    with pytest.raises(AttributeError, match="MHCNoSuchConfig"):
        _ = configuration_mhc.MHCNoSuchConfig


@pytest.mark.slow
def test_importing_the_package_imports_no_family():
    code = "import sys, mhc_hf; print([m for m in sys.modules if m.startswith('transformers.models.llama.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_an_unfit_base_is_refused_by_its_path(tmp_path):
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "minimax"}')
    with pytest.raises(ValueError, match="`base_model_type='minimax'` cannot be widened"):
        MHCForCausalLM.from_base(tmp_path)
