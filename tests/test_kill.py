"""kill -9 at any moment, inside a checkpoint write too; resume; the weights are those of a run never killed."""

import multiprocessing
import os
import random
import signal
import time

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


def session(out, accumulate, die_at_sync):
    """One process of the run. die_at_sync: kill itself at that sync to disk, most of which belong to checkpoints."""
    count, real = 0, files.sync

    def sync(path):
        nonlocal count
        count += 1
        if count == die_at_sync:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    files.sync = sync
    if (out / "settings.toml").exists():
        resume(out, lambda _: ThreeRoles, {"data": points()}, Silent())
    else:
        start(ThreeRoles, settings(out, accumulate), "three", {"data": points()}, Silent())


def outcome(out):
    parts = load_product(out).parts
    rows = (out / "metrics.jsonl").read_text().splitlines()
    state = {**parts["generator"].state_dict(), "bank": parts["bank"]}
    return {k: v.tolist() for k, v in state.items()}, [r.partition('"student/')[2] for r in rows], len(rows)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_at_random_moments(tmp_path, accumulate):
    seed = random.randrange(10**6)
    print(f"kills drawn with seed {seed}")
    draw = random.Random(seed)
    start(ThreeRoles, settings(tmp_path / "whole", accumulate), "three", {"data": points()}, Silent())
    kills, finished = 0, False
    while not finished:
        inside = kills < KILLS and kills % 2 == 0
        die_at = draw.randint(3, 40) if inside else 0
        process = context.Process(target=session, args=(tmp_path / "run", accumulate, die_at))
        process.start()
        if kills < KILLS and not inside:
            process.join(draw.uniform(0.02, 0.4))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        finished = process.exitcode == 0
        kills += not finished
    assert kills >= KILLS // 2, f"the run ended after {kills} kills; give it more steps"
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert not list((tmp_path / "run").glob("**/.*.new"))


def test_ctrl_c_stops_between_steps_with_a_checkpoint(tmp_path):
    process = context.Process(target=session, args=(tmp_path / "run", 1, 0))
    process.start()
    while not (tmp_path / "run/metrics.jsonl").exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 1  # the refusal that says how to go on
    session(tmp_path / "run", 1, 0)
    start(ThreeRoles, settings(tmp_path / "whole", 1), "three", {"data": points()}, Silent())
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
