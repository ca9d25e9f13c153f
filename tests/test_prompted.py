"""Text-to-image teachers against diffusers' own pipelines, tiny ones of the true classes; prompts on disk; refusals."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from command import files, stillroom
from pipelines import FAMILIES, SIZE, TEXTS, chain, edit, flow, folder_of, prompts_file, unet, vae
from stepping import steps_of, trainer_of
from stillroom.flows import noise_of
from stillroom.flows.families import latents_of
from stillroom.flows.prompted import PromptedNet, from_pipeline, prompted
from stillroom.flows.prompts import cache_prompts, open_prompts
from stillroom.nets import MLP, DiT, Lora, build, describe
from stillroom.nets.recompute import recompute
from stillroom.recipes import find
from stillroom.recipes._adversary import Adversarial
from stillroom.recipes._students import Distillation
from stillroom.recipes.dmd import DMD
from stillroom.settings import Optimizer, Refusal
from stillroom.train.teacher import open_teacher
from stillroom.train.turn import Noise

pytestmark = pytest.mark.filterwarnings("ignore")       # of diffusers and transformers, which go with every release
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
LENGTH = {"sd": (), "sdxl": (), "sd3": ("--length", "8"), "flux": ("--length", "8")}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """family/ and family-prompts/ of each."""
    place = tmp_path_factory.mktemp("teachers")
    for family in FAMILIES:
        folder_of(family, place / family)
        told = stillroom("cache --prompts", prompts_file(place / "texts.txt"), "--teacher", place / family, "--size",
                         str(SIZE), "--out", place / f"{family}-prompts", *LENGTH[family])
        assert told.code == 0 and "3 prompts for pictures of 64 x 64" in told.out, told.err
    return place


def opened(home: Path, family: str):
    return open_teacher(str(home / family), str(home / f"{family}-prompts"))


def refused(*words) -> str:
    told = stillroom(*words)
    assert told.code == 2 and told.err.count("\n") == 1, told
    return told.err


# ---- against the pipelines ----


def ordinary(home: Path, family: str):
    kind = {"sd": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline,
            "sd3": diffusers.StableDiffusion3Pipeline, "flux": diffusers.FluxPipeline}[family]
    pipe = kind.from_pretrained(home / family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_four_guided_steps_are_those_of_the_pipeline(home, family):
    """Texts in, latents out: encoders, the null prompt, sizes, packing, times and shift are all in it."""
    teacher, pipe = opened(home, family), ordinary(home, family)
    ours = teacher.sample(3, seed=5, guidance=2.0, steps=4)
    z = noise_of(teacher.shape, 0, 3, 5)
    how = {"latents": z, "output_type": "latent", "height": SIZE, "width": SIZE, "num_inference_steps": 4}
    if family in ("sd", "sdxl"):
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
        pipe.scheduler.init_noise_sigma = float(teacher.denoiser.path.at(torch.ones(())).sigma)
        how["guidance_scale"] = 2.0
    elif family == "sd3":
        how |= {"guidance_scale": 2.0, "sigmas": [1.0, 0.75, 0.5, 0.25], "max_sequence_length": 8}
    else:
        how |= {"guidance_scale": 3.5, "true_cfg_scale": 2.0, "negative_prompt": [""] * 3, "max_sequence_length": 8,
                "latents": pipe._pack_latents(z, 3, 4, 8, 8)}
    theirs = pipe(list(TEXTS), **how).images
    if family == "flux":
        theirs = pipe._unpack_latents(theirs, SIZE, SIZE, 8)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    other = teacher.sample(3, seed=5, guidance=2.0, steps=4, y=torch.tensor([1, 2, 0]))
    assert float((ours - other).norm() / ours.norm()) > 1e-3        # the prompt tells


def test_the_null_prompt_is_what_the_pipeline_guides_away_from(home):
    for family in FAMILIES:
        prompts, table = open_prompts(home / f"{family}-prompts")
        assert prompts.texts == TEXTS and prompts.embeddings[0] == len(TEXTS) + 1
        assert (prompts.pipeline, prompts.size, prompts.shape) == (ordinary(home, family).__class__.__name__, SIZE,
                                                                   (4, 8, 8))
        zero = bool((table["embeddings"][-1] == 0).all())
        assert zero == (family == "sdxl")           # as its model_index.json asks
        net = prompted(opened(home, family))
        x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
        with torch.no_grad():
            assert net is not None and torch.equal(net(x, t), net(x, t, torch.tensor([3, 3])))


def test_the_shift_of_flux_is_that_of_the_size(home):
    """mu from 0.5 at 256 tokens to 1.15 at 4096, and 16 tokens here."""
    mu = 0.5 + (1.15 - 0.5) * (16 - 256) / (4096 - 256)
    assert opened(home, "flux").shift == pytest.approx(math.exp(mu), rel=1e-6)
    assert opened(home, "sd3").shift == 3.0 and opened(home, "sd").shift == 1.0


def test_a_teacher_is_written_down_and_copied_with_one_table(home):
    for family in FAMILIES:
        teacher = opened(home, family)
        again = build(json.loads(json.dumps(describe(teacher)))).eval()
        again.load_state_dict(teacher.state_dict())
        assert torch.equal(teacher.sample(3, steps=2), again.sample(3, steps=2))
        net = prompted(teacher)
        assert net is not None
        twin = copy.deepcopy(net)
        assert twin.embeddings is net.embeddings and all(
            a is not b and torch.equal(a, b) for a, b in zip(twin.parameters(), net.parameters(), strict=True))
        assert copy.deepcopy(Lora(twin, 2)).net.embeddings is net.embeddings


# ---- prompts on disk ----


def test_the_same_prompts_again_are_left_and_others_refused(home, tmp_path):
    words = ["cache --teacher", home / "sd", "--size 64 --out", tmp_path / "p", "--prompts"]
    assert stillroom(*words, prompts_file(tmp_path / "a.txt")).code == 0
    before = (tmp_path / "p/prompts.safetensors").stat().st_mtime_ns
    assert files(tmp_path / "p") == ["prompts.json", "prompts.safetensors"]
    assert stillroom(*words, tmp_path / "a.txt", "--batch 1").code == 0
    assert (tmp_path / "p/prompts.safetensors").stat().st_mtime_ns == before
    assert "exists already; choose a new folder" in refused(*words, prompts_file(tmp_path / "b.txt", ["another"]))
    # by ones, the same numbers
    cache_prompts(tmp_path / "a.txt", str(home / "sd"), 64, tmp_path / "q", batch=1)
    a, b = (open_prompts(tmp_path / name)[1]["embeddings"] for name in "pq")
    assert torch.allclose(a, b, atol=1e-6)


def test_half_precision_halves_the_table(home, tmp_path):
    prompts = cache_prompts(prompts_file(tmp_path / "a.txt"), str(home / "sdxl"), 64, tmp_path / "p",
                            precision="bfloat16")
    exact, rough = open_prompts(home / "sdxl-prompts")[1], open_prompts(tmp_path / "p")[1]
    assert prompts.dtype == "bfloat16" and rough["embeddings"].dtype == torch.bfloat16
    assert float((rough["embeddings"] - exact["embeddings"]).norm() / exact["embeddings"].norm()) < 0.02
    x = from_pipeline(home / "sdxl", tmp_path / "p").sample(2, steps=2)
    assert x.dtype == torch.float32 and torch.isfinite(x).all()


@pytest.mark.parametrize(("family", "words", "told"), [
    ("sd", "--prompts none.txt --size 64", "no readable text file"),
    ("sd", "--prompts empty.txt --size 64", "holds no prompts"),
    ("sd", "--prompts texts.txt --size 60", "makes pictures of multiples of 8 pixels"),
    ("sd3", "--prompts texts.txt --size 72", "makes pictures of multiples of 16 pixels"),
    ("sd3", "--prompts texts.txt --size 256", "knows positions up to 128 pixels"),
    ("sd", "--prompts texts.txt --size 64 --length 8", "has no T5"),
    ("flux", "--prompts texts.txt --size 64 --length 513", "at most 512 tokens"),
    ("sdxl", "--prompts texts.txt --size 64 --guidance 2", "is not told one"),
    ("sd", "--prompts texts.txt --size 64 --sizee 3", "--sizee is not a setting"),
    ("sd", "--prompts texts.txt", "--size must be given"),
])
def test_prompts_that_cannot_be_cached(home, tmp_path, monkeypatch, family, words, told):
    monkeypatch.chdir(tmp_path)
    prompts_file(Path("texts.txt"))
    Path("empty.txt").write_text("\n  \n")
    assert told in refused("cache --out p --teacher", home / family, words)
    assert not Path("p").exists()


def test_text_encoders_are_loaded_whole_or_not_at_all(home, tmp_path):
    words = ["cache --size 64 --prompts", prompts_file(tmp_path / "a.txt"), "--out", tmp_path / "p", "--teacher"]
    folder = shutil.copytree(home / "sd", tmp_path / "sd")
    file = folder / "text_encoder/model.safetensors"
    weights = load_file(file)
    first = sorted(weights)[0]
    save_file({k: w for k, w in weights.items() if k != first}, file, metadata={"format": "pt"})
    assert "the weights do not fit the config.json: 1 missing" in refused(*words, folder)
    named = file.rename(folder / "text_encoder/model.fp16.safetensors")
    assert "model.safetensors is missing; there is model.fp16.safetensors: rename it" in refused(*words, folder)
    named.unlink()
    assert "transformers cannot load it" in refused(*words, folder)
    shutil.rmtree(folder / "text_encoder")
    assert "is missing: prompts are cached with the text encoders" in refused(*words, folder)
    folder = shutil.copytree(home / "sd", tmp_path / "other")
    edit(folder / "model_index.json", text_encoder=["their_module", "Encoder"])
    assert "text_encoder is Encoder, and must be one of CLIPTextModel" in refused(*words, folder)
    edit(folder / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    assert "makes no pictures of prompts that stillroom knows of" in refused(*words, folder)
    assert not (tmp_path / "p").exists()


# ---- teachers refused ----


def refused_teacher(teacher, prompts="") -> str:
    with pytest.raises(Refusal) as told:
        open_teacher(str(teacher), str(prompts))
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_pipeline_without_prompts_is_told_what_to_do(home, tmp_path):
    told = refused("distill dmd --out", tmp_path / "run", "--teacher", home / "sd")
    assert f"stillroom cache --prompts FILE --teacher {home}/sd --size PIXELS --out DIR, and give --prompts DIR" in told
    assert "no prompts.json is there" in refused_teacher(home / "sd", tmp_path)
    assert "knows no prompts" in refused_teacher("ring:3", home / "sd-prompts")


def test_prompts_of_another_teacher(home, tmp_path):
    assert "of a FluxPipeline, and" in refused_teacher(home / "sd", home / "flux-prompts")
    folder = folder_of("sd", tmp_path / "sd")
    open_teacher(str(folder), str(home / "sd-prompts"))         # the same encoders, saved once more
    file = folder / "text_encoder/model.safetensors"
    weights = load_file(file)
    name = next(k for k in weights if k.endswith("layers.0.mlp.fc1.weight"))
    save_file(weights | {name: weights[name] + 1e-3}, file, metadata={"format": "pt"})
    assert "encoded by another teacher" in refused_teacher(folder, home / "sd-prompts")
    wider = folder_of("sd", tmp_path / "wider", vae=vae(8), unet=unet(8, in_channels=8, out_channels=8))
    assert "for latents of [4, 8, 8]" in refused_teacher(wider, home / "sd-prompts")


def test_a_damaged_table(home, tmp_path):
    folder = shutil.copytree(home / "sd-prompts", tmp_path / "p")
    table = load_file(folder / "prompts.safetensors")
    save_file({"embeddings": table["embeddings"] + 1}, folder / "prompts.safetensors")
    assert "is not the table that prompts.json tells of" in refused_teacher(home / "sd", folder)
    edit(folder / "prompts.json", format=2)
    assert "another format than 1" in refused_teacher(home / "sd", folder)


@pytest.mark.parametrize(("changes", "told"), [
    ({"scheduler": diffusers.LCMScheduler()}, "no path is known for a LCMScheduler"),
    ({"scheduler": chain(prediction_type="sample"), "unet": unet(8, in_channels=9)}, "answers 4 channels for 9"),
    ({"unet": unet(8, time_cond_proj_dim=8)}, "time_cond_proj_dim 8 is an input"),
    ({"unet": unet(12)}, "width 8 and pooled ones of 0, and the model takes 12 and 0"),
    ({"scheduler": flow(invert_sigmas=True)}, "invert_sigmas"),
])
def test_models_and_schedulers_that_are_not_understood(home, tmp_path, changes, told):
    folder = folder_of("sd", tmp_path / "sd", **changes)
    prompts = shutil.copytree(home / "sd-prompts", tmp_path / "p")
    if "9" in told:         # the latents are checked before the model
        edit(prompts / "prompts.json", shape=[9, 8, 8])
    assert told in refused_teacher(folder, prompts)


def test_another_model_in_the_place_of_the_pipelines_own(home, tmp_path):
    folder = shutil.copytree(home / "sd", tmp_path / "sd")
    edit(folder / "unet/config.json", _class_name="UNet2DModel")
    assert "a UNet2DModel, where a StableDiffusionPipeline has a UNet2DConditionModel" in refused_teacher(
        folder, home / "sd-prompts")
    edit(folder / "unet/config.json", _class_name="UNet2DConditionModel", cross_attention_dimm=8)
    assert "did you mean 'cross_attention_dim'" in refused_teacher(folder, home / "sd-prompts")


def test_sizes_by_family(home):
    from stillroom.flows.families import FAMILIES as KNOWN

    for name, folder in (("StableDiffusionXLPipeline", "sdxl"), ("FluxPipeline", "flux")):
        assert latents_of(home / folder, KNOWN[name], 96) == (4, 12, 12)


# ---- students ----

RATE = Optimizer(lr=1e-2, clip=1.0)
PLAIN = {"precision": "float32", "device": "cpu", "steps": 2, "batch": 2, "average": 0.5, "student": RATE,
         "score": RATE}


def recipe(home, family, tmp_path, **more):
    torch.manual_seed(0)
    settings = DMD.Settings(out=tmp_path / "run", teacher=str(home / family), prompts=str(home / f"{family}-prompts"),
                            **(PLAIN | more))
    return DMD(settings), settings


def after(made, settings):
    trainer = trainer_of(made, settings)
    for _ in steps_of(trainer, settings.steps):
        pass
    return made.student.state_dict()


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_what_is_computed_again_is_the_same(home, tmp_path, family):
    kept = after(*recipe(home, family, tmp_path))
    again = after(*recipe(home, family, tmp_path, checkpointing=True))
    begun = recipe(home, family, tmp_path)[0].student.state_dict()
    assert kept.keys() == again.keys()
    assert all(torch.allclose(kept[k], again[k], atol=1e-6) for k in kept)
    assert any(not torch.equal(kept[k], begun[k]) for k in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_that_rests_elsewhere_teaches_the_same(home, tmp_path, family):
    kept, away = (after(*recipe(home, family, tmp_path, offload=offloaded)) for offloaded in (False, True))
    assert all(torch.equal(kept[name], away[name]) for name in kept)


def test_blocks_of_our_own_transformers_are_computed_again():
    torch.manual_seed(0)
    net = DiT(4, 8, width=16, depth=2, heads=2, classes=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 2])

    def gradients():
        net.zero_grad()
        seen = []
        hook = net.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
        net(x, t, y).square().sum().backward()
        hook.remove()
        return [p.grad.clone() for p in net.parameters()], len(seen)

    plain, once = gradients()
    names = list(net.state_dict())
    recompute(net)
    again, twice = gradients()
    assert (once, twice) == (1, 2) and list(net.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert isinstance(build(describe(net)), DiT)
    with pytest.raises(Refusal, match="a MLP has no blocks"):
        recompute(MLP(2))


def test_checkpointing_and_toggled_adapters_exclude_each_other(home, tmp_path):
    with pytest.raises(Refusal, match="leave out --checkpointing"):
        recipe(home, "sd3", tmp_path, checkpointing=True, fake_lora=2)


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_the_other_ways_of_a_recipe(home, tmp_path, family):
    """Adapters as the fake, an adversary on the model's features, guidance, several steps."""
    made, settings = recipe(home, family, tmp_path, fake_lora=2, guidance=2.0, lora=2, student_steps=2,
                            teacher_samples=4, adversarial=Adversarial(weight=0.1))
    made.ends.flow.steps = 2
    begun = {k: v.clone() for k, v in made.student.state_dict().items()}
    moved = after(made, settings)
    assert {k for k in moved if not torch.equal(moved[k], begun[k])} and all(
        "lora_" in k for k in moved if not torch.equal(moved[k], begun[k]))


def test_labels_of_more_prompts_than_a_batch_are_drawn(home, tmp_path):
    def labels(batch: int, steps: int) -> list[int]:
        made, settings = recipe(home, "sd3", tmp_path, batch=batch, steps=steps)
        trainer = trainer_of(made, settings)
        turns = (trainer.make_turn(k, frozenset(), Noise(0, k, torch.device("cpu")), 0) for k in range(steps))
        return [y for turn in turns for y in made.labels(turn).tolist()]

    drawn = labels(2, 150)
    assert all(80 <= drawn.count(y) <= 120 for y in range(3))       # 100 each, deviation 8
    assert labels(6, 1) == [0, 1, 2, 0, 1, 2]


def test_previews_are_pictures_of_the_first_prompts(home, tmp_path, monkeypatch):
    made, _ = recipe(home, "sd", tmp_path)
    made.flow.steps = 2
    seen = made.preview()
    pipe = ordinary(home, "sd")
    for name, z in (("teacher", made.flow.sample(8)), ("samples", made.generator().sample(8))):
        with torch.no_grad():
            truth = pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)
        assert seen[name].shape == (8, 3, SIZE, SIZE) and torch.allclose(seen[name], truth, atol=1e-4), name
    monkeypatch.setattr(Distillation, "check", lambda *_: None)     # random weights earn no place as teachers
    told = stillroom("distill dmd --steps 2 --batch 2 --precision float32 --device cpu --out", tmp_path / "run",
                     "--teacher", home / "sd3", "--prompts", home / "sd3-prompts")
    assert told.code == 0, told.err
    assert [f for f in files(tmp_path / "run/samples") if f.endswith(".png")] == [
        "step-00000002-samples.png", "step-00000002-teacher.png"]


def test_random_teachers_do_not_pass_the_gate(home, tmp_path):
    made, _ = recipe(home, "sd3", tmp_path)
    made.flow.steps = 2
    with pytest.raises(Refusal, match="fails the teacher gate"):
        made.check({})


@pytest.mark.parametrize("name", ["dmd", "sds", "vsd"])
def test_the_gate_takes_few_samples_of_the_teacher(home, tmp_path, name):
    """Batch by batch, and is asked of all of them at once."""
    recipe = find(name)
    made = recipe(recipe.Settings(out=tmp_path / "run", teacher=str(home / "sd3"), prompts=str(home / "sd3-prompts"),
                                  batch=16, steps=2))
    made.flow.steps, asked = 2, []
    made.flow.denoiser.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    with pytest.raises(Refusal, match="fails the teacher gate"):
        made.check({})
    assert asked[:4] == [16] * 4 and set(asked[4:]) == {32}


def test_the_contract_of_nets(home):
    net = prompted(opened(home, "sd"))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    assert isinstance(net, PromptedNet) and net.classes == 3 and not net.two_times
    with pytest.raises(ValueError, match="takes one time"):
        net(x, t, r=t)
    with pytest.raises(ValueError, match="expected one time per sample"):
        net(x, t[:, None].expand(2, 3))


def test_the_commands_of_the_page_run(home, tmp_path, monkeypatch):
    """As they stand, but for the size of what they make."""
    page = (Path(__file__).parents[1] / "docs/text-to-image.md").read_text()
    lines = page.partition("```bash\n")[2].partition("```")[0].replace("--size 512", "--size 64")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Distillation, "check", lambda *_: None)
    monkeypatch.setattr(Distillation, "shown", lambda *_: {})
    shutil.copytree(home / "sd", "sd")
    prompts_file(Path("prompts.txt"))
    for line in lines.strip().splitlines():
        more = " --steps 2 --device cpu --precision float32" if " distill " in line else ""
        told = stillroom(line.removeprefix("stillroom ").replace("--batch 16", "--batch 2") + more)
        assert told.code == 0, told.err
    assert Path("student.png").stat().st_size > 1000
    assert Path("student-lora/pytorch_lora_weights.safetensors").is_file()
