"""The report: reading a run's metrics, the table, report.json and report.png."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import numpy as np
import pytest

from mtp_megatron.cli import main
from mtp_megatron.errors import DataError, MTPError
from mtp_megatron.reporting.figure import head_colours, save_figure, smooth
from mtp_megatron.reporting.metrics import read_metrics

SPECULATIVE = {
    "prompts": 50,
    "heads_used": 2,
    "tokens_per_forward": 1.5,
    "speedup": 1.25,
    "identical": True,
    "by_heads": [
        {"heads": 1, "tokens_per_forward": 1.0, "speedup": 0.97},
        {"heads": 2, "tokens_per_forward": 1.5, "speedup": 1.25},
    ],
}


def train_record(step, losses=(3.0, 4.0)):
    return {
        "kind": "train",
        "step": step,
        "loss": sum(losses),
        "head_loss": list(losses),
        "head_accuracy": [0.5, 0.25],
        "tokens_per_second": 100.0 * step,
        "tflops_per_gpu": 0.5 * step,
        "tokens": 64 * step,
    }


def valid_record(step):
    return {
        "kind": "valid",
        "step": step,
        "loss": 7.0,
        "head_loss": [3.125, 4.0],
        "head_accuracy": [0.4321, 0.2],
        "tokens_per_forward": 1.4,
    }


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()

    def write(records, tail=""):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines + tail)
        return folder

    return write


def test_report_prints_the_table_and_writes_both_files(run, capsys):
    folder = run([train_record(1), train_record(2), train_record(3), valid_record(3)])
    (folder / "speculative.json").write_text(json.dumps(SPECULATIVE))
    assert main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "3.1250", "43.21", "%"] in rows
    assert ["2", "4.0000", "20.00", "%"] in rows
    assert "1.50 tokens per forward, speedup 1.25x (output identical to plain greedy)" in out
    report = json.loads((folder / "report.json").read_text())
    assert report["heads"][0]["validation_loss"] == 3.125
    assert report["heads"][1]["training_loss"] == 4.0
    assert report["training"] == {"steps": 3, "tokens": 192, "tokens_per_second": 200.0, "tflops_per_gpu": 1.0}
    assert report["speculative"] == SPECULATIVE
    assert report["versions"]["torch"].startswith("2.")
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_blend_has_every_folder(run, capsys):
    web = {"loss": 6.5, "head_loss": [2.5, 3.5], "head_accuracy": [0.5, 0.25], "head_tokens": [30, 28]}
    code = {"loss": None, "head_loss": [None, None], "head_accuracy": [None, None], "head_tokens": [0, 0]}
    folder = run([train_record(3), {**valid_record(3), "folders": {"web": web, "code": code}}])
    assert main(["report", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("web:")
    assert lines[place + 1].split() == ["1", "2.5000", "50.00", "%"]
    assert lines[place + 2].split() == ["2", "3.5000", "25.00", "%"]
    assert lines[lines.index("code:") + 2].split() == ["2", "-", "-"]
    report = json.loads((folder / "report.json").read_text())
    assert report["folders"]["web"]["validation_loss"] == 6.5
    assert report["folders"]["web"]["heads"][1] == {
        "head": 2,
        "validation_loss": 3.5,
        "validation_accuracy": 0.25,
        "targets": 28,
    }
    assert report["folders"]["code"]["heads"][0]["validation_loss"] is None


def test_different_output_is_said_loudly(run, capsys):
    folder = run([valid_record(3)])
    (folder / "speculative.json").write_text(json.dumps({**SPECULATIVE, "identical": False}))
    main(["report", str(folder)])
    assert "DIFFERS" in capsys.readouterr().out


def test_report_of_a_run_without_evaluation_or_decoding(run, tmp_path, capsys):
    folder = run([train_record(1)])
    output = tmp_path / "elsewhere"
    assert main(["report", str(folder), "--output", str(output)]) == 0
    assert ["1", "-", "-"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(path.name for path in output.iterdir()) == ["report.json", "report.png"]
    assert not (folder / "report.json").exists()


def test_a_repeated_step_counts_once_the_later_time(run):
    metrics = read_metrics(run([train_record(1), train_record(2, (9.0, 9.0)), train_record(2)]))
    assert [record["step"] for record in metrics.train] == [1, 2]
    assert metrics.train[-1]["head_loss"] == [3.0, 4.0]


def test_an_unfinished_last_line_is_left_out(run):
    metrics = read_metrics(run([train_record(1)], tail='{"kind": "train", "st'))
    assert len(metrics.train) == 1


@pytest.mark.parametrize(
    ("records", "tail", "message"),
    [
        ([train_record(1)], "{broken\n" + json.dumps(train_record(2)) + "\n", "line 2"),
        ([train_record(1)], '["a list"]\n', "line 2"),
        ([], "", "holds no step"),
    ],
)
def test_unreadable_metrics_are_refused_by_line(run, records, tail, message):
    with pytest.raises(DataError, match=message):
        read_metrics(run(records, tail))


def test_missing_run_is_a_clear_error(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "nowhere/metrics.jsonl: no such file" in capsys.readouterr().err


def test_damaged_decoding_table_is_refused(run, capsys):
    folder = run([valid_record(1)])
    (folder / "speculative.json").write_text('{"prompts": 3}')
    assert main(["report", str(folder)]) == 2
    assert "speculative.json: not a decoding table" in capsys.readouterr().err


def test_files_that_cannot_be_read_or_written_are_named(run, tmp_path, capsys):
    folder = run([valid_record(1)])
    (tmp_path / "file").write_text("")
    for options, message in (
        (["--speculative", str(tmp_path / "typo")], f"--speculative='{tmp_path}/typo': there is no such file"),
        (["--output", str(tmp_path / "file")], f"--output='{tmp_path}/file': cannot be written (File exists)"),
        (["--output", str(tmp_path / "file" / "in")], "/file/in': cannot be written (Not a directory)"),
    ):
        assert main(["report", str(folder), *options]) == 2
        assert message in capsys.readouterr().err
    (folder / "metrics.jsonl").write_bytes(b'{"kind": "tr\xffain"\n')
    assert main(["report", str(folder)]) == 2
    assert "metrics.jsonl, line 1: not a metrics record" in capsys.readouterr().err


def test_a_package_that_was_not_installed_has_no_version(run, monkeypatch):
    """Megatron-LM's checkout on PYTHONPATH."""
    real = importlib.metadata.version

    def version(name):
        if name == "megatron-core":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    folder = run([valid_record(1)])
    assert main(["report", str(folder)]) == 0
    versions = json.loads((folder / "report.json").read_text())["versions"]
    assert versions["megatron-core"] is None
    assert versions["numpy"] == np.__version__


def test_figure_without_matplotlib_names_the_extra(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MTPError, match=r"pip install 'PATH_TO_CHECKOUT\[report\]'"):
        save_figure(tmp_path / "x.png", read_metrics(run([train_record(1)])), None, "title")


def test_figure_survives_a_loss_that_is_not_a_number(run, tmp_path):
    folder = run([train_record(1), train_record(2, (float("nan"), 4.0)), valid_record(2)])
    save_figure(tmp_path / "x.png", read_metrics(folder), SPECULATIVE, "title")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_head_that_was_never_computed_has_no_figures(run, capsys):
    """Under a curriculum, or without a target in any document, training writes null."""
    records = [train_record(1), valid_record(1)]
    for record in records:
        record["head_loss"][1] = record["head_accuracy"][1] = None
    assert main(["report", str(run(records))]) == 0
    assert ["2", "-", "-"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_head_colours_go_from_dark_to_light():
    luminance = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in head_colours(8)]
    assert luminance == sorted(luminance)
    assert min(np.diff(luminance)) > 0.02


def test_smooth_is_a_centred_mean_that_keeps_both_ends():
    assert smooth(np.array([1.0, 2.0, 6.0, 4.0]), 1).tolist() == pytest.approx([1.0, 3.0, 4.0, 4.0])
