"""From recipe to trainable model: configuration, pipeline chunks, data parallel wrappers, optimizer, schedule."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from mtp_megatron import compat
from mtp_megatron.layout import trunk_layout
from mtp_megatron.rope import RopeScaling
from mtp_megatron.training.batches import Microbatch
from mtp_megatron.training.head_stages import HeadStages
from mtp_megatron.training.low_precision import config_fields
from mtp_megatron.training.recipe import ModelSection, OptimizerSection, Recipe, padded_vocab_size
from mtp_megatron.training.step import BatchIterator, LossFunction, run_schedule, training_loss
from mtp_megatron.training.world import waits_for_others

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.transformer import TransformerConfig

    from mtp_megatron.model import MTPGPTModel
    from mtp_megatron.sequential import HeadReport

_DECAY_STYLES = {"wsd": "WSD"}  # megatron-core's names where they are others
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Trainable:
    """What this rank trains on megatron-core's schedules: its model chunks (one for each virtual stage) with optimizer
    and schedule. A :class:`.step.Trainer`."""

    config: TransformerConfig
    chunks: Sequence[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    head_stages: HeadStages | None = None  # where heads are on several pipeline stages

    @property
    def models(self) -> list[MTPGPTModel]:
        """The chunks without their wrappers."""
        return [unwrap(chunk) for chunk in self.chunks]

    @contextmanager
    def gathered_parameters(self) -> Iterator[None]:
        """All parameters are whole inside, for evaluation and checkpoints.

        With ``overlap_param_gather`` the shards that an optimizer step wrote are gathered by the next forward pass;
        here they are gathered at once and the hooks that would do it rest.
        """
        overlapped = self.chunks[0].ddp_config.overlap_param_gather
        if overlapped:
            for chunk in self.chunks:
                chunk.disable_forward_pre_hook()
        try:
            yield
        finally:
            if overlapped:
                for chunk in self.chunks:
                    chunk.enable_forward_pre_hook()

    def backward(self, recipe: Recipe, iterators: Sequence[BatchIterator], num_microbatches: int) -> list[HeadReport]:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports: list[HeadReport] = run_schedule(
            recipe, self.chunks, iterators, num_microbatches, loss_func=training_loss, forward_only=False
        )
        return reports if self.head_stages is None else [*reports, *self.head_stages.take_reports()]

    def update(self) -> float:
        updated, grad_norm, _ = self.optimizer.step()
        if not updated:  # megatron-core's found_inf, which only a loss scaler sets
            return math.inf
        return float(grad_norm) if grad_norm is not None else math.nan

    def forward(
        self, recipe: Recipe, iterators: Sequence[BatchIterator], num_microbatches: int, loss_func: LossFunction
    ) -> list[tuple[Microbatch, HeadReport]]:
        results: list[tuple[Microbatch, HeadReport]] = run_schedule(
            recipe, self.chunks, iterators, num_microbatches, loss_func=loss_func, forward_only=True
        )
        if self.head_stages is not None:
            self.head_stages.put_together([report for _, report in results])
        return results

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with self.gathered_parameters():
            for chunk in self.chunks:
                chunk.eval()
            yield
            for chunk in self.chunks:
                chunk.train()

    def may_lose_steps(self) -> bool:
        return False


def unwrap(module: Any) -> Any:
    """The model inside data parallel and precision wrappers."""
    while hasattr(module, "module"):
        module = module.module
    return module


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """Megatron's configuration of the trunk and of the heads' layers; ``recipe`` must be resolved."""
    compat.prepare()
    from megatron.core.transformer import TransformerConfig

    model, parallel = recipe.model, recipe.parallel
    dtype = PRECISIONS[recipe.train.precision]
    interleaved = parallel.virtual_pipeline is not None
    recompute: dict[str, Any] = {"recompute_granularity": recipe.train.recompute}
    if recipe.train.recompute == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=model.num_trunk_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.attention_head_size,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        attention_softmax_in_fp32=True,
        init_method_std=model.init_method_std,
        use_cpu_initialization=compat.device().type == "cpu",
        bf16=recipe.train.precision == "bf16",
        fp16=recipe.train.precision == "fp16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        tp_comm_overlap=parallel.tp_comm_overlap,
        pipeline_model_parallel_layout=trunk_layout(parallel.layout),
        # The heads' loss is a sum over tokens; gradients are divided by the global batch's count of targets of head 1.
        calculate_per_token_loss=True,
        # Interleaved stages must not batch their sends and receives: with two stages the results are silently wrong.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # Freed while gloo still reads it, the interleaved schedule's output reaches the next stage as garbage.
        deallocate_pipeline_outputs=compat.device().type == "cuda",
        **_experts(recipe),
        **config_fields(recipe),
        **recompute,
        **compat.fusions(),
    )


@contextmanager
def overlapped_communication(recipe: Recipe) -> Iterator[None]:
    """What ``parallel.tp_comm_overlap`` needs for as long as the model runs; the world must be up. Collective."""
    if not recipe.parallel.tp_comm_overlap:
        yield
        return
    tokens = recipe.train_seq_length * recipe.train.micro_batch_size // recipe.parallel.context
    with compat.userbuffers(transformer_config(recipe), tokens=tokens, abandon=waits_for_others):
        yield


def _experts(recipe: Recipe) -> dict[str, Any]:
    """Settings of TransformerConfig for a trunk with experts; none for a dense one."""
    model, parallel = recipe.model, recipe.parallel
    if model.num_experts is None:
        return {}
    coefficient = compat.aux_loss_coefficient(model.moe_aux_loss, tensor=parallel.tensor, context=parallel.context)
    return {
        "num_moe_experts": model.num_experts,
        "moe_router_topk": model.moe_top_k,
        # Softmax over one chosen expert alone would always be 1, and its router would learn nothing.
        "moe_router_pre_softmax": model.moe_top_k == 1,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_router_load_balancing_type": "aux_loss" if model.moe_aux_loss else "none",
        "moe_aux_loss_coeff": coefficient,
        # Probabilities of experts in bf16 would send tokens elsewhere than the same weights in fp32 do.
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": parallel.expert,
        # Experts are whole on their ranks: fewer and larger multiplications, and gloo gathers no uneven shares.
        "expert_tensor_parallel_size": 1,
        # All experts of a rank in one call; the layers of megatron-core's own take one expert after the other.
        "moe_grouped_gemm": recipe.train.transformer_engine,
    }


def rope_scaling(model: ModelSection) -> RopeScaling | None:
    """How the model's rotary frequencies are lowered, None where they are not."""
    if model.rope_scaling is None:
        return None
    return RopeScaling(
        model.rope_scaling,
        model.rope_scaling_factor,
        model.rope_low_freq_factor,
        model.rope_high_freq_factor,
        model.rope_original_context,
    )


def build_trainable(recipe: Recipe) -> Trainable:
    """Allocate this rank's share of the model and its optimizer; the world must be up (:mod:`.world`)."""
    config = transformer_config(recipe)
    models = [model.to(compat.device()) for model in build_models(recipe, config)]
    return _wrap(recipe, config, models)


def build_models(recipe: Recipe, config: TransformerConfig) -> list[MTPGPTModel]:
    """This rank's chunks of the model, where torch's default device puts them (``meta``: no memory is taken)."""
    from megatron.core import parallel_state

    from mtp_megatron.model import build_model

    if recipe.model.vocab_size is None:
        raise ValueError("model.vocab_size is null: resolve the recipe with the tokenizer's vocabulary first")
    virtual = recipe.parallel.virtual_pipeline
    stages: Sequence[int | None] = range(virtual) if virtual else [None]
    here, ranks = parallel_state.get_pipeline_model_parallel_rank(), recipe.parallel.pipeline
    models = []
    for stage in stages:
        model = build_model(
            config,
            recipe.heads,
            vocab_size=recipe.model.vocab_size,
            padded_vocab_size=padded_vocab_size(recipe),
            max_sequence_length=recipe.model.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            tied_embeddings=recipe.model.tied_embeddings,
            rotary_base=recipe.model.rotary_base,
            rope_scaling=rope_scaling(recipe.model),
            vp_stage=stage,
            transformer_engine=recipe.train.transformer_engine,
            owned_heads=recipe.stages[here + (stage or 0) * ranks].heads,
        )
        models.append(model)
    return models


def _wrap(recipe: Recipe, config: TransformerConfig, models: Sequence[MTPGPTModel]) -> Trainable:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    settings = recipe.optimizer
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=settings.distributed,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        fp8_param_gather=recipe.train.fp8_param,
    )
    modules = [Float16Module(config, model) for model in models] if config.bf16 else list(models)
    # After the cast, which makes other parameters of fake tensors.
    head_stages = HeadStages.join(
        recipe.stages,
        models,
        tied=recipe.model.tied_embeddings,
        timeout=timedelta(minutes=recipe.train.timeout_minutes),
    )
    # Buckets serve the overlap; only the first chunk's reduction is exposed, as in Megatron-LM's get_model.
    chunks = [DistributedDataParallel(config, ddp, module, disable_bucketing=i > 0) for i, module in enumerate(modules)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=settings.distributed,
            overlap_param_gather=settings.overlap_param_gather,
            fp8_recipe=recipe.train.fp8_recipe if recipe.train.fp8 else None,
        ),
        chunks,
    )
    scheduler = build_scheduler(settings, optimizer)
    config.finalize_model_grads_func = (
        finalize_model_grads if head_stages is None else head_stages.finalize_with(finalize_model_grads)
    )
    config.grad_scale_func = optimizer.scale_loss
    if settings.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return Trainable(config, chunks, optimizer, scheduler, head_stages)


def build_scheduler(settings: OptimizerSection, optimizer: Any) -> OptimizerParamScheduler:
    """megatron-core's schedule of learning rate and weight decay over ``optimizer.param_groups``.

    Of a checkpoint it takes its place alone: the rest is the recipe's, which ``run.accept_changes`` may have changed.
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    decay_steps = settings.decay_steps or settings.warmup_steps + 1  # upstream wants an end after the warm-up
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=decay_steps,
        # Upstream's WSD falls to min_lr after its end, also where its decay has no steps.
        lr_decay_style="constant" if settings.decays_later else _DECAY_STYLES.get(settings.schedule, settings.schedule),
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=settings.wsd_decay_steps,
        lr_wsd_decay_style=settings.wsd_decay_style,
    )


def learning_rate_at(scheduler: OptimizerParamScheduler, step: int) -> float:
    """That step ``step`` (1-based) trains at; the schedule stays where it is."""
    there = copy.copy(scheduler)
    there.num_steps = step
    rate: float = there.get_lr({})
    return rate
