"""Rows that the shard never looks up are left out with those that it hardly does."""

from __future__ import annotations

import models
import pytest
import torch

from curvcli.analysis.api import analyze

DECAY, VOCAB, OFTEN = 1e-2, 9, 5


def test_rare_rows_are_left_out_of_the_verdict_and_of_the_body() -> None:
    """Tokens 0 to 4 are looked up 15 times each, 5 to 7 once, 8 never: its curvature is the coupled decay's."""
    ids = torch.cat([torch.arange(OFTEN).repeat(15), torch.tensor([5, 6, 7])])
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    batches = [(part, part * 3 % VOCAB) for part in ids.chunk(4)]
    model = models.Net(vocab=VOCAB)
    with torch.no_grad():
        model.embed.weight[VOCAB - 1] *= 0.01  # an entry's curvature there is about 1 over its size
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=DECAY)
    models.train(model, optimizer, batches)
    weights = models.weights(batches)
    report = analyze(model, models.loss, batches, optimizer, weights=weights, tolerance=1e-5, max_hvps=400, depths=False)
    roots, masks = [], []
    for name, p in model.named_parameters():
        square = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**12)
        roots.append(((1 - 0.9**12) * (square.sqrt() + 1e-8)).rsqrt().flatten())
        mask = torch.ones_like(p)
        mask[OFTEN if name == "embed.weight" else len(mask) :] = 0
        masks.append(mask.flatten())
    root, mask = torch.cat(roots), torch.cat(masks)
    matrix = models.dense_hessian(model, batches, [n for n, _ in model.named_parameters()])
    whole = (matrix + DECAY * torch.eye(len(matrix))) * root * root[:, None]
    assert report.body is not None
    assert report.body.rows == VOCAB - OFTEN
    assert report.judged is report.body
    assert report.full.eigenvalue == pytest.approx(models.top(whole), rel=1e-5)
    assert report.body.eigenvalue == pytest.approx(models.top(whole * mask * mask[:, None]), rel=1e-5)
    assert report.body.eigenvalue < 0.9 * report.full.eigenvalue
    assert "rare-rows" in {finding.code for finding in report.findings}
