"""A loss term must reach its role: connected on its first turn, and not zero for a hundred."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from stillroom.settings import Refusal
from stillroom.train.learner import Learner
from stillroom.train.recipe import Terms

LOOKS = (0, 1, 2, 5, 10, 20, 50, 99)
"""Turns at which a term's own gradient is taken; each costs one more backward."""


def require_connected(losses: Mapping[str, Terms], step: int) -> None:
    for name, terms in losses.items():
        if not terms:
            raise Refusal(f"role {name}: there is no term at step {step}, so that it learns nothing")
        for term, value in terms.items():
            if not value.requires_grad:
                raise Refusal(f"role {name}: term {term} carries no gradient at step {step}: it was cut")


class Reach:
    def __init__(self):
        self.turns: dict[str, int] = {}
        self.reached: set[str] = set()
        self.told: set[str] = set()

    def state(self) -> dict[str, Any]:
        return {"turns": self.turns, "reached": sorted(self.reached), "told": sorted(self.told)}

    @staticmethod
    def of(state: Mapping[str, Any]) -> "Reach":
        new = Reach()
        new.turns, new.reached, new.told = dict(state["turns"]), set(state["reached"]), set(state["told"])
        return new

    def probe(self, losses: Mapping[str, Terms], learners: Mapping[str, Learner], step: int) -> None:
        for name, terms in losses.items():
            parameters = list(learners[name].parameters.values())
            for term, value in terms.items():
                key = f"{name}/{term}"
                turn = self.turns.get(key, 0)
                self.turns[key] = turn + 1
                if key in self.reached or turn not in LOOKS:
                    continue
                gradients = torch.autograd.grad(value.mean(), parameters, retain_graph=True, allow_unused=True)
                present = [g for g in gradients if g is not None]
                if not present:
                    raise Refusal(f"role {name}: term {term} does not depend on the role's parameters at step {step}")
                if any(bool(g.any()) for g in present):
                    self.reached.add(key)

    def complaints(self, step: int) -> Iterator[str]:
        for key, turns in self.turns.items():
            if turns >= 100 and key not in self.reached and key not in self.told:
                self.told.add(key)
                yield f"step {step}: term {key} has had a gradient of exactly zero for {turns} turns"
