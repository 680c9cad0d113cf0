"""A tiny model directory, scripted peers on real sockets, and a running router."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.router.model import Model, load
from services.router.settings import RouterSettings
from tests.router.scripted import ScriptedDecode, ScriptedStore, running_router

TEXT = (Path(__file__).parent.parent.parent / "common" / "errors.py").read_text() + "naïve café 東京 🙂 "
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"


def make_model_dir(path: Path, *, chat: bool = True, context: int = 512, generation: dict[str, Any] | None = None) -> Path:
    """A byte-level BPE tokenizer of 400 tokens with a config beside it; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>"}
    settings["additional_special_tokens"] = special[1:]
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 400, "eos_token_id": 0}
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def model(model_dir: Path) -> Model:
    return load(str(model_dir))


class Stack:
    """A running router with its scripted peers, and an HTTP client on it."""

    def __init__(self, router: Any, decodes: list[ScriptedDecode], stores: list[ScriptedStore], http: httpx.AsyncClient) -> None:
        self.router = router
        self.decodes = decodes
        self.stores = stores
        self.http = http

    @property
    def decode(self) -> ScriptedDecode:
        return self.decodes[0]

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": "tiny", "prompt": "def f(x):", "temperature": 0} | body)

    async def chat(self, **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hello"}]
        return await self.http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages} | body)


StackMaker = Callable[..., Any]


@pytest.fixture
def start_stack(model_dir: Path) -> StackMaker:
    """`async with start_stack(decodes=2, requests_max=4) as stack`."""

    @asynccontextmanager
    async def start(
        decodes: int = 1, stores: int = 0, directory: Path | None = None, keys: tuple[str, ...] = (), **settings: Any
    ) -> AsyncIterator[Stack]:
        async with AsyncExitStack() as stack:
            workers = [await stack.enter_async_context(ScriptedDecode(f"decode-{i}").running()) for i in range(decodes)]
            kept = [await stack.enter_async_context(ScriptedStore(f"kvstore-{i}").running()) for i in range(stores)]
            config = {
                "model": str(directory or model_dir),
                "served_name": "tiny",
                "port": 0,
                "decode": tuple(worker.address for worker in workers),
                "kvstore": tuple(store.address for store in kept),
                "ready_needs_kvstore": stores > 0,  # what a test says of a store is asked of a store that is connected
                "drain_s": 1.0,
            }
            router = await stack.enter_async_context(
                running_router(RouterSettings(**(config | settings)), keys, ready=bool(decodes))
            )
            base = f"http://{router.http_address}"
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=base, timeout=20))
            yield Stack(router, workers, kept, http)

    return start


@pytest.fixture
async def stack(start_stack: StackMaker) -> AsyncIterator[Stack]:
    async with start_stack() as running:
        yield running
