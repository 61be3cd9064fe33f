"""torchvision's four data sets, read from files in their real formats."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets

from gaccum_exp.data import download
from gaccum_exp.data.torchvision import cifar10, cifar100, fashion_mnist, mnist
from gaccum_exp.errors import BadInputError

if TYPE_CHECKING:
    from conftest import Written

FUNCTIONS = {"MNIST": mnist, "FashionMNIST": fashion_mnist, "CIFAR10": cifar10, "CIFAR100": cifar100}


def read(name: str, root: Path, split: str = "train", **options: Any) -> Any:
    """Call the function under test for torchvision's class of that name."""
    return FUNCTIONS[name](split, str(root), **options)


def unpack(written: tuple[str, Written]) -> None:
    """Put the unpacked files where torchvision puts them, by torchvision's own code."""
    name, files = written
    getattr(datasets, name)(files.root, download=True)


class TestFormats:
    @pytest.mark.parametrize("split", ["train", "test"])
    def test_pixels_and_targets_are_those_in_the_files(
        self, written: tuple[str, Written], split: str
    ) -> None:
        """Undoing the normalisation gives the bytes that were written, in their order."""
        unpack(written)
        name, files = written
        inputs, targets = read(name, files.root, split, download=False).tensors
        images = files.images[split]
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        # The normalisation is one scale and shift per channel, found here from the pixels.
        for channel in range(images.shape[1]):
            pixels = images[:, channel].astype(np.float64).ravel()
            scale, shift = np.polyfit(pixels, inputs[:, channel].double().numpy().ravel(), 1)
            mine = np.round((inputs[:, channel].double().numpy() - shift) / scale)
            assert np.array_equal(mine, images[:, channel])
            assert 1 / 0.36 <= scale * 255 <= 1 / 0.24
        assert targets.tolist() == files.targets[split]
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)

    def test_without_augmentation_it_is_fetched_by_index(self, written: tuple[str, Written]) -> None:
        """The type is exactly TensorDataset, which knows the names of its classes."""
        unpack(written)
        dataset = read(written[0], written[1].root)
        assert type(dataset) is TensorDataset
        assert len(dataset.classes) == (100 if written[0] == "CIFAR100" else 10)  # type: ignore[attr-defined]

    def test_archives_alone_are_unpacked_without_a_network(
        self, written: tuple[str, Written], no_network: None
    ) -> None:
        """Archives copied into place are enough, even where downloading is forbidden."""
        name, files = written
        assert len(read(name, files.root, download=False)) == len(files.targets["train"])
        assert [path for path in files.root.iterdir() if path.name.startswith("tmp")] == []

    @pytest.mark.parametrize("kept_bytes", [0, 6, 40])
    def test_cut_off_file_is_unpacked_again(
        self, written: tuple[str, Written], no_network: None, kept_bytes: int
    ) -> None:
        """A damaged unpacked file beside intact archives is replaced, not believed."""
        unpack(written)
        name, files = written
        for path in files.root.rglob("*"):
            if path.is_file() and path not in files.archives:
                path.write_bytes(path.read_bytes()[:kept_bytes])
        assert len(read(name, files.root, download=False)) == len(files.targets["train"])

    def test_unknown_split_names_the_nearest(self) -> None:
        """A misspelt split is bad input before any file is looked for."""
        with pytest.raises(BadInputError, match="did you mean 'test'"):
            mnist("tets")


class TestAugmentation:
    def test_draws_follow_torchs_generator(self, written: tuple[str, Written]) -> None:
        """The same seed gives the same image, and other seeds give others."""
        unpack(written)
        dataset = read(written[0], written[1].root, augment=True)

        def under(seed: int) -> torch.Tensor:
            torch.manual_seed(seed)
            return dataset[3][0]

        draws = [under(seed) for seed in range(8)]
        assert all(torch.equal(draw, under(seed)) for seed, draw in enumerate(draws))
        assert len({draw.numpy().tobytes() for draw in draws}) > 1
        assert {draw.shape for draw in draws} == {read(written[0], written[1].root)[0][0].shape}

    def test_some_draw_is_the_plain_image(self, written: tuple[str, Written]) -> None:
        """Shifted by nothing and not flipped, an augmented image equals the plain one."""
        unpack(written)
        augmented = read(written[0], written[1].root, augment=True)
        plain, target = read(written[0], written[1].root)[5]
        torch.manual_seed(0)
        draws = [augmented[5] for _ in range(1000)]
        assert any(torch.equal(plain, image) for image, _ in draws)
        assert {label for _, label in draws} == {int(target)}

    def test_only_digits_are_never_flipped(self, written: tuple[str, Written]) -> None:
        """A bright left edge appears on the right too, except in MNIST."""
        unpack(written)
        name, files = written
        dataset = read(name, files.root, augment=True)
        dataset.images.zero_()
        dataset.images[..., :8] = 255
        torch.manual_seed(0)
        right = [float(dataset[0][0][..., 20:].max()) > 0 for _ in range(100)]
        assert any(right) == (name != "MNIST")
        assert not all(right)

    def test_workers_can_carry_it(self, written: tuple[str, Written]) -> None:
        """Augmented images come through DataLoader worker processes as float32 batches."""
        unpack(written)
        dataset = read(written[0], written[1].root, augment=True)
        images, targets = next(iter(DataLoader(dataset, batch_size=4, num_workers=1)))
        assert images.dtype == torch.float32
        assert targets.tolist() == written[1].targets["train"][:4]


class TestMissing:
    def test_message_says_what_where_and_how(
        self, written: tuple[str, Written], tmp_path: Path, no_network: None
    ) -> None:
        """One line names the data set, the folder, each archive and the key to change."""
        name, files = written
        for options, reason in (({}, "cannot be downloaded"), ({"download": False}, "is false")):
            with pytest.raises(BadInputError) as caught:
                read(name, tmp_path / "empty", **options)
            message = str(caught.value)
            assert "\n" not in message
            expected = [name, str(tmp_path / "empty"), "data.root", reason]
            expected += [str(path.relative_to(files.root)) for path in files.archives]
            assert [word for word in expected if word not in message] == []

    def test_silent_server_is_given_up_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A server that takes the connection and says nothing ends in the same error."""
        monkeypatch.setattr(download, "ANSWER_TIMEOUT_S", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"http://127.0.0.1:{silent.getsockname()[1]}/cifar.tar.gz"
            monkeypatch.setattr(datasets.CIFAR10, "url", address)
            with pytest.raises(BadInputError, match="cannot be downloaded"):
                cifar10("train", str(tmp_path))
        assert socket.getdefaulttimeout() is None


class TestDownload:
    @pytest.fixture
    def server(
        self, written: tuple[str, Written], own_network: None, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[list[str]]:
        """Serve the archives on this machine, and note each path that is fetched."""
        name, files = written
        fetched: list[str] = []

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def handle(self) -> None:
                # torchvision asks for redirections first, and hangs up on the answer.
                with contextlib.suppress(ConnectionError):
                    super().handle()

            def do_GET(self) -> None:  # http.server's name
                fetched.append(self.path)
                super().do_GET()

        handler = partial(Handler, directory=str(files.archives[0].parent))
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
            thread = threading.Thread(target=running.serve_forever, args=(0.01,))
            thread.start()
            base = f"http://127.0.0.1:{running.server_address[1]}/"
            source = getattr(datasets, name)
            if name.endswith("MNIST"):
                monkeypatch.setattr(source, "mirrors", [base])
            else:
                monkeypatch.setattr(source, "url", base + source.filename)
            yield fetched
            running.shutdown()
            thread.join()

    def test_absent_files_are_fetched_once(
        self, written: tuple[str, Written], server: list[str], tmp_path: Path
    ) -> None:
        """The first read downloads each archive once; the second asks the server nothing."""
        name, files = written
        here = tmp_path / "here"
        dataset = read(name, here)
        assert dataset.tensors[1].tolist() == files.targets["train"]
        assert set(server) == {f"/{path.name}" for path in files.archives}
        server.clear()
        read(name, here, "test")
        assert server == []
        assert [path for path in here.iterdir() if path.name.startswith("tmp")] == []

    def test_archive_with_another_checksum_is_refused(
        self, written: tuple[str, Written], server: list[str], tmp_path: Path
    ) -> None:
        """What arrives damaged is not read, and nothing of it stays in the folder."""
        name, files = written
        files.archives[0].write_bytes(files.archives[0].read_bytes()[:-9])
        with pytest.raises(BadInputError, match="cannot be downloaded"):
            read(name, tmp_path / "here")
        assert list((tmp_path / "here").iterdir()) == []
