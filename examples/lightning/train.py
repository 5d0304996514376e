"""A small network trained by Lightning, with curv's callback."""

import argparse

import lightning.pytorch as pl
import torch
from mynets import build
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from curvcli.training.lightning import CurvCallback


class Net(pl.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr, self.model = lr, build()

    def training_step(self, batch, index):
        return loss_of(self, batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loss_of(module, batch):
    inputs, targets = batch
    return nn.functional.cross_entropy(module.model(inputs), targets)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    given = parser.parse_args()

    pl.seed_everything(0)
    inputs = torch.randn(2048, 8)
    data = TensorDataset(inputs, (inputs[:, 0] * inputs[:, 1] > 0).long())
    trainer = pl.Trainer(
        max_steps=given.steps, max_epochs=-1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
        callbacks=[CurvCallback(probe=[data[:256]], loss=loss_of, every=20, log="curvature.jsonl")],
    )  # fmt: skip
    trainer.fit(Net(given.lr), DataLoader(data, batch_size=64))
    trainer.save_checkpoint("last.ckpt")
    save_file({"x": data.tensors[0][:512], "labels": data.tensors[1][:512]}, "examples.safetensors")


if __name__ == "__main__":
    main()
