"""The recipes around codecs, against what must come out: closed forms, equal runs, parts that must not move."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

import stillroom
from stillroom.codecs import Codec, fingerprint, fit_klt
from stillroom.data import Pairs, Tensors, open_source, sample, write_pairs
from stillroom.nets.coding import Decoder, Encoder
from stillroom.recipes import encoder as encoder_recipe
from stillroom.recipes.codec import FromScratch
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


@pytest.fixture(scope="module")
def scratch(tmp_path_factory, x):
    """60 steps of a codec from scratch: posteriors, and a decoder with features."""
    out = tmp_path_factory.mktemp("scratch") / "run"
    settings = FromScratch.Settings(**{**PLAIN, "batch": 16}, out=out, steps=60, stem="unshuffle", channels=4,
                                    params=20_000, decoder_params=20_000, average=0.9, model=RATE)
    return str(fit(FromScratch, settings, Silent(), data=x))


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


def test_a_codec_from_scratch_beats_the_mean_picture(scratch, x):
    codec = stillroom.load(scratch)
    z, again = codec.encode(x), codec.reconstruct(x)
    assert (again - x).square().mean() < 0.6 * (x - x.mean((2, 3), keepdim=True)).square().mean()
    flat = z.transpose(0, 1).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(4), atol=1e-4)
    assert torch.allclose(flat.std(1), torch.ones(4), atol=1e-3)
    assert codec.posterior(x).logvar is not None


def test_normalising_moves_no_reconstruction(x):
    codec = FromScratch(FromScratch.Settings(**PLAIN, out="unused", params=9000, decoder_params=9000), Tensors(x)).codec
    from stillroom.recipes.codec import normalised

    assert torch.allclose(normalised(codec, x).reconstruct(x), codec.reconstruct(x), atol=1e-5)


# ---- a small encoder ----


def test_a_linear_student_of_full_width_finds_the_linear_teacher(klt, x, tmp_path, monkeypatch):
    """Least squares has a solution: 8x8 blocks lie within what two strided convolutions see."""
    monkeypatch.setattr(encoder_recipe, "FACTORS", {8: (0, 0, 0, 0)})
    run = fit(EncoderDistillation, settings(klt, tmp_path / "run", steps=400, params=60_000, batch=16, average=0.9,
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


def test_through_the_decoder_pass_gradients_but_no_steps(scratch, x, tmp_path):
    before = open_codec(scratch).decoder.state_dict()
    every = Weights(**{f.name: 0.5 for f in dataclasses.fields(Weights)})
    run = fit(EncoderDistillation, settings(scratch, tmp_path / "run", moments=True, weights=every), Silent(), data=x)
    assert same(before, stillroom.load(run).decoder.state_dict())
    rows = losses(run)      # the trainer has refused terms that do not reach the student
    assert set(rows[0]) == {f"student/{f.name}" for f in dataclasses.fields(Weights)}
    assert all(value > 0 for row in rows for value in row.values())


def test_terms_are_zero_at_the_teachers_own_answers(scratch, x):
    every = Weights(**{f.name: 1.0 for f in dataclasses.fields(Weights)})
    recipe = made(scratch, x, moments=True, weights=every)
    t = open_codec(scratch).posterior(x[:4])
    terms = {name: term() for name, (_, term) in recipe.terms(x[:4], t, t).items()}
    error = open_codec(scratch).decode(t.mean) - x[:4]
    expected = error.abs().flatten(1).mean(1) + error.square().flatten(1).mean(1)
    assert torch.allclose(terms.pop("pixels"), expected)
    assert all(term.abs().max() < 1e-6 for term in terms.values()), terms


def test_what_counts_nothing_is_not_computed_and_nothing_twice(scratch, x):
    calls = []
    for weights, expected in ((Weights(), ["encoder"]), (Weights(pixels=1, blur=1), ["encoder", "decoder", "decoder"])):
        recipe = made(scratch, x, weights=weights)
        for half in ("encoder", "decoder"):
            getattr(recipe.teacher, half).register_forward_hook(lambda *_, half=half: calls.append(half))
        calls.clear()
        recipe.losses({"data": (Tensors(x).fetch(range(4), 0))}, None)
        assert calls == expected        # the decoder: once of the student's latents, once of the teacher's


def test_under_autocast_losses_are_float32(scratch, x):
    recipe = made(scratch, x, moments=True, weights=Weights(pixels=1, blur=1, features=1, kl=1, statistics=1))
    plain = recipe.losses({"data": Tensors(x).fetch(range(8), 0)}, None)["student"]
    with torch.autocast("cpu", torch.bfloat16):
        terms = recipe.losses({"data": Tensors(x).fetch(range(8), 0)}, None)["student"]
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert float(term.mean()) == pytest.approx(float(plain[name].mean()), rel=0.05), name


def test_a_student_begins_at_the_teachers_statistics(klt, x):
    recipe = made(klt, x)
    z = open_codec(klt).answer(x).transpose(0, 1).flatten(1)
    student = recipe.codec.encoder
    assert torch.allclose(student.shift.flatten(), z.mean(1), atol=1e-5)
    assert torch.allclose(student.scale.flatten(), z.std(1), rtol=1e-4)


def test_padding_takes_the_grid_nearest_to_the_teachers(klt, x):
    codec = open_codec(klt)
    for offset, stem, expected in ((7.0, "conv", 7.0), (0.0, "conv", 0.0), (7.0, "unshuffle", 5.5), (0, "unshuffle", 1.5)):
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
    first = fit(EncoderDistillation, settings(klt, tmp_path / "a", steps=60, average=0.5, student=RATE), Silent(), data=x)
    more = settings(klt, tmp_path / "b", begin=str(first), steps=2, size=64)
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic").clamp(-1, 1)
    same_size = fit(EncoderDistillation, dataclasses.replace(more, size=32), Silent(), data=x)
    other_size = fit(EncoderDistillation, dataclasses.replace(more, out=tmp_path / "c"), Silent(), data=large)
    rows = losses(first)
    began, ended = rows[0]["student/mse"], sum(r["student/mse"] for r in rows[-8:]) / 8
    assert ended < 0.5 * began
    assert losses(same_size)[0]["student/mse"] == pytest.approx(ended, rel=0.3)
    assert losses(other_size)[0]["student/mse"] < 0.7 * began


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


def test_answers_of_another_teacher_law_or_size_are_refused(klt, scratch, x, tmp_path):
    how = settings(klt, tmp_path / "run", cache=tmp_path / "cache", cache_crops=32)
    fit(EncoderDistillation, how, Silent(), data=x)
    for change, word in (({"teacher": scratch}, "codec|channels|space"), ({"crop": "random"}, "crop"),
                         ({"flip": True}, "crop"), ({"cache_crops": 33}, "origin")):
        with pytest.raises(Refusal, match=f"{tmp_path}/cache.*another ({word})"):
            fit(EncoderDistillation, dataclasses.replace(how, out=tmp_path / word[:4], **change), Silent(), data=x)
    teacher = open_codec(klt)
    pairs = write_pairs(tmp_path / "own", Tensors(x), 32, answering(teacher), fingerprint(teacher), "as is")
    with pytest.raises(Refusal, match="another codec's answers"):
        fit(EncoderDistillation, settings(scratch, tmp_path / "x"), Silent(), data=pairs)


PROCESSES = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from stillroom.recipes import encoder
from stillroom.train import Silent, start

out, teacher = Path(sys.argv[1]), sys.argv[2]
if len(sys.argv) > 3:
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))      # less than what is prepared takes
    rank, real = dist.get_rank(), encoder.answering
    def answering(codec):
        def answer(x):
            with open(out.parent / f"asked-{rank}", "a") as file:
                file.write(f"{len(x)}\\n")
            if rank == 0 and len(x) == 16:
                time.sleep(4)
            return real(codec)(x)
        return answer
    encoder.answering = answering
settings = encoder.Settings(out=out, teacher=teacher, data="leaves", size=32, steps=4, params=9000, batch=8,
                            precision="float32", log_every=1, cache=out.parent / "cache", cache_crops=32)
start(encoder.EncoderDistillation, settings, "encoder", watch=Silent())
if len(sys.argv) > 3:
    dist.destroy_process_group()
"""


def test_of_two_processes_one_prepares_and_both_learn_what_one_would(klt, tmp_path):
    (tmp_path / "run.py").write_text(PROCESSES)
    together = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    runs = []
    for name, launcher, more in (("one", [sys.executable], []), ("two", together, ["wait"])):
        (tmp_path / name).mkdir()
        done = subprocess.run([*launcher, str(tmp_path / "run.py"), str(tmp_path / name / "run"), klt, *more],
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=100,
                              check=False)
        assert done.returncode == 0, done.stderr
        runs.append(state(tmp_path / name / "run"))
    assert all(torch.allclose(runs[0][k], runs[1][k], atol=1e-6) for k in runs[0])
    asked = [sum(map(int, (tmp_path / f"two/asked-{rank}").read_text().split())) for rank in (0, 1)]
    assert asked[0] >= 32 and asked[1] < 8


# ---- a small decoder ----


def test_a_decoder_learns_and_the_encoder_stays(klt, x, tmp_path):
    how = settings(klt, tmp_path / "run", DecoderDistillation, steps=80, average=0.5, stem="unshuffle", student=RATE)
    run = fit(DecoderDistillation, how, Silent(), data=x)
    rows, product, teacher = losses(run), stillroom.load(run), open_codec(klt)
    for term in ("student/picture", "student/teacher"):
        assert sum(r[term] for r in rows[-8:]) < 0.6 * sum(r[term] for r in rows[:8])
    assert product.space == teacher.space and isinstance(product.decoder, Decoder)
    assert torch.equal(product.encode(x), teacher.encode(x))
    mean = (x - x.mean((2, 3), keepdim=True)).square().mean()
    assert (product.reconstruct(x) - x).square().mean() < mean


# ---- all of them ----


class Stops(Silent):
    def row(self, row):
        if row["step"] == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("recipe", [EncoderDistillation, DecoderDistillation, FromScratch])
def test_a_resumed_run_is_the_run_never_stopped(scratch, x, tmp_path, recipe):
    how = {**PLAIN, "steps": 9, "params": 9000, "checkpoint_every": 4}
    how |= {"decoder_params": 9000} if recipe is FromScratch else {"teacher": scratch}
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
    ("scratch", {"moments": True, "weights": Weights(logvar=0)}, "no term teaches the variance"),
    ("scratch", {"weights": Weights(kl=1)}, "add --moments"),
    ("scratch", {"weights": Weights(mse=0)}, "no term teaches the mean"),
    ("klt", {"weights": Weights(features=1)}, "BlockDecoder has no features"),
    ("klt", {"begin": "klt"}, "is a BlockEncoder, and no student"),
    ("klt", {"begin": "scratch"}, "lie in another space"),
    ("scratch", {"begin": "scratch"}, "made with moments = True"),
])
def test_what_cannot_be_is_refused_in_one_line(klt, scratch, x, which, change, message):
    places = {"klt": klt, "scratch": scratch}
    if "begin" in change:
        change = {"begin": places[change["begin"]]}
    with pytest.raises(Refusal, match=message) as told:
        made(places[which], x, **change)
    assert "\n" not in str(told.value)


def test_sizes_that_are_no_multiple_are_refused(klt, x):
    for recipe in (EncoderDistillation, DecoderDistillation):
        with pytest.raises(Refusal, match="pictures: pictures of 30 x 30 pixels, no multiple of 8"):
            made(klt, x[..., :30, :30], recipe)
    with pytest.raises(Refusal, match="no multiple of 16"):
        FromScratch(FromScratch.Settings(**PLAIN, out="unused", factor=16), Tensors(x[..., :24, :24]))
