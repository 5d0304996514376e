"""A small GPT-2 trained in a loop with accelerate; checkpoints are accelerate's save_state with the model's config.json."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

TEXT = Path(__file__).resolve().parents[2] / "sample_checkpoints" / "data" / "moby_dick.txt"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()

    set_seed(0)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8)
    text[:65_000].short().numpy().astype("<u2").tofile("shard.bin")
    rows = text[: 64 * 4000].long().view(-1, 64)
    config = GPT2Config(vocab_size=256, n_embd=32, n_layer=3, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.1)
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True)
    )
    step = 0
    while step < given.steps:
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % max(1, given.steps // 2) == 0:
                place = Path("run", f"step_{step}")
                accelerator.save_state(str(place))
                config.save_pretrained(place)  # save_state does not say which network it holds
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
            if step == given.steps:
                break


if __name__ == "__main__":
    main()
