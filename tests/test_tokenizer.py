"""The recipe tokenizer: what stays as it is, what learns and when, what the latents are measured to be, the baselines'
terms, and what a user can get wrong."""

import json
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import stillroom as package
from command import refused, stillroom
from stepping import same, state, steps_of, stopped_at, trainer_of
from stillroom.codecs.tokens import TokenEncoder, token_encoder
from stillroom.data import Tensors, open_source, sample
from stillroom.match.alignment import marginal_cosine, marginal_distance
from stillroom.match.latents import unit_kl
from stillroom.nets.bottleneck import Bottleneck, Projected
from stillroom.nets.build import build, describe
from stillroom.nets.coding import Decoder, Encoder
from stillroom.nets.vit import MaskedViT
from stillroom.recipes._drawing import last_weight, lively, set_aside
from stillroom.recipes._masking import Own
from stillroom.recipes.rae import RAE, Nets
from stillroom.recipes.rae import Settings as RAESettings
from stillroom.recipes.tokenizer import Align, Settings, Tokenizer, levels
from stillroom.settings import Images, Optimizer, Refusal, read_toml
from stillroom.train import Silent, fit, load_product
from stillroom.train.folder import read_rows

OWN = Own(width=16, depth=1, heads=2, painter_width=16, painter_depth=1)
TINY = {"data": "given", "size": 16, "patch": 4, "batch": 8, "precision": "float32", "log_every": 1, "perceptual": 0.0,
        "own": OWN, "latent": 6, "params": 9000, "decoder_params": 9000, "critic_width": 8, "statistics_pictures": 64}
FLAGS = ("--data digits --size 8 --patch 4 --latent 5 --batch 8 --precision float32 --perceptual 0 --own.width 16 "
         "--own.depth 1 --own.heads 2 --own.painter-width 16 --own.painter-depth 1 --decoder-params 9000 "
         "--statistics-pictures 64 --encoder-steps 2 --steps 2 --quiet")


@pytest.fixture(scope="module")
def x():
    return sample(open_source(Images(data="leaves", size=16, crop="shrink")), 96, 0).x


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, x):
    """A run of rae, whose encoder is like any that is there already."""
    nets = Nets(width=16, depth=1, heads=2, critic=8)
    given = {k: v for k, v in TINY.items() if k in ("data", "size", "patch", "batch", "precision", "perceptual", "own")}
    return str(fit(RAE, RAESettings(**given, nets=nets, out=tmp_path_factory.mktemp("rae") / "run", steps=1,
                                    encoder_steps=8), Silent(), data=x))


def settings(out, **more):
    return Settings(**{**TINY, "out": out, "steps": 4, "encoder_steps": 3, **more})


def trained(out, x, **more):
    return fit(Tokenizer, settings(out, **more), Silent(), data=x)


# ---- the half that is new ----


def test_a_bottleneck_sees_one_token_at_a_time():
    """Two layers, the hidden one twice as wide; places may change places."""
    u, order = torch.randn(2, 12, 1, 9), torch.randperm(9)
    for moments, out in ((False, 5), (True, 10)):
        b = Bottleneck(12, 5, moments)
        assert sum(p.numel() for p in b.parameters()) == (12 + 1) * 24 + (24 + 1) * out
        assert b(u).shape == (2, out, 1, 9) and torch.allclose(b(u)[..., order], b(u[..., order]), atol=1e-6)
        w = state(b)
        hidden = u[:, :, 0, 0] @ w["enter.weight"][..., 0, 0].T + w["enter.bias"]
        wanted = (hidden * hidden.sigmoid()) @ w["leave.weight"][..., 0, 0].T + w["leave.bias"]
        assert torch.allclose(b(u)[:, :, 0, 0], wanted, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert Bottleneck(12, 5)(u).dtype == torch.float32


def test_gradients_reach_the_trunk_where_it_is_asked_for_them(tmp_path, x):
    codec = package.load(trained(tmp_path / "run", x))
    half = codec.encoder
    assert isinstance(half, Projected) and half.bottleneck.latent == codec.space.channels == 6
    assert not any(p.requires_grad for p in codec.parameters())
    half.bottleneck.requires_grad_(True)
    codec.encode(x[:4]).square().mean().backward()
    assert all(p.grad is None for p in half.trunk.parameters())
    half.trunk.requires_grad_(True)
    codec.encode(x[:4]).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in half.trunk.parameters())
    again = build(describe(half))
    again.load_state_dict(half.state_dict())
    assert torch.equal(again(x[:4]), half(x[:4]))


def test_pictures_come_through_untrained_convolutions():
    """Torch's default leaves less than a hundredth of how they vary, and training begins at the mean picture."""
    pictures = sample(open_source(Images(data="leaves", size=16)), 32, 0).x
    torch.manual_seed(0)
    for patch in (2, 4, 8):
        blocks, left = levels(patch), []
        for begun in (lambda net: net, lively):
            encoder, decoder = begun(Encoder(6, 16, blocks)), begun(Decoder(6, 16, blocks[::-1], False))
            with torch.no_grad():
                left.append(float(decoder(encoder(pictures)).std(0).mean() / pictures.std(0).mean()))
        assert left[0] < 0.01 and left[1] > max(0.02, 10 * left[0])


# ---- training ----


def test_the_trunk_is_the_average_that_masking_left_and_then_stays(tmp_path, x):
    recipe = Tokenizer(given := settings(tmp_path, average=0.5), Tensors(x))
    trainer, trunk = trainer_of(recipe, given), recipe.trunk
    start, learned = state(trunk), state(recipe.learned)
    for step in steps_of(trainer, 7):
        if step == 3:
            assert same(state(trunk), state(cast(MaskedViT, recipe.masked_mean.module).encoder))
            assert not same(state(trunk), start) and same(state(recipe.learned), learned)
            start = state(trunk)
    assert same(state(trunk), start)
    assert not any(torch.equal(v, learned[k]) for k, v in state(recipe.learned).items())
    assert recipe.averaged().encoder.trunk is trunk


def test_latents_of_the_product_have_mean_0_and_deviation_1_over_the_training_data(tmp_path, x):
    for name, more in (("own", {}), ("conv", {"encoder": "conv"}), ("kl", {"encoder": "conv", "kl": 1e-3})):
        run = trained(tmp_path / name, x, steps=20, statistics_pictures=2048, **more)
        codec, card = package.load(run), load_product(run).card
        assert card["statistics"] == {"pictures": 87}
        z = codec.encode((kept := set_aside(Tensors(x))).fetch(range(87), 0).x).double()
        assert z.mean((0, 2, 3)).abs().max() < 1e-3 and (z.std((0, 2, 3)) - 1).abs().max() < 1e-2
        held = kept.held.fetch(range(9), 0).x
        error = (codec.reconstruct(held) - held).square().flatten(1).mean(1)
        assert abs(float(10 * torch.log10(4 / error).mean()) - card["reconstruction"]["PSNR, dB"]) < 0.01
        assert card["reconstruction"]["of"] == "held-out training pictures"
        assert codec.space.factor == 4 and codec.space.offset == (0.0 if more else 1.5)


def test_a_run_that_was_stopped_goes_on_to_the_same_product(tmp_path, x, tokens):
    """Everything at once: masking, a critic, a posterior that is drawn from, features to resemble."""
    more = {"adversarial": 0.5, "kl": 1e-3, "align": tokens, "checkpoint_every": 1, "keep": 20}
    whole = trained(tmp_path / "a", x, **more)
    for stop in (2, 3, 5):
        with stopped_at(stop):
            trained(tmp_path / "b", x, **more)
    one, two = (package.load(run) for run in (whole, trained(tmp_path / "b", x, **more)))
    assert one.space == two.space and same(one.state_dict(), two.state_dict())


def test_who_learns_when(tmp_path, x):
    rows = read_rows(trained(tmp_path / "run", x, steps=16, encoder_steps=2, adversarial=0.5, l2=0.5) / "metrics.jsonl")
    assert [r["stage"] for r in rows] == ["trunk"] * 2 + ["codec"] * 6 + ["critic"] * 2 + ["adversarial"] * 8
    for r in rows:
        assert ("trunk/painted" in r) == (r["stage"] == "trunk")
        assert ("codec/l1" in r) == ("codec/l2" in r) == (r["stage"] != "trunk")
        assert ("critic/hinge" in r) == (r["stage"] in ("critic", "adversarial"))
        assert ("codec/hinge" in r) == (r["stage"] == "adversarial")


def test_each_balanced_term_moves_its_layer_by_its_share(tmp_path, x, tokens):
    """The critic's at the decoder's last convolution, the alignment's at the encoder's last layer, beside the
    reconstruction's gradient alone: what a posterior costs does not count."""
    for encoder in ("conv", tokens):
        recipe = Tokenizer(given := settings(
            tmp_path, encoder=encoder, adversarial=0.5, critic_from=0.0, adversarial_from=0.0, kl=1.0, l2=0.5,
            align=tokens, alignment=Align(weight=0.1, cosine_margin=0.0, distance_margin=0.0)), Tensors(x))
        trainer, old, seen = trainer_of(recipe, given), recipe.losses, []

        def losses(batch, turn, old=old, recipe=recipe, seen=seen):
            terms = (out := old(batch, turn))["codec"]
            rec = terms["l1"].mean() + terms["l2"].mean()
            for name, half in (("hinge", "decoder"), ("align", "encoder")):
                one, two = (torch.autograd.grad(t, last_weight(recipe.learned[half]), retain_graph=True)[0].norm()
                            for t in (rec, terms[name].mean()))
                seen.append(float(two / one))
            return out

        recipe.losses = losses
        list(steps_of(trainer, 2))
        assert seen == pytest.approx([0.5, 0.1, 0.5, 0.1], rel=2e-3)


def terms_of(recipe, given, x):
    """Of the first step, on these pictures."""
    trainer = trainer_of(recipe, given)
    from stillroom.data import Batch
    from stillroom.train.turn import Noise

    turn = trainer.make_turn(0, frozenset({"codec"}), Noise(0, 0, torch.device("cpu")), 0)
    return recipe.losses({"data": Batch(x, None)}, turn)["codec"], turn.told


def test_terms_are_what_they_are_called(tmp_path, x, tokens):
    recipe = Tokenizer(given := settings(tmp_path, encoder=tokens, l1=0.7, l2=0.3, kl=0.2, align=tokens), Tensors(x))
    with torch.no_grad():       # a posterior as narrow as a codec answers: no draw
        cast(Bottleneck, recipe.learned["encoder"]).leave.weight[6:] = 0.0
        cast(torch.Tensor, cast(Bottleneck, recipe.learned["encoder"]).leave.bias)[6:] = -40.0
    pictures = x[:8]
    terms, told = terms_of(recipe, given, pictures)
    mean, logvar = recipe.codec.posterior(pictures)
    assert logvar is not None and float(logvar.detach().max()) == -30.0
    error = recipe.codec.decode(mean) - pictures
    assert torch.allclose(terms["l1"], 0.7 * error.abs().flatten(1).mean(1), atol=1e-5)
    assert torch.allclose(terms["l2"], 0.3 * error.square().flatten(1).mean(1), atol=1e-5)
    assert torch.allclose(terms["kl"], 0.2 * unit_kl(mean, logvar) / (3 * 16 * 16), rtol=1e-4)
    features = recipe.codec.encoder.trunk(pictures)
    assert torch.equal(recipe.features(pictures), features)         # that run's encoder, in both places
    assert torch.allclose(told["codec/align-cosine"], marginal_cosine(recipe.learned["likeness"](mean), features),
                          atol=1e-5)
    assert torch.allclose(told["codec/align-distance"], marginal_distance(mean, features), atol=1e-5)


def test_without_kl_there_is_no_posterior_and_no_draw(tmp_path, x, tokens):
    sure = Tokenizer(given := settings(tmp_path, encoder=tokens), Tensors(x))
    assert sure.codec.posterior(x[:2]).logvar is None
    assert torch.equal(terms_of(sure, given, x[:8])[0]["l1"],
                       (sure.codec.decode(sure.codec.encode(x[:8])) - x[:8]).abs().flatten(1).mean(1))
    drawn = Tokenizer(given := settings(tmp_path, encoder=tokens, kl=1e-6), Tensors(x))
    mean = (drawn.codec.decode(drawn.codec.encode(x[:8])) - x[:8]).abs().flatten(1).mean(1)
    assert not torch.allclose(terms_of(drawn, given, x[:8])[0]["l1"], mean, atol=1e-4)
    run = trained(tmp_path / "run", x, encoder="conv", kl=1e-6)
    assert package.load(run).posterior(x[:2]).logvar is not None and load_product(run).card["kl"] == 1e-6


def test_alignment_makes_latents_more_like_the_features(tmp_path, x, tokens):
    far = []
    for weight in (1e-6, 1.0):
        run = trained(tmp_path / str(weight), x, encoder="conv", steps=40, align=tokens, average=0.5,
                      alignment=Align(weight=weight, cosine_margin=0.0, distance_margin=0.0),
                      model=Optimizer(lr=3e-3, clip=1.0))
        codec, encoder = package.load(run), package.load(tokens).encoder
        raw = codec.encoder(x)
        far.append(float(marginal_distance(raw, encoder(x), 0.0).mean()))
        rows = read_rows(run / "metrics.jsonl")
        assert {"codec/align", "codec/align-cosine", "codec/align-distance", "codec/align-balance"} <= rows[-1].keys()
        assert not any("likeness" in k for k in codec.state_dict())
    assert far[1] < 0.7 * far[0]


def test_labels_are_used_where_asked_for_and_said(tmp_path, x):
    y = (x.mean((1, 2, 3)) > x.mean()).long()
    run = trained(tmp_path / "run", (x, y), labels_weight=0.5, encoder_steps=120, batch=16,
                  pretraining=Optimizer(lr=1e-2))
    rows = [r for r in read_rows(run / "metrics.jsonl") if r["stage"] == "trunk"]
    assert sum(r["trunk/accuracy"] for r in rows[-10:]) > 9.0 and load_product(run).card["labels"] is True
    assert not any("head" in k or "painter" in k for k in package.load(run).state_dict())


# ---- encoders that are there already ----


def test_the_trunk_of_another_run_is_taken_as_it_is(tmp_path, x, tokens):
    wanted = state(package.load(tokens).encoder)
    first = trained(tmp_path / "first", x, encoder=tokens)
    second = trained(tmp_path / "second", x, encoder=str(first), latent=3)
    for run in (first, second):
        assert same(state(package.load(run).encoder.trunk), wanted)
        assert not load_file(max((run / "checkpoints").glob("step*")) / "memory.safetensors")
        assert {r["stage"] for r in read_rows(run / "metrics.jsonl")} == {"codec"}
    third = fit(RAE, RAESettings(data="given", size=16, patch=4, encoder=str(first), out=tmp_path / "rae", steps=2,
                                 batch=8, precision="float32", perceptual=0.0,
                                 nets=Nets(width=16, depth=1, heads=2)), Silent(), data=x)
    assert same(state(package.load(third).encoder), wanted)         # all of its tokens, not the latents


def test_a_pretrained_folder_sees_pictures_as_it_was_trained_to(tmp_path, x):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
                                                    image_size=518, patch_size=7)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "dino")
    run = trained(tmp_path / "run", x, encoder=str(tmp_path / "dino"), latent=6)
    codec, alone = package.load(run), token_encoder(tmp_path / "dino", 4)
    half = codec.encoder
    assert isinstance(half.trunk, TokenEncoder) and codec.space.image_range == (-1.0, 1.0)
    raw = half.bottleneck(alone((x[:4] + 1) / 2))
    assert torch.allclose(codec.encode(x[:4]), codec.space.normalise(raw), atol=1e-5)
    half.trunk.requires_grad_(True)
    codec.encode(x[:4]).square().mean().backward()
    assert all(bool(p.grad.any()) for p in half.trunk.model.encoder.layer[0].mlp.parameters())
    aligned = trained(tmp_path / "aligned", x, encoder="conv", align=str(tmp_path / "dino"))
    assert load_product(aligned).card["align"] == str(tmp_path / "dino")


def test_features_of_another_patch_are_brought_to_the_latents(tmp_path, x, tokens):
    rows = read_rows(trained(tmp_path / "run", x, encoder="conv", patch=8, align=tokens) / "metrics.jsonl")
    assert all(0 < r["codec/align-cosine"] < 1.5 for r in rows)
    with pytest.raises(Refusal, match="set --patch 4"):
        Tokenizer(settings(tmp_path, encoder=tokens, patch=8), Tensors(x))


def test_pictures_of_any_size_and_colour_go_through(tmp_path, x):
    grey = x.mean(1, keepdim=True)
    for name, more in (("own", {}), ("conv", {"encoder": "conv", "patch": 2}), ("one place", {"encoder": "conv",
                                                                                             "patch": 16})):
        codec = package.load(trained(tmp_path / name, grey, **more))
        for shape in ((2, 1, 16, 16), (1, 3, 20, 28), (1, 3, 9, 33)):
            p = torch.rand(shape) * 2 - 1
            whole = p.expand(-1, 3, -1, -1)
            f, (height, width) = codec.space.factor, shape[2:]
            whole = functional.pad(whole, (0, -width % f, 0, -height % f), mode="replicate")
            assert torch.equal(codec.reconstruct(p), codec.reconstruct(whole)[..., :height, :width])
        wide = torch.cat([grey[:1], grey[1:2]], 3)
        assert codec.encode(wide).shape[-1] == 2 * codec.encode(grey[:1]).shape[-1]


# ---- the command line ----


def test_the_preset_of_train_codec_is_this_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own", "conv"):
        (tmp_path / name).mkdir()       # folders of those names in the way are not the encoder
    told = stillroom("train codec --preset tokenizer --out run", FLAGS)
    assert told.code == 0, told.err
    values = read_toml(tmp_path / "run/settings.toml")
    assert (values["recipe"], values["encoder"], values["latent"]) == ("tokenizer", "own", 5)
    content = json.loads((tmp_path / "run/product/product.json").read_text())
    assert content["kind"] == "codec" and content["card"]["encoder"] == "own"
    told = stillroom("cache --codec run --data digits --size 8 --out store")
    assert told.code == 0, told.err
    assert open_source(Images(data="store", size=2)).shape == (5, 2, 2)
    told = stillroom("train flow --data store --size 2 --net dit --patch 1 --width 16 --depth 1 --steps 2 --batch 8 "
                     "--precision float32 --out flow --quiet")
    assert told.code == 0, told.err
    assert package.load("flow").sample(2).shape == (2, 5, 2, 2)
    assert "train tokenizer" in stillroom("train codec --preset tokenizer --help").out


# ---- what cannot be ----


def test_what_cannot_be_is_refused_in_one_line(tmp_path, x, tokens):
    def recipe(data=x, **more):
        return lambda: Tokenizer(settings(tmp_path / "no", **more), Tensors(data))

    nothing = Align(weight=0.0)
    conv = trained(tmp_path / "conv", x, encoder="conv")
    for make, words in (
        (recipe(latent=17), "latent 17: wider than the 16 channels that the encoder own has"),
        (recipe(latent=17, encoder=tokens), "wider than the 16 channels"),
        (recipe(latent=400, encoder="conv"), "ask for fewer, or for more --params"),
        (recipe(x[..., :14, :14], patch=4), "no multiple of 4"), (recipe(patch=16), "one patch"),
        (recipe(x[:, :2]), "pictures of 3 channels, or 1"), (recipe(labels_weight=1.0), "no labels"),
        (recipe(labels_weight=1.0, encoder="conv"), "conv stays as it is"),
        (recipe(l1=0.0), "all 0"), (recipe(critic_from=0.9), "comes after"),
        (recipe(x[..., :4, :4], size=4, patch=2, adversarial=0.5), "these have 4 pixels"),
        (recipe(shard=True), "leave it out"), (recipe(shard=True, encoder="conv", align=tokens), "leave it out"),
        (recipe(encoder="nowhere"), "no folder nowhere"), (recipe(encoder=str(tmp_path)), "config.json is missing"),
        (recipe(encoder=str(conv)), "is a Encoder, not one of tokens"),
        (recipe(align="own"), "trained already"), (recipe(align="nowhere"), "no folder nowhere"),
        (recipe(align=str(conv)), "not one of tokens"),
        (recipe(align=tokens, alignment=nothing), "weigh nothing"),
        (recipe(x[..., :10, :10], size=10, patch=2, align=tokens, encoder="conv"), "which do not divide the 10"),
        (recipe(align=tokens, alignment=Align(cosine=0.0), patch=16, encoder="conv"), "weigh nothing"),
    ):
        assert words in refused(make)
    with pytest.raises(Refusal, match="seem to lie in"):
        trained(tmp_path / "bright", x / 2 + 0.5)
    told = stillroom("train codec --preset tokenizer --out no", FLAGS.replace("--patch 4", "--patch 3"))
    assert told.code != 0 and "patch" in told.err
    told = stillroom("train codec --preset tokenizer --out no --alignment.cosine-margin 2", FLAGS)
    assert told.code != 0 and "at most 1" in told.err
