"""``mtp-megatron serve``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

SUMMARY = "serve a bundle with vLLM, its heads drafting"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument("export", metavar="EXPORT", help="folder that `mtp-megatron convert --to bundle` wrote")
    parser.add_argument(
        "--draft",
        choices=("auto", "mtp-heads", "eagle3-head2", "medusa", "none"),
        default="auto",
        help="which of the bundle's drafts to use (default: mtp-heads, or medusa where the bundle has that)",
    )
    parser.add_argument("--heads", type=int, metavar="K", help="heads to decode with, head 1 included (default: all)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--vllm-python",
        metavar="PATH",
        help="interpreter of an environment with vLLM (default: MTP_VLLM_PYTHON, else this one if it has vLLM)",
    )
    parser.add_argument("--print", action="store_true", dest="print_only", help="print the command and do not run it")
    parser.add_argument("engine", nargs="*", metavar="-- ARGS", help="everything after -- goes to vLLM as it is")


def run(args: argparse.Namespace) -> int:
    """Print the engine's command, run it in the foreground, and return its status."""
    from mtp_megatron.errors import ConfigError
    from mtp_megatron.serving.engine import CPU_DEFAULTS, find_python
    from mtp_megatron.serving.serve import choose_draft, run_server, server_command

    draft, tokens = choose_draft(Path(args.export), args.draft, args.heads)
    python = find_python(args.vllm_python)
    if python is None and not args.print_only:
        raise ConfigError(
            "--vllm-python",
            None,
            "no interpreter with vLLM is known",
            "Give one, set MTP_VLLM_PYTHON, or see the command with --print",
        )
    command = server_command(
        python or "python", Path(args.export), draft, tokens, host=args.host, port=args.port, extra=args.engine
    )
    settings = [f"{key}={value}" for key, value in CPU_DEFAULTS.items() if key not in os.environ]
    print(shlex.join([*settings, *command]), flush=True)
    if args.print_only:
        return 0
    if draft is None:
        print("note: no draft, so no speculation", file=sys.stderr)
    return run_server(command)
