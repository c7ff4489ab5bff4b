"""Reading and writing single files of weights."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhc_hf.conversion.errors import DamagedCheckpoint
from mhc_hf.conversion.shard import read_pickled_shard, read_shard
from mhc_hf.conversion.writing import rewrite_shard, write_safetensors

TENSORS = {
    "b": torch.randn(3, 5),
    "zeros": torch.zeros(7, 3),
    "negative zero": torch.tensor([-0.0]),
    "integers": torch.arange(5),
    "half": torch.randn(3, 3).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "é": torch.randn(3).half(),
    "flags": torch.tensor([True, False]),
}


@pytest.fixture
def shard(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors"


def test_a_written_file_is_byte_for_byte_what_safetensors_writes(tmp_path, shard):
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    write_safetensors(tmp_path / "b.safetensors", shapes, TENSORS.__getitem__)
    assert (tmp_path / "b.safetensors").read_bytes() == shard.read_bytes()


def test_one_element_seen_at_full_size_is_written_in_full(tmp_path):
    values = {"zeros": torch.zeros(()).expand(60, 60), "twos": torch.tensor(2.0).expand(5, 7)}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in values.items()}
    write_safetensors(tmp_path / "a.safetensors", shapes, values.__getitem__)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in values.items())


def test_headers_are_read_as_safetensors_wrote_them(shard):
    found = read_shard(shard.parent, shard.name).tensors
    assert {name: entry.shape for name, entry in found.items()} == {k: tuple(v.shape) for k, v in TENSORS.items()}
    assert found["half"].dtype == "BF16" and found["half"].nbytes == 18


def test_casting_leaves_integers_and_flags_alone(tmp_path, shard):
    rewrite_shard(read_shard(shard.parent, shard.name), tmp_path / "b.safetensors", torch.bfloat16)
    for name, tensor in load_file(tmp_path / "b.safetensors").items():
        expected = TENSORS[name].bfloat16() if TENSORS[name].is_floating_point() else TENSORS[name]
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_file_cut_short_anywhere_is_refused(shard, kept):
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors"):
        read_shard(shard.parent, shard.name)


def test_a_file_with_bytes_too_many_is_refused(shard):
    shard.write_bytes(shard.read_bytes() + b"\0")
    with pytest.raises(DamagedCheckpoint, match="promises"):
        read_shard(shard.parent, shard.name)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},  # two float32 do not fit into four bytes
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},  # a hole before it
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": 3},
    ],
)
def test_a_header_without_sense_is_refused(tmp_path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(DamagedCheckpoint, match=r"a\.safetensors is damaged"):
        read_shard(tmp_path, "a.safetensors")


def test_a_pickled_file_keeps_names_and_bits_of_shared_and_strided_tensors(tmp_path):
    weight = torch.randn(6, 10)
    state = {"embed": weight, "head": weight, "turned": weight.t(), "part": weight[1:3, ::2], "whole": torch.arange(3)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    shard = read_pickled_shard(tmp_path, "pytorch_model.bin")
    rewrite_shard(shard, tmp_path / "a.safetensors", None)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_a_pickled_file_of_the_old_format_is_read(tmp_path):
    torch.save({"a": torch.arange(4.0)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    rewrite_shard(read_pickled_shard(tmp_path, "old.bin"), tmp_path / "a.safetensors", None)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.arange(4.0))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_a_pickled_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    torch.save({"a": Trap(str(tmp_path / "sprung"))}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DamagedCheckpoint, match="weights_only"):
        read_pickled_shard(tmp_path, "pytorch_model.bin")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("kept", [0, 10, 300])
def test_a_pickled_file_cut_short_is_refused(tmp_path, kept):
    torch.save({"a": torch.arange(400.0)}, tmp_path / "whole.bin")
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "whole.bin").read_bytes()[:kept])
    with pytest.raises(DamagedCheckpoint, match=r"pytorch_model\.bin"):
        read_pickled_shard(tmp_path, "pytorch_model.bin")


def test_a_pickled_training_state_is_refused(tmp_path):
    torch.save({"epoch": 3, "model": {"a": torch.ones(2)}}, tmp_path / "pytorch_model.bin")
    with pytest.raises(DamagedCheckpoint, match="not a dict of tensors"):
        read_pickled_shard(tmp_path, "pytorch_model.bin")
