"""The generated file: whole, legible, the same every time; and nobody's file is lost to it."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import mhc_hf
from mhc_hf import MHCForCausalLM, convert_checkpoint, write_modeling_code
from mhc_hf.modeling.families import supported_families
from mhc_hf.sharing import CODE_FILE, generate_modeling_code
from mhc_hf.sharing.modeling_code import MODULES, auto_map
from tests.conftest import tiny_model
from tests.conversion.conftest import bits, logits_of
from tests.conversion.test_no_damage import as_hub_cache

PACKAGE = Path(mhc_hf.__file__).parent


@pytest.fixture(scope="module")
def tree():
    return ast.parse(generate_modeling_code())


def test_it_imports_torch_transformers_and_the_standard_library_alone(tree):
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, ast.unparse(node)
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


def test_every_module_that_modelling_needs_is_in_it():
    """Also those that are imported inside functions: what stays in the package is named here."""
    needed, waiting = set(), ["modeling.modeling_mhc"]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        path = PACKAGE / f"{name.replace('.', '/')}.py"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = ".".join([*name.split(".")[: -node.level], *(node.module or "").split(".")]).strip(".")
                if (PACKAGE / f"{target.replace('.', '/')}.py").is_file():
                    waiting.append(target)
                else:
                    waiting += [
                        f"{target}.{alias.name}"
                        for alias in node.names
                        if (PACKAGE / target.replace(".", "/") / f"{alias.name}.py").is_file()
                    ]
    stays = {name for name in needed if name.startswith(("ops.triton.", "ops.native")) or name == "ops.backends"}
    assert needed - stays <= set(MODULES)
    assert set(MODULES) - needed == {"sharing.torch_backend", "sharing.beside_weights"}


def test_every_definition_is_in_it(tree):
    kept = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    for name in MODULES:
        for node in ast.parse((PACKAGE / f"{name.replace('.', '/')}.py").read_text()).body:
            if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and name != "ops.reference"):
                stem = name.rpartition(".")[2]
                private = "_" * node.name.startswith("_")
                assert {node.name, f"{private}{stem}_{node.name.strip('_')}"} & kept, (name, node.name)


def test_ruff_finds_nothing_undefined_unused_or_defined_twice(tmp_path):
    path = tmp_path / CODE_FILE
    path.write_text(generate_modeling_code())
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version=py311", "--line-length=120"]
    done = subprocess.run([*command, "--select=E7,E9,F,W,B,I", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_says_what_it_is_and_where_from():
    head = generate_modeling_code().partition("from __future__")[0]
    for words in ("generated", f"mhc_hf {mhc_hf.__version__}", "write_modeling_code", "--self-contained", "Apache-2.0"):
        assert words in head
    assert all(line.startswith("#") for line in head.splitlines())
    for name in MODULES:
        assert f"\n# ---- {name.replace('.', '/')}.py ---" in generate_modeling_code()


@pytest.mark.slow
def test_another_process_generates_the_same():
    code = "import sys; from mhc_hf.sharing import generate_modeling_code; sys.stdout.write(generate_modeling_code())"
    environment = os.environ | {"PYTHONHASHSEED": "17", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert done.stdout.decode() == generate_modeling_code()


def test_configurations_name_classes_that_exist():
    for family in supported_families():
        stems = {name.removeprefix("modeling_mhc.MHC") for name in auto_map(family).values()}
        assert len(stems) == 6 and all(name.isidentifier() for name in stems)
    assert auto_map("gemma3_text")["AutoModelForCausalLM"] == "modeling_mhc.MHCGemma3TextForCausalLM"
    assert auto_map("gpt2")["AutoConfig"] == "modeling_mhc.MHCGPT2Config"


@pytest.fixture
def saved(tmp_path, llama):
    """A widened model as `save_pretrained` leaves it."""
    MHCForCausalLM.from_base(llama).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_model_is_made_self_contained_and_keeps_so(saved, tmp_path, token_ids):
    before = json.loads((saved / "config.json").read_text())
    assert write_modeling_code(saved) == saved / CODE_FILE
    after = json.loads((saved / "config.json").read_text())
    assert after.pop("auto_map") == auto_map("llama") and after == before
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CODE_FILE).read_text() == generate_modeling_code()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == auto_map("llama")
    once = bits(saved)
    write_modeling_code(saved)
    assert bits(saved) == once
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again, token_ids), logits_of(model, token_ids))


def test_models_that_are_not_self_contained_stay_without_code(saved):
    assert not (saved / CODE_FILE).exists() and "auto_map" not in json.loads((saved / "config.json").read_text())


@pytest.mark.parametrize("content", ["print('mine')\n", "edited"])
def test_a_file_of_the_users_is_not_overwritten(saved, llama, content):
    path = saved / CODE_FILE
    path.write_text(generate_modeling_code() + "# edited\n" if content == "edited" else content)
    before = bits(saved)
    with pytest.raises(FileExistsError, match="is not as mhc_hf generated it"):
        write_modeling_code(saved)
    widened = MHCForCausalLM.from_base(llama)
    widened.config.auto_map = auto_map("llama")
    with pytest.raises(FileExistsError, match="is not as mhc_hf generated it"):
        widened.config.save_pretrained(saved)
    assert bits(saved) == before


def test_code_of_another_version_is_replaced(saved):
    write_modeling_code(saved)
    text = generate_modeling_code().replace(f"mhc_hf {mhc_hf.__version__}", "mhc_hf 0.0.1")
    (saved / CODE_FILE).write_text(text)
    write_modeling_code(saved)
    assert (saved / CODE_FILE).read_text() == generate_modeling_code()


def test_a_hub_cache_is_not_written_through(saved, tmp_path):
    write_modeling_code(saved)
    (saved / CODE_FILE).write_text(generate_modeling_code().replace(f"mhc_hf {mhc_hf.__version__}", "mhc_hf 0.0.1"))
    snapshot = as_hub_cache(saved, tmp_path / "cache")
    before = bits(tmp_path / "cache" / "blobs")
    write_modeling_code(snapshot)
    assert bits(tmp_path / "cache" / "blobs") == before
    assert (snapshot / CODE_FILE).read_text() == generate_modeling_code()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "has no config.json"),
        (lambda folder: tiny_model("llama").config.save_pretrained(folder), "`model_type` is 'llama', not 'mhc'"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "mhc"}'),
            "`base_model_type='None'` is not",
        ),
    ],
)
def test_what_is_no_widened_model_is_named(saved, spoil, message):
    spoil(saved)
    with pytest.raises(ValueError, match=message):
        write_modeling_code(saved)
    assert not (saved / CODE_FILE).exists()


def test_code_of_the_bases_own_is_not_named(tmp_path, llama):
    llama.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    content = json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    path.write_text(json.dumps(content))
    convert_checkpoint(tmp_path / "base", tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    convert_checkpoint(tmp_path / "base", tmp_path / "contained", self_contained=True)
    assert json.loads((tmp_path / "contained" / "config.json").read_text())["auto_map"] == auto_map("llama")


def test_a_self_contained_conversion_can_be_replaced_by_another(base, tmp_path):
    report = convert_checkpoint(base, tmp_path / "out", self_contained=True)
    assert report.self_contained and "trust_remote_code=True" in str(report)
    manifest = json.loads((tmp_path / "out" / "mhc_conversion.json").read_text())
    assert CODE_FILE in {file["name"] for file in manifest["files"]}
    report = convert_checkpoint(base, tmp_path / "out", overwrite=True)
    assert not report.self_contained and not (tmp_path / "out" / CODE_FILE).exists()
