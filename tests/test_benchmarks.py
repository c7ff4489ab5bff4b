"""The benches run at a tiny size, refuse what is wrong, and write what docs/benchmarks.md says."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MACHINE = {"device", "threads", "python", "torch", "transformers", "triton", "liger-kernel"}


@pytest.fixture
def bench(monkeypatch):
    """A script of benchmarks/, imported as it imports its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What `make bench-gpu` writes, from a rehearsal: every bench once, in the interpreter."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "benchmarks/measure_gpu.py", "--rehearse", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "gpu-rehearsal.json").read_text())


@pytest.mark.slow
def test_the_gpu_command_runs_every_part_and_judges_it(rehearsal):
    assert set(rehearsal["machine"]) == MACHINE and "--rehearse" in rehearsal["command"]
    assert {"checks", "kernels", "ops", "model-tiny", "seconds"} <= set(rehearsal)
    assert not [part for part in rehearsal.values() if isinstance(part, dict) and "failed" in part]
    passed = {line["claim"] for line in rehearsal["verdict"] if line["passed"]}
    assert {
        "every op is right, n = 3",
        "the same run twice gives the same bits",
        "model-tiny: logits and gradients are the base's",
    } <= passed


@pytest.mark.slow
def test_every_contender_has_an_error_and_times_or_a_reason(rehearsal):
    (cell,) = rehearsal["ops"]["results"]
    assert {"T", "n", "C", "dtype"} <= set(cell)
    for name in ("transformers", "mhc_hf torch", "mhc_hf triton", "liger"):
        row = cell["contenders"][name]
        if "unable" in row:
            assert name == "liger" and "liger-kernel" in row["unable"]
            continue
        assert row["error"] < 1e-5
        for kind in ("fwd", "fwd+bwd"):
            low, high = row[kind]["quartiles_ms"]
            assert 0 < low <= row[kind]["median_ms"] <= high


@pytest.mark.slow
def test_a_model_is_compared_in_time_memory_and_decoding(rehearsal):
    model = rehearsal["model-tiny"]
    assert model["check"]["passed"]
    names = {"base", "widened", "widened, recompute"}
    assert set(model["step"]) == set(model["layer"]) == set(model["memory"]) == names
    assert model["step"]["base"]["of_base"]["median"] == 1
    assert set(model["decode"]) == {"1"} and model["decode"]["1"]["widened"]["tokens_per_s"] > 0
    if sys.platform == "linux":
        assert all(row["peak_bytes"] >= 0 for row in model["memory"].values())


@pytest.mark.slow
def test_kernels_are_told_with_their_traffic(rehearsal):
    kernels = {row["kernel"]: row for row in rehearsal["kernels"]["kernels"]}
    assert kernels["project_fwd"]["rows"] == 2
    assert {row["direction"] for row in kernels.values()} == {"forward", "backward"}
    assert rehearsal["kernels"]["launches_a_site_decoding"] == 2


def test_what_is_wrong_gets_no_number(bench, monkeypatch):
    bench_ops = bench("bench_ops")
    make_contenders = bench_ops.make_contenders

    def make_wrong(*arguments):
        run, truth, tolerance = make_contenders(*arguments)["mhc_hf torch"]
        return {"off by 1e-4": (lambda x: 1.0001 * run(x), truth, tolerance), "right": (run, truth, tolerance)}

    monkeypatch.setattr(bench_ops, "make_contenders", make_wrong)
    rows = bench_ops.measure_shape(5, 3, 20, torch.float32, torch.device("cpu"), 1, True)
    assert "refused" in rows["off by 1e-4"] and "fwd" not in rows["off by 1e-4"]
    assert "fwd+bwd" in rows["right"]


def test_what_a_peer_raises_is_its_row(bench, monkeypatch):
    bench_ops = bench("bench_ops")

    def fail(x):
        raise RuntimeError("out of registers\nat line 7")

    monkeypatch.setattr(bench_ops, "make_contenders", lambda *_: {"another's": (fail, fail, 1e-5)})
    rows = bench_ops.measure_shape(5, 3, 20, torch.float32, torch.device("cpu"), 1, True)
    assert rows["another's"] == {"unable": "RuntimeError: out of registers"}


def test_a_model_that_is_not_its_base_is_refused(bench, tmp_path, monkeypatch):
    bench_model = bench("bench_model")
    make_models = bench_model.make_models

    def make_woken(*arguments):
        models = make_models(*arguments)
        bench_model.wake(models)
        return models

    monkeypatch.setattr(bench_model, "make_models", make_woken)
    path = tmp_path / "model.json"
    with pytest.raises(SystemExit, match="the widened model is not its base"):
        bench_model.main(f"--shape tiny --layers 1 --context 12 --device cpu --dtype float32 --output {path}".split())
    report = json.loads(path.read_text())
    assert report["check"]["passed"] is False and "step" not in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_command_says_so(bench, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measure_gpu.py"])
    with pytest.raises(SystemExit, match="torch sees no GPU here"):
        bench("measure_gpu").main()


def test_the_verdict_holds_figures_against_what_is_aimed_at(bench):
    measure_gpu = bench("measure_gpu")

    def site(ours, liger):
        return {kind: {"median_ms": ours} for kind in ("fwd", "fwd+bwd")}, {"fwd": {"median_ms": liger}}

    ours, liger = site(1.0, 0.9)
    launch = {"kernel": "write", "direction": "forward", "rows": 9, "of_copy_rate": 0.84}
    report = {
        "checks": {"4": {"cases": {"layer": {"passed": False}, "pre": {"passed": True}}}, "5": {"failed": 1}},
        "kernels": {"same_bits": True, "kernels": [launch, launch | {"rows": 0}], "site_us": {"forward": 249.0}},
        "ops": {"results": [{"T": 1, "C": 2, "contenders": {"mhc_hf triton": ours, "liger": liger}}]},
        "model-8b": {"check": {"passed": True}, "layer": {"widened": {"of_base": {"median": 1.07}}}},
        "model-1b": {"failed": 1},
    }
    found = {line["claim"]: line["passed"] for line in measure_gpu.judge(report)}
    assert found == {
        "every op is right, n = 4": False,
        "every op is right, n = 5": False,
        "model-8b: logits and gradients are the base's": True,
        "model-1b: logits and gradients are the base's": False,
        "the same run twice gives the same bits": True,
        "a CUDA graph too": None,
        "another sequence length compiles nothing": None,
        "write, forward: part of a copy's rate": False,
        "forward of a site with its norm, us": True,
        "T = 1, C = 2, fwd: times as fast as liger, the best peer": False,
        "model-8b: a layer, times the base's": False,
        "model-1b ran to its end": False,
    }


def test_pictures_show_the_ratios_of_the_results(bench, tmp_path):
    plot = bench("plot")
    reports = [json.loads((RESULTS / "ops-cpu.json").read_text())]
    axes = plot.plot_ops(reports).axes[1]
    contenders = reports[0]["results"][0]["contenders"]
    bars = {patch.get_height() for patch in axes.patches}
    assert axes.get_ylim()[0] == 0
    for row in contenders.values():
        if "fwd+bwd" in row:
            assert contenders["transformers"]["fwd+bwd"]["median_ms"] / row["fwd+bwd"]["median_ms"] in bars
    reports = [json.loads((RESULTS / "model-small-cpu.json").read_text())]
    step = plot.plot_models(reports).axes[0]
    assert reports[0]["step"]["widened"]["of_base"]["median"] in {patch.get_height() for patch in step.patches}


def test_the_documentation_shows_the_results_as_they_were_printed(bench, capsys):
    for cell in json.loads((RESULTS / "ops-cpu.json").read_text())["results"]:
        bench("bench_ops").print_table({name: cell[name] for name in ("T", "n", "C", "dtype")}, cell["contenders"])
    bench("bench_model").print_results(json.loads((RESULTS / "model-small-cpu.json").read_text()))
    documented = (ROOT / "docs" / "benchmarks.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in documented
