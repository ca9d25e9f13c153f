"""Tars: each epoch once through, the cursor resumes exactly, ranks and threads change nothing."""

import io
import json
import tarfile
from typing import Any

import pytest
import torch
from PIL import Image

from stillroom.data import Loader, TarStream, open_source, streams, unreadable
from stillroom.settings import Images, Refusal


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def grey(value, kind):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(out, kind, **({"quality": 100} if kind == "JPEG" else {}))
    return out.getvalue()


def write(folder, counts=(7, 1, 5), broken=(), names=True, form=tarfile.PAX_FORMAT):
    """Sample v is a picture of grey v, label v % 3; every second one a JPEG, one in a long folder name."""
    value = 0
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"{shard}.tar", "w", format=form) as tar:
            tar.addfile(tarfile.TarInfo("README"))
            for _ in range(count):
                kind, end = ("PNG", "png") if value % 2 else ("JPEG", "JPG")
                stem = ("long/" * 40 if value == 3 else "d.ir/") + f"s{value:03d}"
                add(tar, f"{stem}.{end}", b"broken" if value in broken else grey(value, kind))
                add(tar, f"{stem}.json", json.dumps({"v": value}).encode())
                add(tar, f"{stem}.cls", str(value % 3).encode())
                value += 1
    if names:
        (folder / "classnames.txt").write_text("a\nb\nc\n")
    return value


def stream(folder, **how):
    source = open_source(Images(data=str(folder), size=4, **how))
    assert isinstance(source, TarStream)
    return source


def values(batches):
    return [int(((v + 1) * 127.5).round()) for b in batches for v in b.x[:, 0, 0, 0]]


def test_every_epoch_visits_each_sample_once_in_a_new_order(tmp_path, monkeypatch):
    for window in (3, 1024):
        monkeypatch.setattr(streams, "WINDOW", window)
        count = write(tmp_path)
        items = stream(tmp_path).iterate(None, seed=1)
        epochs = [[next(items).name[-3:] for _ in range(count)] for _ in range(3)]
        assert [sorted(e) for e in epochs] == [[f"{v:03d}" for v in range(count)]] * 3
        assert len(set(map(tuple, epochs))) == 3


def test_pictures_and_labels_belong_together(tmp_path):
    count = write(tmp_path)
    with Loader(stream(tmp_path), seed=0, batch=count) as loader:
        batch = loader.at(0)[0]
    assert sorted(values([batch])) == list(range(count))
    assert batch.y is not None and batch.y.tolist() == [v % 3 for v in values([batch])]


def test_of_several_pictures_in_a_sample_the_plain_one_is_read(tmp_path):
    def written(*fields):
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for v in range(4):      # in either order
                for field, value in fields[:: 1 if v % 2 else -1]:
                    add(tar, f"s{v}.{field}", grey(value, "PNG"))
        (tmp_path / "classnames.txt").unlink(missing_ok=True)
        with Loader(stream(tmp_path), seed=0, batch=4) as loader:
            return values(loader.at(0))

    assert written(("depth.png", 200), ("png", 100)) == [100] * 4
    with pytest.raises(Refusal, match=r"holds 2 pictures.*without a dot"):
        written(("a.png", 200), ("b.png", 100))


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("window", [4, 1024])
def test_the_cursor_resumes_exactly_from_every_step(tmp_path, monkeypatch, form, window):
    monkeypatch.setattr(streams, "WINDOW", window)
    write(tmp_path, form=form) if form != tarfile.USTAR_FORMAT else write(tmp_path, counts=(3, 5), form=form)
    steps = 9
    how: dict[str, Any] = {"seed": 4, "batch": 4, "micros": 2}
    with Loader(stream(tmp_path), **how, workers=2) as loader:
        whole, cursors = [], []
        for k in range(steps):
            whole.append(values(loader.at(k)))
            cursors.append(json.loads(json.dumps(loader.cursor(k))))
    for k in range(steps - 1):
        for workers in (0, 2):
            with Loader(stream(tmp_path), **how, start=k + 1, cursor=cursors[k], workers=workers) as loader:
                assert [values(loader.at(j)) for j in range(k + 1, steps)] == whole[k + 1:]


def test_two_ranks_and_two_micros_see_what_one_process_would(tmp_path):
    write(tmp_path)
    how: dict[str, Any] = {"seed": 4, "batch": 8}
    with Loader(stream(tmp_path, flip=True, crop="random"), **how, workers=0) as one, \
         Loader(stream(tmp_path), **how, micros=2, rank=0, world=2) as left, \
         Loader(stream(tmp_path), **how, micros=2, rank=1, world=2) as right:
        for k in range(5):
            parts = [b for pair in zip(left.at(k), right.at(k), strict=True) for b in pair]
            assert values(one.at(k)) == values(parts)
            assert one.cursor(k) == left.cursor(k) == right.cursor(k)


def test_what_augments_is_that_of_the_step_for_ranks_micros_and_whoever_resumes(tmp_path):
    draw = torch.Generator().manual_seed(0)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for v in range(20):
            out = io.BytesIO()
            pixels = torch.randint(256, (9, 12, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(out, "PNG")
            add(tar, f"s{v:02d}.png", out.getvalue())

    def made(**how):
        return Loader(stream(tmp_path, flip=True, crop="random"), seed=4, batch=8, workers=0, **how)

    with made() as one, made(micros=2, rank=0, world=2) as left, made(micros=2, rank=1, world=2) as right:
        for k in range(4):
            whole = one.at(k)[0].x
            parts = [b.x for pair in zip(left.at(k), right.at(k), strict=True) for b in pair]
            assert torch.equal(whole, torch.cat(parts))
            with made(start=k, cursor=one.cursor(k - 1) if k else None) as again:
                assert torch.equal(again.at(k)[0].x, whole)


def test_a_stream_is_read_in_order_and_resumed_with_a_cursor(tmp_path):
    write(tmp_path)
    with Loader(stream(tmp_path), seed=0, batch=2) as loader:
        loader.at(0)
        with pytest.raises(ValueError, match="step 1 comes next, not 3"):
            loader.at(3)
        with pytest.raises(ValueError, match="not known"):
            loader.cursor(99)
    with pytest.raises(Refusal, match="cursor of the step before"):
        Loader(stream(tmp_path), seed=0, batch=2, start=3)


def test_an_unreadable_picture_is_replaced_from_its_own_batch(tmp_path):
    count = write(tmp_path, broken=(5,))
    source = stream(tmp_path)
    with Loader(source, seed=0, batch=count) as loader:
        batch = loader.at(0)[0]
    assert len(set(values([batch]))) == count - 1 and 5 not in values([batch])
    assert batch.y is not None and batch.y.tolist() == [v % 3 for v in values([batch])]
    assert list(source.bad) == ["d.ir/s005"]


def test_too_many_bad_pictures_stop_the_run(tmp_path):
    write(tmp_path, counts=(60, 60), broken=tuple(range(0, 120, 10)))
    loader = Loader(stream(tmp_path), seed=0, batch=120, workers=0)
    with pytest.raises(Refusal, match=r"of 100 .* unreadable"):
        loader.at(0)


def test_the_bad_share_of_a_small_stream_is_that_of_its_pictures_in_any_epoch(tmp_path):
    count = write(tmp_path, counts=(20,), broken=(5,))          # 5 %: one of a hundred seen, in five epochs
    with Loader(stream(tmp_path, bad_share=0.05), seed=0, batch=count, workers=0) as loader:
        for step in range(20):
            loader.at(step)
    with Loader(stream(tmp_path), seed=0, batch=count, workers=0) as loader:
        for step in range(4):
            loader.at(step)
        with pytest.raises(Refusal, match=r"1 of 20 images seen so far are unreadable \(5.0%, more than 1.0%\)"):
            loader.at(4)


def test_a_refusal_that_was_thrown_away_comes_again_at_every_later_batch(tmp_path):
    count = write(tmp_path, counts=(200,), broken=(0, 1, 2))
    source = stream(tmp_path, bad_share=0.02)
    tape = source.iterate(None, 0)
    items = sorted((next(tape) for _ in range(count)), key=lambda item: item.name)
    source.decode(items, range(99), 0)
    for i in range(99, count):                                  # 3 of 200 are no more than the share
        with pytest.raises(Refusal, match=r"3 of 100 .*more than 2.0%"):
            source.decode(items, range(i, i + 1), 0)


def test_what_was_replaced_is_counted_in_every_epoch(tmp_path):
    count = write(tmp_path, broken=(5,))
    source = stream(tmp_path)
    assert unreadable(source) == ""
    with Loader(source, seed=0, batch=count, workers=0) as loader:
        for step in range(3):
            loader.at(step)
    assert unreadable(source) == (f"{tmp_path}: 3 of {3 * count} pictures seen could not be read, and others took "
                                  "their place: d.ir/s005 (not an image in a known format)")


def test_labels_need_class_names_and_must_fit_them(tmp_path):
    write(tmp_path, names=False)
    source = stream(tmp_path)
    with Loader(source, seed=0, batch=4) as loader:
        assert source.classes is None and loader.at(0)[0].y is None
    (tmp_path / "classnames.txt").write_text("only\ntwo\n")
    source = stream(tmp_path)
    with Loader(source, seed=0, batch=13) as loader:
        batch = loader.at(0)[0]
    assert batch.y is not None and set(batch.y.tolist()) == {0, 1}
    assert set(source.bad.values()) == {"label 2, but there are 2 classes"}


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_tar_is_named(tmp_path, damage):
    write(tmp_path, counts=(6,))
    file = tmp_path / "0.tar"
    data = bytearray(file.read_bytes())
    last = data.index(b"d.ir/s005")
    scratched = data[:last] + b"\xff" * 60 + data[last + 60:]
    file.write_bytes({"cut": data[:last + 700], "header": scratched, "empty": b""}[damage])
    items = stream(tmp_path).iterate(None, 0)
    with pytest.raises(Refusal, match=r"0\.tar: damaged or truncated"):
        for _ in range(7):
            next(items)


def test_tars_without_samples_and_lost_tars_are_refused(tmp_path):
    write(tmp_path, counts=(2,))
    cursor = next(stream(tmp_path).iterate(None, 0)).cursor
    (tmp_path / "0.tar").rename(tmp_path / "1.tar")
    with pytest.raises(Refusal, match=r"'0\.tar', which is no longer there"):
        next(stream(tmp_path).iterate(cursor, 0))
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        add(tar, "a.json", b"{}")
    source = stream(tmp_path)
    item = next(source.iterate(None, 0))
    with pytest.raises(Refusal, match=r"whole batch is unreadable: a \(the sample has no image\)"):
        source.decode([item], range(1), 0)
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("README"))
    with pytest.raises(Refusal, match="no samples"):
        next(stream(tmp_path).iterate(None, 0))


def test_draws_are_the_same_for_a_slice_as_for_the_whole(tmp_path):
    write(tmp_path)
    source = stream(tmp_path, flip=True, crop="random")
    out = io.BytesIO()
    Image.frombytes("RGB", (16, 4), bytes(range(192))).save(out, "PNG")
    batch = [next(source.iterate(None, 0))._replace(image=out.getvalue()) for _ in range(6)]
    x = source.decode(batch, range(6), 3).x
    assert torch.equal(x[2:5], source.decode(batch, range(2, 5), 3).x)
    assert len({p.numpy().tobytes() for p in x}) > 3
    assert not torch.equal(x, source.decode(batch, range(6), 4).x)
