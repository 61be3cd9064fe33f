"""The gradient is right, and the memory or the reported number is not."""

from experiments.negative_controls.control import Control, Ground
from experiments.negative_controls.models import points


def backward_once_faulty(model, criterion, optimizer, loader, n=4):
    """All graphs of the window are alive when the one backward begins: the large batch's memory."""
    loss = 0
    for i, (x, y) in enumerate(loader):
        loss = loss + criterion(model(x), y) / n
        if (i + 1) % n == 0:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = 0


def backward_once_sound(model, criterion, optimizer, loader, n=4):
    """Each graph is gone before the next is made."""
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()


def graphs_kept_faulty(model, criterion, optimizer, loader, n=4):
    """The running total is a tensor that holds on to every graph of the window."""
    reported, total_loss = [], 0
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        total_loss += loss
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            reported.append(total_loss.item())
            total_loss = 0
    return reported


def graphs_kept_sound(model, criterion, optimizer, loader, n=4):
    """The running total is cut off from the graphs."""
    reported, total_loss = [], 0
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        total_loss += loss.detach()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            reported.append(total_loss.item())
            total_loss = 0
    return reported


def activations_kept_faulty(model, criterion, optimizer, loader, n=4):
    """Backward is told to keep the activations, and the list of losses keeps the graphs."""
    losses = []
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward(retain_graph=True)
        losses.append(loss)
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {i // n}: loss {sum(losses).item():.4f}")
            losses = []


def activations_kept_sound(model, criterion, optimizer, loader, n=4):
    """Backward frees them, and the list holds numbers."""
    losses = []
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y) / n
        loss.backward()
        losses.append(loss.item())
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {i // n}: loss {sum(losses):.4f}")
            losses = []


def last_loss_faulty(model, criterion, optimizer, loader, n=4):
    """The number reported for the window is its last micro-batch's."""
    reported = []
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y)
        (loss / n).backward()
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            reported.append(loss.item())
    return reported


def last_loss_sound(model, criterion, optimizer, loader, n=4):
    """The number reported is the window's mean."""
    reported, running_loss = [], 0.0
    for i, (x, y) in enumerate(loader):
        loss = criterion(model(x), y)
        (loss / n).backward()
        running_loss += loss.item() / n
        if (i + 1) % n == 0:
            optimizer.step()
            optimizer.zero_grad()
            reported.append(running_loss)
            running_loss = 0.0
    return reported


GROUND = Ground(loader=points(*[8] * 12))

CONTROLS = (
    Control(
        slug="backward_once",
        title="backward once per window",
        seen="pytorch/torchtune#1875, #1917",
        ground=GROUND,
        faulty=backward_once_faulty,
        sound=backward_once_sound,
        wrong="memory",
        expected="memory",
        remedy="backward",
    ),
    Control(
        slug="graphs_kept",
        title="graphs kept by a running total",
        seen="EleutherAI/gpt-neox#1123",
        ground=GROUND,
        faulty=graphs_kept_faulty,
        sound=graphs_kept_sound,
        wrong="memory",
        expected="memory",
        remedy="detach",
    ),
    Control(
        slug="activations_kept",
        title="graphs and activations kept by retain_graph",
        seen="EleutherAI/gpt-neox#1123, PyTorch forums",
        ground=GROUND,
        faulty=activations_kept_faulty,
        sound=activations_kept_sound,
        wrong="memory",
        expected="memory",
    ),
    Control(
        slug="last_loss",
        title="reported loss is the last micro-batch's",
        seen="allenai/allennlp#4706",
        ground=GROUND,
        faulty=last_loss_faulty,
        sound=last_loss_sound,
        wrong="reported loss",
        expected="reported loss",
        remedy="last micro-batch",
    ),
)
