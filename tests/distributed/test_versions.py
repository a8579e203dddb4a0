"""A checkpoint of one megatron-core is resumed with the other, in both directions, and training goes on alike.

The other version lives in another environment with another Python, which tools/test.sh makes (`.venv-py312`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_megatron import compat
from tests.harness import run_world
from tests.training_runs import interrupted_copy, largest_difference, metrics, tiny_tree, train_body

ROOT = Path(__file__).parents[2]
OTHER = ROOT / ".venv-py312" / "bin" / "python"
SETTINGS: dict[str, Any] = {"parallel__tensor": 2, "parallel__sequence_parallel": True}


def other_python() -> str | None:
    """The interpreter of the other environment: of ``MTP_OTHER_PYTHON``, or what tools/test.sh made; None without."""
    found = os.environ.get("MTP_OTHER_PYTHON") or (str(OTHER) if OTHER.exists() else None)
    return None if found is None or Path(found).parents[1] == Path(sys.prefix) else found


pytestmark = pytest.mark.skipif(other_python() is None, reason="needs .venv-py312 beside this one: tools/test.sh")


def in_the_other(*command: str) -> str:
    result = subprocess.run(
        [str(other_python()), "-m", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def train_in_the_other(tree: dict[str, Any], recipe: Path) -> None:
    recipe.write_text(yaml.safe_dump(tree))
    in_the_other("mtp_megatron", "train", str(recipe))


def test_the_other_environment_has_another_megatron_core() -> None:
    """Control: the tests below compare two versions, not one with itself."""
    found = re.search(r"megatron-core +(\S+) in ", in_the_other("mtp_megatron.compat"))
    assert found is not None
    assert found[1] != str(compat.MCORE_VERSION)


@pytest.mark.parametrize("distributed", [False, True])
def test_either_version_resumes_what_the_other_saved(distributed: bool, data: Path, tmp_path: Path) -> None:
    """Weights, optimizer, schedule and position in the data: a part that were lost would change the next losses
    (tests/distributed/test_training.py shows that it would)."""
    settings = {**SETTINGS, "optimizer__distributed": distributed}
    here, there = tmp_path / "here", tmp_path / "there"
    run_world(train_body, 2, tiny_tree(data, here, **settings))
    train_in_the_other(tiny_tree(data, there, **settings), tmp_path / "there.yaml")
    assert largest_difference(metrics(here), metrics(there)) < 1e-6

    resumed_here = interrupted_copy(there, tmp_path / "resumed_here", step=4)
    run_world(train_body, 2, tiny_tree(data, resumed_here, **settings))
    resumed_there = interrupted_copy(here, tmp_path / "resumed_there", step=4)
    train_in_the_other(tiny_tree(data, resumed_there, **settings), tmp_path / "resumed_there.yaml")
    for resumed, whole in ((resumed_here, there), (resumed_there, here)):
        assert max(metrics(resumed)) == 8
        assert largest_difference(metrics(resumed), metrics(whole)) < 1e-6
        assert largest_difference(metrics(resumed, "valid"), metrics(whole, "valid")) < 1e-6
