"""Only a whole checkpoint counts, and nothing that is planted in one runs."""

import io
import logging
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experiments.durability.checkpoints import Attack, attacks, attempted, trained
from experiments.durability.command import Folders, folders
from gaccum_exp.train.checkpoint import files
from gaccum_exp.train.checkpoint.dcp_reader import _Unpickler, load
from gaccum_exp.train.checkpoint.encoding import Encoded, encode


@pytest.fixture(scope="module")
def places() -> Iterator[Folders]:
    with folders(None) as made:
        yield made


@pytest.fixture(scope="module")
def made(places: Folders) -> Path:
    """Two checkpoints of a training."""
    folder = places.new("made", store=False)
    trained(folder)
    return folder


def small(value: float = 1.0) -> Encoded:
    return encode({"weight": torch.full((2, 3), value), "epoch": 1})


def write_some(folder: Path, *steps: int) -> list[Path]:
    return [files.write(folder, files.name_of(step), small()) for step in steps]


@pytest.mark.parametrize("attack", attacks(), ids=lambda a: f"{a.what}: {a.hit}")
def test_what_is_damaged_or_planted_neither_counts_nor_runs(
    attack: Attack, made: Path, places: Folders
) -> None:
    """Whatever the damage: the older one is taken; code in it does not run, digests forged or not."""
    assert attempted(attack, made, places, random.Random(attack.what)) == []


def test_the_planted_code_does_run_where_it_is_loaded_without_care(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above is one: the stock reader of torch.distributed.checkpoint runs it."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from experiments.durability.checkpoints import WITNESS, planted

    monkeypatch.setenv(WITNESS, str(tmp_path / "ran"))
    for name, content in planted():
        if name == "exec in a pickle":
            (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(AttributeError):
        FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("looked_up", ["torch\nSize", "torch.serialization\n_get_layout"])
def test_a_pickle_leaves_nothing_in_what_it_has_looked_up(looked_up: str) -> None:
    """It may set a function's defaults, as any object's attributes; the next one finds them as ever."""
    name = b"c" + looked_up.encode() + b"\n"
    planted = b"\x80\x02" + name + b"N}\x8c\x0c__defaults__(I7\nts\x86b."
    changed = _Unpickler(io.BytesIO(planted)).load()
    assert changed.__defaults__ == (7,)
    found = _Unpickler(io.BytesIO(b"\x80\x02" + name + b".")).load()
    assert found.__defaults__ is None


def test_torch_reads_the_tensors_of_a_checkpoint_with_its_own_reader(tmp_path: Path) -> None:
    """The format is that of torch.distributed.checkpoint, whose stock reader loads the tensors."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    path = files.write(tmp_path, files.name_of(3), small(2.5))
    into = {"weight": torch.zeros(2, 3)}
    reader, planner = FileSystemReader(path), DefaultLoadPlanner()
    metadata = reader.read_metadata()
    planner.set_up_planner(into, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    reader.read_data(planner.finish_plan(plan), planner).wait()
    assert torch.equal(into["weight"], torch.full((2, 3), 2.5))
    metadata = pickle.loads((path / ".metadata").read_bytes())  # written just now
    assert str(tmp_path) not in repr(metadata)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.bool, torch.int8]
)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (3, 2)])
def test_tensors_of_any_type_and_shape_come_back(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Bit for bit, NaN and infinities included, with their strides."""
    tensor = torch.randn(shape).mul(3).to(dtype)
    given = {
        "plain": tensor,
        "across": torch.randn(4, 3).t(),
        "odd": torch.tensor([torch.nan, -torch.inf]),
    }
    path = files.write(tmp_path, files.name_of(1), encode(given))
    read = files.read(path).tensors
    assert read.keys() == given.keys()
    for name, before in given.items():
        assert _bits(read[name]) == _bits(before)
        assert read[name].stride() == before.stride()


def _bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    content = tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else torch.empty(0)
    return tensor.dtype, tuple(tensor.shape), content.numpy().tobytes()


def test_the_newest_by_its_place_counts(tmp_path: Path) -> None:
    """Inside a window it is newer than at its beginning; what has another name is none of ours."""
    for name in ("step-00000009", "step-00000009+12", "step-00000009+3", "step-00000010"):
        files.write(tmp_path, name, small())
    for other in ("step-00000011.partial", "step-12", "last", "step-00000013.replaced"):
        (tmp_path / other).mkdir()
    assert files.newest(tmp_path) == tmp_path / "step-00000010"
    files.remove(tmp_path / "step-00000010")
    assert files.newest(tmp_path) == tmp_path / "step-00000009+12"
    assert files.place_of(tmp_path / "step-00000009+12") == (9, 12)
    assert files.newest(tmp_path / "nowhere") is None


def test_why_one_is_passed_over_is_said_in_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of each, with its path."""
    caplog.set_level(logging.WARNING)
    first, second, third = write_some(tmp_path, 1, 2, 3)
    (third / "manifest.json").unlink()
    data = second / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    assert files.newest(tmp_path) == first
    assert caplog.messages == [
        f"{third} does not count: its manifest cannot be read (No such file or directory)",
        f"{second} does not count: __0_0.distcp is not what was written",
    ]


def test_a_checkpoint_of_another_run_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Copied into the folder of a run, or left there by one before: it is passed over, which is said."""
    own = files.write(tmp_path, files.name_of(1), small(), "this run's token")
    other = files.write(tmp_path, files.name_of(2), small(), "another's")
    assert files.newest(tmp_path, "this run's token") == own
    assert caplog.messages == [f"{other} does not count: it is of another run"]
    assert files.newest(tmp_path, "a third one's") is None


def test_the_newest_are_kept_and_what_is_left_over_is_removed(tmp_path: Path) -> None:
    """Those before, what was passed over further on, and what a process left that was killed."""
    written = write_some(tmp_path, 1, 2, 3, 4, 9)
    (written[2] / "manifest.json").unlink()
    (tmp_path / "step-00000005.partial").mkdir()
    (tmp_path / "notes").mkdir()
    files.prune(tmp_path, written[3], keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-00000002", "step-00000004"]


def test_one_that_does_not_count_is_written_again(tmp_path: Path) -> None:
    """A run that went on from an earlier one comes to its place again."""
    (path,) = write_some(tmp_path, 5)
    (path / ".metadata").unlink()
    assert files.newest(tmp_path) is None
    assert files.write(tmp_path, path.name, small(3.0)) == path
    assert files.newest(tmp_path) == path
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert float(files.read(path).tensors["weight"][0, 0]) == 3.0


def test_nothing_is_left_of_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at its last file: those before stay, and count."""
    (before,) = write_some(tmp_path, 1)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(tmp_path, files.name_of(2), small())
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [before.name]
    assert files.newest(tmp_path) == before


def test_finding_the_newest_imports_no_torch(made: Path) -> None:
    """The command that looks for it waits for nothing."""
    code = (
        "import sys; from pathlib import Path; from gaccum_exp.train.checkpoint.files import newest; "
        f"print(newest(Path({str(made)!r})).name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["step-00000004", "False"]


def test_a_file_that_is_not_listed_is_not_opened(tmp_path: Path) -> None:
    """Metadata that point elsewhere are refused, whatever the manifest says."""
    (path,) = write_some(tmp_path, 1)
    with pytest.raises(ValueError, match="no file of the checkpoint"):
        load(path, [])
