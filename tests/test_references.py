"""References: what is written, what it is a law of, what files hold, and what does not fit."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from closed_forms import F64, draws, each_path, mixture
from stillroom.flows import (
    ClosedFlow,
    Denoiser,
    Flow,
    Mixture,
    Noised,
    Spec,
    open_reference,
    parse_reference,
    references,
    require_fit,
)
from stillroom.flows.references import bandwidth, noised, read_reference_samples
from stillroom.nets import MLP, build, describe
from stillroom.paths import Linear
from stillroom.settings import Refusal


@pytest.mark.parametrize(("text", "spec"), [
    ("gaussian", Spec("gaussian")),
    ("gmm:16", Spec("gmm", 16, 0.5)),
    ("gmm:16:.25", Spec("gmm", 16, 0.25)),
    ("noised:0.3", Spec("noised", value=0.3)),
    ("noised:0.3:runs/ref", Spec("noised", value=0.3, file="runs/ref")),
    ("samples:a:b.npz", Spec("samples", file="a:b.npz")),
    ("runs/ref", Spec("run", file="runs/ref")),
    ("ref", Spec("run", file="ref")),
])
def test_what_is_written(text, spec):
    assert parse_reference(text) == spec


@pytest.mark.parametrize(("text", "says"), [
    ("gausian", "did you mean 'gaussian'"), ("gaussian:3", "write gaussian"), ("gmm", "gmm:K"), ("gmm:1", "K of 2"),
    ("gmm:8:1.0", "STD between 0 and 1"), ("gmm:8:0", "STD between"), ("noised:1", "LEVEL between 0 and 1"),
    ("noised:0", "LEVEL"), ("noised:x", "noised:0.3"), ("samples:", "samples:FILE"), ("", "known: gaussian"),
    ("what:3", "known: gaussian"), ("gm:16", "did you mean 'gmm'"),
])
def test_what_cannot_be_meant_is_refused_in_one_line(text, says):
    with pytest.raises(Refusal, match=says) as found:
        parse_reference(text)
    assert "\n" not in str(found.value)


def test_a_folder_may_be_called_like_a_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gausian").mkdir()
    assert parse_reference("gausian") == Spec("run", file="gausian")


# ---- closed forms ----

SHAPE = (2, 3, 3)


def flat(flow: Flow) -> Mixture:
    assert isinstance(flow, ClosedFlow)
    return flow.mixture


def test_white_noise_is_its_own_denoiser_and_takes_maps():
    flow = open_reference("gaussian", SHAPE, classes=4)
    x_t, t = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 5)
    c = Linear().over(t, x_t)
    expected = c.alpha / (c.alpha**2 + c.sigma**2) * x_t
    assert torch.allclose(flow.denoiser(x_t, t), expected, atol=1e-6)
    x = flow.sample(4000)
    assert x.shape[1:] == SHAPE and abs(float(x.mean())) < 0.01 and abs(float(x.var()) - 1) < 0.02
    assert flow.classes is None


@pytest.mark.parametrize("classes", [None, 4])
def test_a_mixture_has_unit_variance_in_every_number_and_classes_of_their_own(classes):
    law = flat(open_reference("gmm:8:0.3", SHAPE, classes, seed=5))
    assert law.classes == classes and law.means.shape == (8, 18)
    assert torch.allclose(law.means.mean(0), torch.zeros(18), atol=1e-6)
    assert torch.allclose(law.means.var(0, correction=0) + 0.3**2, torch.ones(18), atol=1e-6)
    if classes:
        assert law.labels.bincount().tolist() == [2] * 4
    assert torch.equal(law.means, flat(open_reference("gmm:8:0.3", SHAPE, classes, seed=5)).means)
    assert not torch.allclose(law.means, flat(open_reference("gmm:8:0.3", SHAPE, classes, seed=6)).means)


def test_draws_are_exact_and_each_its_own_whatever_the_batch():
    flow = open_reference("gmm:6:0.2", (2,), classes=3, seed=1)
    law, x, y = flat(flow), flow.sample(3000, seed=7), flow.labels(0, 3000)
    assert y is not None
    assert torch.equal(x[40:300], flow.sample(260, seed=7, first=40, batch=7))
    assert not torch.equal(x[:10], flow.sample(10, seed=8))
    nearest = torch.cdist(x, law.means).argmin(1)
    assert (law.labels[nearest] == y).float().mean() > 0.9
    asked = flow.sample(600, y=torch.full((600,), 2))
    own = law.means[law.labels == 2]
    near, which = torch.cdist(asked, own).min(1)
    assert near.square().mean() / 2 == pytest.approx(0.04, rel=0.15)
    assert which.bincount().min() > 250                                 # both components of the class, evenly
    anyone = flow.sample(3000, y=torch.full((3000,), 3))                # the null label: all components
    shares = torch.cdist(anyone, law.means).argmin(1).bincount(minlength=6) / 3000
    assert (shares - 1 / 6).abs().max() < 0.03


def test_guided_samples_follow_the_path():
    flow = open_reference("gmm:4:0.2", (2,), classes=4)
    plain = Flow(flow.denoiser, (2,))
    assert torch.equal(flow.sample(16, guidance=2.0), plain.sample(16, guidance=2.0))
    with pytest.raises(Refusal, match="one label per sample"):
        flow.sample(5, y=torch.tensor([0, 1]))


def test_a_closed_flow_can_be_written_down():
    for shape in ((2,), (2, 1, 1)):
        flow = open_reference("gmm:4", shape, classes=2)
        again = build(json.loads(json.dumps(describe(flow))))
        again.load_state_dict(flow.state_dict())
        assert torch.equal(again.sample(9, seed=2), flow.sample(9, seed=2)) and again.classes == 2


@each_path
@pytest.mark.parametrize("label", [None, 1, 3])
def test_a_noised_mixture_is_a_wider_mixture(path, label):
    """Through the denoiser of the clean data on any path, and in closed form on the linear one."""
    clean, s = mixture(path), 0.35
    wide = ((1 - s) ** 2 * clean.stds**2 + s**2).sqrt()
    closed = Mixture((1 - s) * clean.means, wide, clean.weights, clean.labels)
    x, t = 1.5 * draws(64, 2), torch.linspace(0, 0.85, 64, dtype=F64)   # VE's path ends at ten times the data
    y = None if label is None else torch.full((64,), label)
    assert torch.allclose(Noised(clean, s)(x, t, y), closed(x, t, y), rtol=1e-8, atol=1e-8)


def test_a_noised_flow_at_both_ends_of_time():
    clean, s, x = mixture(), 0.35, draws(16, 2)
    found = Noised(clean, s)
    assert torch.allclose(found(x, torch.zeros(16, dtype=F64)), x, atol=1e-9)
    mean = (1 - s) * clean.weights @ clean.means
    assert torch.allclose(found(x, torch.ones(16, dtype=F64)), mean.expand(16, 2), atol=1e-4)
    net = Denoiser(MLP(2, 16, 1), Linear(), "eps")
    assert Noised(net, s)(x.float(), torch.linspace(0, 1, 16)).isfinite().all()


def test_latents_noised_to_a_level():
    z, y = draws(300, *SHAPE, seed=4).float(), torch.arange(300) % 3
    asked = []

    def latents():
        asked.append(1)
        return z, y

    law = flat(open_reference("noised:0.25", SHAPE, 3, latents))
    assert asked == [1] and torch.allclose(law.means, 0.75 * z.flatten(1)) and torch.equal(law.labels, y)
    assert (law.stds == 0.25).all()
    assert flat(open_reference("noised:0.25", SHAPE, None, latents)).classes is None
    x_t, t = draws(8, *SHAPE).float(), torch.linspace(0.05, 0.95, 8)
    exact = Noised(Mixture(z.flatten(1).double(), torch.full((300,), 1e-5, dtype=F64)), 0.25)
    expected = exact(x_t.flatten(1).double(), t.double()).reshape(x_t.shape).float()
    assert torch.allclose(noised(z, 0.25).denoiser(x_t, t), expected, atol=1e-5)
    with pytest.raises(Refusal, match="no sample is of class 3"):
        open_reference("noised:0.25", SHAPE, 4, latents)
    with pytest.raises(Refusal, match="give noised:LEVEL:RUN"):
        open_reference("noised:0.25", SHAPE)


# ---- runs ----

def test_runs_are_opened_by_the_caller():
    flow, names = open_reference("gmm:4", (2,), 2), []

    def run(name):
        names.append(name)
        return flow

    assert open_reference("runs/ref", (2,), 2, run=run) is flow
    half = open_reference("noised:0.5:runs/ref", (2,), 2, run=run)
    assert isinstance(half.denoiser, Noised) and half.classes == 2 and names == ["runs/ref"] * 2
    assert open_reference("runs/ref", (2,), None, run=run) is flow              # asked without labels
    for shape, classes, says in (((3,), 2, r"a law of \[2\], and the latents are \[3\]"), ((2,), 5, "knows 2 classes")):
        with pytest.raises(Refusal, match=says):
            open_reference("runs/ref", shape, classes, run=run)
    with pytest.raises(Refusal, match="no runs can be opened"):
        open_reference("runs/ref", (2,))
    with pytest.raises(Refusal, match="give a multiple of 4: gmm:12"):
        open_reference("gmm:10", (2,), 4)
    require_fit(open_reference("gaussian", (2,)), (2,), 7, "x")                 # one law for all labels


# ---- samples ----

def write(file, x, y=None):
    match file.suffix:
        case ".npy":
            np.save(file, x.numpy())
        case ".npz":
            np.savez(file, x=x.numpy(), **({} if y is None else {"y": y.numpy()}))
        case ".safetensors":
            save_file({"x": x} | ({} if y is None else {"y": y}), file)
    return file


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".safetensors"])
@pytest.mark.parametrize("rows", [False, True], ids=["maps", "rows"])       # another model's latents; text embeddings
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_samples_of_every_file_and_shape(tmp_path, suffix, rows, dtype):
    x, y = draws(40, *SHAPE).to(dtype), torch.arange(40) % 4
    file = write(tmp_path / f"s{suffix}", x.flatten(1) if rows else x, y)
    held, labels = read_reference_samples(file, SHAPE)
    assert held.dtype == torch.float32 and torch.equal(held, x.float())
    assert (labels is None) == (suffix == ".npy") and (labels is None or torch.equal(labels, y))
    told = []
    flow = open_reference(f"samples:{file}", SHAPE, 4, note=told.append)
    assert flow.shape == SHAPE and torch.equal(flat(flow).means, x.float().flatten(1))
    assert (flow.classes, len(told)) == ((None, 1) if suffix == ".npy" else (4, 0))


def test_a_file_of_one_array_of_another_name(tmp_path):
    np.savez(tmp_path / "a.npz", embeddings=np.ones((3, 2), np.float32))
    save_file({"embeddings": torch.ones(3, 2)}, tmp_path / "a.safetensors")
    for suffix in ("npz", "safetensors"):
        assert read_reference_samples(tmp_path / f"a.{suffix}", (2,))[0].shape == (3, 2)


def bad_files(folder):
    x = draws(6, 4).float()
    nan = x.clone()
    nan[2, 1] = math.nan
    np.savez(folder / "two.npz", a=np.ones(3), b=np.ones(3))
    np.savez(folder / "whole.npz", x=np.ones((3, 4), np.int64))
    np.save(folder / "text.npy", np.array(["a", "b"]))
    np.save(folder / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (folder / "torn.npz").write_bytes(b"PK nothing")
    (folder / "torn.npy").write_bytes(b"nothing")
    (folder / "torn.safetensors").write_bytes(b"nothing")
    (folder / "a.pt").write_bytes(b"nothing")
    np.savez(folder / "labels.npz", x=x.numpy(), y=np.array([0, 1, 2, 3, 0, 9]))
    np.savez(folder / "few.npz", x=x.numpy(), y=np.zeros(6, np.int64))
    write(folder / "equal.npy", torch.ones(6, 4))
    for name, part in {"nan": nan, "empty": x[:0], "other": x[:, :3], "flat": x.flatten()}.items():
        write(folder / f"{name}.npy", part)
        write(folder / f"{name}.npz", part)
        write(folder / f"{name}.safetensors", part.contiguous())


@pytest.mark.parametrize(("name", "says"), [
    ("none.npz", "no such file"), ("two.npz", "holds a, b"), ("whole.npz", "int64; give floats"),
    ("text.npy", "give floats"),
    ("objects.npy", "not a readable .npy"), ("torn.npz", "not a readable .npz"), ("torn.npy", "not a readable .npy"),
    ("torn.safetensors", "damaged"), ("a.pt", "read from .npz, .npy and .safetensors"), ("labels.npz", "label 9"),
    ("few.npz", "no sample is of class 1"), ("equal.npy", "all are equal"),
    *((f"nan.{s}", "1 of 6 samples hold NaN or infinity, the first is sample 2")
      for s in ("npy", "npz", "safetensors")),
    *((f"empty.{s}", "no sample") for s in ("npy", "npz", "safetensors")),
    *((f"other.{s}", r"samples are \[3\], and the latents \[1, 2, 2\].*rows of 4 numbers") for s in ("npy", "npz")),
    ("flat.npy", "no sample"),
])
def test_bad_files_are_refused_in_one_line(tmp_path, name, says):
    bad_files(tmp_path)
    with pytest.raises(Refusal, match=says) as found:
        open_reference(f"samples:{tmp_path / name}", (1, 2, 2), classes=4)
    assert "\n" not in str(found.value)


def test_many_samples_are_thinned_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MOST", 50)
    file, told = write(tmp_path / "s.npy", draws(200, 2).float()), []
    assert len(flat(open_reference(f"samples:{file}", (2,), note=told.append)).means) == 50
    assert len(told) == 1 and "50 of 200" in told[0]


def test_thinned_samples_are_of_every_class(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "MOST", 50)
    x, y = draws(2000, 2).float(), torch.arange(2000) % 40
    file = tmp_path / "s.safetensors"
    save_file({"x": x, "y": y}, file)
    law = flat(open_reference(f"samples:{file}", (2,), classes=40))
    assert len(law.means) == 50 and law.labels.unique().tolist() == list(range(40))
    few = references.some(x, y % 2, 0, "", lambda _: None)          # where none would be missing, as without labels
    assert torch.equal(few[0], references.some(x, None, 0, "", lambda _: None)[0])


def test_the_bandwidth_foretells_each_sample_best_from_the_others():
    x = draws(60, 1)
    def foretold(h):
        return sum(float(Mixture(torch.cat([x[:i], x[i + 1:]]), torch.full((59,), h, dtype=F64)).log_density(
            x[i : i + 1], torch.zeros(1, dtype=F64))) for i in range(60))
    deviation = float(x.var(0, correction=0).sqrt())
    tried = deviation * torch.logspace(math.log10(0.02), math.log10(0.3), 16, dtype=F64)
    best = max(tried.tolist(), key=foretold)
    assert bandwidth(x) == pytest.approx(best)
    clusters = torch.cat([draws(400, 1), 30 + draws(400, 1, seed=1)])           # sharper than one Gaussian's
    assert bandwidth(clusters) < 0.03 * float(clusters.std())
    assert bandwidth(x[:1].repeat(2, 1) + torch.tensor([[0.0], [1.0]])) == pytest.approx(0.3 * 0.5)


# ---- the closed form at scale ----

def test_a_mixture_of_many_numbers_answers_as_in_double_precision():
    means, stds = draws(200, 400, seed=1), torch.full((200,), 0.02, dtype=F64)
    means[100:] = means[:100] + 0.002 * draws(100, 400, seed=3)         # pairs that hardly differ: softmax must weigh
    t = torch.full((64,), 0.01, dtype=F64)
    x = (0.99 * (means[:64] + 0.02 * draws(64, 400, seed=2)) + 0.01 * draws(64, 400, seed=4)).float()
    c = Linear().at(t)
    var = (c.alpha[:, None] * stds) ** 2 + c.sigma[:, None] ** 2
    means = means.float()
    distance2 = torch.stack([(x.double() - 0.99 * m.double()).square().sum(1) for m in means], 1)
    r = (-distance2 / (2 * var)).softmax(1)
    gain = 0.99 * stds**2 / var
    expected = (r * (1 - 0.99 * gain)) @ means.double() + (r * gain).sum(1, keepdim=True) * x.double()
    found = Mixture(means, stds.float())(x, t.float())
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=2e-6, rtol=0)
    assert ((r > 0.05).sum(1) == 2).float().mean() > 0.3
