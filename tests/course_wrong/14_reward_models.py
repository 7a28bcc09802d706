"""Wrong answers to solutions/14_reward_models, of the kind that students hand in: each must score less than full marks."""

T1 = """
def preference_loss(chosen, rejected, strength):
    margins = torch.tensor([{margins}], dtype=chosen.dtype)
    loss = {loss}
    return {total}, {count}
"""


def loss(margins="0.0, 1 / 3, 2 / 3, 1.0", loss="-F.logsigmoid(chosen - rejected - margins[strength])", total="loss.sum()", count="len(chosen)"):
    return T1.format(margins=margins, loss=loss, total=total, count=count)


def pick(value):
    return f"""
def read_scores(values, tokens, real, eos=2):
    rows = torch.arange(len(tokens))
    return {value}
"""


T3 = """
def fit_pair(prompt, chosen, rejected, limit, keep=1):
    room = {room}
    if {refuse}:
        return None
    shown = {shown}
    return {rows}
"""


def fit(
    room="limit - max(len(chosen), len(rejected))",
    refuse="chosen == rejected or room < min(keep, len(prompt))",
    shown="prompt[max(0, len(prompt) - room):]",
    rows="(shown + chosen, shown + rejected)",
):
    return T3.format(room=room, refuse=refuse, shown=shown, rows=rows)


T4 = """
def best_difference(p, m):
    lean, logit = 2 * p - 1, math.log(p / (1 - p))
    M = {M}
    root = math.sqrt((M * lean) ** 2 + 4 * p * (1 - p))
    return {result}
"""
DESCENT = """
def best_difference(p, m):
    d = 0.0
    for _ in range({steps}):
        d += {rate} * (p / (1 + math.exp(d - m)) - (1 - p) / (1 + math.exp(-d - m)))
    return d
"""
GRID = """
def best_difference(p, m):
    loss = lambda d: p * math.log1p(math.exp(m - d)) + (1 - p) * math.log1p(math.exp(d + m))
    return min((i / 100 for i in range(-600, 601)), key=loss)
"""


def best(result, M="math.exp(m)"):
    return T4.format(result=result, M=M)


T5 = """
def true_accuracy(observed, n, agreement):
    if agreement {refuse}:
        raise ValueError(agreement)
    clean = {clean}
    epsilon = (1 - clean) / 2
    share = math.sqrt(observed * (1 - observed) / n)
    accuracy = {accuracy}
    return epsilon, accuracy, {error}
"""


def noise(clean="math.sqrt(2 * agreement - 1)", accuracy="(observed - epsilon) / clean", error="share / clean", refuse="<= 0.5"):
    return T5.format(clean=clean, accuracy=accuracy, error=error, refuse=refuse)


T6 = """
def tournament_scores(wins):
    wins = wins.double().clone().fill_diagonal_(0.0)
    n, met = len(wins), wins + wins.T
    if {refuse}:
        raise ValueError
    s = torch.ones(n, dtype=torch.float64)
    for _ in range({steps}):
        s = wins.sum(1) / (met / (s[:, None] + s[None])).sum(1)
        s = s / s.log().mean().exp()
    r = {scores}
    return {result}
"""
REACH = "not (torch.linalg.matrix_power((wins > 0).double() + torch.eye(n), n) > 0).all()"


def fitted(refuse=REACH, steps=3000, scores="s.log()", result="r - r.mean()"):
    return T6.format(refuse=refuse, steps=steps, scores=scores, result=result)


WRONG = {
    "t1": [
        loss(margins="1.0, 2 / 3, 1 / 3, 0.0"),  # the paper's order
        loss(margins="0.0, 1.0, 2.0, 3.0"),  # the large margins
        loss(loss="-F.logsigmoid(chosen - rejected + margins[strength])"),  # the margin's sign
        loss(loss="-torch.log(torch.sigmoid(chosen - rejected - margins[strength]))"),  # overflows
        loss(loss="-F.logsigmoid(chosen - rejected) + margins[strength]"),  # a constant and no margin
        loss(loss="(margins[strength] - chosen + rejected).clamp(min=0)"),  # a hinge
        loss(total="loss.mean()"),
        loss(total="sum(loss[strength == s].mean() for s in range(4) if (strength == s).any())"),  # a rare strength weighs as much as a common one
        loss(count="len(set(strength.tolist()))"),  # counts strengths
    ],
    "t2": [
        pick("values[rows, (tokens == eos).int().argmax(1)]"),  # the first EOS, as given
        pick("values[rows, tokens.shape[1] - 1 - (tokens == eos).int().flip(1).argmax(1)]"),  # the last EOS
        pick("values[:, -1]"),
        pick("values[rows, real.sum(1) - 1]"),  # padding on the right only
        pick("values[rows, real.sum(1) - 2]"),  # the token before EOS
        pick("values[rows, real.int().argmax(1)]"),  # the first real token
        pick("(values * real).sum(1) / real.sum(1)"),  # the mean of all
        pick("values.masked_fill(~real, -1e9).amax(1)"),  # the highest of all
    ],
    "t3": [
        fit(refuse="False", rows="((prompt + chosen)[:limit], (prompt + rejected)[:limit])"),  # as given
        fit(rows="((prompt + chosen)[-limit:], (prompt + rejected)[-limit:])"),  # each side its own prompt
        fit(shown="prompt[-room:]", refuse="chosen == rejected or room < keep"),  # a prompt shorter than `keep`; prompt[-0:]
        fit(refuse="room < min(keep, len(prompt))"),  # equal answers stay
        fit(room="limit - len(chosen)"),
        fit(room="limit - min(len(chosen), len(rejected))"),
        fit(shown="prompt[:room]"),  # cuts the question
        fit(refuse="chosen == rejected or room < len(prompt)"),  # drops what it should cut
        fit(room="limit - max(len(chosen), len(rejected)) - 1"),  # cuts one token too many
        fit(shown="prompt.__delitem__(slice(0, max(0, len(prompt) - room))) or prompt"),  # cuts the caller's list
    ],
    "t4": [
        best("logit"),  # no effect
        best("logit + m"),  # a shift
        best("logit + m * ((p > 0.5) - (p < 0.5))"),  # a shift either way
        best("logit + lean * m"),  # the shift of a linear loss
        best("math.log((M * lean + root) / 2)"),  # forgets to divide by 1 - p
        best("math.log((M * lean + root) / (2 * (1 - p)))", M="math.exp(-m)"),  # the margin's sign
        best("math.log((M * lean + root) / (2 * (1 - p)))", M="1 + m"),  # e^m to first order
        DESCENT.format(steps=20, rate=0.1),  # stops too early
        GRID,  # too coarse
    ],
    "t5": [
        noise(refuse="< 0.5"),  # divides by 0 where annotators are coins
        noise(clean="2 * agreement - 1"),  # takes agreement for the accuracy of labels
        noise(clean="math.sqrt(agreement)"),  # two errors never agree
        noise(accuracy="observed / (1 - epsilon)"),  # a wrong model never agrees with a wrong label
        noise(accuracy="observed + epsilon"),
        noise(accuracy="min(1.0, (observed - epsilon) / clean)"),  # hides that an estimate may exceed 1
        noise(error="share"),
        noise(error="share * clean"),
        noise(error="math.sqrt(abs(accuracy * (1 - accuracy)) / n)"),  # as if the truth had been observed
    ],
    "t6": [
        fitted(result="r - r[0]"),
        fitted(result="r.mean() - r"),
        fitted(scores="s"),  # strengths, not their logarithms
        fitted(refuse="False"),  # never refuses
        fitted(refuse="(wins.sum(0) == 0).any() or (wins.sum(1) == 0).any()"),  # overlooks an unbeaten group
        fitted(refuse=REACH.replace("wins > 0", "met > 0")),  # steps from loser to winner too
        fitted(steps=3),  # stops too early
        fitted(refuse="False", steps=0, scores="torch.logit(wins.sum(1) / met.sum(1))"),  # share of wins, whoever the opponent
        fitted(refuse="False", steps=0, scores="wins.sum(1) - wins.sum(0)"),
    ],
}
