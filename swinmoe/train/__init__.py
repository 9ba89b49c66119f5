"""Training: arms, the loop that drives them, evaluation."""

from swinmoe.train.arm import Arm, make_arm
from swinmoe.train.evaluate import evaluate
from swinmoe.train.job import Job
from swinmoe.train.loop import fit
from swinmoe.train.optim import make_optimizer, optimizer_groups
from swinmoe.train.progress import Progress
from swinmoe.train.resume import check_same, restore
from swinmoe.train.schedule import Length, planned_steps
from swinmoe.train.session import Session, open_session
from swinmoe.train.single import train

__all__ = [
    "Arm",
    "Job",
    "Length",
    "Progress",
    "Session",
    "check_same",
    "evaluate",
    "fit",
    "make_arm",
    "make_optimizer",
    "open_session",
    "optimizer_groups",
    "planned_steps",
    "restore",
    "train",
]
