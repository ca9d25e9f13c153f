"""Small networks: exact starts, exact round trips, and what each input can and cannot reach."""

import json
import sys

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stillroom.nets import MLP, DiT, Lora, UNet, add_lora, build, describe, without_lora
from stillroom.nets.dit import patchify, positions, unpatchify
from stillroom.nets.embed import final, sinusoidal
from stillroom.settings import Refusal

B = 3
KINDS = {
    "mlp": (lambda **k: MLP(dim=5, width=16, depth=2, **k), (5,)),
    "unet": (lambda **k: UNet(channels=2, width=8, multipliers=(1, 2), groups=4, heads=2, **k), (2, 8, 8)),
    "unet3": (lambda **k: UNet(1, width=8, multipliers=(1, 1, 2), blocks=2, groups=4, heads=2, **k), (1, 8, 12)),
    "dit": (lambda **k: DiT(channels=2, size=8, width=24, depth=2, heads=3, **k), (2, 8, 8)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind, zero=False, **options):
    """A net and its inputs. Unless zero, every weight is moved from where it starts: nothing hides behind a gate."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    net = make(**options)
    if not zero:
        moved(net.parameters())
    x, t = torch.randn(B, *shape), torch.tensor([0.1, 0.5, 0.9])
    return net, x, t


@torch.no_grad()
def moved(parameters, by=0.1):
    for p in parameters:
        p.add_(torch.randn_like(p), alpha=by)


@kinds
@pytest.mark.parametrize("two_times", [False, True])
def test_starts_by_predicting_exactly_zero(kind, two_times):
    net, x, t = made(kind, zero=True, classes=4, two_times=two_times)
    out = net(x, t, torch.tensor([0, 1, 2]), t / 2 if two_times else None)
    assert torch.equal(out, torch.zeros_like(x))
    assert (net.classes, net.two_times) == (4, two_times)


@kinds
def test_no_label_is_the_null_label(kind):
    net, x, t = made(kind, classes=4)
    assert torch.equal(net(x, t), net(x, t, torch.full((B,), 4)))
    labels = [net(x, t, torch.full((B,), k)) for k in range(5)]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(labels) for b in labels[:i])


@kinds
@pytest.mark.parametrize("options", [{}, {"classes": 3, "two_times": True}])
def test_written_down_and_built_again(kind, options):
    net, x, t = made(kind, **options)
    again = build(json.loads(json.dumps(describe(net))))
    assert describe(again) == describe(net)
    again.load_state_dict(net.state_dict())  # strict: same names, same shapes
    args = (torch.tensor([0, 1, 3]), t / 3) if options else ()
    assert torch.equal(net(x, t, *args), again(x, t, *args))


@kinds
def test_gradient_reaches_every_parameter(kind):
    net, x, t = made(kind, classes=2, two_times=True)
    net(x, t, torch.tensor([0, 1, 2]), t / 2).square().sum().backward()

    def reached(g):  # each row of a matrix by itself: half of a modulation, the null label
        return g is not None and bool((g.flatten(1) if g.ndim > 1 else g[None]).abs().sum(1).gt(0).all())

    assert not [n for n, p in net.named_parameters() if not reached(p.grad)]


@kinds
def test_training_leaves_the_zero_start(kind):
    """Gates and projections that start at zero open one after the other: after some steps every parameter has moved."""
    net, x, t = made(kind, zero=True, classes=2)
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (net(x, t, torch.tensor([0, 1, 2])) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert not [n for n, p in net.named_parameters() if torch.equal(p, start[n])]
    assert losses[-1] < 0.5 * losses[0]


def test_residual_blocks_start_as_identity():
    net, _, _ = made("dit", zero=True)
    x, c = torch.randn(B, 16, 24), torch.randn(B, 24)
    assert all(torch.equal(block(x, c), x) for block in net.blocks)
    net, _, _ = made("unet", zero=True)
    x, c = torch.randn(B, 16, 4, 4), torch.randn(B, 16)
    assert torch.equal(net.attention(x), x) and torch.equal(net.low(x, c), x)
    x = torch.randn(B, 16, 8, 8)
    block = net.up[0].blocks[0]  # its widths differ: what is left is the 1x1 convolution
    assert torch.equal(block(x, c), block.skip(x))


@kinds
def test_samples_do_not_see_each_other(kind):
    net, x, t = made(kind, classes=2)
    y = torch.tensor([0, 1, 2])
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, t, y)[1].square().sum(), x)
    assert gradient[1].abs().max() > 0
    assert torch.equal(gradient[[0, 2]], torch.zeros_like(gradient[[0, 2]]))
    torch.testing.assert_close(net(x, t, y)[1:2], net(x[1:2], t[1:2], y[1:2]), rtol=1e-4, atol=1e-4)


@kinds
def test_every_input_place_can_reach_every_output_place(kind):
    """Attention makes the field of view whole: the first output place moves with the last input place."""
    net, x, t = made(kind)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, t).flatten(1)[:, 0].sum(), x)
    assert (gradient.flatten(1)[:, -1] != 0).all()


@kinds
def test_time_and_second_time_change_the_answer(kind):
    net, x, t = made(kind, two_times=True)
    there = net(x, t, r=t / 2)
    assert (there - net(x, t, r=t / 4)).abs().max() > 1e-3
    assert (there - net(x, t + 0.05, r=t / 2 + 0.05)).abs().max() > 1e-3  # same gap, another t


@kinds
def test_the_derivative_along_the_path_exists(kind):
    """Forward-mode derivatives (MeanFlow, sCM) agree with central differences; attention needs its math kernel."""
    net, x, t = made(kind, two_times=True)
    direction, h = torch.randn_like(x), 1e-3
    with sdpa_kernel(SDPBackend.MATH):
        exact = torch.func.jvp(lambda x: net(x, t, r=t / 2), (x,), (direction,))[1]
        difference = (net(x + h * direction, t, r=t / 2) - net(x - h * direction, t, r=t / 2)) / (2 * h)
        in_time = torch.func.jvp(lambda t: net(x, t, r=t.detach() / 2), (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(exact, difference, rtol=2e-2, atol=2e-2 * exact.abs().max().item())
    assert in_time.isfinite().all() and in_time.abs().max() > 0


@kinds
def test_the_last_layer_answers_in_float32_under_autocast(kind):
    net, x, t = made(kind)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, net(x, t), rtol=0.1, atol=0.1 * out.abs().max().item())


def test_final_multiplies_in_float32():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 8), torch.randn(4, 64)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(final(layer, x), plain)
        assert layer(x).dtype == torch.bfloat16
        assert final(layer, x.bfloat16()).dtype == torch.float32


@kinds
def test_wrong_conditions_are_refused(kind):
    net, x, t = made(kind)
    with pytest.raises(ValueError, match="no classes"):
        net(x, t, torch.zeros(B, dtype=torch.int64))
    with pytest.raises(ValueError, match="one time"):
        net(x, t, r=t)
    with pytest.raises(ValueError, match="t has shape"):
        net(x, t[:1])
    net, x, t = made(kind, classes=2, two_times=True)
    with pytest.raises(ValueError, match="give r"):
        net(x, t)
    with pytest.raises(ValueError, match="must be equal"):
        net(x, t, r=t[:1])
    with pytest.raises(ValueError, match="one label per sample"):
        net(x, t, torch.zeros(1, dtype=torch.int64), t)
    with pytest.raises(IndexError):
        net(x, t, torch.full((B,), 3), t)


def test_wrong_sizes_are_refused():
    net, _, t = made("unet3")
    with pytest.raises(ValueError, match="divisible by 4"):
        net(torch.zeros(B, 1, 8, 10), t)
    net, _, t = made("dit")
    with pytest.raises(ValueError, match="was built for"):
        net(torch.zeros(B, 2, 16, 16), t)
    net, _, t = made("mlp")
    with pytest.raises(ValueError, match="coordinates"):
        net(torch.zeros(B, 4), t)
    for wrong in (
        lambda: UNet(3, width=24, groups=16), lambda: UNet(3, width=16, groups=16, heads=3), lambda: UNet(3, blocks=0),
        lambda: DiT(3, size=9), lambda: DiT(3, size=8, width=100, heads=3), lambda: DiT(3, size=8, width=6, heads=3),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_mlp_takes_frames_each_with_its_time():
    net, _, _ = made("mlp", classes=3, two_times=True)
    x, t, y = torch.randn(B, 4, 5), torch.rand(B, 4), torch.tensor([0, 1, 3])
    out = net(x, t, y, t / 2)
    for f in range(4):
        torch.testing.assert_close(out[:, f], net(x[:, f], t[:, f], y, t[:, f] / 2))
    one, each = t[:, 0], t[:, :1].expand(B, 4)
    torch.testing.assert_close(net(x, one, y, one / 2), net(x, each, y, each / 2))


def test_sinusoids_are_the_closed_form_and_tell_times_apart():
    t = torch.tensor([0.0, 0.25, 1.0])
    table = sinusoidal(t, 8)
    for k in range(4):
        angle = 1000 * t.double() * 10.0 ** (-k)
        torch.testing.assert_close(table[:, k].double(), angle.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(table[:, 4 + k].double(), angle.sin(), rtol=0, atol=1e-4)
    close = sinusoidal(torch.tensor([0.5, 0.5005]), 128)
    assert (close[0] - close[1]).norm() > 0.5
    assert torch.equal(sinusoidal(t.double(), 8), table)


@pytest.mark.parametrize(("p", "height", "width"), [(1, 3, 5), (2, 4, 6), (3, 9, 3), (4, 4, 4)])
def test_unpatchify_inverts_patchify(p, height, width):
    x = torch.randn(2, 3, height, width)
    tokens = patchify(x, p)
    assert torch.equal(unpatchify(tokens, p, height, width), x)
    row, column = 0, width // p - 1  # a token is its patch, channel by channel
    patch = x[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p]
    assert torch.equal(tokens[:, row * (width // p) + column], patch.flatten(1))


def test_positions_are_pythagorean_and_distinct():
    side, width = 6, 16
    table = positions(side, width)
    torch.testing.assert_close(table.square().sum(1), torch.full((side**2,), width / 2))
    grid = table.reshape(side, side, width)
    assert torch.equal(grid[..., : width // 2], grid[..., width // 2 :].transpose(0, 1))  # rows read as columns do
    assert torch.cdist(table, table).add(torch.eye(side**2)).min() > 0.5
    assert "position" not in DiT(channels=1, size=4, width=8, depth=1, heads=1).state_dict()


def test_dit_without_positions_is_blind_to_order():
    """Only the position table tells tokens apart: without it, shuffled patches give the shuffled answer."""
    net, x, t = made("dit")
    net.position.zero_()
    order = torch.randperm(16)
    shuffled = unpatchify(patchify(x, 2)[:, order], 2, 8, 8)
    torch.testing.assert_close(patchify(net(shuffled, t), 2), patchify(net(x, t), 2)[:, order], rtol=1e-4, atol=1e-4)


def test_dit_attention_logits_are_bounded():
    """With RMS-normed queries and keys, scaling the weights that make them changes nothing."""
    net, x, t = made("dit")
    before = net(x, t)
    with torch.no_grad():
        for block in net.blocks:
            block.attention.qkv.weight[:48] *= 100
            block.attention.qkv.bias[:48] *= 100
    torch.testing.assert_close(net(x, t), before, rtol=1e-3, atol=1e-3)


def lora_parameters(net):
    return {name: p for name, p in net.named_parameters() if "lora_" in name}


lora_kinds = pytest.mark.parametrize("kind", ["mlp", "unet", "dit"])


@lora_kinds
def test_adapters_start_as_identity_and_switch_off(kind):
    pytest.importorskip("peft")
    net, x, t = made(kind, classes=2)
    y = torch.tensor([0, 1, 2])
    before, weights = net(x, t, y), {n: p.detach().clone() for n, p in net.named_parameters()}
    student = Lora(net, rank=2)
    assert torch.equal(student(x, t, y), before)
    moved(lora_parameters(student).values())
    after = student(x, t, y)
    assert (after - before).abs().max() > 1e-3
    with student.base() as base:
        assert torch.equal(student(x, t, y), before)
        assert torch.equal(base(x, t, y), before)
        with student.base():
            assert torch.equal(student(x, t, y), before)
        assert torch.equal(student(x, t, y), before)  # the inner context left the outer one alone
    assert torch.equal(student(x, t, y), after)
    kept = {n.replace(".base_layer", ""): p for n, p in net.named_parameters() if "lora_" not in n}
    assert kept.keys() == weights.keys() and all(torch.equal(kept[n], weights[n]) for n in weights)


@lora_kinds
def test_only_adapters_take_gradients(kind):
    pytest.importorskip("peft")
    net, x, t = made(kind)
    student = Lora(net, rank=2)
    moved(lora_parameters(student).values())
    assert {n for n, p in student.named_parameters() if p.requires_grad} == set(lora_parameters(student))
    loss = student(x, t).square().sum()
    with without_lora(student), torch.no_grad():  # a teacher's answer between the forward and the backward pass
        student(x, t)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora_parameters(student).values())


def test_an_error_inside_the_context_leaves_the_adapters_on():
    pytest.importorskip("peft")
    net, x, t = made("mlp")
    student = Lora(net, rank=2)
    moved(lora_parameters(student).values())
    for p in student.parameters():
        p.requires_grad_(False)
    after = student(x, t)
    with pytest.raises(KeyError), without_lora(student):
        raise KeyError("inside")
    assert torch.equal(student(x, t), after)
    assert not any(p.requires_grad for p in student.parameters())  # a frozen student stays frozen


@lora_kinds
def test_a_lora_is_written_down_and_built_again(kind):
    pytest.importorskip("peft")
    net, x, t = made(kind, classes=2, two_times=True)
    student = Lora(net, rank=2, alpha=6.0, targets="condition|final")
    moved(lora_parameters(student).values())
    again = build(json.loads(json.dumps(describe(student))))
    assert describe(again) == describe(student)
    assert (again.classes, again.two_times) == (2, True)
    again.load_state_dict(student.state_dict())
    args = (x, t, torch.tensor([0, 1, 2]), t / 2)
    assert torch.equal(again(*args), student(*args))
    with without_lora(again), without_lora(student):
        assert torch.equal(again(*args), student(*args))
    assert describe(build(describe(net))) == describe(net)  # the bare net is still described as such


def test_targets_choose_layers_and_alpha_scales():
    pytest.importorskip("peft")
    net, x, t = made("dit")
    before = net(x, t)
    add_lora(net, rank=3, alpha=6, targets=r"blocks\.1\.attention\.out$")
    names = set(lora_parameters(net))
    assert names == {f"blocks.1.attention.out.lora_{ab}.default.weight" for ab in "AB"}
    moved(lora_parameters(net).values())
    after = net(x, t)
    layer = net.blocks[1].attention.out
    with torch.no_grad():  # the closed form: W + (alpha / rank) B A
        layer.base_layer.weight += 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    with without_lora(net):
        torch.testing.assert_close(net(x, t), after, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_adapters_are_refused_where_they_make_no_sense(monkeypatch):
    pytest.importorskip("peft")
    net, _, _ = made("mlp")
    with pytest.raises(Refusal, match=r"no layer matches targets='nothing'; .*layers\.0\.first, layers\.0\.second"):
        add_lora(net, rank=2, targets="nothing")
    with pytest.raises(Refusal, match="carries no adapters"), without_lora(net):
        pass
    add_lora(net, rank=2)
    with pytest.raises(Refusal, match="already"):
        Lora(net, rank=2)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(Refusal, match=r"pip install stillroom\[lora\]"):
        add_lora(made("mlp")[0], rank=2)


def test_attention_whose_output_layer_is_never_called_gets_no_dead_adapter():
    pytest.importorskip("peft")
    net = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))
    assert set(lora_parameters(add_lora(net, rank=1))) == {"0.lora_A.default.weight", "0.lora_B.default.weight"}
