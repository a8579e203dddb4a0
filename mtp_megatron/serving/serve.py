"""Starts an engine's OpenAI-compatible server on a bundle."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from mtp_megatron.checkpoint.bundle_manifest import MANIFEST
from mtp_megatron.checkpoint.hf_reader import read_json
from mtp_megatron.errors import CheckpointError, ConfigError
from mtp_megatron.serving.drafts import EAGLE3_FOLDER, MEDUSA_FOLDER, drafts_in
from mtp_megatron.serving.engine import engine_environment
from mtp_megatron.serving.engine_command import vllm_arguments
from mtp_megatron.signals import caught_signals

_STOP_SECONDS = 30.0


def choose_draft(bundle: Path, draft: str, heads: int | None) -> tuple[str | None, int]:
    """The draft's folder and its number of speculative tokens.

    Args:
        bundle: a serving bundle.
        draft: a folder's name, ``"auto"`` or ``"none"``.
        heads: heads to decode with, head 1 included; None: all that the draft has.

    Raises:
        CheckpointError: not a bundle, or the draft's configuration is damaged.
        ConfigError: the bundle has no such draft, or the draft not so many heads.
    """
    present = drafts_in(bundle)
    if not (bundle / MANIFEST).is_file() or not present:
        raise CheckpointError(f"{bundle}: not a serving bundle. Make one with `mtp-megatron convert --to bundle`.")
    if draft == "none" or heads == 1:
        return None, 0
    name = present[0] if draft == "auto" else draft
    if name not in present:
        raise ConfigError("--draft", draft, f"the bundle has {', '.join(present)}", "Choose one of these.")
    config = read_json(bundle / name / "config.json")
    # An EAGLE-3 draft of one head that is asked for more would read its own output, for which it was not trained.
    most = 1 + {EAGLE3_FOLDER: 1, MEDUSA_FOLDER: config.get("num_heads", 0)}.get(name, config.get("num_mtp_heads", 0))
    least = most if name == MEDUSA_FOLDER else 2  # vLLM's Medusa drafts with all of its heads or not at all
    if heads is not None and not least <= heads <= most:
        raise ConfigError("--heads", heads, f"{name} decodes with {least} to {most}", "Choose a number among these.")
    return name, (heads or most) - 1


def server_command(
    python: str, bundle: Path, draft: str | None, tokens: int, *, host: str, port: int, extra: Sequence[str] = ()
) -> list[str]:
    """The command line of vLLM's server."""
    return [python, *vllm_arguments(bundle.absolute(), draft, tokens, host=host, port=port, extra=extra)]


def run_server(command: Sequence[str]) -> int:
    """Run a server in the foreground until it ends; SIGINT and SIGTERM are passed on, and it is waited for.

    So is the SIGHUP of a closed terminal, as SIGTERM: a server in a session of its own does not get it. Under nohup it
    stays ignored.
    """
    server = subprocess.Popen(command, env=engine_environment(), start_new_session=True)
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        server.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    caught = [number for number in caught_signals() if number != signal.SIGUSR1]
    previous = {number: signal.signal(number, stop) for number in caught}
    try:
        status = server.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if server.poll() is None:
            stop_server(server)
    return 0 if asked else status


def stop_server(server: subprocess.Popen[Any]) -> None:
    """Ask a server to end, wait, and end it by force if it does not; its own processes end with it."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(_STOP_SECONDS)
        return
    server.kill()
    server.wait()
