"""Real English text and real instructions that every Python carries: its documentation topics, and its functions' docstrings.

    python benchmarks/real_text.py runs/real      # writes topics/*.txt, questions.jsonl and pairs.jsonl

pairs.jsonl has preference pairs in the columns of Anthropic's HH set: the function's own description against that of another function.
Nothing is downloaded. The text is the Python documentation's (PSF licence) and stays where you write it.
"""
import importlib
import inspect
import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

MODULES = (
    "builtins os os.path math cmath statistics random string textwrap re json csv pathlib shutil glob tempfile subprocess threading queue socket time "
    "datetime calendar collections itertools functools operator heapq bisect array struct zlib gzip bz2 tarfile zipfile hashlib hmac secrets base64 "
    "binascii html urllib.parse email.utils argparse logging ast inspect types copy pprint fractions decimal contextlib asyncio unittest doctest"
).split()


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/real")
    (out / "topics").mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        (out / "topics" / f"{name.replace('/', '_')}.txt").write_text(text, encoding="utf-8")
    rows = {}
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name, thing in vars(module).items():
            doc = inspect.getdoc(thing) if callable(thing) and not name.startswith("_") else None
            answer = doc.split("\n\n")[0].replace("\n", " ").strip() if doc else ""
            if 20 <= len(answer) <= 300 and answer.endswith("."):
                what = name if module_name == "builtins" else f"{module_name}.{name}"
                rows.setdefault(answer, f"What does {what} do?")
    with open(out / "questions.jsonl", "w", encoding="utf-8") as f:
        for answer, prompt in rows.items():
            f.write(json.dumps({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}) + "\n")
    answers = list(rows)
    with open(out / "pairs.jsonl", "w", encoding="utf-8") as f:
        for i, (answer, prompt) in enumerate(rows.items()):
            other = answers[(i + len(answers) // 2) % len(answers)]
            chosen, rejected = (f"\n\nHuman: {prompt}\n\nAssistant: {x}" for x in (answer, other))
            f.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    size = sum(len(t) for t in topics.values())
    print(f"{out}: {len(topics)} topics of {size:,} characters, {len(rows)} questions and pairs")


if __name__ == "__main__":
    main()
