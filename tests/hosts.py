"""Two hosts on one machine: network namespaces joined by a veth pair, each with an address and a host name of its own.

They share the file system, as the hosts of a cluster share the folder of a run. Needs root and iproute2. Names carry
this process's number; what an earlier process that died left behind is removed first.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PREFIX = "mtp-host"
NETS = Path("/etc/netns")  # `ip netns exec` mounts the files of NETS/name over those of /etc


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    address: str
    interface: str

    def command(self, *words: str) -> list[str]:
        """What runs ``words`` on this host."""
        rename = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, *rename, *words]

    def start(self, words: Sequence[str], log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start a command in the background; what it says is appended to ``log``."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(*words), stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**env}
            )

    def processes(self) -> list[psutil.Process]:
        """Every process on this host."""
        numbers = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout
        found = []
        for number in numbers.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(number)))
        return found

    def ranks(self) -> list[psutil.Process]:
        """Its training processes."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = process.cmdline()
                if "mtp_megatron.train" in words and "torch.distributed.run" not in words:
                    found.append(process)
        return found

    def power_off(self) -> None:
        """End everything on it at once, without a word."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=10)


def why_not() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    if os.geteuid() != 0:
        return "two hosts need network namespaces, and those need root"
    missing = [tool for tool in ("ip", "unshare", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"two hosts need {', '.join(missing)} (Debian: iproute2, util-linux, hostname)"
    probe = f"{PREFIX}-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return None if made.returncode == 0 else f"no network namespaces on this machine: {made.stderr.strip()}"


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make them, and remove them whatever happens; skips the test where they cannot be."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    _remove_leftovers()
    number = os.getpid()
    hosts = tuple(
        Host(f"{PREFIX}-{letter}-{number}", f"10.213.7.{index}", f"mtp{letter}{number}")
        for index, letter in enumerate("ab", start=1)
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            (NETS / host.name).mkdir(parents=True)
            (NETS / host.name / "hosts").write_text(
                "127.0.0.1 localhost\n" + "".join(f"{other.address} {other.name}\n" for other in hosts)
            )
        one, other = hosts
        _ip("link", "add", one.interface, "netns", one.name, "type", "veth",
            "peer", "name", other.interface, "netns", other.name)  # fmt: skip
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
            _ip("-n", host.name, "link", "set", host.interface, "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield one, other
    finally:
        for host in hosts:
            _remove(host.name)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _names() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line]


def _remove(name: str) -> None:
    """A namespace with its processes, files and veth ends (those end with it)."""
    if name in _names():
        Host(name, "", "").power_off()
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    shutil.rmtree(NETS / name, ignore_errors=True)


def _remove_leftovers() -> None:
    for name in _names():
        match = re.fullmatch(rf"{PREFIX}-[ab]-(\d+)", name)
        if match and not psutil.pid_exists(int(match.group(1))):
            _remove(name)
