"""The probe against scikit-learn's ridge regression and against leaving out for real; neighbours against its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as SkRidge
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import KNeighborsClassifier

from swinmoe.errors import DataError
from swinmoe.train.fewshot import STRENGTHS, draw_shots, fit_ridge, nearest_neighbours, probe


def _data(n: int, dim: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=rng, dtype=torch.float64)
    return centres[targets] + 1.5 * torch.randn(n, dim, generator=rng, dtype=torch.float64) + 3, targets


@pytest.mark.parametrize(("n", "dim"), [(40, 8), (20, 64)], ids=["more rows", "more columns"])
@pytest.mark.parametrize("strength", [0.01, 1.0, 500.0])
def test_weights_are_those_of_scikit_learn(n: int, dim: int, strength: float) -> None:
    x, targets = _data(n, dim, 4)
    y = torch.nn.functional.one_hot(targets, 4).double() * 2 - 1
    ours = fit_ridge(x, y, [strength])
    theirs = SkRidge(alpha=strength).fit(x.numpy(), y.numpy())
    assert ours.strength == strength
    np.testing.assert_allclose(ours.weight.T.numpy(), theirs.coef_, atol=1e-9)
    np.testing.assert_allclose(ours.offset.numpy(), theirs.intercept_, atol=1e-9)


@pytest.mark.parametrize(("n", "dim"), [(40, 8), (20, 64)])
def test_the_strength_is_the_one_that_leaving_out_for_real_finds(n: int, dim: int) -> None:
    x, targets = _data(n, dim, 4, seed=1)
    y = torch.nn.functional.one_hot(targets, 4).double() * 2 - 1
    errors = []
    for strength in STRENGTHS:
        total = 0.0
        for row in range(n):
            rest = [i for i in range(n) if i != row]
            model = SkRidge(alpha=strength).fit(x[rest].numpy(), y[rest].numpy())
            total += float(((model.predict(x[row : row + 1].numpy()) - y[row].numpy()) ** 2).mean())
        errors.append(total / n)
    found = fit_ridge(x, y, STRENGTHS)
    np.testing.assert_allclose(found.errors, errors, rtol=1e-6)
    chosen = found.strength
    assert chosen == STRENGTHS[int(np.argmin(errors))]
    assert chosen == RidgeCV(alphas=STRENGTHS).fit(x.numpy(), y.numpy()).alpha_
    assert dim > n or STRENGTHS[0] < chosen < STRENGTHS[-1]  # with more columns than rows the least one is right


def test_a_probe_tells_separable_classes_apart_whatever_their_scale() -> None:
    x, targets = _data(60, 6, 3)
    x = torch.nn.functional.one_hot(targets, 6).double() * 4 + 0.1 * x
    scale = torch.tensor([1e-3, 1.0, 1e3, 1.0, 1.0, 1.0], dtype=torch.float64)
    guess, strength = probe(x[:30] * scale, targets[:30], x[30:] * scale, 3)
    assert torch.equal(guess, targets[30:]) and strength in STRENGTHS
    plain, _ = probe(x[:30], targets[:30], x[30:], 3)
    assert torch.equal(guess, plain)


def test_a_constant_feature_does_no_harm() -> None:
    x, targets = _data(30, 5, 3)
    x[:, 2] = 7.0
    guess, _ = probe(x, targets, x, 3)
    assert bool((guess >= 0).all())


def test_draws_take_so_many_of_each_class_and_differ() -> None:
    targets = torch.arange(50) % 5
    first, again, second = (draw_shots(targets, 5, 3, draw) for draw in (0, 0, 1))
    assert first == again != second
    assert torch.bincount(targets[first]).tolist() == [3] * 5 and len(set(first)) == 15
    with pytest.raises(DataError, match="class 0 has 10 training images, and 11 shots"):
        draw_shots(targets, 5, 11, 0)


@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_neighbours_are_those_of_scikit_learn(neighbours: int) -> None:
    bank, classes = _data(80, 12, 4)
    queries, _ = _data(33, 12, 4, seed=2)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / 0.07)

    model = KNeighborsClassifier(neighbours, metric="cosine", weights=weights).fit(bank.numpy(), classes.numpy())
    ours = nearest_neighbours(bank, classes, queries, 4, neighbours, chunk=10)
    assert ours.tolist() == model.predict(queries.numpy()).tolist()
