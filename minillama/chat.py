r"""The chat format of Llama 2-Chat: [INST] ... [/INST] around a user's turn, <<SYS>> around the system prompt in the first.

    tokens = encode_prompt(tokenizer, [Message("user", "Where does Nila live?")])

One dialogue u1 a1 u2 is  BOS "[INST] u1 [/INST] a1 " EOS  BOS "[INST] u2 [/INST]"  (released inference code). The tags are
plain text to the tokenizer; what keeps a user from writing them is `check`.
"""
from __future__ import annotations

from dataclasses import dataclass

from minillama.tokenizer import Tokenizer

B_INST, E_INST = "[INST]", "[/INST]"
B_SYS, E_SYS = "<<SYS>>\n", "\n<</SYS>>\n\n"
TAGS = (B_INST, E_INST, "<<SYS>>", "<</SYS>>")


@dataclass(frozen=True)
class Message:
    """One turn: role is "system" (first only), "user" or "assistant"."""

    role: str
    content: str


def check(messages: list[Message]) -> None:
    """Raise ValueError unless roles alternate user, assistant, ... (a system turn may come first) and no content has a tag."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise ValueError("a dialogue needs a user turn")
    for i, m in enumerate(turns):
        want = ("user", "assistant")[i % 2]
        if m.role != want:
            raise ValueError(f"turn {i + 1} must be {want!r}, got {m.role!r}: turns alternate, a system turn comes first only")
    for m in messages:
        tag = next((t for t in TAGS if t in m.content), None)
        if tag:
            raise ValueError(f"the {m.role} turn contains {tag!r}, which is reserved for the format; take it out")


def _pairs(messages: list[Message]) -> list[tuple[str, str | None]]:
    """(prompt text with tags, answer or None) for each exchange, the system prompt folded into the first."""
    check(messages)
    system = messages[0].content if messages[0].role == "system" else None
    turns = messages[1:] if system is not None else messages
    pairs = []
    for i in range(0, len(turns), 2):
        user = turns[i].content.strip()
        if i == 0 and system is not None:
            user = f"{B_SYS}{system}{E_SYS}{user}"
        answer = turns[i + 1].content.strip() if i + 1 < len(turns) else None
        pairs.append((f"{B_INST} {user} {E_INST}", answer))
    return pairs


def encode_prompt(tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
    """Tokens that ask for the next assistant turn. Raises ValueError if the last turn is not the user's."""
    if messages and messages[-1].role != "user":
        raise ValueError(f"the last turn must be the user's to be answered, got {messages[-1].role!r}")
    return encode_dialogue(tokenizer, messages)[0]


def encode_dialogue(tokenizer: Tokenizer, messages: list[Message], last_only: bool = False) -> tuple[list[int], list[bool]]:
    """Tokens of a dialogue and, for each, whether it is trained on: the assistant's tokens and its EOS (sec 3.1).

    last_only trains on the last assistant turn alone (Ghost Attention, sec 3.3). Prompt and answer are encoded apart, so the border
    between them is always a border between tokens: what sampling sees as prompt is exactly what training saw.
    """
    tokens: list[int] = []
    trained: list[bool] = []
    pairs = _pairs(messages)
    last = max((i for i, (_, a) in enumerate(pairs) if a is not None), default=-1)
    for i, (prompt, answer) in enumerate(pairs):
        ids = tokenizer.encode(prompt, bos=True)
        tokens += ids
        trained += [False] * len(ids)
        if answer is not None:
            ids = tokenizer.encode(f"{answer} ", eos=True)
            tokens += ids
            trained += [i == last or not last_only] * len(ids)
    return tokens, trained


def fit_context(tokenizer: Tokenizer, messages: list[Message], room: int) -> list[Message]:
    """The messages with the oldest exchanges left out, system prompt kept, so that the prompt has at most `room` tokens.

    Raises ValueError if the last user turn alone does not fit.
    """
    check(messages)
    kept = list(messages)
    first = 1 if kept[0].role == "system" else 0
    while len(ids := encode_prompt(tokenizer, kept)) > room:
        if len(kept) - first <= 1:
            raise ValueError(f"the last message needs {len(ids)} tokens, there is room for {room}; shorten it")
        del kept[first : first + 2]
    return kept
