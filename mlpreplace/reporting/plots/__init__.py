"""Rows to figures, one file a notebook; a figure is saved as pdf and png together with the json of its rows and their record."""

from .comparison import comparison
from .full_replacement import healing_curves, kept_by_layer, megabytes, pareto, quantization, speed, tasks
from .ingredients import ablation, calibration_texts, ingredients
from .looks import FAMILY_LOOKS, MERGING_LOOKS, METHOD_LOOKS, readable
from .merging import matching, merging, similarity_maps, start_of_window
from .parameter_share import parameter_share
from .sensitivity import additivity, damage_prediction, sensitivity, sensitivity_of_models
from .single_block import (
    calibration_curves,
    error_vs_parameters,
    loss_curves,
    objectives,
    output_concentration,
    selections,
    training_gain,
)
from .style import save_figure, use_style
from .subfit import redundancy, selection_map, speed_by_method, tasks_by_method
