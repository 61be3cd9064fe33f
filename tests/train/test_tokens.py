"""Language models: what is reported is per token, and what a window holds is no matter of its order."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from gaccum_exp.core.losses.micro_batch import tokens_in
from gaccum_exp.errors import BadInputError
from gaccum_exp.train.build import build
from gaccum_exp.train.clock import WARMUP_WINDOWS, WindowClock
from gaccum_exp.train.evaluation import evaluate
from gaccum_exp.train.loop import train_step, training_windows
from gaccum_exp.train.state import Experiment
from tests.support import SMALL, STRANGER, settings, trained

TOKENS = (
    "model=gpt", "model.layers=1", "model.width=8", "model.heads=2", "criterion=token_cross_entropy",
    "data=ragged", "data.size=22", "data.eval_size=9", "data.mean_length=6", "data.vocab_size=8",
    "data.global_batch_size=6", "runtime.device=cpu", "runtime.precision=fp64", "audit.at_start=false",
)  # fmt: skip
TEXT = "\n\n".join(f"one {i} line, and then {'more ' * (i % 4)}" for i in range(12))


def weights(experiment: Experiment) -> Tensor:
    return torch.cat([p.detach().flatten() for p in experiment.parameters])


def summed(experiment: Experiment, micro_batch: dict[str, Tensor]) -> tuple[float, int]:
    """Return the loss sum of what is to be predicted, and how many tokens that is, token by token."""
    total, tokens = 0.0, 0
    logits = experiment.model(micro_batch["input_ids"])
    for row, labels in zip(logits, micro_batch["labels"], strict=True):
        for scores, label in zip(row, labels, strict=True):
            if label != -100:
                total, tokens = total + float(F.cross_entropy(scores, label)), tokens + 1
    return total, tokens


@pytest.mark.parametrize("n", [1, 4])
def test_losses_are_per_token(n: int) -> None:
    """Of training and of evaluation, over sequences of unequal length; perplexity is e to that."""
    experiment = build(settings(*TOKENS, f"accum.steps={n}"))
    assert experiment.eval_data is not None
    with torch.no_grad():
        window = next(training_windows(experiment))
        sums = [summed(experiment, micro_batch) for micro_batch in window]
        held_out = [summed(experiment, {k: v[None] for k, v in sample.items()})
                    for sample in (experiment.eval_data[i] for i in range(9))]  # fmt: skip
    expected, on_held_out = (sum(s for s, _ in of) / sum(t for _, t in of) for of in (sums, held_out))
    values = evaluate(experiment)
    assert float(values["eval/loss"]) == pytest.approx(on_held_out, rel=1e-12)
    assert float(values["eval/perplexity"]) == pytest.approx(math.exp(on_held_out), rel=1e-12)
    assert float(train_step(experiment, window, 0)["train/loss"]) == pytest.approx(expected, rel=1e-12)


def test_tokens_are_those_to_be_predicted_by_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is none; the median over full windows after the warm-up, each taken to last 2 s here."""
    monkeypatch.setattr(WindowClock, "_seconds", lambda *_: 2.0)
    common = (*TOKENS, "accum.steps=4", "train.steps=15")
    _, sink = trained(*common)
    experiment = build(settings(*common))
    tokens = [
        sum(int((micro_batch["labels"] != -100).sum()) for micro_batch in window)
        for step, window in enumerate(training_windows(experiment))
        if experiment.is_full(step) and step != 2  # whose memory is measured
    ]
    counted = sorted(tokens[WARMUP_WINDOWS:])
    assert len(counted) > 2
    middle = (counted[(len(counted) - 1) // 2] + counted[len(counted) // 2]) / 2
    assert sink.last["throughput/tokens_per_s"] == middle / 2
    assert sink.last["throughput/samples_per_s"] == 3.0


def test_images_have_neither_tokens_nor_perplexity() -> None:
    """Their labels are no sequences."""
    _, sink = trained(*SMALL, "train.steps=8")
    assert "eval/loss" in sink.last
    assert "throughput/samples_per_s" in sink.last
    assert not [key for key in sink.last if "token" in key or "perplexity" in key]


@pytest.mark.parametrize("n", [1, 4])
def test_a_window_sorted_by_length_holds_the_same_samples(n: int) -> None:
    """Shortest first, so that less is padded; in float64 training ends where it did."""
    common = (*TOKENS, f"accum.steps={n}", "train.epochs=2")
    plain, in_order = (build(settings(*common, f"data.sort_by_length={on}")) for on in ("false", "true"))
    padded = [0, 0]
    for pair in zip(training_windows(plain), training_windows(in_order), strict=True):
        contents: list[list[Any]] = []
        for i, window in enumerate(pair):
            rows = [row for micro_batch in window for row in zip(*micro_batch.values(), strict=True)]
            contents.append([labels[labels != -100].tolist() for _, labels in rows])
            padded[i] += sum(int((labels == -100).sum()) for _, labels in rows)
        assert sorted(contents[0]) == sorted(contents[1])
        assert [len(c) for c in contents[1]] == sorted(len(c) for c in contents[0])
    assert padded[1] == padded[0] if n == 1 else padded[1] < 0.8 * padded[0]
    ends = [weights(trained(*common, f"data.sort_by_length={on}")[0]) for on in ("false", "true")]
    assert torch.allclose(*ends, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("+data.sort_by_length=true",), "does not say how long its samples are .*`lengths`"),
        (("+data.sort_by_length=1",), "data.sort_by_length=1: not true or false"),
    ],
)
def test_data_without_lengths_cannot_be_sorted_by_them(overrides: tuple[str, ...], said: str) -> None:
    """Refused with what would be needed."""
    with pytest.raises(BadInputError, match=said):
        build(settings(*STRANGER, *overrides))


def test_unequal_sequences_train_as_the_large_batch_by_tokens_and_not_by_micro_batches() -> None:
    """N = 4 of sequences whose lengths differ: the global mean is exact, the mean of means is not."""
    common = (*TOKENS, "train.epochs=2")
    reference = weights(trained(*common)[0])
    exact = weights(trained(*common, "accum.steps=4")[0])
    biased = weights(trained(*common, "accum.steps=4", "accum.reduction=mean")[0])
    assert (exact - reference).norm() < 1e-12 * reference.norm()
    assert (biased - reference).norm() > 1e-4 * reference.norm()


def test_transformers_own_model_and_loss_train_as_the_large_batch(tmp_path: Path) -> None:
    """GPT-2 by _target_ on paragraphs of text; its loss is computed in float32, as it has it."""
    (tmp_path / "text").write_text(TEXT)
    common = (
        "model=custom", "model._target_=tests.strangers.tiny_gpt2", "+model.vocab_size=null",
        "criterion=model_loss", "data=text", f"data.root={tmp_path / 'text'}", "data.layout=paragraphs",
        "data.context=16", "data.shift_labels=false", "data.global_batch_size=7", "train.epochs=2",
        "runtime.device=cpu", "runtime.precision=fp64",
    )  # fmt: skip
    reference, sink = trained(*common)
    arm, other = trained(*common, "accum.steps=4")
    assert sink.tags["verdict"] == "identical"
    assert other.tags["verdict"] == "equivalent"
    assert (weights(arm) - weights(reference)).norm() < 1e-12 * weights(reference).norm()
    assert other.curve("train/loss") == pytest.approx(sink.curve("train/loss"), rel=1e-6)
    assert sink.curve("eval/perplexity") == [pytest.approx(math.exp(x)) for x in sink.curve("eval/loss")]
    biased, _ = trained(*common, "accum.steps=4", "accum.reduction=mean")
    assert (weights(biased) - weights(reference)).norm() > 1e-4 * weights(reference).norm()


def test_only_labels_that_count_are_tokens() -> None:
    """Not those that the criterion ignores by another index, nor a set of classes for each sample."""
    ignoring = build(settings(*TOKENS, "+criterion.ignore_index=3", "data.length_cv=0.0"))
    window = next(training_windows(ignoring))
    counted = [tokens_in(micro_batch, ignoring.ignore_index) for micro_batch in window]
    assert [int(n) for n in counted if n is not None] == [
        int((micro_batch["labels"] != 3).sum()) for micro_batch in window
    ]
    several = build(settings(*STRANGER, "criterion._target_=torch.nn.MultiLabelMarginLoss",
                             "data.train._target_=tests.train.test_tokens.Several"))  # fmt: skip
    assert not several.counts_tokens


class Several(Dataset[tuple[Tensor, Tensor]]):
    """Samples that belong to several of three classes, as `nn.MultiLabelMarginLoss` has them."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.ones(2, dtype=torch.float64), torch.tensor([index % 3, -1, -1])
