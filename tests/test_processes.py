"""Two processes over gloo see what one would: the same losses and weights to 1e-6 after 20 steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stillroom.train import load_product
from stillroom.train.folder import read_rows
from three_roles import Generator  # noqa: F401  (its product names this class)

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
              "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
              "--main_process_port", "0"]


def launch(launcher, out, how):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launcher, str(HERE / "two_processes.py"), str(out), how], env=environment, cwd=HERE,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = load_product(out).parts
    rows = [{k: v for k, v in r.items() if "/" in k} for r in read_rows(out / "metrics.jsonl")]
    return {**parts["generator"].state_dict(), "bank": parts["bank"]}, rows


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch([sys.executable], tmp_path_factory.mktemp("alone") / "run", "copy")


@pytest.mark.parametrize(("launcher", "how"), [(TORCHRUN, "copy"), (ACCELERATE, "copy"), (TORCHRUN, "shard")],
                         ids=["torchrun", "accelerate", "sharded"])
def test_two_processes_equal_one(tmp_path, alone, launcher, how):
    weights, rows = launch(launcher, tmp_path / "run", how)
    for name, expected in alone[0].items():
        assert torch.allclose(weights[name], expected, rtol=0, atol=1e-6), name
    for row, expected in zip(rows, alone[1], strict=True):
        assert row == pytest.approx(expected, abs=1e-5, rel=1e-5)
