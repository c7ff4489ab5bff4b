"""Loads self-contained folders where mhc_hf cannot be imported: python stranger.py FOLDERS RESULTS

FOLDERS holds a folder for each family. What came of each goes to RESULTS, for the tests to compare. At the end the
package may be imported after all, beside models whose code came with them.
"""

import copy
import pickle
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    pipeline,
)

TOKENS = torch.randint(2, 97, (2, 21), generator=torch.Generator().manual_seed(1))
HEADS = (AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoModelForTokenClassification)


class NotInstalled:
    """A finder for which mhc_hf does not exist."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mhc_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def observe(model):
    """Logits, tokens generated with a cache, the loss, all gradients, and the logits after a step of AdamW."""
    seen = {}
    with torch.no_grad():
        seen["logits"] = model(TOKENS).logits
        seen["generated"] = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    model.train()
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    seen["loss"] = loss.detach()
    seen["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        seen["trained"] = model(TOKENS).logits
    return seen


def distance(x, reference):
    """The largest difference, relative to the largest entry of `reference`."""
    return float((x - reference).detach().abs().max() / reference.detach().abs().max())


def load(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


def visit(folder, again):
    """Everything that one family is looked at for."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    seen = {"config": (type(config).__module__, type(config).__name__)}
    model = load(folder)
    seen["class"] = (type(model).__module__, type(model).__name__)
    seen |= observe(model)
    # what was trained here is saved, code included, and loads again
    model.save_pretrained(again)
    reloaded = load(again)
    seen["saved"] = distance(reloaded(TOKENS).logits, model(TOKENS).logits)
    seen["saved weights"] = all(map(torch.equal, reloaded.state_dict().values(), model.state_dict().values()))
    seen["decoder"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(TOKENS).last_hidden_state.detach()
    for auto_class in HEADS:
        head = auto_class.from_pretrained(folder, trust_remote_code=True)
        out = head(TOKENS)
        (out.logits if "logits" in out else out.start_logits + out.end_logits).sum().backward()
        sites = [parameter for name, parameter in head.named_parameters() if "_hc." in name]
        seen[auto_class.__name__] = type(head).__name__, all(p.grad is not None for p in sites) and len(sites)
    return seen


def meet_the_package(folder):
    """A model with its own code and one of the package, in one process."""
    guest = load(folder)
    before = guest(TOKENS).logits
    import mhc_hf

    host = load(folder)
    loss = guest.train()(TOKENS, labels=TOKENS).loss
    loss.backward()
    return {
        "guest is a guest": not isinstance(guest, mhc_hf.MHCModel | mhc_hf.MHCForCausalLM),
        "host is the package's": isinstance(host, mhc_hf.MHCForCausalLM),
        "guest computes on": torch.equal(guest.eval()(TOKENS).logits, before),
        "loss": loss.detach(),
        "host's logits": host(TOKENS).logits.detach(),
    }


def main(folders, results):
    stranger = NotInstalled()
    sys.meta_path.insert(0, stranger)
    found = {folder.name: visit(folder, results.parent / "saved" / folder.name) for folder in sorted(folders.iterdir())}
    llama = folders / "llama"
    model = load(llama)
    logits = model(TOKENS).logits.detach()
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    found["copies"] = [distance(twin(TOKENS).logits, logits) for twin in twins]
    tokenizer = AutoTokenizer.from_pretrained(llama, trust_remote_code=True)
    ids = tokenizer("names", return_tensors="pt").input_ids
    generator = pipeline("text-generation", model=str(llama), trust_remote_code=True)
    (written,) = generator("names", max_new_tokens=3, do_sample=False, return_tensors=True)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)[0].tolist()
    found["pipeline"] = written["generated_token_ids"], expected
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found["compiled"] = distance(compiled(TOKENS).logits, logits)
    recomputed = observe(load(llama, hc_recompute=True))["gradients"]
    found["recompute"] = all(torch.equal(recomputed[name], g) for name, g in found["llama"]["gradients"].items())
    half = load(llama, dtype=torch.bfloat16)
    found["dtypes"] = {("_hc." in name, parameter.dtype) for name, parameter in half.named_parameters()}
    found["package was there"] = "mhc_hf" in sys.modules
    sys.meta_path.remove(stranger)
    found["together"] = meet_the_package(llama)
    torch.save(found, results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
