"""Made-up sequences have the lengths and the entropy that were asked for, in every run."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gaccum_exp.data.ragged import entropy_rate, ragged, stationary, transitions
from gaccum_exp.data.sequences import IGNORED
from gaccum_exp.errors import BadInputError


def log_likelihoods(vocab_size: int, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the first chain's mean log-likelihood of each sample's labels, and the lengths."""
    dataset = ragged(vocab_size=vocab_size, **arguments)
    chain = transitions(vocab_size).log()
    means = []
    for index in range(len(dataset)):
        sample = dataset[index]
        means.append(chain[sample["input_ids"], sample["labels"]].mean())
    return torch.stack(means), dataset.lengths


@pytest.mark.parametrize(
    ("mean_length", "length_cv", "mean", "cv"),
    [
        (64, 0.5, 64, 0.5),
        (64, 1.0, 64, 1.0),
        (20.5, 0.2, 20.5, 0.2),
        (4, 1.0, 4.02, 0.993),
        (2, 1.0, 2.11, 0.92),
        (8, 0.1, 8, 0.106),
    ],
)
def test_lengths_have_the_mean_and_spread_asked_for(
    mean_length: float, length_cv: float, mean: float, cv: float
) -> None:
    """Within three standard errors or so of a big sample; short ones as the docstring says."""
    lengths = ragged(100_000, 2, mean_length, length_cv).lengths.double()
    assert lengths.min() >= 1
    assert float(lengths.mean()) == pytest.approx(mean, rel=0.01)
    assert float(lengths.std() / lengths.mean()) == pytest.approx(cv, rel=0.02)


def test_lengths_are_log_normal() -> None:
    """The logarithms are symmetric about their mean, as no normal or gamma distribution's are."""
    logarithms = ragged(30_000, 2, mean_length=200, length_cv=1.0).lengths.double().log()
    centred = (logarithms - logarithms.mean()) / logarithms.std()
    assert float(centred.pow(3).mean()) == pytest.approx(0, abs=0.05)
    assert float(centred.pow(4).mean()) == pytest.approx(3, abs=0.15)
    assert float(logarithms.var()) == pytest.approx(math.log(2), rel=0.03)


def test_without_spread_all_lengths_are_equal_and_nothing_is_padded() -> None:
    """length_cv=0 gives blocks of the mean length."""
    dataset = ragged(50, mean_length=9, length_cv=0)
    assert dataset.lengths.tolist() == [9] * 50
    assert (dataset.gather(torch.arange(50))["labels"] != IGNORED).all()


def test_labels_are_the_next_tokens_and_samples_do_not_overlap() -> None:
    """A sample has one token more than it has inputs, and shares none with the next sample."""
    dataset = ragged(300, vocab_size=16, mean_length=5)
    assert int((dataset.lengths + 1).sum()) == len(dataset._tokens)
    for index in range(len(dataset)):
        sample = dataset[index]
        assert len(sample["input_ids"]) == len(sample["labels"]) == dataset.lengths[index]
        assert torch.equal(sample["labels"][:-1], sample["input_ids"][1:])
        assert 0 <= int(sample["labels"].min()) <= int(sample["labels"].max()) < 16


@pytest.mark.parametrize("vocab_size", [2, 5])
def test_tokens_follow_the_chain_from_their_first_to_their_last(vocab_size: int) -> None:
    """Counted transitions and first tokens have the probabilities that the functions give."""
    dataset = ragged(20_000, vocab_size, mean_length=6)
    micro_batch = dataset.gather(torch.arange(20_000))
    valid = micro_batch["labels"] != IGNORED
    pairs = micro_batch["input_ids"][valid] * vocab_size + micro_batch["labels"][valid]
    counts = torch.bincount(pairs, minlength=vocab_size**2).view(vocab_size, vocab_size).double()
    chain = transitions(vocab_size)
    shares = counts.sum(1) / counts.sum()
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), chain, rtol=0, atol=0.015)
    torch.testing.assert_close(shares, stationary(chain), rtol=0, atol=0.015)
    first = torch.bincount(micro_batch["input_ids"][:, 0], minlength=vocab_size) / 20_000
    torch.testing.assert_close(first.double(), stationary(chain), rtol=0, atol=0.015)


@pytest.mark.parametrize("vocab_size", [2, 7, 64])
def test_stationary_distribution_is_that_of_many_steps(vocab_size: int) -> None:
    """One step of the chain leaves it, and from any token many steps lead there."""
    chain = transitions(vocab_size)
    shares = stationary(chain)
    torch.testing.assert_close(shares @ chain, shares)
    many = torch.linalg.matrix_power(chain, 300)
    torch.testing.assert_close(many, shares.expand(vocab_size, vocab_size))


def test_entropy_rate_is_what_knowing_the_chain_costs() -> None:
    """The mean loss of the chain's own probabilities is the entropy rate, far below log(vocabulary)."""
    dataset = ragged(3000, 64, mean_length=64)
    micro_batch = dataset.gather(torch.arange(3000))
    losses = torch.nn.functional.cross_entropy(
        transitions(64).log()[micro_batch["input_ids"]].transpose(1, 2), micro_batch["labels"]
    )
    assert losses.item() == pytest.approx(entropy_rate(64), rel=0.005)
    assert entropy_rate(64) == pytest.approx(2.597, abs=0.001)  # as conf/data/ragged.yaml says
    for vocab_size in (8, 64, 512):
        assert entropy_rate(vocab_size) < 0.75 * math.log(vocab_size)


def test_entropy_rate_of_a_naive_sum() -> None:
    """Written out over pairs of tokens it is the same number."""
    chain = transitions(6)
    shares = torch.linalg.matrix_power(chain, 500)[0]
    naive = -sum(float(shares[i] * chain[i, j] * chain[i, j].log()) for i in range(6) for j in range(6))
    assert entropy_rate(6) == pytest.approx(naive, rel=1e-12)


def test_content_depends_on_length_with_coupling_alone() -> None:
    """The chain explains short and long samples alike, until coupling gives the short ones another."""
    gaps = {}
    for coupling in (0.0, 0.5, 1.0):
        means, lengths = log_likelihoods(8, size=4000, mean_length=20, length_cv=0.6, coupling=coupling)
        bounds = torch.quantile(lengths.double(), torch.tensor([0.25, 0.75], dtype=torch.float64))
        short, long = means[lengths <= bounds[0]], means[lengths >= bounds[1]]
        gaps[coupling] = float(long.mean() - short.mean())
    assert abs(gaps[0.0]) < 0.05
    assert gaps[1.0] > 1.5 * gaps[0.5] > 0.3


def test_coupling_changes_no_length() -> None:
    """Studies with and without it compare the same spread of lengths."""
    assert torch.equal(ragged(100, coupling=1.0).lengths, ragged(100).lengths)


def test_sequences_are_the_same_in_every_run_and_others_in_another_split() -> None:
    """No seed of the run enters, its generator stays where it is, and split_seed draws anew."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = ragged(20)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = ragged(20), ragged(20, split_seed=1)
    everything = torch.arange(20)
    assert torch.equal(one.gather(everything)["labels"], again.gather(everything)["labels"])
    assert not torch.equal(one.lengths, other.lengths)
    assert not torch.equal(one[0]["input_ids"][:5], other[0]["input_ids"][:5])


@given(data=st.data())
def test_gather_is_collate_of_the_samples(data: st.DataObject) -> None:
    """Both ways to make a micro-batch agree for any spread, indices and padding."""
    dataset = ragged(
        data.draw(st.integers(1, 40)),
        vocab_size=5,
        mean_length=data.draw(st.floats(1, 30)),
        length_cv=data.draw(st.sampled_from([0, 0.5, 2])),
        padding=data.draw(st.sampled_from(["longest", "max_length"])),
    )
    chosen = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=9))
    gathered = dataset.gather(torch.tensor(chosen))
    collated = dataset.collate_fn([dataset[index] for index in chosen])
    for key, micro_batch in gathered.items():
        assert torch.equal(micro_batch, collated[key])


def test_classes_are_the_tokens() -> None:
    """A model learns from them how many outputs it needs."""
    assert ragged(1, vocab_size=3).classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"size": 0}, "data.size=0"),
        ({"vocab_size": 1}, "data.vocab_size=1 must be 2 to 1024"),
        ({"vocab_size": 50257}, "model.vocab_size may be larger"),
        ({"mean_length": 0.5}, "data.mean_length=0.5"),
        ({"mean_length": math.nan}, "data.mean_length=nan"),
        ({"length_cv": -0.1}, "data.length_cv=-0.1"),
        ({"coupling": 1.1}, "data.coupling=1.1"),
        ({"padding": "longst"}, "did you mean 'longest'"),
    ],
)
def test_impossible_values_are_bad_input(changed: dict[str, Any], words: str) -> None:
    """The message has the key and the value, and the range."""
    with pytest.raises(BadInputError) as caught:
        ragged(**({"size": 4} | changed))
    assert words in str(caught.value)
