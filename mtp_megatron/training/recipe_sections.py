"""The sections of a training recipe (:mod:`mtp_megatron.training.recipe`): every setting with its type, default and
meaning. Those of the heads are :mod:`mtp_megatron.config`.

The models are frozen and refuse unknown keys. Nothing here imports torch or megatron, so that a recipe can be checked
and described on any machine.
"""

from __future__ import annotations

import math
import os
import sys
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mtp_megatron.data.batch_sizes import BatchSizes
from mtp_megatron.errors import ConfigError

MIN_LR_FRACTION = 0.03  # cosine to 0.03 of the peak: Gloeckle et al. 2024, appendix on hyperparameters


class Section(BaseModel):
    """Base of the recipe's sections: immutable, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        """Python's integers have no end; what counts with them in torch and megatron-core has."""
        if isinstance(value, int) and abs(value) > sys.maxsize:
            raise ValueError(f"must be at most {sys.maxsize}")
        return value


def _at_home(value: Any) -> Any:
    """The paths in it with a leading ``~`` as the home folder: behind ``key=`` no shell reads it so."""
    if isinstance(value, list):
        return [_at_home(part) for part in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


class ModelSection(Section):
    """The trunk: a Llama-style decoder (RMSNorm, SwiGLU, rotary positions), with what Mistral and Qwen have besides."""

    num_trunk_layers: int = Field(
        default=4, ge=1, description="transformer layers of the shared trunk; each head adds one more"
    )
    hidden_size: int = Field(default=256, ge=1, description="width of the residual stream")
    num_attention_heads: int = Field(default=8, ge=1, description="query heads of each attention")
    num_query_groups: int | None = Field(
        default=None, ge=1, description="key/value heads; null: as many as query heads"
    )
    ffn_hidden_size: int | None = Field(
        default=None,
        ge=1,
        description="width of SwiGLU's projections; null: 8/3 of hidden_size, rounded up to a multiple of 64",
    )
    seq_length: int = Field(default=256, ge=2, description="the context: the most positions that the model may see")
    vocab_size: int | None = Field(default=None, ge=2, description="number of token ids; null: the tokenizer's")
    vocab_padding: int = Field(
        default=128,
        ge=1,
        description="pad the vocabulary to a multiple of this, in every layout, so that checkpoints reshard",
    )
    rotary_base: int = Field(default=10000, ge=1, description="base of the rotary position frequencies")
    norm_epsilon: float = Field(default=1e-5, gt=0, description="added to the mean square inside RMSNorm")
    tied_embeddings: bool = Field(default=False, description="use the input embedding as the unembedding")
    head_size: int | None = Field(
        default=None, ge=2, description="channels of one attention head; null: hidden_size / num_attention_heads"
    )
    qkv_bias: bool = Field(default=False, description="queries, keys and values have a bias (Qwen2)")
    qk_norm: bool = Field(default=False, description="normalise each query and key over its channels (Qwen3)")
    rope_scaling: Literal["linear", "llama3"] | None = Field(
        default=None, description="how rotary frequencies are lowered for a longer context; null: they are not"
    )
    rope_scaling_factor: float = Field(default=8.0, ge=1, description="by how much low frequencies are lowered")
    rope_low_freq_factor: float = Field(
        default=1.0, gt=0, description="llama3: fewer turns than this in rope_original_context are lowered in full"
    )
    rope_high_freq_factor: float = Field(
        default=4.0, gt=0, description="llama3: more turns than this in rope_original_context are not lowered"
    )
    rope_original_context: int = Field(default=8192, ge=1, description="llama3: positions before the scaling")
    num_experts: int | None = Field(
        default=None, ge=2, description="experts of each trunk layer (mixture of experts); null: dense; heads are dense"
    )
    moe_top_k: int = Field(default=2, ge=1, description="experts that each token is sent to")
    moe_ffn_hidden_size: int | None = Field(
        default=None, ge=1, description="width of an expert's SwiGLU; null: ffn_hidden_size, the heads' width"
    )
    moe_aux_loss: float = Field(
        default=0.01, ge=0, description="weight of the routers' load-balancing loss beside the heads' loss; 0: none"
    )
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on each residual branch")
    attention_dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout on attention probabilities")
    init_method_std: float = Field(default=0.02, gt=0, description="standard deviation of initial weights")

    @property
    def attention_head_size(self) -> int:
        """Channels of one attention head, ``d``."""
        return self.head_size or self.hidden_size // self.num_attention_heads


class ParallelSection(Section):
    """How one copy of the model is cut; data parallelism takes what is left of the world."""

    tensor: int = Field(default=1, ge=1, description="tensor parallel size (TP)")
    pipeline: int = Field(
        default=1, ge=1, description="pipeline stages (PP); heads are on the last one, or where layout says"
    )
    virtual_pipeline: int | None = Field(
        default=None, ge=2, description="model chunks per pipeline rank (interleaved 1F1B); null: one"
    )
    context: int = Field(
        default=1, ge=1, description="context parallel size (CP): each rank holds a share of every sequence"
    )
    expert: int = Field(
        default=1, ge=1, description="expert parallel size (EP): ranks of a stage that share model.num_experts"
    )
    sequence_parallel: bool = Field(
        default=False, description="shard norms and residuals along the sequence; needs tensor > 1"
    )
    tp_comm_overlap: bool = Field(
        default=False,
        description="hide the trunk's tensor parallel communication behind its multiplications (Transformer Engine)",
    )
    layout: str | None = Field(
        default=None,
        description="layers by stage: E embedding, t trunk layer, m head, L loss: 'Etttmm|tmmL'; null: even; "
        "without m: all heads on the last stage",
    )


class DataSection(Section):
    """A folder written by ``mtp-megatron preprocess``, or several of them blended by weight."""

    path: str | None = Field(
        default="data", min_length=1, description="folder with train.bin, valid.bin and dataset.json; null with blend"
    )
    blend: list[list[float | str] | str] | None = Field(
        default=None,
        description="in place of path: [weight, folder] pairs, drawn in proportion to the weights; or folders "
        "alone, drawn in proportion to their training tokens",
    )
    cache: str | None = Field(
        default=None,
        min_length=1,
        description="folder for the index of samples, shared by the hosts or not; null: cache inside each data folder",
    )
    seed: int = Field(default=1234, ge=0, description="seed of the order in which samples are drawn")
    reset_attention_mask: bool = Field(
        default=False,
        description="no token attends to another document of its sequence (intra-document masking), in trunk and heads",
    )
    workers: int = Field(default=0, ge=0, description="loader processes per rank; 0: load in the training process")

    _home = field_validator("path", "blend", "cache")(_at_home)

    @model_validator(mode="before")
    @classmethod
    def _one_of_them(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        blend = values.get("blend")
        if blend is not None and values.get("path") is not None:
            raise ConfigError(
                "data.blend",
                blend,
                f"data.path={values['path']!r} is set, too",
                "Set data.path=null to train on the blend, or data.blend=null to train on that folder.",
            )
        if blend is None and "path" in values and values["path"] is None:
            raise ConfigError(
                "data.path", None, "no folder is given, and no data.blend", "Set data.path to a str: the data's folder."
            )
        return {**values, "path": None} if blend is not None else values

    @field_validator("blend", mode="before")
    @classmethod
    def _pairs(cls, blend: Any) -> Any:
        if blend is None:
            return None
        remedy = "Write [weight, folder] pairs, for example [[0.7, data/web], [0.3, data/code]], or folders alone."
        if not isinstance(blend, list) or not blend:
            raise ConfigError("data.blend", blend, "it is no list of folders", remedy)
        if not all(_is_folder(item) for item in blend):
            for item in blend:
                if not (isinstance(item, list) and len(item) == 2 and _is_weight(item[0]) and _is_folder(item[1])):
                    raise ConfigError("data.blend", blend, f"{item!r} is no weight above 0 with its folder", remedy)
        folders = [item if isinstance(item, str) else item[1] for item in blend]
        for folder in folders:
            if folders.count(folder) > 1:
                raise ConfigError("data.blend", blend, f"it has {folder} twice", "Give it once, with a larger weight.")
        return blend

    @property
    def parts(self) -> tuple[tuple[float | None, str], ...]:
        """``(weight, folder)`` of every folder to be read; weights are None where sizes decide."""
        if self.blend is None:
            return ((None, str(self.path)),)
        pairs = [(None, item) if isinstance(item, str) else (float(item[0]), str(item[1])) for item in self.blend]
        return tuple(pairs)

    @property
    def named(self) -> tuple[str, Any]:
        """Name and value of the setting that says what is read, for messages."""
        return ("data.path", self.path) if self.blend is None else ("data.blend", self.blend)

    @property
    def setting(self) -> str:
        """The same as one text."""
        field, value = self.named
        return f"{field}={value}"


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_folder(value: Any) -> bool:
    return isinstance(value, str) and value != ""


class OptimizerSection(Section):
    """AdamW with warm-up; the defaults are the paper's."""

    lr: float = Field(default=3e-4, gt=0, description="peak learning rate")
    min_lr: float | None = Field(
        default=None, ge=0, description=f"learning rate at the end of the decay; null: {MIN_LR_FRACTION} of lr"
    )
    schedule: Literal["cosine", "linear", "constant", "inverse-square-root", "wsd"] = Field(
        default="cosine",
        description="decay after the warm-up; wsd: lr stays until the last wsd_decay_steps of decay_steps; "
        "inverse-square-root: lr * sqrt(warmup_steps / step), min_lr at the least",
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up from 0 to lr")
    decay_steps: int | None = Field(
        default=None, ge=1, description="step at which min_lr is reached, warm-up included; null: train.steps"
    )
    wsd_decay_steps: int | None = Field(
        default=None,
        ge=0,
        description="steps of schedule=wsd's decay, which ends at decay_steps; 0: none yet, the run stays at lr until "
        "it is resumed with another number (run.accept_changes)",
    )
    wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] | None = Field(
        default=None,
        description="of schedule=wsd, from lr to min_lr over r from 0 to 1: exponential 2 * 0.5^r - 1, linear 1 - r, "
        "cosine, minus_sqrt 1 - sqrt(r); null: exponential, as in Megatron-LM",
    )
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay; norms are exempt")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of Adam's first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of Adam's second moment")
    eps: float = Field(default=1e-8, gt=0, description="added to Adam's denominator")
    clip_grad: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0: no clipping")
    distributed: bool = Field(default=False, description="shard optimizer state over data parallel ranks (ZeRO-1)")
    overlap_grad_reduce: bool = Field(default=False, description="reduce gradients while backward runs")
    overlap_param_gather: bool = Field(
        default=False, description="gather parameters while forward runs; needs distributed and overlap_grad_reduce"
    )

    @property
    def decays_later(self) -> bool:
        """Whether it is in the stable phase of schedule=wsd for as long as nobody says when the decay begins."""
        return self.schedule == "wsd" and self.wsd_decay_steps == 0


class TrainSection(Section):
    """The loop."""

    steps: int = Field(default=1000, ge=1, description="steps of the whole run, those of skip_steps included")
    micro_batch_size: int = Field(default=4, ge=1, description="sequences per microbatch and data parallel rank")
    global_batch_size: int = Field(
        default=8, ge=1, description="sequences per optimizer step, over all ranks, and in each batch of an evaluation"
    )
    batch_size_schedule: list[list[int]] | None = Field(
        default=None,
        description="[first step, sequences] pairs: from that step on, a step takes so many; the first is for step 1, "
        "the last one's size must be global_batch_size; null: global_batch_size in every step",
    )
    seq_length: int | None = Field(
        default=None, ge=2, description="tokens per training sequence; null: model.seq_length"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="type of weights and activations; masters are fp32; fp16 under DeepSpeed alone"
    )
    seed: int = Field(default=1234, ge=0, description="seed of initial weights and dropout")
    skip_steps: list[list[int]] = Field(
        default=[],
        description="[first, last] pairs of steps whose data is passed over, as PaLM did at loss spikes: nothing is "
        "trained, evaluated or saved in them; may change when a run is resumed",
    )
    eval_interval: int = Field(default=100, ge=0, description="steps between evaluations; 0: only after the last step")
    eval_batches: int = Field(default=4, ge=0, description="global batches per evaluation; 0: never evaluate")
    save_interval: int = Field(default=100, ge=0, description="steps between checkpoints; 0: only after the last step")
    async_save: bool = Field(
        default=False,
        description="train on while a checkpoint is written, from a copy in host memory ('mtp-megatron plan' says how "
        "much); the last one is written before the end",
    )
    log_interval: int = Field(
        default=10, ge=1, description="steps between lines of metrics.jsonl and TensorBoard points"
    )
    recompute: Literal["full", "selective"] | None = Field(
        default=None, description="recompute the trunk's activations in backward: full layers, or attention alone"
    )
    transformer_engine: bool = Field(
        default=False,
        description="build layers from Transformer Engine's modules; a rank's experts are multiplied together then",
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        default=None,
        description="the trunk's matrices in FP8: e4m3, or e4m3 forward and e5m2 backward (hybrid); null: bf16",
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = Field(
        default="delayed", description="how FP8 numbers are scaled; docs/fp8.md says which GPU has which"
    )
    fp8_param: bool = Field(
        default=False, description="keep the trunk's matrices in FP8 between steps; needs optimizer.distributed"
    )
    fp4: Literal["e2m1"] | None = Field(default=None, description="the trunk's matrices in NVFP4 in place of FP8")
    first_last_layers_bf16: bool = Field(
        default=False, description="the trunk's first and last layers stay in bf16; not with fp8_recipe delayed"
    )
    num_layers_at_start_in_bf16: int = Field(default=1, ge=0, description="how many, with first_last_layers_bf16")
    num_layers_at_end_in_bf16: int = Field(default=1, ge=0, description="how many, with first_last_layers_bf16")
    timeout_minutes: float = Field(
        default=10.0, gt=0, le=1e6, description="longest wait of a collective, then the job fails"
    )
    profile_steps: list[int] | None = Field(
        default=None, description="[first, last] steps that torch.profiler records into RUN/profile; null: none"
    )
    profile_ranks: list[int] = Field(default=[0], description="ranks that record profile_steps")
    memory_snapshot: bool = Field(
        default=False,
        description="a GPU that runs out of memory leaves a snapshot in RUN/memory, for pytorch.org/memory_viz",
    )

    @field_validator("profile_steps")
    @classmethod
    def _pair(cls, steps: list[int] | None) -> list[int] | None:
        if steps is not None and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise ConfigError(
                "train.profile_steps",
                steps,
                "it is no pair of steps, first <= last, from 1 on",
                "Write for example [10, 12]: few steps, as each takes memory and disk.",
            )
        return steps

    @field_validator("batch_size_schedule")
    @classmethod
    def _sizes(cls, schedule: list[list[int]] | None) -> list[list[int]] | None:
        name, remedy = "train.batch_size_schedule", "Write for example [[1, 256], [5001, 512]], or null for one size."
        if schedule == []:
            raise ConfigError(name, schedule, "it has no entry", remedy)
        before = 0  # first step of the entry before
        for entry in schedule or []:
            if len(entry) != 2 or not before < entry[0] or entry[1] < 1:
                problem = (
                    f"{entry} is no [first step, sequences], a step beyond the one before it and 1 or more of them"
                )
                raise ConfigError(name, schedule, problem, remedy)
            if not before and entry[0] != 1:
                raise ConfigError(name, schedule, f"it begins with step {entry[0]}, and a run with step 1", remedy)
            before = entry[0]
        return schedule

    @field_validator("skip_steps")
    @classmethod
    def _ranges(cls, ranges: list[list[int]]) -> list[list[int]]:
        over = 0  # last step of the pair before
        for pair in ranges:
            if len(pair) != 2 or not over < pair[0] <= pair[1]:
                raise ConfigError(
                    "train.skip_steps",
                    ranges,
                    f"{pair} is no pair of steps, first <= last, from 1 on and beyond the pair before it",
                    "Write pairs in ascending order, for example [[500, 520], [800, 800]].",
                )
            over = pair[1]
        return ranges

    @property
    def batch_sizes(self) -> BatchSizes:
        """Sequences of every step, and where it is in the data."""
        schedule = self.batch_size_schedule or [[1, self.global_batch_size]]
        return BatchSizes(tuple((first, size) for first, size in schedule))

    def skipped_to(self, step: int) -> int:
        """The step after which training goes on when ``step`` is over: ``step`` itself, unless ``skip_steps`` has the
        next one."""
        for first, last in self.skip_steps:
            if first <= step + 1 <= last:
                step = min(last, self.steps)
        return step

    def passes_over(self, step: int) -> bool:
        """Whether ``step`` is one of ``skip_steps``."""
        return any(first <= step <= last for first, last in self.skip_steps)


class RunSection(Section):
    """Where the run lives and how it starts."""

    path: str = Field(
        default="runs/default", min_length=1, description="folder of the run: recipe, metrics, checkpoints"
    )
    resume: Literal["auto", "never", "must"] = Field(
        default="auto",
        description="auto: continue from the latest checkpoint, if any; never: refuse one; must: need one",
    )
    accept_changes: bool = Field(
        default=False,
        description="resume although optimizer.lr, min_lr, schedule, warmup_steps, decay_steps, wsd_decay_steps, "
        "wsd_decay_style, weight_decay, clip_grad, heads.loss_weights, loss_decay, z_loss, curriculum_steps, the batch "
        "sizes of steps to come or the data are not as they were, or start from a model (run.load) whose tokenizer is "
        "not the data's; that is then recorded",
    )
    load: str | None = Field(
        default=None,
        description="run or checkpoint folder that gives the initial weights of a new run, and nothing else",
    )
    keep_last: int | None = Field(default=None, ge=1, description="checkpoints kept, the latest ones; null: all")
    keep_every: int | None = Field(
        default=None,
        ge=1,
        description="steps that are multiples of it keep their checkpoints for good, beside those of keep_last; null: "
        "none",
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard events to the run's folder")
    deepspeed: str | None = Field(
        default=None,
        min_length=1,
        description="DeepSpeed configuration (JSON) to train under; null: megatron-core's loop",
    )

    _home = field_validator("path", "load", "deepspeed")(_at_home)
