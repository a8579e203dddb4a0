"""`python -m mtp_megatron.compat [--verbose] [--smoke]`: print the report; exit status 2 where nothing can run."""

from __future__ import annotations

import argparse
import os

from mtp_megatron.compat import report

EXIT_UNSUPPORTED = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mtp_megatron.compat", description=report.__doc__)
    parser.add_argument("--verbose", action="store_true", help="list every stand-in and repair with its reason")
    parser.add_argument("--smoke", action="store_true", help="train one step of a very small model as well")
    args = parser.parse_args()
    print("\n".join(report.lines(args.verbose)))
    if report.problems():
        return EXIT_UNSUPPORTED
    return _smoke() if args.smoke else 0


def _smoke() -> int:
    """The only step up from this room: a command is no import."""
    from mtp_megatron.errors import MTPError
    from mtp_megatron.training.smoke import smoke

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # a job's, where this is called in its environment
        os.environ.pop(name, None)
    print("smoke test")
    try:
        print(f"  {smoke()}")
    except MTPError as error:
        print(f"  failed: {error}")
        return EXIT_UNSUPPORTED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
