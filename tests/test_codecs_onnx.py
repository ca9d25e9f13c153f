"""ONNX graphs: the codec's answers in onnxruntime, at sizes and batches other than the traced ones."""

import importlib.util
import re

import pytest
import torch

from stillroom.codecs.codec import Codec
from stillroom.codecs.export import to_onnx
from stillroom.codecs.folders import DiffusersDecoder
from stillroom.codecs.klt import fit_klt
from stillroom.data import LatentSpace
from stillroom.nets.coding import Decoder, Encoder
from stillroom.settings import Refusal

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")      # of the exporter's own


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


def test_onnx_snippet_runs_verbatim(tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    folder = to_onnx(klt(), tmp_path / "out")
    monkeypatch.chdir(folder)
    exec(re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0], {})
    assert capsys.readouterr().out.strip() == "(1, 4, 32, 40) (1, 3, 256, 320)"


def test_onnx_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else known(name, *rest))
    with pytest.raises(Refusal, match=r"stillroom\[onnx\]"):
        to_onnx(klt(), tmp_path / "out")
