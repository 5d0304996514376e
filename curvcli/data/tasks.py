"""Losses by task, and the batches that they take.

A loss is the mean cross-entropy of the model's logits over the labels other than -100, in nats. Never the model's own
loss: some divide by another count of tokens, some add terms, and batches are averaged by their counts here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from curvcli.checkpoints.base import Checkpoint
from curvcli.curvature.problem import Loss
from curvcli.data.examples import IGNORED, Examples, holds_examples, labelled, read_examples
from curvcli.data.shards import Sample, Shard, find_paths, read_shard
from curvcli.data.texts import encoded
from curvcli.data.tokens import tokenizer_in
from curvcli.errors import InputError, UsageError
from curvcli.models.base import Task
from curvcli.models.head import plain_head, widest, withheld
from curvcli.models.user_code import blamed, imported

MASKED_SHARE = 0.15  # of positions, as BERT was trained
LOGITS = 2**22  # values (16 MiB) from which on the loss goes over chunks; below, models keep every bit of the plain loss


def causal_loss(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token, in nats.

    Args:
        model: takes ids of shape (batch, sequence) and gives logits for each, as a tensor or an output's `.logits`.
        batch: windows of shape (batch, sequence + 1), or columns with input_ids and labels at the same positions.
    """
    if isinstance(batch, Tensor):
        return _mean_loss(model, {"input_ids": batch[:, :-1]}, batch[:, 1:])
    return _mean_loss(model, batch, _labels(batch)[:, 1:], lambda logits: logits[:, :-1])


def labelled_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the labels of masked positions, decoder positions or whole examples, in nats."""
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind in ("regression", "multi_label_classification"):
        raise UsageError(
            f"config.json says problem_type {kind}, whose loss is not the cross-entropy of classes",
            hint="pass --loss package.module:function of the loss that it was trained with",
        )
    return _mean_loss(model, batch, _labels(batch))


LOSSES: Mapping[Task, Loss] = {
    "causal-lm": causal_loss,
    "masked-lm": labelled_loss,
    "seq2seq": labelled_loss,
    "classification": labelled_loss,
}


def loss_for(spec: str, task: Task) -> tuple[Task, Loss]:
    """The task and the loss that --loss means. Raises UsageError.

    Args:
        spec: "auto", a task, or package.module:function of the user's, called as function(model, batch).
        task: the checkpoint's own.
    """
    if spec == "auto":
        return task, LOSSES[task]
    for known in get_args(Task):
        if spec == known:
            return known, LOSSES[known]
    if ":" not in spec:
        raise UsageError(
            f"unknown loss {spec!r}", hint=f"one of: auto, {', '.join(get_args(Task))}, package.module:function"
        )
    function = imported(spec, "--loss")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with blamed(f"--loss {spec}"):
            value = function(model, batch)
        if not isinstance(value, Tensor):
            raise UsageError(
                f"--loss {spec} returned a {type(value).__name__}", hint="return the mean loss, a scalar tensor"
            )
        return value

    return task, loss


def read_data(
    paths: Path | Sequence[Path],
    checkpoint: Checkpoint,
    task: Task,
    *,
    tokens: int,
    sequence_length: int | None,
    sample: Sample = "first",
    seed: int = 0,
) -> Shard | Examples:
    """What a task averages over: tokens for language models, or examples.

    Args:
        tokens: predictions wanted.

    Raises:
        InputError: not readable, or ids beyond the vocabulary.
    """
    listed = find_paths(paths)
    causal = task == "causal-lm"
    if task in ("seq2seq", "classification") or any(holds_examples(path, causal=causal) for path in listed):
        if sample != "first":
            raise UsageError("examples are read from the beginning of the data", hint="leave out --sample")
        path = listed[0]
        encode = partial(encoded, checkpoint=checkpoint, path=path) if task == "classification" else None
        examples = read_examples(listed, predictions=tokens, shifted=causal, encode=encode)
        if sequence_length is not None:
            raise UsageError(
                f"--sequence-length cuts tokens, and {path} holds examples", hint="drop it, or take it out of curv.toml"
            )
        # A classifier's labels are classes, whose number the logits tell later.
        _in_range(examples, checkpoint.vocabulary, checkpoint.context, labels=task != "classification")
        return examples
    # Of a masked language model only some positions are predictions.
    wanted = tokens if task == "causal-lm" else round(tokens / MASKED_SHARE)
    return read_shard(listed, checkpoint, tokens=wanted, sequence_length=sequence_length, sample=sample, seed=seed)


def prepared(data: Shard | Examples, task: Task, model: nn.Module, checkpoint: Checkpoint, seed: int) -> Shard | Examples:
    """The data as the task's loss takes it: windows masked, the decoder's inputs made from labels. Raises InputError."""
    if isinstance(data, Shard):
        if task == "causal-lm":
            found: Shard | Examples = data
        else:
            found = masked(data, mask_token(model, checkpoint), seed)
    elif task == "seq2seq" and "decoder_input_ids" not in data.columns and "labels" in data.columns:
        found = replace(
            data, columns={**data.columns, "decoder_input_ids": _shifted(model, data.columns["labels"], data.path)}
        )
    else:
        found = data
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if checkpoint.vocabulary is None and sizes:
        # No configuration says the vocabulary; ids past the largest embedding are wrong for certain.
        _in_range(found, max(sizes), None, labels=False)
    return found


def predictions(batch: Tensor | Mapping[str, Tensor], task: Task) -> int:
    """Labels that a batch's mean is over."""
    if isinstance(batch, Tensor):
        return batch.shape[0] * (batch.shape[1] - 1)
    return int(labelled(batch, shifted=task == "causal-lm").sum())


def unigram_loss(data: Shard | Examples, task: Task) -> float | None:
    """Entropy of the targets by their own frequencies, in nats: the loss of a model that knows these and no context.

    Args:
        data: as the task's loss takes it.

    Returns:
        None of tasks whose targets are no tokens of the text that is read, and where nothing is predicted.
    """
    if task not in ("causal-lm", "masked-lm"):
        return None
    if isinstance(data, Shard):
        labels = data.windows[:, 1:]
    elif "labels" in data.columns:
        labels = data.columns["labels"][:, 1:] if task == "causal-lm" else data.columns["labels"]
    else:
        return None
    counts = labels[labels != IGNORED].unique(return_counts=True)[1].double()
    return None if not counts.numel() else float(-(counts / counts.sum() * (counts / counts.sum()).log()).sum())


def masked(shard: Shard, mask: int, seed: int) -> Examples:
    """Windows without their last token, 15 % of each one's positions (one at least) replaced by the mask token.

    Labels are the tokens that were there, and -100 elsewhere. Every chosen position is masked: BERT's recipe leaves a
    tenth of them as they are and puts random tokens on another. The positions depend on the seed and the shape alone.
    """
    ids = shard.windows[:, :-1]  # (windows, sequence_length)
    count = max(1, round(MASKED_SHARE * ids.shape[1]))
    draw = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(ids.shape, dtype=torch.bool).scatter_(1, draw.topk(count, dim=1).indices, True)
    columns = {"input_ids": ids.masked_fill(chosen, mask), "labels": ids.masked_fill(~chosen, IGNORED)}
    return Examples(Path(shard.path), columns, count * len(ids), shard.sha256)


def mask_token(model: nn.Module, checkpoint: Checkpoint) -> int:
    """Id of the mask token, from the configuration or the tokenizer beside the checkpoint. Raises InputError."""
    examples = "examples with masked input_ids and labels (.safetensors, .jsonl)"
    found = getattr(getattr(model, "config", None), "mask_token_id", None)
    if found is None and checkpoint.tokenizer is not None:
        found = tokenizer_in(checkpoint.tokenizer, instead=examples).mask_token_id
    if not isinstance(found, int) or not 0 <= found < (checkpoint.vocabulary or found + 1):
        raise InputError(
            f"{checkpoint.path} does not say which token is the mask ({'none' if found is None else found})",
            hint=f"save the tokenizer beside it, or give {examples}",
        )
    return found


def aligned(model: nn.Module, batch: Tensor | Mapping[str, Tensor], task: Task) -> dict[str, Tensor]:
    """A batch in columns whose labels stand at the positions of their logits: `labelled_loss` of it is the task's loss.

    Without the columns that the model does not take.
    """
    if isinstance(batch, Tensor):
        return {"input_ids": batch[:, :-1], "labels": batch[:, 1:]}
    found = {name: column for name, column in batch.items() if name not in left_out(model, batch)}
    if task == "causal-lm":
        labels = _labels(batch)
        # The last position predicts what the row does not have.
        found["labels"] = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    return found


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of every label other than -100, in nats, of shape (predictions,), in the order of the labels.

    Args:
        batch: as `aligned` gives it.
    """
    labels = _labels(batch)
    logits = _logits(model, batch)
    _check(labels, logits.shape[:-1], logits.shape[-1])
    counted = labels != IGNORED
    return nn.functional.cross_entropy(logits[counted], labels[counted], reduction="none")


def _shifted(model: nn.Module, labels: Tensor, path: Path) -> Tensor:
    """The decoder's inputs by the model's own rule: labels one place later, after its start token."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    try:
        found = make(labels=labels) if make is not None else None
    except (AttributeError, ValueError, TypeError):  # the configuration has no start token, or no padding token
        found = None
    if not isinstance(found, Tensor):
        raise InputError(
            f"{path} has no column decoder_input_ids, and the model cannot make it from labels",
            hint="add the column, or decoder_start_token_id and pad_token_id to config.json",
        )
    return found


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" not in batch:
        raise InputError(
            f"the data have no column labels, only {', '.join(batch)[:200]}",
            hint="add one, with -100 where nothing is predicted",
        )
    return batch["labels"]


def left_out(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The columns that the model's forward does not name: like transformers' Trainer, losses here do not pass them.

    A module of another library's or of one's own that takes any keyword gets all of them.
    """
    parameters = _parameters(model)
    # transformers' models (main_input_name) take **kwargs too, and pass on what nobody looks at.
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not hasattr(model, "main_input_name")
    # What a plain module calls its ids or pixels is its own affair: they are passed by position.
    return [n for n in names if not anything and n not in parameters and n not in ("labels", "input_ids", "pixel_values")]


def _parameters(model: nn.Module) -> Mapping[str, Parameter]:
    adapted = getattr(model, "get_base_model", None)  # peft's wrapper names few of what its model takes
    return signature(adapted().forward if callable(adapted) else model.forward).parameters


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a forward pass: a single input by position, so that a plain module may call it what it likes."""
    unused = left_out(model, batch)
    # Without labels, or transformers' models would compute a loss of their own as well.
    inputs: dict[str, Any] = {name: column for name, column in batch.items() if name not in (*unused, "labels")}
    if "position_ids" in inputs and "use_cache" in _parameters(model):
        inputs["use_cache"] = False  # with a cache transformers does not look where packed documents begin
    try:
        output = model(*inputs.values()) if len(inputs) == 1 else model(**inputs)
    except IndexError as error:
        raise InputError(
            f"an id or a position lies beyond what the model has rows for ({error})",
            hint="check that the data's tokenizer is the model's, and that sequences are no longer than its context",
        ) from error
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    # A tuple is what transformers gives without return_dict, logits first.
    found = found[0] if isinstance(found, (tuple, list)) and found else found
    if not isinstance(found, Tensor):
        raise UsageError(
            f"the model returned a {type(output).__name__}, not logits",
            hint="return a tensor or an output with .logits, or pass --loss package.module:function",
        )
    return found


def _mean_loss(
    model: nn.Module,
    columns: Mapping[str, Tensor],
    labels: Tensor,
    select: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Tensor:
    """Mean cross-entropy of the model's logits, those that `select` takes, over the labels other than -100."""
    vocabulary = widest(model)
    if labels.numel() * vocabulary > LOGITS and (head := plain_head(model, lambda: _logits(model, _few(columns)))):
        with withheld(head) as seen:
            hidden = _logits(model, columns)
        _check(labels, select(hidden).shape[:-1], head.out_features)
        if (loss := seen.loss(hidden, labels, select)) is not None:
            return loss
    logits = select(_logits(model, columns))
    _check(labels, logits.shape[:-1], logits.shape[-1])
    return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def _few(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first row of a batch; where all columns are of one length, no more than 8 positions of it."""
    shapes = {column.shape[1:] for column in columns.values()}
    start = 0
    if len(shapes) == 1 and len(next(iter(shapes))) == 1:
        mask = columns.get("attention_mask")
        start = 0 if mask is None else int(mask[0].ne(0).int().argmax())  # padding on the left is no token
        return {name: column[:1, start : start + 8] for name, column in columns.items()}
    return {name: column[:1] for name, column in columns.items()}


def _check(labels: Tensor, positions: torch.Size, classes: int) -> None:
    if positions != labels.shape:
        raise UsageError(
            f"logits of shape {(*positions, classes)} do not go with labels of shape {tuple(labels.shape)}",
            hint="the model must give logits for every label; name the right --loss, or one of your own",
        )
    if classes == 1:
        # Of one class the cross-entropy is 0 whatever the logit is.
        raise UsageError(
            "the model has one output, which transformers trains as a regression, or a loss of its own",
            hint="pass --loss package.module:function of the loss that it was trained with",
        )
    if not labels.numel():
        return
    # At once, since a GPU is waited for at each forward pass: what is ignored counts as class 0, which there is.
    low, high = map(int, torch.stack(torch.aminmax(labels.masked_fill(labels == IGNORED, 0))).cpu().tolist())
    if low < 0 or high >= classes:
        raise InputError(
            f"label {low if low < 0 else high} is none of the model's {classes} classes",
            hint="the data was made for another model; label with -100 what is not to be predicted",
        )


def _in_range(data: Shard | Examples, vocabulary: int | None, context: int | None, *, labels: bool) -> None:
    """Raises InputError where a column of ids has one beyond the vocabulary, or is longer than the context."""
    columns = {"input_ids": data.windows} if isinstance(data, Shard) else data.columns
    for name, column in columns.items():
        if not (name.endswith("input_ids") or (labels and name == "labels")):
            continue
        low, high = int(column[column != IGNORED].min()) if name == "labels" else int(column.min()), int(column.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            raise InputError(
                f"column {name} of {data.path} holds id {low if low < 0 else high}, the model's vocabulary has {vocabulary}",
                hint="the data was made with another tokenizer",
            )
        if context is not None and column.dim() == 2 and column.shape[1] > context:
            raise InputError(
                f"column {name} of {data.path} has {column.shape[1]} ids a row, the model's context is {context}",
                hint="cut the examples",
            )
