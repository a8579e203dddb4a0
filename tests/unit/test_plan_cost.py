"""The cost model against the trace, which runs the code that trains; presets, layouts, refusals, the command line.

The models have their full width and sequence, and few layers: what a layer takes is what the formulas are about.
Not covered here: GPUs, and estimated times, which depend on figures that the user gives.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mtp_megatron import cli
from mtp_megatron.errors import ConfigError
from mtp_megatron.planning import cost
from mtp_megatron.planning.checkpoint_memory import checkpoint_host_memory
from mtp_megatron.planning.cli import checked
from mtp_megatron.planning.cost import RankCost, rank_costs
from mtp_megatron.planning.estimate import Hardware, estimate
from mtp_megatron.planning.presets import PRESETS, balanced_layout, read_plan
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.shapes import Sizes

OWN = "train.transformer_engine=false"
TWO_STAGES = ["parallel.pipeline=2", "model.num_trunk_layers=4", "heads.n=2", "parallel.layout=Ettt|tL"]
ONE_LAYER = ["model.num_trunk_layers=1", "heads.n=1"]
TIED = ["model.tied_embeddings=true", "model.vocab_size=65536", "train.seq_length=512", "train.precision=fp32"]
BYTES = ["model.vocab_size=256"]
REPLICATED = ["heads.n=3", "heads.unembedding=replicated"]
# name: pipeline ranks to trace, GPUs, settings
CASES: dict[str, tuple[list[int], int, list[str]]] = {
    "1.3B": ([0], 4, ["model.num_trunk_layers=4"]),
    "7B": ([0], 8, ["model.num_trunk_layers=4"]),
    "13B": ([0, 1], 16, ["model.num_trunk_layers=4", "parallel.layout=Ettt|tL"]),
    "34B": ([0, 1, 3], 64, ["model.num_trunk_layers=8", "parallel.layout=Ettt|ttt|tt|L"]),
    "70B": ([0, 3, 7], 128, ["model.num_trunk_layers=15", "parallel.layout=Ett|tt|tt|tt|tt|tt|tt|tL"]),
    "13B recomputed": (
        [0, 1],
        16,
        ["model.num_trunk_layers=6", "parallel.layout=Ettt|tttL", "train.recompute=full", "heads.n=2"],
    ),
    "7B interleaved": (
        [0, 1],
        4,
        [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "model.num_trunk_layers=5",
            "parallel.layout=Ett|t|tt|L",
        ],
    ),
    "1.3B norms of queries": ([0], 4, ["model.num_trunk_layers=4", "model.qk_norm=true"]),
    "13B selective": ([0], 16, ["model.num_trunk_layers=4", "parallel.layout=Ettt|tL", "train.recompute=selective"]),
    "13B context": ([1], 32, ["model.num_trunk_layers=4", "parallel.layout=Ettt|tL", "parallel.context=2"]),
    "7B spread": (
        [1, 2],
        12,
        ["parallel.pipeline=3", "model.vocab_size=128000", "model.num_trunk_layers=4", "parallel.layout=Ettt|tm|mmmL"],
    ),
    "7B spread and interleaved": (
        [0],
        4,
        [
            "parallel.pipeline=2",
            "parallel.virtual_pipeline=2",
            "model.num_trunk_layers=5",
            "parallel.layout=Ettt|tt|mm|mmL",
        ],
    ),
    # the embedding's gradient outweighs what a layer's backward pass adds
    "1.3B large vocabulary": (
        [0],
        8,
        [*TWO_STAGES, "model.vocab_size=128256", "train.recompute=full"],
    ),
    # many tokens for the matrices' width: SwiGLU's gradient outweighs those of the matrices
    "1.3B large microbatch": (
        [0],
        2,
        [*TWO_STAGES, "parallel.layout=Et|tttL", "train.micro_batch_size=4", "train.recompute=full"],
    ),
    # the heads' gradient of the embedding waits for its own
    "1.3B tied": ([0], 1, [*ONE_LAYER, *TIED]),
    "1.3B tied, spread": ([0], 2, [*ONE_LAYER, *TIED, "heads.n=2", "parallel.pipeline=2", "parallel.layout=Etm|mL"]),
    # heads that are no layers; with a vocabulary of bytes their backward pass outweighs their loss
    "1.3B linear, bytes": ([0], 1, [*ONE_LAYER, *REPLICATED, "heads.kind=linear", *BYTES]),
    "1.3B Medusa, fp32": ([0], 1, [*ONE_LAYER, *REPLICATED, "heads.kind=medusa", "train.precision=fp32"]),
    "1.3B Medusa alone, bytes, own": (
        [1],
        2,
        [*ONE_LAYER, *BYTES, "heads.n=2", "heads.kind=medusa", "parallel.pipeline=2", "parallel.layout=Et|L", OWN],
    ),
    # few tokens, and gradients that are clipped in place, as Transformer Engine does
    "1.3B clipped": (
        [0],
        2,
        [*TWO_STAGES, "model.vocab_size=65536", "model.seq_length=128", "parallel.layout=Et|tttL"],
    ),
    # all layers of a chain wait while the first of its unembeddings gets a gradient
    "1.3B chain": ([0], 1, [*ONE_LAYER, *REPLICATED, "heads.arrangement=causal", "heads.n=4", "train.seq_length=2048"]),
    # megatron-core's own kernels, which keep the softmax
    "1.3B own": ([0], 4, ["model.num_trunk_layers=2", "heads.n=2", OWN]),
    "1.3B own, fp32": ([0], 4, ["model.num_trunk_layers=2", "heads.n=2", "train.precision=fp32", OWN]),
    "1.3B own, norms of queries": (
        [0],
        4,
        ["model.num_trunk_layers=2", "heads.n=2", "model.qk_norm=true", "train.precision=fp32", OWN],
    ),
    "1.3B own, recomputed": (
        [0],
        4,
        ["model.num_trunk_layers=3", "heads.n=2", "model.num_query_groups=4", "train.recompute=full", OWN],
    ),
    # what a stage has sent is freed, as on a GPU
    "1.3B own, sent": (
        [0],
        4,
        [
            *("parallel.pipeline=4", "model.num_trunk_layers=4", "heads.n=1", "parallel.layout=Et|t|t|tL"),
            *("model.seq_length=256", "train.micro_batch_size=32", "train.recompute=full", OWN),
        ],
    ),
    # few tokens: Adam, which takes all parameters at once, needs more than the heads
    "1.3B own, Adam": ([0], 1, ["model.num_trunk_layers=4", "heads.n=1", "model.seq_length=128", OWN]),
    "7B own": ([0, 1], 8, [*TWO_STAGES, OWN]),
    "7B own, selective": (
        [0, 1],
        8,
        [*TWO_STAGES, "model.num_query_groups=8", "train.recompute=selective", OWN],
    ),
    "7B own, context": ([0, 1], 16, [*TWO_STAGES, "parallel.context=2", OWN]),
    "7B own, short": ([0, 1], 8, [*TWO_STAGES, "model.seq_length=256", "train.micro_batch_size=16", OWN]),
}


def planned(case: str) -> tuple[Recipe, int]:
    _, gpus, settings = CASES[case]
    return checked(read_plan(case.partition(" ")[0], settings), gpus), gpus


@pytest.mark.parametrize(("case", "rank"), [(case, rank) for case, (ranks, _, _) in CASES.items() for rank in ranks])
def test_memory_is_within_a_twentieth_of_the_trace(case: str, rank: int) -> None:
    from mtp_megatron.planning.trace import trace_rank

    recipe, gpus = planned(case)
    formula = rank_costs(recipe, gpus)[rank]
    trace = trace_rank(recipe, rank * gpus // recipe.parallel.pipeline, gpus)
    assert trace.fused_kernels == (OWN not in CASES[case][2])
    assert formula.parameters == trace.parameters
    standing = formula.memory - formula.activations
    assert standing == pytest.approx(trace.memory.standing, rel=0.005)
    coming_and_going = trace.memory.peak - trace.memory.standing
    print(case, rank, formula.memory / trace.memory.peak, formula.activations / coming_and_going)
    assert formula.memory == pytest.approx(trace.memory.peak, rel=0.05)
    assert formula.activations == pytest.approx(coming_and_going, rel=0.05)  # the rest is exact


def test_a_change_on_one_side_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: had a layer kept a fifth less, the comparison above would fail for the first of its cases."""
    recipe, gpus = planned("13B")
    before = rank_costs(recipe, gpus)[0]
    whole = cost.layer_activations
    monkeypatch.setattr(cost, "layer_activations", lambda *args: whole(*args) * 4 // 5)
    after = rank_costs(recipe, gpus)[0]
    assert after.activations != pytest.approx(before.activations, rel=0.15)


def test_the_mask_of_documents_takes_what_the_trace_says() -> None:
    """On a stage that otherwise reads no data: one for each microbatch in flight, in place of one for each layer."""
    from mtp_megatron.planning.trace import trace_rank

    cut = ["parallel.pipeline=4", "parallel.tensor=1", "parallel.layout=null", "model.num_trunk_layers=4", "heads.n=2"]
    planned, traced, batches = [], [], []
    for documents in ("false", "true"):
        settings = [*cut, "train.recompute=full", OWN, f"data.reset_attention_mask={documents}"]
        recipe = checked(read_plan("1.3B", settings), 4)
        planned.append(rank_costs(recipe, 4)[1].memory)
        memory = trace_rank(recipe, 1, 4).memory
        traced.append(memory.peak)
        batches.append(memory.categories["batch"])
    more = 2 * recipe.train_seq_length**2  # three in flight, in place of one layer's own
    assert planned[1] - planned[0] == more
    assert traced[1] - traced[0] == pytest.approx(more, rel=0.01)  # the tokens themselves are the rest
    assert batches[0] == 0
    assert batches[1] == pytest.approx(3 * recipe.train_seq_length**2, rel=0.05)


def test_boundaries_of_documents_take_nothing() -> None:
    """Transformer Engine's attention takes those in place of a mask."""
    few = ["model.num_trunk_layers=4", "heads.n=1"]
    plain, within = (
        rank_costs(checked(read_plan("1.3B", [*few, f"data.reset_attention_mask={on}"]), 1), 1)[0].memory
        for on in ("false", "true")
    )
    assert plain == within


def test_a_fused_adam_takes_nothing() -> None:
    """And torch's 4 bytes for every parameter of the shard, where that outweighs the passes."""
    few = ["model.num_trunk_layers=4", "heads.n=1", "model.seq_length=128"]
    own, fused = (rank_costs(checked(read_plan("1.3B", [*few, *kernels]), 1), 1)[0] for kernels in ([OWN], []))
    assert own.peak.optimizer == 4 * own.parameters
    assert own.activations == own.peak.optimizer + 2 * 16 * 128 * 128  # Megatron's buffer for scores, in bf16
    assert fused.peak.optimizer == 0
    assert fused.activations == fused.peak.kept + max(fused.peak.layer, fused.peak.heads) + fused.peak.exchange


def test_the_value_is_kept_without_the_queries_and_keys_beside_it() -> None:
    """As Transformer Engine keeps it. A layer of Llama 2 7B without tensor parallelism, in channels of a token."""
    widths = {}
    for settings in ("train.recompute=null", "train.recompute=selective"):
        recipe = checked(read_plan("7B", ["parallel.tensor=1", settings]), 1)
        tokens = 4096
        widths[settings] = cost.layer_activations(recipe, Sizes.of(recipe)) / (2 * tokens) - 2 * 32  # numbers per row
    h, f, rows = 4096, 11008, 2 * 2
    assert widths["train.recompute=null"] == 4 * h + 3 * f + 4 * h + rows
    assert widths["train.recompute=selective"] == 4 * h + 3 * f + 6 * h + rows


def test_the_300m_recipe_fits_a_gpu_without_transformer_engine() -> None:
    """Its softmax kept for 26 layers in flight would be 78 GiB of a stage; the recipe makes it again."""
    path, vocabulary = "examples/recipes/gpu_300m.yaml", "model.vocab_size=32000"
    peaks = {}
    for kind in ("null", "selective"):
        costs = rank_costs(checked(read_plan(path, [vocabulary, f"train.recompute={kind}"]), 8), 8)
        peaks[kind] = max(cost.memory for cost in costs)
    assert peaks["null"] == pytest.approx(95.3 * 2**30, rel=0.01)  # as traced
    assert peaks["selective"] == pytest.approx(19.94 * 2**30, rel=0.01)
    assert read_plan(path).train.recompute == "selective"


def total(costs: list[RankCost], tensor: int) -> int:
    return tensor * sum(rank.parameters for rank in costs)


@pytest.mark.parametrize(
    ("name", "parameters"), list(zip(PRESETS, (1.36e9, 6.7e9, 13.0e9, 33.7e9, 69.0e9), strict=True))
)
def test_presets_have_the_size_that_they_are_named_after(name: str, parameters: float) -> None:
    recipe = checked(read_plan(name), None)
    costs = rank_costs(recipe, recipe.smallest_world)
    assert total(costs, recipe.parallel.tensor) == pytest.approx(parameters, rel=0.03)
    assert sum(rank.layers for rank in costs) == recipe.model.num_trunk_layers
    assert [rank.heads for rank in costs] == [0] * (len(costs) - 1) + [4]


def test_every_stage_with_heads_has_its_own_norm_and_unembedding() -> None:
    """And sums the unembedding's gradient with the others at the end of a step, which counts as network time."""
    cut = ["parallel.pipeline=2", "parallel.tensor=1", "model.num_trunk_layers=4"]
    costs, reductions = {}, {}
    for layout in ("Etttt|L", "Ettttmm|mmL"):
        recipe = checked(read_plan("7B", [*cut, f"parallel.layout={layout}"]), 2)
        costs[layout] = rank_costs(recipe, 2)
        reductions[layout] = estimate(recipe, 2, Hardware(network=50, gpus_per_node=1)).terms.reduction
    end, spread = costs.values()
    table = 32000 * 4096
    assert total(spread, 1) - total(end, 1) == table + 4096
    assert [sum(rank.head_flops) for rank in spread] == [pytest.approx(sum(end[1].head_flops) / 2)] * 2
    assert spread[0].main_gradients - end[0].main_gradients > 4 * table
    assert list(reductions.values()) == [0, pytest.approx(8 * table / 2 / 50e9)]


def test_heads_come_off_the_trunk_unless_it_is_given() -> None:
    assert read_plan("7B").model.num_trunk_layers == 28
    assert read_plan("7b", ["heads.n=8"]).model.num_trunk_layers == 24
    assert read_plan("7B", ["model.num_trunk_layers=30", "heads.n=8"]).model.num_trunk_layers == 30


def test_a_hugging_face_model(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = checked(read_plan(str(tmp_path), ["parallel.tensor=4"]), None)
    assert (recipe.model.num_trunk_layers, recipe.parallel.sequence_parallel) == (28, True)
    assert total(rank_costs(recipe, 4), 4) == pytest.approx(8.03e9, rel=0.01)  # Llama 3 8B


@pytest.mark.parametrize(
    ("trunk", "heads", "stages", "layout"),
    [
        (36, 4, 2, "E" + "t" * 20 + "|" + "t" * 16 + "L"),
        (6, 4, 2, "Ettttt|tL"),
        (6, 4, 3, "Ettt|ttt|L"),
        (7, 1, 3, "Ettt|ttt|tL"),
    ],
)
def test_balanced_layouts(trunk: int, heads: int, stages: int, layout: str) -> None:
    assert balanced_layout(trunk, heads, stages) == layout
    assert layout.count("t") == trunk


def test_a_trunk_shorter_than_the_pipeline_takes_a_layout_of_the_users_own() -> None:
    cut = ["parallel.pipeline=4", "model.num_trunk_layers=3", "heads.n=3"]
    recipe = checked(read_plan("1.3B", [*cut, "parallel.layout=Ettt|m|m|mL"]), None)
    assert [(cost.layers, cost.heads) for cost in rank_costs(recipe, 4)] == [(3, 0), (0, 1), (0, 1), (0, 1)]
    with pytest.raises(ConfigError, match=r"give parallel\.layout") as caught:
        read_plan("1.3B", cut)
    assert (caught.value.field, caught.value.value) == ("model.num_trunk_layers", 3), "no head was taken off it"


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("model.hidden_dropout=0.1", "model.hidden_dropout"),
        ("heads.execution=joint", "heads.execution"),
        ("heads.n=23 parallel.pipeline=2", "heads.n"),
        ("train.fp8=hybrid", "train.fp8"),
        ("train.fp4=e2m1", "train.fp4"),
    ],
)
def test_what_the_formulas_do_not_know_is_refused_by_name(setting: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rank_costs(checked(read_plan("1.3B", setting.split()), None), 2)
    assert caught.value.field == field


def test_a_refusal_names_the_trace_where_that_takes_the_recipe() -> None:
    from mtp_megatron.planning.trace import check_traceable

    for settings, traced in (
        (["heads.execution=joint"], True),
        (["model.attention_dropout=0.1"], True),
        (["train.fp8=hybrid"], False),
        (["model.attention_dropout=0.1", "train.fp8=hybrid"], False),
        (["model.num_experts=8"], False),
    ):
        recipe = read_plan("1.3B", settings)
        with pytest.raises(ConfigError) as caught:
            cost.check_known(recipe)
        assert ("--trace" in caught.value.remedy) == traced, settings
        if traced:
            check_traceable(recipe, 0, 1)
        else:
            with pytest.raises(ConfigError):
                check_traceable(recipe, 0, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["14B"], "13B"),
        (["7B", "--tflops", "0"], "--tflops"),
        (["7B", "--gpus", "0"], "--gpus"),
        (["7B", "--memory", "4"], "--reserve"),
        (["7B", "--reserve", "-1"], "--reserve"),
        (["7B", "--gpus-per-node", "0"], "--gpus-per-node"),
        (["7B", "--trace", "2", "--gpus", "2"], "--trace"),
        (["1.3B", "--picture", "x.gif"], "--picture"),
        (["examples/recipes/quickstart.yaml", "data.path=nowhere"], "model.vocab_size"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["plan", *arguments]) == cli.EXIT_ERROR
    assert words in capsys.readouterr().err


def output(capsys: Any, *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return str(capsys.readouterr().out)


def test_the_overlaps_buffers_count_and_a_trace_says_that_it_has_none(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cut, overlap = ["7B", "model.num_trunk_layers=1", "heads.n=1"], "parallel.tp_comm_overlap=true"
    plain, with_it = (rank_costs(checked(read_plan("7B", [*cut[1:], *more]), 2), 2)[0] for more in ([], [overlap]))
    assert with_it.memory - plain.memory == 12 * 2 * 4096 * 4096  # bf16, [tokens, h]
    assert "tp_comm_overlap=false" in output(capsys, *cut, overlap, "--trace", "0")
    assert "tp_comm_overlap" not in output(capsys, *cut, "--trace", "0")


def test_what_a_plan_takes_for_granted_is_said(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    text = output(capsys, "1.3B")
    assert "sequences of 4096 tokens (train.seq_length=" in text
    assert "in fp32" not in text
    assert "saving or resuming takes no memory of a GPU and up to " in text
    assert "train.async_save" not in text
    assert re.search(
        r"; train\.async_save holds up to \d+\.\d GB of it", output(capsys, "1.3B", "train.async_save=true")
    )
    assert "--tflops 989 should be the GPU's in fp32" in output(capsys, "1.3B", "train.precision=fp32")


def test_host_memory_of_a_save_grows_with_what_ranks_share() -> None:
    """1.3B on one pipeline stage: its largest matrix is the unembedding. Measured in test_optimizer_state.py."""

    def planned(gpus: int, **optimizer: bool) -> int:
        settings = [f"optimizer.{name}={str(value).lower()}" for name, value in optimizer.items()]
        plan = ["parallel.tensor=1", "parallel.pipeline=1", "model.vocab_size=131072", *settings]
        recipe = checked(read_plan("1.3B", plan), gpus)
        return checkpoint_host_memory(recipe, rank_costs(recipe, gpus)[0], gpus)

    largest = 131072 * 2048
    whole = planned(8, distributed=False, overlap_grad_reduce=False, overlap_param_gather=False)
    assert whole == 2 * 4 * largest
    one_bucket = planned(8, distributed=True, overlap_grad_reduce=False, overlap_param_gather=False)
    many = {gpus: planned(gpus, distributed=True, overlap_grad_reduce=True) for gpus in (8, 64)}
    assert whole < many[64] < many[8]
    assert whole < one_bucket <= many[8]
    assert many[64] < 12 * (2 * largest)


def test_more_microbatches_make_the_bubble_smaller(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plans = []
    for batch in (64, 512):
        assert cli.main(["plan", "70B", "--gpus", "128", f"train.global_batch_size={batch}", "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    few, many = plans
    assert few["bubble"] > many["bubble"] > 0
    assert few["mfu"] < many["mfu"] < 0.5
    assert few["ranks"][0]["memory"] == many["ranks"][0]["memory"]
