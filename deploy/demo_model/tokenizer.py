"""The demo model's tokenizer: byte-level BPE with five roles of special tokens, written as a Hugging Face directory.

A document is `<|bos|> text <|eos|>`. A conversation is `<|bos|>` and then, for each message, `<|role|> content <|end|>`, with
nothing between; content is neither stripped nor changed, since Python's indentation is content.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from deploy.demo_model.phrasing import Conversation

VOCABULARY = 4096
CONTEXT_TOKENS = 8192
BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, END = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIALS = (BOS, EOS, PAD, SYSTEM, USER, ASSISTANT, END)  # ids 0..6, in this order
SPARES = tuple(f"<|spare_{index}|>" for index in range(9))  # so that a role can be added without a new vocabulary

# The splitting rule of cl100k (tiktoken, MIT licence) with digits one at a time: words take one leading mark, runs of spaces stay whole.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content is not none -%}
{%- for part in content -%}
{%- if part.type == 'text' -%}{{- part.text -}}
{%- else -%}{{- raise_exception('content parts must be of type text, not ' ~ part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role in ['system', 'developer'] -%}{{- '<|system|>' -}}
{%- elif message.role == 'user' -%}{{- '<|user|>' -}}
{%- elif message.role == 'assistant' -%}{{- '<|assistant|>' -}}
{%- else -%}{{- raise_exception('role must be system, user or assistant, not ' ~ message.role) -}}
{%- endif -%}
{{- text_of(message.content) ~ '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*SPECIALS, *SPARES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)])
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """`<|bos|> text <|eos|>` of each."""
    eos = SPECIALS.index(EOS)
    return [[*encoded.ids, eos] for encoded in tokenizer.encode_batch(texts)]


def encode_conversations(tokenizer: Tokenizer, chats: list[Conversation]) -> list[list[int]]:
    """What the chat template renders, without `<|eos|>`: `<|end|>` is where a turn stops."""
    return [encoded.ids for encoded in tokenizer.encode_batch([rendered(chat) for chat in chats], add_special_tokens=False)]


def rendered(chat: Conversation) -> str:
    """The chat template in Python; a test holds the two together."""
    return BOS + "".join(f"<|{message.role}|>{message.content}{END}" for message in chat)


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja, as `transformers` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
