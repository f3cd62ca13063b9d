"""mlpreplace: compress transformers by replacing their MLP blocks with smaller fitted modules.

Data flows one way through the rooms: texts → models → replacements → statistics → fitting → evaluation → planning → methods →
storage. This file holds the names of a reader's first lines; all others are in their room, ``from mlpreplace import evaluation``.
"""

__version__ = "0.1.0"

from . import beyond_language, reporting, runtime
from .evaluation import compare, perplexity
from .fitting import Training, fit
from .methods import METHODS
from .models import Stack, find_blocks, load_model, register_architecture
from .planning import allocate, heal, refit
from .replacements import (
    AttentionMLP,
    ConvMLP,
    Linear,
    LowRank,
    Mean,
    MixtureOfExperts,
    NarrowMLP,
    NarrowPlusLinear,
    TransformerBlock,
    TwoLayerMLP,
    splice,
    spliced,
)
from .statistics import capture
from .storage import export, load, save
from .texts import load_windows
