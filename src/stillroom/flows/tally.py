"""How many samples networks have answered for: what a method costs in evaluations, however it spends them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from stillroom.flows.closed import Gaussian, Mixture
from stillroom.flows.denoiser import Bare, Denoiser
from stillroom.flows.onestep import OneStep


class Tally:
    """Counts, by name, what the networks it watches are asked, while it is told to: a call of B samples is B
    evaluations, and guidance takes two. The first name that a network gets stays its own. It costs some microseconds a
    call."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.names: dict[int, str] = {}
        self.on = False

    def watch(self, name: str, module: nn.Module) -> None:
        """All networks inside, and closed forms."""
        for asked in asked_in(module):
            if id(asked) not in self.names:
                # What lies inside is called by it: of a network with adapters, the one it was made of.
                inside = [asked] if isinstance(asked, Bare) else asked.modules()
                self.names |= {id(part): name for part in inside}
                asked.register_forward_hook(self.hook(asked, name))

    def hook(self, asked: nn.Module, name: str):
        """A plain function, which copies of the module go on calling."""
        def count(_module, inputs, _answer):
            if self.on:
                self.counts[name] += len(inputs[0])
                if isinstance(asked, Bare):         # the network with its adapters off, which has counted under its own
                    self.counts[self.names[id(asked.denoiser.net)]] -= len(inputs[0])

        return count

    @contextmanager
    def counting(self, on: bool = True) -> Iterator[None]:
        before, self.on = self.on, on
        try:
            yield
        finally:
            self.on = before


def asked_in(module: nn.Module) -> Iterator[nn.Module]:
    for each in module.modules():
        if isinstance(each, Denoiser | OneStep):
            yield each.net
        elif isinstance(each, Bare):
            yield each.denoiser.net
            yield each
        elif isinstance(each, Gaussian | Mixture):
            yield each
