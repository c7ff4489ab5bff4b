"""The package's modelling code as one file beside a model's weights, so that transformers loads it without the package.

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then needs torch and transformers only. The file
is merged from the modules below (`merging`), on the PyTorch path: kernels, conversion, inspection and the tools for
training stay in the package. It is the same for all families and, of one version, the same to the byte.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..modeling import MHCConfig
from ..modeling.configuration_mhc import before_save, family_class_name
from ..modeling.families import family_of
from .merging import merge

_MODULE = "modeling_mhc"
CODE_FILE = f"{_MODULE}.py"
# in the order of their imports; the last one is there for this file alone
MODULES = (
    *("ops.reference", "ops.checks", "sharing.torch_backend", "ops.copies", "ops.sinkhorn", "ops.few", "ops.eager"),
    *("ops.registered", "ops.normed", "ops.ahead", "ops.functional", "modeling.projections", "modeling.starts"),
    *("modeling.configuration_mhc", "modeling.branch_norm", "modeling.handing_on", "modeling.recompute"),
    *("modeling.hyper_connection", "modeling.steps", "modeling.sublayers", "modeling.layer"),
    *("modeling.hidden_states", "modeling.families", "modeling.modeling_mhc", "sharing.beside_weights"),
)
_PACKAGE = __name__.partition(".")[0]
_DIGEST = "# sha256 of what follows: "
_HEADER = """# This file is generated; to change it, change mhc_hf and generate it again.
#
# What: mhc_hf {version}, manifold-constrained hyper-connections (mHC, arXiv 2512.24880) for Hugging Face transformers,
#   its modelling code in one file that needs torch and transformers only.
# For: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), with transformers 5.17 to 5.23.
# How: mhc_hf.sharing.write_modeling_code(folder), or `mhc-hf convert --self-contained`.
# Each part below is a module of mhc_hf as it stands there. Of names that two modules have, those of the earlier are
# renamed after it. Left out: kernels, conversion, inspection and the tools for training.
#
# SPDX-License-Identifier: Apache-2.0
"""


@functools.cache
def generate_modeling_code() -> str:
    """The text of `modeling_mhc.py`."""
    root = files(_PACKAGE)
    sources = {name: root.joinpath(f"{name.replace('.', '/')}.py").read_text("utf-8") for name in MODULES}
    packages = {name: root.joinpath(f"{name}/__init__.py").read_text("utf-8") for name in ("ops", "modeling")}
    code = merge(
        sources,
        packages,
        substitutes={"ops.backends": "sharing.torch_backend"},
        only={"ops.reference": ("rms_normalize", "weighted_rms_norm", "_compute_dtype")},
        without=("triton", "native"),
    )
    header = _HEADER.format(version=sys.modules[_PACKAGE].__version__)
    return f"{header}{_DIGEST}{_digest(code)}\n{code}"


def auto_map(base_model_type: str) -> dict[str, str]:
    """What config.json says of the file: which class of it an Auto class takes."""
    stem = f"{_MODULE}.{family_class_name(base_model_type).removesuffix('Config')}"
    classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        classes[f"AutoModelFor{head}"] = f"For{head}"
    return {auto_class: stem + name for auto_class, name in classes.items()}


def write_modeling_code(folder: str | os.PathLike[str]) -> Path:
    """Make the folder of a widened model self-contained: write `modeling_mhc.py` and name it in config.json.

    Models that are loaded from the folder keep it so: wherever they are saved, the code is saved too.

    Args:
        folder: what `convert_checkpoint` or `save_pretrained` of a widened model wrote.
    Returns:
        The path of the code.
    Raises:
        ValueError: `folder` holds no widened model of a family that is supported.
        FileExistsError: there is a `modeling_mhc.py` that mhc_hf did not generate, or that was edited since.
    """
    root = Path(folder)
    path = root / "config.json"
    if not path.is_file():
        raise ValueError(f"`folder`={str(root)!r} has no config.json. Save a widened model there first.")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("model_type") != MHCConfig.model_type:
        raise ValueError(
            f"`folder`={str(root)!r} holds no widened model: its `model_type` is {content.get('model_type')!r}, not "
            f"{MHCConfig.model_type!r}. Convert it first."
        )
    base_model_type = str(content.get("base_model_type"))
    family_of(base_model_type)
    code = _write(root)
    content["auto_map"] = content.get("auto_map", {}) | auto_map(base_model_type)
    _put(path, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return code


def _write(folder: Path) -> Path:
    path = folder / CODE_FILE
    if path.exists() and not _is_generated(path.read_text(encoding="utf-8", errors="replace")):
        raise FileExistsError(f"{path} is not as mhc_hf generated it, and is not overwritten. Move it away first.")
    _put(path, generate_modeling_code())
    return path


def _put(path: Path, text: str) -> None:
    """Write a file in one step, and never through a link: a Hub cache is full of them."""
    aside = path.with_name(f".{path.name}.mhc")
    aside.write_text(text, encoding="utf-8", newline="\n")
    os.replace(aside, path)


def _is_generated(text: str) -> bool:
    """Whether a file is as any version of this module wrote it."""
    _, found, rest = text.partition(_DIGEST)
    digest, _, code = rest.partition("\n")
    return bool(found) and digest == _digest(code)


def _digest(code: str) -> str:
    return hashlib.sha256(code.encode()).hexdigest()


def _keep_self_contained(config: MHCConfig, folder: Path) -> None:
    """Save the code with every model whose configuration names it."""
    named = getattr(config, "auto_map", None) or {}
    if str(named.get("AutoConfig")).startswith(f"{_MODULE}."):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder)


before_save.append(_keep_self_contained)
