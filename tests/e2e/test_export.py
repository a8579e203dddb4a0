"""From a Megatron run to text: logits of the export, and speculative decoding of held-out prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtp_megatron.cli import main
from mtp_megatron.serving.export import open_export
from mtp_megatron.serving.llama import Caches, HeadsLlama
from tests.harness import parallel, run_world
from tests.training_runs import TINY, VOCAB, tiny_tree, train_body

HEADS = TINY["heads"]["n"]
TOKENS = torch.randint(0, VOCAB, (32,), generator=torch.Generator().manual_seed(3))


def megatron_logits(rank: int, world_size: int, checkpoint: str, tied: bool, kind: str) -> Tensor:
    """For ``run_world``: logits ``[n, 32, V]`` of every head by Megatron's own modules, loaded at TP1 x PP1."""
    from megatron.core import dist_checkpointing, parallel_state

    from mtp_megatron.config import HeadsConfig
    from mtp_megatron.model import build_model
    from tests.models import tiny_config

    padded = json.loads((Path(checkpoint) / "mtp_config.json").read_text())["padded_vocab_size"]
    with parallel():
        model = build_model(
            tiny_config(),
            HeadsConfig(n=HEADS, kind=kind),
            vocab_size=VOCAB,
            padded_vocab_size=padded,
            max_sequence_length=32,
            tied_embeddings=tied,
        )
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, checkpoint)
        model.load_state_dict(loaded["model"])
        model.eval()

        def every_head(z: Tensor, layer_kwargs: dict[str, Any], gather: Any = None) -> Tensor:
            outputs = [model.head_logits(i, model.run_head_layer(i, z, layer_kwargs)) for i in range(HEADS)]
            return torch.stack(outputs)[:, :, 0, :VOCAB]

        model.next_token_logits = every_head
        with torch.no_grad():
            logits: Tensor = model(TOKENS[None], torch.arange(32)[None], None)
        return logits


def transformers_logits(rank: int, world_size: int, folder: str) -> Tensor:
    """For ``run_world``: logits ``[32, V]`` by transformers."""
    from transformers import LlamaForCausalLM

    with torch.inference_mode():
        logits: Tensor = LlamaForCausalLM.from_pretrained(folder)(TOKENS[None]).logits[0]
    return logits


@pytest.mark.parametrize(
    ("tensor", "pipeline", "tied", "kind"),
    [
        (1, 1, False, "transformer"),
        (1, 1, True, "transformer"),
        (2, 2, False, "transformer"),
        (2, 2, True, "transformer"),
        (2, 2, False, "linear"),
        (2, 1, True, "medusa"),
    ],
)
def test_the_export_has_the_logits_of_the_megatron_model(
    data: Path, tmp_path: Path, tensor: int, pipeline: int, tied: bool, kind: str
) -> None:
    tree = tiny_tree(
        data,
        tmp_path / "run",
        parallel__tensor=tensor,
        parallel__pipeline=pipeline,
        train__steps=3,
        train__eval_batches=0,
    )
    tree["model"]["tied_embeddings"] = tied
    tree["heads"]["kind"] = kind
    run_world(train_body, tensor * pipeline, tree)
    assert main(["convert", str(tmp_path / "run"), "--output", str(tmp_path / "hf"), "--quiet"]) == 0
    (megatron,) = run_world(megatron_logits, 1, str(tmp_path / "run" / "checkpoints" / "iter_0000003"), tied, kind)

    (theirs,) = run_world(transformers_logits, 1, str(tmp_path / "hf"), fresh=True)  # without megatron's stand-ins
    with torch.inference_mode():
        decoder = HeadsLlama.load(open_export(tmp_path / "hf"))
        caches = decoder.new_caches(32)
        z, first = decoder.run(TOKENS, caches, rows=32)
        ours = torch.cat((first[None], decoder.run_further_heads(z, caches, rows=32)))
    torch.testing.assert_close(theirs, megatron[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, megatron, atol=1e-4, rtol=0)
    for head in range(1, HEADS):
        assert (megatron[head] - megatron[0]).abs().max() > 1e-3, "control: another head would be noticed"


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a short training: heads that are right often, but not always."""
    folder = tmp_path_factory.mktemp("trained")
    tree = tiny_tree(data, folder / "run", train__steps=150, train__eval_batches=0, train__save_interval=150)
    tree["model"]["seq_length"] = 64
    tree["optimizer"]["lr"] = 1e-2
    run_world(train_body, 1, tree)
    assert main(["convert", str(folder / "run"), "--output", str(folder / "hf"), "--quiet"]) == 0
    return folder / "hf"


def generate(export: Path, data: Path, figures: Path, *more: str) -> int:
    prompts = ["--prompts-from", str(data), "--num-prompts", "50", "--prompt-tokens", "20", "--max-new-tokens", "40"]
    return main(["generate", str(export), *prompts, "--json", str(figures), "--quiet", *more])


def test_fifty_held_out_prompts_decode_alike(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(trained, data, tmp_path / "speculative.json") == 0
    assert "50 of 50 texts identical" in capsys.readouterr().out
    figures = json.loads((tmp_path / "speculative.json").read_text())
    assert (figures["prompts"], figures["heads_used"], figures["identical"]) == (50, HEADS, True)
    assert [row["heads"] for row in figures["by_heads"]] == list(range(1, HEADS + 1))
    assert 1.1 < figures["tokens_per_forward"] < HEADS, "drafts must have been accepted, and others rejected"
    assert figures["by_heads"][1]["tokens_per_forward"] <= figures["tokens_per_forward"]
    assert figures["by_heads"][0]["forwards"] == [count - 1 for count in figures["new_tokens"]]
    assert figures["conditions"]["dtype"] == "float32"


def test_a_decoder_that_does_not_roll_back_is_found_out(
    trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Control: the comparison fails, loudly, where it should."""
    first_rows = Caches.truncate

    def forgetful(self: Caches, length: int) -> None:
        """Keeps every rejected position that there is room for."""
        first_rows(self, min(length + 1, self.length))

    monkeypatch.setattr(Caches, "truncate", forgetful)
    monkeypatch.setattr(
        HeadsLlama, "new_caches", lambda self, capacity, heads: Caches(self.config, 400, self.dtype, heads)
    )
    assert generate(trained, data, tmp_path / "speculative.json") == 1
    assert json.loads((tmp_path / "speculative.json").read_text())["identical"] is False
    assert "texts differ between" in capsys.readouterr().err
