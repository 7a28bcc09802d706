"""Shards, packing and batches."""
import numpy as np
import pytest
import torch

from minillama.data.pack import Batches, Shards, pack, write_shards
from minillama.tokenizer import Tokenizer

TEXTS = [f"The number {i} stands in line {i * 7} of the book. " * (1 + i % 5) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.train(TEXTS, 330, tmp_path_factory.mktemp("tok") / "t.model")


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    return Shards(write_shards(TEXTS, tokenizer.path, tmp_path_factory.mktemp("d") / "data", workers=1))


def test_shards_hold_the_documents_and_do_not_depend_on_workers(tokenizer, shards, tmp_path):
    """Guards against lost, reordered or cut documents."""
    for i, text in enumerate(TEXTS):
        ids, trained = shards.document(i)
        assert ids.tolist() == tokenizer.encode(text, bos=True, eos=True) and trained.all()
    other = Shards(write_shards(TEXTS, tokenizer.path, tmp_path / "two", workers=2))
    assert (other.path / "shard-00000.tokens").read_bytes() == (shards.path / "shard-00000.tokens").read_bytes()


def test_validation_shares_no_text_with_training(tokenizer, tmp_path):
    """Guards against copies on both sides, and against a split that changes when the data is tokenised again or in another order."""
    texts = [*TEXTS, *TEXTS[::-1]]
    shards = Shards(write_shards(texts, tokenizer.path, tmp_path / "twice", workers=1))
    train, val = shards.split(0.2)
    read = lambda part: [tokenizer.decode(part.document(i)[0].tolist()) for i in range(len(part))]  # noqa: E731
    assert 0 < len(val) < len(train) and len(val) + len(train) == len(texts)
    assert not set(read(train)) & set(read(val))
    assert set(read(Shards(write_shards(TEXTS, tokenizer.path, tmp_path / "once", workers=1)).split(0.2)[1])) == set(read(val))
    assert shards.split(0.0)[1] is None
    assert all(len(p) == 1 for p in Shards(write_shards(["a b c", "d e f"], tokenizer.path, tmp_path / "few", workers=1)).split(0.001))
    with pytest.raises(ValueError, match="2 different"):
        Shards(write_shards(["a b c"] * 3, tokenizer.path, tmp_path / "same", workers=1)).split(0.1)


def test_a_cut_shard_is_refused(tokenizer, tmp_path):
    """Guards against training on what a full disk left behind."""
    path = write_shards(TEXTS, tokenizer.path, tmp_path / "cut", workers=1)
    file = path / "shard-00000.tokens"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="tokenise again"):
        Shards(path)
    with pytest.raises(ValueError, match="no documents"):
        write_shards([], tokenizer.path, tmp_path / "none", workers=1)


@pytest.mark.parametrize("row", [8, 33, 64])
def test_packing_covers_every_target_exactly_once(row):
    """Guards against lost tokens at cuts and against rows that overflow."""
    lengths = np.random.default_rng(0).integers(2, 90, size=200)
    seen = [np.zeros(n, int) for n in lengths]
    for pieces in pack(lengths, row):
        assert 0 < sum(b - a for _, a, b in pieces) <= row
        for d, a, b in pieces:
            seen[d][a + 1 : b] += 1  # the first token of a piece is context
    for s in seen:
        assert s[0] == 0 and (s[1:] == 1).all()


@pytest.mark.parametrize("whole", [True, False])
def test_an_epoch_visits_every_target_once(shards, whole):
    """Guards against off-by-one targets: the multiset of (token, next token) pairs of an epoch equals the corpus's."""
    batches = Batches(shards, 1, 24, seed=5, whole_documents=whole)
    got = []
    for step in range(batches.n_rows):
        (b,) = batches(step)
        valid = b["targets"] != -100
        got += list(zip(b["tokens"][valid].tolist(), b["targets"][valid].tolist(), strict=True))
    docs = [shards.document(i)[0] for i in range(len(shards))]
    if whole:
        want = [p for d in docs for p in zip(d[:-1].tolist(), d[1:].tolist(), strict=True)]
    else:
        stream = np.concatenate(docs)[: batches.n_rows * 24 + 1].tolist()
        want = list(zip(stream[:-1], stream[1:], strict=True))
    assert sorted(got) == sorted(want)


def test_batches_are_a_pure_function_of_seed_and_step_and_ranks_partition_them(shards):
    """Guards against hidden state, and against ranks that see the same rows."""
    make = lambda **k: Batches(shards, 6, 24, seed=5, **k)  # noqa: E731
    whole = make()
    late = make()(11)[0]["tokens"]
    for step in range(12):
        rows = whole(step)[0]["tokens"]
    assert torch.equal(rows, late)
    split = torch.cat([torch.cat([m["tokens"] for m in make(rank=r, world=3, micro_batch=1)(11)]) for r in range(3)])
    assert sorted(map(tuple, split.tolist())) == sorted(map(tuple, late.tolist()))
    assert not torch.equal(whole(0)[0]["tokens"], Batches(shards, 6, 24, seed=6)(0)[0]["tokens"])
    assert whole.indices(0) != whole.indices(whole.n_rows)  # another epoch, another order


def test_dialogues_train_on_answers_only_and_long_ones_keep_their_start(tokenizer, tmp_path):
    """Guards against loss on user tokens and against the tail of a dialogue that lacks its question."""
    items = [[{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"line {i} " * 9}] for i in range(5)]
    shards = Shards(write_shards(items, tokenizer.path, tmp_path / "chat", workers=1))
    ids, trained = shards.document(2)
    n = len(tokenizer.encode("[INST] Say 2 [/INST]", bos=True))
    assert not trained[:n].any() and trained[n:].all() and ids[-1] == tokenizer.eos_id
    batches = Batches(shards, 5, 20, cut=False)
    assert batches.n_rows == 5
    for b in batches(0):
        assert (b["tokens"][:, 0] == tokenizer.bos_id).all()
