"""The kernels of one layer on a GPU: each one's time and traffic, and what must hold of them besides being right.

    python benchmarks/bench_kernels.py [--tokens 8192] [--channels 4096] [--streams 4] [--dtype bfloat16]

The layer is a LLaMA's as the library widens it, whose attention and MLP hand on what they get: all of its time is that
of two sites and their norms. Printed and written to benchmarks/results/: each kernel's time and rows of traffic as a
fraction of a copy measured in the same run; forward and backward of a site, one of eight in four layers that follow
each other, replayed as CUDA graphs, so that Python has no part in it; whether replaying gives the bits of running,
whether running twice does; compilations at other sequence lengths; launches a site of one decoded token. Without a GPU
it runs in Triton's interpreter (TRITON_INTERPRET=1), where times mean nothing. Shapes: T tokens, n streams, C channels.
"""

import argparse
import importlib
import pkgutil
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from timing import RESULTS, describe_run, measure_copy_rate, time_in_turns, time_once, write_report
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig

import mhc_hf.ops.triton
from mhc_hf import HyperConnection, MHCConfig
from mhc_hf.ops import backends
from mhc_hf.ops.triton import record

# layers in a row whose sites are timed: but for the first, each finds its projections made
NUM_LAYERS = 4
OTHER_LENGTHS = (1, 17, 100, 1000, 1024, 5000)


class HandOn(nn.Module):
    """A branch that costs nothing."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        return hidden_states


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    layer, streams = prepare(arguments)
    num_channels, device = arguments.channels, streams.device
    report: dict[str, Any] = describe_run(device) | {
        key: getattr(arguments, key) for key in ("tokens", "channels", "streams", "dtype")
    }
    copy_rate = measure_copy_rate(streams.nbytes, device) if device.type == "cuda" else None
    report["copy_GB_per_s"] = copy_rate and copy_rate / 1e9
    report["same_bits"] = repeats(layer, streams)
    report["compilations_at_other_lengths"] = count_compilations(layer, streams)
    report["launches_a_site_decoding"] = count_decoding_launches(arguments.streams, num_channels, streams)
    report["kernels"] = measure_kernels(layer, streams, num_channels, copy_rate, arguments.rounds)
    if device.type == "cuda":
        layers = make_layers(arguments.streams, num_channels, streams.dtype, device, NUM_LAYERS)
        report |= measure_site(layers, streams, arguments.rounds)
    print_results(report)
    write_report(report, arguments.output or RESULTS / f"kernels-{device.type}.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a measurement of one layer is told."""
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=4096)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path)


def prepare(arguments: argparse.Namespace) -> tuple[nn.Module, Tensor]:
    """The layer and its streams [1, T, n*C], random."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    if device.type == "cpu":
        # the interpreter stands for the device; what chooses by device must too
        backends._TRITON_DEVICES = (*backends._TRITON_DEVICES, "cpu")
    torch.manual_seed(0)
    layer = make_layers(arguments.streams, arguments.channels, dtype, device, 1)[0]
    shape = (1, arguments.tokens, arguments.streams * arguments.channels)
    return layer, torch.randn(shape, device=device).to(dtype).requires_grad_()


def make_layers(
    n: int, num_channels: int, dtype: torch.dtype, device: torch.device, num_layers: int, *, whole: bool = False
) -> nn.Sequential:
    """Layers with random maps and norms: between others, [B, S, n*C] -> [B, S, n*C], or a `whole` model's,
    [B, S, C] -> [B, S, C].
    """
    sizes = {"hidden_size": num_channels, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=num_layers if whole else num_layers + 2)
    with torch.device("meta"):
        model = AutoModel.from_config(MHCConfig.from_base(config, hc_mult=n))
    layers = nn.Sequential(*(model.layers if whole else model.layers[1:-1]))
    for layer in layers:
        layer.self_attn, layer.mlp = HandOn(), HandOn()
    layers.to_empty(device=device).to(dtype)
    for module in layers.modules():
        if isinstance(module, HyperConnection):
            module.reset_parameters()
            nn.init.normal_(module.phi, std=0.02)
    for layer in layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            nn.init.normal_(norm.weight, mean=1, std=0.1)
    return layers


def differentiate(layer: nn.Module, streams: Tensor) -> tuple[Tensor, ...]:
    """Output and the gradients of the streams and of all parameters."""
    out = layer(streams)
    return out, *torch.autograd.grad(out, (streams, *layer.parameters()), out)


def repeats(layer: nn.Module, streams: Tensor) -> bool:
    """Whether the same run twice gives the same bits."""
    first, second = differentiate(layer, streams), differentiate(layer, streams)
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def count_compilations(layer: nn.Module, streams: Tensor) -> int | None:
    """Kernels that are compiled for other sequence lengths than the first, None where nothing is compiled at all."""
    if triton.knobs.runtime.interpret:
        return None
    with listen_to_compilations() as compiled:
        for length in OTHER_LENGTHS:
            differentiate(layer, streams[:, :length].detach().clone().requires_grad_())
    return len(compiled)


@contextmanager
def listen_to_compilations() -> Iterator[list[str]]:
    """Names of the kernels that Triton has no compilation of, as it makes them."""
    compiled: list[str] = []
    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = lambda *_, **about: compiled.append(about["repr"])
    try:
        yield compiled
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


@torch.no_grad()
def count_decoding_launches(n: int, num_channels: int, streams: Tensor) -> float:
    """Kernels of any kind that one token starts in the layers of a model, but for the one that widens, for each site.

    Ours alone in the interpreter.
    """
    layers = make_layers(n, num_channels, streams.dtype, streams.device, NUM_LAYERS, whole=True)
    token = streams[:, :1, :num_channels].contiguous()
    layers(token)
    if streams.device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            layers(token)
            torch.cuda.synchronize(streams.device)
        started = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    else:
        with record.record_launches() as launches:
            layers(token)
        started = len(launches)
    return (started - 1) / (2 * NUM_LAYERS)


def measure_kernels(layer, streams, num_channels, copy_rate, num_rounds) -> list[dict[str, Any]]:
    """Every launch of a layer's forward and backward, by itself, again and again, on the arguments that it had."""
    with record.record_launches() as forward:
        out = layer(streams)
    with record.record_launches() as backward:
        torch.autograd.grad(out, (streams, *layer.parameters()), out)
    kernels, rows = find_kernels(), []
    for direction, launches in (("forward", forward), ("backward", backward)):
        for launch in launches:
            kernel = kernels[launch.kernel]
            seconds = [
                time_once(lambda launch=launch, kernel=kernel: kernel[launch.grid](**launch.arguments), streams.device)
                for _ in range(num_rounds)
            ]
            middle = statistics.median(seconds)
            num_rows = record.count_rows(launch, streams.shape[1], num_channels)
            rate = num_rows * streams.shape[1] * num_channels * streams.element_size() / middle
            rows.append(
                {
                    "kernel": launch.kernel.removesuffix("_kernel"),
                    "direction": direction,
                    "us": 1e6 * middle,
                    "rows": num_rows,
                    "GB_per_s": rate / 1e9,
                    "of_copy_rate": copy_rate and rate / copy_rate,
                }
            )
    return rows


def find_kernels() -> dict[str, Any]:
    """All kernels of the package, by name."""
    names = [found.name for found in pkgutil.iter_modules(mhc_hf.ops.triton.__path__)]
    modules = [importlib.import_module(f"mhc_hf.ops.triton.{name}") for name in names]
    return {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}


def measure_site(layers: nn.Sequential, streams: Tensor, num_rounds: int) -> dict[str, Any]:
    """Forward and backward of a site, as CUDA graphs of all; and whether those compute what running does."""
    want = differentiate(layers, streams)
    forward, _ = capture(lambda: (layers(streams),))
    both, got = capture(lambda: differentiate(layers, streams))
    for tensor in got:
        tensor.detach().fill_(float("nan"))
    both.replay()
    same = all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    times = time_in_turns({"forward": forward.replay, "both": both.replay}, streams.device, num_rounds)
    middle = {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}
    return {
        "graph_same_bits": same,
        "site_us": {
            "forward": middle["forward"] / (2 * len(layers)),
            "backward": (middle["both"] - middle["forward"]) / (2 * len(layers)),
        },
    }


def capture(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """A CUDA graph of `step` and the tensors that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answers = step()
    return graph, answers


def print_results(report: dict[str, Any]) -> None:
    """A table of the kernels, then one line a claim."""
    print(f"\nT = {report['tokens']}, n = {report['streams']}, C = {report['channels']}, {report['dtype']}")
    print(f"{'kernel':26}{'direction':>10}{'us':>12}{'rows':>6}{'GB/s':>10}{'of a copy':>11}")
    for row in report["kernels"]:
        part = f"{row['of_copy_rate']:.0%}" if row["of_copy_rate"] is not None else ""
        cells = f"{row['us']:12.1f}{row['rows']:6}{row['GB_per_s']:10.0f}{part:>11}"
        print(f"{row['kernel']:26}{row['direction']:>10}{cells}")
    for name in ("site_us", "copy_GB_per_s", "same_bits", "graph_same_bits"):
        print(f"{name:36}{report.get(name)}")
    for name in ("compilations_at_other_lengths", "launches_a_site_decoding"):
        print(f"{name:36}{report[name]}")


if __name__ == "__main__":
    main()
