"""The training recipe: its sections together, and what follows from several of them.

Nothing here imports torch or megatron, so that a recipe can be checked and described on any machine. The settings are
:mod:`mtp_megatron.training.recipe_sections`, reading files and overrides is :mod:`mtp_megatron.training.recipe_io`;
rules that involve several settings, the world or the data are :mod:`mtp_megatron.training.validate`.
"""

from __future__ import annotations

import math

from pydantic import Field

from mtp_megatron.config import HeadsConfig
from mtp_megatron.layout import StageLayout, stage_layouts
from mtp_megatron.training.recipe_sections import (
    MIN_LR_FRACTION,
    DataSection,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RunSection,
    Section,
    TrainSection,
)

__all__ = [
    "MIN_LR_FRACTION",
    "DataSection",
    "ModelSection",
    "OptimizerSection",
    "ParallelSection",
    "Recipe",
    "RunSection",
    "Section",
    "TrainSection",
    "padded_vocab_size",
]


class Recipe(Section):
    """A whole training run. Each section has defaults, so ``{}`` is a valid recipe for a folder ``data``."""

    model: ModelSection = Field(default_factory=ModelSection, description="the trunk")
    heads: HeadsConfig = Field(default_factory=HeadsConfig.parse, description="the future-token heads")
    parallel: ParallelSection = Field(default_factory=ParallelSection, description="how the model is cut")
    data: DataSection = Field(default_factory=DataSection, description="what is read")
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection, description="optimizer and schedule")
    train: TrainSection = Field(default_factory=TrainSection, description="the loop")
    run: RunSection = Field(default_factory=RunSection, description="the run's folder")

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model: TP x PP x CP."""
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.context

    @property
    def smallest_world(self) -> int:
        """Fewest ranks that a job can have: whole copies of the model, and EP ranks on every stage."""
        return self.parallel.pipeline * math.lcm(self.parallel.tensor * self.parallel.context, self.parallel.expert)

    @property
    def stages(self) -> tuple[StageLayout, ...]:
        """All (virtual) stages in the model's order; stage ``i`` is chunk ``i // PP`` of pipeline rank ``i % PP``."""
        return stage_layouts(
            self.parallel.layout,
            ranks=self.parallel.pipeline,
            chunks=self.parallel.virtual_pipeline or 1,
            trunk_layers=self.model.num_trunk_layers,
            heads=self.heads.n,
        )

    @property
    def train_seq_length(self) -> int:
        """Tokens of one training sequence, ``s``."""
        return self.train.seq_length or self.model.seq_length

    def resolved(self, *, vocab_size: int | None = None) -> Recipe:
        """This recipe with every derived default filled in (null only where it means "off").

        Args:
            vocab_size: the tokenizer's vocabulary, used where ``model.vocab_size`` is null.
        """
        model, optimizer = self.model, self.optimizer
        lr_floor = MIN_LR_FRACTION * optimizer.lr if optimizer.min_lr is None else optimizer.min_lr
        end = None if optimizer.decays_later else self.train.steps  # a stable phase has none, however long it gets
        style = optimizer.wsd_decay_style or ("exponential" if optimizer.schedule == "wsd" else None)
        ffn = model.ffn_hidden_size or -(-8 * model.hidden_size // (3 * 64)) * 64
        return self.model_copy(
            update={
                "model": model.model_copy(
                    update={
                        "num_query_groups": model.num_query_groups or model.num_attention_heads,
                        "ffn_hidden_size": ffn,
                        "moe_ffn_hidden_size": (model.moe_ffn_hidden_size or ffn) if model.num_experts else None,
                        "vocab_size": model.vocab_size or vocab_size,
                    }
                ),
                "optimizer": optimizer.model_copy(
                    update={
                        "min_lr": lr_floor,
                        "decay_steps": optimizer.decay_steps or end,
                        "wsd_decay_style": style,
                    }
                ),
                "train": self.train.model_copy(update={"seq_length": self.train_seq_length}),
            }
        )


def padded_vocab_size(recipe: Recipe) -> int:
    """The rows of the embedding, ``Vpad``: the vocabulary rounded up to a multiple of ``model.vocab_padding``.

    Raises:
        ValueError: the vocabulary is still null; resolve the recipe with the tokenizer's first.
    """
    if recipe.model.vocab_size is None:
        raise ValueError("model.vocab_size is null: resolve the recipe with the tokenizer's vocabulary first")
    multiple = recipe.model.vocab_padding
    return -(-recipe.model.vocab_size // multiple) * multiple
