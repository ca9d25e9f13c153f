"""`stillroom inspect`: what it prints and writes of data, latents, codecs and flows, and what it refuses."""

import dataclasses
import json
import math
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image

from command import TINY, complaint, printed, stillroom
from stillroom.claims.drifting_scatter import SETTINGS
from stillroom.codecs.klt import fit_klt
from stillroom.data import Batch, Encoding, LatentSpace, write_latents
from stillroom.flows import Denoiser, FewStep, Flow, Gaussian, OneStep
from stillroom.judge.asked import Inspection
from stillroom.judge.inspection import followed
from stillroom.measure.groups import FAILS, WORKS
from stillroom.nets import MLP, DiT
from stillroom.paths import VE, Cosine, Linear
from stillroom.report import geometry_words
from stillroom.report.geometry_words import verdict
from stillroom.train.product import save_product
from stillroom.train.recipe import Product
from test_report import Read, browser, opened

SPACE = LatentSpace(3, 4, (0.5, 0.0, -1.0), (1.0, 2.0, 4.0))
ENCODING = Encoding(SPACE, "a" * 64, "centre 16")
QUICK = "--n 200 --flow-samples 16 --flow-steps 4"


def inspected(*words: str | Path) -> str:
    return printed("inspect", *words)


def refused(*words: str | Path) -> str:
    return complaint("inspect", *words)


def store(folder: Path, n: int = 240, groups: int = 2, labelled: bool = True, encoding: Encoding = ENCODING,
          seed: int = 0, x: torch.Tensor | None = None) -> Path:
    """Latents [3, 2, 2] in groups far apart, that are the classes or are told to nobody."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % groups
    z = torch.randn(n, 3, 2, 2, generator=draws) + 6 * torch.randn(groups, 3, 1, 1, generator=draws)[y]
    z = encoding.space.denormalise(z if x is None else x)
    names = [f"group {g}" for g in range(groups)] if labelled else None
    return write_latents(folder, [Batch(z, y if labelled else None)], encoding, names)


def made(place: Path, kind: str, module, encoding: Encoding | None = None) -> Path:
    extra = {} if encoding is None else json.loads(json.dumps({"encoding": dataclasses.asdict(encoding)}))
    save_product(Product(kind, {kind: module}, extra), place)
    return place


def small_flow(shape: tuple[int, ...] = (3, 2, 2), classes: int | None = 2) -> Flow:
    torch.manual_seed(0)
    net = DiT(shape[0], shape[1], 1, 16, 1, 1, classes=classes)
    for weight in net.parameters():                 # its last layer begins at 0
        torch.nn.init.normal_(weight, std=0.3)
    return Flow(Denoiser(net, Linear(), "v"), shape, "euler", 4)


def portrait(found: dict, over: str, stage: str) -> dict:
    return next(p for p in found["places"][0]["portraits"] if (p["over"], p["stage"]) == (over, stage))


def test_a_store_of_latents(tmp_path):
    page = tmp_path / "new" / "page.html"
    told = inspected(store(tmp_path / "z"), "--n 200 --out", page)
    assert told.rstrip().endswith(f"page: {page}")
    for words in ("Elements, after normalisation", "Tokens, before normalisation", "Pooled, after normalisation",
                  "z, within class", "clusters within each class", "no flow was given", "Take R = "):
        assert words in " ".join(told.split()), words
    html = page.read_text()
    assert "Where trajectories bend" not in html and html.count("<svg") == 9 and "src=\"http" not in html
    found = json.loads(page.with_suffix(".json").read_text())
    assert [(p["over"], p["stage"]) for p in found["places"][0]["portraits"]] == [
        (over, stage) for over in ("element", "token", "pooled") for stage in ("after", "before")]
    after, before = portrait(found, "token", "after"), portrait(found, "token", "before")
    taken = after["spectra"]["within class"]["taken"]
    assert taken == {"over": "token", "scope": "within class", "stage": "after", "n": 800, "d": 3}
    assert after["spectra"]["within class"]["participation"] == pytest.approx(3, rel=0.1)
    values = torch.tensor([1.0, 4.0, 16.0])         # the scales' squares
    expected = float(values.sum() ** 2 / values.square().sum())
    assert before["spectra"]["within class"]["participation"] == pytest.approx(expected, rel=0.1)
    labels = portrait(found, "element", "after")["groupings"]["labels"]
    assert labels["eta"] > 0.8 and labels["count"] == [2, 2]
    again = inspected(tmp_path / "z", "--n 200")
    assert again == told[: told.index("page:")]


def test_groups_that_nobody_names_are_looked_for(tmp_path):
    told = inspected(store(tmp_path / "z", labelled=False), "--n 240")
    assert "drifting may well work" in told.lower() and "clusters of all samples (k-means, k = 2" in told
    assert "within class" not in told.split("Trajectories")[0] and "there are no labels" in told


def test_a_single_gaussian_has_no_groups_and_kappa_abstains(tmp_path):
    x = torch.randn(240, 3, 2, 2, generator=torch.Generator().manual_seed(4))
    told = inspected(store(tmp_path / "z", labelled=False, x=x))
    assert "Kappa abstains: no groups were found" in told and "hardly more than k-means finds" in told
    told = inspected(store(tmp_path / "one", groups=1))
    assert "all samples are of one class" in told


def test_side_by_side_with_the_flow_of_one(tmp_path):
    flow = made(tmp_path / "flow", "flow", small_flow(), ENCODING)
    a, b = store(tmp_path / "a"), store(tmp_path / "b", seed=1)
    page = tmp_path / "page.html"
    told = inspected(a, "--against", b, "--flow", flow, QUICK, "--out", page)
    assert "a, global" in told and "b, within class" in told and "straightness" in told
    assert "Where trajectories bend" in page.read_text()
    first, second = json.loads(page.with_suffix(".json").read_text())["places"]
    assert first["trajectories"]["steps"] == 4 and second["trajectories"] == {"why": "no flow was given: --flow RUN"}


def test_a_browser_shows_two_codecs_side_by_side(tmp_path):
    browser()
    x = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, codec in (("coarse", fit_klt(x, 4, 3)), ("fine", fit_klt(x, 2, 3))):
        made(tmp_path / name, "codec", codec)
    page = tmp_path / "page.html"
    inspected(tmp_path / "coarse", "--against", tmp_path / "fine", "--data digits --size 8", QUICK, "--out", page)
    dom, console = opened(page, tmp_path / "profile")
    assert [line for line in console.splitlines() if "CONSOLE" in line] == []
    shown = Read(dom)
    assert shown.inside("h1") == ["coarse, fine"]
    assert {"Will drifting work in coarse?", "Will drifting work in fine?", "Spectra"} <= set(shown.inside("h2"))
    assert {"coarse", "fine"} <= set(shown.inside("text"))          # the figures' key: text of the page, not pixels
    heads = shown.inside("th")
    assert {"coarse, global", "fine, global", "coarse, within class", "fine, within class"} <= set(heads)


def test_codecs_side_by_side_look_at_pictures_of_one_size(tmp_path):
    """That of the first whose run has one, told on the page; and only what is missing is asked for."""
    x = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name, card in (("small", {"size": 8}), ("large", {"size": 16}), ("none", {})):
        save_product(Product("codec", {"codec": fit_klt(x, 4, 3)}, card), tmp_path / name)
    page = tmp_path / "page.html"
    inspected(tmp_path / "none", "--against", tmp_path / "small", tmp_path / "large", "--data digits", QUICK, "--out",
              page)
    found = json.loads(page.with_suffix(".json").read_text())
    assert [place["what"] for place in found["places"]] == ["latents of digits:train, 8 px"] * 3
    assert refused(tmp_path / "none", "--data digits").endswith("a codec needs pictures to encode: --size PIXELS")


def test_a_codec_encodes_what_it_is_given(tmp_path):
    x = torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codec = fit_klt(x, 4, 3)
    place = made(tmp_path / "codec", "codec", codec)
    told = inspected(place, "--data digits --size 16", QUICK)
    assert "latents of digits:train" in told and "48 numbers each" in told
    assert "say how large" not in told and "--data DATA --size" in refused(place)
    assert "no multiple of 4" in refused(place, "--data digits --size 18")


def test_a_flow_and_a_generator_are_measured_by_their_samples(tmp_path):
    flow = made(tmp_path / "flow", "flow", small_flow(), ENCODING)
    told = inspected(flow, QUICK)
    assert "samples of a flow" in told and "Elements, before normalisation" in told and "turning" in told
    one = OneStep(DiT(3, 2, 1, 16, 1, 1, classes=2), Linear(), "v", (3, 2, 2))
    generator = made(tmp_path / "generator", "generator", one, ENCODING)
    told = inspected(generator, QUICK)
    assert "samples of a generator" in told and "has no trajectories" in told
    assert "this generator takes one step, not 3" in refused(generator, QUICK, "--steps 3")
    few = FewStep([small_flow().denoiser], (3, 2, 2), [(1.0, 0.5, 0.0), (1.0, 0.0)], "renoise")
    few = made(tmp_path / "few", "generator", few, ENCODING)
    assert inspected(few, QUICK, "--steps 2") == inspected(few, QUICK) != inspected(few, QUICK, "--steps 1")
    assert "ring" in inspected("ring:8", QUICK)
    assert "samples of a flow" in inspected("grid:3", QUICK)
    still = Flow(Denoiser(DiT(3, 2, 1, 16, 1, 1, classes=2), Linear(), "v"), (3, 2, 2), "euler", 4)
    told = inspected(made(tmp_path / "still", "flow", still, ENCODING), QUICK)
    assert "not followed: the flow moves nothing" in told and "Take R = " in told


def test_trajectories_are_those_of_the_linear_path_whatever_the_flows_own():
    """The same Gaussian on three paths: its flow between noise and data is one and the same map."""
    settings = Inspection(flow_steps=60, flow_samples=32)
    found = []
    for path in (Linear(), Cosine(), VE()):
        denoiser = Gaussian(torch.zeros(3), torch.diag(torch.tensor([1.0, 0.25, 0.04])), path)
        found.append(followed(Flow(denoiser, (3,)), settings))
    for other in found[1:]:
        assert other.path_ratio == pytest.approx(found[0].path_ratio, rel=0.02)
        assert other.straightness == pytest.approx(found[0].straightness, rel=0.05)


def test_pictures_and_points(tmp_path):
    told = inspected("digits", QUICK)
    assert "8 numbers each" not in told and "(pixels, 64 numbers each, not normalised)" in told
    assert "Tokens" not in told                     # of one channel they are numbers
    assert "--size PIXELS" in refused("shapes", QUICK)
    run = tmp_path / "run"
    assert stillroom(f"train flow {TINY} --steps 2 --sampler-steps 2 --quiet --out", run).code == 0
    assert "samples of a flow" in inspected(run, "--n 64 --flow-samples 8 --flow-steps 3")
    assert "Trajectories" in inspected("digits", "--flow", run, "--n 100 --flow-samples 8 --flow-steps 3")


def test_pictures_that_could_not_be_read_are_told(tmp_path):
    noise = torch.randint(256, (120, 8, 8, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    (tmp_path / "data").mkdir()
    for i, each in enumerate(noise):
        Image.fromarray(each).save(tmp_path / "data" / f"{i:03}.png")
    (tmp_path / "data" / "007.png").write_bytes(b"")
    codec = made(tmp_path / "codec", "codec", fit_klt(torch.rand(200, 3, 8, 8) * 2 - 1, 4, 3))
    line = "1 of 120 pictures seen could not be read, and others took their place"
    for words in ((tmp_path / "data",), (codec, "--data", tmp_path / "data")):
        page = tmp_path / "page.html"
        told = inspected(*words, "--size 8 --n 120 --out", page)
        (note,) = json.loads(page.with_suffix(".json").read_text())["places"][0]["notes"]
        assert line in note and "007.png (empty)" in note
        assert line in " ".join(told.split()) and line in page.read_text()


@pytest.mark.parametrize(("words", "reason"), [
    ("--n 8", "so few samples"), ("--wanted 1", "and not all"), ("--wanted 0.001", "one or more"),
    ("--particles 1", "must let"), ("--out page.png", "FILE.html"), ("--flow a b", "2 flows for 1 places"),
    ("--temperatures 0", "must be above 0"), ("--smaples 4", "is not a setting"),
])
def test_settings_that_cannot_be(words, reason):
    assert reason in refused("digits", words)


def test_what_cannot_be_looked_at_is_one_line(tmp_path):
    a = store(tmp_path / "a")
    other = made(tmp_path / "other", "flow", small_flow((3, 4, 4)), ENCODING)
    assert "makes [3, 4, 4], and" in refused(a, "--flow", other)
    elsewhere = dataclasses.replace(ENCODING, codec="b" * 64)
    other = made(tmp_path / "elsewhere", "flow", small_flow(), elsewhere)
    assert "made on other latents" in refused(a, "--flow", other)
    other = made(tmp_path / "three", "flow", small_flow(classes=3), ENCODING)
    assert f"it knows 3 classes, and {a} has 2" in refused(a, "--flow", other)
    other = made(tmp_path / "pictures", "flow", small_flow())
    assert "made on pictures" in refused(a, "--flow", other)
    constant = store(tmp_path / "constant", x=torch.full((240, 3, 2, 2), 0.3))
    assert "all samples are equal" in refused(constant)
    assert "too few" in refused(store(tmp_path / "few", n=20))
    bank = made(tmp_path / "bank", "features", MLP(2, 8, 1))
    assert "is no space" in refused(bank)
    for words in ("nowhere", "nowhere --size 8", "owner/model", "leaves+nowhere --size 8", "digits --against nowhere"):
        assert "no such file or folder; give a store of latents" in refused(words)
    assert "usage" in refused("")


def test_words_follow_the_numbers():
    """Grouping, index and threshold in words, from a record of each kind."""
    taken = {"over": "element", "scope": "global", "stage": "after", "n": 500, "d": 8}

    def told(eta: float, null: float):
        grouping = {"taken": taken, "name": "clusters of all samples", "count": [3, 3], "eta": eta, "null": null,
                    "null_std": 0.001}
        why = {"why": "there are no labels"}
        seen = {"taken": taken, "particles": 64, "temperatures": [0.02, 0.2], "measured": [0.1, 0.6],
                "predicted": [0.1, 0.6]}
        p = {"over": "element", "stage": "after", "spectra": {"global": {"participation": 8.0}, "within class": why},
             "seen": {"global": seen, "within class": why}, "curves": {"global": seen, "within class": why},
             "groupings": {"labels": why, "clusters": grouping, "clusters within class": why}}
        place = {"what": "latents", "shape": [8], "normalised": True, "portraits": [p],
                 "trajectories": {"why": "no flow was given"}}
        return verdict(place, {"temperatures": [0.2, 0.02], "wanted": 0.5, "particles": 64})

    works, fails, between, none = told(0.2, 0.05), told(0.03, 0.01), told(0.1, 0.02), told(0.3, 0.29)
    assert works.tone == "good" and "kappa = 5, grouping: clusters of all samples" in works.status
    assert fails.tone == "bad" and "miss the groups" in fails.status
    assert "2 of the 6 settings below 2 came" in " ".join(fails.sentences)
    assert between.tone == "open" and "kappa = 2.5" in between.status
    assert none.tone == "open" and "abstains" in none.status
    expected = 0.02 * (0.2 / 0.02) ** ((0.5 - 0.1) / 0.5)
    assert any(f"Take R = {expected:.2g}" in sentence for sentence in works.sentences)
    assert math.isclose(expected, 0.126, rel_tol=0.01)


def test_what_is_said_of_kappa_is_what_its_claim_found():
    said = geometry_words.FOUND
    kept = json.loads((files("stillroom") / f"claims/results/{geometry_words.CLAIM}.json").read_text())
    assert kept["verdict"] == geometry_words.VERDICT
    outcomes = {s: sum(found[f"{i}: {s.name}"] for found in kept["values"]["drifting"].values()) / len(kept["seeds"])
                for i, s in enumerate(SETTINGS, 1)}
    high, low = ([d for s, d in outcomes.items() if reads(s.kappa)]
                 for reads in (lambda kappa: kappa >= WORKS, lambda kappa: kappa < FAILS))
    assert f"{sum(d < 3 for d in high)} of the {len(high)} settings at 3" in said["works"]
    assert f"{sum(d < 3 for d in low)} of the {len(low)} settings below 2" in said["fails"]
    assert len(high) + len(low) == len(outcomes) and "none of its settings" in said["between"]
