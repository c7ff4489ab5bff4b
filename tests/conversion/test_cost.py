"""A conversion that shares the base's weights costs what its sites cost, not what the model weighs."""

import importlib.util
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_SPEC = importlib.util.spec_from_file_location(
    "bench_convert", Path(__file__).parents[2] / "benchmarks" / "bench_convert.py"
)
bench = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(bench)


def test_two_gigabytes_are_converted_in_a_fraction_of_their_size(tmp_path):
    """Eight layers of LLaMA-7B's width in three shards; `benchmarks/bench_convert.py` runs all 13 GB."""
    (tmp_path / "base").mkdir()
    size = bench.make_llama(tmp_path / "base", layers=8, hidden=4096, mlp=4096, vocab=32000, shards=3)
    assert size > 2e9
    seconds, mebibytes, report = bench.measure(tmp_path / "base", tmp_path / "out", 4)
    assert mebibytes < bench.MEBIBYTES_ALLOWED / 4
    assert seconds < 3 * bench.SECONDS_ALLOWED  # three times, since other tests may run beside this one
    assert "GB linked" in report or "GB cloned" in report
    # a phi of zeros takes no room: on the disk there is less than half of what the file says
    mhc = (tmp_path / "out" / "mhc.safetensors").stat()
    assert mhc.st_size > 20e6 and mhc.st_blocks * 512 < mhc.st_size / 2
