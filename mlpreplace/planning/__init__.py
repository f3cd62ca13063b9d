"""Which block gets which replacement: prices, knapsack and search, and what makes a chosen plan better."""

from .allocate import allocate, choose
from .candidates import candidate_families, narrow_widths
from .damage import SecondOrder, local_damage, measured_damage, second_order_damage
from .distil import Healing, Tuning, heal, losses, tune, with_rest
from .nest import narrowed, nest, set_sparsity
from .refit import refit
from .search import search
