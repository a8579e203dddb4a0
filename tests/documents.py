"""The commands in the project's documents, and how each of them is held.

A comment above each ``bash`` or ``python`` block says how:

    <!-- test: run -->                               a test runs it as it stands, in order with the others
    <!-- test: run append="..." replace="a=b|c=d" --> the same, words appended and parts replaced
    <!-- test: covered-by tests/x.py::test_y -->     that test runs the same command
    <!-- test: not run, REASON -->                   nothing runs it, for that reason
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNNABLE = ("bash", "python")
# The only blocks that no test runs, and how many: a further one is a decision, to be made here too.
NOT_RUN = {
    ("docs/fp8.md", "it needs a GPU"): 2,
    ("docs/fp8.md", "it downloads 3 GB, compiles for minutes, and the second line needs a GPU"): 1,
}
HELD = re.compile(r"run\b|covered-by \S+$|not run, \S.*")
BLOCK = re.compile(
    r"(?:^<!-- test: (?P<directive>.+?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block, with the comment above it."""

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
    """The fenced blocks of a document."""
    return [Block(m["directive"] or "", m["language"], m["code"]) for m in BLOCK.finditer(text)]


def documents() -> dict[str, list[Block]]:
    """Every document that tells a user what to do, by its path, with its blocks."""
    paths = [
        ROOT / "README.md",
        ROOT / "patches/README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("examples/*/README.md"),
    ]
    return {str(path.relative_to(ROOT)): blocks(path.read_text(encoding="utf-8")) for path in sorted(paths)}


def unheld(found: list[Block]) -> list[str]:
    """Code of the runnable blocks of which nothing says how they are run, or why they are not."""
    return [block.code for block in found if block.language in RUNNABLE and not HELD.match(block.directive)]
