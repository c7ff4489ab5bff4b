"""Widened models on the kernels, under Triton's interpreter: prints one JSON object of claims and their figures.

Run with TRITON_INTERPRET=1 by `test_kernels.py`. Taking the variable away for a while gives what a CPU runs.
"""

import copy
import json
import os
import sys
from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_hf import HyperConnection, MHCForCausalLM
from mhc_hf.ops.triton import passes, record

from ..conftest import tiny_model

torch.set_num_threads(1)
SCALED = dict(layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=0, per_layer_config={})
TOKEN_IDS = torch.tensor([[3, 1, 4, 1, 5]])


def widen(family="llama", **base):
    """A tiny model whose maps and norms are away from their start."""
    model = tiny_model(family, **(dict(num_hidden_layers=2, hidden_size=36, intermediate_size=48) | base))
    # two iterations: the interpreter's time is Sinkhorn's
    widened = MHCForCausalLM.from_base(model, hc_mult=3, hc={"hc_sinkhorn_iters": 2}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in widened.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            if name.endswith("phi"):
                parameter.normal_(std=0.05, generator=generator)
    return widened


@contextmanager
def on_a_cpu():
    del os.environ["TRITON_INTERPRET"]
    yield
    os.environ["TRITON_INTERPRET"] = "1"


def distance(got, want):
    """Largest relative error over a dictionary of tensors, infinite where the names differ."""
    if got.keys() != want.keys():
        return float("inf")
    return max(((got[k] - want[k]).norm() / want[k].norm().clamp_min(1e-6)).item() for k in want)


@torch.no_grad()
def infer(model):
    out = model(TOKEN_IDS, output_hidden_states=True)
    return {"logits": out.logits} | {f"hidden {k}": h for k, h in enumerate(out.hidden_states)}


@torch.inference_mode()
def infer_in_inference_mode(model):
    return {name: tensor.clone() for name, tensor in infer(model).items()}


def train(model):
    """Gradients of every parameter, where the streams between layers are read by somebody else too."""
    model.train().zero_grad()
    out = model(TOKEN_IDS, labels=TOKEN_IDS, output_hidden_states=True)
    (out.loss + out.hidden_states[1].square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(run, model, plain=None):
    """[distance of what `run` gives on the kernels from what it, or `plain`, gives without them, kernels launched]."""
    with on_a_cpu():
        want = (plain or run)(copy.deepcopy(model))
    with record.record_launches() as launches:
        got = run(copy.deepcopy(model))
    return [distance(got, want), describe(launches)]


def find_differences(run, other, model):
    """Names of what two runs do not give to the bit."""
    first, second = run(copy.deepcopy(model)), other(copy.deepcopy(model))
    return [name for name in first if not torch.equal(first[name], second[name])]


class Counting(TorchDispatchMode):
    """Counts the operations that launch something."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "new_empty", "empty_like", "_unsafe_view"):
            self.operations[name] += 1
        return func(*args, **(kwargs or {}))


def describe(launches):
    return [one.kernel.removesuffix("_kernel") + (" norm" if one.arguments.get("NORM") else "") for one in launches]


def with_change(change, run):
    def changed(model):
        return run(change(model) or model)

    return changed


def steer(model):
    model.model.layers[0].register_forward_hook(lambda module, args, out: out.add_(0.5))


def watch_site(model):
    model.model.layers[0].ffn_hc.register_forward_pre_hook(lambda module, args: args[0].shape and None)


def watch_first_site(model):
    model.model.layers[0].attn_hc.register_forward_pre_hook(lambda module, args: args[0].shape and None)


def watch_last_site(model):
    """Whoever watches it sees streams, and may change them."""
    model.model.layers[-1].ffn_hc.register_forward_hook(lambda module, args, out: out * torch.linspace(1, 2, 108))


def watch_norm(model):
    model.model.layers[0].input_layernorm.register_forward_hook(lambda module, args, out: 2 * out)


def gather_late(model):
    """As sharding does it: a parameter is empty until its layer's turn comes."""
    layer = model.model.layers[1]
    phi, whole = layer.attn_hc.phi, layer.attn_hc.phi.data
    phi.data = torch.empty(0)
    layer.register_forward_pre_hook(lambda module, args: setattr(phi, "data", whole))


def swap_layers(model):
    layers = model.model.layers
    layers[1].collapses, layers[0].collapses = False, False
    layers.insert(1, copy.deepcopy(layers[1]))
    layers[2].collapses = True
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = 3


def checkpoint(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def recompute(model):
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.recompute = True


def adapt(model):
    from peft import get_peft_model

    from mhc_hf.training import mhc_lora_config

    torch.manual_seed(0)
    return get_peft_model(model, mhc_lora_config(model, r=2))


def compile_whole(model):
    train(model)  # transformers installs its recording hooks once, and not while a graph is traced
    model.model.forward = torch.compile(model.model.forward, fullgraph=True, backend="aot_eager")


@torch.no_grad()
def decode(model):
    """Launches of one cached step, and how far its logits are from those of the whole sequence."""
    cache = model(TOKEN_IDS[:, :-1], use_cache=True).past_key_values
    with record.record_launches() as launches:
        logits = model(TOKEN_IDS[:, -1:], past_key_values=cache).logits[:, -1]
    with on_a_cpu():
        want = model(TOKEN_IDS).logits[:, -1]
    return [distance({"logits": logits}, {"logits": want}), describe(launches)]


@torch.no_grad()
def count_added_operations(model):
    """{operation: how many more of it a decoding step makes than the base's}, but for views and fresh memory."""
    counts = []
    for one in (tiny_model("llama", num_hidden_layers=2, hidden_size=36, intermediate_size=48), model):
        cache = one(TOKEN_IDS[:, :-1], use_cache=True).past_key_values
        # not the interpreter's own operations
        with patch.object(passes, "run_kernel"), Counting() as counting:
            one(TOKEN_IDS[:, -1:], past_key_values=cache)
        counts.append(counting.operations)
    base, widened = counts
    return {name: number - base[name] for name, number in widened.items() if number > base[name]}


def main() -> None:
    """All figures as JSON on standard output."""
    llama = widen()
    result = {
        "inference": compare(infer, llama),
        "training": compare(train, llama),
        "decoding": decode(llama),
        "operations added": count_added_operations(llama),
        "one layer": compare(infer, widen(num_hidden_layers=1)),
        "one site a layer": compare(infer, widen("cohere")),
        "scaled streams": compare(infer, widen("gemma4_text", **SCALED)),
        "inference mode": compare(infer_in_inference_mode, llama),
        "adapted inference": compare(with_change(adapt, infer), llama),
        "watched last site": compare(with_change(watch_last_site, infer), llama),
        "watched first site": compare(with_change(watch_first_site, infer), llama),
        "steered": compare(with_change(steer, infer), llama),
        "watched site": compare(with_change(watch_site, infer), llama),
        "watched norm": compare(with_change(watch_norm, infer), llama),
        "gathered late": compare(with_change(gather_late, infer), llama),
        "another layer follows": compare(with_change(swap_layers, infer), llama),
        "checkpointed": compare(with_change(checkpoint, train), llama),
        "checkpointing changes": find_differences(with_change(checkpoint, train), train, llama),
        "recomputed": compare(with_change(recompute, train), llama),
        "adapted": compare(with_change(adapt, train), llama),
        "compiled": compare(with_change(compile_whole, train), llama, plain=train),
        "another norm": compare(infer, widen("gemma")),
    }
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
