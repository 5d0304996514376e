"""Writes docs/notebooks/first_report.ipynb: runs its cells in a kernel and keeps what they show.

Run it when the cells below or what they show have changed: python docs/write_notebook.py (needs curvcli[test]).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("notebooks") / "first_report.ipynb"
# Markdown where it begins with "md:", else code.
CELLS = [
    """md:# A first report in a notebook

A small model, a loss and batches are enough. Written by `python docs/write_notebook.py`, which ran it.""",
    """import torch
from torch import nn

import curvcli

torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 1)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(4))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


model = Net()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
inputs = torch.randn(512, 8)
batches = [(x, x[:, :1] * x[:, 1:2]) for x in inputs.split(64)]


def loss(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


for step in range(60):
    optimizer.zero_grad()
    loss(model, batches[step % len(batches)]).backward()
    optimizer.step()

report = curvcli.analyze(model, loss, batches, optimizer)
report""",
    "report.plot()",
    """frame = report.to_frame()
frame.loc[frame.part.isin(["full", "layer"]), ["part", "name", "eigenvalue", "rho", "status"]]""",
    "md:Documents are JSON files, and any of them is read back.",
    """from pathlib import Path
from tempfile import TemporaryDirectory

with TemporaryDirectory() as folder:
    place = Path(folder, "report.json")
    place.write_text(report.to_json())
    same = curvcli.load(place)
    gate = curvcli.gate(place, max_rho=1.0, min_tokens=100)
print(same)
gate.outcome""",
]


def executed() -> Any:
    """The notebook, run from top to bottom in a kernel of its own; an exception in a cell is raised."""
    cells = [
        nbformat.v4.new_markdown_cell(text[3:]) if text.startswith("md:") else nbformat.v4.new_code_cell(text)
        for text in CELLS
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # else one by chance, and a change at every run
    found = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(found, timeout=300, kernel_name="python3").execute()
    for cell in found.cells:
        cell.metadata.pop("execution", None)  # times of day
    found.metadata = nbformat.from_dict(
        {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    )
    return found


if __name__ == "__main__":
    nbformat.write(executed(), NOTEBOOK)
