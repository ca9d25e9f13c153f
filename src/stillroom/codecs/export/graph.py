"""ONNX graphs of both halves: batch, height and width are free, pictures in [-1, 1], latents on the diffusion side."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from stillroom.codecs.codec import Codec
from stillroom.codecs.export.card import write_card
from stillroom.settings import Refusal
from stillroom.settings.files import new_folder

TOLERANCE = 1e-4        # of the answers' range
SNIPPET = """
import numpy as np
import onnxruntime

encoder, decoder = (onnxruntime.InferenceSession(f"{half}.onnx") for half in ("encoder", "decoder"))
pictures = np.random.uniform(-1, 1, (1, 3, HEIGHT, WIDTH)).astype("float32")       # SIDES
latents, = encoder.run(None, {"pictures": pictures})
again, = decoder.run(None, {"latents": latents})
print(latents.shape, again.shape)
"""
FORM = """`encoder.onnx` takes pictures in [-1, 1] to latents on the diffusion side; `decoder.onnx` takes these to
pictures. {free} {checked}"""
FREE = "Batch, height and width are free, the sides of pictures multiples of {factor}."
FIXED = "Batch is free; pictures are of {height} x {width} pixels, of which the statistics of the latents are."


class Encode(nn.Module):
    def __init__(self, codec: Codec):
        super().__init__()
        self.codec = codec

    def forward(self, pictures: Tensor) -> Tensor:
        return self.codec.normalise(self.codec.encoder(self.codec.into_range(pictures))).mean


class Decode(nn.Module):
    def __init__(self, codec: Codec):
        super().__init__()
        self.codec = codec

    def forward(self, latents: Tensor) -> Tensor:
        return self.codec.out_of_range(self.codec.decoder(self.codec.space.denormalise(latents)))


def to_onnx(codec: Codec, folder: Path | str, card: Mapping[str, Any] | None = None,
            figures: Sequence[Mapping[str, Any]] = ()) -> Path:
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise Refusal(f"to write ONNX graphs, {package} is needed: pip install 'stillroom[onnx]'")
    f, c = codec.space.factor, codec.space.channels
    batch, height, width = Dim("batch", max=1024), Dim("height", max=4096), Dim("width", max=4096)
    if only := getattr(codec.encoder, "places", None):
        (h, w), seen, sides = only, [(1, *only), (3, *only)], lambda step: {}
    else:       # any two sides that differ: equal ones would let the exporter take them for one
        (h, w), seen, sides = (6, 8), [(1, 5, 9), (3, 12, 4)], lambda step: {2: step * height, 3: step * width}
    halves = {
        "encoder": (Encode(codec), f, torch.zeros(2, 3, h * f, w * f), {0: batch, **sides(f)}),
        "decoder": (Decode(codec), 1, torch.zeros(2, c, h, w), {0: batch, **sides(1)}),
    }
    checkable = importlib.util.find_spec("onnxruntime") is not None
    with new_folder(folder) as new:
        for name, (net, step, example, dimensions) in halves.items():
            names = ("pictures", "latents") if name == "encoder" else ("latents", "pictures")
            with quiet():
                program = torch.onnx.export(net.eval(), (example,), dynamo=True, dynamic_shapes=(dimensions,),
                                            verbose=False, input_names=names[:1], output_names=names[1:])
            assert program is not None
            program.save(new / f"{name}.onnx", external_data=False)
            if checkable:
                check(new / f"{name}.onnx", net, seen, example.shape[1], step)
        others = "batches" if only else "batches and sizes"
        checked = (f"They equal the torch model to {TOLERANCE:g} of the range at {others} other than the traced one."
                   if checkable else "They were not run: onnxruntime was not installed.")
        free = FIXED.format(height=h * f, width=w * f) if only else FREE.format(factor=f)
        write_card(new, codec, card, figures, FORM.format(free=free, checked=checked), snippet(f, only), "onnx")
    return Path(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """The exporter has a line for each operator of packages that no codec needs, and warns of its own old calls."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def snippet(factor: int, only: tuple[int, int] | None) -> str:
    near = -(-256 // factor)        # latents of a picture of some 256 pixels
    height, width = (side * factor for side in only or (near, near * 5 // 4))
    told = "this size alone" if only else f"sides are multiples of {factor}"
    return SNIPPET.replace("HEIGHT", str(height)).replace("WIDTH", str(width)).replace("SIDES", told)


@torch.no_grad()
def check(file: Path, net: nn.Module, grids: list[tuple[int, int, int]], channels: int, step: int) -> None:
    """Against torch, at sizes that the exporter has not seen."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4      # what fails is told here, in a line
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    for batch, height, width in grids:
        x = torch.rand(batch, channels, height * step, width * step, generator=random) * 2 - 1
        mine = net(x)
        try:
            theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        except Exception as error:      # of onnxruntime's own classes
            told = " ".join(str(error).split())[:200]
            raise Refusal(f"{file.name} does not run at {list(x.shape)}, other than the traced shape, and nothing is "
                          f"written: export it to diffusers ({told})") from error
        if theirs.shape != mine.shape:
            raise Refusal(f"{file.name} answers {list(theirs.shape)} at {list(x.shape)}, and torch {list(mine.shape)}; "
                          "nothing is written")
        error = float((mine - theirs).abs().max() / (mine.max() - mine.min()).clamp(min=1e-12))
        if not error <= TOLERANCE:
            raise Refusal(f"{file.name} differs from torch by {error:.2g} of the range at {list(x.shape)}; nothing is "
                          "written")
