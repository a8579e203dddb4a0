"""DeepSpeed as host over gloo: ZeRO 0 to 3, with and without tensor parallelism, trains as megatron-core's loop does.

Not covered here: fp16 and NCCL, which need GPUs; several nodes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed_runs import TIMEOUT, assert_alike, deepspeed_tree, furthest, parameters, zero
from tests.harness import run_world
from tests.training_runs import (
    assert_trained_on_scarce_targets,
    metrics,
    tiny_tree,
    train_body,
    train_on_scarce_targets,
)

pytestmark = pytest.mark.deepspeed

SMALL = {"model__num_trunk_layers": 2, "train__eval_batches": 0}
RUN = {**SMALL, "train__steps": 10, "train__save_interval": 0, "optimizer__clip_grad": 1.0}
LAYOUTS = {"TP1xDP2": (2, 1), "TP2xDP2": (4, 2)}


@pytest.fixture(scope="module")
def seedling(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, whose weights the others start from."""
    run = tmp_path_factory.mktemp("runs") / "seedling"
    tree = tiny_tree(data, run, **{**SMALL, "train__steps": 1, "optimizer__warmup_steps": 0})
    run_world(train_body, 1, tree)
    return run


@pytest.fixture(scope="module")
def megatron(data: Path, seedling: Path) -> dict[tuple[str, int], Path]:
    """What DeepSpeed must reproduce: megatron-core's loop by layout and accumulation, made when first asked for."""

    class Runs(dict):
        def __missing__(self, key: tuple[str, int]) -> Path:
            layout, accumulation = key
            world, tensor = LAYOUTS[layout]
            run = seedling.parent / f"megatron-{layout}-{accumulation}"
            settings = {**RUN, "parallel__tensor": tensor, "train__global_batch_size": 2 * accumulation}
            run_world(train_body, world, tiny_tree(data, run, run__load=str(seedling), **settings))
            self[key] = run
            return run

    return Runs()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_zero_trains_as_megatron_core_does(
    layout: str, stage: int, accumulation: int, data: Path, seedling: Path, megatron: Any, tmp_path: Path
) -> None:
    world, tensor = LAYOUTS[layout]
    run, reference = tmp_path / "run", megatron[layout, accumulation]
    # Accumulation is DeepSpeed's to say: the recipe leaves the global batch open.
    config = zero(stage, gradient_accumulation_steps=accumulation, gradient_clipping=1.0)
    tree = deepspeed_tree(data, run, config, run__load=str(seedling), parallel__tensor=tensor, **RUN)
    del tree["train"]["global_batch_size"]
    assert run_world(train_body, world, tree, timeout=TIMEOUT) == [10] * world
    assert_alike(metrics(run), metrics(reference))
    assert min(record["grad_norm"] for record in metrics(run).values()) > 1.0, "clipping must have been on"
    assert furthest(parameters(run), parameters(reference)) < 1e-5


def guesses_the_scale(rank: int, world_size: int, tree: dict[str, Any]) -> int:
    """Train with a loss scale from each rank's own count of tokens, as if it were everybody's."""
    from mtp_megatron.deepspeed.trainer import DeepSpeedTrainer

    exact = DeepSpeedTrainer._loss_scale
    DeepSpeedTrainer._loss_scale = lambda self, batches: 1.001 * exact(self, batches)
    try:
        return train_body(rank, world_size, tree)
    finally:
        DeepSpeedTrainer._loss_scale = exact


def test_a_scale_that_is_off_by_a_thousandth_would_be_noticed(
    data: Path, seedling: Path, megatron: Any, tmp_path: Path
) -> None:
    run, reference = tmp_path / "run", megatron["TP1xDP2", 1]
    tree = deepspeed_tree(data, run, zero(2), run__load=str(seedling), **{**RUN, "train__global_batch_size": 2})
    run_world(guesses_the_scale, 2, tree, timeout=TIMEOUT)
    assert metrics(run)[1]["grad_norm"] != pytest.approx(metrics(reference)[1]["grad_norm"], rel=1e-5)
    # Clipping and Adam undo a common factor, so it does not show in the parameters; other data does.
    assert furthest(parameters(megatron["TP1xDP2", 2]), parameters(reference)) > 1e-4


def reduces_each_gradient_at_once(rank: int, world_size: int, tree: dict[str, Any]) -> str:
    """Train without telling DeepSpeed that more gradients of a shared parameter are to come."""
    from contextlib import nullcontext

    from mtp_megatron.deepspeed.parameters import ZeroParameters

    told = ZeroParameters.incomplete
    ZeroParameters.incomplete = lambda self, parameters: nullcontext()
    try:
        train_body(rank, world_size, tree)
        return "trained"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        return str(error)
    finally:
        ZeroParameters.incomplete = told


def test_without_the_word_that_more_is_to_come_deepspeed_refuses(data: Path, tmp_path: Path) -> None:
    """Control: the shared norm's gradient arrives once for each head, and is reduced once."""
    tree = deepspeed_tree(data, tmp_path / "run", zero(2), **RUN)
    (said,) = run_world(reduces_each_gradient_at_once, 1, tree, timeout=TIMEOUT, fresh=True)
    assert "has already been reduced" in said


def watches_the_heads(rank: int, world_size: int, tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Train, and record at every head's forward which other heads' parameters are gathered."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    from mtp_megatron.future_heads import FutureHeads

    seen: list[dict[str, Any]] = []
    run_layer = FutureHeads.run_head_layer

    def run_and_look(self: Any, head: int, *args: Any) -> Any:
        output = run_layer(self, head, *args)
        gathered = [
            other
            for other, layer in enumerate(self.heads)
            if any(p.ds_status is ZeroParamStatus.AVAILABLE and p.dim() > 1 for p in layer.parameters())
        ]
        unembedding = self.parameter_access.unembeddings[0].ds_status is ZeroParamStatus.AVAILABLE
        seen.append({"head": head, "gathered": gathered, "unembedding": unembedding})
        return output

    FutureHeads.run_head_layer = run_and_look
    try:
        train_body(rank, world_size, tree)
    finally:
        FutureHeads.run_head_layer = run_layer
    return seen


def test_zero_3_gathers_one_head_at_a_time_and_runs_each_once(data: Path, tmp_path: Path) -> None:
    config = zero(3)
    config["zero_optimization"] |= {
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    }
    settings = {**RUN, "train__steps": 3, "train__global_batch_size": 4, "heads__n": 4}
    for seen in run_world(
        watches_the_heads, 2, deepspeed_tree(data, tmp_path / "run", config, **settings), timeout=TIMEOUT
    ):
        # 3 steps of 2 microbatches, each head once in each: no forward runs twice.
        assert [entry["head"] for entry in seen] == [0, 1, 2, 3] * 6
        for entry in seen:
            assert set(entry["gathered"]) <= {entry["head"]}, "another head's parameters were left gathered"
            assert not entry["unembedding"], "the unembedding is gathered for the losses alone"


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no ZeRO, sequence parallel": ({**zero(0)}, {"parallel__tensor": 2, "parallel__sequence_parallel": True}),
    "ZeRO 2, sequence parallel, norms of queries and keys": (
        zero(2),
        {"parallel__tensor": 2, "parallel__sequence_parallel": True, "model__qk_norm": True},
    ),
    "ZeRO 1, context parallel": (zero(1), {"parallel__context": 2}),
    "ZeRO 3, tied embeddings": (zero(3), {"model__tied_embeddings": True}),
    "ZeRO 2, tied embeddings, causal heads": (
        zero(2),
        {"model__tied_embeddings": True, "heads__arrangement": "causal"},
    ),
    "ZeRO 3, replicated unembeddings, a curriculum, a z-loss": (
        zero(3),
        {"heads__unembedding": "replicated", "heads__curriculum_steps": 4, "heads__z_loss": 0.05},
    ),
    "ZeRO 3, Medusa heads, attention recomputed": (
        zero(3),
        {"heads__kind": "medusa", "train__recompute": "selective"},
    ),
    "ZeRO 3, the trunk recomputed": (zero(3), {"train__recompute": "full"}),
    "ZeRO 2, a frozen trunk": (zero(2), {"heads__trainable": "heads"}),
    "ZeRO 3, a frozen trunk": (zero(3), {"heads__trainable": "heads"}),
    "ZeRO 1, all heads at once": (zero(1), {"heads__execution": "joint"}),
    "ZeRO 1, overlapped": ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, {}),
    "ZeRO 2, overlapped": ({"zero_optimization": {"stage": 2, "overlap_comm": True}}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_train_as_under_megatron_core(name: str, data: Path, tmp_path: Path) -> None:
    config, settings = SETTINGS[name]
    common = {**RUN, "train__steps": 3, "train__eval_batches": 1, "train__eval_interval": 2, **settings}
    config = {**config, "gradient_clipping": 1.0}
    run, reference = tmp_path / "run", tmp_path / "reference"
    run_world(train_body, 2, tiny_tree(data, reference, **common))
    run_world(train_body, 2, deepspeed_tree(data, run, config, **common), timeout=TIMEOUT)
    for kind in ("train", "valid"):
        assert_alike(metrics(run, kind), metrics(reference, kind))


EXAMPLES = sorted((Path(__file__).parents[2] / "examples/deepspeed").glob("*.json"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_train(example: Path, data: Path, tmp_path: Path) -> None:
    tree = deepspeed_tree(data, tmp_path / "run", json.loads(example.read_text()), **{**RUN, "train__steps": 6})
    assert run_world(train_body, 2, tree, timeout=TIMEOUT) == [6, 6]
    first, *_, last = (record["loss"] for record in metrics(tmp_path / "run").values())
    assert last < first


@pytest.mark.parametrize("stage", [0, 3])
def test_heads_without_a_target_in_a_global_batch_do_not_end_the_run(stage: int, data: Path, tmp_path: Path) -> None:
    tree = deepspeed_tree(data, tmp_path / "run", zero(stage), **{**RUN, "train__steps": 3})
    assert run_world(train_on_scarce_targets, 2, tree, 2, timeout=TIMEOUT) == [3, 3]
    assert_trained_on_scarce_targets(tmp_path / "run")


OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
SUMS_IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}  # as in examples/deepspeed and megatron-core's loop
BF16: dict[str, dict[str, Any]] = {
    "ZeRO 0": zero(0),
    "ZeRO 1, optimizer offloaded": {"zero_optimization": {"stage": 1, **OFFLOADED}},
    "ZeRO 2, sums in fp32": {"zero_optimization": {"stage": 2}, **SUMS_IN_FP32},
    "ZeRO 3, sums in fp32": {"zero_optimization": {"stage": 3}, **SUMS_IN_FP32},
    "ZeRO 3, all offloaded": {"zero_optimization": {"stage": 3, **OFFLOADED, "offload_param": {"device": "cpu"}}},
}


@pytest.mark.parametrize("name", BF16)
def test_bf16_and_offload_to_the_cpu_learn(name: str, data: Path, tmp_path: Path) -> None:
    """fp16 is refused on a machine without a GPU (tests/unit/test_deepspeed_settings.py)."""
    config = {**BF16[name], "bf16": {"enabled": True}}
    config["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}  # its own takes a minute to compile
    tree = deepspeed_tree(data, tmp_path / "run", config, **{**RUN, "train__steps": 20})
    run_world(train_body, 2, tree, timeout=TIMEOUT)
    losses = [record["loss"] for record in metrics(tmp_path / "run").values()]
    assert losses[-1] < losses[0] - 0.5
