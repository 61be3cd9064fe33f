"""Loops whose micro-batches are padded each to its own longest sequence, and what is judged of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from gaccum_exp import watch
from gaccum_exp.audit.result import Audit

D = torch.float64
VOCABULARY, HIDDEN, FEATURES, CLASSES = 9, 4, 3, 5
EQUAL = [(5, 3), (8, 6), (4, 2)]
"""Lengths of the sequences in each micro-batch: as many samples in all."""
UNEQUAL = [(5, 3, 2), (8, 6), (4,)]
SINGLE = [(5,), (8,), (4,)]
AS_THE_HIDDEN_SIZE = [(5, 3, 2, 2), (8, 6, 8, 8), (4, 4, 4, 2)]
AS_THE_VOCABULARY = [tuple(range(2, 2 + VOCABULARY)), (3,) * VOCABULARY]
Samples = list[tuple[Tensor, ...]]


@dataclass
class Loop:
    """A loop's model, the criterion given to watch, and its loss of a micro-batch of samples."""

    model: nn.Module
    criterion: Any
    loss: Callable[[Samples], Tensor]
    """The mean over what it counts."""
    count: Callable[[Samples], float]
    lengths: Sequence[tuple[int, ...]] = tuple(EQUAL)
    sample: Callable[[int, torch.Generator], tuple[Tensor, ...]] = lambda n, g: tokens(n, g)


def tokens(length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Input tokens and the next ones, (length,)."""
    drawn = torch.randint(1, VOCABULARY, (length + 1,), generator=generator)
    return drawn[:-1], drawn[1:]


def spoken(length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Features (length, FEATURES), and a class."""
    x = torch.randn(length, FEATURES, generator=generator, dtype=D)
    return x, torch.randint(CLASSES, (), generator=generator)


def number_of_tokens(samples: Samples) -> float:
    """How many tokens there are in the samples."""
    return float(sum(len(x) for x, *_ in samples))


def padded(samples: Samples, which: int, value: float = 0, batch_first: bool = True) -> Tensor:
    """One field of the samples, padded to their longest."""
    return pad_sequence([s[which] for s in samples], batch_first=batch_first, padding_value=value)


def lengths_of(samples: Samples) -> Tensor:
    """Lengths of the sequences, (samples,)."""
    return torch.tensor([len(x) for x, *_ in samples])


class Recurrent(nn.Module):
    """Tokens, or features, to classes of each: by a GRU, an LSTM, in both directions, or attention."""

    def __init__(self, kind: str = "GRU", *, of_tokens: bool = True, **how: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        how = {"batch_first": True} | how
        self.batch_first, self.twice = how["batch_first"], how.get("bidirectional", False)
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN) if of_tokens else nn.Linear(FEATURES, HIDDEN)
        if kind == "attention":
            self.layer: nn.Module = nn.TransformerEncoderLayer(HIDDEN, 2, 6, dropout=0.0, **how)
        else:
            self.layer = getattr(nn, kind)(HIDDEN, HIDDEN, **how)
        self.out = nn.Linear(HIDDEN * (1 + self.twice), VOCABULARY if of_tokens else CLASSES)
        self.dropout = nn.Dropout(0.0)
        self.double()

    def forward(self, x: Tensor, lengths: Tensor | None = None, **masks: Tensor) -> Tensor:
        h = self.dropout(self.embedding(x))
        if lengths is not None:
            packed = pack_padded_sequence(h, lengths, batch_first=True, enforce_sorted=False)
            h = pad_packed_sequence(self.layer(packed)[0], True, total_length=x.shape[1])[0]
        else:
            h = self.layer(h, **masks)
        return self.out(h if isinstance(h, Tensor) else h[0])


def language_model(
    kind: str = "GRU",
    lengths: Any = EQUAL,
    *,
    ignored: int = -100,
    given: Callable[[Samples], dict[str, Tensor]] = lambda samples: {},
    as_function: bool = False,
    **how: Any,
) -> Loop:
    """A loop that lays logits and labels end to end, between model and criterion."""
    model, ce = Recurrent(kind, **how), nn.CrossEntropyLoss(ignore_index=ignored)

    def forward(x: Tensor, y: Tensor, **masks: Tensor) -> Tensor:
        return ce(model(x, **masks).view(-1, VOCABULARY), y.view(-1))

    def loss(samples: Samples) -> Tensor:
        x, y = (padded(samples, i, v, model.batch_first) for i, v in ((0, 0), (1, ignored)))
        return forward(x.contiguous(), y.contiguous(), **given(samples))

    return Loop(model, forward if as_function else ce, loss, number_of_tokens, lengths)


def causal_mask(samples: Samples) -> dict[str, Tensor]:
    """(length, length), of the longest of the samples."""
    longest = int(lengths_of(samples).max())
    return {"src_mask": torch.triu(torch.full((longest, longest), -math.inf, dtype=D), 1)}


def padding_mask(samples: Samples) -> dict[str, Tensor]:
    """True where there is padding."""
    return {"src_key_padding_mask": padded(samples, 0) == 0}


def masked_regression() -> Loop:
    """A function of the user's, with a mask of numbers."""
    model = Recurrent(of_tokens=False)

    def masked(out: Tensor, y: Tensor, m: Tensor) -> Tensor:
        return (((out - y) ** 2).mean(-1) * m).sum() / m.sum()

    def loss(samples: Samples) -> Tensor:
        return masked(model(padded(samples, 0)), padded(samples, 1), padded(samples, 2))

    def sample(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
        y = torch.randn(n, CLASSES, generator=g, dtype=D)
        return spoken(n, g)[0], y, torch.ones(n, dtype=D)

    return Loop(model, masked, loss, number_of_tokens, sample=sample)


def translation(lengths: Any) -> Loop:
    """Two inputs of other lengths: attention of one recurrent layer to another's states."""

    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.out = nn.Embedding(VOCABULARY, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)
            self.one, self.other = (nn.GRU(HIDDEN, HIDDEN, batch_first=True) for _ in range(2))
            self.attention = nn.MultiheadAttention(HIDDEN, 2, batch_first=True)
            self.double()

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            memory, h = self.one(self.embedding(source))[0], self.other(self.embedding(target))[0]
            read, _ = self.attention(h, memory, memory, key_padding_mask=source == 0)
            return self.out(h + read)

    model, ce = Translator(), nn.CrossEntropyLoss(ignore_index=0)

    def loss(samples: Samples) -> Tensor:
        out = model(padded(samples, 2), padded(samples, 0))
        return ce(out.transpose(1, 2), padded(samples, 1))

    def sample(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
        return *tokens(n, g), torch.randint(1, VOCABULARY, (12 - n,), generator=g)

    return Loop(model, ce, loss, number_of_tokens, lengths, sample)


class Convolutions(nn.Module):
    """(B, FEATURES, T) to classes, of as many steps as there are."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Conv1d(FEATURES, FEATURES, 3, padding=1) for _ in range(2))
        self.out, self.pooled = nn.Linear(FEATURES, CLASSES), pooled
        self.double()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        there = (torch.arange(x.shape[-1]) < lengths[:, None])[:, None].to(x.dtype)
        there = torch.ones_like(there) if self.pooled else there
        h = torch.tanh(self.second(torch.tanh(self.first(x)) * there)) * there
        return self.out(h.sum(-1) / there.sum(-1))


def classified(model: nn.Module, given: Callable[[Samples], Any]) -> Loop:
    """A loop of a class for each sequence."""
    ce = nn.CrossEntropyLoss()

    def loss(samples: Samples) -> Tensor:
        out = model(*given(samples)).reshape(len(samples), -1, CLASSES)
        last = (
            out[torch.arange(len(samples)), lengths_of(samples) - 1] if out.shape[1] > 1 else out[:, 0]
        )
        return ce(last, torch.stack([y for _, y in samples]))

    return Loop(model, ce, loss, lambda samples: float(len(samples)), UNEQUAL, spoken)


def audio(samples: Samples) -> tuple[Tensor, Tensor]:
    """(B, FEATURES, T), and lengths."""
    return padded(samples, 0).transpose(1, 2).contiguous(), lengths_of(samples)


class Packed(nn.Module):
    """A packed sequence to classes of its last state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.out = nn.GRU(FEATURES, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.double()

    def forward(self, x: Any) -> Tensor:
        x = pack_sequence(x, enforce_sorted=False) if isinstance(x, list) else x
        return self.out(self.layer(x)[1][-1])


def pixels() -> Loop:
    """Images of several sizes, a label for each pixel of which some do not count."""
    torch.manual_seed(0)
    model = nn.Conv2d(2, CLASSES, 1).double()
    ce = nn.CrossEntropyLoss(ignore_index=255)

    def sample(n: int, g: torch.Generator) -> tuple[Tensor, ...]:
        y = torch.randint(CLASSES, (n, 9 - n), generator=g)
        y[0, 0] = 255
        return torch.randn(2, n, 9 - n, generator=g, dtype=D), y

    def loss(samples: Samples) -> Tensor:
        return ce(model(torch.stack([x for x, _ in samples])), torch.stack([y for _, y in samples]))

    def count(samples: Samples) -> float:
        return float(sum((y != 255).sum() for _, y in samples))

    return Loop(model, ce, loss, count, [(4, 4), (6, 6), (2, 2)], sample)


LOOPS: dict[str, Callable[[], Loop]] = {
    "gru": language_model,
    "gru, unequal sizes": lambda: language_model(lengths=UNEQUAL),
    "gru, as many samples as hidden units": lambda: language_model(lengths=AS_THE_HIDDEN_SIZE),
    "gru, as many samples as tokens": lambda: language_model(lengths=AS_THE_VOCABULARY),
    "gru in the user's function": lambda: language_model(as_function=True, ignored=0),
    "gru in a function, one each": lambda: language_model(lengths=SINGLE, as_function=True),
    "lstm, time first, unequal": lambda: language_model("LSTM", UNEQUAL, batch_first=False),
    "attention with a causal mask": lambda: language_model("attention", given=causal_mask),
    "attention, one each": lambda: language_model("attention", SINGLE, given=padding_mask),
    "both directions, packed inside": lambda: language_model(
        bidirectional=True, given=lambda samples: {"lengths": lengths_of(samples)}
    ),
    "masked regression": masked_regression,
    "translation, one each": lambda: translation(SINGLE),
    "audio with lengths": lambda: classified(Convolutions(), audio),
    "last state": lambda: classified(Recurrent(of_tokens=False), lambda s: [padded(s, 0)]),
    "packed sequences": lambda: classified(
        Packed(), lambda s: [pack_sequence([x for x, _ in s], enforce_sorted=False)]
    ),
    "lists": lambda: classified(Packed(), lambda s: [[x for x, _ in s]]),
    "pixels": pixels,
}
CHANGED_BY_PADDING: dict[str, Callable[[], Loop]] = {
    "both directions": lambda: language_model(bidirectional=True),
    "attention without a mask": lambda: language_model("attention"),
    "pooled over all steps": lambda: classified(Convolutions(pooled=True), audio),
}


def drawn(loop: Loop) -> list[Samples]:
    """The micro-batches' samples."""
    generator = torch.Generator().manual_seed(0)
    return [[loop.sample(n, generator) for n in lengths] for lengths in loop.lengths]


def flat(model: nn.Module) -> Tensor:
    """The gradient as one vector."""
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def judged(loop: Loop, weights: Sequence[float], **how: Any) -> tuple[Audit, Tensor]:
    """Return the audit of the loop's window, and its gradient."""
    optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.0)
    with watch(loop.model, loop.criterion, optimizer, **how) as audit:
        for samples, weight in zip(drawn(loop), weights, strict=True):
            (loop.loss(samples) * weight).backward()
        optimizer.step()
    return audit.worst, flat(loop.model)


def of_single_samples(loop: Loop) -> Tensor:
    """The large batch's gradient, sample by sample without any padding."""
    samples = [sample for part in drawn(loop) for sample in part]
    total = loop.count(samples)
    for sample in samples:
        (loop.loss([sample]) * loop.count([sample]) / total).backward()
    return flat(loop.model)


@pytest.mark.parametrize("name", LOOPS)
def test_padded_loops_are_judged_along_their_samples(name: str) -> None:
    """Equivalent where they give what single samples without padding give; else biased, and why."""
    loop = LOOPS[name]()
    counts = [loop.count(samples) for samples in drawn(loop)]
    expected = of_single_samples(loop)
    found, gradient = judged(loop, [n / sum(counts) for n in counts])
    assert torch.allclose(gradient, expected, rtol=1e-9, atol=1e-12)
    assert found.verdict in ("equivalent", "identical"), found.report()
    found, gradient = judged(loop, [1 / len(counts)] * len(counts))
    assert float((gradient - expected).norm() / expected.norm()) > 1e-2
    assert (found.verdict, found.cause) == ("biased", "unequal denominators"), found.report()
    shares = [float(f"{100 * n / sum(counts):.3g}") for n in counts]
    said = ", ".join(f"{n:g}" for n in (shares if "%" in str(found.remedy) else counts)[:4])
    assert said in str(found.remedy), found.report()


@pytest.mark.parametrize("name", CHANGED_BY_PADDING)
def test_a_model_that_padding_changes_is_neither_cleared_nor_accused(name: str) -> None:
    """The large batch is not known then, and the reason says so."""
    loop = CHANGED_BY_PADDING[name]()
    counts = [loop.count(samples) for samples in drawn(loop)]
    for weights in ([n / sum(counts) for n in counts], [1.0] * len(counts)):
        found, _ = judged(loop, weights)
        assert found.verdict == "inconclusive", found.report()
        assert "padded to the longest" in str(found.detail)


def test_what_pools_padding_between_model_and_loss_is_not_cleared() -> None:
    """The last of all steps is a sample's own in its micro-batch alone."""
    model, ce = Recurrent(of_tokens=False), nn.CrossEntropyLoss()

    def loss(samples: Samples) -> Tensor:
        return ce(model(padded(samples, 0))[:, -1], torch.stack([y for _, y in samples]))

    loop = Loop(model, ce, loss, lambda samples: float(len(samples)), UNEQUAL, spoken)
    found, _ = judged(loop, [len(part) / 6 for part in UNEQUAL])
    assert found.verdict == "inconclusive", found.report()


@pytest.mark.parametrize("weight", [1 / 3, 1.0])
def test_a_mean_over_padding_is_taken_of_each_length(weight: float) -> None:
    """Torch's own loss of single elements needs no padding; a function of the user's is not cleared."""
    loop = masked_regression()
    loop.criterion = nn.MSELoss()
    for own in (False, True):
        mse = (lambda out, y: ((out - y) ** 2).mean()) if own else loop.criterion
        loop.criterion = mse
        loop.loss = lambda s, mse=mse: mse(loop.model(padded(s, 0)), padded(s, 1))  # type: ignore[misc]
        found, _ = judged(loop, [weight] * 3)
        assert found.verdict == ("inconclusive" if own else "biased"), found.report()


def test_a_padded_loop_that_mixes_samples_is_told_which_module_does() -> None:
    """Both are compared at one length, so that padding is not taken for it."""
    loop = LOOPS["audio with lengths"]()
    loop.model.second = nn.Sequential(loop.model.second, nn.BatchNorm1d(FEATURES).double())
    found, _ = judged(loop, [len(part) / 6 for part in UNEQUAL])
    assert (found.verdict, found.culprit_type) == ("biased", "BatchNorm1d"), found.report()


@pytest.mark.parametrize(("weighed", "verdict"), [(True, "stochastic"), (False, "biased")])
def test_dropout_is_replayed_in_padded_sequences(weighed: bool, verdict: str) -> None:
    """What no micro-batch has drawn belongs to padding."""
    loop = language_model()
    loop.model.dropout = nn.Dropout(0.3)
    counts = [loop.count(samples) for samples in drawn(loop)]
    found, _ = judged(loop, [n / sum(counts) if weighed else 1 / 3 for n in counts])
    assert found.verdict == verdict, found.report()


def test_batch_dim_settles_what_it_is_asked_for() -> None:
    """Given, it is not asked for again."""
    found, _ = judged(language_model(), [1 / 3] * 3, batch_dim=0)
    assert (found.verdict, found.cause) == ("biased", "unequal denominators"), found.report()
    found, _ = judged(language_model(), [1 / 3] * 3, batch_dim=3)
    assert "batch_dim=" not in str(found.detail), found.report()
