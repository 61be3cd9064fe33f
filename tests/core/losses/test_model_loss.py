"""The loss that a model computes itself: accumulated, against one call with the large batch."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp import accumulate_gradients
from gaccum_exp.core.losses.model_loss import ModelLoss
from gaccum_exp.core.losses.model_probe import LossQuery, infer_counters
from gaccum_exp.errors import BadInputError

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROUNDING = 2e-5
"""Relative, of gradients in float32; what is biased here is so by more than a hundredth."""
IGNORED = -100
VOCABULARY, CLASSES = 24, 5

Batch = dict[str, Tensor]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def gradient(model: nn.Module) -> Tensor:
    found = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(found) if found else torch.zeros(1)


def large_batch(make: Callable[[], nn.Module], batch: Batch) -> Tensor:
    """The gradient of one call with all samples, of the model's own mean."""
    model = make()
    outputs = model(**batch)
    (outputs["loss"] if isinstance(outputs, dict) else outputs.loss).backward()
    return gradient(model)


def mean_of_means(make: Callable[[], nn.Module], window: list[Batch]) -> Tensor:
    model = make()
    for batch in window:
        outputs = model(**batch)
        ((outputs["loss"] if isinstance(outputs, dict) else outputs.loss) / len(window)).backward()
    return gradient(model)


def joined(window: list[Batch]) -> Batch:
    """All samples in one micro-batch, padded to the longest."""
    longest = max((t.shape[1] for b in window for t in b.values() if t.ndim > 1), default=0)

    def padded(key: str, t: Tensor) -> Tensor:
        if t.ndim < 2 or t.is_floating_point():
            return t
        return F.pad(t, (0, longest - t.shape[1]), value=IGNORED if key == "labels" else 0)

    return {key: torch.cat([padded(key, b[key]) for b in window]) for key in window[0]}


def sentences(
    lengths: list[int], labels: str = "all", prompts: list[int] | None = None, left: bool = False
) -> Batch:
    """Padded token sequences; labels are the tokens, or classes of some of them.

    Of each sample the first `prompts` labels are ignored.
    """
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    longest = max(lengths)
    rows = []
    for length, prompt in zip(lengths, prompts or [0] * len(lengths), strict=True):
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator)
        if labels == "all":
            wanted = tokens.clone()
        elif labels == "some":
            wanted = torch.where(torch.rand(length, generator=generator) < 0.5, tokens, IGNORED)
        else:
            wanted = torch.randint(CLASSES, (length,), generator=generator)
        wanted[:prompt] = IGNORED
        pad = (longest - length, 0) if left else (0, longest - length)
        rows.append(
            (
                F.pad(tokens, pad),
                F.pad(torch.ones_like(tokens), pad),
                F.pad(wanted, pad, value=IGNORED),
            )
        )
    keys = ("input_ids", "attention_mask", "labels")
    return {key: torch.stack(column) for key, column in zip(keys, zip(*rows, strict=True), strict=True)}


def transformers_model(name: str, **overrides: Any) -> Callable[[], nn.Module]:
    """A maker of one small model of transformers; nothing is downloaded."""
    transformers = pytest.importorskip("transformers", reason="the extra `peers` is not installed")
    kind = name.removesuffix("LMHeadModel").partition("For")[0]
    small: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
    if kind == "GPT2":
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        small |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **dropout}
        small |= {"bos_token_id": 0, "eos_token_id": 0}
    elif kind == "T5":
        small |= {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
        small |= {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    else:
        small |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 2, "max_position_embeddings": 32}
        if kind == "Bert":
            small |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            small |= {"num_labels": CLASSES}
        if kind == "Mixtral":
            small |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{kind}Config")

    def make() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, name)(config(**small | overrides))
        return model.train()

    return make


RAGGED = [sentences([9, 4, 5]), sentences([3]), sentences([12, 2])]
PROMPTS = [
    sentences([9, 4, 5], prompts=[6, 1, 3]),
    sentences([3], prompts=[1]),
    sentences([12, 2], prompts=[3, 1]),
]
ONES = [sentences([n]) for n in (7, 2, 3, 11)]
PAIRS = [sentences([2, 2]), sentences([2]), sentences([2, 2, 2], prompts=[0, 1, 1])]
SILENT = [
    sentences([9, 4], prompts=[2, 0]),
    sentences([5, 5], prompts=[5, 5]),
    sentences([3, 8], prompts=[3, 1]),
]
SILENT_FIRST = [SILENT[1], SILENT[0], SILENT[2]]
LEFT = [sentences([9, 3, 20], left=True, prompts=[2, 1, 18]), sentences([4, 12], left=True)]
CAUSAL = {
    "ragged": RAGGED, "prompts": PROMPTS, "ones": ONES, "two labels": PAIRS,
    "one silent": SILENT, "first silent": SILENT_FIRST, "padded on the left": LEFT,
}  # fmt: skip
MASKED = {
    "ragged": [sentences([9, 4, 5], "some"), sentences([7], "some"), sentences([12, 6], "some")],
    "ones": [sentences([n], "some") for n in (7, 6, 9, 11)],
    "first ignored": [sentences([9, 4, 5], "all", [1, 1, 1]), sentences([6], "all", [1])],
    "one silent": [*SILENT],
    "two labels": PAIRS,
}
CLASSIFIED = {
    "ragged": [
        sentences([9, 4, 5], "classes"),
        sentences([3], "classes"),
        sentences([12, 2], "classes"),
    ],
    "ones": [sentences([n], "classes") for n in (7, 2, 3, 11)],
    "prompts": [sentences([9, 4], "classes", [5, 1]), sentences([3, 7, 7], "classes", [1, 2, 3])],
    "one label each": [sentences([1, 1, 1], "classes"), sentences([1], "classes")],
}


def labelled(window: list[Batch], kind: str) -> list[Batch]:
    """The same sentences, each with one label, or some numbers, in place of its tokens'."""
    generator = torch.Generator().manual_seed(5)

    def labels(count: int) -> Tensor:
        if kind == "class":
            return torch.randint(CLASSES, (count,), generator=generator)
        if kind == "number":
            return torch.randn(count, generator=generator)
        if kind == "numbers":
            return torch.randn(count, CLASSES, generator=generator)
        return torch.randint(2, (count, CLASSES), generator=generator).float()

    return [{**b, "labels": labels(len(b["labels"]))} for b in window]


CASES = [
    *(("GPT2LMHeadModel", {}, CAUSAL[name], name) for name in CAUSAL),
    *(("LlamaForCausalLM", {}, CAUSAL[name], name) for name in CAUSAL),
    *(("BertForMaskedLM", {}, MASKED[name], name) for name in MASKED),
    *(("BertForTokenClassification", {}, CLASSIFIED[name], name) for name in CLASSIFIED),
    ("T5ForConditionalGeneration", {}, RAGGED, "ragged"),
    ("T5ForConditionalGeneration", {}, SILENT, "one silent"),
    ("BertForSequenceClassification", {}, labelled(RAGGED, "class"), "class"),
    ("BertForSequenceClassification", {}, labelled(ONES, "class"), "class, ones"),
    ("BertForSequenceClassification", {"num_labels": 1}, labelled(RAGGED, "number"), "number"),
    ("BertForSequenceClassification", {"num_labels": 1}, labelled(ONES, "number"), "number, ones"),
    (
        "BertForSequenceClassification",
        {"problem_type": "regression"},
        labelled(RAGGED, "numbers"),
        "numbers",
    ),
    ("BertForSequenceClassification", {}, labelled(RAGGED, "marks"), "several classes each"),
    ("MixtralForCausalLM", {}, RAGGED, "without its auxiliary loss"),
]


@pytest.mark.parametrize(
    ("name", "overrides", "window"),
    [case[:3] for case in CASES],
    ids=[f"{name}: {data}" for name, _, _, data in CASES],
)
def test_a_model_of_transformers_accumulates_to_one_call_with_the_large_batch(
    name: str, overrides: Any, window: list[Batch]
) -> None:
    """Global mean and sum, counted late in the first window and beforehand in the second, in float32."""
    make = transformers_model(name, **overrides)
    whole = joined(window)
    expected = large_batch(make, whole)
    for reduction in ("global_mean", "sum"):
        loss_fn = ModelLoss(reduction=reduction)
        for _ in range(2):
            model = make()
            loss = accumulate_gradients(model, loss_fn, window, reduction=reduction)  # type: ignore[arg-type]
            scale = loss.denominator if reduction == "sum" else 1
            assert relative(gradient(model), expected * scale) < ROUNDING
            assert float(loss.loss_sum / loss.denominator) == pytest.approx(
                float(make()(**whole).loss.detach()), rel=ROUNDING
            )
        counts = [loss_fn.count(micro_batch) for micro_batch in window]
        assert loss.denominator == sum(n for n in counts if n is not None)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForMaskedLM"])
def test_mean_is_the_mean_of_the_models_own_means_and_biased(name: str) -> None:
    """The plain loop with loss / N, which on these sentences is not the large batch."""
    make = transformers_model(name)
    model = make()
    accumulate_gradients(model, ModelLoss(reduction="mean"), RAGGED, reduction="mean")
    assert relative(gradient(model), mean_of_means(make, RAGGED)) < ROUNDING
    assert relative(gradient(model), large_batch(make, joined(RAGGED))) > 0.01


@pytest.mark.parametrize(
    ("name", "shifted"),
    [("GPT2LMHeadModel", True), ("LlamaForCausalLM", True), ("BertForMaskedLM", False)],
)
def test_what_counts_is_found_out(name: str, shifted: bool) -> None:
    """A model that shifts its labels leaves out each sample's first, whatever the data begin with."""
    make = transformers_model(name)
    for first in (RAGGED[0], PROMPTS[0], ONES[0], SILENT[1], LEFT[0], PAIRS[0]):
        loss_fn = ModelLoss()
        assert loss_fn.count(first) is None
        loss_fn(make(), first)
        for micro_batch in (*RAGGED, *SILENT, *LEFT):
            labels = micro_batch["labels"][:, 1:] if shifted else micro_batch["labels"]
            assert loss_fn.count(micro_batch) == int((labels != IGNORED).sum())


def test_a_mixture_of_experts_with_its_auxiliary_loss_is_refused() -> None:
    """A coefficient of a thousandth is enough; under mean it is the plain loop."""
    make = transformers_model(
        "MixtralForCausalLM", output_router_logits=True, router_aux_loss_coef=0.001
    )
    for reduction in ("global_mean", "sum"):
        with pytest.raises(
            BadInputError, match=f"{reduction} is refused .* Mixtral.*: only a part of it"
        ):
            accumulate_gradients(make(), ModelLoss(reduction=reduction), RAGGED)
    model = make()
    accumulate_gradients(model, ModelLoss(reduction="mean"), RAGGED, reduction="mean")
    assert relative(gradient(model), mean_of_means(make, RAGGED)) < ROUNDING


class Toy(nn.Module):
    """Scores every position of (batch, length, 3) features; subclasses say what the loss is."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, classes))

    def losses(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy at every position, zero where the label is ignored."""
        at_label = self.body(x).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1))
        return -at_label.squeeze(-1) * (labels != IGNORED)


class TakesCount(Toy):
    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
        n = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": self.losses(x, labels).sum() / n}


class TakesNoCount(Toy):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(loss=self.losses(x, labels).sum() / (labels != IGNORED).sum())


class IgnoresCount(Toy):
    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        return {"loss": self.losses(x, labels).sum() / (labels != IGNORED).sum()}


class Shifts(Toy):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        wanted = labels[:, 1:]
        return {"loss": self.losses(x[:, :-1], wanted).sum() / (wanted != IGNORED).sum()}


class ShiftsWithCount(Toy):
    def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        wanted = labels[:, 1:]
        n = kwargs.get("num_items_in_batch", (wanted != IGNORED).sum())
        return {"loss": self.losses(x[:, :-1], wanted).sum() / n}


class NeverTold(Toy):
    """Zero logits: every label has the same loss, and nothing can be read off the values."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.body[2].weight)
        nn.init.zeros_(self.body[2].bias)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return {"loss": self.losses(x, labels).sum() / (labels != IGNORED).sum()}


class NeverToldShifts(NeverTold):
    forward = Shifts.forward  # type: ignore[assignment]


class WithAuxiliary(Toy):
    """A load-balancing term beside the mean: the square of a mean is no mean of squares."""

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        shares = self.body(x).softmax(-1).flatten(0, 1).mean(0)
        mean = self.losses(x, labels).sum() / (labels != IGNORED).sum()
        return {"loss": mean + 0.1 * shares.square().sum()}


class WithAuxiliaryAndCount(Toy):
    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
        shares = self.body(x).softmax(-1).flatten(0, 1).mean(0)
        n = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": self.losses(x, labels).sum() / n + 0.01 * shares.square().sum()}


class MeanOfSamples(Toy):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        counts = (labels != IGNORED).sum(1).clamp(min=1)
        return {"loss": (self.losses(x, labels).sum(1) / counts).mean()}


class OverAllPositions(Toy):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return {"loss": self.losses(x, labels).mean()}


class Summed(Toy):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return {"loss": self.losses(x, labels).sum()}


class Weighted(Toy):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        weight = torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0])
        return {"loss": F.cross_entropy(self.body(x).movedim(-1, 1), labels, weight)}


class PartOfItFollows(Toy):
    """Half of the loss is divided by the count and half of it is not."""

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
        own = (labels != IGNORED).sum()
        n = own if num_items_in_batch is None else num_items_in_batch
        total = self.losses(x, labels).sum()
        return {"loss": (total / n + total / own) / 2}


class ThreefoldUnderCount(Toy):
    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
        n = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch / 3
        return {"loss": self.losses(x, labels).sum() / n}


class CountsOtherwise(Toy):
    """Under a count it is a sum over labels, by itself a mean over all positions."""

    def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
        n = labels.numel() if num_items_in_batch is None else num_items_in_batch
        return {"loss": self.losses(x, labels).sum() / n}


def points(counts: list[int], length: int = 6, seed: int = 0) -> Batch:
    """Features, and labels of which each sample has so many that count, at places of their own."""
    generator = torch.Generator().manual_seed(seed + 7 * len(counts) + sum(counts))
    x = torch.randn(len(counts), length, 3, generator=generator)
    labels = torch.randint(CLASSES, (len(counts), length), generator=generator)
    for row, count in zip(labels, counts, strict=True):
        row[torch.randperm(length, generator=generator)[count:]] = IGNORED
    return {"x": x, "labels": labels}


POINTS = [points([6, 1, 3]), points([2]), points([0, 5])]
SPARSE = [points([0]), points([1, 1]), points([6, 0, 6]), points([0, 0])]


@pytest.mark.parametrize(
    "kind",
    [TakesCount, TakesNoCount, IgnoresCount, Shifts, ShiftsWithCount, NeverTold, NeverToldShifts],
)
@pytest.mark.parametrize("window", [POINTS, SPARSE, POINTS[::-1], SPARSE[::-1]])
def test_a_model_of_ones_own_accumulates_to_one_call_with_the_large_batch(
    kind: type[Toy], window: list[Batch]
) -> None:
    """With the count or without, shifting or not; the mean of nothing is NaN in all of them."""
    expected = large_batch(kind, joined(window))
    for reduction in ("global_mean", "sum"):
        loss_fn = ModelLoss(reduction=reduction)
        for _ in range(2):
            model = kind()
            loss = accumulate_gradients(model, loss_fn, window, reduction=reduction)  # type: ignore[arg-type]
            scale = loss.denominator if reduction == "sum" else 1
            assert relative(gradient(model), expected * scale) < ROUNDING


@pytest.mark.parametrize("kind", [TakesNoCount, IgnoresCount])
def test_a_micro_batch_of_ignored_labels_counts_nothing_and_gives_no_nan(kind: type[Toy]) -> None:
    """Neither in the loss nor in the gradient, where the model itself gives NaN in both."""
    silent = points([0, 0])
    model = kind()
    outputs: Any = model(**silent)
    (outputs["loss"] if isinstance(outputs, dict) else outputs.loss).backward()
    assert gradient(model).isnan().any()
    loss_fn = ModelLoss()
    loss_fn(kind(), POINTS[0])
    model = kind()
    loss, n = loss_fn(model, silent)
    loss.backward()
    assert (float(loss.detach()), n) == (0.0, 0.0)
    assert not gradient(model).any()


@pytest.mark.parametrize(
    "kind",
    [
        WithAuxiliary,
        WithAuxiliaryAndCount,
        MeanOfSamples,
        OverAllPositions,
        Summed,
        Weighted,
        PartOfItFollows,
        CountsOtherwise,
        ThreefoldUnderCount,
    ],
)
@pytest.mark.parametrize("first", [points([6, 1, 3]), points([6, 6]), points([2, 5], length=2)])
def test_a_loss_that_is_no_mean_over_its_labels_is_refused(kind: type[Toy], first: Batch) -> None:
    """Under global_mean and sum, in words; under mean it is the plain loop's."""
    for reduction in ("global_mean", "sum"):
        with pytest.raises(BadInputError) as refused:
            accumulate_gradients(kind(), ModelLoss(reduction=reduction), [first], reduction=reduction)  # type: ignore[arg-type]
        said = str(refused.value)
        assert said.startswith(
            f"accum.reduction={reduction} is refused for the loss of {kind.__name__}: "
        )
        assert "use accum.reduction=mean, or a loss_fn(model, micro_batch)" in said
        partly = kind in (PartOfItFollows, WithAuxiliaryAndCount)
        assert ("only a part of it is divided by num_items_in_batch" in said) == partly
        assert "\n" not in said
    window = [first, points([3]), points([4, 1, 6])]
    model = kind()
    accumulate_gradients(model, ModelLoss(reduction="mean"), window, reduction="mean")
    assert relative(gradient(model), mean_of_means(kind, window)) < ROUNDING


def test_one_sample_is_enough_to_refuse_what_labels_show() -> None:
    """The first micro-batch may hold no more; only what depends on other samples is not seen then."""
    for kind in (
        MeanOfSamples,
        OverAllPositions,
        Summed,
        Weighted,
        PartOfItFollows,
        WithAuxiliaryAndCount,
    ):
        with pytest.raises(BadInputError, match=kind.__name__):
            ModelLoss()(kind(), points([6]))


def test_class_weights_are_seen_where_all_samples_have_one_class() -> None:
    """A label for each sample, 1 or 0 in all of them: the other class weighs something else."""

    class WeightedSamples(Toy):
        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return {
                "loss": F.cross_entropy(self.body(x), labels, torch.tensor([1.0, 4.0, 2.0, 1.0, 1.0]))
            }

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for label in (0, 1):
        for samples in (4, 1):
            with pytest.raises(BadInputError, match="WeightedSamples: it is no mean over its labels"):
                ModelLoss()(
                    WeightedSamples(), {"x": x[:samples], "labels": torch.full((samples,), label)}
                )


def test_labels_of_a_probe_are_where_labels_are() -> None:
    """A model that also leaves out what its mask leaves out, on sequences padded on the left."""

    class Masks(Toy):
        def forward(self, x: Tensor, mask: Tensor, labels: Tensor) -> Any:
            wanted = labels.masked_fill(mask == 0, IGNORED)
            return {"loss": self.losses(x, wanted).sum() / (wanted != IGNORED).sum()}

    x = torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.full((3, 8), IGNORED)
    labels[0, 4:], labels[1, [0, 7]], labels[2, 5:] = 1, 2, 3
    mask = torch.ones_like(labels)
    mask[0, :4] = mask[2, :5] = 0
    loss_fn = ModelLoss()
    loss_fn(Masks(), {"x": x, "mask": mask, "labels": labels})
    assert loss_fn.count({"labels": labels}) == 9


def test_where_losses_are_too_much_alike_nothing_is_guessed() -> None:
    """Zero logits, and a model that cannot be run in another precision."""

    class OnlyFloat(NeverTold):
        def forward(self, x: Tensor, labels: Tensor) -> Any:
            assert x.dtype == torch.float32, "mind the precision"
            return super().forward(x, labels)

    with pytest.raises(
        BadInputError, match="OnlyFloat: the losses of different labels are too much alike"
    ):
        ModelLoss()(OnlyFloat(), POINTS[0])


@pytest.mark.parametrize("kind", [TakesNoCount, TakesCount, Shifts, NeverTold])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_precision_are_found_out(kind: type[Toy], dtype: torch.dtype) -> None:
    """In half precision two losses may round to one number; the loss sum is float32 at least."""
    window = [{**b, "x": b["x"].to(dtype)} for b in POINTS]
    loss_fn = ModelLoss()
    loss, n = loss_fn(kind().to(dtype), window[0])
    shifted = [b["labels"][:, 1:] if kind is Shifts else b["labels"] for b in POINTS]
    counts = [int((labels != IGNORED).sum()) for labels in shifted]
    assert n == counts[0]
    assert [loss_fn.count(b) for b in window] == counts
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_transformers_are_found_out_in_half_precision(dtype: torch.dtype) -> None:
    """A loss in float32 of bfloat16 logits, and one in bfloat16 itself."""
    for name, window in (("GPT2LMHeadModel", RAGGED), ("BertForMaskedLM", MASKED["ragged"])):
        loss_fn = ModelLoss()
        model = transformers_model(name)().to(dtype)
        loss_fn(model, window[0])
        first = int(name.startswith("GPT2"))
        for micro_batch in window:
            assert loss_fn.count(micro_batch) == int((micro_batch["labels"][:, first:] != IGNORED).sum())


def test_a_sum_of_bfloat16_means_keeps_its_count() -> None:
    """257 labels: in bfloat16 that number is 256, and the mean's sum was off by as much."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16))

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            wanted = labels != IGNORED
            total = (self.level[labels.clamp(min=0)] * wanted).float().sum()
            return {"loss": (total / wanted.sum()).bfloat16()}

    labels = torch.full((1, 257), 0)
    few = torch.tensor([[0, 1, 2, 1]])
    loss_fn = ModelLoss()
    loss_fn(Constant(), {"x": few, "labels": few})
    model = Constant()
    loss, n = loss_fn(model, {"x": labels, "labels": labels})
    assert (float(loss.detach()), n) == (257.0, 257.0)


def test_keys_count_and_ignored_label_may_have_other_names() -> None:
    """Labels under `y`, 0 for what does not count, the count as `total`."""

    class Other(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, y: Tensor, **told: Any) -> Any:
            assert told.keys() <= {"total"}
            named = {"num_items_in_batch": told["total"]} if told else {}
            return self.inner(x=x, labels=torch.where(y == 0, IGNORED, y - 1), **named)

    for inner in (TakesCount, IgnoresCount):
        for plain in (POINTS, SPARSE):
            labels = [torch.where(b["labels"] == IGNORED, 0, b["labels"] + 1) for b in plain]
            window = [{"x": b["x"], "y": y} for b, y in zip(plain, labels, strict=True)]
            model = Other(inner())
            loss_fn = ModelLoss(labels="y", count_argument="total", ignore_index=0)
            loss = accumulate_gradients(model, loss_fn, window)
            assert relative(gradient(model), large_batch(inner, joined(plain))) < ROUNDING
            assert loss.denominator == sum(int((y != 0).sum()) for y in labels)


def test_a_model_that_takes_the_count_is_asked_for_a_sum_and_no_other_is_handed_it() -> None:
    """A count of one in every pass; a model that only swallows it gets none once it is known."""
    handed: list[Any] = []

    class Noting(TakesCount):
        def forward(self, x: Tensor, labels: Tensor, num_items_in_batch: Any = None) -> Any:
            handed.append(num_items_in_batch)
            return super().forward(x, labels, num_items_in_batch)

    class Swallowing(IgnoresCount):
        def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Any:
            handed.append(kwargs.get("num_items_in_batch"))
            return super().forward(x, labels)

    for kind, expected in ((Noting, 1), (Swallowing, None)):
        loss_fn = ModelLoss()
        accumulate_gradients(kind(), loss_fn, POINTS)
        handed.clear()
        accumulate_gradients(kind(), loss_fn, POINTS)
        assert handed == [expected] * 3


@pytest.mark.parametrize("precision", ["bfloat16 autocast", "none"])
def test_looking_at_the_model_leaves_no_trace(precision: str) -> None:
    """It is done in evaluation mode without autocast, and everything stays as it was."""

    class Normed(TakesNoCount):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.drop = nn.Dropout(0.5)
            self.frozen = nn.BatchNorm1d(3).eval()

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            assert not torch.is_autocast_enabled("cpu")
            assert not self.training
            return super().forward(self.drop(self.norm(x)), labels)

    model, micro_batch = Normed(), points([6, 2, 3])
    kept = {k: t.clone() for k, t in micro_batch.items()}
    state = {k: t.clone() for k, t in model.state_dict().items()}
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "none"), torch.no_grad():
        infer_counters(model, LossQuery("labels", "num_items_in_batch", IGNORED), micro_batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model.frozen.training
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, kept[k]) for k, t in micro_batch.items())


def test_what_is_no_micro_batch_for_a_model_is_refused_with_its_keys() -> None:
    """A pair, a mapping without labels, a model that returns no loss."""
    pair = tuple(POINTS[0].values())
    with pytest.raises(BadInputError, match=r"with a tensor 'labels' \(their keys are: none\)"):
        ModelLoss()(TakesCount(), pair)
    x, y = POINTS[0].values()
    for micro_batch in ({"x": x, "y": y}, {"x": x, "labels": y.tolist(), "y": y}):
        with pytest.raises(BadInputError, match=r"with a tensor 'labels' \(their keys are: x, .*y\)"):
            ModelLoss()(TakesCount(), micro_batch)

    class Lossless(Toy):
        def __init__(self, outputs: Any) -> None:
            super().__init__()
            self._outputs = outputs

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return self._outputs

    for outputs in ({"logits": torch.zeros(1)}, torch.zeros(1), (torch.zeros(1),), {"loss": None}):
        with pytest.raises(BadInputError, match=f"Lossless returns no loss: {type(outputs).__name__}"):
            ModelLoss()(Lossless(outputs), POINTS[0])


def test_an_error_of_the_models_own_is_not_swallowed() -> None:
    """Not even a TypeError, which is how a model says that it takes no count."""

    class Broken(Toy):
        def forward(self, x: Tensor, labels: Tensor, **kwargs: Any) -> Any:
            raise TypeError("mind the gap")

    with pytest.raises(TypeError, match="mind the gap"):
        ModelLoss()(Broken(), POINTS[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segmentations_are_a_mean_over_their_pixels(dtype: torch.dtype) -> None:
    """Labels of three dimensions, some ignored."""

    class Pixels(Toy):
        def forward(self, x: Tensor, labels: Tensor) -> Any:
            return {"loss": F.cross_entropy(self.body(x).movedim(-1, 1), labels)}

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, 5, 3, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES, (6, 4, 5), generator=generator)
    labels[torch.rand(6, 4, 5, generator=generator) < 0.4] = IGNORED
    window = [
        {"x": a, "labels": b} for a, b in zip(x.split([3, 1, 2]), labels.split([3, 1, 2]), strict=True)
    ]
    make = lambda: Pixels().to(dtype)  # noqa: E731
    model = make()
    accumulate_gradients(model, ModelLoss(), window)
    assert relative(gradient(model), large_batch(make, {"x": x, "labels": labels})) < ROUNDING


class PredictsNext(nn.Module):
    """Scores the next token of (batch, length) tokens; the model itself shifts the labels, or not."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shift, self.body = shift, nn.Sequential(nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        length = labels.shape[1] - self.shift
        logits = self.body(input_ids)[:, :length]
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels[:, self.shift :].flatten())}


@pytest.mark.parametrize(("model_shifts", "data_shifts"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_labels_that_are_shifted_twice_are_refused(model_shifts: int, data_shifts: int) -> None:
    """By the data and by the model: it would learn the token after the next. Once is what is meant."""
    tokens = torch.randint(CLASSES, (6, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens[:, :8], "labels": tokens[:, data_shifts : 8 + data_shifts].clone()}
    batch["labels"][0, 5:] = IGNORED
    window = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 4), slice(4, 6))]
    model = PredictsNext(model_shifts)
    if not (model_shifts and data_shifts):
        accumulate_gradients(model, ModelLoss(), window)
        return
    with pytest.raises(BadInputError, match=r"shifts them itself.*data\.shift_labels=false"):
        accumulate_gradients(model, ModelLoss(), window)
