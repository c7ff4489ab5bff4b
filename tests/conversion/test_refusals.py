"""Whatever cannot or must not be converted is refused by name, and the disk is then exactly as it was."""

import json
import os
import shutil
import struct

import pytest

from mhc_hf.conversion import (
    ConversionError,
    DamagedCheckpoint,
    NotEnoughSpace,
    UnusableOutput,
    UnusableSource,
    convert_checkpoint,
)
from mhc_hf.modeling.families import supported_families
from tests.conversion.conftest import snapshot

INDEX = "model.safetensors.index.json"


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Convert, and see it refused with this error, these words, and not a trace on the disk."""

    def check(error, *words, source="base", output="out", **kwargs):
        monkeypatch.chdir(tmp_path)
        before = snapshot(tmp_path)
        with pytest.raises(error) as caught:
            convert_checkpoint(source, output, **kwargs)
        assert type(caught.value) is error
        for word in words:
            assert word in str(caught.value), str(caught.value)
        assert snapshot(tmp_path) == before

    return check


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# the source


def test_no_such_folder(refuse):
    refuse(UnusableSource, "`source`='./nowhere'", "no such folder", source="./nowhere")


def test_a_file_for_a_folder(refuse, base):
    refuse(UnusableSource, "is a file", source="base/config.json")


def test_no_config(refuse, base):
    (base / "config.json").unlink()
    refuse(UnusableSource, "no config.json")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": 3}', "\udcff"])
def test_a_config_without_sense(refuse, base, text):
    (base / "config.json").write_text(text, errors="surrogateescape")
    refuse(UnusableSource, "config.json")


@pytest.mark.parametrize("family", ["bert", "t5", "no_such_family"])
def test_an_unsupported_family_lists_the_supported(refuse, base, family):
    edit_json(base / "config.json", model_type=family)
    refuse(UnusableSource, repr(family), *supported_families())


def test_a_source_already_widened(refuse, base, tmp_path):
    convert_checkpoint(base, tmp_path / "widened")
    refuse(UnusableSource, "already widened", "hc_mult=4", source="widened")


def test_a_source_that_holds_mhc_parameters_under_a_plain_config(refuse, base, tmp_path):
    convert_checkpoint(base, tmp_path / "widened")
    shutil.copy(base / "config.json", tmp_path / "widened" / "config.json")
    refuse(UnusableSource, "attn_hc", source="widened")


def test_no_weights(refuse, base):
    (base / "model.safetensors").unlink()
    refuse(UnusableSource, "no weights", "model.safetensors", "pytorch_model.bin")


def test_weights_that_the_config_names_and_nobody_holds(refuse, base):
    edit_json(base / "config.json", transformers_weights="other.safetensors")
    refuse(UnusableSource, "other.safetensors")


def test_a_missing_shard(refuse, sharded_base):
    next(sharded_base.glob("model-00002*")).unlink()
    refuse(DamagedCheckpoint, "1 of them are missing", "model-00002-of-")


@pytest.mark.parametrize("cut", [1, 4000])
def test_a_truncated_shard(refuse, sharded_base, cut):
    shard = next(sharded_base.glob("model-00002*"))
    os.truncate(shard, shard.stat().st_size - cut)
    refuse(DamagedCheckpoint, "model-00002-of-", "promises")


def test_an_empty_shard(refuse, base):
    os.truncate(base / "model.safetensors", 0)
    refuse(DamagedCheckpoint, "model.safetensors is damaged")


@pytest.mark.parametrize("where", ["../stolen.safetensors", "/etc/passwd", "sub/../../stolen.safetensors", "."])
def test_an_index_that_points_outside_the_folder(refuse, sharded_base, tmp_path, where):
    shutil.copy(next(sharded_base.glob("model-00002*")), tmp_path / "stolen.safetensors")
    index = json.loads((sharded_base / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = where
    (sharded_base / INDEX).write_text(json.dumps(index))
    refuse(DamagedCheckpoint, repr(where), "lm_head.weight", "outside the folder")


def test_a_config_that_names_weights_outside_the_folder(refuse, base):
    edit_json(base / "config.json", transformers_weights="../stolen.safetensors")
    refuse(DamagedCheckpoint, "transformers_weights", "outside the folder")


def test_an_index_that_lists_a_tensor_no_shard_holds(refuse, sharded_base):
    index = json.loads((sharded_base / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["lm_head.weight"]
    (sharded_base / INDEX).write_text(json.dumps(index))
    refuse(DamagedCheckpoint, "lists 1 tensors", "model.extra.weight")


def test_an_index_that_names_the_wrong_shard(refuse, sharded_base):
    index = json.loads((sharded_base / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == files[0])
    index["weight_map"][moved] = files[1]
    (sharded_base / INDEX).write_text(json.dumps(index))
    refuse(DamagedCheckpoint, moved)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_an_index_without_sense(refuse, sharded_base, text):
    (sharded_base / INDEX).write_text(text)
    refuse(DamagedCheckpoint, INDEX)


def test_a_tokenizer_that_does_not_load(refuse, base):
    (base / "tokenizer.json").write_text("{}")
    refuse(UnusableSource, "tokenizer")


def test_a_generation_config_that_does_not_load(refuse, base):
    (base / "generation_config.json").write_text("{")
    refuse(UnusableSource, "generation_config.json")


def test_a_revision_of_a_local_folder(refuse, base):
    refuse(UnusableSource, "`revision`='v1'", "local folder", revision="v1")


# the arguments


@pytest.mark.parametrize("hc_mult", [1, 0, -4, 2.0, True, "4", None])
def test_fewer_than_two_streams(refuse, base, hc_mult):
    refuse(ConversionError, "`hc_mult` must be an integer >= 2", repr(hc_mult), hc_mult=hc_mult)


@pytest.mark.parametrize("start", ["uniform", "paper", "", "Orthogonal"])
def test_a_start_that_is_not_a_conversions(refuse, base, start):
    refuse(ConversionError, repr(start), "orthogonal, copies", start=start)


def test_the_orthogonal_start_with_two_streams(refuse, base):
    refuse(ConversionError, "`start`='orthogonal'", ">= 3", hc_mult=2, start="orthogonal")


@pytest.mark.parametrize("dtype", ["int8", "float8", "auto"])
def test_a_dtype_that_is_none(refuse, base, dtype):
    refuse(ConversionError, "`dtype`", repr(dtype), "bfloat16", dtype=dtype)


def test_casting_quantized_weights(refuse, base):
    edit_json(base / "config.json", quantization_config={"quant_method": "fp8"})
    refuse(ConversionError, "`dtype`", "quantized", dtype="bfloat16")


# the output


def test_an_output_that_is_not_empty(refuse, base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear diary")
    refuse(UnusableOutput, "`output_dir`='out'", "not empty")


def test_overwriting_what_no_conversion_wrote_lists_it(refuse, base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear diary")
    refuse(UnusableOutput, "diary.txt", "not written by a conversion", overwrite=True)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint-10/model.safetensors", "notes.txt"])
def test_overwriting_a_conversion_with_new_files_in_it_lists_them(refuse, base, tmp_path, name):
    convert_checkpoint(base, tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("fine-tuned for a week")
    refuse(UnusableOutput, name, "new or changed", overwrite=True)


def test_overwriting_a_conversion_with_changed_files_lists_them(refuse, base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    card.write_text(card.read_text().replace("widened", "Widened"))
    refuse(UnusableOutput, "README.md", "new or changed", overwrite=True)


def test_an_output_that_is_a_file(refuse, base, tmp_path):
    (tmp_path / "out").write_text("")
    refuse(UnusableOutput, "is a file", overwrite=True)


@pytest.mark.parametrize("output", ["base", "./base/", "base/../base", "link"])
def test_an_output_that_is_the_source(refuse, base, tmp_path, output):
    (tmp_path / "link").symlink_to("base")
    refuse(UnusableOutput, "the source itself", output=output, overwrite=True)


@pytest.mark.parametrize("output", ["base/out", "base/a/b", "link/out"])
def test_an_output_inside_the_source(refuse, base, tmp_path, output):
    (tmp_path / "link").symlink_to("base")
    refuse(UnusableOutput, "inside the source", output=output)


@pytest.mark.parametrize("source", ["outer/base", "link"])
def test_an_output_around_the_source(refuse, base, tmp_path, source):
    (tmp_path / "outer").mkdir()
    shutil.move(base, tmp_path / "outer" / "base")
    (tmp_path / "link").symlink_to("outer/base")
    refuse(UnusableOutput, "contains the source", source=source, output="outer", overwrite=True)


def test_an_output_to_which_the_source_links(refuse, base, tmp_path):
    convert_checkpoint(base, tmp_path / "out")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to(tmp_path / "out" / "base-00001-of-00001.safetensors")
    refuse(UnusableOutput, "to which the source links", overwrite=True)


def test_the_working_directory_as_output(refuse, base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    before = snapshot(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UnusableOutput, match="current working directory"):
        convert_checkpoint("../base", ".")
    assert snapshot(tmp_path) == before


def test_an_output_under_a_file(refuse, base, tmp_path):
    (tmp_path / "file").write_text("")
    refuse(UnusableOutput, "file", output="file/out")


def test_too_little_space(refuse, base):
    """A sparse shard larger than the disk has room for: it can be linked, and a copy of it is refused."""
    size = shutil.disk_usage(base).free + 2**30
    header = json.dumps({"model.norm.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (base / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("this filesystem holds no file of that size")
    with pytest.raises(NotEnoughSpace, match="free"):
        convert_checkpoint(base, base.parent / "out", copy=True)
    assert sorted(os.listdir(base.parent)) == ["base"]
    assert convert_checkpoint(base, base.parent / "out").bytes_copied == 0
