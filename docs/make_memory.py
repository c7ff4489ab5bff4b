"""Draws docs/memory.png, what a training step keeps for backward: python docs/make_memory.py [--compiled]

A LLaMA-shaped model of 24 layers and what it becomes with n streams, without and with hc_recompute. Prints the same
numbers; with --compiled those under torch.compile too, for n = 4, which takes minutes.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from mhc_hf import MHCForCausalLM  # noqa: E402
from mhc_hf.plotting import COLORS, plot_curves, save_figure  # noqa: E402
from tests.modeling.memory import allocated_bytes  # noqa: E402

MULTS = (2, 3, 4, 6, 8)
RECOMPUTE = {"widened": False, "widened, hc_recompute": True}
LINES = {"base": COLORS["base"], "widened": COLORS["widened"], "widened, hc_recompute": COLORS["accent"]}
SHAPE = dict(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_hidden_layers=24, vocab_size=1024)
TOKENS = torch.randint(1024, (2, 128), generator=torch.Generator().manual_seed(0))


def widen(base: LlamaForCausalLM, n: int, recompute: bool):
    return MHCForCausalLM.from_base(copy.deepcopy(base), n, hc={"hc_recompute": recompute})


def measure(dtype: torch.dtype) -> dict[str, list[list[tuple[float, float]]]]:
    """By line: (n, MiB), one curve, as `plot_curves` takes them."""
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype).train()
    of_base = allocated_bytes(base, TOKENS)
    curves = {"base": [[(n, of_base / 2**20) for n in MULTS]]}
    for line, recompute in RECOMPUTE.items():
        curves[line] = [[(n, allocated_bytes(widen(base, n, recompute), TOKENS) / 2**20) for n in MULTS]]
        ratios = ", ".join(f"{mib * 2**20 / of_base:.2f} for n = {n}" for n, mib in curves[line][0])
        print(f"{dtype}, {line}: times the base's {ratios}", flush=True)
    return curves


def measure_compiled(backend: str = "aot_eager_decomp_partition") -> None:
    """With the partitioner that inductor uses; what is kept does not hang on the code that it makes afterwards."""
    base = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    kept = {"base": base} | {line: widen(base, 4, recompute) for line, recompute in RECOMPUTE.items()}
    for line, model in kept.items():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend)
        compiled(TOKENS, labels=TOKENS)
        kept[line] = allocated_bytes(compiled, TOKENS)
        print(f"compiled, {line}: times the base's {kept[line] / kept['base']:.2f} for n = 4", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiled", action="store_true")
    torch.manual_seed(0)
    panels = {
        f"{name}, MiB of {TOKENS.numel()} tokens": measure(dtype)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    title = "What a training step keeps for backward, LLaMA shape, 24 layers"
    figure = plot_curves(panels, LINES, title, xlabel="residual streams n")
    for axes in figure.axes:
        axes.set_ylim(0)
    save_figure(figure, ROOT / "docs" / "memory.png")
    if parser.parse_args().compiled:
        measure_compiled()
