"""The specification, executable: python test_all.py [pytest's options]. CPU only, no network."""
import base64, json, math, os, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as M
import muon
import pretrain

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


def test_muon_update_is_one_graph():
    seen = []
    def count(graph, inputs):
        seen.append(graph)
        return graph.forward
    def update(weights, G, second):
        muon.cautious_step(weights, muon.normuon(muon.polar_express(G), second, 0.9), 0.02, 0.1)
        return weights
    torch._dynamo.reset()
    args = [torch.randn(3, 24, 40), torch.randn(3, 24, 40), torch.zeros(3, 1, 40)]
    expected = update(*[a.clone() for a in args])
    torch.testing.assert_close(torch.compile(update, fullgraph=True, backend=count)(*args), expected)
    assert len(seen) == 1
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
    torch.save(whole.state(), tmp_path / "state.pt")
    again = pretrain.PackedRows(shards, enc, 300, epochs=2, state=torch.load(tmp_path / "state.pt", weights_only=True))
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
    """Runs a script again and again and kills it: in the middle of three saves, at the switch, otherwise at random moments.
    Returns what the last run printed, which came to its end."""
    random, inside_saves, at_switch = np.random.default_rng(seed), min(3, kills // 3), False
    for n in range(kills):
        process, deadline = start(*args, base=base), None
        for line in process.stdout:
            if line.startswith("step 0") and deadline is None:
                deadline = time.time() + random.uniform(0, 0.6)
            if "RoPE is dropped" in line and not at_switch:
                at_switch = True
                break
            if n < inside_saves and deadline:               # a file that is being written has a temporary name
                until = time.time() + 5
                while time.time() < until and not list(folder.glob(".*.tmp")):
                    pass
                break
            if deadline and time.time() > deadline:
                break
        else:
            raise AssertionError(f"finished after {n} of {kills} kills (exit {process.wait()}): make it longer")
        process.kill()
        process.wait()
    result = script(*args, base=base)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_run_killed_at_20_moments_ends_in_the_same_tensors(tiny_base):
    """KILLS=100 python test_all.py -k killed is the long form."""
    kills = int(os.environ.get("KILLS", 20))
    tpp = (12 * kills + 60) * 1024 / 253_952
    args = ("pretrain.py", *TINY, "--tpp", tpp, "--drope", 40, "--epochs", 99, "--eval-every", 30)
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
    assert process.wait() == M.INTERRUPTED and f"stopped by {number.name}" in rest
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


# ---- Bad input: one clear line, non-zero exit, nothing lost ---------------------------------------------------------------------

@pytest.mark.parametrize("args, words", [
    (("--drope", 150), ["--drope 150", "0 to 99"]), (("--drope", -1), ["--drope -1"]), (("--depth", 0), ["--depth 0"]),
    (("--tpp", "many"), ["--tpp", "--help"]), (("--tag", "../x"), ["--tag", "folder name"]), (("--trunk", "x"), ["--drope"]),
    (("--total-batch-size", 1000), ["1000", "max_seq_len", "take"]), (("--total-batch-size", 0), ["--total-batch-size 0"]),
    (("--tpp", 0.001), ["less than one batch"]), (("--device-batch-size", 5), ["--device-batch-size 5", "16 rows"]),
    (("--tpp", 400), ["--epochs"]), (("--data-dir", "/nowhere"), ["/nowhere", "--fetch"]),
    (("--tokenizer-dir", "/nowhere"), ["/nowhere", "tok.py"]), (("--drope", 25, "--trunk", "none"), ["none", "--keep 25"])])
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


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
