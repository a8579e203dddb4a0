"""Self-speculative decoding: the text of plain greedy, token for token, in exactly as many passes as it should take."""

from __future__ import annotations

import itertools

import pytest
import torch

from mtp_megatron.errors import ConfigError
from mtp_megatron.serving import decode
from mtp_megatron.serving.compare import compare, report, table
from mtp_megatron.serving.decode import Generation, generate
from mtp_megatron.serving.layer import LayerCache
from mtp_megatron.serving.llama import Caches, HeadsLlama
from tests.decoders import CONFIG, VOCAB, prompts, random_weights, trained_decoder, trained_weights

NEW = 50
PROMPTS = prompts(60)


@pytest.fixture(scope="module")
def runs() -> dict[int, list[Generation]]:
    model = trained_decoder()
    return {k: [generate(model, prompt, max_new_tokens=NEW, heads=k) for prompt in PROMPTS] for k in (1, 2, 3, 4)}


def texts(generations: list[Generation]) -> list[list[int]]:
    return [generation.tokens for generation in generations]


@pytest.mark.parametrize("heads", [2, 3, 4])
def test_the_text_of_plain_greedy_token_for_token(runs: dict[int, list[Generation]], heads: int) -> None:
    assert texts(runs[heads]) == texts(runs[1])
    assert all(len(generation.tokens) == NEW for generation in runs[heads])
    for drafted, accepted in zip(
        *(map(sum, zip(*(getattr(g, name) for g in runs[heads]), strict=True)) for name in ("drafted", "accepted")),
        strict=True,
    ):
        assert 0.1 * drafted < accepted < 0.9 * drafted, "the test must see drafts accepted and drafts rejected"


def test_plain_greedy_is_what_a_full_pass_over_the_text_says(runs: dict[int, list[Generation]]) -> None:
    model = trained_decoder()
    with torch.inference_mode():
        for prompt, generation in zip(PROMPTS[:10], runs[1], strict=False):
            text = torch.tensor(prompt + generation.tokens)
            _, logits = model.run(text, model.new_caches(len(text)), rows=len(generation.tokens) + 1)
            assert logits[:-1].argmax(-1).tolist() == generation.tokens


def test_plain_decoding_takes_one_pass_for_each_token(runs: dict[int, list[Generation]]) -> None:
    for generation in runs[1]:
        assert (generation.forwards, generation.tokens_per_forward) == (NEW - 1, 1.0)
        assert generation.accepted_together == [1] * NEW


@pytest.mark.parametrize("heads", [2, 3, 4])
def test_passes_and_acceptance_are_those_of_a_simulation(runs: dict[int, list[Generation]], heads: int) -> None:
    """What every head says at every position of the finished text decides which drafts can have been accepted."""
    model = trained_decoder()
    for prompt, generation in zip(PROMPTS[:25], runs[heads], strict=False):
        text = prompt + generation.tokens
        caches = model.new_caches(len(text))
        with torch.inference_mode():
            z, _ = model.run(torch.tensor(text), caches, rows=1)
            said = model.run_further_heads(z, caches, rows=len(text)).argmax(-1).tolist()
        known, forwards, accepted, together = len(prompt) + 1, 0, [0] * (heads - 1), [1]
        while known < len(text):
            room = min(heads, len(text) - known) - 1
            drafts = [said[head][known - 2] for head in range(room)]
            agree = [draft == token for draft, token in zip(drafts, text[known:], strict=False)]
            good = len(list(itertools.takewhile(bool, agree)))
            for head in range(good):
                accepted[head] += 1
            together.append(good + 1)
            known, forwards = known + good + 1, forwards + 1
        assert (generation.forwards, generation.accepted, generation.accepted_together) == (
            forwards,
            accepted,
            together,
        )


def test_without_the_roll_back_the_text_is_another(monkeypatch: pytest.MonkeyPatch, runs: dict) -> None:  # type: ignore[type-arg]
    """Control: rejected drafts left in the caches change what follows."""
    monkeypatch.setattr(Caches, "truncate", lambda self, length: None)
    roomy = LayerCache.__init__
    monkeypatch.setattr(
        LayerCache, "__init__", lambda self, config, capacity, *rest, **k: roomy(self, config, 400, *rest, **k)
    )
    monkeypatch.setattr(Caches, "__init__", _with_room(Caches.__init__))
    model = trained_decoder()
    spoilt = [generate(model, prompt, max_new_tokens=NEW, heads=4).tokens for prompt in PROMPTS[:5]]
    assert spoilt != texts(runs[1])[:5]


def _with_room(init):  # type: ignore[no-untyped-def]
    return lambda self, config, capacity, dtype, further_heads: init(self, config, 400, dtype, further_heads)


def test_stale_drafts_would_be_noticed_too(monkeypatch: pytest.MonkeyPatch, runs: dict) -> None:  # type: ignore[type-arg]
    """Control: accepting drafts without looking at head 1 gives other text."""

    def gullible(model, logits, text, drafts, result):  # type: ignore[no-untyped-def]
        return [*drafts, int(logits[-1].argmax())]

    monkeypatch.setattr(decode, "_choose", gullible)
    spoilt = [generate(trained_decoder(), prompt, max_new_tokens=NEW, heads=4).tokens for prompt in PROMPTS[:5]]
    assert spoilt != texts(runs[1])[:5]


class ShakyDecoder(HeadsLlama):
    """A decoder whose logits depend on the width of the pass, a few times more than real ones do."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        exact = super().logits(hidden)
        generator = torch.Generator().manual_seed(exact.shape[-2])
        scale = exact.abs().amax(-1, keepdim=True)
        return exact + 5e-6 * scale * torch.randn(exact.shape, generator=generator)


@pytest.mark.parametrize("margin", [decode.TIE_MARGIN, 0.0])
def test_near_ties_are_decided_alike(monkeypatch: pytest.MonkeyPatch, margin: float) -> None:
    """Every token has a twin whose logit is nearly the same, the hardest case. Control: without the margin."""
    weights = dict(trained_weights())
    unembedding = weights["lm_head.weight"].clone()
    unembedding[1::2] = unembedding[::2] * (1 + 1e-7)
    model = ShakyDecoder(CONFIG, weights | {"lm_head.weight": unembedding})
    monkeypatch.setattr(decode, "TIE_MARGIN", margin)
    plain, speculative = (
        [generate(model, prompt, max_new_tokens=NEW, heads=k) for prompt in PROMPTS[:10]] for k in (1, 4)
    )
    if margin:
        assert texts(plain) == texts(speculative)
        assert sum(generation.ties for generation in plain) > 100
    else:
        assert texts(plain) != texts(speculative)


def test_ties_are_rare_in_a_trained_model(runs: dict[int, list[Generation]]) -> None:
    for generations in runs.values():
        assert sum(generation.ties for generation in generations) < 0.01 * NEW * len(PROMPTS)


def test_random_models_of_any_number_of_heads() -> None:
    """Nothing is accepted here, so every pass rolls back."""
    model = HeadsLlama(CONFIG, random_weights(seed=9))
    for prompt in PROMPTS[:5]:
        plain, speculative = (generate(model, prompt, max_new_tokens=30, heads=k) for k in (1, 4))
        assert plain.tokens == speculative.tokens


@pytest.mark.parametrize("heads", [1, 4])
def test_decoding_ends_with_the_document(runs: dict[int, list[Generation]], heads: int) -> None:
    for prompt, plain in zip(PROMPTS[:8], runs[1], strict=False):
        eod = plain.tokens[20]
        generation = generate(trained_decoder(), prompt, max_new_tokens=NEW, heads=heads, ends=[eod])
        assert generation.tokens == plain.tokens[: plain.tokens.index(eod) + 1]
        assert sum(generation.accepted_together) == len(generation.tokens)


def test_a_draft_behind_the_end_is_not_accepted(runs: dict[int, list[Generation]]) -> None:
    """Wherever the text ends, and by the first of several ends: draft k is in it where its pass gave so many tokens."""
    cut = 0
    for prompt, whole in zip(PROMPTS[:6], runs[4], strict=False):
        for place in range(4, 24):
            ends = {whole.tokens[place], whole.tokens[place + 1], VOCAB + 1}
            end = next(place for place, token in enumerate(whole.tokens) if token in ends)
            generation = generate(trained_decoder(), prompt, max_new_tokens=NEW, heads=4, ends=ends)
            assert generation.tokens == whole.tokens[: end + 1]
            given = generation.accepted_together[1:]
            bonus = [count - 1 for count in given[:-1]]
            for head, accepted in enumerate(generation.accepted):
                sure = sum(count > head for count in bonus)
                assert sure <= accepted <= sure + (bool(given) and given[-1] > head)
            cut += given != whole.accepted_together[1 : len(given) + 1]
    assert cut > 10, "the test must see ends among accepted drafts"


@pytest.mark.parametrize("count", range(1, 8))
def test_exactly_as_many_tokens_as_asked_for(runs: dict[int, list[Generation]], count: int) -> None:
    generation = generate(trained_decoder(), PROMPTS[1], max_new_tokens=count, heads=4)
    assert generation.tokens == runs[1][1].tokens[:count]


def test_up_to_the_last_position_of_the_context() -> None:
    prompt = PROMPTS[3]
    room = CONFIG.context - len(prompt)
    plain, fast = (generate(trained_decoder(), prompt, max_new_tokens=room, heads=k) for k in (1, 4))
    assert plain.tokens == fast.tokens
    with pytest.raises(ConfigError, match=rf"--max-new-tokens={room + 1}: .* context of 128. Set it to {room} or less"):
        generate(trained_decoder(), prompt, max_new_tokens=room + 1, heads=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "--heads=0: the model has heads 1 to 4"),
        ({"heads": 5}, "--heads=5: the model has heads 1 to 4"),
        ({"max_new_tokens": 0}, "--max-new-tokens=0"),
        ({"prompt": []}, "holds no token"),
        ({"prompt": [1] * 128}, "Shorten the prompt"),
    ],
)
def test_what_cannot_be_decoded_is_refused(options: dict, message: str) -> None:  # type: ignore[type-arg]
    arguments = {"prompt": [1, 2], "max_new_tokens": 4, "heads": 2} | options
    with pytest.raises(ConfigError, match=message):
        generate(trained_decoder(), arguments.pop("prompt"), **arguments)


def test_comparison_and_its_table(runs: dict[int, list[Generation]]) -> None:
    results = compare(trained_decoder(), PROMPTS[:6], max_new_tokens=NEW, heads=(2, 4), ends=(), progress=False)
    assert [result.heads for result in results] == [1, 2, 4]
    assert all(result.identical for result in results)
    assert (results[0].speedup, results[0].tokens_per_forward, results[0].acceptance) == (1.0, 1.0, [])
    four = results[-1]
    assert texts(four.generations) == texts(runs[4])[:6]
    assert four.tokens_per_forward == 6 * (NEW - 1) / sum(generation.forwards for generation in four.generations)
    assert 1 < four.tokens_per_forward < 4
    assert four.acceptance == sorted(four.acceptance, reverse=True)
    figures = report(results, trained_decoder(), command="x")
    assert (figures["prompts"], figures["heads_used"], figures["identical"]) == (6, 4, True)
    assert figures["by_heads"][1]["forwards"] == [generation.forwards for generation in runs[2][:6]]
    assert len(table(results).splitlines()) == 4
    four.generations[0].tokens[3] = VOCAB
    four.identical = False
    assert "DIFFERS" in table(results)
