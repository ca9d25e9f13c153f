"""`stillroom recipes [--json]`: what is implemented, and what its claims said. Reads files; imports no torch."""

import json
from collections.abc import Mapping

from stillroom import claims
from stillroom.recipes import listing
from stillroom.settings import Refusal


def verdicts() -> dict[str, dict[str, str]]:
    """{recipe: {claim: verdict}} of the stored claims, a recipe's own before others about it."""
    found: dict[str, dict[str, str]] = {}
    for entry in sorted(claims.listing(), key=lambda e: (e.name != e.recipe, e.name)):
        if result := claims.stored(entry.name):
            found.setdefault(entry.recipe, {})[entry.name] = result["verdict"]
    return found


def in_words(recipe: str, said: Mapping[str, str]) -> str:
    """A recipe's own claim needs no name."""
    return ", ".join(verdict if claim == recipe else f"{claim} {verdict}" for claim, verdict in said.items())


def run(word: str, arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: stillroom recipes [--json]")
        return 0
    if set(arguments) - {"--json"}:
        raise Refusal("usage: stillroom recipes [--json]")
    said = verdicts()
    rows = [{**e._asdict(), "claims": said.get(e.name, {})} for e in listing()]
    if "--json" in arguments:
        print(json.dumps(rows, indent=1))
        return 0
    wide = max(len(r["name"]) for r in rows)
    for r in rows:
        print(f"{r['name']:<{wide}}  {r['verb']:<7}  {r['title']}")
        told = in_words(r["name"], r["claims"])
        print(f"{'':<{wide}}           {r['paper']}" + (f"  claim: {told}" if told else ""))
    return 0
