"""Files, hashes, cached results, memory and parallel jobs: what every room needs and what knows no model."""

from .cache import Entry, cached
from .files import ROOT, cache_dir
from .fingerprint import fingerprint
