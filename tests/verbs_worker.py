"""Verbs one after another in one torchrun job, for tests: what every rank of them answers, said and complained goes to FOLDER/RANK.json.

    torchrun --nproc-per-node 2 tests/verbs_worker.py FOLDER '[{"argv": ["info"], "lines": ""}, ...]'

Starting a job takes longer than most verbs; that a job of `-m minillama` ends as it should is tried apart.
"""
import contextlib
import io
import json
import os
import sys
from pathlib import Path

import torch

from minillama import cli
from minillama.parallel import mesh as parallel

if __name__ == "__main__":
    torch.set_num_threads(1)
    done = []
    for verb in json.loads(sys.argv[2]):
        sys.stdin = io.StringIO(verb.get("lines", ""))
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as complained:
            status = cli.main(verb["argv"])
        done.append({"status": status, "out": said.getvalue(), "err": complained.getvalue()})
    Path(sys.argv[1], f"{os.environ['RANK']}.json").write_text(json.dumps(done))
    parallel.stop()
