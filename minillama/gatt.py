"""Ghost Attention (sec 3.3): make an instruction of the first turn hold through the whole dialogue.

    minillama gatt --dialogues runs/my/dialogues.jsonl --policy runs/my/sft --out runs/my/gatt

Three steps: write the instruction on every user turn and let the latest chat model answer turn by turn; take it away from all turns but the first;
train on that, with the loss on the last answer only, since the earlier answers now stand in a context that did not produce them. The model
learns to behave as if the instruction were still in front of it: a context distillation.

A small model loses an instruction in dialogues longer than those that it was tuned on, even one that stands on every turn. As every turn has it, no old turn
is needed for it: with `window` the sampler sees the latest turns only, and the dialogues may be longer than any that it has seen (ours, not the paper's).
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minillama import sft
from minillama.chat import TAGS, Message, encode_dialogue, encode_prompt
from minillama.config import GAttConfig, SFTConfig
from minillama.data import sources
from minillama.generate import sample_many
from minillama.model import Llama
from minillama.parallel import mesh as parallel
from minillama.parallel.state import load_sampler
from minillama.trainer import last_state, pick_device, write_config


def with_instruction(standing: str, turns: Sequence[str], answers: Sequence[str], every: bool) -> list[dict]:
    """Messages of a dialogue, the instruction in front of every user turn or of the first only. There may be one answer fewer than turns."""
    messages: list[dict] = []
    for i, turn in enumerate(turns):
        messages.append({"role": "user", "content": f"{standing} {turn}" if every or i == 0 else turn})
        if i < len(answers):
            messages.append({"role": "assistant", "content": answers[i]})
    return messages


def converse(model: Llama, tokenizer, dialogues: Sequence[dict], every: bool, temperature: float, max_new_tokens: int, seed: int,
             batch: int = 256, window: int = 0) -> list[list[str]]:  # fmt: skip
    """The model's answers, turn by turn, to dialogues {"standing", "turns"}, all dialogues together. A
    dialogue stops where its context is full, and after an empty answer, or one that writes a tag of the format, which counts as empty.

    window: the model sees the latest `window` turns only, 0 for all. Raises ValueError for a window without the instruction on `every` turn."""
    if window and not every:
        raise ValueError(f"a window of {window} turns would lose the instruction of the first; put it on every turn, or use window 0")
    answers: list[list[str]] = [[] for _ in dialogues]
    for turn in range(max(len(d["turns"]) for d in dialogues)):
        asked: dict[int, list[int]] = {}
        for i, d in enumerate(dialogues):
            if len(d["turns"]) > turn == len(answers[i]) and all(answers[i]):
                first = max(0, turn + 1 - window) if window else 0
                messages = with_instruction(d["standing"], d["turns"][first : turn + 1], answers[i][first:], every)
                ids = encode_prompt(tokenizer, [Message(m["role"], m["content"]) for m in messages])
                if len(ids) + max_new_tokens <= model.config.max_seq_len:
                    asked[i] = ids
        drawn = sample_many(model, list(asked.values()), max_new_tokens, temperature, seed + turn, [[tokenizer.eos_id]], batch)
        for i, ids, finished in zip(asked, drawn.tokens, drawn.stopped, strict=True):
            answer = tokenizer.decode(ids[:-1] if finished else ids).strip()
            answers[i].append("" if any(t in answer for t in TAGS) else answer)
    return answers


def training_rows(dialogues: Sequence[dict], answers: Sequence[Sequence[str]], ghost: bool) -> list[dict]:
    """What is trained on: the dialogues with the instruction on their first turn only, loss on the last answer (sec 3.3); or, without `ghost`, as they
    were sampled, with the instruction on every turn. Dialogues with an empty answer are left out."""
    rows = []
    for d, said in zip(dialogues, answers, strict=True):
        turns = d["turns"][: len(said)]
        if said and all(said):
            rows.append({"messages": with_instruction(d["standing"], turns, said, every=not ghost), "last_only": True})
    return rows


def shorten(tokenizer, row: dict, limit: int) -> dict:
    """The row without its last exchanges, until it fits `limit` tokens: packing cuts a long dialogue at its end, where all that is trained is."""
    messages = row["messages"]
    while len(messages) > 2 and len(encode_dialogue(tokenizer, [Message(m["role"], m["content"]) for m in messages])[0]) > limit:
        messages = messages[:-2]
    return {**row, "messages": messages}


def run(config: GAttConfig, dialogues: Sequence[dict] | None = None, keep: Sequence[list[dict]] = ()) -> Llama:
    """Sample and tune by `config`; `dialogues` ({"standing", "turns"}) replaces config.dialogues and `keep` adds dialogues to learn as SFT does.

    Raises ValueError for a file without dialogues.
    """
    out, c = Path(config.out), config.train
    mesh = parallel.start(c.parallel, c.device)
    last_state(out, config.resume)
    device = pick_device(c.device)
    if dialogues is None:
        dialogues = sources.read_rows(config.dialogues, ("standing", "turns"))
    sampled = out / "dialogues.jsonl"
    policy, tokenizer = load_sampler(config.policy, mesh, device, c.bf16 and mesh.world > 1)
    if tokenizer is None:
        raise ValueError(f"{config.policy} has no tokenizer.model; put the one it was trained with beside the weights")
    if not (config.resume and sampled.exists()):
        answers = converse(policy, tokenizer, dialogues, True, config.temperature, config.max_new_tokens, c.seed, window=config.window)
        mesh.first(lambda: sources.write_jsonl(({**d, "answers": a} for d, a in zip(dialogues, answers, strict=True)), sampled))
    del policy  # what is tuned needs the room
    rows = sources.read_rows(str(sampled), ("standing", "turns", "answers"))
    items: list = [shorten(tokenizer, r, c.seq_len + 1) for r in training_rows(rows, [r["answers"] for r in rows], config.ghost)]
    items += list(keep) + [row["messages"] for row in (sources.read(config.keep, kind="instruction") if config.keep else ())]
    model = sft.run(SFTConfig(init=config.policy, out=config.out, epochs=config.epochs, resume=config.resume, train=c), items)
    mesh.first(lambda: write_config(config, out))
    return model
