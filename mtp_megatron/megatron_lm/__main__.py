"""``python -m mtp_megatron.megatron_lm``: Megatron-LM's training with heads."""

from mtp_megatron.megatron_lm.run import main

if __name__ == "__main__":  # checkpointing spawns processes, which import this module again
    raise SystemExit(main())
