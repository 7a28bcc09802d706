"""The reward model's loss, one PPO update and the time of a PPO iteration against TRL's own RewardTrainer and PPOTrainer: same weights, pairs, answers.

    pip install -c constraints.txt trl==1.12.0
    python benchmarks/trl_ppo.py [--preset laptop] [--batch 256] [--minibatch 64] [--prompt 48] [--new 100] [--mean 18] [--threads 2] [--rounds 5]

TRL's loop runs as it is. Put into it: answers instead of its generation; log-probabilities and values of older models than those that it updates, so that
both clips bind; and scores of its reward model whitened as ours are. Exit status 1 if a number differs. --rounds 0 takes no times.
Times are of the demo's sizes at laptop scale: answers of --mean tokens on average and --new at most; and of answers that all have --new.
"""
import argparse
import contextlib
import copy
import dataclasses
import io
import math
import os
import sys
import tempfile
import time
import warnings
from statistics import median
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import numpy as np
import tokenizers
import torch
import transformers
from datasets import Dataset
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer
from trl.experimental.ppo import PPOConfig as TheirConfig
from trl.experimental.ppo import PPOTrainer, ppo_trainer

from minillama import checkpoint, ppo
from minillama.config import MARGINS, LlamaConfig, PPOConfig, TrainConfig
from minillama.generate import Samples
from minillama.model import Llama
from minillama.reward import PairBatches, RewardModel, reward_loss, score
from minillama.trainer import make_optimizer

Results = list[tuple[str, Tensor, Tensor, float]]  # what, ours, TRL's, largest difference allowed, in units of the largest number of TRL's
PAD, EOS = 0, 2
TINY = LlamaConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=97, multiple_of=16, max_seq_len=64)
DIFFERENCES = """Different, and brought to one convention above:
* place of the score: ours at the answer's last action, that of EOS; TRL's one slot later if the answer is shorter than the longest. Its advantage k actions
  before EOS is off by (gamma lam)^k (gamma V + gamma lam (r - V) - r), V the value after EOS: at gamma 1, (1 - lam)(V - r). Its critic learns that slot too
* whitened advantages: ours over the std of the n actions, at least 1e-4; TRL's over the root of the unbiased variance (n - 1) plus 1e-8
* scores: ours are clamped as logits and whitened over the batch (sec 3.2.3), less 2 without EOS; TRL's are raw, without a penalty unless asked
* gradient clip: ours 1.0 for policy and critic each; TRL's PPO loop has none, whatever max_grad_norm says
* critic: ours has an optimizer of its own; TRL's shares the policy's, and its score head has no bias
* pad: ours is known by lengths; TRL's must be a token of its own. As EOS, which RewardTrainer takes where a tokenizer has no pad, the score is read one token
  before EOS
* defaults: beta 0.01 (TRL 0.05), factor of the squared value error 0.5 (0.05), one epoch (4), T 1 (0.7), answers end at EOS (only with stop_token), lr 1e-6
  constant (3e-6, falling to 0), AdamW 0.9/0.95/1e-5 with decay 0.1 (0.9/0.999/1e-8, 0); one step cannot tell AdamW's two decay rates
Different, and without effect above:
* accumulation: ours weighs micro-batches by their actions and steps once a minibatch; TRL's takes the mean of their means, and with
  gradient_accumulation_steps above 1 steps once a batch, whatever num_mini_batches says
* old log-probabilities: ours from the training forward, TRL's from the logits of its cached generation
* approximate KL and entropy, metrics only: ours k3 and over the actions; TRL's k2 and over the padding too
The same by default: gamma 1, lam 0.95, both clips 0.2, k1 as the penalty, the larger of clipped and unclipped, means over the minibatch's actions."""


def moved(model: nn.Module, scale: float, seed: int) -> nn.Module:
    """A copy with noise on every weight, `scale` times the size of the tensor's weights."""
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape, generator=rng) * scale * p.square().mean().sqrt())
    return other


def models(config: LlamaConfig, seed: int = 0) -> dict[str, nn.Module]:
    """Policy, reference, reward model and critic."""
    policy, reward = Llama(config).init_weights(seed), moved(RewardModel(config).init_weights(seed + 1), 0.1, seed)
    return {"policy": policy, "reference": moved(policy, 0.05, seed + 1), "reward": reward, "critic": ppo.critic_from(reward)}


def to_hf(model: Llama) -> transformers.PreTrainedModel:
    """transformers' LlamaForCausalLM of the same weights, or LlamaForSequenceClassification of a reward model's."""
    chat = Llama(model.config)
    chat.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("score")})
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_hf(chat, None, folder + "/hf")
        if not isinstance(model, RewardModel):
            return transformers.LlamaForCausalLM.from_pretrained(folder + "/hf")
        peer = transformers.LlamaForSequenceClassification.from_pretrained(folder + "/hf", num_labels=1, pad_token_id=PAD)
    peer.score = copy.deepcopy(model.score)  # with its bias
    return peer


def from_hf(tensors: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Tensors of transformers' model by our names and in our layout."""
    table = {w.hf: (n, w.heads and getattr(config, w.heads)) for n, w in checkpoint.weight_table(config).items()}
    named = ((t, *table.get(n, (n, None))) for n, t in tensors.items())
    return {ours: checkpoint.to_interleaved(t, heads) if heads else t for t, ours, heads in named}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def quiet():
    """Within it, nothing on stdout or stderr: TRL and transformers report what they load and log."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        yield


def reward_losses(margin: str, seed: int = 0) -> Results:
    """The loss of twelve ragged pairs, and its gradient."""
    rng, model, pairs = np.random.default_rng(seed), models(TINY, seed)["reward"], []
    draw = lambda n: rng.integers(3, TINY.vocab_size, n).tolist()  # noqa: E731
    for i in range(12):
        prompt = draw(rng.integers(2, 9))
        sides = [(prompt + draw(rng.integers(1, 12)) + [EOS], len(prompt)) for _ in range(2)]
        pairs.append((*sides, MARGINS[margin][i % 4], SimpleNamespace(chosen_safe=None, rejected_safe=None)))
    total, n = reward_loss()(model, PairBatches.collate(pairs))
    (total / n).backward()
    rows = [{"chosen_ids": c[0], "rejected_ids": r[0], **({} if margin == "none" else {"margin": m})} for c, r, m, _ in pairs]
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": PAD, "<s>": 1, "</s>": EOS}, unk_token="<unk>"))
    # a pad that is not EOS: else transformers reads the score one token before EOS
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<unk>")
    with tempfile.TemporaryDirectory() as folder, quiet():
        settings = RewardConfig(folder, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False)
        trainer = RewardTrainer(to_hf(model), settings, train_dataset=Dataset.from_list(rows), processing_class=words)
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    theirs = from_hf(gradients(trainer.model), TINY)
    own = {k: g for k, g in gradients(model).items() if k != "score.bias"}  # zero but for rounding: only differences count
    return [("loss", total.detach() / n, loss.detach(), 1e-6), *(("gradient", g, theirs[k], 1e-4) for k, g in own.items())]


def their_trainer(peers: dict[str, nn.Module], prompts: list[list[int]], config: PPOConfig, folder: str, stop: int | None = EOS) -> PPOTrainer:
    """TRL's PPOTrainer, for one iteration over `prompts` with the settings of `config`; `stop` ends an answer."""
    B, T = len(prompts), max(map(len, prompts))
    settings = TheirConfig(
        folder, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, save_strategy="no", num_sample_generations=0, disable_tqdm=True,
        # one micro-batch a minibatch, and no accumulation: the way to have a step for every minibatch
        per_device_train_batch_size=B, num_mini_batches=B // config.minibatch, num_ppo_epochs=1, total_episodes=B, local_rollout_forward_batch_size=B,
        response_length=config.max_new_tokens, stop_token_id=stop, temperature=1.0, missing_eos_penalty=config.no_eos_penalty, kl_coef=config.beta,
        cliprange=config.clip, cliprange_value=config.value_clip, vf_coef=2 * config.value_weight, gamma=config.gamma, lam=config.gae_lambda,
        learning_rate=config.lr, lr_scheduler_type="constant", weight_decay=config.weight_decay, adam_beta1=config.beta1, adam_beta2=config.beta2,
        adam_epsilon=config.eps,
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": [PAD] * (T - len(p)) + p} for p in prompts])
    trainer = PPOTrainer(settings, SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS), peers["policy"], peers["reference"], peers["reward"], rows,
                         peers["critic"], data_collator=list)  # fmt: skip
    trainer.dataloader = [{"input_ids": torch.tensor(rows["input_ids"][:])}]  # the batch in our order
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


def optimizers(own: dict[str, nn.Module], c: PPOConfig) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """As ppo.run makes them."""
    settings = TrainConfig(steps=1, lr=c.lr, weight_decay=c.weight_decay, beta1=c.beta1, beta2=c.beta2, eps=c.eps)
    return make_optimizer(own["policy"], settings), make_optimizer(own["critic"], settings)


def rewards_of(model: RewardModel) -> ppo.Rewards:
    """As reward.Gated gives them, of a model in memory."""

    def rewards(rows: list[tuple[list[int], int]], is_safety: list[bool]) -> dict[str, Tensor]:
        r = score(model, rows)
        return {"reward": r, "helpful": r}

    return rewards


def one_update(ragged: bool, gamma: float, lam: float, **ours_only) -> Results:
    """Rollout and update from the same answers, every third cut before its end: all of full length, or ragged. `ours_only` changes our settings alone."""
    B, width, rng = 24, 9, np.random.default_rng(0)
    draw = lambda n: rng.integers(3, TINY.vocab_size, n).tolist()  # noqa: E731
    prompts = [draw(rng.integers(2, 12)) for _ in range(B - 1)] + [draw(12)]  # the longest prompt has a full answer: our rows have TRL's slot after EOS
    answers = [draw(width) if i % 3 == 2 else [*draw(rng.integers(0, width - 1) if ragged else width - 1), EOS] for i in range(B)]
    same = PPOConfig(batch_size=B, minibatch=B, max_new_tokens=width, lr=1e-3, beta=0.1, gamma=gamma, gae_lambda=lam, grad_clip=1e9, no_eos_penalty=0.7)
    config, old = dataclasses.replace(same, **ours_only), models(TINY)
    new = old | {"policy": moved(old["policy"], 0.05, 7), "critic": moved(old["critic"], 0.05, 8)}

    got = {}  # what TRL computes on its way
    with tempfile.TemporaryDirectory() as folder, quiet():
        peers, old_peers = ({n: to_hf(m) for n, m in group.items()} for group in (new, old))
        trainer = their_trainer(peers, prompts, same, folder)
        get_reward, masked_whiten = ppo_trainer.get_reward, ppo_trainer.masked_whiten

        def injected(model, queries, batch, pad, settings):
            rows = torch.cat((queries, torch.tensor([a + [PAD] * (width - len(a)) for a in answers])), 1)
            return rows, ppo_trainer.forward(old_peers["policy"], rows, pad).logits[:, queries.shape[1] - 1 : -1]

        def scored(model, rows, pad, start):
            name = "critic" if model is peers["critic"] else "reward"
            values, scores, lengths = get_reward(old_peers[name], rows, pad, start)
            got.update(old_values=values[:, start - 1 : -1, 0]) if name == "critic" else got.update(scores=scores)
            return values, ppo.whiten(scores), lengths

        def whitened(x, mask):
            got.update(mask=mask, raw=x * mask, whitened=masked_whiten(x, mask) * mask)
            return got["whitened"]

        trainer.log = got.update
        trainer.optimizer.optimizer.register_step_pre_hook(lambda *_: got.update({n: gradients(peers[n]) for n in ("policy", "critic")}))
        with mock.patch.multiple(ppo_trainer, batch_generation=injected, get_reward=scored, masked_whiten=whitened):
            trainer.train()
    assert got["policy/clipfrac_avg"] > 0.05 and got["val/clipfrac_avg"] > 0.05  # a clip that never binds compares nothing

    drawn = Samples(answers, [], [a[-1] == EOS for a in answers])
    rewards = rewards_of(old["reward"])
    with mock.patch.object(ppo, "sample_many", lambda *_: drawn):
        roll = ppo.rollout(old["policy"], old["reference"], old["critic"], rewards, prompts, [False] * B, config, EOS, 0)
    raw = rewards([(p + a, len(p)) for p, a in zip(prompts, answers, strict=True)], [])["reward"]
    r = ppo.whiten(raw) - config.no_eos_penalty * torch.tensor([a[-1] != EOS for a in answers])  # [B]
    # TRL's slot after EOS: what it does to the advantages before it [B,T-1], and a roll in which the critic learns it too
    column, last, early = torch.arange(roll.mask.shape[1]), roll.lengths[:, None] - 2, roll.mask.sum(1, keepdim=True) < width
    slot = early & (column == last + 1)
    with torch.no_grad():
        values = old["critic"].values(roll.tokens)[:, :-1]
    after = (values * slot).sum(1, keepdim=True)  # [B,1], the value after EOS
    bias = (gamma * lam) ** (last - column).clamp(min=0) * (gamma * after + gamma * lam * (r[:, None] - after) - r[:, None]) * early * roll.mask
    advantages, n = (roll.returns - roll.values + bias) * roll.mask, roll.mask.sum()
    roll = dataclasses.replace(roll, advantages=ppo.whiten(advantages, roll.mask) * ((n - 1) / n).sqrt())
    wider = dataclasses.replace(roll, mask=roll.mask | slot, lengths=roll.lengths + early[:, 0], values=roll.values + after * slot,
                                returns=roll.returns + bias + r[:, None] * slot)  # fmt: skip

    at = (roll.starts[:, None] - 1 + torch.arange(width)).clamp(max=len(column) - 1)
    answer = lambda x: x.gather(1, at) * got["mask"]  # noqa: E731  [B,T-1] -> [B,width], TRL's layout
    results = [("scores", raw, got["scores"], 1e-5), ("old values", answer(roll.values), got["old_values"] * got["mask"], 1e-5),
               ("raw advantages", answer(advantages), got["raw"], 1e-5), ("whitened advantages", answer(roll.advantages), got["whitened"], 1e-5)]  # fmt: skip
    seen = {"objective/kl": roll.metrics["kl"]}
    for name, part in (("policy", roll), ("critic", wider)):
        own, steps = {n: copy.deepcopy(new[n]) for n in ("policy", "critic")}, {}
        pair = optimizers(own, config)
        pair[name == "critic"].register_step_pre_hook(lambda *_, m=own[name], to=steps: to.update(gradients(m)))
        said = ppo.update(own["policy"], own["critic"], pair, part, config, 0)
        if name == "policy":
            seen |= {"loss/policy_avg": said["policy_loss"], "policy/clipfrac_avg": said["clip_fraction"]}
        else:
            seen["loss/value_avg"] = said["value_loss"]
        theirs, step = from_hf(got[name], TINY), from_hf(dict(peers[name].named_parameters()), TINY)
        before, after_step = dict(new[name].named_parameters()), dict(own[name].named_parameters())
        results += [(f"{name}'s gradient", g, theirs[k], 1e-4) for k, g in steps.items()]
        results += [(f"{name}'s change of weights", after_step[k] - before[k], step[k] - before[k], 1e-2) for k in steps]
    return [(k, torch.tensor(v), torch.tensor(got[k]), 1e-4) for k, v in seen.items()] + results


def agree(results: Results, title: str = "") -> bool:
    """Whether all of it is within its tolerance; with a title, a line for each kind."""
    worst: dict[str, tuple[float, float]] = {}
    for what, ours, theirs, allowed in results:
        apart = float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())
        worst[what] = max(worst.get(what, (0.0, allowed)), (apart if math.isfinite(apart) else math.inf, allowed))
    if title:
        print(title)
    for what, (apart, allowed) in worst.items() if title else ():
        print(f"  {what:<26} {apart:.1e} apart, {'within' if apart <= allowed else 'NOT WITHIN'} {allowed:.0e}")
    return all(apart <= allowed for apart, allowed in worst.values())


@torch.no_grad()
def ending(policy: Llama, mean: int) -> Llama:
    """The policy with a feature that is always on, by which it ends an answer after about `mean` tokens."""
    policy.tok_embeddings.weight[:, 0] = 1.0
    for block in policy.layers:
        block.attention.wo.weight[0], block.feed_forward.w2.weight[0] = 0.0, 0.0
    tokens = torch.randint(3, policy.config.vocab_size, (16, 32), generator=torch.Generator().manual_seed(0))
    logits = policy(tokens)
    wanted = logits.logsumexp(-1) - math.log(mean - 1) - logits[..., EOS]  # how much the logit of EOS must rise
    policy.output.weight[EOS, 0] += (wanted / policy.features(tokens)[..., 0]).mean()
    return policy


def iterations(a: argparse.Namespace, mean: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of {"minillama", "TRL"} iterations with answers of about `mean` tokens (0: all have --new), and our answers' mean length."""
    B, rng, own = a.batch, np.random.default_rng(0), models(LlamaConfig.preset(a.preset))
    if mean:
        own |= {n: ending(own[n], mean) for n in ("policy", "reference")}
    prompts = [rng.integers(3, own["policy"].config.vocab_size, n).tolist() for n in np.linspace(a.prompt // 2, a.prompt, B).astype(int)]
    config = PPOConfig(batch_size=B, minibatch=a.minibatch, max_new_tokens=a.new)
    pair, rewards, lengths = optimizers(own, config), rewards_of(own["reward"]), []

    def ours(seed: int) -> None:
        own["policy"].eval()
        eos = EOS if mean else -1  # no token is -1
        roll = ppo.rollout(own["policy"], own["reference"], own["critic"], rewards, prompts, [False] * B, config, eos, seed)
        own["policy"].train()
        ppo.update(own["policy"], own["critic"], pair, roll, config, seed)
        lengths.append(roll.metrics["length"])

    times: dict[str, list[float]] = {"minillama": [], "TRL": []}
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = their_trainer({n: to_hf(m) for n, m in own.items()}, prompts, config, folder, EOS if mean else None)
        for i in range(a.rounds + 1):
            for name, run in (("minillama", lambda i=i: ours(i)), ("TRL", trainer.train)):
                began = time.perf_counter()
                run()
                if i:  # the first warms up
                    times[name].append(time.perf_counter() - began)
    return times, sum(lengths) / len(lengths)


def main() -> int:
    p = argparse.ArgumentParser()
    p.add_argument("--preset", default="laptop")
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--minibatch", type=int, default=64)
    p.add_argument("--prompt", type=int, default=48, help="tokens of the longest prompt; the shortest has half as many")
    p.add_argument("--new", type=int, default=100, help="most tokens of an answer")
    p.add_argument("--mean", type=int, default=18, help="tokens of an answer on average")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=5)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    good = all([agree(reward_losses(m), f"reward model's loss, margin {m}") for m in MARGINS])
    good &= agree(one_update(False, 0.97, 0.9), "one update, answers of one length, gamma 0.97, lam 0.9")
    good &= agree(one_update(True, 1.0, 1.0), "one update, ragged answers, gamma and lam 1: to the policy the place of the score is the same")
    good &= agree(one_update(True, 0.97, 0.9), "one update, ragged answers, gamma 0.97, lam 0.9, with the slot after EOS")
    print(f"\n{DIFFERENCES}\n\n{'All numbers agree.' if good else 'NUMBERS DIFFER.'}")
    if a.rounds:
        print(f"{a.preset}, batch {a.batch}, minibatch {a.minibatch}, prompts of {a.prompt // 2} to {a.prompt} tokens, {a.threads} threads")
    for mean in (a.mean, 0) if a.rounds else ():
        times, length = iterations(a, mean)
        t = {name: median(v) for name, v in times.items()}
        print(f"answers of {length:.0f} tokens, at most {a.new}: an iteration takes minillama {t['minillama']:.2f} s, TRL {t['TRL']:.2f} s; "
              f"{t['TRL'] / t['minillama']:.2f}x", flush=True)  # fmt: skip
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
