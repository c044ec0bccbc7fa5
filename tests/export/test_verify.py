"""The wording of a verification: only what was shown is called "verified"."""

from pathlib import Path

import pytest

from nanochat_cli.export.verify import LlamaCppComparison, VerifyReport

INCONCLUSIVE = "weights verified bit for bit; logits inconclusive (only {} of 12 prompts are without a rounding tie)"


def comparison(within: int, stable: int, stable_within: int) -> LlamaCppComparison:
    return LlamaCppComparison(0.002, 12, within, stable, stable_within, 1e-5, 3e-3, 2e-2, 3e-2)


def lines(llama_cpp: LlamaCppComparison | None, arch: str = "llama") -> list[str]:
    return VerifyReport(Path("m.gguf"), arch, 47, 5_507_840, llama_cpp, 1e-6).lines()


@pytest.mark.parametrize("stable", [0, 3])
def test_logits_that_depend_on_rounding_ties_are_not_called_verified(stable):
    """As after a run that barely trained: 5 of 12 prompts within 0.002, hardly any of them stable."""
    found = lines(comparison(5, stable, stable))
    assert found[-1] == INCONCLUSIVE.format(stable)
    assert not any(line.startswith("verified: llama.cpp") for line in found)
    assert "5 of 12 prompts within 0.002" in found[-2]


@pytest.mark.parametrize(
    "seen", [comparison(12, 0, 0), comparison(9, 8, 8)], ids=["all within", "stable prompts agree"]
)
def test_logits_that_agree_are_verified(seen):
    found = lines(seen)
    assert any(line.startswith("verified: llama.cpp: log-probabilities of") for line in found)
    assert not any("inconclusive" in line for line in found)


@pytest.mark.parametrize("arch", ["llama", "nanochat-ternary"])
def test_a_program_that_did_not_run_verifies_nothing(arch):
    *verified, last = lines(None, arch)
    assert all(line.startswith("verified: ") for line in verified)
    assert last.startswith("llama.cpp was not asked: ")
