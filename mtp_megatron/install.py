"""The command that installs this package: it is on no package index, so messages name a checkout of its repository."""

from __future__ import annotations

CHECKOUT = "PATH_TO_CHECKOUT"
EXPLANATION = f"{CHECKOUT}: a checkout of mtp_megatron's repository"


def install_command(extra: str | None = None, *, no_deps: bool = False) -> str:
    """The command for a shell, to be completed with the path of a checkout.

    Args:
        extra: a name under ``project.optional-dependencies`` in pyproject.toml.
        no_deps: leave the environment's other packages as they are, for one that is not this package's own.
    """
    what = CHECKOUT if extra is None else f"'{CHECKOUT}[{extra}]'"
    return " ".join(["pip install", *(["--no-deps"] if no_deps else []), what])
