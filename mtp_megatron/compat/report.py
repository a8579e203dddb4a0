"""What this machine offers and what follows from it, as text: printed by `python -m mtp_megatron.compat`."""

from __future__ import annotations

import platform
from collections.abc import Iterable

import torch

from mtp_megatron import __version__
from mtp_megatron.compat import cpu, devices, fallbacks, fp8, packages, versions
from mtp_megatron.compat.kernels import FUSIONS, slower_without_apex, why_no_triton
from mtp_megatron.compat.packages import State

# What mtp_megatron.model_checks refuses on every machine.
ALWAYS_REFUSED = (
    "CUDA graphs (cuda_graph_impl): the heads run inside the backward pass",
    "packed sequences (packed_seq_params) without Transformer Engine's layers: a mask says the same to the others",
    "megatron-core's own multi-token prediction (mtp_num_layers) beside these heads",
)


def _row(name: str, text: object) -> str:
    return f"  {name:<30}{text}"


def _device() -> str:
    if not torch.cuda.is_available():
        reason = devices.why_no_gpu()
        if reason is not None:
            return f"none: torch cannot use this machine's GPUs ({reason})"
        return f"cpu ({devices.gpus_left_out() or 'no CUDA device'}), backend gloo"
    names = sorted({torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())})
    return f"{torch.cuda.device_count()} x {', '.join(names)}, backend {devices.backend()}"


def _megatron() -> str:
    try:
        return f"{versions.require_megatron_core()} in {versions.megatron_core_folder()}"
    except versions.EnvironmentUnsupported as error:
        return str(error)


def _weight_gradient() -> str:
    fused = next(fusion for fusion in FUSIONS if fusion.setting == "gradient_accumulation_fusion")
    return "added to main_grad by the loss itself" if fused.available else "summed in fp32, then handed to autograd"


def _loss_softmax(cuda: bool) -> str:
    reason = why_no_triton(torch.device("cuda" if cuda else "cpu"))
    return "Triton kernels" if reason is None else f"torch's operations: {reason}"


def _optimizer(cuda: bool) -> str:
    for package in (packages.transformer_engine(cuda), packages.apex(cuda)):
        if package.state is State.USABLE:
            return f"FusedAdam of {package.name}"
    return "Adam of torch, with megatron-core's loading of its state repaired"


def _low_precision() -> str:
    """Which FP8 and FP4 recipes work, or why none does."""
    machine = fp8.this_machine()
    found = [name for name, scaling in fp8.SCALINGS.items() if fp8.why_not(scaling, machine) is None]
    return ", ".join(found) or f"none: {fp8.why_not(fp8.SCALINGS['delayed'], machine)}"


def problems() -> list[str]:
    """Everything because of which no training starts here."""
    checks = (
        versions.require_megatron_core,
        lambda: packages.require_no_wrong_package(torch.cuda.is_available()),
        devices.require_usable_gpu,
    )
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
        refused.append("Transformer Engine's layers (transformer_engine): they need it and a CUDA device")
    found = versions.megatron_core_version()
    if found is not None and found in versions.SUPPORTED and found.release < (0, 19):
        refused.append("HybridModel (mtp_megatron.hybrid): it needs megatron-core 0.19")
    return [*refused, *ALWAYS_REFUSED]


def _cuda() -> str:
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not used"
    return f"torch is built for {torch.version.cuda}, NCCL {nccl}"


def _training_loop() -> str:
    """Where Megatron-LM's own loop would come from: the wheels of 0.17.1 and later ship it, 0.16.1's does not."""
    folder = versions.megatron_core_folder()
    if folder is None or not (folder.parent / "training").is_dir():
        return "missing: the wheel ships it from 0.17.1 on, before that use a checkout of Megatron-LM"
    return str(folder.parent / "training")


def lines(verbose: bool = False) -> Iterable[str]:
    """The report, line by line; `verbose` adds every stand-in and repair with its reason."""
    cuda = torch.cuda.is_available()
    yield f"mtp_megatron {__version__}"
    yield _row("python", f"{platform.python_version()} on {platform.platform()}")
    yield _row("device", _device())
    yield _row("torch", torch.__version__)
    yield _row("CUDA", _cuda())
    yield _row("megatron-core", _megatron())
    yield _row("megatron.training", _training_loop())
    for package in (packages.transformer_engine(cuda), packages.apex(cuda), packages.deepspeed()):
        yield _row(package.name, package)
    yield "uses"
    yield _row("layers", "megatron-core's own, norms of torch" + ("; Transformer Engine's on request" if cuda else ""))
    yield _row("optimizer", _optimizer(cuda))
    for fusion in FUSIONS:
        why_not = f" ({fusion.why_not})" if cuda else ""
        yield _row(fusion.setting, "on" if fusion.available else f"off: needs {fusion.needs}{why_not}")
    yield _row("without Apex", slower_without_apex() or ("nothing is slower" if cuda else "no difference on the CPU"))
    yield _row("FP8 and FP4 in the trunk", _low_precision())
    yield _row("softmax of the loss", _loss_softmax(cuda))
    yield _row("unembedding's weight gradient", _weight_gradient())
    stand_ins = () if cuda else (*cpu.TORCH, *cpu.MEGATRON)
    yield _row("stand-ins for CUDA", f"{len(stand_ins)} (--verbose lists them)" if stand_ins else "none")
    yield "refuses"
    yield from (f"  {reason}" for reason in refusals() or ["nothing"])
    if verbose:
        yield "stand-ins for CUDA and repairs, each with what goes wrong without it"
        for row in (*stand_ins, *fallbacks.ALL):
            yield f"  {row.owner}.{row.name}: {row.why}"
