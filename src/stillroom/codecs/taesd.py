"""Raw weight files in TAESD's layout (https://github.com/madebyollin/taesd) as codecs.

The files name layers by their number in a Sequential, and nothing else: channels, widths and counts of blocks are read
from the names and shapes, f8 with or without the global branch of FLUX.2's (TAEF2), and f32 (Sana's). Pictures are in
[0, 1], and latents are the diffusion side's already.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stillroom.codecs.codec import Codec
from stillroom.data import LatentSpace
from stillroom.nets.coding import Decoder, Encoder
from stillroom.nets.weights import read_weights, require_same
from stillroom.settings import Refusal

SUFFIXES = (".safetensors", ".pth")
HALVES = ("encoder", "decoder")
Weights = Mapping[str, Tensor]


def from_taesd(encoder_file: str | Path, decoder_file: str | Path | None = None) -> Codec:
    """The codec of two files. One alone names its pair, as taesd_encoder does taesd_decoder; or it holds both halves,
    as diffusers writes them."""
    first = Path(encoder_file)
    weights = read_weights(first)
    if decoder_file is None and any(k.startswith("encoder.layers.") for k in weights):
        halves = _both(weights)
        files = (first, first)
    else:
        files = _pair(first) if decoder_file is None else (first, Path(decoder_file))
        halves = tuple(weights if file == first else read_weights(file) for file in files)
    encoder, decoder = encoder_of(halves[0], files[0]), decoder_of(halves[1], files[1])
    if (encoder.channels, encoder.factor) != (decoder.channels, decoder.factor):
        raise Refusal(f"{files[0]} makes latents of {encoder.channels} channels of {encoder.factor} pixels, and "
                      f"{files[1]} takes {decoder.channels} channels of {decoder.factor}: they are no pair")
    c = encoder.channels
    space = LatentSpace(c, encoder.factor, (0.0,) * c, (1.0,) * c, encoder.offset, (0.0, 1.0))
    return Codec(encoder, decoder, space).eval()


def encoder_of(weights: Weights, file: Path) -> Encoder:
    kinds = _kinds(weights, file)
    if kinds[:2] == [None, "conv"]:
        raise Refusal(f"{file}: a decoder where an encoder is expected")
    strided = kinds[:4] == ["conv", None, "conv", None]
    start = 4 if strided else 1
    blocks = _blocks(kinds[start:], ["bare"])
    if kinds[0] != "conv" or blocks is None:
        raise _unknown(file)
    widths = [_leaving(weights, 2 if strided else 0), *_leaving_all(weights, kinds, "bare")]
    shape: dict[str, Any] = {"stem": "conv"}
    if strided:     # it takes two levels, whose counts and widths are its own
        shape, blocks, widths = {"stem": "strided"}, [0, 0, *blocks], widths[:1] * 2 + widths
    net = Encoder(_leaving(weights, len(kinds) - 1), _one(widths), blocks, pool=_pooled(weights), **shape)
    _fill(net, weights, file)
    return net


def decoder_of(weights: Weights, file: Path) -> Decoder:
    kinds = _kinds(weights, file)
    if kinds[:1] == ["conv"]:
        raise Refusal(f"{file}: an encoder where a decoder is expected")
    blocks = _blocks(kinds[3:], [None, "bare"])
    if kinds[:3] != [None, "conv", None] or blocks is None:
        raise _unknown(file)
    widths = [_leaving(weights, 1), *_leaving_all(weights, kinds, "bare")]
    net = Decoder(weights["1.weight"].shape[1], _one(widths), blocks, pool=_pooled(weights))
    _fill(net, weights, file)
    return net


def _kinds(weights: Weights, file: Path) -> list[str | None]:
    """What stands at each number: `conv`, `bare` for one without bias, which comes with a change of resolution,
    `block`, or None, where a layer has no weights."""
    layers: dict[int, set[str]] = {}
    for name in weights:
        number, _, rest = name.partition(".")
        if not number.isdecimal() or int(number) > 999:
            raise _unknown(file, f": it has {name!r}")
        layers.setdefault(int(number), set()).add(rest)
    if not layers:
        raise _unknown(file, ": it is empty")

    def kind(number: int, rests: set[str]) -> str:
        if any(rest.startswith("conv.") for rest in rests):
            return "block"
        if "weight" not in rests or weights[f"{number}.weight"].ndim != 4:
            raise _unknown(file, f": layer {number} is neither a convolution nor a block of them")
        return "conv" if "bias" in rests else "bare"

    return [kind(i, layers[i]) if i in layers else None for i in range(max(layers) + 1)]


def _blocks(kinds: Sequence[str | None], between: Sequence[str | None]) -> list[int] | None:
    """Blocks of every level: `kinds` are levels of blocks with `between` between them, and a convolution last."""
    counts, i = [0], 0
    while i < len(kinds) - 1:
        if kinds[i] == "block":
            counts[-1], i = counts[-1] + 1, i + 1
        elif list(kinds[i : i + len(between)]) == list(between):
            counts, i = [*counts, 0], i + len(between)
        else:
            return None
    return counts if list(kinds[-1:]) == ["conv"] else None


def _leaving(weights: Weights, number: int) -> int:
    return weights[f"{number}.weight"].shape[0]


def _leaving_all(weights: Weights, kinds: Sequence[str | None], kind: str) -> list[int]:
    return [_leaving(weights, i) for i, found in enumerate(kinds) if found == kind]


def _one(widths: Sequence[int]) -> int | tuple[int, ...]:
    return widths[0] if len(set(widths)) == 1 else tuple(widths)


def _pooled(weights: Weights) -> bool:
    return any(".pool." in name for name in weights)


def _fill(net: Encoder | Decoder, weights: Weights, file: Path) -> None:
    require_same(net.layers.state_dict(), weights, f"a TAESD {type(net).__name__.lower()}", file,
                 "download it again, or save it again under the names of taesd.py")
    net.layers.load_state_dict(weights)


def _unknown(file: Path, why: str = "") -> Refusal:
    return Refusal(f"{file}: no TAESD layout{why}; known are f8 with or without the global branch, and f32, with "
                   "layers numbered as in taesd.py")


def _both(weights: Weights) -> tuple[Weights, Weights]:
    """Out of one file in diffusers' form, which numbers the decoder without its clamp."""
    encoder, decoder = {}, {}
    for name, w in weights.items():
        half, _, rest = name.partition(".layers.")
        number, dot, tail = rest.partition(".")
        if half == "decoder" and number.isdecimal():
            decoder[f"{int(number) + 1}{dot}{tail}"] = w
        else:
            encoder[rest if half == "encoder" else name] = w
    return encoder, decoder


def _pair(file: Path) -> tuple[Path, Path]:
    """The encoder's file and the decoder's: names that differ in that word, of either kind of file."""
    mine = next((half for half in HALVES if half in file.name.lower()), None)
    if mine is None:
        raise Refusal(f"{file}: a codec has two halves; name them with encoder and decoder, side by side, or give the "
                      "decoder's file too")
    other = HALVES[1 - HALVES.index(mine)]
    stem = file.stem.replace(mine, other)
    kinds = sorted(SUFFIXES, key=lambda suffix: suffix != file.suffix)
    found = next((p for suffix in kinds if (p := file.with_name(stem + suffix)).is_file() and p != file), None)
    if found is None:
        raise Refusal(f"{file}: no {other} beside it; put {stem}{kinds[0]} there")
    return (file, found) if mine == "encoder" else (found, file)
