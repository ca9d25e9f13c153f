"""Folders, parquet files and saved data sets as tables of pictures and labels."""

import errno
import io
import json
import os
import socket
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from stillroom.cli.train import anchored_place
from stillroom.data import ImageTable, Some, Tensors, named, open_source, tables
from stillroom.settings import Images, Place, Refusal


def grey(value, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (value,) * 3).save(out, kind)
    return out.getvalue()


def shown(source):
    batch = source.fetch(range(len(source)), 0)
    return ((batch.x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist(), None if batch.y is None else batch.y.tolist()


def opened(spec, **how):
    source = open_source(Images(data=str(spec), size=how.pop("size", 4), **how))
    assert isinstance(source, ImageTable)
    return source


def picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(grey(value))


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    names = {"dog/deep/b.png": 3, "dog/a.PNG": 2, "cat/z.png": 1, "cat/.hidden.png": 9, "x.txt": 0}
    for name, value in names.items():
        picture(tmp_path / name, value)
    source = opened(tmp_path)
    assert shown(source) == ([1, 2, 3], [0, 1, 1]) and source.classes == ("cat", "dog")


@pytest.mark.parametrize("names", [("a.png", "dog/b.png", "cat/c.png"), ("one/a.png", "one/b.png", "one/c.png")])
def test_other_layouts_have_no_labels(tmp_path, names):
    for value, name in enumerate(sorted(names)):
        picture(tmp_path / name, value)
    assert shown(opened(tmp_path)) == ([0, 1, 2], None)


def test_data_that_came_to_the_place_of_others_are_told_apart(tmp_path):
    """The same names, number and sizes."""
    home, table = tmp_path / "set", tmp_path / "d.parquet"

    def stamps():
        pq.write_table(pa.table({"image": structs([p.read_bytes() for p in sorted(home.glob("*/*"))])}), table)
        return named(opened(home)), named(opened(table))

    picture(home / "cat/a.png", 5)
    picture(home / "dog/b.png", 6)
    before = stamps()
    assert before == stamps()
    picture(home / "dog/b.png", 7)
    after = stamps()
    assert before[0] != after[0] and before[1] != after[1]
    (home / "dog/b.png").rename(home / "cat/b.png")
    assert named(opened(home)) != after[0]           # in another class
    assert named(open_source(Images(data=f"{home}+{table}", size=4))).count(" 2 items") == 2
    plain = tmp_path / "plain"
    plain.mkdir()
    told = set()
    for value in (1, 2):                             # uncompressed, and equal at their ends
        Image.fromarray(np.pad(np.full((4, 4), value, np.uint8), ((0, 20), (0, 0)))).save(plain / "a.pgm")
        told.add(named(opened(plain)))
    assert len(told) == 2


def test_tensors_and_some_of_a_source_are_told_apart_by_what_they_hold():
    x, y = torch.randn(6, 2), torch.arange(6) % 2
    sets = [Tensors(x, y), Tensors(x + 1, y), Tensors(x, 1 - y), Tensors(x)]
    sets += [Some(sets[0], torch.tensor(rows)) for rows in ([0, 1, 2], [0, 1, 3])]
    assert len({named(source) for source in sets}) == len(sets)
    assert named(Tensors(x.clone(), y.clone())) == named(sets[0])


def test_linked_class_folders_are_followed_and_circles_end(tmp_path):
    picture(tmp_path / "elsewhere" / "a.png", 5)
    picture(tmp_path / "set" / "cat" / "b.png", 6)
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "back").symlink_to(tmp_path / "set")
    assert shown(opened(tmp_path / "set")) == ([6, 5], [0, 1])


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path, monkeypatch):
    picture(tmp_path / "set" / "cat" / "a.png", 5)
    picture(tmp_path / "set" / "dog" / "b.png", 6)
    scandir = os.scandir

    def scan(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(Refusal, match="set/dog: the folder cannot be listed: Permission denied"):
        opened(tmp_path / "set")


def structs(values, paths=None):
    cells = [{"bytes": v, "path": p} for v, p in zip(values, paths or [None] * len(values), strict=True)]
    return pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def with_features(table, **features):
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_parquet_as_datasets_writes_it(tmp_path):
    table = pa.table({"picture": structs([grey(7), grey(8), grey(9)]), "extra": [b"x", b"y", b"z"], "kind": [1, 0, 1]})
    features = {"picture": {"_type": "Image"}, "extra": {"_type": "Value", "dtype": "binary"},
                "kind": {"names": ["low", "high"], "_type": "ClassLabel"}, "odd": [{"dtype": "int64"}]}
    pq.write_table(with_features(table, **features), tmp_path / "d.parquet")
    source = opened(tmp_path / "d.parquet")
    assert shown(source) == ([7, 8, 9], [1, 0, 1]) and source.classes == ("low", "high")


@pytest.mark.parametrize("column", ["bytes", "struct"])
@pytest.mark.parametrize("label", ["label", "fine_label", "y"])
def test_parquet_without_metadata(tmp_path, column, label):
    images = [grey(1), grey(2)]
    cells = structs(images) if column == "struct" else pa.array(images)
    pq.write_table(pa.table({"img": cells, "other": [5, 6], label: [2, 0]}), tmp_path / "d.parquet")
    source = opened(tmp_path / "d.parquet")
    assert shown(source) == ([1, 2], [2, 0]) and source.classes == ("0", "1", "2")


def test_a_folder_of_parquet_files_is_read_in_order_and_by_split(tmp_path):
    for i, name in enumerate(["train-00001-of-2", "train-00000-of-2", "test-0", "trainer"]):
        pq.write_table(pa.table({"image": structs([grey(2 * i), grey(2 * i + 1)])}), tmp_path / f"{name}.parquet")
    assert shown(opened(tmp_path)) == ([2, 3, 0, 1], None)
    assert shown(opened(f"{tmp_path}:test")) == ([4, 5], None)
    with pytest.raises(Refusal, match=r"no split 'val'; .* test, train"):
        opened(f"{tmp_path}:val")


def test_pictures_named_by_path_and_missing_cells(tmp_path):
    picture(tmp_path / "here.png", 4)
    cells = structs([None, None, grey(6), None], ["here.png", "gone.png", None, None])
    pq.write_table(pa.table({"image": cells}), tmp_path / "d.parquet")
    source = opened(tmp_path / "d.parquet", bad_share=0.5)
    assert shown(source) == ([4, 6, 6, 4], None)
    assert [name.rpartition(" ")[2] for name in source.bad] == ["1", "3"]
    assert "No such file" in source.bad[f"{tmp_path / 'd.parquet'} row 1"]


@pytest.mark.parametrize(("table", "says"), [
    ({"a": [b"x"], "b": [b"y"]}, "several columns may be the image; columns: a, b"),
    ({"a": [1.0]}, "no column holds images"),
    ({"image": [b"x", b"y"], "label": [0, None]}, "row 1 has no label"),
    ({"image": [b"x", b"y"], "label": [0, -2]}, "out of range"),
])
def test_parquet_that_says_too_little_is_refused(tmp_path, table, says):
    pq.write_table(pa.table(table), tmp_path / "d.parquet")
    with pytest.raises(Refusal, match=says):
        opened(tmp_path / "d.parquet")


def test_secret_labels_count_as_none(tmp_path):
    pq.write_table(pa.table({"image": [grey(1)] * 2, "label": [-1, -1]}), tmp_path / "d.parquet")
    assert opened(tmp_path / "d.parquet").classes is None


def test_damaged_and_unlike_parquet_is_refused(tmp_path):
    pq.write_table(pa.table({"image": [grey(1)] * 50}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(Refusal, match=r"b\.parquet: cannot be read as parquet"):
        opened(tmp_path / "b.parquet")
    pq.write_table(pa.table({"img": [grey(1)]}), tmp_path / "b.parquet")
    with pytest.raises(Refusal, match="columns differ"):
        opened(tmp_path)


def test_large_parquet_goes_through_datasets_without_asking_the_hub(tmp_path, monkeypatch):
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    table = pa.table({"image": structs([grey(3), b"broken", grey(5)]), "label": [1, 0, 1]})
    file = tmp_path / "d.parquet"
    pq.write_table(with_features(table, **features), file)
    small = ImageTable(tables.parquet([file], "d"), 4, bad_share=1.0)
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda *a: asked.append(a))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or [])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tables, "PARQUET_LIMIT", 0)
    large = ImageTable(tables.parquet([file], "d"), 4, bad_share=1.0)
    assert shown(large) == shown(small) == ([3, 5, 5], [1, 1, 1])
    assert large.bad == small.bad and large.classes == ("a", "b") and not asked


def test_what_datasets_saved(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [{"bytes": grey(v), "path": None} for v in (1, 2, 3)]
    data = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    data.select([2, 0]).save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(str(tmp_path / "many"))
    assert shown(opened(tmp_path / "one")) == ([3, 1], [1, 0])
    assert shown(opened(tmp_path / "many")) == ([1, 2, 3], [0, 1, 1])
    assert shown(opened(f"{tmp_path / 'many'}:test")) == ([2], [1])
    with pytest.raises(Refusal, match="no split 'val'"):
        opened(f"{tmp_path / 'many'}:val")


@pytest.mark.skipif("STILLROOM_DATA" not in os.environ, reason="STILLROOM_DATA is not set")
def test_cifar_parquet_matches_a_plain_decode():
    file = Path(os.environ["STILLROOM_DATA"]) / "cifar10-jpeg" / "test.parquet"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    source = opened(f"{file.parent}:test", size=32)
    assert len(source) == 10_000 and source.classes is not None and source.classes[3] == "cat"
    table = pq.read_table(file)
    x, y = source.fetch([0, 9_999, 1234], 0)
    for row, (i, pixels) in enumerate(zip([0, 9_999, 1234], x, strict=True)):
        image = Image.open(io.BytesIO(table["image"][i].as_py()["bytes"])).convert("RGB")
        assert torch.equal(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(image)))
        assert y is not None and int(y[row]) == table["label"][i].as_py()


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """Nothing is asked of the network, and `datasets` keeps its copies here."""
    def refuse(*where):
        raise AssertionError(f"the network was tried: {where}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_folder_that_datasets_reads(tmp_path, no_hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, first in ("train", 5), ("test", 8):
        for i in range(2):
            picture(tmp_path / f"set/{split}/{i}.png", first + i)
        rows = [json.dumps({"file_name": f"{i}.png", "label": 1 - i}) for i in range(2)]
        (tmp_path / f"set/{split}/metadata.jsonl").write_text("\n".join(rows))
    assert shown(opened("datasets:set")) == ([5, 6], [1, 0])
    assert shown(opened("datasets:set:test")) == ([8, 9], [1, 0])


def test_a_folder_of_arrow_files_that_datasets_reads(tmp_path, no_hub):
    cells = [{"bytes": grey(v), "path": None} for v in (7, 8, 9)]
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.ClassLabel(names=["low", "high"])})
    made = datasets.Dataset.from_dict({"image": cells, "kind": [0, 1, 1]}, features=features)
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "set").mkdir()
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.rename(tmp_path / "set/test.arrow")
    source = opened(f"datasets:{tmp_path}/set:test")
    assert shown(source) == ([7, 8, 9], [0, 1, 1]) and source.classes == ("low", "high")
    both = open_source(Images(data=f"datasets:{tmp_path}/set:test+datasets:{tmp_path}/set:test", size=4))
    assert len(both) == 6                                                                       # type: ignore[arg-type]


@pytest.mark.parametrize(("spec", "says"), [
    ("datasets:", "no such folder"),
    ("datasets:./nowhere", "no such folder; give one, or a name on the hub"),
    ("datasets:FOLDER:nosuch", r"cannot load its split 'nosuch': .*train"),
    ("datasets:FOLDER", "no column holds images"),
])
def test_what_datasets_cannot_load_is_refused(tmp_path, no_hub, spec, says):
    (tmp_path / "rows.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(Refusal, match=says):
        opened(spec.replace("FOLDER", str(tmp_path)))


def test_a_place_for_datasets_is_found_again_from_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    here = f"datasets:{tmp_path}/set"
    for said, anchored in {
        "datasets:set": here, "datasets:set:test": f"{here}:test", "photos+datasets:set": f"photos+{here}",
        "datasets:owner/name:test": "datasets:owner/name:test",
    }.items():
        assert anchored_place(said, Place()) == anchored
