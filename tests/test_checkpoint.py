"""Checkpoints against transformers (an independent reader and writer) and against Meta-style shards cut by hand."""
import errno
import json
import os
import random
import shutil
import warnings

import pytest
import torch

from minillama import _files
from minillama.chat import Message, encode_dialogue, encode_prompt
from minillama.checkpoint import load, load_hf, load_meta, load_state, load_weights, save, save_hf, save_state
from minillama.config import LlamaConfig
from minillama.model import Llama
from minillama.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

GQA = dict(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, multiple_of=16, max_seq_len=64)  # G = 3 differs from K = 2
MHA = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, multiple_of=16, max_seq_len=64)
TOKENS = torch.tensor([[1, 17, 250, 399, 5, 5, 60, 2, 300, 111, 8]])


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    rng = random.Random(0)
    words = "Nila lives here and there. Où est-il? 12 345 apples,  two  spaces; it's x=1\t(yes) [INST] the cat sat on a mat".split(" ")
    texts = [" ".join(rng.choices(words, k=12)) + "\n" + "  def f(a, b):\n    return a" for _ in range(300)]
    return Tokenizer.train(texts, vocab_size=400, path=tmp_path_factory.mktemp("tok") / "tokenizer.model")


def make(kind, seed=0, **changes):
    """A model with norms that are not 1, so that a norm in the wrong place shows."""
    model = Llama(LlamaConfig(**{**kind, "vocab_size": 400, **changes})).init_weights(seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(0.5 + torch.rand(p.shape, generator=g))
    return model


def same(a, b):
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def edit_json(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v != "DELETE"}))


# ----------------------------------------------------------------------------------------------------------- our own


@pytest.mark.parametrize("kind", [GQA, MHA])
def test_own_round_trip(tmp_path, tokenizer, kind):
    """A lost tensor, config field or rotary table, or a tokenizer that was not copied byte for byte."""
    model = make(kind, rope_theta=500.0, norm_eps=1e-3, hidden_dim=40)
    save(model, tokenizer, tmp_path / "a")
    back, tok = load(tmp_path / "a")
    assert back.config == model.config and same(model, back)
    assert torch.equal(model(TOKENS), back(TOKENS))
    assert (tmp_path / "a/tokenizer.model").read_bytes() == tokenizer.path.read_bytes()
    assert tok.encode("cat 12") == tokenizer.encode("cat 12")
    save(model, None, tmp_path / "b")
    assert load(tmp_path / "b")[1] is None


def test_dtype_and_rope_tables(tmp_path):
    """A load in bf16 that also rounds the rotary tables, which ruins far positions."""
    model = make(GQA)
    save(model, None, tmp_path / "a")
    half = load(tmp_path / "a", dtype=torch.bfloat16)[0]
    assert all(p.dtype == torch.bfloat16 for p in half.parameters()) and half.rope_cos.dtype == torch.float32
    save(half, None, tmp_path / "b")
    full = load(tmp_path / "b")[0]
    assert full.output.weight.dtype == torch.float32 and torch.equal(full.output.weight, half.output.weight.float())
    assert all(p.requires_grad for p in full.parameters())


def test_loaded_weights_do_not_hang_on_the_file(tmp_path):
    """Weights that stay mapped to the file change under the model when the file is rewritten in place."""
    save(make(GQA), None, tmp_path / "a")
    back, _ = load(tmp_path / "a")
    before = back.output.weight.clone()
    size = (tmp_path / "a/model.safetensors").stat().st_size
    with open(tmp_path / "a/model.safetensors", "r+b") as f:
        f.write(b"\0" * size)
    assert torch.equal(back.output.weight, before)


def test_tokenizer_outlives_its_file(tmp_path, tokenizer):
    """A tokenizer whose file went away with an old step's folder must still be saved."""
    path = tmp_path / "gone.model"
    path.write_bytes(tokenizer.path.read_bytes())
    tok = Tokenizer(path)
    path.unlink()
    save(make(GQA), tok, tmp_path / "a")
    assert load(tmp_path / "a")[1].encode("cat") == tokenizer.encode("cat")


# ------------------------------------------------------------------------------------------------------ atomic saves


def fail_after(monkeypatch, calls):
    """Make the write number `calls` + 1 fail as a full disk does, with half a file left behind."""
    real, count = _files.save_file, [0]

    def broken(tensors, file, metadata=None):
        count[0] += 1
        if count[0] > calls:
            with open(file, "wb") as f:
                f.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        real(tensors, file, metadata=metadata)

    monkeypatch.setattr(_files, "save_file", broken)


def test_full_disk_keeps_the_old_one(tmp_path, monkeypatch, tokenizer):
    """A save in place, which a full disk leaves as half a checkpoint; and a hidden half that stays and fills the disk for good."""
    old, new = make(GQA), make(GQA, seed=1)
    save(old, tokenizer, tmp_path / "a")
    save_state(tmp_path / "s", 5, old, {"x": torch.ones(2)}, {"tokens": 9})
    fail_after(monkeypatch, 0)
    with pytest.raises(OSError, match="No space left"):
        save(new, tokenizer, tmp_path / "a")
    with pytest.raises(OSError, match="No space left"):
        save_hf(new, tokenizer, tmp_path / "h")
    fail_after(monkeypatch, 1)  # weights written, train_state not
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path / "s", 6, new, {"x": torch.zeros(2)}, {"tokens": 10})
    monkeypatch.undo()
    assert same(load(tmp_path / "a")[0], old)
    assert load_state(tmp_path / "s")[0] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "s"] and [p.name for p in (tmp_path / "s").iterdir()] == ["step-00000005"]


def test_real_write_error_is_an_oserror(tmp_path):
    """safetensors reports a full disk as its own exception, which no `except OSError` sees. A file size limit stands for the full disk."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save(make(MHA), None, tmp_path / "a")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(OSError) as e:
            save(make(MHA, seed=1), None, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert e.value.errno == errno.EFBIG
    assert same(load(tmp_path / "a")[0], make(MHA)) and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("rename", [1, 2])
def test_killed_between_the_renames(tmp_path, monkeypatch, rename):
    """A swap of folders has a moment without the name; a kill there must leave a checkpoint that is found and that no later save loses."""
    old, new = make(MHA), make(MHA, seed=1)
    save(old, None, tmp_path / "a")
    real, count = os.rename, [0]

    def killed(a, b):
        count[0] += 1
        if count[0] >= rename:
            os._exit(9)
        real(a, b)

    pid = os.fork()
    if pid == 0:
        _files.os.rename = killed
        save(new, None, tmp_path / "a")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert same(load(tmp_path / "a")[0], old)
    fail_after(monkeypatch, 0)
    with pytest.raises(OSError):
        save(new, None, tmp_path / "a")
    monkeypatch.undo()
    assert same(load(tmp_path / "a")[0], old)
    save(new, None, tmp_path / "a")
    assert same(load(tmp_path / "a")[0], new) and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_save_does_not_delete_what_is_not_its_own(tmp_path):
    """Replacing the folder as a whole would delete a user's files in it."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.tex").write_text("years of work")
    for write in (save, save_hf):
        with pytest.raises(ValueError, match="thesis.tex"):
            write(make(MHA), None, tmp_path / "a")
    assert (tmp_path / "a/thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match="is a file"):
        save(make(MHA), None, tmp_path / "a/thesis.tex")


def test_saved_files_are_readable_as_usual(tmp_path):
    """safetensors creates files with mode 0600, which colleagues on a cluster cannot read."""
    save(make(MHA), None, tmp_path / "a")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "a/model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --------------------------------------------------------------------------------------------------- trainer's steps


def test_state_round_trip_and_pruning(tmp_path, tokenizer):
    """Optimizer state that loses a dtype, a 0-dim step count or exactness; steps sorted as text; the newest pruned, not the oldest."""
    model = make(GQA)
    assert load_state(tmp_path) is None and load_state(tmp_path / "none") is None
    for step in (8, 9, 10, 123_456_789):
        tensors = {"step/x": torch.tensor(float(step)), "exp_avg/x": torch.randn(3, 2) * step, "b": torch.ones(2, dtype=torch.bfloat16)}
        path = save_state(tmp_path, step, model, tensors, {"tokens": step * 7, "note": "é"}, tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-123456789"]
    step, folder, back, meta = load_state(tmp_path)
    assert (step, folder, meta) == (123_456_789, path, {"tokens": 123_456_789 * 7, "note": "é"})
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in tensors)
    other = make(GQA, seed=3)
    load_weights(other, folder)
    assert same(model, other)
    save_state(tmp_path, 123_456_790, other, {}, {}, keep=0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-123456790"] and load_state(tmp_path)[2:] == ({}, {})


def test_same_step_twice_and_leftovers(tmp_path):
    """A step that is saved again must win; a killed save's hidden folder must be neither loaded nor kept."""
    half = tmp_path / ".tmp-step-00000009"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert load_state(tmp_path) is None
    save_state(tmp_path, 3, make(MHA), {}, {"n": 1})
    save_state(tmp_path, 3, make(MHA, seed=1), {}, {"n": 2})
    assert load_state(tmp_path)[3] == {"n": 2} and [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    save_state(tmp_path / "b", 3, make(MHA), {}, {"n": 1})
    shutil.copytree(tmp_path / "b/step-00000003", tmp_path / ".old-step-00000003")  # killed after the swap, before the old one went
    assert load_state(tmp_path)[3] == {"n": 2}
    shutil.rmtree(tmp_path / "step-00000003")  # killed between the renames
    assert load_state(tmp_path)[3] == {"n": 1}


def test_incomplete_step_is_skipped_damaged_one_is_named(tmp_path):
    """An interrupted copy of a run must fall back to a whole step; a damaged file must be named, with the way out."""
    model = make(MHA)
    for step in (1, 2):
        save_state(tmp_path, step, model, {"x": torch.ones(100)}, {"tokens": step})
    os.truncate(tmp_path / "step-00000002/train_state.safetensors", 100)
    with pytest.raises(ValueError, match=r"step-00000002/train_state.safetensors is truncated .* delete"):
        load_state(tmp_path)
    (tmp_path / "step-00000002/train_state.json").write_text("{")
    with pytest.raises(ValueError, match="train_state.json is not valid JSON"):
        load_state(tmp_path)
    (tmp_path / "step-00000002/train_state.json").unlink()
    assert load_state(tmp_path)[0] == 1


def test_load_weights_is_strict_and_all_or_nothing(tmp_path):
    """A mismatch that is found after half of the tensors were copied leaves a chimera."""
    save(make(GQA), None, tmp_path / "a")
    other = make(GQA, seed=2, hidden_dim=80)
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers.0.feed_forward.w1.weight has shape \[128, 48\], expected \[80, 48\]"):
        load_weights(other, tmp_path / "a")
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())
    with pytest.raises(ValueError, match=r"lacks the tensor weight of shape \[3, 2\]"):
        load_weights(torch.nn.Linear(2, 3, bias=False), tmp_path / "a")


# ------------------------------------------------------------------------------------------------------------- guess


def test_load_guesses(tmp_path, tokenizer):
    """Each kind of folder must go to its own reader; the highest step is the newest."""
    model, newer = make(GQA), make(GQA, seed=1)
    save(model, tokenizer, tmp_path / "own")
    save_hf(model, tokenizer, tmp_path / "hf")
    write_meta(model, tmp_path / "meta", 2)
    save_state(tmp_path / "run/sft/checkpoint", 99, model, {}, {}, tokenizer)
    save_state(tmp_path / "run/sft/checkpoint", 100, newer, {}, {}, tokenizer)
    for name, want in [("own", model), ("hf", model), ("meta", model), ("run/sft", newer), ("run/sft/checkpoint", newer),
                       ("run/sft/checkpoint/step-00000099", model)]:  # fmt: skip
        assert same(load(tmp_path / name)[0], want), name
    with pytest.raises(ValueError, match="looked for params.json .* consolidated.* config.json .* step-"):
        load(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is a file"):
        load(tokenizer.path)


# -------------------------------------------------------------------------------------------------------------- Meta


def write_meta(model, dir, n, dtype=None, params=None):
    """Meta's release, cut by fairscale's rules: ColumnParallelLinear by output, RowParallelLinear and ParallelEmbedding by input."""
    dir.mkdir(parents=True)
    c = model.config
    column, row = ("wq", "wk", "wv", "w1", "w3", "output"), ("wo", "w2", "tok_embeddings")
    for rank in range(n):
        shard = {"rope.freqs": torch.zeros(c.head_dim // 2)}
        for name, t in model.state_dict().items():
            kind = name.split(".")[-2]
            if kind in column:
                t = t[rank * len(t) // n : (rank + 1) * len(t) // n]
            elif kind in row:
                width = t.shape[1] // n
                t = t[:, rank * width : (rank + 1) * width]
            shard[name] = t.to(dtype or t.dtype).clone()
        torch.save(shard, dir / f"consolidated.{rank:02d}.pth")
    meta = {k: getattr(c, k) for k in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "norm_eps")} | {"vocab_size": -1}
    (dir / "params.json").write_text(json.dumps({**meta, **(params or {})}))


@pytest.mark.parametrize("kind,n", [(GQA, 1), (GQA, 2), (MHA, 4)])
def test_meta_shards(tmp_path, kind, n):
    """Shards joined on the wrong dimension or in the wrong order: shapes are right for square matrices, and the text is noise."""
    model = make(kind, max_seq_len=4096)  # params.json does not say; 4,096 is Llama 2's
    write_meta(model, tmp_path / "m", n)
    back, tok = load_meta(tmp_path / "m")
    assert tok is None and back.config == model.config and same(model, back)


def test_meta_bf16_tokenizer_and_hidden_size(tmp_path, tokenizer):
    """The release is bf16, its tokenizer.model lies one folder up, and a hidden size outside Meta's rule is in no field."""
    model = make(GQA, hidden_dim=44).to(torch.bfloat16)
    write_meta(model, tmp_path / "rel/7b", 2, params={"use_scaled_rope": False, "max_batch_size": 6})
    (tmp_path / "rel/tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    back, tok = load_meta(tmp_path / "rel/7b")
    assert back.config.hidden_dim == 44 and back.config.vocab_size == 400 and tok.vocab_size == 400
    assert all(p.dtype == torch.float32 for p in back.parameters())
    assert all(torch.equal(a.float(), b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    assert load_meta(tmp_path / "rel/7b", dtype=torch.bfloat16)[0].output.weight.dtype == torch.bfloat16


def test_meta_errors(tmp_path, tokenizer):
    """A missing shard, a tensor too many or too few, and Llama 3 must be told, not guessed around."""
    model = make(GQA)
    write_meta(model, tmp_path / "m", 2)
    file = tmp_path / "m/consolidated.01.pth"
    shard = torch.load(file)
    good = file.read_bytes()

    def expect(message, changed=None):
        if changed is not None:
            torch.save(changed, file)
        with pytest.raises(ValueError, match=message):
            load_meta(tmp_path / "m")
        file.write_bytes(good)

    wk = "layers.1.attention.wk.weight"
    expect(rf"consolidated.01.pth lacks the tensor {wk} of shape \[8, 48\]", {k: v for k, v in shard.items() if k != wk})
    expect(r"consolidated.01.pth has a tensor extra.weight of shape \[3\]", {**shard, "extra.weight": torch.ones(3)})
    wo = "layers.0.attention.wo.weight"
    expect(rf"{wo} has shape \[48, 48\], expected \[48, 24\]", {**shard, wo: torch.ones(48, 48)})
    expect("is not a dictionary of tensors", [1, 2])
    file.write_bytes(good[: len(good) // 2])
    expect("consolidated.01.pth is truncated")
    file.rename(tmp_path / "m/consolidated.02.pth")
    expect("lacks consolidated.01.pth")
    (tmp_path / "m/consolidated.02.pth").unlink()
    edit_json(tmp_path / "m/params.json", use_scaled_rope=True)
    expect("use_scaled_rope = True.*not supported")
    (tmp_path / "m/params.json").write_text("not json")
    expect("params.json is not valid JSON")
    file.unlink()  # half a model: the one shard left has half the feed-forward size
    params = dict(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, multiple_of=16, norm_eps=1e-5, vocab_size=-1)
    (tmp_path / "m/params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match="expected"):
        load_meta(tmp_path / "m")


# ------------------------------------------------------------------------------------------------------ Hugging Face


@pytest.mark.parametrize("kind", [GQA, MHA])
@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_save_hf_loads_in_transformers(tmp_path, tokenizer, kind, shard):
    """wk permuted with n_heads; rope_theta or norm_eps lost (defaults differ); a shard index that misses a tensor."""
    model = make(kind, rope_theta=700.0, norm_eps=3e-4)
    with torch.no_grad():
        model.output.weight[3:259] = 0  # no lone bytes: transformers shows a run with one broken byte as all broken, SentencePiece does not
    save_hf(model, tokenizer, tmp_path / "hf", max_shard_bytes=shard)
    assert (tmp_path / "hf/model.safetensors.index.json").exists() == (shard < 10**6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hf, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["rope_theta"] == 700.0 and config["torch_dtype"] == "float32"  # what transformers 4 and other engines read
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert hf.dtype == torch.float32 and hf.config.eos_token_id == 2 and hf.config.bos_token_id == 1 and hf.config.pad_token_id is None
    with torch.no_grad():
        ours, theirs = model(TOKENS), hf(TOKENS).logits
    assert ours.std() > 0.5 and (ours - theirs).abs().max() < 1e-5
    assert same(load_hf(tmp_path / "hf")[0], model)
    # Greedy continuation, ours by the plainest loop; both stop at EOS.
    prompt = tokenizer.encode("Nila lives", bos=True)
    ids = list(prompt)
    while len(ids) < 40 and ids[-1] != 2:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    out = hf.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_length=40, pad_token_id=0)
    assert out[0].tolist() == ids
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tok.decode(out[0], skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_load_hf_from_transformers(tmp_path, dtype):
    """Weights that transformers wrote in shards: the permutation undone with the wrong number of heads, or rope_parameters not read."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, vocab_size=400,
        rms_norm_eps=2e-4, max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 321.0}, initializer_range=0.2,
    )  # fmt: skip
    hf = transformers.LlamaForCausalLM(config).to(dtype).eval()
    hf.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    model, tok = load_hf(tmp_path / "hf")
    assert tok is None and model.config.rope_theta == 321.0 and model.config.hidden_dim == 40 and model.config.norm_eps == 2e-4
    with torch.no_grad():
        # Read again in fp32: hf.float() would keep rotary frequencies that .to(dtype) has rounded.
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(TOKENS).logits
        ours = model(TOKENS)
    assert ours.std() > 0.5 and (ours - theirs).abs().max() < 1e-5
    assert load(tmp_path / "hf", dtype=torch.bfloat16)[0].output.weight.dtype == torch.bfloat16


def test_load_hf_old_config_and_tied(tmp_path):
    """transformers 4 wrote rope_theta at the top and rotary_emb.inv_freq as tensors; tied embeddings have no lm_head, or one to ignore."""
    model = make(GQA)
    save_hf(model, None, tmp_path / "hf")
    edit_json(tmp_path / "hf/config.json", rope_parameters="DELETE", rope_theta=99.0)
    assert load_hf(tmp_path / "hf")[0].config.rope_theta == 99.0
    edit_json(tmp_path / "hf/config.json", rope_theta="DELETE", num_key_value_heads=2)
    assert load_hf(tmp_path / "hf")[0].config.rope_theta == 10_000.0
    edit_json(tmp_path / "hf/config.json", tie_word_embeddings=True)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "hf/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    for drop in ((), ("lm_head.weight",)):
        save_file({k: v.clone() for k, v in tensors.items() if k not in drop}, file)
        back = load_hf(tmp_path / "hf")[0]
        assert torch.equal(back.output.weight, back.tok_embeddings.weight)
        assert back.output.weight.data_ptr() != back.tok_embeddings.weight.data_ptr()
        assert torch.equal(back.tok_embeddings.weight, model.tok_embeddings.weight)


@pytest.mark.parametrize("key,value", [
    ("rope_scaling", {"type": "linear", "factor": 2.0}), ("rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}),
    ("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu"), ("head_dim", 16), ("model_type", "mistral"),
    ("quantization_config", {"quant_method": "gptq"}), ("hidden_size", "DELETE"), ("num_attention_heads", 0), ("num_key_value_heads", 4),
])  # fmt: skip
def test_load_hf_refuses_other_architectures(tmp_path, key, value):
    """A field that is passed over gives a model that loads and talks nonsense."""
    save_hf(make(GQA), None, tmp_path / "hf")
    edit_json(tmp_path / "hf/config.json", **{key: value})
    with pytest.raises(ValueError, match="n_kv_heads" if key == "num_key_value_heads" else key):
        load_hf(tmp_path / "hf")


def test_safetensors_errors(tmp_path, tokenizer):
    """One line that names the tensor with both shapes, or the file, for both of the formats in safetensors."""
    from safetensors.torch import load_file, save_file

    model = make(GQA)
    save(model, None, tmp_path / "own")
    save_hf(model, None, tmp_path / "hf", max_shard_bytes=20_000)
    file = tmp_path / "own/model.safetensors"
    tensors, good = load_file(file), file.read_bytes()

    def expect(message, changed=None, dir="own"):
        if changed is not None:
            save_file(changed, file)
        with pytest.raises(ValueError, match=message) as e:
            load(tmp_path / dir)
        assert "\n" not in str(e.value)

    expect(r"model.safetensors lacks the tensor norm.weight of shape \[48\]", {k: v for k, v in tensors.items() if k != "norm.weight"})
    expect(r"model.safetensors has a tensor norm.bias of shape \[48\]", {**tensors, "norm.bias": torch.ones(48)})
    expect(r"output.weight has shape \[401, 48\], expected \[400, 48\]", {**tensors, "output.weight": torch.ones(401, 48)})
    expect(r"output.weight is stored as torch.int8", {**tensors, "output.weight": torch.ones(400, 48, dtype=torch.int8)})
    for bad in (good[:-1], good[:5], b"", b"hello" * 100):
        file.write_bytes(bad)
        expect("own/model.safetensors is truncated or not")
    file.write_bytes(good)
    edit_json(tmp_path / "own/params.json", dim=0)
    expect("params.json: LlamaConfig.dim must be a positive whole number")
    (tmp_path / "own/params.json").write_text("[1]")
    expect("params.json holds a JSON list")
    first, *_, last = sorted((tmp_path / "hf").glob("*.safetensors"))
    os.truncate(first, 1000)
    expect(f"{first.name} is truncated", dir="hf")
    first.unlink()
    expect(f"{first.name} is missing", dir="hf")
    with pytest.raises(ValueError, match="401 tokens|belong"):
        save_hf(make(GQA, vocab_size=399), tokenizer, tmp_path / "x")


# --------------------------------------------------------------------------------------------------------- tokenizer

TEXTS = [
    "Nila lives here.", " leading", "  two leading", "trailing ", "double  space   triple",
    "1234567 3.14", "a\nb\n\nc\n", "\n", " ", "  ", "\t x",
    "emoji 🦙🦙 and 日本語", "Où est-il? naïve", "é", "[INST] hi [/INST]", "x" * 300, " " * 37 + "x", "\u2581 literal", "a\u0000b",
    "\r\n", "",
]  # fmt: skip


def test_autotokenizer_gives_the_same_ids(tmp_path, tokenizer):
    """The dummy prefix lost before a leading space, as in transformers' own Llama tokenizer; merges in the wrong order."""
    save_hf(make(GQA), tokenizer, tmp_path / "hf")
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    rng = random.Random(0)
    alphabet = ["the", "cat", " ", "  ", "\n", "12", "é", "🦙", "return", "(", "a", "s", "t", "▁", "lives", ".", "\t"]
    texts = TEXTS + ["".join(rng.choices(alphabet, k=rng.randint(1, 30))) for _ in range(2000)]
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        assert tok(text)["input_ids"] == ids, text
        if "\u2581" not in text:  # SentencePiece's own mark for a space does not come back
            assert tok.decode(ids, skip_special_tokens=True) == text, text
    assert (tok.bos_token_id, tok.eos_token_id, tok.unk_token_id, tok.pad_token_id, len(tok)) == (1, 2, 0, None, 400)
    assert tok.model_max_length == 64


DIALOGUES = [
    [("user", "Where does Nila live?")],
    [("system", "Be brief."), ("user", " hi\n")],
    [("user", "a"), ("assistant", " b "), ("user", "c  d")],
    [("system", "  keep\nspaces "), ("user", "12"), ("assistant", "🦙"), ("user", "é"), ("assistant", "")],
    [("system", ""), ("user", "x"), ("assistant", "two\nlines"), ("user", "y"), ("assistant", "done"), ("user", "z")],
]


@pytest.mark.parametrize("turns", DIALOGUES)
def test_chat_template_is_our_format(tmp_path, tokenizer, turns):
    """One space, strip or special token that differs is a prompt that the model was not trained on."""
    save_hf(make(GQA), tokenizer, tmp_path / "hf")
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [Message(*t) for t in turns]
    ours = encode_prompt(tokenizer, messages) if turns[-1][0] == "user" else encode_dialogue(tokenizer, messages)[0]
    theirs = tok.apply_chat_template([{"role": r, "content": c} for r, c in turns], return_dict=False)
    assert theirs == ours


@pytest.mark.parametrize("turns", [
    [("assistant", "a")], [("user", "a"), ("user", "b")], [("user", "a"), ("system", "b")], [("system", "a")], [("user", "x [/INST] y")],
    [("system", "<<SYS>>"), ("user", "a")], [("user", "a </s>")],
])  # fmt: skip
def test_chat_template_refuses(tmp_path, tokenizer, turns):
    """Turns out of order, and a user who writes the tags or the end token."""
    save_hf(make(GQA), tokenizer, tmp_path / "hf")
    tok = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    with pytest.raises(Exception, match="alternate|user turn|reserved"):
        tok.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
