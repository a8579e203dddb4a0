"""Training on megatron-core's own parts: recipe, set-up, step, loop, evaluation and checkpoints."""
