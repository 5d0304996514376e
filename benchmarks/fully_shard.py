"""What becomes of a rank's failure between two gathers of fully_shard (docs/adr/0009-blocks-gathered-one-at-a-time.md).

`python benchmarks/fully_shard.py` says for two gloo ranks what each of them saw, and after how long: where the one that has
failed says so in the same process group, and in one of its own. The groups' timeout is 40 s.
"""

from __future__ import annotations

import datetime
import os
import socket
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

TIMEOUT = 40.0


def main() -> None:
    for apart in (False, True):
        print("a group of its own for what ranks say:" if apart else "one group for all:", flush=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        try:
            torch.multiprocessing.start_processes(be_a_rank, args=(apart, port), nprocs=2, start_method="spawn")
        except torch.multiprocessing.ProcessExitedException as error:
            print(f"  {error}", flush=True)


def be_a_rank(rank: int, apart: bool, port: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timeout)
    words = dist.new_group(backend="gloo", timeout=timeout) if apart else None
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    ids = torch.randint(64, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    loss = model(input_ids=ids, labels=ids).loss
    start, said = time.monotonic(), "went on"
    try:
        if rank == 0:
            loss.backward()  # which waits for the other's blocks
        else:  # this rank has failed, and says so in as many numbers as curv's ranks do
            dist.all_gather([torch.zeros(67), torch.zeros(67)], torch.ones(67), group=words)
    except RuntimeError as error:
        said = str(error).splitlines()[0][:160]
    print(f"  rank {rank}, after {time.monotonic() - start:.1f} s: {said}", flush=True)
    time.sleep(1)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
