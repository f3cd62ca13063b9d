"""What can replace a block: families of modules, reports of their fits, and the plan that puts them into a model."""

from .factored import FactoredAttention, FactoredMLP
from .families import Family, Linear, LowRank, Mean, NarrowMLP, NarrowPlusLinear, Replacement, TwoLayerMLP, ladder
from .hybrids import AttentionMLP, ConvMLP, MixtureOfExperts, TransformerBlock
from .narrow_attention import NarrowAttention
from .nested import NestedMLP
from .plus_mean import NarrowAttentionPlusMean, NarrowPlusMean
from .records import Errors, FitReport, TrainingReport
from .splice import Plan, sparsity_of, splice, spliced
from .whole_layers import Merged, Removed, Tuned, without_layers
