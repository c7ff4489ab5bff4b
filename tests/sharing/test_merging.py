"""Merged modules do what the modules did, and what has no rule is refused."""

import pytest

from mhc_hf.sharing.merging import CannotMerge, merge

FEW = '''"""For a few."""

from math import sqrt

LIMIT = 4


def root(x):
    return sqrt(x)


def _double(x):
    return 2 * x
'''
MANY = '''"""For many, and for "é"."""

import math

from . import few
from .few import LIMIT as MOST


def root(x):
    # a few are another matter
    if x <= MOST:
        return few.root(x) + len("é") - 1
    return math.sqrt(x)
'''
CHOICE = '''"""Which one."""

import math

from ..packages import root as root_of_many
from . import many
from .backends import choose
from .few import _double


def compute(name, x, backend="auto"):
    if backend == "fast":
        from .fast import launch

        return launch(x)
    assert choose() == "slow"
    return _double(getattr(many, name)(x)) - root_of_many(x) * math.e / math.e


class Root:
    kind = 1
'''
SUBSTITUTE = "def choose():\n    return 'slow'\n"
SOURCES = {"ops.few": FEW, "ops.many": MANY, "own.substitute": SUBSTITUTE, "ops.choice": CHOICE}
PACKAGES = {"packages": "from ..ops.many import root\n"}


def merged(sources=SOURCES, only=()):
    return merge(
        sources, PACKAGES, substitutes={"ops.backends": "own.substitute"}, only=dict(only), without=("fast", "faster")
    )


def run(text):
    namespace = {}
    exec(compile(text, "merged", "exec"), namespace)
    return namespace


def test_the_merged_text_computes_what_the_modules_did():
    found = run(merged())
    assert found["compute"]("root", 9.0) == pytest.approx(3.0)
    assert found["compute"]("root", 4.0) == pytest.approx(2.0)


def test_of_names_that_two_modules_have_the_last_keeps_it():
    found = run(merged())
    assert found["few_root"](4.0) == found["root"](4.0) == 2.0
    assert found["many"].root is found["root"] and "few" not in found


def test_comments_stay_and_imports_are_gathered():
    text = merged()
    assert "    # a few are another matter\n    if x <= LIMIT:\n        return few_root(x)" in text
    assert text.startswith("from __future__ import annotations\n\nimport math\nfrom math import sqrt\n")
    assert "# ---- ops/few.py ---" in text and "# For a few.\n" in text
    assert "fast" not in text


def test_of_a_module_only_what_is_wanted_comes_along():
    text = merged(only={"own.substitute": ("choose",), "ops.many": ("root",)})
    assert run(text)["compute"]("root", 9.0) == pytest.approx(3.0)
    with pytest.raises(CannotMerge, match=r"`LIMIT` of ops\.few is in none"):
        merged(only={"ops.few": ("root",)})


@pytest.mark.parametrize(
    ("module", "old", "new", "message"),
    [
        ("ops.choice", "from .few import _double", "from .some import _double", "`_double` of ops.some is in none"),
        ("ops.choice", "from .few import _double", "from .few import gone as _double", "`gone` of ops.few is in none"),
        ("ops.choice", 'if backend == "fast"', 'if backend == "new"', "line 13: an import of ops.fast that is not at"),
        ("ops.choice", "return launch(x)\n", "return launch(x)\n    else:\n        pass\n", "has an `else`"),
        ("ops.many", "def root(x):", "def root(x, few=1):", "few cannot be renamed there"),
        ("ops.many", "    # a few", "    LIMIT = [MOST for MOST in (4,)]\n    # a few", "MOST cannot be renamed there"),
        ("ops.few", "return sqrt(x)", "return float(f'{root(x)}')", "root cannot be renamed there"),
        ("ops.many", "import math\n", "import cmath as sqrt\n", "`sqrt` is something else elsewhere"),
        ("ops.many", "import math\n", "import math\nfrom few import Root\n", "a name that a module binds: Root"),
    ],
)
def test_what_has_no_rule_is_refused(module, old, new, message):
    text = SOURCES[module]
    assert text.count(old) == 1
    with pytest.raises(CannotMerge, match=message):
        merged(SOURCES | {module: text.replace(old, new)})
