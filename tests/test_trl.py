"""The reward model's loss and a PPO update against TRL's own trainers, by the functions of benchmarks/trl_ppo.py. Skipped where TRL is not installed."""
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")
sys.path[:0] = [str(Path(__file__).parent.parent / "benchmarks")]
import trl_ppo  # noqa: E402


@pytest.mark.parametrize("margin", ["none", "small", "large"])
def test_reward_loss_is_trl_s(margin):
    """Guards against a margin with its sign turned, left out or of another pair, and a score that is read one token early."""
    assert trl_ppo.agree(trl_ppo.reward_losses(margin), margin)
    losses = {m: float(trl_ppo.reward_losses(m)[0][1]) for m in ("none", margin)}
    assert margin == "none" or losses[margin] > 1.01 * losses["none"]


@pytest.mark.parametrize(("ragged", "gamma", "lam"), [(False, 0.97, 0.9), (True, 1.0, 1.0), (True, 0.97, 0.9)])
def test_one_update_is_trl_s(ragged, gamma, lam):
    """Guards against wrong advantages, losses, gradients or steps where both clips bind, prompts are ragged and every third answer is cut."""
    assert trl_ppo.agree(trl_ppo.one_update(ragged, gamma, lam), "update")


@pytest.mark.parametrize("changed", [{"clip": 0.22}, {"value_clip": 0.22}, {"gae_lambda": 0.88}, {"beta": 0.11}, {"no_eos_penalty": 0.75},
                                     {"value_weight": 0.48}, {"weight_decay": 0.0}, {"eps": 1e-6}, {"grad_clip": 0.1}])  # fmt: skip
def test_another_convention_shows(changed):
    """Guards against a comparison that passes whatever is compared: each setting, changed on our side alone, must be seen."""
    assert not trl_ppo.agree(trl_ppo.one_update(True, 0.97, 0.9, **changed))
