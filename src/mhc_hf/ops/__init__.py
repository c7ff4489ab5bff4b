"""The mathematics of mHC on tensors. `reference` defines what correct means."""

from . import reference
from .functional import (
    SiteRead,
    mhc_coefficients,
    mhc_post_res,
    mhc_pre,
    mhc_pre_branch,
    sinkhorn_knopp,
    site_read,
    site_write,
    site_write_read,
)

__all__ = [
    "SiteRead",
    "mhc_coefficients",
    "mhc_post_res",
    "mhc_pre",
    "mhc_pre_branch",
    "reference",
    "sinkhorn_knopp",
    "site_read",
    "site_write",
    "site_write_read",
]
