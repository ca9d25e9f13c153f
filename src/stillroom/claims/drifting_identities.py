"""What the drifting field is, said in other frameworks' words, and that the released algorithm is among its forms.

On random sets of samples, positives and negatives in three clusters, in double precision, relative errors of:

- `scores`: the Gaussian field, sides apart, against tau^2 times the difference of the scores of both sets' kernel
  densities (arXiv 2603.07514);
- `gate`: the joint field against D (1 - D) times that, with D = p / (p + q) the optimal Parzen discriminator (ours);
- `discriminator`: the joint field against tau^2 grad D (ours);
- `shadow`: the numerator of a Laplace mean shift against tau^2 times the gradient of the sum of Matern-3/2 kernels
  (ours);
- `swap`: the field with the two sets exchanged against its negative;
- `moved`: the field of shifted and turned sets against the turned field;
- `enlarged`: the field of sets thrice as large against the same, in units of its scale;
- `released`: loss and gradient of the defaults, in single precision, against the released algorithm written out here
  in double.

Each error is below 1e-8, but `enlarged`, below 1e-6, because the released code keeps squared distances at 1e-8 or above
whatever the scale, and `released`, below 1e-5. The field of a set and itself is exactly zero: `equal`
counts the numbers in it that are not. The arm `uneven` is the field with a pull to the positives' mean added: what no
longer turns round where both sets change places. The arm `null` is the field multiplied by zero.
"""

import torch
from torch import Tensor

from stillroom import match
from stillroom.claims.claim import Check, Claim

TAU, PROBLEMS, N, P, U, C = 1.3, 3, 24, 32, 12, 6
SMALL, SINGLE = 1e-8, 1e-5


def sets(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, positives and negatives [problems, n, C]."""
    draws = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(3, C, generator=draws, dtype=torch.float64)
    x, y, z = (centres[torch.arange(n) % 3] + torch.randn(PROBLEMS, n, C, generator=draws, dtype=torch.float64)
               for n in (N, P, U))
    return x, y + 0.3, z


def density(at: Tensor, y: Tensor, kernel: str = "gauss") -> Tensor:
    """[problems, n]: a sum of kernels."""
    r = ((at[:, :, None] - y[:, None]).square().sum(-1) + 1e-300).sqrt() / TAU
    return ((-r.square() / 2).exp() if kernel == "gauss" else (1 + r) * (-r).exp()).sum(2)


def slope(of, at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(of(at).sum(), at)[0]


def off(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300))


def released(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The loss of the released algorithm [problems], line by line."""
    n, c, old = x.shape[1], x.shape[2], x.detach()
    targets = torch.cat([old, z, y], 1)
    square = old.square().sum(2)[:, :, None] + targets.square().sum(2)[:, None] - 2 * old @ targets.mT
    distance = square.clamp(min=1e-8).sqrt()
    s = distance.mean() / c**0.5
    here, there = old / s, targets / s
    logit = distance / distance.mean() + 100 * torch.eye(n, targets.shape[1], dtype=x.dtype)
    split, force = n + z.shape[1], torch.zeros_like(here)
    for r in (0.02, 0.05, 0.2):
        a = ((-logit / r).softmax(2) * (-logit / r).softmax(1)).clamp(min=1e-6).sqrt()
        push, pull = a[..., :split], a[..., split:]
        d = torch.cat([-push * pull.sum(2, keepdim=True), pull * push.sum(2, keepdim=True)], 2)
        v = d @ there - d.sum(2, keepdim=True) * here
        force = force + v / v.square().mean().clamp(min=1e-8).sqrt()
    return (x / s - (here + force)).square().mean((1, 2))


def learned(loss_of, x: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient."""
    x = x.clone().requires_grad_()
    loss = loss_of(x)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def measure(arm: str, seed: int, quick: bool) -> dict[str, float]:
    x, y, z = sets(seed)
    q, on, more = torch.cat([x, z], 1), 0.0 if arm == "null" else 1.0, 0.1 if arm == "uneven" else 0.0

    def pull(at: Tensor, of: Tensor) -> Tensor:
        return more * (of.mean(1, keepdim=True) - at)

    def field(*of: Tensor, **form) -> Tensor:
        return on * match.field(*of, tau=TAU, kernel="gauss", **form) + pull(*of[:2])

    def drifted(at: Tensor, *of: Tensor, **form) -> match.Drift:
        found = match.drift(at.detach(), *of, **form)
        return found._replace(vector=on * found.vector + pull(at.detach(), of[0]) / found.scale)

    def defaults(part: Tensor) -> Tensor:
        return match.drift_loss(part, drifted(part, y.float(), z.float()))

    joint, separate = field(x, y, z), field(x, y, z, coupling="separate")
    p, n = density(x, y), density(x, q)
    score = TAU**2 * (slope(lambda a: density(a, y).log(), x) - slope(lambda a: density(a, q).log(), x))
    gate = (p * n / (p + n) ** 2)[..., None]
    numerator = on * match.mean_shift(x, y, TAU, "laplace")[0] + pull(x, y)
    silent = match.Weights(x=torch.zeros_like(x[..., 0]))           # x are no targets: both sets can change places
    turn = torch.linalg.qr(torch.randn(C, C, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    here, moved = match.drift(x, y, z).vector, drifted(*(part @ turn + 5 for part in (x, y, z))).vector
    large = drifted(3 * x, 3 * y, 3 * z).vector
    (mine, my_slope), (theirs, their_slope) = learned(defaults, x.float()), learned(lambda a: released(a, y, z), x)
    return {
        "scores": off(separate, score),
        "gate": off(joint, gate * score),
        "discriminator": off(joint, TAU**2 * slope(lambda a: density(a, y) / (density(a, y) + density(a, q)), x)),
        "shadow": off(numerator, TAU**2 * slope(lambda a: density(a, y, "matern"), x)),
        "swap": off(field(x, y, z, weights=silent), -match.field(x, z, y, tau=TAU, kernel="gauss", weights=silent)),
        "moved": off(moved, here @ turn),
        "enlarged": off(large, here),
        "released": max(off(mine, theirs), off(my_slope, their_slope)),
        "equal": float((drifted(x, x.clone(), self_mask=False).vector != 0).sum()),
    }


def below(name: str, bound: float) -> Check:
    return Check(name, f"relative error below {bound:g}; margin: 1 less the error over that",
                 lambda mine, arms: 1 - mine[name] / bound)


CLAIM = Claim(
    name="drifting-identities",
    recipe="drifting",
    arms={"field": "subject", "uneven": "control", "null": "null"},
    measure=measure,
    checks=[*(below(name, SMALL) for name in ("scores", "gate", "discriminator", "shadow", "swap", "moved")),
            below("enlarged", 1e-6), below("released", SINGLE),
            Check("equal", "of the field of a set and itself no number is not zero; margin: 1/2 less their count",
                  lambda mine, arms: 0.5 - mine["equal"])],
    budget="none: nothing is trained",
    quick="nothing",
)
