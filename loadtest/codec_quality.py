"""What a codec's loss does to a model's output: held-out perplexity and greedy agreement, against `raw`.

The text is what the demo model was never trained on: the held-out files of this Python's own standard library.

1. Perplexity: a window's first tokens are the context; their KV goes through the codec, block by block, as storing and loading
   would take it, and the tokens after it are scored. All sides compute in float32 from the same bfloat16 weights and KV, so
   that they differ by the codec alone.
2. Greedy agreement: the serving engine is given the context's KV through the codec and generates freely; tokens are compared with those
   after the exact KV, position by position. `raw` itself runs twice: its second run says how much is the engine's own noise.
"""

import math
import statistics
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from common.codec import CodecName, StoredLayout
from common.generation import Sampling
from common.kv_layout import KvLayout
from deploy.demo_model import dataset
from deploy.demo_model.tokenizer import encode_documents
from services.worker.codec import DTYPES, Codec
from services.worker.engine.engine import Engine
from services.worker.engine.types import LoadedKv, NewSequence
from services.worker.model import LoadedModel, load_model

QUESTION_TOKENS = 32  # computed after the loaded context, as a new turn's tokens are


def held_out_windows(model: Path, window_tokens: int, windows_max: int) -> list[list[int]]:
    """Disjoint windows of held-out files, one file's after another's."""
    sources = dataset.read_library(Path(sysconfig.get_path("stdlib")))
    texts = [source.text for source in sources if source.is_held_out]
    documents = encode_documents(Tokenizer.from_file(str(model / "tokenizer.json")), texts)
    found = [
        document[start : start + window_tokens]
        for document in documents
        for start in range(0, len(document) - window_tokens + 1, window_tokens)
    ]
    step = max(1, len(found) // windows_max)
    return found[::step][:windows_max]


class Perplexity:
    """Losses of what follows a context whose KV went through a codec."""

    def __init__(self, model: Path, layout: KvLayout) -> None:
        self._layout = layout
        load: Any = AutoModelForCausalLM.from_pretrained
        self._model = load(model, dtype=torch.float32, local_files_only=True).eval()

    def of(
        self, windows: Sequence[Sequence[int]], context_tokens: int, codecs: Sequence[CodecName]
    ) -> dict[str, dict[str, float]]:
        """For each codec: perplexity, its ratio to raw's, and how often the likeliest token is raw's."""
        losses: dict[str, list[Tensor]] = {codec: [] for codec in codecs}
        same: dict[str, list[Tensor]] = {codec: [] for codec in codecs}
        for window in windows:
            tokens = torch.tensor([window])
            kept = self._context(tokens[:, :context_tokens])
            exact: Tensor | None = None
            for codec in codecs:
                logits = self._after(kept, codec, tokens[:, context_tokens:])
                exact = logits if exact is None else exact
                losses[codec].append(
                    torch.nn.functional.cross_entropy(logits[:-1], tokens[0, context_tokens + 1 :], reduction="none")
                )
                same[codec].append(logits.argmax(-1) == exact.argmax(-1))
        loss = {codec: float(torch.cat(parts).mean()) for codec, parts in losses.items()}
        return {
            codec: {
                "perplexity": math.exp(loss[codec]),
                "perplexity_over_raw": math.exp(loss[codec] - loss[codecs[0]]),
                "same_likeliest_token": float(torch.cat(same[codec]).float().mean()),
            }
            for codec in codecs
        }

    def _context(self, tokens: Tensor) -> Tensor:
        """KV of the context as blocks, `[block, layer, k|v, token, head, dim]` in the KV dtype."""
        cache: Any = DynamicCache()
        self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        planes = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]  # [k|v, head, token, dim]
        layers = torch.stack(planes).transpose(2, 3)  # [layer, k|v, token, head, dim]
        blocks: Tensor = layers.unflatten(2, (-1, self._layout.block_tokens)).movedim(2, 0)
        return blocks.to(DTYPES[self._layout.dtype]).contiguous()

    def _after(self, blocks: Tensor, codec: CodecName, tokens: Tensor) -> Tensor:
        """Logits `[token, vocabulary]` of what follows the context."""
        worker = Codec(StoredLayout(self._layout, codec))
        back = worker.decode_tensor(torch.stack([worker.encode_tensor(block) for block in blocks]))
        layers = back.movedim(0, 2).flatten(2, 3).float().transpose(2, 3)  # [layer, k|v, head, token, dim]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(layers):
            cache.update(keys[None], values[None], number)
        logits: Tensor = self._model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
        return logits[0]


def greedy_agreement(
    model: LoadedModel, windows: Sequence[Sequence[int]], context_tokens: int, new_tokens: int, codecs: Sequence[CodecName]
) -> dict[str, dict[str, float]]:
    """For each codec: the share of positions that agree, and tokens before the first that doesn't (mean, median)."""
    engine = Engine(model, sequences_max=len(windows))
    prompts = [list(window[: context_tokens + QUESTION_TOKENS]) for window in windows]
    records = [_records(engine, prompt, context_tokens) for prompt in prompts]
    expected = _generate(engine, prompts, records, Codec(model.stored), context_tokens, new_tokens)
    found: dict[str, dict[str, float]] = {}
    for codec in codecs:
        worker = Codec(StoredLayout(model.layout, codec))
        made = _generate(engine, prompts, records, worker, context_tokens, new_tokens)
        pairs = list(zip(made, expected, strict=True))
        firsts = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), new_tokens) for pair in pairs]
        same = [sum(a == b for a, b in zip(*pair, strict=True)) / new_tokens for pair in pairs]
        found[codec] = {
            "greedy_agreement": statistics.mean(same),
            "tokens_before_divergence_mean": statistics.mean(firsts),
            "tokens_before_divergence_median": statistics.median(firsts),
            "identical_outputs": sum(first == new_tokens for first in firsts) / len(firsts),
        }
    return found


def _records(engine: Engine, prompt: Sequence[int], context_tokens: int) -> list[memoryview]:
    """The context's raw blocks, computed once."""
    layout = engine.layout
    blocks = context_tokens // layout.block_tokens
    engine.add(NewSequence("context", prompt, Sampling(max_tokens=1, temperature=0.0), hold=True))
    for _ in _steps(engine):
        pass
    records = [memoryview(bytearray(layout.bytes_per_block)) for _ in range(blocks)]
    engine.export("context", 0, blocks, records)
    engine.release("context")
    return records


def _generate(
    engine: Engine, prompts: Sequence[Sequence[int]], records: Sequence[Sequence[memoryview]], codec: Codec, context_tokens: int, new_tokens: int
) -> list[list[int]]:  # fmt: skip
    """All prompts as one batch, their contexts loaded through the codec."""
    made: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    for number, prompt in enumerate(prompts):
        kv = LoadedKv(context_tokens, [_through(codec, record) for record in records[number]], lambda: None)
        sampling = Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        engine.add(NewSequence(str(number), prompt, sampling, kv=kv))
    for name, token in _steps(engine):
        made[name].append(token)
    return list(made.values())


def _through(codec: Codec, record: memoryview) -> memoryview:
    encoded, back = memoryview(bytearray(codec.bytes_per_block)), memoryview(bytearray(record.nbytes))
    codec.encode(record, encoded)
    codec.decode(encoded, back)
    return back


def _steps(engine: Engine) -> Iterator[tuple[str, int]]:
    """(sequence, token) of every step, until nothing is left."""
    while not engine.idle:
        for step in engine.step().sequences:
            if step.error is not None:
                raise step.error
            for token in step.tokens:
                yield step.id, token.id


def measure(
    model: Path, windows: int, context_tokens: int, scored_tokens: int, new_tokens: int, codecs: Sequence[CodecName]
) -> dict[str, Any]:
    """Both measurements, `codecs[0]` being raw."""
    loaded = load_model(model, device="cpu")
    block_tokens = loaded.layout.block_tokens
    if context_tokens % block_tokens:
        raise SystemExit(f"--context-tokens {context_tokens}: must be a multiple of the model's block of {block_tokens} tokens")
    texts = held_out_windows(model, context_tokens + scored_tokens, windows)
    with torch.inference_mode():
        quality = Perplexity(model, loaded.layout).of(texts, context_tokens, codecs)
        agreement = greedy_agreement(loaded, texts[: max(1, windows // 2)], context_tokens, new_tokens, codecs)
    return {
        "windows": len(texts),
        "context_tokens": context_tokens,
        "scored_tokens": len(texts) * (scored_tokens - 1),
        "codecs": {codec: quality[codec] | agreement[codec] for codec in codecs},
    }
