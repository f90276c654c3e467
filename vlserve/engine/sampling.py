"""From logits to tokens, row by row as each request asks. Shapes: R rows (one a request), V vocabulary.

A request's draws come from its own generator, so they do not depend on who else is in the batch.
"""

from __future__ import annotations

from collections import Counter

import torch

from vlserve.engine.grammar import Grammar, allowed_tokens
from vlserve.engine.messages import TokenLogprob
from vlserve.engine.scheduler import Sampled
from vlserve.engine.sequence import Sequence
from vlserve.kernels.upload import pinned, upload

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

        Log-probabilities are the model's own, before penalties, bias and temperature. What is found is read back once, at
        the end; nothing before waits for the device.
        """
        if not sequences:
            return []
        logprobs = self._logprobs(logits, sequences)
        grammars = {i: s.grammar for i, s in enumerate(sequences) if isinstance(s.grammar, Grammar)}
        allowed = allowed_tokens(grammars, logits.shape[1], logits.device)
        failed = {i: reason for i, reason in allowed.items() if isinstance(reason, str)}
        masks = {i: mask for i, mask in allowed.items() if isinstance(mask, torch.Tensor)}
        rows = [self._adjust(row, sequences[i], masks.get(i)) for i, row in enumerate(logits.unbind(0))]
        picks = list(torch.stack(rows).argmax(dim=-1).split(1))
        for i, sequence in enumerate(sequences):
            if sequence.sampling.temperature >= GREEDY_BELOW:
                picks[i] = self._draw(rows[i], sequence)
        tokens, chosen = _read(picks, logprobs, sequences)
        return [Sampled(token_id=token, logprob=chosen.get(i), error=failed.get(i)) for i, token in enumerate(tokens)]

    def _adjust(self, row: torch.Tensor, sequence: Sequence, allowed: torch.Tensor | None) -> torch.Tensor:
        """Penalties, bias, the ban on ending too early, and what a grammar allows; row [V] and allowed [V] bool."""
        p = sequence.sampling
        if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
            row = row.clone()
            _penalise(row, sequence)
        if p.logit_bias:
            ids = upload(list(p.logit_bias), torch.int64, row.device)
            row = row.index_add(0, ids, upload(list(p.logit_bias.values()), row.dtype, row.device))
        if sequence.num_output_tokens < p.min_tokens:
            banned = upload([*self._end_token_ids, *p.stop_token_ids], torch.int64, row.device)
            without = row.index_fill(0, banned, float("-inf"))
            goes_on = None if allowed is None else allowed.index_fill(0, banned, False).any()  # else the grammar is complete
            row = without if goes_on is None else torch.where(goes_on, without, row)
        return row if allowed is None else row.masked_fill(~allowed, float("-inf"))

    def _draw(self, row: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """[1]"""
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
        noise = pinned(row.shape, torch.float32, row.device).exponential_(generator=generator)
        noise = noise.to(row.device, non_blocking=True)
        best = (probabilities.masked_fill(~keep, 0) / noise.clamp_min(1e-30)).argmax(dim=-1, keepdim=True)
        return ids.gather(0, best)

    def _logprobs(self, logits: torch.Tensor, sequences: list[Sequence]) -> dict[int, torch.Tensor]:
        asked = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
        if not asked:
            return {}
        rows = logits.index_select(0, upload(asked, torch.int64, logits.device))
        return dict(zip(asked, rows.log_softmax(dim=-1).unbind(0), strict=True))


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    """In place; repetition over prompt and answer (Keskar et al. 2019), presence and frequency over the answer (OpenAI)."""
    p = sequence.sampling
    if p.repetition_penalty != 1:
        seen = upload(sorted(set(sequence.token_ids)), torch.int64, row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    counts = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
    if counts and (p.presence_penalty or p.frequency_penalty):
        numbers = upload(list(counts.values()), row.dtype, row.device)
        row[upload(list(counts), torch.int64, row.device)] -= p.presence_penalty + p.frequency_penalty * numbers


def _read(
    picks: list[torch.Tensor], logprobs: dict[int, torch.Tensor], sequences: list[Sequence]
) -> tuple[list[int], dict[int, TokenLogprob]]:
    """Tokens, and log-probabilities of those that asked, in one copy from the device. float64 has every id and float32."""
    parts = [torch.cat(picks)]
    for i, row in logprobs.items():
        values, ids = row.topk(min(sequences[i].sampling.logprobs or 0, len(row)))
        parts += [row.gather(0, picks[i]), values, ids]
    if len(parts) == 1:
        return parts[0].tolist(), {}
    numbers = iter(torch.cat([part.double() for part in parts]).tolist())
    tokens, chosen = [int(next(numbers)) for _ in picks], {}
    for place, i in enumerate(logprobs):
        own, size = next(numbers), len(parts[2 + 3 * place])
        top_values, top_ids = ([next(numbers) for _ in range(size)] for _ in range(2))
        chosen[i] = TokenLogprob(token_id=tokens[i], logprob=own, top=list(zip(map(int, top_ids), top_values, strict=True)))
    return tokens, chosen
