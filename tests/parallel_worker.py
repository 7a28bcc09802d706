"""What every rank of tests/test_parallel.py's jobs runs: the same training on one mesh after another. Rank 0 leaves the results in a folder.

    torchrun --nproc-per-node 4 tests/parallel_worker.py FOLDER '{"fsdp": {"shard": 4}, ...}'
"""
import json
import sys
from pathlib import Path

import torch

from minillama import checkpoint
from minillama.config import LlamaConfig, ParallelConfig, PPOConfig, TrainConfig
from minillama.generate import sample_many
from minillama.model import Llama, next_token_loss
from minillama.parallel import mesh as parallel
from minillama.parallel.shard import build, gathered
from minillama.ppo import critic_from, rollout, update
from minillama.reward import RewardModel, gated, reward_loss, score, stack
from minillama.trainer import accumulate, make_optimizer, train, whole

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=128, multiple_of=32, max_seq_len=64)
EOS = 2


def text_batches(rank: int, world: int):
    """Rows of two documents, with very unequal numbers of trained tokens, in two micro-batches; 30 tokens, which 4 tensor ranks do not divide."""

    def batches(step: int) -> list[dict]:
        g = torch.Generator().manual_seed(step)
        x = torch.randint(0, 128, (8, 31), generator=g)
        targets, docs = x[:, 1:].clone(), torch.zeros(8, 30, dtype=torch.long)
        for i in range(8):
            targets[i, : 4 * i] = -100  # SFT's mask too: some rows train two tokens, some thirty
            docs[i, 3 + i :] = 1
        rows = {"tokens": x[:, :-1], "targets": targets, "doc_ids": docs}
        mine = {k: v[rank::world] for k, v in rows.items()}
        half = max(1, len(mine["tokens"]) // 2)
        return [{k: v[i : i + half] for k, v in mine.items()} for i in range(0, len(mine["tokens"]), half)]

    return batches


def pair_batches(rank: int, world: int):
    """Pairs of answers of unequal length."""
    g = torch.Generator().manual_seed(7)
    row = lambda i: (torch.randint(3, 128, (9 + i,), generator=g).tolist(), 4)  # noqa: E731
    chosen, rejected = [row(i) for i in range(8)], [row(9 - i) for i in range(8)]

    def batches(step: int) -> list[dict]:
        a, b = chosen[rank::world], rejected[rank::world]
        n = len(a)
        return [{**stack(a + b), "margins": torch.arange(8)[rank::world] / 3.0, "safe": torch.tensor([float(i % 3 - 1) for i in range(2 * n)]) * 0 - 1}]

    return batches


def weights(model) -> dict:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def one(name: str, p: ParallelConfig, out: Path) -> None:
    """Everything on the mesh of this process: results to `out`/name.pt."""
    mesh = parallel.current()
    start = lambda m: m.init_weights(1)  # noqa: E731
    c = TrainConfig(steps=10, batch_size=8, seq_len=30, lr=1e-2, warmup_steps=2, log_every=1, grad_clip=0.5, device="cpu", parallel=p)
    model = build(lambda: Llama(CONFIG), start, mesh)
    train(model, text_batches(mesh.data_rank, mesh.data_ranks), next_token_loss, c, out / name)
    result = {"weights": weights(model)}
    model = build(lambda: RewardModel(CONFIG), start, mesh)
    with torch.no_grad():
        model.score.bias.zero_()
    accumulate(model, pair_batches(mesh.data_rank, mesh.data_ranks)(0), reward_loss(), torch.device("cpu"))
    result["reward"] = {n: whole(q.grad) for n, q in model.named_parameters() if q.grad is not None}

    judge = build(lambda: RewardModel(CONFIG), start, mesh, split_logits=False).eval()
    critic = critic_from(build(lambda: RewardModel(CONFIG), start, mesh, split_logits=False), copied=False)
    policy, reference = (build(lambda: Llama(CONFIG), lambda m: m.init_weights(4), mesh, split_logits=False) for _ in range(2))
    prompts = [[1, *range(5, 8 + i)] for i in range(6)] + [[1, 9], [1, 10]]
    ppo = PPOConfig(batch_size=8, minibatch=4, max_new_tokens=7, lr=1e-3, critic_warmup=0, value_clip=0.2)
    rewards = lambda rows, safe: {"helpful": (h := score(judge, rows, 4)), "reward": gated(h, None, torch.tensor(safe))}  # noqa: E731
    roll = rollout(policy, reference, critic, rewards, prompts, [False] * 8, ppo, EOS, seed=5)
    optimizers = tuple(make_optimizer(m, TrainConfig(lr=1e-3)) for m in (policy, critic))
    result["ppo"] = update(policy, critic, optimizers, roll, ppo, 0)
    result["rollout"] = {"tokens": roll.tokens, "logp": roll.logp, "values": roll.values, "advantages": roll.advantages}
    result["policy"], result["critic"] = weights(policy), weights(critic)
    result["drawn"] = sample_many(gathered(policy, mesh), prompts, 5, 0.0, 0, [[EOS]], 4).tokens
    if mesh.rank == 0:
        torch.save(result, out / f"{name}.pt")


def main() -> None:
    torch.set_num_threads(1)
    checkpoint.save_state = lambda *args, **kwargs: None  # saving has tests of its own
    out, meshes = Path(sys.argv[1]), json.loads(sys.argv[2])
    parallel.start(ParallelConfig(**next(iter(meshes.values()))), "cpu")
    for name, degrees in meshes.items():
        p = ParallelConfig(**degrees)
        parallel.use(parallel.make(p, CONFIG))
        one(name, p, out)
    parallel.stop()


if __name__ == "__main__":
    main()
