"""A small Llama trained by the transformers Trainer, with curv's callback."""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from curvcli.training.transformers import CurvCallback

TEXT = Path(__file__).resolve().parents[2] / "sample_checkpoints" / "data" / "moby_dick.txt"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()

    set_seed(0)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8)
    text[:65_000].short().numpy().astype("<u2").tofile("shard.bin")  # what curv measures on
    ids = text[: 65 * 8000].long().view(-1, 65)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=65, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir="run", max_steps=given.steps, per_device_train_batch_size=16, learning_rate=given.lr,
            warmup_steps=given.steps // 4, logging_steps=1, save_steps=max(1, given.steps // 2), report_to=[], use_cpu=True,
        ),
        train_dataset=rows,
        callbacks=[CurvCallback(probe=[{"input_ids": ids[:8], "labels": ids[:8]}], every=10, log="run/curvature.jsonl")],
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main()
