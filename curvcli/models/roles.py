"""What each weight is for, by the names that networks give their modules: projections, heads, norms, embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from curvcli.models.rows import RowKind, embedding_named

HeadsOf = Literal["query", "key-value"]

# The last of a name's parts that is among these says what the weight is for.
_NAMES: Mapping[str, Sequence[str]] = {
    "q": ("q_proj", "query", "q_lin", "wq", "q", "to_q", "query_proj"),
    "k": ("k_proj", "key", "k_lin", "wk", "k", "to_k", "key_proj"),
    "v": ("v_proj", "value", "v_lin", "wv", "v", "to_v", "value_proj"),
    "qkv": ("qkv_proj", "query_key_value", "Wqkv", "qkv"),
    "o": ("o_proj", "out_proj", "out_lin", "o", "to_out"),
    # w1, w3 and w2 are Llama's own names, which Mixtral kept for its experts.
    "gate": ("gate_proj", "w1", "wi_0"),
    "up": ("up_proj", "fc1", "c_fc", "lin1", "dense_h_to_4h", "w3", "wi", "wi_1", "intermediate", "fc_in"),
    "gate, up": ("gate_up_proj",),
    "down": ("down_proj", "fc2", "lin2", "dense_4h_to_h", "w2", "fc_out"),
    # Mixtral and DeepSeek call the router gate.
    "router": ("router", "gate"),
}
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names}
# Of attention where it stands inside a module called that, else of the MLP.
# GPT-2's c_proj and BERT's dense end both halves of a layer; wo is Llama's in attention and T5's in the MLP.
_EITHER = ("c_proj", "dense", "wo")
_THIRDS = ("c_attn", "in_proj_weight", "in_proj_bias")  # queries, keys and values, one after the other


@dataclass(frozen=True)
class Share:
    """What a weight, or a third of one that is fused, has of a direction.

    Attributes:
        kind: q, k, v, qkv (fused in a way of its own), o, gate, up, down, router, norm, embedding, positions, head, other.
        mass: its share of the direction's squared norm.
        heads: shares of its attention heads; None where their entries cannot be told apart.
        heads_of: whether they are those of queries or of keys and values, where there are fewer of the latter.
    """

    kind: str
    mass: float
    heads: tuple[float, ...] | None = None
    heads_of: HeadsOf = "query"


class Roles:
    """What the parameters of a model are for.

    Args:
        model: whose configuration, where it has one as transformers' models do, says how many heads there are.
        rows: what the rows of its matrices are, by `id` of the weight, as `models.rows.row_kinds` has them.
    """

    def __init__(self, model: nn.Module, rows: Mapping[int, RowKind]) -> None:
        self.modules, self.rows = dict(model.named_modules()), rows
        head = embedding_named(model, "get_output_embeddings")
        self.head = id(head.weight) if isinstance(head, nn.Linear) else None
        config = _text(getattr(model, "config", None))
        self.queries = _count(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
        self.keys = _count(config, "num_key_value_heads") or self.queries
        self.width = _count(config, "head_dim")

    def outside(self, name: str, parameter: Tensor) -> str:
        """The part that a parameter outside the layers belongs to: embedding, positions, head, norm or other."""
        kind = self.kind(name, parameter)
        return kind if kind in ("embedding", "embedding (tied to the head)", "positions", "head", "norm") else "other"

    def kind(self, name: str, parameter: Tensor) -> str:
        """What a parameter is for, as `Share.kind` has it; "attention" where a matrix holds q, k and v in turn."""
        *path, last = name.split(".")
        module = self.modules.get(".".join(path))
        rows = self.rows.get(id(parameter))
        if rows == "positions":
            return rows
        if rows == "tokens":
            if id(parameter) == self.head and isinstance(module, nn.Embedding):
                return "embedding (tied to the head)"
            return "embedding" if isinstance(module, nn.Embedding) else "head"
        if "norm" in type(module).__name__.lower():
            return "norm"
        return _by_name([*path, last])

    def shares(self, name: str, parameter: Tensor, squares: Tensor) -> list[Share]:
        """A parameter's share of a direction: one, or three where it holds queries, keys and values in turn.

        Args:
            squares: the direction's squared entries there, in the parameter's shape.
        """
        kind = self.kind(name, parameter)
        turned = type(self.modules.get(name.rpartition(".")[0])).__name__ == "Conv1D"  # transformers': (inputs, outputs)
        outputs = 1 if turned and squares.dim() == 2 else 0
        if kind == "attention":
            if squares.shape[outputs] % 3:
                return [Share("qkv", float(squares.sum()))]
            return [
                self._share(part, piece, outputs) for part, piece in zip("qkv", squares.chunk(3, dim=outputs), strict=True)
            ]
        if kind == "o":
            # Heads lie along the inputs of the output projection, which their concatenation goes into; its bias has none.
            return [self._share(kind, squares, 1 - outputs if squares.dim() == 2 else None)]
        return [self._share(kind, squares, outputs if kind in ("q", "k", "v") else None)]

    def _share(self, kind: str, squares: Tensor, axis: int | None) -> Share:
        """With the shares of heads that lie one after the other along an axis."""
        count = self.keys if kind in ("k", "v") else self.queries
        of: HeadsOf = "key-value" if kind in ("k", "v") and self.keys != self.queries else "query"
        mass = float(squares.sum())
        # Three dimensions are experts stacked, which have no heads.
        if axis is None or not count or squares.dim() > 2:
            return Share(kind, mass)
        size = squares.shape[axis]
        # Rows that are not so many heads of head_dim are laid out in a way that is not known here.
        if size % count or (self.width and size != count * self.width):
            return Share(kind, mass)
        heads = tuple(float(part.sum()) for part in squares.chunk(count, dim=axis))
        return Share(kind, mass, heads, of)


def _by_name(path: Sequence[str]) -> str:
    for place in range(len(path) - 1, -1, -1):
        part, before = path[place], ".".join(path[:place]).lower()
        if part in _THIRDS:
            return "attention"
        if part in _EITHER:
            if before.endswith("intermediate"):
                return "up"
            # BERT's output of attention stands in attention.output, that of its MLP in output.
            if "att" in ".".join(before.split(".")[-2:]):
                return "o"
            return "down" if part != "dense" or before.endswith("output") else "other"
        if part in _KINDS:
            return _KINDS[part]
    return "other"


def _text(config: Any) -> Any:
    """The part of a configuration that is of the language model."""
    nested = getattr(config, "get_text_config", None)
    return nested() if callable(nested) else config


def _count(config: Any, *names: str) -> int | None:
    found = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
