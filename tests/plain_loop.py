"""The same three roles trained by hand: no trainer, no recipe. What `stillroom.train` must equal bit for bit."""

import copy
import math

import torch
from torch.nn.functional import softplus
from torch.nn.utils import clip_grad_norm_

from stillroom.data import indices
from stillroom.match import gap, squared_error
from stillroom.nets import MLP
from stillroom.settings import seed_of


def plain(data, Generator, steps, batch, seed=0, rate=1e-3, lr=2e-3):
    torch.manual_seed(seed_of(seed, "init"))
    student = Generator()
    mean = copy.deepcopy(student).eval()
    fake, head, bank = MLP(2, 16, 1), torch.nn.Linear(2, 1), torch.zeros(64, 2)
    adam = {"betas": (0.9, 0.999), "eps": 1e-8, "fused": True}
    s_opt = torch.optim.AdamW(student.parameters(), lr, weight_decay=0.0, **adam)
    f_opt = torch.optim.AdamW(fake.parameters(), rate, weight_decay=0.01, **adam)
    h_opt = torch.optim.SGD(head.parameters(), rate, momentum=0.9)
    warm, updates, rows = steps // 3, 0, []
    total = steps // 3 - warm // 3  # the student's updates: every third step of the second stage
    rates = {}  # of each role that has moved since its optimizer was made, for its next update

    def student_rate():
        done = (updates - 5) / (total - 5)
        return lr * (updates + 1) / 5 if updates < 5 else lr * (1 + math.cos(math.pi * done)) / 2

    for k in range(steps):
        if k == warm:
            h_opt = torch.optim.SGD(head.parameters(), rate, momentum=0.9)
            del rates["head/rate"]
        noise = (torch.Generator().manual_seed(seed_of(seed, k, n)) for n in range(9))
        x0 = data[indices(len(data), seed, k, batch)]
        torch.manual_seed(seed_of(seed, "network", k, 0, 0))
        moves = k >= warm and k % 3 == 2
        with torch.set_grad_enabled(moves):
            x = student(torch.randn(x0.shape, generator=next(noise)))
        t, eps = torch.rand(batch, generator=next(noise)), torch.randn(x0.shape, generator=next(noise))
        x_t = (1 - t[:, None]) * x.detach() + t[:, None] * eps
        row = {}
        if moves:
            with torch.no_grad():
                anchor, f = mean(bank).mean(0), x_t - t[:, None] * fake(x_t, t)
            terms = {"student/gap": gap(x, f, x0), "student/anchor": squared_error(x, anchor.expand_as(x)),
                     "student/gan": softplus(-head(x))}
            sum(v.mean() for v in terms.values()).backward(inputs=list(student.parameters()))
            row |= terms
        row["fake/dsm"] = squared_error(fake(x_t, t), eps - x.detach())
        row["fake/dsm"].mean().backward()
        row["fake/gradient"] = clip_grad_norm_(fake.parameters(), math.inf)
        if k % 2 == 1:
            row["head/gan"] = softplus(head(x.detach())) + softplus(-head(x0))
            row["head/gan"].mean().backward(inputs=list(head.parameters()))
            row["head/gradient"] = clip_grad_norm_(head.parameters(), math.inf)
            rates["head/rate"] = rate
            h_opt.step()
            h_opt.zero_grad()
        if moves:
            row["student/gradient"] = clip_grad_norm_(student.parameters(), 0.5)
            s_opt.param_groups[0]["lr"] = student_rate()
            s_opt.step()
            s_opt.zero_grad()
            decay = min(0.9, (1 + updates) / (10 + updates))
            for a, p in zip(mean.parameters(), student.parameters(), strict=True):
                a.data.lerp_(p.data, 1 - decay)
            updates += 1
            rates["student/rate"] = student_rate()
        f_opt.step()
        f_opt.zero_grad()
        rates["fake/rate"] = rate
        rows.append({name: float(v.detach().mean()) for name, v in row.items()} | rates)
        after = torch.Generator().manual_seed(seed_of(seed, k, 0))  # the step's first draw again, as `after` draws anew
        bank = torch.cat([x0 + 0.1 * torch.randn(x0.shape, generator=after), bank])[:64]
    return rows, student, bank
