"""State as others store it, as torch names it: bitsandbytes' moments of 32 or 8 bits, Moonlight's, GaLore's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from curvcli.errors import InputError
from curvcli.optimizers.projected import unprojected

# What it quantises is under this key of each parameter's state, and what it does not quantise too.
_NESTED = "__bnb_optimizer_quant_state__"
_MOMENTS = {"exp_avg": ("state1", None), "exp_avg_sq": ("state2", None)}
# AdEMAMix keeps its two averages on top of each other.
_STACKED = {"exp_avg": ("state1", 0), "exp_avg_slow": ("state1", 1), "exp_avg_sq": ("state2", None)}
# Of the parameters that follow AdamW inside Moonlight's Muon.
_NUMBERED = {"moment1": "exp_avg", "moment2": "exp_avg_sq"}
_SCALES = frozenset({"qmap1", "qmap2", "absmax1", "absmax2"})
_BLOCKS = (256, 2048)  # of releases from 0.44 on, and of those before: what is quantised has 4,096 entries or more


def as_torch(entry: Mapping[str, Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parameter's state with two moments under torch's names, read when it is asked for; any other as it is.

    Args:
        options: of its group; three betas are AdEMAMix's.
    """
    entry = unprojected(_flat(entry))
    if set(entry) >= set(_NUMBERED):
        return {_NUMBERED.get(key, key): entry[key] for key in entry}
    if not {"state1", "state2"} <= set(entry):
        return entry
    scales = {key for key in entry if key.startswith(("absmax", "qmap", "max", "new_max"))}
    if scales and scales != _SCALES:
        return entry  # refused by its looks
    betas = options.get("betas")
    return _Moments(entry, _STACKED if isinstance(betas, (list, tuple)) and len(betas) == 3 else _MOMENTS)


def unseen(state: Mapping[str, Mapping[str, Any]]) -> tuple[int, int] | None:
    """Entries of quantised second moments, and those of them stored as 0 though their first moment is not.

    None where nothing is quantised.
    """
    quantised = [entry for entry in state.values() if isinstance(entry, _Moments) and entry.quantised]
    if not quantised:
        return None
    small = sum(int(((entry["exp_avg_sq"] == 0) & (entry["exp_avg"] != 0)).sum()) for entry in quantised)
    return sum(entry["exp_avg_sq"].numel() for entry in quantised), small


def dequantised(codes: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """Numbers in float32 from codes of 8 bits: values[code] times the scale of the code's block.

    Args:
        codes: uint8, any shape.
        values: (256,), what each code stands for, in [-1, 1].
        scales: (blocks,), the largest magnitude of each run of 256 entries, 2,048 in old files.

    Raises:
        InputError: there are not as many scales as blocks.
    """
    count = codes.numel()
    size = next((size for size in _BLOCKS if -(-count // size) == scales.numel()), None)
    if size is None or codes.dtype != torch.uint8 or values.numel() != 256:
        raise InputError(
            f"a quantised moment has {count} entries in {codes.dtype}, {scales.numel()} scales and {values.numel()} values",
            hint="the optimizer state is damaged: use another checkpoint",
        )
    if codes.is_meta:
        return torch.empty(codes.shape, device="meta")
    # Whole blocks are scaled in place, and then what is left of the last: no second tensor of that size.
    found = values.float().reshape(-1)[codes.reshape(-1).int()]
    whole = count // size * size
    found[:whole].view(-1, size).mul_(scales[: count // size].float()[:, None])
    found[whole:].mul_(scales[-1].float())
    return found.view(codes.shape)


class _Moments(Mapping[str, Any]):
    """A parameter's state under torch's names. What is quantised is dequantised once, and kept."""

    def __init__(self, entry: Mapping[str, Any], places: Mapping[str, tuple[str, int | None]]) -> None:
        self._entry, self._places = entry, places
        self._rest = [key for key in entry if key not in _SCALES | {"state1", "state2"}]
        self._kept: dict[str, Tensor] = {}
        self.quantised = "qmap1" in entry

    def __getitem__(self, key: str) -> Any:
        if key in self._kept:
            return self._kept[key]
        if key in self._places:
            return self._moment(key, *self._places[key])
        if key in self._rest:
            return self._entry[key]
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        yield from (*self._rest, *self._places)

    def __len__(self) -> int:
        return len(self._rest) + len(self._places)

    def _moment(self, key: str, place: str, row: int | None) -> Any:
        value = self._row(place, row)
        if not self.quantised or not isinstance(value, Tensor) or value.is_floating_point():
            return value
        values, scales = self._entry[f"qmap{place[-1]}"], self._row(f"absmax{place[-1]}", row)
        if not isinstance(values, Tensor) or not isinstance(scales, Tensor):
            raise InputError(
                f"quantised optimizer state {place!r} has no values or no scales",
                hint="it is damaged: use another checkpoint",
            )
        self._kept[key] = dequantised(value, values.to(value.device), scales.to(value.device))
        return self._kept[key]

    def _row(self, key: str, row: int | None) -> Any:
        value = self._entry[key]
        if row is None or not isinstance(value, Tensor):
            return value
        if value.dim() < 1 or len(value) != 2:
            raise InputError(
                f"optimizer state {key!r} has shape {tuple(value.shape)}, not two averages",
                hint="the optimizer state is damaged: use another checkpoint",
            )
        return value[row]


class Renamed(Mapping[str, Any]):
    """State under other names, read when it is asked for."""

    def __init__(self, entry: Mapping[str, Any], stored: Mapping[str, str]) -> None:
        self._entry, self._stored = entry, stored
        self._names = {old: new for new, old in stored.items()}

    def __getitem__(self, key: str) -> Any:
        return self._entry[self._stored.get(key, key)]

    def __iter__(self) -> Iterator[str]:
        return (self._names.get(key, key) for key in self._entry)

    def __len__(self) -> int:
        return len(self._entry)


def _flat(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is nested, beside the rest; torch.distributed.checkpoint flattens it itself, to "prefix.state1"."""
    if not any(key.startswith(_NESTED) for key in entry):
        return entry
    inner = entry.get(_NESTED)
    flat = {key: key.removeprefix(f"{_NESTED}.") for key in entry if key != _NESTED}
    entry = Renamed({k: entry[k] for k in flat}, {new: old for old, new in flat.items()})
    return {**entry, **inner} if isinstance(inner, Mapping) else entry
