"""Requests to stop: recorded while training, and the process's own handlers afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from mtp_megatron.training.signals import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_recorded_and_the_former_handler_returns(number: signal.Signals) -> None:
    received = []
    former = signal.signal(number, lambda *_: received.append("former"))
    try:
        with stop_on_signal() as stop:
            assert not stop
            os.kill(os.getpid(), number)
            assert stop
            assert stop.signal == number
            assert not received
        os.kill(os.getpid(), number)
        assert received == ["former"]
    finally:
        signal.signal(number, former)
