"""Which megatron-core an import would find, and whether this package supports it. Imports no megatron."""

from __future__ import annotations

import importlib.util
import runpy
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mtp_megatron.errors import MTPError

SUPPORTED = SpecifierSet(">=0.16.1,<0.20", prereleases=True)


class EnvironmentUnsupported(MTPError):
    """A package that is missing, or present in a version or variant that cannot work."""


class UnusableGPUs(EnvironmentUnsupported):
    """GPUs that this torch cannot use: all ranks of a node meet the same."""


def installed_version(distribution: str) -> Version | None:
    """Version of an installed distribution; None when it is not installed."""
    try:
        return Version(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


def megatron_core_folder() -> Path | None:
    """Where an import of megatron.core would find it: site-packages or a checkout of Megatron-LM; None if nowhere."""
    try:
        spec = importlib.util.find_spec("megatron.core")  # imports the namespace package `megatron`, not core itself
    except ModuleNotFoundError:
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def megatron_core_version() -> Version | None:
    """Version of the megatron-core that an import would find; None when there is none.

    It is read from `package_info.py`, since a checkout on the path has no package metadata, or that of another one.
    Without its local part: since 0.18 that is the commit that `git rev-parse` finds from the folder upwards, of any
    repository the environment lies in, and hosts of one job may differ in it.
    """
    folder = megatron_core_folder()
    if folder is None:
        return None
    return Version(Version(runpy.run_path(str(folder / "package_info.py"))["__version__"]).public)


def wheel_folder() -> Path | None:
    """`megatron/core` of the installed wheel, where it is of the same minor release as what an import would find."""
    try:
        wheel = metadata.distribution("megatron-core")
    except metadata.PackageNotFoundError:
        return None
    found = megatron_core_version()
    if found is None or found.release[:2] != Version(wheel.version).release[:2]:
        return None
    return Path(str(wheel.locate_file("megatron/core")))


def require_megatron_core() -> Version:
    """Version of megatron-core.

    Raises:
        EnvironmentUnsupported: megatron-core is missing or outside the supported range.
    """
    remedy = f'Install one with: pip install "megatron-core{SUPPORTED}"'
    found = megatron_core_version()
    if found is None:
        raise EnvironmentUnsupported(f"megatron-core is not installed. {remedy}")
    if found not in SUPPORTED:
        raise EnvironmentUnsupported(
            f"megatron-core {found} ({megatron_core_folder()}) is not supported, only {SUPPORTED} is. {remedy}"
        )
    return found


def __getattr__(name: str) -> Any:
    # Computed when asked for, so that the report can be printed where megatron-core is missing.
    if name == "MCORE_VERSION":
        return require_megatron_core()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
