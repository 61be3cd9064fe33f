"""Tokenize a text: characters or bytes of a file, a folder, or the reference that comes with Python.

Packed blocks are all of one length, and every one of them counts alike. Documents and paragraphs by
themselves are of unequal lengths, so that micro-batches hold unequal numbers of tokens, which is where
the mean of means goes wrong.
"""

import torch
from torch import Tensor

from gaccum_exp.data.corpus import hold_out, parts, read_corpus
from gaccum_exp.data.sequences import TokenSequences, check_choice
from gaccum_exp.errors import BadInputError

SPLITS = ("train", "test")
TOKENS = ("characters", "bytes")
LAYOUTS = ("packed", "documents", "paragraphs")


def text(
    split: str,
    root: str | None = None,
    tokens: str = "characters",
    layout: str = "packed",
    context: int = 128,
    padding: str = "longest",
    shift_labels: bool = True,
    eval_fraction: float = 0.1,
    separator: str = "\n\n",
) -> TokenSequences:
    """Return the `train` or `test` samples of a text, for next-token prediction.

    Args:
        split: `train` or `test`: whole documents, or the beginning and the end of a single one.
        root: a UTF-8 file or a folder of such files (a document each), from the working directory;
            None: Python's own reference, `pydoc_data.topics`.
        tokens: `characters` (the vocabulary is every one that occurs in either split) or `bytes`
            of UTF-8 (256).
        layout: `packed`: the split's documents, joined by the separator, in blocks of `context`
            tokens; what is left at the end is dropped. `documents`: each by itself, a longer one in
            consecutive pieces of `context` tokens and a shorter last one. `paragraphs`: the same of
            what stands between separators inside each document.
        context: tokens of the longest sample.
        padding: see `TokenSequences`.
        shift_labels: labels are the next tokens. A sample then also takes in the first token of the
            next, as its last label, so that every token of a document but its first is predicted
            once; one of a single token is left out. Else labels equal the input.
        eval_fraction: about which part of the characters is the split `test`, 0 ≤ fraction < 1. The
            choice depends on the documents alone, not on a seed.
        separator: what stands between a file's documents and between paragraphs, and joins packed ones.

    Raises `BadInputError` on other values, a text that cannot be read, and a split without a sample.
    """
    check_choice("split", split, SPLITS)
    check_choice("tokens", tokens, TOKENS)
    check_choice("layout", layout, LAYOUTS)
    shortest = 1 if shift_labels else 2
    if context < shortest:
        raise BadInputError(f"data.context={context} must be at least {shortest}: nothing is predicted")
    if not 0 <= eval_fraction < 1:
        raise BadInputError(f"data.eval_fraction={eval_fraction} must be at least 0 and below 1")
    if split == "test" and eval_fraction == 0:
        raise BadInputError(
            "data.eval_fraction=0 holds out no text: raise it, or set data.eval._target_=null"
        )
    corpus = read_corpus(root, separator)
    documents = hold_out(corpus.documents, eval_fraction)[SPLITS.index(split)]
    if layout == "packed":
        documents = [separator.join(documents)]
    elif layout == "paragraphs":
        documents = [part for document in documents for part in parts(document, separator)]
    encoded = [_encoded(document, tokens, corpus.characters) for document in documents]
    sizes = torch.tensor([len(document) for document in encoded])
    starts, lengths = _stretches(sizes, context, shift_labels, whole_only=layout == "packed")
    if len(lengths) == 0:
        held = f"split {split} (data.eval_fraction={eval_fraction}) holds"
        raise BadInputError(
            f"data.context={context}: {held} {int(sizes.sum())} tokens, and a block takes "
            f"{context + int(shift_labels)}: lower it, or give more text"
            if layout == "packed"
            else f"data.layout={layout}: {held} no document of two tokens"
        )
    names = corpus.characters if tokens == "characters" else [f"0x{byte:02x}" for byte in range(256)]
    return TokenSequences(torch.cat(encoded), starts, lengths, names, shift_labels, padding)


def _encoded(document: str, tokens: str, characters: tuple[str, ...]) -> Tensor:
    if not document:  # of which torch makes no tensor
        return torch.empty(0, dtype=torch.int32)
    if tokens == "bytes":
        return torch.frombuffer(bytearray(document, "utf-8"), dtype=torch.uint8)
    known, points = (
        torch.frombuffer(bytearray(string, "utf-32-le"), dtype=torch.int32)
        for string in ("".join(characters), document)
    )
    return torch.searchsorted(known, points, out_int32=True)


def _stretches(
    sizes: Tensor, context: int, shift_labels: bool, whole_only: bool
) -> tuple[Tensor, Tensor]:
    """Cut documents of these sizes that are laid end to end; `whole_only` leaves shorter inputs out.

    Returns where each sample starts and how long its input is, (samples,) each; none crosses documents.
    """
    usable = (sizes - 1 if shift_labels else sizes).clamp(min=0)
    counts = usable // context if whole_only else (usable + context - 1) // context
    document = torch.repeat_interleave(counts)
    before = torch.cumsum(counts, 0) - counts
    offset = (torch.arange(len(document)) - before[document]) * context
    starts = (torch.cumsum(sizes, 0) - sizes)[document] + offset
    return starts, (usable[document] - offset).clamp(max=context)
