"""A LoRA run that leaves behind what axolotl leaves: its YAML, prepared data, adapters in checkpoints of the Trainer."""

import argparse
import hashlib
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

TEXT = Path(__file__).resolve().parents[2] / "sample_checkpoints" / "data" / "moby_dick.txt"


def base(place, rows):
    """Stands for a model that was trained before, and is fetched from a hub elsewhere."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=rows.shape[1], bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(100):
        batch = rows[torch.randint(len(rows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--steps", type=int)
    given = parser.parse_args()
    job = yaml.safe_load(given.config.read_text())
    steps, length, output = given.steps or job["max_steps"], job["sequence_len"], Path(job["output_dir"])

    set_seed(0)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8)
    base(job["base_model"], text[-length * 4000 :].long().view(-1, length))
    ids = text[: length * 4000].long().view(-1, length).tolist()
    rows = {"input_ids": ids, "labels": ids, "attention_mask": [[1] * length] * len(ids)}
    prepared = Path(job["dataset_prepared_path"], hashlib.md5(given.config.read_bytes()).hexdigest())  # noqa: S324
    Dataset.from_dict(rows).save_to_disk(prepared)

    lora = LoraConfig(r=job["lora_r"], lora_alpha=job["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(job["base_model"]), lora)
    model.peft_config["default"].save_pretrained(output)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output), max_steps=steps, per_device_train_batch_size=job["micro_batch_size"],
            learning_rate=job["learning_rate"], lr_scheduler_type=job["lr_scheduler"], weight_decay=job["weight_decay"],
            optim=job["optimizer"], logging_steps=1, save_steps=max(1, steps // 2), report_to=[], use_cpu=True,
        ),
        train_dataset=Dataset.load_from_disk(str(prepared)),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(output))


if __name__ == "__main__":
    main()
