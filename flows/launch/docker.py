"""A stage in a container, or training in one on each of several machines, through the Docker engine's API.

The container runs the stage behind the same shim as a process has, with the same spec, at the same paths. See docker_request
for what it is allowed, docker_container for how it ends with us, docs/containers.md for all of it.
"""

import contextlib
import os
import socket
import threading
import urllib.parse
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.launch.choose import engines_of
from flows.launch.docker_checks import Image, check_engine, check_settings, look_around
from flows.launch.docker_container import Container
from flows.launch.docker_engine import connected
from flows.launch.docker_group import Group, Member
from flows.launch.docker_leftovers import labels, remove_leftovers
from flows.launch.docker_mounts import Bind, binds_of, hidden_of, make_folders, workspace_bind
from flows.launch.docker_refusals import ENGINE_ERRORS, refusals_told
from flows.launch.docker_request import HUB_NETWORK, Ask, Place, container_name, request
from flows.launch.environment import hub_environment
from flows.launch.gpus import gpus_of, processes_on
from flows.launch.listener import Listener, explain, last_lines, not_started, open_log
from flows.launch.output import Redactor
from flows.launch.problems import NotReady
from flows.launch.process import grace_of
from flows.launch.protocol import Caller, Reason, StageFailed, StageJob
from flows.records.locks import Stopped
from stages.contracts import words
from stages.contracts.config import PipelineConfig
from stages.contracts.launch_settings import GPU_STAGES, PORT, Gpus
from stages.contracts.process import JOIN, ExitCode
from stages.contracts.specs import SPECS, Spec


@dataclass(frozen=True)
class Engine:
    """An engine that containers of a stage run on."""

    host: str
    client: Any
    image: Image


class DockerLauncher:
    """Runs stages in containers.

    Args:
        stages: those that it is for.
        grace: seconds that a stage has to end when it is stopped; None: what suits it.
    """

    def __init__(self, config: PipelineConfig, stages: Collection[str] = GPU_STAGES, *, grace: float | None = None) -> None:
        self.config = config
        self.stages = stages
        self.settings = config.launch
        self.grace = grace
        self.attempt = uuid.uuid4().hex
        self._looked_at: set[str] = set()  # hosts that are ready
        self._looking = threading.Lock()

    def command(self, job: StageJob) -> list[str]:
        """The stage's command line in the container."""
        return ["python", "-P", "-m", f"stages.{job.stage}", str(job.spec_file)]

    def run(self, job: StageJob, caller: Caller) -> None:
        """See `Launcher.run`."""
        spec = SPECS[job.node].model_validate_json(job.spec_file.read_bytes())
        grace = self.grace if self.grace is not None else grace_of(job.stage)
        with contextlib.ExitStack() as stack:
            try:
                engines = self._engines(job, spec, stack, caller)
                places = stack.enter_context(self._places(job, spec, engines))
            except NotReady as error:
                raise _refused(job, error) from None
            except Stopped:
                raise not_started(job) from None
            log = stack.enter_context(open_log(job.log_file))
            group = stack.enter_context(Group(grace))
            redact = Redactor.of(os.environ)

            def start(number: int) -> None:
                prefix = f"[node {number}] " if len(engines) > 1 else ""
                listener = Listener(log, redact, caller, prefix)
                container = self._started(job, spec, engines[number], places[number], grace)
                group.add(container, listener, engines[number].host)
                container.hold(job.holds)

            def on_event(member: Member, event: dict[str, Any]) -> None:
                if event["event"] == JOIN and len(group.members) == 1:  # the first of several is where its workers begin
                    for number in range(1, len(engines)):
                        start(number)

            start(0)
            group.listen(caller.stop, on_event)
        if (failed := group.failed()) is not None:
            raise self._failure(job, group, failed)

    def _engines(self, job: StageJob, spec: Spec, stack: contextlib.ExitStack, caller: Caller) -> list[Engine]:
        """The engines of a stage. Those of all stages are looked at before the first, once in the life of this launcher.

        Raises:
            NotReady: one of them cannot run our containers.
            Stopped: the run was stopped.
        """
        check_settings(self.config, os.environ, self.stages)
        first, *others = engines_of("train", self.settings)
        with self._looking:
            for host in dict.fromkeys([first, *others]):
                if caller.stop.is_set():
                    raise Stopped
                if host not in self._looked_at:
                    binds = _binds(spec) if host == first else [workspace_bind(Path(spec.workspace))]  # as training has
                    with connected(host) as client:
                        image = check_engine(client, host, self.settings, os.environ)
                        self._look_at(Engine(host, client, image), binds, job, spec, caller)
                    self._looked_at.add(host)
        hosts = engines_of(job.stage, self.settings)
        clients = {host: stack.enter_context(connected(host)) for host in dict.fromkeys(hosts)}
        return [Engine(host, clients[host], check_engine(clients[host], host, self.settings, os.environ)) for host in hosts]

    def _look_at(self, engine: Engine, binds: list[Bind], job: StageJob, spec: Spec, caller: Caller) -> None:
        workspace = Path(spec.workspace)
        remove_leftovers(
            engine.client, engine.host, workspace, attempt=self.attempt, run=job.run, stop=caller.stop, say=caller.on_line
        )
        look_around(
            engine.client, engine.host, self.settings, engine.image, binds, self._labels(job, spec, 0.0),
            workspace=workspace, processes=processes_on(self.config, self.stages, engine.host),
        )  # fmt: skip

    def _labels(self, job: StageJob, spec: Spec, grace: float) -> dict[str, str]:
        return labels(workspace=Path(spec.workspace), run=job.run, node=job.node, attempt=self.attempt, grace=grace)

    @contextlib.contextmanager
    def _places(self, job: StageJob, spec: Spec, engines: Sequence[Engine]) -> Iterator[list[Place]]:
        """Where each container stands. Several on one engine get a network of their own, on several that of their machines."""
        if len(engines) == 1:
            yield [Place(network=HUB_NETWORK if job.talks_to_hub else "none")]
            return
        count, first = len(engines), engines[0]
        ids = set()
        for engine in engines:
            with refusals_told(engine.host):
                ids.add(engine.client.info()["ID"])
        if len(ids) > 1:
            name = self.settings.rendezvous or _machine(first.host)
            meeting = name if ":" in name else f"{name}:{PORT}"
            yield [Place(node, count, meeting, network="host") for node in range(count)]
            return
        with refusals_told(first.host):
            network = first.client.networks.create(
                container_name(job.run, job.node, self.attempt), driver="bridge", internal=True,
                labels=self._labels(job, spec, 0.0),
            )  # fmt: skip
        try:
            yield [Place(node, count, f"node-0:{PORT}", network.name, f"node-{node}") for node in range(count)]
        finally:
            with contextlib.suppress(*ENGINE_ERRORS):  # the next start removes it
                network.remove()

    def _started(self, job: StageJob, spec: Spec, engine: Engine, place: Place, grace: float) -> Container:
        """A container of a stage, running.

        Raises:
            StageFailed: the engine refuses.
        """
        try:
            asked = self.request(job, spec, engine.image, place, grace)
            with refusals_told(engine.host):
                return Container(engine.client, asked, hub_environment(os.environ) if job.talks_to_hub else {})
        except NotReady as error:
            raise _refused(job, error) from None

    def request(self, job: StageJob, spec: Spec, image: Image, place: Place, grace: float) -> dict[str, Any]:
        """What the engine is asked for."""
        shim = ["flows.launch.shim", "--grace", str(grace), "--in-container", "--", *self.command(job)]
        ask = Ask(
            image=image.id,
            name=container_name(job.run, job.node, self.attempt, place.node),
            command=shim,
            binds=_binds(spec),
            hidden=hidden_of(Path(spec.workspace)),
            labels=self._labels(job, spec, grace),
            gpus=gpus_of(self.settings, os.environ) if job.stage in GPU_STAGES else Gpus(),
            place=place,
            environment={"STAGE_IMAGE": image.digest},
        )
        return request(ask, self.settings, os.environ)

    def _failure(self, job: StageJob, group: Group, member: Member) -> StageFailed:
        """The error of the member that failed."""
        ending = member.ending
        assert ending is not None
        reason, message = self._explained(member, stopped=group.is_stopped)
        if len(group.members) > 1 and not group.is_stopped:
            message = f"node {group.members.index(member)} ({member.host}): {message}"
        return StageFailed(job.node, reason, message, log_file=job.log_file, code=ending.code)

    def _explained(self, member: Member, *, stopped: bool) -> tuple[Reason, str]:
        ending, heard = member.ending, member.listener
        assert ending is not None
        if ending.lost and not stopped:
            return "killed", f"{ending.lost}. {last_lines(list(heard.tail))}"
        if ending.is_out_of_memory and not stopped:
            limit = f": launch.memory is {words.size(self.settings.memory)}" if self.settings.memory else ""
            more = heard.told or last_lines(list(heard.tail))
            mend = "Raise launch.memory" if limit else "Lower what it needs"
            return "out of memory", f"the kernel killed it, out of memory{limit}. {mend}. {more}"
        return explain(ending.code, heard.told, list(heard.tail), stopped=stopped)


def _binds(spec: Spec) -> list[Bind]:
    """What a container of a stage sees, which is there then."""
    binds = binds_of(spec, os.environ)
    make_folders(binds)
    return binds


def _refused(job: StageJob, why: object) -> StageFailed:
    return StageFailed(job.node, "bad input", str(why), log_file=job.log_file, code=ExitCode.BAD_INPUT)


def _machine(host: str) -> str:
    """The name of an engine's machine, for others."""
    return urllib.parse.urlsplit(host).hostname or socket.gethostname()
