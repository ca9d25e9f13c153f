"""Previews show every pixel, and nothing that is not there."""

import numpy as np
import pytest
import torch

from stillroom.train.pictures import cloud, grid


def test_a_grid_shows_every_pixel_as_a_sharp_square():
    x = torch.full((3, 1, 8, 8), -1.0)
    x[0, 0, 2, 5], x[1, 0, 0, 0], x[2, 0, 7, 7] = 1, float("nan"), 0
    sheet = np.asarray(grid(x, columns=2, tile=64, gap=4))  # factor 8
    assert sheet.shape == (132, 132, 4)
    assert (sheet[16:24, 40:48] == 255).all()
    assert (sheet[:16, :64, :3] == 0).all() and (sheet[16:24, 48:64, :3] == 0).all()
    assert (sheet[:8, 68:76] == [255, 0, 255, 255]).all()
    assert (sheet[124:132, 56:64, :3] == 128).all()
    assert (sheet[:, 64:68, 3] == 0).all() and (sheet[68:, 68:, 3] == 0).all()


def test_a_grid_keeps_colours_clips_and_takes_any_float():
    x = torch.tensor([-1.0, 0.5, 3.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32).to(torch.bfloat16).requires_grad_()
    assert (np.asarray(grid(x, tile=32)) == [0, 191, 255, 255]).all()
    with pytest.raises(ValueError, match=r"\[1, 2, 4, 4\]"):
        grid(torch.zeros(1, 2, 4, 4))


def test_a_cloud_puts_a_point_where_it_is():
    ink = np.asarray(cloud(torch.tensor([[0.9, -0.9], [float("nan"), 0.0]]), size=300))
    rows, columns = np.nonzero(ink < 255)
    assert rows.min() > 150 and columns.min() > 150  # right and below the middle
    assert len(rows) == 9  # one bin of 3 x 3 pixels
