"""Megatron-LM's pretrain_gpt.py with future-token heads: the same arguments and --mtp-heads N (see README.md)."""

import sys

from mtp_megatron.megatron_lm.run import main

if __name__ == "__main__":  # checkpointing spawns processes, which import this file again
    sys.exit(main())
