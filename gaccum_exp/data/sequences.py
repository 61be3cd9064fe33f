"""Token sequences of equal or unequal lengths: fetched by index, padded a micro-batch at a time."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gaccum_exp.errors import BadInputError, nearest

IGNORED = -100
"""The label of a position that holds nothing to predict: torch's own `ignore_index`."""

PADDING_TOKEN = 0
"""What stands in `input_ids` there. Any token would do, since a causal model looks ahead of none."""

PADDINGS = ("longest", "max_length")

MicroBatch = dict[str, Tensor]


class TokenSequences(Dataset[MicroBatch]):
    """Stretches of one long row of tokens, each a sample for next-token prediction.

    Args:
        tokens: every token, (tokens,), of any integer dtype; stretches may overlap.
        starts: where in it each sample begins, (samples,), int64.
        lengths: tokens of each sample's `input_ids`, (samples,), int64, at least 1 each.
        classes: the name of every token; their number is the size of the vocabulary.
        shift_labels: labels are the tokens one place on, for a model whose output at a position is
            about the next one; a sample then reaches over its length by one token. Else they
            equal the input, for models that shift them inside (Hugging Face's).
        padding: pad a micro-batch to its own longest sequence (`longest`), or to that of the whole
            data set (`max_length`). The loss is the same, `longest` computes less.

    A sample is {"input_ids": (length,), "labels": (length,)}, int64. Another padding: `BadInputError`.
    """

    def __init__(
        self,
        tokens: Tensor,
        starts: Tensor,
        lengths: Tensor,
        classes: Sequence[str],
        shift_labels: bool = True,
        padding: str = "longest",
    ) -> None:
        check_choice("padding", padding, PADDINGS)
        self.lengths = lengths
        """Tokens of each sample, (samples,), int64. With shifted labels each of them is predicted."""
        self.classes = list(classes)
        self._tokens = tokens
        self._starts = starts
        self._shift = int(shift_labels)
        self._padding = padding
        self._longest = int(lengths.max()) if len(lengths) else 0
        self._equal = bool((lengths == self._longest).all())

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> MicroBatch:
        start, length = int(self._starts[index]), int(self.lengths[index])
        stretch = self._tokens[start : start + length + self._shift].to(torch.int64)
        return {"input_ids": stretch[:length].clone(), "labels": stretch[self._shift :].clone()}

    def gather(self, indices: Tensor) -> MicroBatch:
        """Return the micro-batch of the samples at `indices`, (batch,), as `collate_fn` does of these.

        Both entries are (batch, longest), int64; after a sequence's end they hold 0 and -100.
        """
        lengths = self.lengths[indices]
        offsets = torch.arange(self._padded_to(int(lengths.max())))
        places = self._starts[indices].unsqueeze(1) + offsets
        if self._equal:
            return {"input_ids": self._at(places), "labels": self._at(places + self._shift)}
        padded = offsets >= lengths.unsqueeze(1)
        places.masked_fill_(padded, 0)  # the row may end before a padded place
        return {
            "input_ids": self._at(places).masked_fill_(padded, PADDING_TOKEN),
            "labels": self._at(places + self._shift).masked_fill_(padded, IGNORED),
        }

    def collate_fn(self, samples: Sequence[Mapping[str, Tensor]]) -> MicroBatch:
        """Return the micro-batch of samples, as `gather` does of their indices."""
        longest = self._padded_to(max(len(sample["input_ids"]) for sample in samples))
        fills = {"input_ids": PADDING_TOKEN, "labels": IGNORED}
        micro_batch = {key: torch.full((len(samples), longest), fill) for key, fill in fills.items()}
        for key, padded in micro_batch.items():
            for row, sample in zip(padded, samples, strict=True):
                row[: len(sample[key])] = sample[key]
        return micro_batch

    def _padded_to(self, longest: int) -> int:
        return longest if self._padding == "longest" else self._longest

    def _at(self, places: Tensor) -> Tensor:
        return self._tokens.take(places).to(torch.int64)


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """Raise `BadInputError` naming the nearest choice where `data.key` has none of those known."""
    if value not in known:
        raise BadInputError(
            f"data.{key}={value} is none of {', '.join(known)}{nearest(str(value), known)}"
        )
