"""The alternatives to distillation: a codec's own encoder, in fewer bits."""

import copy
from itertools import chain

import torch
from torch import Tensor, nn

from stillroom.codecs.codec import Codec


class InBfloat16(nn.Module):
    """Weights are kept as float32, of numbers that bfloat16 has: autocast knows what of a network cannot bear it."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = copy.deepcopy(net)
        with torch.no_grad():
            for w in chain(self.net.parameters(), self.net.buffers()):
                if w.is_floating_point():
                    w.copy_(w.bfloat16())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x).float()


def in_bfloat16(codec: Codec) -> Codec:
    """Its encoder's weights and activations in bfloat16."""
    return Codec(InBfloat16(codec.encoder), codec.decoder, codec.space)


def with_int8_weights(codec: Codec) -> Codec:
    """Its encoder's matrices and kernels rounded to 8 bits per output channel. What it costs in quality; it is no
    faster here, because the arithmetic stays in float."""
    encoder = copy.deepcopy(codec.encoder)
    with torch.no_grad():
        for w in chain(encoder.parameters(), encoder.buffers()):
            if w.ndim in (2, 4) and w.is_floating_point():
                step = w.flatten(1).abs().amax(1).clamp(min=1e-12).view(-1, *[1] * (w.ndim - 1)) / 127
                w.copy_((w / step).round() * step)
    return Codec(encoder, codec.decoder, codec.space)
