"""What a study writes to docs/results is made again by its command, to the digit."""

import json
import runpy
import sys

import pytest
import torch

from .training.launching import ROOT

pytestmark = pytest.mark.slow
TINY = "--layers 1 --hidden 32 --vocabulary 260 --context 16 --batch 4 --steps 3 --seeds 0 1".split()
STUDIES = {
    "stability": ("stability", ["--every", "1"]),
    "retrofit_study": ("retrofit", ["--pretrain-steps", "2"]),
    "retrofit_recipe": ("recipe", ["--pretrain-steps", "2", "--seeds", "0"]),
}


@pytest.fixture
def run_study(monkeypatch, tmp_path):
    """Runs a study with tiny flags; returns its JSON but for what made it, and its page."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {k} of {k % 7} and {k % 11}\n" for k in range(800)))
    monkeypatch.syspath_prepend(ROOT / "examples")

    def run(script, out):
        name, flags = STUDIES[script]
        arguments = [*TINY, *flags, "--text", str(text), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        # a study must not depend on what was drawn before it
        torch.rand(len(str(out)))
        runpy.run_path(str(ROOT / "examples" / f"{script}.py"), run_name="__main__")
        numbers, page = json.loads((out / f"{name}.json").read_text()), (out / f"{name}.md").read_text()
        assert f"/{script}.py {' '.join(arguments)}`" in page and f"({name}.png)" in page
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert set(numbers.pop("run")) == {"command", "device", "versions", "seconds"}
        return numbers, page

    return run


def test_stability_is_repeatable_and_judges_the_claim(run_study, tmp_path):
    (numbers, page), (again, _) = (run_study("stability", tmp_path / out) for out in ("a", "b/c"))
    assert numbers == again
    assert list(numbers["runs"]) == ["plain", "HC", "mHC"] and numbers["runs"]["mHC"][0]["step"] == [1, 2, 3]
    assert all(abs(gain - 1) < 0.1 for run in numbers["runs"]["mHC"] for gain in run["composite_forward_gain"])
    assert "mHC stayed within [0.9, 1.1] at every look" in page and "not above 5 on every seed" in page


def test_retrofit_is_repeatable_and_its_control_stays_asleep(run_study, tmp_path):
    (numbers, page), (again, _) = (run_study("retrofit_study", tmp_path / out) for out in ("a", "b/c"))
    assert numbers == again
    for by_kind in numbers["runs"].values():
        assert {value for run in by_kind["uniform"] for _, value in run["spread"]} == {0.0}
        assert all(run["spread"][-1][1] > 0 for kind in ("copies", "orthogonal") for run in by_kind[kind])
        # nothing is changed by widening
        for kind in ("copies", "orthogonal", "uniform"):
            for run, base in zip(by_kind[kind], by_kind["base"], strict=True):
                assert run["losses"][0][1] == pytest.approx(base["losses"][0][1], abs=1e-5)
    assert "over all runs and looks, is 0." in page


def test_recipe_is_repeatable_and_names_the_best(run_study, tmp_path):
    (numbers, page), (again, _) = (run_study("retrofit_recipe", tmp_path / out) for out in ("a", "b/c"))
    assert numbers == again
    assert len(numbers["rows"]) == 2 * 2 * 7
    assert page.count("is best") + page.count("the default is the best") == 4
