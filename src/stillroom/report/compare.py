"""The page and the terminal's tables of a comparison of codecs, from the mapping that compare.json holds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stillroom.report import compare_plots as plots
from stillroom.report.page import Figure, Header, Images, Panels, Section, Settings, Table, Text, page
from stillroom.report.terminal import printed
from stillroom.report.words import duration, number
from stillroom.settings.files import write_atomically

Found = Mapping[str, Any]
Codec = Mapping[str, Any]
HIGHER, LOWER = "↑", "↓"
NEEDS = {"fid": "needs --inception FILE, pt_inception-2015-12-05-6726825d.pth",
         "reference": "needs --reference gaussian, gmm:16, noised:0.3, samples:FILE or a flow"}


def write_comparison(out: Path, at: Path, found: Found) -> Path:
    """The page, `at` its place; `out` is the folder of the pictures."""
    write_atomically(at, page(title(found), sections(out, found), header(found)))
    return at


def title(found: Found) -> str:
    return ", ".join(c["name"] for c in found["codecs"])


def header(found: Found) -> Header:
    about = found["about"]
    status, *_ = found["front"]["sentences"]
    return Header("stillroom compare", status, "plain", f"Judged on {about['held_out']}.", [
        ("Codecs", str(len(found["codecs"]))), ("Pixels", f"{about['size']} × {about['size']}"),
        ("Held-out pictures", f"{about['n']:,}"), ("Classes", str(about["classes"] or "none")),
        ("Steps of each prior", f"{found['settings']['steps']:,}"), ("Feature space", about["space"]),
        ("Seed", str(found["settings"]["seed"]))])


def sections(out: Path, found: Found) -> list[Section]:
    return [
        Text("What can be said", sentences(found)),
        Figure("Reconstruction against modelling", plots.tradeoff(found),
               "Best is bottom right. Bars: the 95 % interval of the mean PSNR over pictures; two deviations of "
               "drawing other samples, from a bootstrap."),
        Figure("Convergence of the prior", plots.curves(found),
               "The same network, steps and seed on every codec's latents, looked at through its averaged weights. "
               "Dashed: with guidance."),
        *(Table(t.title, t.heads, t.rows, t.note) for t in tables(found)),
        pictures(out, found),
        Panels("Loss of the prior over time", {"": plots.losses(found)},
               "Held-out error of the velocity over that of its mean, 0 data to 1 noise. Shaded: where the irreducible "
               "part lies, between the best answer for the samples themselves and the best linear one."
               + told_classes(found["about"])),
        Panels("Spectra", {"": plots.spectra(found)},
               "Each eigenvalue's share of the variance over its rank; mean power of the cosine transform over "
               "frequency, 1 the highest along a side. All in decades."),
        Settings("How it was measured", how(found)),
    ]


def sentences(found: Found) -> list[str]:
    return [*found["front"]["sentences"], *found["about"]["notes"]]


def pictures(out: Path, found: Found) -> Images:
    shots: list[tuple[Path | bytes, str]] = [(out / "originals.png", "held-out pictures")]
    for c in found["codecs"]:
        for name, told in (("reconstructions", "there and back"), ("samples", "samples of the prior"),
                           ("guided", "samples with guidance")):
            if name != "guided" or len({row["guidance"] for row in c["generation"]}) > 1:
                shots.append((out / c["name"] / f"{name}.png", f"{c['name']}: {told}"))
    return Images("Pictures", shots)


def how(found: Found) -> dict[str, Any]:
    about = {k: v for k, v in found["about"].items() if k in ("learned", "held_out", "crop", "space", "device",
                                                              "threads")}
    asked = {k: v for k, v in found["settings"].items() if v not in (None, "", []) and k not in ("out", "data")}
    return {"data": about, "settings": asked,
            **{c["name"]: {"codec": c["spec"], "hash": c["hash"][:16], "prior": c["prior"]["run"],
                           **{f"{half} parameters": n for half, n in c["what"]["parameters"].items()}}
               for c in found["codecs"]}}


# ---- tables ----

class Rows(NamedTuple):
    title: str
    heads: list[str]
    rows: list[list[Any]]
    note: str = ""


Cell = Callable[[Codec], Any]


def tables(found: Found) -> list[Rows]:
    about, codecs = found["about"], found["codecs"]
    heads = ["", *(c["name"] for c in codecs)]

    def rows(*wanted: tuple[str, Cell]) -> list[list[Any]]:
        return [[name, *(cell(c) for c in codecs)] for name, cell in wanted]

    few = "" if not about["few"] else (f" {about['n']} pictures are few for {about['features']} features: the "
                                       "distances are biased upwards, the floor's too.")
    blind = "" if about["space"] != "random features" else (
        " Random features see colour and texture and little of what is shown, so that precision soon is that of real "
        "pictures; --features or --inception see more.")
    floor = about["floor"]
    return [
        Rows("Codecs", heads, rows(
            ("channels", lambda c: c["what"]["channels"]),
            ("pixels of a latent, a side", lambda c: c["what"]["factor"]),
            ("numbers per picture", lambda c: c["what"]["numbers"]),
            ("tokens of its prior", lambda c: c["what"]["tokens"]),
            ("parameters of its prior", lambda c: c["prior"]["parameters"]),
            ("training of its prior", lambda c: duration(c["prior"]["seconds"])))),
        Rows(f"Reconstruction of {about['n']:,} held-out pictures", heads, reconstruction_rows(found),
             "± half the 95 % interval of the mean over pictures. random_lpips: LPIPS's distance in an untrained "
             "network's features." + few),
        Rows("Samples of the prior", heads, generation_rows(found),
             f"Held against {about['learned']}, in {about['space']}. As many held-out pictures come to a Fréchet "
             f"distance of {number(floor['frechet'])}, precision {floor['precision']:.3f}, recall "
             f"{floor['recall']:.3f}. ± a bootstrap's deviation over samples; one prior for each codec." + blind + few),
        Rows("Loss of the prior on held-out latents", heads, rows(
            ("mean over time", lambda c: c["prior"]["mean"]),
            *((f"t = {t:.2f}", lambda c, i=i: c["prior"]["v"][i]) for i, t in enumerate(codecs[0]["prior"]["times"])),
            ("VIV at least about", lambda c: viv(c, "in_sample")), ("VIV at most about", lambda c: viv(c, "linear"))),
             "Error of the velocity over that of its mean; 0 data, 1 noise. VIV, as defined here (ours): the part of "
             "it that no network can remove, lying between the best answer for the samples themselves (too low where "
             "samples are few for their dimension) and the best linear one." + told_classes(about)),
        Rows("Labels in the latents", heads, probe_rows(found),
             "Accuracy on held-out pictures. Linear: ridge regression on standardised numbers. kNN: a vote of the "
             "nearest. Pooled: the mean over places."),
        Rows("Shape of the latents", heads, rows(
            ("participation ratio, tokens", spectral("token", "participation")),
            ("effective rank, tokens", spectral("token", "effective_rank")),
            ("participation ratio, latents", spectral("element", "participation")),
            ("slope a of power ~ 1 / f^a", lambda c: None if "why" in c["latents"]["slope"] else
             c["latents"]["slope"]["slope"]),
            *((f"moves with the picture: {word} {LOWER}", lambda c, move=move: c["latents"]["moves"][move])
              for move, word in (("flip", "mirror"), ("rotate", "quarter turn"), ("halve", "half size"))),
            ("channels' means, least to most", lambda c: ends(c["latents"]["channels"]["mean"])),
            ("channels' deviations", lambda c: ends(c["latents"]["channels"]["std"]))),
             shape_note(about)),
        Rows("Distance to a reference", heads, reference_rows(found),
             "Of held-out latents, as their space normalises them, or for a product of dmvae as that of the codec that "
             "it began with does; in brackets the reference's own samples against others of it."),
    ]


def reconstruction_rows(found: Found) -> list[list[Any]]:
    codecs, fid = found["codecs"], found["about"]["space"].startswith("inception")
    names = {"psnr": f"PSNR, dB {HIGHER}", "ssim": f"SSIM {HIGHER}", "lpips_alex": f"LPIPS alex {LOWER}",
             "lpips_vgg": f"LPIPS vgg {LOWER}", "lpips_squeeze": f"LPIPS squeeze {LOWER}", "lpips": "LPIPS",
             "random_lpips": f"random_lpips {LOWER}"}
    rows = list[list[Any]]()
    for name, told in names.items():
        have = [c["reconstruction"]["means"].get(name) for c in codecs]
        if any(have):
            rows.append([told, *map(mean_cell, have)])
        elif (why := codecs[0]["reconstruction"]["absent"].get(name)) is not None:
            rows.append([f"{told}: {why}", *[None] * len(codecs)])
    rows.append([f"{'rFID' if fid else 'Fréchet distance'} {LOWER}", *(c["reconstruction"]["frechet"] for c in codecs)])
    return rows if fid else [*rows, [f"rFID: {NEEDS['fid']}", *[None] * len(codecs)]]


def mean_cell(s: Mapping[str, Any] | None) -> str | None:
    if s is None:
        return None
    return "no error" if s["mean"] is None else f"{number(s['mean'])} ± {number((s['high'] - s['low']) / 2, 2)}"


def generation_rows(found: Found) -> list[list[Any]]:
    """A row for each look and guidance; all codecs have the same."""
    codecs = found["codecs"]
    looks = [(row["guidance"], row["step"]) for row in codecs[0]["generation"]]
    fid = "FID" if found["about"]["space"].startswith("inception") else "Fréchet"
    rows = list[list[Any]]()
    for guidance, step in sorted(looks, key=lambda look: (look[0] != 1, look)):
        at = [next(r for r in c["generation"] if (r["guidance"], r["step"]) == (guidance, step)) for c in codecs]
        when = f"{step:,} steps" + ("" if guidance == 1 else f", guidance {guidance:g}")
        rows.append([f"{fid} {LOWER}, {when}", *(f"{number(r['frechet'])} ± {number(r['deviation'], 2)}" for r in at)])
        if step == found["settings"]["steps"]:
            rows += [[f"{name} {HIGHER}, {when}", *(round(r[name], 3) for r in at)] for name in ("precision", "recall")]
    if len({guidance for guidance, _ in looks}) == 1:
        why = "the data have no labels" if found["about"]["classes"] is None else "--guidance was 1"
        rows.append([f"with guidance: {why}", *[None] * len(codecs)])
    return rows


def told_classes(about: Found) -> str:
    """The loss is then of v given x_t and the class, and VIV of v given x_t."""
    return "" if about["classes"] is None else (" That is for a network that is not told the class; these priors are, "
                                                "and may come below it.")


def viv(c: Codec, side: str) -> float | None:
    bracket = c["latents"]["viv"]
    return None if "why" in bracket else sum(bracket[side]) / len(bracket[side])


def probe_rows(found: Found) -> list[list[Any]]:
    codecs = found["codecs"]
    if why := codecs[0]["latents"]["probes"].get("why"):
        return [[f"probes: {why}", *[None] * len(codecs)]]
    rows = list[list[Any]]()
    for kind, told in (("linear", "linear"), ("knn", "kNN")):
        for over in ("pooled", "flattened"):
            cells = [c["latents"]["probes"][over][kind] for c in codecs]
            rows.append([f"{told}, {over} {HIGHER}", *(None if "why" in s else f"{s['accuracy']:.1%}" for s in cells)])
    chances = [c["latents"]["probes"]["pooled"]["linear"].get("chance") for c in codecs]
    return [*rows, ["always the commonest class", *(None if s is None else f"{s:.1%}" for s in chances)]]


def spectral(over: str, name: str) -> Cell:
    def cell(c: Codec) -> Any:
        s = c["latents"]["spectra"].get(over, {"why": "one channel"})
        return None if "why" in s else s[name]

    return cell


def ends(pair: Sequence[float]) -> str:
    low, high = (round(x, 2) + 0.0 for x in pair)       # no minus before a zero
    return f"{low:.2f} to {high:.2f}"


def shape_note(about: Found) -> str:
    pixels = "" if "why" in about["slope"] else f" The pictures' own slope is {number(about['slope']['slope'], 3)}."
    return ("Moves with the picture: error of encoding the moved picture against moving the latents, 0 where they are "
            "one, 1 where it might be another picture's; – where sizes do not allow it." + pixels)


def reference_rows(found: Found) -> list[list[Any]]:
    codecs = found["codecs"]
    if not any(c["reference"] for c in codecs):
        return [[f"reference: {NEEDS['reference']}", *[None] * len(codecs)]]
    rows: list[list[Any]] = [["reference", *(c["reference"] and c["reference"]["reference"] for c in codecs)]]
    for name, told in (("sliced_w2", "sliced Wasserstein"), ("energy", "energy distance")):
        rows.append([f"{told} {LOWER}", *(beside(c["reference"], name) for c in codecs)])
    return rows


def beside(r: Mapping[str, Any] | None, name: str) -> str | None:
    return None if r is None else f"{number(r['latents'][name], 3)} ({number(r['floor'][name], 2)})"


# ---- in the terminal ----

def in_terminal(found: Found) -> None:
    printed([table[:3] for table in tables(found)], [("", sentences(found))])
