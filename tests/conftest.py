"""Settings for all tests: two threads at most, no colour, a fixed seed."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from swinmoe.errors import BackendUnavailableError
from swinmoe.native import kernels, why_no_kernels


@pytest.fixture(autouse=True)
def _quiet_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native_kernels() -> None:
    """For tests of our kernels in C++: without a compiler they are skipped, and say so."""
    try:
        kernels()
    except BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def expert_kernel(native_kernels: None) -> None:
    """For tests of expert layers, which take their kernels by themselves."""
    if why_no_kernels():
        pytest.skip("this processor's vectors are too narrow for expert layers to take kernels by themselves")
