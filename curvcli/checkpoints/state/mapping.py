"""Optimizer state by index to optimizer state by parameter name, proved by lengths and shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from curvcli.checkpoints.state.partial import assignments, left_out
from curvcli.errors import InputError, counted
from curvcli.files.names import ADAPTED, unwrapped
from curvcli.optimizers import shaped_otherwise
from curvcli.optimizers.base import Group, OptimizerView, State, unlisted
from curvcli.optimizers.bitsandbytes import as_torch
from curvcli.optimizers.muon import unstacked
from curvcli.optimizers.refused import refuse

Order = Callable[[nn.Module], list[list[str]]]

# Trainer.get_decay_parameter_names of transformers 5; release 4 knew "bias" and the norm classes alone,
# which gives the same split wherever norms are one-dimensional.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


def trainer_order(model: nn.Module) -> list[list[str]]:
    """transformers' Trainer: decayed parameters, then the rest."""
    plain = {
        f"{m}.{p}" if m else p
        for m, mod in model.named_modules()
        if isinstance(mod, nn.LayerNorm)
        for p, _ in mod.named_parameters(recurse=False)
    }
    return _split(model, lambda name, p: not (_NO_DECAY.search(name) or name in plain))


def matrix_order(model: nn.Module) -> list[list[str]]:
    """nanoGPT and many others: matrices, then vectors."""
    return _split(model, lambda name, p: p.dim() >= 2)


def single_order(model: nn.Module) -> list[list[str]]:
    """model.parameters() in one group."""
    return [[n for n, p in model.named_parameters() if p.requires_grad]]


def adapted(model: nn.Module) -> bool:
    """Whether LoRA is on a model."""
    return any("lora_B" in name for name, _ in model.named_parameters())


def lora_plus_order(model: nn.Module) -> list[list[str]]:
    """peft's create_loraplus_optimizer: A, what is on embeddings, B, and vectors that do not decay, which have B's rate."""
    groups: list[list[str]] = [[], [], [], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_b = "lora_B" in name or parameter.dim() == 1
            groups[1 if "lora_embedding_" in name else 0 if not of_b else 3 if _NO_DECAY.search(name) else 2].append(name)
    return groups


def _split(model: nn.Module, first: Callable[[str, Tensor], bool]) -> list[list[str]]:
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [[n for n, p in trained if first(n, p)], [n for n, p in trained if not first(n, p)]]


def map_state(
    document: Any, model: nn.Module, orders: Sequence[Order], *, path: object, partial: bool = False
) -> OptimizerView:
    """A torch optimizer's state_dict with names.

    Names in the file win (`map_named`). Otherwise each order is tried; one is taken where group lengths and every
    state shape fit, and orders that fit must agree.

    Args:
        partial: where no order fits, look for the layers that were frozen, or for groups that take the layers apart.

    Raises:
        AmbiguousStateError: orders that fit differ, or layers were taken for frozen; it has the views, between which
            gradients may decide.
        InputError: no order fits; says what was tried.
        UnsupportedError: the optimizer is one that no number is given for.
    """
    groups, stored = check_document(document, path)
    if (keyed := by_name(groups, stored) or _by_group(groups, stored, model)) is not None:
        return map_named(keyed, model, {}, path=path)
    state = _as_torch(groups, stored)
    # Before the shapes: a factored state fits no parameter, and the reason is the optimizer, not the model.
    refuse(OptimizerView(tuple(Group((), g) for g in groups), {str(k): v for k, v in state.items()}))
    _check_places(groups, state, path)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tried: list[str] = []
    fits: list[list[list[str]]] = []
    labels: list[str] = []
    candidates = [(order.__name__.removesuffix("_order"), order(model)) for order in orders]
    for label, names in candidates:
        problem = _mismatch(names, groups, state, parameters)
        if problem:
            tried.append(f"{label}: {problem}")
        elif names not in fits:  # rules that come to the same order leave no doubt
            fits.append(names)
            labels.append(label)
    held, hint = sum(len(g["params"]) for g in groups), _hint(groups, parameters)
    # Only where no rule fits: an assignment by shapes alone is a search, and has to be confirmed by gradients.
    if not fits and partial and 0 < held <= len(parameters):
        if shapes := _shapes(groups, state):
            fits = assignments(shapes, parameters)
            labels = [_described(names, parameters) for names in fits]
        if fits:
            raise AmbiguousStateError(
                f"optimizer state in {path} has {held} of the model's {len(parameters)} parameters in "
                f"{counted(len(groups), 'group')}, which {len(fits)} assignments fit",
                hint=hint,
                views=tuple(_view(names, groups, state) for names in fits),
                labels=tuple(labels),
            )
    if not fits:
        raise InputError(
            f"optimizer state in {path}, of {held} parameters, does not fit the model of {len(parameters)} "
            f"({'; '.join(tried)})",
            hint=hint,
        )
    views = tuple(_view(names, groups, state) for names in fits)
    if len(views) > 1:
        raise AmbiguousStateError(
            f"optimizer state in {path} fits the model in {len(fits)} orders of parameters ({', '.join(labels)}), and a "
            "guess could be wrong",
            hint="save the optimizer built from model.named_parameters(), so that the file has the names",
            views=views,
            labels=tuple(labels),
        )
    return views[0]


def _check_places(groups: list[dict[str, Any]], state: Mapping[Any, Any], path: object) -> None:
    """Raises InputError where a parameter has state and no group, or two groups: no frozen parameters explain that."""
    places = Counter(index for group in groups for index in group["params"])
    if state.keys() - places.keys() or max(places.values(), default=1) > 1:
        raise InputError(
            f"optimizer state in {path} does not fit the model: a parameter has state and no group, or stands in two",
            hint="the file is damaged: use another checkpoint",
        )


def _hint(groups: list[dict[str, Any]], parameters: Mapping[str, Tensor]) -> str:
    held = sum(len(g["params"]) for g in groups)
    if held < len(parameters):
        return (
            "frozen parameters are the likely reason: pass --model package.module:factory of a function that builds the "
            "model and sets requires_grad as it was trained"
        )
    if held == len(parameters):
        return (
            "its groups are not known here: load model and optimizer as the training script does, save the weights as "
            "DIR/model.safetensors (model.save_pretrained(DIR), or safetensors.torch.save_model) and call "
            "curvcli.save_optimizer(DIR, optimizer, model), which writes the names; then give DIR"
        )
    return "it belongs to another model: name the network that was trained with --model"


def _shapes(groups: list[dict[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> list[list[tuple[int, ...]]] | None:
    """Shapes of the parameters in every group, as their state has them; None where one has no state."""
    found = [[_shape(state.get(index, {})) for index in group["params"]] for group in groups]
    return [[shape for shape in each if shape] for each in found] if all(all(each) for each in found) else None


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    shapes = {tuple(value.shape) for key, value in entry.items() if _of_shape(key, value)}
    return shapes.pop() if len(shapes) == 1 else None


def _of_shape(key: str, value: Any) -> bool:
    """Whether a state entry has its parameter's shape by rights."""
    # Counts of steps are tensors too, without dimensions.
    return isinstance(value, Tensor) and value.dim() > 0 and key not in shaped_otherwise()


def _described(names: list[list[str]], parameters: Mapping[str, Tensor]) -> str:
    """For people: what an assignment takes for frozen, or which layers its groups begin with."""
    frozen = left_out(names, parameters)
    if not frozen:
        return "groups that begin with " + ", ".join(group[0] for group in names if group)
    return f"{', '.join(frozen[:4])}{f' and {len(frozen) - 4} more' if len(frozen) > 4 else ''} frozen"


class AmbiguousStateError(InputError):
    """State that fits a model in more than one order, or in one that the file and its trainer's rules do not give.

    Attributes:
        views: the state with names, in each of them.
        labels: what each is called.
    """

    def __init__(self, message: str, *, hint: str, views: tuple[OptimizerView, ...], labels: tuple[str, ...]) -> None:
        super().__init__(message, hint=hint)
        self.views, self.labels = views, labels


def _view(names: list[list[str]], groups: list[dict[str, Any]], state: Mapping[Any, State]) -> OptimizerView:
    entries = {
        name: state[index]
        for group, members in zip(groups, names, strict=True)
        for index, name in zip(group["params"], members, strict=True)
        if index in state
    }
    return OptimizerView(
        tuple(
            Group(tuple(members), {k: v for k, v in group.items() if k not in ("params", "param_names")})
            for group, members in zip(groups, names, strict=True)
        ),
        entries,
    )


def by_name(groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]]) -> dict[str, Any] | None:
    """The state keyed by parameter names, where the file has them: as its keys, or beside its positions."""
    if any(isinstance(p, str) for group in groups for p in group["params"]):
        return {"state": state, "param_groups": groups}
    if not all(_has_names(group) for group in groups):
        return None
    owner = {i: n for group in groups for i, n in zip(group["params"], group["param_names"], strict=True)}
    return {
        # State of no group keeps its number, which is no parameter's name: map_named says so.
        "state": {owner.get(index, str(index)): entry for index, entry in state.items()},
        "param_groups": [{**group, "params": group["param_names"]} for group in groups],
    }


def _by_group(groups: list[dict[str, Any]], state: dict[Any, dict[str, Any]], model: nn.Module) -> dict[str, Any] | None:
    """The state keyed by parameter names, where every group is one parameter's and is called as it is, as Adam-mini's are.

    Adam-mini writes them in lower case, so a name is taken only where no other of the model's parameters has it.
    """
    lower = Counter(unwrapped(name).lower() for name, _ in model.named_parameters())
    own = {unwrapped(name).lower(): name for name, _ in model.named_parameters()}
    said = [group.get("name") for group in groups]
    called = [unwrapped(name).lower() if isinstance(name, str) else "" for name in said]
    if any(lower[name] != 1 for name in called) or len(set(called)) < len(called):
        return None
    if any(len(group["params"]) != 1 for group in groups):
        return None
    return by_name([{**g, "param_names": [own[name]]} for g, name in zip(groups, called, strict=True)], state)


def _has_names(group: Mapping[str, Any]) -> bool:
    names = group.get("param_names")
    return isinstance(names, list) and len(names) == len(group["params"]) and all(isinstance(n, str) for n in names)


def map_named(
    document: Any,
    model: nn.Module,
    names: Mapping[str, str],
    *,
    path: object,
    read: Callable[[str], State] | None = None,
) -> OptimizerView:
    """An optimizer's state_dict that is keyed by parameter names already, as those of torch.distributed are.

    Args:
        document: {"state": {name: {...}}, "param_groups": [{"params": [name, ...], ...}]}.
        names: stored name by name of the model, as `architecture.match` gives it for the weights.
        read: state by stored name, where the document holds shapes (meta tensors) in its place.

    Since the names are the file's own, a parameter in no group was frozen and one without state never had a gradient;
    both are left out of the measurement, and the report says so.

    Raises:
        InputError: a name is none of the model's or stands in two groups, state has no group, or a shape does not fit.
        UnsupportedError: the optimizer is one that no number is given for.
    """
    groups, stored_state = check_document(document, path)
    state = dict(unstacked([(g["params"], g) for g in groups], _as_torch(groups, stored_state)))
    # Before names and shapes: what cannot be measured is no matter of --model.
    refuse(OptimizerView(tuple(Group((), g) for g in groups), state))
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # Tied weights have several names, and the file may use any of them.
    owner = {id(p): n for n, p in parameters.items()}
    known = {n: owner[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if id(p) in owner}
    known |= {stored: known[name] for name, stored in names.items() if name in known}

    def wrong(what: str) -> InputError:
        return InputError(
            f"optimizer state in {path} does not fit the model: {what}",
            hint="name the network that was trained with --model",
        )

    # A wrapper may be in the optimizer's names and not in the weights', or the other way round.
    known = {unwrapped(name): own for name, own in known.items()}
    # So may peft's: an optimizer's names are the wrapper's, an adapter's network is inside it.
    known = {ADAPTED + name: own for name, own in known.items()} | known
    members = [
        [known.get(unwrapped(name), "") if isinstance(name, str) else "" for name in group["params"]] for group in groups
    ]
    for group, found in zip(groups, members, strict=True):
        if "" in found:
            raise wrong(f"{str(group['params'][found.index('')])[:200]} is no trained parameter of it")
    twice = [name for name, times in Counter(name for found in members for name in found).items() if times > 1]
    if twice:
        raise wrong(f"{twice[0]} stands in it twice")
    grouped = {name for found in members for name in found}
    entries: dict[str, State] = {}
    for stored, entry in state.items():
        name = known.get(unwrapped(stored), "") if isinstance(stored, str) else ""
        if name not in grouped:
            raise wrong(f"{str(stored)[:200]} has state and {'no group' if name else 'is no trained parameter of it'}")
        for key, value in entry.items():
            if _of_shape(key, value) and value.shape != parameters[name].shape:
                raise wrong(
                    f"{key} of {stored} has shape {tuple(value.shape)}, the parameter {tuple(parameters[name].shape)}"
                )
        entries[name] = read(stored) if read else entry
    return OptimizerView(
        tuple(
            Group(tuple(found), {k: v for k, v in group.items() if k not in ("params", "param_names")})
            for group, found in zip(groups, members, strict=True)
        ),
        entries,
    )


def check_document(document: Any, path: object) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    """Groups and state of a torch optimizer's state_dict. Raises InputError where it is none."""
    try:
        groups, state = document["param_groups"], document["state"]
        fine = (
            isinstance(groups, list)
            and bool(groups)
            and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
            and isinstance(state, dict)
            and all(isinstance(s, dict) for s in state.values())
            and all(isinstance(key, str) for part in (*groups, *state.values()) for key in part)
        )
    except (TypeError, KeyError, IndexError):
        fine = False
    if not fine:
        raise InputError(
            f"{path} holds no torch optimizer state (param_groups and state)",
            hint="point at a checkpoint that a torch optimizer was saved into",
        )
    return groups, state


def _as_torch(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, State]) -> dict[Any, State]:
    """State under torch's names, whose shapes are the parameters': once, so that whoever compares moments sees the same."""
    options = {index: group for group in groups for index in group["params"] if isinstance(index, (int, str))}
    return {index: unlisted(as_torch(entry, options.get(index, {}))) for index, entry in state.items()}


def summary(document: Any, path: object) -> dict[str, object]:
    """For people: number of states, their entries, the first group's hyperparameters."""
    groups, state = check_document(document, path)
    first = groups[0]
    shown = ("lr", "betas", "eps", "weight_decay", "momentum", "alpha", "nesterov")
    return {
        "parameters with state": len(state),
        "state entries": sorted({key for entry in state.values() for key in entry}),
        "groups": len(groups),
        **{key: first[key] for key in shown if key in first},
    }


def _mismatch(
    names: list[list[str]],
    groups: list[dict[str, Any]],
    state: Mapping[Any, State],
    parameters: Mapping[str, Tensor],
) -> str | None:
    lengths, expected = [len(g["params"]) for g in groups], [len(n) for n in names]
    if lengths != expected:
        return f"groups of {lengths} parameters, the model gives {expected}"
    for group, members in zip(groups, names, strict=True):
        for index, name in zip(group["params"], members, strict=True):
            if name not in parameters:
                return f"no parameter {name}"
            for key, value in state.get(index, {}).items():
                if _of_shape(key, value) and value.shape != parameters[name].shape:
                    return f"{key} {index} has shape {tuple(value.shape)}, {name} has {tuple(parameters[name].shape)}"
    return None
