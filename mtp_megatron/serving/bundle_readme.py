"""The README of a bundle: the exact commands that serve it, and a model card."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from mtp_megatron import __version__
from mtp_megatron.install import EXPLANATION, install_command
from mtp_megatron.serving.drafts import EAGLE3_FOLDER, HEADS_FOLDER, MEDUSA_FOLDER, Draft, eagle3_layers
from mtp_megatron.serving.engine_command import sglang_arguments, vllm_arguments

_NAME = "EXPORT"  # what the commands call the bundle's folder
_SGLANG_LAYERS = 3


def readme(llama: dict[str, Any], export: dict[str, Any], drafts: Sequence[Draft]) -> str:
    """``README.md`` of a bundle.

    Args:
        llama: its ``config.json``.
        export: its ``mtp_config.json``.
        drafts: the drafts in it.
    """
    heads = export["num_heads"]
    sections = [_front(llama, export), _plain(llama)]
    for draft in drafts:
        if draft.folder == HEADS_FOLDER:
            sections.append(_all_heads(heads))
        elif draft.folder == EAGLE3_FOLDER:
            sections.append(_eagle3(export["num_trunk_layers"]))
        elif draft.folder == MEDUSA_FOLDER:
            sections.append(_medusa(heads))
    return "\n".join([*sections, _checks(), _card(llama, export)])


def _command(arguments: Sequence[str]) -> str:
    return "    python " + shlex.join(arguments)


def _vllm(draft: str | None, tokens: int) -> str:
    return _command(vllm_arguments(_NAME, draft, tokens, host="127.0.0.1", port=8000))


def _front(llama: dict[str, Any], export: dict[str, Any]) -> str:
    return f"""# A Llama with {export["num_heads"]} future-token heads

Trunk and head 1 are a plain {llama["model_type"]} model of {llama["num_hidden_layers"]} layers. The further heads read
the output of layer {export["num_trunk_layers"] - 1} and predict the tokens after the next one: an engine lets them
draft, checks the drafts in its next forward pass, and gives the same text in fewer passes.

In the commands, `{_NAME}` stands for the path of this folder. On a CPU, set `VLLM_CPU_KVCACHE_SPACE=4` (GiB) before
vLLM, which takes nearly all of the memory otherwise.
"""


def _plain(llama: dict[str, Any]) -> str:
    engines, why = "any engine", ""
    if llama.get("mlp_only_layers"):
        engines = "vLLM"
        why = """
The last layer is dense, the others have experts (`mlp_only_layers`). vLLM and transformers read that. SGLang and
llama.cpp, by their sources, give every layer of this family experts, and cannot serve the model.
"""
    return f"""## Without speculation: {engines}
{why}
{_vllm(None, 0)}

Greedy text takes `"temperature": 0` in the request: vLLM does not read `do_sample` in `generation_config.json`. Its
`--load-format runai_streamer` is not supported: it takes the heads' `*.safetensors` for the model's, too.
"""


def _all_heads(heads: int) -> str:
    return f"""## All heads: vLLM with the plugin of mtp-megatron

    {install_command(no_deps=True)}      # in vLLM's environment; {EXPLANATION}
{_vllm(HEADS_FOLDER, heads - 1)}

`num_speculative_tokens` is the number of heads beside head 1 in use: 1 to {heads - 1}. Tried with vLLM
0.32 on CPU. The same through this package, which finds the draft by itself: `mtp-megatron serve {_NAME}`.
"""


def _eagle3(num_trunk_layers: int) -> str:
    convert = ["convert_hf_to_gguf.py", _NAME, "--outfile", "model.gguf"]
    convert_draft = [
        *("convert_hf_to_gguf.py", f"{_NAME}/{EAGLE3_FOLDER}", "--target-model-dir", _NAME),
        *("--outfile", "draft.gguf"),
    ]
    text = f"""## Head 2 alone: a stock EAGLE-3 draft, nothing to install

vLLM:

{_vllm(EAGLE3_FOLDER, 1)}
"""
    if len(eagle3_layers(num_trunk_layers)) < _SGLANG_LAYERS:
        return (
            text
            + f"""
SGLang and llama.cpp want the hidden states of {_SGLANG_LAYERS} layers, and this trunk has {num_trunk_layers}.
"""
        )
    return (
        text
        + f"""
SGLang, and llama.cpp from the release that reads `eagle_aux_hidden_state_layer_ids` (both written to the letter of
their sources, not run by this project):

{_command(sglang_arguments(_NAME))}

{_command(convert)}
{_command(convert_draft)}
    llama-server -m model.gguf -md draft.gguf --spec-type draft-eagle3 --spec-draft-n-max 1 --port 8000

More than one speculative token would feed head 2 its own output, for which it was not trained: leave it at 1.
"""
    )


def _medusa(heads: int) -> str:
    return f"""## All heads: vLLM's Medusa, nothing to install

{_vllm(MEDUSA_FOLDER, heads - 1)}

`num_speculative_tokens` must be {heads - 1}.
"""


def _checks() -> str:
    return f"""## Is it whole, and does it speculate?

    mtp-megatron verify {_NAME}

checks every file's SHA-256, shapes and NaNs, decodes with the torch reference, and, given the interpreter of a vLLM
environment (`--vllm-python PATH`), compares vLLM with it: the text with and without speculation and the drafts accepted
at each position. A server's counters are at `/metrics`: `vllm:spec_decode_num_accepted_tokens_total` and others. Where
they stay at zero, the draft does not belong to the model.
"""


def _card(llama: dict[str, Any], export: dict[str, Any]) -> str:
    source, tokenizer = export["source"], export["tokenizer"]
    facts = {
        "heads": f"{export['num_heads']} ({_describe(export['heads'])})",
        "trunk layers": export["num_trunk_layers"],
        "hidden size": llama["hidden_size"],
        "attention heads": f"{llama['num_attention_heads']}, {llama['num_key_value_heads']} key/value heads",
        "MLP size": llama["intermediate_size"],
        **_experts(llama),
        "vocabulary": llama["vocab_size"],
        "context": llama["max_position_embeddings"],
        "embeddings": "tied" if llama["tie_word_embeddings"] else "untied",
        "type": export["dtype"],
        "tokenizer": f"{tokenizer['kind']}, SHA-256 {tokenizer['sha256']}",
        **{key.replace("_", " "): value for key, value in source.items() if value is not None},
        "exported by": f"mtp_megatron {__version__}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    settings = json.dumps(export["heads"], indent=2)
    return f"""## Model card

| | |
|---|---|
{rows}

How the heads were trained:

```json
{settings}
```
"""


def _experts(llama: dict[str, Any]) -> dict[str, str]:
    if "num_experts" not in llama:
        return {}
    chosen, width = llama["num_experts_per_tok"], llama["moe_intermediate_size"]
    return {"experts of a trunk layer": f"{llama['num_experts']} of size {width}, {chosen} for each token"}


def _describe(heads: dict[str, Any]) -> str:
    return ", ".join(str(heads[key]) for key in ("arrangement", "kind") if key in heads)
