"""LoRA adapters: peft's own writing, an oracle over peft's own reading, and configurations that are not followed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import build, config
from torch import nn

import curvcli
from curvcli.analysis.checkpoint import Options, analyze_checkpoint, open_for_analysis
from curvcli.analysis.track import key_of
from curvcli.checkpoints import open_checkpoint
from curvcli.errors import InputError, UnsupportedError, UsageError
from curvcli.models.architecture import named

LR, BETAS = 1e-2, (0.9, 0.95)
IDS = torch.randint(64, (40, 17), generator=torch.Generator().manual_seed(0)) ** 2 % 61


def write(root: Path, **how: Any) -> Path:
    """A base and, two below, an adapter of four steps, as the Trainer saves them."""
    base = build()
    base.save_pretrained(root / "base")
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **how}
    model = get_peft_model(base, LoraConfig(**settings))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, betas=BETAS)
    for step in range(4):
        model(input_ids=IDS[step::10], labels=IDS[step::10]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.peft_config["default"].base_model_name_or_path = str(root / "base")
    path = root / "run" / "checkpoint-4"
    model.save_pretrained(str(path))
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    (path / "trainer_state.json").write_text('{"global_step": 4, "log_history": []}')
    return path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("lora"))


def edited(path: Path, copy: Path, **fields: object) -> Path:
    """The adapter with other fields, beside a base of the same place."""
    import shutil

    shutil.copytree(path.parents[1], copy)
    there = copy / "run" / "checkpoint-4"
    document = json.loads((there / "adapter_config.json").read_text())
    document |= {"base_model_name_or_path": str(copy / "base"), **fields}
    (there / "adapter_config.json").write_text(json.dumps(document))
    return there


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranks and alphas by module": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 4},
    "with the head": {"modules_to_save": ["lm_head"]},
    "with the embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "everywhere": {"target_modules": "all-linear", "lora_dropout": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_pefts_own(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, **KINDS[kind])
    checkpoint = open_checkpoint(path)
    model = checkpoint.model()
    own = PeftModel.from_pretrained(build().from_pretrained(tmp_path / "base"), path, is_trainable=True).eval()
    with torch.no_grad():
        assert torch.allclose(model(input_ids=IDS).logits, own(input_ids=IDS).logits, atol=1e-6)
    trained = [n for n, p in own.base_model.model.named_parameters() if p.requires_grad]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    view = checkpoint.optimizer.view(model)
    state = torch.load(path / "optimizer.pt", weights_only=True)["state"]
    for i, name in enumerate(trained):
        assert torch.equal(view.state[name]["exp_avg_sq"], state[i]["exp_avg_sq"])
    assert (checkpoint.format, checkpoint.step, checkpoint.vocabulary) == ("lora", 4, 64)


def dense_top(path: Path, rows: torch.Tensor) -> float:
    """Largest eigenvalue of P^(-1/2) H P^(-1/2) over the adapter, of dense float64 from peft's own model.

    Shares first-order autograd with curv, and nothing else: central differences of gradients, P from the definition.
    """
    base = build().from_pretrained(path.parents[1] / "base", attn_implementation="eager")
    model: nn.Module = PeftModel.from_pretrained(base, path, is_trainable=True).double().eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = torch.load(path / "optimizer.pt", weights_only=True)["state"]
    metric = torch.cat(
        [
            ((1 - BETAS[0] ** 4) * ((s["exp_avg_sq"].double() / (1 - BETAS[1] ** 4)).sqrt() + 1e-8)).flatten()
            for s in (state[i] for i in range(len(trained)))
        ]
    )

    def gradient() -> torch.Tensor:
        logits = model(input_ids=rows[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    columns = []
    for parameter in trained:
        flat = parameter.data.view(-1)
        for i in range(flat.numel()):
            value, sides = flat[i].item(), []
            for step in (1e-4, -1e-4):
                flat[i] = value + step
                sides.append(gradient())
            flat[i] = value
            columns.append((sides[0] - sides[1]) / 2e-4)
    hessian = torch.stack(columns, 1)
    root = metric.rsqrt()
    return float(torch.linalg.eigvalsh(root[:, None] * (hessian + hessian.T) / 2 * root)[-1])


@pytest.mark.slow
def test_curvature_is_over_the_adapter(adapter: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", IDS.flatten().numpy())
    options = Options(data=tmp_path / "ids.npy", tokens=64, sequence_length=16, tolerance=1e-3, depths=False, mode="kept")
    report = analyze_checkpoint(adapter.parent, options)
    rows = IDS.flatten()[: 4 * 17].view(4, 17)
    assert report.full.eigenvalue == pytest.approx(dense_top(adapter, rows), rel=1e-3)
    assert report.checkpoint.step == 4
    assert "adapter" in {finding.code for finding in report.findings}


HOSTILE: dict[str, tuple[dict[str, object], type[Exception], str]] = {
    "a path elsewhere": ({"base_model_name_or_path": "/etc"}, InputError, "--model DIR"),
    "a name on the hub": ({"base_model_name_or_path": "meta-llama/Llama-2-7b"}, InputError, "--model DIR"),
    "upwards": ({"base_model_name_or_path": "../../../../.."}, InputError, "--model DIR"),
    "no path": ({"base_model_name_or_path": None}, InputError, "--model DIR"),
    "a null byte": ({"base_model_name_or_path": "a\0b"}, InputError, "--model DIR"),
    "another kind": ({"peft_type": "IA3"}, UnsupportedError, "IA3"),
    "DoRA": ({"use_dora": True}, UnsupportedError, "use_dora"),
    "an unknown option": ({"runs_code": "os.system"}, UnsupportedError, "runs_code"),
    "a changed base": ({"init_lora_weights": "pissa"}, UnsupportedError, "init_lora_weights"),
    "a pattern": ({"alpha_pattern": {"(a+)+$": 3}}, InputError, "patterns"),
    "a huge alpha": ({"lora_alpha": 1e400}, InputError, "out of range"),
    "no alpha": ({"lora_alpha": None}, InputError, "out of range"),
    "modules by pattern": ({"modules_to_save": ["(a+)+$"]}, InputError, "patterns"),
    "a module that was not saved": ({"modules_to_save": ["lm_head"]}, InputError, "does not fit"),
    "a list": ({"rank_pattern": [1]}, InputError, "out of range"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_a_configuration_may_not_say(case: str, adapter: Path, tmp_path: Path) -> None:
    fields, kind, said = HOSTILE[case]
    path = edited(adapter, tmp_path / "copy", **fields)
    with pytest.raises(kind, match=said):
        open_checkpoint(path).model()


def test_patterns_that_only_say_where_are_not_run(adapter: Path, tmp_path: Path) -> None:
    """target_modules may be a regular expression that takes forever; the tensors' names say the same."""
    path = edited(adapter, tmp_path / "copy", target_modules="(.*)*(.*)*(.*)*q_proj$", exclude_modules="(a+)+$")
    assert len([p for p in open_checkpoint(path).model().parameters() if p.requires_grad]) == 8


def test_another_base_is_named_and_counts_in_the_key(adapter: Path, tmp_path: Path) -> None:
    path = edited(adapter, tmp_path / "copy", base_model_name_or_path="gone")
    base = tmp_path / "copy" / "base"
    assert len([p for p in open_checkpoint(path, named(str(base))).model().parameters() if p.requires_grad]) == 8
    np.save(tmp_path / "ids.npy", np.arange(600) % 64)
    options = Options(data=tmp_path / "ids.npy", tokens=128, sequence_length=16, model=str(base))
    before = key_of(open_for_analysis(path, options))
    torch.manual_seed(1)
    other = type(build())(config())
    other.save_pretrained(base)
    assert key_of(open_for_analysis(path, options)) != before


def test_an_adapter_of_another_base(adapter: Path, tmp_path: Path) -> None:
    path = edited(adapter, tmp_path / "copy")
    small = config()
    small.num_hidden_layers = 1
    type(build())(small).save_pretrained(tmp_path / "copy" / "base")
    with pytest.raises(InputError, match="does not fit its base"):
        open_checkpoint(path).model()


def test_without_peft(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises((InputError, UsageError), match="pip install peft"):
        open_checkpoint(adapter).model()


@pytest.mark.parametrize("link", [True, False])
def test_a_base_elsewhere_is_not_followed(link: bool, adapter: Path, tmp_path: Path) -> None:
    """A sound model, and none of the adapter's to name: by its path, or behind a link in the run."""
    elsewhere = adapter.parents[1] / "base"
    path = edited(adapter, tmp_path / "copy", base_model_name_or_path="../base" if link else str(elsewhere))
    if link:
        (path.parent / "base").symlink_to(elsewhere)
    with pytest.raises(InputError, match="--model DIR"):
        open_checkpoint(path)


def test_the_groups_of_lora_plus_are_known(tmp_path: Path) -> None:
    """peft's own optimizer: A, embeddings, B, and biases, which the Trainer's rules order otherwise."""
    from peft.optimizers import create_loraplus_optimizer

    base = build()
    base.save_pretrained(tmp_path / "base")
    targets = ["embed_tokens", "q_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=8, betas=BETAS)
    model(input_ids=IDS[:8], labels=IDS[:8]).loss.backward()
    made.step()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    path = tmp_path / "run" / "checkpoint-1"
    model.save_pretrained(str(path))
    torch.save(made.state_dict(), path / "optimizer.pt")
    names = {id(p): n.removeprefix("base_model.model.") for n, p in model.named_parameters()}
    for file in ("optimizer.pt", "optimizer.safetensors"):
        if file == "optimizer.safetensors":  # names as peft's wrapper has them; it is read first
            curvcli.save_optimizer(path, made, model)
        checkpoint = open_checkpoint(path)
        assert checkpoint.optimizer is not None
        assert checkpoint.optimizer.path.name == file
        view = checkpoint.optimizer.view(checkpoint.model())
        assert [list(g.names) for g in view.groups] == [[names[id(p)] for p in g["params"]] for g in made.param_groups]
        assert {g.options["lr"] for g in view.groups} == {LR, 1e-6, 8 * LR}
