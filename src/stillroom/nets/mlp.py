"""A residual MLP for points: the net of toy densities, and of codes that are vectors."""

from torch import Tensor, nn

from stillroom.nets.build import buildable
from stillroom.nets.embed import Condition, final, zeroed


class Layer(nn.Module):
    """h + second(silu((1 + scale) first(silu(h)) + shift)), with scale and shift from the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.film = nn.Linear(width, 2 * width)
        self.act = nn.SiLU()

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.film(c).chunk(2, dim=-1)
        return h + self.second(self.act((1 + scale) * self.first(self.act(h)) + shift))


@buildable
class MLP(nn.Module):
    """Points [*, dim], with times of any leading shape: [B] for [B, D] or [B, F, D], [B, F] for a time per frame."""

    def __init__(
        self, dim: int, width: int = 128, depth: int = 3, classes: int | None = None, two_times: bool = False,
        guided: bool = False,
    ):
        super().__init__()
        self.dim, self.classes, self.two_times, self.guided = dim, classes, two_times, guided
        self.enter = nn.Linear(dim, width)
        self.condition = Condition(width, classes, two_times, guided)
        self.act = nn.SiLU()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.final = zeroed(nn.Linear(width, dim))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, r: Tensor | None = None,
                w: Tensor | None = None) -> Tensor:
        if x_t.shape[-1] != self.dim:
            raise ValueError(f"points have {x_t.shape[-1]} coordinates, this net was built for {self.dim}")
        if not 1 <= t.ndim < x_t.ndim or t.shape != x_t.shape[: t.ndim]:
            raise ValueError(f"t has shape {tuple(t.shape)}: expected the leading shape of x_t {tuple(x_t.shape)}")
        c = self.act(self.condition(t, y, r, w))
        c = c.reshape(*t.shape, *[1] * (x_t.ndim - 1 - t.ndim), -1)  # [*t, W] -> [*t, 1.., W]
        h = self.enter(x_t)
        for layer in self.layers:
            h = layer(h, c)
        return final(self.final, self.act(h))
