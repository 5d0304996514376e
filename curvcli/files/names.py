"""What names of stored weights say: wrappers' parts, averages of weights, and buffers that older versions saved."""

from __future__ import annotations

import re
from collections.abc import Collection

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
ADAPTED = "base_model.model."  # what peft puts before a model's names
# state_dict_ema, model_ema, ema_model, swa_model, averaged_model, shadow_params, "last-EMA": a word of its own.
_AVERAGE = re.compile(r"(?:^|[-_.=\s])(?:ema|swa|lawa|avg|average|averaged|shadow)(?:[-_.=\s]|$)", re.IGNORECASE)
# Constants and masks, computed anew by versions of transformers, GPT-NeoX and nanoGPT that no longer save them.
_CONSTANT = re.compile(r"(?:^|\.)(?:rotary_(?:pos_)?emb\.(?:inv_freq|cos_cached|sin_cached)|masked_bias|position_ids)$")
_MASK = re.compile(r"(?:^|\.)(?:attn|attention|self_attention)\.bias$")


def unwrapped(name: str) -> str:
    """A weight's name without the parts of torch.compile, DistributedDataParallel, FSDP and checkpoint wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def averaged(name: str) -> bool:
    """Whether a name calls what it stands for an average of weights, as no optimizer step made it."""
    return _AVERAGE.search(name) is not None


def of_average(name: str) -> bool:
    """Whether a stored tensor lies under such a name, or counts what an average is over."""
    *parts, last = unwrapped(name).split(".")
    return last == "n_averaged" or any(averaged(part) for part in parts)


def obsolete(name: str, shape: Collection[int]) -> bool:
    """Whether a stored tensor that the model lacks is a constant or a causal mask (1, 1, n, n), no weight."""
    return _CONSTANT.search(name) is not None or (_MASK.search(name) is not None and len(shape) == 4)
