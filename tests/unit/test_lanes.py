"""`tools/test.sh`: which lanes it runs, each test once in each; that a failing one fails the run; and the last line.

Environments and tests are stand-ins here: scripts that print what the real ones would.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mtp_megatron.signals import STOP_SIGNALS
from tools import run_groups

ROOT = Path(__file__).parents[2]


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def environment(checkout: Path, name: str, version: str, outcome: str, also: str = "") -> None:
    """An environment whose pytest prints `outcome`, and fails if that says so."""
    binaries = checkout / name / "bin"
    executable(
        binaries / "python",
        f'if [ "$1" = -c ]; then echo "{version}"; exit; fi\n'
        f'if [ "$1" = tools/run_groups.py ]; then exec "{sys.executable}" "$@"; fi\n'
        f'shift 2; echo "{name} runs: $*"; {also}\necho "{outcome}"\ncase "{outcome}" in *failed*) exit 1;; esac',
    )
    for tool in ("ruff", "mypy"):
        executable(binaries / tool, "exit 0")
    (binaries / "activate").write_text(f'PATH="{binaries}:$PATH"\n')


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with both environments, a Python 3.12 among pyenv's versions and a set-up that notes its calls."""
    (tmp_path / "tools").mkdir()
    for script in ("test.sh", "run_groups.py", "common.sh"):
        shutil.copy(ROOT / "tools" / script, tmp_path / "tools")
    executable(tmp_path / "tools/setup.sh", 'echo "${MTP_VENV:-.venv} ${PYTHON:-}" >>"$(dirname "$0")/calls"')
    executable(tmp_path / "tools/setup_serving.sh", 'echo serving >>"$(dirname "$0")/calls"')
    executable(tmp_path / "pyenv/versions/3.12.1/bin/python", 'echo "3 12"')
    environment(tmp_path, ".venv", "3 11", "7 passed in 2.00s")
    environment(tmp_path, ".venv-py312", "3 12", "5 passed in 1.00s")
    return tmp_path


def variables(checkout: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key[:4] != "MTP_" and key != "PYENV_ROOT"}
    return {**kept, "MTP_SERVING": "0", "PATH": "/usr/bin:/bin", "PYENV_ROOT": str(checkout / "pyenv")}


def run(checkout: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "tools/test.sh", *arguments],
        cwd=checkout,
        env={**variables(checkout), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(result: subprocess.CompletedProcess[str]) -> list[str]:
    return result.stdout.strip().splitlines()


def chosen(result: subprocess.CompletedProcess[str], environment: str) -> list[list[str]]:
    """Arguments of every pytest that ran in an environment, without the options that all have."""
    head = f"{environment} runs: -rs -p no:cacheprovider "
    return [line.removeprefix(head).split() for line in lines(result) if line.startswith(head)]


def test_a_whole_run_has_both_lanes_and_ends_with_the_sum_of_all_groups(checkout: Path) -> None:
    result = run(checkout)
    assert result.returncode == 0, result.stdout
    assert (checkout / "tools/calls").read_text().split() == [
        ".venv",
        ".venv-py312",
        str(checkout / "pyenv/versions/3.12.1/bin/python"),
    ]
    counts = [len(chosen(result, name)) for name in (".venv", ".venv-py312")]
    assert min(counts) > 0
    assert lines(result)[-2] == "== all groups"
    assert lines(result)[-1].startswith(f"{7 * counts[0] + 5 * counts[1]} passed in ")


def collected(arguments: list[str]) -> list[str]:
    """Files and tests that pytest takes from a group's arguments."""
    taken: set[str] = set()
    for argument in arguments:
        if argument.startswith("--deselect="):  # of single tests, in a file of which the others run
            continue
        path, _, name = argument.partition("=")[2 if argument.startswith("--") else 0].partition("::")
        assert (ROOT / path).exists(), f"{argument}: there is no such test"
        assert f"def {name}" in (ROOT / path).read_text() if name else True
        inside = (ROOT / path).rglob("test_*.py") if (ROOT / path).is_dir() else [ROOT / path]
        files = {f"{file.relative_to(ROOT)}{'::' * bool(name)}{name}" for file in inside}
        taken = taken - files if argument.startswith("--") else taken | files
    return sorted(taken)


def test_each_lane_runs_each_of_its_tests_once(checkout: Path) -> None:
    result = run(checkout)
    main = sorted(file for group in chosen(result, ".venv") for file in collected(group))
    assert main == sorted(str(file.relative_to(ROOT)) for file in (ROOT / "tests").rglob("test_*.py"))
    second = [file for group in chosen(result, ".venv-py312") for file in collected(group)]
    assert len(second) == len(set(second))
    left_out = {name for name in run_groups.LEFT_OUT["py312"] if "::" not in name}
    assert {file for file in main if file.startswith("tests/distributed/")} - set(second) == left_out < set(main)


def test_single_tests_are_left_out_of_the_file_that_another_group_runs(checkout: Path) -> None:
    single = {name for name in run_groups.LEFT_OUT["py312"] if "::" in name}
    assert single
    groups = [group for group in chosen(run(checkout), ".venv-py312") if any("--deselect" in word for word in group)]
    (group,) = groups
    assert {f"--deselect={name}" for name in single} == {word for word in group if word.startswith("--deselect")}
    for name in single:
        file, _, test = name.partition("::")
        assert file in collected(group)
        assert f"def {test}(" in (ROOT / file).read_text()


def test_arguments_go_to_the_main_lane_alone(checkout: Path) -> None:
    result = run(checkout, "tests/unit", "-k", "loss")
    assert lines(result)[-2:] == [".venv runs: -rs tests/unit -k loss", "7 passed in 2.00s"]
    assert "py312" not in result.stdout
    alone = run(checkout, "tests/unit", MTP_LANES="py312")
    assert lines(alone)[-2:] == [".venv-py312 runs: -rs tests/unit", "5 passed in 1.00s"]
    both = run(checkout, "tests/unit", MTP_LANES="main py312")
    assert chosen(both, ".venv") == chosen(both, ".venv-py312") == [["tests/unit"]]
    assert lines(both)[-1].startswith("12 passed in ")


def test_the_main_lane_may_live_elsewhere(checkout: Path) -> None:
    (checkout / ".venv").rename(checkout / "elsewhere")
    environment(checkout, "elsewhere", "3 11", "7 passed in 2.00s")
    result = run(checkout, "tests/unit", MTP_VENV="elsewhere")
    assert lines(result)[-2:] == ["elsewhere runs: -rs tests/unit", "7 passed in 2.00s"]
    assert run(checkout, MTP_VENV=str(checkout / "elsewhere")).returncode == 0
    assert (checkout / "tools/calls").read_text().split()[:3] == [
        "elsewhere",
        str(checkout / "elsewhere"),
        ".venv-py312",
    ]


@pytest.mark.parametrize("broken", [".venv", ".venv-py312"])
def test_a_failure_in_either_lane_fails_the_run_and_is_named_at_the_end(checkout: Path, broken: str) -> None:
    outcome = (
        "=== 1 failed, 4 passed, 2 skipped, 3 deselected, 9 warnings in 1.25s (0:00:01) ===\n2 children said goodbye"
    )
    environment(checkout, broken, "3 11" if broken == ".venv" else "3 12", outcome, also='echo "FAILED tests/x.py::y"')
    result = run(checkout)
    assert result.returncode == 1
    main, second = (len(chosen(result, name)) for name in (".venv", ".venv-py312"))
    bad, passed = (main, 4 * main + 5 * second) if broken == ".venv" else (second, 7 * main + 4 * second)
    assert lines(result)[-bad - 2 : -1] == ["== all groups", *["FAILED tests/x.py::y"] * bad]
    assert lines(result)[-1].startswith(f"{bad} failed, {passed} passed, {2 * bad} skipped in ")
    assert run(checkout, "tests/unit", MTP_LANES="main" if broken == ".venv" else "py312").returncode == 1


def test_a_pytest_that_dies_without_a_word_is_an_error(checkout: Path) -> None:
    environment(checkout, ".venv-py312", "3 12", "5 passed in 1.00s", also="kill -9 $$")
    result = run(checkout)
    assert result.returncode == 1
    dead = len(chosen(result, ".venv-py312"))
    assert "ERROR lane py312, rest: pytest ended with status -9" in lines(result)[-dead - 1 : -1]
    assert lines(result)[-1].startswith(f"{7 * len(chosen(result, '.venv'))} passed, {dead} error in ")


WAITS = 'trap "echo stopped; exit 2" INT; echo $$ >>tools/running; sleep 60 & wait'


@pytest.mark.usefixtures("without_nohup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1], ids=str)
def test_a_run_that_is_stopped_leaves_nothing_running(checkout: Path, number: signal.Signals) -> None:
    """SIGTERM to the script alone; Ctrl-C, and a terminal that is closed, reach every process of the terminal."""
    for name, version in ((".venv", "3 11"), (".venv-py312", "3 12")):
        environment(checkout, name, version, "7 passed in 2.00s", also=WAITS)
    process = subprocess.Popen(
        ["bash", "tools/test.sh"],
        cwd=checkout,
        env=variables(checkout),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    running = checkout / "tools/running"
    deadline = time.monotonic() + 60
    while not running.exists() or len(running.read_text().split()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1, output
    assert not any(psutil.pid_exists(int(pid)) for pid in running.read_text().split())
    assert "ERROR interrupted before the end of lane main" in output


def test_a_stop_while_a_group_is_started_reaches_that_group_too(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the terminal sends has come before that process was there. No further group is started."""
    start = run_groups.Group.start

    def stopped_at_the_second(group: Any, environment: Path, logs: Path) -> None:
        if group.name == "e2e":
            os.kill(os.getpid(), signal.SIGINT)
        start(group, environment, logs)

    monkeypatch.setattr(run_groups.Group, "start", stopped_at_the_second)
    monkeypatch.setattr(run_groups, "AT_ONCE", 3)
    monkeypatch.chdir(checkout)
    environment(checkout, ".venv", "3 11", "7 passed in 2.00s", also=WAITS)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    began = time.monotonic()
    try:
        status = run_groups.run(run_groups.groups(["main"]), {"main": checkout / ".venv"}, checkout)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert status == 1
    assert time.monotonic() - began < 50  # of the 60 that a group may take to end before it is killed
    output = capsys.readouterr().out.splitlines()
    assert [line for line in output if line.endswith("started")] == [
        "== lane main, serving: started",
        "== lane main, e2e: started",
    ]


def test_without_python_312_it_says_so_in_one_line_and_goes_on(checkout: Path) -> None:
    shutil.rmtree(checkout / "pyenv")
    if shutil.which("python3.12", path="/usr/bin:/bin"):
        pytest.skip("this machine has a Python 3.12 in /usr/bin")
    result = run(checkout)
    assert result.returncode == 0
    assert len(re.findall("lane py312: left out, no Python 3.12 found", result.stdout)) == 1
    assert lines(result)[-1].startswith(f"{7 * len(chosen(result, '.venv'))} passed in ")
    alone = run(checkout, MTP_LANES="py312")
    assert alone.returncode == 2
    assert "no Python 3.12 found" in alone.stdout


def test_where_the_main_lane_is_312_there_is_no_second_one(checkout: Path) -> None:
    environment(checkout, ".venv", "3 12", "7 passed in 2.00s")
    result = run(checkout)
    assert "lane py312: left out, the main lane has Python 3.12 already" in result.stdout
    assert ".venv-py312 runs" not in result.stdout
    assert result.returncode == 0


def test_an_unknown_lane_is_refused(checkout: Path) -> None:
    result = run(checkout, MTP_LANES="main py313")
    assert result.returncode == 2
    assert "MTP_LANES='main py313' may name main and py312" in result.stdout


@pytest.mark.skipif(os.uname().sysname != "Linux" or os.uname().machine != "x86_64", reason="vLLM has no wheel here")
@pytest.mark.parametrize(
    ("arguments", "wanted"), [((), True), (("tests/serving",), True), (("tests/unit",), False)], ids=str
)
def test_vllm_is_set_up_where_its_tests_may_run(checkout: Path, arguments: tuple[str, ...], wanted: bool) -> None:
    assert run(checkout, *arguments, MTP_SERVING="1").returncode == 0
    assert ("serving" in (checkout / "tools/calls").read_text().split()) == wanted
