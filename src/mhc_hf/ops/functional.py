"""The public ops: checks and choice of backend."""

from .eager import mhc_coefficients, mhc_post_res, mhc_pre, mhc_pre_branch, sinkhorn_knopp

__all__ = ["mhc_coefficients", "mhc_post_res", "mhc_pre", "mhc_pre_branch", "sinkhorn_knopp"]
