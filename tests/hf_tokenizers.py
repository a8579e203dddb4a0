"""Small tokenizers as Hugging Face folders have them, made by the library ``tokenizers`` without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

END, BEGIN, TURN = "<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>"
TEMPLATE = "{{ messages }}"


def byte_level(*, size: int = 300) -> Any:
    """A byte-level BPE as Llama 3's and Qwen's are: its special tokens come after the vocabulary, and it puts the first
    of them before each text where special tokens are asked for."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    words = [" ".join(f"w{i * j % 30}" for j in range(40)) for i in range(1, 40)]
    library.train_from_iterator([*words, "def f(x):\n    return x + 1\n" * 10], trainer)
    library.add_special_tokens([BEGIN, END, TURN])
    library.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, library.token_to_id(BEGIN))]
    )
    return library


def write_tokenizer_folder(folder: Path, library: Any = None, **settings: Any) -> Path:
    """A folder as ``save_pretrained`` leaves one; ``settings`` are entries of its ``tokenizer_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    (library or byte_level()).save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
        **settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2))
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """Replace entries at the top of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
