"""Two processes over gloo see what one would: the same losses and weights to 1e-6 after 20 steps. Recipes leave the
same product sharded as not."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from command import TINY
from stillroom.codecs import Codec
from stillroom.data import LatentSpace, Loader, Tensors
from stillroom.settings import Optimizer, Refusal
from stillroom.train import Role, load_product, loop
from stillroom.train.folder import read_rows
from stillroom.train.shard import shard
from stillroom.train.turn import Noise, Turn
from stillroom.train.world import World, open_world
from three_roles import Generator  # noqa: F401  (its product names this class)
from two_processes import BALANCED, CASES, SPREAD, balanced, run, save_teacher

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
              "--main_process_port", "0"]


TWO = World(0, 2, torch.device("cpu"))


def launched(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, cwd=HERE, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def started(launcher, *arguments):
    launched([*launcher, str(HERE / "two_processes.py"), *map(str, arguments)])


def launch(launcher, out, how):
    started(launcher, out, how)
    parts = load_product(out).parts
    rows = [{k: v for k, v in r.items() if "/" in k} for r in read_rows(out / "metrics.jsonl")]
    return {**parts["generator"].state_dict(), "bank": parts["bank"]}, rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch([sys.executable], tmp_path_factory.mktemp("alone") / "run", "copy")


@pytest.mark.parametrize(("launcher", "how"), [(TORCHRUN, "copy"), (ACCELERATE, "copy"), (TORCHRUN, "shard"),
                                               (TORCHRUN, "accumulate")],
                         ids=["torchrun", "accelerate", "sharded", "accumulating"])
def test_two_processes_equal_one(tmp_path, alone, launcher, how):
    weights, rows = launch(launcher, tmp_path / "run", how)
    for name, expected in alone[0].items():
        assert torch.allclose(weights[name], expected, rtol=0, atol=1e-6), name
    for row, expected in zip(rows, alone[1], strict=True):
        assert row == pytest.approx(expected, abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("micros", [1, 2])
def test_a_turns_rows_are_those_that_the_loader_hands_it(micros, rank):
    world, source = World(rank, 2, torch.device("cpu")), Tensors(torch.arange(24.0)[:, None])

    def rows(micro):
        turn = Turn(step=3, stage="all", roles=frozenset(), batch=8, micros=micros, world=world,
                    noise=Noise(0, 3, world.device), micro=micro, watched=False)
        return turn.rows(8)

    with Loader(source, seed=0, batch=8) as one, Loader(source, seed=0, batch=8, micros=micros, rank=rank,
                                                        world=2) as parted:
        whole, parts = one.at(3)[0].x, parted.at(3)
    for m, part in enumerate(parts):
        assert torch.equal(whole[rows(m)], part.x)
    assert torch.equal(whole[rows(None)], torch.cat([part.x for part in parts]))


@pytest.fixture(scope="module")
def typed_alone(tmp_path_factory):
    return typed([sys.executable], tmp_path_factory.mktemp("typed") / "run")


def typed(launcher, out):
    """`stillroom train flow`, as a person types it: where its product lies, and what it said, times left out."""
    words = f"{TINY} --net dit --patch 4 --steps 4 --log-every 2 --model.name sgd --model.lr 0.05 --out {out}"
    done = launched([*launcher, "-m", "stillroom", "train", "flow", *words.split()])
    said = re.sub(r"[\d.]+( steps)?(/s| s)", "TIME", done.stdout + done.stderr).replace(str(out), "RUN")
    return out, said.splitlines()


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_command_line_under_a_launcher_makes_the_same_and_says_it_once(tmp_path, typed_alone, launcher):
    out, said = typed(launcher, tmp_path / "run")
    assert_same(out, typed_alone[0])
    assert sorted(said) == sorted(typed_alone[1])


def weights(place):
    parts = load_product(place).parts
    return {f"{part}.{name}": x for part, held in parts.items()
            for name, x in (held.state_dict() if isinstance(held, nn.Module) else {"": held}).items()}


def assert_same(place, expected):
    found, expected = weights(place), weights(expected)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.allclose(found[name], x, rtol=0, atol=1e-6), name


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    save_teacher(place := tmp_path_factory.mktemp("teacher") / "flow")
    return place


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """Runs that are not sharded, each once."""
    out, done = tmp_path_factory.mktemp("whole"), {}
    return lambda case: done.get(case) or done.setdefault(case, run(case, out / case, teacher, shard=False))


@pytest.fixture
def mesh_of_one(monkeypatch):
    """One process stands for two: what is sharded is as little whole between forwards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(loop, "shard", lambda roles, world: shard(roles, TWO))
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_recipes_leave_the_same_product_sharded(tmp_path, mesh_of_one, teacher, whole, case):
    assert_same(run(case, tmp_path / "run", teacher, shard=True), whole(case))


def test_recipes_leave_the_same_product_sharded_over_two_processes(tmp_path, teacher, whole):
    started(TORCHRUN, tmp_path, "recipes", teacher)
    for case in SPREAD:
        assert_same(tmp_path / case, whole(case))


def test_terms_weighed_by_gradients_are_weighed_by_those_of_all_processes(tmp_path):
    """Two processes, each with half of the batch, strike one balance."""
    alone, two = tmp_path / "alone", tmp_path / "two"
    for name in BALANCED:
        balanced(name, alone / name, alone / "tokenizer")
    started(TORCHRUN, two, "balanced", alone / "tokenizer")
    for name in BALANCED:
        assert_same(two / name, alone / name)
        rows = [read_rows(out / name / "metrics.jsonl") for out in (alone, two)]
        weighed = [[row[key] for row in found for key in row if key.endswith("/balance")] for found in rows]
        assert len(weighed[0]) == 4 and weighed[1] == pytest.approx(weighed[0], rel=1e-4)


def test_weights_that_cannot_be_sharded_are_refused():
    codec = Codec(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3), LatentSpace(4, 1, (0.0,) * 4, (1.0,) * 4))
    with pytest.raises(Refusal, match="role model: its weights lie channels last"):
        shard({"model": Role(codec, Optimizer(lr=0.1))}, TWO)


@pytest.mark.parametrize(("name", "own"), [("auto", "cuda:3"), ("cuda", "cuda:3"), ("cuda:1", "cuda:1")])
def test_the_accelerator_of_a_process_is_its_own_and_the_current_one(monkeypatch, name, own):
    """One that is not the current one would be neither seeded step by step nor waited for."""
    current = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with open_world(name) as world:
        assert current == [world.device] == [torch.device(own)]
