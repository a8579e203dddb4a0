"""What the user may choose about the heads: frozen, validated, and refused by name when it cannot work."""

from __future__ import annotations

import difflib
from typing import Any, Literal, TypeVar

import pydantic

from mtp_megatron.errors import ConfigError

Section = TypeVar("Section", bound=pydantic.BaseModel)
HeadKind = Literal["transformer", "linear", "medusa"]
Arrangement = Literal["parallel", "causal", "anticausal"]


class HeadsConfig(pydantic.BaseModel):
    """The n future-token heads of one model (Gloeckle et al. 2024, section 2).

    Construct it through :meth:`parse` to get a :class:`ConfigError` that names the field as the user wrote it;
    the plain constructor raises pydantic's ``ValidationError``.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: int = pydantic.Field(4, ge=1, description="number of heads; head i predicts the token i places ahead")
    kind: HeadKind = pydantic.Field(
        "transformer", description="what a head is: a transformer layer, a linear map, or a Medusa residual block"
    )
    arrangement: Arrangement = pydantic.Field(
        "parallel",
        description="parallel: each head reads the trunk; causal: head i+1 reads head i; anticausal: head i reads i+1",
    )
    unembedding: Literal["shared", "replicated"] = pydantic.Field(
        "shared", description="one output projection for all heads, or one for each (the paper's byte-level models)"
    )
    execution: Literal["deferred", "joint"] = pydantic.Field(
        "deferred",
        description="deferred: head by head in the backward pass, memory flat in n; joint: plain autograd, an oracle",
    )
    fp8: bool = pydantic.Field(
        False, description="run the heads' layers in the trunk's FP8 or FP4 too, not in bf16; not with delayed scaling"
    )
    loss_chunk_tokens: int | None = pydantic.Field(
        None, ge=1, description="tokens whose logits exist at one time; null: by vocabulary shard and GPU memory"
    )
    loss_weights: tuple[float, ...] | None = pydantic.Field(
        None, description="weight of each head's loss; null: 1 for every head, the paper's unweighted sum"
    )
    loss_decay: float | None = pydantic.Field(
        None, gt=0.0, le=1.0, description="geometric weights: head i weighs loss_decay ** (i - 1)"
    )
    z_loss: float = pydantic.Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="z-loss: weight of log(Z)^2 of every target in each head's loss, Z the sum of the exponentials of "
        "its logits; keeps logits from drifting (1e-4 in PaLM). 0: none",
    )
    curriculum_steps: int | None = pydantic.Field(
        None, ge=1, description="forward curriculum: heads join one by one over this many steps; null: all at once"
    )
    documents: Literal["separate", "ignore"] = pydantic.Field(
        "separate", description="separate: no target lies beyond its document's end; ignore: documents run together"
    )
    trainable: Literal["all", "heads", "new_heads"] = pydantic.Field(
        "all",
        description="all: the whole model; heads: trunk and embedding frozen; new_heads: only heads 2..n learn",
    )
    new_heads: Literal["fresh", "copy"] = pydantic.Field(
        "fresh",
        description="heads that the checkpoint of run.load lacks: random, or copies of its head 1 (the last layer)",
    )

    @classmethod
    def parse(cls, values: dict[str, Any] | None = None, *, prefix: str = "heads") -> HeadsConfig:
        """Validate ``values``; raises :class:`ConfigError` naming ``prefix.field``, the value and the remedy."""
        return parse_section(cls, values or {}, prefix)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> HeadsConfig:
        if self.loss_weights is not None:
            if self.loss_decay is not None:
                raise ConfigError("loss_decay", self.loss_decay, "loss_weights is set as well", "Set only one")
            if len(self.loss_weights) != self.n:
                raise ConfigError(
                    "loss_weights",
                    self.loss_weights,
                    f"{len(self.loss_weights)} weights for n={self.n} heads",
                    f"Give exactly {self.n} numbers",
                )
            if min(self.loss_weights) < 0.0 or max(self.loss_weights) <= 0.0:
                raise ConfigError(
                    "loss_weights", self.loss_weights, "weights must be >= 0 and one of them > 0", "Change the weights"
                )
            if self.curriculum_steps is not None and not self.loss_weights[0]:
                raise ConfigError(
                    "curriculum_steps",
                    self.curriculum_steps,
                    "a curriculum starts with head 1 alone, whose loss_weights entry is 0",
                    "Give head 1 a weight > 0, or leave curriculum_steps unset",
                )
        if self.arrangement != "parallel" and self.kind != "transformer":
            raise ConfigError(
                "arrangement",
                self.arrangement,
                f"a chain of kind={self.kind} heads is not defined",
                "Use kind=transformer, or arrangement=parallel",
            )
        if self.fp8 and self.kind != "transformer":
            raise ConfigError("fp8", True, f"kind={self.kind} heads are no layers of a transformer", "Leave it out")
        if self.trainable == "new_heads" and self.n < 2:
            raise ConfigError("trainable", self.trainable, "there is no head beside head 1", "Set n to 2 or more")
        if self.kind == "medusa" and self.n < 2:
            raise ConfigError("n", self.n, "Medusa needs a head beside the next-token head", "Set n to 2 or more")
        return self

    def base_weights(self) -> tuple[float, ...]:
        """Weight of each head's loss when every head is active, length n."""
        if self.loss_weights is not None:
            return self.loss_weights
        if self.loss_decay is not None:
            return tuple(self.loss_decay**i for i in range(self.n))
        return (1.0,) * self.n

    def weights_at(self, step: int) -> tuple[float, ...]:
        """Weight of each head's loss at step ``step`` of the run (0-based, steps passed over included), length n.

        Under a forward curriculum (arXiv 2505.22757) training starts with head 1 alone and the other heads join at
        equal intervals, the last one before ``curriculum_steps`` is over. A head that has not joined weighs 0.
        """
        weights = self.base_weights()
        if self.curriculum_steps is None:
            return weights
        active = min(self.n, 1 + step * self.n // self.curriculum_steps)
        return tuple(w if i < active else 0.0 for i, w in enumerate(weights))

    @property
    def chains(self) -> tuple[tuple[int, ...], ...]:
        """Groups of heads (0-based) that run one after another; within a group each head reads the one before it."""
        order = tuple(range(self.n))
        if self.arrangement == "causal":
            return (order,)
        if self.arrangement == "anticausal":
            return (order[::-1],)
        return tuple((i,) for i in order)


def parse_section(cls: type[Section], values: dict[str, Any], prefix: str) -> Section:
    """Validate one section of settings, turning every complaint into a :class:`ConfigError` under ``prefix``."""
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        raise first_complaint(cls, error, prefix) from None


def first_complaint(cls: type[pydantic.BaseModel], error: pydantic.ValidationError, prefix: str) -> ConfigError:
    """The first of pydantic's complaints in this package's words: field, value received, remedy."""
    complaint = error.errors()[0]
    path = ".".join(str(part) for part in complaint["loc"])
    field = ".".join(part for part in (prefix, path) if part)
    cause = complaint.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):  # raised by a model's own validator
        inner = ".".join(part for part in (field, cause.field) if part)
        return ConfigError(inner, cause.value, cause.problem, cause.remedy)
    if complaint["type"] == "extra_forbidden":
        *parents, name = [str(part) for part in complaint["loc"]]
        known = list(_section_at(cls, parents).model_fields)
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"Did you mean '{close[0]}'?" if close else f"Known settings here: {', '.join(known)}"
        return ConfigError(field, complaint["input"], "no such setting", remedy)
    return ConfigError(field, complaint["input"], complaint["msg"], _remedy(complaint))


def _section_at(cls: type[pydantic.BaseModel], parents: list[str]) -> type[pydantic.BaseModel]:
    for name in parents:
        annotation = cls.model_fields[name].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel)):
            break
        cls = annotation
    return cls


def _remedy(complaint: Any) -> str:
    context = complaint.get("ctx", {})
    if complaint["type"] == "missing":
        return "Set it in the recipe"
    if complaint["type"] == "literal_error":
        return f"Choose one of {context.get('expected')}"
    bounds = [f"{word} {context[key]}" for key, word in _BOUNDS.items() if key in context]
    return f"Set it to a value {' and '.join(bounds)}" if bounds else "Correct its type or value"


_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
