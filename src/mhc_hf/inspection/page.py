"""The page of a report: plain HTML with its style inside, nothing loaded but the figures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from .findings import Difference, Findings

_TOP_TOKENS = 20
_CONTEXT = 6

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; max-width: 1180px; margin: 2rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { max-width: 75ch; } .dim { color: #555; }
figure { margin: .6rem 0; overflow-x: auto; } img { max-width: 100%; height: auto; }
nav { margin-bottom: .8rem; } nav a { margin-right: 1rem; } a { color: #005a8f; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: .15rem .6rem; text-align: right;
  border-bottom: 1px solid #e3e3e3; white-space: nowrap; } th { font-weight: 600; background: #f6f6f6; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td.text, th.text { text-align: left; white-space: normal; } .scroll { overflow: auto; max-height: 36rem; }
.problems { border-left: 4px solid #d55e00; padding: .2rem 1rem; } .fine { border-left: 4px solid #009e73;
  padding: .2rem 1rem; }
.tokens { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Figure:
    """A picture of the page: its file beside the page, its headline and what it says."""

    file: str
    title: str
    caption: str


def write_page(
    path: Path,
    title: str,
    findings: Findings,
    difference: Difference | None,
    figures: Sequence[Figure],
    note: str | None,
) -> None:
    """Write the page of a report."""
    sites = findings.measurement.sites
    subtitle = f"{len(findings.tokens)} tokens through {len(sites)} sites of {findings.num_streams} residual streams."
    parts = [
        f"<h1>Streams of {escape(title)}</h1>",
        f'<p class="dim">{escape(" ".join(filter(None, (subtitle, note))))}</p>',
        '<nav><a href="streams.csv">by site (CSV)</a><a href="tokens.csv">by token (CSV)</a>'
        '<a href="streams.json">all numbers (JSON)</a></nav>',
        _list_problems(findings.problems),
        "<h2>In short</h2>",
        _make_table(("", "", ""), _summarize(findings, difference), text_columns=(2,)),
    ]
    for figure in figures:
        parts.append(f"<h2>{escape(figure.title)}</h2><p>{escape(figure.caption)}</p>")
        parts.append(f'<figure><img src="{escape(figure.file)}" alt="{escape(figure.title)}"></figure>')
        if figure.file == "tokens.png":
            parts += [_color_tokens(findings), _list_top_tokens(findings)]
    parts += ["<h2>By site</h2>", '<div class="scroll">', _make_site_table(findings), "</div>"]
    # an empty icon: browsers ask for one, and a page without it reports an error
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Streams of {escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n",
        encoding="utf-8",
    )


def _list_problems(problems: Sequence[str]) -> str:
    if not problems:
        return '<div class="fine"><p>Nothing stands out: awake, alive, and every gain within [0.1, 10].</p></div>'
    return f'<div class="problems">{"".join(f"<p>{escape(words)}</p>" for words in problems)}</div>'


def _summarize(findings: Findings, difference: Difference | None) -> list[tuple[str, str, str]]:
    table, n = findings.measurement.table, findings.num_streams
    spread, effective = table["spread"], table["effective_streams"]
    rows = [
        ("composite gain, forward", f"{table['composite_forward_gain'][-1]:.4g}", "1 where rows sum to 1"),
        (
            "composite gain, backward",
            f"{table['composite_backward_gain'][0]:.4g}",
            "the paper sees 1.6 at most with mHC",
        ),
        (
            "composite |log column sum|",
            f"{table['composite_log_column_sum'][-1]:.4g}",
            "0 where columns sum to 1; large where a stream fades",
        ),
        ("spread of the streams", f"{max(spread):.3g}", "0 for copies; the largest over sites"),
        (
            "effective number of streams",
            f"{float(np.mean(effective)):.3g}",
            f"1 for copies, {n} at most; mean over sites",
        ),
        ("distance of H_res from I", f"{float(np.mean(table['distance_identity'])):.3g}", "mean over sites"),
    ]
    if difference is not None:
        gap = float(difference.losses.mean() - difference.base_losses.mean())
        rows += [
            ("loss", f"{difference.losses.mean():.4f}", f"base {difference.base_losses.mean():.4f}: {gap:+.2g} nats"),
            ("largest difference of a logit", f"{difference.max_logit:.3g}", "from the base"),
            ("KL(base || model)", f"{difference.kl:.3g}", "nats a token"),
            ("same next token", f"{100 * difference.agreement:.1f} %", "of positions"),
        ]
    return rows


def _color_tokens(findings: Findings) -> str:
    """The text, each token on a ground the warmer the more it moves the maps."""
    moved = findings.moved_tokens
    # white is the token that moves them least: all of them move them some
    low, top = float(moved.min()), float(np.quantile(moved, 0.99))
    spans = []
    for token, value in zip(findings.tokens, moved, strict=True):
        strength = min(1.0, (float(value) - low) / (top - low)) if top > low else 0.0
        spans.append(
            f'<span style="background:rgba(213,94,0,{0.65 * strength:.2f})" title="{value:.3g}">{escape(token)}</span>'
        )
    return f'<p class="tokens">{"".join(spans)}</p>'


def _list_top_tokens(findings: Findings) -> str:
    moved, tokens = findings.moved_tokens, findings.tokens
    rows = []
    for position in np.argsort(-moved)[:_TOP_TOKENS]:
        before = "".join(tokens[max(0, position - _CONTEXT) : position])
        after = "".join(tokens[position + 1 : position + 1 + _CONTEXT])
        rows.append(
            (str(position), repr(tokens[position]), f"{moved[position]:.3g}", f"{before}[{tokens[position]}]{after}")
        )
    return _make_table(("position", "token", "moved", "where"), rows, text_columns=(1, 3))


def _make_site_table(findings: Findings) -> str:
    table = findings.measurement.table
    rows = [
        (site, *(f"{column[index]:.4g}" for column in table.values()))
        for index, site in enumerate(findings.measurement.sites)
    ]
    return _make_table(("site", *(name.replace("_", " ") for name in table)), rows)


def _make_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = ()) -> str:
    def make_row(tag: str, row: Sequence[str]) -> str:
        cells = (
            f"<{tag}{' class=text' if index in text_columns else ''}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(row)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head = make_row("th", header) if any(header) else ""
    return f"<table>{head}{''.join(make_row('td', row) for row in rows)}</table>"
