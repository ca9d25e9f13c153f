"""The page of a sweep, from the mapping that sweep.json holds: what a student gains by remapping, and of what the gain
is made."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.report import sweep_plots as plots
from stillroom.report.page import Figure, Files, Header, Images, Panels, Section, Settings, Table, Text, page
from stillroom.report.words import listed, number
from stillroom.settings.files import write_atomically
from stillroom.train.pictures import grid

if TYPE_CHECKING:
    from torch import Tensor

    from stillroom.codecs.study import Comparison

Found = Mapping[str, Any]
Row = Mapping[str, Any]
HEADS = {"psnr": "PSNR dB", "mse": "MSE", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "gmsd": "GMSD", "fid": "FID",
         "high_frequency": "high freq.", "nmse": "nMSE", "cosine": "cosine", "random_lpips": "random_lpips",
         "rf_fid": "rf_fid", "lpips_alex": "LPIPS alex", "lpips_vgg": "LPIPS vgg", "lpips_squeeze": "LPIPS squeeze"}
AMPLIFIED = 4       # differences, to be seen


def write_sweep(out: Path, found: Found, compared: Sequence["Comparison"]) -> Path:
    """out/index.html, and its figures and pictures beside it as files of their own."""
    figures = figures_of(found)
    for name, figure in figures.items():
        (out / "plots").mkdir(exist_ok=True)
        figure.savefig(out / "plots" / f"{name}.png", dpi=140, facecolor="white")
    html = page(f"{Path(found['run']).name or found['run']} over resolutions",
                sections(found, figures, [shots(out, c, found["distances"]) for c in compared]), header(found))
    write_atomically(out / "index.html", html)
    return out / "index.html"


def sections(found: Found, figures: Mapping[str, Any], images: Sequence[Images]) -> list[Section]:
    sizes = [entry["size"] for entry in measured(found)]
    main = [Figure(f"PSNR over scale, {size} px", figures[f"psnr-{size}"],
                   "What resizing alone leaves is the ceiling; klt-budget spends the same latents at native size.")
            for size in sizes]
    names = list(dict.fromkeys(row["contender"] for row in found["rows"]))
    inheriting = [name for name in names if name in plots.INHERITING]
    return [
        Text("What the gain is made of", in_words(found)),
        gain_table(found), *main,
        Panels("Latents against the teacher's", {
            "": [plots.key(inheriting)],
            "Squared error, in the teacher's variance at that scale": [figures[f"nmse-{s}"] for s in sizes],
            "Cosine": [figures[f"cosine-{s}"] for s in sizes]}),
        *(Figure(f"{told} of the latents over resolution", figures[f"channel-{what}"],
                 "One line per channel, at scale 1: the teacher's in ink, the student's dashed over it.")
          for what, told in (("mean", "Mean"), ("std", "Deviation"))),
        Figure("Map of the latents", figures["map"], map_words(found)),
        Panels("Blur", {"": [plots.key(names), *(figures[f"high_frequency-{s}"] for s in sizes)]},
               "High-frequency energy over the picture's own: below 1 is blur, above 1 noise."),
        Figure(f"Encode time against PSNR, {sizes[-1]} px", figures[f"cost-{sizes[-1]}"], cost_words(found)),
        *theorems(found, figures), *images,
        *(full_table(found, size) for size in sizes),
        Settings("How it was measured", how(found)),
        Files("Files", [("sweep.csv", "sweep.csv", "one line per size, scale and contender", ""),
                        ("sweep.json", "sweep.json", "everything, every picture's values among it", ""),
                        ("plots/", "plots/", "the figures as PNG", ""),
                        *([("pictures/", "pictures/", "the compared pictures as PNG", "")] if images else [])]),
    ]


def measured(found: Found) -> list[Mapping[str, Any]]:
    return [entry for entry in found["sizes"] if entry["names"]]


# ---- words ----

def header(found: Found) -> Header:
    choice, entry = found["choice"], measured(found)[-1]
    gained = entry["gains"].get("student")
    status = choice_in_words(choice)
    if gained:
        over = number(ratio_at(found, entry["size"], choice["scale"]), 3)
        status = f"s = {choice['scale']:g}: {signed_db(gained)} at {entry['size']} px, for {over} times the latents"
    counts = found["encoder_parameters"]
    return Header(
        "stillroom sweep", status, "plain", choice_in_words(choice) if gained else "",
        [("Student", f"{counts['student']:,} numbers in its encoder"), ("Teacher", f"{counts['teacher']:,}"),
         ("Judged on", f"{len(found['evaluation'])} pictures"), ("Chosen on", f"{len(found['calibration'])} others"),
         ("Machine", machine(found))],
    )


def choice_in_words(choice: Mapping[str, Any]) -> str:
    if choice["scale"] is None:
        return choice["why"][:1].upper() + choice["why"][1:] + "."
    count = choice["pictures"]
    told = f"Chosen on {count} {'picture' if count == 1 else 'pictures'}: s = {choice['scale']:g}"
    limits = [f"{choice['most_latents']:g} times the latents" if choice["most_latents"] else "",
              f"{choice['most_ms']:g} ms" if choice["most_ms"] else ""]
    told += f", within {' and '.join(filter(None, limits))}" if any(limits) else ""
    if choice["edge"] == "sweep":
        told += ". The optimum lies at the edge of the sweep: a better one may lie beyond"
    elif choice["edge"] == "budget":
        told += f". It is as far as the budget goes; without one, s = {choice['best']:g} is best"
    return told + "."


def in_words(found: Found) -> list[str]:
    """The verdict, size by size, with what stands against it."""
    told, scale = list[str](), found["choice"]["scale"] or 1
    for entry in measured(found) if scale != 1 else ():
        size, gains = entry["size"], entry["gains"]
        ceiling = mean_of(found, size, scale, "ceiling", "psnr")
        text = (f"At {size} px, remapping by {scale:g} changes the student's PSNR by {signed_db(gains['student'])} and "
                f"the teacher's by {signed_db(gains['teacher'])}, with {number(ratio_at(found, size, scale), 3)} times "
                f"as many latents; resizing alone leaves {number(ceiling, 4)} dB. The remapped student stands at "
                f"{signed_db(gains['student over the teacher at 1'])} against the teacher at native size.")
        if "klt" in gains:
            text += f" A linear code, which has no teacher, gains {signed_db(gains['klt'])} from the remapping"
            text += (f", and {signed_db(gains['klt-budget'])} from as many latents at native size, without any."
                     if "klt-budget" in gains else "; as many latents at native size are as many as the picture has.")
        told.append(text)
    told.append("A gain from remapping is, first of all, the gain of a larger budget of latents: it does not show "
                "that anything was inherited. How near latents come to the teacher's is another question: see nMSE.")
    if names := found["seen_before"]:
        told.append(f"{listed(names).capitalize()} learned from {found['data']}: figures on pictures that a codec has "
                    "seen may be better than on new ones; give --data others.")
    skipped = [f"{e['skipped']} at {e['size']} px" for e in found["sizes"] if e["skipped"]]
    told += [f"Pictures smaller than a size were left out of it: {', '.join(skipped)}."] if skipped else []
    empty = [str(e["size"]) for e in found["sizes"] if not e["names"]]
    return told + ([f"No picture fills {', '.join(empty)} px: nothing was measured there."] if empty else [])


def signed_db(spread: Mapping[str, Any]) -> str:
    if spread["mean"] is None:
        return "an unknown number of dB"
    return f"{spread['mean']:+.2f} dB [{spread['low']:+.2f}, {spread['high']:+.2f}]"


def interval(spread: Mapping[str, Any] | None) -> str | None:
    if not spread or spread["mean"] is None:
        return None
    return f"{number(spread['mean'])} [{number(spread['low'], 3)}, {number(spread['high'], 3)}]"


def machine(found: Found) -> str:
    return f"{found['device']}, {found['threads']} {'thread' if found['threads'] == 1 else 'threads'}"


def map_words(found: Found) -> str:
    paths, _ = plots.paths_of(found["rows"])
    told = "Latents averaged over positions and pictures, in the two directions in which these averages differ most."
    if "scratch" not in paths and any(row["contender"] == "scratch" for row in found["rows"]):
        told += " Scratch has another number of channels, and no place here."
    return told


def cost_words(found: Found) -> str:
    return (f"Encoding alone, one picture at a time, median of repeats, {machine(found)}; "
            "points are the scales. 8-bit weights are computed with in float, so they have no time of their own.")


# ---- tables ----

def at(found: Found, size: int, scale: float, contender: str) -> Row | None:
    return next((r for r in found["rows"] if (r["size"], r["scale"], r["contender"]) == (size, scale, contender)), None)


def mean_of(found: Found, size: int, scale: float, contender: str, metric: str) -> float:
    row = at(found, size, scale, contender)
    mean = row["means"][metric]["mean"] if row else None
    return float("inf") if mean is None else mean


def ratio_at(found: Found, size: int, scale: float) -> float:
    row = at(found, size, scale, "student")
    assert row, "the student has a row at every size and scale"
    return row["latents_over_native"]


def gain_table(found: Found) -> Table:
    scale, rows = found["choice"]["scale"] or found["shown_scale"], []
    at_s = [f"{name}{end}" for name in ("teacher", "student", "klt") for end in ("", f" ×{scale:g}")]
    heads = ["px", "pictures", "latents", "ceiling", *at_s, "klt-budget"]
    for entry in measured(found):
        size = entry["size"]
        cells = [("ceiling", scale), *((n, s) for n in ("teacher", "student", "klt") for s in (1.0, scale)),
                 ("klt-budget", scale)]
        psnr = [row["means"]["psnr"]["mean"] if (row := at(found, size, s, n)) else None for n, s in cells]
        rows.append([size, len(entry["names"]), ratio_at(found, size, scale), *psnr])
    return Table("PSNR, dB", heads, rows,
                 f"Means over the pictures to judge by, at native size and remapped (×{scale:g}), which takes so many "
                 "times the native latents. klt-budget: a linear code at native size with as many latents as that.")


def full_table(found: Found, size: int) -> Table:
    """All metrics at scale 1 and at the chosen one; all other scales are in sweep.csv."""
    scales = dict.fromkeys((1.0, found["choice"]["scale"] or found["shown_scale"]))
    rows = [r for r in found["rows"] if r["size"] == size and r["scale"] in scales]
    metrics = list(dict.fromkeys(m for r in rows for m in r["means"]))
    scores = list(dict.fromkeys(m for r in rows for m in r["scores"]))
    cells = [[r["contender"], r["scale"], r["latents"], r["encode_ms"],
              *(r["means"].get(m, {}).get("mean") for m in metrics), *(r["scores"].get(m) for m in scores)]
             for r in rows]
    heads = ["contender", "s", "latents", "encode ms", *(str(HEADS.get(m, m)) for m in metrics + scores)]
    note = "Means over pictures; sweep.csv has every scale, with intervals."
    note += (" random_lpips and rf_fid look through an untrained network: they are neither LPIPS nor FID."
             if uses_random(found) else "")
    return Table(f"All measures, {size} px", heads, cells, note)


def uses_random(found: Found) -> bool:
    return any("random_lpips" in row["means"] or "rf_fid" in row["scores"] for row in found["rows"])


def theorems(found: Found, figures: Mapping[str, Any]) -> list[Section]:
    entries = measured(found)
    first = [[e["size"], t["contender"], t["direction"], interval(t["cosine"]), interval(t["ratio"])]
             for e in entries for t in e["theorem1"]]
    r0, slope = found["theorem2"]["trained_at"], found["theorem2"]["slope"]
    bound = f"No picture fills {r0} px, the size of training: no bound."
    if slope is not None:
        bound = f"Trained at {r0} px: the least slope that bounds the growth is {number(slope)} per pixel."
    elif r0 is None:
        bound = "The student's card does not say at which size it was trained: no bound."
    spots = [[e["size"], *(spot(e["sweet_spots"][n]) for n in ("student", "teacher")), gap(e["sweet_spots"]["gap"])]
             for e in entries if e["sweet_spots"]]
    return [
        Table("Theorem 1: do the encoders move alike?",
              ["px", "contender", "direction", "cosine", "|J v| / the teacher's"], first,
              "Derivatives of the latents along a direction of the pixels: along the resolution, towards another "
              "picture, and along white noise, which lies on no manifold of images. Of a few pictures at each size: "
              "their intervals are narrower than 95 %."),
        Figure("Theorem 2: how far apart away from the training size?", figures["theorem2"], bound),
        Table("Proposition 1: the best scale", ["px", "student", "teacher", "student less teacher"], spots,
              "By PSNR, intervals over pictures. Where the best scale is the last one measured, the true one may lie "
              "beyond."),
    ]


def spot(found: Mapping[str, Any]) -> str:
    edge = ", at the edge of the sweep" if found["at_edge"] else ""
    return f"{found['scale']:g} [{found['low']:g}, {found['high']:g}]{edge}"


def gap(found: Mapping[str, Any]) -> str:
    return f"{found['value']:g} [{found['low']:g}, {found['high']:g}]"


def how(found: Found) -> dict[str, Any]:
    card = {k: v for k, v in found["card"].items() if k != "remap"}
    return {"data": found["data"], "pictures read": found["pictures"], "too small for every size": found["too_small"],
            "unreadable": len(found["unreadable"]), "to choose by": len(found["calibration"]),
            "to judge by": len(found["evaluation"]), "split": "by a hash of the file's name",
            "precision": found["precision"], "tiles above": f"{found['tile']} px" if found["tile"] else "never",
            "threads": found["threads"], "device": found["device"], "credits": found["credits"] or "none asked for",
            "numbers in the encoder": found["encoder_parameters"], "student's card": card}


# ---- figures and pictures ----

def figures_of(found: Found) -> dict[str, Any]:
    rows, made = found["rows"], {}
    scale = found["choice"]["scale"]
    for entry in measured(found):
        size = entry["size"]
        made[f"psnr-{size}"] = plots.over_scale(plots.curves_of(rows, size, "psnr"), f"PSNR in dB, {size} px", scale)
        for metric in ("nmse", "cosine"):
            curves = plots.curves_of(rows, size, metric, names=plots.INHERITING)
            made[f"{metric}-{size}"] = plots.panel(curves, f"{size} px", log=metric == "nmse")
        made[f"high_frequency-{size}"] = plots.panel(plots.curves_of(rows, size, "high_frequency"), f"{size} px")
        made[f"cost-{size}"] = plots.cost(plots.curves_of(rows, size, "psnr", "encode_ms"), f"PSNR in dB, {size} px")
    made |= {f"channel-{what}": plots.channels(rows, what) for what in ("mean", "std")}
    return made | {"map": plots.latent_map(rows), "theorem2": plots.departure(found["theorem2"])}


def shots(out: Path, c: "Comparison", distances: Iterable[str]) -> Images:
    """The picture as each leaves it, then what each changed."""
    folder, shown = out / "pictures", list[tuple[Path | bytes, str]]()
    folder.mkdir(exist_ok=True)
    original = c.pictures["original"]

    def written(x: "Tensor", what: str) -> Path:
        path = folder / f"{c.rank} {what}.png".replace(" ", "-")
        grid(x, tile=1, gap=0).convert("RGB").save(path)
        return path

    for who, x in c.pictures.items():
        values = c.values.get(who, {})
        told = [f"PSNR {values['psnr']:.2f} dB, MSE {number(values['mse'], 3)}" if values else c.name]
        told += [f"{HEADS.get(d, d)} {number(values[d], 3)}" for d in distances if d in values]
        shown.append((written(x, who), f"{who}: {', '.join(told)}"))
    for who, x in c.pictures.items():
        if who != "original":
            difference = (AMPLIFIED * (x - original)).clamp(-1, 1)
            told = f"{who} less original, times {AMPLIFIED}; grey is 0"
            shown.append((written(difference, f"{who} difference"), told))
    return Images(f"{c.rank.capitalize()}: {c.name}", shown,
                  f"{c.size} px. The student's PSNR is {c.loss:.2f} dB below the teacher's here: the {c.rank} of all "
                  "pictures of this size. Click to enlarge.")
