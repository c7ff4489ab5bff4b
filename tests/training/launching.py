"""Real processes for tests: one, or two that talk over the loopback device."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TWO_RANKS = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
TWO_RANKS += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]


def run_python(*arguments, ranks=1):
    """Run `python ARGUMENTS` from the repository's root, on one or two ranks; returns what it has printed."""
    command = [sys.executable, *(TWO_RANKS if ranks == 2 else []), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
