"""What was carried out of a claim before its command was cut short, beside the place of its result."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import stillroom
from stillroom.settings import Refusal
from stillroom.settings.files import write_atomically
from stillroom.train.folder import read_rows

Task = tuple[str, int]
"""(arm, seed)"""
Outcome = tuple[Mapping[str, float | None], float]
"""The metrics of a task, and the seconds that they took."""


def part_of(result: Path, quick: bool, data: str) -> Path:
    """Another one for --quick and for data, so that asking otherwise does not cost what is kept."""
    asked = ("-quick" if quick else "") + (f"-{zlib.crc32(data.encode()):08x}" if data else "")
    return result.with_suffix(f".part{asked}.jsonl")


class Kept:
    """A file with a line for every task that ended. Lines of other code, or of a claim asked otherwise, do not count:
    `of` says how it is asked."""

    def __init__(self, path: Path, **of: Any):
        self.path, self.of = path, {**of, "code": code(), "torch": torch.__version__}

    def read(self) -> dict[Task, Outcome]:
        rows = read_rows(self.path) if self.path.exists() else []
        rows = rows if rows[:1] == [self.of] else [self.of]
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))     # without a line torn by a kill
        return {(row["arm"], row["seed"]): (row["metrics"], row["seconds"]) for row in rows[1:]}

    def add(self, task: Task, outcome: Outcome) -> None:
        arm, seed = task
        metrics, seconds = outcome
        row = {"arm": arm, "seed": seed, "metrics": metrics, "seconds": seconds}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise Refusal(f"{self.path} could not be written: {error.strerror}; free space and go on") from error

    def forget(self) -> None:
        self.path.unlink(missing_ok=True)


def code() -> str:
    """Hash of the package's source."""
    root, digest = Path(stillroom.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
