"""What a run is asked to do: the parameters of its flow, checked before any stage starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.asked.graph import nodes_of, with_dependents
from flows.asked.lineage import NoResult, find_result, lineage
from flows.asked.load_config import BadConfig, given_config
from flows.asked.told import refuse_untold_weights, told_by
from stages.contracts import artifacts as a
from stages.contracts.config import PipelineConfig, workspace_folder
from stages.contracts.specs import SOURCES


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
) -> Asked:
    """Check what a flow was given. `refresh` names nodes or stages; what depends on them is done again, too.

    Raises:
        BadConfig: it cannot be done; every problem that could be found, as lines for people.
    """
    checked = given_config(config, overrides)
    named, given = _results(checked.workspace_path, start_from)
    try:
        again = with_dependents([node for name in refresh for node in nodes_of(name)])
    except ValueError as error:
        raise BadConfig([f"refresh: {error}"]) from None
    both = [node for node in again if node in given]
    if both:
        raise BadConfig([f"refresh: {both[0]} is a result that the run starts from: do it again, or start from it"])
    if fresh and not again:
        raise BadConfig(["fresh: says how to do stages again: name one in refresh"])
    return Asked(checked, frozenset(again), fresh, given, tuple(artifact.path for artifact in named))


def what_stage_is_asked(
    stage: str, sections: dict[str, Any], workspace: str, *, overrides: Sequence[str], start_from: Sequence[str], again: bool
) -> Asked:
    """Check what the flow of one stage was given: sections of a configuration, and results that tell the rest of it.

    Raises:
        BadConfig: it cannot be done.
    """
    place = _place(workspace)
    named, made = _results(place, start_from)
    config = given_config({"workspace": workspace, **told_by(made, stage), **sections}, overrides)
    if config.workspace_path != place:
        raise BadConfig(["overrides: workspace is a parameter of its own: leave it out here"])
    given = {node: artifact for node, artifact in made.items() if node not in with_dependents([stage])}
    if missing := [source for source in SOURCES[stage].values() if source not in given]:
        told = " and ".join(start_from)
        raise BadConfig([f"start_from: {stage} needs a result of {missing[0]}, and {told} tells of none: name one, too"])
    if stage == "train":
        refuse_untold_weights(config.data, made, overrides)
    refresh = frozenset([stage] if again else [])
    return Asked(config, refresh, False, given, tuple(artifact.path for artifact in named), stage)


def workspace_of(parameters: Mapping[str, Any]) -> Path | None:
    """Where a flow run of ours works, by its parameters. None: they are not legal."""
    try:
        if "config" in parameters:
            return given_config(parameters["config"], parameters.get("overrides", ())).workspace_path
        return _place(parameters.get("workspace", "workspace"))
    except Exception:  # anybody's, of a server that others use: what is no parameter of ours may do anything to what reads it
        return None


def _place(workspace: str) -> Path:
    try:
        return workspace_folder(workspace)
    except ValueError as error:
        raise BadConfig([f"workspace: {error}"]) from None


def _results(workspace: Path, start_from: Sequence[str]) -> tuple[list[a.Artifact], dict[str, a.Artifact]]:
    """The results that were named, and with what they were made from, by node."""
    try:
        named = [find_result(workspace, name) for name in start_from]
        return named, lineage(workspace, named)
    except NoResult as error:
        raise BadConfig([f"start_from: {error}"]) from None
