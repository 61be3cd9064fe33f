"""What happens between backward and step happens per micro-batch, or twice, or too coarsely."""

import math
from functools import partial

import torch
from torch import nn

from experiments.negative_controls.control import Control, Ground
from experiments.negative_controls.models import points
from gaccum_exp.audit.result import LOSS_SCALE, LOW_PRECISION, STALE_OR_MISSING

MAX_NORM = 0.02


def clipped_inside_faulty(model, criterion, optimizer, loader, n=4):
    """What has been accumulated so far is cut down after each micro-batch."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def clipped_inside_sound(model, criterion, optimizer, loader, n=4):
    """The window's gradient is cut down once."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()


def unscaled_twice_faulty(model, criterion, optimizer, loader, n=4):
    """Unscaled by hand in order to clip, and once more by the scaler."""
    scaler = torch.amp.GradScaler("cpu")
    for i, (x, y) in enumerate(loader):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(x), y) / n
        scaler.scale(loss).backward()
        if (i + 1) % n == 0:
            for p in model.parameters():
                p.grad /= scaler.get_scale()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def unscaled_twice_sound(model, criterion, optimizer, loader, n=4):
    """The scaler unscales, and remembers that it did."""
    scaler = torch.amp.GradScaler("cpu")
    for i, (x, y) in enumerate(loader):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(x), y) / n
        scaler.scale(loss).backward()
        if (i + 1) % n == 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def unscaled_inside_faulty(model, criterion, optimizer, loader, n=4):
    """Unscaled at each micro-batch: the earlier ones again and again, until nothing is left of them."""
    scaler = torch.amp.GradScaler("cpu")
    for i, (x, y) in enumerate(loader):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(x), y) / n
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if (i + 1) % n == 0:
            scaler.step(optimizer)
            optimizer.zero_grad()
        scaler.update()


def unscaled_inside_sound(model, criterion, optimizer, loader, n=4):
    """Unscaled and updated once a window."""
    scaler = torch.amp.GradScaler("cpu")
    for i, (x, y) in enumerate(loader):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(model(x), y) / n
        scaler.scale(loss).backward()
        if (i + 1) % n == 0:
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            optimizer.zero_grad()
            scaler.update()


def bf16_buffer_faulty(model, criterion, optimizer, loader, n=64):
    """64 gradients are added up in bfloat16, whose mantissa has eight bits."""
    buffers = [torch.zeros_like(p, dtype=torch.bfloat16) for p in model.parameters()]
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        for p, buffer in zip(model.parameters(), buffers, strict=True):
            buffer += p.grad
            p.grad = None
        if (i + 1) % n == 0:
            for p, buffer in zip(model.parameters(), buffers, strict=True):
                p.grad = buffer.float()
                buffer.zero_()
            optimizer.step()
            optimizer.zero_grad()


def bf16_buffer_sound(model, criterion, optimizer, loader, n=64):
    """They are added up in float32."""
    buffers = [torch.zeros_like(p, dtype=torch.float32) for p in model.parameters()]
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        for p, buffer in zip(model.parameters(), buffers, strict=True):
            buffer += p.grad
            p.grad = None
        if (i + 1) % n == 0:
            for p, buffer in zip(model.parameters(), buffers, strict=True):
                p.grad = buffer.clone()
                buffer.zero_()
            optimizer.step()
            optimizer.zero_grad()


def schedule_inside_faulty(model, criterion, optimizer, loader, n=4):
    """The schedule is through four times too early."""
    steps = len(loader) // n
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()


def schedule_inside_sound(model, criterion, optimizer, loader, n=4):
    """The schedule moves with the optimizer."""
    steps = len(loader) // n
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


def clipped_by_total_inside_faulty(model, criterion, optimizer, loader, n=4):
    """As torchtitan clips, by a norm that was taken before; and after each micro-batch."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        nn.utils.clip_grads_with_norm_(model.parameters(), MAX_NORM, norm)
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def clipped_by_total_inside_sound(model, criterion, optimizer, loader, n=4):
    """The same, once."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            nn.utils.clip_grads_with_norm_(model.parameters(), MAX_NORM, norm)
            optimizer.step()
            optimizer.zero_grad()


def loss_scale_moves_faulty(model, criterion, optimizer, loader, n=4):
    """The scaler is updated in every micro-batch: later gradients are added at another scale."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        scaler.scale(loss).backward()
        if (i + 1) % n == 0:
            scaler.step(optimizer)
            optimizer.zero_grad()
            scaler.update()
        else:
            scaler.update(2 * scaler.get_scale())


def loss_scale_moves_sound(model, criterion, optimizer, loader, n=4):
    """It is updated after the step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        scaler.scale(loss).backward()
        if (i + 1) % n == 0:
            scaler.step(optimizer)
            optimizer.zero_grad()
            scaler.update(2 * scaler.get_scale())


def chained(optimizer):
    """Return a schedule made of two."""
    schedules = torch.optim.lr_scheduler
    parts = [schedules.ExponentialLR(optimizer, 0.5), schedules.StepLR(optimizer, 1000)]
    return schedules.ChainedScheduler(parts)


def chained_schedule_faulty(model, criterion, optimizer, loader, n=4):
    """A schedule made of schedules, stepped in every micro-batch."""
    scheduler = chained(optimizer)
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()


def chained_schedule_sound(model, criterion, optimizer, loader, n=4):
    """It moves with the optimizer."""
    scheduler = chained(optimizer)
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


def cosine(step: int, steps: int) -> float:
    """Return the factor of cosine annealing to zero."""
    return (1 + math.cos(math.pi * step / steps)) / 2


HALF_PRECISION = Ground(loader=points(*[8] * 8), rounding=1e-2)

CONTROLS = (
    Control(
        slug="clipped_inside",
        title="gradients clipped per micro-batch",
        seen="PyTorch forums, AMP recipes",
        ground=Ground(
            loader=points(*[8] * 8),
            before_step=partial(nn.utils.clip_grad_norm_, max_norm=MAX_NORM),
        ),
        faulty=clipped_inside_faulty,
        sound=clipped_inside_sound,
        expected=LOSS_SCALE,
        remedy="clip",
    ),
    Control(
        slug="unscaled_twice",
        title="gradients unscaled twice, by hand and by the scaler",
        seen="PyTorch forums, AMP recipes",
        ground=HALF_PRECISION,
        faulty=unscaled_twice_faulty,
        sound=unscaled_twice_sound,
        expected=LOSS_SCALE,
        remedy="unscale",
    ),
    Control(
        slug="unscaled_inside",
        title="gradients unscaled per micro-batch",
        seen="PyTorch forums, AMP recipes",
        ground=HALF_PRECISION,
        faulty=unscaled_inside_faulty,
        sound=unscaled_inside_sound,
        expected=STALE_OR_MISSING,
    ),
    Control(
        slug="bf16_buffer",
        title="gradients added up in bfloat16",
        seen="deepspeedai/DeepSpeed#2768, pytorch/pytorch#106395",
        ground=Ground(loader=points(*[1] * 128), n=64),
        faulty=bf16_buffer_faulty,
        sound=bf16_buffer_sound,
        expected=LOW_PRECISION,
        remedy="float32",
    ),
    Control(
        slug="schedule_inside",
        title="learning-rate schedule stepped per micro-batch",
        seen="huggingface/accelerate#963",
        ground=Ground(loader=points(*[8] * 16), rates=cosine),
        faulty=schedule_inside_faulty,
        sound=schedule_inside_sound,
        wrong="schedule",
        expected="schedule",
        remedy="schedule",
    ),
    Control(
        slug="clipped_by_total_inside",
        title="gradients clipped per micro-batch, by a norm taken before",
        seen="clip_grads_with_norm_, as in pytorch/torchtitan",
        ground=Ground(
            loader=points(*[8] * 8),
            before_step=partial(nn.utils.clip_grad_norm_, max_norm=MAX_NORM),
        ),
        faulty=clipped_by_total_inside_faulty,
        sound=clipped_by_total_inside_sound,
        expected=LOSS_SCALE,
        remedy="clip",
    ),
    Control(
        slug="loss_scale_moves",
        title="the loss scale moves inside the window",
        seen="PyTorch forums, AMP recipes",
        ground=Ground(loader=points(*[8] * 8)),
        faulty=loss_scale_moves_faulty,
        sound=loss_scale_moves_sound,
        expected=LOSS_SCALE,
        remedy="scale",
    ),
    Control(
        slug="chained_schedule",
        title="a schedule made of schedules, stepped per micro-batch",
        seen="as huggingface/accelerate#963",
        ground=Ground(loader=points(*[8] * 16), rates=lambda step, steps: 0.5**step),
        faulty=chained_schedule_faulty,
        sound=chained_schedule_sound,
        wrong="schedule",
        expected="schedule",
        remedy="stepped 3 times",
    ),
)
