"""An optimizer's update as a callback sees it: whichever optimizer makes it, with a closure or without."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from curvcli.errors import UsageError
from curvcli.optimizers.base import innermost


class Follower(Protocol):
    """Who wants to know of updates."""

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The gradients are there that an optimizer is about to use."""

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer has stepped."""


# Weak, so that a callback that is let go of goes; and one pair of hooks for all of them, which is never removed: an
# object may be collected while torch iterates over its hooks.
_followers: weakref.WeakSet[Any] = weakref.WeakSet()


def follow(follower: Follower) -> None:
    """Tell of every update of every torch optimizer in the process.

    `before_update` is called when a step begins, and again whenever it has called its closure, which is where the
    gradients come from then (Lightning's automatic optimization, LBFGS).
    """
    _listen()
    _followers.add(follower)


def following() -> tuple[Any, ...]:
    """Who is told."""
    return tuple(_followers)


def unfollow(follower: Follower) -> None:
    """Tell it no more."""
    _followers.discard(follower)


@cache
def _listen() -> None:
    register_optimizer_step_pre_hook(_enter)
    register_optimizer_step_post_hook(_leave)


def _enter(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def act() -> None:
        for follower in following():
            follower.before_update(optimizer)

    act()
    if not _followers or not any(callable(v) for v in (*args[1:], *kwargs.values())):
        return None
    # The first argument is the optimizer itself; any other callable is a closure.
    return (args[0], *(_closing(v, act) for v in args[1:])), {k: _closing(v, act) for k, v in kwargs.items()}


def _leave(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for follower in following():
        follower.after_update(optimizer)


def _closing(value: Any, act: Callable[[], None]) -> Any:
    """A closure that acts on the gradients it made; anything else as it is."""
    if not callable(value):
        return value

    @wraps(value)
    def closure(*args: Any, **kwargs: Any) -> Any:
        result = value(*args, **kwargs)
        act()
        return result

    return closure


def bare(optimizer: Any) -> list[torch.optim.Optimizer]:
    """One optimizer or several, without the wrappers of accelerate and Lightning. Raises UsageError for anything else."""
    given = optimizer if isinstance(optimizer, Sequence) else [optimizer]
    found = []
    for each in map(innermost, given):
        if not isinstance(each, torch.optim.Optimizer):
            raise UsageError(
                f"a {type(each).__name__} is no torch.optim.Optimizer", hint="pass the optimizer, or a list of optimizers"
            )
        found.append(each)
    return found


def held(optimizer: torch.optim.Optimizer, *, moving: bool = False) -> set[int]:
    """Identities of the parameters in an optimizer's groups; with `moving` of groups at a positive learning rate."""
    groups = [g for g in optimizer.param_groups if not moving or float(g["lr"]) > 0]
    return {id(p) for group in groups for p in group["params"]}


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has made an update; Adagrad's state is there before the first one."""
    return any(_has_counted(entry) for entry in optimizer.state.values())


def _has_counted(entry: Any) -> bool:
    if not isinstance(entry, Mapping):
        return bool(entry)
    if entry.get("step") is not None:
        return float(entry["step"]) > 0
    # No step count: state made at construction (Adagrad's sum) is 0 until the first step.
    return any(bool(v.any()) for v in entry.values() if isinstance(v, Tensor))
