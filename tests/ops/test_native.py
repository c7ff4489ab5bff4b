"""The C for CPUs: rounding, copies, NaN, threads, widths of vectors; how it is built, and what if it cannot be."""

import os
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch

from mhc_hf import ops
from mhc_hf.ops import backends, reference
from mhc_hf.ops.native import build, launch

from .sites import bind_ops, differentiate, make_site, pass_site, relative_error, widen

native = bind_ops("native")
HALVES = [torch.bfloat16, torch.float16]


# ---- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("weight", [1.0, 0.3, 3.0, 2.0**-9])
def test_every_half_is_widened_exactly_and_rounded_to_nearest_even(dtype, weight):
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.stack([values, torch.zeros_like(values)])[None]  # [1, 2, 65536]
    got = native.mhc_pre(x, torch.tensor([[weight, 1.0]]))[0]
    want = (weight * values.float()).to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(nan=1.0), want.nan_to_num(nan=1.0))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("n", range(2, 9))
def test_a_mix_of_copies_is_the_copy_to_the_bit_in_each_token_that_holds_copies(n, dtype):
    site = make_site(n, 37, lead=(20,), dtype=dtype)
    x, is_copies = site["x"].clone(), torch.arange(20) % 3 > 0
    x[is_copies] = x[is_copies, :1]
    _, _, h_res = native.mhc_coefficients(x, site["phi"], site["bias"], site["alpha"])
    mixed = native.mhc_post_res(x, site["branch_out"], torch.zeros(20, n), h_res)
    assert torch.equal(mixed[is_copies], x[is_copies])
    assert not torch.equal(mixed[~is_copies], x[~is_copies])
    h_pre = torch.rand(20, n).softmax(-1)
    assert torch.equal(native.mhc_pre(x, h_pre)[is_copies], x[is_copies, 0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_so_and_stays_in_its_token(value):
    site = make_site(4, 24, lead=(40,))
    site["x"][7, 2, 5] = value
    branch_in, h_post, h_res = native.mhc_pre_branch(site["x"], site["phi"], site["bias"], site["alpha"])
    out = native.mhc_post_res(site["x"], site["branch_out"], h_post, h_res)
    for tensor in (branch_in, h_post, h_res, out):
        finite = tensor.flatten(1).isfinite().all(-1)
        assert not finite[7] and finite[torch.arange(40) != 7].all()


def test_extreme_streams_and_biases_give_finite_values_and_gradients():
    site = make_site(4, 60, lead=(3, 7))
    site["bias"] = 1e4 * torch.sign(site["bias"])
    got, plain = differentiate(pass_site(native), site), differentiate(pass_site(), site)
    want = differentiate(pass_site(), widen(site))
    assert all(tensor.isfinite().all() for tensor in got.values())
    # in float32 a logit of 1e4 has a spacing of 1e-3: no formula is closer than that
    assert relative_error(got["out0"], want["out0"]) <= 2 * relative_error(plain["out0"], want["out0"])


def test_many_channels_take_smaller_tiles():
    for num_channels in (2880, 8200):
        site = make_site(4, num_channels, lead=(9,))
        got, want = differentiate(pass_site(native), site), differentiate(pass_site(), widen(site))
        assert all(relative_error(got[name], want[name]) <= 2e-6 for name in want)


def test_threads_change_nothing_but_the_rounding_of_sums_over_tokens():
    site = make_site(4, 96, lead=(300,))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(differentiate(pass_site(native), site))
        again = differentiate(pass_site(native), site)
        assert all(torch.equal(results[-1][name], again[name]) for name in again)
    one, *others = results
    for other in others:
        for name in one:
            if name in ("d_phi", "d_bias", "d_alpha"):
                assert relative_error(other[name], one[name]) < 1e-6
            else:
                assert torch.equal(other[name], one[name]), name


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the pool of threads is looked up in /proc")
def test_the_threads_are_those_of_pytorchs_own_pool():
    code = """
import os, torch
torch.set_num_threads(2)
torch.ones(2000000).exp().sum()
before = len(os.listdir("/proc/self/task"))
from mhc_hf.ops.native import build
assert build._find_parallel_region()
from tests.ops.sites import bind_ops, differentiate, make_site, pass_site
differentiate(pass_site(bind_ops("native")), make_site(4, 96, lead=(900,)))
ours = len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
child = os.fork()
if not child:
    differentiate(pass_site(bind_ops("native")), make_site(4, 96, lead=(900,)))
    os._exit(0)
print(ours - before, os.waitpid(child, 0)[1])
"""
    # autograd brings one thread of its own
    assert run_python(code, OMP_NUM_THREADS="2").split() in (["0", "0"], ["1", "0"])


@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
def test_narrower_vectors_compute_the_same(flag, monkeypatch, fresh_build):
    compiler = build.find_compiler()
    if build._tune_flag() != "-march=native":
        pytest.skip("the widths are those of x86")
    build.find_compiler.cache_clear()
    monkeypatch.setenv("CC", " ".join([*compiler, flag]))
    for site in (make_site(4, 60, lead=(23,)), make_site(3, 33, lead=(7,), dtype=torch.bfloat16)):
        got, want = differentiate(pass_site(native), site), differentiate(pass_site(), widen(site))
        plain = differentiate(pass_site(), site)
        for name in want:
            assert relative_error(got[name], want[name]) <= max(2e-6, 2 * relative_error(plain[name], want[name]))


# ---- building it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_build(tmp_path, monkeypatch):
    """An empty cache folder, and nothing remembered of what was built before; returns where libraries will lie."""
    cached = (
        build.explain_no_library,
        build.load_library,
        build.find_compiler,
        build._make_key,
        launch._load_functions,
    )

    def forget():
        for function in cached:
            function.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield tmp_path / "mhc_hf"
    forget()


def run_python(code, **environment):
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def collapse(x, **keywords):
    return ops.mhc_pre(x, torch.full(x.shape[:-1], 0.5), **keywords)


X = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))


def test_without_a_compiler_auto_takes_torch_and_native_says_why(monkeypatch, fresh_build):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend("auto", X, 2) == "torch"
        torch.testing.assert_close(collapse(X), X.mean(-2) * 1.0)
    with pytest.raises(RuntimeError, match=r'`backend="native"` cannot run: no C compiler was found.*install gcc'):
        collapse(X, backend="native")


def test_a_compiler_that_is_named_and_absent_is_not_replaced(monkeypatch, fresh_build):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"`CC`='no-such-compiler' names none"):
        collapse(X, backend="native")


def test_a_compiler_that_fails_is_reported_once_and_auto_takes_torch(monkeypatch, fresh_build):
    monkeypatch.setenv("CC", "cc --no-such-flag")
    with pytest.warns(RuntimeWarning, match="failed with code 1.*no-such-flag"):
        assert backends.choose_backend("auto", X, 2) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose_backend("auto", X, 2) == "torch"
    with pytest.raises(RuntimeError, match=r'`backend="native"` cannot run: the C compiler .* failed'):
        collapse(X, backend="native")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (X.double(), "float64"),
        (torch.empty(3, 9, 4), "2 to 8 streams, and `x` has 9"),
        (torch.empty(3, 4, 4, device="meta"), "on meta"),
    ],
)
def test_native_says_what_it_is_not_made_for_and_auto_takes_torch(x, message):
    assert backends.choose_backend("auto", x, x.shape[-2]) == "torch"
    with pytest.raises(RuntimeError, match=message):
        backends.choose_backend("native", x, x.shape[-2])


def test_a_library_is_kept_and_only_its_user_can_write_there(fresh_build):
    collapse(X, backend="native")
    (library,) = fresh_build.iterdir()
    assert library.name.startswith("n2-float32-") and fresh_build.stat().st_mode & 0o077 == 0
    made = library.stat().st_mtime_ns
    build.load_library.cache_clear()
    build.load_library(2, torch.float32)
    assert [path.stat().st_mtime_ns for path in fresh_build.iterdir()] == [made]


def test_two_processes_may_build_at_once(fresh_build):
    children = []
    for _ in range(2):
        child = os.fork()
        if not child:
            torch.set_num_threads(1)
            right = torch.allclose(collapse(X, backend="native"), X.mean(-2))
            os._exit(0 if right else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert all(path.suffix == ".so" for path in fresh_build.iterdir())


def test_a_damaged_library_is_made_again(fresh_build):
    fresh_build.mkdir(mode=0o700)
    command = (*build.find_compiler(), *build._FLAGS, build._tune_flag(), "-DSTREAMS=2", *build.DTYPE_FLAGS[X.dtype])
    name = f"n2-float32-{build._make_key(command)}"
    path = build._build(command, fresh_build, name)
    intact = path.read_bytes()
    middle = len(intact) // 2
    for damaged in (intact[:-100], intact[:middle] + bytes([intact[middle] ^ 255]) + intact[middle + 1 :], b""):
        path.write_bytes(damaged)
        assert build._find_intact(fresh_build, name) is None
    torch.testing.assert_close(collapse(X, backend="native"), X.mean(-2))
    assert [file.read_bytes() == intact for file in fresh_build.iterdir()] == [True]


def test_a_file_of_someone_else_is_not_loaded(fresh_build, monkeypatch):
    collapse(X, backend="native")
    (library,) = fresh_build.iterdir()
    name = library.stem.rpartition("-")[0]
    assert build._find_intact(fresh_build, name) == library
    monkeypatch.setattr(os, "getuid", partial(int, library.stat().st_uid + 1))
    assert build._find_intact(fresh_build, name) is None
    assert build.find_cache_folder() is None


def test_a_folder_that_others_can_write_to_is_not_used(fresh_build):
    fresh_build.mkdir()
    fresh_build.chmod(0o770)
    torch.testing.assert_close(collapse(X, backend="native"), X.mean(-2))
    assert list(fresh_build.iterdir()) == []


def test_where_nothing_can_be_kept_it_is_built_all_the_same(fresh_build):
    # a file where the folder should be: not even root can write there
    fresh_build.write_text("")
    torch.testing.assert_close(collapse(X, backend="native"), X.mean(-2))


def test_the_reference_is_what_auto_computes():
    site = make_site(4, 24)
    got, want = differentiate(pass_site(ops), site), differentiate(pass_site(reference), widen(site))
    assert all(relative_error(got[name], want[name]) <= 2e-6 for name in want)
