"""Where LPIPS finds its backbone, and what it says when it does not. The backbones here are random, not trained."""

from __future__ import annotations

import hashlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import torchvision

from gia_bench.errors import ConfigError, DataError
from gia_bench.metrics import Lpips, Metrics, UnavailableError, evaluate
from gia_bench.metrics.lpips import NETS, _fetch, _network, data_root
from gia_bench.seeding import seeded
from gia_bench.values import Reconstruction, Truth

SQUEEZE = "squeezenet1_1_features.pth"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / SQUEEZE
    with seeded(0):
        features = torchvision.models.squeezenet1_1(weights=None).features
    torch.save({f"features.{name}": tensor for name, tensor in features.state_dict().items()}, path)
    return path


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def _pair(channels: int = 3, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.rand(2, channels, size, size, generator=draw), torch.rand(2, channels, size, size, generator=draw)


def test_a_file_and_its_folder_give_the_same_distances(backbone: Path) -> None:
    images, truth = _pair()
    by_file, by_folder, found = (
        Lpips(backbone=backbone).distance("squeeze", images, truth),
        Lpips(backbone=backbone.parent).distance("squeeze", images, truth),
        Lpips(weights=backbone.parent).distance("squeeze", images, truth),
    )
    assert torch.equal(by_file, by_folder)
    assert torch.equal(by_file, found)
    assert (by_file > 0).all()


def test_images_in_the_unit_range_are_scaled_to_what_the_net_expects(backbone: Path) -> None:
    images, truth = _pair()
    net = _network("squeeze", backbone)
    ours = Lpips(backbone=backbone).distance("squeeze", images, truth).float()
    assert torch.allclose(ours, net(2 * images - 1, 2 * truth - 1).flatten(), atol=1e-6)
    assert not torch.allclose(ours, net(images, truth).flatten(), atol=1e-4)


def test_gray_images_count_as_three_equal_channels(backbone: Path) -> None:
    images, truth = _pair(channels=1)
    lpips = Lpips(backbone=backbone)
    colour = lpips.distance("squeeze", images.repeat(1, 3, 1, 1), truth.repeat(1, 3, 1, 1))
    assert torch.equal(lpips.distance("squeeze", images, truth), colour)


def test_the_distance_of_an_image_does_not_depend_on_the_batch(backbone: Path) -> None:
    images, truth = _pair()
    many = Lpips(backbone=backbone).distance("squeeze", images.repeat(20, 1, 1, 1), truth.repeat(20, 1, 1, 1))
    assert torch.allclose(many[:2], many[-2:], atol=1e-6)
    assert len(many) == 40


def test_loading_a_net_leaves_the_global_random_stream_alone(backbone: Path) -> None:
    _network.cache_clear()
    before = torch.random.get_rng_state()
    _network("squeeze", backbone)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("net", "size"), [("alex", 28), ("squeeze", 16), ("vgg", 8)])
def test_images_too_small_for_the_net_are_unavailable_before_any_backbone_is_looked_for(net: str, size: int) -> None:
    with pytest.raises(UnavailableError, match=f"lpips_{net} needs .*, these are {size}x{size}"):
        Lpips(nets=[net], weights="/does/not/exist", download=False).distance(net, *_pair(size=size))


def test_images_of_two_channels_are_unavailable(backbone: Path) -> None:
    with pytest.raises(UnavailableError, match="have 2"):
        Lpips(backbone=backbone).distance("squeeze", *_pair(channels=2))


def test_without_a_backbone_every_victim_has_a_reason_and_none_a_number(no_hub: Path, tmp_path: Path) -> None:
    images, truth = _pair()
    metrics = Metrics(names=["mse"], lpips=Lpips(weights=tmp_path, download=False))
    guess = Reconstruction(inputs=images, labels=None, score=0.0)
    values = evaluate(guess, Truth(truth, torch.tensor([0, 1])), metrics).values[2:]
    assert [(v.metric, v.victim, v.value, v.status) for v in values] == [
        ("lpips_squeeze", 0, None, "unavailable"),
        ("lpips_squeeze", 1, None, "unavailable"),
    ]
    assert SQUEEZE in str(values[0].reason)


def test_weights_in_the_hub_cache_are_used(no_hub: Path, backbone: Path, tmp_path: Path) -> None:
    name = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rsplit("/", 1)[1]
    no_hub.mkdir(parents=True)
    (no_hub / name).write_bytes(backbone.read_bytes())
    images, truth = _pair()
    found = Lpips(weights=tmp_path, download=False).distance("squeeze", images, truth)
    assert torch.equal(found, Lpips(backbone=backbone).distance("squeeze", images, truth))


def test_a_network_that_does_not_answer_is_asked_once_and_is_a_reason(
    no_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(request: urllib.request.Request, timeout: float) -> None:
        asked.append(request.full_url)
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"download.pytorch.org.*no route"):
            Lpips(weights=tmp_path).distance("squeeze", *_pair())
    assert len(asked) == 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", folder
    httpd.shutdown()
    httpd.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_download_is_kept_only_if_its_hash_is_right(server: tuple[str, Path], tmp_path: Path) -> None:
    url, folder = server
    content = b"weights"
    right = f"net-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / right).write_bytes(content)
    (folder / "net-00000000.pth").write_bytes(content)
    assert _fetch(f"{url}/{right}", tmp_path / "hub" / right) is None
    assert (tmp_path / "hub" / right).read_bytes() == content
    assert "hash" in str(_fetch(f"{url}/net-00000000.pth", tmp_path / "hub" / "net-00000000.pth"))
    assert not (tmp_path / "hub" / "net-00000000.pth").exists()
    assert "404" in str(_fetch(f"{url}/absent-00000000.pth", tmp_path / "hub" / "absent-00000000.pth"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [({"features.0.weight": torch.zeros(1)}, "it has no features"), (b"not a file of weights", "cannot be read")],
)
def test_a_file_that_is_no_backbone_is_refused(content: object, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(DataError, match=sentence):
        Lpips(backbone=path).distance("squeeze", *_pair())


def test_a_backbone_of_other_shapes_is_refused(backbone: Path, tmp_path: Path) -> None:
    stored = torch.load(backbone, weights_only=True)
    path = tmp_path / "other.pth"
    torch.save({name: tensor[:1] for name, tensor in stored.items()}, path)
    with pytest.raises(DataError, match="does not fit lpips_squeeze"):
        Lpips(backbone=path).distance("squeeze", *_pair())


def test_settings_that_cannot_work_are_refused_at_once(backbone: Path) -> None:
    with pytest.raises(ConfigError, match="Choose one of: alex, squeeze, vgg"):
        Lpips(nets=["resnet"])
    with pytest.raises(ConfigError, match="does not exist"):
        Lpips(backbone="/does/not/exist.pth")
    with pytest.raises(ConfigError, match="is one file"):
        Lpips(nets=["alex", "squeeze"], backbone=backbone)


def test_the_data_root_is_the_variable_or_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIA_BENCH_DATA", "/a/b")
    assert data_root() == Path("/a/b")
    monkeypatch.delenv("GIA_BENCH_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert data_root() == Path("/c/gia_bench/data")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data_root() == Path.home() / ".cache/gia_bench/data"


@pytest.mark.real_data
def test_the_data_roots_own_backbone_is_found_by_itself(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIA_BENCH_DATA", str(data_root))
    images, truth = _pair()
    lpips = Lpips(nets=["alex", "squeeze"], download=False)
    assert set(lpips.nets) <= set(NETS)
    for net in lpips.nets:
        assert lpips.distance(net, images, images).tolist() == [0, 0]
        assert (lpips.distance(net, images, truth) > 0.01).all()
