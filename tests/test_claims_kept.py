"""A claim in several processes that is cut short: what ended is kept, and nothing else is left, nor goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
from pathlib import Path

from stillroom.claims import run as running
from stillroom.claims import vsd
from stillroom.claims.claim import Claim
from stillroom.cli.main import main
from stillroom.settings import Refusal

HERE = Path(__file__).parent


def fails():
    raise Refusal("this arm fails")


ENDS = {"fails": fails,
        "is killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "ctrl-c": lambda: os.killpg(0, signal.SIGINT),
        "terminate": lambda: os.kill(os.getppid(), signal.SIGTERM)}


def measure(arm, seed, quick):
    (running.shared_place() / "teacher").write_text("")
    with (HERE / "begun").open("a") as begun:
        begun.write(f"{arm} {os.getpid()}\\n")
    if arm == "ended":
        return {"error": 1.0}
    if arm == "last":       # once another arm runs and the first is kept
        while "endless" not in (HERE / "begun").read_text() or '"ended"' not in (HERE / "vsd.part.jsonl").read_text():
            time.sleep(0.1)
        ENDS[sys.argv[1]]()
    time.sleep(300)


arms = {"ended": "subject", "endless": "control", "last": "null", "next": "reported", "never": "reported"}
vsd.CLAIM = Claim("vsd", arms, measure, (), "", "", seeds=(1,))
if __name__ == "__main__":
    sys.exit(main(["claims", "run", "vsd", "--jobs", "2", "--out", str(HERE / "vsd.json")]))
"""


@pytest.mark.parametrize(("end", "code", "says"), [
    ("fails", 2, "stillroom: this arm fails"),
    ("is killed", 2, "one of its 2 processes was killed"),
    ("ctrl-c", 130, "vsd: stopped; the same command goes on"),
    ("terminate", 130, "vsd: stopped; the same command goes on"),
])
def test_the_end_of_one_is_the_end_of_all(end, code, says, tmp_path):
    (tmp_path / "claim.py").write_text(SCRIPT)
    (tmp_path / "temporary").mkdir()
    done = subprocess.run([sys.executable, tmp_path / "claim.py", end], capture_output=True, text=True, timeout=200,
                          start_new_session=True, env={**os.environ, "TMPDIR": str(tmp_path / "temporary")})
    assert (done.returncode, says in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
    kept = [json.loads(line) for line in (tmp_path / "vsd.part.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in kept[1:]] == ["ended"]
    begun = dict(line.split() for line in (tmp_path / "begun").read_text().splitlines())
    assert "never" not in begun
    assert not any(Path(f"/proc/{process}").exists() for process in begun.values())
    assert not list((tmp_path / "temporary").iterdir())
