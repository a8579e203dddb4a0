"""Blends of data sets: how they are written, what is refused, which samples a run gets of each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mtp_megatron.data.batch_sizes import BatchSizes
from mtp_megatron.data.blend import Blend, load_blend, resumed
from mtp_megatron.data.dataset import BlendedSamples, build_datasets
from mtp_megatron.data.loader import build_train_iterator
from mtp_megatron.data.manifest import load_manifest
from mtp_megatron.data.passes import blend_lines
from mtp_megatron.data.preprocess import PreprocessOptions, preprocess
from mtp_megatron.errors import ConfigError, DataError
from mtp_megatron.planning.cli import vocabulary
from mtp_megatron.training.architecture import model_description
from mtp_megatron.training.preflight import Plan, preflight
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import describe_fields, dump_recipe, load_recipe, parse_recipe
from mtp_megatron.training.run_folder import RunFolder
from tests.training_runs import complete, make_data, tiny_tree

SEQ = 32
WEIGHTS = (7, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A large and a small data set."""
    root = tmp_path_factory.mktemp("blend")
    return make_data(root / "large", seed=0, documents=12), make_data(root / "small", seed=1, documents=6)


def blended(folders: tuple[Path, ...], weights: tuple[float, ...] = WEIGHTS) -> Blend:
    return load_blend([(weight, str(folder)) for weight, folder in zip(weights, folders, strict=True)])


def pairs(folders: tuple[Path, ...], weights: tuple[float, ...] = WEIGHTS) -> list[list[Any]]:
    return [[weight, str(folder)] for weight, folder in zip(weights, folders, strict=True)]


def build(data: Blend, train: int = 300, valid: int | None = None, seed: int = 5) -> tuple[Any, Any]:
    return build_datasets(data, seq_length=SEQ, train_samples=train, valid_samples=valid, seed=seed)


def texts(samples: Any, count: int | None = None) -> list[bytes]:
    return [texts_at(samples, position) for position in range(count or len(samples))]


def texts_at(samples: Any, position: int) -> bytes:
    return bytes(samples[position]["tokens"].clamp(max=255).to(torch.uint8).numpy())


# --- how it is written ---


@pytest.mark.parametrize("text", ["[[0.7, a], [0.3, b/c]]", "[[7, a], [3, b/c]]", "[[7, a], [3.0, 'b/c']]"])
def test_pairs_from_a_file_or_a_setting(text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data:\n  blend: {text}\n")
    recipe = load_recipe(file)
    assert [folder for _, folder in recipe.data.parts] == ["a", "b/c"]
    (one, _), (other, _) = recipe.data.parts
    assert one is not None
    assert other is not None
    assert one / other == pytest.approx(7 / 3)
    assert recipe.data.path is None
    file.write_text("")
    assert load_recipe(file, [f"data.blend={text}"]) == recipe
    file.write_text("data:\n  blend:\n    - [7, a]\n    - [3, b/c]\n")
    assert [folder for _, folder in load_recipe(file).data.parts] == ["a", "b/c"]
    file.write_text(dump_recipe(recipe))
    assert load_recipe(file) == recipe


def test_folders_alone_and_one_folder() -> None:
    assert parse_recipe({"data": {"blend": ["a", "b"]}}).data.parts == ((None, "a"), (None, "b"))
    assert parse_recipe({"data": {"path": "a"}}).data.parts == ((None, "a"),)
    assert Recipe().data.parts == ((None, "data"),)
    assert parse_recipe({"data": {"path": None, "blend": ["a"]}}).data.parts == ((None, "a"),)
    assert "[weight, folder] pairs" in describe_fields()


@pytest.mark.parametrize(
    ("blend", "says"),
    [
        ([0.7, "a", 0.3, "b"], "0.7 is no weight above 0 with its folder"),  # as --data-path of Megatron-LM has it
        ([["a", 0.7]], "['a', 0.7] is no weight"),
        ([[0.7, "a"], "b"], "'b' is no weight"),
        ([[0, "a"], [1, "b"]], "[0, 'a'] is no weight above 0"),
        ([[-1, "a"]], "no weight above 0"),
        ([[float("nan"), "a"]], "no weight above 0"),
        ([[float("inf"), "a"]], "no weight above 0"),
        ([[True, "a"]], "no weight above 0"),
        ([["0.7", "a"]], "no weight above 0"),
        ([[0.5, ""]], "with its folder"),
        ([[0.5, "a", "b"]], "with its folder"),
        ([], "no list of folders"),
        ({"a": 0.5}, "no list of folders"),
        ("a", "no list of folders"),
        ([[1, "a"], [2, "a"]], "it has a twice"),
        (["a", "b", "a"], "it has a twice"),
    ],
)
def test_what_is_no_blend_is_refused(blend: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({"data": {"blend": blend}})
    assert caught.value.field == "data.blend"
    assert caught.value.value == blend or blend != blend or "nan" in repr(blend)
    assert says in caught.value.problem
    assert caught.value.remedy


def test_a_path_and_a_blend_exclude_each_other(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {path: data/mine}\n")
    with pytest.raises(ConfigError, match=r"data\.path='data/mine' is set, too\. Set data\.path=null"):
        load_recipe(file, ["data.blend=[[1, a], [2, b]]"])
    assert load_recipe(file, ["data.blend=[[1, a], [2, b]]", "data.path=null"]).data.blend is not None
    file.write_text("data: {blend: [a, b]}\n")
    with pytest.raises(ConfigError, match=r"or data\.blend=null"):
        load_recipe(file, ["data.path=data/mine"])
    with pytest.raises(ConfigError, match=r"data\.path=None: no folder is given"):
        load_recipe(file, ["data.blend=null", "data.path="])


# --- which data sets go together ---


def test_weights_are_shares_however_they_are_written(folders: tuple[Path, Path]) -> None:
    shares = blended(folders, (0.7, 0.3)).weights
    assert shares == (0.7, 0.3)
    assert blended(folders, (0.84, 0.76)).weights[0] == 0.525 != 0.84 / (0.84 + 0.76), (
        "84 : 76, and not what floats make of it"
    )
    for scale in (1, 3, 7, 1e-3, 12345.678):
        scaled = tuple(float(f"{weight * scale:.10g}") for weight in (7, 3))
        assert blended(folders, scaled).weights == shares
        assert blended(folders, scaled).fingerprint == blended(folders, (0.7, 0.3)).fingerprint


def test_without_weights_tokens_decide(folders: tuple[Path, Path]) -> None:
    tokens = [load_manifest(folder).train.tokens for folder in folders]
    blend = load_blend([(None, str(folder)) for folder in folders])
    assert blend.weights == tuple(count / sum(tokens) for count in tokens)


def test_one_folder_in_a_blend_is_that_folder(folders: tuple[Path, Path]) -> None:
    one = load_blend([(5.0, str(folders[0]))])
    assert one.fingerprint == load_manifest(folders[0]).fingerprint
    assert texts(build(one, 200)[0]) == texts(build(load_blend([(None, str(folders[0]))]), 200)[0])


def test_a_blends_identity_is_weights_content_and_order(folders: tuple[Path, Path]) -> None:
    identities = {
        blended(folders).fingerprint,
        blended(folders, (6, 4)).fingerprint,
        blended((folders[1], folders[0])).fingerprint,
        *(load_manifest(folder).fingerprint for folder in folders),
    }
    assert len(identities) == 5


def test_another_tokenizer_is_refused_by_name(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sources = folders[0].parent / "source"
    other = preprocess(PreprocessOptions(tmp_path / "other", (sources,), train_vocab=272, quiet=True)).manifest
    with pytest.raises(ConfigError) as caught:
        blended((folders[0], other.path))
    assert caught.value.field == "data.blend"
    said = str(caught.value)
    assert str(other.path) in said
    assert f"made with another tokenizer than {folders[0]} (tokenizer sentencepiece and not bytes, sha256" in said
    assert "vocabulary 272 and not 257" in said


def test_the_same_content_twice_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    again = preprocess(
        PreprocessOptions(tmp_path / "again", (folders[0].parent / "source",), valid_fraction=0.2, quiet=True)
    ).manifest
    with pytest.raises(
        ConfigError, match=f"{again.path}.: made of the same documents as {folders[0]}: .*come twice\\."
    ):
        blended((folders[0], again.path))


def test_the_same_documents_split_otherwise_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sources = (folders[0].parent / "source",)
    other = preprocess(PreprocessOptions(tmp_path / "other", sources, valid_fraction=0.3, quiet=True)).manifest
    with pytest.raises(ConfigError, match="come twice, and what one holds out the other trains on"):
        blended((folders[0], other.path))


def test_a_folder_that_is_not_there_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path / 'absent'}: no such data set folder"):
        blended((folders[0], tmp_path / "absent"))


# --- samples ---


def test_samples_are_the_folders_own_in_proportion(folders: tuple[Path, Path]) -> None:
    """More of the small one than it holds: its passes go on as if it were alone."""
    train, valid = build(blended(folders), 600)
    assert isinstance(train, BlendedSamples)
    alone = [build(load_blend([(None, str(folder))]), 600) for folder in folders]
    assert len(train) == 600
    assert [len(part) for part in train.parts] == [420, 180]
    assert train.parts[1].samples_per_epoch < 180
    for mine, theirs in ((train, [pair[0] for pair in alone]), (valid, [pair[1] for pair in alone])):
        left = [iter(texts(part)) for part in theirs]
        taken = [0, 0]
        nexts = [next(part) for part in left]
        for text in texts(mine):
            part = nexts.index(text)
            taken[part] += 1
            nexts[part] = next(left[part], b"")
        assert abs(taken[0] - 0.7 * len(mine)) < 2


def test_raising_the_steps_goes_on_with_the_same_order(folders: tuple[Path, Path]) -> None:
    few, _ = build(blended(folders), 50)
    many, _ = build(blended(folders), 5000)
    assert texts(few) == texts(many, 50)
    other, _ = build(blended(folders, (6, 4)), 50)
    assert texts(other) != texts(few)
    with pytest.raises(IndexError, match="sample 50 is none of 0 to 49"):
        few[50]


def test_held_out_samples_do_not_repeat_and_keep_the_proportions(folders: tuple[Path, Path]) -> None:
    _, valid = build(blended(folders))
    available = [part.samples_per_epoch for part in valid.parts]
    taken = [len(part) for part in valid.parts]
    assert any(one == all_ for one, all_ in zip(taken, available, strict=True)), "it ends where one has no more"
    assert all(one <= all_ for one, all_ in zip(taken, available, strict=True))
    assert sum(taken) == len(valid) < sum(available)
    assert len(set(texts(valid))) == len(valid)
    assert abs(taken[0] - 0.7 * len(valid)) < 2
    _, few = build(blended(folders), valid=10)
    assert texts(few) == texts(valid, 10)
    assert few[None]["loss_mask"].sum() == 0


def test_readers_of_their_own_give_the_same_batches(folders: tuple[Path, Path]) -> None:
    train, _ = build(blended(folders), 64)
    sizes = {"step": 2, "batch_sizes": BatchSizes(((1, 8),)), "micro_batch_size": 2, "dp_rank": 1, "dp_size": 2}
    here = [batch["tokens"] for batch in build_train_iterator(train, **sizes)]
    there = [batch["tokens"] for batch in build_train_iterator(train, **sizes, workers=2)]
    assert len(here) == 12
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_a_folder_too_small_for_a_sample_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=rf"{folders[1]}/valid\.bin: \d+ tokens"):
        build_datasets(blended(folders), seq_length=800, train_samples=10, seed=1)


# --- what is said at the start ---


def test_the_table_says_what_each_folder_gives(folders: tuple[Path, Path]) -> None:
    blend = blended(folders)
    train, valid = build(blend, 6000, valid=8)
    title, head, first, second, *odd = blend_lines(blend, train, valid, 8)
    assert title == "data.blend, over all 6,000 samples of the run:"
    assert head.split() == ["weight", "tokens", "samples", "passes", "folder"]
    for line, manifest, weight, count, part in (
        (first, blend.parts[0], "0.7", 4200, train.parts[0]),
        (second, blend.parts[1], "0.3", 1800, train.parts[1]),
    ):
        cells = line.split()
        assert cells[:3] == [weight, f"{manifest.train.tokens:,}", f"{count:,}"]
        assert float(cells[3]) == pytest.approx(count / part.samples_per_epoch, abs=0.006)
        assert cells[4] == str(manifest.path)
    assert odd == [
        "data.blend: read more than 4 times in this run, beyond which the same text teaches less (arXiv:2305.16264): "
        + ", ".join(
            f"{folder} ({count / part.samples_per_epoch:.1f})"
            for folder, count, part in zip(folders, (4200, 1800), train.parts, strict=True)
        )
    ]


def test_what_is_odd_is_said(folders: tuple[Path, Path]) -> None:
    blend = blended(folders, (1, 1e-6))
    train, valid = build(blend, 20, valid=8)
    *_, odd = blend_lines(blend, train, valid, 8)
    assert odd == f"data.blend: weights too small for 20 samples, so that no sample comes: {folders[1]}"
    blend = blended(folders)
    train, valid = build(blend, 20)
    *_, odd = blend_lines(blend, train, valid, 10_000)
    assert f"{len(valid):,} of 10,000 held-out samples are used for evaluation" in odd
    assert odd.endswith((f"no more of {folders[0]}", f"no more of {folders[1]}"))
    assert len(blend_lines(blend, train, valid, len(valid))) == 4


# --- preflight, plan ---


def tree(folders: tuple[Path, ...], run: Path, weights: tuple[float, ...] = WEIGHTS, **settings: Any) -> dict[str, Any]:
    return tiny_tree(Path(), run, data__path=None, data__blend=pairs(folders, weights), **settings)


def test_a_plan_takes_the_blends_vocabulary(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert vocabulary(parse_recipe(tree(folders, tmp_path))) == 257
    with pytest.raises(ConfigError, match=f"{tmp_path / 'absent'} .*holds no data set that says it"):
        vocabulary(parse_recipe(tree((folders[0], tmp_path / "absent"), tmp_path)))


def test_preflight_reads_every_folder_and_changes_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    plan = preflight(parse_recipe(tree(folders, tmp_path / "run")), 1)
    assert plan.data == blended(folders)
    assert plan.recipe.model.vocab_size == 257
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"the tokenizer of data\.blend=\[\[7.*has 257 ids"):
        preflight(parse_recipe(tree(folders, tmp_path / "run", model__vocab_size=100)), 1)


def stopped(run: Path, folders: tuple[Path, ...], weights: tuple[float, ...], **settings: Any) -> Plan:
    """A run after five steps."""
    plan = preflight(parse_recipe(tree(folders, run, weights, **settings)), 1)
    RunFolder(run).write_recipe(plan.recipe)
    complete(run, 5, plan.recipe, **model_description(plan.recipe, plan.data, 5))
    return plan


def test_another_blend_is_refused_on_resume_by_what_differs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = stopped(run, folders, WEIGHTS)
    longer = tree(folders, run, (0.7, 0.3), train__steps=99, optimizer__decay_steps=8)
    assert preflight(parse_recipe(longer), 1).data == plan.data
    third = make_data(tmp_path / "third", seed=2, documents=6)
    cases: dict[str, dict[str, Any]] = {
        f"{folders[0]} had a weight of 0.7, and has 0.6": tree(folders, run, (6, 4)),
        "the folders come in another order": tree((folders[1], folders[0]), run, (3, 7)),
        f"{folders[1]} is gone": tree(folders[:1], run, (1,)),
        f"{third} is new": tree((*folders, third), run, (7, 3, 1)),
        "weight of 0.7, and has 1": tiny_tree(folders[0], run),
    }
    for says, changed in cases.items():
        with pytest.raises(ConfigError, match="not the data that the run") as caught:
            preflight(parse_recipe(changed), 1)
        assert caught.value.field == ("data.blend" if changed["data"].get("blend") else "data.path")
        assert says in caught.value.problem
        assert "run.load" in caught.value.remedy
        assert "run.accept_changes=true" in caught.value.remedy
        changed["run"]["accept_changes"] = True
        accepted = preflight(parse_recipe(changed), 1)
        assert accepted.data.since == 20, "five steps of four samples"
        assert any(says in change for change in accepted.changes)


def test_a_folder_whose_content_is_another_is_named_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(folders[0], data)
    stopped(run, (data, folders[1]), WEIGHTS)
    shutil.rmtree(data)
    shutil.copytree(make_data(tmp_path / "third", seed=2, documents=6), data)
    with pytest.raises(ConfigError, match=rf"so far \({data} has other content\)"):
        preflight(parse_recipe(tree((data, folders[1]), run)), 1)


def test_another_tokenizer_is_refused_also_where_changes_are_accepted(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    run, sources = tmp_path / "run", folders[0].parent / "source"
    stopped(run, folders, WEIGHTS, model__vocab_size=300)
    options = PreprocessOptions(tmp_path / "other", (sources,), valid_fraction=0.2, train_vocab=272, quiet=True)
    other = preprocess(options).manifest.path
    with pytest.raises(ConfigError, match="another tokenizer") as caught:
        preflight(parse_recipe(tiny_tree(other, run, run__accept_changes=True, model__vocab_size=300)), 1)
    assert "accept_changes" not in caught.value.remedy


def test_a_run_of_one_folder_from_before_there_were_blends(folders: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = preflight(parse_recipe(tiny_tree(folders[0], run)), 1)
    RunFolder(run).write_recipe(plan.recipe)
    described = model_description(plan.recipe, plan.data, 5)
    del described["data"]
    complete(run, 5, plan.recipe, **described)
    assert preflight(parse_recipe(tiny_tree(folders[0], run)), 1).data == plan.data
    with pytest.raises(ConfigError, match=r"data\.blend=.*not the data that the run"):
        preflight(parse_recipe(tree(folders, run)), 1)
    accepted = preflight(parse_recipe(tree(folders, run, run__accept_changes=True)), 1).data
    assert (accepted.since, accepted.before) == (20, (20, 0))


def test_every_folder_goes_on_where_it_was_when_the_blend_changes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """New weights, a new folder, one that leaves and comes back: each gives its own samples one after another."""
    third = make_data(tmp_path / "third", seed=2, documents=6)
    every = (*folders, third)
    phases: list[tuple[tuple[Path, ...], tuple[float, ...], int]] = [
        (folders, (7, 3), 100),
        ((third, folders[0]), (6, 4), 150),
        (every, (1, 4, 1), 230),
        (every[1:2], (1,), 250),
        (every[::-1], (1, 1, 1), 300),
    ]
    alone = [texts(build(load_blend([(None, str(folder))]), 300)[0]) for folder in every]
    taken = [0, 0, 0]
    start, record = 0, None
    for parts, weights, stop in phases:
        blend = blended(parts, weights)
        if record is not None:
            blend, words = resumed(record, blend)
            assert words
            assert (blend.since, sum(blend.before) + sum(used for _, _, used in blend.left)) == (start, start)
        train, _ = build(blend, stop)
        longer, _ = build(blend, stop + 100)
        for position in range(start, stop):
            text = texts_at(train, position)
            part = next(which for which in range(3) if every[which] in parts and alone[which][taken[which]] == text)
            taken[part] += 1
            assert texts_at(longer, position) == text
        if start:
            with pytest.raises(IndexError, match=f"sample {start - 1} is none of {start} to"):
                train[start - 1]
        record = json.loads(json.dumps(blend.record(stop)))
        by_folder = {entry["folder"]: entry["samples"] for entry in (*record["folders"], *record["left"])}
        assert by_folder == {str(folder): count for folder, count in zip(every, taken, strict=True) if count}
        again, words = resumed(record, blended(parts, weights))
        assert (again, words) == (blend, [])
        start = stop
    assert sum(taken) == 300
    assert min(taken) > 30


def test_moved_folders_are_no_change(folders: tuple[Path, Path], tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(folders[0])
    assert blended((moved, folders[1])).fingerprint == blended(folders).fingerprint
    assert resumed(blended(folders).record(20), blended((moved, folders[1])))[1] == []


def test_the_recipe_of_a_blend_is_read_back(folders: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = preflight(parse_recipe(tree(folders, tmp_path / "run")), 1).recipe
    RunFolder(tmp_path / "run").write_recipe(recipe)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    kept = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]
    assert kept["blend"] == pairs(folders)
