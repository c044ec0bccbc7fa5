"""Small corpora and configurations that the data tests share."""

import random
from pathlib import Path
from typing import Any

from nanochat_cli.config.schema import Config

WORDS = "def return self import class value index tensor naïve 'quoted' ∑ 😀 42 3.14 == ( ) : [0] # \t".split(" ")


def random_text(rng: random.Random, size: int) -> str:
    """About `size` characters of lines that look a little like code, in several scripts."""
    text = ""
    while len(text) < size:
        text += "    " * rng.randrange(3) + " ".join(rng.choices(WORDS, k=rng.randrange(1, 9))) + "\n"
    return text


def write_folder(folder: Path, documents: int, seed: int = 0, size: int = 400) -> list[bytes]:
    """`documents` .txt files in nested folders; their contents in the order in which a corpus yields them."""
    rng = random.Random(seed)
    contents: dict[tuple[str, ...], bytes] = {}
    for number in range(documents):
        parts = (f"part{rng.randrange(4)}", f"file{number:04d}.txt")
        contents[parts] = random_text(rng, rng.randrange(20, size)).encode()
        (folder / parts[0]).mkdir(parents=True, exist_ok=True)
        folder.joinpath(*parts).write_bytes(contents[parts])
    return [contents[parts] for parts in sorted(contents)]


def make_config(**sections: dict[str, Any]) -> Config:
    """A configuration with a tiny vocabulary that, by default, encodes in the test's own process."""
    sections["model"] = {"vocab_size": 400} | sections.get("model", {})
    sections["data"] = {"workers": 1, "val_fraction": 0.2} | sections.get("data", {})
    return Config.model_validate(sections)
