"""Compile rate of held-out functions, in which trivial answers do not count; bits per byte by language."""

import pytest
import torch

from nanochat_cli.data.batches import evaluation_batches
from nanochat_cli.data.origin import language_of
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation.compile_rate import function_problems, python_functions, rust_functions
from nanochat_cli.evaluation.complete_problems import complete_problems, drawing
from nanochat_cli.evaluation.held_out import document_languages, encode_held_out, open_held_out
from nanochat_cli.evaluation.run_bits_per_byte import bits_per_byte_results, measure_bits_per_byte
from nanochat_cli.evaluation.sample_file import SampleFile
from nanochat_cli.evaluation.suite_report import results, scores
from nanochat_cli.evaluation.suites import SuiteOptions
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.sandbox.pool import SandboxPool
from nanochat_cli.sandbox.sandbox import Limits, Sandbox
from nanochat_cli.training.bits_per_byte import evaluate
from tests.data.corpora import make_config
from tests.evaluation.authors import Author, ByteTokenizer
from tests.evaluation.programs import needs_rustc

PYTHON = '''
import os

def area(width, height=2):
    """The area of a rectangle."""
    # in square units
    return width * height


@staticmethod
def scaled(
    values,
    by,
):
    return [value * by for value in values]

def one_line(x): return x + 1

def documented():
    """Nothing else."""

class Shape:
    def method(self):
        return self
'''
RUST = """
use crate::Shape;

/// Doubles a number.
#[inline]
pub(crate) fn double(x: i64) -> i64 {
    // not "}"
    x * 2
}

fn area(shape: &Shape) -> f64 {
    shape.width * shape.height
}

impl Shape {
    fn method(&self) -> f64 {
        self.width
    }
}
"""


@pytest.fixture(scope="module")
def pool():
    with SandboxPool(Sandbox(Limits(wall=5, cpu=4))) as pool:
        yield pool


def test_python_functions_at_the_margin_are_split_before_their_first_statement():
    first, second = python_functions(PYTHON)
    assert first == (
        'def area(width, height=2):\n    """The area of a rectangle."""\n    # in square units\n',
        "    return width * height\n",
    )
    assert second[0].startswith("@staticmethod\ndef scaled(\n")
    assert second[1] == "    return [value * by for value in values]\n"
    assert list(python_functions("print 'of another age'\n")) == []


def test_rust_functions_at_the_margin_are_split_at_their_brace():
    first, second = rust_functions(RUST)
    assert first == (
        "/// Doubles a number.\n#[inline]\npub(crate) fn double(x: i64) -> i64 {\n",
        '    // not "}"\n    x * 2\n}\n',
    )
    assert second[0] == "fn area(shape: &Shape) -> f64 {\n"


def rate(folder, problems, answers, pool):
    options = SuiteOptions(samples=1, temperatures=(0.0,), max_tokens=300)
    with SampleFile(folder, {}, resume=False) as file:
        draw = drawing(Author(answers), ByteTokenizer(), options)
        complete_problems(problems, draw, pool, options, file, QuietReporter(), "compile")
        found = scores(file.records, options.ks, options.temperatures)
    return {(one.case, one.metric): one.value for one in results("compile", found)}


@needs_rustc
def test_functions_that_compile_alone_are_prompts_and_their_own_text_scores_one(pool, tmp_path):
    documents = [("python", PYTHON), ("rust", RUST), ("md", "fn no() {\n}\n")]
    problems = function_problems(documents, 10, pool, QuietReporter())
    assert sorted(problem.prompt.splitlines()[0] for problem in problems) == [
        "/// Doubles a number.",
        "@staticmethod",
        "def area(width, height=2):",
    ]
    found = rate(tmp_path, problems, {one.prompt: one.solution or "" for one in problems}, pool)
    assert found["compile, temperature 0", "compile rate"] == 1
    assert found["compile, rust, temperature 0", "compile rate"] == 1
    assert len(function_problems(documents, 1, pool, QuietReporter())) == 2


@pytest.mark.parametrize("nothing", ["", "    pass\n", "    # later\n    return None\n", "    return width\n"])
def test_an_answer_without_work_compiles_and_does_not_count(nothing, pool, tmp_path):
    problems = function_problems([("python", PYTHON)], 10, pool, QuietReporter())
    found = rate(tmp_path, problems, {one.prompt: nothing for one in problems}, pool)
    assert found["compile, temperature 0", "compile rate"] == 0
    assert found["compile, temperature 0", "rejected"] == 1


def test_what_does_not_compile_does_not_count(pool, tmp_path):
    problems = function_problems([("python", PYTHON)], 10, pool, QuietReporter())
    found = rate(tmp_path, problems, {one.prompt: "    return (width *\n" for one in problems}, pool)
    assert found["compile, temperature 0", "compile rate"] == found["compile, temperature 0", "compiled"] == 0


def test_documents_without_functions_are_an_error(pool):
    with pytest.raises(DataError, match="nothing to complete"):
        function_problems([("other", PYTHON), ("rust", "struct X;\n")], 10, pool, QuietReporter())


@pytest.mark.parametrize(
    ("document", "language"),
    [
        ("a/b.py", "python"),
        ("lib.rs@1048576", "rust"),
        ("notes.TXT", "txt"),
        ("rows.jsonl:12", "other"),
        ("train:7", "other"),
        ("Makefile", "other"),
    ],
)
def test_the_language_of_a_document_follows_from_its_extension(document, language):
    assert language_of(document) == language


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A data set of Python and Rust files, and its configuration."""
    source = tmp_path_factory.mktemp("corpus")
    for number in range(24):
        (source / f"a{number}.py").write_text(f"def f{number}(x):\n    return x * {number} + {number * 7}\n" * 3)
        (source / f"b{number}.rs").write_text(f"pub fn f{number}(x: u64) -> u64 {{\n    x * {number}\n}}\n" * 2)
    out = tmp_path_factory.mktemp("data") / "both"
    config = make_config(
        data={"source": str(source), "val_fraction": 0.3},
        model={"vocab_size": 300, "dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 64},
        train={"seq_len": 16},
    )
    prepare_dataset(str(source), out, config, QuietReporter())
    return out, config, source


def test_bits_per_byte_of_languages_are_parts_of_that_of_the_whole(dataset):
    out, config, _ = dataset
    reader = ShardReader(out)
    torch.manual_seed(0)
    model = Transformer(config.model).eval()
    reporter = QuietReporter()
    measured = measure_bits_per_byte(model, reader.tokenizer, reader, config, reporter)
    whole, languages, sources = measured
    assert not sources
    assert set(languages) == {"python", "rust"}
    batches = evaluation_batches(reader.tokens("val"), config.eval.batch_size, 16)
    pairs = ((torch.from_numpy(inputs), torch.from_numpy(targets)) for inputs, targets in batches)
    assert whole == evaluate(model, pairs, torch.from_numpy(reader.tokenizer.byte_lengths()))
    assert sum(one.bytes for one in languages.values()) == whole.bytes
    assert sum(one.tokens for one in languages.values()) == whole.tokens
    bits = sum(one.bits_per_byte * one.bytes for one in languages.values())
    assert bits == pytest.approx(whole.bits_per_byte * whole.bytes)
    n_rust = sum(len(text) for text in reader.documents("val") if b"pub fn" in text)
    first = next(reader.tokens("val").documents())[0]  # the first token is not a target
    lost = int(reader.tokenizer.byte_lengths()[first])
    assert languages["rust"].bytes in (n_rust, n_rust - lost)
    named = {(one.case, one.metric): one.value for one in bits_per_byte_results(measured)}
    assert named["held-out documents, rust", "bits per byte"] == languages["rust"].bits_per_byte


def test_languages_are_those_of_the_held_out_documents_in_their_order(dataset):
    out, config, _ = dataset
    reader = ShardReader(out)
    languages = document_languages(reader, config, QuietReporter())
    expected = ["rust" if content.startswith(b"pub fn") else "python" for content in reader.documents("val")]
    assert languages == expected
    assert len(set(expected)) == 2


def test_another_tokenizer_encodes_the_same_text(dataset):
    out, _, _ = dataset
    reader = ShardReader(out)
    same = encode_held_out(reader, reader.tokenizer)
    assert same.ids.tolist() == reader.tokens("val")[:].tolist()
    other = Tokenizer.train(["fn x() {}"] * 3, 270)
    encoded = encode_held_out(reader, other)
    assert other.decode_bytes(encoded[: encoded.lengths[0] - 1].tolist()) == next(reader.documents("val"))
    assert sum(encoded.lengths) == len(encoded)


def test_with_a_changed_source_only_the_total_is_reported(dataset, capsys):
    out, config, source = dataset
    extra = source / "later.py"
    extra.write_text("x = 1\n")
    try:
        reader = ShardReader(out)
        model = Transformer(config.model).eval()
        whole, languages, _ = measure_bits_per_byte(model, reader.tokenizer, reader, config, QuietReporter())
    finally:
        extra.unlink()
    assert list(languages) == ["unknown"]
    assert languages["unknown"] == whole
    assert "no figures by language" in capsys.readouterr().err


def test_a_file_alone_does_not_tell_what_was_held_out(tmp_path):
    with pytest.raises(ConfigError, match="give a data set with --data"):
        open_held_out(tmp_path / "model.gguf", None, None, QuietReporter())
