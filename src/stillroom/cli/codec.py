"""`stillroom encode | decode | reconstruct FILES...`: pictures one by one. For data sets there is `stillroom cache`."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stillroom.cli.flags import parse
from stillroom.settings import Natural, Positive, Refusal, Where

ABOUT = {
    "encode": "Pictures to latents: NAME.safetensors for each, on the diffusion side.",
    "decode": "Latents written by encode to pictures: NAME.png for each.",
    "reconstruct": "Pictures through the codec and back: NAME.png for each, with its error.",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    codec: Where
    """A run, `bundled`, a diffusers folder or hub id, or a TAESD weight file."""
    out: Path = Path()
    """Folder for what is made."""
    scale: Positive | None = None
    """Remap pictures to this many times their size first; what the codec was calibrated to, unless given."""
    tile: Natural = 512
    """Pixels a side of the tiles of larger pictures; 0 takes any picture whole."""
    device: str = "auto"


def run(word: str, arguments: list[str]) -> int:
    files, flags = apart(arguments)
    command = f"stillroom {word} FILES..."
    if not files and not {"-h", "--help"} & set(flags):
        raise Refusal(f"usage: {command} --codec CODEC [--out FOLDER]; see stillroom {word} --help")
    settings = parse(Settings, flags, command, ABOUT[word])
    if word == "decode" and settings.scale is not None:
        raise Refusal("decode knows the scale from the file: leave out --scale")
    places = outputs(files, settings.out, ".safetensors" if word == "encode" else ".png", settings.codec)
    from stillroom.judge.places import codec_at
    from stillroom.train.world import pick_device

    codec = codec_at(settings.codec).to(pick_device(settings.device))
    settings.out.mkdir(parents=True, exist_ok=True)
    for place in places:
        WORDS[word](codec, *place, settings)
    return 0


def apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Files and flags, in any order: every flag here but --help takes one value."""
    files, flags, rest = [], [], iter(arguments)
    for a in rest:
        if not a.startswith("-"):
            files.append(a)
        else:
            flags += [a] if "=" in a or a in ("-h", "--help") else [a, *([b] if (b := next(rest, None)) else [])]
    return files, flags


def outputs(files: list[str], out: Path, suffix: str, codec: str) -> list[tuple[Path, Path]]:
    """(from, to) of each file. Before any work: all must be there, and nothing that is read is written over."""
    places = [(Path(f), out / (Path(f).stem + suffix)) for f in files]
    seen: dict[Path, Path] = {}
    for source, target in places:
        if source.is_dir():
            raise Refusal(f"{source} is a folder: give its files, or keep a whole data set with stillroom cache")
        if not source.exists():
            raise Refusal(f"{source}: no such file")
        if target in seen:
            raise Refusal(f"{source} and {seen[target]} would both become {target}; give them apart")
        if target.resolve() in (source.resolve(), Path(codec).resolve()):
            raise Refusal(f"{target}: is read here and would be written over; choose another folder with --out")
        seen[target] = source
    return places


def picture_of(file: Path, codec):
    from stillroom.data import Unreadable, decode, signed_picture

    try:
        return signed_picture(decode(file))[None].to(codec.device)
    except Unreadable as error:
        raise Refusal(str(error)) from None


def form_of(codec, scale: float | None, tile: int, height: int, width: int):
    """The codec, remapped, and in tiles where the picture that the encoder sees is larger than one."""
    from stillroom.codecs import Remapped, Tiled

    remapped = codec.remapped(scale)
    if tile and max(remapped.size(height, width)) > tile:
        return Remapped(Tiled(codec, tile), remapped.scale)
    return remapped


def encode(codec, source: Path, target: Path, settings: Settings) -> None:
    import torch

    from stillroom.codecs.files import Encoded, write_encoded

    x = picture_of(source, codec)
    form = form_of(codec, settings.scale, settings.tile, *x.shape[-2:])
    with torch.inference_mode():
        z = form.encode(x)[0].cpu()
    write_encoded(target, Encoded(z, codec.space, (x.shape[-2], x.shape[-1]), form.scale), hash_of(codec))
    print(f"{target}  {' x '.join(map(str, z.shape))}")


@cache
def hash_of(codec) -> str:
    """Taken over all its weights: once for all files."""
    from stillroom.codecs import fingerprint

    return fingerprint(codec)


def decode(codec, source: Path, target: Path, settings: Settings) -> None:
    import torch

    from stillroom.codecs.files import read_encoded, require_space

    encoded = read_encoded(source)
    require_space(encoded, codec, str(source))
    form = form_of(codec, encoded.scale, settings.tile, *encoded.size)
    with torch.inference_mode():
        write_picture(form.decode(encoded.z[None].to(codec.device), encoded.size).clamp(-1, 1), target)
    print(target)


def reconstruct(codec, source: Path, target: Path, settings: Settings) -> None:
    import torch

    from stillroom.measure.images import psnr

    x = picture_of(source, codec)
    form = form_of(codec, settings.scale, settings.tile, *x.shape[-2:])
    with torch.inference_mode():
        again = form.reconstruct(x)
    write_picture(again, target)
    print(f"{target}  PSNR {float(psnr(again, x)[0]):.2f} dB at scale {form.scale:g}")


def write_picture(x, target: Path) -> None:
    from stillroom.cli.sample import png
    from stillroom.settings.files import write_atomically
    from stillroom.train.pictures import grid

    write_atomically(target, png(grid(x.cpu(), tile=1, gap=0).convert("RGB")))


WORDS = {"encode": encode, "decode": decode, "reconstruct": reconstruct}
