"""The transformer looks back only, knows positions by their distance, and draws nothing unasked."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gaccum_exp.errors import BadInputError
from gaccum_exp.models.gpt import GPT, rotary_tables, rotate

VOCABULARY = 11


def small(**changed: Any) -> GPT:
    """Return a model of two layers in float64, with weights large enough for attention to matter."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"layers": 2, "heads": 2, "width": 12, "vocab_size": VOCABULARY}
    model = GPT(**(arguments | changed)).double()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data *= 20
    return model


def drawn(*shape: int) -> Tensor:
    """Return random token indices."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def size_of(**arguments: Any) -> int:
    """Return the number of parameters, of which none is allocated."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in GPT(**arguments).parameters())


@pytest.mark.parametrize("changed", [0, 3, 8])
def test_a_later_token_changes_no_earlier_logit(changed: int) -> None:
    """Another token at one position moves the logits from there on, and no others."""
    model, tokens = small(), drawn(3, 9)
    others = tokens.clone()
    others[:, changed] = (others[:, changed] + 1) % VOCABULARY
    moved = (model(tokens) - model(others)).abs().amax(dim=(0, 2))
    assert moved[:changed].max() <= 1e-12 if changed else True
    assert moved[changed:].min() > 1e-6


@pytest.mark.parametrize("padding", [1, 7, 60])
def test_right_padding_changes_no_valid_logit(padding: int) -> None:
    """Whatever stands after a sequence, its logits stay within rounding."""
    model, tokens = small(), drawn(4, 6)
    padded = F.pad(tokens, (0, padding), value=0)
    assert (model(padded)[:, :6] - model(tokens)).abs().max() <= 1e-12


def test_no_sample_sees_another() -> None:
    """A batch gives what its samples give one at a time."""
    model, tokens = small(), drawn(3, 5)
    alone = torch.cat([model(row.unsqueeze(0)) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, rtol=0, atol=1e-12)


def test_the_order_of_earlier_tokens_matters() -> None:
    """One layer without positions would see a set: the rotation makes it a sequence."""
    model = small(layers=1)
    one, other = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 1, 3, 4]])
    assert (model(one) - model(other))[:, -1].abs().max() > 1e-6


def test_attention_depends_on_distances_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token repeated, score (m, n) is that of (m + 1, n + 1), and others at other distances."""
    scores = []

    def watched(queries: Tensor, keys: Tensor, values: Tensor, **_: Any) -> Tensor:
        scores.append(queries @ keys.transpose(-1, -2))
        return values

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    small()(torch.full((1, 40), 3))
    first = scores[0]
    torch.testing.assert_close(first[..., 1:, 1:], first[..., :-1, :-1], rtol=0, atol=1e-10)
    assert (first[..., -1, :-1] - first[..., -1, 1:]).abs().min() > 1e-6


def test_rotation_keeps_lengths_and_turns_by_position() -> None:
    """Pair i of position p turns by p · 10000^(-2i / size), as complex multiplication says it."""
    heads = torch.randn(2, 7, 6, dtype=torch.float64)
    turned = rotate(heads, rotary_tables(7, 6, heads))
    naive = torch.empty_like(heads)
    for position in range(7):
        for pair in range(3):
            angle = torch.tensor(position * 10000 ** (-2 * pair / 6), dtype=torch.float64)
            number = torch.complex(heads[:, position, pair], heads[:, position, pair + 3])
            number = number * torch.exp(1j * angle)
            naive[:, position, pair], naive[:, position, pair + 3] = number.real, number.imag
    torch.testing.assert_close(turned, naive)


def test_runs_on_longer_sequences_than_it_was_trained_on() -> None:
    """No length is built in: thousands of positions give finite logits, the first of them the same."""
    model, tokens = small(), drawn(1, 3000)
    logits = model(tokens)
    assert logits.shape == (1, 3000, VOCABULARY)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[:, :8], model(tokens[:, :8]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tie_weights", [True, False])
def test_tying_shares_one_parameter(tie_weights: bool) -> None:
    """The head is the embedding or a matrix of the same size, and nothing else changes in number."""
    model = small(tie_weights=tie_weights)
    assert (model.head.weight is model.embedding.weight) == tie_weights
    once, width = size_of(layers=2, heads=2, width=12, vocab_size=VOCABULARY), 12
    extra = 0 if tie_weights else VOCABULARY * width
    assert sum(weight.numel() for weight in model.parameters()) == once + extra


@pytest.mark.parametrize(
    ("layers", "heads", "width", "parameters"),
    [
        (2, 2, 64, 115_328),
        (4, 4, 128, 821_504),
        (5, 4, 128, 1_018_624),
        (8, 5, 320, 9_923_200),
        (16, 12, 768, 113_493_504),
    ],
)
def test_sizes_run_from_a_hundred_thousand_to_a_hundred_million(
    layers: int, heads: int, width: int, parameters: int
) -> None:
    """The sizes that conf/model/gpt.yaml names, and the docstring's formula for them."""
    assert size_of(layers=layers, heads=heads, width=width, vocab_size=256) == parameters
    assert layers * (12 * width**2 + 4 * width) + 2 * width + 256 * width == parameters


def test_weights_start_as_gpt2s() -> None:
    """Standard deviation 0.02, less by √(2 · layers) where a layer adds to the stream; no biases."""
    model = GPT(layers=8, heads=2, width=128, vocab_size=500)
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            expected = 0.02 / 4 if name.endswith("output.weight") else 0.02
            assert weight.std().item() == pytest.approx(expected, rel=0.03), name
        else:
            assert torch.equal(weight, torch.full_like(weight, float(name.endswith("weight")))), name
    assert not any(layer.bias is not None for layer in model.modules() if isinstance(layer, nn.Linear))
    assert sum(name.endswith("output.weight") for name, _ in model.named_parameters()) == 16


@pytest.mark.parametrize("silenced", ["attention", "mlp", ""])
def test_layers_add_to_the_residual_stream(silenced: str) -> None:
    """Without what a layer writes, its input passes unchanged: with neither, a block does nothing."""
    model, tokens = small(layers=1, tie_weights=False), drawn(2, 5)
    (block,) = model.blocks
    for name, weight in block.named_parameters():
        if name == f"{silenced}.output.weight" or (not silenced and name.endswith("output.weight")):
            weight.data.zero_()
    stream = model.embedding(tokens)
    rotation = rotary_tables(5, 6, stream)
    expected = stream
    if silenced == "mlp":
        expected = stream + block.attention(block.attention_norm(stream), rotation)
    elif silenced == "attention":
        expected = stream + block.mlp(block.mlp_norm(stream))
    torch.testing.assert_close(model(tokens), model.head(model.norm(expected)))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_draws_random_numbers_only_with_dropout(dropout: float) -> None:
    """The generator moves in a training pass exactly when dropout was asked for, and never after it."""
    model, tokens = small(dropout=dropout), drawn(2, 5)
    state = torch.get_rng_state()
    model(tokens)
    assert torch.equal(state, torch.get_rng_state()) == (dropout == 0)
    assert any(isinstance(layer, nn.Dropout) for layer in model.modules()) == (dropout > 0)
    state = torch.get_rng_state()
    assert torch.equal(model.eval()(tokens), model(tokens))
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_reaches_embedding_attention_and_both_residuals(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw after the embedding and two a layer, and the probability handed to attention."""
    probabilities = []

    def watched(queries: Tensor, keys: Tensor, values: Tensor, **given: Any) -> Tensor:
        probabilities.append(given["dropout_p"])
        return values

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model = small(dropout=0.25)
    calls: list[nn.Module] = []
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    model(drawn(2, 5))
    assert len(calls) == 1 + 2 * 2
    assert probabilities == [0.25, 0.25]
    model.eval()(drawn(2, 5))
    assert probabilities[2:] == [0.0, 0.0]


@pytest.mark.parametrize("tie_weights", [True, False])
def test_every_parameter_gets_a_gradient(tie_weights: bool) -> None:
    """Nothing is left out of the loss."""
    model, tokens = small(tie_weights=tie_weights), drawn(2, 7)
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().max() > 1e-9, name


def test_learns_a_repeated_sequence_and_goes_on_beyond_its_length() -> None:
    """The loss falls from log(vocabulary) to next to nothing, and is low at twice the length."""
    torch.manual_seed(0)
    model = GPT(layers=2, heads=2, width=32, vocab_size=VOCABULARY)
    pattern = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    tokens = pattern.repeat(3).unsqueeze(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    start = loss(tokens).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(tokens).backward()
        optimizer.step()
    assert start == pytest.approx(torch.tensor(VOCABULARY).log().item(), abs=0.2)
    assert loss(tokens).item() < 0.1
    assert loss(pattern.repeat(6).unsqueeze(0)).item() < 0.5


def test_float64_is_kept_throughout() -> None:
    """A gradient in float64 is that of finite differences, more closely than float32 could have it."""
    model, tokens = small(layers=1, width=4), drawn(1, 30)
    weight = model.blocks[0].attention.queries_keys_values.weight  # type: ignore[union-attr]
    assert isinstance(weight, Tensor)
    loss = model(tokens).square().sum()
    assert loss.dtype == torch.float64
    (gradient,) = torch.autograd.grad(loss, weight)
    step = 1e-5
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight[0, 0] += sign * step
            values.append(model(tokens).square().sum())
            weight[0, 0] -= sign * step
    difference = (values[0] - values[1]) / (2 * step)
    assert gradient[0, 0].item() == pytest.approx(difference.item(), rel=1e-6)


def test_bfloat16_weights_and_autocast_run() -> None:
    """Logits come near float32's in both, and gradients in the weights' own type."""
    torch.manual_seed(0)
    model, tokens = GPT(layers=2, heads=2, width=16, vocab_size=VOCABULARY), drawn(2, 300)
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(tokens)
    cast.float().sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())  # type: ignore[union-attr]
    low = model.bfloat16()(tokens)
    assert cast.dtype == low.dtype == torch.bfloat16
    for logits in (cast, low):
        assert ((logits.float() - exact).norm() / exact.norm()).item() < 0.03


def test_positions_stay_apart_in_bfloat16() -> None:
    """The angles of positions 256 and 257 differ, which bfloat16 positions would not."""
    cosine, sine = rotary_tables(258, 4, torch.zeros(1, dtype=torch.bfloat16))
    assert cosine.dtype == sine.dtype == torch.float32
    assert (cosine[256] - cosine[257]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"vocab_size": None}, "model.vocab_size is not known"),
        ({"vocab_size": 0}, "model.vocab_size=0"),
        ({"layers": 0}, "model.layers=0"),
        ({"heads": 0}, "model.heads=0"),
        ({"width": 0}, "model.width=0"),
        ({"width": 100, "heads": 8}, "model.width=100 cannot be split among model.heads=8"),
        ({"width": 100, "heads": 8}, "nearest width is 96"),
        ({"width": 12, "heads": 4}, "model.width=12 cannot be split among model.heads=4"),
        ({"width": 2, "heads": 4}, "nearest width is 8"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"dropout": -0.1}, "model.dropout=-0.1"),
    ],
)
def test_impossible_values_are_bad_input(changed: dict[str, Any], words: str) -> None:
    """The message has the key and the value, and the nearest width that fits."""
    with pytest.raises(BadInputError) as caught:
        GPT(**({"vocab_size": 5} | changed))
    assert words in str(caught.value)
