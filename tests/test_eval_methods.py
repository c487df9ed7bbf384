"""What each method does to the logits, against NumPy; and the constant of yes-bias."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evals import GUIDANCE, Squares, methods, ran, squares
from guided import forced, ids, open_vlm
from numpy.typing import NDArray
from prompts import picture
from tiny_llava import TinyPair

from cmg_gguf import GuidanceError, GuidedVLM, Reply, Sampling
from cmg_gguf.answer.logits import combine
from cmg_gguf.evaluation.earlier import FirstLogit, Residual
from cmg_gguf.evaluation.method import Method, Question
from cmg_gguf.evaluation.methods import METHODS, chosen
from cmg_gguf.evaluation.records import Record
from cmg_gguf.evaluation.relatives import M3id, Vcd, noise_share, noised
from cmg_gguf.evaluation.run import Run
from cmg_gguf.evaluation.task import Item
from cmg_gguf.evaluation.yes_bias import fitted, fitted_bias
from cmg_gguf.evaluation.yes_no import YesNoTokens
from cmg_gguf.guidance import PLAIN
from cmg_gguf.request import Request

N = 6
PROMPT = "Is there a dog?"


@pytest.fixture(scope="module")
def vlm(pair: TinyPair) -> Iterator[GuidedVLM]:
    with open_vlm(pair) as opened:
        yield opened


@pytest.fixture(scope="module")
def question(vlm: GuidedVLM) -> Question:
    item = Item("a", "a.png", PROMPT, {"label": "yes"}, max_tokens=N)
    return Question(item, picture(0), 7, 8, 56, YesNoTokens.of(vlm.model))


def answer(vlm: GuidedVLM, question: Question, request: Request) -> Reply:
    assert (request.prompt, request.max_tokens) == (question.item.prompt, N)
    return vlm.generate(request)


def asked(vlm: GuidedVLM, question: Question, name: str) -> Reply:
    (method,) = chosen([name], GUIDANCE)
    return answer(vlm, question, method.request(question))


def test_guidance_that_is_none_is_refused_before_anything_is_run() -> None:
    wrong: Any = 1.0
    with pytest.raises(GuidanceError, match=r"guidance=1\.0 is no Guidance"):
        chosen(["cmg"], wrong)


def test_greedy_is_plain_decoding(vlm: GuidedVLM, question: Question) -> None:
    plain = vlm.generate(PROMPT, [picture(0)], guidance=PLAIN, max_tokens=N)
    assert ids(asked(vlm, question, "greedy")) == ids(plain)


def test_cmg_is_guidance_as_it_was_given(vlm: GuidedVLM, question: Question) -> None:
    guided = vlm.generate(PROMPT, [picture(0)], guidance=GUIDANCE, max_tokens=N)
    assert ids(asked(vlm, question, "cmg")) == ids(guided)
    assert guided.n_changed > 0


def test_the_cut_changes_sampling_and_never_greedy(vlm: GuidedVLM, question: Question) -> None:
    request = METHODS["cut"](GUIDANCE).request(question)
    greedy = answer(vlm, question, replace(request, sampling=Sampling()))
    assert ids(greedy) == ids(asked(vlm, question, "greedy"))
    replies = [
        [asked(vlm, replace(question, seed=seed), name) for seed in range(40)]
        for name in ("sample", "cut")
    ]
    for reply in replies[1]:
        rows = forced(vlm, ids(reply), PROMPT, [picture(0)])
        for row, token in zip(rows, ids(reply), strict=True):
            assert row[token] >= row.max() + math.log(GUIDANCE.beta)
    kinds = [{ids(reply)[0] for reply in found} for found in replies]
    assert len(kinds[0]) > len(kinds[1]) > 1


@pytest.mark.parametrize("name", ["vcd", "no-image", "m3id", "icd"])
def test_a_relative_is_its_formula(name: str, vlm: GuidedVLM, question: Question) -> None:
    reply = asked(vlm, question, name)
    prompts = {
        "vcd": (PROMPT, [noised(picture(0), 500, size=56, seed=question.image_seed)]),
        "no-image": (PROMPT, []),
        "m3id": (PROMPT, []),
        "icd": (f"You are a confused object detector. {PROMPT}", [picture(0)]),
    }
    original = forced(vlm, ids(reply), PROMPT, [picture(0)])
    degraded = forced(vlm, ids(reply), *prompts[name])
    for t, (l_o, l_d, token) in enumerate(zip(original, degraded, ids(reply), strict=True), 1):
        g = math.exp(-0.02 * t)
        alpha = (1 - g) / g if name == "m3id" else 1.0
        assert token == combine(l_o, l_d, alpha=alpha, beta=GUIDANCE.beta).argmax()


def test_first_logit_is_its_formula(vlm: GuidedVLM, question: Question) -> None:
    longer = replace(question, item=replace(question.item, max_tokens=12))
    boosted = FirstLogit(alpha=40.0, beta=0.01)
    reply = vlm.generate(boosted.request(longer))
    rows = forced(vlm, ids(reply), PROMPT, [picture(0)])
    for t, (row, token) in enumerate(zip(rows, ids(reply), strict=True)):
        score = row + 40 * 0.3 * (1 - math.exp(-0.05 * t)) * rows[0]
        plausible = row >= row.max() + math.log(0.01)
        assert token == np.where(plausible, score, -np.inf).argmax()
    assert ids(reply) != ids(vlm.generate(METHODS["greedy"](GUIDANCE).request(longer)))
    assert FirstLogit().weight(10**6) == pytest.approx(0.3)


def residual(rows: NDArray[np.float64], method: Residual) -> NDArray[np.float64]:
    """The score of the last row, word by word from the formula."""
    *earlier, row = rows[-method.window - 1 :]
    if not earlier:
        return np.asarray(row)
    candidates = np.argsort(-row)[: method.candidates]
    log_p = [(r - np.log(np.exp(r).sum()))[candidates] for r in earlier]

    def kl(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
        return float((p * np.log(p / q)).sum())

    def jsd(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        p, q = (np.exp(x) / np.exp(x).sum() for x in (a, b))
        return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2

    moves = [jsd(a, b) for a, b in itertools.pairwise(log_p)]
    bottom = 1 + moves.index(min(moves)) if moves else 0
    confidence = [-x.mean() for x in log_p[bottom:]]
    r = sum(c * x for c, x in zip(confidence, earlier[bottom:], strict=True)) / sum(confidence)
    score = (row + method.alpha * r) / (1 + method.alpha)
    cut: NDArray[np.float64]
    cut = np.where(row >= row.max() + math.log(method.beta), score, -np.inf)
    return cut


@pytest.mark.parametrize("window", [2, 3, 32])
def test_residual_decoding_is_its_formula(window: int, vlm: GuidedVLM, question: Question) -> None:
    method = Residual(alpha=3.0, beta=0.01, window=window, candidates=20)
    longer = replace(question, item=replace(question.item, max_tokens=12))
    reply = vlm.generate(method.request(longer))
    rows = np.array(forced(vlm, ids(reply), PROMPT, [picture(0)]), np.float64)
    for t, token in enumerate(ids(reply)):
        assert token == residual(rows[: t + 1], method).argmax()
    assert ids(reply) != ids(vlm.generate(METHODS["greedy"](GUIDANCE).request(longer)))


@pytest.mark.parametrize("method", [FirstLogit(), Residual()])
def test_a_control_remembers_one_answer_alone(
    method: Method, vlm: GuidedVLM, question: Question
) -> None:
    replies = [answer(vlm, question, method.request(question)) for _ in range(2)]
    assert ids(replies[0]) == ids(replies[1])


@pytest.mark.parametrize("method", [FirstLogit(alpha=0.0), Residual(alpha=0.0)])
def test_without_strength_a_control_is_plain_decoding(
    method: Method, vlm: GuidedVLM, question: Question
) -> None:
    reply = answer(vlm, question, method.request(question))
    assert ids(reply) == ids(asked(vlm, question, "greedy"))


def test_m3id_grows_from_the_first_token() -> None:
    weights = [M3id().strength(n) for n in range(40)]
    assert weights[0] == pytest.approx((1 - math.exp(-0.02)) / math.exp(-0.02))
    assert weights[33] < 1 < weights[34]


def test_vcd_noise_follows_its_schedule() -> None:
    kept = 1.0
    for t in range(501):
        x = -6 + 12 * t / 999
        kept *= 1 - (1 / (1 + math.exp(-x)) * (0.5e-2 - 1e-5) + 1e-5)
    image, noise = noise_share(500)
    assert (image**2, noise**2) == pytest.approx((kept, 1 - kept))
    assert noise_share(0)[1] < 0.01
    assert noise_share(999)[1] > 0.95


def test_vcd_noises_the_image_as_the_encoder_sees_it() -> None:
    grey = np.full((300, 600, 3), 116, np.uint8)
    found = noised(grey, 500, size=336, seed=1)
    assert found.shape == (168, 336, 3)
    image, noise = noise_share(500)
    for channel, (mean, std) in enumerate([(0.4815, 0.2686), (0.4578, 0.2613), (0.4082, 0.2758)]):
        values = found[:, :, channel] / 255
        assert values.mean() == pytest.approx(image * (116 / 255 - mean) + mean, abs=0.01)
        assert values.std() == pytest.approx(noise * std, rel=0.03)
    assert np.array_equal(found, noised(grey, 500, size=336, seed=1))
    assert not np.array_equal(found, noised(grey, 500, size=336, seed=2))
    small = noised(np.zeros((1, 999, 3), np.uint8), 0, size=10, seed=0)
    assert small.shape == (1, 10, 3)


def test_all_questions_about_an_image_see_the_same_noise(question: Question) -> None:
    def image(other: Question) -> NDArray[np.uint8]:
        contrast = Vcd().request(other).contrast
        assert contrast is not None
        return np.asarray(contrast.images[0])

    assert np.array_equal(image(question), image(replace(question, seed=99)))


# --- yes-bias ---


def test_yes_and_no_tokens_are_found_in_any_spelling(vlm: GuidedVLM) -> None:
    words = YesNoTokens.of(vlm.model)
    texts = [{vlm.model.token_bytes(int(t)) for t in tokens} for tokens in (words.yes, words.no)]
    assert {b" yes", b" Yes"} <= texts[0] <= {b" yes", b" Yes", b"yes", b"Yes"}
    assert {b" no", b" No"} <= texts[1] <= {b" no", b" No", b"no", b"No"}
    scores = np.random.default_rng(0).standard_normal(vlm.model.n_vocab).astype(np.float32) * 3
    yes, no = (np.exp(scores[t].astype(np.float64)).sum() for t in (words.yes, words.no))
    assert words.margin(scores) == pytest.approx(math.log(yes / no))
    rest = np.delete(scores, words.yes)
    assert words.lead(scores) == pytest.approx(scores[words.yes].max() - rest.max())


@pytest.mark.parametrize(
    ("leads", "share", "bias"),
    [
        ([-1.0, -3.0, 2.0, 4.0], 0.5, 0.0),
        ([-1.0, -3.0, 2.0, 4.0], 0.75, 2.0),
        ([-1.0, -3.0, 2.0, 4.0], 0.25, -3.0),
        ([-1.0, -3.0, 2.0, 4.0], 1.0, 4.0),
        ([-1.0, -3.0, 2.0, 4.0], 0.0, -5.0),
        ([5.0, 6.0], 1.0, 0.0),
        ([-5.0, -6.0], 0.0, 0.0),
        ([], 0.5, 0.0),
    ],
)
def test_the_constant_gives_the_share_of_yes(leads: list[float], share: float, bias: float) -> None:
    assert fitted_bias(leads, share) == pytest.approx(bias)
    if leads:
        assert sum(lead + bias > 0 for lead in leads) == round(share * len(leads))


def test_each_half_is_fitted_on_the_other() -> None:
    items = [Item(str(i), f"{i}.png", "?", cluster=f"c{i}") for i in range(40)]
    leads = np.random.default_rng(0).standard_normal(40)
    plain = {
        (item.id, "greedy"): Record(item=item.id, method="greedy", yes_lead=float(lead))
        for item, lead in zip(items, leads, strict=True)
    }
    guided = {
        (item.id, "cmg"): Record(item=item.id, method="cmg", says_yes=i < 30)
        for i, item in enumerate(items)
    }
    biases = fitted(items, {**plain, **guided}, 0)
    changed = {**plain, **guided}
    from cmg_gguf.evaluation.items import balanced_parts

    half = balanced_parts(0, items)
    assert sorted(half.values()) == [0] * 20 + [1] * 20
    for item in items:
        if half[item.id] == 0:
            key = item.id, "greedy"
            changed[key] = replace(changed[key], yes_lead=100.0)
    assert fitted(items, changed, 0)[0] == biases[0]
    assert fitted(items, changed, 0)[1] != biases[1]


@pytest.fixture(scope="module")
def run(pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("yes")
    task: Squares = squares(home / "pictures", n=8)
    return ran(task, pair, "greedy,cmg,yes-bias", home / "run")


def test_yes_bias_is_greedy_with_that_constant(run: Run, vlm: GuidedVLM) -> None:
    found = {record.key: record for record in run.records}
    words = YesNoTokens.of(vlm.model)
    for item in run.items:
        record, plain = found[item.id, "yes-bias"], found[item.id, "greedy"]
        if record.problem is not None:
            continue
        assert record.yes_lead is not None
        assert plain.yes_lead is not None
        bias = record.yes_lead - plain.yes_lead

        def biased(
            tokens: NDArray[np.int32], logits: NDArray[np.float32], bias: float = bias
        ) -> NDArray[np.float32]:
            if len(tokens) == 0:
                logits = logits.copy()
                logits[words.yes] += bias
            return logits

        reply = vlm.generate(
            item.prompt,
            [str(item.image)],
            guidance=PLAIN,
            max_tokens=item.max_tokens,
            logits_processors=[biased],
        )
        assert record.answer == reply.text
        assert record.says_yes == (reply.tokens[0].id in words.yes)
        assert record.changed == (record.answer != plain.answer)


def test_margins_are_those_of_the_methods_own_scores(run: Run, vlm: GuidedVLM) -> None:
    words = YesNoTokens.of(vlm.model)
    for item in run.items[:3]:
        for name, guidance in (("greedy", PLAIN), ("cmg", replace(GUIDANCE, beta=0.0))):
            reply = vlm.generate(
                item.prompt, [str(item.image)], guidance=guidance, max_tokens=1, n_scores=1
            )
            record = next(r for r in run.records if r.key == (item.id, name))
            assert record.yes_margin == pytest.approx(words.margin(reply.scores[0]), abs=1e-3)


def test_a_method_of_ones_own_is_a_small_class(
    pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Warm(Method):
        temperature: float = 0.5
        name: str = "warm"

        def request(self, question: Question) -> Request:
            return question.ask(sampling=Sampling(temperature=self.temperature, seed=question.seed))

    monkeypatch.setitem(METHODS, "warm", lambda guidance: Warm())
    assert methods("warm")[0].settings() == {"method": "Warm", "temperature": 0.5}
    run = ran(squares(tmp_path / "pictures", n=1), pair, "warm", tmp_path / "run")
    assert [r.method for r in run.records if r.answer] == ["warm"] * 3
