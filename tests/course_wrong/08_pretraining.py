"""Wrong answers to the exercises of 08_pretraining, of the kind that students make: each must score less than full marks."""
from tiny import but as _but

_STEP = """def optimizer_step(model, optimizer, micro_batches, loss_fn, max_norm):
    optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for batch in micro_batches:
        loss, n = loss_fn(model, batch)
        loss.backward()
        total, count = total + loss.item(), count + int(n)
    if count == 0:
        raise ValueError("no valid token")
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for p in parameters:
        p.grad.div_(count)
    norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))
    optimizer.step()
    return total / count, norm
"""
_Z = """def z_loss_grad(logits, targets, c):
    log_z = torch.logsumexp(logits, dim=-1, keepdim=True)
    grad = (1 + 2 * c * log_z) * (logits - log_z).exp()
    valid = targets != -100
    grad = grad - F.one_hot(targets.clamp(min=0), logits.shape[-1]).to(grad)
    return grad * valid[:, None]
"""
_TARGETS = """def next_token_targets(tokens, doc_ids, trained):
    targets = torch.full_like(tokens, -100)
    asked = trained[:, 1:] & (doc_ids[:, 1:] == doc_ids[:, :-1]) & (doc_ids[:, 1:] != -1)
    targets[:, :-1] = torch.where(asked, tokens[:, 1:], -100)
    return targets
"""
_WSD = """def wsd(step, steps, peak, warmup, decay, last=0.1):
    if warmup + decay > steps:
        raise ValueError("does not fit")
    if step < warmup:
        return peak * (step + 1) / warmup
    down = max(0, step + 1 - (steps - decay))
    return peak * (1 - (1 - last) * down / decay) if down else peak


def branch_cost(budgets, decay):
    return max(budgets) - decay + decay * len(set(budgets))
"""
_BILL = """def bill(n_params, tokens, batch_tokens, peak, utilisation):
    operations = 6.0 * n_params * tokens
    return math.ceil(tokens / batch_tokens), operations, operations / (peak * utilisation) / 3600


def utilisation(n_params, tokens, gpu_hours, peak):
    return 6.0 * n_params * tokens / (gpu_hours * 3600 * peak)
"""
_GROUPS = """def decay_groups(model, decay):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": decay}, {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
"""


WRONG = {
    "t1": [
        "def decay_groups(model, decay):\n    return buggy_decay_groups(model, decay)\n",
        _but(_GROUPS, ('for p in trained if p.dim() < 2], "weight_decay": 0.0', 'for p in trained if p.dim() < 2], "weight_decay": decay')),  # all decay
        _but(_GROUPS, (" if p.requires_grad", "")),  # the frozen ones too
        _but(_GROUPS, ('return [group for group in groups if group["params"]]', "return groups")),  # empty groups
        _but(_GROUPS, ("model.parameters()", "(p for _, p in model.named_parameters(remove_duplicate=False))")),  # a shared tensor twice
        _but(
            _GROUPS, ("p.dim() >= 2", "p.dim() < 2"), ('if p.dim() < 2], "weight_decay": 0.0', 'if p.dim() >= 2], "weight_decay": 0.0')
        ),  # the other way round
        _but(_GROUPS, ("p.dim() >= 2", "p.dim() == 2"), ('p.dim() < 2], "weight_decay": 0.0', 'p.dim() != 2], "weight_decay": 0.0')),  # convolutions spared
        # by name after all, mended for Llama only
        """def decay_groups(model, decay):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    yes = [p for n, p in named if not ("norm" in n or "bias" in n)]
    no = [p for n, p in named if "norm" in n or "bias" in n]
    return [g for g in ({"params": yes, "weight_decay": decay}, {"params": no, "weight_decay": 0.0}) if g["params"]]
""",
        # linear layers only: embeddings spared
        """def decay_groups(model, decay):
    yes = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    no = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in yes)]
    return [g for g in ({"params": yes, "weight_decay": decay}, {"params": no, "weight_decay": 0.0}) if g["params"]]
""",
        "def decay_groups(model, decay):\n    return []\n",
    ],
    "t2": [
        _but(_BILL, ("    operations = 6.0", "    operations = 2.0"), ("return 6.0", "return 2.0")),  # forward pass only
        _but(_BILL, ("math.ceil(tokens / batch_tokens)", "tokens // batch_tokens")),  # the last, partial batch forgotten
        _but(_BILL, ("math.ceil(tokens / batch_tokens)", "tokens // batch_tokens + 1")),  # a step too many where it divides
        _but(_BILL, ("(peak * utilisation)", "peak * utilisation")),  # multiplied by the utilisation
        _but(_BILL, ("/ (peak * utilisation) / 3600", "/ (peak * utilisation)")),  # seconds
        _but(_BILL, ("/ (peak * utilisation) / 3600", "/ peak / 3600")),  # at the peak
        _but(_BILL, ("return 6.0 * n_params * tokens / (gpu_hours * 3600 * peak)", "return 6.0 * n_params * tokens / (gpu_hours * peak)")),  # hours for seconds
        _but(_BILL, ("return 6.0 * n_params * tokens / (gpu_hours * 3600 * peak)", "return 600.0 * n_params * tokens / (gpu_hours * 3600 * peak)")),  # per cent
        _but(
            _BILL, ("return 6.0 * n_params * tokens / (gpu_hours * 3600 * peak)", "return gpu_hours * 3600 * peak / (6.0 * n_params * tokens)")
        ),  # upside down
        _but(_BILL, ("return 6.0 * n_params * tokens / (gpu_hours * 3600 * peak)", "return 0.5")),
    ],
    "t3": [
        _but(_WSD, ("(step + 1) / warmup", "step / warmup")),  # starts from a rate of 0
        _but(_WSD, ("step + 1 - (steps - decay)", "step - (steps - decay)")),  # never arrives
        _but(_WSD, ("(1 - (1 - last) * down / decay)", "(1 - down / decay)")),  # to zero
        _but(_WSD, ("peak * (1 - (1 - last) * down / decay)", "peak - (peak - last) * down / decay")),  # last taken for a rate
        _but(_WSD, ('    if warmup + decay > steps:\n        raise ValueError("does not fit")\n', "")),
        _but(_WSD, ("peak * (1 - (1 - last) * down / decay)", "peak * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * down / decay)))")),  # a cosine
        _but(_WSD, ("decay * len(set(budgets))", "decay * len(budgets)")),  # the same branch twice
        _but(_WSD, ("max(budgets) - decay + decay", "max(budgets) + decay")),  # a trunk through the longest decay
        _but(_WSD, ("max(budgets) - decay + decay * len(set(budgets))", "sum(budgets)")),  # one run each
        _but(
            _WSD, ("down = max(0, step + 1 - (steps - decay))", "down = max(0, step + 1 - warmup)"), ("down / decay", "down / (steps - warmup)")
        ),  # no stable part
        _but(_WSD, ("down = max(0, step + 1 - (steps - decay))", "down = max(0, step + 1 - (steps - decay)) / decay"), ("* down / decay", "* down")),  # 0 / 0
    ],
    "t4": [
        "def next_token_targets(tokens, doc_ids, trained):\n    return buggy_targets(tokens, doc_ids, trained)\n",
        _but(_TARGETS, ("trained[:, 1:]", "trained[:, :-1]")),  # asks about what follows a trained token
        _but(_TARGETS, ("(doc_ids[:, 1:] == doc_ids[:, :-1]) & ", "")),  # across the border
        _but(_TARGETS, (" & (doc_ids[:, 1:] != -1)", "")),  # the unused end is taught
        _but(
            _TARGETS, ("targets[:, :-1] = torch.where(asked, tokens[:, 1:], -100)", "targets[:, :-1] = torch.where(asked, tokens[:, :-1], -100)")
        ),  # not shifted
        _but(_TARGETS, ("targets[:, :-1] =", "targets[:, 1:] =")),  # shifted the wrong way
        _but(_TARGETS, ("full_like(tokens, -100)", "roll(tokens, -1, dims=1)")),  # the last column wraps around
        _but(_TARGETS, ("full_like(tokens, -100)", "zeros_like(tokens)")),  # 0 is a token
        _but(
            _TARGETS,
            ("    targets = torch.full_like(tokens, -100)\n", "    targets = tokens\n"),
            ("    return targets", "    targets[:, -1] = -100\n    return targets"),
        ),  # in place
        _but(_TARGETS, ("    return targets", "    return targets[:, :-1]")),  # a column too few
        "def next_token_targets(tokens, doc_ids, trained):\n    return torch.full_like(tokens, -100)\n",
    ],
    "t5": [
        "def optimizer_step(model, optimizer, micro_batches, loss_fn, max_norm):\n    return buggy_step(model, optimizer, micro_batches, loss_fn, max_norm)\n",
        _but(
            _STEP, ("        loss.backward()", "        (loss / n / len(micro_batches)).backward()"), ("        p.grad.div_(count)", "        pass")
        ),  # mean of means
        _but(_STEP, ("    optimizer.zero_grad(set_to_none=True)\n", "")),  # old gradients stay
        _but(
            _STEP, ("    optimizer.zero_grad(set_to_none=True)\n", ""), ("    optimizer.step()\n", "    optimizer.step()\n    optimizer.zero_grad()\n")
        ),  # cleared afterwards only
        # clipped before the division
        _but(
            _STEP,
            ("    for p in parameters:\n        p.grad.div_(count)\n", ""),
            ("    optimizer.step()", "    for p in parameters:\n        p.grad.div_(count)\n    optimizer.step()"),
        ),
        # each group by itself
        _but(
            _STEP,
            (
                "norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))",
                'norm = max(float(nn.utils.clip_grad_norm_(g["params"], max_norm)) for g in optimizer.param_groups)',
            ),
        ),
        _but(
            _STEP,
            (
                "norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))",
                'norm = sum(float(nn.utils.clip_grad_norm_(g["params"], max_norm)) ** 2 for g in optimizer.param_groups) ** 0.5',
            ),
        ),  # right norm, wrong clip
        _but(
            _STEP, ("        loss.backward()", "        loss.backward()\n        nn.utils.clip_grad_norm_(model.parameters(), max_norm)")
        ),  # in every micro-batch
        _but(_STEP, ("        p.grad.div_(count)", "        p.grad.div_(len(micro_batches))")),  # sum over tokens, mean over micro-batches
        _but(_STEP, ("    for p in parameters:\n        p.grad.div_(count)\n", "")),  # never divided
        _but(_STEP, ("    optimizer.step()", "    norm = min(norm, max_norm)\n    optimizer.step()")),  # the norm after clipping
        _but(
            _STEP, ("norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))", "norm = float(torch.cat([p.grad.flatten() for p in parameters]).norm())")
        ),  # not clipped
        _but(_STEP, ('    if count == 0:\n        raise ValueError("no valid token")\n', "    count = max(count, 1)\n")),
        _but(_STEP, ("return total / count, norm", "return total / len(micro_batches), norm")),
        _but(
            _STEP, ("norm = float(nn.utils.clip_grad_norm_(parameters, max_norm))", "nn.utils.clip_grad_value_(parameters, max_norm)\n    norm = 1.0")
        ),  # clipped entry by entry
    ],
    "t6": [
        _but(_Z, ("1 + 2 * c", "1 + c")),  # the square's 2
        _but(_Z, ("(1 + 2 * c * log_z) * ", "")),  # no z-loss
        _but(_Z, ("    grad = grad - F.one_hot(targets.clamp(min=0), logits.shape[-1]).to(grad)\n", "")),
        _but(_Z, ("    return grad * valid[:, None]", "    return grad")),  # positions without target
        _but(_Z, ("return grad * valid[:, None]", "return grad * valid[:, None] / valid.sum()")),  # the mean's gradient
        _but(_Z, ("(1 + 2 * c * log_z) * (logits - log_z).exp()", "(1 + 2 * c * log_z) * logits.exp() / logits.exp().sum(-1, keepdim=True)")),  # overflows
        _but(_Z, ("(1 + 2 * c * log_z) * (logits - log_z).exp()", "(logits - log_z).exp() + 2 * c * log_z")),  # log Z's derivative forgotten
        _but(_Z, ("(1 + 2 * c * log_z)", "(1 + 2 * c)")),
        _but(_Z, ("return grad * valid[:, None]", "return -grad * valid[:, None]")),  # sign
        """def z_loss_grad(logits, targets, c):
    logits = logits.clone().requires_grad_()
    valid = targets != -100
    log_z = torch.logsumexp(logits[valid], dim=-1)
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum") + c * log_z.square().sum()
    loss.backward()
    return logits.grad
""",
        "def z_loss_grad(logits, targets, c):\n    return torch.zeros_like(logits)\n",
    ],
}
