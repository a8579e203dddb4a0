"""What `mtp-megatron serve` does with signals, in this process: a stand-in takes the server's place."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from mtp_megatron.serving.serve import run_server


class Server:
    """Runs ``meanwhile`` while it is waited for, and keeps the signals that it is sent."""

    def __init__(self, meanwhile) -> None:
        self.meanwhile, self.sent = meanwhile, []

    def __call__(self, command, **options):
        return self

    def wait(self) -> int:
        self.meanwhile()
        return -15

    def poll(self) -> int:
        return -15

    def send_signal(self, number: int) -> None:
        self.sent.append(number)


@pytest.fixture(autouse=True)
def hangup():
    """The disposition of SIGHUP is put back."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


def serve(monkeypatch, meanwhile) -> tuple[int, list[int]]:
    server = Server(meanwhile)
    monkeypatch.setattr(subprocess, "Popen", server)
    return run_server(["server"]), server.sent


def test_a_closed_terminal_ends_the_server(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def close() -> None:
        assert callable(signal.getsignal(signal.SIGHUP)), "it would end this process, and leave the server"
        os.kill(os.getpid(), signal.SIGHUP)

    assert serve(monkeypatch, close) == (0, [signal.SIGTERM])
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_under_nohup_it_goes_on(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert serve(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP)) == (-15, [])
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
