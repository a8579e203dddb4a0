"""Which tensors of a stage with heads before the last are another stage's to write."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from mtp_megatron import compat

compat.prepare()

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # noqa: E402

from mtp_megatron.copies import sharded_state_with_copies  # noqa: E402


def test_extra_states_of_copies_are_not_written_twice() -> None:
    """Transformer Engine's norm has one, torch's has none: two main replicas of it ended every save."""

    def weight(name: str) -> ShardedTensor:
        return ShardedTensor.from_rank_offsets(name, torch.ones(2), replica_id=(0, 0, 0))

    def extra(name: str) -> ShardedObject:
        return ShardedObject(name, None, (1,), (0,), replica_id=(0, 0, 0))

    stage = SimpleNamespace(post_process=False)
    asked: list[bool] = []

    def upstream() -> dict[str, Any]:
        asked.append(stage.post_process)
        weights = ("final_norm.weight", "output_layer.weight", "heads.0.input_layernorm.weight")
        extras = ("final_norm._extra_state", "heads.0.input_layernorm._extra_state")
        return {f"x.{name}": weight(name) for name in weights} | {f"x.{name}": extra(name) for name in extras}

    state = sharded_state_with_copies(stage, upstream, "x.")  # type: ignore[arg-type]
    assert asked == [True]
    assert not stage.post_process
    assert {name for name, value in state.items() if value.replica_id == (1, 0, 0)} == {
        "x.final_norm.weight",
        "x.final_norm._extra_state",
        "x.output_layer.weight",
    }
