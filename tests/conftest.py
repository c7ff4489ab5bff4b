"""Small real models, made once a session. Odd little shapes throughout."""

import os

# before torch: the tests are many small operations, which a second thread only slows down
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from mhc_hf.modeling.layer import MHCDecoderLayer  # and the Auto classes know the families

VOCAB_SIZE = 97


def tiny_config(model_type: str, **overrides):
    """A decoder configuration of a few thousand parameters, with grouped queries and an odd hidden size."""
    fields = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=60,
        intermediate_size=84,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return CONFIG_MAPPING[model_type](**(fields | overrides))


def tiny_model(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random decoder whose logits are far from flat: weights three times the usual, norms that are not all one."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
    return model


@torch.no_grad()
def streams_between_layers(model, *args, **kwargs) -> list[torch.Tensor]:
    """What each layer but the last hands to the next, [B, S, n, C]."""
    streams = []
    handles = [
        layer.register_forward_hook(
            lambda _, args, out: streams.append((out[0] if isinstance(out, tuple) else out).detach())
        )
        for layer in model.modules()
        if isinstance(layer, MHCDecoderLayer) and not layer.collapses
    ]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return [x.unflatten(-1, (model.config.hc_mult, -1)) for x in streams]


@pytest.fixture(scope="session")
def llama():
    return tiny_model("llama")


@pytest.fixture(scope="session")
def token_ids():
    """[2, 63]"""
    return torch.randint(2, VOCAB_SIZE, (2, 63), generator=torch.Generator().manual_seed(1))
