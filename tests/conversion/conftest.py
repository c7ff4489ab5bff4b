"""Bases to convert: small, real, saved by transformers itself, with everything that a model on the Hub has."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from mhc_hf.conversion.probe import SAMPLE
from tests.conftest import VOCAB_SIZE

CHAT_TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\n---\n\n# A small model\n"


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of operations on a few numbers each: a second thread costs several times what it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_tokenizer():
    """A byte-pair tokenizer trained on real text, with no more tokens than the tiny models know."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<unk>", "<s>", "</s>"]
    alphabet = list("abcdefghijklmnopqrstuvwxyz.,()")
    tokenizer.train_from_iterator(
        [SAMPLE.lower()],
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=specials,
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def save_base(model, folder, **kwargs):
    """`save_pretrained`, and beside the weights what belongs to a published model."""
    model.save_pretrained(folder, **kwargs)
    make_tokenizer().save_pretrained(folder)
    GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.7).save_pretrained(folder)
    Path(folder, "LICENSE").write_text("Do what you like.\n")
    Path(folder, "README.md").write_text(CARD)


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory, llama):
    folder = tmp_path_factory.mktemp("base") / "base"
    save_base(llama, folder)
    return folder


@pytest.fixture(scope="session")
def saved_sharded_base(tmp_path_factory, llama):
    folder = tmp_path_factory.mktemp("sharded") / "base"
    save_base(llama, folder, max_shard_size="100kB")
    return folder


@pytest.fixture
def base(tmp_path, saved_base):
    """A folder that this test may do anything to: `tmp_path / "base"`."""
    return Path(shutil.copytree(saved_base, tmp_path / "base"))


@pytest.fixture
def sharded_base(tmp_path, saved_sharded_base):
    return Path(shutil.copytree(saved_sharded_base, tmp_path / "base"))


def snapshot(folder):
    """Everything that a disk knows of a folder and below, but for times of access and the number of names of a file."""
    seen = {}
    for path in [Path(folder), *Path(folder).rglob("*")]:
        status = path.lstat()
        if path.is_symlink():
            content = os.readlink(path)
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else sorted(os.listdir(path))
        seen[str(path.relative_to(folder))] = (status.st_ino, status.st_mode, status.st_mtime_ns, content)
    return seen


def bits(folder):
    """Digest of every file below `folder`, by name: what must not change, even where times do."""
    return {name: content for name, (_, _, _, content) in snapshot(folder).items() if isinstance(content, str)}


def logits_of(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits
