"""What each branch of run_c4.py does to a model's first updates, enacted again, beside the translated recipe.

The table says it branch by branch: rule, betas, what decays, learning rate. It was written from a reading of
the script, its LOROAdamW and its schedulers; nothing here calls act24 but to build the model, to take
gradients of it, and to run the recipe that is compared.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from slow import slow_after, slow_but
from torch import Tensor, nn

from act24.recipes.from_flags import recipe_from_flags
from act24.recipes.load import parse_recipe
from act24.recipes.schema import Recipe
from act24.tools.run.build import build
from act24.tools.run.optimizers import build_optimizer, learning_rate
from act24.tools.run.processes import Processes

STEPS, WARMUP, PEAK, DECAY, RANK, WIDTH = 40, 4, 0.01, 0.3, 8, 32
UPDATES = 7

COMMAND = (
    f"--model_config llama_9m --batch_size 4 --dtype float32 --lr {PEAK} --weight_decay {DECAY} "
    f"--num_training_steps {STEPS} --warmup_steps {WARMUP} --min_lr_ratio 0.1 "
    f"--loro_attn_rank {RANK} --loro_mlp_rank {RANK} --activation_dense_warmup_steps 100 "
)
TOY = [
    "model.vocab_size=97",
    f"model.hidden_size={WIDTH}",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
]

# ---------------------------------------------------------------------------------------- learning rates


def half_cosine(progress: float) -> float:
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def cosine(step: int) -> float:
    if step < WARMUP:
        return step / WARMUP
    return half_cosine((step - WARMUP) / (STEPS - WARMUP))


def linear(step: int) -> float:
    """transformers' get_linear_schedule_with_warmup."""
    return step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP)


def cosine_restart(step: int) -> float:
    """Period 3, climb 2, no adjustment: restarts at 3 in the warm-up, and at 6."""
    climb = lambda top: 1e-6 + (step % 3) / 2 * (top - 1e-6)  # noqa: E731
    if step < WARMUP:
        rising = lambda s: 0.1 + s / WARMUP * 0.9  # noqa: E731
        return climb(rising(3)) if step >= 3 and step % 3 < 2 else rising(step)
    if step % 3 < 2:
        return climb(half_cosine((step // 3 * 3 - WARMUP) / (STEPS - WARMUP)))
    return half_cosine((step - WARMUP) / (STEPS - WARMUP))


#: Options, and the multiplier of update k. Where the first would be 0 the script steps its scheduler first.
SCHEDULES: dict[str, Callable[[int], float]] = {
    "--scheduler const": lambda k: 1.0,
    "--scheduler linear": lambda k: linear(k + 1),
    "--scheduler cosine": lambda k: cosine(k + 1),
    "--scheduler cosine_restart --cosine_restart_freq 3 --cosine_restart_warmup 2": cosine_restart,
}

# ------------------------------------------------------------------------------------------------- rules


def everything(name: str, parameter: Tensor) -> bool:
    return True


def nothing(name: str, parameter: Tensor) -> bool:
    return False


def two_dimensional(name: str, parameter: Tensor) -> bool:
    """Embeddings too, norms not."""
    return parameter.ndim >= 2


@dataclass(frozen=True)
class Branch:
    """A branch of the old code.

    Attributes:
        flags: that lead there.
        rule: `torch`, torch.optim's AdamW; `loro`, LOROAdamW, whose eps stands beside the uncorrected root,
            whose decay comes after the update, and which steps on factors as `scale` and `exact` say.
        betas, eps: Adam's.
        decays: whether weight decay reaches a parameter.
        scale: of the factors' learning rate.
        exact: updates from one exact one to the next; 0: none.
        refresh: updates from one zeroing of all moments to the next; 0: none.
        told: what the branch did besides, which the recipe does not do and the translation says.
    """

    flags: str
    rule: str
    betas: tuple[float, float]
    decays: Callable[[str, Tensor], bool]
    eps: float = 1e-8
    scale: float = 1.0
    exact: int = 0
    refresh: int = 0
    told: str = ""


LORO = "--optimizer loro_adamw --loro_scope all"
WIDE, NARROW = (0.9, 0.999), (0.9, 0.95)
BRANCHES = [
    Branch("--optimizer adamw", "torch", WIDE, everything),
    Branch("--weight_decay 0", "torch", WIDE, nothing),  # torch's Adam, whose decay is another: said
    Branch("--optimizer adamw --squ_relu relu2 --activation_2by4 True", "torch", WIDE, everything),
    Branch("--optimizer adamw --enable_2to4_sparse True", "torch", NARROW, two_dimensional),
    Branch("--optimizer cola_adamw --loro_scope all", "torch", NARROW, everything),
    Branch("--optimizer cola_adamw --loro_scope mlp --loro_lr_scaler -1", "torch", NARROW, everything),
    Branch("--optimizer cola_adamw", "torch", NARROW, everything),
    Branch("--optimizer lost_adamw --loro_scope all --loro_type loro", "torch", NARROW, everything),
    Branch("--optimizer lost_adamw --loro_scope all --cola_silu False", "torch", NARROW, everything),
    Branch("--optimizer lost_adamw", "torch", NARROW, everything),
    Branch("--optimizer loro_adamw", "torch", WIDE, two_dimensional, 1e-6, told="added eps to the root"),
    Branch(
        "--optimizer loro_adamw --loro_lr_scaler 0.1 --loro_freq 2",
        *("torch", WIDE, two_dimensional, 1e-6),
        told="added eps to the root",
    ),
    Branch(f"{LORO} --loro_type eucl --loro_lr_scaler -1", "loro", WIDE, two_dimensional, 1e-6),
    Branch(
        f"{LORO} --loro_type eucl --loro_refresh all --loro_refresh_freq 3",
        *("loro", WIDE, two_dimensional, 1e-6),
        refresh=3,
    ),
    Branch(
        f"{LORO} --loro_freq 500 --loro_lr_scaler -1",
        *("loro", WIDE, two_dimensional, 1e-6),
        scale=RANK / WIDTH,
        exact=500,
    ),
    Branch(
        f"{LORO} --loro_freq 500 --loro_lr_scaler 0.3",
        *("loro", WIDE, two_dimensional, 1e-6),
        scale=0.3,
        exact=500,
    ),
    Branch(
        f"{LORO} --loro_freq 3 --loro_lr_scaler -1 --loro_refresh all --loro_refresh_freq 3",
        *("loro", WIDE, two_dimensional, 1e-6),
        scale=RANK / WIDTH,
        exact=3,
        refresh=3,
    ),
    Branch(
        "--optimizer loro_adamw --loro_scope attn --loro_freq 2 --loro_refresh all --loro_refresh_freq 2",
        *("loro", WIDE, two_dimensional, 1e-6),
        exact=2,
        refresh=2,
    ),
]


class OldRun:
    """The optimizer and the schedule of a branch, on named parameters."""

    def __init__(self, branch: Branch, schedule: Callable[[int], float]) -> None:
        self.branch, self.schedule, self.updates = branch, schedule, 0
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps = 0

    @torch.no_grad()
    def update_(self, model: nn.Module) -> None:
        """One update from the gradients that the parameters hold."""
        branch, parameters = self.branch, dict(model.named_parameters())
        rate = PEAK * self.schedule(self.updates)
        self.updates, self.steps = self.updates + 1, self.steps + 1
        exact = branch.exact and self.updates % branch.exact == 0
        (b1, b2), t = branch.betas, self.steps
        pairs: dict[str, dict[str, Tensor]] = {}
        for name, p in parameters.items():
            m, v = self.moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
            self.moments[name] = m, v
            decay = DECAY if branch.decays(name, p) else 0.0
            if branch.rule == "torch":
                p.mul_(1 - rate * decay)
                p.sub_(rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + branch.eps))
                continue
            direction, eta = m / (v.sqrt() + branch.eps), rate * math.sqrt(1 - b2**t) / (1 - b1**t)
            factor = name.endswith(("weight_in", "weight_out"))
            if factor and exact:
                pairs.setdefault(name.rpartition("_")[0], {})[name.rpartition("_")[2]] = direction
                continue
            p.sub_(eta * (branch.scale if factor else 1.0) * direction)
            p.sub_((eta if factor else rate) * decay * p)
        for name, u in pairs.items():
            eta = rate * math.sqrt(1 - b2**t) / (1 - b1**t)
            exact_update_(parameters[f"{name}_in"], parameters[f"{name}_out"], u["in"], u["out"], eta)
        if branch.refresh and self.updates % branch.refresh == 0:
            self.moments, self.steps = {}, 0


def exact_update_(weight_in: Tensor, weight_out: Tensor, u_in: Tensor, u_out: Tensor, eta: float) -> None:
    """LORO's exact update in its script's own order, N = weight_inᵀ and M = weight_out."""
    n, m, rank = weight_in.T.double(), weight_out.double(), weight_in.shape[0]
    u, r_m = torch.linalg.qr(m)
    v, r_n = torch.linalg.qr(n)
    g_v = torch.linalg.solve(r_n.T, u_out.double().T).T
    u_g = torch.linalg.solve(r_m.T, u_in.double())
    k0 = u_g @ v
    q1, k1 = torch.linalg.qr((u_g - k0 @ v.T).T)
    q2, k2 = torch.linalg.qr(g_v - u @ (u.T @ g_v))
    corner = torch.zeros(rank, rank).double()
    middle = torch.cat(
        (torch.cat((r_m @ r_n.T - eta * k0, -eta * k1.T), 1), torch.cat((-eta * k2, corner), 1))
    )
    left, values, right = torch.linalg.svd(middle)
    root = values[:rank].sqrt()
    weight_out.copy_(torch.cat((u, q2), 1) @ left[:, :rank] * root)
    weight_in.copy_((torch.cat((v, q1), 1) @ right.T[:, :rank] * root).T)


# ----------------------------------------------------------------------------------------- the comparison


def translated(*flags: str) -> Recipe:
    return parse_recipe(recipe_from_flags([*COMMAND.split(), *" ".join(flags).split()]).text, "toy", TOY)


def gradients_(model: nn.Module, step: int) -> None:
    ids = torch.randint(97, (8, 12), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def functions(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, with each pair of factors as its product, which is all that they compute."""
    named = {name: p.detach().clone() for name, p in model.named_parameters()}
    products = {
        name.removesuffix("_in"): named[name.removesuffix("_in") + "_out"] @ value
        for name, value in named.items()
        if name.endswith("weight_in") and f"{name.removesuffix('_in')}_columns" not in named
    }
    return {
        n: v for n, v in named.items() if n.removesuffix("_in").removesuffix("_out") not in products
    } | products


def furthest_apart(branch: Branch, schedule: str, recipe: Recipe) -> tuple[float, str]:
    """The largest difference between an update of the recipe's run and the same update of the old code, as a
    share of the update, over the first updates and all parameters; and where."""
    built = build(recipe, torch.device("cpu"))
    model, old_model = built.model, copy.deepcopy(built.model)
    alone = Processes(0, 1, torch.device("cpu"))
    optimizer = build_optimizer(model, recipe.optimizer, pipeline=built.pipeline, processes=alone)
    old, worst = OldRun(branch, SCHEDULES[schedule]), (0.0, "")
    for step in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        built.pipeline.begin_update_(step)
        gradients_(model, step)
        # Each update begins where the recipe's run stands, or Adam would part the two by their rounding.
        for mine, theirs in zip(model.parameters(), old_model.parameters(), strict=True):
            theirs.data.copy_(mine.data)
            theirs.grad = mine.grad.clone()
        before = functions(model)
        optimizer.step()
        old.update_(old_model)
        now, then = functions(model), functions(old_model)
        assert now.keys() == then.keys()
        for name, value in then.items():
            rounding = 1e-6 * value.norm()
            share = ((now[name] - value).norm() - rounding) / ((value - before[name]).norm() + rounding)
            worst = max(worst, (float(share), f"{name} at update {step}"))
    return worst


CASES = [(branch, "--scheduler cosine") for branch in BRANCHES] + [
    (branch, schedule)
    for branch in BRANCHES
    for schedule in SCHEDULES
    if schedule != "--scheduler cosine" and branch.flags in ("--optimizer adamw", BRANCHES[-2].flags)
]


#: Of each optimizer some, and one that anneals otherwise.
QUICK = [(branch, "--scheduler cosine") for branch in BRANCHES[::3]] + CASES[-1:]


@pytest.mark.parametrize(("branch", "schedule"), slow_but(QUICK, CASES), ids=lambda x: getattr(x, "flags", x))
def test_the_first_updates_are_those_of_the_old_code(branch: Branch, schedule: str) -> None:
    """To what decaying before the update instead of after it makes, lr · decay of the update."""
    assert branch.told in " ".join(recipe_from_flags([*COMMAND.split(), *branch.flags.split()]).changes)
    apart, where = furthest_apart(branch, schedule, translated(branch.flags, schedule))
    assert apart < 2 * PEAK * DECAY, where


@pytest.mark.parametrize(
    ("flags", "wrong"),
    slow_after(
        4,
        [
            (f"{LORO} --loro_type eucl --loro_lr_scaler -1", "optimizer.lr_scaler=-1.0"),
            ("--optimizer lost_adamw --loro_scope all --loro_type loro", "optimizer.decay=matrices"),
            ("--optimizer lost_adamw", "optimizer.decay=matrices_and_embeddings"),
            ("--optimizer loro_adamw", "optimizer.decay=matrices"),
            ("--optimizer loro_adamw", "optimizer.decay=all"),
            ("--optimizer adamw --enable_2to4_sparse True", "optimizer.betas=[0.9, 0.999]"),
            ("--optimizer adamw", "schedule.skip_zero=false"),
            (f"{LORO} --loro_freq 500 --loro_lr_scaler -1", "optimizer.exact_every=3"),
        ],
    ),
)
def test_the_comparison_tells_what_was_wrong(flags: str, wrong: str) -> None:
    """Faults that the translation once had, put back into its recipe."""
    (branch,) = [branch for branch in BRANCHES if branch.flags == flags]
    words = [*COMMAND.split(), *flags.split(), "--scheduler", "cosine"]
    recipe = parse_recipe(recipe_from_flags(words).text, "wrong", [*TOY, wrong])
    apart, _ = furthest_apart(branch, "--scheduler cosine", recipe)
    assert apart > 4 * PEAK * DECAY
