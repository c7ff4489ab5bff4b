"""Runs that are killed and resumed are the runs that are not, and half a checkpoint is never taken for a whole one."""

import copy
import json
import os
import shutil
import signal

import pytest
from transformers import Trainer

from mhc_hf import MHCForCausalLM
from mhc_hf.training import last_complete_checkpoint

from ..conftest import tiny_model
from .conftest import Rows, training_arguments
from .killed import same_to_the_bit
from .launching import run_python


@pytest.fixture(scope="module")
def two_checkpoints(llama, tmp_path_factory):
    """A folder with checkpoint-2 and checkpoint-10: as numbers, not as words, the second is the newer one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = MHCForCausalLM.from_base(copy.deepcopy(llama))
    arguments = training_arguments(folder, max_steps=10, save_strategy="steps", save_steps=2)
    Trainer(model, arguments, train_dataset=Rows()).train()
    for step in (4, 6, 8):
        shutil.rmtree(folder / f"checkpoint-{step}")
    return folder


def test_the_newest_whole_checkpoint_is_found(two_checkpoints):
    assert last_complete_checkpoint(two_checkpoints) == str(two_checkpoints / "checkpoint-10")


def test_where_there_is_none_there_is_none(tmp_path):
    assert last_complete_checkpoint(tmp_path / "not yet there") is None
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    assert last_complete_checkpoint(tmp_path) is None


def test_a_checkpoint_with_any_file_cut_off_is_passed_over(two_checkpoints, tmp_path):
    names = sorted(path.name for path in (two_checkpoints / "checkpoint-10").iterdir())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(names)
    for name in names:
        for share in (0, 0.5, 0.99):
            shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
            path = tmp_path / "checkpoint-10" / name
            os.truncate(path, int(path.stat().st_size * share))
            assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2"), f"{share} of {name}"
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.slow
def test_a_run_killed_five_times_is_the_run_that_was_not_to_the_bit(tmp_path):
    # dropout, so that the state of the random numbers has to be restored too
    MHCForCausalLM.from_base(tiny_model("llama", attention_dropout=0.1)).save_pretrained(tmp_path / "model")
    run_python("-m", "tests.training.killed", tmp_path / "model", tmp_path, "--steps", "60", "--kills", "5")
    deaths = json.loads((tmp_path / "deaths.json").read_text())
    assert deaths["statuses"] == [0] + [signal.SIGKILL] * 5 + [0]
    # after both kills in a save the newest folder was half a checkpoint, which transformers itself would have taken
    assert deaths["half_written"] >= 2
    assert len(json.loads((tmp_path / "whole" / "losses.json").read_text())) == 60
    assert same_to_the_bit(tmp_path)
