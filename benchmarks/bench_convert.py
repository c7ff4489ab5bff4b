"""Time and memory of a conversion that shares the base's weights: `python benchmarks/bench_convert.py`.

It makes a LLaMA-7B-shaped checkpoint of three shards (13 GB, float16) out of sparse files with real headers, which take
no room, converts it in a fresh process, and prints seconds and peak memory beyond what the imports take. CPU; POSIX.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS_ALLOWED, MEBIBYTES_ALLOWED = 3.0, 400

_CONVERT = """
import resource, sys, time
import transformers, mhc_hf
from mhc_hf.conversion import convert_checkpoint

unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in MiB
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
begin = time.monotonic()
report = convert_checkpoint(sys.argv[1], sys.argv[2], hc_mult=int(sys.argv[3]))
seconds = time.monotonic() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
print(report)
print(f"RESULT {seconds} {imported} {peak}")
"""


def make_llama(folder: Path, *, layers: int, hidden: int, mlp: int, vocab: int, shards: int) -> int:
    """Write a LLaMA checkpoint whose tensors are holes in sparse files; bytes of all shards together."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        vocab_size=vocab,
        dtype="float16",
    ).save_pretrained(folder)
    words = {f"word{number}": number for number in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    layer = {f"self_attn.{name}_proj": [hidden, hidden] for name in "qkvo"}
    layer |= {"mlp.gate_proj": [mlp, hidden], "mlp.up_proj": [mlp, hidden], "mlp.down_proj": [hidden, mlp]}
    layer |= {"input_layernorm": [hidden], "post_attention_layernorm": [hidden]}
    tensors = {"model.embed_tokens.weight": [vocab, hidden]}
    for index in range(layers):
        tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    tensors |= {"model.norm.weight": [hidden], "lm_head.weight": [vocab, hidden]}

    names, total, weight_map = list(tensors), 0, {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        total += _write_holes(folder / file, {name: tensors[name] for name in held})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_holes(path: Path, tensors: dict[str, list[int]]) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + position)
        return file.tell() + position


def measure(base: Path, output: Path, hc_mult: int) -> tuple[float, float, str]:
    """Convert in a fresh process: seconds, MiB of peak memory beyond the imports, and what was printed."""
    command = [sys.executable, "-c", _CONVERT, str(base), str(output), str(hc_mult)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report, _, result = printed.partition("RESULT ")
    seconds, imported, peak = map(float, result.split())
    return seconds, peak - imported, report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hc-mult", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dir", help="where to make the checkpoint (default: the temporary directory)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as scratch:
        base = Path(scratch, "base")
        base.mkdir()
        size = make_llama(base, layers=32, hidden=4096, mlp=11008, vocab=32000, shards=3)
        print(f"base: {size / 1e9:.2f} GB in 3 shards, LLaMA-7B-shaped")
        ok = True
        for run in range(arguments.runs):
            seconds, mebibytes, report = measure(base, Path(scratch, f"converted-{run}"), arguments.hc_mult)
            if run == 0:
                print(report)
            ok &= seconds <= SECONDS_ALLOWED and mebibytes <= MEBIBYTES_ALLOWED
            print(f"run {run + 1}: {seconds:.2f} s, {mebibytes:.0f} MiB beyond the imports")
        print(f"allowed: {SECONDS_ALLOWED:.0f} s, {MEBIBYTES_ALLOWED} MiB: {'kept' if ok else 'EXCEEDED'}")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
