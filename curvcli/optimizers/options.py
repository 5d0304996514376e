"""Which options of a group leave the update as the rule knows it: nothing that could change it is ignored."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from curvcli.errors import InputError, UnsupportedError
from curvcli.optimizers.base import NO_OPTIMIZER, Group, OptimizerView, Rule

# How a step is computed or rounded, not which.
_COMPUTING = {
    "foreach", "fused", "capturable", "differentiable", "use_triton", "is_paged", "optim_bits", "step",
    "bf16_stochastic_round", "use_kahan_summation", "kahan_sum", "momentum_dtype", "variance_dtype",
    "compensation_buffer_dtype",
}  # fmt: skip
# What schedulers and trainers keep with a group; what it does to the step is in lr and weight_decay already. Of torch,
# timm, transformers, fairseq, unilm, MAE, DINOv2, mmengine, DeepSpeed, Megatron-LM, OLMo and Composer.
_KEPT = {
    "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", "initial_weight_decay",
    "lr_scale", "lr_mult", "lr_multiplier", "lr_factor", "wd_mult", "wd_multiplier", "wd_scale", "weight_decay_mult",
    "decay_mult", "layer_decay", "apply_decay", "no_decay", "start_wd", "end_wd", "max_grad_norm", "max_grad_norm_ratio",
    "sharded", "moe", "is_expert", "is_expert_parallel", "is_decoupled_lr", "is_last_layer", "is_vision_model_param",
    "default_config", "name", "params", "names", "layer", "layers", "tag", "label",
}  # fmt: skip
_LABELS = ("_name", "_names", "_id")


def scrutinise(view: OptimizerView, rule: Rule) -> tuple[str, ...]:
    """Options and state that the rule does not know and that may change the update, in words.

    Raises:
        UnsupportedError: an option or state that does change it.
        InputError: state that the rule needs is missing.
    """
    doubts: dict[str, Any] = {}
    for group in view.groups:
        for key, value in group.options.items():
            if key in rule.options or key in _COMPUTING | _KEPT or key.endswith(_LABELS) or value is None:
                continue
            if key in rule.refusals and not _on(value):
                continue  # known, and read as written
            if key in rule.refusals:
                raise UnsupportedError(
                    f"the optimizer's option {key}={_short(value)} is on: {rule.refusals[key]}; not supported",
                    hint=NO_OPTIMIZER,
                )
            doubts[f"option {key}={_short(value)}"] = None
        _check_state(view, rule, group, doubts)
    return () if view.vouched else tuple(doubts)


def _check_state(view: OptimizerView, rule: Rule, group: Group, doubts: dict[str, Any]) -> None:
    known = rule.state | rule.extra
    for name in group.names:
        entry = view.state.get(name)
        if entry is None:
            continue
        if missing := sorted(rule.needed(group, entry) - set(entry)):
            if mixed := sorted(set(entry) - known):
                raise UnsupportedError(
                    f"the optimizer's groups keep different state ({', '.join(mixed)} of {name}, without {missing[0]}): "
                    "several optimizers in one, for which there is no rule",
                    hint=NO_OPTIMIZER,
                )
            raise InputError(
                f"optimizer state of {name} has no {missing[0]!r}, which {rule.name(view)} needs",
                hint="the optimizer state is damaged or not of this optimizer: use another checkpoint, or --optimizer none",
            )
        for key in sorted(set(entry) - known):
            value = entry[key]
            if isinstance(value, Tensor) and value.dim() and not view.vouched:
                raise UnsupportedError(
                    f"{rule.name(view)} keeps no {key!r} in its state, as {name} has: the update may use it",
                    hint=f"pass --optimizer {rule.name(view)} if its update does not depend on it, else --optimizer none",
                )
            if value is not None:
                doubts[f"state {key}"] = None


def _on(value: Any) -> bool:
    try:
        return bool(value)
    except (RuntimeError, ValueError):
        return True


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:40]
