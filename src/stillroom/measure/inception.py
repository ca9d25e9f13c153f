"""The Inception-v3 of FID: TensorFlow's network of 2015-12-05 in the layout of pt_inception-2015-12-05-6726825d.pth.

It differs from other files of Inception-v3: its averages leave padding out, its last block takes a maximum where the
paper has an average, and it has 1008 logits. Scores of any other network are not comparable.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from stillroom.nets.weights import fill_all, read_weights
from stillroom.settings import Refusal

average = partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
halving = partial(functional.max_pool2d, kernel_size=3, stride=2)


class Conv(nn.Module):
    def __init__(self, before: int, width: int, kernel: int | tuple[int, int], stride: int = 1, same: bool = True):
        super().__init__()
        height, breadth = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, breadth // 2) if same else 0
        self.conv = nn.Conv2d(before, width, (height, breadth), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class MixedA(nn.Module):
    """35 x 35: 1x1, 5x5, two 3x3, average."""

    def __init__(self, before: int, pool_width: int):
        super().__init__()
        self.branch1x1 = Conv(before, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(before, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(before, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(before, pool_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double,
                          self.branch_pool(average(x))], 1)


class MixedB(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self, before: int):
        super().__init__()
        self.branch3x3 = Conv(before, 384, 3, 2, same=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(before, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halving(x)], 1)


class MixedC(nn.Module):
    """17 x 17: 7x7 taken apart into rows and columns, once and twice."""

    def __init__(self, before: int, width: int):
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(before, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(before, width, 1), Conv(width, width, row)
        self.branch7x7_3 = Conv(width, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(before, width, 1), Conv(width, width, column)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Conv(width, width, row), Conv(width, width, column)
        self.branch7x7dbl_5 = Conv(width, 192, row)
        self.branch_pool = Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)


class MixedD(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self, before: int):
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(before, 192, 1), Conv(192, 320, 3, 2, same=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(before, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, 2, same=False)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, halving(x)], 1)


class MixedE(nn.Module):
    """8 x 8: 3x3 as a row beside a column."""

    def __init__(self, before: int, pool: Callable[[Tensor], Tensor]):
        super().__init__()
        row, column, self.pool = (1, 3), (3, 1), pool
        self.branch1x1 = Conv(before, 320, 1)
        self.branch3x3_1 = Conv(before, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(before, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch_pool = Conv(before, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat([self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once),
                          self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(self.pool(x))], 1)


class FidInception(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> [B, 2048]. Names as in the public file."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32), MixedA(256, 64), MixedA(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = MixedB(288), MixedC(768, 128), MixedC(768, 160)
        self.Mixed_6d, self.Mixed_6e = MixedC(768, 160), MixedC(768, 192)
        self.Mixed_7a, self.Mixed_7b, self.Mixed_7c = MixedD(768), MixedE(1280, average), MixedE(2048, maximum)
        self.fc = nn.Linear(2048, 1008)

    @classmethod
    def from_file(cls, file: str | Path) -> "FidInception":
        inception = cls()
        fill_all(inception, read_weights(file), file)
        return inception.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3:
            raise Refusal(f"Inception takes pictures [B, 3, H, W] in [-1, 1], not {list(x.shape)}")
        # Without antialiasing, as the reference does it: large pictures alias, in both of the sets that are compared.
        x = functional.interpolate(x.float(), (299, 299), mode="bilinear", align_corners=False)
        x = halving(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))      # [B, 64, 73, 73]
        x = halving(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                          # [B, 192, 35, 35]
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c,
                      self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)
        return x.mean((2, 3))                                                           # [B, 2048, 8, 8] -> [B, 2048]

    def logits(self, x: Tensor) -> Tensor:
        """[B, 1008]."""
        return self.fc(self(x))
