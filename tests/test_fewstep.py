"""Generators of few steps: their steps against closed forms, their plans, and samples that do not know their batch."""

import pytest
import torch
from torch import nn

from closed_forms import plan, shaken
from stillroom.flows import Bare, Denoiser, FewStep, Gaussian, OneStep, Routed, ddim, noise_of, rollout, step
from stillroom.nets import MLP, DiT, Lora, UNet, build, describe, with_input
from stillroom.nets.heads import Heads, inner_layers
from stillroom.paths import VE, Cosine, Linear, Tabulated, lower_edge
from stillroom.settings import Refusal, seed_of

PATHS = [Linear(), Cosine()]


def student(seed: int = 0, path=None, **more) -> Denoiser:
    return Denoiser(shaken(MLP(2, 32, classes=3, **more), seed), path or Linear(), "v")


# ---- one step ----


@pytest.mark.parametrize("path", PATHS)
def test_an_ode_step_is_the_samplers(path):
    d, x, y = student(path=path), torch.randn(5, 2), torch.arange(5) % 3
    t, s = torch.full((5,), 0.8), torch.full((5,), 0.3)
    assert torch.equal(step(d, x, t, s, y, "ode"), ddim(d, x, torch.tensor([0.8, 0.3]), y))


@pytest.mark.parametrize("path", PATHS)
def test_a_renoised_step_of_the_ideal_denoiser_keeps_the_law(path):
    """Of a point mass: x0 is known, so that x_s has mean alpha_s mu and deviation sigma_s exactly."""
    d, mean = Gaussian(torch.tensor([2.0, -1.0]), torch.zeros(2, 2), path=path), torch.tensor([2.0, -1.0])
    t, s, eps = torch.full((4,), 0.9), torch.full((4,), 0.4), torch.randn(4, 2)
    c = path.over(s, eps)
    x_s = step(d, torch.randn(4, 2), t, s, None, "renoise", eps)
    assert torch.allclose(x_s, c.alpha * mean + c.sigma * eps, atol=1e-5)


@pytest.mark.parametrize("move", ["renoise", "ode"])
def test_the_last_step_answers_x0(move):
    d, x, y = student(), torch.randn(5, 2), torch.arange(5) % 3
    t, s = torch.full((5,), 0.6), torch.zeros(5)
    assert torch.allclose(step(d, x, t, s, y, move, torch.randn(5, 2)), d.x0(x, t, y), atol=1e-6)


def test_each_expert_takes_its_own_step():
    one, two, x = student(1), student(2), torch.randn(4, 2)
    t, s, end = (torch.full((4,), u) for u in (1.0, 0.5, 0.0))
    there = rollout([one, two], x, (1.0, 0.5, 0.0), None, "ode", lambda _: x, "all")
    assert torch.equal(there, step(two, step(one, x, t, s, None, "ode"), s, end, None, "ode"))


class Tiny(nn.Module):
    """Of five numbers, in float64."""

    def __init__(self, weights):
        super().__init__()
        self.weights = nn.Parameter(weights.clone())

    def forward(self, x, t):
        a, b, c, d, e = self.weights
        return torch.tanh(a * x + b * t[:, None].double() + e) * c + d * x.flip(1)


def carrying(gradient, leave, steps):
    """The steps that carry a gradient, of those that are taken."""
    taken = list(range(leave + 1 if gradient == "exit" else steps))
    return {"all": taken, "none": []}.get(gradient, taken[-1:])


@pytest.mark.parametrize("move", ["renoise", "ode"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("gradient", "leave"), [("none", None), ("last", None), ("all", None), ("exit", 0),
                                                 ("exit", 1), ("exit", 2)])
def test_the_gradient_of_a_rollout_is_of_the_steps_that_carry_it(gradient, leave, path, move):
    """By finite differences: each step has weights of its own, and those of the steps that carry it are moved."""
    g = torch.Generator().manual_seed(0)
    z, *eps = torch.randn(5, 6, 2, generator=g, dtype=torch.float64)
    weights, times = torch.randn(5, generator=g, dtype=torch.float64), (0.9, 0.7, 0.4, 0.2)

    def ended(*each):
        nets = [Denoiser(Tiny(w), path, "v") for w in each]
        return rollout(nets, z, times, None, move, lambda k: eps[k], gradient, leave).detach()

    carry = carrying(gradient, leave, 3)
    one = Denoiser(Tiny(weights), path, "v")
    x = rollout([one], z, times, None, move, lambda k: eps[k], gradient, leave)
    assert torch.equal(x, ended(*[weights] * 3)) and x.requires_grad == bool(carry)
    with torch.no_grad():                                                   # where nobody asks for one there is none
        assert not rollout([one], z, times, None, move, lambda k: eps[k], gradient, leave).requires_grad
    if not carry:
        return
    (ours,) = torch.autograd.grad(x.square().sum(), one.net.weights)
    h, found = 1e-6, []
    for i in range(5):
        moved = h * torch.eye(5, dtype=torch.float64)[i]
        up, down = (ended(*(weights + sign * moved if k in carry else weights for k in range(3))).square().sum()
                    for sign in (1, -1))
        found.append(float((up - down) / (2 * h)))
    assert ours.tolist() == pytest.approx(found, rel=1e-6, abs=1e-7)


def test_an_exit_goes_straight_to_the_end_and_draws_no_noise_for_it():
    d, z, drawn = student(), torch.randn(4, 2), []
    there = rollout([d], z, (1.0, 0.6, 0.3, 0.0), None, "renoise", lambda k: drawn.append(k) or z, "exit", 1)
    t, s = torch.full((4,), 1.0), torch.full((4,), 0.6)
    assert torch.equal(there, d.x0(step(d, z, t, s, None, "renoise", z), s)) and drawn == [1]


@pytest.mark.parametrize("path", [*PATHS, VE(10.0), Tabulated.ddpm()], ids=lambda p: type(p).__name__)
def test_a_rollout_begins_at_noise_of_its_first_time(path):
    z, d = torch.randn(4, 2), student(path=path)
    x = path.over(torch.full((4,), 0.8), z).sigma * z
    t, s = torch.full((4,), 0.8), torch.full((4,), 0.3)
    assert torch.equal(rollout([d], z, (0.8, 0.3), None, "ode", lambda _: z, "all"), step(d, x, t, s, None, "ode"))


# ---- plans ----


def test_the_lower_edge_is_the_end_of_the_segment():
    times = (1.0, 0.75, 0.5, 0.25, 0.0)
    t = torch.tensor([1.0, 0.76, 0.75, 0.6, 0.25, 0.1])
    assert lower_edge(t, times).tolist() == [0.75, 0.75, 0.5, 0.5, 0.0, 0.0]


# ---- generators ----


@pytest.mark.parametrize("move", ["renoise", "ode", "jump"])
def test_samples_do_not_know_their_batch(move):
    more = {"two_times": True} if move == "jump" else {}
    few = FewStep([student(**more)], (2,), [plan(4), plan(2)], move)
    whole = few.sample(20, seed=3)
    assert torch.allclose(whole, few.sample(20, seed=3, batch=7), atol=1e-5)
    assert torch.allclose(whole[11:], few.sample(9, seed=3, first=11), atol=1e-5)
    assert not torch.allclose(whole, few.sample(20, seed=3, steps=2), atol=1e-2)


def test_noise_of_every_step_is_its_own():
    d = student()
    few = FewStep([d], (2,), [plan(2)], "renoise")
    z, eps, y = noise_of((2,), 0, 6, 5), noise_of((2,), 0, 6, seed_of(5, "step", 1)), torch.arange(6) % 3
    half = torch.full((6,), 0.5)
    x = step(d, z, torch.ones(6), half, y, "renoise", eps)
    assert torch.allclose(few.sample(6, seed=5), d.x0(x, half, y), atol=1e-6)


def test_one_step_of_a_plan_is_a_one_step_generator():
    d = student()
    one = OneStep(d.net, d.path, d.prediction, (2,))
    assert torch.allclose(FewStep([d], (2,), [plan(1)], "renoise").sample(8), one.sample(8), atol=1e-6)


def test_routes_send_each_class_to_its_student():
    parts = [OneStep(student(k).net, Linear(), "v", (2,)) for k in (1, 2)]
    routed = Routed(parts, (0, 1, 0))
    x, y = routed.sample(9, seed=1), torch.arange(9) % 3
    for k, part in enumerate(parts):
        mine = torch.tensor([0, 1, 0])[y] == k
        assert torch.allclose(x[mine], part.sample(9, seed=1)[mine], atol=1e-6)


def test_what_is_not_served_is_refused():
    few = FewStep([student()], (2,), [plan(4), plan(2)], "renoise")
    with pytest.raises(Refusal, match="4 or 2 steps, not 3"):
        few.sample(4, steps=3)
    with pytest.raises(Refusal, match="built in"):
        few.sample(4, guidance=2.0)
    with pytest.raises(Refusal, match="takes one step, not 2"):
        OneStep(student().net, Linear(), "v", (2,)).sample(4, steps=2)


@pytest.mark.parametrize("make", [
    lambda: FewStep([student(1), student(2)], (2,), [plan(2)], "ode"),
    lambda: Routed([OneStep(student(k).net, Linear(), "v", (2,), asked=0.0) for k in (1, 2)], (0, 1, 1)),
])
def test_generators_can_be_written_down(make):
    made = make()
    again = build(describe(made))
    again.load_state_dict(made.state_dict())
    assert describe(again) == describe(made) and torch.equal(again.sample(6), made.sample(6))


# ---- the same network, told more or less ----


@pytest.mark.parametrize("net", [MLP(4, 32, classes=2), DiT(1, 4, 2, 32, 1, 1), UNet(1, 16, (1, 1))],
                         ids=lambda n: type(n).__name__)
def test_a_new_input_begins_without_effect(net):
    x, t = (torch.randn(3, 4) if isinstance(net, MLP) else torch.randn(3, 1, 4, 4)), torch.tensor([0.2, 0.5, 1.0])
    shaken(net)
    wider = with_input(net, "two_times")
    assert torch.equal(wider(x, t, r=t / 2), net(x, t)) and describe(build(describe(wider))) == describe(wider)
    shaken(wider.condition.gap)
    assert not torch.allclose(wider(x, t, r=t / 2), wider(x, t, r=t), atol=1e-4)
    with pytest.raises(Refusal, match="no input for a second time"):
        with_input(Lora(shaken(MLP(2, 16)), 2), "two_times")


def test_a_denoiser_with_adapters_still_answers_as_its_base():
    d = student()
    x, t, y = torch.randn(4, 2), torch.full((4,), 0.5), torch.arange(4) % 3
    before, base = d.v(x, t, y), Bare(d)
    d.net = Lora(d.net, 2)
    with torch.no_grad():
        for name, p in d.net.named_parameters():
            if "lora_" in name:
                p.fill_(0.3)
    changed = d.v(x, t, y)
    assert not torch.allclose(changed, before, atol=1e-3)
    assert torch.equal(base.v(x, t, y), before) and torch.equal(d.v(x, t, y), changed)


# ---- heads on hidden features ----


@pytest.mark.parametrize("net", [MLP(4, 32), DiT(1, 4, 2, 32, 3, 1), UNet(1, 16, (1, 1))],
                         ids=lambda n: type(n).__name__)
def test_heads_judge_what_a_network_computes_inside(net):
    d = Denoiser(shaken(net), Linear(), "v")
    x = torch.randn(3, 4) if isinstance(net, MLP) else torch.randn(3, 1, 4, 4)
    layers = inner_layers(net)
    found = list(d.hidden(x, torch.full((3,), 0.5), at=layers).values())
    heads = Heads([f.shape[1] if f.ndim == 4 else f.shape[-1] for f in found])
    logits = heads(found)
    assert logits.shape == (3, len(layers))
    alone = [f[1:2] for f in found]
    assert torch.allclose(heads(alone), logits[1:2], atol=1e-5)         # no sample knows another
    assert inner_layers(Lora(net, 2)) == tuple(f"net.{name}" for name in layers)
