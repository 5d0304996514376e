"""Optimizers that torch does not have, as their papers and authors' packages have them: updates in their own words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class AdEMAMix(torch.optim.Optimizer):
    """arXiv 2409.03137, algorithm 1 and its appendix' schedulers; state and options as in the authors' apple/ml-ademamix."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, **options: Any) -> None:
        defaults = {
            "lr": lr, "betas": (0.9, 0.999, 0.9999), "eps": 1e-8, "alpha": 2.0, "beta3_warmup": None, "alpha_warmup": None,
            "weight_decay": 0.0,
        }  # fmt: skip
        super().__init__(params, {**defaults, **options})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2, last = group["betas"]
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s["step"] = 0
                    s.update({key: torch.zeros_like(p) for key in ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")})
                s["step"] += 1
                t, alpha, b3 = s["step"], group["alpha"], last
                if group["alpha_warmup"]:
                    alpha *= min(1.0, t / group["alpha_warmup"])
                if group["beta3_warmup"] and t < group["beta3_warmup"]:
                    done = t / group["beta3_warmup"]
                    half = [math.log(0.5) / math.log(b + 1e-8) - 1 for b in (b1, last)]  # steps, and linear in them
                    b3 = 0.5 ** (1 / ((1 - done) * half[0] + done * half[1] + 1))
                s["exp_avg_fast"].lerp_(p.grad, 1 - b1)
                s["exp_avg_slow"].lerp_(p.grad, 1 - b3)
                s["exp_avg_sq"].lerp_(p.grad.square(), 1 - b2)
                denominator = (s["exp_avg_sq"] / (1 - b2**t)).sqrt() + group["eps"]
                update = (s["exp_avg_fast"] / (1 - b1**t) + alpha * s["exp_avg_slow"]) / denominator
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
