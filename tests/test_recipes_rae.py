"""The recipe rae: what must stay as it is, what is measured, who learns when, and what a user can get wrong."""

import json
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

import stillroom as package
from command import refused, stillroom
from stepping import stopped_at
from stillroom.codecs.export import to_diffusers
from stillroom.data import Tensors, open_source, sample
from stillroom.nets.vit import MaskedViT, ViT
from stillroom.recipes._drawing import set_aside
from stillroom.recipes._masking import Own
from stillroom.recipes.rae import RAE, Nets, Settings
from stillroom.settings import Images, Optimizer, Refusal, read_toml
from stillroom.train import Silent, fit, load_product
from stillroom.train.folder import read_rows
from stillroom.train.loop import Trainer
from stillroom.train.world import World

TINY = {"data": "given", "size": 16, "patch": 4, "batch": 8, "precision": "float32", "log_every": 1, "perceptual": 0.0,
        "own": Own(width=16, depth=1, heads=2, painter_width=16, painter_depth=1), "statistics_pictures": 64,
        "nets": Nets(width=16, depth=1, heads=2, critic=8)}
FLAGS = ("--size 16 --patch 4 --batch 8 --precision float32 --perceptual 0 --own.width 16 --own.depth 1 --own.heads 2 "
         "--own.painter-width 16 --own.painter-depth 1 --nets.width 16 --nets.depth 1 --nets.heads 2 --nets.critic 8 "
         "--statistics-pictures 64 --encoder-steps 2 --steps 2 --quiet")


@pytest.fixture(scope="module")
def x():
    return sample(open_source(Images(data="leaves", size=16, crop="shrink")), 96, 0).x


def settings(out, **more):
    return Settings(**{**TINY, "out": out, "steps": 4, "encoder_steps": 3, **more})


def trainer_of(recipe, given):
    return Trainer(recipe, given, {"data": recipe.data}, World(0, 1, torch.device("cpu")), watch=Silent())


def test_pictures_that_are_measured_are_not_trained_on():
    x = torch.arange(40.0).view(40, 1) / 20 - 1
    kept = set_aside(Tensors(x, torch.arange(40) % 2))
    seen, held = (part.fetch(range(len(part)), 0).x for part in (kept, kept.held))
    assert len(held) == 4 and len(seen) == 36 and sorted([*seen.flatten().tolist(), *held.flatten().tolist()]) == (
        x.flatten().tolist())
    assert (held.flatten().diff() > 0.4).all()      # from all over the set, whose classes may come in order
    y = kept.fetch([3, 0], 0).y
    assert y is not None and y.tolist() == [1, 0] and kept.classes == ("0", "1")
    assert len(set_aside(Tensors(x[:9])).held) == 0


def test_latents_of_the_product_have_mean_0_and_deviation_1_over_the_training_data(tmp_path, x):
    for over in ("channel", "element"):
        run = fit(RAE, settings(tmp_path / over, statistics=over, statistics_pictures=86), data=x)
        codec, card = package.load(run), load_product(run).card
        kept = set_aside(Tensors(x))
        z, held = codec.encode(kept.fetch(range(87), 0).x).double(), kept.held.fetch(range(9), 0).x
        axes = (0,) if over == "element" else (0, 2, 3)
        assert z.mean(axes).abs().max() < 0.35 and (z.std(axes) - 1).abs().max() < 0.35     # of all but one
        assert z.mean().abs() < 0.03 and abs(float(z.square().mean()) - 1) < 0.05
        assert card["statistics"] == {"over": over, "pictures": 86} and card["labels"] is False
        assert card["reconstruction"]["pictures"] == 9 and card["reconstruction"]["of"] == "held-out training pictures"
        psnr = 10 * torch.log10(4 / (codec.reconstruct(held) - held).square().flatten(1).mean(1)).mean()
        assert abs(float(psnr) - card["reconstruction"]["PSNR, dB"]) < 0.01


def test_the_encoder_is_its_average_and_then_stays(tmp_path, x):
    recipe = RAE(given := settings(tmp_path, average=0.5), Tensors(x))
    trainer = trainer_of(recipe, given)
    before = {k: v.clone() for k, v in recipe.encoder.state_dict().items()}
    with trainer.loaders({}) as loaders:
        for step in range(7):
            trainer.enter_stages()
            if step == 3:
                mine = recipe.encoder.state_dict()
                average = cast(MaskedViT, recipe.masked_mean.module).encoder.state_dict()
                assert all(torch.equal(mine[k], average[k]) for k in mine)
                assert any(not torch.equal(mine[k], before[k]) for k in mine)
                before = {k: v.clone() for k, v in mine.items()}
            trainer.train_step(trainer.device_batch({"data": loaders["data"].at(step)}))
            trainer.step += 1
            assert all(torch.equal(v, before[k]) for k, v in recipe.encoder.state_dict().items())
    assert float(recipe.scale.min()) > 0.003 and recipe.shift.any()


def test_a_run_that_was_stopped_goes_on_to_the_same_product(tmp_path, x):
    whole = fit(RAE, settings(tmp_path / "a", adversarial=0.75, checkpoint_every=1, keep=20), data=x)
    given = settings(tmp_path / "b", adversarial=0.75, checkpoint_every=1, keep=20)
    with stopped_at(5):
        fit(RAE, given, data=x)
    other = fit(RAE, given, data=x)
    one, two = (package.load(run) for run in (whole, other))
    assert one.space == two.space
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_who_learns_when(tmp_path, x):
    run = fit(RAE, settings(tmp_path / "run", steps=16, encoder_steps=2, adversarial=0.75), data=x)
    rows = read_rows(run / "metrics.jsonl")
    stages = [r["stage"] for r in rows]
    assert stages == ["encoder"] * 2 + ["decoder"] * 6 + ["critic"] * 2 + ["adversarial"] * 8
    for r in rows:
        assert ("decoder/l1" in r) == (r["stage"] != "encoder")
        assert ("critic/hinge" in r) == (r["stage"] in ("critic", "adversarial"))
        assert ("decoder/hinge" in r) == (r["stage"] == "adversarial")


def test_the_adversarial_term_moves_the_last_layer_by_its_share(tmp_path, x):
    """Its gradient there is `adversarial` times as long as that of the reconstruction."""
    recipe = RAE(given := settings(tmp_path, adversarial=0.75, critic_from=0.0, adversarial_from=0.0, encoder_steps=1),
                 Tensors(x))
    trainer, seen = trainer_of(recipe, given), []
    old = recipe.losses

    def losses(batch, turn):
        out = old(batch, turn)
        if turn.stage == "adversarial":
            last = recipe.raw.decoder.predict.weight
            one, two = (torch.autograd.grad(out["decoder"][n].mean(), last, retain_graph=True)[0].norm()
                        for n in ("l1", "hinge"))
            seen.append(float(two / one))
        return out

    recipe.losses = losses
    with trainer.loaders({}) as loaders:
        for step in range(3):
            trainer.enter_stages()
            trainer.train_step(trainer.device_batch({"data": loaders["data"].at(step)}))
            trainer.step += 1
    assert seen == pytest.approx([0.75, 0.75], rel=1e-3)


def test_the_noise_has_the_law_that_was_asked_for(tmp_path, x):
    """Seen by a decoder that answers its input: per picture, one sigma."""
    for law, mean, square in (("uniform", 0.4, 0.64 / 3), ("half-normal", 0.8 * (2 / torch.pi) ** 0.5, 0.64)):
        recipe = RAE(given := settings(tmp_path, noise=law, batch=96), Tensors(x))
        trainer, levels, clean = trainer_of(recipe, given), [], []
        recipe.raw.decoder.register_forward_pre_hook(
            lambda m, u, clean=clean, out=levels: out.append((u[0] - clean[-1]).flatten(1).std(1)))

        def tokens(x, ask=recipe.tokens, clean=clean):
            clean.append(ask(x))
            return clean[-1]

        recipe.tokens = tokens
        trainer.step = given.encoder_steps
        with trainer.loaders({}) as loaders:
            for _ in range(4):
                trainer.train_step(trainer.device_batch({"data": loaders["data"].at(trainer.step)}))
                trainer.step += 1
        sigma = torch.cat(levels)
        assert abs(float(sigma.mean()) - mean) < 0.08 and abs(float(sigma.square().mean()) - square) < 0.12


def test_labels_are_used_where_asked_for_and_said(tmp_path, x):
    y = (x.mean((1, 2, 3)) > x.mean()).long()
    run = fit(RAE, settings(tmp_path / "run", labels_weight=0.5, encoder_steps=150, batch=16,
                            pretraining=Optimizer(lr=1e-2)), data=(x, y))
    rows = [r for r in read_rows(run / "metrics.jsonl") if r["stage"] == "encoder"]
    assert sum(r["encoder/accuracy"] for r in rows[-10:]) > 9.0 and load_product(run).card["labels"] is True
    assert not any("head" in k or "painter" in k for k in package.load(run).state_dict())


def test_the_encoder_of_another_run_keeps_its_latents(tmp_path, x):
    """Bit for bit, so that flows over the one can be decoded by the other; both kinds of statistics."""
    for over in ("channel", "element"):
        first = fit(RAE, settings(tmp_path / over, statistics=over), data=x)
        second = fit(RAE, settings(tmp_path / f"{over} 2", encoder=str(first), seed=3), data=x)
        one, two = package.load(first), package.load(second)
        assert one.space == two.space and torch.equal(one.encode(x[:8]), two.encode(x[:8]))
        assert not torch.equal(one.decode(one.encode(x[:8])), two.decode(one.encode(x[:8])))
        assert load_product(second).card["statistics"] == "those of its encoder"
        kept = [set(load_file(max((r / "checkpoints").glob("step*")) / "memory.safetensors")) for r in (first, second)]
        assert "frozen/enter.weight" in kept[0] and kept[1] == {"shift/", "scale/"}


def test_a_pretrained_folder_is_decoded_and_exported(tmp_path, x):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
                                                    image_size=518, patch_size=7)
    transformers.Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "dino")
    run = fit(RAE, settings(tmp_path / "run", encoder=str(tmp_path / "dino")), data=x)
    codec = package.load(run)
    assert codec.space.image_range == (0.0, 1.0) and codec.encode(x[:2]).shape == (2, 64, 4, 4)
    from stillroom.codecs.rae import from_diffusers_rae, to_diffusers_rae

    again = from_diffusers_rae(to_diffusers_rae(codec, tmp_path / "out"))
    assert torch.allclose(again.encode(x[:2]), codec.encode(x[:2]), atol=1e-4)
    assert torch.allclose(again.reconstruct(x[:2]), codec.reconstruct(x[:2]), atol=1e-4)
    third = fit(RAE, settings(tmp_path / "third", encoder=str(tmp_path / "out")), data=x)
    assert package.load(third).space == again.space


def test_the_preset_of_train_codec_is_this_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()          # a folder of that name in the way is not the encoder
    told = stillroom("train codec --preset rae --data digits --out run", FLAGS)
    assert told.code == 0, told.err
    values = read_toml(tmp_path / "run/settings.toml")
    assert (values["recipe"], values["encoder"], values["tau"]) == ("rae", "own", 0.8)
    assert json.loads((tmp_path / "run/product/product.json").read_text())["kind"] == "codec"
    again = stillroom("train rae --data digits --out again", FLAGS)
    assert again.code == 0, again.err
    a, b = package.load("run"), package.load("again")
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    told = stillroom("cache --codec run --data digits --size 16 --out store")
    assert told.code == 0, told.err
    assert open_source(Images(data="store", size=4)).shape == (16, 4, 4)
    assert "train rae" in stillroom("train codec --preset rae --help").out


def test_what_cannot_be_is_refused_in_one_line(tmp_path, x):
    def recipe(data=x, **more):
        return lambda: RAE(settings(tmp_path / "no", **more), Tensors(data))

    labelled = Tensors(x, torch.zeros(96, dtype=torch.long))
    for make, words in (
        (recipe(patch=5), "no multiple of 5"), (recipe(patch=16), "one patch"),
        (recipe(x[:, :2]), "pictures of 3 channels, or 1"), (recipe(labels_weight=1.0), "no labels"),
        (recipe(labels_weight=1.0, encoder="dinov2"), "dinov2 stays as it is"), (recipe(l1=0.0), "both 0"),
        (recipe(critic_from=0.9), "comes after"), (recipe(shard=True), "leave it out"),
        (recipe(encoder="nowhere"), "no folder nowhere"), (recipe(encoder=str(tmp_path)), "config.json is missing"),
    ):
        assert words in refused(make)
    assert RAE(settings(tmp_path / "no", labels_weight=1.0), labelled).masked.head is not None
    run = fit(RAE, settings(tmp_path / "run"), data=x)
    assert "set --patch 4" in refused(recipe(encoder=str(run), patch=8))
    assert "have their statistics already" in refused(recipe(encoder=str(run), statistics="element"))
    codec = fit_small(tmp_path / "klt", x)
    assert "is a BlockEncoder, not one of tokens" in refused(recipe(encoder=codec))
    with pytest.raises(Refusal, match="seem to lie in"):
        fit(RAE, settings(tmp_path / "bright"), data=x / 2 + 0.5)


def fit_small(place, x):
    from stillroom.codecs import fit_klt
    from stillroom.train import Product, save_product

    save_product(Product("codec", {"codec": fit_klt(x, 4, 4)}), place)
    return str(place)


def test_grey_pictures_are_pictures(tmp_path, x):
    run = fit(RAE, settings(tmp_path / "run"), data=x.mean(1, keepdim=True))
    codec = package.load(run)
    assert torch.equal(codec.reconstruct(x[:1, :1]), codec.reconstruct(x[:1, :1].expand(-1, 3, -1, -1)))
    assert isinstance(package.load(run).encoder, ViT) and to_diffusers(package.load(run), tmp_path / "out").is_dir()
