"""Models: loading them, where their blocks are, their inputs, and the one place that runs them."""

from .architectures import register_architecture
from .blocks import Block, NotApplicable, evenly, find_blocks
from .checkpoints import pretrained, tokenizer_of
from .generation import cache_error, generate_windows
from .inputs import in_batches, token_batches
from .layers import find_layers
from .loading import Source, load_model, resolve_device
from .parameters import count_parameters
from .stack import Heads, Stack
