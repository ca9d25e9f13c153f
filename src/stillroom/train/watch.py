"""Who is told how a run goes. The command line has a livelier one; in Python, plain lines."""

import sys
from collections.abc import Mapping
from typing import Any, Protocol


class Watch(Protocol):
    def started(self, name: str, step: int, steps: int) -> None: ...
    def note(self, text: str) -> None: ...
    def row(self, row: Mapping[str, Any]) -> None: ...
    def ended(self) -> None: ...


class Silent:
    def started(self, name, step, steps):
        pass

    def note(self, text):
        pass

    def row(self, row):
        pass

    def ended(self):
        pass


def terms_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The recipe's own terms: "role/term" without the trainer's gradient norms and rates."""
    return {k: v for k, v in row.items() if "/" in k and not k.endswith(("/gradient", "/rate"))}


class Lines(Silent):
    """One line per logged step, for logs and pipes."""

    def started(self, name, step, steps):
        self.steps = steps
        print(f"{name}: step {step} of {steps}", file=sys.stderr)

    def note(self, text):
        print(text, file=sys.stderr)

    def row(self, row):
        terms = "  ".join(f"{k} {v:.4g}" for k, v in terms_of(row).items())
        pace = row["steps_per_second"]
        left = (self.steps - row["step"]) / pace if pace else 0
        print(f"step {row['step']}/{self.steps}  {terms}  {pace:.1f} steps/s  {left:.0f} s left", file=sys.stderr)
