"""The flow recipe: the shift of its data's dimension, whose latents it is of, and the nets it makes."""

from typing import Any

import pytest
import torch

import stillroom as package
from command import stillroom
from stillroom.data import Encoding, Latents, LatentSpace, encoding_card, write_latents
from stillroom.data.batch import Batch
from stillroom.flows import denoising_loss
from stillroom.nets import DDT, MLP, DiT, UNet
from stillroom.paths import Linear, LogitNormal, Shifted, Uniform, law_of, uniform_grid
from stillroom.recipes.flow import FlowMatching, Net, Settings, make_net, shift_of
from stillroom.settings import Refusal, from_mapping, to_mapping
from stillroom.train import Silent, fit, load_product, resume
from stillroom.train.turn import Noise, Turn
from stillroom.train.world import World


def settings(out="unused", **more):
    return Settings(**{"data": "given", "size": 4, "out": out, "net": "dit", "width": 16, "depth": 1, "patch": 1,
                       "batch": 4, "steps": 2, "precision": "float32", **more})


def latents(folder, channels=4):
    space = LatentSpace(channels, 8, (0.0,) * channels, (1.0,) * channels)
    x = torch.randn(12, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    write_latents(folder, [Batch(x, torch.arange(12) % 3)], Encoding(space, "c0dec", "centre 32"), ("a", "b", "c"))
    return Latents(folder)


@pytest.mark.parametrize(("shape", "shift"), [
    ((768, 16, 16), 48**0.5),           # RAE at 256 pixels: 6.93
    ((3, 64, 64), 3**0.5), ((1, 64, 64), 1.0), ((3, 32, 32), 1.0), ((2,), 1.0),
])
def test_the_shift_is_that_of_the_datas_dimension(shape, shift):
    assert shift_of(settings(), shape) == pytest.approx(shift)
    assert shift_of(settings(shift=1.0), shape) == 1.0 and shift_of(settings(shift=2.5), shape) == 2.5


def test_the_shift_reaches_training_and_sampling(tmp_path):
    """Data of 272 * 16 = 4352 numbers: both laws are shifted by the root of 4352/4096, and the card says so."""
    out = fit(FlowMatching, settings(tmp_path / "run"), Silent(), data=latents(tmp_path / "latents", 272))
    s = (4352 / 4096) ** 0.5
    flow, card = package.load(out), load_product(out).card
    assert card["shift"] == flow.shift == pytest.approx(s)
    recipe = FlowMatching(settings(), Latents(tmp_path / "latents"))
    u = torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(recipe.law.quantile(u), s * u / (1 + (s - 1) * u))
    seen = []
    flow.sample(1, steps=4, callback=lambda i, x, x0: seen.append(x))
    flow.denoiser.forward = lambda x, t, y=None, r=None: seen.append(t) or torch.zeros_like(x)
    seen.clear()
    flow.sampler = "euler"
    flow.sample(1, steps=4)
    torch.testing.assert_close(torch.cat(seen).double(), uniform_grid(4, s=s)[:-1], rtol=1e-6, atol=1e-6)


def test_a_law_of_no_shift_is_the_law_itself():
    assert law_of(settings().times, Linear(), 1.0) == Uniform()
    assert law_of(settings().times, Linear(), 2.0) == Shifted(Uniform(), 2.0)


@pytest.mark.parametrize(("more", "sampler"), [
    ({}, "heun"), ({"path": "ddpm"}, "dpmpp_2m"), ({"path": "ddpm", "sampler": "heun"}, "heun"),
])
def test_the_sampler_goes_with_the_path_unless_it_is_given(tmp_path, more, sampler):
    assert FlowMatching(settings(**more), latents(tmp_path / "latents")).flow().sampler == sampler


def test_what_the_sampler_comes_to_is_in_the_settings():
    assert [FlowMatching.settled(settings(**more)).sampler for more in ({}, {"path": "ddpm"})] == ["heun", "dpmpp_2m"]


def test_times_sampler_and_drop_are_those_of_the_settings(tmp_path):
    given = settings(times="logit-normal", shift=1.0, sampler="ddim", sampler_steps=7, drop=0.5)
    recipe = FlowMatching(given, latents(tmp_path / "latents"))
    flow = recipe.flow()
    assert (flow.sampler, flow.steps) == ("ddim", 7) and recipe.law == law_of("logit-normal", Linear(), 1.0)
    draw, x, y = torch.Generator().manual_seed(1), torch.randn(12, 4, 4, 4), torch.arange(12) % 3
    for p in recipe.model.parameters():         # one that begins at zero is deaf to labels
        p.data = 0.3 * torch.randn(p.shape, generator=draw)

    def turn():
        world = World(0, 1, torch.device("cpu"))
        return Turn(step=0, stage="train", roles=frozenset({"model"}), batch=12, micros=1, world=world,
                    noise=Noise(0, 0, world.device), micro=0, watched=False)

    by_hand = turn()
    t, eps, u = by_hand.draw(LogitNormal(), 12), by_hand.randn(x), by_hand.rand((12,))
    dropped = u < 0.5
    assert 0 < dropped.sum() < 12
    expected = denoising_loss(recipe.model, x, t, eps, y.masked_fill(dropped, recipe.null))
    told = recipe.losses({"data": Batch(x, y)}, turn())["model"]["flow"]
    assert torch.equal(told, expected)
    assert not torch.equal(told, denoising_loss(recipe.model, x, t, eps, y))


def test_an_open_shift_stays_open_in_a_settings_file():
    again = from_mapping(Settings, to_mapping(settings()), "file")
    assert again.shift is None and from_mapping(Settings, to_mapping(settings(shift=2.0)), "file").shift == 2.0
    with pytest.raises(Refusal, match=r"shift: 0\.0 must be above 0"):
        from_mapping(Settings, to_mapping(settings(shift=0.0)), "file")


def test_a_flow_of_latents_says_whose_latents(tmp_path):
    store = latents(tmp_path / "latents")
    out = fit(FlowMatching, settings(tmp_path / "run"), Silent(), data=store)
    card = load_product(out).card
    assert card["encoding"] == encoding_card(store)["encoding"] and card["encoding"]["codec"] == "c0dec"
    pixels = fit(FlowMatching, settings(tmp_path / "pixels"), Silent(), data=torch.randn(8, 1, 4, 4))
    assert "encoding" not in load_product(pixels).card


def test_a_wide_head_is_trained_and_goes_on_where_it_was(tmp_path):
    store = latents(tmp_path / "latents")
    out = fit(FlowMatching, settings(tmp_path / "run", net="ddt", steps=4, checkpoint_every=2), Silent(), data=store)
    whole = package.load(out)
    assert isinstance(whole.denoiser.net, DDT) and whole.denoiser.net.head_position.shape == (16, 32)
    (out / "checkpoints").rename(out / "gone")
    state = {k: v.clone() for k, v in whole.state_dict().items()}
    again = package.load(resume(out, lambda _name: FlowMatching, {"data": store}, Silent()))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize(("net", "shape", "kind"), [
    ("unet", (3, 8, 8), UNet), ("dit", (3, 8, 8), DiT), ("ddt", (3, 8, 8), DDT), ("ddt", (5,), MLP),
])
def test_the_net_of_a_name_takes_labels_and_strengths(net, shape, kind):
    given: dict[str, Any] = {"data": "given", "size": 8, "out": "unused", "steps": 1, "net": net}
    made: Any = make_net(Net(**given, width=32, head_width=64), shape, 3, True)
    assert isinstance(made, kind) and (made.classes, made.guided) == (3, True)
    x, t = torch.randn(2, *shape), torch.tensor([0.2, 0.7])
    assert torch.equal(made(x, t, torch.tensor([0, 3]), w=torch.tensor([1.0, 2.0])), torch.zeros_like(x))


def test_heads_divide_their_width():
    torch.manual_seed(0)
    for width, head in ((16, None), (48, 80), (100, 36)):
        net: Any = make_net(settings(net="ddt", width=width, head_width=head), (4, 4, 4), None)
        assert net.head_position.shape[1] == (head or 2 * width)
    with pytest.raises(ValueError, match="head_width 30"):
        make_net(settings(net="ddt", head_width=30), (4, 4, 4), None)


def test_a_finished_run_that_is_resumed_leaves_the_same_card(tmp_path):
    given = settings(tmp_path / "run", size=1, steps=3, batch=8, width=8, depth=1, precision="float32")
    x = torch.randn(20, 2)
    cards = [load_product(fit(FlowMatching, given, Silent(), data=x) / "product").card for _ in range(2)]
    assert cards[0] == cards[1] and "gate" in cards[0]


def test_a_plan_of_latents_that_are_not_there_is_refused(tmp_path):
    told = stillroom("train flow --codec bundled --data photos --size 32 --plan --out", tmp_path / "run")
    assert told.code == 2 and "stillroom cache" in told.err and told.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
