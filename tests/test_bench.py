"""The benches' figures against closed forms: coverage of the median's interval, and what a ratio must not depend on."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import prompted  # pyright: ignore[reportMissingImports]
from compare import HERE, Figure, interleave, median, ratio, tail  # pyright: ignore[reportMissingImports]
from kept import kept  # pyright: ignore[reportMissingImports]


# Conover, Practical Nonparametric Statistics: ranks of the 95 % interval of a median.
@pytest.mark.parametrize(("n", "rank", "coverage"), [(6, 1, 0.9688), (10, 2, 0.9785), (15, 4, 0.9648), (20, 6, 0.9586)])
def test_interval_of_the_median_lies_at_the_tabled_ranks(n, rank, coverage):
    figure = median(list(np.random.default_rng(n).permutation(n) + 1.0))
    assert (figure.low, figure.high) == (rank, n + 1 - rank)
    assert 1 - 2 * tail(n, rank) == pytest.approx(coverage, abs=1e-4)
    assert 1 - 2 * tail(n, rank + 1) < 0.95  # and no narrower pair would do


def test_interval_covers_the_median_of_a_skewed_law_as_often_as_it_says():
    draws = np.random.default_rng(0).exponential(size=(3000, 12))
    figures = [median(list(d)) for d in draws]
    held = np.mean([f.low <= np.log(2) <= f.high for f in figures])
    assert held == pytest.approx(1 - 2 * tail(12, 3), abs=0.012)  # 0.9614; three standard errors


def test_too_few_rounds_give_no_interval_and_no_verdict():
    for figure in (median([1.0] * 5), ratio([1.0] * 5, [2.0] * 5)):
        assert (figure.low, figure.high) == (-np.inf, np.inf)
        assert figure.verdict(below=100, above=None) == "open"


def test_ratio_of_a_constant_factor_is_exact_whatever_the_machine_did():
    load = np.random.default_rng(1).lognormal(size=12)
    assert ratio(list(3 * load), list(load)) == pytest.approx((3, 3, 3), rel=1e-12)
    with pytest.raises(ValueError, match="both sides"):
        ratio([1.0] * 6, [1.0] * 7)


def test_verdict_needs_the_whole_interval():
    figure = Figure(1.02, 1.01, 1.04)
    assert [figure.verdict(b, None) for b in (1.05, 1.03, 1.01)] == ["met", "open", "missed"]
    assert [figure.verdict(None, a) for a in (1.0, 1.03, 1.04)] == ["met", "open", "missed"]
    assert figure.verdict(None, None) == ""


def test_contenders_alternate_and_warm_up_is_left_out():
    calls = []
    samples = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(s) for name, s in samples.items()} == {"a": 3, "b": 3}


def test_no_bench_is_called_like_a_package():
    """The folder of a script that runs comes first on the path: what has a package's name would stand in its place."""
    taken = sys.stdlib_module_names | packages_distributions().keys()
    assert not {file.stem for file in HERE.glob("*.py")} & taken


def test_what_is_kept_for_the_backward_pass_is_counted_once_and_without_weights():
    """A linear layer keeps what goes in, a sigmoid what comes out, and the second layer that same tensor again."""
    nn = torch.nn
    net = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))
    assert kept(net, torch.zeros(3, 4)) == 4 * (3 * 4 + 3 * 8)


@pytest.mark.parametrize(("case", "pooled"), [(prompted.SD15, 0), (prompted.SDXL, 8)])
def test_the_steps_of_the_bench_on_a_gpu_run_at_another_size(case, pooled):
    pytest.importorskip("diffusers")
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2,
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 8,
             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
    if pooled:
        small |= {"transformer_layers_per_block": (1, 2), "addition_time_embed_dim": 4,
                  "projection_class_embeddings_input_dim": pooled + 6 * 4}
    case = replace(case, unet={**case.unet, **small}, side=8, tokens=(4, 8), pooled=pooled, batch=2)
    with ExitStack() as stack:
        run = prompted.cycle(case, "cpu", stack)
        assert prompted.operations(run) > 1e8
