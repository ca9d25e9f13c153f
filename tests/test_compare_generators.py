"""`stillroom compare` of flows and generators: what it measures against what is known, what it writes, keeps and
refuses."""

import contextlib
import csv
import io
import json
import math
import re
import shutil
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from safetensors.torch import save_file

from command import complaint, files, printed
from command import stillroom as called
from stillroom import train
from stillroom.codecs import Codec
from stillroom.data import LatentSpace, Tensors, digits
from stillroom.flows import Denoiser, Flow, Mixture, OneStep
from stillroom.judge import contenders
from stillroom.judge import runs as compared_runs
from stillroom.judge.asked import Evaluation
from stillroom.judge.sides import Side, open_real
from stillroom.measure.distances import paired_error
from stillroom.measure.diversity import contrast, relative_spread, saturated, spread_within
from stillroom.measure.images import as_8bit
from stillroom.measure.metrics import panel
from stillroom.nets import DiT
from stillroom.nets.coding import Decoder, Encoder
from stillroom.paths import Linear
from stillroom.recipes import find
from stillroom.recipes._students import Distillation
from stillroom.recipes.endpoint import Endpoint
from stillroom.recipes.flow import FlowMatching
from stillroom.report import compare_runs as report
from stillroom.report import compare_runs_plots as plots
from stillroom.report.words import number
from stillroom.settings import Optimizer, Refusal, seed_of
from stillroom.train import Product, Silent, start
from stillroom.train.product import save_product
from test_report import Read, browser, opened

PLAIN = {"precision": "float32", "device": "cpu", "log_every": 5}
RATE = Optimizer(lr=5e-3, clip=1.0, decay="cosine")
N = "--n 60 --reference 400 --quiet"


def compared(*words: str | Path) -> str:
    return printed("compare", *words)


def refused(*words: str | Path) -> str:
    return complaint("compare", *words)


def found_in(out: Path) -> dict:
    return json.loads((out / "compare.json").read_text())


# ---- runs ----


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Runs of points: a mixture's, by a small flow on it; and of small pictures."""
    home = tmp_path_factory.mktemp("runs")
    x, y = Mixture.ring(4, std=0.1).draw(800, torch.Generator().manual_seed(0))
    small = {"data": "given", "size": 1, "width": 32, "depth": 1, "batch": 128, "average": 0.98, "model": RATE, **PLAIN}
    ring = Tensors(x, y, list("abcd"), "ring")
    settings = FlowMatching.Settings(out=home / "flow", steps=200, **small)
    start(FlowMatching, settings, "flow", {"data": ring}, Silent())
    other = FlowMatching.Settings(out=home / "other", steps=200, seed=1, **small)
    start(FlowMatching, other, "flow", {"data": ring}, Silent())
    for name, teacher, seed in (("a", "flow", 0), ("a1", "flow", 1), ("a2", "flow", 2), ("far", "other", 0)):
        student(home / name, str(home / teacher), seed=seed)
    student(home / "mixed", "ring:4:0.1", origin=str(home / "flow"))
    torch.manual_seed(0)
    for name, channels, classes in (("grey", 1, 10), ("colour", 3, 10), ("nine", 1, 9)):
        net = DiT(channels, 8, 4, 32, 1, 1, classes=classes)
        save_product(Product("generator", {"generator": OneStep(net, Linear(), "v", (channels, 8, 8))}), home / name)
    flow = Flow(Denoiser(DiT(1, 8, 4, 32, 1, 1, classes=10), Linear(), "v"), (1, 8, 8), "euler", 3)
    save_product(Product("flow", {"flow": flow}), home / "pictures")
    save_product(Product("points", {"points": x[:40].contiguous()}), home / "points")
    save_product(Product("features", {"features": x[:1].contiguous()}), home / "features")
    return home


def student(out, teacher, steps=6, **more):
    settings = Endpoint.Settings(out=out, teacher=teacher, steps=steps, batch=32, pairs=64, teacher_steps=4,
                                 student=RATE, average=0.9, **more, **PLAIN)
    return start(Endpoint, settings, "endpoint", None, Silent())


@pytest.fixture(scope="module")
def both(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    told = compared(f"ours={home / 'a'},{home / 'a1'},{home / 'a2'}", home / "flow", N, "--out", out)
    return out, told


# ---- what it measures ----


def test_figures_are_those_of_the_samples_themselves(both, home):
    found = found_in(both[0])
    ours, flow = found["entries"]
    assert ours["name"] == "ours" and [r["place"] for r in ours["runs"]] == [str(home / n) for n in ("a", "a1", "a2")]
    teacher, model = train.load(home / "flow"), train.load(home / "a1")
    x, y = model.sample(60), model.labels(0, 60)
    run = ours["runs"][1]
    pair = paired_error(x, teacher.sample(60), y)
    assert math.isclose(run["paired"]["rms"], pair.rms, rel_tol=1e-5)
    assert math.isclose(run["paired"]["relative"], pair.relative, rel_tol=1e-5)
    reference = teacher.sample(400, compared_runs.seed_of(0, "reference"))
    told = panel(x, reference)
    (space,) = run["spaces"].values()
    assert all(math.isclose(space[k], told[k], rel_tol=1e-4, abs_tol=1e-5) for k in told)
    spread = spread_within(x, y) / spread_within(reference, teacher.labels(0, 400))
    assert math.isclose(run["diversity"], spread, rel_tol=1e-4)
    own = next(line for line in found["teacher"] if line["own"])
    assert own["spaces"] == flow["runs"][0]["spaces"]                   # the flow is the teacher: the same samples
    assert own["paired"]["rms"] < 1e-5 < run["paired"]["rms"] and run["modes"] is None
    assert [line["steps"] for line in found["teacher"]] == [1, 2, 8, 18]
    assert [line["evaluations"] for line in found["teacher"]] == [1, 3, 15, 35]
    assert run["evaluations"] == 1 and flow["runs"][0]["evaluations"] == 35


def test_costs_are_those_that_the_runs_recorded(both, home):
    run = found_in(both[0])["entries"][0]["runs"][0]
    assert run["cost"]["evaluations"] == {"student": 6 * 32, "teacher": 64 * 7}
    weights = sum(p.numel() for p in train.load(home / "a").parameters())
    assert run["cost"]["trained"] == weights == run["cost"]["weights"]
    assert run["cost"]["steps"] == 6 and run["cost"]["recipe"] == "endpoint" and run["cost"]["seconds"] > 0


def test_a_mixture_counts_its_modes_and_is_its_own_data(home, tmp_path):
    compared(home / "mixed", N, "--out", tmp_path)
    found = found_in(tmp_path)
    assert found["about"]["is_data"] and "ring:4:0.1" in found["about"]["reference"]
    assert found["floor"]["modes"]["held"] == 4 and found["floor"]["modes"]["good"] > 0.95
    assert abs(found["floor"]["modes"]["spread"] - 1) < 0.25
    own = next(line for line in found["teacher"] if line["own"])
    assert own["modes"]["held"] == 4 and own["modes"]["apart"] < 0.05


def test_a_grid_is_a_mixture_too(home, tmp_path):
    student(tmp_path / "grid", "grid:2:0.1", origin=str(home / "flow"))
    compared(tmp_path / "grid", N, "--out", tmp_path / "out")
    found = found_in(tmp_path / "out")
    assert found["about"]["is_data"] and "grid:2:0.1" in found["about"]["reference"]
    assert found["floor"]["modes"]["held"] == found["floor"]["modes"]["of"] == 4


def test_classes_of_one_sample_are_taken_together(home, tmp_path):
    """As a student of many prompts has them. Of the reference some have two."""
    torch.manual_seed(0)
    net = DiT(1, 8, 4, 32, 1, 1, classes=40)
    for p in net.parameters():                          # a new net answers zero
        torch.nn.init.normal_(p, std=0.3)
    flow = Flow(Denoiser(net, Linear(), "v"), (1, 8, 8), "euler", 3)
    save_product(Product("generator", {"generator": OneStep(net, Linear(), "v", flow.shape)}), tmp_path / "many")
    save_product(Product("flow", {"flow": flow}), tmp_path / "flow")
    compared(tmp_path / "many", "--teacher", tmp_path / "flow", "--teacher-steps 2 --n 40 --reference 60 --quiet",
             "--out", tmp_path / "out")
    found = found_in(tmp_path / "out")
    lines = [*found["teacher"], found["entries"][0]["runs"][0]]
    x, reference = (as_8bit(flow.sample(n, seed)) for n, seed in ((40, 0), (60, seed_of(0, "reference"))))
    together = spread_within(x.flatten(1)) / spread_within(reference.flatten(1))
    assert math.isclose(lines[1]["diversity"], together, rel_tol=1e-4) and lines[1]["own"]
    assert 0 < lines[0]["paired"]["relative"] < 0.9
    (note,) = [note for note in found["about"]["notes"] if "no two of a class" in note]
    assert "diversity, of unrelated" in note and note in (tmp_path / "out" / "compare.html").read_text("utf-8")
    compared(tmp_path / "many", "--teacher", tmp_path / "flow", "--teacher-steps 2 --n 41 --reference 60 --quiet",
             "--out", tmp_path / "out")
    assert not [note for note in found_in(tmp_path / "out")["about"]["notes"] if "no two of a class" in note]


def test_spread_within_classes_is_that_of_pairs():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=g, dtype=torch.float64), torch.arange(12) % 2
    x = x + 10 * y[:, None]
    squares = [torch.stack([(a - b).square().sum() for i, a in enumerate(x[y == c]) for j, b in enumerate(x[y == c])
                            if i != j]).mean() for c in (0, 1)]
    assert math.isclose(spread_within(x, y), float(torch.stack(squares).mean().sqrt()), rel_tol=1e-9)
    assert spread_within(x) > 5


def test_a_spread_is_held_against_one_of_its_kind():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 3, generator=g), torch.arange(12) % 2
    alone = torch.arange(12)
    assert relative_spread(2 * x, y, x, y) == pytest.approx(2)
    assert relative_spread(2 * x, alone, x, y) == relative_spread(2 * x, y, x, alone) == pytest.approx(2)
    assert relative_spread(x, y, y[:, None].float(), y) is None             # its classes are points
    x = x + 10 * y[:, None]
    assert relative_spread(x, y, x, None) == relative_spread(x, None, x, y) == pytest.approx(1)
    for mine, law, said in ((y, None, 1), (None, y, 1), (alone, y, 1), (y, y, 0), (None, None, 0)):
        assert len(compared_runs.taken_together(mine, SimpleNamespace(law=law, teacher=None))) == said


def test_saturation_is_what_lies_at_the_ends():
    x = torch.tensor([[-1.0, 1.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    assert saturated(x).tolist() == [0.5, 0.0] and contrast(x)[1] == 0
    assert math.isclose(float(contrast(x)[0]), float(x[0].std(unbiased=False)), rel_tol=1e-6)


# ---- points, and runs of an own recipe ----


def swarm(out, name, **more):
    """Fifty points of a ring."""
    kind = find(name)
    return start(kind, kind.Settings(out=out, teacher="ring:4:0.1", steps=30, batch=50, **more, **PLAIN), name, None,
                 Silent())


def test_points_stand_beside_points_and_generators(home, tmp_path):
    """As many samples of each as there are points; of no noise, and drawn without an evaluation."""
    vsd, sds = swarm(tmp_path / "vsd", "vsd", conditional=True), swarm(tmp_path / "sds", "sds")
    told = compared(vsd, sds, home / "mixed", N, "--seed 3 --out", tmp_path / "out")
    found = found_in(tmp_path / "out")
    runs = {entry["name"]: entry["runs"][0] for entry in found["entries"]}
    reference, _ = open_real(Evaluation(data="ring:4:0.1", reference=400, n=50), 1, 50)
    real = torch.cat([x for x, _ in reference.batches(None)])
    for name, run in runs.items():
        assert run["n"] == 50 == found["about"]["n"] and run["modes"]["of"] == 4
        assert (run["evaluations"], bool(run["paired"])) == ((1, True) if name == "mixed" else (None, False))
        if name != "mixed":
            x, (space,) = train.load(tmp_path / name), run["spaces"].values()
            x = x["points"] if isinstance(x, dict) else x
            assert math.isclose(space["sliced_w2"], panel(x, real, 3)["sliced_w2"], rel_tol=1e-4)
    assert runs["vsd"]["diversity"] > runs["sds"]["diversity"]
    cost = runs["vsd"]["cost"]
    assert cost["recipe"] == "vsd" and cost["trained"] > 100 and cost["evaluations"]["teacher"] and not cost["weights"]
    html, flat = (tmp_path / "out" / "compare.html").read_text("utf-8"), " ".join(told.split())
    for words in ("holds 50 points: as many samples of each", "vsd, sds: points, which are of no noise"):
        assert words in " ".join(found["about"]["notes"]) and words in html and words in flat
    assert "All of the same noise, but for points" in html and "Quality against cost of a sample" in html
    told = compared(vsd, sds, "--data ring:4:0.1", N, "--out", tmp_path / "alone")
    html = (tmp_path / "alone" / "compare.html").read_text("utf-8")
    assert "evaluations a sample." not in told and "Quality against cost of a sample" not in html
    assert "Quality against cost of training" in html


OWN = """
from stillroom import Product, Recipe, Role, Optimizer, Run, Stage, buildable
from stillroom.flows import OneStep
from stillroom.nets import MLP
from stillroom.paths import Linear


@buildable
class Net(MLP):
    def __init__(self, width: int):
        super().__init__(2, width, 1, classes=4)


class Mine(Recipe):
    Settings = Run
    kind = "generator"

    def __init__(self, settings):
        self.generator = OneStep(Net(16), Linear(), "v", (2,))

    def roles(self):
        return {"generator": Role(self.generator, Optimizer(lr=1e-2))}

    def stages(self):
        return [Stage("train", 3)]

    def losses(self, batch, turn):
        rows = turn.rows(turn.batch)
        return {"generator": {"size": self.generator.net(turn.randn((len(rows), 2)), 0 * rows + 0.5, rows % 4) ** 2}}

    def product(self):
        return Product(self.kind, {"generator": self.generator})


class Odd(Mine):
    def product(self):
        return Product("generator", {"generator": self.generator.net})
"""


def test_a_run_of_an_own_recipe_stands_beside_others(home, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    for name in ("Mine", "Odd"):
        told = called("distill", f"{tmp_path}/mine.py:{name}", "--steps 3 --precision float32 --quiet --out",
                      tmp_path / name)
        assert told.code == 0, told.err
    compared(tmp_path / "Mine", home / "mixed", N, "--out", tmp_path / "out")
    found = found_in(tmp_path / "out")
    own, mixed = (entry["runs"][0] for entry in found["entries"])
    assert own["cost"]["recipe"] == "Mine" and own["cost"]["steps"] == 3 and own["evaluations"] == 1
    reference, _ = open_real(Evaluation(data="ring:4:0.1", reference=400, n=60), 1, 60)
    told = panel(train.load(tmp_path / "Mine").sample(60), torch.cat([x for x, _ in reference.batches(None)]))
    assert math.isclose(next(iter(own["spaces"].values()))["sliced_w2"], told["sliced_w2"], rel_tol=1e-4)
    assert own["modes"] and own["paired"] and mixed["spaces"].keys() == own["spaces"].keys()
    assert "its generator is Net, which is not drawn from" in refused(tmp_path / "Odd", home / "mixed", N, "--out",
                                                                      tmp_path / "odd")


# ---- what it writes ----


def test_several_seeds_are_a_mean_and_a_deviation():
    cell = report.Cell.of([1.0, 2.0, 4.0])
    assert math.isclose(cell.mean, 7 / 3) and math.isclose(cell.deviation, math.sqrt(7 / 3))
    assert cell.text() == f"{number(7 / 3)}\xa0±\xa0{number(math.sqrt(7 / 3), 2)}"
    assert report.Cell.of([3]) == (3, None) and report.Cell.of([5.0, 5.0]) == (5.0, None)
    assert report.Cell.of([1.0, None]) == (None, None) and report.Cell.of([]).text() == "–"


def test_page_csv_latex_and_terminal_say_the_same(both):
    out, told = both
    found, cells = found_in(out), Read((out / "compare.html").read_text("utf-8")).inside("td")
    (head, *lines) = list(csv.reader((out / "compare.csv").open()))
    names = [line[0] for line in lines]
    assert names == ["ours", "flow", "teacher, 1 step", "teacher, 2 steps", "teacher, 8 steps",
                     "teacher, 18 steps (its own)", "the teacher, of other noise"]
    assert [line[1] for line in lines] == ["3", "1", "1", "1", "1", "1", "1"]
    latex, flat = (out / "compare.tex").read_text(), " ".join(told.split())
    wanted = 0
    for line in lines:
        values = dict(zip(head, line, strict=True))
        for name, text in list(values.items())[2:]:
            if not text or name.endswith(" sd"):
                continue
            value = float(text) if re.search(r"[.e]", text) else int(text)
            shown = number(value)
            if sd := values[f"{name} sd"]:
                shown = f"{shown}\xa0±\xa0{number(float(sd), 2)}"
            assert shown in cells and report.latex(shown) in latex and " ".join(shown.split()) in flat, (name, shown)
            wanted += 1
    assert wanted > 80
    frechet = [run["spaces"][found["about"]["main"]]["frechet"] for run in found["entries"][0]["runs"]]
    first = dict(zip(head, lines[0], strict=True))[head[2]]
    assert math.isclose(float(first), sum(frechet) / 3, rel_tol=1e-12)
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 3 and "↓" not in latex


def test_sentences_order_methods_and_do_not_read_what_noise_hides(both):
    found, html = found_in(both[0]), (both[0] / "compare.html").read_text("utf-8")
    told = report.sentences(found)
    paragraphs = " ".join(Read(html).inside("p"))
    assert all(sentence in paragraphs for sentence in told) and "One run of flow" in " ".join(told)
    assert told[0].startswith("By Fréchet distance in points 2: flow (")
    assert "flow is no farther than the teacher at 18 steps: 35 against 35 evaluations a sample." in told
    main, ours = found["about"]["main"], found["entries"][0]["runs"]
    mine = sum(run["spaces"][main]["frechet"] for run in ours) / len(ours)
    beaten = [t["steps"] for t in found["teacher"] if t["spaces"][main]["frechet"] >= mine]
    where = f"no farther than the teacher at {max(beaten)} step" if beaten else "farther than the teacher at any of"
    assert any(sentence.startswith(f"ours is {where}") for sentence in told)
    a, b = report.Cell(1.0, 0.2), report.Cell(1.3, 0.2)
    assert not report.apart(a, b) and report.apart(a, report.Cell(2.0, 0.2)) and report.apart(a, report.Cell(1.1))


def test_a_floor_of_fewer_real_ones_than_samples_says_so(home, tmp_path):
    """355 digits are the test split: no floor for 400 samples, and few for 64 dimensions only beside few others."""
    told = " ".join(compared(home / "grey", "--data digits --n 400 --reference 100 --quiet --out", tmp_path).split())
    found = found_in(tmp_path)
    line = "Fresh real ones are 355 only: most distances grow as samples get fewer"
    note = report.distance_note(found, found["about"]["spaces"][0])
    assert found["floor"]["n"] == 355 and line in told and line in note
    assert "100 items are few for 64 dimensions" in note
    compared(home / "grey", "--data digits --n 350 --quiet --out", tmp_path)
    found = found_in(tmp_path)
    assert found["floor"]["n"] == 350 and not report.fewer_fresh(found) and not found["about"]["spaces"][0]["few"]


def test_a_method_is_told_apart_from_the_teacher_by_its_runs_alone(both):
    found = found_in(both[0])
    main, lines = found["about"]["main"], found["teacher"]
    at = {line["steps"]: line["spaces"][main]["frechet"] for line in lines}
    mean = sum(at.values()) / len(at)
    every = report.near(found, report.Cell(mean, max(at.values())), lines)
    assert every == "; not told apart, by runs, from the teacher at 1, 2, 8 and 18"
    assert report.near(found, report.Cell(at[8], 1e-9), lines).endswith("the teacher at 8")
    assert report.near(found, report.Cell(at[8]), lines) == ""


def test_latex_is_escaped():
    assert report.latex("a_b 50% ↓ ±") == r"a\_b 50\% $\downarrow$ $\pm$"


def test_a_browser_shows_the_page(both, tmp_path):
    browser()
    dom, console = opened(both[0] / "compare.html", tmp_path / "profile")
    assert [line for line in console.splitlines() if "CONSOLE" in line] == []
    assert "Quality against cost of a sample" in Read(dom).inside("h2") and "ours" in Read(dom).inside("text")


def test_the_page_has_no_address_and_a_panel_for_each_method(both):
    html = (both[0] / "compare.html").read_text("utf-8")
    assert "http" not in re.sub(r"http://www.w3.org\S*|http-equiv", "", html)
    assert html.count("<svg") == 2 + 2                                  # two figures; clouds of both methods


def test_each_row_of_the_grid_is_of_one_noise(home, tmp_path):
    compared(home / "grey", home / "pictures", "--data digits --n 40 --quiet --out", tmp_path)
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.size == (2 * 48 + 2, 8 * 48 + 7 * 2)                   # a row for each noise, a column for each
    left = torch.tensor(list(sheet.convert("L").crop((0, 50, 48, 98)).get_flattened_data())).view(48, 48)[3::6, 3::6]
    x = train.load(home / "grey").sample(2)[1, 0].clamp(-1, 1)
    assert torch.equal(((x + 1) * 127.5).round().int(), left.int())
    found = found_in(tmp_path)
    assert found["about"]["teacher"] is None and found["teacher"] == []
    run = found["entries"][0]["runs"][0]
    assert run["paired"] is None and 0 <= run["pictures"]["saturated"] <= 1 and run["cost"]["evaluations"] is None
    assert "digits:test" in found["about"]["fresh"]


def test_pictures_that_could_not_be_read_are_told(home, tmp_path):
    (tmp_path / "data").mkdir()
    for i, x in enumerate(torch.randint(256, (50, 8, 8, 3), generator=torch.Generator().manual_seed(0))):
        Image.fromarray(x.to(torch.uint8).numpy()).save(tmp_path / "data" / f"{i:02}.png")
    (tmp_path / "data" / "07.png").write_bytes(b"")
    told = compared(home / "colour", "--bad-share 0.1 --n 20 --quiet --out", tmp_path / "o", "--data",
                    tmp_path / "data")
    line = "1 of 50 pictures seen could not be read, and others took their place"
    (note,) = [note for note in found_in(tmp_path / "o")["about"]["notes"] if line in note]
    assert "07.png (empty)" in note and line in " ".join(told.split())
    assert line in (tmp_path / "o" / "compare.html").read_text("utf-8")


def test_a_teacher_that_is_named_stands_beside_them(home, tmp_path):
    compared(home / "grey", "--teacher", home / "pictures", "--teacher-steps 1 --data digits --n 40 --quiet",
             "--out", tmp_path)
    found = found_in(tmp_path)
    assert [line["steps"] for line in found["teacher"]] == [1, 3] and found["entries"][0]["runs"][0]["paired"]
    assert Image.open(tmp_path / "grid.png").size[0] == 2 * 48 + 2


def test_a_feature_net_orders_the_methods(home, tmp_path):
    run = tmp_path / "features"
    made = called("train features --data digits --size 8 --steps 2 --batch 8 --precision float32 --quiet --out", run)
    assert made.code == 0, made.err
    compared(home / "grey", "--data digits --features", run, "--n 40 --quiet --out", tmp_path / "out")
    found = found_in(tmp_path / "out")
    assert found["about"]["main"].startswith("features ") and len(found["entries"][0]["runs"][0]["spaces"]) == 2
    head = next(csv.reader((tmp_path / "out" / "compare.csv").open()))
    assert len(head) == len(set(head))


def test_grey_data_beside_samples_in_colour_are_in_three_channels(home, tmp_path):
    compared(home / "colour", "--data digits --n 40 --quiet --out", tmp_path)
    found = found_in(tmp_path)
    assert found["about"]["shape"] == [3, 8, 8] and "three equal channels" in " ".join(found["about"]["notes"])
    source = digits(8, "train")
    real = as_8bit(source.x).expand(-1, 3, -1, -1).flatten(1)
    told = panel(as_8bit(train.load(home / "colour").sample(40)).flatten(1), real)
    (space,) = found["entries"][0]["runs"][0]["spaces"].values()
    assert math.isclose(space["frechet"], told["frechet"], rel_tol=1e-4)
    assert found["floor"]["spaces"][found["about"]["main"]]["frechet"] < space["frechet"] / 2


def test_a_page_can_be_named_and_has_its_folder_beside_it(home, tmp_path):
    page = tmp_path / "new" / "of my runs.html"
    told = compared(home / "points", "--data ring:4:0.1", N, "--out", page)
    assert told.endswith(f"page: {page}\n") and page.is_file()
    left = ("compare.csv", "compare.json", "compare.tex", "points", "points/results.json")
    assert files(tmp_path / "new") == ["of my runs", "of my runs.html", *(f"of my runs/{name}" for name in left)]
    links = re.findall(r'href="([^"#]+compare[^"]+)"', page.read_text("utf-8"))
    assert len(links) == 3 and all((page.parent / link).is_file() for link in links)
    page.unlink()
    page.mkdir()
    assert "is a folder, and would be the page" in refused(home / "points", "--data ring:4:0.1", N, "--out", page)


# ---- what it keeps ----


@pytest.fixture
def measured(monkeypatch):
    """Names of the sides that were measured."""
    done: list[str] = []
    real = compared_runs.Table.measure
    monkeypatch.setattr(compared_runs.Table, "measure", lambda self, side, guidance: (
        done.append(side.name), real(self, side, guidance))[1])
    return done


def test_a_second_comparison_measures_nothing_and_one_more_run_only_adds(home, tmp_path, measured):
    compared(home / "a", N, "--out", tmp_path)
    assert len(measured) == 1 + 1 + 4                                   # the floor, the run, four numbers of steps
    before = found_in(tmp_path)
    measured.clear()
    compared(home / "a", N, "--out", tmp_path)
    assert len(measured) == 1 and found_in(tmp_path) == before
    measured.clear()
    compared(home / "a", home / "a1", N, "--out", tmp_path)
    assert measured == [measured[0], str(home / "a1")] and found_in(tmp_path)["entries"][0] == before["entries"][0]
    measured.clear()
    compared(home / "a", "--n 50 --reference 400 --quiet --out", tmp_path)
    assert len(measured) == 6


def test_another_sampler_of_the_same_weights_is_measured_anew(home, tmp_path, measured):
    shutil.copytree(home / "pictures", tmp_path / "flow")
    words = (f"mine={tmp_path / 'flow'}", "--teacher", tmp_path / "flow", "--teacher-steps 2 --data digits --n 40 "
             "--quiet --out", tmp_path / "out")
    compared(*words)
    measured.clear()
    compared(*words)
    assert len(measured) == 1                                           # the floor
    file = tmp_path / "flow" / "product.json"
    content = json.loads(file.read_text())
    content["parts"]["flow"]["arguments"]["sampler"] = "heun"
    file.write_text(json.dumps(content))
    measured.clear()
    compared(*words)
    assert len(measured) == 4                                           # of the teacher too


def test_other_weights_in_the_place_of_other_peoples_are_measured_anew(tmp_path):
    file = tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors"
    file.parent.mkdir(parents=True)
    found = []
    for value in (0.0, 1.0, 0.0):
        save_file({"x": torch.full((2,), value)}, file)
        found.append(contenders.made(str(tmp_path / "teacher")))
    assert found[0] == found[2] != found[1]


def test_other_labels_of_the_same_pictures_are_measured_anew(home, tmp_path, measured, monkeypatch):
    words = (home / "grey", "--data digits --n 40 --quiet --out", tmp_path)
    compared(*words)
    real = compared_runs.gathered

    def relabelled(*sides):
        vectors, y = real(*sides)
        return vectors, None if y is None else y.flip(0)

    monkeypatch.setattr(compared_runs, "gathered", relabelled)
    measured.clear()
    compared(*words)
    assert len(measured) == 2                                           # the floor, and the run


def test_another_codec_at_the_same_place_is_measured_anew_and_pictures_are_as_large_as_it_makes_them(
        tmp_path, measured):
    torch.manual_seed(0)
    net = DiT(4, 2, 1, 32, 1, 1)
    save_product(Product("generator", {"generator": OneStep(net, Linear(), "v", (4, 2, 2))}), tmp_path / "run")
    words = (tmp_path / "run", "--codec", tmp_path / "codec", "--data leaves --reference 60 --n 40 --quiet --out",
             tmp_path / "out")
    space = LatentSpace(4, 8, (0.0,) * 4, (0.5,) * 4)
    figures = []
    for _ in range(2):
        decoder = Decoder(4, 8, shift=space.shift, scale=space.scale, unit_range=True)
        codec = Codec(Encoder(4, 8, unit_range=True), decoder, space).eval()
        save_product(Product("codec", {"codec": codec}), tmp_path / "codec")
        compared(*words)
        found = found_in(tmp_path / "out")
        assert found["about"]["main"].startswith("pixels 3x16x16")      # without --size
        figures.append(found["entries"][0]["runs"][0]["spaces"])
    assert len(measured) == 4 and figures[0] != figures[1]
    compared(*words)
    assert len(measured) == 5


# ---- what it refuses ----


def with_teacher_at(place, home, run):
    """A copy of the run `far`, whose card names that place."""
    shutil.copytree(home / "far", run)
    file = run / "product/product.json"
    file.write_text(file.read_text().replace(str(home / "other"), str(place)))
    return run


def test_a_teacher_told_other_prompts_is_measured_anew(home, tmp_path, measured, monkeypatch):
    """It lies in the same place and has the same weights."""
    for sha, count in (("a", 6), ("a", 1), ("b", 6)):
        for module in (compared_runs, contenders):
            told = SimpleNamespace(prompts=SimpleNamespace(sha256=sha))
            monkeypatch.setattr(module, "prompted", lambda model, told=told: told)
        measured.clear()
        compared(home / "a", N, "--data ring:4:0.1 --out", tmp_path)
        assert len(measured) == count


def test_a_teacher_that_moved_is_known_by_its_weights(home, tmp_path):
    moved = with_teacher_at(tmp_path / "gone", home, tmp_path / "moved")
    shutil.copytree(home / "other", tmp_path / "here")
    compared(moved, "--teacher", tmp_path / "here", "--teacher-steps 2 --n 40 --reference 60 --quiet", "--out",
             tmp_path / "out")
    assert found_in(tmp_path / "out")["entries"][0]["runs"][0]["paired"]


def test_a_teacher_of_other_people_is_known_by_its_weights_too(tmp_path, monkeypatch):
    """Wherever it has moved; and where another has come to its place."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(Distillation, "check", lambda *_: None)     # random weights earn no place as teachers
    monkeypatch.setattr(Distillation, "shown", lambda *_: {})
    net = diffusers.UNet2DModel(sample_size=4, in_channels=1, out_channels=1, block_out_channels=(4,),
                                layers_per_block=1, norm_num_groups=2, down_block_types=("DownBlock2D",),
                                up_block_types=("UpBlock2D",), add_attention=False)

    def saved(name: str) -> Path:
        net.save_pretrained(tmp_path / name / "unet")
        diffusers.DDPMScheduler(num_train_timesteps=4).save_pretrained(tmp_path / name / "scheduler")
        return tmp_path / name

    def distilled(name: str) -> Path:
        printed("distill dmd --steps 1 --batch 4 --precision float32 --device cpu --quiet",
                "--teacher", tmp_path / "teacher", "--out", tmp_path / name)
        return tmp_path / name

    few, out = "--teacher-steps 1 --n 20 --reference 20 --quiet --out", tmp_path / "out"
    saved("teacher")
    run = distilled("run")
    shutil.copytree(tmp_path / "teacher", tmp_path / "moved")
    with torch.no_grad():
        net.conv_out.weight += 1
    saved("teacher")
    assert "other was distilled from another teacher than" in refused(run, distilled("other"), few, out)
    assert "lies another model than the teacher" in refused(run, few, out)
    compared(run, "--teacher", tmp_path / "moved", few, out)
    assert found_in(out)["entries"][0]["runs"][0]["paired"]


def test_refusals(home, tmp_path):
    out, a = tmp_path / "out", home / "a"
    moved, swapped = (with_teacher_at(place, home, tmp_path / name)
                      for name, place in (("moved", tmp_path / "gone"), ("swapped", home / "flow")))
    for told, words in {
        "far was distilled from another teacher than": (a, home / "far"),
        "is not the teacher of": (a, "--teacher", home / "other"),
        "makes [3, 8, 8], and": (home / "grey", home / "colour", "--data digits"),
        "knows 9 classes, and": (home / "grey", home / "nine", "--data digits"),
        "makes [1, 8, 8], and": (a, home / "grey"),
        "a is a generator and bundled a codec": (a, "bundled"),
        "points is a set of points and bundled a codec": ("bundled", home / "points"),
        "a product of kind 'features' is not compared; give codecs, or": (a, home / "features"),
        "nowhere: no such file or folder; give a run": (home / "nowhere", a),
        "several runs of one method have one name": (f"{a},{home / 'a1'}",),
        "two methods are called 'a'": (a, a),
        "the same weights twice, and seeds of a method were asked for": (f"x={a},{a}",),
        "of flow: runs of one name are seeds of one method": (f"x={a},{home / 'flow'}",),
        "is on the page already": (f"teacher={a}",),
        "nothing to hold samples against": (home / "grey",),
        "--codec bundled": (a, "--codec bundled"),
        "its teacher is no longer at": (moved,),
        "lies another model than the teacher that it was distilled from; say where that is": (swapped,),
        "--stps is not a setting": (a, "--stps 3"),
    }.items():
        assert told in refused(*words, N, "--out", out), told
    assert not out.exists()


def test_a_name_beside_runs_is_mistyped_and_no_hub_id(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home.parent)
    mistyped = f"{home.name}/nowhere"
    for other in (home / "a", mistyped):
        assert f"{mistyped}: no such file or folder" in refused(mistyped, other, "--out", tmp_path)
    assert "owner/model a codec: compare codecs with codecs" in refused(home / "a", "owner/model", "--out", tmp_path)


def test_runs_of_other_latents_or_other_data_are_refused(home, tmp_path):
    for name, codec in (("one", "a" * 8), ("two", "b" * 8)):
        torch.manual_seed(0)
        net = DiT(4, 8, 4, 32, 1, 1)
        product = Product("generator", {"generator": OneStep(net, Linear(), "v", (4, 8, 8))},
                          {"encoding": {"codec": codec, "space": {}, "crop": "centre 8"}})
        save_product(product, tmp_path / name)
    out = tmp_path / "out"
    assert "makes other latents than" in refused(tmp_path / "one", tmp_path / "two", N, "--data digits --out", out)
    for name, data in (("p", "digits:train"), ("q", "leaves:train")):
        shutil.copytree(home / "grey", tmp_path / name / "product")
        (tmp_path / name / "run.json").write_text(json.dumps({"inputs": {"data": {"name": data}}}))
    told = refused(tmp_path / "p", tmp_path / "q", N, "--data digits --out", out)
    assert "other data than" in told and "leaves:train, and not digits:train" in told
    kept = {"name": "digits:train", "count": 80, "shape": [1, 8, 8]}
    for name, data in (("p", kept), ("q", kept | {"count": 40})):
        (tmp_path / name / "run.json").write_text(json.dumps({"inputs": {"data": data}}))
    told = refused(tmp_path / "p", tmp_path / "q", N, "--data digits --out", out)
    assert told.endswith(f"other data than {tmp_path / 'p'}: count 40, and not 80")


def test_samples_of_the_teacher_are_no_other_data(tmp_path):
    """`distill drifting --positives teacher` stands beside a run on data."""
    def run(name, data, teacher="runs/teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"inputs": {"data": {"name": data, "count": 80}}}))
        side = Side(name, 8, (1, 8, 8), lambda law: iter(()))
        return contenders.Run(str(tmp_path / name), {"teacher": teacher}, side)

    real, drawn = run("real", "digits:train"), run("drawn", "runs/teacher")
    assert real.data and not drawn.data
    contenders.require_alike([contenders.Entry("real", [real]), contenders.Entry("drawn", [drawn])])
    with pytest.raises(Refusal, match="other data than"):
        contenders.require_alike([contenders.Entry("real", [real]), contenders.Entry("o", [run("o", "leaves:train")])])


def test_runs_that_saw_other_squares_of_the_same_pictures_are_refused(home, tmp_path):
    """As settings.toml has them; what a crop makes no use of is no difference."""
    def seen(name, crop="centre", shrink=(1.0, 8.0), flip="false"):
        if not (tmp_path / name).exists():
            shutil.copytree(home / "grey", tmp_path / name / "product")
        data = {"name": "photos:train", "count": 80, "shape": [1, 8, 8]}
        (tmp_path / name / "run.json").write_text(json.dumps({"inputs": {"data": data}}))
        (tmp_path / name / "settings.toml").write_text(f'crop = "{crop}"\nshrink = {list(shrink)}\nflip = {flip}\n')

    words = (tmp_path / "p", tmp_path / "q", N, "--data digits --out", tmp_path / "out")
    for p, q, said in (
        ({}, {"crop": "random"}, "crop random, and not centre"), ({}, {"flip": "true"}, "flip True, and not False"),
        ({"crop": "shrink"}, {"crop": "shrink", "shrink": (2.0, 8.0)}, "shrink [2.0, 8.0], and not [1.0, 8.0]"),
    ):
        seen("p", **p)
        seen("q", **q)
        assert refused(*words).endswith(f"other data than {tmp_path / 'p'}: {said}")
    seen("p")
    seen("q", shrink=(2.0, 8.0))
    compared(*words)


def test_guidances_without_data_have_no_one_reference(home, tmp_path):
    student(tmp_path / "guided", str(home / "flow"), guidance=2.0)
    told = refused(home / "a", tmp_path / "guided", N, "--out", tmp_path / "out")
    assert "at guidance 1, 2" in told and "give --data" in told
    compared(home / "a", tmp_path / "guided", "--data ring:4:0.1", N, "--out", tmp_path / "out")
    found = found_in(tmp_path / "out")
    assert [(line["steps"], line["guidance"]) for line in found["teacher"]][:2] == [(1, 1.0), (2, 1.0)]
    assert len(found["teacher"]) == 8 and found["teacher"][4]["evaluations"] == 2
    assert found["entries"][1]["runs"][0]["guidance"] == 2
    told = report.sentences(found)              # each beside the teacher that it was to follow
    assert any(re.match(r"a is .*farther than the teacher of guidance 1 at ", line) for line in told)
    assert any(re.match(r"guided is .*farther than the teacher of guidance 2 at ", line) for line in told)


def test_help_of_runs(home):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        told = called("compare", home / "a", "--help")
    assert told.code == 0 and "--teacher-steps" in told.out + out.getvalue()


def over_evaluations():
    figure, axes = plots._wide()
    plots.over_evaluations(axes, "evaluations")
    return figure, axes


def test_no_name_in_a_figure_covers_another():
    """Neither of one column of dots, nor of two of which one's names reach into the other's."""
    names = ["dmd, 4 steps", "decoupled-dmd, 4 steps", "sid, 4 steps", "boot", "sid, 1 step"]
    figure, axes = over_evaluations()
    dots = [(7.0, 0.4), (9.0, 0.4), (9.0, 0.39), (1.0, 0.9), (1.0, 0.9)]
    axes.scatter(*zip(*dots, strict=True))
    plots.named(figure, axes, [plots.Place(*dot, name, "red") for dot, name in zip(dots, names, strict=True)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_names_at_the_right_end_of_lines_lie_inside_the_axes_and_in_the_order_of_their_dots():
    figure, axes = over_evaluations()
    dots = [(70.0, 0.4), (70.0, 0.39), (35.0, 0.4), (1.0, 1.0), (1.0, 0.1)]
    axes.scatter(*zip(*dots, strict=True))
    words = ["teacher", "teacher, guidance 2", "guidance-lora", "boot", "sid"]
    plots.named(figure, axes, [plots.Place(*dot, name, "red") for dot, name in zip(dots, words, strict=True)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    of = {text.get_text(): box for text, box in zip(axes.texts, boxes, strict=True)}
    assert max(box.x1 for box in boxes) < axes.get_window_extent(canvas.get_renderer()).x1
    assert of["teacher"].y0 > of["teacher, guidance 2"].y1
    assert all(of[name].x0 > axes.transData.transform((70.0, 0.4))[0] for name in words[:2])


@pytest.mark.parametrize("name", ["m" * 12, "W" * 20, "a long name, " * 9, "$x$"])
def test_the_axis_goes_on_until_a_name_ends_inside(name):
    figure, axes = over_evaluations()
    dots = [(1e4, 0.4), (1e6, 0.9)]
    axes.scatter(*zip(*dots, strict=True))
    plots.named(figure, axes, [plots.Place(*dot, plots.shortened(name), "red") for dot in dots])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    frame = axes.get_window_extent(canvas.get_renderer())
    assert max(Text.get_window_extent(text, canvas.get_renderer()).x1 for text in axes.texts) <= frame.x1 + 2
    assert axes.get_xlim()[1] < 1e9 and len(axes.get_xticks()) > 1


def test_names_stay_inside_the_axes_while_there_is_room():
    figure, axes = over_evaluations()
    dots = [(1.0, 0.1 + 0.001 * i) for i in range(6)] + [(2.0, 1.0 - 0.001 * i) for i in range(6, 12)]
    axes.scatter(*zip(*dots, strict=True))
    plots.named(figure, axes, [plots.Place(*dot, f"m{i}", "red") for i, dot in enumerate(dots)])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    frame = axes.get_window_extent(canvas.get_renderer())
    heights = [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    assert all(frame.y0 <= (box.y0 + box.y1) / 2 <= frame.y1 for box in heights)
    assert not any(a.overlaps(b) for a, b in combinations(heights, 2))
