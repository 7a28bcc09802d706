"""Reward models (sec 3.2.2): a chat model whose last state becomes one number, trained so that the preferred answer's number is higher.

    minillama reward --data runs/my/preferences.jsonl --init runs/my/sft --out runs/my/reward

The loss is -log sigmoid(r_chosen - r_rejected - m), m by the strength of the preference; a safety model adds a classification of each answer as safe.
Two models are trained, one for helpfulness and one for safety, and `Gated` is the paper's combination of them (sec 3.2.3).

Departure: the last-state head of a million-parameter model judges manner well and relations badly: is this the fact about that person, are the asked
words in the story? With `evidence` the score adds two bounded sums. Surprise: every token of the answer whose
log-probability under the model itself is more than 1 nat below what the model expects there (its negative entropy) counts against it, by 6 nats at
most; where many words would do, none is a surprise. Uptake: every token of the prompt, as much as the model finds it wanted (-1 to 1),
times its best match among the answer's tokens. The first never rises with length, the second is at most the number of the prompt's tokens.
Ranking alone makes such a model forget what it knows, so with `text_weight` the loss adds the chosen answer's language modelling (Yang et al. 2024,
arXiv 2406.10216).

Shapes: B rows, T time, D model, V vocabulary.
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minillama import checkpoint
from minillama.chat import Message, encode_dialogue
from minillama.config import MARGINS, LlamaConfig, RewardConfig
from minillama.data.preferences import STRENGTHS, Pair, read_pairs
from minillama.model import Llama
from minillama.parallel import mesh as parallel
from minillama.parallel.state import build, copy_weights
from minillama.tokenizer import Tokenizer
from minillama.trainer import last_state, train, with_validation, write_config

SLACK, DEEPEST, MATCH = 1.0, -6.0, 32


class RewardModel(Llama):
    """A Llama with a scalar head on the state of the last token; `evidence` adds the two bounded sums that the module describes."""

    def __init__(self, config: LlamaConfig, evidence: bool = False):
        super().__init__(config)
        self.score = nn.Linear(config.dim, 1)
        self.evidence = evidence
        if evidence:
            self.gain = nn.Parameter(torch.empty(1))
            self.wanted = nn.Linear(config.dim, 1)  # how much the answer should (or should not) take up a token of the prompt
            self.match = nn.Linear(config.dim, MATCH, bias=False)
        self.init_heads()

    @torch.no_grad()
    def init_heads(self, seed: int = 0) -> None:
        """Draw what a Llama does not have from a seed, each tensor by a generator of its own as in `Llama.init_weights`: the same on any mesh."""
        from zlib import crc32

        for name, module, std in (("score", self.score, (self.config.dim + 1) ** -0.5), ("match", getattr(self, "match", None), (3 * self.config.dim) ** -0.5)):
            if module is not None:
                g = torch.Generator().manual_seed(crc32(f"{seed}:{name}.weight".encode()))
                module.weight.copy_(torch.randn(module.weight.shape, generator=g) * std)
        for p in (self.score.bias, *(self.wanted.parameters() if self.evidence else ())):
            p.fill_(0.0)
        if self.evidence:
            self.gain.fill_(0.3)

    def values(self, tokens: Tensor) -> Tensor:
        """The head's number at every position, [B,T]: what a critic is made of."""
        return self.score(self.features(tokens)).squeeze(-1)

    def rewards(self, tokens: Tensor, starts: Tensor, lengths: Tensor, text: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """One reward a row, [B]. tokens [B,T] padded on the right, the answer at starts[B] to lengths[B]-1; the score is read at the row's last
        real token, which is EOS if the answer was finished. With `text` also each answer's negative log-likelihood under the model itself, [B], in
        nats, a mean over its tokens."""
        features = self.features(tokens)  # [B,T,D]
        rows = torch.arange(len(tokens), device=tokens.device)
        reward = self.score(features[rows, lengths - 1]).squeeze(-1).float()  # [B], fp32 under autocast too
        if not (self.evidence or text):
            return reward
        at = torch.arange(tokens.shape[1], device=tokens.device)
        answer = (at >= starts[:, None]) & (at < lengths[:, None])  # [B,T]
        said = answer[:, 1:]  # [B,T-1], in the place of the state that predicts the token
        logp = self.output(features[:, :-1][said]).float().log_softmax(-1)  # [N,V], the N answer tokens of all rows
        written = logp.gather(1, tokens[:, 1:][said].unsqueeze(1)).squeeze(1)  # [N]
        row_of = said.nonzero()[:, 0]  # [N]
        nll = -torch.zeros_like(reward).index_add(0, row_of, written) / said.sum(1).clamp(min=1)
        if not self.evidence:
            return reward, nll
        entropy = -(logp.exp() * logp).sum(-1)  # [N]
        surprise = (written + entropy + SLACK).clamp(DEEPEST, 0.0)
        reward = reward + self.gain * torch.zeros_like(reward).index_add(0, row_of, surprise)
        keys = F.normalize(self.match(self.tok_embeddings(tokens)), dim=-1)  # [B,T,MATCH]
        similar = torch.einsum("bim,bjm->bij", keys, keys).masked_fill(~answer[:, None], -1.0)  # [B,T,T]
        taken_up = similar.amax(2)  # [B,T], for each token of the prompt its best match in the answer
        wanted = torch.tanh(self.wanted(features)).squeeze(-1)  # [B,T]
        reward = reward + (wanted * taken_up * (at < starts[:, None])).sum(1)
        return (reward, nll) if text else reward


def load(dir: str | Path, *, bf16: bool = False, compile: bool = False) -> tuple[RewardModel, Tokenizer]:
    """The reward model that `run` wrote to a stage's folder, in eval mode, and its tokenizer; in a job of several ranks split over them, with the
    options of `shard.parallelize`. Raises ValueError if it holds none."""
    found = checkpoint.load_state(Path(dir) / "checkpoint")
    if found is None or not (Path(dir) / "reward.json").exists():
        raise ValueError(f"{dir} holds no reward model; train one with `minillama reward --out {dir}`")
    path = found[1]
    config = LlamaConfig(**json.loads((path / "params.json").read_text()))
    evidence = json.loads((Path(dir) / "reward.json").read_text())["evidence"]
    model = build(lambda: RewardModel(config, evidence), lambda m: checkpoint.load_weights(m, path), parallel.current(), bf16=bf16, compile=compile)
    return model.eval(), Tokenizer(path / "tokenizer.model")


def from_chat(chat: Llama | checkpoint.Stored, evidence: bool, seed: int = 0, *, bf16: bool = False, compile: bool = False) -> RewardModel:
    """A reward model that starts from a chat model's weights (sec 3.2.2), its heads drawn from `seed`. In a job of several ranks it is split over them,
    with the options of `shard.parallelize`, and is best made from a checkpoint that is only opened, so that nobody holds the chat model."""

    def fill(model: RewardModel) -> None:
        copy_weights(chat, model)
        model.init_heads(seed)

    with torch.random.fork_rng(devices=[]):  # modules draw when they are made
        return build(lambda: RewardModel(chat.config, evidence), fill, parallel.current(), bf16=bf16, compile=compile)


def encode(tokenizer: Tokenizer, messages: Sequence[dict], answer: str | Sequence[int], limit: int, finished: bool = True) -> tuple[list[int], int] | None:
    """(tokens, start of the answer) of a dialogue whose last turn is `answer`, text or tokens; the oldest exchanges go until it fits `limit` tokens.

    None if the last question and the answer do not fit: to cut an answer's end would judge another answer. An answer given as tokens is taken as it
    was sampled; text gets the format's space and, if `finished`, EOS.
    """
    messages = [Message(m["role"], m["content"]) for m in messages]
    ids = list(answer) if not isinstance(answer, str) else tokenizer.encode(f"{answer} ", eos=finished)
    first = 1 if messages[0].role == "system" else 0
    while True:
        prompt = encode_dialogue(tokenizer, messages)[0]
        if len(prompt) + len(ids) <= limit:
            return prompt + ids, len(prompt)
        if len(messages) - first <= 1:
            return None
        del messages[first : first + 2]


def encode_pair(tokenizer: Tokenizer, pair: Pair, limit: int) -> tuple[tuple[list[int], int], tuple[list[int], int]] | None:
    """`encode` of both answers behind the same prompt: what the longer answer leaves no room for, the shorter does not see either. None if one of them
    does not fit."""
    sides = [encode(tokenizer, pair.prompt_messages, x, limit) for x in (pair.chosen, pair.rejected)]
    if None in sides:
        return None
    start = min(s for _, s in sides)
    same = [encode(tokenizer, pair.prompt_messages, x, start + len(ids) - s) for x, (ids, s) in zip((pair.chosen, pair.rejected), sides, strict=True)]
    return same[0], same[1]


def stack(rows: Sequence[tuple[list[int], int]]) -> dict[str, Tensor]:
    """tokens [B,T] padded on the right with 0, starts [B] and lengths [B] of rows (tokens, start); causal attention never looks at the padding."""
    T = max(len(ids) for ids, _ in rows)
    tokens = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in rows])
    return {"tokens": tokens, "starts": torch.tensor([s for _, s in rows]), "lengths": torch.tensor([len(ids) for ids, _ in rows])}


class PairBatches:
    """batches(step) -> this data rank's micro-batches of pairs, a pure function of (seed, step); every epoch visits all pairs in an order of its own.

    A row of a micro-batch's tokens is a chosen answer in the first half and its rejected one in the second. Pairs that do not fit `seq_len`, or
    whose sides are the same tokens, are left out; `dropped` counts them. Raises ValueError if none is left, or fewer than there are ranks.
    """

    def __init__(self, pairs: Sequence[Pair], tokenizer: Tokenizer, seq_len: int, batch_size: int, seed: int = 0, micro_batch: int = 0,
                 margin: str = "small", rank: int = 0, world: int = 1):  # fmt: skip
        self.rows, self.rank, self.world = [], rank, world
        for p in pairs:
            sides = encode_pair(tokenizer, p, seq_len)
            if sides and sides[0] != sides[1]:
                self.rows.append((*sides, MARGINS[margin][p.strength], p))
        self.dropped = len(pairs) - len(self.rows)
        if not self.rows:
            raise ValueError(f"none of {len(pairs)} pairs fits {seq_len} tokens; raise train.seq_len")
        self.batch_size, self.micro, self.seed = min(batch_size, len(self.rows)) // world * world, micro_batch or batch_size, seed
        if not self.batch_size:
            raise ValueError(f"a batch of {min(batch_size, len(self.rows))} pairs is smaller than the {world} data ranks")

    @property
    def steps_per_epoch(self) -> float:
        """Steps that visit every pair once."""
        return len(self.rows) / self.batch_size

    def __call__(self, step: int) -> list[dict[str, Tensor]]:
        n, first = len(self.rows), step * self.batch_size
        orders = {e: np.random.default_rng([self.seed, e]).permutation(n) for e in {first // n, (first + self.batch_size - 1) // n}}
        mine = [self.rows[orders[i // n][i % n]] for i in range(first, first + self.batch_size)]
        mine.sort(key=lambda r: max(len(r[0][0]), len(r[1][0])))  # like lengths in a micro-batch: less padding, the same gradient
        mine = mine[self.rank :: self.world]
        return [self.collate(mine[i : i + self.micro]) for i in range(0, len(mine), self.micro)]

    @staticmethod
    def collate(rows: list[tuple]) -> dict[str, Tensor]:
        """Tensors of pairs: tokens [2b,T], starts, lengths, safe [2b] (1, 0, or -1 where unknown), margins [b]."""
        label = lambda x: -1.0 if x is None else float(x)  # noqa: E731
        safe = [label(r[3].chosen_safe) for r in rows] + [label(r[3].rejected_safe) for r in rows]
        return {**stack([r[0] for r in rows] + [r[1] for r in rows]), "margins": torch.tensor([r[2] for r in rows]), "safe": torch.tensor(safe)}


def ranking_loss(chosen: Tensor, rejected: Tensor, margins: Tensor) -> Tensor:
    """-log sigmoid(r_chosen - r_rejected - m) of each pair, [b] (sec 3.2.2, eq 2)."""
    return -F.logsigmoid(chosen - rejected - margins)


def reward_loss(safety_weight: float = 0.0, text_weight: float = 0.0):
    """The loss of a batch of `PairBatches`: sum of ranking losses and their number; with a weight, plus the auxiliary loss: the mean of both sides'
    cross-entropies of sigmoid(r) against the safety label, where there is one (sec 3.2.2; the formula is assumed); with the other, plus the
    language-modelling loss of the chosen answers (Yang et al. 2024)."""

    def loss(model: RewardModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        where = batch["tokens"], batch["starts"], batch["lengths"]
        rewards, nll = model.rewards(*where, text=True) if text_weight else (model.rewards(*where), None)  # [2b]
        chosen, rejected = rewards.chunk(2)
        total = ranking_loss(chosen, rejected, batch["margins"]).sum()
        if safety_weight:
            known = batch["safe"] >= 0
            bce = F.binary_cross_entropy_with_logits(rewards, batch["safe"].clamp(min=0.0), reduction="none")
            total = total + safety_weight * 0.5 * bce.masked_fill(~known, 0.0).sum()
        if text_weight:
            total = total + text_weight * nll.chunk(2)[0].sum()
        return total, torch.tensor(len(chosen), device=rewards.device)

    return loss


def mix(pairs: Sequence[Pair], kind: str, seed: int = 0) -> list[Pair]:
    """The paper's mixture (sec 3.2.2): a helpfulness model sees all helpfulness pairs and as many others at most, a safety model all safety pairs and,
    as a tenth of the whole, helpfulness pairs."""
    mine = [p for p in pairs if p.kind == kind]
    others = [p for p in pairs if p.kind != kind]
    np.random.default_rng(seed).shuffle(others)
    return mine + others[: len(mine) if kind == "helpful" else len(mine) // 9] if mine else list(pairs)


def run(config: RewardConfig, pairs: Sequence[Pair] | None = None) -> RewardModel:
    """Train a reward model by `config`; `pairs` replaces config.data. Writes reward.json with what it is, metrics.jsonl with its
    validation accuracy, and checkpoint/.

    Raises ValueError for data without pairs, or a checkpoint without a tokenizer.
    """
    out, c = Path(config.out), config.train
    mesh = parallel.start(c.parallel, c.device)
    if config.text_weight and mesh.tensor > 1:
        raise ValueError(f"text_weight {config.text_weight} needs whole logits: tensor must be 1, not {mesh.tensor}")
    last_state(out, config.resume)
    pairs = read_pairs(config.data) if pairs is None else list(pairs)
    chat = checkpoint.opened(config.init)
    tokenizer = chat.tokenizer
    if tokenizer is None:
        raise ValueError(f"{config.init} has no tokenizer.model; put the one it was trained with beside the weights")
    if c.seq_len > chat.config.max_seq_len:
        raise ValueError(f"train.seq_len {c.seq_len} is more than the model's max_seq_len {chat.config.max_seq_len}")
    model = from_chat(chat, config.evidence, c.seed, bf16=c.bf16, compile=c.compile)
    mixed = mix(pairs, config.kind, c.seed)
    np.random.default_rng(c.seed).shuffle(mixed)
    # the two sides of a prompt's pairs share its text: a prompt is on one side only
    held = {json.dumps(p.prompt_messages) for p in mixed[: round(len(mixed) * config.val_fraction)]}
    kept = [p for p in mixed if json.dumps(p.prompt_messages) not in held]
    val = [p for p in mixed if json.dumps(p.prompt_messages) in held]
    batches = PairBatches(kept, tokenizer, c.seq_len, c.batch_size, c.seed, c.micro_batch, config.margin, mesh.data_rank, mesh.data_ranks)
    steps = max(1, round(config.epochs * batches.steps_per_epoch))
    c = dataclasses.replace(c, steps=steps, warmup_steps=min(steps // 2, max(c.warmup_steps, round(0.03 * steps))))
    mesh.first(lambda: write_config(dataclasses.replace(config, train=c), out))
    about = json.dumps({"evidence": config.evidence, "kind": config.kind, "pairs": len(kept), "dropped": batches.dropped})
    mesh.first(lambda: (out / "reward.json").write_text(about))
    loss = reward_loss(config.safety_weight, config.text_weight)
    held_batches = PairBatches(val, tokenizer, c.seq_len, 64, 0, 0, config.margin) if val else None
    val_batches = [held_batches.collate(held_batches.rows[i : i + 64]) for i in range(0, len(held_batches.rows), 64)] if val else None
    measure = with_validation(val_batches, loss, lambda m: {"accuracy": accuracy(m, tokenizer, val)["all"]["accuracy"]} if val else {})
    model = train(model, batches, loss, c, out, tokenizer, measure, config.resume, label=f"reward ({config.kind})")
    return model


@torch.no_grad()
def score(model: RewardModel, rows: Sequence[tuple[list[int], int]], batch: int = 64) -> Tensor:
    """Rewards [n] of rows (tokens, start of the answer), on the model's device; returned on the CPU. `batch` rows a data rank go together, of like
    length; with many more a CPU takes up to twice the time, as each layer's states then are fresh memory."""
    device, mesh = next(model.parameters()).device, parallel.current()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    rewards = torch.zeros(len(rows), device=device)
    for k in range(0, len(order), batch * mesh.data_ranks):
        index = order[k : k + batch * mesh.data_ranks]
        mine = index[mesh.share(len(index))]
        # a rank without a row of its own goes along: its part of the weights is needed
        x = {name: t.to(device) for name, t in stack([rows[i] for i in mine or index[:1]]).items()}
        rewards[mine] = model.rewards(**x).float()[: len(mine)]
    return mesh.sum(rewards).cpu()


def accuracy(model: RewardModel, tokenizer: Tokenizer, pairs: Sequence[Pair]) -> dict:
    """Share of pairs whose chosen answer has the higher reward (a tie is half), by strength and over all, each {"accuracy", "n"} (table 8)."""
    limit, rows, kept = model.config.max_seq_len, [], []
    for p in pairs:
        if both := encode_pair(tokenizer, p, limit):
            rows += both
            kept.append(p)
    r = score(model, rows).view(-1, 2)
    right = ((r[:, 0] > r[:, 1]).float() + 0.5 * (r[:, 0] == r[:, 1]).float()).tolist()
    groups: dict[str, list[float]] = {"all": right}
    for x, p in zip(right, kept, strict=True):
        groups.setdefault(STRENGTHS[p.strength], []).append(x)
    return {name: {"accuracy": sum(v) / len(v), "n": len(v)} for name, v in groups.items() if v}


def calibration(model: RewardModel, tokenizer: Tokenizer, pairs: Sequence[Pair], bins: int = 5) -> list[dict]:
    """How often the answer with the higher reward was the chosen one, by the probability sigmoid(difference) that the model gives it."""
    both = [sides for p in pairs if (sides := encode_pair(tokenizer, p, model.config.max_seq_len))]
    difference = score(model, [x for pair in both for x in pair]).view(-1, 2).diff(dim=1).neg()[:, 0]
    sure, right = torch.sigmoid(difference.abs()), (difference > 0).float()
    table = []
    for i in range(bins):
        low, high = 0.5 + 0.5 * i / bins, 0.5 + 0.5 * (i + 1) / bins
        inside = (sure >= low) & ((sure < high) | (i == bins - 1))
        if inside.any():
            table.append({"predicted": float(sure[inside].mean()), "observed": float(right[inside].mean()), "n": int(inside.sum())})
    return table


def gated(helpful: Tensor, safety: Tensor | None, is_safety: Tensor, gate: float = 0.15) -> Tensor:
    """The combined reward R_c as logits, [n]: the safety reward for safety prompts and wherever sigmoid(safety) < gate, else the helpfulness reward
    (sec 3.2.3). Rewards come as logits; the gate compares the raw score, before any whitening."""
    if safety is None:
        return helpful
    return torch.where(is_safety | (torch.sigmoid(safety) < gate), safety, helpful)


class Gated:
    """The paper's reward of finished answers: two reward models and the gate. Their tokenizer must be the policy's."""

    def __init__(self, helpful: str | Path, safety: str | Path = "", gate: float = 0.15, device: torch.device | str = "cpu"):
        self.helpful, self.tokenizer = load(helpful)
        self.safety, other = load(safety) if safety else (None, self.tokenizer)
        if other.path.read_bytes() != self.tokenizer.path.read_bytes():
            raise ValueError(f"{helpful} and {safety} have different tokenizers; train both from models of one family")
        for model in filter(None, (self.helpful, self.safety)):
            model.to(device)
        self.gate = gate

    def __call__(self, rows: Sequence[tuple[list[int], int]], is_safety: Sequence[bool]) -> dict[str, Tensor]:
        """{"helpful", "safety" (if there is one), "reward"} [n] each, logits, of rows (tokens, start of the answer)."""
        h = score(self.helpful, rows)
        s = score(self.safety, rows) if self.safety is not None else None
        out = {"helpful": h, "reward": gated(h, s, torch.tensor(list(is_safety)), self.gate)}
        return out if s is None else {**out, "safety": s}
