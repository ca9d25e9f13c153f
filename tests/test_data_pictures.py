"""Whole pictures: every pixel at its own size, by name; what cannot be read is passed over and named."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stillroom.data import images, leaves, shapes
from stillroom.data.builtin import CREDITS
from stillroom.data.images import signed
from stillroom.data.pictures import pictures
from stillroom.settings import Refusal


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def plain(array):
    return signed(torch.from_numpy(array).permute(2, 0, 1))


def test_a_folder_at_native_size(tmp_path):
    arrays = {name: save(tmp_path / name, noise(h, w)) for name, h, w in [("a.png", 5, 7), ("b/c.png", 8, 3)]}
    found = dict(pictures(tmp_path))
    assert list(found) == ["a.png", "b/c.png"]
    assert all(torch.equal(found[name], plain(array)) for name, array in arrays.items())
    assert torch.equal(dict(pictures(str(tmp_path / "a.png")))[str(tmp_path / "a.png")], found["a.png"])
    both = dict(pictures([tmp_path / "b/c.png", tmp_path / "a.png"]))
    assert list(both) == [str(tmp_path / "b/c.png"), str(tmp_path / "a.png")]


def test_odd_pictures_survive(tmp_path):
    save(tmp_path / "dot.png", noise(1, 1))
    wide = save(tmp_path / "wide.png", noise(2, 20_000))
    save(tmp_path / "grey.png", np.array([[0, 255]], np.uint8))
    save(tmp_path / "clear.png", np.array([[[9, 9, 9, 0]]], np.uint8))
    found = dict(pictures(tmp_path))
    assert found["dot.png"].shape == (3, 1, 1) and torch.equal(found["wide.png"], plain(wide))
    assert found["grey.png"].tolist() == [[[-1.0, 1.0]]] * 3
    assert found["clear.png"].tolist() == [[[1.0]]] * 3                     # transparent lies on white


def test_unreadable_pictures_are_named_and_passed_over(tmp_path):
    for name in "adf":
        save(tmp_path / f"{name}.png", noise(2, 2))
    for name in "be":
        (tmp_path / f"{name}.png").write_bytes(b"broken")
    source = pictures(tmp_path)
    for _ in range(2):
        assert [name for name, _ in source] == ["a.png", "d.png", "f.png"]
        assert source.bad == {f"{n}.png": "not an image in a known format" for n in "be"}
    limited = pictures(tmp_path, limit=2)
    assert [name for name, _ in limited] == ["a.png", "d.png"] and list(limited.bad) == ["b.png"]
    with pytest.raises(Refusal, match="2 of 5 images seen so far are unreadable"):
        list(pictures(tmp_path, bad_share=0.1))
    with pytest.raises(Refusal, match=r"none of the 2 images is readable: .*b\.png \(not an image"):
        list(pictures([tmp_path / "b.png", tmp_path / "e.png"]))


def test_a_bomb_is_one_unreadable_picture(tmp_path, monkeypatch):
    save(tmp_path / "a.png", noise(2, 2))
    save(tmp_path / "b.png", noise(20, 20))
    monkeypatch.setattr(images, "PIXEL_LIMIT", 100)
    source = pictures(tmp_path)
    assert [name for name, _ in source] == ["a.png"] and "20 x 20 pixels" in source.bad["b.png"]


def test_the_builtin_photographs_come_whole_and_with_credits():
    source = pictures("photos:test")
    found = dict(source)
    assert list(found) == [c.name for c in CREDITS if c.split == "test"]
    assert found["rocket"].shape == found["flower"].shape == (3, 427, 640)
    assert source.credits == tuple(str(c) for c in CREDITS if c.split == "test")
    assert len(list(pictures("photos", limit=3))) == 3
    assert set(pictures(["photos", "photos:test"]).credits) == set(map(str, CREDITS))


def test_scenes_at_a_stated_size():
    found = list(pictures("leaves:test", limit=3, size=40))
    assert [name for name, _ in found] == ["leaves:test 0", "leaves:test 1", "leaves:test 2"]
    assert torch.equal(found[2][1], signed(leaves(10**9 + 2, 40)))
    assert torch.equal(next(iter(pictures("shapes", size=24)))[1], signed(shapes(0, 24)))
    assert len(list(pictures("shapes", size=8))) == 100 and len(list(pictures("shapes", limit=130, size=8))) == 130


def test_parquet(tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays, cells = [noise(4, 6, i) for i in range(3)], []
    for array in arrays:
        out = io.BytesIO()
        Image.fromarray(array).save(out, "PNG")
        cells.append(out.getvalue())
    pq.write_table(pa.table({"image": [cells[0], b"broken", cells[2]]}), tmp_path / "d.parquet")
    source = pictures(tmp_path / "d.parquet")
    found = list(source)
    assert [name.rpartition(" ")[2] for name, _ in found] == ["0", "2"] and len(source.bad) == 1
    assert torch.equal(found[1][1], plain(arrays[2]))
    assert [x.shape for _, x in pictures(tmp_path)] == [(3, 4, 6)] * 2


@pytest.mark.parametrize(("data", "how", "says"), [
    ("leaves", {}, "say how many pixels"), ("leaves:val", {"size": 8}, "train and test, not 'val'"),
    ("photos", {"size": 8}, "read at their own size"), ("digits", {}, "holds no whole pictures"),
    ("photos", {"limit": 0}, "limit of 0"), ([], {}, "no file or folder"), ("photo", {}, "did you mean 'photos'"),
])
def test_what_cannot_be_shown_is_refused(data, how, says):
    with pytest.raises(Refusal, match=says):
        pictures(data, **how)


@pytest.mark.parametrize("name", ["a.tar", "latents-00000.safetensors"])
def test_tars_and_latents_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(Refusal, match="folders, parquet and single files only"):
        pictures(tmp_path)


@pytest.mark.skipif("STILLROOM_DATA" not in os.environ, reason="STILLROOM_DATA is not set")
def test_berkeley_photographs_come_at_their_own_size():
    folder = Path(os.environ["STILLROOM_DATA"]) / "bsds500" / "val"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    found = list(pictures(folder, limit=10))
    assert len(found) == 10 and {tuple(sorted(x.shape)) for _, x in found} == {(3, 321, 481)}
