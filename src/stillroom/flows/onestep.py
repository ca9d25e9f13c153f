"""A generator that answers in one evaluation: a denoiser's network, asked once, at pure noise."""

import torch
from torch import Tensor, nn

from stillroom.flows.denoiser import Denoiser, Denoises
from stillroom.flows.generator import Draws, Generator
from stillroom.flows.samplers import latest
from stillroom.nets import buildable, copied, with_input
from stillroom.paths import Kind, Path, at_least_float32, convert
from stillroom.settings import Refusal


@buildable
class OneStep(Generator):
    """x = x0(sigma(1) z, t = 1, y, w): where a flow from pure noise would arrive, were its path straight.

    y: labels, the null label standing for "any". w: strengths of guidance, for a network that was built for them.
    asked: the time the network is told, for one that was taught to tell ends of trajectories by it (BOOT); its answer
    is read at t = 1 all the same, where the noise is.
    unlabelled: it has learned to answer without a label too, which guidance can start from.
    takes_strength: it has learned to be told w, by a network that has the input.
    """

    def __init__(self, net: nn.Module, path: Path, prediction: Kind, shape: tuple[int, ...], asked: float = 1.0,
                 unlabelled: bool = False, takes_strength: bool = False):
        super().__init__()
        self.net, self.path, self.shape, self.asked, self.unlabelled = net, path, tuple(shape), asked, unlabelled
        self.prediction: Kind = prediction
        self.classes: int | None = getattr(net, "classes", None)
        self.takes_strength = takes_strength

    def forward(self, z: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        return self.signal(z, torch.full((len(z),), self.asked, device=z.device), y, w)

    def signal(self, z: Tensor, asked: Tensor, y: Tensor | None = None, w: Tensor | None = None) -> Tensor:
        """The answer to the time `asked` [B], read as a prediction at t = 1."""
        c = self.path.over(torch.ones(len(z), device=z.device), z)
        x_t = c.sigma * z
        extra = {} if y is None else {"y": y}
        extra |= {} if w is None else {"w": w}
        native = at_least_float32(self.net(x_t, asked, **extra))
        return convert(native, at_least_float32(x_t), c, self.prediction, "x0")

    def drawing(self, guidance: float, steps: int | None, weak: nn.Module | None) -> Draws:
        """Guidance is the network's own input where it has one. Else it extrapolates from a weaker answer to the same
        noise: that of `weak`, or of this network without the label."""
        if steps not in (None, 1):
            raise Refusal(f"this generator takes one step, not {steps}: leave out --steps")
        if guidance == 1:
            return lambda noise, y: self(noise(0), y)
        if weak is not None:
            return self.away_from(weak, guidance)
        if self.classes is None:
            raise Refusal("guidance needs labels, or a weaker generator: this one was trained without labels; "
                          "use guidance 1")
        if not (self.takes_strength or self.unlabelled):
            raise Refusal("this generator has learned no answer without a label, which guidance could lead away from; "
                          "leave out --guidance, or give a weaker generator, --weak RUN (drifting learns both: --drop)")
        if self.takes_strength:
            return lambda noise, y: self(z := noise(0), y, torch.full((len(z),), guidance, device=z.device))
        return lambda noise, y: extrapolated(guidance, self(z := noise(0), y), self(z))

    def away_from(self, weak: nn.Module, guidance: float) -> Draws:
        if not isinstance(weak, OneStep) or weak.shape != self.shape:
            made = list(weak.shape) if isinstance(weak, Generator) else f"a {type(weak).__name__}"
            raise Refusal(f"the weak generator makes {made}, this one {list(self.shape)} in one step")
        blind = weak.classes is None
        return lambda noise, y: extrapolated(guidance, self(z := noise(0), y), weak(z, None if blind else y))


def extrapolated(w: float, strong: Tensor, weak: Tensor) -> Tensor:
    """x + (w - 1)(x - x_weak): from a weaker answer to the same noise through the stronger, and on.

    Our reading of "extrapolation-based guided sampling" (Drift-RAE, abstract); what the paper does is not public.
    """
    return strong + (w - 1) * (strong - weak)


def require_sight(teacher: Denoises, name: str) -> None:
    """A student begins in pure noise, where some predictions say nothing of data."""
    if float(latest(teacher)) < 1:
        raise Refusal(f"{name}: it answers {teacher.prediction}, which says nothing of data in pure noise, where a "
                      "student begins; give one that was trained with --prediction v or x0")


def student_of(teacher: Denoiser, shape: tuple[int, ...], takes_strength: bool, unlabelled: bool = False) -> OneStep:
    """The teacher's network asked at t = 1, where it begins; with an input for the strength of guidance, if it shall
    take one."""
    if teacher.scale_input:
        raise Refusal("a student cannot start from a teacher that scales its input; train the teacher on another path")
    require_sight(teacher, "teacher")
    net = with_input(teacher.net, "guided") if takes_strength else copied(teacher.net)
    return OneStep(net, teacher.path, teacher.prediction, shape, unlabelled=unlabelled, takes_strength=takes_strength)
