"""Megatron-LM's training loop (``megatron.training``): where it is, preparing for it, its signatures by release."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import time
from collections.abc import Callable
from typing import Any

from mtp_megatron.compat import cpu, devices, versions
from mtp_megatron.compat.optimizer_state import padded_checkpoints
from mtp_megatron.compat.patching import Replacement, replace
from mtp_megatron.compat.versions import EnvironmentUnsupported

_REMEDY = (
    "Put a checkout of Megatron-LM on PYTHONPATH (a release of 0.16.1 to 0.19), or install megatron-core 0.17.1 or "
    "later, whose wheel brings it"
)
_COMPILED = "megatron.core.datasets.helpers_cpp"


def missing() -> str | None:
    """Why Megatron-LM's loop cannot run here, None if it can."""
    if versions.megatron_core_folder() is None:
        return f"megatron-core is not installed. {_REMEDY}"
    if importlib.util.find_spec("megatron.training") is None:
        return (
            f"megatron-core {versions.megatron_core_version()} in {versions.megatron_core_folder()} comes without "
            f"megatron.training. {_REMEDY}"
        )
    return None


def prepare() -> None:
    """Make ``megatron.training`` usable in this process; idempotent, to be called before it is imported.

    Raises:
        EnvironmentUnsupported: it is not there, of an unsupported release, or needs a package that is missing; or there
            are GPUs, and torch cannot use them.
    """
    problem = missing()
    if problem is not None:
        raise EnvironmentUnsupported(problem)
    devices.require_usable_gpu()
    devices.prepare()
    try:
        cpu.install_training_loop()
        importlib.import_module("megatron.training")
    except ModuleNotFoundError as error:
        raise EnvironmentUnsupported(
            f"megatron.training of Megatron-LM {versions.megatron_core_version()} needs the package {error.name}, "
            "which is not installed. Install it with pip"
        ) from error
    if not _undo:
        replace(HELPERS, _undo)
        _find_compiled_helpers()


def _find_compiled_helpers() -> None:
    """Let a checkout use the compiled index builder of the installed wheel, where both are of the same minor release.

    Else upstream compiles its own, which takes pybind11 and a python3-config of the interpreter that runs.
    """
    folder = versions.wheel_folder()
    if folder is None or importlib.util.find_spec(_COMPILED) is not None:
        return
    package: Any = importlib.import_module("megatron.core.datasets")
    package.__path__.append(str(folder / "datasets"))
    _undo.append(lambda: package.__path__.remove(str(folder / "datasets")))


def _unless_compiled(original: Callable[[], None]) -> Callable[[], None]:
    def compile_helpers() -> None:
        if importlib.util.find_spec(_COMPILED) is None:
            original()

    return compile_helpers


HELPERS = Replacement(
    "megatron.core.datasets.utils",
    "compile_helpers",
    _unless_compiled,
    "runs make at every start, and exits where wheels bring the compiled module without a Makefile",
)
_undo: list[Callable[[], None]] = []


def undo() -> None:
    """Put back what :func:`prepare` replaced in ``megatron.training``'s surroundings."""
    while _undo:
        _undo.pop()()


def pretrain(
    train_valid_test_datasets_provider: Callable[..., Any],
    model_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    *,
    check_args: Callable[[Any], Any],
    extra_args_provider: Callable[..., Any],
    args_defaults: dict[str, Any] | None = None,
    get_embedding_ranks: Callable[..., Any] | None = None,
) -> None:
    """Megatron-LM's ``pretrain`` in the signature of the release found.

    Args:
        check_args: called with the validated arguments before anything is started, where the release parses them
            apart (from 0.18 on); earlier ones parse them inside, so the model provider has to check them too.
    """
    from megatron.core.enums import ModelType
    from megatron.training import inprocess_restart, set_startup_timestamps
    from megatron.training import pretrain as upstream

    # As upstream's scripts do: whether they are set decides about a collective, so it must be alike on every rank.
    set_startup_timestamps(program_start=time.time(), main_entry=time.time())

    known = inspect.signature(upstream).parameters
    settings: dict[str, Any] = {
        "train_valid_test_dataset_provider": train_valid_test_datasets_provider,
        "model_provider": model_provider,
        "model_type": ModelType.encoder_or_decoder,
        "forward_step_func": forward_step,
        "get_embedding_ranks": get_embedding_ranks,
    }
    if "cfg_container" in known:
        from megatron.training.argument_utils import pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        args = parse_and_validate_args(extra_args_provider=extra_args_provider, args_defaults=args_defaults or {})
        check_args(args)
        settings["cfg_container"] = pretrain_cfg_container_from_args(args)
    else:
        settings |= {"extra_args_provider": extra_args_provider, "args_defaults": args_defaults or {}}
    wrapped, settings["store"] = inprocess_restart.maybe_wrap_for_inprocess_restart(upstream)
    with padded_checkpoints():
        wrapped(**settings)
