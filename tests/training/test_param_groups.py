"""mhc_param_groups: every trainable parameter once, decayed where it should be, at its own learning rate."""

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from mhc_hf import MHCForCausalLM
from mhc_hf.training import mhc_lora_config, mhc_param_groups

from ..conftest import tiny_model
from .conftest import Rows, losses, training_arguments


def names_by_group(model, groups):
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: [name_of[id(parameter)] for parameter in group["params"]] for group in groups}


def freeze_embeddings(model):
    model.model.embed_tokens.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model: model,
        freeze_embeddings,
        lambda model: get_peft_model(model, mhc_lora_config(model)),
        lambda model: get_peft_model(model, mhc_lora_config(model, "lora")),
        lambda model: get_peft_model(model, mhc_lora_config(model, "mhc")),
    ],
    ids=["whole", "partly frozen", "lora+mhc", "lora", "mhc"],
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_trainable_parameter_is_in_one_group(prepare, tied):
    model = prepare(MHCForCausalLM.from_base(tiny_model("qwen2", tie_word_embeddings=tied)))
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    grouped = [name for names in names_by_group(model, mhc_param_groups(model, 1e-3)).values() for name in names]
    assert sorted(grouped) == sorted(trainable)


@pytest.mark.parametrize("adapted", [False, True])
def test_phi_decays_and_gates_and_biases_do_not(widened, adapted):
    model = get_peft_model(widened, mhc_lora_config(widened)) if adapted else widened
    groups = mhc_param_groups(model, 1e-3, hc_lr=3e-4, weight_decay=0.1)
    names = names_by_group(model, groups)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "base": (1e-3, 0.1),
        **({} if adapted else {"base_no_decay": (1e-3, 0.0)}),
        "hc": (3e-4, 0.1),
        "hc_no_decay": (3e-4, 0.0),
    }
    assert {name.rpartition(".")[2] for name in names["hc"]} == {"phi"}
    assert {name.rpartition(".")[2] for name in names["hc_no_decay"]} == {"bias", "alpha"}
    assert len(names["hc"]) == 6 and len(names["hc_no_decay"]) == 12
    if not adapted:
        assert set(names["base_no_decay"]) == {name for name, _ in model.named_parameters() if "norm" in name}


def test_learning_rate_of_mhc_defaults_to_the_bases(widened):
    assert {group["lr"] for group in mhc_param_groups(widened, 2e-4)} == {2e-4}


def test_trainer_schedules_both_rates_and_trains_with_them(widened, tmp_path):
    before = copy.deepcopy(widened.state_dict())
    optimizer = torch.optim.AdamW(mhc_param_groups(widened, 1e-3, hc_lr=1e-5, weight_decay=0.01))
    arguments = training_arguments(tmp_path, max_steps=3)
    trainer = Trainer(widened, arguments, train_dataset=Rows(), optimizers=(optimizer, None))
    trainer.train()
    assert len(losses(trainer)) == 3
    # linear decay to zero over three steps
    assert [group["lr"] for group in optimizer.param_groups] == [0.0] * 4
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 1e-5, 1e-5]
    moved = {name: float((value - before[name]).abs().max()) for name, value in widened.state_dict().items()}
    # Adam moves a parameter by about its learning rate a step: 1 + 2/3 + 1/3 of it in all, and not by ten times that
    assert all(0 < change <= 2.1e-5 for name, change in moved.items() if "_hc." in name)
    assert all(1e-4 < change for name, change in moved.items() if "_hc." not in name)


def test_trainer_makes_the_optimizer_itself_from_the_groups(widened, tmp_path):
    groups = mhc_param_groups(widened, 1e-3, hc_lr=5e-4, weight_decay=0.1)
    trainer = Trainer(
        widened,
        training_arguments(tmp_path),
        train_dataset=Rows(),
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": 1e-3}),
    )
    made = trainer.create_optimizer().param_groups
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in made] == [
        ("base", 1e-3, 0.1),
        ("base_no_decay", 1e-3, 0.0),
        ("hc", 5e-4, 0.1),
        ("hc_no_decay", 5e-4, 0.0),
    ]
    assert sum(len(g["params"]) for g in made) == len(list(widened.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(lr=0.0), r"`lr` must be > 0, got 0.0"),
        (dict(lr=float("nan")), r"`lr` must be > 0, got nan"),
        (dict(lr=1e-3, hc_lr=-1.0), r"`hc_lr` must be > 0, got -1.0"),
        (dict(lr=1e-3, weight_decay=-0.1), r"`weight_decay` must be >= 0, got -0.1"),
    ],
)
def test_numbers_out_of_range_are_named(widened, arguments, message):
    with pytest.raises(ValueError, match=message):
        mhc_param_groups(widened, **arguments)


def test_models_without_anything_to_train_are_named(llama, widened):
    with pytest.raises(ValueError, match="LlamaForCausalLM without a HyperConnection"):
        mhc_param_groups(llama, 1e-3)
    with pytest.raises(ValueError, match="frozen throughout"):
        mhc_param_groups(widened.requires_grad_(False), 1e-3)
