"""From logits to tokens, as each request asks. Shapes: R rows (one a request), V vocabulary.

A request's draws come from its own seed and the number of its tokens, so they do not depend on who else is in the batch. The host
waits once, when it reads the tokens.
"""

from __future__ import annotations

import secrets
from collections import Counter

import torch

from vlserve.config import SamplingParams
from vlserve.engine.grammar import Grammar, allowed_tokens
from vlserve.engine.messages import TokenLogprob
from vlserve.engine.scheduler import Sampled
from vlserve.engine.sequence import Sequence
from vlserve.kernels.sampling import draw_tokens
from vlserve.kernels.sampling.types import Draw
from vlserve.kernels.upload import Download, upload

GREEDY_BELOW = 1e-5  # a smaller temperature leaves nothing of the noise beside float32's logits
_NOBODY = Sequence(id=-1, token_ids=[0], media=[], sampling=SamplingParams(), max_tokens=1)


class Sampler:
    def __init__(self, end_token_ids: frozenset[int]) -> None:
        self._end_token_ids = end_token_ids

    def sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> Drawn:
        """logits [R, V] float32, one row a sequence -> its next token (and log-probabilities when asked for).

        Log-probabilities are the model's own, before penalties, bias and temperature. A sequence that has ended in the meantime
        leaves no trace; its row has some token.
        """
        sequences = [_NOBODY if s.has_ended else s for s in sequences]
        grammars = {i: s.grammar for i, s in enumerate(sequences) if isinstance(s.grammar, Grammar)}
        allowed = allowed_tokens(grammars, logits.shape[1], logits.device)
        failed = {i: reason for i, reason in allowed.items() if isinstance(reason, str)}
        masks = {i: mask for i, mask in allowed.items() if isinstance(mask, torch.Tensor)}
        adjusted = self._adjust(logits, sequences, masks)
        tokens = adjusted.argmax(dim=-1)  # [R]
        drawn = [(i, s) for i, s in enumerate(sequences) if s.sampling.temperature >= GREEDY_BELOW and s.sampling.top_p > 0]
        draw_tokens(adjusted, tokens, [_asked(i, s) for i, s in drawn])
        return Drawn(tokens, _logprobs(logits, sequences, tokens), failed)

    def _adjust(self, logits: torch.Tensor, sequences: list[Sequence], masks: dict[int, torch.Tensor]) -> torch.Tensor:
        """What is drawn from, [R, V]: `logits` itself where no row asks for anything else."""
        given = logits.unbind(0)
        rows = [self._adjust_row(row, sequences[i], masks.get(i)) for i, row in enumerate(given)]
        is_changed = any(row is not before for row, before in zip(rows, given, strict=True))
        return torch.stack(rows) if is_changed else logits

    def _adjust_row(self, row: torch.Tensor, sequence: Sequence, allowed: torch.Tensor | None) -> torch.Tensor:
        """Penalties, bias, the ban on ending too early, and what a grammar allows; row [V] and allowed [V] bool.

        Without any of these it is `row` itself.
        """
        p = sequence.sampling
        if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
            row = row.clone()
            _penalise(row, sequence)
        if p.logit_bias:
            ids = upload(list(p.logit_bias), torch.int64, row.device)
            row = row.index_add(0, ids, upload(list(p.logit_bias.values()), row.dtype, row.device))
        if sequence.num_output_tokens < p.min_tokens:
            banned = upload([*self._end_token_ids, *p.stop_token_ids], torch.int64, row.device)
            goes_on = row.index_fill(0, banned, float("-inf"))
            # a grammar that allows nothing else is complete
            row = goes_on if allowed is None else torch.where(allowed.index_fill(0, banned, False).any(), goes_on, row)
        return row if allowed is None else row.masked_fill(~allowed, float("-inf"))


def _asked(row: int, sequence: Sequence) -> Draw:
    """Without a seed every draw has one of its own."""
    p = sequence.sampling
    return Draw(
        row=row,
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        seed=secrets.randbits(64) if p.seed is None else p.seed,
        number=sequence.num_output_tokens,
    )


def _logprobs(
    logits: torch.Tensor, sequences: list[Sequence], tokens: torch.Tensor
) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Of each row that asked: values [1 + k], the chosen token's first, and ids [k] of the k likeliest tokens."""
    asked = [i for i, s in enumerate(sequences) if s.sampling.logprobs is not None]
    if not asked:
        return {}
    found = {}
    some = logits.index_select(0, upload(asked, torch.int64, logits.device)).log_softmax(dim=-1)
    for row, i in zip(some.unbind(0), asked, strict=True):
        best = row.topk(min(sequences[i].sampling.logprobs or 0, len(row)))
        found[i] = torch.cat((row.gather(0, tokens[i : i + 1]), best.values)), best.indices
    return found


class Drawn:
    """`tokens` [R] int64 on their device, and on their way to the host, with what `_logprobs` found and why rows have none."""

    def __init__(
        self, tokens: torch.Tensor, logprobs: dict[int, tuple[torch.Tensor, torch.Tensor]], errors: dict[int, str]
    ) -> None:
        self.tokens, self._errors = tokens, errors
        self._sizes = {row: len(ids) for row, (_, ids) in logprobs.items()}
        parts = [tokens, *(part for pair in logprobs.values() for part in pair)]
        # one copy: float64 has every id and every float32
        self._download = Download(torch.cat([part.double() for part in parts]) if logprobs else tokens)

    def read(self) -> list[Sampled]:
        """Waits for them."""
        numbers = iter(self._download.read())
        ids, chosen = [int(next(numbers)) for _ in range(len(self.tokens))], {}
        for row, size in self._sizes.items():
            own = next(numbers)
            values, best = ([next(numbers) for _ in range(size)] for _ in range(2))
            chosen[row] = TokenLogprob(token_id=ids[row], logprob=own, top=list(zip(map(int, best), values, strict=True)))
        return [Sampled(token_id=id, logprob=chosen.get(row), error=self._errors.get(row)) for row, id in enumerate(ids)]


def _penalise(row: torch.Tensor, sequence: Sequence) -> None:
    """In place; repetition over prompt and answer (Keskar et al. 2019), presence and frequency over the answer (OpenAI)."""
    p = sequence.sampling
    if p.repetition_penalty != 1:
        seen = upload(sorted(set(sequence.token_ids)), torch.int64, row.device)
        values = row[seen]
        row[seen] = torch.where(values > 0, values / p.repetition_penalty, values * p.repetition_penalty)
    answer = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
    if answer and (p.presence_penalty or p.frequency_penalty):
        ids, counts = upload([*answer, *answer.values()], torch.int64, row.device).view(2, -1)
        row[ids] -= p.presence_penalty + p.frequency_penalty * counts.to(row.dtype)
