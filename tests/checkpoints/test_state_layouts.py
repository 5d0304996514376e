"""Optimizer state as other libraries lay it out, and state that is damaged in every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import STEPS, build
from torch import Tensor, nn

from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.state.soundness import state_findings
from curvcli.errors import CurvError, InputError, UnsupportedError
from curvcli.optimizers.base import Group, OptimizerView, State
from curvcli.optimizers.given import override
from curvcli.optimizers.preconditioner import live, prepare

NESTED = "__bnb_optimizer_quant_state__"


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build()
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01, weight_decay=0.1)
    for step in range(STEPS):
        ids = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def paged(entry: State) -> dict[str, Any]:
    """bitsandbytes' 32-bit state, as release 0.50 saves it."""
    return {"step": int(entry["step"]), NESTED: {"state1": entry["exp_avg"], "state2": entry["exp_avg_sq"]}}


def flat(entry: State) -> dict[str, Any]:
    """The same of earlier releases."""
    return {"step": int(entry["step"]), "state1": entry["exp_avg"], "state2": entry["exp_avg_sq"]}


def distributed(entry: State) -> dict[str, Any]:
    """The same as torch.distributed.checkpoint names what is nested."""
    return {"step": int(entry["step"]), **{f"{NESTED}.{k}": v for k, v in paged(entry)[NESTED].items()}}


def uncounted(entry: State) -> dict[str, Any]:
    """Fused Adam of apex and DeepSpeed: the step is the group's."""
    return {k: v for k, v in entry.items() if k != "step"}


BITSANDBYTES = {
    "lr": 0.01,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "alpha": 0.0,
    "t_alpha": None,
    "t_beta3": None,
}
APEX = {"lr": 0.01, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "step": STEPS}
LAYOUTS = {"paged": (paged, BITSANDBYTES), "flat": (flat, BITSANDBYTES), "distributed": (distributed, BITSANDBYTES),
           "fused": (uncounted, APEX)}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_adam_is_read_as_adam(trained: tuple, layout: str) -> None:
    model, optimizer = trained
    parameters = dict(model.named_parameters())
    expected = prepare(live(optimizer, parameters), parameters)
    convert, options = LAYOUTS[layout]
    entries = {n: convert(optimizer.state[p]) for n, p in parameters.items()}
    view = OptimizerView((Group(tuple(parameters), options),), entries)
    metric = prepare(view, parameters)
    assert (metric.name, metric.step, metric.doubts) == ("AdamW", STEPS, ())
    assert metric.threshold == pytest.approx(expected.threshold)
    assert ("decay-assumed" in {f.code for f in metric.findings}) == (layout == "fused")
    assert metric.direction is not None
    ones = {n: torch.ones_like(p) for n, p in parameters.items()}
    for name, root in expected.root.items():
        assert torch.equal(metric.root[name].apply(ones[name]), root.apply(ones[name]))
        assert torch.equal(metric.direction[name], expected.direction[name])
    assert {f.code for f in state_findings(view, STEPS, "file")} <= {"absurd-moment"}
    bad = OptimizerView(view.groups, {n: convert({**optimizer.state[p], "exp_avg": p + 1e3}) for n, p in parameters.items()})
    with pytest.raises(InputError, match="first moment that no gradients"):  # its moments are looked at, not passed over
        state_findings(bad, STEPS, "file")


@pytest.mark.parametrize("layout", ["paged", "fused"])
def test_a_layout_in_a_trainers_file(trained: tuple, layout: str, tmp_path: Path) -> None:
    model, optimizer = trained
    parameters = dict(model.named_parameters())
    convert, options = LAYOUTS[layout]
    model.save_pretrained(tmp_path)
    state = {i: convert(optimizer.state[p]) for i, p in enumerate(parameters.values())}
    group = {**options, "params": list(state), "param_names": list(parameters)}
    torch.save({"state": state, "param_groups": [group]}, tmp_path / "optimizer.pt")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.optimizer is not None
    found = prepare(checkpoint.optimizer.view(checkpoint.model()), parameters)
    expected = prepare(live(optimizer, parameters), parameters)
    ones = {n: torch.ones_like(p) for n, p in parameters.items()}
    assert list(found.root) == list(expected.root)
    assert all(torch.equal(found.root[n].apply(ones[n]), root.apply(ones[n])) for n, root in expected.root.items())


def one(entry: dict[str, Any], **options: Any) -> OptimizerView:
    return OptimizerView((Group(("w",), {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, **options}),), {"w": entry})


BYTES, FLOATS = torch.zeros(2, dtype=torch.uint8), {"state1": torch.ones(2), "state2": torch.ones(2), "step": 3}


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (one({"step": 3, NESTED: {"state1": BYTES, "state2": BYTES, "qmap1": BYTES, "absmax1": torch.ones(1)}}), "8-bit"),
        (one({"step": 3, "state1": BYTES, "state2": BYTES}), "uint8"),
        (one({**FLOATS, "unorm_vec": torch.ones(1)}), "LAMB"),
        (one({"step": 3, "state1": torch.ones(2)}), "one moment"),
        (one({"z": torch.ones(2), "exp_avg_sq": torch.ones(2)}, weight_sum=1.0, k=3, foreach=True), "schedule-free"),
        (one({"z": torch.ones(2)}, weight_sum=1.0, k=3, foreach=True), "schedule-free"),
    ],
)  # fmt: skip
def test_other_layouts_are_known_for_what_they_are(view: OptimizerView, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said) as refused:
        prepare(view, {"w": torch.ones(2)})
    assert "--optimizer none" in refused.value.hint


@pytest.mark.parametrize("flag", [{"use_muon": True}, {}])
def test_muon_with_an_auxiliary_adam_is_never_read_as_adam(flag: dict[str, Any]) -> None:
    """Also where its group says `betas: None` and the user gives them, and where nothing says use_muon."""
    adam = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0, **dict.fromkeys(flag, False)}
    muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "betas": None, **flag}
    state: dict[str, dict[str, Any]] = {
        "a": {"momentum_buffer": torch.ones(4, 3)},
        "b": {"step": 3, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)},
    }
    view, parameters = (
        OptimizerView((Group(("a",), muon), Group(("b",), adam)), state),
        {"a": torch.ones(4, 3), "b": torch.ones(2)},
    )
    for attempt in (lambda: view, lambda: override(view, betas=(0.9, 0.95))):
        if flag:
            found = prepare(attempt(), parameters)
            assert (list(found.balls), list(found.root), found.name) == (["a"], ["b"], "Muon with AdamW")
        else:
            with pytest.raises(UnsupportedError, match="several optimizers in one"):
                prepare(attempt(), parameters)


def test_the_auxiliary_adam_alone_is_adam() -> None:
    view = one({"step": 3, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}, use_muon=False)
    assert prepare(view, {"w": torch.ones(2)}).name == "AdamW"


def stepped(kind: str) -> OptimizerView:
    weight = nn.Parameter(torch.ones(3))
    kinds: dict[str, dict[str, Any]] = {
        "SGD": {"momentum": 0.9},
        "RMSprop": {"momentum": 0.9, "centered": True},
        "Adam": {"amsgrad": True},
        "Adagrad": {"lr_decay": 0.1},
    }
    optimizer = getattr(torch.optim, kind)([weight], lr=0.01, **kinds.get(kind, {}))
    for _ in range(2):
        weight.grad = torch.randn(3, generator=torch.Generator().manual_seed(0))
        optimizer.step()
    view = live(optimizer, {"w": weight})
    return OptimizerView(view.groups, view.state)


WRONG: tuple[Any, ...] = (None, "x", [1.0], float("nan"), torch.ones(7), {}, -1, 2)


@pytest.mark.parametrize("name", [True, False])
@pytest.mark.parametrize("kind", ["Adam", "AdamW", "NAdam", "SGD", "RMSprop", "Adagrad"])
def test_whatever_is_missing_or_wrong_is_an_error_of_ours_or_a_finite_metric(kind: str, name: bool) -> None:
    view = stepped(kind)
    options, entry = dict(view.groups[0].options), dict(view.state["w"])
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({k: v for k, v in options.items() if k != key}, entry) for key in options
    ]
    cases += [({**options, key: value}, entry) for key in options for value in WRONG]
    cases += [(options, {k: v for k, v in entry.items() if k != key}) for key in entry]
    cases += [(options, {**entry, key: value}) for key in entry for value in WRONG]
    refused = 0
    for changed, state in cases:
        altered = OptimizerView((Group(("w",), changed),), {"w": state}, kind if name else None)
        try:
            metric = prepare(altered, {"w": torch.ones(3)})
        except CurvError:
            refused += 1
            continue
        assert bool(torch.isfinite(metric.root["w"].apply(torch.ones(3))).all())
        assert metric.threshold is None or 0 < metric.threshold < float("inf")
        assert isinstance(metric.direction, dict | None)
        assert all(bool(torch.isfinite(Tensor(u)).all()) for u in (metric.direction or {}).values())
    assert refused > len(entry) * 3
