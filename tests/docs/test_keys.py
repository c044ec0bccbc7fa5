"""The tables of configuration keys are those that the schema gives, and no key is missing from them."""

import re

import pytest

from benchmarks.update_figures import ROOT
from benchmarks.update_keys import rendered, table
from nanochat_cli.config.keys import leaves
from tests.docs.markdown import having, read

PAGES = having(lambda text: re.search(r"^<!-- keys: ", text, re.MULTILINE))


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_of_a_page_are_written_from_the_schema(name):
    text = read(ROOT / name)
    assert rendered(text) == text, "run make keys"


def test_every_key_has_a_row_on_some_page():
    rows = {key for name in PAGES for key in re.findall(r"^\| `([\w.]+)` \|", read(ROOT / name), re.MULTILINE)}
    assert set(leaves()) <= rows


@pytest.mark.parametrize(
    ("key", "default", "values"),
    [
        ("optim.schedule", '"wsd"', '`"wsd"`, `"two_stage"`, `"cosine"`, `"constant"`'),
        ("optim.state_block", "256", "`128`, `256`, `2048`"),
        ("data.val_fraction", "0.02", "number > 0, < 0.5"),
        ("train.time_budget", "none", "number > 0"),
        ("model.deltanet.conv_kernel", "4", "integer ≥ 2, ≤ 8"),
        ("fire.steps", "[]", "array of integer > 0"),
        ("run.dir", '"runs"', "path"),
        ("export.verify", "true", "boolean"),
    ],
)
def test_a_row_says_what_the_key_takes(key, default, values):
    *_, row, end = table([key]).split("\n")
    assert row == f"| `{key}` | `{default}` | {values} | {leaves()[key].description} |"
    assert end == ""


def test_a_section_stands_for_its_own_keys():
    keys = re.findall(r"`(optim[\w.]+)`", table(["optim"]))
    assert "optim.lr" in keys
    assert not any(key.startswith("optim.galore") for key in keys)


def test_a_name_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"^model\.mo: no such section or key$"):
        table(["model.mo"])


def test_every_key_says_what_it_means_in_one_line():
    for key, field in leaves().items():
        assert field.description, key
        assert "\n" not in field.description
