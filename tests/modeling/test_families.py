"""Every family in the table: its layers are what the table says, and its widened model is its base in all that it does.

One tiny model a variant of a family, far from flat (`family_models.py`); a claim that is about names on disk or about
the optimizer takes a family's first variant only.
"""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM

from mhc_hf import MHCForCausalLM
from mhc_hf.conversion import convert_checkpoint
from mhc_hf.modeling.families import family_of, supported_families
from mhc_hf.modeling.layer import MHCDecoderLayer
from mhc_hf.modeling.steps import Context, resolve, run_chain
from mhc_hf.modeling.sublayers import FAMILIES, REFUSED

from ..conftest import VOCAB_SIZE, streams_between_layers
from .family_models import WINDOW, family_model, variants_of

CASES = [(family, variant) for family in supported_families() for variant in range(len(variants_of(family)))]
FIRST = [(family, 0) for family in supported_families()]
# float32 rounding of some ten operations a site over up to ten sites, and what a norm makes of it
LOGITS = 1e-5
NEW_TOKENS = 32


def cases(chosen):
    ids = [family if len(variants_of(family)) == 1 else f"{family}-{variant}" for family, variant in chosen]
    return pytest.mark.parametrize("base", chosen, ids=ids, indirect=True, scope="module")


@pytest.fixture(scope="module")
def base(request):
    return family_model(*request.param)


@pytest.fixture(scope="module")
def tokens():
    """[2, 40], far beyond every window."""
    return torch.randint(2, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))


def distance(x, reference):
    """The largest difference, relative to the largest entry of `reference`."""
    return float((x - reference).detach().abs().max() / reference.detach().abs().max())


def layers_of(model):
    family = family_of(getattr(model.config, "base_model_type", None) or model.config.model_type)
    decoder = next(m for m in [model, *model.children()] if hasattr(m, family.layers.split(".")[0]))
    return family, decoder.get_submodule(family.layers)


@torch.no_grad()
@cases(CASES)
def test_the_layer_is_its_sub_layers(base, tokens):
    family, layers = layers_of(base)
    calls = {}
    handles = [
        layer.register_forward_hook(
            lambda layer, args, kwargs, out: calls.update({layer: (args, kwargs, out)}), with_kwargs=True
        )
        for layer in layers
    ]
    base(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(calls) == len(layers)
    for index, (layer, (args, kwargs, out)) in enumerate(calls.items()):
        form = family.form(base.config, index)
        assert form in family.forms
        bound = inspect.signature(type(layer).forward).bind(layer, *args, **kwargs)
        bound.apply_defaults()
        _, x, *_ = bound.args
        named = dict(list(bound.arguments.items())[2:])
        context = Context(named, named.pop("kwargs", {}))
        for chain in form.sites.values():
            x = x + run_chain(resolve(chain, layer), layer, x, context).view_as(x)
        if form.stream_scale:
            x = x * getattr(layer, form.stream_scale)
        assert isinstance(out, tuple) == (form.returns is not None)
        # the same operations up to the order of one addition
        assert distance(x, out[0] if isinstance(out, tuple) else out) <= 1e-6, f"layer {index}"


@torch.no_grad()
@cases(CASES)
def test_logits_are_the_bases(base, tokens):
    expected = base(tokens).logits
    assert expected.std() > 0.01
    for n, start in [(4, "orthogonal"), (2, "copies")]:
        widened = MHCForCausalLM.from_base(base, hc_mult=n, start=start)
        assert isinstance(widened, MHCForCausalLM) and isinstance(widened, type(base))
        assert all(isinstance(layer, MHCDecoderLayer) for layer in layers_of(widened)[1])
        assert distance(widened(tokens).logits, expected) <= LOGITS


@cases(CASES)
def test_continuations_are_the_bases(base, tokens):
    """Greedily, with a cache, past the window, left padding before one of the two."""
    prompt = tokens[:, : WINDOW + 2].clone()
    prompt[0, :4] = 0
    arguments = dict(attention_mask=(prompt != 0).long(), max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = base.generate(prompt, **arguments)
    assert len(expected[0].unique()) > 5, "a continuation that repeats itself shows little"
    widened = MHCForCausalLM.from_base(base)
    assert torch.equal(widened.generate(prompt, **arguments), expected)
    # transformers compiles, and so gives a static cache, exactly these; Falcon's own code has none with alibi
    if base._can_compile_fullgraph and not getattr(base.config, "alibi", False):
        arguments |= dict(cache_implementation="static", max_new_tokens=12)
        assert torch.equal(widened.generate(prompt, **arguments), base.generate(prompt, **arguments))


@cases(CASES)
def test_gradients_are_the_bases(base, tokens):
    widened = MHCForCausalLM.from_base(base)
    for model in (base, widened):
        model.train()
        model(tokens, labels=tokens).loss.backward()
        model.eval()
    total = torch.stack([p.grad.norm() for p in base.parameters() if p.grad is not None]).norm()
    for name, parameter in base.named_parameters():
        got = widened.get_parameter(name).grad
        assert (got is None) == (parameter.grad is None), name
        if got is not None:
            assert float((got - parameter.grad).norm()) <= 1e-5 * float(parameter.grad.norm() + total), name
    base.zero_grad()


@cases(FIRST)
def test_five_steps_part_the_streams(base, tokens):
    # a model of its own: from_base shares its tensors
    widened = MHCForCausalLM.from_base(family_model(base.config.model_type), hc_mult=3, start="copies").train()
    optimizer = torch.optim.AdamW(widened.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        widened(tokens, labels=tokens).loss.backward()
        optimizer.step()
    streams = streams_between_layers(widened.eval(), tokens)
    assert len(streams) == len(layers_of(widened)[1]) - 1
    for x in streams:
        # copies that nothing parts stay equal to the last bit
        assert distance(x.mean(-2, keepdim=True), x) > 1e-6


@torch.no_grad()
@cases(FIRST)
def test_what_is_on_disk_loads_with_nothing_missing(base, tokens, tmp_path):
    """The base as transformers saves it; widened while it loads; converted; and the widened model saved in its turn."""
    base.save_pretrained(tmp_path / "base")
    expected = base(tokens).logits

    widened, info = MHCForCausalLM.from_base(tmp_path / "base", output_loading_info=True)
    assert not any(info.values()), info
    assert distance(widened(tokens).logits, expected) <= LOGITS

    convert_checkpoint(tmp_path / "base", tmp_path / "converted")
    converted, info = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not any(info.values()), info
    assert type(converted) is type(widened)
    assert torch.equal(converted(tokens).logits, widened(tokens).logits)

    widened.save_pretrained(tmp_path / "saved")
    saved, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert saved.state_dict().keys() == widened.state_dict().keys()
    assert torch.equal(saved(tokens).logits, widened(tokens).logits)


def test_sixty_families():
    assert len(supported_families()) >= 60
    assert not FAMILIES.keys() & REFUSED.keys()
