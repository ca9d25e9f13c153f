"""Teachers from diffusers folders against diffusers' own schedulers, on tiny models of the true classes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import alive
from stillroom.flows import DiffusersNet, Flow, ddim, euler, from_diffusers, guided
from stillroom.nets import build, describe
from stillroom.paths import Linear, uniform_grid
from stillroom.settings import Refusal

diffusers: Any = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def unet(**more):
    return alive(diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, **more,
    ))


def dit(out_channels=None):
    return alive(diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=out_channels, num_layers=2,
        sample_size=8, patch_size=2, num_embeds_ada_norm=5,
    ))


def save(folder: Path, model, scheduler, part=None) -> Path:
    """As a pipeline (part is the name of the model's subfolder), or as a model beside its scheduler."""
    model.save_pretrained(folder / part if part else folder)
    scheduler.save_pretrained(folder / "scheduler")
    if part:
        index = {"_class_name": "DDPMPipeline", part: ["diffusers", type(model).__name__],
                 "scheduler": ["diffusers", type(scheduler).__name__]}
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def edit(file: Path, **changes):
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}))


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(name):
    """(model, part, how diffusers itself asks it, labels)"""
    y = torch.tensor([0, 3, 4, 2])
    if name == "unet":
        model = unet()
        return model, "unet", lambda x, k: model(x, k).sample, None
    if name == "classes":
        model = unet(num_class_embeds=5)
        return model, "unet", lambda x, k: model(x, k, class_labels=y).sample, y
    if name == "learned variance":
        model = dit(out_channels=8)
        return model, "transformer", lambda x, k: model(x, k.expand(len(x)), class_labels=y).sample[:, :4], y
    model = dit()
    return model, "transformer", lambda x, k: model(x, k.expand(len(x)), class_labels=y).sample, y


CASES = ["unet", "classes", "dit", "learned variance"]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_denoiser_answers_what_the_scheduler_computes(tmp_path, name, prediction):
    model, part, ask, y = case(name)
    theirs = diffusers.DDIMScheduler(1000, clip_sample=False, prediction_type=prediction, beta_schedule="scaled_linear")
    flow = from_diffusers(save(tmp_path, model, theirs, part))
    assert flow.shape == (model.config.in_channels, 8, 8) and flow.classes == (None if y is None else 5)
    x = draws(4, *flow.shape)
    theirs.set_timesteps(1000)
    for k in (0, 17, 500, 998):
        said, t = ask(x, torch.tensor(k)), torch.full((4,), (k + 1) / 1000)
        assert torch.allclose(flow.denoiser(x, t, y), said, atol=1e-5)
        x0 = theirs.step(said, k, x).pred_original_sample
        assert torch.allclose(flow.denoiser.x0(x, t, y), x0, rtol=1e-4, atol=1e-4 * float(x0.abs().max()))
        alpha_bar = theirs.alphas_cumprod[k]
        eps = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        # diffusers keeps alpha_bar in float32, whose distance to 1 is good to 1e-4 at k=0
        assert torch.allclose(flow.denoiser.eps(x, t, y), eps, rtol=1e-3, atol=1e-3 * float(eps.abs().max()))


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_ten_steps_of_ddim_are_those_of_diffusers(tmp_path, name, schedule):
    model, part, ask, y = case(name)
    theirs = diffusers.DDIMScheduler(1000, clip_sample=False, timestep_spacing="trailing", beta_schedule=schedule,
                           prediction_type="v_prediction" if schedule != "linear" else "epsilon")
    flow = from_diffusers(save(tmp_path, model, theirs, part))
    theirs.set_timesteps(10)
    assert theirs.timesteps.tolist() == list(range(999, 0, -100))
    x = start = draws(4, *flow.shape)
    for k in theirs.timesteps:
        x = theirs.step(ask(x, k), k, x, eta=0.0).prev_sample
    ours = ddim(flow.denoiser, start, uniform_grid(10), y)
    assert float((ours - x).norm() / x.norm()) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_ten_steps_of_flow_matching_are_those_of_diffusers(tmp_path, name, shift):
    model, part, ask, y = case(name)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    flow = from_diffusers(save(tmp_path, model, theirs, part))
    assert flow.shift == shift and flow.denoiser.path == Linear() and flow.denoiser.prediction == "v"
    # Given the unshifted times, diffusers shifts them as Flow does.
    theirs.set_timesteps(sigmas=uniform_grid(10)[:-1].tolist())
    assert torch.allclose(theirs.sigmas.double(), uniform_grid(10, s=shift), atol=1e-6)
    x = start = draws(4, *flow.shape)
    for k in theirs.timesteps:
        x = theirs.step(ask(x, k), k, x).prev_sample
    ours = euler(flow.denoiser, start, uniform_grid(10, s=shift), y)
    assert float((ours - x).norm() / x.norm()) < 1e-5


@pytest.mark.parametrize("kind", [
    "DDPM", "DDIM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "DPMSolverSinglestep",
    "UniPCMultistep", "HeunDiscrete", "LMSDiscrete", "DEISMultistep", "KDPM2Discrete",
])
def test_every_scheduler_of_betas_gives_its_own_chain(tmp_path, kind):
    """Its defaults too: configurations of older versions leave keys out."""
    theirs = getattr(diffusers, f"{kind}Scheduler")(num_train_timesteps=500)
    folder = save(tmp_path, unet(), theirs)
    for key in ("beta_start", "beta_end", "prediction_type"):
        edit(folder / "scheduler/scheduler_config.json", **{key: "drop"})
    flow = from_diffusers(folder)
    k = torch.arange(500, dtype=torch.float64)
    alpha_bar = flow.denoiser.path.at((k + 1) / 500).alpha ** 2
    assert torch.allclose(alpha_bar.float(), theirs.alphas_cumprod, atol=1e-6)
    assert flow.denoiser.prediction == "eps" and flow.denoiser.net.scale == 500  # pyright: ignore


def test_trained_betas_and_zero_terminal_noise_ratio(tmp_path):
    k = torch.arange(100, dtype=torch.float64)
    betas = (0.001 + 0.02 * torch.rand(100, generator=torch.Generator().manual_seed(0))).tolist()
    theirs = diffusers.DDPMScheduler(100, trained_betas=betas)
    path = from_diffusers(save(tmp_path / "trained", unet(), theirs)).denoiser.path
    assert torch.allclose((path.at((k + 1) / 100).alpha ** 2).float(), theirs.alphas_cumprod, atol=1e-6)

    theirs = diffusers.EulerDiscreteScheduler(100, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    flow = from_diffusers(save(tmp_path / "zero", unet(), theirs))
    alpha_bar = flow.denoiser.path.at((k + 1) / 100).alpha ** 2
    assert torch.allclose(alpha_bar.float(), theirs.alphas_cumprod, atol=1e-6)
    assert torch.isclose(alpha_bar[-1], torch.tensor(2.0**-24, dtype=torch.float64), rtol=1e-6)
    assert torch.isfinite(flow.sample(2, steps=3)).all()


def test_a_flow_of_a_folder_is_written_down_and_built_again(tmp_path):
    model, part, _, _ = case("learned variance")
    flow = from_diffusers(save(tmp_path, model, diffusers.DDPMScheduler(), part))
    again = build(json.loads(json.dumps(describe(flow))))
    assert isinstance(again, Flow)
    again.load_state_dict(flow.state_dict())
    assert torch.equal(flow.sample(3, seed=1, steps=3), again.eval().sample(3, seed=1, steps=3))
    assert len(json.dumps(describe(flow))) < 3000  # the chain goes by its name, not by a thousand betas


def test_layouts_of_folders(tmp_path):
    model, scheduler = unet(), diffusers.DDPMScheduler()
    x, t = draws(2, 3, 8, 8), torch.tensor([0.3, 0.8])
    truth = from_diffusers(save(tmp_path / "pipeline", model, scheduler, "unet")).denoiser(x, t)
    alone = save(tmp_path / "alone", model, scheduler)
    assert torch.equal(from_diffusers(alone).denoiser(x, t), truth)
    shutil.move(alone / "scheduler/scheduler_config.json", alone / "scheduler_config.json")  # as the first pipelines
    assert torch.equal(from_diffusers(str(alone)).denoiser(x, t), truth)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    scheduler.save_pretrained(tmp_path / "sharded/scheduler")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(from_diffusers(tmp_path / "sharded").denoiser(x, t), truth)
    next((tmp_path / "sharded").glob("*.safetensors")).unlink()
    with pytest.raises(Refusal, match="names it"):
        from_diffusers(tmp_path / "sharded")


def test_attention_keys_of_old_checkpoints_are_understood(tmp_path):
    model = unet()
    folder = save(tmp_path, model, diffusers.DDPMScheduler())
    x, t = draws(2, 3, 8, 8), torch.tensor([0.3, 0.8])
    truth = from_diffusers(folder).denoiser(x, t)
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = load_file(folder / WEIGHTS)
    for new, name in old.items():
        weights = {k.replace(new, name): w for k, w in weights.items()}
    assert any(".query." in k for k in weights)
    save_file(weights, folder / WEIGHTS)
    assert torch.equal(from_diffusers(folder).denoiser(x, t), truth)


def test_a_dit_saved_under_its_old_class_is_a_dit(tmp_path):
    model, part, _, y = case("dit")
    folder = save(tmp_path, model, diffusers.DDIMScheduler(), part)
    edit(folder / part / "config.json", _class_name="Transformer2DModel", cross_attention_dim=None,
         double_self_attention=False)
    x, t = draws(4, 4, 8, 8), torch.full((4,), 0.5)
    with torch.no_grad():
        assert torch.allclose(from_diffusers(folder).denoiser(x, t, y), model(x, 1000 * t - 1, y).sample, atol=1e-5)


def test_the_null_class_of_a_dit_and_of_a_unet_without_one(tmp_path):
    model, part, _, _ = case("dit")
    flow = from_diffusers(save(tmp_path / "dit", model, diffusers.DDIMScheduler(), part))
    x, t, y = draws(4, 4, 8, 8), torch.full((4,), 0.5), torch.tensor([0, 1, 2, 3])
    null = torch.full((4,), 5)
    with torch.no_grad():
        none = flow.denoiser(x, t)
        assert torch.equal(none, flow.denoiser(x, t, null)) and not torch.allclose(none, flow.denoiser(x, t, y))
        strong = guided(flow.denoiser, 3.0)(x, t, y)
        assert torch.allclose(strong, none + 3 * (flow.denoiser(x, t, y) - none), atol=1e-4)
    # Labels are dropped by recipes, not at random inside the model.
    flow.train()
    torch.manual_seed(0)
    assert all(torch.equal(flow.denoiser(x, t, y), flow.denoiser(x, t, y)) for _ in range(20))

    model, part, _, _ = case("classes")
    flow = from_diffusers(save(tmp_path / "unet", model, diffusers.DDIMScheduler(), part))
    assert torch.isfinite(flow.sample(5, steps=2)).all()
    with pytest.raises(Refusal, match="no null class"):
        flow.sample(5, steps=2, guidance=2.0)
    with pytest.raises(Refusal, match="no null class"):
        flow.denoiser(draws(2, 3, 8, 8), torch.full((2,), 0.5))


def test_the_contract_of_nets(tmp_path):
    net = from_diffusers(save(tmp_path, unet(), diffusers.DDPMScheduler())).denoiser.net
    x, t = draws(2, 3, 8, 8), torch.full((2,), 0.5)
    assert isinstance(net, DiffusersNet) and net.classes is None and not net.two_times
    with pytest.raises(ValueError, match="no labels"):
        net(x, t, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="takes one time"):
        net(x, t, r=t)
    with pytest.raises(ValueError, match="expected one time per sample"):
        net(x, t[:, None].expand(2, 3))
    asked = net(x, torch.zeros(2))  # before the first discrete time, the first is asked
    assert torch.equal(asked, net(x, torch.full((2,), 1e-3)))


# Refusals

def refused(folder, match):
    with pytest.raises(Refusal, match=match) as told:
        from_diffusers(folder)
    assert "\n" not in str(told.value)


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "model", unet(), diffusers.DDPMScheduler())


def test_refuses_models_it_does_not_know(folder):
    edit(folder / "config.json", _class_name="UNet2DConditionModel")
    refused(folder, "did you mean 'UNet2DModel'")
    edit(folder / "config.json", _class_name="Transformer2DModel")
    refused(folder, "Transformer2DModel cannot be a teacher")
    with pytest.raises(Refusal, match="UNet2DModel"):
        DiffusersNet("UNet2D", {})


@pytest.mark.parametrize(("changes", "match"), [
    ({"out_channels": 5}, "answers 5 channels for 3"),
    ({"sample_size": None}, "no sample_size"),
    ({"time_embedding_type": "fourier"}, "fourier"),
    ({"class_embed_type": "timestep"}, "class_embed_type"),
    ({"layers_per_blok": 3}, "did you mean 'layers_per_block'"),
    ({"down_block_types": ["DownBlock2D"]}, "diffusers cannot build it"),
    ({"layers_per_block": 2}, "missing"),
    ({"num_class_embeds": 7}, "1 missing.*class_embedding.weight"),
    ({"norm_num_groups": 4, "block_out_channels": [8, 24]}, "of another shape"),
])
def test_refuses_configurations_that_do_not_fit(folder, changes, match):
    edit(folder / "config.json", **changes)
    refused(folder, match)


def test_refuses_weights_that_do_not_fit(folder):
    weights = load_file(folder / WEIGHTS)
    first = sorted(weights)[0]
    save_file({k: w for k, w in weights.items() if k != first}, folder / WEIGHTS)
    refused(folder, f"1 missing .{first}")
    save_file(weights | {"stray": torch.zeros(2)}, folder / WEIGHTS)
    refused(folder, "1 unexpected .stray")
    save_file(weights | {first: torch.zeros(1, 1)}, folder / WEIGHTS)
    refused(folder, "1 of another shape")
    shutil.move(folder / WEIGHTS, folder / "diffusion_pytorch_model.fp16.safetensors")
    refused(folder, r"missing; there is diffusion_pytorch_model.fp16.safetensors: rename it")
    (folder / "diffusion_pytorch_model.fp16.safetensors").unlink()
    refused(folder, "is missing; give the folder with its weights")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    refused(folder, "pickle.*convert it to safetensors")


@pytest.mark.parametrize(("changes", "match"), [
    ({"_class_name": "DDPMSheduler"}, "did you mean 'DDPMScheduler'"),
    ({"_class_name": "EDMEulerScheduler"}, "no path is known"),
    ({"_class_name": "drop"}, "without _class_name"),
    ({"prediction_type": "flow_prediction"}, "no prediction_type 'flow_prediction'"),
    ({"prediction_type": "epsilom"}, "did you mean 'epsilon'"),
    ({"beta_schedule": "cosine"}, "diffusers cannot build"),
    ({"predict_epsilon": False}, "prediction_type 'sample'"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "continuous"),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "FlowMatchEulerDiscreteScheduler"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "size of the image"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "backwards"),
    ({"trained_betas": [0.1, 0.2]}, "2 trained_betas for 1000"),
])
def test_refuses_schedulers_that_do_not_fit(folder, changes, match):
    edit(folder / "scheduler/scheduler_config.json", **changes)
    refused(folder, match)


def test_refuses_folders_without_what_is_needed(folder, tmp_path):
    (folder / "scheduler/scheduler_config.json").unlink()
    refused(folder, "scheduler_config.json is missing")
    (folder / "config.json").write_text("{")
    refused(folder, "is not JSON")
    (folder / "config.json").unlink()
    refused(folder, "holds no model")
    refused(tmp_path / "nowhere", "no folder")


def test_the_hub_is_asked_only_for_what_is_no_folder(folder, monkeypatch):
    import huggingface_hub

    asked = []

    def offline(name, **_):
        asked.append(name)
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(folder.parent)
    from_diffusers("model")
    save(folder.parent / "owner/model", unet(), diffusers.DDPMScheduler())
    from_diffusers("owner/model")  # looks like a name of the hub, and is a folder
    assert not asked
    refused("owner/other", "it could not be fetched .ConnectionError: no route to the hub")
    assert asked == ["owner/other"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(folder))
    assert isinstance(from_diffusers("owner/other"), Flow)
