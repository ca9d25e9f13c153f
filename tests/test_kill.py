"""kill -9 at any moment, inside a checkpoint write too; resume; the weights are those of a run never killed."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import threading

import pytest

from stillroom.settings import files
from stillroom.train import Silent, load_product, resume, start
from three_roles import Settings, ThreeRoles, points

KILLS = 20
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["three_roles", "stillroom.train"])


def settings(out, accumulate):
    return Settings(out=out, steps=600, batch=16, accumulate=accumulate, precision="float32", log_every=7,
                    checkpoint_every=11)


def session(settings, at_sync=0, at_step=0, later=0.0, by=signal.SIGKILL):
    """One process of the run. It signals itself at a sync to disk, most of which belong to checkpoints, or so many
    seconds after a step; both are counted from its own start, and 0 is never."""
    def die():
        os.kill(os.getpid(), by)

    syncs, steps, real = itertools.count(1), itertools.count(1), files.sync

    def sync(path):
        if next(syncs) == at_sync:
            die()
        real(path)

    class Dies(ThreeRoles):
        def after(self, batch, turn):
            super().after(batch, turn)
            if next(steps) == at_step:
                threading.Timer(later, die).start() if later else die()

    files.sync = sync
    if (settings.out / "settings.toml").exists():
        resume(settings.out, lambda _: Dies, {"data": points()}, Silent())
    else:
        start(Dies, settings, "three", {"data": points()}, Silent())


def begun(*arguments, **how):
    process = context.Process(target=session, args=arguments, kwargs=how)
    process.start()
    return process


def outcome(out):
    parts = load_product(out).parts
    rows = (out / "metrics.jsonl").read_text().splitlines()
    state = {**parts["generator"].state_dict(), "bank": parts["bank"]}
    return {k: v.tolist() for k, v in state.items()}, [r.partition('"student/')[2] for r in rows], len(rows)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_at_random_moments(tmp_path, accumulate):
    """Every second time inside a checkpoint's writing, else at a moment that the watch says, or after a step where so
    many are made before: no machine is so fast that the run ends before its kills."""
    seed = int(os.environ.get("KILLS_SEED", random.randrange(10**6)))
    print(f"kills drawn with KILLS_SEED={seed}")
    draw = random.Random(seed)
    start(ThreeRoles, settings(tmp_path / "whole", accumulate), "three", {"data": points()}, Silent())
    run = settings(tmp_path / "run", accumulate)
    for kill in range(KILLS):
        if kill % 2 == 0:
            process = begun(run, at_sync=draw.randint(3, 28))                   # three checkpoints at most: 33 steps
        else:
            process = begun(run, at_step=draw.randint(1, 20), later=draw.uniform(0, 3e-3))      # one, or two: 22
            process.join(draw.uniform(0.02, 0.4))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"the run ended after {kill} kills; give it more steps"
    process = begun(run)
    process.join()
    assert process.exitcode == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "run").glob("**/.*.new"))


def test_a_late_kill_costs_little(tmp_path):
    run = Settings(out=tmp_path / "run", steps=1000, precision="float32")
    process = begun(run, at_step=800)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    session(run)
    sessions = json.loads((tmp_path / "run/run.json").read_text())["sessions"]
    assert sessions[1]["start_step"] == 750             # an eighth of the run apart


def test_ctrl_c_stops_between_steps_with_a_checkpoint(tmp_path):
    process = begun(run := settings(tmp_path / "run", 1), at_step=20, by=signal.SIGINT)
    process.join()
    assert process.exitcode == 1  # the refusal that says how to go on
    assert (tmp_path / "run/checkpoints/step-00000020").is_dir()
    session(run)
    start(ThreeRoles, settings(tmp_path / "whole", 1), "three", {"data": points()}, Silent())
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_second_ctrl_c_waits_for_no_step(tmp_path):
    class Dies(ThreeRoles):
        def after(self, batch, turn):
            super().after(batch, turn)
            if turn.step == 15:
                for by in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                    os.kill(os.getpid(), by)
                raise AssertionError("the step went on")

    run = settings(tmp_path / "run", 1)
    with pytest.raises(KeyboardInterrupt):
        start(Dies, run, "three", {"data": points()}, Silent())
    session(run)
    start(ThreeRoles, settings(tmp_path / "whole", 1), "three", {"data": points()}, Silent())
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
