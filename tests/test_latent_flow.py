"""`train flow --codec`: a flow of a codec's latents in one command, the same as by way of a store."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stillroom.cli.main import main
from stillroom.data import Batch, Encoding, LatentSpace, write_latents
from stillroom.recipes import find
from stillroom.settings import Refusal, from_mapping
from stillroom.train.run import sources_of

NET = ["--net", "dit", "--width", "16", "--depth", "1", "--patch", "1", "--steps", "6", "--batch", "16", "--size", "8",
       "--precision", "float32"]


def stillroom(*words):
    return main(" ".join(map(str, words)).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("latent-flow")
    assert stillroom("train", "flow", *NET, "--codec", "bundled", "--data", "digits", "--out", home / "one") == 0
    assert stillroom("cache", "--codec", "bundled", "--data", "digits", "--size", 8, "--out", home / "store") == 0
    assert stillroom("train", "flow", *NET, "--data", home / "store", "--out", home / "two") == 0
    return home


def product(run):
    card = json.loads((run / "product/product.json").read_text())["card"]
    weights = {}
    for file in (run / "product").glob("*.safetensors"):
        weights |= load_file(file)
    return card, weights


def test_one_command_is_two(runs):
    (card, mine), (other, theirs) = product(runs / "one"), product(runs / "two")
    assert card["encoding"] == other["encoding"] and card["shape"] == [4, 2, 2]
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_resumed_run_encodes_nothing_again(runs, capsys):
    before = {f: f.stat().st_mtime_ns for f in (runs / "one/latents").iterdir()}
    assert stillroom("resume", runs / "one") == 0
    assert {f: f.stat().st_mtime_ns for f in (runs / "one/latents").iterdir()} == before
    assert "encoding" not in capsys.readouterr().out


@pytest.mark.parametrize(("more", "said"), [
    (["--data", "STORE"], "holds latents already; leave out --codec"),
    (["--data", "shapes", "--flip"], "leave out --crop and --flip"),
    (["--data", "digits", "--size", 6], "is no multiple of 4"),
])
def test_what_cannot_be_encoded_is_refused(runs, capsys, more, said):
    more = [runs / "store" if word == "STORE" else word for word in more]
    assert stillroom("train", "flow", *NET, "--codec", "bundled", *more, "--out", runs / "no") == 2
    assert said in capsys.readouterr().err and not (runs / "no").exists()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """latents/, of two kinds of pictures of 16 pixels a side."""
    monkeypatch.chdir(tmp_path)
    y = torch.arange(128) % 2
    z = (2.0 * y - 1)[:, None, None, None] + 0.1 * torch.randn(128, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    made = Encoding(LatentSpace(2, 8, (0.0, 0.0), (1.0, 1.0)), "codec", "centre 16")
    write_latents(tmp_path / "latents", [Batch(z, y)], made, ["a", "b"])


FEW = "--batch 16 --precision float32 --quiet"


def test_a_store_has_a_size_of_its_own(store, capsys):
    flow = "train flow --data latents/ --out runs/teacher"
    dit = "--net dit --width 16 --depth 1 --patch 1 --steps 60 --model.lr 1e-2 --model.warmup 5 --average 0.9"
    for size in (99, 15):
        assert stillroom(flow, dit, FEW, "--size", size) == 2
        said = f"latents: holds latents of pictures of 16 pixels a side, 2 a side themselves, and the size is {size}"
        assert said in capsys.readouterr().err
    assert stillroom(flow, dit, FEW, "--plan", "--size", 16) == 0
    assert stillroom(flow, dit, FEW) == 0
    assert "size" not in tomllib.loads(Path("runs/teacher/settings.toml").read_text())
    drift = "distill drifting --teacher runs/teacher --data latents/ --out runs/onestep"
    assert stillroom(drift, "--steps", 2, "--groups", 2, FEW) == 0
    assert stillroom("resume runs/onestep") == 0


def test_a_run_of_a_codec_says_at_which_size_pictures_are_cached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--size 16 --crop centre --factor 4 --channels 2 --params 4000 --decoder-params 4000 --steps 1"
    assert stillroom("train codec --data digits --out codec", small, FEW) == 0
    for given, size in ("", 16), ("--size 8", 8):
        assert stillroom("cache --codec codec --data digits --out", f"latents-{size}", given) == 0
        assert json.loads(Path(f"latents-{size}/latents.json").read_text())["crop"] == f"centre {size}"


def test_what_stands_on_a_run_of_a_codec_takes_pictures_of_its_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "--size 16 --crop centre --factor 4 --channels 2 --params 4000 --decoder-params 4000 --steps 1"
    assert stillroom("train codec --preset kl --data leaves --out codec --perceptual 0 --quiet", small) == 0
    net = "--net dit --patch 1 --width 8 --depth 1 --steps 1 --batch 8 --precision float32 --quiet"
    assert stillroom("train flow --codec codec --data leaves --out flow", net) == 0
    assert stillroom("resume flow --quiet") == 0
    assert tomllib.loads(Path("flow/settings.toml").read_text())["size"] == 16
    dmvae, asked = find("dmvae"), {"data": "leaves", "codec": "codec", "reference": "gaussian", "out": "dmvae"}
    assert dmvae.settled(from_mapping(dmvae.Settings, asked, "given")).size == 16
    assert dmvae.settled(from_mapping(dmvae.Settings, {**asked, "size": 8}, "given")).size == 8
    few = "--data leaves --n 40 --pictures 80 --steps 4 --width 8 --depth 1 --sampler-steps 1 --quiet"
    assert stillroom("compare a=codec b=codec", few) == 0
    assert json.loads(Path("compare/compare.json").read_text())["about"]["size"] == 16
    assert stillroom("inspect codec --data leaves --n 40") == 0
    assert stillroom("inspect bundled --data leaves --n 40") == 2
    assert "bundled: a codec needs pictures to encode: --size PIXELS" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--data leaves", "--data photos", "--data pictures", "--data 0.5*leaves+digits",
                                   "--data leaves --codec bundled", "--data leaves --plan"])
def test_pictures_are_asked_for_their_size(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()     # told before it is read
    assert stillroom("train flow", words, "--out", "run") == 2
    assert "say how large its pictures shall be: --size PIXELS" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "said"), [
    ("cache --codec bundled --data leaves", "leaves: say how large its pictures shall be: --size PIXELS"),
    ("train codec --data leaves --size 0", "size: 0 must be at least 1"),       # restated there, within its limits
])
def test_sizes_that_cannot_be(tmp_path, capsys, words, said):
    assert stillroom(words, "--out", tmp_path / "out") == 2
    assert said in capsys.readouterr().err


def test_students_sizes_are_those_of_any_data():
    told = {"out": "o", "teacher": "t", "data": "digits"}
    assert sources_of(find("dmd"), from_mapping(find("dmd").Settings, told, "file"), None)["data"].shape == (1, 8, 8)
    with pytest.raises(Refusal, match="size: 0 must be at least 1"):
        from_mapping(find("dmd").Settings, {**told, "size": 0}, "file")
