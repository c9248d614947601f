"""Graph passes: a traced model in, a rewritten model out."""

if __name__ != "act24.passes":
    raise ImportError("import act24.passes: the folder `passes` is a part of the package act24")

from act24.errors import PassError
from act24.passes.activation24 import Activation24
from act24.passes.activation_statistics import ActivationStatistics
from act24.passes.base import Match, OperationalPass, Pass, Plan, StateMap
from act24.passes.cola import Cola
from act24.passes.fp8 import Fp8
from act24.passes.graph.region import Region
from act24.passes.graph.tracing import trace
from act24.passes.lora import Lora, MaskedLora
from act24.passes.lost import Lost
from act24.passes.low_rank import LowRank
from act24.passes.pipeline import FrozenWarning, PartialWarning, Pipeline, apply_, plan
from act24.passes.recompute import Recompute
from act24.passes.relu2_ffn import Relu2FFN
from act24.passes.sparse_mask import SparseMask
from act24.passes.weight24 import Weight24
from act24.records import Table

#: The passes that a recipe can name. Listed by hand: what a recipe means must not depend on which files
#: happen to lie in a folder. A package from outside adds its own with `REGISTRY.add`.
REGISTRY: Table[type[Pass]] = Table(
    "pass",
    Relu2FFN,
    LowRank,
    Cola,
    Lost,
    SparseMask,
    Lora,
    MaskedLora,
    Activation24,
    Weight24,
    Fp8,
    Recompute,
    ActivationStatistics,
)

__all__ = [
    "REGISTRY",
    "Activation24",
    "ActivationStatistics",
    "Cola",
    "Fp8",
    "FrozenWarning",
    "Lora",
    "Lost",
    "LowRank",
    "MaskedLora",
    "Match",
    "OperationalPass",
    "PartialWarning",
    "Pass",
    "PassError",
    "Pipeline",
    "Plan",
    "Recompute",
    "Region",
    "Relu2FFN",
    "SparseMask",
    "StateMap",
    "Weight24",
    "apply_",
    "plan",
    "trace",
]
