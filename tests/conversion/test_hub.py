"""Conversions from a Hub id, with the real huggingface_hub against a small Hub on loopback.

huggingface_hub reads its address and its cache's place when it is imported, so every conversion here runs in one fresh
process that takes jobs and answers with what came of them.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import tiny_model
from tests.conversion.conftest import bits, save_base
from tests.conversion.hub_server import Hub

pytestmark = pytest.mark.slow

_WORKER = """
import json, sys
from mhc_hf.conversion import ConversionError, convert_checkpoint, verify_conversion

for line in sys.stdin:
    job = json.loads(line)
    try:
        if job.pop("verify", False):
            answer = {"verified": bool(verify_conversion(**job))}
        else:
            answer = {"report": str(convert_checkpoint(**job))}
    except ConversionError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print("ANSWER", json.dumps(answer), flush=True)
"""


class Worker:
    """A fresh process whose huggingface_hub talks to `address` and caches in `home`."""

    def __init__(self, address, home, **environment):
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE"))}
        variables |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
        variables |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
        )

    def __call__(self, **job):
        self.process.stdin.write(json.dumps({name: str(v) if name.endswith("dir") else v for name, v in job.items()}))
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError(f"the worker ended with {self.process.wait()}")

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, saved_sharded_base):
    """Repositories: one sharded, one pickled, one of a family that cannot be converted."""
    root = tmp_path_factory.mktemp("repos")
    model = tiny_model("qwen2")
    save_base(model, root / "pickled")
    state = load_file(root / "pickled" / "model.safetensors")
    torch.save(state, root / "pickled" / "pytorch_model.bin")
    (root / "pickled" / "model.safetensors").unlink()
    save_base(model, root / "single")
    # what many repositories hold besides, and nobody wants to download
    torch.save(state, root / "single" / "pytorch_model.bin")
    (root / "single" / "onnx").mkdir()
    (root / "single" / "onnx" / "model.onnx").write_bytes(bytes(1000))
    (root / "single" / "consolidated.safetensors").write_bytes((root / "single" / "model.safetensors").read_bytes())
    save_base(model, root / "unsupported")
    config = root / "unsupported" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "bert"}))
    return {
        "team/sharded": saved_sharded_base,
        "team/pickled": root / "pickled",
        "team/single": root / "single",
        "team/unsupported": root / "unsupported",
        "team/private": root / "single",
    }


@pytest.fixture(scope="module")
def hub(folders):
    with Hub(folders, private=["team/private"]) as running:
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def worker(hub, home):
    running = Worker(hub.address, home)
    yield running
    running.close()


def served(hub, since):
    """Files that the Hub handed out since then."""
    found = [path.split("/") for method, path, _ in hub.requests[since:] if method == "GET" and "/resolve/" in path]
    return {parts[-1] for parts in found}


def test_a_hub_id_converts_and_verifies(hub, worker, home, folders, tmp_path):
    answer = worker(source="team/sharded", output_dir=tmp_path / "out")
    assert "llama widened" in answer["report"]
    manifest = json.loads((tmp_path / "out" / "mhc_conversion.json").read_text())
    assert (manifest["base"], manifest["base_commit"]) == ("team/sharded", hub.commit("team/sharded"))
    assert "base_model: team/sharded" in (tmp_path / "out" / "README.md").read_text()
    originals = sorted(folders["team/sharded"].glob("*.safetensors"))
    taken = sorted((tmp_path / "out").glob("base-*"))
    assert [path.read_bytes() for path in taken] == [path.read_bytes() for path in originals]
    assert worker(verify=True, source="team/sharded", converted=str(tmp_path / "out")) == {"verified": True}


def test_the_cache_is_not_changed_by_converting_twice(worker, home, tmp_path):
    assert "report" in worker(source="team/sharded", output_dir=tmp_path / "out")
    before = bits(home / "hub")
    assert "report" in worker(source="team/sharded", output_dir=tmp_path / "out", overwrite=True)
    assert bits(home / "hub") == before


def test_safetensors_are_downloaded_and_nothing_that_is_not_needed(hub, worker, tmp_path):
    since = len(hub.requests)
    assert "report" in worker(source="team/single", output_dir=tmp_path / "out", hc_mult=2)
    files = served(hub, since)
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE"} <= files
    assert not files & {"pytorch_model.bin", "model.onnx", "consolidated.safetensors"}


def test_a_pickled_repository_converts(worker, tmp_path, folders):
    assert "qwen2 widened" in worker(source="team/pickled", output_dir=tmp_path / "out")["report"]
    expected = load_file(folders["team/single"] / "model.safetensors")
    found = load_file(tmp_path / "out" / "base-00001-of-00001.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("revision", ["v1", "main", "commit"])
def test_a_revision_is_asked_for_and_written_down(hub, worker, tmp_path, revision):
    asked = hub.commit("team/sharded") if revision == "commit" else revision
    assert "report" in worker(source="team/sharded", output_dir=tmp_path / "out", revision=asked)
    manifest = json.loads((tmp_path / "out" / "mhc_conversion.json").read_text())
    assert (manifest["base_revision"], manifest["base_commit"]) == (asked, hub.commit("team/sharded"))


def test_a_revision_that_is_not_there_is_named(worker, tmp_path):
    answer = worker(source="team/sharded", output_dir=tmp_path / "out", revision="v99")
    assert answer["error"] == "UnusableSource" and "`revision`='v99'" in answer["message"]


def test_a_repository_that_is_not_there_is_named(worker, tmp_path):
    answer = worker(source="team/nothing", output_dir=tmp_path / "out")
    assert answer["error"] == "UnusableSource" and "team/nothing" in answer["message"]
    assert "hf auth login" in answer["message"] and list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_hub_id_is_refused(worker, tmp_path):
    answer = worker(source="team/--bad name--", output_dir=tmp_path / "out")
    assert answer["error"] == "UnusableSource" and "neither a folder here nor a Hub id" in answer["message"]


def test_an_unsupported_family_is_refused_before_its_weights_are_downloaded(hub, worker, tmp_path):
    since = len(hub.requests)
    answer = worker(source="team/unsupported", output_dir=tmp_path / "out")
    assert answer["error"] == "UnusableSource" and "'bert'" in answer["message"] and "llama" in answer["message"]
    assert served(hub, since) and "model.safetensors" not in served(hub, since)
    assert list(tmp_path.iterdir()) == []


def test_a_private_repository_wants_the_token_and_gets_it(hub, worker, tmp_path):
    assert worker(source="team/private", output_dir=tmp_path / "out")["error"] == "UnusableSource"
    since = len(hub.requests)
    assert "report" in worker(source="team/private", output_dir=tmp_path / "out", token=hub.token)
    assert {header for _, _, header in hub.requests[since:]} == {f"Bearer {hub.token}"}
    for path in (tmp_path / "out").iterdir():
        assert hub.token.encode() not in path.read_bytes()


def test_a_local_folder_of_that_name_wins(hub, worker, tmp_path, monkeypatch, folders):
    since = len(hub.requests)
    assert "report" in worker(source=str(folders["team/single"]), output_dir=tmp_path / "out")
    assert hub.requests[since:] == []


def test_without_the_hub_the_cache_serves_and_what_it_lacks_is_said(tmp_path, folders):
    with Hub(folders) as gone:
        worker = Worker(gone.address, tmp_path / "home")
        try:
            assert "report" in worker(source="team/sharded", output_dir=tmp_path / "before")
            gone.stop()
            assert "report" in worker(source="team/sharded", output_dir=tmp_path / "after")
            assert bits(tmp_path / "before") == bits(tmp_path / "after")
            answer = worker(source="team/single", output_dir=tmp_path / "out")
            assert answer["error"] == "HubUnreachable"
            assert "`source`='team/single'" in answer["message"] and "HF_ENDPOINT" in answer["message"]
            assert not (tmp_path / "out").exists()
        finally:
            worker.close()
