"""mlpreplace: compress transformers by replacing their MLP blocks with smaller fitted modules.

Data flows one way: text → capture → fit → splice → evaluate → allocate → figure.
"""

from .allocate import allocate, narrow_widths
from .architectures import Stack, register_architecture
from .baselines import (
    METHODS,
    Calibration,
    Merged,
    Method,
    calibrate,
    drop_layers,
    drop_mlps,
    layers_worth,
    merge_mlps,
    rivals,
    slide,
)
from .batches import split, token_batches
from .blocks import Block, NotApplicable, count_parameters, evenly, find_blocks
from .capture import BlockStatistics, Sample, capture, merge, sample
from .damage import local_damage, measured_damage, second_order_damage
from .data import load_windows, text_name
from .evaluate import Estimate, Measurement, compare, kl_divergence, perplexity, perplexity_ratio
from .export import export
from .fit import fit, fit_all
from .heal import Healing, heal
from .hybrids import AttentionMLP, ConvMLP, MixtureOfExperts, TransformerBlock
from .images import accuracy, load_images, shifted, small_vit
from .layers import Removed, Tuned, find_layers, without_layers
from .models import Source, load_model, resolve_device
from .order import refit, rollback
from .pretrain import pretrain
from .progressive import NestedMLP, narrowed, nest, set_sparsity
from .quantize import quantized
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
from .results import result_rows, score_rows
from .sampling import sample_windows
from .saving import load, save
from .search import search
from .similarity import Units, capture_units, cka_map, match
from .speed import flops, ideal_speedup, latency, size_bytes, speed_rows
from .splice import sparsity, splice, spliced
from .stream import Span, capture_spans, capture_stream
from .tasks import BUNDLED_TASKS, TaskResult, accuracy_retained, evaluate_tasks, task_rows
from .texts import documents
from .train import Training
from .translation import bleu, encoded, load_pairs, number_tokenizer, small_marian, translate
from .tune import Tuning, losses, tune, with_rest

__version__ = "0.1.0"
