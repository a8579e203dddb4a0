"""`python -m mtp_megatron.compat [--verbose]`: print the report; exit status 2 where nothing can run."""

from __future__ import annotations

import argparse

from mtp_megatron.compat import report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mtp_megatron.compat", description=report.__doc__)
    parser.add_argument("--verbose", action="store_true", help="list every stand-in and repair with its reason")
    print("\n".join(report.lines(parser.parse_args().verbose)))
    return 2 if report.problems() else 0


if __name__ == "__main__":
    raise SystemExit(main())
