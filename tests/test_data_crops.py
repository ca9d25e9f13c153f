"""The law of cropping is the resolution trained on: its sizes, places and pixels, for every kind of data."""

import io
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from stillroom.data import ImageTable, Loader, Photos, Scenes, decode, images, leaves, open_source, uniforms
from stillroom.data.images import Shrink, signed
from stillroom.data.scenes import Window
from stillroom.data.tables import Rows
from stillroom.settings import Images, Refusal, from_mapping


def encoded(array):
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


def noise(height=40, width=56, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rows(count=6, reads=None, **size):
    cells = [encoded(noise(seed=i, **size)) for i in range(count)]
    return Rows("r", count, lambda i: (reads.append(i) if reads is not None else None) or cells[i], lambda i: f"{i}")


# ---- the law ----

def test_the_side_is_uniform_in_its_logarithm_between_least_and_most():
    law = Shrink(32, 1.5, 6.0)
    sides = torch.tensor([law.side(1000, u) for u in np.linspace(0, 1, 9).tolist()])
    torch.testing.assert_close(sides.log(), torch.linspace(math.log(48), math.log(192), 9))


def test_the_side_keeps_to_the_picture():
    law = Shrink(32, 1.5, 6.0)
    assert law.side(100, 0.0) == 48 and law.side(100, 1.0) == pytest.approx(100)
    assert [law.side(40, u) for u in (0.0, 0.5, 0.99)] == [40] * 3          # the least does not fit: all there is
    assert Shrink(32).side(512, 1.0) == pytest.approx(512)                  # without a most: the whole picture
    assert Shrink(32, 0.5, 0.5).side(512, 0.3) == 16                        # asked to enlarge


def test_an_unshrunk_square_is_a_window_of_the_picture():
    picture = noise()
    windows = np.lib.stride_tricks.sliding_window_view(picture, (16, 16, 3))[:, :, 0]               # [25, 41, ...]
    law, image = Shrink(16, 1.0, 1.0), Image.fromarray(picture)
    for x, y in [(0, 0), (0.5, 0.25), (0.999, 0.999)]:
        cut = law.cut(image, (x, y, 1.0, 0.7)).permute(1, 2, 0).numpy()
        assert np.array_equal(cut, windows[int(y * 25), int(x * 41)])


def test_a_shrunk_square_does_not_alias():
    checks = np.indices((64, 64)).sum(0)[..., None].repeat(3, -1) % 2 * 255
    cut = Shrink(16, 4.0, 4.0).cut(Image.fromarray(checks.astype(np.uint8)), (0, 0, 0, 0)).float()
    assert (cut - 127.5).abs().max() < 3                                    # every fourth pixel alone would be 0 or 255


def test_a_shrunk_square_shows_a_ramp_where_it_lies():
    ramp = np.broadcast_to(np.arange(240, dtype=np.uint8)[None, :, None], (120, 240, 3))
    cut = Shrink(20, 4.0, 4.0).cut(Image.fromarray(np.ascontiguousarray(ramp)), (0.5, 0.5, 0, 0))[0].float()
    left = int(0.5 * (240 - 80 + 1))
    assert (cut - (left + 4 * torch.arange(20) + 1.5)).abs().max() <= 0.5


# ---- tables ----

@pytest.mark.parametrize("crop", ["random", "shrink"])
def test_a_table_cuts_by_index_and_key_and_decodes_once(crop, monkeypatch):
    reads = []
    source = ImageTable(rows(reads=reads), 16, crop=crop, flip=True, shrink=(1.0, 2.5))
    x = source.fetch(range(6), 1).x
    assert torch.equal(x[[4, 2]], source.fetch([4, 2], 1).x)
    others = [source.fetch(range(6), key).x for key in (2, 3)]
    assert not torch.equal(x, others[0]) and reads == list(range(6))
    kept = 4 * (40 * 56 if crop == "shrink" else 16 * 22)                   # bytes of one picture in memory
    for limit, expected in [(0, 18), (2 * kept, 6 + 2 * 4)]:                # nothing fits; two pictures fit
        monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
        reads.clear()
        again = ImageTable(rows(reads=reads), 16, crop=crop, flip=True, shrink=(1.0, 2.5))
        assert all(torch.equal(again.fetch(range(6), key).x, y) for key, y in zip((1, 2, 3), [x, *others], strict=True))
        assert len(reads) == expected


def test_a_tables_square_is_the_laws():
    source = ImageTable(rows(), 16, crop="shrink", shrink=(1.0, 2.5))
    u = uniforms([3, 0], 9, 4).tolist()
    law = Shrink(16, 1.0, 2.5)
    expected = [law.cut(Image.fromarray(noise(seed=i)), d) for i, d in zip([3, 0], u, strict=True)]
    assert torch.equal(source.fetch([3, 0], 9).x, signed(torch.stack(expected)))


def test_a_picture_too_small_is_enlarged_whole():
    source = ImageTable(rows(height=8, width=8), 16, crop="shrink", shrink=(2.0, 4.0))
    whole = Image.fromarray(noise(8, 8, 2)).resize((16, 16), Image.Resampling.BICUBIC)
    assert torch.equal(source.fetch([2], 5).x[0], signed(images.pixels_of(whole)))


@pytest.mark.parametrize("limit", [2**30, 4 * 40 * 56 * 3])
def test_threads_and_memory_change_nothing(limit, monkeypatch):
    monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
    seen = []
    for workers in (0, 4):
        source = ImageTable(rows(20), 16, crop="shrink", flip=True, shrink=(1.0, 2.5))
        with Loader(source, seed=0, batch=8, micros=4, workers=workers) as loader:
            seen.append(torch.cat([b.x for k in range(10) for b in loader.at(k)]))
    assert torch.equal(*seen)


def test_a_bad_picture_is_replaced_where_pictures_are_kept():
    whole = rows(4)
    source = ImageTable(Rows("r", 4, lambda i: b"broken" if i == 1 else whole.read(i), str), 16, crop="shrink",
                        shrink=(1.0, 1.0), bad_share=0.5)
    for key in (1, 2):
        law, u = Shrink(16, 1.0, 1.0), uniforms([1], key, 4).tolist()[0]
        assert torch.equal(source.fetch([1], key).x[0], signed(law.cut(Image.fromarray(noise(seed=2)), u)))
    assert list(source.bad) == ["1"]


# ---- streams, photographs, scenes ----

def test_a_stream_cuts_by_the_same_law(tmp_path):
    data = encoded(noise())
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    source = open_source(Images(data=str(tmp_path), size=16, crop="shrink", shrink=(1.5, 2.5)))
    item = next(source.iterate(None, 0))                                                          # type: ignore[union-attr]
    u = uniforms(range(3), 8, 4).tolist()
    expected = torch.stack([Shrink(16, 1.5, 2.5).cut(decode(data), d) for d in u])
    assert torch.equal(source.decode([item] * 3, range(3), 8).x, signed(expected))                # type: ignore[union-attr]


def test_photographs_keep_their_own_law_until_one_is_given():
    source = Photos(16)
    f, x, y, _ = uniforms([5], 3, 4).tolist()[0]
    picture = source._pictures[5 % len(source._pictures)]
    side = round(16 * (min(picture.size) / 16) ** f)
    left, top = int(x * (picture.width - side + 1)), int(y * (picture.height - side + 1))
    plain = picture.resize((16, 16), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    for same in (source, open_source(Images(data="photos", size=16))):
        assert torch.equal(same.fetch([5], 3).x[0], signed(images.pixels_of(plain)))              # type: ignore[union-attr]
    native = open_source(Images(data="photos", size=16, crop="shrink", shrink=(1.0, 1.0))).fetch([5], 3).x[0]  # type: ignore[union-attr]
    left, top = int(x * (picture.width - 15)), int(y * (picture.height - 15))
    assert torch.equal(native, signed(images.pixels_of(picture.crop((left, top, left + 16, top + 16)))))


def test_scenes_are_cut_as_pictures_of_their_nominal_side():
    source = Scenes("leaves", 16, split="test", shrink=(2.0, 8.0))
    u = uniforms([7], 4, 4).tolist()[0]
    side = 16 * 2 * 4 ** u[3] / 512
    window = Window(u[0] * (1 - side), u[1] * (1 - side), side)
    assert torch.equal(source.fetch([7], 4).x[0], signed(leaves(10**9 + 7, 16, window)))
    assert not torch.equal(source.fetch([7], 4).x, source.fetch([7], 5).x)
    whole = open_source(Images(data="leaves", size=16, crop="shrink", shrink=(64.0, 64.0))).fetch([7], 4).x[0]  # type: ignore[union-attr]
    assert torch.equal(whole, signed(leaves(7, 16)))


# ---- what is refused ----

@pytest.mark.parametrize(("settings", "says"), [
    ({"data": "photos", "shrink": (2.0, 4.0)}, "shrink 2 to 4 has no effect with crop 'centre'; add crop 'shrink'"),
    ({"data": "photos", "crop": "random", "shrink": (2.0, 4.0)}, "no effect with crop 'random'"),
    ({"data": "photos", "crop": "shrink", "shrink": (4.0, 2.0)}, "shrink 4 to 2: give the least first"),
    ({"data": "digits", "crop": "shrink"}, "digits: they are shown whole, 8 pixels wide"),
])
def test_laws_that_cannot_be(settings, says):
    with pytest.raises(Refusal, match=says):
        open_source(Images(**{"size": 16, **settings}))


@pytest.mark.parametrize("shrink", [[0.0, 1.0], [-1.0, 2.0], [1.0], [1.0, float("inf")], 2.0])
def test_laws_that_are_no_numbers_are_refused_by_the_settings(shrink):
    with pytest.raises(Refusal, match="file: shrink"):
        from_mapping(Images, {"data": "photos", "size": 8, "crop": "shrink", "shrink": shrink}, "file")


def test_latents_are_not_cut(tmp_path):
    (tmp_path / "latents-00000.safetensors").write_bytes(b"")
    with pytest.raises(Refusal, match="cropped when they were written"):
        open_source(Images(data=str(tmp_path), size=16, crop="shrink"))


def test_a_recipe_may_have_another_law_by_default():
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Own(Images):
        crop: str = "shrink"                                                                      # type: ignore[assignment]
        shrink: tuple[float, float] = (1.0, 3.0)

    def first(settings):
        return open_source(settings).fetch([5], 3).x

    shrunk = first(Images(data="photos", size=16, crop="shrink", shrink=(1.0, 3.0)))
    centre = first(Images(data="photos", size=16, crop="centre"))
    assert torch.equal(first(Own(data="photos", size=16)), shrunk) and not torch.equal(shrunk, centre)
    assert torch.equal(first(Own(data="photos", size=16, crop="centre")), centre)
    with pytest.raises(Refusal, match="no effect"):
        open_source(Own(data="photos", size=16, crop="centre", shrink=(1.0, 8.0)))
