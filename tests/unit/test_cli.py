"""The command line's table: what each subcommand's module must offer, and how errors become exit codes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import types
from contextlib import contextmanager

import pytest

from mtp_megatron import cli, train
from mtp_megatron.errors import DataError


@pytest.fixture
def subcommand(monkeypatch):
    """Registers a subcommand `probe` whose `run` is given by the test."""

    def register(run):
        module = types.ModuleType("mtp_probe")
        module.SUMMARY = "probe"
        module.add_arguments = lambda parser: parser.add_argument("--value", type=int, default=0)
        module.run = run
        monkeypatch.setitem(sys.modules, "mtp_probe", module)
        monkeypatch.setitem(cli.SUBCOMMANDS, "probe", cli.Subcommand("mtp_probe", "probe"))

    return register


def test_subcommand_gets_its_arguments_and_its_status_is_returned(subcommand):
    subcommand(lambda args: args.value)
    assert cli.main(["probe", "--value", "7"]) == 7


def test_an_error_of_the_package_is_printed_without_a_traceback(subcommand, capsys):
    def fail(args):
        raise DataError("data/train.bin: truncated. Preprocess again.")

    subcommand(fail)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "error: data/train.bin: truncated. Preprocess again.\n"


def test_any_other_error_keeps_its_traceback(subcommand):
    def fail(args):
        raise ZeroDivisionError

    subcommand(fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])


@contextmanager
def not_root():
    """The effective user is one whom permissions hold, as they do not hold root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.EACCES, "/x: Permission denied. Choose another path, or let user "),
        (errno.EPERM, "/x: Operation not permitted. Choose another path"),
        (errno.ENAMETOOLONG, "/x: File name too long. Choose a shorter one."),
    ],
)
def test_a_path_that_may_not_be_used_is_an_error_in_a_line(code, words, subcommand, capsys):
    def fail(args):
        raise OSError(code, os.strerror(code), "/x")

    subcommand(fail)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_other_errors_of_the_system_keep_their_traceback(subcommand):
    for error in (OSError(errno.EIO, "Input/output error", "/x"), PermissionError(errno.EPERM, "no path")):

        def fail(args, error=error):
            raise error

        subcommand(fail)
        with pytest.raises(OSError, match=r"Input|no path"):
            cli.main(["probe"])


def test_commands_below_a_folder_that_may_not_be_entered(tmp_path, capsys):
    folder = tmp_path / "locked"
    (folder / "in").mkdir(parents=True)
    below = folder / "in" / "it"
    commands = [
        ["plan", "1.3B", "--recipe", f"{below}.yaml"],
        ["plan", f"{below}.yaml"],
        ["report", f"{below}"],
        ["convert", f"{below}", "--output", f"{below}2"],
        ["train", f"{below}.yaml"],
        ["a rank", f"{below}.yaml"],
        ["rollback", f"{below}", "3"],
        ["stacks", f"{below}"],
        ["serve", f"{below}", "--print"],
    ]

    def run(argv):
        return train.main(argv[1:]) if argv[0] == "a rank" else cli.main(argv)

    for argv in commands:  # what they import may lie where the other user sees nothing
        run(argv)
    capsys.readouterr()
    folder.chmod(0)
    for argv in commands:
        with not_root():
            status = run(argv)
        err = capsys.readouterr().err
        assert (status, err.count("\n")) == (2, 1), (argv, err)
        assert "Permission denied" in err, (argv, err)
        assert "locked/in/it" in err, (argv, err)
    folder.chmod(0o700)


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at the end", "in between"])
def test_a_reader_that_has_ended_is_no_error(lines):
    """`mtp-megatron train --describe | head`."""
    script = f"""import sys, types
from mtp_megatron import cli
module = types.ModuleType("mtp_probe")
module.SUMMARY, module.add_arguments = "probe", lambda parser: None
module.run = lambda args: [print("a line") for _ in range({lines})] and 0
sys.modules["mtp_probe"] = module
cli.SUBCOMMANDS["probe"] = cli.Subcommand("mtp_probe", "probe")
sys.exit(cli.main(["probe"]))
"""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_another_broken_pipe_keeps_its_traceback(subcommand, capsys):
    def fail(args):
        raise BrokenPipeError

    subcommand(fail)
    with pytest.raises(BrokenPipeError):
        cli.main(["probe"])
    print("still heard")
    assert capsys.readouterr().out == "still heard\n"


def test_interrupt_is_130(subcommand):
    def interrupt(args):
        raise KeyboardInterrupt

    subcommand(interrupt)
    assert cli.main(["probe"]) == 130


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_every_subcommand(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for name, row in cli.SUBCOMMANDS.items():
        assert name in out
        assert row.summary in out


def test_unknown_subcommand_is_refused_with_the_valid_ones(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["trian"])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "trian" in err
    assert "train" in err.replace("trian", "")


@pytest.mark.parametrize("name", list(cli.SUBCOMMANDS))
def test_every_subcommand_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    assert f"mtp-megatron {name}" in capsys.readouterr().out


def test_importing_the_package_and_its_command_line_imports_nothing_heavy():
    code = "import sys, mtp_megatron.cli; print(sorted({m.partition('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for heavy in ("torch", "megatron", "numpy", "matplotlib", "transformers", "pydantic"):
        assert f"'{heavy}'" not in out


def test_version_and_module_entry_point_agree(capsys):
    out = subprocess.run(
        [sys.executable, "-m", "mtp_megatron", "--version"], capture_output=True, text=True, check=True
    ).stdout
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == out


@pytest.mark.parametrize(
    "argv", [["r", "--value", "7", "a=1"], ["--value", "7", "r", "a=1"], ["r", "a=1", "--value=7"]]
)
def test_options_may_stand_among_the_positional_arguments(subcommand, argv):
    seen = []
    subcommand(lambda args: seen.append((args.recipe, args.overrides, args.value)) or 0)
    module = sys.modules["mtp_probe"]
    add_value = module.add_arguments

    def add_arguments(parser):
        add_value(parser)
        parser.add_argument("recipe", nargs="?")
        parser.add_argument("overrides", nargs="*")

    module.add_arguments = add_arguments
    assert cli.main(["probe", *argv]) == 0
    assert seen == [("r", ["a=1"], 7)]
