"""Decoding: every odd file becomes the right pixels or a named reason."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from stillroom.data import ImageTable, Loader, Mixed, Photos, Unreadable, decode, images, square, unreadable
from stillroom.data.tables import Rows, folder
from stillroom.recipes._drawing import set_aside
from stillroom.settings import Refusal


def encoded(image, kind="PNG", **how):
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def pixels(data):
    return np.asarray(decode(data)).tolist()


def png(width, height, depth, colour, rows):
    """A PNG by hand, for what Pillow does not write."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_grey_and_one_bit():
    assert pixels(encoded(Image.fromarray(np.array([[0, 7], [200, 255]], np.uint8)))) == [
        [[0] * 3, [7] * 3], [[200] * 3, [255] * 3]]
    assert pixels(encoded(Image.fromarray(np.array([[True, False]])))) == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    levels = np.array([[0, 1, 100, 128, 254, 255]])
    image = Image.fromarray((levels * 257).astype(np.uint16))
    assert pixels(encoded(image, kind)) == [[[v] * 3 for v in levels[0].tolist()]]
    between = Image.fromarray(np.array([[128, 129, 385, 386, 65280, 65406, 65407]], np.uint16))     # rounded, not cut
    assert [v[0] for v in pixels(encoded(between, kind))[0]] == [0, 1, 1, 2, 254, 254, 255]


def test_sixteen_bit_pgm_and_rgb():
    assert pixels(b"P5 3 1 65535\n" + struct.pack(">3H", 0, 257 * 90, 65535)) == [[[0] * 3, [90] * 3, [255] * 3]]
    row = b"\0" + struct.pack(">6H", 257 * 1, 257 * 2, 257 * 3, 65535, 0, 257 * 200)
    assert pixels(png(2, 1, 16, 2, row)) == [[[1, 2, 3], [255, 0, 200]]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_an_agreed_white_are_unreadable(mode):
    kind = {"I": np.int32, "F": np.float32}[mode]
    with pytest.raises(Unreadable, match="no agreed white"):
        decode(encoded(Image.fromarray(np.array([[0, 70000]], kind)), "TIFF"))


def test_transparency_lies_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    assert pixels(encoded(Image.fromarray(rgba))) == [[[10, 20, 30], [255] * 3, [127] * 3]]
    la = np.array([[[40, 255], [40, 0]]], np.uint8)
    assert pixels(encoded(Image.fromarray(la))) == [[[40] * 3, [255] * 3]]


def test_palettes_with_and_without_transparency():
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.info.clear()
    assert pixels(encoded(image)) == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert pixels(encoded(image, transparency=b"\x00\xff\xff")) == [[[255] * 3, [0, 255, 0], [0, 0, 255]]]
    assert pixels(encoded(image, "GIF", transparency=1)) == [[[255, 0, 0], [255] * 3, [0, 0, 255]]]


def test_cmyk():
    ink = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
    image = Image.fromarray(ink, "CMYK")
    assert pixels(encoded(image, "TIFF")) == [[[255] * 3, [0, 255, 255], [255, 0, 0], [0] * 3]]
    flat = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert np.abs(np.asarray(decode(encoded(flat, "JPEG", quality=100))) - np.array([0.0, 255, 255])).max() <= 3


@pytest.mark.parametrize(("tag", "turned"), [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)),
    (8, lambda a: np.rot90(a, 1)),
])
def test_exif_orientation_is_applied(tag, turned):
    array = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = tag
    assert pixels(encoded(Image.fromarray(array), exif=exif)) == turned(array).tolist()


def noise(width=40, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_files_say_why(tmp_path):
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = encoded(noise(), kind)
        for cut in (1, 10, len(whole) // 2):
            with pytest.raises(Unreadable):
                decode(whole[:cut])
    with pytest.raises(Unreadable, match="empty"):
        decode(b"")
    with pytest.raises(Unreadable, match="not an image"):
        decode(b"<html>404</html>")
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(Unreadable, match=r"a\.png: empty"):
        decode(tmp_path / "a.png")
    with pytest.raises(Unreadable, match=r"gone\.png: .*No such file"):
        decode(tmp_path / "gone.png")


def test_postscript_is_never_opened():
    with pytest.raises(Unreadable, match="not an image"):
        decode(encoded(noise(), "EPS"))


def test_bombs_are_refused_by_their_header(monkeypatch):
    with pytest.raises(Unreadable, match=r"bomb|limit"):
        decode(png(100_000, 100_000, 8, 2, b""))
    monkeypatch.setattr(images, "PIXEL_LIMIT", 99)
    with pytest.raises(Unreadable, match="10 x 10 pixels, over the limit"):
        decode(png(10, 10, 8, 2, b""))            # no pixels at all: the header was enough


def test_a_thin_picture_does_not_become_a_huge_one(monkeypatch):
    monkeypatch.setattr(images, "PIXEL_LIMIT", 10_000)
    with pytest.raises(Unreadable, match="thin"):
        square(Image.new("RGB", (100, 1)), 16)


def test_square_leaves_a_picture_of_the_right_size_alone():
    image = noise(16, 16)
    assert torch.equal(square(image, 16), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_square_halves_by_averaging():
    small = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    big = small.repeat(4, 0).repeat(4, 1)
    assert torch.equal(square(Image.fromarray(big), 4), torch.from_numpy(small).permute(2, 0, 1))


def test_crops_are_where_they_should_be():
    array = np.zeros((4, 9, 3), np.uint8)
    array[:] = np.arange(9)[None, :, None]
    wide = Image.fromarray(array)
    assert square(wide, 4)[0, 0].tolist() == [2, 3, 4, 5]
    assert square(wide, 4, flip=True, u=(0, 0, 0.4))[0, 0].tolist() == [5, 4, 3, 2]
    assert square(wide, 4, flip=True, u=(0, 0, 0.6))[0, 0].tolist() == [2, 3, 4, 5]
    lefts = [int(square(wide, 4, "random", u=(u, 0.9, 1))[0, 0, 0]) for u in (0, 0.17, 0.5, 0.84, 0.9999)]
    assert lefts == [0, 1, 3, 5, 5]


def table(tmp_path, good, bad=(), **how):
    """Pictures 0, 1, 2...: each of one grey, its number; those in `bad` are broken."""
    tmp_path.mkdir(exist_ok=True)
    for i in range(good + len(bad)):
        data = b"broken" if i in bad else encoded(Image.new("RGB", (8, 8), (i, i, i)))
        (tmp_path / f"{i:04d}.png").write_bytes(data)
    return ImageTable(folder(tmp_path), size=8, **how)


def shown(batch):
    return ((batch.x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_images_are_scaled_to_minus_one_and_one(tmp_path):
    source = table(tmp_path, 3)
    x = source.fetch([2, 0], 0).x
    assert x.dtype == torch.float32 and torch.equal(x[1], torch.full((3, 8, 8), -1.0))
    assert torch.allclose(x[0], torch.tensor(2 / 127.5 - 1))


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_a_bad_image_is_replaced_by_the_next_readable_one(tmp_path, crop):
    source = table(tmp_path, 9, bad=(3, 4, 11), bad_share=0.5, crop=crop)
    for _ in range(2):
        assert shown(source.fetch([3, 2, 4, 11, 5], 0)) == [5, 2, 5, 0, 5]
    assert sorted(name[-8:] for name in source.bad) == ["0003.png", "0004.png", "0011.png"]
    assert set(source.bad.values()) == {"not an image in a known format"}


def test_what_replaces_a_bad_image_does_not_depend_on_the_order_of_reading(tmp_path):
    source = table(tmp_path, 9, bad=(3, 4), bad_share=0.5)
    assert [shown(source.fetch([i], 0))[0] for i in (4, 5, 3)] == [5, 5, 5]


def test_too_many_bad_images_stop_the_run_by_name(tmp_path):
    source = table(tmp_path, 118, bad=(10, 20), bad_share=0.01)
    source.fetch(range(99), 0)                                  # 2 of 99: too few seen to judge
    with pytest.raises(Refusal, match=r"2 of 100 .* unreadable \(2.0%, more than 1.0%\): .*0010.png \(not an image.*"
                                      r"; put others in their places, or allow more: --bad-share 0.05$"):
        source.fetch([99], 0)


def test_a_small_set_is_judged_when_all_of_it_was_seen(tmp_path):
    source = table(tmp_path, 4, bad=(1,), bad_share=0.1)
    assert source.bad == {}
    with pytest.raises(Refusal, match="1 of 5"):
        source.fetch(range(5), 0)


def test_the_share_itself_is_allowed(tmp_path):
    source = table(tmp_path, 99, bad=(50,), bad_share=0.01)
    source.fetch(range(100), 0)
    assert len(source.bad) == 1


def test_a_refusal_that_was_thrown_away_comes_again_at_every_later_fetch(tmp_path):
    source = table(tmp_path, 5, bad=(1,))
    source.fetch([4], 0)
    for _ in range(2):                                          # the first as a thread's that reads ahead
        with pytest.raises(Refusal, match=r"1 of 6 .* unreadable \(16.7%, more than 1.0%\): .*0001.png"):
            source.fetch(range(6), 0)
    with pytest.raises(Refusal, match="1 of 6"), Loader(source, seed=0, batch=1) as loader:
        loader.at(0)


def test_what_was_replaced_is_told_in_a_line(tmp_path):
    source = table(tmp_path, 9, bad=(3, 4, 7, 11), bad_share=0.5)
    assert unreadable(source) == ""
    for _ in range(2):                                          # what is seen again is not counted again
        source.fetch([3, 5], 0)
        assert unreadable(source) == (
            f"{tmp_path}: 2 of 3 pictures seen could not be read, and others took their place: "
            f"{tmp_path}/0003.png (not an image in a known format), "
            f"{tmp_path}/0004.png (not an image in a known format)")
    source.fetch(range(13), 0)
    assert re.search(r"4 of 13 pictures seen .* and 1 more$", unreadable(source))


def test_what_was_replaced_is_told_of_all_that_a_source_is_made_of(tmp_path):
    a, b = (table(tmp_path / name, 9, bad=(k,), bad_share=0.5) for name, k in (("a", 3), ("b", 0)))
    source = set_aside(Mixed([a, Photos(8, count=5), b]))
    for part in (source, source.held):
        part.fetch(range(len(part)), 0)
    assert re.fullmatch(rf"{a.name}: 1 of 10 pictures .*/0003.png \([^;]+\); {b.name}: 1 of 10 .*/0000.png \([^;]+\)",
                        unreadable(source))
    assert unreadable(Mixed([a, a])) == unreadable(a)
    assert unreadable(Photos(8, count=5)) == ""


def test_nothing_readable_is_a_refusal(tmp_path):
    with pytest.raises(Refusal, match=r"none of the 2 images|2 of 2"):
        table(tmp_path, 0, bad=(0, 1), bad_share=1.0).fetch([0], 0)


def test_flips_and_crops_are_functions_of_index_and_key():
    data = encoded(noise(24, 12))
    rows = Rows("r", 50, lambda i: data, lambda i: f"{i}")
    for crop in ("centre", "random"):
        a, b = (ImageTable(rows, 12, crop=crop, flip=True) for _ in range(2))
        x = a.fetch(range(50), 1).x
        assert torch.equal(x[[7, 3]], b.fetch([7, 3], 1).x)
        assert torch.equal(x, a.fetch(range(50), 1).x)
        assert not torch.equal(x, a.fetch(range(50), 2).x)
    plain = ImageTable(rows, 12).fetch([0], 0).x[0]
    x = ImageTable(rows, 12, flip=True).fetch(range(50), 1).x
    turned = [torch.equal(i, plain.flip(-1)) for i in x]
    assert 10 < sum(turned) < 40 and all(t or torch.equal(i, plain) for t, i in zip(turned, x, strict=True))


def test_kept_squares_are_decoded_once(monkeypatch):
    data, reads = encoded(noise(8, 8)), []
    rows = Rows("r", 6, lambda i: reads.append(i) or data, lambda i: f"{i}")
    source = ImageTable(rows, 8)
    first = source.fetch([1, 1, 5], 0).x
    assert torch.equal(first, source.fetch([1, 1, 5], 0).x) and reads == [1, 5]
    monkeypatch.setattr(images, "MEMORY_LIMIT", 100)
    source = ImageTable(rows, 8)
    source.fetch([2], 0)
    source.fetch([2], 0)
    assert reads == [1, 5, 2, 2]


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_threads_and_bad_images_change_nothing(tmp_path, crop):
    seen = []
    for workers in (0, 4):
        source = table(tmp_path, 30, bad=(3, 4, 17, 32), bad_share=0.5, crop=crop, flip=True)
        with Loader(source, seed=0, batch=8, micros=4, workers=workers) as loader:
            seen.append(torch.cat([b.x for k in range(12) for b in loader.at(k)]))
    assert torch.equal(*seen)
