#!/usr/bin/env python3
"""Adds --mtp-heads to upstream's own pretrain_gpt.py: applies patches/RELEASE to a checkout of Megatron-LM.

All patches of the release are applied or none. The checkout must be one of a release in patches/ and have no changes of
its own, so that --revert gives back what was there. patches/README.md says what each patch is for.

    python tools/apply_patches.py ~/Megatron-LM --check     would they apply?
    python tools/apply_patches.py ~/Megatron-LM             apply them
    python tools/apply_patches.py ~/Megatron-LM --revert    take them back
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PATCHES = Path(__file__).resolve().parents[1] / "patches"
_VERSION_FILE = Path("megatron") / "core" / "package_info.py"
_PART = re.compile(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE)\s*=\s*['\"]?([\w.]*)['\"]?\s*$", re.MULTILINE)
_FAILED = re.compile(r"error: (?:patch failed: )?(?P<file>[^:\n]+):")


class Refused(Exception):
    """Why nothing was done, as a sentence."""


def stated_version(tree: Path) -> str:
    """The version that a checkout states, for example 0.16.1.

    Raises:
        Refused: it is no checkout of Megatron-LM.
    """
    try:
        parts = dict(_PART.findall((tree / _VERSION_FILE).read_text(encoding="utf-8")))
        return f"{parts['MAJOR']}.{parts['MINOR']}.{parts['PATCH']}{parts.get('PRE_RELEASE', '')}"
    except OSError as error:
        raise Refused(f"{tree}: no {_VERSION_FILE} in it. Give the folder of a Megatron-LM checkout.") from error
    except KeyError as error:
        raise Refused(f"{tree / _VERSION_FILE}: states no version. Give a checkout of Megatron-LM.") from error


def patches_for(version: str, patches: Path = PATCHES) -> list[Path]:
    """The patches, in order, of the release that states this version: a tag may state another than it is named after.

    Raises:
        Refused: there are none for it.
    """
    stated = {path.read_text(encoding="utf-8").strip(): path.parent for path in sorted(patches.glob("*/VERSION"))}
    if version not in stated:
        known = ", ".join(f"{folder.name} (which states {said})" for said, folder in stated.items())
        raise Refused(
            f"the checkout states version {version}, and there are patches for {known}. Check out one of these."
        )
    return sorted(stated[version].glob("*.patch"))


def check_tree(tree: Path) -> None:
    """Make sure that the tree is the top of a git checkout.

    Raises:
        Refused: it is not.
    """
    result = git(tree, "rev-parse", "--show-toplevel")
    if result.returncode or Path(result.stdout.strip()).resolve() != tree.resolve():
        raise Refused(
            f"{tree}: not the top of a git checkout, so nothing could be taken back. Clone Megatron-LM there."
        )


def changed_files(tree: Path) -> list[str]:
    """Tracked files that differ from the commit that is checked out."""
    lines = git(tree, "status", "--porcelain", "--untracked-files=no").stdout.splitlines()
    return [line[3:] for line in lines]


def fits(tree: Path, patches: Sequence[Path], *, reverse: bool = False) -> bool:
    """Whether all patches together could be applied (or taken back)."""
    return git(tree, *_apply(patches, reverse), "--check").returncode == 0


def conflict(tree: Path, patches: Sequence[Path], *, reverse: bool = False) -> str:
    """The first patch that does not fit, and the files that it does not fit."""
    ordered = list(reversed(patches)) if reverse else list(patches)
    for count, patch in enumerate(ordered, start=1):
        result = git(tree, "apply", *(["--reverse"] if reverse else []), "--check", *map(str, ordered[:count]))
        if result.returncode:
            files = dict.fromkeys(match["file"] for match in _FAILED.finditer(result.stderr))
            return f"{patch.name} does not fit {', '.join(files) or 'the checkout'}"
    return "the patches do not fit together"


def run(tree: Path, *, check: bool, revert: bool, patches: Path = PATCHES) -> str:
    """Do what was asked for; returns what was done.

    Raises:
        Refused: nothing was changed, and why.
    """
    chosen = patches_for(stated_version(tree), patches)
    check_tree(tree)
    release = chosen[0].parent.name
    names = ", ".join(patch.name for patch in chosen)
    applied = fits(tree, chosen, reverse=True)
    if revert:
        if not applied:
            if fits(tree, chosen):
                return f"{tree} ({release}): not applied, nothing to take back"
            raise Refused(f"{tree}: {conflict(tree, chosen, reverse=True)}: changed since. Undo that change.")
        if not check:
            _do(tree, chosen, reverse=True)
        return f"{tree} ({release}): {'can be taken back' if check else 'taken back'}: {names}"
    if applied:
        return f"{tree} ({release}): already applied: {names}"
    changed = changed_files(tree)
    if changed:
        shown = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise Refused(f"{tree}: has changes of its own ({shown}). Commit or stash them.")
    if not fits(tree, chosen):
        raise Refused(f"{tree}: {conflict(tree, chosen)}. Check out {release} as it was released.")
    if not check:
        _do(tree, chosen, reverse=False)
    return f"{tree} ({release}): {'would apply' if check else 'applied'}: {names}"


def git(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in the tree."""
    try:
        return subprocess.run(["git", "-C", str(tree), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Refused("git is not installed. Install it.") from error


def _apply(patches: Sequence[Path], reverse: bool) -> list[str]:
    """One command for all patches: git then applies all of them or none."""
    ordered = reversed(patches) if reverse else patches
    return ["apply", *(["--reverse"] if reverse else []), *map(str, ordered)]


def _do(tree: Path, patches: Sequence[Path], *, reverse: bool) -> None:
    result = git(tree, *_apply(patches, reverse))
    if result.returncode:
        raise Refused(f"{tree}: git refused: {result.stderr.strip()}. Nothing was changed.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 when done, 2 when refused."""
    parser = argparse.ArgumentParser(
        prog="apply_patches.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, help="folder of a Megatron-LM checkout")
    parser.add_argument("--check", action="store_true", help="change nothing, only say whether it could be done")
    parser.add_argument("--revert", action="store_true", help="take the patches back")
    args = parser.parse_args(argv)
    try:
        print(run(args.tree, check=args.check, revert=args.revert))
    except Refused as refused:
        print(f"error: {refused}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
