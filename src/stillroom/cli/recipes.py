"""`stillroom recipes [--json]`: what is implemented, and what its claim said. Reads files; imports no torch."""

import json
from pathlib import Path

from stillroom.recipes import listing
from stillroom.settings import Refusal


def verdicts() -> dict[str, str]:
    """The verdict of each stored claim, by the recipe's name."""
    import stillroom

    folder = Path(stillroom.__file__).parent / "claims" / "results"
    return {path.stem: json.loads(path.read_text())["verdict"] for path in sorted(folder.glob("*.json"))}


def run(word: str, arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: stillroom recipes [--json]")
        return 0
    if set(arguments) - {"--json"}:
        raise Refusal("usage: stillroom recipes [--json]")
    said = verdicts()
    rows = [{**e._asdict(), "claim": said.get(e.name, "none")} for e in listing()]
    if "--json" in arguments:
        print(json.dumps(rows, indent=1))
        return 0
    wide = max(len(r["name"]) for r in rows)
    for r in rows:
        print(f"{r['name']:<{wide}}  {r['verb']:<7}  {r['title']}")
        print(f"{'':<{wide}}           {r['paper']}" + (f"  claim: {r['claim']}" if r["claim"] != "none" else ""))
    return 0
