"""From logits to tokens, row by row as each request asks. Shapes: R rows (one a request), V vocabulary.

A request's draws come from its own generator, so they do not depend on who else is in the batch.
"""

from __future__ import annotations

import torch

from vlserve.engine.grammar import Grammar, allowed_tokens
from vlserve.engine.messages import TokenLogprob
from vlserve.engine.scheduler import Sampled
from vlserve.engine.sequence import Sequence

GREEDY_BELOW = 1e-5  # logits divided by a smaller temperature leave float32's range


class Sampler:
    def __init__(self, end_token_ids: frozenset[int]) -> None:
        self._end_token_ids = end_token_ids
        self._generators: dict[int, torch.Generator] = {}

    def forget(self, ids: list[int]) -> None:
        """Drop the generators of requests that ended."""
        for id in ids:
            self._generators.pop(id, None)

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
        """logits [R, V] float32, one row a sequence -> its next token (and log-probabilities when asked for).

        Log-probabilities are the model's own, before penalties, bias and temperature.
        """
        logprobs = self._logprobs(logits, sequences)
        grammars = {i: s.grammar for i, s in enumerate(sequences) if isinstance(s.grammar, Grammar)}
        allowed = allowed_tokens(grammars, logits.shape[1], logits.device)
        failed = {i: reason for i, reason in allowed.items() if isinstance(reason, str)}
        masks = {i: mask for i, mask in allowed.items() if isinstance(mask, torch.Tensor)}
        rows = [self._adjust(row, sequences[i], masks.get(i)) for i, row in enumerate(logits.unbind(0))]
        drawn = [i for i, s in enumerate(sequences) if s.sampling.temperature >= GREEDY_BELOW]
        tokens = torch.stack(rows).argmax(dim=-1).tolist() if rows else []
        for i in drawn:
            tokens[i] = self._draw(rows[i], sequences[i])
        return [
            Sampled(token_id=token, logprob=_pick(logprobs.get(i), sequences[i], token), error=failed.get(i))
            for i, token in enumerate(tokens)
        ]

    def _adjust(self, row: torch.Tensor, sequence: Sequence, allowed: torch.Tensor | None) -> torch.Tensor:
        """Penalties, bias, the ban on ending too early, and what a grammar allows; row [V] and allowed [V] bool."""
        p = sequence.sampling
        if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
            row = row.clone()
            _penalise(row, sequence)
        if p.logit_bias:
            ids = torch.tensor(list(p.logit_bias), device=row.device)
            bias = torch.tensor(list(p.logit_bias.values()), dtype=row.dtype, device=row.device)
            row = row.index_add(0, ids, bias)
        if sequence.num_output_tokens < p.min_tokens:
            banned = torch.tensor([*self._end_token_ids, *p.stop_token_ids], device=row.device, dtype=torch.int64)
            if allowed is None or allowed.index_fill(0, banned, False).any():  # else the grammar is complete
                row = row.index_fill(0, banned, float("-inf"))
        return row if allowed is None else row.masked_fill(~allowed, float("-inf"))

    def _draw(self, row: torch.Tensor, sequence: Sequence) -> int:
        p = sequence.sampling
        values, ids = torch.sort(row / p.temperature, descending=True, stable=True)
        probabilities = values.softmax(dim=-1)
        keep = torch.ones_like(probabilities, dtype=torch.bool)
        if p.top_k > 0:
            keep[p.top_k :] = False
        if p.top_p < 1:
            kept = probabilities.masked_fill(~keep, 0)
            kept = kept / kept.sum()
            keep &= kept.cumsum(0) - kept < p.top_p  # the token that crosses the bound stays
        if p.min_p > 0:
            keep &= probabilities >= p.min_p * probabilities[0]
        generator = self._generators.get(sequence.id)
        if generator is None:
            generator = self._generators[sequence.id] = torch.Generator(device="cpu")
            if p.seed is None:
                generator.seed()
            else:
                generator.manual_seed(p.seed)
        # dividing by exponential noise and taking the largest draws from the distribution
        noise = torch.empty(row.shape, dtype=torch.float32).exponential_(generator=generator).to(row.device)
        return int(ids[(probabilities.masked_fill(~keep, 0) / noise.clamp_min(1e-30)).argmax()])

    def _logprobs(self, logits: torch.Tensor, sequences: list[Sequence]) -> dict[int, torch.Tensor]:
        asked = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
        if not asked:
            return {}
        return dict(zip(asked, logits[asked].log_softmax(dim=-1).unbind(0), strict=True))


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    """In place; repetition over prompt and answer (Keskar et al. 2019), presence and frequency over the answer (OpenAI)."""
    p = sequence.sampling
    if p.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(sequence.token_ids)), device=row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    answer = sequence.token_ids[sequence.num_prompt_tokens :]
    if answer and (p.presence_penalty or p.frequency_penalty):
        ids, counts = torch.tensor(answer, device=row.device).unique(return_counts=True)
        row[ids] -= p.presence_penalty + p.frequency_penalty * counts.to(row.dtype)


def _pick(logprobs: torch.Tensor | None, sequence: Sequence, token: int) -> TokenLogprob | None:
    if logprobs is None:
        return None
    values, ids = logprobs.topk(min(sequence.sampling.logprobs or 0, len(logprobs)))
    return TokenLogprob(token_id=token, logprob=float(logprobs[token]), top=list(zip(ids.tolist(), values.tolist(), strict=True)))
