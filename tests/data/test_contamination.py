"""Documents that give away built-in problems, against sets of tuples of words."""

import json
import re
import sysconfig
from pathlib import Path

import pytest

from nanochat_cli.data.contamination import ProblemRuns
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.word_runs import words_of
from nanochat_cli.evaluation.contamination_report import manifest_of, report_contamination
from nanochat_cli.evaluation.problems import BUILT_IN, load_problems
from nanochat_cli.report.reporter import PlainReporter, QuietReporter
from tests.data.corpora import make_config, write_folder

WORDS = re.compile(rb"[A-Za-z0-9_\x80-\xff]+")


def tens(content: bytes) -> set[tuple[bytes, ...]]:
    """Ten words in a row, at least five of which are not numbers."""
    words = WORDS.findall(content)
    runs = [tuple(words[start : start + 10]) for start in range(len(words) - 9)]
    return {run for run in runs if sum(not word[:1].isdigit() for word in run) >= 5}


def texts() -> dict[str, list[bytes]]:
    return {
        name: [(problem.prompt + (problem.solution or "")).encode() for problem in load_problems(name)]
        for name in BUILT_IN
    }


def test_a_document_is_contaminated_exactly_if_it_shares_ten_words_in_a_row() -> None:
    problems = texts()
    of_set = {name: set[tuple[bytes, ...]]().union(*map(tens, contents)) for name, contents in problems.items()}
    documents = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))]
    for contents in problems.values():
        documents += [b"header\n" + contents[3] + b"\nfooter", contents[5][: len(contents[5]) // 2], contents[7][20:]]
        documents += [re.sub(rb"\s+", b"\n\t ", contents[9]), contents[11].replace(b"a", b"b")]
    documents += [b"1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12", b"", b"one two"]
    runs = ProblemRuns()
    assert runs.names == sorted(of_set)
    found = [runs.shared_with(words_of(content)) for content in documents]
    assert found == [[name for name in runs.names if tens(content) & of_set[name]] for content in documents]
    assert sum(map(bool, found)) >= 6


@pytest.mark.parametrize("mode", ["off", "count", "remove"])
def test_documents_that_give_away_problems_are_counted_or_left_out(
    tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = write_folder(tmp_path / "corpus", 20)
    solved = b"# my answers\n" + b"\n".join(texts()["python"][:4])
    (tmp_path / "corpus" / "answers.py").write_bytes(solved)
    config = make_config(data={"contamination": mode})
    manifest = prepare_dataset(str(tmp_path / "corpus"), tmp_path / "data", config, PlainReporter())
    reader = ShardReader(tmp_path / "data")
    held = {*reader.documents("train"), *reader.documents("val")}
    assert held == {*documents, *([] if mode == "remove" else [solved])}
    said = capsys.readouterr().err
    if mode == "off":
        assert manifest.contamination is None
        assert "problems" not in said
        return
    assert manifest.contamination is not None
    assert manifest.contamination.documents == {"python": 1, "rust": 0}
    assert manifest.contamination.left_out == (mode == "remove")
    assert manifest.contamination.first == ["answers.py"]
    assert "answers.py" in said
    assert manifest.skipped.get("shares 10 words in a row with a problem", 0) == (mode == "remove")


def test_other_problems_leave_out_other_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "corpus", 12)
    fingerprints = []
    for number in range(2):
        folder = tmp_path / f"problems{number}"
        folder.mkdir()
        (folder / "mine.jsonl").write_text(json.dumps({"prompt": f"a problem of its own {number} " * 5}))
        monkeypatch.setattr("nanochat_cli.data.contamination.FOLDER", folder)
        for mode in ("count", "remove"):
            config = make_config(data={"contamination": mode})
            manifest = prepare_dataset(str(tmp_path / "corpus"), tmp_path / f"{mode}{number}", config, QuietReporter())
            fingerprints.append(manifest.fingerprint)
    counted, removed, counted_again, removed_again = fingerprints
    assert counted == counted_again
    assert len({counted, removed, removed_again}) == 3


def test_an_evaluation_says_how_many_documents_give_away_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "corpus", 12)
    (tmp_path / "corpus" / "answers.rs").write_bytes(b"\n".join(texts()["rust"][:3]))
    said = {}
    for mode in ("off", "count", "remove"):
        config = make_config(data={"contamination": mode})
        prepare_dataset(str(tmp_path / "corpus"), tmp_path / mode, config, QuietReporter())
        manifest = manifest_of(tmp_path / "model.gguf", None, tmp_path / mode)
        details = report_contamination(manifest, PlainReporter())
        said[mode] = capsys.readouterr().err
        assert manifest is not None
        expected = None if manifest.contamination is None else manifest.contamination.model_dump()
        assert details == {"contamination": expected}
    assert "0 (python), 1 (rust), in the data" in said["count"]
    assert "0 (python), 1 (rust), left out of the data" in said["remove"]
    assert "were not counted" in said["off"]
    assert manifest_of(tmp_path / "model.gguf", None, None) is None
    assert report_contamination(None, PlainReporter()) == {"contamination": None}
    assert "not known; name the data" in capsys.readouterr().err
