"""Self-contained folders of eight families, and what a process without the package makes of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mhc_hf.conversion import convert_checkpoint
from mhc_hf.ops import functional
from tests.conversion.conftest import base, save_base, saved_base  # noqa: F401  (fixtures)
from tests.modeling.family_models import family_model

# every residual form, experts, a window and a state
FAMILIES = ("gemma3_text", "gpt_neox", "granite", "llama", "olmo2", "phi", "qwen3_moe", "qwen3_next")
STRANGER = Path(__file__).with_name("stranger.py")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder for each family, named after it."""
    root = tmp_path_factory.mktemp("self-contained")
    for family in FAMILIES:
        save_base(family_model(family), root / "bases" / family)
        convert_checkpoint(root / "bases" / family, root / "folders" / family, self_contained=True)
    return root / "folders"


@pytest.fixture(scope="session")
def strangers(folders):
    """What `stranger.py` found, by family."""
    results = folders.parent / "results.pt"
    run_stranger([STRANGER, folders, results], folders.parent / "home")
    return torch.load(results, weights_only=False)


def run_stranger(arguments, home, **environment):
    """Run a script in a process that keeps the modules of transformers' remote code in `home`."""
    variables = os.environ | {"HF_HOME": str(home)} | environment
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def torch_path(monkeypatch):
    """The package computes in PyTorch, whatever else it could take here."""
    choose = functional.choose_backend
    monkeypatch.setattr(functional, "choose_backend", lambda backend, *rest: choose("torch", *rest))
