"""The wide-head transformer: the laws of all nets, what the head is told at every token, and what width is for."""

from typing import Any

import pytest
import torch

import test_nets
from stillroom.nets import DDT, DiT
from stillroom.nets.ddt import TokenBlock
from stillroom.nets.dit import Block
from test_nets import moved


def small(**options):
    made = {"channels": 6, "size": 4, "width": 16, "depth": 2, "heads": 2, "head_width": 24, "head_heads": 3}
    return DDT(**{**made, **options})


def opened(seed=0, **options):
    """Every weight moved from where it starts."""
    torch.manual_seed(seed)
    net = small(**options)
    moved(net.parameters())
    return net


@pytest.mark.parametrize("law", [
    lambda kind: test_nets.test_starts_by_predicting_exactly_zero(kind, two_times=True),
    lambda kind: test_nets.test_written_down_and_built_again(kind, {"classes": 3, "two_times": True}),
    test_nets.test_no_label_is_the_null_label,
    test_nets.test_gradient_reaches_every_parameter,
    test_nets.test_training_leaves_the_zero_start,
    test_nets.test_samples_do_not_see_each_other,
    test_nets.test_every_input_place_can_reach_every_output_place,
    test_nets.test_time_and_second_time_change_the_answer,
    test_nets.test_the_derivative_along_the_path_exists,
    test_nets.test_the_last_layer_answers_in_float32_under_autocast,
    test_nets.test_wrong_conditions_are_refused,
])
def test_it_keeps_the_laws_of_all_nets(law, monkeypatch):
    monkeypatch.setitem(test_nets.KINDS, "ddt", (lambda **k: small(**k), (6, 4, 4)))
    law("ddt")


def test_a_block_told_the_same_everywhere_is_the_plain_block():
    torch.manual_seed(0)
    plain, told = Block(24, 3), TokenBlock(24, 3)
    moved(plain.parameters())
    told.load_state_dict(plain.state_dict())
    x, c = torch.randn(3, 16, 24), torch.randn(3, 24)
    torch.testing.assert_close(told(x, c[:, None].expand(-1, 16, -1)), plain(x, c), rtol=1e-5, atol=1e-6)


def test_tokens_are_told_apart_by_their_positions_alone():
    """Moved together with their positions they move in the answer; without them the answer is another one."""
    net, x, t = opened(), torch.randn(2, 6, 4, 4), torch.tensor([0.2, 0.7])
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    answer, shuffled = net(x, t).flatten(2), x.flatten(2)[..., order].view_as(x)
    assert not torch.allclose(net(shuffled, t).flatten(2), answer[..., order], atol=1e-2)
    net.position, net.head_position = net.position[order], net.head_position[order]
    torch.testing.assert_close(net(shuffled, t).flatten(2), answer[..., order], rtol=1e-4, atol=1e-5)


def test_what_the_encoder_says_of_a_token_reaches_that_token():
    """With the head's attention closed, and told something else at token 5, token 5 alone answers otherwise."""
    net, x, t = opened(), torch.randn(2, 6, 4, 4), torch.tensor([0.2, 0.7])
    for block in net.head:
        torch.nn.init.zeros_(block.attention.out.weight)  # pyright: ignore
        torch.nn.init.zeros_(block.attention.out.bias)  # pyright: ignore
    before = net(x, t).flatten(2)
    other = torch.zeros(1, 16, 24)
    other[:, 5] = 1.0
    handle = net.told.register_forward_hook(lambda _module, _inputs, s: s + other)  # pyright: ignore
    changed = (net(x, t).flatten(2) - before).abs().amax((0, 1))
    handle.remove()
    assert changed[5] > 1e-2 and changed[torch.arange(16) != 5].max() == 0


def test_the_head_is_told_time_and_encoder():
    """s = silu(time(t) + encoder tokens); the label reaches it through the encoder."""
    net, x, t = opened(classes=3), torch.randn(2, 6, 4, 4), torch.tensor([0.2, 0.7])
    seen: dict[str, Any] = {}
    net.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.__setitem__("last", out))
    net.told.register_forward_pre_hook(lambda _m, inputs: seen.__setitem__("s", inputs[0]))
    net(x, t, torch.tensor([0, 1]))
    formula = torch.nn.functional.silu(net.condition.time(t)[:, None] + seen["last"])
    torch.testing.assert_close(seen["s"], formula)


def test_a_head_as_wide_as_a_token_fits_noise_where_a_narrow_net_cannot():
    """At t=1 a flow to the point 0 must answer its input. What is projected out of 8 channels spans 8 of 48 numbers, so
    the narrow net keeps 40/48 of the error at least; the same net with a wide head does not (RAE, section 4)."""
    left = {}
    narrow: dict[str, Any] = {"channels": 48, "size": 2, "patch": 1, "width": 8, "depth": 2, "heads": 1}
    for name, make in {"dit": lambda: DiT(**narrow),
                       "ddt": lambda: DDT(**narrow, head_width=96, head_depth=2, head_heads=3)}.items():
        torch.manual_seed(0)
        net = make()
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for step in range(120):
            x = torch.randn(64, 48, 2, 2, generator=torch.Generator().manual_seed(step))
            loss = (net(x, torch.ones(64)) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        left[name] = float(loss.detach())
    assert left["dit"] > 0.95 * 40 / 48
    assert left["ddt"] < 0.5


@pytest.mark.parametrize(("options", "says"), [
    ({"size": 5, "patch": 2}, "size 5 is not divisible by patch 2"),
    ({"width": 18}, "width 18 must be divisible"),
    ({"head_width": 22}, "head_width 22 must be divisible"),
])
def test_it_refuses_what_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        small(**options)
    with pytest.raises(ValueError, match="this DDT was built for"):
        small()(torch.zeros(1, 6, 8, 8), torch.zeros(1))
