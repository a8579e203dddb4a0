"""Recipes: reading, overrides, and errors that name the field, the value and the remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe, padded_vocab_size
from mtp_megatron.training.recipe_io import (
    describe_fields,
    dump_recipe,
    known_keys,
    load_recipe,
    nearest_key,
    overridden,
    parse_recipe,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_absent_keys_keep_their_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "model: {hidden_size: 64}\n"))
    assert recipe.model.hidden_size == 64
    assert recipe.model.num_trunk_layers == Recipe().model.num_trunk_layers
    assert load_recipe(write(tmp_path, "")) == Recipe()


def test_byte_level_with_eight_heads_is_one_line_of_overrides(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "heads: {n: 4}\n"), ["heads.n=8", "data.path=data/bytes"])
    assert (recipe.heads.n, recipe.data.path) == (8, "data/bytes")


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("3.0e-4", 3e-4), ("1", 1.0), ("0.1", 0.1), ("1E+2", 100.0)],
)
def test_numbers_are_numbers_however_they_are_written(tmp_path: Path, text: str, value: float) -> None:
    """YAML 1.1 as PyYAML reads it takes 3e-4 for a string."""
    assert load_recipe(write(tmp_path, f"optimizer: {{lr: {text}}}\n")).optimizer.lr == value
    assert load_recipe(write(tmp_path, ""), [f"optimizer.lr={text}"]).optimizer.lr == value


def test_a_folder_may_look_like_a_date_or_begin_at_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No shell expands the ~ of ``run.path=~/runs``; YAML 1.1 reads 2026-11-28 as a date."""
    monkeypatch.setenv("HOME", "/home/ada")
    recipe = load_recipe(write(tmp_path, "run: {load: ~/first}\n"), ["run.path=2026-11-28", "data.cache=~/cache"])
    assert (recipe.run.path, recipe.run.load, recipe.data.cache) == ("2026-11-28", "/home/ada/first", "/home/ada/cache")
    blended = load_recipe(write(tmp_path, ""), ["data.path=null", "data.blend=[[0.3, ~/a], [0.7, b~]]"]).data.blend
    assert blended == [[0.3, "/home/ada/a"], [0.7, "b~"]]


def test_overrides_are_yaml_and_the_last_one_wins(tmp_path: Path) -> None:
    overrides = [
        "train.steps=5",
        "train.steps=7",
        "parallel.layout=Ett|L",
        "run.tensorboard=false",
        "run.keep_last=null",
    ]
    recipe = load_recipe(write(tmp_path, "run: {keep_last: 3}\n"), overrides)
    assert recipe.train.steps == 7
    assert recipe.parallel.layout == "Ett|L"
    assert recipe.run.tensorboard is False
    assert recipe.run.keep_last is None


@pytest.mark.parametrize(
    ("override", "field", "remedy"),
    [
        ("model.hiden_size=64", "model.hiden_size", "model.hidden_size"),
        ("modle.hidden_size=64", "modle", "model.hidden_size"),
        ("train.lr=1e-3", "train.lr", "optimizer.lr"),
        ("steps=10", "steps", "train.steps"),
        ("heads.head_count=3", "heads.head_count", "The keys of heads are n, kind"),
        ("flavour=1", "flavour", "The sections are model, heads, parallel"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path, override: str, field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, ""), [override])
    assert caught.value.field == field
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("override", "field", "parts"),
    [
        ("heads.n=0", "heads.n", ["0", ">= 1"]),
        ("model.hidden_size=abc", "model.hidden_size", ["'abc'", "an int >= 1"]),
        ("model.num_query_groups=x", "model.num_query_groups", ["'x'", "int or null"]),
        ("train.steps=true", "train.steps", ["True", "integer"]),
        (f"train.steps={2**63}", "train.steps", ["must be at most 9223372036854775807", "an int >= 1"]),
        (f"optimizer.decay_steps={10**400}", "optimizer.decay_steps", ["must be at most"]),
        (f"train.steps={'9' * 5000}", "train.steps", ["not readable YAML"]),
        ("train.timeout_minutes=1e9", "train.timeout_minutes", ["1000000", "less than or equal"]),
        ("train.precision=fp8", "train.precision", ["'fp8'", "fp32 or bf16"]),
        ("optimizer.lr=.nan", "optimizer.lr", ["nan", "> 0"]),
        ("optimizer.beta1=1.0", "optimizer.beta1", ["less than 1", ">= 0 and < 1"]),
        ("model.tied_embeddings=1", "model.tied_embeddings", ["1", "a bool"]),
        ("train.steps.x=3", "train.steps", ["integer"]),
        ("heads=3", "heads", ["3", "below it"]),
        ("heads.loss_weights=[1, 2]", "heads.loss_weights", ["2 weights for n=4 heads"]),
        ("data.path=", "data.path", ["None", "str"]),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(tmp_path: Path, override: str, field: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, ""), [override])
    assert caught.value.field == field
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("override", ["heads.n", "=3", "heads..n=3", "train.steps=[1"])
def test_an_override_that_cannot_be_read_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe(write(tmp_path, ""), [override])


def test_an_override_below_a_value_names_that_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps is a value, not a section"):
        load_recipe(write(tmp_path, "train: {steps: 4}\n"), ["train.steps.x=3"])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("- 1\n- 2\n", "not sections"),
        ("model: {a: [}\n", "not readable YAML"),
        (f"train: {{steps: {'9' * 5000}}}\n", "not readable YAML"),
        ("train: {steps: 1}\ntrain: {steps: 2}\n", "'train' is given twice"),
        ("train:\n  steps: 1\n  steps: 2\n", "'steps' is given twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_recipe(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(tmp_path / "absent.yaml")


def test_what_is_dumped_is_read_back(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, ""), ["heads.n=8", "heads.loss_decay=0.5", "optimizer.lr=3e-4"])
    resolved = recipe.resolved(vocab_size=300)
    for one in (recipe, resolved):
        assert load_recipe(write(tmp_path, dump_recipe(one))) == one


def test_resolving_fills_in_what_was_derived() -> None:
    tree = {"model": {"hidden_size": 96, "num_attention_heads": 4}, "optimizer": {"lr": 0.1}, "train": {"steps": 9}}
    recipe = parse_recipe(tree).resolved(vocab_size=257)
    assert recipe.model.ffn_hidden_size == 256  # 8/3 x 96
    assert recipe.model.num_query_groups == 4
    assert recipe.model.vocab_size == 257
    assert recipe.optimizer.min_lr == pytest.approx(0.003)  # the paper's 0.03 of the peak
    assert recipe.optimizer.decay_steps == 9
    assert recipe.train.seq_length == recipe.model.seq_length
    assert padded_vocab_size(recipe) == 384
    assert recipe.resolved(vocab_size=1000) == recipe
    given = parse_recipe({**tree, "optimizer": {"lr": 0.1, "min_lr": 0.0, "decay_steps": 100}}).resolved()
    assert (given.optimizer.min_lr, given.optimizer.decay_steps) == (0.0, 100)


def test_every_key_is_described_with_type_default_and_meaning() -> None:
    lines = describe_fields().splitlines()
    assert [line.split()[0] for line in lines] == known_keys()
    assert all(len(line.split()) >= 5 for line in lines), "a key lacks its meaning"
    by_key = {line.split()[0]: line for line in lines}
    assert "false" in by_key["optimizer.distributed"]
    assert "0.0 " in by_key["model.hidden_dropout"]
    assert "auto|never|must" in by_key["run.resume"]


def test_every_default_satisfies_its_own_field() -> None:
    assert parse_recipe(yaml.safe_load(dump_recipe(Recipe()))) == Recipe()


def test_nearest_key_prefers_the_section_that_was_named() -> None:
    assert nearest_key("train.sed") == "train.seed"
    assert nearest_key("data.sed") == "data.seed"
    assert nearest_key("paralel.tensor") == "parallel.tensor"


def test_reading_a_recipe_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, mtp_megatron.training.cli, mtp_megatron.training.preflight\n"
        "print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_skipped_steps_are_ascending_pairs() -> None:
    train = parse_recipe({"train": {"steps": 20, "skip_steps": [[1, 2], [5, 5], [6, 8], [18, 30]]}}).train
    after = {step: train.skipped_to(step) for step in range(20)}
    moved = {step: to for step, to in after.items() if to != step}
    assert moved == {0: 2, 1: 2, 4: 8, 5: 8, 6: 8, 7: 8, 17: 20, 18: 20, 19: 20}
    assert load_recipe_text(["train.skip_steps=[[3, 4]]"]).train.skip_steps == [[3, 4]]


def load_recipe_text(overrides: list[str]) -> Recipe:
    return parse_recipe(overridden({}, overrides))


@pytest.mark.parametrize(
    "wrong",
    [[[0, 3]], [[4, 3]], [[3]], [[1, 2, 3]], [[5, 8], [8, 9]], [[5, 8], [1, 2]], [3, 4], [["a", "b"]], [[1.5, 2]]],
)
def test_skipped_steps_that_make_no_sense_are_refused_by_name(wrong: list[object]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({"train": {"skip_steps": wrong}})
    assert caught.value.field.startswith("train.skip_steps")
    assert caught.value.remedy
