"""What is wrong is told in one line, before anything is written: settings, data, teachers, runs, places, files."""

import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from command import TINY, files, python, stillroom


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A flow of one step, a flow without labels, and points."""
    folder = tmp_path_factory.mktemp("runs")
    pictures(folder / "pictures")
    for words in (f"train flow {TINY} --steps 1 --out {folder}/flow",
                  f"train flow {TINY} --steps 1 --out {folder}/plain --data {folder}/pictures",
                  f"distill vsd --teacher ring:3 --batch 8 --steps 2 --precision float32 --out {folder}/points"):
        told = stillroom(words, "--quiet")
        assert told == (0, "", "")
    return folder


def pictures(folder, count=8):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (30 * i, 0, 9)).save(folder / f"{i}.png")


def refused(*words, code=2) -> str:
    """The one line without its newline; nothing may be written meanwhile."""
    before = files(Path())
    told = stillroom(*words)
    assert told.code == code, told
    assert told.out == ""
    assert re.fullmatch(r"stillroom: [^\n]+\n", told.err), told.err
    assert files(Path()) == before
    return told.err.removeprefix("stillroom: ").rstrip("\n")


def says(line: str, pattern: str) -> bool:
    """Whether the line is the pattern, in which three dots stand for anything."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("..."))), line) is not None


# ---- words and settings ----


@pytest.mark.parametrize(("words", "line"), [
    ("recipess", "no command is called 'recipess'; did you mean 'recipes'?"),
    ("train flwo", "no recipe of stillroom train is called 'flwo'; did you mean 'flow'?"),
    ("distill vds", "no recipe of stillroom distill is called 'vds'; did you mean '...'?"),
    ("train vsd", "vsd is a recipe of: stillroom distill vsd"),
    ("distill flow", "flow is a recipe of: stillroom train flow"),
    ("distill nowhere.py:Mine", "nowhere.py: no such file; give FILE.py:CLASS"),
    ("distill mine.py", "mine.py: name the class in the file too: stillroom distill mine.py:CLASS"),
    ("distill a:b", "no recipe is called 'a:b'..."),
    ("train flow", "stillroom train flow: --out, --data must be given; see stillroom train flow --help"),
    ("train flow --config", "--config needs a value"),
    ("train flow --config=", ".: not a readable settings file: ..."),
    ("train flow --preset=", "flow has no presets"),
    ("train flow --config nowhere.toml", "nowhere.toml: no such settings file"),
    ("recipes x", "usage: stillroom recipes ..."), ("env x", "usage: stillroom env"),
    ("resume", "usage: ..."), ("resume a b", "usage: ..."), ("resume --quiet", "usage: ..."),
    ("resume --data x a", "usage: ..."), ("report", "usage: ..."), ("report a b", "usage: ..."),
    ("sample", "usage: ..."), ("sample --n 3", "usage: ..."), ("claims lst", "...did you mean 'list'..."),
])
def test_words_that_are_not_understood(words, line):
    assert says(refused(words), line)


@pytest.mark.parametrize(("flags", "line"), [
    ("--stepz 3", "--stepz is not a setting; did you mean '--steps'?"),
    ("--model.lrr 3", "--model.lrr is not a setting; did you mean '--model.lr'?"),
    ("--batch eight", "Error parsing --batch: invalid literal for int..."),
    ("--size eight", "Error parsing --size: no type matching {None}|INT could be instantiated from ['eight']."),
    ("--width", "Missing value for argument '--width'. Expected 1 values."),
    ("--precision float16", "invalid choice 'float16' for argument '--precision'. Expected one of ..."),
    ("--track nosuch", "invalid choice 'nosuch' for argument '--track'..."),
    ("--model.betas 0.9", "Missing value for argument '--model.betas'. Expected 2 values."),
    ("extra", "Unrecognized options: extra"),
    ("--steps 0", "steps: 0 must be at least 1"), ("--steps -1", "steps: -1 must be at least 1"),
    ("--batch 0", "batch: 0 must be at least 1"), ("--size 0", "size: 0 must be at least 1"),
    ("--accumulate 0", "accumulate: 0 must be at least 1"), ("--keep 0", "keep: 0 must be at least 1"),
    ("--log-every 0", "log_every: 0 must be at least 1"), ("--sample-every -1", "sample_every: -1 must be at least 0"),
    ("--checkpoint-every -1", "checkpoint_every: -1 must be at least 0"),
    ("--bad-share 2", "bad_share: 2.0 must be at least 0 and at most 1"),
    ("--model.lr -1", "model: lr: -1.0 must be at least 0"),
    ("--model.lr nan", "model: lr: nan is not a finite number"),
    ("--model.betas 0.9 1", "model: betas: 1.0 must be at least 0 and below 1"),
    ("--model.clip -1", "model: clip: -1.0 must be at least 0"),
    ("--model.warmup -1", "model: warmup: -1 must be at least 0"),
    ("--seed 99999999999999999999", "seed: 99999999999999999999 has more than the 64 bits of a settings file"),
])
def test_settings_out_of_their_limits(flags, line):
    told = refused("train flow", TINY, "--out run --steps 2", flags)
    assert says(told, "stillroom train flow: " + line)
    assert refused("train flow", TINY, "--out run --steps 2", flags, "--plan") == told


@pytest.mark.parametrize(("flags", "line"), [
    ("--accumulate 3", "...8 does not divide into 3 micro-batches on 1 processes"),
    ("--device cuda:63", "device 'cuda:63' is not to be had here: ..."),
    ("--device nonsense", "device 'nonsense' is not to be had here: ..."),
    ("--shard", "shard needs several processes: ..."),
    ("--track wandb", "track = wandb: not installed ...; pip install wandb"),
    ("--out /proc/1/nowhere", "/proc/1/nowhere: no folder can be made there: ..."),
    ("--out taken", "taken: no folder can be made there: File exists"),
    ("--out taken/run", "taken/run: no folder can be made there: Not a directory"),
])
def test_what_this_machine_cannot_do(flags, line):
    if "wandb" in flags and __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    Path("taken").write_text("")
    assert says(refused("train flow", TINY, "--quiet --out run --steps 2", flags), line)


def test_a_refusal_leaves_no_tracker_behind(runs):
    told = refused("distill vsd --batch 8 --steps 2 --quiet --out run --track tensorboard --teacher", runs / "flow")
    assert "fails the teacher gate" in told


@pytest.mark.parametrize(("words", "line"), [
    ("--width 0", "...width: 0 must be at least 1"), ("--depth 0", "...depth: 0 must be at least 1"),
    ("--net dit --patch 0", "...patch: 0 must be at least 1"), ("--shift 0", "...shift: 0.0 must be above 0"),
    ("--drop 2", "...drop: 2.0 must be at least 0 and at most 1"),
    ("--average 1", "...average: 1.0 must be at least 0 and below 1"),
    ("--sampler-steps 0", "...sampler_steps: 0 must be at least 1"),
    ("--width 8", "FlowMatching cannot be built: widths [8, 16, 16]: ..."),
    ("--net dit --patch 3", "FlowMatching cannot be built: size 8 is not divisible by patch 3"),
    ("--size 9", "size 9: this U-Net halves its pictures and needs sides divisible by 4"),
    ("--device meta", "device 'meta' holds no numbers: ..."),
])
def test_nets_and_laws_that_cannot_be(words, line):
    assert says(refused("train flow", TINY, "--out run --steps 2", words), line)


@pytest.mark.parametrize(("words", "line"), [
    ("--every 0", "...every: 0 must be at least 1"), ("--rank 0", "...rank: 0 must be at least 1"),
    ("--base-steps 0", "...base_steps: 0 must be at least 1"), ("--spread -1", "...spread: -1.0 must be at least 0"),
    ("--times -1 2", "...times: -1.0 must be at least 0 and at most 1"), ("--width 0", "...width: 0 must be..."),
])
def test_particles_that_cannot_be(words, line):
    assert says(refused("distill vsd --teacher ring:3 --out run --steps 2", words), line)


def test_settings_made_in_python_go_through_the_same_door(tmp_path):
    from stillroom.recipes.sds import SDS, Settings
    from stillroom.settings import Refusal
    from stillroom.train import start

    with pytest.raises(Refusal, match=r"sds: log_every: 0 must be at least 1"):
        start(SDS, Settings(out=tmp_path / "run", teacher="ring:3", log_every=0), "sds")
    assert not files(tmp_path)


# ---- data ----


def no_images(path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a", "b"]}), path)


@pytest.mark.parametrize(("make", "name", "line"), [
    (lambda: None, "nowhere", "data 'nowhere': no such file or folder, and no builtin of that name; known: digits..."),
    (lambda: None, "digit", "data 'digit': ...; did you mean 'digits'?"),
    (lambda: Path("empty").mkdir(), "empty", ".../empty: holds no images; known endings: ..."),
    (lambda: Path("notes.txt").write_text("x"), "notes.txt",
     ".../notes.txt: a file of this kind is not a data set; ..."),
    (lambda: (pictures(Path("bad")), [p.write_bytes(b"x") for p in Path("bad").iterdir()]), "bad",
     ".../bad: ...of ...8 images ...readable..."),
    (lambda: no_images("t.parquet"), "t.parquet", "...t.parquet: no column holds images; columns: caption; ..."),
    (lambda: Path("t.parquet").write_bytes(b"x"), "t.parquet", "...t.parquet: cannot be read as parquet: ..."),
    (lambda: pictures(Path("few")), "few:test", "...few: has no split 'test'..."),
])
def test_data_that_is_none(make, name, line):
    make()
    assert says(refused("train flow", TINY, "--out run --steps 2 --data", name), line)


# ---- teachers ----


@pytest.mark.parametrize(("teacher", "line"), [
    ("flow", "teacher .../flow fails the teacher gate: its error in x0 is ... train it longer..."),
    ("points", "teacher .../points: a product of kind 'points', not a flow; see: stillroom train flow"),
    ("pictures", ".../pictures holds no model: ..."),
    ("plain --guidance 2", "guidance 2.0 needs a class for each particle; add --conditional"),
    ("plain --conditional", "teacher .../plain has no classes; leave out --conditional"),
])
def test_teachers_that_will_not_do(runs, teacher, line):
    told = refused(f"distill vsd --batch 8 --steps 2 --precision float32 --out run --teacher {runs}/{teacher}")
    assert says(told, line)


@pytest.mark.parametrize("teacher", ["nowhere", "ring:0", "ring:five", "ring:3:0", "ring:3:0.0.1"])
def test_teachers_that_are_none(teacher):
    assert teacher in refused("distill vsd --steps 2 --out run --teacher", teacher)


@pytest.mark.parametrize("teacher", ["", "ring:five", "ring:3:1e-3", "grid:3:"])
def test_closed_forms_that_are_none(teacher):
    told = refused(f"distill vsd --steps 2 --out run --teacher={teacher}")
    assert says(told, f"teacher {teacher!r}: a closed form is ring:MODES[:STD] or grid:SIDE[:STD], in plain numbers...")


def test_no_teacher_is_not_the_run_that_one_stands_in(runs, monkeypatch):
    monkeypatch.chdir(runs / "flow")
    assert "teacher ''" in refused("distill vsd --steps 2 --out run --teacher=")


# ---- runs ----


def test_a_folder_that_holds_a_run_is_not_written_over(runs):
    shutil.copytree(runs / "flow", "run")
    assert refused("train flow", TINY, "--steps 1 --out run") == (
        "run already holds a run: go on with it (stillroom resume run), or choose another folder with --out"
    )


@pytest.mark.parametrize("place", ["nowhere", "empty", "."])
def test_what_is_no_run(place):
    Path("empty").mkdir()
    for command in ("sample", "resume", "report"):
        assert refused(command, place).startswith(f"{place}: ")


def test_a_run_that_is_not_finished_is_not_drawn_from(runs):
    shutil.copytree(runs / "flow", "run")
    shutil.rmtree("run/product")
    assert refused("sample run") == "run: this run has no product yet; finish it with: stillroom resume run"
    assert stillroom("resume run --quiet").code == 0
    assert stillroom("sample run --n 2 --steps 1").code == 0


@pytest.mark.parametrize(("content", "line"), [
    ("recipe = 3", "no recipe is called '3'; known: ..."),
    ("recipe = [", "run/settings.toml: ...not ...readable..."),
    ('recipe = "flwo"', "no recipe is called 'flwo'; did you mean 'flow'?"),
    ('recipe = "gone.py:Gone"', "gone.py: no such file; ..."),
    ("steps = 3", "run/settings.toml: 'recipe' is missing"),
    ('recipe = "flow"\nstepz = 3', "run/settings.toml: 'stepz' is not a setting; did you mean 'steps'?"),
    ('recipe = "flow"\ndata = "digits"\nsize = 0', "run/settings.toml: size: 0 must be at least 1"),
])
def test_a_run_whose_settings_were_spoilt(runs, content, line):
    shutil.copytree(runs / "flow", "run")
    Path("run/settings.toml").write_text(content)
    assert says(refused("resume run"), line)


@pytest.mark.parametrize(("words", "line"), [
    ("--n 0", "stillroom sample RUN: n: 0 must be at least 1"),
    ("--batch -1", "stillroom sample RUN: batch: -1 must be at least 1"),
    ("--steps 0", "stillroom sample RUN: steps: 0 must be at least 1"),
    ("--nn 2", "stillroom sample RUN: --nn is not a setting; did you mean '--n'?"),
    ("--guidance inf", "stillroom sample RUN: guidance: inf is not a finite number"),
    ("--guidance 2", "guidance needs a conditional flow: ..."),
    ("--out x.jpg", "x.jpg: write to FILE.png, FILE.npz or a folder"),
])
def test_draws_that_cannot_be(runs, words, line):
    assert says(refused("sample", runs / "plain", "--n 2 --steps 1", words), line)


@pytest.mark.parametrize("out", ["taken/x.png", "taken/x.npz", "taken", "folder.png"])
def test_draws_to_places_that_are_taken(runs, out):
    Path("taken").write_text("")
    Path("folder.png").mkdir()
    told = stillroom("sample", runs / "flow", "--n 2 --steps 1 --out", out)
    assert told.code in (1, 2) and re.fullmatch(r"stillroom: (taken|folder)[^\n]*\n", told.err)
    assert files(Path()) == ["folder.png", "taken"]


# ---- a recipe of one's own ----


@pytest.mark.parametrize(("content", "line"), [
    ("x = = 1\n", ".../mine.py, line 1: not Python: invalid syntax"),
    ("\n\ndef f(:\n", ".../mine.py, line 3: not Python: ..."),
    ("import nosuch\n", "mine.py: No module named 'nosuch'; install what it needs, or mend its imports"),
    ("from stillroom.train import Recipe\nclass Miner(Recipe): pass\n",
     "mine.py: it has no Recipe called 'Mine'; did you mean 'Miner'?"),
    ("Mine = 3\n", "...it has no Recipe called 'Mine'..."),
])
def test_a_recipe_file_that_is_none(content, line):
    Path("mine.py").write_text(content)
    told = stillroom("distill mine.py:Mine --out run")
    assert told.code == 2 and says(told.err, f"stillroom: {line}\n")


# ---- a full disk ----


FULL = """
import resource, signal, sys
from stillroom.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [100, 30_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_space(tmp_path, limit):
    words = f"train flow {TINY} --steps 4 --checkpoint-every 2 --quiet --out run".split()
    done = python("-c", FULL, str(limit), *words)
    assert done.returncode in (1, 2)
    assert re.fullmatch(r"stillroom: run/[^\n]+\n", done.stderr), done.stderr
    assert not [f for f in files(tmp_path) if f.endswith(".new")]
    if Path("run/settings.toml").exists():
        assert stillroom("resume run --quiet") == (0, "", "")
    else:
        assert stillroom(" ".join(words)) == (0, "", "")
    assert stillroom("sample run --n 1 --steps 1").code == 0


def test_a_full_disk_leaves_the_page_of_claims_as_it_was():
    assert stillroom("claims docs --out claims.md").code == 0
    whole = Path("claims.md").read_text()
    done = python("-c", FULL, "300", *["claims", "docs", "--out", "claims.md"])
    assert done.returncode == 2 and re.fullmatch(r"stillroom: claims.md could not be written: [^\n]+\n", done.stderr)
    assert Path("claims.md").read_text() == whole and files(Path()) == ["claims.md"]


@pytest.mark.parametrize(("words", "file"), [
    ("cache --codec bundled --data pictures --size 32 --batch 4", "latents-00000.safetensors"),
    ("encode pictures/0.png --codec bundled", "0.safetensors"),
])
def test_a_full_disk_is_one_line_and_leaves_no_half_of_latents(words, file):
    pictures(Path("pictures"))
    done = python("-c", FULL, "300", *words.split(), "--out", "there")
    assert done.returncode == 2
    assert re.fullmatch(rf"stillroom: there/{file} could not be written: [^\n]+; free some space, or [^\n]+\n",
                        done.stderr), done.stderr
    assert files(Path("there")) == []
    assert stillroom(words, "--out there").code == 0 and file in files(Path("there"))


def test_too_large_a_network_is_one_line_and_no_folder():
    """400,000 wide: 640 GB for one layer."""
    told = stillroom("train flow --data digits --size 8 --net dit --width 400000 --depth 1 --steps 1 --out run")
    assert told.code == 1 and told.err.count("\n") == 1
    assert re.match(r"stillroom: out of memory: .+; give a smaller --batch", told.err)
    assert not Path("run").exists()
