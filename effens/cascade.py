r"""Cascades: one member answers first, and all of them only where it is unsure.

.. math:: \bar p(x) = p_1(x) \text{ where } \max_c p_{1c}(x) \ge t, \text{ else } \frac1M \sum_m p_m(x)

Most rows are easy and cost one network. Wang et al. (2022), "Wisdom of committees: an overlooked approach to faster and
more accurate models", arXiv:2012.01988.
"""

import torch
from torch import Tensor

from effens.ensembles.base import Ensemble
from effens.ensembles.deep import DeepEnsemble
from effens.inputs import Inputs, rows_at
from effens.scores import labeled, of_labels
from effens.training import predict


def cascade(ensemble: Ensemble, x: Inputs, threshold: float, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Predict classes with the first member, and with all members where its largest probability is below a threshold.

    Args:
        ensemble: any ensemble of classifiers; it stays on its device and in its mode.
        x: inputs ``(batch, ...)``, as of `effens.predict`.
        threshold: from 0, where the first member answers alone, to above 1, where all always answer:
            `cascade_threshold` chooses it.
        chunk: rows in a chunk.

    Returns:
        ``(probs, members)``: averaged probabilities ``(batch, classes)``, and how many members each row took,
        ``(batch,)``: 1, or all.

    Example:
        >>> ensemble = effens.DeepEnsemble(lambda: nn.Linear(3, 2), members=4)
        >>> probs, members = cascade(ensemble, torch.randn(10, 3), threshold=0.9)
        >>> probs.shape, members.shape
        (torch.Size([10, 2]), torch.Size([10]))
    """
    probs = predict(DeepEnsemble.of([ensemble.member(0)]), x, chunk=chunk)[0]
    unsure = probs.max(-1).values < threshold
    if bool(unsure.any()):
        probs[unsure] = predict(ensemble, rows_at(x, unsure), chunk=chunk).mean(0)
    return probs, torch.where(unsure, ensemble.members, 1)


def cascade_threshold(val_probs: Tensor, y: Tensor, keep: float = 0.9) -> float:
    """Return the lowest threshold at which a cascade keeps this part of what averaging gains in NLL.

    Args:
        val_probs: of all members on validation data, ``(members, n, classes)``.
        y: their labels, ``(n,)``; -100 where one is missing.
        keep: the part of the gain, from 0 to 1.

    Returns:
        The threshold; 0 where averaging gains nothing.

    Raises:
        ValueError: ``keep`` is not in [0, 1], the shapes do not agree, or these are no probabilities.

    Example:
        >>> probs = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.9, 0.1], [0.2, 0.8]]])  # the second row is hard
        >>> cascade_threshold(probs, torch.tensor([0, 1]))
        0.75
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be in 0 ... 1, got {keep}")
    probs, labels = labeled(val_probs, y)
    right = of_labels(probs, labels)  # (members, n)
    confidence, order = probs[0].max(-1).values.sort()
    gain = (right.mean(0).log() - right[0].log())[order].cumsum(0)  # of the k least confident rows, all members asked
    if gain[-1] <= 0 or keep == 0:
        return 0.0
    k = int((gain >= keep * gain[-1]).nonzero()[0])
    above = confidence[confidence > confidence[k]]
    return float((confidence[k] + above[0]) / 2) if len(above) else 1.1
