"""Every preset resolves, and its name tells the truth about its size."""

from functools import reduce
from operator import getitem
from typing import Any

import pytest
import tomlkit

from nanochat_cli.config import presets
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.config.size import format_parameters
from nanochat_cli.errors import ConfigError

MODELS = [preset for preset in presets.available() if not preset.is_overlay]
OVERLAYS = [preset for preset in presets.available() if preset.is_overlay]


def names(found: list[presets.Preset]) -> list[str]:
    return [preset.name for preset in found]


def test_the_promised_presets_exist():
    promised = {"quickstart", "nano-125m", "nano-125m-mhc", "small-560m", "medium-3b", "d20", "d20-mtp", "d20-e3-full"}
    promised |= {"test-plain", "test-mtp", "test-8bit", "test-collider", "test-async-loader", "test-galore-muon"}
    e3 = "baseline mtp-only muon-8bit galore2 full best collider-only async-only 8bit-only galore-only".split()
    assert promised | {f"e3/{name}" for name in e3} <= set(names(MODELS))
    assert {"llama-cpp", "bitnet", "cpu", "h200"} <= set(names(OVERLAYS))


@pytest.mark.parametrize("preset", MODELS, ids=names(MODELS))
def test_a_label_is_within_five_percent_of_the_parameters(preset):
    total = resolve_config([preset.name]).model.count_parameters().total
    assert preset.label is not None
    assert total == pytest.approx(float(preset.label[:-1]) * {"M": 1e6, "B": 1e9}[preset.label[-1]], rel=0.05)


@pytest.mark.parametrize("preset", MODELS, ids=names(MODELS))
def test_widths_fit_every_ternary_type_of_llama_cpp(preset):
    model = resolve_config([preset.name]).model
    for width in (model.dim, model.n_heads * model.resolved_head_dim, model.resolved_ffn_dim):
        assert width % 256 == 0


@pytest.mark.parametrize("overlay", OVERLAYS, ids=names(OVERLAYS))
@pytest.mark.parametrize("model", MODELS, ids=names(MODELS))
def test_every_overlay_composes_with_every_model(model, overlay):
    resolved = resolve_config([model.name, overlay.name]).model_dump(mode="json")
    written = leaves_of(overlay.values)
    assert written
    assert {path: value_at(resolved, path) for path in written} == written


def leaves_of(table: dict[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    """Every value that a preset sets, by dotted key."""
    found: dict[tuple[str, ...], object] = {}
    for key, value in table.items():
        found |= leaves_of(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def value_at(table: dict[str, Any], path: tuple[str, ...]) -> object:
    return reduce(getitem, path, table)


def test_presets_are_found_by_name_by_folder_and_by_path():
    by_name = presets.load("cpu")
    assert presets.load("overlays/cpu") == by_name
    assert presets.load(str(by_name.path)) == by_name


def test_a_preset_outside_the_installation_is_given_by_path(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text('description = "mine"\n[train]\nbatch_size = 3\n')
    assert presets.load(str(mine)).name == "mine"
    assert resolve_config([str(mine)]).train.batch_size == 3


def test_a_preset_without_a_description_is_refused(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("[train]\nbatch_size = 3\n")
    with pytest.raises(ConfigError, match="starts with description"):
        presets.load(str(mine))


def test_an_unknown_preset_names_the_closest_or_all():
    with pytest.raises(ConfigError, match=r"^--preset nano-125: no such preset; did you mean nano-125m\?$"):
        presets.load("nano-125")
    with pytest.raises(ConfigError, match=r"available: .*quickstart"):
        presets.load("zzzzzz")
    with pytest.raises(ConfigError, match=r"^--preset zzz\.toml: no such file$"):
        presets.load("zzz.toml")


def test_preset_names_are_unique():
    assert len(set(presets.names())) == len(presets.names())


def test_preset_files_hold_only_sections_and_their_description():
    for preset in presets.available():
        table = tomlkit.parse(preset.path.read_text(encoding="utf-8")).unwrap()
        assert all(
            isinstance(value, dict) for key, value in table.items() if key not in ("description", "label", "base")
        )


def test_parameters_of_a_model_small_enough_to_count_by_hand():
    model = ModelConfig(vocab_size=10, dim=8, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=12, qk_norm=True)
    counts = model.count_parameters()
    # wq 8×8, wk and wv 4×8, wo 8×8; gate, up and down 12×8 each
    assert counts.matrices == 2 * (64 + 32 + 32 + 64 + 3 * 96)
    assert counts.norms == 2 * (8 + 8 + 4 + 4) + 8
    assert (counts.embedding, counts.head) == (80, 80)
    assert counts.total == counts.matrices + counts.norms + 160


def test_a_tied_head_is_counted_once_and_sub_norms_are_counted():
    shape = {"vocab_size": 10, "dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "ffn_dim": 12}
    counts = ModelConfig(**shape, tie_embeddings=True, sub_norm=True).count_parameters()
    assert counts.head == 0
    assert counts.norms == 8 + 8 + 8 + 12 + 8


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999"), (5_510_000, "5.51M"), (121_900_000, "121.9M"), (3e9, "3.00B")]
)
def test_counts_are_written_short(count, text):
    assert format_parameters(int(count)) == text
