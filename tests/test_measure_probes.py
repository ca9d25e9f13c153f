"""Linear and kNN probes against what is known: separable classes, labels of no meaning, brute force."""

import pytest
import torch

from stillroom.measure import probes
from stillroom.measure.probes import knn_probe, linear_probe
from stillroom.settings import Refusal


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def groups(n: int, k: int, d: int, apart: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(n) % k
    return normal(n, d, seed=seed + 1) + apart * torch.nn.functional.normalize(normal(k, d, seed=99))[y], y


@pytest.mark.parametrize("d", [6, 300])         # fewer and more dimensions than vectors
def test_separable_classes_are_read_by_both(d):
    x, y = groups(200, 4, d, 40.0)
    test_x, test_y = groups(120, 4, d, 40.0, seed=9)
    assert linear_probe(x, y, test_x, test_y).accuracy == 1
    assert knn_probe(x, y, test_x, test_y).accuracy == 1


def test_labels_without_meaning_are_read_at_chance():
    y, test_y = torch.arange(2000) % 5, torch.arange(3000) % 5
    x, test_x = normal(2000, 20), normal(3000, 20, seed=1)
    linear, votes = linear_probe(x, y, test_x, test_y), knn_probe(x, y, test_x, test_y)
    assert linear.chance == 0.2
    assert abs(linear.accuracy - 0.2) < 0.03 and abs(votes.accuracy - 0.2) < 0.03
    assert linear.ridge >= 1        # nothing to learn: the ridge flattens the answer


def test_a_linear_probe_reads_what_is_linear_and_a_vote_what_is_near():
    x, test_x = normal(800, 2) , normal(800, 2, seed=1)
    ring, test_ring = (v.norm(dim=1).gt(1.18).long() for v in (x, test_x))      # one class about the other
    assert linear_probe(x, ring, test_x, test_ring).accuracy < 0.65
    assert knn_probe(x, ring, test_x, test_ring).accuracy > 0.93


def test_scale_and_place_of_each_dimension_do_not_matter_to_the_linear_probe():
    x, y = groups(300, 3, 5, 1.5)
    test_x, test_y = groups(300, 3, 5, 1.5, seed=7)
    scale = torch.tensor([1e-3, 1.0, 50.0, 7.0, 1e3])
    place = 10 * scale * normal(5, seed=3)
    plain = linear_probe(x, y, test_x, test_y)
    moved = linear_probe(x.double() * scale + place, y, test_x.double() * scale + place, test_y)
    assert abs(plain.accuracy - moved.accuracy) <= 1 / 300 and plain.ridge == moved.ridge
    dead = torch.cat([x, torch.full((300, 1), 4.0)], 1), torch.cat([test_x, torch.full((300, 1), 4.0)], 1)
    assert linear_probe(dead[0], y, dead[1], test_y).accuracy == plain.accuracy


@pytest.mark.parametrize("d", [3, 40])
def test_the_ridge_is_that_of_leave_one_out_by_brute_force(d):
    x, y = groups(30, 2, d, 1.0)
    target = torch.nn.functional.one_hot(y, 2).double()
    standard = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    largest = torch.linalg.eigvalsh(standard @ standard.T).max()

    def left_out(share: float) -> float:
        total = 0.0
        for i in range(30):
            kept = torch.arange(30) != i
            a, b = standard[kept], target[kept]
            centre, mean = a.mean(0), b.mean(0)
            inner = (a - centre).T @ (a - centre) + share * largest * torch.eye(d)
            w = torch.linalg.solve(inner, (a - centre).T @ (b - mean))
            total += float(((standard[i] - centre) @ w + mean - target[i]).square().sum())
        return total

    errors = {share: left_out(share) for share in probes.RIDGES}
    assert linear_probe(x, y, x, y).ridge == min(errors, key=errors.__getitem__)


def test_a_tied_vote_goes_to_the_nearest():
    x, y = torch.tensor([[0.0], [1.0], [2.0], [9.0]]), torch.tensor([1, 0, 1, 0])
    at = torch.tensor([[0.1]])
    assert knn_probe(x, y, at, torch.tensor([1]), k=2).accuracy == 1        # of one each, the class at 0
    assert knn_probe(x, y, torch.tensor([[0.9]]), torch.tensor([0]), k=2).accuracy == 1
    assert knn_probe(x, y, torch.tensor([[0.9]]), torch.tensor([1]), k=3).accuracy == 1     # two votes beat nearness
    assert knn_probe(x, y, at, torch.tensor([1]), k=99).neighbours == 4
    line, first = torch.arange(4.0)[:, None], torch.tensor([1, 0, 0, 1])        # as many votes, at equal ranks
    for a, b in ((1, 0), (0, 1)):
        told = knn_probe(line, torch.where(first == 1, a, b), torch.tensor([[-1.0]]), torch.tensor([a]), k=4)
        assert told.accuracy == 1


def test_refusals():
    x, y = groups(20, 2, 3, 1.0)
    for told, arguments in {
        "two classes": (x, y * 0, x, y), "a label for each": (x, y[:5], x, y), "NaN": (x * float("nan"), y, x, y),
        "all vectors are equal": (x * 0, y, x, y),
    }.items():
        with pytest.raises(Refusal, match=told):
            linear_probe(*arguments)
