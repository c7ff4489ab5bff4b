"""The report of an inspection: one page, the figures that it shows, and the same numbers as CSV and JSON."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..plotting import (
    plot_difference,
    plot_distances,
    plot_gains,
    plot_matrices,
    plot_reads_and_writes,
    plot_similarity,
    plot_token_movement,
    save_figure,
    shorten_site,
)
from .findings import Difference, Findings, compare, examine
from .page import Figure, write_page
from .sites import InspectionError, require_sites
from .source import encode_text, load_model, load_tokenizer

if TYPE_CHECKING:
    from matplotlib import figure as matplotlib_figure

PAGE, TABLE, TOKENS, NUMBERS = "index.html", "streams.csv", "tokens.csv", "streams.json"
# composites are shown at so many depths
_MAX_COMPOSITES = 20


@dataclass(frozen=True)
class InspectionReport:
    """What was found and where it was written.

    Attributes:
        folder: holds index.html, streams.csv (a row a site), tokens.csv (a row a token), streams.json and the PNGs.
        findings: the numbers.
        difference: from the base, where one was given.
    """

    folder: Path
    findings: Findings
    difference: Difference | None

    def __str__(self) -> str:
        found, table = self.findings, self.findings.measurement.table
        lines = [
            f"{len(found.tokens)} tokens through {len(found.measurement.sites)} sites of {found.num_streams} streams",
            f"spread of the streams up to {max(table['spread']):.3g}; composite gain "
            f"{table['composite_forward_gain'][-1]:.4g} forward, {table['composite_backward_gain'][0]:.4g} backward",
            *found.problems,
        ]
        if self.difference is not None:
            gap = self.difference.losses.mean() - self.difference.base_losses.mean()
            lines.append(
                f"against the base: logits within {self.difference.max_logit:.3g}, loss {gap:+.4g} nats a token"
            )
        return "\n".join([*lines, f"{self.folder / PAGE}"])


def inspect_streams(
    model: PreTrainedModel | str | Path,
    text: str,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: PreTrainedModel | str | Path | None = None,
    max_tokens: int = 512,
) -> InspectionReport:
    """Run a model over the beginning of a text and show what its streams and maps do there.

    Args:
        model: a widened model, or transformers' own `deepseek_v4` or `glm5_next`; or the folder or Hub id of one.
        text: what to read, as one sequence.
        output_dir: a folder that is new, empty, or holds an earlier report, which is replaced.
        tokenizer: None takes the one beside the checkpoint; where there is none, bytes stand for tokens.
        base: the model before it was widened or tuned, to show the difference; or its folder or Hub id.
        max_tokens: how much of the text is read, >= 2.
    Returns:
        An `InspectionReport`; printed, it is a few lines in words.
    Raises:
        InspectionError: the model has no hyper-connections, the text is too short, base and model do not fit together,
            or the folder holds something else. Nothing has been written then.
        ModuleNotFoundError: matplotlib is missing.
    """
    folder = _check_folder(Path(output_dir))
    loaded = load_model(model)
    require_sites(loaded)
    tokenizer = tokenizer or load_tokenizer(model)
    token_ids, tokens = encode_text(text, tokenizer, loaded, max_tokens)
    findings = examine(loaded, token_ids, tokens)
    difference = None
    if base is not None:
        loaded_base = load_model(base)
        _check_base(loaded, loaded_base)
        difference = compare(loaded, loaded_base, token_ids)
    figures = draw_figures(findings, difference)

    folder.mkdir(parents=True, exist_ok=True)
    for figure, drawn in figures:
        save_figure(drawn, folder / figure.file)
    _write_table(folder / TABLE, findings)
    _write_tokens(folder / TOKENS, findings)
    (folder / NUMBERS).write_text(json.dumps(_collect_numbers(findings, difference), indent=1), encoding="utf-8")
    title = _name_model(model, loaded)
    note = None if tokenizer is not None else "There is no tokenizer: the bytes of the text stand for tokens."
    write_page(folder / PAGE, title, findings, difference, [figure for figure, _ in figures], note)
    return InspectionReport(folder, findings, difference)


def draw_figures(findings: Findings, difference: Difference | None) -> list[tuple[Figure, matplotlib_figure.Figure]]:
    """Every figure of the page with its caption, in order."""
    measurement = findings.measurement
    sites, table = measurement.sites, measurement.table
    short = [shorten_site(site) for site in sites]
    count = min(len(sites), _MAX_COMPOSITES)
    depths = sorted({round(k * (len(sites) - 1) / max(1, count - 1)) for k in range(count)})
    drawn = [
        (
            Figure(
                "gains.png",
                "Gains over depth",
                "Amax gains: the largest row sum (forward, what a signal meets) and "
                "the largest column sum (backward, what a gradient meets), token means. A composite is the product of "
                "all maps from the first site to this one (forward), or from the last back to this one (backward).",
            ),
            plot_gains(sites, table),
        ),
        (
            Figure(
                "h_res.png",
                "H_res of every site",
                "Mean over tokens. Row i, column j: what stream i takes from "
                "stream j. A bright diagonal keeps streams apart; an even square mixes them all.",
            ),
            plot_matrices(dict(zip(short, findings.h_res, strict=True)), "H_res by site, mean over tokens"),
        ),
        (
            Figure(
                "composites.png",
                "Composites over depth",
                "The product of all H_res from the first site to the one "
                "named, mean over tokens: how much of the first streams is left in each.",
            ),
            plot_matrices({f"to {short[k]}": findings.composites[k] for k in depths}, "H_k ... H_1, mean over tokens"),
        ),
        (
            Figure(
                "reads_and_writes.png",
                "Reads and writes",
                "What each stream contributes to a site's branch (H_pre) "
                "and receives from it (H_post). The standard deviation says how much that depends on the token.",
            ),
            plot_reads_and_writes(sites, findings.h_pre, findings.h_post),
        ),
        (
            Figure(
                "similarity.png",
                "Similarity of the streams",
                "At the entrance of each site. Copies have spread 0, cosine 1 and count as one stream.",
            ),
            plot_similarity(sites, table, findings.stream_rms),
        ),
        (
            Figure(
                "distances.png",
                "Where H_res stands",
                "Distance from the identity (Frobenius); the largest breach "
                "of what makes a matrix doubly stochastic; liveness, 0 where saturated; gating factors.",
            ),
            plot_distances(sites, table),
        ),
        (
            Figure(
                "tokens.png", "Tokens that move the maps", "Norm of a token's three maps less the mean over the text."
            ),
            plot_token_movement(sites, findings.moved),
        ),
    ]
    if difference is not None:
        drawn.append(
            (
                Figure(
                    "difference.png",
                    "Difference from the base",
                    "The mean over streams against the base's hidden "
                    "state after each layer, and the loss of each token under both.",
                ),
                plot_difference(difference.hidden, difference.base_losses, difference.losses),
            )
        )
    return drawn


def _check_folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise InspectionError(f"`{folder}` is a file. Give a folder to write the report into.")
    if folder.is_dir() and any(folder.iterdir()) and not all((folder / name).exists() for name in (PAGE, NUMBERS)):
        raise InspectionError(f"`{folder}` is not empty and holds no earlier report. Give a new folder.")
    return folder


def _check_base(model: PreTrainedModel, base: PreTrainedModel) -> None:
    ours, theirs = model.config.get_text_config(), base.config.get_text_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(ours, name) != getattr(theirs, name):
            raise InspectionError(
                f"`base` must be what the model was made of, but `{name}` is {getattr(theirs, name)} there and "
                f"{getattr(ours, name)} in the model. Give the right base, or none."
            )


def _name_model(given: PreTrainedModel | str | Path, model: PreTrainedModel) -> str:
    name = model.name_or_path if isinstance(given, PreTrainedModel) else str(given)
    return Path(name or "").name or type(model).__name__


def _write_table(path: Path, findings: Findings) -> None:
    table = findings.measurement.table
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["site", *table])
        writer.writerows(zip(findings.measurement.sites, *table.values(), strict=True))


def _write_tokens(path: Path, findings: Findings) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["position", "token", "moved", *findings.movement])
        by_map = [(values**2).mean(1) ** 0.5 for values in findings.movement.values()]
        writer.writerows(zip(range(len(findings.tokens)), findings.tokens, findings.moved_tokens, *by_map, strict=True))


def _collect_numbers(findings: Findings, difference: Difference | None) -> dict:
    numbers = {
        "sites": findings.measurement.sites,
        "table": findings.measurement.table,
        "summary": findings.measurement.summary(),
        "problems": findings.problems,
        "h_res": findings.h_res.tolist(),
        "composites": findings.composites.tolist(),
        "h_pre": findings.h_pre[0].tolist(),
        "h_post": findings.h_post[0].tolist(),
        "cosines": findings.cosines.tolist(),
        "tokens": findings.tokens,
        "moved": findings.moved_tokens.tolist(),
    }
    if difference is not None:
        numbers["difference"] = {
            "hidden": difference.hidden,
            "base_loss": float(difference.base_losses.mean()),
            "loss": float(difference.losses.mean()),
            "max_logit": difference.max_logit,
            "kl": difference.kl,
            "agreement": difference.agreement,
        }
    return numbers
