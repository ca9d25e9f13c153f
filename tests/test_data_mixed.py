"""Mixtures: shares are exact, every source is seen whole, an item is a function of index and key."""

import io
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image

from stillroom.data import (
    CREDITS,
    Encoding,
    LatentSpace,
    Loader,
    Photos,
    Scenes,
    Tensors,
    encoding_card,
    open_source,
)
from stillroom.data.mixed import Mixed, mixture
from stillroom.data.pictures import sample
from stillroom.settings import Images, Refusal, seed_of


def numbers(first, count, y=None, classes=None):
    """Item j is the number first + j."""
    return Tensors(torch.arange(first, first + count).float()[:, None], y, classes, name=f"from {first}")


class Augmented:
    """Item i is (i, key)."""

    name, shape, classes = "augmented", (2,), None

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def fetch(self, indices, key):
        from stillroom.data import Batch

        return Batch(torch.tensor([[i, key % 1000] for i in indices]).float())


def shown(source, indices, key=0):
    return source.fetch(indices, key).x[:, 0].int().tolist()


@pytest.mark.parametrize(("sizes", "shares", "length"), [
    ((10, 10), (1, 1), 20), ((10, 10), (0.6, 0.4), 25), ((3, 30), (1, 1), 60), ((4, 5, 6), (0.2, 0.5, 0.3), 20),
])
def test_an_epoch_sees_every_source_whole_in_its_share(sizes, shares, length):
    mixed = Mixed([numbers(100 * k, n) for k, n in enumerate(sizes)], shares)
    seen = shown(mixed, range(len(mixed)))
    assert len(mixed) == length and mixed.in_memory
    counts = Counter(v // 100 for v in seen)
    for k, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        assert counts[k] == round(length * share / sum(shares))
        items = Counter(v for v in seen if v // 100 == k)
        assert len(items) == size and max(items.values()) - min(items.values()) <= 1


def test_any_run_of_indices_holds_the_shares():
    shares = (0.5, 0.3, 0.2)
    mixed = Mixed([numbers(1000 * k, 300) for k in range(3)], shares)
    for start, run in [(0, 10), (7, 100), (431, 250)]:
        counts = Counter(v // 1000 for v in shown(mixed, range(start, start + run)))
        assert all(abs(counts[k] - run * share) <= 2 for k, share in enumerate(shares))


def test_an_item_is_a_function_of_its_index_and_key():
    mixed = Mixed([Augmented(7), Augmented(20)], (0.5, 0.5))
    x = mixed.fetch(range(40), 6).x
    assert torch.equal(x[[31, 3, 3]], mixed.fetch([31, 3, 3], 6).x)
    assert not torch.equal(x, mixed.fetch(range(40), 7).x)
    small = x[[i for i in range(40) if mixed._which[i] == 0]]               # 20 items out of 7
    assert small[:, 0].tolist() == [j % 7 for j in range(20)]
    assert small[:, 1].tolist() == [6.0] * 7 + [seed_of(6, 1) % 1000] * 7 + [seed_of(6, 2) % 1000] * 6


def test_labels_are_kept_where_the_classes_are_the_same():
    y = torch.tensor([0, 1, 1])
    same = Mixed([numbers(0, 3, y, ["a", "b"]), numbers(100, 3, 1 - y, ["a", "b"])])
    batch = same.fetch(range(6), 0)
    assert same.classes == ("a", "b") and batch.y is not None
    truth = {0: 0, 1: 1, 2: 1, 100: 1, 101: 0, 102: 0}
    assert [truth[int(v)] for v in batch.x[:, 0]] == batch.y.tolist()
    for other in (numbers(100, 3, y, ["a", "c"]), numbers(100, 3)):
        mixed = Mixed([numbers(0, 3, y, ["a", "b"]), other])
        assert mixed.classes is None and mixed.fetch([0, 1], 0).y is None


def test_the_loader_reads_a_mixture_alike_in_any_number_of_threads():
    seen = []
    for workers in (0, 3):
        mixed = Mixed([Photos(8, flip=True, count=30), Scenes("leaves", 8, count=20, flip=True)], (0.3, 0.7))
        with Loader(mixed, seed=3, batch=12, micros=3, workers=workers) as loader:
            seen.append(torch.cat([b.x for k in range(9) for b in loader.at(k)]))
    assert torch.equal(*seen)


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(Refusal, match=r"from 0 holds \[1\] and augmented \[2\]"):
        Mixed([numbers(0, 3), Augmented(3)])
    with pytest.raises(Refusal, match="give each one above 0"):
        Mixed([numbers(0, 3), numbers(0, 3)], (1, 0))
    with pytest.raises(Refusal, match="takes 3,000,000,003 items"):
        Mixed([numbers(0, 3), numbers(0, 3)], (1, 1e9))


def test_latents_are_mixed_with_latents_of_the_same_making():
    def latents(scale, name="a"):
        made = numbers(0, 3)
        made.name, made.encoding = name, Encoding(LatentSpace(1, 4, (0.0,), (scale,)), "c", "centre 8")
        return made

    mixed = Mixed([latents(1.0), latents(1.0, "b")])
    assert encoding_card(mixed) == encoding_card(latents(1.0)) != {}
    assert encoding_card(Mixed([numbers(0, 3), numbers(5, 3)])) == {}
    for other, words in ((latents(3.0, "b"), "a and b cannot be mixed.*scale"), (numbers(0, 3), "the other pictures")):
        with pytest.raises(Refusal, match=words):
            Mixed([latents(1.0), other])


# ---- by name ----

@pytest.mark.parametrize(("spec", "parts"), [
    ("a", [(1, "a")]), ("a+b", [(1, "a"), (1, "b")]), ("0.6*a+.4*b", [(0.6, "a"), (0.4, "b")]),
    (" 2 * a + b ", [(2, "a"), (1, "b")]), ("c+d", [(1, "c+d")]), ("a+c+d+b", [(1, "a"), (1, "c+d"), (1, "b")]),
    ("3*c+d+a", [(3, "c+d"), (1, "a")]), ("2*x+a", [(1, "2*x"), (1, "a")]), ("gone+b", [(1, "gone"), (1, "b")]),
])
def test_names_are_taken_apart_at_their_plus_signs(spec, parts):
    assert mixture(spec, {"a", "b", "c+d", "2*x"}.__contains__) == parts


def test_a_mixture_opens_by_name(tmp_path):
    folder = tmp_path / "a+b"
    folder.mkdir()
    for value in (10, 20):
        Image.new("RGB", (16, 16), (value,) * 3).save(folder / f"{value}.png")

    def opened(spec, **how):
        return open_source(Images(data=spec, size=16, **how))

    assert sorted(((opened(str(folder)).fetch([0, 1], 0).x[:, 0, 0, 0] + 1) * 127.5).round().tolist()) == [10, 20]  # type: ignore[union-attr]
    mixed = opened(f"0.25*{folder}+0.75*photos:test", crop="shrink")
    assert isinstance(mixed, Mixed) and len(mixed.sources[0]) == 2
    assert mixed.credits == tuple(c for c in CREDITS if c.split == "test")
    assert [s.name for s in mixed.sources] == [str(folder), "photos:test"] and len(mixed) == round(10_000 / 0.75)
    assert torch.equal(opened("photos+leaves").fetch([1], 5).x, opened("leaves").fetch([0], 5).x)      # type: ignore[union-attr]
    assert opened("shapes:train+shapes:test").classes is not None
    assert opened("shapes+leaves").classes is None


def test_names_that_cannot_be_mixed_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    for spec, says in [
        (f"photos+{tmp_path / 'x.tar'}", "is a stream of tars, which cannot be mixed"),
        ("photos+leavs", "data 'leavs': .*did you mean 'leaves'"), ("photos+", "a part of the mixture has no name"),
        ("photos+digits", "photos:train holds .* and digits:train"), ("0*photos+leaves", "give each one above 0"),
        ("2*photos", r"photos is all of it, whatever its share; leave 2\* out"),
    ]:
        with pytest.raises(Refusal, match=says):
            open_source(Images(data=spec, size=16))


# ---- samples ----

def test_a_sample_is_the_start_of_a_shuffled_order():
    source = numbers(0, 50)
    a = sample(source, 20, seed=1).x[:, 0].tolist()
    assert a == sample(source, 20, seed=1).x[:, 0].tolist() != sample(source, 20, seed=2).x[:, 0].tolist()
    assert len(set(a)) == 20 and a != sorted(a)
    assert Counter(sample(source, 120, 1).x[:, 0].tolist()).most_common()[-1][1] == 2      # more than there are


def test_a_sample_of_a_stream(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for value in range(9):
            out = io.BytesIO()
            Image.new("RGB", (4, 4), (value,) * 3).save(out, "PNG")
            info = tarfile.TarInfo(f"{value}.png")
            info.size = out.tell()
            tar.addfile(info, io.BytesIO(out.getvalue()))
    source = open_source(Images(data=str(tmp_path), size=4))
    x = sample(source, 9, 0).x
    assert torch.equal(x, sample(source, 9, 0).x)
    assert sorted(((x[:, 0, 0, 0] + 1) * 127.5).round().tolist()) == list(range(9))
