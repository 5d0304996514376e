"""SOAP for some parameters and AdamW for the others, in memory and in one file."""

from __future__ import annotations

from pathlib import Path

import models
import published
import pytest
import stepped
import torch
from torch import nn

from curvcli.checkpoints.formats.beside import merged
from curvcli.checkpoints.state.mapping import map_state
from curvcli.errors import UnsupportedError
from curvcli.optimizers.preconditioner import live, prepare
from curvcli.training import CurvatureTracker


def both(net: nn.Module) -> list[torch.optim.Optimizer]:
    """SOAP for matrices, and AdamW for the rest, at learning rates of their own."""
    matrices, rest = ([p for p in net.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    adam = torch.optim.AdamW(rest, lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.2)
    return [published.SOAP(matrices, lr=0.01, eps=1e-3, precondition_frequency=4), adam]


@pytest.mark.parametrize("joined", [False, True])
def test_soap_beside_adamw_is_measured_as_both(joined: bool, tmp_path: Path) -> None:
    """rho is the largest eigenvalue of (T P)^(-1/2) H (T P)^(-1/2), each parameter with its own P and threshold."""
    net, batches = models.Net(seed=2, blocks=1, width=3, vocab=5), models.data(vocab=5)
    made = both(net)
    for _ in range(6):
        net.zero_grad()
        models.loss(net, tuple(torch.cat(parts) for parts in zip(*batches, strict=True))).backward()  # type: ignore[arg-type]
        for optimizer in made:
            optimizer.step()
    parameters = dict(net.named_parameters())
    known = live(made, parameters)
    if joined:  # from a file of both, by position
        order = [names for group in known.groups if (names := list(group.names))]
        document = merged({k: o.state_dict() for k, o in zip("ab", made, strict=True)}, tmp_path)
        known = map_state(document, net, [lambda _: order], path=tmp_path)
    found = prepare(known, parameters)
    assert (found.name, found.doubts) == ("SOAP with AdamW", ())
    assert found.direction is not None
    alone = [
        prepare(live(optimizer, parameters), {n: p for n, p in parameters.items() if (p.dim() > 1) == wide})
        for optimizer, wide in zip(made, (True, False), strict=True)
    ]
    expected = {
        name: stepped.as_matrix(part.root[name].apply, parameters[name].detach()) / part.threshold**0.5
        for part in alone
        for name in part.root
    }
    for name, own in expected.items():
        whole = stepped.as_matrix(found.root[name].apply, parameters[name].detach()) / found.threshold**0.5
        torch.testing.assert_close(whole, own)


def test_soap_beside_others_is_refused() -> None:
    weights = [nn.Parameter(torch.ones(2, 2)) for _ in range(3)]
    soap, sgd = published.SOAP(weights[:1]), torch.optim.SGD(weights[1:2], lr=0.1)
    muon = torch.optim.Muon(weights[2:], lr=0.1)
    parameters = {str(i): w for i, w in enumerate(weights)}
    for others in ([soap, sgd], [soap, muon]):
        with pytest.raises(UnsupportedError, match="there are 2 optimizers"):
            live(others, parameters)


def test_the_tracker_follows_both() -> None:
    net, batches = models.Net(seed=2, blocks=1, width=3, vocab=5), models.data(vocab=5)
    made = both(net)
    tracker = CurvatureTracker(
        net, made, models.loss, probe=batches, weights=models.weights(batches), tolerance=1e-4, max_hvps=80
    )
    for _ in range(3):
        net.zero_grad()
        models.loss(net, tuple(torch.cat(parts) for parts in zip(*batches, strict=True))).backward()  # type: ignore[arg-type]
        for optimizer in made:
            optimizer.step()
    parameters = dict(net.named_parameters())
    found, record = prepare(live(made, parameters), parameters), tracker.step(2)
    assert record is not None
    assert record.status == "converged", record.message
    half = torch.block_diag(*(stepped.as_matrix(r.apply, parameters[n].detach()) for n, r in found.root.items()))
    truth = models.top(half @ models.dense_hessian(net, batches, list(found.root)) @ half)
    assert found.threshold is not None
    assert record.rho == pytest.approx(truth / found.threshold, rel=1e-4)


def test_a_file_of_soap_and_muon_or_of_two_adams_is_refused(tmp_path: Path) -> None:
    moments = {"exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.ones(2, 2), "step": 3}
    soap = {"state": {0: moments}, "param_groups": [{"params": [0], "lr": 0.1, "max_precond_dim": 9}]}
    adam = {"state": {0: moments}, "param_groups": [{"params": [0], "lr": 0.1}]}
    muon = {"state": {0: {"momentum_buffer": torch.ones(2, 2)}}, "param_groups": [{"params": [0], "lr": 0.1, "ns_steps": 5}]}
    assert len(merged({"a": soap, "b": adam}, tmp_path)["state"]) == 2
    for others in ({"a": soap, "b": muon}, {"a": adam, "b": adam}):
        with pytest.raises(UnsupportedError, match="has 2 optimizers"):
            merged(others, tmp_path)
