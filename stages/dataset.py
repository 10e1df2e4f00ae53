"""Look into tokenized datasets, and merge them.

    finetune dataset inspect workspace/runs/brisk-otter/preprocess               what the run's data are
    finetune dataset inspect workspace/runs/brisk-otter/preprocess --document 7  and what the eighth document says
    finetune dataset inspect corpus/code --document 0 --tokenizer model/         of any .bin and .idx, ours or Megatron's
    finetune dataset merge --output all corpus/a corpus/b                        one dataset after the other, in one

A dataset is named by its prefix (corpus/code of code.bin and code.idx; of conversations corpus/talks of talks-text.bin,
talks-role.bin and so on), by one of its files, or by the result of a preprocess stage that made one.

Exit codes: 0 done, 2 the input is wrong.
"""

import argparse
import signal
import sys
from pathlib import Path

from megatron_core_impl.data.inspection import Contents, contents_of, document_text, document_tokens
from megatron_core_impl.data.merge import merge_datasets
from megatron_core_impl.data.streams import Streams, find_streams
from megatron_core_impl.data.tokenizer import Tokenizer, load_tokenizer
from stages.contracts import artifacts as a
from stages.contracts.words import counted, size

BAD = 2
WIDEST = 40  # characters of the histogram's longest bar


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="finetune dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    inspect = commands.add_parser("inspect", help="print what is in a dataset, or one of its documents")
    inspect.add_argument("dataset", type=Path, help="its prefix, one of its files, or the result of a preprocess stage")
    inspect.add_argument("--document", type=int, metavar="N", help="print document N, counted from 0")
    inspect.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="with its tokenizer's files; a result's own by default"
    )
    inspect.add_argument("--ids", action="store_true", help="the document's ids, not its text")
    inspect.set_defaults(command=_inspect)
    merge = commands.add_parser("merge", help="put datasets one after the other")
    merge.add_argument("datasets", nargs="+", type=Path, metavar="DATASET", help="each as for inspect")
    merge.add_argument(
        "--output", type=Path, required=True, metavar="PREFIX", help="of the new dataset, which must not be there"
    )
    merge.set_defaults(command=_merge)
    arguments = parser.parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, OSError) as error:
        told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {told}", file=sys.stderr)
        return BAD
    return 0


def _inspect(arguments: argparse.Namespace) -> None:
    if arguments.document is None:
        if arguments.ids:
            raise ValueError("--ids prints those of a document: name it with --document")
        for streams in _datasets(arguments.dataset):
            print(f"{streams.prefixes[0]}\n{describe(contents_of(streams.prefixes[0]))}")
        return
    prefix = _only(arguments.dataset).prefixes[0]
    tokenizer = None if arguments.ids else _tokenizer(arguments.dataset, arguments.tokenizer)
    if tokenizer is None:
        print(*document_tokens(prefix, arguments.document).tolist())
    else:
        print(document_text(prefix, arguments.document, tokenizer))


def _merge(arguments: argparse.Namespace) -> None:
    made_with: dict[str, Path] = {}  # fingerprint of a tokenizer -> a dataset
    for path in arguments.datasets:
        if artifact := _result(path):
            made_with.setdefault(artifact.tokenizer.fingerprint, path)
    if len(made_with) > 1:
        one, other, *_ = made_with.values()
        raise ValueError(f"{one} and {other} were made with different tokenizers. Tokenize them with the same one")
    streams = merge_datasets([_only(path).prefix for path in arguments.datasets], arguments.output)
    documents = contents_of(streams.prefixes[0]).documents
    files = ", ".join(map(str, streams.files))
    print(f"{counted(len(arguments.datasets), 'dataset')}, {counted(documents, 'document')}: {files}")


def describe(contents: Contents) -> str:
    """A dataset, for people."""
    lines = [
        f"  {counted(contents.documents, 'document')} in {counted(contents.sequences, 'sequence')}, "
        f"{counted(contents.tokens, 'token')}, {contents.dtype}, {size(contents.bytes)}",
        f"  tokens of a document: {contents.shortest:,} to {contents.longest:,}, mean {contents.mean:,.1f}",
    ]
    width = len(f"{2 * int(max(contents.lengths, key=int, default='1')) - 1:,}")
    rows = [(f"{int(n):>{width},} to {2 * int(n) - 1:>{width},}", count) for n, count in contents.lengths.items()]
    if contents.empty:
        rows.insert(0, (f"{0:>{width}}    {'':{width}}", contents.empty))
    most = max((count for _, count in rows), default=1)
    for lengths, count in rows:
        lines.append(f"  {lengths}  {count:>{len(f'{most:,}')},}  {'█' * -(-WIDEST * count // most)}")
    return "\n".join(lines)


def _datasets(path: Path) -> list[Streams]:
    """The datasets that a path means: those of a stage's result, or the one that it names."""
    artifact = _result(path) if path.is_dir() else None
    return [find_streams(path)] if artifact is None else [find_streams(path / each.name) for each in artifact.sets]


def _only(path: Path) -> Streams:
    """The one dataset that a path means."""
    streams, *others = _datasets(path)
    if others:
        names = ", ".join(str(each.prefix) for each in (streams, *others))
        raise ValueError(f"{path}: holds {1 + len(others)} sets; name one: {names}")
    return streams


def _tokenizer(dataset: Path, folder: Path | None) -> Tokenizer | None:
    """The tokenizer of a folder, or else the one that made a stage's result."""
    artifact = _result(dataset)
    if artifact is None:
        return None if folder is None else load_tokenizer(folder)
    if folder is None:
        where = dataset if dataset.is_dir() else dataset.parent
        folder = where.resolve().parents[1] / artifact.spec["inputs"]["model"]["path"] / "files"
    return load_tokenizer(folder, artifact.tokenizer.kind, added_tokens=tuple(artifact.tokenizer.added_tokens))


def _result(path: Path) -> a.DatasetArtifact | None:
    """The stage's result that a path is, or lies in."""
    folder = path if path.is_dir() else path.parent
    if not (folder / a.ARTIFACT_FILE).exists():
        return None
    artifact = a.load_artifact(folder)
    if isinstance(artifact, a.DatasetArtifact):
        return artifact
    if path.is_dir():
        raise ValueError(f"{path}: is the result of {artifact.stage}, not of preprocess")
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends as other commands do where the reader of a pipe has seen enough
    sys.exit(main())
