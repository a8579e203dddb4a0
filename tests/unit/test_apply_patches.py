"""tools/apply_patches.py on small git trees, and the patches themselves against the sources that are installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.documents import blocks
from tests.megatron_lm import RELEASE as INSTALLED
from tests.megatron_lm import checkout

ROOT = Path(__file__).resolve().parents[2]
PATCHES = ROOT / "patches"
RELEASES = sorted(folder.name for folder in PATCHES.iterdir() if folder.is_dir())


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("apply_patches", ROOT / "tools" / "apply_patches.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["apply_patches"] = module
    spec.loader.exec_module(module)
    return module


tool = _load()

PACKAGE_INFO = "MAJOR = {}\nMINOR = {}\nPATCH = {}\nPRE_RELEASE = ''\nVERSION = (MAJOR, MINOR, PATCH, PRE_RELEASE)\n"
SCRIPT = "".join(f"line {i}\n" for i in range(30))


def git(tree: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(tree), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def write(tree: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout that states version 9.8.7."""
    folder = tmp_path / "checkout"
    write(folder, {"megatron/core/package_info.py": PACKAGE_INFO.format(9, 8, 7), "a.py": SCRIPT, "b.py": SCRIPT})
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "as released")
    return folder


@pytest.fixture
def patches(tree: Path, tmp_path: Path) -> Path:
    """Two patches for it, each on a file of its own, and a release without a checkout."""
    room = tmp_path / "patches"
    for release, version in (("core_v9.8.7", "9.8.7"), ("core_v1.2.3", "1.2.3")):
        write(room, {f"{release}/VERSION": version + "\n"})
    for number, name in enumerate(("a.py", "b.py"), start=1):
        (tree / name).write_text(SCRIPT.replace("line 12\n", "line 12, patched\n"))
        write(room, {f"core_v9.8.7/000{number}-{name}.patch": "Why.\n\n" + git(tree, "diff")})
        git(tree, "checkout", "-q", ".")
    return room


def run(tree: Path, patches: Path, **options: bool) -> str:
    return str(tool.run(tree, **{"check": False, "revert": False, **options}, patches=patches))


def contents(tree: Path) -> dict[str, str]:
    return {name: (tree / name).read_text() for name in ("a.py", "b.py")}


def test_apply_and_revert(tree: Path, patches: Path) -> None:
    before = contents(tree)
    assert "would apply: 0001-a.py.patch, 0002-b.py.patch" in run(tree, patches, check=True)
    assert contents(tree) == before
    assert "applied: 0001" in run(tree, patches)
    assert all("line 12, patched" in text for text in contents(tree).values())
    assert "already applied" in run(tree, patches), "a second time is no error"
    assert "can be taken back" in run(tree, patches, check=True, revert=True)
    assert "taken back" in run(tree, patches, revert=True)
    assert contents(tree) == before
    assert git(tree, "status", "--porcelain") == ""
    assert "nothing to take back" in run(tree, patches, revert=True)


def test_committed_patches_are_recognised(tree: Path, patches: Path) -> None:
    run(tree, patches)
    git(tree, "commit", "-qam", "with heads")
    assert "already applied" in run(tree, patches)
    assert "taken back" in run(tree, patches, revert=True)


def test_a_tree_with_changes_of_its_own_is_refused(tree: Path, patches: Path) -> None:
    (tree / "b.py").write_text(SCRIPT + "mine\n")
    before = contents(tree)
    with pytest.raises(tool.Refused, match=r"has changes of its own \(b\.py\)\. Commit or stash them"):
        run(tree, patches)
    assert contents(tree) == before
    (tree / "b.py").write_text(SCRIPT)
    (tree / "notes.txt").write_text("untracked files are nobody's business")
    assert "applied" in run(tree, patches)


def test_all_or_nothing_and_the_conflict_is_named(tree: Path, patches: Path) -> None:
    (tree / "b.py").write_text(SCRIPT.replace("line 12\n", "line twelve\n"))
    git(tree, "commit", "-qam", "another b.py")
    before = contents(tree)
    with pytest.raises(tool.Refused, match=r"0002-b\.py\.patch does not fit b\.py"):
        run(tree, patches)
    assert contents(tree) == before, "the first patch fits, and must not have been applied alone"


def test_a_changed_line_cannot_be_taken_back(tree: Path, patches: Path) -> None:
    run(tree, patches)
    (tree / "a.py").write_text((tree / "a.py").read_text().replace("line 12, patched", "line 12, mine"))
    before = contents(tree)
    with pytest.raises(tool.Refused, match=r"0001-a\.py\.patch does not fit a\.py: changed since"):
        run(tree, patches, revert=True)
    assert contents(tree) == before


def test_another_release_is_refused(tree: Path, patches: Path) -> None:
    write(tree, {"megatron/core/package_info.py": PACKAGE_INFO.format(9, 9, 0)})
    git(tree, "commit", "-qam", "newer")
    with pytest.raises(tool.Refused, match=r"states version 9\.9\.0.*core_v1\.2\.3 .*core_v9\.8\.7"):
        run(tree, patches)


@pytest.mark.parametrize("missing", ["git", "package_info"])
def test_what_is_no_checkout_is_refused(tree: Path, patches: Path, missing: str) -> None:
    if missing == "git":  # inside of another repository, which git would find
        git(tree, "init", "-q", ".")
        inner = tree / "inner"
        write(inner, {"megatron/core/package_info.py": PACKAGE_INFO.format(9, 8, 7)})
        with pytest.raises(tool.Refused, match="not the top of a git checkout"):
            run(inner, patches)
    else:
        (tree / "megatron/core/package_info.py").unlink()
        with pytest.raises(tool.Refused, match=r"no megatron/core/package_info\.py in it"):
            run(tree, patches)


def test_the_command(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tree), "--check"]) == 2
    assert "error: the checkout states version 9.8.7" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "--revert" in capsys.readouterr().out


def files_of(patch: Path) -> list[str]:
    return [line.removeprefix("+++ b/") for line in patch.read_text().splitlines() if line.startswith("+++ ")]


@pytest.mark.parametrize("release", RELEASES)
def test_the_ledger_names_every_patch_and_no_other(release: str) -> None:
    ledger = (PATCHES / "README.md").read_text()
    patches = tool.patches_for((PATCHES / release / "VERSION").read_text().strip())
    assert [patch.parent.name for patch in patches] == [release] * len(patches)
    assert patches
    for patch in patches:
        row = next(line for line in ledger.splitlines() if f"`{patch.stem}`" in line)
        assert release in row
        assert len(files_of(patch)) == 1, "one topic, one file"
        assert patch.read_text().startswith("Subject: ")
        assert "megatron_lm" in patch.read_text() or "mtp_heads" in patch.read_text()


def stand_in(tree: Path, release: str) -> None:
    """A checkout of a release as far as its patches tell: their own context at its lines, and filler between."""
    for patch in sorted((PATCHES / release).glob("*.patch")):
        lines: list[str] = []
        for line in patch.read_text().partition("\n+++ ")[2].splitlines()[1:]:
            if hunk := re.match(r"@@ -(\d+)", line):
                lines += [f"# filler {i}" for i in range(len(lines) + 1, int(hunk[1]))]
            elif line[:1] in (" ", "-", ""):
                lines.append(line[1:])
        (name,) = files_of(patch)
        write(tree, {name: "".join(f"{line}\n" for line in lines)})
    version = (PATCHES / release / "VERSION").read_text().strip()
    write(tree, {"megatron/core/package_info.py": PACKAGE_INFO.format(*version.split("."))})
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "as far as the patches tell")


@pytest.mark.parametrize("release", RELEASES)
def test_the_commands_of_the_ledger(release: str, tmp_path: Path) -> None:
    """All patches of a release fit together, by the ledger's commands. Whether they fit upstream's sources: below."""
    tree = tmp_path / "Megatron-LM"
    tree.mkdir()
    stand_in(tree, release)
    (block,) = blocks((PATCHES / "README.md").read_text())
    commands = block.code.splitlines()
    assert [command.split()[3:] for command in commands] == [["--check"], [], ["--revert"]]
    environment = os.environ | {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for command, verb in zip(commands, ("would apply", "applied", "taken back"), strict=True):
        done = subprocess.run(
            ["bash", "-euc", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f"{verb}: 0001-heads-in-pretrain_gpt.patch, 0002-heads-in-throughput.patch" in done.stdout
        assert bool(git(tree, "status", "--porcelain")) == (verb == "applied")


def sources() -> tuple[Path | None, str]:
    """Megatron-LM's sources of the installed release, a checkout before a wheel; and its folder in patches/, or why
    there are none."""
    tree, reason = checkout()
    spec: Any = importlib.util.find_spec("megatron.training")
    if tree is None and spec is None:
        return None, f"this megatron-core comes without megatron.training; {reason}"
    release = next((name for name in RELEASES if name.startswith("core_v{}.{}.".format(*INSTALLED[:2]))), None)
    if release is None:
        return None, f"there are no patches for megatron-core {INSTALLED}"
    return tree or Path(spec.origin).parents[2], release


def test_patches_fit_the_sources(tmp_path: Path) -> None:
    """Those of a checkout where the environment names one; else of the wheel, which has no pretrain_gpt.py: 0.19.2's
    megatron/training is that of core_v0.19.0."""
    folder, release = sources()
    if folder is None:
        pytest.skip(release)
    checked = []
    for patch in sorted((PATCHES / release).glob("*.patch")):
        (name,) = files_of(patch)
        if not (folder / name).exists():
            continue
        source = (folder / name).read_text()
        write(tmp_path, {name: source})
        subprocess.run(["git", "apply", "--check", str(patch)], cwd=tmp_path, check=True)
        checked.append(patch.stem)
        changed = re.search(r"^-(.+)$", patch.read_text().partition("\n+++ ")[2], re.MULTILINE)
        assert changed is not None
        write(tmp_path, {name: source.replace(changed[1], changed[1] + "  # changed")})
        control = subprocess.run(
            ["git", "apply", "--check", str(patch)], cwd=tmp_path, check=False, capture_output=True
        )
        assert control.returncode != 0, "control: another source would be noticed"
    assert checked == ["0001-heads-in-pretrain_gpt", "0002-heads-in-throughput"][checkout()[0] is None :]
