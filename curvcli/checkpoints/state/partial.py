"""An optimizer with fewer parameters than the model, or in groups of its own: the assignments that its shapes admit.

Known are the order within a group, which is the model's own, and every shape. Of all ways to fill the groups those
count in which a layer is frozen as a whole or not at all, the matrices of a layer share a group, and so do its vectors,
and groups that take the layers apart take them in ascending or in descending order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

Shape = tuple[int, ...]
MOST = 64  # assignments between which gradients are asked to decide
_STEPS = 200_000  # of the search, whose ways multiply with every layer of equal shapes
_FROZEN = -1


@dataclass(frozen=True)
class _Slot:
    """A parameter, the layer that it is in (or it alone), and whether it is a matrix."""

    name: str
    shape: Shape
    layer: tuple[str, int]
    matrix: bool


def assignments(groups: Sequence[Sequence[Shape]], parameters: Mapping[str, Tensor]) -> list[list[list[str]]]:
    """Names for every place of every group, in each of the ways that fit; none where there are more than `MOST`."""
    slots = [_slot(name, parameter) for name, parameter in parameters.items()]
    found: list[list[list[str]]] = []
    # Groups by layer, as of layer-wise learning rates, begin at the bottom or at the top.
    for direction in (1, -1):
        for names in _filled(groups, slots, direction):
            if names is None or len(found) == MOST:
                return []
            if names not in found:
                found.append(names)
    return found


def left_out(names: Sequence[Sequence[str]], parameters: Mapping[str, Tensor]) -> list[str]:
    """What no group has: layers as a whole, else parameters."""
    taken = {name for group in names for name in group}
    layers = {name: _layer(name) for name in parameters}
    mixed = {layers[name] for name in taken}
    return list(
        dict.fromkeys(
            name if layers[name][1] < 0 or layers[name] in mixed else f"{layers[name][0]}.{layers[name][1]}"
            for name in parameters
            if name not in taken
        )
    )


def _slot(name: str, parameter: Tensor) -> _Slot:
    return _Slot(name, tuple(parameter.shape), _layer(name), parameter.dim() >= 2)


def _layer(name: str) -> tuple[str, int]:
    parts = re.fullmatch(r"(.*?)\.(\d{1,9})\..*", name)
    return (parts[1], int(parts[2])) if parts else (name, -1)


def _filled(groups: Sequence[Sequence[Shape]], slots: list[_Slot], direction: int) -> Iterator[list[list[str]] | None]:
    """Depth first over the parameters in order; None where that takes too long."""
    Choice = dict[tuple[tuple[str, int], bool], int]
    stack: list[tuple[int, tuple[int, ...], Choice]] = [(0, (0,) * len(groups), {})]
    wanted = sum(len(group) for group in groups)
    steps = 0
    while stack:
        place, filled, chosen = stack.pop()
        while place < len(slots):
            steps += 1
            if steps > _STEPS:
                yield None
                return
            # More places left than parameters: this way cannot end well.
            if wanted - sum(filled) > len(slots) - place:
                break
            slot = slots[place]
            options = _options(groups, slot, filled, chosen, direction)
            if not options:
                break
            unit = (slot.layer, slot.matrix)
            for other in options[1:]:
                stack.append((place + 1, _after(filled, other), {**chosen, unit: other}))
            # Alternatives on the stack share the dictionary, so it is replaced and never changed.
            chosen = chosen if unit in chosen else {**chosen, unit: options[0]}
            filled, place = _after(filled, options[0]), place + 1
        else:
            if sum(filled) == wanted:
                yield _names(groups, slots, chosen)


def _options(
    groups: Sequence[Sequence[Shape]],
    slot: _Slot,
    filled: tuple[int, ...],
    chosen: Mapping[tuple[tuple[str, int], bool], int],
    direction: int,
) -> list[int]:
    """The groups whose next place takes the parameter, and `_FROZEN` where that may be."""
    fits = [g for g, shapes in enumerate(groups) if filled[g] < len(shapes) and shapes[filled[g]] == slot.shape]
    if (before := chosen.get((slot.layer, slot.matrix))) is not None:
        return [before] if before == _FROZEN or before in fits else []
    sibling = chosen.get((slot.layer, not slot.matrix))
    stack, index = slot.layer
    earlier = [g for ((s, i), m), g in chosen.items() if (s, m) == (stack, slot.matrix) and 0 <= i < index and g != _FROZEN]
    if earlier:
        fits = [g for g in fits if (g - earlier[-1]) * direction >= 0]
    if sibling == _FROZEN:
        return [_FROZEN]
    return fits if sibling is not None else [*fits, _FROZEN]


def _after(filled: tuple[int, ...], group: int) -> tuple[int, ...]:
    return filled if group == _FROZEN else (*filled[:group], filled[group] + 1, *filled[group + 1 :])


def _names(
    groups: Sequence[Sequence[Shape]], slots: list[_Slot], chosen: Mapping[tuple[tuple[str, int], bool], int]
) -> list[list[str]]:
    names: list[list[str]] = [[] for _ in groups]
    for slot in slots:
        if (group := chosen[slot.layer, slot.matrix]) != _FROZEN:
            names[group].append(slot.name)
    return names
