"""A model whose parameters are others than its own, for as long as it is called."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


class StandIn(nn.Module):
    """The model with some parameters substituted, for a loss that calls it.

    A loss that reaches inside the model instead (`model.head(x)`) would bypass the substitution and
    be silently wrong, so any other attribute is an error here, and another mode is taken.
    """

    def __init__(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        super().__init__()
        # Bypasses nn.Module.__setattr__, which would register the model as a child module.
        self.__dict__["_call"] = lambda *a, **k: functional_call(model, values, a, k, tie_weights=True)
        self.__dict__["_model"] = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives with these parameters."""
        return self.__dict__["_call"](*args, **kwargs)


def measured(model: nn.Module) -> nn.Module:
    """The model behind a stand-in, for a loss that looks at its modules and reads parameters only while they are called."""
    found: nn.Module = model.__dict__["_model"] if isinstance(model, StandIn) else model
    return found
