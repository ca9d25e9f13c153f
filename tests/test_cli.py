"""Commands do what they say: a run, its product and pictures, recipes of one's own, what is printed and what is not."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stillroom as package
from command import TINY, files, printed, python, stillroom
from stillroom.cli.demo import made
from stillroom.cli.train import anchored, anchored_place
from stillroom.recipes import listing
from stillroom.recipes.dmvae import DMVAE
from stillroom.recipes.rae import RAE
from stillroom.recipes.tokenizer import Tokenizer
from stillroom.settings import Place, read_toml
from stillroom.train import load
from stillroom.train.folder import read_rows
from stillroom.train.world import World

MINE = '''"""Learns one number.

Paper: none.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from stillroom.nets import buildable
from stillroom.settings import Optimizer, Run
from stillroom.train import Product, Recipe, Role, Stage


@dataclass(frozen=True, kw_only=True)
class Settings(Run):
    steps: int = 40
    goal: float = 3.0
    """Where the number should go."""
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=0.1, name="adam"))


@buildable
class Number(nn.Module):
    def __init__(self, start: float = 0.0):
        super().__init__()
        self.x = nn.Parameter(torch.tensor([start]))


class Mine(Recipe):
    Settings = Settings

    def __init__(self, settings):
        self.settings, self.number = settings, Number(1.0)

    def roles(self):
        return {"number": Role(self.number, self.settings.student)}

    def stages(self):
        return [Stage("train", self.settings.steps)]

    def losses(self, batch, turn):
        noise = turn.randn((turn.batch, 1))
        return {"number": {"square": (self.number.x - self.settings.goal + 0.1 * noise).square()}}

    def product(self):
        return Product("number", {"number": self.number}, {})
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A flow of 50 steps."""
    run = tmp_path_factory.mktemp("digits") / "run"
    told = stillroom("train flow", TINY, "--steps 50 --log-every 10 --out", run)
    assert told.code == 0, told.err
    return run, told


def weights(run):
    return load(run).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- looking around ----


@pytest.mark.parametrize("words", [
    ["--help"], ["--version"], ["recipes"], ["recipes", "--json"], ["claims", "list"], ["train", "--help"],
    ["distill", "--help"], ["report", "--help"], ["resume", "--help"], ["nosuch"], ["train", "flwo"],
])
def test_looking_around_imports_no_torch(words):
    script = f"import sys; from stillroom.cli.main import main; code = main({words}); " \
             "sys.exit(99 if 'torch' in sys.modules else code)"
    assert python("-c", script).returncode == (2 if words[-1] in ("nosuch", "flwo") else 0)


def test_env_says_what_a_bug_report_needs():
    said = dict(line.split(maxsplit=1) for line in printed("env").splitlines())
    assert said["torch"] == torch.__version__ and said["stillroom"] == printed("--version").strip()
    assert {"diffusers", "safetensors", "system", "cuda"} <= said.keys()


def test_recipes_are_listed_with_title_and_paper():
    told = stillroom("recipes --json")
    rows = json.loads(told.out)
    assert [r["name"] for r in rows] == [e.name for e in listing()]
    assert all(r["title"] and r["paper"] and r["verb"] in ("train", "distill") for r in rows)
    plain = stillroom("recipes").out
    assert all(r["title"] in plain for r in rows)
    said = {r["name"]: r["claims"] for r in rows}
    assert set(said["drifting"]) == {"drift-rae", "drift-stability", "drifting-identities", "drifting-scatter"}
    assert set(said["vsd"]) == {"vsd"} and said["flow"] == {} and list(said["dmvae"]) == ["dmvae", "dmvae-toy"]
    told = ", ".join(f"{name} {verdict}" for name, verdict in said["drifting"].items())
    assert f"  claim: {told}\n" in plain and f"  claim: {said['vsd']['vsd']}\n" in plain


def test_help_shows_every_setting_with_its_words():
    told = stillroom("train flow --help")
    assert told.code == 0
    words = " ".join(told.out.split())
    for expected in ("Flow matching:", "--model.lr", "--sampler-steps", "Share of labels dropped", "--config FILE"):
        assert expected in words


def test_a_file_dropped_into_recipes_is_found(tmp_path):
    """In a copy of the package: nothing else has to be told."""
    shutil.copytree(Path(package.__file__).parent, tmp_path / "stillroom", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "stillroom/recipes/my_number.py").write_text(MINE)
    env = {"PYTHONPATH": str(tmp_path)}
    rows = json.loads(python("-m", "stillroom", "recipes", "--json", env=env).stdout)
    assert {"name": "my-number", "verb": "distill", "title": "Learns one number.", "paper": "none."}.items() <= next(
        r for r in rows if r["name"] == "my-number"
    ).items()
    done = python("-m", "stillroom", "distill", "my-number", "--out", tmp_path / "run", "--quiet", env=env)
    assert done.returncode == 0, done.stderr
    assert 'recipe = "my-number"' in (tmp_path / "run/settings.toml").read_text()


# ---- a run ----


def test_a_run_leaves_what_it_says(digits):
    run, told = digits
    assert {"settings.toml", "metrics.jsonl", "run.json", "product/product.json", "report.html"} <= set(files(run))
    assert told.out == f"product: {run}/product\nreport:  {run}/report.html\n"
    assert [r["step"] for r in read_rows(run / "metrics.jsonl")] == [10, 20, 30, 40, 50]
    lines = told.err.splitlines()
    assert lines[0] == "flow: step 0 of 50"
    assert [line.split()[:2] for line in lines[1:]] == [["step", f"{k}/50"] for k in (10, 20, 30, 40, 50)]


def test_pictures_are_the_same_at_any_batch(digits, tmp_path):
    run, _ = digits
    for name, batch in {"a": 256, "b": 3}.items():
        assert stillroom("sample", run, f"--n 10 --steps 3 --batch {batch} --out {name}.npz").code == 0
    a, b = np.load("a.npz"), np.load("b.npz")
    assert a["x"].shape == (10, 1, 8, 8) and np.abs(a["x"] - b["x"]).max() < 1e-5
    assert a["y"].tolist() == b["y"].tolist() == list(range(10))
    assert np.allclose(a["x"], load(run).sample(10, steps=3).numpy(), atol=1e-5)


def test_pictures_are_written_as_a_sheet_or_one_by_one(digits, tmp_path):
    run, _ = digits
    told = stillroom("sample", run, "--n 5 --steps 3 --out deep/er/images")
    assert (told.code, told.out, told.err) == (0, "deep/er/images\n", "")
    stillroom("sample", run, "--n 5 --steps 3 --out x.npz --guidance 1")
    x = np.load("x.npz")["x"].astype(np.float64)
    expected = np.rint((x.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    assert files(Path("deep/er/images")) == [f"{i:06d}.png" for i in range(5)]
    for i, image in enumerate(expected):
        written = np.asarray(Image.open(f"deep/er/images/{i:06d}.png"))
        assert np.array_equal(written, np.repeat(image[0][..., None], 3, 2))
    assert stillroom("sample", run, "--n 5 --steps 3").out.strip() == f"{run}/samples/drawn.png"
    sheet = np.asarray(Image.open(run / "samples/drawn.png"))
    assert np.array_equal(sheet[:48:6, :48:6, 0], expected[0][0])  # each pixel six times as large
    stillroom("sample", run / "product", "--n 2 --steps 1")
    assert Path("drawn.png").exists()


@pytest.mark.parametrize("more", [
    "--path ddpm --prediction eps --sampler ddim",
    "--path cosine --times logit-normal",
    "--path ve --prediction x0 --times log-normal --sampler euler",
    "--shift 2 --prediction x0 --sampler dpmpp_2m",
    "--data shapes --size 16 --net dit --patch 4 --width 64",
])
def test_paths_nets_and_samplers_make_loadable_products(more):
    told = stillroom("train flow", TINY, "--steps 10 --quiet --out run", more)
    assert told == (0, "", "")
    assert stillroom("sample run --n 3 --steps 4 --out x.npz").code == 0
    x = np.load("x.npz")["x"]
    assert np.isfinite(x).all() and len(np.unique(x.round(4), axis=0)) == 3


def test_a_runs_own_settings_file_makes_it_again_bit_for_bit(digits):
    run, _ = digits
    assert stillroom("train flow --quiet --config", run / "settings.toml", "--out again").code == 0
    old, new = (read_toml(p / "settings.toml") for p in (run, Path("again")))
    assert old | {"out": "again"} == new and new["recipe"] == "flow"
    assert equal(weights(run), weights("again"))


def test_a_settings_file_of_another_recipe_is_refused(digits):
    run, _ = digits
    told = stillroom("distill vsd --config", run / "settings.toml", "--out x")
    assert told.code == 2 and told.err.endswith("settings of the recipe flow, not of vsd; use stillroom train flow\n")


def test_resume_of_a_finished_run_changes_nothing(digits):
    run, _ = digits
    shutil.copytree(run, "copy")
    assert stillroom("resume copy --quiet") == (0, "", "")
    assert equal(weights(run), weights("copy"))
    assert [r["step"] for r in read_rows(Path("copy/metrics.jsonl"))] == [10, 20, 30, 40, 50]
    assert stillroom("report copy") == (0, "copy/report.html\n", "")


def test_data_named_from_one_folder_is_found_from_another(monkeypatch, tmp_path):
    Path("pictures/train").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(f"pictures/train/{i}.png")
    for name, data in {"plain": "pictures", "split": "pictures:train"}.items():
        told = stillroom(f"train flow --size 8 --batch 4 --width 16 --depth 1 --precision float32 --steps 1 --quiet "
                         f"--data {data} --out {name}")
        assert told == (0, "", "")
        assert f'data = "{tmp_path}/{data}"' in Path(name, "settings.toml").read_text()
        shutil.rmtree(f"{name}/checkpoints")
        Path("elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir("elsewhere")
        assert stillroom(f"resume ../{name} --quiet").code == 0
        monkeypatch.chdir(tmp_path)


def test_a_run_whose_data_moved_is_told_where_it_is(tmp_path):
    Path("pictures").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(f"pictures/{i}.png")
    words = TINY.replace("digits", "pictures")
    assert stillroom("train flow", words, "--steps 2 --checkpoint-every 1 --quiet --out run") == (0, "", "")
    whole = weights("run")
    shutil.rmtree("run/product")
    shutil.rmtree("run/checkpoints/step-00000002")
    Path("pictures").rename("moved")
    assert stillroom("resume run --quiet").code == 2
    told = stillroom("resume run --quiet --nosuch x")
    assert told.code == 2 and "'--nosuch' is no place that the settings of run name" in told.err
    assert stillroom("resume run --quiet --data moved") == (0, "", "")
    assert read_toml(Path("run/settings.toml"))["data"] == f"{tmp_path}/moved"
    assert equal(weights("run"), whole)


def test_a_folder_called_like_builtin_data_does_not_hide_it():
    Path("digits").mkdir()
    assert stillroom("train flow", TINY, "--steps 1 --quiet --out run").code == 0
    assert 'data = "digits"' in Path("run/settings.toml").read_text()


def test_a_run_made_in_python_is_drawn_from_too(digits):
    shutil.copytree(digits[0], "run")
    Path("run/settings.toml").write_text(Path("run/settings.toml").read_text().replace('"flow"', '"python:Mine"'))
    assert stillroom("sample run --n 2 --steps 1 --out x.npz") == (0, "x.npz\n", "")


def test_a_demo_writes_the_page_that_its_run_lacks(tmp_path):
    values = {"data": "digits", "size": 8, "batch": 8, "width": 16, "depth": 1, "precision": "float32", "steps": 1}
    for lost in ("run.json", "report.html"):
        made(tmp_path / "run", "flow", values, True)
        if lost == "run.json":              # killed between the product and the word that all is done
            told = json.loads((tmp_path / "run/run.json").read_text())
            (tmp_path / "run/run.json").write_text(json.dumps(told | {"finished": None, "seconds": 0.0}))
        else:
            (tmp_path / "run/report.html").unlink()
    made(tmp_path / "run", "flow", values, True)
    assert (tmp_path / "run/report.html").exists()
    assert json.loads((tmp_path / "run/run.json").read_text())["finished"]


# ---- what is printed ----


def test_pictures_that_any_process_could_not_read_are_told(tmp_path, monkeypatch):
    """Each knows what it read; what two of them say alike is said once."""
    for i, x in enumerate(torch.randint(256, (24, 8, 8, 3), generator=torch.Generator().manual_seed(0))):
        Image.fromarray(x.to(torch.uint8).numpy()).save(tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_bytes(b"")
    monkeypatch.setattr(World, "each", lambda self, mine: [mine, ["of another process"], mine])
    told = stillroom("train flow", TINY.replace("digits", str(tmp_path)), "--bad-share 0.1 --steps 6 --out run")
    assert told.code == 0, told.err
    lines = " ".join(told.err.split())
    assert lines.count("others took their place") == 1 and lines.count("of another process") == 1


def test_plan_says_the_cost_and_leaves_nothing(tmp_path):
    told = stillroom("train flow", TINY, "--steps 30 --track tensorboard --out run --plan")
    assert (told.code, told.err, files(tmp_path)) == (0, "", [])
    lines, names = told.out.splitlines(), ["model trains", "precision", "memory", "stage train", "whole run"]
    assert [line[:22].strip() for line in lines] == names
    count = sum(p.numel() for p in load_flow_of(tmp_path).denoiser.parameters())
    assert lines[0].split()[2] == f"{count:,}"
    per_step, minutes = float(lines[3].split()[5]), float(lines[4].split()[4])
    assert lines[3].split()[2:4] == [*lines[4].split()[2:3], "steps"] == ["30", "steps"]
    assert per_step > 0 and minutes == pytest.approx(30 * per_step / 6e4, abs=0.051)


def load_flow_of(tmp_path):
    assert stillroom("train flow", TINY, "--steps 1 --quiet --out", tmp_path / "one").code == 0
    return load(tmp_path / "one")


def test_quiet_says_nothing():
    assert stillroom("train flow", TINY, "--steps 2 --out run --quiet") == (0, "", "")
    assert stillroom("resume run --quiet") == (0, "", "")


def test_the_bar_on_a_terminal(tmp_path):
    """With the note of the precision trial, whose line must stand by itself."""
    leader, follower = pty.openpty()
    words = f"-m stillroom train flow {TINY} --precision auto --steps 40 --log-every 10 --out run".split()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=follower, env=env)
    os.close(follower)
    screen = b""
    while True:
        try:
            screen += os.read(leader, 4096)
        except OSError:  # the other end is closed
            break
    os.close(leader)
    assert process.wait(60) == 0
    text = screen.decode()
    assert "flow" in text and "40/40" in text and "model/flow" in text and "Traceback" not in text
    assert any(line.strip().startswith("precision: ") and line.strip().endswith(")") for line in text.splitlines())


def test_tensorboard_holds_the_terms():
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert stillroom("train flow", TINY, "--steps 4 --log-every 2 --track tensorboard --quiet --out run").code == 0
    for file in Path("run/track").rglob("events.*"):  # the settings are in files of their own
        seen = events.EventAccumulator(str(file))
        seen.Reload()
        if "model/flow" in seen.Tags()["scalars"]:
            break
    logged = [(e.step, e.value) for e in seen.Scalars("model/flow")]
    assert logged == [(r["step"], pytest.approx(r["model/flow"])) for r in read_rows(Path("run/metrics.jsonl"))]


# ---- a recipe of one's own ----


def test_own_recipe_has_help_trains_reports_and_loads(tmp_path, monkeypatch):
    Path("mine.py").write_text(MINE)
    told = stillroom("distill mine.py:Mine --help")
    assert told.code == 0 and "--goal" in told.out and "Where the number should go" in told.out
    told = stillroom("distill mine.py:Mine --out run --goal 2 --steps 200 --quiet")
    assert told == (0, "", "")
    assert f'recipe = "{tmp_path}/mine.py:Mine"' in Path("run/settings.toml").read_text()
    assert abs(float(load("run").x) - 2) < 0.2
    assert "mine.py:Mine" in Path("run/report.html").read_text()
    done = python("-m", "stillroom", "sample", "run/product")  # a new process must read the file: the class is in it
    assert done.returncode == 2 and done.stderr == (
        "stillroom: run/product: a product of kind 'number' is not drawn from\n")


def test_a_product_of_an_own_recipe_is_loaded_from_python_by_what_its_refusal_says(tmp_path):
    """In a new process, which knows nothing of the file; and which runs no file that it was not told to run."""
    Path("mine.py").write_text(MINE)
    assert stillroom("distill mine.py:Mine --out run --steps 2 --quiet") == (0, "", "")
    Path("elsewhere").mkdir()
    load_it = f"import stillroom; print(stillroom.load({str(tmp_path / 'run')!r}).x)"
    done = python("-c", load_it, cwd="elsewhere")
    last = done.stderr.strip().splitlines()[-1]
    line = f"from stillroom.recipes import find; find('{tmp_path}/mine.py:Mine')"
    assert done.returncode == 1
    assert last.endswith(f"no buildable class is called 'mine:Number': import mine first, or: {line}")
    weights = f"{load('run').x}\n"
    for first, place in ((line, "elsewhere"), ("import mine", ".")):
        done = python("-c", f"{first}; {load_it}", cwd=place)
        assert (done.returncode, done.stdout) == (0, weights), done.stderr
    written = Path("run/product/product.json")                  # as older versions named such classes
    written.write_text(written.read_text().replace('"mine:', '"stillroom_user_mine:'))
    done = python("-c", f"import mine; {load_it}")
    assert (done.returncode, done.stdout) == (0, weights), done.stderr
    shutil.move("run/product", "alone")
    done = python("-c", "import stillroom; stillroom.load('alone')", cwd=".")
    assert done.stderr.strip().endswith("no buildable class is called 'mine:Number': import mine first")


def test_own_recipe_killed_and_resumed_from_elsewhere_is_the_run_never_killed(tmp_path, monkeypatch):
    dies = ("import os, signal\n" + MINE).replace("        noise =", """
        if turn.step == 23 and "KILLED" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        noise =""")
    Path("mine.py").write_text(dies)
    flags = ["--steps", "60", "--checkpoint-every", "5", "--quiet", "--precision", "float32"]
    done = python("-m", "stillroom", "distill", "mine.py:Mine", "--out", "run", *flags, env={"KILLED": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert stillroom("resume ../run --quiet") == (0, "", "")
    assert stillroom("distill", tmp_path / "mine.py:Mine", "--out whole", *flags) == (0, "", "")
    assert equal(weights("../run"), weights("whole"))


def test_folders_in_a_mixture_become_absolute(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    monkeypatch.chdir(tmp_path)
    for given, whole in {
        "0.6*pictures:val+0.4*leaves": f"0.6*{tmp_path}/pictures:val+0.4*leaves", "leaves:test": "leaves:test",
        "0.123456789*pictures+0.00001*leaves": f"0.123456789*{tmp_path}/pictures+0.00001*leaves",
        "pictures": f"{tmp_path}/pictures", "some+one/net": "some+one/net",
    }.items():
        assert anchored_place(given, Place()) == whole


@pytest.mark.parametrize("words", ["--data ~nosuchuser/pictures --out no", "--data digits --out=~nosuchuser/run"])
def test_the_folder_of_nobody_is_refused(words):
    told = stillroom("train flow --size 8 --steps 1 --width 16 --depth 1", words)
    assert told.code == 2 and "nobody of that name" in told.err and told.err.count("\n") == 1


def test_a_run_goes_into_the_folder_of_its_user(tmp_path, monkeypatch):
    """Shells leave the tilde of --out=~/run as it is."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert stillroom("train flow", TINY, "--steps 1 --quiet --out=~/run") == (0, "", "")
    assert (tmp_path / "home/run/product").is_dir() and not Path("~").exists()


def test_places_behind_another_word_become_absolute_and_known_names_stay(tmp_path, monkeypatch):
    for name in ("x.npz", "ref", "own", "dinov2", "gaussian"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for recipe, field, given, whole in (
        (DMVAE, "reference", "samples:x.npz", f"samples:{tmp_path}/x.npz"),
        (DMVAE, "reference", "noised:0.3:ref", f"noised:0.3:{tmp_path}/ref"), (DMVAE, "reference", "gmm:16", "gmm:16"),
        (DMVAE, "reference", "ref", f"{tmp_path}/ref"), (DMVAE, "reference", "gaussian", "gaussian"),
        (RAE, "encoder", "ref", f"{tmp_path}/ref"), (RAE, "encoder", "own", "own"),
        (Tokenizer, "align", "dinov2", "dinov2"), (Tokenizer, "align", "ref", f"{tmp_path}/ref"),
    ):
        more = {"codec": "bundled", "reference": "gaussian"} if recipe is DMVAE else {}
        settings = recipe.Settings(**{"out": "no", "data": "digits", "size": 8, **more, field: given})
        assert getattr(anchored(settings), field) == whole


@pytest.mark.parametrize(("words", "work", "says"), [
    ("evaluate PLACE --data digits --out PLACE", "judge.evaluation.evaluate", "PLACE is a folder; give a file"),
    ("evaluate PLACE --data digits --save-stats PLACE", "judge.evaluation.evaluate", "PLACE is a folder"),
    ("evaluate PLACE --data digits --out PLACE/file/x.json", "judge.evaluation.evaluate", "PLACE/file is a file, and"),
    ("inspect digits --out PLACE", "judge.inspection.inspect", "PLACE is a folder; give a file"),
    ("inspect digits --out PLACE/file/x/y.html", "judge.inspection.inspect", "PLACE/file is a file, and no folder"),
    ("sweep bundled --data photos --out PLACE/file", "judge.resolutions.opened", "PLACE/file is a file, and no folder"),
])
def test_where_results_cannot_go_is_told_before_the_work(tmp_path, monkeypatch, words, work, says):
    (tmp_path / "file").touch()
    monkeypatch.setattr(f"stillroom.{work}", None)
    told = stillroom(words.replace("PLACE", str(tmp_path)))
    assert told.code == 2 and says.replace("PLACE", str(tmp_path)) in told.err


def test_a_run_that_stopped_at_bad_pictures_goes_on_where_more_are_allowed(tmp_path):
    pictures, run = tmp_path / "pictures", tmp_path / "my run"
    pictures.mkdir()
    for i in range(14):
        Image.fromarray(np.full((8, 8, 3), 16 * i, np.uint8)).save(pictures / f"{i:02}.png")
    for i in (3, 9):
        (pictures / f"{i:02}x.png").write_text("no picture")
    words = ("train flow --size 8 --steps 12 --batch 4 --width 16 --depth 1 --checkpoint-every 2 --precision float32 "
             "--device cpu --quiet --data")
    told = stillroom(words, pictures, "--out", run)
    assert told.code == 2 and "are unreadable" in told.err
    assert "or allow more: --bad-share 0.15" in told.err
    assert "resume '" in stillroom(words, pictures, "--out", run).err       # a path with a space, as a shell takes it
    assert "--bad-share 'many': give a share" in stillroom("resume", run, "--bad-share many").err
    assert "must be at least 0 and at most 1" in stillroom("resume", run, "--bad-share 2").err
    told = stillroom("resume", run, "--bad-share 0.15 --quiet")
    assert told.code == 0 and (run / "product/product.json").is_file()
    assert read_toml(run / "settings.toml")["bad_share"] == 0.15
