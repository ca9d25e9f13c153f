"""Run by a launcher in tests/test_processes.py: the three roles, sharded or copied."""

import sys
from pathlib import Path

from stillroom.train import Silent, start
from three_roles import Settings, ThreeRoles, points

out, shard = Path(sys.argv[1]), sys.argv[2] == "shard"
settings = Settings(out=out, steps=20, precision="float32", log_every=1, checkpoint_every=10, shard=shard)


class NoDropout(ThreeRoles):
    """A mask belongs to a process's own samples, so two processes draw other masks than one."""

    def __init__(self, settings, data):
        super().__init__(settings, data)
        self.student.net[2].p = 0.0
        self.mean.module.net[2].p = 0.0


start(NoDropout, settings, "three", {"data": points()}, Silent())
