"""Tiny random models of every architecture, and inputs for them."""

from __future__ import annotations

import torch
import transformers as t

from mlpreplace.models.inputs import in_batches

t.logging.set_verbosity_error()

HIDDEN, INTERMEDIATE, VOCABULARY, CONTEXT = 32, 48, 101, 64
SIZES = dict(
    hidden_size=HIDDEN,
    intermediate_size=INTERMEDIATE,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=CONTEXT,
)
GROUPED = SIZES | dict(num_key_value_heads=2)
HEADS = GROUPED | dict(head_dim=8)
TOKENS = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
SLIDES = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
T5 = dict(decoder_start_token_id=0, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=VOCABULARY)
IMAGE, PATCHES = 16, 4
IMAGES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=IMAGE, patch_size=8)
VISION = IMAGES | dict(hidden_size=16, intermediate_size=24)  # beside a language model: not the size of its blocks
IMAGE_TOKENS = dict(image_token_index=1)  # in no random window
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=0, forced_eos_token_id=2)
PAIRED = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    max_position_embeddings=CONTEXT,
    vocab_size=VOCABULARY,
    **SPECIAL,
)

MODELS = {
    "llama": (t.LlamaForCausalLM, t.LlamaConfig(**SIZES)),
    "mistral": (t.MistralForCausalLM, t.MistralConfig(**GROUPED)),
    "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**GROUPED)),
    "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**HEADS)),
    "gemma": (t.GemmaForCausalLM, t.GemmaConfig(**HEADS)),
    "gemma2": (t.Gemma2ForCausalLM, t.Gemma2Config(**HEADS)),
    "gemma3_text": (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**HEADS, sliding_window=6, layer_types=SLIDES)),
    "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(n_embd=32, n_inner=48, n_layer=3, n_head=4, n_positions=CONTEXT, **TOKENS)),
    "gpt_neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(**SIZES)),
    "falcon": (
        t.FalconForCausalLM,
        t.FalconConfig(hidden_size=32, ffn_hidden_size=48, num_hidden_layers=3, num_attention_heads=4, **TOKENS),
    ),
    "phi": (t.PhiForCausalLM, t.PhiConfig(**SIZES)),
    "phi3": (t.Phi3ForCausalLM, t.Phi3Config(**GROUPED, pad_token_id=0)),
    "glm": (t.GlmForCausalLM, t.GlmConfig(**HEADS, pad_token_id=0)),
    "glm4": (t.Glm4ForCausalLM, t.Glm4Config(**HEADS, pad_token_id=0)),
    "opt": (
        t.OPTForCausalLM,
        t.OPTConfig(
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            vocab_size=VOCABULARY,
        ),
    ),
    "mixtral": (t.MixtralForCausalLM, t.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)),
    "qwen2_moe": (t.Qwen2MoeForCausalLM, t.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=24)),
    "qwen3_moe": (t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**HEADS, **EXPERTS, mlp_only_layers=[1])),
    "bert": (t.BertForMaskedLM, t.BertConfig(**SIZES)),
    "roberta": (t.RobertaForMaskedLM, t.RobertaConfig(**SIZES | dict(max_position_embeddings=CONTEXT + 2))),
    "distilbert": (
        t.DistilBertForMaskedLM,
        t.DistilBertConfig(dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=CONTEXT, vocab_size=VOCABULARY),
    ),
    "t5": (t.T5ForConditionalGeneration, t.T5Config(**T5)),
    "t5_gated": (t.T5ForConditionalGeneration, t.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "bart": (t.BartForConditionalGeneration, t.BartConfig(**PAIRED)),
    "marian": (t.MarianMTModel, t.MarianConfig(**PAIRED)),
    "vit": (t.ViTForImageClassification, t.ViTConfig(**IMAGES)),
    "deit": (t.DeiTForImageClassification, t.DeiTConfig(**IMAGES)),
    "llava": (
        t.LlavaForConditionalGeneration,
        t.LlavaConfig(text_config=t.LlamaConfig(**SIZES), vision_config=t.CLIPVisionConfig(**VISION), **IMAGE_TOKENS),
    ),
    "gemma3": (
        t.Gemma3ForConditionalGeneration,
        t.Gemma3Config(
            text_config=t.Gemma3TextConfig(**HEADS, sliding_window=6, layer_types=SLIDES),
            vision_config=t.SiglipVisionConfig(**VISION, vision_use_head=False),
            mm_tokens_per_image=PATCHES,
            boi_token_index=3,
            eoi_token_index=4,
            **IMAGE_TOKENS,
        ),
    ),
}
SEQ2SEQ = ["t5", "t5_gated", "bart", "marian"]
VISION_ONLY = ["vit", "deit"]
MULTIMODAL = ["llava", "gemma3"]
ENCODERS = ["bert", "roberta", "distilbert"]
CAUSAL = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "gpt_neox", "falcon", "phi", "opt", "mixtral"]
DECODERS = [*CAUSAL, "phi3", "glm", "glm4", "gemma3_text", "qwen2_moe", "qwen3_moe"]
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe"]
SINGLE = [*MIXTURES, "gemma2"]  # experts, and the softmax of eager attention, are in float32 in any case
READS_TOKENS = [*CAUSAL, "bert"]  # one stack of layers, one sequence of tokens in


def build(name: str, seed: int = 0, **changes):
    """A random model in eval mode. Weights keep activations at unit scale, so that every block matters; no bias is zero."""
    model_class, config = MODELS[name]
    config = type(config)(**config.to_dict() | changes)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in type(module).__name__.lower():
                parameter.data += 0.2 * noise
            elif isinstance(module, torch.nn.Embedding):
                parameter.data = 0.5 * noise
            elif parameter.dim() == 1:
                parameter.data = 0.3 * noise
            else:
                parameter.data = 1.5 * noise / parameter.shape[-1] ** 0.5
    return model


def random_windows(n: int = 8, seq_len: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (n, seq_len), generator=torch.Generator().manual_seed(seed))


def batches_for(name: str, n: int = 6, batch_size: int = 3, seed: int = 0, labels: bool = False) -> list[dict[str, torch.Tensor]]:
    """Batches of inputs that a tiny model reads: windows, images, both, or pairs of sentences."""
    columns = {"input_ids": random_windows(n, 12, seed)}
    if name in (*VISION_ONLY, *MULTIMODAL):
        images = torch.randn(n, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
    if name in VISION_ONLY:
        columns = {"pixel_values": images, "labels": torch.arange(n) % 2}
    elif name in SEQ2SEQ:
        columns = {"input_ids": random_windows(n, 9, seed), "decoder_input_ids": random_windows(n, 7, seed + 1)}
        columns["labels"] = random_windows(n, 7, seed + 2)
    else:
        columns["labels"] = columns["input_ids"]
    if name in MULTIMODAL:
        columns |= {"input_ids": columns["input_ids"].clone(), "pixel_values": images}
        columns["input_ids"][:, 1 : 1 + PATCHES] = MODELS[name][1].image_token_id
    if not labels:
        del columns["labels"]
    return in_batches(columns, batch_size)


def outputs(model, name: str, **options) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches_for(name, **{"seed": 9} | options)])
