"""Training on two hosts with examples/torchrun: a rank is killed, a host is lost, the job is asked to stop;
hosts that do not share a folder."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.harness import run_world
from tests.hosts import Host, two_hosts
from tests.training_runs import metrics, tiny_tree, train_body

ROOT = Path(__file__).parents[2]
STEPS = 30
LIMIT = 200.0  # seconds that any wait may take; a busy machine needs many times what an idle one does
PORT = 29400


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


@pytest.fixture(autouse=True)
def _nothing_is_left_running(hosts: tuple[Host, Host]) -> Iterator[None]:
    yield
    for host in hosts:
        host.power_off()


def settings(data: Path, run: Path, **overrides: Any) -> dict[str, Any]:
    return tiny_tree(data, run, **{"parallel__pipeline": 2, "train__steps": STEPS, **overrides})


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to, on one host."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_world(train_body, 2, settings(data, run, train__save_interval=0))
    return run


def environment(host: Host, **more: str) -> dict[str, str]:
    """One rank on each host; a host that died is noticed after 12 s instead of 15."""
    return {
        **os.environ,
        "PYTHON": sys.executable,
        "NPROC": "1",
        "MAX_RESTARTS": "3",
        "SAVE_SECONDS": "30",
        "RDZV_CONF": "keep_alive_interval=2,keep_alive_max_attempt=6",
        "GLOO_SOCKET_IFNAME": host.interface,
        "CUDA_VISIBLE_DEVICES": "",
        **more,
    }


def node(host: Host, head: Host, recipe: Path, log: Path, *, before: str = ":", **more: str) -> subprocess.Popen[bytes]:
    """examples/torchrun/node.sh on one of two hosts, after another command on it."""
    env = environment(host, NNODES="2", HEAD=f"{head.name}:{PORT}", JOB_ID=recipe.parent.name, **more)
    script = [str(ROOT / "examples/torchrun/node.sh"), str(recipe)]
    return host.start(["sh", "-c", f'{before} && exec bash "$@"', "sh", *script], log, env)


def written(tree: dict[str, Any], folder: Path) -> Path:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree))
    return recipe


def wait_for(condition: Callable[[], Any], log: Path) -> Any:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError(f"nothing happened in {LIMIT:g} s:\n{log.read_text()}")


def reached(run: Path, step: int) -> Callable[[], bool]:
    file = run / "metrics.jsonl"
    return lambda: file.is_file() and file.read_text().count('"kind": "train"') >= step


def ended(agents: list[subprocess.Popen[bytes]], log: Path) -> list[int]:
    deadline = time.monotonic() + LIMIT
    for agent in agents:
        try:
            agent.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"a node did not end in {LIMIT:g} s:\n{log.read_text()}") from None
    return [agent.returncode for agent in agents]


def test_a_killed_rank_restarts_the_job_from_its_checkpoint(
    hosts: tuple[Host, Host], data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    recipe = written(settings(data, run), tmp_path)
    agents = [node(host, hosts[0], recipe, log) for host in hosts]
    wait_for(reached(run, 6), log)
    first = [process for host in hosts for process in host.ranks()]
    assert len(first) == 2, "one rank on each host"
    (victim,) = hosts[1].ranks()
    victim.suspend()  # the other rank gets into a step and waits there
    time.sleep(0.3)
    before = max(metrics(run))
    assert before < STEPS
    victim.send_signal(signal.SIGKILL)
    assert ended(agents, log) == [0, 0], log.read_text()
    said = log.read_text()
    assert said.count("initial weights drawn") == 1
    assert said.count("continuing from") == 1, said
    assert not any(process.is_running() for process in first)
    assert metrics(run) == metrics(undisturbed)
    assert metrics(run, "valid") == metrics(undisturbed, "valid")


def test_a_lost_host_that_comes_back_joins_again(
    hosts: tuple[Host, Host], data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    recipe = written(settings(data, run), tmp_path)
    keeper, lost = hosts
    agents = [node(host, keeper, recipe, log) for host in hosts]
    wait_for(reached(run, 6), log)
    lost.power_off()  # torchrun and its rank
    assert max(metrics(run)) < STEPS
    assert agents[0].poll() is None, log.read_text()
    agents[1].wait(10)
    agents[1] = node(lost, keeper, recipe, log)
    assert ended(agents, log) == [0, 0], log.read_text()
    assert "continuing from" in log.read_text()
    assert metrics(run) == metrics(undisturbed)


def test_a_run_folder_that_one_host_does_not_share_is_named(
    hosts: tuple[Host, Host], data: Path, tmp_path: Path
) -> None:
    """The second host has a file system of its own where the first one has the run's folder."""
    mount, log = tmp_path / "mount", tmp_path / "log"
    mount.mkdir()
    recipe = written(settings(data, mount / "run", train__timeout_minutes=0.4), tmp_path)
    agents = [node(hosts[0], hosts[0], recipe, log, MAX_RESTARTS="0")]
    agents.append(node(hosts[1], hosts[0], recipe, log, before=f"mount -t tmpfs none {mount}", MAX_RESTARTS="0"))
    assert ended(agents, log) == [1, 1], log.read_text()
    said = log.read_text()
    errors = [line for line in said.splitlines() if line.startswith("error: run.path=")]
    assert len(errors) == 2, said  # each host says it
    assert f"{hosts[1].name} cannot see what {hosts[0].name} wrote in it" in errors[0]
    assert "parameters:" not in said, "a model was built"


def test_each_host_may_have_the_data_on_a_disk_of_its_own(hosts: tuple[Host, Host], data: Path, tmp_path: Path) -> None:
    """Two copies under one name; the second host's index is its own, too."""
    one, other, log = tmp_path / "data", tmp_path / "other", tmp_path / "log"
    for copy in (one, other):
        shutil.copytree(data, copy, ignore=shutil.ignore_patterns("cache"))
    recipe = written(settings(one, tmp_path / "run", train__steps=3), tmp_path)
    agents = [node(hosts[0], hosts[0], recipe, log, MAX_RESTARTS="0")]
    agents.append(node(hosts[1], hosts[0], recipe, log, before=f"mount --bind {other} {one}", MAX_RESTARTS="0"))
    assert ended(agents, log) == [0, 0], log.read_text()
    assert sorted(metrics(tmp_path / "run")) == [1, 2, 3]
    indices = [[path.name for path in (copy / "cache").iterdir()] for copy in (one, other)]
    assert indices[0] == indices[1]
    assert len(indices[0]) == 1


def test_ssh_starts_all_hosts_and_a_request_to_stop_saves(
    hosts: tuple[Host, Host], data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    recipe = written(settings(data, run, train__save_interval=0), tmp_path)
    ssh = tmp_path / "bin" / "ssh"  # what ssh does, without a server: a shell on that host
    ssh.parent.mkdir()
    shells = {host.name: shlex.join(["env", f"GLOO_SOCKET_IFNAME={host.interface}", *host.command("sh", "-c")])
              for host in hosts}  # fmt: skip
    cases = "".join(f'{name}) exec {shell} "$2" ;;\n' for name, shell in shells.items())
    ssh.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}esac\nexit 255\n')
    ssh.chmod(0o755)
    command = ["bash", str(ROOT / "examples/torchrun/ssh.sh"), ",".join(host.name for host in hosts), str(recipe)]
    env = {**environment(hosts[0], FORWARD="PYTHON NPROC SAVE_SECONDS"), "PATH": f"{ssh.parent}:{os.environ['PATH']}"}
    env.pop("GLOO_SOCKET_IFNAME")
    with log.open("ab") as out:
        launcher = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)
    try:
        wait_for(reached(run, 3), log)
        launcher.send_signal(signal.SIGTERM)
        assert ended([launcher], log) != [0]  # torchrun's own status after a signal
    finally:
        launcher.kill()
    said = log.read_text()
    assert f"{hosts[0].name}: " in said
    assert "asked to stop: saved step" in said, said
    stopped = max(metrics(run))
    assert (run / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == str(stopped)
    expected = metrics(undisturbed)
    assert metrics(run) == {step: expected[step] for step in range(1, stopped + 1)}
