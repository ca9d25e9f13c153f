"""For benches that train by the command line: commands whose work is kept, and goes on where it was cut short."""

import os
import subprocess
import sys
from pathlib import Path


def command(out: Path, *words: str) -> Path:
    """A command of stillroom that leaves `out`, unless it is there."""
    if not (out / "product").exists() and not (out / "latents.json").exists():
        begun = (out / "settings.toml").exists()
        stillroom(*(("resume", str(out)) if begun else (*words, "--out", str(out))))
    return out


def stillroom(*words: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "stillroom", *words], check=True, **more)


def cifar(split: str) -> str:
    if "STILLROOM_DATA" not in os.environ:
        sys.exit("set STILLROOM_DATA to the folder that holds cifar10-jpeg/train.parquet and test.parquet")
    return str(Path(os.environ["STILLROOM_DATA"]) / f"cifar10-jpeg/{split}.parquet")
