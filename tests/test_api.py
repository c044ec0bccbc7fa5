"""The library as a program sees it: `nanochat_cli.load` and the Model that it returns."""

import dataclasses
import inspect
import io
import json
import math
import operator
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch

import nanochat_cli as nanochat
from benchmarks.update_figures import ROOT
from nanochat_cli.api import Sampling
from nanochat_cli.cli.app import main
from nanochat_cli.engine import Engine
from nanochat_cli.inference.sampling import SamplingConfig
from tests.docs.markdown import blocks, read
from tests.evaluation.saved_runs import save_run

TEXT = 'def f(x):\n    """Größe: \u20ac"""\n    return [x, x + 1, "<|endoftext|>"]\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("work") / "runs" / "quickstart-1"
    save_run(run)
    return run


@pytest.fixture(scope="module")
def model(run: Path) -> nanochat.Model:
    return nanochat.load(run)


def test_importing_the_package_imports_no_torch_and_names_what_it_offers():
    code = (
        "import sys, nanochat_cli as nanochat; assert {'load', 'Run'} <= set(dir(nanochat)); "
        "print(*sorted({'torch', 'numpy', 'pydantic', 'typer'} & set(sys.modules)))"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.split() == []
    assert all(hasattr(nanochat, name) for name in nanochat.__all__)
    with pytest.raises(AttributeError, match=r"nanochat_cli.* has no attribute 'laod'"):
        nanochat.laod  # noqa: B018


@pytest.mark.parametrize(("page", "n_blocks"), [("docs/python.md", 6), ("README.md", 1)])
def test_the_examples_of_a_page_run_unchanged(run, monkeypatch, capfd, page, n_blocks):
    monkeypatch.chdir(run.parents[1])
    names: dict[str, object] = {}
    code = [block.content for block in blocks(read(ROOT / page)) if block.language == "python"]
    assert len(code) == n_blocks
    for lines in code:
        exec(compile(lines, page, "exec"), names)
    assert "bits per byte" in capfd.readouterr().out


def test_the_page_names_every_setting():
    page = read(ROOT / "docs/python.md")
    assert all(f"`{name}`" in page for name in (*Sampling.__annotations__, "bits_per_byte", "perplexity", "accuracy"))


FROZEN = {
    "train": "preset=(), *, config=None, overrides=None, name=None, resume=None, quiet=False",
    "load": "target=None, *, checkpoint='latest', backend=None",
    "evaluate": "target=None, suite=None, *, checkpoint='latest', out=None, data=None, backend=None, quiet=False, "
    "**drawing",
    "Run": "path",
    "Run.export": "form='gguf', out=None, *, checkpoint='latest', overrides=None, quiet=False",
    "Model.generate": "prompt='', **sampling",
    "Model.stream": "prompt='', **sampling",
    "Model.infill": "prefix, suffix, **sampling",
    "Model.chat": "messages, **sampling",
    "Model.score": "text",
}
"""What programs may rely on. A parameter may be added, with a default; nothing is renamed, reordered or removed."""


@pytest.mark.parametrize("name", FROZEN)
def test_what_programs_call_stays(name):
    found = operator.attrgetter(name)(nanochat)
    named = [one for one in inspect.signature(found).parameters.values() if one.name != "self"]
    plain = inspect.Signature([one.replace(annotation=inspect.Parameter.empty) for one in named])
    assert str(plain) == f"({FROZEN[name]})"


def test_the_names_of_the_package_stay():
    errors = {"NanochatError", "ConfigError", "DataError"}
    assert set(nanochat.__all__) == {"train", "load", "evaluate", "Run", "Model", "__version__"} | errors


def test_the_settings_are_those_of_sampling():
    hints = get_type_hints(SamplingConfig)
    assert get_type_hints(Sampling) == {field.name: hints[field.name] for field in dataclasses.fields(SamplingConfig)}


@pytest.mark.parametrize("target", ["quickstart-1", None, "runs/quickstart-1"])
def test_a_run_is_found_as_the_commands_find_it(run, monkeypatch, target):
    monkeypatch.chdir(run.parents[1])
    assert nanochat.load(target).path.resolve() == run


def test_it_writes_what_the_command_writes(run, model, capfd):
    line = ["generate", str(run), "-p", "def ", "--max-tokens", "24", "--seed", "3", "--top-k", "9", "--quiet"]
    assert main(line) == 0
    settings = {"max_tokens": 24, "seed": 3, "top_k": 9}
    assert capfd.readouterr().out == "def " + model.generate("def ", **settings) + "\n"
    pieces = list(model.stream("def ", **settings))
    assert len(pieces) > 1
    assert "".join(pieces) == model.generate("def ", **settings)


def test_it_answers_what_the_command_answers(run, monkeypatch, tmp_path):
    template = tmp_path / "chat_template.jinja"
    template.write_text(
        "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(nanochat.ConfigError, match="no chat template"):
        nanochat.load(run).chat([{"role": "user", "content": "x"}])
    talks = tmp_path / "talks"
    shutil.copytree(run, talks)
    shutil.copy(template, talks)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    line = ["chat", str(talks), "--max-tokens", "12", "--seed", "4", "--top-p", "1", "--quiet"]
    assert main([*line, "--json", str(tmp_path / "said.json")]) == 0
    asked, answered = json.loads((tmp_path / "said.json").read_text())["messages"]
    assert nanochat.load(talks).chat([asked], max_tokens=12, seed=4) == answered["content"]


def test_a_file_continues_as_its_run_does(run, tmp_path):
    file = tmp_path / "model.gguf"
    assert main(["export", str(run), "--gguf", "--out", str(file), "--head", "f32", "--no-verify", "--quiet"]) == 0
    exported = nanochat.load(file)
    assert exported.config is None
    settings = {"max_tokens": 16, "temperature": 0.0}
    assert exported.generate("def ", **settings) == nanochat.load(run).generate("def ", **settings)


def bits_of(model: nanochat.Model, text: str, window: int) -> tuple[float, int]:
    """Bits of a document in windows of tokens, with a separate pass over its prefix for each token."""
    ids = [model.tokenizer.eos_id, *model.tokenizer.encode(text)]
    bits = 0.0
    for place in range(1, len(ids)):
        first = (place - 1) // window * window
        with torch.no_grad():
            hidden = model.network(torch.tensor([ids[first:place]]))
            logits = model.network.logits(hidden[:, -1]).double()
        bits -= float(logits.log_softmax(-1)[0, ids[place]]) / math.log(2)
    return bits, len(ids) - 1


@pytest.mark.parametrize("repeats", [1, 4])
def test_a_score_is_the_bits_of_every_token_over_the_bytes_of_the_text(model, repeats):
    text = TEXT * repeats
    found = model.score(text)
    assert model.config is not None
    bits, n_tokens = bits_of(model, text, model.config.train.seq_len)
    assert (found.tokens, found.bytes) == (n_tokens, len(text.encode()))
    assert found.bits_per_byte == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert found.loss == pytest.approx(bits * math.log(2) / n_tokens, rel=1e-5)


def test_the_answer_excludes_the_prompt_and_ends_before_a_stop_string(model):
    whole = model.generate("def ", max_tokens=32, seed=5)
    stop = whole[3:5]
    assert model.generate("def ", max_tokens=32, seed=5, stop=(stop,)) == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda run: nanochat.load(run.parent), nanochat.DataError, "not a run of nanochat train"),
        (lambda run: nanochat.load(run / "nothing"), nanochat.DataError, "no such run"),
        (lambda run: nanochat.load("nothing.gguf"), nanochat.DataError, "no such file"),
        (lambda run: nanochat.Run(run.parent), nanochat.DataError, "not a run of nanochat train"),
        (lambda run: nanochat.Run(run).export("onnx"), nanochat.ConfigError, 'must be "gguf" or "hf"'),
        (lambda run: nanochat.Run(run).export(overrides={"export.tpye": "f16"}), nanochat.ConfigError, "export.type"),
        (lambda run: nanochat.evaluate(run, "bpb", sample=1), nanochat.ConfigError, "sample: not a setting"),
        (lambda run: nanochat.train("quikstart"), nanochat.ConfigError, "quickstart"),
        (lambda run: nanochat.train("quickstart", resume=run), nanochat.ConfigError, "leave out preset"),
        (lambda run: nanochat.load(run, checkpoint=7), nanochat.DataError, "7"),
        (lambda run: nanochat.load(run, backend="gpu"), ValueError, "backend = gpu does not exist"),
        (lambda run: nanochat.load(run).score(""), nanochat.DataError, "nothing to score"),
        (lambda run: nanochat.load(run).generate("x", temperature=-1), nanochat.ConfigError, "temperature = -1"),
        (lambda run: nanochat.load(run).generate("x " * 99), nanochat.DataError, "shorten the prompt"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(run, call, error, words):
    with pytest.raises(error, match=words) as failure:
        call(run)
    assert "\n" not in str(failure.value)


def test_a_checkpoint_can_only_be_chosen_for_a_run(tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(nanochat.DataError, match="only a run has checkpoint = best"):
        nanochat.load(file, checkpoint="best")


def test_train_asks_for_the_run_that_the_command_asks_for(monkeypatch, run):
    asked: list[tuple] = []

    def train(_: Engine, config: object, resume: Path | None, stem: str = "run", **__: object) -> Path:
        asked.append((config, resume, stem))
        return run

    monkeypatch.setattr(Engine, "train", train)
    changes = {"train.total_steps": 3, "train.time_budget": None, "optim.matrix": "adamw"}
    line = ["--set", "train.total_steps=3", "--set", "train.time_budget=none", "--set", "optim.matrix=adamw", "--quiet"]
    for presets in (["nano-125m", "cpu"], ["cpu"], []):
        assert nanochat.train(presets, overrides=changes, name="mine", quiet=True).path == run
        assert main(["train", *(word for one in presets for word in ("--preset", one)), "--name", "mine", *line]) == 0
        assert asked[-2] == asked[-1]
    assert nanochat.train(resume=run, overrides={"train.total_steps": 9}, quiet=True).path == run
    assert main(["train", "--resume", str(run), "--set", "train.total_steps=9", "--quiet"]) == 0
    assert asked[-2] == asked[-1]
    assert asked[-1][0].train.total_steps == 9
