"""Synthetic token sequences with a chosen spread of lengths: for studies of that spread.

Tokens follow a fixed Markov chain of first order: there is something to learn, and the least possible
loss is known.
"""

import math

import torch
from torch import Tensor

from gaccum_exp.data.sequences import TokenSequences
from gaccum_exp.errors import BadInputError

SCORE_STD = 2.0
"""Of the scores whose softmax is a chain's row: the entropy rate of 64 tokens is 2.60 of 4.16 nats."""

CHAIN_SEED = 7_304_512
SAMPLES_SEED = 1_904_663_017

MOST_TOKENS = 2**28
"""Of a data set, which is in memory and is walked token by token: 5 GB while it is made."""

LARGEST_CV = 100

LARGEST_VOCABULARY = 1024
"""A chain is a table of vocab_size² float64: 8 MB here."""


def ragged(
    size: int,
    vocab_size: int = 64,
    mean_length: float = 64,
    length_cv: float = 0.5,
    coupling: float = 0.0,
    split_seed: int = 0,
    padding: str = "longest",
) -> TokenSequences:
    """Return sequences from a fixed Markov chain, with log-normal lengths.

    A sample has `length` inputs, and as many labels: the tokens one place on. Its first token is
    drawn from the chain's stationary distribution, so that no model's loss is below
    `entropy_rate(vocab_size)` in expectation, and one that knows the chain has exactly that.

    Lengths are rounded to integers and raised to at least 1. Rounding adds about 1/12 to their
    variance: at mean 8 a CV of 0.1 becomes 0.106. Raising makes the shortest longer: at mean 2 and
    CV 1 these become 2.11 and 0.92. A small sample of a large CV mostly has less of both, since much
    of a log-normal distribution's mean and variance is in its rare long draws.

    Args:
        size: number of sequences.
        vocab_size: number of tokens, 2 to 1024.
        mean_length: mean of the lengths, in tokens, at least 1.
        length_cv: their standard deviation over their mean; 0: all are equal.
        coupling: how far what a sequence says depends on its length, 0 to 1. A sequence at quantile q
            of the lengths (0 the shortest) follows a second chain with probability
            coupling · (1 - q), so that long and short ones differ as they do in real text, and
            averaging that favours short ones learns another mixture. `entropy_rate` is that of 0.
        split_seed: draws other sequences from the same chain.
        padding: see `TokenSequences`.

    Every draw is from generators of its own: the same in every run, and the global one stays where it
    is. Raises `BadInputError` on values out of range.
    """
    if size < 1:
        raise BadInputError(f"data.size={size} must be at least 1")
    if not 2 <= vocab_size <= LARGEST_VOCABULARY:
        raise BadInputError(
            f"data.vocab_size={vocab_size} must be 2 to {LARGEST_VOCABULARY}, since a chain is a table "
            "of its square; model.vocab_size may be larger"
        )
    if not mean_length >= 1:
        raise BadInputError(f"data.mean_length={mean_length} must be at least 1")
    if not 0 <= length_cv <= LARGEST_CV:
        raise BadInputError(f"data.length_cv={length_cv} must be 0 to {LARGEST_CV}")
    if size * mean_length > MOST_TOKENS:
        raise BadInputError(
            f"data.size={size} sequences of data.mean_length={mean_length} are "
            f"{size * mean_length:,.0f} tokens, more than {MOST_TOKENS:,}"
        )
    if not 0 <= coupling <= 1:
        raise BadInputError(f"data.coupling={coupling} must be 0 to 1")
    generator = torch.Generator().manual_seed(SAMPLES_SEED + split_seed)
    normal = torch.randn(size, generator=generator, dtype=torch.float64)
    variance = math.log1p(length_cv**2)  # of the logarithm; its mean makes that of the lengths right
    logarithm = math.log(mean_length) - variance / 2 + math.sqrt(variance) * normal
    lengths = logarithm.exp().round().clamp(min=1, max=MOST_TOKENS / size).to(torch.int64)
    quantiles = torch.special.ndtr(normal)
    second = torch.rand(size, generator=generator, dtype=torch.float64) < coupling * (1 - quantiles)
    # One more token than inputs, for the last label.
    tokens = _walk(lengths + 1, second, vocab_size, generator)
    starts = torch.cumsum(lengths + 1, 0) - (lengths + 1)
    names = [str(token) for token in range(vocab_size)]
    return TokenSequences(tokens, starts, lengths, names, padding=padding)


def entropy_rate(vocab_size: int) -> float:
    """Return the entropy of a next token given the one before it, in nats: the least possible loss.

    It is that of the first chain, which all sequences follow without coupling: Σᵢ πᵢ H(row i), with π
    its stationary distribution (Cover & Thomas 2006, theorem 4.2.4).
    """
    chain = transitions(vocab_size)
    return float((stationary(chain) * torch.special.entr(chain).sum(dim=1)).sum())


def transitions(vocab_size: int, chain: int = 0) -> Tensor:
    """Return the probabilities of chain 0 or 1, (token, next token), float64: the same in every run."""
    generator = torch.Generator().manual_seed(CHAIN_SEED + chain)
    scores = torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64)
    return torch.softmax(SCORE_STD * scores, dim=1)


def stationary(chain: Tensor) -> Tensor:
    """Return how often each token occurs, (tokens,), in a chain (tokens, tokens) of no zeros."""
    tokens = len(chain)
    # π (P - 1) = 0 has one equation too many, and in its place the probabilities sum to 1.
    equations = chain.T - torch.eye(tokens, dtype=chain.dtype)
    equations[-1] = 1.0
    sums = torch.zeros(tokens, dtype=chain.dtype)
    sums[-1] = 1.0
    shares: Tensor = torch.linalg.solve(equations, sums)
    return shares


def _walk(sizes: Tensor, second: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Return walks of `sizes` tokens laid end to end, int32; `second` says which follow chain 1.

    One place of all walks at a time, by inversion: the next token is how many of the row's cumulative
    probabilities lie below a uniform draw.
    """
    chains = [transitions(vocab_size, chain) for chain in (0, 1)]
    first = torch.stack([stationary(chain).cumsum(0) for chain in chains])
    later = torch.cat(chains).cumsum(1)
    uniform = torch.rand(int(sizes.sum()), generator=generator, dtype=torch.float64)
    tokens = torch.empty(len(uniform), dtype=torch.int32)
    # Longest first, so that those which go on are always the first ones.
    order = sizes.argsort(descending=True, stable=True)
    starts, sizes, chain_of = (sizes.cumsum(0) - sizes)[order], sizes[order], second[order].long()
    current = torch.empty(0, dtype=torch.int64)
    for place in range(int(sizes[0])):
        going = int((sizes > place).sum())
        which = chain_of[:going]
        cumulative = first[which] if place == 0 else later[which * vocab_size + current[:going]]
        at = starts[:going] + place
        drawn = torch.searchsorted(cumulative, uniform[at].unsqueeze(1)).squeeze(1)
        current = drawn.clamp(max=vocab_size - 1)  # rounding may leave the last sum just below 1
        tokens[at] = current.to(torch.int32)
    return tokens
