"""Tokens of documents of any length from an IterableDataset, with labels that are ignored."""

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset


class Documents(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            length = int(torch.randint(3, 12, (1,), generator=generator))
            yield torch.randint(1, 20, (length,), generator=generator)


def collate(documents):
    tokens = pad_sequence(documents, batch_first=True)
    labels = tokens.masked_fill(tokens == 0, -100)
    return {"tokens": tokens[:, :-1], "labels": labels[:, 1:]}


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 16), nn.Linear(16, 20)

    def forward(self, tokens):
        return self.out(self.embed(tokens))


torch.manual_seed(0)
model = Bigram()
optimizer = torch.optim.AdamW(model.parameters())
accum = 4
for i, batch in enumerate(DataLoader(Documents(), batch_size=2, collate_fn=collate), start=1):
    logits = model(batch["tokens"])
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100
    )
    (loss / accum).backward()
    if i % accum == 0:
        optimizer.step()
        optimizer.zero_grad()
