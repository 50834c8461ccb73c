"""Baselines: dropout that stays on, and a Gaussian around the last layer, against closed forms."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian

import effens
import effens_book.nets
from effens_book.baselines import LastLayerLaplace, MCDropout, categorical_fisher, gaussian_fisher, student_fisher


def make_dropped(p: float = 0.5) -> nn.Module:
    return effens_book.nets.mlp(3, 2, width=16, dropout=p)


def test_every_member_has_masks_of_its_own_and_dropout_stays_on() -> None:
    torch.manual_seed(0)
    ensemble = MCDropout(make_dropped, 4).eval()
    x = torch.randn(5, 3)
    first, again = ensemble(x), ensemble(x)
    assert first.shape == (4, 5, 2)
    assert (first - again).abs().max() > 0.01
    assert (first[0] - first[1]).abs().min() > 0
    assert {type(layer) for layer in ensemble.modules() if layer.training} == {nn.Dropout}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        rows = ensemble.network.train()(x.expand(4, 5, 3).flatten(0, 1))
    torch.manual_seed(7)
    torch.testing.assert_close(ensemble.eval()(x), rows.unflatten(0, (4, 5)))


def test_the_mean_over_many_masks_is_that_of_the_dropped_network() -> None:
    """With a linear network, E[mask] / keep = 1: the mean over masks is the network without dropout."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 2))
    ensemble = MCDropout(lambda: network, 20_000).eval()
    x = torch.randn(2, 3)
    with torch.no_grad():
        answers = ensemble(x)
        standard_error = answers.std(0) / 20_000**0.5
        assert ((answers.mean(0) - network.eval()(x)).abs() < 5 * standard_error).all()


def test_dropout_of_another_seed_is_trained_like_any_network() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(200, 3), torch.randint(0, 2, (200,))
    ensemble = MCDropout(make_dropped, 3)
    before = ensemble.network[0].weight.clone()  # type: ignore[index]
    history = effens.fit(ensemble, (x, y), epochs=2, device="cpu")
    assert history.losses.shape[1] == 1
    assert not torch.equal(before, ensemble.network[0].weight)  # type: ignore[index]


def test_a_network_without_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match="the network must have dropout, got Sequential"):
        MCDropout(lambda: effens_book.nets.mlp(3, 2), 3)


def test_masks_are_no_network() -> None:
    message = "a member must answer the same at each call, got masks that are drawn anew"
    with pytest.raises(NotImplementedError, match=message):
        MCDropout(make_dropped, 3).member(0)


def test_a_sample_of_the_last_layer_is_a_network() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 3)
    ensemble = LastLayerLaplace(lambda: effens_book.nets.mlp(3, 2), 4).eval()
    with pytest.raises(RuntimeError, match="no members yet: call effens.fit"):
        ensemble.member(0)
    ensemble.finish([x])
    kept = ensemble.network(x)
    for m in range(4):
        network = ensemble.member(m)
        torch.testing.assert_close(network(x), ensemble(x)[m])
        assert all(parameter.requires_grad for parameter in network.parameters())
    assert torch.equal(ensemble.network(x), kept)
    with pytest.raises(IndexError, match="member must be in 0 ... 3, got 4"):
        ensemble.member(4)


@pytest.mark.parametrize("outputs", [2, 5])
def test_the_fisher_information_of_classes_is_the_hessian(outputs: int) -> None:
    logits = torch.randn(3, outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for row, found in zip(logits, categorical_fisher(logits), strict=True):
        expected = hessian(lambda z: -torch.log_softmax(z, 0)[0], row)  # the same for every label
        torch.testing.assert_close(found, expected)


def test_the_fisher_information_of_a_gaussian_is_the_mean_of_squared_scores() -> None:
    torch.manual_seed(0)
    row = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    y = effens.Gaussian().predict(row.detach()[None]).sample(torch.Size([100_000])).double().flatten()
    outputs = row.expand(len(y), 2).detach().requires_grad_()
    (grads,) = torch.autograd.grad(effens.Gaussian().nll(outputs, y).sum(), outputs)
    expected = grads.T @ grads / len(y)
    torch.testing.assert_close(gaussian_fisher(row.detach()[None])[0], expected, rtol=0.02, atol=0.02)


def test_the_fisher_information_of_student_is_the_mean_of_squared_scores() -> None:
    torch.manual_seed(0)
    row = torch.tensor([0.3, -0.4, 0.5], dtype=torch.float64)
    y = effens.StudentT().predict(row[None]).sample(torch.Size([2_000_000])).flatten()
    outputs = row.expand(len(y), 3).clone().requires_grad_()
    (grads,) = torch.autograd.grad(effens.StudentT().nll(outputs, y).sum(), outputs)
    expected = grads.T @ grads / len(y)
    found = student_fisher(row[None])[0]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.004)
    assert torch.linalg.eigvalsh(found).min() > 0


def test_the_covariance_of_the_samples_is_the_inverse_of_the_information() -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    network = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    ensemble = LastLayerLaplace(lambda: network, 40_000, precision=0.5)
    ensemble.eval().finish(x.split(25))
    with torch.no_grad():
        phi = torch.cat([network[:2](x), torch.ones(60, 1)], 1).double()
        fisher = categorical_fisher(network(x).double())
        information = sum((torch.kron(fisher[i], torch.outer(phi[i], phi[i])) for i in range(60)), 0.5 * torch.eye(6))
        expected = torch.linalg.inv(torch.as_tensor(information))
        found = ensemble.samples.flatten(1).double()
        last = network[2]
        assert isinstance(last, nn.Linear)
        mean = torch.cat([last.weight, last.bias[:, None]], 1).flatten().double()
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(torch.cov(found.T), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


def test_a_precise_prior_leaves_the_network() -> None:
    torch.manual_seed(0)
    x: Tensor = torch.randn(20, 3)
    ensemble = LastLayerLaplace(lambda: effens_book.nets.mlp(3, 2), 4, precision=1e12)
    y = torch.randint(0, 2, (20,))
    with pytest.raises(RuntimeError, match="no members yet: call effens.fit"):
        ensemble(x)
    effens.fit(ensemble, (x, y), epochs=1, device="cpu")
    torch.testing.assert_close(ensemble(x), ensemble.network(x).expand(4, 20, 2), rtol=1e-4, atol=1e-4)


def test_what_laplace_refuses() -> None:
    with pytest.raises(ValueError, match="precision must be > 0 and finite, got 0"):
        LastLayerLaplace(lambda: effens_book.nets.mlp(3, 2), 4, precision=0)
    with pytest.raises(ValueError, match="the network must end in nn.Linear with a bias"):
        LastLayerLaplace(lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU()), 4)
    with pytest.raises(TypeError, match="likelihood must be Categorical, Gaussian or StudentT, got Likelihood"):
        LastLayerLaplace(lambda: effens_book.nets.mlp(3, 3), 4, likelihood=effens.Likelihood())
