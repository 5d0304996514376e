"""LoRA adapters as peft and transformers' Trainer save them: the adapter's tensors, over a base model elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.checkpoints.base import Checkpoint
from curvcli.checkpoints.clipping import clipping
from curvcli.checkpoints.formats.beside import unread
from curvcli.checkpoints.formats.huggingface import (
    HuggingFaceReader,
    header,
    integer,
    optimizer_beside,
    run_log,
    trainer_state,
)
from curvcli.errors import InputError, UnsupportedError, are, counted
from curvcli.files.names import ADAPTED
from curvcli.files.runs import step_of
from curvcli.files.safe import check_finite, load_pickle, read_json
from curvcli.files.tensors import TensorInfo, stored
from curvcli.models.base import Architecture
from curvcli.models.registered import configured, twice_differentiable

CONFIG, _WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
# peft takes the keys of alpha_pattern and rank_pattern for regular expressions, and one of anybody's could run forever.
_PLAIN = re.compile(r"[\w.]+")
_TARGET = re.compile(rf"{re.escape(ADAPTED)}(.+)\.lora_(?:embedding_)?A(?:\.weight)?")
# Options that say where the adapter is, which its tensors' names say too, or that matter before the first step alone.
_IDLE = (
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
)  # fmt: skip
# Others change the base's weights before training.
_STARTS = (None, True, False, "gaussian", "orthogonal")


class AdapterReader:
    """adapter_config.json with adapter_model.safetensors or .bin. What trains is the adapter; the base is fixed.

    The base is `--model DIR`, or what adapter_config.json names if that is a directory below the one two above the
    checkpoint; nothing else is followed, for the file is not the user's own.
    """

    def accepts(self, path: Path) -> bool:
        """Whether it is a directory with adapter_config.json and no weights of a whole model beside it."""
        return (path / CONFIG).is_file() and not any((path / name).exists() for name in HuggingFaceReader.names)

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """Headers of the adapter, whose model is the base with the adapter on it.

        Raises:
            InputError: the adapter's weights or options, or the base, are missing or damaged.
            UnsupportedError: adapter_config.json has options that change the network in a way that is not rebuilt here.
        """
        options = _options(path)
        file = next((path / name for name in _WEIGHTS if (path / name).exists()), None)
        if file is None:
            raise InputError(f"{path} has {CONFIG} and no {_WEIGHTS[0]}", hint="copy the adapter's weights beside it")
        tensors = header(file)
        base = architecture or _base(path, options)
        state = trainer_state(path)
        clipped = clipping(path, state)
        optimizer, read = optimizer_beside(path)
        home = base.configuration.parent if base.configuration else None
        return Checkpoint(
            path=path,
            format="lora",
            architecture=f"{base.name} with LoRA",
            tensors=tuple(tensors),
            model=lambda: _model(file, tensors, options, base),
            optimizer=optimizer,
            step=integer(state, "global_step") if state is not None else step_of(path),
            vocabulary=base.vocabulary,
            context=base.context,
            task=base.task,
            log=run_log(state),
            tokenizer=base.tokenizer,
            notes={
                **clipped.notes,
                "adapter": f"curvature is over the adapter's weights; the base, {home or base.name}, is fixed",
            },
            clipping=clipped,
            findings=tuple(unread(path, read)),
            sources=(home,) if home else (),
        )


def _options(path: Path) -> dict[str, Any]:
    """adapter_config.json, of fields that are known and in range. Raises InputError, UnsupportedError."""
    options = read_json(path / CONFIG)
    if not isinstance(options, dict):
        raise InputError(f"{path / CONFIG} is no adapter's configuration", hint="copy the file again")
    if options.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"{path} is an adapter of type {options.get('peft_type')!r:.60}", hint="LoRA is read; merge others"
        )
    # An option that is off (false, null, empty) changes nothing, whatever it is called.
    odd = [key for key, value in options.items() if value and key not in _IDLE]
    odd += ["init_lora_weights"] if options.get("init_lora_weights") not in _STARTS else []
    if odd:
        raise UnsupportedError(
            f"{path / CONFIG} sets {odd[0][:60]}, which no LoRA that is known here has",
            hint="merge the adapter into its base (peft's merge_and_unload) and measure that, with --optimizer none",
        )
    patterns = [options.get(key) or {} for key in ("alpha_pattern", "rank_pattern")]
    names = [options.get("modules_to_save") or [], *(list(each) for each in patterns if isinstance(each, dict))]
    numbers = [options.get("lora_alpha"), *(v for each in patterns if isinstance(each, dict) for v in each.values())]
    fine = (
        all(isinstance(each, dict) for each in patterns)
        and all(isinstance(each, list) and all(isinstance(n, str) and _PLAIN.fullmatch(n) for n in each) for each in names)
        and all(isinstance(v, (int, float)) and abs(v) < 2**31 and isfinite(v) for v in numbers)
        and options.get("bias") in (None, "none", "all", "lora_only")
        and isinstance(options.get("use_rslora") or False, bool)
    )
    if not fine:
        raise InputError(
            f"{path / CONFIG} has fields that are out of range, or patterns where names are expected",
            hint="copy the file again",
        )
    return options


def _base(path: Path, options: Mapping[str, Any]) -> Architecture:
    """The base that the adapter names, where it may be followed. Raises InputError."""
    name = options.get("base_model_name_or_path")
    hint = "pass --model DIR of the base model, with its config.json and weights"
    try:
        home = path.resolve()
        # A relative one counts from the checkpoint: what lies in the working directory is no file's to name.
        place = (home / name).resolve() if isinstance(name, str) and name and "\0" not in name else home
        near = place != home and place.is_relative_to(home.parents[min(1, len(home.parents) - 1)])
        found = near and (place / "config.json").is_file()
    except (OSError, RuntimeError, ValueError, IndexError):
        found = False
    if not found:
        raise InputError(
            f"the adapter in {path} is of the base model {str(name)[:120]!r}, which is no model in "
            "the checkpoint's directory or up to two above it",
            hint=hint,
        )
    return configured(place)


def _model(file: Path, tensors: list[TensorInfo], options: Mapping[str, Any], base: Architecture) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{file} is a LoRA adapter, and peft is not installed", hint="pip install peft") from error
    # By the tensors and not by the file's r and rank_pattern, which may ask for matrices of any size.
    ranks = {found[1]: t.shape[0] for t in tensors if (found := _TARGET.fullmatch(t.name)) and t.shape}
    if not ranks or not all(_PLAIN.fullmatch(name) for name in ranks) or min(ranks.values()) < 1:
        raise InputError(
            f"{file} has no weights of a LoRA adapter ({ADAPTED}....lora_A.weight)", hint="use another checkpoint"
        )
    if base.configuration is not None:
        # With its weights: without an adapter they are a checkpoint like any other.
        whole = HuggingFaceReader().read(base.configuration.parent, base).model()
    else:
        whole = base.build()
    for parameter in whole.parameters():
        parameter.requires_grad_(False)
    first = next(iter(ranks.values()))
    config = peft.LoraConfig(
        r=first,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != first},
        lora_alpha=options["lora_alpha"],
        alpha_pattern=options.get("alpha_pattern") or {},
        target_modules=list(ranks),
        modules_to_save=options.get("modules_to_save"),
        bias=options.get("bias") or "none",
        lora_bias=options.get("lora_bias") is True,
        use_rslora=options.get("use_rslora") is True,
        fan_in_fan_out=options.get("fan_in_fan_out") is True,
        lora_dropout=0.0,
        init_lora_weights=True,  # overwritten below; other ways would change the base's weights
    )
    try:
        # The network with the adapters in it, without peft's wrappers, whose forward hides what the network takes.
        model: Any = peft.get_peft_model(whole, config, autocast_adapter_dtype=False).base_model.model
    except Exception as error:  # names of the file that are none of the base's, in peft's many words
        raise InputError(
            f"the adapter in {file} does not fit its base {base.name}: {str(error)[:160]}",
            hint="name its base with --model DIR",
        ) from error
    _fill(model, file, tensors)
    twice_differentiable(model)
    return model  # type: ignore[no-any-return]


def _fill(model: nn.Module, file: Path, tensors: list[TensorInfo]) -> None:
    """Put the adapter's tensors where they belong: all of them, and into all that trains. Raises InputError."""
    weights: Mapping[str, Tensor] = load_pickle(file) if file.suffix == ".bin" else stored({t.name: file for t in tensors})
    places = {_saved_as(name): p for name, p in model.named_parameters()}
    # Beside an adapter of the embedding peft also saves the embedding itself, which does not train.
    places |= {name.replace(".base_layer.", "."): p for name, p in places.items()}
    absent = [name for name, p in model.named_parameters() if p.requires_grad and _saved_as(name) not in weights]
    if odd := [*absent, *(name for name in sorted(weights) if name not in places)]:
        raise InputError(
            f"the adapter in {file} does not fit its base: {counted(len(odd), 'weight')} "
            f"{are(len(odd))} in one of the two alone, first {odd[0][:120]}",
            hint="name its base with --model DIR",
        )
    with torch.no_grad():
        for name in weights:
            value, parameter = weights[name], places[name]
            if value.shape != parameter.shape:
                raise InputError(
                    f"{file}: {name} has shape {tuple(value.shape)}, the base asks for {tuple(parameter.shape)}",
                    hint="name the adapter's base with --model DIR",
                )
            parameter.copy_(value)
    check_finite(model)


def _saved_as(name: str) -> str:
    """What peft calls a parameter in the file: without the name of the adapter."""
    return ADAPTED + re.sub(r"\.(?:modules_to_save\.)?default(?=\.|$)", "", name)
