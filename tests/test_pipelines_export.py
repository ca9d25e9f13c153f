"""Students of pipelines in the ordinary pipelines: their pictures are stillroom's own, from the same noise."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stillroom as package
from closed_forms import plan
from command import python, stillroom
from pipelines import FAMILIES, SIZE, TEXTS, alive, chain, edit, flow, folder_of, prompts_file
from stillroom.flows import Denoiser, FewStep, Flow, OneStep, Routed, from_diffusers
from stillroom.flows.export import to_pipeline
from stillroom.flows.prompted import PromptedNet, prompted
from stillroom.flows.samplers import samplers
from stillroom.nets import MLP, Lora
from stillroom.nets.dit import unpatchify
from stillroom.paths import Cosine, Linear
from stillroom.recipes._students import Distillation
from stillroom.settings import Refusal
from stillroom.settings.files import read_json
from stillroom.train import Product
from stillroom.train.card import readme
from stillroom.train.teacher import codec_beside, open_teacher

pytestmark = pytest.mark.filterwarnings("ignore")       # of diffusers and transformers, which go with every release
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("peft")
PLAIN = ("--steps 2 --batch 2 --guidance 2 --precision float32 --device cpu --average 0 --student.lr 0.03 "
         "--student.warmup 0")
DISTIL = f"distill dmd {PLAIN} --score.lr 0.03"
FORMS = {
    "whole": DISTIL, "adapters": f"{DISTIL} --lora 2 --student-steps 2", "sid": f"distill sid {PLAIN}",
    "hyper-sd": f"distill hyper-sd {PLAIN} --lora 2 --segments 2 1 --grid 4 --teacher-samples 2",
    "guidance-lora": f"distill guidance-lora {PLAIN} --lora 2 --teacher-samples 2",
}
RUNS = [(family, form) for family in FAMILIES for form in ("whole", "adapters")]
OTHERS = [("sd3", "sid"), ("sdxl", "hyper-sd"), ("sd", "guidance-lora")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """family/, family-prompts/; a run family-form/ and its export family-form-out/ for each."""
    place = tmp_path_factory.mktemp("students")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "check", lambda *_: None)       # random weights earn no place as teachers
        patch.setattr(Distillation, "shown", lambda *_: {})         # dear, and tested elsewhere
        for family in FAMILIES:
            folder_of(family, place / family)
            told = stillroom("cache --prompts", prompts_file(place / "texts.txt"), "--teacher", place / family,
                             "--size 64 --out", place / f"{family}-prompts",
                             "--length 8" if family in ("sd3", "flux") else "")
            assert told.code == 0, told.err
        for family, form in RUNS + OTHERS:
            told = stillroom(FORMS[form], "--teacher", place / family, "--prompts", place / f"{family}-prompts",
                             "--out", place / f"{family}-{form}")
            assert told.code == 0, told.err
            run = place / f"{family}-{form}"
            told = stillroom("export", run, "--to diffusers --out", place / f"{run.name}-out")
            assert told.code == 0 and told.err == "", told.err
    return place


DRIVER = """
import os, re, sys
for folder in sys.argv[1:]:
    os.chdir(folder)
    exec(re.search(r"```python\\n(.*?)```", open("README.md").read(), re.S)[1], {})
"""


@pytest.fixture(scope="module")
def pictures(home):
    """What the cards' snippets draw, each run as it stands in its folder, in an interpreter without stillroom."""
    folders = [home / f"{family}-{form}-out" for family, form in RUNS + OTHERS]
    done = python("-c", "import sys; sys.modules['stillroom'] = None\n" + DRIVER, *folders)
    assert done.returncode == 0, done.stderr
    return {run: np.asarray(Image.open(folder / "picture.png")).astype(float)
            for run, folder in zip(RUNS + OTHERS, folders, strict=True)}


def own_picture(home, family, form):
    """The first prompt, from the noise that the pipeline draws: in its order, and in Flux's layout."""
    generator, packed = package.load(home / f"{family}-{form}"), family == "flux"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = torch.randn(1, 4, 8, 8)
        drawn = [z]

        def noise(k):
            while len(drawn) <= k:
                drawn.append(unpatchify(torch.randn(1, 16, 16), 2, 8, 8) if packed else torch.randn(1, 4, 8, 8))
            return drawn[k]

        with torch.no_grad():
            x = drawn_by(generator, noise, torch.tensor([0]))
    codec = codec_beside(str(home / family))
    with torch.no_grad():
        return (codec.decode(x)[0].clamp(-1, 1).permute(1, 2, 0).numpy() + 1) * 127.5


def drawn_by(model, noise, y):
    if not isinstance(model, Flow):
        return model.drawing(1.0, None, None)(noise, y)
    times = model.times(model.denoiser, model.steps)
    return samplers[model.sampler](model.denoiser, model.denoiser.path.at(times[0]).sigma * noise(0), times, y)


@pytest.mark.parametrize(("family", "form"), RUNS + OTHERS)
def test_the_snippet_draws_our_own_picture(home, pictures, family, form):
    """From the words of the prompt to the pixels, within the rounding to 8 bits."""
    ours, theirs = own_picture(home, family, form), pictures[family, form]
    assert theirs.shape == (SIZE, SIZE, 3) and ours.std() > 5       # not a flat picture
    assert np.abs(ours - theirs).max() <= 0.51


@pytest.mark.parametrize("form", ["whole", "adapters"])
def test_the_snippet_draws_it_too_where_parts_lie_in_half_precision(home, pictures, tmp_path, form):
    """Those of transformers would come in it, and the others in float32."""
    from transformers import CLIPTextModel

    out, teacher = tmp_path / "out", tmp_path / "teacher"
    shutil.copytree(home / f"sd-{form}-out", out)
    shutil.copytree(home / "sd", teacher)
    for place in (teacher, out):
        if (place / "text_encoder").is_dir():
            CLIPTextModel.from_pretrained(place / "text_encoder").half().save_pretrained(place / "text_encoder")
    (out / "README.md").write_text((out / "README.md").read_text().replace(str(home / "sd"), str(teacher)))
    done = python("-c", DRIVER, out)
    assert done.returncode == 0, done.stderr
    assert np.abs(np.asarray(Image.open(out / "picture.png")).astype(float) - pictures["sd", form]).max() <= 2


@pytest.mark.parametrize(("family", "form"), RUNS)
def test_the_card_of_the_run_runs_and_tells_the_way_into_the_pipeline(home, monkeypatch, family, form):
    run = home / f"{family}-{form}"
    text, there = (run / "product/README.md").read_text(), (home / f"{family}-{form}-out/README.md").read_text()
    monkeypatch.chdir(run / "product")
    found = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], found)
    assert torch.equal(found["x"], package.load(run).sample(4, seed=0)) and "guidance: 2, in the weights" in text
    assert "of 3 prompts: label 0 is 'a cat'" in text
    assert f"stillroom export {run} --to diffusers --out {run}-diffusers\n" in text
    call = re.search(r"pipe\((?:'a cat', )?(.*)\)\.images", there)[1]       # as the export's own snippet
    assert f"Its pipeline is then called with `{call}`." in text


@pytest.mark.parametrize(("family", "form"), RUNS)
def test_the_card_says_what_was_measured(home, family, form):
    text = (home / f"{family}-{form}-out/README.md").read_text()
    assert float(re.search(r"own sampler by (\S+) of their norm", text)[1]) < 3e-6
    chains = family in ("sd", "sdxl")
    times = {("whole", True): "timesteps=[999]", ("adapters", True): "timesteps=[999, 499]",
             ("whole", False): "sigmas=[1.0]", ("adapters", False): "sigmas=[1.0, 0.5]"}[form, chains]
    assert times in text and f"guidance_scale={3.5 if family == 'flux' else 1.0}" in text
    assert ("max_sequence_length=8" in text) == (not chains)
    assert "guidance of the teacher: 2; it is in the weights" in text
    without = re.search(r"Without the line that sets `init_noise_sigma`.* by (\S+) of their norm in", text)
    assert (without is not None) == chains and (without is None or 1e-5 < float(without[1]) < 0.02)
    named = "LCMScheduler" if chains else "FlowMatchEulerDiscreteScheduler"
    assert json.loads((home / f"{family}-{form}-out/scheduler/scheduler_config.json").read_text())[
        "_class_name"] == named


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lora_file_holds_the_adapters_alone_and_they_tell(home, family):
    out = home / f"{family}-adapters-out"
    assert {f.name for f in out.iterdir()} >= {"pytorch_lora_weights.safetensors", "scheduler", "README.md"}
    assert not (out / "model_index.json").exists()
    weights = load_file(out / "pytorch_lora_weights.safetensors")
    part = "unet" if family in ("sd", "sdxl") else "transformer"
    assert weights and all(k.startswith(f"{part}.") and ".lora_" in k for k in weights)
    pipe = diffusers.DiffusionPipeline.from_pretrained(home / family)
    pipe.set_progress_bar_config(disable=True)
    how = {"prompt": "a cat", "height": SIZE, "width": SIZE, "output_type": "latent", "num_inference_steps": 2}

    def latents():
        return pipe(generator=torch.Generator().manual_seed(3), **how).images

    before = latents()
    pipe.load_lora_weights(out)
    after = latents()
    pipe.unload_lora_weights()
    assert float((after - before).norm() / before.norm()) > 1e-3 and torch.allclose(latents(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_export_is_a_pipeline_of_its_own(home, family):
    """Its own model and scheduler, all else the teacher's."""
    out, old = home / f"{family}-whole-out", home / family
    pipe, teacher = (diffusers.DiffusionPipeline.from_pretrained(place) for place in (out, old))
    part = "unet" if family in ("sd", "sdxl") else "transformer"
    assert type(pipe) is type(teacher)
    for name, mine in pipe.components.items():
        if isinstance(mine, torch.nn.Module):
            same = all(torch.equal(a, b) for a, b in zip(mine.parameters(), teacher.components[name].parameters(),
                                                          strict=True))
            assert same == (name != part), name
    net = prompted(package.load(home / f"{family}-whole"))
    assert all(torch.equal(v, net.model.state_dict()[k]) for k, v in getattr(pipe, part).state_dict().items())


# ---- other plans and moves, without a run ----


def teacher_of(home, family):
    return open_teacher(str(home / family), str(home / f"{family}-prompts"))


def measured(text: str) -> float:
    return float(re.search(r"own sampler by (\S+) of their norm", text)[1])


def exported(model, home, teacher, tmp_path, **card) -> str:
    return (to_pipeline(model, tmp_path / "out", str(home / teacher), card) / "README.md").read_text()


@pytest.mark.parametrize(("family", "move", "steps", "within"), [
    ("sd", "renoise", 8, 3e-6), ("sd", "ode", 4, 3e-6), ("sdxl", "ode", 1, 3e-6), ("sd3", "ode", 4, 3e-6),
    ("flux", "ode", 2, 3e-6), ("flux", "renoise", 4, 3e-6), ("sd3", "renoise", 3, 3e-6),
    ("sd", "renoise", 3, 2e-2), ("sdxl", "ode", 3, 2e-2),       # of 1000 timesteps, no third
])
def test_steps_of_either_kind(home, tmp_path, family, move, steps, within):
    teacher = teacher_of(home, family)
    text = exported(FewStep([teacher.denoiser], teacher.shape, [plan(steps, teacher.shift)], move), home, family,
                    tmp_path)
    assert measured(text) < within
    assert ("takes whole timesteps" in text) == (within > 1e-3)
    if family in ("sd3", "flux"):       # the plan is even under the scheduler's shift
        assert f"sigmas={[round(1 - k / steps, 9) for k in range(steps)]}" in text
        config = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
        assert config["stochastic_sampling"] == (move == "renoise")
        assert steps == 1 or config["shift"] == pytest.approx(teacher.shift, rel=1e-6)


def test_an_uneven_plan_keeps_its_times(home, tmp_path):
    teacher, times = teacher_of(home, "sd3"), (1.0, 0.9, 0.4, 0.0)
    text = exported(FewStep([teacher.denoiser], teacher.shape, [times, plan(2)], "renoise"), home, "sd3", tmp_path)
    assert "3 steps: `num_inference_steps=3, sigmas=[1.0, 0.9, 0.4]`" in text and measured(text) < 3e-6
    assert "2 steps: `num_inference_steps=2, sigmas=[1.0, 0.5]`" in text
    assert re.search(r"own sampler by \S+ of their norm in 3 steps, \S+ of their norm in 2 steps, measured", text)
    teacher = teacher_of(home, "sd")
    text = exported(FewStep([teacher.denoiser], teacher.shape, [times], "renoise"), home, "sd", tmp_path / "sd")
    assert "timesteps=[999, 899, 399]" in text and measured(text) < 3e-6
    with pytest.raises(Refusal, match="not evenly spaced, and its scheduler takes no others"):
        exported(FewStep([teacher.denoiser], teacher.shape, [times], "ode"), home, "sd", tmp_path / "ode")


def test_every_plan_is_held_against_the_pipeline(home, tmp_path, monkeypatch):
    teacher = teacher_of(home, "sd")
    model = FewStep([teacher.denoiser], teacher.shape, [plan(1), plan(3)], "renoise")
    text = exported(model, home, "sd", tmp_path)
    one, three = (float(found) for found in re.findall(r"by (\S+) of their norm in one step, (\S+) of", text)[0])
    assert one < 3e-6 and 1e-5 < three < 2e-2       # of 1000 timesteps, no third
    monkeypatch.setattr("stillroom.flows.export.folder.MOST", 1e-5)
    with pytest.raises(Refusal, match=r"% of their norm apart in 3 steps; it cannot be exported"):
        exported(model, home, "sd", tmp_path / "refused")


def test_several_plans_that_go_on_with_their_own_noise_keep_it(home, tmp_path):
    """One step is the same in both of a chain's schedulers, and the others are not."""
    teacher = teacher_of(home, "sdxl")
    text = exported(FewStep([teacher.denoiser], teacher.shape, [plan(1), plan(4)], "ode"), home, "sdxl", tmp_path)
    assert json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    assert "in one step, " in text and "in 4 steps, measured" in text and measured(text) < 3e-6


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_flow_of_many_steps(home, tmp_path, family):
    """What a distilled guidance leaves: adapters, and the teacher's steps."""
    teacher = teacher_of(home, family)
    net = Lora(teacher.denoiser.net, 2, alpha=6.0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    model = Flow(Denoiser(net, teacher.denoiser.path, teacher.denoiser.prediction), teacher.shape, teacher.sampler,
                 teacher.steps, teacher.shift)
    text = exported(model, home, family, tmp_path, guidance=4.0)
    assert f"num_inference_steps={teacher.steps}" in text and measured(text) < 1e-5
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").is_file()
    # on other weights than the teacher's the file would be wrong, and the whole pipeline is written
    other = folder_of(family, tmp_path / "other")
    part = other / ("unet" if family == "sdxl" else "transformer")
    again = alive(getattr(diffusers, type(net.net.model).__name__).from_pretrained(part), 9)
    again.save_pretrained(part)
    text = (to_pipeline(model, tmp_path / "whole", str(other)) / "README.md").read_text()
    assert (tmp_path / "whole/model_index.json").is_file() and measured(text) < 1e-5


def test_pipelines_without_prompts(tmp_path):
    from test_folders import dit, save
    from test_folders import unet as pixels

    folder = save(tmp_path / "ddpm", pixels(), chain(), "unet")
    for k, move in enumerate(("renoise", "ode")):
        teacher = from_diffusers(folder)
        text = (to_pipeline(FewStep([teacher.denoiser], teacher.shape, [plan(4)], move), tmp_path / f"ddpm-{k}",
                            str(folder)) / "README.md").read_text()
        # its pipeline starts from noise of deviation 1
        assert measured(text) < 0.02 and "picture = pipe(num_inference_steps=4).images[0]" in text
        pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / f"ddpm-{k}")
        assert torch.equal(pipe.unet.conv_in.weight, teacher.denoiser.net.model.conv_in.weight)

    from pipelines import vae

    pipe = diffusers.DiTPipeline(dit(out_channels=8), vae(4), chain())
    pipe.save_pretrained(tmp_path / "dit")
    teacher = from_diffusers(tmp_path / "dit")
    net = Lora(teacher.denoiser.net, 2)
    text = (to_pipeline(FewStep([Denoiser(net, teacher.denoiser.path, "eps")], teacher.shape, [plan(2)], "renoise"),
                        tmp_path / "merged", str(tmp_path / "dit")) / "README.md").read_text()
    assert measured(text) < 0.02 and "pipe([0], num_inference_steps=2, guidance_scale=1.0)" in text
    diffusers.DiTPipeline.from_pretrained(tmp_path / "merged")
    classes = save(tmp_path / "classes", pixels(num_class_embeds=5), chain(), "unet")
    refused(lambda: to_pipeline(one_step(from_diffusers(classes)), tmp_path / "no", str(classes)),
            "no pipeline of diffusers draws from a UNet2DModel of 5 classes")
    matched = save(tmp_path / "flow", pixels(), flow(), "unet")
    refused(lambda: to_pipeline(one_step(from_diffusers(matched)), tmp_path / "no", str(matched)),
            "its pipeline takes no times")


# ---- refusals ----


def refused(call, match: str) -> None:
    with pytest.raises(Refusal, match=match) as told:
        call()
    assert "\n" not in str(told.value)


def one_step(teacher: Flow, **more) -> OneStep:
    d = teacher.denoiser
    return OneStep(d.net, d.path, d.prediction, teacher.shape, **more)


def test_what_no_pipeline_draws(home, tmp_path):
    teacher = teacher_of(home, "sd3")
    d, shape = teacher.denoiser, teacher.shape
    few = FewStep([d], shape, [plan(2)], "renoise")
    cases = [
        (FewStep([d], shape, [plan(2)], "jump"), "told two times"),
        (FewStep([d, d], shape, [plan(2)], "ode"), "it has 2 experts, and a pipeline has one network"),
        (one_step(teacher, asked=0.0), "asked at time 0 and answers for time 1"),
        (Routed([few, few], [0, 1, 0]), "a Routed is no one network along a plan .*; it cannot be exported"),
        (OneStep(MLP(2), Linear(), "v", (2,)), "its network is a MLP, for which diffusers has no pipeline"),
        (FewStep([Denoiser(d.net, Linear(), "v", scale_input=True)], shape, [plan(2)], "ode"), "scales its input"),
        (OneStep(d.net, Cosine(), "v", shape), "predicts v on Cosine has no scheduler"),
    ]
    for model, told in cases:
        refused(lambda model=model: to_pipeline(model, tmp_path / "out", str(home / "sd3")), told)
    text = readme(Product("generator", {"generator": cases[2][0]}, {}), "boot", tmp_path)
    assert "No pipeline of diffusers draws from it: this student: its network is asked at time 0" in text
    refused(lambda: to_pipeline(few, tmp_path / "out", str(home / "flux")), "is for a StableDiffusion3Pipeline")
    other = shutil.copytree(home / "sd3", tmp_path / "other")
    edit(other / "transformer/config.json", num_layers=3)
    refused(lambda: to_pipeline(few, tmp_path / "out", str(other)), "which has another num_layers")
    shutil.rmtree(shutil.copytree(home / "sd3", tmp_path / "part") / "vae")
    refused(lambda: to_pipeline(few, tmp_path / "out", str(tmp_path / "part")), "vae is missing, and the pipeline")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_that_would_draw_something_else_is_not_left_behind(home, tmp_path, monkeypatch):
    teacher = teacher_of(home, "sd3")
    right = PromptedNet.forward
    monkeypatch.setattr(PromptedNet, "forward", lambda self, x, t, y=None, r=None: -right(self, x, t, y, r))
    refused(lambda: to_pipeline(one_step(teacher), tmp_path / "out", str(home / "sd3")), "would draw other samples")
    assert not (tmp_path / "out").exists()


def test_the_command_line_refuses(home, tmp_path):
    run = home / "sd3-adapters"

    def said(*words) -> str:
        told = stillroom("export", *words)
        assert told.code == 2 and told.err.count("\n") == 1, told
        return told.err

    assert "a generator is exported to diffusers, not to onnx" in said(run, "--to onnx --out", tmp_path / "x")
    assert "exists already" in said(run, "--to diffusers --out", home / "sd3-whole-out")
    assert "the student is for a StableDiffusion3Pipeline" in said(run, "--to diffusers --out", tmp_path / "x",
                                                                   "--teacher", home / "sd")
    ours = tmp_path / "ours"
    told = stillroom("train flow --data digits --size 8 --batch 8 --width 16 --depth 1 --precision float32 --steps 2 "
                     "--out", ours)
    assert told.code == 0, told.err
    assert "its teacher is no pipeline of diffusers" in said(ours, "--to diffusers --out", tmp_path / "x")
    assert "--teacher is for generators and flows" in said("bundled --to taesd --out", tmp_path / "x", "--teacher", run)


def test_a_run_moved_from_its_teacher_is_told_where_it_is(home, tmp_path):
    shutil.copytree(home / "flux", tmp_path / "moved")
    told = stillroom("export", home / "flux-adapters", "--to diffusers --out", tmp_path / "x", "--teacher",
                     tmp_path / "moved")
    assert told.code == 0, told.err
    assert f"FluxPipeline.from_pretrained('{tmp_path / 'moved'}', " in (tmp_path / "x/README.md").read_text()


# ---- comparing ----


def test_runs_are_compared_beside_their_pipeline_as_pictures_of_their_prompts(home, tmp_path):
    runs = [home / f"sd3-{form}" for form in ("whole", "adapters")]
    told = stillroom("compare", *runs, "--n 33 --reference 33 --teacher-steps 1 --batch 11 --codec", home / "sd3",
                     "--out", tmp_path / "compare")
    assert told.code == 0, told.err
    found = read_json(tmp_path / "compare/compare.json")
    assert found["about"]["kind"] == "pixels" and found["about"]["classes"] == len(TEXTS)
    assert [(line["steps"], line["guidance"], line["evaluations"]) for line in found["teacher"]] == [
        (1, 2, 2), (found["about"]["own_steps"], 2, 2 * found["about"]["own_steps"])]
    assert found["teacher"][-1]["paired"]["rms"] == 0
    assert [run["evaluations"] for entry in found["entries"] for run in entry["runs"]] == [1, 2]
    assert (tmp_path / "compare/grid.png").is_file()


def test_other_prompts_are_other_labels(home, tmp_path):
    (tmp_path / "texts.txt").write_text("a boat\na house\na tree\n")
    told = stillroom("cache --prompts", tmp_path / "texts.txt", "--teacher", home / "sd", "--size 64 --out",
                     tmp_path / "prompts")
    assert told.code == 0, told.err
    ask = ("--n 33 --out", tmp_path / "compare")
    told = stillroom("compare", home / "sd-whole", "--prompts", tmp_path / "prompts", *ask)
    assert (told.code, told.err.count("\n")) == (2, 1) and "are not those of" in told.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distillation, "check", lambda *_: None)
        patch.setattr(Distillation, "shown", lambda *_: {})
        told = stillroom(DISTIL, "--teacher", home / "sd", "--prompts", tmp_path / "prompts", "--out", tmp_path / "run")
        assert told.code == 0, told.err
    told = stillroom("compare", home / "sd-whole", tmp_path / "run", *ask)
    assert told.code == 2 and "with other prompts than" in told.err
    assert not (tmp_path / "compare").exists()
