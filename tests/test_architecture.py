"""The house: imports go up the list below, never back, and heavy packages load when they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mhc_hf

ROOT = Path(mhc_hf.__file__).parent
# a module may import from entries above its own, or from its own entry where that is a folder of equals
ORDER = [
    "ops.reference",
    "ops",
    "modeling.projections",
    "modeling.starts",
    "modeling.configuration_mhc",
    "modeling.branch_norm",
    "modeling.handing_on",
    "modeling.recompute",
    "modeling.hyper_connection",
    "modeling.steps",
    "modeling.sublayers",
    "modeling.layer",
    "modeling.hidden_states",
    "modeling.families",
    "modeling.modeling_mhc",
    "modeling",
    "sharing",
    "conversion",
    "plotting",
    "inspection",
    "training",
    "cli",
    "",
]
STRANGERS = [("conversion", "training"), ("training", "conversion")]
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.rglob("*.py"))


def rank(module):
    """Index in ORDER of the entry that `module` belongs to."""
    name = module.removesuffix("__init__").rstrip(".")
    return next(i for i, entry in enumerate(ORDER) if name == entry or not entry or name.startswith(entry + "."))


def imports_of(module):
    """Modules of the package that `module` names in an import, relative to the package."""
    path = ROOT / (module.replace(".", "/") + ".py")
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            target = [*start, *(node.module or "").split(".")] if node.module else start
            yield ".".join(target)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mhc_hf":
            yield node.module.removeprefix("mhc_hf").lstrip(".")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_up(module):
    for imported in imports_of(module):
        assert rank(imported) <= rank(module), f"{module} imports {imported}"
        for one, other in STRANGERS:
            assert not (module.startswith(one) and imported.startswith(other)), f"{module} imports {imported}"


def test_triton_is_imported_under_its_own_folder_only():
    for module in MODULES:
        text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        top_level = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top_level if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in top_level if isinstance(node, ast.ImportFrom) and not node.level}
        if not module.startswith("ops.triton"):
            assert not any(name and name.split(".")[0] in ("triton", "matplotlib") for name in names), module


@pytest.mark.slow
def test_the_package_imports_where_the_optional_packages_are_not_installed():
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "matplotlib", "peft"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import mhc_hf
print("imported")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "imported"
