"""What an inspection comes to in plain words: will drifting work, at which temperature, how straight is the flow."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from stillroom.match.drift import temperature_for
from stillroom.measure.geometry import Seen, temperature_at
from stillroom.measure.groups import FAILS, WORKS, Grouping, Reading, kappa, reading
from stillroom.report.words import number

Found = Mapping[str, Any]
Tone = Literal["good", "open", "bad", "plain"]
STRAIGHT, BENT = 0.05, 0.3
STATUS: Mapping[Reading, tuple[str, Tone]] = {
    "works": ("drifting may well work", "good"), "between": ("whether drifting works is open", "open"),
    "fails": ("drifting may well miss the groups", "bad"), "abstains": ("kappa abstains", "open"),
}
SEES: Mapping[Reading, str] = {"works": "should see them", "between": "may or may not see them",
                               "fails": "may well miss them"}
CLAIM, VERDICT = "drifting-scatter", "mixed"
FOUND: Mapping[Reading, str] = {
    "works": f"8 of the 10 settings at {WORKS:g} and more came within 3 times the distance between two real sets",
    "between": f"none of its settings lay between {FAILS:g} and {WORKS:g}",
    "fails": f"2 of the 6 settings below {FAILS:g} came within 3 times the distance between two real sets",
}
"""What the claim that is stored with the package found; a test holds these words to it."""


class Verdict(NamedTuple):
    status: str
    tone: Tone
    sentences: list[str]


def verdict(place: Found, settings: Found) -> Verdict:
    """Of whole samples, on the side of the normaliser where a drift works."""
    p = place["portraits"][0]
    size = math.prod(place["shape"])
    side = f"{p['stage']} normalisation" if place["normalised"] else "not normalised"
    where = f"over whole samples ({place['what']}, {size} numbers each, {side})"
    labels, r = p["groupings"]["labels"], min(settings["temperatures"])
    labelled = "why" not in labels
    judged = judge(p["groupings"]["clusters within class" if labelled else "clusters"], where, r)
    told = [of_classes(as_grouping(labels), where, r)] if labelled else []
    left_out = abstentions(p)
    return Verdict(judged.status, judged.tone, [
        *told, *judged.sentences, *of_temperature(p, settings), of_trajectories(place["trajectories"]),
        *([f"Not said, because {'; '.join(left_out)}."] if left_out else []),
    ])


def of_classes(grouping: Grouping, where: str, r: float) -> str:
    return (f"With the classes as the grouping, {where}, kappa = {number(kappa(grouping.eta, r), 3)} at R = {r:g}: a "
            f"drift without labels {SEES[reading(grouping, r)]}. A drift in one class at a time is told them; for it "
            "counts what lies within a class.")


def judge(record: Found, where: str, r: float) -> Verdict:
    """By the clusters that nobody tells the drift of."""
    if "why" in record:
        return Verdict(*STATUS["abstains"], [f"kappa abstains, {where}: {record['why']}."])
    grouping = as_grouping(record)
    found, index = reading(grouping, r), number(kappa(grouping.eta, r), 3)
    status, tone = STATUS[found]
    how = (f"{grouping.name} (k-means, k = {ks(grouping)} by the gap statistic, eta {number(grouping.eta, 3)}; "
           f"draws without groups, of the same spectrum, {number(grouping.null or 0.0, 3)})")
    if found == "abstains":
        return Verdict(f"{status}: no groups were found for a drift to miss", tone, [
            f"kappa abstains on {how}, {where}: they explain hardly more than k-means finds where there is none. A "
            "single mode was matched at every participation ratio in the pilot; k-means may miss groups too."])
    return Verdict(f"{status}: kappa = {index}, grouping: {grouping.name}", tone, [
        f"With {how} as the grouping, {where}, kappa = {index} at R = {r:g}. kappa is ours, and the claim "
        f"that it orders what drifting finds ({CLAIM}) is {VERDICT}: {FOUND[found]}."])


def of_temperature(p: Found, settings: Found) -> list[str]:
    scope = "global" if "why" in p["seen"]["within class"] else "within class"
    at, curve, wanted = p["seen"][scope], p["curves"][scope], settings["wanted"]
    if "why" in at:
        return [f"No temperature can be said: {at['why']}."]
    n, pr, who = at["particles"], p["spectra"][scope]["participation"], "one class" if scope != "global" else "all"
    measured, predicted = temperature_at(Seen(**curve), wanted), temperature_for(pr, n, wanted * n)
    counts = ", ".join(f"{number(n * share, 2)} at {r:g}" for r, share in
                       zip(at["temperatures"], at["measured"], strict=True))
    take = f"Take R = {number(measured or predicted, 2)}, in mean distances: of {n} samples of {who}, "
    take += (f"{wanted:.0%} count there (predicted from the participation ratio: R = {number(predicted, 2)})"
             if measured else f"{wanted:.0%} should count there, by the participation ratio; none measured so")
    told = [f"{take}. Measured: {counts}."]
    (finest, share), *_ = sorted(zip(at["temperatures"], at["measured"], strict=True))
    if n * share < 2:
        told.append(f"At R = {finest:g} alone each sample would follow its nearest neighbour: use it beside coarser "
                    "ones only.")
    return told


def of_trajectories(t: Found) -> str:
    if "why" in t:
        return f"Trajectories were not followed: {t['why']}."
    bend = t["straightness"]
    told = "nearly straight" if bend < STRAIGHT else "bent" if bend < BENT else "strongly bent"
    return (f"The flow's trajectories are {told}: straightness {number(bend, 3)}, 0 being straight (the words change "
            f"at {STRAIGHT} and {BENT}), path {number(t['path_ratio'], 4)} times the chord, turning "
            f"{number(t['turning'], 3)}. One step misses what {t['steps']} make by {number(t['one_step_gap'], 3)} of "
            "its variance; the mean of the data would miss it by 1.")


def as_grouping(record: Found) -> Grouping:
    return Grouping(**{**record, "count": tuple(record["count"])})


def ks(grouping: Grouping) -> str:
    low, high = grouping.count
    return str(low) if low == high else f"{low} to {high}"


def abstentions(record: Any) -> list[str]:
    """Each reason once."""
    if not isinstance(record, Mapping):
        return []
    if set(record) == {"why"}:
        return [record["why"]]
    return list(dict.fromkeys(why for part in record.values() for why in abstentions(part)))
