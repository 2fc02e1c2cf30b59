"""Which keeper serves a policy."""

from __future__ import annotations

from rampde.checkpoint.changes import Changes
from rampde.checkpoint.every_step import EveryStage, EveryStep
from rampde.checkpoint.graphs import GraphsWhileTheyFit, KeptGraphs
from rampde.checkpoint.keeper import Checkpoints
from rampde.checkpoint.policy import NoneWhileItFits
from rampde.checkpoint.replayed import SomeSteps
from rampde.problem import Problem


def new_checkpoints(problem: Problem) -> Checkpoints:
    """Where an explicit Runge-Kutta solve keeps what ``problem.checkpoint`` wants."""
    policy = problem.checkpoint
    if isinstance(policy, NoneWhileItFits):
        return GraphsWhileTheyFit(problem, policy.budget, policy.bytes_of_stage)
    if policy.stages == "none":
        return KeptGraphs(problem)
    if policy.stages == "stage":
        return EveryStage(problem)
    if policy.quantiser is not None:
        return Changes(problem)
    return EveryStep(problem) if policy.keeps_every_step else SomeSteps(problem)
