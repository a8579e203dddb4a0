"""FP8 in the trunk: what is refused where and by which name, and what megatron-core is told.

Which layers run in FP8 is in test_fp8_contexts.py, what needs a GPU in tests/gpu.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mtp_megatron import compat
from mtp_megatron.compat import fp8, packages
from mtp_megatron.config import HeadsConfig
from mtp_megatron.errors import ConfigError
from mtp_megatron.training.low_precision import NAMES, config_fields
from mtp_megatron.training.preflight import preflight
from mtp_megatron.training.recipe import Recipe
from mtp_megatron.training.recipe_io import load_recipe, parse_recipe
from mtp_megatron.training.validate import check_recipe
from tests.documents import NOT_RUN
from tests.training_runs import make_data, tiny_tree

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a CUDA device")
ROOT = Path(__file__).parents[2]
TE = packages.Package("transformer-engine", packages.State.USABLE, "2.10.0")
H100 = fp8.Machine("NVIDIA H100", (9, 0), Version("13.0"), TE)
ON = {"train__precision": "bf16", "train__transformer_engine": True, "train__fp8": "hybrid"}


def recipe_of(**overrides: Any) -> Recipe:
    return parse_recipe(tiny_tree(Path("data"), Path("run"), **overrides))


class TestMachine:
    @pytest.mark.parametrize(
        ("capability", "cuda", "works"),
        [
            ((8, 0), "13.0", []),
            ((8, 9), "13.0", ["tensorwise", "delayed"]),
            ((9, 0), "12.8", ["tensorwise", "delayed"]),
            ((9, 0), "12.9", ["tensorwise", "blockwise", "delayed"]),
            ((10, 0), "12.8", ["mxfp8", "tensorwise", "delayed", "nvfp4"]),
            ((10, 3), "13.0", ["mxfp8", "tensorwise", "blockwise", "delayed", "nvfp4"]),
            ((12, 0), "13.0", ["tensorwise", "blockwise", "delayed", "nvfp4"]),
            (None, None, []),
        ],
    )
    def test_which_scaling_works_where(
        self, capability: tuple[int, int] | None, cuda: str | None, works: list[str]
    ) -> None:
        machine = fp8.Machine("a device", capability, Version(cuda) if cuda else None, TE)
        assert [name for name, scaling in fp8.SCALINGS.items() if fp8.why_not(scaling, machine) is None] == works
        for name in fp8.SCALINGS:
            asked = fp8.Request(fp4="e2m1") if name == fp8.NVFP4 else fp8.Request(fp8="hybrid", fp8_recipe=name)
            if name in works:
                fp8.check_machine(asked, machine, NAMES)
                continue
            with pytest.raises(ConfigError) as refused:
                fp8.check_machine(asked, machine, NAMES)
            assert refused.value.field.startswith("train.fp")
            assert re.search(r"compute capability|CUDA 12\.9", refused.value.problem)
            proposed = next((name for name in works if name != fp8.NVFP4), "Leave train.fp")
            assert proposed in refused.value.remedy

    @pytest.mark.parametrize(
        ("version", "pinned", "says"),
        [
            ("2.1.0", "", "Transformer Engine 2.2 or later, and 2.1.0"),
            ("2.12.0", ">=2.9.0a0,<2.12.0", "megatron-core names Transformer Engine .*2.12.0 is installed"),
            ("2.10.0+cu13", ">=2.9.0a0,<2.12.0", None),
            ("", ">=2.9", None),  # a checkout without metadata
        ],
    )
    def test_versions_of_transformer_engine(self, version: str, pinned: str, says: str | None) -> None:
        package = dataclasses.replace(TE, version=version)
        machine = dataclasses.replace(H100, transformer_engine=package, pinned=SpecifierSet(pinned))
        asked = fp8.Request(fp8="hybrid", fp8_recipe="tensorwise")
        if says is None:
            fp8.check_machine(asked, machine, NAMES)
        else:
            with pytest.raises(ConfigError, match=says):
                fp8.check_machine(asked, machine, NAMES)

    def test_missing_transformer_engine_is_named(self) -> None:
        package = packages.Package("transformer-engine", packages.State.MISSING)
        machine = dataclasses.replace(H100, transformer_engine=package)
        with pytest.raises(
            ConfigError, match=r"^train.fp8='hybrid': .*Transformer Engine, which is missing.*Put right"
        ):
            fp8.check_machine(fp8.Request(fp8="hybrid"), machine, NAMES)

    def test_the_pin_is_megatron_cores_own(self) -> None:
        pinned = packages.transformer_engine_pin()
        assert (str(pinned) != "") == (compat.MCORE_VERSION.release[:2] == (0, 16))

    @no_cuda
    def test_this_machine(self) -> None:
        assert fp8.this_machine().capability is None


@pytest.mark.parametrize(
    ("field", "says", "overrides"),
    [
        ("train.fp8", "Set train.precision=bf16", {"train__precision": "fp32"}),
        ("train.fp8", "train.transformer_engine=true", {"train__transformer_engine": False}),
        ("train.fp4", "train.fp8='hybrid' is set", {"train__fp4": "e2m1"}),
        ("train.first_last_layers_bf16", "tensorwise", {"train__first_last_layers_bf16": True}),
        ("train.fp8_param", "optimizer.distributed=true", {"train__fp8_param": True}),
        (
            "train.fp8_param",
            "mxfp8's matrices",
            {"train__fp8_param": True, "optimizer__distributed": True, "train__fp8_recipe": "mxfp8"},
        ),
        ("train.fp8_param", "no FP8 without train.fp8", {"train__fp8": None, "train__fp8_param": True}),
        ("heads.fp8", "history", {"heads__fp8": True}),
        ("heads.fp8", "without train.fp8", {"heads__fp8": True, "train__fp8": None}),
        ("heads.fp8", "kind=linear", {"heads__fp8": True, "heads__kind": "linear"}),
        ("train.fp8", "DeepSpeed", {"run__deepspeed": "ds.json"}),
        (
            "train.fp8_recipe",
            "with blockwise scaling yet, not on a CPU either. Set train.fp8_recipe to tensorwise or delayed",
            {"model__num_experts": 2, "train__fp8_recipe": "blockwise"},
        ),
        ("train.fp8_recipe", "with mxfp8 scaling", {"model__num_experts": 2, "train__fp8_recipe": "mxfp8"}),
        (
            "train.fp4",
            "set train.fp8=hybrid and train.fp8_recipe=tensorwise",
            {"model__num_experts": 2, "train__fp8": None, "train__fp4": "e2m1"},
        ),
        (
            "train.fp8_param",
            "no trunk with experts",
            {"model__num_experts": 2, "train__fp8_param": True, "optimizer__distributed": True},
        ),
        ("model.moe_ffn_hidden_size", "24 channels", {"model__num_experts": 2, "model__moe_ffn_hidden_size": 24}),
        (
            "model.ffn_hidden_size",
            "72 channels",
            {
                "model__num_experts": 2,
                "model__moe_ffn_hidden_size": 32,
                "model__ffn_hidden_size": 72,
                "heads__fp8": True,
                "train__fp8_recipe": "tensorwise",
            },
        ),
        ("model.ffn_hidden_size", "multiples of 16", {"model__ffn_hidden_size": 72}),
        ("train.micro_batch_size", "8 tokens", {"train__seq_length": 8}),
        (
            "train.num_layers_at_end_in_bf16",
            "at most the 4 layers",
            {
                "train__fp8_recipe": "tensorwise",
                "train__first_last_layers_bf16": True,
                "train__num_layers_at_end_in_bf16": 5,
            },
        ),
    ],
)
def test_recipes_that_cannot_work_anywhere(field: str, says: str, overrides: dict[str, Any]) -> None:
    check_recipe(recipe_of(**ON), world_size=1, tokenizer_vocab_size=257)
    with pytest.raises(ConfigError) as refused:
        check_recipe(recipe_of(**ON | overrides), world_size=1, tokenizer_vocab_size=257)
    assert refused.value.field == field
    assert says in str(refused.value)


@pytest.mark.parametrize("name", ["delayed", "tensorwise"])
def test_experts_take_part(name: str) -> None:
    """And the width of the heads, which stay in bf16, is then nobody's who is quantised."""
    experts = {"model__num_experts": 2, "model__moe_ffn_hidden_size": 32, "model__ffn_hidden_size": 72}
    recipe = recipe_of(**ON, **experts, train__fp8_recipe=name)
    assert check_recipe(recipe, world_size=1, tokenizer_vocab_size=257).train.fp8_recipe == name


@pytest.mark.parametrize(
    ("field", "overrides"),
    [("train.micro_batch_size", {"train__seq_length": 128}), ("model.hidden_size", {"model__hidden_size": 320})],
)
def test_what_sequence_parallelism_gathers_comes_in_whole_blocks(field: str, overrides: dict[str, Any]) -> None:
    """Transformer Engine quantises before it gathers, and asserts that it can."""
    fits = {
        "model__seq_length": 256,
        "model__hidden_size": 384,
        "model__ffn_hidden_size": 384,
        "parallel__tensor": 2,
        "parallel__sequence_parallel": True,
        "train__fp8_recipe": "blockwise",
    }

    def check(**overrides: Any) -> None:
        check_recipe(recipe_of(**ON | fits | overrides), world_size=2, tokenizer_vocab_size=257)

    check()
    check(**overrides, train__fp8_recipe="tensorwise")
    check(**overrides, parallel__sequence_parallel=False)
    with pytest.raises(ConfigError, match="blockwise scaling takes multiples of 128 with sequence") as refused:
        check(**overrides)
    assert refused.value.field == field


def test_the_recipe_reaches_megatron_core() -> None:
    from mtp_megatron.training.build import transformer_config

    assert config_fields(recipe_of()) == {}
    plain = transformer_config(recipe_of().resolved(vocab_size=257))
    assert (plain.fp8, plain.fp4, plain.fp8_param, plain.first_last_layers_bf16) == (None, None, False, False)
    overrides = {"train__fp8_recipe": "tensorwise", "train__fp8_param": True, "train__first_last_layers_bf16": True}
    recipe = recipe_of(**ON, **overrides, train__num_layers_at_start_in_bf16=2)
    config = transformer_config(recipe.resolved(vocab_size=257))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", "tensorwise", True)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 1)


def test_layers_in_bf16_get_a_configuration_without_fp8() -> None:
    from mtp_megatron.training.build import transformer_config

    plain = transformer_config(recipe_of().resolved(vocab_size=257))
    assert compat.without_fp8(plain) is plain
    config = transformer_config(recipe_of(**ON).resolved(vocab_size=257))
    off = compat.without_fp8(config)
    assert (off.fp8, off.fp4, off.fp8_param) == (None, None, False)
    assert config.fp8 == "hybrid"
    assert off.hidden_size == config.hidden_size


def test_a_trace_refuses_it() -> None:
    from mtp_megatron.planning.trace import check_traceable

    check_traceable(recipe_of(), 0, 1)
    with pytest.raises(ConfigError, match=r"^train.fp8='hybrid': .*not traced"):
        check_traceable(recipe_of(**ON), 0, 1)


def test_the_documents_table_and_command_are_the_codes() -> None:
    text = (ROOT / "docs/fp8.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*?`?(?:train.fp4=)?(\w+)`.*? \| (.+?) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    written = {name.replace("e2m1", fp8.NVFP4): tuple(rest) for name, *rest in rows}
    assert written == {
        name: (
            ".".join(map(str, scaling.since))
            + (f" to below {'.'.join(map(str, scaling.before))}" if scaling.before else " or higher"),
            str(scaling.cuda),
            str(scaling.transformer_engine),
        )
        for name, scaling in fp8.SCALINGS.items()
    }
    (command,) = re.findall(r"^mtp-megatron train (.+?)\n```", text, re.MULTILINE | re.DOTALL)
    recipe, *overrides = command.replace("\\\n", " ").split()
    checked = check_recipe(load_recipe(ROOT / recipe, overrides), world_size=4, tokenizer_vocab_size=32000)
    assert (checked.train.fp8, checked.train.fp8_recipe) == ("hybrid", "tensorwise")
    directives = re.findall(r"<!-- test: (.+?) -->\n```bash", text)
    assert len(directives) == text.count("```bash")
    assert set(directives) == {f"not run, {reason}" for name, reason in NOT_RUN if name == "docs/fp8.md"}


@no_cuda
def test_the_models_own_builder_refuses_too() -> None:
    from mtp_megatron.model import build_model
    from mtp_megatron.training.build import transformer_config

    config = transformer_config(recipe_of(**ON).resolved(vocab_size=257))
    with pytest.raises(ConfigError, match=r"^fp8='hybrid': .*no CUDA device"):
        build_model(config, HeadsConfig(), vocab_size=257, padded_vocab_size=384, max_sequence_length=32)
    config.fp8, config.fp8_output_proj = None, True
    with pytest.raises(ConfigError, match=r"^fp8_output_proj=True"):
        build_model(config, HeadsConfig(), vocab_size=257, padded_vocab_size=384, max_sequence_length=32)


@no_cuda
def test_without_a_device_it_says_why_not_and_imports_nothing(tmp_path: Path) -> None:
    """Packages that fail when they are imported lie in front of all others."""
    data = make_data(tmp_path)
    for name, part in (("transformer_engine", "pytorch"), ("apex", "optimizers")):
        for folder in (tmp_path / "path" / name, tmp_path / "path" / name / part):
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    for part in ("multi_tensor_apply", "normalization"):
        (tmp_path / "path/apex" / part).mkdir()
    (tmp_path / "path/amp_C.py").write_text("raise RuntimeError('imported')")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {precision: bf16, transformer_engine: true, fp8: hybrid, fp8_recipe: mxfp8}")
    command = [
        sys.executable,
        "-m",
        "mtp_megatron",
        "train",
        str(recipe),
        f"data.path={data}",
        f"run.path={tmp_path}/r",
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), str(ROOT)])}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "train.fp8='hybrid': with the recipe mxfp8: there is no CUDA device on this machine" in result.stderr
    assert "compute capability 10.0 to below 12.0" in result.stderr
    assert "imported" not in result.stderr
    assert not (tmp_path / "r").exists()


def test_the_machine_is_looked_at_before_a_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny_tree(make_data(tmp_path), tmp_path / "run", **ON | {"train__fp8_recipe": "mxfp8"})
    monkeypatch.setattr(fp8, "this_machine", lambda: H100)
    with pytest.raises(ConfigError, match=r"^train.fp8_recipe='mxfp8': .*NVIDIA H100.*Set train.fp8_recipe to tensorw"):
        preflight(parse_recipe(tree), 1)
    tree["train"]["fp8_recipe"] = "tensorwise"
    assert preflight(parse_recipe(tree), 1).recipe.train.fp8 == "hybrid"
