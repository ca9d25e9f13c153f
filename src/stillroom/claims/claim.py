"""What a claim is, and how measured values become a verdict. The verdict is computed, and may be "does not hold".

A check is a margin that is positive where the statement is true, taken within each seed. Over seeds, the claim says
something only where Student's t interval of the margin (95 %) excludes zero:

    holds            the interval lies above zero
    does not hold    it lies below zero; of a single seed, which has no interval: the margin is negative
    mixed            neither; of a single seed: the margin is positive, for one seed can refute but not establish

The claim holds where all checks of all its subjects hold, does not hold where one does not, and is mixed otherwise.
The null arm, the method with its objective's gradient zeroed, stands in the subject's place before the same checks:
unless it does not hold, the claim is invalid, for it cannot fail.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from scipy.stats import t as student

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part = Literal["subject", "control", "null", "reported"]
Metrics = Mapping[str, float]
Values = Mapping[str, Mapping[int, Mapping[str, float | None]]]
"""{arm: {seed: {metric: value}}}; None stands for what is not finite."""

HOLDS, MIXED, DOES_NOT_HOLD, INVALID = "holds", "mixed", "does not hold", "invalid"


@dataclass(frozen=True)
class Check:
    name: str
    says: str  # the statement with its bound, and the margin's unit
    margin: Callable[[Metrics, Mapping[str, Metrics]], float]
    """Of one seed: (values of the arm on trial, {arm: values}) -> a number above 0 where the statement is true."""

    @classmethod
    def at_most(cls, key: str, share: float, control: str, name: str = "", says: str = "") -> "Check":
        """A value over the control's, against a share; what is not given is named and said by rule."""
        bound = "below that" if share == 1 else f"at most {share:g} times that"
        return cls(name or f"{key}, against {control}",
                   f"{says or f'{bound} of {control}'}; margin: {share:g} less the ratio",
                   lambda mine, arms: share - mine[key] / arms[control][key])


@dataclass(frozen=True)
class Claim:
    name: str
    arms: Mapping[str, Part]  # in the order of the table; reported arms are shown and judged by nothing
    measure: Callable[[str, int, bool], Metrics]  # (arm, seed, quick)
    checks: Sequence[Check]
    budget: str
    quick: str  # what --quick changes
    seeds: tuple[int, ...] = (101, 102, 103)
    pictures: Callable[[int], Sequence["Figure"]] | None = None
    """Panels for people, drawn from runs of one seed."""
    on: Callable[[str], "Claim"] | None = None
    """The same claim on data of the user's, by path."""
    recipe: str = ""
    """That it is about; the one of its own name, unless given."""

    def __post_init__(self):
        object.__setattr__(self, "recipe", self.recipe or self.name)

    def arms_of(self, part: Part) -> list[str]:
        return [arm for arm, its in self.arms.items() if its == part]


def interval(margins: Sequence[float]) -> tuple[float, float] | None:
    """Student's t interval of the mean, 95 %."""
    n = len(margins)
    if n < 2:
        return None
    mean = sum(margins) / n
    spread = math.sqrt(sum((m - mean) ** 2 for m in margins) / (n - 1))
    half = float(student.ppf(0.975, n - 1)) * spread / math.sqrt(n)
    return mean - half, mean + half


def said_of(margins: Sequence[float], bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return DOES_NOT_HOLD if margins[0] < 0 else MIXED
    return HOLDS if bounds[0] > 0 else DOES_NOT_HOLD if bounds[1] < 0 else MIXED


def together(verdicts: Sequence[str]) -> str:
    if DOES_NOT_HOLD in verdicts:
        return DOES_NOT_HOLD
    return HOLDS if set(verdicts) == {HOLDS} else MIXED


def margin_of(check: Check, mine: Metrics, arms: Mapping[str, Metrics]) -> float:
    """nan where there is none: a ratio to nothing, a logarithm of nothing."""
    try:
        return float(check.margin(mine, arms))
    except (ArithmeticError, ValueError):
        return math.nan


def tried(claim: Claim, arm: str, values: Mapping[str, Mapping[int, Metrics]]) -> list[dict[str, Any]]:
    """Every check with `arm` in the subject's place."""
    rows = []
    for check in claim.checks:
        margins = {
            seed: margin_of(check, mine, {name: values[name][seed] for name in claim.arms})
            for seed, mine in values[arm].items()
        }
        bounds = interval(list(margins.values()))
        rows.append({
            "arm": arm, "check": check.name, "says": check.says, "margins": margins,
            "interval": None if bounds is None else list(bounds), "verdict": said_of(list(margins.values()), bounds),
        })
    return rows


def no_evidence(reason: str) -> dict[str, Any]:
    return {"verdict": INVALID, "reason": reason, "checks": [], "null": []}


def verdict(claim: Claim, values: Values) -> dict[str, Any]:
    """Checks, the null arm's trial and the verdict, from the measured values alone."""
    broken = [
        f"arm {arm}, seed {seed}: {metric} is not finite"
        for arm, seeds in values.items() for seed, metrics in seeds.items() for metric, value in metrics.items()
        if value is None or not math.isfinite(value)
    ]
    if broken:
        return no_evidence(f"{broken[0]}; nothing can be compared with it")
    finite = cast(Mapping[str, Mapping[int, Metrics]], values)
    checks = [row for arm in claim.arms_of("subject") for row in tried(claim, arm, finite)]
    nulls = [row for arm in claim.arms_of("null") for row in tried(claim, arm, finite)]
    broken = [
        f"check {row['check']!r}, arm {row['arm']}, seed {seed}: the margin is not finite"
        for row in [*checks, *nulls] for seed, margin in row["margins"].items() if not math.isfinite(margin)
    ]
    if broken:
        return no_evidence(broken[0])
    null = together([row["verdict"] for row in nulls])
    if null != DOES_NOT_HOLD:
        reason = f"the null arm's verdict is {null!r}: these checks cannot tell the method from doing nothing"
        return {"verdict": INVALID, "reason": reason, "checks": checks, "null": nulls}
    return {"verdict": together([row["verdict"] for row in checks]), "reason": "", "checks": checks, "null": nulls}
