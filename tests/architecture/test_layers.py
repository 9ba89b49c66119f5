"""The rooms of the house keep to their layers, and the check that says so goes red when one does not.

import-linter holds the layers (`[tool.importlinter]` in pyproject.toml), ruff's banned-api the use of
torch.distributed. Both are run here on the package and on a copy of it with forbidden imports planted.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PLANTED = (
    # file, the line that breaks a rule, what the check must say of it
    ("models/planted.py", "import swinmoe.runtime", "swinmoe.models.planted -> swinmoe.runtime"),
    ("moe/types.py", "import swinmoe.moe.losses", "swinmoe.moe.types -> swinmoe.moe.losses"),
    ("moe/capacity.py", "import swinmoe.moe.routers", "swinmoe.moe.capacity -> swinmoe.moe.routers"),
    ("moe/experts.py", "import swinmoe.models.counts", "swinmoe.moe.experts -> swinmoe.models.counts"),
    ("comm/planted.py", "import swinmoe.records", "swinmoe.comm.planted -> swinmoe.records"),
    ("native/planted.py", "import swinmoe.config", "swinmoe.native.planted -> swinmoe.config"),
    ("config/planted.py", "def late():\n    import swinmoe.records", "swinmoe.config.planted -> swinmoe.records"),
    ("data/planted.py", "import swinmoe.checkpoint", "swinmoe.data.planted -> swinmoe.checkpoint"),
    ("report/planted.py", "import swinmoe.train", "swinmoe.report.planted -> swinmoe.train"),
    ("train/planted.py", "from accelerate.utils import set_seed", "swinmoe.train.planted -> accelerate"),
    ("models/other_planted.py", "def late():\n    import timm", "swinmoe.models.other_planted -> timm"),
    ("parallel/planted.py", "import fairscale.optim", "swinmoe.parallel.planted -> fairscale"),
    ("objectives/planted.py", "import tutel.moe", "swinmoe.objectives.planted -> tutel"),
)


def lint_imports(where: Path) -> tuple[int, str]:
    """Exit status and report of import-linter on the checkout at `where`, on one line and without colours."""
    command = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"],
        cwd=where,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


def ruff(where: Path, *paths: str) -> tuple[int, str]:
    """Exit status and report of ruff's banned-api rule."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "TID251", "--output-format", "concise"]
    done = subprocess.run([*command, *paths], cwd=where, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package and its settings."""
    shutil.copytree(ROOT / "swinmoe", tmp_path / "swinmoe", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_house_keeps_its_layers():
    status, report = lint_imports(ROOT)
    assert status == 0, report
    assert "0 broken" in report


def test_only_four_rooms_know_of_processes():
    status, report = ruff(ROOT, "swinmoe")
    assert status == 0, report


def test_forbidden_imports_turn_the_check_red(copied):
    for path, line, _ in PLANTED:
        with (copied / "swinmoe" / path).open("a") as file:
            file.write(f"\n{line}\n")
    status, report = lint_imports(copied)
    assert status == 1, report
    assert "0 kept" in report
    unseen = [message for _, _, message in PLANTED if message not in report]
    assert not unseen, report


def test_a_room_without_a_place_turns_the_check_red(copied):
    (copied / "swinmoe" / "attic.py").write_text("")
    status, report = lint_imports(copied)
    assert status == 1
    assert "attic" in report


@pytest.mark.parametrize("room", ["models", "moe", "train", "records"])
@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import get_rank",
        "import torch\nrank = torch.distributed.get_rank()",
    ],
)
def test_processes_outside_their_rooms_turn_ruff_red(copied, room, line):
    (copied / "swinmoe" / room / "planted.py").write_text(f"{line}\n")
    status, report = ruff(copied, f"swinmoe/{room}/planted.py")
    assert status == 1
    assert "TID251" in report


@pytest.mark.parametrize("room", ["comm", "parallel", "runtime", "checkpoint"])
def test_processes_inside_their_rooms_are_welcome(copied, room):
    (copied / "swinmoe" / room / "planted.py").write_text("import torch.distributed\n")
    status, report = ruff(copied, f"swinmoe/{room}/planted.py")
    assert status == 0, report
