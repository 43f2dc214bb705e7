"""How far operators are from the true value, why, and whether that is within what their precision allows.

`golden_attention` is the true value. `emulated_attention` computes attention as an algorithm does, with its roundings at
named sites (`SitePolicy`) in any format (`FloatFormat`), and its gradients likewise. `deviation` compares,
`attribute_sites` says which rounding is to blame, `DeviationSweep` measures over formats, lengths and tiles. `conformance`
judges real operators.

`Shadow` follows a live model with a second computation. `RoundingBiasProbe` looks at one call of a real training,
`StabilityMonitor` at a whole one, `localise` says which layer and head an error comes from, and `Reproduction` shows on small
models what it does. `WeightDivergence` compares the weights of training runs, `contextualize` says whether that is much, and
`weight_study` makes such runs.
"""

from attnkit.lab.numerics.bands import Ratio, ReferenceBands, Verdict, contextualize, significance
from attnkit.lab.numerics.divergence import Divergence, WeightDivergence
from attnkit.lab.numerics.emulate import EmulationStats, emulated_attention
from attnkit.lab.numerics.formats import (
    BF16,
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    FP32,
    FP64,
    TF32,
    FloatFormat,
    custom,
    parse_format,
    round_to,
    ulp,
)
from attnkit.lab.numerics.golden import golden_attention
from attnkit.lab.numerics.inputs import DISTRIBUTIONS, Distribution, tied_maxima
from attnkit.lab.numerics.localiser import localise
from attnkit.lab.numerics.measured import Measured, ProbeReport
from attnkit.lab.numerics.metrics import Deviation, attribute_sites, deviation
from attnkit.lab.numerics.monitor import StabilityMonitor
from attnkit.lab.numerics.policy import BACKWARD_SITES, FORWARD_SITES, Rounding, SitePolicy
from attnkit.lab.numerics.probe import Probed, RoundingBiasProbe
from attnkit.lab.numerics.reproduce import Reproduction
from attnkit.lab.numerics.shadow import Shadow
from attnkit.lab.numerics.shift import dynamic_max_shift
from attnkit.lab.numerics.sweep import DeviationSweep
from attnkit.lab.numerics.weights import TensorDeviation, WeightDeviation, wasserstein1d, weight_deviation

__all__ = [
    "FORMATS",
    "BF16",
    "E4M3",
    "E5M2",
    "FP16",
    "FP32",
    "FP64",
    "TF32",
    "FloatFormat",
    "custom",
    "parse_format",
    "round_to",
    "ulp",
    "golden_attention",
    "emulated_attention",
    "EmulationStats",
    "SitePolicy",
    "Rounding",
    "FORWARD_SITES",
    "BACKWARD_SITES",
    "dynamic_max_shift",
    "deviation",
    "Deviation",
    "attribute_sites",
    "DeviationSweep",
    "DISTRIBUTIONS",
    "Distribution",
    "tied_maxima",
    "RoundingBiasProbe",
    "ProbeReport",
    "Measured",
    "Probed",
    "StabilityMonitor",
    "localise",
    "Shadow",
    "Reproduction",
    "wasserstein1d",
    "weight_deviation",
    "WeightDeviation",
    "TensorDeviation",
    "WeightDivergence",
    "Divergence",
    "ReferenceBands",
    "contextualize",
    "significance",
    "Ratio",
    "Verdict",
]
