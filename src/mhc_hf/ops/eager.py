"""The PyTorch path of the ops: CPUs, float64 and wherever Triton is not."""

from .reference import mhc_coefficients, mhc_post_res, mhc_pre, mhc_pre_branch, sinkhorn_knopp

__all__ = ["mhc_coefficients", "mhc_post_res", "mhc_pre", "mhc_pre_branch", "sinkhorn_knopp"]
