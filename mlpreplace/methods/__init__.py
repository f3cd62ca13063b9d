"""Published methods by name, and ours: each makes a plan from the same calibration."""

from .calibration import Calibration
from .flap import flap
from .layer_drop import drop
from .merging import merge_mlps
from .modegpt import modegpt
from .recipe import recipe
from .registry import METHODS, Method, Needs, calibrate, method, methods_table
from .replaceme import replaceme
from .shortgpt import shortgpt
from .sliding import drop_layers, drop_mlps, layers_worth, neighbours, rivals, slide
from .streamline import streamline
from .subfit import subfit
from .svd_llm import svd_llm
from .uidl import uidl
from .uniform import uniform
