"""A small Llama trained by accelerate under FSDP2 on several ranks, with curv's tracker, and its sharded save_state."""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from curvcli.training import CurvatureTracker

TEXT = Path(__file__).resolve().parents[2] / "sample_checkpoints" / "data" / "moby_dick.txt"


def accelerated(plugin):
    if torch.accelerator.is_available():
        return Accelerator(fsdp_plugin=plugin)
    # accelerate takes FSDP up on accelerators alone. Past this one question all of it works on gloo too.
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=3e-3)
    given = parser.parse_args()

    set_seed(0)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8)
    rows = text[: 64 * 4000].long().view(-1, 64)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.1)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    accelerator = accelerated(plugin)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)
    )
    if accelerator.is_main_process:
        text[:65_000].short().numpy().astype("<u2").tofile("shard.bin")
        config.save_pretrained("run")  # save_state does not say which network it holds
    tracker = CurvatureTracker(
        model, optimizer, lambda model, batch: model(input_ids=batch, labels=batch).loss, probe=[rows[-4:], rows[-8:-4]],
        every=20, split=True, log="run/curvature.jsonl" if accelerator.is_main_process else None,
    )  # fmt: skip
    step = 0
    while step < given.steps:
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            tracker.step(step, loss=loss.item())
            if step % max(1, given.steps // 2) == 0:
                accelerator.save_state(f"run/step_{step}")
                accelerator.print(f"step {step}: loss {loss.item():.3f}", flush=True)
            if step == given.steps:
                break
    accelerator.end_training()


if __name__ == "__main__":
    main()
