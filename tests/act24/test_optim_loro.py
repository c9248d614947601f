"""LOROAdamW against the published update rules, written out for one module at a time in float64."""

import copy
import math

import pytest
import torch
from torch import nn

from act24.errors import Act24Error
from act24.low_rank.exact_step import exact_step
from act24.optim import LOROAdamW, loro_parameter_groups

SHAPES = {"q_proj": (8, 6, 3), "k_proj": (8, 6, 3), "down_proj": (6, 12, 4)}  # out, in, rank
BETAS, EPS = (0.9, 0.999), 1e-6


class Factors(nn.Module):
    def __init__(self, out_features, in_features, rank, generator):
        super().__init__()
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.weight_in = nn.Parameter(draw(rank, in_features))
        self.weight_out = nn.Parameter(draw(out_features, rank))


def model_of(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    model = nn.ModuleDict({name: Factors(*shape, generator) for name, shape in SHAPES.items()})
    model["norm"] = nn.RMSNorm(6)
    model["head"] = nn.Linear(6, 5, bias=False)
    nn.init.normal_(model["head"].weight, generator=generator)
    return model.to(dtype)


def optimizer_of(model, lr=0.01, lr_scale=0.25, weight_decay=0.0, **options):
    groups = loro_parameter_groups(model, list(SHAPES), weight_decay, lr_scale=lr_scale)
    return LOROAdamW(groups, lr=lr, **options)


def gradients(model, step):
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in model.parameters()
    ]


def train(model, optimizer, steps):
    for step in steps:
        for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
            parameter.grad = gradient
        optimizer.step()


class HuggingFaceAdam:
    """Adam as in LORO's script, for one tensor: eps beside the uncorrected √v, the step size corrected."""

    def __init__(self, shape):
        self.m, self.v, self.t = torch.zeros(shape).double(), torch.zeros(shape).double(), 0

    def direction(self, gradient):
        self.t += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * gradient
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient**2
        return self.m / (self.v.sqrt() + EPS)

    @property
    def correction(self):
        return math.sqrt(1 - BETAS[1] ** self.t) / (1 - BETAS[0] ** self.t)


def test_lazy_updates_are_adam_at_a_fraction_of_the_learning_rate():
    model, decay, lr, scale = model_of(), 0.1, 0.02, 0.25
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = {name: HuggingFaceAdam(p.shape) for name, p in named.items()}
    optimizer = optimizer_of(model, lr, scale, decay, exact_every=0, refresh="none")
    for step in range(5):
        train(model, optimizer, [step])
        for (name, p), gradient in zip(named.items(), gradients(model, step), strict=True):
            u, eta = states[name].direction(gradient), lr * states[name].correction
            if ".weight_" in name:  # a factor
                p.sub_(eta * (scale * u + decay * p))
            else:
                p.sub_(eta * u + lr * (decay if name == "head.weight" else 0) * p)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), named[name], rtol=1e-11, atol=1e-13)


def test_the_fraction_is_rank_over_hidden_size_for_every_linear():
    groups = loro_parameter_groups(model_of(), list(SHAPES), 0.0, hidden_size=12)
    assert {g["name"]: g.get("lr_scale") for g in groups} == {
        "decay": None,
        "no_decay": None,
        "factors_rank_3": 0.25,
        "factors_rank_4": pytest.approx(1 / 3),
    }
    assert [len(g["params"]) for g in groups] == [1, 1, 4, 2]
    with pytest.raises(Act24Error, match="hidden_size"):
        loro_parameter_groups(model_of(), list(SHAPES), 0.0)
    with pytest.raises(Act24Error, match="lr_scale"):
        loro_parameter_groups(model_of(), list(SHAPES), 0.0, lr_scale=0)


@pytest.mark.parametrize("kind", ["loro", "loro_raw"])
def test_every_kth_update_is_exact(kind):
    """At the full learning rate, without decay, from Adam's directions or the gradients themselves."""
    model, lr = model_of(), 0.03
    optimizer = optimizer_of(
        model, lr, weight_decay=0.1, type=kind, exact_every=3, exact_lr_scale=2.0, refresh="none"
    )
    train(model, optimizer, range(2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    train(model, optimizer, [2])
    given = dict(zip(before, gradients(model, 2), strict=True))
    directions = {}
    for name, state in moments.items():
        adam = HuggingFaceAdam(given[name].shape)
        adam.m, adam.v, adam.t = state["exp_avg"], state["exp_avg_sq"], 2
        u = adam.direction(given[name])
        directions[name] = u * adam.correction if kind == "loro" else given[name]
    for name in SHAPES:
        pair = (f"{name}.weight_in", f"{name}.weight_out")
        expected = exact_step(
            *(before[n][None] for n in pair), *(directions[n][None] for n in pair), lr=2 * lr
        )
        factors = model[name]
        torch.testing.assert_close(
            factors.weight_out @ factors.weight_in, (expected.weight_out @ expected.weight_in)[0]
        )
        gram = factors.weight_in @ factors.weight_in.T
        torch.testing.assert_close(gram, torch.diag_embed(expected.singular[0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("refresh", "zeroed"),
    [("all", {"factors", "others"}), ("lrk", {"factors"}), ("reg", {"others"}), ("none", set())],
)
def test_refresh_zeroes_its_moments_and_restarts_their_correction(refresh, zeroed):
    model = model_of()
    optimizer = optimizer_of(model, exact_every=4, refresh=refresh, refresh_every=2)
    train(model, optimizer, range(2))
    for group in optimizer.param_groups:
        kind = "factors" if group["factors"] else "others"
        assert group["step"] == (0 if kind in zeroed else 2)
        assert group["updates"] == 2
        for parameter in group["params"]:
            assert bool(optimizer.state[parameter]["exp_avg"].any()) == (kind not in zeroed)
            assert bool(optimizer.state[parameter]["exp_avg_sq"].any()) == (kind not in zeroed)


def test_refresh_follows_the_exact_update_unless_told_otherwise():
    assert optimizer_of(model_of(), exact_every=7).refresh_every == 7
    assert optimizer_of(model_of(), exact_every=7, refresh_every=3).refresh_every == 3
    eucl = optimizer_of(model_of(), type="eucl", exact_every=7)
    assert (eucl.exact_every, eucl.refresh_every) == (0, 0)


def published_exact_update(m, n, u_m, u_n, eta):
    """LORO's script: QR of the factors, SVD of the core of 2R × 2R. [out, R], [in, R]."""
    (u, r_m), (v, r_n), rank = torch.linalg.qr(m), torch.linalg.qr(n), m.shape[1]
    g_v, u_g = torch.linalg.solve(r_n.T, u_m.T).T, torch.linalg.solve(r_m.T, u_n.T)
    k0 = u_g @ v
    (q1, k1), (q2, k2) = torch.linalg.qr((u_g - k0 @ v.T).T), torch.linalg.qr(g_v - u @ (u.T @ g_v))
    zero = torch.zeros(rank, rank, dtype=m.dtype)
    core = torch.cat((torch.cat((r_m @ r_n.T - eta * k0, -eta * k1.T), 1), torch.cat((-eta * k2, zero), 1)))
    left, values, right = torch.linalg.svd(core)
    root = values[:rank].sqrt()
    return torch.cat((u, q2), 1) @ left[:, :rank] * root, torch.cat((v, q1), 1) @ right.T[:, :rank] * root


@pytest.mark.parametrize("refresh", ["none", "all"])
def test_moments_that_outlive_an_exact_update_depend_on_the_signs_of_its_vectors(refresh):
    """The new factors are singular vectors, whose signs no definition fixes; the script has those of its SVD.
    Adam's moments know the old factors' signs, so where they are kept ("none", and "reg" keeps these too)
    what follows is an accident of the decomposition, and no other one reproduces it. With the signs of ours
    the script's next update is ours; without moments any signs give the same product."""
    generator, lr = torch.Generator().manual_seed(3), 0.05
    model = nn.ModuleDict({"q_proj": Factors(24, 20, 3, generator)})
    factors = model["q_proj"]
    gradient = torch.randn(24, 20, generator=generator, dtype=torch.float64)
    m, n = factors.weight_out.detach().clone(), factors.weight_in.detach().T.clone()
    groups = loro_parameter_groups(model, ["q_proj"], 0.0, lr_scale=1.0)
    optimizer = LOROAdamW(groups, lr=lr, exact_every=1, refresh=refresh, refresh_every=1)
    states = HuggingFaceAdam(m.shape), HuggingFaceAdam(n.shape)

    def ours_():
        factors.weight_out.grad = gradient @ factors.weight_in.detach().T
        factors.weight_in.grad = factors.weight_out.detach().T @ gradient
        optimizer.step()

    def directions(m, n, states):
        return [state.direction(g) for state, g in zip(states, (gradient @ n, gradient.T @ m), strict=True)]

    ours_()
    u_m, u_n = directions(m, n, states)
    m, n = published_exact_update(m, n, u_m, u_n, lr * states[0].correction)
    signs = (m * factors.weight_out.detach()).sum(0).sign()
    assert (signs < 0).any()
    torch.testing.assert_close(m * signs, factors.weight_out.detach())
    torch.testing.assert_close(m @ n.T, factors.weight_out.detach() @ factors.weight_in.detach())
    optimizer.exact_every = 0  # a lazy update follows
    ours_()
    product = factors.weight_out.detach() @ factors.weight_in.detach()
    apart = {}
    for name, flip in (("as the script has them", torch.ones(3)), ("as ours has them", signs)):
        kept = copy.deepcopy(states) if refresh == "none" else [HuggingFaceAdam(s.m.shape) for s in states]
        theirs = m * flip, n * flip
        u = directions(*theirs, kept)
        new = [f - lr * state.correction * d for f, state, d in zip(theirs, kept, u, strict=True)]
        apart[name] = float((new[0] @ new[1].T - product).norm() / (product - m @ n.T).norm())
    assert apart["as ours has them"] < 1e-6
    assert (apart["as the script has them"] > 0.1) == (refresh == "none")


def test_an_ill_conditioned_module_makes_a_lazy_update_and_is_counted():
    model, lr, scale = model_of(), 0.01, 0.5
    with torch.no_grad():
        model["k_proj"].weight_out[:, 1] = model["k_proj"].weight_out[:, 0]
    lazy = copy.deepcopy(model)
    optimizer = optimizer_of(model, lr, scale, exact_every=1, refresh="none")
    train(model, optimizer, [0])
    train(lazy, optimizer_of(lazy, lr, scale, exact_every=0, refresh="none"), [0])
    torch.testing.assert_close(model["k_proj"].state_dict(), lazy["k_proj"].state_dict())
    assert not torch.allclose(model["q_proj"].weight_out, lazy["q_proj"].weight_out)
    assert optimizer.diagnostics_()["guarded"] == 1
    assert optimizer.diagnostics_()["guarded"] == 0  # read, so counted anew


def test_diagnostics_are_those_of_the_products():
    model = model_of()
    values = optimizer_of(model).diagnostics_()
    products = [model[name].weight_out @ model[name].weight_in for name in SHAPES]
    largest = max(torch.linalg.matrix_norm(product, ord=2).item() for product in products)
    assert values["sigma_max"].item() == pytest.approx(largest, rel=1e-2)
    ratios = [(model[name].weight_out.norm() / model[name].weight_in.norm()).item() for name in SHAPES]
    assert values["balance_min"].item() == pytest.approx(min(ratios))
    assert values["balance_max"].item() == pytest.approx(max(ratios))


def test_restarts_balance_the_factors_and_reset_moments_without_changing_the_model():
    model, twin = model_of(), model_of()
    optimizer = optimizer_of(model, type="eucl", restarts=3)
    train(model, optimizer, range(3))
    train(twin, optimizer_of(twin, type="eucl"), range(3))
    for name in SHAPES:
        new, old = model[name], twin[name]
        torch.testing.assert_close(new.weight_out @ new.weight_in, old.weight_out @ old.weight_in)
        singular = torch.linalg.svdvals(old.weight_out @ old.weight_in)[: new.weight_in.shape[0]]
        torch.testing.assert_close(new.weight_in @ new.weight_in.T, torch.diag_embed(singular))
    assert all(group["step"] == 0 for group in optimizer.param_groups)
    assert not any(state["exp_avg"].any() for state in optimizer.state.values())


@pytest.mark.parametrize("options", [{"type": "loro", "exact_every": 4}, {"type": "eucl", "restarts": 4}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_in_the_middle_of_a_cycle_is_bit_exact(options, dtype):
    model = model_of(dtype=dtype)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, range(6))
    other = model_of(seed=1, dtype=dtype)
    other.load_state_dict(model.state_dict())
    fresh = optimizer_of(other, **options)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(6, 13))
    train(other, fresh, range(6, 13))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_stack_too_large_is_taken_in_parts(monkeypatch):
    one, parts = model_of(), model_of()
    train(one, optimizer_of(one, exact_every=1), [0])
    monkeypatch.setattr("act24.optim.loro._STACK_ELEMENTS", 1)
    sizes = []
    share = lambda compute, count: (sizes.append(count), compute(slice(0, count)))[1]  # noqa: E731
    train(parts, optimizer_of(parts, exact_every=1, share=share), [0])
    assert sizes == [1, 1, 1]
    for a, b in zip(one.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_factors_without_gradients_stay():
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer_of(model, exact_every=1)
    model["head"].weight.grad = torch.ones_like(model["head"].weight)
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["head.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "lora"}, "did you mean 'loro'"),
        ({"refresh": "al"}, "did you mean 'all'"),
        ({"exact_every": -1}, "exact_every"),
        ({"exact_lr_scale": 0}, "exact_lr_scale"),
        ({"restarts": 5}, "use type 'eucl'"),
        ({"restarts": 5, "type": "eucl", "refresh": "reg"}, "without meaning"),
    ],
)
def test_bad_options_are_refused_with_the_reason(options, message):
    with pytest.raises(Act24Error, match=message):
        optimizer_of(model_of(), **options)
