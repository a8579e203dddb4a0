"""Optional packages: what is installed, is it the right one, can this machine use it.

Without a CUDA device nothing is imported. With one, those that need it are imported once: only that tells whether they
fit this torch.
"""

from __future__ import annotations

import enum
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mtp_megatron.compat.extensions import why_none_importable
from mtp_megatron.compat.versions import EnvironmentUnsupported, installed_version
from mtp_megatron.install import EXPLANATION, install_command

_TOOLKIT = "/usr/local/cuda"
_BUILT_HERE = "--no-build-isolation"  # pip's option: compile against the torch of this environment
# Megatron imports these where it can and then prefers them to torch; their kernels need a GPU.
GPU_ONLY = ("transformer_engine", "apex", "amp_C")
# Of Apex, what megatron-core imports.
_APEX = ("amp_C", "apex.multi_tensor_apply", "apex.normalization", "apex.optimizers")


class State(enum.Enum):
    """Whether a package can be used."""

    MISSING = "missing"
    USABLE = "usable"
    IDLE = "installed, not used"
    WRONG = "wrong"


@dataclass(frozen=True)
class Package:
    """What was found of one optional package; `detail` says why it is in that state and what to do about it."""

    name: str
    state: State
    version: str = ""
    detail: str = ""

    def __str__(self) -> str:
        return ", ".join(part for part in (self.version, self.state.value, self.detail) if part)


def locate(name: str) -> ModuleSpec | None:
    """Spec of a top-level module as an import would find it, without importing it and even while it is hidden."""
    for finder in sys.meta_path:
        spec = finder.find_spec(name, None)
        if spec is not None:
            return spec
    return None


def _has_parts(spec: ModuleSpec, *parts: str) -> bool:
    """Whether a package's folders hold all of these subpackages."""
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return all(any((folder / part).is_dir() for folder in folders) for part in parts)


def _version(distribution: str) -> str:
    found = installed_version(distribution)
    return "" if found is None else str(found)


def _needs_gpu(name: str, version: str, cuda: bool, modules: Sequence[str], remedy: str) -> Package:
    if not cuda:
        return Package(name, State.IDLE, version, "no CUDA device")
    problem = why_none_importable(*modules)
    if problem is None:
        return Package(name, State.USABLE, version)
    import torch  # imported already, to ask

    detail = f"it does not import with torch {torch.__version__} ({problem}); {remedy}"
    return Package(name, State.WRONG, version, detail)


def apex(cuda: bool) -> Package:
    """NVIDIA's Apex. The `apex` of PyPI is another package; that it can be imported breaks Megatron's norms."""
    spec = locate("apex")
    if spec is None:
        return Package("apex", State.MISSING)
    where = (list(spec.submodule_search_locations or ()) or [str(spec.origin)])[0]
    if not _has_parts(spec, "multi_tensor_apply", "normalization", "optimizers"):
        remedy = f"{where} is not NVIDIA's Apex; run: pip uninstall apex"
        return Package("apex", State.WRONG, _version("apex"), remedy)
    if locate("amp_C") is None:
        remedy = f"{where} has no CUDA extensions (amp_C); build it with them, or run: pip uninstall apex"
        return Package("apex", State.WRONG, _version("apex"), remedy)
    remedy = f"build {where} again for this torch, or run: pip uninstall apex"
    return _needs_gpu("apex", _version("apex"), cuda, _APEX, remedy)


def transformer_engine(cuda: bool) -> Package:
    """NVIDIA's Transformer Engine."""
    spec = locate("transformer_engine")
    if spec is None:
        return Package("transformer-engine", State.MISSING)
    if not _has_parts(spec, "pytorch"):
        remedy = f"its PyTorch part is missing; run: {install_transformer_engine()}"
        return Package("transformer-engine", State.WRONG, _version("transformer-engine"), remedy)
    built = installed_version("transformer-engine-torch")  # a package of its own, which pip builds where it installs it
    remedy = "build it again for this torch"
    if built is not None:  # not from pip's cache, where the one for the other torch lies
        remedy += (
            f": pip install {_BUILT_HERE} --no-cache-dir --force-reinstall --no-deps transformer-engine-torch=={built}"
        )
    version = _version("transformer-engine")
    return _needs_gpu("transformer-engine", version, cuda, ("transformer_engine.pytorch",), remedy)


def install_transformer_engine() -> str:
    """The command for a shell, with the versions that the installed megatron-core names.

    Its part for torch is compiled against the torch that the build finds: this environment's, not pip's newest.
    """
    return f'pip install {_BUILT_HERE} "transformer-engine[pytorch]{transformer_engine_pin()}"'


def transformer_engine_pin() -> SpecifierSet:
    """Versions of Transformer Engine that the installed megatron-core names in its metadata; any, if it names none."""
    try:
        lines = metadata.requires("megatron-core") or []
    except metadata.PackageNotFoundError:  # a checkout on the path
        lines = []
    named = (Requirement(line) for line in lines)
    return next((r.specifier for r in named if r.name == "transformer-engine" and str(r.specifier)), SpecifierSet())


def name_cuda_headers() -> None:
    """Tell Transformer Engine of the CUDA headers in pip's wheels, if it would find none.

    It compiles the casts of FP8 when they are first called, and raises where it has no headers. It looks into these
    variables and ``/usr/local/cuda`` (``include_directory`` in its cuda_runtime.cpp); a machine whose only CUDA came
    with torch has neither.
    """
    named = [os.environ.get(name) for name in ("NVTE_CUDA_INCLUDE_DIR", "CUDA_HOME", "CUDA_DIR")]
    header = "cuda_runtime.h"
    for folder in (*named, _TOOLKIT):
        if folder and any((Path(folder) / part / header).is_file() for part in (".", "include")):
            return
    nvidia = locate("nvidia")
    for wheels in (nvidia.submodule_search_locations or ()) if nvidia else ():
        for headers in sorted(Path(wheels).glob(f"cu*/include/{header}")):  # cu13, or cuda_runtime
            os.environ["NVTE_CUDA_INCLUDE_DIR"] = str(headers.parent)
            return


def deepspeed() -> Package:
    """DeepSpeed, which also runs on CPUs."""
    if locate("deepspeed") is None:
        return Package("deepspeed", State.MISSING)
    return Package("deepspeed", State.USABLE, _version("deepspeed"))


_INSTALL_DEEPSPEED = "pip install 'setuptools>=77', then DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"


def require_deepspeed(cuda: bool = True) -> None:
    """Refuse a request for DeepSpeed where it cannot run.

    Args:
        cuda: whether there is a CUDA device; without one DeepSpeed compiles something at its first start.

    Raises:
        EnvironmentUnsupported: it is missing, or the compiler that it needs at run time; says what to install.
    """
    if deepspeed().state is not State.USABLE:
        raise EnvironmentUnsupported(
            "run.deepspeed was given, but DeepSpeed is not installed. Install it: "
            f"{install_command('deepspeed')} ({EXPLANATION}); "
            f"on a machine without a GPU: {_INSTALL_DEEPSPEED}, and a C++ compiler (g++)."
        )
    if not cuda and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise EnvironmentUnsupported(
            "DeepSpeed compiles its communication for CPUs at the first start, and there is no C++ compiler. Install "
            "g++, or name one in CXX."
        )


def require_no_wrong_package(cuda: bool) -> None:
    """Refuse to go on where Megatron would pick up a package that cannot work.

    Raises:
        EnvironmentUnsupported: naming the package, where it lies and how to get rid of it.
    """
    for package in (apex(cuda), transformer_engine(cuda)):
        if package.state is State.WRONG:
            raise EnvironmentUnsupported(
                f"{package.name} {package.version}".rstrip() + f" cannot be used: {package.detail}"
            )


def require_transformer_engine(cuda: bool) -> None:
    """Refuse a request for Transformer Engine's layers where they cannot run.

    Raises:
        EnvironmentUnsupported: it is missing or does not import, or there is no CUDA device.
    """
    package = transformer_engine(cuda)
    if package.state is not State.USABLE:
        command = f": {install_transformer_engine()}" if package.state is State.MISSING else ""
        raise EnvironmentUnsupported(
            f"Transformer Engine was asked for, but it is {package.state.value}"
            + (f" ({package.detail})" if package.detail else "")
            + f". Build the layers without it, or install it on a machine with a CUDA device{command}."
        )
