"""The loader: ranks, micro-batches, threads and resuming change nothing about what a step sees."""

import threading

import pytest
import torch

from stillroom.data import Batch, Loader, TarStream, Tensors, at_most, indices, uniforms
from stillroom.settings import Refusal


class Numbers:
    """x = (index, a draw of its augmentation), y = index modulo 3."""

    name, shape, classes = "numbers", (2,), ("a", "b", "c")

    def __init__(self, count, broken=None):
        self.count, self.broken, self.asked = count, broken, []
        self.lock = threading.Lock()

    def __len__(self):
        return self.count

    def fetch(self, indices, key):
        with self.lock:
            self.asked += list(indices)
        if self.broken in indices:
            raise Refusal(f"item {self.broken} is broken")
        i = torch.as_tensor(indices)
        return Batch(torch.cat([i[:, None].double(), uniforms(indices, key, 1)], 1), i % 3)


def read(source, steps, **how):
    how = {"seed": 5, "batch": 12, "workers": 0, **how}
    with Loader(source, **how) as loader:
        return [loader.at(k) for k in steps]


def same(a, b):
    return all(torch.equal(p.x, q.x) and torch.equal(p.y, q.y) for s, t in zip(a, b, strict=True)
               for p, q in zip(s, t, strict=True))


def joined(batches):
    return Batch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))


@pytest.mark.parametrize("count", [100, 12, 7, 5])
def test_two_ranks_and_two_micros_see_what_one_process_would(count):
    one = read(Numbers(count), range(8))
    ranks = [read(Numbers(count), range(8), rank=r, world=2, micros=2) for r in range(2)]
    for k in range(8):
        whole = joined([ranks[r][k][m] for m in range(2) for r in range(2)])
        assert same([[whole]], [one[k]])
        assert whole.x[:, 0].tolist() == indices(count, 5, k, 12)


def test_threads_change_nothing():
    plain = read(Numbers(31), range(10), micros=3)
    assert same(plain, read(Numbers(31), range(10), micros=3, workers=2))
    assert same(plain, read(Numbers(31), range(10), micros=3, workers=4, ahead=7))


def test_starting_at_step_k_equals_going_there():
    for workers in (0, 2):
        whole = read(Numbers(31), range(10), workers=workers)
        assert same(whole[6:], read(Numbers(31), range(6, 10), workers=workers, start=6))


def test_steps_may_be_asked_for_in_any_order():
    plain = read(Numbers(31), range(6))
    assert same([plain[k] for k in (4, 0, 5, 5, 1)], read(Numbers(31), (4, 0, 5, 5, 1), workers=2))


def test_only_this_ranks_slice_is_decoded():
    source = Numbers(100)
    read(source, [0], rank=1, world=4)
    assert source.asked == indices(100, 5, 0, 12)[3:6]


def test_an_item_twice_in_a_batch_is_augmented_twice():
    x = read(Numbers(3), [0])[0][0].x
    assert len({tuple(row) for row in x.tolist()}) == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_thread_surfaces_at_its_step(workers):
    source = Numbers(36)
    step = next(k for k in range(3) if 7 in indices(36, 5, k, 12))
    source.broken = 7
    with Loader(source, seed=5, batch=12, workers=workers) as loader:
        for k in range(3):
            if k == step:
                with pytest.raises(Refusal, match="item 7 is broken"):
                    loader.at(k)
            else:
                assert len(loader.at(k)[0].x) == 12


def test_an_uneven_cut_is_refused_with_the_number_to_use():
    with pytest.raises(Refusal, match="multiple of 8"):
        Loader(Numbers(10), seed=0, batch=12, micros=4, world=2)


def test_an_indexable_source_needs_no_cursor():
    with Loader(Numbers(10), seed=0, batch=2) as loader:
        loader.at(0)
        assert loader.cursor(0) == {}


def test_tensors_hand_back_their_rows():
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 2])
    source = Tensors(x, y)
    batch = source.fetch([4, 0, 4], 0)
    assert torch.equal(batch.x, x[[4, 0, 4]]) and batch.y is not None and batch.y.tolist() == [2, 0, 2]
    assert source.classes == ("0", "1", "2") and source.shape == (3,) and len(source) == 5


@pytest.mark.parametrize(
    ("x", "y", "classes", "says"),
    [
        (torch.zeros(0, 3), None, None, "at least one"),
        (torch.zeros(3), None, None, "at least one"),
        (torch.zeros(3, 2, dtype=torch.uint8), None, None, "give floats"),
        (torch.tensor([[0.0], [float("nan")], [float("inf")]]), None, None, "2 of 3 items hold NaN.*item 1"),
        (torch.zeros(3, 2), torch.tensor([0, 1]), None, r"shape \[3\]"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), ["a", "b"], "out of range.*item 2 with label 2"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), None, "out of range"),
        (torch.zeros(3, 2), torch.tensor([0.0, 1.0, 1.0]), None, "give integers"),
        (torch.zeros(3, 2), None, ["a"], "no labels"),
    ],
)
def test_tensors_are_checked_at_the_border(x, y, classes, says):
    with pytest.raises(Refusal, match=says):
        Tensors(x, y, classes)


def test_of_a_source_there_are_no_more_items_than_it_holds_and_of_a_stream_as_many_as_are_asked_for(tmp_path):
    (tmp_path / "one.tar").write_bytes(b"")
    assert [at_most(Tensors(torch.zeros(5, 2)), n) for n in (3, 5, 9)] == [3, 5, 5]
    assert at_most(TarStream([tmp_path / "one.tar"], 8), 9) == 9
