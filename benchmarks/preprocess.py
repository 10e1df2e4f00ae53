"""Preprocessing of ours, from a file on disk to .bin and .idx, against the tokenizer library's own batch encoding of the same
documents already in memory: tokens per CPU second, side by side on this machine.

    python benchmarks/preprocess.py            all tokenizers, some minutes
    python benchmarks/preprocess.py --quick    less text, once

Each side runs in a process of its own, and they take turns, so that what else the machine does hits both alike. CPU seconds are
those of all processes, from start to end for ours (starting Python and loading the tokenizer included), of the call alone for
the library. The figure of each side is its best round.

What is compared:
    ours       the engine with 2 workers: reading and parsing JSON lines, tokenizing, writing parts, joining them.
    library    `encode` of sentencepiece, or `encode_batch_fast` of tokenizers, on a list of all texts, one thread.
    library-2  the same with two threads, so that it shares the machine with itself as our two workers do, and as it does
               its own batches on two cores unless told otherwise.

Tokenizers: Llama-2's where it can be found (--llama, by default that of the golden files), else a BPE model like it, trained on
the spot; a unigram model of sentencepiece; byte-level BPE of tokenizers, trained on the spot, with GPT-2's words, Llama 3's,
GPT-4o's, those behind a normalizer that Python does not do (normalized), and in a pattern that is not translated
(library-words); one that splits at numbers alone, as SuperBPE's, so that pieces go beyond words (superwords); one with a single
step of which nothing is known, so that the library does all (unknown); one like Gemma's, with its added tokens for rows of
newlines and spaces; and a list of words, for which the library has least to do.

The text is Python source: that of the golden files where there, and the files of this Python's library and packages, up to
--megabytes.
"""

import argparse
import gzip
import json
import os
import resource
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
WORKERS = 2
TRAINED_ON = 4_000_000  # characters that a tokenizer is trained on
REQUIRED = {"llama": 1.3}  # times the library's tokens per CPU second
REQUIRED_OF_OTHERS = 0.9
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
OTHER_WORDS = (  # GPT-4o's
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NAMES = (
    "llama",
    "unigram",
    "byte-level",
    "llama3",
    "other-words",
    "normalized",
    "library-words",
    "superwords",
    "unknown",
    "gemma",
    "word-list",
)
SIDES = ("ours", "library", "library-2")


def texts(limit: int) -> Iterator[str]:
    """Python source, up to `limit` characters."""
    left = limit

    def all_texts() -> Iterator[str]:
        golden = GOLDEN / "preprocess" / "code.jsonl.gz"
        if golden.is_file():
            with gzip.open(golden) as lines:
                for line in lines:
                    yield json.loads(line)["text"]
        for folder in ("stdlib", "purelib"):
            for path in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
                if folder == "stdlib" and "site-packages" in path.parts:
                    continue
                try:
                    yield path.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue

    for text in all_texts():
        if left <= 0:
            return
        left -= len(text)
        yield text


def write_corpus(file: Path, megabytes: int) -> dict[str, Any]:
    file.parent.mkdir(parents=True, exist_ok=True)
    documents = size = 0
    with file.open("w") as lines:
        for text in texts(megabytes * 10**6):
            lines.write(json.dumps({"id": documents, "text": text}) + "\n")
            documents, size = documents + 1, size + len(text.encode())
    golden = " the golden files' first," if (GOLDEN / "preprocess").is_dir() else ""
    return {
        "documents": documents,
        "bytes": size,
        "source": f"Python source:{golden} then this Python's own library and packages",
    }


def make_tokenizers(folder: Path, llama: Path) -> dict[str, Path]:
    """Folders of tokenizers, by name."""
    import sentencepiece
    import tokenizers

    folders = {name: folder / name for name in NAMES}
    for path in folders.values():
        path.mkdir(parents=True, exist_ok=True)
    # Lines, as sentencepiece wants them; for tokenizers whole texts.
    sample = list(texts(TRAINED_ON))
    lines = [line for text in sample for line in text.splitlines() if line]
    if llama.is_file():
        (folders["llama"] / "tokenizer.model").write_bytes(llama.read_bytes())
    for name, kind in (("llama", "bpe"), ("unigram", "unigram")):
        if not (folders[name] / "tokenizer.model").is_file():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_prefix=str(folders[name] / "tokenizer"), vocab_size=8000, model_type=kind,
                byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
                allow_whitespace_only_pieces=True, minloglevel=3,
            )  # fmt: skip
    splits, models, trainers = tokenizers.pre_tokenizers, tokenizers.models, tokenizers.trainers
    settings = {"special_tokens": ["<|endoftext|>"], "show_progress": False}
    after = splits.ByteLevel(add_prefix_space=False, use_regex=False)
    numbers = splits.Split(tokenizers.Regex(r"\p{N}+"), "isolated")
    thousands = splits.Split(tokenizers.Regex(r"(?=(\d{3})+(?!\d))"), "isolated")
    splitters = {"byte-level": splits.ByteLevel(add_prefix_space=False), "word-list": splits.Whitespace()}
    patterns = {
        "llama3": LLAMA3_WORDS,
        "other-words": OTHER_WORDS,
        "normalized": OTHER_WORDS,
        "library-words": f"(?>{OTHER_WORDS})",
    }
    splitters["unknown"] = splits.UnicodeScripts()
    splitters["superwords"] = splits.Sequence([numbers, thousands, after])
    for name, words in patterns.items():
        splitters[name] = splits.Sequence([splits.Split(tokenizers.Regex(words), "isolated"), after])
    normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Strip(), tokenizers.normalizers.Replace(tokenizers.Regex("[\u2018\u2019]"), "'")]
    )
    if not (folders["gemma"] / "tokenizer.json").is_file():
        train_gemma(lines).save(str(folders["gemma"] / "tokenizer.json"))
    for name, splitter in splitters.items():
        if (folders[name] / "tokenizer.json").is_file():
            continue
        if name == "word-list":
            library = tokenizers.Tokenizer(models.WordLevel(unk_token="<|endoftext|>"))
            trainer = trainers.WordLevelTrainer(vocab_size=32000, **settings)
        else:
            library = tokenizers.Tokenizer(models.BPE())
            trainer = trainers.BpeTrainer(vocab_size=32000, initial_alphabet=splits.ByteLevel.alphabet(), **settings)
        library.pre_tokenizer = splitter
        if name == "normalized":
            library.normalizer = normalizer
        library.train_from_iterator(sample, trainer)
        library.save(str(folders[name] / "tokenizer.json"))
        (folders[name] / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folders


def train_gemma(lines: list[str]) -> Any:
    """A tokenizer that merges a whole text, but for rows of newlines and of spaces, which are found before."""
    import tokenizers

    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    rows = ["\n" * count for count in range(1, 32)] + ["▁" * count for count in range(2, 32)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<unk>", "<eos>", *names, *rows], limit_alphabet=1000, show_progress=False
    )
    library.train_from_iterator(lines, trainer)
    definition = json.loads(library.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] not in names]
    for token in definition["added_tokens"]:
        token["special"] = token["content"] not in rows
    definition["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return tokenizers.Tokenizer.from_str(json.dumps(definition | {"pre_tokenizer": at_spaces}))


def ours(corpus: Path, tokenizer: Path, folder: Path) -> dict[str, float]:
    from contextlib import closing

    from megatron_core_impl.data.preprocessing import Job, join, remove_parts, tokenize
    from megatron_core_impl.data.text_encoder import TextRecipe
    from megatron_core_impl.data.text_files import SourceFile

    peak = PeakMemory()
    started = time.perf_counter()
    job = Job((SourceFile(corpus, corpus.name),), TextRecipe(tokenizer, bos_eos="none"), folder / "data")
    with closing(tokenize(job, WORKERS)) as results:
        for _ in results:
            pass
    tokens = join(job).tokens
    remove_parts(job)
    wall = time.perf_counter() - started
    peak.stop()
    cpu = sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    return {"tokens": tokens, "wall": wall, "cpu": cpu - peak.cpu, "peak_bytes": peak.bytes}


def library(corpus: Path, tokenizer: Path, threads: int) -> dict[str, float]:
    os.environ |= {"TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false", "RAYON_NUM_THREADS": str(threads)}
    import sentencepiece
    import tokenizers

    documents = [json.loads(line)["text"] for line in corpus.open()]
    if (tokenizer / "tokenizer.model").is_file():
        sp = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
        wall, cpu = time.perf_counter(), time.process_time()
        found = sp.encode(documents, num_threads=threads)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"tokens": sum(map(len, found)), "wall": wall, "cpu": cpu, "peak_bytes": 0}
    hf = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    hf.encode_special_tokens = True  # a text that spells one is text
    wall, cpu = time.perf_counter(), time.process_time()
    encodings = hf.encode_batch_fast(documents, add_special_tokens=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"tokens": sum(map(len, encodings)), "wall": wall, "cpu": cpu, "peak_bytes": 0}


class PeakMemory:
    """The most that this process and its children have had in memory together, looked at every 20 ms.

    To look takes a tenth of a core or more, which is none of the work that is measured.

    Attributes:
        bytes: the most, once it was stopped.
        cpu: seconds that it took to look.
    """

    def __init__(self) -> None:
        self.bytes, self.cpu, self._stopped = 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(0.02):
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            self.bytes = max(self.bytes, sum(map(_memory, [str(os.getpid()), *children])))
            self.cpu = time.thread_time()


def _memory(pid: str) -> int:
    """Bytes of a process's own, and its share of what several have (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def measure(side: str, corpus: Path, tokenizer: Path, folder: Path) -> dict[str, float]:
    """One round of one side, in a process of its own."""
    command = [sys.executable, __file__, "--serve", side, str(corpus), str(tokenizer), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found: dict[str, float] = json.loads(subprocess.check_output(command, env=environment, cwd=ROOT))
    return found


def report(name: str, best: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Print the best rounds of a tokenizer, and give what is kept of them."""
    counts = {turn["tokens"] for turn in best.values()}
    assert len(counts) == 1, f"{name}: the sides made {counts} tokens"
    rates = {side: turn["tokens"] / turn["cpu"] for side, turn in best.items()}
    ratio, ratio_2 = (rates["ours"] / rates[side] for side in ("library", "library-2"))
    required, ours = REQUIRED.get(name, REQUIRED_OF_OTHERS), best["ours"]
    print(
        f"{name}: {ours['tokens']:,} tokens; per CPU second: "
        + ", ".join(f"{side} {rate / 1e6:.2f} M" for side, rate in rates.items())
        + f"\n  {ratio_2:.2f} × the library on two threads, as ours (required {required} ×), {ratio:.2f} × on one; "
        f"{ours['wall']:.1f} s, {ours['cpu'] / ours['wall']:.2f} cores busy, {ours['peak_bytes'] / 1e6:.0f} MB",
        flush=True,
    )
    return best | {"ratio": ratio, "ratio_2": ratio_2, "required": required}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less text, once")
    parser.add_argument("--megabytes", type=int, help="size of the text [120; 12 with --quick]")
    parser.add_argument("--rounds", type=int, help="rounds of each side [3; 1 with --quick]")
    parser.add_argument("--only", choices=NAMES, help="one tokenizer")
    parser.add_argument("--llama", type=Path, default=GOLDEN / "tokenizer" / "llama2.model", help="Llama-2's tokenizer.model")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "workspace" / "benchmarks" / "preprocess.json", help="the JSON file"
    )
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        side, *paths = options.serve
        corpus_file, tokenizer, folder = map(Path, paths)
        threads = {"library": 1, "library-2": 2}.get(side)
        found = library(corpus_file, tokenizer, threads) if threads else ours(corpus_file, tokenizer, folder)
        print(json.dumps(found))
        return
    folder = options.output.parent / "preprocess"
    corpus = write_corpus(folder / "corpus.jsonl", options.megabytes or (12 if options.quick else 120))
    print(f"{corpus['documents']:,} documents, {corpus['bytes'] / 1e6:.1f} MB; {corpus['source']}")
    results: dict[str, Any] = {"corpus": corpus, "workers": WORKERS}
    for name, tokenizer in make_tokenizers(folder, options.llama).items():
        if options.only not in (None, name):
            continue
        rounds = options.rounds or (1 if options.quick else 3)
        taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side, turns in taken.items():
                turns.append(measure(side, folder / "corpus.jsonl", tokenizer, folder))
        results[name] = report(name, {side: min(turns, key=lambda turn: turn["cpu"]) for side, turns in taken.items()})
    options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
