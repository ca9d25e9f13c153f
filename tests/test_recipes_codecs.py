"""The recipes around codecs, against what must come out: closed forms, equal runs, parts that must not move."""

import dataclasses

import pytest
import torch

import stillroom
from stillroom.codecs import Codec, fingerprint, fit_klt
from stillroom.codecs.klt import BlockDecoder, BlockEncoder
from stillroom.data import Pairs, Tensors, open_source, sample, write_pairs
from stillroom.nets import buildable
from stillroom.nets.coding import Decoder, Encoder
from stillroom.recipes import codec as codec_recipe
from stillroom.recipes import encoder as encoder_recipe
from stillroom.recipes.codec import FACTORS, FromScratch
from stillroom.recipes.decoder import DecoderDistillation
from stillroom.recipes.encoder import EncoderDistillation, Weights, answering, new_student
from stillroom.settings import Images, Optimizer, Refusal
from stillroom.train import Product, Silent, fit, resume, start
from stillroom.train.folder import read_rows
from stillroom.train.product import save_product
from stillroom.train.teacher import open_codec

PLAIN = {"data": "given", "size": 32, "crop": "centre", "precision": "float32", "batch": 8, "log_every": 1}
SMALL = {**PLAIN, "params": 9000}
RATE = Optimizer(lr=3e-3, clip=1.0, warmup=10, decay="cosine")


@pytest.fixture(scope="module")
def x():
    return sample(open_source(Images(data="leaves", size=32, crop="shrink")), 64, 0).x


@pytest.fixture(scope="module")
def klt(tmp_path_factory, x):
    """Means only, linear, no features."""
    return saved(fit_klt(x, 8, 8), tmp_path_factory.mktemp("klt") / "klt")


@buildable
class Uncertain(BlockEncoder):
    def forward(self, x):
        z = super().forward(x)
        return torch.cat([z, z.tanh() - 4], 1)


@buildable
class Open(BlockDecoder):
    def features(self, z):
        return [z.sin(), self(z)]


@pytest.fixture(scope="module")
def rich(tmp_path_factory, x):
    """Posteriors, and a decoder with features."""
    plain = fit_klt(x, 8, 6)
    halves = Uncertain(6, 8), Open(6, 8)
    for half in halves:
        half.load_state_dict(plain.encoder.state_dict())
    return saved(Codec(*halves, plain.space), tmp_path_factory.mktemp("rich") / "rich")


def saved(codec, place):
    save_product(Product("codec", {"codec": codec}), place)
    return str(place)


def settings(teacher, out, recipe=EncoderDistillation, **more):
    return recipe.Settings(**{**SMALL, "teacher": teacher, "out": out, "steps": 3, **more})


def made(teacher, x, recipe=EncoderDistillation, **more):
    return recipe(settings(teacher, "unused", recipe, **more), Tensors(x, name="pictures"))


def state(run):
    return stillroom.load(run).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(run):
    return [{k: v for k, v in row.items() if k.count("/") == 1 and not k.endswith(("gradient", "rate"))}
            for row in read_rows(run / "metrics.jsonl")]


# ---- a codec from scratch ----


def test_60_steps_beat_the_mean_picture_and_latents_come_out_normalised(x, tmp_path):
    how = FromScratch.Settings(**{**PLAIN, "batch": 16}, out=tmp_path / "run", steps=60, stem="unshuffle", channels=8,
                               params=60_000, decoder_params=60_000, average=0.8, model=Optimizer(lr=5e-3, clip=1.0))
    codec = stillroom.load(fit(FromScratch, how, Silent(), data=x))
    assert (codec.reconstruct(x) - x).square().mean() < 0.8 * (x - x.mean(0)).square().mean()
    flat = codec.encode(x).transpose(0, 1).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(8), atol=1e-4)
    assert torch.allclose(flat.std(1), torch.ones(8), atol=1e-3)
    assert codec.posterior(x).logvar is not None


@pytest.mark.parametrize("factor", FACTORS)
def test_students_span_as_many_pixels_as_their_teachers(factor):
    """Of Stable Diffusion, Flux and Sana, whose latents span 8, 16 and 32 of them."""
    encoder, decoder = Encoder(4, 8, FACTORS[factor]), Decoder(4, 8, FACTORS[factor][::-1])
    z = encoder(torch.zeros(1, 3, 64, 64))
    assert z.shape == (1, 4, 64 // factor, 64 // factor) and decoder(z).shape == (1, 3, 64, 64)
    assert encoder.factor == decoder.factor == factor


def test_normalising_moves_no_reconstruction(x):
    codec = FromScratch(FromScratch.Settings(**PLAIN, out="unused", params=9000, decoder_params=9000), Tensors(x)).codec
    from stillroom.recipes._drawing import normalised

    assert torch.allclose(normalised(codec, Tensors(x), 0)[0].reconstruct(x), codec.reconstruct(x), atol=1e-5)


# ---- a small encoder ----


def test_a_linear_student_of_full_width_finds_the_linear_teacher(klt, x, tmp_path, monkeypatch):
    """Least squares has a solution: 8x8 blocks lie within what two strided convolutions see."""
    monkeypatch.setattr(codec_recipe, "FACTORS", {8: (0, 0, 0, 0)})
    run = fit(EncoderDistillation, settings(klt, tmp_path / "run", steps=500, params=60_000, batch=16, average=0.9,
                                            student=RATE), Silent(), data=x)
    student, teacher = stillroom.load(run), open_codec(klt)
    assert not any(isinstance(m, torch.nn.ReLU) for m in student.encoder.modules())
    error = (student.encode(x) - teacher.encode(x)).square().mean() / teacher.encode(x).var()
    assert error < 1e-3


def test_the_product_is_the_teacher_with_another_encoder(klt, x, tmp_path):
    run = fit(EncoderDistillation, settings(klt, tmp_path / "run", weights=Weights(pixels=1.0)), Silent(), data=x)
    product, teacher = stillroom.load(run), open_codec(klt)
    assert product.space == teacher.space and isinstance(product.encoder, Encoder)
    assert same(product.decoder.state_dict(), teacher.decoder.state_dict())
    assert stillroom.load_product(run).card["teacher_hash"] == fingerprint(teacher)
    z = product.encode(x)
    assert torch.equal(product.remapped(1.0).reconstruct(x), product.decode(z, (32, 32)).clamp(-1, 1))


def test_through_the_decoder_pass_gradients_but_no_steps(rich, x, tmp_path):
    before = open_codec(rich).decoder.state_dict()
    every = Weights(**{f.name: 0.5 for f in dataclasses.fields(Weights)})
    run = fit(EncoderDistillation, settings(rich, tmp_path / "run", moments=True, weights=every), Silent(), data=x)
    assert same(before, stillroom.load(run).decoder.state_dict())
    rows = losses(run)      # the trainer has refused terms that do not reach the student
    named = {f.name for f in dataclasses.fields(Weights)} - {"perceptual"} | {"random_lpips"}
    assert set(rows[0]) == {f"student/{name}" for name in named}
    assert all(value > 0 for row in rows for value in row.values())


def test_terms_are_zero_at_the_teachers_own_answers(rich, x):
    every = Weights(**{f.name: 1.0 for f in dataclasses.fields(Weights)})
    recipe = made(rich, x, moments=True, weights=every)
    t = open_codec(rich).posterior(x[:4])
    terms = {name: term() for name, (_, term) in recipe.terms(x[:4], t, t).items()}
    error = open_codec(rich).decode(t.mean) - x[:4]
    expected = error.abs().flatten(1).mean(1) + error.square().flatten(1).mean(1)
    assert torch.allclose(terms.pop("pixels"), expected)
    assert torch.equal(terms.pop("random_lpips"), recipe.perceptual[1](open_codec(rich).decode(t.mean), x[:4]))
    assert all(term.abs().max() < 1e-6 for term in terms.values()), terms


def test_what_counts_nothing_is_not_computed_and_nothing_twice(rich, x):
    calls = []
    for weights, expected in ((Weights(), ["encoder"]), (Weights(pixels=1, blur=1), ["encoder", "decoder", "decoder"])):
        recipe = made(rich, x, weights=weights)
        for half in ("encoder", "decoder"):
            getattr(recipe.teacher, half).register_forward_hook(lambda *_, half=half: calls.append(half))
        calls.clear()
        recipe.losses({"data": (Tensors(x).fetch(range(4), 0))}, None)
        assert calls == expected        # the decoder: once of the student's latents, once of the teacher's


def test_under_autocast_losses_are_float32(rich, x):
    recipe = made(rich, x, moments=True, weights=Weights(pixels=1, blur=1, features=1, kl=1, statistics=1))
    plain = recipe.losses({"data": Tensors(x).fetch(range(8), 0)}, None)["student"]
    with torch.autocast("cpu", torch.bfloat16):
        terms = recipe.losses({"data": Tensors(x).fetch(range(8), 0)}, None)["student"]
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert term.mean().item() == pytest.approx(plain[name].mean().item(), rel=0.05), name


def test_a_student_begins_at_the_teachers_statistics(klt, x):
    recipe = made(klt, x)
    z = open_codec(klt).answer(x).transpose(0, 1).flatten(1)
    student = recipe.codec.encoder
    assert torch.allclose(student.shift.flatten(), z.mean(1), atol=1e-5)
    assert torch.allclose(student.scale.flatten(), z.std(1), rtol=1e-4)


def test_padding_takes_the_grid_nearest_to_the_teachers(klt, x):
    codec = open_codec(klt)
    for offset, stem, expected in ((7.0, "conv", 7.0), (0.0, "conv", 0.0), (7.0, "unshuffle", 5.5),
                                   (0.0, "unshuffle", 1.5)):
        teacher = Codec(codec.encoder, codec.decoder, dataclasses.replace(codec.space, offset=offset))
        student = new_student(settings(klt, "unused", stem=stem), teacher, codec.answer(x))
        assert student.offset == expected


def test_a_taesd_teachers_range_is_not_halved_twice(klt, x):
    """Its space takes pictures to [0, 1] before the layers see them."""
    codec = open_codec(klt)
    taesd = Codec(codec.encoder, codec.decoder, dataclasses.replace(codec.space, image_range=(0.0, 1.0)))
    for teacher, expected in ((codec, True), (taesd, False)):
        assert new_student(settings(klt, "unused", stem="conv"), teacher, codec.answer(x)).unit_range is expected


def test_labels_are_no_answers(klt, tmp_path):
    run = start(EncoderDistillation, settings(klt, tmp_path / "run", data="shapes"), "encoder", watch=Silent())
    assert len(losses(run)) == 3


@pytest.mark.parametrize("recipe", [EncoderDistillation, DecoderDistillation])
def test_grey_pictures_are_three_equal_channels(klt, x, tmp_path, recipe):
    grey = x.mean(1, keepdim=True)
    weights = {} if recipe is DecoderDistillation else {"weights": Weights(pixels=1, blur=1)}
    for name, given in (("one", grey), ("three", grey.expand(-1, 3, -1, -1).contiguous())):
        fit(recipe, settings(klt, tmp_path / name, recipe, **weights), Silent(), data=given)
    assert same(state(tmp_path / "one"), state(tmp_path / "three"))


def test_begin_goes_on_from_a_students_weights(klt, x, tmp_path):
    how = settings(klt, tmp_path / "a", steps=90, average=0.5, student=RATE)
    first = fit(EncoderDistillation, how, Silent(), data=x)
    more = settings(klt, tmp_path / "b", begin=str(first), steps=2, size=64)
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic").clamp(-1, 1)
    same_size = fit(EncoderDistillation, dataclasses.replace(more, size=32), Silent(), data=x)
    other_size = fit(EncoderDistillation, dataclasses.replace(more, out=tmp_path / "c"), Silent(), data=large)
    rows = losses(first)
    began, ended = rows[0]["student/huber"], sum(r["student/huber"] for r in rows[-8:]) / 8
    assert ended < 0.8 * began
    assert losses(same_size)[0]["student/huber"] == pytest.approx(ended, rel=0.3)
    assert losses(other_size)[0]["student/huber"] < 0.9 * began


# ---- answers kept on disk ----


def test_cached_answers_train_the_same_student_bit_for_bit(klt, x, tmp_path):
    teacher = open_codec(klt)
    pairs = write_pairs(tmp_path / "cache", Tensors(x), len(x), answering(teacher), fingerprint(teacher), "as is")
    runs = [fit(EncoderDistillation, settings(klt, tmp_path / name, steps=6), Silent(), data=data)
            for name, data in (("asked", x), ("kept", pairs))]
    assert losses(runs[0]) == losses(runs[1]) and same(*map(state, runs))


def test_a_run_with_a_cache_asks_each_crop_once_and_lets_the_encoder_go(klt, x, tmp_path, monkeypatch):
    how = settings(klt, tmp_path / "run", cache=tmp_path / "cache", cache_crops=100)
    counted, real = [], encoder_recipe.answering
    monkeypatch.setattr(encoder_recipe, "answering",
                        lambda teacher: lambda x: counted.append(len(x)) or real(teacher)(x))
    fit(EncoderDistillation, how, Silent(), data=x)
    filled = sum(counted)
    assert 100 < filled <= 103              # and one at a time to learn what it answers like
    counted.clear()
    fit(EncoderDistillation, dataclasses.replace(how, out=tmp_path / "again"), Silent(), data=x)
    assert sum(counted) == filled - 100
    assert same(state(tmp_path / "run"), state(tmp_path / "again"))
    sources = EncoderDistillation.prepare(how, {"data": Tensors(x)}, print)
    assert isinstance(sources["data"], Pairs)
    assert EncoderDistillation(how, **sources).teacher is None


def test_answers_of_another_teacher_law_or_size_are_refused(klt, rich, x, tmp_path):
    how = settings(klt, tmp_path / "run", cache=tmp_path / "cache", cache_crops=32)
    fit(EncoderDistillation, how, Silent(), data=x)
    for change, word in (({"teacher": rich}, "codec|channels|space"), ({"crop": "random"}, "crop"),
                         ({"flip": True}, "crop"), ({"cache_crops": 33}, "origin")):
        with pytest.raises(Refusal, match=f"{tmp_path}/cache.*another ({word})"):
            fit(EncoderDistillation, dataclasses.replace(how, out=tmp_path / word[:4], **change), Silent(), data=x)
    teacher = open_codec(klt)
    pairs = write_pairs(tmp_path / "own", Tensors(x), 32, answering(teacher), fingerprint(teacher), "as is")
    with pytest.raises(Refusal, match="another codec's answers"):
        fit(EncoderDistillation, settings(rich, tmp_path / "x"), Silent(), data=pairs)


# ---- a small decoder ----


def test_a_decoder_learns_and_the_encoder_stays(klt, x, tmp_path):
    how = settings(klt, tmp_path / "run", DecoderDistillation, steps=120, average=0.5, stem="unshuffle", student=RATE)
    run = fit(DecoderDistillation, how, Silent(), data=x)
    rows, product, teacher = losses(run), stillroom.load(run), open_codec(klt)
    for term in ("student/picture", "student/teacher"):
        assert sum(r[term] for r in rows[-8:]) < 0.6 * sum(r[term] for r in rows[:8])
    assert product.space == teacher.space and isinstance(product.decoder, Decoder)
    assert torch.equal(product.encode(x), teacher.encode(x))
    mean = (x - x.mean(0)).square().mean()
    assert (product.reconstruct(x) - x).square().mean() < mean


# ---- all of them ----


class Stops(Silent):
    def row(self, row):
        if row["step"] == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", [EncoderDistillation, DecoderDistillation, FromScratch])
def test_a_resumed_run_is_the_run_never_stopped(rich, x, tmp_path, recipe):
    how = {**PLAIN, "steps": 9, "params": 9000, "checkpoint_every": 4}
    how |= {"decoder_params": 9000} if recipe is FromScratch else {"teacher": rich}
    how |= {"moments": True, "cache": tmp_path / "cache", "cache_crops": 40} if recipe is EncoderDistillation else {}
    whole = fit(recipe, recipe.Settings(**how, out=tmp_path / "whole"), Silent(), data=x)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, recipe.Settings(**how, out=tmp_path / "run"), Stops(), data=x)
    run = resume(tmp_path / "run", lambda _: recipe, {"data": x}, Silent())
    assert same(state(run), state(whole)) and losses(run) == losses(whole)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("recipe", [EncoderDistillation, DecoderDistillation, FromScratch])
def test_pictures_in_0_1_are_refused_before_anything_is_made(klt, x, tmp_path, recipe, cached):
    how = {**PLAIN, "steps": 2, "out": tmp_path / "run"} | ({} if recipe is FromScratch else {"teacher": klt})
    if cached and recipe is EncoderDistillation:
        how["cache"] = tmp_path / "cache"
    with pytest.raises(Refusal, match=r"tensors: no pixel is below 0.*give them as 2 \* x - 1"):
        fit(recipe, recipe.Settings(**how), Silent(), data=(x + 1) / 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("which", "change", "message"), [
    ("klt", {"moments": True}, "answers means alone"),
    ("rich", {"moments": True, "weights": Weights(logvar=0)}, "no term teaches the variance"),
    ("rich", {"weights": Weights(kl=1)}, "add --moments"),
    ("rich", {"weights": Weights(huber=0)}, "no term teaches the mean"),
    ("klt", {"weights": Weights(features=1)}, "BlockDecoder has no features"),
    ("klt", {"begin": "klt"}, "is a BlockEncoder, and no student"),
    ("klt", {"begin": "student"}, "lie in another space"),
    ("rich", {"begin": "student"}, "made with moments = True"),
    ("rich", {"begin": "student", "moments": True, "weights": Weights(logvar=1), "stem": "conv"},
     "stem = conv: .* keeps the form that it has, unshuffle; leave it out"),
    ("rich", {"begin": "student", "moments": True, "weights": Weights(logvar=1), "params": 7},
     "params = 7: .* keeps the form that it has"),
])
def test_what_cannot_be_is_refused_in_one_line(klt, rich, x, tmp_path, which, change, message):
    places = {"klt": klt, "rich": rich, "student": str(tmp_path / "run")}
    if change.get("begin") == "student":
        fit(EncoderDistillation, settings(rich, tmp_path / "run", moments=True), Silent(), data=x)
    if "begin" in change:
        change = change | {"begin": places[change["begin"]]}
    with pytest.raises(Refusal, match=message) as told:
        made(places[which], x, **change)
    assert "\n" not in str(told.value)


def test_sizes_that_are_no_multiple_are_refused(klt, x):
    for recipe in (EncoderDistillation, DecoderDistillation):
        with pytest.raises(Refusal, match="pictures: pictures of 30 x 30 pixels, no multiple of 8"):
            made(klt, x[..., :30, :30], recipe)
    for other in (torch.zeros(4, 2), torch.zeros(4, 8, 16, 16)):
        with pytest.raises(Refusal, match=r"pictures: holds items of shape .*, and codecs learn from pictures"):
            made(klt, other)
    with pytest.raises(Refusal, match="no multiple of 16"):
        FromScratch(FromScratch.Settings(**PLAIN, out="unused", factor=16), Tensors(x[..., :24, :24]))


@pytest.mark.parametrize("recipe", [EncoderDistillation, DecoderDistillation, FromScratch])
def test_a_perceptual_term_is_named_for_its_features_and_reaches_the_student(recipe, tmp_path, x, klt):
    rest = {"perceptual": 1.0, "decoder_params": 9000} if recipe is FromScratch else {
        "teacher": klt, "weights": recipe.Settings.__dataclass_fields__["weights"].default_factory()}
    if "weights" in rest:
        rest["weights"] = dataclasses.replace(rest["weights"], perceptual=1.0)
    settings = recipe.Settings(out=tmp_path / "run", steps=2, **SMALL, **rest)
    row = read_rows(fit(recipe, settings, Silent(), data=x) / "metrics.jsonl")[0]
    role = "model" if recipe is FromScratch else "student"
    assert [name for name in row if "lpips" in name] == [f"{role}/random_lpips"]
