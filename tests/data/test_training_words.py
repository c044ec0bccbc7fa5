"""Training the tokenizer on text whose words are very long: bounded, unchanged elsewhere, open to Ctrl-C."""

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, trainers

from nanochat_cli.data.tokenizer import BYTE_TO_CHAR, PRE_TOKENIZERS, SPECIAL_TOKENS, Tokenizer, pre_tokenizer
from nanochat_cli.data.training_words import MAX_TRAINING_WORD, with_short_words
from tests.data.corpora import random_text

ROOT = Path(__file__).resolve().parents[2]
LONG = [
    "x = " + "0123456789" * 200 + "\n",
    "é" * 1500 + " next 'word's end",
    " " * 2000 + "x\n" + "\n \t" * 700,
    "=" * 900 + "\n" * 900,  # one word of punctuation and the line ends after it
    "\x1c-\x1f" * 600,
    "_" * 1000 + "a1" * 700,
]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_long_words_are_cut_and_no_character_is_lost(pre: str) -> None:
    splitter = pre_tokenizer(PRE_TOKENIZERS[pre][0])
    for text in LONG:
        pieces = list(with_short_words([text], splitter))
        assert "".join(pieces) == text
        for piece in pieces:
            assert max(last - first for _, (first, last) in splitter.pre_tokenize_str(piece)) <= MAX_TRAINING_WORD


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_without_long_words_trains_the_tokenizer_that_the_plain_library_trains(pre: str) -> None:
    rng = random.Random(0)
    texts = [random_text(rng, 600) for _ in range(30)] + ["a1_-" * 400, "x" * MAX_TRAINING_WORD, "b " * 3000]
    plain = Backend(models.BPE())
    plain.pre_tokenizer = pre_tokenizer(PRE_TOKENIZERS[pre][0])
    trainer = trainers.BpeTrainer(
        vocab_size=330, min_frequency=2, initial_alphabet=BYTE_TO_CHAR, max_token_length=24, show_progress=False
    )
    plain.train_from_iterator(texts, trainer)
    ours = Tokenizer.train(texts, 330 + len(SPECIAL_TOKENS), pre=pre)
    merges = [tuple(merge) for merge in json.loads(plain.to_str())["model"]["merges"]]
    assert [tuple(merge) for merge in json.loads(ours.to_str())["model"]["merges"]] == merges


def test_one_very_long_word_does_not_slow_training_down() -> None:
    # Without cutting this takes more than the timeout of the suite.
    digits = "".join(random.Random(0).choices("0123456789", k=900_000))
    tokenizer = Tokenizer.train([f"x = {digits}\n", "def f(): return 1\n" * 50], 600)
    assert tokenizer.decode(tokenizer.encode(digits[:1000])) == digits[:1000]


def test_encoding_and_decoding_are_linear_in_the_longest_word_and_in_invalid_bytes() -> None:
    tokenizer = Tokenizer.train(["abc 123 ==" * 50], 300)
    for content in (b"12" * 500_000, b"\xff" * 1_000_000, b"a\xff" * 300_000, b" " * 1_000_000):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(content)) == content


INTERRUPTED = """
import os, random
from nanochat_cli.data.tokenizer import Tokenizer

def texts():
    for _ in range(40):
        yield "".join(random.choices("abcdefghijklm    ", k=400_000))
    print("all is read", flush=True)

try:
    Tokenizer.train(texts(), 30_000)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    os._exit(0)  # as the command does
"""


def test_ctrl_c_works_while_the_tokenizer_is_trained() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "all is read\n"
    process.send_signal(signal.SIGINT)
    # Merging alone takes minutes here.
    out, err = process.communicate(timeout=20)
    assert (out, err, process.returncode) == ("interrupted\n", "", 0)


READ_FOR_EVER = """
import itertools
from nanochat_cli.data.training_words import interruptibly

def work(read):
    for number in read:
        if number == 1000:
            print("reads", flush=True)

try:
    interruptibly(work, itertools.count())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_an_interrupted_thread_gets_no_more_texts() -> None:
    process = subprocess.Popen([sys.executable, "-c", READ_FOR_EVER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "reads\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert (out, process.returncode) == ("interrupted\n", 0)
