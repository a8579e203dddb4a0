"""Linters that wheels put beside this interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def linter(name: str, package: str) -> str:
    """Its path; skips without it."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"needs the package {package}, which has no wheel for every machine")
    return str(path)
