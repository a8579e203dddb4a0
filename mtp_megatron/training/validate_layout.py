"""Rules of the pipeline's stages: which trunk layers and heads each holds (:mod:`mtp_megatron.layout`)."""

from __future__ import annotations

from mtp_megatron.errors import ConfigError
from mtp_megatron.layout import expanded, heads_are_spread, trunk_layout
from mtp_megatron.training.recipe import Recipe


def check_layout(recipe: Recipe) -> None:
    """Refuse stages that cannot work.

    Raises:
        ConfigError: names the field.
    """
    layers, parallel = recipe.model.num_trunk_layers, recipe.parallel
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    if chunks > 1 and stages == 1:
        raise ConfigError(
            "parallel.virtual_pipeline", chunks, "it interleaves pipeline stages, and there is one", "Set it to null."
        )
    if parallel.layout is not None:
        _check_trunk(parallel.layout, layers, stages, parallel.virtual_pipeline)
        _check_heads(recipe, parallel.layout)
        # Upstream takes such a stage; but it is in no checkpoint, and an optimizer of nothing cannot be saved.
        if not all(stage.layers or stage.heads or stage.first for stage in recipe.stages):
            raise ConfigError(
                "parallel.layout",
                parallel.layout,
                "a stage holds neither trunk layers nor heads",
                "Give every stage a t or an m.",
            )
    elif layers % (stages * chunks):
        cut = f"{stages} stages" + (f" of {chunks} chunks" if chunks > 1 else "")
        raise ConfigError(
            "model.num_trunk_layers",
            layers,
            f"it does not divide into {cut}",
            f"Choose a multiple of {stages * chunks}, or give parallel.layout.",
        )


def _check_trunk(layout: str, layers: int, stages: int, chunks: int | None) -> None:
    # Only an explicit layout is worth the seconds that importing megatron takes here.
    from mtp_megatron import compat

    compat.prepare()
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    def refuse(problem: str) -> ConfigError:
        return ConfigError(
            "parallel.layout",
            layout,
            problem,
            f"Name one E, {layers} t and one L, stages cut by '|': 'Ett|tt|L' is 4 layers on 3 stages.",
        )

    try:
        parsed = PipelineParallelLayerLayout(trunk_layout(layout), stages)
        parsed.validate_layer_layout(layers, None)
    except (AssertionError, KeyError, ValueError, NotImplementedError) as error:  # upstream's checks are asserts
        raise refuse(str(error)) from error
    if parsed.virtual_pipeline_model_parallel_size != (chunks or 1):
        raise refuse(
            f"it names {parsed.virtual_pipeline_model_parallel_size * stages} chunks, but parallel.pipeline={stages} "
            f"and parallel.virtual_pipeline={chunks} make {stages * (chunks or 1)}"
        )


def _check_heads(recipe: Recipe, layout: str) -> None:
    heads, named = recipe.heads, "".join(expanded(layout)).count("m")

    def refuse(problem: str, remedy: str) -> ConfigError:
        return ConfigError("parallel.layout", layout, problem, remedy)

    if not named:
        return
    if named != heads.n:
        raise refuse(
            f"it names {named} heads (m), and heads.n={heads.n}",
            f"Name {heads.n} m, or none: then all heads are on the last stage.",
        )
    letters = "".join(expanded(layout))
    if letters.rindex("t") > letters.index("m"):
        raise refuse(
            "a head (m) reads the output of the whole trunk, and trunk layers (t) come after it",
            "Put every m after the last t, in the order of the stages.",
        )
    if letters[-1] != "L" or letters[0] != "E":
        raise refuse("a head (m) lies before the embedding or after the loss", "Begin with E and end with L.")
    if not recipe.stages[-1].heads:
        raise refuse(
            "no head (m) is on the last stage, where the next-token head belongs",
            "Put at least one m before the L, such as '|mL'.",
        )
    if heads_are_spread(recipe.stages):
        _check_spread(recipe, layout)


def _check_spread(recipe: Recipe, layout: str) -> None:
    """What needs all heads on one stage."""
    heads, gather = recipe.heads, "leave m out of parallel.layout: all heads are then on the last stage"
    spread = f"parallel.layout={layout} puts heads on several stages, and"
    if any(len(chain) > 1 for chain in heads.chains):
        raise ConfigError(
            "heads.arrangement",
            heads.arrangement,
            f"{spread} heads of a chain read one another, not the trunk alone",
            f"Set it to parallel, or {gather}.",
        )
    if heads.unembedding == "replicated":
        raise ConfigError(
            "heads.unembedding",
            heads.unembedding,
            f"{spread} the stages sum the gradient of one unembedding",
            f"Set it to shared, or {gather}.",
        )
    if recipe.run.load is not None and heads.new_heads == "copy":
        raise ConfigError(
            "heads.new_heads",
            heads.new_heads,
            f"{spread} head 1, which new heads would be copied from, is not where they are",
            f"Set it to fresh, or {gather} for a first run, whose checkpoint any layout can load.",
        )
