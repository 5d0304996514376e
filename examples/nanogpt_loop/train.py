"""A GPT trained in nanoGPT's manner, in a loop of its own with curv's tracker. On SIGUSR1 it saves and ends."""

import argparse
import signal
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from curvcli.training import CurvatureTracker

TEXT = Path(__file__).resolve().parents[2] / "sample_checkpoints" / "data" / "moby_dick.txt"


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, 3 * width, bias=False), "c_proj": nn.Linear(width, width, bias=False)}
        )
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width, bias=False), "c_proj": nn.Linear(4 * width, width, bias=False)}
        )

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.attn["c_attn"](self.ln_1(x)).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attn["c_proj"](y)
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, **_):
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd, bias=False),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight
        for parameter in self.parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids):
        x = self.transformer["wte"](ids) + self.transformer["wpe"](torch.arange(ids.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def loss_of(model, window):
    return functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save-every", type=int, default=100)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)

    tokens = np.frombuffer(TEXT.read_bytes(), dtype=np.uint8).astype(np.uint16)
    if not (given.out / "train.bin").exists():
        tokens.tofile(given.out / "train.bin")  # as nanoGPT stores them, and curv reads them
    stream = torch.from_numpy(tokens.astype(np.int64))

    sizes = {"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 64, "bias": False, "vocab_size": 256, "dropout": 0.0}
    torch.manual_seed(0)
    model = GPT(**sizes)
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=given.lr, betas=(0.9, 0.99))
    first = 0
    if (given.out / "ckpt.pt").exists():
        kept = torch.load(given.out / "ckpt.pt", weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["iter_num"]
        print(f"resumed at step {first}", flush=True)

    def batch(step, rows=16):
        draw = torch.Generator().manual_seed(step)  # of the step alone, so that a resumed job sees the same
        starts = torch.randint(len(stream) - 65, (rows,), generator=draw)
        return torch.stack([stream[i : i + 65] for i in starts])

    def save(step):
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": sizes, "iter_num": step}
        torch.save(state, given.out / "new.pt")
        (given.out / "new.pt").replace(given.out / "ckpt.pt")  # whole or not at all

    stop = []
    signal.signal(signal.SIGUSR1, lambda *_: stop.append(True))
    tracker = CurvatureTracker(
        model, optimizer, loss_of, probe=[batch(-1), batch(-2)], every=20, log=given.out / "curvature.jsonl"
    )
    for step in range(first, given.steps):
        for group in optimizer.param_groups:
            group["lr"] = given.lr * min(1.0, (step + 1) / 50)
        loss = loss_of(model, batch(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tracker.step(step, loss=loss.item())
        if (step + 1) % given.save_every == 0 or step + 1 == given.steps or stop:
            save(step + 1)
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
        if stop:
            print(f"saved at step {step + 1}, asked to stop", flush=True)
            return


if __name__ == "__main__":
    main()
