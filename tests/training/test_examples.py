"""Each example runs as its first lines say, on a tiny checkpoint and a text file, and leaves what it promises."""

import json
from pydoc_data.topics import topics

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from mhc_hf import MHCForCausalLM
from mhc_hf.training.pipeline import GREETS_ITSELF

from ..conftest import tiny_model
from .launching import ROOT, run_python
from .two_ranks import GROUPS_BY_DTYPE

pytestmark = pytest.mark.slow
SMALL = ["--max-steps", "3", "--batch-size", "4", "--context", "24"]
SCRIPTS = ["finetune_lora.py", "finetune_full.py", "pretrain.py", "finetune_pipeline.py"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/ and widened/, with tokenizers, and text.txt."""
    folder = tmp_path_factory.mktemp("examples")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    base = tiny_model("llama", vocab_size=257, num_hidden_layers=4)
    for name, model in (("base", base), ("widened", MHCForCausalLM.from_base(base))):
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / name)
    (folder / "text.txt").write_text(topics["assignment"][:4000])
    return folder


def run_example(name, folder, *arguments, model="base", ranks=1):
    output = folder / f"{name}-{model}-{ranks}"
    printed = run_python(
        ROOT / "examples" / name, folder / model, folder / "text.txt", "--output", output, *arguments, ranks=ranks
    )
    # once, so that two ranks are one run
    assert printed.count(f"\n{output}:") + printed.startswith(f"{output}:") == 1, printed
    return output


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path).state_dict()


def assert_trained(before, after):
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert value.isfinite().all() and not torch.equal(value, before[name]), name
    assert {value.dtype for name, value in after.items() if "_hc." in name} == {torch.float32}


def test_lora_leaves_an_adapter_and_goes_on_where_it_was_stopped(folder):
    output = run_example("finetune_lora.py", folder, *SMALL, "--rank", "2")
    adapted = PeftModel.from_pretrained(MHCForCausalLM.from_base(folder / "base"), output)
    before = dict(MHCForCausalLM.from_base(folder / "base").named_parameters())
    site = adapted.base_model.model.model.layers[1].attn_hc
    assert not torch.equal(site.bias, before["model.layers.1.attn_hc.bias"])
    run_example("finetune_lora.py", folder, "--max-steps", "5", *SMALL[2:], "--rank", "2")
    state = json.loads((output / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["global_step"] == 5 and (output / "checkpoint-4").is_dir()


# transformers 5.17 wraps a sharded model in DDP
@pytest.mark.parametrize(("model", "ranks"), [("base", 1), *([("widened", 2)] if GROUPS_BY_DTYPE else [])])
def test_full_leaves_a_trained_model(folder, model, ranks):
    sharded = ["--fsdp-size", "2"] if ranks == 2 else []
    output = run_example("finetune_full.py", folder, *SMALL, "--lr", "1e-3", *sharded, model=model, ranks=ranks)
    assert_trained(weights(folder / "widened"), weights(output))
    assert AutoTokenizer.from_pretrained(output)("x").input_ids


def test_pretraining_leaves_a_model_of_the_papers_start(folder):
    output = run_example("pretrain.py", folder, *SMALL, "--hc-mult", "2")
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.hc_mult == 2 and model.config.hc_start == "paper"
    # three steps away from 0.01 by at most the learning rate each
    assert 0 < float((model.model.layers[0].attn_hc.alpha.detach() - 0.01).abs().max()) <= 3.1 * 3e-4


def test_pipeline_leaves_a_trained_model(folder):
    schedule = ["--schedule", "Interleaved1F1B"] if GREETS_ITSELF else []
    arguments = [*SMALL, "--microbatches", "4", "--lr", "1e-3", *schedule]
    output = run_example("finetune_pipeline.py", folder, *arguments, ranks=2)
    assert_trained(weights(folder / "widened"), weights(output))


@pytest.mark.parametrize("script", SCRIPTS)
def test_first_lines_name_the_script_and_what_it_takes(script):
    text = (ROOT / "examples" / script).read_text()
    assert f"examples/{script} " in text.split('"""')[1]
    assert "argparse.ArgumentParser(description=__doc__" in text


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "configs").iterdir()), ids=lambda path: path.name)
def test_configurations_are_ones_that_accelerate_and_deepspeed_read(path):
    if path.suffix == ".json":
        config = json.loads(path.read_text())
        # DeepSpeed's bf16 would hand hyper-connections bf16 parameters
        assert not config["bf16"]["enabled"] and config["torch_autocast"]["enabled"]
    else:
        config = load_config_from_file(str(path))
        assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
