"""Tables to figures. A figure is saved as pdf and png together with the json of the rows it shows and their provenance."""

from .blocks import (
    calibration_curves,
    error_vs_parameters,
    loss_curves,
    objectives,
    output_concentration,
    selections,
    training_gain,
)
from .comparison import redundancy, speed_by_method, tasks_by_method
from .merging import merging, similarity_maps, start_of_window
from .models import (
    ablation,
    additivity,
    calibration_texts,
    damage_prediction,
    kept_by_layer,
    pareto,
    selection_map,
    sensitivity,
)
from .shares import parameter_share
from .speed import quantization, speed
from .style import LOOKS, save_figure, use_style
from .tasks import tasks
