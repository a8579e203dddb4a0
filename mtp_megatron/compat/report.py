"""What this machine offers and what follows from it, as text: printed by `python -m mtp_megatron.compat`."""

from __future__ import annotations

import platform
from collections.abc import Iterable

import torch

from mtp_megatron import __version__
from mtp_megatron.compat import cpu, devices, fallbacks, packages, versions
from mtp_megatron.compat.kernels import FUSIONS
from mtp_megatron.compat.packages import State


def _row(name: str, text: object) -> str:
    return f"  {name:<30}{text}"


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu (no CUDA device), backend gloo"
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    return f"{torch.cuda.device_count()} x {', '.join(names)}, backend {devices.backend()}"


def _megatron() -> str:
    try:
        return f"{versions.require_megatron_core()} in {versions.megatron_core_folder()}"
    except versions.EnvironmentUnsupported as error:
        return str(error)


def _optimizer(cuda: bool) -> str:
    for package in (packages.transformer_engine(cuda), packages.apex(cuda)):
        if package.state is State.USABLE:
            return f"FusedAdam of {package.name}"
    return "Adam of torch, with megatron-core's loading of its state repaired"


def problems() -> list[str]:
    """Everything because of which `compat.prepare()` raises here."""
    checks = (versions.require_megatron_core, lambda: packages.require_no_wrong_package(torch.cuda.is_available()))
    found = []
    for check in checks:
        try:
            check()
        except versions.EnvironmentUnsupported as error:
            found.append(str(error))
    return found


def refusals() -> list[str]:
    """What is refused on this machine, and why."""
    refused = [f"to run at all: {problem}" for problem in problems()]
    if packages.transformer_engine(torch.cuda.is_available()).state is not State.USABLE:
        refused.append("Transformer Engine's layers and FP8: they need Transformer Engine and a CUDA device")
    return refused


def lines(verbose: bool = False) -> Iterable[str]:
    """The report, line by line; `verbose` adds every stand-in and repair with its reason."""
    cuda = torch.cuda.is_available()
    yield f"mtp_megatron {__version__}"
    yield _row("python", f"{platform.python_version()} on {platform.platform()}")
    yield _row("device", _device())
    yield _row("torch", torch.__version__)
    yield _row("megatron-core", _megatron())
    for package in (packages.transformer_engine(cuda), packages.apex(cuda), packages.deepspeed()):
        yield _row(package.name, package)
    yield "uses"
    yield _row("layers", "megatron-core's own, norms of torch" + ("; Transformer Engine's on request" if cuda else ""))
    yield _row("optimizer", _optimizer(cuda))
    for fusion in FUSIONS:
        yield _row(fusion.setting, "on" if fusion.available else f"off: needs {fusion.needs}")
    stand_ins = () if cuda else (*cpu.TORCH, *cpu.MEGATRON)
    yield _row("stand-ins for CUDA", f"{len(stand_ins)} (--verbose lists them)" if stand_ins else "none")
    yield "refuses"
    yield from (f"  {reason}" for reason in refusals() or ["nothing"])
    if verbose:
        yield "stand-ins for CUDA and repairs, each with what goes wrong without it"
        for row in (*stand_ins, *fallbacks.ALL):
            yield f"  {row.owner}.{row.name}: {row.why}"
