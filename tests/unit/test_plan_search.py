"""The search for a layout, and what a plan that does not fit is told: with the real cost model, at full size.

Not covered here: whether a GPU agrees with the times, which depend on figures that the user gives.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_megatron import cli
from mtp_megatron.errors import ConfigError
from mtp_megatron.planning.advice import Advice, advise
from mtp_megatron.planning.candidates import choices, layouts
from mtp_megatron.planning.cli import checked
from mtp_megatron.planning.cost import rank_costs
from mtp_megatron.planning.estimate import Hardware, estimate, stage_times
from mtp_megatron.planning.lines import changed, recipe_lines, recipe_tree, settings
from mtp_megatron.planning.presets import PRESETS, read_plan
from mtp_megatron.planning.search import NothingFitsError, Search, search
from mtp_megatron.planning.tensors import CATEGORIES, largest_category, largest_tensors
from mtp_megatron.training.recipe_io import load_recipe, parse_recipe
from mtp_megatron.training.validate import check_recipe

SMALL_BATCH = "train.global_batch_size=32"  # few microbatches: little to simulate


def searched(name: str, gpus: int, overrides: Sequence[str] = (), **more: Any) -> Search:
    fixed = [override.partition("=")[0] for override in overrides]
    return search(read_plan(name, overrides), gpus, more.pop("hardware", Hardware()), fixed=fixed, **more)


@pytest.fixture(scope="module")
def seven_billion() -> Search:
    return searched(
        "7B", 8, ["model.vocab_size=128000", "heads.n=4", "parallel.pipeline=8", "train.global_batch_size=128"]
    )


def test_heads_on_several_stages_balance_a_large_vocabulary(seven_billion: Search) -> None:
    best, end = seven_billion.best[0], seven_billion.at_the_end
    assert best.plan.imbalance < 1.08
    assert sum(rank.heads for rank in best.plan.ranks) == 4
    assert max(rank.heads for rank in best.plan.ranks) == 1
    assert end is not None
    assert [rank.heads for rank in end.plan.ranks] == [0] * 7 + [4]
    assert end.plan.imbalance > 2.0
    assert end.plan.step_seconds > 2 * best.plan.step_seconds


def test_the_found_recipe_can_be_trained(seven_billion: Search, tmp_path: Path) -> None:
    found = seven_billion.best[0].candidate.recipe
    path = tmp_path / "found.yaml"
    path.write_text(recipe_lines(found))
    read = check_recipe(load_recipe(path), world_size=8, tokenizer_vocab_size=128000)
    assert read == found
    assert "m" in yaml.safe_load(path.read_text())["parallel"]["layout"]


@pytest.mark.parametrize("name", PRESETS)
def test_recipe_lines_say_all_that_is_not_the_default(name: str) -> None:
    recipe = checked(read_plan(name), None)
    assert parse_recipe(recipe_tree(recipe)).resolved() == recipe
    assert "min_lr" not in recipe_lines(recipe)  # derived from lr


def test_nothing_better_is_left_out() -> None:
    """Every candidate that fits, simulated: the search simulates few of them and returns the same ones."""
    overrides = ["model.vocab_size=128000", "heads.n=2", "parallel.tensor=1", "model.num_trunk_layers=10", SMALL_BATCH]
    found = searched("7B", 4, overrides, count=3)
    recipe, hardware = read_plan("7B", overrides), Hardware()
    seconds = {}
    for cut in choices(recipe, 4, ["parallel.tensor"], 8):
        for _, layout in layouts(changed(recipe, cut), 4, hardware, ()):
            if cut["train.recompute"] is None:
                try:
                    one = checked(changed(recipe, {**cut, "parallel.layout": layout}), 4)
                except ConfigError:
                    continue
                plan = estimate(one, 4, hardware)
                if plan.fullest.memory <= hardware.room:
                    seconds[layout, cut["parallel.context"]] = plan.step_seconds
    assert [item.plan.step_seconds for item in found.best] == pytest.approx(sorted(seconds.values())[:3])
    assert found.simulated < found.fitting


def test_ranks_that_record_a_profile_are_none_of_a_plans_business(tmp_path: Path) -> None:
    """A run's recipe has them; a plan costs one stage alone, or another number of GPUs."""
    cut = ["parallel.pipeline=4", "parallel.tensor=1", "parallel.layout=null", "model.num_trunk_layers=12"]
    profiled = [*cut, "train.profile_steps=[3, 4]", "train.profile_ranks=[7]"]
    recipe, other = (checked(read_plan("1.3B", settings), 4) for settings in (cut, profiled))
    assert layouts(other, 4, Hardware(), ()) == layouts(recipe, 4, Hardware(), ())
    train = searched("1.3B", 4, [*profiled, SMALL_BATCH]).best[0].candidate.recipe.train
    assert (train.profile_steps, train.profile_ranks) == ([3, 4], [7])
    found = tmp_path / "planned.yaml"
    assert cli.main(["plan", "1.3B", *profiled, "--gpus", "4", "--recipe", str(found)]) == 0
    assert load_recipe(found).train.profile_ranks == [7]  # what is written is the run's recipe, whole


def test_what_is_given_stays() -> None:
    given = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.recompute=full", SMALL_BATCH]
    for found in searched("1.3B", 8, given).best:
        recipe = found.candidate.recipe
        assert (recipe.parallel.pipeline, recipe.parallel.virtual_pipeline, recipe.train.recompute) == (2, 2, "full")
    layout = "E" + "t" * 11 + "|" + "t" * 9 + "mm|mmL"
    given = ["parallel.pipeline=3", f"parallel.layout={layout}", SMALL_BATCH]
    assert {found.candidate.recipe.parallel.layout for found in searched("1.3B", 3, given).best} == {layout}


def test_terms_add_up_to_the_step(seven_billion: Search) -> None:
    for found in seven_billion.best:
        assert found.plan.terms.total == pytest.approx(found.plan.step_seconds)
        assert min(vars(found.plan.terms).values()) >= -1e-9
        assert found.candidate.seconds <= found.plan.step_seconds + 1e-9


def test_tensor_parallel_ranks_stay_on_a_node() -> None:
    for node, sizes in ((2, {1, 2}), (8, {1, 2, 4, 8})):
        assert {cut["parallel.tensor"] for cut in choices(read_plan("7B"), 16, (), node)} == sizes


def test_context_parallel_ranks_keep_enough_of_a_sequence() -> None:
    """And the ring costs time, more of it where it leaves the node; the same work is done by more GPUs."""
    long = ["train.seq_length=8192", "model.seq_length=8192"]
    found = {cut["parallel.context"] for cut in choices(read_plan("7B", long), 16, (), 8)}
    assert found == {1, 2, 4}
    assert {cut["parallel.context"] for cut in choices(read_plan("7B"), 16, (), 8)} == {1, 2}
    assert {cut["parallel.context"] for cut in choices(read_plan("7B"), 16, ["parallel.context"], 8)} == {1}
    plans = {}
    for tensor, context, gpus in ((1, 1, 1), (1, 2, 2), (8, 1, 8), (8, 2, 16)):
        cut = [f"parallel.tensor={tensor}", f"parallel.context={context}", "train.global_batch_size=8"]
        cut += ["parallel.pipeline=1", f"parallel.sequence_parallel={str(tensor > 1).lower()}"]
        plans[tensor, context] = estimate(checked(read_plan("7B", cut), gpus), gpus, Hardware())
    assert plans[1, 1].terms.exchange == 0
    assert plans[1, 2].terms.arithmetic == pytest.approx(plans[1, 1].terms.arithmetic / 2)
    keys = 2 * 2 * 2048 * 4096 / 450e9  # keys and values of the other rank, bf16
    passes, layers = 3, 28 + 4
    assert plans[1, 2].terms.exchange == pytest.approx(8 * layers * passes * keys)
    ring = plans[8, 2].terms.exchange - plans[8, 1].terms.exchange / 2
    assert ring == pytest.approx(8 * layers * passes * keys / 8 * 450 / 50)  # eighth of the channels, by the network
    cut = ["parallel.context=2", "parallel.tensor=1", "train.global_batch_size=8", "parallel.pipeline=1"]
    small_nodes = estimate(checked(read_plan("7B", cut), 2), 2, Hardware(gpus_per_node=1))
    assert small_nodes.terms.exchange == pytest.approx(plans[1, 2].terms.exchange * 450 / 50)


def test_what_a_layer_exchanges_between_tensor_parallel_ranks() -> None:
    """Counted in gathers or scatters of [tokens, h]: forward 4, backward 6 with sequence parallelism and else 4."""
    one = 2 * 4096 * 4096 / 2 / 450e9  # bf16, half of it from the other rank
    for given, forward, backward in (
        ([], 4, 6),
        (["parallel.sequence_parallel=false"], 4, 4),
        (["train.recompute=full"], 4, 6 + 4),
        (["train.recompute=selective"], 4, 6),
    ):
        recipe = checked(read_plan("7B", given), 2)
        times = stage_times(recipe, rank_costs(recipe, 2), 2, Hardware())
        head = 4 + (6 if recipe.parallel.sequence_parallel else 4) + 2  # and its loss
        assert times.exchange == (pytest.approx((28 * (forward + backward) + 4 * head) * one),)


def test_groups_within_a_node_use_its_links() -> None:
    """Replicas where a stage's ranks fit into a node, neighbouring stages only where the whole job does."""
    cut = ["parallel.tensor=2", "parallel.pipeline=2", "model.num_trunk_layers=4", "parallel.layout=Etttt|L"]
    cut += ["optimizer.overlap_grad_reduce=false", "optimizer.overlap_param_gather=false", "train.global_batch_size=4"]
    recipe = checked(read_plan("7B", cut), 8)  # stages of 4 ranks: TP2, two replicas
    message = 2 * 2048 * 4096
    costs = rank_costs(recipe, 8)
    gradients = max(cost.parameters for cost in costs) * (4 + 2) / 2
    for node, replicas, stages in ((8, 450e9, 450e9), (4, 450e9, 50e9), (2, 50e9, 50e9)):
        hardware = Hardware(gpus_per_node=node)
        assert stage_times(recipe, costs, 8, hardware).latency == pytest.approx(message / stages)
        assert estimate(recipe, 8, hardware).terms.reduction == pytest.approx(gradients / replicas)


def test_memory_decides_where_the_fastest_does_not_fit() -> None:
    given = [SMALL_BATCH, "parallel.tensor=4"]
    roomy = searched("13B", 16, given)
    room = roomy.best[0].candidate.memory / 1e9 - 1
    tight = searched("13B", 16, given, hardware=Hardware(memory=room))
    assert tight.best[0].plan.step_seconds > roomy.best[0].plan.step_seconds
    assert all(found.candidate.memory <= room * 1e9 for found in tight.best)
    assert tight.too_big is not None
    assert tight.too_big.memory > room * 1e9
    with pytest.raises(NothingFitsError, match=r"none of \d+ layouts fits; the smallest \(TP4.*matrix") as caught:
        searched("13B", 16, given, hardware=Hardware(memory=5))
    assert caught.value.nearest.memory > 5e9


def test_the_search_refuses_what_no_cut_can_be() -> None:
    with pytest.raises(ConfigError, match="global_batch_size"):
        searched("1.3B", 8, ["train.global_batch_size=3", "train.micro_batch_size=2"])


def advised(name: str, gpus: int, overrides: Sequence[str], memory: float) -> tuple[Advice, int]:
    """The advice, and the memory of the plan that takes it."""
    recipe = checked(read_plan(name, overrides), gpus)
    advice = advise(recipe, gpus, Hardware(memory=memory))
    assert advice is not None
    taken = checked(changed(recipe, advice.changes), gpus)
    return advice, max(cost.memory for cost in rank_costs(taken, gpus))


NOT_SHARDED = ["optimizer.distributed=false", "optimizer.overlap_param_gather=false"]


@pytest.mark.parametrize(
    ("name", "gpus", "overrides", "memory", "category", "what", "changes"),
    [
        ("7B", 8, NOT_SHARDED, 60, "moments", "MLP's first matrix", {"optimizer.distributed": True}),
        ("13B", 32, ["train.micro_batch_size=8"], 60, "activations", "SwiGLU", {"train.micro_batch_size": 4}),
        ("70B", 128, [], 24, "activations", "SwiGLU", {"train.recompute": "full"}),
    ],
)
def test_the_nearest_change_that_fits(
    name: str, gpus: int, overrides: list[str], memory: float, category: str, what: str, changes: dict[str, Any]
) -> None:
    advice, taken = advised(name, gpus, overrides, memory)
    assert (advice.category, advice.changes, advice.fits) == (category, changes, True)
    assert what in advice.tensors.what
    assert advice.excess > 0
    assert advice.tensors.bytes <= advice.category_bytes
    assert taken == advice.memory <= memory * 1e9


def test_a_plan_that_nothing_makes_fit_gets_the_best_that_was_found() -> None:
    advice, taken = advised("70B", 64, [], 12)
    assert not advice.fits
    assert taken == advice.memory > 12e9
    assert advice.changes == {"train.recompute": "full"}  # and nothing that saves nothing beside it


def test_a_gpu_keeps_some_memory_in_reserve() -> None:
    """By plan, advice and search alike: what just fills a GPU does not fit it."""
    recipe = checked(read_plan("7B"), 2)
    full = rank_costs(recipe, 2)[0].memory / 1e9
    for more, fits in ((3.9, False), (4.1, True)):
        assert (advise(recipe, 2, Hardware(memory=full + more)) is None) == fits
    assert advise(recipe, 2, Hardware(memory=full + 0.1, reserve=0)) is None
    given = [SMALL_BATCH, "parallel.tensor=4", "parallel.pipeline=2", "train.recompute=null"]
    best = searched("13B", 16, given, count=1).best[0].candidate.memory / 1e9
    for more in (3.9, 4.1):
        found = searched("13B", 16, given, count=1, hardware=Hardware(memory=best + more))
        assert (found.best[0].candidate.memory / 1e9 == best) == (more > 4)


def test_a_plan_that_fits_gets_no_advice() -> None:
    assert advise(checked(read_plan("7B"), 2), 2, Hardware(memory=90)) is None


def test_blame_adds_up() -> None:
    """What a category's largest tensors take is most of it, and never more."""
    recipe = checked(read_plan("34B"), None)
    for cost in rank_costs(recipe, recipe.smallest_world):
        assert largest_category(cost) in CATEGORIES
        for category in CATEGORIES:
            size = getattr(cost, category)
            assert 0.1 * size < largest_tensors(recipe, cost, recipe.smallest_world, category).bytes <= size


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    recipe, picture = tmp_path / "found.yaml", tmp_path / "found.svg"
    grows = "train.batch_size_schedule=[[1, 16], [9, 32]]"
    cut = ["model.vocab_size=128000", "parallel.pipeline=4"]
    command = ["plan", "1.3B", "--gpus", "4", "--search", SMALL_BATCH, grows, *cut]
    assert cli.main([*command, "--recipe", str(recipe), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    assert recipe_lines(load_recipe(recipe)).strip() in text
    assert "1 against 2: " in text
    assert picture.read_bytes().startswith(b"<?xml")
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert parse_recipe(found["recipe"]) == load_recipe(recipe)
    assert found["best"][0]["lost_by"] == {}
    assert sum(found["best"][1]["lost_by"].values()) > 0
    (remark,) = found["remarks"]
    assert remark == "steps of 32 sequences, the largest of train.batch_size_schedule"
    assert f"({remark})" in text
    assert cli.main(["plan", str(recipe), "--gpus", "4", "--memory", "20", "--json"]) == 0
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert advice["settings"] == settings(advice["changes"])
    assert cli.main(["plan", str(recipe), "--gpus", "4", "--memory", "20"]) == 0
    text = capsys.readouterr().out
    assert " ".join(advice["settings"]) in text
    assert "does NOT fit 20 GB" in text
    assert cli.main([*command, "--trace", "0"]) == cli.EXIT_ERROR
    assert "--trace" in capsys.readouterr().err
