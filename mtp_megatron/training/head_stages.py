"""Heads on several pipeline stages: the copies that they share stay equal, and their reports are put together.

Every stage with heads holds the final norm and the unembedding. Where the unembedding is tied, the embedding of the
first stage is one of the copies. All start equal, their gradients are summed over the stages after the data parallel
reduction, and so every optimizer step keeps them equal. One mechanism serves tied and untied; megatron-core's own sum
over the first and the last stage rests then (:func:`embedding_ranks`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtp_megatron.layout import StageLayout, heads_are_spread

if TYPE_CHECKING:
    from mtp_megatron.model import MTPGPTModel
    from mtp_megatron.sequential import HeadReport


@dataclass(frozen=True)
class _Copies:
    """One tensor of the model on this rank, once for each of its stages that holds it.

    Attributes:
        parameters: the copies here, at least one.
        source: the one that gives the initial values; None: it is on another rank.
        source_rank: the rank that holds it.
        group: the ranks of this pipeline that hold copies; None: this rank alone.
    """

    parameters: list[Tensor]
    source: Tensor | None
    source_rank: int
    group: dist.ProcessGroup | None


class HeadStages:
    """What the stages with heads of this rank's pipeline share. Build it with :meth:`join`."""

    def __init__(
        self, models: Sequence[MTPGPTModel], copies: Sequence[_Copies], group: dist.ProcessGroup | None
    ) -> None:
        self._models = [model for model in models if model.owned_heads]
        self._copies = copies
        self._group = group

    @classmethod
    def join(
        cls, stages: Sequence[StageLayout], models: Sequence[MTPGPTModel], *, tied: bool, timeout: timedelta | None
    ) -> HeadStages | None:
        """Make the process groups and give all copies the same values; collective over all ranks of the job.

        Args:
            stages: of the model.
            models: this rank's chunks.
            tied: whether the embedding is the unembedding.
            timeout: of the groups' collectives; None: torch's default.

        Returns:
            None where all heads are on the last stage.
        """
        from megatron.core import parallel_state

        ranks = parallel_state.get_pipeline_model_parallel_world_size()
        if not heads_are_spread(stages):
            return None
        with_heads = {index % ranks for index, stage in enumerate(stages) if stage.heads}
        holders = with_heads | ({0} if tied else set())
        pipeline, group = pipeline_subgroup(with_heads, ranks, timeout)
        weight_group = group if holders == with_heads else pipeline_subgroup(holders, ranks, timeout)[1]

        here = parallel_state.get_pipeline_model_parallel_rank()
        mine = list(zip(models, stages[here::ranks], strict=True))
        copies = []
        norms = [(list(model.final_norm.parameters()), stage.last) for model, stage in mine if stage.heads]
        for which in range(len(norms[0][0]) if norms else 0):
            copies.append(_copies([(found[which], last) for found, last in norms], pipeline[-1], group))
        weights = [
            (model.unembedding(), stage.first if tied else stage.last)
            for model, stage in mine
            if stage.heads or (tied and stage.first)
        ]
        if weights:
            copies.append(_copies(weights, pipeline[0 if tied else -1], weight_group))
        joined = cls(models, copies, group)
        joined.start_equal()
        return joined

    @torch.no_grad()
    def start_equal(self) -> None:
        """Give every copy the values of one; collective over the stages that hold copies."""
        for copies in self._copies:
            values = copies.parameters[0] if copies.source is None else copies.source
            if copies.group is not None:
                dist.broadcast(values.data, copies.source_rank, group=copies.group)
            for parameter in copies.parameters:
                if parameter is not values:
                    parameter.data.copy_(values.data)

    def finalize_with(self, finalize: Callable[..., None]) -> Callable[..., None]:
        """``finalize`` (megatron-core's ``finalize_model_grads``) followed by :meth:`sum_gradients`.

        What ``finalize`` does to a gradient, sums over ranks and a division, commutes with this sum.
        """

        def finalize_model_grads(*args: Any, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            self.sum_gradients()

        return finalize_model_grads

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give every copy the sum of the copies' ``main_grad``; collective over the stages that hold copies.

        Under the distributed optimizer only a rank's own shard of a gradient is reduced; copies are in buckets of their
        own, so it is the same shard on every stage.
        """
        for copies in self._copies:
            gradients: list[Tensor] = [p.main_grad for p in copies.parameters if p.requires_grad]  # type: ignore[attr-defined]
            if not gradients:
                continue
            total = gradients[0]
            for gradient in gradients[1:]:
                total += gradient
            if copies.group is not None:
                dist.all_reduce(total, group=copies.group)
            for gradient in gradients[1:]:
                gradient.copy_(total)

    def take_reports(self) -> list[HeadReport]:
        """Reports of this rank's stages before the last, since the last call."""
        return [report for model in self._models for report in model.take_reports()]

    def put_together(self, last_stage: Sequence[HeadReport]) -> None:
        """Add the figures and predictions of the other stages' heads to the last stage's reports, after an evaluation's
        forward passes; collective over the stages with heads.

        Args:
            last_stage: the reports of this rank's last stage, by microbatch; empty on other ranks.
        """
        parts = []
        for model in self._models:
            reports = last_stage if model.post_process else model.take_reports()
            parts.append(torch.stack([_as_vector(report, model.owned_heads) for report in reports]))
        if not parts:
            return
        total = torch.stack(parts).sum(dim=0)
        if self._group is not None:
            dist.all_reduce(total, group=self._group)
        for report, whole in zip(last_stage, total, strict=False):
            places = _figures(report)
            for place, figure in zip(places, whole.split([place.numel() for place in places]), strict=True):
                place.copy_(figure.view_as(place))


def embedding_ranks(stages: Sequence[StageLayout], *, tied: bool) -> Callable[..., list[int]] | None:
    """For ``initialize_model_parallel``: which ranks of a pipeline megatron-core itself keeps embeddings equal on.

    None: its own choice, the first and the last. The first alone where :class:`HeadStages` sums a tied embedding.
    """
    if not (tied and heads_are_spread(stages)):
        return None

    def first_alone(ranks: Sequence[int], *_: Any) -> list[int]:
        return [ranks[0]]

    return first_alone


def pipeline_subgroup(
    stages: Collection[int], ranks: int, timeout: timedelta | None
) -> tuple[list[int], dist.ProcessGroup | None]:
    """This rank's pipeline, and its process group of the pipeline ranks ``stages``; collective over all ranks.

    Args:
        stages: pipeline ranks.
        ranks: pipeline parallel size.

    Returns:
        Global ranks of the pipeline in order, and the group: None where this rank is not in it or is alone in it.
    """
    from megatron.core import parallel_state

    stride = dist.get_world_size() // ranks  # megatron-core's default order: pipeline stages lie outermost
    pipelines = [list(range(first, dist.get_world_size(), stride)) for first in range(stride)]
    here = dist.get_rank()
    mine = next(pipeline for pipeline in pipelines if here in pipeline)
    if mine != dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()):
        raise RuntimeError("megatron-core's pipelines are ordered in another way than heads on several stages expect")
    own = None
    for pipeline in pipelines:
        members = [pipeline[stage] for stage in sorted(stages)]
        if len(members) > 1:
            group = dist.new_group(members, timeout=timeout)
            own = group if here in members else own
    return mine, own


def _copies(found: Sequence[tuple[Tensor, bool]], source_rank: int, group: dist.ProcessGroup | None) -> _Copies:
    source = next((parameter for parameter, is_source in found if is_source), None)
    return _Copies([parameter for parameter, _ in found], source, source_rank, group)


def _as_vector(report: HeadReport, owned: Sequence[int]) -> Tensor:
    """All figures, with zeros for predictions of other than the ``owned`` heads; fp64 holds token ids exactly."""
    parts = _figures(report)
    if report.predictions is not None:
        predictions = torch.zeros_like(report.predictions)
        for head in owned:
            predictions[head] = report.predictions[head]
        parts[-1] = predictions
    return torch.cat([part.flatten().to(torch.float64) for part in parts])


def _figures(report: HeadReport) -> list[Tensor]:
    """What a stage tells the last one, predictions as the last of it."""
    figures = (
        report.loss_sum,
        report.correct,
        report.tokens,
        report.log_z_squared,
        report.losses,
        report.predictions,
    )
    return [figure for figure in figures if figure is not None]
