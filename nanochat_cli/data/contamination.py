"""Documents that give away a problem of the built-in sets: ten words in a row of its text or solution.

Signs between words do not count, so that formatting does not matter. Knows the files of the sets, not their meaning.
"""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.word_runs import Words, runs_of, words_of

RUN_WORDS = 10
NOT_NUMBERS = 5
"""A run with fewer words that are not numbers gives nothing away: any table holds 1, 2, 3, …"""
# Data of a room above, which needs none of its code.
FOLDER = Path(__file__).parents[1] / "evaluation" / "problem_sets"
_WORD = re.compile(rb"[A-Za-z0-9_\x80-\xff]+")
_TABLE = 1 << 16


class ProblemRuns:
    """The runs of all built-in problems; `names` are those of the sets."""

    def __init__(self) -> None:
        self._files = sorted(FOLDER.glob("*.jsonl"))
        self.names = [path.stem for path in self._files]
        found = [_runs_of_set(path) for path in self._files]
        self._runs = np.unique(np.concatenate(found))
        self._sets = np.array([np.isin(self._runs, runs) for runs in found])
        self._possible = np.zeros(_TABLE, dtype=bool)  # most runs of a document are recognised as innocent by 16 bits
        self._possible[self._runs % _TABLE] = True

    @cached_property
    def version(self) -> str:
        """Of the sets, as eight hexadecimal digits."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in self._files)).hexdigest()[:8]

    def shared_with(self, words: Words) -> list[str]:
        """The names of the sets of which a document has a run."""
        runs = runs_of(words.hashes[~words.is_sign], RUN_WORDS)
        runs = runs[self._possible[runs % _TABLE]]
        places = np.minimum(np.searchsorted(self._runs, runs), len(self._runs) - 1)
        hits = places[self._runs[places] == runs]
        return [name for name, of_set in zip(self.names, self._sets, strict=True) if of_set[hits].any()]


def _runs_of_set(path: Path) -> NDArray[np.uint64]:
    runs = []
    for line in path.read_bytes().splitlines():
        problem = json.loads(line)
        content = (problem["prompt"] + (problem.get("solution") or "")).encode()
        words = words_of(content)
        numbers = np.array([word[:1].isdigit() for word in _WORD.findall(content)], dtype=np.int64)
        found = runs_of(words.hashes[~words.is_sign], RUN_WORDS)
        of_run = np.convolve(numbers, np.ones(RUN_WORDS, dtype=np.int64), mode="valid")[: len(found)]
        runs.append(found[RUN_WORDS - of_run >= NOT_NUMBERS])
    return np.concatenate(runs)
