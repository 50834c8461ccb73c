"""The sets of the chapter on decisions are those that MAPIE gives, from the same scores and the same examples."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from effens_book.address import ROOT

mapie = pytest.importorskip("mapie.classification", reason="MAPIE stands in .ci/requirements.txt")
CLASSES = 6


@pytest.fixture(scope="module")
def chapter() -> dict[str, Any]:
    """What the chapter's own cells define."""
    cells = json.loads((ROOT / "chapters/decisions.ipynb").read_text("utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["id"] in ("answer-conformal", "conformal-scores"):
            source = "".join(line for line in cell["source"] if not line.startswith("check."))
            exec("import math\nimport torch\n" + source, names)
    return names


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Probabilities, and labels that follow them only roughly."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, CLASSES, generator=generator)
    noisy = logits + torch.randn(n, CLASSES, generator=generator)
    return logits.softmax(1).double(), torch.multinomial(noisy.softmax(1), 1, generator=generator)[:, 0]


class Fixed:
    """A fitted classifier as MAPIE wants it: what it is asked about are the probabilities themselves."""

    classes_ = tuple(range(CLASSES))
    _estimator_type = "classifier"

    def fit(self, x: Any, y: Any) -> "Fixed":
        return self

    def predict_proba(self, x: Any) -> Any:
        return x

    def predict(self, x: Any) -> Any:
        return x.argmax(1)

    def __sklearn_is_fitted__(self) -> bool:
        return True


def of_mapie(score: str, alpha: float, cal: Tensor, y: Tensor, test: Tensor, **options: Any) -> Tensor:
    model = mapie.SplitConformalClassifier(
        Fixed(), confidence_level=1 - alpha, conformity_score=score, prefit=True, random_state=0
    )
    model.conformalize(cal.numpy(), y.numpy())
    _, sets = model.predict_set(test.numpy(), conformity_score_params=options)
    return torch.from_numpy(sets[..., 0])


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("n", [60, 500])
def test_the_simple_sets_are_mapie_s(chapter: dict[str, Any], n: int, alpha: float) -> None:
    (cal, y), (test, _) = draw(n, 0), draw(400, 1)
    mine = chapter["sets"](chapter["simple"], cal[None], y, test[None], alpha)
    its = of_mapie("lac", alpha, cal, y, test)
    assert torch.equal(mine, its)


def test_the_adaptive_sets_cover_and_are_as_large_as_mapie_s(chapter: dict[str, Any]) -> None:
    (cal, y), (test, y_test) = draw(4000, 0), draw(8000, 1)
    mine = chapter["sets"](chapter["adaptive"], cal[None], y, test[None], 0.1)
    its = of_mapie("aps", 0.1, cal, y, test, include_last_label="randomized")
    found = [
        (sets[torch.arange(8000), y_test].double().mean().item(), sets.sum(1).double().mean().item())
        for sets in (mine, its)
    ]
    assert found[0] == pytest.approx(found[1], abs=0.03)
    assert found[0][0] == pytest.approx(0.9, abs=0.015)
