"""All benches, each in a process of its own, and the page of their results."""

import argparse
import subprocess
import sys
from pathlib import Path

from compare import HERE, regenerate

BENCHES = ("startup", "overhead", "loader", "encoder", "student", "drift", "dmvae", "dmd", "plan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of three rounds that stores nothing")
    parser.add_argument("--out", type=Path, help="store the results, and the page, in this folder instead of bench/")
    asked = parser.parse_args()
    results = asked.out or HERE / "results"
    for name in BENCHES:
        options = ["--quick"] if asked.quick else []
        options += ["--out", str(results)] if asked.out or not asked.quick else []
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), *options], check=True)
    if asked.out or not asked.quick:
        regenerate(results, (asked.out or HERE) / "RESULTS.md")


if __name__ == "__main__":
    main()
