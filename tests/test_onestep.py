"""One-step generators: what they answer, how they start, and how they are guided."""

import pytest
import torch

from closed_forms import shaken
from stillroom.flows import Denoiser, OneStep, extrapolated, noise_of, student_of
from stillroom.nets import MLP, DiT, UNet, build, describe
from stillroom.paths import VE, Cosine, Linear
from stillroom.settings import Refusal


def test_on_the_linear_path_it_is_noise_less_velocity():
    net = shaken(MLP(3, 32, classes=4))
    z, y = torch.randn(5, 3), torch.arange(5) % 4
    assert torch.allclose(OneStep(net, Linear(), "v", (3,))(z, y), z - net(z, torch.ones(5), y), atol=1e-6)


@pytest.mark.parametrize("path", [Linear(), Cosine(), VE(10.0)])
def test_a_student_begins_as_its_teacher_at_pure_noise(path):
    teacher = Denoiser(shaken(UNet(2, 16, (1, 2), classes=3)), path, "v")
    z, y = torch.randn(4, 2, 8, 8), torch.tensor([0, 1, 2, 3])
    there = teacher.x0(path.at(torch.ones(())).sigma * z, torch.ones(4), y)
    for takes_strength in (False, True):
        student = student_of(teacher, (2, 8, 8), takes_strength)
        assert torch.equal(student(z, y), there)
        mine = dict(student.net.named_parameters())
        assert all(mine[name] is not p and torch.equal(mine[name], p) for name, p in teacher.net.named_parameters())
    strong = student(z, y, torch.full((4,), 3.0))
    assert torch.equal(strong, there)                               # at first the strength has no effect
    shaken(student.net.condition.strength)
    assert not torch.allclose(student(z, y, torch.full((4,), 3.0)), student(z, y, torch.full((4,), 2.0)))


@pytest.mark.parametrize("net", [MLP(4, 32, guided=True), DiT(1, 4, 2, 32, 1, 1, guided=True),
                                 UNet(1, 16, (1, 1), guided=True)], ids=lambda n: type(n).__name__)
def test_a_strength_of_one_is_no_strength(net):
    x = torch.randn(3, 4) if isinstance(net, MLP) else torch.randn(3, 1, 4, 4)
    shaken(net)
    assert torch.equal(net(x, torch.ones(3)), net(x, torch.ones(3), w=torch.ones(3)))
    assert describe(build(describe(net))) == describe(net)


def test_a_strength_is_refused_where_there_is_no_input_for_it():
    with pytest.raises(ValueError, match="guided=True"):
        MLP(2, 32)(torch.randn(2, 2), torch.ones(2), w=torch.ones(2))
    with pytest.raises(ValueError, match="one strength per time"):
        MLP(2, 32, guided=True)(torch.randn(2, 2), torch.ones(2), w=torch.ones(1))


def test_samples_are_the_same_at_any_batch_size_and_start():
    one = OneStep(shaken(MLP(2, 32, classes=3)), Linear(), "v", (2,))
    whole = one.sample(20, seed=3)
    assert torch.allclose(whole, one.sample(20, seed=3, batch=7), atol=1e-6)
    assert torch.allclose(whole[11:], one.sample(9, seed=3, first=11), atol=1e-6)
    assert torch.allclose(whole, one(noise_of((2,), 0, 20, 3), torch.arange(20) % 3), atol=1e-6)


def test_guidance_extrapolates_from_the_weaker_answer():
    one, weak = (OneStep(shaken(MLP(2, 32, classes=3), seed), Linear(), "v", (2,), unlabelled=True) for seed in (1, 2))
    z, y = noise_of((2,), 0, 6, 0), torch.arange(6) % 3
    null = torch.full((6,), 3)
    assert torch.allclose(one.sample(6, guidance=1.5), one(z, y) + 0.5 * (one(z, y) - one(z, null)), atol=1e-5)
    assert torch.allclose(one.sample(6, guidance=1.5, weak=weak), one(z, y) + 0.5 * (one(z, y) - weak(z, y)), atol=1e-5)
    blind = OneStep(shaken(MLP(2, 32), 3), Linear(), "v", (2,))
    assert torch.allclose(one.sample(6, guidance=1.5, weak=blind), one(z, y) + 0.5 * (one(z, y) - blind(z)), atol=1e-5)
    assert torch.equal(extrapolated(1.0, z, y[:, None].float()), z)


def test_guidance_is_the_networks_own_input_where_it_has_one():
    one = OneStep(shaken(MLP(2, 32, classes=3, guided=True)), Linear(), "v", (2,), takes_strength=True)
    z, y = noise_of((2,), 0, 6, 0), torch.arange(6) % 3
    assert torch.allclose(one.sample(6, guidance=2.0), one(z, y, torch.full((6,), 2.0)), atol=1e-6)


def test_a_student_that_was_never_asked_without_a_label_has_nothing_to_be_guided_from():
    one = OneStep(shaken(MLP(2, 32, classes=3)), Linear(), "v", (2,))
    with pytest.raises(Refusal, match="no answer without a label"):
        one.sample(4, guidance=1.5)
    assert torch.equal(one.sample(4, guidance=1.5, weak=one), one.sample(4))


def test_what_cannot_be_guided_is_refused():
    one = OneStep(MLP(2, 32), Linear(), "v", (2,))
    with pytest.raises(Refusal, match="without labels"):
        one.sample(4, guidance=1.5)
    with pytest.raises(Refusal, match="makes"):
        one.sample(4, guidance=1.5, weak=OneStep(MLP(3, 32), Linear(), "v", (3,)))
    with pytest.raises(Refusal, match="scales its input"):
        student_of(Denoiser(MLP(2, 32), VE(), "v", scale_input=True), (2,), False)
