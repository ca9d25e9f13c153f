"""The trainer adds nothing, loses nothing, and stops where it should."""

import errno
import json
import os
import re
import shutil
import signal
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from plain_loop import plain
from stillroom.recipes.dmd import DMD
from stillroom.settings import Optimizer, Refusal, Run, Where
from stillroom.settings.files import file_written_atomically, folder_written_atomically
from stillroom.train import Average, Product, Recipe, Role, Silent, Stage, fit, load, resume, start, trial
from stillroom.train.checkpoint import Shelf, restored
from stillroom.train.folder import RunFolder, read_rows
from stillroom.train.learner import rate
from stillroom.train.loop import Trainer
from stillroom.train.product import amend_product, save_product
from stillroom.train.teacher import weights_digest
from stillroom.train.world import World
from three_roles import Generator, Settings, ThreeRoles, points


def settings(out, **more):
    return Settings(**{"out": out, "precision": "float32", "log_every": 1, "checkpoint_every": 20, **more})


def train(out, **more):
    return start(ThreeRoles, settings(out, **more), "three", {"data": points()}, Silent())


def weights(out):
    from stillroom.train import load_product

    parts = load_product(out).parts
    return {**parts["generator"].state_dict(), "bank": parts["bank"]}


def same(a, b, tolerance=0.0):
    return all(torch.allclose(a[k], b[k], rtol=0, atol=tolerance) for k in a.keys() | b.keys())


def test_equals_a_plain_loop_bit_for_bit(tmp_path):
    train(tmp_path / "run")
    rows, student, bank = plain(points(), Generator, 60, 16)
    logged = [{k: v for k, v in r.items() if "/" in k} for r in read_rows(tmp_path / "run/metrics.jsonl")]
    assert logged == rows
    assert same(weights(tmp_path / "run"), {**student.state_dict(), "bank": bank})


def test_two_micro_batches_equal_one_double_batch(tmp_path):
    """Without dropout, whose masks belong to a micro-batch."""
    class Plain(ThreeRoles):
        def __init__(self, settings, data):
            super().__init__(settings, data)
            self.student.net[2] = nn.Identity()
            self.mean = Average(self.student, 0.9)

    for name, micros in {"one": 1, "two": 2}.items():
        start(Plain, settings(tmp_path / name, accumulate=micros), "plain", {"data": points()}, Silent())
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"), 1e-6)


def test_a_trial_of_precisions_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "WORTH", 0.0)            # no bfloat16 is fast enough
    train(tmp_path / "told")
    train(tmp_path / "tried", precision="auto")
    assert 'precision = "float32"' in (tmp_path / "tried/settings.toml").read_text()
    assert same(weights(tmp_path / "told"), weights(tmp_path / "tried"))


@pytest.mark.parametrize(("ratio", "said"), [(0.79, "bfloat16"), (0.81, "float32")])
def test_bfloat16_is_taken_where_it_is_a_fifth_faster(monkeypatch, ratio, said):
    monkeypatch.setattr(trial, "_seconds", lambda trainer, micros, bfloat16: ratio if bfloat16 else 1.0)
    trainer = SimpleNamespace(roles={}, world=World(0, 1, torch.device("cpu")), autocast=None)
    assert trial.precision(trainer, [])[0] == said and trainer.autocast is (said == "bfloat16")


class InParts(ThreeRoles):
    """One role at a time; remembers which graphs were left when the next was asked for."""

    def __init__(self, settings, data):
        super().__init__(settings, data)
        self.left: list[bool] = []

    def losses(self, batch, turn):
        whole = super().losses(batch, turn)
        for name in list(whole):
            seen = [weakref.ref(term) for term in whole[name].values()]
            yield {name: whole.pop(name)}
            self.left += [one() is not None for one in seen]


def test_losses_in_parts_train_the_same_and_leave_no_graph_behind(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(InParts, "after", lambda self, *args: (made.append(self), ThreeRoles.after(self, *args))[1])
    start(InParts, settings(tmp_path / "parts"), "parts", {"data": points()}, Silent())
    train(tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert len(made[0].left) > 60 and not any(made[0].left)


def test_resume_after_each_checkpoint_is_bit_identical_and_repeats_no_row(tmp_path):
    train(tmp_path / "whole", checkpoint_every=7, keep=100)
    expected, rows = weights(tmp_path / "whole"), read_rows(tmp_path / "whole/metrics.jsonl")
    for step in Shelf(tmp_path / "whole/checkpoints", 100).steps():
        Shelf(tmp_path / "whole/checkpoints", 100).forget_after(step)
        if step == 60:
            continue
        resume(tmp_path / "whole", lambda _: ThreeRoles, {"data": points()}, Silent())
        assert same(weights(tmp_path / "whole"), expected)
        again = read_rows(tmp_path / "whole/metrics.jsonl")
        untimed = [{k: v for k, v in r.items() if "seconds" not in k and "per_second" not in k} for r in again]
        assert untimed == [{k: v for k, v in r.items() if "seconds" not in k and "per_second" not in k} for r in rows]


def damaged(tmp_path, how):
    train(tmp_path / "run", checkpoint_every=20, keep=10)
    expected = weights(tmp_path / "run")
    how(Shelf(tmp_path / "run/checkpoints", 10))
    shutil.rmtree(tmp_path / "run/product")             # as if it had not ended
    notes = []

    class Listens(Silent):
        def note(self, text):
            notes.append(text)

    resume(tmp_path / "run", lambda _: ThreeRoles, {"data": points()}, Listens())
    assert same(weights(tmp_path / "run"), expected)
    return notes


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, flip, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["roles.safetensors", "optimizers.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, harm, name):
    notes = damaged(tmp_path, lambda shelf: harm(shelf.path(60) / name))
    assert any("step-00000060 is damaged" in note for note in notes)


@pytest.mark.parametrize("content", ["{}", "[]", "3"])
def test_a_manifest_that_names_no_files_is_a_damaged_one(tmp_path, content):
    notes = damaged(tmp_path, lambda shelf: (shelf.path(60) / "manifest.json").write_text(content))
    assert any("step-00000060 is damaged (manifest.json does not name its files)" in note for note in notes)


def test_a_copy_beside_checkpoints_is_left_alone(tmp_path):
    names = ["step-00000060 (copy)", "step-best", "step-7"]
    damaged(tmp_path, lambda shelf: [shutil.copytree(shelf.path(60), shelf.folder / name) for name in names])
    assert all((tmp_path / "run/checkpoints" / name).is_dir() for name in names)


def test_all_checkpoints_damaged_starts_again(tmp_path):
    def all_of_them(shelf):
        for step in shelf.steps():
            truncate(shelf.path(step) / "roles.safetensors")

    notes = damaged(tmp_path, all_of_them)
    assert any("starts again" in note for note in notes)


def test_checkpoints_are_an_eighth_of_the_run_apart_and_at_most_a_thousand_steps(tmp_path):
    for steps, every in ((5, 1), (1000, 125), (7999, 999), (20_000, 1000)):
        given = Settings(out=tmp_path, steps=steps)
        trainer = Trainer(ThreeRoles(given, points()), given, {}, World(0, 1, torch.device("cpu")))
        assert trainer.checkpoint_every == every


def test_keeps_the_last_checkpoints_and_the_best(tmp_path):
    class Judged(ThreeRoles):
        def stages(self):
            return [Stage("all", 60, best="fake/dsm")]

    start(Judged, settings(tmp_path / "run", checkpoint_every=5, keep=2), "three", {"data": points()}, Silent())
    shelf = Shelf(tmp_path / "run/checkpoints", 2)
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    means = {k: sum(r["fake/dsm"] for r in rows[k - 5 : k]) / 5 for k in range(5, 61, 5)}
    best = min(means, key=means.get)
    assert shelf.best()["step"] == best
    assert shelf.steps() == sorted({best, 55, 60})


def test_an_interruption_splits_no_mean_that_chooses_the_best(tmp_path):
    stops = {22, 41}

    class Judged(ThreeRoles):
        def stages(self):
            return [Stage("all", 60, best="fake/dsm")]

        def after(self, batch, turn):
            super().after(batch, turn)
            if turn.step in stops:
                os.kill(os.getpid(), signal.SIGINT)

    data, here, whole = {"data": points()}, tmp_path / "run", tmp_path / "whole"
    with pytest.raises(Refusal, match="stopped at step 23"):
        start(Judged, settings(here), "three", data, Silent())
    assert json.loads((here / "checkpoints/best.json").read_text())["step"] == 20
    with pytest.raises(Refusal, match="stopped at step 42"):
        resume(here, lambda _: Judged, data, Silent())
    stops.clear()
    resume(here, lambda _: Judged, data, Silent())
    start(Judged, settings(whole), "three", data, Silent())
    assert (here / "checkpoints/best.json").read_text() == (whole / "checkpoints/best.json").read_text()


class One(Recipe):
    """One linear role, whose losses a test can replace."""

    def __init__(self, settings):
        self.net = nn.Linear(2, 1, bias=False)
        nn.init.ones_(self.net.weight)

    def roles(self):
        return {"net": Role(self.net, Optimizer(lr=0.1, name="sgd", betas=(0.0, 0.0)))}

    def stages(self):
        return [Stage("train", 10)]

    def losses(self, batch, turn):
        return {"net": {"sum": self.net(torch.ones(turn.batch, 2))}}

    def product(self):
        return Product("weight", {"weight": self.net.weight.detach()})


def run_one(cls, out, **more):
    settings = Run(**{"out": out, "steps": 10, "precision": "float32", "checkpoint_every": 2, **more})
    start(cls, settings, "one", None, Silent())
    return load(out)


def unended(out):
    """A run whose product was lost."""
    run_one(One, out)
    shutil.rmtree(out / "product")
    return out


def test_sgd_by_hand(tmp_path):
    assert torch.allclose(run_one(One, tmp_path / "run"), torch.ones(1, 2) - 10 * 0.1, atol=1e-6)


def test_nan_stops_the_run_names_what_and_keeps_the_last_good_checkpoint(tmp_path):
    class Breaks(One):
        def losses(self, batch, turn):
            bad = float("nan") if turn.step == 5 else 1.0
            return {"net": {"fine": self.net(torch.ones(4, 2)), "broken": bad * self.net(torch.ones(4, 2))}}

    told = r"role net: broken became nan at step 5.*checkpoint of step 4 is kept.*new run: --config .*run/settings.toml"
    with pytest.raises(Refusal, match=told) as error:
        run_one(Breaks, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert Shelf(tmp_path / "run/checkpoints", 2).last_good() == (4, [])


def test_nan_in_a_measurement_is_told_as_one(tmp_path):
    class Measures(One):
        def losses(self, batch, turn):
            turn.tell("looks/width", torch.tensor(float("inf") if turn.step == 3 else 1.0))
            return super().losses(batch, turn)

    with pytest.raises(Refusal, match=r"looks/width, which is measured, became inf at step 3; the checkpoint of"):
        run_one(Measures, tmp_path / "run")


def test_sgd_takes_no_eps(tmp_path):
    class Damped(One):
        def roles(self):
            return {"net": Role(self.net, Optimizer(lr=0.1, name="sgd", eps=1e-6))}

    with pytest.raises(Refusal, match=r"eps: sgd divides by no second moment; leave it out"):
        run_one(Damped, tmp_path / "run")


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run_one(One, tmp_path / "run")
    amend_product(tmp_path / "run", {}, {"chosen": 1.5})
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    assert resume(tmp_path / "run", lambda _: One, watch=Silent()) == tmp_path / "run"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == files


@dataclass(frozen=True, kw_only=True)
class WithTeacher(Run):
    teacher: Where


class Taught(One):
    """Ends at step 5, the first time."""

    Settings = WithTeacher
    inputs = ("data",)
    ends = True

    def __init__(self, settings, data):
        super().__init__(settings)

    def losses(self, batch, turn):
        if Taught.ends and turn.step == 5:
            raise KeyboardInterrupt
        return super().losses(batch, turn)


def test_a_run_goes_on_with_what_it_began_with_wherever_that_is(tmp_path, monkeypatch):
    run, x = tmp_path / "run", torch.zeros(12, 2)
    for name, value in (("teacher", 0.0), ("other", 1.0)):
        save_product(Product("weight", {"weight": torch.full((2,), value)}), tmp_path / name)
    how = WithTeacher(out=run, steps=10, precision="float32", checkpoint_every=2, teacher=str(tmp_path / "teacher"))
    with pytest.raises(KeyboardInterrupt):
        start(Taught, how, "taught", {"data": x}, Silent())
    monkeypatch.setattr(Taught, "ends", False)

    def go_on(data=x, **moved):
        return resume(run, lambda _: Taught, {"data": data}, Silent(), moved)

    with pytest.raises(Refusal, match=r"data tensors holds 11 of \[2\], and the run began with 12"):
        go_on(x[:11])
    with pytest.raises(Refusal, match=r"holds 12 of \[2\] in 3 classes, and the run began with 12 of \[2\];"):
        go_on((x, torch.arange(12) % 3))
    (tmp_path / "teacher").rename(tmp_path / "moved")
    (tmp_path / "other").rename(tmp_path / "teacher")
    with pytest.raises(Refusal, match=r"other weights than those it began with; .* resume .*run --teacher PLACE"):
        go_on()
    go_on(teacher=str(tmp_path / "moved"))
    assert f'teacher = "{tmp_path}/moved"' in (run / "settings.toml").read_text()


@pytest.mark.parametrize("lora", [0, 2])
def test_a_run_goes_on_with_other_peoples_weights_that_it_began_with_alone(tmp_path, lora):
    diffusers = pytest.importorskip("diffusers")
    place, run, info = tmp_path / "teacher", tmp_path / "run", tmp_path / "run/run.json"

    def save_teacher(seed):
        torch.manual_seed(seed)
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).save_pretrained(place / "unet")

    class Ungated(DMD):
        ends = True

        def check(self, batch):
            pass

        def losses(self, batch, turn):
            if Ungated.ends and turn.step == 4:
                raise KeyboardInterrupt
            return super().losses(batch, turn)

    def go_on(**moved):
        return resume(run, lambda _: Ungated, None, Silent(), moved)

    diffusers.DDPMScheduler(prediction_type="v_prediction").save_pretrained(place / "scheduler")
    save_teacher(0)
    with pytest.raises(KeyboardInterrupt):
        start(Ungated, DMD.Settings(out=run, teacher=str(place), steps=6, batch=4, precision="float32", device="cpu",
                                    checkpoint_every=4, lora=lora), "dmd", None, Silent())
    Ungated.ends = False
    before = shutil.copytree(run, tmp_path / "before")
    save_teacher(1)
    with pytest.raises(Refusal, match=r"teacher .* holds other weights than those it began with"):
        go_on()
    with pytest.raises(Refusal, match=r"teacher .*nowhere is not there; say where they are: stillroom resume"):
        go_on(teacher=str(tmp_path / "nowhere"))

    told = json.loads(info.read_text())
    info.write_text(json.dumps(told | {"weights": {}}))     # as it was written before
    if lora:
        with pytest.raises(Refusal, match="weights that this run keeps frozen are not those it began with"):
            go_on()
    else:
        go_on()
    shutil.rmtree(run)
    before.rename(run)
    save_teacher(0)
    place.rename(tmp_path / "moved")
    go_on(teacher=str(tmp_path / "moved"))


def test_weights_are_named_by_what_they_hold_wherever_they_lie(tmp_path, monkeypatch):
    def digest(name, files):
        for file, content in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(content)
        return weights_digest(str(tmp_path / name))

    pipeline = {"unet/a.safetensors": "a", "vae/b.safetensors": "b"}
    known = digest("one", pipeline)
    assert known == digest("two", pipeline | {"text_encoder/c.safetensors": "c", "unet/config.json": "{}"})
    assert known not in (digest("three", pipeline | {"vae/b.safetensors": "B"}), digest("one", {"unet/d.pth": "d"}))
    digest("tae", {"encoder.pth": "e", "decoder.pth": "d", "other.pth": "o"})
    halves = digest("tae/encoder.pth", {})
    assert digest("tae", {"other.pth": "O"}) and digest("tae/encoder.pth", {}) == halves
    assert digest("tae", {"decoder.pth": "D"}) and digest("tae/encoder.pth", {}) != halves
    monkeypatch.chdir(tmp_path / "two")
    assert weights_digest(".") == known
    assert [weights_digest(name) for name in ("ring:8", "owner/model", str(tmp_path / "nowhere"))] == [None] * 3


def test_infinite_gradients_of_a_finite_loss_stop_too(tmp_path):
    class Steep(One):
        def losses(self, batch, turn):
            x = self.net(torch.ones(4, 2)) - 2  # exactly 0 at the start: the root's slope is infinite
            return {"net": {"root": x.abs().sqrt() * x.sign().abs() + x.clamp(min=0).sqrt()}}

    with pytest.raises(Refusal, match="role net: gradient became"):
        run_one(Steep, tmp_path / "run")


@pytest.mark.parametrize(("term", "reason"), [
    (lambda net: net(torch.ones(4, 2)).detach(), "carries no gradient"),
    (lambda net: torch.ones(4, requires_grad=True), "does not depend on the role's parameters"),
])
def test_a_term_that_cannot_reach_its_role_is_refused(tmp_path, term, reason):
    class Cut(One):
        def losses(self, batch, turn):
            return {"net": {"good": self.net(torch.ones(4, 2)), "cut": term(self.net)}}

    with pytest.raises(Refusal, match=f"role net: term cut {reason}"):
        run_one(Cut, tmp_path / "run")
    with pytest.raises(Refusal, match=f"role net: term cut {reason}"):      # before speeds are measured, too
        start(Cut, Run(out=tmp_path / "auto", steps=9, precision="auto"), "cut", None, Silent())


def test_a_gradient_of_zero_for_a_hundred_turns_warns_once(tmp_path):
    notes = []

    class Listens(Silent):
        def note(self, text):
            notes.append(text)

    class Idle(One):
        def stages(self):
            return [Stage("train", 300)]

        def losses(self, batch, turn):
            return {"net": {"good": self.net(torch.ones(4, 2)), "idle": 0 * self.net(torch.ones(4, 2))}}

    start(Idle, Run(out=tmp_path / "run", steps=300, precision="float32"), "idle", None, Listens())
    assert [n for n in notes if "net/idle" in n and "zero for" in n] == notes
    assert len(notes) == 1


def test_losses_must_answer_for_the_roles_in_turn(tmp_path):
    class Forgets(One):
        def losses(self, batch, turn):
            return {}

    with pytest.raises(Refusal, match="losses of step 0 answer for"):
        run_one(Forgets, tmp_path / "run")


def test_closed_form_stages_run_without_steps_and_after_them(tmp_path):
    class Closed(One):
        def stages(self):
            first, last = Stage("set", 0, enter=lambda: self.set(3.0)), Stage("end", 0, enter=self.double)
            return [first, Stage("train", 10), last]

        @torch.no_grad()
        def set(self, value):
            self.net.weight.fill_(value)

        @torch.no_grad()
        def double(self):
            self.net.weight.mul_(2)

    assert torch.allclose(run_one(Closed, tmp_path / "run"), torch.full((1, 2), 2 * (3.0 - 1.0)))


def test_a_recipe_without_roles_or_steps_is_a_closed_form(tmp_path):
    class Ridge(Recipe):
        def __init__(self, settings):
            self.w = torch.zeros(2)

        def stages(self):
            return [Stage("solve", 0, enter=lambda: self.w.fill_(7.0))]

        def memory(self):
            return {"w": self.w}

        def product(self):
            return Product("weight", {"weight": self.w})

    assert run_one(Ridge, tmp_path / "run").tolist() == [7.0, 7.0]


def test_trains_only_what_it_says(tmp_path):
    class Half(One):
        def __init__(self, settings):
            self.net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

        def roles(self):
            return {"net": Role(self.net, Optimizer(lr=0.1), trains=r"^1\.")}

        def product(self):
            return Product("weight", {"weight": self.net[0].weight.detach().clone(), "b": self.net[1].weight.detach()})

    torch.manual_seed(0)
    start(Half, Run(out=tmp_path / "run", steps=10, precision="float32"), "half", None, Silent())
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run/checkpoints/step-00000010/roles.safetensors")
    assert set(saved) == {"net/1.weight", "net/1.bias"}


def test_a_pattern_that_matches_nothing_is_refused(tmp_path):
    class Typo(One):
        def roles(self):
            return {"net": Role(self.net, Optimizer(lr=0.1), trains="wieght")}

    with pytest.raises(Refusal, match="no parameter name matches"):
        run_one(Typo, tmp_path / "run")


def test_a_second_start_in_the_same_folder_is_refused(tmp_path):
    run_one(One, tmp_path / "run")
    with pytest.raises(Refusal, match="already holds a run"):
        run_one(One, tmp_path / "run")


def test_a_run_folder_in_use_is_refused(tmp_path):
    import fcntl

    unended(tmp_path / "run")
    with (tmp_path / "run/.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(Refusal, match="another process is using this run"):
            resume(tmp_path / "run", lambda _: One, None, Silent())


def test_a_place_without_locks_is_not_taken_for_one_in_use(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    unended(tmp_path / "run")
    monkeypatch.setattr("stillroom.settings.files.fcntl.flock", flock)
    with pytest.raises(Refusal, match=r"run/\.lock cannot be locked: No locks available; give a place on a disk"):
        resume(tmp_path / "run", lambda _: One, None, Silent())


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    class Other(One):
        pass

    unended(tmp_path / "run")
    with pytest.raises(Refusal, match=r"its checkpoint is of One, not of Other"):
        resume(tmp_path / "run", lambda _: Other, None, Silent())


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    class Wider(One):
        def __init__(self, settings):
            self.net = nn.Linear(3, 1, bias=False)

    Wider.__name__ = "One"
    unended(tmp_path / "run")
    with pytest.raises(Refusal, match=re.escape("'net/weight' is (1, 2), this model's is (1, 3)")):
        resume(tmp_path / "run", lambda _: Wider, None, Silent())


def test_a_full_disk_leaves_no_half_written_checkpoint(tmp_path, monkeypatch):
    from stillroom.train import checkpoint

    def full_after(step):
        real = checkpoint.save_file

        def save_file(tensors, path):
            if f"{step:08d}" in str(path) and path.name.startswith("optimizers"):
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            real(tensors, path)

        return save_file

    monkeypatch.setattr(checkpoint, "save_file", full_after(6))
    with pytest.raises(Refusal, match="No space left on device"):
        run_one(One, tmp_path / "run")
    shelf = Shelf(tmp_path / "run/checkpoints", 2)
    assert shelf.steps() == [2, 4] and shelf.last_good() == (4, [])
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"step-00000002", "step-00000004"}


def test_rates():
    s = Optimizer(lr=2.0, warmup=4, decay="linear")
    assert [rate(s, k, 8) for k in (0, 3, 4, 6, 8)] == [0.5, 2.0, 2.0, 1.0, 0.0]
    assert rate(Optimizer(lr=2.0, decay="cosine"), 5, 10) == pytest.approx(1.0)


def test_products_round_trip_and_refuse_damage(tmp_path):
    run_one(One, tmp_path / "run")
    flip(tmp_path / "run/product/weight.safetensors", at=0.99)
    with pytest.raises(Refusal, match="checksum"):
        load(tmp_path / "run")
    (tmp_path / "run/product/product.json").write_text('{"format": 99}')
    with pytest.raises(Refusal, match="format 99"):
        load(tmp_path / "run")
    with pytest.raises(Refusal, match="no run and no product"):
        load(tmp_path / "nowhere")


def test_a_pickle_in_place_of_weights_is_refused(tmp_path):
    run_one(One, tmp_path / "run")
    torch.save({"": torch.zeros(2)}, tmp_path / "run/product/weight.safetensors")
    with pytest.raises(Refusal, match="not a readable safetensors file"):
        load(tmp_path / "run")


def test_a_product_on_a_base_leaves_only_what_is_its_own(tmp_path):
    from safetensors.torch import load_file

    from stillroom.nets import MLP, Lora
    from stillroom.train import Ref, product_hash, save_product

    torch.manual_seed(0)
    net = MLP(2, 8, 1)
    for p in net.parameters():
        nn.init.normal_(p)
    save_product(Product("net", {"net": net}), tmp_path / "base")
    adapted = Lora(net, rank=2)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    base = Ref(str(tmp_path / "base"), product_hash(tmp_path / "base"))
    save_product(Product("net", {"net": adapted}, base=base), tmp_path / "lora")
    assert all("lora_" in name for name in load_file(tmp_path / "lora/net.safetensors"))
    x, t = torch.randn(4, 2), torch.rand(4)
    assert torch.equal(load(tmp_path / "lora")(x, t), adapted(x, t))

    (tmp_path / "moved").mkdir()
    for name in ("base", "lora"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert torch.equal(load(tmp_path / "moved/lora")(x, t), adapted(x, t))
    file = tmp_path / "moved/lora/product.json"
    whole = file.read_text()
    file.write_text(whole.replace('"beside"', '"aside"'))
    with pytest.raises(Refusal, match="not a product this stillroom understands: KeyError\\('beside'\\)"):
        load(tmp_path / "moved/lora")
    file.write_text(whole)

    for name in ("base", "lora"):
        (tmp_path / "moved" / name).rename(tmp_path / name)
    save_product(Product("net", {"net": MLP(2, 8, 1)}), tmp_path / "base")
    with pytest.raises(Refusal, match="not the base that this product was made on"):
        load(tmp_path / "lora")
    (tmp_path / "base/product.json").unlink()
    with pytest.raises(Refusal, match="the base of this product is gone"):
        load(tmp_path / "lora")


@pytest.mark.parametrize("fact", ["weights", "inputs", "sessions"])
def test_a_run_whose_record_lacks_a_fact_is_not_gone_on_with(tmp_path, fact):
    info = {"weights": {}, "inputs": {}, "sessions": []}
    (tmp_path / "run.json").write_text(json.dumps({k: v for k, v in info.items() if k != fact}))
    with pytest.raises(Refusal, match=f"run.json: {fact} missing"):
        RunFolder(tmp_path, 1).read_info()


@pytest.mark.parametrize("stray", [False, True])
def test_what_no_role_trains_gets_no_gradient(tmp_path, stray):
    """Frozen or not: a recipe may hold a net that it forgot to freeze."""
    class Two(Recipe):
        inputs = ("data",)

        def __init__(self, settings, data):
            self.net, self.other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(stray)

        def roles(self):
            return {"net": Role(self.net, Optimizer(lr=0.1, name="sgd"))}

        def stages(self):
            return [Stage("train", 3)]

        def losses(self, batch, turn):
            return {"net": {"error": self.other(self.net(batch["data"].x)).square().mean(1)}}

        def after(self, batch, turn):
            assert self.other.weight.grad is None

        def product(self):
            return Product("weights", self.net.state_dict())

    settings = Run(out=tmp_path / "run", steps=3, batch=4, precision="float32")
    fit(Two, settings, Silent(), data=torch.randn(16, 2))


def test_a_backward_of_ones_own_is_given_its_parameters(tmp_path):
    given = []

    def backward(terms, parameters, turn):
        given.append([tuple(p.shape) for p in parameters])
        sum(term.mean() for term in terms.values()).backward(inputs=parameters)

    class Own(One):
        def roles(self):
            return {"net": Role(self.net, Optimizer(lr=0.1, name="sgd"), backward=backward)}

    run_one(Own, tmp_path / "run")
    assert given and given[0] == [tuple(p.shape) for p in One(None).net.parameters()]


def test_an_optimizers_counts_are_restored_beside_their_parameters():
    p = nn.Parameter(torch.zeros(3, device="meta"))
    assert restored(p, torch.tensor(4.0)).device == restored(p, torch.zeros(7)).device == p.device
    assert restored(p, torch.tensor(4)) == 4                # of bitsandbytes


def test_a_run_that_began_while_this_one_prepared_is_not_written_over(tmp_path):
    class Slow(One):
        inputs = ("data",)

        def __init__(self, settings, data):
            super().__init__(settings)

        @classmethod
        def prepare(cls, settings, sources, note):
            settings.out.mkdir()
            (settings.out / "settings.toml").write_text("another's")
            return sources

    with pytest.raises(Refusal, match="already holds a run"):
        start(Slow, Run(out=tmp_path / "run", steps=1, precision="float32"), "slow", {"data": points()}, Silent())
    assert (tmp_path / "run/settings.toml").read_text() == "another's"


def test_what_an_earlier_run_left_is_not_taken_for_ones_own(tmp_path):
    run_one(One, out := tmp_path / "run")
    (out / "settings.toml").unlink()
    with pytest.raises(Refusal, match=r"run holds checkpoints and metrics.jsonl of a run, without its settings"):
        run_one(One, out, seed=1)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(Refusal, match=r"run holds metrics.jsonl of a run"):
        run_one(One, out, seed=1)
    (out / "metrics.jsonl").unlink()
    run_one(One, out, seed=1)


def test_what_is_cut_short_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), file_written_atomically(tmp_path / "file") as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/old").touch()
    rename = Path.rename

    def interrupted(self, target):
        if self.name.endswith(".new"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), folder_written_atomically(tmp_path / "folder") as new:
        (new / "new").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "old"]
