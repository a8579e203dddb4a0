"""One training step of any layout, gathered into whole tensors, beside the same step of `reference.py`."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from mtp_megatron.config import HeadsConfig
from mtp_megatron.documents import document_mask
from mtp_megatron.layout import StageLayout, heads_are_spread, stage_layouts, trunk_layout
from mtp_megatron.reference import ReferenceConfig, parameter_shapes, reference_loss
from mtp_megatron.targets import context_shard, document_ends_from_tokens, future_targets
from mtp_megatron.training.batches import packed_documents
from mtp_megatron.training.head_stages import HeadStages, embedding_ranks
from tests.harness import parallel, run_world
from tests.models import sharded_tensors, tiny_config

EOD = 0
EXPERT_WIDTH = 48  # of an expert's MLP; a head's is 64
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A layout, a model and its data. `world` must be a multiple of tp * pp * cp; the rest is data parallel.

    `ep` of a stage's ranks share the trunk's `experts`.
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    cp: int = 1
    ep: int = 1
    experts: int | None = None
    top_k: int = 2
    aux_loss: float = 0.0
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float32
    heads: dict[str, Any] = field(default_factory=lambda: {"n": 3})
    num_trunk_layers: int = 4
    vocab_size: int = 61
    padded_vocab_size: int = 64
    sequence: int = 12
    batch: int = 2
    microbatches: int = 4  # of the global batch
    tied: bool = False
    distributed_optimizer: bool = False
    overlap: bool = False
    per_token_loss: bool = True
    layout: str | None = None
    pattern: str | None = None  # of a HybridModel in place of a GPTModel
    engine: bool = False  # layers of Transformer Engine
    within_documents: bool = False  # attention does not leave them
    loss_scale: float = 1.0
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether the layers are told of documents by their boundaries, in one row: those that ignore a mask are."""
        return self.within_documents and self.engine

    @property
    def heads_config(self) -> HeadsConfig:
        return HeadsConfig(**self.heads)

    def reference_config(self) -> ReferenceConfig:
        return ReferenceConfig(
            num_trunk_layers=self.num_trunk_layers,
            hidden_size=32,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=64,
            vocab_size=self.vocab_size,
            heads=self.heads_config,
            tied_embeddings=self.tied,
            num_experts=self.experts,
            moe_top_k=self.top_k,
            moe_ffn_hidden_size=EXPERT_WIDTH,
            moe_aux_loss=self.aux_loss,
        )

    def stages(self) -> tuple[StageLayout, ...]:
        return stage_layouts(
            self.layout,
            ranks=self.pp,
            chunks=self.vp or 1,
            trunk_layers=self.num_trunk_layers,
            heads=self.heads_config.n,
        )

    def parallel(self) -> AbstractContextManager[None]:
        """This layout's model parallel groups."""
        more = embedding_ranks(self.stages(), tied=self.tied)
        return parallel(self.tp, self.pp, self.vp, self.cp, self.ep, **({"get_embedding_ranks": more} if more else {}))

    def expert_settings(self) -> dict[str, Any]:
        """Fields of TransformerConfig, as `training.build` sets them."""
        if self.experts is None:
            return {}
        from mtp_megatron import compat

        return {
            "num_moe_experts": self.experts,
            "moe_router_topk": self.top_k,
            "moe_router_pre_softmax": self.top_k == 1,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": compat.aux_loss_coefficient(self.aux_loss, tensor=self.tp, context=self.cp),
            "moe_ffn_hidden_size": EXPERT_WIDTH,
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": 1,
            "moe_grouped_gemm": self.engine,
        }


@dataclass
class Step:
    """Result of one step: per-head sums over the global batch and whole tensors by reference name."""

    loss_sum: torch.Tensor
    correct: torch.Tensor
    tokens: torch.Tensor
    normalizer: int
    gradients: dict[str, torch.Tensor]
    log_z_squared: torch.Tensor | None = None


def make_parameters(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    """Whole tensors by reference name: matrices normal (std 0.1), norm weights around 1."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in sorted(parameter_shapes(case.reference_config()).items()):
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
        parameters[name] = (1 + values if name.endswith("norm.weight") else values).to(case.dtype)
    return parameters


Batch = tuple[torch.Tensor, torch.Tensor]


def make_batches(case: Case, parameters: dict[str, torch.Tensor]) -> list[Batch]:
    """`(tokens [b, s], targets [n, b, s])` of the global batch's microbatches.

    Documents end here and there, some labels are ignored, one microbatch has hardly any target and one none: so
    data-parallel ranks count different tokens. Some targets are what the oracle predicts, or no count of correct
    predictions would say anything.
    """
    wide = {name: tensor.double() for name, tensor in parameters.items()}
    generator = torch.Generator().manual_seed(42)
    made = []
    for index in range(case.microbatches):
        tokens = torch.randint(0, case.vocab_size, (case.batch, case.sequence + 1), generator=generator)
        tokens[torch.rand(tokens.shape, generator=generator) < 0.08] = EOD
        labels = tokens[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = -100
        if index == 1:
            labels[:, 2:] = -100
        if index == 2:
            labels[:] = -100
        inputs = tokens[:, :-1].contiguous()
        ends = document_ends_from_tokens(inputs, EOD)
        targets = future_targets(labels, case.heads_config.n, document_ends=ends)
        predicted = reference_loss(wide, case.reference_config(), inputs, targets).logits.argmax(-1)
        known = (targets != -100) & (torch.rand(targets.shape, generator=generator) < 0.3)
        made.append((inputs, torch.where(known, predicted, targets)))
    return made


def reference_step(case: Case, parameters: dict[str, torch.Tensor], batches: list[Batch] | None = None) -> Step:
    """The whole global batch by the oracle, gradients divided by the global count of head 1's valid targets.

    Where attention stays within documents, the oracle takes each of them by itself.
    """
    batches = batches or make_batches(case, parameters)
    if case.within_documents:
        batches = documents_alone(batches)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
    results = [reference_loss(leaves, case.reference_config(), *batch) for batch in batches]
    normalizer = int(sum(result.tokens[0] for result in results))
    active = torch.tensor(case.heads_config.base_weights()) != 0
    total = torch.stack([result.total for result in results]).sum()
    (total * float(torch.tensor(1.0) / normalizer)).backward()  # Megatron multiplies with an fp32 reciprocal
    gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}
    return Step(
        loss_sum=torch.stack([result.loss_sum for result in results]).sum(0) * active,
        correct=torch.stack([result.correct for result in results]).sum(0) * active,
        tokens=torch.stack([result.tokens for result in results]).sum(0) * active,
        normalizer=normalizer,
        gradients=gradients,
        log_z_squared=torch.stack([result.log_z_squared for result in results]).sum(0) * active
        if case.heads_config.z_loss
        else None,
    )


def documents_alone(batches: list[Batch], eod: int = EOD) -> list[Batch]:
    """Every document of every sequence as a batch of its own, from its first position on."""
    alone = []
    for tokens, targets in batches:
        for row in range(tokens.shape[0]):
            ends = (tokens[row] == eod).nonzero().flatten().add(1).tolist()
            bounds = sorted({0, *ends, tokens.shape[1]})
            for first, end in itertools.pairwise(bounds):
                alone.append((tokens[row : row + 1, first:end], targets[:, row : row + 1, first:end]))
    return alone


def megatron_step(
    case: Case,
    parameters: dict[str, torch.Tensor],
    mutate: Callable | None = None,
    idle_heads_are_checked: bool = True,
) -> Step:
    """One forward and backward pass of Megatron's schedule in `case`'s layout, finalised and gathered.

    `mutate(chunks)` runs in each rank before the step: controls use it to break something.
    """
    batches = make_batches(case, parameters)
    return assemble(case, run_world(step_body, case.world, case, parameters, batches, mutate), idle_heads_are_checked)


def assemble(case: Case, ranks: list[dict[str, Any]], idle_heads_are_checked: bool = True) -> Step:
    """Put the ranks' shards together."""
    gradients: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, shape, index, value in rank["gradients"]:
            whole = gradients.setdefault(name, torch.full(shape, torch.nan, dtype=value.dtype))
            whole[index] = value
    last = [rank["sums"] for rank in ranks if rank["sums"] is not None]
    sums = torch.stack(last).sum(0) / case.tp  # every TP rank of the last stage reports the same
    idle = torch.tensor(case.heads_config.base_weights()) == 0
    assert sums[:2, idle].isnan().all() or not idle_heads_are_checked, "a head of weight 0 was computed"
    sums[:, idle] = 0
    return Step(
        loss_sum=sums[0],
        correct=sums[1].nan_to_num(-1).round().long(),
        tokens=sums[2].round().long(),
        normalizer=int(sums[2][0].round()),
        gradients=gradients,
        log_z_squared=sums[3] if len(sums) > 3 else None,
    )


def build_chunks(case: Case, parameters: dict[str, torch.Tensor]) -> tuple[Any, list[torch.nn.Module]]:
    """TransformerConfig and this rank's model chunks with their shards of `parameters`."""
    from megatron.core import parallel_state as ps

    from mtp_megatron import compat
    from mtp_megatron.model import build_model

    settings: dict[str, Any] = {
        "num_layers": case.num_trunk_layers * (2 if case.pattern else 1),  # attention and MLP are a layer each there
        "sequence_parallel": case.sequence_parallel,
        "params_dtype": case.dtype,
        "pipeline_dtype": case.dtype,
        "autocast_dtype": case.dtype,
        "bf16": case.dtype == torch.bfloat16,
        "fp16": case.dtype == torch.float16,
        "attention_softmax_in_fp32": case.dtype != torch.float64,
        "calculate_per_token_loss": case.per_token_loss,
        **({"pipeline_model_parallel_layout": trunk_layout(case.layout)} if case.layout else {}),
        **case.expert_settings(),
        **case.config,
    }
    config = tiny_config(**settings)
    chunks = []
    mine = case.stages()[ps.get_pipeline_model_parallel_rank() :: case.pp]
    for stage in range(case.vp) if case.vp else [None]:
        where = {} if stage is None else {"ignore_virtual": False, "vp_stage": stage}
        build: Callable[..., Any] = build_model
        if case.pattern is not None:
            from mtp_megatron.hybrid import build_hybrid_model

            build = functools.partial(build_hybrid_model, pattern=case.pattern)
        elif heads_are_spread(case.stages()):
            build = functools.partial(build_model, owned_heads=mine[stage or 0].heads)
        model = build(
            config,
            case.heads_config,
            vocab_size=case.vocab_size,
            padded_vocab_size=case.padded_vocab_size,
            max_sequence_length=case.sequence,
            pre_process=ps.is_pipeline_first_stage(**where),
            post_process=ps.is_pipeline_last_stage(**where),
            tied_embeddings=case.tied,
            vp_stage=stage,
            **({"transformer_engine": True} if case.engine else {}),
        )
        chunks.append(model.to(compat.device()).to(case.dtype))
    fill(chunks, parameters)
    return config, chunks


def fill(chunks: Sequence[torch.nn.Module], parameters: dict[str, torch.Tensor]) -> None:
    """Copy whole tensors into this rank's shards; every shard must have a source. Vocabulary padding becomes noise."""
    with torch.no_grad():
        for name, index, shard in named_shards(chunks):
            source = parameters[name]
            if "vocab" in name or source.shape[0] != shard.whole_shape[0]:
                padded = torch.full(shard.whole_shape, 3.0, dtype=source.dtype)  # must not take part in anything
                padded[: source.shape[0]] = source
                source = padded
            shard.data.copy_(source[index].reshape(shard.data.shape))


@dataclass
class Shard:
    data: torch.Tensor
    whole_shape: tuple[int, ...]


def named_shards(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, tuple[slice, ...], Shard]]:
    """Reference name, place in the whole tensor, and data of every parameter shard of this rank."""
    hybrid = hasattr(chunks[0], "hybrid_layer_pattern")
    for tensor in sharded_tensors(chunks):
        offsets, sizes = list(tensor.global_offset), list(tensor.local_shape)
        shape = list(tensor.global_shape)
        name = reference_name(tensor.key)
        if hybrid:
            name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda number: str(int(number[0]) // 2), name)
        # Axes in front of the tensor's own: its layer, if layers are alike, then its expert.
        stacked = [axis for axis in ("decoder.layers.", "mlp.experts.") if re.search(rf"{re.escape(axis)}(?!\d)", name)]
        for axis in stacked[: tensor.prepend_axis_num]:
            name = name.replace(axis, f"{axis}{offsets.pop(0)}.")
            shape.pop(0)
        index = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
        yield name, index, Shard(tensor.data, tuple(shape))


def reference_name(key: str) -> str:
    """Checkpoint key -> name of the reference's parameter (norms are stored under Transformer Engine's names)."""
    key = key.replace("mlp.experts.experts.", "mlp.experts.")
    key = re.sub(r"self_attention\.linear_qkv\.layer_norm_weight$", "input_layernorm.weight", key)
    return re.sub(r"mlp\.linear_fc1\.layer_norm_weight$", "pre_mlp_layernorm.weight", key)


def forward_step(case: Case, sink: list, iterator: Iterator, chunk: torch.nn.Module) -> tuple[Any, Callable]:
    from megatron.core import parallel_state as ps

    from mtp_megatron import compat

    tokens, targets = next(iterator)
    device, rank = compat.device(), ps.get_context_parallel_rank()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    told: dict[str, Any] = {"attention_mask": None}
    if case.packed:
        told["packed_seq_params"] = packed_documents(tokens, EOD)
        tokens, positions, targets = (t.reshape(*t.shape[:-2], 1, -1) for t in (tokens, positions, targets))
    elif case.within_documents:
        told["attention_mask"] = document_mask(document_ends_from_tokens(tokens, EOD), case.cp, rank).to(device)
    tokens, positions, targets = (context_shard(t, case.cp, rank).to(device) for t in (tokens, positions, targets))
    output = chunk(tokens, positions, labels=targets, **told)

    def loss_func(output: tuple) -> tuple:
        loss, report = output
        sink.append(report)
        return loss.clone(), report.normalizer.clone().to(torch.int), {"report": report}

    return output, loss_func


def step_body(
    rank: int, world: int, case: Case, parameters: dict, batches: list[Batch], mutate: Callable | None
) -> dict[str, Any]:
    with case.parallel():
        from megatron.core import parallel_state as ps

        config, chunks = build_chunks(case, parameters)
        model = wrap(case, config, chunks)
        head_stages = finalize_with_heads(case, config, chunks)
        if case.loss_scale != 1.0:
            config.grad_scale_func = lambda loss: loss * case.loss_scale
        if mutate is not None:
            mutate(chunks)
        reports: list = []
        run_schedule(case, config, model, batches, reports)
        reports += head_stages.take_reports() if head_stages else []
        sums = None
        if reports:
            names = ["loss_sum", "correct", "tokens", *(["log_z_squared"] if case.heads_config.z_loss else [])]
            sums = torch.stack([sum(getattr(report, name).double() for report in reports) for name in names]).cpu()
        for chunk in chunks:
            for parameter in chunk.parameters():
                frozen = not parameter.requires_grad
                gradient = torch.full_like(parameter, torch.nan) if frozen else parameter.main_grad / case.loss_scale
                parameter.data = gradient  # so that Megatron's own sharding describes the gradients
        gathered = [
            (name, shard.whole_shape, index, shard.data.detach().cpu().clone())
            for name, index, shard in named_shards(chunks)
        ]
        assert ps.model_parallel_is_initialized()
        return {"sums": sums, "gradients": gathered}


def finalize_with_heads(case: Case, config: Any, chunks: Sequence[Any]) -> HeadStages | None:
    """Set `config.finalize_model_grads_func` as training does; returns what stages with heads share, if several do."""
    from megatron.core.distributed import finalize_model_grads

    head_stages = HeadStages.join(case.stages(), chunks, tied=case.tied, timeout=None)
    finalize = head_stages.finalize_with(finalize_model_grads) if head_stages else finalize_model_grads
    config.finalize_model_grads_func = finalize
    return head_stages


def wrap(case: Case, config: Any, chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """DDP around every chunk, with the no-sync hooks that Megatron's schedules want under overlap."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=case.distributed_optimizer,
        grad_reduce_in_fp32=case.dtype != torch.float64,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap and case.distributed_optimizer,
        bucket_size=2000 if case.overlap else None,
    )
    inner = [Float16Module(config, chunk) if case.dtype in HALF else chunk for chunk in chunks]
    model = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(inner)]
    if case.overlap:
        config.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
    return model


def run_schedule(
    case: Case, config: Any, model: list, batches: list[Batch], reports: list, forward_only: bool = False
) -> list:
    """This rank's share of the global batch through the schedule; `reports` gets every microbatch's report."""
    from megatron.core import parallel_state as ps
    from megatron.core.pipeline_parallel import get_forward_backward_func

    replicas, replica = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    mine = [batch for index, batch in enumerate(batches) if index % replicas == replica]
    for chunk in model:
        chunk.zero_grad_buffer()
    iterators = [iter(mine) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=functools.partial(forward_step, case, reports),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(mine),
        seq_length=case.sequence * (case.batch if case.packed else 1),
        micro_batch_size=1 if case.packed else case.batch,
        forward_only=forward_only,
    )


def assert_same_step(got: Step, want: Step, tolerance: float) -> None:
    """Sums and every gradient tensor agree, relative to the tensor's largest entry; counts agree exactly."""
    assert got.tokens.tolist() == want.tokens.tolist()
    assert got.correct.tolist() == want.correct.tolist()
    assert got.normalizer == want.normalizer
    torch.testing.assert_close(got.loss_sum.double(), want.loss_sum.double(), rtol=tolerance, atol=0)
    assert (got.log_z_squared is None) == (want.log_z_squared is None)
    if got.log_z_squared is not None and want.log_z_squared is not None:
        torch.testing.assert_close(got.log_z_squared, want.log_z_squared.double(), rtol=tolerance, atol=0)
    problems = gradient_problems(got, want, tolerance)
    assert not problems, "\n".join(problems)


def gradient_problems(got: Step, want: Step, tolerance: float) -> list[str]:
    """A line for each gradient that is missing, lies on vocabulary padding, or is further off than `tolerance`."""
    missing = sorted(set(want.gradients) ^ set(got.gradients))
    problems = [f"{name}: only on one side" for name in missing]
    for name, right in want.gradients.items():
        if name in missing:
            continue
        whole = got.gradients[name].double()
        if whole.shape != right.shape:
            if whole[right.shape[0] :].abs().max() != 0:
                problems.append(f"{name}: vocabulary padding has a gradient")
            whole = whole[: right.shape[0]]
        scale = right.abs().max().double().clamp_min(1e-30)
        error = float((whole - right.double()).abs().max() / scale)
        if not error <= tolerance:  # NaN must fail
            problems.append(f"{name}: off by {error:.2e} of its largest entry {float(scale):.2e}")
    return problems
