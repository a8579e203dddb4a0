"""The slow, obvious oracle: the whole model on one device in plain torch, gradients by plain autograd.

It shares no code with the fast path beyond the configuration: no Megatron, no chunks, no fused loss. Every layout is
held against it. Parameters go by Megatron's names without sharding, see :func:`parameter_shapes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_megatron.config import HeadsConfig


@dataclass(frozen=True)
class ReferenceConfig:
    """A Llama-like trunk (RMSNorm, rotary embedding, grouped-query attention, SwiGLU, no biases) with future-token
    heads.

    Attributes:
        num_trunk_layers: layers of the trunk, heads not counted.
        ffn_hidden_size: width between the MLP's two matrices.
        norm_epsilon: added to the mean square.
        num_experts: MLPs of each trunk layer, of which every token goes through ``moe_top_k``; None: one MLP. Heads
            have one MLP always.
        moe_aux_loss: weight of the trunk's load-balancing loss, per token of the microbatch.
    """

    num_trunk_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    heads: HeadsConfig
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    tied_embeddings: bool = False
    num_experts: int | None = None
    moe_top_k: int = 2
    moe_ffn_hidden_size: int = 0
    moe_aux_loss: float = 0.0

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ReferenceResult:
    """What the oracle found. ``total`` ``[]`` carries the graph; the rest is detached.

    Attributes:
        total: weighted sum over heads of the loss sums (not divided by a token count) and their weighted z-losses, with
            experts also the weighted load-balancing loss times the number of tokens.
        loss_sum: ``[n]``. correct: ``[n]`` int64. tokens: ``[n]`` int64 valid targets.
        logits: ``[n, b, s, V]``. log_z_squared: ``[n]`` sum over valid targets of the z-loss without its weight.
    """

    total: Tensor
    loss_sum: Tensor
    correct: Tensor
    tokens: Tensor
    logits: Tensor
    log_z_squared: Tensor


def parameter_shapes(config: ReferenceConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, as Megatron's modules hold them on one device without vocabulary padding."""
    h, f, v = config.hidden_size, config.ffn_hidden_size, config.vocab_size
    qkv = config.head_size * (config.num_attention_heads + 2 * config.num_query_groups)
    layer = {
        "input_layernorm.weight": (h,),
        "self_attention.linear_qkv.weight": (qkv, h),
        "self_attention.linear_proj.weight": (h, h),
        "pre_mlp_layernorm.weight": (h,),
        "mlp.linear_fc1.weight": (2 * f, h),
        "mlp.linear_fc2.weight": (h, f),
    }
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (v, h), "final_norm.weight": (h,)}
    for index in range(config.num_trunk_layers):
        trunk_layer = {name: shape for name, shape in layer.items() if config.num_experts is None or "fc" not in name}
        if config.num_experts is not None:
            trunk_layer["mlp.router.weight"] = (config.num_experts, h)
        for expert in range(config.num_experts or 0):
            trunk_layer[f"mlp.experts.{expert}.linear_fc1.weight"] = (2 * config.moe_ffn_hidden_size, h)
            trunk_layer[f"mlp.experts.{expert}.linear_fc2.weight"] = (h, config.moe_ffn_hidden_size)
        shapes.update({f"decoder.layers.{index}.{name}": shape for name, shape in trunk_layer.items()})
    for index in range(config.heads.n):
        if config.heads.kind == "transformer":
            shapes.update({f"heads.{index}.{name}": shape for name, shape in layer.items()})
        elif index > 0:
            shapes[f"heads.{index}.linear.weight"] = (h, h)
            if config.heads.kind == "medusa":
                shapes[f"heads.{index}.linear.bias"] = (h,)
        if config.heads.unembedding == "replicated" and index > 0:
            shapes[f"unembedding_heads.{index - 1}.weight"] = (v, h)
    if not config.tied_embeddings:
        shapes["output_layer.weight"] = (v, h)
    return shapes


def reference_loss(
    parameters: Mapping[str, Tensor], config: ReferenceConfig, tokens: Tensor, targets: Tensor
) -> ReferenceResult:
    """Loss of every head (Gloeckle et al. 2024, equation 2), in the parameters' own precision.

    Args:
        tokens: ``[b, s]``. targets: ``[n, b, s]``, -100 where there is none.
    """
    balance: list[Tensor] = []
    z = trunk(parameters, config, tokens, balance)
    outputs = head_outputs(parameters, config, z)
    logits = torch.stack([unembed(parameters, config, head, output) for head, output in enumerate(outputs)])
    losses = torch.stack(
        [
            F.cross_entropy(logits[head].flatten(0, 1), targets[head].flatten(), ignore_index=-100, reduction="sum")
            for head in range(config.heads.n)
        ]
    )
    weights = torch.tensor(config.heads.base_weights(), dtype=losses.dtype, device=losses.device)
    valid = targets != -100
    log_z_squared = (logits.logsumexp(-1).square() * valid).sum(dim=(1, 2))
    balancing = sum(balance, torch.zeros((), dtype=losses.dtype)) * config.moe_aux_loss * tokens.numel()
    return ReferenceResult(
        total=(weights * (losses + config.heads.z_loss * log_z_squared)).sum() + balancing,
        loss_sum=losses.detach(),
        correct=((logits.argmax(-1) == targets) & valid).sum(dim=(1, 2)),
        tokens=valid.sum(dim=(1, 2)),
        logits=logits.detach(),
        log_z_squared=log_z_squared.detach(),
    )


def trunk(
    parameters: Mapping[str, Tensor], config: ReferenceConfig, tokens: Tensor, balance: list[Tensor] | None = None
) -> Tensor:
    """``[b, s]`` tokens -> z ``[b, s, h]``, without a final norm; ``balance`` takes each layer's load balancing."""
    x = F.embedding(tokens, parameters["embedding.word_embeddings.weight"])
    for index in range(config.num_trunk_layers):
        x = transformer_layer(parameters, config, f"decoder.layers.{index}.", x, balance)
    return x


def head_outputs(parameters: Mapping[str, Tensor], config: ReferenceConfig, z: Tensor) -> list[Tensor]:
    """Output ``[b, s, h]`` of every head's layer, before the final norm."""
    n, arrangement = config.heads.n, config.heads.arrangement
    if config.heads.kind != "transformer":
        return [z] * n
    outputs: dict[int, Tensor] = {}
    for head in range(n - 1, -1, -1) if arrangement == "anticausal" else range(n):
        if arrangement == "causal" and head > 0:
            read = outputs[head - 1]
        elif arrangement == "anticausal" and head < n - 1:
            read = outputs[head + 1]
        else:
            read = z
        outputs[head] = transformer_layer(parameters, config, f"heads.{head}.", read)
    return [outputs[head] for head in range(n)]


def unembed(parameters: Mapping[str, Tensor], config: ReferenceConfig, head: int, output: Tensor) -> Tensor:
    """``[b, s, h]`` of one head -> logits ``[b, s, V]``."""
    x = rms_norm(output, parameters["final_norm.weight"], config.norm_epsilon)
    if config.heads.kind != "transformer" and head > 0:
        mapped = F.linear(x, parameters[f"heads.{head}.linear.weight"], parameters.get(f"heads.{head}.linear.bias"))
        x = x + F.silu(mapped) if config.heads.kind == "medusa" else mapped
    if config.heads.unembedding == "replicated" and head > 0:
        return x @ parameters[f"unembedding_heads.{head - 1}.weight"].T
    name = "embedding.word_embeddings.weight" if config.tied_embeddings else "output_layer.weight"
    return x @ parameters[name].T


def transformer_layer(
    parameters: Mapping[str, Tensor],
    config: ReferenceConfig,
    prefix: str,
    x: Tensor,
    balance: list[Tensor] | None = None,
) -> Tensor:
    """Pre-norm transformer layer, ``[b, s, h]`` -> ``[b, s, h]``."""
    normed = rms_norm(x, parameters[f"{prefix}input_layernorm.weight"], config.norm_epsilon)
    x = x + attention(parameters, config, f"{prefix}self_attention.", normed)
    normed = rms_norm(x, parameters[f"{prefix}pre_mlp_layernorm.weight"], config.norm_epsilon)
    if f"{prefix}mlp.router.weight" in parameters:
        mixed, loss = experts(parameters, config, f"{prefix}mlp.", normed)
        if balance is not None:
            balance.append(loss)
        return x + mixed
    return x + swiglu(parameters, f"{prefix}mlp.", normed)


def swiglu(parameters: Mapping[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    gate, up = (x @ parameters[f"{prefix}linear_fc1.weight"].T).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ parameters[f"{prefix}linear_fc2.weight"].T


def experts(parameters: Mapping[str, Tensor], config: ReferenceConfig, prefix: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mixture of experts ``[b, s, h]`` -> ``[b, s, h]``, and its load-balancing loss ``[]`` (arXiv 2101.03961, eq. 4).

    Every expert sees every token; the weight of those that a token was not sent to is 0.
    """
    logits = x @ parameters[f"{prefix}router.weight"].T
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(config.moe_top_k).indices, 1.0)
    # Over the chosen ones; a single one keeps its probability, or the router would learn nothing.
    several = config.moe_top_k > 1
    weights = logits.masked_fill(chosen == 0, -torch.inf).softmax(-1) if several else probabilities * chosen
    outputs = [swiglu(parameters, f"{prefix}experts.{expert}.", x) for expert in range(logits.shape[-1])]
    mixed = sum((weights[..., e, None] * output for e, output in enumerate(outputs)), torch.zeros_like(x))
    share = chosen.mean((0, 1)) / config.moe_top_k
    return mixed, logits.shape[-1] * (share * probabilities.mean((0, 1))).sum()


def attention(parameters: Mapping[str, Tensor], config: ReferenceConfig, prefix: str, x: Tensor) -> Tensor:
    """Causal grouped-query attention. Rows of ``linear_qkv`` go group by group: its queries, its key, its value."""
    batch, length, _ = x.shape
    groups, size = config.num_query_groups, config.head_size
    per_group = config.num_attention_heads // groups
    qkv = (x @ parameters[f"{prefix}linear_qkv.weight"].T).view(batch, length, groups, per_group + 2, size)
    q = rotate(qkv[..., :per_group, :].flatten(2, 3), config.rotary_base)
    k = rotate(qkv[..., per_group, :], config.rotary_base).repeat_interleave(per_group, dim=2)
    v = qkv[..., per_group + 1, :].repeat_interleave(per_group, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / size**0.5
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    return mixed @ parameters[f"{prefix}linear_proj.weight"].T


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864), halves rotated against each other; ``[b, s, heads, size]``.

    Angles are computed in fp32, as Megatron and Hugging Face do, and only then widened.
    """
    size = x.shape[-1]
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device=x.device) / size)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float32, device=x.device), frequencies)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight
