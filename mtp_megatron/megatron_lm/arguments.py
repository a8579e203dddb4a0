"""The heads' command line arguments beside Megatron-LM's own, and what of the latter cannot work with them.

Needs no Megatron-LM: everything here reads an ``argparse`` parser or its result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch

from mtp_megatron.compat import fp8, packages
from mtp_megatron.config import HeadsConfig
from mtp_megatron.errors import ConfigError
from mtp_megatron.megatron_lm.loading import check_scales

GROUP = "multi-token prediction heads (mtp_megatron)"


@dataclass(frozen=True)
class Flag:
    """One argument: ``name`` on the command line, ``field`` of :class:`HeadsConfig`, and argparse's settings."""

    name: str
    field: str
    type: Callable[[str], Any] | None = None
    nargs: str | None = None
    help: str | None = None  # default: the field's description

    @property
    def dest(self) -> str:
        return self.name.removeprefix("--").replace("-", "_")


# Upstream's own names that begin alike (--mtp-num-layers, --mtp-loss-scaling-factor, ...) must not be among these, nor
# may a dest be a field of TransformerConfig, which takes every argument of its fields' names.
FLAGS = (
    Flag("--mtp-heads", "n", int, help="number of heads; head i predicts the token i places ahead"),
    Flag("--mtp-head-kind", "kind"),
    Flag("--mtp-head-arrangement", "arrangement"),
    Flag("--mtp-unembedding", "unembedding"),
    Flag("--mtp-execution", "execution"),
    Flag("--mtp-fp8-heads", "fp8"),
    Flag("--mtp-loss-weights", "loss_weights", float, "+"),
    Flag("--mtp-loss-decay", "loss_decay", float),
    Flag("--mtp-z-loss", "z_loss", float),
    Flag("--mtp-loss-chunk-tokens", "loss_chunk_tokens", int),
    Flag("--mtp-curriculum-steps", "curriculum_steps", int),
    Flag("--mtp-trainable", "trainable"),
    Flag(
        "--mtp-documents",
        "documents",
        help="separate: no target lies beyond its document's end; ignore: documents run together. Default: separate "
        "with --eod-mask-loss, else ignore, so that head 1 learns what Megatron-LM's own loss would teach it",
    ),
)


def add_mtp_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the heads' arguments; Megatron-LM's ``extra_args_provider``. All default to None, :class:`HeadsConfig`'s
    default."""
    group = parser.add_argument_group(GROUP)
    for flag in FLAGS:
        field = HeadsConfig.model_fields[flag.field]
        text = flag.help or str(field.description)
        if flag.help is None and field.default not in (None, False):
            text += f" (default: {field.default})"
        settings: dict[str, Any] = {"type": flag.type} if flag.type else {"choices": _choices(field.annotation)}
        if field.annotation is bool:
            settings = {"action": "store_true"}
        if flag.nargs:
            settings["nargs"] = flag.nargs
        group.add_argument(flag.name, default=None, help=text.replace("%", "%%"), **settings)
    return parser


def heads_from_args(args: argparse.Namespace) -> HeadsConfig:
    """The heads that the arguments ask for.

    Raises:
        ConfigError: no ``--mtp-heads``, or a value or combination that cannot work; named as on the command line.
    """
    if getattr(args, "mtp_heads", None) is None:
        raise ConfigError("--mtp-heads", None, "no heads were asked for", "Give --mtp-heads 4, for example")
    values = {flag.field: getattr(args, flag.dest, None) for flag in FLAGS}
    values = {field: value for field, value in values.items() if value is not None}
    values.setdefault("documents", "separate" if getattr(args, "eod_mask_loss", False) else "ignore")
    try:
        return HeadsConfig.parse(values, prefix="")
    except ConfigError as error:
        names = {flag.field: flag.name for flag in FLAGS}
        field, *_ = error.field.split(".")
        raise ConfigError(names.get(field, error.field), error.value, error.problem, error.remedy) from None


@dataclass(frozen=True)
class Refusal:
    """An argument of Megatron-LM that must keep one of the values ``fine`` with heads, and why."""

    name: str
    fine: tuple[Any, ...]
    problem: str
    remedy: str
    field: str | None = None  # where argparse puts it, if not under its name

    @property
    def dest(self) -> str:
        return self.field or self.name.removeprefix("--").replace("-", "_")


_OFF = (None, False)
_DROP = "Drop it, or train without --mtp-heads"
_OPTIMIZER = "Use --use-distributed-optimizer"
REFUSALS = (
    Refusal(
        "--mtp-num-layers",
        (None, 0),
        "upstream's multi-token prediction cannot be combined with these heads",
        _DROP,
    ),
    Refusal("--position-embedding-type", ("rope",), "the heads' layers need rotary positions", "Set it to rope"),
    Refusal("--rotary-percent", (1.0,), "every channel is rotated", "Leave it at 1.0"),
    Refusal("--rotary-seq-len-interpolation-factor", (None, 1), "positions are not interpolated", _DROP),
    Refusal("--no-rope-freq", (None,), "it lists the trunk's layers, and the heads have positions in each", _DROP),
    Refusal("--window-attn-skip-freq", (None,), "it counts layers, and all heads would have one's window", _DROP),
    Refusal("--qk-clip", _OFF, "it clips the trunk's layers alone", _DROP),
    Refusal("--use-mup", _OFF, "the heads' logits are not scaled by it", _DROP),
    Refusal("--spec", (None,), "the heads bring the model's layer spec", _DROP),
    Refusal("--heterogeneous-layers-config-path", (None,), "all layers of trunk and heads are alike", _DROP),
    Refusal("--multi-latent-attention", _OFF, "the heads' layers are not tested with it", _DROP),
    Refusal("--experimental-attention-variant", (None,), "the heads' layers are not tested with it", _DROP),
    Refusal("--transformer-impl", ("local", "transformer_engine"), "it is for inference", "Set it to local"),
    Refusal("--use-legacy-models", _OFF, "the heads need megatron-core's model", _DROP),
    Refusal("--fp16-lm-cross-entropy", _OFF, "the heads' softmax is computed in fp32", _DROP),
    Refusal("--defer-embedding-wgrad-compute", _OFF, "the heads compute the unembedding's gradient themselves", _DROP),
    Refusal("--delay-wgrad-compute", _OFF, "the heads' weight gradients are complete when their backward is", _DROP),
    Refusal("--overlap-moe-expert-parallel-comm", _OFF, "its schedule plan knows no heads", _DROP),
    Refusal(
        "--fine-grained-activation-offloading", _OFF, "it counts on forward passes outside of the backward pass", _DROP
    ),
    Refusal("--enable-cuda-graph", _OFF, "the heads run outside of any graph", _DROP),
    Refusal("--external-cuda-graph", _OFF, "the heads run outside of any graph", _DROP),
    Refusal("--cuda-graph-impl", (None, "none"), "the heads run outside of any graph", _DROP),
    Refusal("--fp8-output-proj", _OFF, "the heads compute the unembedding themselves, in the weights' type", _DROP),
    Refusal("--use-torch-fsdp2", _OFF, "the heads are not tested with sharded modules", _OPTIMIZER),
    Refusal("--use-megatron-fsdp", _OFF, "the heads are not tested with sharded modules", _OPTIMIZER),
    Refusal("--sft", _OFF, "packed sequences are not supported", _DROP),
    Refusal("--hybrid-context-parallel", _OFF, "packed sequences are not supported", _DROP),
    Refusal("--dataloader-inter-document-masking", _OFF, "packed sequences are not supported", _DROP),
    Refusal("--logits-load-dir", (None,), "distillation from stored logits knows one head", _DROP),
    Refusal("--logits-save-dir", (None,), "the heads' logits never exist as a whole", _DROP),
)


def check_args(args: argparse.Namespace) -> HeadsConfig:
    """The heads, after a look at everything else that was asked for; arguments that this Megatron-LM lacks are skipped.

    Raises:
        ConfigError: names the first argument that cannot work, its value and the remedy.
        CheckpointError: a checkpoint to be loaded whose arguments cannot be read.
    """
    heads = heads_from_args(args)
    for refusal in REFUSALS:
        value = getattr(args, refusal.dest, refusal.fine[0])
        if value not in refusal.fine:
            raise ConfigError(refusal.name, value, refusal.problem, refusal.remedy)
    _check_masks(args)
    _check_low_precision(args, heads)
    _check_transformer_engine(args)
    _check_rampup(args)
    _check_weight_shards(args)
    _check_async_save(args)
    check_scales(args)
    layout = getattr(args, "pipeline_model_parallel_layout", None)
    if layout is not None and "m" in str(layout):
        raise ConfigError(
            "--pipeline-model-parallel-layout",
            str(layout),
            "its m asks for a head on that stage, and Megatron-LM's loop finds all heads on the last one",
            "Leave m out, or train with `mtp-megatron train`, whose parallel.layout knows it",
        )
    if heads.trainable != "all" and args.pipeline_model_parallel_size > 1:
        raise ConfigError(
            "--mtp-trainable",
            heads.trainable,
            "the first of --pipeline-model-parallel-size stages then train nothing, and Megatron-LM's loop cannot save "
            "an optimizer on such a stage so that it can be read again",
            "Train on one stage, or with `mtp-megatron train` and optimizer.distributed=false",
        )
    if args.seq_length is not None and heads.n > args.seq_length:
        raise ConfigError(
            "--mtp-heads", heads.n, f"--seq-length {args.seq_length} holds no target that far ahead", "Ask for fewer"
        )
    return heads


_NAMES = {
    "fp8": "--fp8-format",
    "fp8_recipe": "--fp8-recipe",
    "fp8_param": "--fp8-param-gather",
    "fp4": "--fp4-format",
    "first_last_layers_bf16": "--first-last-layers-bf16",
    "heads": "--mtp-fp8-heads",
    "bf16": "--bf16",
    "transformer_engine": "--transformer-impl to transformer_engine",
}


def _check_low_precision(args: argparse.Namespace, heads: HeadsConfig) -> None:
    """FP8 and FP4 of the trunk, which upstream enters; refused where they cannot work."""
    request = fp8.Request(
        fp8=getattr(args, "fp8", None),
        fp8_recipe=getattr(args, "fp8_recipe", "delayed"),
        fp8_param=getattr(args, "fp8_param_gather", False),
        fp4=getattr(args, "fp4", None),
        first_last_layers_bf16=getattr(args, "first_last_layers_bf16", False),
        heads=heads.fp8,
        bf16=getattr(args, "bf16", False),
        transformer_engine=args.transformer_impl == "transformer_engine",
    )
    fp8.check(request, _NAMES)


def _check_transformer_engine(args: argparse.Namespace) -> None:
    """Refuse Transformer Engine's layers, Megatron-LM's default, where they cannot run."""
    if args.transformer_impl != "transformer_engine":
        return
    package = packages.transformer_engine(torch.cuda.is_available())
    if package.state is not packages.State.USABLE:
        raise ConfigError(
            "--transformer-impl",
            args.transformer_impl,
            f"{package.name} is {package.state.value}" + (f" ({package.detail})" if package.detail else ""),
            "Set it to local, or install it on a machine with a CUDA device",
        )


def _check_masks(args: argparse.Namespace) -> None:
    """Refuse attention within documents where layers would not be told of them, or would not listen."""
    if not args.reset_attention_mask:
        return

    def refuse(problem: str, remedy: str) -> ConfigError:
        return ConfigError("--reset-attention-mask", True, problem, remedy)

    ours = "train with `mtp-megatron train` and data.reset_attention_mask=true"
    if args.transformer_impl == "transformer_engine":
        raise refuse(
            "Transformer Engine's layers are causal whatever mask they are given: documents would see one another",
            f"Drop it, set --transformer-impl to local, or {ours}",
        )
    if args.context_parallel_size > 1:
        raise refuse(
            f"attention masks are not cut for --context-parallel-size {args.context_parallel_size}",
            f"Drop one of the two, or {ours}",
        )
    stages, chunks = args.pipeline_model_parallel_size, getattr(args, "virtual_pipeline_model_parallel_size", None)
    if stages > 2 or (chunks or 1) > 1:
        raise refuse(
            f"Megatron-LM reads data on the first and the last stage alone, and of {stages * (chunks or 1)} stages the "
            "others' documents would see one another",
            f"Use at most 2 pipeline stages and no virtual ones, or {ours}",
        )
    if getattr(args, "window_size", None) is not None:
        raise refuse(
            f"--window-size {args.window_size} takes the place of any mask in these layers", "Drop one of them"
        )


def _check_rampup(args: argparse.Namespace) -> None:
    """Refuse an argument that Megatron-LM takes and ignores since it has another one for the same purpose (0.18)."""
    if getattr(args, "rampup_batch_size", None) is not None and hasattr(args, "step_batch_size_schedule"):
        raise ConfigError(
            "--rampup-batch-size",
            args.rampup_batch_size,
            "this release of Megatron-LM ignores it and would train with --global-batch-size from the first step",
            'Use --step-batch-size-schedule "TOKENS:SIZE TOKENS:SIZE ..." in place of both',
        )


def _check_weight_shards(args: argparse.Namespace) -> None:
    """Refuse weights cut further than by tensor parallelism (0.19), which are gathered when their module is called: the
    heads' loss reads the unembedding without."""
    if getattr(args, "gtp_weight_remat_size", 1) > 1:
        raise ConfigError(
            "--tensor-parallel-num-weight-shards",
            args.tensor_parallel_num_weight_shards,
            "each tensor parallel rank would hold a piece of its share, and the heads read the unembedding's whole",
            f"Leave it at --tensor-model-parallel-size {args.tensor_model_parallel_size}",
        )


def _check_async_save(args: argparse.Namespace) -> None:
    """Refuse upstream's writers where they end before they write and the training waits for them."""
    if getattr(args, "async_save", False) and not torch.cuda.is_available():
        raise ConfigError(
            "--async-save",
            True,
            "upstream's writers are processes that need a CUDA device, and there is none",
            "Drop it, or train with `mtp-megatron train` and train.async_save=true",
        )


def _choices(annotation: Any) -> tuple[str, ...]:
    return tuple(get_args(annotation))
