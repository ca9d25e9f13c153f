"""Small networks. Those of flows are called as net(x_t, t, y=None, r=None, w=None) and answer in the shape of x_t."""

from stillroom.nets.build import build, buildable, describe
from stillroom.nets.coding import Decoder, Encoder, sized
from stillroom.nets.ddt import DDT
from stillroom.nets.dit import DiT
from stillroom.nets.embed import copied, with_input
from stillroom.nets.lora import Lora, add_lora, tie, without_lora
from stillroom.nets.mlp import MLP
from stillroom.nets.resnet import ResNet
from stillroom.nets.unet import UNet

__all__ = [
    "DDT", "MLP", "Decoder", "DiT", "Encoder", "Lora", "ResNet", "UNet", "add_lora", "build", "buildable", "copied",
    "describe", "sized", "tie", "with_input", "without_lora",
]
