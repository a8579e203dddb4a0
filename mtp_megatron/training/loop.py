"""The training loop of one rank, from checked plan to final checkpoint."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from mtp_megatron import compat
from mtp_megatron.data.dataset import BlendedSamples, build_datasets
from mtp_megatron.data.loader import build_train_iterator, build_valid_batches, count_valid_batches
from mtp_megatron.data.passes import blend_lines
from mtp_megatron.errors import ConfigError
from mtp_megatron.signals import StopRequest, stop_on_signal
from mtp_megatron.training.agreement import job_store, preflight_together, require_shared
from mtp_megatron.training.batches import Microbatch, chunk_iterators
from mtp_megatron.training.build import overlapped_communication
from mtp_megatron.training.checkpointing import count_parameters, latest_checkpoint
from mtp_megatron.training.divergence import DivergenceFile, way_back
from mtp_megatron.training.evaluation import Evaluation, evaluate
from mtp_megatron.training.host import host_of
from mtp_megatron.training.preflight import Plan
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.run_lock import take_lock
from mtp_megatron.training.run_log import RunLog
from mtp_megatron.training.step import Trainer, TrainingDiverged, train_step
from mtp_megatron.training.validate import data_parallel_size, num_microbatches
from mtp_megatron.training.world import launched_world_size, model_parallel_world


@dataclass(frozen=True)
class Outcome:
    """How a call of :func:`train` ended.

    Attributes:
        step: of the run, those included whose data was passed over.
        finished: whether that is ``train.steps``, or beyond it already; False after a request to stop.
        evaluation: of the last step, if it was evaluated in this call.
    """

    step: int
    finished: bool
    evaluation: Evaluation | None


def train(recipe: Recipe) -> Outcome:
    """Train, or resume, a run: called by every rank of the job.

    SIGTERM, SIGINT, SIGHUP or SIGUSR1 to any rank lets the current step finish, saves a checkpoint and returns.

    Raises:
        ConfigError, DataError, CheckpointError, JobError: before anything is allocated, see
            :func:`.agreement.preflight_together`.
        TrainingDiverged: a loss or gradient norm became NaN or infinite; names the last good checkpoint.
    """
    store = job_store(recipe)
    plan = preflight_together(recipe, launched_world_size(), store)
    with (
        stop_on_signal() as stop,
        model_parallel_world(plan.recipe, store),
        _locked(plan),
        overlapped_communication(plan.recipe),
    ):
        return _Session(plan, stop).run()


class _Session:
    """One rank's part of a run between its start, or resumption, and its end."""

    def __init__(self, plan: Plan, stop: StopRequest) -> None:
        self.plan, self.recipe, self.folder, self.stop = plan, plan.recipe, plan.folder, stop
        self.num_microbatches = num_microbatches(plan.recipe, plan.world_size)
        latest = latest_checkpoint(self.folder.checkpoints)
        # First of all: a start by hand is one, whatever ends it.
        self.divergence = DivergenceFile(self.folder, self.recipe, latest, enabled=dist.get_rank() == 0)
        # Before the model: what can be wrong with the index of samples is found before minutes of loading.
        batch, train = self.recipe.train.global_batch_size, self.recipe.train
        self.train_data, self.valid_data = build_datasets(
            plan.data,
            seq_length=self.recipe.train_seq_length,
            train_samples=train.steps * batch,
            valid_samples=train.eval_batches * batch or None,
            seed=self.recipe.data.seed,
            cache_dir=self.recipe.data.cache,
        )
        self.host = host_of(plan.recipe)
        initial = plan.initial if latest is None else None
        self.trainable: Trainer = self.host.build(plan.recipe, initial)
        self.origin, self.step = "initial weights drawn", 0
        if latest is not None:
            self.step = self.host.load(plan.recipe, self.trainable, latest)
            self.origin = f"continuing from {latest}"
        elif initial is not None:
            self.origin = f"initial weights from {initial}"
        if dist.get_rank() == 0:
            self.folder.write_recipe(self.recipe)

    def run(self) -> Outcome:
        recipe, steps = self.recipe, self.recipe.train.steps
        evaluation = None
        iterators = self._train_iterators()
        with RunLog(self.folder, recipe, start_step=self.step, enabled=dist.get_rank() == 0) as log:
            self._announce(log)
            self._announce_blend(log)
            while self.step < steps:
                if self._pass_over(log):
                    iterators = self._train_iterators()
                    if self.step == steps:
                        with log.paused():
                            evaluation = self._evaluate(log) if recipe.train.eval_batches else None
                            self._save(log)
                    continue
                try:
                    figures = train_step(recipe, self.trainable, iterators, self.num_microbatches, bool(self.stop))
                except TrainingDiverged as error:
                    self.divergence.write(self.step + 1, error.figures, str(error))
                    raise TrainingDiverged(f"{error}. {way_back(self.folder, self.step + 1)}", error.figures) from error
                self.step += 1
                last = self.step == steps
                log.step(self.step, figures)
                self.divergence.passed(self.step)
                with log.paused():
                    # Who asks to stop gives little time: only the save must fit into it.
                    evaluates = last or (_due(self.step, recipe.train.eval_interval) and not figures.stop)
                    if recipe.train.eval_batches and evaluates:
                        evaluation = self._evaluate(log)
                    if last or figures.stop or _due(self.step, recipe.train.save_interval):
                        self._save(log)
                if figures.stop and not last:
                    log.message(
                        f"asked to stop: saved step {self.step} of {steps}. The same command continues from it."
                    )
                    return Outcome(self.step, False, evaluation)
            return Outcome(self.step, True, evaluation)

    def _train_iterators(self) -> list[Iterator[Microbatch] | None]:
        """This rank's microbatches from the step on that comes next; none where the samples end, at train.steps."""
        if self.step >= self.recipe.train.steps:
            return []
        consumed, workers = self.step * self.recipe.train.global_batch_size, self.recipe.data.workers
        loader = partial(build_train_iterator, self.train_data, consumed_samples=consumed, workers=workers)
        return chunk_iterators(self.recipe, self.plan.data.eod, loader)

    def _pass_over(self, log: RunLog) -> bool:
        """Where ``train.skip_steps`` has the next step, go to the end of its range; whether it did.

        The schedule and the position in the data go on as if these steps had been trained, so that every later step has
        the learning rate and the data that it would have had; weights and Adam's moments stay.
        """
        skipped = self.recipe.train.skipped_to(self.step) - self.step
        if not skipped:
            return False
        self.trainable.scheduler.step(increment=skipped)
        self.step += skipped
        log.passed_over(self.step, skipped)
        self.divergence.passed(self.step)
        return True

    def _announce(self, log: RunLog) -> None:
        parallel, model = self.recipe.parallel, self.recipe.model
        copies = data_parallel_size(self.recipe, self.plan.world_size)
        shared = f", experts over {parallel.expert} ranks" if model.num_experts else ""
        parameters = count_parameters(self.trainable)
        log.message(
            f"{parameters:,} parameters: {model.num_trunk_layers} trunk layers, {self.recipe.heads.n} heads, "
            f"vocabulary {model.vocab_size}; TP {parallel.tensor} x PP {parallel.pipeline} x DP {copies}{shared} on "
            f"{compat.device().type}, {self.recipe.train.precision}; {self.origin}; run folder {self.folder.path}"
        )
        if self.plan.changes:
            log.message(f"run.accept_changes: {'; '.join(self.plan.changes)}")
        for slower in (compat.slower_without_apex(), compat.slower_without_triton()):
            if slower is not None:
                log.message(slower)
        steps = self.recipe.train.steps
        if self.step >= steps:
            beyond = f"the run is at step {self.step}, beyond train.steps={steps}, so nothing is trained"
            log.message(
                f"{beyond if self.step > steps else f'step {steps} was the last one'}: set train.steps higher and "
                f"optimizer.decay_steps={self.recipe.optimizer.decay_steps}, the end of this run's schedule, to go on."
            )

    def _announce_blend(self, log: RunLog) -> None:
        train, valid = self.train_data, self.valid_data
        if isinstance(train, BlendedSamples) and isinstance(valid, BlendedSamples):
            wanted = self.recipe.train.eval_batches * self.recipe.train.global_batch_size
            log.message("\n".join(blend_lines(self.plan.data, train, valid, wanted)))

    def _evaluate(self, log: RunLog) -> Evaluation:
        recipe = self.recipe
        batches, batch = recipe.train.eval_batches, recipe.train.global_batch_size
        loader = partial(build_valid_batches, self.valid_data, batches=batches)
        iterators = chunk_iterators(recipe, self.plan.data.eod, loader)
        batches = count_valid_batches(self.valid_data, global_batch_size=batch, batches=batches)
        result = evaluate(recipe, self.trainable, iterators, batches, self.num_microbatches)
        log.evaluation(self.step, result)
        return result

    def _save(self, log: RunLog) -> None:
        start = time.perf_counter()
        saved = self.host.save(self.recipe, self.plan.data, self.trainable, self.folder.checkpoints, self.step)
        log.message(f"saved {saved.relative_to(self.folder.path)} in {time.perf_counter() - start:.1f} s")


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


@contextmanager
def _locked(plan: Plan) -> Iterator[None]:
    """Hold the run's folder against a second job, and be sure that every rank sees this folder; collective.

    The lock is rank 0's and ends with its process, however it dies.

    Raises:
        ConfigError: on rank 0, where the folder cannot be held (:func:`.run_lock.take_lock`); on every rank, where it
            is not shared.
        JobError: on the other ranks, when rank 0 cannot hold it.
    """
    folder, patience = plan.folder, 60 * plan.recipe.train.timeout_minutes
    if dist.get_rank() != 0:
        require_shared(folder.path, folder.lock, patience)
        yield
        return
    token = uuid.uuid4().hex
    try:
        lock = take_lock(folder, token)
    except ConfigError as refusal:
        require_shared(folder.path, folder.lock, patience, complaint=str(refusal))
        raise
    with lock:
        require_shared(folder.path, folder.lock, patience, token=token)
        yield
