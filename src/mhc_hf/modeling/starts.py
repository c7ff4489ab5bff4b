"""Starting points of the mHC parameters: which maps a site begins with, and the parameters that give them.

Shapes: n streams, C channels of one stream. A site is one hyper-connection; sites are counted through the whole model.
Every map here is doubly stochastic or within the sigmoids' live range as it stands, so the parameters are its inverse:
`bias_pre = logit(H_pre)`, `bias_post = logit(H_post / 2)`, `bias_res = log(H_res)` up to a constant (or as
`projections` says).
Why the two conversion starts preserve the function, and why their streams separate: docs/math.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .projections import PROJECTIONS

Maps = tuple[Tensor, Tensor, Tensor]  # h_pre [n], h_post [n], h_res [n, n], float64

# largest departure of H_pre from 1/n, as a share of 1/n, and of H_post from 1: both far from where a sigmoid is flat
READ_SWING = 0.6
WRITE_SWING = 0.6
# share that the favoured stream has in a read where the streams begin as copies
FAVOURED_READ = 0.7
# logit by which a stream prefers itself in H_res; 8 and more freeze the softmax
ORTHOGONAL_LEAD = 4.0
COPIES_LEAD = 2.0


@dataclass(frozen=True)
class Start:
    """A named starting point.

    Attributes:
        maps: (n, site) -> the maps that the site begins with.
        alpha: gating factor of the dynamic part, for all three maps.
        min_mult: smallest number of streams it is defined for.
        phi_is_random: phi is drawn at the base model's initializer range; otherwise it is zero.
    """

    maps: Callable[[int, int], Maps]
    alpha: float
    min_mult: int = 2
    phi_is_random: bool = False


def orthogonal_maps(n: int, site: int) -> Maps:
    """Reads and writes that differ along orthogonal zero-mean directions; exact for n >= 3 (docs/math.md)."""
    *write_directions, read_direction = zero_mean_directions(n)
    turn, which = divmod(site, len(write_directions))
    read_sign = (-1) ** site
    write_sign = (-1) ** turn
    h_pre = (1 + READ_SWING * read_sign * read_direction) / n
    h_post = 1 + WRITE_SWING * write_sign * write_directions[which]
    return h_pre, h_post, _leaning_to_itself(n, ORTHOGONAL_LEAD)


def copies_maps(n: int, site: int) -> Maps:
    """Equal writes and unequal reads: identical streams stay identical until training pulls them apart."""
    h_pre = torch.full((n,), (1 - FAVOURED_READ) / (n - 1), dtype=torch.float64)
    h_pre[site % n] = FAVOURED_READ
    return h_pre, torch.ones(n, dtype=torch.float64), _leaning_to_itself(n, COPIES_LEAD)


def zero_mean_directions(n: int) -> list[Tensor]:
    """n - 1 mutually orthogonal zero-mean vectors over the streams, largest entry 1, from low to high frequency.

    They are sin and cos of 2 pi k (j + 1/2) / n: the real Fourier basis on a grid shifted by half a stream, without its
    constant and, for even n, without the cosine of k = n / 2, which vanishes on that grid. n = 4 gives
    (1, 1, -1, -1), (1, -1, -1, 1) and (1, -1, 1, -1).
    """
    angle = 2 * math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n  # [n]
    waves = [wave(k * angle) for k in range(1, n // 2 + 1) for wave in (torch.sin, torch.cos)]
    return [wave / wave.abs().max() for wave in waves[: n - 1]]


def _leaning_to_itself(n: int, lead: float) -> Tensor:
    """c I + (1 - c) J / n with J all ones: the doubly stochastic matrix of logits `lead` on the diagonal, 0 off it."""
    return torch.softmax(lead * torch.eye(n, dtype=torch.float64), -1)


# what a conversion may start from: all of them exact at step 0, and awake. A uniform start is neither here nor wanted:
# streams that are read alike get the same gradient, and stay equal for ever
CONVERSION_STARTS: dict[str, Start] = {
    "orthogonal": Start(orthogonal_maps, alpha=1.0, min_mult=3),
    "copies": Start(copies_maps, alpha=1.0),
}
STARTS: dict[str, Start] = CONVERSION_STARTS | {"paper": Start(copies_maps, alpha=0.01, phi_is_random=True)}


def default_start(hc_mult: int) -> str:
    """The start of a conversion to `hc_mult` streams where none is named."""
    return "orthogonal" if hc_mult >= CONVERSION_STARTS["orthogonal"].min_mult else "copies"


def bias_of(maps: Maps, projection: str = "sinkhorn") -> Tensor:
    """[(n+2)*n] float32, in the order pre, post, res: the biases whose maps are `maps` where the dynamic part is 0."""
    h_pre, h_post, h_res = maps
    res = PROJECTIONS[projection].invert(h_res)
    return torch.cat([h_pre.logit(), (h_post / 2).logit(), res.flatten()]).float()
