"""`python -m mtp_megatron.compat [--verbose] [--smoke] [--require-gpu]`: print the report; exit status 2 where nothing
can run."""

from __future__ import annotations

import argparse
import os

from mtp_megatron.compat import report

EXIT_UNSUPPORTED = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mtp_megatron.compat", description=report.__doc__)
    parser.add_argument("--verbose", action="store_true", help="list every stand-in and repair with its reason")
    parser.add_argument("--smoke", action="store_true", help="train one step of a very small model as well")
    parser.add_argument("--require-gpu", action="store_true", help="fail where there is no GPU that torch can use")
    args = parser.parse_args()
    print("\n".join(report.lines(args.verbose)))
    if report.problems():
        return EXIT_UNSUPPORTED
    if args.require_gpu and (missing := _no_gpu()) is not None:
        print(f"error: --require-gpu: {missing}")
        return EXIT_UNSUPPORTED
    return _smoke() if args.smoke else 0


def _no_gpu() -> str | None:
    import torch

    if torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build. Install one for CUDA."
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} leaves no GPU. Unset it, or name one."
    return "there is no CUDA device here. Start the container with its GPUs (docker run --gpus all)."


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
