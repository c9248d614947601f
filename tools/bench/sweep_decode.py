"""A sweep over the sizes of the decode kernels, to choose them by; to be deleted."""

import itertools, sys, torch
from act24.sparse24.kernels import skipping_product as S, packed_decode as P
from act24.sparse24.pattern.selection import top2_of_4
from act24.tools.bench.decode import copies_of, microseconds

d = torch.device("cuda")
torch.manual_seed(0)


def act(t, f, p):
    h = torch.randn(t, f, device=d).abs().bfloat16() + 0.01
    return torch.where(torch.rand(t, f, device=d) < p, h, -h)


def best(name, run, grid, calls, check):
    found = []
    for g in grid:
        try:
            ok = check(g)
            us = microseconds(lambda *a: run(g, *a), calls)
            found.append((us, g, ok))
        except Exception as e:
            found.append((1e9, g, repr(e)[:80]))
    found.sort(key=lambda x: x[0])
    print(
        name,
        "; ".join(f"{us:.1f} {g}{'' if ok is True else ' ' + str(ok)}" for us, g, ok in found[:5]),
        "| worst",
        f"{found[-1][0]:.1f} {found[-1][1]} {found[-1][2]}",
        flush=True,
    )


for F, D in ((16512, 4096), (8192, 2048)):
    w = torch.randn(F, D, device=d).bfloat16()
    ws = copies_of(w)
    for t in (1, 4, 8):
        h = act(t, F, 0.1)
        n = S.split_number(F)
        out = torch.empty(n, t, D, device=d)
        exact = h.relu().square().double() @ w.double()

        def run(g, hh, ww):
            S.launch(hh, ww, out, "relu2", *g)

        def check(g):
            out.fill_(float("nan"))
            run(g, h, w)
            e = float((out.sum(0).double() - exact).norm() / exact.norm())
            return True if e < 1e-2 else f"WRONG {e:.1e}"

        grid = list(
            itertools.product(
                (16, 32, 64) if t > 1 else (16, 32, 64, 128),
                (64, 128, 256),
                (4, 8),
                (2, 3) if t > 1 else (2, 4),
            )
        )
        best(f"skip F {F} D {D} t {t}", run, grid, [(h, x) for x in ws], check)
for N, K in ((4096, 4096), (16512, 4096), (4096, 16512)):
    w = torch.randn(N, K, device=d).bfloat16()
    w = torch.where(top2_of_4(w.abs()), w, 0)
    ps = [P.packed_for_decode(x) for x in copies_of(w)]
    for t in (1, 2, 4, 8):
        x = torch.randn(t, K, device=d).bfloat16()
        y = torch.empty(t, N, device=d, dtype=torch.bfloat16)
        exact = x.double() @ w.double().T

        def run(g, xx, v, c):
            P.launch(xx, v, c, y, *g)

        def check(g):
            y.fill_(float("nan"))
            run(g, x, *ps[0])
            e = float((y.double() - exact).norm() / exact.norm())
            return True if e < 1e-2 else f"WRONG {e:.1e}"

        grid = list(
            itertools.product(
                (1, 2, 4, 8, 16) if t == 1 else (2, 4, 8), (32, 64, 128), (1, 2, 4, 8) if t == 1 else (2, 4)
            )
        )
        best(f"packed {N}x{K} t {t}", run, grid, [(x, *p) for p in ps], check)
