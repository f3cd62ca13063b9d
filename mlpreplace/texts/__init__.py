"""Texts: bundled assets, documents of a corpus, and the token windows of each split."""

from .corpora import documents
from .windows import load_windows, text_name
