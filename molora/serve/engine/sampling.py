"""Sampler: draws the tokens of one answer from the model's logits, as its request asks.

The order is that of transformers: penalties, bias, minimum length, temperature, top-k, top-p, min-p. What is drawn
depends on the logits and on the request's own generator alone, never on the other rows of the batch. Log-probabilities
are those of the model itself, before all of that, as in the OpenAI API.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..request import Sampling, ServeError, Token

logger = logging.getLogger("molora.serve")
COLDEST = 1e-6  # a temperature below it is as good as 0, and logits divided by it would overflow
NUCLEUS = 1024  # so many of the likeliest tokens are sorted first; nearly always they hold the whole nucleus


class Sampler:
    """Draws the tokens of one answer.

    Args:
        sampling: what the request asks for; checked.
        prompt_ids: the tokens of the prompt, which the repetition penalty reads.
        eos_ids: with which the model ends its answers.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], eos_ids: Iterable[int] = ()) -> None:
        self.sampling = sampling
        #: tokens that end the answer
        self.ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos_ids))
        self._counts: Counter[int] = Counter()  # of the answer's tokens
        self._drawn = 0
        self._seen = dict.fromkeys(prompt_ids) if sampling.repetition_penalty != 1.0 else {}
        self._biases: tuple[Tensor, Tensor] | None = None
        if sampling.logit_bias:
            tokens, biases = zip(*sampling.logit_bias, strict=True)
            self._biases = torch.tensor(tokens), torch.tensor(biases, dtype=torch.float64)
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is just the likeliest one, and nothing else is asked about it."""
        asked = self.sampling
        return asked.temperature == 0 and asked.logprobs is None and not self._reshapes

    @property
    def _reshapes(self) -> bool:
        asked = self.sampling
        penalised = asked.repetition_penalty != 1 or asked.presence_penalty or asked.frequency_penalty
        return bool(penalised or asked.logit_bias or (self.ends and self._drawn < asked.min_tokens))

    def __call__(self, logits: Tensor) -> Token:
        """Draw a token from logits (V,).

        Raises:
            ServeError: the model's logits are not numbers.
        """
        raw = logits.float()
        if not math.isfinite(raw.max()):
            raise not_finite()
        if self.sampling.temperature > 0:
            return self.note(self._pick(*self.distribution(raw)), raw)
        return self.note(int((self._shaped(raw) if self._reshapes else raw).argmax()), raw)

    def note(self, chosen: int, raw: Tensor | None = None) -> Token:
        """Take over a token that was chosen from the raw logits (V,)."""
        asked = self.sampling
        self._drawn += 1
        if asked.presence_penalty or asked.frequency_penalty:
            self._counts[chosen] += 1
        if asked.repetition_penalty != 1.0:
            self._seen[chosen] = None
        if asked.logprobs is None or raw is None:
            return Token(chosen)
        total = raw.logsumexp(-1)
        top: tuple[tuple[int, float], ...] = ()
        if asked.logprobs:
            values, ids = raw.topk(min(asked.logprobs, raw.shape[-1]))
            top = tuple(zip(ids.tolist(), (values - total).tolist(), strict=True))
        return Token(chosen, float(raw[chosen] - total), top)

    # --- the distribution ----------------------------------------------------------------------------------------

    def distribution(self, logits: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the tokens that the next one is drawn from, None for all, and the running sum of their probabilities.

        Args:
            logits: (V,) float32.

        Returns:
            Ids (n,) and the sums (n,) float64, not normalised: the last one is the whole.
        """
        asked = self.sampling
        scores = (self._shaped(logits) if self._reshapes else logits) / max(asked.temperature, COLDEST)
        ids = None
        if 0 < asked.top_k < scores.shape[-1]:
            least = scores.topk(asked.top_k).values[-1]
            ids = (scores >= least).nonzero()[:, 0]  # all of equal scores, as transformers does
            scores = scores[ids]
        if asked.top_p < 1:
            scores, ids = _nucleus(scores, ids, asked.top_p)
        if asked.min_p > 0:
            kept = (scores >= scores.max() + math.log(asked.min_p)).nonzero()[:, 0]
            scores, ids = scores[kept], kept if ids is None else ids[kept]
        return ids, (scores - scores.max()).exp().double().cumsum(-1)

    def _shaped(self, logits: Tensor) -> Tensor:
        """Return a copy of logits (V,) with penalties, bias and the tokens that must not come yet."""
        asked, scores = self.sampling, logits.clone()
        if asked.repetition_penalty != 1.0 and self._seen:
            seen = torch.tensor(list(self._seen), device=scores.device)
            old = scores[seen]
            scores[seen] = torch.where(old < 0, old * asked.repetition_penalty, old / asked.repetition_penalty)
        if self._counts:
            drawn = torch.tensor(list(self._counts), device=scores.device)
            often = torch.tensor(list(self._counts.values()), device=scores.device, dtype=scores.dtype)
            scores[drawn] -= asked.presence_penalty + asked.frequency_penalty * often
        if self._biases is not None:  # all at once: a thousand, one by one, would hold up the whole batch
            tokens, biases = self._biases
            scores.index_add_(0, tokens.to(scores.device), biases.to(scores))
        if self._drawn < asked.min_tokens:
            scores[[token for token in self.ends if token < scores.shape[-1]]] = -torch.inf
        return scores

    def _pick(self, ids: Tensor | None, sums: Tensor) -> int:
        """Draw one of the tokens with the running sums of their probabilities."""
        assert self._generator is not None
        at = torch.rand((), generator=self._generator, dtype=torch.float64).to(sums.device) * sums[-1]
        # the first whose sum is above, so a token of probability zero is never drawn
        place = min(int(torch.searchsorted(sums, at, right=True)), sums.shape[-1] - 1)
        return place if ids is None else int(ids[place])


def draw(samplers: Sequence[Sampler], logits: Tensor) -> list[Token | ServeError]:
    """Draw one token for every row of logits (N, V); rows that just take the likeliest one are drawn together.

    Returns:
        For every row a token, or what is wrong with that row alone.
    """
    drawn: list[Token | ServeError] = []
    plain = [sampler.is_plain for sampler in samplers]
    best, chosen = [], []
    if any(plain):
        greedy = logits if all(plain) else logits[torch.tensor(plain, device=logits.device)]
        values, places = greedy.max(-1)
        best, chosen = values.tolist(), places.tolist()
    row = 0
    for index, sampler in enumerate(samplers):
        if plain[index]:
            drawn.append(sampler.note(chosen[row]) if math.isfinite(best[row]) else not_finite())
            row += 1
            continue
        try:
            drawn.append(sampler(logits[index]))
        except ServeError as error:
            drawn.append(error)
        except Exception as error:  # whatever one request asks, the others get their tokens
            logger.exception("a token could not be drawn")
            told = f"no token can be drawn for this request ({type(error).__name__}); the log of the server says more"
            drawn.append(ServeError(told, 500, "engine_error"))
    return drawn


def not_finite() -> ServeError:
    """Return the error of a row whose logits cannot be drawn from."""
    return ServeError(
        "the model gave logits that are not numbers for this request, so no token can be drawn; try another adapter, "
        "or have the adapter checked with molora doctor",
        status=500,
        code="not_finite",
    )


def _nucleus(scores: Tensor, ids: Tensor | None, top_p: float) -> tuple[Tensor, Tensor]:
    """Return the fewest likeliest scores (n,) that together have the probability `top_p`, and their ids."""
    total, size = scores.double().logsumexp(-1), scores.shape[-1]
    for count in (min(NUCLEUS, size), size):
        values, places = scores.topk(count)
        probs = (values.double() - total).exp()
        above = probs.cumsum(-1) - probs
        kept = max(1, int((above < top_p).sum()))
        if kept < count or count == size:
            break
    places = places[:kept]
    return values[:kept], places if ids is None else ids[places]
