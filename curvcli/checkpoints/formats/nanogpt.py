"""nanoGPT's ckpt.pt, as transformers' GPT-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvcli.checkpoints.base import Checkpoint, OptimizerFile
from curvcli.checkpoints.formats.huggingface import integer
from curvcli.checkpoints.state.mapping import map_state, matrix_order, summary
from curvcli.errors import InputError
from curvcli.files.limits import check_size
from curvcli.files.names import unwrapped
from curvcli.files.safe import check_finite, load_pickle
from curvcli.files.tensors import TensorInfo
from curvcli.models.base import Architecture
from curvcli.optimizers.base import OptimizerView

# transformers keeps these as Conv1D, transposed against nn.Linear: weights and moments alike.
_TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias")


class NanoGPTReader:
    """A torch file with model, model_args and usually optimizer, iter_num, config."""

    def accepts(self, path: Path) -> bool:
        """Whether it is a file that torch.save may have written."""
        return path.is_file() and path.suffix in (".pt", ".pth")

    def read(self, path: Path, architecture: Architecture | None) -> Checkpoint:
        """The checkpoint as transformers' GPT-2. Raises InputError."""
        head = load_pickle(path, meta=True)
        weights, args = _parts(head, path)
        has_optimizer = isinstance(head.get("optimizer"), dict)
        return Checkpoint(
            path=path,
            format="nanogpt",
            architecture="nanoGPT GPT",
            tensors=tuple(TensorInfo(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in weights.items()),
            model=lambda: _build(path),
            optimizer=OptimizerFile(
                path,
                lambda model: _view(load_pickle(path), model, path),
                lambda: summary(head["optimizer"], path),
            )
            if has_optimizer
            else None,
            step=integer(head, "iter_num"),
            vocabulary=args["vocab_size"],
            context=args["block_size"],
        )


def _parts(document: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise InputError(f"{path} has no model weights under 'model'", hint="expected nanoGPT's ckpt.pt")
    args = document.get("model_args")
    if not isinstance(args, dict) or not all(isinstance(args.get(k), int) for k in _ARGS[:-1]):
        raise InputError(f"{path} has no model_args with {', '.join(_ARGS)}", hint="expected nanoGPT's ckpt.pt")
    # Before a model is built of them: no real dimension is as large.
    if not all(0 < args[k] <= 2**24 for k in _ARGS[:-1]):
        shown = {k: args[k] for k in _ARGS[:-1]}
        raise InputError(f"{path} has model_args out of range: {shown}", hint="the file is damaged")
    if not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in document["model"].items()):
        raise InputError(f"{path} has something else than tensors by name under 'model'", hint="expected nanoGPT's ckpt.pt")
    # The causal mask is a buffer that old versions saved.
    return {unwrapped(n): t for n, t in document["model"].items() if not unwrapped(n).endswith(".attn.bias")}, args


def _build(path: Path) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    weights, args = _parts(load_pickle(path), path)
    width = args["n_embd"]
    shapes = {"transformer.wte.weight": (args["vocab_size"], width), "transformer.wpe.weight": (args["block_size"], width)}
    for name, expected in shapes.items():
        found = tuple(weights[name].shape) if name in weights else None
        if found != expected:
            raise InputError(f"{path}: {name} has shape {found}, model_args say {expected}", hint="the file is damaged")
    # Every layer has weights of its own and is built before they are looked at.
    if width % args["n_head"] or args["n_layer"] > len(weights):
        raise InputError(
            f"{path} has model_args that no model has: {width=}, {args['n_head']} heads, "
            f"{args['n_layer']} layers of {len(weights)} weights",
            hint="the file is damaged",
        )

    def empty() -> GPT2LMHeadModel:
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=args["vocab_size"],
                n_positions=args["block_size"],
                n_embd=width,
                n_layer=args["n_layer"],
                n_head=args["n_head"],
                activation_function="gelu",  # exact, as nn.GELU; GPT-2's own is the tanh approximation
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
                bos_token_id=None,  # GPT-2's 50256 lies beyond a small vocabulary
                eos_token_id=None,
            )
        )

    check_size(empty, values=2 * path.stat().st_size, where=path)
    model = empty()
    model.set_attn_implementation("eager")
    converted = {n: t.t() if n.endswith(_TRANSPOSED) else t for n, t in weights.items()}
    own = dict(model.named_parameters())
    absent = [n for n in own if n not in converted]
    biases = [n for n in absent if n.endswith(".bias") and not args.get("bias", True)]
    unknown = [n for n in converted if n not in own and n != "lm_head.weight"]
    if unknown or len(biases) != len(absent):
        odd = (unknown or [n for n in absent if n not in biases])[0]
        raise InputError(f"{path}: weight {odd} does not fit nanoGPT's GPT", hint="only the original model is known")
    with torch.no_grad():
        for name, parameter in own.items():
            if name in biases:
                # Not parameters of the trained model: they stay zero and belong to no analysis.
                parameter.zero_().requires_grad_(False)
            elif converted[name].shape != parameter.shape:
                raise InputError(
                    f"{path}: {name} has shape {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}",
                    hint="the weights do not belong to these model_args",
                )
            else:
                parameter.copy_(converted[name])
    model.eval()
    check_finite(model)
    return model


def _view(document: Any, model: nn.Module, path: Path) -> OptimizerView:
    optimizer = document["optimizer"]
    return map_state(_transposed(optimizer, model), model, (matrix_order,), path=path)


def _transposed(optimizer: Any, model: nn.Module) -> Any:
    """The state with the moments of transposed weights transposed, by their place in nanoGPT's order."""
    order = [name for group in matrix_order(model) for name in group]
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(state, dict):
        return optimizer
    turned = {
        index: {
            k: v.t() if isinstance(v, Tensor) and v.dim() == 2 and order[index].endswith(_TRANSPOSED) else v
            for k, v in entry.items()
        }
        if isinstance(entry, dict) and isinstance(index, int) and 0 <= index < len(order)
        else entry
        for index, entry in state.items()
    }
    return {**optimizer, "state": turned}
