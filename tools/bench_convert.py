"""Peak memory of a conversion on a synthetic model: `python tools/bench_convert.py --gigabytes 4 --to megatron`.

Writes a random bf16 Hugging Face folder of that size tensor by tensor, converts it in a process of its own, and prints
one line of JSON: sizes, seconds, and the peak resident memory of that process above what it had after its imports. A
bundle needs heads beside head 1: it gets three, copies of head 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, FFN, VOCAB = 1024, 2816, 8192
SHARD_BYTES = 5 * 10**7


def write_model(folder: Path, gigabytes: float) -> int:
    """A Llama of as many layers as make up the size, in shards of 100 MB; returns its bytes."""
    import torch

    from mtp_megatron.checkpoint.sharded import ShardedWriter
    from mtp_megatron.checkpoint.tables import LLAMA, expand
    from mtp_megatron.checkpoint.transforms import ModelShape

    layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN
    layers = max(2, int((gigabytes * 1e9 / 2 - 2 * VOCAB * HIDDEN) / layer))
    shape = ModelShape(layers - 1, 1, HIDDEN, FFN, 8, 8, VOCAB, VOCAB, False)
    sizes = {
        **dict.fromkeys(("embed_tokens", "lm_head"), (VOCAB, HIDDEN)),
        **dict.fromkeys(("gate_proj", "up_proj"), (FFN, HIDDEN)),
        "down_proj": (HIDDEN, FFN),
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN)),
    }
    folder.mkdir()
    writer = ShardedWriter(folder, "model", 10**8)
    for mapping in expand(LLAMA, shape):
        for key in mapping.parts:
            name = key.split(".")[-2]
            size = sizes.get(name, (HIDDEN,))
            writer.add(key, torch.ones(size, dtype=torch.bfloat16) * 0.01)
    writer.close()
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return writer.total_bytes


def megabytes(field: str) -> float:
    """``VmRSS``, resident memory now, or ``VmHWM``, its peak, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith(field))


def convert_and_report(source: Path, output: Path, to: str) -> None:
    """The measured process."""
    from mtp_megatron.checkpoint.convert import convert
    from mtp_megatron.serving.bundle import write_bundle

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again, below that of the imports
    before, start = megabytes("VmRSS"), time.monotonic()
    if to == "bundle":
        write_bundle(source, output, heads=4, new_heads="copy", max_shard_bytes=SHARD_BYTES, progress=False)
    else:
        convert(source, output, to=to, max_shard_bytes=SHARD_BYTES, progress=False)
    figures = {
        "seconds": time.monotonic() - start,
        "start_mb": before,
        "peak_above_start_mb": megabytes("VmHWM") - before,
    }
    print(json.dumps({key: round(value, 1) for key, value in figures.items()}))


def main() -> None:
    """Write, convert, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--to", choices=("megatron", "meta", "hf", "bundle"), default="megatron")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder, removed)")
    parser.add_argument("--measure", nargs=2, type=Path, metavar=("SRC", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        convert_and_report(*arguments.measure, arguments.to)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        source, output = Path(temporary) / "source", Path(temporary) / "output"
        size = write_model(source, arguments.gigabytes)
        command = [sys.executable, __file__, "--to", arguments.to, "--measure", str(source), str(output)]
        report = subprocess.run(command, check=True, capture_output=True, text=True)
        largest = VOCAB * HIDDEN * 2 / 1e6
        print(json.dumps({"model_mb": round(size / 1e6, 1), "largest_tensor_mb": largest, **json.loads(report.stdout)}))


if __name__ == "__main__":
    main()
