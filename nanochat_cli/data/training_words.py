"""BPE training made bearable: words of bounded length, and a thread that Ctrl-C does not have to wait for.

The trainer of the tokenizers library takes time quadratic in the longest word (a merge inside a word moves all that
follows), and no Python code runs meanwhile. One literal of 900,000 digits keeps it busy for minutes.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator

from tokenizers import pre_tokenizers

# Words of ordinary text are shorter (the longest of the standard library has 201 characters), so that cutting changes
# nothing there; text of cut words costs about as much as ordinary text.
MAX_TRAINING_WORD = 256
# A word is at most one character, a run of non-blanks, and a run of blanks, so one run of a longer word has half of it.
# U+001C to U+001F are blanks for Python but not for the pre-tokenizers.
_MAY_HAVE_LONG_WORD = re.compile(rf"(?:\S|[\x1c-\x1f]){{{MAX_TRAINING_WORD // 2}}}|\s{{{MAX_TRAINING_WORD // 2}}}")
# Seconds between a waiting main thread's checks whether it was interrupted.
LOOK_EVERY = 0.2
# Seconds it then waits for the other thread to leave Python: the interpreter must not end under it.
LEAVING = 0.5


def with_short_words(texts: Iterable[str], pre_tokenizer: pre_tokenizers.PreTokenizer) -> Iterator[str]:
    """The texts, cut inside words of more than MAX_TRAINING_WORD characters and nowhere else."""
    for text in texts:
        if _MAY_HAVE_LONG_WORD.search(text) is None:
            yield text
            continue
        start = 0
        for _, (first, last) in pre_tokenizer.pre_tokenize_str(text):
            for cut in range(first + MAX_TRAINING_WORD, last, MAX_TRAINING_WORD):
                yield text[start:cut]
                start = cut
        yield text[start:]


def interruptibly(
    work: Callable[[Iterator[str]], object], texts: Iterable[str], waiting: Callable[[], None] = lambda: None
) -> None:
    """Do `work` with `texts` in a thread while this one can still take Ctrl-C; raises what `work` raises.

    `waiting` is called here, a few times per second. After an interruption the thread gets no more texts; it goes on,
    uselessly, with those it has, and ends with the process.
    """
    failed: list[BaseException] = []
    interrupted = threading.Event()

    def read() -> Iterator[str]:
        for text in texts:
            if interrupted.is_set():
                raise InterruptedError
            yield text

    def run() -> None:
        try:
            work(read())
        except BaseException as error:  # noqa: BLE001 - raised again below
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(LOOK_EVERY)
            waiting()
    except BaseException:
        interrupted.set()
        thread.join(LEAVING)
        raise
    if failed:
        raise failed[0]
