"""``mtp-megatron preprocess``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mtp_megatron.data.huggingface import HuggingFaceTokenizer
from mtp_megatron.data.preprocess import PreprocessOptions, PreprocessResult, preprocess
from mtp_megatron.data.sources import DEFAULT_EXTENSIONS
from mtp_megatron.signals import unwind_on_signal

SUMMARY = "turn files and folders into a tokenizer and an indexed training set"

_EPILOG = """\
examples:
  # the source of Python's standard library (about 12 MB), with a tokenizer of 4096 pieces trained on it
  mtp-megatron preprocess --output data/stdlib --train-tokenizer 4096

  # the same text as raw bytes (vocabulary 257)
  mtp-megatron preprocess --output data/stdlib-bytes --tokenizer bytes

  # your own code and notes, with the tokenizer of a model that you have
  mtp-megatron preprocess ~/src ~/notes --extensions .py .md --tokenizer llama.model --workers 8 --output data/mine

  # with the tokenizer of a Hugging Face model that is to get heads (pip install with the extra hf)
  mtp-megatron preprocess dump.jsonl --tokenizer models/Llama-3.1-8B --workers 8 --output data/llama3

  # JSON lines or Parquet (pip install with the extra parquet), the text under "content"
  mtp-megatron preprocess dump.jsonl --json-key content --train-tokenizer 32000 --output data/dump
  mtp-megatron preprocess the-stack/data --json-key content --tokenizer models/Llama-3.1-8B --output data/stack

what is read:
  .jsonl .ndjson       JSON lines: each line an object with the text under --json-key, and one document. A line without
                       it is left out; where the first 10,000 all are, an error names the fields of the first
  .json                JSON lines too, where one of the first two lines is an object by itself with that key, or where
                       the first is an object by itself and not alone; else one document as it stands (package.json).
                       Records in a list or over several lines are left out, with jq's command to make lines of them
  .jsonl.gz, ...       JSON lines compressed with gzip, bzip2 (.bz2), xz or Zstandard (.zst, of one frame or many, with
                       up to 2 GiB to look back to; the extra zst). --extensions .jsonl takes them from folders, unless
                       the .jsonl itself lies there
  .parquet             Parquet (the extra parquet): each row one document, its text in the column --json-key, of
                       strings. Only that column is read, a few rows at a time. A row without text is left out as a line
                       is; a file without the column is an error that names those it has
  other files          one document of UTF-8 text each; other encodings are left out
  Not read: other .gz .bz2 .xz .zst, any .arrow. Named, they are an error; in a folder, they are left out. Where the
  extra for a file is not installed, that is an error in both cases, with the command that installs it.

  Links to folders are followed, and each folder is read once. A document has at most 1 GiB. A longer one, a file or
  folder that cannot be read and a damaged compressed file or table are errors (but see --skip-unreadable). What was
  left out is printed, and counted in dataset.json.

output:
  train.bin train.idx valid.bin valid.idx   megatron-core's indexed data set, one document per file, line or row,
                                            each ended by the end-of-document token
  tokenizer.model                           with a sentencepiece tokenizer
  tokenizer/                                with a Hugging Face tokenizer: its files, unchanged
  dataset.json                              counts, sizes, tokenizer, options

A document's text stays text: where it spells "<|endoftext|>" it does not end, and no token is added to it but the
end-of-document token.

The folder appears when it is complete. Running the same command again finds it up to date and does nothing.

when it is stopped:
  By Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 (SLURM's --signal), kill -9, a crash or an error such as a full disk: the same
  command goes on where it was, and makes the same data set, byte for byte. What was done lies in .NAME.preprocess
  beside the output folder NAME; the last 10 seconds or so of it are done again, and less than that is not kept.
  --workers may differ. Other options, or a file that has changed since it was read, are an error that says which:
  --restart removes that folder and begins anew. One preprocess at a time works on an output.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="files and folders (searched recursively, links followed, hidden ones excepted); without any: the Python "
        "source of this interpreter's standard library",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="bytes|MODEL|FOLDER",
        help="raw bytes (default), a sentencepiece model, a Hugging Face tokenizer (its folder or tokenizer.json), or "
        "a checkpoint (iter_*) or export of this package: its model's",
    )
    tokenizer.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="V",
        help="train a sentencepiece model with V tokens on (at most 200 MB of) the training documents: byte-pair, byte "
        "fallback, no normalisation, lossless",
    )
    parser.add_argument(
        "--eod",
        metavar="TOKEN",
        help="with a Hugging Face tokenizer: the token that ends every document, say '<|end_of_text|>' (default: the "
        "eos_token of its settings, which for a chat model ends a turn)",
    )
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the documents to hold out, chosen by their content (default 0.01, at least one document)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="chooses which documents are held out (default 1234)")
    parser.add_argument(
        "--extensions",
        nargs="+",
        default=list(DEFAULT_EXTENSIONS),
        metavar=".EXT",
        help=f"files to take from folders (default {' '.join(DEFAULT_EXTENSIONS)}); a file given by name is taken",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="field of a JSON line, or column of a Parquet file, that holds the text (default text)",
    )
    parser.add_argument("--max-documents", type=int, metavar="N", help="take only the first N documents")
    parser.add_argument("--with-tests", action="store_true", help="without PATH: the standard library's tests too")
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out what cannot be read (no permission, a failing disk, a damaged .gz or .parquet) and say so, in "
        "place of an error; of a file that fails midway the documents before are kept",
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenize (default 1)")
    parser.add_argument(
        "--restart",
        action="store_true",
        help="begin anew: remove what an interrupted preprocess to this --output did, in place of going on with it",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no summary")


def run(args: argparse.Namespace) -> int:
    """Preprocess and print what was made."""
    options = PreprocessOptions(
        output=args.output,
        paths=tuple(args.paths),
        tokenizer=args.tokenizer,
        eod=args.eod,
        train_vocab=args.train_tokenizer,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        extensions=tuple(args.extensions),
        json_key=args.json_key,
        max_documents=args.max_documents,
        with_tests=args.with_tests,
        skip_unreadable=args.skip_unreadable,
        workers=args.workers,
        restart=args.restart,
        quiet=args.quiet,
    )
    start = time.monotonic()
    with unwind_on_signal():
        result = preprocess(options)
    _report_rejected(result)
    if not result.tokenizer.lossless:
        print(
            f"warning: {result.tokenizer.name} does not keep white space or rare characters: decoded text differs from "
            "the original.",
            file=sys.stderr,
        )
    if result.up_to_date:
        print(f"{args.output}: already up to date")
    elif not args.quiet:
        print(summary_table(result))
        print(f"wrote {args.output} in {time.monotonic() - start:.1f} s")
    return 0


def summary_table(result: PreprocessResult) -> str:
    """The table of documents, tokens, bytes per token and sizes that the command prints."""
    manifest = result.manifest
    rows = [("split", "documents", "tokens", "text MB", "bytes/token", ".bin MB")]
    for name, split in (("train", manifest.train), ("valid", manifest.valid)):
        text = split.text_bytes  # not known where the ids came without their text
        rows.append(
            (
                name,
                f"{split.documents:,}",
                f"{split.tokens:,}",
                "-" if text is None else f"{text / 1e6:.2f}",
                "-" if text is None else f"{text / split.tokens:.2f}",
                f"{split.bin_bytes / 1e6:.2f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    lines.append(
        f"tokenizer {manifest.tokenizer.kind}: vocabulary {manifest.vocab_size}, end of document {_eod(result)}, "
        f"stored as {manifest.dtype}"
    )
    source = manifest.source
    lines.append(f"{source.files:,} files; left out: {source.rejected} unusable, {source.empty} empty")
    return "\n".join(lines)


def _eod(result: PreprocessResult) -> str:
    tokenizer = result.tokenizer
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return str(tokenizer.eod)
    return f"{tokenizer.eod} ({tokenizer.token_of(tokenizer.eod)})"  # one of several that its makers may have meant


def _report_rejected(result: PreprocessResult, most: int = 10) -> None:
    tally = result.tally
    for item in tally.examples[:most]:
        print(f"left out: {item}", file=sys.stderr)
    if tally.rejected > most:
        print(f"left out: {tally.rejected - most} more, {tally.rejected} in all", file=sys.stderr)
