"""Codecs from the command line, as a person would use them, with the pictures and the files that people have."""

import json
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file

import stillroom as package
from command import files, stillroom
from stillroom.codecs import Codec, fit_klt
from stillroom.codecs.codec import resized
from stillroom.data import LatentSpace, open_source, sample
from stillroom.nets.build import _known
from stillroom.nets.coding import Decoder, Encoder
from stillroom.recipes import module_of
from stillroom.settings import Images, read_toml
from stillroom.train import Product
from stillroom.train.product import save_product

QUICK = "--data leaves --size 16 --batch 8 --steps 3 --params 9000 --precision float32 --quiet"
SIZES = {"even": (64, 48), "odd": (61, 45), "pixel": (1, 1), "wide": (20_000, 3), "grey": (33, 20), "alpha": (20, 33)}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """klt and net, two codecs of 8 pixels a latent; photos/, of every kind; many/, 150 alike."""
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("home")
    x = sample(open_source(Images(data="leaves", size=32)), 32, 0).x
    save_product(Product("codec", {"codec": fit_klt(x, 8, 8)}), home / "klt")
    space = LatentSpace(4, 8, (0.0,) * 4, (0.1,) * 4)
    decoder = Decoder(4, 8, shift=space.shift, scale=space.scale, unit_range=True)
    net = Codec(Encoder(4, 8, unit_range=True), decoder, space)
    save_product(Product("codec", {"codec": net.eval()}), home / "net")
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        image = Image.fromarray(rng.integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        if name == "alpha":
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image = image.convert("L") if name == "grey" else image
        put(image, home / f"photos/{name}.png")
    for i in range(150):
        put(Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)), home / f"many/{i:03}.png")
    return home


def put(image, path):
    path.parent.mkdir(exist_ok=True)
    image.save(path)


def refused(*words):
    """One line on standard error, exit code 2, nothing made."""
    told = stillroom(*words)
    assert told.code == 2 and told.err.startswith("stillroom: ") and told.err.count("\n") == 1, told
    return told.err


# ---- one-off pictures ----


@pytest.mark.parametrize("how", ["", "--scale 1.5", "--tile 16", "--tile 16 --scale 1.5", "--tile 0"])
@pytest.mark.parametrize("name", ["klt", "net"])
def test_encode_and_decode_are_reconstruct_byte_for_byte(home, tmp_path, name, how):
    photos = [p for p in (home / "photos").iterdir() if p.stem != "wide" or ("16" not in how and name == "klt")]
    decoding = " ".join(how.split()[:2]) if how.startswith("--tile") else ""
    for words in (["encode", *photos, "--codec", home / name, "--out z", how],
                  ["decode", *[tmp_path / f"z/{p.stem}.safetensors" for p in photos], "--codec", home / name,
                   "--out again", decoding],
                  ["reconstruct --codec", home / name, how, *photos, "--out", tmp_path / "once"]):
        told = stillroom(*words)
        assert told.code == 0, told.err
    for photo in photos:
        assert (tmp_path / f"again/{photo.stem}.png").read_bytes() == (tmp_path / f"once/{photo.stem}.png").read_bytes()
        with Image.open(tmp_path / f"once/{photo.stem}.png") as image:
            assert image.size == SIZES[photo.stem] and image.mode == "RGB"


def test_alpha_is_laid_on_white_and_grey_is_three_equal_channels(home):
    told = stillroom("reconstruct", home / "photos/grey.png", home / "photos/alpha.png", "--codec", home / "klt")
    assert told.code == 0 and told.out.count("PSNR") == 2
    with Image.open(home / "photos/grey.png") as grey, Image.open(home / "photos/alpha.png") as alpha:
        put(grey.convert("RGB"), home / "rgb/grey.png")
        white = Image.new("RGBA", alpha.size, "white")
        white.alpha_composite(alpha)
        put(white.convert("RGB"), home / "rgb/alpha.png")
    stillroom("reconstruct --out rgb --codec", home / "klt", home / "rgb/grey.png", home / "rgb/alpha.png")
    for name in ("grey", "alpha"):
        with Image.open(f"rgb/{name}.png") as a, Image.open(f"{name}.png") as b:
            assert a.tobytes() == b.tobytes()


def test_in_python_as_the_readme_has_it(home):
    shutil.copytree(home / "net", "runs/tiny")
    images = torch.rand(2, 3, 40, 24) * 2 - 1
    stillroom = package
    codec = stillroom.load("runs/tiny"); z = codec.encode(images); codec.remapped(1.5).reconstruct(images)  # noqa: E702
    assert z.shape == (2, 4, 5, 3)
    larger = resized(images, (64, 32))                              # multiples of 8 next to 60 x 36
    back = resized(codec.reconstruct(larger).clamp(-1, 1), (40, 24))
    assert torch.allclose(codec.remapped(1.5).reconstruct(images), back, atol=1e-6)


def test_nothing_that_is_read_is_written_over(home, tmp_path):
    klt = home / "klt"
    photo = shutil.copy(home / "photos/odd.png", tmp_path / "odd.png")
    before = photo.read_bytes()
    assert "would be written over" in refused("reconstruct", photo, "--codec", klt)
    (tmp_path / "a").mkdir()
    shutil.copy(photo, tmp_path / "a/odd.png")
    assert "would both become" in refused("encode", photo, tmp_path / "a/odd.png", "--codec", klt, "--out z")
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    assert "would be written over" in refused("encode", photo, "--codec odd.safetensors")
    assert photo.read_bytes() == before and files(tmp_path) == ["a", "a/odd.png", "odd.png", "odd.safetensors"]


def test_what_cannot_be_read_is_said_before_anything_is_written(home, tmp_path):
    klt, photo = home / "klt", home / "photos/odd.png"
    assert "none.png: no such file" in refused("encode", photo, "none.png --out z --codec", klt)
    assert "is a folder: give its files, or" in refused("encode", home / "photos", "--out z --codec", klt)
    assert "usage: stillroom encode FILES..." in refused("encode --codec", klt)
    assert "leave out --scale" in refused("decode", photo, "--scale 2 --codec", klt)
    assert "scale: 0.0 must be above 0" in refused("encode", photo, "--scale 0 --codec", klt)
    assert files(tmp_path) == []
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png: not an image" in refused("reconstruct text.png --out z --codec", klt)
    assert "not latents written by stillroom encode" in refused("decode", photo, "--out z --codec", klt)


OWN = """
from torch import nn

from stillroom import Recipe, buildable


@buildable
class Half(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return x


class Mine(Recipe):
    pass
"""


def test_a_codec_of_an_own_recipe_is_known_wherever_codecs_are_given(home, tmp_path, monkeypatch):
    """To a new process: its classes are in the file that settings.toml names."""
    (tmp_path / "mine.py").write_text(OWN)
    half = module_of(tmp_path / "mine.py").Half
    space = LatentSpace(3, 1, (0.0,) * 3, (1.0,) * 3)
    save_product(Product("codec", {"codec": Codec(half(), half(), space).eval()}), tmp_path / "run/product")
    (tmp_path / "run/settings.toml").write_text(f'recipe = "{tmp_path / "mine.py"}:Mine"')
    photo = home / "photos/odd.png"
    commands = [["encode", photo, "--codec run --out z"], ["decode z/odd.safetensors --codec run --out back"],
                ["reconstruct", photo, "--codec run --out back"],
                ["cache --codec run --size 16 --out store --data", home / "many"],
                ["sweep run --teacher run --out swept --sizes 16 --scales 1 --data", home / "none"],
                ["export run --to taesd --out exported"]]
    monkeypatch.setitem(_known, "mine:Half", half)     # as it is now, when all is done
    for words in commands:
        _known.pop("mine:Half", None)
        told = stillroom(*words)
        assert "no buildable class" not in told.err, words
        assert told.code == (2 if words[0].startswith(("sweep", "export")) else 0), told.err
        assert "mine:Half" in _known
    assert package.load("run").encode(torch.zeros(1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_a_run_of_an_own_recipe_without_own_classes_needs_no_file(home, tmp_path):
    shutil.copytree(home / "klt", tmp_path / "run/product")
    (tmp_path / "run/settings.toml").write_text('recipe = "gone.py:Mine"')
    assert stillroom("encode", home / "photos/odd.png", "--codec run").code == 0


def test_places_that_cannot_be_written_are_one_line(home, tmp_path):
    (tmp_path / "file").write_text("")
    photo, klt = home / "photos/odd.png", home / "klt"
    assert "file: File exists; give another place" in refused("encode", photo, "--out file --codec", klt)
    assert "Not a directory; give another place" in refused("encode", photo, "--out file/z --codec", klt)
    (tmp_path / "z/.odd.safetensors.new").mkdir(parents=True)
    assert "could not be written" in refused("encode", photo, "--out z --codec", klt)


def test_latents_go_into_their_own_space_only(home):
    assert stillroom("encode", home / "photos/odd.png", "--codec", home / "klt").code == 0
    line = refused("decode odd.safetensors --out z --codec", home / "net")
    assert "another channels, shift, scale, offset" in line and "give the codec that encoded it" in line


def test_what_is_no_codec_is_refused(home, tmp_path):
    photo = home / "photos/odd.png"
    for name, word in (("net.onnx", "ONNX"), ("sd.ckpt", "pickle"), ("vae.bin", "pickle"), ("vae.pt", "pickle"),
                       ("picture.jpg", "folder"), ("encoder.pth", "holds more than tensors"),
                       ("encoder.safetensors", "damaged"), ("none.safetensors", "missing"), ("none", "no folder")):
        if not name.startswith("none"):
            (tmp_path / name).write_bytes(pickle.dumps({"a": Opens()}, protocol=2))
        assert word in refused("encode", photo, "--out z --codec", name), name
    assert "no folder" in refused("export none --to diffusers --out z")
    assert "none: no such file or folder" in refused("cache --codec none --data", home / "many", "--out z")
    assert not (tmp_path / "z").exists() and not (tmp_path / "opened").exists()


class Opens:
    """What unpickling would do."""

    def __reduce__(self):
        return open, ("opened", "w")


def test_missing_weights_are_refused(home, tmp_path):
    photo = home / "photos/odd.png"
    shutil.copytree(home / "net", tmp_path / "ours")
    (tmp_path / "ours/codec.safetensors").unlink()
    assert "codec.safetensors" in refused("encode", photo, "--out z --codec ours")
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "vae")
    weights = load_file(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    weights.pop("encoder.conv_in.weight")
    save_file(weights, tmp_path / "vae/diffusion_pytorch_model.safetensors")
    assert "encoder.conv_in.weight" in refused("distill encoder --teacher vae --out run", QUICK)
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()
    assert "vae" in refused("distill encoder --teacher vae --out run", QUICK)
    assert not (tmp_path / "run").exists()


# ---- data sets ----


def test_a_killed_cache_goes_on_and_a_flow_learns_from_it(home, tmp_path, monkeypatch):
    seen, real = [], Codec.encode

    def encode(self, x):
        seen.append(len(x))
        if sum(seen) > 100 and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return real(self, x)

    killed = []
    monkeypatch.setattr(Codec, "encode", encode)
    words = ["cache", "--codec", home / "klt", "--data", home / "many", "--size 16 --batch 10 --out"]
    assert stillroom(*words, "store").code == 130
    assert "its writing was interrupted" in refused("train flow --data store --out run --size 2")
    seen.clear()
    told = stillroom(*words, "store")
    assert told.code == 0 and told.out == "store  150 pictures\n"
    assert sum(seen) == 150 - 64                # all but the whole shard that was kept
    seen.clear()
    assert stillroom(*words, "store").code == 0 and not seen
    assert stillroom(*words, "whole").code == 0
    assert [(tmp_path / "whole" / f).read_bytes() for f in files(tmp_path / "whole")] == [
        (tmp_path / "store" / f).read_bytes() for f in files(tmp_path / "store")]
    x = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in sorted((home / "many").iterdir())])
    x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    source = open_source(Images(data="store", size=2))
    assert torch.allclose(source.fetch(range(150), 0).x, package.load(home / "klt").encode(x), atol=1e-5)

    told = stillroom("train flow --data store --size 2 --steps 3 --net dit --width 16 --depth 1 --patch 1 --batch 8",
                     "--precision float32 --out run")
    assert told.code == 0, told.err
    assert package.load("run").sample(2).shape == (2, 8, 2, 2)
    line = refused("cache", "--codec", home / "net", *words[3:], "store")
    assert "another space: other channels, shift, scale, offset; write to a new folder" in line
    assert "another crop" in refused(*words[:-1], "--size 24 --out store")
    assert "another origin" in refused(*words[:3], "--data", home / "photos", "--size 16 --out store")
    assert "no multiple of 8" in refused(*words[:-1], "--size 20 --out other")
    assert "leave out --crop and --flip" in refused(*words, "other --flip")


def test_pictures_that_a_cache_could_not_read_are_told(home, tmp_path):
    shutil.copytree(home / "many", "some")
    for i in (7, 140):
        (tmp_path / f"some/{i:03}.png").write_bytes(b"")
    words = ["cache --data some --size 16 --codec", home / "klt", "--out"]
    assert "more than 1.0%" in refused(*words, "other")
    told = stillroom(*words, "store --bad-share 0.1")
    assert told == (0, "store  150 pictures\n", "some: 2 of 150 pictures seen could not be read, and others took their "
                    "place: some/007.png (empty), some/140.png (empty)\n")
    assert stillroom("cache --data", home / "many", "--size 16 --out whole --codec", home / "klt").err == ""


# ---- recipes ----


def test_plans_leave_nothing(home, tmp_path):
    for words in (["train codec", "--decoder-params 9000"], ["distill encoder --cache kept --teacher", home / "klt"],
                  ["distill decoder --teacher", home / "klt"]):
        told = stillroom(*words, QUICK, "--plan --out run")
        assert told.code == 0 and ("stage distil" in told.out or "stage train" in told.out), told.err
        assert files(tmp_path) == []


def test_a_plan_times_every_stage(tmp_path):
    words = ("train rae --encoder own --own.width 16 --own.depth 1 --nets.width 96 --nets.depth 2 --patch 4 --size 8 "
             "--data digits --perceptual 0 --precision float32 --encoder-steps 40 --steps 20 --plan --out run")
    told = stillroom(words).out
    stages = [(int(n), float(ms)) for n, ms in re.findall(r"^stage \w+ +(\d+) steps of ([\d.]+) ms$", told, re.M)]
    assert [n for n, _ in stages] == [40, 20] and all(ms > 0 for _, ms in stages)
    assert "\nnot counted            what is done as a stage begins: statistics\n" in told
    minutes = float(re.search(r"whole run +60 steps, ([\d.]+) minutes", told)[1])
    assert minutes == pytest.approx(sum(n * ms for n, ms in stages) / 6e4, abs=0.051)


def test_a_run_finds_its_cache_from_any_folder(home, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    told = stillroom("distill encoder --cache there/kept --cache-crops 20 --out run --teacher", home / "klt", QUICK)
    assert told.code == 0, told.err
    assert read_toml(tmp_path / "run/settings.toml")["cache"] == str(tmp_path / "there/kept")
    stored = files(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    assert stillroom("resume", tmp_path / "run").code == 0
    assert files(tmp_path / "there") == stored


def test_help_and_lists_name_the_recipes():
    rows = {r["name"]: r["verb"] for r in json.loads(stillroom("recipes --json").out)}
    assert rows.items() >= {"codec": "train", "encoder": "distill", "decoder": "distill"}.items()
    for words in ("train codec", "distill encoder", "distill decoder", "encode", "decode", "reconstruct", "cache",
                  "export"):
        told = stillroom(words, "--help")
        assert told.code == 0 and "usage: stillroom" in told.out, words
    assert "is a recipe of: stillroom train codec" in refused("distill codec")
    assert "--preset bundled | kl | rae | tokenizer, --plan" in " ".join(stillroom("train codec --help").out.split())
    for words in ("train flow --help", "distill dmvae --help", "distill --help"):
        assert "--preset" not in stillroom(words).out, words
    assert "no preset 'k1'" in refused("train codec --preset k1 --data leaves --out run")
    assert "has no presets" in refused("distill encoder --preset kl --data leaves --out run")


def test_presets_lie_under_flags(tmp_path):
    told = stillroom("train codec --preset kl --channels 3 --decoder-params 9000 --out run", QUICK)
    assert told.code == 0, told.err
    values = read_toml(tmp_path / "run/settings.toml")
    assert (values["factor"], values["channels"], values["params"]) == (8, 3, 9000)


def test_exports_in_every_form(home, tmp_path):
    """What both recipes make with --stem conv; the files are codecs again, and the same one."""
    for words in ("encoder --stem conv --padding symmetric --out a", "decoder --out b", "encoder --out folded"):
        told = stillroom("distill", words, QUICK, "--teacher", home / "klt")
        assert told.code == 0, told.err
    a, b = package.load("a"), package.load("b")
    save_product(Product("codec", {"codec": Codec(a.encoder, b.decoder, a.space)}), tmp_path / "tiny")
    photo, forms = home / "photos/odd.png", ["diffusers", "taesd"]
    assert stillroom("reconstruct", photo, "--codec tiny --out own").code == 0
    with Image.open(tmp_path / "own/odd.png") as image:
        own = np.asarray(image).astype(int)
    for form in forms:
        told = stillroom("export tiny --out", form, "--to", form)
        assert told.code == 0 and told.out.strip() == form, told.err
        codec = "diffusers" if form == "diffusers" else next((tmp_path / "taesd").glob("*_encoder.safetensors"))
        assert stillroom("reconstruct", photo, "--out", f"by-{form}", "--codec", codec).code == 0
        with Image.open(tmp_path / f"by-{form}/odd.png") as image:
            assert abs(np.asarray(image).astype(int) - own).max() <= 1
    assert "exists already" in refused("export tiny --to taesd --out taesd")
    assert "distil the decoder too: stillroom distill decoder" in refused("export folded --to taesd --out other")
    assert "invalid choice" in refused("export tiny --to taesdd --out other")
    assert "--to, --out must be given" in refused("export tiny")
    assert "usage: stillroom export RUN|CODEC" in refused("export --to taesd --out other")
    pytest.importorskip("onnx")
    told = stillroom("export tiny --to onnx --out onnx")
    assert told.code == 0 and {"encoder.onnx", "decoder.onnx"} <= set(files(tmp_path / "onnx")), told.err
