"""Sources: every format gives the same dicts, bad input gets one line that names the place, mixing counts are exact."""
import gzip
import json
from collections import Counter

import pytest

from minillama.data import sources
from minillama.data.sources import Columns, by_source, mix, parse_dialogue, read, write_jsonl

ROWS = [{"text": f"Document {i} says: naïve café.", "source": "web", "kind": "story", "defect": None} for i in range(5)]


def write_parquet(rows, path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
def test_local_formats_agree_and_extra_columns_ride_along(tmp_path, name):
    path = tmp_path / name
    write_parquet(ROWS, path) if name.endswith("parquet") else write_jsonl(ROWS, path)
    assert list(read(path)) == ROWS
    assert list(read(str(path), limit=2, kind="document")) == ROWS[:2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [name], "no temporary file is left"


def test_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    words = [f"w{i}" for i in range(9000)]  # about 50,000 characters
    text = "".join(w + ("\r\n\r\n" if i % 50 == 49 else " ") for i, w in enumerate(words))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    docs = list(read(tmp_path / "a.txt"))
    assert " ".join(d["text"] for d in docs).split() == words
    assert 5 <= len(docs) <= 8 and all(0 < len(d["text"]) <= sources.MAX_CHARS for d in docs)
    assert all(d["text"].split()[0] == f"w{50 * round(int(d['text'].split()[0][1:]) / 50)}" for d in docs), "cuts are at blank lines"
    (tmp_path / "long.md").write_text("x" * 25_000)  # no place to cut
    assert [len(d["text"]) for d in read(tmp_path / "long.md")] == [10_000, 10_000, 5_000]


def test_folder_and_glob_are_sorted(tmp_path):
    for name in ("b/2.txt", "a/1.md", "c/3.jsonl", "c/skip.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "text of 3"}' if name.endswith("jsonl") else f"text of {name[2]}")
    assert [d["text"] for d in read(tmp_path)] == ["text of 1", "text of 2", "text of 3"]
    assert [d["text"] for d in read(f"{tmp_path}/*/*.txt")] == ["text of 2"]
    assert next(read(tmp_path))["source"] == str(tmp_path)


def test_dialogue_of_several_turns():
    text = "\n\nHuman: Hi.\n\nIt is me: Human: ok?\n\nAssistant: Hello.\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: Three."
    assert parse_dialogue(text) == [
        {"role": "user", "content": "Hi.\n\nIt is me: Human: ok?"},  # a mark inside a line is text
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "One.\n\nTwo."},
        {"role": "assistant", "content": "Three."},
    ]
    with pytest.raises(ValueError, match="not a dialogue"):
        parse_dialogue("Hello there")


def test_hh_pairs_split_where_the_answers_part(tmp_path):
    head = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    rows = [
        {"chosen": f"{head} good", "rejected": f"{head} bad"},
        {"chosen": f"{head} good\n\nHuman: d\n\nAssistant: e", "rejected": f"{head} bad"},  # parts before the last turn
        {"chosen": f"{head} same", "rejected": f"{head} same"},
        {"chosen": "\n\nHuman: x\n\nAssistant: y", "rejected": "\n\nHuman: z\n\nAssistant: y"},  # no common prompt
        {"chosen": f"{head} good", "rejected": f"{head}"},  # an empty answer
    ]
    write_jsonl(rows, tmp_path / "hh.jsonl")
    with pytest.warns(UserWarning, match="skipped 3 pairs.* kept 2"):
        pairs = list(read(tmp_path / "hh.jsonl", kind="preference"))
    assert len(pairs) == 2
    for p in pairs:
        assert [m["content"] for m in p["prompt_messages"]] == ["a", "b", "c"] and (p["chosen"], p["rejected"]) == ("good", "bad")


@pytest.mark.parametrize("row, user, answer", [
    ({"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "whole prompt"}, "Add.\n\n1 and 2", "3"),
    ({"instruction": "Add.", "input": "", "output": "3"}, "Add.", "3"),
    ({"instruction": "Sum?", "context": "1, 2", "response": "3", "category": "qa"}, "Sum?\n\n1, 2", "3"),
    ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], "prompt": "Q"}, "Q", "A"),
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_known_instruction_sets(tmp_path, row, user, answer, suffix):
    path = tmp_path / f"d.{suffix}"
    write_jsonl([row], path) if suffix == "jsonl" else write_parquet([row], path)
    (item,) = read(path, kind="instruction")
    assert item["messages"] == [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    assert item.get("category") == row.get("category")
    with pytest.raises(ValueError, match="holds instructions .* documents are wanted"):
        list(read(path, kind="document"))


def test_preferences_with_prompts_and_own_columns(tmp_path):
    write_jsonl([{"prompt": "Q", "chosen": "A", "rejected": "B", "strength": 3}], tmp_path / "p.jsonl")
    want = {"prompt_messages": [{"role": "user", "content": "Q"}], "chosen": "A", "rejected": "B", "strength": 3}
    (pair,) = read(tmp_path / "p.jsonl")
    assert pair == {**want, "source": str(tmp_path / "p.jsonl")}
    write_jsonl([want], tmp_path / "own.jsonl")  # minillama's own files come back as they are
    assert {**next(read(tmp_path / "own.jsonl")), "source": ""} == {**want, "source": ""}
    write_jsonl([{"frage": "Q", "antwort": "A"}], tmp_path / "q.jsonl")
    (item,) = read(tmp_path / "q.jsonl", columns={"prompt": "frage", "answer": "antwort"})
    assert [m["content"] for m in item["messages"]] == ["Q", "A"] and "frage" not in item


def test_hub_uses_the_declared_columns(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": ""}, {"text": "b"}]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = "hf:Salesforce/wikitext:wikitext-2-raw-v1"
    assert list(read(spec, split="validation")) == [{"text": "a", "source": spec}, {"text": "b", "source": spec}]
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", True)]
    with pytest.raises(ValueError, match=r"no column 'instruction'; present are 'text'"):
        list(read("hf:tatsu-lab/alpaca"))

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="hf:a/b .*ConnectionError: Couldn't reach the hub.*network.*cache.*local"):
        list(read("hf:a/b"))
    with pytest.raises(ValueError, match="write hf:owner/name"):
        list(read("hf:a/b/c d"))


@pytest.mark.parametrize("name, content, match", [
    ("a.txt", b"", "a.txt holds no text"),
    ("a.txt", b" \n\n \n", "a.txt holds no text"),
    ("a.jsonl", b"\n", "a.jsonl holds no text"),
    ("a.jsonl", b'{"text": "  "}\n', "a.jsonl holds no text"),
    ("a.txt", b"good line\nbad \xff byte", r"a.txt is not UTF-8: byte 0xff at offset 14 \(line 2\)"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"byte 0xe9 at offset 24 \(line 2\)"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a.jsonl:3: not JSON"),
    ("a.jsonl", b'["x"]\n', r"a.jsonl:1: a line must be one JSON object.* got list"),
    ("a.jsonl", b'{"body": "x", "id": 1}\n', r"a.jsonl:1: .*present are 'body', 'id'.*columns="),
    ("a.jsonl", b'{"text": 7}\n', r"a.jsonl:1: column 'text' must hold text, got int"),
    ("a.jsonl", b'{"messages": ["x"]}\n', r"a.jsonl:1: messages must be a list"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "not a whole gzip file"),
    ("a.jsonl.gz", b'{"text": "x"}\n', "not a whole gzip file"),
    ("a.parquet", b"PAR1 no", "not a whole parquet file"),
    ("a.csv", b"text\nx", "must end in one of .txt"),
])  # fmt: skip
def test_bad_files(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        list(read(tmp_path / name))


def test_bad_requests(tmp_path):
    for spec in (tmp_path / "none.txt", tmp_path, f"{tmp_path}/*.txt"):
        with pytest.raises(FileNotFoundError, match="no file at"):
            list(read(spec))
    write_jsonl(ROWS, tmp_path / "d.jsonl")
    with pytest.raises(ValueError, match="unknown part 'question'"):
        list(read(tmp_path / "d.jsonl", columns={"question": "text"}))
    with pytest.raises(ValueError, match="there is no column 'body'; present are 'text'"):
        list(read(tmp_path / "d.jsonl", columns=Columns(text="body")))
    with pytest.raises(ValueError, match="make no document"):
        list(read(tmp_path / "d.jsonl", columns={"prompt": "text"}))


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "d.jsonl"
    assert write_jsonl(ROWS, path) == 5
    with pytest.raises(TypeError):
        write_jsonl([{"text": "x"}, {"text": object()}], path)
    assert [json.loads(x) for x in path.read_text().splitlines()] == ROWS and len(list(tmp_path.iterdir())) == 1


def docs(name, n):
    return [{"text": f"{name}{i}", "source": name} for i in range(n)]


def test_mix_takes_exact_passes():
    pools = by_source(docs("web", 100) + docs("wiki", 7) + docs("out", 3))
    mixture, report = mix(pools, {"web": 1, "wiki": 2.5, "out": 0}, seed=3)
    count = Counter(d["text"] for d in mixture)
    assert len(mixture) == 100 + 18  # 2.5 * 7 = 17.5 rounds to 18: two passes and 4 of 7
    assert all(count[f"web{i}"] == 1 for i in range(100))
    assert sorted(count[f"wiki{i}"] for i in range(7)) == [2, 2, 2, 3, 3, 3, 3] and not count["out0"]
    assert report["wiki"] == {"size": 7, "taken": 18, "epochs": 18 / 7, "share": 18 / 118}
    assert mixture == mix(pools, {"web": 1, "wiki": 2.5, "out": 0}, seed=3)[0]
    other = mix(pools, {"web": 1, "wiki": 2.5, "out": 0}, seed=4)[0]
    assert [d["text"] for d in other] != [d["text"] for d in mixture], "the seed orders"
    first = [d["source"] for d in mixture[:59]].count("wiki")
    assert 3 <= first <= 15, "shuffled, not appended"
    more, _ = mix({**pools, "new": docs("new", 9)}, {"web": 1, "wiki": 2.5, "out": 0, "new": 1}, seed=3)
    assert Counter(d["text"] for d in more if d["source"] != "new") == count, "another source changes no choice"


def test_mix_to_a_number_of_documents():
    pools = {"a": docs("a", 10), "b": docs("b", 20), "c": docs("c", 30)}
    for n in (0, 1, 59, 60, 61, 1000):
        mixture, report = mix(pools, {"a": 3, "b": 1, "c": 1 / 3}, seed=0, n_docs=n)  # 30 : 20 : 10
        assert len(mixture) == n == sum(r["taken"] for r in report.values())
        for name, share in (("a", 1 / 2), ("b", 1 / 3), ("c", 1 / 6)):
            assert abs(report[name]["taken"] - n * share) < 1
    for weights, match in (({"a": 1, "b": 1}, "'c' has no weight"), ({"a": 1, "b": 1, "c": 1, "d": 1}, "'d' has no documents"),
                           ({"a": -1, "b": 1, "c": 1}, "got -1")):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            mix(pools, weights, seed=0)
    with pytest.raises(ValueError, match="holds no documents"):
        mix({"a": []}, {"a": 1}, seed=0)
