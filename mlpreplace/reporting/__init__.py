"""What a person reads: measured plans as tidy rows, figures with their rows, and the record of the run that made them."""

from .correlations import rank_correlations
from .notebook import Text, conclusions, show, start
from .record import Run, seed_everything
from .tables import loss_rows, matched_rows, report_rows, result_rows, score_rows
