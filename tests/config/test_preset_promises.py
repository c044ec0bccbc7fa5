"""A preset's description and its configuration agree, and the description leaves out no method."""

import re

import pytest
import torch

from nanochat_cli.config import presets
from nanochat_cli.config.load import resolve_config
from nanochat_cli.formats.gguf.architecture import destination_of
from nanochat_cli.model.mtp import build_mtp
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer

MODELS = [preset for preset in presets.available() if not preset.is_overlay]
SAYS = {
    "8-bit": (r"8-bit|in 8 bits", lambda c: c.optim.eight_bit),
    "GaLore": (r"GaLore|state of rank", lambda c: c.optim.galore.enabled),
    "experts": (r"\bexperts\b", lambda c: c.model.moe.enabled),
    "streams": (r"residual streams", lambda c: c.model.mhc.streams > 1),
    "DeltaNet": (r"gated DeltaNet", lambda c: c.model.is_hybrid),
    "MTP": (r"MTP|[Mm]ulti-token|heads that predict", lambda c: c.mtp.enabled),
    "filtering": (r"[Tt]oken filtering", lambda c: c.collider.enabled),
    "read ahead": (r"read ahead|asynchronous loader", lambda c: c.loader.enabled),
}
ALL = re.compile("every method together|every E3 method")
"""The words for MTP, token filtering, batches read ahead, GaLore and 8 bits."""
E3 = {"8-bit", "GaLore", "MTP", "filtering", "read ahead"}


@pytest.mark.parametrize("preset", MODELS, ids=lambda preset: preset.name)
def test_a_description_names_exactly_the_methods_that_are_on(preset):
    config = resolve_config([preset.name])
    on = {method for method, (_, holds) in SAYS.items() if holds(config)}
    said = {method for method, (words, _) in SAYS.items() if re.search(words, preset.description)}
    assert said | (E3 if ALL.search(preset.description) else set()) == on


@pytest.mark.parametrize("preset", MODELS, ids=lambda preset: preset.name)
def test_numbers_in_a_description_are_those_of_the_configuration(preset):
    config = resolve_config([preset.name])
    model = config.model
    found = {
        r"(\d+) experts": model.moe.experts,
        r"(\d+) residual streams": model.mhc.streams,
        r"MTP (\d+) ×": config.mtp.n_tokens,
        r"MTP \d+ × ([\d.]+)": config.mtp.weight,
        r"(\d+) layers": model.n_layers,
        r"arch (\w+)": destination_of(model).arch,
    }
    for words, value in found.items():
        for said in re.findall(words, preset.description):
            assert said == str(value), words
    for said in re.findall(r"(\d+) % (?:of the layers )?gated DeltaNet", preset.description):
        assert int(said) == pytest.approx(100 * sum(model.delta_layers) / model.n_layers, abs=2)
    assert ("tied" in re.findall(r"\w+", preset.description)) <= model.tie_embeddings
    assert ("untied" in preset.description) <= (not model.tie_embeddings)


@pytest.mark.parametrize("preset", MODELS, ids=lambda preset: preset.name)
def test_state_in_eight_bits_is_where_it_is_promised(preset):
    config = resolve_config([preset.name], overrides=["model.n_layers=4"])  # of several layers every one is alike
    with torch.device("meta"):
        model, mtp = Transformer(config.model), build_mtp(config.model, config.mtp)
    optimizers = build_optimizer(model, config.optim, {} if mtp is None else {"mtp": mtp})
    matrices = next(group for group in optimizers.groups if group.name == "matrix")
    promised = re.search(r"8-bit|in 8 bits|every method together", preset.description) is not None
    assert (torch.int8 in {tensor.dtype for tensor in matrices.optimizer.state_tensors()}) == promised
    if promised and not config.optim.galore.enabled:
        weights = sum(p.numel() for name, p in model.named_parameters() if name in matrices.names)
        assert matrices.state_bytes() == pytest.approx(weights * (1 + 4 / config.optim.state_block), rel=0.25)


@pytest.mark.parametrize("preset", MODELS, ids=lambda preset: preset.name)
def test_a_preset_that_llama_cpp_does_not_run_says_so_in_its_file_and_another_preset_makes_it_run(preset):
    destination = destination_of(resolve_config([preset.name]).model)
    if not destination.runs_in_llama_cpp:
        assert preset.name in ("nano-125m-mhc", "medium-3b")
        assert "llama" in preset.path.read_text(encoding="utf-8")
    assert destination_of(resolve_config([preset.name, "llama-cpp"]).model).answer == "yes"
