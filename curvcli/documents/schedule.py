"""The freeze/unfreeze schedule that a training job obeys: "curv.schedule/1"."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from curvcli.documents.base import MOST, Document, Finding, Versions, read_document
from curvcli.documents.resting import BLOCK_PATTERN, OUTPUT_PATTERN, POST_NORMS
from curvcli.documents.shown import Shown

Order = Literal["last", "first", "interleaved"]
LrKind = Literal["constant", "linear", "cosine", "wsd", "inverse-sqrt", "csv"]
Step = Annotated[int, Field(ge=0, le=MOST)]
DEEPEST = 10_000  # blocks of a model, at most


class LrSchedule(Document):
    """Learning rate over steps, as `curvcli.schedules.lr.lr_at` computes it; formulas are those of transformers."""

    kind: LrKind
    peak: float = Field(gt=0)
    warmup_steps: Step
    total_steps: Annotated[int, Field(gt=0)] | None = Field(description="needed by linear, cosine and wsd")
    min_ratio: float = Field(default=0.0, ge=0, le=1, description="least learning rate over peak")
    decay_steps: Step | None = Field(default=None, description="wsd: length of the decay at the end")
    points: list[tuple[Step, float]] | None = Field(default=None, description="csv: (step, lr), steps rising")

    @model_validator(mode="after")
    def _computable(self) -> Self:
        """Every step has a learning rate, or the document is refused: a default would be a wrong one."""
        kind, total, decay = self.kind, self.total_steps, self.decay_steps
        if kind in ("linear", "cosine", "wsd") and total is None:
            raise ValueError(f"a {kind} schedule needs its total steps")
        if (kind == "wsd") != (decay is not None):
            raise ValueError("decay steps are needed by wsd" if kind == "wsd" else f"a {kind} schedule has no decay steps")
        if total is not None and (total <= self.warmup_steps or total < self.warmup_steps + (decay or 0)):
            raise ValueError(f"warm-up of {self.warmup_steps} and decay of {decay or 0} steps do not fit into {total}")
        # Refused and not passed over: transformers' constant and inverse-sqrt have no least one either.
        if self.min_ratio and kind not in ("linear", "cosine", "wsd"):
            raise ValueError(f"a {kind} schedule has no least learning rate")
        if (kind == "csv") != bool(self.points):
            raise ValueError("points are needed by csv" if kind == "csv" else f"a {kind} schedule has no points")
        steps = [step for step, _ in self.points or ()]
        if any(a >= b for a, b in pairwise(steps)) or any(lr < 0 for _, lr in self.points or ()):
            raise ValueError("steps of the points must rise, and their learning rates not be negative")
        return self


class Phase(Document):
    """From `step` on, the blocks in `active` train; `unlock` are those that join here (at step 0: none).

    In adaptive mode the phase begins between `step` and `latest`, when the measured rho allows.
    """

    step: Step
    latest: Step
    active: list[int] = Field(description="block indices, rising; embedding, head and final norm always train")
    unlock: list[int]
    lr: float | None = Field(description="learning rate at `step`")
    predicted_rho: float | None = Field(
        description="of the active blocks: at `step`, in the first phase at the highest learning rate from its step on, "
        "which is what it has to survive; null without a measurement"
    )


class ScheduleProvenance(Document):
    """What the prediction was made from."""

    report: str | None = Field(description="path of the report that the prediction is from")
    report_sha256: str | None
    checkpoint: str | None = Field(description="path of the checkpoint that was measured")
    versions: Versions


class Resting(Document):
    """A parameter that has one value in all its entries while its block is locked, so that the block is the identity."""

    name: str = Field(description="in the model, as named_parameters() has it")
    block: Annotated[int, Field(ge=0, le=DEEPEST)]
    value: float = Field(description="0; -1 for a norm whose gain is 1 + weight")


class LockRule(Document):
    """What `blocks` and `resting` follow from, by names alone: regular expressions as Python and ECMAScript have them.

    A norm that stands behind a projection rests in the projection's place, at the value at which its output is 0. Which that
    is depends on its arithmetic, and no pattern says it: `resting` does.
    """

    block: str = Field(
        default=BLOCK_PATTERN,
        description="of a parameter's name in the model; groups 1 to 3 are its stack, the index of its block and its name "
        "within; of several stacks the one with `depth` blocks and most weights counts",
    )
    output: str = Field(default=OUTPUT_PATTERN, description="searched in a name within a block: it rests at 0, in mode grow")
    post_norms: list[tuple[str, str]] = Field(
        default=list(POST_NORMS),
        description="children of a block: where it has both of a pair, these rest instead, and `output` does not count",
    )


class Schedule(Shown, Document):
    """What `curv schedule` writes. The state of every block is a pure function of the global step.

    A locked block takes no update: none of its parameters has a gradient when the optimizer steps, nor counts in a clipped
    norm. The blocks that are locked at a step are those that `active` of the phase in force leaves out; everything outside
    of blocks trains.

    grow: at the first phase's step the parameters in `resting` of the locked blocks are set to their value, which makes such
    a block the identity, until it joins. With lock residual-gate all blocks train from the start, and a block that takes x
    gives x + alpha (block(x) - x), alpha by `gates`.
    freeze: a locked block keeps its weights.
    """

    schema_: Literal["curv.schedule/1"] = Field(default="curv.schedule/1", alias="schema")
    mode: Literal["grow", "freeze"]
    depth: Annotated[int, Field(gt=0, le=DEEPEST)]
    order: Order = Field(description='which blocks are locked at first; "first" is in old documents only')
    blocks: list[str] | None = Field(description="module path of each block; null where only the depth was known")
    lock: Literal["zero-output", "no-update", "residual-gate"] = Field(
        description="how a block is locked: grow, freeze; or, growing too, behind a gate that opens as the run goes on"
    )
    resting: list[Resting] | None = Field(
        default=None,
        description="of every block, in mode grow; null where no model was asked (then `rule` says it), in mode freeze and "
        "with residual-gate, where nothing rests",
    )
    rule: LockRule | None = Field(default=None, description="null in documents of older versions, and with residual-gate")
    gates: list[Step] | None = Field(
        default=None,
        description="of residual-gate: step at which each block's is open, alpha = min(step / it, 1); 0 is no gate",
    )
    margin: float | None = Field(description="largest rho that the prediction allows; null without a measurement")
    lr_schedule: LrSchedule | None
    phases: Annotated[list[Phase], Field(min_length=1)]
    findings: list[Finding]
    provenance: ScheduleProvenance

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        everything = set(range(self.depth))
        before: set[int] = set()
        last = -1
        for number, phase in enumerate(self.phases):
            active, unlock = set(phase.active), set(phase.unlock)
            where = f"phase {number} (step {phase.step})"
            if len(active) < len(phase.active) or len(unlock) < len(phase.unlock):
                raise ValueError(f"{where} names a block twice")
            if not active <= everything:
                raise ValueError(f"{where} names block {max(active)} of {self.depth}")
            if phase.step <= last and number:
                raise ValueError(f"{where} does not come after step {last}")
            if phase.latest < phase.step:
                raise ValueError(f"{where} has latest {phase.latest} before its step")
            if number and (not unlock or unlock != active - before or not before <= active):
                raise ValueError(f"{where} unlocks {sorted(unlock)}, but {sorted(active - before)} join in it")
            if not number and unlock:
                raise ValueError(f"{where} is the first and unlocks {sorted(unlock)}")
            before, last = active, phase.step
        self._check_gates()
        if self.blocks is not None and len(self.blocks) != self.depth:
            raise ValueError(f"{len(self.blocks)} block paths for depth {self.depth}")
        if self.resting and (self.mode == "freeze" or {rest.block for rest in self.resting} != everything):
            raise ValueError(f"what rests is not of the {self.depth} blocks of a schedule that grows")
        return self

    def _check_gates(self) -> None:
        if (self.lock == "residual-gate") != (self.gates is not None):
            raise ValueError("gates belong to lock residual-gate, and to it alone")
        if self.gates is None:
            return
        if self.resting:
            raise ValueError("nothing rests behind gates")
        if len(self.gates) != self.depth:
            raise ValueError(f"{len(self.gates)} gates for depth {self.depth}")
        if self.mode != "grow" or len(self.phases) != 1 or len(self.phases[0].active) != self.depth:
            raise ValueError("with lock residual-gate the mode is grow, and all blocks train in one phase")

    def alphas_at(self, step: int) -> list[float]:
        """What each block's residual is multiplied by at a global step: min(step / its gate, 1), and 1 without gates."""
        return [min(step / gate, 1.0) if gate else 1.0 for gate in self.gates or [0] * self.depth]

    def phase_at(self, step: int) -> int:
        """Index of the phase in force at a global step (the first before its own step, too)."""
        return max((i for i, phase in enumerate(self.phases) if phase.step <= step), default=0)

    def locked_at(self, step: int) -> frozenset[int]:
        """Blocks that are locked at a global step."""
        return frozenset(range(self.depth)) - frozenset(self.phases[self.phase_at(step)].active)


def load_schedule(path: Path) -> Schedule:
    """Read a schedule. Raises InputError where the file is no curv.schedule/1."""
    return read_document(Schedule, path, "curv.schedule/1", "write one with curv schedule -o")
