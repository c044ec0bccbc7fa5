"""The sections of `benchmarks/gpu.py` on the CPU, with small models and products: their checks can fail."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bitlinear_forms
from benchmarks.gpu_sections import ahead, decode, e3, exactness, forms, losses, products, roofline, training
from benchmarks.gpu_sections.task import NO_FP8, NO_NVFP4, Task
from nanochat_cli.bench.micro.kernels import Product
from nanochat_cli.bench.micro.kernels_cpu import CPU
from nanochat_cli.diagnose.validate.matmul_case import MatmulCase
from nanochat_cli.errors import ConfigError, ValidationFailure
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.report.result_file import Result

DEVICE = torch.device("cpu")
SHAPE = (128, 256)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task("training-125m", tmp_path / "section.json", DEVICE, time.monotonic() + 600, tmp_path, quick=True)


# --- exactness --------------------------------------------------------------------------------------------------------


def test_a_device_that_computes_what_the_cpu_does_passes_every_check():
    results = exactness.check_reference(DEVICE)
    assert len(results) == 5 + 3 * 5
    assert all(result.value == 1.0 for result in results)


def test_one_differing_code_fails_and_is_named(monkeypatch):
    unpack = exactness.unpack_plane128

    def wrong(packed: torch.Tensor, columns: int) -> torch.Tensor:
        codes = unpack(packed, columns)
        codes[-1, -1] = 1 - codes[-1, -1].abs()
        return codes

    monkeypatch.setattr(exactness, "unpack_plane128", wrong)
    with pytest.raises(ValidationFailure, match=r"unpack_plane128: 1 of 524288 values differ"):
        exactness.check_reference(DEVICE)


def test_the_two_forms_of_a_layer_are_equal_and_a_scale_that_is_off_is_found(monkeypatch):
    assert next(result.value for result in exactness.check_forms(DEVICE, [SHAPE])) == 1.0
    layer = exactness._layer

    def off(*arguments, **named):
        x, latent, weight, dy = layer(*arguments, **named)
        assert weight.scales is not None
        return x, latent, weight._replace(scales=weight.scales * (1 + 2e-7)), dy

    monkeypatch.setattr(exactness, "_layer", off)
    with pytest.raises(ValidationFailure, match=r"128 inputs.*int8 and float forward"):
        exactness.check_forms(DEVICE, [SHAPE])


def test_the_kernels_of_int8_gradients_equal_the_reference_and_one_differing_code_is_found(monkeypatch):
    assert len(exactness.check_gradient_kernels(DEVICE, [SHAPE])) == 4 + 2 * 2
    quantize = exactness.operations.quantize_gradient

    def off(*arguments, backend):
        rounded = quantize(*arguments, backend=backend)
        rounded.column_codes[-1, -1] += backend is None
        return rounded

    monkeypatch.setattr(exactness.operations, "quantize_gradient", off)
    with pytest.raises(ValidationFailure, match="column_codes: 1 of"):
        exactness.check_gradient_kernels(DEVICE, [SHAPE])


def test_int8_gradients_are_those_of_the_emulation_and_others_are_found(monkeypatch):
    results = exactness.check_int8_gradients(DEVICE, [SHAPE])
    assert all(1e-3 < result.value < exactness.INT8_STEP for result in results[2:])  # they round, but no more than said
    gradients = exactness.linear_gradients

    def off(*arguments, backward):
        dx, dws = gradients(*arguments, backward=backward)
        return dx, [1.0001 * dw for dw in dws]

    monkeypatch.setattr(exactness, "linear_gradients", off)
    with pytest.raises(ValidationFailure, match="dw to its emulation"):
        exactness.check_int8_gradients(DEVICE, [SHAPE])


def test_fp8_gradients_are_those_of_the_emulation_and_others_are_found(monkeypatch):
    results = exactness.check_fp8(DEVICE, [SHAPE])
    assert 1e-3 < results[1].value < exactness.HALF_STEP  # it rounds, but no more than fp8 does
    monkeypatch.setattr(exactness, "fp8_product", lambda dy, codes: 1.02 * dy @ codes)
    with pytest.raises(ValidationFailure, match="to its emulation"):
        exactness.check_fp8(DEVICE, [SHAPE])


def test_nvfp4_equals_its_reference_and_a_byte_or_a_product_that_is_off_is_found(monkeypatch):
    results = exactness.check_nvfp4(DEVICE, [SHAPE])
    assert len(results) == 2 * (2 * 2 + 1)
    quantize, matmul = exactness.nvfp4_quantize, exactness.nvfp4_matmul

    def other(x, **backend):
        packed, scale = quantize(x, **backend)
        return type(quantize(x))(packed if backend else packed ^ (packed > 200), scale)

    monkeypatch.setattr(exactness, "nvfp4_quantize", other)
    with pytest.raises(ValidationFailure, match=r"NVFP4: bytes of torch.float32"):
        exactness.check_nvfp4(DEVICE, [SHAPE])
    monkeypatch.setattr(exactness, "nvfp4_quantize", quantize)
    monkeypatch.setattr(exactness, "nvfp4_matmul", lambda *of, **to: matmul(*of, **to) * (1 if to else 1.0001))
    with pytest.raises(ValidationFailure, match="the product to the reference"):
        exactness.check_nvfp4(DEVICE, [SHAPE])


def test_nvfp4_is_left_out_with_the_reason_where_tensor_cores_lack_it(task, monkeypatch):
    for name in ("reference", "forms", "int8_gradients", "fp8", "others"):
        monkeypatch.setattr(exactness, f"check_{name}", lambda *_: [])
    monkeypatch.setattr(exactness, "check_model", lambda _: Result("a", "b", 1.0, "1"))
    monkeypatch.setattr(exactness, "check_products", lambda _: None)
    exactness.run(task)
    assert f"products in NVFP4: {NO_NVFP4}" in task.left_out
    assert not task.faults


def test_the_other_kernels_equal_their_references():
    results = exactness.check_others(DEVICE)
    assert len(results) == 1 + 4 + 3 * 3 + 2 * 4 + 2 * 2
    assert 1e-4 < results[-1].value < exactness.BF16_STEP  # it rounds, but no more than bfloat16 does


def test_a_gradient_of_the_loss_that_is_off_is_found(monkeypatch):
    gradient_of = exactness.cross_entropy_gradient

    def off(logits, targets, factor, **backend):
        loss, gradient = gradient_of(logits, targets, factor, **backend)
        return loss, gradient if backend else gradient * 1.001

    monkeypatch.setattr(exactness, "cross_entropy_gradient", off)
    with pytest.raises(ValidationFailure, match=r"100×20000.*the gradient"):
        exactness.check_others(DEVICE)


def test_cases_of_products_are_compared_and_a_difference_ends_the_check(task, monkeypatch):
    monkeypatch.setattr(exactness, "fewest_cases", lambda: [MatmulCase(17, 128, 1)])
    exactness.check_products(task)
    assert task.results[0].value > 10
    corner = exactness.compare([MatmulCase(17, 128, 1)], "cpu")
    corner.differences.append("17×128: one value")
    monkeypatch.setattr(exactness, "compare", lambda cases, name: corner)
    with pytest.raises(ValidationFailure, match="one value"):
        exactness.check_products(task)


# --- roofline ---------------------------------------------------------------------------------------------------------


def test_the_table_names_its_targets(monkeypatch):
    fast, wide = Product(128, 256, 1), Product(256, 256, 1)
    monkeypatch.setattr(products, "TARGETS", {fast: 0.0})
    monkeypatch.setattr(products, "BANDWIDTH_TARGET", (wide, 1e9))
    device = CPU()
    device.rotation_bytes = 1
    results, claims = products.measure_table(device, QuietReporter(), [fast, wide], rounds=1)
    assert {result.peer for result in results} == {None, "F.linear bf16", "F.linear fp32"}
    assert [(claim.id, claim.verdict) for claim in claims] == [
        ("gpu-128x256-m1", "supported"),
        ("gpu-bandwidth", "not supported"),
    ]


def test_kernels_that_move_memory_are_timed_without_their_launches_on_weights_that_take_turns(task, monkeypatch):
    prepared = []

    class Recorded(CPU):
        def prepare(self, calls):
            prepared.append([call() for call in calls])
            return lambda: 0.5

    monkeypatch.setattr(roofline, "CPU", Recorded)
    roofline.moving(task, 1e9, 8, 128, 256)
    assert not task.faults
    rates = {result.case: result.value for result in task.results}
    assert rates["ternarize 256×256"] == 5 * 256 * 256 / 0.5
    assert rates["quantize_activations 8×128"] == 3 * 8 * 128 / 0.5
    assert len(prepared) == len(rates) == 7
    assert len({outputs.packed.data_ptr() for outputs in prepared[5]}) == roofline.COPIES
    assert not torch.equal(prepared[4][0].codes, prepared[4][1].codes)


SWEEP = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from benchmarks.gpu_sections.products import sweep
from nanochat_cli.bench.micro.kernels import Product
from nanochat_cli.report.reporter import PlainReporter

class Interpreter:
    name, torch_device, backend, rotation_bytes = "interpreter", torch.device("cpu"), "triton", 1
    def prepare(self, calls):
        return lambda: calls[0]().sum().item() * 0 + 1e-3

for result in sweep(Interpreter(), PlainReporter(), SECONDS, [Product(8, 256, M) for M in (1, 16, 65)]):
    print("RESULT", result.case, "|", result.metric, "|", result.ratio)
"""


@pytest.mark.slow
def test_the_sweep_compares_configurations_and_stops_when_its_time_is_over():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SWEEP.replace("SECONDS", "6.0")], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    for tokens in (1, 16, 65):
        ours = [line for line in lines if f"M {tokens}," in line]
        assert " | committed | None" in ours[0]
        assert all(line.endswith("| 1.0") for line in ours[1:])
    assert "computes a wrong result" not in done.stderr
    assert "Configuration(" in done.stdout


# --- forms ------------------------------------------------------------------------------------------------------------


def test_every_form_of_a_layer_has_gradients_near_those_of_the_first(monkeypatch):
    """Without compiling, which takes seconds."""
    gradients: list[tuple[torch.Tensor, ...]] = []
    grad = torch.autograd.grad

    def keep(*arguments):
        gradients.append(grad(*arguments))
        return gradients[-1]

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.autograd, "grad", keep)
    names = bitlinear_forms.FORMS | bitlinear_forms.LOW_PRECISION | bitlinear_forms.ON_CPU
    for run in bitlinear_forms.contenders(*SHAPE, 64, DEVICE, names).values():
        assert run() > 0
    *forms_of_product, twin = gradients
    assert len(forms_of_product) == len(names)
    for found in forms_of_product:
        for expected, one in zip(forms_of_product[0], found, strict=True):
            assert (one - expected).norm() <= exactness.HALF_STEP * expected.norm()
    assert (twin[0] - forms_of_product[0][0]).norm() > exactness.HALF_STEP * twin[0].norm(), (
        "the twin has other weights"
    )


def test_the_table_gets_the_rows_of_a_result_and_keeps_those_of_other_devices(tmp_path, monkeypatch):
    table = tmp_path / "training_forms.json"
    table.write_bytes(bitlinear_forms.TABLE.read_bytes())
    before = json.loads(table.read_text())
    monkeypatch.setattr(bitlinear_forms, "TABLE", table)
    case = "cuda: 768 inputs, 2816 outputs, 32768 rows"
    results = [
        Result(case, "forward and backward, int8", 1.0, "s", "float twin", 0.9),
        Result(case, bitlinear_forms.COMPARED, 1.0, "s", "float form", 1.2345),
    ]
    bitlinear_forms.write_table(results, {"device": "a GPU"})
    after = json.loads(table.read_text())
    cpu = [row for row in before["shapes"] if row["device"] == "cpu"]
    assert after["shapes"] == [*cpu, {"device": "cuda", "in": 768, "out": 2816, "int8_speedup": 1.234}]
    assert after["environments"] == {**before["environments"], "cuda": {"device": "a GPU"}}


def test_a_shape_for_which_there_is_no_time_is_left_out_and_a_form_that_fails_leaves_the_others(task, monkeypatch):
    asked: list[list[str]] = []

    def measure(shape, rows, rounds, device, forms):
        asked.append(list(forms))
        if len(forms) > 2:
            raise RuntimeError("no fp8 here")
        task.until = time.monotonic() - 1
        return [Result(str(shape), "m", 1.0, "s")]

    monkeypatch.setattr(forms, "measure", measure)
    task.quick = False
    forms.run(task)
    assert asked == [["float", "int8", *bitlinear_forms.LOW_PRECISION], ["float", "int8"]]
    assert len(task.results) == 1
    assert len(task.left_out) == len(forms.SHAPES) - 1
    assert "no fp8 here" in task.faults[0]


def test_a_device_without_fp8_says_so_and_measures_the_rest(task, monkeypatch):
    monkeypatch.setattr(Task, "has_fp8", False)
    monkeypatch.setattr(forms, "measure", lambda *arguments: [Result(", ".join(arguments[-1]), "m", 1.0, "s")])
    forms.run(task)
    roofline.square(task, 32)
    assert task.results[0].case == "float, int8, int8, int8 gradients"
    assert not any("fp8" in result.metric for result in task.results)
    assert sum(why.endswith(NO_FP8) for why in task.left_out) == 1 + 4
    assert task.faults == []


# --- training ---------------------------------------------------------------------------------------------------------


def test_every_contender_is_timed_against_the_float_twin(task):
    training.run(task)
    rates = [result for result in task.results if result.metric == "training rate"]
    names = [result.case.split(", 64 tokens")[0] for result in rates]
    assert names == [name for name in training.CONTENDERS if "fp8" not in name]
    assert [result.peer for result in rates] == [None, *[training.TWIN] * (len(rates) - 1)]
    assert all(result.value > 0 for result in task.results)
    assert any("8.9" in why for why in task.left_out), "the CPU has no fp8, and says so"


def test_a_profile_adds_up_to_no_more_than_the_step(task):
    contender = training.Contender(training.configured("training-125m", "ternary", tiny=True), DEVICE)
    step, total, *kernels = training.profile(contender)
    assert total["seconds"] == pytest.approx(sum(row["seconds"] for row in kernels), rel=0.3)
    assert 0 < kernels[-1]["seconds"] <= kernels[0]["seconds"] < total["seconds"] <= step["seconds"]


def test_contenders_for_which_no_time_is_left_are_left_out(task):
    task.until = time.monotonic() + 1e-3
    training.run(task)
    assert {result.case.split(", 64")[0] for result in task.results if result.unit == "tokens/s"} == {training.TWIN}
    assert len(task.left_out) == len(training.CONTENDERS) - 1


@pytest.mark.parametrize("size", training.SIZES)
@pytest.mark.parametrize("name", training.CONTENDERS)
def test_every_contender_has_a_valid_configuration_of_the_size_that_is_said(size, name):
    config = training.configured(size, name)
    assert config.model.quant.enabled == (name != training.TWIN)
    if name == training.TWIN:
        with torch.device("meta"):
            model = Transformer(config.model)
        parameters = sum(p.numel() for p in model.parameters())
        low, high = {"training-125m": (119e6, 131e6), "training-1b": (0.95e9, 1.05e9)}[size]
        assert low < parameters < high


def test_the_two_forms_of_the_ternary_product_train_alike_and_learn():
    curves = {}
    for name in (training.TWIN, "ternary", "ternary, int8 forward"):
        config = training.configured("training-125m", name, tiny=True)
        curves[name] = losses.train_contender(config, DEVICE, losses.byte_batches(config, 20))
    torch.testing.assert_close(curves["ternary, int8 forward"], curves["ternary"], rtol=1e-4, atol=1e-4)
    assert all(sum(curve[-5:]) < sum(curve[:5]) for curve in curves.values())
    assert curves["ternary"] != curves[training.TWIN]


def test_the_bytes_are_the_same_every_time_and_repeat_when_they_run_out():
    config = training.configured("training-125m", training.TWIN, tiny=True)
    batches = losses.byte_batches(config, 3)
    assert torch.equal(batches, losses.byte_batches(config, 3))
    assert batches.shape == (3, 2, 17)
    assert batches.max() < 256


# --- e3 and decode ----------------------------------------------------------------------------------------------------


def test_the_suite_takes_the_carried_tokens_with_their_vocabulary(task):
    assert not any("data.path" in word for word in e3.command(task))
    (task.carried / "rust").mkdir()
    (task.carried / "rust" / "manifest.json").write_text(json.dumps({"tokenizer": {"vocab_size": 16384}}))
    line = e3.command(task)
    assert f"data.path={task.carried / 'rust'}" in line
    assert "model.vocab_size=16384" in line


def test_a_suite_that_is_too_slow_is_stopped(task, monkeypatch):
    monkeypatch.setattr(e3, "SAVES_WITHIN", 5.0)
    task.until = time.monotonic() + 1
    assert e3.suite_until(task, [sys.executable, "-c", "import time; time.sleep(600)"]) == 0
    assert e3.suite_until(task, [sys.executable, "-c", "raise SystemExit(3)"]) == 3


@pytest.mark.parametrize(("finished", "faults"), [(0, 1), (2, 0)])
def test_a_suite_that_fails_is_a_failure_unless_runs_have_finished(task, monkeypatch, finished, faults):
    monkeypatch.setattr(e3, "FOLDER", task.carried / "suite")

    def fail(*_: object) -> int:
        e3.FOLDER.mkdir()
        (e3.FOLDER / e3.PLAN_FILE).touch()
        return 3

    monkeypatch.setattr(e3, "suite_until", fail)
    monkeypatch.setattr(e3, "record", lambda _: finished)
    e3.run(task)
    assert len(task.faults) == faults
    assert all("exit code 3" in line for line in [*task.faults, *task.left_out])


def test_a_packed_model_is_decoded_beside_its_float_twin(task):
    config = training.configured("training-125m", "ternary", tiny=True)
    decode.decode(task, "tiny", config.model)
    assert [result.peer for result in task.results] == [None, "float twin, float32"]
    assert task.left_out == ["packed, CUDA graph: only on CUDA"]


def test_generating_reads_the_prompt_and_then_every_token_once(task):
    read: list[list[int]] = []

    def next_logits(tokens: torch.Tensor, cache: object) -> torch.Tensor:
        read.append(tokens[0].tolist())
        return torch.nn.functional.one_hot(tokens[:, -1] + 1, 10).float()

    class Cache:
        def clear(self) -> None:
            read.clear()

    tokens, seconds = decode.generate(task, next_logits, Cache(), torch.tensor([[1, 2]]), 3)  # pyright: ignore[reportArgumentType]
    assert tokens.tolist() == [3, 4, 5]
    assert read == [[1, 2], [3], [4], [5]]
    assert seconds > 0


def test_what_a_device_lacks_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"8\.9"):
        training.Contender(training.configured("training-125m", "ternary, int8 forward, fp8 dX", tiny=True), DEVICE)


# --- compiling ahead --------------------------------------------------------------------------------------------------


def test_models_are_compiled_ahead_and_one_that_fails_is_left_to_its_section(monkeypatch, capsys):
    monkeypatch.setattr(ahead, "CONTENDERS", dict(list(training.CONTENDERS.items())[:2]))
    assert ahead.compile_models("training-125m", DEVICE, tiny=True) == list(training.CONTENDERS)[:2]
    monkeypatch.setattr(ahead, "Contender", _out_of_memory)
    assert ahead.compile_models("training-125m", DEVICE, tiny=True) == []
    assert "not compiled ahead: OutOfMemoryError: full" in capsys.readouterr().out


def _out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("full")
