"""Networks that transformers knows: from a configuration to a model whose second derivatives exist."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import psutil
import torch
from torch import Tensor, nn

from curvcli.errors import CurvError, InputError, OutOfMemoryError, UnsupportedError, are, counted, exhausted, shortage
from curvcli.files.limits import check_config, check_size
from curvcli.files.names import unwrapped
from curvcli.files.safe import check_finite, read_json
from curvcli.models.base import Architecture, Task

# Auto class and the table of its model classes, by task.
_CLASSES: Mapping[Task, tuple[tuple[str, str], ...]] = {
    "causal-lm": (("AutoModelForCausalLM", "CAUSAL_LM"),),
    "masked-lm": (("AutoModelForMaskedLM", "MASKED_LM"),),
    "seq2seq": (("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),),
    "classification": (
        ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
        ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION"),
        ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION"),
    ),
}


def configured(where: Path) -> Architecture:
    """The network that a config.json describes. Raises InputError.

    Args:
        where: the file, or its directory.
    """
    file = where / "config.json" if where.is_dir() else where
    config = read_json(file)
    if not _names_model(config):
        raise InputError(f"{file} names no model_type", hint="it is not a transformers configuration")
    check_config(config, file)
    # Of a model for images and text: its language model's sizes count.
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    context = text.get("max_position_embeddings") or text.get("n_positions")
    vocabulary = text.get("vocab_size")
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else None
    task = _task(name, encoder_decoder=config.get("is_encoder_decoder") is True)
    tokenizers = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    return Architecture(
        name=(name or config["model_type"])[:200],
        build=lambda: build(file, task),
        task=task,
        vocabulary=vocabulary if isinstance(vocabulary, int) and 0 < vocabulary < 2**53 else None,
        context=context if isinstance(context, int) and context > 0 else None,
        tokenizer=file.parent if any((file.parent / f).exists() for f in tokenizers) else None,
        configuration=file,
    )


def of_network(file: Path) -> bool:
    """Whether a JSON file describes a network of transformers. One that cannot be read is an error elsewhere: InputError."""
    return _names_model(read_json(file))


def _names_model(config: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(config, dict) and isinstance(config.get("model_type"), str)


def build(
    configuration: Path, task: Task, weights: Path | None = None, stored: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The float32 model of a config.json in evaluation mode, with the weights of a directory.

    Without weights its own are random, and all of them are still to be filled in.

    Args:
        stored: the same weights by name, where their names carry wrappers' parts.

    Raises:
        InputError: transformers cannot build it, or weights are missing or of other shapes.
        UnsupportedError: no loss is known for this class of model.
    """
    import transformers

    offline: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    shape: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    info: dict[str, Any] = {}
    with _quiet(), _explained(weights or configuration):
        config = transformers.AutoConfig.from_pretrained(configuration, **offline)
        kind = _model_class(config, task, configuration)

        def empty() -> nn.Module:
            return kind.from_config(config, trust_remote_code=False, **shape)  # type: ignore[no-any-return]

        # Float32 takes 4 bytes a value. Stored weights take a byte or more each, and tied ones may be stored once for two.
        most = psutil.virtual_memory().total // 4 if weights is None else 2 * _bytes(weights)
        check_size(empty, values=most, where=configuration)
        if weights is None:
            model = empty()
        else:
            # Its own defaults for generating, of which nothing is used here: transformers looks for them beside the weights
            # and fails where neither they nor a config.json are there.
            generation = transformers.GenerationConfig()
            how = {"config": config, "generation_config": generation, "output_loading_info": True, **offline, **shape}
            place: Path | None = weights
            if stored is not None:
                with torch.device("meta"):
                    shell = empty()
                own = {unwrapped(name): name for name in shell.state_dict()}
                how["state_dict"] = {own.get(unwrapped(name), unwrapped(name)): tensor for name, tensor in stored.items()}
                # An auto class insists on a path; the model's own class takes the weights alone.
                kind, place = type(shell), None
            model, info = kind.from_pretrained(place, **how)
        twice_differentiable(model)
    # transformers fills both with random numbers and only logs it.
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            name, count = sorted(str(k) for k in info[problem])[0], len(info[problem])
            raise InputError(
                f"{counted(count, 'weight')} of {weights} {are(count)} {problem.split('_')[0]}, first {name}",
                hint="transformers would fill them with random numbers: complete the checkpoint",
            )
    # A configuration from elsewhere that leaves weights over is another network; one's own lists may carry heads along.
    if weights is not None and info.get("unexpected_keys") and configuration.parent != weights:
        name, count = sorted(str(k) for k in info["unexpected_keys"])[0], len(info["unexpected_keys"])
        raise InputError(
            f"{counted(count, 'weight')} of {weights} {are(count)} none of the model's, first {name}",
            hint="name the network that was trained with --model",
        )
    if weights is not None:
        check_finite(model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its reports, of which those on missing weights become errors here; then as it was."""
    import transformers

    bars, verbosity = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


@contextmanager
def _explained(where: Path) -> Iterator[None]:
    """What transformers raises as an error of curv's. Raises InputError, OutOfMemoryError."""
    try:
        yield
    except (InputError, UnsupportedError):
        raise
    except Exception as error:  # transformers raises every kind there is; all but one mean the same to the user
        raise _not_built(error, where) from error


def _not_built(error: Exception, where: Path) -> CurvError:
    if exhausted(error):
        return OutOfMemoryError(
            f"out of memory while the model in {where} is built: {shortage(error)}",
            hint="a machine with more memory is needed",
        )
    text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return InputError(
        f"transformers cannot build the model in {where}: {text[:240]}",
        hint="check config.json and the weights, or the installed transformers' version",
    )


def twice_differentiable(model: nn.Module) -> None:
    """Set a transformers model to what has second derivatives, in evaluation mode; another module just to the latter.

    Fused attention has none. Of experts the default, grouped_mm, has no forward mode and no float64.
    """
    for switch in ("set_attn_implementation", "set_experts_implementation"):
        if hasattr(model, switch):
            getattr(model, switch)("eager")
    if hasattr(getattr(model, "config", None), "use_cache"):
        model.config.use_cache = False  # type: ignore[union-attr]
    model.eval()


def _bytes(directory: Path) -> int:
    """Bytes of a directory's weight files."""
    return sum(f.stat().st_size for pattern in ("*.safetensors", "*.bin") for f in directory.glob(pattern) if f.is_file())


def _task(name: str | None, *, encoder_decoder: bool) -> Task:
    """What a model class is for, by its name: importing transformers here would cost `curv inspect` a second.

    `_model_class` holds it against transformers' own tables before anything is measured.
    """
    if name is None or name.endswith("ForConditionalGeneration"):
        return "seq2seq" if encoder_decoder else "causal-lm"
    if "Classification" in name:
        return "classification"
    if name.endswith(("ForMaskedLM", "WithLMHeadModel")):  # the latter are XLM and its kin
        return "masked-lm"
    return "seq2seq" if encoder_decoder and not name.endswith("ForCausalLM") else "causal-lm"


def _model_class(config: Any, task: Task, where: Path) -> type[Any]:
    """transformers' class for a configuration and a task. Raises UnsupportedError."""
    import transformers
    from transformers.models.auto import modeling_auto

    def classes(table: str) -> tuple[str, ...]:
        found = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").get(config.model_type, ())
        return (found,) if isinstance(found, str) else tuple(found)

    named = (getattr(config, "architectures", None) or [None])[0]
    for auto, table in _CLASSES[task]:
        if named in classes(table) or (named is None and classes(table)):
            if named is None and classes("MASKED_LM") and task == "causal-lm":
                break  # BERT and its like are built for either
            return getattr(transformers, auto)  # type: ignore[no-any-return]
    raise UnsupportedError(
        f"{where} is a {named or config.model_type}, and no loss is known for it: transformers has it neither as a causal, "
        "masked or encoder-decoder language model nor as a classifier",
        hint="name the class under architectures, or pass --model and --loss package.module:function of your own",
    )
