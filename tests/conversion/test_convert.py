"""A conversion keeps every bit of the base, computes what it computes, and loads like any other model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
)

from mhc_hf import HyperConnection, MHCForCausalLM
from mhc_hf.conversion import convert_checkpoint, verify_conversion
from mhc_hf.conversion.compare import changed_tensors
from mhc_hf.conversion.takeover import copy, share
from tests.conftest import tiny_model
from tests.conversion.conftest import CHAT_TEMPLATE, bits, logits_of, save_base
from tests.modeling.family_models import family_model

# float32 rounding of some ten operations a site, over the six sites of these models
TOLERANCE = 1e-5


def stored(folder):
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def is_mhc(name):
    return "attn_hc." in name or "ffn_hc." in name


def assert_same_function(base, converted, token_ids):
    expected = logits_of(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), token_ids)
    model, info = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(model, MHCForCausalLM)
    difference = (logits_of(model, token_ids) - expected).abs().max()
    assert difference <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("hc_mult", [2, 3, 4, 8])
def test_the_state_dict_is_the_bases_and_the_mhc_parameters(base, tmp_path, hc_mult, token_ids):
    convert_checkpoint(base, tmp_path / "out", hc_mult=hc_mult)
    before, after = stored(base), stored(tmp_path / "out")
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    added = {name: tensor for name, tensor in after.items() if name not in before}
    assert all(is_mhc(name) and tensor.dtype == torch.float32 for name, tensor in added.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.state_dict().keys() == after.keys()
    assert_same_function(base, tmp_path / "out", token_ids)


# LLaMA's names, experts stored one by one, a head under another name, no `model.` prefix, norms after branches
@pytest.mark.parametrize("family", ["qwen2", "mixtral", "gpt_neox", "gpt2", "gemma2", "olmo2"])
def test_families_that_are_stored_differently_convert(tmp_path, family):
    family_model(family).save_pretrained(tmp_path / "base")
    report = convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert report.family == family
    verified = verify_conversion(tmp_path / "base", tmp_path / "out")
    assert verified, str(verified)


def test_a_sharded_base_keeps_its_shards(sharded_base, tmp_path, token_ids):
    report = convert_checkpoint(sharded_base, tmp_path / "out")
    shards = sorted(sharded_base.glob("*.safetensors"))
    taken = sorted((tmp_path / "out").glob("base-*.safetensors"))
    assert len(shards) > 2 and [path.read_bytes() for path in taken] == [path.read_bytes() for path in shards]
    assert report.bytes_cloned + report.bytes_linked == sum(path.stat().st_size for path in shards)
    assert_same_function(sharded_base, tmp_path / "out", token_ids)


def test_the_mhc_parameters_are_those_of_from_base(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out", hc_mult=3, start="copies")
    in_memory = MHCForCausalLM.from_base(base, hc_mult=3, start="copies").state_dict()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert in_memory.keys() == loaded.keys()
    assert all(torch.equal(in_memory[name], loaded[name]) for name in loaded)


def test_tied_embeddings_stay_tied(tmp_path, token_ids):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert "lm_head.weight" not in stored(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_function(tmp_path / "base", tmp_path / "out", token_ids)


def test_a_base_saved_without_its_head_converts(tmp_path, token_ids):
    """Its keys lack the `model.` prefix, and the head is tied: as the GPT-2 of the Hub is stored."""
    tiny_model("llama", tie_word_embeddings=True).model.save_pretrained(tmp_path / "base")
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert_same_function(tmp_path / "base", tmp_path / "out", token_ids)


def test_auto_model_loads_the_decoder_alone(base, tmp_path, token_ids):
    convert_checkpoint(base, tmp_path / "out")
    model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and any(isinstance(module, HyperConnection) for module in model.modules())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_pickled_base_becomes_safetensors_with_the_same_bits(base, tmp_path, sharded, token_ids):
    state = load_file(base / "model.safetensors")
    if sharded:
        names = sorted(state)
        parts = {f"pytorch_model-0000{part + 1}-of-00002.bin": names[part::2] for part in range(2)}
        weight_map = {name: file for file, held in parts.items() for name in held}
        index = {"metadata": {}, "weight_map": weight_map}
        (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        parts = {"pytorch_model.bin": list(state)}
    for file, held in parts.items():
        torch.save({name: state[name] for name in held}, base / file)
    (base / "model.safetensors").unlink()
    convert_checkpoint(base, tmp_path / "out")
    after = stored(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert not list((tmp_path / "out").glob("*.bin"))
    assert len(list((tmp_path / "out").glob("base-*"))) == len(parts)
    assert_same_function(base, tmp_path / "out", token_ids)


def test_weights_under_a_name_of_their_own_are_found(base, tmp_path, token_ids):
    (base / "model.safetensors").rename(base / "mine.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"transformers_weights": "mine.safetensors"}
    (base / "config.json").write_text(json.dumps(config))
    convert_checkpoint(base, tmp_path / "out")
    assert_same_function(base, tmp_path / "out", token_ids)


def test_casting_streams_the_base_and_leaves_mhc_float32(sharded_base, tmp_path):
    report = convert_checkpoint(sharded_base, tmp_path / "out", dtype="bfloat16")
    before, after = stored(sharded_base), stored(tmp_path / "out")
    for name, tensor in before.items():
        assert after[name].dtype == torch.bfloat16 and torch.equal(after[name], tensor.bfloat16()), name
    assert {tensor.dtype for name, tensor in after.items() if is_mhc(name)} == {torch.float32}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert report.bytes_linked == report.bytes_copied == 0


def test_casting_to_the_dtype_it_has_shares_the_shards(base, tmp_path):
    report = convert_checkpoint(base, tmp_path / "out", dtype=torch.float32)
    assert report.bytes_cloned + report.bytes_linked == (base / "model.safetensors").stat().st_size


def test_copies_share_nothing_with_the_base(base, tmp_path):
    report = convert_checkpoint(base, tmp_path / "out", copy=True)
    shard = tmp_path / "out" / "base-00001-of-00001.safetensors"
    assert report.bytes_copied == shard.stat().st_size and shard.stat().st_nlink == 1
    assert shard.read_bytes() == (base / "model.safetensors").read_bytes()


def test_another_filesystem_gets_copies(base, tmp_path):
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == base.stat().st_dev:
        pytest.skip("there is no second filesystem here")
    elsewhere = shared_memory / f"mhc-{tmp_path.name}-{tmp_path.stat().st_ino}"
    elsewhere.mkdir()
    try:
        weights = base / "model.safetensors"
        assert share(weights, elsewhere / "shared") is None and not (elsewhere / "shared").exists()
        heard = []
        copy(weights, elsewhere / "copied", heard.append)
        assert (elsewhere / "copied").read_bytes() == weights.read_bytes() and sum(heard) == weights.stat().st_size
        report = convert_checkpoint(base, elsewhere / "out")
        assert report.bytes_copied == weights.stat().st_size and report.bytes_linked == report.bytes_cloned == 0
    finally:
        shutil.rmtree(elsewhere)


def test_tokenizer_chat_template_and_generation_config_come_along(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "out"))
    text = "The import statement, (in its simplest form), binds names."
    assert one(text).input_ids == other(text).input_ids and other.decode(other(text).input_ids)
    assert type(one) is type(other) and one.special_tokens_map == other.special_tokens_map
    assert other.chat_template == CHAT_TEMPLATE
    chat = [{"role": "user", "content": "names"}]
    assert one.apply_chat_template(chat, tokenize=False) == other.apply_chat_template(chat, tokenize=False)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.max_new_tokens, generation.temperature) == (7, 0.7)


def test_licence_and_card_come_along(base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == (base / "LICENSE").read_text()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "import mhc_hf" in card and "AutoModelForCausalLM" in card


def test_a_base_without_tokenizer_converts_and_the_report_says_so(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    report = convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert not report.has_tokenizer and "the base has none" in str(report)


def test_the_report_counts_what_was_done(base, tmp_path):
    report = convert_checkpoint(base, tmp_path / "out")
    before, after = stored(base), stored(tmp_path / "out")
    assert report.parameters_before == sum(tensor.numel() for tensor in before.values())
    assert report.parameters_added == sum(tensor.numel() for tensor in after.values()) - report.parameters_before
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir() if not path.name.startswith("base-"))
    # the manifest lists the others, and is not listed
    assert report.bytes_written == written - (tmp_path / "out" / "mhc_conversion.json").stat().st_size
    for words in (
        "llama",
        f"{report.parameters_before:,}",
        f"{report.parameters_added:,}",
        "%",
        " s",
        "from_pretrained",
    ):
        assert words in str(report)


def test_the_folder_does_not_say_where_it_was_made(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert_checkpoint("base", "out")
    for path in Path("out").rglob("*"):
        if path.suffix in (".json", ".md", ".jinja"):
            assert str(tmp_path) not in path.read_text(), path


def test_parents_are_made_and_an_empty_folder_is_taken(base, tmp_path):
    (tmp_path / "empty").mkdir()
    convert_checkpoint(base, tmp_path / "empty")
    convert_checkpoint(base, tmp_path / "a" / "b" / "out")
    assert bits(tmp_path / "empty").keys() == bits(tmp_path / "a" / "b" / "out").keys()


def test_a_linked_output_is_made_where_the_link_points(base, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    convert_checkpoint(base, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "mhc.safetensors").is_file()


def test_two_conversions_of_one_base_are_alike(base, tmp_path):
    for name in ("one", "other"):
        convert_checkpoint(base, tmp_path / name)
    assert bits(tmp_path / "one") == bits(tmp_path / "other")


def test_comparing_sees_one_flipped_bit(base, tmp_path):
    from mhc_hf.conversion.checkpoint import read_checkpoint, read_config
    from mhc_hf.conversion.source import open_source

    convert_checkpoint(base, tmp_path / "out", copy=True)

    def changed():
        sources = [open_source(base), open_source(tmp_path / "out")]
        one, other = (read_checkpoint(source, read_config(source)) for source in sources)
        return changed_tensors(one, other, None)

    assert changed() == []
    path = tmp_path / "out" / "base-00001-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert len(changed()) == 1


def test_saving_a_conversion_elsewhere_and_loading_it_gives_the_same_logits(base, tmp_path, token_ids):
    convert_checkpoint(base, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "saved", max_shard_size="100kB")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits_of(again, token_ids), logits_of(model, token_ids))


def test_a_base_of_two_kinds_of_licence_file_keeps_both(tmp_path):
    save_base(tiny_model("llama"), tmp_path / "base")
    (tmp_path / "base" / "NOTICE.txt").write_text("Made by somebody.\n")
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert {"LICENSE", "NOTICE.txt"} <= {path.name for path in (tmp_path / "out").iterdir()}
