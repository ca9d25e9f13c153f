"""`stillroom evaluate`: its figures are those of the sets it names, with their floors; and what it does not compare."""

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from command import stillroom
from stillroom.cli.main import COMMANDS
from stillroom.codecs import Codec, fingerprint
from stillroom.data import Batch, Encoding, Latents, LatentSpace, digits, write_latents
from stillroom.flows import Denoiser, Flow, OneStep
from stillroom.judge import evaluation
from stillroom.judge.asked import Evaluation
from stillroom.judge.sides import open_real
from stillroom.judge.sides import test_split_of as split_of
from stillroom.measure import METRICS, Moments, Statistics, as_8bit, distance_between
from stillroom.measure.metrics import halves
from stillroom.measure.reference import INCEPTION, read_statistics
from stillroom.nets import MLP, DiT, buildable
from stillroom.nets.coding import Decoder, Encoder
from stillroom.paths import Linear
from stillroom.settings import Refusal
from stillroom.train import Product
from stillroom.train.product import save_product

SPACE = LatentSpace(4, 8, (0.0,) * 4, (0.5,) * 4)


@buildable
class Means(nn.Module):
    """A feature net whose distances can be worked out by hand: the mean of every channel."""

    def __init__(self):
        super().__init__()

    def pooled(self, x):
        return x.mean((2, 3))


@buildable
class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.shape, self.classes = (1, 8, 8), None

    def labels(self, first, count):
        return None

    def sample(self, n, seed=0, guidance=1.0, batch=256, first=0, steps=None):
        x = torch.zeros(n, *self.shape)
        x[max(0, 7 - first) :] = float("nan")
        return x


def generator(channels, classes=None, seed=0):
    torch.manual_seed(seed)
    return OneStep(shaken(DiT(channels, 8, 4, 32, 1, 1, classes=classes)), Linear(), "v", (channels, 8, 8)).eval()


def shaken(net: nn.Module) -> nn.Module:
    """A new net answers zero."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return net


def labels(data) -> torch.Tensor:
    assert data.y is not None
    return data.y


def latents(n, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * 0.5


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    codec = Codec(Encoder(4, 8, unit_range=True), Decoder(4, 8, shift=SPACE.shift, scale=SPACE.scale, unit_range=True),
                  SPACE).eval()
    save_product(Product("codec", {"codec": codec}), home / "codec")
    encoding = Encoding(SPACE, fingerprint(codec), "centre 64")
    other = Encoding(SPACE, "f" * 64, "centre 64")
    y = torch.arange(90) % 3
    for name, each in {"latents": encoding, "others": other}.items():
        write_latents(home / name, [Batch(latents(90), y)], each, ["a", "b", "c"])
    write_latents(home / "parted/train", [Batch(latents(60), y[:60])], encoding, ["a", "b", "c"])
    write_latents(home / "parted/test", [Batch(latents(30, 1), y[:30])], encoding, ["a", "b", "c"])
    card = {"encoding": json.loads(json.dumps(dataclasses.asdict(encoding)))}
    save_product(Product("generator", {"generator": generator(4, 3)}, card), home / "coded")
    save_product(Product("generator", {"generator": generator(1, 10)}), home / "grey")
    save_product(Product("generator", {"generator": generator(3)}), home / "colour")
    save_product(Product("generator", {"generator": generator(1, 7)}), home / "seven")
    save_product(Product("generator", {"generator": Broken()}), home / "broken")
    save_product(Product("features", {"features": Means()}, {"shape": [1, 8, 8]}), home / "means")
    save_product(Product("features", {"features": Means()}, {"shape": [4, 8, 8]} | card), home / "coded-means")
    torch.manual_seed(1)
    flow = Flow(Denoiser(shaken(DiT(1, 8, 4, 32, 1, 1, classes=10)), Linear(), "v"), (1, 8, 8), "euler", 5)
    save_product(Product("flow", {"flow": flow}), home / "flow")
    ring = 2 * torch.pi * torch.arange(8) / 8
    near = torch.stack([ring.cos(), ring.sin()], 1).repeat_interleave(30, 0)
    near = near + 0.1 * torch.randn(240, 2, generator=torch.Generator().manual_seed(0))
    save_product(Product("points", {"points": near[:120].contiguous()}), home / "half-ring")
    plane = Flow(Denoiser(MLP(2, 16), Linear(), "v"), (2,), "euler", 2)
    save_product(Product("flow", {"flow": plane}), home / "plane")
    for name, data in {"train": digits(split="train"), "test": digits(split="test")}.items():
        np.savez(home / f"{name}.npz", x=data.x.numpy(), y=labels(data).numpy())
    return home


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMANDS, "evaluate", ("evaluate", ""))


def evaluated(*words):
    """What is printed, and the .json."""
    told = stillroom("evaluate", *words, "--out r.json")
    assert told.code == 0, told.err
    return told.out, json.loads(Path("r.json").read_text())


def refused(*words):
    told = stillroom("evaluate", *words)
    assert told.code == 2 and told.err.startswith("stillroom: ") and told.err.count("\n") == 1, told
    return told.err


def frechet(a, b):
    sides = (as_8bit(x).flatten(1) if x.ndim == 4 and x.shape[1] in (1, 3) else x.flatten(1) for x in (a, b))
    return distance_between(*(Moments(x.shape[1]).add(x) for x in sides))


# ---- the figures ----


def test_fresh_real_data_as_samples_stand_at_their_own_floor(home):
    said, found = evaluated(home / "test.npz", "--data digits")
    (columns,) = found["spaces"].values()
    samples, real = columns["355 samples"], columns["355 real"]
    assert samples["frechet"] == pytest.approx(real["frechet"], rel=1e-9)
    assert samples["frechet"] == pytest.approx(frechet(digits(split="train").x, digits(split="test").x), rel=1e-6)
    assert set(METRICS) <= set(samples) and set(samples) == set(real)
    assert "digits:train: 1,442" in said and "digits:test: 355" in said and "pixels 1x8x8 (64 dimensions" in said
    assert samples["precision"] > 0.9 and samples["coverage"] > 0.9


def test_memorised_data_lie_below_the_floor(home):
    """The reference itself: at no distance, which fresh data are not."""
    _, found = evaluated(home / "train.npz", "--data digits")
    (columns,) = found["spaces"].values()
    assert set(columns) >= {"1442 samples", "355 samples", "355 real"}      # as few as there are fresh ones, too
    assert abs(columns["1442 samples"]["frechet"]) < 1e-6 and columns["1442 samples"]["precision"] == 1
    assert columns["355 real"]["frechet"] > 0.1


def test_a_folder_of_pictures_is_what_was_drawn(home):
    for out in ("x.npz", "folder"):
        assert stillroom("sample", home / "grey", "--n 60 --seed 3 --out", out).code == 0
    drawn = evaluated(home / "grey", "--data digits --n 60 --seed 3")[1]["spaces"]
    assert drawn["pixels 1x8x8"]["60 samples"] == pytest.approx(
        evaluated("x.npz --data digits")[1]["spaces"]["pixels 1x8x8"]["60 samples"], rel=1e-3, abs=1e-5)
    assert drawn["pixels 1x8x8"]["60 samples"] == pytest.approx(
        evaluated("folder --data digits")[1]["spaces"]["pixels 1x8x8"]["60 samples"], rel=1e-3, abs=1e-5)
    assert drawn["pixels 1x8x8"]["60 real"]["frechet"] < drawn["pixels 1x8x8"]["60 samples"]["frechet"]


def test_latents_are_compared_as_they_are_normalised(home):
    """Without a split to take fresh ones from, a part is set aside: the reference is the rest."""
    said, found = evaluated(home / "coded", "--n 30 --data", home / "latents")
    (name, columns), = found["spaces"].items()
    store = Latents(home / "latents")
    assert name == f"latents 4x8x8 of codec {store.encoding.codec[:12]}" and "encoded from centre 64" in said
    rest, aside = halves(90, 30)
    real, fresh = (store.fetch(rows.tolist(), 0).x for rows in (rest, aside))
    assert columns["30 real"]["frechet"] == pytest.approx(frechet(fresh, real), rel=1e-6)
    made = generator(4, 3).sample(30)
    assert columns["30 samples"]["frechet"] == pytest.approx(frechet(made, real), rel=1e-4)
    assert "set aside" in said and "biased upwards" in said             # 30 of 256 dimensions


def test_the_test_split_beside_the_data_is_the_fresh_one(home):
    said, found = evaluated(home / "coded", "--n 30 --data", home / "parted")
    (columns,) = found["spaces"].values()
    real, fresh = (Latents(home / "parted" / part).fetch(range(n), 0).x for part, n in (("train", 60), ("test", 30)))
    assert columns["30 real"]["frechet"] == pytest.approx(frechet(fresh, real), rel=1e-6) and "set aside" not in said
    named = evaluated(home / "coded", "--n 30 --data", home / "parted", "--heldout", home / "parted/test")[1]
    assert named["spaces"] == found["spaces"]


def photographs(folder, count, seed):
    folder.mkdir(parents=True)
    noise = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)
    for i, each in enumerate(noise):
        Image.fromarray(each).save(folder / f"{i}.png")


def test_pictures_that_could_not_be_read_are_told(tmp_path):
    """Of the data; samples are what they are, and none stands for another."""
    photographs(tmp_path / "data", 40, 0)
    photographs(tmp_path / "made", 20, 1)
    (tmp_path / "data" / "5.png").write_bytes(b"")
    said, found = evaluated(tmp_path / "made", "--bad-share 0.1 --data", tmp_path / "data")
    line = (f"{tmp_path}/data: 1 of 40 pictures seen could not be read, and others took their place: "
            f"{tmp_path}/data/5.png (empty)")
    assert found["notes"] == [line] and said.count(line) == 1
    (tmp_path / "made" / "7.png").write_bytes(b"")
    assert refused(tmp_path / "made", "--data digits") == f"stillroom: {tmp_path}/made/7.png: empty\n"


def items(side):
    return {x.numpy().tobytes() for batch, _ in side.batches(None) for x in batch}


def test_fresh_ones_of_a_mixture_are_none_of_its_reference(tmp_path):
    """In a mixture the smaller source comes round again: of its numbers no part is set aside."""
    for i, (name, count) in enumerate({"a/train": 20, "a/test": 12, "b/train": 5, "b/test": 4, "c": 9}.items()):
        photographs(tmp_path / name, count, i)
    a, b, c = (str(tmp_path / name) for name in "abc")
    reference, fresh = open_real(Evaluation(data=f"{a}+0.25*{b}"), 8, 12)
    assert fresh.name == f"{a}:test+0.25*{b}:test" and len(items(fresh)) >= 10
    assert not items(reference) & items(fresh)
    assert split_of("photos+0.125*leaves:train") == "photos:test+0.125*leaves:test"
    assert split_of("2*photos") == "photos:test" and split_of("ring:8:0.1") is None
    for part, spec in {c: f"{a}+{c}", "leaves:test": "photos+leaves:test"}.items():
        with pytest.raises(Refusal, match=f"{part} has no test split.*--heldout"):
            open_real(Evaluation(data=spec), 8, 12)
    reference, fresh = open_real(Evaluation(data=f"{a}+{c}", heldout=f"{b}:test"), 8, 12)
    assert not items(reference) & items(fresh)


def test_learned_features_are_a_space_of_their_own(home):
    _, found = evaluated(home / "grey", "--n 400 --data digits --features", home / "means")
    name = next(n for n in found["spaces"] if n.startswith("features "))
    made, train = generator(1, 10).sample(400), digits(split="train").x
    by_hand = frechet(as_8bit(made).mean((2, 3)), as_8bit(train).mean((2, 3)))
    assert found["spaces"][name]["355 samples"] and found["spaces"][name]["dimensions"] == 1
    assert found["spaces"][name]["400 samples"]["frechet"] == pytest.approx(by_hand, rel=1e-4)
    found = evaluated(home / "coded", "--n 30 --data", home / "latents", "--features", home / "coded-means")[1]
    assert [space["dimensions"] for space in found["spaces"].values()] == [256, 4]


def test_large_pictures_are_seen_in_fixed_directions(home):
    said, found = evaluated(home / "coded", "--n 12 --codec", home / "codec", "--data", home / "parted")
    (name,) = found["spaces"]
    assert name == "pixels 3x64x64 in 256 random directions" and "of 12288 numbers" in said
    again = evaluated(home / "coded", "--n 12 --codec", home / "codec", "--data", home / "parted")[1]
    assert again["spaces"] == found["spaces"] and said.count("decoded by") == 3
    assert set(found["spaces"][name]) >= {"12 samples", "12 real"}


def test_latents_decoded_are_compared_with_pictures(home):
    said, found = evaluated(home / "coded", "--n 12 --reference 99 --data leaves --codec", home / "codec")
    assert "leaves:train: 99, 64 pixels a side" in said and "decoded by" in said
    assert found["spaces"]["pixels 3x64x64 in 256 random directions"]["12 real"]


def test_points_are_asked_for_their_modes(home):
    said, found = evaluated(home / "half-ring", "--reference 2000 --data ring:8:0.1")
    assert found["modes"]["samples"]["modes"] == 4 and found["modes"]["real"]["modes"] == 8
    assert found["modes"]["samples"]["good"] > 0.95 and "of 8: samples 4 with" in said
    columns = found["spaces"]["points 2"]
    assert columns["120 samples"]["recall"] < 0.6 < columns["120 real"]["recall"]
    said, found = evaluated(home / "half-ring", "--reference 2000 --data grid:3:0.1")
    assert found["modes"]["real"]["modes"] == 9 and "of 9: samples" in said


def test_the_teachers_own_samples_are_at_no_distance(home):
    _, found = evaluated(home / "flow", "--n 40 --data digits --teacher", home / "flow")
    assert found["teacher"]["rms"] < 1e-6 and found["teacher"]["relative"] < 1e-9
    _, fewer = evaluated(home / "flow", "--n 40 --data digits --steps 1 --teacher", home / "flow")
    made = [Flow.sample(load_flow(home), 40, steps=s) for s in (1, 5)]
    by_hand = float((made[0] - made[1]).square().mean().sqrt())
    assert fewer["teacher"]["rms"] == pytest.approx(by_hand, rel=1e-4) and by_hand > 1e-3
    _, other = evaluated(home / "grey", "--n 40 --data digits --teacher", home / "flow")
    assert other["teacher"]["relative"] > 0.05
    said, alone = evaluated(home / "flow", "--n 10 --data digits --steps 4 --teacher", home / "flow")     # 10 classes
    assert 0 < alone["teacher"]["relative"] < 0.5 and "of that to another sample\n" in said


def test_a_student_of_a_guided_teacher_stands_beside_that_teacher(home, tmp_path):
    """Its guidance is in its weights, so that nothing can be told when it is drawn from."""
    save_product(Product("generator", {"generator": generator(1, 10)}, {"guidance": 3.0}), tmp_path / "guided")
    said, found = evaluated(tmp_path / "guided", "--n 20 --data digits --teacher", home / "flow")
    y = torch.arange(20) % 10
    by_hand = generator(1, 10).sample(20) - load_flow(home).sample(20, y=y, guidance=3.0)
    assert found["teacher"]["rms"] == pytest.approx(float(by_hand.square().mean().sqrt()), rel=1e-5)
    assert found["teacher"]["guidance"] == 3 and "guidance 3, from the same noise" in said
    assert "steps None" not in said


def load_flow(home):
    from stillroom.train import load

    return load(home / "flow")


# ---- grey and colour ----


def test_what_was_decoded_in_colour_is_compared_with_grey_data(home):
    """Drawn, or from a folder: the figures are the same, in a space of three channels."""
    assert stillroom("sample", home / "coded", "--n 30 --out f --codec", home / "codec").code == 0
    words = "--data digits --reference 60"
    told, stored = evaluated("f", words)
    _, drawn = evaluated(home / "coded", "--n 30 --codec", home / "codec", words)
    (name,) = stored["spaces"]
    assert name.startswith("pixels 3x64x64") and "the data are grey and the samples in colour" in told
    for column in ("30 samples", "30 real"):
        assert stored["spaces"][name][column] == pytest.approx(drawn["spaces"][name][column], rel=1e-3, abs=1e-4)


def test_a_feature_net_of_grey_pictures_sees_the_mean_of_channels(home):
    _, found = evaluated(home / "colour", "--n 60 --data digits --features", home / "means")
    name = next(n for n in found["spaces"] if n.startswith("features "))
    made = as_8bit(generator(3).sample(60)).mean(1, keepdim=True).mean((2, 3))
    by_hand = frechet(made, as_8bit(digits(split="train").x).mean((2, 3)))
    assert found["spaces"][name]["60 samples"]["frechet"] == pytest.approx(by_hand, rel=1e-4)
    assert found["spaces"]["pixels 3x8x8"]["dimensions"] == 192 and "in colour" in found["notes"][0]


# ---- labels ----


def test_label_laws_that_differ_are_said(home):
    x = digits(split="test")
    mine = labels(x) == 0
    np.savez("zeros.npz", x=x.x[mine].numpy(), y=labels(x)[mine].numpy())
    said, _ = evaluated("zeros.npz --data digits")
    assert "labels of samples and data are 0.90 apart" in said and "balanced over 1 classes; data of 10 classes" in said
    assert "--labels data" not in said                      # they are there already
    assert "apart in total variation" not in evaluated(home / "grey", "--n 50 --data digits")[0]
    assert "data without labels" in evaluated(home / "colour", "--n 50 --data leaves --reference 200")[0]


def test_samples_can_be_drawn_by_the_datas_law(home, monkeypatch):
    seen = []
    real = OneStep.sample

    def watched(self, n, *rest, **more):
        seen.append(more["y"])
        return real(self, n, *rest, **more)

    monkeypatch.setattr(OneStep, "sample", watched)
    evaluated(home / "grey", "--n 300 --labels data --data digits")
    order = torch.randperm(1442, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(seen), labels(digits(split="train"))[order][:300])


def test_the_datas_law_is_offered_where_it_can_be_drawn_from(home):
    data = digits(split="test")
    mine = labels(data) < 2
    np.savez("two.npz", x=data.x[mine].numpy(), y=labels(data)[mine].numpy())
    y = torch.cat([torch.zeros(70), torch.arange(20) % 3]).long()
    write_latents(Path("uneven"), [Batch(latents(90), y)], Latents(home / "latents").encoding, ["a", "b", "c"])
    assert "which is in every figure; --labels data draws" in evaluated(home / "coded", "--n 30 --data uneven")[0]
    assert "apart" not in evaluated(home / "coded", "--n 30 --labels data --data uneven")[0]


def test_labels_of_files_are_what_they_can_be(home):
    x = digits(split="test").x[:40].numpy()
    np.savez("none.npz", x=x, y=np.full(40, -1))
    assert "samples without labels" in evaluated("none.npz --data digits")[0]
    np.savez("large.npz", x=x, y=np.arange(40) % 2 * 10**12)
    said = evaluated("large.npz --data digits")[0]
    assert "samples balanced over 2 classes" in said and "0.90 apart" in said
    for y in (np.arange(40) - 1, np.full(40, 0.5), np.full(40, np.nan)):
        np.savez("wrong.npz", x=x, y=y)
        assert "labels y are whole numbers from 0 on" in refused("wrong.npz --data digits")


# ---- statistics ----


class Stub(nn.Module):
    """In Inception's place: three numbers that can be worked out."""

    @classmethod
    def from_file(cls, file):
        return cls()

    def forward(self, x):
        assert x.shape[1] == 3
        return torch.stack([x.mean((1, 2, 3)), x.square().mean((1, 2, 3)), x[:, 0, 0, 0]], 1)


def test_statistics_are_written_and_compared_in_their_space_only(home, monkeypatch):
    monkeypatch.setattr(evaluation, "FidInception", Stub)
    said, _ = evaluated(home / "grey", "--n 50 --data digits --inception w.pth --save-stats s.npz")
    stats = read_statistics(Path("s.npz"))
    vectors = Stub()(as_8bit(digits(split="train").x).expand(-1, 3, -1, -1))
    assert stats.features == INCEPTION and stats.n == 1442 and "s.npz: statistics of the reference" in said
    assert torch.allclose(stats.mean, vectors.double().mean(0), atol=1e-6)
    assert "digits:train" in stats.how["reference"] and "bilinear" in stats.how["resize"]
    said, found = evaluated(home / "grey", "--n 50 --inception w.pth --stats s.npz")        # without any data
    made = Stub()(as_8bit(generator(1, 10).sample(50)).expand(-1, 3, -1, -1))
    by_hand = Statistics.of(Moments(3).add(made), INCEPTION).distance(stats)
    (columns,) = found["spaces"].values()
    assert columns["50 samples"]["frechet"] == pytest.approx(by_hand, rel=1e-4)
    assert "statistics of 1,442. reference: digits:train" in said
    assert "give --inception FILE" in refused(home / "grey", "--n 50 --stats s.npz")
    _, both = evaluated(home / "grey", "--n 50 --data digits:test --inception w.pth --stats s.npz")
    assert any("50 real" in c for name, c in both["spaces"].items() if "against s.npz" in name)


def test_a_batch_of_pictures_is_a_reference_too(home, monkeypatch):
    monkeypatch.setattr(evaluation, "FidInception", Stub)
    bytes8 = ((digits(split="test").x + 1) * 127.5).round().byte().expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
    np.savez("adm.npz", arr_0=bytes8.contiguous().numpy())
    _, found = evaluated(home / "test.npz", "--inception w.pth --stats adm.npz")
    (columns,) = found["spaces"].values()
    assert abs(columns["355 samples"]["frechet"]) < 1e-9


def test_what_is_no_picture_has_no_statistics_in_inceptions_features(home, monkeypatch):
    monkeypatch.setattr(evaluation, "FidInception", Stub)
    for x in (latents(20).numpy(), np.zeros((20, 2), np.float32)):
        np.savez("s.npz", x=x)
        said = refused(home / "grey", "--n 20 --inception w.pth --stats s.npz")
        assert f"s.npz: holds {list(x.shape[1:])}, and {INCEPTION} looks at pictures" in said


def test_statistics_of_another_space_are_refused(home):
    Statistics.of(Moments(64).add(torch.randn(99, 64)), "features 0123").save(Path("s.npz"))
    said = refused(home / "grey", "--data digits --stats s.npz")
    assert "statistics of features 0123; looked at are: pixels 1x8x8" in said
    evaluated(home / "grey", "--n 20 --data digits --save-stats mine.npz")
    assert "looked at are: latents" in refused(home / "coded", "--data", home / "latents", "--stats mine.npz")


# ---- what is refused ----


@pytest.mark.parametrize(("place", "words", "line"), [
    ("grey", "", "--data DATA must be given, or --stats FILE"),
    ("grey", "--data nowhere", "no such file or folder"),
    ("grey", "--data leaves", "makes [1, 8, 8], and leaves:train holds [3, 8, 8]"),
    ("plane", "--data digits", "makes points, and digits:train holds pixels"),
    ("coded", "--data leaves", "makes latents, and leaves:train holds pixels; give the --codec"),
    ("coded", "--data HOME/others", "makes other latents than those of HOME/others: another codec"),
    ("coded", "--data HOME/others --codec HOME/codec", "the latents are of another codec"),
    ("grey", "--data HOME/latents", "makes pixels, and HOME/latents holds latents"),
    ("grey", "--data digits --codec HOME/codec", "there are no latents to decode; leave it out"),
    ("grey", "--data digits --features HOME/coded-means", "they are of [4, 8, 8]"),
    ("coded", "--data HOME/latents --features HOME/means", "they are of [1, 8, 8]"),
    ("coded", "--data HOME/latents --inception w.pth", "looks at pictures, and these are latents"),
    ("grey", "--data digits --inception w.pth", "w.pth: the weight file is missing"),
    ("grey", "--data digits --stats s.npz", "s.npz: no such file"),
    ("grey", "--data digits --heldout leaves", "not of the kind of those of digits:train"),
    ("grey", "--data digits --n 5", "distances need vectors of 10 or more"),
    ("grey", "--data digits --teacher HOME/plane", "it makes [2], and"),
    ("colour", "--data leaves --teacher ring:8", "it makes [2], and"),
    ("grey", "--stats s.npz --save-stats t.npz", "--save-stats needs --data"),
    ("grey", "--stats s.npz --heldout digits --bad-share 0.5", "there is no use for --heldout, --bad-share"),
    ("grey", "--data digits --heldout digits:train", "--heldout digits:train: is what --data names"),
    ("plane", "--data ring:8 --heldout ring:8", "--heldout ring:8: is what --data names"),
    ("broken", "--data digits", "item 7 holds NaN or infinity"),
    ("colour", "--data leaves --reference 50 --labels data", "--labels data: leaves has no labels"),
    ("seven", "--data digits --labels data", "seven knows 7 classes, and digits:train has 10"),
    ("plane", "--data ring:8:0.1 --reference 50 --labels data", "plane knows no classes, and ring:8:0.1 has 8"),
    ("half-ring", "--data ring:8:0.1 --reference 50 --labels data", "points have the labels that they have"),
    ("codec", "--data leaves", "a product of kind 'codec' is not drawn from"),
    ("test.npz", "--data digits --steps 3", "its samples are there already: leave out --steps"),
    ("test.npz", "--data digits --teacher HOME/flow", "leave out --teacher"),
    ("test.npz", "--data digits --labels data", "leave out --labels"),
    ("nowhere", "--data digits --teacher HOME/flow", "no such file or folder; give a run, a folder of pictures"),
    ("nowhere", "", "no such file or folder"),
    ("latents", "--data digits", "no folder of pictures"),
])
def test_what_cannot_be_compared(home, place, words, line):
    assert line.replace("HOME", str(home)) in refused(home / place, words.replace("HOME", str(home)))
    assert not Path("r.json").exists()


def test_damaged_arrays_are_refused(home):
    np.savez("scalar.npz", x=np.float32(1))
    assert "'x' is float32 []" in refused("scalar.npz --data digits")
    np.savez_compressed("whole.npz", x=digits(split="test").x[:40].numpy())
    with zipfile.ZipFile("whole.npz") as archive:
        content = archive.read("x.npy")
    with zipfile.ZipFile("header.npz", "w") as archive:
        archive.writestr("x.npy", content.replace(b"(40, 1, 8, 8)", b"(40, 1, '8  "))
    assert "header.npz: 'x' is not readable" in refused("header.npz --data digits")
    np.savez("card.npz", x=digits(split="test").x[:40].numpy(), card=np.array("[1]"))
    assert "'card' is not a record in JSON" in refused("card.npz --data digits")


def test_pictures_of_another_range_are_refused_or_said(home, monkeypatch):
    """What `sample` wrote is in ours, however far a sample is out."""
    x = digits(split="test").x[:40].numpy()
    np.savez("bytes.npz", x=(x + 1) * 127.5)
    assert "its pixels go from 0 to 255, and pictures are floats in [-1, 1]" in refused("bytes.npz --data digits")
    np.savez("unit.npz", x=(x + 1) / 2)
    note = "unit.npz: no pixel is below 0"
    assert note in evaluated("unit.npz --data digits")[0]
    monkeypatch.setattr(evaluation, "FidInception", Stub)
    assert note in evaluated(home / "grey", "--n 20 --inception w.pth --stats unit.npz")[0]
    np.savez("signed.npz", x=x)
    assert "below 0" not in evaluated("signed.npz --data digits")[0]
    assert stillroom("sample", home / "grey", "--n 40 --out far.npz").code == 0
    assert np.abs(np.load("far.npz")["x"]).max() > 1.5
    evaluated("far.npz --data digits")


def test_arrays_of_other_latents_are_refused(home):
    """What `sample` wrote says of which codec it is; arrays that say nothing are compared, and that is said."""
    assert stillroom("sample", home / "coded", "--n 20 --out z.npz").code == 0
    assert "another codec" in refused("z.npz --data", home / "others")
    evaluated("z.npz --data", home / "latents")
    np.savez("bare.npz", x=np.load("z.npz")["x"])
    assert "do not say of which codec" in evaluated("bare.npz --data", home / "others")[0]


def test_some_of_a_sorted_file_are_of_all_its_classes(home):
    order = labels(digits(split="train")).argsort()
    np.savez("sorted.npz", x=digits(split="train").x[order].numpy(), y=labels(digits(split="train"))[order].numpy())
    said, found = evaluated("sorted.npz --data digits --n 300")
    assert "apart in total variation" not in said and "sorted.npz: 300" in said
    assert found["spaces"]["pixels 1x8x8"]["300 samples"]["recall"] > 0.9
