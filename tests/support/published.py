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


class SOAP(torch.optim.Optimizer):
    """arXiv 2409.11321, algorithm 3; state and options as in the authors' file, nikhilvyas/SOAP."""

    own_basis = True  # exp_avg is kept in the basis Q, as in later releases; before, it was in the weights'

    def __init__(self, params: Iterable[Any], lr: float = 3e-3, **options: Any) -> None:
        defaults = {
            "lr": lr, "betas": (0.95, 0.95), "shampoo_beta": -1, "eps": 1e-8, "weight_decay": 0.01,
            "precondition_frequency": 10, "max_precond_dim": 10000, "merge_dims": False, "precondition_1d": False,
            "normalize_grads": False, "correct_bias": True,
        }  # fmt: skip
        super().__init__(params, {**defaults, **options})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                s, shape = self.state[p], _soap_shape(p, group)
                if not s:
                    s.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                    plain = p.dim() == 1 and not group["precondition_1d"]
                    sizes = [0 if plain or n > group["max_precond_dim"] else n for n in shape]
                    s["GG"] = [p.new_zeros(n, n) if n else [] for n in sizes]
                    self._gather(p.grad.reshape(shape), s, group)
                    s["Q"] = [torch.linalg.eigh(f)[1].flip(1) if len(f) else [] for f in s["GG"]]
                    continue
                (b1, b2), there = group["betas"], _kron(p.grad, s["Q"], shape)
                s["step"] += 1
                s["exp_avg"].lerp_(there if self.own_basis else p.grad, 1 - b1)
                s["exp_avg_sq"].lerp_(there.square(), 1 - b2)
                m = s["exp_avg"] if self.own_basis else _kron(s["exp_avg"], s["Q"], shape)
                rate = group["lr"]
                if group["correct_bias"]:
                    rate *= math.sqrt(1 - b2 ** s["step"]) / (1 - b1 ** s["step"])
                p.sub_(rate * _kron(m / (s["exp_avg_sq"].sqrt() + group["eps"]), s["Q"], shape, back=True))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                self._gather(p.grad.reshape(shape), s, group)
                if s["step"] % group["precondition_frequency"] == 0:
                    self._turn(s, shape)

    def _gather(self, gradient: Tensor, s: Any, group: Any) -> None:
        beta = group["shampoo_beta"] if group["shampoo_beta"] >= 0 else group["betas"][1]
        for i, factor in enumerate(s["GG"]):
            if len(factor):
                unfolded = gradient.movedim(i, 0).reshape(len(factor), -1)
                factor.lerp_(unfolded @ unfolded.T, 1 - beta)

    def _turn(self, s: Any, shape: tuple[int, ...]) -> None:
        """A step of the power method on every factor, its columns in the order of their quotients."""
        m = _kron(s["exp_avg"], s["Q"], shape, back=True) if self.own_basis else s["exp_avg"]
        v, bases = s["exp_avg_sq"].reshape(shape), []
        for i, (factor, q) in enumerate(zip(s["GG"], s["Q"], strict=True)):
            if len(factor):
                order = (q * (factor @ q)).sum(0).argsort(descending=True)
                v, q = v.index_select(i, order), torch.linalg.qr(factor @ q[:, order])[0]
            bases.append(q)
        s["exp_avg_sq"], s["Q"] = v.reshape(m.shape), bases
        s["exp_avg"] = _kron(m, bases, shape) if self.own_basis else m


class EarlySOAP(SOAP):
    own_basis = False


EarlySOAP.__name__ = "SOAP"


def _soap_shape(p: Tensor, group: Any) -> tuple[int, ...]:
    """Neighbouring dimensions as one, while their product is no more than the largest that is rotated."""
    if not group["merge_dims"]:
        return tuple(p.shape)
    found: list[int] = []
    for size in p.shape:
        fits = found and found[-1] * size <= group["max_precond_dim"]
        found[-1:] = [found[-1] * size] if fits else [*found[-1:], size]
    return tuple(found)


def _kron(x: Tensor, bases: list[Any], shape: tuple[int, ...], *, back: bool = False) -> Tensor:
    y = x.reshape(shape)
    for i, q in enumerate(bases):
        if len(q):
            y = torch.tensordot(q if back else q.T, y.movedim(i, 0), dims=1).movedim(0, i)
    return y.reshape(x.shape)


class Shampoo(torch.optim.Optimizer):
    """arXiv 1802.09568, algorithm 2; state, options and momentum as in pytorch_optimizer, with roots at every step."""

    keys, eps, every = ("pre_cond", "inv_pre_cond"), "matrix_eps", 1
    chained = False

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **options: Any) -> None:
        defaults = {
            "lr": lr, "momentum": 0.0, "weight_decay": 0.0, "weight_decouple": False, "fixed_decay": False,
            "matrix_eps": 1e-6,
        }  # fmt: skip
        super().__init__(params, {**defaults, **options})

    def exponent(self, order: int) -> float:
        return -1 / (2 * order)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                s, b = self.state[p], group["momentum"]
                sums, roots = ([f"{key}_{i}" for i in range(p.dim())] for key in self.keys)
                if not s:
                    s["momentum_buffer"] = p.grad.clone()
                    s.update({k: group[self.eps] * torch.eye(n, dtype=p.dtype) for k, n in zip(sums, p.shape, strict=True)})
                    s.update({k: p.new_zeros(n, n) for k, n in zip(roots, p.shape, strict=True)})
                s["step"] = group["step"]
                u = (1 - b) * p.grad + b * s["momentum_buffer"] if b else p.grad
                if group.get("weight_decouple"):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                else:
                    u = u + group["weight_decay"] * p
                gathered = u
                for i in range(p.dim()):
                    unfolded = (u if self.chained else gathered).movedim(i, 0).reshape(p.shape[i], -1)
                    s[sums[i]] += unfolded @ unfolded.T
                    if group["step"] % self.every == 0:
                        values, vectors = torch.linalg.eigh(s[sums[i]])
                        s[roots[i]] = vectors @ torch.diag(values ** self.exponent(p.dim())) @ vectors.T
                    u = torch.tensordot(s[roots[i]], u.movedim(i, 0), dims=1).movedim(0, i)
                s["momentum_buffer"] = u
                p.sub_(group["lr"] * u)


class EarlyShampoo(Shampoo):
    """As torch_optimizer has it: the exponent -1/order, sums of what earlier sides have made of the gradient, its names."""

    keys, eps = ("precond", "inv_precond"), "epsilon"
    chained = True

    def __init__(self, params: Iterable[Any], lr: float = 0.1, **options: Any) -> None:
        defaults = {"lr": lr, "momentum": 0.0, "weight_decay": 0.0, "epsilon": 1e-4, "update_freq": 1}
        torch.optim.Optimizer.__init__(self, params, {**defaults, **options})

    def exponent(self, order: int) -> float:
        return -1 / order


EarlyShampoo.__name__ = "Shampoo"
