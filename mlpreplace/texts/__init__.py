"""Texts: bundled assets, documents of a corpus, and the token windows of each split."""

from .corpora import documents
from .glue import GLUE, Labelled, glue
from .windows import bos_of, load_windows, opening_of, text_name
