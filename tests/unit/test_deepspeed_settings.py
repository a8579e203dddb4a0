"""The DeepSpeed configuration and the recipe: merged where one is silent, refused by name where they disagree."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mtp_megatron.deepspeed.settings import engine_config, merged_recipe, read_config, zero_stage
from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import load_recipe, parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.training_runs import make_data, tiny_tree

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "deepspeed"


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    return parse_recipe({"run": {"deepspeed": "ds.json"}, **sections})


def complaint(config: dict[str, Any], copies: int = 2, **sections: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        merged_recipe(recipe_of(**sections), config, copies)
    return caught.value


def test_what_one_leaves_open_the_other_decides() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 0.002, "betas": [0.8, "auto"], "torch_adam": True}},
        "zero_optimization": {"stage": 2, "overlap_comm": True},
    }
    config["optimizer"]["params"]["betas"] = [0.8, 0.9]
    recipe = merged_recipe(recipe_of(optimizer={"eps": 1e-6}), config, 4)
    train, optimizer = recipe.train, recipe.optimizer
    assert (train.micro_batch_size, train.global_batch_size, train.precision) == (2, 24, "bf16")
    assert (optimizer.clip_grad, optimizer.lr, optimizer.beta1, optimizer.beta2) == (0.5, 0.002, 0.8, 0.9)
    engine = engine_config(recipe.resolved(vocab_size=257), config, 4, context_parallel=2)
    assert engine["train_batch_size"] == 48, "DeepSpeed counts context parallel ranks as data parallel"
    assert engine["gradient_accumulation_steps"] == 3
    assert engine["optimizer"]["params"] == {
        "lr": 0.002,
        "betas": [0.8, 0.9],
        "eps": 1e-6,
        "weight_decay": 0.1,
        "torch_adam": True,
    }
    assert engine["zero_optimization"] == config["zero_optimization"]
    assert (engine["bf16"]["enabled"], engine["fp16"]["enabled"]) == (True, False)


def test_auto_and_silence_mean_the_recipe() -> None:
    config = read_config(EXAMPLES / "zero3.json")
    recipe = recipe_of(train={"micro_batch_size": 2, "global_batch_size": 12, "precision": "fp16"})
    assert merged_recipe(recipe, config, 3) == recipe
    assert merged_recipe(recipe, {}, 3) == recipe
    engine = engine_config(recipe.resolved(vocab_size=257), config, 3)
    assert "auto" not in json.dumps(engine)
    assert engine["fp16"]["enabled"]
    assert engine["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("config", "sections", "field", "both"),
    [
        (
            {"train_micro_batch_size_per_gpu": 2},
            {"train": {"micro_batch_size": 4}},
            "train_micro_batch_size_per_gpu",
            ["=2", "train.micro_batch_size=4"],
        ),
        (
            {"train_batch_size": 32},
            {"train": {"global_batch_size": 64}},
            "train_batch_size",
            ["=32", "train.global_batch_size=64"],
        ),
        (
            {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 1},
            {"train": {"global_batch_size": 8}},
            "gradient_accumulation_steps",
            ["=2", "batch of 4", "train.global_batch_size=8"],
        ),
        (
            {"gradient_accumulation_steps": 2, "train_batch_size": 16, "train_micro_batch_size_per_gpu": 1},
            {},
            "gradient_accumulation_steps",
            ["=2", "batch of 4", "train.global_batch_size=16"],
        ),
        ({"gradient_clipping": 0.5}, {"optimizer": {"clip_grad": 1.0}}, "gradient_clipping", ["=0.5", "clip_grad=1.0"]),
        (
            {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}},
            {"optimizer": {"beta2": 0.95}},
            "optimizer.params.betas",
            ["=0.999", "optimizer.beta2=0.95"],
        ),
        (
            {"bf16": {"enabled": True}},
            {"train": {"precision": "fp32"}},
            "bf16.enabled",
            ["=True", "train.precision='fp32'"],
        ),
        (
            {"bf16": {"enabled": False}},
            {"train": {"precision": "bf16"}},
            "bf16.enabled",
            ["=False", "train.precision='bf16'"],
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, "bf16.enabled", ["fp16.enabled"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler.type", ["WarmupLR", "optimizer.schedule"]),
        ({"optimizer": {"type": "Lion"}}, {}, "optimizer.type", ["Lion", "AdamW"]),
        (
            {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
            {},
            "optimizer.params.adam_w_mode",
            ["decoupled"],
        ),
        (
            {"zero_optimization": {"stage": 1}},
            {"parallel": {"pipeline": 2}},
            "parallel.pipeline",
            ["=2", "PipelineModule", "z's gradient", "leave out run.deepspeed", "optimizer.distributed (ZeRO 1)"],
        ),
        (
            {},
            {"model": {"num_experts": 4}, "parallel": {"expert": 2}},
            "model.num_experts",
            ["=4", "load-balancing", "leave out run.deepspeed"],
        ),
        (
            {"zero_optimization": {"stage": 1}},
            {"optimizer": {"distributed": True}},
            "optimizer.distributed",
            ["zero_optimization.stage=1"],
        ),
        (
            {"zero_optimization": {"stage": 3}},
            {"heads": {"execution": "joint"}},
            "heads.execution",
            ["zero_optimization.stage=3"],
        ),
        ({}, {"train": {"async_save": True}}, "train.async_save", ["=True", "leave out run.deepspeed"]),
        ({"zero_optimization": {"stage": 4}}, {}, "zero_optimization.stage", ["=4", "0, 1, 2 or 3"]),
        ({"tensor_parallel": {"autotp_size": 2}}, {}, "tensor_parallel.autotp_size", ["parallel.tensor"]),
        ({"sequence_parallel_size": 2}, {}, "sequence_parallel_size", ["parallel.context"]),
        ({"checkpoint": {"load_universal": True}}, {}, "checkpoint.load_universal", ["by itself"]),
        ({"managed_gradient_accumulation": False}, {}, "managed_gradient_accumulation", ["last one"]),
        ({"gradient_accumulation_steps": 0}, {}, "gradient_accumulation_steps", ["=0"]),
        ({"train_batch_size": "many"}, {}, "train_batch_size", ["'many'", "train.global_batch_size"]),
        ({"train_batch_size": -8}, {}, "train_batch_size", ["=-8", "train.global_batch_size", ">= 1"]),
        ({"train_batch_size": float("inf")}, {}, "train_batch_size", ["=inf", "train.global_batch_size"]),
        ({"train_batch_size": 10**400}, {}, "train_batch_size", ["=1000", "train.global_batch_size", "Give a number"]),
        ({"gradient_clipping": -(10**400)}, {}, "gradient_clipping", ["=-1000", "optimizer.clip_grad"]),
        ({"gradient_accumulation_steps": 10**400}, {}, "gradient_accumulation_steps", ["=1000"]),
        ({"optimizer": {"params": {"lr": -0.1}}}, {}, "optimizer.params.lr", ["=-0.1", "optimizer.lr", "> 0"]),
        ({"bf16": True}, {}, "bf16", ["=True", "JSON object"]),
        ({"optimizer": "AdamW"}, {}, "optimizer", ["'AdamW'", "JSON object"]),
        ({"optimizer": {"params": None}}, {}, "optimizer.params", ["=None", "JSON object"]),
        ({"checkpoint": True}, {}, "checkpoint", ["=True", "JSON object"]),
        # Taken for "off", each of these would train in fp32 without a word.
        ({"bf16": {"enabled": "true"}}, {}, "bf16.enabled", ["'true'", "neither true nor false"]),
        ({"fp16": {"enabled": 1}}, {}, "fp16.enabled", ["=1", "neither true nor false"]),
        ({"bfloat16": {"enabled": True}}, {}, "bfloat16", ["older name", "bf16"]),
    ],
)
def test_disagreements_and_what_cannot_be_are_refused_by_name(
    config: dict[str, Any], sections: dict[str, Any], field: str, both: list[str]
) -> None:
    error = complaint(config, **sections)
    assert error.field == field
    for words in both:
        assert words in str(error)


@pytest.mark.parametrize(
    ("text", "says"), [("{", "not readable JSON"), ("[]", "holds a list"), ('{"a": 1, "a": 2}', "'a' is given twice")]
)
def test_a_configuration_that_cannot_be_read_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    with pytest.raises(ConfigError, match="there is no such file"):
        read_config(path)
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_config(path)


@pytest.mark.parametrize(("name", "world"), [("7b", 8), ("13b", 16), ("small", 2)])
def test_the_example_recipes_are_sound_in_their_full_size(name: str, world: int) -> None:
    recipe = load_recipe(EXAMPLES / f"{name}.yaml")
    config = read_config(ROOT / str(recipe.run.deepspeed))
    copies = world // recipe.model_parallel_size
    merged = check_recipe(merged_recipe(recipe, config, copies), world_size=world, tokenizer_vocab_size=32000)
    assert engine_config(merged, config, copies)["train_batch_size"] == merged.train.global_batch_size
    least, most = {"7b": (6.5e9, 7.0e9), "13b": (12.8e9, 13.3e9), "small": (8e6, 12e6)}[name]
    assert least < _parameters(merged) < most


def _parameters(recipe: Recipe) -> int:
    model, h = recipe.model, recipe.model.hidden_size
    assert model.ffn_hidden_size is not None
    layer = 4 * h * h + 3 * h * model.ffn_hidden_size + 2 * h
    return (model.num_trunk_layers + recipe.heads.n) * layer + 2 * 32000 * h + h


@pytest.mark.deepspeed
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_deepspeed_accepts_the_example_configurations(path: Path) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = read_config(path)
    recipe = merged_recipe(recipe_of(train={"precision": "bf16"}), config, 1).resolved(vocab_size=257)
    accepted = DeepSpeedConfig(engine_config(recipe, config, 1))  # without a process group it takes a world of one
    assert accepted.zero_optimization_stage == zero_stage(config)
    assert (accepted.train_batch_size, accepted.gradient_accumulation_steps) == (8, 2)


def test_without_deepspeed_the_rest_works_and_asking_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtp_megatron.compat import packages
    from mtp_megatron.compat.versions import EnvironmentUnsupported
    from mtp_megatron.training.preflight import preflight

    locate = packages.locate
    monkeypatch.setattr(packages, "locate", lambda name: None if name == "deepspeed" else locate(name))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    data = make_data(tmp_path)
    assert preflight(parse_recipe(tiny_tree(data, tmp_path / "run")), 1).world_size == 1
    config = tmp_path / "ds.json"
    config.write_text("{}")
    with pytest.raises(EnvironmentUnsupported) as caught:
        preflight(parse_recipe(tiny_tree(data, tmp_path / "run", run__deepspeed=str(config))), 1)
    for words in ("pip install 'PATH_TO_CHECKOUT[deepspeed]'", "DS_BUILD_OPS=0", "--no-build-isolation", "g++"):
        assert words in str(caught.value)


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtp_megatron.compat import packages
    from mtp_megatron.compat.versions import EnvironmentUnsupported

    monkeypatch.setattr(packages, "deepspeed", lambda: packages.Package("deepspeed", packages.State.USABLE))
    monkeypatch.setenv("CXX", "no-such-compiler")
    packages.require_deepspeed(cuda=True)
    with pytest.raises(EnvironmentUnsupported, match="C\\+\\+ compiler"):
        packages.require_deepspeed(cuda=False)


def test_fp16_needs_deepspeed() -> None:
    with pytest.raises(ConfigError, match=r"run\.deepspeed"):
        check_recipe(parse_recipe({"train": {"precision": "fp16"}}), world_size=1, tokenizer_vocab_size=257)


@pytest.mark.deepspeed
def test_fp16_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a model is built; on a GPU DeepSpeed trains it, with a loss scale of its own."""
    import torch

    from mtp_megatron.deepspeed.trainer import build_trainer

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="there is no GPU") as caught:
        build_trainer(merged_recipe(recipe_of(), {"fp16": {"enabled": True}}, 1))
    assert (caught.value.field, caught.value.value) == ("train.precision", "fp16")
    assert "Use bf16" in str(caught.value)


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("cuda", "home", "installed", "says"),
    [
        (False, "/usr/local/cuda", True, "takes a minute"),
        (True, None, False, "CUDA toolkit"),
        (True, "/usr/local/cuda", False, None),
        (True, None, True, None),
    ],
)
def test_adam_is_torchs_where_deepspeeds_cannot_be_had(
    cuda: bool, home: str | None, installed: bool, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed import git_version_info
    from torch.utils import cpp_extension

    from mtp_megatron.deepspeed.extensions import why_no_fused_adam

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", home)
    monkeypatch.setitem(git_version_info.installed_ops, "fused_adam", installed)
    reason = why_no_fused_adam(cuda)
    assert (reason is None) if says is None else (reason is not None and says in reason)
