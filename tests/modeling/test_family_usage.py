"""What a user of transformers does with a model, done with widened ones of different forms: as with their bases."""

import copy
import multiprocessing

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    CompileConfig,
    DynamicCache,
    PreTrainedTokenizerFast,
    pipeline,
)

from mhc_hf import HyperConnection, MHCForCausalLM, MHCModel

from ..conftest import VOCAB_SIZE, streams_between_layers
from .family_models import family_model

# one of each form: plain, parallel with layers that return tuples, sandwich, experts, hybrid, scaled streams
FORMS = ["llama", "gptj", "gemma3_text", "mixtral", "qwen3_next", "gemma4_text"]
ATTEND_ONLY = ["llama", "gptj", "gemma3_text", "mixtral"]


def families(*names):
    return pytest.mark.parametrize("models", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def models(request):
    base = family_model(request.param)
    return base, MHCForCausalLM.from_base(base)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(2, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(3))


def distance(x, reference):
    return float((x - reference).detach().abs().max() / reference.detach().abs().max())


@families(*FORMS)
@pytest.mark.parametrize("arguments", [dict(num_beams=3), dict(do_sample=True, top_k=5)], ids=["beam", "sampled"])
def test_decoding_strategies_give_the_bases_tokens(models, prompt, arguments):
    outputs = []
    for model in models:
        torch.manual_seed(0)
        outputs.append(model.generate(prompt, max_new_tokens=10, **arguments))
    assert torch.equal(*outputs)


@families(*ATTEND_ONLY)
def test_assisted_decoding_changes_no_token(models, prompt):
    base, widened = models
    expected = base.generate(prompt[:1], max_new_tokens=16, do_sample=False)
    assistant = family_model("llama", seed=1)
    for arguments in (dict(assistant_model=assistant), dict(assistant_model=base), dict(prompt_lookup_num_tokens=3)):
        assert torch.equal(widened.generate(prompt[:1], max_new_tokens=16, do_sample=False, **arguments), expected)
    # and a widened model drafts as well as its base does
    drafted = base.generate(prompt[:1], max_new_tokens=16, do_sample=False, assistant_model=widened)
    assert torch.equal(drafted, expected)


@pytest.mark.slow
def test_compiled_generation_gives_the_bases_tokens(prompt):
    """By the compiler that users have, with the static cache that transformers compiles for."""
    base = family_model("llama", num_hidden_layers=2)
    widened = MHCForCausalLM.from_base(base)
    compile_config = CompileConfig()
    # off a GPU it does so on demand only
    compile_config._compile_all_devices = True
    arguments = dict(max_new_tokens=8, do_sample=False)
    out = widened.generate(prompt, cache_implementation="static", compile_config=compile_config, **arguments)
    assert widened._compiled_call is not None
    assert torch.equal(out, base.generate(prompt, **arguments))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches from a GPU only")
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches_change_no_token(prompt, cache):
    base = family_model("llama").cuda()
    arguments = dict(max_new_tokens=12, do_sample=False)
    out = MHCForCausalLM.from_base(base).generate(prompt.cuda(), cache_implementation=cache, **arguments)
    assert torch.equal(out, base.generate(prompt.cuda(), **arguments))


@families(*(form for form in FORMS if form != "gemma4_text"))  # which looks its per-layer inputs up by token
def test_generation_from_embeddings(models, prompt):
    outputs = [
        model.generate(inputs_embeds=model.get_input_embeddings()(prompt), max_new_tokens=8, do_sample=False)
        for model in models
    ]
    assert torch.equal(*outputs)


@torch.no_grad()
@families(*FORMS)
def test_right_padding_leaves_the_tokens_before_it_alone(models, prompt):
    _, widened = models
    mask = torch.ones_like(prompt)
    mask[0, 6:] = 0
    padded = widened(prompt, attention_mask=mask).logits[0, :6]
    assert distance(padded, widened(prompt[:1, :6]).logits[0]) <= 1e-5


@torch.no_grad()
@families(*FORMS)
def test_a_cache_is_continued_in_chunks(models, prompt):
    _, widened = models
    whole = widened(prompt).logits
    cache = DynamicCache(config=widened.config)
    parts = [widened(part, past_key_values=cache, use_cache=True).logits for part in prompt.split([5, 3, 1], dim=1)]
    if widened.config.base_model_type == "qwen3_next":
        # the family itself continues its state one token at a time
        base_cache = DynamicCache(config=models[0].config)
        whole = torch.cat(
            [models[0](p, past_key_values=base_cache, use_cache=True).logits for p in prompt.split([5, 3, 1], dim=1)], 1
        )
    assert distance(torch.cat(parts, 1), whole) <= 1e-5


@torch.no_grad()
@families(*FORMS)
def test_hidden_states_attentions_and_router_logits_are_captured(models, prompt):
    base, widened = copy.deepcopy(models)
    base.set_attn_implementation("eager")
    widened.set_attn_implementation("eager")
    arguments = dict(output_hidden_states=True, output_attentions=True)
    if base.config.model_type in ("mixtral", "qwen3_next"):
        arguments["output_router_logits"] = True
    expected, out = base(prompt, **arguments), widened(prompt, **arguments)
    assert len(out.hidden_states) == len(expected.hidden_states)
    for got, want in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert got.shape == want.shape and distance(got, want) <= 1e-5
    # the streams behind them differ
    for streams, mean in zip(streams_between_layers(widened, prompt), out.hidden_states[1:-1], strict=True):
        assert distance(streams.mean(-2), mean) <= 1e-5 < distance(streams, mean[..., None, :].expand_as(streams))
    as_tuple = widened(prompt, output_hidden_states=True, return_dict=False)
    assert any(isinstance(x, tuple) and len(x) == len(out.hidden_states) for x in as_tuple)
    for name in ("attentions", *(["router_logits"] if "output_router_logits" in arguments else [])):
        assert len(out[name]) == len(expected[name]) > 0
        for got, want in zip(out[name], expected[name], strict=True):
            assert distance(got, want) <= 1e-5


@torch.no_grad()
@families(*ATTEND_ONLY)
def test_eager_and_sdpa_attention_agree(models, prompt):
    widened = copy.deepcopy(models[1])
    logits = []
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and not widened._supports_sdpa:
            continue
        widened.set_attn_implementation(implementation)
        logits.append(widened(prompt).logits)
    assert all(distance(x, logits[0]) <= 1e-5 for x in logits)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_agrees(prompt):
    # its kernel takes heads of 16 channels and more
    base = family_model("llama", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    widened = MHCForCausalLM.from_base(base)
    expected = widened(prompt, use_cache=False).logits
    widened.set_attn_implementation("flex_attention")
    assert distance(widened(prompt, use_cache=False).logits, expected) <= 1e-5


@families(*FORMS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_gradient(models, prompt, use_reentrant):
    widened = copy.deepcopy(models[1]).train()
    if use_reentrant and getattr(widened.config, "num_kv_shared_layers", 0):
        pytest.skip("keys and values that layers share lose their gradient in the base too")

    def gradients():
        widened.zero_grad()
        widened(prompt, labels=prompt, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in widened.named_parameters() if p.grad is not None}

    plain = gradients()
    widened.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    again = gradients()
    assert again.keys() == plain.keys()
    for name, gradient in again.items():
        assert torch.equal(gradient, plain[name]), name


@torch.no_grad()
def test_tied_embeddings_are_resized_together(prompt):
    base = family_model("llama", tie_word_embeddings=True)
    models = (base, MHCForCausalLM.from_base(copy.deepcopy(base)))
    for model in models:
        torch.manual_seed(0)
        model.resize_token_embeddings(VOCAB_SIZE + 6, mean_resizing=False)
        assert model.lm_head.weight is model.get_input_embeddings().weight
    assert models[1](prompt).logits.shape[-1] == VOCAB_SIZE + 6
    assert distance(models[1](prompt).logits, models[0](prompt).logits) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "falcon", "opt", "llama4_text"])
def test_heads_load_the_decoder_whatever_the_family_calls_it(model_type, prompt, tmp_path):
    widened = MHCForCausalLM.from_base(family_model(model_type))
    widened.save_pretrained(tmp_path)
    head, info = AutoModelForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"qa_outputs.weight", "qa_outputs.bias"}
    decoders = [next(m for m in model.children() if isinstance(m, MHCModel)) for model in (widened, head)]
    assert torch.equal(*(decoder(prompt).last_hidden_state for decoder in decoders))
    assert head.get_input_embeddings() is decoders[1].get_input_embeddings()
    head.resize_token_embeddings(VOCAB_SIZE + 6)
    assert head.get_input_embeddings().num_embeddings == VOCAB_SIZE + 6


@torch.no_grad()
@families("llama", "qwen3_next")
def test_layers_are_offloaded_to_disk(models, prompt, tmp_path):
    _, widened = models
    widened.save_pretrained(tmp_path / "saved")
    on_cpu = ["lm_head", *(f"model.{name}" for name, _ in widened.model.named_children() if name != "layers")]
    places = dict.fromkeys([*on_cpu, "model.layers.0", "model.layers.2"], "cpu") | {"model.layers.1": "disk"}
    for device_map in ("cpu", places):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert torch.equal(loaded(prompt).logits, widened(prompt).logits)


@torch.no_grad()
def test_dtype_auto_is_the_checkpoints(prompt, tmp_path):
    MHCForCausalLM.from_base(family_model("llama").bfloat16()).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert {p.dtype for m in loaded.modules() if isinstance(m, HyperConnection) for p in m.parameters()} == {
        torch.float32
    }
    # what quantisers and sharding ask for names the sites that are there, and none beside
    assert loaded._keep_in_fp32_modules_strict == {"attn_hc", "ffn_hc"}
    assert loaded(prompt).logits.isfinite().all()


def test_a_text_generation_pipeline(models_of_words):
    base, widened, tokenizer = models_of_words
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)("w5 w7 w9", max_new_tokens=6, do_sample=False)
        for model in (base, widened)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0]["generated_text"].startswith("w5 w7 w9") and len(texts[0][0]["generated_text"]) > 20


@pytest.fixture
def models_of_words():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w2"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", unk_token="w2")
    base = family_model("llama")
    return base, MHCForCausalLM.from_base(base), tokenizer


@torch.no_grad()
@families("llama", "gptj", "mixtral")
def test_the_forward_exports(models, prompt):
    _, widened = models
    program = torch.export.export(widened, (prompt,), kwargs=dict(use_cache=False), strict=False)
    assert distance(program.module()(prompt, use_cache=False).logits, widened(prompt).logits) <= 1e-5


@pytest.mark.slow
@torch.no_grad()
@families("llama", "phi")
def test_the_forward_compiles_into_one_graph(models, prompt):
    _, widened = models
    compiled = torch.compile(widened, fullgraph=True, backend="aot_eager")
    assert distance(compiled(prompt, use_cache=False).logits, widened(prompt).logits) <= 1e-5


def _logits_in_a_process(model, prompt, queue):
    with torch.no_grad():
        queue.put(model(prompt).logits.numpy())


@pytest.mark.slow
@families("gptj")
def test_a_spawned_process_gets_the_model(models, prompt):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_logits_in_a_process, args=(models[1], prompt, queue))
    process.start()
    logits = torch.from_numpy(queue.get(timeout=300))
    process.join()
    with torch.no_grad():
        assert distance(logits, models[1](prompt).logits) <= 1e-6
