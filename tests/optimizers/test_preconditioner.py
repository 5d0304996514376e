"""Preconditioners that are no number for each entry: everything against dense matrices in float64."""

from __future__ import annotations

import models
import pytest
import torch
from torch import Tensor, nn
from toy_optimizer import Rotated, Whiten, WhitenRule

from curvcli.curvature.davidson import Davidson
from curvcli.curvature.hvp import build
from curvcli.curvature.inverse_root import Diagonal, InverseRoot, ModelRoot, Multiple
from curvcli.curvature.operator import PreconditionedHessian
from curvcli.curvature.problem import Problem
from curvcli.optimizers.base import Group
from curvcli.optimizers.preconditioner import live, prepare

KINDS = ("kronecker", "rotated", "low rank", "diagonal", "multiple")
Measured = tuple[models.Net, Problem, ModelRoot, dict[str, Tensor]]
SOLVER = Davidson(tolerance=1e-7, bottom_tolerance=1e-6, max_products=400)


def made(kind: str, p: Tensor, generator: torch.Generator) -> tuple[InverseRoot, Tensor]:
    """A preconditioner of one parameter, and P^(-1/2) as a dense matrix over the flat parameter, by itself."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    m, n = p.shape[0], p.numel() // p.shape[0]
    d = normal(m, n).exp()
    if kind == "multiple":
        return Multiple(2.5), torch.eye(m * n, dtype=torch.float64) / 2.5**0.5
    if kind == "diagonal":
        never = torch.rand(p.shape, generator=generator) < 0.2
        scale = torch.where(never, 0.0, d.reshape(p.shape) ** -0.5)
        return Diagonal(d.reshape(p.shape), never), torch.diag(scale.reshape(-1))
    left, right = (torch.linalg.qr(normal(size, size))[0] for size in (m, n))
    if kind == "kronecker":
        d = torch.outer(normal(m).exp(), normal(n).exp())
    if kind == "low rank":
        d[m // 2 :] = float("inf")
    turned = torch.kron(left, right)  # of row-major vectors: vec(A X B^T) = (A x B) vec(X)
    return Rotated(left, right, d), turned @ torch.diag(d.reshape(-1) ** -0.5) @ turned.T


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> Measured:
    net, batches = models.Net(seed=1, blocks=2, width=4), models.data()
    models.train(net, torch.optim.SGD(net.parameters(), lr=0.1), batches, steps=3)
    problem = Problem.create(net, models.loss, batches, models.weights(batches))
    generator = torch.Generator().manual_seed(0)
    found = {n: made(request.param, p, generator) for n, p in problem.parameters.items()}
    root = ModelRoot({n: root for n, (root, _) in found.items()}, problem.parameters)
    return net, problem, root, {n: dense for n, (_, dense) in found.items()}


def test_the_spectrum_is_that_of_the_dense_matrix(model: Measured) -> None:
    """The whole model, each layer alone, and all but a layer, with a coupled weight decay of one tensor."""
    net, problem, root, dense = model
    decay = {"head.weight": 0.3}
    batches = models.data()
    parts = [list(root), models.layer_names(net, 0), models.layer_names(net, 1), models.depth_names(net, 1)]
    for names in parts:
        operator = PreconditionedHessian(build(problem, "kept"), root.restrict(names), decay)
        found = SOLVER.extremes(operator)
        scale = torch.block_diag(*(dense[n] for n in names))
        added = [torch.full((dense[n].shape[0],), decay.get(n, 0.0), dtype=torch.float64) for n in names]
        hessian = models.dense_hessian(net, batches, names) + torch.diag(torch.cat(added))
        values = torch.linalg.eigvalsh(scale @ hessian @ scale)
        assert found.status == "converged"
        assert found.top is not None
        assert found.top.value == pytest.approx(float(values[-1]), rel=1e-6)
        assert found.bottom is not None
        assert found.bottom.value == pytest.approx(float(values[0]), rel=1e-5, abs=1e-5 * float(values[-1]))


def test_each_map_is_the_dense_one(model: Measured) -> None:
    _, problem, root, dense = model
    for name, parameter in problem.parameters.items():
        x, block, matrix = torch.randn_like(parameter), root[name], dense[name]
        flat = x.reshape(-1)
        inverse = torch.linalg.pinv(matrix, hermitian=True)
        torch.testing.assert_close(block.apply(x).reshape(-1), matrix @ flat)
        torch.testing.assert_close(block.invert(x).reshape(-1), inverse @ flat)
        torch.testing.assert_close(block.scaled(3.0).apply(x).reshape(-1), matrix @ flat / 3**0.5)
        moving = block.apply(x)  # along what is idle the optimizer would step by its eps alone
        torch.testing.assert_close(block.solve(moving).reshape(-1), matrix @ matrix @ matrix @ flat)
        assert block.idle == parameter.numel() - int(torch.linalg.matrix_rank(matrix, hermitian=True))
        assert block.positive
        assert block.to(parameter.float()).apply(x.float()).dtype is torch.float32


def test_lift_and_lower_undo_each_other(model: Measured) -> None:
    _, _, root, dense = model
    scale = torch.block_diag(*dense.values())
    vector = torch.randn(root.space.size, dtype=torch.float64)
    lifted = root.lift(vector)
    torch.testing.assert_close(root.flatten(list(lifted.values())), scale @ vector)
    moving = torch.linalg.pinv(scale, hermitian=True) @ scale @ vector  # without what is idle
    torch.testing.assert_close(root.lower(lifted), moving)
    torch.testing.assert_close(root.lift(root.lower(lifted)), lifted)
    some = list(root)[1:4]
    part = root.restrict(some)
    torch.testing.assert_close(part.lower(lifted), part.carry(moving, root))
    wrong = {some[0]: torch.ones(1, 1, 1, dtype=torch.float64)}
    assert not bool(part.lower(wrong).any())


def test_vectors_go_between_restrictions(model: Measured) -> None:
    _, _, root, _ = model
    names = list(root)
    part = root.restrict(names[2:5])
    small = torch.randn(part.space.size, dtype=torch.float64)
    whole = root.carry(small, part)
    assert torch.equal(part.carry(whole, root), small)
    assert torch.equal(whole[root.mask(names[2:5])], small)
    assert not bool(whole[~root.mask(names[2:5])].any())
    assert int(root.mask([]).sum()) == 0


def test_a_diagonal_that_is_not_positive_is_seen() -> None:
    entries = torch.tensor([1.0, 0.0, 2.0])
    assert not Diagonal(entries).positive
    assert Diagonal(entries, torch.tensor([False, True, False])).positive
    assert not Diagonal(torch.tensor([1.0, float("nan")])).positive
    assert not Multiple(0.0).positive


def test_the_toy_is_the_rule_of_its_optimizer() -> None:
    """Its step answers the next gradient by -lr (1 - b) P^(-1), P after the step."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    optimizer = Whiten([weight], lr=0.1)
    for _ in range(4):
        weight.grad = torch.randn_like(weight)
        before = weight.detach().clone()
        optimizer.step()
    state, group = optimizer.state[weight], Group(("w",), optimizer.param_groups[0])
    root = WhitenRule().preconditioner(group, state)
    torch.testing.assert_close(before - weight.detach(), 0.1 * root.solve(state["exp_avg"]))


def test_an_optimizer_that_accelerate_has_wrapped() -> None:
    """The class, by which the rule is found, is that of what is within. examples/accelerate_fsdp has accelerate's own."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.square().sum().backward()
    optimizer.step()
    found, own = (live(each, {"w": weight}) for each in (Wrapper(Wrapper(optimizer)), optimizer))
    assert (found.name, found.vouched, found.groups) == (own.name, own.vouched, own.groups)
    assert prepare(found, {"w": weight}).threshold == prepare(own, {"w": weight}).threshold


@pytest.mark.parametrize("up", [True, False])
def test_what_an_optimizer_maximises_is_known_where_no_group_says_it(up: bool) -> None:
    """As pytorch_optimizer keeps it, on the optimizer: without it lambda would have the other sign."""
    net = models.Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    models.train(net, optimizer, models.data(), steps=1)
    for group in optimizer.param_groups:
        del group["maximize"]
    optimizer.maximize = up  # type: ignore[attr-defined]
    parameters = dict(net.named_parameters())
    assert prepare(live(optimizer, parameters), parameters).ascends is up
