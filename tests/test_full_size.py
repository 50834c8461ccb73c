"""Full size without a GPU: one image in a hundred, on the CPU."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from effens_book import full_size


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Files as Fashion-MNIST's, of bright and dark images, two of them packed."""
    generator = np.random.default_rng(0)
    for name in full_size.FILES:
        n, images = (6000 if "train" in name else 1000), "images" in name
        y = np.arange(n) % 10
        noise = generator.integers(0, 20, (n, 28, 28))
        array = (noise + 20 * y[:, None, None] if images else y).astype(np.uint8)
        shape = np.array(array.shape, ">i4").tobytes()
        content = bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()
        file = tmp_path / (name if images else f"{name}.gz")
        file.write_bytes(content if images else gzip.compress(content))
    monkeypatch.setattr(full_size, "VALIDATION", 500)
    full_size.images.cache_clear()
    yield tmp_path
    full_size.images.cache_clear()


@pytest.mark.parametrize("name", full_size.NAMES)
def test_a_hundredth_of_the_images_trains_every_method(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFENS_DATA", str(folder))
    sets = full_size.images()
    assert {key: tuple(x.shape) for key, (x, _) in sets.items()} == {
        "train": (5500, 1, 28, 28),
        "val": (500, 1, 28, 28),
        "test": (1000, 1, 28, 28),
    }
    assert sets["test"][1].tolist() == [i % 10 for i in range(1000)]  # type: ignore[union-attr]
    found = full_size.train(name, "cpu", share=0.02)
    assert found["device"] == "CPU"
    assert 0 < found["nll"] < 3
    assert found["seconds"] > 0


def test_what_is_stored_is_shown_with_card_and_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(full_size, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert full_size.show("MIMO") is None
    assert "no result of MIMO at full size is stored yet" in capsys.readouterr().out
    monkeypatch.setattr(full_size, "NAMES", ("single", "MIMO"))
    trained: list[str] = []

    def train(name: str) -> dict[str, object]:
        trained.append(name)
        return {"nll": 0.2, "accuracy": 93.0, "seconds": 12.0, "device": "a card", "date": "2026-01-02"}

    monkeypatch.setattr(full_size, "train", train)
    full_size.run()
    full_size.run()  # what is kept is not trained again
    assert trained == ["single", "MIMO"]
    assert json.loads((tmp_path / "full-size.json").read_text()).keys() == {"single", "MIMO"}
    assert "a card, 2026-01-02, one seed" in repr(full_size.show("MIMO"))


def test_images_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_size.images.cache_clear()
    monkeypatch.setenv("EFFENS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="must name a folder that holds train-images-idx3-ubyte, got"):
        full_size.images()
    monkeypatch.delenv("EFFENS_DATA")
    monkeypatch.setitem(__import__("sys").modules, "torchvision.datasets", None)
    with pytest.raises(FileNotFoundError, match="EFFENS_DATA must name a folder"):
        full_size.images()
