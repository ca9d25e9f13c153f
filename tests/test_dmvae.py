"""The recipe dmvae: what pulls at latents, who moves when, what is decoded, what comes of it, and what a user can get
wrong."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Normal, kl_divergence

import stillroom as package
from command import refused, stillroom
from pipelines import folder_of, prompts_file
from stepping import same, state, steps_of, stopped_at, trainer_of
from stillroom import match
from stillroom.codecs import Codec, fingerprint
from stillroom.codecs.tokens import TokenEncoder
from stillroom.data import Batch, Tensors, open_source, sample
from stillroom.flows import Denoiser, Flow, denoising_loss
from stillroom.flows.references import gaussian
from stillroom.judge import codecs as comparison
from stillroom.judge.asked import OfCodecs
from stillroom.judge.pictures import pictures_of
from stillroom.nets import MLP, Lora
from stillroom.paths import Linear, Shifted, Uniform, dimension_shift, law_of
from stillroom.recipes._masking import Own
from stillroom.recipes._shaping import ByCritic, ByDrift, ByScores, divergence, fake_of
from stillroom.recipes.dmvae import DMVAE, ScoreNet, Settings
from stillroom.recipes.flow import FlowMatching
from stillroom.recipes.flow import Settings as FlowSettings
from stillroom.recipes.tokenizer import Settings as TokenizerSettings
from stillroom.recipes.tokenizer import Tokenizer
from stillroom.settings import Images, Optimizer, Refusal
from stillroom.train import Product, Silent, fit, load_product, read_run, save_product
from stillroom.train.folder import read_rows
from test_docs import blocks

ROOT = Path(__file__).parents[1]
RATE = Optimizer(lr=1e-3)
FLOW = "--net dit --width 32 --depth 1 --patch 1 --steps 400 --batch 64 --precision float32 --model.lr 3e-3 --quiet"
TINY = {"data": "given", "size": 8, "batch": 8, "precision": "float32", "log_every": 1, "perceptual": 0.0, "every": 3,
        "fake_steps": 2, "decoder_steps": 2, "steps": 6, "critic_width": 8, "model": RATE, "decoder": RATE,
        "score": RATE, "score_net": ScoreNet(width=16, depth=1)}


@pytest.fixture(scope="module")
def data():
    return sample(open_source(Images(data="digits", size=8)), 120, 0)


@pytest.fixture(scope="module")
def x(data):
    return data.x


def tokenizer(out, x, **more):
    settings = TokenizerSettings(**{"data": "given", "size": 8, "patch": 4, "batch": 8, "precision": "float32",
                                    "perceptual": 0.0, "latent": 3, "encoder": "conv", "params": 9000,
                                    "decoder_params": 9000, "statistics_pictures": 64, "steps": 120,
                                    "model": Optimizer(lr=4e-3), "average": 0.9, "out": out, **more})
    return str(fit(Tokenizer, settings, Silent(), data=x))


@pytest.fixture(scope="module")
def codec(tmp_path_factory, x):
    return tokenizer(tmp_path_factory.mktemp("codec") / "run", x)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory, x):
    """One whose encoder answers variances too."""
    return tokenizer(tmp_path_factory.mktemp("codec") / "run", x, kl=1e-3)


@pytest.fixture(scope="module")
def flow(tmp_path_factory, codec, data):
    """Of the codec's latents, with classes; it passes the gate because half of its work is done for it."""
    home = tmp_path_factory.mktemp("flow")
    settings = FlowSettings(data="digits", size=8, codec=codec, net="dit", width=32, depth=1, patch=1, steps=150,
                            batch=64, precision="float32", model=Optimizer(lr=3e-3), out=home / "run")
    return str(fit(FlowMatching, settings, Silent()))


def settings(out, codec, **more):
    given = {**TINY, "out": out, "codec": codec, "reference": "gaussian", **more}
    idle = ["score_net"] if given.get("match") in ("drifting", "adversarial", "kl", "teacher") else []
    idle += ["every", "fake_steps"] if given.get("match") in ("drifting", "kl", "teacher") else []
    for name in idle:                               # there is nothing that they are of, and they would be refused
        if name not in more:
            del given[name]
    return Settings(**given)


def trained(out, x, codec, **more):
    return fit(DMVAE, settings(out, codec, **more), Silent(), data=x)


class Draws:
    """Stands for a turn, of every role, whose noise can be drawn again."""

    def __init__(self, seed=0):
        self.draws, self.told = torch.Generator().manual_seed(seed), {}

    def __contains__(self, role):
        return True

    def draw(self, law):
        return law.quantile(torch.rand(6, generator=self.draws))

    def randn(self, like):
        return torch.randn(like.shape, generator=self.draws)

    def rand(self, shape, shared=False):
        return torch.rand(shape, generator=self.draws)

    def gather(self, x):
        return x

    def tell(self, name, value):
        self.told[name] = value


# ---- what pulls ----


def scores(**more):
    torch.manual_seed(0)
    reference = gaussian((4,))
    fake = Denoiser(MLP(4, 8, 1), Linear(), "v")
    torch.nn.init.normal_(fake.net.final.weight, std=0.3)       # pyright: ignore
    given = {"push": 1.0, "pull": 1.0, "guidance": (1.0, 1.0)} | more
    return ByScores(reference, fake, Uniform(0.1, 0.9), given["push"], given["pull"], given["guidance"], RATE)


@pytest.mark.parametrize("push, pull", match.MATCHES.values(), ids=match.MATCHES)
def test_latents_are_pulled_as_generated_samples_are(push, pull):
    """DMD's gradient in x0, by hand: w (F - T), or one of the scores alone."""
    shaped, z = scores(push=push, pull=pull), torch.randn(6, 4, requires_grad=True)
    shaped.pulls(z, None, Draws()).sum().backward()
    draws = Draws()
    t, eps = draws.draw(shaped.law), draws.randn(z)
    z_t = (1 - t)[:, None] * z.detach() + t[:, None] * eps
    with torch.no_grad():
        fake, real = shaped.fake.x0(z_t, t), shaped.reference.denoiser.x0(z_t, t)
    w = 1 / (z.detach() - real).abs().mean(1, keepdim=True)
    torch.testing.assert_close(z.grad, w * (push * (fake - z.detach()) + pull * (z.detach() - real)) / 4, rtol=1e-4,
                               atol=1e-5)


def test_a_fake_score_that_is_the_reference_pulls_at_nothing():
    shaped = scores()
    shaped.real = shaped.guided_fake
    z = torch.randn(6, 4, requires_grad=True)
    shaped.pulls(z, None, Draws()).sum().backward()
    assert z.grad is not None and not z.grad.any()


def test_adapters_move_the_fake_score_and_not_the_reference():
    torch.manual_seed(0)
    net = MLP(4, 16, 2, classes=3)
    torch.nn.init.normal_(net.final.weight, std=0.3)
    reference = Flow(Denoiser(net, Linear(), "v"), (4,))
    z, t, y = torch.randn(5, 4), torch.rand(5), torch.tensor([0, 1, 2, 0, 1])
    before = reference.denoiser(z, t, y)
    fake = fake_of(reference, True, None, rank=2)
    shaped = ByScores(reference, fake, Uniform(0.1, 0.9), 1.0, 1.0, (2.0, 1.0), RATE)
    assert {n for n, p in fake.named_parameters() if p.requires_grad} == {
        n for n, _ in fake.named_parameters() if "lora_" in n}
    optimizer = torch.optim.Adam([p for p in fake.parameters() if p.requires_grad], 1e-2)
    for _ in range(20):
        denoising_loss(fake, z, t, torch.randn(5, 4), y).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float((shaped.guided_fake(z, t, y) - before).detach().abs().max()) > 0.05
    with shaped.bare():
        torch.testing.assert_close(shaped.fake(z, t, y), before)
        null = shaped.fake(z, t, torch.full((5,), 3))
        torch.testing.assert_close(shaped.real(z, t, y), null + 2 * (before - null))
    assert isinstance(fake.net, Lora) and shaped.real.denoiser is fake


def test_a_mixture_of_both_scores_pulls_by_two_numbers(tmp_path, x, codec):
    mixed = DMVAE(settings(tmp_path / "no", codec, match="mix:0.5:1"), Tensors(x)).shaped
    half = DMVAE(settings(tmp_path / "no", codec, match="half"), Tensors(x)).shaped
    other = DMVAE(settings(tmp_path / "no", codec, match="mix:.25:2"), Tensors(x)).shaped
    assert [(s.push, s.pull) for s in (mixed, half, other)] == [(0.5, 1.0), (0.5, 1.0), (0.25, 2.0)]
    out = trained(tmp_path / "run", x, codec, match="mix:0.5:1")
    assert "codec/mix" in read_rows(out / "metrics.jsonl")[5]


def test_where_nothing_pushes_no_fake_score_is_built_trained_or_asked(tmp_path, x, codec):
    out = trained(tmp_path / "run", x, codec, match="teacher")
    rows, run = read_rows(out / "metrics.jsonl"), json.loads((out / "run.json").read_text())
    assert all("codec/teacher" in row for row in rows[:6])                      # it waits for no fake score
    assert not any(name.startswith("fake/") for row in rows for name in row)
    assert "fake" not in run["evaluations"] and [r["stage"] for r in rows] == ["match"] * 6 + ["decoder"] * 2
    alone, beside = scores(push=0.0), scores(push=0.0)      # which pulls as it did beside a fake score
    alone = ByScores(alone.reference, None, alone.law, 0.0, 1.0, (1.0, 1.0), RATE)
    found = []
    for shaped in (alone, beside):
        z = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
        shaped.pulls(z, None, Draws()).sum().backward()
        found.append(z.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_the_law_of_times_is_a_setting(tmp_path, x, codec):
    u = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    given = {"times": (0.1, 0.7)}
    for name in ("uniform", "logit-normal"):
        recipe = DMVAE(settings(tmp_path / "no", codec, time_law=name, **given), Tensors(x))
        s = max(recipe.reference.shift, dimension_shift(recipe.before[0].numel()))
        assert torch.equal(recipe.law().quantile(u), law_of(name, Linear(), s, 0.1, 0.7).quantile(u))
        assert (recipe.shaped.law.quantile(u) == Shifted(Uniform(0.1, 0.7), s).quantile(u)).all() == (name == "uniform")


@pytest.mark.parametrize("classes", [2, None])
def test_a_critic_of_latents_that_knows_classes_tells_those_in_another_ones_place(classes):
    """Two that have changed places: all together they are at the reference already."""
    torch.manual_seed(0)
    every, places, draws = torch.arange(600) % 2, torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), Draws()
    shaped = ByCritic(places[every] + 0.3 * torch.randn(600, 2), 32, Optimizer(lr=5e-3), classes, classes)
    mine = torch.arange(64) % 2
    y = None if classes is None else mine
    z = -places[mine] + 0.3 * torch.randn(64, 2)
    if y is not None:
        assert torch.equal(every[shaped.of_class(torch.rand(64), y)], y)
    optimizer = torch.optim.Adam(shaped.critic.parameters(), 5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        shaped.tracks(z, y, draws)["fake"]["hinge"].mean().backward()
        optimizer.step()
    told = float((shaped.pulls(places[mine], y, draws) - shaped.pulls(z, y, draws)).detach().mean())
    assert told < -1.5 if classes else abs(told) < 0.3


def test_one_law_for_all_classes_is_asked_by_the_null_label():
    seen = []

    class Watched(Denoiser):
        def forward(self, x_t, t, y=None, r=None):
            seen.append(y)
            return super().forward(x_t, t, y, r)

    reference = Flow(Watched(MLP(4, 8, 1, classes=3), Linear(), "v"), (4,))
    fake = Denoiser(MLP(4, 8, 1), Linear(), "v")
    shaped = ByScores(reference, fake, Uniform(0.1, 0.9), 1.0, 1.0, (1.0, 1.0), RATE)
    shaped.pulls(torch.randn(6, 4), None, Draws())
    assert [y.tolist() for y in seen] == [[3] * 6]


@pytest.mark.parametrize("shaped", [
    lambda samples: ByDrift(samples), lambda samples: ByCritic(samples, 32, Optimizer(lr=5e-3)), None,
], ids=["drifting", "adversarial", "gap"])
def test_points_come_nearer_to_the_reference(shaped):
    """One cloud for all: it knows nothing of encoders."""
    torch.manual_seed(0)
    samples = torch.randn(500, 4)
    shaped = scores() if shaped is None else shaped(samples)
    z = torch.nn.Parameter(0.3 * torch.randn(6, 4) + 2)
    far, draws = float(z.detach().mean()), Draws(1)
    mine = torch.optim.Adam([z], 0.05)
    theirs = [torch.optim.Adam(role.module.parameters(), role.optimizer.lr * 3) for role in shaped.roles().values()]
    for step in range(90):
        for terms in shaped.tracks(z.detach(), None, draws).values():
            theirs[0].zero_grad()
            torch.stack([term.mean() for term in terms.values()]).sum().backward()
            theirs[0].step()
        if step >= 50:                              # what is tracked is known first
            mine.zero_grad()
            shaped.pulls(z, None, draws).mean().backward()
            mine.step()
    assert abs(float(z.detach().mean())) < far / 2


# ---- who moves when ----


def test_only_steps_that_move_the_codec_decode(tmp_path, x, codec, monkeypatch):
    given = settings(tmp_path / "no", codec, decoder_steps=0)
    recipe = DMVAE(given, Tensors(x))
    trainer, decoded, moved, tracked = trainer_of(recipe, given), [], [], []
    decode = recipe.codec.decode
    monkeypatch.setattr(recipe.codec, "decode", lambda z: decoded.append(trainer.step) or decode(z))
    assert isinstance(recipe.shaped, ByScores)
    before = state(recipe.codec), state(recipe.shaped.fake)
    for step in steps_of(trainer, 8):
        now = state(recipe.codec), state(recipe.shaped.fake)
        moved += [step - 1] if not same(now[0], before[0]) else []
        tracked += [step - 1] if not same(now[1], before[1]) else []
        before = now
    assert decoded == [2, 5]                        # the codec's turns: the last of each three steps
    assert moved == [2, 5] and tracked == [0, 1, 2, 3, 4, 5, 6]


def test_the_critic_of_pictures_moves_whenever_there_are_pictures(tmp_path, x, codec):
    given = settings(tmp_path / "no", codec, adversarial=0.5, critic_from=0.0, adversarial_from=0.0, decoder_steps=3)
    recipe = DMVAE(given, Tensors(x))
    trainer, before, moved = trainer_of(recipe, given), state(recipe.critic), []
    for step in steps_of(trainer, 11):
        now = state(recipe.critic)
        moved += [step - 1] if not same(now, before) else []
        before = now
    moved += [10] if not same(state(recipe.critic), before) else []
    assert moved == [2, 5, 8, 9, 10]        # with the codec, every third; and all of the decoder's


@pytest.mark.parametrize("kind", ["own", "transformers"])
def test_with_tokens_everything_is_live(tmp_path, x, kind):
    """The trunk was frozen while its tokenizer learned: every tensor of it moves here, beside bottleneck, decoder, fake
    score and critic."""
    more = {"encoder": "own", "encoder_steps": 20, "own": Own(width=16, depth=1, heads=2, painter_width=16,
                                                              painter_depth=1)}
    if kind == "transformers":
        transformers = pytest.importorskip("transformers")
        config = transformers.Dinov2WithRegistersConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
                                                        image_size=28, patch_size=7)
        transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "dino")
        more = {"encoder": str(tmp_path / "dino")}
    begun = tokenizer(tmp_path / "codec", x, **more)
    given = settings(tmp_path / "no", begun, adversarial=0.5, critic_from=0.0, adversarial_from=0.0, every=1)
    recipe = DMVAE(given, Tensors(x))
    trunk = recipe.codec.encoder.trunk
    assert isinstance(trunk, TokenEncoder) == (kind == "transformers")
    parts = {"trunk": trunk, "codec": recipe.codec, "fake": recipe.shaped.fake, "critic": recipe.critic}
    before = {name: {k: p.detach().clone() for k, p in part.named_parameters()} for name, part in parts.items()}
    for _ in steps_of(trainer_of(recipe, given), 6):
        pass
    for name, part in parts.items():
        still = [k for k, p in part.named_parameters() if torch.equal(p, before[name][k])]
        # No token is masked here; and on the critic's last bias both sides of a hinge that is not met pull alike.
        assert [k for k in still if "mask_token" not in k and (name, k) != ("critic", "layers.8.bias")] == [], name


def test_the_decoder_is_tuned_to_the_average_encoder_which_stays(tmp_path, x, codec):
    given = settings(tmp_path / "no", codec, average=0.5)
    recipe = DMVAE(given, Tensors(x))
    trainer = trainer_of(recipe, given)
    for step in steps_of(trainer, 10):
        if step == 8:
            average = state(recipe.mean.module)
    assert same(state(recipe.codec.encoder), {k.removeprefix("encoder."): v for k, v in average.items()
                                              if k.startswith("encoder.")})
    after = state(recipe.mean.module)
    assert all(torch.equal(after[k], v) for k, v in average.items() if k.startswith("encoder."))
    assert not all(torch.equal(after[k], v) for k, v in average.items() if k.startswith("decoder."))


@pytest.mark.parametrize("more", [
    {"adversarial": 0.5, "critic_from": 0.0, "adversarial_from": 0.5}, {"match": "adversarial"}, {"match": "drifting"},
    {"reference": "gmm:4"},
], ids=str)
def test_a_run_that_was_stopped_goes_on_to_the_same_product(tmp_path, x, codec, more):
    more = {**more, "checkpoint_every": 1, "keep": 20}
    whole = trained(tmp_path / "a", x, codec, **more)
    for stop in (1, 4, 7):
        with stopped_at(stop):
            trained(tmp_path / "b", x, codec, **more)
    one, two = (package.load(run) for run in (whole, trained(tmp_path / "b", x, codec, **more)))
    assert one.space == two.space and same(one.state_dict(), two.state_dict())


# ---- what comes of it ----


def test_the_products_latents_are_normalised_and_distances_told_beside_their_floor(tmp_path, x, codec):
    out = trained(tmp_path / "run", x, codec)
    mine, theirs = package.load(out), package.load(codec)
    z = mine.encode(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.2, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.2, rtol=0)
    assert mine.space != theirs.space
    card = json.loads((out / "product/product.json").read_text())["card"]
    assert card["codec_hash"] == fingerprint(theirs) and card["reference"] == "gaussian"
    assert set(card["distance"]) == {"before", "after", "reference to itself"}
    assert card["distance"]["reference to itself"]["sliced_w2"] < card["distance"]["before"]["sliced_w2"]
    assert card["reconstruction"]["before"]["pictures"] == card["reconstruction"]["after"]["pictures"] == 12


def test_the_ordinary_vae_is_a_pull_too(tmp_path, x, drawing):
    out = trained(tmp_path / "run", x, drawing, match="kl")
    rows = read_rows(out / "metrics.jsonl")
    assert "codec/kl" in rows[2] and not any(name.startswith("fake/") for row in rows for name in row)


def test_its_pull_is_the_divergence_from_the_unit_normal(tmp_path, x, drawing):
    g = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(5, 3, 2, 2, generator=g), torch.randn(5, 3, 2, 2, generator=g)

    def by_hand(mean, logvar):
        return kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0 * mean, 1 + 0 * mean)).flatten(1).mean(1)

    torch.testing.assert_close(divergence(mean, logvar), by_hand(mean, logvar))
    recipe = DMVAE(settings(tmp_path / "no", drawing, match="kl", weight=0.3), Tensors(x))
    turn = Draws()
    turn.stage = "match"
    told = recipe.losses({"data": Batch(x[:6], None)}, turn)["codec"]["kl"]
    mean, logvar = recipe.codec.posterior(x[:6].expand(-1, 3, -1, -1))
    torch.testing.assert_close(told, 0.3 * by_hand(mean, logvar))


def test_a_trained_flow_is_a_reference_and_so_is_its_adapter(tmp_path, codec, flow, data):
    itself = []
    for fake in ("full", "lora"):
        out = trained(tmp_path / fake, (data.x, data.y), codec, reference=flow, fake=fake, guidance=2.0,
                      fake_guidance=2.0, score=Optimizer(lr=1e-2), **({"rank": 2} if fake == "lora" else {}))
        assert "codec/gap" in read_rows(out / "metrics.jsonl")[5]
        itself.append(load_product(out / "product").card["distance"]["reference to itself"])
    assert itself[0] == pytest.approx(itself[1], rel=1e-4)      # adapters that learned are not the reference
    trained(tmp_path / "noised", data.x, codec, reference=f"noised:0.3:{flow}", conditional=False)


def test_samples_of_anything_are_a_reference(tmp_path, x, codec):
    save_file({"x": torch.randn(50, 12)}, tmp_path / "embeddings.safetensors")
    reference = f"samples:{tmp_path}/embeddings.safetensors"
    assert (trained(tmp_path / "run", x, codec, reference=reference) / "product").is_dir()
    save_file({"x": torch.randn(5100, 12)}, tmp_path / "embeddings.safetensors")
    told = stillroom("distill dmvae --codec", codec, "--data digits --size 8 --steps 3 --batch 8 --fake-steps 1 "
                     "--decoder-steps 1 --perceptual 0 --precision float32 --score-net.width 16 --score-net.depth 1 "
                     "--out", tmp_path / "many", "--reference", reference)
    assert told.code == 0 and "5000 of 5100 samples" in told.out + told.err


@pytest.mark.filterwarnings("ignore")       # of transformers, which go with every release
def test_the_pages_examples_of_references_run(tmp_path, monkeypatch, codec, drawing):
    """Text embeddings of a tiny pipeline, another codec's latents, and a flow of those."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    text, theirs = blocks((ROOT / "docs/recipes/dmvae.md").read_text(), "python")
    prompts = prompts_file(tmp_path / "texts.txt", [f"{a} {b}" for a in ("a red", "the blue", "one", "some")
                                                    for b in ("cat", "dog", "house", "tree")])
    told = stillroom("cache --prompts", prompts, "--teacher", folder_of("sdxl", tmp_path / "sdxl"),
                     "--size 64 --out prompts")
    assert told.code == 0, told.err
    exec(text.replace("4 * 8 * 8", "3 * 2 * 2"), {})
    x = load_file("text.safetensors")["x"]
    assert x.shape == (16, 12) and torch.allclose(x.T @ x / 16, torch.eye(12), atol=1e-4)
    for words in ("cache --out theirs", f"train flow --out other {FLOW}"):
        told = stillroom(words, "--data digits --size 8 --codec", drawing)
        assert told.code == 0, told.err
    exec(theirs, {})
    other = load_file("theirs.safetensors")
    z = package.load(drawing).encode(open_source(Images(data="digits", size=8)).fetch(range(20), 0).x)
    assert torch.allclose(other["x"][:20], z, atol=1e-4) and other["y"][:20].max() < 10
    for i, reference in enumerate(("samples:text.safetensors", "samples:theirs.safetensors", "other --foreign")):
        told = stillroom("distill dmvae --codec", codec, "--data digits --size 8 --steps 3 --batch 8 --fake-steps 1 "
                         "--decoder-steps 1 --perceptual 0 --precision float32 --quiet --out", f"run{i} --reference",
                         reference)
        assert told.code == 0, told.err


# ---- how it is compared ----


class HeldOut:
    """Stands for the held-out latents of a codec."""

    def __init__(self, z, some):
        self.held, self.some = Batch(z, None), lambda: Batch(some, None)


def exactly(run, base, seed=5):
    """The run's product in other units, and draws of its reference as that codec's latents."""
    recipe = DMVAE(read_run(run, lambda _: DMVAE)[1], open_source(Images(data="digits", size=8)))
    w, product, begun = recipe.reference.sample(700, seed), load_product(run), package.load(base).space
    codec = package.load(run)
    space = replace(begun, shift=tuple(m + 0.4 for m in begun.shift), scale=tuple(1.5 * s for s in begun.scale))
    other = run.parent / "exact"
    save_product(Product("codec", {"codec": Codec(codec.encoder, codec.decoder, space)}, product.card), other)
    return other, space.normalise(begun.denormalise(w))


def compared(place, z, out, **more):
    asked = OfCodecs(data="digits", size=8, out=out, device="cpu", **more)
    learned, held, _ = pictures_of(asked)
    entry = comparison.opened([f"it={place}"], asked, learned)[0]
    table = SimpleNamespace(learned=learned, held=held, settings=asked, device=torch.device("cpu"))
    return comparison.to_reference(entry.reference, entry, table, HeldOut(z, z), lambda text: None)


@pytest.mark.parametrize("reference", ["gmm:4", "noised:0.3", "flow"])
def test_a_product_that_is_its_reference_is_compared_at_the_floor(tmp_path, codec, flow, reference):
    """Its mixture is that of the run's seed, its noised latents are those of the codec that it began with, and both
    stand in that codec's units."""
    given = settings(tmp_path / "run", codec, data="digits", reference=flow if reference == "flow" else reference,
                     seed=1, steps=3, conditional=reference == "flow")
    other, z = exactly(fit(DMVAE, given, Silent()), codec)
    found = compared(other, z, tmp_path / "out")
    assert found["reference"] == given.reference
    assert found["latents"]["sliced_w2"] < 1.25 * found["floor"]["sliced_w2"]
    far = compared(other, z + 0.5, tmp_path / "out")
    assert far["latents"]["sliced_w2"] > 3 * far["floor"]["sliced_w2"]


def test_a_comparison_says_what_it_cannot_find_of_a_reference(tmp_path, x, codec):
    run, other = trained(tmp_path / "run", x, codec, reference="noised:0.3"), tokenizer(tmp_path / "other", x, seed=1)
    moved = shutil.copytree(codec, tmp_path / "begun")
    place, content = run / "product/product.json", json.loads((run / "product/product.json").read_text())

    def card(**more):
        place.write_text(json.dumps({**content, "card": {**content["card"], **more}}))

    def opened(**more):
        asked = OfCodecs(data="digits", size=8, out=tmp_path / "out", **more)
        return comparison.opened([f"it={run}"], asked, pictures_of(asked)[0])[0].reference

    assert opened().seed == 0 and opened().base is not None and opened(reference=("it=none",)) is None
    assert opened(reference=("gmm:4",)).text == "gmm:4"
    card(codec=str(tmp_path / "gone"))
    assert "--base it=CODEC" in refused(opened)
    assert opened(base=(f"it={moved}",)).law == opened(base=(f"it={codec}",)).law
    assert "is another codec" in refused(lambda: opened(base=(f"it={other}",)))
    assert "write NAME=CODEC" in refused(lambda: opened(base=(str(moved),)))
    del content["card"]["units"]
    card()
    assert "--reference it=none" in refused(opened)


# ---- what a user can get wrong ----


def test_what_cannot_be_is_refused_in_one_line(tmp_path, data, x, codec, flow):
    def recipe(given=x, name=codec, **more):
        source = Tensors(*given) if isinstance(given, tuple) else Tensors(given)
        return lambda: DMVAE(settings(tmp_path / "no", name, **more), source)

    untrained = tmp_path / "untrained"
    card = json.loads((package.train.product.product_folder(flow) / "product.json").read_text())["card"]
    save_product(Product("flow", {"flow": Flow(Denoiser(MLP(12, 8, 1), Linear(), "v"), (12,))}, card), untrained)
    wrong = tmp_path / "wrong"
    net = package.load(flow)
    torch.nn.init.zeros_(net.denoiser.net.final.weight)
    save_product(Product("flow", {"flow": net}, card), wrong)
    other, labelled = tokenizer(tmp_path / "other", x, seed=1), (data.x, data.y)
    for make, words in (
        (recipe(reference="gausian"), "did you mean 'gaussian'"), (recipe(reference="gmm:1"), "gmm:K[:STD]"),
        (recipe(reference="nowhere/flow"), "nowhere/flow"),
        (recipe(reference=str(untrained)), "a law of [12], and the latents are [3, 2, 2]"),
        (recipe(reference=str(wrong), conditional=False), "fails the teacher gate"),
        (recipe(name=other, reference=flow), "--foreign"),
        (recipe(given=(data.x, data.y), reference="gmm:8"), "multiple of 10"),
        (recipe(name="nowhere"), "no folder nowhere"),
        (recipe(match="kl"), "answers no variances"), (recipe(match="kl", reference="gmm:4"), "--match gap"),
        (recipe(guidance=5.0), "data with labels"),
        (recipe(given=labelled, guidance=3.0, match="adversarial"), "match adversarial asks no scores; leave"),
        (recipe(given=labelled, guidance=3.0), "one law for all classes; leave it at 1, or give one that knows"),
        (recipe(fake="lora"), "closed form"),
        (recipe(fake="lora", match="drifting"), "has no fake score"),
        (recipe(every=3, match="drifting"), "every: match drifting has nothing that learns beside encoder and decoder"),
        (recipe(fake_steps=3, match="teacher"), "fake_steps: match teacher has nothing that learns"),
        (recipe(l1=0.0), "nothing holds the latents"), (recipe(times=(0.5, 0.5)), "an earlier and a later one"),
        (recipe(match="gpa"), "one of gap, teacher"), (recipe(match="mix:0:0"), "mix:PUSH:PULL"),
        (recipe(match="mix:1"), "mix:PUSH:PULL"), (recipe(given=labelled, match="drifting"), "say --no-conditional"),
        *((recipe(match=name, **{flag: value}), f"{flag}: match {name} {lacks}; leave it out")
          for name, lacks, flag, value in (
              ("drifting", "asks no scores", "times", (0.0, 1.0)),
              ("adversarial", "asks no scores", "times", (0.1, 1.0)),
              ("kl", "asks no scores", "time_law", "logit-normal"), ("drifting", "has no fake score", "rank", 4),
              ("adversarial", "has no fake score", "score_net", ScoreNet(width=8)),
              ("teacher", "has no fake score", "score_net", ScoreNet(width=8)),
              ("teacher", "has no fake score", "rank", 4), ("teacher", "has no fake score", "fake_guidance", 2.0))),
        (recipe(rank=4), "add --fake lora"),
        (recipe(shard=True), "leave it out"),
    ):
        assert words in refused(make), words
    with pytest.raises(Refusal, match="couples the samples"):
        trained(tmp_path / "parted", x, codec, match="drifting", accumulate=2)
    with pytest.raises(Refusal, match="seem to lie in"):
        trained(tmp_path / "bright", x / 2 + 0.5, codec)


def test_the_command_line(tmp_path, codec):
    told = stillroom("distill dmvae --codec", codec, "--reference gaussian --data digits --size 8 --steps 3 --batch 8 "
                     "--fake-steps 1 --decoder-steps 1 --perceptual 0 --precision float32 --quiet "
                     "--score-net.width 16 --score-net.depth 1 --out", tmp_path / "r")
    assert told.code == 0, told.err
    told = stillroom("distill dmvae --codec", codec, "--data digits --size 8 --out", tmp_path / "no")
    assert told.code == 2 and "--reference must be given" in told.err


@pytest.mark.parametrize("reference", ["gmm:10", "samples", "flow"])
def test_references_are_made_alike_whatever_device_a_recipe_is_built_under(tmp_path, data, codec, flow, reference):
    save_file({"x": torch.randn(50, 12)}, tmp_path / "x.safetensors")
    name = {"samples": f"samples:{tmp_path}/x.safetensors", "flow": flow}.get(reference, reference)
    recipe = DMVAE(settings(tmp_path / "run", codec, reference=name, match="adversarial"), Tensors(*data))
    with torch.device("meta"):
        again, shaped = recipe.opened(), recipe.shaper()
    assert torch.equal(again.sample(5), recipe.reference.sample(5))
    assert torch.equal(shaped.samples, recipe.shaped.samples)
