"""Models whose maps are known, because they were put there by hand."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.configuration_utils import ALLOWED_LAYER_TYPES

from mhc_hf import HyperConnection, MHCForCausalLM

from ..conftest import VOCAB_SIZE

# transformers 5.17 calls it by another name
GLM_ATTENTION = next(name for name in ("indexed_attention", "deepseek_sparse_attention") if name in ALLOWED_LAYER_TYPES)
TINY = dict(vocab_size=VOCAB_SIZE, hidden_size=64, num_hidden_layers=3, pad_token_id=0, hc_mult=4)
TINY_TRANSFORMERS_MODELS = {
    "deepseek_v4": TINY
    | dict(
        moe_intermediate_size=48,
        num_attention_heads=4,
        head_dim=16,
        q_lora_rank=24,
        o_groups=2,
        o_lora_rank=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        sliding_window=16,
        num_nextn_predict_layers=0,
    ),
    "glm5_next": TINY
    | dict(
        intermediate_size=48,
        moe_intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=24,
        v_head_dim=16,
        qk_nope_head_dim=16,
        index_topk=8,
        index_kpool=4,
        index_head_dim=16,
        index_n_heads=2,
        linear_head_dim=16,
        linear_num_heads=4,
        layer_types=["linear_attention", "linear_attention", GLM_ATTENTION],
    ),
}


def tiny_transformers_model(model_type):
    """A model with transformers' own hyper-connections, whose maps are far from symmetric and differ by token."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {model_type}")
    fields = TINY_TRANSFORMERS_MODELS[model_type]
    if model_type == "glm5_next":
        # text and images: the eyes stay as small as they can be, and shut
        eyes = dict(depth=1, hidden_size=16, num_heads=2, out_hidden_size=64, intermediate_size=16)
        config = CONFIG_MAPPING[model_type](
            text_config=fields, vision_config=eyes | {"projection_intermediate_size": 16}
        )
    else:
        config = CONFIG_MAPPING[model_type](**fields)
    torch.manual_seed(0)
    auto_class = AutoModelForImageTextToText if model_type == "glm5_next" else AutoModelForCausalLM
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_hc." in name:
                parameter.copy_(torch.randn_like(parameter) * (0.1 if name.endswith("fn") else 1))
    return model


def sites(model):
    return [module for module in model.modules() if isinstance(module, HyperConnection)]


@torch.no_grad()
def set_maps(site, h_pre, h_post, res_logits):
    """Make the maps of a site the same for every token."""
    site.phi.zero_()
    h_pre, h_post, res_logits = (torch.as_tensor(h, dtype=torch.float64) for h in (h_pre, h_post, res_logits))
    site.bias.copy_(torch.cat([h_pre.logit(), (h_post / 2).logit(), res_logits.flatten()]).float())


def doubly_stochastic(n, seed):
    """[n, n] float64, far from symmetric; its rows and columns sum to 1 to 1e-12."""
    m = torch.rand(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    for _ in range(2000):
        m = m / m.sum(0, keepdim=True)
        m = m / m.sum(1, keepdim=True)
    return m


@pytest.fixture
def widened(llama):
    """Three layers, six sites, four streams, float64 activations."""
    return MHCForCausalLM.from_base(copy.deepcopy(llama).double(), hc_mult=4)
