"""Likelihoods against their closed forms."""

import copy
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

import effens
import effens_book.nets
from effens.training import example_losses, has_gaps

LIKELIHOODS = [effens.Categorical(), effens.Gaussian(), effens.StudentT()]


def outputs_and_targets(likelihood: effens.Likelihood) -> tuple[Tensor, Tensor]:
    """Outputs (members, batch, outputs) and targets (batch,), in float64."""
    torch.manual_seed(0)
    outputs = torch.randn(3, 7, likelihood.outputs or 4, dtype=torch.float64)
    return outputs, torch.randint(0, 4, (7,)) if likelihood.outputs is None else torch.randn(7).double()


def test_categorical_is_the_cross_entropy() -> None:
    outputs, y = outputs_and_targets(effens.Categorical())
    expected = torch.stack([F.cross_entropy(member, y, reduction="none") for member in outputs])
    assert torch.allclose(effens.Categorical().nll(outputs, y), expected)
    assert torch.allclose(effens.Categorical().predict(outputs), outputs.exp() / outputs.exp().sum(-1, keepdim=True))


def test_gaussian_is_the_normal_density() -> None:
    outputs, y = outputs_and_targets(effens.Gaussian())
    mean, raw = outputs.unbind(-1)
    variance = (1 + raw.exp()).log() + 1e-6
    expected = 0.5 * (2 * math.pi * variance).log() + (y - mean) ** 2 / (2 * variance)
    assert torch.allclose(effens.Gaussian().nll(outputs, y), expected)
    found = effens.Gaussian().predict(outputs)
    assert found.batch_shape == (3, 7)
    assert torch.allclose(found.mean, mean)
    assert torch.allclose(found.variance, variance)


def test_student_t_is_scipy_s_density() -> None:
    outputs, y = outputs_and_targets(effens.StudentT())
    location, scale, df = outputs.unbind(-1)
    expected = -stats.t.logpdf(y, 2.01 + F.softplus(df), location, F.softplus(scale) + 1e-3)
    assert torch.allclose(effens.StudentT().nll(outputs, y), torch.as_tensor(expected))
    assert effens.StudentT().predict(outputs).batch_shape == (3, 7)
    assert bool(effens.StudentT().predict(outputs - 50).variance.isfinite().all())  # degrees of freedom stay above 2


def test_gaussian_is_least_at_the_sample_s_mean_and_variance() -> None:
    y = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    raw = (y.var(correction=0) - 1e-6).expm1().log()  # the inverse of softplus
    outputs = torch.stack([y.mean(), raw]).requires_grad_()
    effens.Gaussian().nll(outputs.expand(4, 2), y).mean().backward()
    assert outputs.grad is not None
    assert float(outputs.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
class TestEvery:
    def test_targets_of_all_members_or_of_each(self, likelihood: effens.Likelihood) -> None:
        outputs, y = outputs_and_targets(likelihood)
        shared = likelihood.nll(outputs, y)
        assert shared.shape == (3, 7)
        assert torch.equal(likelihood.nll(outputs, y.expand(3, 7)), shared)
        assert torch.equal(likelihood.nll(outputs[1], y), shared[1])
        own = torch.stack([y.roll(m) for m in range(3)])
        expected = torch.stack([likelihood.nll(outputs[m], own[m]) for m in range(3)])
        assert torch.allclose(likelihood.nll(outputs, own), expected, rtol=1e-14)

    @pytest.mark.parametrize("shape", [(7, 1), (1,), (3, 1), (8,), (3,), (3, 7, 1), ()])
    def test_targets_that_would_broadcast(self, likelihood: effens.Likelihood, shape: tuple[int, ...]) -> None:
        outputs, y = outputs_and_targets(likelihood)
        with pytest.raises(ValueError, match=r"targets must have shape \(7,\), one per example, got"):
            likelihood.nll(outputs, torch.zeros(shape, dtype=y.dtype))

    def test_gradients(self, likelihood: effens.Likelihood) -> None:
        outputs, y = outputs_and_targets(likelihood)
        assert torch.autograd.gradcheck(lambda z: likelihood.nll(z, y), outputs.requires_grad_())

    @pytest.mark.parametrize("size", [100.0, -100.0, 1e4, -1e4])
    def test_extreme_outputs_stay_finite(self, likelihood: effens.Likelihood, size: float) -> None:
        outputs, y = outputs_and_targets(likelihood)
        outputs = torch.full_like(outputs, size, dtype=torch.float32).requires_grad_()
        nll = likelihood.nll(outputs, y.float() if y.is_floating_point() else y)
        nll.sum().backward()
        assert bool(nll.isfinite().all())
        assert outputs.grad is not None
        assert bool(outputs.grad.isfinite().all())

    def test_no_examples(self, likelihood: effens.Likelihood) -> None:
        outputs, y = outputs_and_targets(likelihood)
        assert likelihood.nll(outputs[:, :0], y[:0]).shape == (3, 0)
        likelihood.check(outputs[:, :0], y[:0])

    def test_wrong_number_of_outputs(self, likelihood: effens.Likelihood) -> None:
        if likelihood.outputs is None:
            pytest.skip("takes any number of classes")
        with pytest.raises(ValueError, match=f"needs {likelihood.outputs} outputs, got 5"):
            likelihood.predict(torch.zeros(3, 7, 5))

    def test_keeps_device_and_precision(self, likelihood: effens.Likelihood) -> None:
        outputs, y = outputs_and_targets(likelihood)
        y = y.float() if y.is_floating_point() else y
        assert likelihood.nll(outputs.float(), y).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_integer_type(dtype: torch.dtype) -> None:
    outputs, y = outputs_and_targets(effens.Categorical())
    effens.Categorical().check(outputs, y.to(dtype))
    assert torch.equal(effens.Categorical().nll(outputs, y.to(dtype)), effens.Categorical().nll(outputs, y))


@pytest.mark.parametrize(("y", "got"), [([0, 4], "0 ... 4"), ([-1, 3], "-1 ... 3"), ([-101, 9], "-101 ... 9")])
def test_labels_out_of_range(y: list[int], got: str) -> None:
    with pytest.raises(ValueError, match=f"labels must be in 0 ... 3, got {got}"):
        effens.Categorical().check(torch.zeros(3, 2, 4), torch.tensor(y))


def test_classes_in_front_of_the_pixels() -> None:
    outputs = torch.randn(3, 2, 4, 5, 6)  # members, batch, classes, height, width
    y = torch.randint(4, (2, 5, 6))
    pixels, last = effens.Categorical(axis=1), outputs.movedim(2, -1)
    pixels.check(outputs, y)
    assert torch.equal(pixels.nll(outputs, y), effens.Categorical().nll(last, y))
    assert torch.equal(pixels.predict(outputs), effens.Categorical().predict(last))
    with pytest.raises(ValueError, match=r"one per example, pixel or token \(Categorical\(axis=1\)"):
        effens.Categorical().nll(outputs, y)
    with pytest.raises(ValueError, match="axis must be one of the classes, got 0"):
        effens.Categorical(axis=0)


def gap_in(y: Tensor) -> Tensor:
    y = y.clone()
    y.view(-1)[::3] = math.nan if y.is_floating_point() else -100
    return y


@pytest.mark.parametrize("likelihood", [effens.Categorical(), effens.Gaussian(), effens.StudentT()], ids=str)
@pytest.mark.parametrize("positions", [(), (4,)])
def test_missing_targets_do_not_count(likelihood: Any, positions: tuple[int, ...]) -> None:
    outputs = torch.randn(3, 6, *positions, likelihood.outputs or 5, dtype=torch.float64, requires_grad=True)
    y = torch.randint(5, (6, *positions)) if likelihood.outputs is None else torch.randn(6, *positions).double()
    gaps = gap_in(y)
    there = ~likelihood.missing(gaps)
    assert 0 < int(there.sum()) < there.numel()
    likelihood.check(outputs, gaps)
    losses = example_losses(likelihood, outputs, gaps, has_gaps(likelihood, gaps))
    assert losses.shape == (3, 6)
    torch.testing.assert_close(losses.mean(1), likelihood.nll(outputs, y)[:, there].mean(1))
    (gradient,) = torch.autograd.grad(losses.mean(1).sum(), outputs)
    (expected,) = torch.autograd.grad(likelihood.nll(outputs, y)[:, there].mean(1).sum(), outputs)
    torch.testing.assert_close(gradient, expected)
    assert not gradient[:, ~there].any()


def test_labels_that_are_no_integers() -> None:
    with pytest.raises(ValueError, match=r"labels must be integers, got torch.float32: .*Gaussian"):
        effens.Categorical().check(torch.zeros(3, 2, 4), torch.zeros(2))


@pytest.mark.parametrize("likelihood", [effens.Gaussian(), effens.StudentT()], ids=str)
class TestMixture:
    def test_moments(self, likelihood: Any) -> None:
        outputs, _ = outputs_and_targets(likelihood)
        parts = likelihood.predict(outputs)
        whole = effens.mixture(parts)
        mean = parts.mean.mean(0)
        variance = (parts.variance + parts.mean**2).mean(0) - mean**2
        assert whole.batch_shape == (7,)
        assert torch.allclose(whole.mean, mean)
        assert torch.allclose(whole.variance, variance)
        assert torch.allclose(variance, parts.variance.mean(0) + parts.mean.var(0, correction=0))

    def test_density(self, likelihood: Any) -> None:
        outputs, y = outputs_and_targets(likelihood)
        parts = likelihood.predict(outputs)
        expected = parts.log_prob(y).exp().mean(0).log()
        assert torch.allclose(effens.mixture(parts).log_prob(y), expected)

    def test_samples(self, likelihood: Any) -> None:
        outputs, _ = outputs_and_targets(likelihood)
        whole = effens.mixture(likelihood.predict(outputs))
        torch.manual_seed(0)
        assert torch.allclose(whole.sample((20_000,)).mean(0), whole.mean, atol=6 * float(whole.stddev.max()) / 140)

    def test_one_member_is_itself(self, likelihood: Any) -> None:
        outputs, y = outputs_and_targets(likelihood)
        parts = likelihood.predict(outputs[:1])
        assert torch.allclose(effens.mixture(parts).log_prob(y), parts.log_prob(y)[0])

    def test_needs_members_and_examples(self, likelihood: Any) -> None:
        with pytest.raises(ValueError, match=r"batch shape must be \(members, batch\) or longer, got \(7,\)"):
            effens.mixture(likelihood.predict(outputs_and_targets(likelihood)[0][0]))


def test_mixture_of_something_else() -> None:
    with pytest.raises(TypeError, match="distribution must be Normal or StudentT, got Laplace"):
        effens.mixture(torch.distributions.Laplace(torch.zeros(3, 7), torch.ones(3, 7)))


def test_a_network_that_diverges_is_told_from_its_loss() -> None:
    x, y = torch.randn(20, 2), torch.randn(20)
    ensemble = effens.DeepEnsemble(lambda: effens_book.nets.mlp(2, 3), 2)
    with pytest.raises(FloatingPointError, match="losses must be finite"):
        effens.fit(ensemble, (x, y), epochs=3, lr=1e30, likelihood=effens.StudentT(), device="cpu")


def test_the_density_of_student_is_that_of_torch() -> None:
    outputs = 3 * torch.randn(4, 50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = 10 * torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    said = effens.StudentT().predict(outputs)
    expected = torch.distributions.StudentT(said.df, said.loc, said.scale).log_prob(y)
    torch.testing.assert_close(-effens.StudentT().nll(outputs, y), expected)
    assert torch.equal(-effens.StudentT().nll(outputs, y), said.log_prob(y))
    assert type(said) is torch.distributions.StudentT  # by which the benchmark tells what it keeps
    again = copy.deepcopy(said)
    again.loc += 1
    torch.testing.assert_close(again.log_prob(y), said.log_prob(y - 1))


@pytest.mark.parametrize("raw", [1e3, 1e4, 1e5, 1e6])
def test_densities_of_student_keep_their_digits_at_many_degrees_of_freedom(raw: float) -> None:
    outputs, y = torch.tensor([[[0.3, 0.5, raw]]]), torch.tensor([1.2])
    expected = effens.StudentT().nll(outputs.double(), y.double())[0].float()
    said = effens.StudentT().predict(outputs)
    torch.testing.assert_close(-said.log_prob(y)[0], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(-effens.mixture(said).log_prob(y), expected, rtol=1e-5, atol=0)
