"""The heads' arguments on Megatron-LM's command line: their meaning, and what is refused by name."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from mtp_megatron.compat import fp8, megatron_lm, packages, versions
from mtp_megatron.config import HeadsConfig
from mtp_megatron.errors import ConfigError
from mtp_megatron.megatron_lm.arguments import FLAGS, REFUSALS, add_mtp_args, check_args, heads_from_args
from tests.megatron_lm import needs_megatron_lm

# Of Megatron-LM's arguments those that have no neutral default.
HOST = {
    "position_embedding_type": "rope",
    "transformer_impl": "local",
    "context_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "use_distributed_optimizer": False,
    "reset_attention_mask": False,
    "seq_length": 32,
    "eod_mask_loss": False,
}


def parse(*argv: str, **host: Any) -> argparse.Namespace:
    parser = add_mtp_args(argparse.ArgumentParser(allow_abbrev=False))
    return argparse.Namespace(**(HOST | vars(parser.parse_args(argv)) | host))


def test_every_setting_of_the_model_and_its_loss_has_a_flag() -> None:
    assert {flag.field for flag in FLAGS} == set(HeadsConfig.model_fields) - {"new_heads"}, "new_heads is for run.load"
    command = """--mtp-heads 3 --mtp-head-kind transformer --mtp-head-arrangement causal --mtp-unembedding replicated
        --mtp-execution joint --mtp-loss-decay 0.5 --mtp-loss-chunk-tokens 64 --mtp-curriculum-steps 10
        --mtp-trainable heads --mtp-documents separate --mtp-fp8-heads --mtp-z-loss 1e-4"""
    args = parse(*command.split())
    assert heads_from_args(args) == HeadsConfig(
        n=3,
        kind="transformer",
        arrangement="causal",
        unembedding="replicated",
        execution="joint",
        loss_decay=0.5,
        z_loss=1e-4,
        loss_chunk_tokens=64,
        curriculum_steps=10,
        trainable="heads",
        documents="separate",
        fp8=True,
    )
    assert heads_from_args(parse("--mtp-heads", "2", "--mtp-loss-weights", "1", "0.5")).loss_weights == (1.0, 0.5)


def test_documents_follow_megatron_lms_own_loss() -> None:
    assert heads_from_args(parse("--mtp-heads", "2")).documents == "ignore"
    assert heads_from_args(parse("--mtp-heads", "2", eod_mask_loss=True)).documents == "separate"
    assert (
        heads_from_args(parse("--mtp-heads", "2", "--mtp-documents", "ignore", eod_mask_loss=True)).documents
        == "ignore"
    )


@pytest.mark.parametrize(
    ("argv", "flag", "value"),
    [
        ([], "--mtp-heads", None),
        (["--mtp-heads", "0"], "--mtp-heads", 0),
        (["--mtp-heads", "2", "--mtp-loss-decay", "1.5"], "--mtp-loss-decay", 1.5),
        (["--mtp-heads", "2", "--mtp-z-loss", "-0.5"], "--mtp-z-loss", -0.5),
        (["--mtp-heads", "2", "--mtp-z-loss", "1e4"], "--mtp-z-loss", 1e4),
        (["--mtp-heads", "2", "--mtp-loss-decay", "0.5", "--mtp-loss-weights", "1", "1"], "--mtp-loss-decay", 0.5),
        (["--mtp-heads", "2", "--mtp-loss-weights", "1"], "--mtp-loss-weights", (1.0,)),
        (["--mtp-heads", "2", "--mtp-head-kind", "linear", "--mtp-head-arrangement", "causal"], None, "causal"),
        (["--mtp-heads", "64"], "--mtp-heads", 64),
    ],
)
def test_impossible_heads_are_refused_by_the_flags_name(argv: list[str], flag: str | None, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        check_args(parse(*argv))
    assert refused.value.field == (flag or "--mtp-head-arrangement")
    assert refused.value.value == value
    assert refused.value.remedy


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
def test_what_cannot_work_with_heads_is_refused_by_name(refusal: Any) -> None:
    check_args(parse("--mtp-heads", "2", **{refusal.dest: refusal.fine[0]}))
    wrong = {"--mtp-num-layers": 1, "--rotary-percent": 0.5, "--rotary-seq-len-interpolation-factor": 2}.get(
        refusal.name, True
    )
    with pytest.raises(ConfigError, match=f"^{refusal.name}={wrong!r}: "):
        check_args(parse("--mtp-heads", "2", **{refusal.dest: wrong}))


def test_weights_cut_further_than_by_tensor_parallelism_are_refused() -> None:
    host = {"tensor_model_parallel_size": 2, "tensor_parallel_num_weight_shards": 4}
    check_args(parse("--mtp-heads", "2", **host, gtp_weight_remat_size=1))
    with pytest.raises(ConfigError, match=r"^--tensor-parallel-num-weight-shards=4: .*-size 2$"):
        check_args(parse("--mtp-heads", "2", **host, gtp_weight_remat_size=2))


def test_transformer_engine_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is Megatron-LM's default."""
    found = packages.Package("transformer-engine", packages.State.MISSING)
    monkeypatch.setattr(packages, "transformer_engine", lambda cuda: found)
    with pytest.raises(ConfigError, match=r"^--transformer-impl='transformer_engine': .*missing\. Set it to local"):
        check_args(parse("--mtp-heads", "2", transformer_impl="transformer_engine"))
    found = packages.Package("transformer-engine", packages.State.USABLE, "2.9")
    check_args(parse("--mtp-heads", "2", transformer_impl="transformer_engine"))


def test_asynchronous_saves_are_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream's writer dies of it, and the job waits for it without end."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^--async-save=True: .* need a CUDA device, .*train\.async_save=true"):
        check_args(parse("--mtp-heads", "2", async_save=True))
    check_args(parse("--mtp-heads", "2", async_save=False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_args(parse("--mtp-heads", "2", async_save=True))


LOW_PRECISION = {"transformer_impl": "transformer_engine", "bf16": True, "fp8": "hybrid", "fp8_recipe": "tensorwise"}


def on(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """A machine with Transformer Engine, and a device of this compute capability or none."""
    package = packages.Package("transformer-engine", packages.State.USABLE, "2.10.0")
    machine = fp8.Machine("a device", capability, Version("13.0"), package)
    monkeypatch.setattr(fp8, "this_machine", lambda: machine)
    monkeypatch.setattr(packages, "transformer_engine", lambda cuda: package)


def test_fp8_goes_through_to_the_trunk_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, (9, 0))
    assert not check_args(parse("--mtp-heads", "2", **LOW_PRECISION)).fp8
    assert check_args(parse("--mtp-heads", "2", "--mtp-fp8-heads", **LOW_PRECISION)).fp8
    check_args(parse("--mtp-heads", "2", **LOW_PRECISION | {"fp8_recipe": "delayed", "fp8_param_gather": True}))


@pytest.mark.parametrize(
    ("argv", "host", "says"),
    [
        ([], {"fp8_recipe": "mxfp8"}, r"--fp8-recipe='mxfp8': .*10\.0.*Set --fp8-recipe to tensorwise"),
        ([], {"fp8": None, "fp4": "e2m1"}, r"--fp4-format='e2m1': .*Set --fp8-format and --fp8-recipe to hybrid"),
        ([], {"fp8_recipe": "custom"}, "--fp8-recipe='custom': "),
        ([], {"bf16": False}, "--fp8-format='hybrid': .*Set --bf16"),
        ([], {"transformer_impl": "local"}, "--fp8-format='hybrid': .*--transformer-impl to transformer_engine"),
        ([], {"fp8_recipe": "delayed", "first_last_layers_bf16": True}, "--first-last-layers-bf16=True: "),
        (["--mtp-fp8-heads"], {"fp8_recipe": "delayed"}, "--mtp-fp8-heads=True: .*history"),
        (["--mtp-fp8-heads"], {"fp8": None}, "--mtp-fp8-heads=True: .*--fp8-format"),
    ],
)
def test_fp8_is_refused_by_the_flags_name(
    argv: list[str], host: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, (9, 0))
    with pytest.raises(ConfigError, match=f"^{says}"):
        check_args(parse("--mtp-heads", "2", *argv, **LOW_PRECISION | host))


SHARED = {"num_experts": 4, "moe_grouped_gemm": True, "fp8": "hybrid", "fp8_recipe": "delayed"}
TENSORWISE = SHARED | {"fp8_recipe": "tensorwise"}


def saved(place: Path, step: int, name: str = "", **arguments: Any) -> None:
    """Files of Megatron-LM's checkpoint that say what it is."""
    folder = place / (name or f"iter_{step:07d}")
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    torch.save({"args": argparse.Namespace(**arguments), "iteration": step}, folder / "common.pt")
    (place / "latest_checkpointed_iteration.txt").write_text(name or str(step))


@pytest.mark.parametrize(
    ("there", "here", "refused"),
    [
        (SHARED | {"expert_model_parallel_size": 2}, SHARED | {"expert_model_parallel_size": 4}, True),
        (SHARED | {"expert_model_parallel_size": 2}, SHARED | {"expert_model_parallel_size": 2}, False),
        (SHARED, SHARED | {"moe_grouped_gemm": False}, True),
        (SHARED | {"expert_model_parallel_size": 4}, SHARED | {"moe_grouped_gemm": False}, False),
        (SHARED | {"moe_grouped_gemm": False}, SHARED | {"expert_model_parallel_size": 2}, True),
        (TENSORWISE | {"expert_model_parallel_size": 2}, SHARED, False),
        (SHARED | {"expert_model_parallel_size": 2}, TENSORWISE, False),
        (SHARED | {"num_experts": None}, SHARED, False),
        ({}, SHARED, False),
    ],
)
def test_scales_of_experts_do_not_move_between_layers_of_other_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: dict[str, Any], here: dict[str, Any], refused: bool
) -> None:
    """Upstream cuts those of a layer in another order than Transformer Engine has them in."""
    on(monkeypatch, (9, 0))
    here = LOW_PRECISION | {"expert_model_parallel_size": 1} | here
    saved(tmp_path, 2, **there)
    if not refused:
        check_args(parse("--mtp-heads", "2", load=str(tmp_path), **here))
        return
    size = there.get("expert_model_parallel_size", 1)
    grouped = "with" if there["moe_grouped_gemm"] else "without"
    says = rf"of the experts in a layer .*iter_0000002.*--expert-model-parallel-size {size} and {grouped} --moe"
    with pytest.raises(ConfigError, match=says) as caught:
        check_args(parse("--mtp-heads", "2", load=str(tmp_path), **here))
    assert caught.value.field == "--expert-model-parallel-size"


@pytest.mark.parametrize(
    ("argument", "found"),
    [
        ({"load": "latest"}, True),
        ({"load": "latest", "ckpt_step": 2}, False),
        ({"load": "latest", "ckpt_step": 3}, False),
        ({"load": "release"}, True),
        ({"load": "nothing", "pretrained_checkpoint": "release"}, True),
        ({"load": "older", "pretrained_checkpoint": "release"}, False),
        ({"load": "older", "non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": None}, False),
        ({"load": "nothing"}, False),
        ({"load": "latest", "non_persistent_ckpt_type": "global", "non_persistent_global_ckpt_dir": None}, False),
    ],
    ids=str,
)
def test_the_checkpoint_that_is_looked_at_is_the_one_that_will_be_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argument: dict[str, Any], found: bool
) -> None:
    on(monkeypatch, (9, 0))
    alike, other = (SHARED | {"expert_model_parallel_size": size} for size in (1, 2))
    saved(tmp_path / "older", 2, **alike)
    saved(tmp_path / "latest", 2, **alike)
    saved(tmp_path / "latest", 4, **other)
    saved(tmp_path / "latest" / "non_persistent", 4, **alike)
    saved(tmp_path / "release", 0, "release", **other)
    named = {
        key: str(tmp_path / value) if value in ("older", "latest", "release", "nothing") else value
        for key, value in argument.items()
    }
    asked = parse("--mtp-heads", "2", **LOW_PRECISION | {"expert_model_parallel_size": 1} | SHARED | named)
    if found:
        with pytest.raises(ConfigError, match="expert-model-parallel-size"):
            check_args(asked)
    else:
        check_args(asked)


def test_fp8_without_a_device_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, None)
    for host in ({}, {"transformer_impl": "local"}):
        with pytest.raises(ConfigError, match=r"^--fp8-format='hybrid': .*no CUDA device.*8\.9"):
            check_args(parse("--mtp-heads", "2", **LOW_PRECISION | host))


def test_a_rampup_that_would_be_ignored_is_refused() -> None:
    """Releases that ignore it have another argument instead."""
    rampup = ["2", "2", "16"]
    check_args(parse("--mtp-heads", "2", rampup_batch_size=rampup))
    check_args(parse("--mtp-heads", "2", rampup_batch_size=None, step_batch_size_schedule="0:4 384:8"))
    with pytest.raises(ConfigError, match=r"^--rampup-batch-size=.*ignores it.*--step-batch-size-schedule"):
        check_args(parse("--mtp-heads", "2", rampup_batch_size=rampup, step_batch_size_schedule=None))


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ({"context_parallel_size": 2}, "not cut for --context-parallel-size 2"),
        ({"transformer_impl": "transformer_engine"}, "Transformer Engine's layers are causal"),
        ({"pipeline_model_parallel_size": 4}, "of 4 stages the others'"),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, "of 4 stages the others'"),
        ({"window_size": (128, 0)}, r"--window-size \(128, 0\)"),
    ],
)
def test_masks_that_would_be_dropped_are_refused(host: dict[str, Any], says: str) -> None:
    check_args(parse("--mtp-heads", "2", reset_attention_mask=True, pipeline_model_parallel_size=2))
    with pytest.raises(ConfigError, match=rf"^--reset-attention-mask=True: .*{says}"):
        check_args(parse("--mtp-heads", "2", reset_attention_mask=True, **host))


def test_a_layout_with_heads_on_other_stages_is_refused() -> None:
    check_args(parse("--mtp-heads", "2", pipeline_model_parallel_layout="Et*3|(tt|)*2L"))
    with pytest.raises(ConfigError, match=r"^--pipeline-model-parallel-layout='Ettm\|mL'.*parallel\.layout"):
        check_args(parse("--mtp-heads", "2", pipeline_model_parallel_layout="Ettm|mL"))


def test_stages_that_train_nothing() -> None:
    stages = {"pipeline_model_parallel_size": 2}
    for sharded in (False, True):
        check_args(parse("--mtp-heads", "2", use_distributed_optimizer=sharded, **stages))
        check_args(parse("--mtp-heads", "2", "--mtp-trainable", "heads", use_distributed_optimizer=sharded))
        with pytest.raises(ConfigError, match="--mtp-trainable='heads'"):
            check_args(
                parse("--mtp-heads", "2", "--mtp-trainable", "heads", use_distributed_optimizer=sharded, **stages)
            )


@needs_megatron_lm
def test_no_clash_with_megatron_lm() -> None:
    """argparse refuses a name twice; a TransformerConfig takes every argument that has the name of a field."""
    megatron_lm.prepare()
    from megatron.core.transformer import TransformerConfig
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {action.dest for action in parser._actions}
    add_mtp_args(parser)
    assert not {flag.dest for flag in FLAGS} & {field.name for field in dataclasses.fields(TransformerConfig)}
    others = {"--use-legacy-models"}  # of earlier releases
    if versions.require_megatron_core().release < (0, 18):
        others = {"--logits-load-dir", "--logits-save-dir", "--dataloader-inter-document-masking", "--fp8-output-proj"}
        others.add("--use-mup")
    dests = {refusal.dest for refusal in REFUSALS if refusal.name not in others}
    dests |= {"reset_attention_mask", "context_parallel_size", "window_size", "rampup_batch_size"}
    dests |= {"fp8", "fp8_recipe", "fp8_param_gather", "fp4", "first_last_layers_bf16", "bf16"}
    assert dests <= known, f"refused, and not there: {dests - known}"
    if versions.require_megatron_core().release >= (0, 19):
        assert "tensor_parallel_num_weight_shards" in known
    assert ("step_batch_size_schedule" in known) == (versions.require_megatron_core().release >= (0, 18))


@needs_megatron_lm
@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("3", 0)])
def test_what_is_slower_without_apex_is_said_by_one_rank(
    rank: str, times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mtp_megatron.megatron_lm import run

    monkeypatch.setattr(run.kernels, "slower_without_apex", lambda: "without NVIDIA Apex this is slower")
    monkeypatch.setattr(megatron_lm, "pretrain", lambda *args, **settings: None)
    monkeypatch.setenv("RANK", rank)
    assert run.main() == 0
    assert capsys.readouterr().err.count("without NVIDIA Apex") == times


def test_missing_megatron_lm_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from mtp_megatron.megatron_lm.run import main

    monkeypatch.setattr(
        megatron_lm, "missing", lambda: "there is no megatron.training here. Put a checkout on the path"
    )
    assert main(["--mtp-heads", "2"]) == 2
    assert "error: there is no megatron.training here" in capsys.readouterr().err
