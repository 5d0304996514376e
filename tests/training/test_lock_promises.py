"""What would break a lock without a word is an error that says what to do, or holds."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from schedules import schedule
from torch import Tensor, nn
from warmup_job import DEPTH, FREEZE, GROW, Job, batch, block_of, build, snapshot, weights

from curvcli.errors import UnsupportedError, UsageError
from curvcli.training import ArchitectureWarmup
from curvcli.training.updates import following

NOTHING_LOCKED = schedule(DEPTH, (0, range(DEPTH)))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def split(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """As Muon and AdamW share a model: matrices of blocks, and the rest."""
    matrices = [p for n, p in model.named_parameters() if block_of(n) is not None and p.dim() == 2]
    rest = [p for n, p in model.named_parameters() if block_of(n) is None or p.dim() != 2]
    return adamw(rest), torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1)


def step(model: nn.Module, warmup: ArchitectureWarmup, number: int, *optimizers: torch.optim.Optimizer) -> None:
    warmup.step(number)
    model.zero_grad()
    model(input_ids=batch(number), labels=batch(number)).loss.backward()
    for optimizer in optimizers:
        optimizer.step()


# --- blocks that could not be locked ----------------------------------------------------------


def test_frozen_blocks_are_not_zeroed() -> None:
    model = build()
    model.model.layers[2].requires_grad_(False)
    before = weights(model)
    with pytest.raises(UsageError, match=r"block 2 is to begin as an identity, and its .*o_proj.* does not require a grad"):
        Job(model=model)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    # The two remedies.
    Job(FREEZE, model=model).run(range(2))
    model.requires_grad_(True)
    Job(model=model).run(range(2))


def test_blocks_that_are_frozen_before_the_first_step() -> None:
    job = Job()
    job.model.model.layers[2].requires_grad_(False)
    before = weights(job.model)
    with pytest.raises(UsageError, match="block 2 is to begin as an identity"):
        job.warmup.step(0)
    assert all(torch.equal(before[n], p) for n, p in job.model.named_parameters())


def test_one_frozen_output_is_enough() -> None:
    model = build()
    model.model.layers[3].mlp.down_proj.requires_grad_(False)
    with pytest.raises(UsageError, match=r"block 3 .* its mlp\.down_proj\.weight does not require"):
        Job(model=model)


def test_frozen_weights_that_are_no_outputs_do_no_harm() -> None:
    model = build()
    for block in model.model.layers:
        block.mlp.gate_proj.requires_grad_(False)
    Job(model=model).run(range(12))
    # Not even where nothing behind the outputs may learn.
    fresh = build()
    for name, parameter in fresh.named_parameters():
        parameter.requires_grad_("o_proj" in name or "down_proj" in name)
    job = Job(model=fresh)
    job.warmup.patience = 2
    job.run(range(12))


def share_module(model: nn.Module) -> None:
    model.model.layers[2].mlp = model.model.layers[0].mlp


def share_parameter(model: nn.Module) -> None:
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight


def share_memory(model: nn.Module) -> None:
    model.model.layers[2].mlp.down_proj.weight = nn.Parameter(model.model.layers[0].mlp.down_proj.weight.data)


def share_outside(model: nn.Module) -> None:
    model.extra = model.model.layers[2].mlp


@pytest.mark.parametrize("share", [share_module, share_parameter, share_memory, share_outside], ids=lambda f: f.__name__)
@pytest.mark.parametrize("plan", [GROW, FREEZE], ids=["grow", "freeze"])
def test_blocks_that_share_with_what_trains(share: Any, plan: Any) -> None:
    model = build()
    share(model)
    before = weights(model)
    other = "what is in no block" if share is share_outside else "block 0"
    with pytest.raises(UnsupportedError, match=f"block 2 would be locked while it shares mlp.* with {other}, which trains"):
        Job(plan, model=model)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_blocks_that_share_and_join_together() -> None:
    model = build()
    model.model.layers[2].mlp = model.model.layers[3].mlp
    with pytest.raises(UnsupportedError, match=r"block 3 would be locked while it shares mlp.* with block 2"):
        Job(model=model)  # 2 joins before 3
    Job(schedule(DEPTH, (0, [0, 1]), (2, range(DEPTH))), model=model).run(range(4))
    Job(NOTHING_LOCKED, model=build()).run(range(1))


# --- parameters that are not what they were ---------------------------------------------------


def test_requiring_gradients_later_does_not_train_a_locked_block() -> None:
    model = build()
    model.model.layers[2:].requires_grad_(False)
    job = Job(FREEZE, model=model).run(range(2))
    before = weights(model)
    model.model.layers[2:].requires_grad_(True)
    job.warmup.step(2)
    model(input_ids=batch(2), labels=batch(2)).loss.backward()
    locked = [p for n, p in model.named_parameters() if block_of(n) in (2, 3)]
    assert all(p.grad is not None and not p.grad.any() for p in locked)  # no share in clipping either
    job.optimizer.step()
    # Within a step, too.
    model.model.layers[2:].requires_grad_(False)
    job.warmup.step(3)
    model.model.layers[2:].requires_grad_(True)
    model(input_ids=batch(3), labels=batch(3)).loss.backward()
    job.optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) is (block_of(name) in (2, 3)), name
    assert not any(job.optimizer.state[p] for p in locked)


def test_replaced_parameters() -> None:
    job = Job().run(range(1))
    layer = job.model.model.layers[2].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(UsageError, match="parameters of block 2 were replaced since the warm-up was made"):
        job.warmup.step(1)
    job = Job().run(range(1))
    job.model.model.layers = job.model.model.layers[:3]
    with pytest.raises(UsageError, match="parameters of block 3 were replaced"):
        job.warmup.step(1)


def test_weights_moved_past_the_hooks() -> None:
    """As an engine does it that is no optimizer, or a load too late: seen within as many steps as blocks are locked."""
    job = Job(FREEZE).run(range(1))
    with torch.no_grad():
        for name, parameter in job.model.named_parameters():
            if block_of(name) in (2, 3):
                parameter.data.mul_(0.999)
    with pytest.raises(UsageError, match=r"block 3 is locked at step 1, and its .* has moved since the step before"):
        job.run(range(1, 2))


def test_another_precision_is_no_move() -> None:
    job = Job(FREEZE).run(range(1))
    job.model.to(torch.bfloat16)
    job.optimizer.state.clear()
    job.run(range(1, 3))


def test_a_weight_that_is_nan_stands_still() -> None:
    model = build()
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    warmup = ArchitectureWarmup(model, adamw(model.parameters()), FREEZE)
    for number in range(3):
        warmup.step(number)


# --- optimizers -------------------------------------------------------------------------------


def test_an_optimizer_of_a_part() -> None:
    model = build()
    rest, muon = split(model)
    with pytest.raises(
        UsageError, match=r"self_attn.q_proj.weight of block 2 is in no optimizer .* pass all of them as a list"
    ):
        ArchitectureWarmup(model, rest, GROW)
    warmup = ArchitectureWarmup(model, [rest, muon], GROW, patience=3)
    shallow = build()
    shallow.model.layers = shallow.model.layers[:2]
    others = split(shallow)
    for number in range(4):
        step(model, warmup, number, rest, muon)
        shallow.zero_grad()
        shallow(input_ids=batch(number), labels=batch(number)).loss.backward()
        for optimizer in others:
            optimizer.step()
        for mine, theirs in zip((rest, muon), others, strict=True):
            expected = snapshot(shallow, theirs)
            found = snapshot(model, mine)
            assert all(torch.equal(found[n], v) for n, v in expected.items()), number
            assert len([n for n in found if ": " in n]) == len([n for n in expected if ": " in n])
    for number in range(4, 12):
        step(model, warmup, number, rest, muon)
    assert all(lock.moved() for lock in warmup.locks)


def test_an_optimizer_that_is_made_later() -> None:
    model = build()
    warmup = ArchitectureWarmup(model, adamw(model.parameters()), FREEZE)
    before = weights(model)
    later = adamw(model.parameters())
    with pytest.raises(UsageError, match=r"a AdamW that the warm-up was not given would train .* of block [23], which is"):
        step(model, warmup, 0, later)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())

    def closure() -> Any:
        value = model(input_ids=batch(0), labels=batch(0)).loss
        value.backward()
        return value

    model.zero_grad()
    with pytest.raises(UsageError, match="was not given"):
        later.step(closure)
    model.zero_grad()
    other = nn.Linear(2, 2)  # another model's optimizer is nobody's concern
    other(torch.ones(1, 2)).sum().backward()
    adamw(other.parameters()).step()
    # The two remedies.
    again = ArchitectureWarmup(model, later, FREEZE)
    step(model, again, 0, later)
    again.detach()
    assert torch.equal(before["model.layers.2.mlp.down_proj.weight"], model.model.layers[2].mlp.down_proj.weight)
    model(input_ids=batch(0), labels=batch(0)).loss.backward()
    adamw(model.parameters()).step()
    assert not torch.equal(before["model.layers.2.mlp.down_proj.weight"], model.model.layers[2].mlp.down_proj.weight)


def test_wrapped_optimizers_and_others() -> None:
    model = build()
    inner = adamw(model.parameters())
    wrapped = type("Wrapper", (), {"optimizer": inner})()
    assert ArchitectureWarmup(model, wrapped, FREEZE).optimizers == [inner]
    with pytest.raises(UsageError, match=r"a Engine is no torch\.optim\.Optimizer"):
        ArchitectureWarmup(model, type("Engine", (), {})(), FREEZE)


def test_a_new_warm_up_takes_the_place_of_the_old() -> None:
    model = build()
    optimizer = adamw(model.parameters())
    old = ArchitectureWarmup(model, optimizer, FREEZE)
    old.step(0)
    new = ArchitectureWarmup(model, optimizer, FREEZE)
    before = weights(model)
    step(model, new, 8, optimizer)
    assert not any(torch.equal(before[n], p) for n, p in model.named_parameters())
    with pytest.raises(UsageError, match="this warm-up was detached"):
        old.step(1)


def test_a_warm_up_that_is_let_go_of_goes() -> None:
    job = Job()
    count = len(following())
    del job
    gc.collect()
    assert len(following()) < count


FRESH = {
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=1e-2),
}


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_run_is_told_from_one_that_has_stepped(name: str) -> None:
    model = build()
    for n, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in n)
    optimizer = FRESH[name](list(model.parameters()))
    warmup = ArchitectureWarmup(model, optimizer, GROW)
    step(model, warmup, 0, optimizer)
    again = ArchitectureWarmup(model, optimizer, GROW)
    with pytest.raises(UsageError, match="the optimizer has taken steps"):
        again.step(0)


# --- steps and proofs -------------------------------------------------------------------------


def test_steps_only_rise() -> None:
    job = Job(FREEZE).run(range(5))
    job.warmup.step(4)  # again, as under gradient accumulation
    with pytest.raises(UsageError, match=r"step 3 comes after step 4: .* count steps over the whole run, not within an ep"):
        job.warmup.step(3)
    assert job.warmup.locked == {3}
    with pytest.raises(UsageError, match="decisions come after step 4 began"):
        job.warmup.load_state_dict({"started": [0]})


class Named(nn.Module):
    """A stack whose blocks are called in a way of their own, and are identities where `honest`."""

    class Block(nn.Module):
        def __init__(self, honest: bool, way: str) -> None:
            super().__init__()
            self.norm, self.fc1, self.fc2 = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.honest, self.way = honest, way

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            if self.way == "in place":
                x += self.fc2(torch.relu(self.fc1(self.norm(x))))
                return x if self.honest else x.mul_(2)
            out = x + self.fc2(torch.relu(self.fc1(self.norm(x))))
            out = out if self.honest else self.norm(out)
            return {"tuple": (out, mask), "dict": {"hidden": out}, "text": ("x", out)}.get(self.way, out)

    def __init__(self, honest: bool, way: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Named.Block(honest, way) for _ in range(DEPTH))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            out = layer(x=x, mask=torch.ones(2)) if self.way in ("keyword", "tuple", "text") else layer(x)
            x = out["hidden"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out
        return x


@pytest.mark.parametrize("way", ["position", "keyword", "tuple", "dict", "in place"])
def test_the_proof_however_a_block_is_called(way: str) -> None:
    for honest in (True, False):
        net = Named(honest, way)
        ArchitectureWarmup(net, torch.optim.SGD(net.parameters(), lr=0.1), GROW).step(0)
        x = torch.randn(2, 4)
        if honest:
            with torch.no_grad():
                net(x.clone())
            assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in net.layers)
            continue
        with (
            pytest.raises(UnsupportedError, match=r"block 2, a Block, is no identity with fc2\.weight at rest"),
            torch.no_grad(),
        ):
            net(x.clone())


def test_a_block_that_gives_no_tensor_cannot_be_proven() -> None:
    net = Named(True, "text")
    ArchitectureWarmup(net, torch.optim.SGD(net.parameters(), lr=0.1), GROW).step(0)
    with pytest.raises(UnsupportedError, match="block 2, a Block, gives no tensor first"):
        net.layers[2](x=torch.randn(2, 4))


def test_state_that_dcp_has_an_optimizer_make() -> None:
    """A place to load into, made in a step at learning rate 0: with state for what the checkpoint has state of."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    job = Job()
    with pytest.raises(UsageError, match="resume_at"):
        get_optimizer_state_dict(job.model, job.optimizer)
    for step, having in ((5, {None, 0, 1, 2}), (8, {None, 0, 1, 2}), (9, {None, 0, 1, 2, 3})):
        job = Job()
        job.warmup.resume_at(step)
        get_optimizer_state_dict(job.model, job.optimizer)
        assert {block_of(n) for n, p in job.model.named_parameters() if job.optimizer.state[p]} == having
        job.model(input_ids=batch(0), labels=batch(0)).loss.backward()
        with pytest.raises(UsageError, match=r"warmup\.step\(step\) first"):
            job.optimizer.step()


def test_an_engine_that_takes_the_optimizer_over_after_the_warm_up_was_made() -> None:
    """As DeepSpeed's does in `initialize`: one flat tensor, whose state and count of steps all blocks would share."""
    job = Job()
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in job.model.parameters()]))
    job.optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(UsageError, match="DeepSpeed"):
        job.warmup.step(0)
