"""`stillroom claims list | run | docs | picture`. Listing and docs read files; only run and picture import torch."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from stillroom.claims import check_name, listing, stored
from stillroom.cli.flags import take, take_value
from stillroom.settings import Refusal, nearest

USAGE = """usage: stillroom claims COMMAND

  list [--names | --json]                 the claims, and the verdicts that came with this stillroom
  run NAME... [--quick] [--seeds 101,102,103] [--out FILE.json | FOLDER] [--jobs N] [--data DATA]
                                          carry claims out anew, in N processes (default: one per core); values go to
                                          claims/NAME.json; cut short, the same command goes on with the arms and seeds
                                          that are left, while the code is the same; --data: a folder with the splits
                                          train and val, for claims that take one; exit code 1 if a claim is invalid,
                                          else 0
  docs [--out docs/claims.md]             the page of all stored results
  picture NAME [--seed 101] --out FILE.png"""


def run(word: str, arguments: list[str]) -> int:
    if not arguments or set(arguments) & {"-h", "--help"}:
        print(USAGE)
        return 0
    commands = {"list": list_claims, "run": run_claims, "docs": write_docs, "picture": write_picture}
    if arguments[0] not in commands:
        raise Refusal(f"stillroom claims has no {arguments[0]!r}{nearest(arguments[0], commands)}")
    return commands[arguments[0]](arguments[1:])


def no_flags_left(arguments: Sequence[str], what: str, known: Sequence[str]) -> None:
    for a in arguments:
        if a.startswith("-"):
            raise Refusal(f"stillroom claims {what}: {a} is not an option{nearest(a, known)}")


def list_claims(arguments: list[str]) -> int:
    names, as_json = take(arguments, "--names"), take(arguments, "--json")
    if arguments:
        raise Refusal("usage: stillroom claims list [--names | --json]")
    rows = [{"name": e.name, "verdict": (stored(e.name) or {}).get("verdict", "not run yet"), "title": e.title}
            for e in listing()]
    if as_json:
        print(json.dumps(rows, indent=1))
        return 0
    wide = max(len(r["name"]) for r in rows)
    for r in rows:
        print(r["name"] if names else f"{r['name']:<{wide}}  {r['verdict']:<13}  {r['title']}")
    return 0


def run_claims(arguments: list[str]) -> int:
    quick, given, out = take(arguments, "--quick"), take_value(arguments, "--seeds"), take_value(arguments, "--out")
    jobs, data = jobs_in(take_value(arguments, "--jobs")), take_value(arguments, "--data") or ""
    no_flags_left(arguments, "run", ("--quick", "--seeds", "--out", "--jobs", "--data"))
    if not arguments:
        raise Refusal(f"stillroom claims run: name one or more of {', '.join(e.name for e in listing())}")
    arguments = [name.replace("_", "-") for name in arguments]          # as the files are called
    for name in arguments:
        check_name(name)
    seeds = None if given is None else seeds_in(given)
    paths = {name: place(name, out, len(arguments)) for name in arguments}
    from stillroom.claims import run as running
    from stillroom.claims.kept import part_of
    from stillroom.settings.files import held

    claims = {path: running.claim_on(name, data) for name, path in paths.items()}
    for path in claims:
        running.ready(path)
    invalid = False
    with ExitStack() as stack:
        stack.enter_context(running.terminated_as_interrupted())
        for path in claims:
            part = part_of(path, quick, data)
            stack.enter_context(held(part.with_suffix(".lock"), f"{part}: another command is at work on it; wait for "
                                                                "it, or choose another --out"))
        for path, claim in claims.items():
            result = running.run(claim, seeds or claim.seeds, quick, jobs, lambda text: print(text, file=sys.stderr),
                                 data, path)
            print(summary(json.loads(path.read_text(encoding="utf-8"))) + f"\nvalues:  {path}")
            invalid |= result["verdict"] == "invalid"
    return int(invalid)


def seeds_in(text: str) -> list[int]:
    words = [w.strip() for w in text.split(",")]
    if not all(w.isascii() and w.isdigit() for w in words) or len(set(map(int, words))) < len(words):
        raise Refusal(f"--seeds {text!r}: expected different whole numbers, separated by commas: --seeds 101,102,103")
    return [int(w) for w in words]


def jobs_in(text: str | None) -> int:
    if text is None:
        return os.cpu_count() or 1
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise Refusal(f"--jobs {text!r}: expected a whole number above 0")
    return int(text)


def place(name: str, out: str | None, count: int) -> Path:
    """A file for one claim; a folder for any number."""
    if out is None:
        return Path("claims") / f"{name}.json"
    path = Path(out)
    if path.suffix != ".json" or path.is_dir():
        return path / f"{name}.json"
    if count > 1:
        raise Refusal(f"--out {out}: {count} claims do not go into one file; give a folder")
    return path


def summary(result: dict[str, Any]) -> str:
    """The result on a terminal: arms by metrics, then the checks."""
    from stillroom.claims.docs import bounds, mean_of, metrics_of

    arms = list(result["arms"])
    rows = [["", *arms]] + [[metric, *(mean_of(result, arm, metric) for arm in arms)] for metric in metrics_of(result)]
    checks = [[r["arm"], r["check"], f"margin in {bounds(r['interval'])}", r["verdict"]]
              for r in [*result["checks"], *result["null"]]]
    why = f" ({result['reason']})" if result["reason"] else ""
    quick = ", quick" if result["quick"] else ""
    return (f"{result['claim']}, seeds {', '.join(map(str, result['seeds']))}{quick}\n\n{aligned(rows)}\n\n"
            f"{aligned(checks)}\n\nverdict: {result['verdict']}{why}")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{x:<{w}}" for x, w in zip(row, wide, strict=True)).rstrip() for row in rows)


def write_docs(arguments: list[str]) -> int:
    out = Path(take_value(arguments, "--out") or "docs/claims.md")
    if arguments:
        raise Refusal("usage: stillroom claims docs [--out docs/claims.md]")
    from stillroom.claims.docs import page
    from stillroom.settings.files import write_atomically

    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page())
    print(out)
    return 0


def write_picture(arguments: list[str]) -> int:
    seed, out = take_value(arguments, "--seed") or "101", take_value(arguments, "--out")
    no_flags_left(arguments, "picture", ("--seed", "--out"))
    if len(arguments) != 1 or out is None or len(seeds_in(seed)) != 1:
        raise Refusal("usage: stillroom claims picture NAME [--seed 101] --out FILE.png")
    check_name(arguments[0])
    from stillroom.claims import find
    from stillroom.claims.picture import side_by_side
    from stillroom.claims.run import one_thread, ready
    from stillroom.settings.files import write_atomically

    path, pictures = Path(out), find(arguments[0]).pictures
    if pictures is None:
        raise Refusal(f"claim {arguments[0]} draws no picture")
    ready(path)
    with one_thread():
        panels = pictures(int(seed))
    write_atomically(path, side_by_side(panels))
    print(path)
    return 0
