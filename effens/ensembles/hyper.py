r"""Hyperparameter ensembles: networks that differ in their settings, too, chosen greedily for how well they mix.

.. math:: i_{k+1} = \arg\min_i \; -\frac1n \sum_j \log \frac{p_{i_1}(y_j) + \dots + p_{i_k}(y_j) + p_i(y_j)}{k + 1}

on held-out data. Wenzel, Snoek, Tran and Jenatton (2020), "Hyperparameter ensembles for robustness and uncertainty
quantification", arXiv:2006.13570; the greedy selection is that of Caruana, Niculescu-Mizil, Crew and Ksikes (2004),
"Ensemble selection from libraries of models".

The full *hyper-deep ensemble*::

    found = effens.search(make_net, train, (x_val, y_val), default=default, trials=100)
    chosen = sorted(set(effens.greedy_select(found.probs, y_val, size=4)))
    again = effens.stratify(make_net, train, (x_val, y_val), [found.settings[i] for i in chosen], seeds=range(4))
    ensemble = effens.HyperEnsemble(again.networks, effens.greedy_select(again.probs, y_val, size=4))

Judge it on data that the selection never saw.
"""

import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from effens.ensembles.base import Ensemble, check_positive
from effens.ensembles.deep import DeepEnsemble
from effens.inputs import Inputs
from effens.scores import log_likelihoods

TIE = 1e-12  # nats: smaller differences are rounding
LONGEST = 1000  # additions: where the first choice proves useless, each further one dilutes it, by ever less, for ever


class HyperEnsemble(Ensemble):
    """Trained networks as one weighted mixture: a row per entry of an index, repeats included.

    ``ensemble(x).softmax(-1).mean(0)`` is the weighted mean. A network that is chosen three times is stored once and
    computed once. Only chosen networks are kept, in ``chosen``; the index, as given, is ``index``. State of another
    index is refused, for it would give the weights to other networks.

    Args:
        networks: trained networks, which may differ in architecture; they are taken over, not copied.
        index: which of them, as `greedy_select` returns it.
        trunk: a network that all members share: see `Ensemble`.

    Raises:
        ValueError: there are no networks, the index is empty, or it names a network that is not there.
        TypeError: there is anything but plain networks, or the index holds anything but integers.

    Shape:
        - ``ensemble(x)``: ``(batch, ...)`` to ``(len(index), batch, outputs)``

    Example:
        >>> networks = [nn.Sequential(nn.Linear(3, w), nn.ReLU(), nn.Linear(w, 2)) for w in (4, 8, 16)]
        >>> ensemble = HyperEnsemble(networks, [2, 0, 2])  # weights 2/3 and 1/3
        >>> ensemble(torch.randn(10, 3)).shape
        torch.Size([3, 10, 2])
    """

    def __init__(self, networks: Sequence[nn.Module], index: Iterable[int], *, trunk: nn.Module | None = None) -> None:
        networks = list(networks)
        if not networks:
            raise ValueError("networks must hold at least one, got none")
        index = checked_index(index, len(networks))
        for network in networks:
            if not isinstance(network, nn.Module) or isinstance(network, Ensemble):
                raise TypeError(f"networks must be plain nn.Modules, got {type(network).__name__}")
        super().__init__(len(index))
        unique = list(dict.fromkeys(index))
        self.index = index
        self.rows = [unique.index(i) for i in index]
        self.chosen = DeepEnsemble.of([networks[i] for i in unique], trunk=trunk)

    def forward(self, x: Inputs) -> Tensor:
        """Answer with every row: ``(batch, ...)`` to ``(members, batch, outputs)``; each network is computed once."""
        answers: Tensor = self.chosen(x)
        return answers[self.rows]

    def forward_members(self, xs: Inputs) -> Tensor:
        """Refuse: each network was trained with settings of its own."""
        raise RuntimeError("networks of a HyperEnsemble are trained already, each with its own settings: effens.search")

    def member(self, m: int) -> nn.Module:
        """Return a copy of the network of row ``m``, equal to ``ensemble(x)[m]``."""
        return self.chosen.member(self.rows[self.check_member(m)])

    def get_extra_state(self) -> Tensor:
        """Return the index, for the state dict."""
        return torch.tensor(self.index)

    def set_extra_state(self, state: Tensor) -> None:
        """Raise `ValueError` unless the state is of the same index."""
        if state.tolist() != self.index:
            raise ValueError(f"state must be of index {self.index}, got one of {state.tolist()}")

    def answering(self) -> tuple[Ensemble, list[float]]:
        """Return the networks that were chosen, each once, and how often each was."""
        counts = Counter(self.rows)
        return self.chosen, [float(counts[row]) for row in range(self.chosen.members)]

    def extra_repr(self) -> str:
        """Show the index."""
        return f"index={self.index}"


def checked_index(index: Iterable[int], networks: int) -> list[int]:
    """Return the index as a list; raise unless it holds integers in 0 ... ``networks - 1``, and at least one."""
    entries = [operator.index(i) for i in index]
    if not entries:
        raise ValueError("index must hold at least one entry, got none")
    if wrong := [i for i in entries if not 0 <= i < networks]:
        raise ValueError(f"index must be in 0 ... {networks - 1}, got {wrong[0]}")
    return entries


@torch.no_grad()
def greedy_select(probs: Tensor | Distribution, y: Tensor, size: int) -> list[int]:
    """Choose candidates one after the other, with replacement: each time the one that lowers the mixture's NLL most.

    It ends when ``size`` different candidates are in, or no candidate lowers the NLL, which falls at each step until
    then. Repeats are weights. Among equals, whose NLL differs by less than 1e-12 nats, the first is taken. After 1,000
    additions, where another changes a weight by less than 0.001, it ends as well.

    Args:
        probs: of the candidates on held-out data: probabilities (candidates, n, classes), or a distribution of batch
            shape (candidates, n).
        y: labels or targets (n,).
        size: how many different candidates, at most.

    Returns:
        Indices in the order of addition, repeats included: `HyperEnsemble` takes them.

    Raises:
        ValueError: ``size`` is below 1, shapes do not agree, or these are no probabilities.

    Example:
        >>> probs = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.2, 0.8], [0.8, 0.2]]])  # two candidates
        >>> greedy_select(probs, torch.tensor([0, 1]), size=2)  # the second is always wrong
        [0]
    """
    check_positive(size=size)
    logs = log_likelihoods(probs, y)  # (candidates, n)
    total = torch.full_like(logs[0], -math.inf)
    lowest, chosen = math.inf, list[int]()
    while len(set(chosen)) < size and len(chosen) < LONGEST:
        losses = math.log(len(chosen) + 1) - torch.logaddexp(total, logs).mean(1)  # (candidates,)
        first = int((losses <= losses.min() + TIE).nonzero()[0])
        if not losses[first] < lowest - TIE:
            break
        lowest = losses[first].item()
        total = torch.logaddexp(total, logs[first])
        chosen.append(first)
    return chosen
