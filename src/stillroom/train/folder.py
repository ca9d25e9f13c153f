"""The run folder: who holds it, what was settled, and one row of metrics per logged step."""

import json
import os
import platform
import shlex
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stillroom.settings import Refusal, Run, to_toml
from stillroom.settings.files import locked, read_json, write_atomically
from stillroom.train.checkpoint import Shelf


def machine(device: torch.device) -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def resuming(path: Path) -> str:
    """The command that goes on with a run, as a shell takes it."""
    return f"stillroom resume {shlex.quote(str(path))}"


class RunFolder:
    """Held by one process at a time: an exclusive lock that the system lets go of however the process ends."""

    def __init__(self, path: Path, keep: int, first: bool = True):
        self.path, self.shelf = path, Shelf(path / "checkpoints", keep)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(f"{path}: no folder can be made there: {error.strerror}") from None
        self._lock = None
        if first:  # the other processes of the run work in the folder that the first one holds
            self._lock = locked(path / ".lock", f"{path}: another process is using this run; wait for it, or choose "
                                "another folder")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def write_settings(self, recipe: str, settings: Run) -> None:
        write_atomically(self.path / "settings.toml", to_toml(settings, recipe=recipe))

    def write_info(self, info: dict[str, Any]) -> None:
        write_atomically(self.path / "run.json", json.dumps(info, indent=1))

    def read_info(self) -> dict[str, Any]:
        info = read_json(self.path / "run.json")
        if missing := [fact for fact in ("inputs", "weights", "sessions") if fact not in info]:
            raise Refusal(f"{self.path}/run.json: {', '.join(missing)} missing; the file was edited, or is of another "
                          "stillroom: begin a new run")
        return info

    def append(self, row: dict[str, Any]) -> None:
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise Refusal(f"{self.metrics} could not be written: {error.strerror}; free space and resume") from error

    def rewind(self, step: int) -> None:
        """Drops rows past the checkpoint that the run goes on from, and a line torn by a kill."""
        if not self.metrics.exists():
            return
        kept = [row for row in read_rows(self.metrics) if row["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line without its end was torn by a kill, and does not count."""
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for line in lines[:-1]:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise Refusal(f"{path}: line {len(rows) + 1} is not JSON; the file was edited or damaged") from None
    return rows


def now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
