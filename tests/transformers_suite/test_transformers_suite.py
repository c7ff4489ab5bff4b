"""transformers' own model tests: whatever passes on a family passes on the widened one.

They come with no wheel. Give the source tree of the installed version:

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers /tmp/transformers
    TRANSFORMERS_SOURCE=/tmp/transformers pytest tests/transformers_suite -s --timeout 7200

That takes about ten minutes a family on two cores, most of it in compilers and in starting ranks.
"""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

FAMILIES = ["llama", "gemma3_text", "olmo2", "qwen3_moe", "gpt_neox", "phi", "granite", "qwen3_next"]
HERE = Path(__file__).parent
SOURCE = Path(os.environ.get("TRANSFORMERS_SOURCE", ""))
# what is skipped on widened models only, and why
SKIPPED = {
    "test_moe_models_record_router_logits": "it reads the source of the class, which is made at run time",
}


@pytest.mark.skipif(not (SOURCE / "tests/causal_lm_tester.py").is_file(), reason="TRANSFORMERS_SOURCE names no tree")
@pytest.mark.skipif(importlib.util.find_spec("parameterized") is None, reason="needs parameterized")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_passes_on_the_family_passes_widened(family, tmp_path):
    native, widened = (run(family, models, tmp_path) for models in ("native", "widened"))
    for models, outcomes in (("native", native), ("widened", widened)):
        print(f"{family} {models}: {dict(Counter(outcomes.values()))}")
    passing = {name for name, outcome in native.items() if outcome == "passed"}
    assert len(passing) > 100, "few of their tests passed on the family itself: is the tree the installed version's?"
    assert not {name for name in passing if widened.get(name) == "failed"}
    assert {name for name in passing if widened.get(name) != "passed"} <= SKIPPED.keys()


def run(family: str, models: str, folder: Path) -> dict[str, str]:
    """Outcomes of the family's tests by their names: "passed", "failed" or "skipped"."""
    report = folder / f"{models}.xml"
    # their tests are a package of the same name as ours, so nothing of ours may be on the way
    path = [SOURCE, SOURCE / "utils", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(Path(part).absolute()) for part in path),
        "MHC_SUITE_FAMILY": family,
        "MHC_SUITE_MODELS": models,
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", str(HERE / "family_case.py"), "-q", f"--junitxml={report}"]
    command += ["-c", os.devnull, f"--rootdir={HERE}", "--noconftest", "--import-mode=importlib", "--timeout=600"]
    out = subprocess.run(command, cwd=SOURCE, env=environment, capture_output=True, text=True)
    (folder / f"{models}.log").write_text(out.stdout + out.stderr)
    assert report.is_file(), out.stdout[-3000:] + out.stderr[-3000:]
    outcomes: dict[str, str] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        # a test's sub-tests are cases of their own, under the name of the test and what they are about
        name = str(case.get("name")).split(" ")[0].split("[")[0]
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[name] = max(outcome, outcomes.get(name, outcome), key=["passed", "skipped", "failed"].index)
    return outcomes
