"""The report: every figure is there, every number is right, and a mistake leaves nothing behind."""

import copy
import csv
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mhc_hf import MHCForCausalLM
from mhc_hf.inspection import InspectionError, inspect_streams, measure_streams

from ..conftest import tiny_model
from .conftest import doubly_stochastic, set_maps, sites, tiny_transformers_model

TEXT = "Streams are read, written and mixed. " * 3


class Page(HTMLParser):
    """What a browser would load, and what it would show."""

    def __init__(self, path):
        super().__init__()
        self.loads, self.links, self.words, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)
        if tag in ("img", "script", "iframe"):
            self.loads.append(attributes.get("src"))
        if tag in ("a", "link"):
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def model(base):
    """Four sites with known, unlike maps that differ a little by token."""
    model = MHCForCausalLM.from_base(copy.deepcopy(base))
    for seed, site in enumerate(sites(model)):
        set_maps(site, [0.4, 0.3, 0.2, 0.1], [1.5, 0.5, 1.2, 0.8], doubly_stochastic(4, seed).log())
        with torch.no_grad():
            site.phi.copy_(0.02 * torch.randn(site.phi.shape, generator=torch.Generator().manual_seed(seed)))
    return model


@pytest.fixture(scope="module")
def report(model, base, tmp_path_factory):
    return inspect_streams(model, TEXT, tmp_path_factory.mktemp("report") / "new", base=base, max_tokens=64)


def test_the_page_shows_every_figure_and_loads_nothing_else(report):
    page = Page(report.folder / "index.html")
    figures = sorted(path.name for path in report.folder.glob("*.png"))
    assert sorted(page.loads) == figures and len(figures) == 8
    for name in figures:
        with Image.open(report.folder / name) as image:
            image.load()
            # something is drawn: not one colour all over
            assert min(image.size) > 200 and len(image.convert("L").getcolors()) > 20, name
    for link in page.links:
        assert link == "data:," or (report.folder / link).exists(), link
    assert not page.open


def test_the_table_holds_what_measure_streams_measures(report, model):
    rows = read_csv(report.folder / "streams.csv")
    ids = torch.tensor([[byte % 97 for byte in TEXT.encode()[:64]]])
    table = measure_streams(model, input_ids=ids).table
    assert [row["site"] for row in rows] == [f"layers.{i}.{name}_hc" for i in (0, 1) for name in ("attn", "ffn")]
    for name, column in table.items():
        assert [float(row[name]) for row in rows] == pytest.approx(column, rel=1e-12), name
    numbers = json.loads((report.folder / "streams.json").read_text())
    assert numbers["table"] == {name: [float(row[name]) for row in rows] for name in table}
    # nearly static maps: the product of the means is near the mean of the products
    product = np.linalg.multi_dot(numbers["h_res"][::-1])
    np.testing.assert_allclose(numbers["composites"][-1], product, atol=5e-3)


def test_tokens_that_move_the_maps_are_those_whose_maps_differ(report):
    rows = read_csv(report.folder / "tokens.csv")
    assert "".join(row["token"] for row in rows) == TEXT[:64]
    for row in rows:
        assert float(row["moved"]) ** 2 == pytest.approx(
            sum(float(row[name]) ** 2 for name in ("h_pre", "h_post", "h_res")), rel=1e-9
        )
    top = max(rows, key=lambda row: float(row["moved"]))
    words = Page(report.folder / "index.html").words
    assert f"{float(top['moved']):.3g}" in words and repr(top["token"]) in words


def test_the_difference_from_the_base_is_measured(report, model, base):
    ids = torch.tensor([[byte % 97 for byte in TEXT.encode()[:64]]])
    with torch.no_grad():
        ours, theirs = (m(ids, labels=ids) for m in (model, base))
    difference = json.loads((report.folder / "streams.json").read_text())["difference"]
    assert difference["loss"] == pytest.approx(float(ours.loss), abs=1e-5)
    assert difference["base_loss"] == pytest.approx(float(theirs.loss), abs=1e-5)
    assert difference["max_logit"] == pytest.approx(float((ours.logits - theirs.logits).abs().max()), abs=1e-5)
    assert difference["kl"] > 0 and len(difference["hidden"]) == 3


def test_a_conversion_differs_from_its_base_by_rounding_only(base, tmp_path):
    widened = MHCForCausalLM.from_base(copy.deepcopy(base))
    report = inspect_streams(widened, TEXT, tmp_path / "report", base=base, max_tokens=32)
    assert max(report.difference.hidden) < 1e-5 and report.difference.agreement == 1
    assert "Nothing stands out" in (report.folder / "index.html").read_text()


def test_a_model_of_transformers_is_inspected_from_its_folder(tmp_path):
    model = tiny_transformers_model("deepseek_v4")
    model.save_pretrained(tmp_path / "model")
    report = inspect_streams(tmp_path / "model", TEXT, tmp_path / "report", max_tokens=40)
    ids = torch.tensor([[byte % 97 for byte in TEXT.encode()[:40]]])
    table = measure_streams(model, input_ids=ids).table
    for row, gain in zip(read_csv(report.folder / "streams.csv"), table["backward_gain"], strict=True):
        assert float(row["backward_gain"]) == pytest.approx(gain, rel=1e-6)
    page = Page(report.folder / "index.html")
    assert len(page.loads) == 7 and any("bytes of the text" in words for words in page.words)


def test_markup_in_a_text_stays_text(model, tmp_path):
    report = inspect_streams(model, "<script>alert(1)</script> & more", tmp_path / "report")
    assert None not in Page(report.folder / "index.html").loads


def test_an_earlier_report_is_replaced_and_other_folders_are_not_touched(model, base, tmp_path):
    inspect_streams(model, TEXT, tmp_path / "report", max_tokens=8)
    inspect_streams(model, TEXT, tmp_path / "report", max_tokens=16)
    assert len(read_csv(tmp_path / "report" / "tokens.csv")) == 16
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    mistakes = [
        (dict(model=model, text=TEXT, output_dir=tmp_path / "mine"), "not empty and holds no earlier report"),
        (dict(model=base, text=TEXT, output_dir=tmp_path / "new"), "hyper-connections, got a LlamaForCausalLM"),
        (dict(model=model, text="", output_dir=tmp_path / "new"), "`text` has 0 tokens"),
        (dict(model=model, text=TEXT, output_dir=tmp_path / "new", max_tokens=1), "`max_tokens` must be"),
        (
            dict(model=model, text=TEXT, output_dir=tmp_path / "new", base=tiny_model("llama")),
            "`num_hidden_layers` is 3",
        ),
        (dict(model=tmp_path / "nowhere", text=TEXT, output_dir=tmp_path / "new"), "does not exist"),
        (dict(model=tmp_path / "mine", text=TEXT, output_dir=tmp_path / "new"), "holds no config.json"),
    ]
    for arguments, words in mistakes:
        with pytest.raises(InspectionError, match=words):
            inspect_streams(**arguments)
    assert not (tmp_path / "new").exists() and [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
