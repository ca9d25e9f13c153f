"""A recipe's steps by hand, one at a time, and its weights before and after."""

from contextlib import contextmanager

import pytest
import torch

from stillroom.recipes.dmd import DMD
from stillroom.train import Silent, parts_of
from stillroom.train.loop import Trainer
from stillroom.train.world import World


def trainer_of(recipe, given):
    sources = {} if recipe.data is None else {"data": recipe.data}
    return Trainer(recipe, given, sources, World(0, 1, torch.device("cpu")), watch=Silent())


def steps_of(trainer, count):
    """Yields before every step."""
    with trainer.loaders({}) as loaders:
        for _ in range(count):
            trainer.enter_stages()
            yield trainer.step
            trainer.train_step(trainer.device_batch({name: each.at(trainer.step) for name, each in loaders.items()}))
            trainer.step += 1


@contextmanager
def stopped_at(stop):
    """What trains here is interrupted before this step."""
    step = Trainer.train_step

    def stops(self, micros):
        if self.step == stop:
            raise KeyboardInterrupt
        step(self, micros)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "train_step", stops)
        yield


def whole(losses):
    """All parts of a recipe's losses: {role: {term: value}}."""
    found = {}
    for part in parts_of(losses):
        for role, terms in part.items():
            found.setdefault(role, {}).update(terms)
    return found


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def few_ends(recipe, told, count):
    """The setting of that many samples of the teacher, where a recipe without data draws any."""
    fields = recipe.Settings.__dataclass_fields__
    asks = not issubclass(recipe, DMD) or "adversarial" in told or told.get("asked") == "noised" or (
        told.get("shield") == "statistics")
    return {"teacher_samples": count} if asks and {"data", "teacher_samples"} <= {*fields} else {}
