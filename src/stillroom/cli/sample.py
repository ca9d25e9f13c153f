"""`stillroom sample RUN`: pictures, or arrays, of what a run made."""

import io
from dataclasses import dataclass
from pathlib import Path

from stillroom.cli.flags import parse
from stillroom.recipes import find
from stillroom.settings import Count, Refusal, read_toml


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Draws from a run. The same seed gives the same samples at any --n and --batch."""

    n: Count = 64
    out: Path | None = None
    """FILE.png (a grid), FILE.npz (arrays x and y) or a folder (a PNG per image); else RUN/samples/drawn.png."""
    seed: int = 0
    steps: Count | None = None
    """Sampler steps; what the run's settings say unless given."""
    guidance: float = 1.0
    batch: Count = 256


def run(word: str, arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            parse(Settings, ["--help"], "stillroom sample RUN", "Draws from what a run made.")
        raise Refusal("usage: stillroom sample RUN [--n 64] [--out FILE|FOLDER]; see stillroom sample --help")
    place = Path(arguments[0])
    settings = parse(Settings, arguments[1:], "stillroom sample RUN", "Draws from what a run made.")
    from stillroom.train import load_product

    know_recipe(place)
    product = load_product(place)
    x, y = draw(product, settings)
    is_run = (place / "settings.toml").is_file()
    out = settings.out or (place / "samples" / "drawn.png" if is_run else Path("drawn.png"))
    write(x, y, out)
    print(out)
    return 0


def know_recipe(place: Path) -> None:
    """Imports the user's own recipe file, if the run is of one: the product's classes are in it."""
    for run in (place, place.parent):
        if (run / "settings.toml").is_file():
            name = str(read_toml(run / "settings.toml").get("recipe", ""))
            if ".py:" in name:
                find(name)
            return


def draw(product, settings: Settings):
    if product.kind == "flow":
        flow, s = product.parts["flow"], settings
        return flow.sample(s.n, s.seed, guidance=s.guidance, steps=s.steps, batch=s.batch), flow.labels(0, s.n)
    if product.kind == "points":
        if settings.guidance != 1 or settings.steps is not None:
            raise Refusal("points are not sampled anew: leave out --guidance and --steps")
        return product.parts["points"][: settings.n], product.parts.get("labels")
    raise Refusal(f"a product of kind {product.kind!r} is not drawn from")


def write(x, y, out: Path) -> None:
    from stillroom.train.files import write_atomically
    from stillroom.train.pictures import cloud, grid

    picture, kind = x.ndim == 4 and x.shape[1] in (1, 3), out.suffix.lower()
    if kind not in (".npz", ".png", ""):
        raise Refusal(f"{out}: write to FILE.png, FILE.npz or a folder")
    if not picture and (kind == "" or (kind == ".png" and x.shape[1:] != (2,))):
        raise Refusal(f"samples of shape {tuple(x.shape[1:])} are no pictures; write them to FILE.npz")
    (out if kind == "" else out.parent).mkdir(parents=True, exist_ok=True)
    if kind == ".npz":
        write_atomically(out, arrays(x, y))
    elif kind == ".png":
        write_atomically(out, png(grid(x) if picture else cloud(x)))
    else:
        for i, image in enumerate(x):
            write_atomically(out / f"{i:06d}.png", png(grid(image[None], tile=1, gap=0).convert("RGB")))


def arrays(x, y) -> bytes:
    import numpy as np

    content = io.BytesIO()
    np.savez(content, x=x.numpy(), **({} if y is None else {"y": y[: len(x)].numpy()}))
    return content.getvalue()


def png(image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
