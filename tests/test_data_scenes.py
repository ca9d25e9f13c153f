"""Scenes and builtin pictures: deterministic, the same at every size, disjoint splits."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from stillroom.data import CREDITS, SHAPES, Photos, Scenes, digits, leaves, open_source, scenes, shapes
from stillroom.data.discs import Discs, paint
from stillroom.data.scenes import Window
from stillroom.settings import Images, Refusal

RENDER = pytest.mark.parametrize("render", [shapes, leaves])


@RENDER
def test_a_scene_is_a_pure_function_of_its_index(render):
    first = [render(i, 24) for i in range(6)]
    assert all(torch.equal(a, render(i, 24)) for i, a in reversed(list(enumerate(first))))
    assert len({a.numpy().tobytes() for a in first}) == 6


@RENDER
@pytest.mark.parametrize(("small", "large"), [(32, 64), (32, 128), (48, 96)])
def test_the_same_scene_at_two_sizes(render, small, large):
    for index in range(16):
        coarse = render(index, small).float()
        shrunk = functional.avg_pool2d(render(index, large).float()[None], large // small)[0]
        other = functional.avg_pool2d(render(index + 8, large).float()[None], large // small)[0]
        assert (coarse - shrunk).abs().mean() < 1.6              # of 255
        assert (coarse - other).abs().mean() > 10


def leaves_one_by_one(index, size):
    """The same law, painted back to front, a disc at a time, in float64."""
    rng = np.random.default_rng((2, index))
    n = scenes.LEAVES
    radii = (0.05**-2 - rng.random(n) * (0.05**-2 - 0.45**-2)) ** -0.5
    centres = rng.random((n, 2)) * 1.2 - 0.1
    hues, palette = rng.normal(0, 0.04, n), rng.random(4)
    hues += palette[rng.integers(0, 4, n)]
    u = rng.random((n, 6))
    canvas = np.broadcast_to(scenes._colour(palette[0], 0.4, 0.5)[:, None, None], (3, size, size)).copy()
    middles = (np.arange(size) + 0.5) / size
    for i in range(n):
        dx, dy = middles - centres[i, 0], middles[:, None] - centres[i, 1]
        cover = np.clip(0.5 + (radii[i] - np.hypot(dx, dy)) * size, 0, 1)
        along = np.cos(2 * np.pi * u[i, 0]) * dx + np.sin(2 * np.pi * u[i, 0]) * dy
        shade = 1 + 0.3 * u[i, 1] / radii[i] * along
        if u[i, 2] < 0.3 and radii[i] > 0.08:
            wave = 0.1 + 0.15 * u[i, 3]
            shade = shade + 0.25 * np.sinc(1 / (wave * size)) * np.sin(along * 2 * np.pi / wave)
        ink = scenes._colour(hues[i], 0.25 + 0.7 * u[i, 4], 0.2 + 0.75 * u[i, 5])[:, None, None]
        canvas += cover * (ink * shade - canvas)
    return np.clip(canvas * 255 + 0.5, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [4, 17, 32, 64, 100, 140])
def test_leaves_are_what_painting_them_one_by_one_gives(size):
    for index in range(4):
        apart = leaves(index, size).numpy().astype(int) - leaves_one_by_one(index, size)
        assert np.abs(apart).max() <= 1 and (apart != 0).mean() < 0.001


@RENDER
@pytest.mark.parametrize("side", [40, 136])
def test_a_window_shows_its_part_of_the_scene(render, side):
    whole = 320
    for index, (left, top) in enumerate([(0, 0), (24, 150), (184, 184)]):
        part = render(index, side, Window(left / whole, top / whole, side / whole)).int()
        assert (part - render(index, whole).int()[:, top:top + side, left:left + side]).abs().max() <= 1


def test_a_disc_in_front_lets_through_what_it_does_not_cover():
    """Two edges in one pixel: 1/4 white over 1/2 black over grey is 1/4 + 3/4 * 1/2 * 1/2."""
    flat = [0.0] * 3
    discs = Discs(
        x=np.array([8.25, 8.0, 0], np.float32), y=np.array([4.5, 4.5, 0], np.float32),
        radius=np.array([1.5, 1.5, np.inf], np.float32), cos=np.ones(3, np.float32),
        **{name: np.array(flat, np.float32) for name in ("sin", "slope", "depth")}, wave=np.ones(3, np.float32),
        ink=np.array([[1, 0, 0.5]] * 3, np.float32),
    )
    picture = paint(discs, 16)
    assert picture[0, 4, 6] == int((0.25 + 0.75 * 0.5 * 0.5) * 255 + 0.5)
    assert picture[0, 4, 8] == 255 and picture[0, 0, 0] == 128


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.1])
def test_a_disc_covers_its_area(angle):
    """Coverage by clipped signed distance sums to the true area of each shape."""
    exact = {"disc": np.pi * 0.81, "square": 1.56**2, "triangle": 3 * 3**0.5 / 4, "ring": np.pi * (0.96**2 - 0.48**2),
             "cross": 2 * (2 * 0.64) - 0.64**2, "star": 5 * 0.42 * np.sin(np.pi / 5), "stripes": 3 * 0.36 * 1.8}
    size, radius = 64, 0.35
    x, y = scenes._grid(size)
    c, s = np.cos(angle) / radius, np.sin(angle) / radius
    qx, qy = (x - 0.5) * c + (y - 0.5) * s, (y - 0.5) * c - (x - 0.5) * s
    for name, area in exact.items():
        cover = np.clip(0.5 - SHAPES[name](qx, qy) * radius * size, 0, 1)
        assert cover.mean() / radius**2 == pytest.approx(area, rel=0.02), name


def test_every_class_can_be_told_from_the_others_by_its_mask():
    x, y = scenes._grid(64)
    masks = {name: f((x - 0.5) * 2.2, (y - 0.5) * 2.2) < 0 for name, f in SHAPES.items()}
    for a in masks:
        for b in masks:
            overlap = (masks[a] & masks[b]).sum() / (masks[a] | masks[b]).sum()
            assert a == b or overlap < 0.85


def test_shape_and_ground_contrast():
    """The middle of a disc differs from the corners in every picture."""
    for index in range(0, 400, 8):
        image = shapes(index, 32).float()
        corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(1)
        assert (image - corners[:, None, None]).abs().sum(0).max() > 60


def test_splits_share_no_scene_and_labels_follow_the_index():
    train, test = (Scenes("shapes", 16, count=40, split=s) for s in ("train", "test"))
    a, b = (s.fetch(range(40), 0) for s in (train, test))
    assert not {p.numpy().tobytes() for p in a.x} & {p.numpy().tobytes() for p in b.x}
    assert a.y is not None and a.y.tolist() == [i % 8 for i in range(40)] and torch.equal(a.y, b.y)  # type: ignore[arg-type]
    assert train.classes == tuple(SHAPES)


@pytest.mark.parametrize("limit", [2**30, 0])
def test_kept_and_fresh_scenes_are_the_same(monkeypatch, limit):
    from stillroom.data import images

    monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
    source = Scenes("leaves", 16, count=5, flip=True)
    x = source.fetch([3, 1, 3], 2).x
    assert torch.equal(x, source.fetch([3, 1, 3], 2).x) and torch.equal(x[0], x[2])
    plain = leaves(3, 16).float() / 127.5 - 1
    assert torch.equal(x[0], plain) or torch.equal(x[0], plain.flip(-1))


def test_dead_leaves_have_the_spectrum_of_natural_images():
    """The power spectrum falls as a power near -2: what makes dead leaves a stand-in for photographs."""
    size = 64
    grey = torch.stack([leaves(i, size).float().mean(0) for i in range(40)])
    window = torch.hann_window(size)[:, None] * torch.hann_window(size)
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window).abs().square().mean(0)
    f = torch.fft.fftfreq(size) * size
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt().round()
    rings = torch.arange(3, 20)
    mean = torch.stack([power[radius == r].mean() for r in rings])
    slope = np.polyfit(np.log(rings.numpy()), np.log(mean.numpy()), 1)[0]
    assert -3.3 < slope < -1.5


def test_photos_are_split_by_picture_and_credited():
    train, test = Photos(32), Photos(32, "test")
    assert {c.name for c in train.credits} >= {"astronaut", "chelsea", "coffee", "china"}
    assert {c.name for c in test.credits} >= {"rocket", "flower"}
    assert sorted(c.file for c in train.credits + test.credits) == sorted({c.file for c in CREDITS})
    by = {c.name: str(c) for c in CREDITS}
    assert "danielbuechele" in by["china"] and "vultilion" in by["flower"]
    assert all("CC BY 2.0" in by[name] for name in ("china", "flower"))


def test_a_photo_crop_is_a_function_of_index_and_key():
    source = Photos(16, flip=True)
    x = source.fetch([0, 1, 2, 3, 4], 5).x
    assert torch.equal(x[[3, 0]], source.fetch([3, 0], 5).x)
    assert not torch.equal(x, source.fetch([0, 1, 2, 3, 4], 6).x)
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.2


def test_a_photo_crop_of_the_whole_height_is_the_picture():
    source = Photos(300)
    picture = np.asarray(source._pictures[1])                       # chelsea: 451 x 300
    crop = source._square(1, (0.5, 0.0, 1.0, 0.0))
    left = int(0.5 * (451 - 300 + 1))
    assert np.array_equal(crop.permute(1, 2, 0), picture[:, left:left + 300])
    with pytest.raises(Refusal, match="1 to 300"):
        Photos(301)


def test_digits_are_the_packages_own_split_by_index():
    from sklearn.datasets import load_digits

    data = load_digits()
    train, test = digits(), digits(split="test")
    assert len(train) + len(test) == 1797 and train.classes == tuple("0123456789")
    images = torch.cat([train.x, test.x])
    assert sorted(p.tobytes() for p in ((images + 1) * 8).numpy()) == sorted(
        p.astype(np.float32).tobytes() for p in data.images)                                      # type: ignore[attr-defined]
    assert train.y is not None and test.y is not None
    share = test.y.bincount() / (train.y.bincount() + test.y.bincount())
    assert (share - 0.2).abs().max() < 0.01
    assert torch.equal(train.x, digits().x)


def test_resized_digits_keep_their_mean():
    small, large = digits(8), digits(32)
    assert large.shape == (1, 32, 32) and large.x.min() >= -1 and large.x.max() <= 1
    assert (functional.avg_pool2d(large.x, 4) - small.x).abs().mean() < 0.1


@pytest.mark.parametrize(("spec", "length", "shape"), [
    ("digits", 1442, (1, 16, 16)), ("digits:test", 355, (1, 16, 16)), ("shapes", 10_000, (3, 16, 16)),
    ("leaves:test", 10_000, (3, 16, 16)), ("photos:test", 10_000, (3, 16, 16)),
])
def test_builtin_names_open(spec, length, shape):
    source = open_source(Images(data=spec, size=16))
    assert len(source) == length and source.shape == shape                                        # type: ignore[arg-type]
    assert source.fetch([0], 0).x.shape == (1, *shape)                                            # type: ignore[union-attr]


@pytest.mark.parametrize(("settings", "says"), [
    ({"data": "shaps"}, "no such file.*did you mean 'shapes'"),
    ({"data": "nowhere/at/all"}, "known: digits, leaves, photos, shapes"),
    ({"data": "digits", "flip": True}, "mirrored digit"),
    ({"data": "photos:val"}, "train and test, not 'val'"),
    ({"data": "shapes", "size": 0}, "size 0"),
    ({"data": "shapes", "bad_share": 2.0}, "bad_share 2.0"),
])
def test_wrong_names_and_numbers_are_refused(settings, says):
    with pytest.raises(Refusal, match=says):
        open_source(Images(**{"size": 16, **settings}))


def test_wrong_paths_are_refused(tmp_path):
    def refused(path, says):
        with pytest.raises(Refusal, match=says):
            open_source(Images(data=str(path), size=16))

    refused(tmp_path, "holds no images")
    (tmp_path / "a.png").write_bytes(b"x")
    refused(tmp_path / "a.png", "give the folder it lies in")
    refused(f"{tmp_path / 'a.png'}:test", "single file has no split")
    (tmp_path / "a.zip").write_bytes(b"x")
    refused(tmp_path / "a.zip", "not a data set")
    refused(f"{tmp_path}:test", "has no split 'test'")


def test_split_folders_are_entered_and_class_folders_are_not(tmp_path):
    from PIL import Image

    for i, name in enumerate(["train/cat", "train/dog", "val/cat", "val/dog"]):
        (tmp_path / "a" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / "a" / name / "x.png")
    for i, name in enumerate(["bus", "train"]):
        (tmp_path / "b" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (i, i, i)).save(tmp_path / "b" / name / "x.png")

    def first(spec):
        source = open_source(Images(data=f"{tmp_path}/{spec}", size=4))
        return source.classes, ((source.fetch([0, 1], 0).x[:, 0, 0, 0] + 1) * 127.5).round().tolist()  # type: ignore[union-attr]

    assert first("a") == (("cat", "dog"), [0, 1]) and first("a:val") == (("cat", "dog"), [2, 3])
    assert first("b") == (("bus", "train"), [0, 1])
    with pytest.raises(Refusal, match="no split 'test'; it has train, val"):
        first("a:test")
