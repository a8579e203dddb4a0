"""Every command in README.md, patches/, docs/ and examples/ is run by a test, or says why it is not."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.documents import NOT_RUN, ROOT, RUNNABLE, Block, blocks, documents, unheld

DOCUMENTS = documents()
# Who runs the blocks marked `run` of a document.
RUNNERS = {
    "README.md": "tests/e2e/test_readme.py",
    "docs/planning.md": "tests/e2e/test_planning_docs.py",
    "examples/deepspeed/README.md": "tests/e2e/test_deepspeed.py",
}
COVERED = [
    (name, block) for name, found in DOCUMENTS.items() for block in found if block.directive.startswith("covered-by ")
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_block_says_how_it_is_run(name: str) -> None:
    assert unheld(DOCUMENTS[name]) == []
    assert all(block.language for block in DOCUMENTS[name]), "a fenced block without a language escapes this test"


def test_the_documents_with_commands_are_among_them() -> None:
    commands = {name for name, found in DOCUMENTS.items() if any(block.language in RUNNABLE for block in found)}
    assert commands >= {*RUNNERS, "docs/fp8.md", "patches/README.md", "examples/megatron_lm/README.md"}


def test_a_block_that_nobody_runs_is_noticed() -> None:
    for mark in ("", "<!-- test: not run -->\n", "<!-- test: covered-by -->\n"):
        assert unheld(blocks(f"text\n{mark}```bash\nrm -rf /\n```\n")) == ["rm -rf /\n"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_blocks_marked_run_have_a_runner(name: str) -> None:
    if any(block.directive.split()[:1] == ["run"] for block in DOCUMENTS[name]):
        text = (ROOT / RUNNERS[name]).read_text(encoding="utf-8")
        assert Path(name).name in text, f"{RUNNERS[name]} does not read {name}"


def test_what_is_not_run_is_known_with_its_reason() -> None:
    reasons = [
        (name, block.directive.removeprefix("not run, "))
        for name, found in DOCUMENTS.items()
        for block in found
        if block.directive.startswith("not run")
    ]
    assert Counter(reasons) == NOT_RUN


@pytest.mark.parametrize(("name", "block"), COVERED, ids=lambda value: value if isinstance(value, str) else "")
def test_the_test_that_a_block_names_runs_its_command(name: str, block: Block) -> None:
    path, _, function = block.directive.removeprefix("covered-by ").partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    if function:
        assert function in [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    word = Path(block.code.split()[1]).name
    assert word in text or name in text, f"{path} runs no {word}, which {name} says it does"
