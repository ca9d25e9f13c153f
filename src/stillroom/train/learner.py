"""A role at work: its parameters, its optimizer, its count of updates."""

import importlib
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stillroom.settings import Optimizer, Refusal, refuse_given
from stillroom.train.recipe import Role


def rate(settings: Optimizer, update: int, total: int) -> float:
    """The learning rate of the role's update 0, 1, ...: a pure function, so resuming needs no scheduler state."""
    if update < settings.warmup:
        return settings.lr * (update + 1) / settings.warmup
    done = (update - settings.warmup) / max(1, total - settings.warmup)
    match settings.decay:
        case "cosine":
            return settings.lr * (1 + math.cos(math.pi * min(done, 1))) / 2
        case "linear":
            return settings.lr * max(0.0, 1 - done)
    return settings.lr


def trained(role: Role, name: str) -> dict[str, nn.Parameter]:
    """The parameters that this role trains, by name."""
    all_names = dict(role.module.named_parameters())
    kept = {n: p for n, p in all_names.items() if re.search(role.trains, n)}
    if not kept:
        some = ", ".join(list(all_names)[:5])
        raise Refusal(f"role {name}: no parameter name matches trains={role.trains!r}; there are: {some}, ...")
    return kept


def freeze_rest(roles: Iterable[Role], kept: Iterable[nn.Parameter]) -> None:
    """Parameters that no role trains need no gradient: autograd then keeps no activations for them."""
    trained_somewhere = {id(p) for p in kept}
    for role in roles:
        for p in role.module.parameters():
            p.requires_grad_(id(p) in trained_somewhere)


def bitsandbytes():
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise Refusal("adamw8bit needs bitsandbytes, which is not installed; pip install stillroom[memory]") from error


def make_optimizer(settings: Optimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if settings.name == "sgd":
        refuse_given(settings, ("eps",), "sgd divides by no second moment; leave it out, or give another name")
        return torch.optim.SGD(parameters, settings.lr, momentum=settings.betas[0], weight_decay=settings.weight_decay)
    if settings.name == "adamw8bit":
        return bitsandbytes().optim.AdamW8bit(parameters, settings.lr, settings.betas, settings.eps,
                                              settings.weight_decay)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.name]
    return kind(parameters, settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=True)


class Learner:
    def __init__(self, name: str, role: Role, total: int):
        self.name, self.role, self.total = name, role, total
        self.parameters = trained(role, name)
        self.fresh()

    def fresh(self) -> None:
        """A new optimizer and a new average, from the weights as they are."""
        self.updates = 0
        self.optimizer = make_optimizer(self.role.optimizer, list(self.parameters.values()))
        if (average := self.role.average) is not None:
            average.updates.zero_()
            with torch.no_grad():
                for a, p in zip(average.module.parameters(), self.role.module.parameters(), strict=True):
                    a.copy_(p)

    @property
    def rate(self) -> float:
        return rate(self.role.optimizer, self.updates, self.total)

    def gradient_norm(self) -> Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore

    def step(self, norm: Tensor) -> None:
        if (clip := self.role.optimizer.clip) > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        if self.role.average is not None:
            self.role.average.update(self.role.module)
