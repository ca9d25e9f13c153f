"""Loss and gradient of the drifting field, released defaults and three temperatures, against the same by hand
(`drift_plain.py`); beside it the floor, the multiplications of the form that is used at the rate of a matrix product of
that shape. Then the memory of 4096 samples and as many positives of 1024 channels, in a process of its own.

On a machine with CUDA the table is that of the first GPU.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from compare import bench, interleave, peak_of, row
from drift_plain import drift_loss as by_hand
from stillroom.match import drift, drift_loss
from stillroom.match.drift.field import LEAST_SQUARE, RELEASED
from stillroom.match.drift.problems import TILE, posed

SHAPES = {(1, 256, 256, 64): 16, (1, 256, 256, 1024): 4, (1, 64, 64, 768): 32, (4, 64, 64, 768): 8,
          (1, 1024, 1024, 256): 1}
"""Problems, N, P, C: how many calls make a sample of a few tens of milliseconds. One small problem takes little more
than its operations to start; recipes pose as many at once as they have groups."""
LIMIT, LIMIT_MB = 0.6, 400
KEPT = 30 * 2**18
"""30 MB. Once that much has come and gone, as in any program that trains, glibc keeps what is given back; before, every
call of a few megabytes may fault its pages in again, which by hand takes up to as long as the arithmetic does."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ours(x: Tensor, y: Tensor) -> Tensor:
    return drift_loss(x, drift(x, y))


def learning(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            x.grad = None
            loss(x, y).sum().backward()
        wait()

    return run


def multiplying(d: Tensor, t: Tensor, times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            d @ t
        wait()

    return run


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def multiplications(x: Tensor, y: Tensor) -> tuple[int, str]:
    (b, n, c), m, k = x.shape, x.shape[1] + y.shape[1], len(RELEASED)
    if posed(x.detach(), y, None, None, k, LEAST_SQUARE).gram is None:
        return b * (1 + k) * n * m * c, "direct"
    triangle = m * (m + min(m, TILE)) // 2
    return b * (triangle * (c + k * n) + n * m * c), "Gram"


def speed(quick: bool, threads: int, below: float | None) -> tuple[list[dict], list[str]]:
    torch.set_num_threads(threads)
    torch.ones(KEPT)
    rows, notes, on = [], [], "GPU" if DEVICE.type == "cuda" else f"{threads} threads" if threads > 1 else "1 thread"
    for (b, n, p, c), times in SHAPES.items():
        g = torch.Generator().manual_seed(0)
        x, y = (torch.randn(b, size, c, generator=g).to(DEVICE) for size in (n, p))
        x.requires_grad_()
        d, t = torch.randn(b, n, n + p, device=DEVICE), torch.randn(b, n + p, c, device=DEVICE)
        samples = interleave({"hand": learning(by_hand, x, y, times), "ours": learning(ours, x, y, times),
                              "product": multiplying(d, t, times)}, 3 if quick else 31, warmup=3)
        hand, mine, product = ([s / times for s in samples[name]] for name in ("hand", "ours", "product"))
        count, form = multiplications(x, y)
        rate = b * n * (n + p) * c / statistics.median(product)
        floor, shape = count / rate, f"{f'{b} problems of ' * (b > 1)}N {n}, P {p}, C {c}, {on}"
        rows += [row(f"{shape}: by hand", hand), row(f"{shape}: match.drift", mine, ("by hand", hand), below=below)]
        notes.append(f"{shape}: {form} form, {count / 1e6:.0f}M multiplications at {rate / 1e9:.0f}G a second: floor "
                     f"{1e3 * floor:.2f} ms; ours takes {statistics.median(mine) / floor:.1f} times that, by hand "
                     f"{statistics.median(hand) / floor:.1f} times.")
    return rows, notes


FIELD = """
import torch
from stillroom.match import drift, drift_loss

torch.set_num_threads(2)
x, y = torch.randn(1, 4096, 1024, requires_grad=True), torch.randn(1, 4096, 1024)
small, target = torch.randn(1, 64, 64, requires_grad=True), torch.randn(1, 64, 64)
drift_loss(small, drift(small, target)).sum().backward()
before = resident("VmRSS")
drift_loss(x, drift(x, y)).sum().backward()
print(resident("VmHWM") - before)
"""


def memory() -> str:
    peak = 1e3 * peak_of(FIELD)
    return (f"N 4096, P 4096, C 1024 on the CPU: {peak:.0f} MB more at the peak than samples and positives take, "
            f"gradient included; bound {LIMIT_MB} MB: {'met' if peak < LIMIT_MB else 'missed'}.")


def run(quick: bool) -> tuple[list[dict], list[str]]:
    tables = [speed(quick, min(2, torch.get_num_threads()), LIMIT)]
    if DEVICE.type == "cpu":        # what barriers and busy neighbours add to two is not in it
        tables.append(speed(quick, 1, None))
    return [r for rows, _ in tables for r in rows], [*(n for _, notes in tables for n in notes), memory()]


if __name__ == "__main__":
    bench("The drifting field: loss and gradient", run)
