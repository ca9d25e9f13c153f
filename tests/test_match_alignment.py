"""VA-VAE's two terms: values by hand, margins, what they do not see, and gradients of the way that they should go."""

import math

import pytest
import torch

from stillroom.match.adversarial import adaptive_weight
from stillroom.match.alignment import cosines, marginal_cosine, marginal_distance, on_grid


def maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n, seed=0):
    return torch.linalg.qr(maps(n, n, seed=seed))[0]


def turned(x, q):
    return torch.einsum("cd,bdhw->bchw", q, x)


def test_the_cosine_term_by_hand():
    """Two places: one at 60 degrees to its feature, one opposite to it."""
    z = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).T.reshape(1, 2, 1, 2)                # z_1 = (1, 0), z_2 = (0, 2)
    f = torch.tensor([[1.0, math.sqrt(3)], [0.0, -5.0]]).T.reshape(1, 2, 1, 2)      # cos 1/2 and -1
    for margin, wanted in ((0.0, (0.5 + 2) / 2), (0.5, (0 + 1.5) / 2), (1.0, (0 + 1) / 2)):
        assert marginal_cosine(z, f, margin).tolist() == pytest.approx([wanted], abs=1e-6)
    assert marginal_cosine(z, f).tolist() == pytest.approx([0.75], abs=1e-6)        # 0.5 unless given


def test_the_distance_term_by_hand():
    """Places at right angles in one map and at 60 degrees in the other: of four pairs, two differ, by 1/2."""
    z = torch.tensor([[3.0, 0.0], [0.0, 0.1]]).T.reshape(1, 2, 2, 1)
    f = torch.tensor([[1.0, 0.0, 0.0], [1.0, math.sqrt(3), 0.0]]).T.reshape(1, 3, 2, 1)
    for margin, wanted in ((0.0, 0.25), (0.25, 0.125), (0.5, 0.0)):
        assert marginal_distance(z, f, margin).tolist() == pytest.approx([wanted], abs=1e-6)
    assert marginal_distance(z, f).tolist() == pytest.approx([0.125], abs=1e-6)     # 0.25 unless given


def test_equal_directions_cost_nothing_and_pictures_are_told_apart():
    z = maps(3, 5, 4, 2)
    scaled = z * maps(3, 1, 4, 2, seed=1).abs()                 # each place by its own length
    assert marginal_cosine(scaled, z, 0).abs().max() < 1e-12 and marginal_distance(scaled, z, 0).abs().max() < 1e-12
    other = z.clone()
    other[1] = maps(5, 4, 2, seed=2)
    for term in (marginal_cosine, marginal_distance):
        cost = term(other, z, 0.0)
        assert cost[1] > 0.1 and cost[[0, 2]].abs().max() < 1e-12


def test_the_distance_term_sees_no_rotation_no_reflection_and_no_number_of_channels():
    z, f = maps(2, 6, 3, 3), maps(2, 9, 3, 3, seed=1)
    before = marginal_distance(z, f)
    assert torch.allclose(marginal_distance(turned(z, orthogonal(6)), turned(f, -orthogonal(9))), before, atol=1e-12)
    assert torch.allclose(marginal_distance(7 * z, f / 3), before, atol=1e-12)
    wider = torch.cat([z, torch.zeros_like(z)], 1)
    assert torch.allclose(marginal_distance(wider, f), before, atol=1e-12)
    skewed = torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert not torch.allclose(marginal_distance(turned(z, skewed), f), before, atol=1e-2)


def test_the_cosine_term_sees_a_rotation_of_one_side_and_none_of_both():
    z, f, q = maps(2, 6, 3, 3), maps(2, 6, 3, 3, seed=1), orthogonal(6)
    before = marginal_cosine(z, f)
    assert torch.allclose(marginal_cosine(turned(z, q), turned(f, q)), before, atol=1e-12)
    assert not torch.allclose(marginal_cosine(turned(z, q), f), before, atol=1e-2)


def test_the_order_of_places_changes_nothing_where_both_have_it():
    z, f, order = maps(2, 4, 1, 9), maps(2, 4, 1, 9, seed=1), torch.tensor([8, 3, 1, 0, 7, 2, 6, 5, 4])
    for term in (marginal_cosine, marginal_distance):
        assert torch.allclose(term(z[..., order], f[..., order]), term(z, f), atol=1e-12)


def test_steps_along_the_gradient_make_latents_alike_up_to_the_margins():
    z, f = maps(2, 6, 3, 3).requires_grad_(), maps(2, 6, 3, 3, seed=1)
    with torch.no_grad():
        first = float(marginal_cosine(z, f).mean()), float(marginal_distance(z, f).mean())
    for _ in range(300):
        loss = marginal_cosine(z, f).mean() + marginal_distance(z, f).mean()
        (gradient,) = torch.autograd.grad(loss, z)
        z = (z - 2 * gradient).detach().requires_grad_()
    assert first[0] > 0.3 and first[1] > 0.05
    z = z.detach()
    assert float(marginal_cosine(z, f)[0]) < 1e-3 and float(marginal_distance(z, f)[0]) < 1e-3
    cosine = torch.nn.functional.cosine_similarity(z, f, dim=1)
    assert 0.45 < float(cosine.min()) < 0.75        # what lies within the margin is left where it is


def test_gradients_agree_with_differences():
    z, f = maps(1, 3, 2, 2).requires_grad_(), maps(1, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda z: marginal_cosine(z, f, 0.1), (z,))
    assert torch.autograd.gradcheck(lambda z: marginal_distance(z, f, 0.05), (z,))


def test_a_latent_of_length_zero_has_finite_gradients():
    z, f = torch.zeros(1, 4, 2, 2, requires_grad=True), maps(1, 4, 2, 2).float()
    (gradient,) = torch.autograd.grad((marginal_cosine(z, f) + marginal_distance(z, f)).sum(), z)
    assert gradient.isfinite().all()


def test_balanced_they_pull_as_hard_as_the_reconstruction():
    """At a linear encoder's weight: |g_rec| = |v g_align|; and nothing is asked of what needs nothing."""
    weight, x, f = maps(4, 6).requires_grad_(), maps(2, 6, 3, 3, seed=1), maps(2, 4, 3, 3, seed=2)
    z = turned(x, weight)
    rec, align = (z - 1).square().mean(), (marginal_cosine(z, f) + marginal_distance(z, f)).mean()
    one, two = (torch.autograd.grad(term, weight, retain_graph=True)[0] for term in (rec, align))
    v = adaptive_weight(one, two)
    assert torch.allclose((v * two).norm(), one.norm(), rtol=1e-4)
    (none,) = torch.autograd.grad(marginal_cosine(z, z.detach()).mean(), weight)
    assert not none.any() and float(adaptive_weight(one, none) * none.norm()) == 0


def test_autocast_does_not_round_the_matrix():
    z = maps(2, 8, 4, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = cosines(z)
    assert inside.dtype == torch.float32 and torch.equal(inside, cosines(z))


def test_features_of_another_grid_are_brought_to_this_one():
    f = maps(1, 2, 4, 4)
    assert on_grid(f, 4, 4) is f
    flat = torch.full((1, 2, 4, 6), 3.0)
    assert torch.allclose(on_grid(flat, 2, 3), torch.full((1, 2, 2, 3), 3.0))
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    assert torch.allclose(on_grid(ramp, 2, 2).mean(), ramp.mean())
    assert on_grid(ramp, 2, 2)[0, 0, 0].diff() > 3


def test_maps_that_do_not_belong_together_are_an_error():
    z = maps(2, 4, 3, 3)
    for other in (maps(2, 5, 3, 3), maps(2, 4, 3, 2), maps(1, 4, 3, 3)):
        with pytest.raises(ValueError, match="maps of one grid"):
            marginal_cosine(z, other)
    with pytest.raises(ValueError, match="maps of one grid"):
        marginal_distance(z, maps(2, 5, 3, 2))
    assert marginal_distance(z, maps(2, 5, 3, 3)).shape == (2,)
