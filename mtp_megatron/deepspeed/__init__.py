"""DeepSpeed as host: the same recipe, model, data and metrics under a DeepSpeed engine, ZeRO 0 to 3.

``run.deepspeed=ds_config.json`` in a recipe chooses it. Nothing here is imported without it.
"""
