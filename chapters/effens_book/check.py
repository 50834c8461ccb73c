"""The blanks in the chapters: a check says at once whether what a reader filled in is right, and gives a hint if not.

A blank is `...` in a function's body. A check prints a line or two and raises nothing, also where the blank is empty,
so that a chapter runs from top to bottom untouched; the cell after it holds a right version.

Example:
    >>> prediction(lambda probs: probs.mean(0))
    Right.
    >>> prediction(lambda probs: probs.mean(1))
    Not yet: that averages over the images.
    Hint: probs is (members, images, classes), and the members are the first axis.
"""

import copy
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[..., Any]


@dataclass(frozen=True)
class Check:
    """A function that a reader writes, and how to see whether it is right.

    Attributes:
        answer: the right function.
        run: calls a function on inputs that are the same each time, and returns what is compared.
        hint: a sentence, for an empty blank and a wrong one.
        mistakes: likely wrong functions, each after words that say what it does.
    """

    answer: Function
    run: Callable[[Function], Any]
    hint: str
    mistakes: Mapping[str, Function] = field(default_factory=dict)

    def __call__(self, attempt: Function) -> None:
        """Print whether ``attempt`` is right, and a hint if it is not."""
        said = self.verdict(attempt)
        lines = [said] if said == "Right." else [said, f"Hint: {self.hint}"]
        print("\n".join(textwrap.fill(line, 86) for line in lines))

    def verdict(self, attempt: Function) -> str:
        """Say in a sentence whether ``attempt`` is right."""
        try:
            found = self.run(attempt)
        except Exception as error:  # whatever a reader wrote, the chapter goes on
            if Ellipsis in getattr(getattr(attempt, "__code__", None), "co_consts", ()):
                return "Not filled in yet."
            return f"Not yet: it raises {type(error).__name__}: {error}."
        if any(each is None or each is Ellipsis for each in (found if isinstance(found, list) else [found])):
            return "Not filled in yet."
        expected = self.run(self.answer)
        if alike(found, expected):
            return "Right."
        done = [words for words, mistake in self.mistakes.items() if alike(found, self.run(mistake))]
        return f"Not yet: {done[0] if done else difference(found, expected)}."


@dataclass(frozen=True)
class Number:
    """A number that an exercise asks for.

    Attributes:
        answer: the right number.
        hint: a sentence, for an empty blank and a wrong number.
        mistakes: likely wrong numbers, each after words that say how one comes to it.
    """

    answer: float
    hint: str
    mistakes: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, attempt: Any) -> None:
        """Print whether ``attempt`` is right, and a hint if it is not."""
        if attempt is Ellipsis or attempt is None:
            said = "Not filled in yet."
        elif alike(attempt, self.answer):
            said = "Right."
        else:
            done = [words for words, mistake in self.mistakes.items() if alike(attempt, mistake)]
            said = f"Not yet: {done[0]}." if done else "Not yet."
        lines = [said] if said == "Right." else [said, f"Hint: {self.hint}"]
        print("\n".join(textwrap.fill(line, 86) for line in lines))


def alike(found: Any, expected: Any) -> bool:
    """Say whether two results have the same shape and the same values, up to rounding."""
    try:
        a, b = (torch.as_tensor(each).double() for each in (found, expected))
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def difference(found: Any, expected: Any) -> str:
    """Say in what a wrong result differs from the right one."""
    try:
        a, b = (torch.as_tensor(each).double() for each in (found, expected))
    except (TypeError, ValueError, RuntimeError):
        return f"it should return numbers, and returns {type(found).__name__}"
    if a.shape != b.shape:
        return f"the result should have the shape {tuple(b.shape)}, and has {tuple(a.shape)}"
    return f"the shape is right, but values differ by up to {(a - b).abs().max():.2g}"


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Return random tensors of these shapes, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


# ---- Introduction. ----

between = Check(
    answer=lambda means: means.var(0, correction=0),
    run=lambda f: f(*drawn((4, 6))),
    hint="means is (members, points). Take the variance over the members, with correction=0.",
    mistakes={
        "that divides by M - 1": lambda means: means.var(0),
        "that is the standard deviation": lambda means: means.std(0, correction=0),
        "that is the variance over the points": lambda means: means.var(1, correction=0),
    },
)

# ---- Deep ensembles. ----

prediction = Check(
    answer=lambda probs: probs.mean(0),
    run=lambda f: f(drawn((4, 5, 3))[0].softmax(-1)),
    hint="probs is (members, images, classes), and the members are the first axis.",
    mistakes={
        "that averages over the images": lambda probs: probs.mean(1),
        "that averages over the classes": lambda probs: probs.mean(2),
        "that averages log probabilities": lambda probs: probs.log().mean(0).softmax(-1),
    },
)


def _loss_of_all(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction=reduction)


summed_loss = Check(
    answer=lambda logits, y: sum(F.cross_entropy(a, b) for a, b in zip(logits, y, strict=True)),
    run=lambda f: f(drawn((4, 5, 3))[0], torch.arange(20).view(4, 5) % 3),
    hint="member m has the logits logits[m] and the labels y[m]. Add up the members' mean losses.",
    mistakes={
        "that is the mean over the members, which divides every gradient by M": _loss_of_all,
        "that sums over the batch as well": lambda logits, y: _loss_of_all(logits, y, "sum"),
    },
)

# ---- BatchEnsemble. ----

rank_one = Check(
    answer=lambda x, weight, r, s, bias: F.linear(x * r[:, None], weight) * s[:, None] + bias[:, None],
    run=lambda f: f(*drawn((4, 5, 3), (2, 3), (4, 3), (4, 2), (4, 2))),
    hint="x * r[:, None] scales each member's inputs. Then come F.linear with the shared weight, s, and the bias.",
    mistakes={
        "the bias is scaled by s, too": lambda x, weight, r, s, bias: (
            (F.linear(x * r[:, None], weight) + bias[:, None]) * s[:, None]
        ),
        "r is missing": lambda x, weight, r, s, bias: F.linear(x, weight) * s[:, None] + bias[:, None],
        "s is missing": lambda x, weight, r, s, bias: F.linear(x * r[:, None], weight) + bias[:, None],
        "the bias is missing": lambda x, weight, r, s, bias: F.linear(x * r[:, None], weight) * s[:, None],
    },
)

tiled = Check(
    answer=lambda x, members: x.repeat(members, 1),
    run=lambda f: f(*drawn((3, 2)), 4),
    hint="the rows are the whole batch, M times, one copy after the other: see Tensor.repeat.",
    mistakes={
        "that repeats each row M times, so that member 0 gets the first rows only": lambda x, members: (
            x.repeat_interleave(members, 0)
        ),
        "that adds an axis, where a layer expects rows": lambda x, members: x.expand(members, -1, -1),
    },
)

# ---- TabM. ----


def _start(members: int, size: int, first: bool, everywhere: bool = False) -> Tensor:
    return torch.randint(2, (members, size)) * 2.0 - 1 if first or everywhere else torch.ones(members, size)


def _seen(f: Function) -> Any:
    """Return what is the same of every right start: sizes, sums of ones, and whether both signs are there."""
    first, other = f(16, 32, True), f(16, 32, False)
    if first is None or first is Ellipsis:
        return first
    return [*first.shape, *first.abs().unique(), len(first.unique(dim=0)), len(first.unique()), *other.unique()]


tabm_start = Check(
    answer=_start,
    run=_seen,
    hint="torch.randint(2, (members, size)) is 0 or 1. Twice that, less 1, is -1 or 1. Else torch.ones.",
    mistakes={
        "that starts every layer at random signs, as BatchEnsemble does": lambda members, size, first: _start(
            members, size, first, True
        ),
        "that gives all members the same signs": lambda members, size, first: _start(1, size, first).expand(
            members, -1
        ),
    },
)

tabm_heads = Check(
    answer=lambda z, weight, bias: z @ weight.mT + bias[:, None],
    run=lambda f: f(*drawn((4, 5, 3), (4, 2, 3), (4, 2))),
    hint="z @ weight.mT multiplies each member's rows by its own weights; bias[:, None] is added to all its rows.",
    mistakes={
        "that gives all members the first one's weights": lambda z, weight, bias: z @ weight[0].T + bias[:, None],
        "the bias is missing": lambda z, weight, bias: z @ weight.mT,
    },
)

# ---- Ensembles of a pretrained network. ----

mean_state = Check(
    answer=lambda states, mask: (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    run=lambda f: f(drawn((3, 4, 2))[0], torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])),
    hint="multiply the states by mask[..., None], sum over the tokens, and divide by how many there are.",
    mistakes={
        "that counts the padding as well": lambda states, mask: states.mean(1),
        "that leaves the padding out of the sum, and divides by the whole length": lambda states, mask: (
            states * mask[..., None]
        ).mean(1),
    },
)

low_rank = Check(
    answer=lambda x, weight, bias, a, b: F.linear(x, weight, bias) + x @ a.T @ b.T,
    run=lambda f: f(*drawn((5, 3), (4, 3), (4,), (2, 3), (4, 2))),
    hint="F.linear(x, weight, bias) is the frozen layer. x @ a.T has as many columns as the rank; then comes b.T.",
    mistakes={
        "the bias is missing": lambda x, weight, bias, a, b: F.linear(x, weight) + x @ a.T @ b.T,
        "the frozen layer is missing": lambda x, weight, bias, a, b: x @ a.T @ b.T,
    },
)

# ---- Snapshot ensembles. ----


def _cosine(step: int, steps: int, cycles: int, halves: int = 1) -> float:
    length = steps // cycles
    return 0.5 * (1 + math.cos(halves * math.pi * (step % length) / length))


rate = Check(
    answer=_cosine,
    run=lambda f: [f(step, 12, 3) for step in range(12)],
    hint="a cycle has length = steps // cycles steps, and step % length says how far the cycle is. "
    "Within it the rate is (1 + cos(pi * part)) / 2.",
    mistakes={
        "that is one fall over all steps": lambda step, steps, cycles: _cosine(step, steps, 1),
        "that falls and rises again in every cycle": lambda step, steps, cycles: _cosine(step, steps, cycles, 2),
    },
)


def _keep(f: Function) -> Any:
    """Let a function keep a network, change the network, and return how far what was kept is from it, and moved."""
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    start = [tensor.clone().float() for tensor in network.state_dict().values()]
    found = f(network)
    if found is None or found is Ellipsis:
        return found

    def moved() -> float:
        return sum(float((a - b).abs().sum()) for a, b in zip(found.state_dict().values(), start, strict=True))

    before = moved()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(1)
    return [before, moved()]


def _weights_alone(network: nn.Module) -> nn.Module:
    new = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    new.load_state_dict(network.state_dict())
    for name, buffer in network.named_buffers():
        new.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
    return new


kept = Check(
    answer=copy.deepcopy,
    run=_keep,
    hint="training changes a network in place. copy.deepcopy keeps its weights and its buffers as they are now.",
    mistakes={
        "that is the network itself, which goes on being trained": lambda network: network,
        "its weights are kept, but its buffers go on changing": _weights_alone,
    },
)

# ---- SWAG. ----

running_mean = Check(
    answer=lambda mean, weights, count: mean + (weights - mean) / count,
    run=lambda f: f(*drawn((5,), (5,)), 3),
    hint="count includes the new weights already. Move the mean by (weights - mean) / count.",
    mistakes={
        "the new weights count as much as all before together": lambda mean, weights, count: (mean + weights) / 2,
        "that divides by one too many": lambda mean, weights, count: mean + (weights - mean) / (count + 1),
    },
)


def _draw(mean: Tensor, std: Tensor, deviations: Tensor, z1: Tensor, z2: Tensor, root: float) -> Tensor:
    return mean + root * (std * z1 + deviations.mT @ z2 / math.sqrt(len(deviations) - 1))


gaussian_draw = Check(
    answer=lambda mean, variance, deviations, z1, z2, scale: _draw(
        mean, variance.sqrt(), deviations, z1, z2, math.sqrt(scale)
    ),
    run=lambda f: f(*(t.abs() if i == 1 else t for i, t in enumerate(drawn((5,), (5,), (3, 5), (5,), (3,)))), 0.5),
    hint="mean + sqrt(scale) * (variance.sqrt() * z1 + deviations.T @ z2 / sqrt(K - 1)), where K is len(deviations).",
    mistakes={
        "the scale stands there without its square root": lambda mean, variance, deviations, z1, z2, scale: _draw(
            mean, variance.sqrt(), deviations, z1, z2, scale
        ),
        "z1 is multiplied by the variance, and not by its square root": lambda mean, variance, deviations, z1, z2, s: (
            _draw(mean, variance, deviations, z1, z2, math.sqrt(s))
        ),
    },
)

# ---- MIMO. ----

training_input = Check(
    answer=lambda x, shuffles: torch.cat([x[shuffle] for shuffle in shuffles], dim=1),
    run=lambda f: f(*drawn((4, 2)), torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1], [1, 3, 0, 2]])),
    hint="take the rows of x in each slot's order, x[shuffle], and put the slots side by side: torch.cat(..., dim=1).",
    mistakes={
        "that puts the slots one below the other": lambda x, shuffles: torch.cat([x[shuffle] for shuffle in shuffles]),
        "that shows the same example in every slot": lambda x, shuffles: x.repeat(1, len(shuffles)),
    },
)

same_input = Check(
    answer=lambda x, members: x.repeat(1, members),
    run=lambda f: f(*drawn((4, 2)), 3),
    hint="to predict, every slot gets the same x: see Tensor.repeat.",
    mistakes={"that repeats the rows, and not the inputs": lambda x, members: x.repeat(members, 1)},
)

# ---- Hyperparameter ensembles. ----


def _losses(total: Tensor, right: Tensor, count: int) -> Tensor:
    return -((total + right) / (count + 1)).log().mean(1)


next_member = Check(
    answer=lambda total, right, count: int(_losses(total, right, count).argmin()),
    run=lambda f: f(
        torch.tensor([0.9, 0.9, 0.1]), torch.tensor([[0.95, 0.9, 0.2], [0.5, 0.5, 0.8], [0.9, 0.9, 0.3]]), 1
    ),
    hint="add each candidate to the total, divide by count + 1, and take the lowest mean of -log.",
    mistakes={
        "that is the candidate with the highest loss": lambda total, right, count: int(
            _losses(total, right, count).argmax()
        ),
        "that is the candidate that is best alone": lambda total, right, count: int(right.log().mean(1).argmax()),
    },
)

# ---- From uncertainty to decisions. ----


def risk_of(unsure: Tensor, wrong: Tensor) -> Tensor:
    """Return the error rate of the most certain 1, 2, ..., n examples."""
    return wrong[unsure.argsort()].double().cumsum(0) / torch.arange(1, len(wrong) + 1)


def quantile_of(scores: Tensor, alpha: float) -> float:
    """Return the corrected quantile of split conformal prediction."""
    k = math.ceil((len(scores) + 1) * (1 - alpha))
    return scores.sort().values[k - 1].item() if k <= len(scores) else math.inf


risk_coverage = Check(
    answer=risk_of,
    run=lambda f: f(drawn((9,))[0], (drawn((2, 9))[0][1] > 0.3).double()),
    hint="sort wrong by unsure, lowest first; then take the cumulative sum, divided by 1, 2, ..., n.",
    mistakes={
        "that begins with the least certain": lambda unsure, wrong: risk_of(-unsure, wrong),
        "that counts errors and does not divide by the number of examples": lambda unsure, wrong: wrong[
            unsure.argsort()
        ].cumsum(0),
    },
)

conformal_quantile = Check(
    answer=quantile_of,
    run=lambda f: [f(drawn((n,))[0], alpha) for n, alpha in ((19, 0.1), (10, 0.05), (40, 0.05))],
    hint="k is math.ceil((n + 1) * (1 - alpha)); the k-th smallest has the index k - 1; if k > n, return math.inf.",
    mistakes={
        "that is the plain quantile, without the correction for the number of scores": lambda scores, alpha: (
            scores.sort().values[min(math.ceil(len(scores) * (1 - alpha)), len(scores)) - 1].item()
        ),
        "that returns the largest score where it should be infinite": lambda scores, alpha: (
            scores.sort().values[min(math.ceil((len(scores) + 1) * (1 - alpha)), len(scores)) - 1].item()
        ),
    },
)

# ---- When do ensembles help? ----


def joint_of(losses: Tensor, beta: float) -> Tensor:
    """Return the mixture of the members' mean loss and of the loss of their average."""
    return (1 - beta) * losses.mean() - beta * (-losses).exp().mean(0).log().mean()


joint_loss = Check(
    answer=joint_of,
    run=lambda f: [f(drawn((4, 6))[0].square(), beta) for beta in (0.0, 0.3, 1.0)],
    hint="(-losses).exp() are the members' probabilities; average them over the members before the log.",
    mistakes={
        "that takes the loss of the average with the weight of the members' own": lambda losses, beta: joint_of(
            losses, 1 - beta
        ),
        "that averages over the batch before the logarithm": lambda losses, beta: (
            (1 - beta) * losses.mean() - beta * (-losses).exp().mean().log()
        ),
    },
)

# ---- Exercises. ----

numbers_gained = Number(
    4 * (64 + 64) + 3 * 64,
    hint="each member has a vector for the inputs and one for the outputs; and each member but one adds a bias.",
    mistakes={"that counts a bias for each member, though the plain layer has one already": 4 * (64 + 64) + 4 * 64},
)

rank_of_deviations = Number(
    5,
    hint="the first deviation is zero, because the first mean is the first weights.",
    mistakes={"that counts the first deviation, which is zero": 6},
)

scale_of_diagonal = Number(
    1,
    hint="for rank 0 the covariance of the draws is the scale, times the variances.",
    mistakes={"that is the scale of the paper, which is for two parts": 0.5},
)

weights_of_mimo = Number(
    2 * (196 * 128) + 2 * 10 * (128 + 1),
    hint="each further slot adds d k weights in front, and each further head f c weights and c biases at the end.",
)

weights_of_tabm = Number(
    16 * (10 + 3 * 64) + 15 * (2 * 64 + 2 * 64 + 2),
    hint="M vectors r and s in each of the two layers, and M - 1 more of each bias and of the head.",
    mistakes={"that counts a bias and a head for each member, though the network has one already": 16 * 450},
)

numbers_of_lora = Number(
    2 * 8 * (384 + 384) + 8 * (384 + 1),
    hint="A has rank times inputs numbers, B outputs times rank; two such layers, and a head with a bias.",
    mistakes={"that counts one of the two layers": 8 * 768 + 8 * 385, "that forgets the head": 2 * 8 * 768},
)

meetings = Number(
    1, hint="a shuffle leaves each example at its place with a probability of 1 in 64, and there are 64 examples."
)

free_rows = Number(
    100,
    hint="reading 4 d^2 bytes must take as long as arithmetic, which is 2 d^2 operations a row.",
    mistakes={
        "that forgets that a weight has four bytes": 25,
        "that forgets that a weight is multiplied and added": 200,
    },
)
