"""Previews show every pixel, and nothing that is not there."""

import numpy as np
import pytest
import torch
from PIL import Image

from stillroom.flows import Flow, noise_of
from stillroom.train.pictures import cloud, grid, preview, save_previews


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


def test_latents_and_long_points_are_shown_in_part_and_tokens_not_at_all(tmp_path):
    x = torch.rand(3, 4, 8, 8) * 2 - 1
    assert np.array_equal(np.asarray(preview(x)), np.asarray(grid(x[:, :3])))
    assert np.array_equal(np.asarray(preview(x[:, :2])), np.asarray(grid(x[:, :1])))
    points = torch.randn(20, 5)
    assert np.array_equal(np.asarray(preview(points)), np.asarray(cloud(points[:, :2])))
    save_previews(tmp_path, 7, {"tokens": torch.zeros(2, 16, 4), "points": points})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007-points.png"]


@pytest.mark.parametrize("shape", [(4, 8, 8), (5,)])
def test_a_flow_on_latents_or_points_ends_with_a_product(tmp_path, shape):
    from stillroom.recipes.flow import FlowMatching, Settings
    from stillroom.train import Silent, load, start

    settings = Settings(out=tmp_path / "run", data="given", size=8, net="dit", width=12, depth=1, steps=2, batch=4,
                        precision="float32")
    start(FlowMatching, settings, "flow", {"data": torch.randn(16, *shape)}, Silent())
    flow = load(tmp_path / "run")
    assert isinstance(flow, Flow)
    with Image.open(tmp_path / "run/samples/step-00000002-samples.png") as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(preview(flow.sample(64))))
    start = noise_of(shape, 0, 3, 0)
    x = start - flow.denoiser.v(start, torch.ones(3)).detach()      # of one step of Euler's
    assert flow.shape == shape and torch.allclose(flow.sample(3, steps=1), x, atol=1e-6)
