"""Upstream's own state of the distributed optimizer where buckets end in padding (compat.optimizer_state)."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from mtp_megatron.compat.optimizer_state import padded_checkpoints
from tests.harness import parallel, run_world
from tests.parity import Case, build_chunks, make_parameters, wrap

MENDS = {"not": nullcontext, "for Megatron-LM": padded_checkpoints}


def _saved_masters_are_the_weights(rank: int, world: int, mended: str) -> bool:
    """Whether every fp32 weight in the optimizer's sharded state is its parameter's."""
    case = Case(world=world, distributed_optimizer=True, overlap=True)  # buckets of 2000 elements
    with parallel():
        from megatron.core import parallel_state
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config, chunks = build_chunks(case, make_parameters(case))
        model = wrap(case, config, chunks)
        settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True, overlap_param_gather=True)
        optimizer = get_megatron_optimizer(settings, model)
        optimizer.step()  # of no gradient: it makes the optimizer's state
        model[0].disable_forward_pre_hook()  # gathers the weights
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        with MENDS[mended]():
            state = {"model": chunks[0].sharded_state_dict(metadata=metadata)}
            saved = optimizer.sharded_state_dict(state, metadata=metadata)["param_state"]
        buffers = [buffer for chunk in model for buffer in chunk.buffers]
        assert any(bucket.grad_data.numel() > bucket.numel_unpadded for b in buffers for bucket in b.buckets[:-1])
        parameters = [parameter for buffer in buffers for parameter in buffer.param_index_map]
        return all(torch.equal(saved[i]["param"].data, p.data) for i, p in enumerate(parameters))


@pytest.mark.parametrize("mended", MENDS)
def test_saved_masters_are_the_weights(mended: str) -> None:
    """Without the stand-in they are not: drop it when this fails for ``not``."""
    assert run_world(_saved_masters_are_the_weights, 2, mended) == [mended != "not"] * 2
