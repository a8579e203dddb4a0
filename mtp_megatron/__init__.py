"""Multi-token prediction heads for Megatron: exact gradients, memory that does not grow with the number of heads."""

__version__ = "0.1.0"
