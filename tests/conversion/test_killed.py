"""A conversion killed at any step leaves a whole folder under the final name or none, and running it again works.

A fresh process imports the library once and forks one child a conversion. In the child an audit hook counts what it
asks of the filesystem (opening, making, linking, truncating, renaming, removing) in the folder of the test, and sends
the child a SIGKILL just before the k-th: every state that a kill can leave between two steps is seen, none by luck.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from mhc_hf.conversion import convert_checkpoint
from mhc_hf.conversion.manifest import read_manifest, strangers
from mhc_hf.conversion.staging import remove_abandoned, staged
from tests.conversion.conftest import bits

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

_KILLED = """
import json, os, signal, sys
from mhc_hf.conversion import convert_checkpoint

STEPS = {"open", "os.mkdir", "os.link", "os.truncate", "os.rename", "os.remove", "os.rmdir", "fcntl.ioctl",
         "ctypes.dlsym", "shutil.copyfile", "fcntl.flock"}

def watch(limit, root):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event not in STEPS:
            return
        if event in ("open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir"):
            paths = [os.fsdecode(a) for a in arguments if isinstance(a, (str, bytes))]
            if not any(os.path.abspath(path).startswith(root) for path in paths):
                return
        elif event == "ctypes.dlsym" and arguments[1] != "renameat2":
            return
        count += 1
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        watch(job["limit"], job["root"])
        convert_checkpoint(job["source"], job["output"], **job["kwargs"])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def convert_and_kill():
    """(limit, root, source, output, **kwargs) -> exit code of a conversion killed just before step `limit`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def run(limit, root, source, output, **kwargs):
        job = {"limit": limit, "root": str(root), "source": str(source), "output": str(output), "kwargs": kwargs}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield run
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def is_whole(folder):
    listed = {entry["name"] for entry in read_manifest(folder)["files"]}
    return strangers(folder) == [] and listed < bits(folder).keys()


def leftovers(folder):
    return [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kwargs", "stride"), [({}, 1), ({"copy": True}, 4), ({"dtype": "bfloat16"}, 4)], ids=["shared", "copied", "cast"]
)
def test_killed_before_any_step_there_is_a_whole_folder_or_none(
    convert_and_kill, sharded_base, tmp_path, kwargs, stride
):
    (tmp_path / "work").mkdir()
    output, before = tmp_path / "work" / "out", bits(sharded_base)
    convert_checkpoint(sharded_base, tmp_path / "reference", **kwargs)
    expected = bits(tmp_path / "reference")
    abandoned = published = 0
    for limit in range(1, 1000, stride):
        code = convert_and_kill(limit, tmp_path / "work", sharded_base, output, **kwargs)
        assert code in (0, -9)
        assert bits(sharded_base) == before
        if output.exists():
            published += 1
            assert bits(output) == expected
            shutil.rmtree(output)
        else:
            abandoned += bool(leftovers(output.parent))
        if code == 0:
            break
        # what was left stays for the next run, which must clear it away and get one step further
        if limit % 7 == 0:
            convert_checkpoint(sharded_base, output, **kwargs)
            assert bits(output) == expected and leftovers(output.parent) == []
            shutil.rmtree(output)
    assert code == 0 and leftovers(output.parent) == []
    # the kills did hit the middle: fewer steps than this would mean that nothing was watched
    assert abandoned > 20 // stride and published >= 1


@pytest.mark.slow
def test_killed_while_it_overwrites_there_is_the_old_folder_or_the_new(convert_and_kill, base, tmp_path):
    (tmp_path / "work").mkdir()
    output, before = tmp_path / "work" / "out", bits(base)
    convert_checkpoint(base, tmp_path / "old", hc_mult=3)
    convert_checkpoint(base, tmp_path / "new")
    old, new = bits(tmp_path / "old"), bits(tmp_path / "new")
    seen = set()
    for limit in range(1, 1000):
        if not output.exists() or bits(output) != old:
            convert_checkpoint(base, output, hc_mult=3, overwrite=True)
        code = convert_and_kill(limit, tmp_path / "work", base, output, overwrite=True)
        assert code in (0, -9)
        assert bits(base) == before and is_whole(output)
        assert bits(output) in (old, new)
        seen.add("new" if bits(output) == new else "old")
        if code == 0:
            break
    assert code == 0 and seen == {"old", "new"} and leftovers(output.parent) == []


def test_the_folder_of_a_running_conversion_is_left_alone(base, tmp_path):
    output = tmp_path / "out"
    with staged(output) as running:
        (running.path / "half").write_text("made")
        assert remove_abandoned(output) == []
        convert_checkpoint(base, output)
        assert (running.path / "half").read_text() == "made"
    assert is_whole(output) and leftovers(tmp_path) == []


def test_only_leftovers_of_the_same_name_are_cleared_away(base, tmp_path):
    for name in (".out.mhc-00000000", ".out2.mhc-00000000", ".out.mhc", "out.mhc-00000000"):
        (tmp_path / name).mkdir()
    convert_checkpoint(base, tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"base", "out", ".out2.mhc-00000000", ".out.mhc", "out.mhc-00000000"}


def test_two_at_once_give_one_whole_folder_and_one_clear_error(base, tmp_path):
    """The second to finish finds the name taken, and leaves the first one's folder as it is."""
    from mhc_hf.conversion import UnusableOutput

    with pytest.raises(UnusableOutput, match="while the conversion ran"), staged(tmp_path / "out") as slower:
        (slower.path / "file").write_text("slow")
        convert_checkpoint(base, tmp_path / "out")
        slower.publish(replace=False)
    assert is_whole(tmp_path / "out") and leftovers(tmp_path) == []


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "a" / "b" / "out") as staging:
        (staging.path / "file").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
