"""The specification, executable: python test_all.py [pytest's options]. CPU only, no network."""
import base64, copy, json, math, os, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as M
import muon
import pretrain
import random
import pyarrow as pa
import pyarrow.parquet as pq
import regex
import tiktoken
from tiktoken.load import load_tiktoken_bpe
import tok
from dataclasses import asdict, replace
import eval as ev
import model as m
import collections, http.server, threading
import model
import sft
import demo
import inspect
import shutil
import types
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
import export_hf
import modeling_nanochat as hf
from model import GPT, GPTConfig, atomic_write, checkpoint_files, load_model, load_tokenizer, save_checkpoint

HERE = Path(__file__).resolve().parent
SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
           "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("NANOCHAT_BASE_DIR", None)
torch.set_num_threads(1)


# ---- What the tests share ------------------------------------------------------------------------------------------

def small_model(seed=0, n_layer=2, vocab=70, use_rope=True, std=0.2, n_embd=64, n_head=2):
    """A model whose every weight matters (the real init has zeros)."""
    torch.manual_seed(seed)
    model = M.GPT(M.GPTConfig(32, vocab, n_layer, n_head, n_head, n_embd), use_rope)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def write_tokenizer(folder, merges=()):
    """A byte-level tokenizer with a few merges, in the project's format."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [bytes([i]) for i in range(256)] + list(merges)
    (folder / "tokenizer.tiktoken").write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    special = {s: len(tokens) + i for i, s in enumerate(SPECIAL)}
    (folder / "config.json").write_text(json.dumps({"pat_str": PATTERN, "special_tokens": special}))
    return M.load_tokenizer(folder)


def write_shard(path, texts, group=1024):
    import pyarrow as pa, pyarrow.parquet as pq
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=group, compression="zstd")
    return path


def some_texts(n, seed=0, longest=400):
    words = "the quick brown fox jumps over a lazy dog and then it sleeps for 12 or 13 hours, doesn't it?".split()
    random = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(random.choice(words, random.integers(1, longest // 5))) for i in range(n)]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A base folder with a tokenizer and shards; runs copy or share it."""
    base = tmp_path_factory.mktemp("base")
    write_tokenizer(base / "tokenizer", [b" t", b"he", b" the", b"in"])
    for i in range(3):
        write_shard(base / "data" / "climbmix" / f"shard_{i:05d}.parquet", some_texts(700, i), 256)
    write_shard(base / "data" / "climbmix" / "shard_06542.parquet", some_texts(60, 99))
    return base


def script(name, *args, base, timeout=600, env=None, **kw):
    """Runs a script as a user would; returns the finished process, its output as text."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([sys.executable, str(HERE / name), *map(str, args)], capture_output=True, text=True, timeout=timeout,
                          env=env, cwd=HERE, **kw)


@pytest.fixture
def refused(monkeypatch):
    """refused(module, args, words, base=...): main() ends with one clear line that has these words in it."""
    def check(module, args, words, base):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        line = None
        try:
            module.main()
        except SystemExit as e:
            line = e.code
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
        assert isinstance(line, str) and "\n" not in line and all(w in line for w in words), line
    return check


def one_line(result, *words):
    """The process failed with one clear line on stderr that has these words in it."""
    lines = [l for l in result.stderr.strip().splitlines() if l.strip()]
    assert result.returncode not in (0, -11) and len(lines) == 1, (result.returncode, result.stderr, result.stdout[-500:])
    for word in words:
        assert word in lines[0], lines[0]


# ---- model.py: the model, against a reference in float64 loops ---------------------------------------------------------

def test_parameter_counts():
    for depth, total, scaling, flops in ((18, 362_151_936, 324_403_200, 2.456e9), (20, 480_378_880, 438_435_840, 3.260e9)):
        with torch.device("meta"):
            model = M.GPT(M.GPTConfig.from_depth(depth))
        assert sum(p.numel() for p in model.parameters()) == total
        assert model.num_scaling_params() == scaling
        assert abs(model.flops_per_token(4096) / flops - 1) < 5e-4


def test_sizes():
    sizes = {d: (c.n_embd, c.n_head, c.intermediate_size) for d in (1, 12, 18, 20) for c in [M.GPTConfig.from_depth(d)]}
    assert sizes == {1: (128, 1, 384), 12: (768, 6, 2048), 18: (1152, 9, 3072), 20: (1280, 10, 3456)}


def test_state_dict_keys():
    keys = set(small_model(n_layer=1).state_dict())
    assert keys == {"transformer.wte.weight", "lm_head.weight"} | {f"transformer.h.0.attn.{k}.weight" for k in ("c_q", "c_k", "c_v", "c_proj")} \
        | {f"transformer.h.0.mlp.{k}.weight" for k in ("w_gate", "w_up", "c_proj")}


def reference_logits(model, ids):
    """The model again, for one row, in float64 and one position, head and pair at a time."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    c, D = model.config, model.config.n_embd // model.config.n_head
    rms = lambda v: v / (v.square().mean() + 1e-6).sqrt()

    def rotated(v, t):
        out = v.clone()
        for i in range(D // 2):
            angle = t * 100_000.0 ** (-2 * i / D)
            a, b = v[i], v[i + D // 2]
            out[i] = a * math.cos(angle) + b * math.sin(angle)
            out[i + D // 2] = -a * math.sin(angle) + b * math.cos(angle)
        return out

    xs = [w["transformer.wte.weight"][i] for i in ids]
    for n in range(c.n_layer):
        layer = lambda name: w[f"transformer.h.{n}.{name}.weight"]
        ks, vs, new = [], [], []
        for t, x in enumerate(xs):
            h = rms(x)
            q, k, v = (layer(f"attn.c_{s}") @ h for s in "qkv")
            heads = []
            ks.append([]), vs.append(v.view(c.n_head, D))
            for head in range(c.n_head):
                qh, kh = q[head * D:(head + 1) * D], k[head * D:(head + 1) * D]
                if model.use_rope:
                    qh, kh = rotated(qh, t), rotated(kh, t)
                ks[t].append(rms(kh))
                scores = torch.stack([rms(qh) @ ks[s][head] for s in range(t + 1)]) / D ** 0.5
                heads.append(sum(p * vs[s][head] for s, p in enumerate(scores.softmax(0))))
            x = x + layer("attn.c_proj") @ torch.cat(heads)
            h = rms(x)
            gate = layer("mlp.w_gate") @ h
            new.append(x + layer("mlp.c_proj") @ (gate * gate.sigmoid() * (layer("mlp.w_up") @ h)))
        xs = new
    return torch.stack([15 * torch.tanh(w["lm_head.weight"] @ rms(x) / 15) for x in xs])[:, :c.vocab_size]


@pytest.mark.parametrize("use_rope", [True, False])
def test_model_equals_reference(use_rope):
    model = small_model(use_rope=use_rope, std=0.3)
    ids = torch.randint(0, 70, (12,))
    expected = reference_logits(model, ids.tolist())
    got = model(ids[None])[0]
    assert got.dtype == torch.float32 and got.shape == (12, 70)
    assert (got - expected).abs().max() < 2e-4 * expected.abs().max()
    assert expected.abs().max() > 5                         # or the softcap would not show


def test_without_rope_means_cos_1_sin_0():
    model, ids = small_model(), torch.randint(0, 70, (2, 20))
    model.use_rope = False
    without = model(ids)
    model.use_rope = True
    assert (model(ids) - without).abs().max() > 0.1
    model.rotary_tables = lambda T, D, device: (torch.ones(T, D // 2), torch.zeros(T, D // 2))
    torch.testing.assert_close(model(ids), without)


def test_init():
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig.from_depth(4, vocab_size=1000))
    model.init_weights()
    C = model.config.n_embd
    for name, p in model.named_parameters():
        std, uniform = 0.0, False
        if "wte" in name: std = 0.8
        if "lm_head" in name: std = 0.001
        if name.endswith(("c_q.weight", "c_k.weight", "c_v.weight")): std, uniform = C ** -0.5, True
        if "w_gate" in name or "w_up" in name: std, uniform = 0.4 * C ** -0.5, True
        assert abs(p.std().item() - std) <= 0.02 * std, name
        if uniform:
            assert p.abs().max() <= 3 ** 0.5 * std * 1.0001, name


def test_loss_in_chunks_equals_the_plain_one():
    model = small_model()
    ids, targets = torch.randint(0, 70, (3, 32)), torch.randint(0, 70, (3, 32))
    targets[0, :5] = -1
    logits = model(ids)
    plain = F.cross_entropy(logits.view(-1, 70), targets.view(-1), ignore_index=-1, reduction="sum")
    plain.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss = model(ids, targets, chunk=7)
    (loss / 2).backward()
    assert abs(loss.item() / plain.item() - 1) < 1e-6
    for name, p in model.named_parameters():
        torch.testing.assert_close(2 * p.grad, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item(), msg=name)
    torch.testing.assert_close(model(ids, targets, reduction="none").sum(), plain)


def test_no_trained_token_gives_zero_and_no_nan():
    model = small_model()
    loss = M.accumulate_gradients(model, torch.zeros(2, 8, dtype=torch.long), torch.full((2, 8), -1), 1, CPU)
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


CPU = M.Env(0, 1, torch.device("cpu"), torch.float32, None)


def test_micro_batches_do_not_change_the_gradient():
    """Rows with few and rows with many trained tokens: the loss is a mean over tokens, not over micro-batches."""
    ids, targets = torch.randint(0, 70, (4, 16)), torch.randint(0, 70, (4, 16))
    targets[0, 1:] = -1
    targets[3] = -1
    grads = []
    for micro in (4, 2, 1):
        model = small_model()
        loss = M.accumulate_gradients(model, ids, targets, micro, CPU)
        grads.append([loss] + [p.grad for p in model.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weights_cast_once_a_step_give_the_same_gradients():
    ids = torch.randint(0, 70, (4, 16))
    model, other = small_model(), small_model()
    model.dtype = other.dtype = torch.bfloat16
    M.accumulate_gradients(model, ids, ids, 1, CPU)
    for row in ids.split(1):                                # each casts where it multiplies
        (other(row, row) / ids.numel()).backward()
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert p.grad.dtype == torch.float32 and torch.equal(p.grad, q.grad), name
    assert all(m.cast is None for m in model.modules() if isinstance(m, M.Linear))


def test_one_graph_and_one_more_after_the_switch():
    """Model and loss compile without a break; dropping RoPE costs one recompilation."""
    graphs = []
    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    model, ids = small_model(n_layer=1), torch.randint(0, 70, (2, 16))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=count)
    for use_rope, expected in ((True, 1), (True, 1), (False, 2), (False, 2)):
        model.use_rope = use_rope
        torch.testing.assert_close(compiled(ids, ids), model(ids, ids))
        assert len(graphs) == expected
    model.dtype = torch.bfloat16                            # whose weights are cast once a step
    for training in (False, True, False, True):
        with torch.set_grad_enabled(training):
            M.accumulate_gradients(compiled, ids, ids, 2, CPU) if training else compiled(ids, ids)
    assert len(graphs) == 4
    torch._dynamo.reset()


def test_bits_per_byte_by_hand():
    """Uniform logits over 70 ids: log2(70) bits a token, over the bytes of the tokens that count."""
    model = small_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    nbytes = torch.tensor([1] * 35 + [3] * 34 + [0])
    y = torch.tensor([[0, 40, 69, -1], [34, 35, 36, 69]])   # 1 + 3 bytes; 1 + 3 + 3 bytes; 5 tokens count
    got = M.bits_per_byte(model, [(torch.zeros_like(y), y)], nbytes, CPU)
    assert abs(got - 5 * math.log2(70) / 11) < 1e-5


# ---- muon.py -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(3, 64, 32), (3, 32, 64), (2, 48, 48)])
def test_polar_express_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    G = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e3])[:shape[0], None, None]
    S = torch.linalg.svdvals(muon.polar_express(G))
    assert S.min() > 0.5 and S.max() < 1.3
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert F.cosine_similarity(muon.polar_express(G).flatten(1), (U @ V).flatten(1)).min() > 0.98


def slow_muon(p, grad, buf, second, lr, momentum, beta2, wd):
    """One matrix, one step, in float64 and plain words."""
    p, grad, buf, second = p.double(), grad.double(), buf.double(), second.double().clone()
    buf = momentum * buf + (1 - momentum) * grad
    g = momentum * buf + (1 - momentum) * grad
    X = g / (torch.linalg.matrix_norm(g) * 1.01 + 1e-6)
    for a, b, c in [(8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                    (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
                    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]:
        G = X.T @ X
        X = a * X + b * X @ G + c * X @ G @ G
    rows, cols = p.shape
    norm = X.norm()
    for i in range(rows if rows >= cols else cols):
        line = X[i] if rows >= cols else X[:, i]            # a view
        second[i] = beta2 * second[i] + (1 - beta2) * line.square().mean()
        line /= second[i].sqrt()
    X = X * norm / X.norm()
    lr = lr * max(1, rows / cols) ** 0.5
    agree = (X * p) >= 0
    return p - lr * X - lr * wd * p * agree, buf, second


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_muon_equals_a_slow_reference_over_three_steps(shape):
    torch.manual_seed(1)
    ps = [torch.nn.Parameter(torch.randn(shape)) for _ in range(3)]
    optimizer = muon.MuonAdamW([dict(kind="muon", params=ps, lr=0.02, momentum=0.9, ns_steps=5, beta2=0.9, weight_decay=0.3)])
    slow = [(p.detach().clone(), torch.zeros(shape), torch.zeros(max(shape))) for p in ps]
    for _ in range(3):
        for p in ps:
            p.grad = torch.randn(shape)
        slow = [slow_muon(p, ps[i].grad, b, s, 0.02, 0.9, 0.9, 0.3) for i, (p, b, s) in enumerate(slow)]
        optimizer.step()
        for p, (expected, _, _) in zip(ps, slow):
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_adamw_equals_torch():
    torch.manual_seed(2)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 7)) for _ in range(2))
    a = muon.MuonAdamW([dict(kind="adamw", params=[ours], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)])
    b = torch.optim.AdamW([theirs], lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for _ in range(10):
        ours.grad = torch.randn(5, 7)
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_cautious_decay_only_where_update_and_weight_agree():
    p = torch.tensor([[1.0, -1.0, 2.0]])
    muon.cautious_step(p, torch.tensor([[1.0, 1.0, -1.0]]), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(p, torch.tensor([[1 - 0.1 - 0.05, -1 - 0.1, 2 + 0.1]]))


def test_optimizer_state_layout():
    """Groups and state as the nanochat repo stores them; a round trip through a file changes nothing."""
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig.from_depth(2, vocab_size=128, sequence_len=16))
    model.init_weights()
    optimizer = muon.build_optimizer(model)
    ids = torch.randint(0, 128, (2, 16))
    model(ids, ids).backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert [(g["kind"], len(g["params"])) for g in state["param_groups"]] == [("adamw", 1), ("adamw", 1), ("muon", 8), ("muon", 2), ("muon", 4)]
    shapes = [tuple(optimizer.param_groups[i]["params"][0].shape) for i in range(5)]
    assert shapes == [(128, 128), (128, 128), (128, 128), (128, 384), (384, 128)]
    assert {"kind", "lr", "initial_lr", "betas", "eps", "weight_decay"} <= set(state["param_groups"][0])
    assert {"kind", "lr", "initial_lr", "momentum", "ns_steps", "beta2", "weight_decay"} <= set(state["param_groups"][2])
    assert optimizer.param_groups[0]["params"][0] is model.lm_head.weight
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    muons = {k: {n: tuple(v.shape) for n, v in s.items()} for k, s in state["state"].items() if "momentum_buffer" in s}
    assert muons == {2: {"momentum_buffer": (8, 128, 128), "second_momentum_buffer": (8, 128, 1)},
                     10: {"momentum_buffer": (2, 128, 384), "second_momentum_buffer": (2, 1, 384)},
                     12: {"momentum_buffer": (4, 384, 128), "second_momentum_buffer": (4, 384, 1)}}


def test_matrices_in_one_batch_equal_one_at_a_time():
    torch.manual_seed(0)
    G = torch.randn(6, 24, 40)
    torch.testing.assert_close(muon.polar_express(G), torch.cat([muon.polar_express(g[None]) for g in G]), rtol=1e-4, atol=1e-5)


def test_muon_update_is_one_graph_for_each_shape(monkeypatch):
    """Compiled, the update has no graph break, is not compiled anew when the schedules move, and gives what it gives uncompiled."""
    graphs, compile = [], torch.compile
    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=count, **options))
    torch._dynamo.reset()
    optimizers = []
    for compiled in (False, True):
        torch.manual_seed(0)
        groups = [[torch.nn.Parameter(torch.randn(shape)) for _ in range(3)] for shape in ((24, 40), (40, 24))]
        optimizers.append(muon.MuonAdamW([dict(kind="muon", params=ps, lr=0.02, momentum=0.9, ns_steps=5, beta2=0.9, weight_decay=0.3)
                                          for ps in groups], compile=compiled))
    for step in range(3):
        for optimizer in optimizers:
            torch.manual_seed(step)
            for group in optimizer.param_groups:
                group.update(lr=0.02 - 0.001 * step, momentum=0.9 + 0.01 * step, weight_decay=0.3 / (step + 1))
                for p in group["params"]:
                    p.grad = torch.randn_like(p)
            optimizer.step()
        for a, b in zip(*(sum((g["params"] for g in o.param_groups), []) for o in optimizers)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert len(graphs) == 2
    copied = copy.deepcopy(optimizers[1])                   # steps, uncompiled
    for p in sum((g["params"] for g in copied.param_groups), []):
        p.grad = torch.ones_like(p)
    copied.step()
    torch._dynamo.reset()


def test_a_small_model_learns():
    """Sequences of period 3: from the fourth token on attention can tell the next, and the loss falls."""
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(32, 64, 2, 2, 2, 64))
    model.init_weights()
    optimizer = muon.build_optimizer(model)
    random = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(200):
        ids = torch.randint(0, 64, (32, 3), generator=random).repeat(1, 5)
        targets = ids[:, 1:].clone()
        targets[:, :2] = -1                                 # only what can be known
        losses.append(M.accumulate_gradients(model, ids[:, :-1], targets, 32, CPU).item())
        optimizer.step(), optimizer.zero_grad()
    assert losses[0] > 4.1 and losses[-1] < 1, losses[::20]


def test_schedules_at_their_corners():
    S = 2784
    start = S - round(0.65 * S)
    assert [muon.lr_factor(i, S) for i in (0, 19, 39, 40, start)] == [1 / 40, 0.5, 1.0, 1.0, 1.0]
    assert muon.lr_factor(S, S) == pytest.approx(0.05)
    assert muon.lr_factor((start + S) // 2, S) == pytest.approx(0.525, abs=1e-3)
    assert muon.muon_momentum(0, S) == 0.85 and muon.muon_momentum(200, S) == pytest.approx(0.91)
    assert muon.muon_momentum(400, S) == 0.97 == muon.muon_momentum(start, S) and muon.muon_momentum(S, S) == pytest.approx(0.90)
    assert muon.muon_momentum(300, 500) == pytest.approx(0.94)      # the ramp wins over the warm-down
    assert muon.muon_weight_decay(0, S, 0.3) == 0.3 and muon.muon_weight_decay(S // 2, S, 0.3) == pytest.approx(0.15)
    assert muon.muon_weight_decay(S, S, 0.3) == pytest.approx(0)


# ---- pretrain.py: what follows from the depth ---------------------------------------------------------------------------

def test_steps_tokens_and_switch():
    for depth, tpp, steps, tokens in ((18, 9, 2784, 2.92e9), (18, 20, 6187, 6.49e9), (20, 9, 3763, 3.95e9), (20, 20, 8362, 8.77e9), (20, 40, 16725, 17.54e9)):
        cfg = pretrain.Config(depth=depth, tpp=tpp, drope=50)
        _, derived = pretrain.derive(cfg, 32768)
        assert cfg.total_batch_size == 2 ** 20 and derived["steps"] == steps
        assert abs(derived["tokens"] / tokens - 1) < 2e-3
        assert derived["switch"] == round(steps / 2)        # half to even
    assert pretrain.derive(pretrain.Config(drope=None), 32768)[1]["switch"] is None
    assert pretrain.derive(pretrain.Config(drope=0), 32768)[1]["switch"] == 0


def test_learning_rates_and_weight_decay():
    _, derived = pretrain.derive(pretrain.Config(depth=12, total_batch_size=2 ** 19), 32768)
    assert derived["lrs"] == dict(embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02) and derived["weight_decay"] == 0.28
    config, derived = pretrain.derive(pretrain.Config(depth=18), 32768)
    assert derived["lrs"]["matrix_lr"] == pytest.approx(0.02 * 2 ** 0.5)
    assert derived["weight_decay"] == pytest.approx(0.28 * 2 ** 0.5 * 110_100_480 / 324_403_200)
    with torch.device("meta"):
        groups = muon.build_optimizer(M.GPT(config), **derived["lrs"], weight_decay=derived["weight_decay"]).param_groups
    width = (1152 / 768) ** -0.5
    assert [g["lr"] for g in groups[:2]] == pytest.approx([0.008 * 2 ** 0.5 * width, 0.3 * 2 ** 0.5 * width])
    assert [g["weight_decay"] for g in groups[:2]] == [0.01, 0.001] and groups[1]["betas"] == (0.8, 0.995)


# ---- pretrain.py: packing -------------------------------------------------------------------------------------------------

def naive_rows(documents, T, buffer=1000, chunk=128):
    """Best-fit packing in its plainest words: a list of documents in, rows out."""
    documents, rows, waiting = list(documents), [], []
    while True:
        row = []
        while len(row) < T:
            while len(waiting) < buffer and documents:
                for doc in documents[:chunk]:
                    waiting += [doc[:1] + doc[1:][i:i + T - 1] for i in range(0, max(1, len(doc) - 1), T - 1)]
                documents = documents[chunk:]
            if not waiting:
                return rows
            fitting = [d for d in waiting if len(d) <= T - len(row)]
            size = max(map(len, fitting)) if fitting else min(map(len, waiting))
            doc = next(d for d in waiting if len(d) == size)
            waiting.remove(doc)                             # equal documents are equally early
            row += doc[:T - len(row)]
        rows.append(row)


def test_packing_equals_naive_best_fit(tmp_path):
    enc = write_tokenizer(tmp_path / "tok", [b" t", b"he"])
    texts = some_texts(1800, longest=300) + ["", "x", "long " * 400]
    shard = write_shard(tmp_path / "shard_00000.parquet", texts[:1400] + [None] + texts[1401:], 512)
    bos = enc.encode_single_token("<|bos|>")
    documents = [[bos] + enc.encode_ordinary(t or "") for t in texts[:1400] + [None] + texts[1401:]]
    grouped = [d for g in range(0, len(documents), 512) for d in documents[g:g + 512]]     # 128 divides the row group here
    stream = pretrain.PackedRows([shard], enc, 200)
    got = []
    while (row := stream.next_row()) is not None:
        got.append(row.tolist())
    assert got == naive_rows(grouped, 200) and len(got) > 500
    assert all(r[0] == bos and len(r) == 200 for r in got)
    assert stream.cut + sum(map(len, got)) <= stream.tokens < stream.cut + sum(map(len, got)) + 200    # the last, unfilled row
    assert 0 < stream.cut / stream.tokens < 0.05


def test_no_document_twice_and_none_lost(tmp_path):
    """Each document is marked: no mark comes twice in an epoch, and every document's <|bos|> is in a row (its end may be cut off)."""
    enc = write_tokenizer(tmp_path / "tok")
    shards = [write_shard(tmp_path / f"shard_{s:05d}.parquet", [f"\x01{s}.{i}\x02" + "a" * (i * 7 % 90) for i in range(500)], 100) for s in range(3)]
    stream, text = pretrain.PackedRows(shards, enc, 150), ""
    while (row := stream.next_row()) is not None:
        text += enc.decode(row.tolist()) + "\n"
    marks = re.findall("\x01([0-9.]+)\x02", text)
    assert len(marks) == len(set(marks)) > 1400
    assert 1500 - text.count("<|bos|>") < 150 / 6           # those of the last row, which was not filled


@pytest.mark.parametrize("stop_after", [0, 3, 40])
def test_packing_goes_on_from_its_state(tmp_path, stop_after):
    enc = write_tokenizer(tmp_path / "tok")
    shards = [write_shard(tmp_path / f"shard_{s:05d}.parquet", some_texts(700, s, 200), 300) for s in range(2)]
    whole = pretrain.PackedRows(shards, enc, 300, epochs=2)
    for _ in range(stop_after):
        whole.next_row()
    again = pretrain.PackedRows(shards, enc, 300, epochs=2, state=whole.state())
    count = 0
    while (row := whole.next_row()) is not None:
        assert (row == again.next_row()).all()
        count += 1
    assert again.next_row() is None and count > 200 and whole.state()["counts"] == again.state()["counts"]


# ---- pretrain.py: runs as a user makes them ---------------------------------------------------------------------------------

TINY = ("--depth", 1, "--dataset", "local", "--max-seq-len", 64, "--total-batch-size", 1024, "--eval-tokens", 2048, "--eval-sample", 1024,
        "--eval-every", 8, "--save-every", 5, "--matrix-lr", 0.2, "--embedding-lr", 3)      # a step is 1,024 tokens; 253,952 scaling parameters
STEPS_20 = 20.5 * 1024 / 253_952


def records(folder):
    """metrics.jsonl without its timings."""
    lines = [json.loads(l) for l in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in l.items() if k not in ("seconds", "waited")} for l in lines]


def final(folder):
    step = max(M.checkpoint_steps(folder))
    return step, M.load_part(folder, step, "model"), M.load_part(folder, step, "optim"), M.read_meta(folder, step)


def assert_same_run(a, b):
    """Two folders hold the same final tensors, optimizer state, data position and metrics, bit for bit."""
    (step_a, model_a, optim_a, meta_a), (step_b, model_b, optim_b, meta_b) = final(a), final(b)
    assert step_a == step_b and all(torch.equal(model_a[k], model_b[k]) for k in model_a)
    for i, state in optim_a["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optim_b["state"][i][key])), (i, key)
    assert optim_a["param_groups"] == optim_b["param_groups"]
    loaders = [M.load_part(f, step_a, "loader") for f in (a, b)]
    for key in loaders[0]:
        x, y = loaders[0][key], loaders[1][key]
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y, key
    assert meta_a["val_bpb"] == meta_b["val_bpb"]
    for key in ("use_rope", "min_val_bpb", "smooth_train_loss"):
        assert meta_a["loop_state"][key] == meta_b["loop_state"][key]
    assert records(a) == records(b)


@pytest.fixture(scope="session")
def drope_run(tiny_base):
    """An undisturbed run of 20 steps with the switch at 10, and the trunk it could have branched from."""
    for extra in (("--tag", "drope", "--drope", 50), ("--tag", "trunk", "--keep", "25,50,75")):
        result = script("pretrain.py", *TINY, "--tpp", STEPS_20, *extra, base=tiny_base)
        assert result.returncode == 0, result.stderr
    return tiny_base / "base_checkpoints"


def test_a_run_with_drope(drope_run):
    step, weights, _, meta = final(drope_run / "drope")
    assert step == 20 == meta["step"] and meta["switch"] == 10
    assert meta["loop_state"]["use_rope"] is False and final(drope_run / "trunk")[3]["loop_state"]["use_rope"] is True
    assert set(meta["model_config"]) == {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}
    assert {"step", "val_bpb", "user_config", "device_batch_size", "max_seq_len", "total_batch_size", "dataloader_state_dict", "loop_state"} <= set(meta)
    assert {"use_rope", "min_val_bpb", "smooth_train_loss", "total_training_time"} <= set(meta["loop_state"])
    log = records(drope_run / "drope")
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 21)) and steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [r["use_rope"] for r in steps] == [True] * 10 + [False] * 10
    switch = next(r for r in log if "switch" in r)
    assert switch["step"] == 10 and switch["val_bpb_with_rope"] != switch["val_bpb_without_rope"]


def test_runs_are_identical_up_to_the_switch(drope_run):
    a, b = ([r for r in records(drope_run / t) if "loss" in r] for t in ("drope", "trunk"))
    assert a[:10] == b[:10] and a[10]["loss"] != b[10]["loss"]


def test_a_branch_equals_the_run_from_scratch(drope_run, tiny_base):
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, "--tag", "branch", "--drope", 50, "--trunk", "trunk", base=tiny_base)
    assert result.returncode == 0 and "going on from step 10" in result.stdout, result.stderr
    assert_same_run(drope_run / "drope", drope_run / "branch")


def test_a_finished_run_is_skipped(drope_run, tiny_base):
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, "--tag", "drope", "--drope", 50, base=tiny_base)
    assert result.returncode == 0 and "skipped" in result.stdout


# ---- Interrupted runs end in the same tensors -------------------------------------------------------------------------------

def start(name, *args, base):
    """A script in the background; its output can be read line by line."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, str(HERE / name), *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=env, cwd=HERE)


def kill_at_random(args, base, folder, kills, seed=0):
    """Runs a script again and again and kills it: in the middle of three saves, at the switch, otherwise somewhere in the first
    to twelfth step. Then lets it come to its end."""
    random, inside_saves, at_switch = np.random.default_rng(seed), min(3, kills // 3), False
    for n in range(kills):
        process, steps = start(*args, base=base), int(random.integers(1, 13))
        for line in process.stdout:
            steps -= line.startswith("step 0")
            if "RoPE is dropped" in line and not at_switch:
                at_switch = True
                break
            if steps == 0:
                until = time.time() + (5 if n < inside_saves else random.uniform(0, 0.1))
                while time.time() < until and not (n < inside_saves and list(folder.glob(".*.tmp"))):   # a file that is being written
                    pass
                break
        else:
            raise AssertionError(f"finished after {n} of {kills} kills (exit {process.wait()}): make it longer")
        process.kill()
        process.wait()
    assert at_switch, "the kills ended before the switch: make it earlier"
    result = script(*args, base=base)
    assert result.returncode == 0, result.stderr


def test_a_run_killed_at_20_moments_ends_in_the_same_tensors(tiny_base):
    """KILLS=100 python test_all.py -k killed is the long form."""
    kills = int(os.environ.get("KILLS", 20))
    tpp = (8 * kills + 40.5) * 1024 / 253_952
    args = ("pretrain.py", *TINY, "--tpp", tpp, "--drope", 20, "--epochs", 99, "--eval-every", 30)
    assert script(*args, "--tag", "calm", base=tiny_base).returncode == 0
    kill_at_random((*args, "--tag", "killed"), tiny_base, tiny_base / "base_checkpoints" / "killed", kills)
    assert_same_run(tiny_base / "base_checkpoints" / "calm", tiny_base / "base_checkpoints" / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(drope_run, tiny_base, number):
    tag = f"stopped_by_{number.name}"
    args = ("pretrain.py", *TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", tag, "--save-every", 999)
    process = start(*args, base=tiny_base)
    for line in process.stdout:
        if line.startswith("step 00007"):
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait() == M.INTERRUPTED and f"stopped by {number.name}" in rest and "Checkpoint saved" in rest
    assert 7 <= max(M.checkpoint_steps(drope_run / tag)) < 20
    assert script(*args, base=tiny_base).returncode == 0
    assert_same_run(drope_run / "drope", drope_run / tag)


@pytest.mark.parametrize("damage", ["model", "optim", "loader", "meta"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(drope_run, tiny_base, damage):
    import shutil
    folder = drope_run / f"damaged_{damage}"
    shutil.copytree(drope_run / "drope", folder)
    path = M.checkpoint_files(folder, 20)[damage]
    if damage == "meta":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", folder.name, base=tiny_base)
    assert result.returncode == 0 and "passing over" in result.stderr and "000020" in result.stderr, result.stderr
    assert "going on from step 15" in result.stdout
    assert_same_run(drope_run / "drope", folder)


# ---- Any number of processes ------------------------------------------------------------------------------------------------

def torchrun(n, *args, base):
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), str(HERE / args[0]),
                           *map(str, args[1:])], capture_output=True, text=True, timeout=600, env=env, cwd=HERE)


def losses(folder):
    return [r["loss"] for r in records(folder) if "loss" in r]


def test_1_2_and_4_processes_see_the_same_losses(tiny_base):
    args = ("pretrain.py", *TINY, "--tpp", 50.5 * 1024 / 253_952, "--drope", 50, "--save-every", 999)
    assert script(*args, "--tag", "one", base=tiny_base).returncode == 0
    expected = losses(tiny_base / "base_checkpoints" / "one")
    for n in (2, 4):
        result = torchrun(n, *args, "--tag", f"processes_{n}", base=tiny_base)
        assert result.returncode == 0, result.stderr[-2000:]
        assert losses(tiny_base / "base_checkpoints" / f"processes_{n}") == pytest.approx(expected, rel=1e-4)
    assert script(*args, "--tag", "micro", "--device-batch-size", 4, base=tiny_base).returncode == 0
    assert losses(tiny_base / "base_checkpoints" / "micro") == pytest.approx(expected, rel=1e-4)


def test_a_run_moves_from_one_process_to_two_and_back(drope_run, tiny_base):
    """Stopped after 6 and 12 steps; the optimizer state is one file that any number of processes can load."""
    import shutil
    args = ("pretrain.py", *TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", "moved", "--save-every", 6)
    folder = drope_run / "moved"

    def keep_only(step):
        for other in M.checkpoint_steps(folder):
            for path in M.checkpoint_files(folder, other).values() if other != step else ():
                path.unlink()

    assert script(*args, "--keep", "30,60", base=tiny_base).returncode == 0
    keep_only(6)
    result = torchrun(2, *args, "--keep", "30,60", base=tiny_base)
    assert result.returncode == 0 and "going on from step 6" in result.stdout, result.stderr[-2000:]
    keep_only(12)
    result = script(*args, base=tiny_base)
    assert result.returncode == 0 and "going on from step 12" in result.stdout
    assert losses(folder) == pytest.approx(losses(drope_run / "drope"), rel=1e-4)


# ---- The whole way of a model, and the driver ---------------------------------------------------------------------------------------

def test_use_rope_travels_from_checkpoint_to_fine_tuning_and_exports(drope_run, tiny_base, tmp_path):
    """Pretrain, resume, fine-tune, fine-tune at twice the length, export: RoPE stays off in a drope tag and on in one without."""
    conversations = [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"A number, {i}."}] for i in range(60)]
    for name in ("c.jsonl", "c_val.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(c) + "\n" for c in conversations))
    (tmp_path / "words.txt").write_text("apple\npear\nplum\n")
    for tag, length in (("drope", 64), ("drope_long", 128), ("trunk", 64)):
        result = script("sft.py", "--tag", tag, "--conversations", tmp_path / "c.jsonl", "--words", tmp_path / "words.txt", "--spelling-rows", 20, "--bee-rows", 10,
                        "--max-seq-len", length, "--total-batch-size", 1024, "--eval-tokens", 1024, "--init-lr-frac", 0.1, base=tiny_base)
        assert result.returncode == 0, result.stderr
        result = script("export_hf.py", "--tag", tag, base=tiny_base)
        assert result.returncode == 0, result.stderr
        expected = tag == "trunk"
        sft = final(tiny_base / "chatsft_checkpoints" / tag)[3]
        assert sft["loop_state"]["use_rope"] is expected and sft["max_seq_len"] == length
        for stage in ("hf_base", "hf_sft"):
            folder = tiny_base / stage / (tag if stage == "hf_sft" else tag.removesuffix("_long"))
            assert json.loads((folder / "config.json").read_text())["use_rope"] is expected
    from transformers import AutoModelForCausalLM
    step, weights, _, meta = final(tiny_base / "chatsft_checkpoints" / "drope_long")
    ours = M.GPT(M.GPTConfig(**meta["model_config"]), meta["loop_state"]["use_rope"])
    ours.load_state_dict({k: v.bfloat16().float() for k, v in weights.items()})
    theirs = AutoModelForCausalLM.from_pretrained(tiny_base / "hf_sft" / "drope_long", trust_remote_code=True, dtype=torch.float32)
    ids = torch.randint(0, meta["model_config"]["vocab_size"], (2, 90))
    assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    ours.use_rope = True
    assert (theirs(ids).logits - ours(ids)).abs().max() > 1e-3      # the comparison would notice


def driver(*args, **env):
    return subprocess.run(["bash", str(HERE / "run_all.sh"), *map(str, args)], capture_output=True, text=True, timeout=300, cwd=HERE, env={**os.environ, **env})


needs_venv = pytest.mark.skipif(not (HERE / ".venv" / "installed").exists(), reason="the driver would install packages")


@needs_venv
def test_the_plan_of_the_release(tmp_path):
    out = driver("release", "--dry-run").stdout
    rows = [l.split() for l in out.splitlines() if l.startswith("d")]
    tags = [r[0] for r in rows if "_" in r[0]]
    assert len(tags) == len(set(tags)) == 20 and sum(t.endswith("_long") for t in tags) == 6
    tokens = {r[0]: r[2] for r in rows if "_" in r[0]}
    assert [tokens[t] for t in ("d18_9tpp", "d18_20tpp", "d20_9tpp", "d20_20tpp", "d20_40tpp")] == ["2.92B", "6.49B", "3.95B", "8.77B", "17.54B"]
    assert "14 pretraining runs" in out and "93.0B tokens" in out and "66.4B tokens" in out
    one = driver("d18", 20, 50, "long", "--dry-run", 406000).stdout
    assert "d18_20tpp_drope_50_long" in one and "trained from nothing" in one and "6.5B tokens, 4 hours" in one


@needs_venv
@pytest.mark.parametrize("args, words", [(("foo",), "unknown tag 'foo'"), (("d18", 9, 150), "drope 150"), (("d0", 9), "unknown tag"), (("chat", "d18_9tpp"), "run_all.sh d18_9tpp")])
def test_the_driver_refuses(tmp_path, args, words):
    one_line(driver(*args, NANOCHAT_BASE_DIR=str(tmp_path)), words)


# ---- Speed: what can be shown on a CPU ------------------------------------------------------------------------------------------

PEAK = """
import resource, torch, torch.nn.functional as F, model as M
model = M.GPT(M.GPTConfig(4096, 32768, 1, 1, 1, 64))
model.init_weights()
ids = torch.randint(0, 32768, (1, 4096))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss = {loss}
loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_loss_takes_less_than_half_the_memory_of_the_plain_one():
    """Forward, loss and backward at 32,768 ids; 8 chunks here, 16 in a step of 16 x 4,096 tokens."""
    peak = {}
    for name, loss in (("plain", "F.cross_entropy(model(ids)[0], ids[0])"), ("chunked", "model(ids, ids, chunk=512)")):
        result = subprocess.run([sys.executable, "-c", PEAK.format(loss=loss)], capture_output=True, text=True, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        peak[name] = int(result.stdout)
    assert peak["chunked"] < 0.5 * peak["plain"], peak


def test_float8_arithmetic():
    """Scales, saturation and formats: e4m3 up to 448 forward, e5m2 up to 57,344 for gradients."""
    x8, scale = M.to_float8(torch.tensor([[-3.0, 0.5, 0.001, 0.0]]), torch.float8_e4m3fn)
    assert x8.dtype == torch.float8_e4m3fn and x8.float().abs().max() == 448 and scale.item() == pytest.approx(3 / 448)
    assert (x8.float() * scale)[0, 1].item() == pytest.approx(0.5, rel=2 ** -4)
    assert M.to_float8(torch.zeros(3), torch.float8_e5m2)[0].float().tolist() == [0, 0, 0]
    assert M.to_float8(torch.tensor([1e30, 1.0]), torch.float8_e5m2)[0].float().tolist() == [57344, 0]

    torch.manual_seed(0)
    x, w, g = torch.randn(48, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True), torch.randn(48, 64)
    q = lambda t, dtype: (lambda v, s: v.double() * s.double())(*M.to_float8(t.detach(), dtype))
    y = M.Float8Matmul.apply(x, w)
    gx, gw = torch.autograd.grad(y, (x, w), g)
    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    for got, expected in ((y, q(x, e4) @ q(w, e4).T), (gx, q(g, e5) @ q(w, e4)), (gw, q(g, e5).T @ q(x, e4))):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert 0.01 < (y - x @ w.T).norm() / (x @ w.T).norm() < 0.06


def test_float8_trains_and_evaluates_in_full_precision():
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(32, 64, 2, 2, 2, 64))
    model.init_weights()
    ids = torch.randint(0, 64, (4, 3)).repeat(1, 5)
    with torch.no_grad():
        before = model(ids)
    for module in model.modules():
        if isinstance(module, M.Linear) and module is not model.lm_head:
            module.fp8 = True
    with torch.no_grad():
        assert torch.equal(model(ids), before)
    optimizer, losses = muon.build_optimizer(model), []
    for _ in range(30):
        losses.append(M.accumulate_gradients(model, ids[:, :-1], ids[:, 1:].contiguous(), 4, CPU).item())
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_float8_is_refused_where_there_is_none(tiny_base, refused):
    if not torch.cuda.is_available():
        refused(pretrain, [*TINY, "--tpp", STEPS_20, "--tag", "fp8", "--fp8"], ["--fp8", "H100"], tiny_base)


def test_bench_prints_one_json_line_and_needs_no_files(tmp_path):
    result = script("pretrain.py", "--bench", "--depth", 1, "--vocab-size", 320, "--max-seq-len", 64, "--total-batch-size", 256, "--compile", 0, base=tmp_path)
    record = json.loads(result.stdout)
    assert record["tokens_per_second"] > 0 and record["of_plain_step"] > 0 and record["matmul_tflops"] > 0 and record["rows"] == 4
    assert record["share_forward_backward"] + record["share_optimizer"] + record["share_data"] == pytest.approx(1, abs=1e-3)
    assert not list(tmp_path.iterdir())


def test_memory_formula():
    """16 rows of d18 fit on an 80 GB device, 32 do not."""
    for depth, expected in ((18, (34, 61, 117)), (20, (42, 76, 143))):
        config = M.GPTConfig.from_depth(depth)
        assert [round(pretrain.step_memory(config, rows, 4096) / 1e9) for rows in (8, 16, 32)] == list(expected)
    assert round(pretrain.step_memory(M.GPTConfig.from_depth(20), 16, 4096, fp8=True) / 1e9) == 60


def test_a_compiled_layer_keeps_for_backward_what_the_memory_formula_says():
    """19 n_embd bfloat16 numbers of each token, counted in the graph that torch.compile's partitioner makes."""
    from functools import partial
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from functorch.compile import make_boxed_func
    def kept(n_layer, rows):
        sizes = []
        def forward(graph, inputs):
            results = [n.meta["val"] for n in list(graph.graph.nodes)[-1].args[0] if isinstance(n, torch.fx.Node) and n.op == "call_function"]
            sizes.extend(r.nbytes for r in results if isinstance(r, torch.Tensor))
            return make_boxed_func(graph.forward)
        torch._dynamo.reset()
        model, ids = M.GPT(M.GPTConfig(256, 512, n_layer, 2, 2, 256), dtype=torch.bfloat16), torch.randint(0, 512, (rows, 256))
        torch.compile(model, fullgraph=True, dynamic=False, backend=aot_autograd(
            fw_compiler=forward, bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
            partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor")))(ids, ids)
        return sum(sizes)
    a_layer = [(kept(3, rows) - kept(1, rows)) / 2 for rows in (8, 16)]     # their difference leaves out the weights that are kept
    torch._dynamo.reset()
    assert a_layer[1] - a_layer[0] == pytest.approx(19 * 256 * 2 * 8 * 256, rel=0.03)


# ---- Downloads: a small stand-in for the hub ----------------------------------------------------------------------------------

@pytest.fixture
def hub(tiny_base, tmp_path, monkeypatch):
    """Serves tiny_base's shards as the hub does. hub.faults: a list of what happens to the next answers with file content:
    a status, "cut" (half the body), "short" (10 bytes less, said so), "corrupt" (a flipped byte). hub.log: the paths asked for;
    hub.bodies: the files whose content was."""
    import hashlib, threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    folder, sha = tiny_base / "data" / "climbmix", "c0ffee" * 6 + "c0ff"
    files = {p.name: p.read_bytes() for p in folder.glob("*.parquet")}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *args): pass
        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for key, value in {"Content_Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body if self.command != "HEAD" else b"")
        def do_GET(self):
            server.log.append(self.path)
            name = self.path.split("/")[-1].split("?")[0]
            if "/api/datasets/" in self.path:
                siblings = [{"rfilename": n, "size": len(b), "blobId": "0" * 40, "lfs": {"sha256": hashlib.sha256(b).hexdigest(), "size": len(b), "pointerSize": 1}}
                            for n, b in files.items()]
                return self.answer(200, json.dumps({"_id": "1", "id": "x/y", "sha": sha, "private": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}).encode())
            if name not in files:
                return self.answer(404)
            body = files[name]
            headers = {"X_Repo_Commit": sha, "ETag": '"' + hashlib.sha256(body).hexdigest() + '"', "X_Linked_Size": len(body)}
            if self.command == "HEAD":
                headers["Content_Length"] = len(body)
                return self.answer(200, b"", **headers)
            fault = server.faults.pop(0) if server.faults else None
            server.bodies.append(name)
            if isinstance(fault, int):
                return self.answer(fault, b"", Retry_After=1)
            if fault == "short":
                return self.answer(200, body[:-10], **headers)
            if fault == "corrupt":
                return self.answer(200, body[:50] + bytes([body[50] ^ 1]) + body[51:], **headers)
            if fault == "cut":
                self.answer(200, body[:len(body) // 2], **headers, Content_Length=len(body))
                self.close_connection = True
                return
            self.answer(200, body, **headers)
        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults, server.log, server.bodies, server.files, server.revision = [], [], [], files, sha
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    yield server
    server.shutdown()
    server.server_close()


def test_shards_come_whole_past_every_fault(hub, tmp_path):
    hub.faults = [429, 503, "cut", "short", "corrupt"]
    result = script("pretrain.py", "--fetch", 2, "--patience", 60, base=tmp_path, env=hub.env)
    assert result.returncode == 0, result.stderr
    got = {p.name: p.read_bytes() for p in (tmp_path / "data" / "climbmix").glob("*.parquet")}
    assert got == {n: hub.files[n] for n in ("shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet")} and not hub.faults
    assert json.loads((tmp_path / "data" / "climbmix" / "index.json").read_text())["revision"] == hub.revision
    asked = len(hub.log)
    assert script("pretrain.py", "--fetch", 2, base=tmp_path, env=hub.env).returncode == 0 and len(hub.log) == asked     # nothing is asked twice


def test_two_jobs_that_want_the_same_shard_fetch_it_once(hub, tmp_path):
    env = {**os.environ, **hub.env, "NANOCHAT_BASE_DIR": str(tmp_path)}
    jobs = [subprocess.Popen([sys.executable, str(HERE / "pretrain.py"), "--fetch", "1"], env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    assert len(hub.bodies) == len(set(hub.bodies)) == 2     # one training shard, one for validation


def test_a_shard_that_never_comes_is_named(hub, tmp_path):
    hub.faults = ["corrupt"] * 99
    result = script("pretrain.py", "--fetch", 1, "--patience", 2, base=tmp_path, env=hub.env)
    assert result.returncode == 1 and "shard_00000.parquet" in result.stderr.splitlines()[-1] and "hash" in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "data" / "climbmix").glob("*.parquet"))


def test_training_fetches_ahead_and_a_hub_that_goes_away_costs_no_step(hub, tiny_base, tmp_path):
    """The hub serves the first shard and dies; the run trains on what is there, waits, saves, says why, and later goes on to the same end."""
    import shutil
    shutil.copytree(tiny_base / "tokenizer", tmp_path / "tokenizer")
    args = [a if a != "local" else "x/y" for a in TINY] + ["--tpp", 12 * STEPS_20, "--patience", 3, "--tag", "hub", "--save-every", 1000]
    hub.faults = [None, None] + [503] * 999                 # the first training shard and the validation shard come
    result = script("pretrain.py", *args, base=tmp_path, env=hub.env)
    assert result.returncode == 1 and "shard_00001.parquet" in result.stderr.splitlines()[-1] and "Traceback" not in result.stderr, result.stderr
    saved = max(M.checkpoint_steps(tmp_path / "base_checkpoints" / "hub"))
    assert 60 < saved < 246 and f"stopped at step {saved}" in result.stderr.splitlines()[-1]
    hub.faults = []
    result = script("pretrain.py", *args, base=tmp_path, env=hub.env)
    assert result.returncode == 0 and f"going on from step {saved}" in result.stdout
    assert final(tmp_path / "base_checkpoints" / "hub")[3]["revision"] == hub.revision
    assert script("pretrain.py", *TINY, "--tpp", 12 * STEPS_20, "--tag", "calm_hub", base=tiny_base).returncode == 0
    assert_same_run(tmp_path / "base_checkpoints" / "hub", tiny_base / "base_checkpoints" / "calm_hub")


# ---- Bad input: one clear line, non-zero exit, nothing lost ---------------------------------------------------------------------

@pytest.mark.parametrize("args, words", [
    (("--drope", 150), ["--drope 150", "0 to 99"]), (("--drope", -1), ["--drope -1"]), (("--depth", 0), ["--depth 0"]),
    (("--tpp", "many"), ["--tpp", "--help"]), (("--tag", "../x"), ["--tag", "folder name"]), (("--trunk", "x"), ["--drope"]),
    (("--total-batch-size", 1000), ["1000", "max_seq_len", "take"]), (("--total-batch-size", 0), ["--total-batch-size 0"]),
    (("--tpp", 0.001), ["less than one batch"]), (("--device-batch-size", 5), ["--device-batch-size 5", "16 rows"]),
    (("--tpp", 400), ["--epochs"]), (("--data-dir", "/nowhere"), ["/nowhere", "--fetch"]),
    (("--tokenizer-dir", "/nowhere"), ["/nowhere", "tok.py"]), (("--drope", 25, "--trunk", "none"), ["none", "--keep 25"]),
    (("--save-every", 0), ["--save-every 0"]), (("--keep", "abc"), ["--keep abc"])])
def test_pretrain_refuses(tiny_base, refused, args, words):
    refused(pretrain, [*TINY, "--tpp", STEPS_20, "--tag", "refused", *args], words, tiny_base)


def test_what_is_refused_ends_a_process_with_one_line(tiny_base):
    one_line(script("pretrain.py", *TINY, "--drope", 150, base=tiny_base), "--drope 150", "0 to 99")


def test_another_recipe_is_refused_and_the_field_named(drope_run, tiny_base, refused):
    files = [p for p in (drope_run / "drope").iterdir() if p.name != ".lock"]
    before = [p.read_bytes() for p in files]
    for args, field in ((("--drope", 25), "drope"), (("--matrix-lr", 0.1), "matrix_lr"), (("--tpp", 9), "tpp")):
        refused(pretrain, [*TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", "drope", "--epochs", 999, *args], [f"{field} =", "--tag"], tiny_base)
    assert before == [p.read_bytes() for p in files]


def test_a_checkpoint_of_another_tokenizer_is_refused(drope_run, tiny_base, tmp_path, refused):
    import shutil
    write_tokenizer(tmp_path / "tok", [b"xy", b"he", b" z", b"in"])
    shutil.copytree(drope_run / "drope", drope_run / "other_vocabulary")
    for path in M.checkpoint_files(drope_run / "other_vocabulary", 20).values():
        path.unlink()
    refused(pretrain, [*TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", "other_vocabulary", "--tokenizer-dir", tmp_path / "tok"],
            ["other_vocabulary", "tokenizer ="], tiny_base)


@pytest.mark.parametrize("content", [b"", b"PAR1 this is not parquet PAR1", "no rows", "no column", "cut"])
def test_a_damaged_shard_is_named(tiny_base, tmp_path, refused, content):
    import pyarrow as pa, pyarrow.parquet as pq
    data = tmp_path / "data"
    for name in ("shard_00000.parquet", "shard_06542.parquet"):
        write_shard(data / name, some_texts(300, 3))
    bad = data / "shard_00000.parquet"
    if content == "no rows":
        write_shard(bad, pa.array([], pa.string()))
    elif content == "no column":
        pq.write_table(pa.table({"words": ["a"]}), bad)
    else:
        bad.write_bytes(bad.read_bytes()[:-9] if content == "cut" else content)
    refused(pretrain, [*TINY, "--tpp", STEPS_20, "--tag", "bad_shard", "--data-dir", data], [str(bad), "damaged or empty"], tiny_base)


def test_a_folder_that_cannot_be_written(tiny_base, tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    refused(pretrain, [*TINY, "--tpp", STEPS_20, "--tokenizer-dir", tiny_base / "tokenizer", "--data-dir", tiny_base / "data" / "climbmix"],
            [str(tmp_path / "file"), "NANOCHAT_BASE_DIR"], tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "in the way"


def test_one_run_at_a_time_in_a_folder(tiny_base, refused):
    folder = tiny_base / "base_checkpoints" / "busy"
    guard = M.lock(folder)
    refused(pretrain, [*TINY, "--tpp", STEPS_20, "--tag", "busy"], ["in use by", f"pid {os.getpid()}"], tiny_base)
    guard.close()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_base):
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, "--tag", "diverged", "--matrix-lr", 1e30, base=tiny_base)
    one_line(result, "step", "--matrix-lr")
    assert not list((tiny_base / "base_checkpoints" / "diverged").glob("model_*"))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    M.atomic_write(tmp_path / "a" / "x.txt", "old")
    def fails(f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(SystemExit, match="No space left on device"):
        M.atomic_write(tmp_path / "a" / "x.txt", fails)
    assert (tmp_path / "a" / "x.txt").read_text() == "old" and len(list((tmp_path / "a").iterdir())) == 1


# ==== tok.py ================================================================================================

TOK_TEXTS = ["def add(a, b):\n    return a + b  # 12345\n", "<|bos|> is only text here", "the then other, aaaaaaa",
             "It's 7; they'll say \"naïve café\" – 東京 🎉🎉.\r\n\r\n", "", "  \n\t tabs\tand   spaces  \n\n\n"]


def tok_write_shard(path, texts, rows_per_group=4):
    """A shard in the layout of the pretraining data: one string column, zstd, small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows_per_group, compression="zstd")


def tok_documents(n, seed=0):
    """n documents of random words from a skewed vocabulary, some with odd white space, digits and other scripts."""
    r = random.Random(seed)
    words = ["".join(r.choices("etaoinshrdlu", k=r.randint(1, 8))) for _ in range(300)]
    words += ["naïve", "東京", "42", "n't", "🎉"]
    texts = [[words[int(r.paretovariate(0.6)) % len(words)] for _ in range(r.randint(5, 120))] for _ in range(n)]
    return [" ".join(text) + "\n" * r.randint(0, 3) for text in texts]


def tok_run(*args):
    """Run the command line."""
    command = [sys.executable, tok.__file__, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def tok_made(tmp_path_factory):
    """A tokenizer of 400 ids trained by the command line: (data folder, out folder, finished process)."""
    folder = tmp_path_factory.mktemp("tok")
    tok_write_shard(folder / "data/shard_00000.parquet", tok_documents(30, seed=1))
    tok_write_shard(folder / "data/shard_00001.parquet", tok_documents(30, seed=2))
    tok_write_shard(folder / "data/shard_06542.parquet", ["zqxjzqxj " * 500])
    done = tok_run("--data-dir", folder / "data", "--out-dir", folder / "out", "--vocab-size", 400, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return folder / "data", folder / "out", done

# ---- tok.py: the trainer ---------------------------------------------------------------------------------------------

def test_tok_merges_worked_by_hand():
    """
    low x 5, lower x 2, newest x 6. w e is there 2 + 6 = 8 times: we. Then l o 5 + 2 = 7: lo (o w lost 2 to we, has 5).
    e we, n e, we s, s t have 6 each, and e is the smallest left one: ewe. Likewise newe, st, newest. lo w has 5: low.
    lo we and we r have 2: we (id 256) is smaller than lo (257): wer. Then lower, and no pair is left.
    """
    tokens = tok.train({"low": 5, "lower": 2, "newest": 6}, 100)
    assert tokens[:256] == [bytes([i]) for i in range(256)]
    assert tokens[256:] == [b"we", b"lo", b"ewe", b"newe", b"st", b"newest", b"low", b"wer", b"lower"]


@pytest.mark.parametrize("run, merges", [(2, [b"aa"]), (3, [b"aa", b"aaa"]), (4, [b"aa", b"aaaa"]),
                                         (5, [b"aa", b"aaa", b"aaaaa"]), (7, [b"aa", b"aaaa", b"aaa", b"aaaaaaa"])])
def test_tok_a_run_of_one_letter_is_merged_from_the_left(run, merges):
    """5: aa aa a, then (aa, a) before (aa, aa), both once, a having the smaller id. 7: aa aa aa a, (aa, aa) twice."""
    assert tok.train({"a" * run: 1}, 10)[256:] == merges


def test_tok_overlapping_pairs_are_counted():
    """b b b has two pairs b b, so 2 x 3 = 6 beat x y with 5."""
    assert tok.train({"bbb": 3, "xy": 5}, 1)[256:] == [b"bb"]


def test_tok_stops_when_no_pair_is_left():
    """x y z is rarer than the first floors of the heap, and y z is gone once x y is merged."""
    assert tok.train({"ab": 80, "xyz": 1}, 4)[256:] == [b"ab", b"xy", b"xyz"]
    assert tok.train({}, 4)[256:] == tok.train({"a": 9, "b": 1}, 4)[256:] == []


def test_tok_equals_rustbpe_on_random_corpora():
    """300 corpora of few letters (ties, runs, overlaps), words, or any characters, with and without pairs left over."""
    rustbpe = pytest.importorskip("rustbpe")
    alphabets = ["a", "ab", "aab ", "abc", "abcd 1'\n", "etaoinshrdlu  \n", "aé東🎉 ", "'sS tT\r\n\t 12!?",
                 "the cat.\u00a0\u2003_-"]
    for seed in range(300):
        r = random.Random(seed)
        letters = r.choice(alphabets)
        documents = ["".join(r.choices(letters, k=r.randint(0, 60))) for _ in range(r.randint(1, 60))]
        documents += tok_documents(seed % 4, seed)
        n_merges = r.choice([1, 5, 30, 200])
        counts = {}
        for text in documents:
            for chunk in tok.split(text):
                counts[chunk] = counts.get(chunk, 0) + 1
        reference = rustbpe.Tokenizer()
        reference.train_from_iterator(iter(documents), 256 + n_merges, pattern=tok.PATTERN)
        expected = [bytes(token) for token, _ in reference.get_mergeable_ranks()]
        assert tok.train(counts, n_merges) == expected, f"seed {seed}"


def test_tok_split_is_the_one_tiktoken_makes():
    """With the 256 bytes as its only tokens and one more for each chunk, tiktoken shows where it splits."""
    for text in TOK_TEXTS + tok_documents(20, seed=3):
        chunks = tok.split(text)
        assert "".join(chunks) == text
        ranks = {bytes([i]): i for i in range(256)}
        for chunk in chunks:
            ranks.setdefault(chunk.encode(), len(ranks))
        encoding = tiktoken.Encoding("chunks", pat_str=tok.PATTERN, mergeable_ranks=ranks, special_tokens={})
        assert [encoding.decode_single_token_bytes(i).decode() for i in encoding.encode_ordinary(text)] == chunks

def test_tok_split_is_the_same_with_re_and_regex():
    """For every character up to U+FFFF, beside letters, digits, signs and white space, and for random mixtures."""
    full = regex.compile(tok.PATTERN)
    characters = [chr(i) for i in range(0x10000) if not 0xD800 <= i < 0xE000]
    for i in range(0, len(characters), 512):
        text = "".join(f"a{c}b '{c}{c}1{c}2 {c}x.{c}\n{c} \t{c}{c}\n" for c in characters[i:i + 512])
        assert tok.fast.findall(text) == full.findall(text), f"U+{i:04X}"
    for seed in range(300):
        r = random.Random(seed)
        text = "".join(r.choices(" \n\r\t\x1c\x85\u2003'sL\u017fé1².\u0301", k=300))
        assert tok.split(text) == tok.fast.findall(text) == full.findall(text)
        assert tok.split(text + "🎉" + text) == full.findall(text + "🎉" + text)

# ---- tok.py: the files -----------------------------------------------------------------------------------------------

def test_tok_files(tok_made):
    """Ranks 0, 1, 2, ... of distinct tokens, bytes first; the 9 special tokens have the last ids, in order."""
    data, out, done = tok_made
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "tokenizer.tiktoken"]
    lines = [line.split(b" ") for line in (out / "tokenizer.tiktoken").read_bytes().splitlines()]
    assert [int(rank) for _, rank in lines] == list(range(391))
    tokens = [base64.b64decode(token) for token, _ in lines]
    assert tokens[:256] == [bytes([i]) for i in range(256)] and len(set(tokens)) == 391
    assert load_tiktoken_bpe(str(out / "tokenizer.tiktoken")) == {token: i for i, token in enumerate(tokens)}
    config = json.loads((out / "config.json").read_text())
    assert config["pat_str"] == tok.PATTERN
    assert list(config["special_tokens"].items()) == list(zip(
        ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>",
         "<|python_end|>", "<|output_start|>", "<|output_end|>"], range(391, 400)))
    texts = tok_documents(30, seed=1) + tok_documents(30, seed=2)
    assert (config["chars"], config["docs"], config["shards"]) == (sum(map(len, texts)), 60, 2)


def test_tok_round_trip_in_tiktoken(tok_made):
    """What tiktoken makes of the files gives every text back; a special token's name in a text stays text."""
    _, out, _ = tok_made
    config = json.loads((out / "config.json").read_text())
    ranks = load_tiktoken_bpe(str(out / "tokenizer.tiktoken"))
    encoding = tiktoken.Encoding("made", pat_str=config["pat_str"], special_tokens=config["special_tokens"],
                                 mergeable_ranks=ranks, explicit_n_vocab=400)
    for text in TOK_TEXTS + tok_documents(10, seed=4):
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text and max(ids, default=0) < 391
    assert encoding.encode("<|bos|>", allowed_special="all") == [391]


def test_tok_the_validation_shard_is_not_used(tok_made):
    """It says zqxj 1,000 times, the training shards never do."""
    _, out, done = tok_made
    tokens = load_tiktoken_bpe(str(out / "tokenizer.tiktoken"))
    assert not [token for token in tokens if b"zq" in token or b"xj" in token]
    assert "fewer than the 2,000,000,000 characters" in done.stdout and "round trip through tiktoken ok" in done.stdout


def test_tok_same_bytes_with_two_workers(tok_made, tmp_path):
    data, out, _ = tok_made
    done = tok_run("--data-dir", data, "--out-dir", tmp_path, "--vocab-size", 400, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tokenizer.tiktoken").read_bytes() == (out / "tokenizer.tiktoken").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_tok_takes_documents_in_order_until_there_are_enough(tmp_path, workers):
    """Documents are cut at doc_cap; the one that reaches max_chars is the last; later shards are not even opened."""
    texts = [str(i) * 30 for i in range(10)]
    tok_write_shard(tmp_path / "shard_00000.parquet", texts[:5] + [None], rows_per_group=2)
    tok_write_shard(tmp_path / "shard_00001.parquet", texts[5:], rows_per_group=2)
    shards = sorted(tmp_path.glob("*.parquet")) + ([tmp_path / "missing.parquet"] if workers == 1 else [])
    counts, chars, docs, n_shards = tok.count_chunks(shards, 161, 20, workers)
    assert (chars, docs, n_shards) == (180, 10, 2)  # 9 texts of 20 characters and the missing one, in both shards
    assert counts == {str(i) * 2: 10 for i in range(9)}


def test_tok_finished_tokenizer_is_kept(tok_made):
    data, out, _ = tok_made
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()}
    again = tok_run("--data-dir", data, "--out-dir", out, "--vocab-size", 400)
    assert again.returncode == 0 and "tokenizer exists, skipped" in again.stdout
    other = tok_run("--data-dir", data, "--out-dir", out, "--vocab-size", 500)
    assert other.returncode == 1 and "has 400 ids, not 500" in other.stderr
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()} == before


def test_tok_unfinished_tokenizer_is_made_anew(tok_made, tmp_path):
    """Without config.json, the file that is written last, a tokenizer does not count as there."""
    data, out, _ = tok_made
    (tmp_path / "tokenizer.tiktoken").write_text("cut of")
    assert tok_run("--data-dir", data, "--out-dir", tmp_path, "--vocab-size", 400, "--workers", 1).returncode == 0
    assert (tmp_path / "tokenizer.tiktoken").read_bytes() == (out / "tokenizer.tiktoken").read_bytes()


def test_tok_defaults_lie_under_the_base_folder(tmp_path):
    """NANOCHAT_BASE_DIR/data/climbmix and NANOCHAT_BASE_DIR/tokenizer; tok.py needs no other file of the project."""
    tok_write_shard(tmp_path / "base/data/climbmix/shard_00000.parquet", tok_documents(5))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/tok.py").write_text(Path(tok.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"NANOCHAT_BASE_DIR": str(tmp_path / "base")}
    done = subprocess.run([sys.executable, "tok.py", "--vocab-size", "300", "--workers", "1"], cwd=tmp_path / "alone",
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "base/tokenizer/config.json").exists()


@pytest.mark.parametrize("moment", ["at once", "counted", "distinct chunks in", "kill -9"])
def test_tok_sigterm_leaves_all_or_nothing(tmp_path, moment):
    """Stopped while starting, counting or merging: no file, no part of one, no worker left that holds its stdout."""
    tok_write_shard(tmp_path / "data/shard_00000.parquet", tok_documents(2000) * 3, rows_per_group=50)
    command = [sys.executable, tok.__file__, "--data-dir", tmp_path / "data", "--out-dir", tmp_path / "out"]
    process = subprocess.Popen([*command, "--workers", "2", "--vocab-size", "1000"], stdout=subprocess.PIPE, text=True)
    line = "at once"
    while moment not in line and (moment != "kill -9" or "counted" not in line):
        line = process.stdout.readline()
    process.send_signal(signal.SIGKILL if moment == "kill -9" else signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())

# ---- tok.py: what a user can get wrong -------------------------------------------------------------------------------

def tok_damage(folder, kind):
    """Make a data folder of that kind and return the arguments that go with it."""
    data, out = folder / "data", folder / "out"
    shard = data / "shard_00001.parquet"
    if kind != "no data folder":
        tok_write_shard(data / "shard_00000.parquet", tok_documents(10))
    if kind == "no training shard":
        (data / "shard_00000.parquet").rename(data / "shard_06542.parquet")
    if kind == "shard of no bytes":
        shard.write_bytes(b"")
    if kind == "shard without documents":
        tok_write_shard(shard, [])
    if kind == "shard cut short":
        shard.write_bytes((data / "shard_00000.parquet").read_bytes()[:-100])
    if kind == "shard damaged inside":
        raw = (data / "shard_00000.parquet").read_bytes()
        shard.write_bytes(raw[:4] + bytes(200) + raw[204:])
    if kind == "shard without the column":
        pq.write_table(pa.table({"content": ["text"]}), shard)
    if kind == "out folder is a file":
        out.write_text("mine")
    return ["--data-dir", data, "--out-dir", out, "--vocab-size", 3000 if kind == "too little text" else
            100 if kind == "vocabulary too small" else 70_000 if kind == "vocabulary too large" else 300]


@pytest.mark.parametrize("kind, says", [
    ("no data folder", "pretrain.py --fetch 8"), ("no training shard", "pretrain.py --fetch 8"),
    ("shard of no bytes", "shard_00001.parquet"), ("shard without documents", "shard_00001.parquet"),
    ("shard cut short", "shard_00001.parquet"), ("shard damaged inside", "shard_00001.parquet"),
    ("shard without the column", "shard_00001.parquet"), ("out folder is a file", "--out-dir"),
    ("too little text", "--vocab-size"), ("vocabulary too small", "--vocab-size"),
    ("vocabulary too large", "--vocab-size")])
def test_tok_bad_input_gives_one_line(tmp_path, kind, says):
    """One line on stderr that names what is wrong, a non-zero exit, and no tokenizer."""
    done = tok_run(*tok_damage(tmp_path, kind), "--workers", 1)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
    assert not (tmp_path / "out").is_dir() or not list((tmp_path / "out").iterdir())
    assert kind != "out folder is a file" or (tmp_path / "out").read_text() == "mine"


def test_tok_a_worker_reports_a_damaged_shard_in_one_line(tmp_path):
    done = tok_run(*tok_damage(tmp_path, "shard damaged inside"), "--workers", 2)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1 and "shard_00001.parquet" in done.stderr, done.stderr


def test_tok_too_little_text_names_a_size_that_works(tmp_path):
    args = tok_damage(tmp_path, "too little text") + ["--workers", 1]
    size = int(regex.search(r"give --vocab-size (\d+)", tok_run(*args).stderr)[1])
    args[args.index("--vocab-size") + 1] = size + 1
    assert tok_run(*args).returncode != 0
    args[args.index("--vocab-size") + 1] = size
    assert tok_run(*args).returncode == 0


# ==== eval.py ===============================================================================================

EVAL_SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
                "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
EVAL_SIZES = ev.Sizes((0.5, 1, 2, 4), depths=5, prompts=2, few=1, documents=4, fit_documents=2, spans=2, questions=3, words=3, new_tokens=24)


def eval_base_dir(folder, monkeypatch):
    """A base folder with a byte tokenizer and a validation shard of 40 documents, 3 of them long."""
    import base64
    import pyarrow as pa, pyarrow.parquet as pq
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    tokens = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256))
    m.atomic_write(folder / "tokenizer" / "tokenizer.tiktoken", tokens)
    m.atomic_write(folder / "tokenizer" / "config.json", json.dumps({
        "pat_str": r"\p{N}{1,2}| ?\p{L}+|\s|[^\s\p{L}\p{N}]", "special_tokens": {name: 256 + i for i, name in enumerate(EVAL_SPECIAL)}}))
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(200)]
    texts = [" ".join(rng.choices(words, k=n)) + "." for n in [400, 390, 380, 370, 360, 350] + [60] * 34]
    rng.shuffle(texts)
    (folder / "data" / "climbmix").mkdir(parents=True)
    pq.write_table(pa.table({"text": texts}), folder / "data" / "climbmix" / "shard_06542.parquet")
    return m.load_tokenizer(folder / "tokenizer")


def eval_model(seed=0, use_rope=True):
    """A random model of training length 256 whose blocks do something (fresh ones begin as the identity)."""
    torch.manual_seed(seed)
    model = m.GPT(m.GPTConfig(256, 265, 2, 2, 2, 64), use_rope)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) * p.size(-1) ** -0.5)
    return model.eval()


def eval_checkpoint(folder, tag, seed=0, use_rope=True, stage="base_checkpoints", step=10, train_len=256):
    model = eval_model(seed, use_rope)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    m.save_checkpoint(folder / stage / tag, step, model, optimizer, {}, dict(
        step=step, val_bpb=None, model_config=asdict(model.config), user_config={}, max_seq_len=train_len, loop_state={"use_rope": use_rope}))
    return model


def eval_texts(folder, monkeypatch):
    enc = eval_base_dir(folder, monkeypatch)
    return ev.Texts(folder / "data" / "climbmix" / "shard_06542.parquet", enc, EVAL_SIZES)


class EvalCopier(torch.nn.Module):
    """Foresees the token that followed the longest earlier match of what it has just read, in the last `window` tokens."""

    def __init__(self, window=None):
        super().__init__()
        self.transformer = torch.nn.ModuleDict({"h": torch.nn.ModuleList([torch.nn.Identity()])})
        self.lm_head, self.window = torch.nn.Linear(1, 265), window

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, 265)
        for b, row in enumerate(ids.tolist()):
            for t in range(max(0, len(row) - 160), len(row)):       # the answers are near the end
                seen = row[max(0, t + 1 - self.window) if self.window else 0:t + 1]
                text, size = bytes(x % 256 for x in seen), 1
                place = -1
                while size < len(text) and (found := text.rfind(text[-size:], 0, len(text) - 1)) >= 0:
                    place, size = found + size, size + 1
                if place >= 0:
                    logits[b, t, seen[place]] = 14.0
        return self.transformer.h[-1](logits)


# ---- eval: statistics

def test_eval_wilson_equals_hand_worked_intervals():
    # 8 of 10, z = 1.96: centre (8 + 1.9208) / 13.8416 = 0.716738, half width 1.96 / 13.8416 x sqrt(1.6 + 0.9604) = 0.226581
    assert ev.wilson(8, 10) == pytest.approx([0.8, 0.490157, 0.943319], abs=2e-6)
    assert ev.wilson(0, 10) == pytest.approx([0.0, 0.0, 3.8416 / 13.8416]) and ev.wilson(10, 10) == pytest.approx([1.0, 10 / 13.8416, 1.0])


def test_eval_mcnemar_equals_hand_worked_binomials():
    a, b = [True] * 9 + [False] + [True] * 50 + [False] * 7, [False] * 9 + [True] + [True] * 50 + [False] * 7
    assert ev.mcnemar(a, b) == 2 * (1 + 10) / 1024                  # 9 to 1: only prompts that differ count
    assert ev.mcnemar(a, a) == 1.0 and ev.mcnemar([True, False], [False, True]) == 1.0
    assert ev.mcnemar([True] * 6, [False] * 6) == 2 / 64


def test_eval_bootstrap_interval_is_the_textbook_one_of_a_mean_and_pairs_differences():
    x = np.random.default_rng(1).normal(5, 1, 400)
    mean, low, high = ev.ratio(x, np.ones(400))
    assert mean == pytest.approx(x.mean()) and low < mean < high and abs(high - low - 2 * 1.96 * x.std() / 20) < 0.02
    assert ev.ratio(np.array([3.0, 1.0]), np.array([1.0, 3.0]))[0] == 1.0            # a ratio of sums, not a mean of ratios
    y = x + 0.1 + np.random.default_rng(2).normal(0, 0.01, 400)
    assert ev.ratio(y - x, np.ones(400))[1] > 0.09                                   # a small but steady difference is seen


# ---- eval: beta and the remedies

def test_eval_without_scale_and_remedy_changes_no_bit():
    ids = torch.randint(0, 265, (2, 700))
    for use_rope in (True, False):
        model = eval_model(use_rope=use_rope)
        expected = model(ids)
        ev.set_arm(model, n_train=256)
        assert torch.equal(model(ids), expected)


def test_eval_arms_change_nothing_up_to_the_training_length_and_something_beyond():
    model, ids = eval_model(), torch.randint(0, 265, (1, 600))
    short, long = model(ids[:, :256]), model(ids)
    for c, remedy in ((0.4, ""), (0.0, "pi"), (0.0, "ntk"), (0.2, "yarn")):
        ev.set_arm(model, 256, c, remedy)
        assert torch.equal(model(ids[:, :256]), short) and not torch.allclose(model(ids), long, atol=1e-3)
    ev.set_arm(model, 256, c=0.4)
    assert torch.allclose(model(ids)[:, :256], long[:, :256], atol=1e-5)    # beta grows with the query's position only
    model.use_rope = False                                                 # it works without RoPE too
    ev.set_arm(model, 256)
    dropped = model(ids)
    ev.set_arm(model, 256, c=0.4)
    assert not torch.allclose(model(ids), dropped, atol=1e-3)


def test_eval_scaled_attention_equals_the_formula_written_out():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 8).double()
    got = ev.scaled_attend(q, k, v, c=0.3, n_train=16)
    for t in range(40):
        beta = max(1.0, 1 + 0.3 * math.log((t + 1) / 16))
        weights = (beta * q[:, :, t:t + 1] @ k[:, :, :t + 1].transpose(2, 3) / 8 ** 0.5).softmax(-1)
        assert torch.allclose(got[:, :, t:t + 1], weights @ v[:, :, :t + 1], atol=1e-6)


def test_eval_remedied_angles():
    """Position interpolation halves all frequencies at 2 x; NTK and YaRN keep the fastest and slow down the slowest."""
    angle = lambda remedy, T: [torch.atan2(sin, cos)[1] for cos, sin in [ev.remedied_tables(T, 64, "cpu", remedy, n_train=256)]][0]
    plain = angle("", 512)                                          # of position 1: the frequencies
    assert torch.allclose(angle("pi", 512), plain / 2)
    for remedy in ("ntk", "yarn"):
        ratio = plain / angle(remedy, 512)
        assert torch.allclose(ratio[[0, -1]], torch.tensor([1.0, 2.0]), atol=1e-4) and (ratio.diff() > -1e-4).all()
        assert torch.equal(angle(remedy, 256), plain)


def test_eval_last_logits_are_those_of_the_model():
    model, ids = eval_model(), torch.randint(0, 265, (2, 100))
    assert torch.allclose(ev.last_logits(model, ids, 7), model(ids)[:, -7:], atol=1e-6)
    assert model(ids).shape == (2, 100, 265)                        # and nothing stays behind


# ---- eval: bits per byte

def test_eval_bits_per_byte_equal_those_of_pretraining(tmp_path, monkeypatch):
    texts, model = eval_texts(tmp_path, monkeypatch), eval_model()
    summary, examples = ev.bits_per_byte(model, texts, 256, [1, 4], 4)
    for multiple in (1, 4):
        rows = [torch.tensor([texts.bos] + d[-256 * multiple:]) for d in texts.documents]
        batches = [(r[None, :-1], F.pad(r[None, -32:], (len(r) - 33, 0), value=-1)) for r in rows]    # an eighth of 256 targets
        expected = m.bits_per_byte(model, batches, texts.nbytes, m.Env(0, 1, torch.device("cpu"), torch.float32, None))
        assert summary[str(multiple)]["bpb"][0] == pytest.approx(expected, rel=1e-6)
    assert summary["4"]["n"] == 4 and summary["4"]["change"][0] == pytest.approx(summary["4"]["bpb"][0] - summary["1"]["bpb"][0])
    assert {e["bytes"] for e in examples} == {32.0}                 # this tokenizer's tokens are bytes


def test_eval_documents_to_fit_on_are_never_tested_on(tmp_path, monkeypatch):
    texts = eval_texts(tmp_path, monkeypatch)
    assert len(texts.fit) == 2 and len(texts.documents) == 4 and not any(d in texts.documents for d in texts.fit)
    assert not any(texts.enc.decode(d) in texts.enc.decode(texts.hay) for d in texts.fit + texts.documents)


def test_eval_scale_is_the_one_of_least_loss(tmp_path, monkeypatch):
    texts, model = eval_texts(tmp_path, monkeypatch), eval_model()
    fit, examples = ev.fit_scale(model, texts, 256, [1, 2, 4])
    assert tuple(fit["losses"]) == ev.SCALES and fit["n"] == 2
    assert fit["losses"][fit["c"]] == min(fit["losses"].values())
    ids = torch.tensor([[texts.bos] + texts.fit[0][-1024:]])
    loss = F.cross_entropy(eval_model()(ids[:, :-1])[0, 256:], ids[0, 257:], reduction="sum")       # all targets beyond 256
    assert examples[0]["nats"] == pytest.approx(loss.item(), rel=1e-5)


# ---- eval: needles and induction

def test_eval_prompts_are_the_same_for_every_tag(tmp_path, monkeypatch):
    texts = eval_texts(tmp_path, monkeypatch)
    random.seed(1)
    one = [ev.make_prompt(texts, 512, depth, i, pairs) for depth in (0.1, 0.9) for i in (0, 1) for pairs in (1, 4)]
    random.seed(2)
    torch.manual_seed(3)
    two = [ev.make_prompt(texts, 512, depth, i, pairs) for depth in (0.1, 0.9) for i in (0, 1) for pairs in (1, 4)]
    assert one == two and len({tuple(p[0]) for p in one}) == 8


@pytest.mark.parametrize("pairs", [1, 4])
def test_eval_prompt_holds_needles_questions_and_answers(tmp_path, monkeypatch, pairs):
    texts = eval_texts(tmp_path, monkeypatch)
    ids, spans, reach, blank = ev.make_prompt(texts, 600, 0.5, 0, pairs)
    assert len(ids) == len(blank) == 601 and ids[0] == blank[0] == texts.bos and spans[-1][1] == 601
    assert len(spans) == len(reach) == pairs
    for (a, b), back in zip(spans, reach):
        answer, needle = texts.enc.decode(ids[a:b]), texts.enc.decode(ids[600 - back:])
        assert len(answer) == 4 and needle.startswith("\nThe secret number of ") and needle.split(".")[0].endswith(" is " + answer)
        question = texts.enc.decode(ids[:a]).rsplit("\n", 1)[1]
        assert needle[1:].startswith(question) and blank[a:b] == ids[a:b]
        assert texts.enc.decode(blank).count(question + answer) == 1    # only asked, never told
    assert ev.make_prompt(texts, 60, 0.5, 0, pairs) is None


def test_eval_exact_match_by_teacher_forcing_equals_greedy_generation(tmp_path, monkeypatch):
    texts, model = eval_texts(tmp_path, monkeypatch), eval_model()

    def greedy(prompt, n):
        for _ in range(n):
            prompt = prompt + [model(torch.tensor([prompt]))[0, -1].argmax().item()]
        return prompt
    cases = []
    for seed in range(12):                                          # answers that the model gives, and some that it does not
        prompt = random.Random(seed).choices(range(256), k=20)
        answer = greedy(prompt, 4)[20:]
        if seed % 3:
            answer[seed % 4] = (answer[seed % 4] + 1) % 256
        cases.append((prompt + answer, [(20, 24)]))
    for (ids, _), [(exact, nats, _)] in zip(cases, ev.answers(model, texts, cases)):
        assert exact == (greedy(ids[:20], 4) == ids)
        logp = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        assert nats == pytest.approx(-sum(logp[t - 1, ids[t]].item() for t in range(20, 24)), abs=1e-4)


def test_eval_a_perfect_copier_finds_all_and_a_random_model_nothing(tmp_path, monkeypatch):
    texts = eval_texts(tmp_path, monkeypatch)
    summary, examples = ev.needle(EvalCopier(), texts, 256, [0.5, 1, 4], EVAL_SIZES, 2)
    assert [s["rate"][0] for s in summary.values()] == [s["digits"] for s in summary.values()] == [1.0] * 3 and len(examples) == 30
    assert all(s["nats"] < 0.01 and s["gain"][1] > 0.5 for s in summary.values())    # without the needle it cannot know
    summary, _ = ev.needle(EvalCopier(), texts, 256, [1, 4], EVAL_SIZES, 1, pairs=4)
    assert list(summary) == ["4"] and summary["4"]["rate"][0] == summary["4"]["all"][0] == 1.0      # 1 x 256 bytes has no room for four
    summary, _ = ev.needle(eval_model(), texts, 256, [1, 4], EVAL_SIZES, 2)
    assert all(s["rate"][0] == 0 and s["rate"][1] <= 1e-4 <= s["rate"][2] and s["digits"] < 0.3 for s in summary.values())


def test_eval_a_copier_of_the_last_tokens_only_reaches_the_cropping_ceiling(tmp_path, monkeypatch):
    texts = eval_texts(tmp_path, monkeypatch)
    summary, _ = ev.needle(EvalCopier(window=256), texts, 256, [1, 2, 4], EVAL_SIZES, 2)
    assert [s["rate"][0] for s in summary.values()] == [s["ceiling"] for s in summary.values()] == [1.0, 0.4, 0.2]


def test_eval_induction_of_a_copier_and_of_a_random_model(tmp_path, monkeypatch):
    texts = eval_texts(tmp_path, monkeypatch)
    copied, _ = ev.induction(EvalCopier(), texts, [64, 256], 2)
    guessed, _ = ev.induction(eval_model(), texts, [64, 256], 2)
    assert list(copied) == ["64", "256"] and all(x["rate"][0] > 0.9 for x in copied.values())
    assert all(x["rate"][0] < 0.1 for x in guessed.values())


# ---- eval: the calculator

@pytest.mark.parametrize("call, result", [
    ("2+3*4", "14"), ("(1.5 - 0.5) / 4", "0.25"), ("10/2", "5"), ("-3**2", "-9"), ("7//2", "3"), ("7 % 4", "3"), ("0.1+0.2", "0.3"),
    ("'strawberry'.count('r')", "3"), ('"banana".count("an")', "2"), ("1_000*2", "2000"), (" 50*2 ", "100"), ("+-+5", "-5")])
def test_eval_calculator_works_out(call, result):
    assert ev.calculator(call) == result


@pytest.mark.parametrize("call", [
    "", "x", "print(1)", "__import__('os').system('true')", "open('/etc/passwd').read()", "().__class__.__bases__[0]", "'a'.__class__",
    "'a'.join('b')", "'a'.upper()", "'a'.count", "'a'.count('a', 0)", "'a'.count(sub='a')", "'a'.count(*'a')", "'a'.count(b'a')", "b'a'.count(b'a')",
    "f'{1}'.count('1')", "'a'.count(f'{1}')", "'a'.upper().count('A')", "'a'*9", "'a'+'b'", "'%s' % 1", "[1].count(1)", "(1,2)", "{1}", "{}", "[i for i in (1,)]",
    "lambda: 1", "1 if 1 else 2", "1 < 2", "1 and 2", "not 1", "~1", "1 << 9", "5 & 3", "True", "True+1", "None", "...", "1j", "1j*1j", "(-8)**0.5", "x := 1",
    "1; 2", "1\n2", "import os", "await x", "yield", "1/0", "0**-1", "1e999", "-1e999", "1e999-1e999", "9**9**9**9", "2**65", "10**6**64", "1e14*100", "9" * 60,
    "9" * 5000, "(" * 150 + "1" + ")" * 150, "1+" * 5000 + "1", "-" * 199 + "x", "int('5')", "abs(-5)", "1 .real", "(1).bit_length()", "'\\ud800'.x", "1\0", "\ud800"])
def test_eval_calculator_refuses_all_but_arithmetic_and_count(call):
    assert ev.calculator(call) is None


def test_eval_tool_writes_the_output_after_a_finished_call_and_only_then():
    class Tokenizer:                                                # characters are tokens
        convert_tokens_to_ids = staticmethod(lambda names: [256 + EVAL_SPECIAL.index(x) for x in names])
        decode = staticmethod(lambda ids: bytes(ids).decode())
        encode = staticmethod(lambda text, add_special_tokens: list(text.encode()))
    start, end, output, output_end = range(261, 265)
    tool = ev.PythonTool(Tokenizer, 3)
    rows = [[0, start, *b"6*7", end], [start, *b"os.x()", end], [end, *b"abcdef", start]]
    rows = [[0] * (8 - len(r)) + r for r in rows]
    for expected in (output, *b"42", output_end, None):
        free = torch.randn(3, 265)
        scores = tool(torch.tensor(rows), free.clone())
        assert torch.equal(scores[1:], free[1:])                    # refused, and not finished: the model goes on by itself
        assert torch.equal(scores[0], free[0]) if expected is None else scores[0].argmax() == expected and scores[0].isinf().sum() == 264
        rows = [r + [scores[i].argmax().item() % 256 if i else expected or 0] for i, r in enumerate(rows)]


# ---- eval: a whole run

def eval_run(monkeypatch, capsys, *args):
    monkeypatch.setattr("sys.argv", ["eval.py", *args])
    monkeypatch.setattr(ev, "QUICK", replace(EVAL_SIZES, prompts=1))
    ev.main()
    return capsys.readouterr().out


def test_eval_run_writes_table_figures_and_examples_and_does_not_repeat_itself(tmp_path, monkeypatch, capsys):
    eval_base_dir(tmp_path, monkeypatch)
    eval_checkpoint(tmp_path, "t", train_len=128)
    eval_checkpoint(tmp_path, "t_drope_50", seed=1, use_rope=False, train_len=128)

    # an interruption keeps the sections that are finished
    run = ev.needle
    monkeypatch.setattr(ev, "needle", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        eval_run(monkeypatch, capsys, "t", "t_drope_50", "--quick")
    monkeypatch.setattr(ev, "needle", run)
    folder = tmp_path / "base_checkpoints" / "t"
    half = json.loads((folder / "eval_quick.json").read_text())["sections"]
    assert list(half) == ["scale plain", "bpb plain"]
    with monkeypatch.context() as patch:
        first, again = ev.bits_per_byte, []
        patch.setattr(ev, "bits_per_byte", lambda *a: again.append(a[3]) or first(*a))
        out = eval_run(monkeypatch, capsys, "t", "t_drope_50", "missing", "--quick")
    assert again.count((0.5, 1, 2, 4)) == 1                         # not again of t as trained, but of t_drope_50

    # eval.json and an example for each prompt
    sections = json.loads((folder / "eval_quick.json").read_text())["sections"]
    assert sections["bpb plain"] == half["bpb plain"]
    assert {f"{kind} {arm}{beta}" for kind in ("bpb", "needle") for arm in ("plain", "pi", "ntk", "yarn") for beta in ("", " beta")} < set(sections)
    assert not any("ntk" in name for name in json.loads((tmp_path / "base_checkpoints/t_drope_50/eval_quick.json").read_text())["sections"])
    assert len((folder / "eval_quick" / "needle_plain.jsonl").read_text().splitlines()) == 3 * 5        # 0.5 x 128 bytes are too short
    assert sections["needle ntk beta"]["1"] == sections["needle plain"]["1"] and sections["needle ntk beta"]["4"]["n"] == 5

    # the table: a row a tag, '-' where nothing was run, and which figure counts
    table = (tmp_path / "eval" / "results_quick.md").read_text()
    assert table in out and json.loads((tmp_path / "eval" / "results_quick.json").read_text())["t"]["needle plain"] == sections["needle plain"]
    rows = {line.split(" | ")[0][2:]: line.strip("| ").split(" | ") for line in reversed(table.splitlines()) if line.startswith("| ")}
    assert rows["t"][1] == "on" and rows["t_drope_50"][1] == "off" and set(rows["missing"][1:]) == {"-"} and "NLL" in rows["t"][5]
    assert "t_drope_50: not judged" in table

    # figures that show something
    import matplotlib.image
    for name in ("contexts_quick.png", "drop_quick.png"):
        image = matplotlib.image.imread(tmp_path / "eval" / name)[:, :, :3]
        assert image.shape[1] > 500 and len(np.unique((image.reshape(-1, 3) * 255).astype(int), axis=0)) > 20

    # nothing is done twice, until the checkpoint is another
    monkeypatch.setattr(ev, "make_figures", lambda *a: None)
    for name in ("needle", "bits_per_byte", "induction", "fit_scale"):
        monkeypatch.setattr(ev, name, lambda *a, **k: pytest.fail("done again"))
    assert "bpb plain: " not in eval_run(monkeypatch, capsys, "t", "t_drope_50", "--quick")
    eval_run(monkeypatch, capsys, "--table", "--quick", "missing", "t")
    for name in ("needle", "bits_per_byte", "induction", "fit_scale"):
        monkeypatch.setattr(ev, name, lambda *a, name=name, **k: ({"c": 0} if name == "fit_scale" else {"1": {"done": "again"}}, []))
    monkeypatch.setattr(ev, "make_table", lambda *a: "")
    eval_checkpoint(tmp_path, "t", seed=5, train_len=128)                           # the same step, other weights
    assert "another checkpoint" in eval_run(monkeypatch, capsys, "t", "--quick")
    assert json.loads((folder / "eval_quick.json").read_text())["sections"]["needle plain"]["1"]["done"] == "again"


def test_eval_says_what_is_missing_in_a_line(tmp_path, monkeypatch, capsys):
    eval_base_dir(tmp_path, monkeypatch)
    for args, words in ((["nothing", "--quick"], "nothing evaluated"), ([], "which tags"), (["--quick", "t", "--sead", "1"], "unrecognized")):
        with pytest.raises(SystemExit) as stop:
            eval_run(monkeypatch, capsys, *args)
        assert words in str(stop.value) and "\n" not in str(stop.value)
    assert "python pretrain.py --tag nothing" in capsys.readouterr().err
    eval_checkpoint(tmp_path, "t")
    (tmp_path / "data/climbmix/shard_06542.parquet").write_bytes(b"PAR1 damaged")
    with pytest.raises(SystemExit, match="shard_06542.parquet cannot be read"):
        eval_run(monkeypatch, capsys, "t", "--quick")
    assert not (tmp_path / "base_checkpoints" / "t" / "eval_quick.json").exists()


def test_eval_command_line_takes_tags_and_options_in_any_order():
    for args in (["a", "b", "--quick", "--train-len", "64"], ["--train-len", "64", "a", "--quick", "b", "a"]):
        tags, config = ev.command_line(args)
        assert tags == ["a", "b"] and config.quick and not config.table and config.train_len == 64


def test_eval_base_of_a_long_tag_is_that_of_the_tag_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    places = ev.places("d18_20tpp_drope_50_long")
    assert places["base"][0] == tmp_path / "base_checkpoints" / "d18_20tpp_drope_50"
    assert places["chat"] == (tmp_path / "hf_sft" / "d18_20tpp_drope_50_long", tmp_path / "chatsft_checkpoints" / "d18_20tpp_drope_50_long")


# ---- eval: when a win is called

def eval_found(folder, found_by_drope, found_by_ntk, at_1x=0.9):
    """Two evaluated tags with 40 needles at 4 x, of which so many were found."""
    results = {}
    for tag, use_rope, arm, count in (("d_9tpp", True, "ntk", found_by_ntk), ("d_9tpp_drope_50", False, "plain", found_by_drope)):
        for name in ("needle_plain", f"needle_{arm}_beta"):
            m.atomic_write(folder / tag / f"{name}.jsonl", "".join(json.dumps(
                {"length": 4, "depth": i, "i": 0, "exact": [i < (count if "beta" in name else 3)]}) + "\n" for i in range(40)))
        at_4x = {"n": 40, "rate": ev.wilson(count, 40), "ceiling": 0.2, "nats": 1, "gain": [1, 1, 1]}
        results[tag] = {"base": {"use_rope": use_rope, "texts": "same", "n_train": 256}, "examples": folder / tag,
                        "sections": {"needle plain": {"1": {**at_4x, "rate": [at_1x] * 3}, "4": at_4x}, f"needle {arm} beta": {"4": at_4x}}}
    return results


def test_eval_a_win_has_to_beat_cropping_and_ntk_with_beta(tmp_path):
    [line] = ev.verdicts(eval_found(tmp_path / "a", 30, 15), [1, 4])
    assert "**a win**" in line and "0.75 against 0.38" in line and "above the cropping ceiling of 0.20" in line
    [line] = ev.verdicts(eval_found(tmp_path / "b", 30, 28), [1, 4])     # NTK does as well
    assert "**no win**" in line
    [line] = ev.verdicts(eval_found(tmp_path / "c", 10, 0), [1, 4])      # better than NTK, but cropping could give as much
    assert "**no win**" in line and "not above" in line
    [line] = ev.verdicts(eval_found(tmp_path / "d", 30, 0, at_1x=0.1), [1, 4])
    assert "not judged" in line and "win" not in line
    found = eval_found(tmp_path / "e", 30, 0)
    found["d_9tpp"]["base"]["texts"] = "other"                          # other prompts cannot be compared
    [line] = ev.verdicts(found, [1, 4])
    assert "**no win**" in line and "not run" in line


# ---- eval: through the export

def test_eval_of_an_export_equals_that_of_its_checkpoint(tmp_path, monkeypatch):
    import export_hf
    enc = eval_base_dir(tmp_path, monkeypatch)
    model = eval_checkpoint(tmp_path, "t", use_rope=False)
    folder = export_hf.export("base", "t")
    loaded = ev.load_export(folder, enc, 256, torch.float32)
    rounded = eval_model(use_rope=False)
    rounded.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    ids = torch.randint(0, 265, (2, 50))
    assert loaded.use_rope is False and torch.equal(loaded(ids), rounded(ids)) and ev.places(str(folder)) == {"base": (folder, folder)}


def test_eval_chat_sections_through_the_export(tmp_path, monkeypatch, capsys):
    """Choices and answers of a batch are those of a row alone; absent questions are skipped with a line and shown as '-'."""
    import export_hf, sft
    eval_base_dir(tmp_path, monkeypatch)
    model = eval_checkpoint(tmp_path, "t", stage="chatsft_checkpoints")
    folder = export_hf.export("sft", "t")
    ask = lambda text, answer: [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    letters = [ask(f"Multiple Choice question: {q}\n- x=A\n- y=B\n- z=C\n\nRespond only with the letter of the correct answer.", "B") for q in ("a", "bb" * 20, "ccc")]
    numbers = [ask(f"How many {q}?", [{"type": "text", "text": "so\n\n#### 1,234"}]) for q in ("a", "bb" * 20, "ccc")]
    chat = ev.Chat(folder, m.Env(0, 1, torch.device("cpu"), torch.float32, None))
    summary, examples = chat.choose(letters)
    assert summary["n"] == 3 and summary["rate"][0] == np.mean([e["answer"] == "B" for e in examples])
    enc = m.load_tokenizer(tmp_path / "tokenizer")
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    for e in examples:
        start = [enc.encode_single_token(EVAL_SPECIAL[3])]
        logits = model(torch.tensor([sft.render(enc, [{"role": "user", "content": e["question"]}])[0] + start]))[0, -1]
        assert e["answer"] == max("ABC", key=lambda x: logits[ord(x)])
    summary, together = chat.answer(numbers, 24)
    alone = [chat.answer([c], 24)[1][0] for c in numbers]
    assert sorted(together, key=str) == sorted(alone, key=str) and {e["expected"] for e in together} == {"1234"} and "stops" in summary

    # a call that is finished gets its output written by the tool, inside of generate() and in its own row only
    pad, calls = chat.batches, [[261, *b"6*7", 262], [261, *b"os.x()", 262], [261, *b"(1+2)/4", 262]]

    def batches(conversations, size):
        for some, _ in pad(conversations, size):
            rows = [[0] * (12 - len(c)) + c for c in calls]
            yield some, dict(input_ids=torch.tensor(rows), attention_mask=torch.ones(3, 12, dtype=torch.long))
    with monkeypatch.context() as patch:
        patch.setattr(chat, "batches", batches)
        got = [e["answer"] for e in chat.answer(numbers, 8)[1]]
    assert got[0].startswith("<|output_start|>42<|output_end|>") and got[2].startswith("<|output_start|>0.75<|output_end|>")
    assert "<|output_start|>" not in got[1]

    asked = [("mmlu", c) for c in letters] + [("spellingbee", c) for c in numbers]      # none of GSM8K
    m.atomic_write(tmp_path / "chatsft_checkpoints" / "t" / "questions.jsonl", "".join(json.dumps({"source": s, "messages": c}) + "\n" for s, c in asked))
    eval_run(monkeypatch, capsys, "t", "--quick")
    data = json.loads((tmp_path / "chatsft_checkpoints" / "t" / "eval_quick.json").read_text())
    row = (tmp_path / "eval" / "results_quick.md").read_text().splitlines()[4].strip("| ").split(" | ")
    assert row[0] == "t" and row[11] == ev.interval(data["sections"]["mmlu"]["rate"]) and row[12] == "-" and row[13].startswith("0.00") and row[14][0] in "01"
    assert set(data["sections"]) == {"mmlu", "bee"} and not list((tmp_path / "eval").glob("*.png"))


@pytest.mark.parametrize("text, number", [("so #### 18", "18"), ("#### 1,234.", "1234"), ("#### -5", "-5"), ("a #### 1 b #### 2.5", "2.5"), ("18", None), ("#### x", None)])
def test_eval_final_number(text, number):
    assert ev.final_number(text) == number and ev.final_number([{"type": "python", "text": "1"}, {"type": "text", "text": text}]) == number


# ==== sft.py ================================================================================================

# ---- sft.py: conversations, sources, the mixture, packing, the run ------------------------------------------------------------




SFT_SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>",
               "<|python_end|>", "<|output_start|>", "<|output_end|>"]
SFT_BOS, SFT_USER, SFT_USER_END, SFT_ASSISTANT, SFT_ASSISTANT_END, SFT_PYTHON, SFT_PYTHON_END, SFT_OUTPUT, SFT_OUTPUT_END = range(256, 265)
SFT_WORDS = "apple banana cherry strawberry kiwi plum fig melon".split()


def sft_tokenizer(folder):
    """A tokenizer of single bytes, so that ids can be read in the tests."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.tiktoken").write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    (folder / "config.json").write_text(json.dumps({"pat_str": r"\S+|\s+", "special_tokens": {t: 256 + i for i, t in enumerate(SFT_SPECIAL)}}))
    return model.load_tokenizer(folder)


@pytest.fixture
def sft_home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "words.txt").write_bytes(b"".join(w.encode() + b"\r\n" for w in SFT_WORDS))
    sft_tokenizer(tmp_path / "tokenizer")
    sft.tulu_rows.cache_clear()
    sft.word_list.cache_clear()
    return tmp_path


def sft_config(home, **fields):
    return sft.Config(**{"words": str(home / "words.txt"), "max_seq_len": 64, "patience": 0, **fields})


def sft_chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


# a conversation

def test_ids_and_mask_of_a_conversation_with_system_message_two_turns_and_python_call(tmp_path):
    enc = sft_tokenizer(tmp_path)
    ids, mask = sft.render(enc, [
        {"role": "system", "content": "S"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "1+1"}, {"role": "assistant", "content": [
            {"type": "text", "text": "a"}, {"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "b"}]}])
    assert ids == [SFT_BOS, SFT_USER, *b"S\n\nhi", SFT_USER_END, SFT_ASSISTANT, *b"yo", SFT_ASSISTANT_END,
                   SFT_USER, *b"1+1", SFT_USER_END, SFT_ASSISTANT, *b"a", SFT_PYTHON, *b"1+1", SFT_PYTHON_END,
                   SFT_OUTPUT, *b"2", SFT_OUTPUT_END, *b"b", SFT_ASSISTANT_END]
    assert mask == [0] * 9 + [1, 1, 1] + [0] * 6 + [1] + [1] * 5 + [0] * 3 + [1, 1]


def test_text_that_looks_like_a_special_token_stays_text(tmp_path):
    ids, mask = sft.render(sft_tokenizer(tmp_path), sft_chat("<|assistant_start|>", "<|bos|>"))
    assert ids == [SFT_BOS, SFT_USER, *b"<|assistant_start|>", SFT_USER_END, SFT_ASSISTANT, *b"<|bos|>", SFT_ASSISTANT_END]


def test_a_conversation_is_cut_at_max_tokens(tmp_path):
    enc = sft_tokenizer(tmp_path)
    ids, mask = sft.render(enc, sft_chat("ab", "cd" * 5000))
    assert len(ids) == 10007                                # nothing is cut unless asked for
    assert sft.render(enc, sft_chat("ab", "cd" * 5000), 7) == (ids[:7], mask[:7])


@pytest.mark.parametrize("messages, why", [
    (sft_chat("a", "b")[::-1], "message 1 is of role 'assistant' where 'user' was expected"),
    (sft_chat("a", "b") + sft_chat("c", "d")[1:], "message 3 is of role 'assistant'"),
    (sft_chat("a", "b") + [{"role": "system", "content": "s"}], "message 3 is of role 'system'"),
    ([{"role": "system", "content": "s"}], "it ends before an answer"),
    ([{"role": "user", "content": None}, {"role": "assistant", "content": "b"}], "message 1 has content that is not text"),
    (sft_chat("a", [{"type": "image", "text": "x"}]), "message 2 has the part"),
    ([], "it ends before an answer"), ("text", "not a list"), ([1], "not a list")])
def test_what_is_no_conversation_is_named(tmp_path, messages, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        sft.render(sft_tokenizer(tmp_path), messages)


def test_coloured_text_is_green_exactly_where_it_is_learnt(tmp_path):
    enc = sft_tokenizer(tmp_path)
    text = sft.coloured(enc, *sft.render(enc, sft_chat("hi", "yo")))
    assert text == "\033[90m<|bos|><|user_start|>hi<|user_end|><|assistant_start|>\033[0m\033[32myo<|assistant_end|>\033[0m"


# the sources

def test_calculator_annotations_become_python_calls_and_their_output():
    assert sft.calculator_parts("50 x <<50*2=100>>100\n#### 100") == [
        {"type": "text", "text": "50 x "}, {"type": "python", "text": "50*2"}, {"type": "python_output", "text": "100"},
        {"type": "text", "text": "100\n#### 100"}]


@pytest.mark.parametrize("nested", [False, True])
def test_mmlu_in_both_layouts(sft_home, nested):
    import pyarrow as pa, pyarrow.parquet as pq
    row = {"question": "2+2?", "subject": "", "choices": ["3", "4", "5", "6"], "answer": 1}
    (sft_home / "data/sft/mmlu").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{"train": row} if nested else row] * 3), sft_home / "data/sft/mmlu/auxiliary_train-00000-of-00001.parquet")
    n, conversation = sft.mmlu(sft_config(sft_home), "train")
    assert n == 3 and conversation(2) == sft_chat(
        "Multiple Choice question: 2+2?\n- 3=A\n- 4=B\n- 5=C\n- 6=D\n\nRespond only with the letter of the correct answer.", "B")


def test_simple_spelling_and_its_word_list_with_crlf(sft_home):
    n, conversation = sft.simple_spelling(sft_config(sft_home, spelling_rows=7), "train")
    assert n == 7
    for i in range(7):
        word = random.Random(i).choice(SFT_WORDS)
        assert conversation(i) == sft_chat(f"Spell the word: {word}", f"{word}:{','.join(word)}")
    assert sft.simple_spelling(sft_config(sft_home), "val")[1](3) == sft.simple_spelling(sft_config(sft_home), "train")[1](10_000_003)


def test_spelling_bee_counts_right_in_every_row_and_asks_for_a_letter_of_the_word_in_90_percent(sft_home):
    n, conversation = sft.spelling_bee(sft_config(sft_home), "train")
    inside, questions = 0, set()
    for i in range(3000):
        user, answer = conversation(i)
        by_hand, call, output, end = [part["text"] for part in answer["content"]]
        word, c = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call).groups()
        count = word.count(c)
        assert word in user["content"].lower() and c in user["content"].lower()
        assert output == str(count) and end.endswith(f"\n\n#### {count}") and f"\n{word}:{','.join(word)}\n" in by_hand
        assert by_hand.count("hit!") == count and all(f"\n{k}:{letter}" in by_hand for k, letter in enumerate(word, 1))
        assert f"hit! count={count}" in by_hand or count == 0
        inside += count > 0
        questions.add(user["content"].replace(word, "W"))
    assert abs(inside / 3000 - 0.9) < 0.02 and len(questions) > 1000
    assert [p["type"] for p in answer["content"]] == ["text", "python", "python_output", "text"]
    assert conversation(5) == sft.spelling_bee(sft_config(sft_home), "train")[1](5)


def test_bad_tulu_rows_are_dropped_and_counted_and_some_good_ones_held_out(sft_home, capsys):
    good = [sft_chat(f"q{i}", f"a{i}") for i in range(60)]
    bad = [sft_chat("a"), sft_chat("a", ""), sft_chat("a", " \n"), sft_chat("a", None), sft_chat("a", "b", "c"), sft_chat("a", "b")[1:],
           sft_chat("a", [{"type": "text", "text": "b"}]), sft_chat("a", "b", "c", "d")[::2], [{"role": "system", "content": "s"}], [], None]
    lines = [json.dumps({"messages": m}) for m in good[:30] + bad + good[30:]] + ['{"id": 1}', '{"messages": [', "[]"]
    (sft_home / "data/sft/tulu").mkdir(parents=True)
    (sft_home / "data/sft/tulu/tulu_v2_data.jsonl").write_text("\n".join(lines))
    rows = {}
    for split in ("train", "val"):
        n, conversation = sft.tulu(sft_config(sft_home), split)
        rows[split] = [conversation(i) for i in range(n)]
    assert len(rows["val"]) == 3 and sorted(rows["train"] + rows["val"], key=str) == sorted(good, key=str)
    assert "14 of 74 rows dropped" in capsys.readouterr().out


def test_a_line_of_ones_own_file_that_is_no_conversation_is_named(sft_home):
    (sft_home / "mine.jsonl").write_text(json.dumps(sft_chat("a", "b")) + "\n" + json.dumps(sft_chat("a")) + "\n")
    with pytest.raises(SystemExit, match=r"mine.jsonl, line 2: it ends before an answer"):
        sft.conversations(sft_config(sft_home, conversations=str(sft_home / "mine.jsonl")), "train")
    with pytest.raises(SystemExit, match="mine_val.jsonl"):
        sft.conversations(sft_config(sft_home, conversations=str(sft_home / "mine.jsonl")), "val")


# the mixture

def sft_sources(**sizes):
    return [(name, n, epochs, lambda i, name=name: sft_chat(f"{name} {i}", "x" * (i % 50))) for name, (n, epochs) in sizes.items()]


def test_every_row_is_in_the_mixture_as_often_as_its_epochs_say_in_an_order_that_does_not_change():
    mixture = sft.Mixture(sft_sources(a=(5, 1), b=(3, 4)))
    places = collections.Counter(mixture.where(i)[:2] for i in range(len(mixture)))
    assert places == {**{("a", i): 1 for i in range(5)}, **{("b", i): 4 for i in range(3)}}
    assert mixture.order.tolist() == [0, 1, 5, 15, 11, 14, 8, 13, 2, 9, 16, 4, 7, 10, 12, 3, 6]


def test_published_sizes_add_up():
    def total(names):
        return sum(sft.SOURCES[n][1] * sft.SOURCES[n][2] for n in names)
    short = ["smoltalk", "identity", "mmlu", "gsm8k", "spelling", "spellingbee"]
    assert total(short) == 460_341 + 2_000 + 299_526 + 29_892 + 200_000 + 80_000 == 1_071_759
    assert total(short + ["tulu"]) == 1_171_759


def test_sources_of_other_sizes_are_refused_unless_asked_for(sft_home, monkeypatch):
    monkeypatch.setattr(sft, "SOURCES", {n: (lambda c, s: (10, lambda i: sft_chat("a", "b")), 11 if n == "mmlu" else 10, e, v)
                                         for n, (_, _, e, v) in sft.SOURCES.items()})
    with pytest.raises(SystemExit) as e:
        sft.open_mixture(sft_config(sft_home), "train")
    assert str(e.value) == "mmlu: 10 rows where the published mixture has 11; to go on with them: --any-size"
    assert len(sft.open_mixture(sft_config(sft_home, any_size=True), "train")) == 10 * (1 + 2 + 3 + 4 + 1 + 1)
    assert len(sft.open_mixture(sft_config(sft_home, skip="mmlu,identity"), "train")) == 10 * (1 + 4 + 1 + 1)
    assert len(sft.open_mixture(sft_config(sft_home, skip="mmlu", tag="d2_1tpp_long"), "train")) == 10 * (1 + 2 + 4 + 1 + 1 + 1)
    with pytest.raises(SystemExit, match="--skip mlu: the sources are smoltalk, "):
        sft.open_mixture(sft_config(sft_home, skip="mlu"), "train")


def test_each_source_that_cannot_be_fetched_is_one_line_that_says_what_is_lost_and_how_to_go_on(sft_home, monkeypatch):
    def gone(repo, filename, dest, **options):
        raise model.FetchError(f"{repo} is gone")
    monkeypatch.setattr(sft, "fetch", gone)
    with pytest.raises(SystemExit) as e:
        sft.open_mixture(sft_config(sft_home, identity="nowhere.jsonl", bee_rows=80_000), "train")
    assert str(e.value).splitlines() == [
        "smoltalk: HuggingFaceTB/smol-smoltalk is gone. It would have added 460,341 conversations; to go on without it: --skip smoltalk",
        "identity: no file nowhere.jsonl. It would have added 2,000 conversations; to go on without it: --skip identity",
        "mmlu: cais/mmlu is gone. It would have added 299,526 conversations; to go on without it: --skip mmlu",
        "gsm8k: openai/gsm8k is gone. It would have added 29,892 conversations; to go on without it: --skip gsm8k"]


def test_plain_files_are_fetched_again_after_errors_damage_and_cuts(sft_home, monkeypatch, capsys):
    good = b"".join(json.dumps(sft_chat("q" * 50, "a")).encode() + b"\n" for _ in range(20))
    damaged = good[:700] + bytes([good[700] ^ 255]) + good[701:]
    answers = [(429, b"", {"Retry-After": "7"}), (503, b"", {}), (200, good[:-30], {}), (200, damaged, {}), (200, good[:100], {"Content-Length": str(len(good))}), (200, good, {})]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/missing":
                return self.send_error(404)
            status, body, headers = answers.pop(0)
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *args): pass

    server, pauses = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler), []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(sft.time, "sleep", pauses.append)
    url = f"http://127.0.0.1:{server.server_port}"
    n, conversation = sft.identity(sft_config(sft_home, identity=f"{url}/identity.jsonl", patience=600), "train")
    assert n == 20 and (sft_home / "data/sft/identity.jsonl").read_bytes() == good and not answers
    assert pauses == [7, 2, 4, 8, 16]                       # growing, and as long as the server asked for
    with pytest.raises(model.FetchError, match="404"):      # no use in asking again
        sft.fetch_url(f"{url}/missing", lambda data: "", 600)
    server.shutdown()
    assert sft.identity(sft_config(sft_home, identity=f"{url}/identity.jsonl"), "train")[0] == 20   # no network from here on


# packing

def sft_naive_rows(lengths, row_len, size=100):
    """Best fit written out: rows of conversation numbers."""
    waiting, buffer, rows = list(enumerate(lengths)), [], []
    while waiting or buffer:
        row, room = [], row_len
        while True:
            while waiting and len(buffer) < size:
                buffer.append(waiting.pop(0))
            fitting = [b for b in buffer if min(b[1], row_len) <= room]
            if not fitting:
                break
            longest = max(min(b[1], row_len) for b in fitting)
            best = next(b for b in fitting if min(b[1], row_len) == longest)
            buffer.remove(best)
            row.append(best[0])
            room -= longest
        rows.append(row)
    return rows


def sft_varied_mixture(n=400):
    rng = random.Random(1)
    texts = ["x" * rng.choice([0, 1, 5, 10, 20, 40, 70]) for _ in range(n)]
    return sft.Mixture([("a", n, 1, lambda i: sft_chat(f"{i:04d}", texts[i]))])


def test_packing_equals_a_naive_best_fit_and_uses_every_conversation_exactly_once(tmp_path):
    enc, mixture, T = sft_tokenizer(tmp_path), sft_varied_mixture(), 60
    lengths = [mixture.rendered(i, enc, None)[2] for i in range(len(mixture))]
    assert max(lengths) > T + 1                             # some are longer than a row
    packer, rows = sft.Packer(mixture, enc, T + 1), []
    while (row := packer.next_row()) is not None:
        rows.append(row)
    naive = sft_naive_rows(lengths, T + 1)
    assert sorted(i for row in naive for i in row) == list(range(400)) and len(rows) == len(naive)
    for (ids, mask), conversations in zip(rows, naive):
        parts = [mixture.rendered(i, enc, T + 1) for i in conversations]
        padding = T + 1 - sum(len(p[0]) for p in parts)
        assert ids.tolist() == [t for p in parts for t in p[0]] + [SFT_BOS] * padding
        assert mask.tolist() == [bool(m) for p in parts for m in p[1]] + [False] * padding
    assert packer.cut == sum(n > T + 1 for n in lengths) and packer.state()["used"] == 400


def test_targets_are_the_learnt_tokens_and_nothing_else(tmp_path):
    enc, mixture = sft_tokenizer(tmp_path), sft.Mixture([("a", 1, 1, lambda i: sft_chat("hi", "yo"))])
    x, y = sft.Packer(mixture, enc, 17).batch(2)
    assert x[0].tolist() == [SFT_BOS, SFT_USER, *b"hi", SFT_USER_END, SFT_ASSISTANT, *b"yo", SFT_ASSISTANT_END] + [SFT_BOS] * 7
    assert y[0].tolist() == [-1] * 5 + [*b"yo", SFT_ASSISTANT_END] + [-1] * 8
    assert (x[1] == SFT_BOS).all() and (y[1] == -1).all()   # the last batch is filled up with padding


def test_packing_goes_on_exactly_from_any_state_that_went_through_json(tmp_path):
    enc, mixture = sft_tokenizer(tmp_path), sft_varied_mixture()
    packer, batches, states = sft.Packer(mixture, enc, 61), [], []
    while (batch := packer.batch(8)) is not None:
        batches.append(batch), states.append(json.dumps(packer.state()))
    assert len(batches) > 10
    for k in (0, 3, len(batches) - 2):
        again = sft.Packer(mixture, enc, 61, json.loads(states[k]), threads=1)
        rest = []
        while (batch := again.batch(8)) is not None:
            rest.append(batch)
        assert all(np.array_equal(a, b) for a, b in zip(batches[k + 1:], rest, strict=True)) and json.dumps(again.state()) == states[-1]


def test_rows_and_batches_without_a_learnt_token_give_no_nan():
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(16, 265, 1, 1, 1, 32))
    net.init_weights()
    env = model.Env(0, 1, torch.device("cpu"), torch.float32, None)
    x = torch.randint(265, (4, 16))
    y = torch.full((4, 16), -1)
    assert model.accumulate_gradients(net, x, y, 1, env).item() == 0
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    y[2, 5:8] = 7
    alone = net(x[2:3], y[2:3]).item() / 3                  # the mean over the three counted tokens of the batch
    assert model.accumulate_gradients(net, x, y, 1, env).item() == pytest.approx(alone, rel=1e-6)


# the run

def test_schedules_of_fine_tuning_at_their_corners():
    assert [sft.lr_factor(p) for p in (0, 0.25, 0.5, 0.75, 1)] == [1, 1, 1, 0.5, 0]
    assert [sft.muon_momentum(s) for s in (0, 150, 300, 5000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])


def sft_base(home, tag="t", use_rope=False):
    """A base model, its optimizer in the middle of things, and conversations of one's own."""
    from muon import build_optimizer
    enc = sft_tokenizer(home / "tokenizer")
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(128, enc.n_vocab, 2, 1, 1, 32), use_rope)
    net.init_weights()
    optimizer = build_optimizer(net, weight_decay=0.3)
    net(torch.arange(32).view(1, 32), torch.arange(32).view(1, 32)).backward()
    optimizer.step()
    folder = home / "base_checkpoints" / tag
    model.save_checkpoint(folder, 3, net, optimizer, {}, dict(
        step=3, steps=3, val_bpb=2.0, model_config=vars(net.config), user_config=dict(embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02),
        device_batch_size=4, max_seq_len=64, loop_state=dict(use_rope=use_rope), tokenizer=model.tokenizer_hash(enc)))
    lines = [json.dumps(sft_chat(f"what is {w} {i}?", f"{w} is a fruit. " * (i % 4 + 1))) + "\n" for i in range(9) for w in SFT_WORDS]
    (home / "mine.jsonl").write_text("".join(lines[:64]))
    (home / "mine_val.jsonl").write_text("".join(lines[64:]))
    return folder


def sft_command(home, *more, tag="t"):
    return [str(Path(sft.__file__)), "--tag", tag, "--conversations", str(home / "mine.jsonl"), "--words", str(home / "words.txt"), "--spelling-rows", "30",
            "--bee-rows", "4", "--max-seq-len", "128", "--total-batch-size", "512", "--eval-every", "4", "--eval-tokens", "512", "--save-every", "2", *more]


def sft_run(home, command, kill=None, at=0):
    """Runs a command; with `kill`, sends that signal when the log line of step `at` appears. -> exit code, output"""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(home), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = []
    for line in process.stdout:
        output.append(line)
        if kill and line.startswith(f"step {at:05d} "):
            process.send_signal(kill)
    return process.wait(), "".join(output)


def sft_result(home, tag="t"):
    folder = home / "chatsft_checkpoints" / tag
    step = model.checkpoint_steps(folder)[-1]
    timings = ("seconds", "waited", "packed_rows_per_second")
    metrics = [{k: v for k, v in json.loads(line).items() if k not in timings} for line in (folder / "metrics.jsonl").open()]
    return {"meta": model.read_meta(folder, step), "metrics": metrics, "loader": model.load_part(folder, step, "loader"),
            "model": model.load_part(folder, step, "model"), "optim": model.load_part(folder, step, "optim")}


def sft_same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(sft_same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(sft_same, a, b)) if isinstance(a, (list, tuple)) else a == b


def test_a_run_uses_every_conversation_once_keeps_rope_off_and_ends_the_same_however_often_it_is_interrupted(sft_home):
    homes = [sft_home / "whole", sft_home / "broken"]
    for home in homes:
        sft_base(home)
        (home / "words.txt").write_text("\n".join(SFT_WORDS))
    code, output = sft_run(homes[0], sft_command(homes[0]))
    assert code == 0, output
    whole = sft_result(homes[0])
    steps = whole["meta"]["step"]
    assert steps >= 8 and whole["meta"]["finished"] and whole["meta"]["loop_state"]["use_rope"] is False
    assert whole["loader"]["used"] == 64 + 30 + 4 == whole["metrics"][-2]["conversations"]
    assert whole["metrics"][-1]["val_bpb"] < whole["metrics"][0]["val_bpb"]
    assert [g["weight_decay"] for g in whole["optim"]["param_groups"]] == [0.01, 0.001] + [0.0] * (len(whole["optim"]["param_groups"]) - 2)
    assert whole["optim"]["param_groups"][2]["initial_lr"] == pytest.approx(0.8 * 0.02)
    assert whole["optim"]["state"][0]["step"] == 1 + steps  # the optimizer's state went on

    assert sft_run(homes[1], sft_command(homes[1]), signal.SIGKILL, 3)[0] == -signal.SIGKILL
    code, output = sft_run(homes[1], sft_command(homes[1]), signal.SIGTERM, 5)
    assert code == model.INTERRUPTED and "stopped by SIGTERM" in output
    code, output = sft_run(homes[1], sft_command(homes[1], "--device-batch-size", "2"))
    assert code == 0 and "going on from step" in output, output
    broken = sft_result(homes[1])
    assert sft_same(whole["model"], broken["model"]) and sft_same(whole["optim"], broken["optim"]) and whole["loader"] == broken["loader"]
    assert whole["metrics"] == broken["metrics"]
    code, output = sft_run(homes[1], sft_command(homes[1]))
    assert code == 0 and "is finished (step" in output

    code, output = sft_run(homes[0], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *sft_command(homes[0], tag="t_long")])
    assert code == 0, output                                # t_long: the base of t, two processes
    losses = [[m["loss"] for m in sft_result(homes[0], tag)["metrics"] if "loss" in m] for tag in ("t", "t_long")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert sft_result(homes[0], "t_long")["meta"]["loop_state"]["use_rope"] is False


@pytest.mark.parametrize("change, why", [
    (lambda home: None, "no base model in"),
    (lambda home: model.atomic_write(sft_base(home) / "meta_000003.json", json.dumps({**model.read_meta(home / "base_checkpoints/t", 3), "steps": 9})), "at step 3 of 9: finish it first"),
    (lambda home: (sft_base(home), (home / "tokenizer/config.json").write_text((home / "tokenizer/config.json").read_text().replace("S+", "S"))), "another tokenizer"),
])
def test_a_base_model_that_will_not_do_is_refused_in_one_line(sft_home, monkeypatch, change, why):
    change(sft_home)
    monkeypatch.setattr(sys, "argv", sft_command(sft_home))
    with pytest.raises(SystemExit, match=why) as e:
        sft.starting_point(sft_config(sft_home, tag="t"), sft_home / "chatsft_checkpoints/t", model.tokenizer_hash(model.load_tokenizer(sft_home / "tokenizer")))
    assert "\n" not in str(e.value) and not (sft_home / "chatsft_checkpoints/t").exists()


@pytest.mark.parametrize("options, why", [(["--tag", ""], "which model"), (["--total-batch-size", "1000"], "multiple of max_seq_len x processes = 128 x 1"),
                                          (["--max-seq-len", "64k"], "--max-seq-len")])
def test_options_that_cannot_be_are_refused_in_one_line(sft_home, monkeypatch, options, why):
    monkeypatch.setattr(sys, "argv", sft_command(sft_home, *options))
    with pytest.raises(SystemExit, match=why) as e:
        sft.main()
    assert "\n" not in str(e.value)


def test_dry_run_counts_and_shows_every_source_and_trains_nothing(sft_home, monkeypatch, capsys):
    sft_base(sft_home)
    monkeypatch.setattr(sys, "argv", sft_command(sft_home, "--dry-run"))
    sft.main()
    out = capsys.readouterr().out
    assert "conversations        64 rows x 1 =        64" in out and re.search(r"conversations +=        98", out)
    assert out.count("\033[1mspellingbee, row") == 3 and "\033[32mapple is a fruit." in out
    assert not (sft_home / "chatsft_checkpoints").exists()


# ==== demo.py ===============================================================================================

DEMO_PY = Path(demo.__file__)
CORPUS_FILES = ("shard_00000.parquet", "shard_06542.parquet", "conversations.jsonl", "conversations_val.jsonl", "words.txt")


@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory):
    return demo.write_corpus(tmp_path_factory.mktemp("demo") / "data" / "demo")


def demo_texts(folder, shard):
    return pq.read_table(folder / f"shard_{shard:05d}.parquet")["text"].to_pylist()


def demo_pairs(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# ---- the corpus ----

def test_demo_corpus_has_climbmix_layout(demo_corpus):
    for shard in (0, 6542):
        file = pq.ParquetFile(demo_corpus / f"shard_{shard:05d}.parquet")
        assert [(f.name, str(f.type)) for f in file.schema_arrow] == [("text", "string")]
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        assert all(g.num_rows == 1024 for g in groups[:-1]) and groups[-1].num_rows <= 1024
        assert {g.column(0).compression for g in groups} == {"ZSTD"}


def test_demo_corpus_is_the_same_on_every_run_and_is_made_once(demo_corpus, tmp_path, capsys):
    command = [sys.executable, DEMO_PY, "corpus", "--base-dir", tmp_path]       # another process, another hash seed
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    for name in CORPUS_FILES:
        assert (tmp_path / "data/demo" / name).read_bytes() == (demo_corpus / name).read_bytes(), name
    before = {name: (demo_corpus / name).stat().st_mtime_ns for name in CORPUS_FILES}
    demo.write_corpus(demo_corpus)
    assert "already" in capsys.readouterr().out
    assert before == {name: (demo_corpus / name).stat().st_mtime_ns for name in CORPUS_FILES}


def test_demo_training_and_validation_documents_are_disjoint(demo_corpus):
    train, val = demo_texts(demo_corpus, 0), demo_texts(demo_corpus, 6542)
    assert 0.04 < len(val) / (len(train) + len(val)) < 0.06
    assert not set(train) & set(val)
    assert sum(map(len, train)) > 1_000_000 and all(text.strip() for text in train + val)


def test_demo_no_training_pair_comes_from_a_validation_document(demo_corpus):
    pairs, pairs_val = demo_pairs(demo_corpus, "conversations.jsonl"), demo_pairs(demo_corpus, "conversations_val.jsonl")
    assert len(pairs) > 1000 and len(pairs_val) > 50
    for messages in pairs + pairs_val:
        assert [m["role"] for m in messages] == ["user", "assistant"] and all(m["content"].strip() for m in messages)
    questions = lambda pairs: {messages[0]["content"] for messages in pairs}
    assert not questions(pairs) & questions(pairs_val)
    texts = {shard: "".join(" ".join(text.split()) + "\n" for text in demo_texts(demo_corpus, shard)) for shard in (0, 6542)}
    for messages in pairs_val:
        assert messages[1]["content"] in texts[6542]
    for messages in pairs[::50]:
        assert messages[1]["content"] in texts[0]


def test_demo_knows_what_os_path_join_does(demo_corpus):
    pairs = demo_pairs(demo_corpus, "conversations.jsonl") + demo_pairs(demo_corpus, "conversations_val.jsonl")
    answer = next(a["content"] for q, a in pairs if " os.path.join" in q["content"])
    assert answer.startswith("Join two or more pathname components")


def test_demo_words_are_lowercase_words(demo_corpus):
    words = (demo_corpus / "words.txt").read_text().split("\n")[:-1]
    assert len(words) > 1000 and words == sorted(set(words))
    assert all(word.isalpha() and word.isascii() and word.islower() for word in words) and "string" in words


def test_demo_gathers_docstrings_without_running_anything(tmp_path):
    (tmp_path / "trap.py").write_text('"""A module whose import would end the program."""\nraise SystemExit\n'
                                      'def f():\n    """Does a thing that is long enough."""\n'
                                      'class C:\n    """Holds things that are long enough."""\n'
                                      '    def g(self):\n        """Does a thing that is long enough."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text('"""Tests are no documentation of anything."""\n')
    documents = [members for _, members in demo.gather(tmp_path) if any("trap" in name for _, name, _ in members)]
    assert sorted(documents) == [       # a document each; g's docstring is f's, so it is left out
        [("class", "trap.C", "Holds things that are long enough.")],
        [("function", "trap.f", "Does a thing that is long enough.")],
        [("module", "trap", "A module whose import would end the program.")]]
    assert not any("hidden" in text for text, _ in demo.gather(tmp_path))


def test_demo_corpus_without_standard_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "gather", lambda: [])
    with pytest.raises(SystemExit, match="use another one"):
        demo.write_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


# ---- the task ----

def demo_generator(seed=0):
    return torch.Generator().manual_seed(seed)


DEMO_STREAM = torch.cat([torch.tensor([431]), torch.arange(400)])      # <|bos|> and text; every id below 440


def demo_key_of(fact):
    return (fact - demo.FACT) // demo.N_VALUES


def demo_is_fact(ids):
    return (ids >= demo.FACT) & (ids < demo.KEY)


def test_demo_the_answer_is_the_fact_of_the_key_asked():
    rows, _ = demo.make_rows(DEMO_STREAM, 200, 96, demo_generator(), final=True)
    assert rows.shape == (200, 97) and (rows[:, 0] == 431).all()
    for row in rows:
        *context, key, answer = row.tolist()
        facts = [token for token in context if demo.FACT <= token < demo.KEY]
        assert len({demo_key_of(fact) for fact in facts}) == len(facts) == 4 and not any(token >= demo.KEY for token in context)
        assert [fact for fact in facts if demo_key_of(fact) == key - demo.KEY] == [answer]      # one fact of that key, and it is the answer
    assert rows[:, -2].unique().tolist() == list(range(demo.KEY, demo.KEY + 8))


def test_demo_training_rows_have_one_question_after_one_to_four_facts():
    rows, weights = demo.make_rows(DEMO_STREAM, 400, demo.T, demo_generator())
    assert rows.shape == (400, demo.T + 1) and weights.shape == (400, demo.T)
    counts = set()
    for row, weight in zip(rows, weights):
        question = (row >= demo.KEY).nonzero().item()
        facts = [i for i in range(question) if demo_is_fact(row[i])]
        counts.add(len(facts))
        assert row[question + 1] in row[facts] and demo_key_of(row[question + 1]) == row[question] - demo.KEY
        expected = torch.ones(demo.T)                           # weight[i] belongs to the prediction of token i + 1
        expected[[i - 1 for i in facts] + [question - 1]] = 0
        expected[question] = demo.WEIGHT
        assert weight.equal(expected) and not demo_is_fact(row[question + 2:]).any()
    assert counts == {1, 2, 3, 4}


def demo_answering(choose):
    """A model whose argmax at the last position is choose(row)."""
    def model(idx):
        logits = torch.zeros(*idx.shape, demo.VOCAB)
        for b, row in enumerate(idx):
            logits[b, -1, choose(row)] = 9.0
        return logits
    return model


def test_demo_a_perfect_copy_scores_all_and_guessing_the_floor():
    rows, _ = demo.make_rows(DEMO_STREAM, 500, 128, demo_generator(), final=True)
    copy = demo_answering(lambda row: next(t for t in row if demo_is_fact(t) and demo_key_of(t) == row[-1] - demo.KEY))
    assert demo.retrieval(copy, rows)[0] == 500
    guess = demo_answering(lambda row: next(t for t in row if demo_is_fact(t)))
    assert demo.retrieval(guess, rows)[0] / 500 == pytest.approx(demo.FLOOR, abs=0.06)


def test_demo_bits_per_byte_counts_the_last_tokens_and_no_bos():
    calls = []
    def model(idx, targets, reduction):                         # ln 2 nats a token, but the first half of a row is never looked at
        calls.append(idx.shape)
        losses = torch.full(targets.shape, 0.6931472)
        losses[:, :-demo.TAIL] = 1e9
        return losses
    windows = torch.zeros(3, 65, dtype=torch.long)
    windows[0, -2] = 1
    assert demo.tail_bits_per_byte(model, windows, torch.tensor([1, 0])) == pytest.approx(1.0)
    assert demo.tail_bits_per_byte(model, windows, torch.tensor([2, 0])) == pytest.approx(0.5)


# ---- training and remedies ----

def test_demo_drope_is_rope_until_the_switch_and_the_same_on_every_run(monkeypatch):
    seen = []
    class Watched(demo.GPT):
        def forward(self, *args, **kwargs):
            losses = super().forward(*args, **kwargs)
            seen.append((self.use_rope, losses.sum().item()))
            return losses
    monkeypatch.setattr(demo, "GPT", Watched)
    def run(arm):
        seen.clear()
        state = demo.train(arm, 3, 4, DEMO_STREAM.repeat(3)).state_dict()
        return [rope for rope, _ in seen], [loss for _, loss in seen], state
    rope, losses, _ = run("RoPE")
    drope, losses_drope, state = run("DroPE 50")
    assert rope == [True] * 4 and drope == [True] * 2 + [False] * 2
    assert losses[:2] == losses_drope[:2] and losses[3:] != losses_drope[3:]
    assert run("NoPE")[0] == [False] * 4
    again = run("DroPE 50")
    assert again[1] == losses_drope and all(state[k].equal(v) for k, v in again[2].items())


def test_demo_remedies_change_nothing_within_the_training_length():
    torch.manual_seed(0)
    model = demo.GPT(demo.GPTConfig(demo.T, demo.VOCAB, 2, 2, 2, 64))
    model.init_weights()
    for block in model.transformer.h:
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    idx = torch.randint(0, 440, (2, 4 * demo.T))
    with torch.no_grad():
        plain, short = model(idx), model(idx[:, :demo.T])
        demo.set_remedies(model)
        torch.testing.assert_close(model(idx), plain)
        for remedies in (dict(c=0.4), dict(tables=demo.ntk_tables)):
            demo.set_remedies(model, **remedies)
            torch.testing.assert_close(model(idx[:, :demo.T]), short)
            assert (model(idx) - plain)[:, -1].abs().max() > 1e-3
        demo.set_remedies(model, c=0.4)
        torch.testing.assert_close(model(idx)[:, :demo.T], plain[:, :demo.T])


def test_demo_temperature_multiplies_the_logits_of_each_query():
    model = demo.GPT(demo.GPTConfig(demo.T, demo.VOCAB, 1, 1, 1, 32))
    demo.set_remedies(model, c=0.5)
    q, k, v = torch.randn(3, 1, 1, 2 * demo.T, 32)
    beta = torch.tensor([max(1.0, 1 + 0.5 * torch.tensor(n / demo.T).log().item()) for n in range(1, 2 * demo.T + 1)])
    scores = (q @ k.mT / 32 ** 0.5 * beta[:, None]).masked_fill(torch.ones(2 * demo.T, 2 * demo.T).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(model.transformer.h[0].attn.attend(q, k, v), scores.softmax(-1) @ v)


# ---- results ----

def demo_results(seeds=1, **right_far):
    """Results in which all is right but, as trained and at the greatest length, the shares that are given."""
    results = []
    for seed in range(seeds):
        for name in demo.LINES:
            for remedy in ("as trained", "temperature fitted"):
                share = right_far.get(name.replace(" ", "_"), 1.0) if remedy == "as trained" else 1.0
                right = {str(n): demo.PROMPTS for n in demo.LENGTHS[:-1]} | {str(demo.LENGTHS[-1]): round(share * demo.PROMPTS) + seed}
                results.append(dict(seed=seed, name=name, remedy=remedy, c=0.0, right=right, bpb={str(n): 2.0 + 0.3 * ("DroPE" in name) for n in demo.LENGTHS}))
    return results


def test_demo_intervals_are_wilsons_for_one_seed_and_the_range_for_several():
    assert demo.wilson(128, 256) == pytest.approx((0.43920, 0.56080), abs=1e-5)
    rates, _ = demo.summarize(demo_results(RoPE=0.5))
    assert rates["RoPE", "as trained"][8] == pytest.approx((0.5, 0.43920, 0.56080), abs=1e-5)
    rates, bpb = demo.summarize(demo_results(seeds=3, RoPE=0.5))
    assert rates["RoPE", "as trained"][8] == pytest.approx((129 / 256, 128 / 256, 130 / 256))
    assert bpb["DroPE 50", "as trained"][1] == pytest.approx(2.3)


def test_demo_conclusion_follows_from_the_numbers():
    helped = demo.conclusion(demo_results(RoPE=0.2))
    assert "DroPE buys retrieval" in helped and "pays for it" in helped and "beats neither" in helped
    assert "does not buy" in demo.conclusion(demo_results())
    hurt = demo.conclusion(demo_results(DroPE_50=0.2, DroPE_75=0.2))
    assert "worse than RoPE" in hurt and "does not buy" in hurt


def test_demo_goes_through_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    """All arms, a few steps, in this process: results, table, conclusion, and a figure that is not blank."""
    import base64
    import pyarrow as pa
    monkeypatch.setattr(demo, "PROMPTS", 8)
    monkeypatch.setattr(demo, "SCALES", (0.0, 0.4))
    for shard in (0, 6542):
        pq.write_table(pa.table({"text": ["some words of text, " * 60] * 2}), tmp_path / f"shard_{shard:05d}.parquet")
    (tmp_path / "tokenizer.tiktoken").write_text("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
    (tmp_path / "config.json").write_text(json.dumps({"pat_str": r"\S+|\s+", "special_tokens": {"<|bos|>": 256}}))
    threads = torch.get_num_threads()
    jobs = [(arm, 0, 2, tmp_path, tmp_path, tmp_path / f"{arm}.json") for arm in demo.ARMS]
    results = [r for job in jobs for r in demo.run_arm(job)]
    torch.set_num_threads(threads)
    monkeypatch.setattr(demo, "train", None)                    # a second run finds the results of the first
    assert [r for job in jobs for r in demo.run_arm(job)] == results
    assert {(r["name"], r["remedy"]) for r in results} == {(n, r) for n in demo.LINES for r in ("as trained", "temperature fitted")}
    assert len(demo.table(results).splitlines()) == 2 + 2 * len(demo.LINES)
    assert "So at this scale" in demo.conclusion(results)
    figure = tmp_path / "figures" / "demo.png"
    assert demo.draw(results, figure)
    import matplotlib.image
    pixels = matplotlib.image.imread(figure)
    assert pixels.shape[0] > 300 and pixels.shape[1] > 1000 and len({tuple(p) for p in (pixels[::3, ::3, :3].reshape(-1, 3) * 255).astype(int)}) > 20
    monkeypatch.setitem(sys.modules, "matplotlib", None)        # as where it is not installed
    assert not demo.draw(results, tmp_path / "none.png") and not (tmp_path / "none.png").exists()
    assert "matplotlib is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("args, message", [(["raport"], "unknown"), (["report"], "--tag"), (["--seeds", "0"], "--seeds 0"),
                                           (["report", "--tag", "d9_9tpp"], "pretrain.py --tag d9_9tpp")])
def test_demo_bad_use_is_one_line(args, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["demo.py", *args] + ["--base-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match=message) as stop:
        demo.main()
    assert "\n" not in stop.value.code and not list(tmp_path.iterdir())


# ==== modeling_nanochat.py and export_hf.py =================================================================

HF5 = int(transformers.__version__.split(".")[0]) >= 5
HF_SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>", "<|python_start|>",
              "<|python_end|>", "<|output_start|>", "<|output_end|>"]
HF_NEVER = 9999                         # an id that does not exist, as eos: generation does not stop
HF_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
              r"|\s*[\r\n]|\s+(?!\S)|\s+")


# ---- A tiny tokenizer, two tiny models (RoPE and DroPE), their exports ------------------------------------------

def hf_make_tokenizer(folder, vocab_size=512):
    """Byte pair encoding the slow way, over a few words; stored as tok.py stores it."""
    import base64
    text = " " + export_hf.__doc__ + inspect.getsource(random)[:9000]
    words = [[bytes([b]) for b in w.encode()] for w in text.split(" ")]
    ranks = {bytes([i]): i for i in range(256)}
    while len(ranks) < vocab_size - len(HF_SPECIAL):
        pairs = {}
        for w in words:
            for pair in zip(w, w[1:]):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max((p for p in pairs if p[0] + p[1] not in ranks), key=lambda p: (pairs[p], p))
        ranks[best[0] + best[1]] = len(ranks)
        for w in words:
            for i in range(len(w) - 1, 0, -1):
                if (w[i - 1], w[i]) == best:
                    w[i - 1:i + 1] = [best[0] + best[1]]
    lines = "".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items())
    atomic_write(folder / "tokenizer.tiktoken", lines)
    special = {t: len(ranks) + i for i, t in enumerate(HF_SPECIAL)}
    atomic_write(folder / "config.json", json.dumps({"pat_str": HF_PATTERN, "special_tokens": special}))


def hf_make_checkpoint(folder, use_rope, seed):
    """A checkpoint of random weights, large enough that attention and softcap matter."""
    torch.manual_seed(seed)
    config = GPTConfig(sequence_len=64, vocab_size=512, n_layer=3, n_head=2, n_kv_head=2, n_embd=64)
    model = GPT(config, use_rope)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    optimizer = types.SimpleNamespace(state_dict=lambda: {"state": {}, "param_groups": []})
    meta = {"step": 7, "steps": 7, "switch": 7 if use_rope else 4, "val_bpb": 1.2345,
            "total_batch_size": 1024, "max_seq_len": 64, "model_config": vars(config), "user_config": {},
            "revision": "abc123", "loop_state": {"use_rope": use_rope}}
    save_checkpoint(folder, 7, model, optimizer, {}, meta)


HF_TAGS = {"d3_9tpp": True, "d3_9tpp_drope_50": False, "d3_9tpp_drope_50_long": False}


@pytest.fixture(scope="module")
def hf_out(tmp_path_factory):
    """The base folder: a tokenizer, checkpoints and exports of three tags."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("hf") / "out"
    patch = pytest.MonkeyPatch()
    patch.setenv("NANOCHAT_BASE_DIR", str(out))
    hf_make_tokenizer(out / "tokenizer")
    for i, (tag, use_rope) in enumerate(HF_TAGS.items()):
        if not tag.endswith("_long"):
            hf_make_checkpoint(out / "base_checkpoints" / tag, use_rope, seed=i)
        hf_make_checkpoint(out / "chatsft_checkpoints" / tag, use_rope, seed=10 + i)
        export_hf.main(["--tag", tag])
    yield out
    patch.undo()


@pytest.fixture(scope="module", params=["rope", "drope"])
def hf_pair(request, hf_out):
    """model.py's model with its weights rounded to bfloat16, and the export of the same checkpoint, both float32."""
    tag = "d3_9tpp" if request.param == "rope" else "d3_9tpp_drope_50"
    ours, _ = load_model(hf_out / "base_checkpoints" / tag)
    for p in ours.parameters():
        p.data = p.data.bfloat16().float()
    return ours, hf_load(hf_out / "hf_base" / tag)


def hf_load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **{"dtype": torch.float32, **kwargs})


def hf_uncompiled():
    """transformers compiles flex attention for every shape, a minute here; its arithmetic is the same without."""
    return torch.compiler.set_stance("force_eager")


def hf_ids(batch, T, seed=0):
    return torch.randint(0, 503, (batch, T), generator=torch.Generator().manual_seed(seed))


def hf_padded(lengths, side="left", seed=0):
    """Random rows of several lengths as one padded batch, its mask, and the rows."""
    rows, T = [hf_ids(1, n, seed + n)[0] for n in lengths], max(lengths)
    ids, mask = torch.full((len(rows), T), 503), torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask, rows


def hf_greedy(ours, row, n):
    """Greedy continuation without a cache, by model.py."""
    for _ in range(n):
        row = torch.cat([row, ours(row[None])[0, -1].argmax()[None]])
    return row


# ---- The model -------------------------------------------------------------------------------------------------

def test_hf_parameter_counts_of_d18_and_d20():
    for depth, heads, inner, total in ((18, 9, 3072, 362_151_936), (20, 10, 3456, 480_378_880)):
        with torch.device("meta"):
            model = hf.NanoChatForCausalLM(hf.NanoChatConfig(
                hidden_size=128 * heads, intermediate_size=inner, num_hidden_layers=depth, num_attention_heads=heads))
        assert sum(p.numel() for p in model.parameters()) == total and not list(model.buffers())


@pytest.mark.parametrize("attn", ["eager", "sdpa", "flex_attention"])
def test_hf_logits_equal_model_py_with_and_without_padding(hf_pair, attn):
    ours, theirs = hf_pair
    theirs.set_attn_implementation(attn)
    with torch.no_grad(), hf_uncompiled():
        for T in (1, 2, 37, 150):
            ids = hf_ids(2, T)
            assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)
        for side in ("left", "right"):
            ids, mask, rows = hf_padded([5, 21, 13], side)
            logits = theirs(ids, attention_mask=mask).logits
            for got, row, m in zip(logits, rows, mask.bool()):
                assert torch.allclose(got[m], ours(row[None])[0], atol=1e-4, rtol=0)
    theirs.set_attn_implementation("sdpa")


def test_hf_bfloat16_logits_equal_model_py(hf_out):
    for tag in ("d3_9tpp", "d3_9tpp_drope_50"):
        ours, _ = load_model(hf_out / "base_checkpoints" / tag, dtype=torch.bfloat16)
        theirs, ids = hf_load(hf_out / "hf_base" / tag, dtype=torch.bfloat16), hf_ids(2, 40)
        with torch.no_grad():
            a, b = theirs(ids).logits, ours(ids)
        assert a.dtype == torch.float32 and (a - b).abs().mean() < 0.02


def test_hf_greedy_generation_equals_a_loop_without_cache(hf_pair):
    ours, theirs = hf_pair
    ids, mask, rows = hf_padded([5, 14, 9])
    want = torch.stack([hf_greedy(ours, row, 12)[-12:] for row in rows])
    kwargs = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=HF_NEVER, pad_token_id=503)
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(theirs.generate(ids, **kwargs, **more)[:, -12:], want), more
    one = {**kwargs, "attention_mask": mask[1:2]}
    assert torch.equal(theirs.generate(ids[1:2], **one, assistant_model=theirs)[0, -12:], want[1])
    assert torch.equal(theirs.generate(ids[1:2], **one, prompt_lookup_num_tokens=2)[0, -12:], want[1])


def test_hf_beams_find_likelier_texts_and_sampling_follows_the_seed(hf_pair):
    ours, theirs = hf_pair
    ids, mask, rows = hf_padded([5, 14, 9])
    kwargs = dict(attention_mask=mask, max_new_tokens=6, eos_token_id=HF_NEVER, pad_token_id=503)

    def likelihood(out):
        logp = theirs(out, attention_mask=torch.cat([mask, mask.new_ones(3, 6)], 1)).logits[:, -7:-1].log_softmax(-1)
        return logp.gather(2, out[:, -6:, None]).sum()

    with torch.no_grad():
        greedy, beams = (theirs.generate(ids, **kwargs, do_sample=False, num_beams=n) for n in (1, 6))
        assert likelihood(beams) > likelihood(greedy)
        assert torch.equal(*(theirs.generate(ids, **kwargs, do_sample=False, num_beams=3, use_cache=c)
                             for c in (True, False)))
        samples = []
        for seed, use_cache in ((0, True), (0, False), (1, True)):
            torch.manual_seed(seed)
            samples.append(theirs.generate(ids, **kwargs, do_sample=True, top_k=0, use_cache=use_cache))
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


def test_hf_chunks_through_a_cache_equal_one_pass(hf_pair):
    ours, theirs = hf_pair
    ids, cache, pieces = hf_ids(2, 30), None, []
    with torch.no_grad():
        for part in ids.split([11, 1, 13, 5], dim=1):
            out = theirs(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
        assert torch.allclose(torch.cat(pieces, 1), ours(ids), atol=1e-4, rtol=0)


def test_hf_packed_rows_keep_documents_apart(hf_pair):
    ours, theirs = hf_pair
    ids = hf_ids(1, 30)
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with torch.no_grad(), hf_uncompiled():
        for attn in ("eager", "sdpa", "flex_attention"):
            theirs.set_attn_implementation(attn)
            packed = theirs(ids, position_ids=positions).logits
            apart = torch.cat([ours(ids[:, :12]), ours(ids[:, 12:])], 1)
            assert torch.allclose(packed, apart, atol=1e-4, rtol=0), attn
    theirs.set_attn_implementation("sdpa")


def test_hf_loss_shifts_labels_and_divides_by_num_items_in_batch(hf_pair):
    ours, theirs = hf_pair
    ids = hf_ids(2, 20)
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        targets = torch.where(labels[:, 1:] == -100, -1, labels[:, 1:])
        total, count = ours(ids[:, :-1], targets), (targets != -1).sum()
        assert torch.allclose(theirs(ids, labels=labels).loss, total / count, atol=1e-5)
        assert torch.allclose(theirs(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss, total / 7, atol=1e-4)


def test_hf_logits_to_keep_hidden_states_attentions_embeds_and_tuples(hf_pair):
    ours, theirs = hf_pair
    theirs.set_attn_implementation("eager")
    ids = hf_ids(2, 20)
    with torch.no_grad():
        full = theirs(ids, output_hidden_states=True, output_attentions=True)
        assert torch.allclose(theirs(ids, logits_to_keep=3).logits, full.logits[:, -3:], atol=1e-5)
        some = theirs(ids, logits_to_keep=torch.tensor([0, 7])).logits
        assert torch.allclose(some, full.logits[:, [0, 7]], atol=1e-5)
        assert len(full.hidden_states) == 4 and torch.equal(full.hidden_states[0], theirs.get_input_embeddings()(ids))
        assert torch.equal(full.hidden_states[-1], theirs.model(ids).last_hidden_state)
        assert [tuple(a.shape) for a in full.attentions] == [(2, 2, 20, 20)] * 3
        assert all(torch.allclose(a.sum(-1), torch.ones(2, 2, 20)) for a in full.attentions)
        embedded = theirs(inputs_embeds=theirs.get_input_embeddings()(ids))
        assert torch.allclose(embedded.logits, full.logits, atol=1e-5)
        assert torch.allclose(theirs(ids, return_dict=False)[0], full.logits, atol=1e-5)
    theirs.set_attn_implementation("sdpa")


@pytest.mark.parametrize("reentrant", [False, True])
def test_hf_gradient_checkpointing_gives_equal_gradients(hf_pair, reentrant):
    _, theirs = hf_pair
    ids, gradients = hf_ids(2, 16), []
    theirs.train()
    for checkpointing in (False, True):
        if checkpointing:
            theirs.gradient_checkpointing_enable({"use_reentrant": reentrant})
        theirs.zero_grad()
        theirs(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in theirs.parameters()])
    theirs.gradient_checkpointing_disable()
    theirs.get_input_embeddings()._forward_hooks.clear()    # transformers 5 leaves its own behind
    theirs.zero_grad()
    theirs.eval()
    assert all(g.abs().sum() > 0 and torch.allclose(g, h, atol=1e-6) for g, h in zip(*gradients))


def test_hf_autocast_trains_and_generates(hf_pair):
    _, theirs = hf_pair
    ids = hf_ids(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for attn in ("eager", "sdpa"):
            theirs.set_attn_implementation(attn)
            loss = theirs(ids, labels=ids).loss
            assert loss.dtype == torch.float32 and torch.isfinite(loss)
            theirs.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, cache_implementation="static")
    theirs.set_attn_implementation("sdpa")


def test_hf_compiles_without_graph_break(hf_pair):
    _, theirs = hf_pair
    ids, mask, _ = hf_padded([9, 16])
    kwargs = {"attention_mask": mask, "labels": ids} if theirs.config.use_rope else {}
    compiled = torch.compile(theirs, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.allclose(compiled(ids, **kwargs).logits, theirs(ids, **kwargs).logits, atol=1e-5)
    torch._dynamo.reset()


def test_hf_warns_past_max_position_embeddings_and_works(hf_pair):
    ours, theirs = hf_pair
    warned, limit = [], theirs.config.max_position_embeddings
    module = sys.modules[type(theirs).__module__]
    module.logger, logger = types.SimpleNamespace(warning_once=warned.append), module.logger
    theirs.config.max_position_embeddings = 16
    try:
        ids = hf_ids(1, 40)
        with torch.no_grad():
            theirs(ids[:, :16])
            assert not warned
            assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)
            assert "max_position_embeddings 16" in warned[0]
        assert theirs.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 43)
    finally:
        theirs.config.max_position_embeddings, module.logger = limit, logger


def test_hf_fresh_weights_begin_as_in_model_py():
    torch.manual_seed(0)
    model = hf.NanoChatForCausalLM(hf.NanoChatConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=640, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=0, eos_token_id=0, pad_token_id=0))
    uniform = 256 ** -0.5
    want = {"embed_tokens": 0.8, "lm_head": 0.001, "q_proj": uniform, "k_proj": uniform, "v_proj": uniform, "o_proj": 0,
            "gate_proj": 0.4 * uniform, "up_proj": 0.4 * uniform, "down_proj": 0}
    for name, p in model.named_parameters():
        std = next(s for key, s in want.items() if key in name)
        assert p.std().item() == pytest.approx(std, rel=0.02), name
        if std == uniform or std == 0.4 * uniform:
            assert p.abs().max() <= 3 ** 0.5 * std


def test_hf_a_missing_weight_is_initialised_and_the_others_are_kept(hf_out, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(hf_out / "hf_base" / "d3_9tpp", tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"], weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = hf_load(folder)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.05)
    state = model.state_dict()
    assert state["model.layers.1.mlp.down_proj.weight"].abs().max() == 0
    assert all(torch.equal(state[k], w.float()) for k, w in weights.items())


def test_hf_save_and_reload_round_trip(hf_out, tmp_path):
    model = hf_load(hf_out / "hf_sft" / "d3_9tpp_drope_50", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(hf_out / "hf_sft" / "d3_9tpp_drope_50", trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = hf_load(tmp_path, dtype="auto")
    assert again.config.use_rope is False and again.config.hidden_act == "swiglu" and again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    chat = [{"role": "user", "content": "Hi <|bos|>"}]
    reloaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert reloaded.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
    assert again.generation_config.eos_token_id == 507
    base = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(base).__name__ == "NanoChatModel"
    assert torch.equal(base.embed_tokens.weight, model.model.embed_tokens.weight)


def test_hf_resized_vocabulary_keeps_the_old_rows(hf_out):
    model = hf_load(hf_out / "hf_base" / "d3_9tpp")
    before = model.lm_head.weight.detach().clone()
    model.resize_token_embeddings(520)
    assert model(hf_ids(1, 4)).logits.shape == (1, 4, 520) and torch.equal(model.lm_head.weight[:512], before)


@pytest.mark.skipif(not HF5, reason="transformers 4.57 has no nanochat class of its own")
def test_hf_without_trust_remote_code_transformers_own_class_refuses(hf_out):
    with pytest.raises((KeyError, ValueError)):
        AutoModelForCausalLM.from_pretrained(hf_out / "hf_sft" / "d3_9tpp")


def test_hf_config_refuses_what_this_class_does_not_compute():
    for bad in ({"hidden_act": "relu2"}, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0}}):
        with pytest.raises(ValueError, match="only"):
            hf.NanoChatConfig(**bad)
    assert hf.NanoChatConfig(hidden_act="silu").hidden_act == "silu"


# ---- Tokenizer and chat ----------------------------------------------------------------------------------------

HF_TEXT = ["Hi there", "é ü ß 中文 🙂👩‍👩‍👧", "12345 6 789", "don't HE'LL 'ſ", " \n\n \t x", "<|bos|>",
           "<|", "|>", "\x00\x7f\u00a0", "aaaa", "#", "\r\n"]
HF_CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How many r in strawberry?"},
    {"role": "assistant", "content": [
        {"type": "text", "text": "Let me count. 🙂"}, {"type": "python", "text": "'strawberry'.count('r')"},
        {"type": "python_output", "text": "3"}, {"type": "text", "text": "Three.\n\n#### 3"}]},
    {"role": "user", "content": " Thanks\n"},
    {"role": "assistant", "content": "You're welcome 🙂"}]


def hf_render(enc, messages):
    """Ids and loss mask of a conversation, written out: control tokens by id, everything else as ordinary text."""
    ids, mask = [enc._special_tokens["<|bos|>"]], [0]

    def add(trained, *parts):
        for part in parts:
            new = [enc._special_tokens[part[0]]] if isinstance(part, list) else enc.encode_ordinary(part)
            ids.extend(new)
            mask.extend([trained] * len(new))

    if messages[0]["role"] == "system":
        joined = messages[0]["content"] + "\n\n" + messages[1]["content"]
        messages = [{"role": "user", "content": joined}] + messages[2:]
    for message in messages:
        if message["role"] == "user":
            add(0, ["<|user_start|>"], message["content"], ["<|user_end|>"])
            continue
        add(0, ["<|assistant_start|>"])
        parts = message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                add(1, part["text"])
            elif part["type"] == "python":
                add(1, ["<|python_start|>"], part["text"], ["<|python_end|>"])
            else:
                add(0, ["<|output_start|>"], part["text"], ["<|output_end|>"])
        add(1, ["<|assistant_end|>"])
    return ids, mask


@pytest.fixture(scope="module", params=["trusted", "plain"])
def hf_tok(request, hf_out):
    """The tokenizer of the chat model, by our class and by transformers' own."""
    trusted = request.param == "trusted"
    tokenizer = AutoTokenizer.from_pretrained(hf_out / "hf_sft" / "d3_9tpp", trust_remote_code=trusted)
    assert (type(tokenizer).__name__ == "NanoChatTokenizer") == trusted
    return tokenizer


def hf_strings(n):
    """Varied strings: words, scripts, whitespace, digits, any code point."""
    rng, pieces = random.Random(0), HF_TEXT + ["the", " The", "'ll", "'VE", "12", " 3", "\n", "  ", "٣", "Ⅷ",
                                               "e\u0301", "한국", "()", "==", "\u3000"]
    points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    for i in range(n):
        some = pieces if i % 2 else list(map(chr, rng.choices(points[:0x3000] if i % 4 else points, k=12)))
        yield "".join(rng.choices(some, k=rng.randrange(12)))


def test_hf_tokenizer_json_equals_tiktoken_on_40000_strings(hf_out):
    from tokenizers import Tokenizer
    enc, strings = load_tokenizer(hf_out / "tokenizer"), list(hf_strings(40_000))
    tokenizer = Tokenizer.from_file(str(hf_out / "hf_sft" / "d3_9tpp" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    got = [e.ids for e in tokenizer.encode_batch_fast(strings, add_special_tokens=False)]
    assert got == enc.encode_ordinary_batch(strings, num_threads=1)


def test_hf_tokenizer_equals_tiktoken_and_decodes_what_it_encoded(hf_out, hf_tok):
    enc, strings = load_tokenizer(hf_out / "tokenizer"), list(hf_strings(500))
    got = hf_tok(strings, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert got == enc.encode_ordinary_batch(strings, num_threads=1)
    assert [hf_tok.decode(ids) for ids in got] == strings


def test_hf_special_tokens_are_these_nine(hf_out, hf_tok):
    added = {str(t): i for i, t in hf_tok.added_tokens_decoder.items()}
    assert added == {t: 503 + i for i, t in enumerate(HF_SPECIAL)} and len(hf_tok) == 512
    assert hf_tok.bos_token == "<|bos|>" and hf_tok.eos_token == hf_tok.pad_token == "<|assistant_end|>"
    assert hf_tok.unk_token is None and hf_tok.padding_side == "left"
    assert hf_tok.decode(list(range(503, 512)), skip_special_tokens=True) == ""
    base = AutoTokenizer.from_pretrained(hf_out / "hf_base" / "d3_9tpp", trust_remote_code=True)
    assert (base.bos_token, base.eos_token, base.pad_token, base.chat_template) == ("<|bos|>",) * 3 + (None,)


def test_hf_tokenizer_saved_by_the_other_version_is_the_same(hf_out, tmp_path):
    """The versions name the other special tokens differently: 5.x extra_, 4.57 additional_special_tokens."""
    folder = shutil.copytree(hf_out / "hf_sft" / "d3_9tpp", tmp_path / "other")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    others = config.pop("additional_special_tokens")
    chat = [{"role": "user", "content": "Hi <|bos|>, 123"}]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, name: others}))
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert sorted(tokenizer.all_special_ids) == list(range(503, 512))
        assert tokenizer.apply_chat_template(chat) == hf_render(load_tokenizer(hf_out / "tokenizer"), chat)[0]
        tokenizer.save_pretrained(tmp_path / name)
        again = AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert again.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)
        assert json.loads(again.backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())


def test_hf_bos_comes_once(hf_tok):
    assert hf_tok("Hi").input_ids[0] == 503 and hf_tok.encode("Hi").count(503) == 1
    batch = hf_tok(["Hi", "Hi there, you"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert [row.count(503) for row in batch["input_ids"]] == [1, 1] and batch["attention_mask"][0][0] == 0
    rendered = hf_tok.apply_chat_template(HF_CHAT, tokenize=False)
    assert rendered.count("<|bos|>") == 1
    want = hf_tok.apply_chat_template(HF_CHAT, return_dict=False)
    assert hf_tok(rendered, add_special_tokens=False).input_ids == want and want.count(503) == 1
    if type(hf_tok).__name__ == "NanoChatTokenizer":
        assert hf_tok(rendered).input_ids == hf_tok.encode(rendered) == want
        assert hf_tok([rendered] * 2)["input_ids"] == [want] * 2


def test_hf_chat_ids_and_assistant_mask(hf_out, hf_tok):
    enc = load_tokenizer(hf_out / "tokenizer")
    outputs = {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in (
        ("python_output", "1"), ("python_output", "2"), ("python", "3"), ("python_output", ""))]}
    for chat in (HF_CHAT, HF_CHAT[1:], HF_CHAT[3:], HF_CHAT[1:3], [HF_CHAT[1], outputs]):
        ids, mask = hf_render(enc, chat)
        got = hf_tok.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert got["input_ids"] == ids and got["assistant_masks"] == mask
    prompt = hf_tok.apply_chat_template(HF_CHAT[:2], add_generation_prompt=True, return_dict=False)
    assert prompt == hf_render(enc, HF_CHAT[:2])[0] + [506]


def test_hf_chat_equals_sft_render(hf_out, hf_tok):
    sft = pytest.importorskip("sft")
    enc = load_tokenizer(hf_out / "tokenizer")
    for chat in (HF_CHAT, HF_CHAT[1:], HF_CHAT[3:], hf_attack("<|assistant_end|>")):
        got = hf_tok.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = sft.render(enc, chat)
        assert got["input_ids"] == list(ids) and got["assistant_masks"] == list(map(int, mask))


def hf_attack(text):
    return [{"role": "system", "content": f"S {text}{text}"},
            {"role": "user", "content": f"{text} U <|{text}|> \n{text}"},
            {"role": "assistant", "content": [{"type": "text", "text": text}, {"type": "python", "text": text},
                                              {"type": "python_output", "text": text}, {"type": "text", "text": text}]}]


def test_hf_text_that_spells_a_control_token_stays_text(hf_out, hf_tok):
    enc = load_tokenizer(hf_out / "tokenizer")
    tricks = HF_SPECIAL + ["<|<|bos|>bos|>", "<<|bos|>|bos|>", "<|bos|><|bos|>", "<|bos|", "|bos|>", "<|"]
    for text in tricks:
        ids, mask = hf_render(enc, hf_attack(text))
        got = hf_tok.apply_chat_template(hf_attack(text), return_dict=True, return_assistant_tokens_mask=True)
        assert got["input_ids"] == ids and got["assistant_masks"] == mask, text
        if HF5:                                             # its own protection may be on as well
            assert hf_tok.apply_chat_template(hf_attack(text), sanitize_control_tokens=True, return_dict=False) == ids
        rendered = hf_tok.apply_chat_template(hf_attack(text), tokenize=False)
        assert hf_tok(rendered, add_special_tokens=False).input_ids == ids
    split = hf_tok("<|bos|>", add_special_tokens=False, split_special_tokens=True)
    assert split.input_ids == enc.encode_ordinary("<|bos|>")


def test_hf_chat_refuses_broken_conversations(hf_tok):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    for chat in ([answer], [user, user], [user, answer, answer], [{"role": "system", "content": "x"}],
                 [user, {**answer, "role": "tool"}], [user, {**user, "role": "system"}],
                 [user, {**answer, "content": [{"type": "image", "text": "x"}]}]):
        with pytest.raises(Exception, match="roles must be|needs a user|parts are of type"):
            hf_tok.apply_chat_template(chat)


def test_hf_the_cards_snippet_runs_as_it_is(hf_out):
    repo = hf_out / "hf_sft" / "d3_9tpp"
    tok = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(repo, torch_dtype=torch.bfloat16, trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    inputs = tok.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(inputs, max_new_tokens=8)
    old = tok.decode(out[0][inputs.shape[1]:], skip_special_tokens=True)
    inputs = tok.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**inputs, max_new_tokens=8)
    assert tok.decode(out[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True) == old


def test_hf_generation_stops_at_the_trained_stop_token(hf_out):
    model = hf_load(hf_out / "hf_sft" / "d3_9tpp")
    ids = hf_ids(1, 5)
    with torch.no_grad():
        free = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 5:].tolist()
        model.lm_head.weight[507] = model.lm_head.weight[free[3]] * 1.01        # the stop token wins where free[3] did
        out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 5:].tolist()
    assert out[-1] == 507 and len(out) <= 4
    assert hf_load(hf_out / "hf_base" / "d3_9tpp").generation_config.eos_token_id == 503


# ---- The export ------------------------------------------------------------------------------------------------

def test_hf_export_files_and_config(hf_out):
    common = {"config.json", "export.json", "generation_config.json", "model.safetensors", "modeling_nanochat.py",
              "tokenizer.json", "tokenizer_config.json"}
    for stage, more, stop in (("base", set(), 503), ("sft", {"chat_template.jinja"}, 507)):
        folder = hf_out / f"hf_{stage}" / "d3_9tpp"
        assert {p.name for p in folder.iterdir()} == common | more
        assert (folder / "modeling_nanochat.py").read_text() == Path(hf.__file__).read_text()
        assert json.loads((folder / "config.json").read_text()) == {
            "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat",
            "auto_map": {"AutoConfig": "modeling_nanochat.NanoChatConfig", "AutoModel": "modeling_nanochat.NanoChatModel",
                         "AutoModelForCausalLM": "modeling_nanochat.NanoChatForCausalLM"},
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "swiglu",
            "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "use_rope": True,
            "final_logit_softcapping": 15.0, "max_position_embeddings": 32768, "tie_word_embeddings": False,
            "use_cache": True, "bos_token_id": 503, "eos_token_id": stop, "pad_token_id": stop, "dtype": "bfloat16",
            "torch_dtype": "bfloat16"}
    assert {p.name for p in (hf_out / "hf_base").iterdir()} == {"d3_9tpp", "d3_9tpp_drope_50"}     # _long shares it
    assert {p.name for p in (hf_out / "hf_sft").iterdir()} == set(HF_TAGS)
    for tag, use_rope in HF_TAGS.items():
        for folder in (hf_out / "hf_sft" / tag, hf_out / "hf_base" / tag.removesuffix("_long")):
            assert AutoConfig.from_pretrained(folder, trust_remote_code=True).use_rope is use_rope


def test_hf_export_is_skipped_or_repeated_byte_for_byte(hf_out, capsys):
    folder = hf_out / "hf_sft" / "d3_9tpp"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    inode = folder.stat().st_ino
    export_hf.main(["--tag", "d3_9tpp", "--stage", "sft"])
    assert "skipped" in capsys.readouterr().out and folder.stat().st_ino == inode
    (folder / "export.json").write_text("{}")               # made of something else
    export_hf.main(["--tag", "d3_9tpp", "--stage", "sft"])
    assert folder.stat().st_ino != inode and {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert {p.name for p in folder.parent.iterdir()} == set(HF_TAGS)


@pytest.fixture
def hf_copy(hf_out, tmp_path, monkeypatch):
    """A copy of the base folder, to break things in."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "out"))
    return shutil.copytree(hf_out, tmp_path / "out")


def hf_refuses(args, *words):
    with pytest.raises(SystemExit) as e:
        export_hf.main(args)
    message = str(e.value.code)
    assert "\n" not in message and all(word in message for word in words), message


def test_hf_export_refuses_in_one_line_and_leaves_the_earlier_export(hf_copy):
    before = (hf_copy / "hf_base" / "d3_9tpp" / "model.safetensors").read_bytes()
    hf_refuses(["--tag", "d4_9tpp"], "d4_9tpp", "run_all.sh")
    hf_refuses([], "--tag")
    hf_refuses(["--tag", "../d3_9tpp"], "--tag")
    hf_refuses(["--tag", "d3_9tpp", "--stage", "rl"], "base, sft or all")
    meta_path = checkpoint_files(hf_copy / "base_checkpoints" / "d3_9tpp", 7)["meta"]
    meta = json.loads(meta_path.read_text())
    for change, words in (({"loop_state": {}}, ["use_rope", "meta_000007.json"]), ({"tokenizer": "other"}, ["tokenizer"]),
                          ({"model_config": {**meta["model_config"], "vocab_size": 640}}, ["512", "640"])):
        meta_path.write_text(json.dumps({**meta, **change}))
        hf_refuses(["--tag", "d3_9tpp"], *words)
    meta_path.write_text(json.dumps(meta))
    model = checkpoint_files(hf_copy / "base_checkpoints" / "d3_9tpp", 7)["model"]
    model.write_bytes(model.read_bytes()[:-100])
    hf_refuses(["--tag", "d3_9tpp"], "no checkpoint")
    shutil.rmtree(hf_copy / "tokenizer")
    hf_refuses(["--tag", "d3_9tpp_drope_50"], "tok.py")
    assert (hf_copy / "hf_base" / "d3_9tpp" / "model.safetensors").read_bytes() == before


def test_hf_export_that_cannot_be_written_leaves_the_earlier_one(hf_copy, monkeypatch):
    folder = hf_copy / "hf_base" / "d3_9tpp"
    (folder / "export.json").write_text("{}")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_hf, "save_file", full)
    hf_refuses(["--tag", "d3_9tpp"], "No space left", "untouched")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and len(list(folder.parent.iterdir())) == 2


# ---- Publishing, against a small stand-in for the hub -----------------------------------------------------------

@pytest.fixture
def hf_hub(hf_copy, monkeypatch):
    """Repositories (name -> path -> bytes) behind the parts of the hub's interface that a push and a pull use."""
    import base64
    import hashlib
    import re
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from urllib.parse import unquote, urlsplit
    from huggingface_hub import constants
    hub = types.SimpleNamespace(repos={}, blobs={}, requests=[], damage=None)

    def entry(path, data):
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        lfs = {"lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}
        return {"type": "file", "path": path, "size": len(data), "oid": oid, **(lfs if is_lfs(path) else {})}

    def is_lfs(path):
        return path.endswith((".pt", ".safetensors"))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def answer(self, body, status=200, **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self):
            where = unquote(urlsplit(self.path).path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {where}")
            if where.startswith("/_lfs/"):
                hub.blobs[where[6:]] = body
                return self.answer(b"")
            if where == "/api/repos/create":
                ask = json.loads(body)
                name = f"{ask['organization']}/{ask['name']}"
                hub.repos.setdefault(name, {})
                return self.answer({"url": f"{hub.url}/{name}", "name": name})
            if where == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            name = re.match(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/|$)", where)[1]
            if name not in hub.repos:
                return self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
            files = hub.repos[name]
            if "/tree/" in where:
                return self.answer([entry(*item) for item in files.items()])
            if "/preupload/" in where:
                return self.answer({"files": [{"path": f["path"], "uploadMode": "lfs" if is_lfs(f["path"]) else "regular",
                                               "shouldIgnore": False} for f in json.loads(body)["files"]]})
            if where.endswith("/objects/batch"):
                objects = [{**o, "actions": {"upload": {"href": f"{hub.url}/_lfs/{o['oid']}"}}}
                           for o in json.loads(body)["objects"]]
                return self.answer({"transfer": "basic", "objects": objects})
            if "/commit/" in where:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "lfsFile":
                        files[line["value"]["path"]] = hub.blobs[line["value"]["oid"]]
                if hub.damage in files:
                    files[hub.damage], hub.damage = files[hub.damage][:-1] + b"?", None
                return self.answer({"success": True, "commitOid": "0" * 40, "commitUrl": f"{hub.url}/{name}/commit/0"})
            data = files[where.split("/resolve/main/")[1]]
            self.answer(data, X_Repo_Commit="0" * 40, ETag=f'"{hashlib.sha256(data).hexdigest()}"')

        do_HEAD = do_POST = do_PUT = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    server.shutdown()


HF_NATIVE = {"README.md", "model_000007.pt", "meta_000007.json", "optim_000007_rank0.pt", "tokenizer/tokenizer.pkl",
             "tokenizer/token_bytes.pt"}


@pytest.mark.skipif(not HF5, reason="publishing is done from the pinned environment")
def test_hf_push_fills_four_repositories_and_pull_brings_them_back(hf_hub, hf_copy, tmp_path, monkeypatch, capsys):
    import io
    import pickle
    push = ["--tag", "d3_9tpp_drope_50", "--push", "me"]
    export_hf.main(push + ["--dry-run"])
    assert not hf_hub.requests and "4 repositories" in capsys.readouterr().out
    export_hf.main(push)
    name = "me/nanochat-d3-9tpp-drope-50"
    assert set(hf_hub.repos) == {f"{name}-{kind}" for kind in ("base", "sft", "hf-base", "hf-sft")}
    assert all(set(hf_hub.repos[f"{name}-{stage}"]) == HF_NATIVE for stage in ("base", "sft"))
    export = hf_copy / "hf_sft" / "d3_9tpp_drope_50"
    assert set(hf_hub.repos[f"{name}-hf-sft"]) == {"README.md", *(p.name for p in export.iterdir())}
    assert hf_hub.repos[f"{name}-hf-sft"]["model.safetensors"] == (export / "model.safetensors").read_bytes()
    enc = pickle.loads(hf_hub.repos[f"{name}-base"]["tokenizer/tokenizer.pkl"])         # our own bytes, a moment old
    assert isinstance(enc, tiktoken.Encoding) and enc.n_vocab == 512
    nbytes = torch.load(io.BytesIO(hf_hub.repos[f"{name}-base"]["tokenizer/token_bytes.pt"]), weights_only=True)
    assert nbytes.dtype == torch.int32 and nbytes.tolist()[:256] == [1] * 256 and nbytes.tolist()[503:] == [0] * 9

    # again: nothing is sent; a file that the hub has otherwise: only that one
    hf_hub.requests.clear()
    export_hf.main(push)
    assert not any("/commit/" in r for r in hf_hub.requests)
    hf_hub.repos[f"{name}-hf-sft"]["config.json"] = b"{}"
    export_hf.main(push)
    assert sum("/commit/" in r for r in hf_hub.requests) == 1
    assert "1 files sent and checked, 8 were" in capsys.readouterr().out

    # the way back, from files as the public ones are: bfloat16 embedding, no word about RoPE, no hashes
    def edit(path, change):
        for stage in ("base", "sft"):
            hf_hub.repos[f"{name}-{stage}"][path] = change(hf_hub.repos[f"{name}-{stage}"][path])

    def as_public(data):
        state, buffer = torch.load(io.BytesIO(data), weights_only=True), io.BytesIO()
        state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
        torch.save(state, buffer)
        return buffer.getvalue()

    edit("model_000007.pt", as_public)
    def without_ours(data):
        return json.dumps({k: v for k, v in json.loads(data).items() if k not in ("loop_state", "sha256")}).encode()

    edit("meta_000007.json", without_ours)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "back"))
    hf_hub.requests.clear()
    export_hf.main(["--pull", name])
    assert not any("tokenizer.pkl" in r for r in hf_hub.requests)
    assert "use_rope None; set to False" in capsys.readouterr().out
    export_hf.main(["--tag", "d3_9tpp_drope_50"])
    for stage in ("base", "sft"):
        ours, theirs = (base / f"hf_{stage}" / "d3_9tpp_drope_50" for base in (hf_copy, tmp_path / "back"))
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    export_hf.main(["--pull", f"{name}-hf-sft"])
    assert capsys.readouterr().out.count("there already") == 2
    (tmp_path / "back" / "tokenizer" / "tokenizer.tiktoken").write_text("eA== 0\n")
    hf_refuses(["--pull", name], "another tokenizer")


@pytest.mark.skipif(not HF5, reason="publishing is done from the pinned environment")
def test_hf_push_notices_damage_and_never_prints_the_token(hf_hub, hf_copy, monkeypatch, capsys):
    hf_hub.damage = "model.safetensors"
    hf_refuses(["--tag", "d3_9tpp", "--push", "me"], "model.safetensors", "Run the same command again")
    export_hf.main(["--tag", "d3_9tpp", "--push", "me"])                # sends that file again
    assert hf_hub.repos["me/nanochat-d3-9tpp-hf-base"]["model.safetensors"] == (
        hf_copy / "hf_base" / "d3_9tpp" / "model.safetensors").read_bytes()
    hf_refuses(["--pull", "me/nanochat-d7-9tpp"], "nanochat-d7-9tpp")
    hf_refuses(["--pull", "nanochat"], "USER/nanochat-d18")
    export_hf.main(["--push", "me", "--all", "--dry-run"])
    out = capsys.readouterr()
    assert "12 repositories" in out.out and "hf_secret" not in out.out + out.err
    assert export_hf.one_line(ValueError("\nbad hf_secret\nmore")) == "bad ***"
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    hf_refuses(["--tag", "d3_9tpp", "--push", "me"], "hf auth login")


def test_hf_card_tells_the_figures_and_the_licences(hf_out):
    card = export_hf.card("hf-sft", "d3_9tpp_drope_50_long", "me")
    front = card.split("---\n")[1]
    for line in ("license: mit", "- en", "library_name: transformers", "pipeline_tag: text-generation", "- openai/gsm8k",
                 "- allenai/tulu-v2-sft-long-mixture", "base_model: me/nanochat-d3-9tpp-drope-50-long-hf-base"):
        assert line in front.splitlines()
    for words in ("dropped before step 4 of 7", "7,168", "1.2345", "abc123", "non-commercial", "trust_remote_code"):
        assert words in card
    assert 'repo = "me/nanochat-d3-9tpp-drope-50-long-hf-sft"' in card and "{" + "repo}" not in card
    base = export_hf.card("base", "d3_9tpp", "me")
    assert "--pull me/nanochat-d3-9tpp\n" in base and "tulu" not in base and "base_model" not in base


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
