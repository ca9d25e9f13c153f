"""The recipe of feature nets: what is held out, how labels come in, and that a short run learns what data show."""

import json
from typing import Any

import pytest
import torch

import stillroom
from stillroom.data import Encoding, Latents, LatentSpace, Tensors, encoding_card, write_latents
from stillroom.data.batch import Batch
from stillroom.recipes.features import MaskedFeatures, Settings, by_neighbours, parted
from stillroom.settings import Optimizer, Refusal
from stillroom.train import Silent, fit, load_product
from stillroom.train.folder import read_rows
from stillroom.train.teacher import part_of

RATE = Optimizer(lr=3e-3, clip=1.0, warmup=10, decay="cosine")


def settings(out="unused", **more):
    return Settings(**{"data": "given", "size": 8, "out": out, "width": 8, "blocks": (1, 1), "batch": 16, "steps": 2,
                       "precision": "float32", "model": RATE, **more})


def stripes(count, seed=0):
    """Noisy waves along x (class 0) or along y (class 1), of random phase and height."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    phase, height = 6.28 * torch.rand(count, 1, 1, generator=g), 0.5 + torch.rand(count, 1, 1, generator=g)
    wave = height * torch.sin(torch.arange(8) * 1.57 + phase)                       # [N, 1, 8]
    x = torch.where(y[:, None, None] == 0, wave.expand(-1, 8, -1), wave.transpose(1, 2).expand(-1, -1, 8))
    return (x + 0.2 * torch.randn(count, 8, 8, generator=g))[:, None], y


def made(x, y=None, **more):
    return MaskedFeatures(settings(**more), Tensors(x, y, name="pictures"))


class Now:
    """All that the recipe asks of a turn."""

    step, watched = 0, True

    def rand(self, shape):
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))


NOW: Any = Now()


# ---- what is held out ----


def test_a_share_is_held_out_and_the_rest_is_learned_on():
    x = torch.arange(50.0).view(50, 1, 1, 1).expand(-1, 1, 4, 4)
    kept: Any = parted(Tensors(x, torch.arange(50) % 5), 0.2, seed=3)
    (mine, y), (theirs, _) = (part.fetch(range(len(part)), 0) for part in (kept, kept.held))
    numbers = mine[:, 0, 0, 0].tolist(), theirs[:, 0, 0, 0].tolist()
    assert len(numbers[1]) == 10 and sorted(numbers[0] + numbers[1]) == list(range(50))
    assert (y == mine[:, 0, 0, 0].long() % 5).all() and kept.classes == ("0", "1", "2", "3", "4")
    again: Any = parted(Tensors(x), 0.2, seed=3)
    assert again.rows.tolist() == kept.rows.tolist()
    other: Any = parted(Tensors(x), 0.2, seed=4)
    assert other.rows.tolist() != kept.rows.tolist()


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_nothing_is_held_out_where_that_would_leave_too_few(share):
    source = Tensors(torch.zeros(50, 1, 4, 4))
    assert parted(source, share, seed=0) is source


# ---- the terms ----


def test_labels_come_in_gradually():
    recipe = made(*stripes(8), steps=100, ramp=0.4, labels_weight=0.5)
    assert [recipe.weight(k) for k in (0, 19, 39, 40, 99)] == pytest.approx([0.5 / 40, 0.25, 0.5, 0.5, 0.5])
    assert made(*stripes(8), ramp=0.0, labels_weight=0.5).weight(0) == 0.5


def test_the_label_term_is_of_whole_pictures_and_leaves_the_painter_alone():
    x, y = stripes(8)
    recipe = made(x, y, steps=100, ramp=0.0, labels_weight=0.5)
    terms = recipe.losses({"data": Batch(x, y)}, NOW)["model"]
    net = recipe.model.net
    expected = 0.5 * torch.nn.functional.cross_entropy(net.logits(net.pooled(x)), y, reduction="none")
    torch.testing.assert_close(terms["labels"], expected)
    terms["labels"].sum().backward()
    assert all(p.grad is None for p in recipe.model.painter.parameters())


@pytest.mark.parametrize("recipe", [
    lambda x, y: made(x), lambda x, y: made(x, y, labels_weight=0.0),
], ids=["no labels", "no weight"])
def test_without_labels_or_weight_there_is_no_head(recipe):
    x, y = stripes(8)
    recipe = recipe(x, y)
    assert set(recipe.losses({"data": Batch(x, recipe.data.y)}, NOW)["model"]) == {"masked"}
    assert recipe.model.net.head is None


def test_the_preview_leaves_what_is_shown_as_it_is():
    recipe = made(*stripes(32))
    pictures = recipe.preview()
    shown = pictures["masked"] == pictures["pictures"]
    assert torch.equal(pictures["reconstructions"][shown], pictures["pictures"][shown])
    assert float((pictures["masked"] == 0).float().mean()) == 0.5
    hidden = ~shown
    assert (pictures["reconstructions"][hidden] != pictures["pictures"][hidden]).all()


# ---- a run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    x, y = stripes(400)
    out = tmp_path_factory.mktemp("run") / "run"
    return fit(MaskedFeatures, settings(out, steps=120, batch=32, labels_weight=1.0), Silent(), data=(x, y))


def test_a_short_run_tells_what_the_data_show(run):
    card = load_product(run).card
    held = card["held out"]
    assert held["count"] == 40 and held["accuracy"] > 0.95 and held["accuracy of neighbours"] > 0.9
    assert held["masked error over variance"] < 0.5
    assert (card["shape"], card["classes"], card["features"]) == ([1, 8, 8], 2, 16)
    x, y = stripes(200, seed=9)
    net = stillroom.load(run)
    assert float((net.logits(net.pooled(x)).argmax(1) == y).float().mean()) > 0.95
    seen = [row["held out/accuracy"] for row in read_rows(run / "metrics.jsonl")]
    assert len(seen) == 6 and abs(seen[-1] - held["accuracy"]) <= 1 / 40


def test_what_others_take_of_it(run):
    net, x = part_of(str(run), "features"), stripes(4)[0]
    assert net is not None and not any(p.requires_grad for p in net.parameters())
    assert [tuple(m.shape) for m in net(x)] == [(4, 8, 8, 8), (4, 8, 8, 8), (4, 16, 4, 4)]
    with pytest.raises(Refusal, match="stillroom train flow"):
        part_of(str(run), "flow")


def test_the_same_run_again_is_the_same_net(tmp_path):
    runs = [fit(MaskedFeatures, settings(tmp_path / name), Silent(), data=stripes(64)) for name in "ab"]
    a, b = (stillroom.load(r).state_dict() for r in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)


def latents(folder, classes=None):
    space = LatentSpace(4, 8, (0.0,) * 4, (2.0,) * 4)
    x = 2 * torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    y = None if classes is None else torch.arange(24) % len(classes)
    write_latents(folder, [Batch(x, y)], Encoding(space, "c0dec", "centre 64"), classes)
    return Latents(folder)


def test_features_of_latents_say_whose_latents(tmp_path):
    store = latents(tmp_path / "latents", ("a", "b"))
    out = fit(MaskedFeatures, settings(tmp_path / "run", batch=8), Silent(), data=store)
    card = load_product(out).card
    assert card["encoding"] == encoding_card(store)["encoding"] and card["encoding"]["codec"] == "c0dec"
    assert card["shape"] == [4, 8, 8] and card["held out"]["count"] == 2
    pixels = fit(MaskedFeatures, settings(tmp_path / "pixels"), Silent(), data=stripes(32))
    assert "encoding" not in load_product(pixels).card


def test_equal_pictures_leave_no_nan_on_the_card(tmp_path):
    out = fit(MaskedFeatures, settings(tmp_path / "run"), Silent(), data=(torch.zeros(32, 1, 8, 8), stripes(32)[1]))
    assert "NaN" not in json.dumps(load_product(out).card)


# ---- neighbours ----


def test_neighbours_are_the_nearest_others():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=g), torch.randint(4, (60,), generator=g)
    for i, said in enumerate(by_neighbours(x, y).tolist()):
        order = ((x - x[i]).norm(dim=1) + 1e9 * (torch.arange(60) == i)).argsort()[:5]
        votes = torch.bincount(y[order], minlength=4)
        assert said == int((votes == votes.max()).nonzero()[0])
    assert by_neighbours(x[:2], torch.tensor([3, 1])).tolist() == [1, 3]


# ---- what cannot be ----


@pytest.mark.parametrize(("x", "more", "says"), [
    (torch.randn(8, 5), {}, "features are of pictures or latents"),
    (torch.randn(8, 1, 9, 9), {}, "9 x 9 is no whole number of squares of 2"),
    (torch.randn(8, 1, 8, 8), {"hidden": 0.0}, "hide some of a picture"),
    (torch.randn(8, 1, 8, 8), {"hidden": 1.0}, "hide some of a picture"),
    (torch.randn(8, 1, 8, 8), {"width": 12}, "width 12 must be divisible by 8"),
])
def test_it_refuses_in_one_line_what_cannot_be(tmp_path, x, more, says):
    with pytest.raises(Refusal, match=says) as refused:
        fit(MaskedFeatures, settings(tmp_path / "run", **more), Silent(), data=x)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
