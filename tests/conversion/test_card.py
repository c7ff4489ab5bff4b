"""The card of a conversion: what it is, the base's metadata, how to load it; of the base's text nothing."""

import pytest
from huggingface_hub import ModelCard

from mhc_hf.conversion import convert_checkpoint
from mhc_hf.conversion.card import CARD


def card_of(base, out, **options):
    convert_checkpoint(base, out, **options)
    card = ModelCard.load(out / CARD)
    return card.data.to_dict(), card.text


def test_it_says_what_the_model_is_and_how_to_load_it(base, tmp_path):
    data, text = card_of(base, tmp_path / "out", hc_mult=3)
    assert data["library_name"] == "transformers" and "mhc" in data["tags"]
    assert data["pipeline_tag"] == "text-generation"
    for words in (
        "base, widened into 3 residual streams",
        "| llama |",
        "| orthogonal |",
        "to rounding",
        "import mhc_hf",
    ):
        assert words in text
    assert "trust_remote_code" not in text and str(tmp_path) not in text


def test_a_self_contained_one_says_how_to_load_it_alone(base, tmp_path):
    _, text = card_of(base, tmp_path / "out", self_contained=True)
    alone, _, with_package = text.partition("import mhc_hf")
    assert "trust_remote_code=True" in alone and "modeling_mhc.py" in alone
    assert "trust_remote_code" not in with_package


def test_metadata_of_the_bases_card_are_carried_and_its_text_is_not(base, tmp_path):
    (base / CARD).write_text(
        "---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE\nlanguage:\n- en\n- de\n"
        "base_model: team/ancestor\ndatasets:\n- team/texts\ntags:\n- theirs\n---\n# Ours\nIt was trained with care.\n"
    )
    data, text = card_of(base, tmp_path / "out")
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "some-licence", "LICENSE")
    assert data["language"] == ["en", "de"] and data["base_model"] == "team/ancestor"
    assert "datasets" not in data and "theirs" not in data["tags"]
    assert "trained with care" not in text and "its own card" in text


@pytest.mark.parametrize("card", [None, "no metadata", "---\n[: not yaml\n---\n"])
def test_a_licence_without_metadata_is_pointed_to(base, tmp_path, card):
    (base / CARD).unlink()
    if card is not None:
        (base / CARD).write_text(card)
    data, _ = card_of(base, tmp_path / "out")
    assert (data["license"], data["license_link"]) == ("other", "LICENSE")
    assert "base_model" not in data and "language" not in data


def test_a_base_without_any_licence_gets_none(base, tmp_path):
    (base / CARD).unlink()
    (base / "LICENSE").unlink()
    data, _ = card_of(base, tmp_path / "out")
    assert "license" not in data


def test_a_cast_is_said(base, tmp_path):
    _, text = card_of(base, tmp_path / "out", dtype="bfloat16")
    assert "its weights cast to bfloat16" in text
