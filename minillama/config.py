"""The hyper-parameters of Llama 2 and of every training stage, and the arithmetic that needs nothing else.

    LlamaConfig.preset("llama2-70b").n_params()      # 68_976_648_192, without torch

Field names are those of Meta's params.json. Each field's docstring is its help on the command line; it gives the unit
and says whether the value is the paper's ("Llama 2", 2023, section named) or assumed. Standard library only.
"""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass
class LlamaConfig:
    """The architecture (sec 2.2). Defaults are the 7B's.

    Raises ValueError where heads, groups or the head size do not divide.
    """

    dim: int = 4096
    """Width of the residual stream, in features (paper)."""
    n_layers: int = 32
    """Number of transformer blocks (paper)."""
    n_heads: int = 32
    """Number of query heads (paper)."""
    n_kv_heads: int | None = None
    """Number of key-value heads; fewer than n_heads is grouped-query attention, 1 is multi-query, none given means n_heads (paper: 8 for 34B and 70B)."""
    vocab_size: int = 32_000
    """Number of tokens in the vocabulary (paper)."""
    multiple_of: int = 256
    """The hidden size of the feed-forward layer is rounded up to a multiple of this (Meta's params.json)."""
    ffn_dim_multiplier: float | None = None
    """Factor on the hidden size of the feed-forward layer before rounding (Meta's params.json: 1.3 for 70B)."""
    norm_eps: float = 1e-5
    """Epsilon inside the square root of RMSNorm (paper)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (paper)."""
    max_seq_len: int = 4096
    """Longest sequence, in tokens (paper)."""
    hidden_dim: int | None = None
    """Hidden size of the feed-forward layer, in features; none given means Meta's rule from dim, ffn_dim_multiplier and multiple_of."""

    def __post_init__(self) -> None:
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"LlamaConfig.{name} must be a positive whole number, got {value!r}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not divisible by n_heads {self.n_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head size dim/n_heads = {self.head_dim} must be even: rotary embeddings turn pairs of features")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not divisible by n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        """Features of one head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden size of the feed-forward layer: 2/3 of 4*dim, times the multiplier, rounded up (Meta's rule)."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)

    def n_params(self, embeddings: bool = True) -> int:
        """Exact number of parameters; without `embeddings`, only those that do matrix arithmetic for every token (output layer included)."""
        kv_dim = self.n_kv_heads * self.head_dim
        attention = 2 * self.dim * self.dim + 2 * self.dim * kv_dim
        block = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        output = self.vocab_size * self.dim
        return self.n_layers * block + self.dim + output + (output if embeddings else 0)

    def flops_per_token(self, seq_len: int | None = None, training: bool = True) -> float:
        """Floating-point operations for one token of a sequence of `seq_len` (default max_seq_len).

        2 for each parameter that multiplies, plus 2*2*dim*(seq_len+1)/2 a layer for causal attention scores and
        weighted sums; training counts the backward pass as twice the forward.
        """
        seq_len = seq_len or self.max_seq_len
        norms = self.dim * (2 * self.n_layers + 1)
        matmul = 2 * (self.n_params(embeddings=False) - norms)
        attention = 4 * self.dim * self.n_layers * (seq_len + 1) / 2
        return (3 if training else 1) * (matmul + attention)

    def kv_bytes_per_token(self, bytes_per_value: int = 2) -> int:
        """Bytes that the key-value cache needs for one token (default 16-bit values)."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value

    def to_params_json(self) -> dict:
        """Meta's params.json: fields that differ from None, under Meta's names."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def preset(cls, name: str, **overrides) -> LlamaConfig:
        """A named architecture with `overrides` applied. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})


# 34B was described in the paper but never released; 70B's hidden size 28,672 comes from 4096 and 1.3 as in its params.json.
PRESETS: dict[str, dict] = {
    "ci": dict(dim=96, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=1024, multiple_of=32, max_seq_len=512),
    "laptop": dict(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=1280, multiple_of=32, max_seq_len=1024),
    "gpu": dict(dim=512, n_layers=8, n_heads=8, n_kv_heads=2, vocab_size=4096, multiple_of=64, max_seq_len=1024),
    "llama2-7b": dict(),
    "llama2-13b": dict(dim=5120, n_layers=40, n_heads=40),
    "llama2-34b": dict(dim=8192, n_layers=48, n_heads=64, n_kv_heads=8),
    "llama2-70b": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, multiple_of=4096, ffn_dim_multiplier=1.3),
}


@dataclass
class ParallelConfig:
    """How the ranks of a job share the work (sec 2.2: the paper used FSDP-like sharding; degrees are assumed). Ranks = replicate * shard * tensor.

    Raises ValueError for a degree below 0 or an unknown kind of checkpointing.
    """

    replicate: int = 1
    """Copies of the sharded model; gradients are averaged over them (HSDP)."""
    shard: int = 0
    """Ranks over which parameters, gradients and optimizer state are split (FSDP); 0 is all that replicate and tensor leave."""
    tensor: int = 1
    """Ranks that split every matrix, activations and the loss between them (tensor, sequence and loss parallelism)."""
    activation_checkpointing: str = "none"
    """none keeps every activation; full keeps each block's input only, and computes the block again in the backward pass."""
    reshard: bool = True
    """Free a block's gathered weights after its forward pass and gather them again for the backward pass; false keeps them: more memory, less traffic."""
    timeout_minutes: float = 10.0
    """Minutes after which a collective that some rank never joined ends the job; while a checkpoint is written, three times as many."""

    def __post_init__(self) -> None:
        for name, least in (("replicate", 1), ("shard", 0), ("tensor", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"parallel.{name} must be at least {least}, got {getattr(self, name)}")
        if self.activation_checkpointing not in ("none", "full"):
            raise ValueError(f"unknown activation_checkpointing {self.activation_checkpointing!r}; there are none and full")

    def resolve(self, world: int, llama: LlamaConfig | None = None) -> ParallelConfig:
        """A copy with `shard` filled in for a job of `world` ranks. Raises ValueError if the degrees do not multiply to it, or do not divide `llama`."""
        shard = self.shard or world // (self.replicate * self.tensor)
        if self.replicate * shard * self.tensor != world or not shard:
            raise ValueError(f"replicate {self.replicate} x shard {self.shard or 'any'} x tensor {self.tensor} does not make the {world} ranks of this job")
        if llama and self.tensor > 1:
            parts = {"n_heads": llama.n_heads, "n_kv_heads": llama.n_kv_heads, "vocab_size": llama.vocab_size, "hidden size": llama.ffn_dim}
            for name, n in parts.items():
                if n % self.tensor:
                    raise ValueError(f"tensor {self.tensor} does not divide {name} {n}; choose a degree that divides all of "
                                     + ", ".join(f"{k} {v}" for k, v in parts.items()))  # fmt: skip
        return dataclasses.replace(self, shard=shard)


@dataclass
class TrainConfig:
    """What every training stage has in common. Defaults are the paper's pretraining (sec 2.2) unless a field says otherwise."""

    steps: int = 500_000
    """Optimizer steps (paper: 2.0T tokens in batches of 4M)."""
    batch_size: int = 1024
    """Rows of seq_len tokens in a global batch, over all ranks and micro-batches (paper: 4M tokens)."""
    micro_batch: int = 0
    """Rows a rank takes through the model at once; 0 is all of its share. The gradient does not depend on it (assumed)."""
    seq_len: int = 4096
    """Tokens in a row (paper)."""
    lr: float = 3e-4
    """Peak learning rate (paper: 3e-4 for 7B and 13B, 1.5e-4 for 34B and 70B)."""
    warmup_steps: int = 2000
    """Steps of linear warm-up (paper)."""
    min_lr_ratio: float = 0.1
    """Last learning rate as a fraction of the peak; cosine in between (paper)."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on matrices only (paper gives 0.1; which tensors is assumed)."""
    beta1: float = 0.9
    """AdamW's first decay rate (paper)."""
    beta2: float = 0.95
    """AdamW's second decay rate (paper)."""
    eps: float = 1e-5
    """AdamW's epsilon (paper)."""
    grad_clip: float = 1.0
    """Largest global gradient norm (paper)."""
    seed: int = 0
    """Seed of weights and of the order of the data (assumed)."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl (assumed)."""
    eval_every: int = 0
    """Steps between evaluations; 0 is only at the end (assumed)."""
    save_every: int = 0
    """Steps between checkpoints; 0 is only at the end (assumed)."""
    compile: bool = False
    """Compile with torch.compile, on a CPU the whole step, else block by block: pays off after minutes on a CPU, where it needs a C++ compiler (assumed)."""
    bf16: bool = False
    """Compute in bf16 where the device is good at it (a GPU); refused on a CPU, where it is slower (assumed: the paper does not name the type)."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best present (assumed)."""
    bad_step: str = "stop"
    """What a step does whose loss or gradient is not finite, or a spike: stop ends the run with a message, skip leaves the weights as they were (assumed)."""
    spike: float = 0.0
    """A loss above this many times the average of the steps before is a spike; 0 is never (assumed)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the ranks of a torchrun job share the work."""

    def __post_init__(self) -> None:
        if self.bad_step not in ("stop", "skip"):
            raise ValueError(f"unknown bad_step {self.bad_step!r}; there are stop and skip")
        for name in ("steps", "batch_size", "seq_len", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "grad_clip", "eps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("micro_batch", "warmup_steps", "eval_every", "save_every", "weight_decay", "spike"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


@dataclass
class TokenizerConfig:
    """Learn a tokenizer (sec 2.2)."""

    data: str = "tinyworld"
    """Text: tinyworld, a file, a folder, a glob, or hf:owner/name."""
    out: str = "runs/my/tokenizer.model"
    """File to write."""
    vocab_size: int = 1280
    """Number of tokens (paper: 32,000)."""
    max_docs: int = 100_000
    """Most documents to learn from (assumed)."""


@dataclass
class PretrainConfig:
    """Pretrain a Llama on text (sec 2)."""

    data: str = "tinyworld"
    """Text: tinyworld, a file, a folder, a glob, or hf:owner/name (column names of known sets are known)."""
    tokenizer: str = "runs/my/tokenizer.model"
    """A SentencePiece model file."""
    out: str = "runs/my/pretrain"
    """Folder of the stage: config.yaml, metrics.jsonl, checkpoint/."""
    preset: str = "laptop"
    """Architecture: a name from `minillama info`; its vocabulary becomes the tokenizer's."""
    model: dict = field(default_factory=dict)
    """Fields of the architecture that differ from the preset, for example {n_layers: 6}."""
    init: str = ""
    """Checkpoint to go on from; empty draws new weights."""
    val_fraction: float = 0.02
    """Share of the documents kept for validation (assumed)."""
    workers: int = 2
    """Processes that tokenize (assumed)."""
    whole_documents: bool = True
    """Pack whole documents that do not see each other; false cuts one long stream into rows (assumed; the paper does not say)."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Optimization."""


@dataclass
class SFTConfig:
    """Supervised fine-tuning on instructions (sec 3.1)."""

    data: str = "tinyworld"
    """Instructions: tinyworld, a jsonl or parquet file, or hf:owner/name."""
    init: str = "runs/my/pretrain"
    """Checkpoint to tune: a stage's folder, or Meta or Hugging Face weights."""
    tokenizer: str = ""
    """A SentencePiece model file; empty takes the checkpoint's."""
    out: str = "runs/my/sft"
    """Folder of the stage."""
    val_fraction: float = 0.02
    """Share of the dialogues kept for validation (assumed)."""
    epochs: float = 2.0
    """Passes over the data; sets train.steps (paper: 2)."""
    replay: str = ""
    """Folder of the text that was pretrained on (a pretrain stage's data/), to go on reading beside the dialogues; empty is none (paper: none). Text that
    pretraining held out stays so if val_fraction is pretraining's; documents are packed whole."""
    replay_share: float = 0.2
    """With `replay`, share of a step's rows that are text: 0.2 is one row beside four of dialogues (after Ouyang et al. 2022). The gradient's share is
    larger: all of a text's tokens are targets."""
    workers: int = 1
    """Processes that tokenize (assumed)."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1, batch_size=64, lr=2e-5, warmup_steps=0, seq_len=4096))
    """Optimization (paper: cosine from 2e-5, weight decay 0.1, batch 64, 4,096 tokens; the cosine's end is assumed); steps follow from epochs."""

    def __post_init__(self) -> None:
        if not 0 < self.replay_share < 1:
            raise ValueError(f"replay_share must lie between 0 and 1, got {self.replay_share}; to replay nothing leave replay empty")


@dataclass
class RewardConfig:
    """Train a reward model on preference pairs (sec 3.2.2)."""

    data: list[str] = field(default_factory=lambda: ["runs/my/preferences.jsonl"])
    """Preference pairs: jsonl or parquet files, or hf:owner/name (columns of known sets, Anthropic/hh-rlhf among them, are known)."""
    init: str = "runs/my/sft"
    """Chat checkpoint that the reward model starts from."""
    out: str = "runs/my/reward"
    """Folder of the stage."""
    margin: str = "small"
    """Margin by strength of preference: none, small (1, 2/3, 1/3, 0) or large (3, 2, 1, 0) (paper, table 27)."""
    kind: str = "helpful"
    """helpful mixes all helpfulness pairs with as many others; safety mixes all safety pairs with a tenth of others (paper, sec 3.2.2)."""
    safety_weight: float = 0.0
    """Weight of the auxiliary safety loss on pairs with safety labels (paper uses one for the safety reward model; its formula and weight are assumed)."""
    evidence: bool = False
    """Add two bounded terms to the paper's scalar head, from the answer's log-probabilities and from what it takes up of the prompt (assumed: for models
    of a few million parameters)."""
    text_weight: float = 0.0
    """Weight of a language-modelling loss on the chosen answer, in nats a token, that keeps what the chat model knows (paper has none; Yang et al. 2024)."""
    epochs: float = 1.0
    """Passes over the pairs; sets train.steps (paper: 1, more overfits)."""
    val_fraction: float = 0.05
    """Share of the pairs kept for validation (assumed)."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1, batch_size=512, lr=1e-5, warmup_steps=5, seq_len=4096))
    """Optimization (paper: batch 512 pairs, 1e-5, for 70B 5e-6, cosine to 10%, warm-up 3% of the steps and at least 5)."""

    def __post_init__(self) -> None:
        if self.margin not in MARGINS:
            raise ValueError(f"unknown margin {self.margin!r}; there are {', '.join(MARGINS)}")
        if self.kind not in ("helpful", "safety"):
            raise ValueError(f"unknown kind {self.kind!r} of reward model; there are helpful and safety")


# Margin by strength: negligibly better or unsure, slightly better, better, significantly better (table 27).
MARGINS = {"none": (0.0, 0.0, 0.0, 0.0), "small": (0.0, 1 / 3, 2 / 3, 1.0), "large": (0.0, 1.0, 2.0, 3.0)}


@dataclass
class RejectConfig:
    """Rejection sampling fine-tuning (sec 3.2.3): the best of K samples a prompt becomes what is learned."""

    prompts: str = "runs/my/prompts.jsonl"
    """Prompts: jsonl with messages (the last turn the user's, or an answer that is left out) and, if safety prompts are among them, safety: true."""
    policy: str = "runs/my/sft"
    """Checkpoint that samples; a larger model's samples may tune a smaller one (paper: the 70B's tune all)."""
    init: str = "runs/my/pretrain"
    """Checkpoint that is tuned (paper: the base model, every time)."""
    helpful: str = "runs/my/reward"
    """Helpfulness reward model."""
    safety: str = ""
    """Safety reward model; empty for none."""
    pool: list[str] = field(default_factory=list)
    """selected.jsonl files of earlier iterations to learn from too (paper: from V4 on the top samples of all iterations)."""
    out: str = "runs/my/reject"
    """Folder of the stage: samples.jsonl, selected.jsonl, and the tuned model."""
    samples: int = 8
    """Samples a prompt, K (assumed; the paper's figures go to 100)."""
    temperature: float = 1.0
    """Softmax temperature of the samples (paper: found anew every iteration, 1.2 to 1.3 after RLHF for 10 to 100 samples)."""
    max_new_tokens: int = 256
    """Most tokens of an answer (assumed)."""
    select: str = "best"
    """best by the gated reward, or random: the control that must show nothing."""
    batch: int = 256
    """Rows that are sampled at once (assumed)."""
    epochs: float = 2.0
    """Passes over the selected samples (paper: as SFT)."""
    resume: bool = False
    """Go on from what is in `out`."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1, batch_size=64, lr=2e-5, warmup_steps=0, seq_len=4096))
    """Optimization (paper: as SFT)."""

    def __post_init__(self) -> None:
        if self.select not in ("best", "random"):
            raise ValueError(f"unknown choice {self.select!r} among samples; there are best and random")
        if self.samples < 1 or self.temperature < 0:
            raise ValueError(f"samples {self.samples} must be at least 1 and temperature {self.temperature} not negative")


@dataclass
class PPOConfig:
    """PPO against the gated, whitened reward (sec 3.2.3)."""

    prompts: str = "runs/my/prompts.jsonl"
    """Prompts as for `reject`."""
    policy: str = "runs/my/reject"
    """Checkpoint that PPO starts from, and its reference."""
    helpful: str = "runs/my/reward"
    """Helpfulness reward model; the critic starts from it."""
    safety: str = ""
    """Safety reward model; empty for none."""
    out: str = "runs/my/ppo"
    """Folder of the stage."""
    iterations: int = 200
    """Rollout-and-update rounds (paper: 200 to 400)."""
    batch_size: int = 512
    """Answers sampled an iteration (paper)."""
    minibatch: int = 64
    """Answers a gradient step, one step for each minibatch (paper)."""
    max_new_tokens: int = 256
    """Most tokens of an answer (assumed)."""
    lr: float = 1e-6
    """Constant learning rate of the policy (paper)."""
    critic_lr: float = 0.0
    """Constant learning rate of the critic; 0 is the policy's (assumed)."""
    critic_warmup: int = 0
    """First iterations in which only the critic learns (assumed)."""
    beta: float = 0.01
    """Weight of the KL penalty (paper: 0.01 for 7B and 13B, 0.005 for 34B and 70B)."""
    clip: float = 0.2
    """PPO's clip of the probability ratio (paper)."""
    value_clip: float = 0.2
    """Clip of the change of a value; 0 is none (assumed)."""
    value_weight: float = 0.5
    """Factor of the squared value error (assumed; the critic has weights of its own)."""
    gamma: float = 1.0
    """Discount a token (assumed)."""
    gae_lambda: float = 0.95
    """Lambda of generalized advantage estimation (assumed)."""
    gate: float = 0.15
    """Safety score under which the safety reward is taken for any prompt, in sigmoid units (paper)."""
    no_eos_penalty: float = 2.0
    """Taken from the whitened reward of an answer that was cut before its end (assumed)."""
    weight_decay: float = 0.1
    """AdamW's weight decay (paper)."""
    beta1: float = 0.9
    """AdamW's first decay rate (paper)."""
    beta2: float = 0.95
    """AdamW's second decay rate (paper)."""
    eps: float = 1e-5
    """AdamW's epsilon (paper)."""
    grad_clip: float = 1.0
    """Largest gradient norm, of policy and critic each (paper)."""
    shuffle_rewards: bool = False
    """Give every answer the reward of another: the control that must show nothing."""
    val_fraction: float = 0.1
    """Share of the prompts kept for early stopping (assumed)."""
    eval_every: int = 10
    """Iterations between evaluations on the kept prompts, one of them before the first; 0 is never (paper: early stopping on held-out prompts)."""
    patience: int = 0
    """Evaluations without a better reward after which PPO stops; the best policy is kept. 0 runs to the end (assumed)."""
    save_every: int = 10
    """Iterations between checkpoints; 0 is only at the end (assumed)."""
    seed: int = 0
    """Seed of prompts and samples."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best present (assumed)."""
    bf16: bool = False
    """Compute in bf16 on the ranks of a torchrun job's GPUs (assumed: the paper does not name the type)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the ranks of a torchrun job share the work."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""

    def __post_init__(self) -> None:
        if self.batch_size % self.minibatch:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by minibatch {self.minibatch}")
        for name in ("iterations", "batch_size", "minibatch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class GAttConfig:
    """Ghost Attention (sec 3.3): a system instruction of the first turn that holds through the dialogue."""

    dialogues: str = "runs/my/dialogues.jsonl"
    """jsonl with `standing`, the instruction, and `turns`, the user's turns."""
    policy: str = "runs/my/sft"
    """Checkpoint that samples with the instruction on every turn, and that is tuned."""
    keep: str = ""
    """Instructions (jsonl, as for sft) to mix in, so that nothing else is forgotten; empty for none (assumed)."""
    out: str = "runs/my/gatt"
    """Folder of the stage: dialogues.jsonl as sampled, and the tuned model."""
    ghost: bool = True
    """Keep the instruction on the first turn only in training (the method). False keeps it on every turn: the control."""
    temperature: float = 0.7
    """Softmax temperature of the sampled answers (assumed)."""
    window: int = 0
    """Turns that the sampler sees, the latest ones; 0 for all, as in the paper. A small model obeys in dialogues as long as those that it was tuned on."""
    max_new_tokens: int = 128
    """Most tokens of an answer (assumed)."""
    epochs: float = 1.0
    """Passes over the dialogues (assumed)."""
    resume: bool = False
    """Go on from what is in `out`."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1, batch_size=64, lr=2e-5, warmup_steps=0, seq_len=4096))
    """Optimization (assumed: as SFT)."""


@dataclass
class SafetyConfig:
    """Safety tuning after RLHF (sec 4.2): gated rejection sampling on adversarial prompts, and context distillation."""

    prompts: str = "runs/my/safety-prompts.jsonl"
    """Prompts as for `reject`; those with safety: true are adversarial, the others harmless ones that look alike."""
    policy: str = "runs/my/ppo"
    """Chat checkpoint that is tuned, and that samples."""
    teacher: str = "runs/my/safety-sft"
    """Chat checkpoint that samples too and that is asked with safety preprompts: a model after supervised safety tuning."""
    helpful: str = "runs/my/reward"
    """Helpfulness reward model."""
    safety: str = "runs/my/reward-safety"
    """Safety reward model."""
    keep: list[str] = field(default_factory=list)
    """Dialogues (as for sft) to mix in, so that helpfulness is kept; the paper mixes about nine parts to one."""
    out: str = "runs/my/safety"
    """Folder of the stage: distilled.jsonl, selected.jsonl, and the tuned model."""
    samples: int = 4
    """Samples a prompt from the policy, and on adversarial prompts as many from the teacher (assumed)."""
    red_team: int = 0
    """A red-team round first: of the adversarial prompts only this many are learned from, those whose answers the safety model finds worst; 0 is all."""
    temperature: float = 1.0
    """Softmax temperature of the samples (assumed)."""
    max_new_tokens: int = 128
    """Most tokens of an answer (assumed)."""
    distil: bool = True
    """Context distillation: ask the teacher with a safety preprompt, learn its answer without it (paper)."""
    gate: bool = True
    """Distil only where the safety reward model prefers the distilled answer to the original one (paper)."""
    epochs: float = 1.0
    """Passes over the selected and kept dialogues (assumed)."""
    resume: bool = False
    """Go on from what is in `out`."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=1, batch_size=64, lr=2e-5, warmup_steps=0, seq_len=4096))
    """Optimization (assumed: as SFT)."""

    def __post_init__(self) -> None:
        if self.red_team < 0:
            raise ValueError(f"red_team must be 0 (every adversarial prompt) or a number of prompts, got {self.red_team}")


@dataclass
class GenerateConfig:
    """Continue a text, or answer in the chat format."""

    model: str = "runs/laptop/sft"
    """Checkpoint: a stage's folder, minillama's own format, Meta's or Hugging Face's."""
    prompt: str = ""
    """Text to continue."""
    max_new_tokens: int = 128
    """Most tokens to write."""
    temperature: float = 0.0
    """Softmax temperature; 0 is greedy."""
    top_p: float = 1.0
    """Nucleus: sample from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Seed of sampling."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
    bf16: bool = False
    """Hold and compute in bf16 in a torchrun job."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the ranks of a torchrun job share the model: tensor says over how many each copy is split."""


@dataclass
class DemoConfig:
    """The whole pipeline on tinyworld."""

    scale: str = "laptop"
    """ci (about 3 minutes on 2 cores), laptop (about 15), or gpu (without alignment)."""
    seed: int = 0
    """Seed of the world, the weights and the order of the data."""
    out: str = ""
    """Folder of the run; empty is runs/<scale>."""
    device: str = "auto"
    """cpu, cuda, mps, or auto."""
