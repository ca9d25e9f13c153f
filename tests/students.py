"""Points of two classes, a flow that learned to draw them, and how far a student of it is from them: the ground of the
recipes' tests on students."""

import pytest
import torch

from stillroom.data import Tensors
from stillroom.measure import energy_distance
from stillroom.recipes.flow import FlowMatching
from stillroom.settings import Optimizer
from stillroom.train import Silent, load, start

PLAIN = {"precision": "float32", "device": "cpu", "log_every": 10}
POINTS = {"data": "given", "size": 1, "width": 64, "depth": 2}
RATE = Optimizer(lr=2e-3, clip=1.0, warmup=10, decay="cosine")


def clusters(count: int = 600, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Each class two tight clusters, left and right."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(count) % classes
    side = torch.randint(2, (count,), generator=g) * 2 - 1
    centre = torch.stack([1.5 * side, (2 * y - (classes - 1)) / max(1, classes - 1)], 1)
    return centre + 0.1 * torch.randn(count, 2, generator=g), y


@pytest.fixture(scope="module", name="data")
def points():
    return Tensors(*clusters(), ["low", "high"], "clusters")


@pytest.fixture(scope="module", name="teacher")
def flow_of_points(tmp_path_factory, data):
    out = tmp_path_factory.mktemp("teacher") / "run"
    settings = FlowMatching.Settings(out=out, steps=600, batch=256, model=RATE, average=0.99, **POINTS, **PLAIN)
    return str(start(FlowMatching, settings, "flow", {"data": data}, Silent()))


def moved(place, teacher) -> bool:
    """Whether weights of a student, or its adapters, are no longer those of the teacher that it began as."""
    mine, theirs = ({name.rpartition("net.")[2]: x for name, x in load(run).state_dict().items()}
                    for run in (place, teacher))
    adapted = any(bool(x.any()) for name, x in mine.items() if "lora_B" in name)
    return adapted or any(not torch.equal(x, theirs[name]) for name, x in mine.items() if name in theirs)


def far(generator, data) -> float:
    """Of samples from the data, class by class."""
    x, y = generator.sample(600), generator.labels(0, 600)
    return sum(float(energy_distance(x[y == c], data.x[data.y == c])) for c in (0, 1))
