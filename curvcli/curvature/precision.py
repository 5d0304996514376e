"""Float32 means float32: no autocast, no TF32, and weights in half precision measured as copies.

Second derivatives lose twice the digits of first ones: in bfloat16 products are not symmetric, and under a caller's
autocast or TF32 they are wrong in the third digit and look converged.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SUMMED = 2**16  # entries whose products are added up in one accumulator of a CPU
SQUARED = 1e-15  # a norm below it may be made of squares that float32 has not all digits of
HALVES = (torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def exact() -> Iterator[None]:
    """Within it float32 is computed as float32 and derivatives can be had, whatever the caller has set.

    Off: autocast, also where the model or the loss enters it; TF32 and bfloat16 inside products of matrices; inference mode
    and no_grad. Deterministic algorithms warn where they would raise: some second derivatives have none.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        _no_autocast(stack)
        _ieee(stack)
        if torch.get_deterministic_debug_mode() == 2:
            torch.set_deterministic_debug_mode("warn")
            stack.callback(torch.set_deterministic_debug_mode, "error")
        yield


def _no_autocast(stack: ExitStack) -> None:
    for device in _DEVICES:
        if torch.is_autocast_enabled(device):
            torch.set_autocast_enabled(device, False)
            stack.callback(torch.set_autocast_enabled, device, True)
    # Trainers wrap a model's forward in it. Whether it is on belongs to a thread: those of others are left alone.
    here = threading.get_ident()
    entered: Any = torch.autocast.__enter__

    def enter(self: torch.autocast) -> Any:
        found = entered(self)
        if threading.get_ident() == here:
            torch.set_autocast_enabled(self.device, False)
        return found

    torch.autocast.__enter__ = enter  # type: ignore[method-assign]
    stack.callback(setattr, torch.autocast, "__enter__", entered)


def _ieee(stack: ExitStack) -> None:
    backends: Any = torch.backends
    general: list[Any] = []
    special: list[Any] = []
    if hasattr(backends, "fp32_precision"):  # torch 2.9
        cpu, gpu = backends.mkldnn, backends.cudnn
        general = [backends, cpu, gpu]
        special = [cpu.matmul, cpu.conv, cpu.rnn, backends.cuda.matmul, gpu.conv, gpu.rnn]

    # Those of before torch 2.9 are set, too: reading one raises where the two say different things.
    matmul, convolution = _read(torch.get_float32_matmul_precision), _read(lambda: backends.cudnn.allow_tf32)

    def put(switch: Any, value: str) -> None:
        switch.fp32_precision = value

    # A special one that is "none" reads as the general one: without those each is read, and put back, as it is itself.
    for switch in (*general, *special):
        stack.callback(put, switch, switch.fp32_precision)
        put(switch, "none")
    if matmul not in (None, "highest"):
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, matmul)
    if convolution:
        backends.cudnn.allow_tf32 = False
        stack.callback(setattr, backends.cudnn, "allow_tf32", True)
    for switch in special:
        put(switch, "ieee")


def _read(setting: Callable[[], Any]) -> Any:
    try:
        return setting()
    except RuntimeError:  # set in the way of torch 2.9, and not readable in that of before
        return None


@dataclass(frozen=True)
class Lifted:
    """What `lift` did: the parameters whose precision was raised, by name, and the tensors that copies stand for.

    `whole` says that shards were gathered.
    """

    names: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    originals: Mapping[int, Tensor] = field(default_factory=dict)
    whole: bool = False

    def batch(self, value: Any) -> Any:
        """A batch that a lifted model takes: what is in half precision in float32, in containers of the same types."""
        return mapped(value, lambda t: _copied(t) if t.is_inference() or (self.names and t.dtype in HALVES) else t)


def lift(model: nn.Module, *, gather: bool = False) -> Lifted:
    """Put float32 copies in the place of what a model keeps in half precision, and copies of what inference mode made.

    With `gather` whole copies of what is sharded (DTensor), too: all ranks that have a part of it have to call it.

    Only members of modules are exchanged, for `untouched.restored` to put back. The parameters themselves, their gradients
    and hooks, and what holds on to them (an optimizer, DistributedDataParallel) are not touched. Tied weights stay tied.
    """
    copies: dict[int, Tensor] = {}
    originals: dict[int, Tensor] = {}

    def instead(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not (value.is_inference() or value.dtype in HALVES or (gather and hasattr(value, "full_tensor"))):
            return value
        if id(value) not in copies:
            copies[id(value)], originals[id(value)] = _copied(value), value
        return copies[id(value)]

    # Taken first: afterwards the modules hold copies.
    before = dict(model.named_parameters())
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and instead(value) is not value:
                vars(module)[name] = instead(value)
            elif isinstance(value, dict):  # parameters and buffers among them
                value.update({key: instead(part) for key, part in value.items() if instead(part) is not part})
            elif isinstance(value, list) and any(instead(part) is not part for part in value):
                value[:] = [instead(part) for part in value]  # recurrent networks keep their weights in one, too
    raised = {n: p for n, p in before.items() if p.dtype in HALVES}
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in raised.values()})
    return Lifted(tuple(raised), tuple(kinds), originals, gather)


def _copied(value: Tensor) -> Tensor:
    data = value.detach()
    # Cloned even where the precision stays: a tensor made in inference mode cannot be part of a graph.
    data = whole(data).float() if data.dtype in HALVES else whole(data).clone()
    if not isinstance(value, nn.Parameter):
        return data
    copy_of = nn.Parameter(data, requires_grad=value.requires_grad)
    vars(copy_of).update(vars(value))  # marks that a model's own code may look for
    return copy_of


def whole(tensor: Tensor) -> Tensor:
    """A tensor, of one that is sharded (DTensor) its parts of all ranks together, which have to call it alike."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A batch with other tensors: tensors in lists, tuples and mappings, which are copied where a member changes."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        parts = [mapped(part, function) for part in value]
        return value._make(parts) if hasattr(value, "_make") else tuple(parts)
    members = value.items() if isinstance(value, MutableMapping) else enumerate(value) if isinstance(value, list) else ()
    found = value
    for key, part in list(members):
        new = mapped(part, function)
        if new is not part:
            found = copy(value) if found is value else found
            found[key] = new
    return found


def uses(value: Tensor, tensors: Mapping[int, Tensor]) -> bool:
    """Whether a scalar depends on one of some leaves, by identity, along its graph."""
    seen: set[Any] = set()
    # Iterative: the graph of a deep network exceeds Python's recursion limit.
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in tensors:
            return True
        waiting += [following for following, _ in node.next_functions]
    return False


def inner(rows: Tensor, vector: Tensor) -> Tensor:
    """Inner products of vectors, of shape (k, n), with one of shape (n,): shape (k,), in their own precision.

    A CPU's BLAS adds up the whole length in one float32 accumulator a lane: at 124 million entries its products and norms
    are 2.5 % low, at 3 million 1e-4 (measured with torch 2.13), and a Lanczos basis of such vectors looks like that of a
    matrix that is not symmetric. Sums of sums over `SUMMED` entries are good to 1e-6 at any length.
    """
    if len(vector) <= SUMMED:
        return rows @ vector
    if vector.device.type != "cpu":
        # All pieces in one call, as a launch each would take longer than the sums; views, so that nothing is copied.
        even = len(vector) // SUMMED * SUMMED
        parts = rows[:, :even].unflatten(1, (-1, SUMMED)).transpose(0, 1)  # (pieces, k, SUMMED)
        found = torch.bmm(parts, vector[:even].view(-1, SUMMED, 1)).sum(0)[:, 0]
        return found + rows[:, even:] @ vector[even:] if even < len(vector) else found
    pieces = zip(rows.split(SUMMED, dim=1), vector.split(SUMMED), strict=True)
    return torch.stack([some @ piece for some, piece in pieces]).sum(0)


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm of all entries together, in the tensors' own precision: not every device has float64."""
    filled = [t.detach() for t in tensors if t.numel()]
    # Scaled by the largest entry: squares overflow float32 above 1e19.
    sizes = numbers([t.abs().max() for t in filled])
    if any(size != size for size in sizes):
        return float("nan")
    largest = max(sizes, default=0.0)
    if not 0 < largest < float("inf"):
        return largest
    if filled[0].device.type == "cpu":
        return largest * math.hypot(*(length(t, largest) for t in filled))
    return largest * math.hypot(*numbers([torch.linalg.vector_norm(t / largest) for t in filled]))


def numbers(scalars: Sequence[Tensor]) -> list[float]:
    """Tensors of one entry each, all on one device, as numbers: a GPU is waited for once, and not once each."""
    if len(scalars) < 2 or scalars[0].device.type == "cpu":
        return [float(scalar) for scalar in scalars]
    found: list[float] = torch.stack([scalar.detach().reshape(()) for scalar in scalars]).cpu().tolist()
    return found


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry of any is NaN or infinite."""
    return all(numbers([torch.isfinite(tensor).all() for tensor in tensors]))


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, to be added up; as it is on a device that has none (MPS)."""
    return tensor if tensor.device.type == "mps" else tensor.double()


def length(tensor: Tensor, unit: float = 1.0) -> float:
    """Euclidean norm of a tensor in multiples of `unit`, good to rounding at any size (see `inner`)."""
    parts = tensor.flatten().split(SUMMED) if tensor.device.type == "cpu" else [tensor]
    found = math.hypot(*(float(torch.linalg.vector_norm(part if unit == 1 else part / unit)) for part in parts))
    if SQUARED < found < math.inf or unit != 1 or not tensor.numel():
        return found
    # Out of the range in which float32 has squares: what is lost of them would read as no curvature, or as infinite.
    largest = float(tensor.abs().max())
    return largest * length(tensor, largest) if 0 < largest < math.inf and largest != 1 else found
