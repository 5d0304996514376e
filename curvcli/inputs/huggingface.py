"""Checkpoint directories of transformers: the Trainer's, and plain save_pretrained ones."""

from __future__ import annotations

import logging
from math import isfinite
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor, nn

from curvcli.errors import InputError, UnsupportedError
from curvcli.inputs.base import Architecture, Checkpoint, Logged, OptimizerFile, TensorInfo
from curvcli.inputs.bounds import check_config, check_size, inside
from curvcli.inputs.mapping import map_state, matrix_order, single_order, summary, trainer_order
from curvcli.inputs.safe import check_finite, load_pickle, read_json, safetensors_header

_INDEX = "model.safetensors.index.json"


class HuggingFaceReader:
    """config.json with model.safetensors (or shards and an index, or an old pytorch_model.bin)."""

    def accepts(self, path: Path) -> bool:
        return path.is_dir() and (path / "config.json").exists()

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        described = configured(path)
        state = self._trainer_state(path)
        optimizer = path / "optimizer.pt"
        return Checkpoint(
            path=path,
            format="trainer" if state is not None or optimizer.exists() else "pretrained",
            architecture=described.name,
            tensors=tuple(self._tensors(path)),
            model=lambda: _build(path, weights=True),
            optimizer=OptimizerFile(
                optimizer,
                lambda model: map_state(
                    load_pickle(optimizer), model, (trainer_order, matrix_order, single_order), path=optimizer
                ),
                lambda: summary(load_pickle(optimizer, meta=True), optimizer),
            )
            if optimizer.exists()
            else None,
            step=_integer(state, "global_step"),
            vocabulary=described.vocabulary,
            context=described.context,
            log=_log(state),
            tokenizer=described.tokenizer,
            notes=_clipping(state) | (_normaliser(described.name) if state is not None else {}),
        )

    def _trainer_state(self, path: Path) -> dict[str, Any] | None:
        file = path / "trainer_state.json"
        if not file.exists():
            return None
        state = read_json(file)
        if not isinstance(state, dict):
            raise InputError(f"{file} is not a trainer state", hint="copy the file again")
        return state

    def _tensors(self, path: Path) -> list[TensorInfo]:
        if (path / _INDEX).exists():
            index = read_json(path / _INDEX)
            shards = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
                raise InputError(f"{path / _INDEX} has no weight_map", hint="copy the file again")
            found: list[TensorInfo] = []
            for shard in sorted(set(shards.values())):
                file = inside(path, shard)
                if not file.is_file():
                    raise InputError(f"{file} is named in {_INDEX} and missing", hint="copy the missing shard")
                found += safetensors_header(file)
            missing = sorted(set(shards) - {t.name for t in found})
            if missing:
                raise InputError(f"{missing[0]} is named in {_INDEX} and in no shard", hint="copy the shards again")
            return found
        if (path / "model.safetensors").exists():
            return safetensors_header(path / "model.safetensors")
        if (path / "pytorch_model.bin").exists():
            weights = load_pickle(path / "pytorch_model.bin", meta=True)
            if not isinstance(weights, dict) or not all(
                isinstance(n, str) and isinstance(t, Tensor) for n, t in weights.items()
            ):
                raise InputError(f"{path / 'pytorch_model.bin'} holds no weights by name", hint="use another checkpoint")
            return [TensorInfo(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in weights.items()]
        raise InputError(
            f"{path} has a config.json and no weights (model.safetensors, {_INDEX}, pytorch_model.bin)",
            hint="copy the weights beside it",
        )


def configured(directory: Path) -> Architecture:
    """The network that a directory's config.json describes. Raises InputError, UnsupportedError."""
    config = read_json(directory / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError(f"{directory / 'config.json'} names no model_type", hint="it is not a transformers configuration")
    check_config(config, directory / "config.json")
    named = config.get("architectures")
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    context = text.get("max_position_embeddings") or text.get("n_positions")
    has_tokenizer = any((directory / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    return Architecture(
        name=str(named[0] if isinstance(named, list) and named else config["model_type"])[:200],
        build=lambda: _build(directory, weights=False),
        vocabulary=_integer(text, "vocab_size"),
        context=context if isinstance(context, int) and context > 0 else None,
        tokenizer=directory if has_tokenizer else None,
    )


def causal_lm(config: Any, where: object) -> type[Any]:
    """transformers' causal language model class for a configuration. Raises UnsupportedError."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = (getattr(config, "architectures", None) or [None])[0]
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if known is None or (named is not None and named not in known):
        raise UnsupportedError(
            f"{where} is a {named or config.model_type}, no causal language model that transformers knows",
            hint="use curvcli.analyze(model, loss, batches, optimizer) from Python for other models",
        )
    return AutoModelForCausalLM


def _build(path: Path, *, weights: bool) -> nn.Module:
    """The model of a directory; without weights its own are random, and all of them are still to be filled in."""
    import torch
    import transformers
    from transformers import AutoConfig

    previous = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        kind = causal_lm(config, path)

        def empty() -> nn.Module:
            return kind.from_config(config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False)  # type: ignore[no-any-return]

        check_size(empty, values=2 * _stored(path) if weights else psutil.virtual_memory().total // 4, where=path)
        if weights:
            model, info = kind.from_pretrained(
                path,
                config=config,
                dtype=torch.float32,
                attn_implementation="eager",
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
        else:
            model, info = empty(), {}
    except (InputError, UnsupportedError):
        raise
    except Exception as error:  # transformers raises every kind there is; all mean the same to the user
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"transformers cannot build the model in {path}: {text[:240]}",
            hint="check config.json and the weights, or the installed transformers' version",
        ) from error
    finally:
        transformers.logging.set_verbosity(previous)
    for problem in ("missing_keys", "mismatched_keys"):
        if info.get(problem):
            name = sorted(str(k) for k in info[problem])[0]
            raise InputError(
                f"{len(info[problem])} weights of {path} are {problem.split('_')[0]}, first {name}",
                hint="transformers would fill them with random numbers: complete the checkpoint",
            )
    model.config.use_cache = False
    model.eval()
    if weights:
        check_finite(model)
    return model  # type: ignore[no-any-return]


def _stored(path: Path) -> int:
    """Bytes of a directory's weight files."""
    return sum(f.stat().st_size for pattern in ("*.safetensors", "*.bin") for f in path.glob(pattern) if f.is_file())


def _integer(state: dict[str, Any] | None, key: str) -> int | None:
    value = (state or {}).get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def _entries(state: dict[str, Any] | None) -> list[dict[str, Any]]:
    history = (state or {}).get("log_history")
    return [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []


def _log(state: dict[str, Any] | None) -> tuple[Logged, ...]:
    def number(entry: dict[str, Any], key: str) -> float | None:
        value = entry.get(key)
        return float(value) if isinstance(value, (int, float)) and isfinite(value) else None

    found = [
        Logged(e["step"], number(e, "loss"), number(e, "learning_rate")) for e in _entries(state) if _integer(e, "step")
    ]
    return tuple(entry for entry in found if entry.loss is not None or entry.lr is not None)


def _clipping(state: dict[str, Any] | None) -> dict[str, str]:
    norms = [e["grad_norm"] for e in _entries(state) if isinstance(e.get("grad_norm"), (int, float))]
    over = sum(n > 1 for n in norms)
    if not over:
        return {}
    return {
        "clipped-moments": f"{over} of {len(norms)} logged gradient norms exceed 1.0, the Trainer's default max_grad_norm: "
        "with clipping on, the second moment is of clipped gradients, which raises lambda as the optimizer sees it"
    }


def _normaliser(architecture: str) -> dict[str, str]:
    if not architecture.startswith("GPT2"):
        return {}
    return {
        "loss-normaliser": "transformers' Trainer divides GPT-2's loss by all tokens of a window, the first too, which is "
        "no prediction: gradients and their moments are smaller by (n - 1)/n than of the loss that is measured here"
    }
