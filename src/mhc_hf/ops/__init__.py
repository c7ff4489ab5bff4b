"""The mathematics of mHC on tensors. `reference` defines what correct means."""

from . import reference
from .functional import mhc_coefficients, mhc_post_res, mhc_pre, mhc_pre_branch, sinkhorn_knopp

__all__ = ["mhc_coefficients", "mhc_post_res", "mhc_pre", "mhc_pre_branch", "reference", "sinkhorn_knopp"]
