"""Cleaning (sec 2.1, A.6): minillama clean docs.jsonl --out clean.jsonl

    kept, report = clean(docs, CleanConfig(), test_samples=prompts);  print(report);  score(report, docs)

The paper says little: public text, sites known for personal data removed, factual sources up-sampled, overlap with the test sets measured.
The rules here are those of published pipelines (Gopher's quality rules, MinHash de-duplication). They run in this order, each on what
the earlier ones kept: boilerplate, quality, private, toxic, contamination, exact_duplicate, near_duplicate. Each says why it flagged.

Toxic text was deliberately NOT filtered from Llama 2's pretraining data (sec 4.1: such models need fewer examples to be made safe, and
filters erase some groups of people from the data). So `toxic` is reported but drops nothing unless asked to.
A document's "defect" label is read by `score` only. Left out: language identification, learned quality classifiers, licences.
Documents are held in memory; a corpus that does not fit is cleaned shard by shard, which leaves duplicates between shards.
"""
from __future__ import annotations

import hashlib
import multiprocessing
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import repeat

import numpy as np

FILTERS = ("boilerplate", "quality", "private", "toxic", "contamination", "exact_duplicate", "near_duplicate")
TARGET = {"quality": "gibberish", "contamination": "leak"}  # the planted defect that a filter is for, where the names differ


@dataclass
class CleanConfig:
    """What is flagged and what is dropped. All values are assumed unless said otherwise: the paper gives none."""

    min_words: int = 5
    """Shortest document, in words (Gopher: 50; low here so that lists and sums stay)."""
    max_words: int = 100_000
    """Longest document, in words (Gopher's)."""
    min_mean_word_length: float = 1.5
    """Least mean word length, in characters (Gopher: 3; low here so that sums stay)."""
    max_mean_word_length: float = 10.0
    """Greatest mean word length, in characters (Gopher's)."""
    max_symbols: float = 0.1
    """Most marks of # and ... per word (Gopher's)."""
    min_wordlike: float = 0.7
    """Least share of words that are letters or a number once punctuation around them is taken off (Gopher: 0.8 with a letter)."""
    min_stop_words: int = 2
    """Least number of different English stop words in a document of 50 words or more (Gopher's; 0 for other languages)."""
    max_duplicate_lines: float = 0.5
    """Largest share of lines that repeat an earlier line of the document (Gopher: 0.3; lists of sums repeat more)."""
    max_duplicate_ngrams: float = 0.3
    """Largest share of word 10-grams that repeat an earlier one of the document (Gopher: 0.1 of the characters)."""
    boilerplate_docs: int = 3
    """A line with one web cue is boilerplate if at least this many documents have it, or 0.05% of all documents if that is more."""
    boilerplate_share: float = 0.5
    """Share of a document's words in boilerplate lines from which it is dropped; below it, the lines are taken out."""
    private: str = "drop"
    """What happens to documents with private data: drop, redact (replace each find by its kind in brackets) or keep."""
    drop_toxic: bool = False
    """Drop documents with hostile generalisations about a group (paper: no, sec 4.1); they are reported in any case."""
    leak_ngram: int = 8
    """Length of the n-grams compared with test samples, in words; a shorter sample is compared as a whole."""
    leak_share: float = 0.5
    """Share of a test sample's n-grams that a document must hold to be dropped."""
    leak_min_words: int = 4
    """Shortest test sample that is looked for, in words: shorter ones occur by chance."""
    shingle: int = 5
    """Length of the shingles that near-duplicates are compared by, in words."""
    near_threshold: float = 0.7
    """Jaccard similarity of two documents' sets of shingles from which the later one is a near-duplicate."""
    near_min_words: int = 40
    """Shortest document compared for near-duplicates, in words: short ones made from one template are alike by nature."""
    num_perm: int = 128
    """Hash functions of a MinHash signature."""
    bands: int = 32
    """Bands of the signature: two documents are compared if they agree on all num_perm / bands values of one band."""
    workers: int = 1
    """Processes for the rules that see one document at a time; the result does not depend on it."""

    def __post_init__(self) -> None:
        if self.private not in ("drop", "redact", "keep"):
            raise ValueError(f"private must be drop, redact or keep, got {self.private!r}")
        if self.bands < 1 or self.num_perm % self.bands:
            raise ValueError(f"bands {self.bands} must divide num_perm {self.num_perm}")
        for name in ("workers", "leak_ngram", "leak_min_words", "shingle"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.near_threshold <= 1 or not 0 < self.leak_share <= 1:
            raise ValueError(f"near_threshold and leak_share must be in (0, 1], got {self.near_threshold} and {self.leak_share}")


# ---- words and n-grams as numbers ----------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation: what duplicates and contamination are compared by."""
    return re.findall(r"[^\W_]+", text.lower())


@lru_cache(maxsize=1 << 20)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def ngram_hashes(words: Sequence[str], n: int) -> np.ndarray:
    """A 64-bit hash of each n-gram of `words`, in order: uint64 [max(0, len(words) - n + 1)], the same in every process."""
    h = np.fromiter(map(_word_hash, words), dtype=np.uint64, count=len(words))
    out = np.zeros(max(0, len(words) - n + 1), dtype=np.uint64)
    for i in range(n):
        out = out * np.uint64(0x9E3779B97F4A7C15) + h[i : i + len(out)]  # a polynomial in the word hashes, modulo 2^64
    return out


# ---- boilerplate ----------------------------------------------------------------------------------------------------------------

CUES = re.compile(
    r"click here|subscribe|newsletter|all rights reserved|\bcopyright\b|©|cookies? (?:policy|settings)|uses? cookies|privacy policy|"
    r"terms (?:of|and) (?:use|service|conditions)|share (?:this|on)\b|social media|^read more\b|^(?:next|previous) (?:page|post)|"
    r"\b(?:log|sign) ?(?:in|up|out)\b|enable javascript|back to top|skip to (?:main )?content|powered by|add to cart|>>| \| .* \| ",
    re.I)  # fmt: skip


@lru_cache(maxsize=1 << 16)
def cues(line: str) -> int:
    """How many different web cues a line of at most 15 words has; 0 for a longer line, which is prose."""
    return 0 if len(line.split()) > 15 else len({m.group().lower() for m in CUES.finditer(line)})


def boilerplate_lines(docs: Iterable[str], min_docs: int) -> set[str]:
    """Lines with two web cues, or with one and found in at least `min_docs` documents. A sentence without cues may repeat for ever."""
    count = Counter(line for text in docs for line in {line.strip() for line in text.split("\n")} if cues(line))
    return {line for line, n in count.items() if n >= min_docs or cues(line) > 1}


def strip_boilerplate(text: str, lines: set[str]) -> tuple[str, float]:
    """(text without those lines, share of its words that were in them). A document with three cued lines or more loses all of those."""
    split = text.split("\n")
    cued = [cues(line.strip()) > 0 for line in split]
    bad = cued if sum(cued) >= 3 else [line.strip() in lines for line in split]
    if not any(bad):
        return text, 0.0
    n_bad = sum(len(line.split()) for line, b in zip(split, bad, strict=True) if b)
    return "\n".join(line for line, b in zip(split, bad, strict=True) if not b), n_bad / max(1, len(text.split()))


# ---- quality --------------------------------------------------------------------------------------------------------------------

STOP_WORDS = frozenset("the be to of and that have with a in is it for was on as are at this has".split())
_EDGE = re.compile(r"^[^\w#@$%&*<>{}|~^]+|[^\w#@$%&*<>{}|~^]+$")  # punctuation of prose; marks of code and noise are not taken off
_WORDLIKE = re.compile(r"[^\W\d_]+(?:['’.-][^\W\d_]+)*|[$€£]?\d+(?:[.,:/-]\d+)*%?(?:st|nd|rd|th|s)?")


def quality(text: str, config: CleanConfig) -> str:
    """Why the text is not worth learning from, or "" (after Gopher's rules, Rae et al. 2021, table A1)."""
    words = text.split()
    n = len(words)
    if not config.min_words <= n <= config.max_words:
        return f"{'short' if n < config.min_words else 'long'}: {n} words"
    if not config.min_mean_word_length <= (mean := sum(map(len, words)) / n) <= config.max_mean_word_length:
        return f"word length: mean {mean:.1f} characters"
    if (symbols := (text.count("#") + text.count("...") + text.count("…")) / n) > config.max_symbols:
        return f"symbols: {symbols:.2f} a word"
    if (share := sum(bool(_WORDLIKE.fullmatch(_EDGE.sub("", w))) for w in words) / n) < config.min_wordlike:
        return f"word-like: {share:.2f} of the words"
    if n >= 50 and len(STOP_WORDS.intersection(words_of(text))) < config.min_stop_words:
        return f"stop words: fewer than {config.min_stop_words}"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) > 3 and (share := 1 - len(set(lines)) / len(lines)) > config.max_duplicate_lines:
        return f"repeated lines: {share:.2f}"
    if n >= 50 and (share := 1 - len(np.unique(grams := ngram_hashes(words, 10))) / len(grams)) > config.max_duplicate_ngrams:
        return f"repeated 10-grams: {share:.2f}"
    return ""


# ---- private data ---------------------------------------------------------------------------------------------------------------


def luhn(digits: str) -> bool:
    """Whether the check digit of a card number is right: every second digit from the right doubled, digits summed, a multiple of 10."""
    return sum(sum(divmod(int(d) * (1 + i % 2), 10)) for i, d in enumerate(reversed(digits))) % 10 == 0


def iban(text: str) -> bool:
    """Whether the check digits of an account number are right: its first four characters moved to the end, A = 10 ... Z = 35, 1 mod 97."""
    s = text.replace(" ", "")
    return 15 <= len(s) <= 34 and int("".join(str(int(c, 36)) for c in s[4:] + s[:4])) % 97 == 1


def _is_phone(text: str) -> bool:
    return 8 <= sum(c.isdigit() for c in text) <= 15  # E.164 allows 15


def _is_network_address(text: str) -> bool:
    parts = [int(x) for x in text.split(".")]
    return max(parts) < 256 and parts[0] not in (0, 127) and max(parts) > 9  # 1.2.3.4 is more often a section or a version


# kind, pattern, check of the match; earlier kinds are taken out before later ones are looked for
PRIVATE = tuple((kind, re.compile(pattern), check) for kind, pattern, check in (
    ("e-mail", r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,}\b", None),
    ("account", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", iban),
    ("card", r"(?<![\d.-])(?<![A-Z]{2}\d{2} )(?:[3-6]|2[2-7])\d(?:[ -]?\d){11,17}(?![\d-]|\.\d)", lambda s: luhn(re.sub(r"\D", "", s))),
    ("social security", r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])", None),
    ("phone", r"(?<![\w+])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){4,12}(?![\d-])", _is_phone),
    ("phone", r"(?<![\d(-])(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[.-])\d{3}[ .-]\d{4}(?![\d-]|\.\d)", None),
    ("phone", r"(?i:\b(?:tel|phone|call|mobile|fax)[.:]?(?: \w+){0,3}[:]? )\(?0\d{1,4}[)/ -]{1,2}\d(?:[ -]?\d){4,9}(?![\d-])", _is_phone),
    ("network address", r"(?<![\w.])(?<![Vv]ersion )\d{1,3}(?:\.\d{1,3}){3}(?!\.?\d|\w)", _is_network_address),
    ("street address", r"(?<![\d.,] )\b(?<![Ii]n )(?<![Ss]ince )\d{1,5}[A-Z]? (?:[A-Z][a-z]+ ){1,3}"
                       r"(?:Street|Avenue|Road|Lane|Drive|Boulevard|Court|Square|(?:St|Ave|Rd|Ln|Blvd)\.)(?!\w)", None),
))  # fmt: skip


def find_private(text: str) -> tuple[str, list[tuple[str, str]]]:
    """(text with each find replaced by its kind in brackets, the finds as (kind, matched text))."""
    found: list[tuple[str, str]] = []

    def replace(m: re.Match, kind: str, check) -> str:
        if check and not check(m.group()):
            return m.group()
        found.append((kind, m.group()))
        return f"[{kind}]"

    if re.search(r"\d|@", text):  # every kind has one of these
        for kind, pattern, check in PRIVATE:
            text = pattern.sub(partial(replace, kind=kind, check=check), text)
    return text, found


# ---- toxic lines ----------------------------------------------------------------------------------------------------------------

_GROUP = r"[A-Z][a-z]{2,}"
_HOSTILE = (r"(?:liars?|thie(?:f|ves)|cheats?|criminals?|savages|vermin|parasites|rats|scum|dirty|filthy|stupid|worthless|lazy|evil|"
            r"inferior|disgusting|subhuman|not (?:human|people|worth))")  # fmt: skip
_EXPEL = r"(?:driven out|thrown out|kicked out|wiped out|locked up|banned|beaten|killed|exterminated|punished|hated)"
TOXIC = re.compile(
    rf"\b(?:(?:[Aa]ll|[Mm]ost) (?:the |of the )?{_GROUP}|[Tt]h(?:e|ese|ose) {_GROUP}) (?:are|were) (?:all |just |only )?{_HOSTILE}\b"
    rf"|\b[Ee]very {_GROUP} is (?:an? )?{_HOSTILE}\b"
    rf"|\b{_GROUP} (?:should|must|ought to|need to|deserve to) (?:all )?be {_EXPEL}\b"
    rf"|\b(?:[Nn]obody|[Nn]o one|[Nn]ever|[Yy]ou cannot|[Dd]o not|[Dd]on't) (?:should |can |ever )?(?:trust|help|hire|like) "
    rf"(?:all |any |the |those )+{_GROUP}"
    rf"|\b(?:hate|despise|kill|beat|drive out|get rid of|wipe out) (?:all (?:the )?|every |those ){_GROUP}\b")  # fmt: skip
_DENIED = re.compile(r"\b(?:wrong|false|untrue|unfair|not true|lie that|myth|nonsense)\b", re.I)


def toxic(text: str) -> str:
    """The first hostile generalisation about a group with a capitalised name, or "".

    A lexicon of hostile words, not of slurs, and English grammar: it misses irony and lower-case names, and flags quoted hostility.
    A sentence that calls the claim wrong is let through.
    """
    for m in TOXIC.finditer(text):
        start = max(text.rfind(c, 0, m.start()) for c in ".!?\n") + 1
        ends = [e for c in ".!?\n" if (e := text.find(c, m.end())) >= 0]
        if not _DENIED.search(text[start : min(ends, default=len(text))]):
            return m.group()
    return ""


# ---- contamination --------------------------------------------------------------------------------------------------------------


class LeakIndex:
    """The n-grams of test samples, to be looked for in documents (A.6 in spirit; the paper's 4-token skips are left out).

    A sample of fewer than n words counts as one n-gram of its own length, and one of fewer than min_words is not looked for.
    """

    def __init__(self, samples: Iterable[str], n: int, min_words: int = 1):
        self.words = [words_of(s) for s in samples]
        self.sizes = [min(n, len(w)) if len(w) >= min_words else 0 for w in self.words]
        self.owners: dict[int, list[int]] = {}  # hash of an n-gram -> samples that hold it
        self.grams = [ngram_hashes(w, size) if size else np.zeros(0, np.uint64) for w, size in zip(self.words, self.sizes, strict=True)]
        by_size: dict[int, set[int]] = {}
        for i, (size, grams) in enumerate(zip(self.sizes, self.grams, strict=True)):
            for g in set(grams.tolist()):
                self.owners.setdefault(g, []).append(i)
                by_size.setdefault(size, set()).add(g)
        self.by_size = {size: np.array(sorted(g), dtype=np.uint64) for size, g in sorted(by_size.items())}

    def found(self, words: Sequence[str]) -> set[int]:
        """Hashes of the samples' n-grams that occur in `words`."""
        hits: set[int] = set()
        for size, known in self.by_size.items():
            grams = ngram_hashes(words, size)
            at = np.minimum(np.searchsorted(known, grams), len(known) - 1)
            hits.update(grams[known[at] == grams].tolist())
        return hits

    def leak(self, words: Sequence[str], share: float) -> str:
        """The sample of which `words` holds at least `share` of the n-grams, the most complete first, or ""."""
        hits = self.found(words)
        counts = Counter(i for g in hits for i in self.owners[g])
        shares = [(c / len(set(self.grams[i].tolist())), -i) for i, c in counts.items()]
        best, i = max(shares, default=(0.0, 0))
        return f"{best:.0%} of test sample {-i}: {' '.join(self.words[-i])[:80]!r}" if best >= share and shares else ""


def contamination(samples: Iterable[str], docs: Iterable[str], n: int = 11) -> np.ndarray:
    """Share of each test sample's words that lie in an n-gram that some document has too: float [samples] (A.6).

    The paper counts tokens in matches "longer than 10 tokens": n = 11. Words are counted here; a sample of fewer than n words is matched
    as a whole. See `subsets` for how the paper groups the samples.
    """
    index = LeakIndex(samples, n)
    hits: set[int] = set()
    for text in docs:
        hits |= index.found(words_of(text))
    out = np.zeros(len(index.words))
    for i, (words, size, grams) in enumerate(zip(index.words, index.sizes, index.grams, strict=True)):
        covered = np.zeros(len(words), dtype=bool)
        for start, g in enumerate(grams.tolist()):
            if g in hits:
                covered[start : start + size] = True
        out[i] = covered.mean() if words else 0.0
    return out


def subsets(fractions: np.ndarray) -> dict[str, list[int]]:
    """Indices of the samples in the paper's four overlapping groups (A.6): clean < 20% contaminated, dirty >= 80%, and the rests."""
    groups = {"clean": fractions < 0.2, "not clean": fractions >= 0.2, "not dirty": fractions < 0.8, "dirty": fractions >= 0.8}
    return {name: np.flatnonzero(mask).tolist() for name, mask in groups.items()}


# ---- near-duplicates ------------------------------------------------------------------------------------------------------------


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A and B| / |A or B| of two arrays of different values each; 0 where both are empty."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(1, len(a) + len(b) - both)


def candidate_probability(similarity: float, num_perm: int = 128, bands: int = 32) -> float:
    """Chance that two sets of this Jaccard similarity share a band and so are compared: 1 - (1 - s^rows)^bands."""
    return 1 - (1 - similarity ** (num_perm // bands)) ** bands


class NearDuplicates:
    """The documents kept so far, by MinHash bands (datasketch). Candidates are verified with the exact similarity."""

    def __init__(self, config: CleanConfig):
        from datasketch import MinHashLSH  # slow to import

        self.config = config
        self.lsh = MinHashLSH(num_perm=config.num_perm, params=(config.bands, config.num_perm // config.bands))
        self.shingles: dict[int, np.ndarray] = {}

    def find(self, shingles: np.ndarray, signature: np.ndarray) -> tuple[int, float] | None:
        """(position, similarity) of the most similar document at or over the threshold, the earliest of equals, or None."""
        near = [(jaccard(shingles, self.shingles[j]), -j) for j in self.lsh.query(_minhash(self.config.num_perm, signature))]
        best, j = max(near, default=(0.0, 0))
        return (-j, best) if best >= self.config.near_threshold else None

    def add(self, position: int, shingles: np.ndarray, signature: np.ndarray) -> None:
        """Remember a document that was kept."""
        self.lsh.insert(position, _minhash(self.config.num_perm, signature), check_duplication=False)
        self.shingles[position] = shingles


@lru_cache(maxsize=4)
def _empty_minhash(num_perm: int):
    from datasketch import MinHash

    return MinHash(num_perm=num_perm, seed=1, hashfunc=int)  # its permutations cost more than a document's signature: copy it


def _minhash(num_perm: int, hashvalues: np.ndarray):
    m = _empty_minhash(num_perm).copy()
    m.hashvalues = hashvalues
    return m


def signature(words: Sequence[str], config: CleanConfig) -> tuple[np.ndarray, np.ndarray]:
    """(different shingle hashes, sorted: uint64 [S]; MinHash signature [num_perm]) of a document."""
    shingles = np.unique(ngram_hashes(words, min(config.shingle, max(1, len(words)))))
    m = _empty_minhash(config.num_perm).copy()
    m.update_batch((shingles >> np.uint64(32)).tolist())  # datasketch's permutations take 32-bit values
    return shingles, m.hashvalues


# ---- the pipeline ---------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What cleaning did. `flags[i]` is filter -> reason for document i, also where nothing was dropped; `dropped_by[i]` is "" if kept."""

    flags: list[dict[str, str]] = field(default_factory=list)
    dropped_by: list[str] = field(default_factory=list)
    words_in: int = 0
    words_out: int = 0
    changed: int = 0

    def counts(self) -> dict[str, dict[str, int]]:
        """filter -> {"flagged", "dropped"}, in the order of the pipeline."""
        flagged, dropped = Counter(name for f in self.flags for name in f), Counter(self.dropped_by)
        return {name: {"flagged": flagged[name], "dropped": dropped[name]} for name in FILTERS}

    def __str__(self) -> str:
        n, kept = len(self.flags), self.dropped_by.count("")
        lines = [f"{'filter':<16}{'flagged':>9}{'dropped':>9}"]
        lines += [f"{name:<16}{c['flagged']:>9,}{c['dropped']:>9,}" for name, c in self.counts().items()]
        lines += [f"kept {kept:,} of {n:,} documents, {self.words_out:,} of {self.words_in:,} words; {self.changed:,} kept with changes"]
        return "\n".join(lines)


def _one(text: str, config: CleanConfig, lines: set[str], index: LeakIndex | None):
    """All rules that need one document only: (text, flags, the filter that drops it or "", digest, shingles, signature)."""
    text, share = strip_boilerplate(text, lines)
    if share >= config.boilerplate_share:
        return text, {"boilerplate": f"{share:.0%} of the words"}, "boilerplate", None, None, None
    if reason := quality(text, config):
        return text, {"quality": reason}, "quality", None, None, None
    flags, drop = {}, ""
    redacted, found = find_private(text)
    if found:
        flags["private"], drop = ", ".join(sorted({kind for kind, _ in found})), "private" if config.private == "drop" else ""
        text = redacted if config.private == "redact" else text
    if not drop and (reason := toxic(text)):
        flags["toxic"], drop = reason, "toxic" if config.drop_toxic else ""
    words = words_of(text)
    if not drop and index and (reason := index.leak(words, config.leak_share)):
        flags["contamination"], drop = reason, "contamination"
    if drop:
        return text, flags, drop, None, None, None
    digest = hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return text, flags, "", digest, *(signature(words, config) if len(words) >= config.near_min_words else (None, None))


_state: tuple = ()  # of a worker process: config, boilerplate lines, leak index


def _start(*state) -> None:
    global _state
    _state = state


def _work(text: str):
    return _one(text, *_state)


def clean(docs: Iterable[dict], config: CleanConfig | None = None, test_samples: Iterable[str] = ()) -> tuple[list[dict], Report]:
    """Filter documents; returns (those kept, in order, and a Report on all of them). The dicts given are never changed.

    test_samples: texts of the evaluation that must not be trained on: prompts, or prompts with their answers. A bare answer that states a
    fact would take the fact itself out of the corpus.
    With workers > 1 the calling script needs `if __name__ == "__main__":`, since the processes are spawned.
    """
    config, docs = config or CleanConfig(), list(docs)
    lines = boilerplate_lines((d["text"] for d in docs), max(config.boilerplate_docs, len(docs) // 2000))
    samples = list(test_samples)
    state = (config, lines, LeakIndex(samples, config.leak_ngram, config.leak_min_words) if samples else None)
    texts = (d["text"] for d in docs)
    if config.workers == 1:
        return _sequential(docs, map(_one, texts, *map(repeat, state)), config)
    with multiprocessing.get_context("spawn").Pool(config.workers, _start, state) as pool:
        return _sequential(docs, pool.imap(_work, texts, chunksize=128), config)


def _sequential(docs: list[dict], results: Iterable[tuple], config: CleanConfig) -> tuple[list[dict], Report]:
    """The rules that compare documents, in the order of the corpus: the first of a set of duplicates is kept."""
    report, kept, seen, near = Report(), [], {}, NearDuplicates(config)
    for i, (doc, (text, flags, drop, digest, shingles, sig)) in enumerate(zip(docs, results, strict=True)):
        if not drop and digest in seen:
            flags["exact_duplicate"], drop = f"of document {seen[digest]}", "exact_duplicate"
        elif not drop and sig is not None and (match := near.find(shingles, sig)):
            flags["near_duplicate"], drop = f"of document {match[0]}, similarity {match[1]:.2f}", "near_duplicate"
        report.flags.append(flags)
        report.dropped_by.append(drop)
        report.words_in += len(doc["text"].split())
        if not drop:
            seen[digest] = i
            if sig is not None:
                near.add(i, shingles, sig)
            report.words_out += len(text.split())
            report.changed += text != doc["text"]
            kept.append({**doc, "text": text})
    return kept, report


def score(report: Report, docs: Sequence[dict]) -> dict[str, dict]:
    """Precision and recall of each filter against the planted "defect" labels of the documents that were given to `clean`.

    filter -> {"planted", "flagged", "hits", "other", "precision", "recall"}: `hits` have the defect the filter is for, `other` of the
    flagged have another planted defect (a leak appended to a copy is a near-duplicate as well), and the rest have no planted defect: false
    alarms, except that exact_duplicate also finds the short documents that the generator wrote twice by chance.
    precision = hits / flagged and recall = hits / planted, None where that divides by 0. A filter sees only what earlier ones kept.
    """
    assert len(docs) == len(report.flags), f"{len(docs)} documents and a report on {len(report.flags)}"
    table = {}
    for name in FILTERS:
        target = TARGET.get(name, name)
        labels = [d.get("defect") for d, f in zip(docs, report.flags, strict=True) if name in f]
        planted, hits = sum(d.get("defect") == target for d in docs), labels.count(target)
        table[name] = {"planted": planted, "flagged": len(labels), "hits": hits, "other": len(labels) - hits - labels.count(None),
                       "precision": hits / len(labels) if labels else None, "recall": hits / planted if planted else None}  # fmt: skip
    return table
