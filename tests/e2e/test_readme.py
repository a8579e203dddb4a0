"""Every command and snippet of README.md is run: here, or by the test that a comment above it names.

A comment above each ``bash`` or ``python`` block says how:

    <!-- test: run -->                               run it, in order with the others, in a copy of the checkout
    <!-- test: run append="..." replace="a=b|c=d" --> the same, words appended and parts replaced
    <!-- test: covered-by tests/x.py::test_y -->     that test runs the same command
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNNABLE = ("bash", "python")
BLOCK = re.compile(
    r"(?:^<!-- test: (?P<directive>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
SECONDS_PER_BLOCK = 150


@dataclass(frozen=True)
class Block:
    directive: str
    language: str
    code: str

    def option(self, name: str) -> str:
        match = re.search(rf'\b{name}="([^"]*)"', self.directive)
        return match.group(1) if match else ""

    @property
    def runnable_code(self) -> str:
        code = self.code.rstrip("\n")
        for pair in filter(None, self.option("replace").split("|")):
            old, new = pair.split("=", 1)
            assert old in code, f"replace names {old!r}, which the block does not hold:\n{code}"
            code = code.replace(old, new)
        return f"{code} {self.option('append')}".rstrip()


def blocks(text: str) -> list[Block]:
    return [Block(m["directive"] or "", m["language"], m["code"]) for m in BLOCK.finditer(text)]


README = blocks((ROOT / "README.md").read_text(encoding="utf-8"))


def unheld(found: list[Block]) -> list[str]:
    """Code of the runnable blocks that no test runs."""
    return [b.code for b in found if b.language in RUNNABLE and not re.match(r"run\b|covered-by \S+$", b.directive)]


def test_every_block_says_how_it_is_run():
    assert unheld(README) == []
    assert len([b for b in README if b.language in RUNNABLE]) >= 8
    assert all(b.language for b in README), "a fenced block without a language escapes this test"


def test_a_block_that_nobody_runs_is_noticed():
    assert unheld(blocks("text\n```bash\nrm -rf /\n```\n")) == ["rm -rf /\n"]


@pytest.mark.parametrize(
    "target", sorted({b.directive.removeprefix("covered-by ") for b in README if b.directive.startswith("covered-by")})
)
def test_the_test_that_a_block_names_exists(target):
    path, _, name = target.partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    if name:
        functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        assert name in functions
    command = [b.code.split()[1] for b in README if b.directive == f"covered-by {target}"]
    for script in command:
        assert Path(script).name in text, f"{path} does not run {script}"


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
