"""Checkpoints that are torn, exchanged, flipped or planted with code: none counts, and nothing runs."""

import json
import os
import pickle
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from experiments.durability.command import Folders
from experiments.durability.tries import Options, Result, folders_of

TRIES = 400
METADATA, DATA, MANIFEST = ".metadata", "__0_0.distcp", "manifest.json"


@dataclass(frozen=True)
class Attack:
    """What is done to the newest of two checkpoints."""

    what: str
    hit: str
    """Which file."""
    do: Callable[[Path, Path, random.Random], None]
    """Given the newest one's folder and that of the one before."""
    forged: bool = False
    """Whether the manifest is made to agree, as whoever can write there may do."""


def checkpoints(options: Options) -> Result:
    """Attack checkpoints of a training until so many tries are made."""
    draw = random.Random(f"checkpoints {options.seed}")
    wanted, start = options.tries or TRIES, time.monotonic()
    tried: Counter[tuple[str, str]] = Counter()
    problems: list[str] = []
    with folders_of(options) as places:
        made = places.new("checkpoints made", store=False)
        trained(made)
        every = attacks()
        for number in range(wanted):
            attack = every[number % len(every)] if number < len(every) else draw.choice(every)
            problems += attempted(attack, made, places, random.Random(f"{options.seed} {number}"))
            tried[attack.what, attack.hit] += 1
    rows = [f"| {what} | {hit} | {n} |" for (what, hit), n in sorted(tried.items())]
    accepted = sum("accepted" in line for line in problems)
    ran = sum("ran" in line for line in problems)
    details = "\n".join(["| attack | file | tried |", "|---|---|---|", *rows, ""])
    details += "\n".join(f"- {line}" for line in problems[:20])
    return Result(
        f"{tried.total():,} checkpoints",
        f"{accepted} accepted, {ran} run" + (f"; {problems[0]}" if problems else ""),
        f"{details}\n\n{time.monotonic() - start:.0f} s.",
        not problems,
    )


def trained(folder: Path) -> None:
    """Leave two checkpoints of a short training in a folder."""
    from gaccum_exp.train.checkpoint import files
    from gaccum_exp.train.checkpoint.encoding import encode
    from gaccum_exp.train.checkpoint.snapshot import snapshot
    from gaccum_exp.train.hooks import Hooks
    from gaccum_exp.train.loop import train

    state = small_training()
    state.total_steps = 2
    train(state, Hooks())
    files.write(folder, files.name_of(2), encode(snapshot(state, [])))
    state.total_steps = 4
    train(state, Hooks())
    files.write(folder, files.name_of(4), encode(snapshot(state, [])))


def small_training() -> Any:
    """Build one, without a store."""
    from hydra import compose, initialize_config_dir

    from gaccum_exp.config import schema
    from gaccum_exp.train.build import build

    schema.register()
    with initialize_config_dir(schema.conf_dir(), version_base="1.3"):
        of = ["model=mlp", "model.hidden=[8]", "optimizer=adamw", "runtime.device=cpu", "train.steps=4",
              "data.global_batch_size=32", "scheduler=cosine"]  # fmt: skip
        return build(schema.validate(compose("config", of)))


def attempted(attack: Attack, made: Path, places: Folders, draw: random.Random) -> list[str]:
    """Make one attack on copies; return what is wrong with what came of it."""
    from gaccum_exp.train.checkpoint import files

    folder = places.new("checkpoints attacked", store=False)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    older, newest = sorted(folder.iterdir())
    witness = folder.parent / f"{folder.name} ran"
    os.environ[WITNESS] = str(witness)
    attack.do(newest, older, draw)
    if attack.forged:
        forge(newest)
    said = f"{attack.what}, {attack.hit}"
    problems = []
    found = files.newest(folder)
    if not attack.forged and found != older:
        problems.append(f"{said}: {found and found.name} is accepted")
    for path in {newest, *folder.glob("step-*")} - {older}:
        if not path.exists():
            continue
        try:
            encoded = files.read(path)
        except files.UnusableCheckpointError:
            continue
        except BaseException as error:
            problems.append(f"{said}: {type(error).__name__}: {error}")
            continue
        problems.append(f"{said}: {path.name} is accepted, with {len(encoded.tensors)} tensors")
    if witness.exists():
        problems.append(f"{said}: planted code ran")
    shutil.rmtree(folder, ignore_errors=True)
    return problems


def forge(path: Path) -> None:
    """Make a checkpoint's manifest agree with what is there."""
    contents = {p.name: p.read_bytes() for p in path.iterdir() if p.name != MANIFEST}
    listed = {n: {"bytes": len(c), "sha256": sha256(c).hexdigest()} for n, c in contents.items()}
    text = json.dumps({"version": 2, "name": path.name, "run": "", "files": listed}, indent=1).encode()
    (path / MANIFEST).write_bytes(sha256(text).hexdigest().encode() + b"\n" + text)


def attacks() -> list[Attack]:
    """Return every attack there is."""
    found = [
        Attack(what, name, _on(name, damage))
        for name in (METADATA, DATA, MANIFEST)
        for what, damage in _DAMAGES.items()
    ]
    found += [
        Attack("exchanged with the one before", name, _exchanged(name))
        for name in (METADATA, DATA, MANIFEST)
    ]
    found.append(Attack("renamed", "the folder", lambda new, old, draw: _renamed(new)))
    for forged in (False, True):
        suffix = ", the manifest forged" if forged else ""
        for what, content in planted():
            found.append(Attack(f"{what}{suffix}", METADATA, _put(METADATA, content), forged))
        for what, content in planted():
            found.append(Attack(f"{what} as an object{suffix}", DATA, _in_data(content, False), forged))
            found.append(Attack(f"{what} as a tensor{suffix}", DATA, _in_data(content, True), forged))
    return found


Damage = Callable[[bytes, random.Random], bytes | None]
_DAMAGES: dict[str, Damage] = {
    "removed": lambda content, draw: None,
    "emptied": lambda content, draw: b"",
    "torn": lambda content, draw: content[: draw.randrange(len(content))],
    "torn in its last bytes": lambda content, draw: content[: -draw.randint(1, 8)],
    "a bit flipped": lambda content, draw: _flipped(content, [draw.randrange(8 * len(content))]),
    "many bits flipped": lambda content, draw: _flipped(
        content, draw.sample(range(8 * len(content)), 50)
    ),
    "bytes appended": lambda content, draw: content + draw.randbytes(draw.randint(1, 100)),
    "zeros in place of a page": lambda content, draw: _zeroed(content, draw),
}


def _on(name: str, damage: Damage) -> Callable[[Path, Path, random.Random], None]:
    def do(new: Path, old: Path, draw: random.Random) -> None:
        content = damage((new / name).read_bytes(), draw)
        if content is None:
            (new / name).unlink()
        else:
            (new / name).write_bytes(content)

    return do


def _flipped(content: bytes, bits: list[int]) -> bytes:
    changed = bytearray(content)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def _zeroed(content: bytes, draw: random.Random) -> bytes:
    """Return it with zeros where something else was, as a disk that was cut off leaves it."""
    while True:
        start = draw.randrange(len(content))
        length = len(content[start : start + 4096])
        changed = content[:start] + bytes(length) + content[start + length :]
        if changed != content:
            return changed


def _exchanged(name: str) -> Callable[[Path, Path, random.Random], None]:
    return lambda new, old, draw: (new / name).write_bytes((old / name).read_bytes()) and None


def _renamed(path: Path) -> None:
    path.rename(path.with_name("step-00000006"))


def _put(name: str, content: bytes) -> Callable[[Path, Path, random.Random], None]:
    return lambda new, old, draw: (new / name).write_bytes(content) and None


def _in_data(content: bytes, tensor: bool) -> Callable[[Path, Path, random.Random], None]:
    """Replace what `.metadata` says is an object, or a tensor, by something else, and say so there."""

    def do(new: Path, old: Path, draw: random.Random) -> None:
        metadata = pickle.loads((new / METADATA).read_bytes())  # our own, of a moment ago
        objects = [k for k in metadata.storage_data if k.fqn == "values.json"]
        tensors = [k for k in metadata.storage_data if k.fqn != "values.json"]
        place = metadata.storage_data[draw.choice(tensors if tensor else objects)]
        data = (new / DATA).read_bytes()
        place.offset, place.length = len(data), len(content)
        (new / DATA).write_bytes(data + content)
        (new / METADATA).write_bytes(pickle.dumps(metadata))

    return do


WITNESS = "GACCUM_EXP_WITNESS"
"""The environment variable with the name of the file that planted code makes."""
_CODE = f"import os; open(os.environ[{WITNESS!r}], 'w').close()"


class Calls:
    """Is pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


def planted() -> Iterator[tuple[str, bytes]]:
    """Yield pickles that run code where they are loaded without care."""
    import builtins
    import io
    import subprocess

    import torch
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    shell = f'touch "${WITNESS}"'
    calls = {
        "os.system": Calls(os.system, shell),
        "exec": Calls(builtins.exec, _CODE),
        "eval": Calls(builtins.eval, f"__import__('os').system({shell!r})"),
        "subprocess": Calls(subprocess.call, shell, None),
        "__import__": Calls(getattr, Calls(builtins.__import__, "os"), "system"),
        "torch.load": Calls(torch.load, "values"),
    }
    for name, call in calls.items():
        yield f"{name} in a pickle", pickle.dumps(call)
    yield "old protocol", pickle.dumps(calls["os.system"], protocol=0)
    index = MetadataIndex("values.json")
    for name, inside in {
        "in a field": Metadata({"values.json": BytesStorageMetadata()}, storage_data=calls["exec"]),
        "among the keys": Metadata({"values.json": calls["exec"]}, storage_data={}),  # type: ignore[dict-item]  # it is an attack
        "in a place": Metadata({}, storage_data={index: calls["os.system"]}),
    }.items():
        yield f"a call {name} of DCP's metadata", pickle.dumps(inside)
    saved = io.BytesIO()
    torch.save(calls["exec"], saved)
    yield "torch.save of a call", saved.getvalue()
    # BUILD with attributes for a class: `Metadata.__setstate__ = exec`, and then a state for it.
    yield (
        "a class given a method",
        (
            b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n"
            b"(N}\x8c\x0c__setstate__cbuiltins\nexec\nstb."
        ),
    )
