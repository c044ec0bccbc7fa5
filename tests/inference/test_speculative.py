"""Self-speculative decoding yields the tokens of plain decoding, whatever the drafts are."""

import pytest
import torch

from nanochat_cli.config.schema import MTPConfig
from nanochat_cli.errors import ConfigError
from nanochat_cli.inference import speculative
from nanochat_cli.inference.generate import generate_tokens
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.speculative import Acceptance, make_drafter, speculate_tokens
from nanochat_cli.model.mtp import MTP
from tests.architectures import build

GREEDY = SamplingConfig(max_tokens=20, temperature=0)
SAMPLED = SamplingConfig(max_tokens=20, temperature=0.9, top_k=40, repetition_penalty=1.1, seed=5)
# Without int8 rounding, one pass over several tokens and several passes over one differ by 1e-6 only.
EXACT = {"quant": {"activations": False}}


def prompts(n: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(1, 288, (5 + i % 7,), generator=generator).tolist() for i in range(n)]


def mtp_for(model, kind: str, n_tokens: int = 2) -> MTP:
    torch.manual_seed(2)
    return MTP(model.config, MTPConfig(enabled=True, kind=kind, n_tokens=n_tokens)).eval()  # pyright: ignore[reportArgumentType]


def plain(model, prompt, sampling) -> list[int]:
    return [tokens[0] for tokens in generate_tokens(model, [prompt], sampling, eos_id=0) if tokens[0] is not None]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_fifty_prompts_give_the_tokens_of_plain_decoding(sampling):
    model = build("plain+attention+dense+untied", **EXACT)
    packed = PackedTransformer.from_model(model, fused=False)
    drafters = {kind: make_drafter(packed, mtp_for(model, kind)) for kind in ("heads", "nextn")}
    for prompt in prompts(50):
        expected = plain(packed, prompt, sampling)
        for kind, drafter in drafters.items():
            assert list(speculate_tokens(packed, drafter, prompt, sampling, 2, eos_id=0)) == expected, kind


@pytest.mark.parametrize("combination", ["plain+hybrid+dense+tied", "mhc-2+hybrid+moe+untied"])
def test_recurrent_states_go_back(combination):
    model = build(combination, **EXACT)
    drafter = make_drafter(model, mtp_for(model, "nextn"))
    for prompt in prompts(6):
        assert list(speculate_tokens(model, drafter, prompt, GREEDY, 2, eos_id=0)) == plain(model, prompt, GREEDY)


def test_beyond_the_context_the_window_slides_as_in_plain_decoding():
    model = build("plain+attention+dense+untied", max_seq_len=16, **EXACT)
    sampling = SamplingConfig(max_tokens=40, temperature=0)
    for kind in ("heads", "nextn"):
        drafter = make_drafter(model, mtp_for(model, kind))
        for prompt in prompts(4):
            assert list(speculate_tokens(model, drafter, prompt, sampling, 2)) == plain_all(model, prompt, sampling)


def plain_all(model, prompt, sampling) -> list[int | None]:
    return [tokens[0] for tokens in generate_tokens(model, [prompt], sampling)]


class Oracle:
    """Drafts from a list of the right tokens, or always wrong ones."""

    def __init__(self, right: list[int], *, lie: bool) -> None:
        self.right, self.lie, self.done = right, lie, 0

    def reset(self) -> None:
        self.done = 0

    def draft(self, hidden, next_tokens, count: int) -> list[int]:
        self.done += next_tokens.shape[1] if self.done else 1
        guess = self.right[self.done : self.done + count]
        return [(token + 1) % 288 for token in guess] if self.lie else guess


@pytest.mark.parametrize(("lie", "rate"), [(False, 1.0), (True, 0.0)])
def test_right_guesses_are_all_accepted_and_wrong_ones_none(lie, rate):
    model = build("plain+attention+dense+untied", **EXACT)
    prompt = prompts(1)[0]
    right = plain_all(model, prompt, GREEDY)
    acceptance = Acceptance()
    oracle = Oracle(right, lie=lie)  # pyright: ignore[reportArgumentType]
    assert list(speculate_tokens(model, oracle, prompt, GREEDY, 3, acceptance=acceptance)) == right
    assert acceptance.rate == rate
    assert acceptance.tokens_per_check == pytest.approx(4.0 if not lie else 1.0, abs=0.5)


def test_shared_logits_draft_nothing():
    model = build("plain+attention+dense+untied")
    with pytest.raises(ConfigError, match="heads or nextn"):
        make_drafter(model, mtp_for(model, "shared"))


class Slow:
    """A model whose passes each take one second of an otherwise stopped clock."""

    def __init__(self, model, clock: list[float]) -> None:
        self._model, self._clock = model, clock

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def __call__(self, tokens, cache=None):
        self._clock[0] += 1
        return self._model(tokens, cache)


@pytest.mark.parametrize(("lie", "passes"), [(False, 4), (True, 12)])
def test_every_new_token_counts_in_the_rate_and_the_prompt_does_not(lie, passes, monkeypatch):
    """12 new tokens after the first: four to a pass with right guesses, one to a pass with wrong ones."""
    model = build("plain+attention+dense+untied", **EXACT)
    prompt, clock = prompts(1)[0], [0.0]
    sampling = SamplingConfig(max_tokens=13, temperature=0)
    right = plain_all(model, prompt, sampling)
    monkeypatch.setattr(speculative.time, "perf_counter", lambda: clock[0])
    acceptance, oracle = Acceptance(), Oracle(right, lie=lie)
    found = list(speculate_tokens(Slow(model, clock), oracle, prompt, sampling, 3, acceptance=acceptance))
    assert found == right
    assert (acceptance.prompt.tokens, acceptance.prompt.seconds) == (len(prompt), 1)
    assert acceptance.new.tokens == 12
    assert passes - 1 <= acceptance.new.seconds <= passes
    assert acceptance.new.tokens_per_second == 12 / acceptance.new.seconds


def test_a_text_that_ends_counts_its_last_pass():
    """EOS among the drafts of a pass: the pass counts, EOS is not a token of the text."""
    model = build("plain+attention+dense+untied", **EXACT)
    prompt = prompts(1)[0]
    right = plain_all(model, prompt, SamplingConfig(max_tokens=40, temperature=0))
    eos = next(token for place, token in enumerate(right) if place >= 2 and token not in right[:place])
    length = right.index(eos)
    acceptance, oracle = Acceptance(), Oracle(right, lie=False)
    greedy = SamplingConfig(max_tokens=40, temperature=0)
    found = list(speculate_tokens(model, oracle, prompt, greedy, 3, eos_id=eos, acceptance=acceptance))
    assert found == right[:length]
    assert acceptance.tokens == acceptance.new.tokens == length - 1
    assert acceptance.checks == -(-length // 4)
