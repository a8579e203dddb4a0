"""``mtp-megatron adopt``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mtp_megatron.data.adopt import AdoptOptions, adopt
from mtp_megatron.data.cli import summary_table
from mtp_megatron.signals import unwind_on_signal

SUMMARY = "make a data set of a .bin and .idx that Megatron-LM's preprocess_data.py wrote, without copying it"

_EPILOG = """\
examples:
  # ids of Llama 3's tokenizer, 1 % of the documents held out
  mtp-megatron adopt data/corpus_text_document --tokenizer models/Llama-3.1-8B --output data/corpus

  # held-out documents in files of their own; ids of a sentencepiece model
  mtp-megatron adopt data/train_text_document --valid data/valid_text_document --tokenizer llama.model --output data/own

what is checked, reading every id once: the index belongs to the .bin; each document ends with the end-of-document id
(upstream's --append-eod); no id is outside the tokenizer's vocabulary; of documents from all over the data, decoded and
encoded again, at least half have the same ids (at least one, of a tokenizer that loses characters or white space). Ids
are uint16 or int32; a document of several sequences (--split-sentences) becomes one. Where this was written it read
97 MB/s (one core, documents of 1000 bytes); memory is that of 64 MB of ids and of some tens of bytes a document.

The .bin gets a second name in the folder (a hard link): removing the original loses nothing, changing it in place would
change both. Documents that are held out are copied, and left out by the index of the training split. Which ones, their
ids and --seed decide: copies of a document fall on the same side.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the subcommand."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="path of the .bin and .idx without these")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="bytes|MODEL|FOLDER",
        help="what made the ids: a sentencepiece model, a Hugging Face tokenizer (its folder or tokenizer.json), or a "
        "checkpoint (iter_*) or export of this package: its model's",
    )
    parser.add_argument(
        "--eod",
        metavar="TOKEN",
        help="with a Hugging Face tokenizer: the token that ends every document (default: the eos_token of its "
        "settings, as upstream's)",
    )
    parser.add_argument("--valid", type=Path, metavar="PREFIX", help="held-out documents, in files of their own")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the documents to hold out where --valid names none (default 0.01, at least one document)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="chooses which documents are held out (default 1234)")
    parser.add_argument(
        "--bin",
        choices=("link", "symlink", "copy"),
        default="link",
        help="how the folder gets the .bin: a hard link (default; same file system), a symbolic link, which needs the "
        "original where it is, or a copy",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars and no summary")


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns 0."""
    options = AdoptOptions(
        prefix=args.prefix,
        output=args.output,
        tokenizer=args.tokenizer,
        eod=args.eod,
        valid=args.valid,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        naming=args.bin,
        quiet=args.quiet,
    )
    start = time.monotonic()
    with unwind_on_signal():
        result = adopt(options)
    if result.inner_ends:
        print(
            f"warning: {result.inner_ends:,} end-of-document ids lie inside documents (texts that spelled the token, "
            "most likely). Targets stop at each of them as at the end of a document.",
            file=sys.stderr,
        )
    if result.same < result.sampled:
        print(
            f"warning: {result.sampled - result.same} of {result.sampled} documents, decoded and encoded again, have "
            "other ids. A few do where texts spell special tokens or have unknown characters; if it is many, "
            "--tokenizer is not what made them.",
            file=sys.stderr,
        )
    if result.data.up_to_date:
        print(f"{args.output}: already up to date")
    elif not args.quiet:
        print(summary_table(result.data))
        print(f"{result.same} of {result.sampled} documents, decoded and encoded again, have the same ids")
        print(f"wrote {args.output} in {time.monotonic() - start:.1f} s")
    return 0
