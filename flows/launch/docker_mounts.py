"""What a container sees of this machine's disks: the workspace, and what a stage reads or writes besides it, all of it at the
same paths as here, so that specs, errors and artifacts name paths that a person can open."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flows.launch.problems import NotReady, Problem
from flows.records.server_home import server_home
from stages.contracts import publishing
from stages.contracts.config import ModelSettings, PipelineConfig, PushSettings
from stages.contracts.data_settings import DataSettings
from stages.contracts.sources import expand, is_glob, is_local
from stages.contracts.specs import DownloadDataSpec, DownloadModelSpec, PushSpec, Spec

# What an image has, or Docker puts, at these paths: a mount at one of them, or above, would hide it.
OWN = tuple(map(Path, (
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/opt/hpcx", "/opt/megatron-flows", "/opt/nvidia", "/opt/venv", "/proc",
    "/run", "/sbin", "/sys", "/tmp", "/usr/bin", "/usr/lib", "/usr/local/bin", "/usr/local/cuda", "/usr/local/lib", "/usr/sbin",
    "/usr/share", "/var/lib",
)))  # fmt: skip
OF_THE_KERNEL = tuple(map(Path, ("/dev", "/proc", "/sys")))
PUSH_FOLDER = "the folder that push.folder is in"
CACHES = Path("/caches/huggingface")  # in a container
MOST_LINKS = 40  # from one to the next, as the kernel has it


@dataclass(frozen=True)
class Bind:
    """A folder or file of this machine, and where a container sees it."""

    source: Path
    target: Path
    is_writable: bool = False
    key: str = field(default="", compare=False)  # the setting that names it


def check_places(config: PipelineConfig) -> None:
    """Refuse a configuration one of whose stages would need what hides the container's own.

    Raises:
        NotReady: naming the setting.
    """
    check_place(config.workspace_path, "workspace")
    for key, path in (*_of_model(config.model), *_of_data(config.data)):
        check_place(path, key)
    if config.push.to == "folder":
        check_place(_push_folder(config.push), PUSH_FOLDER)


def binds_of(spec: Spec, ours: Mapping[str, str]) -> list[Bind]:
    """All that a stage needs to see.

    Args:
        ours: our environment: where the caches and certificates of the Hub's clients are.

    Raises:
        NotReady: one of them would hide what the container has itself, or may not be looked at.
    """
    workspace = Path(spec.workspace)
    wanted = [workspace_bind(workspace)]
    for key, source in _sources(spec):
        with told_as(f"{key}: {source} cannot be read"):
            places = [source, *_led_to(source)]
        for path in places:
            check_place(path, key)
            wanted.append(Bind(path, path, key=key))
    if isinstance(spec, PushSpec) and spec.settings.to == "folder":
        folder = _push_folder(spec.settings)
        check_place(folder, PUSH_FOLDER)
        wanted.append(Bind(folder, folder, is_writable=True, key=PUSH_FOLDER))
    if spec.talks_to_hub:
        wanted += _certificates(ours)
    if spec.talks_to_hub and spec.STAGE == "download":
        wanted += _caches(ours)
    return _without_doubles(wanted)


def workspace_bind(workspace: Path) -> Bind:
    """What every stage sees.

    Raises:
        NotReady: it would hide what the container has itself.
    """
    check_place(workspace, "workspace")
    return Bind(workspace, workspace, is_writable=True, key="workspace")


def make_folders(binds: list[Bind]) -> None:
    """Make what is written to, as processes would.

    Raises:
        NotReady: one cannot be made; naming the setting.
    """
    for bind in binds:
        if bind.is_writable:
            with told_as(f"{bind.key}: {bind.source} cannot be made"):
                bind.source.mkdir(parents=True, exist_ok=True)


def hidden_of(workspace: Path) -> list[Path]:
    """What no stage sees of its workspace. It is made where it is not there: else the engine would, as root.

    Raises:
        NotReady: it cannot be made.
    """
    home = server_home(workspace)
    with told_as(f"workspace: {home} cannot be made"):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return [home]


@contextlib.contextmanager
def told_as(what: str) -> Iterator[None]:
    """For looks at this machine's disks, and changes of them.

    Raises:
        NotReady: one is refused.
    """
    try:
        yield
    except OSError as error:
        where = f": {error.filename}" if error.filename and str(error.filename) not in what else ""
        raise NotReady(
            Problem(f"{what} ({error.strerror}{where})", "change the owner or the mode of what is there, or choose another")
        ) from None


def check_place(path: Path, key: str) -> None:
    """Refuse a path that hides the container's own when it is mounted.

    Raises:
        NotReady: naming the setting.
    """
    hidden = next((own for own in OWN if own.is_relative_to(path)), None)
    inside = next((own for own in OF_THE_KERNEL if path.is_relative_to(own)), None)
    if hidden or inside:
        why = f"hide {hidden}" if hidden else f"be in {inside}"
        raise NotReady(Problem(f"{key}: {path}, mounted in a container, would {why} of the container itself", "choose another"))


def _sources(spec: Spec) -> Iterator[tuple[str, Path]]:
    """What a stage reads outside of the workspace, and the setting that names it."""
    if isinstance(spec, DownloadModelSpec):
        yield from _of_model(spec.model)
    elif isinstance(spec, DownloadDataSpec):
        yield from _of_data(spec.data)


def _of_model(model: ModelSettings) -> Iterator[tuple[str, Path]]:
    path = _absolute(model.source)
    with told_as(f"model.source: {path} cannot be read"):
        if is_local(model.source):
            yield "model.source", path


def _of_data(data: DataSettings) -> Iterator[tuple[str, Path]]:
    for named in data.sources():
        key, source = f"{named.key}.source", named.settings.source
        path = _absolute(source)
        with told_as(f"{key}: {path} cannot be read"):
            if named.settings.format == "tokenized":
                yield key, path.parent
            elif is_glob(source):
                yield key, _absolute(expand(source)[0])
            elif path.exists():
                yield key, path


def _push_folder(settings: PushSettings) -> Path:
    """Where push writes: beside its target first."""
    return _absolute(publishing.target_folder(settings)).parent


def _absolute(path: str | Path) -> Path:
    """Not resolved: a spec names a link as a person did, and it has to be there in a container."""
    return Path(os.path.normpath(Path(path).expanduser().absolute()))


def _led_to(source: Path) -> Iterator[Path]:
    """What links on the way to a source, and in it, lead to outside of it: as those of the Hub's cache do.

    What this user may not look at in it, the stage may not, either, and passes over.
    """
    yield from _way(source)
    real = source.resolve()
    found: set[Path] = set()
    folders = [real] if real.is_dir() else []
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink():
                    with contextlib.suppress(OSError):
                        found.update(path if path.is_dir() else path.parent for path in _way(Path(entry.path)))
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
    yield from sorted(path for path in found if path.is_dir() and not path.is_relative_to(real))


def _way(path: Path) -> Iterator[Path]:
    """Where a path leads, link by link."""
    for _ in range(MOST_LINKS):
        link = next((part for part in (*reversed(path.parents), path) if part.is_symlink()), None)
        if link is None:
            return
        path = Path(os.path.normpath(link.parent / link.readlink())) / path.relative_to(link)
        yield path


def _certificates(ours: Mapping[str, str]) -> Iterator[Bind]:
    """The files and folders of the Hub's clients, and where links in them lead."""
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
        for path in map(_absolute, filter(None, ours.get(name, "").split(os.pathsep))):
            with told_as(f"{name}: {path} cannot be read"):
                if path.exists():
                    check_place(path, name)
                    yield from (Bind(each, each, key=name) for each in (path, *_led_to(path)))


def _caches(ours: Mapping[str, str]) -> list[Bind]:
    """The Hub's caches. Their parent is not mounted: the person's token may lie in it."""
    home = Path(ours.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    binds = []
    for name, variable in (("hub", "HF_HUB_CACHE"), ("datasets", "HF_DATASETS_CACHE")):
        binds.append(Bind(_absolute(ours.get(variable) or home / name), CACHES / name, is_writable=True, key=variable))
    return binds


def _without_doubles(binds: list[Bind]) -> list[Bind]:
    """Without what another one shows at the same path already, at least as writable. Parents come first."""
    kept: list[Bind] = []
    for bind in sorted(binds, key=lambda bind: (len(bind.target.parts), not bind.is_writable, bind.target)):
        shown = (one for one in kept if bind.target.is_relative_to(one.target) and one.source == one.target)
        if bind.source == bind.target and any(one.is_writable or not bind.is_writable for one in shown):
            continue
        kept.append(bind)
    return kept
