"""The commands on an index: `--index`, `--search`, `--serve`."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

from common.errors import UserError
from runners.encoder import Picture
from runners.search.index import Hit
from utils.extras import extra
from utils.output import say, table

_SHOWN = 80  # characters of a path or text in a table


def execute(options: argparse.Namespace) -> None:
    """Does what the options ask of an index."""
    if options.index is not None:
        index_command(options)
    elif options.search is not None:
        search_command(options)
    else:
        serve_command(options)


def index_command(options: argparse.Namespace) -> None:
    """`--index CHECKPOINT --input ... --save-dir DIR`: makes an index, or brings it up to date, and says what was done.

    Raises:
        UserError: As `build_index`; if --input or --save-dir is missing.
    """
    from runners.search.building import SKIPPED, build_index

    inputs, overrides = _apart(options.input or [], options.overrides)
    if not inputs:
        raise UserError("--index needs --input: a folder, a pattern, a file of lines, a manifest, or dataset:NAME")
    if options.save_dir is None:
        raise UserError("--index needs --save-dir, the folder of the index")
    folder = Path(options.save_dir)
    index, summary = build_index(options.index, inputs, folder, overrides, options.device or "auto")
    with index:
        rows = [["", "encoded", "kept", "in the index"]]
        for kind in ("image", "text"):
            counts = (summary.encoded[kind], summary.kept[kind], index.count((kind,)))
            rows.append([f"{kind}s", *(f"{count:,}" for count in counts)])
        say(table(rows))
        if summary.removed:
            say(f"{summary.removed:,} have vanished and were removed")
        if summary.skipped:
            say(f"{len(summary.skipped):,} could not be read and were skipped: {folder / SKIPPED} names them")
        say(f"index {folder}: {index.header.engine}, codes of {index.header.model}")


def search_command(options: argparse.Namespace) -> None:
    """`--search DIR QUESTION ...`: prints the hits of texts and pictures, as tables or, with `--json`, one line each.

    Raises:
        UserError: If the index cannot be used, or a question is a picture that cannot be read.
    """
    from runners.search.searcher import Searcher

    (folder, *questions), overrides = _apart(options.search, options.overrides)
    if not questions:
        raise UserError(f'--search {folder}: ask something, e.g. --search {folder} "a red heart" picture.jpg')
    if not all(map(str.strip, questions)):
        raise UserError(f"--search {folder}: a question is empty; describe what is looked for, or name a picture")
    pictures = {question for question in questions if is_picture(question)}
    with Searcher.open(folder, device=options.device or "auto", overrides=overrides) as searcher:
        for question in questions:
            asked: list[Picture] = [question]
            hits = (searcher.by_pictures(asked) if question in pictures else searcher.by_texts([question]))[0]
            if options.json:
                say(json.dumps({"query": question, "hits": [shown(hit) for hit in hits]}))  # ASCII: of any encoding
            else:
                say(_hits_table(question, hits))


def serve_command(options: argparse.Namespace) -> None:
    """`--serve DIR`: a page and a JSON service until Ctrl-C or SIGTERM.

    Raises:
        UserError: As `serve`; if a package is missing.
    """
    for module in ("fastapi", "uvicorn", "python_multipart"):
        extra(module, "requirements-serve.txt", "--serve")
    from runners.search.server import serve

    serve(options.serve, options.overrides, options.device or "auto")


def is_picture(question: str) -> bool:
    """Whether a question on the command line names a picture and is no text.

    Raises:
        UserError: If it looks like a path, but there is no such file.
    """
    from runners.search.inputs import SUFFIXES

    if os.path.isfile(question):
        return True
    named = os.path.splitext(question)[1].lower() in SUFFIXES
    if named and (os.sep in question or " " not in question):
        raise UserError(f"picture {question} is not there; name one that is, or ask without its suffix")
    return False


def shown(hit: Hit) -> dict[str, Any]:
    """A hit as JSON values."""
    return {"id": hit.id, "kind": hit.kind, "distance": hit.distance, **hit.metadata}


def _apart(words: list[str], overrides: list[str]) -> tuple[list[str], list[str]]:
    """Words of an option, and all overrides: those that stand behind such words were taken for some of them."""
    settings = [word for word in words if re.match(r"(search|dataset)\.[\w.]+=", word)]
    return [word for word in words if word not in settings], [*overrides, *settings]


def _hits_table(question: str, hits: list[Hit]) -> str:
    rows = [["rank", "bits apart", "kind", "what", "id"]]
    for rank, hit in enumerate(hits, start=1):
        what = hit.metadata.get("path") if hit.kind == "image" else hit.metadata.get("text")
        what = " ".join(str(hit.metadata.get("name", "") if what is None else what).split())
        short = (
            what if len(what) <= _SHOWN else f"...{what[-_SHOWN:]}" if hit.kind == "image" else f"{what[:_SHOWN]}..."
        )
        rows.append([str(rank), str(hit.distance), hit.kind, short, str(hit.id)])
    return f"{question}\n{table(rows)}\n"
