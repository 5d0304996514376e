"""From files to a report: the checkpoint, its data and its optimizer, put together and measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvcli import documents
from curvcli.analysis.api import Estimated, analyze, check_effort
from curvcli.analysis.config import find_config
from curvcli.analysis.dividing import settle
from curvcli.analysis.document import Provenance
from curvcli.analysis.options import Options as Options  # whoever opens a checkpoint needs them
from curvcli.analysis.plan import limit_of
from curvcli.analysis.stages import Progress
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.arguments import SMOOTHED
from curvcli.checkpoints.base import Checkpoint
from curvcli.checkpoints.state.evidence import Evidence, choose, contradictions, gather
from curvcli.checkpoints.state.mapping import AmbiguousStateError
from curvcli.checkpoints.state.soundness import state_findings, weight_findings
from curvcli.curvature import resources
from curvcli.curvature.gathering import Weights
from curvcli.curvature.problem import Loss
from curvcli.curvature.ranks import agreed, current
from curvcli.data.examples import Examples
from curvcli.data.shards import Shard
from curvcli.data.tasks import LOSSES, left_out, loss_for, predictions, prepared, read_data, unigram_loss
from curvcli.errors import InputError, OutOfTime, UsageError, exhausted, memory_named
from curvcli.files.safe import mapped
from curvcli.models.architecture import named
from curvcli.models.base import Architecture, Task
from curvcli.models.slices import WholeOnlyError
from curvcli.models.user_code import blamed
from curvcli.optimizers import optimizer_names, rule_named
from curvcli.optimizers.base import Group, OptimizerView
from curvcli.optimizers.given import at_gradient, at_logged, check_known, override, scaled

DEFAULT_TOKENS = 8192


@dataclass(frozen=True)
class Ready:
    """What is measured, in memory, and what the report says of where it is from."""

    model: nn.Module
    batches: list[Any]
    optimizer: OptimizerView | Estimated | None
    weights: list[float]
    provenance: Provenance
    divided: Weights | None = None  # the model's, where processes hold slices of them


@dataclass(frozen=True)
class Opened:
    """A checkpoint and its data, read and not yet measured. `options` have no configuration left to look up."""

    checkpoint: Checkpoint
    read: Shard | Examples
    task: Task
    loss: Loss
    options: Options

    def measure(
        self, progress: Progress | None = None, on_verdict: Callable[[documents.Report], None] | None = None
    ) -> documents.Report:
        """Build the model and measure. Raises CurvError; OutOfTime where not even the full model was reached.

        Args:
            on_verdict: as of `analyze`.
        """
        options = self.options
        with memory_named(f"while {self.checkpoint.path} is measured"):
            ready = self.ready()
            return analyze(
                ready.model,
                self.loss,
                ready.batches,
                ready.optimizer,
                weights=ready.weights,
                mode=options.mode,
                tolerance=options.tolerance,
                max_hvps=options.max_hvps,
                seed=options.seed or 0,
                progress=progress,
                deadline=options.deadline,
                parts=options.parts,
                depths=options.depths,
                truncated=options.truncated,
                memory=options.memory,
                shard=ready.divided or ("all" if options.shard else None),
                on_verdict=on_verdict,
                provenance=ready.provenance,
            )

    def ready(self) -> Ready:
        """Build the model, and put it, the batches and the optimizer together. Raises CurvError, and OutOfTime."""
        options = self.options
        _in_time(options)
        device = _device(options.device)
        resources.reset_peak(device)
        if device.type == "cpu" and options.memory is not None:
            resources.return_blocks()  # what reading takes counts, too
        elif device.type == "cpu":
            resources.keep_blocks()
        model, divided, why = self._model(device)
        if divided:
            why |= settle(divided, model, options.mode, limit_of(options.memory))[1]
        with divided.whole() if divided else nullcontext():
            return self._with(model, device, divided, why)

    def _model(self, device: torch.device) -> tuple[nn.Module, Weights | None, dict[str, str]]:
        """The model; where processes divide it, its weights in slices if they can be read so, else why not, as a note."""
        checkpoint, why = self.checkpoint, "their format does not say where one tensor lies"
        if self.options.shard and checkpoint.divisible is not None:
            try:
                return *checkpoint.divisible().divided(current(), device), {}
            except WholeOnlyError as error:
                why = str(error)
        notes = {"weights-read-whole": f"every rank read the whole weights before it divided them: {why}"}
        return checkpoint.model().to(device), None, notes if self.options.shard else {}

    def _with(self, model: nn.Module, device: torch.device, divided: Weights | None, why: dict[str, str]) -> Ready:
        checkpoint, options = self.checkpoint, self.options
        plain = self.loss in LOSSES.values()
        # A loss of the user's may smooth labels as the run's did.
        found = [*(f for f in checkpoint.findings if plain or f.code != SMOOTHED), *weight_findings(model)]
        shard = prepared(self.read, self.task, model, checkpoint, options.seed or 0)

        def evidence() -> Evidence:
            # Up to 32 gradients, of rows that are measured anyway, and of no more at once.
            rows = min(size, max(1, 8192 // (shard.sequence_length or 1) // 32))
            try:
                with current().together():  # where weights are divided, all have to go on with single rows
                    return gather(model, self.loss, [_to(part, device) for part in shard.batches(rows)[:32]])
            except Exception as error:
                if rows == 1 or not exhausted(error):
                    raise
            return gather(model, self.loss, [_to(part, device) for part in shard.batches(1)[:32]])

        size = options.batch_size or _batch_size(shard, checkpoint)
        batches = [_to(b, device) for b in shard.batches(size)]
        try:
            # One cheap pass, so that what is wrong in the network is said as such, and at once.
            # Where weights are divided, all have to hear of one that had no memory for it.
            with current().together(), torch.no_grad(), blamed(f"the forward pass of {checkpoint.architecture}"):
                self.loss(model, batches[0])
        except Exception as error:
            if not exhausted(error):
                raise  # smaller batches may do
        _in_time(options)
        with mapped() if options.shard else nullcontext():
            put = divided.put if divided else None
            optimizer, lr_source, notes = _optimizer(checkpoint, model, options, evidence, found, put)
            optimizer, said = _clipped(checkpoint, optimizer, options.clip)
            notes |= said
        notes |= why
        if isinstance(self.read, Shard) and isinstance(shard, Examples):
            positions = len(self.read.windows) * self.read.sequence_length
            notes["masked-positions"] = (
                f"{shard.tokens:,} of {positions:,} positions were replaced by the mask token, "
                "by the seed, and are what the loss averages over; no special tokens were added"
            )
        unigram = unigram_loss(shard, self.task) if plain else None
        if plain and isinstance(shard, Examples) and (unused := left_out(model, shard.columns)):
            notes["unused-columns"] = f"{', '.join(unused)[:200]}: the model's forward has no such input; left out"
        return Ready(
            model,
            batches,
            optimizer,
            weights=[predictions(b, self.task) for b in batches],
            provenance=Provenance(
                checkpoint=lambda parameters, layers: documents.Checkpoint(
                    path=str(checkpoint.path),
                    format=checkpoint.format,
                    step=checkpoint.step,
                    parameters=parameters,
                    layers=layers,
                ),
                data=lambda loss: self.data(loss, shard.tokens, unigram),
                lr_source=lr_source,
                notes={**checkpoint.notes, **notes},
                findings=tuple(found),
                logged_loss=checkpoint.training_loss,
                log=checkpoint.log,
                unigram=unigram,
            ),
            divided=divided,
        )

    def data(self, loss: float, tokens: int, unigram: float | None) -> documents.Data:
        """What the report says of the data.

        Args:
            tokens: predictions, which are fewer than the tokens read where only masked ones count.
            unigram: entropy of what is predicted, by frequencies alone.
        """
        read = self.read
        stream = read if isinstance(read, Shard) else None
        if isinstance(read, Shard):
            files = [documents.DataFile(path=str(s.path), kind=s.kind, tokens=s.tokens) for s in read.sources]
        else:
            files = [documents.DataFile(path=str(path), kind=kind) for path, kind in read.files]
        return documents.Data(
            path=str(read.path),
            files=files,
            sample=stream.sample if stream else "first",
            offsets=stream.offsets if stream else [],
            tokens=tokens,
            sequence_length=read.sequence_length,
            sha256=read.sha256,
            loss=loss,
            unigram_loss=unigram,
        )


def open_for_analysis(path: Path, options: Options) -> Opened:
    """Headers of a checkpoint, its configuration and its data. Raises CurvError."""
    check_effort(options.tolerance, options.max_hvps, depths=options.depths, truncated=options.truncated)
    device = str(_device(options.device))
    checkpoint = open_checkpoint(path, architecture_of(options.model))
    options, data = _configured(replace(options, device=device, memory=limit_of(options.memory)), checkpoint)
    task, loss = loss_for(options.loss, checkpoint.task)
    read = read_data(
        data,
        checkpoint,
        task,
        tokens=options.tokens or DEFAULT_TOKENS,
        sequence_length=options.sequence_length,
        sample=options.sample or "first",
        seed=options.seed or 0,
    )
    return Opened(checkpoint, read, task, loss, options)


def analyze_checkpoint(
    path: Path,
    options: Options,
    progress: Progress | None = None,
    on_verdict: Callable[[documents.Report], None] | None = None,
) -> documents.Report:
    """`curv analyze`: read a checkpoint and a shard, and measure.

    Args:
        on_verdict: called with a report of the full model as soon as that is known; layers and depths are "skipped" in it.

    Raises:
        CurvError: it cannot be read or measured.
        OutOfTime: not even the full model was reached before the deadline of `options`.
    """
    (progress or (lambda stage, done: None))("reading", 0.0)
    return open_for_analysis(path, options).measure(progress, on_verdict)


def _configured(options: Options, checkpoint: Checkpoint) -> tuple[Options, Path | Sequence[Path]]:
    config, file = find_config(checkpoint.path, data=options.data is None)
    said = config.model_dump(exclude={"gate"}, exclude_none=True)
    merged = replace(options, **{key: value for key, value in said.items() if getattr(options, key) is None})
    if merged.data is None:
        where = f"{file} names none" if file else "no curv.toml lies beside or above the checkpoint"
        raise UsageError(f"no data shard: --data was not given and {where}", hint="pass --data FILE of training tokens")
    return merged, merged.data


def _named(optimizer: str | None) -> str | None:
    """The optimizer that --optimizer names, as torch spells it. Raises UsageError."""
    offered = (*optimizer_names(), "none")
    names = {n.lower(): n for n in offered}
    if optimizer is not None and optimizer.lower() not in names:
        raise UsageError(f"unknown optimizer {optimizer!r}", hint=f"one of: {', '.join(offered)}")
    return names[optimizer.lower()] if optimizer else None


def _clipped(
    checkpoint: Checkpoint, optimizer: OptimizerView | Estimated | None, given: float | None
) -> tuple[OptimizerView | Estimated | None, dict[str, str]]:
    """An optimizer that knows what clipping left of a gradient, by the user or the run's record, and a note."""
    if isinstance(optimizer, OptimizerView):
        return checkpoint.clipping.counted(optimizer, given)
    if given is None:
        return optimizer, {}
    said = "the second moment is estimated of gradients that nobody clips: no --clip counts"
    return optimizer, {"clipping-not-counted": said}


def _optimizer(
    checkpoint: Checkpoint,
    model: nn.Module,
    options: Options,
    evidence: Callable[[], Evidence],
    found: list[documents.Finding],
    put: Callable[[str, Tensor], object] | None,
) -> tuple[OptimizerView | Estimated | None, Literal["checkpoint", "log", "schedule", "option", "none"], dict[str, str]]:
    given: dict[str, Any] = {
        "lr": options.lr,
        "betas": options.betas,
        "eps": options.eps,
        "weight_decay": options.weight_decay,
        "momentum": options.momentum,
    }
    given = {k: v for k, v in given.items() if v is not None}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    name = _named(options.optimizer)
    if name == "none":
        given |= {} if options.clip is None else {"clip": options.clip}
        if given:
            raise UsageError(f"--optimizer none takes no {', '.join(sorted(given))}", hint="drop them, or name an optimizer")
        return None, "none", {}
    if checkpoint.optimizer is None:
        lr_source: Literal["option", "none"] = "option" if options.lr is not None else "none"
        rule = rule_named(name or "AdamW")
        if not rule.state:
            check_known(rule, given)
            return OptimizerView((Group(tuple(parameters), given),), {}, name, vouched=True), lr_source, {}
        if rule.defaults is None:
            raise InputError(
                f"{checkpoint.path} has no optimizer state, and {name}'s cannot be estimated",
                hint="give a checkpoint with optimizer state, or --optimizer adamw",
            )
        check_known(rule, given)
        return Estimated({**rule.defaults, **given}), lr_source, {}
    gradients = evidence()
    try:
        view = checkpoint.optimizer.view(model)
    except AmbiguousStateError as error:
        # Several assignments of state to parameters fit by shape: gradients decide between them.
        view, finding = choose(error, gradients)
        found.append(finding)
    # Not the learning rate, which scales all groups below: one value for all would lose their ratios.
    view = override(replace(view, name=name, vouched=True) if name else view, **{**given, "lr": None})
    view = at_gradient(view, parameters, put)
    found += state_findings(view, checkpoint.step, checkpoint.optimizer.path)
    found += contradictions(view, gradients, checkpoint.optimizer.path)
    if options.lr is not None:
        return scaled(view, parameters, options.lr), "option", {}
    rates = [group.number("lr") for group in view.groups]
    if any(rates):
        return view, "checkpoint", {}
    if checkpoint.last_lr is None:
        scaled(view, parameters, 1.0)  # where the groups' ratios are lost, --lr would not help: say so at once
        raise InputError(
            f"the learning rate in {checkpoint.optimizer.path} is 0 and the run's log has none",
            hint="pass the one in force with --lr",
        )
    return at_logged(view, checkpoint.last_lr), checkpoint.last_lr_source, {}


def architecture_of(model: str | None) -> Architecture | None:
    """The network that --model names, where it is given. Raises CurvError."""
    return named(model) if model is not None else None


def _in_time(options: Options) -> None:
    if options.deadline < inf and agreed(time.monotonic() >= options.deadline)[0]:
        raise OutOfTime


def _to(batch: Tensor | dict[str, Tensor], device: torch.device) -> Tensor | dict[str, Tensor]:
    return batch.to(device) if isinstance(batch, Tensor) else {name: column.to(device) for name, column in batch.items()}


def _batch_size(shard: Shard | Examples, checkpoint: Checkpoint) -> int:
    """Rows per batch: logits of at most 2^26 values, pixels of 2^22, and at least 4 batches so that prefixes differ."""
    rows, pixels = len(shard.windows) if isinstance(shard, Shard) else shard.rows, 1
    if isinstance(shard, Examples):
        pixels = max([1, *(column[0].numel() for column in shard.columns.values() if column.is_floating_point())])
    by_memory = max(1, 2**26 // ((shard.sequence_length or 1) * (checkpoint.vocabulary or 2**16)))
    return max(1, min(by_memory, 2**22 // pixels, rows // 4))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and (ranks := current()).world > 1:
        if ranks.here > torch.cuda.device_count():
            raise UsageError(
                f"{ranks.here} ranks on this machine, and {torch.cuda.device_count()} GPUs",
                hint="start as many ranks as there are GPUs, or pass --device cpu",
            )
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        # torch.device accepts any index; only an allocation shows that the device is there.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} is not usable here: {str(error).splitlines()[0][:120]}", hint="pass --device cpu"
        ) from error
    return device
