"""The sweep: linear codecs, whose errors and latents are known in closed form, through the whole command."""

import copy
import csv
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stillroom as library
from command import files, stillroom
from stillroom.cli import demo
from stillroom.codecs import sweep as rows_of_sweep
from stillroom.codecs.bits import in_bfloat16, with_int8_weights
from stillroom.codecs.codec import Codec, fingerprint
from stillroom.codecs.klt import equal_budget, fit_klt
from stillroom.codecs.study import Plan, choose, split, spread
from stillroom.codecs.sweep import EqualBudget, Row, encode_ms, square, sweep, truncated
from stillroom.codecs.theorems import aligned, alignment, derivative, directions, least_slope
from stillroom.data import LatentSpace
from stillroom.data.images import signed
from stillroom.measure.bootstrap import mean_interval
from stillroom.measure.images import psnr
from stillroom.measure.perceptual import Lpips
from stillroom.recipes import find
from stillroom.report.sweep import choice_in_words, in_words
from stillroom.report.sweep_plots import apart, principal
from stillroom.settings import Refusal, checked
from stillroom.train.product import amend_product, load_product, product_hash, save_product
from stillroom.train.recipe import Product

SCALES = (1.0, 1.5, 2.0)
STRETCH = 0.1       # of the student's latents over the teacher's


def painted(seed: int, size: int) -> torch.Tensor:
    """uint8 [3, size, size]: soft blobs and hard-edged bars, so that there is something to lose at every frequency."""
    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    picture = np.full((3, size, size), 110.0)
    for _ in range(12):
        cx, cy, r = draws.uniform(0, 1, 3)
        inside = np.hypot(x - cx, y - cy) < 0.3 * r if draws.uniform() < 0.5 else np.abs(x * cx + y * cy - r) < 0.04
        picture = np.where(inside, draws.uniform(0, 255, (3, 1, 1)), picture)
    return torch.from_numpy((picture + draws.normal(0, 4, picture.shape)).clip(0, 255).astype(np.uint8))


def stretched(codec: Codec, factor: float) -> Codec:
    """z becomes factor * z, exactly: of a linear encoder's answer b . (x - mean), by its basis."""
    encoder = copy.deepcopy(codec.encoder)
    encoder.basis.mul_(factor)
    return Codec(encoder, codec.decoder, codec.space)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """photos/ of ten pictures (two of them small), a teacher, and products of students of it."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "photos").mkdir()
    for i in range(12):
        size = 48 if i % 6 == 5 else 96
        Image.fromarray(painted(i, size).permute(1, 2, 0).numpy()).save(folder / "photos" / f"p{i}.png")
    train = torch.stack([signed(painted(100 + i, 96)) for i in range(8)])
    teacher = fit_klt(train, channels=4)
    save_product(Product("codec", {"codec": teacher}, {}), folder / "teacher")
    card = {"teacher": str(folder / "teacher"), "teacher_hash": fingerprint(teacher), "size": 32}
    for name, codec in (("same", teacher), ("student", stretched(teacher, 1 + STRETCH))):
        save_product(Product("codec", {"codec": codec}, card), folder / name)
    save_product(Product("codec", {"codec": fit_klt(train, channels=8)}, card), folder / "wide")
    return folder


COMMON = "--sizes 32,64,200 --scales 1,1.5,2"


@pytest.fixture(scope="module")
def found(place) -> dict:
    """The student's sweep, with a codec of another width for `scratch`."""
    told = stillroom("sweep", place / "student", "--data", place / "photos", COMMON, "--scratch", place / "wide")
    assert told.code == 0, told.err
    assert "size 32, scale 1.5, student:" in told.err and "size 200" in told.err
    assert "s = 2. The optimum lies at the edge of the sweep" in told.out
    return json.loads((place / "student" / "sweep" / "sweep.json").read_text())


def row_of(found: dict, contender: str, size: int, scale: float) -> dict:
    return next(r for r in found["rows"] if (r["contender"], r["size"], r["scale"]) == (contender, size, scale))


def squares_of(place: Path, names: list[str], size: int) -> torch.Tensor:
    pictures = [torch.from_numpy(np.array(Image.open(place / "photos" / n))).permute(2, 0, 1) for n in names]
    return torch.stack([signed(x) for p in pictures if (x := square(p, size)) is not None])


# ---- rows against closed forms ----

def test_a_student_that_is_its_teacher(place):
    told = stillroom("sweep", place / "same", "--data", place / "photos", COMMON, "--quiet --without klt,klt-budget")
    assert (told.code, told.err) == (0, "")
    found = json.loads((place / "same" / "sweep" / "sweep.json").read_text())
    assert {r["contender"] for r in found["rows"]} == {"teacher", "student", "teacher-bf16", "teacher-int8", "ceiling"}
    for row in (r for r in found["rows"] if r["contender"] == "student"):
        assert row["values"]["nmse"] == [0] * len(row["values"]["nmse"])
        assert row["values"]["cosine"] == pytest.approx([1] * len(row["values"]["nmse"]), abs=1e-5)
        assert row["means"] | {"nmse": 0} == row_of(found, "teacher", row["size"], row["scale"])["means"] | {"nmse": 0}
    for entry in (e for e in found["sizes"] if e["names"]):
        assert entry["sweet_spots"]["gap"] == {"value": 0, "low": 0, "high": 0}
        mine = [t for t in entry["theorem1"] if t["contender"] == "student"]
        assert {t["direction"] for t in mine} == {"resolution", "another picture", "noise"}
        for t in mine:
            assert (t["cosine"]["mean"], t["ratio"]["mean"]) == pytest.approx((1, 1), abs=1e-5)
    assert found["theorem2"]["slope"] == 0 and found["theorem2"]["trained_at"] == 32


def test_stretched_latents_have_the_error_that_was_put_in(found, place):
    teacher = library.load(place / "teacher")
    for size, scale in ((32, 1.0), (64, 2.0)):
        names = next(e["names"] for e in found["sizes"] if e["size"] == size)
        with torch.no_grad():
            z = teacher.remapped(scale).encode(squares_of(place, names, size)).double()
        variance = z.transpose(0, 1).flatten(1).var(1).view(-1, 1, 1)
        expected = ((STRETCH * z).square() / variance).flatten(1).mean(1)
        row = row_of(found, "student", size, scale)
        assert row["values"]["nmse"] == pytest.approx(expected.tolist(), rel=1e-4)
        assert row["means"]["cosine"]["mean"] == pytest.approx(1, abs=1e-5)
        ratio = [m / t for m, t in zip(row["channels"]["std"], row_of(found, "teacher", size, scale)["channels"]["std"],
                                       strict=True)]
        assert ratio == pytest.approx([1 + STRETCH] * 4, rel=1e-4)
    told = next(t for t in found["sizes"][0]["theorem1"] if (t["contender"], t["direction"]) == ("student", "noise"))
    assert told["ratio"]["mean"] == pytest.approx(1 + STRETCH, rel=1e-3)
    assert told["cosine"]["mean"] == pytest.approx(1, abs=1e-4)


def test_reconstructions_are_those_of_the_codec_itself(found, place):
    names = found["sizes"][1]["names"]
    x, teacher = squares_of(place, names, 64), library.load(place / "teacher")
    with torch.no_grad():
        expected = {"teacher": psnr(teacher.remapped(1.5).reconstruct(x), x),
                    "ceiling": psnr(teacher.remapped(1.5).ceiling(x), x)}
    for name, values in expected.items():
        assert row_of(found, name, 64, 1.5)["values"]["psnr"] == pytest.approx(values.tolist(), abs=1e-3)
    assert row_of(found, "teacher", 64, 1.5)["latents"] == 4 * 12 * 12
    assert row_of(found, "teacher", 64, 1.5)["latents_over_native"] == 2.25
    assert not [r for r in found["rows"] if r["contender"] == "ceiling" and r["scale"] == 1]


def test_the_same_latents_are_better_spent_at_native_size(found, place):
    for size in (32, 64):
        budget, remapped = (row_of(found, name, size, 2.0) for name in ("klt-budget", "klt"))
        assert budget["latents"] == remapped["latents"]
        assert budget["means"]["psnr"]["mean"] > remapped["means"]["psnr"]["mean"] > \
            row_of(found, "klt", size, 1.0)["means"]["psnr"]["mean"]
        assert "nmse" not in budget["values"] and "nmse" not in remapped["values"]      # other latents: no teacher's
        gains = next(e["gains"] for e in found["sizes"] if e["size"] == size)
        assert gains["remapped klt over its equal budget"]["high"] < 0
        assert gains["klt-budget"]["mean"] == pytest.approx(
            budget["means"]["psnr"]["mean"] - row_of(found, "klt", size, 1.0)["means"]["psnr"]["mean"], abs=1e-3)


def test_one_fit_holds_the_linear_codes_of_every_budget():
    x = torch.stack([signed(painted(i, 64)) for i in range(4)])
    whole = fit_klt(x, channels=192)
    with torch.no_grad():
        form, single = EqualBudget(whole, 4).remapped(1.5), equal_budget(x, 1.5, channels=4)
        assert form is not None and form.scale == 1
        torch.testing.assert_close(form.encode(x), single.encode(x))
        torch.testing.assert_close(form.reconstruct(x), single.reconstruct(x))
        torch.testing.assert_close(truncated(whole, 192).reconstruct(x), x, atol=1e-4, rtol=0)
    assert EqualBudget(whole, 4).remapped(7) is None        # 196 numbers for 192 pixels


def test_parts_of_a_set_make_the_rows_of_the_whole(monkeypatch):
    x = torch.stack([painted(i, 48) for i in range(5)])
    teacher = fit_klt(signed(x), channels=4)
    pair = {"teacher": teacher, "student": stretched(teacher, 0.8)}
    whole = list(sweep(pair, x, (1.0, 1.5), "teacher"))
    monkeypatch.setattr(rows_of_sweep, "CHUNK", 2 * 48 * 48)
    for a, b in zip(whole, sweep(pair, x, (1.0, 1.5), "teacher"), strict=True):
        assert (a.contender, a.scale, a.latents) == (b.contender, b.scale, b.latents)
        for key, values in (a.values | a.channels).items():
            assert (b.values | b.channels)[key] == pytest.approx(values, rel=1e-3, abs=1e-5), key


def test_tiles_change_nothing_where_the_net_reaches_little(monkeypatch):
    x = torch.stack([painted(i, 96) for i in range(2)])
    teacher = fit_klt(signed(x), channels=4)
    asked, encode = [], teacher.encoder.forward
    monkeypatch.setattr(teacher.encoder, "forward", lambda x: asked.append(max(x.shape[-2:])) or encode(x))
    pair = {"teacher": teacher, "student": teacher}
    whole = list(sweep(pair, x, (1.0, 2.0), "teacher"))
    assert max(asked) == 192
    asked.clear()
    for a, b in zip(whole, sweep(pair, x, (1.0, 2.0), "teacher", tile=64), strict=True):
        assert a.values["psnr"] == pytest.approx(b.values["psnr"], abs=1e-3) and a.latents == b.latents
    assert max(asked) == 128        # strips of 16 latents, by which the reach is measured; tiles are smaller


def test_what_is_seen_in_tiles_may_be_in_half_precision():
    x = torch.stack([painted(i, 96) for i in range(2)])
    teacher = fit_klt(signed(x), channels=4)
    pair = {"teacher": teacher, "half": in_bfloat16(teacher)}
    whole, tiles = (list(sweep(pair, x, (1.0,), "teacher", tile=tile)) for tile in (0, 64))
    for a, b in zip(whole, tiles, strict=True):
        assert a.contender == b.contender and a.values["psnr"] == pytest.approx(b.values["psnr"], abs=0.05)


def test_a_clock_waits_for_what_came_before(monkeypatch):
    """A device that answers at once and works later: the first call's work is not in the second's time."""
    now, busy = [0.0], [0.0]

    class Later(torch.nn.Module):
        def forward(self, x):
            busy[0] = max(now[0], busy[0]) + 1.2
            return x

    x = torch.zeros(1, 3, 8, 8)
    form = Codec(Later(), torch.nn.Identity(), LatentSpace(3, 1, (0.0,) * 3, (1.0,) * 3)).remapped(1.0)
    monkeypatch.setattr(rows_of_sweep.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(rows_of_sweep, "wait_for", lambda _: now.__setitem__(0, max(now[0], busy[0])))
    assert encode_ms(form, x) == pytest.approx(1200)


def test_fewer_bits_cost_what_rounding_says():
    x = torch.stack([signed(painted(i, 64)) for i in range(4)])
    codec = fit_klt(x, channels=4)
    rounded, basis = with_int8_weights(codec).encoder.basis, codec.encoder.basis
    step = basis.flatten(1).abs().amax(1) / 127
    assert ((rounded - basis).flatten(1).abs().amax(1) <= step / 2 + 1e-7).all() and not torch.equal(rounded, basis)
    assert all(len(channel.unique()) <= 255 for channel in rounded)
    with torch.no_grad():
        exact, half = codec.encode(x), in_bfloat16(codec).encode(x)
    assert 0 < float((half - exact).abs().max()) < 0.1 and half.dtype == torch.float32
    assert codec.encoder.basis.dtype == torch.float32       # the teacher itself is untouched


def test_time_is_of_one_picture_and_finite():
    x = signed(painted(0, 64))[None]
    assert 0 < encode_ms(fit_klt(x, channels=4).remapped(1.5), x) < 1e4


# ---- which pictures, and the scale that they choose ----

def test_pictures_stay_on_their_side():
    names = [f"photo-{i}.jpg" for i in range(400)]
    choosing, judging = split(names)
    assert not set(choosing) & set(judging) and len(choosing) + len(judging) == 400
    assert 90 <= len(choosing) <= 150
    fewer = split(names[:200])
    assert set(fewer[0]) == set(choosing) & set(names[:200])
    assert split(f"elsewhere/{n}" for n in names)[0] == [f"elsewhere/{n}" for n in choosing]
    assert split(names[:3]) == ([], sorted(names[:3]))
    for start in range(0, 400, 4):
        a, b = split(names[start : start + 4])
        assert a and b


def test_sizes_above_a_picture_are_skipped_and_counted(found):
    sizes = {e["size"]: e for e in found["sizes"]}
    judged, chosen = len(found["evaluation"]), len(found["calibration"])
    small = {"p5.png", "p11.png"}
    assert (judged + chosen, sizes[32]["skipped"], sizes[64]["skipped"], sizes[200]["skipped"]) == (12, 0, 2, 12)
    assert sizes[32]["names"] == found["evaluation"] and not sizes[200]["names"]
    assert set(sizes[64]["names"]) == set(found["evaluation"]) - small
    assert not {r["size"] for r in found["rows"]} - {32, 64}


def rows_costing(latents: dict[float, int], ms: dict[float, float]) -> list[Row]:
    return [Row("student", 64, s, latents[s], encode_ms=ms[s]) for s in latents]


COSTS = rows_costing({0.5: 16, 1.0: 64, 1.5: 144, 2.0: 256}, {0.5: 1, 1.0: 2, 1.5: 4, 2.0: 9})
PEAK = torch.tensor([[20.0, 24, 27, 26], [22, 25, 28, 27.5], [21, 24, 26, 25]], dtype=torch.float64)


@pytest.mark.parametrize(("limits", "scale", "edge"), [
    ({}, 1.5, None), ({"most_latents": 2.25}, 1.5, "budget"), ({"most_latents": 2.0}, 1.0, "budget"),
    ({"most_ms": 3.0}, 1.0, "budget"), ({"most_ms": 1.5}, 0.5, "sweep"), ({"most_latents": 0.1}, None, None),
])
def test_the_scale_is_the_best_that_the_budget_allows(limits, scale, edge):
    plan = Plan((64,), (0.5, 1.0, 1.5, 2.0), **limits)
    choice = choose(plan, {64: (["a", "b", "c"], PEAK)}, COSTS)
    assert (choice["scale"], choice["best"], choice["edge"], choice["pictures"]) == (scale, 1.5, edge, 3)
    words = choice_in_words(choice)
    assert ("budget" in words) == (edge == "budget" or scale is None) and ("edge" in words) == (edge == "sweep")


def test_a_scale_at_the_edge_is_called_so():
    rising = Plan((64,), (0.5, 1.0, 1.5, 2.0))
    choice = choose(rising, {64: (["a"], torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64))}, COSTS)
    assert (choice["scale"], choice["edge"]) == (2.0, "sweep") and "edge of the sweep" in choice_in_words(choice)


def test_pictures_without_error_choose_nothing():
    perfect = torch.full((1, 4), math.inf, dtype=torch.float64)
    choice = choose(Plan((64,), (0.5, 1.0, 1.5, 2.0)), {64: (["a"], perfect)}, COSTS)
    assert choice["scale"] is None and "without any error" in choice_in_words(choice)
    json.dumps(choice, allow_nan=False)


def test_sizes_count_alike_for_the_pictures_that_fill_them():
    """Picture a, at both sizes: 2 dB for scale 1 and 3 dB for scale 2 on average; b alone would say 1."""
    plan = Plan((64, 128), (1.0, 2.0))
    rows = [Row("student", size, s, int(64 * s * s), encode_ms=1.0) for size in (64, 128) for s in (1.0, 2.0)]
    by = {64: (["a", "b"], torch.tensor([[3.0, 2], [5, 4.5]], dtype=torch.float64)),
          128: (["a"], torch.tensor([[1.0, 4]], dtype=torch.float64))}
    assert choose(plan, by, rows)["psnr"] == [3.5, 3.75] and choose(plan, by, rows)["scale"] == 2


def test_saving_the_scale(place):
    run, before = place / "wide", product_hash(place / "wide")
    weights = library.load(run).state_dict()
    said = "--sizes 32 --scales 1,1.5,2 --most-latents 2.25 --save --quiet --without teacher-bf16,teacher-int8"
    told = stillroom("sweep", run, "--data", place / "photos", said, "--teacher", place / "wide")
    assert told.code == 0, told.err
    assert "s = 1.5, within 2.25 times the latents. It is as far as the budget goes; without one, s = 2" in told.out
    product = load_product(run)
    codec = library.load(run)
    assert codec.remap == 1.5 and codec.remapped().scale == 1.5
    assert product.card["remap"]["scale"] == 1.5 and product.card["remap"]["most_latents"] == 2.25
    assert product.card["teacher"] == str(place / "teacher") and product_hash(run) == before
    assert all(torch.equal(v, weights[k]) for k, v in codec.state_dict().items())
    assert not [f for f in files(run) if f.startswith(".")]


def test_amending_knows_the_arguments(place):
    text = (place / "same" / "product.json").read_text()
    with pytest.raises(Refusal, match=r"'remapp'; did you mean 'remap'"):
        amend_product(place / "same", {"codec": {"remapp": 2.0}}, {})
    with pytest.raises(Refusal, match="'flow'"):
        amend_product(place / "same", {"flow": {"remap": 2.0}}, {})
    assert (place / "same" / "product.json").read_text() == text


def test_a_teacher_calibrated_since_is_still_the_teacher(place):
    amend_product(place / "teacher", {"codec": {"remap": 2.0}}, {})
    told = stillroom("sweep", place / "same", "--data", place / "photos", "--sizes 32 --scales 1 --limit 3 --quiet",
                     "--out", place / "again")
    amend_product(place / "teacher", {"codec": {"remap": 1.0}}, {})
    assert told.code == 0, told.err
    assert "No scale was chosen: at least 4 pictures are needed" in told.out
    found = json.loads((place / "again" / "sweep.json").read_text())
    assert found["choice"]["scale"] is None and not found["calibration"] and len(found["evaluation"]) == 3
    assert not {"klt", "klt-budget"} & {r["contender"] for r in found["rows"]}


# ---- tables, page ----

def test_csv_and_json_say_the_same(found, place):
    with (place / "student" / "sweep" / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(found["rows"]) > 40
    for line, row in zip(lines, found["rows"], strict=True):
        assert (int(line["size"]), line["contender"]) == (row["size"], row["contender"])
        assert float(line["scale"]) == row["scale"]
        assert int(line["pictures"]) == len(row["values"]["psnr"])
        for name, mean in row["means"].items():
            if mean["mean"] is not None:
                assert float(line[name]) == mean["mean"] and float(line[f"{name}_low"]) == mean["low"]
                known = torch.tensor([v for v in row["values"][name] if v is not None], dtype=torch.float64)
                assert (mean["mean"], mean["low"], mean["high"]) == pytest.approx(tuple(mean_interval(known)), rel=1e-6)
        assert float(line["rf_fid"]) == row["scores"]["rf_fid"] >= 0
    assert not any(line["encode_ms"] for line in lines if line["contender"] in ("teacher-int8", "ceiling"))
    assert "ms_ssim" not in lines[0] and "lpips_alex" not in lines[0] and "fid" not in lines[0]


def test_the_page_says_what_the_gain_is_made_of(found, place):
    out = place / "student" / "sweep"
    html = (out / "index.html").read_text()
    for words in ("times as many latents", "from as many latents at native size", "it does not show that anything",
                  "No picture fills 200 px", "neither LPIPS nor FID", "Trained at 32 px", "at the edge of the sweep",
                  "another number of channels"):
        assert words in html, words
    shown = sorted(p.name for p in (out / "pictures").iterdir())
    assert len(shown) == 3 * 7 and "worst-loss-student-at-2-difference.png" in shown
    with Image.open(out / "pictures" / "least-loss-original.png") as picture:
        assert picture.size == (64, 64)
    assert (out / "plots" / "psnr-64.png").stat().st_size > 5000
    assert html.count("<img") == 21 and "https://" not in html.replace("http://www.w3.org", "")


def test_pictures_that_a_codec_learned_from_are_told(found, place, tmp_path):
    assert found["seen_before"] == [] and "has seen" not in " ".join(in_words(found))
    shutil.copytree(place / "student", tmp_path / "run/product", ignore=shutil.ignore_patterns("sweep"))
    (tmp_path / "run" / "run.json").write_text(json.dumps({"inputs": {"data": {"name": str(place / "photos")}}}))
    assert stillroom("sweep", tmp_path / "run/product", "--data", place / "photos/../photos", "--sizes 32 --scales 1",
                     "--without klt,klt-budget,teacher-bf16,teacher-int8 --out", tmp_path / "out").code == 0
    (told,) = [line for line in in_words(json.loads((tmp_path / "out/sweep.json").read_text())) if "has seen" in line]
    assert told.startswith("Student learned from ")


def test_compared_pictures_are_least_median_and_worst(found, place):
    names, mine, theirs = (found["sizes"][1]["names"], *(row_of(found, n, 64, 1.0)["values"]["psnr"]
                                                         for n in ("student", "teacher")))
    order = [n for _, n in sorted((t - m, n) for n, m, t in zip(names, mine, theirs, strict=True))]
    html = (place / "student" / "sweep" / "index.html").read_text()
    for rank, name in (("Least", order[0]), ("Median", order[(len(order) - 1) // 2]), ("Worst", order[-1])):
        assert f"{rank} loss: {name}" in html


def test_public_lpips_files_give_lpips_its_name(place):
    torch.manual_seed(0)
    net, folder = Lpips("squeeze"), place / "weights"
    folder.mkdir()
    torch.save(net.backbone.state_dict() | {"classifier.1.weight": torch.zeros(1), "classifier.1.bias": torch.zeros(1)},
               folder / "squeezenet1_1-b8a52dc0.pth")
    torch.save({k: v.abs() for k, v in net.heads.state_dict().items()}, folder / "squeeze.pth")
    told = stillroom("sweep", place / "same", "--data", place / "photos", "--sizes 16,32 --scales 1 --limit 4 --quiet",
                     "--lpips", folder, "--out", place / "lpips")
    assert told.code == 0, told.err
    found = json.loads((place / "lpips" / "sweep.json").read_text())
    assert "lpips_squeeze" in row_of(found, "student", 32, 1.0)["values"]
    assert "lpips_squeeze" not in row_of(found, "student", 16, 1.0)["values"]       # too small for that net
    assert not any("random_lpips" in r["values"] for r in found["rows"])
    assert "LPIPS squeeze" in (place / "lpips" / "index.html").read_text()


@pytest.mark.parametrize(("words", "said"), [
    ("--sizes 64,x", "give numbers with commas"), ("--sizes 8", "outside 16"), ("--scales 0", "outside 0.01"),
    ("--scales nan", "outside 0.01"), ("--without teacher", "no contender that can be left out"),
    ("--teacher WIDE", "not its student"), ("--lpips PHOTOS", "holds no pair"),
    ("--sizes 4000", "none with sides of 4000"), ("--data NOWHERE", "NOWHERE"), ("--limit 0", "limit"),
    ("--siz 64", "did you mean '--sizes'"), ("--most-ms -1", "above 0"),
])
def test_what_cannot_be_is_refused_in_a_line(place, words, said):
    words = words.replace("WIDE", str(place / "wide")).replace("PHOTOS", str(place / "photos"))
    data = "" if "--data" in words else f"--data {place / 'photos'}"
    told = stillroom("sweep", place / "same", data, words, "--quiet --out", place / "refused")
    assert told.code == 2 and said in told.err, told.err
    assert len(told.err.strip().splitlines()) == 1 and not (place / "refused").exists()


def test_a_student_without_a_teacher_and_one_whose_teacher_changed(place, tmp_path):
    told = stillroom("sweep", place / "teacher", "--data", place / "photos")
    assert told.code == 2 and "its card names no teacher; say which with --teacher" in told.err
    product = load_product(place / "same")
    save_product(Product("codec", product.parts, {**product.card, "teacher_hash": "0" * 64}), tmp_path / "orphan")
    told = stillroom("sweep", tmp_path / "orphan", "--data", place / "photos")
    assert told.code == 2 and "no longer the codec that this student was distilled from" in told.err
    assert "usage: stillroom sweep RUN" in stillroom("sweep").err
    assert "nosuch: no such file or folder; give a run" in stillroom("sweep nosuch --data photos:test").err
    assert "--data must be given" in stillroom("sweep", place / "same").err
    told = stillroom("sweep", place / "same", "--data", place / "photos", "--save --sizes 32 --scales 1,2 --limit 3",
                     "--quiet --out", tmp_path / "out")
    assert told.code == 2 and "nothing was saved: no scale was chosen" in told.err
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_codec_that_learned_from_pictures_alone_stands_beside(place, tmp_path):
    told = stillroom("sweep", place / "same", "--data", place / "photos", "--sizes 64 --scales 1 --limit 3 --quiet "
                     "--without teacher-bf16,teacher-int8,klt,klt-budget --recon-only", place / "wide", "--out",
                     tmp_path / "out")
    assert told.code == 0, told.err
    measured = json.loads((tmp_path / "out/sweep.json").read_text())
    row = row_of(measured, "recon-only", 64, 1.0)
    x = squares_of(place, measured["sizes"][0]["names"], 64)
    with torch.no_grad():
        expected = psnr(library.load(place / "wide").reconstruct(x), x)
    assert len(x) > 1 and row["values"]["psnr"] == pytest.approx(expected.tolist(), abs=1e-3)


# ---- the tour ----


def test_the_demo_ends_with_a_page(place, tmp_path, monkeypatch):
    """With linear codecs in place of the two runs, whose settings their recipes take."""
    def made(folder, recipe, values, quiet):
        checked(find(recipe).Settings(out=folder, **values), recipe)
        shutil.copytree(place / {"student": "student", "scratch": "wide"}[folder.name], folder / "product",
                        dirs_exist_ok=True)
        (folder / "settings.toml").write_text(f'recipe = "{recipe}"')
        (folder / "run.json").write_text(json.dumps({"recipe": recipe, "steps": 7, "seconds": 3.0}))
        return folder

    monkeypatch.setattr(demo, "made", made)
    monkeypatch.setattr(demo, "SIZES", "64,128")
    monkeypatch.setattr(demo, "SCALES", "1,1.5")
    for measures in (True, False):          # and again, which finds its measurements
        told = stillroom("demo --quiet --out", tmp_path / "tour")
        assert told.code == 0 and f"the tour's page: {tmp_path}/tour/index.html\n" in told.out, told.err
        assert ("Chosen on" in told.out) == measures
    page = (tmp_path / "tour/index.html").read_text()
    assert "7 steps of encoder in 3 s" in page and "7 steps of codec in 3 s" in page
    measured = json.loads((tmp_path / "tour/student/sweep/sweep.json").read_text())
    assert {"teacher", "student", "scratch", "klt"} <= {row["contender"] for row in measured["rows"]}


# ---- the theorems' own arithmetic ----

def test_derivatives_of_a_linear_encoder_are_the_encoder():
    x = torch.stack([signed(painted(i, 32)) for i in range(3)])
    codec = fit_klt(x, channels=4)
    with torch.no_grad():
        for v in directions(x, torch.Generator().manual_seed(0)).values():
            assert v.square().flatten(1).mean(1).sqrt().tolist() == pytest.approx([1] * 3, abs=1e-5)
            exact = codec.encode(x + v) - codec.encode(x)
            torch.testing.assert_close(derivative(codec, x, v), exact, atol=2e-3, rtol=1e-3)
            opposite = alignment(stretched(codec, -2.0), codec, x, v)
            assert opposite.cosine.tolist() == pytest.approx([-1] * 3, abs=1e-4)
            assert opposite.ratio.tolist() == pytest.approx([2] * 3, rel=1e-3)
    assert "another picture" not in directions(x[:1], torch.Generator().manual_seed(0))
    across = aligned(torch.tensor([[[[1.0, 0]]]]), torch.tensor([[[[0, 2.0]]]]))
    assert (float(across.cosine), float(across.ratio)) == (0, 0.5)


def test_the_least_slope_touches_and_bounds():
    errors = {32: 0.3, 64: 0.1, 128: 0.2, 256: 0.5}
    slope = least_slope(errors, 64)
    assert slope == pytest.approx(0.2 / 32)
    assert all(e <= errors[64] + slope * abs(r - 64) + 1e-12 for r, e in errors.items())
    assert least_slope({32: 0.1, 64: 0.2}, 64) == 0 and least_slope({64: 1.0}, 64) == 0


def test_values_that_are_not_finite_are_left_out_and_counted():
    assert spread([1.0, math.inf, 3.0])._replace(low=0, high=0) == (2.0, 0, 0, 2)
    assert spread([math.nan]) == (None, None, None, 0)


def test_names_are_moved_apart_and_keep_their_order():
    moved = apart([0.5, 0.5, 0.52, 0.9], 0.1)
    order = sorted(moved)
    assert all(b - a >= 0.1 - 1e-6 for a, b in pairwise(order))
    assert moved[3] == 0.9 and moved[2] > max(moved[:2]) and apart([], 0.1) == []


def test_the_map_keeps_distances_in_a_plane():
    draws = np.random.default_rng(0)
    plane = draws.normal(size=(2, 6))
    paths = {"teacher": draws.normal(size=(4, 2)) @ plane, "student": draws.normal(size=(3, 2)) @ plane}
    flat = principal(paths)
    before, after = (np.concatenate([p["teacher"], p["student"]]) for p in (paths, flat))

    def apart_from_each_other(points):
        return np.linalg.norm(points[:, None] - points[None], axis=-1)

    np.testing.assert_allclose(apart_from_each_other(after), apart_from_each_other(before), atol=1e-9)
    assert principal({"teacher": np.ones((1, 1))})["teacher"].shape == (1, 2)
