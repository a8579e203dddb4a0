"""Models and passes of these tests: small enough that torch's stand-ins for kernels take seconds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_megatron import compat
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import VOCAB, tiny_tree

TRUNK, HEADS, MICROBATCHES = 4, 3, 2
DELAYED = {"train__fp8": "hybrid", "train__fp8_recipe": "delayed"}
TENSORWISE = {"train__fp8": "hybrid", "train__fp8_recipe": "tensorwise"}
EXPERTS = {"model__num_experts": 4, "model__moe_ffn_hidden_size": 32}

# A norm is fused into the linear layer that it feeds; Megatron's checkpoints know both by the second name.
FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def recipe_of(**overrides: Any) -> Recipe:
    settings = {
        "train__precision": "bf16",
        "train__transformer_engine": True,
        "train__global_batch_size": MICROBATCHES,
    }
    tree = tiny_tree(Path("data"), Path("run"), **settings | overrides)
    return check_recipe(parse_recipe(tree), world_size=1, tokenizer_vocab_size=VOCAB)


def config_of(recipe: Recipe, **fields: Any) -> Any:
    """Megatron's configuration; ``fields`` are set on it afterwards."""
    from mtp_megatron.training.build import transformer_config

    config = transformer_config(recipe)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


@contextmanager
def built(recipe: Recipe, **fields: Any) -> Iterator[Any]:
    """The recipe's model on this process alone."""
    from mtp_megatron.training.build import build_models
    from mtp_megatron.training.world import model_parallel_world

    with model_parallel_world(recipe):
        (model,) = build_models(recipe, config_of(recipe, **fields))
        model = model.to(compat.device())
        yield model.bfloat16() if recipe.train.precision == "bf16" else model  # as Megatron's Float16Module does


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def local_name(name: str) -> str:
    """The name of the same parameter where a norm is a module of its own, and each expert's MLP one."""
    for own, fused in FUSED.items():
        name = name.replace(fused, own)
    return re.sub(r"(?<=\.mlp\.experts\.)(linear_fc\d\.weight)(\d+)$", r"local_experts.\2.\1", name)


def put_weights(model: Any, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def microbatch(recipe: Recipe, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of the model's forward pass: one sequence of bytes."""
    from mtp_megatron.training.batches import to_microbatch

    length = recipe.train_seq_length
    text = torch.randint(VOCAB - 1, (1, length + 1), generator=torch.Generator().manual_seed(seed))
    sample = {"tokens": text[:, :-1], "labels": text[:, 1:], "loss_mask": torch.ones(1, length)}
    batch = to_microbatch(recipe, sample, eod=VOCAB - 1)
    return {
        "input_ids": batch.tokens,
        "position_ids": batch.position_ids,
        "attention_mask": None,
        "labels": batch.targets,
    }


@dataclass
class HeadsPass:
    """What one pass through the heads read and wrote.

    Attributes:
        z, grad_z: the trunk's output ``[s, b, h]`` and the loss's gradient by it.
        losses: sums by head ``[n]``.
        grads: of the heads' parameters, the final norm and the unembedding, by name.
    """

    z: Tensor
    grad_z: Tensor
    losses: Tensor
    grads: dict[str, Tensor]
    targets: Tensor
    layer_kwargs: dict[str, Any]


ROOMS = ("heads.", "final_norm.", "output_layer.")


def whole_pass(model: Any, batch: dict[str, Any], first: bool = True) -> HeadsPass:
    """Forward and backward of trunk and heads; gradients are those of this microbatch alone."""
    seen: dict[str, Any] = {}
    original = model.future_heads_loss

    def watched(z: Tensor, targets: Tensor, layer_kwargs: dict[str, Any], **more: Any) -> Any:
        z.retain_grad()
        seen.update(z=z, targets=targets, layer_kwargs=layer_kwargs)
        return original(z, targets, layer_kwargs, **more)

    model.future_heads_loss = watched
    if first:
        model.set_is_first_microbatch()
    model.zero_grad(set_to_none=True)
    try:
        loss, report = model(**batch)
        loss.backward()
    finally:
        del model.future_heads_loss
    z = seen.pop("z")
    return HeadsPass(z.detach(), z.grad, report.loss_sum.clone(), _grads(model), **seen)


def heads_alone(model: Any, trunk: HeadsPass) -> HeadsPass:
    """The heads of ``model`` on the z of another pass."""
    model.zero_grad(set_to_none=True)
    z = trunk.z.clone().requires_grad_()
    loss, report = model.future_heads_loss(z, trunk.targets, trunk.layer_kwargs)
    loss.backward()
    return HeadsPass(z.detach(), z.grad, report.loss_sum.clone(), _grads(model), trunk.targets, trunk.layer_kwargs)


def _grads(model: Any) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None and name.startswith(ROOMS)}


def trunk_grads(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "decoder." in name}


def relative(left: Tensor, right: Tensor) -> float:
    """Of the difference, in the norm over all entries."""
    return float((left.double() - right.double()).norm() / right.double().norm())
