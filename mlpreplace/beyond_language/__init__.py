"""Vision and translation: data, small models and their training, and the accuracy and BLEU of plans."""

from .images import accuracy, load_images, shifted, small_vit
from .pretrain import pretrain
from .translation import bleu, encoded, load_pairs, number_tokenizer, small_marian, translate
