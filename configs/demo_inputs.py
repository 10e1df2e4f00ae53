"""Make what `configs/demo.yaml` starts from, on a machine without internet.

    python configs/demo_inputs.py [workspace/demo]

- `stdlib`: a link to the source code of the standard library of the running Python, the demo's corpus;
- `base`: the base model, an ordinary Hugging Face folder: a SentencePiece tokenizer with byte fallback, trained on part of
  the corpus, and a small Llama 2 (RMSNorm, SwiGLU, RoPE, grouped-query attention, untied head) with seeded random weights.

What is there already is kept.
"""

import argparse
import logging
import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

VOCAB_SIZE = 4096
TOKENIZER_BYTES = 4_000_000  # of corpus that the tokenizer is trained on: more gains nothing at this vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("workspace/demo"), help="where to put them")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    corpus = link_corpus(folder / "stdlib")
    base = folder / "base"
    if (base / "config.json").exists():
        return
    started = time.monotonic()
    partial = folder / "base.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    train_tokenizer(lines_of(corpus), partial / "tokenizer.model", VOCAB_SIZE)
    parameters = make_model(partial, hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4)
    partial.rename(base)
    seconds = time.monotonic() - started
    print(f"base model: {parameters:,} parameters, vocabulary {VOCAB_SIZE:,}, made in {seconds:.0f}s: {base}")


def link_corpus(link: Path) -> Path:
    """Point `link` at this Python's standard library."""
    target = Path(sysconfig.get_path("stdlib"))
    if link.is_symlink() and link.readlink() != target:
        link.unlink()
    if not link.exists():
        link.symlink_to(target, target_is_directory=True)
    return link


def lines_of(corpus: Path) -> Iterator[str]:
    """Lines of every n-th file of the corpus, so that the tokenizer sees all of its parts."""
    files = sorted(p for p in corpus.glob("**/*.py") if "site-packages" not in p.parts)
    step = max(1, sum(p.stat().st_size for p in files) // TOKENIZER_BYTES)
    return (line for file in files[::step] for line in file.read_text(errors="ignore").splitlines() if 0 < len(line) < 400)


def train_tokenizer(lines: Iterator[str], model_file: Path, vocab_size: int) -> None:
    """Train a Llama-2-like SentencePiece tokenizer."""
    import sentencepiece

    with model_file.open("wb") as model_writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=model_writer, model_type="bpe", vocab_size=vocab_size, byte_fallback=True,
            character_coverage=0.9995, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_digits=True, allow_whitespace_only_pieces=True, num_threads=2, minloglevel=2,
            unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        )  # fmt: skip


def make_model(folder: Path, **sizes: int) -> int:
    """Save a random Llama 2 of four layers beside its tokenizer, with the tokenizer's files; returns the parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizerFast
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(1234)
    tokenizer = LlamaTokenizerFast.from_pretrained(folder, legacy=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_hidden_layers=4, max_position_embeddings=1024, rms_norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype="float32", **sizes,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
