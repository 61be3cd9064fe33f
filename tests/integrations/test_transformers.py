"""`watch` and the callback around the transformers Trainer."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gaccum_exp import watch
from tests.integrations.small import WithLoss, adamw, points, same, weights

transformers = pytest.importorskip("transformers", reason="the extra `peers` is not installed")
pytest.importorskip("accelerate", reason="the extra `peers` is not installed")
integration = pytest.importorskip("gaccum_exp.integrations.transformers")

LENGTHS = (12, 3, 9, 5, 4, 12, 11, 10, 3, 3, 4, 12, 7, 6, 5, 12)
"""Tokens of 16 sentences: micro-batches of four hold 29, 37, 22 and 30."""


def rows(count: int) -> list[dict[str, Any]]:
    """Return labelled points, one by one."""
    x, y = points(count)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def sentences() -> list[dict[str, Any]]:
    """Return token sequences padded to the longest."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for length in LENGTHS:
        mask = (torch.arange(max(LENGTHS)) < length).long()
        tokens = torch.randint(1, 32, mask.shape, generator=generator) * mask
        labels = torch.where(mask.bool(), tokens, -100)
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return found


def llama() -> Any:
    """Return a causal language model that takes `num_items_in_batch`; nothing is downloaded."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


class OwnMean(nn.Module):
    """The same model with a signature that takes no count: each micro-batch is divided by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        found = self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return {"loss": found.loss, "logits": found.logits}


def trained(
    folder: Path, model: Any, data: Any, watched: bool = True, callbacks: Any = (), **settings: Any
) -> tuple[list[torch.Tensor], Any]:
    """Train one epoch with N = 4 and micro-batches of four; return weights and audit."""
    optimizer = adamw(model)
    arguments = transformers.TrainingArguments(
        **{"num_train_epochs": 1, "save_strategy": "no", "logging_strategy": "no"} | settings,
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=list(callbacks)
    )
    with watch(model, None, optimizer) if watched else nullcontext() as audit:
        trainer.train()
    return weights(model), audit


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_equal_micro_batches_of_a_plain_model_are_equivalent(tmp_path: Path, precision: Any) -> None:
    """`train` as a whole inside the block: no verdict and no check against it."""
    _, audit = trained(tmp_path, WithLoss(), rows(32), **precision)
    assert [(w.verdict, w.accum_steps) for w in audit.windows] == [("equivalent", 4)] * 2, str(audit)
    assert audit.sound, str(audit.checks)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_short_last_micro_batch_of_a_plain_model_is_biased(tmp_path: Path, precision: Any) -> None:
    """The Trainer divides what the model returns by N."""
    _, audit = trained(tmp_path, WithLoss(), rows(15), **precision)
    assert (audit.verdict, audit.cause) == ("biased", "unequal denominators"), str(audit)


def test_a_partial_last_window_of_the_trainer_is_equivalent(tmp_path: Path) -> None:
    """The Trainer divides by the micro-batches that the window holds."""
    _, audit = trained(tmp_path, WithLoss(), rows(24))
    assert [(w.verdict, w.accum_steps) for w in audit.windows] == [("equivalent", 4), ("equivalent", 2)]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_a_model_that_takes_the_count_is_equivalent_on_sentences_of_unequal_length(
    tmp_path: Path, precision: Any
) -> None:
    """Llama divides by `num_items_in_batch`, the tokens of the whole window."""
    _, audit = trained(tmp_path, llama(), sentences(), **precision)
    assert [(w.verdict, w.accum_steps) for w in audit.windows] == [("equivalent", 4)], str(audit)
    assert audit.sound, str(audit.checks)


def test_a_model_that_takes_no_count_is_biased_on_sentences_of_unequal_length(tmp_path: Path) -> None:
    """The same Llama behind a signature without it: a mean of means over tokens."""
    _, audit = trained(tmp_path, OwnMean(), sentences())
    assert (audit.verdict, audit.cause) == ("biased", "unequal denominators"), str(audit)
    assert audit.e > 0.01


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_trainer_ends_bit_for_bit_as_without_watch(tmp_path: Path, dropout: float) -> None:
    """Weights and random state after three windows, clipped; with dropout too."""
    ends = []
    for watched in (False, True):
        end, audit = trained(tmp_path, WithLoss(dropout), rows(47), watched)
        ends.append((end, torch.get_rng_state()))
    assert len(audit.windows) == 3
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_the_callback_judges_the_windows_that_are_due(tmp_path: Path) -> None:
    """Every second of four, each with its four micro-batches."""
    audit = integration.AuditCallback(every_n_steps=2)
    trained(tmp_path, WithLoss(), rows(64), watched=False, callbacks=[audit])
    found = [(step, a.verdict, a.accum_steps) for step, a in audit.audits]
    assert found == [(0, "equivalent", 4), (2, "equivalent", 4)]


def test_the_callback_judges_every_partial_window_and_sums_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However seldom windows are due: two epochs of four and two micro-batches."""
    audit = integration.AuditCallback(every_n_steps=1000)
    trained(tmp_path, WithLoss(), rows(24), False, [audit], num_train_epochs=2)
    assert [(step, a.accum_steps) for step, a in audit.audits] == [(0, 4), (1, 2), (3, 2)]
    assert "gradient accumulation: of the windows judged 3 equivalent\n" in capsys.readouterr().out


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_callback_leaves_the_training_bit_for_bit_as_it_was(tmp_path: Path, dropout: float) -> None:
    """Weights and random state after two epochs; nothing stays attached."""
    ends = []
    for callbacks in ([], [integration.AuditCallback(every_n_steps=1)]):
        model = WithLoss(dropout)
        end, _ = trained(tmp_path, model, rows(32), False, callbacks, num_train_epochs=2)
        ends.append((end, torch.get_rng_state()))
        assert not model._forward_hooks
        assert sys.getprofile() is None
    assert same(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert [step for step, _ in callbacks[0].audits] == [0, 1, 2, 3]


def test_the_callback_warns_of_a_bias_once_per_cause(tmp_path: Path) -> None:
    """Two epochs with a short micro-batch each: two audits that are biased, one warning."""
    audit = integration.AuditCallback(every_n_steps=1)
    with pytest.warns(UserWarning, match="divide it by what the whole window counts") as said:
        trained(tmp_path, WithLoss(), rows(15), False, [audit], num_train_epochs=2)
    assert [a.verdict for _, a in audit.audits] == ["biased", "biased"]
    assert len([w for w in said if "what the whole window counts" in str(w.message)]) == 1


def test_the_callback_can_be_closed_after_a_training_that_fails(tmp_path: Path) -> None:
    """The Trainer tells it nothing; `close`, or the next training, takes its hooks away."""

    class Failing(WithLoss):
        calls = 0

        def forward(self, x: Any, labels: Any) -> Any:
            self.calls += 1
            if self.calls == 3:
                raise RuntimeError("out of luck")
            return super().forward(x, labels)

    audit, model = integration.AuditCallback(), Failing()
    with pytest.raises(RuntimeError, match="out of luck"):
        trained(tmp_path, model, rows(32), False, [audit])
    audit.close()
    assert sys.getprofile() is None
    assert not model._forward_hooks
