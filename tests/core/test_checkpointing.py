"""Checkpointed blocks, against the same model without checkpointing: bit for bit, and with less kept."""

import copy
import os
import pickle
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils._pytree import tree_map_only
from torchvision.models.resnet import BasicBlock, ResNet

from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.core.checkpointing import checkpoint_blocks
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.available import SavedForBackward
from gaccum_exp.models.cnn import CNN
from gaccum_exp.models.gpt import GPT
from gaccum_exp.models.mlp import MLP
from tests.audit.support import CE, FEATURES, HIDDEN, net, window

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WIDTH = 6
Make = Callable[[], nn.Module]


class Block(nn.Module):
    """x + what the middle makes of it."""

    def __init__(self, *middle: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.middle = nn.Sequential(nn.Linear(width, width), *middle, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.middle(x)


class Counted(Block):
    """Counts how often it has run."""

    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


class Functional(nn.Module):
    """A block that computes one function of its input and of a linear layer's output."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.layer = function, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer(x)).sin()


class Table(nn.Module):
    """Counts its calls in a table of integers, and computes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(WIDTH, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Out(NamedTuple):
    hidden: Tensor
    extra: dict[str, Tensor]


class Talkative(nn.Module):
    """Takes keywords and a nesting of tensors; gives one; shares and freezes weights."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TalkativeBlock() for _ in range(3))
        self.blocks[2].layer.weight = self.blocks[0].layer.weight
        self.blocks[1].layer.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros((), dtype=x.dtype)
        for block in self.blocks:
            x, extra = block(more={"scale": [x.mean(), 2.0]}, x=x)
            total = total + extra["norm"]
        return x + total


class TalkativeBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor, *, more: dict[str, list[Any]]) -> Out:
        mean, factor = more["scale"]
        hidden = self.dropout(self.layer(x).tanh()) * factor + mean
        return Out(hidden, {"norm": hidden.square().mean()})


def stack(*middle: Callable[[], nn.Module], n: int = 3) -> Make:
    return lambda: nn.Sequential(*(Block(*(make() for make in middle)) for _ in range(n)))


def points(size: int = 5) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(1))


def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(24, (3, 7), generator=torch.Generator().manual_seed(1))


def made(make: Make, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """Return a model and a checkpointed copy of it."""
    torch.manual_seed(0)
    model = make().to(dtype).train()
    twin = copy.deepcopy(model)
    assert checkpoint_blocks(twin)
    return model, twin


def output(model: nn.Module, inputs: Any) -> Tensor:
    found = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    found = getattr(found, "logits", found)
    assert isinstance(found, Tensor)
    return found


def trained(model: nn.Module, inputs: Any, autocast: bool = False, steps: int = 2) -> list[Tensor]:
    """Train; return every output and gradient, the buffers, and what the generator draws next."""
    seen = []
    for seed in range(steps):
        torch.manual_seed(seed)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs = output(model, inputs)
        outputs.float().square().mean().backward()
        seen += [outputs.detach().clone(), *(p.grad for p in model.parameters() if p.grad is not None)]
        with torch.no_grad():
            for p in model.parameters():
                p -= 0 if p.grad is None else 0.01 * p.grad
    return [*seen, *(b.clone() for b in model.buffers()), torch.rand(3)]


def assert_alike(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def saved_bytes(model: nn.Module, inputs: Any) -> int:
    saved = SavedForBackward()
    with saved.counted([*model.parameters(), *model.buffers()]):
        output(model, inputs)
    return saved.bytes


MODELS: dict[str, tuple[Make, Callable[[], Any]]] = {
    "dropout": (stack(nn.Tanh, nn.Dropout), points),
    "batch norm": (stack(lambda: nn.BatchNorm1d(WIDTH), nn.ReLU), points),
    "batch norm without momentum": (stack(lambda: nn.BatchNorm1d(WIDTH, momentum=None)), points),
    "spectral norm": (stack(lambda: spectral_norm(nn.Linear(WIDTH, WIDTH))), points),
    "table of integers": (stack(Table), points),
    "keywords, nestings, shared and frozen weights": (Talkative, points),
    "cnn": (lambda: CNN("batch", 4, input_shape=(3, 32, 32), num_classes=3), images),
    "mlp": (lambda: MLP([8, 8], "gelu", 0.2, input_shape=(WIDTH,), num_classes=3), points),
    "gpt": (lambda: GPT(3, 2, 16, dropout=0.2, vocab_size=24), tokens),
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3), images),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(num_classes=3), images),
}


@pytest.mark.parametrize("precision", ["float32", "float64", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_results_gradients_and_buffers_are_the_same_bit_for_bit(name: str, precision: str) -> None:
    """Over two steps, and the next random number as well."""
    make, inputs = MODELS[name]
    dtype = torch.float64 if precision == "float64" else torch.float32
    placed = tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs())
    plain, checkpointed = made(make, dtype)
    expected = trained(plain, placed, precision == "autocast")
    assert_alike(trained(checkpointed, placed, precision == "autocast"), expected)


SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 24,
}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", SIZES | {"num_key_value_heads": 2, "attention_dropout": 0.1}),
    "Bert": ("BertForSequenceClassification", SIZES),
    "GPT2": ("GPT2LMHeadModel", {"n_embd": 8, "n_head": 2, "n_layer": 3, "vocab_size": 24}),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_heads": 2, "num_layers": 2, "vocab_size": 24}
        | {"decoder_start_token_id": 0},
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers_train_the_same_bit_for_bit(name: str) -> None:
    """With their caches on, as they are by default; and their blocks keep less than half."""
    transformers = pytest.importorskip("transformers")
    model_class, sizes = TRANSFORMERS[name]
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    settings = getattr(transformers, f"{name}Config")(**sizes, **special)
    plain, checkpointed = made(lambda: getattr(transformers, model_class)(settings))
    inputs = {"input_ids": tokens()} | ({"labels": tokens()} if name == "T5" else {})
    assert saved_bytes(checkpointed, inputs) < saved_bytes(plain, inputs) / 2
    assert_alike(trained(checkpointed, inputs), trained(plain, inputs))


def test_keys_and_values_of_earlier_positions_are_used() -> None:
    """A cache with something in it is a part of the input, and the block grows it once."""
    transformers = pytest.importorskip("transformers")
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 1)
    settings = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **special)
    lengths, gradients = [], []
    for model in made(lambda: transformers.LlamaForCausalLM(settings)):
        with torch.no_grad():
            past = model(tokens(), use_cache=True).past_key_values
        model(tokens(), past_key_values=past).logits.square().mean().backward()
        lengths.append(past.get_seq_length())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert lengths == [14, 14]
    assert_alike(gradients[1], gradients[0])


@pytest.mark.parametrize("blocks", [2, 8])
def test_a_block_keeps_its_input_and_nothing_else(blocks: int) -> None:
    """What one more block adds is counted to the byte; without checkpointing it is many times that."""
    kept = []
    for n in (blocks, blocks + 1):
        plain, checkpointed = made(lambda n=n: GPT(n, 2, 16, dropout=0.1, vocab_size=24))
        kept.append((saved_bytes(plain, tokens()), saved_bytes(checkpointed, tokens())))
    of_plain, of_checkpointed = (after - before for before, after in zip(*kept, strict=True))
    assert of_checkpointed == tokens().numel() * 16 * 4
    assert of_plain > 10 * of_checkpointed


def test_a_convolutional_network_keeps_the_inputs_of_its_stages() -> None:
    """Less than half of what a convolution, a normalisation and an activation keep."""
    plain, checkpointed = made(lambda: CNN("group", 16, input_shape=(3, 32, 32), num_classes=3))
    assert saved_bytes(checkpointed, images()) < saved_bytes(plain, images()) / 2


def test_blocks_run_again_where_gradients_are_asked_for_and_only_there() -> None:
    """In evaluation mode too; not without gradients, nor where nothing needs one."""
    _, model = made(lambda: nn.Sequential(Counted(), Counted()))
    with torch.no_grad():
        model(points())
    assert [block.runs for block in model] == [1, 1]
    model(points()).sum().backward()
    assert [block.runs for block in model] == [3, 3]
    model.eval()(points()).sum().backward()
    assert [block.runs for block in model] == [5, 5]
    model.requires_grad_(False)(points())
    assert [block.runs for block in model] == [6, 6]


def test_running_statistics_move_once_a_step() -> None:
    """As the formula moves them that BatchNorm is documented with."""
    _, model = made(lambda: nn.Sequential(Block(nn.BatchNorm1d(WIDTH))), torch.float64)
    norm = model[0].middle[1]
    mean, variance = torch.zeros(WIDTH).double(), torch.ones(WIDTH).double()
    for step in range(3):
        x = points().double() + step
        with torch.no_grad():
            inputs = model[0].middle[0](x)
        mean = 0.9 * mean + 0.1 * inputs.mean(0)
        variance = 0.9 * variance + 0.1 * inputs.var(0)
        model(x).square().sum().backward()
    assert norm.num_batches_tracked == 3
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


@pytest.mark.parametrize("name", ["batch norm", "spectral norm", "dropout"])
def test_two_passes_before_their_backward_passes_are_held_apart(name: str) -> None:
    """Each runs again on the buffers with which it began, however far these have moved since."""
    found = []
    for model in made(MODELS[name][0]):
        torch.manual_seed(1)
        first, second = model(points()), model(2 * points())
        (first - second).square().sum().backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert_alike(found[1], found[0])


def test_a_second_backward_pass_through_the_same_graph_gives_the_same() -> None:
    """With a graph that is retained, and gradients of gradients."""
    found = []
    for model in made(MODELS["spectral norm"][0]):
        loss = model(points()).square().sum()
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        assert_alike(list(gradients), once)
        sum(g.square().sum() for g in gradients).backward()
        found.append([p.grad for p in model.parameters()])
    assert_alike(found[1], found[0])


def test_a_block_runs_again_in_the_mode_and_on_the_parameters_of_the_first_time() -> None:
    """Both may have been changed before the backward pass, and are as they were left after it."""
    found = []
    for model in made(MODELS["batch norm"][0]):
        weights = {n: (p.detach() * 2).requires_grad_() for n, p in model.named_parameters()}
        before = dict(model.named_parameters())
        loss = torch.func.functional_call(model, weights, (points(),)).square().sum()
        model.eval()
        loss.backward()
        assert not any(m.training for m in model.modules())
        assert all(p is before[n] for n, p in model.named_parameters())
        found.append([w.grad for w in weights.values()])
    assert_alike(found[1], found[0])


class Scaled(Block):
    """Has a buffer that asks for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH, requires_grad=True))

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) * self.scale).sin()


def test_a_buffer_may_ask_for_a_gradient() -> None:
    """It gets the same, on itself and not on a copy."""
    found = []
    for model in made(lambda: nn.Sequential(Scaled(), Scaled())):
        model(points()).square().sum().backward()
        found.append([t.grad for t in (*model.parameters(), *model.buffers())])
    assert_alike(found[1], found[0])


@pytest.mark.parametrize(
    "draw",
    [
        lambda x, y: y * random.random(),
        lambda x, y: y * float(np.random.rand()),
        lambda x, y: y * torch.rand(len(y), 1),
    ],
)
def test_random_numbers_of_torch_python_and_numpy_are_held(draw: Any) -> None:
    """The same the second time, and what is drawn afterwards is not disturbed."""
    found = []
    for model in made(lambda: nn.Sequential(*(Functional(draw) for _ in range(3)))):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        loss = model(points()).square().sum()
        between = [random.random(), np.random.rand(), float(torch.rand(()))]
        loss.backward()
        drawn = [*between, random.random(), np.random.rand(), float(torch.rand(()))]
        found.append([torch.tensor(drawn), *(p.grad for p in model.parameters())])
    assert_alike(found[1], found[0])


class Listing(nn.Module):
    """Passes its blocks a list that they extend."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ListingBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = [x]
        for block in self.blocks:
            block(self.seen)
        return torch.cat(self.seen)


class ListingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, seen: list[Tensor]) -> None:
        seen.append(self.norm(self.layer(torch.stack(seen).sum(0))).sin())


def test_a_list_that_a_block_extends_is_extended_once() -> None:
    """The second time the block has a list of its own, with what the first one held."""
    plain, checkpointed = made(Listing)
    assert_alike(trained(checkpointed, points()), trained(plain, points()))
    assert len(checkpointed.seen) == 4


def test_a_block_that_writes_to_its_input_is_refused() -> None:
    """By name, in the forward pass; with torch the backward pass would fail, saying nothing of why."""
    _, model = made(lambda: nn.Sequential(*(Functional(lambda x, y: x.add_(y)) for _ in range(2))))
    with pytest.raises(BadInputError, match=r"Functional cannot be checkpointed: .* in place"):
        model(points())


class Kept(nn.Module):
    """Passes its blocks a tensor inside a tuple, and lets it be reached."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(KeptBlock() for _ in range(2))
        self.scale = torch.ones(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scales=(self.scale, 1.0))
        return x


class KeptBlock(Block):
    def forward(self, x: Tensor, scales: tuple[Tensor, float]) -> Tensor:
        return super().forward(x.sin() * scales[0] * scales[1])


def test_an_input_that_is_written_to_before_the_backward_pass_is_noticed() -> None:
    """Even inside a tuple that is passed by keyword: never a wrong gradient."""
    _, model = made(Kept)
    loss = model(points()).sum()
    model.scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_modules_stay_what_they_are() -> None:
    """Objects, names of classes, state dict, signatures; and a second call finds and changes nothing."""
    for make, _ in MODELS.values():
        torch.manual_seed(0)
        model = make()
        before = [(m, type(m)) for m in model.modules()]
        state = dict(model.state_dict())
        names = checkpoint_blocks(model)
        assert [m for m, _ in before] == list(model.modules())
        for module, kind in before:
            assert isinstance(module, kind)
            for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
                assert getattr(type(module), attribute) == getattr(kind, attribute)
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        kinds = [type(m) for m in model.modules()]
        assert checkpoint_blocks(model) == names
        assert [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", ["batch norm", "cnn", "gpt"])
def test_copies_and_pickles_are_checkpointed_too(name: str, how: Callable[[Any], Any]) -> None:
    """They keep as little, and compute the same with modules of their own."""
    make, inputs = MODELS[name]
    plain, checkpointed = made(make)
    again = how(checkpointed)
    assert not {id(m) for m in again.modules()} & {id(m) for m in checkpointed.modules()}
    assert saved_bytes(again, inputs()) == saved_bytes(checkpointed, inputs())
    assert saved_bytes(again, inputs()) < saved_bytes(plain, inputs())
    plain, again = copy.deepcopy(plain), how(checkpointed)
    assert_alike(trained(again, inputs()), trained(plain, inputs()))


def test_a_model_of_meta_tensors_is_checkpointed_where_it_will_be() -> None:
    """Built on `meta`, moved, and run under fake tensors: it keeps what a real one keeps."""

    def kept(model: nn.Module, x: Tensor) -> list[torch.Size]:
        shapes: list[torch.Size] = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda t: (shapes.append(t.shape), t)[1], lambda t: t):
            loss = output(model, x).sum()
        loss.backward()
        return shapes

    make, inputs = MODELS["cnn"]
    plain, checkpointed = made(make)
    with torch.device("meta"):
        model = make()
    assert checkpoint_blocks(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = model.to_empty(device="cpu")
        found = kept(model, mode.from_tensor(inputs()))
    assert found == kept(checkpointed, inputs())
    assert len(found) < len(kept(plain, inputs())) / 2
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_hooks_on_a_block_run_once_and_hooks_inside_it_with_it() -> None:
    """A hook that was there before, and one that came after."""
    torch.manual_seed(0)
    model, seen = stack(nn.Tanh, n=2)(), []
    model[0].register_forward_hook(lambda *_: seen.append("block"))
    checkpoint_blocks(model)
    model[1].middle[1].register_forward_hook(lambda *_: seen.append("inside"))
    loss = model(points()).sum()
    assert seen == ["block", "inside"]
    loss.backward()
    assert seen == ["block", "inside", "inside"]


AUDITED: dict[str, Callable[[], list[nn.Module]]] = {
    "equivalent": lambda: [nn.Tanh()],
    "stochastic": lambda: [nn.Dropout()],
    "biased": lambda: [nn.BatchNorm1d(HIDDEN)],
    "biased beside dropout": lambda: [nn.Dropout(), nn.BatchNorm1d(HIDDEN)],
}


@pytest.mark.parametrize("name", AUDITED)
def test_an_audit_runs_without_checkpointing(name: str) -> None:
    """The whole finding is that of the model without it, and each block runs as often."""
    findings, counted = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        blocks = [Block(*AUDITED[name](), width=HIDDEN) for _ in range(2)]
        model = net(*blocks)
        assert not checkpointed or checkpoint_blocks(model) == ["1", "2"]
        calls: list[int] = []
        for block in blocks:
            block.middle[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        findings.append(audit_window(model, CE, window(4, 4, 3)))
        counted.append(len(calls))
    assert findings[1] == findings[0]
    assert findings[0].verdict == name.partition(" ")[0]
    assert counted[1] == counted[0]
    assert FEATURES != HIDDEN


class Interrupted(nn.Module):
    """What torch.compile cannot compile."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * 1.5


COMPILED = {
    "batch norm": stack(lambda: nn.BatchNorm1d(WIDTH), nn.Tanh, n=2),
    "dropout": stack(nn.Tanh, nn.Dropout, n=2),
    "stages": lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)),
    "interrupted": stack(Interrupted, lambda: nn.BatchNorm1d(WIDTH), nn.Tanh, n=2),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, after an interruption
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_blocks_compute_the_same_and_keep_less(name: str) -> None:
    """Running statistics too, where the compiler has given a block up as well."""
    plain, checkpointed = made(COMPILED[name])
    torch._dynamo.reset()
    checkpointed.compile(backend="aot_eager")
    found, expected = trained(checkpointed, points()), trained(plain, points())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    states = 2 * torch.get_rng_state().nbytes if name == "dropout" else 0
    assert saved_bytes(checkpointed, points()) - states < saved_bytes(plain, points())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["dropout", "batch norm", "gpt"])
def test_on_a_device_gradients_are_the_same_bit_for_bit(name: str, autocast: bool) -> None:
    """With the device's own random numbers."""
    make, inputs = MODELS[name]
    found = []
    for model in made(make):
        model.cuda()
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            outputs = output(model, inputs().cuda())
        outputs.float().square().mean().backward()
        found.append([outputs, *(p.grad for p in model.parameters()), *model.buffers()])
    assert_alike(found[1], found[0])
