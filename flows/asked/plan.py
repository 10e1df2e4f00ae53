"""What a run would do, before it does anything: which results are there, and why the others are not.

finetune plan CONFIG.yaml
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.contracts import artifacts as a
from stages.contracts import intact, length, preflight
from stages.contracts.config import PipelineConfig
from stages.contracts.settings import Frozen
from stages.contracts.specs import SOURCES, SPECS, Spec
from stages.contracts.training_job import planned_epoch
from stages.contracts.words import count, short

MOST_COMPARED = 200  # earlier results of a stage that are looked at


@dataclass(frozen=True)
class NodePlan:
    """What would become of a node."""

    node: str
    state: Literal["cached", "run"]
    why: str
    artifact: a.Artifact | None = None


def plan(config: PipelineConfig, given: Mapping[str, a.Artifact] | None = None) -> list[NodePlan]:
    """The pipeline's nodes in order, each with what a run would do. Looks at the workspace, changes nothing there.

    Args:
        given: by node, results that the run starts from.
    """
    plans = {node: NodePlan(node, "cached", artifact.figure, artifact) for node, artifact in (given or {}).items()}
    for node, spec_type in SPECS.items():
        if node in plans:
            continue
        inputs = {name: plans[source].artifact for name, source in SOURCES[node].items()}
        to_come = sorted({SOURCES[node][name] for name, artifact in inputs.items() if artifact is None}, key=list(SPECS).index)
        if to_come:
            plans[node] = NodePlan(node, "run", f"needs {' and '.join(to_come)}, which {_runs(to_come)} first")
        else:
            known = {name: artifact for name, artifact in inputs.items() if artifact is not None}
            plans[node] = _plan_node(spec_type.of(config, **known))
    return [plans[node] for node in SPECS]


def _runs(nodes: list[str]) -> str:
    return "runs" if len(nodes) == 1 else "run"


def _plan_node(spec: Spec) -> NodePlan:
    if (artifact := intact.find_reusable(spec.folder)) is not None:
        return NodePlan(spec.NODE, "cached", artifact.figure, artifact)
    return NodePlan(spec.NODE, "run", _why(spec))


def _why(spec: Spec) -> str:
    if spec.folder.exists():
        try:
            intact.check_files(spec.folder, a.load_artifact(spec.folder), thorough=False)
        except a.DamagedArtifact as error:
            return f"its result is damaged: {str(error).split('. Remove')[0]}"
        return "what it published is not where it was"
    if saved := [state.parent.name for state in spec.scratch.glob("checkpoints/step-*[0-9]/state.json")]:
        newest = max(saved, key=lambda name: (len(name), name))  # step-1000000 is after step-999999
        return f"goes on from checkpoint {newest}"
    differences = _nearest(spec)
    if differences is None:
        return "has not run in this workspace"
    if not differences:
        return "the stage itself is newer than its earlier result"
    shown = ", ".join(differences[:3]) + (f" and {len(differences) - 3} more" if len(differences) > 3 else "")
    return f"differs from the nearest earlier result: {shown}"


def _nearest(spec: Spec) -> list[str] | None:
    """What differs from the earlier result of this node that differs least. None when there is none."""
    wanted = dict(_flat(spec))
    files = sorted(spec.folder.parent.glob(f"*/{a.ARTIFACT_FILE}"), key=_time, reverse=True)
    found: list[list[str]] = []
    for file in files[:MOST_COMPARED]:
        try:
            artifact = a.load_artifact(file.parent)
            earlier = dict(_flat(type(spec).model_validate({**artifact.spec, "workspace": spec.workspace})))
        except ValueError:
            continue  # another node's, or from a version with other settings
        found.append([_difference(spec, k, earlier.get(k), v) for k, v in wanted.items() if earlier.get(k) != v])
    return min(found, key=len) if found else None


def _time(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _flat(model: Frozen, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields that decide a key, by their path; an input by its fingerprint."""
    for name in model.decisive():
        value = getattr(model, name)
        if not prefix and name == "workspace":
            continue
        if not prefix and name == "inputs":
            yield from ((f"inputs.{key}", ref.identity) for key, ref in value.items())
        elif isinstance(value, Frozen):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Frozen):
            for place, item in enumerate(value):
                yield from _flat(item, f"{prefix}{name}[{place}].")
        else:
            yield prefix + name, value


def _difference(spec: Spec, path: str, earlier: Any, value: Any) -> str:
    head, _, rest = path.partition(".")
    if head == "inputs":
        return f"{rest} (from {SOURCES[spec.NODE][rest]}) is another one"
    if head == "stamp":
        return "the source's files changed"
    name = f"{spec.STAGE}.{rest}" if head == "settings" else f"layout.{head}" if head in ("tp", "pp", "vpp") else path
    return f"{name} {_shown(earlier)} → {_shown(value)}"


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def describe(config: PipelineConfig, plans: list[NodePlan]) -> list[tuple[str, str]]:
    """What is asked for, as (word, line) pairs: model, data, layout, memory, length, where."""
    made = {p.node: p.artifact for p in plans}
    model, dataset = made["download-model"], made["preprocess"]
    train, layout = config.train, config.layout
    parts = [config.model.source]
    if isinstance(model, a.ModelArtifact):
        parts += [f"{short(model.model.parameters)} parameters", f"vocabulary {count(model.model.vocab_size)}"]
    data = [
        " ".join(filter(None, [named.settings.source, named.settings.subset, named.settings.data_dir]))
        for named in config.data.sources()
    ]
    if isinstance(dataset, a.DatasetArtifact):
        data.append(f"{count(dataset.tokens)} tokens")
    replicas = train.micro_batch_size * layout.dp
    interleaved = f" (vpp {layout.vpp})" if layout.vpp > 1 else ""
    processes = f"{layout.world_size} process{'es' if layout.world_size > 1 else ''}"
    memory = preflight.memory_of(config, model if isinstance(model, a.ModelArtifact) else None)
    return [
        ("model", " · ".join([*parts, f"trained in {train.precision}"])),
        ("data", " · ".join(data)),
        (
            "layout",
            f"{processes} = dp {layout.dp} × tp {layout.tp} × pp {layout.pp}{interleaved}"
            f" · micro batch {train.micro_batch_size} · global batch {count(train.global_batch_size)}"
            f" ({count(train.global_batch_size // replicas)} micro batches)",
        ),
        *([("memory", f"each GPU {memory}")] if memory else []),
        ("length", _length(config, dataset, model)),
        ("push", {"dry-run": "dry run", "folder": f"to {config.push.folder}", "hub": f"to {config.push.repo}"}[config.push.to]),
        ("workspace", str(config.workspace_path)),
    ]


def _length(config: PipelineConfig, dataset: a.Artifact | None, model: a.Artifact | None) -> str:
    """How long training is going to be."""
    tokens = None
    try:
        if isinstance(dataset, a.DatasetArtifact) and isinstance(model, a.ModelArtifact):
            tokens = planned_epoch(config, dataset, model.model)
        return length.described(config.train, tokens)
    except ValueError as error:
        return f"cannot be: {error}"


def report(config: PipelineConfig) -> str:
    """The whole plan as text."""
    plans = plan(config)
    lines = [f"{word:<10} {line}" for word, line in describe(config, plans)]
    width = max(map(len, SPECS))
    lines += ["", *(f"  {p.node:<{width}}  {p.state:<6}  {p.why}" for p in plans)]
    to_run = sum(p.state == "run" for p in plans)
    lines += ["", f"{to_run} to run, {len(plans) - to_run} cached" if to_run else "everything is cached: a run takes seconds"]
    return "\n".join(lines)
