"""What networks in bfloat16 answer under autocast: their last layers in float32, and gaps between two of them."""

import copy

import pytest
import torch
from torch import nn

from stillroom.flows import Denoiser, DiffusersNet, Flow
from stillroom.flows.families import FAMILIES
from stillroom.flows.folders import MODELS
from stillroom.flows.prompted import PromptedNet
from stillroom.flows.prompts import Prompts
from stillroom.match import direction
from stillroom.nets import DiT, Lora
from stillroom.nets.last import LAST
from stillroom.nets.offload import offload
from stillroom.nets.recompute import recompute
from stillroom.paths import Linear, Uniform, sign_of
from stillroom.recipes._shaping import ByScores
from stillroom.recipes._students import score_gap
from stillroom.settings import Optimizer

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")
BLOCKS = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
MADE = {
    "UNet2DModel": {**BLOCKS, "sample_size": 8, "in_channels": 4, "out_channels": 4,
                    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                    "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    "DiTTransformer2DModel": {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2,
                              "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 3},
    "UNet2DConditionModel": {**BLOCKS, "sample_size": 8, "cross_attention_dim": 16,
                             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    "SD3Transformer2DModel": {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
                              "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16,
                              "caption_projection_dim": 32, "pooled_projection_dim": 8, "pos_embed_max_size": 8},
    "FluxTransformer2DModel": {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                               "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 8,
                               "axes_dims_rope": (4, 6, 6)},
}
PIPELINES = {family.model: name for name, family in FAMILIES.items()}


def net_of(model_class: str) -> nn.Module:
    """With weights that make the answer depend on everything."""
    torch.manual_seed(0)
    if model_class in PIPELINES:
        pooled = (4, 8) if "pooled_projection_dim" in MADE[model_class] else ()
        told = Prompts(PIPELINES[model_class], 64, (4, 8, 8), (4, 6, 16), pooled, "", "", ("a", "b", "c"))
        net = PromptedNet(model_class, MADE[model_class], told)
    else:
        net = DiffusersNet(model_class, MADE[model_class])
    with torch.no_grad():
        for p in (*net.parameters(), *net.buffers(recurse=False)):
            p.add_(torch.randn(p.shape) * (0.5 / max(p[0].numel() if p.ndim > 1 else 16, 1) ** 0.5))
    return net


def asked(net, n=6):
    g = torch.Generator().manual_seed(1)
    t, y = (torch.arange(n) + 0.5) / n, None if net.classes is None else torch.arange(n) % 3
    return torch.randn(n, 4, 8, 8, generator=g), t, y


def half():
    return torch.autocast("cpu", torch.bfloat16)


# ---- last layers ----


def test_the_last_layers_of_every_model_that_can_be_a_teacher_are_known():
    assert set(LAST) == {*MODELS, *(family.model for family in FAMILIES.values())} == set(MADE)


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("model_class", MADE)
def test_last_layers_are_asked_in_float32(model_class, adapters):
    """Each as it answers without autocast what it was given under it; adapters on it too."""
    net = net_of(model_class)
    outer = Lora(net, 2) if adapters else net
    for name, p in outer.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    names, seen = set(net.state_dict()), {}
    layers = {name: getattr(net.model, name) for name in LAST[model_class]}
    hooks = [layer.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given, out)}))
             for name, layer in layers.items()]
    given = asked(net)
    with half(), torch.no_grad():
        answer = outer(*given)
    for hook in hooks:
        hook.remove()
    assert answer.dtype == torch.float32
    with torch.no_grad():
        for name, layer in layers.items():
            inputs, out = seen[name]
            assert out.dtype == torch.float32 and torch.equal(out, layer(*inputs)), name
        # what comes after is a change of places, and the answer a network's in bfloat16
        assert torch.equal(answer.flatten().sort()[0], seen[LAST[model_class][-1]][1].flatten().sort()[0])
        exact = outer(*given)
    assert 1e-4 < float((answer - exact).norm() / exact.norm()) < 0.05
    assert set(net.state_dict()) == names and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(RuntimeError), half():
        outer(given[0][:, :3], *given[1:])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("model_class", MADE)
def test_gradients_under_autocast_and_again_and_from_elsewhere(model_class):
    """All parameters have one; computed again they are the same, and so is the answer of weights that are brought."""
    plain = net_of(model_class)
    again, away = copy.deepcopy(plain), copy.deepcopy(plain).requires_grad_(False)
    recompute(again)
    offload(away)
    given, answers = asked(plain), []
    for net in (plain, again, away):
        with half(), torch.set_grad_enabled(net is not away):
            answers.append(net(*given))
            if net is not away:
                answers[-1].square().mean().backward()
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert a.grad is not None and torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), name


# ---- the gap ----


class Given:
    """A turn of these times and this noise."""

    def __init__(self, t, eps):
        self.t, self.eps = t, eps

    def draw(self, law):
        return self.t

    def randn(self, like):
        return self.eps

    def tell(self, name, value):
        pass


def by_score_gap(fake, teacher, x, t, eps):
    return score_gap(fake, teacher, x, t, eps, None)


def by_scores(fake, teacher, x, t, eps):
    ways = ByScores(Flow(teacher, (4, 8, 8)), fake, Uniform(), 1.0, 1.0, (1.0, 1.0), Optimizer(lr=1e-4))
    return ways.pulls(x, None, Given(t, eps))


def pair(kind: str, moved: float) -> tuple[Denoiser, Denoiser]:
    """Two networks, one of which is the other with every weight moved."""
    torch.manual_seed(0)
    net = net_of(kind) if kind in MADE else DiT(4, 8, width=64, depth=3, heads=4, classes=3)
    if kind not in MADE:
        for p in net.parameters():
            nn.init.normal_(p, std=0.5 / max(p[0].numel() if p.ndim > 1 else 16, 1) ** 0.5)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(moved * p.std().nan_to_num() * torch.randn(p.shape))
    return Denoiser(other, Linear(), "v"), Denoiser(net, Linear(), "v")


def off(found, best) -> float:
    return float((found.double() - best).norm() / best.norm())


@pytest.mark.parametrize("loss", [by_score_gap, by_scores])
@pytest.mark.parametrize(("kind", "moved"), [("DiT", 0.26), ("DiTTransformer2DModel", 0.1), ("UNet2DModel", 0.1256),
                                             ("SD3Transformer2DModel", 0.14)])
def test_the_gap_of_two_networks_under_autocast(kind, moved, loss):
    """Where |F - T| is a tenth of |u - T|: taken as recipes take it, and of x0 in bfloat16. Times are spread evenly."""
    g, n = torch.Generator().manual_seed(2), 64
    fake, teacher = pair(kind, moved)
    x, eps = (torch.randn(n, 4, 8, 8, generator=g) for _ in range(2))
    t = (torch.arange(n) + 0.5) / n
    c = teacher.path.over(t, x)
    x_t, u = c.alpha * x + c.sigma * eps, eps - x
    with torch.no_grad():
        f, r = fake(x_t, t), teacher(x_t, t)
        assert 0.095 < float((f - r).abs().mean() / (u - r).abs().mean()) < 0.105
        best = direction(u.double(), f.double(), r.double(), sign_of("v"))
        with half():
            f, r = (d(x_t, t).bfloat16() for d in (fake, teacher))
        z, z_t, s = (part.bfloat16() for part in (x, x_t, c.sigma))
        f0, r0 = z_t - s * f, z_t - s * r
        naive = (f0 - r0) / (z - r0).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    x.requires_grad_()
    with half():
        loss(fake, teacher, x, t, eps).sum().backward()
    assert off(x.grad * x[0].numel(), best) < 0.05 and off(naive, best) > 0.15
