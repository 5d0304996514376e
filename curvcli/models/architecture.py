"""Networks for weights that are stored without one, and weights put into them by name, all or none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from curvcli.errors import InputError, UsageError, are, counted
from curvcli.files.names import averaged, obsolete, of_average, unwrapped
from curvcli.files.safe import check_finite
from curvcli.files.tensors import TensorInfo
from curvcli.models.base import Architecture
from curvcli.models.registered import configured, of_network, twice_differentiable
from curvcli.models.user_code import blamed, imported


def beside(path: Path) -> Architecture | None:
    """The transformers architecture whose config.json lies in a checkpoint's directory or up to two above it."""
    found = config_beside(path)
    return configured(found.parent) if found else None


def config_beside(path: Path) -> Path | None:
    """The config.json that says which network a checkpoint is of, where it has none of its own in another form.

    Above the checkpoint there may be one of the job (torchtitan writes its own beside `checkpoint/`): it is passed over.
    """
    start = path if path.is_dir() else path.parent
    if (start / "config.json").is_file():
        return start / "config.json"
    # Two above are enough for checkpoint-N/pytorch_model_fsdp_0 in a run; further up lies what is none of the run's.
    above = (d / "config.json" for d in start.absolute().parents[:2])
    return next((file for file in above if file.is_file() and of_network(file)), None)


def named(spec: str) -> Architecture:
    """The architecture that --model names: package.module:factory, or a transformers configuration.

    A factory, or a class, takes no arguments and gives the network as it was trained, in any state: its weights are
    filled in. It is the user's own code and is imported here.

    Raises:
        UsageError: neither, or the user's code fails.
        InputError: the configuration is not readable.
    """
    place = Path(spec)
    if place.is_dir() or place.suffix == ".json":
        return configured(place)
    if ":" not in spec:
        raise UsageError(
            f"--model {spec} is neither a directory with a config.json nor package.module:factory",
            hint="name one of the two",
        )
    factory = imported(spec, "--model")

    def build() -> nn.Module:
        with blamed(f"--model {spec}"):
            model = factory()
        if not isinstance(model, nn.Module):
            raise UsageError(f"--model {spec} gave a {type(model).__name__}", hint="return a torch.nn.Module")
        # Second derivatives in bfloat16 are off by a per cent; the device is chosen later, for model and data at once.
        model.float()._apply(lambda t: t if t.is_meta else t.cpu())
        twice_differentiable(model)
        return model

    return Architecture(name=spec, build=build)


def needed(architecture: Architecture | None, path: Path) -> Architecture:
    """The architecture named, else the one beside the weights. Raises InputError where there is none."""
    found = architecture or beside(path)
    if found is None:
        raise InputError(
            f"{path} has weights and does not say of which network (no config.json there or above)",
            hint="pass --model package.module:factory, or --model DIR of a transformers config.json",
        )
    return found


def match(model: nn.Module, stored: Mapping[str, Tensor | TensorInfo], path: object) -> dict[str, str]:
    """Stored name by parameter or buffer name of the model, for all of them.

    Wrappers' name parts (torch.compile's, DistributedDataParallel's, FSDP's) do not count, and one prefix that all
    stored names share (as "model.") may be left out. Of tied weights any one name does. What else is stored may be an
    average of the weights, or constants of older versions.

    Args:
        stored: what has a shape, by name.

    Raises:
        InputError: a weight of the model is not stored, or a stored one is none of the model's.
    """
    short = {unwrapped(name): name for name in stored}
    owned = {unwrapped(name): name for name in model.state_dict()}
    # The prefix is one for all, so what stands before the first weight's name is every candidate for it.
    prefixes = {"", *(name.removesuffix(own) for name in short for own in list(owned)[:1] if name.endswith(f".{own}"))}

    def fit(prefix: str) -> tuple[int, bool, int]:
        average = any(averaged(part) for part in prefix.split("."))
        # A file with weights and their average has every name twice: the trained ones are meant, and the shortest prefix.
        return sum(prefix + own in short for own in owned), not average, -len(prefix)

    best = max(prefixes, key=fit)
    found = {name: short[best + own] for own, name in owned.items() if best + own in short}
    # Tied weights are two names of one memory, or of one parameter where there is none yet (on meta).
    pointer = {name: tensor.data_ptr() or id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    present = {pointer[name] for name in found}
    missing = [name for name in owned.values() if name not in found and pointer[name] not in present]
    spare = set(short.values()) - set(found.values())
    spare = {name for name in spare if not (of_average(name) or obsolete(name, stored[name].shape))}
    if missing or spare:
        wrong = []
        if missing:
            wrong.append(
                f"{counted(len(missing), 'weight')} of the model {are(len(missing))} not stored, first {missing[0]}"
            )
        if spare:
            wrong.append(f"{counted(len(spare), 'stored weight')} {are(len(spare))} none of the model's, first {min(spare)}")
        raise InputError(
            f"the weights in {path} do not fit the model: {'; '.join(wrong)}",
            hint="name the network that was trained with --model",
        )
    return found


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: object) -> dict[str, str]:
    """Put stored weights into a model, one at a time, so that a lazy mapping costs one tensor of memory.

    Returns:
        `match`'s names, by which optimizer state with the same names is found.

    Raises:
        InputError: names or shapes do not fit, or a weight is NaN or infinite.
    """
    names = match(model, weights, path)
    own = model.state_dict()
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, key in names.items():
            value = weights[key]
            if value.shape != own[name].shape:
                raise InputError(
                    f"{path}: {key} has shape {tuple(value.shape)}, the model's {name} {tuple(own[name].shape)}",
                    hint="name the network that was trained with --model",
                )
            if own[name].untyped_storage().data_ptr() in held:
                own[name].copy_(value)
            else:  # a hook of the model's made it, as of a part of a fused matrix: what is written there is in no weight
                made[name] = value.to(own[name].dtype)
    _take(model, made, path)
    model.eval()
    check_finite(model)
    return names


def _take(model: nn.Module, made: Mapping[str, Tensor], path: object) -> None:
    """Entries that are not the model's own tensors, by its own way of loading them. Raises InputError where it has none."""
    if not made:
        return
    try:
        model.load_state_dict(dict(made), strict=False)
    except Exception as error:
        message = f"{path}: the model does not load {min(made)}: {error}"
        raise InputError(message[:500], hint="mend its load_state_dict hooks") from error
    now = model.state_dict()
    lost = [name for name, value in made.items() if not torch.equal(now[name].cpu(), value.cpu())]
    if lost:
        raise InputError(
            f"{path}: the model's state_dict has {lost[0]}, made of other weights, and its load_state_dict does not take it",
            hint="give the network a load_state_dict hook that undoes the other, or name one that stores its parameters",
        )
