"""Which folder a new run gets, and what `--checkpoint` means."""

from pathlib import Path

import pytest

from nanochat_cli.config.schema import RunConfig
from nanochat_cli.errors import NanochatError
from nanochat_cli.folders import held_folder
from nanochat_cli.formats.run.find import new_run, which_checkpoint


def test_an_unnamed_run_gets_the_first_number_after_all_existing_ones(tmp_path):
    for taken in ("quick-1", "quick-4", "quick-x", "quicker-9"):
        (tmp_path / taken).mkdir()
    config = RunConfig(dir=tmp_path)
    with new_run(config, "quick", "trains") as folder:
        assert (folder, config.name) == (tmp_path / "quick-5", "quick-5")
        assert folder.is_dir()
    assert not folder.exists(), "nothing came to be in it"


def test_a_number_that_another_process_takes_first_is_left_to_it(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def slower(path: Path, *arguments: object, **keywords: object) -> None:
        if path.name == "quick-1" and not path.exists():
            mkdir(path)
        mkdir(path, *arguments, **keywords)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Path, "mkdir", slower)
    with new_run(RunConfig(dir=tmp_path), "quick", "trains") as folder:
        assert folder.name == "quick-2"


def test_a_named_folder_that_is_held_is_not_taken(tmp_path):
    with held_folder(tmp_path / "mine", "trains"), pytest.raises(NanochatError, match="trains it; wait until"):
        new_run(RunConfig(dir=tmp_path, name="mine"), "quick", "trains").__enter__()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 20, 100):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").write_text("step-000100\n")
    return tmp_path


def test_a_checkpoint_is_named_by_pointer_or_step(run):
    assert which_checkpoint(run, None) == "latest"
    assert which_checkpoint(run, "latest") == "latest"
    assert which_checkpoint(run, "20") == 20
    (run / "checkpoints" / "best").write_text("step-000020\n")
    assert which_checkpoint(run, "best") == "best"


@pytest.mark.parametrize(("text", "code"), [("best", 3), ("15", 3), ("newest", 2), ("-1", 2), ("٣", 2), ("1" * 40, 2)])
def test_a_missing_checkpoint_is_an_error_that_lists_the_existing_ones(run, text, code):
    with pytest.raises(NanochatError, match=r"saved steps: 10, 20, 100") as caught:
        which_checkpoint(run, text)
    assert caught.value.exit_code == code


def test_a_file_has_no_checkpoints(tmp_path):
    with pytest.raises(NanochatError, match=r"--checkpoint best: .*model\.gguf holds one model"):
        which_checkpoint(tmp_path / "model.gguf", "best")
