"""What `import swinmoe` offers, and that it costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import swinmoe


def test_every_public_name_is_there() -> None:
    for name in swinmoe.__all__:
        assert getattr(swinmoe, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = swinmoe.nonsense


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, swinmoe, swinmoe.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
