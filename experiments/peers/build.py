"""Rebuild this study: `python experiments/peers/build.py` (half a minute on two cores)."""

import math
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import provenance, write_results
from experiments.peers.loops import PEERS, N

PAGE = Path(__file__).resolve().parent / "README.md"
MICRO, FEATURES, CLASSES, LONGEST = 64, 16, 5, 12
ROUNDING = 1e-12
"""Well above float64's rounding on these models, and ten orders below any bias in the table."""


class Rows(Dataset[dict[str, Tensor]]):
    """Inputs and labels, one sample at a time."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[row], "labels": self.labels[row]}


def points(count: int) -> Rows:
    """Return inputs (count, features) in float64 and classes (count,)."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, FEATURES, dtype=torch.float64, generator=generator)
    return Rows(inputs, torch.randint(CLASSES, (count,), generator=generator))


def sentences(count: int) -> Rows:
    """Return tokens and classes (count, tokens); each next micro-batch has longer sentences."""
    generator = torch.Generator().manual_seed(2)
    most = 3 * (1 + torch.arange(count) // MICRO)
    lengths = 1 + (torch.rand(count, generator=generator) * most).long()
    tokens = torch.randint(CLASSES, (count, LONGEST), generator=generator)
    labels = torch.randint(CLASSES, (count, LONGEST), generator=generator)
    padding = torch.arange(LONGEST) >= lengths[:, None]
    return Rows(tokens.masked_fill(padding, 0), labels.masked_fill(padding, -100))


CASES = {
    "equal micro-batches": points(4 * MICRO),
    "short last micro-batch": points(3 * MICRO + 16),
    "partial last window": points(6 * MICRO),
    "variable-length tokens": sentences(4 * MICRO),
}


def model_of(rows: Rows) -> nn.Module:
    """Return a small model in float64, always with the same weights."""
    torch.manual_seed(0)
    reads = nn.Linear(FEATURES, 32) if rows.inputs.is_floating_point() else nn.Embedding(CLASSES, 32)
    return nn.Sequential(reads, nn.LayerNorm(32), nn.GELU(), nn.Linear(32, CLASSES)).double()


@dataclass(frozen=True)
class Cell:
    """What one peer did on one case, in its last window."""

    error: float | None
    """Of the gradient handed to the optimizer, by this script; None: the last window got no step."""
    audit: Any

    def __str__(self) -> str:
        if self.error is None:
            return f"no step: {self.audit.left_over} micro-batches left over"
        worst = self.audit.worst
        said = f"{self.error:.1e} {worst.verdict}" if self.error < ROUNDING else f"{self.error:.3f} "
        return said if self.error < ROUNDING else f"**{said}{worst.verdict}**: {worst.cause}"


def measured(peer: Any, rows: Rows) -> Cell:
    """Run a peer on a case under `watch`, and hold `watch` to the ground truth at every step."""
    model = model_of(rows)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, handed = [flat(model.parameters())], []

    def note(*_: object) -> None:
        handed.append(flat(p.grad for p in model.parameters()))
        before.append(flat(model.parameters()))

    optimizer.register_step_post_hook(note)
    audit = peer(model, optimizer, DataLoader(rows, batch_size=MICRO))
    errors = [
        distance(gradient, large_batch(rows, number, weights))
        for number, (gradient, weights) in enumerate(zip(handed, before, strict=False))
    ]
    assert len(errors) == len(audit.windows), "watch judged every step"
    for error, window in zip(errors, audit.windows, strict=True):
        agreed = math.isclose(error, window.e, rel_tol=1e-6, abs_tol=ROUNDING)
        right = window.verdict in ("identical", "equivalent") if error < ROUNDING else "biased"
        assert agreed, f"ground truth {error}, watch {window.e}"
        assert right in (True, window.verdict), f"ground truth {error}, watch {window.report()}"
    last = math.ceil(len(rows) / (N * MICRO)) - 1
    return Cell(errors[last] if last < len(errors) else None, audit)


def large_batch(rows: Rows, number: int, weights: Tensor) -> Tensor:
    """Return the mean gradient over a window's samples at once: plain torch, in float64."""
    model = model_of(rows)
    nn.utils.vector_to_parameters(weights, model.parameters())
    window = slice(number * N * MICRO, (number + 1) * N * MICRO)
    logits, labels = model(rows.inputs[window]), rows.labels[window]
    counted = labels != -100
    chosen = logits[counted].log_softmax(-1).gather(-1, labels[counted][:, None])
    (-chosen.sum() / counted.sum()).backward()
    return flat(p.grad for p in model.parameters())


def flat(tensors: Any) -> Tensor:
    """Return one vector of copies."""
    return torch.cat([t.detach().clone().flatten() for t in tensors])


def distance(gradient: Tensor, one_pass: Tensor) -> float:
    """Return ‖g − g₁‖ / ‖g₁‖."""
    return float((gradient - one_pass).norm() / one_pass.norm())


def table(cells: dict[tuple[str, str], Cell]) -> str:
    """Return the Markdown table."""
    lines = [f"| case | {' | '.join(PEERS)} |", "|---" * (len(PEERS) + 1) + "|"]
    for case in CASES:
        row = " | ".join(str(cells[case, peer]) for peer in PEERS)
        lines.append(f"| {case} | {row} |")
    return "\n".join(lines)


def remedies(cells: dict[tuple[str, str], Cell]) -> str:
    """Return what `watch` says to do, where there is something to do."""
    lines = ["| case | peer | what `watch` says |", "|---|---|---|"]
    for (case, peer), cell in cells.items():
        if cell.error is None or cell.error >= ROUNDING:
            lines.append(f"| {case} | {peer} | {remedy(cell)} |")
    return "\n".join(lines)


def remedy(cell: Cell) -> str:
    """Return the sentence of the audit."""
    if cell.error is None:
        return f"{cell.audit.left_over} backward passes after the last optimizer step"
    return str(cell.audit.remedy)


def main() -> None:
    """Measure every cell, print and write the tables."""
    start = time.monotonic()
    torch.set_num_threads(1)
    cells = {(c, p): measured(peer, rows) for c, rows in CASES.items() for p, peer in PEERS.items()}
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("accelerate", "lightning", "transformers")
    )
    results = f"{table(cells)}\n\n{remedies(cells)}\n\nPeers: {versions}."
    print(results)
    write_results(PAGE, f"{results} {provenance(time.monotonic() - start)}")


if __name__ == "__main__":
    main()
