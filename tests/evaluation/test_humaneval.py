"""Records in the formats that HumanEval, MultiPL-E and HumanEval-X publish become problems that their solutions pass.

The records are written for this test; only their form is that of the published ones.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.evaluation import humaneval
from nanochat_cli.evaluation.problem import Problem, assemble
from nanochat_cli.evaluation.problems import load_problems
from tests.evaluation.programs import needs_rustc, run_python, run_rust

HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": 'from typing import List\n\n\ndef gaps(xs: List[int]) -> List[int]:\n    """ Differences of neighbours\n'
    '    >>> gaps([1, 4])\n    [3]\n    """\n',
    "entry_point": "gaps",
    "canonical_solution": "    return [b - a for a, b in zip(xs, xs[1:])]\n",
    "test": "\n\nMETADATA = {\n    'author': 'x',\n}\n\n\ndef check(candidate):\n    assert candidate([1, 4]) == [3]\n"
    "    assert candidate([]) == []\n    assert candidate([5, 5, 2]) == [0, -3]\n",
}
MULTIPL_E = {
    "name": "HumanEval_901_gaps",
    "language": "rs",
    "prompt": "/// Differences of neighbours\n/// >>> gaps(vec![1, 4])\n/// vec![3]\n"
    "fn gaps(xs: Vec<isize>) -> Vec<isize> {\n",
    "doctests": "transform",
    "original": "/somewhere/HumanEval_901_gaps.py",
    "prompt_terminology": "reworded",
    "tests": "}\n\nfn main() {\n    let candidate = gaps;\n    assert_eq!(candidate(vec![1, 4]), vec![3]);\n"
    "    assert_eq!(candidate(Vec::<isize>::new()), Vec::<isize>::new());\n"
    "    assert_eq!(candidate(vec![5, 5, 2]), vec![0, -3]);\n}\n",
    "stop_tokens": ["\n}"],
}
X_RUST = {
    "task_id": "Rust/902",
    "prompt": "\n/*\n Differences of neighbours {\n*/\n",
    "declaration": "\nuse std::{slice::Iter, cmp::{max, self}, collections::{HashSet, HashMap}};\nuse rand::Rng;\n"
    "use regex::Regex;\nuse md5;\nuse std::any::{Any, TypeId};\n\nfn gaps(xs: Vec<i32>) -> Vec<i32>{\n",
    "canonical_solution": "\n    xs.windows(2).map(|w| w[1] - w[0]).collect()\n}\n",
    "test": "\n#[cfg(test)]\nmod tests {\n    use super::*;\n\n    #[test]\n    // why\n    fn test_gaps() {\n"
    "        assert_eq!(gaps(vec![1, 4]), vec![3]);\n        assert_eq!(gaps(vec![]), vec![]);\n    }\n\n"
    "    #[test]\n    fn test_more() {\n        assert_eq!(gaps(vec![5, 5, 2]), vec![0, -3]);\n    }\n\n}\n",
    "example_test": None,
}
X_PYTHON = {
    **{key: HUMANEVAL[key] for key in ("prompt", "canonical_solution")},
    "task_id": "Python/903",
    "declaration": "from typing import List\n\n\ndef gaps(xs: List[int]) -> List[int]:\n",
    "test": "\n\ndef check(gaps):\n    assert gaps([1, 4]) == [3]\n    assert gaps([]) == []\n\ncheck(gaps)\n",
    "text": "    Differences of neighbours",
    "example_test": "def check(gaps):\n    assert gaps([1, 4]) == [3]\ncheck(gaps)\n",
}
RUST_WRONG = "    Vec::new()\n}\n"


def load(folder: Path, *rows: dict[str, Any]) -> list[Problem]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems(path)


def test_python_formats_pass_with_their_solution_and_fail_without(tmp_path):
    problems = load(tmp_path, HUMANEVAL, X_PYTHON)
    assert [problem.id for problem in problems] == ["HumanEval/900", "humaneval-x/python/903"]
    more = "\n\ndef gaps(xs):\n    return 3\n"
    right = run_python([assemble(problem, (problem.solution or "") + more) for problem in problems])
    assert right == [[True], [True]]
    for wrong in ("", "    return []\n", "    return xs\n", "    return [3]\n", HUMANEVAL["prompt"]):
        assert run_python([assemble(problem, wrong) for problem in problems]) == [[False], [False]]


@needs_rustc
def test_rust_formats_pass_with_their_solution_and_fail_with_another(tmp_path):
    multipl_e, x = load(tmp_path, MULTIPL_E, X_RUST)
    assert (multipl_e.id, multipl_e.stop) == ("HumanEval_901_gaps", ("\n}",))
    assert (x.id, x.needs) == ("humaneval-x/rust/902", ())
    # What generation leaves when it stops at "\n}".
    stopped = "    let n = xs.len().max(1) - 1;\n    (0..n).map(|i| xs[i + 1] - xs[i]).collect()"
    programs = [
        assemble(multipl_e, stopped),
        assemble(multipl_e, f"{stopped}\n}}\n\nfn main() {{}}\n"),
        assemble(x, x.solution or ""),
        assemble(multipl_e, RUST_WRONG),
        assemble(x, RUST_WRONG),
    ]
    # HumanEval-X has one test for each of its functions.
    assert run_rust(programs, tmp_path) == [[True], [True], [True, True], [False], [False, False]]


def test_rust_problems_that_one_function_cannot_solve_say_so(tmp_path):
    solution, test = str(X_RUST["canonical_solution"]), str(X_RUST["test"])
    rows = [
        {**X_RUST, "canonical_solution": '\n    let digest = md5::compute("a");\n}\n'},
        {**X_RUST, "task_id": "Rust/1", "canonical_solution": '\n    let found = Regex::new("a");\n}\n'},
        {**X_RUST, "task_id": "Rust/2", "test": test.replace("// why", "// rand::random")},
        {**X_RUST, "task_id": "Rust/3", "canonical_solution": f"{solution}fn more() {{}}\n"},
        {**X_RUST, "task_id": "Rust/4", "canonical_solution": f"{solution}fn test_gaps() {{}}\nenum Unused {{}}\n"},
    ]
    problems = load(tmp_path, *rows)
    assert [problem.needs for problem in problems] == [
        ("the crate md5",),
        ("the crate regex",),
        ("the crate rand",),
        (),
        ("a second item, test_gaps",),
    ]
    assert "use md5;" in problems[0].prompt
    assert "use rand" not in problems[0].prompt
    with pytest.raises(ConfigError, match="humaneval-x/rust/902 needs the crate md5; leave it out"):
        assemble(problems[0], "}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**MULTIPL_E, "language": "lua"}, "the language 'lua' cannot be run"),
        ({**MULTIPL_E, "tests": "}\n"}, r"'tests' must define main\(\) once, not 0 times"),
        ({**X_PYTHON, "test": "def check(gaps):\n    pass\n"}, "the last line of 'test' must call check"),
        ({**X_RUST, "test": "fn main() {}"}, "'test' must be a module with unit tests"),
        ({**X_RUST, "task_id": "Go/1"}, "the language 'Go' cannot be run"),
        ({key: value for key, value in HUMANEVAL.items() if key != "test"}, "test: field required"),
        ({**HUMANEVAL, "prompt": 3}, "prompt: input should be a valid string"),
    ],
)
def test_a_record_that_does_not_fit_its_format_is_refused_by_line(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {message}"):
        load(tmp_path, HUMANEVAL, row)


# --- through the datasets library -------------------------------------------------------------------------------------


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders as on the hub, with one Parquet file per configuration; `datasets` keeps its copies in tmp_path."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "MultiPL-E"
    datasets.Dataset.from_list([MULTIPL_E]).to_parquet(folder / "humaneval-rs" / "test-00000-of-00001.parquet")
    configuration = "- config_name: humaneval-rs\n  data_files:\n  - split: test\n    path: humaneval-rs/test-*\n"
    configuration = "- config_name: humaneval-rs\n  data_files:\n  - split: test\n    path: humaneval-rs/test-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configuration}---\n")
    (tmp_path / "rust" / "data").mkdir(parents=True)
    (tmp_path / "rust" / "data" / "humaneval.jsonl").write_text(json.dumps(X_RUST) + "\n")
    multipl_e, x = humaneval.HUB["multipl-e"], humaneval.HUB["humaneval-x"]
    files = f"{tmp_path}/{{config}}/data/humaneval.jsonl"
    monkeypatch.setitem(humaneval.HUB, "multipl-e", multipl_e._replace(path=str(folder)))
    monkeypatch.setitem(humaneval.HUB, "humaneval-x", x._replace(files=files))
    return folder


def test_sets_are_loaded_by_name_through_datasets(tmp_path, offline_hub):
    local = load(tmp_path, MULTIPL_E, X_RUST)
    assert load_problems("multipl-e") == load_problems("multipl-e@humaneval-rs") == local[:1]
    assert load_problems("humaneval-x@rust") == local[1:]
    assert load_problems(offline_hub / "humaneval-rs" / "test-00000-of-00001.parquet") == local[:1]


def test_a_set_that_cannot_be_loaded_is_named(offline_hub):
    with pytest.raises(DataError, match="humaneval-x@python: cannot load: "):
        load_problems("humaneval-x@python")
    with pytest.raises(ConfigError, match="no configuration 'go'; choose from rust, python"):
        load_problems("humaneval-x@go")
