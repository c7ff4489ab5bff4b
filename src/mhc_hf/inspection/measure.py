"""From a recording to named numbers: a table by site, and a few scalars for a log.

Shapes: L sites in the order they run, T tokens, n streams.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import statistics
from .recording import Recording, SiteReading, record_streams
from .sites import PARAMETERS, InspectionError, find_sites, get_parameters, shorten_name

# how a column of the table becomes one number for the whole model; the names are stable, docs/inspect.md explains them
_WORST, _MEAN, _LEAST = torch.amax, torch.mean, torch.amin
SUMMARY: dict[str, Callable[[Tensor, int], Tensor]] = {
    "forward_gain": _WORST,
    "backward_gain": _WORST,
    "log_column_sum": _WORST,
    "distance_doubly_stochastic": _WORST,
    "distance_identity": _MEAN,
    "h_res_liveness": _LEAST,
    "h_pre_entropy": _MEAN,
    "h_pre_min": _LEAST,
    "h_pre_max": _WORST,
    "h_post_entropy": _MEAN,
    "h_post_min": _LEAST,
    "h_post_max": _WORST,
    "alpha_pre": _MEAN,
    "alpha_post": _MEAN,
    "alpha_res": _MEAN,
    "spread": _WORST,
    "cosine": _MEAN,
    "effective_streams": _MEAN,
}
# of products over depth: forward and log_column_sum from the first site to this one, backward from the last back to it
COMPOSITES = ("composite_forward_gain", "composite_backward_gain", "composite_log_column_sum")


@dataclass(frozen=True)
class StreamMeasurement:
    """What one forward pass showed.

    Attributes:
        sites: names in the order the sites ran.
        table: by column name a list of L floats; columns are the keys of `SUMMARY`, then `COMPOSITES`.
        gradients: by parameter ("phi", "bias", "alpha") a list of L gradient norms; empty where there are none.
        not_finite: what holds NaN or infinity, in the order it ran, e.g. "streams into layers.3.attn_hc".
    """

    sites: list[str]
    table: dict[str, list[float]]
    gradients: dict[str, list[float]]
    not_finite: list[str]

    def summary(self) -> dict[str, float]:
        """One number a name, under "streams/": of the worst site, the mean over sites, or the product over all."""
        scalars = {name: float(reduce(torch.tensor(self.table[name]), 0)) for name, reduce in SUMMARY.items()}
        # all three of the same matrix, H_L ... H_1
        scalars["composite_forward_gain"] = self.table["composite_forward_gain"][-1]
        scalars["composite_backward_gain"] = self.table["composite_backward_gain"][0]
        scalars["composite_log_column_sum"] = self.table["composite_log_column_sum"][-1]
        for name, norms in self.gradients.items():
            scalars[f"grad_norm_{name}"] = float(torch.linalg.vector_norm(torch.tensor(norms)))
        return {f"streams/{name}": value for name, value in scalars.items()}

    def by_site(self) -> dict[str, float]:
        """Every number of every site, under "streams/{site}/{name}"."""
        columns = self.table | {f"grad_norm_{name}": norms for name, norms in self.gradients.items()}
        return {
            f"streams/{site}/{name}": column[index]
            for index, site in enumerate(self.sites)
            for name, column in columns.items()
        }


def measure_streams(model: nn.Module, **inputs: Any) -> StreamMeasurement:
    """Run `model(**inputs)` once without gradients and measure its streams: for training loops of your own.

    Args:
        model: a model with hyper-connections, bare or wrapped, in whatever mode it is in.
        inputs: what the model is called with, e.g. `input_ids=...` [B, S] and `attention_mask=...`.
    Returns:
        A `StreamMeasurement`; gradient norms are those that the parameters hold, so call it after `backward`.
    Raises:
        InspectionError: the model has no hyper-connections.
    """
    with torch.no_grad(), record_streams(model) as recording:
        model(**inputs)
    return summarize(recording, measure_gradients(model))


def summarize(recording: Recording, gradients: Mapping[str, Mapping[str, float]] | None = None) -> StreamMeasurement:
    """Everything that a recording says, in one transfer from the device.

    Args:
        recording: of a forward pass that has run.
        gradients: what `measure_gradients` returned.
    Raises:
        InspectionError: no site has run.
    """
    readings = recording.readings
    if not readings:
        raise InspectionError(
            "No hyper-connection ran while the model was recorded. A compiled model runs without hooks: call it under "
            'torch.compiler.set_stance("force_eager").'
        )
    # layers of one model may lie on several devices
    device = readings[0].h_res.device
    rows = [_measure_site(reading) for reading in readings]
    columns = {name: torch.stack([row[name].to(device) for row in rows]) for name in SUMMARY}
    columns |= _measure_products(readings)
    finite = [torch.stack([reading.streams_finite, reading.maps_finite]).to(device) for reading in readings]
    names = list(columns)
    *values, streams_finite, maps_finite = torch.cat(
        [torch.stack([columns[name] for name in names]), torch.stack(finite, 1).to(columns["spread"].dtype)]
    ).tolist()
    not_finite = []
    for reading, streams, maps in zip(readings, streams_finite, maps_finite, strict=True):
        if not streams:
            not_finite.append(f"streams into {reading.name}")
        elif not maps:
            not_finite.append(f"maps of {reading.name}")
    sites = [reading.name for reading in readings]
    by_parameter = {}
    if gradients:
        by_parameter = {name: [gradients.get(s, {}).get(name, 0.0) for s in sites] for name in PARAMETERS}
    return StreamMeasurement(sites, dict(zip(names, values, strict=True)), by_parameter, not_finite)


@torch.no_grad()
def measure_gradients(model: nn.Module) -> dict[str, dict[str, float]]:
    """By site and parameter the norm of the gradient, where there is one. Collective if parameters are sharded."""
    keys: list[tuple[str, str]] = []
    norms: list[Tensor] = []
    for full_name, site in find_sites(model).items():
        for name, parameter in get_parameters(site).items():
            if parameter.grad is not None:
                keys.append((shorten_name(full_name), name))
                norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
    by_site: dict[str, dict[str, float]] = {}
    # FSDP2: one wait for the parts of all ranks
    whole = [norm.full_tensor() if isinstance(norm, _dtensor()) else norm for norm in norms]
    for (site_name, name), norm in zip(keys, _to_floats(whole), strict=True):
        by_site.setdefault(site_name, {})[name] = norm
    return by_site


def _measure_site(reading: SiteReading) -> dict[str, Tensor]:
    """The row of one site: scalars, averaged over tokens where the name says no extreme."""
    h_pre, h_post, h_res = reading.h_pre, reading.h_post, reading.h_res
    alpha_pre, alpha_post, alpha_res = reading.alpha.unbind()
    return {
        "forward_gain": statistics.forward_gain(h_res).mean(),
        "backward_gain": statistics.backward_gain(h_res).mean(),
        "log_column_sum": statistics.log_column_sum(h_res).amax(),
        "distance_doubly_stochastic": statistics.distance_from_doubly_stochastic(h_res).mean(),
        "distance_identity": statistics.distance_from_identity(h_res).mean(),
        "h_res_liveness": statistics.liveness(h_res).mean(),
        "h_pre_entropy": statistics.entropy(h_pre).mean(),
        "h_pre_min": h_pre.amin(),
        "h_pre_max": h_pre.amax(),
        "h_post_entropy": statistics.entropy(h_post).mean(),
        "h_post_min": h_post.amin(),
        "h_post_max": h_post.amax(),
        "alpha_pre": alpha_pre,
        "alpha_post": alpha_post,
        "alpha_res": alpha_res,
        "spread": reading.spread,
        "cosine": statistics.pairwise_cosine(reading.cosines),
        "effective_streams": reading.effective_streams,
    }


def _measure_products(readings: list[SiteReading]) -> dict[str, Tensor]:
    """[L] each."""
    device = readings[0].h_res.device
    h_res = torch.stack([reading.h_res.to(device) for reading in readings])  # [L, T, n, n]
    from_first, to_last = statistics.compose_from_first(h_res), statistics.compose_to_last(h_res)
    return {
        "composite_forward_gain": statistics.forward_gain(from_first).mean(-1),
        "composite_backward_gain": statistics.backward_gain(to_last).mean(-1),
        "composite_log_column_sum": statistics.log_column_sum(from_first).amax(-1),
    }


def _dtensor() -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor


def _to_floats(scalars: list[Tensor]) -> list[float]:
    if not scalars:
        return []
    return torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist()
