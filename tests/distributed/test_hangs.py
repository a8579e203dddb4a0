"""A rank that hangs: every rank's stacks are in the run's folder before the collective fails, and on request."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import threading
from pathlib import Path
from typing import Any
from unittest import mock

from mtp_megatron.reporting.stacks import read_report, text_of
from mtp_megatron.signals import STACKS_SIGNAL
from mtp_megatron.stack_files import FOLDER
from tests.harness import run_world
from tests.training_runs import tiny_tree

TIMEOUT = 9.0  # seconds of a collective


def hangs_in_step_3(rank: int, world_size: int, tree: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 sleeps, rank 0 waits for it in the trunk's first collective and asks both where they are."""
    faulthandler.unregister(STACKS_SIGNAL)  # the harness's own
    from mtp_megatron.training import loop
    from mtp_megatron.training.recipe_io import parse_recipe

    whole, asked, errors = loop.train_step, io.StringIO(), io.StringIO()
    run, over = Path(tree["run"]["path"]), threading.Event()

    def ask() -> None:
        from mtp_megatron.cli import main

        over.wait(1.5)
        with contextlib.redirect_stdout(asked):
            main(["stacks", str(run)])

    def train_step(recipe: Any, trainable: Any, *args: Any, **kwargs: Any) -> Any:
        if trainable.scheduler.num_steps == 2:
            if rank == 0:
                threading.Thread(target=ask).start()
            else:
                over.wait(TIMEOUT + 1)
        return whole(recipe, trainable, *args, **kwargs)

    raised: BaseException | None = None
    with mock.patch.object(loop, "train_step", train_step), contextlib.redirect_stderr(_WithFile(errors)):
        try:
            loop.train(parse_recipe(tree))
        except RuntimeError as error:
            raised = error
    return {
        "error": "" if raised is None else f"{raised}",
        "notes": getattr(raised, "__notes__", []),
        "asked": asked.getvalue(),
        "said": errors.getvalue(),
    }


class _WithFile(io.TextIOBase):
    """A stderr that is read here and whose file is the process's own, as faulthandler wants one."""

    def __init__(self, text: io.StringIO) -> None:
        self._text = text

    def write(self, text: str) -> int:
        return self._text.write(text)

    def fileno(self) -> int:
        return 2


def test_stacks_of_a_hung_world(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = tiny_tree(data, run, parallel__tensor=2, train__timeout_minutes=TIMEOUT / 60)
    zero, one = run_world(hangs_in_step_3, 2, tree, fresh=True, timeout=90)
    # On request, while both wait:
    assert "asked 2 ranks on " in zero["asked"]
    told = [line for line in zero["asked"].splitlines() if line.startswith(("rank 0:", "rank 1:"))]
    assert any(line.startswith("rank 1: in wait (threading.py:") for line in told), zero["asked"]
    assert any(line.startswith("rank 0: in the collective all_reduce, from ") for line in told), zero["asked"]
    # By itself, before the collective failed, and the error names it:
    assert "imed out" in zero["error"] or "onnection closed" in zero["error"], zero["error"]
    assert any(f"mtp-megatron stacks {run}" in note for note in zero["notes"])
    assert "step 3 has taken" in zero["said"]
    assert f"'mtp-megatron stacks {run}' says which ranks are where" in zero["said"]
    assert "stacks of all threads" not in one["said"], "one rank of a node tells"
    for rank in range(2):
        assert "Timeout (0:00:08" in (run / FOLDER / f"rank0000{rank}.txt").read_text()
    report = read_report(run)
    assert report is not None
    assert [group.ranks for group in report.groups] in ([(0,), (1,)], [(1,), (0,)])
    assert "in the collective all_reduce" in text_of(report)
