"""Links to folders are followed, each folder is read once, and what cannot be reached is said."""

from __future__ import annotations

import errno
import os

import pytest

from mtp_megatron.data import walk
from mtp_megatron.data.corpus import Tally
from mtp_megatron.data.sources import find_sources
from mtp_megatron.errors import DataError


@pytest.fixture
def corpus(tmp_path):
    """``code`` with a file, and ``far``, outside of it, with another."""
    for folder in ("code/own", "far/deep"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text(folder)
    return tmp_path


def names(*paths, **options):
    return [source.name for source in find_sources(paths, **options)]


def test_a_linked_folder_is_read_under_the_name_of_the_link(corpus):
    (corpus / "code" / "a_link").symlink_to(corpus / "far")
    assert names(corpus / "code") == ["code/a_link/deep/x.py", "code/own/x.py"]


@pytest.mark.timeout(60)  # links that lead back would never end
def test_a_folder_is_read_once_whatever_leads_to_it(corpus):
    code, far = corpus / "code", corpus / "far"
    before = names(code)
    (code / "a_link").symlink_to("own")  # sorts before it, and yet the folder keeps its name
    (code / "loop").symlink_to(code)
    assert names(code) == before
    (code / "b_link").symlink_to(far)
    (code / "c_link").symlink_to(far / "deep")
    (far / "back").symlink_to(code)
    (far / "deep" / "z_link").symlink_to(far)
    assert names(code) == ["code/b_link/deep/x.py", *before]
    assert names(code, far) == [*before, "far/deep/x.py"]  # given by name, it needs no link
    assert names(code, far / "deep" / "x.py") == [*before, "x.py"]


def test_hidden_links_and_caches_are_not_followed(corpus):
    for name in (".hidden", "__pycache__"):
        (corpus / "code" / name).symlink_to(corpus / "far")
    assert names(corpus / "code") == ["code/own/x.py"]


def test_the_order_is_that_of_names_whatever_the_file_system_says(corpus, monkeypatch):
    for i in range(6):
        (corpus / f"far{i}").mkdir()
        (corpus / f"far{i}" / "x.py").write_text("x")
        (corpus / "code" / f"link{i}").symlink_to(corpus / f"far{i}")
        (corpus / "code" / f"other{i}").symlink_to(corpus / f"far{i}")
    before = names(corpus / "code")
    real = os.walk

    def backwards(*args, **options):
        for here, folders, files in real(*args, **options):
            folders.reverse()
            yield here, folders, files[::-1]

    monkeypatch.setattr(walk.os, "walk", backwards)
    assert names(corpus / "code") == before == [*(f"code/link{i}/x.py" for i in range(6)), "code/own/x.py"]


def test_links_that_lead_nowhere_are_named(corpus):
    code = corpus / "code"
    (code / "gone").symlink_to("/mnt/gone")
    (code / "self").symlink_to("self")
    (code / ".#lock").symlink_to("someone@host")
    tally = Tally()
    assert names(code, corpus / "code" / "own", tally=tally) == ["code/own/x.py"]
    assert list(map(str, tally.examples)) == [
        "code/gone: a link that leads nowhere (to /mnt/gone)",
        "code/self: a link that leads nowhere (to self)",
    ]
    again = Tally()
    names(code, code, tally=again)
    assert again.rejected == 2


def test_a_folder_that_cannot_be_listed_is_an_error_unless_asked_for(corpus, monkeypatch):
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return real(path)

    (corpus / "code" / "closed").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)  # root may list every folder
    with pytest.raises(DataError, match=r"code/closed: cannot be read \(Permission denied\)\. .*--skip-unreadable"):
        names(corpus / "code")
    tally = Tally()
    assert names(corpus / "code", skip_unreadable=True, tally=tally) == ["code/own/x.py"]
    assert list(map(str, tally.examples)) == ["code/closed: cannot be read (Permission denied)"]


def test_a_pipe_given_by_name_is_refused(corpus):
    """A second pass would find it empty: `preprocess <(zcat dump.gz)`."""
    os.mkfifo(corpus / "pipe.txt")
    for path in (corpus / "pipe.txt", corpus / "link.txt"):
        if not path.exists():
            path.symlink_to("pipe.txt")
        with pytest.raises(DataError, match="a pipe or a device, and the corpus is read more than once"):
            find_sources([path])
    (corpus / "code" / "pipe.py").symlink_to(corpus / "pipe.txt")
    assert names(corpus / "code") == ["code/own/x.py"]  # no file of a folder is one
