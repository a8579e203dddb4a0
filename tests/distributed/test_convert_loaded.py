"""Converted models really loaded by Megatron: equal logits, and round trips through TP2 x PP2, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mtp_megatron.checkpoint.convert import convert
from tests.checkpoints import SHAPE
from tests.foreign_models import FAMILIES, PARAMS, VOCAB, hf_logits, meta_logits, tokenizer_model, write_hf, write_meta
from tests.harness import run_world
from tests.training_runs import tiny_tree

TOKENS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))


def tree_for(data: Path, run: Path, converted: Path, **overrides: Any) -> dict[str, Any]:
    """A recipe that starts from a converted checkpoint, by the sections that the conversion wrote beside it."""
    # The models' tokenizers are not the data's; nothing is trained.
    overrides["run__accept_changes"] = True
    tree = tiny_tree(data, run, run__load=str(converted), train__seq_length=32, **overrides)
    return tree | yaml.safe_load((converted / "model_recipe.yaml").read_text())


def loaded(tree: dict[str, Any], world_size: int) -> Any:
    from mtp_megatron.training.build import build_trainable
    from mtp_megatron.training.initial_weights import load_weights
    from mtp_megatron.training.preflight import preflight
    from mtp_megatron.training.recipe_io import parse_recipe
    from mtp_megatron.training.world import model_parallel_world

    plan = preflight(parse_recipe(tree), world_size)
    world = model_parallel_world(plan.recipe)
    world.__enter__()
    trainable = build_trainable(plan.recipe)
    assert plan.initial is not None
    load_weights(plan.recipe, trainable, plan.initial)
    return plan, trainable, world


def head_logits(rank: int, world_size: int, tree: dict[str, Any], tokens: Tensor) -> list[Tensor]:
    """Logits ``[b, s, V]`` of every head, on one rank."""
    plan, trainable, world = loaded(tree, world_size)
    model = trainable.models[0]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    kept: list[Any] = []
    model.next_token_logits = lambda z, kwargs, gather=None: kept.append((z, kwargs))
    with torch.no_grad():
        model(tokens, positions, None)
        z, kwargs = kept[0]
        outputs = [model.run_head_layer(head, z, kwargs) for head in range(plan.recipe.heads.n)]
        logits = [model.head_logits(head, output) for head, output in enumerate(outputs)]
    world.__exit__(None, None, None)
    return [values.transpose(0, 1)[..., : plan.recipe.model.vocab_size].clone() for values in logits]


def load_and_save(rank: int, world_size: int, tree: dict[str, Any]) -> None:
    """Load at the tree's layout and save again, as training does."""
    from mtp_megatron.training.checkpointing import save_checkpoint

    plan, trainable, world = loaded(tree, world_size)
    save_checkpoint(plan.recipe, plan.data, trainable, plan.folder.checkpoints, 1)
    world.__exit__(None, None, None)


def through_megatron(data: Path, tmp_path: Path, converted: Path, precision: str = "fp32") -> Path:
    """Load at TP2 x PP2, experts at EP2, save; returns the run."""
    run = tmp_path / "run"
    tree = tree_for(data, run, converted, parallel__tensor=2, parallel__pipeline=2, train__precision=precision)
    if tree["model"]["num_experts"]:
        tree["parallel"] |= {"expert": 2, "sequence_parallel": True}
    run_world(load_and_save, 4, tree)
    return run


def hf_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize("case", FAMILIES)
def test_each_family_has_transformers_logits_and_survives_tp2_pp2(case: str, data: Path, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source", case)
    convert(source, tmp_path / "megatron", to="megatron", heads=2, new_heads="copy", progress=False)
    tree = tree_for(data, tmp_path / "logits", tmp_path / "megatron")
    ((first, second),) = run_world(head_logits, 1, tree, TOKENS)
    theirs = hf_logits(source, TOKENS)
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(first, theirs, atol=1e-4, rtol=0)
    torch.testing.assert_close(second, theirs, atol=1e-4, rtol=0)  # a copy of head 1
    run = through_megatron(data, tmp_path, tmp_path / "megatron")
    convert(run, tmp_path / "back", to="hf", heads=1, progress=False)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))
    torch.testing.assert_close(hf_logits(tmp_path / "back", TOKENS), theirs, atol=1e-6, rtol=0)


def test_one_expert_for_each_token_has_transformers_logits(data: Path, tmp_path: Path) -> None:
    """Its weight is then not 1: the softmax is over all experts before one is chosen."""
    alone = {"num_experts_per_tok": 1, "norm_topk_prob": False}
    convert(write_hf(tmp_path / "source", "qwen3_moe", **alone), tmp_path / "megatron", to="megatron", progress=False)
    ((first,),) = run_world(head_logits, 1, tree_for(data, tmp_path / "logits", tmp_path / "megatron"), TOKENS)
    theirs = hf_logits(tmp_path / "source", TOKENS)
    torch.testing.assert_close(first, theirs, atol=1e-4, rtol=0)


def test_rope_scaling_would_be_missed(data: Path, tmp_path: Path) -> None:
    """Control: without its scaling the model of the case llama3 has other logits."""
    convert(write_hf(tmp_path / "source", "llama3"), tmp_path / "megatron", to="megatron", progress=False)
    tree = tree_for(data, tmp_path / "logits", tmp_path / "megatron")
    config = tmp_path / "megatron" / "iter_0000000" / "mtp_config.json"
    config.write_text(config.read_text().replace('"rope_scaling": "llama3"', '"rope_scaling": null'))
    sizes = config.with_name("files.json")
    sizes.write_text("{}")
    tree["model"]["rope_scaling"] = None
    ((first,),) = run_world(head_logits, 1, tree, TOKENS)
    assert (first - hf_logits(tmp_path / "source", TOKENS)).abs().max() > 1e-2


def test_a_bf16_model_survives_tp2_pp2(data: Path, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source", "qwen2", dtype=torch.bfloat16)
    convert(source, tmp_path / "megatron", to="megatron", progress=False)
    run = through_megatron(data, tmp_path, tmp_path / "megatron", "bf16")
    convert(run, tmp_path / "back", to="hf", progress=False)
    assert_same(hf_tensors(tmp_path / "back"), hf_tensors(source))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_papers_release_survives_tp2_pp2(dtype: torch.dtype, data: Path, tmp_path: Path) -> None:
    tensors = write_meta(tmp_path / "source", tokenizer_model(), shards=2, dtype=dtype)
    convert(tmp_path / "source", tmp_path / "megatron", to="megatron", progress=False)
    if dtype == torch.float32:
        tree = tree_for(data, tmp_path / "logits", tmp_path / "megatron")
        (ours,) = run_world(head_logits, 1, tree, TOKENS)
        for head, logits in enumerate(ours, start=1):
            theirs = meta_logits(tensors, PARAMS, TOKENS, head)
            torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=0)
            assert theirs.abs().max() > 0.5
    run = through_megatron(data, tmp_path, tmp_path / "megatron", "bf16" if dtype == torch.bfloat16 else "fp32")
    convert(run, tmp_path / "back", to="meta", progress=False)
    assert_same(torch.load(tmp_path / "back" / "consolidated.00.pth", weights_only=True), tensors)


def save_plain_gpt(rank: int, world_size: int, folder: str, tokens: Tensor) -> Tensor | None:
    """A plain GPTModel of megatron-core, saved as a distributed checkpoint; its logits where it is whole."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ps

    from tests.harness import parallel
    from tests.models import tiny_config, tiny_gpt

    with parallel(tp=2):
        (model,) = tiny_gpt(tiny_config(layernorm_epsilon=1e-5), vocab_size=SHAPE.padded_vocab_size, sequence_length=64)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.no_grad():
            mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
            local = model(tokens, positions, mask)
            shards = [torch.empty_like(local) for _ in range(2)]
            torch.distributed.all_gather(shards, local.contiguous(), group=ps.get_tensor_model_parallel_group())
        Path(folder).mkdir(exist_ok=True)
        torch.distributed.barrier()
        from mtp_megatron.training.checkpoint_writer import InProcessSave

        dist_checkpointing.save(model.sharded_state_dict(), folder, sharded_strategy=InProcessSave())
        return torch.cat(shards, -1)


def test_a_plain_gpt_of_megatron_core(data: Path, tmp_path: Path) -> None:
    tokens = TOKENS % 257
    logits, _ = run_world(save_plain_gpt, 2, str(tmp_path / "gpt"), tokens)
    model = {"num_trunk_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2}
    model |= {"ffn_hidden_size": 64, "seq_length": 64, "vocab_size": 257}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": model}))
    options: dict[str, Any] = {"model_recipe": tmp_path / "recipe.yaml", "progress": False}
    convert(tmp_path / "gpt", tmp_path / "megatron", to="megatron", heads=3, new_heads="copy", **options)
    tree = tree_for(data, tmp_path / "logits", tmp_path / "megatron")
    (ours,) = run_world(head_logits, 1, tree, tokens)
    for head in ours:
        torch.testing.assert_close(head, logits[..., :257], atol=1e-4, rtol=0)
    convert(tmp_path / "gpt", tmp_path / "hf", to="hf", **options)
    torch.testing.assert_close(hf_logits(tmp_path / "hf", tokens), logits[..., :257], atol=1e-4, rtol=0)
