"""The monitor logs what the streams do, says what is wrong, and costs nothing while it does not look."""

import copy
import json
import logging
import math
import time
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from mhc_hf import MHCForCausalLM
from mhc_hf.inspection import InspectionError, measure_streams, record_streams
from mhc_hf.inspection.measure import measure_gradients, summarize
from mhc_hf.inspection.problems import find_problems
from mhc_hf.training import StreamMonitorCallback, mhc_lora_config

from ..inspection.conftest import set_maps, sites
from .conftest import Rows, training_arguments
from .launching import run_python
from .two_ranks import GROUPS_BY_DTYPE


def train(model, output_dir, monitor, **overrides):
    """The log entries of the monitor."""
    trainer = Trainer(
        model=model, args=training_arguments(output_dir, **overrides), train_dataset=Rows(), callbacks=[monitor]
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "streams/spread" in entry]


def uniform_control(llama, n=4):
    """What no conversion may start from: every map the same for all streams."""
    model = MHCForCausalLM.from_base(copy.deepcopy(llama).double(), hc_mult=n, start="copies")
    for site in sites(model):
        set_maps(site, [1 / n] * n, [1.0] * n, torch.zeros(n, n))
    return model


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_numbers_reach_the_log_at_the_first_and_every_nth_step(widened, tmp_path):
    monitor = StreamMonitorCallback(every=3, per_site=True)
    entries = train(widened, tmp_path, monitor, max_steps=7)
    assert [entry["step"] for entry in entries] == [1, 3, 6]
    entry = entries[-1]
    assert all(math.isfinite(value) for value in entry.values())
    for name in ("composite_forward_gain", "composite_backward_gain", "grad_norm_phi", "alpha_res", "cosine"):
        assert f"streams/{name}" in entry
    assert entry["streams/composite_forward_gain"] == pytest.approx(1, abs=1e-5)
    assert entry["streams/layers.2.ffn_hc/h_pre_entropy"] < math.log(4)
    assert monitor.last.summary()["streams/spread"] == entry["streams/spread"]
    assert not monitor.warnings and not hooks_of(widened)


def test_it_logs_what_measure_streams_measures(widened, tmp_path):
    first_row = {}
    widened.register_forward_pre_hook(
        lambda module, args, kwargs: first_row.update(ids=kwargs["input_ids"][:1]), with_kwargs=True
    )
    twin = copy.deepcopy(widened)
    (entry,) = train(widened, tmp_path, StreamMonitorCallback(), max_steps=1)
    wanted = measure_streams(twin.train(), input_ids=first_row["ids"]).summary()
    # one sequence of a batch and the same alone: sums of at most n*C = 240 float32 products, in another order
    assert {name: entry[name] for name in wanted} == pytest.approx(wanted, rel=240 * 2**-23, abs=240 * 2**-23)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_does_not_count_twice(widened, tmp_path, reentrant):
    options = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}, max_steps=2)
    plain = train(copy.deepcopy(widened), tmp_path, StreamMonitorCallback(every=1, per_site=True), max_steps=2)
    again = train(widened, tmp_path, StreamMonitorCallback(every=1, per_site=True), **options)
    for one, other in zip(plain, again, strict=True):
        assert {k: v for k, v in one.items() if "streams/" in k} == pytest.approx(
            {k: v for k, v in other.items() if "streams/" in k}, rel=1e-5, abs=1e-7
        )


def test_recompute_does_not_count_twice(llama, tmp_path):
    def widen(**hc):
        return MHCForCausalLM.from_base(copy.deepcopy(llama), hc=hc)

    plain, again = (
        train(model, tmp_path, StreamMonitorCallback(every=1, per_site=True), max_steps=2)
        for model in (widen(), widen(hc_recompute=True, hc_recompute_layers=2))
    )
    for one, other in zip(plain, again, strict=True):
        names = [name for name in one if name.startswith("streams/")]
        assert {k: other[k] for k in names} == pytest.approx({k: one[k] for k in names}, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_two_ranks_log_what_one_process_logs(llama, tmp_path):
    """Half the batch each: the first sequence is the same, and so are the gradients of the whole."""
    model = MHCForCausalLM.from_base(copy.deepcopy(llama))
    model.save_pretrained(tmp_path / "model")
    monitor = StreamMonitorCallback(per_site=True)
    (one,) = train(model, tmp_path, monitor, max_steps=1, per_device_train_batch_size=4)
    names = [name for name in one if name.startswith("streams/")]
    printed = run_python("-m", "tests.training.monitored_trainers", tmp_path / "model", tmp_path / "two", ranks=2)
    found = [json.loads(line) for line in printed.splitlines() if line.startswith('{"engine"')]
    engines = [("DDP", True), ("FSDP2", False)]
    assert [(f["engine"], "DistributedDataParallel" in f["wrapped"]) for f in found] == engines[: 1 + GROUPS_BY_DTYPE]
    for two in found:
        # float32 sums of the same addends, in another order
        assert {n: two["entry"][n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=1e-5, abs=1e-7)


def test_the_first_micro_batch_of_a_step_is_looked_at(widened, tmp_path):
    entries = train(widened, tmp_path, StreamMonitorCallback(every=1), max_steps=2, gradient_accumulation_steps=3)
    assert [entry["step"] for entry in entries] == [1, 2]


def test_under_peft_the_copy_that_runs_is_looked_at(widened, tmp_path):
    wrapped = get_peft_model(widened, mhc_lora_config(widened, r=2))
    (first, last) = train(wrapped, tmp_path, StreamMonitorCallback(every=4, per_site=True), max_steps=4)
    assert "streams/layers.0.attn_hc/spread" in last
    # the copy that is put aside keeps the alpha of the start
    assert first["streams/alpha_pre"] == 1 and last["streams/alpha_pre"] != 1
    assert last["streams/grad_norm_bias"] > 0


@pytest.mark.slow
def test_a_compiled_model_is_looked_at_too(widened, tmp_path):
    (entry,) = train(
        widened, tmp_path, StreamMonitorCallback(), max_steps=2, torch_compile=True, torch_compile_backend="aot_eager"
    )
    assert entry["streams/spread"] > 0.1


@pytest.mark.slow
def test_a_uniform_control_is_reported_asleep_and_its_spread_is_exactly_zero(llama, tmp_path, caplog):
    monitor = StreamMonitorCallback()
    with caplog.at_level(logging.WARNING, "mhc_hf.training.monitor"):
        entries = train(uniform_control(llama), tmp_path, monitor, max_steps=100)
    assert [entry["streams/spread"] for entry in entries] == [0.0, 0.0]
    (words,) = [words for words in monitor.warnings if "asleep" in words]
    assert "after 100 steps" in words and words in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("start", ["orthogonal", "copies"])
def test_conversions_are_not_reported_asleep(llama, tmp_path, start):
    monitor = StreamMonitorCallback()
    model = MHCForCausalLM.from_base(copy.deepcopy(llama).double(), start=start)
    entries = train(model, tmp_path, monitor, max_steps=100)
    assert entries[-1]["streams/spread"] > 1e-4
    assert not monitor.warnings


def test_a_frozen_h_res_is_named_and_leads_of_the_starts_are_not(widened, token_ids):
    assert not find_problems(measure_streams(widened, input_ids=token_ids), step=0)
    set_maps(sites(widened)[3], [0.25] * 4, [1.0] * 4, 8 * torch.eye(4))
    problems = find_problems(measure_streams(widened, input_ids=token_ids), step=0)
    assert list(problems) == ["frozen layers.1.ffn_hc"] and "saturation" in problems["frozen layers.1.ffn_hc"]
    assert not find_problems(measure_streams(widened, input_ids=token_ids), step=0, projection="identity")


def test_gains_that_leave_their_range_are_named(widened, token_ids):
    measurement = measure_streams(widened, input_ids=token_ids)
    assert not find_problems(measurement, step=0)
    measurement.table["backward_gain"][2] = 10.5
    measurement.table["composite_forward_gain"][5] = 0.05
    problems = find_problems(measurement, step=0)
    assert "backward gain of layers.1.attn_hc is 10.5" in problems["backward_gain layers.1.attn_hc"]
    assert "grows" in problems["backward_gain layers.1.attn_hc"]
    assert "fades" in problems["composite_forward_gain layers.2.ffn_hc"]


def test_nan_is_reported_by_the_name_of_the_site(widened, tmp_path):
    with torch.no_grad():
        widened.get_parameter("model.layers.1.mlp.down_proj.weight")[0] = math.nan
    monitor = StreamMonitorCallback()
    train(widened, tmp_path, monitor, max_steps=1)
    assert "streams into layers.2.attn_hc" in monitor.warnings[0] and "layers.1.ffn_hc" in monitor.warnings[0]


def test_mistakes_are_named(llama, tmp_path):
    with pytest.raises(ValueError, match="`every` must be an integer >= 1, got 0"):
        StreamMonitorCallback(every=0)
    with pytest.raises(InspectionError, match="without any"):
        train(copy.deepcopy(llama), tmp_path, StreamMonitorCallback())
    with pytest.raises(RuntimeError, match="called by a Trainer"):
        from mhc_hf.training.monitor import _running_trainer

        _running_trainer(StreamMonitorCallback())


def test_a_look_costs_less_than_two_steps_which_is_two_percent_at_the_default_interval(widened, token_ids):
    """CPU time, on one thread: the clock of a shared machine measures the others."""
    widened.float().train()

    def run_step(look):
        start = time.process_time()
        with record_streams(widened, max_sequences=1) if look else nullcontext() as recording:
            widened(input_ids=token_ids, labels=token_ids).loss.backward()
        if look:
            summarize(recording, measure_gradients(widened)).summary()
        return time.process_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plain, looked = (sorted(run_step(look) for _ in range(9))[4] for look in (False, True))
    torch.set_num_threads(threads)
    print(f"a look costs {(looked - plain) / plain:.2f} steps")
    # a model of toy size, where the many small operations of a look weigh most
    assert looked - plain < 2 * plain
