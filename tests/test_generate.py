"""Generation against the definitions: an uncached loop, brute-force nuclei, exact probabilities, the training forward."""
import dataclasses
import itertools

import pytest
import tiny
import torch

import minillama
from minillama import LlamaConfig, Tokenizer
from minillama import generate as g  # the name is the module and callable
from minillama.generate import generate, log_probs, sample, stream, stream_text

CONFIG = LlamaConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=61, multiple_of=16, max_seq_len=40, norm_eps=0.05)
RAGGED = [[1, 5, 9, 13, 17, 21, 25], [1, 30], [1, 7, 8, 2, 40, 41, 42, 43, 44, 45, 46], [1, 33, 34]]


def build(config=CONFIG, seed=3):
    return tiny.build(config, seed)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(params=["lean", "module"])
def either(request, model, monkeypatch):
    """The model, decoded by either decoder."""
    if request.param == "module":
        monkeypatch.setattr(g, "is_plain", lambda model, limit=0: False)
    return model


def greedy_by_hand(model, prompt, n):
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_the_name_is_a_function_and_a_module():
    """Importing the submodule overwrites the attribute minillama.generate: the name must stay callable."""
    assert callable(minillama.generate) and minillama.generate is g
    assert minillama.generate.stream is stream
    tiny = build(LlamaConfig(dim=8, n_layers=1, n_heads=2, vocab_size=5, max_seq_len=8))
    assert minillama.generate(tiny, [[1]], max_new_tokens=3, temperature=0) == generate(tiny, [[1]], max_new_tokens=3, temperature=0)


def test_greedy_equals_an_uncached_loop(either):
    """A cache or position off by one changes a greedy continuation within a few tokens."""
    prompts = [[1, 5, 9], [1, 7, 8], [1, 9, 50]]
    want = [greedy_by_hand(either, p, 20) for p in prompts]
    assert len({tuple(w) for w in want}) == 3 and len(set(want[0])) > 3  # the comparison can fail
    assert generate(either, prompts, max_new_tokens=20, temperature=0) == want


def test_ragged_greedy_equals_an_uncached_loop(either):
    """Left padding that leaks into attention or shifts rotary positions."""
    assert generate(either, RAGGED, max_new_tokens=20, temperature=0) == [greedy_by_hand(either, p, 20) for p in RAGGED]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_a_row_does_not_depend_on_its_company(either, top_p):
    """A shared random stream, or rows that swap when finished ones leave, would make samples depend on the batch."""
    kw = dict(max_new_tokens=25, temperature=1.3, top_p=top_p, seed=11, stop=[4, 9, [20], 31, 50])
    batch = sample(either, RAGGED * 3, **kw)
    assert len({len(t) for t in batch.tokens}) > 3 and any(batch.stopped)  # rows did leave at different times
    for i, prompt in enumerate(RAGGED * 3):
        alone = sample(either, [prompt], first_row=i, **kw)
        assert alone.tokens[0] == batch.tokens[i] and alone.stopped[0] == batch.stopped[i]
        assert alone.logprobs[0] == pytest.approx(batch.logprobs[i], abs=1e-5)
    assert sample(either, RAGGED, **kw).tokens != sample(either, RAGGED, **{**kw, "seed": 12}).tokens
    same = sample(either, [RAGGED[0]] * 4, **kw).tokens
    assert len({tuple(t) for t in same}) > 1  # equal prompts in one batch draw different rows


@pytest.mark.parametrize("rows", [15, 16, 25])
def test_parts_on_cores_of_their_own_are_the_whole(model, rows, monkeypatch):
    """Parts that draw with each other's numbers, lose a row, come back in another order, or leave the caller with one core."""
    prompts = [RAGGED[i % 4] + [i] for i in range(rows)]
    kw = dict(max_new_tokens=15, temperature=1.0, seed=4, stop=[4, 9], first_row=3)
    before = torch.get_num_threads()
    whole, sizes, real = {}, [], g._run

    def run(model, weights, prompts, *args):
        sizes.append((len(prompts), torch.get_num_threads()))
        return real(model, weights, prompts, *args)

    monkeypatch.setattr(g, "_run", run)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            whole[threads] = sample(model, prompts, **kw)
            assert torch.get_num_threads() == threads
            with pytest.raises(ZeroDivisionError):
                monkeypatch.setattr(g, "_pick", lambda *a: 1 / 0)
                sample(model, prompts, **kw)
            monkeypatch.undo()
            monkeypatch.setattr(g, "_run", run)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    want = {15: [(15, 3)], 16: [(8, 1)] * 2, 25: [(8, 1)] * 2 + [(9, 1)]}[rows]
    assert sorted(sizes[2 : 2 + len(want)]) == want and sizes[0] == (rows, 1)
    assert whole[3].tokens == whole[1].tokens and whole[3].stopped == whole[1].stopped and any(whole[1].stopped)
    for a, b in zip(whole[3].logprobs, whole[1].logprobs, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


def test_more_room_does_not_change_the_beginning(model):
    """Uniforms laid out by max_new_tokens would give another sample when it grows."""
    short, long = (generate(model, RAGGED, max_new_tokens=n, temperature=1.0, seed=5) for n in (6, 18))
    assert [row[:6] for row in long] == short


def test_lean_logits_equal_module_logits(model):
    """The lean decoder folds norms, turns and matrices; each step must give the module's logits, before and after rows leave."""
    assert g.is_plain(model)
    for prompts in (RAGGED, [p[:2] for p in RAGGED], [RAGGED[i] for i in (2, 0, 2, 2)]):  # equal prompts are read once
        with torch.inference_mode():
            lean, module = g.LeanDecoder(g.LeanWeights(model, 40), prompts, 12), g.Decoder(model, prompts, 12)
            torch.testing.assert_close(lean.logits, module.logits, rtol=1e-5, atol=1e-5)
            tokens = torch.tensor([3, 50, 12, 60])
            for step in range(10):
                if step == 5:
                    keep = torch.tensor([0, 2])
                    lean.select(keep), module.select(keep)
                    tokens = tokens[keep]
                a, b = lean.step(tokens), module.step(tokens)
                assert b.std() > 0.5
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
                tokens = (tokens * 7 + step) % 61


def test_wrapped_models_take_the_module_path(model):
    """A hooked (or sharded, or adapted) model must not be bypassed by the lean decoder's copies of its weights."""
    calls = []
    handle = model.layers[1].feed_forward.register_forward_hook(lambda *a: calls.append(1))
    try:
        assert not g.is_plain(model)
        out = generate(model, [[1, 5, 9]], max_new_tokens=6, temperature=0)
    finally:
        handle.remove()
    assert out == [greedy_by_hand(model, [1, 5, 9], 6)] and len(calls) == 6
    half = build().to(torch.bfloat16)
    assert not g.is_plain(half) and len(generate(half, RAGGED, max_new_tokens=5, seed=1)[2]) == 5


def test_logprobs_are_the_training_forwards(either):
    """PPO's ratio starts at 1 only if the sampler's log-probabilities are the model's own, whatever temperature and top_p drew them."""
    out = sample(either, RAGGED, max_new_tokens=15, temperature=0.7, top_p=0.9, seed=2, stop=[4, 9])
    rows = [p + t for p, t in zip(RAGGED, out.tokens, strict=True)]
    width = max(map(len, rows))
    right = torch.tensor([r + [-1] * (width - len(r)) for r in rows])
    left = torch.tensor([[-1] * (width - len(r)) + r for r in rows])
    with torch.no_grad():
        by_right, by_left = log_probs(either, right, right >= 0), log_probs(either, left, left >= 0)
        for i, (prompt, new) in enumerate(zip(RAGGED, out.tokens, strict=True)):
            alone = log_probs(either, torch.tensor([rows[i]]))[0]
            direct = either(torch.tensor([rows[i]]))[0].log_softmax(-1)
            want = torch.stack([direct[t - 1, rows[i][t]] for t in range(1, len(rows[i]))])
            torch.testing.assert_close(alone, want, rtol=0, atol=1e-5)
            n = len(rows[i])
            torch.testing.assert_close(by_right[i, : n - 1], want, rtol=0, atol=1e-5)
            torch.testing.assert_close(by_left[i, width - n :], want, rtol=0, atol=1e-5)
            assert not by_right[i, n - 1 :].any() and not by_left[i, : width - n].any()
            assert out.logprobs[i] == pytest.approx(want[len(prompt) - 1 :].tolist(), abs=1e-5)
            assert len(out.logprobs[i]) == len(new) and want.std() > 0.3


def test_log_probs_of_some_tokens_are_those_of_all(model):
    """The logits of the others are never made, and neither padding nor a token outside `where` may leak in."""
    tokens = torch.tensor([[1, 5, 9, 4, 7, 3], [1, 8, 2, 6, 0, 0]])
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    where = torch.tensor([[False, True, False, False, True], [True, False, True, True, False]])
    made = []
    handle = model.output.register_forward_hook(lambda m, args, out: made.append(out.shape))
    some, both = log_probs(model, tokens, where=where), log_probs(model, tokens, valid, where)
    handle.remove()
    whole = model(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(some, whole.masked_fill(~where, 0.0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both, whole.masked_fill(~(where & valid[:, 1:]), 0.0), rtol=1e-6, atol=1e-6)
    assert [shape[0] for shape in made] == [5, 4] and (some != 0).sum() == 5
    some.sum().backward()
    got = model.tok_embeddings.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    (whole * where).sum().backward()
    torch.testing.assert_close(got, model.tok_embeddings.weight.grad, rtol=0, atol=1e-5)
    model.zero_grad(set_to_none=True)


def test_log_probs_carry_gradient(model):
    """RLHF differentiates log_probs; an inference-mode leak would break it."""
    log_probs(model, torch.tensor([[1, 5, 9, 4]])).sum().backward()
    assert model.output.weight.grad.abs().sum() > 0
    model.zero_grad(set_to_none=True)


def brute_force_nucleus(probs, top_p):
    """The smallest set of tokens with mass >= top_p, by trying all sets."""
    for size in range(1, len(probs) + 1):
        best = max(itertools.combinations(range(len(probs)), size), key=lambda s: sum(probs[i] for i in s))
        if sum(probs[i] for i in best) >= top_p - 1e-9:
            return set(best)
    return set(range(len(probs)))


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.5, 0.75, 0.9, 0.99, 0.999999, 1.0])
def test_top_p_keeps_the_smallest_set(top_p):
    """Off by one: the token that crosses top_p belongs to the set, the next does not, and there is always one."""
    rng = torch.Generator().manual_seed(0)
    u = torch.linspace(0, 1 - 2**-22, 4001)[:, None]
    rows = [torch.randn(7, generator=rng) * 2 for _ in range(6)] + [torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()]
    for logits in rows:
        probs = logits.double().softmax(-1).tolist()
        keep = brute_force_nucleus(probs, top_p)
        drawn = g._pick(logits.expand(len(u), -1), 1.0, top_p, u)[:, 0]
        share = torch.bincount(drawn, minlength=len(probs)).double() / len(u)
        mass = sum(probs[i] for i in keep)
        for i, p in enumerate(probs):  # the grid of u makes shares exact to a step or two
            assert share[i].item() == pytest.approx(p / mass if i in keep else 0.0, abs=2 / 4000)
            assert i in keep or share[i] == 0


def test_top_p_of_many_tokens_and_ties():
    """A nucleus longer than the first top-k, and equal probabilities: the size must be exact, in a batch with short ones."""
    flat, peaked = torch.zeros(1000), torch.linspace(9, -9, 1000)
    logits = torch.stack([flat, peaked]).repeat_interleave(20000, 0)
    u = torch.linspace(0, 1 - 2**-22, 20000)[:, None].repeat(2, 1)
    drawn = g._pick(logits, 1.0, 0.4995, u)[:, 0]
    assert len(drawn[:20000].unique()) == 500
    cdf = peaked.double().softmax(-1).cumsum(-1)
    assert sorted(drawn[20000:].unique().tolist()) == list(range(int((cdf < 0.4995).sum()) + 1))


def test_never_a_token_of_probability_zero():
    """u = 0 and u just below 1 are where an inverse CDF off by one returns a token that cannot be, or one past the end."""
    logits = torch.tensor([[-1e9, 1.0, -1e9, 2.0, -1e9]])
    for top_p in (1.0, 0.9999):
        for u, want in ((0.0, {1, 3}), (1 - 2**-22, {1, 3})):
            assert g._pick(logits, 1.0, top_p, torch.tensor([[u]])).item() in want
    assert g._uniforms(0, list(range(50)), 1000).max() < 1 and g._uniforms(0, [3], 9).min() >= 0


@pytest.mark.parametrize("temperature,top_p", [(1.0, 1.0), (0.6, 1.0), (1.5, 0.9)])
def test_frequencies_match_probabilities(temperature, top_p):
    """Chi-square over every token of 6,000 rows: a wrong temperature, CDF or correlated row streams would not pass."""
    tiny = build(LlamaConfig(dim=16, n_layers=1, n_heads=2, vocab_size=13, multiple_of=8, max_seq_len=8))
    n = 6000
    out = generate(tiny, [[1, 5]] * n, max_new_tokens=2, temperature=temperature, top_p=top_p, seed=1)
    with torch.no_grad():
        first = (tiny(torch.tensor([[1, 5]]))[0, -1].double() / temperature).softmax(-1)
        second = (tiny(torch.tensor([[1, 5, t] for t in range(13)]))[:, -1].double() / temperature).softmax(-1)  # [V,V]

    def nucleus(p):
        keep = torch.zeros_like(p)
        keep[sorted(brute_force_nucleus(p.tolist(), top_p))] = 1
        return p * keep / (p * keep).sum()

    first = nucleus(first)
    joint = first @ torch.stack([nucleus(p) for p in second])  # distribution of the second token
    for step, want in ((0, first), (1, joint)):
        count = torch.bincount(torch.tensor([row[step] for row in out]), minlength=13).double()
        assert (count[want == 0] == 0).all()
        enough = want * n >= 5
        chi2 = ((count - want * n) ** 2 / (want * n))[enough].sum()
        assert chi2 < 35 and enough.sum() >= 4  # 12 degrees of freedom: P(chi2 > 35) = 0.0005
        assert ((count - n / 13) ** 2 / (n / 13)).sum() > 500  # and uniform draws would be far off


def test_temperature_zero_ignores_seed_and_top_p(model):
    a = generate(model, RAGGED, max_new_tokens=8, temperature=0, seed=1)
    assert a == generate(model, RAGGED, max_new_tokens=8, temperature=0, top_p=0.1, seed=2)
    assert a == generate(model, RAGGED, max_new_tokens=8, temperature=1.0, top_p=1e-9, seed=3)  # the smallest nucleus is the argmax


def test_stops(model):
    """A stop ends its own row only, is kept by `sample` and stripped by `generate`; a sequence must match whole and in new tokens only."""
    free = generate(model, RAGGED, max_new_tokens=12, temperature=0)
    for stop in ([free[0][3]], [[free[0][2], free[0][3]]], [free[0][3], [free[0][1], free[0][2], free[0][3]]], {free[0][3]}):
        out = sample(model, RAGGED, max_new_tokens=12, temperature=0, stop=stop)
        gen = generate(model, RAGGED, max_new_tokens=12, temperature=0, stop=stop)
        sequences = [(s,) if isinstance(s, int) else tuple(s) for s in stop]
        for row, kept, stopped, clean in zip(free, out.tokens, out.stopped, gen, strict=True):
            ends = [(e, len(s)) for e in range(1, 13) for s in sequences if tuple(row[max(0, e - len(s)) : e]) == s]
            if ends:
                end = min(e for e, _ in ends)
                assert (kept, stopped) == (row[:end], True)
                assert clean == row[: end - max(n for e, n in ends if e == end)]
            else:
                assert (kept, stopped, clean) == (row, False, row)
    assert out.stopped[0] and not all(out.stopped)
    prompt_tail = sample(model, [RAGGED[0]], max_new_tokens=3, temperature=0, stop=[[RAGGED[0][-1], free[0][0]]])
    assert prompt_tail.stopped == [False] and prompt_tail.tokens[0] == free[0][:3]


def test_context_limit(either):
    """A row ends where the context does, each at its own length; rows that ride along must not read past the rotary tables."""
    prompts = [[1] + [6] * 36, [1, 5], [1] + [7] * 39, [1] * 38]
    out = sample(either, prompts, max_new_tokens=100, temperature=0)
    assert [len(t) for t in out.tokens] == [3, 38, 0, 2] and out.stopped == [False] * 4
    assert out.tokens == [greedy_by_hand(either, p, 40 - len(p)) for p in prompts]
    ride = [[1] * 38, [1, 5], [1, 7], [1, 9]]  # the first finishes 36 steps before half of the batch has
    assert generate(either, ride, max_new_tokens=100, temperature=0) == [greedy_by_hand(either, p, 40 - len(p)) for p in ride]
    assert generate(either, prompts, max_new_tokens=0) == [[]] * 4 and generate(either, []) == []


@pytest.mark.parametrize(
    "prompts,kw,words",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 41], {}, "41 tokens, more than max_seq_len 40"),
        ([[1, 61]], {}, "vocabulary of 61"),
        ([[1, -1]], {}, "vocabulary of 61"),
        ([[1]], dict(max_new_tokens=-1), "max_new_tokens -1"),
        ([[1]], dict(temperature=-0.1), "temperature -0.1"),
        ([[1]], dict(temperature=float("nan")), "temperature nan"),
        ([[1]], dict(top_p=0.0), "top_p 0.0"),
        ([[1]], dict(top_p=1.01), "top_p 1.01"),
        ([[1]], dict(seed=-3), "seed -3"),
        ([[1]], dict(stop=[[]]), "stop sequence is empty"),
    ],
)
def test_bad_requests_name_the_value(model, prompts, kw, words):
    with pytest.raises(ValueError, match=words):
        generate(model, prompts, **kw)


def test_leaves_the_model_and_the_caller_as_they_were(model):
    """eval() or inference mode that outlives the call breaks the next training step, also when a stream is dropped half way."""
    model.train()
    model.norm.eval()
    half = stream(model, [1, 5], max_new_tokens=9)
    next(half)
    assert not torch.is_inference_mode_enabled()
    half.close()
    generate(model, [[1]], max_new_tokens=2)
    assert model.training and model.layers[0].training and not model.norm.training
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    model.train()


def test_stream_equals_generate(model):
    """Including stops of several tokens, whose beginnings must be held back."""
    for seed, prompt in itertools.product(range(6), RAGGED[:2]):
        free = generate(model, [prompt], max_new_tokens=20, seed=seed)[0]
        for stop in ([], [free[5]], [free[4:7]], [free[4:6], [free[6], 99]]):
            kw = dict(max_new_tokens=20, temperature=1.0, seed=seed, stop=stop)
            assert list(stream(model, prompt, **kw)) == generate(model, [prompt], **kw)[0]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    text = ["Nila lives in Oru. She has 3 dogs and 12 cats.", "  two  spaces, naïve café", "hello there, good day"] * 20
    return Tokenizer.train(text, 340, tmp_path_factory.mktemp("tok") / "tokenizer.model")


TEXTS = ["Nila lives.", " leading", "   three", "", " ", "  ", "a\n\n b", "naïve café ☕ 日本語", "👨‍👩‍👧‍👦🏳️‍🌈", "x🙂", "🙂x"]
TEXTS += ["\ufffd\ufffd", "\x00\x7f"]


@pytest.mark.parametrize("text", TEXTS)
def test_stream_text_of_text(tokenizer, text):
    """A multi-byte character must come whole and once, and only the text's first space may be dropped."""
    ids = tokenizer.encode(text)
    pieces = list(stream_text(tokenizer, iter(ids)))
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert all(pieces) and ("\ufffd" in text or not any("\ufffd" in p for p in pieces))


def test_stream_text_of_any_tokens(tokenizer):
    """A young model emits broken byte runs, special tokens in the middle, cut characters: still exactly decode's text."""
    rng = torch.Generator().manual_seed(0)
    for i in range(1500):
        n = int(torch.randint(1, 25, (1,), generator=rng))
        high = 340 if i % 2 else 262  # every second one is nearly all bytes and special tokens
        ids = torch.randint(0, high, (n,), generator=rng).tolist()
        if i % 3 == 0:  # bytes of characters outside ASCII, cut anywhere
            ids = [3 + b for b in "é☕🙂日".encode()][i % 7 : 7 + i % 9] + ids
        assert "".join(stream_text(tokenizer, ids)) == tokenizer.decode(ids)


def test_stream_text_comes_as_it_is_made_and_in_linear_time(tokenizer, monkeypatch):
    """Decoding everything so far at each token would be quadratic; holding text back would not be streaming."""
    ids = tokenizer.encode("Nila lives in Oru 🙂 " * 40)
    seen = []
    inner = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: seen.append(len(ids)) or inner(self, ids))
    pieces = list(stream_text(tokenizer, ids))
    assert sum(seen) < 4 * len(ids) and max(seen) <= 6
    assert len(pieces) > len(ids) / 3


def test_samples_is_a_record():
    assert [f.name for f in dataclasses.fields(g.Samples)] == ["tokens", "logprobs", "stopped"]
