"""Rules between settings, the world, the data and the run's folder: each refused before any work, by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtp_megatron import cli
from mtp_megatron.errors import CheckpointError, ConfigError
from mtp_megatron.training import run_folder
from mtp_megatron.training.architecture import check_architecture
from mtp_megatron.training.preflight import preflight
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import dump_recipe, parse_recipe
from mtp_megatron.training.run_folder import RunFolder, check_run_folder
from mtp_megatron.training.validate import check_recipe, data_parallel_size, num_microbatches
from tests.training_runs import complete, tiny_tree

SPREAD = {"parallel__pipeline": 2, "parallel__layout": "Ettttmm|mL"}  # heads on two stages


def recipe_of(**overrides: Any) -> Recipe:
    return parse_recipe(tiny_tree(Path("data"), Path("run"), **overrides))


def complaint(world: int = 1, vocab: int = 257, **overrides: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_recipe(recipe_of(**overrides), world_size=world, tokenizer_vocab_size=vocab)
    return caught.value


def test_good_recipes_pass_resolved() -> None:
    checked = check_recipe(recipe_of(), world_size=1, tokenizer_vocab_size=257)
    assert checked.model.vocab_size == 257
    assert checked.optimizer.decay_steps == 8
    for world, overrides in [
        (4, {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__sequence_parallel": True}),
        (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
        (3, {"parallel__pipeline": 3, "parallel__layout": "Ett|tt|L"}),
        (4, {"parallel__pipeline": 2}),
        (2, SPREAD),
        (2, {"parallel__pipeline": 2, "parallel__layout": "Ett|ttmmmL", "heads__unembedding": "replicated"}),
        (1, {"train__seq_length": 16, "model__vocab_size": 300}),
        (1, {"run__keep_last": 1, "run__keep_every": 80, "train__save_interval": 40}),
        (1, {"run__keep_last": 1, "run__keep_every": 3, "train__save_interval": 0}),
    ]:
        check_recipe(recipe_of(**overrides), world_size=world, tokenizer_vocab_size=257)


@pytest.mark.parametrize(
    ("field", "says", "world", "overrides"),
    [
        ("train.seq_length", "model.seq_length=32", 1, {"train__seq_length": 64}),
        ("run.keep_every", "run.keep_last=null keeps all", 1, {"run__keep_every": 100}),
        (
            "run.keep_every",
            "no multiple of train.save_interval=40: most of these steps are never saved. Set it to 80 or",
            1,
            {"run__keep_every": 100, "run__keep_last": 2, "train__save_interval": 40},
        ),
        ("model.vocab_size", "257 ids", 1, {"model__vocab_size": 200}),
        ("heads.n", "no target that far", 1, {"heads__n": 33}),
        ("parallel.tensor", "num_attention_heads=4", 3, {"parallel__tensor": 3}),
        ("parallel.tensor", "num_query_groups=2", 4, {"parallel__tensor": 4}),
        ("parallel.tensor", "ffn_hidden_size=65", 2, {"parallel__tensor": 2, "model__ffn_hidden_size": 65}),
        ("parallel.tensor", "vocabulary=257", 2, {"parallel__tensor": 2, "model__vocab_padding": 1}),
        ("parallel.sequence_parallel", "which is 1", 1, {"parallel__sequence_parallel": True}),
        (
            "parallel.tensor",
            "train.seq_length=31",
            2,
            {"parallel__tensor": 2, "parallel__sequence_parallel": True, "train__seq_length": 31},
        ),
        ("parallel.context", "two of 4 equal chunks", 2, {"parallel__context": 2, "train__seq_length": 30}),
        (
            "model.num_attention_heads",
            "hidden_size=32",
            1,
            {"model__num_attention_heads": 3, "model__num_query_groups": 3},
        ),
        ("model.num_query_groups", "num_attention_heads=4", 1, {"model__num_query_groups": 3}),
        ("model.num_attention_heads", "pairs of channels", 1, {"model__hidden_size": 36}),
        ("model.num_trunk_layers", "3 stages", 3, {"parallel__pipeline": 3}),
        ("model.num_trunk_layers", "2 stages of 4", 2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 4}),
        ("parallel.virtual_pipeline", "there is one", 1, {"parallel__virtual_pipeline": 2}),
        ("parallel.layout", "4", 2, {"parallel__pipeline": 2, "parallel__layout": "Ett|L"}),
        ("parallel.layout", "4 chunks", 2, {"parallel__pipeline": 2, "parallel__layout": "Et|t|tt|L"}),
        ("parallel.layout", "x", 2, {"parallel__pipeline": 2, "parallel__layout": "Exxxx|L"}),
        ("parallel.layout", "embedding", 2, {"parallel__pipeline": 2, "parallel__layout": "tttt|L"}),
        *(
            ("parallel.layout", says, 2, {"parallel__pipeline": 2, "parallel__layout": layout})
            for says, layout in [
                ("names 2 heads (m), and heads.n=3", "Ettttm|mL"),
                ("trunk layers (t) come after it", "Ettm|ttmmL"),
                ("no head (m) is on the last stage", "Ettttmmm|L"),
                ("after the loss", "Ettttmm|Lm"),
            ]
        ),
        ("parallel.layout", "neither", 3, {"parallel__pipeline": 3, "parallel__layout": "Ettttmm||mL"}),
        ("parallel.layout", "neither", 4, {"parallel__pipeline": 4, "parallel__layout": "Et||tt|tL"}),
        (
            "parallel.layout",
            "neither",
            2,
            {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "parallel__layout": "Et|||tttL"},
        ),
        *(
            (f"heads.{field}", "several stages", 2, {**SPREAD, f"heads__{field}": value, **more})
            for field, value, more in [
                ("arrangement", "causal", {}),
                ("unembedding", "replicated", {}),
                ("new_heads", "copy", {"run__load": "elsewhere"}),
            ]
        ),
        ("world size", "x parallel.pipeline=2 = 4", 6, {"parallel__tensor": 2, "parallel__pipeline": 2}),
        ("train.global_batch_size", "multiple of 3", 3, {}),
        (
            "train.global_batch_size",
            "takes 2 at a time",
            2,
            {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__global_batch_size": 3},
        ),
        ("train.steps", "4 sequences in a step they take", 1, {"train__steps": 2**62}),
        (
            "train.steps",
            "more than can be counted",
            1,
            {"train__global_batch_size": 2**61},
        ),
        ("optimizer.warmup_steps", "step 8", 1, {"optimizer__warmup_steps": 8}),
        ("train.skip_steps", "train.steps=8 is left", 1, {"train__skip_steps": [[1, 5], [6, 20]]}),
        ("optimizer.min_lr", "0.001", 1, {"optimizer__min_lr": 1.0}),
        ("optimizer.overlap_param_gather", "optimizer.distributed", 1, {"optimizer__overlap_param_gather": True}),
        (
            "optimizer.distributed",
            "train nothing",
            2,
            {"optimizer__distributed": True, "heads__trainable": "heads", "parallel__pipeline": 2},
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(field: str, says: str, world: int, overrides: dict[str, Any]) -> None:
    error = complaint(world, **overrides)
    assert error.field == field
    assert says in str(error)
    assert error.remedy


def test_ranks_and_microbatches_are_counted() -> None:
    recipe = recipe_of(parallel__tensor=2, parallel__pipeline=2, train__global_batch_size=24, train__micro_batch_size=3)
    assert data_parallel_size(recipe, 8) == 2
    assert num_microbatches(recipe, 8) == 4


# --- the run's folder ---


def written(folder: Path, **overrides: Any) -> Recipe:
    recipe = parse_recipe(tiny_tree(Path("data"), folder, **overrides)).resolved(vocab_size=257)
    RunFolder(folder).write_recipe(recipe)
    return recipe


def resolved(folder: Path, **overrides: Any) -> Recipe:
    return parse_recipe(tiny_tree(Path("data"), folder, **overrides)).resolved(vocab_size=257)


def test_a_new_or_empty_folder_and_the_same_run_are_accepted(tmp_path: Path) -> None:
    check_run_folder(resolved(tmp_path / "new"))
    assert not (tmp_path / "new").exists(), "a check changes nothing"
    (tmp_path / "empty").mkdir()
    check_run_folder(resolved(tmp_path / "empty"))
    written(tmp_path / "run")
    check_run_folder(resolved(tmp_path / "run"))


def test_what_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    written(tmp_path, optimizer__decay_steps=8)
    check_run_folder(
        resolved(
            tmp_path,
            optimizer__decay_steps=8,
            parallel__tensor=2,
            train__steps=100,
            train__micro_batch_size=2,
            train__log_interval=3,
            heads__execution="joint",
            data__cache="/scratch/index",
            run__keep_last=1,
            run__keep_every=10,
        )
    )


def test_a_run_that_was_recorded_before_a_setting_was_there_is_resumed_with_it(tmp_path: Path) -> None:
    settings = {"profile_steps": [2, 3], "profile_ranks": [1], "memory_snapshot": True, "async_save": True}
    written(tmp_path)
    folder = RunFolder(tmp_path)
    tree = yaml.safe_load(folder.recipe.read_text())
    for key in settings:
        del tree["train"][key]
    folder.recipe.write_text(yaml.safe_dump(tree))
    check_run_folder(resolved(tmp_path, **{f"train__{key}": value for key, value in settings.items()}))


def test_what_a_start_left_that_ended_before_it_recorded_its_recipe_is_no_stranger(tmp_path: Path) -> None:
    """Stacks where it hung, a snapshot where its GPUs did not hold the model."""
    folder = RunFolder(tmp_path)
    for file in (folder.stacks / "rank00000.txt", folder.memory / "rank0-building-and-loading-the-model.pickle"):
        file.parent.mkdir()
        file.touch()
    check_run_folder(resolved(tmp_path))
    (tmp_path / "profile").mkdir()
    with pytest.raises(ConfigError, match=r"files that are no run's \(profile\)"):
        check_run_folder(resolved(tmp_path))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"model__hidden_size": 64}, "model.hidden_size is 32 there and 64 here"),
        ({"heads__n": 2}, "heads.n is 3 there and 2 here"),
        ({"optimizer__lr": 0.5}, "optimizer.lr is 0.001 there and 0.5 here"),
        ({"data__seed": 5}, "data.seed is 1234 there and 5 here"),
        ({"data__reset_attention_mask": True}, "data.reset_attention_mask is False there and True here"),
        ({"train__steps": 9}, "optimizer.decay_steps is 8 there and 9 here"),
    ],
)
def test_a_folder_of_another_run_is_refused(tmp_path: Path, overrides: dict[str, Any], says: str) -> None:
    written(tmp_path)
    with pytest.raises(ConfigError, match="it holds another run") as caught:
        check_run_folder(resolved(tmp_path, **overrides))
    assert caught.value.field == "run.path"
    assert says in str(caught.value)


@pytest.mark.parametrize("setting", [{"data__reset_attention_mask": True}, {"heads__z_loss": 1e-4}], ids=str)
def test_a_run_recorded_before_a_setting_existed_goes_on_with_its_default(
    tmp_path: Path, setting: dict[str, Any]
) -> None:
    written(tmp_path)
    recorded = RunFolder(tmp_path).recipe
    lines = recorded.read_text().splitlines(keepends=True)
    older = [line for line in lines if next(iter(setting)).split("__")[1] not in line]
    assert len(older) == len(lines) - 1
    recorded.write_text("".join(older))
    check_run_folder(resolved(tmp_path))
    with pytest.raises(ConfigError, match="it holds another run"):
        check_run_folder(resolved(tmp_path, **setting))


def test_what_steers_a_run_may_change_where_that_is_said(tmp_path: Path) -> None:
    written(tmp_path)
    steered = {"optimizer__lr": 5e-4, "optimizer__weight_decay": 0.0, "optimizer__clip_grad": 0.5}
    steered |= {"optimizer__warmup_steps": 1, "train__steps": 9, "heads__loss_decay": 0.5, "heads__curriculum_steps": 4}
    steered |= {"heads__z_loss": 1e-4}
    with pytest.raises(ConfigError) as caught:
        check_run_folder(resolved(tmp_path, **steered))
    assert "run.accept_changes=true" in caught.value.remedy
    changed = resolved(tmp_path, run__accept_changes=True, **steered)
    _, keys = check_run_folder(changed)
    assert {f"{key.replace('__', '.')}" for key in steered} - keys.keys() == {"train.steps"}
    assert keys.keys() - {key.replace("__", ".") for key in steered} == {"optimizer.min_lr", "optimizer.decay_steps"}
    assert keys["optimizer.lr"] == "optimizer.lr is 0.001 there and 0.0005 here"
    for other in ({"heads__n": 2}, {"data__seed": 5}, {"optimizer__beta1": 0.5}):
        with pytest.raises(ConfigError) as caught:
            check_run_folder(resolved(tmp_path, **steered, **other))
        assert "accept_changes" not in str(caught.value), "it would not help"
        with pytest.raises(ConfigError, match=r"run\.accept_changes is for heads\.curriculum_steps"):
            check_run_folder(resolved(tmp_path, run__accept_changes=True, **other))


def test_a_longer_run_is_told_how_and_what_it_is_told_works(tmp_path: Path) -> None:
    """``optimizer.decay_steps: null`` is ``train.steps``: a longer run would decay in another way."""
    written(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_run_folder(resolved(tmp_path, train__steps=9))
    advice = re.search(r"set optimizer\.decay_steps=(\d+)", caught.value.remedy)
    assert advice is not None
    check_run_folder(resolved(tmp_path, train__steps=9, optimizer__decay_steps=int(advice[1])))


def test_foreign_files_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("")  # all that a job leaves which failed while it was building the model
    check_run_folder(resolved(tmp_path))
    (tmp_path / ".recipe.yaml.123").write_text("")  # and one that was killed while it wrote that
    check_run_folder(resolved(tmp_path))
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        check_run_folder(resolved(tmp_path))
    with pytest.raises(ConfigError, match="it is a file"):
        check_run_folder(resolved(tmp_path / "thesis.tex"))


def test_resume_never_and_must(tmp_path: Path) -> None:
    recipe = written(tmp_path)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        check_run_folder(resolved(tmp_path, run__resume="must"))
    with pytest.raises(ConfigError, match="holds no run"):
        check_run_folder(resolved(tmp_path / "new", run__resume="must"))
    check_run_folder(resolved(tmp_path, run__resume="never"))
    complete(tmp_path, 5, recipe)
    check_run_folder(resolved(tmp_path, run__resume="must"))
    with pytest.raises(ConfigError, match="at step 5"):
        check_run_folder(resolved(tmp_path, run__resume="never"))


def test_another_architecture_is_refused_field_by_field(tmp_path: Path) -> None:
    folder = complete(tmp_path, 5, resolved(tmp_path))
    check_architecture(folder, resolved(tmp_path, optimizer__lr=9.0, model__hidden_dropout=0.5, parallel__tensor=2))
    with pytest.raises(CheckpointError) as caught:
        check_architecture(folder, resolved(tmp_path, model__num_trunk_layers=8, heads__n=8, model__vocab_padding=1))
    said = str(caught.value)
    assert "model.num_trunk_layers is 4 there and 8 here" in said
    assert "heads.n is 3 there and 8 here" in said
    assert "padded vocabulary is 384 there and 257 here" in said


# --- everything together, as the command line shows it ---


def test_a_file_as_cache_is_refused_before_any_work(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache='.*file': it is a file"):
        preflight(parse_recipe(tiny_tree(data, tmp_path / "run", data__cache=str(tmp_path / "file"))), 1)


def test_preflight_passes_and_changes_nothing(data: Path, tmp_path: Path) -> None:
    plan = preflight(parse_recipe(tiny_tree(data, tmp_path / "run")), 1)
    assert plan.recipe.model.vocab_size == 257
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_a_run_is_read_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By each of thousands of ranks, from one disk."""
    tree = tiny_tree(data, tmp_path / "run")
    RunFolder(tmp_path / "run").write_recipe(preflight(parse_recipe(tree), 1).recipe)
    read: list[Path] = []
    load = run_folder.load_recipe
    monkeypatch.setattr(run_folder, "load_recipe", lambda path: read.append(path) or load(path))
    tree["optimizer"]["lr"], tree["run"]["accept_changes"] = 5e-4, True
    plan = preflight(parse_recipe(tree), 1)
    assert read == [tmp_path / "run" / "recipe.yaml"]
    assert "optimizer.lr is 0.001 there and 0.0005 here" in plan.changes


def test_another_data_set_is_refused_on_resume(data: Path, tmp_path: Path) -> None:
    recipe = preflight(parse_recipe(tiny_tree(data, tmp_path / "run")), 1).recipe
    RunFolder(tmp_path / "run").write_recipe(recipe)
    complete(tmp_path / "run", 5, recipe, data_fingerprint="another")
    with pytest.raises(ConfigError, match="not the data that the run") as caught:
        preflight(parse_recipe(tiny_tree(data, tmp_path / "run")), 1)
    assert caught.value.field == "data.path"


def test_initial_weights_must_exist(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        preflight(parse_recipe(tiny_tree(data, tmp_path / "run", run__load=str(tmp_path))), 1)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"mtp-megatron convert .* --to megatron"):
        preflight(parse_recipe(tiny_tree(data, tmp_path / "run", run__load=str(tmp_path))), 1)


def train_command(recipe: Path, *words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = cli.main(["train", str(recipe), *words])
    return status, capsys.readouterr().err


def test_the_command_reports_once_and_ends_with_status_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(parse_recipe(tiny_tree(data, tmp_path / "run"))))
    cases = {
        "heads.n=0": "heads.n=0",
        "train.seq_length=64": "train.seq_length=64",
        "model.vocab_size=9": "model.vocab_size=9",
        "parallel.tensor=3": "parallel.tensor=3",
        "parallel.pipeline=3": "model.num_trunk_layers=4",
        "model.hidden=3": "model.hidden_size",
        "data.path=absent": "absent",
        f"run.load={tmp_path}": "no checkpoint",
        f"run.path={data}": "run.path=",
    }
    for word, says in cases.items():
        status, said = train_command(recipe, word, capsys=capsys)
        assert status == 2
        assert said.startswith("error: ")
        assert says in said
        assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_truncated_data_file_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(parse_recipe(tiny_tree(data, tmp_path / "run"))))
    whole = (data / "train.bin").read_bytes()
    try:
        (data / "train.bin").write_bytes(whole[:-2])
        status, said = train_command(recipe, capsys=capsys)
    finally:
        (data / "train.bin").write_bytes(whole)
    assert status == 2
    assert "train.bin: truncated" in said


def test_describe_and_print_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("heads: {n: 2}\n")
    assert cli.main(["train", "--describe"]) == 0
    assert "optimizer.lr" in capsys.readouterr().out
    assert cli.main(["train", str(recipe), "train.steps=77", "--print-recipe"]) == 0
    out = capsys.readouterr().out
    assert "n: 2" in out
    assert "decay_steps: 77" in out
    assert cli.main(["train"]) == 2
    assert "no recipe was given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    assert "heads.loss_decay" in capsys.readouterr().out
