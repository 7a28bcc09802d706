"""Reward models against definitions written out in loops: scores, losses, mixtures, the gate, and what a killed run leaves."""
import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

from minillama import checkpoint, reward
from minillama.chat import Message, encode_dialogue, encode_prompt
from minillama.config import MARGINS, LlamaConfig, RewardConfig, TrainConfig
from minillama.data.preferences import STRENGTHS, Pair, read_pairs
from minillama.data.sources import write_jsonl
from minillama.model import Llama
from minillama.reward import Gated, PairBatches, RewardModel, encode, encode_pair, gated, mix, ranking_loss, reward_loss, stack
from minillama.tokenizer import Tokenizer
from minillama.trainer import accumulate

CONFIG = LlamaConfig(dim=24, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=330, multiple_of=8, max_seq_len=96)
TEXTS = [f"Line {i} of the long book tells of {i % 7} boats. " * (1 + i % 4) for i in range(120)]
CPU = torch.device("cpu")
# (tokens, start of the answer): ragged in both, an answer of one token, one of no token
ROWS = [([1, 5, 9, 13, 17, 21, 25, 2], 3), ([1, 30, 31, 2], 3), ([1, 7, 8, 300, 40, 41, 42, 43, 44, 45, 46, 9, 2], 5), ([1, 33, 34, 35, 36], 5),
        ([1, 9, 9, 9, 7, 2], 2)]  # fmt: skip


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def build(evidence: bool, seed: int = 3) -> RewardModel:
    """A reward model whose every weight matters: `wanted` is not 0, and surprises are of all sizes."""
    model = RewardModel(CONFIG, evidence).init_weights(seed).eval()
    with torch.no_grad():
        model.output.weight.mul_(3.0)
        model.score.bias.fill_(-0.4)
        if evidence:
            model.gain.fill_(0.7)
            model.wanted.bias.fill_(0.2)
    return model


def surprise(model: RewardModel, ids: list[int], t: int) -> float:
    """How far token t's log-probability is more than a nat below the one that the model expects there, 6 nats at most."""
    with torch.no_grad():
        logp = model(torch.tensor([ids[:t]]))[0, -1].log_softmax(-1).tolist()
    expected = sum(math.exp(x) * x for x in logp)
    return min(0.0, max(-6.0, logp[ids[t]] - expected + 1.0))


def by_hand(model: RewardModel, ids: list[int], start: int) -> float:
    """The reward of one row, from its definition in loops."""
    with torch.no_grad():
        states = model.features(torch.tensor([ids]))[0]
        total = float(model.score(states[len(ids) - 1]))
        if model.evidence:
            total += float(model.gain) * sum(surprise(model, ids, t) for t in range(start, len(ids)))
            keys = model.match(model.tok_embeddings(torch.tensor(ids)))
            for i in range(start):
                cosines = [float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in range(start, len(ids))]
                total += math.tanh(float(model.wanted(states[i]))) * max(cosines, default=-1.0)
    return total


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(TEXTS, 330, tmp_path_factory.mktemp("tok") / "t.model")


@pytest.fixture(scope="module")
def chat(tokenizer, tmp_path_factory):
    """A folder with a chat checkpoint."""
    path = tmp_path_factory.mktemp("chat") / "sft"
    checkpoint.save(Llama(CONFIG).init_weights(1), tokenizer, path)
    return str(path)


@pytest.fixture(scope="module")
def pairs():
    """Pairs of all strengths, ragged, of which some have no safety labels."""
    labels = [(True, False), (None, None), (True, True), (False, False), (None, True)]
    make = lambda i: Pair(user(f"Line {i}" * (1 + i % 3)), f"Boats {i}. " * (1 + i % 2) + "Yes.", "No." * (1 + i % 4), i % 4, *labels[i % 5])  # noqa: E731
    return [make(i) for i in range(20)]


# ---- the score --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", [False, True])
def test_rewards_equal_the_definition_row_by_row(evidence):
    """Guards against a score read at the padding, and evidence summed over the wrong tokens or the wrong row."""
    model = build(evidence)
    with torch.no_grad():
        rows = [*ROWS, ([1, 30, 31, int(model(torch.tensor([[1, 30, 31]]))[0, -1].argmax()), 40], 3)]
        batch = model.rewards(**stack(rows))
        alone = torch.cat([model.rewards(**stack([row])) for row in rows])
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(batch, torch.tensor([by_hand(model, *row) for row in rows]), rtol=0, atol=1e-5)
    assert batch.std() > 0.1
    parts = [surprise(model, ids, t) for ids, start in rows for t in range(start, len(ids))]
    assert -6.0 in parts and 0.0 in parts and sum(-6 < x < 0 for x in parts) > 3  # or the bounds are not tested


@pytest.mark.parametrize("evidence", [False, True])
def test_the_text_loss_is_that_of_the_answer_alone(evidence):
    """Guards against a language-modelling loss of the prompt, of padding, or that weighs a long answer more; the reward beside it stays the same."""
    model = build(evidence)
    with torch.no_grad():
        rewards, nll = model.rewards(**stack(ROWS), text=True)
        torch.testing.assert_close(rewards, model.rewards(**stack(ROWS)), rtol=0, atol=1e-6)
        likely = lambda ids, start: model(torch.tensor([ids]))[0, start - 1 : -1].double().log_softmax(-1)[range(len(ids) - start), ids[start:]]  # noqa: E731
        want = [-likely(ids, start).sum() / max(1, len(ids) - start) for ids, start in ROWS]
    torch.testing.assert_close(nll.double(), torch.stack(want), rtol=0, atol=1e-5)


def test_the_text_loss_keeps_what_the_chat_model_knows(chat, tokenizer):
    """Guards against a weight that does nothing: ranking alone makes the chosen answers less likely under the model than with it."""
    pairs, model = trivial(), {}
    rows = [reward.encode_pair(tokenizer, p, 60)[0] for p in pairs]
    for weight in (0.0, 1.0):
        model[weight] = reward.from_chat(checkpoint.load(chat)[0], True).train()
        optimizer = torch.optim.AdamW(model[weight].parameters(), 3e-3)
        for step in range(12):
            accumulate(model[weight], PairBatches(pairs, tokenizer, 60, 8)(step), reward_loss(0.0, weight), CPU)
            optimizer.step(), optimizer.zero_grad()
    with torch.no_grad():
        forgot, kept = (float(model[w].eval().rewards(**stack(rows), text=True)[1].mean()) for w in (0.0, 1.0))
    assert kept < forgot - 0.5


@pytest.mark.parametrize("evidence", [False, True])
def test_rewards_do_not_depend_on_padding(evidence):
    """Guards against evidence that counts padding, or a match with it: other widths, other padding tokens, other neighbours, another order."""
    model = build(evidence)
    x = stack(ROWS)
    wide = torch.cat([x["tokens"], torch.randint(0, 330, (len(ROWS), 20), generator=torch.Generator().manual_seed(0))], dim=1)
    beyond = torch.arange(wide.shape[1]) >= x["lengths"][:, None]
    other = torch.where(beyond, (wide + 77) % 330, wide)
    order = [3, 0, 4, 1, 2]
    with torch.no_grad():
        want = model.rewards(**x)
        torch.testing.assert_close(model.rewards(other, x["starts"], x["lengths"]), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.rewards(**stack([ROWS[i] for i in order])), want[order], rtol=0, atol=1e-5)


def test_the_score_is_the_head_at_the_last_real_token():
    """Guards against reading one token early or late: `values`, which a critic reads at every position, agrees there and nowhere else."""
    model = build(False)
    x = stack(ROWS)
    with torch.no_grad():
        values, rewards = model.values(x["tokens"]), model.rewards(**x)
        shorter = model.rewards(**stack([(ids[:-1], start) for ids, start in ROWS[:3]]))
    assert values.shape == x["tokens"].shape
    for i, (ids, _) in enumerate(ROWS):
        gaps = (values[i] - rewards[i]).abs()
        assert gaps[len(ids) - 1] < 1e-6 and gaps.sort().values[1] > 1e-3
    torch.testing.assert_close(shorter, torch.stack([values[i, len(ROWS[i][0]) - 2] for i in range(3)]), rtol=0, atol=1e-5)


def test_rewards_in_bf16_are_those_in_fp32():
    """Guards against a reward model with evidence that cannot be trained with train.bf16."""
    model = build(True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = model.rewards(**stack(ROWS))
    torch.testing.assert_close(half.float(), torch.tensor([by_hand(model, *row) for row in ROWS]), rtol=0.1, atol=1.0)


def test_surprise_is_bounded_and_sure_tokens_cannot_raise_it():
    """Guards against a sum of log-probabilities, which a long answer of likely tokens or one odd token would rule."""
    model = build(True)
    with torch.no_grad():
        model.score.weight.zero_(), model.score.bias.zero_(), model.wanted.weight.zero_(), model.wanted.bias.zero_(), model.gain.fill_(1.0)
        start = [1, 5, 9, 13]
        one = torch.cat([model.rewards(**stack([([*start, t], 4)])) for t in range(330)])
        assert one.tolist() == pytest.approx([surprise(model, [*start, t], 4) for t in range(330)], abs=1e-5)
        assert (one == -6).any() and (one == 0).any() and ((one > -6) & (one < 0)).any()  # both bounds are met
        row = [*start, 50, 60]
        before = float(model.rewards(**stack([(row, 4)])))
        assert before < -1
        for _ in range(12):  # the likeliest token is never a surprise
            row = [*row, int(model(torch.tensor([row]))[0, -1].argmax())]
            assert float(model.rewards(**stack([(row, 4)]))) == pytest.approx(before, abs=1e-5)
        odd = int(model(torch.tensor([row]))[0, -1].argmin())
        assert float(model.rewards(**stack([([*row, odd], 4)]))) == pytest.approx(before + surprise(model, [*row, odd], len(row)), abs=1e-5)


def test_a_reward_model_starts_as_the_chat_model():
    """Guards against a trunk that is drawn anew, a head that depends on what ran before, and a draw that disturbs the caller's random state."""
    chat = Llama(CONFIG).init_weights(5)
    assert torch.equal(reward.from_chat(chat, False).score.weight, reward.from_chat(chat, False, 0).score.weight)
    for evidence in (False, True):
        torch.manual_seed(11)
        state = torch.get_rng_state()
        model = reward.from_chat(chat, evidence, seed=4)
        assert torch.equal(torch.get_rng_state(), state)
        own = model.state_dict()
        assert all(torch.equal(own[name], w) for name, w in chat.state_dict().items())
        tokens = torch.tensor([ROWS[2][0]])
        torch.testing.assert_close(model(tokens), chat(tokens), rtol=0, atol=0)
        torch.manual_seed(12)
        assert all(torch.equal(own[name], w) for name, w in reward.from_chat(chat, evidence, seed=4).state_dict().items())
        assert not torch.equal(own["score.weight"], reward.from_chat(chat, evidence, seed=5).state_dict()["score.weight"])
        assert own["score.weight"].abs().max() > 0.01


def test_heads_are_drawn_by_their_definition():
    """Guards against heads of another scale, or one stream for both; what the evidence begins with is 0.3 of the surprise and no uptake."""
    draw = lambda seed, name, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(crc32(f"{seed}:{name}.weight".encode())))  # noqa: E731
    for seed in (0, 4):
        model = RewardModel(CONFIG, True)
        if seed:
            model.init_heads(seed)
        torch.testing.assert_close(model.score.weight.detach(), draw(seed, "score", 1, 24) / 5, rtol=0, atol=1e-6)  # std (24 + 1) ** -0.5
        torch.testing.assert_close(model.match.weight.detach(), draw(seed, "match", 32, 24) / 72**0.5, rtol=0, atol=1e-6)
        assert model.gain.tolist() == pytest.approx([0.3]) and not any(p.any() for p in (model.score.bias, model.wanted.weight, model.wanted.bias))


# ---- the loss ---------------------------------------------------------------------------------------------------------------


def test_the_ranking_loss_is_its_closed_form():
    """Guards against a flipped sign and a margin on the wrong side: -log(1 / (1 + exp(-(c - r - m)))) in numpy, and finite where exp is not."""
    rng = np.random.default_rng(0)
    c, r, m = rng.normal(size=50) * 3, rng.normal(size=50) * 3, rng.choice([0, 1 / 3, 2 / 3, 1, 2, 3], size=50)
    want = -np.log(1 / (1 + np.exp(-(c - r - m))))
    torch.testing.assert_close(ranking_loss(*map(torch.from_numpy, (c, r, m))), torch.from_numpy(want), rtol=1e-9, atol=1e-9)
    far = ranking_loss(torch.tensor([-300.0, 300.0]), torch.zeros(2), torch.zeros(2))
    assert far.tolist() == [300.0, 0.0]


@pytest.mark.parametrize("margin", ["none", "small", "large"])
def test_the_loss_of_a_batch_is_trls_mean(margin, pairs, tokenizer):
    """Guards against sides that are mixed up and a mean over rows: TRL's formula -logsigmoid(chosen - rejected - margin).mean() on rewards by hand."""
    model = build(True)
    batches = PairBatches(pairs, tokenizer, 60, 7, margin=margin)
    (batch,) = batches(1)
    total, count = reward_loss()(model, batch)
    rows = [(ids[:n].tolist(), int(s)) for ids, n, s in zip(batch["tokens"], batch["lengths"], batch["starts"], strict=True)]
    by_row = {tuple(ids): pair for a, b, _, pair in batches.rows for ids in (a[0], b[0])}
    chosen, rejected = rows[:7], rows[7:]
    scale = {"none": (0, 0, 0, 0), "small": (0, 1 / 3, 2 / 3, 1), "large": (0, 1, 2, 3)}[margin]  # table 27, from negligibly to significantly better
    want = []
    for a, b in zip(chosen, rejected, strict=True):
        pair = by_row[tuple(a[0])]
        assert pair is by_row[tuple(b[0])]
        assert tokenizer.decode(a[0][a[1] :]).strip() == pair.chosen.strip() and tokenizer.decode(b[0][b[1] :]).strip() == pair.rejected.strip()
        want.append(-torch.nn.functional.logsigmoid(torch.tensor(by_hand(model, *a) - by_hand(model, *b) - scale[pair.strength])))
    assert int(count) == 7
    torch.testing.assert_close(total / count, torch.stack(want).mean(), rtol=0, atol=1e-5)


def test_margins_follow_the_strengths(tokenizer):
    """Guards against the table read backwards: rewards that are equal lose softplus(margin), most for "significantly better"."""
    assert STRENGTHS[0].startswith("negligibly") and STRENGTHS[3].startswith("significantly")
    model = build(False)
    with torch.no_grad():
        model.score.weight.zero_()
    for margin, table in (("small", (0, 1 / 3, 2 / 3, 1)), ("large", (0, 1, 2, 3)), ("none", (0, 0, 0, 0))):
        assert MARGINS[margin] == pytest.approx(table)
        for strength, m in enumerate(table):
            (batch,) = PairBatches([Pair(user("Who?"), "You.", "Me.", strength)], tokenizer, 60, 1, margin=margin)(0)
            assert batch["margins"].tolist() == pytest.approx([m])
            assert float(reward_loss()(model, batch)[0].detach()) == pytest.approx(math.log1p(math.exp(m)), abs=1e-6)


def test_the_auxiliary_loss_counts_known_labels_only(pairs, tokenizer):
    """Guards against unknown labels that are trained as unsafe, and labels that are given to the other side."""
    model = build(False)
    batches = PairBatches(pairs, tokenizer, 60, 20)
    (batch,) = batches(0)
    assert {-1.0, 0.0, 1.0} <= set(batch["safe"].tolist())
    plain, n = reward_loss()(model, batch)
    both, m = reward_loss(0.8)(model, batch)
    want = 0.0
    for a, b, _, pair in batches.rows:
        for row, safe in ((a, pair.chosen_safe), (b, pair.rejected_safe)):
            if safe is not None:
                p = 1 / (1 + math.exp(-by_hand(model, *row)))
                want -= 0.8 * 0.5 * math.log(p if safe else 1 - p)
    assert n == m == 20 and want > 1
    assert float((both - plain).detach()) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("evidence", [False, True])
def test_the_gradient_does_not_depend_on_the_micro_batch(evidence, pairs, tokenizer):
    """Guards against a mean of means, and against padding that reaches the gradient."""

    def gradient(micro):
        model = build(evidence).train()
        batches = PairBatches(pairs, tokenizer, 60, 8, seed=2, micro_batch=micro)(3)
        loss, n = accumulate(model, batches, reward_loss(0.5), CPU)
        return loss, n, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), batches

    loss, n, grad, _ = gradient(0)
    for micro, sizes in ((1, [1] * 8), (3, [3, 3, 2]), (5, [5, 3])):
        loss_m, n_m, grad_m, batches = gradient(micro)
        assert [len(b["margins"]) for b in batches] == sizes and len({b["tokens"].shape[1] for b in batches}) > 1
        assert n_m == n == 8 and loss_m == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(grad_m, grad, rtol=0, atol=3e-6 * max(1.0, float(grad.abs().max())))  # sums of eight pairs in fp32, in other orders
    assert grad.abs().max() > 1e-2


# ---- rows and batches -------------------------------------------------------------------------------------------------------


def visited(batches: PairBatches, steps) -> list[Pair]:
    """The pairs of some steps, found by the tokens of both sides."""
    by_tokens = {(tuple(a[0]), tuple(b[0])): i for i, (a, b, _, _) in enumerate(batches.rows)}
    found = []
    for step in steps:
        for batch in batches(step):
            rows = [tuple(ids[:n].tolist()) for ids, n in zip(batch["tokens"], batch["lengths"], strict=True)]
            half = len(rows) // 2
            found += [by_tokens[a, b] for a, b in zip(rows[:half], rows[half:], strict=True)]
    return found


def test_pair_batches_are_a_pure_function_of_seed_and_step(pairs, tokenizer):
    """Guards against hidden state, which a resumed run would not have, and against an epoch that repeats a pair and leaves out another."""
    make = lambda size, seed=5, micro=0: PairBatches(pairs, tokenizer, 60, size, seed, micro)  # noqa: E731
    batches = make(5, micro=2)
    assert batches.steps_per_epoch == 4 and batches.dropped == 0
    late = make(5, micro=2)(6)
    for step in range(7):
        last = batches(step)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(last, late, strict=True) for k in a)
    epochs = [visited(batches, range(first, first + 4)) for first in (0, 4)]
    assert all(sorted(e) == list(range(20)) for e in epochs)
    assert epochs[0] != epochs[1] and visited(make(5, seed=6), range(4)) != epochs[0]
    assert Counter(visited(make(8), range(5))) == dict.fromkeys(range(20), 2)  # a step may hold the end of an epoch and the start of the next
    assert len(visited(make(100), [0])) == 20  # never more pairs a batch than there are


def test_data_ranks_share_every_batch(pairs, tokenizer):
    """Guards against a pair that two ranks learn, or none: the ranks' parts are the batch of one, which is cut to a multiple of their number."""
    whole = PairBatches(pairs, tokenizer, 60, 8, 5)
    ranks = [PairBatches(pairs, tokenizer, 60, 9, 5, 0, "small", r, 2) for r in range(2)]
    for step in range(4):
        parts = [visited(r, [step]) for r in ranks]
        assert [len(p) for p in parts] == [4, 4] and sorted(sum(parts, [])) == sorted(visited(whole, [step]))
    with pytest.raises(ValueError, match="a batch of 1 pairs is smaller than the 2 data ranks"):
        PairBatches(pairs[:1], tokenizer, 60, 8, world=2)


def test_pairs_that_cannot_be_compared_are_left_out(tokenizer):
    """Guards against an answer cut to fit, and a pair of equal sides, whose loss has no gradient but counts."""
    good, long, same = Pair(user("Who?"), "You.", "Me."), Pair(user("Who?"), "You.", "boats " * 40), Pair(user("Who?"), "You.", "You.")
    batches = PairBatches([long, good, same], tokenizer, 60, 2)
    assert batches.dropped == 2 and [r[3] for r in batches.rows] == [good]
    with pytest.raises(ValueError, match="none of 2 pairs fits 60 tokens"):
        PairBatches([long, same], tokenizer, 60, 2)


DIALOGUE = [{"role": "user", "content": "Tell of line 1"}, {"role": "assistant", "content": "Of boats."}, {"role": "user", "content": "And line 2?"},
            {"role": "assistant", "content": "Of books."}, {"role": "user", "content": "And the last?"}]  # fmt: skip


@pytest.mark.parametrize("system", [None, "Be long."])
def test_encode_is_the_chat_format_and_drops_the_oldest_exchanges(system, tokenizer):
    """Guards against rows that differ from what the chat model was trained on, a cut answer, and a lost system prompt."""
    lead = [{"role": "system", "content": system}] if system else []
    whole = lambda skip: [Message(m["role"], m["content"]) for m in [*lead, *DIALOGUE[skip:], {"role": "assistant", "content": "Of 3 boats."}]]  # noqa: E731
    variants = [encode_dialogue(tokenizer, whole(skip))[0] for skip in (0, 2, 4)]
    prompts = [encode_prompt(tokenizer, whole(skip)[:-1]) for skip in (0, 2, 4)]
    assert len(variants[0]) > len(variants[1]) > len(variants[2])
    seen = set()
    for limit in range(1, len(variants[0]) + 3):
        row = encode(tokenizer, [*lead, *DIALOGUE], "Of 3 boats.", limit)
        fits = next((i for i, ids in enumerate(variants) if len(ids) <= limit), None)
        seen.add(fits)
        assert row == (None if fits is None else (variants[fits], len(prompts[fits])))
    assert seen == {0, 1, 2, None}
    assert len(DIALOGUE) == 5  # the caller's messages are left alone
    tokens, start = encode(tokenizer, DIALOGUE, [40, 41, 2], 96)
    assert tokens[start:] == [40, 41, 2]  # sampled tokens stay as they are
    tokens, start = encode(tokenizer, DIALOGUE, "Of 3 boats.", 96, finished=False)
    assert tokens[start:] == tokenizer.encode("Of 3 boats. ") and tokens[-1] != tokenizer.eos_id


def test_mixtures_have_the_papers_proportions():
    """Guards against a safety model without helpful pairs, or a helpful one that drowns in others."""
    make = lambda kind, n: [Pair(user(f"{kind} {i}"), "a", "b", kind="".join([*kind])) for i in range(n)]  # as from a file: equal, not the same  # noqa: E731
    helpful, safe = make("helpful", 200), make("safety", 90)
    key = lambda pairs: Counter(p.prompt_messages[0]["content"] for p in pairs)  # noqa: E731
    for kind, mine, others, want in (("safety", safe, helpful, 10), ("helpful", safe, helpful, 90), ("helpful", safe, helpful[:40], 40)):
        mixed = mix([*helpful, *safe] if len(others) == 200 else [*safe, *others], kind, seed=3)
        counts = Counter(p.kind for p in mixed)
        assert max(key(mixed).values()) == 1
        if kind == "safety":  # all safety pairs, and a tenth of the whole others
            assert counts == {"safety": 90, "helpful": want}
        else:  # all helpful pairs, and as many others at most
            assert counts["helpful"] == len(others) and counts["safety"] == min(len(others), len(mine))
    everything = [*helpful, *safe]
    assert key(mix(everything, "safety", 3)) == key(mix(everything, "safety", 3)) != key(mix(everything, "safety", 4))
    assert mix(helpful, "safety") == helpful  # data of one kind only is taken as it is


# ---- the gate ---------------------------------------------------------------------------------------------------------------


def test_the_gate_is_on_the_probability_and_on_safety_prompts():
    """Guards against a gate at a logit of 0.15 (which would call half of all safe answers unsafe), and one that forgets adversarial prompts."""
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    table = [  # safety probability, safety prompt, who decides
        (0.149, False, "safety"), (0.151, False, "helpful"), (0.01, False, "safety"), (0.3, False, "helpful"), (0.53, False, "helpful"),
        (0.99, False, "helpful"), (0.149, True, "safety"), (0.151, True, "safety"), (0.99, True, "safety")]  # fmt: skip
    safety = torch.tensor([logit(p) for p, _, _ in table])
    helpful = torch.arange(len(table)) + 10.0
    got = gated(helpful, safety, torch.tensor([flag for _, flag, _ in table]))
    assert got.tolist() == [float(safety[i] if who == "safety" else helpful[i]) for i, (_, _, who) in enumerate(table)]
    assert gated(torch.ones(1), torch.zeros(1), torch.tensor([False]), gate=0.5).tolist() == [1.0]  # at the gate an answer is safe
    assert torch.equal(gated(helpful, None, torch.ones(len(table), dtype=torch.bool)), helpful)


def save_reward(path: Path, model: RewardModel, tokenizer: Tokenizer) -> str:
    checkpoint.save_state(path / "checkpoint", 1, model, {}, {}, tokenizer)
    (path / "reward.json").write_text(json.dumps({"evidence": model.evidence}))
    return str(path)


def test_gated_combines_two_saved_models(tokenizer, tmp_path, monkeypatch):
    """Guards against rewards in the order of sorted lengths, and models that are swapped."""
    h, s = build(True, 3), build(False, 4)
    monkeypatch.setattr(reward, "score", partial(reward.score, batch=2))  # several batches
    both = Gated(save_reward(tmp_path / "h", h, tokenizer), save_reward(tmp_path / "s", s, tokenizer), gate=0.5)
    flags = [False, True, False, False, True]
    got = both(ROWS, flags)
    with torch.no_grad():
        helpful, safety = (torch.cat([m.rewards(**stack([row])) for row in ROWS]) for m in (h, s))
    torch.testing.assert_close(got["helpful"], helpful, rtol=0, atol=1e-5)
    torch.testing.assert_close(got["safety"], safety, rtol=0, atol=1e-5)
    want = [s if f or 1 / (1 + math.exp(-s)) < 0.5 else h for h, s, f in zip(helpful.tolist(), safety.tolist(), flags, strict=True)]
    assert got["reward"].tolist() == pytest.approx(want, abs=1e-5)
    only = Gated(str(tmp_path / "h"))(ROWS, flags)
    assert Gated(str(tmp_path / "h")).gate == 0.15  # the paper's
    assert set(only) == {"helpful", "reward"} and torch.equal(only["helpful"], only["reward"])


def test_gated_refuses_two_tokenizers(tokenizer, tmp_path):
    """Guards against a safety model that reads the tokens of another vocabulary: its scores would be noise, without a word."""
    other = Tokenizer.train([t.upper() for t in TEXTS], 330, tmp_path / "other.model")
    with pytest.raises(ValueError, match="tokenizer"):
        Gated(save_reward(tmp_path / "h", build(False), tokenizer), save_reward(tmp_path / "s", build(False), other))


# ---- what is measured -------------------------------------------------------------------------------------------------------


def rated(monkeypatch, rewards: list[float]) -> RewardModel:
    """A model to which `score` gives the rewards listed, in the order chosen, rejected, chosen, ..."""

    def fake(model, rows, batch=256):
        assert len(rows) == len(rewards)
        return torch.tensor(rewards)

    monkeypatch.setattr(reward, "score", fake)
    return build(False)


def test_accuracy_counts_ties_as_half_and_by_strength(tokenizer, monkeypatch):
    """Guards against a model that gives one number to all and scores 0 or 1 for it."""
    some = [Pair(user(f"Q{i}"), "yes", "no", s) for i, s in enumerate((3, 3, 0, 1))]
    model = rated(monkeypatch, [2.0, 1.0, 0.0, 1.0, 5.0, 5.0, -1.0, -2.0])
    got = reward.accuracy(model, tokenizer, [*some, Pair(user("Q"), "boats " * 90, "no", 2)])  # the last does not fit
    want = {"all": (2.5 / 4, 4), STRENGTHS[3]: (0.5, 2), STRENGTHS[0]: (0.5, 1), STRENGTHS[1]: (1.0, 1)}
    assert got == {name: {"accuracy": a, "n": n} for name, (a, n) in want.items()}


def test_calibration_against_a_loop(tokenizer, monkeypatch):
    """Guards against bins that lose a pair, and probabilities of the wrong side."""
    rng = np.random.default_rng(1)
    differences = np.concatenate([rng.normal(size=60) * 2, [9.0, -9.0, 60.0, -60.0]])  # the last two: a probability that rounds to 1
    model = rated(monkeypatch, [x for d in differences for x in (float(d) + 0.5, 0.5)])
    table = reward.calibration(model, tokenizer, [Pair(user(f"Q{i}"), "yes", "no") for i in range(64)], bins=4)
    sure = 1 / (1 + np.exp(-np.abs(differences)))
    which = np.minimum(((sure - 0.5) / 0.125).astype(int), 3)
    assert len(table) == 4 and sum(row["n"] for row in table) == 64
    for i, row in enumerate(table):
        inside = which == i
        want = {"predicted": sure[inside].mean(), "observed": (differences[inside] > 0).mean(), "n": inside.sum()}
        assert row == pytest.approx(want, abs=1e-5)


# ---- the stage --------------------------------------------------------------------------------------------------------------


def train_config(**more) -> TrainConfig:
    return TrainConfig(**{**dict(steps=1, batch_size=8, seq_len=48, lr=5e-3, warmup_steps=2, save_every=3, log_every=1, device="cpu"), **more})


def trivial(n: int = 60) -> list[Pair]:
    """Pairs whose preferred side speaks of boats."""
    return [Pair(user(f"Line {i}?"), f"It tells of {i % 7} boats.", f"It tells of {(i + 3) % 7} books.", i % 4) for i in range(n)]


@pytest.fixture(scope="module")
def trained(chat, tokenizer, tmp_path_factory):
    """A reward model with evidence, trained on the trivial pairs; its folder holds the uninterrupted run."""
    out = tmp_path_factory.mktemp("stage") / "reward"
    return out, reward.run(RewardConfig(init=chat, out=str(out), evidence=True, epochs=3, val_fraction=0.2, train=train_config()), trivial())


def test_a_run_learns_saves_and_loads(trained, tokenizer):
    """Guards against a stage that trains the wrong side, and a saved model that scores otherwise than the trained one."""
    out, model = trained
    assert reward.accuracy(model, tokenizer, trivial())["all"]["accuracy"] > 0.9
    loaded, tok = reward.load(dir=out)
    assert loaded.evidence and not loaded.training and tok.vocab_size == 330
    assert torch.equal(reward.score(loaded, ROWS), reward.score(model, ROWS))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/accuracy"] > 0.9 and lines[-1]["eval/val_loss"] < math.log(2)
    kept = json.loads((out / "reward.json").read_text())
    assert kept["pairs"] == 48 and kept["dropped"] == 0 and kept["evidence"] is True
    assert lines[-1]["step"] == 18 and lines[-1]["tokens"] == 18 * 8  # 3 epochs of 48 pairs by 8; what is counted is pairs


def test_steps_and_warm_up_follow_the_epochs(chat, tmp_path, monkeypatch):
    """Guards against a warm-up that is all of a short run, and one that a long run does without: 3% of it, or what was asked for, at most half."""
    seen = []
    monkeypatch.setattr(reward, "train", lambda model, batches, loss, c, *a, **k: seen.append((c.steps, c.warmup_steps)) or model)
    for i, epochs in enumerate((3, 0.01, 0.5, 20, 0.34)):  # of 48 pairs by 8
        reward.run(RewardConfig(init=chat, out=str(tmp_path / str(i)), epochs=epochs, val_fraction=0.2, train=train_config()), trivial())
    assert seen == [(18, 2), (1, 0), (3, 1), (120, 4), (2, 1)]


def test_a_model_is_whole_and_in_fp32_unless_asked_otherwise(chat, trained, monkeypatch):
    """Guards against a loaded reward model that is compiled or rounded although nobody asked for it."""
    asked, real = [], reward.build
    monkeypatch.setattr(reward, "build", lambda make, fill, mesh, **how: asked.append(how) or real(make, fill, mesh, **how))
    reward.load(trained[0]), reward.from_chat(checkpoint.opened(chat), False)
    assert asked == [{"bf16": False, "compile": False}] * 2


@pytest.mark.parametrize("n", [2, 7])
def test_data_ranks_share_the_rows_that_are_scored(n):
    """Guards against rows that no rank scores, or two; of seven ranks some have no row at all."""
    model = build(True)
    alone = reward.score(model, ROWS)
    for batch in (1, 2, 64):
        for scores in tiny.on_ranks(n, lambda rank, b=batch: reward.score(model, ROWS, b)):
            torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)


def test_a_run_with_the_text_loss_validates_on_every_kept_pair(chat, tmp_path, monkeypatch):
    """Guards against validation batches that leave pairs out or take some twice, and a text loss that a single process is refused."""
    seen = []
    monkeypatch.setattr(reward, "with_validation", lambda batches, loss, measure: seen.extend(batches))
    monkeypatch.setattr(reward, "train", lambda model, *a, **k: model)
    reward.run(RewardConfig(init=chat, out=str(tmp_path / "r"), text_weight=1.0, val_fraction=0.8, train=train_config()), trivial(200))
    rows = [tuple(t[:n].tolist()) for b in seen for t, n in zip(b["tokens"], b["lengths"], strict=True)]
    assert [len(b["margins"]) for b in seen] == [64, 64, 32] and len(set(rows)) == len(rows) == 320


def test_a_prompt_is_on_one_side_of_the_split(chat, tmp_path, monkeypatch):
    """Guards against pairs of one prompt in training and validation, which share its text."""
    seen = []
    real = PairBatches.__init__

    def spy(self, pairs, *args, **kwargs):
        seen.append({json.dumps(p.prompt_messages) for p in pairs})
        real(self, pairs, *args, **kwargs)

    monkeypatch.setattr(PairBatches, "__init__", spy)
    twice = [Pair(user(f"Line {i // 5}?"), f"boats {i}", f"books {i}") for i in range(60)]
    model = reward.run(RewardConfig(init=chat, out=str(tmp_path / "r"), epochs=0.1, val_fraction=0.1, train=train_config()), twice)
    train, val = seen
    assert train and val and not train & val and len(train | val) == 12
    held = PairBatches([p for p in twice if json.dumps(p.prompt_messages) in val], checkpoint.load(chat)[1], 48, 64)
    assert len(held.rows) > 1
    with torch.no_grad():
        total, n = reward_loss()(model, held.collate(held.rows))
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/val_loss"] == pytest.approx(float(total / n), abs=1e-5)  # of all of them


def test_kill_9_and_resume_gives_the_uninterrupted_weights(trained, chat, tmp_path):
    """Guards against a lost optimizer state or a shifted order of pairs: a process that is killed in its eleventh step, then resumed, bit for bit."""
    reference, _ = trained
    write_jsonl([p.row() for p in trivial()], tmp_path / "pairs.jsonl")
    code = f"""
import os
from minillama import reward
from minillama.config import ParallelConfig, RewardConfig, TrainConfig
config = RewardConfig(data=[{str(tmp_path / "pairs.jsonl")!r}], init={chat!r}, out={str(tmp_path / "out")!r}, evidence=True, epochs=3, val_fraction=0.2,
                      train=TrainConfig(**{dict(vars(train_config()))!r}))
make = reward.reward_loss
def deadly(*weights):
    loss, calls = make(*weights), []
    def killed(model, batch):
        calls.append(1)
        if len(calls) > 10:
            os.kill(os.getpid(), 9)
        return loss(model, batch)
    return killed
reward.reward_loss = deadly
reward.run(config)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert checkpoint.load_state(tmp_path / "out" / "checkpoint")[0] == 9
    config = RewardConfig(data=[str(tmp_path / "pairs.jsonl")], init=chat, out=str(tmp_path / "out"), evidence=True, epochs=3, val_fraction=0.2, resume=True,
                          train=train_config())  # fmt: skip
    reward.run(config)
    a, b = (load_file(checkpoint.load_state(p / "checkpoint")[1] / "model.safetensors") for p in (tmp_path / "out", reference))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [r["step"] for r in map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    assert steps == list(range(1, 19))


def test_a_finished_model_survives_a_second_run(chat, tmp_path):
    """Guards against a refused second run that leaves the first model unreadable."""
    config = RewardConfig(init=chat, out=str(tmp_path / "r"), evidence=True, epochs=0.1, train=train_config())
    model = reward.run(config, trivial(10))
    with pytest.raises(ValueError, match="--resume"):
        reward.run(RewardConfig(init=chat, out=str(tmp_path / "r"), evidence=False, epochs=0.1, train=train_config()), trivial(10))
    assert torch.equal(reward.score(reward.load(tmp_path / "r")[0], ROWS), reward.score(model, ROWS))


def test_transcripts_of_the_hub_work(chat, tokenizer, tmp_path):
    r"""Guards against a file of "\n\nHuman: ... \n\nAssistant: ..." transcripts that is read as one text, or cut at the wrong turn."""
    rows = []
    for i in range(24):
        before = f"\n\nHuman: Line {i}?\n\nAssistant: Which book?\n\nHuman: The long one."
        rows.append({"chosen": f"{before}\n\nAssistant: It tells of {i % 7} boats.", "rejected": f"{before}\n\nAssistant: Of books, {i}."})
    write_jsonl(rows, tmp_path / "hh.jsonl")
    pairs = read_pairs(str(tmp_path / "hh.jsonl"))
    assert len(pairs) == 24 and pairs[2].chosen == "It tells of 2 boats." and pairs[2].rejected == "Of books, 2."
    assert [m["role"] for m in pairs[2].prompt_messages] == ["user", "assistant", "user"] and pairs[2].prompt_messages[0]["content"] == "Line 2?"
    assert (pairs[2].strength, pairs[2].chosen_safe, pairs[2].kind) == (0, None, "helpful")
    config = RewardConfig(data=[str(tmp_path / "hh.jsonl")], init=chat, out=str(tmp_path / "r"), epochs=6, safety_weight=1.0, train=train_config(seq_len=96))
    assert reward.accuracy(reward.run(config), tokenizer, pairs)["all"]["accuracy"] > 0.9


def test_errors_name_the_value(chat, tokenizer, tmp_path):
    """Guards against tracebacks from deep inside for what a user gets wrong."""
    for wrong in (dict(margin="huge"), dict(kind="honest")):
        with pytest.raises(ValueError, match=next(iter(wrong.values()))):
            RewardConfig(**wrong)
    config = lambda **more: RewardConfig(**{**dict(init=chat, out=str(tmp_path / "r"), train=train_config()), **more})  # noqa: E731
    with pytest.raises(ValueError, match="97 .* max_seq_len 96"):
        reward.run(config(train=train_config(seq_len=97)), trivial())
    with pytest.raises(ValueError, match="fits 16 tokens"):
        reward.run(config(train=train_config(seq_len=16)), trivial())
    checkpoint.save(Llama(CONFIG).init_weights(1), None, tmp_path / "mute")
    with pytest.raises(ValueError, match="no tokenizer.model"):
        reward.run(config(init=str(tmp_path / "mute")), trivial())
    (tmp_path / "text.jsonl").write_text('{"text": "no pairs here"}\n')
    with pytest.raises(ValueError, match="preferences are wanted"):
        reward.run(config(data=[str(tmp_path / "text.jsonl")]))
    for empty in (chat, str(tmp_path), str(tmp_path / "none")):
        with pytest.raises(ValueError, match="holds no reward model"):
            reward.load(empty)


def test_both_answers_of_a_pair_stand_behind_the_same_prompt(tokenizer):
    """Guards against a short answer that keeps more of the dialogue than the long one: the pair would be told apart by its prompts."""
    pair = Pair([*DIALOGUE], "Of 3 boats. " * 4, "Boats.", 2)
    whole = encode(tokenizer, pair.prompt_messages, pair.rejected, 400)
    seen = set()
    for limit in range(20, len(whole[0]) + 40):
        alone_a, alone_b = (encode(tokenizer, pair.prompt_messages, x, limit) for x in (pair.chosen, pair.rejected))
        both = encode_pair(tokenizer, pair, limit)
        if not (alone_a and alone_b):
            assert both is None
            continue
        (a, start), (b, other) = both
        assert start == other and a[:start] == b[:start] and (a, start) == alone_a and b[start:] == alone_b[0][alone_b[1] :]
        seen.add(alone_b[1] != start)
    assert seen == {True, False}  # limits at which the two would have differed, and not
