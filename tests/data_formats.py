"""Small files in the formats of the real datasets, and a server to download them from."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import pickle
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import io

Pixels = NDArray[np.uint8]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def random_pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_mnist(folder: Path, num_train: int = 6, num_test: int = 4) -> list[tuple[str, str]]:
    """The four .gz files with their MD5s, as torchvision lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    resources = []
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        images = struct.pack(">IIII", 0x803, count, 28, 28) + random_pixels(count, 28, 28, seed=count).tobytes()
        labels = struct.pack(">II", 0x801, count) + bytes(i % 10 for i in range(count))
        for name, content in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            path = folder / f"{name}.gz"
            path.write_bytes(gzip.compress(content))
            resources.append((path.name, md5(path)))
    return resources


def write_cifar(root: Path, kind: Any, key: str, num_each: int, monkeypatch: Any) -> None:
    """Batches of ``kind`` (torchvision's class), whose checksums become those of the files written."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for attribute in ("train_list", "test_list"):
        entries = []
        for name, _ in getattr(kind, attribute):
            pixels = random_pixels(num_each, 3072, seed=sum(name.encode()))
            (folder / name).write_bytes(
                pickle.dumps({"data": pixels, key: [i % 10 for i in range(num_each)]}, protocol=2)
            )
            entries.append([name, md5(folder / name)])
        monkeypatch.setattr(kind, attribute, entries)
    meta = folder / kind.meta["filename"]
    meta.write_bytes(pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(10)]}, protocol=2))
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(meta)})


def pack_tar(root: Path, folder: str, archive: Path) -> str:
    """The folder as .tar.gz; returns its MD5."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / folder, arcname=folder)
    return md5(archive)


def write_svhn(root: Path, kind: Any, monkeypatch: Any) -> dict[str, Pixels]:
    """Both .mat files; returns their images [N, 32, 32, 3]. Labels are 1..10, ten for the digit 0."""
    root.mkdir(parents=True, exist_ok=True)
    written, listed = {}, dict(kind.split_list)
    for split, count in (("train", 12), ("test", 10)):
        url, name, _ = listed[split]
        written[split] = random_pixels(count, 32, 32, 3, seed=count)
        labels = np.array([[1 + i % 10] for i in range(count)], dtype=np.uint8)
        io.savemat(root / name, {"X": written[split].transpose(1, 2, 3, 0), "y": labels})
        listed[split] = [url, name, md5(root / name)]
    monkeypatch.setattr(kind, "split_list", listed)
    return written


def write_femnist(folder: Path, train: dict[str, list[int]], test: dict[str, list[int]]) -> None:
    """LEAF's JSON: writer -> labels; each writer's images are all of one grey, its label."""
    for split, writers in (("train", train), ("test", test)):
        (folder / split).mkdir(parents=True)
        content = {
            "users": list(writers),
            "num_samples": [len(labels) for labels in writers.values()],
            "user_data": {
                name: {"x": [[label / 255] * 784 for label in labels], "y": labels} for name, labels in writers.items()
            },
        }
        (folder / split / "all_data_0_niid_0_keep_0.json").write_text(json.dumps(content))


def write_picture(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    Image.fromarray(random_pixels(height, width, 3, seed=seed)).save(path)


def write_tiny_imagenet(folder: Path, wnids: list[str]) -> None:
    """Two train pictures and one validation picture per class; classes in wnids.txt in the order given."""
    folder.mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(wnids) + "\n")
    lines = []
    for k, wnid in enumerate(wnids):
        for i in range(2):
            write_picture(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", seed=10 * k + i)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
        write_picture(folder / "val" / "images" / f"val_{k}.JPEG", seed=500 + k)
        lines.append(f"val_{k}.JPEG\t{wnid}\t0\t0\t63\t63")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(reversed(lines)) + "\n")


def pack_zip(root: Path, folder: str, archive: Path) -> str:
    """The folder as .zip; returns its MD5."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted((root / folder).rglob("*")):
            packed.write(path, path.relative_to(root))
    return md5(archive)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: pytest's output is for failures."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A server on this machine for the files of a folder; gives its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: _Quiet(*args, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
