"""How well near-duplicates are found: against a comparison of all pairs of real files. Takes minutes.

    python benchmarks/dedup.py FOLDER --glob '*.rs' [--files 2000] [--out benchmarks/results/dedup.json]

All pairs: for every file the set of its runs of five words, as tuples that Python's regular expressions find, and the
Jaccard similarity of every pair that has a run in common. Nothing of it is shared with `nanochat_cli.data`. Recall is
of pairs with a similarity of at least 0.7, which are found if no more than one of the two is kept; precision is of the
documents that are left out, right if one that is kept has a similarity of at least 0.7.
"""

import argparse
import hashlib
import re
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

from nanochat_cli.data.corpus import open_corpus
from nanochat_cli.data.near_duplicates import REPEATED, SHINGLE_WORDS, NearDuplicates
from nanochat_cli.data.split import split_key
from nanochat_cli.data.word_runs import words_of
from nanochat_cli.report.result_file import Result, write_results

WORD = re.compile(rb"[A-Za-z0-9_\x80-\xff]+|[^\sA-Za-z0-9_\x80-\xff]")


def sample(folder: Path, glob: str, count: int) -> dict[str, bytes]:
    """`count` files, chosen by the hash of their names, so that a family is represented as it is in the folder."""
    documents = {one.id: one.content for one in open_corpus(str(folder), glob) if one.content.split()}
    chosen = sorted(documents, key=lambda name: hashlib.sha256(name.encode("utf-8", "replace")).digest())
    return {name: documents[name] for name in chosen[:count]}


def similar_pairs(contents: list[bytes]) -> dict[tuple[int, int], float]:
    """Every pair with a similarity of at least 0.7."""
    sizes: list[int] = []
    with_run: dict[tuple[bytes, ...], list[int]] = defaultdict(list)
    common: Counter[tuple[int, int]] = Counter()
    for number, content in enumerate(contents):
        words = WORD.findall(content)
        runs = {tuple(words[at : at + SHINGLE_WORDS]) for at in range(max(len(words) - SHINGLE_WORDS + 1, 1))}
        sizes.append(len(runs))
        shared = Counter(other for run in runs for other in with_run.get(run, ()))
        common.update({(other, number): count for other, count in shared.items()})
        for run in runs:
            with_run[run].append(number)
    found = {(a, b): count / (sizes[a] + sizes[b] - count) for (a, b), count in common.items()}
    return {pair: value for pair, value in found.items() if value >= REPEATED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--glob", default="*.rs")
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--name", default="Rust crates", help="of the files, for the result")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "dedup.json")
    arguments = parser.parse_args()
    documents = sample(arguments.folder, arguments.glob, arguments.files)
    contents = list(documents.values())
    with tempfile.TemporaryDirectory() as folder, NearDuplicates(Path(folder)) as near:
        for content in contents:
            near.add(split_key(content), words_of(content).hashes)
        kept = near.represented(near=True).tolist()
    pairs = similar_pairs(contents)
    left_out = {number for number, stands_for in enumerate(kept) if number != stands_for}
    found = sum(a in left_out or b in left_out for a, b in pairs)
    right = {
        number for a, b in pairs for number, other in ((a, b), (b, a)) if number in left_out and other not in left_out
    }
    case = f"{len(contents)} files, {arguments.name}"
    results = [
        Result(case, "text", sum(map(len, contents)), "B"),
        Result(case, f"pairs with a similarity of at least {REPEATED}", len(pairs), "pairs"),
        Result(case, "recall", found / len(pairs), "share"),
        Result(case, "left out", len(left_out), "documents"),
        Result(
            case,
            "left out, share of the bytes",
            sum(len(contents[n]) for n in left_out) / sum(map(len, contents)),
            "share",
        ),
        Result(case, "precision", len(right) / len(left_out), "share"),
    ]
    print(f"wrote {write_results(arguments.out, 'dedup', results)}")
    for one in results:
        print(f"{one.metric}: {one.value:g} {one.unit}")


if __name__ == "__main__":
    main()
