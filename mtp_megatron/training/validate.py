"""Rules that involve several settings, the world or the data: checked before anything is allocated or started."""

from __future__ import annotations

import sys

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.low_precision import check_low_precision
from mtp_megatron.training.recipe import Recipe, padded_vocab_size
from mtp_megatron.training.validate_experts import check_experts
from mtp_megatron.training.validate_layout import check_layout
from mtp_megatron.training.validate_overlap import check_overlap
from mtp_megatron.training.validate_schedule import check_schedule


def check_recipe(recipe: Recipe, *, world_size: int, tokenizer_vocab_size: int, done: int = 0) -> Recipe:
    """Check a recipe against itself, the number of ranks and the tokenizer.

    Args:
        recipe: as read.
        world_size: ranks of the job.
        tokenizer_vocab_size: ids that the data may hold.
        done: steps that are over: how their batches are cut over these ranks does not matter any more.

    Returns:
        The recipe with every derived value filled in (:meth:`Recipe.resolved`).

    Raises:
        ConfigError: names the first field that cannot work, its value and the remedy.
    """
    _check_vocabulary(recipe, tokenizer_vocab_size)
    recipe = recipe.resolved(vocab_size=tokenizer_vocab_size)
    _check_shapes(recipe)
    _check_tensor_parallel(recipe)
    check_layout(recipe)
    _check_batches(recipe, world_size, done)
    check_schedule(recipe)
    _check_precision(recipe)
    check_low_precision(recipe)
    check_overlap(recipe)
    _check_documents(recipe)
    _check_frozen_stages(recipe)
    check_experts(recipe, world_size)
    _check_profile(recipe)
    _check_retention(recipe)
    return recipe


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """Copies of the model in a job of ``world_size`` ranks.

    Raises:
        ConfigError: the ranks cannot be divided into whole copies.
    """
    size = recipe.model_parallel_size
    if world_size % size:
        parallel = recipe.parallel
        parts = f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}"
        if parallel.context > 1:
            parts += f" x parallel.context={parallel.context}"
        raise ConfigError(
            "world size",
            world_size,
            f"one copy of the model takes {parts} = {size} ranks",
            f"Start a multiple of {size} ranks.",
        )
    return world_size // size


def num_microbatches(recipe: Recipe, world_size: int, sequences: int | None = None) -> int:
    """Microbatches per data parallel rank (checked by :func:`check_recipe`) of a step that takes ``sequences``; None:
    of the run's largest."""
    batch = recipe.train.batch_sizes.largest if sequences is None else sequences
    return batch // (recipe.train.micro_batch_size * data_parallel_size(recipe, world_size))


def _check_vocabulary(recipe: Recipe, tokenizer_vocab_size: int) -> None:
    size = recipe.model.vocab_size
    if size is not None and size < tokenizer_vocab_size:
        raise ConfigError(
            "model.vocab_size",
            size,
            f"the tokenizer of {recipe.data.setting} has {tokenizer_vocab_size} ids",
            f"Set it to null or to at least {tokenizer_vocab_size}.",
        )


def _check_shapes(recipe: Recipe) -> None:
    model, length = recipe.model, recipe.train_seq_length
    groups = model.num_query_groups or model.num_attention_heads
    if model.head_size is None:
        _divides("model.num_attention_heads", model.num_attention_heads, "model.hidden_size", model.hidden_size)
    _divides("model.num_query_groups", groups, "model.num_attention_heads", model.num_attention_heads)
    width = model.attention_head_size
    if model.head_size is not None and width % 2:
        raise ConfigError("model.head_size", width, "rotary positions turn pairs of channels", "Choose an even size.")
    if width % 2:
        raise ConfigError(
            "model.num_attention_heads",
            model.num_attention_heads,
            f"each head is {width} wide, and rotary positions turn pairs of channels",
            "Choose hidden_size and num_attention_heads with an even quotient.",
        )
    if model.rope_scaling == "llama3" and model.rope_low_freq_factor >= model.rope_high_freq_factor:
        raise ConfigError(
            "model.rope_low_freq_factor",
            model.rope_low_freq_factor,
            f"not below model.rope_high_freq_factor={model.rope_high_freq_factor}",
            "Choose a lower one, as the model's makers did (Llama 3: 1 and 4).",
        )
    if length > model.seq_length:
        raise ConfigError(
            "train.seq_length",
            length,
            f"longer than the model's context, model.seq_length={model.seq_length}",
            f"Set train.seq_length to at most {model.seq_length}, or raise model.seq_length.",
        )
    if recipe.heads.n > length:
        raise ConfigError(
            "heads.n",
            recipe.heads.n,
            f"sequences of {length} tokens hold no target that far ahead",
            f"Set it to <= {length}.",
        )


def _check_tensor_parallel(recipe: Recipe) -> None:
    model, parallel = recipe.model, recipe.parallel
    tensor = parallel.tensor
    chunks = 2 * parallel.context
    if parallel.context > 1 and recipe.train_seq_length % chunks:
        raise ConfigError(
            "parallel.context",
            parallel.context,
            f"a rank takes two of {chunks} equal chunks of a sequence, and train.seq_length={recipe.train_seq_length}",
            f"Make train.seq_length a multiple of {chunks}.",
        )
    for name, size in (
        ("model.num_attention_heads", model.num_attention_heads),
        ("model.num_query_groups", model.num_query_groups or model.num_attention_heads),
        ("model.ffn_hidden_size", model.ffn_hidden_size or 0),
        ("padded vocabulary", padded_vocab_size(recipe)),
    ):
        _divides("parallel.tensor", tensor, name, size)
    if parallel.sequence_parallel:
        if tensor == 1:
            raise ConfigError(
                "parallel.sequence_parallel",
                True,
                "it shards over parallel.tensor, which is 1",
                "Set it to false.",
            )
        share = recipe.train_seq_length // parallel.context
        _divides("parallel.tensor", tensor, "train.seq_length", share, " under sequence_parallel")


def _check_batches(recipe: Recipe, world_size: int, done: int) -> None:
    train, parallel = recipe.train, recipe.parallel
    if train.batch_sizes.last != train.global_batch_size:
        raise ConfigError(
            "train.batch_size_schedule",
            train.batch_size_schedule,
            f"it ends with {train.batch_sizes.last} sequences, and train.global_batch_size={train.global_batch_size}",
            f"Set train.global_batch_size={train.batch_sizes.last}, or let it end with {train.global_batch_size}.",
        )
    samples = train.batch_sizes.samples(train.steps)
    if samples > sys.maxsize:
        raise ConfigError(
            "train.steps",
            train.steps,
            f"with up to {train.batch_sizes.largest} sequences in a step they take {samples}, more than can be counted",
            "Set it or the batch size lower.",
        )
    copies = data_parallel_size(recipe, world_size)
    unit = train.micro_batch_size * copies
    for first, size in train.batch_sizes.after(done):
        name, which, set_it = "train.global_batch_size", "", "Set it"
        value: object = size
        if train.batch_size_schedule is not None:
            name, value = "train.batch_size_schedule", train.batch_size_schedule
            which, set_it = f"from step {first} on a step takes {size} sequences, and ", "Change that number"
        if size % unit:
            raise ConfigError(
                name,
                value,
                f"{which}{copies} data parallel ranks take microbatches of train.micro_batch_size="
                f"{train.micro_batch_size}",
                f"{set_it} to a multiple of {unit}.",
            )
        microbatches = size // unit
        if parallel.virtual_pipeline and microbatches % parallel.pipeline:
            raise ConfigError(
                name,
                value,
                f"{which}{microbatches} microbatches, and the interleaved schedule takes {parallel.pipeline} at a time",
                f"{set_it} to a multiple of {unit * parallel.pipeline}.",
            )


def _check_profile(recipe: Recipe) -> None:
    train = recipe.train
    if train.profile_steps is not None and train.profile_steps[0] > train.steps:
        raise ConfigError(
            "train.profile_steps",
            train.profile_steps,
            f"the run ends at train.steps={train.steps}",
            f"Begin at step {train.steps} or before.",
        )


def _check_retention(recipe: Recipe) -> None:
    every, interval = recipe.run.keep_every, recipe.train.save_interval
    if every is None:
        return
    if recipe.run.keep_last is None:
        raise ConfigError(
            "run.keep_every",
            every,
            "run.keep_last=null keeps all checkpoints",
            "Set run.keep_last to how many of the others to keep, or this to null.",
        )
    if interval and every % interval:
        raise ConfigError(
            "run.keep_every",
            every,
            f"no multiple of train.save_interval={interval}: most of these steps are never saved",
            f"Set it to {every // interval * interval or interval} or another multiple of {interval}.",
        )


def _check_precision(recipe: Recipe) -> None:
    if recipe.train.precision == "fp16" and recipe.run.deepspeed is None:
        raise ConfigError(
            "train.precision",
            "fp16",
            "its gradients need a loss scale, which DeepSpeed brings",
            "Set it to bf16, or run.deepspeed to a configuration with fp16.enabled.",
        )


def _check_documents(recipe: Recipe) -> None:
    context = recipe.parallel.context
    if recipe.data.reset_attention_mask and recipe.train.transformer_engine and context > 1:
        raise ConfigError(
            "data.reset_attention_mask",
            True,
            f"Transformer Engine would want every document's length divisible by 2 x parallel.context={context}",
            "Set parallel.context=1, train.transformer_engine=false (its masks are cut with the queries), or this to "
            "false.",
        )


def _check_frozen_stages(recipe: Recipe) -> None:
    if recipe.heads.trainable != "all" and recipe.optimizer.distributed and recipe.parallel.pipeline > 1:
        raise ConfigError(
            "optimizer.distributed",
            True,
            f"with heads.trainable={recipe.heads.trainable} the first stages train nothing, and megatron-core's "
            "distributed optimizer cannot be saved on such a stage",
            "Set optimizer.distributed=false, or parallel.pipeline=1.",
        )


def _divides(name: str, divisor: int, of: str, size: int, where: str = "") -> None:
    if size % divisor:
        raise ConfigError(
            name, divisor, f"it does not divide {of}={size}{where}", f"Choose a divisor of {size}, or change {of}."
        )
