"""What the `bench` commands share: `--markdown`, `--json [FILE]`, and where a report goes."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError
from ..runtime.outputs import need_place, write_json
from .render import note


def add_report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--markdown", action="store_true", help="Markdown tables")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON into FILE, or instead of tables"
    )


def check_report_options(args: argparse.Namespace) -> None:
    """Raise before anything is measured where its JSON could not be written."""
    if args.json in (None, "-"):
        return
    if Path(args.json).is_dir():
        raise UsageError(f"--json would write to the folder `{args.json}`", "", "--json=FILE")
    need_place(args.json)


def print_report(
    document: dict[str, Any], args: argparse.Namespace, tables: Callable[[], str]
) -> None:
    """The document where `--json` wants it, and the tables unless it took their place."""
    if args.json == "-":
        print(json.dumps(document, indent=1))
        return
    if args.json is not None:
        write_json(args.json, document)
        note(f"wrote {args.json}")
    print(tables())
