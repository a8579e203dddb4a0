"""One training step of a very small model with heads on random tokens: does this installation train at all?"""

from __future__ import annotations

import math
import time

import torch

from mtp_megatron import compat
from mtp_megatron.compat import packages
from mtp_megatron.errors import MTPError
from mtp_megatron.training.batches import Microbatch, to_microbatch
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from mtp_megatron.training.world import model_parallel_world

_VOCABULARY = 512
_FIRST_LOSS = 1.0  # nats; how far from that of a uniform guess an untrained model of this size may be


class SmokeTestFailed(MTPError):
    """The step ran and did not do what a training step does."""


def smoke() -> str:
    """Build, step once, look at the figures; in this process alone, with Transformer Engine where it is usable.

    Returns:
        One line for the report.

    Raises:
        SmokeTestFailed: a loss far from that of an untrained model, a gradient norm that is zero or no number, or
            weights that did not move.
    """
    recipe = smoke_recipe()
    start = time.perf_counter()
    with model_parallel_world(recipe):
        from mtp_megatron.training.build import build_trainable
        from mtp_megatron.training.step import train_step

        trainable = build_trainable(recipe)
        (model,) = trainable.models
        before = [parameter.detach().clone() for parameter in model.parameters()]
        figures = train_step(recipe, trainable, [iter([_batch(recipe)])], 1, False)
        still = sum(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    seconds = time.perf_counter() - start
    losses = ", ".join(f"{loss:.3f}" for loss in figures.head_loss)
    uniform = math.log(_VOCABULARY)
    if max(abs(loss - uniform) for loss in figures.head_loss) > _FIRST_LOSS:
        raise SmokeTestFailed(f"head losses {losses}, but an untrained model's are about {uniform:.2f}")
    if not figures.grad_norm > 0:
        raise SmokeTestFailed(f"the gradient norm is {figures.grad_norm}")
    if still:
        raise SmokeTestFailed(f"{still} of {len(before)} parameters did not move")
    engine = "Transformer Engine" if recipe.train.transformer_engine else "megatron-core's layers"
    return (
        f"one step of {recipe.heads.n} heads on {compat.device()} ({recipe.train.precision}, {engine}): "
        f"losses {losses}, gradient norm {figures.grad_norm:.3f}, {seconds:.1f} s"
    )


def smoke_recipe() -> Recipe:
    """The model of the test: what a run on this machine would use, small."""
    cuda = torch.cuda.is_available()
    tree = {
        "model": {"num_trunk_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "seq_length": 64},
        "heads": {"n": 2},
        "optimizer": {"lr": 1e-2, "schedule": "constant"},
        "train": {
            "steps": 1,
            "micro_batch_size": 2,
            "global_batch_size": 2,
            "precision": "bf16" if cuda else "fp32",
            "transformer_engine": packages.transformer_engine(cuda).state is packages.State.USABLE,
        },
    }
    return check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=_VOCABULARY)


def _batch(recipe: Recipe) -> Microbatch:
    shape = (recipe.train.micro_batch_size, recipe.train_seq_length + 1)
    text = torch.randint(_VOCABULARY, shape, generator=torch.Generator().manual_seed(recipe.train.seed))
    sample = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(shape[0], shape[1] - 1)}
    return to_microbatch(recipe, sample, eod=_VOCABULARY - 1)
