"""What is wrong with streams, in words: asleep, frozen, growing, fading, not finite."""

import math
from collections.abc import Callable

from torch import nn

from .measure import StreamMeasurement

# streams that differ by less are copies of each other ...
ASLEEP_SPREAD = 1e-6
# ... and by then, those of both conversion starts have parted
ASLEEP_AFTER = 100
# a diagonal lead of 8 in the logits leaves 1.0e-3 at n = 4 and 2.3e-3 at n = 8; one of 4, 4.9e-2 and 8.8e-2
FROZEN_LIVENESS = 3e-3
GAIN_RANGE = (0.1, 10.0)
_GAINS = ("forward_gain", "backward_gain", "composite_forward_gain", "composite_backward_gain")


def find_problems(
    measurement: StreamMeasurement, step: int | None = None, projection: str = "sinkhorn"
) -> dict[str, str]:
    """What is wrong with the streams, in words, by a key that is the same each time the same thing is found.

    Args:
        measurement: what `measure_streams` returned.
        step: optimizer steps made so far; None where nobody knows, as of a checkpoint.
        projection: how the model makes H_res; only "sinkhorn" can be frozen by saturation.
    """
    if measurement.not_finite:
        first = measurement.not_finite[0]
        return {f"not finite {first}": f"The {first} hold NaN or infinity{_explain_not_finite(measurement, first)}."}
    problems = {}
    for index, site in enumerate(measurement.sites):
        bad = [name for name, norms in measurement.gradients.items() if not math.isfinite(norms[index])]
        if bad:
            problems[f"gradient {site}"] = f"The gradient of {site} ({', '.join(bad)}) holds NaN or infinity."
    spread = max(measurement.table["spread"])
    if (step is None or step >= ASLEEP_AFTER) and spread < ASLEEP_SPREAD:
        when = "" if step is None else f"after {step} steps "
        cure = (
            'convert with start="orthogonal" or "copies", and check that the hyper-connections are trained.'
            if step is not None
            else 'a model fresh from the start "copies" is so, and wakes when it is trained; one that has been is not.'
        )
        problems["asleep"] = (
            f"The streams are asleep: {when}they differ by {spread:.1e} of their norm at most: the model is its base "
            f"at n times the cost. Streams that begin equal and are read alike stay equal: {cure}"
        )
    if projection == "sinkhorn":
        site, least = _find_extreme(measurement, "h_res_liveness", min)
        if least < FROZEN_LIVENESS:
            problems[f"frozen {site}"] = (
                f"H_res of {site} is frozen by saturation: its entries are within {least:.1e} of 0 and 1, where "
                "Sinkhorn-Knopp passes no gradient. Start from smaller leads in `bias`, or lower the learning rate of "
                "the hyper-connections."
            )
    low, high = GAIN_RANGE
    for name in _GAINS:
        for extreme in (min, max):
            site, gain = _find_extreme(measurement, name, extreme)
            if not low <= gain <= high:
                problems[f"{name} {site}"] = (
                    f"The {name.replace('_', ' ')} of {site} is {gain:.3g}, outside [{low:g}, {high:g}]: what passes "
                    f"there {'grows' if gain > high else 'fades'}."
                )
    return problems


def _explain_not_finite(measurement: StreamMeasurement, first: str) -> str:
    """Where NaN in the streams comes from: the branch before."""
    index = next(i for i, site in enumerate(measurement.sites) if first.endswith(f" {site}"))
    if first.startswith("maps"):
        return ", while the streams that it gets do not: look at its parameters"
    if index == 0:
        return ": they come from the embedding"
    return f": they come from {measurement.sites[index - 1]} or the branch that it wraps"


def _find_extreme(
    measurement: StreamMeasurement, name: str, extreme: Callable[[list[float]], float]
) -> tuple[str, float]:
    column = measurement.table[name]
    value = extreme(column)
    return measurement.sites[column.index(value)], value


def get_projection(model: nn.Module) -> str:
    """How a model makes H_res from its logits."""
    return getattr(getattr(model, "config", None), "hc_projection", "sinkhorn")
