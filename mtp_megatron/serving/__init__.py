"""Decoding with the heads: a plain torch decoder of exports, self-speculative and plain greedy by the same code."""
