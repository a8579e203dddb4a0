"""What rank 0 writes for people and programs: metrics.jsonl, TensorBoard, and a progress bar or plain lines. None of it
ends a run: not a full disk, and not a terminal that is closed."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import islice
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from mtp_megatron.training.evaluation import Evaluation, FolderFigures
from mtp_megatron.training.metrics_file import MetricsFile
from mtp_megatron.training.operations import StepOperations
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.run_folder import RunFolder
from mtp_megatron.training.step import StepFigures

_REMEMBERED = 1000  # steps; train.log_interval may be any number
_FOLDERS_IN_LINE = 8
logger = logging.getLogger(__name__)


class RunLog:
    """Writes the figures of a run. On ranks other than 0 every method does nothing."""

    def __init__(self, folder: RunFolder, recipe: Recipe, *, start_step: int, world_size: int, enabled: bool) -> None:
        """Open the files for ``world_size`` ranks that continue a run after ``start_step``, dropping later entries."""
        self._recipe, self._world_size, self._enabled = recipe, world_size, enabled
        self._unwritten: deque[tuple[int, StepFigures]] = deque(maxlen=_REMEMBERED)  # since the last line
        self._sizes = recipe.train.batch_sizes
        self._bar: tqdm[Any] | None = None
        self._tensorboard: Any = None
        if not enabled:
            return
        self._metrics = MetricsFile(folder.metrics, start_step)
        if recipe.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where it is used

            def start() -> None:
                self._tensorboard = SummaryWriter(str(folder.tensorboard), purge_step=start_step + 1)

            self._on_tensorboard(start)
        # A terminal that says it has no lines, as containers' often do, would show no bar: it gets plain lines.
        if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines:
            self._bar = tqdm(total=recipe.train.steps, initial=start_step, unit="step", dynamic_ncols=True)
        self._last_time, self._paused = time.perf_counter(), 0.0
        self._operations, self._done, self._sequences = StepOperations(recipe), 0.0, 0  # of steps since the last line

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._enabled:
            return
        if kind is not None:  # what led there
            self._write_unwritten()
        self._metrics.close()
        if self._tensorboard is not None:
            self._on_tensorboard(self._tensorboard.close)
        if self._bar is not None:
            self._bar.close()

    def message(self, text: str) -> None:
        """A line for the person who watches."""
        if self._enabled:
            with contextlib.suppress(OSError):  # nobody watches: the terminal was closed, or the log's disk is full
                tqdm.write(text, file=sys.stderr)

    def step(self, step: int, figures: StepFigures) -> None:
        """Called after every step; writes at every ``train.log_interval`` and at the last one. The last
        :data:`_REMEMBERED` steps in between are written if the run ends with an error."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update()
        self._unwritten.append((step, figures))
        self._done += self._operations(self._recipe.heads.weights_at(step - 1), self._sizes.at(step))
        self._sequences += self._sizes.at(step)
        if step % self._recipe.train.log_interval and step != self._recipe.train.steps and not figures.stop:
            return
        now = time.perf_counter()
        seconds = max(now - self._last_time - self._paused, 1e-9)
        speed = {
            "tokens_per_second": self._sequences * self._recipe.train_seq_length / seconds,
            "tflops_per_gpu": self._done / seconds / self._world_size / 1e12,
        }
        self._last_time, self._paused, self._done, self._sequences = now, 0.0, 0.0, 0
        self._unwritten.clear()
        self._train(step, figures, speed)
        tokens, tflops = f"{speed['tokens_per_second']:.0f}", f"{speed['tflops_per_gpu']:.3g}"
        if self._bar is not None:
            losses = {"loss": f"{figures.loss:.3f}", "head1": f"{figures.head_loss[0]:.3f}"}
            self._bar.set_postfix({**losses, "tok_s": tokens, "tflops": tflops})
        else:
            heads = " ".join(f"{value:.3f}" for value in figures.head_loss)
            self.message(
                f"step {step}/{self._recipe.train.steps}  loss {figures.loss:.4f}  heads {heads}  "
                f"grad norm {figures.grad_norm:.3f}  lr {figures.lr:.2e}  {tokens} tokens/s  {tflops} TFLOP/s per GPU"
            )

    def _write_unwritten(self) -> None:
        for step, figures in self._unwritten:
            self._train(step, figures, None)
        self._unwritten.clear()

    def _train(self, step: int, figures: StepFigures, speed: dict[str, float] | None) -> None:
        """The line and the points of a training step."""
        more = {} if self._recipe.model.num_experts is None else {"load_balancing_loss": figures.load_balancing_loss}
        if self._recipe.train.batch_size_schedule is not None:
            more["batch_size"] = self._sizes.at(step)
        self._metrics.add(
            kind="train",
            step=step,
            loss=figures.loss,
            **_by_head(figures),
            grad_norm=figures.grad_norm,
            lr=figures.lr,
            tokens_per_second=None if speed is None else round(speed["tokens_per_second"], 1),
            tflops_per_gpu=None if speed is None else float(f"{speed['tflops_per_gpu']:.4g}"),
            tokens=self._sizes.samples(step) * self._recipe.train_seq_length,
            **more,
        )
        scalars = {"train/loss": figures.loss, "train/grad_norm": figures.grad_norm, "train/lr": figures.lr}
        scalars |= {f"train/{name}": value for name, value in more.items()}
        self._scalars(step, scalars | {f"train/{name}": value for name, value in (speed or {}).items()})
        self._per_head(step, "train", figures)

    def passed_over(self, step: int, skipped: int) -> None:
        """Called instead of :meth:`step` for the ``skipped`` steps up to ``step``: there are no figures of them."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.update(skipped)
        if step == self._recipe.train.steps:  # no further line will be written
            self._write_unwritten()
        steps = f"step {step}" if skipped == 1 else f"steps {step - skipped + 1} to {step}"
        self.message(f"train.skip_steps: the data of {steps} is passed over, and nothing is trained in its place")

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Figures of the held-out split after ``step``."""
        if not self._enabled:
            return
        self._metrics.add(
            kind="valid",
            step=step,
            loss=result.loss,
            **_by_head(result),
            tokens_per_forward=result.tokens_per_forward,
            **({"folders": {name: asdict(found) for name, found in result.folders.items()}} if result.folders else {}),
        )
        self._scalars(step, {"valid/loss": result.loss, "valid/tokens_per_forward": result.tokens_per_forward})
        self._per_head(step, "valid", result)
        heads = " ".join(f"{value:.3f}" for value in result.head_loss)
        accuracy = " ".join(f"{100 * value:.1f}%" for value in result.head_accuracy)
        self.message(
            f"step {step}  validation: heads {heads}  accuracy {accuracy}  "
            f"tokens per forward {result.tokens_per_forward:.2f}"
        )
        if result.folders:
            self._evaluation_by_folder(step, result.folders)

    def _evaluation_by_folder(self, step: int, folders: Mapping[str, FolderFigures]) -> None:
        """The points of all, and a line with head 1 of the first ones. None where a folder gave no sample."""
        given = {name: found for name, found in folders.items() if found.head_tokens[0]}
        for name, found in given.items():
            self._scalars(step, {f"valid_folder/{name}/loss": found.loss})
            for figure, values in (("loss", found.head_loss), ("accuracy", found.head_accuracy)):
                points = {f"valid_folder_{figure}/{name}/head_{i + 1}": value for i, value in enumerate(values)}
                self._scalars(step, points)
        shown = [
            f"{name} {found.head_loss[0]:.3f} {100 * found.head_accuracy[0]:.1f}%" if name in given else f"{name} -"
            for name, found in islice(folders.items(), _FOLDERS_IN_LINE)
        ]
        more = f"  and {len(folders) - len(shown)} more" if len(folders) > len(shown) else ""
        self.message(f"step {step}  validation of head 1 by folder: {'  '.join(shown)}{more}")

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Evaluation and saves are not training time: leave them out of tokens per second."""
        start = time.perf_counter()
        yield
        if self._enabled:
            self._paused += time.perf_counter() - start

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if self._tensorboard is not None:
                self._on_tensorboard(partial(self._tensorboard.add_scalar, name, value, step))

    def _on_tensorboard(self, act: Callable[[], None]) -> None:
        """After an error its writer takes nothing more: its thread has ended."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 - where TensorFlow is installed, it writes and has errors of its own
            self._tensorboard = None
            logger.warning(
                "TensorBoard gets no further points of this attempt (%s: %s); metrics.jsonl has all of them",
                *(type(error).__name__, error),
            )

    def _per_head(self, step: int, split: str, found: StepFigures | Evaluation) -> None:
        for name, values in _by_head(found).items():
            tag = f"{split}_{name.removeprefix('head_')}"
            self._scalars(step, {f"{tag}/head_{i + 1}": value for i, value in enumerate(values)})


def _by_head(found: StepFigures | Evaluation) -> dict[str, list[float]]:
    """Figures of each head, ``[n]``, by the names of metrics.jsonl; those of a z-loss where there is one."""
    z_loss = {"head_z_loss": found.head_z_loss} if found.head_z_loss else {}
    return {"head_loss": found.head_loss, "head_accuracy": found.head_accuracy, **z_loss}
