"""The flows `stage/…`: one stage alone, from results that are there. Deployed only (`deployments.py`).

    prefect deployment run 'stage/export' -p 'start_from=["brisk-otter/merge"]' -p 'overrides=["export.dtype=float32"]'

Each takes the sections of the configuration that its stage needs, so that the form in the browser shows these and no others.
All else that a stage has to know is in the results it starts from. One stage by hand: `python -m stages.export SPEC.json`.
"""

from collections.abc import Sequence
from inspect import Parameter, Signature
from typing import Annotated, Any

from prefect import Flow, Task, flow
from pydantic import Field

from flows import tasks
from flows.asked.graph import SINGLE
from flows.asked.parameters import what_stage_is_asked
from flows.records.run_record import RUN_NAME
from flows.running.run import name_of_run, open_run
from flows.running.settle import settle
from stages.contracts.config import ExportSettings, PreprocessSettings, PushSettings, VerifySettings
from stages.contracts.launch_settings import LaunchSettings
from stages.contracts.settings import Frozen
from stages.contracts.specs import SOURCES
from stages.contracts.train_settings import LayoutSettings, TrainSettings

ARGS = """

Args:
    start_from: Results to start from, each a folder in the workspace such as train/0123456789abcdef, or a stage of a run such
        as brisk-otter/train. With what they were made from they must be all that this stage needs; an earlier result of the
        stage itself tells that, too.
{sections}    overrides: Changes to the sections, as after --set of finetune run, e.g. train.lr=1e-4
    workspace: Folder of everything that runs make.
    run_name: Name of the run, and of its folder in <workspace>/runs. Default: the flow run's own.
    again: Do it although its result is there.
"""
SECTION = "    {}: Default: what the results tell of it; of what they do not tell, as where a configuration has none.\n"
COMMON: dict[str, tuple[Any, Any]] = {  # parameters of every stage, with their defaults
    "overrides": (list[str], []),
    "launch": (LaunchSettings, LaunchSettings()),
    "workspace": (str, "workspace"),
    "run_name": (Annotated[str, Field(pattern=RUN_NAME)] | None, None),
    "again": (bool, False),
}


def _flow(task: Task[..., Any], about: str, **sections: type[Frozen]) -> Flow[..., None]:
    """The flow of one node, with the sections of a configuration that its stage needs."""

    def run_one(**given: Any) -> None:
        _do(task, **given)

    required = Parameter("start_from", Parameter.KEYWORD_ONLY, annotation=Annotated[list[str], Field(min_length=1)])
    others = [
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)
        for name, (kind, default) in ({name: (kind | None, None) for name, kind in sections.items()} | COMMON).items()
    ]
    run_one.__signature__ = Signature([required, *others])  # type: ignore[attr-defined]
    run_one.__name__ = run_one.__qualname__ = task.name
    run_one.__doc__ = about + ARGS.format(sections="".join(map(SECTION.format, sections)))
    decorate = flow(
        name=SINGLE, flow_run_name=name_of_run, validate_parameters=False, on_crashed=[settle], on_cancellation=[settle]
    )
    return decorate(run_one)


preprocess = _flow(
    tasks.preprocess,
    "Text to token ids, in Megatron's format. Starts from the downloads of the data and the model.",
    preprocess=PreprocessSettings,
)
convert = _flow(
    tasks.convert,
    "Hugging Face weights to canonical ones. Starts from the download of the model.",
    preprocess=PreprocessSettings,
)
shard = _flow(tasks.shard, "Canonical weights, cut for a layout. Starts from convert.", layout=LayoutSettings)
verify = _flow(
    tasks.verify,
    "The gate: our model against transformers on the same tokens. Starts from shard and preprocess.",
    verify=VerifySettings,
    export=ExportSettings,
)
train = _flow(
    tasks.train,
    "Training on tp × pp × dp processes. Starts from shard and preprocess.",
    train=TrainSettings,
    layout=LayoutSettings,
)
merge = _flow(tasks.merge, "A checkpoint's weights, canonical again. Starts from train.", export=ExportSettings)
export = _flow(
    tasks.export,
    "Canonical weights to a folder that transformers loads. Starts from merge.",
    export=ExportSettings,
    verify=VerifySettings,
)
push = _flow(tasks.push, "Publish the exported model. Starts from export and verify.", push=PushSettings)

STAGES = (preprocess, convert, shard, verify, train, merge, export, push)


def _do(
    task: Task[..., Any],
    *,
    start_from: Sequence[str],
    overrides: Sequence[str],
    workspace: str,
    run_name: str | None,
    again: bool,
    **sections: Any,
) -> None:
    given = {
        name: value.model_dump(mode="json") if isinstance(value, Frozen) else value
        for name, value in sections.items()
        if value is not None
    }
    asked = what_stage_is_asked(task.name, given, workspace, overrides=overrides, start_from=start_from, again=again)
    with open_run(asked, run_name) as run:
        run.start(task, *(asked.given[source] for source in SOURCES[task.name].values()))
