from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from swinmoe.data.draws import isolated_rng, uniforms


def test_uniforms_are_the_splitmix64_stream() -> None:
    # The published first outputs for seed 1234567.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    got = uniforms(1234567, [0], 5)[0]
    assert got.tolist() == [(value >> 11) / 2**53 for value in expected]


def test_uniforms_of_an_index_do_not_depend_on_the_others() -> None:
    whole = uniforms(9, np.arange(50), 3)
    assert np.array_equal(uniforms(9, [41, 3], 3), whole[[41, 3]])
    assert np.array_equal(whole.ravel(), uniforms(9, [0], 150)[0])
    assert uniforms(9, [], 3).shape == (0, 3)


def test_uniforms_are_uniform_and_differ_by_seed() -> None:
    u = uniforms(5, np.arange(20000), 2)
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram2d(*u.T, bins=10, range=[[0, 1], [0, 1]])[0]
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert 40 < chi_square < 180  # 99 degrees of freedom: 99 ± 14
    assert not np.isin(u, uniforms(6, np.arange(20000), 2)).any()


def test_a_seed_of_any_sign_and_size_is_legal_without_a_warning() -> None:
    assert uniforms(2**63 - 1, [10**6], 3).shape == (1, 3)
    assert uniforms(-1, [0], 1).shape == (1, 1)


def _draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_isolated_rng_depends_on_the_seed_only_and_restores(rng_untouched) -> None:
    with rng_untouched():
        with isolated_rng(2**62 + 1):
            first = _draw()
        with isolated_rng(2**62 + 2):
            other = _draw()
        with isolated_rng(2**62 + 1):
            again = _draw()
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_isolated_rng_restores_after_an_error(rng_untouched) -> None:
    with rng_untouched(), pytest.raises(KeyError), isolated_rng(1):
        _draw()
        raise KeyError
