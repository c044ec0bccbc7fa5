"""Where documents come from, as far as names and first lines tell: the language, the licence.

A report for people, who decide; nothing is left out by it.
"""

import re
from pathlib import Path, PurePosixPath

LANGUAGES = {".py": "python", ".pyi": "python", ".rs": "rust"}
"""Languages by extension; any other extension is itself the name of a language."""
OTHER = "other"
UNRECOGNISED = "not recognised"
HEAD = 4096
_PIECE = re.compile(r"(?:@\d+)+\Z")
_TAG = re.compile(rb"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+()\- ]*[A-Za-z0-9.+)])")
# Words in the title or first paragraph of each; of several the first in the text counts. Commas and case do not matter.
_LICENCES = (
    ("AGPL-3.0", "gnu affero general public license version 3"),
    ("LGPL-3.0", "gnu lesser general public license version 3"),
    ("LGPL-2.1", "gnu lesser general public license version 2.1"),
    ("LGPL-2.0", "gnu library general public license version 2"),
    ("GPL-3.0", "gnu general public license version 3"),
    ("GPL-2.0", "gnu general public license version 2"),
    ("Apache-2.0", "apache license version 2.0"),
    ("MPL-2.0", "mozilla public license version 2.0"),
    ("MPL-1.1", "mozilla public license version 1.1"),
    ("CC0-1.0", "cc0 1.0 universal"),
    ("Unlicense", "this is free and unencumbered software released into the public domain"),
    ("BSL-1.0", "boost software license - version 1.0"),
    ("ISC", "permission to use copy modify and(?:/or)? distribute this software for any purpose with or without fee"),
    ("MIT", "permission is hereby granted free of charge to any person obtaining a copy"),
    ("Zlib", "this software is provided 'as-is' without any express or implied warranty"),
    ("BSD-3-Clause", "redistributions in binary form must reproduce the above copyright notice.*neither the name"),
    ("BSD-2-Clause", "redistributions in binary form must reproduce the above copyright notice"),
)


def language_of(document: str) -> str:
    """The language of a document by its id in a corpus."""
    suffix = PurePosixPath(_PIECE.sub("", document)).suffix.lower()
    if not re.fullmatch(r"\.[a-z][a-z0-9+_-]*", suffix):
        return OTHER
    return LANGUAGES.get(suffix, suffix[1:])


def licence_tag(content: bytes) -> str | None:
    """The SPDX expression in the first lines of a document, if there is one."""
    found = _TAG.search(content, 0, HEAD)
    return None if found is None else found[1].decode()


def licence_of(path: Path) -> str:
    """The SPDX identifier of the licence that a file holds, by its words."""
    try:
        with path.open("rb") as file:
            text = file.read(8 * HEAD).decode("utf-8", "replace")
    except OSError:
        return UNRECOGNISED
    words = " ".join(text.replace(",", " ").lower().split())
    found = [(match.start(), name) for name, mark in _LICENCES if (match := re.search(mark, words))]
    return min(found, key=lambda one: one[0])[1] if found else UNRECOGNISED
