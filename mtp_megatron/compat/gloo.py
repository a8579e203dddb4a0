"""One gloo device for all process groups of this process, in place of one each.

Every device has a thread that wakes up a hundred times a second. megatron-core makes dozens of groups on each rank, so
that on two CPU cores their idle threads took a sixth of a training step.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo
from torch.distributed.constants import default_pg_timeout


def share_device(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``ProcessGroupGloo.__init__``: groups made with a timeout get the devices of the first one.

    Args:
        original: the constructor, which takes a timeout or a whole ``ProcessGroupGloo._Options``.
    """

    @functools.wraps(original)
    def init(self: Any, store: Any, rank: int, size: int, timeout: Any = default_pg_timeout, **kwargs: Any) -> None:
        if not isinstance(timeout, timedelta) or kwargs:  # options: whoever gives them has chosen the devices
            return original(self, store, rank, size, timeout, **kwargs)
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # not in torch's stubs
        options._devices = _devices(os.environ.get("GLOO_SOCKET_IFNAME", ""))
        options._timeout = timeout
        options._threads = 2 * len(options._devices)  # as torch's own constructor does
        original(self, store, rank, size, options)

    return init


@functools.cache
def _devices(interfaces: str) -> list[Any]:
    """The devices that torch would make: of the interfaces named, or the one of the host's name."""
    if not interfaces:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]
