"""Stages of a widened model, one after the other, are the model; what cannot be cut is refused."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from mhc_hf import MHCForCausalLM
from mhc_hf.modeling.families import supported_families
from mhc_hf.training import TrainingPipeline, split_into_stages
from mhc_hf.training import pipeline as pipelines

from ..conftest import tiny_model
from ..modeling.family_models import family_model

# learned positions, or layers that use what earlier ones have made
CANNOT_BE_CUT = {"biogpt", "gpt2", "gpt_bigcode", "gpt_neo", "modernbert-decoder", "opt"}
CANNOT_BE_CUT |= {"gemma4_text", "gemma4_unified_text", "glm_moe_dsa"}


def run_in_turn(stages, tokens, **context):
    out = tokens
    for index, stage in enumerate(stages):
        out = stage(out, **context)
        if index < len(stages) - 1:
            assert out.shape == (*tokens.shape, stage.model.config.hc_mult * 60)
    return out


@torch.no_grad()
@pytest.mark.parametrize("family", supported_families())
def test_stages_in_turn_give_the_models_logits_to_the_bit(family, token_ids):
    widened = MHCForCausalLM.from_base(family_model(family))
    tokens = token_ids[:, :23]
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    whole = widened(tokens, attention_mask=mask, use_cache=False).logits
    if family in CANNOT_BE_CUT or hasattr(widened.base_model, "embed_norm"):
        with pytest.raises(ValueError, match="FSDP2 or tensor parallelism"):
            split_into_stages(widened, 2)
    else:
        for num_stages in (1, 3):
            assert torch.equal(run_in_turn(split_into_stages(widened, num_stages), tokens, attention_mask=mask), whole)


def test_every_parameter_is_in_one_stage_under_its_own_name():
    widened = MHCForCausalLM.from_base(tiny_model("llama", num_hidden_layers=5))
    stages = split_into_stages(widened, 3)
    held = [(name, id(p)) for stage in stages for name, p in stage.model.named_parameters()]
    assert sorted(held) == sorted((name, id(p)) for name, p in widened.named_parameters())
    # as even as can be, the longer ones first
    assert [len({n.split(".")[2] for n in s.checkpoint() if ".layers." in n}) for s in stages] == [2, 2, 1]


def test_gradients_reach_every_stage(widened, token_ids):
    twin = copy.deepcopy(widened).train()
    twin(token_ids, labels=token_ids).loss.backward()
    out = run_in_turn(split_into_stages(widened.train(), 3), token_ids)
    widened.loss_function(out, token_ids, vocab_size=out.shape[-1]).backward()
    for name, parameter in twin.named_parameters():
        assert torch.equal(widened.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize("schedule", ["GPipe", *([] if pipelines.GREETS_ITSELF else ["ZBVZeroBubble"])])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_the_mean_over_labels_and_gradients_add_up(one_rank, tmp_path, schedule, tied):
    widened = MHCForCausalLM.from_base(tiny_model("llama", tie_word_embeddings=tied).double()).train()
    reference = copy.deepcopy(widened)
    tokens = torch.randint(2, 97, (4, 17), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    # micro-batches with very different numbers of labels
    labels[0, 2:] = -100
    mask = torch.ones_like(tokens)
    mask[3, :7] = 0
    pipeline = TrainingPipeline(widened, schedule, num_microbatches=4)
    for _ in range(2):
        loss = pipeline.step(tokens, labels, attention_mask=mask)
        expected = reference(tokens, labels=labels, attention_mask=mask).loss
        expected.backward()
        # transformers computes the loss in float32
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in reference.named_parameters():
        gradient = widened.get_parameter(name).grad
        # mHC gradients are rounded to float32 once a micro-batch and step
        assert float((gradient - parameter.grad).norm()) <= 1e-6 * float(parameter.grad.norm()), name
    pipeline.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == reference.state_dict().keys()
    assert all(torch.equal(value, reference.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b!", 2), "`schedule` must be one of 'GPipe', '1F1B', .* got '1f1b!'"),
        (("1F1B", 0), "`num_microbatches` must be an integer >= 1, got 0"),
        (("1F1B", 2.0), "`num_microbatches` must be an integer >= 1, got 2.0"),
    ],
)
def test_wrong_arguments_are_named(one_rank, widened, arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingPipeline(widened, *arguments)


def test_a_v_that_gloo_cannot_carry_is_refused(one_rank, widened, monkeypatch):
    monkeypatch.setattr(pipelines, "GREETS_ITSELF", True)
    with pytest.raises(RuntimeError, match="`schedule='DualPipeV'` over gloo needs a newer PyTorch"):
        TrainingPipeline(widened, "DualPipeV", 4)


def test_batches_that_do_not_divide_are_named(one_rank, widened, token_ids):
    pipeline = TrainingPipeline(widened, "GPipe", 4)
    with pytest.raises(ValueError, match="divisible by num_microbatches=4, got \\[2, 63\\]"):
        pipeline.step(token_ids, token_ids)
    with pytest.raises(ValueError, match="-100 throughout"):
        TrainingPipeline(widened, "GPipe", 2).step(token_ids, torch.full_like(token_ids, -100))


def test_models_that_cannot_be_cut_are_refused(llama, widened):
    with pytest.raises(ValueError, match="widened causal language model, got a LlamaForCausalLM"):
        split_into_stages(llama, 2)
    with pytest.raises(ValueError, match="from 1 to the number of layers \\(3\\), got 4"):
        split_into_stages(widened, 4)
    widened.model.adapter = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="got Linear `adapter` beside them"):
        split_into_stages(widened, 2)
