"""Programs whose kernels Triton interprets: that is settled when triton is imported, so in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_interpreted(module: str) -> dict[str, Any]:
    """The JSON object that `python -m MODULE` prints."""
    result = subprocess.run(
        [sys.executable, "-m", module],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout[result.stdout.index("{") :])
