"""DeepSpeed's checkpoints, from files that it wrote in the test (deepspeed_runs.py), against its own running state."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import damaged_checkpoint, damages, read_everything
from deepspeed_runs import RUNS, STEPS, adamw, batch, build, loss, write, write_trainer
from formats import RANKED, master
from ranks import EARLIER, launch
from refusals import Evil, one_line, truncate
from torch import nn

from curvcli.analysis.cache import NoCache
from curvcli.analysis.checkpoint import Options, analyze_checkpoint
from curvcli.analysis.inspection import inspect_checkpoint
from curvcli.analysis.track import track_run
from curvcli.checkpoints import open_checkpoint
from curvcli.checkpoints.base import Checkpoint
from curvcli.checkpoints.formats import deepspeed
from curvcli.checkpoints.formats.zero import Partitions, rank_files
from curvcli.errors import CurvError, InputError, UnsupportedError
from curvcli.models.base import Architecture
from curvcli.optimizers.preconditioner import prepare

pytest.importorskip("deepspeed")
# Two real ranks of DeepSpeed write what all of it reads: seconds before the first test.
pytestmark = pytest.mark.slow
NET = Architecture("Net", build, vocabulary=11)
OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "deepspeed"
    path.mkdir()
    launch(write, path, initialize=False)
    return path


@pytest.fixture
def stage2(runs: Path, tmp_path: Path) -> Path:
    """The ranks' directory of a copy to damage."""
    return Path(shutil.copytree(runs / "stage2", tmp_path / "stage2")) / f"global_step{STEPS}"


@pytest.fixture
def stage3(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "stage3", tmp_path / "stage3")) / f"global_step{STEPS}"


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same training by torch alone, on one rank."""
    model = build()
    optimizer = adamw(model)
    for step in range(STEPS):
        loss(model, batch(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def read(path: Path) -> Checkpoint:
    return open_checkpoint(path, NET)


def state(checkpoint: Checkpoint, model: nn.Module) -> dict[str, dict]:
    assert checkpoint.optimizer is not None
    return {name: dict(entry) for name, entry in checkpoint.optimizer.view(model).state.items()}


def everything(path: Path) -> None:
    """Read all of a checkpoint."""
    checkpoint = read(path)
    state(checkpoint, checkpoint.model())


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


PARTITIONED = [name for name, (stage, _) in RUNS.items() if stage]
DERIVED = {
    "universal-stage2": "stage2", "universal-stage3": "stage3", "stage2-older": "stage2", "stage2-fused": "stage2",
}  # fmt: skip


@pytest.mark.parametrize("name", [*PARTITIONED, *DERIVED])
def test_masters_and_moments_are_those_of_the_running_optimizer(name: str, runs: Path) -> None:
    """Against DeepSpeed's own gathers while it ran, bit by bit."""
    live = torch.load(runs / DERIVED.get(name, name) / "live.pt", weights_only=True)
    checkpoint = read(runs / name)
    model = checkpoint.model()
    found = state(checkpoint, model)
    assert (checkpoint.format, checkpoint.step) == ("deepspeed", STEPS)
    assert set(found) == set(live)
    weights = dict(model.named_parameters())
    for parameter, expected in live.items():
        assert torch.equal(weights[parameter], expected["fp32"]), parameter
        assert float(found[parameter]["step"]) == STEPS
        for key in MOMENTS:
            assert torch.equal(found[parameter][key], expected[key]), (parameter, key)


@pytest.mark.parametrize("name", ["stage0", "stage1", "stage2", "stage3"])
def test_float32_runs_are_the_plain_run(name: str, runs: Path, plain: tuple) -> None:
    model, optimizer = plain
    checkpoint = read(runs / name)
    found = checkpoint.model()
    view = state(checkpoint, found)
    buffers = dict(found.named_buffers())
    assert torch.equal(buffers["scale"], torch.full((5,), 0.5))
    for (parameter, mine), theirs in zip(found.named_parameters(), model.parameters(), strict=True):
        if not theirs.requires_grad:
            assert parameter == "frozen.weight"
            assert torch.equal(mine, theirs)
            continue
        assert error(mine.detach(), theirs.detach()) < 1e-5
        for key in MOMENTS:
            assert error(view[parameter][key], optimizer.state[theirs][key]) < 1e-5


@pytest.mark.parametrize("name", ["stage0", "stage2", "stage3", "universal-stage2", "universal-stage3"])
def test_groups_and_their_options(name: str, runs: Path) -> None:
    checkpoint = read(runs / name)
    assert checkpoint.optimizer is not None
    view = checkpoint.optimizer.view(checkpoint.model())
    decayed, rest = sorted(view.groups, key=lambda group: -group.number("weight_decay"))
    assert set(decayed.names) == {"embed.weight", "layers.0.weight", "layers.1.weight"}
    assert set(rest.names) == {"layers.0.bias", "layers.1.bias", "head.bias"}
    assert (decayed.number("weight_decay"), rest.number("weight_decay")) == (0.1, 0.0)
    assert (decayed.number("lr"), decayed.betas) == (1e-2, (0.9, 0.95))
    assert view.step == STEPS
    shown = checkpoint.optimizer.summary()
    assert (shown["parameters with state"], shown["lr"]) == (6, 1e-2)
    # DeepSpeed does not save its limit at stages 0 and 3.
    assert ("clipped-moments" in checkpoint.notes) == (name.endswith("stage2"))


def test_half_precision_weights_are_not_read_in_place_of_masters(runs: Path) -> None:
    weights = dict(read(runs / "stage2-bf16").model().named_parameters())
    stored = torch.load(runs / f"stage2-bf16/global_step{STEPS}/mp_rank_00_model_states.pt", weights_only=True)["module"]
    # Both names of the tied weight are stored in half precision; neither may end up in the model.
    for name in ("embed.weight", "head.weight"):
        assert stored[name].dtype == torch.bfloat16
        assert 1e-4 < error(stored[name].float(), weights["embed.weight"].detach()) < 1e-2


def test_derived_places_are_the_ones_the_ranks_wrote(runs: Path) -> None:
    """What older versions do not say, and is computed, against what this version does say."""
    tag = runs / "stage2" / f"global_step{STEPS}"
    document = torch.load(tag / "mp_rank_00_model_states.pt", weights_only=True)
    partitions = Partitions(tag, [{n: tuple(shape) for n, shape in group.items()} for group in document["param_shapes"]])
    said = partitions._said
    for group in range(2):
        assert partitions._group_cut(group) == said[group]
    assert len(said[0]["embed.weight"]) == 2


def test_ranks_are_sorted_by_number(tmp_path: Path) -> None:
    for rank in range(12):
        (tmp_path / OPTIM.format(rank)).touch()
    assert [int(f.name.split("_")[3]) for f in rank_files(tmp_path)] == list(range(12))


def test_without_a_network_it_is_listed(runs: Path) -> None:
    found = inspect_checkpoint(runs / "stage3")
    assert found["parameters"] == sum(t.numel() for t in [*build().parameters(), *build().buffers()])
    assert found["optimizer"]["groups"] == 2
    with pytest.raises(InputError, match="--model"):
        open_checkpoint(runs / "stage3").model()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "first rank missing": (lambda t: (t / OPTIM.format(0)).unlink(), "no optimizer file of rank 0"),
    "last rank missing": (lambda t: (t / OPTIM.format(1)).unlink(), "saved by 2 ranks and has files of 1"),
    "one rank too many": (lambda t: shutil.copy(t / OPTIM.format(1), t / OPTIM.format(2)), "has files of 3"),
    "a rank twice": (lambda t: shutil.copy(t / OPTIM.format(1), t / ("bf16_" + OPTIM.format(1))), "second file"),
    "all ranks missing": (lambda t: [f.unlink() for f in t.glob("*optim*")], "no optimizer's of any rank"),
    "truncated rank": (lambda t: truncate(t / OPTIM.format(1)), "optim_states.pt"),
    "empty rank": (lambda t: (t / OPTIM.format(0)).write_bytes(b""), "is empty"),
    "model's file of another kind": (lambda t: torch.save({"a": 1}, t / "mp_rank_00_model_states.pt"), "no model"),
    "state of nothing": (lambda t: torch.save({"optimizer_state_dict": {}}, t / OPTIM.format(0)), "saved by None"),
    "tensor parallel": (lambda t: (t / "mp_rank_01_model_states.pt").touch(), "tensor, pipeline or expert"),
    "pipeline parallel": (lambda t: (t / "layer_00-model_states.pt").touch(), "tensor, pipeline or expert"),
    "NVMe": (lambda t: (t / "offloaded_tensors").mkdir(), "ZeRO-Infinity"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(case: str, stage2: Path) -> None:
    damage, said = DAMAGE[case]
    damage(stage2)
    with pytest.raises(CurvError, match=said) as caught:
        everything(stage2)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_swapped_ranks_do_not_fit(stage2: Path) -> None:
    """The pieces of the parameter that both ranks share have the right length together, and do not meet."""
    first, last, aside = stage2 / OPTIM.format(0), stage2 / OPTIM.format(1), stage2 / "aside"
    first.rename(aside)
    last.rename(first)
    aside.rename(last)
    checkpoint = read(stage2)
    with pytest.raises(InputError, match=r"embed.weight .* do not meet"):
        checkpoint.model()


@pytest.mark.parametrize("name", ["stage2", "stage3"])
def test_a_rank_of_another_step_is_refused(name: str, runs: Path, tmp_path: Path) -> None:
    """Every shape fits, and the weights would be of two steps."""
    tag = Path(shutil.copytree(runs / name, tmp_path / "mixed")) / f"global_step{STEPS}"
    shutil.copy(runs / (name + EARLIER) / f"global_step{STEPS - 1}" / OPTIM.format(1), tag)
    with pytest.raises(InputError, match=r"its ranks counted 3\.0, 2\.0 steps"):
        read(tag).model()


def test_a_parameter_of_another_step_is_refused(runs: Path, tmp_path: Path) -> None:
    tag = Path(shutil.copytree(runs / "universal-stage2", tmp_path / "mixed")) / f"global_step{STEPS}_universal"
    earlier = runs / ("universal-stage2" + EARLIER) / f"global_step{STEPS - 1}_universal"
    shutil.copytree(earlier / "zero" / "layers.1.weight", tag / "zero" / "layers.1.weight", dirs_exist_ok=True)
    with pytest.raises(InputError, match="different steps"):
        everything(tag)


@pytest.mark.parametrize("value", [torch.ones(3), 3])
def test_a_parameter_of_another_shape(value: object, runs: Path, tmp_path: Path) -> None:
    tag = Path(shutil.copytree(runs / "universal-stage2", tmp_path / "u")) / f"global_step{STEPS}_universal"
    torch.save({"param": value}, tag / "zero" / "head.bias" / "fp32.pt")
    with pytest.raises(InputError, match=r"head\.bias/fp32\.pt holds .* the parameter has \(11,\)"):
        read(tag).model()


@pytest.mark.parametrize("name", ["embed.weight", "layers.1.weight"])
def test_a_moment_that_one_parameter_lacks(name: str, runs: Path, tmp_path: Path) -> None:
    tag = Path(shutil.copytree(runs / "universal-stage2", tmp_path / "u")) / f"global_step{STEPS}_universal"
    (tag / "zero" / name / "exp_avg.pt").unlink()
    with pytest.raises(InputError, match=rf"cannot read .*{name}/exp_avg\.pt"):
        everything(tag)
    checkpoint = read(tag)
    with pytest.raises(InputError, match=r"exp_avg\.pt"):
        prepare(checkpoint.optimizer.view(checkpoint.model()), dict(checkpoint.model().named_parameters()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.update(partition_count=[2, 1]), "different numbers of ranks"),
        (lambda state: state.update(ds_zero_partition_groups=[1]), "different numbers of ranks"),
        (lambda state: state.update(base_optimizer_state=[1]), "elastic checkpoint"),
        (lambda state: state.update(base_optimizer_state={"param_groups": []}), "holds no optimizer state"),
        (lambda state: state["single_partition_of_fp32_groups"].pop(), "1 groups of weights, its model 2"),
        (lambda state: state["base_optimizer_state"].pop("param_groups"), "does not hold the optimizer's settings"),
        (lambda state: state["single_partition_of_fp32_groups"].__setitem__(0, 3), "has no fp32 of group 0"),
        (lambda state: state["single_partition_of_fp32_groups"].__setitem__(0, torch.ones(6, 9)), "has no fp32 of group 0"),
        (lambda state: state["single_partition_of_fp32_groups"].__setitem__(0, torch.ones(5)), "values of embed.weight"),
        (lambda state: state["param_slice_mappings"].append({}), "places parameters in a group 2"),
        (lambda state: state["param_slice_mappings"].__setitem__(0, [1]), "places parameters in a group 0"),
        (lambda state: state["param_slice_mappings"][0].update(zorro=1), "places zorro at"),
        (
            lambda state: next(iter(state["param_slice_mappings"][0].values())).__dict__.update(start=-1),
            "places embed.weight",
        ),
    ],
)
def test_a_rank_that_says_something_else(change: Callable[[dict], object], said: str, stage2: Path) -> None:
    document = torch.load(stage2 / OPTIM.format(0), weights_only=False)
    change(document["optimizer_state_dict"])
    torch.save(document, stage2 / OPTIM.format(0))
    with pytest.raises(CurvError, match=said):
        everything(stage2)


def test_adam_without_bias_correction_says_so(stage2: Path) -> None:
    """The rule honours it: P then has no correction, and nothing is refused here."""
    for rank in range(2):
        document = torch.load(stage2 / OPTIM.format(rank), weights_only=False)
        for group in document["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group["bias_correction"] = False
        torch.save(document, stage2 / OPTIM.format(rank))
    checkpoint = read(stage2)
    assert [g.options["bias_correction"] for g in checkpoint.optimizer.view(checkpoint.model()).groups] == [False, False]


def test_a_ranks_weights_under_another_name(stage3: Path) -> None:
    """The pieces of a frozen weight are in every rank's file: one that is none of a rank's is told of."""
    file = stage3 / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    shutil.copy(file, stage3 / "zero_pp_rank_old_mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match="a second file of its rank, or of none"):
        read(stage3).model()


def test_frozen_weights_are_read_once_from_each_rank(stage3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in rank_files(stage3, "model"):
        document = torch.load(file, weights_only=False)
        for kind in ("frozen_param_shapes", "frozen_param_fragments"):
            document[kind]["frozen.again"] = document[kind]["frozen.weight"]
        torch.save(document, file)
    opened, load = [], vars(deepspeed)["load_pickle"]
    monkeypatch.setattr(deepspeed, "load_pickle", lambda file, **how: opened.append(file) or load(file, **how))
    found = deepspeed._Model(stage3).weights(None)
    assert all(torch.equal(found[f"frozen.{name}"], build().frozen.weight) for name in ("weight", "again"))
    assert sorted(opened[1:]) == rank_files(stage3, "model")  # the first was of its head


def test_masters_in_half_precision_are_refused(runs: Path) -> None:
    with pytest.raises(UnsupportedError, match="bfloat16, without float32 masters"):
        read(runs / "stage2-halved").model()
    with pytest.raises(UnsupportedError, match=r"zero_optimization\.stage 1"):
        read(runs / "stage0-bf16").model()


def test_stage_3_needs_every_rank(stage3: Path) -> None:
    (stage3 / OPTIM.format(1)).unlink()
    with pytest.raises(InputError, match="saved by 2 ranks"):
        read(stage3)


def test_stage_3_pieces_of_another_length(stage3: Path) -> None:
    document = torch.load(stage3 / OPTIM.format(1), weights_only=False)
    document["optimizer_state_dict"]["fp32_flat_groups"][0] = torch.ones(5)
    torch.save(document, stage3 / OPTIM.format(1))
    with pytest.raises(InputError, match="whose parameters have 54 each"):
        read(stage3).model()


def test_an_unfinished_conversion(runs: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs / "universal-stage2", tmp_path / "u"))
    (copy / f"global_step{STEPS}_universal" / "zero" / "head.bias" / "fp32.pt").unlink()
    with pytest.raises(InputError, match=r"no weights of head\.bias"):
        read(copy)


@pytest.mark.parametrize("file", ["model", "rank", "universal", "universal-step"])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_nothing_is_executed(file: str, form: str, runs: Path, stage2: Path, tmp_path: Path) -> None:
    path = stage2
    if file.startswith("universal"):
        path = Path(shutil.copytree(runs / "universal-stage2", tmp_path / "u")) / f"global_step{STEPS}_universal"
    target = {
        "model": "mp_rank_00_model_states.pt", "rank": OPTIM.format(1), "universal": "zero/head.bias/exp_avg.pt",
        "universal-step": "zero/optimizer_state.pt",
    }[file]  # fmt: skip
    assert (path / target).is_file()
    trap = tmp_path / "executed"
    torch.save({"optimizer_state_dict": Evil(trap)}, path / target, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(InputError, match="system"):
        everything(path)
    assert not trap.exists()


def test_latest_leads_nowhere_else(stage2: Path) -> None:
    (stage2.parent / "latest").write_text("../../etc")
    assert read(stage2.parent).step == STEPS
    shutil.rmtree(stage2)
    with pytest.raises(InputError, match="holds no checkpoint"):
        read(stage2.parent)


def test_inside_a_trainers_checkpoint(tmp_path: Path) -> None:
    launch(write_trainer, tmp_path, initialize=False)
    run = tmp_path / "run"
    found = inspect_checkpoint(run)
    assert (found["format"], found["step"], found["architecture"]) == ("deepspeed", 4, "LlamaForCausalLM")
    checkpoint = open_checkpoint(run / "checkpoint-2")
    assert [entry.step for entry in checkpoint.log] == [1, 2]
    assert checkpoint.training_loss == pytest.approx(4.16, abs=0.1)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, 2000))
    options = Options(data=tmp_path / "ids.npy", tokens=256, sequence_length=16, max_hvps=6)
    report = analyze_checkpoint(run / "checkpoint-2", options)
    assert (report.optimizer.name, report.optimizer.step, report.optimizer.preconditioner) == ("AdamW", 2, "checkpoint")
    assert report.optimizer.lr == pytest.approx(5e-3)
    assert report.full.rho is not None
    track = track_run(run, replace(options, max_hvps=3), NoCache())
    assert [point.step for point in track.points] == [2, 4]
    assert all(point.report for point in track.points), [point.message for point in track.points]
    # The last checkpoint of a linear schedule has a rate of 0: the log's is taken.
    assert analyze_checkpoint(run, options).optimizer.lr_source == "log"
    shutil.rmtree(run / "checkpoint-4" / "global_step4")
    (run / "checkpoint-2" / "global_step2" / OPTIM.format(0)).unlink()
    assert "no optimizer file of rank 0" in one_line([str(run / "checkpoint-2"), "--data", str(tmp_path / "ids.npy")])


@pytest.mark.parametrize("name", [name for name in RANKED if name.startswith("DeepSpeed")])
def test_damaged_at_random(name: str, runs: Path, tmp_path: Path) -> None:
    """One of each damage; test_fuzz.py does many."""
    assert read_everything(master("checkpoint", name, runs.parent), name).word == "read"
    for kind in range(len(damages(name))):
        damaged_checkpoint(name, kind, kind, runs.parent, tmp_path / "copy")
