"""Sources of format tokenized: Megatron's files on this disk, which a prefix names. It looks like a Hub id, but is none."""

from pathlib import Path

from megatron_core_impl.data.streams import ROLE, TEXT, WEIGHT, Streams, find_streams
from stages.contracts.data_settings import DataSettings, NamedSource
from stages.contracts.sources import stamp_files


def dataset_of(named: NamedSource) -> Streams:
    """The dataset of a source.

    Raises:
        ValueError: it is not there, lacks a file, or is one stream of several; the message names the key.
    """
    try:
        streams = find_streams(Path(named.settings.source).expanduser())
    except FileNotFoundError as error:
        raise ValueError(f"{named.key}.source: {error}") from None
    for suffix in (TEXT, ROLE, WEIGHT):
        whole = Path(str(streams.prefix).removesuffix(suffix))
        if whole != streams.prefix and (others := _conversations(whole)):
            raise ValueError(
                f"{named.key}.source: {streams.prefix} is a stream of conversations, of {' and '.join(others)}: name their "
                f"prefix, {whole}"
            )
    return streams


def problems(data: DataSettings) -> list[str]:
    """What is wrong with the tokenized sources, one line each."""
    found: list[str] = []
    contents: dict[str, str] = {}  # -> key of a source that has it
    for named in data.sources():
        content: str | None = named.settings.content
        if content is None:
            try:
                content = dataset_of(named).content
            except ValueError as error:
                found.append(str(error))
                continue
        contents.setdefault(content, named.key)
    if len(contents) > 1:
        found.append(
            f"data: {' and '.join(f'{key} is {content}' for content, key in contents.items())}; a model is trained on one"
        )
    return found


def stamp_tokenized(source: str) -> str | None:
    """As `sources.stamp`: None where it is not there as a whole."""
    try:
        streams = find_streams(Path(source).expanduser())
    except FileNotFoundError:
        return None
    return stamp_files(streams.prefix.parent, streams.files)


def _conversations(prefix: Path) -> tuple[str, ...]:
    """The streams of a dataset, if it is one of conversations."""
    try:
        streams = find_streams(prefix)
    except FileNotFoundError:
        return ()
    return streams.suffixes if streams.content == "conversations" else ()
