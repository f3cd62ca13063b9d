"""What others do about the same question, at the same sparsity, on the same text: layers dropped, spans of layers made linear
or replaced by one small network, submodules bypassed, adjacent MLPs merged into one. All of it gives plans, as the package's own
allocation does.
"""

from .calibration import Calibration
from .ff_merging import Merged, drop_layers, drop_mlps, layers_worth, merge_mlps, rivals, slide, windows_of
from .layer_drop import drop, shortgpt, uidl
from .registry import METHODS, Method, calibrate
from .replaceme import replaceme
from .streamline import streamline
from .subfit import subfit
