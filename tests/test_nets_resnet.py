"""The feature net: which maps it answers, what it can see of a masked picture, and what an error over a mask counts."""

import json

import pytest
import torch
from torch import nn

from stillroom.nets import ResNet, build, describe
from stillroom.nets.resnet import MaskedResNet, masked_error, squares


def made(side=16, blocks=(2, 1, 3), **options):
    torch.manual_seed(0)
    return ResNet(3, side, 8, blocks, groups=4, **options)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heard(net, x):
    """What every module answered."""
    found = {}
    handles = [m.register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out))
               for name, m in net.named_modules()]
    maps = net(x)
    for handle in handles:
        handle.remove()
    return maps, found


def test_its_maps_are_the_first_convolution_every_second_block_and_every_stage_normed():
    net, x = made(), drawn(2, 3, 16, 16)
    maps, found = heard(net, x)
    names = ["stages.0.blocks.1", "stages.0.norm", "stages.1.norm", "stages.2.blocks.1", "stages.2.norm"]
    assert torch.equal(maps[0], found["enter"].relu())
    assert len(maps) == 6 and all(torch.equal(m, found[n]) for m, n in zip(maps[1:], names, strict=True))
    assert torch.equal(net.pooled(x), found["stages.2.blocks.2"].mean((2, 3)))


@pytest.mark.parametrize(("side", "sides"), [
    (32, [32, 32, 16, 8, 4]), (16, [16, 16, 8, 4, 4]), (8, [8, 8, 4, 4, 4]), (4, [4] * 5), (2, [2] * 5),
    (9, [9, 9, 5, 5, 5]),
])
def test_a_stage_halves_the_side_while_four_are_left(side, sides):
    torch.manual_seed(0)
    net = ResNet(1, side, 8, groups=4)
    maps = net(drawn(2, 1, side, side))
    assert [m.shape[-1] for m in maps] == sides and [m.shape[1] for m in maps] == [8, 8, 16, 32, 64]
    painted = MaskedResNet(net)(drawn(2, 1, side, side), torch.zeros(2, 1, side, side))
    assert painted.shape == (2, 1, side, side)


def test_samples_do_not_see_each_other():
    net, x = made(), drawn(3, 3, 16, 16)
    for whole, alone in zip(net(x), net(x[1:2]), strict=True):
        torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)


def test_pooled_features_keep_what_a_norm_would_fix():
    """Means over a group of a GroupNorm's channels are the same for every picture; pooled features are not so bound."""
    net, x = made(), drawn(16, 3, 16, 16)
    def spread(pooled):
        pooled = pooled.detach()
        return float(pooled.unflatten(1, (4, -1)).mean(2).var(0).mean() / pooled.var(0).mean())
    assert spread(net(x)[-1].mean((2, 3))) < 1e-9
    assert spread(net.pooled(x)) > 1e-3


def test_contrast_is_seen():
    """A norm right behind the first convolution would answer the same for a picture and for a pale one."""
    net, x = made(), drawn(8, 3, 16, 16)
    with torch.no_grad():
        full, pale = net.pooled(x), net.pooled(x / 4)
    assert float((full - pale).square().mean() / full.var(0).mean()) > 0.5


def test_written_down_and_built_again():
    net, x = made(classes=5), drawn(2, 3, 16, 16)
    again = build(json.loads(json.dumps(describe(net))))
    again.load_state_dict(net.state_dict())
    assert torch.equal(net.logits(net.pooled(x)), again.logits(again.pooled(x)))


def test_gradient_reaches_every_parameter():
    net = MaskedResNet(made(classes=3))
    x = drawn(4, 3, 16, 16)
    hidden = squares(drawn(4, 1, 8, 8), 0.5, 2)
    (masked_error(net(x, hidden), x, hidden).sum() + net.net.logits(net.net.pooled(x)).square().sum()).backward()
    assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_what_is_hidden_is_not_seen():
    net, x = MaskedResNet(made()), drawn(2, 3, 16, 16)
    hidden = squares(drawn(2, 1, 4, 4, seed=1), 0.5, 4)
    other = torch.where(hidden > 0, drawn(2, 3, 16, 16, seed=2), x)
    assert torch.equal(net(x, hidden), net(other, hidden))
    assert not torch.allclose(net(x, hidden), net(x, 1 - hidden), atol=1e-3)


def test_squares_are_whole_of_one_share_and_anywhere():
    u = torch.rand(4000, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    mask = squares(u, 0.25, 2)
    assert mask.shape == (4000, 1, 6, 8) and set(mask.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(mask.sum((1, 2, 3)), torch.full((4000,), 12.0))                    # 3 squares of 12
    assert torch.equal(mask[..., ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3), mask)
    assert (mask.mean(0) - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert float(squares(u, 0.001, 1).sum(dim=(1, 2, 3)).min()) == 1                      # one square at least


def test_the_masked_error_is_the_mean_over_what_was_hidden():
    x, painted = drawn(3, 2, 4, 4), drawn(3, 2, 4, 4, seed=1)
    hidden = squares(drawn(3, 1, 2, 2, seed=2), 0.5, 2)
    expected = torch.stack([(p - q).square()[:, h[0] > 0].mean() for p, q, h in zip(painted, x, hidden, strict=True)])
    torch.testing.assert_close(masked_error(painted, x, hidden), expected)
    shown = painted + 9 * (1 - hidden)
    assert torch.equal(masked_error(shown, x, hidden), masked_error(painted, x, hidden))


def test_it_learns_to_paint_what_a_neighbour_tells():
    """Pictures of one grey each: from what is shown the rest is known. An answer of zero has an error of 1."""
    torch.manual_seed(0)
    net = MaskedResNet(ResNet(1, 8, 8, (1, 1), groups=4))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for step in range(100):
        x = drawn(32, 1, 1, 1, seed=step).expand(-1, 1, 8, 8)
        hidden = squares(torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(step)), 0.5, 2)
        loss = masked_error(net(x, hidden), x, hidden).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.2


def test_it_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="width 12 must be divisible by 8"):
        ResNet(3, 16, 12)
    with pytest.raises(ValueError, match="at least one"):
        ResNet(3, 16, 8, (1, 0))
    with pytest.raises(ValueError, match="built for"):
        made()(drawn(2, 1, 16, 16))
    with pytest.raises(ValueError, match="classes="):
        made().logits(torch.zeros(2, 32))
    assert isinstance(made(classes=2).head, nn.Linear)
