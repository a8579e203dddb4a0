"""`tools/quickstart.sh` as a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def quickstart(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in this interpreter's environment, on `folder/data` and `folder/run`; its output, standard error
    included, is in `stdout`."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "MTP_SETUP": "skip",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(
        ["bash", "tools/quickstart.sh", *arguments, "--data", str(folder / "data"), "--run", str(folder / "run")],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )
