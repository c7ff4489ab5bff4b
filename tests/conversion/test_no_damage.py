"""Nothing that is saved into a converted folder reaches the base, and what is saved there loads.

The base's files are links in the converted folder where the filesystem has no clones. safetensors up to 0.7 writes
through a link, later ones replace the file; so the tests look at both sides: the base's bytes are what they were, and
no writer has so much as touched the names under which they are shared.
"""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mhc_hf.conversion import UnusableOutput, convert_checkpoint
from tests.conversion.conftest import bits, logits_of, snapshot


def as_hub_cache(folder, cache):
    """The files of `folder` as huggingface_hub keeps them: blobs by digest, and a snapshot of links to them."""
    blobs, commit = cache / "blobs", cache / "snapshots" / ("c0ffee" * 7)[:40]
    blobs.mkdir(parents=True)
    commit.mkdir(parents=True)
    for path in folder.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, blobs / digest)
        os.symlink(os.path.join("..", "..", "blobs", digest), commit / path.name)
    folder.rmdir()
    return commit


@pytest.fixture(params=["folder", "sharded folder", "hub cache"])
def kept_base(request, tmp_path):
    """A base, and the folder in which nothing may change."""
    base = request.getfixturevalue("sharded_base" if request.param == "sharded folder" else "base")
    if request.param == "hub cache":
        return as_hub_cache(base, tmp_path / "cache"), tmp_path / "cache"
    return base, base


@pytest.fixture
def converted(kept_base, tmp_path):
    base, kept = kept_base
    before = snapshot(kept)
    convert_checkpoint(base, tmp_path / "out")
    assert snapshot(kept) == before
    return tmp_path / "out"


def shared(folder):
    """The files that came from the base: which they are on the disk, and when they were last written."""
    found = {path.name: path.stat() for path in folder.glob("base-*")}
    assert found
    return {name: (status.st_ino, status.st_mtime_ns, status.st_size) for name, status in found.items()}


def changed_model(folder):
    """The model of a folder, every weight of it changed."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def assert_loads_as(folder, model, token_ids):
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded, token_ids), logits_of(model.eval(), token_ids))


@pytest.mark.parametrize("size", ["50GB", "100kB"])
def test_saving_into_the_converted_folder_leaves_the_base_alone(kept_base, converted, token_ids, size):
    _, kept = kept_base
    before = bits(kept), shared(converted)
    model = changed_model(converted)
    model.save_pretrained(converted, max_shard_size=size)
    assert (bits(kept), shared(converted)) == before
    assert_loads_as(converted, model, token_ids)


def test_saving_while_the_loaded_model_still_maps_the_base(kept_base, converted, token_ids):
    """The first model's weights may be read from the base's file lazily: it too must stay what it was."""
    _, kept = kept_base
    before = bits(kept), shared(converted)
    first = AutoModelForCausalLM.from_pretrained(converted)
    expected = logits_of(first, token_ids)
    changed_model(converted).save_pretrained(converted)
    assert (bits(kept), shared(converted)) == before and torch.equal(logits_of(first, token_ids), expected)


@pytest.mark.slow
def test_a_trainer_that_saves_into_the_converted_folder_leaves_the_base_alone(kept_base, converted, token_ids):
    _, kept = kept_base
    before = bits(kept), shared(converted)
    model = AutoModelForCausalLM.from_pretrained(converted)
    rows = [{"input_ids": row, "labels": row} for row in token_ids]
    arguments = TrainingArguments(
        output_dir=str(converted),
        max_steps=2,
        save_steps=1,
        save_total_limit=1,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(converted))
    assert (bits(kept), shared(converted)) == before
    assert_loads_as(converted, trainer.model, token_ids)
    assert_loads_as(converted / "checkpoint-2", trainer.model, token_ids)


@pytest.mark.slow
def test_an_adapter_saved_into_the_converted_folder_leaves_the_base_alone(kept_base, converted):
    _, kept = kept_base
    before = bits(kept), shared(converted)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(converted), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(converted)
    assert (bits(kept), shared(converted)) == before and (converted / "adapter_model.safetensors").is_file()


def test_converting_again_with_overwrite_leaves_the_base_alone(kept_base, converted):
    base, kept = kept_base
    before = bits(kept)
    first = bits(converted)
    convert_checkpoint(base, converted, hc_mult=3, overwrite=True)
    assert bits(kept) == before and bits(converted) != first
    convert_checkpoint(base, converted, overwrite=True)
    assert bits(kept) == before and bits(converted) == first
    assert sorted(path.name for path in converted.parent.iterdir() if path.name.startswith(".")) == []


def test_what_was_saved_into_the_folder_is_not_overwritten(kept_base, converted):
    base, _ = kept_base
    changed_model(converted).save_pretrained(converted)
    before = snapshot(converted)
    with pytest.raises(UnusableOutput, match=r"model\.safetensors"):
        convert_checkpoint(base, converted, overwrite=True)
    assert snapshot(converted) == before


def test_removing_the_converted_folder_leaves_the_base_whole(kept_base, converted):
    _, kept = kept_base
    before = bits(kept)
    shutil.rmtree(converted)
    assert bits(kept) == before


def test_removing_the_base_leaves_the_converted_folder_whole(kept_base, converted, token_ids):
    _, kept = kept_base
    before = logits_of(AutoModelForCausalLM.from_pretrained(converted), token_ids)
    shutil.rmtree(kept)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(converted), token_ids), before)


def test_weights_go_over_without_being_read_or_copied(kept_base, converted):
    """Where the filesystem clones nothing, they are the same file; no other file of the folder is anybody else's."""
    _, kept = kept_base
    originals = {(path.stat().st_dev, path.stat().st_ino): path for path in kept.rglob("*") if path.is_file()}
    for path in converted.iterdir():
        original = originals.get((path.stat().st_dev, path.stat().st_ino))
        if original is not None:
            assert path.name.startswith("base-") and load_file(original).keys() == load_file(path).keys()
        else:
            assert path.stat().st_nlink == 1 and not path.is_symlink()


def test_the_converted_folder_can_be_listed_by_others(converted):
    mask = os.umask(0o022)
    os.umask(mask)
    assert Path(converted).stat().st_mode & 0o777 == 0o777 & ~mask
