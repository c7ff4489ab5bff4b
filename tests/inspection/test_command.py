"""`mhc-hf inspect` from the command line."""

import copy

from mhc_hf import MHCForCausalLM
from mhc_hf.cli import main


def test_inspect_writes_a_report_and_says_where(llama, tmp_path, capsys):
    llama.save_pretrained(tmp_path / "base")
    MHCForCausalLM.from_base(copy.deepcopy(llama)).save_pretrained(tmp_path / "wide")
    (tmp_path / "text.txt").write_text("some text\n" * 5)
    words = [str(tmp_path / "wide"), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "report")]
    assert main(["inspect", *words, "--base", str(tmp_path / "base"), "--max-tokens", "16"]) == 0
    printed = capsys.readouterr().out
    assert "16 tokens through 6 sites of 4 streams" in printed and "against the base" in printed
    assert str(tmp_path / "report" / "index.html") in printed and (tmp_path / "report" / "index.html").exists()


def test_a_plain_model_is_refused_in_one_line(llama, tmp_path, capsys):
    llama.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("some text\n" * 5)
    words = ["--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "report")]
    assert main(["inspect", str(tmp_path / "base"), *words]) == 2
    assert "must have hyper-connections" in capsys.readouterr().err and not (tmp_path / "report").exists()
