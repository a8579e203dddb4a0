"""The Megatron-LM example as a user starts it: torchrun at TP2 x PP2, resumed on one rank, made into a bundle."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtp_megatron.cli import main
from mtp_megatron.serving.export import open_export
from mtp_megatron.serving.llama import HeadsLlama
from tests.harness import parallel, run_world
from tests.megatron_lm import EOD, needs_megatron_lm, scalars, train

pytestmark = needs_megatron_lm

ROOT = Path(__file__).resolve().parents[2]
HEADS, SAVED, STEPS = 3, 2, 4
VOCAB = EOD + 1
TOKENS = torch.randint(0, VOCAB, (32,), generator=torch.Generator().manual_seed(3))


def documented() -> list[str]:
    """The arguments of the example's README, for a machine without CUDA."""
    text = (ROOT / "examples" / "megatron_lm" / "README.md").read_text()
    (block,) = (part for part in text.split("```") if part.startswith("bash\ntorchrun"))
    words = shlex.split(block.removeprefix("bash").replace("\\\n", " "))
    script = words.index("examples/megatron_lm/pretrain_mtp.py")
    assert words[:script] == ["torchrun", "--standalone", "--nproc-per-node", "4"]
    return words[script + 1 :]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's run of four processes: ``checkpoints`` and ``tensorboard`` in the folder."""
    folder = tmp_path_factory.mktemp("run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    example = str(ROOT / "examples" / "megatron_lm" / "pretrain_mtp.py")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [*launcher, example, *(word.replace("runs/lm", str(folder)) for word in documented())],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    return folder


def test_it_resumes_exactly_at_another_layout(trained: Path, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(trained / "checkpoints" / f"iter_{SAVED:07d}", checkpoints / f"iter_{SAVED:07d}")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(SAVED))
    argv = [word.replace("runs/lm", str(tmp_path)) for word in documented() if word != "--sequence-parallel"]
    argv += ["--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1", "--load", str(checkpoints)]
    save = argv.index("--save")
    del argv[save : save + 2]
    assert run_world(train, 1, argv) == [0]
    before, after = scalars(trained / "tensorboard"), scalars(tmp_path / "tensorboard")
    for name in ("lm loss", *(f"head {i} loss" for i in range(2, HEADS + 1))):
        later = {step: value for step, value in before[name].items() if step > SAVED}
        assert after[name] == pytest.approx(later, abs=1e-6)
        assert sorted(before[f"{name} validation"]) == [SAVED, STEPS]
        assert before[name][1] - before[name][STEPS] > 0.01


def megatron_logits(rank: int, world_size: int, checkpoint: str) -> Tensor:
    """For ``run_world``: logits ``[n, 32, V]`` of every head by Megatron's own modules, loaded at TP1 x PP1."""
    from megatron.core import dist_checkpointing, parallel_state

    from mtp_megatron.config import HeadsConfig
    from mtp_megatron.model import build_model
    from tests.models import tiny_config

    with parallel():
        model = build_model(
            tiny_config(), HeadsConfig(n=HEADS), vocab_size=64, padded_vocab_size=64, max_sequence_length=32
        )
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, checkpoint)
        model.load_state_dict(loaded["model"])
        kept: list[tuple[Tensor, dict]] = []
        model.next_token_logits = lambda z, kwargs, gather=None: kept.append((z, kwargs))
        with torch.no_grad():
            model.eval()(TOKENS[None], torch.arange(32)[None], None)
            ((z, kwargs),) = kept
            logits = [model.head_logits(head, model.run_head_layer(head, z, kwargs)) for head in range(HEADS)]
        return torch.stack(logits)[:, :, 0, :VOCAB]


def transformers_logits(rank: int, world_size: int, folder: str) -> Tensor:
    """For ``run_world``: logits ``[32, V]`` by transformers."""
    from transformers import LlamaForCausalLM

    with torch.inference_mode():
        logits: Tensor = LlamaForCausalLM.from_pretrained(folder)(TOKENS[None]).logits[0]
    return logits


def test_its_checkpoint_becomes_a_serving_bundle(trained: Path, tmp_path: Path) -> None:
    checkpoints, bundle = trained / "checkpoints", tmp_path / "bundle"
    assert main(["convert", str(checkpoints), "--to", "bundle", "--output", str(bundle), "--quiet"]) == 0
    (megatron,) = run_world(megatron_logits, 1, str(checkpoints / f"iter_{STEPS:07d}"))
    (theirs,) = run_world(transformers_logits, 1, str(bundle), fresh=True)  # without megatron's stand-ins
    with torch.inference_mode():
        decoder = HeadsLlama.load(open_export(bundle))
        caches = decoder.new_caches(32)
        z, first = decoder.run(TOKENS, caches, rows=32)
        ours = torch.cat((first[None], decoder.run_further_heads(z, caches, rows=32)))
    torch.testing.assert_close(theirs, megatron[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours, megatron, atol=1e-4, rtol=0)
    for head in range(1, HEADS):
        assert (megatron[head] - megatron[0]).abs().max() > 1e-3, "control: another head would be noticed"
