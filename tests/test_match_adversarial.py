"""Adversarial terms: closed forms, what the balance promises, and augmentations one by one."""

import pytest
import torch

from stillroom.match.adversarial import (
    DRAWS,
    adaptive_weight,
    augmented,
    critic_hinge,
    maker_hinge,
    r1,
    r1_approximate,
)

MIDDLE = torch.full((1, DRAWS), 0.5)        # no change of colour, no shift


def test_hinges_are_what_they_say():
    real, made = torch.tensor([[[[2.0, 0.5]]]]), torch.tensor([[[[-2.0, 0.5]]]])
    assert critic_hinge(real, made).tolist() == [0.5 * (0.25 + 0.75)]
    assert maker_hinge(made).tolist() == [0.75]


def test_a_critic_beyond_the_margin_gets_no_gradient():
    real, made = (torch.full((2, 1, 3, 3), v, requires_grad=True) for v in (1.5, -1.5))
    gradients = torch.autograd.grad(critic_hinge(real, made).sum(), (real, made))
    assert not any(g.any() for g in gradients)


def test_the_best_critic_by_the_hinge_is_the_sign_of_the_difference_of_densities():
    """With p = 0.8 and q = 0.2 at a point, its expected hinge is least at +1; at -1 when they change places."""
    values = torch.linspace(-2, 2, 401).view(-1, 1)
    for p, best in ((0.8, 1.0), (0.2, -1.0)):
        expected = p * critic_hinge(values, torch.full_like(values, -5)) + (1 - p) * critic_hinge(
            torch.full_like(values, 5), values)
        assert abs(float(values[expected.argmin()]) - best) < 0.02


def test_the_penalty_without_a_second_derivative_is_the_penalty():
    """Of a linear critic |w|^2 / 2 exactly, and E (w eps std)^2 / (2 std^2) is that at any std."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40_000, 3, generator=g).requires_grad_(), torch.tensor([2.0, -1.0, 0.5])
    exact = float(r1(x @ w, x)[0])
    x = x.detach()
    assert exact == pytest.approx(float(w.square().sum() / 2))
    for std in (0.1, 2.0):
        nearby = x + std * torch.randn(x.shape, generator=g)
        assert float(r1_approximate(x @ w, nearby @ w, std).mean()) == pytest.approx(exact, rel=0.05)


def test_of_several_logits_it_is_that_of_their_mean_too():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40_000, 3, generator=g).requires_grad_(), torch.eye(3)       # each looks at one number
    exact, x = float(r1(x @ w, x).detach()[0]), x.detach()
    nearby = x + 0.1 * torch.randn(x.shape, generator=g)
    assert exact == pytest.approx(1 / 6)
    assert float(r1_approximate(x @ w, nearby @ w, 0.1).mean()) == pytest.approx(exact, rel=0.05)


def test_weighted_so_both_terms_move_the_layer_equally():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 7, generator=g), 30 * torch.randn(5, 7, generator=g)
    assert torch.allclose(adaptive_weight(a, b) * b.norm(), a.norm(), rtol=1e-5)
    assert float(adaptive_weight(a, 0 * b)) == 1e4 and float(adaptive_weight(0 * a, 0 * b)) == 0


def test_draws_in_the_middle_leave_all_but_the_square():
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y = augmented(x, MIDDLE, cut=0.0)
    assert torch.allclose(y, x, atol=1e-6)
    cut = augmented(x, MIDDLE)
    gone = (cut == 0).all(1)[0]
    assert gone.nonzero().tolist() == [[i, j] for i in range(2, 6) for j in range(2, 6)]        # the middle
    assert torch.allclose(cut[:, :, ~gone], x[:, :, ~gone], atol=1e-6)


def test_each_draw_does_its_own():
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def drawn(**changes):
        u = MIDDLE.expand(2, -1).clone()
        for k, v in changes.items():
            u[:, int(k[1:])] = torch.tensor(v)
        return augmented(x, u, cut=0.0)

    assert torch.allclose(drawn(_0=[0.0, 0.75]), x + torch.tensor([-0.5, 0.25]).view(2, 1, 1, 1), atol=1e-6)
    grey = drawn(_1=[0.0, 0.0])
    assert torch.allclose(grey, x.mean(1, keepdim=True).expand_as(x), atol=1e-6)
    softer, mean = drawn(_2=[0.0, 0.0]), x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(softer - mean, (x - mean) / 2, atol=1e-6)
    down, right = drawn(_3=[0.0, 0.999]), drawn(_4=[0.0, 0.999])
    assert torch.allclose(down[0, :, :14], x[0, :, 2:], atol=1e-6) and not down[0, :, 14:].any()
    assert torch.allclose(down[1, :, 2:], x[1, :, :14], atol=1e-6) and not down[1, :, :2].any()
    assert torch.allclose(right[1, :, :, 2:], x[1, :, :, :14], atol=1e-6) and not right[1, :, :, :2].any()


def test_a_picture_is_augmented_by_its_own_draws_and_passes_gradients():
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    u = torch.rand(4, DRAWS, generator=torch.Generator().manual_seed(3))
    y = augmented(x, u)
    assert torch.allclose(augmented(x[2:3], u[2:3]), y[2:3], atol=1e-6)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.flatten(1).any(1).all() and gradient.isfinite().all()
