"""Rules for a trunk with experts (mixture of experts): checked with the others of :mod:`.validate`."""

from __future__ import annotations

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe


def check_experts(recipe: Recipe, world_size: int) -> None:
    """Check the settings about experts of a resolved recipe.

    Raises:
        ConfigError: names the first field that cannot work, its value and the remedy.
    """
    model, parallel = recipe.model, recipe.parallel
    experts = model.num_experts
    if experts is None:
        if parallel.expert > 1:
            raise ConfigError(
                "parallel.expert", parallel.expert, "the trunk has no experts to share", "Set it to 1, or num_experts."
            )
        return
    if model.moe_top_k > experts:
        raise ConfigError(
            "model.moe_top_k",
            model.moe_top_k,
            f"there are model.num_experts={experts}",
            f"Set it to at most {experts}.",
        )
    if experts % parallel.expert:
        raise ConfigError(
            "parallel.expert",
            parallel.expert,
            f"it does not divide model.num_experts={experts}",
            f"Choose a divisor of {experts}.",
        )
    ranks = world_size // parallel.pipeline
    if ranks % parallel.expert:
        raise ConfigError(
            "parallel.expert",
            parallel.expert,
            f"experts are shared among the {ranks} ranks of a pipeline stage",
            f"Choose a divisor of {ranks}, or start more ranks.",
        )
    if parallel.tensor > 1 and parallel.expert == 1:
        raise ConfigError(
            "parallel.expert",
            1,
            f"experts are not cut by parallel.tensor={parallel.tensor}, and without expert parallelism megatron-core "
            "would not sum their gradients over it",
            f"Set it to {parallel.tensor}, or to another divisor of model.num_experts.",
        )
    if parallel.tensor > 1 and not parallel.sequence_parallel:
        raise ConfigError(
            "parallel.sequence_parallel",
            False,
            "megatron-core's expert layers need it with parallel.tensor > 1",
            "Set it to true.",
        )
    if parallel.layout is not None and any(stage.layers == 0 for stage in recipe.stages):
        # Expert parameters have an optimizer of their own, and a checkpoint wants the same optimizers on every stage.
        raise ConfigError(
            "parallel.layout",
            parallel.layout,
            "with experts every stage needs a trunk layer",
            "Give each stage at least one t.",
        )
