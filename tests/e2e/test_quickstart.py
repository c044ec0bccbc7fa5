"""`nanochat quickstart` on a tiny corpus and model: everything that it leaves behind and prints."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanochat_cli.cli.app import main
from nanochat_cli.config.load import load_run_config
from nanochat_cli.formats.run.checkpoints import latest_step
from tests.e2e.tiny import TINY, write_corpus

STEPS = 30


@dataclass(frozen=True)
class Outcome:
    """The run's folder, what `--json` wrote, and what the command printed."""

    run: Path
    result: dict[str, Any]
    out: str
    err: str


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("work")
    write_corpus(folder / "src", lines=40)  # long enough to be shown
    settings = [
        *("data.source=src", f"train.total_steps={STEPS}", "train.log_interval=5", "eval.interval=10"),
        *("model.dim=256", "telemetry.tensorboard=true", "telemetry.interval=10"),
    ]
    line = ["quickstart", *TINY, *(part for setting in settings for part in ("--set", setting))]
    said = tmp_path_factory.mktemp("said")
    with (
        pytest.MonkeyPatch.context() as patch,
        (said / "out").open("w+") as out,
        (said / "err").open("w+") as err,
    ):
        patch.chdir(folder)
        patch.setenv("NANOCHAT_CACHE", str(folder / "cache"))
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        code = main([*line, "--json", "result.json"])
        out.seek(0)
        err.seek(0)
        done = Outcome(folder / "runs" / "quickstart-1", {}, out.read(), err.read())
    assert code == 0, done.err
    return Outcome(done.run, json.loads((folder / "result.json").read_text()), done.out, done.err)


def test_the_corpus_is_tokenised_into_the_cache(outcome: Outcome) -> None:
    (dataset,) = (outcome.run.parents[1] / "cache" / "datasets").iterdir()
    assert (dataset / "manifest.json").is_file()
    assert (outcome.run / "tokenizer.json").read_bytes() == (dataset / "tokenizer.json").read_bytes()


def test_the_run_is_complete_and_can_be_repeated(outcome: Outcome) -> None:
    config = load_run_config(outcome.run)
    assert (config.run.name, config.train.total_steps, Path(config.data.source).name) == ("quickstart-1", STEPS, "src")
    assert latest_step(outcome.run) == STEPS
    assert json.loads((outcome.run / "environment.json").read_text())["versions"]["torch"]


def test_metrics_and_tensorboard_hold_the_same_curve(outcome: Outcome) -> None:
    metrics = [json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(outcome.run / "tensorboard")).Reload()
    assert {"loss/main", "eval/bits_per_byte", "training/lr", "ternary/flip_rate"} <= set(events.Tags()["scalars"])
    for name, steps in (("loss/main", range(5, STEPS + 1, 5)), ("eval/bits_per_byte", range(10, STEPS + 1, 10))):
        expected = {line["step"]: line[name] for line in metrics if name in line}
        assert list(expected) == list(steps)
        # TensorBoard stores float32.
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected, rel=1e-6)


def test_the_curve_is_a_picture_and_the_sample_a_continuation(outcome: Outcome) -> None:
    assert (outcome.run / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    (sample,) = (outcome.run / "samples").iterdir()
    assert sample.name == f"step-{STEPS:06d}.txt"
    text = sample.read_text()
    documents = [path.read_text() for path in (outcome.run.parents[1] / "src").rglob("*") if path.is_file()]
    assert outcome.result["samples"]
    for one in outcome.result["samples"]:
        assert any(one["prompt"] + one["truth"] in document for document in documents)
        assert one["prompt"] in text
        assert one["continuation"] in text


def test_results_and_report_agree_with_the_output(outcome: Outcome) -> None:
    results = json.loads((outcome.run / "results.json").read_text())
    assert results["results"]["bits_per_byte"] == outcome.result["held_out"]["bits_per_byte"]
    assert results["baselines"] == outcome.result["baselines"]
    assert results["export"]["bytes"] == (outcome.run / "model.gguf").stat().st_size
    assert results["verification"] == outcome.result["verify"]
    report = (outcome.run / "report.md").read_text()
    assert f"{results['results']['bits_per_byte']:.4f}" in report
    assert "gzip -9" in report
    assert "curve.png" in report
    assert "TQ2_0" in report.upper()


def test_bits_per_byte_is_shown_beside_the_compressors(outcome: Outcome) -> None:
    said = dict(re.findall(r"^held-out bits per byte, (.+?) {2,}([\d.]+)$", outcome.out, re.MULTILINE))
    expected = {"quickstart-1": outcome.result["held_out"]["bits_per_byte"], **outcome.result["baselines"]}
    assert {"gzip -9", "xz -9e"} <= expected.keys()
    assert said == {name: f"{value:.4g}" for name, value in expected.items()}


def test_the_gguf_file_is_tq2_0_and_verified_and_its_types_are_explained(outcome: Outcome) -> None:
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(outcome.run / "model.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "TQ2_0"
    assert re.search(r"^verified: \d+ tensors read back, [\d,]+ weights equal bit for bit$", outcome.err, re.MULTILINE)
    assert "llama.cpp: log-probabilities" in outcome.err
    table = outcome.out[outcome.out.index("where llama.cpp has kernels for these types") :].splitlines()
    assert table[1].split() == ["type", "bits/weight", "x86", "CPU", "ARM", "CPU", "CUDA", "Metal", "Vulkan"]
    assert [line.split()[0] for line in table[2:4]] == ["tq2_0", "f16"]


def test_it_ends_with_a_continuation_by_llama_cpp(outcome: Outcome) -> None:
    text, prompt = outcome.result["llama_cpp"], outcome.result["samples"][0]["prompt"]
    documents = [path.read_text() for path in (outcome.run.parents[1] / "src").rglob("*") if path.is_file()]
    assert prompt.strip()
    assert any(prompt in document for document in documents)
    assert text.startswith(prompt)
    assert len(text) > len(prompt)
    assert outcome.out.endswith(text + "\n")
    assert "llama.cpp continues the held-out document, greedily:" in outcome.err
