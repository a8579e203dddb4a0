"""A model under a DeepSpeed engine: one global batch of gradients, one step (a :class:`.step.Trainer`)."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from mtp_megatron import compat
from mtp_megatron.compat import packages
from mtp_megatron.deepspeed import settings
from mtp_megatron.deepspeed.extensions import warn_of_stale_locks, why_no_fused_adam
from mtp_megatron.errors import ConfigError
from mtp_megatron.labels import label
from mtp_megatron.targets import IGNORE_INDEX
from mtp_megatron.training.batches import Microbatch
from mtp_megatron.training.build import build_models, build_scheduler, transformer_config
from mtp_megatron.training.initial_weights import load_initial
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.step import BatchIterator, LossFunction

if TYPE_CHECKING:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from mtp_megatron.model import MTPGPTModel
    from mtp_megatron.sequential import HeadReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeepSpeedTrainer:
    """What this rank trains: its share of the model in an engine, and the recipe's schedule over the engine's groups.

    Attributes:
        engine: ``deepspeed.DeepSpeedEngine``.
        config: what the engine was made with.
    """

    model: MTPGPTModel
    engine: Any
    scheduler: OptimizerParamScheduler
    config: settings.Config

    @property
    def models(self) -> list[MTPGPTModel]:
        return [self.model]

    @property
    def stage(self) -> int:
        """ZeRO's."""
        return settings.zero_stage(self.config)

    def backward(self, recipe: Recipe, iterators: Sequence[BatchIterator], num_microbatches: int) -> list[HeadReport]:
        with label("data"):
            batches = _take(iterators, num_microbatches)
        scale = self._loss_scale(batches)
        reports = []
        for number, batch in enumerate(batches, start=1):
            with label("trunk forward"):
                loss, report = batch.through(self.engine)
            # The scale holds the number of microbatches already: the count of tokens is that of the global batch.
            self.engine.backward(loss * scale, scale_wrt_gas=False)
            reports.append(report)
            if number < num_microbatches:
                self.engine.step()  # counts the microbatch; the optimizer's own step is in `update`
        return reports

    def update(self) -> float:
        norm = self._unsharded_norm()
        self.engine.step()
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        overflow = not self.engine.was_step_applied()
        return math.inf if overflow else math.nan if norm is None else float(norm)

    def forward(
        self, recipe: Recipe, iterators: Sequence[BatchIterator], num_microbatches: int, loss_func: LossFunction
    ) -> list[Any]:
        results = []
        with torch.no_grad():
            for batch in _take(iterators, num_microbatches):
                output = batch.through(self.engine)
                results.append(loss_func(batch, output)[2])
        return results

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        self.engine.eval()
        yield
        self.engine.train()

    def may_lose_steps(self) -> bool:
        return bool(self.engine.fp16_enabled())

    def _loss_scale(self, batches: Sequence[Microbatch]) -> float:
        """What makes the engine's mean over data parallel ranks the global batch's sum over its count of tokens."""
        group = self.engine.data_parallel_group
        tokens = torch.zeros((), dtype=torch.int64, device=compat.device())
        for batch in batches:
            if batch.targets is not None:  # always: there is one stage, and it owns the heads
                tokens += (batch.targets[0] != IGNORE_INDEX).sum()
        dist.all_reduce(tokens, group=group)
        return float(group.size() / max(int(tokens), 1))

    def _unsharded_norm(self) -> float | None:
        """The gradient norm where the engine tells none: fp32 without ZeRO."""
        if self.stage > 0 or self.engine.fp16_enabled() or self.engine.bfloat16_enabled():
            return None
        from mtp_megatron.deepspeed.parameters import gradient_norm

        return gradient_norm(self.model)


def build_trainer(recipe: Recipe, initial: Path | None = None) -> DeepSpeedTrainer:
    """Allocate this rank's share of the model and its engine; the world must be up (:mod:`.world`).

    Args:
        recipe: merged with the DeepSpeed configuration (:func:`.settings.merged_recipe`) and resolved.
        initial: checkpoint folder that gives the initial weights; None: they are drawn.

    Raises:
        EnvironmentUnsupported: DeepSpeed is missing, or lacks what a machine without a GPU needs; says what to install.
        ConfigError: fp16 on a machine without a GPU.
    """
    packages.require_deepspeed(torch.cuda.is_available())
    if recipe.train.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision", "fp16", "there is no GPU, and DeepSpeed trains fp16 on one", "Use bf16.")
    compat.prepare()
    import deepspeed
    from megatron.core import parallel_state

    from mtp_megatron.deepspeed.parameters import (
        ZeroParameters,
        drop_empty_states,
        parameter_groups,
        sum_over_tensor_ranks,
    )
    from mtp_megatron.deepspeed.unit import MegatronUnit

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warn_of_stale_locks()
    _tell_local_rank()
    if recipe.run.deepspeed is None:
        raise ValueError("run.deepspeed is null: the recipe names no DeepSpeed configuration")
    config = settings.engine_config(
        recipe,
        settings.read_config(recipe.run.deepspeed),
        parallel_state.get_data_parallel_world_size(),
        context_parallel=parallel_state.get_context_parallel_world_size(),
    )
    cuda, adam = torch.cuda.is_available(), config["optimizer"]["params"]
    without = why_no_fused_adam(cuda)
    if without is not None and "torch_adam" not in adam:
        adam["torch_adam"] = True
        if cuda and dist.get_rank() == 0:
            logger.warning("Adam is torch's, which is slower than DeepSpeed's: %s", without)
    transformer = transformer_config(recipe)
    transformer.gradient_accumulation_fusion = False  # it adds to megatron-core's own gradient buffers
    (model,) = (chunk.to(compat.device()) for chunk in build_models(recipe, transformer))
    if initial is not None:
        load_initial(recipe, [model], initial)
    drop_empty_states(model)
    overlapped = bool(config.get("zero_optimization", {}).get("overlap_comm"))
    model.parameter_access = ZeroParameters(model, settings.zero_stage(config), overlapped)
    sum_over_tensor_ranks(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, recipe.optimizer.weight_decay),
        config=config,
        mpu=MegatronUnit(),
        dist_init_required=False,
    )
    return DeepSpeedTrainer(model, engine, build_scheduler(recipe.optimizer, engine.optimizer), config)


def _tell_local_rank() -> None:
    """DeepSpeed asks the environment which GPU is this rank's. A process that no launcher started says nothing there,
    and may be one of several, each of which has made a GPU its current one."""
    os.environ.setdefault("LOCAL_RANK", str(compat.device().index or 0))


def _take(iterators: Sequence[BatchIterator], count: int) -> list[Microbatch]:
    (iterator,) = iterators
    if iterator is None:
        raise RuntimeError("no data for a rank of a model without pipeline stages")
    batches = list(islice(iterator, count))
    if len(batches) < count:
        raise RuntimeError(f"the data ended after {len(batches)} of {count} microbatches of a step")
    return batches
