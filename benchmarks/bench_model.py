"""A widened model beside its base: step time, peak memory, decoding speed. `python benchmarks/bench_model.py`

    python benchmarks/bench_model.py [--shape small | 1b | 8b] [--layers 8] [--batch 2] [--context 512] [--dtype ...]

In one process, correctness first: logits and gradients are the base's, or there is no number. Then all take turns,
round after round: the base and the widened model, eager and under torch.compile, and with hc_recompute. A step is
forward and backward, without an optimizer, which would cost all the same. Ratios are to the base in the same mode and
the same round. Two depths, `--layers 4 2`, give the cost of one layer by difference. Prints tables, writes JSON to
benchmarks/results/. Weights are random: what they cost does not depend on what they are.
"""

import argparse
import copy
import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import (
    RESULTS,
    compute_quartiles,
    compute_ratio,
    describe_run,
    format_spread,
    summarize_ms,
    time_in_turns,
    write_report,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from mhc_hf import HyperConnection, MHCForCausalLM

# of LLaMA 3.2 1B and 3.1 8B; the vocabulary is small, for the head is not what is compared
SHAPES = {
    "tiny": dict(hidden_size=48, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2),
    "small": dict(hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_key_value_heads=8),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_key_value_heads=8),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8),
}
VOCAB_SIZE = 1024
CHECKED_TOKENS = 128
PROMPT_TOKENS = 16


def main(argv: list[str] | None = None) -> None:
    """Check, measure, print and write."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    models = {depth: make_models(arguments, depth, device, dtype) for depth in arguments.layers}
    tokens = torch.randint(VOCAB_SIZE, (arguments.batch, arguments.context), device=device)
    deepest = models[arguments.layers[0]]
    report: dict[str, Any] = describe_run(device) | {
        key: getattr(arguments, key) for key in ("shape", "layers", "batch", "context", "dtype", "streams")
    }
    report["check"] = check(deepest, tokens[:1, :CHECKED_TOKENS])
    print_check(report["check"])
    if report["check"]["passed"]:
        # hyper-connections as training leaves them, not as a conversion starts them
        for pair in models.values():
            wake(pair)
        report["memory"] = measure_memory(deepest, tokens, device)
        report["step"], layer = measure_steps(models, tokens, device, arguments)
        report |= {"layer": layer} if layer else {}
        report["decode"] = measure_decoding(deepest, device, arguments)
        print_results(report)
    write_report(report, arguments.output or RESULTS / f"model-{arguments.shape}-{device.type}.json")
    if not report["check"]["passed"]:
        sys.exit("not measured: the widened model is not its base")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="8b" if gpu else "small")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 2] if gpu else [8])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--context", type=int, default=4096 if gpu else 512)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--decode-batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--decode-tokens", type=int, default=128 if gpu else 32)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20 if gpu else 7)
    parser.add_argument("--eager", action="store_true", help="leave out all that torch.compile makes")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(argv)


def make_models(arguments, depth: int, device, dtype) -> dict[str, PreTrainedModel]:
    """The base, and the same weights widened, without and with recompute."""
    config = LlamaConfig(
        **SHAPES[arguments.shape],
        num_hidden_layers=depth,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=max(arguments.context, PROMPT_TOKENS + arguments.decode_tokens),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        # made in its dtype, not cast to it, which would round the rotary frequencies too
        base = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    widen = MHCForCausalLM.from_base
    return {
        "base": base,
        "widened": widen(base, arguments.streams),
        "widened, recompute": widen(base, arguments.streams, hc={"hc_recompute": True}),
    }


def wake(models: dict[str, PreTrainedModel]) -> None:
    """Give every projection random weights, the same in all models."""
    for model in models.values():
        for module in model.modules():
            if isinstance(module, HyperConnection):
                generator = torch.Generator(module.phi.device).manual_seed(module.site)
                torch.nn.init.normal_(module.phi, std=0.02, generator=generator)


# ---- correctness ----------------------------------------------------------------------------------------------------


def check(models: dict[str, PreTrainedModel], tokens: Tensor) -> dict[str, Any]:
    """How far logits and gradients of each model are from the base's in a wider dtype, relative; of gradients, the
    root mean square over the base's parameters.

    The rule: no farther than twice the base's own distance, which is the rounding of its dtype.
    """
    wider = torch.float64 if next(models["base"].parameters()).dtype == torch.float32 else torch.float32
    truth = copy.deepcopy(models["base"]).to(wider)
    want = differentiate(truth, tokens)
    errors = {}
    for name, model in models.items():
        got = differentiate(model, tokens)
        gradients = [relative_error(got[key], want[key]) for key in want if key != "logits"]
        mean_square = sum(error**2 for error in gradients) / len(gradients)
        errors[name] = {"logits": relative_error(got["logits"], want["logits"]), "gradients": mean_square**0.5}
    allowed = {kind: 2 * error for kind, error in errors["base"].items()}
    passed = all(row[kind] <= allowed[kind] for row in errors.values() for kind in allowed)
    return {"errors": errors, "allowed": allowed, "passed": passed}


def differentiate(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """Logits and the gradients of the base's parameters, by name."""
    model.zero_grad()
    answer = model(input_ids=tokens, labels=tokens, use_cache=False)
    answer.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if "_hc." not in name}
    model.zero_grad()
    return found | {"logits": answer.logits.detach()}


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; NaN counts as infinite."""
    error = ((got.double() - want.double()).norm() / want.double().norm()).item()
    return error if error == error else float("inf")


# ---- measures -------------------------------------------------------------------------------------------------------


def make_step(model: Callable, parameters: PreTrainedModel, tokens: Tensor) -> Callable[[], None]:
    """Forward and backward; gradients are made anew, as after an optimizer's `zero_grad`."""

    def step() -> None:
        parameters.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    return step


def measure_steps(models, tokens, device, arguments) -> tuple[dict, dict]:
    """Times and ratios of a step of the deepest model, and of one layer where there are two depths."""
    steps = {}
    for depth, pair in models.items():
        for name, model in pair.items():
            steps[depth, name] = make_step(model, model, tokens)
            if not arguments.eager:
                steps[depth, f"{name}, compiled"] = make_step(torch.compile(model, dynamic=False), model, tokens)
    times = time_in_turns(steps, device, arguments.rounds)
    for pair in models.values():
        for model in pair.values():
            model.zero_grad()
    deep, *shallow = models
    names = [name for depth, name in steps if depth == deep]
    step = compare_times({name: times[deep, name] for name in names})
    if not shallow:
        return step, {}
    differences = {
        name: [
            (long - short) / (deep - shallow[0])
            for long, short in zip(times[deep, name], times[shallow[0], name], strict=True)
        ]
        for name in names
    }
    return step, compare_times(differences)


def compare_times(times: dict[str, list[float]]) -> dict[str, dict]:
    """Name -> milliseconds, and times the base's in the same mode."""
    return {
        name: summarize_ms(seconds) | {"of_base": compute_ratio(seconds, times[base_of(name)])}
        for name, seconds in times.items()
    }


def base_of(name: str) -> str:
    """Whom a model is compared with: the base, compiled if the model is."""
    return "base, compiled" if name.endswith("compiled") else "base"


def measure_memory(models, tokens, device) -> dict[str, dict]:
    """Bytes that an eager step needs at its peak beyond the weights: what is kept, temporaries and gradients."""
    peaks = {}
    for name, model in models.items():
        # resident memory is measured by pages, and by what malloc happens to reuse
        found = [measure_peak(make_step(model, model, tokens), model, device) for _ in range(3)]
        peaks[name] = None if None in found else sorted(found)[1]
    return {
        name: {"peak_bytes": peak, "of_base": peak / peaks["base"] if peak else None} for name, peak in peaks.items()
    }


def measure_peak(step: Callable[[], None], model: PreTrainedModel, device) -> int | None:
    """On a GPU by torch's allocator; on Linux by the process's resident memory; elsewhere None."""
    step()
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        peak = torch.cuda.max_memory_allocated(device)
    elif sys.platform == "linux":
        # what malloc holds back goes to the system first, then the kernel forgets the peak there was
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = read_resident_bytes("VmRSS")
        step()
        peak = read_resident_bytes("VmHWM")
    else:
        return None
    model.zero_grad()
    return peak - before


def read_resident_bytes(field: str) -> int:
    """A line of /proc/self/status, as bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure_decoding(models, device, arguments) -> dict[str, dict]:
    """Batch -> model -> tokens a second of `generate`, the prompt's forward included."""
    decoded, contenders = {}, {name: models[name].eval() for name in ("base", "widened")}
    for batch in arguments.decode_batch:
        prompt = torch.randint(1, VOCAB_SIZE, (batch, PROMPT_TOKENS), device=device)
        steps = {}
        for name, model in contenders.items():
            steps[name] = make_generation(model, prompt, arguments.decode_tokens)
            if not arguments.eager and device.type == "cuda":
                # a static cache is what transformers compiles the decoding of, on devices that gain from it
                steps[f"{name}, compiled"] = make_generation(
                    model, prompt, arguments.decode_tokens, cache_implementation="static"
                )
        times = time_in_turns(steps, device, arguments.rounds)
        number = batch * arguments.decode_tokens
        decoded[str(batch)] = {
            name: {
                "tokens_per_s": compute_quartiles([number / one for one in seconds])[1],
                "of_base": compute_ratio(times[base_of(name)], seconds),
            }
            for name, seconds in times.items()
        }
    return decoded


def make_generation(model, prompt, num_tokens: int, **options) -> Callable[[], Tensor]:
    """Greedy, a fixed number of tokens."""
    arguments = dict(
        attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
    )
    return lambda: model.generate(prompt, **arguments, **options)


# ---- what is printed ------------------------------------------------------------------------------------------------


def print_check(found: dict[str, Any]) -> None:
    for name, row in found["errors"].items():
        print(f"{name:24}error of logits {row['logits']:.1e}, of gradients {row['gradients']:.1e}")
    print(f"{'allowed':24}error of logits {found['allowed']['logits']:.1e}, {found['allowed']['gradients']:.1e}")


def print_results(report: dict[str, Any]) -> None:
    """One table a measure; ratios are to the base in the same mode."""
    print(f"\n{report['shape']}, layers {report['layers']}, {report['batch']} x {report['context']}, {report['dtype']}")
    for kind, title in (("step", "forward + backward, ms"), ("layer", "of it one layer, ms")):
        for name, row in report.get(kind, {}).items():
            ratio = row["of_base"]
            times = format_spread(row["median_ms"], row["quartiles_ms"])
            print(f"{title:26}{name:30}{times:>26}{format_spread(ratio['median'], ratio['quartiles']):>22} of base")
    for name, row in report["memory"].items():
        if row["peak_bytes"]:
            peak = f"{row['peak_bytes'] / 2**20:.0f}"
            print(f"{'peak beyond weights, MiB':26}{name:30}{peak:>26}{row['of_base']:>22.2f} of base")
    for batch, rows in report["decode"].items():
        for name, row in rows.items():
            ratio, title = row["of_base"], f"tokens a second, batch {batch}"
            speed = f"{row['tokens_per_s']:.1f}"
            print(f"{title:26}{name:30}{speed:>26}{format_spread(ratio['median'], ratio['quartiles']):>22} of base")


if __name__ == "__main__":
    main()
