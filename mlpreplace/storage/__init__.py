"""Compressed models on disk: the replacements alone, the whole model, or a plain transformers checkpoint."""

from .export import export
from .save import load, save
from .serving import ServingCost, serving_cost
