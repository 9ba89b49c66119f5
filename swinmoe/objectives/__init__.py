"""What a batch is worth: batch -> StepResult(loss, metrics, routing)."""

from swinmoe.objectives.classification import Classification, StepResult

__all__ = ["Classification", "StepResult"]
