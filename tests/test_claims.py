"""Claims: how values become a verdict, that stored verdicts and the page are what the stored values give."""

import contextlib
import dataclasses
import importlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from unittest.mock import MagicMock

import pytest
import torch
from scipy import stats

from stillroom import claims, measure
from stillroom.claims import _digits, docs, find, listing, stored
from stillroom.claims import run as running
from stillroom.claims.claim import Check, Claim, Part, interval, said_of, together, verdict
from stillroom.claims.kept import Kept, part_of
from stillroom.claims.picture import side_by_side
from stillroom.cli.main import main
from stillroom.recipes import listing as recipes
from stillroom.settings import Refusal, checked
from stillroom.settings.files import held

PAGE = Path(__file__).parents[1] / "docs" / "claims.md"
"""Claims about something that is not a recipe."""

HALF = Check("half", "error at most half the control's", lambda mine, arms: arms["plain"]["error"] / 2 - mine["error"])
STEADY = Check("steady", "drift below 1", lambda mine, arms: 1 - mine["drift"])
ARMS: dict[str, Part] = {"ours": "subject", "plain": "control", "null": "null", "floor": "reported"}


def measured(ours, drift=(0.1, 0.2, 0.15), null=(10.0, 10.5, 9.5), seeds=(1, 2, 3)):
    """The control's error is 10, so the margin of HALF is 5 less ours."""
    def row(values, drifts):
        return {s: {"error": e, "drift": d} for s, e, d in zip(seeds, values, drifts, strict=True)}

    calm = [0.0] * len(seeds)
    return {"ours": row(ours, drift), "plain": row([10.0] * len(seeds), calm), "null": row(null, calm),
            "floor": row([math.pi] * len(seeds), calm)}


def fake(measure=lambda arm, seed, quick: {}, **changed) -> Claim:
    claim = Claim("vsd", ARMS, measure, (HALF, STEADY), "a moment", "half a moment")
    return dataclasses.replace(claim, **changed)


def test_interval_is_students():
    for margins in ([0.3, 0.1, 0.25], [1.0, -2.0], [0.5, 0.4, 0.45, 0.6, 0.2, 0.1]):
        expected = stats.ttest_1samp(margins, 0).confidence_interval(0.95)
        assert interval(margins) == pytest.approx(tuple(expected), rel=1e-9)
    # by the table: t(0.975, 2 degrees) = 4.303; mean 2, standard deviation 1
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert interval([1.0]) is None


@pytest.mark.parametrize(("ours", "drift", "expected"), [
    ((1.0, 1.2, 0.9), (0.1, 0.2, 0.15), "holds"),
    ((4.0, 5.5, 4.5), (0.1, 0.2, 0.15), "mixed"),  # margins 1, -0.5, 0.5
    ((9.0, 9.2, 8.9), (0.1, 0.2, 0.15), "does not hold"),
    ((1.0, 1.2, 0.9), (3.0, 3.1, 2.9), "does not hold"),  # one check of two
    ((1.0, 1.2, 0.9), (0.1, 1.2, 0.9), "mixed"),
])
def test_verdicts(ours, drift, expected):
    found = verdict(fake(), measured(ours, drift))
    assert found["verdict"] == expected
    assert found["reason"] == ""
    assert [row["check"] for row in found["checks"]] == ["half", "steady"]
    assert found["checks"][0]["margins"] == pytest.approx({s: 5 - e for s, e in zip((1, 2, 3), ours, strict=True)})
    assert together([row["verdict"] for row in found["null"]]) == "does not hold"


def test_every_subject_counts():
    arms: dict[str, Part] = {**ARMS, "floor": "subject"}
    values = measured((1.0, 1.2, 0.9))
    assert verdict(fake(arms=arms), values)["verdict"] == "holds"
    for metrics in values["floor"].values():
        metrics["error"] = 9.0
    assert verdict(fake(arms=arms), values)["verdict"] == "does not hold"


def test_one_seed_refutes_but_does_not_establish():
    assert said_of([-0.1], None) == "does not hold"
    assert said_of([0.1], None) == "mixed"
    values = measured((1.0,), (0.1,), (10.0,), seeds=(1,))
    found = verdict(fake(), values)
    assert (found["verdict"], found["checks"][0]["interval"]) == ("mixed", None)


@pytest.mark.parametrize("null", [(1.0, 1.1, 0.9), (4.0, 5.5, 4.5)])
def test_a_claim_that_cannot_fail_is_invalid(null):
    found = verdict(fake(), measured((1.0, 1.2, 0.9), null=null))
    assert found["verdict"] == "invalid"
    assert "null arm" in found["reason"]


def test_values_that_are_not_finite_are_no_evidence():
    for bad in (None, math.nan, math.inf):
        for arm in ("ours", "plain", "null"):
            values = measured((1.0, 1.2, 0.9))
            values[arm][2]["error"] = bad
            found = verdict(fake(), values)
            assert found["verdict"] == "invalid"
            assert f"arm {arm}, seed 2: error" in found["reason"]


@pytest.mark.parametrize("margin", [
    lambda mine, arms: 1 / mine["drift"],
    lambda mine, arms: math.log(mine["drift"]),
    lambda mine, arms: mine["drift"] or math.inf,
    lambda mine, arms: mine["drift"] or math.nan,
])
def test_margins_that_are_not_finite_are_no_evidence(margin):
    claim = fake(checks=(HALF, Check("odd", "drift in odd units", margin)))
    values = measured((1.0, 1.2, 0.9))
    for arm in ("ours", "null"):
        for seed in (1, 2, 3):
            values[arm][seed]["drift"] = 0.1
    assert verdict(claim, values)["reason"] == ""
    for arm in ("null", "ours"):
        values[arm][2]["drift"] = 0.0
        found = verdict(claim, values)
        assert found["verdict"] == "invalid"
        assert f"check 'odd', arm {arm}, seed 2" in found["reason"]
        json.dumps(found, allow_nan=False)


def test_names():
    known = {e.name for e in recipes()}
    assert {e.recipe for e in listing()} <= known
    assert [(e.name, e.recipe) for e in listing()] == [(find(e.name).name, find(e.name).recipe) for e in listing()]
    assert {e.name for e in listing() if e.recipe == "drifting"} == {"drift-rae", "drift-stability",
                                                                     "drifting-identities", "drifting-scatter"}
    assert {p.stem for p in claims.RESULTS.glob("*.json")} <= {e.name for e in listing()}
    with pytest.raises(Refusal, match="did you mean 'vsd'"):
        find("vsdd")


def test_every_claim_has_a_stored_verdict():
    assert [e.name for e in listing() if stored(e.name) is None] == []


@pytest.mark.parametrize("name", [e.name for e in listing()])
def test_stored_verdicts_are_what_the_stored_values_give(name):
    claim, result = find(name), stored(name)
    assert result is not None and not result["quick"]
    assert result["arms"] == dict(claim.arms)
    assert set(result["seeds"]) >= set(claim.seeds) and len(claim.seeds) >= 3
    assert claim.arms_of("control") and len(claim.arms_of("null")) == 1
    require_recomputed(claim, result)


def values_of(result):
    """The raw values of a stored result; JSON made the seeds strings."""
    return {arm: {int(seed): m for seed, m in seeds.items()} for arm, seeds in result["values"].items()}


def require_recomputed(claim, result):
    values = values_of(result)
    assert {arm: sorted(v) for arm, v in values.items()} == dict.fromkeys(claim.arms, sorted(result["seeds"]))
    again = json.loads(json.dumps(verdict(claim, values)))  # seeds as strings, as stored
    for key in ("verdict", "reason"):
        assert result[key] == again[key]
    for kind in ("checks", "null"):
        assert len(result[kind]) == len(again[kind])
        for mine, new in zip(result[kind], again[kind], strict=True):
            assert mine["margins"] == pytest.approx(new["margins"], rel=1e-9)
            assert mine["interval"] == pytest.approx(new["interval"], rel=1e-6)
            assert {**mine, "margins": 0, "interval": 0} == {**new, "margins": 0, "interval": 0}


def test_the_verdict_on_photographs_is_what_its_values_give():
    result = json.loads((PAGE.parent / "evidence/encoder-photographs.json").read_text(encoding="utf-8"))
    require_recomputed(find("encoder"), result)
    assert result["command"] == "stillroom claims run encoder --data DATA --seeds 201,202,203,204"


def test_a_stored_verdict_that_was_changed_is_noticed():
    result = stored("vsd")
    assert result is not None
    values = values_of(result)
    for metrics in values["vsd"].values():
        metrics["spread / truth's, 8 modes"] = 1.4
    assert verdict(find("vsd"), values)["verdict"] == "does not hold" != result["verdict"]


def test_the_page_is_generated():
    assert PAGE.read_text(encoding="utf-8") == docs.page(), "run: stillroom claims docs --out docs/claims.md"


def test_numbers_on_the_page():
    shown = {0.10942: "0.109", -0.000842: "-0.000842", 1.0: "1.00", 23.456: "23.5", 1234.0: "1234", 0.0: "0",
             1.23e-7: "1.23e-07", None: "not finite"}
    assert {value: docs.number(value) for value in shown} == shown
    assert docs.mean_and_sd([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert docs.mean_and_sd([1.7, 1.7 * (1 + 1e-12)]) == "1.700 ± 0"                # the same figure, but for rounding
    assert docs.mean_and_sd([1.0, None]) == "not finite"


class Reached(Exception):
    """An arm wants to go on with what a run learned, which here none does."""


@pytest.fixture
def asked(monkeypatch):
    """Runs that are asked for; none is carried out."""
    found, taught = [], _digits.taught
    modules = [importlib.import_module(f"stillroom.claims.{p.stem}") for p in Path(claims.__file__).parent.glob("*.py")
               if p.stem not in ("__init__", "run")]

    def reached(*_what, **_how):
        raise Reached

    def run_in(folder, recipe, given=None, **settings):
        known = checked(recipe.Settings(out=folder, device="cpu", precision="float32", **settings), recipe.__name__)
        found.append(recipe)
        assert set(given or {}) <= set(recipe.inputs) and all(given or hasattr(known, name) for name in recipe.inputs)
        return folder

    def learned(recipe, given=None, **settings):
        run_in(Path("nowhere"), recipe, given, **settings)
        raise Reached

    monkeypatch.setattr(_digits, "taught", lambda net, loss, count, steps, seed: taught(net, loss, count, 1, seed))
    monkeypatch.setattr("stillroom.train.load", reached)
    monkeypatch.setattr("stillroom.claims.guidance_lora.guided", lambda *_: (torch.zeros(1, 2), 0.0))
    monkeypatch.setattr("stillroom.claims.drift_stability.train", MagicMock())      # what its teacher draws, and
    monkeypatch.setattr("stillroom.claims.drift_stability.seen", MagicMock())       # how far that is, come first
    monkeypatch.setattr("stillroom.claims.encoder.held_out", lambda _data: torch.zeros(1, 3, 64, 64))
    for long in ("encoder.learned_from", "dmvae_toy.energy"):
        monkeypatch.setattr(f"stillroom.claims.{long}", reached)
    instead = {running.run_in: run_in, running.learned: learned, measure.energy_distance: reached,
               measure.panel: reached, measure.modes: reached}
    for module in modules:
        for name, thing in list(vars(module).items()):
            if isinstance(thing, FunctionType) and thing in instead:
                monkeypatch.setattr(module, name, instead[thing])
    caches = [thing for module in modules for thing in vars(module).values() if hasattr(thing, "cache_clear")]
    for each in caches:
        each.cache_clear()
    yield found
    for each in caches:
        each.cache_clear()


WITH_RUNS = sorted({e.name for e in listing()} - {"drifting-identities"})


@pytest.mark.parametrize("name", WITH_RUNS)
def test_what_arms_ask_of_recipes_is_understood(name, asked):
    """Each arm's first runs, up to where it would need what they learned."""
    for arm in find(name).arms:
        with contextlib.suppress(Reached):
            find(name).measure(arm, 1, True)
    assert len(asked) >= len(find(name).arms_of("subject")) + len(find(name).arms_of("null"))


def tiny(arm, seed, quick):
    """Deterministic in (arm, seed); the subject's error a tenth of the control's."""
    noise = float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
    return {"error": {"ours": 1.0, "plain": 10.0, "null": 10.0, "floor": 0.0}[arm] + 0.1 * noise, "drift": float(quick)}


def use(monkeypatch, claim):
    monkeypatch.setattr("stillroom.claims.vsd.CLAIM", claim)


def test_run_from_the_command_line(tmp_path, monkeypatch, capsys):
    use(monkeypatch, fake(tiny))
    out = tmp_path / "new" / "vsd.json"
    command = ["claims", "run", "vsd", "--seeds", "7,8,9", "--jobs", "1"]
    assert main([*command, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["verdict"], result["seeds"], result["quick"]) == ("holds", [7, 8, 9], False)
    assert result["values"]["ours"]["8"] == tiny("ours", 8, False)
    assert result["command"] == "stillroom claims run vsd --seeds 7,8,9"
    said = capsys.readouterr()
    assert "verdict: holds" in said.out and len(said.err.splitlines()) == 4 * 3
    # a folder is made too; the default is claims/NAME.json; the values are those of the seeds
    assert main([*command, "--out", str(tmp_path / "folder")]) == 0
    assert json.loads((tmp_path / "folder" / "vsd.json").read_text())["values"] == result["values"]
    monkeypatch.chdir(tmp_path)
    assert main(["claims", "run", "vsd", "--quick", "--jobs", "1"]) == 0  # drift 1: its margin is exactly 0
    quick = json.loads(Path("claims/vsd.json").read_text())
    assert (quick["quick"], quick["seeds"], quick["verdict"]) == (True, [101, 102, 103], "mixed")
    assert quick["command"] == "stillroom claims run vsd --quick --seeds 101,102,103"


def test_what_was_carried_out_before_a_kill_is_not_carried_out_again(tmp_path, monkeypatch, capsys):
    asked, out = [], tmp_path / "vsd.json"
    part, command = tmp_path / "vsd.part.jsonl", ["claims", "run", "vsd", "--seeds", "7,8,9", "--jobs", "1", "--out"]

    def killed(arm, seed, quick):
        asked.append((arm, seed))
        if len(asked) == 6:
            raise KeyboardInterrupt
        return tiny(arm, seed, quick)

    use(monkeypatch, fake(killed))
    with pytest.raises(KeyboardInterrupt):
        running.run(find("vsd"), (7, 8, 9), path=out, tell=lambda text: None)
    part.write_text(part.read_text() + '{"arm": "null", "se')      # torn in the middle of a line
    assert not out.exists() and main([*command, str(out)]) == 0
    assert "5 of 12 arms and seeds were carried out before" in capsys.readouterr().err
    assert len(asked) == 13 and asked.count(asked[5]) == 2 and len(set(asked)) == 12
    assert not part.exists()
    use(monkeypatch, fake(tiny))
    assert main([*command, str(tmp_path / "whole.json")]) == 0
    mine, whole = (json.loads(path.read_text()) for path in (out, tmp_path / "whole.json"))
    assert mine["values"] == whole["values"] and mine["verdict"] == whole["verdict"]


def test_asking_otherwise_costs_nothing_that_is_kept(tmp_path, monkeypatch, capsys):
    out, command = tmp_path / "vsd.json", ["claims", "run", "vsd", "--seeds", "7", "--jobs", "1", "--out"]

    def stopped(arm, seed, quick):
        if arm == "null" and not quick:
            raise KeyboardInterrupt
        return tiny(arm, seed, quick)

    use(monkeypatch, fake(stopped, on=lambda data: fake(tiny)))
    assert main([*command, str(out)]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    kept = (tmp_path / "vsd.part.jsonl").read_text()
    assert main([*command, str(out), "--quick"]) == main([*command, str(out), "--data", "photographs"]) == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["vsd.json", "vsd.part.jsonl"]
    assert (tmp_path / "vsd.part.jsonl").read_text() == kept
    asked = [(False, ""), (True, ""), (False, "a"), (False, "b"), (True, "a")]
    assert len({part_of(out, *how) for how in asked}) == 5


def test_one_command_at_a_time_is_at_work_on_a_file(tmp_path, monkeypatch, capsys):
    begun = []
    use(monkeypatch, fake(lambda *task: begun.append(task)))
    with held(part_of(tmp_path / "vsd.json", False, "").with_suffix(".lock"), "busy"):
        assert main(["claims", "run", "gdd", "vsd", "--jobs", "1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "vsd.part.jsonl: another command is at work" in said and len(said.splitlines()) == 1
    assert not begun and not list(tmp_path.iterdir())


def test_what_a_later_claim_refuses_is_said_before_the_first(tmp_path, monkeypatch, capsys):
    begun = []
    use(monkeypatch, fake(lambda *task: begun.append(task), on=lambda data: find("vsd")))
    assert main(["claims", "run", "vsd", "gdd", "--data", "x", "--jobs", "1", "--out", str(tmp_path / "new")]) == 2
    assert "claim gdd takes no data" in capsys.readouterr().err
    assert not begun and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_stopped_names_no_folder_of_its_own(number, tmp_path, monkeypatch, capsys):
    from stillroom.recipes.vsd import VSD

    class Stopped(VSD):
        def losses(self, batch, turn):
            signal.raise_signal(number)
            return super().losses(batch, turn)

    use(monkeypatch, fake(lambda *task: running.learned(Stopped, teacher="ring:5", batch=32, width=16, steps=9)))
    assert main(["claims", "run", "vsd", "--jobs", "1", "--out", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert "vsd: stopped; the same command goes on" in said and "resume" not in said
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("change", ["code", "quick"])
def test_what_was_carried_out_otherwise_does_not_count(change, tmp_path, monkeypatch):
    path = tmp_path / "x.part.jsonl"
    first = Kept(path, claim="x", quick=False)
    assert first.read() == {}
    first.add(("ours", 7), ({"error": 1.5, "drift": None}, 2.0))
    assert first.read() == {("ours", 7): ({"error": 1.5, "drift": None}, 2.0)}
    if change == "code":
        monkeypatch.setattr("stillroom.claims.kept.code", lambda: "another")
    assert Kept(path, claim="x", quick=change == "quick").read() == {} == first.read()


def test_a_claim_that_does_not_hold_is_a_result_and_an_invalid_one_an_error(tmp_path, monkeypatch, capsys):
    def run(measure, out):
        use(monkeypatch, fake(measure))
        code = main(["claims", "run", "vsd", "--jobs", "1", "--out", str(tmp_path / out)])
        return code, json.loads((tmp_path / out).read_text())

    code, result = run(lambda arm, seed, quick: {"error": 10.0 + seed / 100, "drift": 0.0}, "fails.json")
    assert (code, result["verdict"]) == (0, "does not hold")
    code, result = run(lambda arm, seed, quick: tiny("ours" if arm == "null" else arm, seed, quick), "cannot.json")
    assert (code, result["verdict"]) == (1, "invalid")
    assert "null arm" in capsys.readouterr().out
    code, result = run(lambda arm, seed, quick: {"error": math.nan, "drift": 0.0}, "nan.json")
    assert (code, result["verdict"], result["values"]["ours"]["101"]["error"]) == (1, "invalid", None)


@pytest.mark.parametrize(("arguments", "text"), [
    (["run", "vds"], "did you mean 'vsd'"),
    (["run"], "name one or more of"),
    (["run", "vsd", "--seeds", "1,x"], "different whole numbers"),
    (["run", "vsd", "--seeds", "1,1"], "different whole numbers"),
    (["run", "vsd", "--seeds", ""], "different whole numbers"),
    (["run", "vsd", "--seeds", "-1"], "different whole numbers"),
    (["run", "vsd", "--seed", "1"], "did you mean '--seeds'"),
    (["run", "vsd", "--jobs", "0"], "above 0"),
    (["run", "vsd", "vsd", "--out", "one.json"], "do not go into one file"),
    (["rnu"], "did you mean 'run'"),
    (["list", "more"], "usage"),
    (["docs", "more"], "usage"),
    (["picture", "vsd"], "usage"),
    (["picture", "vds", "--out", "x.png"], "did you mean 'vsd'"),
])
def test_what_is_refused(arguments, text, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["claims", *arguments]) == 2
    said = capsys.readouterr().err
    assert text in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    def never(arm, seed, quick):
        raise AssertionError("work was done")

    use(monkeypatch, fake(never))
    (tmp_path / "file").write_text("")
    assert main(["claims", "run", "vsd", "--out", str(tmp_path / "file" / "vsd.json")]) == 2
    assert "no folder can be made there" in capsys.readouterr().err


def test_another_process_gives_the_same():
    claim = dataclasses.replace(find("vsd"), arms={"truth": "reported"}, checks=())
    ((_, (alone, _)),) = running.carried_out(claim, "", [("truth", 1)], True, 1)
    ((_, (apart, _)),) = running.carried_out(claim, "", [("truth", 1)], True, 2)
    assert apart == alone  # to the bit


def test_an_idle_role_does_not_move():
    from stillroom.recipes.vsd import VSD

    null = running.idle(VSD, "particles")
    common = {"teacher": "ring:5", "batch": 32, "seed": 4, "width": 16}
    first, last = (running.learned(null, steps=steps, **common) for steps in (2, 120))
    assert torch.equal(first.model, last.model)
    assert (last.record["steps"], last.rows[-1]["step"]) == (120, 120)
    assert first.evaluations == 2 * 32 + 2 * 32     # the fake score twice, then for the gap both scores once


def test_evaluations_are_measured_and_as_many_for_sid_as_for_dmd(monkeypatch):
    from stillroom.claims import sid

    flow_on = sid.flow_on
    monkeypatch.setattr(sid, "flow_on", lambda spec, seed, steps: flow_on(spec, seed, 2, width=16))
    monkeypatch.setattr(sid, "UPDATES", 2)
    monkeypatch.setattr(sid, "far_by_class", lambda x, y, spec: 0.0)
    mine, theirs = (sid.measure(arm, 1, False) for arm in ("sid", "dmd"))
    for key in (running.EVALUATIONS, f"{running.EVALUATIONS}, teacher guided"):
        assert mine[key] == theirs[key]
    # of 256, for an update: 2 of the student, 3 of the fake score, 1 of the teacher, which guidance asks twice
    assert mine[running.EVALUATIONS] == pytest.approx(2 * 256 * 6 / 1e6)
    assert theirs[f"{running.EVALUATIONS}, teacher guided"] == pytest.approx(2 * 256 * 7 / 1e6)


def test_the_margin_against_sds_keeps_its_sign_where_noise_turns_that_of_mmd():
    check = next(c for c in find("vsd").checks if c.name.startswith("MMD²"))
    assert check.margin({"MMD², 5 modes": 0.01}, {"sds": {"MMD², 5 modes": 0.1}}) == pytest.approx(0.2 - 0.1)
    assert check.margin({"MMD², 5 modes": 0.01}, {"sds": {"MMD², 5 modes": -0.001}}) < 0


def test_a_claims_picture_is_drawn_to_a_file(tmp_path, monkeypatch, capsys):
    from stillroom.report.plots import scatter

    seeds = []
    use(monkeypatch, fake(pictures=lambda seed: seeds.append(seed) or scatter({"a": torch.randn(50, 2)})))
    assert main(["claims", "picture", "vsd", "--seed", "7", "--out", str(tmp_path / "new/vsd.png")]) == 0
    assert seeds == [7] and (tmp_path / "new/vsd.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{tmp_path}/new/vsd.png\n"


def test_panels_side_by_side():
    import io

    from PIL import Image

    from stillroom.report import scatter

    picture = Image.open(io.BytesIO(side_by_side(scatter({"a": torch.randn(50, 2), "b": torch.randn(50, 2)}))))
    assert picture.width == 1200
    assert picture.getpixel((0, 0)) == (255, 255, 255)


def test_listing_and_the_page_import_no_torch(tmp_path):
    script = (
        "import sys; from stillroom.cli.main import main\n"
        "assert main(['claims', 'list']) == 0 and main(['claims', '--help']) == 0\n"
        f"assert main(['claims', 'docs', '--out', {str(tmp_path / 'c.md')!r}]) == 0\n"
        "assert not {'torch', 'scipy', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vsd" in done.stdout
