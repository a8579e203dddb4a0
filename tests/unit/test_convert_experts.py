"""A trunk with experts under dense heads, as Hugging Face's Qwen3-MoE and back; what is refused, and why.

That Megatron's own model has the same logits, and that expert and tensor parallel shards come together:
``tests/distributed/test_convert_loaded.py``, the case qwen3_moe.
"""

from __future__ import annotations

import dataclasses
import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from mtp_megatron.checkpoint import megatron_reader
from mtp_megatron.checkpoint.convert import convert
from mtp_megatron.checkpoint.megatron_reader import MegatronCheckpoint, open_checkpoint
from mtp_megatron.checkpoint.tables import FURTHER_HEADS, LLAMA, expand
from mtp_megatron.cli import main
from mtp_megatron.errors import CheckpointError
from mtp_megatron.serving.bundle import write_bundle
from mtp_megatron.serving.decode import generate
from mtp_megatron.serving.drafts import HEADS_FOLDER, MEDUSA_FOLDER, drafts_in
from mtp_megatron.serving.export import open_export
from mtp_megatron.serving.llama import HeadsLlama
from mtp_megatron.serving.simulate import ENGINE_MARGIN, ROUTING_MARGIN, simulate
from tests.checkpoints import (
    MEGATRON_LM_ARGUMENTS,
    SHAPE,
    description,
    random_tensors,
    seal,
    stack_trunk,
    write_checkpoint,
    write_torch_dist,
)
from tests.foreign_models import hf_logits, write_hf

EXPERTS = dataclasses.replace(SHAPE, qk_norm=True, num_experts=4, moe_ffn_hidden_size=24)
TOKENS = torch.randint(0, SHAPE.vocab_size, (40,), generator=torch.Generator().manual_seed(3))
FC1 = "decoder.layers.1.mlp.experts.experts.2.linear_fc1.weight"


def model(shape: Any = EXPERTS, top_k: int = 2) -> dict[str, Any]:
    return description(shape)["model"] | {"moe_top_k": top_k}


def export(folder: Path, shape: Any = EXPERTS, top_k: int = 2, aux_loss: float = 0.01, **options: Any) -> Path:
    write_checkpoint(folder / "run", shape, model=model(shape, top_k) | {"moe_aux_loss": aux_loss}, **options)
    convert(folder / "run", folder / "hf", to="hf", progress=False)
    return folder / "hf"


@torch.inference_mode()
def head_logits(decoder: HeadsLlama) -> torch.Tensor:
    """``[n, s, V]``"""
    caches = decoder.new_caches(len(TOKENS))
    z, first = decoder.run(TOKENS, caches, rows=len(TOKENS))
    return torch.cat((first[None], decoder.run_further_heads(z, caches, rows=len(TOKENS))))


def test_the_table_of_a_layer_with_experts() -> None:
    shape = dataclasses.replace(EXPERTS, num_trunk_layers=2, num_heads=2, num_experts=2)
    rows = {mapping.megatron: mapping.parts for mapping in expand((*LLAMA, *FURTHER_HEADS), shape)}
    trunk = {key: parts for key, parts in rows.items() if key.startswith("decoder.layers.1.mlp.")}
    assert trunk == {
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": ("model.layers.1.post_attention_layernorm.weight",),
        "decoder.layers.1.mlp.router.weight": ("model.layers.1.mlp.gate.weight",),
        **{
            f"decoder.layers.1.mlp.experts.experts.{e}.{ours}.weight": tuple(
                f"model.layers.1.mlp.experts.{e}.{name}_proj.weight" for name in theirs
            )
            for e in range(2)
            for ours, theirs in (("linear_fc1", ("gate", "up")), ("linear_fc2", ("down",)))
        },
    }
    assert rows["heads.0.mlp.linear_fc2.weight"] == ("model.layers.2.mlp.down_proj.weight",)
    assert not [key for key in rows if key.startswith("heads.") and ("experts" in key or "router" in key)]


@pytest.mark.parametrize("pieces", [1, 2], ids=["whole", "every axis in two"])
def test_experts_are_read_one_by_one_whatever_the_chunks(
    pieces: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(EXPERTS, dtype=torch.bfloat16)
    write_torch_dist(tmp_path / "c", stack_trunk(tensors), lambda key, tensor: [pieces] * tensor.dim())
    checkpoint = MegatronCheckpoint(tmp_path / "c")
    assert set(checkpoint.keys()) == set(tensors)
    assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in tensors.items())
    loaded: list[Any] = []
    load = megatron_reader._load
    monkeypatch.setattr(megatron_reader, "_load", lambda chunk, dtype: loaded.append(chunk) or load(chunk, dtype))
    open_checkpoint(write_checkpoint(tmp_path / "run", EXPERTS)).read(FC1)
    assert [chunk.offsets[:2] for chunk in loaded] == [(1, 2), (1, 2)], "the two halves of that expert, and no other's"


def test_the_norm_before_experts_has_another_name_under_transformer_engine(tmp_path: Path) -> None:
    """Its key map leaves out ``pre_mlp_layernorm``, which a layer with experts has there and a dense one has not."""
    tensors = stack_trunk(random_tensors(EXPERTS))
    theirs = {
        "decoder.layers.pre_mlp_layernorm.weight"
        if key == "decoder.layers.mlp.linear_fc1.layer_norm_weight"
        else key: tensor
        for key, tensor in tensors.items()
    }
    assert theirs.keys() != tensors.keys()
    write_torch_dist(tmp_path / "c", theirs)
    checkpoint = MegatronCheckpoint(tmp_path / "c")
    assert all(torch.equal(checkpoint.read(key), tensor) for key, tensor in random_tensors(EXPERTS).items())


@pytest.mark.parametrize("top_k", [1, 2])
def test_transformers_reads_the_same_model(top_k: int, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = export(tmp_path, top_k=top_k)
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    with torch.inference_mode():
        logits = theirs(TOKENS[None]).logits[0]
    decoder = HeadsLlama.load(open_export(folder))
    assert logits.abs().max() > 0.5
    torch.testing.assert_close(head_logits(decoder)[0], logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoder.exact_logits(TOKENS), logits[-1].double(), atol=1e-4, rtol=0)
    # Controls: other weights of the chosen experts, or another number of them, would be seen.
    config = json.loads((folder / "config.json").read_text())
    assert config["norm_topk_prob"] is (top_k == 2)
    for changes in ({"norm_topk_prob": top_k == 1}, {"num_experts_per_tok": 3 - top_k}):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert (hf_logits(folder, TOKENS[None])[0] - logits).abs().max() > 1e-2, changes


def test_each_further_head_is_what_a_model_with_it_as_last_layer_says(tmp_path: Path) -> None:
    tensors = random_tensors(EXPERTS)
    ours = head_logits(HeadsLlama.load(open_export(export(tmp_path, tensors=tensors))))
    for head in range(1, EXPERTS.num_heads):
        swapped = tensors | {key.replace(f"heads.{head}.", "heads.0."): value for key, value in tensors.items()}
        other = export(tmp_path / f"head{head}", tensors=swapped)
        torch.testing.assert_close(hf_logits(other, TOKENS[None])[0], ours[head], atol=1e-4, rtol=0)
        assert (ours[head] - ours[0]).abs().max() > 0.1, "control: heads differ"


def test_it_comes_back_bit_by_bit_with_what_megatron_looks_for(tmp_path: Path) -> None:
    folder = export(tmp_path, aux_loss=0.003)
    assert json.loads((folder / "config.json").read_text())["router_aux_loss_coef"] == 0.003
    convert(folder, tmp_path / "megatron", to="megatron", progress=False)
    back = open_checkpoint(tmp_path / "megatron")
    tensors = random_tensors(EXPERTS)
    assert set(back.keys()) == set(tensors)
    for key, tensor in tensors.items():
        rows = EXPERTS.vocab_size if "word_embeddings" in key or "output_layer" in key else len(tensor)
        assert torch.equal(back.read(key)[:rows], tensor[:rows]), key
    config = json.loads((back.folder / "mtp_config.json").read_text())["model"]
    expected = {"num_experts": 4, "moe_top_k": 2, "moe_ffn_hidden_size": 24, "qk_norm": True, "moe_aux_loss": 0.003}
    assert {key: config[key] for key in expected} == expected
    stored = FileSystemReader(back.folder).read_metadata().state_dict_metadata
    fc1 = "decoder.layers.mlp.experts.experts.linear_fc1"
    assert stored[f"{fc1}.weight"].size == (3, 4, 48, 32)
    # As megatron-core 0.16.1 and 0.19.2 name them: layer and expert, then how many there are.
    states = {key for key in stored if key.startswith(f"{fc1}._extra_state")}
    assert states == {f"{fc1}._extra_state/shard_{layer}.{e}_3.4" for layer in range(3) for e in range(4)}


def test_text_is_the_same_with_heads_and_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And `verify` passes; heads are copies of head 1, right wherever the model repeats itself."""
    source = write_hf(tmp_path / "source", "qwen3_moe")
    bundle = write_bundle(source, tmp_path / "bundle", heads=3, new_heads="copy", progress=False).output
    decoder = HeadsLlama.load(open_export(bundle))
    for prompt in ([5, 17, 3], [40]):
        plain, speculative = (generate(decoder, prompt, max_new_tokens=40, heads=k) for k in (1, 3))
        assert speculative.tokens == plain.tokens
        assert sum(speculative.drafted) > 0
    arguments = ["--no-vllm", "--num-prompts", "6", "--max-new-tokens", "16", "--quiet"]
    assert main(["verify", str(bundle), *arguments]) == 0
    assert "every head's drafts are accepted" in capsys.readouterr().out
    # The draft's layers are dense: nothing that reads its configuration looks for experts.
    draft = json.loads((bundle / HEADS_FOLDER / "config.json").read_text())
    assert (draft["model_type"], draft["mtp_layers"]) == ("qwen3", "qwen3")
    assert not [key for key in draft if "expert" in key or "moe" in key or key == "mlp_only_layers"]
    assert drafts_in(bundle) == [HEADS_FOLDER]
    readme = (bundle / "README.md").read_text()
    assert "## Without speculation: vLLM\n\nThe last layer is dense" in readme
    assert "4 of size 24, 2 for each token" in readme


def test_a_text_that_hangs_on_a_near_tie_of_experts_is_left_out_and_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three experts that differ by fp32's rounding alone a router takes two: in a wider pass it may be others."""
    tensors = random_tensors(EXPERTS)
    for key, router in tensors.items():
        if key.endswith("router.weight"):
            noise = torch.randn(2, router.shape[1], generator=torch.Generator().manual_seed(1))
            router[[0, 2]] = router[1] * (1 + 3e-7 * noise)
    folder = export(tmp_path, tensors=tensors)
    decoder = HeadsLlama.load(open_export(folder))
    tied = simulate(decoder, [5, 17, 3], 20)
    plain, speculative = (generate(decoder, [5, 17, 3], max_new_tokens=20, heads=k) for k in (1, 3))
    assert plain.tokens != speculative.tokens
    assert tied.margin > ENGINE_MARGIN
    assert tied.routing < ROUTING_MARGIN
    assert not tied.certain
    assert main(["generate", str(folder), "--prompt", "ab", "--max-new-tokens", "40", "--ignore-eod", "--quiet"]) != 0
    assert "Two experts that a router likes equally well may change places" in capsys.readouterr().err
    clear = simulate(HeadsLlama.load(open_export(export(tmp_path / "clear"))), [5, 17, 3], 20)
    assert ROUTING_MARGIN < clear.routing < 1
    assert clear.certain
    # Where every token goes through all experts there is nothing to choose.
    every = simulate(HeadsLlama.load(open_export(export(tmp_path / "every", top_k=4))), [5, 17, 3], 20)
    assert every.routing == math.inf


def test_heads_that_are_no_layers(tmp_path: Path) -> None:
    """Then every layer of the plain model has experts."""
    shape = dataclasses.replace(EXPERTS, head_kind="linear")
    folder = export(tmp_path, shape)
    assert json.loads((folder / "config.json").read_text())["mlp_only_layers"] == []
    found = head_logits(HeadsLlama.load(open_export(folder)))
    torch.testing.assert_close(found[0], hf_logits(folder, TOKENS[None])[0], atol=1e-4, rtol=0)
    bundle = write_bundle(folder, tmp_path / "bundle", progress=False).output
    assert drafts_in(bundle) == [MEDUSA_FOLDER]
    convert(folder, tmp_path / "megatron", to="megatron", progress=False)
    convert(tmp_path / "megatron", tmp_path / "again", to="hf", progress=False)
    first, second = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# Refused -------------------------------------------------------------------------------------------------------------


def test_without_query_and_key_norms_it_stays_in_megatron(tmp_path: Path) -> None:
    shape = dataclasses.replace(EXPERTS, qk_norm=False)
    write_checkpoint(tmp_path / "run", shape, model=model(shape))
    for write in (convert, write_bundle):
        with pytest.raises(
            CheckpointError, match=r"num_experts=4 with model.qk_norm=false.*Train with model.qk_norm=true"
        ):
            write(tmp_path / "run", tmp_path / "out", progress=False, **({"to": "hf"} if write is convert else {}))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"], "something was left behind"
    convert(tmp_path / "run", tmp_path / "megatron", to="megatron", heads=2, progress=False)
    assert torch.equal(open_checkpoint(tmp_path / "megatron").read(FC1), random_tensors(shape)[FC1])


def test_metas_layout_has_no_experts(tmp_path: Path) -> None:
    shape = dataclasses.replace(EXPERTS, qk_norm=False)
    write_checkpoint(tmp_path / "run", shape, model=model(shape))
    with pytest.raises(CheckpointError, match=r"model.num_experts=4 has no place in Meta's layout"):
        convert(tmp_path / "run", tmp_path / "meta", to="meta", progress=False)
    assert not (tmp_path / "meta").exists()


def test_experts_of_another_training(tmp_path: Path) -> None:
    """Whether its own arguments name them or a recipe does: nothing says what its routers did with their scores."""
    folder = tmp_path / "iter_0000007"
    objects = {"args": Namespace(**MEGATRON_LM_ARGUMENTS, num_experts=4, mtp_heads=3), "iteration": 7}
    write_torch_dist(folder, stack_trunk(random_tensors(EXPERTS)))
    torch.save(objects, folder / "common.pt")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": model()}))
    for options, message in (({}, "num_experts=4 is not supported"), ({"model_recipe": recipe}, "routers may have")):
        with pytest.raises(CheckpointError, match=message):
            convert(folder, tmp_path / "out", to="hf", progress=False, **options)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mlp.experts.experts.linear_fc1.scale", "scale"])
@pytest.mark.parametrize("axes", [0, 1])
def test_a_tensor_with_too_few_axes_to_be_stacked_is_refused_by_name(axes: int, name: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "run", EXPERTS, model=model())
    tensors = stack_trunk(random_tensors(EXPERTS)) | {f"decoder.layers.{name}": torch.ones((3,) * axes)}
    write_torch_dist(folder, tensors, lambda key, tensor: [1] * tensor.dim())
    seal(folder)
    with pytest.raises(CheckpointError, match=rf"tensors? ha.* no place in the target: decoder\.layers\..*{name}"):
        convert(folder, tmp_path / "hf", to="hf", progress=False)


def test_an_expert_that_is_missing_or_of_another_width(tmp_path: Path) -> None:
    tensors = random_tensors(EXPERTS)
    short = {key: tensor for key, tensor in tensors.items() if ".experts.3." not in key}
    for name, given, message in (
        ("short", short, r"missing: decoder\.layers\.0\.mlp\.experts\.experts\.3\.linear_fc1\.weight"),
        (
            "wide",
            random_tensors(dataclasses.replace(EXPERTS, moe_ffn_hidden_size=40)),
            r"\[80, 32\].*describes \[48, 32\]",
        ),
        (
            "dense",
            random_tensors(dataclasses.replace(EXPERTS, num_experts=None)),
            r"27 tensors are missing: decoder\.layers\.0\.mlp\.experts",
        ),
    ):
        write_checkpoint(tmp_path / name, EXPERTS, model=model(), tensors=given)
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / name, tmp_path / "hf", to="hf", progress=False)
        assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_only_layers": []}, r"mlp_only_layers=\[\] is not supported: layer 2, the last, becomes head 1.*dense"),
        ({"mlp_only_layers": [0, 2]}, r"mlp_only_layers=\[0, 2\] is not supported: every layer of the trunk"),
        ({"mlp_only_layers": 2}, r"mlp_only_layers=2 is not supported: it is a list of layers"),
        ({"decoder_sparse_step": 2}, r"decoder_sparse_step=2 is not supported: every layer of the trunk"),
        ({"norm_topk_prob": False}, r"norm_topk_prob=False is not supported: the weights of several chosen"),
        ({"num_experts_per_tok": 1}, r"norm_topk_prob=True is not supported: .*that of one alone"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok=5 is not supported: there are num_(local_)?experts=4"),
        ({"shared_expert_intermediate_size": 8}, r"shared_expert_intermediate_size=8 is not supported"),
        ({"moe_intermediate_size": None}, r"moe_intermediate_size=None is missing"),
        ({"num_experts_per_tok": "two"}, r"num_experts_per_tok='two' is missing or no number"),
    ],
)
def test_models_of_others_that_have_other_experts(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "source", "qwen3_moe")
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        convert(source, tmp_path / "out", to="hf", progress=False)
    assert not (tmp_path / "out").exists()
