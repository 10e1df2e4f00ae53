"""What a run is asked to do: the parameters of its flow, checked before any stage starts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.asked.graph import nodes_of, with_dependents
from flows.asked.lineage import NoResult, find_result, lineage
from flows.asked.load_config import BadConfig, given_config
from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig


@dataclass(frozen=True)
class Asked:
    """A run that can be begun."""

    config: PipelineConfig
    refresh: frozenset[str] = frozenset()  # nodes to do again although their results are there
    fresh: bool = False  # they begin anew, whatever an interrupted attempt left to go on from
    given: dict[str, a.Artifact] = field(default_factory=dict)  # by node: results that are taken as they are
    start_from: tuple[str, ...] = ()  # of these, what was named: folders in the workspace
    stage: str | None = None  # the only node that is done, where it is not the whole pipeline


def what_is_asked(
    config: PipelineConfig | dict[str, Any],
    *,
    overrides: Sequence[str] = (),
    refresh: Sequence[str] = (),
    fresh: bool = False,
    start_from: Sequence[str] = (),
    stage: str | None = None,
) -> Asked:
    """Check what a flow was given. `refresh` names nodes or stages; what depends on them is done again, too.

    Raises:
        BadConfig: it cannot be done; every problem that could be found, as lines for people.
    """
    checked = given_config(config, overrides)
    workspace = checked.workspace_path
    try:
        again = [node for name in refresh for node in nodes_of(name)]
        named = [find_result(workspace, name) for name in start_from]
        given = lineage(workspace, named)
    except NoResult as error:
        raise BadConfig([f"start_from: {error}"]) from None
    except ValueError as error:
        raise BadConfig([f"refresh: {error}"]) from None
    if stage is None:
        again = with_dependents(again)
    else:  # an earlier result of the stage tells what it was made from
        given = {node: artifact for node, artifact in given.items() if node not in with_dependents([stage])}
    both = [node for node in again if node in given]
    if both:
        raise BadConfig([f"refresh: {both[0]} is a result that the run starts from: do it again, or start from it"])
    if fresh and not again:
        raise BadConfig(["fresh: says how to do stages again: name one in refresh"])
    return Asked(checked, frozenset(again), fresh, given, tuple(artifact.path for artifact in named), stage)
