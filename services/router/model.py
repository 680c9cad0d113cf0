"""What the router knows of a model: its tokenizer, chat template, context and generation defaults.

Everything comes from the model directory; no weights are read and torch is never imported
(`hide_torch` keeps `transformers` from finding it, where it is installed).
"""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import msgspec

from common.errors import InvalidRequest, UnsupportedModel


class GenerationDefaults(msgspec.Struct, frozen=True):
    """`generation_config.json`: what holds where the client says nothing. None: the file is silent too."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()


class Model:
    """Text to token ids and back. Thread-safe; encoding long text releases the GIL."""

    def __init__(
        self, directory: Path, tokenizer: Any, defaults: GenerationDefaults, context_tokens: int, vocab_size: int
    ) -> None:
        self.directory = directory
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self.defaults = defaults
        self.context_tokens = context_tokens
        self.vocab_size = vocab_size
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text`, with the model's own first and last tokens when `special`."""
        if self._fast is not None:
            ids: list[int] = self._fast.encode_batch_fast([text], add_special_tokens=special)[0].ids
            return ids
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        if self._fast is not None:
            return str(self._fast.decode(ids, skip_special_tokens=skip_special))
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def token_text(self, token_id: int) -> str:
        """One token alone, as `logprobs` show it."""
        return self.decode((token_id,), skip_special=False)

    def token_bytes(self, token_id: int) -> list[int]:
        """The token's own bytes where the vocabulary is byte-level, else its text's."""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(piece, str):
            if len(piece) == 6 and piece.startswith("<0x"):
                return [int(piece[3:5], 16)]
            raw = [_BYTE_OF.get(char) for char in piece]
            text = self.token_text(token_id)
            if "�" in text and all(byte is not None for byte in raw):
                return [byte for byte in raw if byte is not None]
        return list(self.token_text(token_id).encode())

    def chat(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[int]:
        """Token ids of a conversation under the model's chat template.

        Raises:
            InvalidRequest: no template, or the template refuses the conversation.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template, so it can't serve chat completions; use /v1/completions", param="messages"
            )
        import jinja2

        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise InvalidRequest(f"messages: the model's chat template refuses them: {error}", param="messages") from error
        return self.encode(text, special=False)


def load(directory: str) -> Model:
    """Loads tokenizer and configuration of a model directory.

    Raises:
        UnsupportedModel: missing or unreadable, named.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UnsupportedModel(f"model = {directory!r}: no such directory; give one in Hugging Face format")
    config = read_json(path / "config.json")
    text_config = config.get("text_config") or config
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UnsupportedModel(f"model = {directory!r}: its tokenizer can't be loaded: {error}") from error
    context = text_config.get("max_position_embeddings")
    if not isinstance(context, int) or context < 1:
        raise UnsupportedModel(f"{path / 'config.json'}: max_position_embeddings = {context!r}: expected a positive integer")
    vocab_size = text_config.get("vocab_size")
    return Model(
        path.resolve(), tokenizer, generation_defaults(path, config, tokenizer), context, int(vocab_size or len(tokenizer))
    )


def generation_defaults(path: Path, config: Mapping[str, Any], tokenizer: Any) -> GenerationDefaults:
    """As `transformers.generate` takes them, eos ids included; `do_sample` is not read, as in vLLM."""
    file = path / "generation_config.json"
    given = read_json(file) if file.exists() else {}
    text_config = config.get("text_config") or {}
    for eos in (given.get("eos_token_id"), config.get("eos_token_id"), text_config.get("eos_token_id"), tokenizer.eos_token_id):
        if eos is not None:
            break
    values = {
        "temperature": given.get("temperature"),
        "top_p": given.get("top_p"),
        "top_k": given.get("top_k"),
        "min_p": given.get("min_p"),
        "repetition_penalty": given.get("repetition_penalty"),
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    }
    try:
        return msgspec.convert(values, GenerationDefaults)
    except msgspec.ValidationError as error:
        raise UnsupportedModel(f"{file}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise UnsupportedModel(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise UnsupportedModel(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path}: expected a JSON object")
    return value


def hide_torch() -> None:
    """Lets `transformers` be imported without torch. Called once, first thing in `__main__`.

    `transformers` looks for torch when it is first imported and would load it (6 s and 300 MB) only
    to say that it is there.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    find: Callable[..., ModuleSpec | None] = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "torch" else find(name, package)

    importlib.util.find_spec = find_spec


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE vocabularies write for bytes (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in plain}
    table |= {chr(256 + index): byte for index, byte in enumerate(sorted(set(range(256)) - set(plain)))}
    return table


_BYTE_OF = _byte_level_alphabet()
