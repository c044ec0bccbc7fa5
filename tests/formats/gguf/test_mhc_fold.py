"""Static hyper-connections: folded where that is exact, refused where not; and their sidecar file."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError
from nanochat_cli.export.verify import verify_gguf
from nanochat_cli.formats.gguf.mhc_fold import branch_coefficients, float_difference, fold
from nanochat_cli.formats.gguf.mhc_sidecar import write_sidecar
from nanochat_cli.formats.gguf.read import load_gguf
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.model.transformer import Transformer
from tests.architectures import build


def static(streams: int, parts: str = "attention+dense+untied", *, symmetric: bool = True) -> Transformer:
    """symmetric: every layer reads all streams alike and their weights sum to 1, so that only the mean matters."""
    model = build(f"mhc-{streams}+{parts}", mhc={"streams": streams, "dynamic": False})
    for _, mix in model.hyper_connections():
        if symmetric:
            mix.pre_bias.data.fill_(-float(np.log(streams - 1)))
        mix.post_bias.data += torch.randn(streams)
        mix.res_bias.data += torch.randn(len(mix.res_bias))
    return model


@pytest.mark.parametrize("parts", ["attention+dense+untied", "hybrid+moe+tied"])
@pytest.mark.parametrize("streams", [2, 4])
def test_a_fold_is_exact_where_it_is_claimed(streams, parts):
    model = static(streams, parts)
    folded = fold(model)
    assert folded.model is not None, folded.reason
    assert folded.residual <= 1e-6
    assert folded.difference <= 1e-5
    assert folded.model.config.mhc.streams == 1
    gains = [layer.gain for _, layer in folded.model.linears() if layer.gain != 1]
    assert len(gains) == 2 * model.config.n_layers
    assert float_difference(model, folded.model) <= 1e-5


@pytest.mark.parametrize("streams", [2, 4])
def test_streams_that_are_used_are_refused(streams):
    folded = fold(static(streams, symmetric=False))
    assert folded.model is None
    assert "really used" in folded.reason
    assert folded.residual > 1e-3


def test_a_sum_of_readings_other_than_one_is_refused_for_the_eps():
    model = static(2)
    for _, mix in model.hyper_connections():
        mix.pre_bias.data.fill_(-3.0)
    folded = fold(model)
    assert folded.model is None
    assert "eps" in folded.reason


def test_dynamic_mixing_is_refused():
    assert "depends on the token" in fold(build("mhc-2+attention+dense+tied")).reason


def test_coefficients_are_those_of_the_streams():
    """Sublayers that return one-hot vectors instead of activations leave their coefficients in the output."""
    mixes = [mix for _, mix in static(4, symmetric=False).hyper_connections()]
    coefficients, of_output = branch_coefficients(mixes)
    streams = torch.zeros(4, len(mixes) + 1, dtype=torch.float64)
    streams[:, 0] = 1
    for index, mix in enumerate(mixes):
        pre, post, _, res = (t.detach().double() for t in mix.coefficients(torch.zeros(1, 1, 4, 1)))
        assert torch.allclose((pre[:, None] * streams).sum(0), coefficients[index])
        one_hot = torch.eye(len(mixes) + 1, dtype=torch.float64)[index + 1]
        streams = torch.einsum("ij,jk->ik", res, streams) + post[:, None] * one_hot
    assert torch.allclose(streams.mean(0), of_output)
    assert of_output[0] == pytest.approx(1)


def test_a_folded_model_goes_through_a_file_of_arch_llama(tmp_path: Path):
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n"] * 20, 288)
    model = static(2)
    twin = fold(model).model
    assert twin is not None
    path = tmp_path / "model.gguf"
    report = export_gguf(twin, tokenizer, path, ExportConfig(head="f32"), {"run": "test"})
    assert report.arch == "llama"
    assert sum(name.endswith(".scale") for name in report.tensor_types) == 6
    verified = verify_gguf(path, twin, tokenizer)
    assert verified.n_gains == 6
    loaded, _ = load_gguf(path)
    assert float_difference(model, loaded) <= 2e-5


@pytest.mark.parametrize("streams", [2, 4])
def test_the_sidecar_holds_the_coefficients(tmp_path: Path, streams):
    model = static(streams, symmetric=False)
    path = tmp_path / "model.mhc"
    write_sidecar(model, path)
    mixes = [mix for _, mix in model.hyper_connections()]
    data = path.read_bytes()
    assert data[:16] == struct.pack("<4I", 0x6D484321, 2, streams, len(mixes))
    assert len(data) == 16 + len(mixes) * {2: 36, 4: 160}[streams]
    records = torch.frombuffer(bytearray(data[16:]), dtype=torch.float32).view(len(mixes), -1)
    for mix, record in zip(mixes, records, strict=True):
        mixing, rest = record[: -4 * streams], record[-4 * streams :].view(4, streams)
        weights = torch.stack((mixing[0].sigmoid(), 1 - mixing[0].sigmoid())) if streams == 2 else mixing.softmax(0)
        assert torch.allclose(weights, mix.res_bias.softmax(0), atol=1e-6)
        assert torch.equal(rest[0] + rest[1], mix.pre_bias)
        assert torch.equal(rest[2] + rest[3], mix.post_bias)


def test_dynamic_models_have_no_sidecar(tmp_path: Path):
    with pytest.raises(ConfigError, match="static"):
        write_sidecar(build("mhc-2+attention+dense+tied"), tmp_path / "model.mhc")
