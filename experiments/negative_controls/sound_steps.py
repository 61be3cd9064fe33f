"""Sound loops that differ in what happens between backward and the next window."""

import copy
from functools import partial

import torch
from torch import nn

from experiments.negative_controls.control import SOUND, Control, Ground
from experiments.negative_controls.models import frozen, points
from experiments.negative_controls.sound_losses import plain

EQUAL = points(*[8] * 8)
HOOK_FACTOR = 0.5


def divided_at_the_end(model, criterion, optimizer, loader, n=4):
    """The gradients are divided once, before the step."""
    for i, (x, y) in enumerate(loader):
        criterion(model(x), y).backward()
        if (i + 1) % n == 0:
            for p in model.parameters():
                p.grad.div_(n)
            optimizer.step()
            optimizer.zero_grad()


def clipped_by_norm(model, criterion, optimizer, loader, n=4):
    """Clipped once, hard, and the norm printed."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            print(f"gradient norm {norm.item():.3f}")
            optimizer.step()
            optimizer.zero_grad()


def clipped_by_value(model, criterion, optimizer, loader, n=4):
    """Each entry is clipped, which turns the gradient."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            nn.utils.clip_grad_value_(model.parameters(), 0.02)
            optimizer.step()
            optimizer.zero_grad()


def scaled_and_clipped(model, criterion, optimizer, loader, n=4):
    """The AMP recipe: scale, unscale once, clip, step, update."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, (x, y) in enumerate(loader):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(x), y) / n
        scaler.scale(loss).backward()
        if (i + 1) % n == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def closure(model, criterion, optimizer, loader, n=4):
    """The window is a closure that the optimizer calls."""
    for start in range(0, len(loader), n):

        def window(micro_batches=loader[start : start + n]):
            optimizer.zero_grad()
            total = torch.zeros(())
            for x, y in micro_batches:
                loss = criterion(model(x), y) / n
                loss.backward()
                total += loss.detach()
            return total

        optimizer.step(window)


def zeros_kept(model, criterion, optimizer, loader, n=4):
    """Gradients are zeroed, not freed, and before the window's first backward."""
    for i, (x, y) in enumerate(loader):
        if i % n == 0:
            optimizer.zero_grad(set_to_none=False)
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()


def model_zeroed(model, criterion, optimizer, loader, n=4):
    """The model's own zero_grad, and a progress line for each micro-batch."""
    model.zero_grad()
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y)
        print(f"micro-batch {i}: loss {loss.item():.4f}")
        loss = loss / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            model.zero_grad()


def gradient_hooks(model, criterion, optimizer, loader, n=4):
    """Hooks on the parameters: one halves a layer's gradient, one looks on."""
    seen = []
    handles = [
        model[0].weight.register_hook(lambda gradient: gradient * HOOK_FACTOR),
        model[2].weight.register_hook(lambda gradient: seen.append(gradient.norm())),
    ]
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
    for handle in handles:
        handle.remove()


def gradients_returned(model, criterion, optimizer, loader, n=4):
    """torch.autograd.grad in place of backward; the sums are kept by hand."""
    parameters = list(model.parameters())
    for start in range(0, len(loader), n):
        sums = [torch.zeros_like(p) for p in parameters]
        for x, y in loader[start : start + n]:
            loss = criterion(model(x), y)
            for held, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                held += gradient / n
        for p, held in zip(parameters, sums, strict=True):
            p.grad = held
        optimizer.step()


def averaged_weights(model, criterion, optimizer, loader, n=4):
    """A moving average of the weights follows each step, and a copy of the model looks on."""
    average = copy.deepcopy(model)
    for i, (x, y) in enumerate(loader):
        with torch.no_grad():
            average(x)
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for held, p in zip(average.parameters(), model.parameters(), strict=True):
                    held.lerp_(p, 0.1)


def halve_first_layer(parameters: list[nn.Parameter]) -> None:
    """Do what the hook does."""
    parameters[0].grad *= HOOK_FACTOR


def two_groups(parameters) -> torch.optim.Optimizer:
    """Return AdamW that decays matrices and not biases, each at its own rate."""
    parameters = list(parameters)
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1, "lr": 0.01},
            {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0, "lr": 0.02},
        ]
    )


def trained_only(parameters) -> torch.optim.Optimizer:
    """Return Adam over what is trained."""
    return torch.optim.Adam([p for p in parameters if p.requires_grad], lr=0.01)


SEEN = "a sound style"
CONTROLS = (
    Control(slug="divided_at_the_end", title="gradients divided by N by hand", seen=SEEN,
            ground=Ground(loader=EQUAL), sound=divided_at_the_end),
    Control(slug="clipped_by_norm", title="clip_grad_norm_ once, active", seen=SEEN,
            ground=Ground(loader=EQUAL, before_step=partial(nn.utils.clip_grad_norm_, max_norm=0.05)),
            sound=clipped_by_norm),
    Control(slug="clipped_by_value", title="clip_grad_value_ once, active", seen=SEEN,
            ground=Ground(loader=EQUAL,
                          before_step=partial(nn.utils.clip_grad_value_, clip_value=0.02)),
            sound=clipped_by_value),
    Control(slug="scaled_and_clipped", title="GradScaler, unscale_, clip", seen="AMP recipes",
            ground=Ground(loader=EQUAL, rounding=1e-2,
                          before_step=partial(nn.utils.clip_grad_norm_, max_norm=0.05)),
            sound=scaled_and_clipped),
    Control(slug="momentum_and_decay", title="SGD with momentum and weight decay", seen=SEEN,
            ground=Ground(loader=points(*[8] * 12),
                          optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1)),
            sound=plain),
    Control(slug="closure", title="optimizer.step(closure)", seen=SEEN,
            ground=Ground(loader=EQUAL), sound=closure),
    Control(slug="zeros_kept", title="zero_grad(set_to_none=False) before the window", seen=SEEN,
            ground=Ground(loader=EQUAL), sound=zeros_kept),
    Control(slug="model_zeroed", title="model.zero_grad, a line for each micro-batch", seen=SEEN,
            ground=Ground(loader=EQUAL), sound=model_zeroed),
    Control(slug="lbfgs", title="L-BFGS", seen=SEEN,
            ground=Ground(loader=EQUAL, optimizer=partial(torch.optim.LBFGS, lr=0.5, max_iter=3)),
            sound=closure,
            # several gradients at several weights belong to one step
            allowed=SOUND | {"inconclusive"}),
    Control(slug="parameter_groups", title="several parameter groups", seen=SEEN,
            ground=Ground(loader=EQUAL, optimizer=two_groups), sound=plain),
    Control(slug="frozen_layer", title="a frozen layer", seen=SEEN,
            ground=Ground(loader=EQUAL, model=frozen, optimizer=trained_only), sound=plain),
    Control(slug="gradient_hooks", title="hooks on parameters", seen=SEEN,
            ground=Ground(loader=EQUAL, before_step=halve_first_layer), sound=gradient_hooks),
    Control(slug="gradients_returned", title="torch.autograd.grad, sums by hand", seen=SEEN,
            ground=Ground(loader=EQUAL), sound=gradients_returned),
    Control(slug="averaged_weights", title="a moving average of the weights", seen=SEEN,
            ground=Ground(loader=EQUAL, optimizer=partial(torch.optim.AdamW, lr=0.01)),
            sound=averaged_weights),
)  # fmt: skip
