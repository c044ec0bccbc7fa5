"""The file as a whole: its metadata, what is refused, how it is written to disk, and damaged files."""

import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from nanochat_cli.config.schema import ExportConfig, ModelConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError, ValidationFailure
from nanochat_cli.export.verify import verify_gguf
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.gguf.read import load_gguf
from nanochat_cli.formats.gguf.tensor_types import SUPPORT, support_table
from nanochat_cli.formats.gguf.write import ExportReport, export_gguf
from nanochat_cli.model.attention import Attention
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.transformer import Transformer
from tests.inference.tiny_models import spread_model, tiny_config

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([textwrap.__doc__ * 20], VOCAB_SIZE) if textwrap.__doc__ else Tokenizer.train(["ab"], 300)


@pytest.fixture
def model() -> Transformer:
    return small()


def small(**config: Any) -> Transformer:
    return spread_model(tiny_config(**{"vocab_size": VOCAB_SIZE, "n_layers": 1, **config}))


def export(model: Transformer, tokenizer: Tokenizer, path: Path, type_name: Any = "auto", **more: Any) -> ExportReport:
    return export_gguf(model, tokenizer, path, ExportConfig(type=type_name, **more), {})


def test_the_file_says_what_it_is_and_where_it_comes_from(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    provenance = {"version": "0.1.0", "git": None, "run": "nano-1", "step": 500, "config": '[run]\nname = "nano-1"\n'}
    export_gguf(model, tokenizer, tmp_path / "m.gguf", ExportConfig(), provenance)
    fields = GGUFFile(tmp_path / "m.gguf").fields
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == fields["nanochat.run"] == "nano-1"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_TQ2_0
    assert fields["nanochat.config"] == provenance["config"]
    assert (fields["nanochat.version"], fields["nanochat.step"]) == ("0.1.0", 500)
    assert (fields["nanochat.quant.enabled"], fields["nanochat.quant.scale"]) == (True, "row")
    assert "nanochat.git" not in fields


def test_there_is_one_tensor_per_parameter_and_no_other(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    report = export(model, tokenizer, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert [tensor.name for tensor in reader.tensors] == list(report.tensor_types)
    assert len(reader.tensors) == len(model.state_dict())
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    assert kinds == report.tensor_types
    assert all(kinds[tensor.name] == "f32" for tensor in reader.tensors if "norm" in tensor.name)


def test_bits_per_weight_are_counted_from_the_bytes(tmp_path: Path, tokenizer: Tokenizer, model: Transformer) -> None:
    for name in ("tq2_0", "tq1_0", "q2_0", "q4_0", "f16", "f32"):
        report = export(model, tokenizer, tmp_path / "m.gguf", name)
        assert report.bits_per_weight == SUPPORT[name].bits_per_weight
        assert report.fallbacks == []


def test_auto_falls_back_per_tensor_and_says_why(tmp_path: Path, tokenizer: Tokenizer) -> None:
    report = export(small(ffn_dim=320), tokenizer, tmp_path / "m.gguf")
    assert report.linear_types["blocks.0.feed_forward.w_up"] == "tq2_0"
    assert report.linear_types["blocks.0.feed_forward.w_down"] == "q2_0"
    assert report.fallbacks == ["q2_0 instead of tq2_0: 320 columns are not a multiple of 256 (also exact: q4_0, f16)"]
    by_scale = export(small(quant={"scale": 128}), tokenizer, tmp_path / "m.gguf")
    assert set(by_scale.linear_types.values()) == {"q2_0"}
    assert by_scale.fallbacks[0].startswith("q2_0 instead of tq2_0: one scale per 128 is finer than its block of 256")
    odd = export(small(dim=100, n_heads=2, ffn_dim=96), tokenizer, tmp_path / "m.gguf")
    assert set(odd.linear_types.values()) == {"f16", "q4_0"}
    assert "f16 instead of tq2_0: 100 columns are not a multiple of 256" in odd.fallbacks, "nothing else is exact"


@pytest.mark.parametrize(
    ("config", "type_name", "message"),
    [
        ({"quant": {"scale": 128}}, "tq2_0", r"one scale per 128\) does not fit tq2_0.*one of q2_0, q4_0, f16"),
        ({"quant": {"scale": 64}}, "tq1_0", r"does not fit tq1_0.*one of q2_0, q4_0, f16"),
        ({"ffn_dim": 320}, "tq2_0", r"blk\.0\.ffn_down\.weight \(320 columns.*one of q2_0, q4_0, f16"),
        ({"dim": 96, "n_heads": 2, "ffn_dim": 96}, "q2_0", r"does not fit q2_0.*one of q4_0, f16"),
        ({"quant": {"enabled": False}}, "tq2_0", r"quant.enabled = false: use f16 or f32"),
        ({"sub_norm": True}, "auto", r"tie_embeddings = true"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_one_line_that_names_what_would(
    tmp_path: Path, tokenizer: Tokenizer, config: dict[str, Any], type_name: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        export(small(**config), tokenizer, tmp_path / "m.gguf", type_name)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("value", "message"), [(1e5, "largest F16"), (float("nan"), "not finite")])
def test_values_that_f16_cannot_hold_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer, value: float, message: str
) -> None:
    with torch.no_grad():
        model.embedding.weight[3, 3] = value
    with pytest.raises(ConfigError, match=rf"token_embd\.weight.*{message}"):
        export(model, tokenizer, tmp_path / "m.gguf")


def test_type_f32_makes_embeddings_and_head_f32_too(tmp_path: Path, tokenizer: Tokenizer, model: Transformer) -> None:
    assert set(export(model, tokenizer, tmp_path / "m.gguf", "f32").tensor_types.values()) == {"f32"}


def test_the_table_of_where_a_type_runs_has_a_row_per_type() -> None:
    columns, rows = support_table(["q2_0", "tq2_0"])
    assert [row[0] for row in rows] == ["tq2_0", "q2_0"]
    assert all(len(row) == len(columns) for row in rows)


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_an_export_replaces_the_old_file_and_leaves_nothing_beside_it(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    path = tmp_path / "deep" / "m.gguf"
    path.parent.mkdir()
    path.write_text("old")
    export(model, tokenizer, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["m.gguf"]
    assert GGUFFile(path).tensors


def test_a_place_that_cannot_be_written_is_one_clear_line(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*m\.gguf: .*choose another --out") as error:
        export(model, tokenizer, tmp_path / "file" / "m.gguf")
    assert "\n" not in str(error.value)


FULL_DISK = """
import sys
from pathlib import Path
from nanochat_cli.errors import DataError
from nanochat_cli.data.tokenizer import Tokenizer
from tests.formats.gguf.test_write import export, small, VOCAB_SIZE
try:
    export(small(), Tokenizer.train(["some text, some text"], VOCAB_SIZE), Path(sys.argv[1]))
except DataError as error:
    print(error)
"""


def test_a_disk_that_fills_up_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"cannot write {path}: ")
    assert len(done.stdout.splitlines()) == 1
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("m.gguf", "old")]


# --- files that are not right -----------------------------------------------------------------------------------------


def test_verification_finds_any_changed_byte_of_any_tensor(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(0)
    for name in ("tq2_0", "tq1_0", "q2_0", "q4_0"):
        export(model, tokenizer, path, name)
        verify_gguf(path, model, tokenizer, ask_llama_cpp=False)
        for tensor in gguf.GGUFReader(path).tensors:
            data = bytearray(path.read_bytes())
            at = int(tensor.data_offset) + int(rng.integers(tensor.n_bytes))
            data[at] ^= 0b0100_0101
            broken = tmp_path / "broken.gguf"
            broken.write_bytes(data)
            with pytest.raises(ValidationFailure, match=f"tensor {tensor.name} differs from the model") as failure:
                verify_gguf(broken, model, tokenizer, ask_llama_cpp=False)
            assert "\n" not in str(failure.value)


def test_verification_finds_another_model_and_another_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    path = tmp_path / "m.gguf"
    export(model, tokenizer, path)
    with pytest.raises(ValidationFailure, match=r"rope\.freq_base is 10000"):
        verify_gguf(path, small(rope_theta=20000.0), tokenizer, ask_llama_cpp=False)
    with pytest.raises(ValidationFailure, match="is in only one of"):
        verify_gguf(path, small(n_layers=2), tokenizer, ask_llama_cpp=False)
    with pytest.raises(ValidationFailure, match="vocabulary differs"):
        verify_gguf(path, model, Tokenizer.train(["zyx zyx wvu wvu"], 270), ask_llama_cpp=False)


def test_a_file_cut_anywhere_is_one_clear_line(tmp_path: Path, tokenizer: Tokenizer, model: Transformer) -> None:
    path = tmp_path / "m.gguf"
    export(model, tokenizer, path)
    whole = path.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 7, 8, 20, 24, 100, 2000, 5000, 9000, 50_000, len(whole) // 2, len(whole) - 5000]:
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.gguf") as error:
            load_gguf(cut)
        assert "\n" not in str(error.value), length


@pytest.mark.parametrize("content", [b"", b"GGUF", b"{}", b"\x00" * 100, b"PK\x03\x04" * 40, b"GUGF" + b"\x03" * 60])
def test_what_is_not_a_gguf_file_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.gguf is (not a GGUF file|damaged)"):
        load_gguf(path)


def test_a_path_that_is_missing_or_a_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.gguf: No such file"):
        load_gguf(tmp_path / "none.gguf")
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        load_gguf(tmp_path)


def test_type_42_with_blocks_of_128_is_recognised_by_its_size(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    path = tmp_path / "m.gguf"
    export(model, tokenizer, path, "q2_0")
    data = bytearray(path.read_bytes())
    last = max(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.data_offset)
    path.write_bytes(data[: len(data) - int(last.n_bytes)] + data[-int(last.n_bytes) :] * 2)
    with pytest.raises(DataError, match=rf"tensor {last.name} has \d+ bytes where its type needs {last.n_bytes}"):
        load_gguf(path)


def foreign(path: Path, arch: str, tensors: dict[str, np.ndarray], fields: dict[str, Any]) -> None:
    """A file by another program, written with gguf alone."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in fields.items():
        kind = gguf.GGUFValueType.ARRAY if isinstance(value, list) else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    for name, data in tensors.items():
        writer.add_tensor(name, data, raw_dtype=None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arch, tensors: ("mamba", tensors), "architecture 'mamba' is not one"),
        (
            lambda arch, tensors: (arch, {**tensors, "blk.0.extra.weight": np.ones(4, np.float32)}),
            "extra.weight is not part",
        ),
        (
            lambda arch, tensors: (arch, {k: v for k, v in tensors.items() if "ffn_up" not in k}),
            "ffn_up.weight is missing",
        ),
        (lambda arch, tensors: (arch, {**tensors, "output_norm.weight": np.ones(8, np.float32)}), "has shape"),
        (lambda arch, tensors: (arch, {"a": np.ones(1, np.float32)}), "no tensor token_embd"),
    ],
)
def test_an_unsupported_model_is_one_clear_line(
    tmp_path: Path, tokenizer: Tokenizer, change: Any, message: str
) -> None:
    path = tmp_path / "m.gguf"
    export(small(quant={"enabled": False}), tokenizer, path, "f32")
    file = GGUFFile(path)
    fields = {key: value for key, value in file.fields.items() if key != "general.architecture"}
    arch, tensors = change("llama", {name: np.array(tensor.data) for name, tensor in file.tensors.items()})
    other = tmp_path / "other.gguf"
    foreign(other, arch, tensors, fields)
    with pytest.raises(DataError, match=message) as error:
        load_gguf(other)
    assert str(error.value).count(str(other)) == 1


def test_a_ternary_file_of_another_program_keeps_its_scales(
    tmp_path: Path, tokenizer: Tokenizer, model: Transformer
) -> None:
    path, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    export(model, tokenizer, path, "tq2_0", head="f32")
    data = path.read_bytes()
    # The same bytes with our own keys made unknown is what another program would have written.
    other.write_bytes(data.replace(b"nanochat.quant.", b"elsewhere.quant"))
    loaded, _ = load_gguf(other)
    assert len(list(loaded.ternary_layers())) == 7 * model.config.n_layers  # q, k, v, o, gate, up, down
    for (_, ours), (_, theirs) in zip(model.ternary_layers(), loaded.ternary_layers(), strict=True):
        assert torch.equal(ours.ternary().dequantize(), theirs.ternary().dequantize())
        assert theirs.ternary().granularity == "row"


def test_a_part_without_a_name_keeps_its_own_in_our_architecture_only(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Attention.__init__

    def extended(self: Attention, config: ModelConfig, layer: int) -> None:
        plain(self, config, layer)
        self.w_latent = BitLinear(config.dim, 32, config.quant)
        self.temperature = torch.nn.Parameter(torch.ones(4, 1))

    monkeypatch.setattr(Attention, "__init__", extended)
    ours, path = small(attention_gate=True), tmp_path / "ours.gguf"  # a gate without DeltaNet: no arch of llama.cpp
    export(ours, tokenizer, path)
    names = GGUFFile(path).tensors.keys()
    assert {"blk.0.attention.w_latent.weight", "blk.0.attention.temperature"} <= names
    (before, after) = (model.blocks[0].get_submodule("attention") for model in (ours, load_gguf(path)[0]))
    assert torch.equal(before.temperature, after.temperature)
    assert torch.equal(before.w_latent.ternary().codes, after.w_latent.ternary().codes)
    with pytest.raises(KeyError, match="w_latent"):
        export(small(), tokenizer, tmp_path / "llama.gguf")
