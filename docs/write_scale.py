"""Writes what --shard takes of a device into docs/how-to/distributed.md, for shapes of 1, 7 and 70 billion weights.

Run it when curvcli/analysis/scale.py changes: python docs/write_scale.py. Weights are torch's meta tensors, without numbers.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from curvcli.analysis.scale import DEVICES, scale

PAGE = Path(__file__).with_name("how-to") / "distributed.md"
PLACE = re.compile(r"(<!-- scale -->\n).*?(<!-- end of the scale -->)", re.DOTALL)
# Llama 3.2 and 2: layers, width, of the MLP, heads, of keys and values, vocabulary, whether embedding and head are tied.
MODELS = {
    "1 B": (16, 2048, 8192, 32, 8, 128256, True),
    "7 B": (32, 4096, 11008, 32, 32, 32000, False),
    "70 B": (80, 8192, 28672, 64, 8, 32000, False),
}


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's weights by name, tied ones once."""
    layers, width, mlp, heads, kv, vocabulary, tied = MODELS[name]
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=mlp, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}


def table() -> str:
    """A row for each model and number of devices, in GiB."""
    lines = [
        "| weights | devices | slices | exact: gathered | peak | received "
        "| by blocks: gathered | peak | basis elsewhere | received |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name in MODELS:
        for devices in DEVICES:
            found = scale(shapes(name), devices)
            exact = (found.slices, found.gathered, found.peak, found.moved_full)
            blocks = (found.block, found.peak_by_block, found.least_by_block, found.moved_full_by_block)
            sizes = (*exact, *(blocks if devices > 1 else ()))
            cells = [*map(_gib, sizes), *[""] * (8 - len(sizes))]
            lines.append(f"| {name} | {devices} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gib(size: int) -> str:
    found = size / 2**30
    return f"{found:,.0f}" if found >= 100 else f"{found:.3g}"


def written(page: str) -> str:
    """The page with the table as it is now."""
    return PLACE.sub(lambda found: found[1] + table() + found[2], page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
