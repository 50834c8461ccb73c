"""What is kept of a GPU, and that a measurement measures."""

import json
from pathlib import Path

import pytest
import torch

from effens_book import gpu


def test_every_point_is_kept() -> None:
    found = gpu.read()
    compiled = {(n, m, w) for n in gpu.NETWORKS for m in gpu.COMPILED for w in gpu.WAYS if "compiled" in w}
    plain = {(n, m, w) for n in gpu.NETWORKS for m in gpu.MEMBERS for w in gpu.WAYS if "compiled" not in w}
    assert found["steps"].keys() == compiled | plain
    assert all(1e-5 < seconds < 1 for seconds in found["steps"].values())
    assert [len(found["nll"][bits]) for bits in ("32", "16")] == 2 * [gpu.SEEDS]
    assert len(found["sharing"]) == gpu.PROCESSES
    assert {"torch", "python", "device", "date"} <= found.keys()


def test_what_is_kept_is_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"run python -m effens_book\.gpu"):
        gpu.read()
    (tmp_path / "gpu.json").write_text(json.dumps({"steps": [["perceptron", 1, "float32", 0.5]]}))
    gpu.run()
    assert gpu.read()["steps"] == {("perceptron", 1, "float32"): 0.5}


@pytest.mark.parametrize("way", ["float32", "TF32", "bfloat16"])
def test_a_step_takes_time_and_leaves_the_precision_as_it_was(way: str) -> None:
    assert 0 < gpu.step_seconds("perceptron", 1, way, 1, device="cpu") < 60
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_sixteen_members_cost_less_than_four_apart() -> None:
    together, alone = (gpu.step_seconds("perceptron", members, "float32") for members in (16, 1))
    assert together < 4 * alone
