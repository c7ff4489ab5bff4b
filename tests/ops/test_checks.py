"""Errors name the argument, its value, the rule and the cure; a named backend runs or says why it cannot."""

import subprocess
import sys

import pytest
import torch

from mhc_hf import ops
from mhc_hf.ops import backends

from .sites import make_site


def _read(**changes):
    site = make_site(4, 8) | changes
    return ops.mhc_pre_branch(site["x"], site["phi"], site["bias"], site["alpha"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 32)}, r"`x` must be \[\.\.\., n, C\].*got \[2, 32\].*unflatten"),
        ({"x": torch.zeros(2, 4, 8, dtype=torch.int32)}, r"`x` must be float16.*got torch\.int32"),
        ({"phi": torch.zeros(24, 31)}, r"`phi` must be \[24, 32\].*got \[24, 31\].*hc_mult"),
        ({"bias": torch.zeros(23)}, r"`bias` must be \[24\]"),
        ({"alpha": torch.zeros(1)}, r"`alpha` must be \[3\]"),
        (
            {"phi": torch.zeros(24, 32, dtype=torch.bfloat16)},
            r"`phi` must be float32, got torch\.bfloat16.*\.float\(\)",
        ),
    ],
)
def test_a_wrong_site_argument_is_named(changes, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        _read(**changes)


def test_maps_must_be_float32_and_of_the_streams_shape():
    x, y = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 8)
    h_post, h_res = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="`h_res` must be float32"):
        ops.mhc_post_res(x, y, h_post, h_res.half())
    with pytest.raises(ValueError, match=r"`h_post` must be \[2, 3, 4\]"):
        ops.mhc_post_res(x, y, h_post[..., :3], h_res)
    with pytest.raises(ValueError, match=r"`branch_out` must be torch\.float32"):
        ops.mhc_post_res(x, y.bfloat16(), h_post, h_res)
    with pytest.raises(ValueError, match="`num_iters` must be an integer >= 1, got 0"):
        ops.sinkhorn_knopp(h_res, 0)
    with pytest.raises(ValueError, match="`logits` must be floating and end in a square"):
        ops.sinkhorn_knopp(h_post)


def test_a_named_backend_never_falls_back():
    x = make_site(4, 8)["x"]
    with pytest.raises(RuntimeError, match=r'`backend="triton"` cannot run: .*cpu'):
        ops.mhc_pre(x, torch.zeros(2, 7, 4), backend="triton")
    with pytest.raises(ValueError, match='`backend` must be "auto", "torch", "native" or "triton", got \'cuda\''):
        ops.mhc_pre(x, torch.zeros(2, 7, 4), backend="cuda")


def test_the_reason_names_what_is_missing():
    on_device = torch.empty(1, 4, 8, device="meta")
    assert "meta" in backends.explain_no_triton(on_device, 4)
    assert backends.choose_backend("auto", on_device, 4) == "torch"


def test_importing_the_ops_imports_no_triton_kernel():
    code = "import sys, mhc_hf.ops; print(any(m.startswith('mhc_hf.ops.triton') for m in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split()[-1] == "False"
