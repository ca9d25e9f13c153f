"""Drawing many samples: killed and called again, at any batch, in parts, decoded, and guided."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from command import complaint as refused
from command import files, python, stillroom
from stillroom.cli import sample as command
from stillroom.codecs import Codec, fingerprint
from stillroom.data import Encoding, LatentSpace, encoding_card
from stillroom.flows import Denoiser, Flow, OneStep, extrapolated, noise_of
from stillroom.nets import MLP, DiT
from stillroom.nets.coding import Decoder, Encoder
from stillroom.paths import Linear
from stillroom.settings import Refusal
from stillroom.settings.files import held
from stillroom.train import Product, load
from stillroom.train.product import save_product

SPACE = LatentSpace(4, 8, (0.0,) * 4, (0.5,) * 4)


def shaken(net: nn.Module, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return net


def generator(channels: int, seed: int = 0, **more) -> OneStep:
    torch.manual_seed(seed)
    net = shaken(DiT(channels, 8, 4, 32, 1, 1, **more), seed)
    return OneStep(net, Linear(), "v", (channels, 8, 8), unlabelled=True).eval()


def codec(seed: int) -> Codec:
    torch.manual_seed(seed)
    decoder = Decoder(4, 8, shift=SPACE.shift, scale=SPACE.scale, unit_range=True)
    return Codec(Encoder(4, 8, unit_range=True), decoder, SPACE).eval()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    mine, other = codec(0), codec(1)
    save_product(Product("codec", {"codec": mine}), home / "codec")
    save_product(Product("codec", {"codec": other}), home / "other")
    save_product(Product("codec", {"codec": other}, {"teacher_hash": fingerprint(mine)}), home / "distilled")

    class Store:
        encoding = Encoding(SPACE, fingerprint(mine), "centre 64")

    grey, early = generator(1, classes=3), generator(1, seed=1, classes=3)
    save_product(Product("generator", {"generator": grey, "early": early}), home / "grey")
    save_product(Product("generator", {"generator": generator(1, seed=2, classes=3)}), home / "weak")
    save_product(Product("generator", {"generator": generator(1)}), home / "plain")
    save_product(Product("generator", {"generator": generator(4)}, encoding_card(Store)), home / "latents")
    save_product(Product("generator", {"generator": generator(4)}), home / "unsaid")
    told = OneStep(shaken(DiT(1, 8, 4, 32, 1, 1, classes=3, guided=True), 0), Linear(), "v", (1, 8, 8),
                   takes_strength=True)
    save_product(Product("generator", {"generator": told}, {"strongest": 3.0}), home / "told")
    flow = Flow(Denoiser(shaken(DiT(1, 8, 4, 32, 1, 1, classes=3), 0), Linear(), "v"), (1, 8, 8), "euler", 4)
    save_product(Product("flow", {"flow": flow}), home / "flow")
    save_product(Product("flow", {"flow": flow}, {"guidance": 3.0}), home / "inside")
    points = torch.arange(10.0)[:, None].expand(10, 2)
    save_product(Product("points", {"points": points.contiguous()}), home / "points")
    plane = OneStep(shaken(MLP(2, 16), 0), Linear(), "v", (2,))
    save_product(Product("generator", {"generator": plane}), home / "plane")
    return home


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def drawn(home, name, words):
    out = Path(f"{name}.npz")
    told = stillroom("sample", home, words, "--out", out)
    assert (told.code, told.out) == (0, f"{out}\n"), told
    return np.load(out)


# ---- what is drawn ----


def test_a_generator_is_drawn_class_by_class_the_same_at_any_batch(home):
    whole = drawn(home / "grey", "a", "--n 11 --batch 256")
    few = drawn(home / "grey", "b", "--n 11 --batch 2")
    other = drawn(home / "grey", "c", "--n 11 --seed 1")
    assert whole["y"].tolist() == few["y"].tolist() == [0, 1, 2] * 3 + [0, 1]
    assert np.abs(whole["x"] - few["x"]).max() < 1e-5 and np.abs(whole["x"] - other["x"]).max() > 0.1
    z = noise_of((1, 8, 8), 0, 11, 0)
    exact = generator(1, classes=3)(z, torch.arange(11) % 3)
    assert np.allclose(whole["x"], exact.detach().numpy(), atol=1e-5)


def test_parts_drawn_by_several_are_the_whole(home):
    whole = drawn(home / "grey", "a", "--n 20")
    parts = [drawn(home / "grey", f"p{i}", f"--n 10 --start {i}") for i in (0, 10)]
    assert np.allclose(np.concatenate([p["x"] for p in parts]), whole["x"], atol=1e-5)
    assert np.concatenate([p["y"] for p in parts]).tolist() == whole["y"].tolist()
    assert stillroom("sample", home / "grey", "--n 2 --start 7 --out f").code == 0
    assert files(Path("f")) == ["000007.png", "000008.png"]


def test_guidance_leads_away_from_a_weaker_model(home):
    strong = drawn(home / "grey", "a", "--n 6")["x"]
    z, y = noise_of((1, 8, 8), 0, 6, 0), torch.arange(6) % 3
    net = generator(1, classes=3)
    for name, words, weak in (("own", "", net(z)), ("early", "--weak early", generator(1, seed=1, classes=3)(z, y)),
                              ("other", f"--weak {home / 'weak'}", generator(1, seed=2, classes=3)(z, y))):
        found = drawn(home / "grey", name, f"--n 6 --guidance 2.5 {words}")["x"]
        assert np.allclose(found, extrapolated(2.5, torch.from_numpy(strong), weak).detach().numpy(), atol=1e-4), name
    assert np.array_equal(drawn(home / "flow", "f", "--n 4 --guidance 2")["x"],
                          drawn(home / "flow", "g", "--n 4 --guidance 2 --interval 0 1")["x"])
    some = drawn(home / "flow", "h", "--n 4 --guidance 2 --interval 0.1 0.5")["x"]
    assert np.allclose(some, load(home / "flow").sample(4, guidance=2.0, interval=(0.1, 0.5)).numpy(), atol=1e-5)
    assert not np.allclose(some, np.load("f.npz")["x"])


def test_latents_are_decoded_by_their_codec(home):
    told = stillroom("sample", home / "latents", "--n 5 --out z.npz")
    assert told.code == 0, told.err
    z = np.load("z.npz")
    card = json.loads(str(z["card"]))
    assert card["encoding"]["codec"] == fingerprint(codec(0)) and card["seed"] == 0
    x = drawn(home / "latents", "x", f"--n 5 --codec {home / 'codec'}")["x"]
    exact = codec(0).decode(torch.from_numpy(z["x"])).clamp(-1, 1).detach()
    assert x.shape == (5, 3, 64, 64) and np.allclose(x, exact.numpy(), atol=1e-5)
    assert stillroom("sample", home / "latents", "--n 3 --out folder --codec", home / "codec").code == 0
    picture = np.asarray(Image.open("folder/000002.png")).transpose(2, 0, 1)
    assert np.abs(picture - (x[2] + 1) * 127.5).max() <= 0.5 + 1e-3
    assert stillroom("sample", home / "latents", "--n 2 --out d.npz --codec", home / "distilled").code == 0
    assert stillroom("sample", home / "unsaid", "--n 2 --out u.npz --codec", home / "other").code == 0


def test_a_sheet_stands_beside_what_is_drawn(home):
    told = stillroom("sample", home / "grey", "--n 80 --out x.npz --grid deep/sheet.png")
    assert (told.code, told.out) == (0, "x.npz\n") and files(Path()) == ["deep", "deep/sheet.png", "x.npz"]
    sheet = np.asarray(Image.open("deep/sheet.png"))
    x = np.load("x.npz")["x"]
    assert sheet.shape[0] == 8 * 48 + 7 * 2      # 64 of them
    assert np.abs(sheet[:48:6, :48:6, 0] - (x[0, 0].clip(-1, 1) + 1) * 127.5).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("words", ["--out f", "--out x.npz"])
def test_a_sheet_leaves_no_trace_where_out_is_refused(home, words):
    Path("sheet.png").write_bytes(b"another")
    if words == "--out f":
        assert stillroom("sample", home / "grey", "--n 4 --out f").code == 0
    else:
        interrupted(home, "x.npz")
    for sheet in ("sheet.png", "new.png"):
        assert "another" in refused("sample", home / "grey", "--n 4 --seed 1", words, "--grid", sheet)
    assert Path("sheet.png").read_bytes() == b"another" and not Path("new.png").exists()


@pytest.mark.parametrize("words", ["--out f --grid f/sheet.png", "--out f --grid f/in/sheet.png",
                                   "--out x.png --grid x.png"])
def test_a_sheet_among_samples_is_refused(home, tmp_path, words):
    assert "among the samples; give it another place" in refused("sample", home / "grey", "--n 4", words)
    assert files(tmp_path) == []


def test_points_are_written_as_they_are(home):
    found = drawn(home / "points", "p", "--n 4 --start 8")
    assert found["x"].tolist() == [[8, 8], [9, 9]]
    told = stillroom("sample", home / "points", "--n 500 --out q.npz")
    assert told == (0, "q.npz\n", f"{home / 'points'}: holds 10 points: 10 are written\n")
    assert stillroom("sample", home / "points", "--n 10 --out r.npz").err == ""


# ---- killed, and called again ----


KILLED = """
import itertools, os, signal, sys
from stillroom.cli.main import main
from stillroom.settings import files

syncs, real = itertools.count(1), files.sync
def sync(path):
    if next(syncs) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(path)
files.sync = sync
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("out", "whole"), [("folder", 301), ("x.npz", 3)])
def test_killed_and_called_again_it_ends_as_if_never_stopped(home, out, whole):
    """While a file is written of which `whole` are on the disk: pictures, or the draw's card and two parts of 200."""
    flags = "--n 700 --batch 100 --seed 3"
    done = python("-c", KILLED, str(2 * whole + 1), "sample", home / "flow", *flags.split(), "--out", out)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not Path("x.npz").exists()
    told = stillroom("sample", home / "flow", flags, "--out", out)
    assert told.code == 0 and told.err == f"{out}: going on after {301 if out == 'folder' else 400} samples\n"
    assert stillroom("sample", home / "flow", flags, "--out whole/" + out).err == ""
    if out == "folder":
        assert files(Path("folder")) == files(Path("whole/folder")) == [f"{i:06d}.png" for i in range(700)]
        pairs = [(Path("folder") / name, Path("whole/folder") / name) for name in files(Path("folder"))]
    else:
        assert files(Path()) == ["whole", "whole/x.npz", "x.npz"]
        pairs = [(Path("x.npz"), Path("whole/x.npz"))]
    assert all(a.read_bytes() == b.read_bytes() for a, b in pairs)
    assert stillroom("sample", home / "flow", flags, "--out", out).code == 0    # whole already


def test_what_is_there_is_not_drawn_again(home, monkeypatch):
    assert stillroom("sample", home / "grey", "--n 30 --batch 10 --out f").code == 0
    seen, real = [], OneStep.sample

    def watched(self, n, *rest, **more):
        seen.append((more["first"], n))
        return real(self, n, *rest, **more)

    monkeypatch.setattr(OneStep, "sample", watched)
    Path("f/000027.png").unlink()
    before = Path("f/000029.png").read_bytes()
    assert stillroom("sample", home / "grey", "--n 30 --batch 10 --out f").code == 0
    assert seen == [(20, 10)] and len(files(Path("f"))) == 30 and Path("f/000029.png").read_bytes() == before
    seen.clear()
    assert stillroom("sample", home / "grey", "--n 45 --batch 10 --out f").code == 0     # more of the same
    assert seen == [(30, 15)] and len(files(Path("f"))) == 45


def test_an_array_is_put_together_without_holding_it(home, monkeypatch):
    monkeypatch.setattr(command.Draws, "chunks", lambda self, first, stop: (
        (i, self(i, min(7, stop - i))) for i in range(first, stop, 7)))
    x = drawn(home / "grey", "x", "--n 30")
    monkeypatch.undo()
    assert np.allclose(x["x"], np.load(whole(home))["x"], atol=1e-5)
    assert sorted(x.files) == ["card", "x", "y"] and not x["x"].flags["F_CONTIGUOUS"]


def whole(home):
    assert stillroom("sample", home / "grey", "--n 30 --out", home / "whole.npz").code == 0
    return home / "whole.npz"


# ---- what cannot be ----


@pytest.mark.parametrize(("product", "words", "line"), [
    ("grey", "--steps 5", "this generator takes one step, not 5"),
    ("grey", "--interval 0.1 0.5", "a generator knows no times: leave out --interval"),
    ("grey", "--weak early", "--weak has no effect at guidance 1: give --guidance too"),
    ("weak", "--weak early --guidance 2", "--weak early: this run kept no earlier average; name another run"),
    ("plain", "--guidance 2", "guidance needs labels, or a weaker generator"),
    ("flow", "--guidance 2 --interval 0.5 0.5", "interval 0.5 to 0.5"),
    ("told", "--guidance 3.5", "--guidance 3.5: "),
    ("told", "--guidance 0.5", "is told the strength, and has learned those from 1 to 3; give one of them"),
    ("inside", "--guidance 3", "has guidance 3 in its weights; leave it out"),
    ("grey", "--device nosuch", "device 'nosuch'"),
    ("codec", "", "a product of kind 'codec' is not drawn from"),
    ("latents", "--out folder", "(4, 8, 8) are no pictures; write them to FILE.npz, or give the --codec that decodes"),
    ("latents", "--out x.png", "samples of shape (4, 8, 8) are no pictures"),
    ("latents", "--out x.npz --grid y.png", "samples of shape (4, 8, 8) are no pictures"),
    ("grey", "--out x.npz --grid y.npz", "y.npz: a sheet is written to FILE.png"),
    ("points", "--start 10", "holds 10 points, and --start is 10"),
    ("points", "--weak early", "points are not sampled anew: leave out --weak"),
    ("points", "--seed 7 --guidance 2 --interval 0.2 0.8",
     "points are not sampled anew: leave out --seed, --guidance, --interval"),
    ("plane", "--out folder", "samples of shape (2,) are no pictures; write them to FILE.npz"),
])
def test_draws_that_cannot_be(home, tmp_path, product, words, line):
    said = refused("sample", home / product, "--n 2", words, "" if "--out" in words else "--out x.npz")
    assert line in said and files(tmp_path) == []


def test_one_command_at_a_time_draws_into_a_file(home, tmp_path):
    with held(Path(".x.npz.lock"), "busy"):
        said = refused("sample", home / "grey", "--n 2 --out x.npz")
    assert "x.npz: another command is drawing into it" in said and files(tmp_path) == []
    assert stillroom("sample", home / "grey", "--n 2 --out new/x.npz").code == 0
    assert files(tmp_path / "new") == ["x.npz"]


@pytest.mark.parametrize(("product", "other", "line"), [
    ("latents", "other", "the latents are of another codec"),
    ("grey", "codec", "its latents have 4 channels, and samples are of [1, 8, 8]"),
    ("plane", "codec", "its latents have 4 channels, and samples are of [2]"),
])
def test_a_codec_of_other_latents_is_refused(home, tmp_path, product, other, line):
    assert line in refused("sample", home / product, "--n 2 --out x.npz --codec", home / other)
    assert files(tmp_path) == []


def test_a_network_that_is_told_the_strength_is_told_what_it_has_learned(home):
    one, three, away = (drawn(home / "told", name, f"--n 4 {words}")["x"] for name, words in (
        ("a", ""), ("b", "--guidance 3"), ("c", f"--guidance 3.5 --weak {home / 'weak'}")))
    assert not np.allclose(one, three) and not np.allclose(one, away)
    said = refused("inspect", home / "told", "--n 40 --guidance 3.5")
    assert "has learned those from 1 to 3" in said


def test_a_weaker_model_of_other_latents_is_refused(home):
    said = refused("sample", home / "latents", "--n 2 --guidance 2 --out x.npz --weak", home / "unsaid")
    assert said.endswith("it was trained on other latents")
    said = refused("sample", home / "grey", "--n 2 --guidance 2 --out x.npz --weak", home / "flow")
    assert "a product of kind 'flow'" in said
    said = refused("sample", home / "grey", "--n 2 --guidance 2 --out x.npz --weak", home / "plain")
    assert said.endswith("it knows no classes, and the run 3")


@pytest.mark.parametrize("spoil", ["--seed 1", "--guidance 2", "--weak early --guidance 2"])
def test_draws_are_not_mixed(home, spoil):
    """A folder, or an unfinished file, is gone on with by the draw that it is of."""
    assert stillroom("sample", home / "grey", "--n 10 --out f").code == 0
    assert "is of another draw" in refused("sample", home / "grey", "--n 20 --out f", spoil)
    assert "is of another draw" in refused("sample", home / "flow", "--n 20 --out f")
    Path("x.npz").unlink(missing_ok=True)
    interrupted(home, "x.npz")
    assert "an unfinished draw of another" in refused("sample", home / "grey", "--n 600 --out x.npz", spoil)
    assert stillroom("sample", home / "grey", "--n 600 --batch 100 --out x.npz").code == 0
    assert len(np.load("x.npz")["x"]) == 600 and not Path(".x.npz.part").exists()


def test_another_sampler_of_the_same_weights_is_another_draw(home, tmp_path):
    shutil.copytree(home / "flow", tmp_path / "flow")
    shutil.copytree(home / "grey", tmp_path / "weak")
    draws = {"f": "--n 4 --out f", "w": "--n 4 --guidance 2 --out w --weak weak"}
    for words in draws.values():
        assert stillroom("sample", "weak" if "weak" in words else "flow", words).code == 0
    for place, part, argument in (("flow", "flow", "sampler"), ("weak", "generator", "prediction")):
        file = tmp_path / place / "product.json"
        content = json.loads(file.read_text())
        content["parts"][part]["arguments"][argument] = {"sampler": "heun", "prediction": "x0"}[argument]
        file.write_text(json.dumps(content))
    assert "is of another draw (another run, sampler" in refused("sample flow", draws["f"])
    assert "is of another draw" in refused("sample", home / "grey", draws["w"])
    assert stillroom("sample", home / "flow", draws["f"]).code == 0     # wherever it lies


def interrupted(home, out):
    """As a draw leaves it that was stopped after its first part."""
    original = command.Draws.chunks

    def stopped(self, first, stop):
        yield next(original(self, first, stop))
        raise Refusal("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.Draws, "chunks", stopped)
        assert refused("sample", home / "grey", "--n 600 --out", out) == "stopped"
    assert files(Path(f".{out}.part")) == ["000000000.npy", "draw.json"]


def test_a_folder_of_other_pictures_is_not_written_into(home):
    Path("f").mkdir()
    Image.new("RGB", (8, 8)).save("f/000000.png")
    assert "f/000000.png: is of another draw" in refused("sample", home / "grey", "--n 4 --out f")
    shutil.rmtree("f")
    assert stillroom("sample", home / "grey", "--n 9 --out f").code == 0
    assert "holds 000004.png too" in refused("sample", home / "grey", "--n 4 --out f")
    Path("f/000000.png").write_bytes(b"")
    assert "is of another draw" in refused("sample", home / "grey", "--n 9 --out f")
