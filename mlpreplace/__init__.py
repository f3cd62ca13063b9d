"""mlpreplace: compress transformers by replacing their MLP blocks with smaller fitted modules.

Data flows one way: text → capture → fit → splice → evaluate → allocate → figure.
"""

from .allocate import allocate, narrow_widths
from .blocks import Block, Stack, count_parameters, find_blocks, register_architecture
from .capture import BlockStatistics, Sample, capture, merge, sample
from .data import documents, load_windows
from .evaluate import Estimate, Measurement, compare, kl_divergence, perplexity, perplexity_ratio
from .fit import fit, fit_all
from .heal import Healing, heal
from .hybrids import AttentionMLP, ConvMLP, MixtureOfExperts, TransformerBlock
from .models import Source, load_model, resolve_device
from .replacements import (
    Family,
    Linear,
    LowRank,
    Mean,
    NarrowMLP,
    NarrowPlusLinear,
    Replacement,
    TwoLayerMLP,
    ladder,
)
from .reports import Errors, FitReport, TrainingReport, loss_rows, report_rows
from .results import result_rows
from .splice import load, save, sparsity, splice, spliced
from .train import Training

__version__ = "0.1.0"
