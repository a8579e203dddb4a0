"""Tiny models for tests: weights and batches that do not depend on the layout, a few steps of Megatron's training."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mtp_megatron import compat


def tiny_config(**overrides: Any) -> Any:
    """TransformerConfig of a small Llama-like model; sizes and parallelism come from the current parallel state.

    4 layers, hidden 32, 4 heads in 2 query groups, SwiGLU, RMSNorm, no biases, no dropout, fp32.
    """
    compat.prepare()
    from megatron.core import parallel_state as ps
    from megatron.core.transformer import TransformerConfig

    interleaved = ps.get_virtual_pipeline_model_parallel_world_size() is not None
    settings: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 64,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": ps.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": ps.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": ps.get_virtual_pipeline_model_parallel_world_size(),
        "context_parallel_size": ps.get_context_parallel_world_size(),
        # Interleaved stages must not batch their sends and receives: with two stages the results are silently wrong.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        **compat.fusions(),
    }
    return TransformerConfig(**{**settings, **overrides})


def tiny_gpt(config: Any, vocab_size: int = 64, sequence_length: int = 16, tied: bool = False) -> list[torch.nn.Module]:
    """Plain GPTModel chunks of this rank, one for each virtual stage, on the device of this process."""
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel

    virtual = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(virtual) if virtual else [None]:
        spec = compat.trunk_block_spec(config, stage)
        spec.layer_norm = compat.norm_class(config)
        where = {} if stage is None else {"ignore_virtual": False, "vp_stage": stage}
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=vocab_size,
            max_sequence_length=sequence_length,
            pre_process=ps.is_pipeline_first_stage(**where),
            post_process=ps.is_pipeline_last_stage(**where),
            share_embeddings_and_output_weights=tied,
            position_embedding_type="rope",
            vp_stage=stage,
        )
        chunks.append(model.to(compat.device()))
    return chunks


def sharded_tensors(model_chunks: Sequence[torch.nn.Module]) -> Iterator[Any]:
    """Every ShardedTensor of the chunks' sharded state dicts; factories (such as SwiGLU's) are expanded."""
    from megatron.core import parallel_state as ps
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    metadata = {"dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}

    def walk(node: Any) -> Iterator[Any]:
        if isinstance(node, ShardedTensorFactory):
            node = node.build()
        if isinstance(node, ShardedTensor):
            yield node
        elif isinstance(node, dict):
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list | tuple):
            for value in node:
                yield from walk(value)

    for chunk in model_chunks:
        state: Any = chunk.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        yield from walk(state)


def seed_parameters(model_chunks: Sequence[torch.nn.Module], seed: int = 0, std: float = 0.05) -> None:
    """Fill all parameters so that every layout of one model holds the same values.

    Each global tensor is drawn from a generator seeded by `seed` and its checkpoint key; each rank copies its shard.
    Matrices are normal with `std`; norm weights are 1 plus a tenth of that. Call it before wrapping in DDP.
    """
    with torch.no_grad():
        for shard in sharded_tensors(model_chunks):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{shard.key}".encode()))
            full = torch.randn(tuple(shard.global_shape), generator=generator) * std
            if "norm" in shard.key:
                full = 1 + full / 10
            sizes = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
            index = tuple(slice(start, start + size) for start, size in zip(shard.global_offset, sizes, strict=True))
            shard.data.copy_(full[index].reshape(shard.data.shape))


def batches(step: int, microbatches: int, batch: int, sequence: int, vocab_size: int) -> Iterator[torch.Tensor]:
    """This data parallel rank's microbatches, tokens `[batch, sequence + 1]`, of a global batch fixed by the step."""
    from megatron.core import parallel_state as ps

    replicas, replica = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    generator = torch.Generator().manual_seed(1000 + step)
    for index in range(microbatches * replicas):
        tokens = torch.randint(0, vocab_size, (batch, sequence + 1), generator=generator)
        if index % replicas == replica:
            yield tokens.to(compat.device())


class PlainTraining:
    """A plain GPTModel under the current parallel state, trained by megatron-core's own schedule, DDP and optimizer.

    Args:
        microbatches: of each data parallel rank and step, each of `batch` sequences.
        overlap: of gradient reduction (and parameter gathering, if distributed) with the backward, in small buckets.
        edit: called with the model chunks after their weights are set.
        config_overrides: fields of TransformerConfig.
    """

    def __init__(
        self,
        microbatches: int = 4,
        batch: int = 2,
        sequence: int = 16,
        vocab_size: int = 64,
        distributed_optimizer: bool = False,
        overlap: bool = False,
        tied: bool = False,
        learning_rate: float = 1e-2,
        weights_seed: int = 0,
        edit: Callable[[list[torch.nn.Module]], None] | None = None,
        **config_overrides: Any,
    ) -> None:
        self.config = tiny_config(**config_overrides)
        self.microbatches, self.batch, self.sequence, self.vocab_size = microbatches, batch, sequence, vocab_size
        chunks = tiny_gpt(self.config, vocab_size, sequence, tied)
        seed_parameters(chunks, weights_seed)
        if edit is not None:
            edit(chunks)
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        gather = overlap and distributed_optimizer
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=distributed_optimizer,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=gather,
            bucket_size=2000 if overlap else None,
        )
        self.model = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)
        ]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=learning_rate,
                use_distributed_optimizer=distributed_optimizer,
                overlap_param_gather=gather,
                clip_grad=1.0,
            ),
            self.model,
        )
        self.config.finalize_model_grads_func = finalize_model_grads
        self.config.grad_scale_func = self.optimizer.scale_loss
        if overlap:
            self.config.no_sync_func = self._each(lambda chunk: chunk.no_sync)
        if gather:
            self.config.param_sync_func = self._each(lambda chunk: chunk.start_param_sync)

    def _each(self, function: Callable[[Any], Any]) -> Any:
        """Megatron takes one value where there is one chunk, and a list where there are virtual stages."""
        values = [function(chunk) for chunk in self.model]
        return values if len(values) > 1 else values[0]

    def _forward_step(self, iterator: Iterator[torch.Tensor], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        tokens = next(iterator)
        positions = torch.arange(self.sequence, device=tokens.device).expand(self.batch, self.sequence)
        mask = torch.triu(torch.ones(self.sequence, self.sequence, device=tokens.device), 1).bool()[None, None]
        output = chunk(tokens[:, :-1].contiguous(), positions, mask, labels=tokens[:, 1:].contiguous())

        def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = losses.float().mean()
            return loss, {"loss": loss.detach().clone()}  # the schedule divides the first in place

        return output, loss_func

    def step(self, index: int) -> tuple[float, float]:
        """Train on the global batch number `index`; returns its loss and the gradient norm, the same on every rank."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        results = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=self._each(
                lambda _: batches(index, self.microbatches, self.batch, self.sequence, self.vocab_size)
            ),
            model=self._each(lambda chunk: chunk),
            num_microbatches=self.microbatches,
            seq_length=self.sequence,
            micro_batch_size=self.batch,
            forward_only=False,
        )
        _, norm, _ = self.optimizer.step()
        total = torch.zeros(2, device=compat.device())
        for result in results:  # empty but on the last stage, where every tensor parallel rank reports the same loss
            total += torch.stack([result["loss"], torch.ones_like(result["loss"])])
        dist.all_reduce(total)
        return float(total[0] / total[1]), float(norm)

    def _sharded_state(self, loading: bool) -> dict[str, Any]:
        from megatron.core import parallel_state as ps

        metadata = {
            "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True),
            "distrib_optim_sharding_type": "fully_reshardable",
        }
        state: dict[str, Any] = {
            f"model{i}": chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(self.model)
        }
        state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=loading, metadata=metadata)
        return state

    def save(self, folder: str) -> None:
        """Write model and optimizer as a distributed checkpoint."""
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self._sharded_state(loading=False), folder)

    def load(self, folder: str, fully_parallel: bool = False) -> None:
        """Read a distributed checkpoint, of whatever layout, into model and optimizer.

        With `fully_parallel` every data parallel rank reads a part of it and the ranks exchange what they read.
        """
        from megatron.core import dist_checkpointing
        from megatron.core import parallel_state as ps
        from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

        strategy = get_default_load_sharded_strategy(folder)
        if fully_parallel:
            group = ps.get_data_parallel_group(with_context_parallel=True)
            strategy = FullyParallelLoadStrategyWrapper(strategy, group)
        state = dist_checkpointing.load(self._sharded_state(loading=True), folder, strategy)
        for i, chunk in enumerate(self.model):
            chunk.module.load_state_dict(state[f"model{i}"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_plain_gpt(steps: int = 3, **settings: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the first steps of `PlainTraining(**settings)`."""
    training = PlainTraining(**settings)
    losses, norms = zip(*(training.step(index) for index in range(steps)), strict=True)
    return list(losses), list(norms)
