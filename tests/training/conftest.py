"""A small widened model, a small dataset, and Trainer set up to be repeatable to the bit."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from mhc_hf import HyperConnection, MHCForCausalLM

from ..conftest import VOCAB_SIZE


class Rows(Dataset):
    """[length, 17] random tokens, each row its own label; the same on every machine."""

    def __init__(self, length=24):
        self.tokens = torch.randint(2, VOCAB_SIZE, (length, 17), generator=torch.Generator().manual_seed(7))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def training_arguments(output_dir, **overrides):
    fields = dict(
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    return TrainingArguments(output_dir=str(output_dir), **(fields | overrides))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def hc_parameters(model):
    """The mHC parameters by name, wherever PEFT or a wrapper has put them."""
    return {
        f"{name}.{part}": parameter
        for name, module in model.named_modules()
        if isinstance(module, HyperConnection)
        for part, parameter in module.named_parameters()
    }


@pytest.fixture
def widened(llama):
    return MHCForCausalLM.from_base(copy.deepcopy(llama))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """A process group of this process alone."""
    store = tmp_path_factory.mktemp("one_rank") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
