"""`imports_that_stay`: no garbage collection inside, and none of what was made there afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from mtp_megatron.imports import imports_that_stay


@pytest.fixture(autouse=True)
def _collecting_again() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_off_inside_and_as_before_afterwards(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with imports_that_stay():
        assert not gc.isenabled()
    assert gc.isenabled() == enabled


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError), imports_that_stay():
        import no_such_module  # noqa: F401
    assert gc.isenabled()


def test_what_was_made_inside_is_not_looked_at_again() -> None:
    before = gc.get_freeze_count()
    with imports_that_stay():
        kept = [[number] for number in range(1000)]
    assert gc.get_freeze_count() >= before + len(kept)
    assert not any(entry is kept for entry in gc.get_objects())


def test_garbage_that_is_there_before_is_not_kept() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()  # or it might be gone already
    gone = weakref.ref(Cycle())
    assert gone() is not None
    with imports_that_stay():
        pass
    assert gone() is None
