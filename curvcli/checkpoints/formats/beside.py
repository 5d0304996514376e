"""What lies beside the weights, or in one file with them: optimizers, and averages that no optimizer step made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from curvcli.checkpoints.base import OptimizerFile, unusable, warning
from curvcli.checkpoints.state.mapping import by_name, check_document
from curvcli.documents import Finding
from curvcli.errors import InputError, UnsupportedError
from curvcli.files.names import averaged, of_average, unwrapped
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.muon import orthogonalises
from curvcli.optimizers.refused import refuse
from curvcli.optimizers.soap import rotates

# A word of its own: optimizer_states, optim.pt and adam-optimizer_0.bin, and not optimization.log.
_OPTIMIZER = re.compile(r"(?:^|[-_.\d])optim(?:izer)?s?(?:_states?|_state_dict)?(?=[-_.\d]|$)", re.IGNORECASE)
# avg_loss=2.31 in a file's name is a metric.
_METRIC = re.compile(r"[\w/]+=[+-]?\d[\d.]*(?:e[+-]?\d+)?")
_TORCHTUNE = "recipe_state.pt"
_TENSORS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".pkl", ".npz", ".msgpack")


def optimizer_files(directory: Path) -> list[Path]:
    """What a directory has by the name of an optimizer's state: files of tensors, and directories. Raises InputError."""
    try:
        found = sorted(p for p in directory.iterdir() if _OPTIMIZER.search(p.name))
    except OSError as error:
        raise InputError(f"cannot list {directory}: {error.strerror}", hint="check its permissions") from error
    return [p for p in found if p.suffix in _TENSORS or p.is_dir()]


def optimizers_in(document: Any) -> dict[str, Any]:
    """The optimizers' state_dicts in a saved document, by where they are: itself, under a key, in a list or by name.

    What is called an optimizer and is none comes too, for the reader to refuse by name.
    """
    if _is_state(document):
        return {"": document}
    whole = document if isinstance(document, dict) else {}
    found: dict[str, Any] = {}
    for key, value in whole.items():
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
        inside = {f"{key}.{part}": each for part, each in parts if _is_state(each)}
        if _is_state(value):
            found[str(key)] = value
        elif inside:
            found |= inside
        elif isinstance(value, (dict, list, tuple)) and value and _OPTIMIZER.search(str(key)):
            found[str(key)] = value
    return found


def merged(documents: Mapping[str, Any], path: Path) -> Any:
    """The one optimizer, or Muon or SOAP for some parameters and Adam for the others as one with both's groups.

    Raises UnsupportedError where there are several of another kind.
    """
    if len(documents) == 1:
        return next(iter(documents.values()))
    parts = [check_document(document, path) for document in documents.values()]
    muon = [any(orthogonalises(Group((), group)) for group in groups) for groups, _ in parts]
    soap = [any(rotates(Group((), group)) for group in groups) for groups, _ in parts]
    adam = [bool(state) and all("exp_avg_sq" in entry for entry in state.values()) for _, state in parts]
    named = [by_name(groups, state) for groups, state in parts]
    if any(muon) == any(soap) or not all(one or other for one, other in zip(muon, adam, strict=True)):
        raise several(documents, path)
    if all(each is not None for each in named):
        parts = [check_document(each, path) for each in named]
        entries = {name: entry for _, state in parts for name, entry in state.items()}
        return {"param_groups": [group for groups, _ in parts for group in groups], "state": entries}
    # Each counts its parameters from 0.
    places = [{index: (k, index) for group in groups for index in group["params"]} for k, (groups, _) in enumerate(parts)]
    number = {place: at for at, place in enumerate(place for each in places for place in each.values())}
    count = len(number)
    return {
        "param_groups": [
            {**group, "params": [number[k, index] for index in group["params"]]}
            for k, (groups, _) in enumerate(parts)
            for group in groups
        ],
        # What stands in no group keeps a number of its own, for the mapping to refuse.
        "state": {
            number.get((k, index), count + at): entry
            for k, (_, state) in enumerate(parts)
            for at, (index, entry) in enumerate(state.items())
        },
    }


def several(documents: Mapping[str, Any], path: Path) -> UnsupportedError:
    """What to say of more optimizers than one. Raises UnsupportedError where one of them is no number's."""
    for document in documents.values():
        groups, state = check_document(document, path)
        refuse(OptimizerView(tuple(Group((), g) for g in groups), {str(k): v for k, v in state.items()}))
    return UnsupportedError(
        f"{path} has {len(documents)} optimizers ({', '.join(documents)[:200]})",
        hint="pass --optimizer none, or save one optimizer",
    )


def averages_of(names: Iterable[str], *where: str) -> tuple[bool, str | None]:
    """Whether stored weights are an average, and if they are not, the name under which one lies among them.

    Args:
        where: what the file, its directory and the part of it are called.
    """
    stored = list(names)
    apart = [name for name in stored if of_average(name)]
    called = any(averaged(_METRIC.sub("", name)) for name in where)
    # torch's AveragedModel counts what it averages over at its top; a model that holds such a copy has it further in.
    whole = any(unwrapped(name) == "n_averaged" for name in apart) or (stored and len(apart) == len(stored))
    if called or whole:
        return True, None
    return False, apart[0].rpartition(".")[0] if apart else None


def averaged_weights(where: str) -> Finding:
    """For a report of weights that are an average.

    Args:
        where: they lie, for people.
    """
    what = f"the weights ({where}) are an average of several steps': no optimizer step reached them, and none left them"
    return warning("averaged-weights", what)


def of_another(path: Path, what: str) -> OptimizerFile:
    """State beside weights that are an average: its moments are of other weights."""
    return unusable(
        path,
        f"the weights in {path} ({what}) are an average, and the optimizer's moments belong to the weights that it moved",
        hint="give the checkpoint that has the trained weights, or pass --optimizer none for the average's own curvature",
    )


def unread(path: Path, read: Iterable[Path] = ()) -> list[Finding]:
    """A warning where optimizer state lies beside the weights and no number comes from it.

    Args:
        path: the checkpoint.
        read: what of it was read.
    """
    place = path if path.is_dir() else path.parent
    left = [p.name for p in optimizer_files(place) if p not in {path, *read}]
    # Newer ones keep it beside the epochs' folders. Its optimizer's names, and the rows of q and k, are torchtune's own.
    jobs = (place / _TORCHTUNE, place.absolute().parent / "recipe_state" / _TORCHTUNE)
    left += [f"torchtune's {'/'.join(p.parts[-2:])}, which holds the optimizer," for p in jobs if p.is_file()]
    if not left:
        return []
    return [
        warning("unread-optimizer", f"{', '.join(left)[:200]} beside the weights was not read: no number here comes from it")
    ]


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and "param_groups" in value and "state" in value
