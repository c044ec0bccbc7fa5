"""A small corpus that is the same on every machine: short functions, made of a few words with a fixed seed."""

import random
from pathlib import Path

VERBS = "read write find count merge split check parse load store update remove".split()
NOUNS = "line token value index name item list key word block file tree".split()
OPERATORS = ("+", "-", "*", "//", "%")
N_FILES, FUNCTIONS_PER_FILE = 48, 6


def write_corpus(folder: Path) -> None:
    """Write N_FILES text files, about 40 kB in all, unless they exist."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    draw = random.Random(20260501)
    for number in range(N_FILES):
        functions = [_function(draw) for _ in range(FUNCTIONS_PER_FILE)]
        (folder / f"module_{number:02}.py").write_text("\n\n".join(functions), encoding="utf-8")


def _function(draw: random.Random) -> str:
    verb, noun, other = draw.choice(VERBS), draw.choice(NOUNS), draw.choice(NOUNS)
    operator, number = draw.choice(OPERATORS), draw.randint(1, 99)
    return (
        f"def {verb}_{noun}({noun}, {other}_count=0):\n"
        f'    """{verb.capitalize()} the {noun} of a {other}."""\n'
        f"    if not {noun}:\n"
        f"        return {other}_count\n"
        f"    return {noun} {operator} {number}\n"
    )
