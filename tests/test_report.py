"""The report of a run: what it says, that it fetches nothing, and that a browser shows it."""

import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure as Plot
from PIL import Image

from stillroom.recipes import listing
from stillroom.report import (
    Figure,
    Files,
    Header,
    Images,
    Panels,
    Settings,
    Table,
    Text,
    curve,
    curves,
    page,
    plots,
    scatter,
    words,
    write_report,
)
from stillroom.report.metrics import POINTS, gather, rows, thin
from stillroom.settings import Refusal
from stillroom.train.pictures import grid

SETTINGS = """recipe = "vsd"
steps = 2000
seed = 7
batch = 256
data = "<b>digits</b> & more"

[student]
lr = 0.002
betas = [0.0, 0.99]

[student.average]
decay = 0.999
"""


def record(**changed):
    return {
        "recipe": "vsd", "stillroom": "0.1.0", "created": "2026-11-21T03:25:43+00:00",
        "finished": "2026-11-21T03:38:13+00:00", "seconds": 750.4,
        "machine": {"platform": "Linux", "processor": "x86_64", "cores": 2, "memory_gib": 23.5, "device": "cpu",
                    "torch": "2.13.0", "python": "3.11.7"},
        "processes": 1, "parameters": {"student": 1024, "fake": 17026}, "precision": "float32",
        "notes": ["bf16 1.8x slower here: float32 kept"],
        "sessions": [{"start_step": 0, "started": "2026-11-21T03:25:43+00:00"},
                     {"start_step": 500, "started": "2026-11-21T03:32:00+00:00"}],
    } | changed


def lines(steps=2000, every=20):
    for step in range(every, steps + 1, every):
        row = {"step": step, "stage": "warm" if step < 400 else "joint", "seconds": step * 0.3, "steps_per_second": 3.1,
               "fake/dsm": 0.25 + 1 / step}
        yield row | ({"student/gap": 10 * float(np.exp(-step / 200))} if step >= 400 else {})


def digits(count=6, seed=0):
    sheet = io.BytesIO()
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    grid(images, columns=3).save(sheet, "png")
    return sheet.getvalue()


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    for name in ("samples", "product", "tables", "checkpoints/step-2000"):
        (run / name).mkdir(parents=True)
    (run / "settings.toml").write_text(SETTINGS)
    (run / "run.json").write_text(json.dumps(record()))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines()))
    for step in (500, 1000, 2000):
        (run / f"samples/step-{step:06d}.png").write_bytes(digits(seed=step))
    (run / "samples/one-step_vs_teacher.png").write_bytes(digits())
    (run / "product/product.json").write_text(json.dumps({
        "kind": "points", "card": {"frechet": 1.2345, "space": {"range": [-1, 1]}},
        "parts": {"points": {"class": "Points", "arguments": {"count": 1024}}},
    }))
    (run / "product/points 1.safetensors").write_bytes(b"0" * 4096)
    (run / "tables/distance.json").write_text(json.dumps({
        "title": "Distance to the data", "columns": ["arm", "sliced W2", "recall"],
        "rows": [["teacher", 0.081234, 0.91], ["untrained", 1.75, None]], "note": "Lower is nearer."}))
    return run


class Read(HTMLParser):
    """Tags with their attributes, and the text inside each kind of tag."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)
            self.texts.append((tag, []))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open:
            next(texts for tag, texts in reversed(self.texts) if tag == self.open[-1]).append(data)

    def inside(self, tag):
        return ["".join(texts).strip() for name, texts in self.texts if name == tag]

    def attributes(self, name):
        return [found[name] for _, found in self.tags if name in found]


def read(run):
    return Read(write_report(run).read_text("utf-8"))


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


# --- what a report says

def test_a_finished_run_is_told_from_its_folder(run):
    page = read(run)
    assert page.inside("h1") == ["vsd"]
    assert next(entry.title for entry in listing() if entry.name == "vsd") in page.inside("p")
    assert page.inside("h2") == [
        "Product", "Samples", "Curves", "Distance to the data", "Settings", "Notes", "Sessions", "Files"
    ]
    facts = dict(zip(page.inside("dt"), page.inside("dd"), strict=True))
    assert facts["Wall time"] == "12 min 30 s in 2 sessions"
    assert facts["Machine"] == "cpu, 2 cores, 23.5 GiB"
    assert facts["Software"] == "torch 2.13.0, Python 3.11.7"
    assert facts["Parameters"] == "student 1,024, fake 17,026"
    assert facts["Started"] == "21 November 2026, 03:25 UTC"
    assert facts["frechet"] == "1.2345" and facts["range"] == "[-1, 1]" and facts["points"] == "Points(count=1024)"
    assert facts["data"] == "<b>digits</b> & more" and facts["lr"] == "0.002" and facts["decay"] == "0.999"
    assert {"student", "student.average", "fake", "the run"} <= set(page.inside("h3"))
    assert "finished: 2,000 steps" in page.inside("p")
    assert "bf16 1.8x slower here: float32 kept" in page.inside("p")
    assert page.inside("figcaption") == ["step 2000", "step 1000", "step 500", "one step vs teacher"]
    cells = page.inside("td")
    assert cells[:6] == ["teacher", "0.08123", "0.91", "untrained", "1.75", "–"]
    last = dict(label.split(", ", 1) for label in page.attributes("aria-label") if ", " in label)
    assert last["student/gap"] == "gap: 0.000454 at the end"
    assert last["fake/dsm"] == "dsm: 0.2505 at the end"


def test_a_stopped_run_says_where(run):
    (run / "run.json").write_text(json.dumps(record(finished=None, seconds=0.0)))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines(1240)))
    page = read(run)
    assert "stopped at step 1,240 of 2,000" in page.inside("p")
    assert "6 min 12 s in 2 sessions" in page.inside("dd")  # of the last row: the record has none before the end


def test_a_checkpoint_after_the_last_row_is_where_a_run_stopped(run):
    (run / "run.json").write_text(json.dumps(record(steps=4020, finished=None)))
    (run / "checkpoints/step-00002031").mkdir(parents=True)
    assert "stopped at step 2,031 of 4,020" in read(run).inside("p")


def test_steps_are_those_of_the_whole_run_where_its_settings_name_those_of_a_stage(run):
    (run / "run.json").write_text(json.dumps(record(steps=4020)))
    assert "finished: 4,020 steps" in read(run).inside("p")
    (run / "run.json").write_text(json.dumps(record(steps=4020, finished=None)))
    assert "stopped at step 2,000 of 4,020" in read(run).inside("p")


def test_a_run_that_has_just_started_has_a_report(tmp_path):
    (tmp_path / "settings.toml").write_text('recipe = "vsd"\nsteps = 2000\n')
    (tmp_path / "run.json").write_text(json.dumps({"recipe": "vsd", "finished": None}))
    page = read(tmp_path)
    assert page.inside("h2") == ["Curves", "Settings", "Files"]
    assert any(text.startswith("No measurements yet") for text in page.inside("p"))
    assert "stopped before the first row, 0 of 2,000" in page.inside("p")


def test_a_torn_last_line_is_left_out_and_said(run):
    whole = read(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 2020, "student/gap": 9.0, "note": "é'.encode()[:-1])  # cut inside a character
    torn = read(run)
    curves = [label for label in whole.attributes("aria-label") if "at the end" in label]
    assert curves == [label for label in torn.attributes("aria-label") if "at the end" in label] != []
    assert any("one line of metrics.jsonl that could not be read (line 101)" in text for text in torn.inside("p"))
    assert not any("could not be read" in text for text in whole.inside("p"))


def test_a_torn_sample_is_left_out_and_said(run):
    path = run / "samples/step-002000.png"
    path.write_bytes(path.read_bytes()[:-40])
    page = read(run)
    assert "step 2000" not in page.inside("figcaption") and "step 1000" in page.inside("figcaption")
    assert "Left out, not a whole picture: step-002000.png." in page.inside("p")


def test_long_series_of_samples_are_thinned_with_first_and_last(run):
    for step in range(10, 400, 10):
        (run / f"samples/step-{step:06d}.png").write_bytes(digits())
    page = read(run)
    captions = page.inside("figcaption")
    assert len(captions) == 9 and captions[0] == "step 2000" and captions[7] == "step 10"
    assert "9 of 43 pictures, evenly spaced; the others are in samples/." in page.inside("p")


@pytest.mark.parametrize(("name", "text", "told"), [
    ("settings.toml", None, "no settings.toml"),
    ("run.json", None, "no run.json"),
    ("settings.toml", "steps = = 3", "settings.toml: not readable as TOML"),
    ("run.json", '{"recipe": ', "run.json: not readable as JSON"),
    ("run.json", "[1]", "run.json: holds a list"),
    ("tables/distance.json", '{"title": "x", "rows": []}', "here columns is missing"),
    ("tables/distance.json", '{"title": "x", "columns": ["a"], "rows": [[1, 2]]}', "row 1 has 2 cells for 1 columns"),
    ("tables/distance.json", '{"title": "x", "columns": 3, "rows": [[1, 2]]}', "distance.json"),
])
def test_a_folder_that_cannot_be_reported_is_refused_and_the_old_report_stays(run, name, text, told):
    before = write_report(run).read_bytes()
    if text is None:
        (run / name).unlink()
    else:
        (run / name).write_text(text)
    with pytest.raises(Refusal, match=told):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".report*"))


def test_a_full_disk_is_one_line_and_the_old_report_stays(run, monkeypatch):
    before = write_report(run).read_bytes()

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(Refusal, match=r"report\.html could not be written: No space left on device; free some space"):
        write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert not list(run.glob(".report*"))


def test_the_same_folder_gives_the_same_bytes(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_new_report_takes_the_place_of_the_old_one_in_one_move(run, tmp_path):
    before = write_report(run).read_bytes()
    (tmp_path / "open").hardlink_to(run / "report.html")  # what a reader holds
    (run / "settings.toml").write_text('recipe = "sds"\n')
    assert write_report(run).read_bytes() != before == (tmp_path / "open").read_bytes()


# --- what a page may not do

def test_nothing_is_fetched_and_links_lead_into_the_run(run):
    page = read(run)
    assert "script" not in [tag for tag, _ in page.tags]
    for name in ("src", "srcset", "poster", "action", "data", "xlink:href"):
        assert all(value.startswith(("data:", "#")) for value in page.attributes(name))
    links = [value for value in page.attributes("href") if not value.startswith(("data:", "#"))]
    assert "product/points%201.safetensors" in links
    assert all((run / link.replace("%20", " ")).exists() for link in links)
    policy = next(found["content"] for _, found in page.tags if "http-equiv" in found)
    assert "default-src 'none'" in policy and "http" not in policy
    text = (run / "report.html").read_text()
    assert "@import" not in text and "http://" not in text and "https://" not in text


def test_names_are_unique_and_used(run):
    page = read(run)
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    used = [v[1:] for v in page.attributes("href") + page.attributes("xlink:href") if v.startswith("#")]
    assert set(used) <= set(ids)


def test_everything_that_is_not_a_picture_is_escaped():
    bad = '<script>alert("x")</script> $x_{ & $'
    figures = curves([{"step": s, f"{bad}/{bad[-8:]}": s + 1.0, "stage": bad + str(s)} for s in range(3)])
    html = page(bad, [
        Text(bad, [bad]), Text("one", bad), Table(bad, [bad], [[bad]], bad), Panels(bad, figures, bad),
        Panels(bad, {bad: scatter({bad: np.zeros((5, 2))})}), Figure(bad, digits(), bad),
        Images(bad, [(digits(), bad)], bad), Settings(bad, {bad: {bad: bad}}), Files(bad, [(bad, bad, bad, bad)]),
    ], Header(bad, bad, "bad", bad, [(bad, bad)]))
    assert "<script" not in html
    found = Read(html)
    assert found.inside("h1") == [bad] and found.inside("td")[0] == bad
    assert bad in found.inside("text") and bad[-8:] in found.inside("text") and bad in found.inside("title")[0]


def test_equal_titles_get_their_own_anchors():
    found = Read(page("p", [Text("Über all", "a"), Text("Über all", "b"), Text("漢", "c"), Text("x", "d")]))
    ids = [attributes["id"] for tag, attributes in found.tags if tag == "section"]
    assert len(set(ids)) == 4
    assert [v for v in found.attributes("href") if v.startswith("#")] == [f"#{i}" for i in ids]


def test_a_broken_picture_or_a_ragged_table_is_not_shown():
    with pytest.raises(Refusal, match="not a whole"):
        page("p", [Images("i", [(b"not a picture", "c")])])
    with pytest.raises(ValueError, match="row 2 has 1 cells for 2 columns"):
        Table("t", ["a", "b"], [[1, 2], [3]])


def test_a_foreign_figure_keeps_its_paper_and_ours_take_the_page_s_ink():
    foreign = Plot(figsize=(3, 2))
    foreign.add_subplot().plot([1, 2], color="#123456")
    html = page("p", [Figure("f", foreign)])
    assert "fill: #ffffff" in html and "#123456" in html
    ours = page("p", [Panels("c", curves([{"step": 1, "a/b": 2.0}, {"step": 2, "a/b": 3.0}]))])
    svg = ours[ours.index("<svg") :]
    assert "var(--accent)" in svg and "var(--ink)" in svg and "#" + "ffffff" not in svg and plots.ACCENT not in svg


def test_plotting_keeps_off_pyplots_global_state():
    code = "import sys, stillroom.report; print({'matplotlib.pyplot'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# --- measurements

def test_bins_keep_the_mean_and_bound_it():
    values = np.random.default_rng(0).standard_normal(POINTS * 25)
    steps = np.arange(len(values)) * 10.0
    line = thin(steps, values)
    assert len(line.mean) == POINTS
    np.testing.assert_allclose(line.mean, values.reshape(POINTS, 25).mean(1), atol=1e-12)
    np.testing.assert_array_equal(line.low, values.reshape(POINTS, 25).min(1))
    np.testing.assert_array_equal(line.high, values.reshape(POINTS, 25).max(1))
    np.testing.assert_allclose(line.step, steps.reshape(POINTS, 25).mean(1))


@pytest.mark.parametrize("count", [0, 1, 7, POINTS, POINTS + 1, 3 * POINTS - 1])
def test_every_row_is_in_exactly_one_bin(count):
    line = thin(np.arange(count, dtype=float), np.ones(count), most=POINTS)
    assert len(line.mean) == min(count, POINTS) and np.all(line.mean == 1)
    assert np.all(np.diff(line.step) > 0)


def test_bins_average_what_is_finite_and_are_empty_where_nothing_is():
    line = thin(np.arange(6.0), np.array([1, np.nan, np.inf, -np.inf, 5, 1e308]), most=3)
    np.testing.assert_array_equal(line.mean, [1, np.nan, 5])
    np.testing.assert_array_equal(line.high, [1, np.nan, 5])


def test_rows_written_again_after_a_resume_replace_the_first():
    first = [{"step": s, "stage": "a" if s < 30 else "b", "x/y": 1.0, **({"x/z": 1.0} if s == 40 else {})}
             for s in (10, 20, 30, 40)]
    second = [{"step": s, "stage": "a" if s < 35 else "b", "x/y": 2.0} for s in (25, 35, 45)]
    metrics = gather([*first, *second, {"step": 50, "x/z": 2.0}])
    assert list(metrics.series["x/y"].steps) == [10, 20, 25, 35, 45]
    assert list(metrics.series["x/y"].values) == [1, 1, 2, 2, 2]
    assert metrics.stages == [(10, "a"), (35, "b")] and metrics.step == 50


def test_unreadable_rows_are_counted_wherever_they_stand(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a/b": 1}\n{"step": 2, "a{"step": 3}\n\n[1]\n{"a/b": 2}\n{"step": 4, "a/b": NaN}')
    bad = []
    found = list(rows(path, bad))
    assert [row["step"] for row in found] == [1, 4] and bad == [2, 4, 5]


def test_values_that_are_not_finite_are_marked_and_draw_nothing_absurd():
    values = [1.0, None, float("nan"), float("inf"), 10**400, 1e308, -1e308, 2.0]
    (panel,) = curves({"step": s, "r/t": v} for s, v in enumerate(values))["r"]
    assert panel.get_label() == "r/t, t: 6 not finite · 2 at the end"
    low, high = panel.axes[0].get_ylim()
    assert 0.5 < low < 1 and 2 < high < 2.5
    for values in ([float("nan")] * 3, [0.0], [1e-300, 1e-299, 1.0], []):
        html = page("p", [Figure("f", curve("t", np.arange(len(values)) * 1.0, np.array(values)))])
        assert "<svg" in html


@pytest.mark.parametrize(("values", "scale"), [
    ([1, 101], "log"), ([1, 99], "linear"), ([0, 1e6], "linear"), ([-1, 1e6], "linear"),
    ([1e-9, float("nan"), 1], "log"),
])
def test_decades_are_drawn_where_all_is_positive_and_spans_more_than_two(values, scale):
    panel = curve("x", np.arange(len(values)) * 1.0, np.array(values, dtype=float))
    assert panel.axes[0].get_yscale() == scale


def test_noise_within_a_bin_does_not_make_an_axis_of_decades():
    values = np.random.default_rng(0).random(POINTS * 50) + 1e-9
    assert curve("x", np.arange(len(values)) * 1.0, values).axes[0].get_yscale() == "linear"


def test_roles_stay_together_and_the_run_comes_last():
    groups = curves([{"step": 1, "speed": 1.0, "b/x": 1.0, "a/x": 1.0, "b/y": 1.0, "seconds": 3.0, "note": "text"}])
    assert {role: len(panels) for role, panels in groups.items()} == {"b": 2, "a": 1, "": 1}
    assert list(groups) == ["b", "a", ""]


def test_stages_open_with_a_dashed_line():
    (panel,) = curves({"step": s, "stage": "ab"[s > 10], "r/t": 1.0} for s in range(1, 20))["r"]
    drawn = [np.asarray(line.get_xdata()) for line in panel.axes[0].lines]
    assert [x.tolist() for x in drawn if len(x) == 2] == [[11, 11]]


def test_a_long_run_gives_a_page_as_small_as_a_short_one(run):
    short = write_report(run).stat().st_size
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines(60_000, 1)))
    assert write_report(run).stat().st_size < short + 3 * 60_000  # three panels of at most POINTS bins each


# --- pictures

def test_density_stands_where_the_target_is_for_samples_and_for_functions():
    centre = np.array([1.0, -0.5])
    cloud = np.random.default_rng(0).normal(centre, 0.1, (20_000, 2))
    low, high = -2 * np.ones(2), 2 * np.ones(2)

    def law(z):
        assert z.shape == (96 * 96, 2) and z.dtype == np.float32
        return np.exp(-((z - centre) ** 2).sum(1) / 0.02)

    for target in (cloud, law):
        field = plots._density(target, low, high)
        row, column = np.unravel_index(field.argmax(), field.shape)
        assert field.max() == 1
        np.testing.assert_allclose([low[0] + (column + 0.5) * 4 / 96, low[1] + (row + 0.5) * 4 / 96], centre, atol=0.1)


def test_clouds_share_the_target_s_axes_and_strays_are_counted():
    ring = np.stack([np.cos(np.arange(1000)), np.sin(np.arange(1000))], 1)
    far = torch.tensor(ring[:50]).clone()
    far[:3], far[3] = 40.0, float("nan")
    near, strayed = scatter({"near": ring, "far": far}, target=ring)
    assert near.axes[0].get_xlim() == strayed.axes[0].get_xlim() and near.axes[0].get_xlim()[1] < 1.5
    assert near.get_label() == "near: 1,000 points" and strayed.get_label() == "far: 50 points, 3 outside, 1 not finite"
    (drawn,) = strayed.axes[0].lines
    assert np.asarray(drawn.get_xdata()).shape == (46,)
    with pytest.raises(ValueError, match="'flat'"):
        scatter({"flat": np.zeros(4)})


# --- words

@pytest.mark.parametrize(("said", "meant"), [
    (words.number(9999), "9999"), (words.number(12345), "12,345"), (words.number(0.081234), "0.08123"),
    (words.number(9999.9), "10,000"), (words.number(1.2345e-5), "1.234e-5"), (words.number(-2.5e9), "-2.5e9"),
    (words.number(float("nan")), "nan"), (words.number(0.0), "0"), (words.number(0.0010408, 6), "0.0010408"),
    (words.duration(0), "0.0 s"), (words.duration(9.96), "10 s"), (words.duration(59.7), "1 min"),
    (words.duration(750.4), "12 min 30 s"), (words.duration(7500), "2 h 5 min"), (words.duration(86_400), "1 d"),
    (words.duration(float("nan")), "unknown"),
    (words.size(1023), "1023 B"), (words.size(1024), "1.0 KiB"), (words.size(2**20 - 1), "1.0 MiB"),
    (words.size(5 * 2**40), "5.0 TiB"),
    (words.caption("step-000500"), "step 500"), (words.caption("t-0.05_seed-000"), "t 0.05 seed 0"),
    (words.value(True), "true"), (words.value([0.0, 0.99]), "[0.0, 0.99]"),
    (words.value({"a": [None]}), '{"a": [null]}'),
])
def test_words(said, meant):
    assert said == meant


def test_long_values_are_cut_and_say_how_long_they_are():
    told = words.value(list(range(5000)))
    assert told.startswith("[0, 1, 2, ") and told.endswith("… (5,000 values)") and len(told) < 230


def test_names_sort_as_people_count():
    assert sorted(["step-1000", "step-900", "data", "7"], key=words.natural) == ["7", "data", "step-900", "step-1000"]


# --- in a browser

def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("no chromium, chromium-browser or google-chrome on PATH")


def opened(path: Path, profile: Path) -> tuple[str, str]:
    done = subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         f"--user-data-dir={profile}", "--window-size=390,844", "--enable-logging=stderr", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )
    return done.stdout, done.stderr


def test_a_browser_shows_the_page_without_a_word_on_the_console(run, tmp_path):
    dom, console = opened(write_report(run), tmp_path / "profile")
    assert [line for line in console.splitlines() if "CONSOLE" in line] == []
    page = Read(dom)
    assert page.inside("h1") == ["vsd"] and "Curves" in page.inside("h2")
    assert sum(tag == "img" for tag, _ in page.tags) == 4
    assert "gap" in page.inside("text") and "0.000454" in page.inside("text")

    control = tmp_path / "control.html"  # the console is heard, and the page's own policy stops scripts and fetches
    foreign = '<script>document.title = "ran"</script><img src="http://localhost/picture.png"></body>'
    control.write_text((run / "report.html").read_text("utf-8").replace("</body>", foreign), encoding="utf-8")
    dom, console = opened(control, tmp_path / "control")
    assert Read(dom).inside("title") == page.inside("title")
    assert sum("CONSOLE" in line and "Content Security Policy" in line for line in console.splitlines()) == 2


def test_a_browser_decodes_every_picture_and_a_phone_does_not_scroll_sideways(run, tmp_path):
    clouds = scatter({"a": np.random.default_rng(0).standard_normal((500, 2))})
    html = page("probe", [Panels("clouds", {"": clouds}), Images("i", [(digits(), "d")]),
                          Table("wide", [f"column {i}" for i in range(30)], [list(range(30))])])
    both = [write_report(run).read_text("utf-8"), html]
    for name, text in enumerate(both):
        policy = text[text.index('<meta http-equiv') : text.index('<link rel="icon"')]
        probe = """<script>addEventListener("load", () => { document.body.dataset.probe = JSON.stringify({
            widths: [...document.images].map(i => i.naturalWidth),
            plots: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().height),
            sideways: document.documentElement.scrollWidth - document.documentElement.clientWidth }) })</script>"""
        path = tmp_path / f"probe{name}.html"
        path.write_text(text.replace(policy, probe), encoding="utf-8")
        dom, _ = opened(path, tmp_path / f"profile{name}")
        found = json.loads(next(iter(Read(dom).attributes("data-probe"))))
        assert len(found["widths"]) == text.count("<img ") > 0 and all(width > 0 for width in found["widths"])
        assert len(found["plots"]) == text.count("<svg ") > 0 and all(height > 50 for height in found["plots"])
        assert found["sideways"] <= 0
