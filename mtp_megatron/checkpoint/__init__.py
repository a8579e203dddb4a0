"""Checkpoints in and out: Megatron distributed checkpoints, Hugging Face folders, and the tables that relate them."""
