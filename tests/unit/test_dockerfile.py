"""The Dockerfile as far as it can be held without a container engine: nothing here builds or runs the image."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KNOWN = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "HEALTHCHECK", "CMD"}


def instructions() -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, continuation lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    logical = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    pairs = [line.split(None, 1) for line in logical if line.strip()]
    return [(keyword, rest.strip()) for keyword, rest in pairs]


def test_only_known_instructions_in_an_order_that_caches():
    keywords = [keyword for keyword, _ in instructions()]
    assert set(keywords) <= KNOWN
    assert keywords[:2] == ["ARG", "FROM"]
    copies = [rest.split()[0] for keyword, rest in instructions() if keyword == "COPY"]
    assert copies[0] == "pyproject.toml"  # dependencies are installed before the sources arrive
    assert copies.index("mtp_megatron") > copies.index("pyproject.toml")


def test_the_base_image_is_a_build_argument():
    rest = dict(instructions()[:2])
    name, default = rest["ARG"].split("=")
    assert rest["FROM"] == f"nvcr.io/nvidia/pytorch:${{{name}}}"
    assert re.fullmatch(r"\d\d\.\d\d-py3", default)


def test_every_copied_path_exists_and_reaches_the_builder():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    sources = {source for keyword, rest in instructions() if keyword == "COPY" for source in rest.split()[:-1]}
    assert sources == kept
    for source in sources:
        assert (ROOT / source).exists(), source
    assert any(fnmatch.fnmatch("x/__pycache__", pattern) for pattern in ignored[1:])


def test_the_requirements_are_those_of_pyproject():
    """Runs the image's own command that derives them."""
    run = next(rest for keyword, rest in instructions() if keyword == "RUN" and "tomllib" in rest)
    words = shlex.split(run)
    code = next(word for word in words if "tomllib" in word)
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert out.split("\n")[:-1] == project["dependencies"] + project["optional-dependencies"]["report"]
    pins = next(word for word in words if "importlib.metadata" in word)
    out = subprocess.run([sys.executable, "-c", pins], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"torch==\d+\.\d+\.\S+\n", out)


def test_shell_commands_parse():
    for keyword, rest in instructions():
        if keyword == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest], capture_output=True).returncode == 0, rest


def test_it_ends_as_an_ordinary_user():
    users = [rest for keyword, rest in instructions() if keyword == "USER"]
    assert users == ["mtp"]
    after = [keyword for keyword, _ in instructions()]
    assert "RUN" not in after[after.index("USER") :]


def test_the_health_check_is_a_module_of_the_package():
    rest = next(rest for keyword, rest in instructions() if keyword == "HEALTHCHECK")
    module = re.search(r'"-m", "([\w.]+)"', rest).group(1)
    assert importlib.util.find_spec(module) is not None
    assert importlib.util.find_spec(f"{module}.__main__") is not None


def test_the_default_command_is_a_console_script():
    rest = next(rest for keyword, rest in instructions() if keyword == "CMD")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert rest.split('"')[1] in scripts


@pytest.mark.parametrize("path", ["Dockerfile", "pyproject.toml", *sorted(p.name for p in (ROOT / "tools").glob("c*"))])
def test_nothing_installs_the_wrong_apex(path):
    """PyPI's `apex` is another project than NVIDIA's."""
    text = (ROOT / path if (ROOT / path).exists() else ROOT / "tools" / path).read_text()
    assert not re.search(r"""(^|["'\s])apex(["'\s=<>~\[]|$)""", text, re.MULTILINE)
