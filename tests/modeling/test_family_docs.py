"""docs/families.md is what the table says."""

import importlib.util
from pathlib import Path

from mhc_hf.modeling.sublayers import FAMILIES, SITE_NAMES

from .family_models import VARIANTS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_families", DOCS / "make_families.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    assert (DOCS / "families.md").read_text() == maker.page(), "run `python docs/make_families.py`"


def test_every_configuration_in_the_tests_is_of_a_family_in_the_table():
    assert set(VARIANTS) <= set(FAMILIES)


def test_the_names_of_sites_are_few():
    assert set(SITE_NAMES) == {"attn_hc", "ffn_hc", "layer_hc", "per_layer_hc"}
