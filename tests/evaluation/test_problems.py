"""The built-in problems are solvable, their tests reject wrong answers, and bad files are refused by line."""

import gzip
import json
import re
from pathlib import Path

import pytest

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation.problem import Problem, assemble
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.sandbox.sandbox import Sandbox
from tests.evaluation.programs import compile_rust, files_with_errors, needs_rustc, run_python, run_rust

PYTHON = load_problems("python")
RUST = load_problems("rust")
PROBLEMS = [*PYTHON, *RUST]


def parameters(problem: Problem) -> list[tuple[str, str]]:
    """Names and types in the signature, which stands on one line."""
    signature = re.search(r"(?:def|fn) \w+(?:<'a>)?\((.*)\)", problem.prompt)
    assert signature is not None
    pieces = re.split(r", (?=\w+(?::|$|,))", signature[1]) if signature[1] else []
    return [(name, kind) for name, _, kind in (piece.partition(": ") for piece in pieces)]


def wrong_python(problem: Problem) -> list[str]:
    """Every constant that one of the tests expects, some others, and every argument as the answer."""
    constants = {test.expected for test in problem.tests} | {"None", "0", "1", "''", "[]", "True", "False"}
    answers = sorted(constants) + [name for name, _ in parameters(problem)]
    return [text for answer in answers if (text := f"    return {answer}\n") != problem.solution]


def wrong_rust(problem: Problem) -> list[str]:
    """Every constant that one of the tests expects, and every argument that has the type of the answer."""
    returned = re.search(r"\) -> (.*) \{\n$", problem.prompt)
    assert returned is not None
    answers = sorted({test.expected for test in problem.tests})
    copies = {("&str", "String"): ".to_string()", ("&[i32]", "Vec<i32>"): ".to_vec()"}
    for name, kind in parameters(problem):
        if kind == returned[1]:
            answers.append(name)
        elif (kind, returned[1]) in copies:
            answers.append(name + copies[kind, returned[1]])
    return [text for answer in answers if (text := f"    {answer}\n}}\n") != problem.solution]


def test_there_are_enough_problems_of_every_level():
    for problems in (PYTHON, RUST):
        assert len(problems) >= 40
        assert {problem.level for problem in problems} == {1, 2, 3, 4, 5}
        assert sum(problem.level == 1 for problem in problems) >= 10


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.id)
def test_a_problem_has_four_tests_and_no_test_twice(problem):
    assert problem.id.startswith(f"{problem.language}/")
    assert len({test.call for test in problem.tests}) == len(problem.tests) >= 4
    assert problem.solution.strip()
    assert len({test.expected for test in problem.tests}) >= 2


def test_every_python_solution_passes_all_its_tests():
    for problem, results in zip(PYTHON, run_python([assemble(p, p.solution or "") for p in PYTHON]), strict=True):
        assert results == [True] * len(problem.tests), problem.id


def test_wrong_python_completions_fail():
    planted = []
    for problem in PYTHON:
        nothing = ["", "\n", "    # TODO\n", "    pass\n", problem.prompt, f"\n\n{problem.prompt}"]
        planted += [(problem, completion) for completion in [*nothing, *wrong_python(problem)]]
    assert len(planted) > 15 * len(PYTHON)
    results = run_python([assemble(problem, completion) for problem, completion in planted])
    assert [(p.id, text) for (p, text), passed in zip(planted, results, strict=True) if all(passed)] == []


@needs_rustc
def test_every_rust_solution_passes_and_wrong_answers_fail(tmp_path):
    planted = [(problem, completion) for problem in RUST for completion in wrong_rust(problem)]
    assert len(planted) > 3 * len(RUST)
    known = [(problem, problem.solution or "") for problem in RUST]
    results = run_rust([assemble(problem, completion) for problem, completion in known + planted], tmp_path)
    for problem, passed in zip(RUST, results[: len(RUST)], strict=True):
        assert passed == [True] * len(problem.tests), problem.id
    wrong = zip(planted, results[len(RUST) :], strict=True)
    assert [(problem.id, text) for (problem, text), passed in wrong if all(passed)] == []


@needs_rustc
def test_empty_rust_completions_do_not_compile(tmp_path):
    names = []
    for number, (problem, completion) in enumerate((p, text) for p in RUST for text in ("", "    // TODO\n}\n")):
        names.append(f"p{number}.rs")
        (tmp_path / names[-1]).write_text(assemble(problem, completion).source)
    (tmp_path / "main.rs").write_text("".join(f"mod {name[:-3]};\n" for name in names) + "fn main() {}\n")
    assert files_with_errors(compile_rust(tmp_path / "main.rs").stderr) == set(names)


@needs_rustc
@pytest.mark.parametrize("level", [1, 2, 3, 4, 5])
def test_a_copied_rust_prompt_does_not_compile(tmp_path, level):
    problem = next(problem for problem in RUST if problem.level == level)
    (tmp_path / "main.rs").write_text(assemble(problem, problem.prompt).source + "\nfn main() {}\n")
    assert files_with_errors(compile_rust(tmp_path / "main.rs").stderr) == {"main.rs"}


def test_a_program_keeps_its_tests_beside_the_source():
    problem = next(problem for problem in PYTHON if problem.id == "python/add-two")
    program = assemble(problem, "    return a + b\n\n\nprint('more')\n")
    assert program.source.rstrip() == f"{problem.prompt}    return a + b"
    assert program.tests == problem.tests
    assert not any(test.call in program.source for test in program.tests)


# --- in the sandbox ---------------------------------------------------------------------------------------------------


def judged(problem: Problem, completion: str) -> tuple[int, int]:
    outcome = Sandbox().judge(assemble(problem, completion))
    return outcome.passed, outcome.total


def test_the_sandbox_judges_python_programs_as_they_are():
    problem = PYTHON[-1]
    assert judged(problem, problem.solution or "") == (len(problem.tests), len(problem.tests))
    assert judged(problem, "    return text\n")[0] < len(problem.tests)


@needs_rustc
def test_the_sandbox_judges_rust_programs_as_they_are():
    problem = RUST[-1]
    assert judged(problem, problem.solution or "") == (len(problem.tests), len(problem.tests))


@pytest.mark.slow
@pytest.mark.parametrize(
    "problem", [*PYTHON, *(pytest.param(p, marks=needs_rustc) for p in RUST)], ids=lambda problem: problem.id
)
def test_every_solution_passes_in_the_sandbox(problem):
    assert judged(problem, problem.solution or "") == (len(problem.tests), len(problem.tests))


# --- files ------------------------------------------------------------------------------------------------------------

RECORD = {
    "id": "mine/one",
    "language": "python",
    "prompt": "def one():\n",
    "tests": [{"call": "one()", "expected": "1"}],
}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_file_of_problems_is_read_plain_and_compressed(tmp_path):
    plain = write(tmp_path / "mine.jsonl", RECORD, "", {**RECORD, "id": "mine/two", "level": 5, "stop": ["\n\n"]})
    problems = load_problems(plain)
    assert [problem.id for problem in problems] == ["mine/one", "mine/two"]
    assert (problems[0].level, problems[0].solution, problems[1].level, problems[1].stop) == (None, None, 5, ("\n\n",))
    packed = tmp_path / "mine.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_problems(str(packed)) == problems


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", r"mine.jsonl:2: not JSON"),
        ("[1]", r"mine.jsonl:2: a problem must be an object with named fields, not list"),
        (RECORD, r"mine.jsonl:2: the id 'mine/one' is repeated"),
        ({**RECORD, "language": "lua"}, r"mine.jsonl:2: language: input should be 'python' or 'rust'"),
        ({**RECORD, "level": 6}, r"mine.jsonl:2: level: "),
        ({**RECORD, "tests": []}, r"mine.jsonl:2: tests: "),
        ({**RECORD, "tests": [{"call": "one()"}]}, r"mine.jsonl:2: tests.0.expected: field required"),
        ({**RECORD, "promt": "x"}, r"mine.jsonl:2: promt: extra inputs are not permitted"),
        ({"id": "x"}, r"mine.jsonl:2: language: field required"),
    ],
)
def test_a_bad_line_is_named_in_one_line(tmp_path, second, message):
    with pytest.raises(DataError, match=message) as caught:
        load_problems(write(tmp_path / "mine.jsonl", RECORD, second))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_problems(tmp_path / "absent.jsonl")
    with pytest.raises(DataError, match="it holds no problems"):
        load_problems(write(tmp_path / "empty.jsonl", ""))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl:1: not UTF-8"):
        load_problems(tmp_path / "latin.jsonl")
    for name in ("text.jsonl.gz", "text.parquet"):
        with pytest.raises(DataError, match=re.escape(name)):
            load_problems(write(tmp_path / name, RECORD))
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(RECORD).encode() * 50)[:60])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz: cannot read"):
        load_problems(cut)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="no problem set 'pyton'; choose from python, rust, humaneval, multipl-e"):
        load_problems("pyton")


def test_the_example_of_the_documentation_is_a_problem(tmp_path):
    page = Path(__file__).resolve().parents[2] / "docs" / "problems.md"
    example = re.search(r"```json\n(.*?)```", page.read_text(), re.DOTALL)
    assert example is not None
    (problem,) = load_problems(write(tmp_path / "example.jsonl", json.loads(example[1])))
    assert run_python([assemble(problem, problem.solution or "")]) == [[True, True]]
