"""Look into tokenized datasets, and merge them.

    finetune dataset inspect workspace/runs/brisk-otter/preprocess               what the run's data are
    finetune dataset inspect workspace/runs/brisk-otter/preprocess --document 7  and what the eighth document says
    finetune dataset inspect corpus/code --document 0 --tokenizer model/         of any .bin and .idx, ours or Megatron's
    finetune dataset merge --output all corpus/a corpus/b                        one dataset after the other, in one

Exit codes: 0 done, 2 the input is wrong.
"""

import argparse
import sys
from pathlib import Path

from megatron_core_impl.data.conversation_encoder import TEXT
from megatron_core_impl.data.indexed_dataset import idx_path
from megatron_core_impl.data.inspection import Contents, contents_of, document_text, document_tokens
from megatron_core_impl.data.merge import merge_datasets
from megatron_core_impl.data.tokenizer import Tokenizer, load_tokenizer
from stages.contracts import artifacts as a
from stages.contracts.words import size

BAD = 2
WIDEST = 40  # characters of the histogram's longest bar


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="finetune dataset", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    inspect = commands.add_parser("inspect", help="print what is in a dataset, or one of its documents")
    inspect.add_argument(
        "dataset", type=Path, help="the result of a preprocess stage, or a prefix: the path without .bin, .idx"
    )
    inspect.add_argument("--document", type=int, metavar="N", help="print document N, counted from 0")
    inspect.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="with its tokenizer's files; a result's own by default"
    )
    inspect.set_defaults(command=_inspect)
    merge = commands.add_parser("merge", help="put datasets one after the other")
    merge.add_argument("datasets", nargs="+", type=Path, metavar="PREFIX", help="paths without .bin and .idx")
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
    prefixes = _prefixes(arguments.dataset)
    if arguments.document is None:
        for prefix in prefixes:
            print(f"{prefix}\n{describe(contents_of(prefix))}")
        return
    prefix, *others = prefixes
    if others:
        raise ValueError(f"{arguments.dataset}: holds {len(prefixes)} sets; name one: {', '.join(map(str, prefixes))}")
    tokenizer = _tokenizer(arguments.dataset, arguments.tokenizer)
    if tokenizer is None:
        print(*document_tokens(prefix, arguments.document).tolist())
    else:
        print(document_text(prefix, arguments.document, tokenizer))


def _merge(arguments: argparse.Namespace) -> None:
    documents = merge_datasets(arguments.datasets, arguments.output)
    print(f"{len(arguments.datasets)} datasets, {documents:,} documents: {arguments.output}.bin, .idx")


def describe(contents: Contents) -> str:
    """A dataset, for people."""
    lines = [
        f"  {contents.documents:,} documents in {contents.sequences:,} sequences, {contents.tokens:,} tokens, "
        f"{contents.dtype}, {size(contents.bytes)}",
        f"  tokens of a document: {contents.shortest:,} to {contents.longest:,}, mean {contents.mean:,.1f}",
    ]
    most = max(contents.lengths.values(), default=1)
    widths = len(f"{2 * int(max(contents.lengths, key=int, default='1')) - 1:,}")
    for length, count in contents.lengths.items():
        bar = "█" * -(-WIDEST * count // most)
        lines.append(f"  {int(length):>{widths},} to {2 * int(length) - 1:>{widths},}  {count:>{len(f'{most:,}')},}  {bar}")
    return "\n".join(lines)


def _prefixes(dataset: Path) -> list[Path]:
    """The datasets that a path means: those of a stage's result, or the one of the prefix."""
    if dataset.is_dir():
        artifact = _result(dataset)
        suffix = TEXT if artifact.content == "conversations" else ""
        return [dataset / f"{each.name}{suffix}" for each in artifact.sets]
    prefix = dataset.with_suffix("") if dataset.suffix in (".bin", ".idx") else dataset
    if not idx_path(prefix).exists() and idx_path(f"{prefix}{TEXT}").exists():
        return [Path(f"{prefix}{TEXT}")]
    return [prefix]


def _tokenizer(dataset: Path, folder: Path | None) -> Tokenizer | None:
    """The tokenizer of a folder, or else the one that made a stage's result."""
    where = dataset if dataset.is_dir() else dataset.parent
    if not (where / a.ARTIFACT_FILE).exists():
        return None if folder is None else load_tokenizer(folder)
    artifact = _result(where)
    if folder is None:
        folder = where.resolve().parents[1] / artifact.spec["inputs"]["model"]["path"] / "files"
    return load_tokenizer(folder, artifact.tokenizer.kind, added_tokens=tuple(artifact.tokenizer.added_tokens))


def _result(folder: Path) -> a.DatasetArtifact:
    artifact = a.load_artifact(folder)
    if not isinstance(artifact, a.DatasetArtifact):
        raise ValueError(f"{folder}: is the result of {artifact.stage}, not of preprocess")
    return artifact


if __name__ == "__main__":
    sys.exit(main())
