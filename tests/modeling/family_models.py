"""A tiny random model of every family in the table, with what is special to the family small but present.

Experts are routed, windows are shorter than the sequences, hybrids have layers of every kind, multipliers are not 1.
"""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ..conftest import VOCAB_SIZE

COMMON = dict(
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
WINDOW = 7
# dropouts are looked at apart: with them a model in training would differ from itself
NO_DROPOUT = dict(attention_dropout=0.0, hidden_dropout=0.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
MLA = dict(
    num_key_value_heads=6,
    head_dim=4,
    kv_lora_rank=12,
    q_lora_rank=14,
    qk_rope_head_dim=4,
    qk_nope_head_dim=6,
    v_head_dim=8,
)
SPARSE = dict(mlp_layer_types=["dense", "sparse", "sparse"])
FULL_AND_SLIDING = dict(layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=WINDOW)
FULL_AND_LINEAR = dict(layer_types=["linear_attention", "full_attention", "linear_attention"])
DELTA_NET = (
    dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6)
    | FULL_AND_LINEAR
)
MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=15, mamba_n_groups=2, mamba_d_state=8, mamba_expand=2, mamba_chunk_size=16)
INDEXER = dict(index_topk=9, index_head_dim=8, index_n_heads=2)
GPT2_NAMES = dict(n_embd=60, n_layer=3, n_head=6, n_positions=256, n_inner=84)
MULTIPLIERS = dict(embedding_multiplier=1.7, residual_multiplier=0.4, attention_multiplier=0.3, logits_scaling=2.0)


def routed(num="num_experts", top="num_experts_per_tok", width="moe_intermediate_size", **more):
    return {num: 6, top: 2, width: 24} | more


# variants of a family's configuration: fields beside and instead of COMMON; None leaves a common one out
VARIANTS: dict[str, list[dict]] = {
    "afmoe": [routed(num_shared_experts=1, num_dense_layers=1) | FULL_AND_SLIDING],
    "aria_text": [dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1, intermediate_size=24)],
    "axk1": [MLA | routed("n_routed_experts", n_group=2, topk_group=1) | SPARSE],
    "axk2": [MLA | routed("n_routed_experts", gated_norm_rank=4) | SPARSE | INDEXER],
    "bailing_hybrid": [
        MLA
        | FULL_AND_LINEAR
        | SPARSE
        | routed(top="num_experts_per_token", num_expert_group=2, topk_group=1)
        | dict(linear_head_dim=8, linear_num_heads=4, q_lora_rank=None)
    ],
    "bamba": [MAMBA2 | dict(attn_layer_indices=[1])],
    "biogpt": [NO_DROPOUT | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)],
    "codegen": [GPT2_NAMES | NO_DROPOUT | dict(rotary_dim=4, num_attention_heads=4, n_head=4)],
    "cohere": [dict(use_qk_norm=True, logit_scale=0.3), {}],
    "cohere2": [FULL_AND_SLIDING],
    "cohere2_moe": [FULL_AND_SLIDING | routed(num_shared_experts=1) | SPARSE],
    "cohere_compass_text": [
        FULL_AND_SLIDING
        | dict(
            rope_parameters={
                kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 1]}
                for kind in ("full_attention", "sliding_attention")
            }
        )
    ],
    "deepseek_v2": [
        MLA | routed("n_routed_experts", n_shared_experts=1, first_k_dense_replace=1, topk_method="greedy"),
        MLA
        | routed("n_routed_experts", n_group=2, topk_group=1, topk_method="group_limited_greedy")
        | dict(q_lora_rank=None),
    ],
    "deepseek_v3": [MLA | routed("n_routed_experts", n_group=2, topk_group=1, first_k_dense_replace=1)],
    "deepseek_v32": [MLA | routed("n_routed_experts", n_group=2, topk_group=1) | SPARSE | INDEXER],
    "dots1": [
        routed("n_routed_experts", n_shared_experts=1, first_k_dense_replace=1) | FULL_AND_SLIDING,
    ],
    "dots3_note_text": [
        MLA
        | routed("n_routed_experts")
        | SPARSE
        | INDEXER
        | dict(
            layer_types=["indexed_attention", "sliding_attention", "indexed_attention"],
            sliding_window=WINDOW,
            shared_experts_intermediate_size=20,
            swa_num_attention_heads=3,
            swa_num_key_value_heads=3,
            swa_q_lora_rank=14,
            swa_kv_lora_rank=12,
            swa_head_dim=10,
            swa_qk_nope_head_dim=6,
            swa_v_head_dim=8,
        )
    ],
    "ernie4_5_moe": [
        routed("moe_num_experts", "moe_k", moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=2)
    ],
    "exaone4": [FULL_AND_SLIDING],
    "exaone_moe": [routed(num_shared_experts=1) | FULL_AND_SLIDING | SPARSE],
    "falcon": [
        NO_DROPOUT | dict(head_dim=None, parallel_attn=True),
        NO_DROPOUT | dict(head_dim=None, parallel_attn=False, alibi=True),
        NO_DROPOUT | dict(head_dim=None, new_decoder_architecture=True, num_kv_heads=2),
        NO_DROPOUT | dict(head_dim=None, new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    ],
    "falcon_h1": [
        MAMBA2
        | dict(mamba_d_ssm=120, ssm_out_multiplier=0.7, attention_in_multiplier=1.3, attention_out_multiplier=0.6)
    ],
    "flex_olmo": [routed(num_shared_experts=1)],
    "flint": [
        routed(shared_expert_intermediate_size=20, mlp_only_layers=[0]) | FULL_AND_SLIDING,
    ],
    "gemma2": [FULL_AND_SLIDING | dict(final_logit_softcapping=3.0, attn_logit_softcapping=2.0)],
    "gemma3_text": [FULL_AND_SLIDING],
    "gemma4_text": [
        FULL_AND_SLIDING
        | dict(
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB_SIZE,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            num_kv_shared_layers=2,
            per_layer_config={1: {"head_dim": 20}, 3: {"head_dim": 20}},
        ),
        FULL_AND_SLIDING
        | routed(top="top_k_experts", enable_moe_block=True, hidden_size_per_layer_input=0, per_layer_config={}),
    ],
    "gemma4_unified_text": [
        FULL_AND_SLIDING
        | dict(
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            num_kv_shared_layers=2,
            per_layer_config={1: {"head_dim": 20}, 3: {"head_dim": 20}},
        )
    ],
    "glm4_moe": [routed("n_routed_experts", n_shared_experts=1, first_k_dense_replace=1)],
    "glm4_moe_lite": [MLA | routed("n_routed_experts") | SPARSE],
    "glm_moe_dsa": [
        MLA | routed("n_routed_experts") | SPARSE | INDEXER | dict(indexer_types=["full", "shared", "full"])
    ],
    "gpt2": [GPT2_NAMES | NO_DROPOUT],
    "gpt_bigcode": [
        GPT2_NAMES | NO_DROPOUT | dict(multi_query=True),
        GPT2_NAMES | NO_DROPOUT | dict(multi_query=False),
    ],
    "gpt_neo": [
        NO_DROPOUT
        | dict(
            num_heads=6,
            num_layers=4,
            num_hidden_layers=None,
            attention_types=[[["global", "local"], 2]],
            window_size=WINDOW,
            resid_dropout=0.0,
            embed_dropout=0.0,
        )
    ],
    "gpt_neox": [
        NO_DROPOUT | dict(use_parallel_residual=True),
        NO_DROPOUT | dict(use_parallel_residual=False),
    ],
    "gpt_oss": [dict(num_local_experts=6, num_experts_per_tok=2) | FULL_AND_SLIDING],
    "gptj": [GPT2_NAMES | NO_DROPOUT | dict(rotary_dim=4)],
    "granite": [MULTIPLIERS],
    "granite_swa": [MULTIPLIERS | FULL_AND_SLIDING | dict(layer_rope_theta=[1e4, 0, 1e4])],
    "granitemoe": [MULTIPLIERS | dict(num_local_experts=6, num_experts_per_tok=2)],
    "granitemoe_swa": [
        MULTIPLIERS
        | FULL_AND_SLIDING
        | dict(num_local_experts=6, num_experts_per_tok=2, layer_rope_theta=[1e4, 0, 1e4], shared_intermediate_size=20)
    ],
    "granitemoehybrid": [
        MULTIPLIERS
        | MAMBA2
        | FULL_AND_LINEAR
        | dict(num_local_experts=experts, num_experts_per_tok=2, shared_intermediate_size=20)
        for experts in (6, 0)
    ],
    "granitemoeshared": [
        MULTIPLIERS | dict(num_local_experts=6, num_experts_per_tok=2, shared_intermediate_size=shared)
        for shared in (20, 0)
    ],
    "hunyuan_v1_moe": [dict(num_experts=6, moe_topk=[2, 2, 2], moe_intermediate_size=[24, 24, 24])],
    "hy_v3": [routed() | SPARSE],
    "hyperclovax": [MULTIPLIERS | dict(use_post_norm=True), MULTIPLIERS | dict(use_post_norm=False)],
    "inkling_text": [
        routed("n_routed_experts", n_shared_experts=1)
        | SPARSE
        | dict(
            swa_num_attention_heads=6,
            swa_num_key_value_heads=2,
            swa_head_dim=10,
            sliding_window_size=WINDOW,
            d_rel=4,
            rel_extent=64,
            layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
            unpadded_vocab_size=VOCAB_SIZE,
        )
    ],
    "jamba": [
        dict(
            num_experts=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_dt_rank=6,
            mamba_d_state=8,
            use_mamba_kernels=False,
        )
    ],
    "jetmoe": [dict(num_key_value_heads=3, kv_channels=10, num_local_experts=4, num_experts_per_tok=2)],
    "kimi_linear": [
        MLA
        | FULL_AND_LINEAR
        | SPARSE
        | routed(top="num_experts_per_token")
        | dict(linear_head_dim=8, linear_num_heads=4, q_lora_rank=None)
    ],
    "kolibri1": [routed("num_local_experts", shared_expert_intermediate_size=20) | FULL_AND_SLIDING],
    "laguna": [
        routed(shared_expert_intermediate_size=20, num_attention_heads_per_layer=[6, 4, 6])
        | SPARSE
        | FULL_AND_SLIDING
        | dict(
            rope_parameters={
                kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
            }
        )
    ],
    "lfm2": [dict(layer_types=["conv", "full_attention", "conv"])],
    "lfm2_moe": [routed(num_dense_layers=1, layer_types=["conv", "full_attention", "conv"])],
    "lfm3": [dict(layer_types=["conv", "full_attention", "sliding_attention"], sliding_window=WINDOW)],
    "llama4_text": [
        dict(
            num_local_experts=4,
            num_experts_per_tok=1,
            intermediate_size=24,
            intermediate_size_mlp=84,
            moe_layers=[1],
            no_rope_layers=[1, 0, 1],
            layer_types=["chunked_attention", "full_attention", "chunked_attention"],
            attention_chunk_size=16,
        )
    ],
    "mellum": [
        routed("num_local_experts")
        | SPARSE
        | FULL_AND_SLIDING
        | dict(
            rope_parameters={
                kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
            }
        )
    ],
    "mimo_v2_flash": [routed("n_routed_experts", num_key_value_heads=3, v_head_dim=8) | SPARSE | FULL_AND_SLIDING],
    "minicpm3": [MLA],
    "minimax_m2": [dict(num_local_experts=6, num_experts_per_tok=2)],
    "minimax_m3_vl_text": [
        dict(
            num_local_experts=6,
            num_experts_per_tok=2,
            dense_intermediate_size=84,
            shared_intermediate_size=20,
            rotary_dim=4,
            index_n_heads=2,
            index_head_dim=8,
            index_block_size=4,
            index_topk_blocks=2,
        )
        | SPARSE
    ],
    "ministral": [FULL_AND_SLIDING],
    "mistral": [dict(sliding_window=WINDOW)],
    "mixtral": [dict(num_local_experts=4, sliding_window=WINDOW)],
    "modernbert-decoder": [
        FULL_AND_SLIDING | dict(local_attention=2 * WINDOW, embedding_dropout=0.0, mlp_dropout=0.0, norm_bias=True)
    ],
    "nemotron_h": [
        routed("n_routed_experts", moe_shared_expert_intermediate_size=20)
        | dict(
            num_hidden_layers=None,
            layers_block_type=["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
            ssm_state_size=8,
            mamba_num_heads=8,
            mamba_head_dim=15,
            n_groups=2,
            chunk_size=16,
            use_mamba_kernels=False,
        )
    ],
    "olmo3": [FULL_AND_SLIDING],
    "olmo_hybrid": [DELTA_NET | dict(linear_num_value_heads=2)],
    "olmoe": [dict(num_experts=6, num_experts_per_tok=2)],
    "opt": [NO_DROPOUT | dict(ffn_dim=84, word_embed_proj_dim=dim, dropout=0.0) for dim in (60, 36)],
    "persimmon": [NO_DROPOUT | dict(partial_rotary_factor=0.4)],
    "phi": [NO_DROPOUT | dict(partial_rotary_factor=0.4, qk_layernorm=True)],
    "phi3": [NO_DROPOUT | dict(sliding_window=WINDOW)],
    "phimoe": [dict(num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0)],
    "qwen2": [FULL_AND_SLIDING | dict(use_sliding_window=True)],
    "qwen2_moe": [routed(shared_expert_intermediate_size=20, mlp_only_layers=[0])],
    "qwen3_5_moe_text": [DELTA_NET | routed(shared_expert_intermediate_size=20)],
    "qwen3_5_text": [DELTA_NET],
    "qwen3_moe": [routed("num_local_experts", mlp_only_layers=[0])],
    "qwen3_next": [DELTA_NET | routed(shared_expert_intermediate_size=20, mlp_only_layers=[0])],
    "recurrent_gemma": [dict(attention_window_size=WINDOW, lru_width=60, block_types=["recurrent", "attention"])],
    "seed_oss": [dict(attention_dropout=0.0, residual_dropout=0.0)],
    "solar_open": [routed("n_routed_experts")],
    "stablelm": [
        NO_DROPOUT | dict(use_parallel_residual=True, qk_layernorm=True),
        NO_DROPOUT | dict(use_parallel_residual=False),
    ],
    "starcoder2": [NO_DROPOUT | dict(sliding_window=WINDOW, residual_dropout=0.0, embedding_dropout=0.0)],
    "vaultgemma": [FULL_AND_SLIDING],
    "xglm": [
        dict(d_model=60, ffn_dim=84, num_layers=3, attention_heads=6, num_hidden_layers=None)
        | dict(dropout=0.0, attention_dropout=0.0)
    ],
    "youtu": [MLA],
}


def variants_of(model_type: str) -> list[dict]:
    return VARIANTS.get(model_type, [{}])


def family_config(model_type: str, variant: int = 0, **overrides):
    fields = COMMON | variants_of(model_type)[variant] | overrides
    return CONFIG_MAPPING[model_type](**{k: v for k, v in fields.items() if v is not None or k == "eos_token_id"})


def family_model(model_type: str, variant: int = 0, seed: int = 0, **overrides) -> PreTrainedModel:
    """In eval mode, and far from flat: matrices at three times their size, vectors moved off their zeros and ones."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(family_config(model_type, variant, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.mul_(3)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.8)
    return model
