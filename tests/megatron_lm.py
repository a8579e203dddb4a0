"""Megatron-LM's own training loop in the worlds of `tests.harness`: its flags, bodies for ranks, what it logged."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from mtp_megatron.compat import megatron_lm
from mtp_megatron.compat.versions import megatron_core_version
from mtp_megatron.documents import document_mask
from mtp_megatron.targets import document_ends_from_tokens
from tests.parity import Case, fill

CHECKOUTS = {(0, 16): "MTP_MEGATRON_LM_0_16", (0, 19): "MTP_MEGATRON_LM_0_19"}
RELEASE = (megatron_core_version() or Version("0")).release


def checkout() -> tuple[Path | None, str]:
    """The checkout of Megatron-LM that the environment names for the installed release, or None and why."""
    variable = CHECKOUTS.get(RELEASE[:2])
    if variable is None:
        return None, f"no checkout is known for megatron-core {RELEASE}"
    if variable not in os.environ:
        return None, f"needs a checkout of Megatron-LM: name one in {variable}"
    return Path(os.environ[variable]), ""


if RELEASE[:2] == (0, 16) and (_found := checkout()[0]) is not None:
    # The wheel has no loop. Behind it on the path, the checkout adds what the wheel lacks, in workers too; processes
    # that tests start get all of the checkout, as a user would.
    sys.path.append(str(_found))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(_found)]))

needs_megatron_lm = pytest.mark.skipif(
    megatron_lm.missing() is not None,
    reason=f"needs Megatron-LM's loop: {megatron_lm.missing()}; or name a checkout in {CHECKOUTS[0, 16]}",
)

# What a machine without CUDA and Transformer Engine needs.
ON_CPU = """--transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-rope-fusion
    --no-masked-softmax-fusion --no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-swiglu-fusion
    --no-bias-dropout-fusion"""
MODEL = """--num-layers 4 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --ffn-hidden-size 64 --seq-length 32 --max-position-embeddings 32 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0 --make-vocab-size-divisible-by 8
    --tokenizer-type NullTokenizer --vocab-size 63"""
EOD = 62 if RELEASE >= (0, 18) else 63  # that tokenizer's last entry; earlier releases add it to the 63
TRAINING = """--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --lr-decay-style constant --log-interval 1
    --eval-interval 1000 --eval-iters 0 --num-workers 0"""

# The same model as a case of tests.parity: padding rows take part in Megatron-LM's softmax.
CASE = Case(num_trunk_layers=4, vocab_size=64, padded_vocab_size=64, sequence=32)


def flags(*more: object, model: str = MODEL) -> list[str]:
    """A command line: the tiny model on a CPU, and more arguments."""
    return [*f"{ON_CPU} {model} {TRAINING}".split(), *map(str, more)]


class Samples(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Random documents, labels masked out in two of three; sample ``i`` is the same whenever it is read."""

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 + index)
        tokens = torch.randint(1, 63, (CASE.sequence + 1,), generator=generator)
        tokens[torch.rand(tokens.shape, generator=generator) < 0.08] = EOD
        mask = (torch.rand(CASE.sequence, generator=generator) > 0.3 * (index % 3)).float()
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": mask,
            "position_ids": torch.arange(CASE.sequence),
        }


def samples_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    return Samples(), Samples(), Samples()


class MaskedSamples(Samples):
    """With what Megatron-LM's data sets add for ``--reset-attention-mask``."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        ends = document_ends_from_tokens(sample["tokens"][None], EOD)
        return sample | {"attention_mask": document_mask(ends)[0]}


def masked_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    return MaskedSamples(), MaskedSamples(), MaskedSamples()


class ScarceSamples(Samples):
    """Documents of one token and their end, so that no head but the first has a target where documents are separate;
    in the first global batch of :data:`TRAINING` all labels are masked out besides."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        sample["tokens"][1::2] = EOD  # the labels share its memory
        sample["loss_mask"][:] = float(index >= 4)
        return sample


def scarce_provider(num_samples: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
    return ScarceSamples(), ScarceSamples(), ScarceSamples()


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What a run wrote for TensorBoard: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


@contextlib.contextmanager
def command_line(rank: int, world_size: int, argv: Sequence[str]) -> Iterator[None]:
    """This worker as torchrun would have started it; Megatron-LM's globals and the stand-ins are gone afterwards."""
    from mtp_megatron.compat import cpu

    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in ranks.items()}, CUDA_DEVICE_MAX_CONNECTIONS="1")
    before, sys.argv = sys.argv, ["pretrain_mtp.py", *argv]
    try:
        yield
    finally:
        sys.argv = before
        from megatron.training import get_tensorboard_writer
        from megatron.training.global_vars import unset_global_variables
        from megatron.training.training import destroy_global_state

        if writer := get_tensorboard_writer():
            writer.close()
        destroy_global_state()
        unset_global_variables()
        megatron_lm.undo()
        cpu.uninstall()


def train(rank: int, world_size: int, argv: Sequence[str]) -> int:
    """For ``run_world``: what the example does; its exit status."""
    from mtp_megatron.megatron_lm.run import main

    with command_line(rank, world_size, argv):
        return main()


def train_filled(
    rank: int,
    world_size: int,
    argv: Sequence[str],
    parameters: dict[str, torch.Tensor],
    provider: Callable[..., tuple[Any, Any, Any]] = samples_provider,
) -> None:
    """For ``run_world``: the same on given weights and on :class:`Samples`, put together from the package's parts."""
    with command_line(rank, world_size, argv):
        megatron_lm.prepare()
        from mtp_megatron.megatron_lm import add_mtp_args, forward_step, get_embedding_ranks, model_provider
        from mtp_megatron.megatron_lm.arguments import check_args

        def filled_provider(*args: Any, **kwargs: Any) -> torch.nn.Module:
            model = model_provider(*args, **kwargs)
            fill([model], parameters)
            return model

        provider.is_distributed = True  # type: ignore[attr-defined]
        megatron_lm.pretrain(
            provider,
            filled_provider,
            forward_step,
            check_args=check_args,
            extra_args_provider=add_mtp_args,
            get_embedding_ranks=get_embedding_ranks,
        )


def train_upstream(rank: int, world_size: int, argv: Sequence[str], parameters: dict[str, torch.Tensor]) -> None:
    """For ``run_world``, one rank: upstream's own GPT by its own builder and loss on the same weights and samples."""
    with command_line(rank, world_size, argv):
        megatron_lm.prepare()
        from megatron.core.enums import ModelType
        from megatron.training import get_args, pretrain

        def filled(chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
            fill(chunks, as_plain_gpt(parameters))
            return chunks

        if RELEASE < (0, 18):
            pretrain(
                samples_provider,
                lambda *args, **kwargs: filled([_upstreams_gpt(get_args(), *args, **kwargs)])[0],
                ModelType.encoder_or_decoder,
                _plain_forward_step,
            )
            return
        from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
        from megatron.training.arguments import parse_and_validate_args

        model = gpt_config_from_args(parse_and_validate_args())
        model.pre_wrap_hooks.append(filled)
        container = pretrain_cfg_container_from_args(get_args(), model)
        pretrain(container, samples_provider, ModelType.encoder_or_decoder, _plain_forward_step)


def _upstreams_gpt(args: Any, pre_process: bool = True, post_process: bool = True, **more: Any) -> torch.nn.Module:
    """What gpt_builders.py of a checkout builds from the arguments; it stands beside the packages, not in them."""
    import importlib

    builder = importlib.import_module("gpt_builders").gpt_builder
    model: torch.nn.Module = builder(args, pre_process, post_process, **more)
    return model


def as_plain_gpt(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Head 1 as a plain GPT's last layer."""
    layers = CASE.num_trunk_layers
    renamed = {
        name.replace("heads.0.", f"decoder.layers.{layers}.").replace("final_norm.", "decoder.final_layernorm."): value
        for name, value in parameters.items()
    }
    return renamed


def _plain_forward_step(iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[Any, Callable[..., Any]]:
    """Next-token loss as pretrain_gpt.py has it: token losses of GPTModel, masked and summed, and the mask's count."""
    batch = next(iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

    def loss_func(mask: torch.Tensor, losses: torch.Tensor) -> tuple[Any, ...]:
        total, count = (losses.float() * mask).sum(), mask.sum()
        return total, count.to(torch.int), {"lm loss": torch.stack([total.detach().clone(), count])}

    return output, partial(loss_func, batch["loss_mask"])
