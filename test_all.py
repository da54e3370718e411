"""The specification, executable: python test_all.py [pytest's options]. CPU only, no network."""
import os
os.environ["CUDA_VISIBLE_DEVICES"] = ""                     # before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("NANOCHAT_BASE_DIR", None)
import base64, collections, copy, errno, hashlib, http.server, inspect, itertools, json, math
import pickle, random, re, resource, shutil, signal, subprocess, sys, threading, time, types
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import tiktoken
import torch
import torch.nn.functional as F
import transformers
from tiktoken.load import load_tiktoken_bpe
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import demo
import eval as ev
import export_hf
import model
import model as m
import model as M
import modeling_nanochat as hf
import muon
import pretrain
import sft
import tok
from model import (GPT, GPTConfig, atomic_write, checkpoint_files, load_model, load_tokenizer,
                   save_checkpoint)

HERE = Path(__file__).resolve().parent
SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
           "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")
torch.set_num_threads(1)


# ---- What the tests share ------------------------------------------------------------------------

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
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    special = {name: len(tokens) + i for i, name in enumerate(SPECIAL)}
    config = {"pat_str": PATTERN, "special_tokens": special}
    (folder / "config.json").write_text(json.dumps(config))
    return M.load_tokenizer(folder)


def write_shard(path, texts, group=1024):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=group, compression="zstd")
    return path


def some_texts(n, seed=0, longest=400):
    words = ("the quick brown fox jumps over a lazy dog and then it sleeps for 12 or 13 hours, "
             "doesn't it?").split()
    rng = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(rng.choice(words, rng.integers(1, longest // 5))) for i in range(n)]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A base folder with a tokenizer and shards; runs copy or share it."""
    base = tmp_path_factory.mktemp("base")
    write_tokenizer(base / "tokenizer", [b" t", b"he", b" the", b"in"])
    data = base / "data" / "climbmix"
    for i in range(3):
        write_shard(data / f"shard_{i:05d}.parquet", some_texts(700, i), 256)
    write_shard(data / "shard_06542.parquet", some_texts(60, 99))
    return base


def share(tiny_base, folder):
    """Makes `folder` a base folder with the same tokenizer and shards, and with no runs."""
    folder.mkdir(exist_ok=True)
    for name in ("tokenizer", "data"):
        (folder / name).symlink_to(tiny_base / name)
    return folder


def user_env(base, more=None):
    env = {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **env, **(more or {})}


def script(name, *args, base, timeout=600, env=None, **more):
    """Runs a script as a user would; returns the finished process, its output as text."""
    return subprocess.run([sys.executable, str(HERE / name), *map(str, args)], capture_output=True,
                          text=True, timeout=timeout, env=user_env(base, env), cwd=HERE, **more)


def start(name, *args, base, env=None):
    """A script in the background; its output, stdout and stderr, can be read line by line."""
    return subprocess.Popen([sys.executable, str(HERE / name), *map(str, args)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=HERE,
                            env=user_env(base, env))


@pytest.fixture
def refused(monkeypatch, capsys):
    """refused(module, args, words, base=...): main() ends with a single line on stderr, which has
    these words in it; returns the line."""
    def check(module, args, words, base):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        handlers = [signal.getsignal(number) for number in numbers]
        try:
            M.guard(module.main)
        except SystemExit as e:                             # not pytest.raises, which keeps the run
            code = e.code
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)
        lines = capsys.readouterr().err.splitlines()
        if isinstance(code, str):                           # Python prints it
            lines, code = lines + code.splitlines(), 1
        assert code == 1 and len(lines) == 1, (code, lines)
        assert all(word in lines[0] for word in words), lines
        return lines[0]
    return check


def one_line(result, *words):
    """The process failed with one clear line on stderr that has these words in it."""
    lines = [line for line in result.stderr.strip().splitlines() if line.strip()]
    assert result.returncode not in (0, -11) and len(lines) == 1, \
        (result.returncode, result.stderr, result.stdout[-500:])
    for word in words:
        assert word in lines[0], lines[0]


# ---- model.py: the model, against a reference in float64 loops -----------------------------------

def test_parameter_counts():
    for depth, total, scaling, flops in ((18, 362_151_936, 324_403_200, 2.456e9),
                                         (20, 480_378_880, 438_435_840, 3.260e9)):
        with torch.device("meta"):
            model = M.GPT(M.GPTConfig.from_depth(depth))
        assert sum(p.numel() for p in model.parameters()) == total
        assert model.num_scaling_params() == scaling
        assert abs(model.flops_per_token(4096) / flops - 1) < 5e-4


def test_sizes():
    sizes = {}
    for depth in (1, 12, 18, 20):
        config = M.GPTConfig.from_depth(depth)
        sizes[depth] = (config.n_embd, config.n_head, config.intermediate_size)
    assert sizes == {1: (128, 1, 384), 12: (768, 6, 2048),
                     18: (1152, 9, 3072), 20: (1280, 10, 3456)}


def test_state_dict_keys():
    attention = [f"attn.{name}" for name in ("c_q", "c_k", "c_v", "c_proj")]
    mlp = [f"mlp.{name}" for name in ("w_gate", "w_up", "c_proj")]
    assert set(small_model(n_layer=1).state_dict()) == {
        "transformer.wte.weight", "lm_head.weight",
        *(f"transformer.h.0.{name}.weight" for name in attention + mlp)}


def reference_logits(model, ids):
    """The model again, for one row, in float64 and one position, head and pair at a time."""
    w = {k: v.double() for k, v in model.state_dict().items()}
    c, D = model.config, model.config.n_embd // model.config.n_head

    def rms(v):
        return v / (v.square().mean() + 1e-6).sqrt()

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
        def layer(name):
            return w[f"transformer.h.{n}.{name}.weight"]
        ks, vs, new = [], [], []
        for t, x in enumerate(xs):
            h = rms(x)
            q, k, v = (layer(f"attn.c_{s}") @ h for s in "qkv")
            heads = []
            ks.append([])
            vs.append(v.view(c.n_head, D))
            for head in range(c.n_head):
                qh, kh = q[head * D:(head + 1) * D], k[head * D:(head + 1) * D]
                if model.use_rope:
                    qh, kh = rotated(qh, t), rotated(kh, t)
                ks[t].append(rms(kh))
                scores = [rms(qh) @ ks[s][head] for s in range(t + 1)]
                weights = (torch.stack(scores) / D ** 0.5).softmax(0)
                heads.append(sum(p * vs[s][head] for s, p in enumerate(weights)))
            x = x + layer("attn.c_proj") @ torch.cat(heads)
            h = rms(x)
            gate = layer("mlp.w_gate") @ h
            new.append(x + layer("mlp.c_proj") @ (gate * gate.sigmoid() * (layer("mlp.w_up") @ h)))
        xs = new
    logits = torch.stack([15 * torch.tanh(w["lm_head.weight"] @ rms(x) / 15) for x in xs])
    return logits[:, :c.vocab_size]


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
        std, uniform = 0.0, False                           # both c_proj
        if "wte" in name:
            std = 0.8
        if "lm_head" in name:
            std = 0.001
        if name.endswith(("c_q.weight", "c_k.weight", "c_v.weight")):
            std, uniform = C ** -0.5, True
        if "w_gate" in name or "w_up" in name:
            std, uniform = 0.4 * C ** -0.5, True
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
        atol = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(2 * p.grad, expected[name], rtol=1e-4, atol=atol, msg=name)
    torch.testing.assert_close(model(ids, targets, reduction="none").sum(), plain)


# ---- model.py: gradients and validation ----------------------------------------------------------

CPU = M.Env(0, 1, torch.device("cpu"), torch.float32, None)


def test_no_trained_token_gives_zero_and_no_nan():
    model, nothing = small_model(), torch.full((2, 8), -1)
    loss = M.accumulate_gradients(model, torch.zeros(2, 8, dtype=torch.long), nothing, CPU)
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_micro_batches_do_not_change_the_gradient():
    """Rows with few and rows with many trained tokens: the loss is a mean over tokens, not over
    micro-batches."""
    ids, targets = torch.randint(0, 70, (4, 16)), torch.randint(0, 70, (4, 16))
    targets[0, 1:] = -1
    targets[3] = -1
    grads = []
    for micro in (4, 2, 1):
        model = small_model()
        loss = M.accumulate_gradients(model, ids, targets, replace(CPU, micro=micro))
        grads.append([loss] + [p.grad for p in model.parameters()])
    for other in grads[1:]:
        for a, b in zip(grads[0], other):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_activations_in_bfloat16_give_float32_gradients():
    ids = torch.randint(0, 70, (4, 16))
    model, exact = small_model(), small_model()
    model.dtype = torch.bfloat16
    for each in (model, exact):
        M.accumulate_gradients(each, ids, ids, CPU)
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        assert p.grad.dtype == torch.float32, name
        assert not torch.equal(p.grad, q.grad), name        # it was bfloat16 that multiplied
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.99, name


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
    model.dtype = torch.bfloat16                            # one for training, one for validation
    for training in (False, True, False, True):
        with torch.set_grad_enabled(training):
            if training:
                M.accumulate_gradients(compiled, ids, ids, replace(CPU, micro=2))
            else:
                compiled(ids, ids)
    assert len(graphs) == 4
    torch._dynamo.reset()


def no_stop():
    pass


@pytest.mark.parametrize("micro", [1, 2])
def test_bits_per_byte_by_hand(micro):
    """Uniform logits over 70 ids: log2(70) bits a token, over the bytes of those that count."""
    model = small_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    nbytes = torch.tensor([1] * 35 + [3] * 34 + [0])
    targets = [[0, 40, 69, -1], [34, 35, 36, 69]]           # 1 + 3 bytes, 1 + 3 + 3 bytes; 5 tokens
    rows = np.array([np.zeros((2, 4)), targets], np.int32)
    got = M.bits_per_byte(model, rows, nbytes, replace(CPU, micro=micro), no_stop)
    assert abs(got - 5 * math.log2(70) / 11) < 1e-5
    assert math.isnan(M.bits_per_byte(model, rows[:, :0], nbytes, CPU, no_stop))
    assert math.isnan(M.bits_per_byte(model, None, nbytes, CPU, no_stop))


def test_a_stop_is_heeded_between_the_rows_of_a_validation():
    asked = []
    def stop():
        asked.append(1)
        if len(asked) == 3:
            sys.exit(M.INTERRUPTED)
    rows = np.zeros((2, 9, 4), np.int32)
    with pytest.raises(SystemExit) as caught:
        M.bits_per_byte(small_model(), rows, torch.ones(70), CPU, stop)
    assert caught.value.code == M.INTERRUPTED and len(asked) == 3


@pytest.mark.parametrize("device, rows, world, T, most, expected", [
    ("cpu", 256, 1, 4096, None, 1), ("cpu", 16, 1, 64, None, 16), ("cpu", 6, 1, 1024, None, 3),
    ("cpu", 16, 1, 64, 5, 4), ("cpu", 16, 4, 64, 16, 4), ("mps", 256, 1, 4096, None, 1),
    ("cuda", 256, 1, 4096, None, 16), ("cuda", 256, 64, 4096, None, 4),
    ("cuda", 256, 1, 8192, None, 8), ("cuda", 24, 1, 4096, None, 12),
    ("cuda", 1, 1, 10 ** 6, None, 1)])
def test_rows_at_a_time(device, rows, world, T, most, expected):
    env = replace(CPU, device=torch.device(device), world=world)
    assert M.rows_at_a_time(env, rows, T, most) == expected


def limit_memory(model, most, after=1):
    """Makes the model run out of memory above `most` rows, but not in its first call. Returns the
    list of the rows of all calls."""
    forward, calls = model.forward, []
    def limited(idx, targets):
        calls.append(len(idx))
        if len(calls) > after and len(idx) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 8 GiB")
        return forward(idx, targets)
    model.forward = limited
    return calls


def test_out_of_memory_does_the_step_again_with_half_the_rows(capsys):
    """What the first rows gave before is not counted twice."""
    ids, env = torch.randint(0, 70, (12, 16)), replace(CPU, micro=6)
    model, calm = small_model(), small_model()
    calls = limit_memory(model, most=3)
    loss = M.accumulate_gradients(model, ids, ids, env)
    assert calls == [6, 6, 3, 3, 3, 3] and env.micro == 3
    said = "6 rows at a time: the step is done again with 3 (--device-batch-size 3)"
    assert capsys.readouterr().out == f"out of memory with {said}\n"
    assert loss == M.accumulate_gradients(calm, ids, ids, replace(CPU, micro=3))
    for p, q in zip(model.parameters(), calm.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_out_of_memory_with_one_row_is_one_line():
    ids, model = torch.randint(0, 70, (4, 16)), small_model()
    limit_memory(model, most=0, after=0)
    with pytest.raises(SystemExit, match="too little memory for one row") as caught:
        M.accumulate_gradients(model, ids, ids, replace(CPU, micro=4))
    assert "\n" not in caught.value.code


OUT_OF_MEMORY = f"""
import sys, torch, model as M
{inspect.getsource(small_model)}
{inspect.getsource(limit_memory)}
env = M.setup_env()
env.micro = 4
model, ids = small_model(), torch.arange(16 * 16).view(16, 16) % 70
if env.rank == 1:
    limit_memory(model, most=2)
loss = M.accumulate_gradients(model, ids, ids, env)
grads = [p.grad for p in model.parameters()]
torch.save([env.micro, loss.detach(), *grads], sys.argv[1] + "/" + str(env.rank))
"""


def torchrun(n, *args, base):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n]
    return subprocess.run([*map(str, command), *map(str, args)], capture_output=True, text=True,
                          timeout=600, env=user_env(base, {"PYTHONPATH": str(HERE)}), cwd=HERE)


def test_processes_agree_when_one_of_them_runs_out_of_memory(tmp_path):
    (tmp_path / "step.py").write_text(OUT_OF_MEMORY)
    result = torchrun(2, tmp_path / "step.py", tmp_path, base=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("out of memory with 4 rows") == 1
    ids, model = torch.arange(16 * 16).view(16, 16) % 70, small_model()
    loss = M.accumulate_gradients(model, ids, ids, CPU)
    for rank in (0, 1):
        micro, *got = torch.load(tmp_path / str(rank))
        assert micro == 2
        for a, b in zip(got, [loss, *(p.grad for p in model.parameters())], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---- muon.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(3, 64, 32), (3, 32, 64), (2, 48, 48)])
def test_polar_express_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    G = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e3])[:shape[0], None, None]
    S = torch.linalg.svdvals(muon.polar_express(G))
    assert S.min() > 0.5 and S.max() < 1.3
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert F.cosine_similarity(muon.polar_express(G).flatten(1), (U @ V).flatten(1)).min() > 0.98


def test_polar_express_moves_a_singular_value_as_its_docstring_says():
    table = re.findall(r"^ +((?:\d\S* +){5}\d\S*)$", muon.polar_express.__doc__, re.MULTILINE)
    assert len(table) == 4
    for line in table:
        s, *steps = map(float, line.split())
        for shown, (a, b, c) in zip(steps, muon.POLAR_EXPRESS):
            s = a * s + b * s ** 3 + c * s ** 5
            assert round(s, 3) == shown, line
    s = np.linspace(0.001, 1, 100_000)
    for a, b, c in muon.POLAR_EXPRESS:
        s = a * s + b * s ** 3 + c * s ** 5
    assert s.min() > 0.85 and s.max() < 1.15


def test_polar_express_in_bfloat16_only_on_a_gpu_that_has_it(monkeypatch):
    """torch says that a V100 has bfloat16, unless it is told not to count emulation."""
    asked = []
    def v100(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", v100)
    assert muon.matmul_dtype(torch.device("cuda")) == torch.float32 and asked == [False]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert muon.matmul_dtype(torch.device("cuda", 0)) == torch.bfloat16
    assert muon.matmul_dtype(torch.device("cpu")) == torch.float32
    X = muon.polar_express(torch.eye(8)[None], dtype=torch.bfloat16)
    assert X.dtype == torch.bfloat16 and torch.linalg.svdvals(X.float()).sub(1).abs().max() < 0.3


def slow_muon(p, grad, buf, second, lr, momentum, beta2, wd):
    """One matrix, one step, in float64 and plain words."""
    p, grad, buf, second = p.double(), grad.double(), buf.double(), second.double().clone()
    buf = momentum * buf + (1 - momentum) * grad
    g = momentum * buf + (1 - momentum) * grad
    X = g / (torch.linalg.matrix_norm(g) * 1.01 + 1e-6)
    for a, b, c in [(8.156554524902461, -22.48329292557795, 15.878769915207462),
                    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
                    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
                    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
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


def muon_matrices(shape, n=3, seed=0):
    """n parameters with gradients."""
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape)) for _ in range(n)]
    for p in params:
        p.grad = torch.randn(shape)
    return params


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_muon_equals_a_slow_reference_over_three_steps(shape):
    ps = muon_matrices(shape, seed=1)
    optimizer = muon.MuonAdamW([dict(kind="muon", params=ps, lr=0.02, momentum=0.9, ns_steps=5,
                                     beta2=0.9, weight_decay=0.3)])
    slow = [(p.detach().clone(), torch.zeros(shape), torch.zeros(max(shape))) for p in ps]
    for _ in range(3):
        for p in ps:
            p.grad = torch.randn(shape)
        slow = [slow_muon(p, ps[i].grad, b, s, 0.02, 0.9, 0.9, 0.3)
                for i, (p, b, s) in enumerate(slow)]
        optimizer.step()
        for p, (expected, _, _) in zip(ps, slow):
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_adamw_equals_torch():
    torch.manual_seed(2)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 7)) for _ in range(2))
    fields = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    a = muon.MuonAdamW([dict(kind="adamw", params=[ours], **fields)])
    b = torch.optim.AdamW([theirs], **fields)
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
    """Groups and state as the nanochat repo stores them."""
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig.from_depth(2, vocab_size=128, sequence_len=16))
    model.init_weights()
    optimizer = muon.build_optimizer(model)
    ids = torch.randint(0, 128, (2, 16))
    model(ids, ids).backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert [(g["kind"], len(g["params"])) for g in state["param_groups"]] == [
        ("adamw", 1), ("adamw", 1), ("muon", 8), ("muon", 2), ("muon", 4)]
    shapes = [tuple(optimizer.param_groups[i]["params"][0].shape) for i in range(5)]
    assert shapes == [(128, 128), (128, 128), (128, 128), (128, 384), (384, 128)]
    fields = {"kind", "lr", "initial_lr", "weight_decay"}
    assert fields | {"betas", "eps"} <= set(state["param_groups"][0])
    assert fields | {"momentum", "ns_steps", "beta2"} <= set(state["param_groups"][2])
    assert optimizer.param_groups[0]["params"][0] is model.lm_head.weight
    assert set(state["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    muons = {k: {n: tuple(v.shape) for n, v in s.items()}
             for k, s in state["state"].items() if "momentum_buffer" in s}
    assert muons == {
        2: {"momentum_buffer": (8, 128, 128), "second_momentum_buffer": (8, 128, 1)},
        10: {"momentum_buffer": (2, 128, 384), "second_momentum_buffer": (2, 1, 384)},
        12: {"momentum_buffer": (4, 384, 128), "second_momentum_buffer": (4, 384, 1)}}


def test_matrices_in_one_batch_equal_one_at_a_time():
    torch.manual_seed(0)
    G = torch.randn(6, 24, 40)
    one_at_a_time = torch.cat([muon.polar_express(g[None]) for g in G])
    torch.testing.assert_close(muon.polar_express(G), one_at_a_time, rtol=1e-4, atol=1e-5)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes (it runs them as they are)."""
    found, compile = [], torch.compile
    def backend(graph, inputs):
        found.append(graph)
        return graph.forward
    counted = lambda f, **options: compile(f, backend=backend, **options)
    monkeypatch.setattr(torch, "compile", counted)
    torch._dynamo.reset()
    yield found
    torch._dynamo.reset()


def test_muon_update_is_one_graph_for_each_shape(graphs):
    """No graph break, nothing compiled anew when the schedules move or a matrix is not used, and
    the numbers are those of the uncompiled update."""
    optimizers = []
    for compiled in (False, True):
        groups = [dict(kind="muon", params=muon_matrices(shape), lr=0.02)
                  for shape in ((24, 40), (40, 24))]
        optimizers.append(muon.MuonAdamW(groups, compile=compiled))
    for step in range(4):
        for optimizer in optimizers:
            torch.manual_seed(step)
            for group in optimizer.param_groups:
                group.update(lr=0.02 - 0.001 * step, momentum=0.9 + 0.01 * step,
                             weight_decay=0.3 / (step + 1))
                for i, p in enumerate(group["params"]):
                    p.grad = None if (step, i) == (2, 1) else torch.randn_like(p)
            optimizer.step()
        for group, expected in zip(optimizers[1].param_groups, optimizers[0].param_groups):
            torch.testing.assert_close(group["params"], expected["params"], rtol=1e-5, atol=1e-6)
        assert len(graphs) == 2


def test_a_copied_optimizer_steps(graphs):
    """deepcopy and pickle; the copy is not compiled and does the same."""
    params = muon_matrices((24, 40))
    optimizer = muon.MuonAdamW([dict(kind="muon", params=params, lr=0.02)], compile=True)
    optimizer.step()
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        theirs = copied.param_groups[0]["params"]
        for p in theirs:
            p.grad = torch.ones_like(p)
        before = len(graphs)
        copied.step()
        assert len(graphs) == before and not torch.equal(theirs[0], params[0])
        assert copied.state[theirs[0]].keys() == optimizer.state[params[0]].keys()


def test_a_group_needs_only_kind_params_and_lr():
    """What is left out has the documented value; params may be any iterable."""
    full = {"muon": dict(momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=0.0),
            "adamw": dict(betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)}
    for kind, expected in full.items():
        short, long = muon_matrices((24, 40)), muon_matrices((24, 40))
        a = muon.MuonAdamW(dict(kind=kind, params=iter(params), lr=0.02) for params in [short])
        b = muon.MuonAdamW([dict(kind=kind, params=long, lr=0.02, **expected)])
        for _ in range(2):
            a.step(), b.step()
        assert all(torch.equal(p, q) for p, q in zip(short, long))
        assert a.param_groups[0].keys() == b.param_groups[0].keys()


@pytest.mark.parametrize("groups, words", [
    (lambda layer: layer.parameters(), ["without kind and lr"]),
    (lambda layer: [dict(params=[layer.weight], lr=0.1)], ["without kind"]),
    (lambda layer: [dict(kind="muon", params=[layer.weight])], ["without lr"]),
    (lambda layer: [dict(kind="sgd", params=[layer.weight], lr=0.1)], ["'sgd'"]),
    (lambda layer: [dict(kind="muon", params=layer.parameters(), lr=0.1)], ["(3,)", "(3, 4)"]),
    (lambda layer: [dict(kind="muon", params=layer.bias, lr=0.1)], ["(3,)"]),
    (lambda layer: [dict(kind="muon", params=layer.half().weight, lr=0.1)], ["float16"])])
def test_a_group_that_cannot_be_is_one_line_that_shows_how_a_group_looks(groups, words):
    with pytest.raises(ValueError) as error:
        muon.MuonAdamW(groups(torch.nn.Linear(4, 3)))
    line = str(error.value)
    assert "\n" not in line and "dict(kind='muon', params=" in line
    assert all(word in line for word in words)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_parameter_without_gradient_is_left_alone_and_the_others_step(kind):
    """Its weights and its state: a used matrix does the same beside an unused one as alone."""
    params, alone = muon_matrices((24, 40)), muon_matrices((24, 40))
    fields = dict(kind=kind, lr=0.02, weight_decay=0.1)
    optimizer = muon.MuonAdamW([dict(params=params, **fields)])
    for p in params:
        p.grad = None
    optimizer.step()  # nothing has a gradient, nothing happens
    assert not optimizer.state and all(torch.equal(p, q) for p, q in zip(params, alone))
    reference = muon.MuonAdamW([dict(params=[p], **fields) for p in alone])
    for used in ([0, 1, 2], [0, 2], [2], [1], [0, 1, 2]):
        for i, (p, q) in enumerate(zip(params, alone)):
            p.grad = torch.randn(24, 40) if i in used else None
            q.grad = p.grad
        before = [p.detach().clone() for p in params]
        optimizer.step(), reference.step()
        assert [i for i in range(3) if not torch.equal(before[i], params[i])] == used
        torch.testing.assert_close(params, alone, rtol=1e-4, atol=1e-5)


def test_a_small_model_learns():
    """Sequences of period 3: from the fourth token on the next can be known, and the loss falls."""
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
        env = replace(CPU, micro=32)
        losses.append(M.accumulate_gradients(model, ids[:, :-1], targets, env).item())
        optimizer.step(), optimizer.zero_grad()
    assert losses[0] > 4.1 and losses[-1] < 1, losses[::20]


def test_schedules_at_their_corners():
    S = 2784
    start = S - round(0.65 * S)
    assert [muon.lr_factor(i, S) for i in (0, 19, 39, 40, start)] == [1 / 40, 0.5, 1.0, 1.0, 1.0]
    assert muon.lr_factor(S, S) == pytest.approx(0.05)
    assert muon.lr_factor((start + S) // 2, S) == pytest.approx(0.525, abs=1e-3)
    quarters = [round(muon.lr_factor(q * S // 4, S), 2) for q in (1, 2, 3)]
    assert quarters == [1.0, 0.78, 0.42] and "1.00, 0.78, 0.42" in muon.lr_factor.__doc__
    assert muon.muon_momentum(0, S) == 0.85
    assert muon.muon_momentum(200, S) == pytest.approx(0.91)
    assert muon.muon_momentum(400, S) == 0.97 == muon.muon_momentum(start, S)
    assert muon.muon_momentum(S, S) == pytest.approx(0.90)
    assert muon.muon_momentum(300, 500) == pytest.approx(0.94)  # the ramp wins over the warm-down
    assert muon.muon_weight_decay(0, S, 0.3) == 0.3
    assert muon.muon_weight_decay(S // 2, S, 0.3) == pytest.approx(0.15)
    assert muon.muon_weight_decay(S, S, 0.3) == pytest.approx(0)


# ---- pretrain.py: what follows from the depth, and from the tag ----------------------------------

def test_steps_tokens_and_switch():
    for depth, tpp, steps, tokens in ((18, 9, 2784, 2.92e9), (18, 20, 6187, 6.49e9),
                                      (20, 9, 3763, 3.95e9), (20, 20, 8362, 8.77e9),
                                      (20, 40, 16725, 17.54e9)):
        derived = pretrain.derive(pretrain.Config(depth=depth, tpp=tpp, drope=50), 32768)
        assert derived.batch == 2 ** 20 and derived.steps == steps
        assert abs(derived.steps * derived.batch / tokens - 1) < 2e-3
        assert derived.switch == round(steps / 2)           # half to even
    for drope, switch in ((None, None), (0, 0), (25, 696), (75, 2088)):
        assert pretrain.derive(pretrain.Config(18, 9, drope), 32768).switch == switch


def test_learning_rates_and_weight_decay():
    derived = pretrain.derive(pretrain.Config(12, 9, total_batch_size=2 ** 19), 32768)
    assert derived.lrs == dict(embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02)
    assert derived.weight_decay == 0.28
    derived = pretrain.derive(pretrain.Config(18, 9), 32768)
    assert derived.lrs["matrix_lr"] == pytest.approx(0.02 * 2 ** 0.5)
    assert derived.weight_decay == pytest.approx(0.28 * 2 ** 0.5 * 110_100_480 / 324_403_200)
    with torch.device("meta"):
        model = M.GPT(derived.config)
    optimizer = muon.build_optimizer(model, **derived.lrs, weight_decay=derived.weight_decay)
    head, embedding = optimizer.param_groups[:2]
    scale = 2 ** 0.5 * (1152 / 768) ** -0.5
    assert [head["lr"], embedding["lr"]] == pytest.approx([0.008 * scale, 0.3 * scale])
    assert [head["weight_decay"], embedding["weight_decay"]] == [0.01, 0.001]
    assert embedding["betas"] == (0.8, 0.995)


@pytest.mark.parametrize("given, depth, tpp, drope, tag", [
    ({}, 18, 9, None, "d18_9tpp"), (dict(drope=50), 18, 9, 50, "d18_9tpp_drope_50"),
    (dict(tag="d9_9tpp"), 9, 9, None, "d9_9tpp"),
    (dict(tag="d20_2.5tpp_drope_0"), 20, 2.5, 0, "d20_2.5tpp_drope_0"),
    (dict(tag="d20_20tpp_drope_50", depth=20, drope=50), 20, 20, 50, "d20_20tpp_drope_50"),
    (dict(tag="mine", depth=3), 3, 9, None, "mine")])
def test_the_tag_says_depth_tpp_and_drope(given, depth, tpp, drope, tag):
    cfg = pretrain.Config(**given)
    pretrain.resolve(cfg)
    assert (cfg.depth, cfg.tpp, cfg.drope, cfg.tag) == (depth, tpp, drope, tag)


# ---- pretrain.py: packing ------------------------------------------------------------------------

def naive_rows(documents, T, buffer=1000, chunk=128):
    """Best-fit packing in its plainest words: a list of documents in, rows out."""
    documents, rows, waiting = list(documents), [], []
    while True:
        row = []
        while len(row) < T:
            while len(waiting) < buffer and documents:
                for doc in documents[:chunk]:
                    for i in range(0, max(1, len(doc) - 1), T - 1):
                        waiting.append(doc[:1] + doc[1:][i:i + T - 1])
                documents = documents[chunk:]
            if not waiting:
                return rows
            fitting = [d for d in waiting if len(d) <= T - len(row)]
            size = max(map(len, fitting)) if fitting else min(map(len, waiting))
            doc = next(d for d in waiting if len(d) == size)
            waiting.remove(doc)                             # equal documents are equally early
            row += doc[:T - len(row)]
        rows.append(row)


def local_shards(folder, *contents, group=512):
    """pretrain.Shards of a folder with these texts, a shard each."""
    for i, texts in enumerate(contents):
        write_shard(folder / f"shard_{i:05d}.parquet", texts, group)
    write_shard(folder / pretrain.VALIDATION, ["for validation"])
    return pretrain.Shards(pretrain.Config(dataset="local", data_dir=str(folder)))


def all_rows(stream):
    rows = []
    while (row := stream.next_row()) is not None:
        rows.append(row.tolist())
    return rows


def test_packing_equals_naive_best_fit(tmp_path):
    enc = write_tokenizer(tmp_path / "tok", [b" t", b"he"])
    texts = some_texts(1800, longest=300) + ["", "x", "long " * 400]
    texts[1400] = None
    shards = local_shards(tmp_path / "data", texts)         # of row groups that 128 divides
    bos = enc.encode_single_token("<|bos|>")
    documents = [[bos] + enc.encode_ordinary(text or "") for text in texts]
    stream = pretrain.PackedRows(shards, shards.names, enc, 200, epochs=1)
    got = all_rows(stream)
    assert got == naive_rows(documents, 200) and len(got) > 500
    assert all(row[0] == bos and len(row) == 200 for row in got)
    used = stream.cut + sum(map(len, got))
    assert used <= stream.seen < used + 200                 # the last, unfilled row
    assert 0 < stream.cut / stream.seen < 0.05


def test_no_document_twice_and_none_lost(tmp_path):
    """Each document is marked: no mark comes twice in an epoch, and every document's <|bos|> is in
    a row (its end may be cut off). The validation shard's is in none."""
    enc = write_tokenizer(tmp_path / "tok")
    contents = [[f"\x01{s}.{i}\x02" + "a" * (i * 7 % 90) for i in range(500)] for s in range(3)]
    shards = local_shards(tmp_path / "data", *contents, group=100)
    rows = all_rows(pretrain.PackedRows(shards, shards.names, enc, 150, epochs=1))
    text = "\n".join(map(enc.decode, rows))
    marks = re.findall("\x01([0-9.]+)\x02", text)
    assert len(marks) == len(set(marks)) > 1400
    assert 1500 - text.count("<|bos|>") < 150 / 6           # those of the last, unfilled row
    assert "for validation" not in text


def test_packing_resumes_from_its_state_after_any_row(tmp_path, capsys):
    """At the ends of row groups, shards and epochs, too. The state goes through a file."""
    enc = write_tokenizer(tmp_path / "tok")
    contents = [some_texts(n, n, 60) for n in (600, 640, 500)]
    shards = local_shards(tmp_path / "data", *contents, group=300)
    options = dict(shards=shards, names=shards.names, enc=enc, row_len=1000, epochs=2)
    whole = pretrain.PackedRows(**options)
    states, rows = [whole.state()], []
    while (row := whole.next_row()) is not None:
        rows.append(row)
        states.append(whole.state())
    assert len(rows) > 100
    assert capsys.readouterr().out == "epoch 2: documents repeat, all 3 shards are read\n"
    positions = [(s["epoch"], s["pq_idx"], s["rg_idx"], s["row"]) for s in states]
    assert (0, 2, 0, 0) in positions                        # the last document of a shard was read
    for n, state in enumerate(states):
        torch.save(state, tmp_path / "state")
        state = torch.load(tmp_path / "state", weights_only=True)
        again = pretrain.PackedRows(**options, state=state)
        upto = len(rows) if n % 25 == 0 else n + 3
        for row in rows[n:upto]:
            assert np.array_equal(row, again.next_row()), n
        if upto == len(rows):
            end = again.state()
            assert again.next_row() is None
            assert (end["seen"], end["cut"]) == (states[-1]["seen"], states[-1]["cut"])


def test_shards_that_changed_under_a_run_are_refused(tmp_path):
    enc = write_tokenizer(tmp_path / "tok")
    shards = local_shards(tmp_path / "data", some_texts(500), some_texts(700, 1))
    stream = pretrain.PackedRows(shards, shards.names, enc, 100)
    stream.next_row()
    state = stream.state()
    pretrain.PackedRows(shards, shards.names + ["shard_00002.parquet"], enc, 100, state)     # more
    for names, revision in ((["shard_00001.parquet"], "local"), (shards.names, "another")):
        shards.revision = revision
        with pytest.raises(SystemExit, match="not as this run knew it.*shard_00001") as caught:
            pretrain.PackedRows(shards, names, enc, 100, state)
        assert "\n" not in caught.value.code


# ---- pretrain.py: runs as a user makes them ------------------------------------------------------

# A step is 1,024 tokens; there are 253,952 scaling parameters
TINY = ("--depth", 1, "--dataset", "local", "--max-seq-len", 64, "--total-batch-size", 1024,
        "--eval-tokens", 2048, "--eval-sample", 1024, "--eval-every", 8, "--save-every", 5,
        "--matrix-lr", 0.2, "--embedding-lr", 3)


def tpp_for(steps):
    return (steps + 0.5) * 1024 / 253_952


STEPS_20 = tpp_for(20)
TRUNK = pretrain.name_of(1, STEPS_20, None)                 # the tag of such a run with RoPE


def records(folder):
    """metrics.jsonl without its timings."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines]


def losses(folder):
    return [record["loss"] for record in records(folder) if "loss" in record]


def bpbs(folder):
    return [record["val_bpb"] for record in records(folder) if "val_bpb" in record]


def final(folder):
    step = max(M.checkpoint_steps(folder))
    return (step, M.load_part(folder, step, "model"), M.load_part(folder, step, "optim"),
            M.read_meta(folder, step))


def assert_same_run(a, b, revision=True):
    """Two folders hold the same final tensors, optimizer state, data position and metrics, bit for
    bit. revision=False: their shards may come from different places."""
    (step_a, model_a, optim_a, meta_a), (step_b, model_b, optim_b, meta_b) = final(a), final(b)
    assert step_a == step_b and model_a.keys() == model_b.keys()
    assert all(torch.equal(model_a[k], model_b[k]) for k in model_a)
    assert optim_a["state"].keys() == optim_b["state"].keys()
    for i, state in optim_a["state"].items():
        for key, value in state.items():
            other = torch.as_tensor(optim_b["state"][i][key])
            assert torch.equal(torch.as_tensor(value), other), (i, key)
    assert optim_a["param_groups"] == optim_b["param_groups"]
    loader_a, loader_b = (M.load_part(folder, step_a, "loader") for folder in (a, b))
    for key in loader_a:
        x, y = loader_a[key], loader_b[key]
        if key != "revision" or revision:
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y, key
    assert meta_a["val_bpb"] == meta_b["val_bpb"] and meta_a["finished"] and meta_b["finished"]
    for key in ("use_rope", "min_val_bpb", "smooth_train_loss"):
        assert meta_a["loop_state"][key] == meta_b["loop_state"][key]
    assert records(a) == records(b)


@pytest.fixture(scope="session")
def drope_log(tiny_base):
    """What an undisturbed run of 20 steps with the switch at 10 printed."""
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, "--tag", "drope", "--drope", 50,
                    base=tiny_base)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def drope_run(drope_log, tiny_base):
    """The folder of that run's folder."""
    return tiny_base / "base_checkpoints"


@pytest.fixture(scope="session")
def trunk_base(tiny_base, tmp_path_factory):
    """Another base folder, where the run with RoPE has kept its checkpoints."""
    base = share(tiny_base, tmp_path_factory.mktemp("trunk"))
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, base=base)
    assert result.returncode == 0, result.stderr
    return base


def test_a_run_with_drope(drope_run, trunk_base):
    step, weights, _, meta = final(drope_run / "drope")
    assert step == 20 == meta["step"] and meta["switch"] == 10 and meta["finished"]
    assert meta["loop_state"]["use_rope"] is False
    assert final(trunk_base / "base_checkpoints" / TRUNK)[3]["loop_state"]["use_rope"] is True
    assert set(meta["model_config"]) == {"sequence_len", "vocab_size", "n_layer", "n_head",
                                         "n_kv_head", "n_embd"}
    assert {"step", "val_bpb", "user_config", "device_batch_size", "max_seq_len",
            "total_batch_size", "loop_state", "sha256"} <= set(meta)
    assert {"embedding_lr", "unembedding_lr", "matrix_lr"} <= set(meta["user_config"])
    assert {"use_rope", "min_val_bpb", "smooth_train_loss", "total_training_time"} \
        <= set(meta["loop_state"])
    log = records(drope_run / "drope")
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert [record["use_rope"] for record in steps] == [True] * 10 + [False] * 10
    assert [record["lr_factor"] for record in steps] == \
        pytest.approx([muon.lr_factor(i, 20) for i in range(20)])
    assert [record["step"] for record in log if "val_bpb" in record] == [0, 8, 16, 20]
    switch = next(record for record in log if "switch" in record)
    assert switch["step"] == 10 and log.index(switch) == log.index(steps[10]) - 1
    assert switch["val_bpb_with_rope"] != switch["val_bpb_without_rope"]


def test_the_log_says_what_was_run_and_a_line_a_step(drope_log):
    for field in ("depth = 1", "tpp = 0.08", "drope = 50", "steps = 20", "switch = 10",
                  "batch = 1024", "micro = 16", "attention = ", "revision = local",
                  "tokenizer = ", "dtype = "):
        assert f"\n# {field}" in drope_log, field
    assert "step 00010 | RoPE is dropped: val bpb " in drope_log
    lines = [line for line in drope_log.splitlines() if re.match(r"step \d+ \| +\d", line)]
    assert len(lines) == 20
    for line in lines:
        assert re.fullmatch(r"step 000\d\d \| +[\d.]+% \| loss \d\.\d{4} \| lr \d\.\d{3} \| [\d,]+ "
                            r"tok/s \| \d+\.\d\d s \| left 0:00:\d\d", line), line


def test_runs_are_identical_up_to_the_switch(drope_run, trunk_base):
    a = losses(drope_run / "drope")
    b = losses(trunk_base / "base_checkpoints" / TRUNK)
    assert a[:10] == b[:10] and a[10] != b[10]


def test_a_run_with_rope_keeps_checkpoints_for_branches(trunk_base, drope_run):
    assert M.checkpoint_steps(trunk_base / "base_checkpoints" / TRUNK) == [5, 10, 15, 20]
    assert M.checkpoint_steps(drope_run / "drope") == [15, 20]      # the last two
    for keep, drope, steps in (("10,33.3", None, {278, 927}), ("", None, set()), ("25", 50, set())):
        assert pretrain.kept_steps(pretrain.Config(keep=keep, drope=drope), 2784) == steps


def test_a_branch_equals_the_run_from_scratch(drope_run, trunk_base):
    """It finds its trunk by itself, and may be killed like any run."""
    args = ("pretrain.py", *TINY, "--tpp", STEPS_20, "--tag", "drope", "--drope", 50)
    folder = trunk_base / "base_checkpoints" / "drope"
    process, output = start(*args, base=trunk_base), ""
    for line in process.stdout:
        output += line
        if line.startswith("step 00013"):
            break
    process.kill()
    process.wait()
    assert f"branching off {trunk_base / 'base_checkpoints' / TRUNK}" in output
    assert "resuming from step 10" in output and not M.checkpoint_steps(folder)
    result = script(*args, base=trunk_base)
    assert result.returncode == 0 and "branching off" in result.stdout, result.stderr
    assert_same_run(drope_run / "drope", folder)


def damage(path):
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_meta(folder, step, change):
    meta = M.read_meta(folder, step)
    change(meta)
    M.checkpoint_files(folder, step)["meta"].write_text(json.dumps(meta))


@pytest.mark.parametrize("why, says", [
    ("nothing", ""), ("recipe", "matrix_lr = 0.2, not 0.3"), ("revision", "revision = local"),
    ("damaged", "model_000010.pt is damaged"), ("meta cut", "passing over step 10"),
    ("public", "other code"), ("not kept", ""), ("rope", ""), ("other tpp", "")])
def test_a_trunk_of_another_run_is_not_used(drope_run, trunk_base, tmp_path, capsys, why, says):
    trunk = tmp_path / "base_checkpoints" / TRUNK
    shutil.copytree(trunk_base / "base_checkpoints" / TRUNK, trunk)
    cfg = pretrain.Config(**M.read_meta(drope_run / "drope", 20)["user_config"])
    recipe, revision = M.read_meta(drope_run / "drope", 20)["recipe"], "local"
    if why == "recipe":
        recipe["matrix_lr"] = 0.3
    if why == "revision":
        revision = "c0ffee"
    if why == "damaged":
        damage(M.checkpoint_files(trunk, 10)["model"])
    if why == "meta cut":
        meta = M.checkpoint_files(trunk, 10)["meta"]
        meta.write_text(meta.read_text()[:300])
    if why == "public":
        change_meta(trunk, 10, lambda meta: [meta.pop(key) for key in ("recipe", "sha256")])
    if why == "not kept":
        M.checkpoint_files(trunk, 10)["meta"].unlink()
    if why == "rope":
        cfg.drope = None
    if why == "other tpp":
        cfg.tpp = tpp_for(21)
    run = M.Run(tmp_path / "base_checkpoints" / "new", cfg, recipe, CPU)
    derived = pretrain.derive(cfg, M.load_tokenizer(trunk_base / "tokenizer").n_vocab)
    found = pretrain.find_trunk(run, types.SimpleNamespace(revision=revision), derived)
    assert found == ((trunk, 10) if why == "nothing" else None)
    said = capsys.readouterr()
    assert len((said.out + said.err).splitlines()) == bool(says) and says in said.out + said.err


def test_a_run_that_finds_no_trunk_of_its_recipe_starts_from_nothing(trunk_base):
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", "other",
                    "--matrix-lr", 0.3, base=trunk_base)
    assert result.returncode == 0 and result.stdout.count("starting from scratch") == 1
    assert len(losses(trunk_base / "base_checkpoints" / "other")) == 20
    assert "branching" not in result.stdout


def test_a_finished_run_is_skipped(drope_run, tiny_base):
    files = [path for path in (drope_run / "drope").iterdir() if path.name != ".lock"]
    before = [path.read_bytes() for path in files]
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, "--tag", "drope", "--drope", 50,
                    base=tiny_base)
    assert result.returncode == 0 and "is finished (step 20), skipped" in result.stdout
    assert len(result.stdout.splitlines()) == 1
    assert before == [path.read_bytes() for path in files]


# ---- Interrupted runs end in the same tensors ----------------------------------------------------

def kill_at_random(args, base, folder, kills, seed=0):
    """Runs a script again and again and kills it: in the middle of three saves, at the switch,
    otherwise somewhere in the first to twelfth step. Then lets it come to its end."""
    rng, inside_saves, at_switch = np.random.default_rng(seed), min(3, kills // 3), False
    for n in range(kills):
        process, steps = start(*args, base=base), int(rng.integers(1, 13))
        for line in process.stdout:
            steps -= line.startswith("step 0")
            if "RoPE is dropped" in line and not at_switch:
                at_switch = True
                break
            if steps == 0:
                until = time.time() + (5 if n < inside_saves else rng.uniform(0, 0.1))
                while time.time() < until:
                    if n < inside_saves and list(folder.glob(".*.tmp")):    # a file half written
                        break
                break
        else:
            raise AssertionError(f"finished after {n} of {kills} kills: {process.wait()}")
        process.kill()
        process.wait()
    assert at_switch, "the kills ended before the switch: make it earlier"
    result = script(*args, base=base)
    assert result.returncode == 0, result.stderr


def test_a_run_killed_at_20_moments_ends_in_the_same_tensors(tiny_base, tmp_path):
    """Across the switch, and across the epochs of a local folder with 100 documents.
    KILLS=100 python test_all.py -k killed is the long form."""
    kills = int(os.environ.get("KILLS", 20))
    base, data = share(tiny_base, tmp_path), tmp_path / "few"
    local_shards(data, some_texts(60, 5), some_texts(40, 6), group=25)
    write_shard(data / pretrain.VALIDATION, some_texts(60, 99))
    args = ("pretrain.py", *TINY, "--tpp", tpp_for(8 * kills + 40), "--drope", 20,
            "--eval-every", 30, "--data-dir", data)
    result = script(*args, "--tag", "calm", base=base)
    assert result.returncode == 0 and "epoch 6: documents repeat" in result.stdout, result.stderr
    folder = tmp_path / "base_checkpoints"
    kill_at_random((*args, "--tag", "killed"), base, folder / "killed", kills)
    assert_same_run(folder / "calm", folder / "killed")


def signal_at(number, words, *args, base, env=None):
    """Runs a script and sends it a signal when a line with these words appears. Returns its exit
    status, all its output, and the seconds from the signal to the end."""
    process, output, sent = start(*args, base=base, env=env), "", None
    for line in process.stdout:
        output += line
        if words in line and sent is None:
            sent = time.time()
            process.send_signal(number)
    return process.wait(), output, time.time() - sent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_resumes(drope_run, tiny_base, number):
    tag = f"stopped_by_{number.name}"
    args = ("pretrain.py", *TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", tag,
            "--save-every", 999)
    status, output, _ = signal_at(number, "step 00007 |", *args, base=tiny_base)
    step = max(M.checkpoint_steps(drope_run / tag))
    assert status == M.INTERRUPTED == 75 and 7 <= step < 20
    assert output.count("stopping after this step; Ctrl-C again to stop at once") == 1
    assert output.splitlines()[-1] == (f"stopped at step {step}: {number.name}. The same command "
                                       f"resumes from step {step}")
    result = script(*args, base=tiny_base)
    assert result.returncode == 0 and f"resuming from step {step}" in result.stdout
    assert_same_run(drope_run / "drope", drope_run / tag)


def test_a_second_ctrl_c_stops_at_once(capfd):
    """Ctrl-C after any request to stop raises SystemExit where the program is, without a save."""
    run = M.Run.__new__(M.Run)
    run.env, run.signal = CPU, None
    run.take_signal(signal.SIGTERM, None)
    assert run.signal == "SIGTERM"
    message = "\nstopping after this step; Ctrl-C again to stop at once\n"
    assert capfd.readouterr().err == message
    with pytest.raises(SystemExit, match="^interrupted$"):
        run.take_signal(signal.SIGINT, None)
    assert capfd.readouterr().err == ""


def test_a_stop_is_heeded_during_validation(tiny_base, tmp_path):
    base, data = share(tiny_base, tmp_path), tmp_path / "much"
    local_shards(data, some_texts(1200))
    write_shard(data / pretrain.VALIDATION, some_texts(1600, 9))     # 250,000 tokens: seconds
    args = ("pretrain.py", *TINY, "--tpp", STEPS_20, "--tag", "validating", "--data-dir", data,
            "--eval-sample", 250_000, "--eval-every", 3, "--save-every", 999)
    status, output, _ = signal_at(signal.SIGTERM, "step 00003 |  15.0%", *args, base=base)
    assert status == M.INTERRUPTED and "stopped at step 3: SIGTERM" in output, output
    assert "step 00003 | val bpb" not in output and "step 00000 | val bpb" in output
    assert M.checkpoint_steps(tmp_path / "base_checkpoints" / "validating") == [3]


@pytest.mark.parametrize("imported", ["dataclasses", "numpy", "torch", "muon"])
@pytest.mark.parametrize("name", ["pretrain.py", "sft.py"])
def test_ctrl_c_while_python_imports_is_one_line(tmp_path, name, imported):
    """The signal comes right after a module was imported."""
    process = subprocess.Popen([sys.executable, "-X", "importtime", str(HERE / name), "--tag", "x"],
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE,
                               env=user_env(tmp_path))
    for line in process.stderr:
        if re.fullmatch(rf"import time:.*\| +{imported}\n", line):
            break
    process.send_signal(signal.SIGINT)
    output, said = process.communicate()
    said = [line for line in said.splitlines() if not line.startswith("import time:")]
    assert process.returncode == 1 and said == ["interrupted"] and output == ""


@pytest.mark.parametrize("part", ["model", "optim", "loader", "meta"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(drope_run, tiny_base, part):
    folder = drope_run / f"damaged_{part}"
    shutil.copytree(drope_run / "drope", folder)
    path = M.checkpoint_files(folder, 20)[part]
    if part == "meta":
        path.write_text(path.read_text()[:200])
    else:
        damage(path)
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", folder.name,
                    base=tiny_base)
    assert result.returncode == 0 and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"passing over step 20 in {folder}: ")
    assert part == "meta" or path.name in result.stderr
    assert "resuming from step 15" in result.stdout
    assert_same_run(drope_run / "drope", folder)


# ---- Any number of processes ---------------------------------------------------------------------

def test_1_2_and_4_processes_see_the_same_losses(tiny_base):
    args = (*TINY, "--tpp", tpp_for(30), "--drope", 50, "--save-every", 999)
    folder = tiny_base / "base_checkpoints"
    assert script("pretrain.py", *args, "--tag", "one", base=tiny_base).returncode == 0
    expected, expected_bpbs = losses(folder / "one"), bpbs(folder / "one")
    assert len(expected) == 30 and len(expected_bpbs) == 5
    for n in (2, 4):
        tag = f"processes_{n}"
        result = torchrun(n, HERE / "pretrain.py", *args, "--tag", tag, base=tiny_base)
        assert result.returncode == 0, result.stderr[-2000:]
        assert losses(folder / tag) == pytest.approx(expected, rel=1e-4)
        assert bpbs(folder / tag) == pytest.approx(expected_bpbs, rel=1e-4)
        assert M.read_meta(folder / tag, 30)["processes"] == n
    args += ("--tag", "micro", "--device-batch-size", 4)
    assert script("pretrain.py", *args, base=tiny_base).returncode == 0
    assert losses(folder / "micro") == pytest.approx(expected, rel=1e-4)


def test_a_run_moves_from_one_process_to_two_and_back(drope_run, trunk_base):
    """Two processes branch off the run of one; one goes on from their checkpoint of step 15. The
    optimizer state is one file that any number of processes can load."""
    args = (*TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", "moved")
    folder = trunk_base / "base_checkpoints" / "moved"
    result = torchrun(2, HERE / "pretrain.py", *args, base=trunk_base)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "resuming from step 10" in result.stdout
    for path in M.checkpoint_files(folder, 20).values():
        path.unlink()
    result = script("pretrain.py", *args, base=trunk_base)
    assert result.returncode == 0 and "resuming from step 15" in result.stdout
    assert losses(folder) == pytest.approx(losses(drope_run / "drope"), rel=1e-4)
    assert bpbs(folder) == pytest.approx(bpbs(drope_run / "drope"), rel=1e-4)


# ---- The whole way of a model, and the driver ----------------------------------------------------

def test_use_rope_travels_from_checkpoint_to_fine_tuning_and_exports(trunk_base, tmp_path):
    """Pretrain, branch, fine-tune, fine-tune at twice the length, export: RoPE stays off in a drope
    tag and on in one without."""
    drope = f"{TRUNK}_drope_50"
    result = script("pretrain.py", *TINY, "--tpp", STEPS_20, "--drope", 50, base=trunk_base)
    assert result.returncode == 0 and "branching off" in result.stdout, result.stderr
    for name in ("c.jsonl", "c_val.jsonl"):
        with open(tmp_path / name, "w") as f:
            for i in range(60):
                messages = [{"role": "user", "content": f"What is {i}?"},
                            {"role": "assistant", "content": f"A number, {i}."}]
                print(json.dumps(messages), file=f)
    (tmp_path / "words.txt").write_text("apple\npear\nplum\n")
    for tag, length in ((drope, 64), (f"{drope}_long", 128), (TRUNK, 64)):
        result = script("sft.py", "--tag", tag, "--conversations", tmp_path / "c.jsonl", "--words",
                        tmp_path / "words.txt", "--spelling-rows", 20, "--bee-rows", 10,
                        "--max-seq-len", length, "--total-batch-size", 1024, "--eval-tokens", 1024,
                        "--init-lr-frac", 0.1, base=trunk_base)
        assert result.returncode == 0, result.stderr
        result = script("export_hf.py", "--tag", tag, base=trunk_base)
        assert result.returncode == 0, result.stderr
        expected = tag == TRUNK
        meta = final(trunk_base / "chatsft_checkpoints" / tag)[3]
        assert meta["loop_state"]["use_rope"] is expected and meta["max_seq_len"] == length
        for folder in (f"hf_base/{tag.removesuffix('_long')}", f"hf_sft/{tag}"):
            config = json.loads((trunk_base / folder / "config.json").read_text())
            assert config["use_rope"] is expected
    step, weights, _, meta = final(trunk_base / "chatsft_checkpoints" / f"{drope}_long")
    ours = M.GPT(M.GPTConfig(**meta["model_config"]), meta["loop_state"]["use_rope"])
    ours.load_state_dict({k: v.bfloat16().float() for k, v in weights.items()})
    theirs = AutoModelForCausalLM.from_pretrained(trunk_base / "hf_sft" / f"{drope}_long",
                                                  trust_remote_code=True, dtype=torch.float32)
    ids = torch.randint(0, meta["model_config"]["vocab_size"], (2, 90))
    assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    ours.use_rope = True
    assert (theirs(ids).logits - ours(ids)).abs().max() > 1e-3      # the comparison would notice


@pytest.fixture
def clone(tmp_path):
    """clone(program, name) -> a copy of the repository whose .venv has `program` as its python and
    torchrun: a shell script, or this very Python."""
    def make(program=f'exec {sys.executable} "$@"', name="clone"):
        folder = tmp_path / name
        folder.mkdir()
        for path in [*HERE.glob("*.py"), *HERE.glob("requirements*.txt")]:
            (folder / path.name).symlink_to(path)
        shutil.copy(HERE / "run_all.sh", folder)
        wanted = [HERE / "requirements.txt", HERE / "requirements-dev.txt"]
        for command in ("python", "torchrun", "srun", "scontrol", "scancel"):
            write_program(folder / ".venv" / "bin" / command, program.replace("NAME", command))
        installed = "".join(path.read_text() for path in wanted).rstrip("\n")
        (folder / ".venv" / "installed").write_text(installed)
        return folder
    return make


def write_program(path, program):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{program}\n")
    path.chmod(0o755)


RECORD = 'echo "NAME $*" >> calls; [ "NAME $1" != "scontrol show" ] || printf "one\\ntwo\\n"'


def driver_env(**env):
    """The environment without what Slurm or a user's own settings would say."""
    ours = ("SLURM", "NANOCHAT", "PYTORCH_", "OMP_")
    names = ("GPUS", "NODES", "HEAD", "NODE_RANK", "TAGS", "TOK", "PRETRAIN", "SFT", "EVAL")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in names}
    return {**clean, **{k: str(v) for k, v in env.items()}}


def driver(folder, words="", **env):
    return subprocess.run(["bash", str(folder / "run_all.sh"), *words.split()], timeout=300,
                          capture_output=True, text=True, env=driver_env(**env))


def test_the_plan_of_the_release(clone):
    folder = clone()
    rows = [line.split() for line in driver(folder, "release --dry-run").stdout.splitlines()]
    plan = {row[0]: row[1:] for row in rows if "_" in row[0]}
    assert len(plan) == 20 and sum(tag.endswith("_long") for tag in plan) == 6
    tokens = {tag: plan[tag][1] for tag in plan if "drope" not in tag and "long" not in tag}
    assert tokens == {"d18_9tpp": "2.92B", "d18_20tpp": "6.49B", "d20_9tpp": "3.95B",
                      "d20_20tpp": "8.77B", "d20_40tpp": "17.54B"}
    assert plan["d18_9tpp"][:4] == ["2,784", "2.92B", "55", "4.8"]         # steps ... shards, hours
    assert sum("from scratch" in " ".join(row) for row in plan.values()) == 5
    assert sum("that of" in " ".join(row) for row in plan.values()) == 6
    assert sum("from step" in " ".join(row) for row in plan.values()) == 9
    one = driver(folder, "d18 20 50 long --dry-run 340000").stdout
    assert "d18_20tpp_drope_50_long" in one and "from scratch" in one and " 5.3 " in one


@pytest.mark.parametrize("words, env, said", [
    ("foo", {}, "'foo' is unknown"), ("d0 9", {}, "depth 1 to 99"), ("d18 9 150", {}, "0 to 99"),
    ("d18 1.2.3 50", {}, "'d18 1.2.3 50'"), ("d18 9 050", {}, "no needless zeros"),
    ("d18 9.0", {}, "no needless zeros"), ("d18_9tpp d18_20tpp", {}, "is unknown"),
    ("d" + "9" * 20 + " 9", {}, "depth 1 to 99"), ("tiny foo", {}, "foo"),
    ("release foo", {}, "'release foo'"), ("release", {"TAGS": "d2_1tpp d2_1"}, "'d2_1'"),
    ("d2 1 --dry-run fast", {}, "--dry-run fast"), ("chat", {}, "is unknown"),
    ("d2 1", {"GPUS": "abc"}, "GPUS=abc"),
    ("d2 1", {"GPUS": 0}, "GPUS=0"), ("d2 1", {"NODES": 2}, "HEAD=host:port")])
def test_the_driver_refuses(clone, words, env, said):
    folder = clone(RECORD)
    one_line(driver(folder, words, **env), said)
    assert not (folder / "calls").exists()


def calls(folder):
    """The stages that ran, in order, without the names of folders."""
    text = (folder / "calls").read_text().replace("out/data/climbmix", "DATA")
    (folder / "calls").unlink()
    return text.replace("--data-dir DATA ", "").splitlines()


def test_the_stages_of_a_release(clone):
    folder = clone(RECORD)
    result = driver(folder, "release", TAGS="d2_1tpp d2_1tpp_drope_50_long", EVAL="--quick")
    assert result.returncode == 0, result.stderr
    ran = calls(folder)
    assert ran[3] == "python pretrain.py --tag d2_1tpp --plan d2_1tpp d2_1tpp_drope_50_long"
    assert all(line.endswith("--check") for line in ran[:3])
    assert ran[4:] == [
        "python pretrain.py --fetch 8", "python tok.py --out-dir out/tokenizer",
        "python pretrain.py --tag d2_1tpp", "python sft.py --tag d2_1tpp",
        "python export_hf.py --tag d2_1tpp", "python eval.py --quick d2_1tpp",
        "python pretrain.py --tag d2_1tpp_drope_50", "python sft.py --tag d2_1tpp_drope_50_long",
        "python export_hf.py --tag d2_1tpp_drope_50_long",
        "python eval.py --quick d2_1tpp_drope_50_long",
        "python eval.py --quick --table d2_1tpp d2_1tpp_drope_50_long"]
    driver(folder, "d2 1", PRETRAIN="--dataset local --data-dir my/shards")
    ran = calls(folder)[4:]
    local = "--data-dir my/shards --dataset local --data-dir my/shards"
    assert ran[0] == f"python pretrain.py {local} --fetch 8"        # local: nothing is downloaded
    assert ran[1] == "python tok.py --data-dir my/shards --out-dir out/tokenizer"
    assert ran[2] == f"python pretrain.py {local} --tag d2_1tpp"
    assert ran[5] == "python eval.py --data-dir my/shards d2_1tpp"


def test_how_several_processes_and_machines_are_started(clone):
    folder = clone(RECORD)
    torchrun = "torchrun --nnodes {} --nproc-per-node {} --shutdown-timeout 170"
    meet = "--rdzv-backend c10d --rdzv-id nanochat --rdzv-endpoint"
    driver(folder, "d2 1", GPUS=8)
    assert torchrun.format(1, 8) + " --standalone sft.py --tag d2_1tpp" in calls(folder)
    driver(folder, "d2 1", NODES=2, HEAD="one:29500", NODE_RANK=1)  # not the first machine
    ran = [line for line in calls(folder) if line.startswith(torchrun.format(2, 1))]
    assert f"{meet} one:29500" in ran[0] and "is_host=0" in ran[0]
    assert len(ran) == 2 and "pretrain.py" in ran[0] and "sft.py" in ran[1]
    driver(folder, "d2 1", SLURM_NNODES=2, SLURM_JOB_NODELIST="a", SLURM_GPUS_ON_NODE=4)
    ran = [line for line in calls(folder) if line.startswith("srun")]
    assert len(ran) == 2
    assert all(f"{torchrun.format(2, 4)} {meet} one:29500" in line for line in ran)


@pytest.mark.parametrize("env, said", [
    ({"TOK": "--vocab-size 3"}, "--vocab-size"), ({"PRETRAIN": "--depth 3"}, "--depth 3"),
    ({"SFT": "--skip gsmk8k"}, "gsmk8k"), ({"SFT": "--conversations no.jsonl"}, "no.jsonl"),
    ({"EVAL": "--data-dir none"}, "none")])
def test_options_are_checked_before_anything_trains(clone, env, said):
    folder = clone()
    result = driver(folder, "d2 1", HF_ENDPOINT="http://127.0.0.1:9", **env)
    lines = result.stderr.strip().splitlines()
    assert result.returncode and len(lines) == 1 and said in lines[0], result.stderr
    assert not (folder / "out").exists() and "+ " not in result.stdout


def test_the_clone_that_runs_is_the_one_of_the_script(clone, tmp_path):
    """But Slurm runs a copy of the script, in the folder where it was submitted."""
    ours, other = clone(RECORD), clone(RECORD, "other")
    env = driver_env(SLURM_SUBMIT_DIR=other, SLURM_JOB_ID=7)            # in an allocation
    subprocess.run(["bash", ours / "run_all.sh", "demo"], cwd=other, env=env)
    assert (ours / "calls").exists() and not (other / "calls").exists()
    spool = tmp_path / "spool"
    spool.mkdir()
    shutil.copy(ours / "run_all.sh", spool)
    subprocess.run(["bash", spool / "run_all.sh", "demo"], cwd=other, env=env)
    assert (other / "calls").exists()
    alone = subprocess.run(["bash", spool / "run_all.sh", "demo"], cwd=spool, env=driver_env(),
                           capture_output=True, text=True)
    one_line(alone, "folder of the repository")


STAGE = """[ NAME != scontrol ] || { echo "$@" > scontrol; exit; }
trap 'echo TERM >> signals; exit 75' TERM
trap 'echo INT >> signals; [ $(wc -l < signals) != "$INTS" ] || exit 75' INT
touch started
while :; do sleep 0.05; done"""


@pytest.mark.parametrize("sent, signals, requeued", [
    ("USR1", "TERM\n", True), ("TERM", "TERM\n", False), ("INT", "INT\n", False),
    ("INT INT", "INT\nINT\n", False)])
def test_the_driver_passes_signals_on(clone, sent, signals, requeued):
    folder, ints = clone(STAGE), len(sent.split())
    process = subprocess.Popen(["bash", "run_all.sh", "demo"], cwd=folder, text=True,
                               stderr=subprocess.PIPE, env=driver_env(SLURM_JOB_ID=7, INTS=ints))
    wait_for(folder / "started")
    for name in sent.split():
        process.send_signal(signal.Signals["SIG" + name])
        wait_for(folder / "signals")
        time.sleep(0.3)
    assert "the same command resumes" in process.communicate(timeout=20)[1]
    assert process.returncode == 75 and (folder / "signals").read_text() == signals
    assert (folder / "scontrol").exists() == requeued
    if requeued:
        assert (folder / "scontrol").read_text() == "requeue 7\n"


def wait_for(path, seconds=20):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"{path} does not appear"
        time.sleep(0.02)


MACHINES = """case NAME in
scontrol) echo "$@" >> scontrol; echo one;;
scancel) echo "$@" > scancel;;
srun) touch started; until [ -e scancel ]; do sleep 0.05; done; exit 1;;
esac"""


def test_a_signal_reaches_the_machines_of_a_slurm_job(clone):
    """srun kills its tasks when it is sent a signal, so it is not."""
    folder = clone(MACHINES)
    env = driver_env(SLURM_JOB_ID=7, SLURM_NNODES=2, SLURM_JOB_NODELIST="one,two")
    process = subprocess.Popen(["bash", "run_all.sh", "d2", "1"], cwd=folder, env=env)
    wait_for(folder / "started")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 75 and (folder / "scancel").read_text() == "--signal TERM 7\n"
    assert (folder / "scontrol").read_text() == "show hostnames one,two\nrequeue 7\n"


@pytest.fixture
def two_hosts():
    """[(name, address)] of two network namespaces with a cable between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces take root, and iproute2")
    hosts = [(f"test-{os.getpid()}-{i}", f"10.77.0.{i + 1}") for i in (0, 1)]
    ip = lambda words: subprocess.run(["ip", *words.split()], capture_output=True).returncode
    try:
        if any(ip(f"netns add {name}") for name, _ in hosts):
            pytest.skip("no network namespaces here")
        ip(f"link add eth0 netns {hosts[0][0]} type veth peer name eth0 netns {hosts[1][0]}")
        for name, address in hosts:
            ip(f"-n {name} addr add {address}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        yield hosts
    finally:
        for name, _ in hosts:
            ip(f"netns del {name}")


def test_two_machines_and_the_death_of_one(two_hosts, tiny_base, tmp_path):
    """They see the losses of one machine; when one dies, the other ends at once, and both resume."""
    args = (HERE / "pretrain.py", *TINY, "--tpp", tpp_for(60))
    env, folder = user_env(tiny_base, {"GLOO_SOCKET_IFNAME": "eth0"}), tiny_base / "base_checkpoints"

    def start(tag):
        processes = []
        for rank, (name, address) in enumerate(two_hosts):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
                       "--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-id", tag, "--rdzv-endpoint",
                       f"{two_hosts[0][1]}:29500", "--local-addr", address, "--rdzv-conf",
                       f"is_host={1 - rank}", *args, "--tag", tag]
            log = open(tmp_path / f"{tag}{rank}.log", "w")
            command = [str(word) for word in command]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        return processes

    dying = start("dies")
    wait_for(folder / "dies" / "meta_000005.json", 120)
    victims = subprocess.run(["ip", "netns", "pids", two_hosts[1][0]], capture_output=True)
    for pid in victims.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    assert dying[0].wait(60) not in (0, 75)
    assert "by peer" in (tmp_path / "dies0.log").read_text()        # connection closed, or reset
    dying[1].wait()
    assert [process.wait(300) for process in start("dies")] == [0, 0]
    logs = (tmp_path / "dies0.log").read_text() + (tmp_path / "dies1.log").read_text()
    assert "resuming from step" in logs
    one = script("pretrain.py", *args[1:], "--tag", "alone", base=tiny_base)
    assert one.returncode == 0, one.stderr
    assert losses(folder / "dies") == pytest.approx(losses(folder / "alone"), rel=1e-4)


def test_a_half_made_venv_is_cleared_and_named(clone, tmp_path):
    """Debian's python3 without python3-venv leaves a .venv that has no pip."""
    folder = clone(RECORD)
    python3 = tmp_path / "bin" / "python3"
    write_program(python3, '[ "$2" != venv ] || { mkdir -p .venv/bin; echo half-made; exit 1; }')
    for command in ("bash", "cat", "dirname", "mkdir", "rm", "env"):
        (python3.parent / command).symlink_to(shutil.which(command))
    shutil.rmtree(folder / ".venv")
    write_program(folder / ".venv" / "bin" / "python", "exit 1")
    one_line(driver(folder, "demo", PATH=python3.parent), "python3-venv")
    assert not (folder / ".venv").exists()
    write_program(python3, f"""[ "$2" != venv ] || {{ mkdir -p .venv/bin; cp {python3.parent}/pip \
.venv/bin/python; }}""")
    write_program(python3.parent / "pip", 'echo "$@"')
    (python3.parent / "cp").symlink_to(shutil.which("cp"))
    done = driver(folder, "demo", PATH=python3.parent)
    assert "installing the packages" in done.stdout and "pip install" in done.stdout
    assert "demo.py" in done.stdout and (folder / ".venv" / "installed").exists()


# ---- Speed: what can be shown on a CPU -----------------------------------------------------------

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
    """Forward, loss and backward at 32,768 ids; 8 chunks here, 16 for 16 x 4,096 tokens."""
    peak = {}
    for name, loss in (("plain", "F.cross_entropy(model(ids)[0], ids[0])"),
                       ("chunked", "model(ids, ids, chunk=512)")):
        result = subprocess.run([sys.executable, "-c", PEAK.format(loss=loss)], text=True, cwd=HERE,
                                capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        peak[name] = int(result.stdout)
    assert peak["chunked"] < 0.5 * peak["plain"], peak


def test_float8_arithmetic():
    """Scales, saturation and formats: e4m3 up to 448 forward, e5m2 up to 57,344 for gradients."""
    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    x8, scale = M.to_float8(torch.tensor([[-3.0, 0.5, 0.001, 0.0]]), e4)
    assert x8.dtype == e4 and x8.float().abs().max() == 448
    assert scale.item() == pytest.approx(3 / 448)
    assert (x8.float() * scale)[0, 1].item() == pytest.approx(0.5, rel=2 ** -4)
    assert M.to_float8(torch.zeros(3), e5)[0].float().tolist() == [0, 0, 0]
    assert M.to_float8(torch.tensor([1e30, 1.0]), e5)[0].float().tolist() == [57344, 0]

    torch.manual_seed(0)
    x = torch.randn(48, 32, requires_grad=True)
    w, g = torch.randn(64, 32, requires_grad=True), torch.randn(48, 64)

    def rounded(tensor, dtype):
        values, scale = M.to_float8(tensor.detach(), dtype)
        return values.double() * scale.double()

    y = M.Float8Matmul.apply(x, w)
    gx, gw = torch.autograd.grad(y, (x, w), g)
    for got, expected in ((y, rounded(x, e4) @ rounded(w, e4).T),
                          (gx, rounded(g, e5) @ rounded(w, e4)),
                          (gw, rounded(g, e5).T @ rounded(x, e4))):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert 0.01 < (y - x @ w.T).norm() / (x @ w.T).norm() < 0.06


def test_float8_trains_and_evaluates_in_full_precision():
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(32, 64, 2, 2, 2, 64))
    model.init_weights()
    ids = torch.randint(0, 64, (4, 3)).repeat(1, 5)
    with torch.no_grad():
        before = model(ids)
    for module in model.transformer.h.modules():
        if isinstance(module, M.Linear):
            module.fp8 = True
    with torch.no_grad():
        assert torch.equal(model(ids), before)
    optimizer, losses = muon.build_optimizer(model), []
    for _ in range(30):
        targets = ids[:, 1:].contiguous()
        loss = M.accumulate_gradients(model, ids[:, :-1], targets, replace(CPU, micro=4))
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]


def test_float8_is_refused_where_there_is_none(tiny_base, refused):
    args = [*TINY, "--tpp", STEPS_20, "--tag", "fp8", "--fp8"]
    refused(pretrain, args, ["--fp8", "H100", "leave it out"], tiny_base)


def test_float8_is_for_the_blocks_and_not_for_the_head(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = small_model()
    M.set_fp8(model, replace(CPU, device=torch.device("cuda")))
    linears = {n: m.fp8 for n, m in model.named_modules() if isinstance(m, M.Linear)}
    assert linears.pop("lm_head") is False and len(linears) == 14 and all(linears.values())


def test_bench_prints_one_json_line_and_needs_no_files(tmp_path):
    result = script("pretrain.py", "--bench", "--depth", 1, "--vocab-size", 320, "--max-seq-len",
                    64, "--total-batch-size", 256, "--device-batch-size", 2, base=tmp_path)
    assert result.returncode == 0 and result.stdout.count("\n") == 1, result.stderr
    record = json.loads(result.stdout)
    assert record["tokens_per_second"] == pytest.approx(256 / record["step_seconds"], rel=0.01)
    flops = 6 * 253_952 + 6 * 128 * 64                      # of a token: 1 layer of 128 channels
    assert record["tflops"] == pytest.approx(record["tokens_per_second"] * flops / 1e12, abs=6e-4)
    assert record["matmul_tflops"] > 0 and record["peak_memory_gb"] > 0 and record["mfu"] is None
    assert (record["batch"], record["rows_at_a_time"], record["processes"]) == (256, 2, 1)
    assert (record["device"], record["dtype"], record["compile"]) == ("cpu", "float32", False)
    assert record["attention"] in ("MATH", "FLASH_ATTENTION") and record["depth"] == 1
    assert not list(tmp_path.iterdir())


# ---- Devices: what is refused before anything is downloaded --------------------------------------

@pytest.mark.parametrize("cuda, available, visible, driver, words", [
    ("13.0", False, None, "535.104.05", ["535.104.05", "CUDA 13.0", "580", "index-url"]),
    ("12.8", False, None, "470.82.01", ["470.82.01", "525"]),
    ("13.0", False, "0", "565.57.01", ["565.57.01", "CUDA_VISIBLE_DEVICES="]),
    ("13.0", False, None, "nonsense", ["unknown"]),
    ("13.0", True, None, "590.44.01", None), ("13.0", False, "", "535.104.05", None),
    (None, False, None, "535.104.05", None), ("13.0", False, None, None, None)])
def test_an_idle_gpu_is_refused(monkeypatch, tmp_path, cuda, available, visible, driver, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    file = tmp_path / "version"
    if driver:
        file.write_text(f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Aug 19\n"
                        "GCC version:  gcc version 12.3.0\n")
    if words is None:
        return M.check_driver(str(file))
    with pytest.raises(SystemExit) as caught:
        M.check_driver(str(file))
    assert "\n" not in caught.value.code and all(word in caught.value.code for word in words)


@pytest.mark.parametrize("compiler, header, words", [
    (True, True, None), (False, True, ["a C compiler", "gcc"]),
    (True, False, ["Python.h", "python3-dev"]),
    (False, False, ["a C compiler", "Python.h", "--compile 0"])])
def test_half_a_compiler_is_refused(monkeypatch, tmp_path, compiler, header, words):
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/cc" if compiler else None)
    monkeypatch.setattr(M.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    if header:
        (tmp_path / "Python.h").touch()
    if words is None:
        return M.check_compiler()
    with pytest.raises(SystemExit) as caught:
        M.check_compiler()
    assert "\n" not in caught.value.code and all(word in caught.value.code for word in words)


def test_the_device_is_judged_before_anything_else(monkeypatch, tmp_path, refused):
    """Neither a tokenizer nor a hub was asked for."""
    monkeypatch.setattr(M, "check_driver", lambda: sys.exit("idle"))
    refused(pretrain, ["--dataset", "x/y"], ["idle"], tmp_path)
    monkeypatch.setattr(M, "check_driver", lambda: None)
    for name in ("is_available", "set_device", "get_device_name", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **more: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(M, "check_compiler", lambda: sys.exit("half"))
    refused(pretrain, ["--dataset", "x/y"], ["half"], tmp_path)
    precision = torch.get_float32_matmul_precision()
    env = M.setup_env(compile=0)
    torch.set_float32_matmul_precision(precision)
    assert (env.device, env.dtype, env.compile) == (torch.device("cuda:0"), torch.bfloat16, False)
    assert env.peak_flops == 989e12 and not list(tmp_path.iterdir())


# ---- Downloads: a small stand-in for the hub -----------------------------------------------------

class FakeHub(http.server.ThreadingHTTPServer):
    """Serves files as the hub does. faults: for a file's name a list of what happens to the next
    answers with its content: a status, "cut" (half the body), "short" (10 bytes less, said so),
    "corrupt" (a flipped bit), "slow" (3 seconds in the middle). refuse: {part of a path: status}.
    silent: parts of paths that are never answered. log: the paths asked for; bodies: the files
    whose content was."""
    revision, daemon_threads = "c0ffee" * 6 + "c0ff", True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), FakeHubAnswer)
        self.files, self.faults, self.refuse, self.silent = dict(files), {}, {}, []
        self.log, self.bodies, self.over = [], [], threading.Event()

    def listing(self):
        siblings = [{"rfilename": name, "size": len(body), "blobId": "0" * 40,
                     "lfs": {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body),
                             "pointerSize": 1}} for name, body in self.files.items()]
        return json.dumps({"_id": "1", "id": "x/y", "sha": self.revision, "private": False,
                           "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}).encode()


class FakeHubAnswer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def do_GET(self):
        hub = self.server
        hub.log.append(self.path)
        name = self.path.split("/")[-1].split("?")[0]
        if any(part in self.path for part in hub.silent):
            hub.over.wait()
            self.close_connection = True
            return None
        for part, status in hub.refuse.items():
            if part in self.path:
                return self.answer(status)
        if "/api/datasets/" in self.path:
            return self.answer(200, hub.listing())
        if name not in hub.files:
            return self.answer(404)
        body = hub.files[name]
        headers = {"X_Repo_Commit": hub.revision, "X_Linked_Size": len(body),
                   "ETag": '"' + hashlib.sha256(body).hexdigest() + '"'}
        if self.command == "HEAD":
            return self.answer(200, b"", **{**headers, "Content_Length": len(body)})
        hub.bodies.append(name)
        faults = hub.faults.get(name)
        return self.send_file(body, headers, faults.pop(0) if faults else None)

    def send_file(self, body, headers, fault):
        if isinstance(fault, int):
            self.answer(fault, b"", Retry_After=1)
        elif fault == "short":
            self.answer(200, body[:-10], **headers)
        elif fault == "corrupt":
            self.answer(200, body[:50] + bytes([body[50] ^ 1]) + body[51:], **headers)
        elif fault in ("cut", "slow"):
            self.answer(200, body[:len(body) // 2], **{**headers, "Content_Length": len(body)})
            if fault == "slow":
                self.server.over.wait(3)
                self.wfile.write(body[len(body) // 2:])
            self.close_connection = True
        else:
            self.answer(200, body, **headers)

    do_HEAD = do_GET


@pytest.fixture
def hub(tiny_base, tmp_path):
    """A FakeHub with tiny_base's shards; hub.env leads a script there."""
    files = {path.name: path.read_bytes()
             for path in (tiny_base / "data" / "climbmix").glob("*.parquet")}
    server = FakeHub(files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                  "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")}
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def test_shards_arrive_undamaged_past_every_fault(hub, tmp_path):
    hub.faults = {"shard_00000.parquet": [429, "cut"], "shard_00001.parquet": [503, "short"],
                  "shard_06542.parquet": ["corrupt", "slow"]}
    env = {**hub.env, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    result = script("pretrain.py", "--fetch", 2, "--patience", 60, base=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    data = tmp_path / "data" / "climbmix"
    names = ("shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet")
    got = {path.name: path.read_bytes() for path in data.glob("*.parquet")}
    assert got == {name: hub.files[name] for name in names} and not any(hub.faults.values())
    assert json.loads((data / "index.json").read_text())["revision"] == hub.revision
    asked = len(hub.log)                                    # nothing is asked twice
    result = script("pretrain.py", "--fetch", 2, base=tmp_path, env=hub.env)
    assert result.returncode == 0 and result.stdout.count(": there\n") == 3
    assert len(hub.log) == asked


def test_fetch_says_when_there_are_fewer_shards(tiny_base, capsys):
    data = str(tiny_base / "data" / "climbmix")
    for n, said in ((2, False), (3, False), (4, True)):
        pretrain.fetch_only(pretrain.Config(dataset="local", data_dir=data, fetch=n))
        out = capsys.readouterr().out
        assert ("--fetch 4: there are only 3 training shards" in out) is said
        assert out.count(": there\n") == min(n, 3) + 1


def test_two_jobs_that_want_the_same_shard_fetch_it_once(hub, tmp_path):
    jobs = [start("pretrain.py", "--fetch", 1, base=tmp_path, env=hub.env) for _ in range(2)]
    outputs = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert sorted(hub.bodies) == ["shard_00000.parquet", pretrain.VALIDATION]


def test_a_shard_that_never_arrives_is_named(hub, tmp_path):
    hub.faults = {"shard_00000.parquet": ["corrupt"] * 99}
    result = script("pretrain.py", "--fetch", 1, "--patience", 2, base=tmp_path, env=hub.env)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and "shard_00000.parquet" in last and "hash" in last
    assert not list((tmp_path / "data" / "climbmix").glob("*.parquet"))


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", ["/api/datasets/", "shard_00000"])
def test_a_hub_that_refuses_ends_at_once_and_names_the_token(hub, tmp_path, where, status):
    hub.refuse = {where: status}
    began = time.time()
    result = script("pretrain.py", "--fetch", 1, "--dataset", "x/y", base=tmp_path, env=hub.env)
    one_line(result, "HF_TOKEN", str(status), "x/y")
    assert time.time() - began < 30 and len(hub.log) <= 4   # patience is 600 s


def test_a_shard_that_fits_nowhere_is_one_line(hub, tmp_path):
    limit = min(map(len, hub.files.values())) // 2
    result = script("pretrain.py", "--fetch", 1, base=tmp_path, env=hub.env,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    one_line(result, "cannot write", "File too large", "NANOCHAT_BASE_DIR")


def test_shards_stream_and_a_hub_that_goes_away_costs_no_step(hub, tiny_base, tmp_path):
    """The hub has one shard and then fails: the run trains on what is there, saves, says why, and
    later ends in the same tensors. It asks for the next two shards, and no more."""
    (tmp_path / "tokenizer").symlink_to(tiny_base / "tokenizer")
    for i in range(3, 9):
        hub.files[f"shard_{i:05d}.parquet"] = hub.files["shard_00000.parquet"]
    hub.faults = {"shard_00001.parquet": [503] * 999, "shard_00003.parquet": [503] * 999}
    args = [*TINY, "--dataset", "x/y", "--tpp", tpp_for(110), "--patience", 3, "--tag", "hub",
            "--save-every", 1000]
    folder = tmp_path / "base_checkpoints" / "hub"
    result = script("pretrain.py", *args, base=tmp_path, env=hub.env)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    step = max(M.checkpoint_steps(folder))
    assert 60 < step < 110
    assert last.startswith(f"stopped at step {step}: shard_00001.parquet of x/y")
    assert last.endswith(f". The same command resumes from step {step}")
    del hub.faults["shard_00001.parquet"]                   # 00003 is fetched ahead, not needed
    hub.bodies.clear()
    result = script("pretrain.py", *args, base=tmp_path, env=hub.env)
    assert result.returncode == 0 and f"resuming from step {step}" in result.stdout, result.stderr
    assert set(hub.bodies) <= {f"shard_{i:05d}.parquet" for i in (1, 2, 3)}
    assert final(folder)[3]["revision"] == hub.revision
    result = script("pretrain.py", *TINY, "--tpp", tpp_for(110), "--tag", "calm", base=tiny_base)
    assert result.returncode == 0 and result.stdout.count("epoch") == 0
    assert_same_run(folder, tiny_base / "base_checkpoints" / "calm", revision=False)


def test_a_stop_is_heeded_while_data_are_awaited(hub, tiny_base, tmp_path):
    """A hub that is asked for the second shard and does not answer, then one that fits nowhere."""
    (tmp_path / "tokenizer").symlink_to(tiny_base / "tokenizer")
    hub.files["shard_00001.parquet"] = random.Random(0).randbytes(3_000_000)
    args = [*TINY, "--dataset", "x/y", "--tpp", tpp_for(110), "--tag", "waiting"]
    hub.silent = ["shard_00001"]
    process, output = start("pretrain.py", *args, base=tmp_path, env=hub.env), ""
    for line in process.stdout:
        output += line
        if line.startswith("step 00060 |"):                 # there are rows for some 20 more
            threading.Timer(4, process.send_signal, (signal.SIGTERM,)).start()
        if line.startswith("stopping"):
            asked = time.time()
    step = max(M.checkpoint_steps(tmp_path / "base_checkpoints" / "waiting"))
    assert process.wait() == M.INTERRUPTED and f"stopped at step {step}: SIGTERM" in output, output
    assert step < 110 and time.time() - asked < 5           # the hub still has not answered

    hub.silent = []                                         # it stands where data ran out:
    limit = 2_500_000                                       # more than a checkpoint's files have
    result = script("pretrain.py", *args, base=tmp_path, env=hub.env,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    one_line(result, f"stopped at step {step}: cannot write", "File too large")


def test_ctrl_c_while_the_hub_does_not_answer(hub, tiny_base, tmp_path):
    """Neither the listing nor the validation shard is there yet: there is nothing to save."""
    (tmp_path / "tokenizer").symlink_to(tiny_base / "tokenizer")
    for silent in ("/api/datasets/", pretrain.VALIDATION):
        hub.silent, asked = [silent], len(hub.log)
        process = start("pretrain.py", *TINY, "--dataset", "x/y", base=tmp_path, env=hub.env)
        until = time.time() + 60
        while time.time() < until and not any(silent in path for path in hub.log[asked:]):
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0].splitlines()
        assert process.returncode == 1 and output[-1] == "interrupted", output
        assert all(line.startswith("#") for line in output[:-1])


class Clock:
    """Stands for the time module: sleeping takes no time."""
    def __init__(self):
        self.now, self.slept = 0.0, []

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)


class Refusal(Exception):
    def __init__(self, status, **headers):
        self.response = types.SimpleNamespace(status_code=status, headers=headers)


@pytest.mark.parametrize("errors, slept, words", [
    ([OSError("cut"), ValueError(), TimeoutError()], [1, 2, 4], None),
    ([Refusal(503, **{"Retry-After": "7"}), Refusal(429), Refusal(408)], [7, 2, 4], None),
    ([OSError("cut\nand more")] * 99, [1, 2, 4, 8, 16, 32], ["cut. It did not come within 99 s"]),
    ([ValueError()] * 99, [1, 2, 4, 8, 16, 32], ["a file: ValueError. It did not come"]),
    ([Refusal(429, **{"Retry-After": "500"})], [], ["429", "99 s"]),
    ([Refusal(404)], [], ["(404)"]),
    ([Refusal(401)], [], ["401", "HF_TOKEN"]),
    ([OSError("x"), Refusal(403)], [1], ["403", "HF_TOKEN"])])
def test_retry(monkeypatch, capsys, errors, slept, words):
    clock, waiting = Clock(), iter(errors)
    monkeypatch.setattr(M, "time", clock)
    def attempt():
        for error in waiting:
            raise error
        return "here it is"
    if words is None:
        assert M.retry("a file", 99, attempt) == "here it is"
    else:
        with pytest.raises(M.FetchError) as caught:
            M.retry("a file", 99, attempt)
        assert "\n" not in caught.value.code and all(word in caught.value.code for word in words)
    assert clock.slept == slept and len(capsys.readouterr().err.splitlines()) == len(slept)


def test_retry_does_not_repeat_what_the_disk_refuses(monkeypatch):
    monkeypatch.setattr(M, "time", Clock())
    def attempt():
        raise OSError(errno.ENOSPC, "No space left on device", "x.parquet")
    with pytest.raises(OSError, match="No space left"):
        M.retry("a file", 99, attempt)
    with pytest.raises(SystemExit, match="cannot write x.parquet: No space left on") as caught:
        M.guard(attempt)
    assert "\n" not in caught.value.code


# ---- Bad input: one clear line, non-zero exit, nothing lost --------------------------------------

@pytest.mark.parametrize("args, words", [
    (("--drope", 150), ["--drope 150", "0 to 99"]), (("--drope", -1), ["--drope -1"]),
    (("--depth", 0), ["--depth 0", "1 to 99"]), (("--depth", "9" * 20), ["--depth", "1 to 99"]),
    (("--tpp", "many"), ["--tpp", "--help"]), (("--tag", "../x"), ["--tag", "folder's name"]),
    (("--total-batch-size", 1000), ["1000", "max_seq_len", "take 1024"]),
    (("--total-batch-size", 1), ["--total-batch-size 1", "take 64"]),
    (("--tpp", 0.001), ["--tpp 0.001", "0 steps"]), (("--tpp", 1e6), ["--tpp 1e+06", "steps"]),
    (("--data-dir", "/nowhere"), ["/nowhere", "shard_06542.parquet", "--dataset local"]),
    (("--tokenizer-dir", "/nowhere"), ["/nowhere", "tok.py"]),
    (("--keep", "abc"), ["--keep abc"]), (("--keep", 150), ["--keep 150", "below 100"]),
    (("--keep", "25,,50"), ["--keep 25,,50"]), (("--compile", 7), ["--compile 7", "0 to 1"]),
    (("--fetch", -1), ["--fetch -1"]), (("--fetch", 0), ["--fetch 0", "above 0"]),
    (("--dept", 3), ["unrecognized", "--dept"]), (("--total-batch", 64), ["unrecognized"]),
    (("--trunk", "x"), ["unrecognized"]), (("--epochs", 2), ["unrecognized"]),
    (("extra",), ["unrecognized", "extra"]), (("--tag",), ["--tag", "--help"])])
def test_pretrain_refuses(tiny_base, refused, args, words):
    refused(pretrain, [*TINY, "--tpp", STEPS_20, "--tag", "refused", *args], words, tiny_base)


@pytest.mark.parametrize("args, words", [
    ("--tag d9_9tpp --depth 18", ["--tag d9_9tpp", "--depth 18"]),
    ("--tag d9_9tpp --tpp 20", ["--tag d9_9tpp", "--tpp 20"]),
    ("--tag d9_9tpp --drope 50", ["--tag d9_9tpp", "--drope 50"]),
    ("--tag d9_9tpp_drope_50 --drope 25", ["--tag d9_9tpp_drope_50", "--drope 25"]),
    ("--tag d18_9tpp_drope_050", ["d18_9tpp_drope_050", "written d18_9tpp_drope_50"]),
    ("--tag d018_9tpp", ["written d18_9tpp"]), ("--tag d18_9.0tpp", ["written d18_9tpp"]),
    ("--tag d18_9tpp_long", ["written d18_9tpp"]), ("--tag d18_9tpp_drope", ["written d18_9tpp"]),
    ("--tag d18_9tpp_drope_150", ["drope 0 to 99"]), ("--tag d0_9tpp", ["1 to 99"]),
    ("--tag d100_9tpp", ["1 to 99"]), ("--tag d18_0tpp", ["above 0"])])
def test_a_tag_and_options_that_contradict_it_are_refused(tmp_path, refused, args, words):
    refused(pretrain, args.split(), words, tmp_path)
    assert not list(tmp_path.iterdir())


NUMBERS = [field.name for field in fields(pretrain.Config)
           if field.type in (int, float, int | None, float | None)]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-4", "1e9", "4x", ""])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_none_are_refused(tiny_base, tmp_path, refused, name, value):
    """1e9 is a number, and for a few options one that might be meant."""
    if value == "1e9" and name in ("patience", "speed"):
        return
    option = "--" + name.replace("_", "-")
    share(tiny_base, tmp_path)
    args = ["--tag", "refused", "--dataset", "local", option, value]
    line = refused(pretrain, args, [option], tmp_path)
    if (name, value) != ("tpp", "1e9"):                     # that makes too many steps
        assert line.endswith(" (see --help)"), line
    assert not (tmp_path / "base_checkpoints").exists()


def test_what_is_refused_ends_a_process_with_one_line(tiny_base):
    one_line(script("pretrain.py", *TINY, "--drope", 150, base=tiny_base), "--drope 150", "0 to 99")
    one_line(script("sft.py", "--spelling-rows", -5, base=tiny_base), "--spelling-rows -5")


def test_another_recipe_is_refused_and_the_field_named(drope_run, tiny_base, refused):
    files = [path for path in (drope_run / "drope").iterdir() if path.name != ".lock"]
    before = [path.read_bytes() for path in files]
    for option, field in (("--drope", "drope"), ("--tpp", "tpp"), ("--matrix-lr", "matrix_lr"),
                          ("--eval-every", "eval_every"), ("--max-seq-len", "max_seq_len")):
        args = [*TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", "drope", option, 16]
        words = [str(drope_run / "drope"), f"{field} = ", ", not 16", "--tag"]
        refused(pretrain, args, words, tiny_base)
    assert before == [path.read_bytes() for path in files]


def test_a_checkpoint_of_another_tokenizer_is_refused(drope_run, tiny_base, tmp_path, refused):
    write_tokenizer(tmp_path / "tok", [b"xy", b"he", b" z", b"in"])
    args = [*TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", "drope",
            "--tokenizer-dir", tmp_path / "tok"]
    refused(pretrain, args, [str(drope_run / "drope"), "tokenizer ="], tiny_base)


def test_a_checkpoint_of_the_public_repo_cannot_be_resumed(drope_run, tiny_base, refused):
    """It has no recipe, no loader file, no sha256, and says other things in user_config."""
    folder = drope_run / "public"
    folder.mkdir()
    files = M.checkpoint_files(drope_run / "drope", 20)
    for part in ("model", "optim", "meta"):
        shutil.copy(files[part], folder)
    public = ("step", "val_bpb", "model_config", "user_config", "device_batch_size", "max_seq_len",
              "total_batch_size", "loop_state")
    meta = {key: value for key, value in M.read_meta(folder, 20).items() if key in public}
    meta["user_config"].update(run="dummy", core_metric_every=2000)
    meta["dataloader_state_dict"] = {"pq_idx": 1, "rg_idx": 4, "epoch": 1}
    M.checkpoint_files(folder, 20)["meta"].write_text(json.dumps(meta))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    args = [*TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", "public"]
    refused(pretrain, args, [str(folder), "other code", "sft.py can use it"], tiny_base)
    (folder / ".lock").unlink()
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("whence", ["local", "hub"])
@pytest.mark.parametrize("content", [b"", b"PAR1 is not all PAR1", "no rows", "no column", "cut"])
def test_a_damaged_shard_is_named(tiny_base, tmp_path, refused, content, whence):
    """And only where the hub has another is it said that one is fetched."""
    data = tmp_path / "data"
    for name in ("shard_00000.parquet", pretrain.VALIDATION):
        write_shard(data / name, some_texts(300, 3))
    bad = data / "shard_00000.parquet"
    if content == "no rows":
        write_shard(bad, pa.array([], pa.string()))
    elif content == "no column":
        pq.write_table(pa.table({"words": ["a"]}), bad)
    else:
        bad.write_bytes(bad.read_bytes()[:-9] if content == "cut" else content)
    mend = "put a whole one there"
    if whence == "hub":
        index = dict(dataset="x/y", revision="1", sha256={name: "2" for name in os.listdir(data)})
        (data / "index.json").write_text(json.dumps(index))
        mend = "delete it, and it is fetched anew"
    args = [*TINY, "--tpp", STEPS_20, "--tag", tmp_path.name, "--data-dir", data,
            "--dataset", "local" if whence == "local" else "x/y"]
    refused(pretrain, args, [f"{bad} cannot be read", mend], tiny_base)


def test_shards_of_another_dataset_are_refused(tiny_base, tmp_path, refused):
    (tmp_path / "index.json").write_text(json.dumps(dict(dataset="x/y", revision="1", sha256={})))
    args = [*TINY, "--tpp", STEPS_20, "--dataset", "x/z", "--tag", "z", "--data-dir", tmp_path]
    refused(pretrain, args, [str(tmp_path), "x/y", "x/z", "--data-dir"], tiny_base)


def test_a_folder_that_cannot_be_written(tiny_base, tmp_path, refused):
    (tmp_path / "file").write_text("in the way")
    args = [*TINY, "--tpp", STEPS_20, "--tokenizer-dir", tiny_base / "tokenizer", "--data-dir",
            tiny_base / "data" / "climbmix"]
    for base in ("file", "file/out"):
        refused(pretrain, args, [str(tmp_path / "file"), "NANOCHAT_BASE_DIR"], tmp_path / base)
    assert (tmp_path / "file").read_text() == "in the way"


def small_disk(folder):
    """Mounts a file system of 8 MB there; False where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    return os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("how", ["No space left on device", "File too large"])
def test_a_full_disk_leaves_earlier_checkpoints(drope_run, tiny_base, tmp_path, how):
    """A checkpoint takes 3 MB, and there are three for a moment. With more room, it resumes."""
    base, limits = tmp_path / "disk", (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    full = how.startswith("No")
    if full and not small_disk(base):
        pytest.skip("mounting a small file system takes root")
    try:
        share(tiny_base, base)
        folder = base / "base_checkpoints" / "disk"
        args = ("pretrain.py", *TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", "disk")
        if not full:                                        # with two checkpoints, forbid the third
            signal_at(signal.SIGTERM, "step 00012 |", *args, base=base)
            limits = (10 ** 6, 10 ** 6)
        result = script(*args, base=base,
                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))
        one_line(result, "cannot write", str(folder), how, "NANOCHAT_BASE_DIR")
        steps = M.checkpoint_steps(folder)
        assert len(steps) == 2 and M.newest_checkpoint(folder) == steps[-1]
        assert all(M.newest_checkpoint(folder, [step]) == step for step in steps)
        assert not list(folder.glob(".*.tmp"))
        if full:
            subprocess.run(["mount", "-o", "remount,size=64m", str(base)], check=True)
        result = script(*args, base=base)
        assert result.returncode == 0 and f"resuming from step {steps[-1]}" in result.stdout
        assert_same_run(drope_run / "drope", folder)
    finally:
        if full:
            subprocess.run(["umount", str(base)], check=True)


def test_one_run_at_a_time_in_a_folder(tiny_base, refused):
    folder = tiny_base / "base_checkpoints" / "busy"
    half = folder / ".model_000005.pt.99.tmp"
    lock = M.lock_file(folder / ".lock", wait=False)
    half.touch()
    args = [*TINY, "--tpp", STEPS_20, "--tag", "busy"]
    refused(pretrain, args, [str(folder), "in use by another run"], tiny_base)
    assert half.exists()                                    # the other run is writing it
    lock.close()
    M.lock_file(folder / ".lock", wait=False).close()


@pytest.mark.parametrize("number, goes_on", [
    (errno.ENOLCK, True), (errno.ENOSYS, True), (errno.EOPNOTSUPP, True),
    (errno.EWOULDBLOCK, False), (errno.EIO, False)])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number, goes_on):
    import fcntl
    def flock(file, how):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", flock)
    if not goes_on:
        with pytest.raises(OSError):
            M.lock_file(tmp_path / "x.lock", wait=False)
        return
    for wait in (False, True):                              # a run's lock, a download's
        M.lock_file(tmp_path / "x.lock", wait).close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("no locks" in line and "x.lock" in line for line in lines)


@pytest.mark.parametrize("where, words", [
    ("lm_head.weight", ["the loss of step 16 is nan", "step 15"]),
    ("transformer.wte.weight", ["at step 20 transformer.wte.weight is not finite", "step 15"])])
def test_what_is_not_finite_stops_the_run(drope_run, tiny_base, refused, where, words):
    """A weight of the whole head; one of a token that never occurs, so that only saving notices."""
    folder = drope_run / f"not_finite_{where}"
    shutil.copytree(drope_run / "drope", folder)
    for path in M.checkpoint_files(folder, 20).values():
        path.unlink()
    file = M.checkpoint_files(folder, 15)["model"]
    weights = torch.load(file)
    if where == "lm_head.weight":
        weights[where][0, 0] = math.nan
    else:
        weights[where][-1, 0] = math.nan
    torch.save(weights, file)
    change_meta(folder, 15, lambda meta: meta["sha256"].update({file.name: M.file_hash(file)}))
    args = [*TINY, "--tpp", STEPS_20, "--drope", 50, "--tag", folder.name]
    refused(pretrain, args, [*words, "lower learning rates"], tiny_base)
    assert M.checkpoint_steps(folder) == [15]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a" / "x.txt"
    M.atomic_write(file, "old")
    def fails(f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left on device.*x.txt"):
        M.atomic_write(file, fails)
    assert file.read_text() == "old" and len(list(file.parent.iterdir())) == 1


# ==== tok.py ======================================================================================

TOK_TEXTS = ["def add(a, b):\n    return a + b  # 12345\n", "<|bos|> is only text here",
             "the then other, aaaaaaa", "", "  \n\t tabs\tand   spaces  \n\n\n",
             "It's 7; they'll say \"naïve café\" – 東京 🎉🎉.\r\n\r\n"]


def tok_write_shard(path, texts, rows_per_group=4):
    """A shard in the layout of the pretraining data: one string column, zstd, small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"text": pa.array(texts, pa.string())})
    pq.write_table(table, path, row_group_size=rows_per_group, compression="zstd")


def tok_documents(n, seed=0):
    """n documents of random words from a skewed vocabulary, some with odd white space, digits and
    other scripts."""
    r = random.Random(seed)
    words = ["".join(r.choices("etaoinshrdlu", k=r.randint(1, 8))) for _ in range(300)]
    words += ["naïve", "東京", "42", "n't", "🎉"]
    texts = [[words[int(r.paretovariate(0.6)) % len(words)] for _ in range(r.randint(5, 120))]
             for _ in range(n)]
    return [" ".join(text) + "\n" * r.randint(0, 3) for text in texts]


def tok_run(*args):
    """Run the command line."""
    command = [sys.executable, tok.__file__, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def tok_made(tmp_path_factory):
    """A tokenizer of 400 ids trained by the command line: data folder, out folder, process."""
    folder = tmp_path_factory.mktemp("tok")
    tok_write_shard(folder / "data/shard_00000.parquet", tok_documents(30, seed=1))
    tok_write_shard(folder / "data/shard_00001.parquet", tok_documents(30, seed=2))
    tok_write_shard(folder / "data/shard_06542.parquet", ["zqxjzqxj " * 500])
    done = tok_run("--data-dir", folder / "data", "--out-dir", folder / "out",
                   "--vocab-size", 400, "--workers", 1)
    assert done.returncode == 0, done.stderr
    return folder / "data", folder / "out", done

# ---- tok.py: the trainer -------------------------------------------------------------------------

@pytest.mark.parametrize("train", [tok.train_slowly, tok.train])
def test_tok_merges_worked_by_hand(train):
    """
    low x 5, lower x 2, newest x 6. w e is there 2 + 6 = 8 times: we. Then l o 5 + 2 = 7: lo (o w
    lost 2 to we, has 5). e we, n e, we s, s t have 6 each, and e is the smallest left one: ewe.
    Likewise newe, st, newest. lo w has 5: low. lo we and we r have 2: we (id 256) is smaller than
    lo (257): wer. Then lower, and no pair is left.
    """
    tokens = train({"low": 5, "lower": 2, "newest": 6}, 100)
    assert tokens[:256] == [bytes([i]) for i in range(256)]
    assert b" ".join(tokens[256:]) == b"we lo ewe newe st newest low wer lower"


@pytest.mark.parametrize("train", [tok.train_slowly, tok.train])
@pytest.mark.parametrize("run, merges", [
    (2, [b"aa"]), (3, [b"aa", b"aaa"]), (4, [b"aa", b"aaaa"]), (5, [b"aa", b"aaa", b"aaaaa"]),
    (7, [b"aa", b"aaaa", b"aaa", b"aaaaaaa"])])
def test_tok_a_run_of_one_letter_is_merged_from_the_left(train, run, merges):
    """5: aa aa a, then (aa, a) before (aa, aa), both once, a having the smaller id.
    7: aa aa aa a, (aa, aa) twice."""
    assert train({"a" * run: 1}, 10)[256:] == merges


@pytest.mark.parametrize("train", [tok.train_slowly, tok.train])
def test_tok_overlapping_pairs_are_counted(train):
    """b b b has two pairs b b, so 2 x 3 = 6 beat x y with 5."""
    assert train({"bbb": 3, "xy": 5}, 1)[256:] == [b"bb"]


@pytest.mark.parametrize("train", [tok.train_slowly, tok.train])
def test_tok_stops_when_no_pair_is_left(train):
    """x y z is rarer than the first floors of the heap, and y z is gone once x y is merged."""
    assert train({"ab": 80, "xyz": 1}, 4)[256:] == [b"ab", b"xy", b"xyz"]
    assert train({}, 4)[256:] == train({"a": 9, "b": 1}, 4)[256:] == []


def tok_corpora():
    """300 corpora of few letters (ties, runs, overlaps), words, or any characters, with and without
    pairs left over -> (documents, {chunk: count}, merges) of each."""
    alphabets = ["a", "ab", "aab ", "abc", "abcd 1'\n", "etaoinshrdlu  \n", "aé東🎉 ",
                 "'sS tT\r\n\t 12!?", "the cat.\u00a0\u2003_-"]
    for seed in range(300):
        r = random.Random(seed)
        letters = r.choice(alphabets)
        documents = ["".join(r.choices(letters, k=r.randint(0, 60)))
                     for _ in range(r.randint(1, 60))]
        documents += tok_documents(seed % 4, seed)
        counts = collections.Counter(chunk for text in documents for chunk in tok.split(text))
        yield documents, counts, r.choice([1, 5, 30, 200])


def test_tok_fast_training_equals_the_textbook():
    for _, counts, n_merges in tok_corpora():
        assert tok.train(counts, n_merges) == tok.train_slowly(counts, n_merges), counts


def test_tok_equals_rustbpe():
    rustbpe = pytest.importorskip("rustbpe")
    for documents, counts, n_merges in tok_corpora():
        reference = rustbpe.Tokenizer()
        reference.train_from_iterator(iter(documents), 256 + n_merges, pattern=tok.PATTERN)
        expected = [bytes(token) for token, _ in reference.get_mergeable_ranks()]
        assert tok.train(counts, n_merges) == expected, documents


def test_tok_split_is_the_one_tiktoken_makes():
    """With the 256 bytes and one token for each chunk, tiktoken shows where it splits."""
    for text in TOK_TEXTS + tok_documents(20, seed=3):
        chunks = tok.split(text)
        assert "".join(chunks) == text
        ranks = {bytes([i]): i for i in range(256)}
        for chunk in chunks:
            ranks.setdefault(chunk.encode(), len(ranks))
        encoding = tiktoken.Encoding("chunks", pat_str=tok.PATTERN, mergeable_ranks=ranks,
                                     special_tokens={})
        ids = encoding.encode_ordinary(text)
        assert [encoding.decode_single_token_bytes(i).decode() for i in ids] == chunks


def test_tok_split_is_the_same_with_re_and_regex():
    """For every character up to U+FFFF, beside letters, digits, signs and white space, and for
    random mixtures."""
    full = regex.compile(tok.PATTERN)
    characters = [chr(i) for i in range(0x10000) if not 0xD800 <= i < 0xE000]
    for i in range(0, len(characters), 512):
        text = "".join(f"a{c}b '{c}{c}1{c}2 {c}x.{c}\n{c} \t{c}{c}\n"
                       for c in characters[i:i + 512])
        assert tok.fast.findall(text) == full.findall(text), f"U+{i:04X}"
    for seed in range(300):
        r = random.Random(seed)
        text = "".join(r.choices(" \n\r\t\x1c\x85\u2003'sL\u017fé1².\u0301", k=300))
        assert tok.split(text) == tok.fast.findall(text) == full.findall(text)
        assert tok.split(text + "🎉" + text) == full.findall(text + "🎉" + text)

# ---- tok.py: the files ---------------------------------------------------------------------------

def test_tok_files(tok_made):
    """Ranks 0, 1, 2, ... of distinct tokens, bytes first; the 9 special tokens have the last ids,
    in order."""
    data, out, done = tok_made
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "tokenizer.tiktoken"]
    lines = [line.split(b" ") for line in (out / "tokenizer.tiktoken").read_bytes().splitlines()]
    assert [int(rank) for _, rank in lines] == list(range(391))
    tokens = [base64.b64decode(token) for token, _ in lines]
    assert tokens[:256] == [bytes([i]) for i in range(256)] and len(set(tokens)) == 391
    ranks = {token: i for i, token in enumerate(tokens)}
    assert load_tiktoken_bpe(str(out / "tokenizer.tiktoken")) == ranks
    config = json.loads((out / "config.json").read_text())
    assert config["pat_str"] == tok.PATTERN
    assert list(config["special_tokens"].items()) == list(zip(
        ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
         "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"],
        range(391, 400)))
    texts = tok_documents(30, seed=1) + tok_documents(30, seed=2)
    assert (config["chars"], config["docs"], config["shards"]) == (sum(map(len, texts)), 60, 2)


def test_tok_round_trip_in_tiktoken(tok_made):
    """What tiktoken makes of the files gives every text back; a special token's name in a text
    stays text."""
    _, out, _ = tok_made
    config = json.loads((out / "config.json").read_text())
    ranks = load_tiktoken_bpe(str(out / "tokenizer.tiktoken"))
    encoding = tiktoken.Encoding("made", pat_str=config["pat_str"], mergeable_ranks=ranks,
                                 special_tokens=config["special_tokens"], explicit_n_vocab=400)
    for text in TOK_TEXTS + tok_documents(10, seed=4):
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text and max(ids, default=0) < 391
    assert encoding.encode("<|bos|>", allowed_special="all") == [391]


def test_tok_the_validation_shard_is_not_used(tok_made):
    """It says zqxj 1,000 times, the training shards never do."""
    _, out, done = tok_made
    tokens = load_tiktoken_bpe(str(out / "tokenizer.tiktoken"))
    assert not [token for token in tokens if b"zq" in token or b"xj" in token]
    assert "fewer than the 2,000,000,000 characters" in done.stdout
    assert "round trip through tiktoken ok" in done.stdout


def test_tok_same_bytes_with_two_workers(tok_made, tmp_path):
    data, out, _ = tok_made
    done = tok_run("--data-dir", data, "--out-dir", tmp_path, "--vocab-size", 400, "--workers", 2)
    assert done.returncode == 0, done.stderr
    made, again = out / "tokenizer.tiktoken", tmp_path / "tokenizer.tiktoken"
    assert again.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_tok_takes_documents_in_order_until_there_are_enough(tmp_path, workers):
    """Documents are cut at doc_cap; the one that reaches max_chars is the last; later shards are
    not even opened."""
    texts = [str(i) * 30 for i in range(10)]
    tok_write_shard(tmp_path / "shard_00000.parquet", texts[:5] + [None], rows_per_group=2)
    tok_write_shard(tmp_path / "shard_00001.parquet", texts[5:], rows_per_group=2)
    shards = sorted(tmp_path.glob("*.parquet"))
    if workers == 1:  # more workers read ahead
        shards.append(tmp_path / "missing.parquet")
    counts, chars, docs, n_shards = tok.count_chunks(shards, 161, 20, workers)
    # 9 texts of 20 characters and the missing one, from both shards
    assert (chars, docs, n_shards) == (180, 10, 2)
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
    args = ["--data-dir", data, "--out-dir", tmp_path, "--vocab-size", 400, "--workers", 1]
    assert tok_run(*args).returncode == 0
    made, again = out / "tokenizer.tiktoken", tmp_path / "tokenizer.tiktoken"
    assert again.read_bytes() == made.read_bytes()


def test_tok_defaults_lie_under_the_base_folder(tmp_path):
    """NANOCHAT_BASE_DIR/data/climbmix and NANOCHAT_BASE_DIR/tokenizer; tok.py needs no other file
    of the project."""
    tok_write_shard(tmp_path / "base/data/climbmix/shard_00000.parquet", tok_documents(5))
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/tok.py").write_text(Path(tok.__file__).read_text())
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env["NANOCHAT_BASE_DIR"] = str(tmp_path / "base")
    done = subprocess.run([sys.executable, "tok.py", "--vocab-size", "300", "--workers", "1"],
                          cwd=tmp_path / "alone", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "base/tokenizer/config.json").exists()


@pytest.mark.parametrize("number, moment", [
    (signal.SIGKILL, "counting"), (signal.SIGTERM, "counting"), (signal.SIGINT, "counting"),
    (signal.SIGTERM, "distinct chunks in"), (signal.SIGINT, "distinct chunks in")])
def test_tok_a_signal_leaves_all_or_nothing(tmp_path, number, moment):
    """Stopped while counting or merging: one line, no file, no part of one, no worker left that
    holds the output. Ctrl-C goes to the workers as well."""
    tok_write_shard(tmp_path / "data/shard_00000.parquet", tok_documents(2000) * 3, 50)
    command = [sys.executable, tok.__file__, "--data-dir", tmp_path / "data",
               "--out-dir", tmp_path / "out", "--workers", "2", "--vocab-size", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while moment not in process.stdout.readline():
        assert process.poll() is None
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert (process.returncode, error) == (1, "interrupted\n")
    assert not list((tmp_path / "out").iterdir())


def test_tok_ctrl_c_while_importing_is_one_line(tmp_path):
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)"
    (tmp_path / "numpy.py").write_text(slow)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, tok.__file__], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n" and process.returncode == 1


# ---- tok.py: what a user can get wrong -----------------------------------------------------------

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
    if kind == "column of numbers":
        pq.write_table(pa.table({"text": [1, 2]}), shard)
    if kind == "out folder is a file":
        out.write_text("mine")
    size = {"too little text": 3000, "vocabulary too small": 100, "vocabulary too large": 70_000}
    return ["--data-dir", data, "--out-dir", out, "--vocab-size", size.get(kind, 300)]


@pytest.mark.parametrize("kind, says", [
    ("no data folder", "pretrain.py --fetch 8"), ("no training shard", "pretrain.py --fetch 8"),
    ("shard of no bytes", "shard_00001.parquet"),
    ("shard without documents", "shard_00001.parquet"),
    ("shard cut short", "shard_00001.parquet"), ("shard damaged inside", "shard_00001.parquet"),
    ("shard without the column", "shard_00001.parquet"),
    ("column of numbers", "shard_00001.parquet"),
    ("out folder is a file", "--out-dir"),
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


@pytest.mark.parametrize("args, words", [
    (["--vocab", "400"], "--vocab"), (["--workers", "-4"], "'-4'"), (["--workers", "0"], "'0'"),
    (["--doc-cap", "nan"], "'nan'"), (["--max-chars", "inf"], "'inf'"),
    (["--workers", "abc"], "'abc'"), (["--max-chars", "1e9"], "'1e9'"),
    (["--max-chars", "9" * 5000], "--max-chars"),
    (["--workers"], "--workers"), (["more"], "more")])
def test_tok_a_mistyped_command_gives_one_line(tmp_path, args, words):
    """No abbreviations, and numbers are whole and above 0."""
    done = tok_run(*tok_damage(tmp_path, ""), *args)
    assert done.returncode != 0 and done.stdout == "" and not (tmp_path / "out").exists()
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr, done.stderr


def test_tok_a_damaged_config_is_kept_and_named(tok_made, tmp_path):
    data, out, _ = tok_made
    (tmp_path / "tokenizer.tiktoken").write_bytes((out / "tokenizer.tiktoken").read_bytes())
    for content in ("{", "[]", '{"special_tokens": 5}', "{}"):
        (tmp_path / "config.json").write_text(content)
        done = tok_run("--data-dir", data, "--out-dir", tmp_path, "--vocab-size", 400)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert "config.json" in done.stderr and (tmp_path / "config.json").read_text() == content


@pytest.mark.parametrize("write", ["fsync", "replace"])
def test_tok_a_full_disk_is_one_line(tmp_path, monkeypatch, write):
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, write, full)
    with pytest.raises(SystemExit, match="No space left on device.*--out-dir"):
        tok.save(tmp_path / "tokenizer.tiktoken", "text")
    assert not list(tmp_path.iterdir())


def test_tok_a_worker_that_dies_is_one_line(tmp_path):
    """As when memory is short and the system kills it."""
    tok_write_shard(tmp_path / "data/shard_00000.parquet", tok_documents(2000) * 3, 50)
    shutil.copy(tok.__file__, tmp_path / "tok.py")
    (tmp_path / "run.py").write_text(
        "import os, signal, tok\n"
        "def split(text):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "if __name__ == '__main__':\n    tok.main()\nelse:\n    tok.split = split\n")
    command = [sys.executable, tmp_path / "run.py", "--data-dir", tmp_path / "data",
               "--out-dir", tmp_path / "out", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "--workers 1" in done.stderr


def test_tok_too_little_text_names_a_size_that_works(tmp_path):
    args = tok_damage(tmp_path, "too little text") + ["--workers", 1]
    size = int(regex.search(r"give --vocab-size (\d+)", tok_run(*args).stderr)[1])
    args[args.index("--vocab-size") + 1] = size + 1
    assert tok_run(*args).returncode != 0
    args[args.index("--vocab-size") + 1] = size
    assert tok_run(*args).returncode == 0


# ==== eval.py =====================================================================================

EVAL_SIZES = ev.Sizes((0.5, 1, 2, 4), prompts=10, documents=8, questions=3, words=3, new_tokens=24)


def eval_base_dir(folder, monkeypatch):
    """A base folder with a byte tokenizer and a validation shard of 40 documents, 10 long ones."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(200)]
    lengths = [400, 390, 380, 370, 360, 350, 340, 330, 320, 310] + [60] * 30
    texts = [" ".join(rng.choices(words, k=n)) + "." for n in lengths]
    rng.shuffle(texts)
    write_shard(folder / "data" / "climbmix" / "shard_06542.parquet", texts)
    return write_tokenizer(folder / "tokenizer")


def eval_model(seed=0, use_rope=True, train_len=256):
    """A random model of vocabulary 265 whose blocks do something (fresh ones are the identity)."""
    torch.manual_seed(seed)
    model = m.GPT(m.GPTConfig(train_len, 265, 2, 2, 2, 64), use_rope)
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p) * p.size(-1) ** -0.5)
    return model.eval()


def eval_checkpoint(folder, tag, stage="base_checkpoints", step=10, **options):
    model = eval_model(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    m.save_checkpoint(folder / stage / tag, step, model, optimizer, {}, dict(
        step=step, val_bpb=None, model_config=asdict(model.config), user_config={},
        total_batch_size=1000, max_seq_len=model.config.sequence_len,
        loop_state={"use_rope": model.use_rope}))
    return model


def eval_texts(folder, monkeypatch):
    enc = eval_base_dir(folder, monkeypatch)
    return ev.Texts(folder / "data" / "climbmix" / "shard_06542.parquet", enc, EVAL_SIZES)


class EvalCopier(torch.nn.Module):
    """Foresees the token that followed the longest earlier match of what it has just read, in the
    last `window` tokens."""

    def __init__(self, window=None):
        super().__init__()
        self.config, self.window = m.GPTConfig(sequence_len=256), window
        self.lm_head = torch.nn.Linear(1, 265)

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, 265)
        for b, row in enumerate(ids.tolist()):
            for t in range(max(0, len(row) - 160), len(row)):       # the answers are near the end
                seen = row[max(0, t + 1 - self.window) if self.window else 0:t + 1]
                text, size, place = bytes(x % 256 for x in seen), 1, -1
                while size < len(text):
                    found = text.rfind(text[-size:], 0, len(text) - 1)
                    if found < 0:
                        break
                    place, size = found + size, size + 1
                if place >= 0:
                    logits[b, t, seen[place]] = 14.0
        return logits


# ---- eval: statistics

def test_eval_wilson_equals_hand_worked_intervals():
    # 8 of 10, z = 1.96: centre (8 + 1.9208) / 13.8416 = 0.716738,
    # half width 1.96 / 13.8416 x sqrt(1.6 + 0.9604) = 0.226581
    assert ev.wilson(8, 10) == pytest.approx([0.8, 0.490157, 0.943319], abs=2e-6)
    assert ev.wilson(0, 10) == pytest.approx([0.0, 0.0, 3.8416 / 13.8416])
    assert ev.wilson(10, 10) == pytest.approx([1.0, 10 / 13.8416, 1.0])


def test_eval_mcnemar_equals_hand_worked_binomials():
    a = [True] * 9 + [False] + [True] * 50 + [False] * 7            # 9 to 1: only prompts that
    b = [False] * 9 + [True] + [True] * 50 + [False] * 7            # differ count
    assert ev.mcnemar(a, b) == 2 * (1 + 10) / 1024
    assert ev.mcnemar(a, a) == 1.0 and ev.mcnemar([True, False], [False, True]) == 1.0
    assert ev.mcnemar([True] * 6, [False] * 6) == 2 / 64


def test_eval_bootstrap_interval_is_the_textbook_one_of_a_mean_and_pairs_differences():
    x = np.random.default_rng(1).normal(5, 1, 400)
    mean, low, high = ev.bootstrap(x, np.ones(400))
    assert mean == pytest.approx(x.mean()) and low < mean < high
    assert abs(high - low - 2 * 1.96 * x.std() / 20) < 0.02
    ratio = ev.bootstrap(np.array([3.0, 1.0]), np.array([1.0, 3.0]))
    assert ratio[0] == 1.0                                          # of sums, not a mean of ratios
    y = x + 0.1 + np.random.default_rng(2).normal(0, 0.01, 400)
    assert ev.bootstrap(y - x, np.ones(400))[1] > 0.09              # small but steady is seen


# ---- eval: the scale of the logits and RoPE's remedies

def test_logn_scale_0_changes_no_bit_and_other_values_nothing_up_to_the_training_length():
    ids = torch.randint(0, 265, (2, 700))
    for use_rope in (True, False):
        model = eval_model(use_rope=use_rope)
        expected, short = model(ids), model(ids[:, :256])
        model.logn_scale = 0.4                                      # trained at 256
        assert torch.equal(model(ids[:, :256]), short)
        assert torch.allclose(model(ids)[:, :256], expected[:, :256], atol=1e-5)
        assert not torch.allclose(model(ids)[:, 256:], expected[:, 256:], atol=1e-3)
        model.logn_scale = 0.0
        assert torch.equal(model(ids), expected)


@pytest.mark.parametrize("use_rope", [True, False])
def test_logn_scale_equals_attention_written_out(use_rope):
    attn, T, n_train, c = eval_model(seed=3).transformer.h[0].attn, 40, 16, 0.3
    x, tables = torch.randn(1, T, 64), m.rotary_tables(T, 32, "cpu")
    cos, sin = [torch.cat((t, t), -1)[:, None] for t in tables]
    rotary = (cos, torch.cat((sin[..., :16], -sin[..., 16:]), -1)) if use_rope else None
    got = attn(x, rotary, m.query_scale(T, n_train, c, "cpu"))
    q, k, v = [linear(x).view(T, 2, 32) for linear in (attn.c_q, attn.c_k, attn.c_v)]
    if use_rope:
        q, k = m.rotate(q[None], *rotary)[0], m.rotate(k[None], *rotary)[0]
    q, k = m.norm(q), m.norm(k)
    expected = torch.zeros(T, 2, 32)
    for t in range(T):
        for head in range(2):
            beta = max(1.0, 1 + c * math.log((t + 1) / n_train))
            logits = beta * (k[:t + 1, head] @ q[t, head]) / 32 ** 0.5
            expected[t, head] = logits.softmax(0) @ v[:t + 1, head]
    assert torch.allclose(got[0], attn.c_proj(expected.view(T, 64)), atol=1e-5)


def test_logn_scale_0_adds_nothing_to_the_compiled_graph():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    model, ids = eval_model(), torch.randint(0, 265, (1, 300))
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=keep)
    for c in (0.0, 0.0, 0.4):
        model.logn_scale = c
        assert torch.allclose(compiled(ids), model(ids), atol=1e-5)
    torch._dynamo.reset()
    assert ["clamp" in graph.code for graph in graphs] == [False, True]


@pytest.mark.parametrize("remedy", ["ntk", "yarn"])
def test_eval_remedies_change_nothing_up_to_the_training_length_and_something_beyond(remedy):
    model, ids = eval_model(), torch.randint(0, 265, (1, 600))
    short, long = model(ids[:, :256]), model(ids)
    ev.set_arm(model, remedy)
    assert torch.equal(model(ids[:, :256]), short)
    assert not torch.allclose(model(ids), long, atol=1e-3)
    ev.set_arm(model)
    assert torch.equal(model(ids), long)


@pytest.mark.parametrize("remedy", ["ntk", "yarn"])
def test_eval_remedies_keep_the_fastest_frequency_and_halve_the_slowest_at_2x(remedy):
    def frequencies(T, remedy):                                     # the angles of position 1
        cos, sin = ev.remedied_tables(T, 64, "cpu", 256, remedy)
        return torch.atan2(sin, cos)[1]
    plain = frequencies(256, remedy)
    assert torch.equal(plain, torch.atan2(*reversed(m.rotary_tables(256, 64, "cpu")))[1])
    ratio = plain / frequencies(512, remedy)
    assert torch.allclose(ratio[[0, -1]], torch.tensor([1.0, 2.0]), atol=1e-4)
    assert (ratio.diff() > -1e-4).all()


# ---- eval: bits per byte

def test_eval_bits_per_byte_equal_those_of_pretraining(tmp_path, monkeypatch):
    texts, model = eval_texts(tmp_path, monkeypatch), eval_model()
    summary = ev.text_bits(model, texts, [1, 4])
    for multiple in (1, 4):
        rows = np.array([[texts.bos] + d[-256 * multiple:] for d in texts.documents])
        rows = np.stack((rows[:, :-1], rows[:, 1:])).astype(np.int32)
        rows[1, :, :-32] = -1                                       # an eighth of 256 targets
        nbytes = m.token_bytes(texts.enc)
        expected = m.bits_per_byte(model, rows, nbytes, CPU, lambda: None)
        assert summary[str(multiple)]["bpb"][0] == pytest.approx(expected, rel=1e-6)
        assert summary[str(multiple)]["n"] == len(texts.documents)
    change = summary["4"]["bpb"][0] - summary["1"]["bpb"][0]
    assert summary["4"]["change"][0] == pytest.approx(change)
    assert summary["1"]["change"] == [0, 0, 0]


def test_eval_documents_to_fit_on_are_never_tested_on(tmp_path, monkeypatch):
    texts = eval_texts(tmp_path, monkeypatch)
    assert len(texts.fit) == 2 and len(texts.documents) == 8
    assert not any(d in texts.documents for d in texts.fit)
    hay = texts.enc.decode(texts.hay)
    assert not any(texts.enc.decode(d) in hay for d in texts.fit + texts.documents)


def test_eval_scale_is_the_one_of_least_loss(tmp_path, monkeypatch):
    texts, model = eval_texts(tmp_path, monkeypatch), eval_model()
    fit = ev.fit_scale(model, texts, [2, 4], "")
    assert tuple(fit["losses"]) == ev.SCALES and fit["n"] == 2
    assert fit["losses"][fit["c"]] == min(fit["losses"].values())
    rows = torch.tensor([[texts.bos] + d[-1024:] for d in texts.fit])
    for c in (0.0, 0.4):                                            # all targets beyond 256
        model.logn_scale = c
        logits = model(rows[:, :-1])[:, 256:]
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 257:].flatten())
        assert fit["losses"][c] == pytest.approx(loss.item(), rel=1e-5)


# ---- eval: needles

def test_eval_prompts_are_the_same_for_every_model(tmp_path, monkeypatch):
    texts = eval_texts(tmp_path, monkeypatch)
    random.seed(1)
    one = [ev.make_prompt(texts, 512, i) for i in range(8)]
    random.seed(2)
    torch.manual_seed(3)
    assert one == [ev.make_prompt(texts, 512, i) for i in range(8)]
    assert len({tuple(ids) for ids, *_ in one}) == 8


@pytest.mark.parametrize("i", [0, 5, 9])
def test_eval_prompt_holds_a_needle_and_the_question_for_it(tmp_path, monkeypatch, i):
    texts = eval_texts(tmp_path, monkeypatch)
    ids, n, reach, blank = ev.make_prompt(texts, 600, i)
    assert len(ids) == len(blank) == 601 and ids[0] == blank[0] == texts.bos
    text, answer = texts.enc.decode(ids[1:]), texts.enc.decode(ids[-n:])
    question = text.rsplit("\n", 1)[1].removesuffix(answer)
    assert re.fullmatch(r"\d{4}", answer)
    assert re.fullmatch(r"The secret number of \w+ is ", question)
    assert text.count(question + answer) == 2                       # told, and asked
    assert text.count("\n" + question + answer + ".\n") == 1
    assert texts.enc.decode(ids[600 - reach:]).startswith(answer + ".\n")
    assert texts.enc.decode(blank).count(question + answer) == 1    # only asked, never told
    room = 600 - 2 * len(question + answer) - 4
    before = text.index("\n" + question)
    assert before == int((i + 0.5) / 10 * room)                     # 5%, 55%, 95% of the text
    assert ev.make_prompt(texts, 60, i) is None


def test_eval_exact_match_by_teacher_forcing_equals_greedy_generation():
    model = eval_model()

    def greedy(prompt, n):
        for _ in range(n):
            prompt = prompt + [model(torch.tensor([prompt]))[0, -1].argmax().item()]
        return prompt
    rows = []
    for seed in range(12):                              # answers that the model gives, and others
        ids = greedy(random.Random(seed).choices(range(256), k=20), 4)
        if seed % 3:
            ids[20 + seed % 4] = (ids[20 + seed % 4] + 1) % 256
        rows.append((ids, 4))
    for (ids, _), (right, nats) in zip(rows, ev.answers(model, rows)):
        assert right == (greedy(ids[:20], 4) == ids)
        logp = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
        expected = -sum(logp[t - 1, ids[t]].item() for t in range(20, 24))
        assert nats == pytest.approx(expected, abs=1e-4)


def test_eval_a_perfect_copier_finds_all_and_a_random_model_nothing(tmp_path, monkeypatch):
    texts = eval_texts(tmp_path, monkeypatch)
    summary = ev.needles(EvalCopier(), texts, [0.5, 1, 4], 10)
    assert list(summary) == ["0.5", "1", "4"]
    for point in summary.values():
        assert point["rate"][0] == 1.0 and all(point["found"]) and point["nats"] < 0.01
        assert point["gain"][1] > 0.5                               # without it, it cannot know
    for point in ev.needles(eval_model(), texts, [1, 4], 10).values():
        assert point["rate"][0] == 0 and point["rate"][1] <= 1e-4 <= point["rate"][2]


def test_eval_a_copier_of_the_last_tokens_only_reaches_the_cropping_ceiling(tmp_path, monkeypatch):
    texts = eval_texts(tmp_path, monkeypatch)
    summary = ev.needles(EvalCopier(window=256), texts, [1, 2, 4], 10)
    assert [point["rate"][0] for point in summary.values()] == [1.0, 0.5, 0.2]
    assert [point["ceiling"] for point in summary.values()] == [1.0, 0.5, 0.2]


# ---- eval: the calculator

@pytest.mark.parametrize("call, result", [
    ("2+3*4", "14"), ("(1.5 - 0.5) / 4", "0.25"), ("10/2", "5"), ("-3*2", "-6"), ("7//2", "3"),
    ("7 % 4", "3"), ("0.1+0.2", "0.3"), ("'strawberry'.count('r')", "3"), ("1_000*2", "2000"),
    ('"banana".count("an")', "2"), (" 50*2 ", "100"), ("+-+5", "-5")])
def test_eval_calculator_works_out(call, result):
    assert ev.calculator(call) == result


@pytest.mark.parametrize("call", [
    "", "x", "print(1)", "__import__('os').system('true')", "open('/etc/passwd').read()",
    "().__class__.__bases__[0]", "'a'.__class__", "'a'.join('b')", "'a'.upper()", "'a'.count",
    "'a'.count('a', 0)", "'a'.count(sub='a')", "'a'.count(*'a')", "'a'.count(b'a')",
    "b'a'.count(b'a')", "f'{1}'.count('1')", "'a'.count(f'{1}')", "'a'.upper().count('A')",
    "'a'*9", "'a'+'b'", "'%s' % 1", "[1].count(1)", "(1,2)", "{1}", "{}", "[i for i in (1,)]",
    "lambda: 1", "1 if 1 else 2", "1 < 2", "1 and 2", "not 1", "~1", "1 << 9", "5 & 3", "True",
    "True+1", "None", "...", "1j", "1j*1j", "2**3", "x := 1", "1; 2", "1\n2", "import os",
    "await x", "yield", "1/0", "1e999", "-1e999", "1e999-1e999", "9**9**9**9", "1e14*100",
    "9" * 60, "9" * 5000, "(" * 150 + "1" + ")" * 150, "1+" * 5000 + "1", "-" * 199 + "x",
    "int('5')", "abs(-5)", "1 .real", "(1).bit_length()", "'\\ud800'.x", "1\0", "\ud800"])
def test_eval_calculator_refuses_all_but_arithmetic_and_count(call):
    assert ev.calculator(call) is None


def test_eval_tool_writes_the_output_after_a_finished_call_and_only_then():
    class Tokenizer:                                                # characters are tokens
        def convert_tokens_to_ids(self, names):
            return [256 + SPECIAL.index(name) for name in names]

        def decode(self, ids):
            return bytes(ids).decode()

        def encode(self, text, add_special_tokens):
            return list(text.encode())
    start, end, output, output_end = range(261, 265)
    tool = ev.PythonTool(Tokenizer(), 3)
    rows = [[0, start, *b"6*7", end], [start, *b"os.x()", end], [end, *b"abcdef", start]]
    rows = [[0] * (8 - len(row)) + row for row in rows]
    for expected in (output, *b"42", output_end, None):
        free = torch.randn(3, 265)
        scores = tool(torch.tensor(rows), free.clone())
        assert torch.equal(scores[1:], free[1:])        # refused, and not finished: the model's own
        if expected is None:
            assert torch.equal(scores[0], free[0])
        else:
            assert scores[0].argmax() == expected and scores[0].isinf().sum() == 264
        tokens = [expected or 0, *(scores[1:].argmax(1) % 256).tolist()]
        rows = [row + [token] for row, token in zip(rows, tokens)]


# ---- eval: a whole run

def eval_run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["eval.py", *args])
    monkeypatch.setattr(ev, "QUICK", EVAL_SIZES)
    handler = signal.getsignal(signal.SIGINT)
    try:
        ev.main()
    finally:
        signal.signal(signal.SIGINT, handler)
    return capsys.readouterr().out


def eval_metrics(folder, switch=None):
    """metrics.jsonl of a run of 10 steps, with a validation every 2."""
    records = [{"step": step, "val_bpb": 5 / (step + 1)} for step in range(0, 11, 2)]
    if switch:
        records.insert(3, {"step": switch, "switch": True, "val_bpb_with_rope": 0.9,
                           "val_bpb_without_rope": 1.4})
    m.atomic_write(folder / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records))


def test_eval_run_writes_table_and_figures_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    eval_base_dir(tmp_path, monkeypatch)
    for tag, options in (("t", {}), ("t_drope_50", dict(seed=1, use_rope=False))):
        eval_checkpoint(tmp_path, tag, train_len=128, **options)
        eval_metrics(tmp_path / "base_checkpoints" / tag, switch=None if tag == "t" else 5)
    monkeypatch.setattr(ev, "SCALES", (0.4,))
    folder = tmp_path / "base_checkpoints" / "t"

    # an interruption keeps the sections that are finished
    def interrupted(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ev, "needles", interrupted)
        eval_run(monkeypatch, capsys, "t", "t_drope_50", "--quick")
    half = json.loads((folder / "eval_quick.json").read_text())["sections"]
    capsys.readouterr()
    assert list(half) == ["scale", "bpb"]
    out = eval_run(monkeypatch, capsys, "t", "t_drope_50", "--quick")
    assert out.count("  scale: ") == 1                              # of t_drope_50

    # the sections of eval.json; export_hf.py's card reads sections.scale.c
    sections = json.loads((folder / "eval_quick.json").read_text())["sections"]
    assert sections["bpb"] == half["bpb"] and sections["scale"]["c"] == 0.4
    arms = ["", "fitted", "ntk", "ntk fitted", "yarn", "yarn fitted"]
    expected = {ev.join(kind, arm) for kind in ("bpb", "needle") for arm in arms}
    assert set(sections) == expected | {"scale", "scale ntk", "scale yarn"}
    assert list(sections["needle"]) == ["1", "2", "4"]              # 64 bytes are too short
    assert list(sections["needle ntk"]) == ["2", "4"]               # up to 1 x all is the same
    dropped = json.loads((tmp_path / "base_checkpoints/t_drope_50/eval_quick.json").read_text())
    assert not any("ntk" in name for name in dropped["sections"])

    # the table and the figures
    table = (tmp_path / "eval" / "results_quick.md").read_text()
    assert table in out
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| t")]
    arms[0] = "as trained"
    for _ in ("needles", "bits per byte"):
        head, rows = rows[0], rows[1:]
        assert head[1] == "arm"
        assert [row[1] for row in rows[:8]] == arms + ["as trained", "fitted"]
        rows = rows[8:]
    import matplotlib.image
    for name in ("contexts_quick.png", "drop_quick.png", "training_quick.png"):
        image = matplotlib.image.imread(tmp_path / "eval" / name)[:, :, :3]
        colors = np.unique((image.reshape(-1, 3) * 255).astype(int), axis=0)
        assert image.shape[1] >= 800 and len(colors) > 20

    # nothing is done twice, until the checkpoint is another
    for name in ("needles", "text_bits", "fit_scale"):
        monkeypatch.setattr(ev, name, lambda *args: pytest.fail("done again"))
    monkeypatch.setattr(ev, "draw_all", lambda *args: None)
    eval_run(monkeypatch, capsys, "t", "t_drope_50", "--quick")
    assert "ntk fitted" in eval_run(monkeypatch, capsys, "--table", "--quick", "t")
    eval_checkpoint(tmp_path, "t", seed=5, train_len=128)           # the same step, other weights
    for name in ("needles", "text_bits", "fit_scale"):
        monkeypatch.setattr(ev, name, lambda *args: {"c": 0})
    monkeypatch.setattr(ev, "gather", lambda *args: ({}, {}))
    assert "another checkpoint" in eval_run(monkeypatch, capsys, "t", "--quick")
    again = json.loads((folder / "eval_quick.json").read_text())
    assert again["sections"]["needle"] == {"c": 0} and again["key"]["step"] == 10


def test_eval_marks_the_switch_in_the_curve_of_training(tmp_path, monkeypatch):
    eval_base_dir(tmp_path, monkeypatch)
    eval_checkpoint(tmp_path, "t_drope_50")
    eval_metrics(tmp_path / "base_checkpoints/t_drope_50", switch=5)
    curve = ev.validations(tmp_path / "base_checkpoints/t_drope_50")
    assert curve["x"] == [0, 0.002, 0.004, 0.005, 0.005, 0.006, 0.008, 0.01]
    assert curve["switch"] == 0.005 and curve["y"][3:5] == [0.9, 1.4]       # with RoPE, without


@pytest.mark.parametrize("args, words", [
    ([], "which tag"), (["--quick", "t", "--sead", "1"], "unrecognized"),
    (["nothing"], "no checkpoint"), (["--table", "t", "tt"], "tt is not evaluated"),
    (["--chat", "nothing"], "export_hf.py --tag nothing")])
def test_eval_says_what_is_missing_in_a_line(tmp_path, monkeypatch, capsys, refused, args, words):
    eval_base_dir(tmp_path, monkeypatch)
    eval_checkpoint(tmp_path, "t")
    m.atomic_write(tmp_path / "base_checkpoints/t/eval.json",
                   json.dumps({"key": {"use_rope": True}, "sections": {"scale": {"c": 0}}}))
    m.atomic_write(tmp_path / "eval/results.md", "good")
    refused(ev, args, [words], base=tmp_path)
    assert (tmp_path / "eval/results.md").read_text() == "good"


def eval_damage(folder, kind):
    shard = folder / "data/climbmix/shard_06542.parquet"
    if kind == "damaged shard":
        shard.write_bytes(b"PAR1 damaged")
    elif kind == "shard without rows":
        write_shard(shard, pa.array([], pa.string()))
    elif kind == "short documents":
        write_shard(shard, ["short"] * 40)
    elif kind == "eval.json":
        (folder / "base_checkpoints/t/eval_quick.json").write_text('{"key": {"step"')
    elif kind == "tokenizer":
        write_tokenizer(folder / "tokenizer", [b"th"])
    elif kind == "weights":
        (folder / "base_checkpoints/t/model_000010.pt").write_bytes(b"x")


@pytest.mark.parametrize("kind, words", [
    ("damaged shard", "shard_06542.parquet cannot be read"), ("short documents", "256 tokens"),
    ("shard without rows", "256 tokens"), ("eval.json", "eval_quick.json is damaged"),
    ("tokenizer", "not trained with the tokenizer")])
def test_eval_names_what_is_damaged_and_keeps_results(tmp_path, monkeypatch, refused, kind, words):
    eval_base_dir(tmp_path, monkeypatch)
    eval_checkpoint(tmp_path, "t")
    m.atomic_write(tmp_path / "eval/results_quick.md", "good")
    eval_damage(tmp_path, kind)
    refused(ev, ["t", "--quick"], [words], base=tmp_path)
    assert (tmp_path / "eval/results_quick.md").read_text() == "good"


def test_eval_passes_over_damaged_weights_in_words(tmp_path, monkeypatch, capsys):
    eval_base_dir(tmp_path, monkeypatch)
    eval_checkpoint(tmp_path, "t")
    eval_damage(tmp_path, "weights")
    monkeypatch.setattr(sys, "argv", ["eval.py", "t", "--quick"])
    with pytest.raises(SystemExit, match="no checkpoint in .*base_checkpoints/t"):
        ev.main()
    assert "passing over step 10" in capsys.readouterr().err


@pytest.mark.parametrize("args, tags", [
    (["a", "b", "--quick", "--data-dir", "c"], ["a", "b"]),
    (["--data-dir", "c", "a", "--quick", "b", "a"], ["a", "b"]),
    (["--quick", "d2", "5", "50", "--data-dir", "c"], ["d2_5tpp_drope_50"]),
    (["d18", "20", "long", "--quick", "--data-dir", "c"], ["d18_20tpp_long"])])
def test_eval_command_line_takes_tags_and_options_in_any_order(args, tags):
    words, config = ev.command_line(args)
    assert words == tags and config.quick and not config.table and config.data_dir == "c"


def test_eval_base_of_a_long_tag_is_that_of_the_tag_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tag = "d18_20tpp_drope_50"
    assert ev.places(f"{tag}_long") == [tmp_path / "base_checkpoints" / tag,
                                        tmp_path / "chatsft_checkpoints" / f"{tag}_long",
                                        tmp_path / "hf_sft" / f"{tag}_long"]


# ---- eval: what the table says

def eval_result(found, use_rope=False, arm="fitted", texts="same"):
    """A base model of which so many of 40 needles were found at 4 x; cropping could find 8."""
    point = {"rate": ev.wilson(found, 40), "ceiling": 0.2, "found": [i < found for i in range(40)]}
    return {"key": dict(use_rope=use_rope, texts=texts, n_train=256, sizes=""),
            "arms": {"fitted": {"needle": {"4": point}}, arm: {"needle": {"4": point}}}}


@pytest.mark.parametrize("mine, ntk, texts, answer", [
    (30, 15, "same", "yes / yes, p = 6.1e-05"), (30, 28, "same", "yes / no, p = 0.5"),
    (10, 0, "same", "no / yes, p = 0.002"), (30, 0, "other", "yes / -")])
def test_eval_a_model_has_to_beat_cropping_and_ntk_with_fitted_c(mine, ntk, texts, answer):
    twin = eval_result(ntk, use_rope=True, arm="ntk fitted", texts=texts)
    assert ev.beats(eval_result(mine), twin, "4") == answer
    assert ev.beats(twin, twin, "4") == "-"


def test_eval_up_to_1x_an_arm_is_the_model_as_trained_and_c_0_is_no_other_arm():
    sections = {"scale": {"c": 0.2}, "needle": {"1": "a", "4": "b"}, "needle fitted": {"4": "c"},
                "scale ntk": {"c": 0}, "needle ntk": {"4": "d"}, "scale yarn": {"c": 0.1}}
    arms = ev.arms_of(sections)
    assert {name: arm["needle"] for name, arm in arms.items()} == {
        "": {"1": "a", "4": "b"}, "fitted": {"1": "a", "4": "c"}, "ntk": {"1": "a", "4": "d"},
        "ntk fitted": {"1": "a", "4": "d"}, "yarn": {}, "yarn fitted": {}}     # yarn: not run yet
    assert [arm["c"] for arm in arms.values()] == [0, 0.2, 0, 0, 0, 0.1]


# ---- eval: through the export

def eval_conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


EVAL_CHOICES = [eval_conversation(
    f"Multiple Choice question: {q}\n- x=A\n- y=B\n- z=C\n\n"
    "Respond only with the letter of the correct answer.", "B") for q in ("a", "bb" * 20, "ccc")]
EVAL_NUMBERS = [eval_conversation(f"How many {q}?", [{"type": "text", "text": "so\n\n#### 1,234"}])
                for q in ("a", "bb" * 20, "ccc")]


@pytest.fixture
def eval_export(tmp_path, monkeypatch):
    """A base folder with the export of a chat model "t", and that model."""
    eval_base_dir(tmp_path, monkeypatch)
    model = eval_checkpoint(tmp_path, "t", stage="chatsft_checkpoints")
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    return tmp_path, export_hf.export("sft", "t"), model


def test_eval_choices_are_the_likeliest_letters(eval_export):
    base, folder, model = eval_export
    chat, enc = ev.Chat(folder, CPU), m.load_tokenizer(base / "tokenizer")
    result = chat.ask(EVAL_CHOICES, 0)
    assert result["n"] == 3
    assert result["rate"][0] == np.mean([e["answer"] == "B" for e in result["examples"]])
    for example in result["examples"]:
        ids, _ = sft.render(enc, [{"role": "user", "content": example["question"]}])
        logits = model(torch.tensor([ids + [enc.encode_single_token(SPECIAL[3])]]))[0, -1]
        assert example["answer"] == max("ABC", key=lambda letter: logits[ord(letter)])


def test_eval_answers_of_a_batch_are_those_of_a_row_alone(eval_export):
    _, folder, _ = eval_export
    chat = ev.Chat(folder, CPU)
    together = chat.ask(EVAL_NUMBERS, 24)
    alone = [chat.ask([conversation], 24)["examples"][0] for conversation in EVAL_NUMBERS]
    assert sorted(together["examples"], key=str) == sorted(alone, key=str)
    assert {e["expected"] for e in alone} == {"1234"} and "stops" in together


def test_eval_tool_writes_outputs_inside_of_generate(eval_export):
    chat = ev.Chat(eval_export[1], CPU)
    calls = [[261, *b"6*7", 262], [261, *b"os.x()", 262], [261, *b"(1+2)/4", 262]]
    ids = torch.tensor([[0] * (12 - len(call)) + call for call in calls])
    rows = chat.generate(dict(input_ids=ids, attention_mask=torch.ones_like(ids)), 8)
    texts = [chat.tokenizer.decode(row) for row in rows]
    assert texts[0].startswith("<|output_start|>42<|output_end|>")
    assert texts[2].startswith("<|output_start|>0.75<|output_end|>")
    assert "<|output_start|>" not in texts[1]


def test_eval_cached_answers_equal_a_loop_without_cache(eval_export):
    _, folder, model = eval_export
    chat = ev.Chat(folder, CPU)
    inputs = chat.inputs(["hello"])
    ids = inputs["input_ids"][0].tolist()
    for _ in range(12):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    [row] = chat.generate(inputs, 12)
    assert row == ids[-12:][:len(row)]


def test_eval_chat_sections_through_the_export(eval_export, monkeypatch, capsys):
    base, folder, _ = eval_export
    asked = [("mmlu", c) for c in EVAL_CHOICES] + [("spellingbee", c) for c in EVAL_NUMBERS]
    lines = [json.dumps({"source": source, "messages": c}) + "\n" for source, c in asked]
    m.atomic_write(base / "chatsft_checkpoints/t/questions.jsonl", "".join(lines))
    eval_run(monkeypatch, capsys, "t", "--quick")
    data = json.loads((base / "chatsft_checkpoints/t/eval_quick.json").read_text())
    assert set(data["sections"]) == {"mmlu", "spellingbee"}         # none of GSM8K: "-"
    [row] = [line for line in (base / "eval/results_quick.md").read_text().splitlines()
             if line.startswith("| t |")]
    bee = data["sections"]["spellingbee"]
    mmlu = ev.cell(data["sections"]["mmlu"], "rate")
    cells = [mmlu, "-", ev.cell(bee, "rate"), ev.cell(bee, "stops")]
    assert row == f"| t | {' | '.join(cells)} |" and not list((base / "eval").glob("*.png"))


@pytest.mark.parametrize("damage, words", [
    ("missing", "model.safetensors"), ("cut", "is damaged"), ("a tensor less", "lm_head"),
    ("config.json", "is damaged"), ("tokenizer.json", "is damaged"),
    ("questions.jsonl", "questions")])
def test_eval_names_a_damaged_export_in_a_line(eval_export, refused, damage, words):
    from safetensors.torch import load_file, save_file
    base, folder, _ = eval_export
    weights = folder / "model.safetensors"
    questions = base / "chatsft_checkpoints/t/questions.jsonl"
    questions.write_text(json.dumps({"source": "mmlu", "messages": EVAL_CHOICES[0]}) + "\n")
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "a tensor less":
        tensors = load_file(weights)
        del tensors["lm_head.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif damage == "questions.jsonl":
        questions.write_text('{"source": ')
    else:
        (folder / damage).write_text("{")
    refused(ev, ["t", "--quick"], [words], base=base)


def eval_talk(base):
    """`eval.py --chat t` as a process, with pipes for a terminal."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, HERE / "eval.py", "--chat", "t"], env=env, cwd=HERE,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_eval_chat_answers_until_the_input_ends_and_survives_bytes_that_are_no_utf8(eval_export):
    chat = eval_talk(eval_export[0])
    lines = [b"hello", b"\xff\xfe", b"/clear", b"hello"]
    out, err = chat.communicate(b"".join(line + b"\n" for line in lines), timeout=120)
    assert chat.returncode == 0 and not err, err
    answers = out.decode(errors="replace").split("\n> ")
    assert len(answers) == 5 and "not UTF-8" in answers[2]
    assert answers[3] == "> " + answers[1] != "> "                  # /clear forgets the first


def test_eval_chat_ctrl_c_stops_the_answer_and_not_the_program(eval_export):
    chat = eval_talk(eval_export[0])
    chat.stdin.write(b"hello\n")
    chat.stdin.flush()
    seen = chat.stdout.readline() + chat.stdout.read(4)             # the answer streams
    chat.send_signal(signal.SIGINT)
    out, err = chat.communicate(b"/clear\nhello\n", timeout=120)
    assert chat.returncode == 0 and not err, err
    answers = (seen + out).decode(errors="replace").split("\n> ")
    assert len(answers) == 4 and 0 < len(answers[1]) < len(answers[2])
    assert answers[2].startswith("> " + answers[1].rstrip("\ufffd"))


@pytest.mark.parametrize("text, number", [
    ("so #### 18", "18"), ("#### 1,234.", "1234"), ("#### -5", "-5"), ("a #### 1 b #### 2.5", "2.5"),
    ("18", None), ("#### x", None), ("B", "B"), ("BC", None)])
def test_eval_final_answer(text, number):
    parts = [{"type": "python", "text": "1"}, {"type": "text", "text": text}]
    assert ev.final_answer(text) == ev.final_answer(parts) == number


# ==== sft.py ====================================================================================

# ---- sft.py: conversations, sources, the mixture, packing, the run -----------------------------

(SFT_BOS, SFT_USER, SFT_USER_END, SFT_ASSISTANT, SFT_ASSISTANT_END,
 SFT_PYTHON, SFT_PYTHON_END, SFT_OUTPUT, SFT_OUTPUT_END) = range(256, 265)
SFT_WORDS = "apple banana cherry strawberry kiwi plum fig melon".split()


def sft_tokenizer(folder):
    """A tokenizer of single bytes, so that ids can be read in the tests."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)]
    special = {token: 256 + i for i, token in enumerate(SPECIAL)}
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    config = {"pat_str": r"\S+|\s+", "special_tokens": special}
    (folder / "config.json").write_text(json.dumps(config))
    return model.load_tokenizer(folder)


@pytest.fixture
def sft_home(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "words.txt").write_bytes(b"".join(w.encode() + b"\r\n" for w in SFT_WORDS))
    sft_tokenizer(tmp_path / "tokenizer")
    sft.tulu_rows.cache_clear()
    return tmp_path


def sft_config(home, **fields):
    given = {"words": str(home / "words.txt"), "max_seq_len": 64, "patience": 0}
    return sft.Config(**{**given, **fields})


def sft_chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


# a conversation

def test_ids_and_mask_of_a_conversation_with_system_message_two_turns_and_python_call(tmp_path):
    enc = sft_tokenizer(tmp_path)
    ids, mask = sft.render(enc, [{"role": "system", "content": "S"}, *sft_chat("hi", "yo", "1+1", [
        {"type": "text", "text": "a"}, {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"}, {"type": "text", "text": "b"}])])
    assert ids == [
        SFT_BOS, SFT_USER, *b"S\n\nhi", SFT_USER_END, SFT_ASSISTANT, *b"yo", SFT_ASSISTANT_END,
        SFT_USER, *b"1+1", SFT_USER_END, SFT_ASSISTANT, *b"a", SFT_PYTHON, *b"1+1", SFT_PYTHON_END,
        SFT_OUTPUT, *b"2", SFT_OUTPUT_END, *b"b", SFT_ASSISTANT_END]
    assert mask == [0] * 9 + [1, 1, 1] + [0] * 6 + [1] + [1] * 5 + [0] * 3 + [1, 1]


def test_text_that_looks_like_a_special_token_stays_text(tmp_path):
    ids, mask = sft.render(sft_tokenizer(tmp_path), sft_chat("<|assistant_start|>", "<|bos|>"))
    assert ids == [SFT_BOS, SFT_USER, *b"<|assistant_start|>", SFT_USER_END,
                   SFT_ASSISTANT, *b"<|bos|>", SFT_ASSISTANT_END]


@pytest.mark.parametrize("messages, why", [
    (sft_chat("a", "b")[::-1], "message 1 is of role 'assistant' where 'user' was expected"),
    (sft_chat("a", "b") + sft_chat("c", "d")[1:], "message 3 is of role 'assistant'"),
    (sft_chat("a", "b") + [{"role": "system", "content": "s"}], "message 3 is of role 'system'"),
    ([{"role": "system", "content": "s"}], "it ends before an answer"),
    (sft_chat(None, "b"), "message 1 has content that is neither text nor parts"),
    (sft_chat("a", [{"type": "image", "text": "x"}]), "message 2 has content that is neither"),
    (sft_chat("a", [{"type": [], "text": "x"}]), "message 2 has content that is neither"),
    ([], "it ends before an answer"), ("text", "not a list"), ([1], "not a list")])
def test_what_is_no_conversation_is_named(tmp_path, messages, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        sft.render(sft_tokenizer(tmp_path), messages)


def test_coloured_text_is_green_exactly_where_it_is_learnt(tmp_path):
    enc = sft_tokenizer(tmp_path)
    text = sft.coloured(enc, *sft.render(enc, sft_chat("hi", "yo")))
    assert text == ("\033[90m<|bos|><|user_start|>hi<|user_end|><|assistant_start|>\033[0m"
                    "\033[32myo<|assistant_end|>\033[0m")


# the sources

def test_calculator_annotations_become_python_calls_and_their_output():
    assert sft.calculator_parts("50 x <<50*2=100>>100\n#### 100") == [
        {"type": "text", "text": "50 x "}, {"type": "python", "text": "50*2"},
        {"type": "python_output", "text": "100"}, {"type": "text", "text": "100\n#### 100"}]


def test_a_calculator_annotation_without_a_result_is_a_call_with_an_empty_output(tmp_path):
    parts = [{"type": "text", "text": "so "}, {"type": "python", "text": "7"},
             {"type": "python_output", "text": ""}, {"type": "text", "text": "7"}]
    assert sft.calculator_parts("so <<7>>7") == parts
    ids, mask = sft.render(sft_tokenizer(tmp_path), sft_chat("q", parts))
    call = [SFT_PYTHON, *b"7", SFT_PYTHON_END, SFT_OUTPUT, SFT_OUTPUT_END]
    assert ids[-7:] == [*call, *b"7", SFT_ASSISTANT_END] and mask[-7:] == [1, 1, 1, 0, 0, 1, 1]


def sft_parquet(home, path, rows):
    (home / "data/sft" / path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), home / "data/sft" / path)


def test_a_question_of_mmlu(sft_home):
    row = {"question": "2+2?", "subject": "", "choices": ["3", "4", "5", "6"], "answer": 1}
    sft_parquet(sft_home, "mmlu/auxiliary_train-00000-of-00001.parquet", [row] * 3)
    n, conversation = sft.mmlu(sft_config(sft_home), "train")
    assert n == 3 and conversation(2) == sft_chat(
        "Multiple Choice question: 2+2?\n- 3=A\n- 4=B\n- 5=C\n- 6=D\n\n"
        "Respond only with the letter of the correct answer.", "B")


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_of_the_hub_come_in_the_order_of_datasets_shuffle_with_seed_42(sft_home, split):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(8)]
    sft_parquet(sft_home, f"gsm8k/{split}-00000-of-00001.parquet", rows)
    n, conversation = sft.gsm8k(sft_config(sft_home), split.replace("test", "val"))
    order = [3, 4, 2, 7, 6, 1, 5, 0]                        # default_rng(42).permutation(8)
    assert [conversation(i)[0]["content"] for i in range(n)] == [f"q{i}" for i in order]


def test_a_damaged_download_is_to_be_deleted_but_never_ones_own_file(sft_home):
    path = sft_home / "data/sft/gsm8k/train-00000-of-00001.parquet"
    sft_parquet(sft_home, "gsm8k/train-00000-of-00001.parquet", [{"question": "q", "answer": "a"}])
    path.write_bytes(path.read_bytes()[:-9])
    (sft_home / "data/sft/i.jsonl").write_text("[1]")
    (sft_home / "i.jsonl").write_text("[1]")
    refusals = []
    for source, name in ((sft.gsm8k, ""), (sft.identity, "https://x/i.jsonl"),
                         (sft.identity, str(sft_home / "i.jsonl"))):
        with pytest.raises(SystemExit) as e:
            source(sft_config(sft_home, identity=name), "train")
        refusals.append(str(e.value))
    anew = "delete it and run again, it is fetched anew"
    assert [anew in line for line in refusals] == [True, True, False]
    assert "line 1: not a list of messages; mend it" in refusals[2]
    assert "\n" not in "".join(refusals)


@pytest.mark.parametrize("text", ["", " \n", "<html>404</html>"])
def test_a_word_list_without_words_is_refused(sft_home, text):
    (sft_home / "words.txt").write_text(text)
    with pytest.raises(SystemExit, match="words.txt: a word list has words of the letters a-z"):
        sft.spelling_bee(sft_config(sft_home), "train")


def test_simple_spelling_and_its_word_list_with_crlf(sft_home):
    n, conversation = sft.simple_spelling(sft_config(sft_home, spelling_rows=7), "train")
    assert n == 7
    words = list(SFT_WORDS)
    random.Random(42).shuffle(words)
    for i in range(7):
        word = random.Random(i).choice(words)
        assert conversation(i) == sft_chat(f"Spell the word: {word}", f"{word}:{','.join(word)}")
    assert sft.simple_spelling(sft_config(sft_home), "val")[1](3) == conversation(10_000_003)


def test_the_two_spelling_tasks_share_no_words_row_by_row(sft_home):
    words = ["".join(c) for c in itertools.product("abcdefgh", repeat=4)]
    (sft_home / "words.txt").write_text("\n".join(words))
    _, spelling = sft.simple_spelling(sft_config(sft_home), "train")
    _, bee = sft.spelling_bee(sft_config(sft_home), "train")
    calls = [bee(i)[1]["content"][1]["text"] for i in range(2000)]
    same = sum(f"'{spelling(i)[1]['content'][:4]}'" in call for i, call in enumerate(calls))
    assert same < 10                                        # by chance 0.5
    assert calls[7].split("'")[1] == random.Random(7).choice(words)


def test_spelling_bee_counts_right_and_asks_for_a_letter_of_the_word_in_90_percent(sft_home):
    n, conversation = sft.spelling_bee(sft_config(sft_home), "train")
    inside, questions = 0, set()
    for i in range(3000):
        user, answer = conversation(i)
        by_hand, call, output, end = [part["text"] for part in answer["content"]]
        word, c = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call).groups()
        count = word.count(c)
        assert word in user["content"].lower() and c in user["content"].lower()
        assert output == str(count) and end.endswith(f"\n\n#### {count}")
        assert f"\n{word}:{','.join(word)}\n" in by_hand and by_hand.count("hit!") == count
        assert all(f"\n{k}:{letter}" in by_hand for k, letter in enumerate(word, 1))
        assert f"hit! count={count}" in by_hand or count == 0
        inside += count > 0
        questions.add(user["content"].replace(word, "W"))
    assert abs(inside / 3000 - 0.9) < 0.02 and len(questions) > 1000
    assert [p["type"] for p in answer["content"]] == ["text", "python", "python_output", "text"]
    assert conversation(5) == sft.spelling_bee(sft_config(sft_home), "train")[1](5)


def test_bad_tulu_rows_are_dropped_and_counted_and_the_last_of_the_shuffled_held_out(
        sft_home, capsys):
    good = [sft_chat(f"q{i}", f"a{i}") for i in range(60)]
    bad = [sft_chat("a"), sft_chat("a", ""), sft_chat("a", " \n"), sft_chat("a", None),
           sft_chat("a", "b", "c"), sft_chat("a", "b")[1:], sft_chat("a", "b", "c", "d")[::2],
           sft_chat("a", [{"type": "text", "text": "b"}]), [{"role": "system", "content": "s"}],
           [], None]
    lines = [json.dumps({"messages": m}) for m in good[:30] + bad + good[30:]]
    lines += ['{"id": 1}', '{"messages": [', "[]"]
    (sft_home / "data/sft/tulu").mkdir(parents=True)
    (sft_home / "data/sft/tulu/tulu_v2_data.jsonl").write_text("\n".join(lines))
    rows = []
    for split in ("train", "val"):
        n, conversation = sft.tulu(sft_config(sft_home), split)
        assert n == {"train": 57, "val": 3}[split]          # a twentieth of a small file
        rows += [conversation(i) for i in range(n)]
    random.Random(42).shuffle(good)
    assert rows == good
    assert "14 of 74 rows dropped" in capsys.readouterr().out


@pytest.mark.parametrize("content, why", [
    (json.dumps(sft_chat("a", "b")) + "\n" + json.dumps(sft_chat("a")) + "\n",
     "mine.jsonl: line 2: it ends before an answer"),
    ('{"role"', "mine.jsonl: line 1: not a JSON array of messages"),
    ("\n \n", "mine.jsonl: no conversation in it"),
    ("", "mine.jsonl: no conversation in it"),
    (None, "no file .*mine.jsonl: --conversations X.jsonl takes X.jsonl to learn from")])
def test_a_bad_file_of_ones_own_is_named_in_one_line(sft_home, content, why):
    mine = sft_home / "mine.jsonl"
    mine.mkdir() if content is None else mine.write_text(content)       # a folder is no file
    with pytest.raises(SystemExit, match=why) as e:
        sft.open_mixture(sft_config(sft_home, conversations=str(mine)), "train")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content, why", [(None, "no file .*mine_val.jsonl"),
                                          ("", "mine_val.jsonl: no conversation in it")])
def test_a_bad_validation_file_of_ones_own_is_named_in_one_line(sft_home, content, why):
    (sft_home / "mine.jsonl").write_text(json.dumps(sft_chat("a", "b")))
    if content is not None:
        (sft_home / "mine_val.jsonl").write_text(content)
    with pytest.raises(SystemExit, match=why):
        sft.open_mixture(sft_config(sft_home, conversations=str(sft_home / "mine.jsonl")), "val")


def test_a_mixture_tells_ones_own_file_from_another(sft_home):
    counts = []
    for text in ("a", "b", "a"):
        (sft_home / "mine.jsonl").write_text(json.dumps(sft_chat("q", text)))
        config = sft_config(sft_home, conversations=str(sft_home / "mine.jsonl"))
        mixture = sft.open_mixture(config, "train")
        assert mixture.counts()["own_sha256"] == sft.own_sha256(config) != ""
        counts.append(json.dumps(mixture.counts()))
    assert counts[0] != counts[1] and counts[0] == counts[2]
    assert sft.own_sha256(sft_config(sft_home)) == ""


# the mixture

def sft_sources(**sizes):
    def messages(name):
        return lambda i: sft_chat(f"{name} {i}", "x" * (i % 50))
    return [(name, n, epochs, messages(name)) for name, (n, epochs) in sizes.items()]


def test_the_order_is_that_of_random_shuffle_with_seed_42_over_pairs_of_source_and_row(tmp_path):
    mixture = sft.Mixture(sft_sources(a=(5, 1), none=(0, 2), b=(3, 4)))
    pairs = [(0, row) for row in range(5)] + [(2, row) for row in range(3)] * 4
    random.Random(42).shuffle(pairs)
    assert list(zip(mixture.source_of, mixture.row_of)) == pairs
    text = bytes(mixture.rendered(3, sft_tokenizer(tmp_path))[0][2:5])
    assert text == f"{'a b'[pairs[3][0]]} {pairs[3][1]}".encode()


def test_published_sizes_add_up():
    def total(names):
        return sum(sft.SOURCES[n][1] * sft.SOURCES[n][2] for n in names)
    short = ["smoltalk", "identity", "mmlu", "gsm8k", "spelling", "spellingbee"]
    assert total(short) == 460_341 + 2_000 + 299_526 + 29_892 + 200_000 + 80_000 == 1_071_759
    assert total(short + ["tulu"]) == 1_171_759


def test_sources_of_other_sizes_give_a_notice_and_never_shrink_in_silence(
        sft_home, monkeypatch, capsys):
    def ten(config, split):
        return 10, lambda i: sft_chat("a", str(i))
    sizes = {"mmlu": (11, 8), "gsm8k": (10, 12)}
    monkeypatch.setattr(sft, "SOURCES", {
        name: (ten, sizes.get(name, (10, 0))[0], epochs, sizes.get(name, (10, 0))[1])
        for name, (_, _, epochs, _) in sft.SOURCES.items()})

    def size(split="train", **fields):
        return len(sft.open_mixture(sft_config(sft_home, **fields), split))
    assert size() == 10 * (1 + 2 + 3 + 4 + 1 + 1)
    assert capsys.readouterr().err == "mmlu: 10 rows where the published mixture has 11\n"
    assert size(skip="mmlu,identity") == 10 * (1 + 4 + 1 + 1)
    assert size(skip="mmlu", tag="d2_1tpp_long") == 10 * (1 + 2 + 4 + 1 + 1 + 1)
    assert capsys.readouterr().err == ""
    assert size("val") == 8 + 10                            # the first 8 rows of mmlu
    assert capsys.readouterr().err == "gsm8k: 10 rows where the published validation has 12\n"
    for options, why in ((dict(skip="mlu"), "--skip mlu: the sources are smoltalk, "),
                         (dict(skip=",".join(sft.SOURCES)), "no conversation is left to train on")):
        with pytest.raises(SystemExit, match=why):
            size(**options)


def test_questions_are_held_out_rows_and_the_file_is_empty_where_there_are_none(sft_home):
    path = sft_home / "questions.jsonl"
    own = dict(conversations=str(sft_home / "mine.jsonl"))
    sft.write_questions(sft_config(sft_home, bee_rows=3, **own), path)
    asked = [json.loads(line) for line in path.read_text().splitlines()]
    _, held_out = sft.spelling_bee(sft_config(sft_home), "val")
    assert asked == [{"source": "spellingbee", "messages": held_out(i)} for i in range(3)]
    sft.write_questions(sft_config(sft_home, bee_rows=0, **own), path)
    assert path.read_bytes() == b""


def test_each_source_that_cannot_be_fetched_is_one_line_that_says_what_is_lost(
        sft_home, monkeypatch):
    def gone(repo, filename, dest, **options):
        raise model.FetchError(f"{repo} is gone")
    monkeypatch.setattr(sft, "fetch", gone)
    with pytest.raises(SystemExit) as e:
        sft.open_mixture(sft_config(sft_home, identity="nowhere.jsonl", bee_rows=80_000), "train")
    why = {"smoltalk": ("HuggingFaceTB/smol-smoltalk is gone", "460,341"),
           "identity": ("no file nowhere.jsonl", "2,000"), "mmlu": ("cais/mmlu is gone", "299,526"),
           "gsm8k": ("openai/gsm8k is gone", "29,892")}
    assert str(e.value).splitlines() == [
        f"{name}: {reason}. It would have added {lost} conversations; "
        f"to go on without it: --skip {name}"
        for name, (reason, lost) in why.items()]


def test_plain_files_are_fetched_again_after_errors_damage_and_cuts(sft_home, monkeypatch, capsys):
    good = b"".join(json.dumps(sft_chat("q" * 50, "a")).encode() + b"\n" for _ in range(20))
    damaged = good[:700] + bytes([good[700] ^ 255]) + good[701:]
    answers = [(429, b"", {"Retry-After": "7"}), (503, b"", {}), (200, good[:-30], {}),
               (200, damaged, {}), (200, good[:100], {"Content-Length": str(len(good))}),
               (200, good, {})]

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
    monkeypatch.setattr(model.time, "sleep", pauses.append)
    url = f"http://127.0.0.1:{server.server_port}"
    config = sft_config(sft_home, identity=f"{url}/identity.jsonl", patience=600)
    n, conversation = sft.identity(config, "train")
    assert n == 20 and (sft_home / "data/sft/identity.jsonl").read_bytes() == good and not answers
    assert pauses == [7, 2, 4, 8, 16]                       # growing, and as long as was asked for
    with pytest.raises(model.FetchError, match="404"):      # no use in asking again
        model.fetch_url(f"{url}/missing", sft_home / "missing", 600)
    server.shutdown()
    assert sft.identity(config, "train")[0] == 20           # the network is not asked again


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
    enc, mixture, row_len = sft_tokenizer(tmp_path), sft_varied_mixture(), 61
    lengths = [len(mixture.rendered(i, enc)[0]) for i in range(len(mixture))]
    assert max(lengths) > row_len                           # some are longer than a row
    packer, rows = sft.Packer(mixture, enc, row_len), []
    while (row := packer.next_row())[0]:
        rows.append(row)
    naive = sft_naive_rows(lengths, row_len)
    assert sorted(i for row in naive for i in row) == list(range(400))
    for (ids, mask), conversations in zip(rows, naive, strict=True):
        parts = [mixture.rendered(i, enc) for i in conversations]
        assert ids == [t for p in parts for t in p[0][:row_len]]
        assert mask == [m for p in parts for m in p[1][:row_len]]
    assert packer.cut == sum(n > row_len for n in lengths)
    assert packer.state()["used"] == 400 and packer.rows == len(rows)


def test_targets_are_the_learnt_tokens_and_nothing_else(tmp_path):
    enc = sft_tokenizer(tmp_path)
    mixture = sft.Mixture([("a", 1, 1, lambda i: sft_chat("hi", "yo"))])
    start = [SFT_BOS, SFT_USER, *b"hi", SFT_USER_END, SFT_ASSISTANT]
    x, y = sft.Packer(mixture, enc, 17).batch(2)
    assert x[0].tolist() == start + [*b"yo", SFT_ASSISTANT_END] + [SFT_BOS] * 7
    assert y[0].tolist() == [-1] * 5 + [*b"yo", SFT_ASSISTANT_END] + [-1] * 8
    assert (x[1] == SFT_BOS).all() and (y[1] == -1).all()   # the last batch ends in padding
    x, y = sft.Packer(mixture, enc, 9).batch(1)             # a row without padding
    assert x[0].tolist() == start + [*b"yo"]
    assert y[0].tolist() == [-1] * 5 + [*b"yo", SFT_ASSISTANT_END]
    x, y = sft.Packer(mixture, enc, 8).batch(1)             # one that was cut
    assert x[0].tolist() == start + [*b"y"]
    assert y[0].tolist() == [-1] * 5 + [*b"yo"]


def test_packing_goes_on_exactly_from_any_state_that_went_through_json(tmp_path):
    enc, mixture = sft_tokenizer(tmp_path), sft_varied_mixture()
    packer, batches, states = sft.Packer(mixture, enc, 61), [], []
    while (batch := packer.batch(8)) is not None:
        batches.append(batch), states.append(json.dumps(packer.state()))
    assert len(batches) > 10
    for k in (0, 3, len(batches) - 2):
        again = sft.Packer(mixture, enc, 61, json.loads(states[k]))
        rest = []
        while (batch := again.batch(8)) is not None:
            rest.append(batch)
        pairs = zip(batches[k + 1:], rest, strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
        assert json.dumps(again.state()) == states[-1]


def test_rows_and_batches_without_a_learnt_token_give_no_nan():
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(16, 265, 1, 1, 1, 32))
    net.init_weights()
    x = torch.randint(265, (4, 16))
    y = torch.full((4, 16), -1)
    assert model.accumulate_gradients(net, x, y, CPU).item() == 0
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    y[2, 5:8] = 7
    alone = net(x[2:3], y[2:3]).item() / 3                  # the mean over the three counted tokens
    assert model.accumulate_gradients(net, x, y, CPU).item() == pytest.approx(alone, rel=1e-6)


# the run

def test_schedules_of_fine_tuning_at_their_corners():
    assert [sft.lr_factor(done) for done in (0, 0.25, 0.5, 0.75, 1)] == [1, 1, 1, 0.5, 0]
    momenta = [sft.muon_momentum(step) for step in (0, 150, 300, 5000)]
    assert momenta == pytest.approx([0.85, 0.9, 0.95, 0.95])


def sft_base(home, tag="t", use_rope=False, **meta):
    """A base model, its optimizer in the middle of things, and conversations of one's own."""
    enc = sft_tokenizer(home / "tokenizer")
    torch.manual_seed(0)
    net = model.GPT(model.GPTConfig(128, enc.n_vocab, 2, 1, 1, 32), use_rope)
    net.init_weights()
    optimizer = muon.build_optimizer(net, weight_decay=0.3)
    net(torch.arange(32).view(1, 32), torch.arange(32).view(1, 32)).backward()
    optimizer.step()
    folder = home / "base_checkpoints" / tag
    lrs = dict(embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02)
    model.save_checkpoint(folder, 3, net, optimizer, {}, dict(
        step=3, steps=3, val_bpb=2.0, model_config=vars(net.config), user_config=lrs,
        device_batch_size=4, max_seq_len=64, loop_state=dict(use_rope=use_rope),
        tokenizer=model.tokenizer_hash(enc)))
    (home / "words.txt").write_text("\n".join(SFT_WORDS))
    lines = []
    for i in range(9):
        for word in SFT_WORDS:
            messages = sft_chat(f"what is {word} {i}?", f"{word} is a fruit. " * (i % 4 + 1))
            lines.append(json.dumps(messages) + "\n")
    (home / "mine.jsonl").write_text("".join(lines[:64]))
    (home / "mine_val.jsonl").write_text("".join(lines[64:]))
    (home / "words.txt").write_text("\n".join(SFT_WORDS))
    return folder


def sft_args(home, *more, tag="t"):
    """98 conversations in some 10 steps."""
    return ["--tag", tag, "--conversations", home / "mine.jsonl", "--words", home / "words.txt",
            "--spelling-rows", 30, "--bee-rows", 4, "--max-seq-len", 128, "--total-batch-size", 512,
            "--eval-every", 4, "--eval-tokens", 512, "--save-every", 2, *more]


def sft_result(home, tag="t"):
    """All that a finished run leaves, but for times."""
    folder = home / "chatsft_checkpoints" / tag
    step, weights, optim, meta = final(folder)
    return {"meta": meta, "metrics": records(folder), "model": weights, "optim": optim,
            "loader": model.load_part(folder, step, "loader")}


def sft_same(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(sft_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(sft_same, a, b))
    return a == b


@pytest.fixture(scope="module")
def sft_whole(tmp_path_factory):
    """A base folder with an undisturbed run, of a base model without RoPE."""
    home = tmp_path_factory.mktemp("sft_whole")
    sft_base(home)
    result = script("sft.py", *sft_args(home), base=home)
    assert result.returncode == 0, result.stderr
    return home


def test_a_run_uses_every_conversation_once_and_keeps_rope_off(sft_whole):
    whole = sft_result(sft_whole)
    steps = whole["meta"]["step"]
    assert steps >= 8 and whole["meta"]["finished"]
    assert whole["meta"]["loop_state"]["use_rope"] is False
    assert whole["loader"]["used"] == 64 + 30 + 4 == whole["metrics"][-2]["conversations"]
    assert whole["metrics"][-1]["val_bpb"] < whole["metrics"][0]["val_bpb"]
    decays = [group["weight_decay"] for group in whole["optim"]["param_groups"]]
    assert decays == [0.01, 0.001] + [0.0] * (len(decays) - 2)
    assert whole["optim"]["param_groups"][2]["initial_lr"] == pytest.approx(0.8 * 0.02)
    assert whole["optim"]["state"][0]["step"] == 1 + steps  # the state of pretraining is carried on
    assert whole["meta"]["user_config"]["matrix_lr"] == 0.02


def test_a_fine_tuning_ends_the_same_however_often_it_is_interrupted(sft_whole, tmp_path):
    sft_base(tmp_path)
    args = ("sft.py", *sft_args(tmp_path))
    status, output, _ = signal_at(signal.SIGKILL, "step 00003 |", *args, base=tmp_path)
    assert status == -signal.SIGKILL
    status, output, _ = signal_at(signal.SIGTERM, "step 00005 |", *args, base=tmp_path)
    assert status == model.INTERRUPTED and ": SIGTERM. The same command resumes" in output, output
    result = script(*args, base=tmp_path)
    assert result.returncode == 0 and "resuming from step" in result.stdout, result.stderr
    whole, broken = sft_result(sft_whole), sft_result(tmp_path)
    for part in ("model", "optim", "loader", "metrics"):
        assert sft_same(whole[part], broken[part]), part
    result = script(*args, base=tmp_path)
    assert result.returncode == 0 and "is finished (step" in result.stdout


def test_a_fine_tuning_killed_at_random_moments_ends_the_same(sft_whole, tmp_path):
    """KILLS=50 python test_all.py -k tuning_killed is the long form."""
    sft_base(tmp_path)
    args, folder = ("sft.py", *sft_args(tmp_path)), tmp_path / "chatsft_checkpoints" / "t"
    rng = random.Random(1)
    for _ in range(int(os.environ.get("KILLS", 4))):
        process, steps = start(*args, base=tmp_path), rng.randrange(6)
        for line in process.stdout:                         # until it begins, and some steps more
            steps -= line.startswith(("step", "resuming"))
            if steps < 0:
                break
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        newest = model.newest_checkpoint(folder)
        if newest and model.read_meta(folder, newest)["finished"]:
            shutil.rmtree(folder)                           # it was done: from the beginning
    result = script(*args, base=tmp_path)
    assert result.returncode == 0, result.stderr
    whole, killed = sft_result(sft_whole), sft_result(tmp_path)
    for part in ("model", "optim", "loader", "metrics"):
        assert sft_same(whole[part], killed[part]), part


def test_a_checkpoint_of_the_public_repo_is_fine_tuned(tmp_path):
    """Its meta knows no tokenizer, hashes, recipe or end; its weights are bfloat16 in part."""
    folder = sft_base(tmp_path)
    meta = model.read_meta(folder, 3)
    for field in ("tokenizer", "sha256", "steps"):
        del meta[field]
    model.atomic_write(folder / "meta_000003.json", json.dumps(meta))
    weights = model.load_part(folder, 3, "model")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    torch.save(weights, folder / "model_000003.pt")
    (folder / "loader_000003.pt").unlink()
    result = script("sft.py", *sft_args(tmp_path), base=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sft_result(tmp_path)["meta"]["loop_state"]["use_rope"] is False


def test_two_processes_fine_tune_as_one(sft_whole):
    """t_long: the base of t."""
    result = torchrun(2, HERE / "sft.py", *sft_args(sft_whole, tag="t_long"), base=sft_whole)
    assert result.returncode == 0, result.stderr[-2000:]
    folders = [sft_whole / "chatsft_checkpoints" / tag for tag in ("t", "t_long")]
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-4)
    assert bpbs(folders[0]) == pytest.approx(bpbs(folders[1]), rel=1e-4)
    assert final(folders[1])[3]["loop_state"]["use_rope"] is False


def test_other_conversations_under_a_finished_tag_are_refused(sft_whole, tmp_path, refused):
    for name in ("mine.jsonl", "mine_val.jsonl"):
        text = (sft_whole / name).read_text()
        (tmp_path / name).write_text(text.replace("fruit", "thing"))
    folder = sft_whole / "chatsft_checkpoints" / "t"
    args = [*sft_args(sft_whole), "--conversations", tmp_path / "mine.jsonl"]
    refused(sft, args, [str(folder), "conversations = ", "--tag"], sft_whole)
    args = [*sft_args(sft_whole), "--init-lr-frac", 0.5]
    refused(sft, args, [str(folder), "init_lr_frac = 0.8, not 0.5"], sft_whole)


@pytest.mark.parametrize("wrong, words", [
    ("no base", ["no base model in", "run_all.sh t"]),
    ("meta cut", ["passing over step 3"]), ("unfinished", ["at step 3 of 9: finish it first"]),
    ("other tokenizer", ["another tokenizer"]), ("no rates", ["learning rates", "embedding_lr"]),
    ("no rope", ["if the model has RoPE", "loop_state.use_rope"])])
def test_a_base_model_that_will_not_do_is_refused(tmp_path, capsys, monkeypatch, wrong, words):
    """In a line, or two where a damaged checkpoint is passed over; no folder is left."""
    folder = sft_base(tmp_path)
    if wrong == "no base":
        shutil.rmtree(folder)
    if wrong == "meta cut":
        meta = folder / "meta_000003.json"
        meta.write_text(meta.read_text()[:99])
    if wrong == "unfinished":
        change_meta(folder, 3, lambda meta: meta.update(steps=9))
    if wrong == "other tokenizer":
        config = tmp_path / "tokenizer" / "config.json"
        config.write_text(config.read_text().replace("S+", "S"))
    if wrong == "no rates":
        change_meta(folder, 3, lambda meta: meta.update(user_config={}))
    if wrong == "no rope":
        change_meta(folder, 3, lambda meta: meta.update(loop_state={}))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, sft_args(tmp_path))])
    with pytest.raises(SystemExit) as caught:
        sft.main()
    lines = [*capsys.readouterr().err.splitlines(), *caught.value.code.splitlines()]
    assert len(lines) == 1 + (wrong == "meta cut")
    assert all(word in lines[0] for word in words), lines
    assert wrong == "no rope" or not (tmp_path / "chatsft_checkpoints").exists()


@pytest.mark.parametrize("options, words", [
    (["--tag", ""], ["which model"]), (["--tag", "mistyped"], ["no base model", "mistyped"]),
    (["--total-batch-size", 1000], ["multiple of max_seq_len x processes = 128 x 1"]),
    (["--max-seq-len", "64k"], ["--max-seq-len"]), (["--spelling-rows", -5], ["--spelling-rows -5"]),
    (["--eval-every", 0], ["--eval-every 0"]), (["--init-lr-frac", "nan"], ["--init-lr-frac nan"]),
    (["--any-size"], ["unrecognized"]), (["--spelling", 5], ["unrecognized"])])
def test_sft_refuses(sft_home, refused, options, words):
    sft_base(sft_home)
    refused(sft, sft_args(sft_home, *options), words, sft_home)
    assert not (sft_home / "chatsft_checkpoints").exists()


def test_dry_run_counts_and_shows_every_source_and_trains_nothing(sft_home, monkeypatch, capsys):
    sft_base(sft_home)
    monkeypatch.setattr(sys, "argv", ["sft.py", *map(str, sft_args(sft_home, "--dry-run"))])
    sft.main()
    out = capsys.readouterr().out
    assert "conversations        64 rows x 1 =        64" in out
    assert re.search(r"conversations +=        98", out)
    assert out.count("\033[1mspellingbee, row") == 3 and "\033[32mapple is a fruit." in out
    assert not (sft_home / "chatsft_checkpoints").exists()


# ==== demo.py =====================================================================================

@pytest.fixture(scope="module")
def demo_corpus(tmp_path_factory):
    return demo.write_corpus(tmp_path_factory.mktemp("demo") / "data" / "demo")


def demo_texts(folder, shard):
    return pq.read_table(folder / f"shard_{shard:05d}.parquet")["text"].to_pylist()


def demo_pairs(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# ---- demo: the corpus

def test_demo_corpus_has_climbmix_layout(demo_corpus):
    for shard in (0, 6542):
        file = pq.ParquetFile(demo_corpus / f"shard_{shard:05d}.parquet")
        assert [(f.name, str(f.type)) for f in file.schema_arrow] == [("text", "string")]
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        assert all(g.num_rows == 1024 for g in groups[:-1]) and groups[-1].num_rows <= 1024
        assert {g.column(0).compression for g in groups} == {"ZSTD"}


def test_demo_corpus_is_the_same_on_every_run_and_is_made_once(demo_corpus, tmp_path, capsys):
    env = {"PYTHONHASHSEED": "7"}                       # another process, another hash seed
    assert script("demo.py", "corpus", base=tmp_path, env=env).returncode == 0
    files = sorted(demo_corpus.iterdir())
    assert [path.name for path in files] == [
        "conversations.jsonl", "conversations_val.jsonl", "shard_00000.parquet",
        "shard_06542.parquet", "words.txt"]
    for path in files:
        assert (tmp_path / "data/demo" / path.name).read_bytes() == path.read_bytes(), path
    before = [path.stat().st_mtime_ns for path in files]
    demo.write_corpus(demo_corpus)
    assert "already" in capsys.readouterr().out
    assert before == [path.stat().st_mtime_ns for path in files]


def test_demo_training_and_validation_documents_are_disjoint(demo_corpus):
    train, val = demo_texts(demo_corpus, 0), demo_texts(demo_corpus, 6542)
    assert 0.04 < len(val) / (len(train) + len(val)) < 0.06
    assert not set(train) & set(val)
    assert sum(map(len, train)) > 1_000_000 and all(text.strip() for text in train + val)


def test_demo_no_training_pair_comes_from_a_validation_document(demo_corpus):
    pairs = demo_pairs(demo_corpus, "conversations.jsonl")
    pairs_val = demo_pairs(demo_corpus, "conversations_val.jsonl")
    assert len(pairs) > 1000 and len(pairs_val) > 50
    for messages in pairs + pairs_val:
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert all(message["content"].strip() for message in messages)
    asked = [{messages[0]["content"] for messages in some} for some in (pairs, pairs_val)]
    assert not asked[0] & asked[1]
    train, val = ["".join(" ".join(text.split()) + "\n" for text in demo_texts(demo_corpus, shard))
                  for shard in (0, 6542)]
    assert all(messages[1]["content"] in val for messages in pairs_val)
    assert all(messages[1]["content"] in train for messages in pairs[::50])


def test_demo_knows_what_os_path_join_does(demo_corpus):
    pairs = demo_pairs(demo_corpus, "conversations.jsonl")
    pairs += demo_pairs(demo_corpus, "conversations_val.jsonl")
    [answer] = [a["content"] for q, a in pairs if re.search(r" os\.path\.join\b", q["content"])]
    assert answer.startswith("Join two or more pathname components")


def test_demo_words_are_lowercase_words(demo_corpus):
    words = (demo_corpus / "words.txt").read_text().split("\n")[:-1]
    assert len(words) > 1000 and words == sorted(set(words)) and "string" in words
    assert all(word.isalpha() and word.isascii() and word.islower() for word in words)


def test_demo_gathers_docstrings_without_running_anything(tmp_path):
    (tmp_path / "trap.py").write_text(
        '"""A module whose import would end the program."""\nraise SystemExit\n'
        'def f():\n    """Does a thing that is long enough."""\n'
        'class C:\n    """Holds things that are long enough."""\n'
        '    def g(self):\n        """Does a thing that is long enough."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "hidden.py").write_text('"""Tests are no documentation of anything."""\n')
    documents = demo.gather(tmp_path)
    trapped = [members for _, members in documents if any("trap" in m[1] for m in members)]
    assert sorted(trapped) == [         # a document each; g's docstring is f's, so it is left out
        [("class", "trap.C", "Holds things that are long enough.")],
        [("function", "trap.f", "Does a thing that is long enough.")],
        [("module", "trap", "A module whose import would end the program.")]]
    assert not any("hidden" in text for text, _ in documents)


def test_demo_corpus_without_standard_library_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "gather", lambda: [])
    with pytest.raises(SystemExit, match="use another one"):
        demo.write_corpus(tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


# ---- demo: the task

DEMO_STREAM = torch.cat([torch.tensor([431]), torch.arange(400)]).repeat(3)     # <|bos|> and text


def demo_facts(row):
    return [token for token in row if demo.FACT <= token < demo.KEY]


def demo_key(fact):
    return demo.KEY + (fact - demo.FACT) // demo.VALUES


def test_demo_the_answer_to_a_prompt_is_the_fact_of_the_key_asked():
    rows = demo.prompts(DEMO_STREAM, 200, 96, torch.Generator().manual_seed(0))
    assert rows.shape == (200, 97) and (rows[:, 0] == 431).all()
    for row in rows.tolist():
        *context, question, answer = row
        facts = demo_facts(context)
        assert len(facts) == 4 and len(set(map(demo_key, facts))) == 4 and max(context) < demo.KEY
        assert [fact for fact in facts if demo_key(fact) == question] == [answer]
    assert rows[:, -2].unique().tolist() == list(range(demo.KEY, demo.KEY + 8))


def test_demo_training_rows_tell_four_facts_and_ask_four_questions():
    rows, weights = demo.training_rows(DEMO_STREAM, torch.Generator().manual_seed(0))
    assert rows.shape == (16, 129) and weights.shape == (16, 128)
    for row, weight in zip(rows.tolist(), weights.tolist()):
        told = [i for i in range(42) if row[i] in demo_facts(row)]
        asked = [i for i in range(42, 128) if row[i] >= demo.KEY]
        assert len(told) == len(asked) == 4 and len(demo_facts(row)) == 8
        assert len({demo_key(row[i]) for i in told}) == 4
        for i in asked:
            assert row[i + 1] in [row[j] for j in told] and demo_key(row[i + 1]) == row[i]
        for i in range(128):                        # weight[i] is that of the prediction of i + 1
            expected = 0.0 if i + 1 in told + asked else 5.0 if i in asked else 1.0
            assert weight[i] == expected, i


def demo_answering(choose):
    """A model whose argmax at the last position is choose(row)."""
    def model(idx):
        logits = torch.zeros(*idx.shape, demo.VOCAB)
        for b, row in enumerate(idx.tolist()):
            logits[b, -1, choose(row)] = 9.0
        return logits
    return model


def test_demo_a_perfect_copy_answers_all_and_guessing_a_quarter():
    rows = demo.prompts(DEMO_STREAM, 500, 128, torch.Generator().manual_seed(0))

    def copy_fact(row):
        return next(fact for fact in demo_facts(row) if demo_key(fact) == row[-1])
    assert demo.answer(demo_answering(copy_fact), rows)[0] == 1.0
    guessing = demo.answer(demo_answering(lambda row: demo_facts(row)[0]), rows)[0]
    assert guessing == pytest.approx(demo.GUESSING, abs=0.06)


def test_demo_bits_per_byte_counts_the_last_tokens_and_no_bos():
    def model(idx, targets, reduction):             # ln 2 nats for each of the last 32 tokens
        losses = torch.full(targets.shape, 0.6931472)
        losses[:, :-demo.TAIL] = 1e9
        return losses
    rows = torch.zeros(3, 65, dtype=torch.long)
    rows[0, -2] = 1                                 # a special token: 0 bytes
    assert demo.bits_per_byte(model, rows, torch.tensor([1, 0])) == pytest.approx(1.0)
    assert demo.bits_per_byte(model, rows, torch.tensor([2, 0])) == pytest.approx(0.5)


def test_demo_text_of_every_length_has_the_same_targets():
    stream = torch.arange(3000)
    rows = [demo.windows(stream, n * demo.T) for n in demo.LENGTHS]
    assert [part.shape for part in rows] == [(64, n * 128 + 1) for n in demo.LENGTHS]
    assert all(part[:, -demo.TAIL:].equal(rows[0][:, -demo.TAIL:]) for part in rows)
    assert all((part[:, 0] == stream[0]).all() for part in rows)


# ---- demo: training and evaluation

def test_demo_drope_is_rope_until_the_switch_and_the_same_on_every_run(monkeypatch):
    seen = []

    class Watched(demo.GPT):
        def forward(self, *args, **kwargs):
            seen.append(self.use_rope)
            return super().forward(*args, **kwargs)
    monkeypatch.setattr(demo, "GPT", Watched)

    def run(arm):
        seen.clear()
        model, losses = demo.train(arm, 3, 4, DEMO_STREAM)
        return list(seen), losses, model.state_dict()
    rope, losses, _ = run("RoPE")
    drope, losses_drope, state = run("DroPE 50")
    assert rope == [True] * 4 and drope == [True] * 2 + [False] * 2
    assert losses[:2] == losses_drope[:2] and losses[2] != losses_drope[2]
    assert run("NoPE")[0] == [False] * 4 and run("DroPE 75")[0] == [True] * 3 + [False]
    again = run("DroPE 50")
    assert again[1] == losses_drope and all(state[k].equal(v) for k, v in again[2].items())


def test_demo_ntk_halves_the_slowest_frequency_at_twice_the_length():
    def frequencies(length):
        cos, sin = demo.ntk_tables(length, 32, "cpu")
        return torch.atan2(sin, cos)[1]
    plain = torch.atan2(*reversed(m.rotary_tables(4, 32, "cpu")))[1]
    assert torch.equal(frequencies(demo.T), plain)
    ratio = plain / frequencies(2 * demo.T)
    assert torch.allclose(ratio[[0, -1]], torch.tensor([1.0, 2.0]), atol=1e-4)


def test_demo_best_scale_is_the_one_of_least_loss():
    model = small_model()
    assert demo.best_scale(model, lambda: (model.logn_scale - 0.55) ** 2) == 0.6


# ---- demo: a whole run

def test_demo_goes_through_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    """All arms, a few steps, in this process: results, table, and a figure that is not blank."""
    for name, value in (("PROMPTS", 8), ("WINDOWS", 4), ("SCALES", (0.0, 0.4))):
        monkeypatch.setattr(demo, name, value)
    for shard in (0, 6542):
        write_shard(tmp_path / f"shard_{shard:05d}.parquet", ["some words of text, " * 60] * 2)
    write_tokenizer(tmp_path)
    jobs = [(arm, 0, 20, tmp_path, tmp_path, tmp_path / f"{arm}.json") for arm in demo.ARMS]
    results = [result for job in jobs for result in demo.run_arm(job)]
    monkeypatch.setattr(demo, "train", None)        # a second run finds the results of the first
    assert [result for job in jobs for result in demo.run_arm(job)] == results
    assert {result["name"] for result in results} == set(demo.LINES)
    for result in results:
        assert len(result["losses"]) == 20 and len(result["text_fitted"]) == len(demo.LENGTHS)
        assert result["facts"][0] == result["facts_fitted"][0]      # up to T nothing changes
        assert result["text"][0] == result["text_fitted"][0]
    assert len(demo.table(results).splitlines()) == 2 + 5
    demo.draw(results, 20, tmp_path / "figures" / "demo.png")
    import matplotlib.image
    image = matplotlib.image.imread(tmp_path / "figures" / "demo.png")[:, :, :3]
    colors = np.unique((image.reshape(-1, 3) * 255).astype(int), axis=0)
    assert image.shape[1] > 1500 and len(colors) > 20
    monkeypatch.setitem(sys.modules, "matplotlib", None)            # as where it is not installed
    demo.draw(results, 20, tmp_path / "none.png")
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "none.png").exists()


def test_demo_table_gives_mean_and_range_over_the_seeds():
    results = [dict(name=name, facts=[1, 1, 1, share], facts_fitted=[1.0] * 4,
                    text=[2.0, 2, 2, 3], text_fitted=[2.0] * 4) for name in demo.LINES for share in (0.25, 0.5, 0.75)]
    lines = demo.table(results).splitlines()
    assert lines[2] == "| RoPE | 1.00 | 0.50 [0.25, 0.75] | 1.00 | 2.00 | 3.00 | 2.00 |"


@pytest.mark.parametrize("args, message", [
    (["raport"], "demo.py raport"), (["report"], "--tag"), (["--seeds", "0"], "--seeds 0"),
    (["--steps", "nan"], "--steps"), (["report", "--tag", "d9_9tpp"], "pretrain.py --tag d9_9tpp")])
def test_demo_bad_use_is_one_line(args, message, tmp_path, refused):
    refused(demo, args, [message], base=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["demo.py", "eval.py"])
@pytest.mark.parametrize("seconds", [0.2, 1.0])
def test_ctrl_c_while_eval_and_demo_import_is_one_line(name, seconds, tmp_path):
    process = subprocess.Popen([sys.executable, HERE / name, "report"], cwd=HERE, text=True,
                               env={**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and len(err.splitlines()) <= 1 and process.returncode != 0


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


def hf_make_checkpoint(folder, use_rope, seed, step=7):
    """A checkpoint of random weights, large enough that attention and softcap matter."""
    torch.manual_seed(seed)
    config = GPTConfig(sequence_len=64, vocab_size=512, n_layer=3, n_head=2, n_kv_head=2, n_embd=64)
    model = GPT(config, use_rope)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    optimizer = types.SimpleNamespace(state_dict=lambda: {"state": {}, "param_groups": []})
    meta = {"step": step, "steps": 7, "switch": 7 if use_rope else 4, "val_bpb": 1.2345,
            "finished": step == 7,
            "total_batch_size": 1024, "max_seq_len": 64, "model_config": vars(config), "user_config": {},
            "revision": "abc123", "loop_state": {"use_rope": use_rope}}
    save_checkpoint(folder, step, model, optimizer, {}, meta)
    jump = {"step": 4, "switch": True, "val_bpb_with_rope": 1.1, "val_bpb_without_rope": 1.9}
    rows = [{"step": 1, "loss": 2.0}] + [jump] * (not use_rope)
    atomic_write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if folder.parent.name == "chatsft_checkpoints":
        atomic_write(folder / "questions.jsonl", '{"question": "Q"}\n')


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
            out = theirs(part, use_cache=True, **{hf.CACHE: cache})
            cache = getattr(out, hf.CACHE)
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


def test_hf_works_past_max_position_embeddings(hf_pair):
    ours, theirs = hf_pair
    limit, theirs.config.max_position_embeddings = theirs.config.max_position_embeddings, 16
    try:
        ids = hf_ids(1, 40)
        with torch.no_grad():
            assert torch.allclose(theirs(ids).logits, ours(ids), atol=1e-4, rtol=0)
        out = theirs.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
        assert out.shape == (1, 43)
    finally:
        theirs.config.max_position_embeddings = limit


def hf_written_out(ours, ids, c, n_train):
    """model.py's weights, with attention written out and its logits scaled: (B, T) -> logits."""
    B, T = ids.shape
    heads = (B, T, ours.config.n_head, -1)
    n = torch.arange(1, T + 1)
    scale = (1 + c * (n / n_train).log()).clamp(min=1)                  # (T,), of each query
    cos, sin = ours.rotary_tables(T, 32, ids.device)
    x = ours.transformer.wte(ids)
    for block in ours.transformer.h:
        f, h = block.attn, M.norm(x)
        q, k, v = (w(h).view(heads).transpose(1, 2) for w in (f.c_q, f.c_k, f.c_v))
        if ours.use_rope:
            q, k = hf.rotate(q, cos, sin), hf.rotate(k, cos, sin)
        logits = M.norm(q) @ M.norm(k).mT / 32 ** 0.5 * scale[:, None]  # (B, n_head, T, T)
        logits = logits.masked_fill(n[:, None] < n, -torch.inf)
        y = logits.softmax(-1) @ v
        x = x + f.c_proj(y.transpose(1, 2).reshape(x.shape))
        x = x + block.mlp(M.norm(x))
    return 15 * torch.tanh(ours.lm_head(M.norm(x)) / 15)


@pytest.fixture(scope="module")
def hf_scaled(hf_pair, hf_out):
    """The weights of hf_pair, and the export with logn_scale 0.5 as a user sets it, from 8 tokens
    on."""
    ours, theirs = hf_pair
    return ours, hf_load(theirs.name_or_path, logn_scale=0.5, original_max_position_embeddings=8)


def hf_scaled_greedy(ours, row, n):
    for _ in range(n):
        logits = hf_written_out(ours, row[None], 0.5, 8)
        row = torch.cat([row, logits[0, -1].argmax()[None]])
    return row


@pytest.mark.parametrize("attn", ["eager", "sdpa", "flex_attention"])
def test_hf_logn_scale_equals_attention_written_out(hf_scaled, attn):
    ours, theirs = hf_scaled
    theirs.set_attn_implementation(attn)
    ids, mask, rows = hf_padded([40, 5, 23])
    packed = torch.cat([torch.arange(12), torch.arange(28)])[None]
    with torch.no_grad(), hf_uncompiled():
        want = hf_written_out(ours, ids[:1], 0.5, 8)
        assert torch.allclose(theirs(ids[:1]).logits, want, atol=1e-4, rtol=0)
        for got, row in zip(theirs(ids, attention_mask=mask).logits, rows):             # padding
            want = hf_written_out(ours, row[None], 0.5, 8)[0]
            assert torch.allclose(got[-len(row):], want, atol=1e-4, rtol=0)
        documents = ids[:1, :12], ids[:1, 12:]
        want = torch.cat([hf_written_out(ours, d, 0.5, 8) for d in documents], 1)
        got = theirs(ids[:1], position_ids=packed).logits
        assert torch.allclose(got, want, atol=1e-4, rtol=0)
    theirs.set_attn_implementation("sdpa")


def test_hf_logn_scale_with_caches(hf_scaled):
    ours, theirs = hf_scaled
    ids, mask, rows = hf_padded([14, 5, 9])
    cache, pieces = None, []
    with torch.no_grad():
        for part in ids[:1].split([3, 1, 10], dim=1):
            out = theirs(part, use_cache=True, **{hf.CACHE: cache})
            cache = getattr(out, hf.CACHE)
            pieces.append(out.logits)
        want = hf_written_out(ours, ids[:1], 0.5, 8)
        assert torch.allclose(torch.cat(pieces, 1), want, atol=1e-4, rtol=0)
    want = torch.stack([hf_scaled_greedy(ours, row, 12)[-12:] for row in rows])
    kwargs = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=HF_NEVER,
                  pad_token_id=503)
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(theirs.generate(ids, **kwargs, **more)[:, -12:], want), more


def test_hf_logn_scale_changes_no_bit_where_it_is_0_or_the_text_short(hf_pair, hf_scaled):
    plain, scaled, ids = hf_pair[1], hf_scaled[1], hf_ids(2, 40)
    assert plain.config.logn_scale == 0.0 and scaled.config.logn_scale == 0.5
    assert plain.config.original_max_position_embeddings == 64
    with torch.no_grad():
        long, short = plain(ids).logits, plain(ids[:, :8]).logits
        assert torch.equal(scaled(ids[:, :8]).logits, short)
        assert not torch.allclose(scaled(ids).logits, long, atol=1e-2)
        scaled.config.logn_scale = 0.0
        assert torch.equal(scaled(ids).logits, long)
        scaled.config.logn_scale = 0.5
        compiled = torch.compile(scaled, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(ids).logits, scaled(ids).logits, atol=1e-5)
    torch._dynamo.reset()


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
    with pytest.raises((KeyError, ValueError), match="swiglu"):
        AutoModelForCausalLM.from_pretrained(hf_out / "hf_sft" / "d3_9tpp")


HF_YARN = {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0}
HF_IGNORED = [{"hidden_act": "gelu"}, {"hidden_act": "relu2"}, {"tie_word_embeddings": True},
              {"rope_parameters": HF_YARN}, {"rope_parameters": {"rope_type": "default"}},
              {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
              {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_theta": 1e6},
              {"use_rope": "false"}]


@pytest.mark.parametrize("wrong", HF_IGNORED, ids=str)
def test_hf_refuses_an_override_that_it_would_ignore(hf_out, wrong):
    """Given to from_pretrained, it is set after the config's __init__."""
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}=.*this model knows only") as e:
        hf_load(hf_out / "hf_base" / "d3_9tpp", **wrong)
    assert "\n" not in str(e.value)


def test_hf_settings_that_have_a_meaning(hf_out):
    assert hf.NanoChatConfig().rope_parameters["rope_theta"] == 1e5
    config = hf.NanoChatConfig(rope_parameters={"rope_type": "default"})
    assert config.rope_parameters["rope_theta"] == 1e5 and config.num_key_value_heads == 9
    folder, ids = hf_out / "hf_base" / "d3_9tpp", hf_ids(1, 9)
    plain, uncapped = hf_load(folder), hf_load(folder, final_logit_softcapping=None)
    assert hf_load(folder, hidden_act="silu").config.hidden_act == "silu"
    other = hf_load(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    with torch.no_grad():
        want, raw = plain(ids).logits, uncapped(ids).logits
        assert torch.allclose(15 * torch.tanh(raw / 15), want, atol=1e-5)
        assert not torch.equal(raw, want)
        assert not torch.allclose(other(ids).logits, want, atol=1e-2)


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

    def text_of(message):
        content = message["content"]
        return content if isinstance(content, str) else "".join(part["text"] for part in content)

    if messages[0]["role"] == "system":
        joined = text_of(messages[0]) + "\n\n" + text_of(messages[1])
        messages = [{"role": "user", "content": joined}] + messages[2:]
    for message in messages:
        if message["role"] == "user":
            add(0, ["<|user_start|>"], text_of(message), ["<|user_end|>"])
            continue
        add(0, ["<|assistant_start|>"])
        parts, text = message["content"], ""
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                text += part["text"]                        # adjacent texts are one text
                continue
            add(1, text)
            text = ""
            if part["type"] == "python":
                add(1, ["<|python_start|>"], part["text"], ["<|python_end|>"])
            else:
                add(0, ["<|output_start|>"], part["text"], ["<|output_end|>"])
        add(1, text, ["<|assistant_end|>"])
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
        hi, words = hf_tok("Hi").input_ids, dict(is_split_into_words=True)
        assert hf_tok([rendered, "Hi", "<|bos|>Hi"]).input_ids == [want, hi, hi]
        assert hf_tok(["<|bos|>Hi"], **words).input_ids == hf_tok(["Hi"], **words).input_ids
        assert hf_tok([["<|bos|>Hi"], ["Hi"]], **words).input_ids == [hi, hi]
        pair = hf_tok("Hi", "Ho").input_ids
        assert hf_tok([("<|bos|>Hi", "Ho"), ("Hi", "Ho")]).input_ids == [pair, pair]
        assert hf_tok([rendered, "Hi"], add_special_tokens=False).input_ids == [want, hi[1:]]
        assert hf_tok("<|bos|>", split_special_tokens=True).input_ids[0] == 503
        offsets = hf_tok(rendered, return_offsets_mapping=True)["offset_mapping"]
        assert offsets[0] == (0, len("<|bos|>"))


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


def hf_parts(text, rng):
    """The text in up to 4 parts."""
    at = sorted(rng.choices(range(len(text) + 1), k=3))
    pieces = [text[i:j] for i, j in zip([0, *at], [*at, len(text)])]
    return [{"type": "text", "text": piece} for piece in pieces]


def test_hf_text_in_parts_is_guarded_as_one(hf_out, hf_tok):
    """Control tokens and guards in any division, of any role; by tokenizer.json alone as well."""
    from tokenizers import Tokenizer
    enc, rng, guard = load_tokenizer(hf_out / "tokenizer"), random.Random(0), export_hf.GUARD
    alone = Tokenizer.from_file(str(hf_out / "hf_sft" / "d3_9tpp" / "tokenizer.json"))
    pieces = [*HF_SPECIAL, "<", "|", ">", "bos", guard, guard[0], guard[1], "<" + guard, "a"]
    for _ in range(150):
        text = [hf_parts("".join(rng.choices(pieces, k=6)), rng) for _ in range(4)]
        call = {"type": "python", "text": "".join(part["text"] for part in text[3])}
        chat = [{"role": "system", "content": text[0]}, {"role": "user", "content": text[1]},
                {"role": "assistant", "content": [*text[2], call, *text[3]]}]
        ids, mask = hf_render(enc, chat)
        got = hf_tok.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        assert got["input_ids"] == ids and got["assistant_masks"] == mask, chat
        rendered = hf_tok.apply_chat_template(chat, tokenize=False)
        assert alone.encode(rendered, add_special_tokens=False).ids == ids


def test_hf_text_with_noncharacters_is_not_changed(hf_tok):
    for text in ("<\ufdd0|", "<\ufdef|", "\ufdd0\ufdef", export_hf.GUARD + "|", "<\ufdd0\ufdd0|"):
        assert hf_tok.decode(hf_tok.encode(text, add_special_tokens=False)) == text


def test_hf_chat_refuses_broken_conversations(hf_tok):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
    image = {"type": "image", "text": "x"}
    for chat, words in (
            ([answer], "roles must be"), ([user, user], "roles must be"),
            ([user, answer, answer], "roles must be"),
            ([user, {**answer, "role": "tool"}], "roles must be"),
            ([user, {**user, "role": "system"}], "roles must be"),
            ([{"role": "system", "content": "x"}], "needs a user message"),
            ([user, {**answer, "content": [image]}], "role assistant are of type text or python"),
            ([{**user, "content": [image]}], "of role user are of type text"),
            ([{**user, "content": [{"type": "image_url", "image_url": "x"}]}], "are of type text"),
            ([{**user, "content": [{"type": "python", "text": "x"}]}], "are of type text"),
            ([user, {**answer, "content": [{"type": "end", "text": "x"}]}], "are of type"),
            ([{**user, "content": [{"type": "text"}]}], "have a text"),
            ([{**user, "content": None}], "of role user has no content"),
            ([{"role": "user"}], "of role user has no content"),
            ([user, {"role": "assistant", "tool_calls": []}], "of role assistant has no content")):
        with pytest.raises(Exception, match=words):
            hf_tok.apply_chat_template(chat, tokenize=False)
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    with pytest.raises(Exception, match="no tools but python"):
        hf_tok.apply_chat_template([user], tools=[tool])


def test_hf_a_last_message_is_continued(hf_out, hf_tok):
    enc = load_tokenizer(hf_out / "tokenizer")
    texts = ["Well", "a <| b", "a <|bos|> b ", "<|assistant_end|>"]
    if type(hf_tok).__name__ != "NanoChatTokenizer":
        texts = texts[:1]                                   # transformers' own class refuses others
        with pytest.raises(ValueError, match="continue_final_message"):
            chat = [HF_CHAT[1], {"role": "assistant", "content": "a <| b"}]
            hf_tok.apply_chat_template(chat, continue_final_message=True)
    parts = [{"type": "python", "text": "1 <| 2"}, {"type": "text", "text": texts[-1]}]
    for content in [*texts, parts]:
        chat = [HF_CHAT[1], {"role": "assistant", "content": content}]
        want = hf_render(enc, chat)[0][:-1]
        got = hf_tok.apply_chat_template(chat, continue_final_message=True, return_dict=False)
        assert got == want
        two = hf_tok.apply_chat_template([chat, chat], continue_final_message=True,
                                         return_dict=False)
        assert two == [want, want]


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

def hf_visible(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_hf_export_files_and_config(hf_out):
    common = {"config.json", "export.json", "generation_config.json", "model.safetensors", "modeling_nanochat.py",
              "tokenizer.json", "tokenizer_config.json"}
    for stage, more, stop in (("base", set(), 503), ("sft", {"chat_template.jinja"}, 507)):
        folder = hf_out / f"hf_{stage}" / "d3_9tpp"
        assert {p.name for p in folder.iterdir()} == common | more
        assert (folder / "modeling_nanochat.py").read_text() == Path(hf.__file__).read_text()
        said = json.loads((folder / "export.json").read_text())
        assert said["files"] == {name: M.file_hash(folder / name) for name in common | more
                                 if name != "export.json"}
        mask = os.umask(0)
        os.umask(mask)
        assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {0o666 & ~mask}
        assert json.loads((folder / "config.json").read_text()) == {
            "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat",
            "auto_map": {"AutoConfig": "modeling_nanochat.NanoChatConfig", "AutoModel": "modeling_nanochat.NanoChatModel",
                         "AutoModelForCausalLM": "modeling_nanochat.NanoChatForCausalLM"},
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "swiglu",
            "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "use_rope": True,
            "logn_scale": 0.0, "original_max_position_embeddings": 64,
            "final_logit_softcapping": 15.0, "max_position_embeddings": 32768, "tie_word_embeddings": False,
            "use_cache": True, "bos_token_id": 503, "eos_token_id": stop, "pad_token_id": stop, "dtype": "bfloat16",
            "torch_dtype": "bfloat16"}
    assert hf_visible(hf_out / "hf_base") == {"d3_9tpp", "d3_9tpp_drope_50"}    # _long shares it
    assert hf_visible(hf_out / "hf_sft") == set(HF_TAGS)
    for tag, use_rope in HF_TAGS.items():
        for folder in (hf_out / "hf_sft" / tag, hf_out / "hf_base" / tag.removesuffix("_long")):
            assert AutoConfig.from_pretrained(folder, trust_remote_code=True).use_rope is use_rope


def test_hf_export_is_skipped_or_repeated_byte_for_byte(hf_out, capsys):
    folder = hf_out / "hf_sft" / "d3_9tpp"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    inode = folder.stat().st_ino
    export_hf.main(["--tag", "d3_9tpp", "--stage", "sft"])
    assert "skipped" in capsys.readouterr().out and folder.stat().st_ino == inode

    def truncate(path):
        path.write_bytes(path.read_bytes()[:-100])

    for name, harm in (("model.safetensors", truncate), ("model.safetensors", Path.unlink),
                       ("tokenizer.json", lambda path: path.write_text("{}")),
                       ("export.json", Path.unlink), ("export.json", truncate),
                       ("export.json", lambda path: path.write_text("{}"))):
        harm(folder / name)
        export_hf.main(["--tag", "d3_9tpp", "--stage", "sft"])
        assert "exported again" in capsys.readouterr().err
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        assert hf_visible(folder.parent) == set(HF_TAGS)


def hf_process(*args, **env):
    return subprocess.Popen([sys.executable, str(HERE / "export_hf.py"), *args], text=True,
                            env={**os.environ, **env}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def test_hf_of_two_exports_at_once_one_waits(hf_copy):
    shutil.rmtree(hf_copy / "hf_sft")
    both = [hf_process("--tag", "d3_9tpp", NANOCHAT_BASE_DIR=str(hf_copy)) for _ in range(2)]
    out = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], out
    made = [line for text, _ in out for line in text.splitlines() if " -> " in line]
    assert len(made) == 1 and sum("skipped" in text for text, _ in out) == 2
    assert AutoTokenizer.from_pretrained(hf_copy / "hf_sft" / "d3_9tpp").eos_token_id == 507


def test_hf_an_unfinished_model_does_not_replace_a_finished_export(hf_copy, capsys):
    base, folder = hf_copy / "base_checkpoints" / "d3_9tpp", hf_copy / "hf_base" / "d3_9tpp"
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    last = checkpoint_files(base, 7)["model"].read_bytes()
    hf_make_checkpoint(base, True, seed=5, step=4)
    checkpoint_files(base, 7)["model"].write_bytes(last[:-100])         # so step 4 is the newest
    hf_refuses(["--tag", "d3_9tpp"], "step 4 of 7", "finished")
    hf_refuses(["--tag", "d3_9tpp", "--push", "me", "--dry-run"], "step 4 of 7", "finished")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    capsys.readouterr()
    export_hf.main(["--push", "me", "--all", "--dry-run"])
    out = capsys.readouterr().out
    assert "d3_9tpp is left out" in out and "step 4 of 7" in out
    assert "me/nanochat-d3-9tpp-drope-50-hf-sft" in out and "me/nanochat-d3-9tpp-base" not in out
    (folder / "config.json").unlink()                       # nor a damaged one
    hf_refuses(["--tag", "d3_9tpp"], "step 4 of 7")
    shutil.rmtree(folder)                                   # without one it may be looked at
    export_hf.main(["--tag", "d3_9tpp", "--stage", "base"])
    assert json.loads((folder / "export.json").read_text())["finished"] is False
    hf_make_checkpoint(base, True, seed=0)
    export_hf.main(["--tag", "d3_9tpp", "--stage", "base"])
    assert json.loads((folder / "export.json").read_text())["finished"] is True


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
    hf_refuses(["--pull", "me/nanochat-d3-9tpp", "--push", "me"], "--pull")
    hf_refuses(["--pull", "me/nanochat-d3-9tpp", "--tag", "d3_9tpp"], "--pull")
    for word in ("--dry-run", "--all", "--private"):
        hf_refuses(["--tag", "d3_9tpp", word], word, "--push")
    hf_refuses(["--tag", "d3_9tpp", "--push", "me", "--all"], "--all", "--tag")
    hf_refuses(["--tag", "d3_9tpp", "--push", "me/you"], "me/you")
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

    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(export_hf, "atomic_write", full)
    with pytest.raises(SystemExit, match="No space left.*untouched"):
        M.guard(lambda: export_hf.main(["--tag", "d3_9tpp"]))
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert hf_visible(folder.parent) == {"d3_9tpp", "d3_9tpp_drope_50"}


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
    hub = types.SimpleNamespace(repos={}, blobs={}, requests=[], damage=None, private=set(),
                                status=None)

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
            if hub.status:
                return self.answer({"error": "no"}, hub.status)
            if where.startswith("/_lfs/"):
                hub.blobs[where[6:]] = body
                return self.answer(b"")
            if where == "/api/repos/create":
                ask = json.loads(body)
                name = f"{ask['organization']}/{ask['name']}"
                if name not in hub.repos and ask.get("visibility") == "private":
                    hub.private.add(name)
                hub.repos.setdefault(name, {})
                return self.answer({"url": f"{hub.url}/{name}", "name": name})
            if where == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            name = re.match(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/|$)", where)[1]
            if name not in hub.repos:
                return self.answer({"error": "no such repository"}, 404, X_Error_Code="RepoNotFound")
            files = hub.repos[name]
            if where == f"/api/models/{name}":
                return self.answer({"id": name, "private": name in hub.private, "siblings": []})
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


HF_NATIVE = {"README.md", "model_000007.pt", "meta_000007.json", "optim_000007_rank0.pt",
             "metrics.jsonl", "tokenizer/tokenizer.pkl", "tokenizer/token_bytes.pt"}


hf_publishing = pytest.mark.skipif(not HF5, reason="publishing is done from the pinned environment")


@hf_publishing
def test_hf_push_fills_four_repositories(hf_hub, hf_copy, capsys):
    import io, pickle
    push = ["--tag", "d3_9tpp_drope_50", "--push", "me"]
    export_hf.main(push + ["--dry-run"])
    out = capsys.readouterr().out
    assert not hf_hub.requests and out.count("me/nanochat-d3-9tpp-drope-50-") == 4
    weights = hf_copy / "hf_sft" / "d3_9tpp_drope_50" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-100])                        # it is mended before it is sent
    export_hf.main(push)
    name = "me/nanochat-d3-9tpp-drope-50"
    kinds = ("base", "sft", "hf-base", "hf-sft")
    assert set(hf_hub.repos) == {f"{name}-{kind}" for kind in kinds} and not hf_hub.private
    assert set(hf_hub.repos[f"{name}-base"]) == HF_NATIVE
    assert set(hf_hub.repos[f"{name}-sft"]) == HF_NATIVE | {"questions.jsonl"}
    assert set(hf_hub.repos[f"{name}-hf-sft"]) == {"README.md", *os.listdir(weights.parent)}
    assert hf_hub.repos[f"{name}-hf-sft"]["model.safetensors"] == good == weights.read_bytes()
    assert hf_hub.repos[f"{name}-hf-sft"]["README.md"].startswith(b"---\nlicense: mit\n")
    base = hf_hub.repos[f"{name}-base"]
    enc = pickle.loads(base["tokenizer/tokenizer.pkl"])     # our own bytes, a moment old
    assert isinstance(enc, tiktoken.Encoding) and enc.n_vocab == 512
    nbytes = torch.load(io.BytesIO(base["tokenizer/token_bytes.pt"]), weights_only=True)
    assert nbytes.dtype == torch.int32 and nbytes.tolist()[:256] == [1] * 256
    assert nbytes.tolist()[503:] == [0] * 9

    # again: nothing is sent; a file that the hub has otherwise: only that one
    hf_hub.requests.clear()
    export_hf.main(push)
    assert not any("/commit/" in r for r in hf_hub.requests)
    hf_hub.repos[f"{name}-hf-sft"]["config.json"] = b"{}"
    capsys.readouterr()
    export_hf.main(push)
    assert sum("/commit/" in r for r in hf_hub.requests) == 1
    assert f"{name}-hf-sft: 1 files sent, all 9 checked" in capsys.readouterr().out


@hf_publishing
def test_hf_push_mends_damage_and_never_prints_the_token(hf_hub, hf_copy, monkeypatch, capsys):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hf_hub.damage = "model.safetensors"
    export_hf.main(["--tag", "d3_9tpp", "--push", "me"])
    out = capsys.readouterr()
    assert "what arrived of model.safetensors is not what was sent" in out.err
    assert "hf_secret" not in out.out + out.err
    assert hf_hub.repos["me/nanochat-d3-9tpp-hf-base"]["model.safetensors"] == (
        hf_copy / "hf_base" / "d3_9tpp" / "model.safetensors").read_bytes()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    hf_refuses(["--tag", "d3_9tpp", "--push", "me"], "HF_TOKEN")


@hf_publishing
@pytest.mark.parametrize("status", [401, 403])
def test_hf_what_the_hub_forbids_ends_at_once(hf_hub, hf_copy, status):
    hf_hub.status, start = status, time.time()
    hf_refuses(["--tag", "d3_9tpp", "--push", "me"], "HF_TOKEN")
    hf_refuses(["--pull", "me/nanochat-d3-9tpp"], "HF_TOKEN")
    assert time.time() - start < 20 and len(hf_hub.requests) < 8


@hf_publishing
def test_hf_private_repositories(hf_hub, hf_copy):
    push = ["--tag", "d3_9tpp", "--push", "me", "--private"]
    export_hf.main(push)
    assert hf_hub.private == set(hf_hub.repos) and len(hf_hub.repos) == 4
    export_hf.main(push)
    hf_hub.private.clear()
    hf_refuses(push, "me/nanochat-d3-9tpp-base", "public")


def hf_as_the_nanochat_repo_has_it(hub, tag):
    """Renames a tag's repositories, and takes from the native ones what only we write: the files
    hold a bfloat16 embedding and no word about RoPE, steps or hashes."""
    import io
    for kind, suffix in export_hf.KINDS.items():
        files = hub.repos.pop(export_hf.repo_name("me", tag, kind))
        hub.repos[f"me/{tag.replace('_', '-')}-{suffix}"] = files
        if "model_000007.pt" in files:
            state = torch.load(io.BytesIO(files["model_000007.pt"]), weights_only=True)
            state["transformer.wte.weight"] = state["transformer.wte.weight"].bfloat16()
            buffer = io.BytesIO()
            torch.save(state, buffer)
            files["model_000007.pt"] = buffer.getvalue()
            meta = json.loads(files["meta_000007.json"])
            for field in ("loop_state", "sha256", "steps", "finished", "switch", "revision"):
                del meta[field]
            files["meta_000007.json"] = json.dumps(meta).encode()
            del files["metrics.jsonl"]
            files.pop("questions.jsonl", None)


@hf_publishing
@pytest.mark.parametrize("public", [False, True])
def test_hf_pull_brings_a_tag_back(hf_hub, hf_copy, tmp_path, monkeypatch, capsys, public):
    """A tag with a fractional horizon, under both names."""
    tag, name, back = "d3_2.5tpp_drope_50", "me/nanochat-d3-2.5tpp-drope-50", tmp_path / "back"
    for stage in ("base_checkpoints", "chatsft_checkpoints"):
        shutil.copytree(hf_copy / stage / "d3_9tpp_drope_50", hf_copy / stage / tag)
    export_hf.main(["--tag", tag, "--push", "me"])
    if public:
        hf_as_the_nanochat_repo_has_it(hf_hub, tag)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(back))
    hf_hub.requests.clear()
    capsys.readouterr()
    export_hf.main(["--pull", name])
    out = capsys.readouterr().out
    assert not any("tokenizer.pkl" in r for r in hf_hub.requests)
    assert ("use_rope None; set to False" in out) is public
    export_hf.main(["--tag", tag])
    for stage, folder in (("base", "base_checkpoints"), ("sft", "chatsft_checkpoints")):
        ours, theirs = (base / f"hf_{stage}" / tag for base in (hf_copy, back))
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (ours / file).read_bytes() == (theirs / file).read_bytes()
        model, meta = load_model(back / folder / tag)
        assert model.use_rope is False and len(meta["sha256"]) == 2
        assert (back / folder / tag / "metrics.jsonl").exists() is not public
    assert (back / "chatsft_checkpoints" / tag / "questions.jsonl").exists() is not public
    for again in (name, f"{name}-hf-sft", "me/d3-2.5tpp-drope-50-chatsft_checkpoints"):
        export_hf.main(["--pull", again])
        assert capsys.readouterr().out.count("there already") == 2
    damaged = back / "base_checkpoints" / tag / "model_000007.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    export_hf.main(["--pull", name])                        # fetched anew
    assert damaged.parent.name in capsys.readouterr().out
    load_model(damaged.parent, 7)
    with M.lock_file(damaged.parent / ".lock", wait=False):
        hf_refuses(["--pull", name], "in use")
    hf_make_checkpoint(damaged.parent, False, seed=1, step=9)
    hf_refuses(["--pull", name], "another run")
    (back / "tokenizer" / "tokenizer.tiktoken").write_text("eA== 0\n")
    hf_refuses(["--pull", name], "another tokenizer")
    hf_refuses(["--pull", "me/nanochat-d7-9tpp"], "me/nanochat-d7-9tpp-hf-sft",
               "me/d7-9tpp-hf-sft", "HF_TOKEN")
    hf_refuses(["--pull", "nanochat"], "USER/nanochat-d18")


@hf_publishing
def test_hf_two_pulls_at_once_leave_the_same_files(hf_hub, hf_copy, tmp_path):
    export_hf.main(["--tag", "d3_9tpp", "--push", "me"])
    env = {"HF_ENDPOINT": hf_hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"),
           "NANOCHAT_BASE_DIR": str(tmp_path / "back")}
    both = [hf_process("--pull", "me/nanochat-d3-9tpp", **env) for _ in range(2)]
    out = [process.communicate() for process in both]
    assert 0 in [process.returncode for process in both], out
    for process, (_, err) in zip(both, out):
        assert process.returncode == 0 or "in use by another pull" in err.splitlines()[-1], out
    for stage in ("base_checkpoints", "chatsft_checkpoints"):
        for file in ("model_000007.pt", "optim_000007_rank0.pt", "metrics.jsonl"):
            places = hf_copy, tmp_path / "back"
            ours, theirs = (base / stage / "d3_9tpp" / file for base in places)
            assert ours.read_bytes() == theirs.read_bytes()


@hf_publishing
def test_hf_the_base_of_a_long_tag_is_found(hf_hub, hf_copy, tmp_path, monkeypatch):
    export_hf.main(["--tag", "d3_9tpp_drope_50_long", "--push", "me"])
    long = "me/nanochat-d3-9tpp-drope-50-long-base"
    hf_hub.repos["me/nanochat-d3-9tpp-drope-50-base"] = hf_hub.repos.pop(long)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "back"))
    export_hf.main(["--pull", "me/nanochat-d3-9tpp-drope-50-long"])
    export_hf.main(["--tag", "d3_9tpp_drope_50_long"])
    assert hf_visible(tmp_path / "back" / "base_checkpoints") == {"d3_9tpp_drope_50"}
    assert hf_visible(tmp_path / "back" / "hf_sft") == {"d3_9tpp_drope_50_long"}


def hf_card(kind, tag):
    found = {stage: export_hf.newest(stage, tag) for stage in ("base", "sft")}
    return export_hf.card(kind, tag, "me", found)


def test_hf_card_tells_the_figures_and_the_licences(hf_copy):
    card = hf_card("hf-sft", "d3_9tpp_drope_50_long")
    front = card.split("---\n")[1]
    for line in ("license: mit", "- en", "library_name: transformers", "- openai/gsm8k",
                 "pipeline_tag: text-generation", "- allenai/tulu-v2-sft-long-mixture",
                 "base_model: me/nanochat-d3-9tpp-drope-50-long-hf-base"):
        assert line in front.splitlines()
    for words in ("dropped before step 4 of 7", "7,168", "1.2345", "abc123", "non-commercial",
                  "trust_remote_code", "1.1000", "1.9000"):
        assert words in card
    assert 'repo = "me/nanochat-d3-9tpp-drope-50-long-hf-sft"' in card
    assert '{"role": "user", "content": "Why is the sky blue?"}' in card and "{{" not in card
    base = hf_card("base", "d3_9tpp")
    assert "--pull me/nanochat-d3-9tpp\n" in base and "tulu" not in base
    assert "base_model" not in base and "on in all layers" in base
    assert "\n\n\n" not in base + card and card.startswith("---\n")


def test_hf_card_names_the_fitted_logn_scale(hf_copy):
    """eval.py leaves it in eval.json; config.json stays what was trained."""
    assert "fitted" not in hf_card("hf-base", "d3_9tpp")
    atomic_write(hf_copy / "base_checkpoints" / "d3_9tpp" / "eval.json",
                 '{"sections": {"scale": {"c": 0.4}}}')
    assert "evaluation of this model fitted 0.4" in hf_card("hf-base", "d3_9tpp")
    assert "evaluation of the base model fitted 0.4" in hf_card("hf-sft", "d3_9tpp")
    config = json.loads((hf_copy / "hf_base" / "d3_9tpp" / "config.json").read_text())
    assert config["logn_scale"] == 0.0
    (hf_copy / "base_checkpoints" / "d3_9tpp" / "eval.json").write_text("{")
    with pytest.raises(SystemExit, match="eval.json is damaged"):
        hf_card("hf-base", "d3_9tpp")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))
