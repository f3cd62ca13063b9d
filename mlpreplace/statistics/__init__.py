"""Statistics of passes over text: moments and samples of blocks, the residual stream, gradients, similarity of hidden units."""

from .fisher import fisher_effects, fisher_gradients
from .groups import with_effects
from .moments import capture, sample
from .records import BlockStatistics, Sample, combine
from .residual_stream import Span, capture_spans, capture_stream
from .unit_similarity import Units, capture_units, cka_map, match
