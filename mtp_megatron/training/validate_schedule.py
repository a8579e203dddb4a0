"""Rules of the steps and of the learning rate's schedule over them."""

from __future__ import annotations

from mtp_megatron.errors import ConfigError
from mtp_megatron.training.recipe import Recipe


def check_schedule(recipe: Recipe) -> None:
    """Refuse a schedule that cannot be followed, or that nothing would follow; ``recipe`` must be resolved.

    Raises:
        ConfigError: names the first field that cannot work.
    """
    optimizer, train = recipe.optimizer, recipe.train
    if train.skipped_to(0) == train.steps:  # an Adam that never took a step leaves no checkpoint that can be loaded
        raise ConfigError(
            "train.skip_steps",
            train.skip_steps,
            f"no step of train.steps={train.steps} is left to be trained",
            "Begin after the last step that was trained.",
        )
    decay_steps, min_lr = optimizer.decay_steps or train.steps, optimizer.min_lr or 0.0
    if optimizer.warmup_steps >= decay_steps and not optimizer.decays_later:
        raise ConfigError(
            "optimizer.warmup_steps",
            optimizer.warmup_steps,
            f"the schedule ends at step {decay_steps} (optimizer.decay_steps, or train.steps)",
            f"Set it to less than {decay_steps}.",
        )
    _check_wsd(recipe, decay_steps)
    if min_lr > optimizer.lr:
        raise ConfigError(
            "optimizer.min_lr", min_lr, f"above optimizer.lr={optimizer.lr}", "Set it to at most optimizer.lr."
        )
    if optimizer.overlap_param_gather and not (optimizer.distributed and optimizer.overlap_grad_reduce):
        raise ConfigError(
            "optimizer.overlap_param_gather",
            True,
            "it needs optimizer.distributed and optimizer.overlap_grad_reduce",
            "Set those two to true, or this to false.",
        )


def _check_wsd(recipe: Recipe, decay_steps: int) -> None:
    optimizer, steps = recipe.optimizer, recipe.optimizer.wsd_decay_steps
    if optimizer.schedule != "wsd":
        for name in ("wsd_decay_steps", "wsd_decay_style"):
            value = getattr(optimizer, name)
            if value is not None:
                raise ConfigError(
                    f"optimizer.{name}",
                    value,
                    f"optimizer.schedule={optimizer.schedule} has no such decay",
                    "Leave it out, or set optimizer.schedule=wsd.",
                )
        return
    if steps is None:
        raise ConfigError(
            "optimizer.wsd_decay_steps",
            None,
            "optimizer.schedule=wsd does not say how long it decays",
            "Set it to the steps of the decay, or to 0 for a run that stays at optimizer.lr for now.",
        )
    if optimizer.decays_later:
        if optimizer.decay_steps is not None:
            raise ConfigError(
                "optimizer.decay_steps",
                optimizer.decay_steps,
                "with optimizer.wsd_decay_steps=0 there is no decay that could end there",
                "Leave it out, or set optimizer.wsd_decay_steps to the steps of the decay.",
            )
        return
    if decay_steps - steps < optimizer.warmup_steps:
        raise ConfigError(
            "optimizer.wsd_decay_steps",
            steps,
            f"the decay up to step {decay_steps} (optimizer.decay_steps, or train.steps) would begin before the "
            f"warm-up is over, optimizer.warmup_steps={optimizer.warmup_steps}",
            f"Set it to at most {decay_steps - optimizer.warmup_steps}.",
        )
