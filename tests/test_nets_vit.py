"""Vision transformers of tokens: by closed forms, and by what hiding must and must not reach."""

import pytest
import torch
from torch.nn import functional

from stillroom.nets import build, describe
from stillroom.nets.critic import PatchCritic
from stillroom.nets.vit import MaskedViT, ViT, ViTDecoder, as_map, as_tokens, positions


def images(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_positions_are_those_of_masked_autoencoders():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    theirs = embeddings.get_2d_sincos_pos_embed(24, 5, cls_token=True, extra_tokens=1)[1:]
    assert torch.allclose(positions(5, 5, 24, 16 / 5), theirs.float(), atol=1e-6)


def test_positions_tell_columns_from_rows_and_are_as_far_apart_as_said():
    p = positions(3, 5, 16, 0.5).view(3, 5, 16)
    assert torch.equal(p[0, :, :8], p[2, :, :8]) and torch.equal(p[:, 0, 8:], p[:, 4, 8:])
    assert torch.allclose(p[1, 2, 8:], positions(2, 1, 16, 0.5)[1, 8:])
    assert torch.allclose(p[0, 4, 0], torch.tensor(2.0).sin())                              # frequency 1, 4 halves


@torch.no_grad()
def test_tokens_have_mean_0_and_variance_1_and_lie_where_their_patch_lies():
    net = ViT(4, width=16, depth=2, heads=2)
    x = images(2, 3, 12, 20)
    z = net(x)
    assert z.shape == (2, 16, 3, 5)
    assert z.mean(1).abs().max() < 1e-5 and torch.allclose(z.var(1, unbiased=False), torch.ones(2, 3, 5), atol=1e-3)
    assert torch.equal(as_map(as_tokens(z), 3, 5), z)
    # without the blocks a token is its patch's alone
    changed = x.clone()
    changed[:, :, 4:8, 12:16] = 0
    moved = (as_map(net.embed(changed) - net.embed(x), 3, 5).abs().amax((0, 1)) > 0).nonzero().tolist()
    assert moved == [[1, 3]]


@torch.no_grad()
def test_what_is_hidden_is_neither_seen_nor_left_out():
    torch.manual_seed(0)
    masked = MaskedViT(ViT(4, 16, 2, 2), ViTDecoder(16, 4, 4, 16, 1, 2), classes=3)
    x, order = images(2, 3, 16, 16), torch.rand(2, 16, generator=torch.Generator().manual_seed(1))
    painted, hidden, mean = masked(x, order, 6)
    assert hidden.sum((1, 2, 3)).tolist() == [10 * 16.0] * 2
    assert all(torch.equal(hidden[i, 0, ::4, ::4].flatten() == 0, order[i] <= order[i].sort().values[5])
               for i in range(2))
    other = torch.where(hidden > 0, images(2, 3, 16, 16, seed=5), x)
    assert torch.allclose(masked(other, order, 6)[0], painted, atol=1e-6)
    shown = torch.where(hidden > 0, x, images(2, 3, 16, 16, seed=5))
    assert not torch.allclose(masked(shown, order, 6)[0], painted, atol=1e-2)
    # shown whole, it is the encoder followed by the painter
    whole, none, mean = masked(x, order, 16)
    z = masked.encoder(x)
    assert not none.any() and torch.allclose(mean, z.mean((2, 3)), atol=1e-5)
    assert torch.allclose(whole, masked.painter(z), atol=1e-5)


@torch.no_grad()
def test_a_decoder_can_be_written_down_with_its_range_of_pixels():
    torch.manual_seed(0)
    net = ViTDecoder(8, 4, 3, 16, 1, 2, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    again = build(describe(net))
    again.load_state_dict(net.state_dict())
    z = images(2, 8, 3, 3)
    assert torch.equal(again(z), net(z))
    for p in again.predict.parameters():
        p.zero_()
    assert torch.equal(again(z)[0, :, 5, 7], torch.tensor([0.1, 0.2, 0.3]))
    assert net(images(1, 8, 2, 5)).shape == (1, 3, 8, 20)


def test_it_learns_to_paint_a_texture_from_what_it_sees():
    """Pictures of one colour each: any patch tells the others; the mean colour is 20 times worse."""
    torch.manual_seed(0)
    masked = MaskedViT(ViT(4, 16, 1, 2), ViTDecoder(16, 4, 3, 16, 1, 2))
    optimizer = torch.optim.Adam(masked.parameters(), 3e-3)
    for step in range(120):
        x = images(32, 3, 1, 1, seed=step).expand(-1, -1, 12, 12)
        painted, hidden, _ = masked(x, torch.rand(32, 9), 3)
        loss = ((painted - x).square() * hidden).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05 * float((x.square() * hidden).mean())


@pytest.mark.parametrize(("make", "word"), [(lambda: ViT(4, 18, 1, 3), "by 4"), (lambda: ViT(4, 16, 1, 3), "3 heads"),
                                            (lambda: ViTDecoder(8, 4, 3, 20, 1, 3), "decoder of width 20")])
def test_widths_that_cannot_be_are_refused(make, word):
    with pytest.raises(ValueError, match=word):
        make()


@torch.no_grad()
def test_the_critic_judges_each_picture_alone_and_place_by_place():
    torch.manual_seed(0)
    critic = PatchCritic(8)
    x = images(3, 3, 32, 32)
    logits = critic(x)
    assert logits.shape == (3, 1, 4, 4) and torch.allclose(critic(x[1:2]), logits[1:2], atol=1e-5)
    flat = critic(functional.pad(x, (0, 32)))
    assert flat.shape == (3, 1, 4, 8)
