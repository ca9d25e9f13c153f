"""Recent real samples, class by class: a ring for each."""

import torch
from torch import Tensor, nn


class Bank(nn.Module):
    """Holds up to `size` samples of each class; the newest replace the oldest. Part of checkpoints, not of products."""

    x: Tensor
    count: Tensor
    next: Tensor

    def __init__(self, classes: int, size: int, shape: tuple[int, ...]):
        super().__init__()
        self.size = size
        self.register_buffer("x", torch.zeros(classes, size, *shape))
        self.register_buffer("count", torch.zeros(classes, dtype=torch.int64))
        self.register_buffer("next", torch.zeros(classes, dtype=torch.int64))

    @torch.no_grad()
    def push(self, x: Tensor, y: Tensor | None) -> None:
        """x [B, *shape] with labels y [B]; None stands for one class."""
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
        for label in y.unique().tolist():
            new = x[y == label][-self.size :]
            places = (self.next[label] + torch.arange(len(new), device=x.device)) % self.size
            self.x[label, places] = new.float()
            self.next[label] = (self.next[label] + len(new)) % self.size
            self.count[label] = (self.count[label] + len(new)).clamp(max=self.size)

    def draw(self, labels: Tensor, n: int, u: Tensor) -> Tensor:
        """[G, n, *shape] of classes labels [G]; a label past the last class stands for any. Without replacement where
        a class holds n. u: uniforms [G, size]."""
        one = labels.clamp(max=len(self.count) - 1)
        held = torch.arange(self.size, device=u.device) < self.count[one, None]
        order = u.masked_fill(~held, 2.0).argsort(1)                                # what is held comes first
        turn = torch.arange(n, device=u.device) % self.count[one, None]             # [G, n], round and round
        x = self.x[one[:, None], order.gather(1, turn)]
        anyone = (labels >= len(self.count)).view(-1, *[1] * (x.ndim - 1))
        return torch.where(anyone, self.draw_any(u[:, :n]), x) if bool(anyone.any()) else x

    def draw_any(self, u: Tensor) -> Tensor:
        """[G, n, *shape] of any class, in the shares in which they are held, with replacement. u: uniforms [G, n]."""
        ends = self.count.cumsum(0)
        i = (u * ends[-1]).long().clamp(max=int(ends[-1]) - 1)                      # [G, n]
        label = torch.searchsorted(ends, i, right=True)
        return self.x[label, i - (ends - self.count)[label]]
