"""The distributed optimizer's state in checkpoints (compat.optimizer_state): upstream's numbers, in far less memory.

Not covered here: copies from and to a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mtp_megatron.compat import optimizer_state
from mtp_megatron.compat.checkpoints import chained
from mtp_megatron.compat.optimizer_state import padded_checkpoints, placed_parameters, state_stays_on_its_ranks
from mtp_megatron.compat.versions import EnvironmentUnsupported
from tests.harness import parallel, run_world
from tests.parity import Case, build_chunks, make_parameters, wrap
from tests.training_runs import (
    interrupted_copy,
    largest_difference,
    metrics,
    tiny_tree,
    train_body,
    train_in_small_buckets,
)

CASES = {
    "DP2, padded buckets": Case(world=2, overlap=True),
    "DP4, padded buckets": Case(world=4, overlap=True),
    "DP4, one bucket": Case(world=4),
    "TP2xDP2, tied": Case(world=4, tp=2, tied=True),
    "PP2xDP2": Case(world=4, pp=2),
    "CP2xDP2, bf16": Case(world=4, cp=2, dtype=torch.bfloat16),
    "EP2xDP2": Case(world=4, ep=2, experts=2, num_trunk_layers=3),  # a rank has three, and shares the second
}


def _on_its_ranks(seconds: float = 60.0) -> AbstractContextManager[None]:
    return state_stays_on_its_ranks(timedelta(seconds=seconds))


def _as_before(timeout: timedelta) -> AbstractContextManager[None]:
    """In place of ``state_stays_on_its_ranks``: upstream's way, that of earlier releases."""
    return padded_checkpoints()


def _optimizer(case: Case) -> tuple[Any, list[torch.nn.Module]]:
    """A distributed optimizer after a step of random gradients, and the model chunks."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    case = Case(**{**vars(case), "distributed_optimizer": True})
    config, chunks = build_chunks(case, make_parameters(case))
    model = wrap(case, config, chunks)
    bf16 = case.dtype == torch.bfloat16
    settings = OptimizerConfig(
        optimizer="adam",
        lr=1e-3,
        bf16=bf16,
        params_dtype=case.dtype,
        use_distributed_optimizer=True,
        overlap_param_gather=case.overlap,
    )
    optimizer = get_megatron_optimizer(settings, model)
    for chunk in model:
        for parameter in chunk.parameters():
            parameter.main_grad.normal_()
    optimizer.step()
    if case.overlap:
        model[0].disable_forward_pre_hook()  # gathers the weights
    return optimizer, chunks


def _state_by_optimizer(
    optimizer: Any, chunks: list[torch.nn.Module], way: Callable[[], AbstractContextManager[None]]
) -> list[dict[int, dict[str, Any]]]:
    """What each of the optimizers that ``optimizer`` is made of would save on this rank."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    with way():
        model = {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
        parts = [part.sharded_state_dict(model, metadata=metadata)["param_state"] for part in chained(optimizer)]
    return [{} if isinstance(part, LocalNonpersistentObject) else part for part in parts]


def _same_as_upstream(rank: int, world_size: int, case: Case, elements: int) -> None:
    with (
        parallel(tp=case.tp, pp=case.pp, cp=case.cp, ep=case.ep),
        mock.patch.object(optimizer_state, "ROUND", elements),
    ):
        optimizer, chunks = _optimizer(case)
        whole = _state_by_optimizer(optimizer, chunks, padded_checkpoints)
        mine = _state_by_optimizer(optimizer, chunks, _on_its_ranks)
        for part, ours, theirs in zip(chained(optimizer), mine, whole, strict=True):
            assert any(len(placed.parts) > 1 for placed in placed_parameters(part)), "nothing to exchange"
            saved: list[Any] = [None] * part.data_parallel_group.size()
            dist.all_gather_object(saved, list(ours), group=part.data_parallel_group)
            assert sorted(index for indices in saved for index in indices) == sorted(theirs), "once each"
            for index, tensors in ours.items():
                assert list(tensors) == ["param", "exp_avg", "exp_avg_sq"]
                for key, tensor in tensors.items():
                    upstream = theirs[index][key]
                    assert type(tensor) is type(upstream)
                    assert tensor.key == upstream.key
                    assert tensor.replica_id == (*upstream.replica_id[:2], 0)
                    assert torch.equal(tensor.data, upstream.data), (index, key)


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_upstream_gathers_and_each_parameter_is_saved_once(name: str) -> None:
    case = CASES[name]
    run_world(_same_as_upstream, case.world, case, optimizer_state.ROUND)


def _trained_in_rounds(rank: int, world_size: int, tree: dict[str, Any], elements: int) -> int:
    with mock.patch.object(optimizer_state, "ROUND", elements):
        return train_in_small_buckets(rank, world_size, tree)


@pytest.mark.parametrize("elements", [1, 5000])
def test_ranks_whose_rounds_differ_do_not_wait_for_one_another_in_a_circle(
    elements: int, data: Path, tmp_path: Path
) -> None:
    """Each rank cuts the parameters that it shares into rounds of its own: of one, or of a few."""
    run_world(_same_as_upstream, 4, CASES["DP4, padded buckets"], elements)
    whole = tmp_path / "whole"
    settings = {"optimizer__distributed": True, "optimizer__overlap_grad_reduce": True, "train__eval_batches": 0}
    run_world(_trained_in_rounds, 4, tiny_tree(data, whole, **settings), elements)
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=4)
    run_world(_trained_in_rounds, 4, tiny_tree(data, resumed, **settings), elements)
    assert metrics(resumed) == metrics(whole)


def _alone(rank: int, world_size: int, case: Case, part: int) -> tuple[str, float]:
    """Rank 0 saves an optimizer's state, and the others do not come."""
    with parallel(ep=case.ep):
        optimizer, chunks = _optimizer(case)
        said, begin = "", time.monotonic()
        if rank == 0:
            model = {f"model{i}": chunk.sharded_state_dict(metadata={}) for i, chunk in enumerate(chunks)}
            with _on_its_ranks(seconds=2.0), pytest.raises(RuntimeError) as error:
                chained(optimizer)[part].sharded_param_state_fully_reshardable(model, False)
            said = str(error.value)
        waited = time.monotonic() - begin
        dist.barrier()
        return said, waited


@pytest.mark.parametrize("part", [0, 1], ids=["dense", "experts"])
def test_a_rank_that_does_not_come_is_not_waited_for_beyond_the_jobs_timeout(part: int) -> None:
    """Experts' gloo groups have torch's 30 minutes."""
    (said, waited), *_ = run_world(_alone, 4, CASES["EP2xDP2"], part, timeout=60)
    assert "Timed out waiting 2000ms" in said
    assert waited < 20


def _peaks(rank: int, world_size: int, tree: dict[str, Any], old: bool, torchs_writer: bool) -> dict[str, int]:
    """Most bytes of tensors made at a time by a save and by a load, and what each may take."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from mtp_megatron import compat
    from mtp_megatron.data.blend import load_blend
    from mtp_megatron.planning.checkpoint_memory import checkpoint_host_memory, host_copies
    from mtp_megatron.planning.cost import rank_costs
    from mtp_megatron.planning.live_memory import LiveMemory
    from mtp_megatron.training import checkpoint_writer, checkpointing
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.validate import check_recipe
    from mtp_megatron.training.world import model_parallel_world

    compat.prepare()
    from megatron.core import distributed

    data = load_blend([(None, tree["data"]["path"])])
    whole_config = distributed.DistributedDataParallelConfig
    recipe = check_recipe(parse_recipe(tree), world_size=world_size, tokenizer_vocab_size=data.first.vocab_size)
    way = _as_before if old else state_stays_on_its_ranks
    writer = FileSystemWriter if torchs_writer else checkpoint_writer.TensorByTensor
    with (
        model_parallel_world(recipe),
        mock.patch.object(checkpointing, "state_stays_on_its_ranks", way),
        mock.patch.object(checkpoint_writer, "TensorByTensor", writer),
        mock.patch.object(
            distributed, "DistributedDataParallelConfig", lambda **of: whole_config(bucket_size=2**15, **of)
        ),
    ):
        trainable = build_trainable(recipe)
        for parameter in trainable.models[0].parameters():
            parameter.main_grad.fill_(1e-3)
        trainable.update()
        (optimizer,) = chained(trainable.optimizer)
        placed = placed_parameters(optimizer)
        shared = [each for each in placed if rank in each.parts and len(each.parts) > 1]
        sizes = [each.parameter.numel() for each in placed]
        owned = 12 * sum(each.parameter.numel() for each in shared if each.owner == rank)
        received = 12 * sum(each.parts[rank][1] - each.parts[rank][0] for each in shared if each.owner != rank)
        rest = 2**16  # states of random generators, Adam's steps
        result = {
            "parameters": sum(sizes),
            "shared": sum(each.parameter.numel() for each in placed if len(each.parts) > 1),
            "owned": owned // 12,
            "largest": max(sizes),
            "planned": checkpoint_host_memory(recipe, rank_costs(recipe, world_size)[0], world_size),
            "copies planned": host_copies(recipe, rank_costs(recipe, world_size)[0], world_size),
            "save may": owned + 4 * max(sizes) + rest,
            "load may": owned + max(received, 8 * max(sizes)) + rest,
        }
        checkpoints = Path(tree["run"]["path"])
        trained = [
            *trainable.models[0].parameters(),
            *(p for group in optimizer.optimizer.param_groups for p in group["params"]),
        ]
        trained += [state[key] for state in optimizer.optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
        with LiveMemory() as memory:
            for tensor in trained:
                tensor.detach()  # it is seen as there before
            before = memory.current
            memory.restart_peak()
            folder = checkpointing.save_checkpoint(recipe, data, trainable, checkpoints, 3)
            result["save"] = memory.peak - before
            memory.restart_peak()
            checkpointing.load_checkpoint(recipe, trainable, folder)
            result["load"] = memory.peak - before
            memory.restart_peak()
            pending = checkpointing.begin_save(recipe, data, trainable, checkpoints, 4)
            pending.wait(1.0, lambda: None)
            result["copies"] = pending.publish().largest
            result["save from copies"] = memory.peak - before
        return result


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("small_buckets", [False, True])
def test_a_save_and_a_load_take_memory_for_a_ranks_share(
    world: int, small_buckets: bool, data: Path, tmp_path: Path
) -> None:
    """In small buckets ranks share every parameter."""
    tree = tiny_tree(data, tmp_path / "run", model__hidden_size=128, model__ffn_hidden_size=256)
    tree["optimizer"] |= {"distributed": True, "overlap_grad_reduce": small_buckets}
    ranks = run_world(_peaks, world, tree, False, False)
    most = max(max(taken["save"], taken["load"]) for taken in ranks)
    assert most <= ranks[0]["planned"] < 3 * most, "what mtp-megatron plan says"
    assert ranks[0]["copies"] <= ranks[0]["copies planned"] < 1.5 * ranks[0]["copies"], "of the rank with most"
    for taken in ranks:
        assert taken["save from copies"] <= taken["save may"] + taken["copies planned"]
        assert taken["save"] <= taken["save may"]
        assert taken["load"] <= taken["load may"]
        assert taken["owned"] <= taken["shared"] / world + taken["largest"]
        if small_buckets:
            assert taken["shared"] > taken["parameters"] / 2
        else:
            assert taken["save may"] < 2 * taken["parameters"]


def test_it_would_be_noticed_if_they_took_more(data: Path, tmp_path: Path) -> None:
    """Control of the test above: upstream's way and torch's own writer."""
    tree = tiny_tree(data, tmp_path / "run", model__hidden_size=128, model__ffn_hidden_size=256)
    tree["optimizer"]["distributed"] = True
    for taken in run_world(_peaks, 2, tree, True, False):
        assert taken["save"] > 24 * taken["parameters"]
        assert taken["load"] > 12 * taken["parameters"]
    tree["run"]["path"] = str(tmp_path / "other")
    first, _ = run_world(_peaks, 2, tree, False, True)
    assert first["save"] > 4 * first["parameters"] > first["save may"]


def _trained_as_before(rank: int, world_size: int, tree: dict[str, Any]) -> int:
    """For ``run_world``: train with checkpoints as releases before this one wrote and read them."""
    from mtp_megatron.training import checkpointing

    with mock.patch.object(checkpointing, "state_stays_on_its_ranks", _as_before):
        return train_body(rank, world_size, tree)


@pytest.mark.parametrize(
    ("first", "then"), [(_trained_as_before, train_body), (train_body, _trained_as_before)], ids=["forward", "back"]
)
def test_checkpoints_pass_between_this_release_and_earlier_ones(
    first: Callable[..., int], then: Callable[..., int], data: Path, tmp_path: Path
) -> None:
    whole, common = tmp_path / "whole", {"optimizer__distributed": True, "train__eval_batches": 0}
    run_world(first, 4, tiny_tree(data, whole, parallel__tensor=2, **common))
    same = interrupted_copy(whole, tmp_path / "same", step=4)
    run_world(then, 4, tiny_tree(data, same, parallel__tensor=2, **common))
    assert metrics(same) == metrics(whole)
    other = interrupted_copy(whole, tmp_path / "other", step=4)
    run_world(then, 4, tiny_tree(data, other, parallel__pipeline=2, **common))
    assert largest_difference(metrics(other), metrics(whole)) < 1e-5


def _refused(rank: int, world_size: int) -> list[str]:
    case = Case(world=world_size)
    said = []
    with parallel():
        optimizer, chunks = _optimizer(case)
        (inner,) = chained(optimizer)
        group, inner.data_parallel_group_gloo = inner.data_parallel_group_gloo, None
        with pytest.raises(EnvironmentUnsupported) as error:
            _state_by_optimizer(optimizer, chunks, _on_its_ranks)
        said.append(str(error.value))
        inner.data_parallel_group_gloo = group
        for ranges in inner.gbuf_ranges[0].values():
            next(iter(ranges[0]["param_map"].values()))["param"].end -= 1
        with pytest.raises(EnvironmentUnsupported) as error:
            _state_by_optimizer(optimizer, chunks, _on_its_ranks)
        said.append(str(error.value))
    return said


def test_what_it_needs_of_megatron_core_is_checked() -> None:
    for without_gloo, other_cuts in run_world(_refused, 2):
        assert "create_gloo_process_groups=True" in without_gloo
        assert "its state cannot be saved or loaded" in other_cuts


def test_ranks_that_own_nothing_save_and_resume(data: Path, tmp_path: Path) -> None:
    """All that is trained is one matrix, of which each of four ranks holds a quarter."""
    one = {
        "heads__n": 1,
        "heads__kind": "linear",
        "train__steps": 1,
        "optimizer__warmup_steps": 0,
        "train__eval_batches": 0,
    }
    run_world(train_body, 1, tiny_tree(data, tmp_path / "one", **one))
    settings = {
        "heads__n": 2,
        "heads__kind": "linear",
        "heads__trainable": "new_heads",
        "optimizer__distributed": True,
        "run__load": str(tmp_path / "one"),
    }
    whole = tmp_path / "whole"
    run_world(train_body, 4, tiny_tree(data, whole, **settings))
    resumed = interrupted_copy(whole, tmp_path / "resumed", step=4)
    run_world(train_body, 4, tiny_tree(data, resumed, **settings))
    assert metrics(resumed) == metrics(whole)
