"""The layouts by name, for the command line: nothing is imported here, so that ``--help`` answers at once."""

# What `convert` reads (:mod:`.kinds`), as a user would name it.
SOURCES = {
    "hf": "a Hugging Face folder",
    "meta": "a release of Meta's",
    "megatron": "a Megatron run, its checkpoints folder or an iter_* one",
    "deepspeed": "a DeepSpeed run, its checkpoints folder or an iter_* one",
}
# What it writes (:data:`.convert.TARGETS`), and the bundle made of the first.
TARGETS = {
    "hf": "a Hugging Face folder",
    "meta": "the layout of the paper's release",
    "megatron": "a distributed checkpoint for run.load, at any TP x PP",
    "bundle": "hf with drafts for serving engines",
}
