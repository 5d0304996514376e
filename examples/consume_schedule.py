"""Obey a curv.schedule/1 in a PyTorch job that has no curv: copy this file.

    locks = Locks("schedule.json", model)
    for step in range(start, total):
        locks.begin(step)           # before the forward pass
        loss(model).backward()
        locks.drop_gradients(step)  # before clipping and optimizer.step()
        ...

In mode grow the schedule has to name what rests: curv schedule --for CHECKPOINT, or blocks whose projections `rule` finds.
Residual gates are none of its business: they change the forward pass, and need curvcli.training in the job.
"""

import json
import re
from pathlib import Path

import torch


class Locks:
    def __init__(self, schedule, model):
        self.plan, self.parameters = json.loads(Path(schedule).read_text()), dict(model.named_parameters())
        if self.plan["lock"] == "residual-gate":
            raise ValueError(f"{schedule} opens residual gates, not locks: obey it with curvcli.training.ArchitectureWarmup")
        if not self.plan.get("rule"):
            raise ValueError(f"{schedule} has no rule to find blocks by, as an older curv wrote it: make it anew")
        stacks = {}  # stack -> index -> [(name, name within the block)]
        for name in self.parameters:
            if found := re.search(self.plan["rule"]["block"], name):
                stacks.setdefault(found[1] or "", {}).setdefault(int(found[2]), []).append((name, found[3]))
        if self.plan["blocks"]:
            stacks = {key: value for key, value in stacks.items() if f"{key}.0" == self.plan["blocks"][0]}
        self.blocks = max((blocks for blocks in stacks.values() if len(blocks) == self.plan["depth"]), key=self._weights)
        resting = self.plan["resting"] or ([] if self.plan["mode"] == "freeze" else self._by_rule())
        self.resting = [(rest["block"], rest["name"], rest["value"]) for rest in resting]

    def _weights(self, blocks):
        return sum(self.parameters[name].numel() for names in blocks.values() for name, _ in names)

    def _by_rule(self):
        for index, names in self.blocks.items():
            children = {within.split(".")[0] for _, within in names}
            if any(children.issuperset(pair) for pair in self.plan["rule"]["post_norms"]):
                raise ValueError(f"norms rest in block {index}: name the tensors with curv schedule --for CHECKPOINT")
            yield from (
                {"block": index, "name": name, "value": 0.0}
                for name, within in names
                if re.search(self.plan["rule"]["output"], within)
            )

    def locked(self, step):
        phases = [phase for phase in self.plan["phases"] if phase["step"] <= step] or self.plan["phases"][:1]
        return set(range(self.plan["depth"])) - set(phases[-1]["active"])

    @torch.no_grad()
    def begin(self, step):
        """At the schedule's first step: make locked blocks identities. A resumed job has them from its checkpoint."""
        if step == self.plan["phases"][0]["step"]:
            for block, name, value in self.resting:
                if block in self.locked(step):
                    self.parameters[name].fill_(value)

    def drop_gradients(self, step):
        """No gradient, no update: an optimizer leaves what has none as it is, state and decay included."""
        for block in self.locked(step):
            for name, _ in self.blocks[block]:
                self.parameters[name].grad = None
