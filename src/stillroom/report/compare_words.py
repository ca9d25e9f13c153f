"""Which codecs stand on the front of reconstruction against modelling, in figures and in words, and what of it a single
prior per codec cannot say."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stillroom.measure.bootstrap import difference_interval
from stillroom.report.words import listed, number

Codec = Mapping[str, Any]
CLEAR = 2.0             # deviations of a difference of Fréchet distances, below which it is not read
FEW = 3                 # codecs or pairs of them of which each is told in figures; of more, names


def last(codec: Codec) -> Mapping[str, Any]:
    """The prior after all its steps, without guidance."""
    return [row for row in codec["generation"] if row["guidance"] == 1][-1]


def psnr(codec: Codec) -> float | None:
    return codec["reconstruction"]["means"]["psnr"]["mean"]


def front(codecs: Sequence[Codec], floor: Mapping[str, float]) -> dict[str, Any]:
    """A codec is behind another that is clearly better in one of PSNR and Fréchet distance and not clearly worse in the
    other. Clear: the interval of the PSNR's difference over the same pictures excludes 0; the distances differ by more
    than CLEAR deviations of their difference, from a bootstrap of the samples."""
    behind = {a["name"]: [b["name"] for b in codecs if b is not a and beats(b, a)] for a in codecs}
    kept = [c for c in codecs if not behind[c["name"]]]
    return {"on": [c["name"] for c in kept], "behind": {n: by for n, by in behind.items() if by},
            "sentences": sentences(codecs, kept, behind, floor)}


def beats(b: Codec, a: Codec) -> bool:
    signs = clear_psnr(b, a), -clear_distance(b, a)
    return max(signs) > 0 and min(signs) >= 0


def clear_psnr(b: Codec, a: Codec) -> int:
    """Sign of b's PSNR less a's, 0 where it cannot be read."""
    pairs = [(x, y) for x, y in zip(b["reconstruction"]["values"]["psnr"], a["reconstruction"]["values"]["psnr"],
                                    strict=True) if None not in (x, y)]
    if not pairs:               # both come back without any error, on every picture that one of them does
        return 0
    mine, theirs = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    apart = difference_interval(mine, theirs)
    return 1 if apart.low > 0 else -1 if apart.high < 0 else 0


def clear_distance(b: Codec, a: Codec) -> int:
    """Sign of b's Fréchet distance less a's, 0 where it cannot be read."""
    gap = last(b)["frechet"] - last(a)["frechet"]
    return 0 if abs(gap) <= CLEAR * noise(a, b) else 1 if gap > 0 else -1


def noise(a: Codec, b: Codec) -> float:
    return math.hypot(last(a)["deviation"], last(b)["deviation"])


def sentences(codecs: Sequence[Codec], kept: Sequence[Codec], behind: Mapping[str, list[str]],
              floor: Mapping[str, float]) -> list[str]:
    told = [kept_in_words(kept, len(codecs))]
    at = {c["name"]: c for c in codecs}
    for name, by in behind.items():
        if by:
            told.append(f"{name} is behind {listed(by)}" + (
                f": {'; '.join(lack(at[name], at[b]) for b in by)}." if len(by) <= FEW else "."))
    if unread := chances([(a, b) for i, a in enumerate(codecs) for b in codecs[i + 1 :] if clear_distance(a, b) == 0]):
        told.append("In Fréchet distance these lie within what drawing other samples changes, and their order in "
                    f"modelling cannot be read: {unread}.")
    told += speed(codecs)
    told.append(f"Held-out pictures themselves come to a Fréchet distance of {number(floor['frechet'], 3)}.")
    told.append("One prior was trained for each codec: deviations are those of drawing other samples from it, and say "
                "nothing of another training. Before a small difference counts, compare again with another --seed.")
    return told


def chances(pairs: Sequence[tuple[Codec, Codec]]) -> str:
    if len(pairs) <= FEW:
        return ", ".join(f"{a['name']} and {b['name']} ({number(abs(last(a)['frechet'] - last(b)['frechet']), 3)} "
                         f"apart, where {number(CLEAR * noise(a, b), 3)} may be chance)" for a, b in pairs)
    others: dict[str, list[str]] = {}
    for a, b in pairs:
        others.setdefault(a["name"], []).append(b["name"])
    return "; ".join(f"{name} beside {listed(beside)}" for name, beside in others.items())


def kept_in_words(kept: Sequence[Codec], count: int) -> str:
    each = [f"{c['name']} ({place(c)})" for c in sorted(kept, key=lambda c: last(c)["frechet"])]
    if count == 1:
        return f"One codec: {each[0]}. Name others to stand beside it."
    if len(each) == 1:
        return f"{each[0]} leaves all others behind: none reconstructs or models clearly better."
    return f"On the front, from easy to model to faithful: {', '.join(each)}. None of these beats another in both."


def place(c: Codec) -> str:
    value = psnr(c)
    return f"{'no error' if value is None else f'{value:.2f} dB'}, Fréchet {number(last(c)['frechet'], 3)}"


def lack(a: Codec, b: Codec) -> str:
    """What b has that a has not, and whether it can be read."""
    mine, theirs = psnr(a), psnr(b)
    told = [] if mine is None or theirs is None else [(f"{theirs - mine:+.2f} dB of PSNR", clear_psnr(b, a))]
    told.append((f"{signed(last(b)['frechet'] - last(a)['frechet'])} of Fréchet distance", clear_distance(b, a)))
    return f"{b['name']} has " + " and ".join(t + ("" if clear else " (not to be read)") for t, clear in told)


def signed(x: float) -> str:
    return ("+" if x > 0 else "") + number(x, 3)


def speed(codecs: Sequence[Codec]) -> list[str]:
    """Where one prior is, at an earlier look, clearly where others end."""
    told = []
    for b in codecs:
        reached: dict[int, list[str]] = {}
        for a in codecs:
            if a is b or clear_distance(b, a) >= 0:
                continue
            early = (r["step"] for r in b["generation"] if r["guidance"] == 1 and r["step"] < last(a)["step"]
                     and r["frechet"] <= last(a)["frechet"])
            if step := next(early, None):
                reached.setdefault(step, []).append(a["name"])
        if reached:
            each = (f"after {step:,} steps is where {listed(names)} {'is' if len(names) == 1 else 'are'}"
                    for step, names in sorted(reached.items()))
            told.append(f"{b['name']} {', and '.join(each)} after {last(b)['step']:,}.")
    return told
