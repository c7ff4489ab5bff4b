"""Runs every engine on two ranks and measures how far it is from one process: the two-rank test, and a command.

python -m tests.training.engine_runs --family qwen3 --layers 12 --mults 3 4 --dtype float64
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mhc_hf import MHCForCausalLM

from ..conftest import VOCAB_SIZE, tiny_model
from .launching import run_python
from .two_ranks import ENGINES


def write_start(folder, n, family="llama", dtype=torch.float64, recompute=False, **base):
    """A widened model with n streams and a batch, where two_ranks.py looks for them."""
    base_model = tiny_model(family, vocab_size=98, **base).to(dtype)
    model = MHCForCausalLM.from_base(base_model, hc_mult=n, hc={"hc_recompute": recompute})
    generator = torch.Generator().manual_seed(n)
    with torch.no_grad():
        # away from the start, where some gradients are zero
        for name, parameter in model.named_parameters():
            if "_hc." in name:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder / str(n) / "start")
    tokens = torch.randint(2, VOCAB_SIZE, (8, 17), generator=generator)
    (folder / str(n) / "start" / "tokens.json").write_text(json.dumps(tokens.tolist()))


def run_engines(folder):
    run_python(Path(__file__).with_name("two_ranks.py"), folder, ranks=2)


def one_process(folder, engine):
    """(model with gradients, loss) of what `engine` started from, the checkpoint of the engine before it."""
    names = ["start", *ENGINES]
    before = names[names.index(engine) - 1]
    model = AutoModelForCausalLM.from_pretrained(folder / before / ("" if before == "start" else "checkpoint")).train()
    tokens = torch.tensor(json.loads((folder / "start" / "tokens.json").read_text()))
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return model, float(loss.detach())


def two_ranks(folder, engine):
    """(loss, gradients by name) that each rank has found."""
    return [
        (
            json.loads((folder / engine / f"loss-{rank}.json").read_text()),
            load_file(folder / engine / f"gradients-{rank}.safetensors"),
        )
        for rank in (0, 1)
    ]


def relative_error(value, reference):
    """|value - reference| / |reference| of a whole tensor, or of several seen as one."""
    return float((value.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm())


def measure(folder, engine):
    """Relative errors of the loss, of all gradients seen as one, and the worst of one gradient by kind."""
    model, loss = one_process(folder, engine)
    errors, gradients = {"loss": 0.0}, {}
    for rank_loss, share in two_ranks(folder, engine):
        errors["loss"] = max(errors["loss"], abs(rank_loss - loss) / abs(loss))
        gradients |= share
    references = {name: model.get_parameter(name).grad for name in gradients}
    errors["all"] = relative_error(
        *(torch.cat([gradient.double().flatten() for gradient in side.values()]) for side in (gradients, references))
    )
    for name, gradient in gradients.items():
        kind = name.rpartition(".")[2] if "_hc." in name else "base"
        errors[kind] = max(errors.get(kind, 0.0), relative_error(gradient, references[name]))
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="llama", help="model type; a tiny random model of it is widened")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--mults", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--dtype", default="float64", choices=["float32", "float64"])
    parser.add_argument("--recompute", action="store_true", help="with hc_recompute")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dtype = getattr(torch, args.dtype)
        for n in args.mults:
            write_start(Path(folder), n, args.family, dtype, args.recompute, num_hidden_layers=args.layers)
        run_engines(folder)
        for n in args.mults:
            for engine in ENGINES:
                errors = measure(Path(folder, str(n)), engine)
                print(f"n={n} {engine:16}", *(f"{what} {error:.1e}" for what, error in errors.items()), flush=True)


if __name__ == "__main__":
    main()
