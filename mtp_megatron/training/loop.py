"""The training loop of one rank, from checked plan to final checkpoint."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from mtp_megatron import compat
from mtp_megatron.data.dataset import BlendedSamples, build_datasets
from mtp_megatron.data.loader import build_train_iterator, build_valid_batches, count_valid_batches
from mtp_megatron.data.passes import blend_lines
from mtp_megatron.errors import ConfigError
from mtp_megatron.signals import Stopped, StopRequest, stop_on_signal
from mtp_megatron.training import out_of_memory
from mtp_megatron.training.agreement import job_store, preflight_together, require_shared
from mtp_megatron.training.batches import Microbatch, chunk_iterators
from mtp_megatron.training.build import learning_rate_at, overlapped_communication
from mtp_megatron.training.checkpoint_files import step_of
from mtp_megatron.training.checkpointing import count_parameters, latest_checkpoint
from mtp_megatron.training.divergence import DivergenceFile, way_back
from mtp_megatron.training.evaluation import Evaluation, evaluate
from mtp_megatron.training.hang_watch import HangWatch
from mtp_megatron.training.host import host_of
from mtp_megatron.training.metrics_file import has_record
from mtp_megatron.training.preflight import Plan
from mtp_megatron.training.profile import StepProfiler
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.run_lock import take_lock
from mtp_megatron.training.run_log import RunLog
from mtp_megatron.training.saves import Saves
from mtp_megatron.training.step import Trainer, TrainingDiverged, sum_over_world, train_step
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

    SIGTERM, SIGINT, SIGHUP or SIGUSR1 to any rank lets the current step finish, saves a checkpoint and returns; before
    the first step it returns without one. SIGUSR2 has the rank write the stacks of its threads into the run's folder.

    Raises:
        ConfigError, DataError, CheckpointError, JobError: before anything is allocated, see
            :func:`.agreement.preflight_together`.
        TrainingDiverged: a loss or gradient norm became NaN or infinite; names the last good checkpoint.
        OutOfMemory: this rank's GPU is full.
    """
    with HangWatch(recipe.train.timeout_minutes) as watch:
        store = job_store(recipe)
        plan = preflight_together(recipe, launched_world_size(), store)
        with (
            stop_on_signal() as stop,
            model_parallel_world(plan.recipe, store),
            _locked(plan),
            overlapped_communication(plan.recipe),
        ):
            watch.write_to(plan.folder.stacks)
            with out_of_memory.explained(plan.recipe, plan.folder, plan.world_size, lambda: watch.what):
                return _Session(plan, stop, watch).run()


class _Session:
    """One rank's part of a run between its start, or resumption, and its end."""

    def __init__(self, plan: Plan, stop: StopRequest, watch: HangWatch) -> None:
        self.plan, self.recipe, self.folder, self.stop, self.watch = plan, plan.recipe, plan.folder, stop, watch
        self.batch_sizes = plan.recipe.train.batch_sizes
        self.latest = latest_checkpoint(self.folder.checkpoints)
        self.step = 0 if self.latest is None else step_of(self.latest)
        # First of all: a start by hand is one, whatever ends it.
        self.divergence = DivergenceFile(self.folder, self.recipe, self.latest, enabled=dist.get_rank() == 0)
        self.batch_size = self.batch_sizes.at(self.recipe.train.skipped_to(self.step) + 1)  # as said last

    def run(self) -> Outcome:
        try:
            self._build()
        except Stopped:
            if dist.get_rank() == 0:
                with suppress(OSError):  # a terminal that was closed asks for it, too
                    print("asked to stop before the first step: nothing to save", file=sys.stderr, flush=True)
            return Outcome(self.step, self.step >= self.recipe.train.steps, None)
        return self._run()

    def _build(self) -> None:
        """Data and model, which take minutes to hours where they are large.

        Raises:
            Stopped: on every rank, where any was asked to stop meanwhile.
        """
        # Before the model: what can be wrong with the index of samples is found before minutes of loading.
        self.watch.begin("the index of samples", timed=False)
        train = self.recipe.train
        self.train_data, self.valid_data = build_datasets(
            self.plan.data,
            seq_length=self.recipe.train_seq_length,
            train_samples=self.batch_sizes.samples(train.steps),
            valid_samples=train.eval_batches * train.global_batch_size or None,
            seed=self.recipe.data.seed,
            cache_dir=self.recipe.data.cache,
            stop=self.stop,
        )
        self.watch.begin("building and loading the model")
        self.host = host_of(self.recipe)
        initial = self.plan.initial if self.latest is None else None
        self.trainable: Trainer = self.host.build(self.recipe, initial)
        self.origin = "initial weights drawn"
        if self.latest is not None:
            self.step = self.host.load(self.recipe, self.trainable, self.latest)
            self.origin = f"continuing from {self.latest}"
        elif initial is not None:
            self.origin = f"initial weights from {initial}"
        if self._asked_to_stop():
            raise Stopped
        self.saves = Saves(self.recipe, self.plan.data, self.folder, self.host, self.trainable, self.watch)
        if dist.get_rank() == 0:
            self.folder.write_recipe(self.recipe)

    def _run(self) -> Outcome:
        steps = self.recipe.train.steps
        iterators = self._train_iterators()
        ranks, first = self.plan.world_size, dist.get_rank() == 0
        self.profiler = StepProfiler(self.folder, self.recipe)
        log = RunLog(self.folder, self.recipe, start_step=self.step, world_size=ranks, enabled=first)
        with log, self.profiler:
            self._announce(log)
            self._announce_blend(log)
            evaluation, stop = self._evaluate_late(log)
            with self.saves.settled_at_the_end(log):
                while self.step < steps and not stop:
                    trained = not self._pass_over(log)
                    if trained:
                        stop = self._train(iterators, log)
                    else:
                        iterators = self._train_iterators()
                    evaluation, stop = self._report_and_keep(log, trained, stop)
            if self.step < steps:
                log.message(f"asked to stop: saved step {self.step} of {steps}. The same command continues from it.")
        return Outcome(self.step, self.step >= steps, evaluation)

    def _train(self, iterators: Sequence[Iterator[Microbatch] | None], log: RunLog) -> bool:
        """One step; whether any rank was asked to stop."""
        self.watch.begin(f"step {self.step + 1}")
        self.profiler.begin(self.step + 1)
        size = self.batch_sizes.at(self.step + 1)
        if size != self.batch_size:
            log.message(f"train.batch_size_schedule: from step {self.step + 1} on, a step takes {size} sequences")
            self.batch_size = size
        microbatches = num_microbatches(self.recipe, self.plan.world_size, size)
        try:
            figures = train_step(
                *(self.recipe, self.trainable, iterators, microbatches, bool(self.stop)), writing=self.saves.writing
            )
        except TrainingDiverged as error:
            self.divergence.write(self.step + 1, error.figures, str(error))
            self.saves.settle_before_error(log, error)  # all ranks are here, and the way back is from the latest
            raise TrainingDiverged(f"{error}. {way_back(self.folder, self.step + 1)}", error.figures) from error
        self.step += 1
        log.step(self.step, figures)
        self.divergence.passed(self.step)
        if self.profiler.passed(self.step):
            self._write_profile(log)
        self.saves.publish_if_written(log, figures.writing)
        return figures.stop

    def _write_profile(self, log: RunLog) -> None:
        self.watch.begin(f"the profile of step {self.step}")
        with log.paused():
            self.profiler.write()

    def _report_and_keep(self, log: RunLog, trained: bool, stop: bool) -> tuple[Evaluation | None, bool]:
        """Evaluate and save where that is due: after every so many trained steps, and after the last step, passed over
        or not.

        Returns the evaluation, and whether any rank was asked to stop, until now.
        """
        train, last = self.recipe.train, self.step == self.recipe.train.steps
        evaluates = last or (trained and not stop and _due(self.step, train.eval_interval))
        saves = last or (trained and _due(self.step, train.save_interval))
        evaluation, saved = None, stop
        with log.paused():
            if stop:  # who asks to stop gives little time: the save must fit into it
                self.saves.save(log, self.step, last=True)
            if evaluates and train.eval_batches:
                evaluation = self._evaluate(log)
                stop = self._asked_to_stop()
            if not saved and (saves or stop):
                self.saves.save(log, self.step, last=last or stop)
                stop = self._asked_to_stop()  # or it would train one more step, and save that
        return evaluation, stop

    def _evaluate_late(self, log: RunLog) -> tuple[Evaluation | None, bool]:
        """Evaluate the step that the run goes on from, where that was due and is not in metrics.jsonl: who asked to
        stop was given the save alone.

        Returns as :meth:`_report_and_keep`.
        """
        train, step = self.recipe.train, self.step
        on_the_way = step < train.steps and _due(step, train.eval_interval) and not train.passes_over(step)
        if self.latest is None or not train.eval_batches or not (on_the_way or step == train.steps):
            return None, False
        missing = dist.get_rank() == 0 and not has_record(self.folder.metrics, "valid", self.step)
        if sum_over_world([], 0, missing)[-1] == 0:
            return None, False
        with log.paused():
            return self._evaluate(log), self._asked_to_stop()

    def _asked_to_stop(self) -> bool:
        """Whether any rank was; collective."""
        return sum_over_world([], 0, bool(self.stop))[-1] > 0

    def _train_iterators(self) -> list[Iterator[Microbatch] | None]:
        """This rank's microbatches from the step on that comes next; none where the samples end, at train.steps."""
        if self.step >= self.recipe.train.steps:
            return []
        sizes, workers = self.batch_sizes, self.recipe.data.workers
        loader = partial(build_train_iterator, self.train_data, step=self.step, batch_sizes=sizes, workers=workers)
        return chunk_iterators(self.recipe, self.plan.data.eod, loader)

    def _pass_over(self, log: RunLog) -> bool:
        """Where ``train.skip_steps`` has the next step, go to the end of its range; whether it did.

        The schedule and the position in the data go on as if these steps had been trained, so that every later step has
        the learning rate and the data that it would have had; weights and Adam's moments stay.
        """
        skipped = self.recipe.train.skipped_to(self.step) - self.step
        if not skipped:
            return False
        if self.profiler.records:  # readers are forked anew, and would record into their memory until they end
            self._write_profile(log)
        with log.paused():  # likewise: they would hold the copies; data.workers is each host's own, and this collective
            self.saves.settle(log, "passing over data")
        self.trainable.scheduler.step(increment=skipped)
        self.step += skipped
        log.passed_over(self.step, skipped)
        self.divergence.passed(self.step)
        return True

    def _announce(self, log: RunLog) -> None:
        parallel, model = self.recipe.parallel, self.recipe.model
        copies = data_parallel_size(self.recipe, self.plan.world_size)
        grouped = "grouped" if self.recipe.train.transformer_engine else "one after the other"
        shared = f", experts over {parallel.expert} ranks, {grouped}" if model.num_experts else ""
        parameters = count_parameters(self.trainable)
        log.message(
            f"{parameters:,} parameters: {model.num_trunk_layers} trunk layers, {self.recipe.heads.n} heads, "
            f"vocabulary {model.vocab_size}; TP {parallel.tensor} x PP {parallel.pipeline} x DP {copies}{shared} on "
            f"{compat.device().type}, {self.recipe.train.precision}; {self.origin}; run folder {self.folder.path}"
        )
        if self.plan.changes:
            step = self.recipe.train.skipped_to(self.step) + 1
            rate = f"{learning_rate_at(self.trainable.scheduler, step):.3e}"
            log.message(
                f"run.accept_changes: {'; '.join(self.plan.changes)}; the next step, {step}, trains at a learning rate "
                f"of {rate}"
            )
        if self.recipe.train.batch_size_schedule is not None:
            log.message(self._sizes_in_words())
        profiles = StepProfiler.announcement(self.folder, self.recipe, self.step)
        for line in (profiles, compat.slower_without_apex(), compat.slower_without_triton()):
            if line is not None:
                log.message(line)
        steps = self.recipe.train.steps
        if self.step >= steps:
            beyond = f"the run is at step {self.step}, beyond train.steps={steps}, so nothing is trained"
            end = self.recipe.optimizer.decay_steps
            schedule = "" if end is None else f" and optimizer.decay_steps={end}, the end of this run's schedule,"
            log.message(
                f"{beyond if self.step > steps else f'step {steps} was the last one'}: set train.steps higher"
                f"{schedule} to go on."
            )

    def _sizes_in_words(self) -> str:
        steps = self.recipe.train.steps
        sizes = [
            f"{size} from step {first} on{'' if first <= steps else f' (beyond train.steps={steps})'}"
            for first, size in self.batch_sizes.entries
        ]
        following = self.recipe.train.skipped_to(self.step) + 1
        now = f"; the next step, {following}, takes {self.batch_size}" if following <= steps else ""
        return f"train.batch_size_schedule: sequences of a step: {', '.join(sizes)}{now}"

    def _announce_blend(self, log: RunLog) -> None:
        train, valid = self.train_data, self.valid_data
        if isinstance(train, BlendedSamples) and isinstance(valid, BlendedSamples):
            wanted = self.recipe.train.eval_batches * self.recipe.train.global_batch_size
            log.message("\n".join(blend_lines(self.plan.data, train, valid, wanted)))

    def _evaluate(self, log: RunLog) -> Evaluation:
        self.watch.begin(f"the evaluation after step {self.step}")
        recipe = self.recipe
        batches, batch = recipe.train.eval_batches, recipe.train.global_batch_size
        loader = partial(build_valid_batches, self.valid_data, global_batch_size=batch, batches=batches)
        iterators = chunk_iterators(recipe, self.plan.data.eod, loader)
        batches = count_valid_batches(self.valid_data, global_batch_size=batch, batches=batches)
        folders = self.plan.data.labels if len(self.plan.data.parts) > 1 else ()
        microbatches = num_microbatches(recipe, self.plan.world_size, batch)
        result = evaluate(recipe, self.trainable, iterators, batches, microbatches, folders)
        log.evaluation(self.step, result)
        return result


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
