"""Measurements of a model: perplexity and KL on held-out windows, tasks, speed, few bits, pruning, where parameters are."""

from .int8 import quantized
from .parameter_share import model_shares, parameter_shares
from .perplexity import Estimate, Measurement, compare, kl_divergence, measure, perplexity, perplexity_ratio
from .pruning import pruned
from .rounding import rounded, rounded_bytes
from .speed import flops, ideal_speedup, latency, size_bytes, speed_rows
from .tasks import BUNDLED_TASKS, TaskResult, accuracy_retained, evaluate_tasks, linear_probe, task_rows
