"""`stillroom compare`: what it measures against what is known, what it keeps, what it prints, writes and refuses."""

import contextlib
import dataclasses
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from command import complaint, printed, stillroom
from stillroom import train
from stillroom.cli import progress
from stillroom.codecs import Codec, fit_klt
from stillroom.data import Tensors, open_source, sample
from stillroom.flows import Denoiser, Flow, Gaussian, Mixture
from stillroom.flows.gate import BINS
from stillroom.flows.references import gaussian
from stillroom.judge import codecs as comparison
from stillroom.judge import pictures, priors
from stillroom.judge.asked import OfCodecs
from stillroom.judge.evaluation import Space
from stillroom.judge.measures import distance_to, moves, probes, reconstruction
from stillroom.measure.distances import sliced_wasserstein
from stillroom.measure.frechet import Moments
from stillroom.measure.images import psnr
from stillroom.measure.perceptual import Lpips
from stillroom.measure.velocity import viv
from stillroom.nets import MLP
from stillroom.paths import Linear
from stillroom.recipes.flow import FlowMatching
from stillroom.report import compare as report
from stillroom.report import compare_plots as plots
from stillroom.report.compare_words import clear_distance, clear_psnr, front
from stillroom.report.words import number
from stillroom.settings import Images, Refusal
from stillroom.train.product import save_product
from stillroom.train.recipe import Product
from test_report import Read, browser, opened

TINY = "--data digits --n 80 --pictures 200 --steps 12 --batch 16 --width 16 --depth 1 --sampler-steps 2 --quiet"


def compared(*words: str | Path) -> str:
    return printed("compare", *words)


def refused(*words: str | Path) -> str:
    return complaint("compare", *words)


def found_in(out: Path) -> dict:
    return json.loads((out / "compare.json").read_text())


def of(found: dict, name: str) -> dict:
    return next(c for c in found["codecs"] if c["name"] == name)


def made(place: Path, codec: Codec) -> Path:
    save_product(Product("codec", {"codec": codec}), place / "product")
    return place / "product"


def budget(**asked) -> priors.Budget:
    return comparison.budget_of(OfCodecs(data="digits", **asked))


def digits(n: int, split: str = "train") -> torch.Tensor:
    return sample(open_source(Images(data=f"digits:{split}", size=8)), n, 0).x


@pytest.fixture(scope="module")
def codecs(tmp_path_factory) -> dict[str, Path]:
    """Linear codes of few numbers, of more, and of all of them."""
    home, x = tmp_path_factory.mktemp("codecs"), digits(300)
    shapes = {"coarse": (4, 2), "fine": (2, 2), "other": (4, 6)}
    return {name: made(home / name, fit_klt(x, *shape)) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def both(codecs, tmp_path_factory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("compared") / "out"
    return out, compared(codecs["coarse"], codecs["fine"], TINY, "--reference gaussian --out", out)


@pytest.fixture
def counted(monkeypatch):
    """What a comparison has done: runs begun and gone on with, pictures encoded, parts measured."""
    done: list[str] = []

    def counting(name, real):
        def call(*args, **more):
            done.append(name)
            return real(*args, **more)
        return call

    for place, name in ((train, "start"), (train, "resume"), (priors, "generation"), (Codec, "encode"),
                        (pictures, "pooled")):
        monkeypatch.setattr(place, name, counting(name, getattr(place, name)))
    return done


# ---- what it measures ----

def test_reconstruction_is_that_of_the_codec(both, codecs):
    out, _ = both
    found = found_in(out)
    rows = torch.randperm(len(open_source(Images(data="digits:test", size=8))),
                          generator=torch.Generator().manual_seed(0))[:80]
    x = open_source(Images(data="digits:test", size=8)).fetch(rows.tolist(), 0).x.expand(-1, 3, -1, -1)
    for name, place in codecs.items():
        if name != "other":
            told = of(found, name)["reconstruction"]
            values = psnr(train.load(place).reconstruct(x), x)
            assert torch.allclose(torch.tensor(told["values"]["psnr"]), values, rtol=1e-4)
            assert math.isclose(told["means"]["psnr"]["mean"], float(values.mean()), rel_tol=1e-4)
    assert found["front"]["on"] and found["about"]["n"] == 80


def test_a_codec_that_loses_nothing_is_at_distance_nothing():
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    lossless = fit_klt(x, 2, 12)

    def features(x):
        return x.flatten(1)[:, ::7]

    told, back = reconstruction(lossless, [(x, None)], {"psnr": psnr}, features, 4)
    assert told["means"]["psnr"]["mean"] > 60 and told["frechet"] < 1e-6 and torch.allclose(back, x[:4], atol=1e-3)
    half = fit_klt(x, 2, 6)
    assert reconstruction(half, [(x, None)], {"psnr": psnr}, features, 4)[0]["frechet"] > 0.05


def test_averages_of_blocks_move_with_their_picture():
    """The KLT of one channel of grey pictures is the mean of each block, as long as that varies most."""
    x = digits(200)
    found = moves(fit_klt(x.expand(-1, 3, -1, -1), 2, 12), x)
    assert all(0.5 < v < 1.5 for v in found.values())       # its details are signed: they turn into others
    flat = torch.nn.functional.interpolate(x[..., ::2, ::2], scale_factor=2)       # blocks without any detail
    found = moves(fit_klt(flat, 2, 1), flat)
    assert found["flip"] < 1e-6 and found["rotate"] < 1e-6 and found["halve"] is not None


def test_the_loss_of_an_exact_flow_is_the_irreducible_variance():
    """White latents: Var[v | x_t] / Var[v] is 1 / (2 ((1-t)^2 + t^2))."""
    z = torch.randn(20_000, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    found = priors.risks(gaussian((2, 2, 2)), z, None)
    for t, v in zip(found["times"], found["v"], strict=True):
        assert math.isclose(v, 1 / (2 * ((1 - t) ** 2 + t**2)), rel_tol=0.03)
    assert found["times"] == list(BINS) and math.isclose(found["mean"], sum(found["v"]) / 10)


def test_a_prior_that_is_told_the_class_may_come_below_viv_and_the_page_says_so(both):
    """The exact answers of a mixture, with labels and without."""
    mixture = Mixture.ring(4, std=0.2)
    z, y = mixture.draw(1500, torch.Generator().manual_seed(5))
    flow, told = Flow(mixture, (2,)), viv(z, z[:500], BINS)
    assert min(b - a for a, b in zip(told.in_sample, priors.risks(flow, z, None)["v"], strict=True)) > -0.05
    assert priors.risks(flow, z, y)["v"][5] < 0.5 * told.in_sample[5]
    line = "That is for a network that is not told the class"
    assert line in (both[0] / "compare.html").read_text("utf-8").partition("Loss of the prior over time")[2]
    found = found_in(both[0])
    notes = [t.note for t in report.tables(found) if t.title.startswith("Loss of the prior")]
    assert line in notes[0] and report.told_classes({"classes": None}) == ""


def test_a_look_at_a_checkpoint_is_a_run_of_so_many_steps(both):
    """The quarter's averaged weights are those of a run that ended there."""
    out, _ = both
    run = next((out / "coarse").glob("prior-*"))
    settings = dataclasses.replace(train.read_run(run, lambda _: FlowMatching)[1], steps=3, out=out.parent / "short")
    assert isinstance(settings, FlowMatching.Settings)
    flow: Flow = train.load(train.start(FlowMatching, settings, "flow", watch=train.Silent()))
    early, last = priors.flow_after(run, 3).state_dict(), priors.flow_after(run, 12).state_dict()
    assert all(torch.equal(v, early[k]) for k, v in flow.state_dict().items())
    assert all(torch.equal(v, last[k]) for k, v in train.load(run).state_dict().items())
    assert any(not torch.equal(v, early[k]) for k, v in last.items())
    assert priors.marks(13) == (3, 6, 13)


@pytest.mark.parametrize("steps", [4, 7, 11, 15, 3000])
def test_every_look_has_a_checkpoint_that_is_kept(steps):
    s = priors.prior_settings(budget(steps=steps), Path("z"), 4, Path("out"), "cpu")
    written = sorted({*range(s.checkpoint_every, steps + 1, s.checkpoint_every), steps})
    assert set(priors.marks(steps)) <= set(written[-s.keep :])


def test_codecs_of_any_factor_get_as_many_tokens():
    of = budget(tokens=4)
    assert {side // priors.patch_for(of, side) for side in (4, 8, 16, 32)} == {4}
    assert [priors.patch_for(of, side) for side in (1, 2, 6, 7)] == [1, 1, 2, 7]


def test_the_deviation_is_that_of_drawing_other_samples():
    draws = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 3, generator=draws)
    sets = [1.5 * torch.randn(300, 3, generator=draws) + 0.5 for _ in range(60)]
    exact = torch.tensor([priors.frechet(x, Moments(3).add(real)) for x in sets]).std()
    told = torch.tensor([priors.against(x, real, 0)["deviation"] for x in sets[:10]]).mean()
    assert 0.7 < float(told / exact) < 1.4
    same = priors.against(real[:2000], real[2000:], 0)
    assert same["frechet"] < 0.02 and same["precision"] > 0.95 and same["recall"] > 0.95


def test_distances_to_a_reference():
    z, w, again = (torch.randn(600, 4, 2, 2, generator=torch.Generator().manual_seed(s)) for s in range(3))
    near = distance_to(z, w, again, 0)
    assert abs(near["latents"]["energy"]) < 0.02 and abs(near["floor"]["energy"]) < 0.02
    far = distance_to(z + 0.5, w, again, 0)         # a shift c has W2^2 = |c|^2 / D in the mean over directions
    assert math.isclose(far["latents"]["sliced_w2"], math.sqrt(0.25 + near["latents"]["sliced_w2"] ** 2), rel_tol=0.1)
    assert far["floor"] == near["floor"] and far["latents"]["energy"] > 0.5
    assert near["latents"]["sliced_w2"] == sliced_wasserstein(z.flatten(1), w.flatten(1))


def test_probes_of_latents_read_classes_where_they_lie():
    draws = torch.Generator().manual_seed(0)
    y, held_y = torch.arange(200) % 2, torch.arange(100) % 2

    def latents(y):                     # the class turns the sign of a stripe: it vanishes in the mean over places
        stripe = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
        return (2.0 * y - 1)[:, None, None, None] * 3 * stripe + torch.randn(len(y), 1, 2, 2, generator=draws)

    found = probes(latents(y), y, latents(held_y), held_y)
    assert found["flattened"]["linear"].accuracy == 1 and found["flattened"]["knn"].accuracy == 1
    assert abs(found["pooled"]["linear"].accuracy - 0.5) < 0.16
    assert "no labels" in probes(latents(y), None, latents(held_y), held_y)["why"]


# ---- what it says ----

def codec(name: str, values: list[float], distance: float, deviation: float = 0.1, early: float = 9e9) -> dict:
    mean = sum(values) / len(values)
    rows = [{"step": s, "guidance": 1.0, "frechet": f, "deviation": deviation} for s, f in ((5, early), (20, distance))]
    return {"name": name, "generation": rows,
            "reconstruction": {"values": {"psnr": values}, "means": {"psnr": {"mean": mean}}}}


def noisy(mean: float, seed: int) -> list[float]:
    return (mean + np.random.default_rng(seed).standard_normal(50)).tolist()


def test_the_front():
    faithful, easy, behind = codec("faithful", noisy(30, 0), 9.0), codec("easy", noisy(20, 1), 3.0), \
        codec("behind", noisy(19, 2), 9.5)
    found = front([faithful, easy, behind], {"frechet": 0.5})
    assert found["on"] == ["faithful", "easy"] and found["behind"] == {"behind": ["faithful", "easy"]}
    told = " ".join(found["sentences"])
    assert "from easy to model to faithful: easy (19.96" in told and "behind is behind faithful and easy" in told
    assert "to a Fréchet distance of 0.5" in told and "another --seed" in told


def test_what_noise_hides_is_not_read():
    a, b = codec("a", noisy(20, 0), 5.0, 0.5), codec("b", noisy(20, 0), 5.6, 0.5)
    assert clear_distance(b, a) == 0 and clear_psnr(b, a) == 0
    assert "their order in modelling cannot be read" in " ".join(front([a, b], {"frechet": 0.5})["sentences"])
    assert front([a, b], {"frechet": 0.5})["on"] == ["a", "b"]
    paired = codec("c", [v + 0.01 for v in noisy(20, 0)], 5.6, 0.5)     # better on every picture, if only a little
    assert clear_psnr(paired, a) == 1 and clear_psnr(a, paired) == -1
    assert front([a, paired], {"frechet": 0.5})["behind"] == {"a": ["c"]}
    lossless = codec("d", [1.0], 5.0)
    lossless["reconstruction"] = {"values": {"psnr": [None]}, "means": {"psnr": {"mean": None}}}
    assert clear_psnr(lossless, codec("e", [1.0], 5.0)) == 0
    assert "no error" in front([lossless], {"frechet": 0.5})["sentences"][0]


def test_a_prior_that_is_there_sooner_is_named():
    fast, slow = codec("fast", noisy(20, 0), 3.0, early=4.0), codec("slow", noisy(30, 0), 5.0)
    assert "fast after 5 steps is where slow is after 20." in front([slow, fast], {"frechet": 0.5})["sentences"]


def test_of_many_codecs_it_names_those_ahead_and_leaves_figures_to_the_tables():
    best, *others = [codec(name, noisy(30 - i, i), 1.0 + 2 * (i > 0), early=early) for i, (name, early) in enumerate(
        [("best", 2.9), ("a", 9.0), ("b", 9.0), ("c", 9.0), ("d", 9.0)])]
    told = front([best, *others], {"frechet": 0.5})["sentences"]
    assert "d is behind best, a, b and c." in told
    assert any(line.startswith("c is behind best, a and b: best has ") for line in told)
    assert "best after 5 steps is where a, b, c and d are after 20." in told
    assert any(line.endswith("cannot be read: a beside b, c and d; b beside c and d; c beside d.") for line in told)


# ---- what it prints and writes ----

def test_the_page_and_the_terminal_say_what_the_json_says(both):
    out, told = both
    found, html = found_in(out), (out / "compare.html").read_text("utf-8")
    read = Read(html)
    assert read.inside("h1") == ["coarse, fine"]
    cells = read.inside("td")
    told = " ".join(told.split())
    for c in found["codecs"]:
        values = [row["frechet"] for row in c["generation"]] + [c["prior"]["mean"], c["reconstruction"]["frechet"]]
        values += [c["reconstruction"]["means"]["psnr"]["mean"], *c["prior"]["v"], *c["latents"]["moves"].values()]
        for value in [number(v) for v in values if v is not None] + [f"{c['what']['numbers']}"]:
            assert any(cell == value or cell.startswith(f"{value} ±") for cell in cells), value
            assert value in told
        share = f"{c['latents']['probes']['flattened']['linear']['accuracy']:.1%}"
        assert share in cells and share in told
        assert number(c["reference"]["latents"]["energy"], 3) in " ".join(cells)
    for sentence in found["front"]["sentences"]:
        assert sentence in " ".join(read.inside("p")) and sentence in told
    assert [g["step"] for g in found["codecs"][0]["generation"]] == [3, 3, 6, 6, 12, 12]
    for needed in ("LPIPS: needs --lpips", "rFID: needs --inception", "SSIM ↑: pictures of 8 pixels"):
        assert any(cell.startswith(needed) for cell in cells) and needed in told
    assert html.count("<img ") == 7 and "http" not in re.sub(r"http://www.w3.org\S*|http-equiv", "", html)
    assert "page: " in told


def test_it_fits_a_terminal_of_eighty_columns(both, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        report.in_terminal(found_in(both[0]))
    lines = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80 and any("Fréchet ↓, 12 steps, guidance 1.5" in line for line in lines)


def test_a_browser_shows_the_page(both, tmp_path):
    browser()
    dom, console = opened(both[0] / "compare.html", tmp_path / "profile")
    assert [line for line in console.splitlines() if "CONSOLE" in line] == []
    assert "Reconstruction against modelling" in Read(dom).inside("h2")
    assert "held-out pictures" in Read(dom).inside("text")


# ---- what it keeps ----

def test_a_second_comparison_measures_nothing_and_one_more_codec_only_adds(both, codecs, counted):
    out, told = both
    before, page = found_in(out), (out / "compare.html").read_bytes()
    kept = {p: p.stat().st_mtime_ns for name in ("coarse", "fine") for p in (out / name).rglob("*") if p.is_file()}
    again = compared(codecs["coarse"], codecs["fine"], TINY, "--reference gaussian --out", out)
    assert [name for name in counted if name != "pooled"] == [] and again == told
    assert found_in(out) == before and (out / "compare.html").read_bytes() == page
    compared(codecs["coarse"], codecs["fine"], codecs["other"], TINY, "--reference gaussian --out", out)
    assert counted.count("start") == 1 and counted.count("generation") == 1 and "resume" not in counted
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    more = found_in(out)
    assert more["codecs"][:2] == before["codecs"] and [c["name"] for c in more["codecs"]] == ["coarse", "fine", "other"]
    compared(codecs["coarse"], codecs["fine"], TINY, "--reference gaussian --out", out)     # as others expect it


def test_only_what_depends_on_a_setting_is_measured_anew(codecs, tmp_path, counted):
    place = codecs["coarse"]
    compared(place, TINY, "--out", tmp_path)
    encoded = counted.count("encode")
    assert counted.count("start") == 1 and counted.count("generation") == 1 and encoded > 0
    first = found_in(tmp_path)
    counted.clear()
    compared(place, TINY, "--guidance 2 --out", tmp_path)           # other samples of the same prior
    assert "start" not in counted and "encode" not in counted and counted.count("generation") == 1
    guided = found_in(tmp_path)
    plain = [[row for row in f["codecs"][0]["generation"] if row["guidance"] == 1] for f in (first, guided)]
    assert plain[0] == plain[1] and first["codecs"][0]["prior"] == guided["codecs"][0]["prior"]
    counted.clear()
    compared(place, TINY.replace("--steps 12", "--steps 8"), "--out", tmp_path)     # another prior, the same latents
    assert counted.count("start") == 1 and len(list((tmp_path / "coarse").glob("latents-*"))) == 1
    assert found_in(tmp_path)["codecs"][0]["latents"] == first["codecs"][0]["latents"]
    counted.clear()
    compared(place, TINY, "--seed 1 --out", tmp_path)               # everything
    assert counted.count("start") == 1 and len(list((tmp_path / "coarse").glob("latents-*"))) == 2


def lpips_at(folder: Path) -> Path:
    """Weight files of SqueezeNet's LPIPS, of new random numbers."""
    net = Lpips("squeeze")
    folder.mkdir(exist_ok=True)
    beside = {"classifier.1.weight": torch.zeros(1), "classifier.1.bias": torch.zeros(1)}
    torch.save(net.backbone.state_dict() | beside, folder / "squeezenet1_1-b8a52dc0.pth")
    torch.save(net.heads.state_dict(), folder / "squeeze.pth")
    return folder


def test_what_it_is_held_against_is_known_by_its_content(codecs, tmp_path, counted):
    """A file of samples and one of weights that were written over are others."""
    samples, lpips, out = tmp_path / "s.npz", lpips_at(tmp_path / "lpips"), tmp_path / "out"

    def again() -> dict:
        counted.clear()
        compared(codecs["coarse"], TINY, "--reference", f"samples:{samples}", "--lpips", lpips, "--out", out)
        return found_in(out)["codecs"][0]

    np.savez(samples, x=np.random.default_rng(0).normal(size=(40, 2, 2, 2)).astype(np.float32))
    first = again()
    assert again() == first and "encode" not in counted
    np.savez(samples, x=np.random.default_rng(0).normal(3, size=(40, 2, 2, 2)).astype(np.float32))
    moved = again()
    away = [c["reference"]["latents"]["sliced_w2"] for c in (first, moved)]
    assert away[1] > away[0] + 1 and "start" not in counted
    assert {**moved, "reference": None} == {**first, "reference": None}
    lpips_at(lpips)
    again()
    assert "encode" in counted and "start" not in counted and "generation" not in counted


def test_a_reference_is_named_by_its_weights_and_how_it_is_built(tmp_path):
    def laws(seed: int, steps: int) -> list[list[str]]:
        torch.manual_seed(seed)
        flow = Flow(Denoiser(MLP(2, 8, 1), Linear(), "v"), (2,), "euler", steps)
        save_product(Product("flow", {"flow": flow}), tmp_path / "flow")
        return [comparison.law_of(f"{form}{tmp_path / 'flow'}") for form in ("", "noised:0.3:")]

    first = laws(0, 4)
    assert laws(0, 4) == first
    for others in (laws(1, 4), laws(0, 5)):
        assert all(a != b for a, b in zip(first, others, strict=True))
    assert [comparison.law_of(text) for text in ("gmm:4", "some/hub-id")] == [["gmm:4"], ["some/hub-id"]]


def test_killed_in_a_prior_it_goes_on_to_the_same_end(codecs, tmp_path, counted, monkeypatch):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    compared(codecs["coarse"], TINY, "--out", whole)

    class Stops(train.Silent):
        def row(self, row):
            if row["step"] == 8:
                raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(progress, "watch_for", lambda quiet: Stops())
        assert stillroom("compare", codecs["coarse"], TINY, "--out", cut).code == 130
    with monkeypatch.context() as patched:
        patched.setattr(priors, "generation", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compared(codecs["coarse"], TINY, "--out", cut)
    assert counted.count("resume") == 1
    counted.clear()
    compared(codecs["coarse"], TINY, "--out", cut)
    assert "start" not in counted and "resume" not in counted and counted.count("generation") == 1

    def timeless(found: dict) -> dict:
        found["codecs"][0]["prior"].pop("seconds")
        return {**found, "settings": None}

    assert timeless(found_in(cut)) == timeless(found_in(whole))


def test_a_part_is_named_by_all_its_pixels_labels_and_classes():
    x, y = torch.rand(70, 3, 8, 8), torch.arange(70) % 2
    rows = torch.arange(70)

    def digest(x, y=y, classes=("a", "b"), rows=rows):
        return pictures.Part(Tensors(x, y, classes, "given"), rows).digest

    last, relabelled = x.clone(), y.clone()
    last[-1, -1, -1, -1] += 1
    relabelled[-1] = 0
    assert digest(x) == digest(x.clone())
    others = [digest(last), digest(x, relabelled), digest(x, y, ("a", "c")), digest(x, rows=rows.flip(0))]
    assert len({digest(x), *others}) == 5


def test_pictures_that_could_not_be_read_are_told_once(tmp_path):
    for i in range(80):
        Image.new("RGB", (8, 8), (3 * i, 0, 9)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "05.png").write_bytes(b"")
    asked = OfCodecs(data=str(tmp_path), size=8, n=40, pictures=40, bad_share=0.1)
    learned, held, _ = pictures.pictures_of(asked)
    space, told = Space("pixels", lambda x: x.flatten(1)), list[str]()
    for _ in range(2):
        pictures.real_features(tmp_path, learned, held, space, told.append)
    line = (f"{tmp_path}: 1 of 80 pictures seen could not be read, and others took their place: {tmp_path}/05.png "
            "(empty)")
    assert [text for text in told if "could not be read" in text] == [line] * 2


# ---- other data ----

def test_pictures_without_labels_say_so(codecs, tmp_path):
    told = compared(codecs["fine"], TINY.replace("digits", "leaves"), "--size 16 --out", tmp_path)
    assert "probes: the data have no labels" in told and "with guidance: the data have no labels" in told
    found = found_in(tmp_path)["codecs"][0]
    assert {row["guidance"] for row in found["generation"]} == {1.0} and not (tmp_path / "fine" / "guided.png").exists()
    assert found["reconstruction"]["means"]["ssim"]["n"] == 80


def test_of_a_mixture_held_out_pictures_are_those_of_its_test_splits():
    asked = OfCodecs(data="leaves+0.5*shapes", size=8, n=40, pictures=60)
    learned, held, _ = pictures.pictures_of(asked)
    assert held.name == "leaves:test+0.5*shapes:test" and len(held) == 40 and len(learned) == 60
    with pytest.raises(Refusal, match="leaves:test has no test split"):
        pictures.pictures_of(dataclasses.replace(asked, data="leaves:test+shapes"))


def test_a_folder_of_classes_is_set_aside_in_part(codecs, tmp_path):
    draws = np.random.default_rng(0)
    for i in range(90):
        folder = tmp_path / "pictures" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "pictures/class 0/8.png").write_bytes(b"")
    told = compared(codecs["other"], codecs["fine"], TINY.replace("digits", str(tmp_path / "pictures")),
                    "--size 8 --bad-share 0.1 --out", tmp_path / "out.html")
    about = found_in(tmp_path / "out")["about"]
    assert "45, set aside" in about["held_out"] and about["classes"] == 2
    line = "1 of 90 pictures seen could not be read, and others took their place"
    (note,) = about["notes"]
    html = (tmp_path / "out.html").read_text("utf-8")       # the page by its name, its folder beside it
    assert not (tmp_path / "out" / "compare.html").exists() and f"page: {tmp_path / 'out.html'}" in told
    assert line in note and line in " ".join(told.split()) and line in html


def test_a_codec_that_learned_from_where_held_out_pictures_come_from_is_named(codecs, tmp_path, monkeypatch):
    """By the record of its run, whatever the place was called; what is of the test split alone is new to it."""
    (tmp_path / "pictures").mkdir()
    for i in range(64):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    for name, data in (("own", str(tmp_path / "pictures")), ("mixed", "leaves+0.5*shapes:train"), ("other", "leaves")):
        shutil.copytree(codecs["fine"], tmp_path / name / "product")
        (tmp_path / name / "run.json").write_text(json.dumps({"inputs": {"data": {"name": data}}}))
    specs = {name: tmp_path / name / "product" for name in ("own", "mixed", "other")} | {"alone": codecs["fine"]}
    entries = [comparison.Entry(name, str(spec), comparison.codec_at(str(spec)), "") for name, spec in specs.items()]

    def told(data: str, heldout: str = "") -> list[str]:
        _, held, _ = pictures.pictures_of(OfCodecs(data=data, heldout=heldout, size=8, n=32))
        return comparison.seen_before(entries, held)

    (note,) = told("pictures")
    assert note.startswith("own learned from pictures too: ") and "new to the priors, and not to it" in note
    assert told("shapes") == [] and told("shapes:test", heldout="shapes")[0].startswith("mixed learned from shapes")
    (note,) = told("leaves:test", heldout="leaves")
    assert note.startswith("mixed and other learned from ") and "not to them" in note
    with pytest.raises(Refusal, match="--heldout leaves: is what --data names"):
        told("leaves", heldout="leaves")


def test_features_of_a_run_are_the_common_space(codecs, tmp_path):
    run = tmp_path / "features"
    made = stillroom("train features --data digits --size 8 --steps 2 --batch 8 --precision float32 --quiet --out", run)
    assert made.code == 0, made.err
    compared(codecs["coarse"], TINY, "--features", run, "--out", tmp_path / "out")
    assert found_in(tmp_path / "out")["about"]["space"].startswith("features ")
    asked = OfCodecs(data="digits", n=40, pictures=40, features=str(run))
    part = pictures.pictures_of(asked)[0]
    x, net = part.first(40), train.load(run)
    for net_of, of in (("digits", x), ("leaves", x.expand(-1, 3, -1, -1))):        # grey in what the net takes
        if net_of == "leaves":
            made = stillroom("train features --data leaves --size 8 --steps 2 --batch 8 --precision float32 --quiet "
                             "--out", tmp_path / "colour")
            assert made.code == 0, made.err
            net, asked = train.load(tmp_path / "colour"), dataclasses.replace(asked, features=str(tmp_path / "colour"))
        space = pictures.space_of(asked, part, torch.device("cpu"))
        assert torch.allclose(space.of(x.expand(-1, 3, -1, -1)), net.pooled(of).detach(), atol=1e-5)
    weights = tmp_path / "none.pth"
    b = tmp_path / "b"
    assert "one feature space" in refused(codecs["coarse"], TINY, "--features", run, "--inception", weights, "--out", b)
    assert "weight file is missing" in refused(codecs["coarse"], TINY, "--inception", weights, "--out", b)
    told = refused(codecs["coarse"], TINY.replace("digits", "leaves"), "--size 16 --features", run, "--out", b)
    assert "features" in told and not b.exists()


# ---- what it refuses ----

def test_refusals(codecs, tmp_path):
    coarse, fine, out = codecs["coarse"], codecs["fine"], tmp_path / "out"
    for told, words in {
        "usage: stillroom compare CODEC": (TINY,),
        "--data must be given": (coarse, "--steps 8"),
        "two codecs are called 'coarse'": (coarse, coarse, TINY),
        "two codecs are called 'a'": (f"a={coarse} a={fine}", TINY),
        "write NAME=CODEC": (f"a/b={coarse}", TINY),
        "--size 10 is no multiple of 4": (coarse, TINY, "--size 10"),
        "say how large": (coarse, TINY.replace("digits", "leaves")),
        "a quarter of them": (coarse, TINY.replace("--steps 12", "--steps 3")),
        "no codec is called 'courser'; did you mean 'coarse'?": (coarse, TINY, "--reference courser=gaussian"),
        "no reference is called 'gausian'": (coarse, TINY, "--reference gausian"),
        "no such file of samples": (coarse, TINY, "--reference samples:nowhere.npz"),
        "nosuch: no such file or folder; give a run, `bundled`": ("nosuch nosuch2",),
        "pictures are too few": (coarse, TINY.replace("--n 80", "--n 20")),
        "its pictures or classes": (coarse, TINY, "--heldout leaves:test"),
        "holds no codec": (tmp_path, TINY),
    }.items():
        assert told in refused(*words, "--out", out), told
    assert not out.exists()         # before anything was done


def test_names_of_codecs(tmp_path):
    (tmp_path / "a=b" / "product").mkdir(parents=True)
    assert comparison.called("bundled") == ("bundled", "bundled")
    assert comparison.called("x/taesd_v1.safetensors") == ("taesd_v1", "x/taesd_v1.safetensors")
    assert comparison.called("some/hub-id") == ("hub-id", "some/hub-id")
    assert comparison.called("mine=runs/tok") == ("mine", "runs/tok")
    assert comparison.called(str(tmp_path / "a=b" / "product"))[0] == "a-b"


def test_a_codec_of_nans_is_refused_and_not_compared(codecs, tmp_path):
    broken = train.load(codecs["coarse"])
    broken.decoder.basis.fill_(math.nan)
    assert "NaN" in refused(made(tmp_path / "broken", broken), TINY, "--out", tmp_path / "out")


def test_a_codec_that_says_nothing_is_refused(codecs, tmp_path):
    dumb = train.load(codecs["coarse"])
    dumb.encoder.basis.zero_()
    assert "nothing to model" in refused(made(tmp_path / "dumb", dumb), TINY, "--out", tmp_path / "out")


def test_power_is_drawn_in_thirds_of_octaves():
    radii = np.geomspace(0.05, 1.4, 200)
    x, y = plots.binned(radii.tolist(), (radii**-2).tolist())
    assert len(x) == 15 and np.allclose(y, x**-2)           # a straight line stays one


def test_an_exact_gaussian_stands_for_a_flow():
    """`risks` asks any flow, and a denoiser of correlated latents beats the white one on them."""
    mix = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1)) @ torch.linalg.cholesky(mix).T
    exact = priors.risks(Flow(Gaussian(torch.zeros(2), mix), (2,)), z, None)
    white = priors.risks(Flow(Gaussian(torch.zeros(2), torch.eye(2)), (2,)), z, None)
    assert all(a <= b + 1e-3 for a, b in zip(exact["v"], white["v"], strict=True))
    assert exact["mean"] < 0.9 * white["mean"]
