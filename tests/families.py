"""Tiny random checkpoints of every model family that is served, written as real Hugging Face directories.

`save_tiny(family, directory, seed)` writes config, safetensors, generation config, a byte-level BPE tokenizer
with a chat template: everything `--model` needs. Weights are wide enough that greedy output varies and that
every mechanism (windows of 24 tokens, soft caps, sinks, partial rotary, experts, biases) changes the result.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS, USER, ASSISTANT = range(5)
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 304
WINDOW_TOKENS = 24
CONTEXT_TOKENS = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = (
    "def read(path): return open(path).read()",
    "the quick brown fox jumps over the lazy dog",
    "for item in items: print(item) # and the rest of them",
    "a penstock carries water from the reservoir to the turbine",
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "initializer_range": 0.25,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_FOUR_LAYERS: dict[str, Any] = {"num_hidden_layers": 4}
_ALTERNATING = _FOUR_LAYERS | {"sliding_window": WINDOW_TOKENS, "layer_types": ["sliding_attention", "full_attention"] * 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 8.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": CONTEXT_TOKENS // 8,
}

# What each family adds to (or changes in) `_COMMON`, by configuration class.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_rope_scaled": ("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2_window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW_TOKENS, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW_TOKENS, "head_dim": 16}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", _FOUR_LAYERS | {"tie_word_embeddings": False, "head_dim": 16, "sliding_window": WINDOW_TOKENS,
               "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3TextConfig", _ALTERNATING | {"tie_word_embeddings": False, "head_dim": 16, "query_pre_attn_scalar": 20}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "sliding_window": WINDOW_TOKENS}),
    "qwen2_moe": ("Qwen2MoeConfig", _EXPERTS | {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS | {"head_dim": 16}),
    "phi": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW_TOKENS, "partial_rotary_factor": 0.5, "hidden_size": 64}),
    "olmo": ("OlmoConfig", {"clip_qkv": 1.0}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", _ALTERNATING),
    "olmoe": ("OlmoeConfig", _EXPERTS),
    "gpt_oss": ("GptOssConfig", _ALTERNATING | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
                "rope_parameters": _YARN_ROPE}),
    "glm": ("GlmConfig", {"head_dim": 16}),
    "glm4": ("Glm4Config", {"head_dim": 16, "attention_bias": True}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.5, "residual_multiplier": 0.8, "embedding_multiplier": 3.0,
                                  "logits_scaling": 2.0}),
    "cohere": ("CohereConfig", {"use_qk_norm": True, "logit_scale": 0.5}),
    "cohere2": ("Cohere2Config", _ALTERNATING),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW_TOKENS}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 16}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": None}),
    "seed_oss": ("SeedOssConfig", {"head_dim": 16}),
}  # fmt: skip

FAMILIES = tuple(_CONFIGS)
# The twelve that every path of the system is proven with.
CORE_FAMILIES = (
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "mixtral", "qwen3_moe", "phi3", "olmo2", "gpt_oss", "glm4",
)  # fmt: skip


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Configuration of a tiny model of `family`, one of `FAMILIES`; `changes` override single keys."""
    kind, own = _CONFIGS[family]
    values = {key: value for key, value in (_COMMON | own | changes).items() if value is not None}
    make: Callable[..., PreTrainedConfig] = getattr(transformers, kind)
    return make(**values)


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random float32 model; one-dimensional parameters (norms, biases, sinks) are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over 256 bytes with a few merges: any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[PAD],
        bos_token=SPECIAL_TOKENS[BOS],
        eos_token=SPECIAL_TOKENS[EOS],
        additional_special_tokens=list(SPECIAL_TOKENS[USER:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def save_tiny(family: str, directory: Path | str, seed: int = 0, **changes: Any) -> Path:
    """Writes a whole model directory and returns it. `dtype="bfloat16"` in `changes` stores bfloat16 weights."""
    dtype = getattr(torch, changes.pop("dtype", "float32"))
    directory = Path(directory)
    model = tiny_model(tiny_config(family, **changes), seed).to(dtype)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def load_oracle(directory: Path | str) -> PreTrainedModel:
    """The same checkpoint in plain `transformers`, with eager attention: the only one that honours soft caps and sinks."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    return model.eval()


def oracle_generate(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy `generate`: output tokens (a final EOS included) and raw log-probabilities `[tokens, vocab]`."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).float().log_softmax(dim=-1)
