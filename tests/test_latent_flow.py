"""`train flow --codec`: a flow of a codec's latents in one command, the same as by way of a store."""

import json

import pytest
import torch
from safetensors.torch import load_file

from stillroom.cli.main import main

NET = ["--net", "dit", "--width", "16", "--depth", "1", "--patch", "1", "--steps", "6", "--batch", "16", "--size", "8",
       "--precision", "float32"]


def stillroom(*words):
    return main([str(w) for w in words])


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

