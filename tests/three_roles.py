"""A recipe made to be hard on the trainer: three roles at three paces, a read average, a bank, dropout, two stages."""

from dataclasses import dataclass, field

import torch
from torch import nn

from stillroom.match import gap, squared_error
from stillroom.nets import MLP, buildable
from stillroom.settings import Optimizer, Run
from stillroom.train import Average, Product, Recipe, Role, Stage


@dataclass(frozen=True, kw_only=True)
class Settings(Run):
    steps: int = 60
    batch: int = 16
    rate: float = 1e-3
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=2e-3, warmup=5, decay="cosine", clip=0.5))


@buildable
class Generator(nn.Module):
    def __init__(self, dropout: float = 0.1):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Dropout(dropout), nn.Linear(32, 2))

    def forward(self, z):
        return self.net(z)


class ThreeRoles(Recipe):
    Settings = Settings
    inputs = ("data",)

    def __init__(self, settings, data):
        self.settings = settings
        self.student = Generator()
        self.mean = Average(self.student, 0.9)
        self.fake = MLP(2, 16, 1)
        self.head = nn.Linear(2, 1)
        self.bank = torch.zeros(64, 2)

    def roles(self):
        s = self.settings
        return {
            "student": Role(self.student, s.student, every=3, average=self.mean),
            "fake": Role(self.fake, Optimizer(lr=s.rate, weight_decay=0.01)),
            "head": Role(self.head, Optimizer(lr=s.rate, name="sgd"), every=2),
        }

    def stages(self):
        n = self.settings.steps
        return [Stage("warm", n // 3, roles=("fake", "head")), Stage("all", n - n // 3, fresh=("head",))]

    def losses(self, batch, turn):
        data = batch["data"].x
        with torch.set_grad_enabled("student" in turn):
            x = self.student(turn.randn(data))
        t, eps = turn.rand((len(x),)), turn.randn(x)
        x_t = (1 - t[:, None]) * x.detach() + t[:, None] * eps
        out = {}
        if "student" in turn:
            with torch.no_grad():
                anchor, fake = self.mean(self.bank).mean(0), x_t - t[:, None] * self.fake(x_t, t)
            out["student"] = {"gap": gap(x, fake, data), "anchor": squared_error(x, anchor.expand_as(x)),
                              "gan": nn.functional.softplus(-self.head(x))}
        if "fake" in turn:
            out["fake"] = {"dsm": squared_error(self.fake(x_t, t), eps - x.detach())}
        if "head" in turn:
            made, real = self.head(x.detach()), self.head(data)
            out["head"] = {"gan": nn.functional.softplus(made) + nn.functional.softplus(-real)}
        return out

    def after(self, batch, turn):
        new = turn.gather(batch["data"].x + 0.1 * turn.randn(batch["data"].x))
        self.bank.copy_(torch.cat([new, self.bank])[: len(self.bank)])

    def memory(self):
        return {"bank": self.bank}

    def product(self):
        return Product("generator", {"generator": self.student, "bank": self.bank}, {"steps": self.settings.steps})


def points(n: int = 100) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(5)) * 0.3 + 1
