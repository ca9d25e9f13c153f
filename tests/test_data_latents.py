"""Latent stores: round trip, resuming, and every kind of damage."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stillroom.data import Batch, Encoding, Latents, LatentSpace, latents, open_source, write_latents
from stillroom.settings import Images, Refusal

SPACE = LatentSpace(2, 8, (0.5, -1.0), (2.0, 0.25))
MADE = Encoding(SPACE, codec="abc", crop="centre 64")
Z = torch.randn(23, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 3
Y = torch.arange(23) % 3
NAMES = ("a", "b", "c")


def batches(size=5, z=Z):
    return lambda start: (Batch(z[i:i + size], Y[i:i + size]) for i in range(start, len(z), size))


def store(folder, **how):
    return write_latents(folder, **{"batches": batches(), "encoding": MADE, "classes": NAMES, "per_shard": 8, **how})


def test_normalising_is_the_stated_formula_and_inverts():
    z = SPACE.normalise(Z.double())
    assert torch.equal(z[:, 0], (Z[:, 0].double() - 0.5) / 2) and torch.equal(z[:, 1], (Z[:, 1].double() + 1) / 0.25)
    assert torch.allclose(SPACE.denormalise(z), Z.double(), atol=1e-14)
    tokens = Z.flatten(2).transpose(1, 2)                                           # [B, C, H, W] -> [B, N, C]
    assert torch.equal(SPACE.normalise(tokens), SPACE.normalise(Z).flatten(2).transpose(1, 2))
    with pytest.raises(ValueError, match="2 channels"):
        SPACE.normalise(torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(("shift", "scale", "says"), [
    ((0.0,), (1.0, 1.0), "1 shifts"), ((0.0, 0.0), (1.0, 0.0), "above 0"), ((0.0, float("nan")), (1.0, 1.0), "finite"),
])
def test_a_space_is_checked(shift, scale, says):
    with pytest.raises(Refusal, match=says):
        LatentSpace(2, 8, shift, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    source = Latents(store(tmp_path / "s", batches=batches(z=Z.to(dtype))), expect=MADE)
    order = [22, 0, 7, 8, 16, 7]
    x, y = source.fetch(order, 0)
    assert x.dtype == torch.float32 and torch.equal(x, SPACE.normalise(Z.to(dtype).float()[order]))
    assert y is not None and torch.equal(y, Y[order])
    assert len(source) == 23 and source.shape == (2, 3, 3) and source.classes == NAMES and source.space == SPACE
    files = sorted(f.name for f in (tmp_path / "s").iterdir())
    assert files == [f"latents-0000{i}.safetensors" for i in range(3)] + ["latents.json"]


def test_the_cut_into_shards_and_batches_changes_nothing(tmp_path):
    x = SPACE.normalise(Z)
    for size, per_shard in ((1, 23), (23, 1), (7, 5), (4, 100)):
        folder = store(tmp_path / f"{size}-{per_shard}", batches=batches(size), per_shard=per_shard)
        assert torch.equal(Latents(folder).fetch(range(23), 0).x, x)


def test_no_labels(tmp_path):
    folder = store(tmp_path / "s", batches=[Batch(Z)], classes=None)
    assert Latents(folder).fetch([1], 0).y is None and Latents(folder).classes is None


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("lazy", [True, False])
def test_an_interrupted_writer_goes_on_after_its_last_shard(tmp_path, lazy):
    folder, starts = tmp_path / "s", []

    def until(start, stop):
        starts.append(start)
        for i in range(start, len(Z)):
            if i == stop:
                raise Interrupted
            yield Batch(Z[i:i + 1], Y[i:i + 1])

    for stop in (9, 18, None):
        data = (lambda start, stop=stop: until(start, stop)) if lazy else until(0, stop)
        if stop is None:
            store(folder, batches=data)
        else:
            with pytest.raises(Interrupted):
                store(folder, batches=data)
            with pytest.raises(Refusal, match=r"no latents\.json"):
                Latents(folder)
    assert starts == ([0, 8, 16] if lazy else [0, 0, 0])
    assert torch.equal(Latents(folder).fetch(range(23), 0).x, SPACE.normalise(Z))
    store(folder, batches=lambda start: pytest.fail("a whole store is not written again"))


def test_two_processes_may_write_one_store_at_once(tmp_path, monkeypatch):
    """As two runs with one cache do that begin together. The second one writes while a file of the first is open."""
    processes = [1, 2]
    monkeypatch.setattr("os.getpid", lambda: processes[0])

    def write(*args, **how):
        save_file(*args, **how)
        if len(processes) > 1:
            first = processes.pop(0)
            store(tmp_path / "s")
            processes[0] = first

    monkeypatch.setattr(latents, "save_file", write)
    assert torch.equal(Latents(store(tmp_path / "s")).fetch(range(23), 0).x, SPACE.normalise(Z))
    assert len(list((tmp_path / "s").iterdir())) == 4


def test_another_space_or_origin_is_not_mixed_in(tmp_path):
    def interrupted(start):
        yield Batch(Z[:8], Y[:8])
        raise Interrupted

    other = Encoding(SPACE, codec="xyz", crop="centre 64")
    with pytest.raises(Interrupted):
        store(tmp_path / "s", batches=interrupted, origin="photos")
    for how in ({"encoding": other, "origin": "photos"}, {"origin": "cats"}, {"origin": "photos", "per_shard": 9}):
        with pytest.raises(Refusal, match=r"another (codec|origin|per_shard)"):
            store(tmp_path / "s", **how)
    store(tmp_path / "s", origin="photos")
    with pytest.raises(Refusal, match="another origin"):
        store(tmp_path / "s", origin="cats")


def test_an_unexpected_space_is_refused_by_field(tmp_path):
    folder = store(tmp_path / "s")
    with pytest.raises(Refusal, match="codec 'abc' is not 'xyz'"):
        Latents(folder, expect=Encoding(SPACE, codec="xyz", crop="centre 64"))
    with pytest.raises(Refusal, match=r"scale \(2.0, 0.25\) is not \(1.0, 0.25\)"):
        scaled = Encoding(LatentSpace(2, 8, (0.5, -1.0), (1.0, 0.25)), "abc", "centre 64")
        Latents(folder, expect=scaled)
    assert len(Latents(folder, expect=MADE)) == 23
    with pytest.raises(Refusal, match="leave out flip"):
        open_source(Images(data=str(folder), size=64, flip=True))


@pytest.mark.parametrize(("changes", "says"), [
    ({"batches": []}, "no latents to write"),
    ({"classes": None}, "come together"),
    ({"classes": ("a", "b")}, "out of range"),
    ({"batches": [Batch(Z[:3], Y[:3]), Batch(Z[:3])]}, "some batches have labels"),
    ({"batches": batches(z=torch.cat([Z[:9], Z[:1] / 0]))}, "latent 9 holds NaN or infinity"),
])
def test_what_must_not_be_written(tmp_path, changes, says):
    with pytest.raises(Refusal, match=says):
        store(tmp_path / "s", **changes)
    assert not (tmp_path / "s" / "latents.json").exists()


def damage(folder, kind):
    shard, index = folder / "latents-00001.safetensors", folder / "latents.json"
    tensors, card = load_file(shard), json.loads(index.read_text())
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif kind == "header":
        shard.write_bytes(b"\xff" * 100)
    elif kind == "short":
        save_file({k: v[:-1].clone() for k, v in tensors.items()}, shard)
    elif kind == "shape":
        save_file({**tensors, "x": tensors["x"][:, :, :2].clone()}, shard)
    elif kind == "label":
        save_file({**tensors, "y": tensors["y"] + 2}, shard)
    elif kind == "no y":
        save_file({"x": tensors["x"]}, shard)
    elif kind == "field":
        index.write_text(json.dumps({k: v for k, v in card.items() if k != "space"}))
    elif kind == "json":
        index.write_text(index.read_text()[:50])
    elif kind == "nan":
        tensors["x"][3, 0, 1, 1] = float("nan")
        save_file(tensors, shard)


@pytest.mark.parametrize(("kind", "says"), [
    ("missing", "latents-00001.safetensors: is missing"), ("truncated", "damaged or truncated"),
    ("header", "damaged or truncated"), ("short", r"'x' is \(7, 2, 3, 3\), not \(8, 2, 3, 3\)"), ("shape", "'x' is"),
    ("label", "out of range"), ("no y", "'y' is missing"), ("field", "'space'"), ("json", "is not JSON"),
])
def test_damage_is_named_when_the_store_is_opened(tmp_path, kind, says):
    damage(store(tmp_path / "s"), kind)
    with pytest.raises(Refusal, match=says):
        Latents(tmp_path / "s")


def test_nan_is_named_when_it_is_read(tmp_path):
    damage(store(tmp_path / "s"), "nan")
    source = Latents(tmp_path / "s")
    assert source.fetch([10, 12], 0).x.isfinite().all()
    with pytest.raises(Refusal, match=r"latents-00001\.safetensors: latent 11 holds NaN"):
        source.fetch([0, 11], 0)


def test_a_store_has_no_splits(tmp_path):
    store(tmp_path / "latents")
    assert len(open_source(Images(data=f"{tmp_path}/latents:train", size=3))) == 23
    with pytest.raises(Refusal, match="has no split 'test'"):
        open_source(Images(data=f"{tmp_path}/latents:test", size=3))
