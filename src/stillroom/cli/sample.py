"""`stillroom sample RUN`: pictures, or arrays, of what a run made."""

from dataclasses import dataclass
from pathlib import Path

from stillroom.cli.flags import parse
from stillroom.settings import Refusal


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Draws from a run. The same seed gives the same samples at any --n and --batch."""

    n: int = 64
    out: Path | None = None
    """FILE.png (a grid), FILE.npz (arrays x and y) or a folder (one PNG per image); RUN/samples/drawn.png if not given."""
    seed: int = 0
    steps: int | None = None
    """Sampler steps; what the run's settings say unless given."""
    guidance: float = 1.0
    batch: int = 256


def run(word: str, arguments: list[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        if arguments and arguments[0] in ("-h", "--help"):
            parse(Settings, ["--help"], "stillroom sample RUN", "Draws from what a run made.")
        raise Refusal("usage: stillroom sample RUN [--n 64] [--out FILE|FOLDER]; see stillroom sample --help")
    place = Path(arguments[0])
    settings = parse(Settings, arguments[1:], "stillroom sample RUN", "Draws from what a run made.")
    if settings.n < 1 or settings.batch < 1 or (settings.steps is not None and settings.steps < 1):
        raise Refusal("stillroom sample: --n, --batch and --steps must be at least 1")
    from stillroom.train import load_product

    product = load_product(place)
    x, y = draw(product, settings)
    out = settings.out or (place / "samples" / "drawn.png" if (place / "settings.toml").is_file() else Path("drawn.png"))
    write(x, y, out)
    print(out)
    return 0


def draw(product, settings: Settings):
    if product.kind == "flow":
        flow = product.parts["flow"]
        x = flow.sample(settings.n, settings.seed, guidance=settings.guidance, steps=settings.steps, batch=settings.batch)
        return x, flow.labels(0, settings.n)
    if product.kind == "points":
        return product.parts["points"][: settings.n], product.parts.get("labels")
    raise Refusal(f"a product of kind {product.kind!r} is not drawn from")


def write(x, y, out: Path) -> None:
    from stillroom.train.pictures import cloud, grid

    picture = x.ndim == 4 and x.shape[1] in (1, 3)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        import numpy as np

        np.savez(out, x=x.numpy(), **({} if y is None else {"y": y[: len(x)].numpy()}))
    elif out.suffix == ".png":
        if not picture and not (x.ndim == 2 and x.shape[1] == 2):
            raise Refusal(f"samples of shape {tuple(x.shape[1:])} are no picture; write them to FILE.npz")
        (grid(x) if picture else cloud(x)).save(out)
    elif not out.suffix:
        if not picture:
            raise Refusal(f"samples of shape {tuple(x.shape[1:])} are no pictures; write them to FILE.npz")
        out.mkdir(exist_ok=True)
        for i, image in enumerate(x):
            grid(image[None], border=0, smallest=1).save(out / f"{i:06d}.png")
    else:
        raise Refusal(f"{out}: write to FILE.png, FILE.npz or a folder")

