"""Commands that install this package work as they are written: it is on no package index under any name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from mtp_megatron.install import CHECKOUT, EXPLANATION, install_command
from mtp_megatron.serving.bundle_readme import readme
from mtp_megatron.serving.drafts import drafts_of
from tests.serving.models import llama_config, mtp_config, shapes

ROOT = Path(__file__).parents[2]
PLACES = ("README.md", "Dockerfile", "docs", "examples", "mtp_megatron", "patches", "tools")
# As a requirement: after `pip install` and its options (not as a folder's name), or with an extra, however lines break.
WRONG = re.compile(r"pip install[^\n`;&|]*(?<!/)\bmtp[-_]megatron(?![-_/'\w])|\bmtp-megatron\[")


def texts() -> dict[str, str]:
    files = [file for place in PLACES for file in [ROOT / place, *(ROOT / place).rglob("*")] if file.is_file()]
    kept = [file for file in files if file.suffix in ("", ".md", ".py", ".sh", ".yaml", ".slurm")]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in kept}


def test_nothing_tells_to_install_it_from_an_index() -> None:
    found = {name: match[0] for name, text in texts().items() if (match := WRONG.search(text))}
    assert found == {}


@pytest.mark.parametrize(
    "wrong", ["pip install --no-deps mtp-megatron  # x", "pip install 'mtp-megatron[report]'", "'mtp-megatron[te]'; "]
)
def test_such_a_line_would_be_found(wrong: str) -> None:
    assert WRONG.search(wrong)


def test_the_extras_that_are_named_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra
        for text in texts().values()
        for pattern in (rf"{CHECKOUT}\[(\w+)\]", r"install_command\(['\"](\w+)['\"]")
        for extra in re.findall(pattern, text)
    }
    assert {"deepspeed", "report"} <= named <= set(extras)


def test_the_command() -> None:
    assert install_command() == "pip install PATH_TO_CHECKOUT"
    assert install_command("report") == "pip install 'PATH_TO_CHECKOUT[report]'"  # quoted: shells expand brackets
    text = readme(llama_config(), mtp_config(), drafts_of(llama_config(), mtp_config(), list(shapes())))
    assert f"    pip install --no-deps PATH_TO_CHECKOUT      # in vLLM's environment; {EXPLANATION}\n" in text
