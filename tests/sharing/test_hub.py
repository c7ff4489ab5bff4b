"""Pushed to a Hub and loaded from it by id, with the real huggingface_hub against a small Hub on loopback."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mhc_hf.sharing import CODE_FILE
from tests.conversion.hub_server import Hub

from .conftest import run_stranger
from .stranger import TOKENS

pytestmark = pytest.mark.slow


@torch.no_grad()
def test_code_is_pushed_with_a_model_and_loads_by_id(folders, tmp_path, torch_path):
    llama, results = folders / "llama", tmp_path / "results.pt"
    (tmp_path / "new").mkdir()
    with Hub({"team/llama-3.2-mhc": llama}, new=tmp_path / "new") as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0"}
        environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        run_stranger([Path(__file__).with_name("hub_stranger.py"), llama, results], tmp_path / "home", **environment)
        commit = hub.commit("team/llama-3.2-mhc")
    found = torch.load(results, weights_only=False)
    module, logits = found.pop("loaded")
    assert module == f"transformers_modules.team.llama_hyphen_3_dot_2_hyphen_mhc.{commit}.modeling_mhc"
    expected = AutoModelForCausalLM.from_pretrained(llama)(TOKENS).logits
    for name, seen in {"loaded": logits, **found}.items():
        assert (seen - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    named = json.loads((llama / "config.json").read_text())["auto_map"]
    pushed = sorted((tmp_path / "new").iterdir())
    assert [folder.name for folder in pushed] == [
        "team--pushed-by-a-stranger",
        "team--pushed-by-the-package",
        "team--uploaded",
    ]
    for folder in pushed:
        assert (folder / CODE_FILE).read_bytes() == (llama / CODE_FILE).read_bytes(), folder
        assert json.loads((folder / "config.json").read_text())["auto_map"] == named, folder
        assert (folder / "README.md").is_file() and list(folder.glob("*.safetensors")), folder
