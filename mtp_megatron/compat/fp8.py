"""FP8 and FP4 by Transformer Engine: what each way of scaling needs, what this machine has, what else must hold.

The rules are data and plain functions: nothing here imports Transformer Engine, and torch only to look at the device.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from mtp_megatron.compat import packages
from mtp_megatron.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

NVFP4 = "nvfp4"
Capability = tuple[int, int]


@dataclass(frozen=True)
class Scaling:
    """One way of scaling numbers of 8 or 4 bits, by its name in ``fp8_recipe`` (or ``fp4_recipe``).

    Attributes:
        since, before: compute capabilities: at least the one, below the other.
        cuda: of the torch build, at least.
        transformer_engine: at least.
        multiple: tokens of a microbatch and channels of every matrix must be multiples of it.
        gathered: tokens and channels of what sequence parallelism gathers must be multiples of it too.
    """

    name: str
    since: Capability
    cuda: Version
    transformer_engine: Version
    before: Capability | None = None
    multiple: int = 16
    gathered: int = 1

    def needs(self) -> str:
        """In words."""
        capability = f"compute capability {_dotted(self.since)}" + (
            f" to below {_dotted(self.before)}" if self.before else " or higher"
        )
        return f"{capability}, CUDA {self.cuda} or later and Transformer Engine {self.transformer_engine} or later"


# Devices and CUDA: Transformer Engine's own checks (pytorch/quantization.py, check_*_support), and the first CUDA that
# knows the device. Versions: megatron-core's (fp8_utils.get_fp8_recipe, fp4_utils.get_fp4_recipe); before 2.0 FP8
# parameters need repairs. Multiples: megatron-core's get_fp8_align_size and get_fp4_align_size; of what is gathered,
# is_quantizable of Transformer Engine's quantizers (assert_dim_for_all_gather).
# What is better comes first: it is proposed where something else cannot work.
SCALINGS = {
    scaling.name: scaling
    for scaling in (
        Scaling("mxfp8", (10, 0), Version("12.8"), Version("2.1"), before=(12, 0), multiple=32),
        Scaling("tensorwise", (8, 9), Version("12.1"), Version("2.2")),
        Scaling("blockwise", (9, 0), Version("12.9"), Version("2.3"), gathered=128),
        Scaling("delayed", (8, 9), Version("12.1"), Version("2.0")),
        Scaling(NVFP4, (10, 0), Version("12.8"), Version("2.7"), multiple=32),
    )
}


@dataclass(frozen=True)
class Machine:
    """What decides whether a scaling works: device, CUDA and Transformer Engine.

    Attributes:
        device: its name.
        capability: compute capability; None without a CUDA device.
        cuda: version that torch was built for; None: without CUDA.
        transformer_engine: what was found of it.
        pinned: versions of Transformer Engine that the installed megatron-core names.
    """

    device: str
    capability: Capability | None
    cuda: Version | None
    transformer_engine: packages.Package
    pinned: SpecifierSet = field(default_factory=SpecifierSet)


def this_machine() -> Machine:
    """The device of this process and the packages in its environment."""
    import torch

    from mtp_megatron.compat import devices

    cuda = torch.cuda.is_available()
    package, pinned = packages.transformer_engine(cuda), packages.transformer_engine_pin()
    build = Version(torch.version.cuda) if torch.version.cuda else None
    if not cuda:
        return Machine("no CUDA device", None, build, package, pinned)
    index = min(devices.device().index or 0, torch.cuda.device_count() - 1)
    return Machine(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), build, package, pinned)


def why_not(scaling: Scaling, machine: Machine) -> str | None:
    """Why a scaling does not work on a machine; None where it does."""
    if machine.capability is None:
        return f"there is no CUDA device on this machine, and it needs {scaling.needs()}"
    here = f"{machine.device} has compute capability {_dotted(machine.capability)}"
    if machine.capability < scaling.since:
        return f"it needs compute capability {_dotted(scaling.since)} or higher, and {here}"
    if scaling.before is not None and machine.capability >= scaling.before:
        return f"it needs compute capability below {_dotted(scaling.before)}, and {here}"
    if machine.cuda is None or machine.cuda < scaling.cuda:
        return f"it needs a torch built for CUDA {scaling.cuda} or later, and this one is built for {machine.cuda}"
    return _why_not_transformer_engine(scaling, machine)


def _why_not_transformer_engine(scaling: Scaling, machine: Machine) -> str | None:
    package = machine.transformer_engine
    if package.state is not packages.State.USABLE:
        return f"it runs in Transformer Engine, which is {package.state.value}" + (
            f" ({package.detail})" if package.detail else ""
        )
    try:
        found = Version(package.version)
    except InvalidVersion:  # a checkout on the path: it cannot be asked without importing it
        return None
    if found < scaling.transformer_engine:
        return f"it needs Transformer Engine {scaling.transformer_engine} or later, and {found} is installed"
    if not machine.pinned.contains(found, prereleases=True):
        return f"the installed megatron-core names Transformer Engine {machine.pinned}, and {found} is installed"
    return None


def working(machine: Machine) -> list[str]:
    """Names of the FP8 scalings that work on a machine, the best first."""
    return [name for name, scaling in SCALINGS.items() if name != NVFP4 and why_not(scaling, machine) is None]


@dataclass(frozen=True)
class Request:
    """What was asked for, in the words of TransformerConfig; ``heads``: the heads' layers too."""

    fp8: str | None = None
    fp8_recipe: str = "delayed"
    fp8_param: bool = False
    fp4: str | None = None
    first_last_layers_bf16: bool = False
    heads: bool = False
    bf16: bool = False
    transformer_engine: bool = False

    @property
    def wanted(self) -> bool:
        return bool(self.fp8 or self.fp4)

    @property
    def scaling(self) -> Scaling:
        """Of whichever was asked for."""
        return SCALINGS[self.fp8_recipe if self.fp8 else NVFP4]


Names = Mapping[str, str]
"""How the user writes the fields of :class:`Request`; those that are missing keep their names."""


def check(request: Request, names: Names) -> None:
    """All that can be refused before a model is built on this machine: :func:`check_machine`, :func:`check_request`.

    Raises:
        ConfigError: names the setting, its value and the remedy.
    """
    if request.fp8 and request.fp8_recipe not in SCALINGS:
        name = names.get("fp8_recipe", "fp8_recipe")
        raise ConfigError(name, request.fp8_recipe, "it is not tested with heads", "Choose another one")
    if request.wanted:
        check_machine(request, this_machine(), names)
    check_request(request, names)


def check_machine(request: Request, machine: Machine, names: Names) -> None:
    """Refuse what cannot work on this machine.

    Raises:
        ConfigError: names the setting that asked for it, why it cannot work, and the recipe that would.
    """
    if not request.wanted or (problem := why_not(request.scaling, machine)) is None:
        return
    fp8, recipe = names.get("fp8", "fp8"), names.get("fp8_recipe", "fp8_recipe")
    others = working(machine)
    if machine.capability is None or not others:
        kind = "fp8" if request.fp8 else "fp4"
        if machine.capability is None or machine.capability < min(s.since for s in SCALINGS.values()):
            remedy = f"Leave {names.get(kind, kind)} out here, and train in bf16 or fp32."
        else:
            remedy = f"Put right what is missing, or leave {names.get(kind, kind)} out."
        raise ConfigError(names.get(kind, kind), getattr(request, kind), _of(request, problem), remedy)
    also = f" ({', '.join(others[1:])} would work too)" if others[1:] else ""
    if request.fp8:
        raise ConfigError(recipe, request.fp8_recipe, problem, f"Set {recipe} to {others[0]}{also}.")
    raise ConfigError(
        names.get("fp4", "fp4"), request.fp4, problem, f"Set {fp8} and {recipe} to hybrid and {others[0]}{also}."
    )


def _of(request: Request, problem: str) -> str:
    return f"with the recipe {request.scaling.name}: {problem}"


def check_request(request: Request, names: Names) -> None:
    """Refuse combinations that cannot work on any machine.

    Raises:
        ConfigError: names the setting, its value and the remedy.
    """

    def refuse(setting: str, problem: str, remedy: str) -> ConfigError:
        return ConfigError(names.get(setting, setting), getattr(request, setting), problem, remedy)

    name = {key: names.get(key, key) for key in Request.__dataclass_fields__}
    kind = "fp8" if request.fp8 else "fp4"
    delayed = bool(request.fp8) and request.fp8_recipe == "delayed"
    if request.fp8 and request.fp4:
        raise refuse("fp4", f"{name['fp8']}={request.fp8!r} is set as well", "Set only one of the two.")
    if request.fp8_param and not request.fp8:
        raise refuse("fp8_param", f"there is no FP8 without {name['fp8']}", f"Set {name['fp8']} to hybrid.")
    if request.heads and not request.wanted:
        raise refuse("heads", f"the trunk is not in FP8 without {name['fp8']}", f"Set {name['fp8']} to hybrid.")
    if not request.wanted:
        return
    if not request.bf16:
        raise refuse(kind, "the weights and everything outside of it are in bf16", f"Set {name['bf16']}.")
    if not request.transformer_engine:
        raise refuse(
            kind, "it runs in Transformer Engine's layers alone", f"Set {name['transformer_engine']}, or leave it out."
        )
    if request.first_last_layers_bf16 and delayed:
        raise refuse(
            "first_last_layers_bf16",
            f"{name['fp8_recipe']}=delayed enters FP8 once for all layers",
            f"Set {name['fp8_recipe']} to tensorwise.",
        )
    if request.heads and delayed:
        raise refuse(
            "heads",
            f"{name['fp8_recipe']}=delayed keeps a history that every head would advance once more in each step",
            f"Leave the heads in bf16, or set {name['fp8_recipe']} to tensorwise.",
        )


def without_fp8(config: TransformerConfig) -> TransformerConfig:
    """``config`` for layers that stay in BF16 whatever the trunk does; itself, where nothing has to change."""
    if not (config.fp8 or config.fp4 or config.quant_recipe):
        return config
    config = copy.copy(config)
    config.fp8 = config.fp4 = config.quant_recipe = None
    config.fp8_param = config.fp4_param = False
    return config


def fp8_context(config: TransformerConfig) -> AbstractContextManager[Any]:
    """Megatron-core's FP8 or FP4 context for one layer that ``first_last_layers_bf16`` does not count."""
    from megatron.core import fp4_utils, fp8_utils

    made: AbstractContextManager[Any]
    made = fp8_utils.get_fp8_context(config) if config.fp8 else fp4_utils.get_fp4_context(config)
    return made


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
