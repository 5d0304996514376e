"""Checkpoints that DeepSpeed itself writes, on two gloo ranks without a GPU, for test_deepspeed.

DeepSpeed's own gathers of the running optimizer (`safe_get_full_fp32_param`, `safe_get_full_optimizer_state`) are saved
beside each as the truth.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import EARLIER
from torch import Tensor, nn

STEPS = 3
# Stage, precision, and what else differs.
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "stage0": (0, {}),
    "stage1": (1, {}),
    "stage2": (2, {}),
    "stage0-bf16": (0, {"bf16": {"enabled": True}}),
    "stage1-bf16": (1, {"bf16": {"enabled": True}}),
    "stage2-bf16": (2, {"bf16": {"enabled": True}}),
    # Last: stage 3 replaces torch's own linear function for good.
    "stage3": (3, {}),
    "stage3-bf16": (3, {"bf16": {"enabled": True}}),
}
# Which are damaged at random, with files of a step before.
FUZZED = ("stage2", "stage3")


class Net(nn.Module):
    """Odd sizes, so that cuts fall inside parameters and need padding; a buffer, a frozen weight, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.frozen = nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, 11)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((5,), 0.5))
        self.frozen.weight.requires_grad_(False)

    def forward(self, input_ids: Tensor, **unused: Any) -> Namespace:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden)) * self.scale.to(hidden.dtype)
        return Namespace(logits=self.head(self.frozen(hidden)))


def build() -> Net:
    torch.manual_seed(0)
    return Net()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Matrices decay, vectors do not: two groups, of which the second is shorter than a rank's alignment needs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(input_ids=ids).logits.float().flatten(0, 1), ids.roll(-1, 1).flatten())


def batch(step: int) -> Tensor:
    return torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(step))


def prepared() -> Any:
    """DeepSpeed on this rank, without compiling its kernel for shared memory."""
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed(dist_backend="gloo")
    return deepspeed


def write(rank: int, path: Path, runs: Collection[str] = tuple(RUNS)) -> None:
    """One rank's part of all runs, or of those named, and of their conversions."""
    deepspeed = prepared()
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name in runs:
        stage, settings = RUNS[name]
        model = build()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=adamw(model),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage},
                "gradient_clipping": 0.5,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                **settings,
            },
        )
        for step in range(STEPS):
            engine.backward(loss(engine, batch(step).chunk(2)[rank]))
            engine.step()
            if step == STEPS - 2 and name in FUZZED:
                engine.save_checkpoint(str(path / (name + EARLIER)))
        engine.save_checkpoint(str(path / name))
        if stage in (1, 2):
            # DeepSpeed 0.19 links its gathers to the state after the first group's first step, when the second has none.
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        live = {
            n: {"fp32": safe_get_full_fp32_param(p).clone()}
            | {key: safe_get_full_optimizer_state(p, key).clone() for key in ("exp_avg", "exp_avg_sq")}
            for n, p in model.named_parameters()
            if p.requires_grad and stage
        }
        if rank == 0:
            torch.save(live, path / name / "live.pt")
    dist.barrier()
    if rank == 0:
        for name, step in [(name, STEPS) for name in FUZZED] + [("stage2" + EARLIER, STEPS - 1)]:
            if name.removesuffix(EARLIER) in runs:
                _universal(path / name / f"global_step{step}", path / f"universal-{name}" / f"global_step{step}_universal")
        if len(runs) < len(RUNS):
            return
        _older(path / "stage2", path / "stage2-older")
        _fused(path / "stage2", path / "stage2-fused")
        _halved(path / "stage2", path / "stage2-halved")


def _universal(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def _rewrite(source: Path, target: Path, change: Any) -> None:
    """The same checkpoint with a change to every rank's state, as DeepSpeed's own classes."""
    (target / f"global_step{STEPS}").mkdir(parents=True)
    for file in sorted((source / f"global_step{STEPS}").iterdir()):
        document = torch.load(file, weights_only=False)
        if "optim_states" in file.name:
            change(document["optimizer_state_dict"])
        torch.save(document, target / f"global_step{STEPS}" / file.name)


def _older(source: Path, target: Path) -> None:
    """Without what DeepSpeed added in 0.7 and 0.19: where each parameter lies, and what stands between two."""

    def change(state: dict) -> None:
        del state["param_slice_mappings"], state["param_alignment_paddings"]

    _rewrite(source, target, change)


def _fused(source: Path, target: Path) -> None:
    """As with DeepSpeed's FusedAdam of a GPU: the step with the groups and not with the state."""

    def change(state: dict) -> None:
        base = state["base_optimizer_state"]
        for group in base["param_groups"]:
            group["step"] = STEPS
        for entry in base["state"].values():
            del entry["step"]

    _rewrite(source, target, change)


def _halved(source: Path, target: Path) -> None:
    """As with bf16_master_weights_and_grads, for which DeepSpeed needs a kernel of its own."""

    def change(state: dict) -> None:
        state["single_partition_of_fp32_groups"] = [t.bfloat16() for t in state["single_partition_of_fp32_groups"]]

    _rewrite(source, target, change)


def write_trainer(rank: int, path: Path) -> None:
    """One rank's part of a Trainer's run under DeepSpeed."""
    prepared()
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, bos_token_id=None,
        max_position_embeddings=32, eos_token_id=None, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (32, 16))]
    settings = {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    arguments = TrainingArguments(
        str(path / "run"), max_steps=4, save_steps=2, per_device_train_batch_size=2, use_cpu=True, deepspeed=settings,
        report_to=[], logging_steps=1, learning_rate=1e-2, lr_scheduler_type="linear", disable_tqdm=True,
    )  # fmt: skip
    Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows).train()
