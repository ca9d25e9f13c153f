"""What a product makes, by number: for `stillroom sample` and `stillroom evaluate`."""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.judge.asked import Drawing, flags_given
from stillroom.judge.places import codec_at, know_recipe
from stillroom.settings import Refusal

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 256           # samples, about, that one who is killed loses

Sampler = Callable[..., "Tensor"]        # (n, seed, y=, batch=, first=) -> x [n, *shape]


@dataclass(frozen=True)
class Draws:
    """Samples by number: the i-th does not depend on which others are drawn, nor on the batch."""

    shape: tuple[int, ...]
    sampler: Sampler
    labels: Callable[[int, int], "Tensor | None"]       # (first, count)
    seed: int
    batch: int
    card: Mapping[str, Any]
    """What two draws must share to be parts of one set."""
    encoding: Mapping[str, Any] | None = None
    """Of the latents that they are. None for pictures, points, and latents whose run does not say."""
    classes: int | None = None
    limit: int | None = None
    model: Any = None
    """What draws them, where something does."""
    guidance: float = 1.0
    """Of the teacher that it was taught to follow, where that is in its weights."""

    @property
    def kind(self) -> str:
        if self.encoding is not None:
            return "latents"
        return "pictures" if len(self.shape) == 3 and self.shape[0] in (1, 3) else "points"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dict(self.card), sort_keys=True).encode()).hexdigest()[:16]

    def __call__(self, first: int, count: int, law: "Tensor | None" = None) -> "Tensor":
        labels = {} if law is None else {"y": labels_of(self, law, first, count)}
        return self.sampler(count, self.seed, batch=self.batch, first=first, **labels)

    def chunks(self, first: int, stop: int, law: "Tensor | None" = None) -> Iterator[tuple[int, "Tensor"]]:
        """(number of the first, samples) from `first` on, in whole batches: so that one who goes on draws the same
        batches as one who was never stopped."""
        each = self.batch * max(1, AT_ONCE // self.batch)
        for i in range(first, stop, each):
            yield i, self(i, min(each, stop - i), law)
            if sys.stderr.isatty():
                print(f"\r{min(i + each, stop)} of {stop}", end="\n" if i + each >= stop else "", file=sys.stderr)


def labels_of(draws: Draws, law: "Tensor | None", first: int, count: int) -> "Tensor | None":
    """Balanced; or those of `law`, from its start again where there are fewer."""
    import torch

    return draws.labels(first, count) if law is None else law[torch.arange(first, first + count) % len(law)]


def open_draws(place: Path, settings: Drawing) -> Draws:
    from stillroom.train import load_product, product_hash
    from stillroom.train.card import takes_strength
    from stillroom.train.world import pick_device

    know_recipe(place)
    product, device = load_product(place), pick_device(settings.device)
    card = {"product": product_hash(place), "built": built(place), "seed": settings.seed}
    encoding = product.card.get("encoding")
    if product.kind == "points":
        draws = points(product.parts, settings, card)
    elif product.kind in ("flow", "generator"):
        model: Any = product.parts.get(product.kind)
        if lacks := [name for name in ("shape", "classes", "labels", "sample") if not hasattr(model, name)]:
            raise Refusal(f"{place}: its {product.kind} is {model and type(model).__name__}, which is not drawn from: "
                          f"it has no {', '.join(lacks)}; take or extend stillroom.flows.Generator")
        how, weak = how_of(product.kind, model, settings), weak_of(product, settings)
        card |= {"guidance": settings.guidance, **how} | (weak[1] if weak else {})
        if weak:
            how["weak"] = weak[0].to(device)
        else:
            require_learned(place, product, settings.guidance)
        model = model.to(device)

        def sampler(n: int, seed: int, **more) -> "Tensor":
            return model.sample(n, seed, guidance=settings.guidance, **how, **more)

        inside = 1.0 if takes_strength(model) else float(product.card.get("guidance", 1.0))
        draws = Draws(tuple(model.shape), sampler, model.labels, settings.seed, settings.batch, card, encoding,
                      model.classes, model=model, guidance=inside)
    else:
        how = ": stillroom compare measures codecs" * (product.kind == "codec")
        raise Refusal(f"{place}: a product of kind {product.kind!r} is not drawn from{how}")
    return decoded(draws, settings, device) if settings.codec else draws


def require_learned(place: Path | str, product, guidance: float) -> None:
    """A strength that the network is told is one of those that it was taught; what has one in its weights was taught no
    answer without a label."""
    from stillroom.train.card import takes_strength

    if takes_strength(product.parts[product.kind]):
        strongest = product.card.get("strongest")
        if strongest is not None and not 1 <= guidance <= strongest:
            raise Refusal(f"--guidance {guidance:g}: {place} is told the strength, and has learned those from 1 to "
                          f"{strongest:g}; give one of them")
    elif guidance != 1 and (inside := product.card.get("guidance", 1)) != 1:
        raise Refusal(f"--guidance {guidance:g}: {place} has guidance {inside:g} in its weights; leave it out")


def built(place: Path | str) -> str:
    """Names what a product's parts are built with: its sampler, steps and shift, of which the weights do not tell."""
    from stillroom.settings.files import read_json
    from stillroom.train.product import product_folder

    parts = read_json(product_folder(place) / "product.json")["parts"]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def points(parts, settings: Drawing, card: dict) -> Draws:
    if told := flags_given(settings, "seed", "steps", "guidance", "weak", "interval"):
        raise Refusal(f"points are not sampled anew: leave out {told}")
    x, y = parts["points"], parts.get("labels")

    def sampler(n: int, _seed: int, first: int = 0, **_how) -> "Tensor":
        return x[first : first + n]

    def labels(first: int, count: int) -> "Tensor | None":
        return None if y is None else y[first : first + count]

    return Draws(tuple(x.shape[1:]), sampler, labels, settings.seed, settings.batch, card, limit=len(x))


def how_of(kind: str, model: Any, settings: Drawing) -> dict[str, Any]:
    """The steps, and what only flows are told."""
    if kind == "flow":
        return {"steps": settings.steps or model.steps, "interval": settings.interval}
    if settings.interval != (0, 1):
        raise Refusal("a generator knows no times: leave out --interval")
    return {"steps": settings.steps}


def weak_of(product, settings: Drawing) -> tuple[Any, dict[str, str]] | None:
    """The weaker model, and what names it on the card."""
    from stillroom.train import load_product, product_hash

    if not settings.weak:
        return None
    if settings.guidance == 1:
        raise Refusal("--weak has no effect at guidance 1: give --guidance too")
    if settings.weak == "early":
        if "early" not in product.parts:
            raise Refusal("--weak early: this run kept no earlier average; name another run")
        return product.parts["early"], {"weak": "early"}
    know_recipe(Path(settings.weak))
    other = load_product(settings.weak)
    if other.kind != product.kind:
        raise Refusal(f"--weak {settings.weak}: a product of kind {other.kind!r}; give another {product.kind}")
    if other.card.get("encoding") != product.card.get("encoding"):
        raise Refusal(f"--weak {settings.weak}: it was trained on other latents")
    model: Any = product.parts[product.kind]
    weak: Any = other.parts[product.kind]
    if weak.classes != model.classes and not (product.kind == "flow" and weak.classes is None):
        raise Refusal(f"--weak {settings.weak}: it knows {weak.classes or 'no'} classes, and the run "
                      f"{model.classes or 'none'}")
    return weak, {"weak": product_hash(settings.weak), "weak_built": built(settings.weak)}


def decoded(draws: Draws, settings: Drawing, device) -> Draws:
    """The pictures of latents."""
    codec, name = open_decoder(settings.codec, draws.encoding, draws.shape)
    codec = codec.to(device)

    def sampler(n: int, seed: int, **more) -> "Tensor":
        return codec.pictures(draws.sampler(n, seed, **more))

    height, width = (side * codec.space.factor for side in draws.shape[1:])
    return Draws((3, height, width), sampler, draws.labels, draws.seed, draws.batch, {**draws.card, "codec": name},
                 classes=draws.classes, limit=draws.limit)


def open_decoder(spec: str, encoding: Mapping[str, Any] | None, shape: tuple[int, ...]):
    """The codec and its hash: the one that made the latents, or one that was distilled from it."""
    from stillroom.codecs import fingerprint
    from stillroom.train import load_product
    from stillroom.train.teacher import is_ours

    codec = codec_at(spec)
    name = fingerprint(codec)
    if len(shape) != 3 or shape[0] != codec.space.channels:
        raise Refusal(f"codec {spec}: its latents have {codec.space.channels} channels, and samples are of "
                      f"{list(shape)}")
    if encoding is not None:
        of = load_product(spec).card.get("teacher_hash") if is_ours(Path(spec)) else None
        same_space = json.loads(json.dumps(dataclasses.asdict(codec.space))) == encoding["space"]
        if encoding["codec"] != name and not (encoding["codec"] == of and same_space):
            raise Refusal(f"codec {spec}: the latents are of another codec ({encoding['codec'][:12]}, and this is "
                          f"{name[:12]}); give that one, or one distilled from it")
    return codec, name
