"""The command line: what it prints, and what it exits with."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhc_hf
from mhc_hf.cli import main
from mhc_hf.modeling.families import supported_families
from tests.conftest import tiny_model


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of operations on a few numbers each: a second thread costs several times what it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "base"
    tiny_model("llama").save_pretrained(folder)
    return folder


def test_convert_then_verify(base, tmp_path, capsys):
    assert main(["convert", str(base), str(tmp_path / "out"), "--hc-mult", "3", "--start", "copies"]) == 0
    printed = capsys.readouterr().out
    assert "llama widened into 3 residual streams (copies start)" in printed and "from_pretrained" in printed
    (tmp_path / "text.txt").write_text("some text\n" * 50)
    assert main(["verify", str(base), str(tmp_path / "out"), "--text", str(tmp_path / "text.txt")]) == 0
    printed = capsys.readouterr().out
    for words in ("max |dlogit|", "relative", "128 of 128 tokens", "float32", "can separate", "verified"):
        assert words in printed


def test_a_self_contained_conversion_says_how_else_it_loads(base, tmp_path, capsys):
    assert main(["convert", str(base), str(tmp_path / "out"), "--self-contained"]) == 0
    assert "or, without mhc_hf, with trust_remote_code=True" in capsys.readouterr().out
    assert (tmp_path / "out" / "modeling_mhc.py").is_file()


def test_verify_exits_with_1_where_the_function_differs(base, tmp_path, capsys):
    assert main(["convert", str(base), str(tmp_path / "out"), "--copy", "--dtype", "float32"]) == 0
    tensors = load_file(tmp_path / "out" / "mhc.safetensors")
    tensors["model.layers.0.attn_hc.bias"][4] += 0.1
    save_file(tensors, tmp_path / "out" / "mhc.safetensors", metadata={"format": "pt"})
    assert main(["verify", str(base), str(tmp_path / "out")]) == 1
    assert "NOT VERIFIED" in capsys.readouterr().out


def test_verify_in_bfloat16_prints_the_ratio(base, tmp_path, capsys):
    assert main(["convert", str(base), str(tmp_path / "out")]) == 0
    assert main(["verify", str(base), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert "times the base's own" in capsys.readouterr().out


def test_overwrite_replaces_an_earlier_conversion(base, tmp_path, capsys):
    for words, code in (([], 0), ([], 2), (["--overwrite"], 0)):
        assert main(["convert", str(base), str(tmp_path / "out"), *words]) == code
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "./nowhere", "out"],
        ["convert", "BASE", "out", "--hc-mult", "1"],
        ["convert", "BASE", "out", "--start", "uniform"],
        ["convert", "BASE", "out", "--dtype", "int4"],
        ["convert", "BASE", "BASE/out"],
        ["verify", "BASE", "BASE"],
        ["verify", "BASE", "BASE", "--text", "./nowhere.txt"],
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(base, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main([argument.replace("BASE", str(base)) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"mhc-hf {arguments[0]}: error: ")
    assert printed.err.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["widen"], ["convert"], ["convert", "a", "b", "--hc-mult", "four"]])
def test_a_command_that_makes_no_sense_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: mhc-hf" in capsys.readouterr().err


def test_doctor_prints_versions_devices_backend_and_families(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch           {torch.__version__}" in lines
    assert f"mhc-hf          {mhc_hf.__version__}" in lines
    assert any(line.startswith("device          cpu") and "backend native, since" in line for line in lines)
    assert lines[-1].split(maxsplit=1) == ["families", ", ".join(supported_families())]


@pytest.mark.slow
def test_the_command_as_it_is_installed_prints_no_traceback(tmp_path):
    command = [sys.executable, "-m", "mhc_hf.cli", "convert", "./nowhere", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "`source`='./nowhere'" in done.stderr
