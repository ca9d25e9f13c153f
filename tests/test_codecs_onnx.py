"""ONNX graphs: the codec's answers in onnxruntime, at sizes and batches other than the traced ones."""

import importlib.util
import re

import pytest
import torch

from stillroom.codecs.codec import Codec
from stillroom.codecs.export import to_onnx
from stillroom.codecs.folders import DiffusersDecoder
from stillroom.codecs.klt import fit_klt
from stillroom.codecs.rae import token_codec
from stillroom.data import LatentSpace
from stillroom.nets.coding import Decoder, Encoder
from stillroom.nets.vit import ViT, ViTDecoder
from stillroom.settings import Refusal


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def lively(codec):
    """Weights large enough that answers vary with the picture."""
    torch.manual_seed(3)
    for p in codec.parameters():
        p.data = torch.randn_like(p) * (1.2 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1)
    return codec.eval().requires_grad_(False)


def attentive():
    """The decoder of an AutoencoderKL, with its norms and attention over the whole picture."""
    decoder = DiffusersDecoder("AutoencoderKL", {
        "latent_channels": 4, "block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    })
    encoder = Encoder(4, 8, (1, 1), padding="asymmetric")
    return lively(Codec(encoder, decoder, LatentSpace(4, 2, (0.1,) * 4, (2.7,) * 4, encoder.offset)))


def unshuffling():
    encoder = Encoder(4, 8, (0, 0, 1, 1), stem="unshuffle", moments=True)
    decoder = Decoder(4, 8, (1, 1, 0, 0), stem="unshuffle", soft_clamp=False)
    space = LatentSpace(4, 8, (-1.0, 0.0, 0.5, 1.0), (0.5, 1.0, 2.0, 3.0), encoder.offset, (0.0, 1.0))
    return lively(Codec(encoder, decoder, space))


def klt():
    torch.manual_seed(0)
    return fit_klt(torch.rand(8, 3, 64, 64) * 2 - 1, 8, 4)


def close(a, b, tolerance=1e-4):
    return a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(b.max() - b.min())


def transformer(side=1):
    """With statistics per channel, or of a grid of its own."""
    torch.manual_seed(0)
    shape = (16, side, side)
    codec = token_codec(ViT(12, 16, 1, 2), ViTDecoder(16, 12, 4, 16, 1, 2), torch.full(shape, 0.2),
                        torch.full(shape, 0.7), 12, (-1.0, 1.0))
    return lively(codec)


@pytest.mark.parametrize("make", [attentive, unshuffling])
def test_onnx_graphs_run_at_any_size_and_batch(make, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    codec = make()
    folder = to_onnx(codec, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "decoder.onnx", "encoder.onnx"]
    sessions = {half: onnxruntime.InferenceSession(folder / f"{half}.onnx") for half in ("encoder", "decoder")}
    for batch, height, width in ((1, 64, 24), (5, 32, 120)):
        x = torch.rand(batch, 3, height, width) * 2 - 1
        z, = sessions["encoder"].run(None, {"pictures": x.numpy()})
        assert close(torch.from_numpy(z), codec.encode(x))
        y, = sessions["decoder"].run(None, {"latents": z})
        assert close(torch.from_numpy(y), codec.decode(codec.encode(x)))


@pytest.mark.parametrize(("side", "sizes"), [(1, ((1, 24, 60), (5, 48, 36))), (4, ((1, 48, 48), (3, 48, 48)))])
def test_transformers_too(side, sizes, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    codec = transformer(side)
    folder = to_onnx(codec, tmp_path / "out")
    sessions = {half: onnxruntime.InferenceSession(folder / f"{half}.onnx") for half in ("encoder", "decoder")}
    for batch, height, width in sizes:
        x = torch.rand(batch, 3, height, width) * 2 - 1
        z, = sessions["encoder"].run(None, {"pictures": x.numpy()})
        assert close(torch.from_numpy(z), codec.encode(x))
        y, = sessions["decoder"].run(None, {"latents": z})
        assert close(torch.from_numpy(y), codec.decode(codec.encode(x)))


@pytest.mark.parametrize(("make", "printed", "says"), [
    (klt, "(1, 4, 32, 40) (1, 3, 256, 320)", "Batch, height and width are free, the sides of pictures multiples of 8"),
    (transformer, "(1, 16, 22, 27) (1, 3, 264, 324)", "the sides of pictures multiples of 12"),
    (lambda: transformer(4), "(1, 16, 4, 4) (1, 3, 48, 48)", "Batch is free; pictures are of 48 x 48 pixels"),
])
def test_onnx_snippet_runs_verbatim(tmp_path, monkeypatch, capsys, make, printed, says):
    pytest.importorskip("onnxruntime")
    folder = to_onnx(make(), tmp_path / "out")
    monkeypatch.chdir(folder)
    text = (folder / "README.md").read_text()
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], {})
    assert capsys.readouterr().out.strip() == printed and says in text.replace("\n", " ")


class Pinned(Decoder):
    def forward(self, z):
        return super().forward(z) + torch.zeros(len(z), 1, 1, 1)        # of the traced batch alone, in a graph


def test_a_graph_of_one_shape_alone_is_refused_in_a_line(tmp_path):
    pytest.importorskip("onnxruntime")
    codec = unshuffling()
    codec.decoder.__class__ = Pinned
    with pytest.raises(Refusal, match=r"^decoder.onnx does not run at \[1, 4, 5, 9\], other than the traced shape"):
        to_onnx(codec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_answers_otherwise_is_refused_in_a_line(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("stillroom.codecs.export.graph.TOLERANCE", -1.0)
    with pytest.raises(Refusal, match=r"^encoder.onnx differs from torch by \S+ of the range"):
        to_onnx(klt(), tmp_path / "out")


def test_onnx_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else known(name, *rest))
    with pytest.raises(Refusal, match=r"stillroom\[onnx\]"):
        to_onnx(klt(), tmp_path / "out")
