"""Wrong answers to the exercises of unit 16, of the kind that students give: none may get full marks."""


def changed(source: str, *edits: tuple[str, str]) -> str:
    """`source` with each (old, new) replaced; an edit that no longer fits is an error."""
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


ACTIONS = """
def actions(tokens, starts, eos):
    B, T = tokens.shape
    at = torch.arange(T)
    ends = (tokens == eos) & (at >= starts[:, None])
    before = ends.long().cumsum(1) - ends.long()
    written = (at >= starts[:, None]) & (before == 0)
    return written[:, 1:]
"""

LOGGED = """
def logged_kl(policy, reference, temperature, top_k):
    kept = policy.topk(top_k, dim=-1).indices
    cut = torch.full_like(policy, float("-inf")).scatter(-1, kept, policy.gather(-1, kept))
    drawn = (cut / temperature).softmax(-1)
    k1 = policy.log_softmax(-1) - reference.log_softmax(-1)
    return float((drawn * k1).sum(-1).mean())
"""

TARGETS = """
def targets(score, logp, ref_logp, values, mask, beta, gamma, lam):
    rewards = -beta * (logp - ref_logp) * mask
    last = mask.shape[1] - 1 - mask.flip(1).long().argmax(1)
    rewards[torch.arange(len(score)), last] += score
    advantages = torch.zeros_like(rewards)
    later, after = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * after - values[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        after = values[:, t] * mask[:, t]
        advantages[:, t] = later
    returns = (advantages + values) * mask
    centre = (advantages * mask).sum() / mask.sum()
    spread = ((advantages - centre).square() * mask).sum() / mask.sum()
    return (advantages - centre) / spread.sqrt() * mask, returns
"""

DUAL = """
def dual_clip_loss(logp, old_logp, advantages, mask, clip, bound):
    ratio = torch.exp((logp - old_logp).masked_fill(~mask, 0.0))
    loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    loss = torch.where(advantages < 0, torch.min(loss, -advantages * bound), loss)
    return (loss * mask).sum() / mask.sum()
"""

GRADIENT = """
def loss_gradient(logits, reference, estimator):
    p, q = logits.softmax(-1), reference.softmax(-1)
    if estimator == "k1":
        return torch.zeros_like(p)
    if estimator == "k2":
        d = p.log() - q.log()
        return p * (d - (p * d).sum(-1, keepdim=True))
    return p - q
"""

BEST = """
def best_reward(ref_logp, reward, kl):
    top = reward == reward.max()
    if kl >= -float(ref_logp[top].logsumexp(0)):
        return float(reward.max()), 0.0
    low, high = math.log(1e-6), math.log(1e6)
    for _ in range(200):
        middle = (low + high) / 2
        logp = (ref_logp + reward / math.exp(middle)).log_softmax(0)
        if float((logp.exp() * (logp - ref_logp)).sum()) > kl:
            low = middle
        else:
            high = middle
    return float(logp.exp() @ reward), math.exp(middle)
"""

WRONG = {
    "t1": [
        # EOS is still no action
        "def actions(tokens, starts, eos):\n    real = tokens[:, 1:] != eos\n    return real & (torch.arange(tokens.shape[1] - 1) >= starts[:, None] - 1)\n",
        # off by one: the column of the token, not of its action
        changed(ACTIONS, ("return written[:, 1:]", "return written[:, :-1]")),
        # the first EOS of the row, prompt included, ends the answer
        changed(ACTIONS, ("(tokens == eos) & (at >= starts[:, None])", "(tokens == eos)")),
        # padding counts too
        changed(ACTIONS, (" & (before == 0)", "")),
        # the prompt counts too
        changed(ACTIONS, ("(at >= starts[:, None]) & (before == 0)", "before == 0")),
        # EOS excluded by an inclusive count
        changed(ACTIONS, ("cumsum(1) - ends.long()", "cumsum(1)")),
        # EOS = 2 built in
        changed(ACTIONS, ("tokens == eos", "tokens == 2")),
        # the answer begins one token late
        changed(ACTIONS, ("written = (at >= starts[:, None])", "written = (at > starts[:, None])")),
    ],
    "t2": [
        # the true KL, whatever the sampler
        changed(LOGGED, ("(drawn * k1)", "(policy.softmax(-1) * k1)")),
        # log-probabilities under the sampler as well
        changed(LOGGED, ("policy.log_softmax(-1) -", "(policy / temperature).log_softmax(-1) -")),
        # temperature forgotten
        changed(LOGGED, ("(cut / temperature)", "cut")),
        # temperature multiplied
        changed(LOGGED, ("cut / temperature", "cut * temperature")),
        # top-k forgotten
        changed(LOGGED, ("(cut / temperature)", "(policy / temperature)")),
        # truncated, not renormalised
        changed(LOGGED, ("(cut / temperature).softmax(-1)", "(policy / temperature).softmax(-1) * (cut > -1e9)")),
        # a sum over the states
        changed(LOGGED, (".sum(-1).mean()", ".sum()")),
        # sign
        changed(LOGGED, ("policy.log_softmax(-1) - reference.log_softmax(-1)", "reference.log_softmax(-1) - policy.log_softmax(-1)")),
        # made positive
        changed(LOGGED, ("float((drawn", "abs(float((drawn"), (".mean())", ".mean()))")),
        # k3 in place of k1
        changed(LOGGED, ("    return", "    k1 = torch.exp(-k1) - 1 + k1\n    return")),
    ],
    "t3": [
        # each of the five bugs left in
        changed(TARGETS, ("-beta *", "beta *")),
        changed(TARGETS, ("mask.shape[1] - 1 - mask.flip(1).long().argmax(1)", "mask.shape[1] - 1")),
        changed(TARGETS, ("(delta + gamma * lam * later) * mask[:, t]", "delta + gamma * lam * later")),
        changed(TARGETS, ("after = values[:, t] * mask[:, t]", "after = values[:, t]")),
        changed(TARGETS, ("return (advantages - centre) /", "return advantages /")),
        changed(
            TARGETS,
            ("    returns = (advantages + values) * mask\n", ""),
            (
                "return (advantages - centre) / spread.sqrt() * mask, returns",
                "A = (advantages - centre) / spread.sqrt() * mask\n    return A, (A + values) * mask",
            ),
        ),
        # the score at the first action
        changed(TARGETS, ("mask.shape[1] - 1 - mask.flip(1).long().argmax(1)", "mask.long().argmax(1)")),
        # the score at every action
        changed(TARGETS, ("rewards[torch.arange(len(score)), last] += score", "rewards += score[:, None] * mask")),
        # whitened row by row
        changed(
            TARGETS,
            ("(advantages * mask).sum() / mask.sum()", "(advantages * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)"),
            (
                "((advantages - centre).square() * mask).sum() / mask.sum()",
                "((advantages - centre).square() * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True) + 1e-8",
            ),
        ),
        # statistics over the padding
        changed(TARGETS, ("    centre = (advantages * mask).sum() / mask.sum()", "    centre = advantages.mean()")),
        # divisor n - 1
        changed(TARGETS, ("* mask).sum() / mask.sum()\n    return", "* mask).sum() / (mask.sum() - 1)\n    return")),
        # lambda forgotten
        changed(TARGETS, ("gamma * lam * later", "gamma * later")),
        # gamma forgotten in delta
        changed(TARGETS, ("gamma * after", "after")),
    ],
    "t4": [
        # the minimum of the negated objective
        changed(DUAL, ("torch.max(-advantages", "torch.min(-advantages")),
        # a mean of row means
        changed(DUAL, ("return (loss * mask).sum() / mask.sum()", "return ((loss * mask).sum(1) / mask.sum(1)).mean()")),
        # no bound
        changed(DUAL, ("    loss = torch.where(advantages < 0, torch.min(loss, -advantages * bound), loss)\n", "")),
        # the bound for good tokens too
        changed(
            DUAL,
            (
                "torch.where(advantages < 0, torch.min(loss, -advantages * bound), loss)",
                "torch.min(loss, advantages.abs() * bound) + 0 * (advantages > 0) - (advantages > 0) * (ratio < 0.7) * 0.1",
            ),
        ),
        # the ratio clipped at the bound everywhere
        changed(DUAL, ("-advantages * ratio.clamp(1 - clip, 1 + clip)", "-advantages * ratio.clamp(1 - clip, bound)")),
        # plain clipping without the maximum
        changed(DUAL, ("torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))", "-advantages * ratio.clamp(1 - clip, 1 + clip)")),
        # the wrong side of the bound
        changed(DUAL, ("torch.min(loss, -advantages * bound)", "torch.max(loss, -advantages * bound)")),
        # padding in the exponent and in the mean
        changed(DUAL, (".masked_fill(~mask, 0.0)", ""), ("return (loss * mask).sum() / mask.sum()", "return loss.mean()")),
        # the ratio upside down
        changed(DUAL, ("(logp - old_logp)", "(old_logp - logp)")),
        # detached
        changed(DUAL, ("return (loss", "loss = loss.detach() + 0 * ratio\n    return (loss")),
        # the sign of the loss
        changed(DUAL, ("return (loss", "return -(loss")),
    ],
    "t5": [
        # autograd's answer for the true KL, for all
        changed(GRADIENT, ('estimator == "k1"', "False"), ('estimator == "k2"', "True")),
        # zeros for all
        "def loss_gradient(logits, reference, estimator):\n    return torch.zeros_like(logits)\n",
        # k2 without its mean
        changed(GRADIENT, ("p * (d - (p * d).sum(-1, keepdim=True))", "p * d")),
        # k2 with a factor
        changed(GRADIENT, ("return p * (d", "return 0.5 * p * (d")),
        # k2 of logits that are not normalised
        changed(GRADIENT, ("d = p.log() - q.log()", "d = logits - reference")).replace("p * (d - (p * d).sum(-1, keepdim=True))", "p * d"),
        # k2 and k3 swapped
        changed(GRADIENT, ('estimator == "k2"', 'estimator == "k3"')),
        # k3's sign
        changed(GRADIENT, ("return p - q", "return q - p")),
        # k3 as the plain KL
        changed(GRADIENT, ("return p - q", "d = p.log() - q.log()\n    return p * (d - (p * d).sum(-1, keepdim=True))")),
        # k1 as the plain KL
        changed(GRADIENT, ("return torch.zeros_like(p)", "d = p.log() - q.log()\n        return p * (d - (p * d).sum(-1, keepdim=True))")),
        # a mean over the states
        changed(GRADIENT, ("return p - q", "return (p - q) / len(p)")),
    ],
    "t6": [
        # reward times beta
        changed(BEST, ("reward / math.exp(middle)", "reward * math.exp(middle)")),
        # bisection the wrong way
        changed(BEST, ("> kl", "< kl")),
        # the other KL
        changed(BEST, ("(logp.exp() * (logp - ref_logp)).sum()", "(ref_logp.exp() * (ref_logp - logp)).sum()")),
        # the reference forgotten in the tilt
        changed(BEST, ("(ref_logp + reward / math.exp(middle))", "(reward / math.exp(middle))")),
        # too few steps
        changed(BEST, ("range(200)", "range(12)")),
        # 1/beta returned
        changed(BEST, ("@ reward), math.exp(middle)", "@ reward), math.exp(-middle)")),
        # the entropy in place of the KL
        changed(BEST, ("* (logp - ref_logp)).sum()", "* logp).sum() + math.log(len(reward))")),
        # the largest reward without a look at its price
        "def best_reward(ref_logp, reward, kl):\n    return float(reward.max()), 0.0\n",
        # the price of one best answer only
        changed(BEST, ("-float(ref_logp[top].logsumexp(0))", "-float(ref_logp[reward.argmax()])")),
        # no limit case
        changed(BEST, ("    if kl >= -float(ref_logp[top].logsumexp(0)):\n        return float(reward.max()), 0.0\n", "")),
        # overflow
        changed(
            BEST,
            ("(ref_logp + reward / math.exp(middle)).log_softmax(0)", "(ref_logp.exp() * torch.exp(reward / math.exp(middle))).log()"),
            ("        if float", "        logp = logp - logp.exp().sum().log()\n        if float"),
        ),
        # a fixed beta
        changed(BEST, ("range(200)", "range(1)")),
    ],
}
