"""A Hugging Face folder: transformers makes the same model of it, and so does our own reader."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat_cli.config.schema import ExportConfig, ModelConfig
from nanochat_cli.data.chat import CHATML, Turn, prompt_ids
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError, ValidationFailure
from nanochat_cli.export import transformers_parity
from nanochat_cli.formats.huggingface.architecture import class_of, from_config_json, to_config_json
from nanochat_cli.formats.huggingface.read import read_folder
from nanochat_cli.formats.huggingface.tensors import float_twin, stored_values
from nanochat_cli.formats.huggingface.write import write_folder
from nanochat_cli.model.transformer import Transformer
from tests.architectures import build
from tests.inference.tiny_models import spread_model, tiny_config

VOCAB = 300
EXPERTS = {"enabled": True, "experts": 4, "active": 2}
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"qk_norm": True, "tie_embeddings": True, "head_dim": 32, "n_heads": 8},
    "BitNetForCausalLM": {"sub_norm": True, "tie_embeddings": True, "quant": {"scale": "tensor"}},
    "MixtralForCausalLM": {"moe": EXPERTS, "rope_theta": 50000.0},
    "Qwen3MoeForCausalLM": {"moe": EXPERTS, "qk_norm": True, "norm_eps": 1e-6},
    "Qwen3_5ForCausalLM": {"deltanet": {"pattern": "DAD"}},
}
HALVES = ExportConfig()


@pytest.fixture(scope="module")
def transformers() -> Any:
    """Imported once, outside the tests' time, with what it imports when a model is first used."""
    found = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    assert found.LlamaForCausalLM.generate
    return found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def f(x): return x + 1\n" * 30], VOCAB - 8)


def small(kind: str, **more: Any) -> Transformer:
    if "deltanet" in MODELS[kind]:
        return build("plain+hybrid+dense+untied", vocab_size=VOCAB)
    config = {"vocab_size": VOCAB, "dim": 128, "n_heads": 4, "ffn_dim": 256, "rope_theta": 20000.0, **MODELS[kind]}
    return spread_model(tiny_config(**{**config, **more}), seed=len(kind))


def write(
    model: Transformer, tokenizer: Tokenizer, out: Path, export: ExportConfig = HALVES, **more: Any
) -> Transformer:
    """Write the folder; returns the float model that it holds."""
    values = stored_values(model, export)
    write_folder(model.config, values, tokenizer, out, **more)
    return float_twin(model.config, values)


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_the_same_from_every_class(
    transformers: Any, tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    if kind == "Qwen3_5ForCausalLM" and not hasattr(transformers, kind):
        pytest.skip("this version of transformers has no Qwen3.5")
    twin = write(small(kind), tokenizer, tmp_path)
    compared = transformers_parity.compare_with_transformers(tmp_path, twin, tokenizer)
    assert compared.kind == kind
    assert compared.max_difference <= 1e-4 * compared.logit_std
    assert compared.n_greedy >= 16
    assert compared.n_texts >= 200


def test_transformers_renders_conversations_as_we_do_and_ends_answers_where_turns_end(
    transformers: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    turns = [Turn("system", "be brief"), Turn("user", "def f(x):\n\n")]
    write(small("LlamaForCausalLM"), tokenizer, tmp_path, chat_template=CHATML)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    asked = [{"role": role, "content": text} for role, text in turns]
    found = theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
    assert found["input_ids"] == prompt_ids(turns, tokenizer)
    end = tokenizer.special_tokens["<|im_end|>"]
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [tokenizer.eos_id, end]
    write(small("LlamaForCausalLM"), tokenizer, tmp_path)
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == tokenizer.eos_id


@pytest.mark.parametrize("shard_bytes", [10**9, 200_000])
def test_files_of_many_shards_hold_the_same_model(
    transformers: Any, tokenizer: Tokenizer, tmp_path: Path, shard_bytes: int
) -> None:
    model = small("LlamaForCausalLM")
    write(model, tokenizer, tmp_path)  # what an earlier export left must not be read
    twin = write(model, tokenizer, tmp_path, shard_bytes=shard_bytes, chat_template="{{ messages }}")
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (shard_bytes < 10**9)
    if index.exists():
        assert not (tmp_path / "model.safetensors").exists()
        assert set(json.loads(index.read_text())["weight_map"].values()) == {
            path.name for path in tmp_path.glob("*.safetensors")
        }
    transformers_parity.compare_with_transformers(tmp_path, twin, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == "{{ messages }}"
    assert (theirs.eos_token, theirs.pad_token, theirs.bos_token) == ("<|endoftext|>", "<|pad|>", None)


def test_ternary_matrices_are_halves_that_hold_code_and_scale_exactly(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = small("LlamaForCausalLM")
    write(model, tokenizer, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    for number, block in enumerate(model.blocks):
        weight = block.attention.wo.ternary().dequantize()
        stored = found[f"model.layers.{number}.self_attn.o_proj.weight"]
        assert stored.dtype == torch.float16
        assert torch.equal(stored.float(), weight)
    assert found["model.norm.weight"].dtype == torch.float32
    assert torch.equal(found["model.embed_tokens.weight"], model.embedding.weight.half())


def test_a_float_model_is_stored_in_the_smallest_format_that_loses_nothing(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = small("LlamaForCausalLM", quant={"enabled": False})
        for parameter in model.parameters():
            small_too = 2.0**-30 if dtype == torch.bfloat16 else 1.0  # below float16's range
            parameter.data = (parameter.data * small_too).to(dtype).float()
        values = stored_values(model, HALVES)
        write_folder(model.config, values, tokenizer, tmp_path)
        assert values["blocks.0.feed_forward.w_up.weight"].dtype == dtype
        assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).split(".")[1]
        back = read_folder(tmp_path).model
        assert all(torch.equal(a, b) for a, b in zip(back.parameters(), model.parameters(), strict=True))
    assert stored_values(model, ExportConfig(type="f16"))["norm.weight"].dtype == torch.float32


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "Qwen3_5ForCausalLM"])
def test_our_own_reader_gives_the_float_model_and_the_tokenizer_back(
    tokenizer: Tokenizer, tmp_path: Path, kind: str
) -> None:
    twin = write(small(kind), tokenizer, tmp_path, chat_template="a\r\nb")
    content = read_folder(tmp_path)
    ours, theirs = twin.state_dict(), content.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert content.tokenizer.to_str() == tokenizer.padded_to(VOCAB).to_str()
    assert content.chat_template == "a\r\nb"
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(content.model.logits(content.model(tokens)), twin.logits(twin(tokens)))


@pytest.mark.parametrize("kind", MODELS)
def test_config_json_says_it_to_transformers_4_and_to_5(kind: str) -> None:
    config = small(kind).config
    values = to_config_json(config, {"eos_token_id": 0}, "float16")
    assert values["architectures"] == [kind]
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == config.rope_theta
    assert values["dtype"] == values["torch_dtype"] == "float16"
    assert values["head_dim"] == config.resolved_head_dim
    assert values["hidden_act"] == "silu"
    if kind == "Qwen3MoeForCausalLM":
        assert values["num_experts"] == values["num_local_experts"] == 4


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"mhc": {"streams": 2}}, "model.mhc.streams"),
        ({"moe": {**EXPERTS, "shared": True}}, "model.moe.shared"),
        ({"moe": {**EXPERTS, "balance": "bias"}}, "model.moe.balance"),
        ({"attention_gate": True}, "model.attention_gate"),
        ({"deltanet": {"pattern": "DA"}}, "model.qk_norm"),
        ({"sub_norm": True}, "model.tie_embeddings"),
        ({"dim": 100, "n_heads": 3, "n_kv_heads": 3, "head_dim": 32}, "model.n_heads"),
    ],
    ids=str,
)
def test_what_has_no_class_is_refused_with_the_key_to_change(overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")) as refused:
        class_of(tiny_config(**overrides))
    assert "\n" not in str(refused.value)


def changed(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    document = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def with_tensor(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {**load_file(path), name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", ["weight", "missing", "extra", "theta", "eps", "tokenizer", "eos"])
def test_a_folder_that_is_another_model_is_found_out(
    transformers: Any, tokenizer: Tokenizer, tmp_path: Path, damage: str
) -> None:
    twin = write(small("LlamaForCausalLM"), tokenizer, tmp_path)
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = load_file(tmp_path / "model.safetensors")[name]
    match damage:
        case "weight":
            with_tensor(tmp_path, name, weight.flip(0).contiguous())
        case "missing":
            with_tensor(tmp_path, name, None)
        case "extra":
            with_tensor(tmp_path, "model.layers.1.self_attn.k_proj.bias", weight[:, 0].contiguous())
        case "theta":
            theta = {"rope_type": "default", "rope_theta": 1000.0}
            changed(tmp_path, "config.json", rope_theta=1000.0, rope_parameters=theta)
        case "eps":
            changed(tmp_path, "config.json", rms_norm_eps=1e-2)
        case "tokenizer":
            definition = json.loads((tmp_path / "tokenizer.json").read_text())
            definition["model"]["merges"] = definition["model"]["merges"][:4]
            (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
        case "eos":
            changed(tmp_path, "tokenizer_config.json", eos_token="<|im_end|>")
    with pytest.raises(ValidationFailure) as found:
        transformers_parity.compare_with_transformers(tmp_path, twin, tokenizer)
    assert "\n" not in str(found.value)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    write(small("LlamaForCausalLM"), tokenizer, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not one"),
        ({"architectures": ...}, "architecture none is not one"),
        ({"attention_bias": True}, "attention_bias = True: biases"),
        ({"mlp_bias": True}, "mlp_bias = True: biases"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = "),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters = "),
        ({"rope_parameters": [1]}, "damaged"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config = "),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map = "),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"architectures": ["MistralForCausalLM"]}, "sliding_window = 4096"),
        ({"architectures": ["BitNetForCausalLM"], "hidden_act": ...}, "hidden_act = 'relu2'"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two': a number"),
        ({"num_attention_heads": 0}, "n_heads: Input should be greater than 0"),
        ({"num_key_value_heads": 3}, "must be a multiple of n_kv_heads = 3"),
        ({"max_position_embeddings": 10**9}, "max_seq_len"),
    ],
    ids=str,
)
def test_a_config_json_that_does_not_fit_is_refused_by_name(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    text = (folder / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(text)
    changed(tmp_path, "config.json", **changes)
    with pytest.raises(DataError, match=message) as refused:
        read_folder(tmp_path)
    assert str(tmp_path / "config.json") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_defaults_of_transformers_apply_where_config_json_says_nothing() -> None:
    values = to_config_json(small("MixtralForCausalLM").config, {}, "float16")
    values = {
        key: value for key, value in values.items() if key not in ("rope_theta", "rope_parameters", "rms_norm_eps")
    }
    config: ModelConfig = from_config_json(values)
    assert (config.rope_theta, config.norm_eps) == (1e6, 1e-5)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("truncated", "damaged or incomplete"),
        ("pickle", "pickle"),
        ("no weights", r"no model\.safetensors"),
        ("no tokenizer", r"tokenizer\.json: no such file"),
        ("bad tokenizer", "cannot be read"),
        ("large tokenizer", "tokens and the model has 256 embeddings"),
        ("integers", "is int8"),
        ("infinite", "not finite"),
        ("bias", "a bias"),
        ("missing tensor", "is missing"),
        ("shape", "has another shape"),
        ("many layers", "num_hidden_layers = 100000000"),
        ("index outside", "not a safetensors file of the folder"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_clear_line(
    tokenizer: Tokenizer, tmp_path: Path, case: str, message: str
) -> None:
    write(small("LlamaForCausalLM"), tokenizer, tmp_path)
    weights, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    tensor = load_file(weights)[name]
    match case:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "pickle":
            weights.rename(tmp_path / "pytorch_model.bin")
        case "no weights":
            weights.unlink()
        case "no tokenizer":
            (tmp_path / "tokenizer.json").unlink()
        case "bad tokenizer":
            (tmp_path / "tokenizer.json").write_text("{")
        case "large tokenizer":
            changed(tmp_path, "config.json", vocab_size=256)
        case "integers":
            with_tensor(tmp_path, name, tensor.to(torch.int8))
        case "infinite":
            with_tensor(tmp_path, name, tensor / 0)
        case "bias":
            with_tensor(tmp_path, "model.layers.0.self_attn.q_proj.bias", torch.zeros(128))
        case "missing tensor":
            with_tensor(tmp_path, name, None)
        case "shape":
            with_tensor(tmp_path, name, tensor[:5].contiguous())
        case "many layers":
            changed(tmp_path, "config.json", num_hidden_layers=10**8)
        case "index outside":
            index = {"weight_map": {name: "../other/model.safetensors"}}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message) as refused:
        read_folder(tmp_path)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
