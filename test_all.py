"""The specification, executable. Each section says what a file must do, then what can go wrong.

    python test_all.py                      # all of it: CPU only, no network, minutes on 2 cores
    python test_all.py -k muon              # pytest's options
    python test_all.py -m slow              # runs killed at random, KILLS (100) times each
    python test_all.py -m bench -s          # benchmarks: each prints one line

The sections, in order (search for "# ===="):

    what the tests share; a stand-in for the hub
    model.py        the transformer, its loss and gradients, generation, several processes
    muon.py         Muon against a reference, AdamW, the groups, the schedules
    tok.py          against the textbook and rustbpe; bad files
    demo.py         the corpus, the task, the table
    pretrain.py     derived sizes, packing, a run, branches, recalibration, shards, what stops a run
    sft.py          rendering, sources, mixture, packing, a run
    both            whatever happens to a run, it ends the same
    eval.py         statistics, arms, needles, conclusions
    chat.py         the python tool, conversations, scores
    export_hf.py    exports, push, pull
    modeling_nanochat.py    equal to model.py; caches, padding, training; tokenizer and template
    all scripts     bad files, bad use of a command
    run_all.sh      plans, installation, stages, signals, Slurm
    README.md       its commands and code; the rules of this repository
    GPU; benchmarks
"""
import os
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1")  # for the tests that want a GPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: other tests need float32
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("NANOCHAT_BASE_DIR", None)
import ast, base64, contextlib, dataclasses, errno, hashlib, http.server, inspect, io, json
import math, pickle, pty, queue, random, re, runpy, select, shutil, signal, subprocess, sys
import threading, time, types
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from huggingface_hub import constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat as chat_py
import demo
import eval as ev
import export_hf
import model as M
import modeling_nanochat as hf
import muon
import pretrain
import sft
import tok

HERE = Path(__file__).resolve().parent
CPU = M.Env(0, 1, torch.device("cpu"), torch.float32, None)
SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
           "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


# ==== What the tests share ========================================================================

def small_model(seed=0, n_layer=2, vocab=70, use_rope=True, std=0.2, n_embd=64, T=32):
    """A random model whose every weight matters (fresh ones have zeros: blocks do nothing)."""
    torch.manual_seed(seed)
    model = M.GPT(M.GPTConfig(T, vocab, n_layer, 2, 2, n_embd), use_rope)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model


def watch_rope(monkeypatch, module):
    """A list to which the models that a script makes from now on add use_rope, at each call."""
    seen = []

    class Watched(M.GPT):
        def forward(self, *args, **more):
            seen.append(self.use_rope)
            return super().forward(*args, **more)
    monkeypatch.setattr(module, "GPT", Watched)
    return seen


def write_tokenizer(folder, merges=()):
    """The tokenizer of all tests, in the project's format: id = byte, then merges, then SPECIAL.
    Without merges <|bos|> is 256, <|user_start|> 257 ... and text can be read off the ids."""
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [bytes([i]) for i in range(256)] + list(merges)
    lines = [f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)]
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    config = {"pat_str": tok.PATTERN,
              "special_tokens": {name: len(tokens) + i for i, name in enumerate(SPECIAL)}}
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
    """A base folder with a tokenizer and shards."""
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


def start(name, *args, base, env=None, processes=0):
    """Starts a script as a user would; with `processes`, by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    command = [sys.executable, *(launcher if processes else []), HERE / name, *args]
    env = {**os.environ, "NANOCHAT_BASE_DIR": base, "PYTHONUNBUFFERED": 1, "PYTHONPATH": HERE,
           **(env or {})}
    return subprocess.Popen([str(word) for word in command], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, cwd=HERE,
                            env={key: str(value) for key, value in env.items()})


def script(*args, status=0, **more):
    """Runs a script to its end, and returns its output, stderr last."""
    with start(*args, **more) as process:
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == status, err[-3000:]
    return out + err


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(module, args, base): a script's main() in this process, which is fast. Returns its
    exit status and what it printed, stderr last."""
    def run(module, args, base):
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        stops = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP,
                 signal.SIGXCPU)
        handlers = {number: signal.getsignal(number) for number in stops}
        try:
            M.guard(module.main)
        except SystemExit as e:
            code = e.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for lock in Path(base).glob("*_checkpoints/*/.lock"):
                lock.unlink()  # the loader's thread still has it
        said = "".join(capsys.readouterr())
        if not isinstance(code, str):
            return code, said
        assert "\n" not in code  # what Python prints, ending with 1
        return 1, f"{said}{code}\n"
    return run


@pytest.fixture
def refused(run_here):
    """refused(module, args, words, base): it ends with status 1 and a line with these words."""
    def check(module, args, words, base):
        status, said = run_here(module, args, base)
        last = said.splitlines()[-1]
        assert status == 1 and all(word in last for word in words), said
    return check


# ==== A small stand-in for the hub ================================================================

class Hub(http.server.ThreadingHTTPServer):
    """files: name -> bytes, of a data set. repos: name -> path -> bytes, of models, which can be
    written to; private: the names of the private ones. faults: for a file's name a list of what
    happens to the next downloads of it: a status, "cut" (half the body), "short" (10 bytes less,
    and Content-Length says so), "corrupt" (a flipped bit), "trickle" (a byte every half a second).
    silent: it never answers. refuse: the status of all answers.
    damage: the path of a file that arrives damaged, once. log: the paths asked for; bodies: the
    names of the files that were downloaded."""
    revision, daemon_threads, silent = "c0ffee" * 6 + "c0ff", True, False
    sleep = staticmethod(time.sleep)  # also where the tests' takes no time

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files, self.repos, self.private, self.uploads = dict(files), {}, set(), {}
        self.faults, self.refuse, self.damage, self.log, self.bodies = {}, None, None, [], []

    def listing(self, files):
        """Files as the hub lists them: each with git's hash (oid), large ones with their sha256."""
        entries = []
        for path, body in files.items():
            sha256, git = hashlib.sha256(body).hexdigest(), b"blob %d\0" % len(body) + body
            entries.append({"type": "file", "path": path, "rfilename": path, "size": len(body),
                            "oid": hashlib.sha1(git).hexdigest()})
            entries[-1]["blobId"] = entries[-1]["oid"]
            if path.endswith((".pt", ".safetensors", ".parquet", ".jsonl")):
                entries[-1]["lfs"] = {"sha256": sha256, "oid": sha256, "size": len(body),
                                      "pointerSize": 1}
        return entries


class HubAnswer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def do_GET(self):
        hub, path = self.server, unquote(self.path.split("?")[0])
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.log.append(self.path)
        if hub.silent:
            hub.sleep(60)
        if hub.refuse:
            return self.answer(hub.refuse)
        name = re.match(r"(?:/api/models)?/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/|$)", path)
        repo = hub.repos.get(name and name[1])
        if self.command in ("POST", "PUT"):
            return self.answer(200, self.write(path, sent, repo))
        if path.startswith("/api/datasets/"):
            return self.answer(200, {"id": "x/y", "sha": hub.revision,
                                     "siblings": hub.listing(hub.files)})
        if path.startswith("/api/models/") and repo is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if "/tree/" in path:
            return self.answer(200, hub.listing(repo))
        if path.startswith("/api/models/"):
            return self.answer(200, {"id": name[1], "private": name[1] in hub.private,
                                     "siblings": hub.listing(repo)})
        name = path.split("/resolve/main/")[1] if repo is not None else path.split("/")[-1]
        body = (hub.files if repo is None else repo).get(name)
        return self.answer(404) if body is None else self.send_file(name, body)

    do_HEAD = do_POST = do_PUT = do_GET

    def write(self, path, sent, repo):
        """What a POST or PUT changes, and the answer to it."""
        hub = self.server
        if path.startswith("/_lfs/"):
            hub.uploads[path[6:]] = sent
            return b""
        if path == "/api/repos/create":
            ask = json.loads(sent)
            name = f"{ask['organization']}/{ask['name']}"
            if name not in hub.repos and ask.get("visibility") == "private":
                hub.private.add(name)
            hub.repos.setdefault(name, {})
            return {"url": f"{hub.url}/{name}", "name": name}
        if "/preupload/" in path:
            files = json.loads(sent)["files"]
            for file in files:
                there = hub.listing({file["path"]: repo.get(file["path"], b"")})[0]
                file.update(uploadMode="lfs" if "lfs" in there else "regular", shouldIgnore=False,
                            oid=there.get("lfs", there)["oid"])
            return {"files": files}
        if path.endswith("/objects/batch"):
            objects = json.loads(sent)["objects"]
            for file in objects:
                file["actions"] = {"upload": {"href": f"{hub.url}/_lfs/{file['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        for line in map(json.loads, sent.splitlines() if "/commit/" in path else []):
            file = line["value"]
            if line["key"] == "file":
                repo[file["path"]] = base64.b64decode(file["content"])
            elif line["key"] == "lfsFile":
                repo[file["path"]] = hub.uploads[file["oid"]]
            elif line["key"] == "deletedFile":
                del repo[file["path"]]
        if repo and hub.damage in repo:
            repo[hub.damage], hub.damage = repo[hub.damage][:-1] + b"?", None
        return {"commitOid": "0" * 40, "commitUrl": f"{hub.url}/x/y/commit/0", "errors": [],
                "warnings": [], "success": True}

    def send_file(self, name, body):
        hub, etag = self.server, '"' + hashlib.sha256(body).hexdigest() + '"'
        headers = {"X_Repo_Commit": hub.revision, "X_Linked_Size": len(body), "ETag": etag}
        whole = {**headers, "Content_Length": len(body)}
        if self.command == "HEAD":
            return self.answer(200, **whole)
        hub.bodies.append(name)
        fault = hub.faults[name].pop(0) if hub.faults.get(name) else None
        if isinstance(fault, int):
            self.answer(fault, Retry_After=1)
        elif fault == "short":
            self.answer(200, body[:-10], **headers)
        elif fault == "trickle":
            self.answer(200, body[:1], **whole)
            for i in range(1, 60):
                hub.sleep(0.5)
                self.wfile.write(body[i:i + 1])
                self.wfile.flush()
        elif fault == "corrupt":
            self.answer(200, body[:50] + bytes([body[50] ^ 1]) + body[51:], **headers)
        elif fault == "cut":
            self.answer(200, body[:len(body) // 2], **whole)
            self.close_connection = True
        else:
            self.answer(200, body, **headers)


@pytest.fixture
def hub(tiny_base, tmp_path):
    """A Hub with tiny_base's shards; hub.env leads a script there."""
    shards = (tiny_base / "data" / "climbmix").glob("*.parquet")
    with Hub({path.name: path.read_bytes() for path in shards}) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.env = {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": 1, "HF_HOME": tmp_path}
        yield server
        server.shutdown()


@pytest.fixture
def online(hub, monkeypatch):
    """The hub for scripts in this process, whose sleeping takes no time."""
    url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(M.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return hub


# ==== model.py: the transformer, its loss and its gradients =======================================

@pytest.mark.parametrize("depth, channels, heads, inner, total, scaling, flops", [
    (1, 128, 1, 384, 8_601_600, 4_407_296, 29_589_504),
    (12, 768, 6, 2048, 135_266_304, 110_100_480, 887_095_296),
    (18, 1152, 9, 3072, 362_151_936, 324_403_200, 2_456_027_136),
    (20, 1280, 10, 3456, 480_378_880, 438_435_840, 3_259_760_640)])
def test_all_sizes_follow_from_the_depth(depth, channels, heads, inner, total, scaling, flops):
    """Parameters: all, and those of the scaling rules (without the embedding). Flops of a token."""
    config = M.GPTConfig.from_depth(depth)
    assert (config.n_embd, config.n_head, config.intermediate_size) == (channels, heads, inner)
    with torch.device("meta"):
        model = M.GPT(config)
    assert sum(p.numel() for p in model.parameters()) == total
    assert model.num_scaling_params() == scaling and model.flops_per_token(4096) == flops


def test_the_weights_and_how_they_begin():
    """1,000 ids are stored as 1,024, a multiple of 64. Uniform in the blocks, normal outside."""
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig.from_depth(4, vocab_size=1000))
    model.init_weights()
    expected = {"transformer.wte": ((1024, 256), 0.8), "lm_head": ((1024, 256), 0.001)}
    for n in range(4):
        for name in ("c_q", "c_k", "c_v"):
            expected[f"transformer.h.{n}.attn.{name}"] = ((256, 256), 1 / 16)
        for name in ("w_gate", "w_up"):
            expected[f"transformer.h.{n}.mlp.{name}"] = ((640, 256), 0.4 / 16)
        expected[f"transformer.h.{n}.attn.c_proj"] = ((256, 256), 0)
        expected[f"transformer.h.{n}.mlp.c_proj"] = ((256, 640), 0)
    assert model.state_dict().keys() == {f"{name}.weight" for name in expected}
    for name, (shape, std) in expected.items():
        weight = model.get_parameter(f"{name}.weight")
        assert weight.shape == shape and weight.std().item() == pytest.approx(std, rel=0.02), name
        if ".h." in name:
            assert weight.abs().max() <= 3 ** 0.5 * std * 1.0001, name


def reference_logits(model, ids):
    """The model again, for one row, in float64 and a head at a time. A pair that is rotated is a
    complex number times e^(-i angle)."""
    w = {name.removesuffix(".weight"): p.double() for name, p in model.state_dict().items()}
    c, T, D = model.config, len(ids), model.config.n_embd // model.config.n_head
    t = torch.arange(T, dtype=torch.float64)[:, None]  # (T, 1)
    angles = model.use_rope * t * 100_000.0 ** (-torch.arange(0, D, 2).double() / D)
    beta = (1 + model.logn_scale * torch.log((t + 1) / c.sequence_len)).clamp(min=1)
    future = torch.ones(T, T).triu(1).bool()

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def rotated(x):
        z = torch.complex(x[:, :D // 2], x[:, D // 2:]) * torch.exp(-1j * angles)
        return torch.cat((z.real, z.imag), -1)

    x = w["transformer.wte"][ids]
    for n in range(c.n_layer):
        layer, h, heads = f"transformer.h.{n}.", rms(x), []
        for first in range(0, c.n_embd, D):
            q, k, v = (h @ w[f"{layer}attn.c_{s}"][first:first + D].T for s in "qkv")
            scores = beta * rms(rotated(q)) @ rms(rotated(k)).T / D ** 0.5
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w[layer + "attn.c_proj"].T
        h = rms(x)
        gate, up = h @ w[layer + "mlp.w_gate"].T, h @ w[layer + "mlp.w_up"].T
        x = x + (gate * gate.sigmoid() * up) @ w[layer + "mlp.c_proj"].T
    return 15 * torch.tanh(rms(x) @ w["lm_head"][:c.vocab_size].T / 15)


@pytest.mark.parametrize("logn_scale", [0.0, 0.4])
@pytest.mark.parametrize("use_rope", [True, False])
def test_the_model_equals_the_reference(use_rope, logn_scale):
    """12 tokens, of which logn_scale sharpens the last 4: the model says that it was trained at
    8. Up to there no bit may change."""
    model, ids = small_model(use_rope=use_rope, std=0.3, T=8), torch.randint(0, 70, (1, 12))
    trained = model(ids[:, :8])
    model.logn_scale = logn_scale
    assert torch.equal(model(ids[:, :8]), trained)
    expected, got = reference_logits(model, ids[0]), model(ids)[0]
    assert got.dtype == torch.float32 and got.shape == (12, 70)
    assert (got - expected).abs().max() < 2e-4 * expected.abs().max()
    assert expected.abs().max() > 5  # or the softcap would not show


@pytest.mark.parametrize("logn_scale", [0.0, 0.4])
@pytest.mark.parametrize("use_rope", [True, False])
def test_logits_with_a_cache_equal_those_without(use_rope, logn_scale):
    """Three rows of different lengths, read one by one, in one piece or two, then continued
    together; up to 90 tokens, of a model that was trained at 32."""
    model, rows = small_model(use_rope=use_rope), torch.randint(0, 70, (3, 90))
    model.logn_scale = logn_scale
    expected, cache, lengths = model(rows), M.KVCache(model, 3, 90), (5, 60, 31)
    for b, n in enumerate(lengths):
        for first, end in ((0, n - 3), (n - 3, n)):
            logits = model(rows[b:b + 1, first:end], cache=cache.row(b))
            assert torch.allclose(logits[0], expected[b, first:end], atol=1e-5)
    assert cache.lengths.tolist() == list(lengths)
    for step in range(30):
        ids = torch.stack([rows[b, n + step:n + step + 1] for b, n in enumerate(lengths)])
        wanted = torch.stack([expected[b, n + step] for b, n in enumerate(lengths)])
        assert torch.allclose(model(ids, cache=cache)[:, 0], wanted, atol=1e-5)
    assert torch.equal(model(rows, last=7), expected[:, -7:])
    with pytest.raises(ValueError, match="91 tokens do not fit into a cache of 90"):
        model(rows[:1, :1], cache=cache.row(1))


def test_texts_are_continued_as_by_a_loop_without_a_cache():
    """Each on its own; an id that the caller replaces counts; a cache goes on where it stopped."""
    model, texts = small_model(), [[1, 2, 3], [4] * 40, [5]]

    def slow(text, n, forced=None):
        ids = list(text)
        for step in range(n):
            token = model(torch.tensor([ids]))[0, -1].argmax().item()
            ids.append(forced if step == 2 and forced is not None else token)
        return ids[len(text):]

    assert list(zip(*M.generate(model, texts, 12))) == [tuple(slow(text, 12)) for text in texts]
    forced = []
    for step, ids in enumerate(M.generate(model, texts, 12)):
        if step == 2:
            ids[1] = 69
        forced.append(ids[1])
    assert forced == slow(texts[1], 12, 69)
    text, cache = [1, 2, 3], M.KVCache(model, 1, 60)
    for n in (5, 1, 8):
        new = [ids[0] for ids in M.generate(model, [text], n, cache=cache)]
        assert new == slow(text, n) and cache.lengths.tolist() == [len(text) + n - 1]
        text = text + new + [7]  # what a user says next
    drawn = list(M.generate(model, texts, 4, choose=lambda logits: torch.tensor([1, 2, 3])))
    assert drawn == [[1, 2, 3]] * 4


def test_the_loss_in_chunks_equals_the_plain_one():
    """The sum over all targets but -1, and its gradients; or the loss of each target."""
    model = small_model()
    ids, targets = torch.randint(0, 70, (3, 32)), torch.randint(0, 70, (3, 32))
    targets[0, :5] = -1
    each = F.cross_entropy(model(ids).view(-1, 70), targets.view(-1), ignore_index=-1,
                           reduction="none")
    expected = torch.autograd.grad(each.sum(), model.parameters())
    loss = model(ids, targets, chunk=7)
    torch.testing.assert_close(loss, each.sum())
    torch.testing.assert_close(model(ids, targets, "none", chunk=7).view(-1), each)
    (loss / 2).backward()
    for p, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(2 * p.grad, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())


def test_micro_batches_do_not_change_the_gradient():
    """Rows with many, with one and with no counted target: the loss is a mean over targets, not
    over micro-batches. Without any counted target it is 0, and not nan."""
    model, exact = small_model(), small_model()
    ids, targets = torch.randint(0, 70, (4, 16)), torch.randint(0, 70, (4, 16))
    targets[0, 1:] = -1
    targets[3] = -1
    loss = exact(ids, targets) / (1 + 16 + 16)
    loss.backward()
    for micro in (4, 2, 1):
        model.zero_grad()
        env = replace(CPU, micro=micro)
        torch.testing.assert_close(M.accumulate_gradients(model, ids, targets, env), loss)
        for p, q in zip(model.parameters(), exact.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    model.zero_grad()
    assert M.accumulate_gradients(model, ids, torch.full((4, 16), -1), CPU) == 0
    assert not any(p.grad.any() for p in model.parameters())


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs that torch.compile makes (frame_count); it runs them as they are."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    yield counter
    torch._dynamo.reset()


def test_training_is_one_graph_and_validation_one_with_and_without_rope(graphs):
    """Model and loss compile without a break; later calls compile nothing anew. Activations in
    bfloat16 give float32 gradients, near those of float32."""
    model, exact = small_model(n_layer=1), small_model(n_layer=1)
    model.dtype, ids = torch.bfloat16, torch.randint(0, 70, (2, 16))
    compiled = M.compile_model(model, replace(CPU, compile=True))
    for use_rope, expected in ((True, 2), (True, 2), (False, 4), (False, 4)):
        model.use_rope = exact.use_rope = use_rope
        for each in (compiled, exact):
            each.zero_grad()
            M.accumulate_gradients(each, ids, ids, replace(CPU, micro=2))
        for p, q in zip(model.parameters(), exact.parameters()):
            assert p.grad.dtype == torch.float32 and not torch.equal(p.grad, q.grad)
            assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.99
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids, ids), model(ids, ids))
        assert graphs.frame_count == expected


@pytest.mark.parametrize("micro", [1, 2])
def test_bits_per_byte_by_hand(micro):
    """Uniform logits over 70 ids: log2(70) bits a token, over the bytes of those that count. A stop
    is asked for before each block of rows, of packing and of the forward pass."""
    model, stops = small_model(), []
    torch.nn.init.zeros_(model.lm_head.weight)
    nbytes = torch.tensor([1] * 35 + [3] * 34 + [0])
    targets = [[0, 40, 69, -1], [34, 35, 36, 69]]  # 1 + 3 bytes, 1 + 3 + 3 bytes; 5 tokens
    made = iter(np.array([np.zeros((2, 4)), targets], np.int32).reshape(2, 2 // micro, micro, 4)
                .swapaxes(0, 1))
    rows = M.ValidationRows(lambda n: next(made, None), 4, nbytes, replace(CPU, micro=micro))
    rows.pack(9, lambda: stops.append("pack"))
    bpb, tokens, stopped = rows.bits_per_byte(model, 9, lambda: stops.append("forward"))
    assert bpb == pytest.approx(5 * math.log2(70) / 11) and (tokens, stopped) == (8, False)
    assert stops == ["pack"] * (2 // micro + 1) + ["forward"] * (2 // micro)
    one, tokens, _ = rows.bits_per_byte(model, 1)
    assert one == pytest.approx(2 * math.log2(70) / 4) and tokens == 4
    assert rows.bits_per_byte(model, 9, lambda: True)[2]


def test_running_out_of_memory_halves_the_rows_in_validation_too(capsys):
    """And in the optimizer it is one line."""
    model, rows = small_model(), np.arange(2 * 8 * 16, dtype=np.int32).reshape(1, 2, 8, 16) % 70
    found = []
    for most in (8, 3):
        limit_memory(model, most)
        made, env = iter(rows), replace(CPU, micro=8)
        validation = M.ValidationRows(lambda n: next(made, None), 16, torch.ones(70).long(), env)
        validation.pack(8, lambda: None)
        found += [validation.bits_per_byte(model, 8)[0] for _ in range(2)]
    assert found == pytest.approx([found[0]] * 4) and env.micro == 2
    assert "again with 4" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="out of memory .*--device-batch-size"):
        M.guard(lambda: limited_optimizer())


def limited_optimizer():
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 8 GiB")


def test_the_example_at_the_top_of_model_py_runs():
    lines = [line[4:] for line in M.__doc__.splitlines() if line.startswith("    ")]
    ids, example = torch.arange(32).view(2, 16), "\n".join(lines).replace("(18)", "(1, 70)")
    names = {"idx": ids, "targets": ids}
    exec(example, names)
    assert names["loss"].item() == pytest.approx(32 * math.log(70), rel=0.01)
    assert names["model"].use_rope is False and "from_depth(1, 70)" in example


def test_float8_rounds_the_factors_of_the_blocks_and_nothing_else(monkeypatch):
    """e4m3, up to 448, for weights and activations; e5m2 for gradients. Not for the head, not for
    evaluation, not on a CPU."""
    e4, e5 = torch.float8_e4m3fn, torch.float8_e5m2
    values, scale = M.to_float8(torch.tensor([-3.0, 1.5, 0.4, 0.0]), e4)
    assert values.dtype == e4 and values.float().tolist() == [-448, 224, 60, 0]  # 59.7 -> 60

    def rounded(tensor, dtype):
        values, scale = M.to_float8(tensor.detach(), dtype)
        return values.float() * scale
    x, w, g = [torch.randn(shape, requires_grad=True) for shape in ((48, 32), (64, 32), (48, 64))]
    y = M.Float8Matmul.apply(x, w)
    expected = (rounded(x, e4) @ rounded(w, e4).T, rounded(g, e5) @ rounded(w, e4),
                rounded(g, e5).T @ rounded(x, e4))
    for got, wanted in zip((y, *torch.autograd.grad(y, (x, w), g)), expected):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)

    model, ids = small_model(), torch.randint(0, 70, (2, 16))
    exact = model(ids)
    with pytest.raises(SystemExit, match="--fp8 needs .*H100.* leave it out"):
        M.set_fp8(model, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    M.set_fp8(model, replace(CPU, device=torch.device("cuda")))
    linears = [layer for layer in model.modules() if isinstance(layer, M.Linear) and layer.fp8]
    assert len(linears) == 2 * 7 and model.lm_head not in linears  # 2 blocks
    assert not torch.equal(model(ids), exact)
    with torch.no_grad():
        assert torch.equal(model(ids), exact)


def limit_memory(model, most):
    """Makes the model run out of memory above `most` rows, but not in its first call, so that some
    gradients are there already."""
    forward, calls = model.forward, []

    def limited(idx, targets, **more):
        calls.append(len(idx))
        if len(calls) > 1 and len(idx) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 8 GiB")
        return forward(idx, targets, **more)
    model.forward = limited


STEP = f"""
import sys, torch, model as M, muon
{inspect.getsource(small_model)}
{inspect.getsource(limit_memory)}
env = M.setup_env()
env.micro = 4
model, ids = small_model(n_layer=3), torch.arange(16 * 16).view(16, 16) % 70
if env.rank == 1:
    limit_memory(model, most=2)
loss = M.accumulate_gradients(model, ids, ids, env)
grads = [p.grad.clone() for p in model.parameters()]
made = iter(ids.numpy().astype("int32").reshape(4, 1, 4, 16).repeat(2, 1))
env.micro = 4
rows = M.ValidationRows(lambda n: next(made, None), 16, torch.arange(70), env)
rows.pack(15, lambda: None)
val_bpb = rows.bits_per_byte(small_model(), 15)
env.micro = 4 // (env.rank + 1)
muon.build_optimizer(model).step()
result = [env.micro, val_bpb, loss, grads, list(model.transformer.h.parameters())]
torch.save(result, sys.argv[1] + "/" + str(env.rank))
"""


def test_two_processes_do_what_one_does(tmp_path, capsys):
    """Also where one of them runs out of memory, and goes on with half the rows at a time. Muon's
    matrices (12, 3 and 6 of a shape) are divided among them."""
    (tmp_path / "step.py").write_text(STEP)
    said = script(tmp_path / "step.py", tmp_path, base=tmp_path, processes=2)
    assert said.count("rank 1: out of memory with 4 rows") == 1 and "Warning" not in said
    model, ids = small_model(n_layer=3), torch.arange(16 * 16).view(16, 16) % 70
    expected = [M.accumulate_gradients(model, ids, ids, CPU), [p.grad for p in model.parameters()]]
    muon.build_optimizer(model).step()
    expected.append(list(model.transformer.h.parameters()))
    made = iter([ids.numpy().astype("int32")[None].repeat(2, 0)])
    rows = M.ValidationRows(lambda n: next(made, None), 16, torch.arange(70), replace(CPU, micro=4))
    rows.block = 99
    rows.pack(15, lambda: None)
    val_bpb, tokens, _ = rows.bits_per_byte(small_model(), 15)
    for rank in (0, 1):
        micro, (bpb, *rest), *got = torch.load(tmp_path / str(rank))
        assert bpb == pytest.approx(val_bpb, rel=1e-12) and rest == [15 * 16, False]
        assert micro == 4 // (rank + 1)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    limit_memory(model, most=0)
    with pytest.raises(SystemExit, match="1"):
        M.accumulate_gradients(model, ids, ids, replace(CPU, micro=2))
    assert "too little memory for one row" in capsys.readouterr().err


@pytest.mark.parametrize("visible, driver, says", [
    (None, "535.104.05", "is 535.104.05, .*CUDA 13.0.* needs 580 .*url.*CUDA_VISIBLE_DEVICES="),
    (None, "580.65.06", "not visible here .*--gpus all"), ("", "535.104.05", None),
    ("-1", "535.104.05", None), (None, "cpu build", "is a build for CPUs")])
def test_a_gpu_that_torch_cannot_use_is_refused(monkeypatch, tmp_path, visible, driver, says):
    """CUDA_VISIBLE_DEVICES empty or -1 asks for the CPU, and nothing is refused."""
    monkeypatch.setattr(torch.version, "cuda", None if driver == "cpu build" else "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (tmp_path / "version").write_text(f"NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Aug 19")
    with pytest.raises(SystemExit, match=says) if says else contextlib.nullcontext():
        M.check_driver(str(tmp_path / "version"))


def test_the_gpu_is_judged_before_anything_is_downloaded(monkeypatch, tmp_path, refused):
    """Its driver, and the compiler that torch.compile needs."""
    monkeypatch.setattr(M, "check_driver", lambda: sys.exit("an old driver"))
    refused(pretrain, ["--dataset", "x/y"], ["an old driver"], tmp_path)
    monkeypatch.setattr(M, "check_driver", lambda: None)
    for name in ("is_available", "is_bf16_supported", "set_device", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **more: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    assert M.setup_env(compile=0) == M.Env(0, 1, torch.device("cuda", 0), torch.bfloat16, 989e12)
    monkeypatch.setattr(M.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(shutil, "which", lambda name: None)
    words = ["a C compiler", "gcc", "Python.h", "--compile 0"]
    refused(pretrain, ["--dataset", "x/y"], words, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "a" / "x.txt"
    M.atomic_write(file, "old")

    def fails(f):
        f.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left on device.*x.txt"):
        M.atomic_write(file, fails)
    assert file.read_text() == "old" and len(list(file.parent.iterdir())) == 1


# ==== muon.py: Muon for matrices, AdamW for the rest, and the schedules ===========================

def muon_matrices(shape, n=3):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for _ in range(n)]


def test_the_state_of_the_optimizer():
    """Groups and state as karpathy's nanochat stores them: Muon's lies at a group's first
    parameter, for all matrices of a shape."""
    model, ids = small_model(n_embd=128), torch.zeros(2, 16).long()
    optimizer = muon.build_optimizer(model)
    M.accumulate_gradients(model, ids, ids, CPU)
    optimizer.step()
    state, groups = optimizer.state_dict()["state"], optimizer.param_groups
    assert [(group["kind"], len(group["params"])) for group in groups] == [
        ("adamw", 1), ("adamw", 1), ("muon", 8), ("muon", 2), ("muon", 4)]
    assert groups[0]["params"][0] is model.lm_head.weight
    fields = {"kind", "lr", "initial_lr", "weight_decay"}
    assert groups[0].keys() >= fields | {"betas", "eps"}
    assert groups[2].keys() >= fields | {"momentum", "ns_steps", "beta2"}
    assert state[0].keys() == state[1].keys() == {"step", "exp_avg", "exp_avg_sq"}
    for i, shapes in ((2, [(8, 128, 128), (8, 128, 1)]),  # 2, 2 + 8, 2 + 8 + 2: the first of each
                      (10, [(2, 128, 384), (2, 1, 384)]), (12, [(4, 384, 128), (4, 384, 1)])):
        assert list(state[i]) == ["momentum_buffer", "second_momentum_buffer"]
        assert [tensor.shape for tensor in state[i].values()] == shapes


@pytest.mark.parametrize("shape", [(3, 64, 32), (3, 32, 64), (3, 48, 48)])
def test_polar_express_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    """For each matrix of the batch, however large it is."""
    torch.manual_seed(0)
    G = torch.randn(shape) * torch.tensor([1e-4, 1.0, 1e3])[:, None, None]
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    X = muon.polar_express(G)
    S = torch.linalg.svdvals(X)
    assert S.min() > 0.5 and S.max() < 1.2
    assert F.cosine_similarity(X.flatten(1), (U @ V).flatten(1)).min() > 0.98


def slow_muon(p, grad, buf, second, lr, momentum, beta2, wd):
    """One matrix, one step, in float64 and plain words."""
    p, grad, buf, second = p.double(), grad.double(), buf.double(), second.double().clone()
    buf = momentum * buf + (1 - momentum) * grad
    g = momentum * buf + (1 - momentum) * grad
    X = g / (torch.linalg.matrix_norm(g) * 1.01 + 1e-6)
    for a, b, c in muon.POLAR_EXPRESS:
        G = X.T @ X
        X = a * X + b * X @ G + c * X @ G @ G
    rows, cols = p.shape
    norm = X.norm()
    for i in range(max(rows, cols)):
        line = X[i] if rows >= cols else X[:, i]  # a view of X
        second[i] = beta2 * second[i] + (1 - beta2) * line.square().mean()
        line /= second[i].sqrt()
    X = X * norm / X.norm()
    agree = (X * p) >= 0  # the decay is left out elsewhere
    return p - lr * max(1, rows / cols) ** 0.5 * (X + wd * p * agree), buf, second


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_muon_equals_the_slow_reference_over_three_steps(shape):
    params = muon_matrices(shape)
    optimizer = muon.MuonAdamW([dict(kind="muon", params=params, lr=0.02, momentum=0.9,
                                     beta2=0.8, weight_decay=0.3)])
    slow = [(p.detach().clone(), torch.zeros(shape), torch.zeros(max(shape))) for p in params]
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(shape)
            slow[i] = slow_muon(slow[i][0], p.grad, *slow[i][1:], 0.02, 0.9, 0.8, 0.3)
        optimizer.step()
        for p, (expected, _, _) in zip(params, slow):
            torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_adamw_equals_torch():
    ours, theirs = muon_matrices((5, 7), n=2)
    theirs.data.copy_(ours.data)
    fields = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    optimizers = [muon.MuonAdamW([dict(kind="adamw", params=[ours], **fields)]),
                  torch.optim.AdamW([theirs], **fields)]
    for _ in range(10):
        ours.grad = theirs.grad = torch.randn(5, 7)
        for optimizer in optimizers:
            optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_schedules_at_their_corners():
    S, start = 2784, 974  # 65% of the steps are left there
    assert [muon.lr_factor(i, S) for i in (0, 19, 39, 40, start)] == [1 / 40, 0.5, 1.0, 1.0, 1.0]
    quarters = [muon.lr_factor(q * S // 4, S) for q in (2, 3, 4)]
    assert quarters == pytest.approx([0.78, 0.415, 0.05], abs=1e-3)
    momenta = [muon.muon_momentum(i, S) for i in (0, 200, 400, start, S)]
    assert momenta == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.90])
    assert muon.muon_momentum(300, 500) == pytest.approx(0.94)  # the rise wins over the fall
    decays = [muon.muon_weight_decay(i, S, 0.3) for i in (0, S // 4, S // 2, S)]
    assert decays == pytest.approx([0.3, 0.15 + 0.15 * 0.5 ** 0.5, 0.15, 0])


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_parameter_without_gradient_is_left_alone_and_the_others_step(kind, graphs):
    """Its weights and its state: a used matrix does the same beside an unused one as alone. Muon's
    update is one graph, compiled once, though the learning rate moves."""
    params, alone = muon_matrices((24, 40)), muon_matrices((24, 40))
    fields = dict(kind=kind, lr=0.02, weight_decay=0.1)
    optimizers = [muon.MuonAdamW([dict(params=params, **fields)], compile=True),
                  muon.MuonAdamW([dict(params=[p], **fields) for p in alone])]
    for step, used in enumerate(([], [0, 1, 2], [0, 2], [2], [1], [0, 1, 2])):
        for i, (p, q) in enumerate(zip(params, alone)):
            p.grad = q.grad = torch.randn(24, 40) if i in used else None
        before = [p.detach().clone() for p in params]
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.02 - 0.001 * step
            optimizer.step()
        assert [i for i in range(3) if not torch.equal(before[i], params[i])] == used
        torch.testing.assert_close(params, alone, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count == (kind == "muon")


def test_sharded_parameters_are_refused():
    matrix = torch.nn.Parameter(torch.ones(2, 2))
    matrix.full_tensor = None  # as DTensor, the parameters of FSDP
    with pytest.raises(ValueError, match="FSDP.*use DDP"):
        muon.MuonAdamW([dict(kind="muon", params=[matrix], lr=0.1)])


@pytest.mark.parametrize("group, words", [
    (dict(kind="sgd", lr=0.1), ["'sgd'"]), (dict(kind="muon", lr=0.1), ["(3,)", "(3, 4)"])])
def test_a_group_that_cannot_be_is_one_line_that_shows_how_a_group_looks(group, words):
    with pytest.raises(ValueError) as error:
        muon.MuonAdamW([dict(group, params=torch.nn.Linear(4, 3).parameters())])
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in [*words, "dict(kind='muon', params="])


# ==== tok.py: byte-level BPE, trained =============================================================

@pytest.mark.parametrize("counts, merges", [
    # w e 2 + 6 = 8 times: we. l o 5 + 2 = 7: lo (o w lost 2 to we). e we, n e, we s, s t have 6
    # each, and e is the smallest left id: ewe. So on to newest; lo w has 5. Of lo we and we r, with
    # 2 each, we is the smaller left id: wer. Then lower, and no pair is left
    ({"low": 5, "lower": 2, "newest": 6}, "we lo ewe newe st newest low wer lower"),
    ({"bbb": 3, "xy": 5}, "bb xy bbb"),  # overlapping pairs: b b is there 6 times
    ({"a" * 4: 1}, "aa aaaa"), ({"a" * 7: 1}, "aa aaaa aaa aaaaaaa"),  # aa aa aa a: from the left
    ({"a" * 5: 1}, "aa aaa aaaaa"),  # aa aa a: once each, a is the smaller id
    ({"ab": 80, "xyz": 1}, "ab xy xyz"), ({"a": 9, "b": 1}, ""), ({}, "")])
def test_merges_worked_by_hand(counts, merges):
    """All of them, until no pair is left."""
    for train in (tok.train_slowly, tok.train):
        tokens = train(counts, 100)
        assert tokens[:256] == [bytes([i]) for i in range(256)]
        assert b" ".join(tokens[256:]).decode() == merges


def test_fast_training_equals_the_textbook_and_rustbpe():
    """100 corpora of few letters (ties, runs, overlaps) or of any characters."""
    rustbpe = pytest.importorskip("rustbpe")
    alphabets = ["a", "ab", "aab ", "abc", "abcd 1'\n", "etaoinshrdlu  \n", "aé東🎉 ",
                 "'sS tT\r\n\t 12!?", "the cat.\u00a0\u2003_-"]
    for seed in range(100):
        r = random.Random(seed)
        letters, n_merges = r.choice(alphabets), r.choice([1, 5, 30, 200])
        texts = ["".join(r.choices(letters, k=r.randint(0, 60))) for _ in range(r.randint(1, 60))]
        counts = Counter(chunk for text in texts for chunk in tok.split(text))
        tokens = tok.train(counts, n_merges)
        assert tokens == tok.train_slowly(counts, n_merges), texts
        reference = rustbpe.Tokenizer()
        reference.train_from_iterator(iter(texts), 256 + n_merges, pattern=tok.PATTERN)
        assert tokens == [bytes(token) for token, _ in reference.get_mergeable_ranks()], texts


@pytest.fixture(scope="session")
def tok_made(tmp_path_factory):
    """The folder of a tokenizer of 512 ids that tok.py trained on the README, in two shards. tok.py
    needs no other file of the project; its folders are those under the base folder."""
    base = tmp_path_factory.mktemp("tok")
    texts = (HERE / "README.md").read_text().splitlines(keepends=True)
    for number, some in ((0, texts[:100]), (1, texts[100:]), (6542, ["zqxjzqxj " * 500])):
        write_shard(base / f"data/climbmix/shard_{number:05d}.parquet", some, 30)
    shutil.copy(HERE / "tok.py", base)
    said = script(base / "tok.py", "--vocab-size", 512, "--workers", 2, base=base)
    assert "round trip through tiktoken ok" in said
    return base / "tokenizer"


def test_the_files_of_a_tokenizer(tok_made):
    """A token a line, base64 and id, the 256 bytes first, then 247 merges; the 9 special tokens
    have the last ids, in order. The validation shard, which says zqxj, was not read."""
    texts = (HERE / "README.md").read_text().splitlines(keepends=True)
    counts = Counter(chunk for text in texts for chunk in tok.split(text))
    lines = [f"{base64.b64encode(token).decode()} {i}\n"
             for i, token in enumerate(tok.train_slowly(counts, 247))]
    assert (tok_made / "tokenizer.tiktoken").read_text() == "".join(lines)
    assert lines[:2] == ["AA== 0\n", "AQ== 1\n"] and len(lines) == 503
    config = json.loads((tok_made / "config.json").read_text())
    assert config.pop("seconds") >= 0
    assert config == {"pat_str": tok.PATTERN, "docs": len(texts), "chars": sum(map(len, texts)),
                      "shards": 2, "special_tokens": dict(zip(SPECIAL, range(503, 512)))}


@pytest.mark.parametrize("text, chunks", [
    ("It's 12345 o'clock.\n\n", ["It", "'s", " ", "12", "34", "5", " o", "'clock", ".\n\n"]),
    ("  two  spaces\n\tx = (1)", [" ", " two", " ", " spaces", "\n", "\tx", " =", " (", "1", ")"]),
    ("naïve 東京🎉!?\r\n ", ["naïve", " 東京", "🎉!?\r\n", " "]), ("<|bos|>", ["<|", "bos", "|>"])])
def test_a_text_is_cut_into_chunks_and_makes_the_round_trip_in_tiktoken(tok_made, text, chunks):
    enc = M.load_tokenizer(tok_made)
    assert tok.split(text) == chunks and enc.decode(enc.encode_ordinary(text)) == text
    by_chunk = [enc.encode_ordinary(chunk) for chunk in chunks]
    assert sum(by_chunk, []) == enc.encode_ordinary(text)


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_are_taken_in_order_until_there_are_enough(tmp_path, monkeypatch, workers):
    """Documents are cut at doc_cap; the one that reaches max_chars is the last."""
    texts = [str(i) * 30 for i in range(10)]
    paths = [write_shard(tmp_path / "shard_00000.parquet", texts[:5] + [None], 2),
             write_shard(tmp_path / "shard_00001.parquet", texts[5:], 2)]
    shards = tok.Shards(paths, "text", doc_cap=20)
    monkeypatch.delattr(sys.modules["__main__"], "__file__", False)  # or workers import it
    counts, chars, docs, n_shards = tok.count_chunks(shards, 141, workers)
    # 8 texts of 20 characters and the missing one, from both shards
    assert (chars, docs, n_shards) == (160, 9, 2)
    assert counts == {str(i) * 2: 10 for i in range(8)}


@pytest.mark.parametrize("whom, says", [("all", "interrupted"), ("worker", "--workers 1")])
def test_a_tokenizer_that_is_stopped_leaves_nothing(tmp_path, whom, says):
    """Ctrl-C, which goes to all its processes, or a worker that is killed for want of memory."""
    for i in range(2):
        write_shard(tmp_path / f"data/climbmix/shard_{i:05d}.parquet", some_texts(20_000), 50)
    process = start("tok.py", "--workers", 2, "--vocab-size", 1000, base=tmp_path)
    assert "counting shard_00000" in process.stdout.readline()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    if whom == "all":
        for pid in [*children, process.pid]:
            os.kill(int(pid), signal.SIGINT)
    else:
        os.kill(int(children[-1]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and len(error.splitlines()) == 1 and says in error, error
    assert not list((tmp_path / "tokenizer").iterdir())


@pytest.mark.parametrize("harm", [
    lambda ranks, special: ranks.update(a=None), lambda ranks, special: ranks.update(a=300),
    lambda ranks, special: ranks.update(a=98), lambda ranks, special: ranks.update(a=-1),
    lambda ranks, special: ranks.pop("a"), lambda ranks, special: special.pop("<|bos|>"),
    lambda ranks, special: special.update({"<|bos|>": 97}),
    lambda ranks, special: special.update({"<|bos|>": None}),
    lambda ranks, special: special.update({"<|more|>": 265}),
    lambda ranks, special: ranks.update({f"x{i}": 256 + i for i in range(9)}),
    lambda ranks, special: ranks.clear(), lambda ranks, special: special.clear()])
def test_a_tokenizer_whose_ids_are_not_0_to_n_is_refused(tmp_path, harm):
    """Null, a gap, a duplicate, -1, a missing rank; special tokens that are not the last ids."""
    enc = write_tokenizer(tmp_path)
    ranks = {chr(i): i for i in range(256)}
    special = dict(enc._special_tokens)
    harm(ranks, special)
    lines = [f"{base64.b64encode(token.encode('latin-1')).decode()} {rank}\n"
             for token, rank in ranks.items()]
    (tmp_path / "tokenizer.tiktoken").write_text("".join(lines))
    (tmp_path / "config.json").write_text(json.dumps(dict(pat_str=tok.PATTERN,
                                                          special_tokens=special)))
    with pytest.raises(SystemExit, match="^the tokenizer in .* is damaged .*run `python tok.py"):
        M.load_tokenizer(tmp_path)


def test_any_text_is_encoded_also_millions_of_spaces(tmp_path):
    """With which tiktoken alone panics."""
    enc = write_tokenizer(tmp_path)
    text = "a" + " " * 2_100_000 + "b\n" + "\t" * 100_000 + "c"
    [spaces, short] = M.encode(enc, [text, "the end"])
    assert enc.decode(spaces) == text and short == enc.encode_ordinary("the end")


def shard_bytes(column, values):
    file = pa.BufferOutputStream()
    pq.write_table(pa.table({column: values}), file)
    return file.getvalue().to_pybytes()


@pytest.mark.parametrize("script, name, after", [
    ("tok", "b.parquet", "replace or remove it"), ("eval", "c.parquet", "an intact copy"),
    ("pretrain", "a.parquet", "put the right file there"),
    ("pretrain", "c.parquet", "put the right file there")])
@pytest.mark.parametrize("content", [
    shard_bytes("text", some_texts(20))[:-100], shard_bytes("text", pa.array([], pa.string())),
    shard_bytes("text", [1, 2]), shard_bytes("text", [b"binary"]), shard_bytes("text", [["a"]]),
    shard_bytes("content", ["text"]), b""],
    ids=["truncated", "no documents", "numbers", "binary", "list", "no column", "nothing"])
def test_a_bad_shard_is_named(tmp_path, refused, run_here, content, script, name, after):
    """A file of any name that is no parquet file, or has no column of strings."""
    for each in ("a.parquet", "b.parquet", "c.parquet"):
        write_shard(tmp_path / "data" / "climbmix" / each, some_texts(20))
    (tmp_path / "data" / "climbmix" / name).write_bytes(content)
    if script == "tok":
        refused(tok, ["--workers", 1], [name, after], tmp_path)
        return
    write_tokenizer(tmp_path / "tokenizer")
    if script == "eval":
        folder = tmp_path / "base_checkpoints" / "t"
        write_checkpoint(folder, random_model())
        change_meta(folder, 10, lambda meta: meta.update(
            validation_file=name, user_config={"data_dir": str(tmp_path / "data" / "climbmix")}))
        refused(ev, ["t", "--quick"], [name, after], tmp_path)
    else:
        refused(pretrain, [*TINY, "--tag", "t"], [f"{name} cannot be read", after], tmp_path)


def test_a_finished_tokenizer_is_kept_and_an_unfinished_one_made_anew(tmp_path, monkeypatch,
                                                                      refused, run_here):
    """It is finished with config.json, which a full disk keeps it from."""
    for name in ("a", "validation"):
        write_shard(tmp_path / f"data/climbmix/{name}.parquet", ["low lower newest"])
    args, out, rename = ["--workers", 1, "--vocab-size", 276], tmp_path / "tokenizer", os.replace

    def full(part, path):
        if path.name == "tokenizer.tiktoken":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(part, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        refused(tok, args, ["No space left on device", "another --out-dir"], tmp_path)
    assert not list(out.iterdir())
    (out / "tokenizer.tiktoken").write_text("cut of")
    for says in ("saved in", "tokenizer exists, skipped"):
        status, said = run_here(tok, args, tmp_path)
        assert status == 0 and says in said and M.load_tokenizer(out).n_vocab == 276
    refused(tok, ["--workers", 1], ["has 276 ids, not 32768", "--out-dir"], tmp_path)
    (out / "config.json").write_text("{")
    refused(tok, args, ["config.json", "--out-dir"], tmp_path)
    assert (out / "config.json").read_text() == "{"


# ==== demo.py: a toy that shows in minutes what dropping RoPE does ================================

def test_the_corpus_is_always_the_same_and_keeps_what_it_validates_on_apart(tmp_path):
    with start("demo.py", "--corpus", base=tmp_path, env={"PYTHONHASHSEED": 7}) as other:
        corpus = demo.write_corpus(tmp_path / "data" / "again")  # at the same time
        other.communicate()
    assert other.returncode == 0
    files = sorted(path.name for path in corpus.iterdir())
    assert files == ["conversations.jsonl", "conversations_val.jsonl", "shard_00000.parquet",
                     "shard_06542.parquet", "words.txt"]
    for name in files:
        assert (tmp_path / "data/demo" / name).read_bytes() == (corpus / name).read_bytes(), name
    texts, pairs = [], []
    for shard, name in ((0, "conversations"), (6542, "conversations_val")):
        texts.append(pq.read_table(corpus / f"shard_{shard:05d}.parquet")["text"].to_pylist())
        lines = (corpus / f"{name}.jsonl").read_text().splitlines()
        pairs.append({q["content"]: a["content"] for q, a in map(json.loads, lines)})
    assert 0.04 < len(texts[1]) / len(texts[0] + texts[1]) < 0.06
    assert not set(texts[0]) & set(texts[1]) and sum(map(len, texts[0])) > 1_000_000
    assert not set(pairs[0]) & set(pairs[1]) and len(pairs[0]) > 1000
    for some, answers in zip(texts, pairs):  # an answer is taken from its own shard
        text = " ".join(" ".join(some).split())
        told = {*demo.EXAMPLES.values(), demo.WHO[1]}
        assert all(answer in text or answer in told for answer in list(answers.values())[::50])
    assert pairs[0]["What is len for?"] == demo.EXAMPLES["len"]


STREAM = torch.cat([torch.tensor([431]), torch.arange(400)]).repeat(3)  # <|bos|> and a text


def key_of(fact):
    """A fact, one token, tells one of VALUES values of a key; a question is the key's token."""
    return demo.KEY + (fact - demo.FACT) // demo.VALUES


def test_rows_tell_four_facts_and_ask_for_them_and_a_prompt_has_one_right_answer():
    rows, weights = demo.training_rows(STREAM, torch.Generator().manual_seed(0))
    assert rows.shape == (16, 129) and weights.shape == (16, 128)
    for row, weight in zip(rows.tolist(), weights.tolist()):
        told = [i for i in range(42) if row[i] >= demo.FACT]
        asked = [i for i in range(42, 128) if row[i] >= demo.KEY]
        assert len({key_of(row[i]) for i in told}) == len(told) == len(asked) == 4
        for i in asked:
            assert key_of(row[i + 1]) == row[i] and row[i + 1] in [row[j] for j in told]
        for i in range(128):  # weight[i]: of predicting row[i + 1]
            assert weight[i] == (0 if i + 1 in told + asked else 5 if i in asked else 1), i
    for *context, question, answer in demo.prompts(STREAM, 300, 96, torch.Generator()).tolist():
        facts = [token for token in context if token >= demo.FACT]
        assert len(facts) == 4 and [fact for fact in facts if key_of(fact) == question] == [answer]


WORKERS = """
import demo, os, signal, time
demo.write_corpus = lambda folder: folder
demo.subprocess.run = lambda *args, **more: demo.subprocess.CompletedProcess(args, 0)


def work(arm, seed, steps, data, tokenizer, path):
    print(os.getpid(), flush=True)
    time.sleep(60)


demo.run_arm, demo.os.cpu_count = work, lambda: 2
if __name__ == "__main__":
    (demo.base_dir() / "data/demo").mkdir(parents=True)
    (demo.base_dir() / "data/demo/shard_00000.parquet").write_bytes(b"")
    demo.guard(lambda: demo.demonstrate(demo.Config(), demo.base_dir()))
"""


@pytest.mark.parametrize("whom, sent, status, says", [
    ("parent", signal.SIGKILL, -9, ""), ("parent", signal.SIGINT, 1, "interrupted"),
    ("worker", signal.SIGKILL, 1, "was killed")])
def test_the_workers_of_the_demonstration_end_with_it(tmp_path, whom, sent, status, says):
    """Whether it is killed or stopped; and it ends with one line if a worker is killed."""
    (tmp_path / "workers.py").write_text(WORKERS)
    process = start(tmp_path / "workers.py", base=tmp_path)
    said = [process.stdout.readline() for _ in range(3)]  # the head, and two numbers of processes
    workers = [int(line) for line in said if line.strip().isdecimal()]
    paths = [Path(f"/proc/{pid}/cmdline") for pid in workers]
    assert len(workers) == 2 and all(path.exists() for path in paths)
    os.kill(process.pid if whom == "parent" else workers[0], sent)
    _, err = process.communicate(timeout=60)  # returns when the workers have ended
    assert process.returncode == status and says in err, err
    assert err.count("\n") == 1 or sent == signal.SIGKILL, err
    assert not any(path.exists() and path.read_bytes() for path in paths)


def test_drope_is_rope_until_the_switch(monkeypatch):
    """With seed 3, 4 steps each."""
    seen, losses = [], {}
    for arm in ("RoPE", "DroPE 50", "DroPE 75", "NoPE"):
        seen.append(watch_rope(monkeypatch, demo))
        losses[arm] = demo.train(arm, demo.new_model(3), 4, round(4 * demo.ARMS[arm]), STREAM,
                                 torch.Generator().manual_seed(3))
    assert [sum(flags) for flags in seen] == [4, 2, 3, 0]
    assert all(flags == sorted(flags, reverse=True) and len(flags) == 4 for flags in seen)
    assert losses["RoPE"][:2] == losses["DroPE 50"][:2]  # the same weights and rows
    assert losses["RoPE"][2] != losses["DroPE 50"][2]


def test_the_demonstration_at_a_tiny_size(tmp_path, monkeypatch):
    """Up to the training length T, neither a fitted logn_scale (SCALES) nor NTK changes anything.
    Run again, it finds its results."""
    for name, value in (("PROMPTS", 8), ("WINDOWS", 2), ("SCALES", (0.0, 0.4))):
        monkeypatch.setattr(demo, name, value)
    for shard in (0, 6542):
        write_shard(tmp_path / f"shard_{shard:05d}.parquet", ["some words of text, " * 60] * 2)
    write_tokenizer(tmp_path)
    jobs = [(arm, 0, 10, tmp_path, tmp_path, tmp_path / f"{arm}.json") for arm in demo.ARMS]
    results = [result for job in jobs for result in demo.run_arm(*job)]
    assert [result["name"] for result in results] == [
        "RoPE", "RoPE + NTK", "RoPE, recalibrated", "DroPE 50", "DroPE 75", "NoPE"]
    for result in results:
        assert result["facts"][0] == result["facts_fitted"][0]
        assert result["text"][0] == result["text_fitted"][0]
    assert results[0]["text"][0] == results[1]["text"][0]
    assert results[0]["text"][3] != results[1]["text"][3]
    monkeypatch.setattr(demo, "train", None)
    assert [result for job in jobs for result in demo.run_arm(*job)] == results
    assert len(demo.table(results).splitlines()) == 2 + 6
    demo.draw(results, 10, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


# ==== pretrain.py: a base model, trained on shards; on the way RoPE is dropped ====================
# tpp: training tokens per scaling parameter. The switch: the number of steps with RoPE. A trunk:
# the run with RoPE that others continue from their switch. _long: fine-tuned in longer rows.

@pytest.mark.parametrize("depth, tpp, steps, tokens", [
    (18, 9, 2784, 2.92e9), (18, 20, 6187, 6.49e9),
    (20, 9, 3763, 3.95e9), (20, 20, 8362, 8.77e9), (20, 40, 16725, 17.54e9)])
def test_steps_tokens_and_the_switch(depth, tpp, steps, tokens):
    for drope, switch in ((50, steps / 2), (25, steps / 4), (0, 0)):
        derived = pretrain.derive(pretrain.Config(depth, tpp, drope), 32768)
        assert (derived.steps, derived.switch) == (steps, round(switch))
        assert derived.batch_size == 2 ** 20
        assert derived.steps * derived.batch_size == pytest.approx(tokens, rel=2e-3)
    assert pretrain.derive(pretrain.Config(depth, tpp), 32768).switch is None


def test_learning_rates_and_weight_decay():
    """The reference values are those of depth 12 and 2^19 tokens; d18 has twice the batch."""
    derived = pretrain.derive(pretrain.Config(12, 9, total_batch_size=2 ** 19), 32768)
    assert derived.lrs == dict(embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02)
    assert derived.weight_decay == 0.28
    derived = pretrain.derive(pretrain.Config(18, 9), 32768)
    assert derived.lrs["matrix_lr"] == pytest.approx(0.02 * 2 ** 0.5)
    assert derived.weight_decay == pytest.approx(0.28 * 2 ** 0.5 * 110_100_480 / 324_403_200)


@pytest.mark.parametrize("given, depth, tpp, drope, tag", [
    ({}, 18, 9, None, "d18_9tpp"), (dict(drope=50), 18, 9, 50, "d18_9tpp_drope_50"),
    (dict(tag="d9_9tpp"), 9, 9, None, "d9_9tpp"), (dict(tag="mine", depth=3), 3, 9, None, "mine"),
    (dict(tag="d20_2.5tpp_drope_0", drope=0), 20, 2.5, 0, "d20_2.5tpp_drope_0")])
def test_the_tag_says_depth_tpp_and_drope(given, depth, tpp, drope, tag):
    cfg = pretrain.Config(**given)
    pretrain.resolve(cfg)
    assert (cfg.depth, cfg.tpp, cfg.drope, cfg.tag) == (depth, tpp, drope, tag)


# ---- Rows: documents, packed by best fit ---------------------------------------------------------

def local_shards(folder, *contents, group=512):
    """pretrain.Shards of a folder with these texts, a shard each."""
    for i, texts in enumerate(contents):
        write_shard(folder / f"shard_{i:05d}.parquet", texts, group)
    write_shard(folder / "shard_06542.parquet", some_texts(9))
    return pretrain.Shards(pretrain.Config(dataset="local", data_dir=str(folder)))


def test_packed_rows_of_ten_tokens(tmp_path):
    """The longest document that fits, again and again; when none fits, the shortest is cut."""
    enc, bos = write_tokenizer(tmp_path / "tok"), 256
    shards = local_shards(tmp_path, ["dddddd", "ee", "a" * 12, "ff", "gggg"])
    stream = pretrain.PackedRows(shards, shards.names, enc, row_len=10, epochs=1)
    x, y = stream.batch(5)  # there are three
    assert x.tolist() == [[bos, *b"aaaaaaaa"],  # 12 letters do not fit: 9, and 3
                          [bos, *b"dddddd", bos, *b"e"],
                          [bos, *b"gggg", bos, *b"aaa"]]
    assert y.tolist() == [[*b"aaaaaaaaa"], [*b"dddddd", bos, *b"ee"], [*b"gggg", bos, *b"aaa", bos]]
    assert (stream.seen, stream.cut) == (32, 2)  # of ff only its <|bos|> was used


def naive_best_fit(lengths, row_len, buffer, chunk, cut):
    """Best fit in its plainest words: rows of (number of a document, its tokens in the row). When
    nothing fits, pretrain.py cuts a document (cut), and sft.py pads the row."""
    coming, waiting, rows = list(enumerate(lengths)), [], []
    while coming or waiting:
        row, room = [], row_len
        while room:
            while len(waiting) < buffer and coming:
                waiting, coming = waiting + coming[:chunk], coming[chunk:]
            fitting = [size for _, size in waiting if size <= room]
            if not waiting or not fitting and not cut:
                break
            wanted = max(fitting) if fitting else min(size for _, size in waiting)
            best = next(pair for pair in waiting if pair[1] == wanted)
            waiting.remove(best)
            row.append((best[0], min(wanted, room)))
            room -= row[-1][1]
        rows.append(row)
    return rows


def test_packing_equals_naive_best_fit_and_loses_no_document(tmp_path):
    """Of three shards. The validation shard is not trained on."""
    enc = write_tokenizer(tmp_path / "tok", [b" t", b"he"])
    texts = some_texts(1664, longest=200) + [None, "", "1666: the last of all"]
    shards = local_shards(tmp_path, texts[:512], texts[512:1024], texts[1024:])
    documents = [[258] + enc.encode_ordinary(text or "") for text in texts]  # 258 is <|bos|>
    stream, got = pretrain.PackedRows(shards, shards.names, enc, 250, epochs=1), []
    while (row := stream.next_row()) is not None:
        got.append(row.tolist())
    rows = naive_best_fit([len(d) for d in documents], 250, 1000, 128, cut=True)
    assert sorted(n for row in rows for n, _ in row) == list(range(1667))
    assert len(got) == len(rows) - 1 > 500  # the last one is not filled
    for row, expected in zip(got, rows):
        assert row == [token for n, size in expected for token in documents[n][:size]]
    assert stream.seen == sum(map(len, documents)) and 0 < stream.cut < 0.05 * stream.seen


def test_packing_resumes_from_its_state_after_any_row(tmp_path):
    """At the ends of row groups, shards and epochs, too; but not if the shards have changed."""
    enc = write_tokenizer(tmp_path / "tok")
    shards = local_shards(tmp_path, *(some_texts(n, n, 60) for n in (600, 640, 500)), group=300)
    options = dict(shards=shards, names=shards.names, enc=enc, row_len=1000, epochs=2)
    whole, rows, states = pretrain.PackedRows(**options), [], []
    while not states or rows[-1] is not None:
        states.append(whole.state())
        rows.append(whole.next_row())
    assert len(rows) > 100 and any((s["pq_idx"], s["row"]) == (2, 0) for s in states)
    for n, state in enumerate(states):
        torch.save(state, tmp_path / "state")
        again = pretrain.PackedRows(**options, state=torch.load(tmp_path / "state"))
        for row in rows[n:] if n % 25 == 0 else rows[n:n + 3]:
            assert np.array_equal(row, again.next_row()), n
    for i, names in ((9, ["shard_00001.parquet"]), (-1, [*shards.names, "shard_00003.parquet"])):
        with pytest.raises(SystemExit, match="does not hold the shards that this run has read"):
            pretrain.PackedRows(**{**options, "names": names}, state=states[i])


# ---- A run and its files -------------------------------------------------------------------------

STEPS_20 = 20.5 * 1024 / 253_952  # tpp for 20 steps of 1,024 tokens: N is 253,952 at depth 1
TINY = ("--depth", 1, "--dataset", "local", "--max-seq-len", 64, "--total-batch-size", 1024,
        "--eval-tokens", 2048, "--eval-sample", 1024, "--eval-every", 8, "--save-every", 5,
        "--matrix-lr", 0.2, "--embedding-lr", 3, "--tpp", STEPS_20)
DROPE = (*TINY, "--drope", 50, "--tag", "drope")
TRUNK = pretrain.name_of(1, STEPS_20, None)  # the tag of such a run with RoPE


def records(folder):
    """metrics.jsonl without its timings."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited")}
            for line in M.read_lines(folder / "metrics.jsonl", {"step": int})]


def losses(folder, key="loss"):
    return [record[key] for record in records(folder) if key in record]


def final(folder):
    """The last step of a run, and its meta."""
    step = max(M.checkpoint_steps(folder))
    return step, M.read_meta(folder, step)


def same(a, b):
    """Whether nested lists and dicts with tensors are equal, to the bit."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b, parts=("model", "optim", "loader")):
    """Two folders hold the same finished run: tensors, data position, metrics, to the bit."""
    (step, meta_a), (step_b, meta_b) = final(a), final(b)
    assert step == step_b and meta_a["finished"] and meta_b["finished"]
    for part in parts:
        assert same(M.load_part(a, step, part), M.load_part(b, step, part)), part
    for key in ("use_rope", "min_val_bpb", "smooth_train_loss"):
        assert meta_a["loop_state"][key] == meta_b["loop_state"][key], key
    assert records(a) == records(b) and not list(b.glob(".*.tmp"))


def assert_near(a, b):
    for key in ("loss", "val_bpb"):
        assert losses(a, key) == pytest.approx(losses(b, key), rel=1e-4)


@pytest.fixture(scope="session")
def drope_run(tiny_base):
    """The folder of an undisturbed run of 20 steps, with the switch at 10; what it printed is in
    `log`. The other tests compare theirs with it."""
    log = script("pretrain.py", *DROPE, base=tiny_base)
    folder = tiny_base / "base_checkpoints" / "drope"
    (folder / "log").write_text(log)
    return folder


@pytest.fixture(scope="session")
def trunk_base(tiny_base, tmp_path_factory):
    """Another base folder, where the same run with RoPE has kept its checkpoints."""
    base = share(tiny_base, tmp_path_factory.mktemp("trunk"))
    script("pretrain.py", *TINY, base=base)
    return base


def test_the_files_of_a_run(drope_run):
    """Its last two checkpoints, and its metrics."""
    step, meta = final(drope_run)
    assert visible(drope_run) - {"log"} == {
        "model_000015.pt", "optim_000015_rank0.pt", "loader_000015.pt", "meta_000015.json",
        "model_000020.pt", "optim_000020_rank0.pt", "loader_000020.pt", "meta_000020.json",
        "metrics.jsonl"}
    assert (step, meta["step"], meta["switch"], meta["finished"]) == (20, 20, 10, True)
    assert set(meta["model_config"]) == {"sequence_len", "vocab_size", "n_layer", "n_head",
                                         "n_kv_head", "n_embd"}
    assert {"step", "val_bpb", "user_config", "device_batch_size", "max_seq_len",
            "total_batch_size", "loop_state", "sha256"} <= set(meta)
    assert losses(drope_run)[-1] < losses(drope_run)[0] - 0.5
    factors = [muon.lr_factor(i, 20) for i in range(20)]
    assert losses(drope_run, "lr_factor") == pytest.approx(factors)
    assert [line["step"] for line in records(drope_run) if "val_bpb" in line] == [0, 8, 16, 20]
    # The last validation, and the least of those on the way, which are of another size
    bpb, tokens = losses(drope_run, "val_bpb"), losses(drope_run, "eval_tokens")
    assert tokens == [1024, 1024, 1024, 2048] and meta["val_bpb"] == bpb[-1]
    assert meta["loop_state"]["min_val_bpb"] == min(bpb[:-1]) > bpb[-1]
    assert re.match(r"The\S", meta["sample"]) and meta["validation_file"] == "shard_06542.parquet"
    log = (drope_run / "log").read_text()
    for field in ("depth = 1", "drope = 50", "steps = 20", "switch = 10", "revision = local"):
        assert f"\n# {field}\n" in log, field
    assert len(re.findall(r"\nstep 000\d\d \| +[\d.]+% \| loss \d\.\d{4} \| lr \d\.\d{3} \| [\d,]+ "
                          r"tok/s \| \d+\.\d\d s \| left 0:00:\d\d", log)) == 20


def test_rope_is_dropped_after_step_10_of_20_and_nothing_else_changes(drope_run, trunk_base):
    log, trunk = records(drope_run), trunk_base / "base_checkpoints" / TRUNK
    steps = [record for record in log if "loss" in record]
    assert [(r["step"], r["use_rope"]) for r in steps] == [(i, i <= 10) for i in range(1, 21)]
    assert losses(trunk)[:10] == losses(drope_run)[:10] and losses(trunk)[10] != steps[10]["loss"]
    for folder, use_rope in ((trunk, True), (drope_run, False)):
        assert final(folder)[1]["loop_state"]["use_rope"] is use_rope
    switch = log[log.index(steps[10]) - 1]
    assert switch["switch"] and switch["val_bpb_with_rope"] != switch["val_bpb_without_rope"]


def test_a_branch_equals_the_run_from_scratch(drope_run, trunk_base, run_here):
    """It finds its trunk, which has kept checkpoints for it. A finished run is skipped."""
    folder = trunk_base / "base_checkpoints" / "drope"
    assert M.checkpoint_steps(folder.parent / TRUNK) == [5, 10, 15, 20]
    status, output = run_here(pretrain, DROPE, trunk_base)
    assert status == 0 and f"branching off {folder.parent / TRUNK}" in output
    assert "continuing from step 10" in output
    assert_same_run(drope_run, folder)
    status, output = run_here(pretrain, DROPE, trunk_base)
    assert (status, output) == (0, f"{folder} is finished (step 20), skipped\n")


def damage(path):
    """Flips a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_meta(folder, step, change):
    path = M.checkpoint_files(folder, step)["meta"]
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize("why, says", [
    ("missing", f"{TRUNK} has no checkpoint of step 10, only [15, 20]"),
    ("damaged", "model_000010.pt is damaged"), ("recipe", "matrix_lr = 0.2, not 0.3"),
    ("shard", "trained with another shard_00000.parquet"),
    ("validation", "validation_sha256 = "), ("", None)])
def test_a_trunk_of_another_run_is_not_used(drope_run, trunk_base, tmp_path, capsys, why, says):
    """It says why, and what that costs. What does not change the weights may differ."""
    trunk, meta = tmp_path / "base_checkpoints" / TRUNK, final(drope_run)[1]
    shutil.copytree(trunk_base / "base_checkpoints" / TRUNK, trunk)
    shutil.copytree(trunk_base / "data", tmp_path / "data")
    if why == "missing":
        M.checkpoint_files(trunk, 10)["meta"].unlink()
        M.checkpoint_files(trunk, 5)["meta"].unlink()
    if why == "damaged":
        damage(M.checkpoint_files(trunk, 10)["model"])
    if why == "recipe":
        meta["recipe"]["matrix_lr"] = 0.3
    if why == "shard":
        write_shard(tmp_path / "data/climbmix/shard_00000.parquet", some_texts(700, 5), 256)
    if why == "validation":
        meta["data"]["validation_sha256"] = "another"
    cfg = pretrain.Config(**{**meta["user_config"], "eval_every": 7, "save_every": 9,
                             "data_dir": str(tmp_path / "data" / "climbmix")})
    run = M.Run(tmp_path / "base_checkpoints" / "new", cfg, meta["recipe"], CPU)
    run.same_data(meta["data"])
    derived = pretrain.derive(cfg, meta["model_config"]["vocab_size"])
    found, said = pretrain.find_trunk(run, pretrain.Shards(cfg), derived), capsys.readouterr().out
    assert found == (None if says else (trunk, 10))
    assert not says or (says in said and "first 10 of 20 steps: 1.02e-05B" in said)


# ---- A run that starts from a finished model -----------------------------------------------------

RECALIBRATED = (*TINY[2:-1], STEPS_20 / 2, "--init", TRUNK, "--tag", "d1-recalibrated")


@pytest.fixture
def init_base(trunk_base, tiny_base, tmp_path):
    """A base folder with a finished model that has RoPE."""
    folder = share(tiny_base, tmp_path) / "base_checkpoints" / TRUNK
    shutil.copytree(trunk_base / "base_checkpoints" / TRUNK, folder)
    return tmp_path


@pytest.mark.parametrize("drope", [0, None])
def test_a_finished_model_is_recalibrated_or_trained_further(init_base, trunk_base, run_here,
                                                             monkeypatch, drope):
    """10 steps from its weights, with a fresh optimizer, on the text that comes next: the first
    batch is that of a loader that stands where that run's stood. Interrupted, it ends the same."""
    args = RECALIBRATED if drope is None else (*RECALIBRATED, "--drope", drope)
    source, folder = (init_base / "base_checkpoints" / tag for tag in (TRUNK, "d1-recalibrated"))
    _, said = run_here(pretrain, args, init_base)
    step, meta = final(folder)
    assert step == 10 and meta["loop_state"]["use_rope"] is (drope is None) and meta["finished"]
    assert "--init: only 10 steps, of which the first 40 warm up" in said
    _, status = run_here(pretrain, ["--status"], init_base)
    assert f", starting from step 20 of {TRUNK}, val bpb" in status
    name = f"step 20 of {TRUNK}, sha256 {M.weights_hash(source, 20)}"
    assert meta["recipe"]["init"] == name and f"# init = {TRUNK}\n" in said
    assert f"starting from the weights of step 20 of {source}, where in the data" in said
    lines = records(folder)
    assert ("val_bpb_with_rope" in lines[0]) == (drope == 0)  # RoPE is dropped before step 0
    model, end = M.load_model(source)[0], final(source)[1]
    position = {**end["dataloader_state_dict"], "tokens": torch.empty(0, dtype=torch.int32),
                "lengths": torch.empty(0, dtype=torch.int64)}
    assert position["row"] + position["rg_idx"] > 0  # not at the beginning
    cfg = pretrain.Config(**{**meta["user_config"], "plan": (), "keep": ""})
    shards, enc = pretrain.Shards(cfg), M.load_tokenizer(init_base / "tokenizer")
    x, y = torch.from_numpy(pretrain.PackedRows(shards, shards.names, enc, 65, position).batch(16))
    model.use_rope = drope is None
    assert lines[-1]["step"] == 10 and losses(folder)[0] == pytest.approx(
        (model(x.long(), y.long()) / y.numel()).item(), rel=1e-5)
    if drope == 0:  # stopped in step 7 and resumed: the same tensors
        shutil.move(folder, init_base / "whole")
        next_batch, seen = M.Run.next_batch, []

        def stops(run):
            seen.append(run)
            if len(seen) == 7:
                run.stop_reason = "SIGTERM"
            return next_batch(run)
        with monkeypatch.context() as patch:
            patch.setattr(M.Run, "next_batch", stops)
            assert run_here(pretrain, args, init_base)[0] == M.INTERRUPTED
        assert "resuming from step 6" in run_here(pretrain, args, init_base)[1]
        assert_same_run(init_base / "whole", folder)


@pytest.mark.parametrize("change, says", [
    (dict(tag=TRUNK), "--init needs a --tag of your own"), (dict(tag=""), "--init needs a --tag"),
    (dict(init="nope"), f"(models: {TRUNK})"), (dict(init="../x"), "'../x' cannot be a tag"),
    (dict(depth=2), "its model has n_layer = 1, not 2"), ("unfinished", "finish it first"),
    ("tokenizer", "with another tokenizer"), ("no RoPE", "it no longer has RoPE"),
    ("other model", "was trained with init = step 20 of")])
def test_a_model_to_start_from_that_will_not_do_is_refused(init_base, refused, run_here, change,
                                                           says):
    source, args = init_base / "base_checkpoints" / TRUNK, [*RECALIBRATED, "--drope", 0]
    if isinstance(change, dict):
        for name, value in change.items():
            args += [f"--{name}", value]
    if change == "unfinished":
        change_meta(source, 20, lambda meta: meta.update(finished=False, steps=40))
    if change == "tokenizer":
        change_meta(source, 20, lambda meta: meta.update(tokenizer="another"))
    if change == "no RoPE":
        change_meta(source, 20, lambda meta: meta["loop_state"].update(use_rope=False))
    if change == "other model":
        run_here(pretrain, args, init_base)
        weights = M.load_part(source, 20, "model")
        torch.save({k: w + 1 for k, w in weights.items()}, source / "model_000020.pt")
        change_meta(source, 20, lambda meta: meta["sha256"].update(
            {"model_000020.pt": M.file_hash(source / "model_000020.pt")}))
        change_meta(source.parent / "d1-recalibrated", 10, lambda meta: meta.update(finished=False))
    refused(pretrain, args, [says], init_base)


def test_a_model_that_saw_other_data_is_trained_further_from_the_beginning(init_base, run_here):
    """As it was published, without the loader's file; and on a text of one's own. (A learning rate
    may be 0.)"""
    source, mine = init_base / "base_checkpoints" / TRUNK, init_base / "mine"
    M.checkpoint_files(source, 20)["loader"].unlink()
    for name in "ab":
        write_shard(mine / f"{name}.parquet", some_texts(300, ord(name)), 256)
    args = [*RECALIBRATED, "--data-dir", mine, "--unembedding-lr", 0]
    _, said = run_here(pretrain, args, init_base)
    assert "at the beginning of the data (that model's: training_files = 3 files" in said
    assert "finished: " in said and "RoPE on" in said
    change_meta(source, 20, lambda meta: meta["loop_state"].update(use_rope=False))
    run_here(pretrain, [*RECALIBRATED[:-1], "d1-more"], init_base)  # one without RoPE stays so
    assert final(source.parent / "d1-more")[1]["loop_state"]["use_rope"] is False


# ---- Shards come from the hub while it trains ----------------------------------------------------

def test_two_jobs_fetch_each_shard_once_and_undamaged_past_every_fault(hub, tmp_path):
    hub.faults = {"shard_00000.parquet": ["cut"], "shard_00001.parquet": ["short"],
                  "shard_06542.parquet": ["corrupt"]}
    jobs = [start("pretrain.py", "--fetch", 9, base=tmp_path, env=hub.env) for _ in range(2)]
    outputs = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert all(out.endswith("--fetch 9: there are only 3 training shards\n") for out in outputs)
    data = tmp_path / "data" / "climbmix"
    got = {path.name: path.read_bytes() for path in data.glob("*.parquet")}
    assert got == hub.files and not any(hub.faults.values())
    assert {path.name for path in data.iterdir()} == {*hub.files, "index.json"}  # no leftovers
    assert json.loads((data / "index.json").read_text())["revision"] == hub.revision
    assert sorted(hub.bodies) == sorted([*got, *hub.faults])


def test_a_hub_that_goes_away_costs_no_step(online, drope_run, tiny_base, tmp_path, run_here):
    """It has one shard and then fails: the run trains on what is there, saves, says why, and later
    ends in the same tensors. It asks for the next two shards, and no more."""
    (tmp_path / "tokenizer").symlink_to(tiny_base / "tokenizer")
    texts = some_texts(700, 0)  # tiny_base's first shard, in two
    for i, some in enumerate((texts[:384], texts[384:], ["a"], ["b"], ["c"])):
        path = write_shard(tmp_path / f"shard_{i:05d}.parquet", some, 128)
        online.files[path.name] = path.read_bytes()
    online.faults = {"shard_00001.parquet": [503] * 99}
    args = (*DROPE, "--dataset", "x/y", "--patience", 3, "--save-every", 1000)
    folder = tmp_path / "base_checkpoints" / "drope"
    status, said = run_here(pretrain, args, tmp_path)
    [step] = M.checkpoint_steps(folder)
    last = said.splitlines()[-1]
    assert status == 1 and 0 < step < 20 and "Traceback" not in said
    assert last.startswith(f"stopped at step {step}: shard_00001.parquet of x/y")
    assert last.endswith(f". The same command resumes from step {step}")
    online.faults = {}
    assert f"resuming from step {step}" in run_here(pretrain, args, tmp_path)[1]
    assert not any("shard_00004" in path for path in online.log)
    assert_same_run(drope_run, folder, parts=("model", "optim"))


@pytest.mark.parametrize("fault", ["silent", "trickle"])
def test_patience_limits_the_total_also_of_a_server_that_answers_too_slowly(
        online, tmp_path, run_here, fault):
    """It accepts the connection and never answers; or sends a byte every half a second."""
    name, url, began = "shard_00001.parquet", f"{online.url}/shard_00001.parquet", time.time()
    online.faults, online.silent = {name: [fault] * 9}, fault == "silent"
    with pytest.raises(M.DataError, match="in time; gave up after 2 s"):
        M.download_url(url, tmp_path / "x", patience=2)
    assert time.time() - began < 5
    status, said = run_here(pretrain, ("--fetch", 2, "--patience", 2), tmp_path)
    assert status == 1 and "in time; gave up after 2 s" in said
    assert time.time() - began < 12 and not (tmp_path / "x").exists()


@pytest.mark.parametrize("where, says", [
    ("ftp://127.0.0.1/x", "No connection adapters"), ("http://", "no host"),
    ("HUB/page", "a web page"), ("HUB/forbidden", "403: download it in another way")])
def test_what_cannot_succeed_is_not_tried_again(hub, tmp_path, monkeypatch, where, says):
    monkeypatch.setattr(M.time, "sleep", lambda seconds: pytest.fail("tried again"))
    hub.files["page"], hub.files["forbidden"] = b" <!DOCTYPE html><html>", b"1"
    hub.faults = {"forbidden": [403]}
    with pytest.raises(M.DataError, match=f"(?i){says}"):
        M.download_url(where.replace("HUB", hub.url), tmp_path / "x")


def test_an_interrupted_download_says_where_it_goes_on(online, tmp_path, capsys):
    online.faults = {"shard_00000.parquet": ["corrupt", "short"]}
    M.download("x/y", "shard_00000.parquet", tmp_path / "shard", patience=20)
    said = capsys.readouterr().err
    assert "damaged in transit" in said and "was interrupted: starting over" in said
    assert contents(tmp_path) == {"shard": online.files["shard_00000.parquet"]}


def test_a_request_to_stop_is_followed_while_data_are_awaited(capsys):
    run = M.Run.__new__(M.Run)
    def get(timeout):
        assert run.stop_reason is None  # asked once, not for ever
        run.take_signal(signal.SIGTERM, None)
        raise queue.Empty
    run.env, run.stop_reason, run.batches = CPU, None, types.SimpleNamespace(get=get)
    run.now, run.saved, run.save = dict(step=3), 3, lambda: None
    with pytest.raises(SystemExit, match="75"):
        run.next_batch()
    assert "stopped at step 3: SIGTERM" in capsys.readouterr().err


def test_data_that_run_out_end_a_run():
    run = M.Run.__new__(M.Run)
    run.batches, stream = queue.Queue(), types.SimpleNamespace(batch=lambda n: None, state=dict)
    run.make_batches(stream, 4)
    assert run.batches.get() == (None, "the data have run out", {})


def test_a_second_ctrl_c_does_not_wait(capfd):
    run = M.Run.__new__(M.Run)
    run.env, run.stop_reason = CPU, None
    run.take_signal(signal.SIGTERM, None)
    run.take_signal(signal.SIGTERM, None)  # a scheduler that repeats itself
    assert run.stop_reason == "SIGTERM"
    with pytest.raises(SystemExit, match="interrupted"):
        run.take_signal(signal.SIGINT, None)
    assert capfd.readouterr().err.count("Ctrl-C again to stop at once") == 1


class Refusal(Exception):
    def __init__(self, status, **headers):
        self.response = types.SimpleNamespace(status_code=status, headers=headers)


@pytest.mark.parametrize("errors, slept, words", [
    ([OSError("cut"), RuntimeError(), TimeoutError()], [1, 2, 4], "here it is"),
    ([Refusal(503, **{"Retry-After": "7"}), Refusal(429)], [7, 2], "here it is"),
    ([OSError("cut\nand more")] * 99, [1, 2, 4, 8, 16, 32], "cut; gave up after 99 s"),
    ([Refusal(404)], [], "(404)"), ([OSError("x"), Refusal(401)], [1], "401: log in"),
    ([Refusal(501)], [], "(501)"), ([ValueError("no host in http://")], [], "no host"),
    ([ConnectionResetError(errno.ECONNRESET, "reset"), OSError(errno.ENOSPC, "No space left", "x")],
     [1], "x: No space left")])
def test_retry(monkeypatch, errors, slept, words):
    """Sleeping takes no time here. guard() exits with what the function returns, or one line."""
    pauses, waiting = [], iter(errors)
    clock = types.SimpleNamespace(time=lambda: sum(pauses), sleep=pauses.append)
    monkeypatch.setattr(M, "time", clock)
    def attempt():
        for error in waiting:
            raise error
        return "here it is"
    with pytest.raises(SystemExit) as caught:
        M.guard(lambda: M.retry("a file", 99, attempt, denied="log in"))
    assert words in caught.value.code and "\n" not in caught.value.code and pauses == slept


def test_a_bug_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(M.time, "sleep", lambda seconds: pytest.fail("tried again"))
    with pytest.raises(TypeError):
        M.retry("a file", 99, lambda: None + 1)


# ---- What else stops a run -----------------------------------------------------------------------

@pytest.fixture
def half_way(drope_run, tiny_base, tmp_path):
    """The folder of that run, copied into the base folder `tmp_path`. Its checkpoint of step 20 is
    damaged, so that of step 15 is the newest."""
    folder = share(tiny_base, tmp_path) / "base_checkpoints" / "drope"
    shutil.copytree(drope_run, folder)
    damage(folder / "optim_000020_rank0.pt")
    return folder


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
        half_way, drope_run, tmp_path, run_here):
    status, output = run_here(pretrain, DROPE, tmp_path)
    assert status == 0 and "resuming from step 15" in output
    damaged = f"skipping a checkpoint: {half_way}/optim_000020_rank0.pt is damaged"
    assert damaged in output
    assert_same_run(drope_run, half_way)


def test_a_checkpoint_that_cannot_be_read_stops_the_run(half_way, tmp_path, monkeypatch, refused):
    """It may be whole. Nor does a run start over because all checkpoints are damaged."""
    before, read = contents(half_way), M.file_hash

    def fails(path):
        if path.name == "model_000015.pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)
    with monkeypatch.context() as patch:
        patch.setattr(M, "file_hash", fails)
        refused(pretrain, DROPE, ["model_000015.pt: Input/output error"], tmp_path)
    damage(half_way / "model_000015.pt")
    refused(pretrain, DROPE, ["no usable checkpoint", "move that folder away"], tmp_path)
    for step in (15, 20):
        M.checkpoint_files(half_way, step)["meta"].rename(tmp_path / f"{step}")
    refused(pretrain, DROPE, ["no meta_*.json", "move that folder away"], tmp_path)
    for step in (15, 20):
        (tmp_path / f"{step}").rename(M.checkpoint_files(half_way, step)["meta"])
    assert contents(half_way).keys() - {".lock"} == before.keys() - {".lock"}
    assert contents(half_way)["metrics.jsonl"] == before["metrics.jsonl"]


def test_a_run_without_its_metrics_resumes_and_says_so(half_way, drope_run, tmp_path, run_here):
    (half_way / "metrics.jsonl").unlink()
    status, said = run_here(pretrain, DROPE, tmp_path)
    assert status == 0 and f"{half_way / 'metrics.jsonl'} is missing" in said
    assert same(M.load_part(half_way, 20, "model"), M.load_part(drope_run, 20, "model"))
    assert [record["step"] for record in records(half_way)] == [16, 16, 17, 18, 19, 20, 20]


def test_a_finished_run_needs_no_optimizer_any_more(half_way, tmp_path, run_here):
    (half_way / "optim_000020_rank0.pt").unlink()
    assert "is finished (step 20), skipped" in run_here(pretrain, DROPE, tmp_path)[1]
    assert M.load_model(half_way)[1]["step"] == 20


def test_metrics_are_cut_at_a_line_and_a_disk_that_is_full_for_a_moment_costs_no_step(
        half_way, tmp_path, monkeypatch, run_here):
    path = half_way / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:900])
    log, calls = M.Run.log, []

    def fails(record):
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")
    def full(run, **record):
        if record["step"] == 17:
            monkeypatch.setattr(M.json, "dumps", fails)
        log(run, **record)
        monkeypatch.undo() if calls else None
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(M.Run, "log", full)
    status, said = run_here(pretrain, (*DROPE, "--save-every", 99), tmp_path)
    assert status == M.INTERRUPTED and "stopped at step 17: metrics.jsonl cannot be" in said
    assert "shorter than at step 15" in said and M.newest_checkpoint(half_way) == 17
    M.read_lines(path, {"step": int})


def test_what_another_keep_has_kept_stays(init_base, run_here):
    folder = init_base / "base_checkpoints" / TRUNK
    M.checkpoint_files(folder, 20)["meta"].unlink()
    assert run_here(pretrain, (*TINY, "--keep", "60"), init_base)[0] == 0
    assert M.checkpoint_steps(folder) == [5, 10, 15, 20]


@pytest.mark.parametrize("change, words", [
    ("shard_00000", ["training_files = 3 files, ", "not 3 files, "]),
    ("shard_00002", ["training_files = 3 files, ", "not 3 files, "]),
    ("shard_06542", ["validation_sha256 = "]),
    ("zzz", ["training_files = 3 files, ", "not 4 files, "]),
    ("shard_00000 stealthily", ["shard_00000.parquet", "not the file that this run began with"])])
def test_other_data_than_it_began_with_stop_a_run(half_way, tiny_base, tmp_path, refused, change,
                                                  words):
    """A shard that it has read, one that it has not, the validation set, one more file, which would
    be the validation set; a shard that has changed in the middle."""
    (tmp_path / "data").unlink()
    shutil.copytree(tiny_base / "data", tmp_path / "data")
    folder = tmp_path / "data" / "climbmix"
    if "stealthily" in change:  # as if its end had stayed the same
        damage(folder / "shard_00000.parquet")
        cfg = pretrain.Config(dataset="local", data_dir=str(folder))
        same_end = pretrain.Shards(cfg).fingerprint()
        change_meta(half_way, 15, lambda meta: meta["data"].update(training_files=same_end))
    else:
        write_shard(folder / f"{change}.parquet", some_texts(700, 5), 256)
    refused(pretrain, DROPE, words, tmp_path)


@pytest.mark.parametrize("where", ["train", "validation"])
def test_shards_without_text_are_refused(tmp_path, refused, where):
    write_tokenizer(tmp_path / "tokenizer")
    for name, empty in (("a", where == "train"), ("b", where != "train")):
        texts = ["", None] * 5000 if empty else some_texts(200)
        write_shard(tmp_path / "data" / "climbmix" / f"{name}.parquet", texts)
    refused(pretrain, [*TINY, "--tag", "t"], ["documents without text in column 'text'"], tmp_path)


def test_a_reader_that_goes_away_or_a_closed_terminal_stops_a_run(tiny_base, drope_run, tmp_path):
    """`pretrain.py | head`: it saves and stops. (The terminal sends SIGHUP, see the signals.)"""
    base = share(tiny_base, tmp_path)
    process = start("pretrain.py", *DROPE, "--save-every", 999, base=base)
    for line in process.stdout:
        if line.startswith("step 00003"):
            break
    process.stdout.close()
    error = process.stderr.read()
    [step] = M.checkpoint_steps(base / "base_checkpoints" / "drope")
    assert process.wait() == M.INTERRUPTED and 3 <= step < 20
    assert "Traceback" not in error and f"resumes from step {step}" in error


SLOW = """
import os, pathlib, signal, sys, time
import model as M, pretrain
how, seconds, rank = sys.argv[1], float(sys.argv[3]), os.environ["RANK"]
log = pathlib.Path(sys.argv[2])
del sys.argv[1:4]
save, accumulate, calls = M.save_checkpoint, pretrain.accumulate_gradients, []
def slow_save(*args):
    time.sleep(seconds)
    save(*args)
    (log / "saved").write_text(str(time.time()))
def counted(*args):
    calls.append(1)
    if len(calls) == 8 and how == "signal" and rank == "1":
        signal.raise_signal(signal.SIGTERM)
    return accumulate(*args)
M.save_checkpoint, pretrain.accumulate_gradients = slow_save, counted
try:
    M.guard(pretrain.main)
finally:
    (log / ("ended" + rank)).write_text(str(time.time()))
"""


@pytest.mark.parametrize("how, status", [("damaged shard", 1), ("finished", 0), pytest.param(
    "signal", 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seconds", [1, pytest.param(45, marks=pytest.mark.slow)])
def test_no_process_ends_before_rank_0_has_saved(tiny_base, tmp_path, seconds, how, status):
    """torchrun kills those that are left 30 s after the first has ended."""
    base = share(tiny_base, tmp_path / "base")
    (tmp_path / "slow.py").write_text(SLOW)
    if how == "damaged shard":
        (base / "data").unlink()
        shutil.copytree(tiny_base / "data", base / "data")
        write_shard(base / "data/climbmix/shard_00000.parquet", some_texts(384), 128)
        (base / "data/climbmix/shard_00001.parquet").write_bytes(b"PAR1")
    said = script(tmp_path / "slow.py", how, tmp_path, seconds, *DROPE, "--save-every", 999,
                  base=base, processes=2, status=status)
    saved, *ended = [float((tmp_path / name).read_text()) for name in ("saved", "ended0", "ended1")]
    assert min(ended) > saved and len(M.checkpoint_steps(base / "base_checkpoints/drope")) == 1
    assert said.count("stopped at step") == status and "gloo" not in said


def test_a_save_cut_short_at_any_file_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    """Where there is a meta file, the other three are whole."""
    model, write, left = small_model(n_layer=1), M.atomic_write, [9]
    meta = dict(model_config=asdict(model.config), loop_state={"use_rope": True})
    args = (model, muon.build_optimizer(model), {}, meta)
    def atomic_write(path, content):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left")
        write(path, content)
    monkeypatch.setattr(M, "atomic_write", atomic_write)
    M.save_checkpoint(tmp_path, 1, *args)
    for n in range(4):
        left[0] = n
        with pytest.raises(OSError):
            M.save_checkpoint(tmp_path, 2, *args)
        assert M.newest_checkpoint(tmp_path) == 1 == max(M.checkpoint_steps(tmp_path))


def test_another_recipe_is_refused_and_the_field_named(half_way, tmp_path, refused):
    """A checkpoint of the public repo says nothing of a recipe, and has no loader file."""
    for option, value, says in (("--drope", 16, "drope = 50, not 16"), ("--tpp", 16, "tpp = 0.08"),
                                ("--matrix-lr", 16, "matrix_lr = 0.2, not 16")):
        words = [str(half_way), "--tag", says]
        refused(pretrain, [*DROPE, option, value], words, tmp_path)
    (tmp_path / "tokenizer").unlink()
    write_tokenizer(tmp_path / "tokenizer", [b"xy", b"he", b" z", b"in"])
    refused(pretrain, DROPE, [str(half_way), "tokenizer ="], tmp_path)
    M.checkpoint_files(half_way, 15)["loader"].unlink()
    change_meta(half_way, 15, lambda meta: [meta.pop("recipe"), meta.pop("sha256")])
    refused(pretrain, DROPE, [str(half_way), "other code", "sft.py can use"], tmp_path)


def test_a_damaged_shard_of_the_hub_is_named(tiny_base, tmp_path, refused):
    local_shards(tmp_path, ["a"])
    bad = tmp_path / "shard_00000.parquet"
    bad.write_bytes(b"PAR1 is not all")
    hashes = {path.name: M.file_hash(path) for path in tmp_path.glob("*.parquet")}
    index = dict(dataset="x/y", revision="1", sha256=hashes)
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "tokenizer").symlink_to(tiny_base / "tokenizer")
    args = [*TINY, "--data-dir", tmp_path, "--dataset"]
    words = [f"{bad} cannot be read", "delete it to download it again"]
    refused(pretrain, [*args, "x/y"], words, tmp_path)
    refused(pretrain, [*args, "x/z"], [str(tmp_path), "of x/y, not of x/z"], tmp_path)
    (tmp_path / "index.json").write_text('{"dataset": "x/y"')
    refused(pretrain, [*args, "x/y"], ["index.json is damaged: delete it"], tmp_path)


def test_one_run_at_a_time_in_a_folder(half_way, tmp_path, refused):
    half = half_way / ".model_000016.pt.99.tmp"
    half.touch()
    with M.lock_file(half_way / ".lock", "busy"):
        refused(pretrain, DROPE, [str(half_way), "in use by another run"], tmp_path)
    assert half.exists()  # the other run is writing it


@pytest.mark.parametrize("name, row, says", [
    ("lm_head.weight", 0, "the loss of step 16 is nan"),
    ("transformer.wte.weight", -1, "at step 20 transformer.wte.weight is not finite")])
def test_what_is_not_finite_stops_the_run(half_way, tmp_path, refused, name, row, says):
    """A weight that all logits depend on; one of a token that never occurs, so that only the check
    before saving notices."""
    file = M.checkpoint_files(half_way, 15)["model"]
    weights = torch.load(file)
    weights[name][row, 0] = math.nan
    torch.save(weights, file)
    change_meta(half_way, 15, lambda meta: meta["sha256"].update({file.name: M.file_hash(file)}))
    refused(pretrain, DROPE, [says, "step 15", "lower learning rates"], tmp_path)
    assert M.newest_checkpoint(half_way) == 15


# ==== sft.py: from a base model to one that answers ===============================================

# The ids of the tokenizer without merges, where a byte is its own id
(BOS, USER, USER_END, ASSISTANT, ASSISTANT_END,
 PYTHON, PYTHON_END, OUTPUT, OUTPUT_END) = range(256, 265)
WORDS = "apple banana cherry strawberry kiwi plum fig melon".split()


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]


def test_ids_and_mask_of_a_conversation(tmp_path):
    """With a system message, two turns, a call of Python, and text that looks like a token."""
    ids, mask = sft.render(write_tokenizer(tmp_path), [
        {"role": "system", "content": "S"}, *chat("hi", "yo", "<|bos|>", [
            {"type": "text", "text": "a"}, {"type": "python", "text": "1+1"},
            {"type": "python_output", "text": "2"}, {"type": "text", "text": "b"}])])
    pieces = [([BOS, USER, *b"S\n\nhi", USER_END, ASSISTANT], 0), ([*b"yo", ASSISTANT_END], 1),
              ([USER, *b"<|bos|>", USER_END, ASSISTANT], 0), ([*b"a"], 1),
              ([PYTHON, *b"1+1", PYTHON_END], 1), ([OUTPUT, *b"2", OUTPUT_END], 0),
              ([*b"b", ASSISTANT_END], 1)]
    assert ids == [token for piece, _ in pieces for token in piece]
    assert mask == [learnt for piece, learnt in pieces for _ in piece]


@pytest.mark.parametrize("messages, why", [
    (chat("a", "b")[::-1], "message 1 has role 'assistant' instead of 'user'"),
    (chat("a", "b") + [{"role": "system", "content": "s"}], "message 3 has role 'system'"),
    (chat("a", [{"type": "image", "text": "x"}]), "message 2 has content that is neither text nor"),
    ([{"role": "system", "content": "s"}], "it ends before an answer"), ("text", "not a list")])
def test_what_is_no_conversation_is_named(tmp_path, messages, why):
    with pytest.raises(ValueError, match=why):
        sft.render(write_tokenizer(tmp_path), messages)


# ---- The sources, and their mixture --------------------------------------------------------------

@pytest.fixture
def sft_home(tmp_path, monkeypatch):
    """A base folder with a tokenizer of bytes and a list of words, whose lines end in \r\n."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "words.txt").write_text("\r\n".join(WORDS))
    write_tokenizer(tmp_path / "tokenizer")
    sft.tulu_rows.cache_clear()
    return tmp_path


def sft_config(home, **fields):
    return sft.Config(**{"words": str(home / "words.txt"), "patience": 0, **fields})


def hub_file(home, name, rows):
    """Puts a file where the source looks before it asks the hub."""
    (home / "data/sft" / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), home / "data/sft" / name)


def test_a_question_of_mmlu(sft_home):
    row = {"question": "2+2?", "subject": "", "choices": ["3", "4", "5", "6"], "answer": 1}
    hub_file(sft_home, "mmlu/auxiliary_train-00000-of-00001.parquet", [row] * 3)
    n, conversation, _ = sft.mmlu(sft_config(sft_home), "train")
    assert n == 3 and conversation(2) == chat(
        "Multiple Choice question: 2+2?\n- 3=A\n- 4=B\n- 5=C\n- 6=D\n\n"
        "Respond only with the letter of the correct answer.", "B")


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_in_the_order_of_datasets_shuffle_with_seed_42(sft_home, split):
    rows = [{"question": f"q{i}", "answer": f"a <<{i}*2={2 * i}>>b <<7>>"} for i in range(8)]
    hub_file(sft_home, f"gsm8k/{split}-00000-of-00001.parquet", rows)
    n, conversation, _ = sft.gsm8k(sft_config(sft_home), split.replace("test", "val"))
    order = [3, 4, 2, 7, 6, 1, 5, 0]  # default_rng(42).permutation(8)
    assert [conversation(i)[0]["content"] for i in range(n)] == [f"q{i}" for i in order]
    parts = [(part["type"], part["text"]) for part in conversation(0)[1]["content"]]
    assert parts == [("text", "a "), ("python", "3*2"), ("python_output", "6"), ("text", "b "),
                     ("python", "7"), ("python_output", "")]


def test_bad_tulu_rows_are_dropped_and_the_last_of_the_shuffled_are_held_out(sft_home, capsys):
    good = [chat(f"q{i}", f"a{i}") for i in range(57)]
    good += [chat("a"), chat("a", " \n"), chat("a", "b", "c")]
    bad = [chat("a", None), chat("a", "b")[1:], chat("a", [{"type": "text", "text": "b"}]), [],
           [{"role": "system", "content": "a"}], chat("a") * 2, None,
           [*chat("a", "b"), {"role": "system", "content": "a"}]]
    lines = [json.dumps({"messages": m}) for m in good[:30] + bad + good[30:]]
    file = sft_home / "data/sft/tulu/tulu_v2_data.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("\n".join([*lines, '{"id": 1}', '{"messages": [', "[]"]))
    rows = []
    for split, expected in (("train", 57), ("val", 3)):  # a twentieth of a small file
        n, conversation, _ = sft.tulu(sft_config(sft_home), split)
        assert n == expected
        rows += [conversation(i) for i in range(n)]
    random.Random(42).shuffle(good)
    assert rows == good and "11 of 71 rows dropped" in capsys.readouterr().out


def test_simple_spelling(sft_home):
    """Of other words than SpellingBee's in the same rows, so the list is shuffled."""
    n, conversation, _ = sft.simple_spelling(sft_config(sft_home, spelling_rows=7), "train")
    words = WORDS.copy()
    random.Random(42).shuffle(words)
    for i in range(7):
        word = random.Random(i).choice(words)
        assert conversation(i) == chat(f"Spell the word: {word}", f"{word}:{','.join(word)}")
    assert n == 7
    assert sft.simple_spelling(sft_config(sft_home), "val")[1](3) == conversation(10_000_003)


def test_spelling_bee_counts_right_and_asks_for_a_letter_of_the_word_in_90_percent(sft_home):
    _, conversation, _ = sft.spelling_bee(sft_config(sft_home), "train")
    inside, questions = 0, set()
    for i in range(3000):
        user, answer = conversation(i)
        assert [p["type"] for p in answer["content"]] == ["text", "python", "python_output", "text"]
        by_hand, call, output, end = [part["text"] for part in answer["content"]]
        word, c = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call).groups()
        assert word in user["content"].lower() and c in user["content"].lower()
        assert output == str(word.count(c)) and end.endswith(f"\n\n#### {word.count(c)}")
        for k, letter in enumerate(word, 1):
            hit = f" hit! count={word[:k].count(c)}" if letter == c else ""
            assert f"{k}:{letter}{hit}" in by_hand.splitlines()
        inside += c in word
        questions.add(user["content"].replace(word, "W"))
    assert abs(inside / 3000 - 0.9) < 0.02 and len(questions) > 1000
    assert word == random.Random(2999).choice(WORDS)


def test_a_file_of_the_web_is_fetched_until_it_is_whole(hub, sft_home, monkeypatch):
    good = b"".join(json.dumps(chat("q" * 50, "a")).encode() + b"\n" for _ in range(20))
    hub.files["x.jsonl"], hub.faults = good, {"x.jsonl": [429, 503, "short", "cut"]}
    monkeypatch.setattr(M.time, "sleep", lambda seconds: None)
    config = sft_config(sft_home, identity=f"{hub.url}/x.jsonl", patience=600)
    assert sft.identity(config, "train")[0] == 20 and not hub.faults["x.jsonl"]
    name = f"http%3A%2F%2F127.0.0.1%3A{hub.server_port}%2Fx.jsonl"  # another server, another file
    assert (sft_home / "data/sft" / name).read_bytes() == good
    with pytest.raises(M.DataError, match="404"):  # no use in asking again
        M.download_url(f"{hub.url}/missing", sft_home / "missing", 600)


def mixture_of(*sources):
    """A Mixture of (name, epochs, rows, function from the number of a row to its messages)."""
    return sft.Mixture([(name, epochs, sft.Source(rows, messages, ""))
                        for name, epochs, rows, messages in sources])


def test_the_order_is_that_of_random_shuffle_with_seed_42_over_pairs_of_source_and_row(tmp_path):
    mixture = mixture_of(("a", 1, 5, lambda i: chat(f"a{i}", "")), ("none", 2, 0, None),
                         ("b", 4, 3, lambda i: chat(f"b{i}", "")))
    pairs = [f"a{i}" for i in range(5)] + [f"b{i}" for i in range(3)] * 4
    random.Random(42).shuffle(pairs)
    enc = write_tokenizer(tmp_path)
    ids = [mixture.rendered(i, enc)[0] for i in range(len(mixture))]
    assert [bytes(one[2:4]).decode() for one in ids] == pairs


def test_the_mixture_never_shrinks_in_silence(sft_home, monkeypatch, capsys):
    """A source of another size gives a notice; one that cannot be had, a line saying what is
    lost."""
    published = ("smoltalk", "identity", "mmlu", "gsm8k", "spelling", "spellingbee")
    sizes = [sft.INGREDIENTS[name].n_rows * sft.INGREDIENTS[name].epochs for name in published]
    assert sizes == [460_341, 2_000, 299_526, 29_892, 200_000, 80_000] and sum(sizes) == 1_071_759

    def gone(repo, filename, dest, **options):
        raise M.DataError(f"{repo} is gone")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sft, "download", gone)
        sft.open_mixture(sft_config(sft_home, identity="nowhere.jsonl"), "train")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["smoltalk", "identity", "mmlu", "gsm8k"]
    assert lines[2] == ("mmlu: cais/mmlu is gone. It is needed for 299,526 conversations of the "
                        "mixture; add --skip mmlu to train without it")
    for name, ingredient in sft.INGREDIENTS.items():
        ten = lambda config, split: sft.Source(10, lambda i: chat("a", str(i)), "")
        monkeypatch.setitem(sft.INGREDIENTS, name, ingredient._replace(
            open=ten, n_rows=11 if name == "mmlu" else 10, n_held_out=0))
    for options, expected, notice in (
            ({}, 10 * (1 + 2 + 3 + 4 + 1 + 1),
             "mmlu: 10 rows, but the published mixture has 11\n"),
            (dict(skip="mmlu", tag="d2_1tpp_long"), 10 * (1 + 2 + 4 + 1 + 1 + 1), "")):
        assert len(sft.open_mixture(sft_config(sft_home, **options), "train")) == expected
        assert capsys.readouterr().err == notice


# ---- Rows: whole conversations, packed by best fit -----------------------------------------------

def varied_mixture(n=400):
    texts = ["x" * random.Random(i).choice([0, 1, 5, 10, 20, 40, 70]) for i in range(n)]
    return mixture_of(("a", 1, n, lambda i: chat(f"{i:04d}", texts[i])))


def test_inputs_and_targets(tmp_path):
    """Targets are what is learnt, one to the left, and else -1. The rest of a row is padding, and
    so are the last rows; a conversation longer than a row is cut after T tokens."""
    enc = write_tokenizer(tmp_path)
    mixture = mixture_of(("a", 1, 1, lambda i: chat("hi", "yo")))
    question, answer = [BOS, USER, *b"hi", USER_END, ASSISTANT], [*b"yo", ASSISTANT_END]
    x, y = sft.Packer(mixture, enc, 17).batch(2)
    assert x.tolist() == [question + answer + [BOS] * 7, [BOS] * 16]
    assert y.tolist() == [[-1] * 5 + answer + [-1] * 8, [-1] * 16]
    x, y = sft.Packer(mixture, enc, 8).batch(1)  # T = 7: "yo" loses its o
    assert x.tolist() == [question + [*b"y"]] and y.tolist() == [[-1] * 5 + [*b"y", -1]]
    assert sft.Packer(mixture, enc, 17).filled(2).shape == (2, 1, 16)  # no row of padding


def test_a_conversation_with_nothing_to_learn_in_a_row_is_skipped(tmp_path):
    """A long question would fill a row in vain. A mixture of these alone is refused."""
    enc = write_tokenizer(tmp_path)
    texts = ["long question", "q", "long question too"]
    mixture = mixture_of(("a", 1, 3, lambda i: chat(texts[i], "yo")))
    packer = sft.Packer(mixture, enc, 10)
    y = packer.batch(3)[1]
    assert (y != -1).sum() == 3 and packer.batch(1) is None
    state = packer.state()
    assert (state["used"], state["rows"], state["skipped"]) == (3, 1, 2)
    with pytest.raises(SystemExit, match="no conversation has an answer within its first 4 tokens"):
        sft.Packer(mixture, enc, 5)


def test_rows_equal_naive_best_fit_and_have_every_conversation_once(tmp_path):
    enc, mixture, row_len = write_tokenizer(tmp_path), varied_mixture(), 61
    conversations = [mixture.rendered(i, enc) for i in range(len(mixture))]
    lengths = [min(len(ids), row_len - 1) for ids, _ in conversations]
    expected = naive_best_fit(lengths, row_len, 100, 1, cut=False)
    assert sorted(n for row in expected for n, _ in row) == list(range(400))
    packer = sft.Packer(mixture, enc, row_len)
    for row in expected:
        ids, mask = packer.next_row()
        assert ids == [token for n, size in row for token in conversations[n][0][:size]]
        assert mask == [learnt for n, size in row for learnt in conversations[n][1][:size]]
    assert packer.next_row() == ([], []) and packer.rows == len(expected)


def test_packing_goes_on_from_any_state_that_went_through_json(tmp_path):
    enc, mixture = write_tokenizer(tmp_path), varied_mixture()
    packer, batches, states = sft.Packer(mixture, enc, 61), [], []
    while not batches or batches[-1] is not None:
        states.append(json.dumps(packer.state()))
        batches.append(packer.batch(8))
    assert len(batches) > 10
    for n in (0, 3, len(batches) - 2):
        again = sft.Packer(mixture, enc, 61, json.loads(states[n]))
        for batch in batches[n:]:
            assert np.array_equal(batch, again.batch(8))


# ---- A run ---------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def sft_args(tmp_path_factory):
    """For 98 conversations, 64 of one's own; 8 more are there to validate."""
    folder, lines = tmp_path_factory.mktemp("sft_files"), []
    for i in range(9):
        for word in WORDS:
            answer = f"{word} is a fruit. " * (i % 4 + 1)
            lines.append(json.dumps(chat(f"what is {word} {i}?", answer)) + "\n")
    (folder / "words.txt").write_text("\n".join(WORDS))
    (folder / "mine.jsonl").write_text("".join(lines[:64]))
    (folder / "mine_val.jsonl").write_text("".join(lines[64:]))
    return ("--tag", "drope_long", "--conversations", folder / "mine.jsonl", "--words", folder /
            "words.txt", "--spelling-rows", 30, "--bee-rows", 4, "--max-seq-len", 128,
            "--total-batch-size", 512, "--eval-every", 4, "--eval-tokens", 512, "--save-every", 2,
            "--init-lr-frac", 0.4)  # at 0.8 rounding errors grow a thousandfold


@pytest.fixture(scope="session")
def sft_run(drope_run, tiny_base, sft_args, tmp_path_factory):
    """The folder of an undisturbed run. drope_long goes on from the base model drope."""
    base = share(tiny_base, tmp_path_factory.mktemp("sft_run"))
    shutil.copytree(drope_run, base / "base_checkpoints" / "drope")
    script("sft.py", *sft_args, base=base)
    return base / "chatsft_checkpoints" / "drope_long"


@pytest.fixture
def sft_base(drope_run, tiny_base, tmp_path):
    """A base folder with the pretrained model that has no RoPE any more."""
    shutil.copytree(drope_run, share(tiny_base, tmp_path) / "base_checkpoints" / "drope")
    return tmp_path


def test_a_run_starts_with_the_base_and_uses_every_conversation(
        sft_run, sft_args):
    steps, meta = final(sft_run)
    assert meta["finished"] and steps >= 8 and set(losses(sft_run, "use_rope")) == {False}
    assert losses(sft_run, "conversations")[-1] == 64 + 30 + 4
    assert losses(sft_run, "val_bpb")[-1] < losses(sft_run, "val_bpb")[0]
    base, cfg = sft_run.parents[1], M.parse_config(sft.Config, "", [str(arg) for arg in sft_args])
    enc = M.load_tokenizer(base / "tokenizer")
    x, y = sft.Packer(sft.open_mixture(cfg, "train"), enc, 129).batch(4)  # the first step's
    model, _ = M.load_model(base / "base_checkpoints" / "drope")
    loss = model(torch.tensor(x).long(), torch.tensor(y).long()) / (y != -1).sum()
    assert loss.item() == pytest.approx(losses(sft_run)[0], rel=1e-5)


def test_the_optimizer_of_pretraining_goes_on_with_other_schedules(sft_run):
    steps, meta = final(sft_run)
    assert meta["user_config"]["matrix_lr"] == 0.2
    optim = M.load_part(sft_run, steps, "optim")
    assert {state["step"] for state in optim["state"].values() if "step" in state} == {20 + steps}
    matrices = optim["param_groups"][2:]
    assert {group["weight_decay"] for group in matrices} == {0}
    assert {group["initial_lr"] for group in matrices} == {0.4 * 0.2}
    group = dict(kind="muon", initial_lr=2)
    for step, progress, lr, momentum in ((0, 0, 2, 0.85), (150, 0.25, 2, 0.9), (300, 0.5, 2, 0.95),
                                         (5000, 0.75, 1, 0.95), (9000, 1, 0, 0.95)):
        sft.set_schedules(types.SimpleNamespace(param_groups=[group]), step, progress)
        assert (group["lr"], group["momentum"]) == pytest.approx((lr, momentum))
    questions = [json.loads(line) for line in (sft_run / "questions.jsonl").open()]
    _, held_out, _ = sft.spelling_bee(sft.Config(words=meta["user_config"]["words"]), "val")
    assert questions == [{"source": "spellingbee", "messages": held_out(i)} for i in range(4)]


def test_a_checkpoint_of_the_public_repo_is_fine_tuned_without_rope(
        sft_base, sft_args, run_here, monkeypatch):
    """Its meta knows no tokenizer, hashes, recipe or end; its weights are bfloat16 in part."""
    seen = watch_rope(monkeypatch, sft)
    folder = sft_base / "base_checkpoints" / "drope"
    for field in ("tokenizer", "sha256", "steps", "recipe", "finished"):
        change_meta(folder, 20, lambda meta: meta.pop(field))
    weights = M.load_part(folder, 20, "model")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()
    torch.save(weights, folder / "model_000020.pt")
    assert run_here(sft, sft_args, sft_base)[0] == 0 and set(seen) == {False}
    _, meta = final(sft_base / "chatsft_checkpoints/drope_long")
    assert meta["loop_state"]["use_rope"] is False


def test_a_dry_run_shows_conversations_with_what_is_learnt_in_green(sft_home, sft_args, run_here):
    status, out = run_here(sft, (*sft_args, "--dry-run"), sft_home)
    assert status == 0 and "conversations        64 rows x 1 =        64" in out
    assert ("\033[90m<|bos|><|user_start|>what is apple 0?<|user_end|><|assistant_start|>\033[0m"
            "\033[32mapple is a fruit. <|assistant_end|>\033[0m") in out


def test_another_recipe_or_other_conversations_are_refused(sft_run, sft_args, tmp_path, refused):
    """Under a tag that is finished, too."""
    (tmp_path / "x.jsonl").write_text(json.dumps(chat("a", "b")))
    for option, value, says in (("--conversations", tmp_path / "x.jsonl", "conversations = "),
                                ("--init-lr-frac", 0.5, "init_lr_frac = 0.4, not 0.5")):
        args = (*sft_args, option, value)
        refused(sft, args, [str(sft_run), says, "--tag"], sft_run.parents[1])


@pytest.fixture
def sft_half_way(sft_run, sft_args, tiny_base, tmp_path):
    """(base folder, its folder of sft_args' files, the words of the command): that run, whose last
    checkpoint is gone."""
    base, files = share(tiny_base, tmp_path), tmp_path / "files"
    shutil.copytree(sft_run.parents[1] / "base_checkpoints", base / "base_checkpoints")
    shutil.copytree(sft_run, base / "chatsft_checkpoints" / "drope_long")
    M.checkpoint_files(base / "chatsft_checkpoints/drope_long", final(sft_run)[0])["meta"].unlink()
    shutil.copytree(Path(sft_args[3]).parent, files)
    return base, files, [str(word).replace(str(Path(sft_args[3]).parent), str(files))
                         for word in sft_args]


@pytest.mark.parametrize("name, words", [
    ("", ["resuming from step"]), ("words.txt", ["spelling = 30 rows x 1, sha256"]),
    ("mine_val.jsonl", ["conversations (validation) = 8 rows"]),
    ("mine.jsonl", ["conversations = "])])
def test_files_are_compared_by_content_and_may_move(sft_half_way, run_here, name, words):
    base, files, args = sft_half_way  # they have moved already
    if name:
        text = (files / name).read_text()
        (files / name).write_text(text.replace("apple", "grape"))
    status, said = run_here(sft, args, base)
    assert status == (1 if name else 0) and all(word in said for word in words), said
    assert "Use the same, or for a new run another --tag" in said or not name


def test_a_resumed_run_does_without_its_base_model(sft_half_way, run_here):
    base, _, args = sft_half_way
    shutil.rmtree(base / "base_checkpoints")
    assert run_here(sft, args, base)[0] == 0


def test_a_validation_set_in_which_no_token_counts_is_refused(sft_half_way, refused):
    base, files, args = sft_half_way
    shutil.rmtree(base / "chatsft_checkpoints")
    (files / "mine_val.jsonl").write_text(json.dumps(chat("q" * 500, "yo")))
    refused(sft, args, ["no conversation has an answer within its first 128 tokens"], base)


@pytest.mark.parametrize("change, words", [
    (dict(steps=99), ["at step 20 of 99: finish it first"]),
    (dict(tokenizer="another"), ["another tokenizer"]),
    (dict(user_config={}), ["learning rates", "embedding_lr"]),
    (dict(loop_state={}), ["if the model has RoPE", "loop_state.use_rope"])])
def test_a_base_model_that_will_not_do_is_refused(sft_base, sft_args, refused, change, words):
    change_meta(sft_base / "base_checkpoints/drope", 20, lambda meta: meta.update(change))
    refused(sft, sft_args, words, sft_base)


# ==== pretrain.py and sft.py: whatever happens to a run, it ends the same =========================

@pytest.fixture(params=["pretrain", "sft"])
def stage(request, drope_run, sft_run, sft_args, sft_base):
    """(module, words of the command, base folder, the run's folder there, an undisturbed run)"""
    if request.param == "sft":
        return sft, sft_args, sft_base, sft_base / "chatsft_checkpoints" / "drope_long", sft_run
    folder = sft_base / "base_checkpoints" / "drope"
    shutil.rmtree(folder)
    return pretrain, DROPE, sft_base, folder, drope_run


@pytest.mark.parametrize("stage, number, name, n, saved", [
    ("pretrain", signal.SIGINT, "accumulate_gradients", 13, 13),
    # The validation after steps 0 and 8, and at the switch with RoPE; the 4th is without RoPE
    ("pretrain", signal.SIGUSR1, "bits_per_byte", 4, 10),
    # The last step is saved before it is validated
    ("pretrain", signal.SIGHUP, "bits_per_byte", 6, 20), ("sft", signal.SIGHUP, "pack", 4, 12),
    ("sft", signal.SIGTERM, "accumulate_gradients", 5, 5)], indirect=["stage"])
def test_a_signal_saves_and_the_same_command_resumes(
        stage, monkeypatch, run_here, number, name, n, saved):
    """The signal comes in the n-th call of a function. A validation is not waited for."""
    (module, args, base, folder, reference), calls = stage, []
    owner = module if hasattr(module, name) else M.ValidationRows
    function = getattr(owner, name)

    def call(*args):
        calls.append(1)
        if len(calls) == n:
            signal.raise_signal(number)
        return function(*args)
    monkeypatch.setattr(owner, name, call)
    args = (*args, "--save-every", 999)
    status, output = run_here(module, args, base)
    assert status == M.INTERRUPTED == 75 and M.checkpoint_steps(folder) == [saved]
    assert output.endswith(f"stopped at step {saved}: {number.name}. The same command resumes from "
                           f"step {saved}\n")
    status, output = run_here(module, args, base)
    assert status == 0 and f"resuming from step {saved}" in output
    assert_same_run(reference, folder)


@pytest.mark.parametrize("kills", [
    2, pytest.param(int(os.environ.get("KILLS", 100)), marks=pytest.mark.slow)])
def test_a_run_killed_at_random_ends_in_the_same_tensors(stage, run_here, kills):
    """Some steps after its start, every third time in the middle of a save. One that came to its
    end before begins anew."""
    module, args, base, folder, reference = stage
    command, rng = (f"{module.__name__}.py", *args, "--save-every", 2), random.Random(1)
    for n in range(kills):
        with start(*command, base=base) as process:
            steps = rng.randint(1, 8)
            for line in process.stdout:
                steps -= line.startswith("step 0")
                if steps == 0:
                    break
            until = time.time() + (5 if n % 3 == 0 else rng.uniform(0, 0.1))
            while time.time() < until and process.poll() is None:
                if n % 3 == 0 and list(folder.glob(".*.tmp")):  # a file half written
                    break
            process.kill()
        newest = M.newest_checkpoint(folder)
        if newest and M.read_meta(folder, newest)["finished"]:
            shutil.rmtree(folder)
    assert run_here(module, command[1:], base)[0] == 0
    assert_same_run(reference, folder)


def test_a_run_moves_from_two_processes_to_one(stage, run_here):
    """The one takes two rows at a time. The optimizer's state is a file that any number of them can
    load."""
    module, args, base, folder, reference = stage
    script(f"{module.__name__}.py", *args, base=base, processes=2)
    step, meta = final(folder)
    assert meta["processes"] == 2
    assert_near(folder, reference)
    for path in M.checkpoint_files(folder, step).values():
        path.unlink()
    _, output = run_here(module, (*args, "--device-batch-size", 2), base)
    assert f"resuming from step {M.checkpoint_steps(folder)[-2]}" in output
    assert_near(folder, reference)


# ==== eval.py: base models beyond their training length ===========================================

SMALL = ev.Sizes((0.5, 1, 2, 4), prompts=10, documents=8)


def asked(answer, text):
    return [chat(text.format(word), answer) for word in ("a", "bb" * 20, "ccc")]


LETTERS = asked("B", "Which {}?\n- x=A\n- y=B\n- z=C\n\nRespond only with the letter.")
NUMBERS = asked([{"type": "text", "text": "so\n\n#### 1,234"}], "How many {}?")


def write_checkpoint(folder, model, step=10):
    """The folder of a run of 10 steps, which lost RoPE before step 5 if the model has none."""
    optimizer = types.SimpleNamespace(state_dict=lambda: {"state": {}, "param_groups": []})
    M.save_checkpoint(folder, step, model, optimizer, {}, dict(
        step=step, steps=10, finished=step == 10, val_bpb=1.2345, revision="abc123", user_config={},
        total_batch_size=1024, max_seq_len=model.config.sequence_len,
        model_config=asdict(model.config), loop_state={"use_rope": model.use_rope}))
    lines = [{"step": step, "val_bpb": 5 / (step + 1)} for step in (0, 5, 10)]
    if not model.use_rope:
        lines.insert(1, dict(step=5, switch=True, val_bpb_with_rope=0.9, val_bpb_without_rope=1.4))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [json.dumps({"source": source, "messages": messages}) + "\n"
             for source, some in (("mmlu", LETTERS), ("spellingbee", NUMBERS)) for messages in some]
    if "chatsft" in str(folder):
        (folder / "questions.jsonl").write_text("".join(lines))


def random_model(seed=0, use_rope=True, n_train=256):
    """Of bytes: it goes with a tokenizer without merges."""
    return small_model(seed, vocab=265, use_rope=use_rope, T=n_train)


@pytest.fixture(scope="session")
def eval_texts(tmp_path_factory):
    """Of a validation shard with 10 documents above 1,024 bytes."""
    base = tmp_path_factory.mktemp("texts")
    enc = write_tokenizer(base / "tokenizer")
    shard = base / "data" / "climbmix" / "shard_06542.parquet"
    return ev.Texts(write_shard(shard, some_texts(40, longest=2500)), "text", enc, SMALL)


def test_intervals_and_p_worked_by_hand():
    # 8 of 10: centre (8 + 1.9208) / 13.8416, half width 1.96 / 13.8416 x sqrt(1.6 + 0.9604)
    assert M.wilson(8, 10) == pytest.approx([0.8, 0.490157, 0.943319], abs=2e-6)
    assert M.wilson(0, 10) == pytest.approx([0.0, 0.0, 3.8416 / 13.8416])
    a = [True] * 9 + [False] + [True] * 50 + [False] * 7  # 9 to 1: only prompts that
    b = [False] * 9 + [True] + [True] * 50 + [False] * 7  # differ count
    assert ev.mcnemar(a, b) == ev.mcnemar(b, a) == 2 * (1 + 10) / 1024 and ev.mcnemar(a, a) == 1
    x = np.random.default_rng(1).normal(5, 1, 400)
    mean, low, high = ev.bootstrap(x, np.ones(400))
    assert mean == pytest.approx(x.mean())
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 20, abs=0.02)
    assert ev.bootstrap([3.0, 1.0], [1.0, 3.0]) == [1]  # a ratio of sums; too few for more
    assert [len(ev.bootstrap([1.0] * n, [1] * n)) for n in (9, 10)] == [1, 3]


@pytest.mark.parametrize("scaling", ["ntk", "by parts"])
def test_scaled_rope_changes_only_contexts_beyond_the_training_length(scaling):
    model, ids = random_model(), torch.randint(0, 265, (1, 512))
    half, once, long = model(ids[:, :128]), model(ids[:, :256]), model(ids)
    ev.set_arm(model, scaling, 0.0)
    assert torch.equal(model(ids[:, :128]), half) and torch.equal(model(ids[:, :256]), once)
    assert not torch.allclose(model(ids), long)
    ev.set_arm(model, "", 0.0)
    assert torch.equal(model(ids), long)
    tables = [M.rotary_tables(512, 64, "cpu"), ev.scaled_tables(512, 64, "cpu", 256, scaling)]
    plain, slower = [torch.atan2(sin[1], cos[1]) for cos, sin in tables]  # angles of position 1
    ratio = plain / slower
    assert ratio[[0, -1]].tolist() == pytest.approx([1, 2], abs=1e-4)  # fastest, slowest
    assert (ratio.diff() > -1e-4).all()


def test_bits_per_byte_are_those_of_the_last_tokens_and_c_has_the_least_loss(eval_texts):
    """c is fitted on all tokens beyond the training length, of texts that are not tested on."""
    model, n = random_model(), 32  # an eighth of the training length
    assert len(eval_texts.fit) == 2 and len(eval_texts.documents) == 8
    hay = eval_texts.enc.decode(eval_texts.hay)
    assert not any(document in eval_texts.documents for document in eval_texts.fit)
    assert not any(eval_texts.enc.decode(document) in hay for document in eval_texts.documents)
    summary, bits = ev.text_bits(model, eval_texts, [1, 4], False), {}
    for m in (1, 4):
        rows = torch.tensor([[256] + document[-256 * m:] for document in eval_texts.documents])
        logits = model(rows[:, :-1])[:, -n:]
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, -n:].flatten())  # a token is a byte
        bits[m] = loss.item() / math.log(2)
        assert summary[str(m)]["bpb"] == pytest.approx([bits[m]], rel=1e-5)  # no interval from 8
    cropped = ev.text_bits(model, eval_texts, [2, 4], True)
    assert cropped["4"]["bits"] == cropped["2"]["bits"] == summary["1"]["bits"]
    assert ev.change(summary["4"], cropped["4"])[0] == pytest.approx(bits[4] - bits[1], abs=1e-4)
    fit, expected = ev.fit_scale(model, eval_texts, [2, 4], ""), {}
    rows = torch.tensor([[256] + document[-1024:] for document in eval_texts.fit])
    for c in ev.SCALES:
        model.logn_scale = c
        logits = model(rows[:, :-1])[:, 256:]
        expected[c] = F.cross_entropy(logits.flatten(0, 1), rows[:, 257:].flatten()).item()
    assert fit["losses"] == pytest.approx(expected, rel=1e-5) and tuple(expected) == ev.SCALES
    assert fit["c"] == min(expected, key=expected.get)


@pytest.mark.parametrize("i", [0, 5, 9])
@pytest.mark.parametrize("kind, told, asked", [
    ("single", 1, 1), ("multi-key", 4, 1), ("multi-value", 4, 4), ("multi-query", 4, 4)])
def test_a_prompt_holds_needles_and_asks_for_them(eval_texts, kind, told, asked, i):
    random.seed(i)  # must not matter
    prompt, decode = ev.make_prompt(eval_texts, 900, kind, i), eval_texts.enc.decode
    ids, n_tail, answers, places = prompt
    assert len(ids) == 901 and ids[0] == 256 and ev.make_prompt(eval_texts, 900, kind, i) == prompt
    pattern = r"\nA secret number of (\w+) is (\d{4})"
    hidden = re.findall(pattern + r"\.\n", decode(ids[1:-n_tail]))
    tail, questions = decode(ids[-n_tail:]), re.findall(pattern, decode(ids[-n_tail:]))
    assert tail == ".".join(f"\nA secret number of {key} is {value}" for key, value in questions)
    assert len(set(hidden)) == len(hidden) == told and len(questions) == asked
    assert set(questions) <= set(hidden) and len({value for _, value in hidden}) == told
    assert len({key for key, _ in hidden}) == (told if kind in ("multi-key", "multi-query") else 1)
    assert kind != "multi-value" or questions == hidden  # in the order of the text
    assert [decode(ids[-n_tail:][answer]) for answer in answers] == [v for _, v in questions]
    assert sorted(decode(ids[place:place + 6]) for place in places) == sorted(
        f"{value}.\n" for _, value in questions)
    depth = (places[0] - 30) / 900 if asked == 1 else 0  # 5, 55 or 95% of the text, roughly
    assert asked > 1 or abs(depth - (i + 0.5) / 10) < 0.12 or told == 4
    blank = ev.make_prompt(eval_texts, 900, kind, i, without=True)
    assert len(blank.ids) == 901 and blank.ids[-n_tail:] == ids[-n_tail:] and not blank.places
    assert set(re.findall(pattern + r"\.\n", decode(blank.ids[1:-n_tail]))) == (
        set(hidden) - set(questions))


class Copier(torch.nn.Module):
    """Predicts what followed the longest earlier match of its last tokens; it sees `window`. With
    `blind` it does not read keys: what followed the last "is " is what it finds."""

    def __init__(self, window, blind=False):
        super().__init__()
        self.config, self.window, self.blind = M.GPTConfig(sequence_len=400), window, blind
        self.lm_head = torch.nn.Linear(1, 265)  # says the device and the vocabulary

    def forward(self, ids, last):
        logits = torch.zeros(1, last, 265)
        row = bytes(i % 256 for i in ids[0].tolist())
        for t in range(len(row) - last, len(row)):
            seen, size, place = row[max(0, t + 1 - self.window):t + 1], 1, -1
            while seen.rfind(seen[-size:], 0, len(seen) - 1) >= 0 and size < (
                    4 if self.blind else 99):
                place = seen.rfind(seen[-size:], 0, len(seen) - 1) + size
                size += 1
            if place >= 0:
                logits[0, t - len(row) + last, seen[place]] = 14.0
        return logits


def test_a_copier_finds_what_it_sees_and_cropping_has_that_ceiling(eval_texts):
    """In 4 times 400 tokens, the last 400 hold the needle in 2 of 10 places."""
    for window, cropped, rates in ((9999, False, [1, 1, 1]), (9999, True, [1, 0.5, 0.2]),
                                   (400, False, [1, 0.5, 0.2])):
        summary = ev.needles(Copier(window), eval_texts, [0.1, 1, 2, 4], cropped, "single", 10)
        assert list(summary) == ["1", "2", "4"]  # 40 tokens are no prompt
        assert [point["rate"][0] for point in summary.values()] == rates
        assert [point["ceiling"] for point in summary.values()] == [1, 0.5, 0.2]
        assert summary["1"]["gain"][1] > 0.5  # without the needle it cannot know


@pytest.mark.parametrize("kind", ["multi-key", "multi-query"])
def test_who_does_not_read_the_key_guesses(eval_texts, kind):
    """Distractors look like the needle, so such a model finds no more than one in four of them.
    One that reads keys finds all."""
    rates = {blind: ev.needles(Copier(9999, blind), eval_texts, [2], False, kind, 40)["2"]["rate"]
             for blind in (False, True)}
    assert rates[False][0] == 1 and rates[True][0] < 0.4


# ---- A whole evaluation, and what its table says -------------------------------------------------

def test_an_evaluation_resumes_and_gives_table_and_figures(tmp_path, monkeypatch, run_here):
    shard = tmp_path / "data" / "climbmix" / "shard_06542.parquet"
    write_shard(shard, some_texts(60, longest=2500))
    enc = write_tokenizer(tmp_path / "tokenizer")
    folder, dropped = [tmp_path / "base_checkpoints" / tag for tag in ("t", "t_drope_50")]
    write_checkpoint(folder, random_model())
    write_checkpoint(dropped, random_model(1, use_rope=False))
    monkeypatch.setattr(ev, "SCALES", (0.4,))
    monkeypatch.setattr(ev, "QUICK", replace(SMALL, prompts=2))
    args = ("t", "t_drope_50", "--quick")
    with monkeypatch.context() as patch:
        patch.setattr(ev, "needles", lambda *args: signal.raise_signal(signal.SIGINT))
        status, out = run_here(ev, args, tmp_path)
    half = json.loads((folder / "eval_quick.json").read_text())
    assert status == 1 and {arm: list(tests) for arm, tests in half["parts"].items()} == {
        "as trained": ["text"]}
    assert "t is not evaluated" in run_here(ev, ("t", "--quick", "--table"), tmp_path)[1]
    out += run_here(ev, args, tmp_path)[1]
    assert out.count("  as trained, text: ") == 2  # of both runs: one for a tag

    data, other = [json.loads((f / "eval_quick.json").read_text()) for f in (folder, dropped)]
    assert list(data["parts"]) == list(ev.ARMS) and list(other["parts"]) == list(ev.ARMS)[:3]
    tests = ["text", "single", "multi-key", "multi-value", "multi-query"]
    assert list(data["parts"]["NTK, c fitted"]) == ["fit", *tests]
    assert list(data["parts"]["as trained"]["single"]) == ["0.5", "1", "2", "4"]
    assert list(data["parts"]["as trained"]["multi-key"]) == ["1", "2", "4"]  # 128 are too few
    assert list(data["parts"]["NTK"]["multi-key"]) == ["2", "4"]  # up to 1x all are the same
    model = M.load_model(dropped)[0]  # evaluated without RoPE
    assert data["key"]["use_rope"] and not other["key"]["use_rope"] and not model.use_rope
    expected = ev.text_bits(model, ev.Texts(shard, "text", enc, SMALL), [1], False)["1"]["bpb"]
    assert other["parts"]["as trained"]["text"]["1"]["bpb"] == pytest.approx(expected)
    table = (tmp_path / "eval" / "results_quick.md").read_text()
    rows = [line.strip("| ").split(" | ")[:3] for line in table.splitlines() if line[:3] == "| t"]
    both = [[tag, arm, "0.4*" if "fitted" in arm else "0"] for tag, parts in
            (("t", data["parts"]), ("t_drope_50", other["parts"])) for arm in parts]
    assert rows == 5 * [["tag", "arm", "c"], *both]
    assert " at 4x:\n\n- multi-key: " in table and "\n- text: " in table
    assert "documents are too few for an interval" in table
    for name in ("contexts", "drop", "training"):
        assert (tmp_path / "eval" / f"{name}_quick.png").read_bytes()[:4] == b"\x89PNG"

    with monkeypatch.context() as patch:
        for name in ("needles", "text_bits", "fit_scale"):
            patch.setattr(ev, name, lambda *args: pytest.fail("tested again"))
        patch.setattr(ev, "draw_all", lambda *args: None)  # slow
        assert table in run_here(ev, args, tmp_path)[1]
    write_checkpoint(folder, random_model(5))  # the same step, other weights
    _, out = run_here(ev, (*args, "--table"), tmp_path)
    assert f"{folder / 'eval_quick.json'} belongs to another checkpoint" in out
    for name, result in (("needles", {}), ("text_bits", {}), ("fit_scale", dict(c=0.4, n=1))):
        monkeypatch.setattr(ev, name, lambda *args, result=result: result)
    _, out = run_here(ev, args, tmp_path)
    assert "belongs to another checkpoint" in out
    assert len(re.findall(r"\n  .*, multi-key: \d+ s", out)) == 7
    assert M.folder_of("base", "t_drope_50_long") == dropped  # the base model of a long tag


def test_another_validation_file_than_that_of_the_run_is_refused(sft_base, tiny_base, tmp_path,
                                                                refused):
    """Also one of the same size; and one that is gone."""
    (tmp_path / "data").unlink()
    shutil.copytree(tiny_base / "data", tmp_path / "data")
    file = tmp_path / "data" / "climbmix" / "shard_06542.parquet"
    change_meta(tmp_path / "base_checkpoints" / "drope", 20,
                lambda meta: meta["user_config"].update(data_dir=str(file.parent)))
    damage(file)
    for _ in range(2):
        refused(ev, ["drope", "--quick"], [str(file), "is not the file that the run"], tmp_path)
        file.unlink(missing_ok=True)


@pytest.mark.parametrize("words, says", [
    ("nothing", "no checkpoint in"), ("--table t tt", "tt is not evaluated"),
    ("cut --table", "eval.json is damaged"), ("empty --table", "eval.json is damaged"),
    ("t --quick", "with another tokenizer"), ("short --quick", "256 tokens")])
def test_eval_refuses_and_keeps_what_is_there(tmp_path, refused, words, says):
    write_tokenizer(tmp_path / "tokenizer", [b"th"] if words == "t --quick" else [])
    write_shard(tmp_path / "data" / "climbmix" / "shard_06542.parquet", ["short"] * 40)
    base = tmp_path / "base_checkpoints"
    for tag in ("t", "short", "cut", "empty"):
        write_checkpoint(base / tag, random_model())
    results = M.Results(base / "t" / "eval.json", dict(sha256=M.weights_hash(base / "t", 10)))
    for arm in ("as trained", "cropped", "c fitted"):
        results.part([arm, "text"], dict)
    (base / "cut" / "eval.json").write_text('{"key": {"step"')
    (base / "empty" / "eval.json").write_text('{"parts": []}')
    M.atomic_write(tmp_path / "eval" / "results.md", "good")
    refused(ev, words.split(), [says], base=tmp_path)
    assert [path.read_text() for path in (tmp_path / "eval").iterdir()] == ["good"]


def of_40(found, use_rope, bits, arm="c fitted", texts="same"):
    """A base model that found so many of 40 needles at 4x; cropped, it found 8."""
    def summaries(found, bits):
        rates = {"rate": M.wilson(found, 40), "found": [float(i < found) for i in range(40)]}
        bits = [bits + i % 2 for i in range(12)]
        text = {"n": 12, "bpb": ev.bootstrap(bits, [4] * 12), "bits": bits, "bytes": [4] * 12}
        return {"multi-key": {"4": rates}, "text": {"4": text}}
    parts = {"as trained": {}, "cropped": summaries(8, 6), arm: summaries(found, bits)}
    return {"key": dict(use_rope=use_rope, conditions=texts), "parts": parts}


def test_the_conclusion_compares_the_best_arm_with_the_best_control():
    """Controls: cropping and what has RoPE. Models tested on other texts are not compared."""
    mine, other = of_40(30, False, 5), of_40(39, True, 1, "NTK", texts="other")
    for ntk, bits, needles, text in (
            (15, 7, "0.750 (a, c fitted), best control 0.375 (b, NTK): significantly better "
             "(McNemar's test, p = 6.1e-05)", "1.375 (a, c fitted), best control 1.625 (a, cropped)"
             ": significantly better (paired interval of the difference: -0.250 [-0.250, "),
            (28, 5, "0.750 (a, c fitted), best control 0.700 (b, NTK): no significant", "1.375 (a, "
             "c fitted), best control 1.375 (b, NTK): no significant difference"),
            (39, 4, "best control 0.975 (b, NTK): significantly worse", "best control 1.125 (b, "
             "NTK): significantly worse")):
        lines = ev.conclude({"a": mine, "b": of_40(ntk, True, bits, "NTK"), "c": other}, "4")
        _, head, _, needle_line, text_line, _, other_head, *_ = lines
        assert (head, other_head) == ("a, b at 4x:", "c at 4x:")
        assert needles in needle_line and text in text_line, lines
    lines = ev.conclude({"b": of_40(15, True, 7, "NTK")}, "4")  # RoPE alone: against cropping
    assert lines[3].startswith("- multi-key: 0.375 (b, NTK), best control 0.200 (b, cropped)")
    nothing = of_40(0, False, 7)
    nothing["parts"]["cropped"] = nothing["parts"]["c fitted"]
    assert ev.conclude({"a": nothing}, "4")[3] == "- multi-key: no arm finds anything"


def test_the_figures_tell_a_recalibrated_model_from_one_with_rope():
    base = {tag: {"key": {"use_rope": use_rope}} for tag, use_rope in (
        ("d1_9tpp", True), ("d1_9tpp_drope_50", False), ("mine", False))}
    assert {family: [percent for percent, *_ in members]
            for family, members in ev.families(base).items()} == {
        "d1_9tpp": [100, 50], "mine": [None]}


def test_up_to_1x_an_arm_is_the_model_as_trained_and_c_0_is_no_other_arm():
    parts = {"as trained": {"text": {"1": "a", "4": "b"}}, "cropped": {"text": {"4": "x"}},
             "c fitted": {"fit": {"c": 0.2}, "text": {"4": "c"}}, "NTK": {"text": {"4": "d"}},
             "NTK, c fitted": {"fit": {"c": 0}}, "NTK by parts": {}}
    assert {arm: ev.tested({"parts": parts}, arm, "text") for arm in parts} == {
        "as trained": {"1": "a", "4": "b"}, "cropped": {"1": "a", "4": "x"},
        "c fitted": {"1": "a", "4": "c"}, "NTK": {"1": "a", "4": "d"},
        "NTK, c fitted": {"1": "a", "4": "d"}, "NTK by parts": {"1": "a"}}


# ==== chat.py: chat models ========================================================================

@pytest.mark.parametrize("call, result", [
    ("2+3*4", "14"), ("(1.5 - 0.5) / 4", "0.25"), ("10/2", "5"), ("-3*2", "-6"), ("7//2", "3"),
    ("7 % 4", "3"), ("0.1+0.2", "0.3"), ("100*1.1", "110"), ("1/100000", "0.00001"),
    ("-0.0", "0"), ("123456789012345", "123456789012345"), ("+-+5", "-5"), (" 50*2 ", "100"),
    ("1+" * 99 + "1", "100"),
    ("'strawberry'.count('r')", "3"), ('"café".count("é")', "1")])
def test_the_calculator_works_out(call, result):
    assert chat_py.calculator(call) == result


@pytest.mark.parametrize("call", [
    "", "x", "print(1)", "__import__('os').system('true')", "int('5')", "()", "'a'.__class__",
    "'a'.count('a').__class__", "'a'.count('a', 0)", "'a'.upper().count('A')", "f'{x}'.count('1')",
    "'a'*9", "'a'.count('a')+1", "(1).real", "1 if 1 else 2", "1 < 2", "(1,2)", "[1]", "{1}",
    "lambda: 1", "x := 1", "1; 2", "1\n2", "1\0", "\ud800", "...", "1..", "0x10", "1e9", "1j",
    "1_0", "2**3", "2* *3", "9**9**9", "1/0", "5 % 0", "(1)(2)", "1 2", "007", "٣+4", "9" * 60,
    "9" * 5000, "99999999*99999999", "(" * 150 + "1" + ")" * 150, "-" * 199 + "x", "10+" * 100])
def test_the_calculator_refuses_all_but_arithmetic_and_count(call, monkeypatch):
    def checked(text, names):
        assert re.fullmatch(r"[\d.+\-*/%() ]*", text) and "**" not in text and len(text) <= 200
        return eval(text, names)
    monkeypatch.setattr(chat_py, "eval", checked, raising=False)  # no name reaches Python's own
    assert chat_py.calculator(call) is None


@pytest.fixture
def bot(exported, monkeypatch):
    """A random chat model, as chat.py has it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(exported))
    return chat_py.Chat("d3_9tpp", M.setup_env(compile=0))


def script_of(monkeypatch, *answers):
    """Makes a model say these ids, answer after answer, then <|assistant_end|> for ever; the last
    of the texts it was given are kept in the list that is returned."""
    seen = []

    def generate(model, texts, n, choose=None, cache=None):
        said = [list(answer) for answer in answers[len(seen):len(seen) + len(texts)]]
        seen.extend(list(text) for text in texts)
        for _ in range(n):
            ids = [answer.pop(0) if answer else HF_STOP for answer in said]
            yield ids
    monkeypatch.setattr(chat_py, "generate", generate)
    return seen


def test_the_python_tool_answers_a_call(bot, enc, monkeypatch):
    """After <|python_end|> the ids of the result are forced, whatever the model says. What stands
    outside of answers ends one."""
    def written(text):
        script_of(monkeypatch, enc.encode(text, allowed_special="all") + [65] * 40)
        return enc.decode([ids[0] for ids in bot.answer([[1, 2]], 40)])
    assert written("x<|python_start|>6*7<|python_end|>").startswith(
        "x<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>A")
    assert "<|output_start|>0.75<|output_end|>" in written("<|python_start|>(1+2)/4<|python_end|>")
    for call in ("<|python_start|>os.x()<|python_end|>", "<|python_end|>6*7<|python_start|>"):
        assert "output" not in written(call)  # refused, and not finished
    for name in ("bos", "user_start", "user_end", "assistant_start", "assistant_end"):
        assert written(f"so<|{name}|>") == "so<|assistant_end|>"


def test_answers_are_those_of_the_model_and_of_a_row_alone(bot, enc):
    def prompt(text):
        return sft.render(enc, chat(text))[0] + [enc.encode_single_token("<|assistant_start|>")]

    letters = [(question["content"], "B") for question, _ in LETTERS]
    records = chat_py.score(bot, letters, 0, 2)["examples"]
    for record in records:  # the most likely of A, B and C
        logits = bot.model(torch.tensor([prompt(record["question"])]))[0, -1]
        best = max("ABC", key=lambda letter: logits[enc.encode_single_token(letter)])
        assert record["answer"] == best and record["right"] == (best == "B")
    numbers = [(question["content"], "1234") for question, _ in NUMBERS]
    together = chat_py.score(bot, numbers, 24, 3)["examples"]
    assert together == chat_py.score(bot, numbers, 24, 1)["examples"] and len(together) == 3
    text = prompt(numbers[0][0])
    expected = [ids[0] for ids in M.generate(bot.model, [text], 24)]
    assert expected[0] < 503 and together[0]["answer"].startswith(enc.decode(expected[:1]))


def test_sampling_draws_from_the_most_likely_ids_and_a_seed_repeats_it():
    logits = torch.randn(5, 99)
    draws = torch.stack([chat_py.sampler(1.0, 3, seed)(logits) for seed in range(200)], 1)
    for row, drawn in zip(logits, draws):
        assert set(drawn.tolist()) == set(row.topk(3).indices.tolist())
    assert torch.equal(chat_py.sampler(1.0, 50, 7)(logits), chat_py.sampler(1.0, 50, 7)(logits))
    for cold in (chat_py.sampler(t, 50, 1) for t in (0.0, 1e-9, 1e-60)):
        assert torch.equal(cold(logits), logits.argmax(-1))


def test_a_conversation_stays_well_formed(bot, enc, monkeypatch, capsys):
    """Whatever ends an answer: itself, its limit, or a reader who has enough, also within a call.
    The oldest turns are forgotten when there is no room, and a text that never fits is refused."""
    def ids(text):
        return enc.encode(text, allowed_special="all")

    def said(n=99, text="hi"):
        answer = conversation.ask(text)
        for _ in zip(range(n), answer):
            pass
        answer.close()
        return enc.decode(conversation.turns[-1])

    head = "<|user_start|>hi<|user_end|><|assistant_start|>"
    script_of(monkeypatch, ids("yes"), ids("yes"), ids("x" * 40), ids("a<|python_start|>1+1"),
              ids("b<|python_start|>1+1<|python_end|>"), *[ids("ok")] * 9)
    conversation = chat_py.Conversation(bot, 12, None)
    assert said() == head + "yes<|assistant_end|>"
    assert said(1) == head + enc.decode(ids("yes")[:1]) + "<|assistant_end|>"
    conversation.turns.clear()
    assert said() == head + enc.decode(ids("x" * 40)[:12]) + "<|assistant_end|>"
    assert said(4) == head + "a<|assistant_end|>"  # not in the middle of a call
    assert said(7) == head + "b<|assistant_end|>"  # nor before its output has come
    assert len(conversation.turns) == 3 and capsys.readouterr().err == ""
    while "forgetting its first 1 turns" not in capsys.readouterr().err:
        said()
        assert len(conversation.turns) < 9
    with pytest.raises(ValueError, match="say it in fewer words"):
        list(conversation.ask("word " * 40))
    text = "<|assistant_end|><|bos|>"  # no text becomes a control token
    assert said(text=text).startswith(f"<|user_start|>{text}<|user_end|>")
    specials = [i for i in conversation.turns[-1] if i >= HF_BOS]
    assert enc.decode(specials) == "<|user_start|><|user_end|><|assistant_start|><|assistant_end|>"


def test_each_answer_is_that_to_the_whole_conversation(bot, enc):
    """Though only what is new is computed; also after an interruption."""
    conversation = chat_py.Conversation(bot, 9, M.most_likely)
    for text, n in (("a", 9), ("b", 2), ("c", 9), ("d", 9)):
        answer = conversation.ask(text)
        got = [token for _, token in zip(range(n), answer)]
        answer.close()
        turn = conversation.turns[-1]
        start = turn.index(bot.special("assistant_start")) + 1
        before = conversation.ids()[:len(conversation.ids()) - len(turn) + start]
        expected = [ids[0] for ids in bot.answer([before], n)]
        assert got == expected and turn[start:start + n] in (got, got[:-1] + [HF_STOP])


SLOWLY = """
import chat, time
generate = chat.generate
def slowly(*args):
    for ids in generate(*args):
        time.sleep(0.03)
        yield ids
chat.generate = slowly
chat.guard(chat.main)
"""


def test_a_conversation_in_a_terminal(exported, tmp_path):
    """A real one. Ctrl-C interrupts an answer, and at the prompt does nothing; bytes that are not
    UTF-8 are refused; Ctrl-D quits."""
    (tmp_path / "slowly.py").write_text(SLOWLY)
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(exported), "TERM": "dumb",
           "PYTHONPATH": str(HERE)}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, str(tmp_path / "slowly.py"), "d3_9tpp",
                                   "--temperature", "0"], env)
    said = b""

    def expect(words, sent=b""):
        """Sends that (Ctrl-C again and again) until these words come, returns what came before."""
        nonlocal said
        os.write(terminal, sent)
        start, sent_at = time.time(), time.time()
        while words not in said:
            assert time.time() < start + 60, said
            if select.select([terminal], [], [], 0.2)[0]:
                said += os.read(terminal, 4096)
            elif sent == b"\x03" and time.time() > sent_at + 1:  # came before input() was ready
                os.write(terminal, sent)
                sent_at = time.time()
        before, said = said.split(words, 1)
        return before

    expect(b"\n> ")
    first = expect(b"\n> ", b"hello\n").split(b"hello\r\n", 1)[1].strip()
    expect(b"hello\r\n", b"hello\n")
    while len(said.strip()) < 3:  # the same answer again, interrupted
        said += os.read(terminal, 4096)
    half = expect(b"\n> ", b"\x03").replace(b"^C", b"").strip()
    assert 3 <= len(half) < len(first)
    expect(b"not UTF-8", b"\xff\xfe\n")
    expect(b"> ", b"/clear\n")
    expect(b"hello\r\n", b"hello\n")
    assert expect(b"\n> ").strip() == first
    expect(b"\n> ", b"\x03")  # at the prompt
    os.write(terminal, b"\x04")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_one_answer_for_scripts(exported, run_here, monkeypatch):
    """To --prompt or to stdin. Without a question, or a model, it says so."""
    args = ["d3_9tpp", "--temperature", 0, "--max-tokens", 8]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    _, answer = run_here(chat_py, [*args, "--prompt", "hello"], exported)
    for text, wanted in ((b"hello\n", answer), (b" \n", "nothing to answer"),
                         (b"\xff" * 200, "say it in fewer words")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        status, said = run_here(chat_py, args, exported)
        assert wanted in said and status == (wanted != answer)
    for args, words in ((["no", "--prompt", "x"], "no checkpoint in"), ([], "which model?"),
                        (["a", "b"], "which model?"), (["d3_9tpp"], "nothing to answer")):
        monkeypatch.setattr(sys, "stdin", None)  # closed
        status, said = run_here(chat_py, args, exported)
        assert status == 1 and words in said.splitlines()[-1], said


def test_scores_are_kept_and_shown_in_one_table(own, monkeypatch, run_here):
    args = ("d3_9tpp", "d3_9tpp_drope_50", "--score", "--max-tokens", 8)
    _, out = run_here(chat_py, args, own)
    parts = json.loads((own / "chatsft_checkpoints/d3_9tpp/chat.json").read_text())["parts"]
    cells = ["{:.3f} [{:.3f}, {:.3f}] of 3".format(*parts[name]["rate"])
             for name in ("mmlu", "spellingbee")]  # no GSM8K
    stops = f"{parts['spellingbee']['stops'][0]:.2f}"
    assert f"| d3_9tpp | {cells[0]} | - | {cells[1]} | {stops} |" in out and out.count("\n|") == 4
    monkeypatch.setattr(chat_py, "score", lambda *args: pytest.fail("asked again"))
    assert run_here(chat_py, args, own)[1] == out[out.index("| right"):]
    questions = own / "chatsft_checkpoints/d3_9tpp/questions.jsonl"
    questions.write_text("")
    _, out = run_here(chat_py, args[:1] + args[2:], own)
    assert "no questions in" in out and "| d3_9tpp | - | - | - | - |" in out


@pytest.mark.parametrize("text, number", [
    ("so #### 18", "18"), ("#### 1,234.", "1234"), ("#### -5", "-5"), ("B", "B"), ("BC", None),
    ("a #### 1 b #### 2.5", "2.5"), ("18", None), ("#### x", None)])
def test_the_final_answer(text, number):
    parts = [{"type": "python", "text": "1"}, {"type": "text", "text": text}]
    assert chat_py.final_answer(text) == chat_py.final_answer(parts) == number


# ==== export_hf.py: exports, and publishing them ==================================================

TAGS = {"d3_9tpp": True, "d3_9tpp_drope_50": False, "d3_9tpp_drope_50_long": False}
HF_BOS, HF_STOP = 503, 507  # <|bos|> and <|assistant_end|>, of 512 ids


def export_model(seed, use_rope):
    """With random weights so large that attention and softcap matter."""
    return small_model(seed, 3, 512, use_rope, 0.15, T=64)


@pytest.fixture(scope="session")
def exported(tok_made, tmp_path_factory):
    """A base folder: a tokenizer, the checkpoints of three tags, and their exports."""
    base = tmp_path_factory.mktemp("exports")
    shutil.copytree(tok_made, base / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        for seed, (tag, use_rope) in enumerate(TAGS.items()):
            if not tag.endswith("_long"):  # it shares the base of the others
                write_checkpoint(base / "base_checkpoints" / tag, export_model(seed, use_rope))
            write_checkpoint(base / "chatsft_checkpoints" / tag, export_model(10 + seed, use_rope))
            export_hf.main(["--tag", tag])
    return base


@pytest.fixture
def own(exported, tmp_path, monkeypatch):
    """A copy of that folder, to break things in."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "own"))
    return shutil.copytree(exported, tmp_path / "own")


def visible(folder):
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_export_and_its_config(exported):
    common = {"config.json", "export.json", "generation_config.json", "model.safetensors",
              "modeling_nanochat.py", "tokenizer.json", "tokenizer_config.json"}
    for stage, more, stop in (("base", set(), HF_BOS), ("sft", {"chat_template.jinja"}, HF_STOP)):
        folder = exported / f"hf_{stage}" / "d3_9tpp"
        assert visible(folder) == common | more
        assert json.loads((folder / "export.json").read_text()) == {"step": 10, "finished": True}
        code = "modeling_nanochat.NanoChat"
        assert json.loads((folder / "config.json").read_text()) == {
            "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat",
            "auto_map": {"AutoConfig": code + "Config", "AutoModel": code + "Model",
                         "AutoModelForCausalLM": code + "ForCausalLM"},
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
            "hidden_act": "swiglu", "rms_norm_eps": 1e-6, "use_rope": True, "logn_scale": 0.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "final_logit_softcapping": 15.0, "max_position_embeddings": 32768,
            "original_max_position_embeddings": 64, "tie_word_embeddings": False,
            "use_cache": True, "bos_token_id": HF_BOS, "eos_token_id": stop, "pad_token_id": stop,
            "dtype": "bfloat16"}


def test_rope_stays_off_from_checkpoint_to_fine_tuning_to_both_exports(sft_run, run_here):
    """Of real runs: d1, with RoPE for 10 of 20 steps, fine-tuned as drope_long."""
    base = sft_run.parents[1]
    assert run_here(export_hf, ["--tag", "drope_long"], base)[0] == 0
    for stage, tag, export in (("base_checkpoints", "drope", "hf_base"),
                               ("chatsft_checkpoints", "drope_long", "hf_sft")):
        ours, meta = M.load_model(base / stage / tag)
        assert meta["finished"] and meta["loop_state"]["use_rope"] is ours.use_rope is False
        theirs, ids = load(base / export / tag), torch.randint(0, ours.config.vocab_size, (2, 90))
        ours = ours.bfloat16().float()  # as the export has the weights
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
        ours.use_rope = True
        assert (theirs(ids).logits - ours(ids)).abs().max() > 1e-3  # it would be noticed
    base_tag, said, chat_tag, chat_said = run_here(pretrain, ["--status"], base)[1].splitlines()[:4]
    assert base_tag.endswith("base_checkpoints/drope, exported")
    assert re.sub(r"\d\.\d{3}\b", "X", said.strip()) == (
        "finished at step 20, val bpb X, RoPE dropped at step 10 (val bpb X with it, X without)")
    assert chat_tag.endswith("/drope_long, exported")
    assert re.fullmatch(r" +finished at step \d+, .*, RoPE off", chat_said)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("name, harm", [
    (None, None), ("model.safetensors", truncate), ("tokenizer.json", Path.unlink),
    ("export.json", truncate)])
def test_a_whole_export_is_kept_and_a_damaged_one_made_again_to_the_byte(own, capsys, name, harm):
    folder = own / "hf_sft" / "d3_9tpp"
    before, inode = contents(folder), folder.stat().st_ino
    if name:
        harm(folder / name)
    export_hf.main(["--tag", "d3_9tpp", "--stage", "sft"])
    said = capsys.readouterr()
    again, kept = "exporting again" in said.err, "skipped" in said.out
    assert (again, kept) == ((True, False) if name else (False, True))
    assert contents(folder) == before and (folder.stat().st_ino == inode) == kept


@pytest.mark.parametrize("end", ["", "interrupted", "killed"])
def test_an_export_keeps_the_files_of_others_and_is_never_gone(own, monkeypatch, end):
    """Whatever ends it between the two renames, the old export is there, or comes back."""
    folder, before = own / "hf_base" / "d3_9tpp", contents(own / "hf_base" / "d3_9tpp")
    (folder / "NOTES.md").write_text("mine")
    write_checkpoint(own / "base_checkpoints" / "d3_9tpp", export_model(7, True))
    if end:
        rename = os.rename

        def renames(source, dest):
            if Path(source).name == "new":
                raise KeyboardInterrupt
            rename(source, dest)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "rename", renames)
            if end == "killed":
                patch.setattr(export_hf, "settle", lambda temp, dest, ours: None)
            export_hf.main(["--tag", "d3_9tpp", "--stage", "base"])
        if end == "interrupted":
            assert contents(folder) == {**before, "NOTES.md": b"mine"}
    export_hf.main(["--tag", "d3_9tpp", "--stage", "base"])
    after = contents(folder)
    assert after.pop("NOTES.md") == b"mine" and after.keys() == before.keys()
    assert after["model.safetensors"] != before["model.safetensors"]
    assert not list(folder.parent.glob(".*.temp"))


def test_a_plain_file_is_not_replaced_by_an_export(own, refused):
    shutil.rmtree(own / "hf_base")
    M.atomic_write(own / "hf_base" / "d3_9tpp", "mine")
    args = ["--tag", "d3_9tpp", "--stage", "base"]
    refused(export_hf, args, ["is a file, but exports are folders"], own)
    assert (own / "hf_base" / "d3_9tpp").read_text() == "mine"


def test_an_export_follows_its_checkpoint_and_of_two_at_once_one_waits(own):
    write_checkpoint(own / "base_checkpoints" / "d3_9tpp", export_model(5, True))
    jobs = [start("export_hf.py", "--tag", "d3_9tpp", base=own) for _ in range(2)]
    out = "".join(job.communicate()[0] for job in jobs)
    assert out.count(" -> ") == 1 and out.count("skipped") == 3, out
    ours, _ = M.load_model(own / "base_checkpoints" / "d3_9tpp", dtype=torch.bfloat16)
    assert torch.equal(load(own / "hf_base" / "d3_9tpp").lm_head.weight,
                       ours.lm_head.weight[:512].bfloat16().float())


def test_an_unfinished_model_replaces_no_export_and_is_not_published(own, capsys):
    base, folder = own / "base_checkpoints" / "d3_9tpp", own / "hf_base" / "d3_9tpp"
    last, before = M.checkpoint_files(base, 10), contents(folder)
    damaged, meta = last["model"].read_bytes()[1:], last["meta"].read_bytes()
    write_checkpoint(base, export_model(5, True), step=4)
    last["model"].write_bytes(damaged)  # so step 4 is the newest
    last["meta"].write_bytes(meta)
    for more in ([], ["--push", "me", "--dry-run"]):
        with pytest.raises(SystemExit, match="step 4 of 10.*finish"):
            export_hf.main(["--tag", "d3_9tpp", *more])
    assert contents(folder) == before
    capsys.readouterr()
    export_hf.main(["--push", "me", "--all", "--dry-run"])
    out = capsys.readouterr().out
    assert "skipping d3_9tpp: " in out and out.count("me/nanochat-") == 8
    shutil.rmtree(folder)  # without one it may be looked at
    export_hf.main(["--tag", "d3_9tpp", "--stage", "base"])
    assert json.loads((folder / "export.json").read_text())["finished"] is False


def test_what_cannot_be_exported_leaves_the_earlier_export(own, refused, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    before, folder = contents(own / "hf_base" / "d3_9tpp"), own / "base_checkpoints" / "d3_9tpp"
    args, meta = ["--tag", "d3_9tpp", "--stage", "base"], M.read_meta(folder, 10)
    larger = {"model_config": {**meta["model_config"], "vocab_size": 640}}
    for change, words in (({"loop_state": {}}, ["use_rope", "meta_000010.json"]),
                          ({"tokenizer": "other"}, ["tokenizer"]), (larger, ["512", "640"])):
        change_meta(folder, 10, lambda now: now.update({**meta, **change}))
        refused(export_hf, args, words, own)
    write_checkpoint(folder, export_model(5, True))
    monkeypatch.setattr(export_hf, "atomic_write", full)
    refused(export_hf, args, ["No space left", "config.json"], own)
    assert contents(own / "hf_base" / "d3_9tpp") == before
    assert visible(own / "hf_base") == {"d3_9tpp", "d3_9tpp_drope_50"}


def test_push_fills_four_repositories(online, own, capsys):
    push = ["--tag", "d3_9tpp_drope_50", "--push", "me"]
    export_hf.main(push + ["--dry-run"])
    assert not online.log and capsys.readouterr().out.count("me/nanochat-d3-9tpp-drope-50-") == 4
    weights = own / "hf_sft" / "d3_9tpp_drope_50" / "model.safetensors"
    good = weights.read_bytes()
    truncate(weights)  # it is mended before it is sent
    online.damage = "model_000010.pt"  # what arrived damaged is sent again
    export_hf.main(push)
    said = capsys.readouterr()
    assert "model_000010.pt on the hub is not what was sent" in said.err
    assert "hf_secret" not in said.out + said.err and not online.private
    base, native, hf_base, hf_chat = (online.repos[f"me/nanochat-d3-9tpp-drope-50-{kind}"]
                                      for kind in ("base", "sft", "hf-base", "hf-sft"))
    assert set(native) == set(base) | {"questions.jsonl"} == {
        "README.md", "model_000010.pt", "meta_000010.json", "optim_000010_rank0.pt",
        "metrics.jsonl", "questions.jsonl", "tokenizer/tokenizer.pkl", "tokenizer/token_bytes.pt"}
    model = own / "base_checkpoints" / "d3_9tpp_drope_50" / "model_000010.pt"
    assert base["model_000010.pt"] == model.read_bytes() != native["model_000010.pt"]
    assert set(hf_base) == {"README.md", *visible(own / "hf_base" / "d3_9tpp_drope_50")}
    assert hf_chat["model.safetensors"] == good == weights.read_bytes()
    assert hf_chat["README.md"].startswith(b"---\nlicense: mit\n")
    assert pickle.loads(base["tokenizer/tokenizer.pkl"]).n_vocab == 512  # made a moment ago
    nbytes = torch.load(io.BytesIO(base["tokenizer/token_bytes.pt"]), weights_only=True).tolist()
    assert nbytes[:256] == [1] * 256 and nbytes[503:] == [0] * 9

    online.log.clear()  # again: only what the hub has otherwise
    hf_chat["config.json"] = b"{}"
    export_hf.main(push)
    assert sum("/commit/" in path for path in online.log) == 1
    assert "hf-sft: published; its hashes" in capsys.readouterr().out


def test_who_may_publish_and_read(online, own, refused, monkeypatch):
    push = ["--tag", "d3_9tpp", "--push", "me", "--private"]
    for status in (401, 403):
        online.refuse = status
        refused(export_hf, push, ["HF_TOKEN", "write"], own)
        refused(export_hf, ["--pull", "me/nanochat-d3-9tpp"], ["HF_TOKEN"], own)
    assert len(online.log) < 16  # retries would be ten times as many
    online.refuse = None
    export_hf.main(push)
    assert online.private == set(online.repos) and len(online.repos) == 4
    online.private.clear()
    refused(export_hf, push, ["me/nanochat-d3-9tpp-base", "public"], own)


def as_the_nanochat_repo_has_it(repos, tag):
    """Renames a tag's repositories, and takes from the native ones what only we write."""
    for kind, folder in M.FOLDERS.items():
        suffix = folder.replace("hf_", "hf-")
        files = repos.pop(export_hf.repo_name("me", tag, kind))
        repos[f"me/{tag.replace('_', '-')}-{suffix}"] = files
        if "meta_000010.json" in files:
            meta = json.loads(files["meta_000010.json"])
            for field in ("loop_state", "sha256", "steps", "finished", "revision"):
                del meta[field]
            files["meta_000010.json"] = json.dumps(meta).encode()
            del files["metrics.jsonl"]
            files.pop("questions.jsonl", None)


@pytest.mark.parametrize("public", [False, True])
def test_pull_brings_a_tag_back(online, own, tmp_path, monkeypatch, capsys, public):
    """A long tag with a fractional horizon, as we publish it and as the nanochat repo does. Its
    base was published without the _long."""
    tag, name, back = "d3_2.5tpp_drope_50_long", "me/nanochat-d3-2.5tpp-drope-50", tmp_path / "back"
    for stage, new in (("base_checkpoints", tag[:-5]), ("chatsft_checkpoints", tag)):
        shutil.move(own / stage / "d3_9tpp_drope_50", own / stage / new)
    export_hf.main(["--tag", tag, "--push", "me"])
    if public:
        as_the_nanochat_repo_has_it(online.repos, tag)
    base = "me/d3-2.5tpp-drope-50{}-base_checkpoints" if public else name + "{}-base"
    online.repos[base.format("")] = online.repos.pop(base.format("-long"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(back))
    online.log.clear()
    capsys.readouterr()
    online.faults = {"model_000010.pt": ["corrupt"]}
    export_hf.main(["--pull", f"{name}-long"])
    assert not any("tokenizer.pkl" in path for path in online.log)
    assert capsys.readouterr().out.count("use_rope None; set to False") == 2 * public
    export_hf.main(["--tag", tag])
    for folder in (f"hf_base/{tag[:-5]}", f"hf_sft/{tag}"):
        assert contents(own / folder) == contents(back / folder)
    for file in ("metrics.jsonl", "questions.jsonl"):
        assert (back / "chatsft_checkpoints" / tag / file).exists() is not public
    capsys.readouterr()
    n_downloads = len(online.bodies)
    export_hf.main(["--pull", f"{name}-long-hf-sft"])  # again: only the small files
    assert set(online.bodies[n_downloads:]) == {"tokenizer.json", "meta_000010.json"}
    capsys.readouterr()
    if public:  # its fine-tuning says nothing of the rows
        change_meta(back / "chatsft_checkpoints" / tag, 10, lambda meta: meta.pop("max_seq_len"))
    export_hf.main(["--tag", tag, "--push", "me", "--dry-run"])
    assert capsys.readouterr().out.count("README.md") == 4


def test_a_push_replaces_another_step_and_keeps_what_others_have_put_there(online, own, capsys):
    """And it sends only the stage that is asked for; --all names what is not finished."""
    push = ["--tag", "d3_9tpp", "--push", "me", "--stage", "sft"]
    export_hf.main(push)
    assert set(online.repos) == {"me/nanochat-d3-9tpp-sft", "me/nanochat-d3-9tpp-hf-sft"}
    native = online.repos["me/nanochat-d3-9tpp-sft"]
    native["model_000004.pt"] = native["meta_000004.json"] = b"an earlier step"
    native["NOTES.md"] = b"mine"
    export_hf.main(push)
    assert "NOTES.md" in native and not any("000004" in name for name in native)
    for tag in ("d3_9tpp", "d3_9tpp_drope_50", "d3_9tpp_drope_50_long"):
        shutil.rmtree(own / "chatsft_checkpoints" / tag)
    with pytest.raises(SystemExit, match="no finished model in .* to publish"):
        export_hf.main(["--push", "me", "--all"])
    out = capsys.readouterr().out
    assert "skipping d3_9tpp: no checkpoint in" in out and "skipping d3_9tpp_drope_50" in out


def test_a_package_that_is_missing_is_named(own, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    refused(export_hf, ["--tag", "d3_9tpp", "--push", "me", "--dry-run"],
            ["jinja2", "pip install -r requirements.txt -r requirements-dev.txt"], own)


def test_leftovers_in_the_way_of_a_pull_are_compared(online, own, tmp_path, monkeypatch):
    """A model without a meta file, metrics of another run: they are fetched again."""
    export_hf.main(["--tag", "d3_9tpp", "--push", "me"])
    folder = tmp_path / "new" / "base_checkpoints" / "d3_9tpp"
    for name in ("model_000010.pt", "metrics.jsonl"):
        M.atomic_write(folder / name, b"something else")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "new"))
    export_hf.main(["--pull", "me/nanochat-d3-9tpp"])
    for name in ("model_000010.pt", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (
            own / "base_checkpoints" / "d3_9tpp" / name).read_bytes()
    assert M.newest_checkpoint(folder) == 10
    assert not [path for path in (tmp_path / "new").rglob("*")
                if path.suffix == ".part" or path.name.endswith(".lock") and path.name != ".lock"]


def test_pull_mends_what_is_damaged_and_refuses_what_it_would_replace(online, own, refused):
    export_hf.main(["--tag", "d3_9tpp", "--push", "me"])
    pull, folder = ["--pull", "me/nanochat-d3-9tpp"], own / "base_checkpoints" / "d3_9tpp"
    good = (folder / "model_000010.pt").read_bytes()
    truncate(folder / "model_000010.pt")
    export_hf.main(pull)
    assert (folder / "model_000010.pt").read_bytes() == good and M.newest_checkpoint(folder) == 10
    refused(export_hf, ["--pull", "me/nanochat-d7-9tpp"], ["d7-9tpp-hf-sft"], own)
    with M.lock_file(folder / ".lock", "busy"):
        refused(export_hf, pull, ["in use"], own)
    write_checkpoint(folder, export_model(1, True))
    refused(export_hf, pull, ["another run"], own)
    write_tokenizer(own / "tokenizer", [b"another"])
    refused(export_hf, pull, ["another tokenizer"], own)


def test_the_card_tells_the_figures_the_licences_and_the_fitted_logn_scale(own):
    def card(kind, tag):
        found = {stage: export_hf.find_source(stage, tag) for stage in ("base", "sft")}
        return export_hf.card(kind, tag, "me", found)

    long, base = card("hf-sft", "d3_9tpp_drope_50_long"), card("base", "d3_9tpp")
    for words in ("dropped after step 5 of 10", "10,240", "1.2345", "abc123", "0.9000", "1.4000",
                  "non-commercial", "\nlicense: mit\n", "\n- allenai/tulu-v2-sft-long-mixture\n",
                  "\nbase_model: me/nanochat-d3-9tpp-drope-50-long-hf-base\n",
                  '\nrepo = "me/nanochat-d3-9tpp-drope-50-long-hf-sft"\n'):
        assert words in long, words
    assert "--pull me/nanochat-d3-9tpp\n" in base and "on in all layers" in base
    assert "tulu" not in base and "base_model" not in base and "fitted" not in long + base
    evaluation = own / "base_checkpoints" / "d3_9tpp" / "eval.json"
    for sha256 in (M.weights_hash(evaluation.parent, 10), "of another checkpoint"):
        results = M.Results(evaluation, dict(sha256=sha256))
        results.part(["c fitted", "fit"], lambda: {"c": 0.4})
        if sha256 == "of another checkpoint":
            with pytest.raises(SystemExit, match="belongs to another checkpoint"):
                card("hf-base", "d3_9tpp")
        else:
            assert "evaluation of this model fitted 0.4" in card("hf-base", "d3_9tpp")
    change_meta(evaluation.parent, 10, lambda meta: meta.update(
        recipe={"init": "step 3 of src"}, user_config={"dataset": "local"}))
    evaluation.unlink()
    assert "| started from the weights of | step 3 of src |" in card("base", "d3_9tpp")
    assert "climbmix" not in card("base", "d3_9tpp").lower()


# ==== modeling_nanochat.py: the model for transformers, equal to model.py's =======================

def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True,
                                                **{"dtype": torch.float32, **more})


@pytest.fixture(scope="session", params=["RoPE", "DroPE", "RoPE, logn_scale", "DroPE, logn_scale"])
def pair(request, exported):
    """model.py's model, its weights rounded to bfloat16, and the export. With logn_scale attention
    is sharpened from the 9th token on, as a user sets it."""
    tag = "d3_9tpp_drope_50" if "DroPE" in request.param else "d3_9tpp"
    ours, more = M.load_model(exported / "base_checkpoints" / tag)[0].bfloat16().float(), {}
    if "logn_scale" in request.param:
        ours.logn_scale, ours.config.sequence_len = 0.5, 8
        more = {"logn_scale": 0.5, "original_max_position_embeddings": 8}
    return ours, load(exported / "hf_base" / tag, **more)


def random_ids(B, T, seed=0):
    return torch.randint(0, 503, (B, T), generator=torch.Generator().manual_seed(seed))


def padded(lengths, side="left"):
    """Random rows of several lengths as one padded batch, its mask, and the rows."""
    rows, T = [random_ids(1, n, n)[0] for n in lengths], max(lengths)
    ids, mask = torch.full((len(rows), T), HF_BOS), torch.zeros(len(rows), T, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask, rows


def equal(a, b):
    return torch.allclose(a, b, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
def test_logits_equal_those_of_model_py(pair, kernel):
    """Past the training length too; with padding on either side; of two documents in a row."""
    ours, theirs = pair
    theirs.set_attn_implementation(kernel)
    two = torch.cat([torch.arange(12), torch.arange(28)])[None]  # position_ids
    with torch.compiler.set_stance("force_eager"):  # flex compiles for a minute
        for T in (1, 2, 37, 150):
            assert equal(theirs(random_ids(2, T)).logits, ours(random_ids(2, T)))
        for side in ("left", "right"):
            ids, mask, rows = padded([5, 21, 13], side)
            logits = theirs(ids, attention_mask=mask).logits
            for got, row, m in zip(logits, rows, mask.bool()):
                assert equal(got[m], ours(row[None])[0]), side
        ids = random_ids(1, 40)
        apart = torch.cat([ours(ids[:, :12]), ours(ids[:, 12:])], 1)
        assert equal(theirs(ids, position_ids=two).logits, apart)


@torch.no_grad()
def test_generation_with_a_cache_equals_a_loop_without(pair):
    ours, theirs = pair
    theirs.set_attn_implementation("sdpa")
    ids, mask, rows = padded([5, 60, 9])  # the second one passes 64, n_train
    mine = list(zip(*M.generate(ours, [row.tolist() for row in rows], 12)))
    for i, row in enumerate(rows):
        for _ in range(12):
            row = torch.cat([row, ours(row[None])[0, -1].argmax()[None]])
        rows[i] = row[-12:]
    settings = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=HF_BOS,
                    eos_token_id=9999)  # never
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        got = theirs.generate(ids, **settings, **more)[:, -12:]
        assert torch.equal(got, torch.stack(rows)) and got.tolist() == list(map(list, mine)), more
    ids, cache, pieces = random_ids(2, 30), None, []  # in chunks
    for part in ids.split([11, 1, 13, 5], dim=1):
        out = theirs(part, use_cache=True, **{hf.CACHE: cache})
        cache = getattr(out, hf.CACHE)
        pieces.append(out.logits)
    assert equal(torch.cat(pieces, 1), ours(ids))


@pytest.mark.parametrize("pair", ["RoPE, logn_scale", "DroPE"], indirect=True)
def test_continuous_batching_writes_the_same_as_generate(pair):
    """Its cache has pages, and no length of its own."""
    _, theirs = pair
    theirs.set_attn_implementation("sdpa")
    texts = [random_ids(1, n, n)[0].tolist() for n in (5, 17, 9)]
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=HF_BOS, eos_token_id=9999)
    alone = [theirs.generate(torch.tensor([text]), **settings)[0, len(text):] for text in texts]
    config = transformers.GenerationConfig(**settings)
    small = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    together = theirs.generate_batch(inputs=texts, generation_config=config,
                                     continuous_batching_config=small)
    theirs.set_attn_implementation("sdpa")  # not the paged kernel any more
    assert sorted(out.generated_tokens for out in together.values()) == sorted(
        row.tolist() for row in alone)


@torch.no_grad()
def test_what_the_model_takes_and_gives(pair):
    """The loss shifts labels, and is divided by num_items_in_batch, if that is given."""
    ours, theirs = pair
    theirs.set_attn_implementation("eager")
    ids = random_ids(2, 20)
    labels = ids.masked_fill(torch.arange(20) < 5, -100)
    nats = F.cross_entropy(ours(ids)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
    for more, n in (({}, 30), ({"num_items_in_batch": torch.tensor(7)}, 7)):
        loss = theirs(ids, labels=labels, **more).loss
        assert loss.item() == pytest.approx(nats.item() / n, rel=1e-4)
    full = theirs(ids, output_hidden_states=True, output_attentions=True)
    for keep, of in ((3, full.logits[:, -3:]), (torch.tensor([0, 7]), full.logits[:, [0, 7]])):
        assert equal(theirs(ids, logits_to_keep=keep).logits, of)
    states, weights = full.hidden_states, full.attentions
    assert len(states) == 4 and torch.equal(states[-1], theirs.model(ids).last_hidden_state)
    assert equal(theirs(inputs_embeds=states[0]).logits, full.logits)
    assert [tuple(a.shape) for a in weights] == [(2, 2, 20, 20)] * 3
    assert equal(weights[2].sum(-1), torch.ones(2, 2, 20))
    assert equal(theirs(ids, return_dict=False)[0], full.logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(exported, reentrant):
    model, ids, gradients = load(exported / "hf_base" / "d3_9tpp"), random_ids(2, 16), []
    model.train()
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert all(g.any() and torch.allclose(g, h, atol=1e-6) for g, h in zip(*gradients))
    said = model.generate(ids, max_new_tokens=8, do_sample=False)  # and so do samples on the way
    assert torch.equal(said, model.eval().generate(ids, max_new_tokens=8, do_sample=False))


def test_early_exit_and_what_a_forward_pass_needs(exported):
    model, ids = load(exported / "hf_base" / "d3_9tpp"), random_ids(1, 16)
    said = [model.generate(ids, max_new_tokens=8, do_sample=False, **more)
            for more in ({}, {"assistant_early_exit": 1})]
    assert torch.equal(*said)
    for both in ({}, dict(input_ids=ids, inputs_embeds=model.model.embed_tokens(ids))):
        with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
            model(**both)


def test_fresh_weights_begin_as_in_model_py():
    fresh = hf.NanoChatForCausalLM(hf.NanoChatConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=640, num_hidden_layers=1,
        num_attention_heads=2)).state_dict()
    ours = M.GPT(M.GPTConfig(4096, 2048, 1, 2, 2, 256))
    ours.init_weights()
    for name, w in export_hf.hf_weights(ours.state_dict(), 2048).items():
        assert fresh[name].std().item() == pytest.approx(w.float().std().item(), rel=0.02), name


def test_saved_and_loaded_again_it_is_the_same(exported, tmp_path):
    model = load(exported / "hf_sft" / "d3_9tpp_drope_50", dtype="auto")
    model.save_pretrained(tmp_path)
    again, state = load(tmp_path, dtype="auto"), model.state_dict()
    assert again.config.use_rope is False and again.config.hidden_act == "swiglu"
    assert again.generation_config.eos_token_id == HF_STOP and again.dtype == torch.bfloat16
    assert all(torch.equal(w, state[name]) for name, w in again.state_dict().items())
    again.resize_token_embeddings(520)
    assert again(random_ids(1, 4)).logits.shape == (1, 4, 520)
    assert torch.equal(again.lm_head.weight[:512], state["lm_head.weight"])


@pytest.mark.parametrize("wrong", [
    {"hidden_act": "gelu"}, {"tie_word_embeddings": True}, {"use_rope": "false"},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e5, "factor": 4.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_theta": 1e6}], ids=str)
def test_an_override_that_would_be_ignored_is_refused(exported, wrong):
    """from_pretrained(name=value) sets it after the config's __init__."""
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}=.*this model only has") as e:
        load(exported / "hf_base" / "d3_9tpp", **wrong)
    assert "\n" not in str(e.value)


@torch.no_grad()
def test_an_override_that_has_a_meaning_is_followed(exported):
    folder, ids = exported / "hf_base" / "d3_9tpp", random_ids(1, 9)
    plain = load(folder, hidden_act="silu")(ids).logits
    uncapped = load(folder, final_logit_softcapping=None)(ids).logits
    assert equal(15 * torch.tanh(uncapped / 15), plain) and not equal(uncapped, plain)
    faster = load(folder, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert not equal(faster(ids).logits, plain)


def test_transformers_own_nanochat_class_refuses_our_files(exported):
    with pytest.raises((KeyError, ValueError), match="swiglu"):
        AutoModelForCausalLM.from_pretrained(exported / "hf_sft" / "d3_9tpp")


# ---- The tokenizer for transformers, and its chat template ---------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."}, *chat("How many r in strawberry?", [
        {"type": "text", "text": "Let me count. 🙂"},
        {"type": "python", "text": "'strawberry'.count('r')"},
        {"type": "python_output", "text": "3"}, {"type": "text", "text": "Three.\n\n#### 3"}],
        " Thanks\n", "You're welcome 🙂")]
PIECES = ["Hi there", "é ü ß 中文 🙂👩‍👩‍👧", "12345 6 789", "don't HE'LL 'ſ", " \n\n \t x",
          "<|bos|>", "<|", "|>", "\x00\x7f\u00a0", "aaaa", "\r\n", " The", "'VE", "٣", "Ⅷ",
          "e\u0301", "\u3000"]


@pytest.fixture(params=[True, False], ids=["trusted", "plain"])
def chat_tok(request, exported):
    """The chat model's tokenizer, by our class and by transformers' own."""
    return AutoTokenizer.from_pretrained(exported / "hf_sft" / "d3_9tpp",
                                         trust_remote_code=request.param)


@pytest.fixture
def enc(exported):
    return M.load_tokenizer(exported / "tokenizer")


def chat_ids(tokenizer, messages):
    """(ids, mask) of a conversation, as sft.render gives them."""
    got = tokenizer.apply_chat_template(messages, return_dict=True,
                                        return_assistant_tokens_mask=True)
    return got["input_ids"], got["assistant_masks"]


def test_the_tokenizer_equals_tiktoken_on_any_text(enc, chat_tok):
    rng = random.Random(0)
    points = [chr(c) for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    texts = ["".join(rng.choices(PIECES, k=5)) for _ in range(2000)]
    texts += ["".join(rng.choices(points[:0x3000], k=12)) for _ in range(2000)]
    texts += ["".join(rng.choices(points, k=12)) for _ in range(2000)]
    got = chat_tok(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert got == enc.encode_ordinary_batch(texts, num_threads=1)
    assert [chat_tok.decode(ids) for ids in got[::10]] == texts[::10]


def test_the_nine_special_tokens(exported, chat_tok):
    added = {str(token): i for i, token in chat_tok.added_tokens_decoder.items()}
    assert added == {token: 503 + i for i, token in enumerate(SPECIAL)} and len(chat_tok) == 512
    assert chat_tok.eos_token_id == chat_tok.pad_token_id == HF_STOP
    assert chat_tok.decode(list(range(503, 512)), skip_special_tokens=True) == ""
    base = AutoTokenizer.from_pretrained(exported / "hf_base" / "d3_9tpp", trust_remote_code=True)
    assert base.eos_token == base.pad_token == "<|bos|>" and base.chat_template is None


def test_a_text_gets_a_bos_and_a_chat_that_is_tokenized_later_keeps_its_one(chat_tok, request):
    hi, text = chat_tok("Hi").input_ids, chat_tok.apply_chat_template(CHAT, tokenize=False)
    batch = chat_tok(["Hi", "Hi there, you"], padding=True)
    assert hi[0] == HF_BOS and [row.count(HF_BOS) for row in batch.input_ids] == [1, 1]
    assert set(batch) == {"input_ids", "attention_mask"} and batch.attention_mask[0][0] == 0
    want = chat_tok.apply_chat_template(CHAT, return_dict=False)
    assert chat_tok(text, add_special_tokens=False).input_ids == want and want.count(HF_BOS) == 1
    if request.node.callspec.params["chat_tok"]:  # transformers' own class adds a second
        assert chat_tok.apply_chat_template(CHAT) == chat_tok.encode(text) == want
        assert chat_tok([text, "Hi", "<|bos|>Hi"]).input_ids == [want, hi, hi]
        assert chat_tok(["<|bos|>Hi"], is_split_into_words=True).input_ids == hi


def in_parts(text, rng):
    """The text in four parts, of which some may be empty."""
    at = sorted(rng.choices(range(len(text) + 1), k=3))
    return [{"type": "text", "text": text[i:j]} for i, j in zip([0, *at], [*at, len(text)])]


def test_random_chats_made_of_parts_have_the_ids_and_the_mask_of_fine_tuning(enc, chat_tok):
    """Adjacent texts are encoded as one, in any role; only an answer may call Python."""
    rng = random.Random(1)

    def text():
        pieces = ["the ", " the", "t", "he", "  ", "\n", "<|bos|>", "ß", "🙂"]
        return "".join(rng.choices(pieces, k=5))

    outputs = chat("Hi", [{"type": kind, "text": text} for kind, text in (
        ("python_output", "1"), ("python_output", "2"), ("python", "3"), ("python_output", ""))])
    for messages in (CHAT, outputs):
        assert chat_ids(chat_tok, messages) == sft.render(enc, messages)
    ids = chat_tok.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
    assert ids == sft.render(enc, CHAT[:2])[0] + [enc.encode_single_token("<|assistant_start|>")]
    for _ in range(60):
        said = [{"role": "system", "content": text()}] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 2)):
            parts = [{"type": rng.choice(["text", "text", "python", "python_output"]),
                      "text": text()} for _ in range(rng.randint(1, 6))]
            said += [{"role": "user", "content": in_parts(text(), rng)},
                     {"role": "assistant", "content": parts}]
        assert chat_ids(chat_tok, said) == sft.render(enc, said)
        strings = [{**message, "content": "".join(part["text"] for part in message["content"])}
                   if message["role"] == "user" else message for message in said]
        assert sft.render(enc, strings) == sft.render(enc, said)
    with pytest.raises(ValueError, match="message 1 has content"):
        sft.render(enc, [{"role": "user", "content": [{"type": "python", "text": "1"}]}])


def test_text_that_spells_a_control_token_stays_text(exported, enc, chat_tok):
    """In any role, in one part or divided among several; by tokenizer.json alone as well."""
    alone = Tokenizer.from_file(str(exported / "hf_sft" / "d3_9tpp" / "tokenizer.json"))
    rng, guard = random.Random(0), export_hf.GUARD
    pieces = [*SPECIAL, "<", "|", ">", "bos", guard, guard[0], guard[1], "<" + guard, "a"]
    texts = ["".join(rng.choices(pieces, k=6)) for _ in range(150)]
    for text in [*SPECIAL, "<|<|bos|>bos|>", "<<|bos|>|bos|>", "<|bos|", "|bos|>", *texts]:
        call, plain = {"type": "python", "text": text}, {"type": "text", "text": text}
        whole = [{"role": "system", "content": text}, *chat(text, [plain, call])]
        parts = [{"role": "system", "content": in_parts(text, rng)},
                 *chat(in_parts(text, rng), [*in_parts(text, rng), call])]
        want = sft.render(enc, whole)
        assert chat_ids(chat_tok, whole) == chat_ids(chat_tok, parts) == want, text
        rendered = chat_tok.apply_chat_template(parts, tokenize=False)
        assert alone.encode(rendered, add_special_tokens=False).ids == want[0]
    for text in ("<\ufdd0|", "<\ufdef|", guard, guard + "|", "<\ufdd0\ufdd0|"):  # of a document
        assert chat_tok.decode(chat_tok.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("words, messages", [
    ("roles must be", chat("Hi") * 2),
    ("roles must be", [*chat("Hi"), {"role": "tool", "content": "x"}]),
    ("needs a user message", [{"role": "system", "content": "x"}]),
    ("assistant are of type text or python", chat("Hi", [{"type": "image"}])),
    ("of role user are of type text", chat([{"type": "python", "text": "x"}])),
    ("have a text", chat([{"type": "text"}])), ("of role user has no content", chat(None)),
    ("of role assistant has no content", [*chat("Hi"), {"role": "assistant", "tool_calls": []}])])
def test_a_broken_conversation_is_refused(chat_tok, words, messages):
    with pytest.raises(Exception, match=words):
        chat_tok.apply_chat_template(messages, tokenize=False)
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
    with pytest.raises(Exception, match="no tools but python"):
        chat_tok.apply_chat_template(chat("Hi"), tools=[tool])


@pytest.mark.parametrize("content", [
    "Well", "a <|bos|> b ", "<|assistant_end|>",
    [{"type": "python", "text": "1 <| 2"}, {"type": "text", "text": "<|assistant_end|>"}]])
def test_a_last_message_is_continued(exported, enc, content):
    tokenizer = AutoTokenizer.from_pretrained(exported / "hf_sft/d3_9tpp", trust_remote_code=True)
    messages = chat("Hi", content)
    want = sft.render(enc, messages)[0][:-1]
    assert tokenizer.apply_chat_template(messages, continue_final_message=True) == want


@pytest.mark.parametrize("name", ["additional_special_tokens", "extra_special_tokens"])
def test_a_tokenizer_that_transformers_saved_is_the_same(own, enc, tmp_path, name):
    folder = own / "hf_sft" / "d3_9tpp"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config[name] = config.pop("additional_special_tokens")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for _ in range(2):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert sorted(tokenizer.all_special_ids) == list(range(503, 512))
        assert chat_ids(tokenizer, CHAT) == sft.render(enc, CHAT)
        folder = tmp_path / "saved"
        tokenizer.save_pretrained(folder)


def test_what_transformers_sets_in_a_config_stays_there(exported, tmp_path):
    """Also when the folder is saved and loaded."""
    model = load(exported / "hf_base" / "d3_9tpp", output_attentions=True,
                 attn_implementation="eager")
    assert len(model(random_ids(1, 5)).attentions) == 3
    model.save_pretrained(tmp_path)
    assert load(tmp_path, attn_implementation="eager").config.output_attentions
    assert hf.NanoChatConfig(output_hidden_states=True).output_hidden_states
    assert "torch_dtype" not in json.loads((exported / "hf_base/d3_9tpp/config.json").read_text())


def test_a_transformers_that_is_too_old_is_named(tmp_path):
    (tmp_path / "transformers.py").write_text("__version__ = '4.57.3'")
    said = subprocess.run([sys.executable, "-c", "import modeling_nanochat"], cwd=HERE, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert said.returncode == 1 and said.stderr.splitlines()[-1] == (
        "ImportError: modeling_nanochat.py needs transformers 5.0 or newer, not 4.57.3: pip "
        "install -U transformers")


def test_a_chat_ends_at_the_stop_token(exported):
    repo = exported / "hf_sft" / "d3_9tpp"
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
    model, more = load(repo), dict(max_new_tokens=8, do_sample=False)
    inputs = tokenizer.apply_chat_template(chat("Hi"), add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    n = inputs["input_ids"].shape[1]
    free = model.generate(**inputs, eos_token_id=None, **more)[0]
    with torch.no_grad():  # the stop token wins where this one did
        model.lm_head.weight[HF_STOP] = model.lm_head.weight[free[n + 3]] * 1.05
    out = model.generate(**inputs, **more)[0]
    assert len(free) == n + 8 and out[-1] == HF_STOP and len(out) <= n + 4


# ==== Bad files are one clear line, whatever is in them ===========================================

BAD_JSON = [b"", b"{}", b"null", b"[]", b"7", b'"x"', b"{", b"\xff\xfe", b"[" * 9999,
            b'{"step": 10}', b'{"model_config": null}', b'{"model_config": {}}']
META_HARM = [
    lambda meta: meta["model_config"].update(n_layer=3),  # layers are missing
    lambda meta: meta["model_config"].update(n_layer=100_000),
    lambda meta: meta["model_config"].update(n_embd=None),
    lambda meta: meta["model_config"].update(window_pattern="SSSL"),  # upstream's own today
    lambda meta: meta["model_config"].pop("n_head"), lambda meta: meta.update(step="10"),
    lambda meta: meta.pop("loop_state"),  # a chat checkpoint of the public repo
    lambda meta: meta.update(loop_state=[]), lambda meta: meta["loop_state"].update(use_rope=1),
    lambda meta: meta.update(user_config=None), lambda meta: meta.update(sha256={"x": 1}),
    lambda meta: meta.update(sha256=[]), lambda meta: meta.update(val_bpb="low")]


def every_reader(tag):
    """(module, words of a command) for each script that reads a checkpoint of that tag."""
    return [(sft, ["--tag", tag, "--spelling-rows", 1]), (ev, [tag, "--quick"]),
            (export_hf, ["--tag", tag, "--stage", "base"]),
            (pretrain, [*TINY, "--tag", tag]), (export_hf, ["--tag", tag, "--push", "me",
                                                            "--dry-run"])]


@pytest.mark.parametrize("content", [*BAD_JSON, *META_HARM, "truncated weights"])
def test_a_bad_meta_file_is_one_line_in_every_script(tiny_base, tmp_path, run_here, content):
    base, folder = share(tiny_base, tmp_path), tmp_path / "base_checkpoints" / "t"
    enc = M.load_tokenizer(base / "tokenizer")
    write_checkpoint(folder, small_model(vocab=enc.n_vocab))
    path = folder / "meta_000010.json"
    if content == "truncated weights":  # of a checkpoint without sha256
        truncate(folder / "model_000010.pt")
    elif callable(content):
        change_meta(folder, 10, content)
    else:
        path.write_bytes(content)
    before = contents(folder)
    for module, args in every_reader("t"):
        status, said = run_here(module, args, base)
        assert status == 1 and "Traceback" not in said and str(folder) in said.splitlines()[-1], (
            module, said)
    assert {k: v for k, v in contents(folder).items() if k != ".lock"} == before
    assert not (base / "hf_base").exists()
    _, said = run_here(pretrain, ["--status"], base)
    assert str(folder) in said


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.json", "questions.jsonl", "chat.json"])
@pytest.mark.parametrize("content", [
    *BAD_JSON, b'{"parts": null}', b'{"key": [], "parts": {"text": 1}, "sha256": ""}',
    b'{"step": null, "val_bpb": 1}', b'{"step": 1, "val_bpb": "low"}', b'{"step": 1, "switch": 3}',
    b'{"source": "mmlu", "messages": []}', b'{"source": "mmlu", "messages": [1, 2]}', "folder"])
def test_a_bad_record_is_one_line_or_no_matter(own, run_here, name, content):
    """The scripts that read it either end with a line that names the file, or do without it."""
    stage = "base_checkpoints" if name in ("metrics.jsonl", "eval.json") else "chatsft_checkpoints"
    path = own / stage / "d3_9tpp" / name
    path.unlink(missing_ok=True)
    path.mkdir() if content == "folder" else path.write_bytes(content)
    readers = [(pretrain, ["--status"]), (ev, ["--table", "d3_9tpp"]),
               (chat_py, ["d3_9tpp", "--score", "--max-tokens", 4]),
               (export_hf, ["--tag", "d3_9tpp", "--push", "me", "--dry-run"])]
    for module, args in readers:
        status, said = run_here(module, args, own)
        assert "Traceback" not in said and (status == 0 or str(path) in said or
                                            "is not evaluated" in said), said


# ==== Bad use of a command is one clear line ======================================================

@pytest.mark.parametrize("command, words", [
    ("tok --vocab 400", "--vocab"), ("tok --workers 0", "'0'"), ("tok more", "more"),
    ("tok --max-chars 1e9", "'1e9'"), ("tok --vocab-size 264", "give 265 to 65536"),
    ("tok --data-dir /nowhere --out-dir new", "/nowhere|pretrain.py --fetch 8"),
    ("tok --out-dir new --vocab-size 9999 --workers 1", "too few|give --vocab-size|or less"),
    ("demo raport", "raport"), ("demo --seeds 0", "--seeds 0"), ("demo --steps nan", "--steps"),
    ("pretrain --drope 150", "--drope 150|0 to 99"), ("pretrain --depth 0", "--depth 0|1 to 99"),
    ("pretrain --tpp nan", "--tpp|--help"), ("pretrain --fetch 0", "--fetch 0|1 or more"),
    ("pretrain --dept 3", "unrecognized|--dept"), ("pretrain --tag ../x", "../x|cannot be a tag"),
    ("pretrain --tag d9_9tpp --depth 18", "--tag d9_9tpp|--depth 18"),
    ("pretrain --tag d9_9tpp_drope_50 --drope 25", "--tag d9_9tpp_drope_50|--drope 25"),
    ("pretrain --tag d18_9.0tpp", "written d18_9tpp"), ("pretrain --tag d18", "a tag is like d18_"),
    ("pretrain --tag d18_9tpp_long", "sft.py --tag d18_9tpp_long"),
    ("pretrain --keep 150", "below 100"),
    ("pretrain --total-batch-size 5000", "5000|max_seq_len|use 4096"),
    ("pretrain --tpp 0.001", "--tpp 0.001|0 steps"), ("pretrain --tpp 50000", "--tpp 50000|9999"),
    ("pretrain --data-dir /nowhere", "/nowhere|validation"),
    ("pretrain --drope 99 --depth 1 --tpp 2", "--drope 99|none without"),
    ("pretrain --drope 1 --depth 1 --tpp 2", "--drope 1|none with RoPE"),
    ("pretrain --plan d18_9tpp --max-seq-len 100", "multiple of max_seq_len"),
    ("pretrain --max-seq-len 9999999999", "1 to 1048576"),
    ("sft --spelling-rows 99999999999999", "--spelling-rows|0 to 100000000"),
    ("sft --tag", "--tag|--help"), ("sft --tag mistyped", "no base model|run_all.sh mistyped"),
    ("sft --tag x --total-batch-size 1000", "multiple of max_seq_len x processes = 4096 x 1"),
    ("sft --max-seq-len 64k", "--max-seq-len"), ("sft --spelling-rows -5", "--spelling-rows -5"),
    ("sft --init-lr-frac nan", "--init-lr-frac nan"), ("sft --spelling 5", "unrecognized"),
    ("sft --tag x --check --skip mlu", "--skip mlu: the sources are"),
    ("sft --tag x --check --identity BAD", "BAD: line 2: it ends before an answer"),
    ("sft --tag x --check --words BAD", "BAD: a word list consists of words of the letters a-z"),
    ("sft --tag x --check --conversations .", "no file|--conversations X.jsonl trains on X.jsonl"),
    ("eval", "which tag"), ("eval --quick t --sead 1", "unrecognized"),
    ("chat t --top-k 0", "--top-k 0"),
    ("pretrain --init no --tag x", "--init no: no model in"),
    ("export_hf", "--tag"), ("sft --total-batch-size 0", "--total-batch-size"),
    ("export_hf --tag ../d3", "../d3|cannot be a tag"),
    ("export_hf --tag d4_9tpp", "d4_9tpp|run_all.sh"),
    ("export_hf --tag x --stage rl", "base, sft or all"), ("export_hf --pull x", "USER/nanochat-d"),
    ("export_hf --tag x --push me/you", "me/you"), ("export_hf --all", "--all|--push"),
    ("export_hf --pull me/nanochat-d3-9tpp --push me", "--pull"),
    ("export_hf --tag x --dry-run", "--dry-run|--push")])
def test_bad_use(tiny_base, tmp_path, monkeypatch, refused, command, words):
    """Nothing is written but the lock of a run's folder."""
    base, (name, *args) = share(tiny_base, tmp_path), command.split()
    (tmp_path / "BAD").write_text(json.dumps(chat("a", "b")) + "\n" + json.dumps(chat("a")))
    monkeypatch.chdir(tmp_path)
    if name == "pretrain":
        args += ["--dataset", "local"]
    refused(sys.modules[name], args, words.split("|"), base)
    there = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert there <= {"BAD", ".lock"}


@pytest.mark.parametrize("name", ["tok", "pretrain", "sft", "eval", "export_hf"])
def test_a_folder_where_a_file_belongs_is_named(tmp_path, run_here, name):
    """And so is whatever else the system refuses."""
    base, args = tmp_path / "base", {"tok": ["--workers", 1], "pretrain": [*TINY, "--tag", "t"],
                                     "export_hf": ["--tag", "t"]}
    write_tokenizer(base / "tokenizer")
    for each in ("tokenizer/tokenizer.tiktoken", "data/climbmix/a.parquet",
                 "data/climbmix/b.parquet", "base_checkpoints/t/meta_000010.json"):
        (base / each).unlink(missing_ok=True)
        (base / each).mkdir(parents=True)
    if name == "tok":
        shutil.rmtree(base / "tokenizer")
    status, said = run_here(sys.modules[name], args.get(name, ["--tag", "t"] if name == "sft"
                                                        else ["t"]), base)
    assert status == 1 and re.search("Is a directory|is a directory|not a regular file", said), said


def test_output_that_nobody_reads_on_ends_quietly(tmp_path):
    command = f"{sys.executable} {HERE}/pretrain.py --plan {'d18_9tpp ' * 200} | head -1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout.startswith("tag ") and result.stderr == ""


@pytest.mark.parametrize("more, says", [({}, "MASTER_ADDR"), ({"WORLD_SIZE": "2"}, "torchrun")])
def test_a_rank_alone_is_refused(tmp_path, monkeypatch, refused, more, says):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", **more}.items():
        monkeypatch.setenv(name, value)
    refused(pretrain, ["--dataset", "local"], ["RANK is set, but not", says], tmp_path)


# ==== run_all.sh: the whole way of a model ========================================================

def write_program(path, program):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{program}\n")
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
    """clone(program): a copy of the repository whose .venv has this as its python, torchrun ..."""
    def make(program=f'exec {sys.executable} "$@"', name="clone"):
        folder, wanted = tmp_path / name, ""
        folder.mkdir()
        for path in [*HERE.glob("*.py"), *HERE.glob("requirements*.txt")]:
            (folder / path.name).symlink_to(path)
        shutil.copy(HERE / "run_all.sh", folder)
        for command in ("python", "torchrun", "srun", "scontrol", "scancel"):
            write_program(folder / ".venv" / "bin" / command, program.replace("NAME", command))
        for requirements in ("requirements.txt", "requirements-dev.txt"):
            wanted += (HERE / requirements).read_text()
        (folder / ".venv" / "installed").write_text(wanted.rstrip("\n"))
        return folder
    return make


RECORD = 'echo "NAME $*" >> calls; [ "NAME $1" != "scontrol show" ] || printf "one\\ntwo\\n"'


def driver_env(**env):
    """The environment without what Slurm or a user's own settings would say."""
    ours = ("SLURM", "NANOCHAT", "PYTORCH_", "OMP_")
    names = ("GPUS", "NODES", "HEAD", "NODE_RANK", "TAGS", "TOK", "PRETRAIN", "SFT", "EVAL", "CHAT",
             "VENV")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in names}
    return {**clean, **{k: str(v) for k, v in env.items()}}


def driver(folder, words="", **env):
    return subprocess.run(["bash", str(folder / "run_all.sh"), *words.split()], cwd=folder,
                          timeout=300, capture_output=True, text=True, env=driver_env(**env))


def calls(folder):
    """The stages that ran, in order."""
    text = (folder / "calls").read_text()
    (folder / "calls").unlink()
    return text.splitlines()


def planned(folder, words, run_here, **env):
    """The exit status and the text of the plan that run_all.sh asks of pretrain.py, made here."""
    result = driver(folder, words, **env)
    assert result.returncode == 0, result.stderr
    [call] = calls(folder)
    assert call.startswith("python pretrain.py ")
    return run_here(pretrain, call.split()[2:], folder / "out")


def test_the_plans_of_the_release_and_of_the_tiny_run(clone, run_here):
    folder = clone(RECORD)
    plans = partial(planned, folder, run_here=run_here)
    rows = [line.split() for line in plans("release --dry-run")[1].splitlines()]
    plan = {row[0]: row[1:] for row in rows if "_" in row[0]}
    steps = {tag: plan[tag][:2] for tag in plan if "drope" not in tag and "long" not in tag}
    assert steps == {"d18_9tpp": ["2,784", "2.92B"], "d18_20tpp": ["6,187", "6.49B"],
                     "d20_9tpp": ["3,763", "3.95B"], "d20_20tpp": ["8,362", "8.77B"],
                     "d20_40tpp": ["16,725", "17.54B"]}
    said = [" ".join(row) for row in plan.values()]  # 20 tags, of which 14 pretrain:
    assert sum("from scratch" in row for row in said) == 5
    assert sum("from step" in row for row in said) == 9
    assert sum("that of" in row for row in said) == 6  # the _long ones
    tags = dict(TAGS="d2_3tpp_long d2_3tpp_drope_33", TOK="--vocab-size 1024")
    status, out = plans("release --dry-run", **tags)
    assert status == 0 and "from step" not in out  # 33% is not kept
    d2 = pretrain.derive(pretrain.Config(depth=2, tpp=3), vocab_size=1024)
    assert out.splitlines()[1].split()[:2] == ["d2_3tpp_long", f"{d2.steps:,}"]
    result = driver(folder, "--dry-run")
    ran = [line.split()[3] for line in result.stdout.splitlines() if line.startswith("+ ")]
    assert result.returncode == 0 and ran == [
        "demo.py", "tok.py", "pretrain.py", "sft.py", "export_hf.py", "eval.py", "chat.py",
        "pretrain.py"]
    assert not (folder / "out").exists()


@pytest.mark.parametrize("words, env, says", [
    ("foo", {}, "'foo' is unknown"), ("d0 9", {}, "depth 1 to 99"), ("d18 9 150", {}, "0 to 99"),
    ("d18 1.2.3 50", {}, "'d18 1.2.3 50'"), ("d18 9 050", {}, "no needless zeros"),
    ("d18_9tpp d18_20tpp", {}, "is unknown"), ("d" + "9" * 20 + " 9", {}, "depth 1 to 99"),
    ("tiny foo", {}, "foo"), ("release foo", {}, "'release foo'"),
    ("release", {"TAGS": "d2_1tpp d2_1"}, "'d2_1'"), ("d2 1 --dry-run fast", {}, "--dry-run fast"),
    ("release", {"TAGS": " "}, "TAGS is blank"), ("d2 1", {"SFT": "--words 'a"}, "SFT=--words 'a"),
    ("d2 1", {"GPUS": "abc"}, "GPUS=abc"), ("d2 1", {"NODES": 2}, "HEAD=host:port")])
def test_the_driver_refuses(clone, words, env, says):
    folder = clone(RECORD)
    result = driver(folder, words, **env)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1 and says in result.stderr
    assert not (folder / "calls").exists()


UV = """#!/bin/bash
case "$1" in
venv) mkdir -p .venv/bin; echo "#!/bin/bash" > .venv/bin/python; chmod +x .venv/bin/python;;
pip) echo "$* PATIENCE=$UV_HTTP_TIMEOUT" >> calls; [[ "$*" != *SILENT* ]];;
esac
"""


@pytest.mark.parametrize("silent", [False, True])
def test_without_a_gpu_the_cpu_build_of_torch_is_tried_first(clone, tmp_path, silent):
    """By uv here; if its index does not answer, the default build is installed. On a machine with a
    GPU such an environment is made again."""
    folder, tools = clone(RECORD), tmp_path / "tools"
    shutil.rmtree(folder / ".venv")
    tools.mkdir()
    for name in ("bash", "cat", "chmod", "dirname", "grep", "mkdir", "rm", "sed", "touch"):
        (tools / name).symlink_to(shutil.which(name))
    write_program(tools / "uname", "echo Linux")
    (tools / "uv").write_text(UV.replace("SILENT", "index-url" if silent else "nothing"))
    (tools / "uv").chmod(0o755)

    def installs():
        """What is installed for `run_all.sh status`, and what that prints."""
        result = subprocess.run([shutil.which("bash"), folder / "run_all.sh", "status"], text=True,
                                cwd=folder, capture_output=True,
                                env={**driver_env(), "PATH": str(tools)})
        assert result.returncode == 0, result.stderr
        return calls(folder) if (folder / "calls").exists() else [], result.stdout
    (cpu, rest), said = installs()
    assert "--no-deps --index-url https://download.pytorch.org/whl/cpu torch==" in cpu
    assert cpu.endswith("PATIENCE=5")
    assert rest.endswith("-r requirements.txt -r requirements-dev.txt PATIENCE=")
    assert ("installing the default one" in said) == silent
    assert (folder / ".venv" / "cpu").exists() != silent
    assert installs()[0] == []  # it is there already
    write_program(tools / "nvidia-smi", "true")
    assert len(installs()[0]) == (0 if silent else 1)


def test_the_active_environment_is_used_if_nothing_is_missing(clone):
    folder = clone(RECORD)
    (folder / "requirements.txt").unlink()  # a link
    (folder / "requirements.txt").write_text("# needed\ntorch==2.13.0\nno_such_package>=1\n")
    env = {**driver_env(VENV="no"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", folder / "run_all.sh", "status"], cwd=folder, env=env,
                            capture_output=True, text=True)
    assert result.returncode == 1 and "lacks no_such_package" in result.stderr


def test_an_empty_argument_is_refused_and_a_base_folder_may_begin_with_a_dash(clone):
    folder = clone(RECORD)
    for words, status, said in (([""], 1, "empty argument"), (["d2", "1"], 0, "")):
        result = subprocess.run(["bash", folder / "run_all.sh", *words], capture_output=True,
                                text=True, cwd=folder, env=driver_env(NANOCHAT_BASE_DIR="-x"))
        assert result.returncode == status and said in result.stderr, result.stderr
    assert "+ NANOCHAT_BASE_DIR=./-x pretrain.py" in result.stdout.replace("python ", "")


def test_the_stages_of_a_release(clone):
    """All options are checked first. A _long tag fine-tunes the base of the tag without _long."""
    folder = clone(RECORD)
    result = driver(folder, "release", TAGS="d2_1tpp d2_1tpp_drope_50_long", EVAL="--quick")
    assert result.returncode == 0, result.stderr
    assert calls(folder) == [
        "python tok.py --check", "python sft.py --tag d2_1tpp --check",
        "python eval.py --quick d2_1tpp --check", "python chat.py d2_1tpp --check",
        "python pretrain.py --tag d2_1tpp --plan d2_1tpp d2_1tpp_drope_50_long",
        "python pretrain.py --fetch 8", "python tok.py",
        "python pretrain.py --tag d2_1tpp", "python sft.py --tag d2_1tpp",
        "python export_hf.py --tag d2_1tpp", "python eval.py --quick d2_1tpp",
        "python chat.py --score d2_1tpp",
        "python pretrain.py --tag d2_1tpp_drope_50", "python sft.py --tag d2_1tpp_drope_50_long",
        "python export_hf.py --tag d2_1tpp_drope_50_long",
        "python eval.py --quick d2_1tpp_drope_50_long",
        "python chat.py --score d2_1tpp_drope_50_long",
        "python eval.py --quick --table d2_1tpp d2_1tpp_drope_50_long",
        "python chat.py --score d2_1tpp d2_1tpp_drope_50_long"]
    local = "--dataset local --data-dir my\\ shards --text-column=content"
    driver(folder, "d2 1", PRETRAIN=local, SFT="--words 'my words'")
    ran, local = calls(folder)[5:], local.replace("\\", "")
    assert ran[:4] == [f"python pretrain.py {local} --fetch 8",
                       "python tok.py --data-dir my shards --text-column=content",
                       f"python pretrain.py {local} --tag d2_1tpp",
                       "python sft.py --words my words --tag d2_1tpp"]


@pytest.mark.parametrize("call", ["tok.py --check", "sft.py --tag d2_1tpp"])
def test_a_stage_that_fails_ends_the_driver_with_its_code(clone, call):
    folder = clone(RECORD + f'; [ "$*" != "{call}" ] || exit 3')
    assert driver(folder, "d2 1").returncode == 3 and calls(folder)[-1] == f"python {call}"


def test_how_several_processes_and_machines_are_started(clone):
    folder = clone(RECORD)
    torchrun = "torchrun --nnodes {} --nproc-per-node {}"
    meet = "--rdzv-backend c10d --rdzv-id nanochat --rdzv-endpoint one:29500"
    driver(folder, "d2 1", GPUS=8)
    assert torchrun.format(1, 8) + " --standalone sft.py --tag d2_1tpp" in calls(folder)
    driver(folder, "d2 1", NODES=2, HEAD="one:29500", NODE_RANK=1)  # only trains
    ran = [line for line in calls(folder) if ".py" in line]
    assert ["pretrain.py" in ran[0], "sft.py" in ran[1], len(ran)] == [True, True, 2]
    assert all(line.startswith(f"{torchrun.format(2, 1)} {meet}") for line in ran)
    assert all("is_host=0" in line for line in ran)
    driver(folder, "d2 1", SLURM_NNODES=2, SLURM_JOB_NODELIST="a", SLURM_GPUS_ON_NODE=4)
    ran = [line for line in calls(folder) if line.startswith("srun")]
    assert len(ran) == 2 and all(f"{torchrun.format(2, 4)} {meet}" in line for line in ran)


def test_the_clone_that_runs_is_the_one_of_the_script(clone, tmp_path):
    """Under Slurm, which runs a copy of the script elsewhere, it is the current folder."""
    ours, other = clone(RECORD), clone(RECORD, "other")
    shutil.copy(ours / "run_all.sh", tmp_path)
    for folder, expected in ((ours, ours), (tmp_path, other)):
        subprocess.run(["bash", folder / "run_all.sh", "demo"], cwd=other, env=driver_env())
        assert calls(expected) == ["python demo.py"]


def wait_for(path, lines, seconds=15):
    end = time.time() + seconds
    while not path.exists() or path.read_text().count("\n") < lines:
        assert time.time() < end, f"{path} does not come"
        time.sleep(0.02)


STAGE = """case NAME in
scontrol) echo "$@" >> scontrol; echo one; exit;;
scancel) echo "$@" > scancel; exit;;
srun) echo > started; until [ -e scancel ]; do sleep 0.05; done; exit 1;;
esac
[ "$1" = demo.py ] || exit 0
trap 'kill $! 2> sleep.log' EXIT
trap 'echo TERM >> signals; exit 75' TERM
trap 'echo INT >> signals; INTS=$((INTS - 1)); [ $INTS != 0 ] || exit 75' INT
sleep 20 2> sleep.log & echo > started
while kill -0 $! 2> sleep.log; do wait; done"""


@pytest.mark.parametrize("sent, passed_on, requeued", [
    (["USR1"], "TERM\n", True), (["TERM"], "TERM\n", False), (["HUP"], "TERM\n", False),
    (["INT"], "INT\n", False), (["INT", "INT"], "INT\nINT\n", False)])
def test_the_driver_passes_signals_on(clone, sent, passed_on, requeued):
    folder = clone(STAGE)
    env = driver_env(SLURM_JOB_ID=7, INTS=len(sent))
    process = subprocess.Popen(["bash", "run_all.sh", "demo"], cwd=folder, text=True,
                               stderr=subprocess.PIPE, env=env)
    wait_for(folder / "started", 1)
    for i, name in enumerate(sent):
        process.send_signal(signal.Signals["SIG" + name])
        wait_for(folder / "signals", i + 1)
    assert "rerun to resume" in process.communicate(timeout=60)[1]
    assert process.returncode == 75 and (folder / "signals").read_text() == passed_on
    assert (folder / "scontrol").exists() == requeued
    assert not requeued or (folder / "scontrol").read_text() == "requeue 7\n"


def test_a_signal_reaches_the_machines_of_a_slurm_job(clone):
    """srun kills its tasks when it is sent a signal, so it is not."""
    folder = clone(STAGE)
    env = driver_env(SLURM_JOB_ID=7, SLURM_NNODES=2, SLURM_JOB_NODELIST="one,two")
    process = subprocess.Popen(["bash", "run_all.sh", "d2", "1"], cwd=folder, env=env)
    wait_for(folder / "started", 1)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 75 and (folder / "scancel").read_text() == "--signal TERM 7\n"
    assert (folder / "scontrol").read_text() == "show hostnames one,two\nrequeue 7\n"


# ==== README.md and the rules of this repository ==================================================

SCRIPTS = ("model", "muon", "tok", "demo", "pretrain", "sft", "chat", "eval", "export_hf",
           "modeling_nanochat")
COPYABLE = ("model", "muon", "tok", "modeling_nanochat")
README = (HERE / "README.md").read_text()


def test_lines_have_100_columns_and_no_name_is_unused_or_undefined():
    wide = [f"{path.name}:{number}"
            for path in [*HERE.glob("*.py"), HERE / "run_all.sh", HERE / "README.md"]
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not wide
    ruff = subprocess.run([sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache",
                           "--select", "F", *HERE.glob("*.py")], capture_output=True, text=True)
    assert ruff.returncode == 0, ruff.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_code_is_shared_through_model_and_muon_only(name, tmp_path, monkeypatch):
    """So some files work when they are copied alone."""
    names = set()
    for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    assert names & set(SCRIPTS) <= (set() if name in COPYABLE else {"model", "muon"})
    if name in COPYABLE:
        for other in SCRIPTS:
            monkeypatch.setitem(sys.modules, other, None)  # importing it fails
        runpy.run_path(str(shutil.copy(HERE / f"{name}.py", tmp_path)))


def test_the_readme_names_every_file_and_the_tags_of_the_driver():
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert all((HERE / link).exists() for link in links if not link.startswith("https://"))
    assert {f"{name}.py" for name in SCRIPTS} | {"run_all.sh", "test_all.py"} <= set(links)
    driver = (HERE / "run_all.sh").read_text()
    tags = re.search(r'TAGS="\$\{TAGS:-(.*?)\}"', driver, re.S)[1].split()
    table = README[README.index("## The 20 tags"):README.index("## Use an export")]
    assert len(tags) == 20 and set(re.findall(r"\bd\d\d_\w+", table)) == set(tags)


def test_the_commands_of_the_readme(clone, run_here):
    """Those that only plan or list are run; of the others' words the driver makes a plan. Each
    option of a script is a field of its Config, or stands in its text as --option."""
    lines = re.findall(r"^    ((?:bash|sbatch|source|python|torchrun) .*)$", README, re.M)
    said, checked, folder = {}, 0, clone(RECORD)
    for command in lines:
        command = re.sub(r"\s+#.*", "", command)
        words = re.match(r"(?:bash|sbatch -p gpu --time \S+) run_all\.sh (status|d\d.*)", command)
        if words:
            plan = words[1] if re.search("status|--dry-run", words[1]) else words[1] + " --dry-run"
            said[command] = planned(folder, plan, run_here)
        for name, options in re.findall(r"(\w+)\.py(.*)", command):
            text = (HERE / f"{name}.py").read_text()
            config = getattr(sys.modules[name], "Config", None)
            known = {field.name for field in dataclasses.fields(config)} if config else set()
            for option in re.findall(r"--([\w-]+)", options):
                assert option.replace("-", "_") in known or f'"--{option}"' in text, command
                checked += 1
    assert checked >= 8 and len(said) >= 5
    assert all(status == 0 for status, _ in said.values()), said
    assert "2,784" in said["bash run_all.sh d18 9 50 --dry-run"][1]


@pytest.mark.parametrize("page", ["readme", "card"])
def test_the_code_that_loads_an_export_runs(own, page):
    """Of the README and of a model card. (The README's first block is the recipe.)"""
    text = README
    if page == "card":
        found = {stage: export_hf.find_source(stage, "d3_9tpp") for stage in ("base", "sft")}
        text = export_hf.card("hf-sft", "d3_9tpp", "me", found)
    *recipe, usage = re.findall(r"```python\n(.*?)```", text, re.S)
    assert "model.use_rope = False" in "".join(recipe) or page == "card"
    folder = str(own / "hf_sft" / "d3_9tpp")
    code = re.sub(r'^(folder|repo) = ".*"$', rf"\1 = {folder!r}", usage, flags=re.M)
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", code.replace(".cuda()", ""))
    assert folder in code and "max_new_tokens=4" in code
    exec(compile(code, page, "exec"), {})


# ==== On a GPU: what a CPU cannot show ============================================================

gpu = pytest.mark.skipif(not Path("/proc/driver/nvidia/version").exists(),
                         reason="there is no NVIDIA GPU")
ON_GPU = {"CUDA_VISIBLE_DEVICES": VISIBLE}
FLOAT8 = """
import torch, model as M
torch.manual_seed(0)
x, w, g = torch.randn(256, 512), torch.randn(1024, 512), torch.randn(256, 1024)
results = []
for device in ("cpu", "cuda"):
    a, b = (t.to(device, torch.bfloat16).requires_grad_() for t in (x, w))
    y = M.Float8Matmul.apply(a, b)
    grads = torch.autograd.grad(y, (a, b), g.to(device, torch.bfloat16))
    results.append([t.float().cpu() for t in (y, *grads)])
for cpu, cuda in zip(*results):
    assert (cpu - cuda).norm() < 0.01 * cpu.norm(), (cpu, cuda)
"""


@gpu
def test_gpu_float8_equals_its_emulation(tmp_path):
    (tmp_path / "float8.py").write_text(FLOAT8)
    script(tmp_path / "float8.py", base=tmp_path, env=ON_GPU)


@gpu
def test_gpu_a_run_has_the_losses_of_the_run_on_a_cpu(tiny_base, drope_run, tmp_path):
    """bfloat16 against float32, 20 steps, the switch at 10; two processes where there are GPUs."""
    base, runs = share(tiny_base, tmp_path / "gpu"), {"eager": (0, 0), "compiled": (1, 0)}
    if "," in VISIBLE and Path("/dev/nvidia1").exists():
        runs["two"] = (0, 2)
    for tag, (compile, processes) in runs.items():
        script("pretrain.py", *DROPE, "--tag", tag, "--compile", compile, base=base, env=ON_GPU,
               processes=processes)
        got = losses(base / "base_checkpoints" / tag)
        assert got == pytest.approx(losses(drope_run), rel=0.02), tag


@gpu
def test_gpu_attention_is_a_fused_kernel(tmp_path):
    said = script("pretrain.py", "--bench", "--depth", 2, "--total-batch-size", 65536,
                  base=tmp_path, env=ON_GPU)
    record = json.loads(said[said.index("{"):].splitlines()[0])
    assert record["attention"] in ("CUDNN_ATTENTION", "FLASH_ATTENTION") and record["mfu"] > 0


# ==== Benchmarks: python test_all.py -m bench -s. One line each; nothing is asserted of times =====

def best_of(n, *functions):
    """The least seconds of n calls of each function, called in turn: machines are noisy."""
    seconds = [[] for _ in functions]
    for _ in range(n):
        for times, function in zip(seconds, functions):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return [min(times) for times in seconds]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """2 million characters of English documentation, as a shard."""
    return demo.write_corpus(tmp_path_factory.mktemp("library")) / "shard_00000.parquet"


@pytest.mark.bench
def test_bench_tok_against_rustbpe(library):
    import rustbpe
    texts, made = pq.read_table(library)["text"].to_pylist(), {}

    def rust():
        made["rust"] = rustbpe.Tokenizer()
        made["rust"].train_from_iterator(iter(texts), 20_000, pattern=tok.PATTERN)

    def ours():
        counts = tok.count_chunks(tok.Shards([library], "text", 10 ** 6), 10 ** 12, 1)[0]
        made["ours"] = tok.train(counts, 20_000 - 256)
    theirs, mine = best_of(3, rust, ours)
    assert made["ours"] == [bytes(token) for token, _ in made["rust"].get_mergeable_ranks()]
    print(f"\ntok.py / rustbpe: {mine / theirs:.2f} ({mine:.1f} s, {theirs:.1f} s), same tokens")


@pytest.mark.bench
def test_bench_packing_against_tiktoken(library, tok_made):
    """All documents of a shard: read, tokenized and packed, or only tokenized."""
    enc, texts = M.load_tokenizer(tok_made), pq.read_table(library)["text"].to_pylist()
    shards = pretrain.Shards(pretrain.Config(dataset="local", data_dir=str(library.parent)))

    def packed():
        rows = pretrain.PackedRows(shards, shards.names, enc, 4097, epochs=1)
        while rows.next_row() is not None:
            pass
    alone, mine = best_of(3, lambda: enc.encode_ordinary_batch(texts, num_threads=4), packed)
    print(f"\nreading, tokenizing and packing / tokenizing alone: {mine / alone:.2f}")


@pytest.mark.bench
def test_bench_step_against_plain_pytorch():
    """The same model in plain PyTorch is modeling_nanochat.py's. Of 4 layers, width 256, 4 rows of
    256 tokens, on one core, not compiled. The optimizer's work does not grow with the batch."""
    config = M.GPTConfig(256, 4096, 4, 2, 2, 256)
    model = M.GPT(config)
    model.init_weights()
    optimizer = muon.build_optimizer(model)
    plain = hf.NanoChatForCausalLM(hf.NanoChatConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=config.intermediate_size,
        num_hidden_layers=4, num_attention_heads=2))
    adamw = torch.optim.AdamW(plain.parameters())
    ids = torch.randint(0, 4096, (4, 257))
    x, y = ids[:, :-1], ids[:, 1:]

    def plain_gradients():
        adamw.zero_grad()
        F.cross_entropy(plain(x, use_cache=False).logits.flatten(0, 1), y.flatten()).backward()

    def our_gradients():
        optimizer.zero_grad()
        model(x, y).backward()
    plain_seconds, ours = best_of(15, plain_gradients, our_gradients)
    adamw_seconds, muon_seconds = best_of(15, adamw.step, optimizer.step)
    whole = (ours + muon_seconds) / (plain_seconds + adamw_seconds)
    print(f"\nforward and backward / plain PyTorch's: {ours / plain_seconds:.2f}; with the "
          f"optimizer, Muon / AdamW: {whole:.2f}")


@pytest.mark.bench
@pytest.mark.parametrize("B", [1, 16])
def test_bench_generation_against_transformers(B):
    """The tiny run's model: 128 tokens after 64, on one core, with a cache."""
    config = M.GPTConfig(256, 1024, 2, 1, 1, 128)
    model = M.GPT(config)
    model.init_weights()
    theirs = hf.NanoChatForCausalLM(hf.NanoChatConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=config.intermediate_size,
        num_hidden_layers=2, num_attention_heads=1)).eval()
    texts = torch.randint(0, 1024, (B, 64))

    def transformers_generate():
        theirs.generate(texts, attention_mask=torch.ones_like(texts), max_new_tokens=128,
                        do_sample=False, pad_token_id=0, eos_token_id=9999)

    def ours():
        for _ in M.generate(model, texts.tolist(), 128):
            pass
    slow, fast = best_of(5, transformers_generate, ours)
    print(f"\ngeneration, batch {B}: {slow / fast:.2f} times as fast as transformers' generate() "
          f"({128 * B / fast:,.0f} tokens/s)")


PEAK = """
import re, torch, torch.nn.functional as F, model as M
def peak():                                                 # of this process, in MB
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1000
model = M.GPT(M.GPTConfig(4096, 32768, 1, 1, 1, 64))
model.init_weights()
ids = torch.randint(0, 32768, (1, 4096))
before = peak()
loss = {loss}
loss.backward()
print(peak() - before)
"""


@pytest.mark.bench
def test_bench_memory_of_the_loss(tmp_path):
    """Forward and backward at 32,768 ids, 4,096 tokens."""
    peak = []
    for loss in ("F.cross_entropy(model(ids)[0], ids[0])", "model(ids, ids, chunk=512)"):
        (tmp_path / "peak.py").write_text(PEAK.format(loss=loss))
        peak.append(int(script(tmp_path / "peak.py", base=tmp_path)))
    plain, ours = peak
    assert 0 < ours < 0.5 * plain
    print(f"\nmemory of the loss: {ours} MB in chunks, {plain} MB at once")


TWO = """
import json, sys, time
import numpy as np, torch
import model as M, muon
env, T = M.setup_env(), 256
torch.manual_seed(0)
torch.set_num_threads(1)
model = M.GPT(M.GPTConfig.from_depth(4, 2048, T))
model.init_weights()
optimizer, env.micro = muon.build_optimizer(model), 4
rows = np.random.default_rng(0).integers(0, 2048, (2, 32, T)).astype(np.int32)
blocks = iter(rows.reshape(2, 8, 4, T).swapaxes(0, 1))
validation = M.ValidationRows(lambda n: next(blocks, None), T, torch.ones(2048).long(), env)
validation.pack(32, lambda: None)
x, y = torch.from_numpy(rows)
def step():
    M.accumulate_gradients(model, x, y, env)
    optimizer.step()
    optimizer.zero_grad()
def best(function):
    seconds = []
    for _ in range(6):
        start = time.time()
        function()
        seconds.append(time.time() - start)
    return min(seconds)
result = [best(lambda: validation.bits_per_byte(model, 32)), best(step)]
if env.rank == 0:
    print(json.dumps(result))
"""


@pytest.mark.bench
def test_bench_two_processes_against_one(tmp_path):
    """On two cores, with a thread each."""
    (tmp_path / "two.py").write_text(TWO)
    one, two = [json.loads(script(tmp_path / "two.py", base=tmp_path, processes=n).splitlines()[0])
                for n in (0, 2)]
    print(f"\ntwo processes / one: validation {two[0] / one[0]:.2f}, training step "
          f"{two[1] / one[1]:.2f}")


if __name__ == "__main__":
    options = sys.argv[1:] if "-m" in sys.argv else ["-m", "not slow and not bench", *sys.argv[1:]]
    markers = "markers=slow: takes minutes\nbench: prints a line"
    sys.exit(pytest.main([__file__, "-q", "--disable-warnings", "-o", markers, *options]))
