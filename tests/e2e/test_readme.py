"""The commands and snippets of README.md that are marked `run` (tests/documents.py), in their order."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import ROOT, RUNNABLE, blocks

SECONDS_PER_BLOCK = 150
README = blocks((ROOT / "README.md").read_text(encoding="utf-8"))


def test_there_is_something_to_run():
    assert len([b for b in README if b.language in RUNNABLE]) >= 8


def test_every_relative_link_leads_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A copy of the checkout with this interpreter's environment as its `.venv`."""
    copy = tmp_path_factory.mktemp("readme") / "checkout"
    wanted = ("mtp_megatron", "tests", "tools", "examples", "README.md", "pyproject.toml", "LICENSE")
    copy.mkdir()
    for name in wanted:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


@pytest.mark.timeout(900)
def test_the_runnable_blocks_run_in_their_order(workspace):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(workspace), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for block in README:
        if not re.match(r"run\b", block.directive):
            continue
        command = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else [sys.executable, "-c"]
        code = block.runnable_code
        result = subprocess.run(
            [*command, code], cwd=workspace, env=env, capture_output=True, text=True, timeout=SECONDS_PER_BLOCK
        )
        assert result.returncode == 0, f"{code}\n--- stdout\n{result.stdout}\n--- stderr\n{result.stderr[-8000:]}"


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples" / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_sound_in_its_full_size(recipe):
    from mtp_megatron.training.recipe_io import load_recipe
    from mtp_megatron.training.validate import check_recipe

    loaded = load_recipe(recipe)
    check_recipe(loaded, world_size=loaded.model_parallel_size, tokenizer_vocab_size=32000)
    places = [ROOT / "README.md", ROOT / "tools/quickstart.sh", *(ROOT / "examples").glob("*/README.md")]
    used = "".join(path.read_text(encoding="utf-8") for path in places)
    assert recipe.name in used, "no command and no table names this recipe"
