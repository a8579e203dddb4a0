"""The plugin that teaches vLLM to draft with all further heads (entry point group ``vllm.general_plugins``).

It needs vLLM, torch and nothing else of this package's dependencies, so it may be installed with ``--no-deps``.
"""

from __future__ import annotations

# The draft's ``architectures``. vLLM takes a name that starts or ends with "Eagle3" as it is
# (vllm.transformers_utils.configs.eagle.EAGLEConfig) and would put "Eagle3" before any other.
ARCHITECTURE = "MTPHeadsEagle3"
# Marks the slots that vLLM adds behind each request's last token, one for each draft after the first. No token has it.
MASK_TOKEN_ID = -1


def register() -> None:
    """Make the draft class known; called by vLLM in each of its processes, possibly several times."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # By name: importing the class here would initialise CUDA before vLLM forks.
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.heads:{ARCHITECTURE}")
