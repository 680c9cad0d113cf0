"""From logits to tokens, for all sequences of a step at once.

In `transformers`' order: repetition penalty (prompt and output), presence and frequency penalties
(output), the `min_tokens` mask, then temperature, top-k, top-p, min-p; the rest is an inverse-CDF draw in
vocabulary order with u(seed, position). Log-probabilities are of the raw distribution. Greedy rows
take the plain argmax, the first of equals.

Filters keep every token that ties with the last one kept, so the outcome depends on no sorting order.
"""

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from common.generation import Sampling, Token
from services.worker.engine.sequence import Sequence
from services.worker.engine.uniform import uniform

# Enough of the sorted head for nearly every top-p; the whole vocabulary is sorted when it isn't.
_HEAD_TOKENS = 1024


@dataclass(slots=True)
class Sampled:
    """One row's outcome; `token` is None where the logits were not finite."""

    token: Token | None


def sample(logits: Tensor, sequences: Rows[Sequence]) -> list[Sampled]:
    """`logits` `[rows, vocab]` of any float dtype, one row for each sequence."""
    raw = logits.float()
    adjusted = _adjust(raw, sequences)
    drawn = [row for row, sequence in enumerate(sequences) if sequence.sampling.temperature > 0]
    ids = adjusted.argmax(dim=-1)
    # NaN and infinity both reach the raw maximum; the adjusted one may differ.
    finite = (raw.gather(1, ids[:, None])[:, 0] if adjusted is raw else raw.amax(dim=-1)).isfinite().tolist()
    if drawn:
        rows = [row for row in drawn if finite[row]]
        if rows:
            scores = adjusted if len(rows) == len(sequences) else adjusted[rows]
            ids[rows] = _draw(scores, [sequences[row] for row in rows])
    tokens = _tokens(raw, ids, sequences)
    return [Sampled(token if ok else None) for token, ok in zip(tokens, finite, strict=True)]


def _tokens(raw: Tensor, ids: Tensor, sequences: Rows[Sequence]) -> list[Token]:
    chosen = ids.tolist()
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    if not rows:
        return [Token(token) for token in chosen]
    scores = raw if len(rows) == len(sequences) else raw[rows]
    totals = scores.logsumexp(dim=-1, keepdim=True)
    own = (scores.gather(1, ids[rows][:, None]) - totals)[:, 0].tolist()
    count = max(sequences[row].sampling.logprobs or 0 for row in rows)
    values, indices = (scores.topk(min(count, scores.shape[1]), dim=-1)) if count else (totals[:, :0], ids[rows][:, None][:, :0])
    tops = list(zip(indices.tolist(), (values - totals).tolist(), strict=True))
    out = [Token(token) for token in chosen]
    for index, row in enumerate(rows):
        wanted = sequences[row].sampling.logprobs or 0
        top = tuple(zip(tops[index][0][:wanted], tops[index][1][:wanted], strict=True))
        out[row] = Token(chosen[row], own[index], top)
    return out


def _adjust(raw: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """Penalties and the min_tokens mask; the same tensor where no sequence asks for any."""
    adjusted = raw
    for row, sequence in enumerate(sequences):
        penalised, masked = has_penalties(sequence.sampling), sequence.generated < sequence.sampling.min_tokens
        if not penalised and not (masked and sequence.stop_ids):
            continue
        if adjusted is raw:
            adjusted = raw.clone()
        if penalised:
            if sequence.penalties is None:
                sequence.penalties = Penalties(raw.shape[1], raw.device)
            sequence.penalties.apply(adjusted[row], sequence)
        if masked:
            stops = [token for token in sequence.stop_ids if token < raw.shape[1]]
            adjusted[row, stops] = float("-inf")
    return adjusted


def has_penalties(sampling: Sampling) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


class Penalties:
    """Which tokens a sequence holds, kept up to date token by token.

    Attributes:
        seen: `[vocab]` bool, in prompt or output.
        counts: `[vocab]` float32, times in the output.
        upto: tokens counted so far.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.counts = torch.zeros(vocab_size, device=device)
        self.upto = 0

    def apply(self, scores: Tensor, sequence: Sequence) -> None:
        """Changes one row of scores, `[vocab]`, in place."""
        self._catch_up(sequence)
        sampling = sequence.sampling
        if sampling.repetition_penalty != 1.0:
            penalty = sampling.repetition_penalty
            scores.copy_(torch.where(self.seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores))
        if sampling.frequency_penalty:
            scores.sub_(self.counts, alpha=sampling.frequency_penalty)
        if sampling.presence_penalty:
            scores.sub_((self.counts > 0).float(), alpha=sampling.presence_penalty)

    def _catch_up(self, sequence: Sequence) -> None:
        new = torch.tensor(sequence.tokens[self.upto :], dtype=torch.long, device=self.seen.device)
        first_output = max(0, sequence.prompt_tokens - self.upto)
        self.seen[new] = True
        output = new[first_output:]
        self.counts.index_add_(0, output, torch.ones(len(output), device=self.counts.device))
        self.upto = len(sequence.tokens)


def _draw(scores: Tensor, sequences: Rows[Sequence]) -> Tensor:
    """One token for each row of `scores` `[rows, vocab]`, all with temperature > 0 -> `[rows]` int64."""
    settings = [sequence.sampling for sequence in sequences]
    temperatures = torch.tensor([s.temperature for s in settings], device=scores.device)
    # Subtracting the maximum first keeps tiny temperatures from overflowing.
    scores = (scores - scores.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    scores = _keep_top(scores, settings)
    probabilities = scores.softmax(dim=-1, dtype=torch.float64)
    if any(s.min_p > 0 for s in settings):
        floor = torch.tensor([s.min_p for s in settings], device=scores.device, dtype=torch.float64)[:, None]
        probabilities = probabilities.masked_fill(probabilities < floor * probabilities.amax(dim=-1, keepdim=True), 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    u = [uniform(sequence.sampling.seed, len(sequence.tokens)) for sequence in sequences]
    total = cumulative[:, -1:]
    target = torch.tensor(u, dtype=torch.float64, device=scores.device)[:, None] * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # u * total may round up to total
    return torch.searchsorted(cumulative, target, right=True)[:, 0]


def _keep_top(scores: Tensor, settings: Rows[Sampling]) -> Tensor:
    """Top-k, then top-p of what is left: everything under each row's threshold becomes -inf."""
    vocab = scores.shape[1]
    ks = [min(s.top_k, vocab) if s.top_k > 0 else vocab for s in settings]
    ps = [s.top_p for s in settings]
    if min(ks) == vocab and min(ps) >= 1:
        return scores
    head = min(vocab, max([_HEAD_TOKENS, *(k for k in ks if k < vocab)]))
    # With k = vocab the mass to reach is of the whole row, else of its k best.
    threshold, found = _thresholds(scores, head, ks, ps)
    if not found:
        threshold, _ = _thresholds(scores, vocab, ks, ps)
    return scores.masked_fill(scores < threshold, float("-inf"))


def _thresholds(scores: Tensor, head: int, ks: Rows[int], ps: Rows[float]) -> tuple[Tensor, bool]:
    """The lowest score each row keeps, `[rows, 1]`, from its `head` best; False if the head holds too little mass."""
    vocab = scores.shape[1]
    best = scores.topk(head, dim=-1).values
    k = torch.tensor(ks, device=scores.device)[:, None]
    kth = torch.where(k < vocab, best.gather(1, k.clamp(max=head) - 1), torch.full_like(best[:, :1], float("-inf")))
    kept = scores if bool((k == vocab).all()) else scores.masked_fill(scores < kth, float("-inf"))
    mass = (best.double() - kept.double().logsumexp(dim=-1, keepdim=True)).exp().masked_fill(best < kth, 0.0)
    before = mass.cumsum(dim=-1) - mass
    p = torch.tensor(ps, device=scores.device, dtype=torch.float64)[:, None]
    # A token stays while the tokens before it hold less than p; the first always does.
    stays = (before < p) | (p >= 1)
    stays[:, 0] = True
    last = stays.sum(dim=-1, keepdim=True) - 1
    by_mass = torch.where(p < 1, best.gather(1, last), torch.full_like(best[:, :1], float("-inf")))
    found = head == vocab or not bool((stays[:, -1:] & (p < 1) & (best[:, -1:] >= kth)).any())
    return torch.maximum(kth, by_mass), found
