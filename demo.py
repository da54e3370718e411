"""Does dropping RoPE help beyond the training length? An answer that a laptop finds in minutes, without a network.

    python demo.py                          # 4 models side by side, about 6 minutes on 2 cores
    python demo.py --seeds 3                # with the spread over 3 seeds
    python demo.py corpus                   # only the text that the tiny pipeline trains on, in seconds
    python demo.py report --tag TAG         # what a finished pipeline has learned, in a few lines

Four small models read documentation in rows of 64 tokens, in which facts are hidden: a token that names one of 8 keys
and its value, up to 4 in a row. Later a key is asked for; the answer is the token that named it. RoPE, DroPE (arXiv:2512.12167;
RoPE dropped after 50 or 75% of the steps) and NoPE then answer in texts up to 8 times as long. NTK-scaled RoPE and a
fitted attention temperature, remedies that need no training, are the controls. Model, optimizer and schedules are those of
pretraining (model.py, muon.py), at a toy's size.

Takes  the standard library of this Python (docstrings, read and never run) and tok.py
Gives  OUT/data/demo: shards as ClimbMix's, conversations, words; OUT/demo: tokenizer, results, demo.png; a table, a conclusion
Left out: any scale. 230 thousand parameters and 3 million tokens show how the effect works, not how large it is elsewhere.
"""
import ast
import builtins
import hashlib
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from model import (GPT, GPTConfig, atomic_write, base_dir, checkpoint_steps, load_tokenizer, parse_config, read_meta, rotary_tables,
                   token_bytes)
from muon import build_optimizer, lr_factor, muon_momentum


@dataclass
class Config:
    seeds: int = 1      # models of each kind, from different random numbers
    steps: int = 1500   # training steps of each model
    figure: str = ""    # where to put the figure (default: demo/demo.png in the folder of all artifacts)
    base_dir: str = ""  # folder of all artifacts (default: $NANOCHAT_BASE_DIR or ./out)
    tag: str = ""       # of the run that `demo.py report` tells of


# ---- The corpus: English that every Python carries ---------------------------------------------------------------

SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
PUBLIC_NAME = {"posixpath": "os.path", "_pydecimal": "decimal", "_pyio": "io", "_pydatetime": "datetime", "_collections_abc": "collections.abc"}
QUESTIONS = {"function": ("What does {} do?", "What is {} for?", "Explain {} in a sentence.", "Can you tell me what {} does?"),
             "class": ("What is {}?", "What is {} for?", "Explain {} in a sentence.", "Can you tell me what {} is?")}


def docstrings(tree, module):
    """Yields the docstrings of a parsed source file as lists [(kind, dotted name, docstring), ...], one list for each
    top-level object: the module, a function, or a class with its methods. Nothing is imported or run."""
    yield [("module", module, ast.get_docstring(tree))]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield [("function", f"{module}.{node.name}", ast.get_docstring(node))]
        elif isinstance(node, ast.ClassDef):
            name = f"{module}.{node.name}"
            yield [("class", name, ast.get_docstring(node))] + [
                ("function", f"{name}.{f.name}", ast.get_docstring(f)) for f in node.body if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]


def builtin_docstrings():
    """The same for what is written in C and always there: len, str.join..."""
    for name, value in sorted(vars(builtins).items()):
        if name.startswith("_") or not isinstance(value, (type, type(len))):
            continue
        methods = sorted(vars(value).items()) if isinstance(value, type) else []
        yield [("class" if methods else "function", name, inspect.getdoc(value))] + [
            ("function", f"{name}.{m}", inspect.getdoc(f)) for m, f in methods if callable(f) and not m.startswith("_")]


def gather(stdlib=None):
    """Documents [(text, [(kind, name, docstring), ...]), ...] from the folder of the standard library, in an order that
    looks random and is the same on every run. No docstring occurs twice, so no document shares one with another."""
    stdlib = Path(stdlib or sysconfig.get_paths()["stdlib"])
    objects, topics, paths = list(builtin_docstrings()), [], []
    for folder, folders, files in os.walk(stdlib):
        folders[:] = set(folders) - SKIP                    # what is left here is not entered
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    for path in sorted(paths, key=lambda p: p.relative_to(stdlib).parts):
        parts = path.relative_to(stdlib).with_suffix("").parts
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):          # unreadable, or a template that only looks like Python
            continue
        if parts == ("pydoc_data", "topics"):               # topics = {name: text}: what help("with") shows
            value = next((n.value for n in tree.body if isinstance(n, ast.Assign)), None)
            topics = sorted(ast.literal_eval(value).items()) if isinstance(value, ast.Dict) else []
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        objects += docstrings(tree, PUBLIC_NAME.get(module, module))
    seen, documents = set(), [(text.strip() + "\n", []) for _, text in topics]
    for members in objects:
        kept = []
        for kind, name, doc in members:
            key = " ".join((doc or "").split())
            if len(key) >= 20 and key not in seen:
                seen.add(key)
                kept.append((kind, name, doc.strip()))
        if kept:
            documents.append(("\n\n".join(f"{name}\n\n{doc}" for _, name, doc in kept) + "\n", kept))
    return sorted(documents, key=lambda d: hashlib.sha256(d[0].encode("utf-8", "replace")).digest())


def conversations(documents):
    """Question and answer from each public docstring: one user and one assistant message each."""
    for _, members in documents:
        for kind, name, doc in members:
            answer = " ".join(re.split(r"\n\s*\n", doc)[0].split())
            if answer.startswith(name.split(".")[-1] + "("):                # a signature, as C functions have: take what follows
                answer = " ".join((re.split(r"\n\s*\n", doc) + [""])[1].split())
            if len(answer) > 240:                                           # a sentence will do
                answer = re.split(r"(?<=[.!?]) ", answer)[0]
            if kind in QUESTIONS and 15 <= len(answer) <= 240 and not re.search(r"\._|^_", name):
                wording = QUESTIONS[kind][int(hashlib.sha256(name.encode()).hexdigest(), 16) % 4]
                yield [{"role": "user", "content": wording.format(name)}, {"role": "assistant", "content": answer}]


def write_corpus(folder):
    """Writes the files of the tiny pipeline into `folder`; what is there already stays."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = Path(folder)
    names = ("shard_00000.parquet", "conversations.jsonl", "conversations_val.jsonl", "words.txt", "shard_06542.parquet")
    if all((folder / name).exists() for name in names):
        print(f"corpus: {folder} is there already, nothing to do")
        return folder
    documents = gather()
    if len(documents) < 200:
        sys.exit(f"only {len(documents)} documents in {sysconfig.get_paths()['stdlib']}: this Python comes without the sources "
                 "of its standard library; use another one (python.org's, uv's, conda's or your system's python3)")
    train, val = documents[:-(len(documents) // 20)], documents[-(len(documents) // 20):]
    def shard(docs):
        file = io.BytesIO()
        texts = [text.encode("utf-8", "replace").decode() for text, _ in docs]
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), file, compression="zstd", row_group_size=1024)
        return file.getvalue()
    def jsonl(pairs):
        return "".join(json.dumps(messages) + "\n" for messages in pairs)
    pairs, pairs_val = list(conversations(train)), list(conversations(val))
    words = sorted({w for text, _ in train for w in re.findall(r"(?<![\w.])[a-z]{3,20}(?![\w.(])", text)})
    for name, data in zip(names, (shard(train), jsonl(pairs), jsonl(pairs_val), "\n".join(words) + "\n", shard(val))):
        atomic_write(folder / name, data)
    print(f"corpus: {sum(len(t) for t, _ in train):,} characters in {len(train):,} documents, {sum(len(t) for t, _ in val):,} in {len(val):,} "
          f"for validation; {len(pairs):,} + {len(pairs_val):,} question-answer pairs, {len(words):,} words -> {folder}")
    return folder


# ---- The task: facts hidden in text, and a question -----------------------------------------------------------------

T, ROWS, WEIGHT = 64, 32, 5.0                               # training length, rows a step, weight of an answer's loss (text: 1)
TEXT_IDS, N_KEYS, N_VALUES, N_FACTS = 440, 8, 8, 4
FACT = TEXT_IDS                                             # ids 440..503: fact of key k and value v at FACT + 8 k + v
KEY = FACT + N_KEYS * N_VALUES                              # ids 504..511: the question "key k?"
VOCAB = KEY + N_KEYS
FLOOR = 1 / N_FACTS                                         # what guessing among the facts of the row gives


def make_rows(stream, B, length, generator, final=False):
    """Rows of text with facts and one question, (B, length + 1), and the weight of each target, (B, length).

    Each row holds 1 to 4 facts of different keys and, after them, a key and its fact: question and answer. Only text and
    answer are targets: where facts come and which is a matter of chance. final: 4 facts, and the answer is the last token."""
    chance = partial(torch.rand, generator=generator)
    start = (chance(B, 1) * (len(stream) - length)).long()
    rows = stream[start + torch.arange(length + 1)]                                 # (B, length + 1)
    rows[:, 0] = stream[0]                                                          # <|bos|>, as every row of pretraining
    count = torch.full((B, 1), N_FACTS) if final else 1 + (chance(B, 1) * N_FACTS).long()
    keys = chance(B, N_KEYS).argsort(1)[:, :N_FACTS]                                # (B, 4), all different
    facts = FACT + N_VALUES * keys + (chance(B, N_FACTS) * N_VALUES).long()         # (B, 4)
    places = 1 + chance(B, length - 1 - final).argsort(1)[:, :N_FACTS + 1 - final].sort(1).values   # in order, all different
    if final:
        places = torch.cat([places, torch.full((B, 1), length - 1)], 1)
    fact_places, question = places[:, :N_FACTS], places[:, N_FACTS:]                # (B, 4), (B, 1)
    there = torch.arange(N_FACTS) < count
    asked = (chance(B, 1) * count).long()
    weights = torch.ones(B, length + 1)
    rows.scatter_(1, fact_places, torch.where(there, facts, rows.gather(1, fact_places)))
    weights.scatter_(1, fact_places, 1.0 - there.float())
    rows.scatter_(1, question, KEY + keys.gather(1, asked))
    weights.scatter_(1, question, 0.0)
    rows.scatter_(1, question + 1, facts.gather(1, asked))
    weights.scatter_(1, question + 1, WEIGHT)
    return rows, weights[:, 1:]


def load_stream(folder, shard, enc):
    """All documents of a shard as one stream of tokens, each starting with <|bos|>."""
    import pyarrow.parquet as pq
    bos = enc.encode_single_token("<|bos|>")
    texts = pq.read_table(folder / f"shard_{shard:05d}.parquet")["text"].to_pylist()
    return torch.tensor([token for ids in enc.encode_ordinary_batch(texts) for token in [bos, *ids]])


# ---- Training: the recipe of pretrain.py ----------------------------------------------------------------------------

ARMS = {"RoPE": 1.0, "DroPE 50": 0.5, "DroPE 75": 0.75, "NoPE": 0.0}       # share of the steps with RoPE


def train(arm, seed, steps, stream, say=print):
    """The trained model of an arm. All arms of a seed share initial weights and data; until its switch, DroPE is RoPE."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(T, VOCAB, n_layer=4, n_head=2, n_kv_head=2, n_embd=64))
    model.init_weights()
    optimizer = build_optimizer(model)                      # no weight decay: the run is too short to need it
    switch = round(ARMS[arm] * steps)
    for step in range(steps):
        # DroPE: RoPE's positions help a model to learn, but positions beyond the training length are foreign to it. Without
        # them the model learns again, in a fraction of the steps, to tell order from the causal mask, which knows no length.
        if step == switch:
            model.use_rope = False
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(step, steps)
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, steps)
        rows, weights = make_rows(stream, ROWS, T, torch.Generator().manual_seed(1_000_000 * seed + step))
        losses = model(rows[:, :-1], rows[:, 1:], reduction="none")                 # (ROWS, T)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            say(f"{arm:<8} seed {seed}  step {step + 1:>5}/{steps}  loss {loss.item():.3f}  RoPE {'on' if model.use_rope else 'off'}")
    return model


# ---- Evaluation beyond the training length ----------------------------------------------------------------------------

LENGTHS = (1, 2, 4, 8)                                      # times T
SCALES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)                # candidates for c
PROMPTS, TAIL = 256, 32


def ntk_tables(length, head_dim, device):
    """RoPE with its base raised so that the slowest rotation spans `length` as it spanned T ("NTK-aware" scaling)."""
    return rotary_tables(length, head_dim, device, 100_000.0 * max(1, length / T) ** (head_dim / (head_dim - 2)))


def set_remedies(model, tables=rotary_tables, c=0.0):
    """RoPE's tables, and logits times beta = max(1, 1 + c ln(n / T)) for the query at position n: the more tokens, the
    smaller the share that each gets of a softmax, so attention learnt at length T dilutes beyond it. c = 0: as trained."""
    def attend(q, k, v):
        n = torch.arange(1, q.size(2) + 1)
        beta = (1 + c * torch.log(n / T)).clamp(min=1)                              # (length,)
        return F.scaled_dot_product_attention(q * beta[:, None], k, v, is_causal=True)
    model.rotary_tables = tables
    for block in model.transformer.h:
        block.attn.attend = attend


@torch.no_grad()
def retrieval(model, rows):
    """Answers of a model to rows (B, length + 1) that end in one: how many are right, and their mean loss in nats."""
    logits = torch.cat([model(part[:, :-1])[:, -1] for part in rows.split(16)])     # (B, VOCAB)
    return (logits.argmax(-1) == rows[:, -1]).sum().item(), F.cross_entropy(logits, rows[:, -1]).item()


@torch.no_grad()
def tail_bits_per_byte(model, windows, nbytes):
    """Bits per byte of the last 32 tokens of windows (B, length + 1) of text."""
    losses = torch.cat([model(w[:, :-1], w[:, 1:], reduction="none")[:, -TAIL:] for w in windows.split(16)])
    size = nbytes[windows[:, -TAIL:]]                                               # (B, 32), 0 for <|bos|>, which is not counted
    return (losses * (size > 0)).sum().item() / math.log(2) / size.sum().item()


def evaluate(model, name, tables, train_stream, val_stream, nbytes):
    """Retrieval and bits per byte at each length, as trained (c = 0) and with the c that suits other prompts best; the same prompts
    for all models, and the same search for all."""
    longest = LENGTHS[-1] * T
    def prompts(stream, n, length, seed):
        return make_rows(stream, n, length, torch.Generator().manual_seed(seed), final=True)[0]
    def loss_of(c):
        set_remedies(model, tables, c)
        return retrieval(model, prompts(train_stream, PROMPTS // 4, longest, seed=1))[1]
    fitted = min(SCALES, key=loss_of)
    starts = torch.linspace(0, len(val_stream) - longest - 1, PROMPTS // 2).long()
    windows = val_stream[starts[:, None] + torch.arange(longest + 1)]               # (128, 513): the same targets for each length
    def text(length):
        return torch.cat([val_stream[:1].expand(len(windows), 1), windows[:, -length:]], 1)     # <|bos|> and the last tokens
    results = []
    for remedy, c in (("as trained", 0.0), ("temperature fitted", fitted)):
        set_remedies(model, tables, c)
        results.append(dict(
            name=name, remedy=remedy, c=c,
            right={str(n): retrieval(model, prompts(val_stream, PROMPTS, n * T, seed=2))[0] for n in LENGTHS},
            bpb={str(n): tail_bits_per_byte(model, text(n * T), nbytes) for n in LENGTHS}))
    return results


def run_arm(job):
    """Trains and evaluates one arm, in a process and a thread of its own, unless `path` holds its results already."""
    arm, seed, steps, data, tokenizer, path = job
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    enc = load_tokenizer(tokenizer)
    train_stream, val_stream = load_stream(data, 0, enc), load_stream(data, 6542, enc)
    model = train(arm, seed, steps, train_stream, say=partial(print, flush=True))
    results = []
    for name, tables in [(arm, rotary_tables)] + [("RoPE + NTK", ntk_tables)] * (arm == "RoPE"):
        results += evaluate(model, name, tables, train_stream, val_stream, token_bytes(enc))
    text = json.dumps([dict(seed=seed, **result) for result in results])
    atomic_write(path, text)
    print(f"{arm:<8} seed {seed}  done", flush=True)
    return json.loads(text)


# ---- Table, figure, conclusion ---------------------------------------------------------------------------------------

LINES = ("RoPE", "DroPE 50", "DroPE 75", "NoPE", "RoPE + NTK")
COLORS = dict(zip(LINES, ("#d55e00", "#0072b2", "#56b4e9", "#009e73", "#cc79a7")))     # told apart by colour-blind readers too


def wilson(k, n, z=1.96):
    """95% interval of a rate k / n (Wilson 1927)."""
    center, width = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, center - width), min(1.0, center + width)


def summarize(results):
    """{(name, remedy): {n: (rate, low, high)}} over the seeds: mean and extremes, or Wilson's interval where there is one seed;
    and {(name, remedy): {n: mean bits per byte}}."""
    rates, bpb = {}, {}
    for key in dict.fromkeys((r["name"], r["remedy"]) for r in results):
        mine = [r for r in results if (r["name"], r["remedy"]) == key]
        rates[key], bpb[key] = {}, {}
        for n in LENGTHS:
            each = [r["right"][str(n)] / PROMPTS for r in mine]
            low, high = wilson(mine[0]["right"][str(n)], PROMPTS) if len(mine) == 1 else (min(each), max(each))
            rates[key][n] = sum(each) / len(each), low, high
            bpb[key][n] = sum(r["bpb"][str(n)] for r in mine) / len(mine)
    return rates, bpb


def table(results):
    """The results as lines of text (a Markdown table)."""
    rates, bpb = summarize(results)
    lines = ["| model | temperature | " + " | ".join(f"{n}x" for n in LENGTHS) + f" | bits per byte 1x | {LENGTHS[-1]}x |",
             "|---|---|" + "---|" * (len(LENGTHS) + 2)]
    for name in LINES:
        for remedy in ("as trained", "temperature fitted"):
            key = name, remedy
            cs = sorted({r["c"] for r in results if (r["name"], r["remedy"]) == key})
            cells = [f"{rate:.2f} [{low:.2f}-{high:.2f}]" for rate, low, high in rates[key].values()]
            lines.append(f"| {name} | {'as trained' if remedy == 'as trained' else 'c = ' + ', '.join(f'{c:g}' for c in cs)} | "
                         + " | ".join(cells) + f" | {bpb[key][1]:.2f} | {bpb[key][LENGTHS[-1]]:.2f} |")
    return "\n".join(lines)


def conclusion(results):
    """What the numbers say, in sentences that follow from them. Better or worse: the intervals do not overlap. It is told of
    DroPE at 50%, the arm that was chosen before any result, not of whichever turned out best."""
    rates, bpb = summarize(results)
    far, ours = LENGTHS[-1], "DroPE 50"
    def rate(name, remedy):
        return f"{name} {rates[name, remedy][far][0]:.2f}"
    def verdict(other, remedy):
        _, low, high = rates[ours, remedy][far]
        _, other_low, other_high = rates[other, remedy][far]
        return f"better than {other}" if low > other_high else f"worse than {other}" if high < other_low else f"not told apart from {other}"
    def verdicts(others, remedy):
        return ", ".join(verdict(other, remedy) for other in others)
    plain, fitted = "as trained", "temperature fitted"
    text = {name: bpb[name, plain] for name in ARMS}
    price = {name: text[name][1] - text["RoPE"][1] for name in ARMS if name != "RoPE"}
    rises = [name for name in LINES if bpb[name, plain][far] > bpb[name, plain][1]]
    least = min(bpb, key=lambda key: bpb[key][far])
    nope = {"better": "less", "worse": "more"}.get(verdict("NoPE", plain).split()[0], "as much")
    helps, beats = "better" in verdict("RoPE", plain), [other for other in ("RoPE + NTK", "NoPE") if "better" in verdict(other, fitted)]
    return "\n".join((
        f"As trained, at {far} times the training length: {', '.join(rate(name, plain) for name in ARMS)} (guessing {FLOOR:.2f}). "
        f"{ours} is {verdicts(('RoPE', 'NoPE'), plain)}.",
        f"With the temperature fitted for all alike: {', '.join(rate(name, fitted) for name in LINES)}. "
        f"{ours} is {verdicts(('RoPE', 'RoPE + NTK', 'NoPE'), fitted)}.",
        f"Text at the training length: RoPE {text['RoPE'][1]:.2f} bits per byte; "
        + ", ".join(f"{name} {'costs' if p > 0 else 'saves'} {abs(p):.2f}" for name, p in price.items())
        + f". {far} times the context makes it worse for {'all' if len(rises) == len(LINES) else ', '.join(rises) or 'none'}; "
        f"least bits there: {bpb[least][far]:.2f}, {least[0]}, {least[1]}.",
        f"So at this scale DroPE {'buys' if helps else 'does not buy'} retrieval beyond the training length without any change at inference"
        f"{', and pays for it in bits per byte' if price[ours] > 0 else ''}; NoPE from scratch has {nope} of it. Once the temperature is fitted, it beats "
        f"{' and '.join(beats) if beats else 'neither RoPE + NTK nor NoPE from scratch'}."))


def draw(results, path):
    """The figure: retrieval as trained and with remedies, and bits per byte, over the length. Returns False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no figure: matplotlib is not installed (pip install matplotlib)")
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rates, bpb = summarize(results)
    seeds = len({r["seed"] for r in results})
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    for axis, remedy in zip(axes, ("as trained", "temperature fitted", "as trained")):
        for i, name in enumerate(LINES):
            x = [n * T * 1.03 ** (i - 2) for n in LENGTHS]  # side by side, so that all intervals are seen
            style = "o--" if name == "RoPE + NTK" else "o-"     # dashed: changed at inference
            if axis is axes[2]:
                axis.plot(x, bpb[name, remedy].values(), style, color=COLORS[name], ms=4)
            else:
                mean, low, high = zip(*rates[name, remedy].values())
                axis.plot(x, mean, style, color=COLORS[name], ms=4, label=name)
                axis.vlines(x, low, high, color=COLORS[name])
        axis.set_xscale("log", base=2)
        axis.set_xticks([n * T for n in LENGTHS], [f"{n * T}" if n > 1 else f"{T}\n(trained)" for n in LENGTHS])
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:2]:
        axis.axhline(FLOOR, ls=":", color="gray")
        axis.text(T, FLOOR + 0.015, "guessing", color="gray", fontsize=8)
        axis.set(ylim=(0, 1.04))
    axes[0].set(title="Facts retrieved", ylabel="share of questions answered", xlabel="tokens of context")
    axes[1].set(title="Facts retrieved, attention temperature fitted", xlabel="tokens of context")
    axes[2].set(title="The price: text", ylabel=f"bits per byte of the last {TAIL} tokens", xlabel="tokens of context")
    axes[1].legend(frameon=False, fontsize=8, loc="center left")
    interval = f"mean and range of {seeds} seeds" if seeds > 1 else f"95% interval of {PROMPTS} questions, 1 seed"
    figure.supxlabel(f"4 layers, width 64, trained at {T} tokens; {interval}", fontsize=8, color="gray")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    atomic_write(path, file.getvalue())
    return True


# ---- The report that ends the tiny pipeline --------------------------------------------------------------------------

def report(base, tag):
    """Bits per byte of both stages and at the switch, a sample, an answer of the exported model, and where all is."""
    for stage, script, folder in (("pretraining", "pretrain.py", base / "base_checkpoints" / tag), ("fine-tuning", "sft.py", base / "chatsft_checkpoints" / tag)):
        steps = checkpoint_steps(folder)
        if not steps or not (folder / "metrics.jsonl").exists():
            sys.exit(f"no finished run in {folder}: `python {script} --tag {tag}` makes one")
        records, meta = [json.loads(line) for line in open(folder / "metrics.jsonl")], read_meta(folder, steps[-1])
        bpb = [r["val_bpb"] for r in records if "val_bpb" in r]
        print(f"{stage}: bits per byte {bpb[0]:.3f} -> {bpb[-1]:.3f} in {steps[-1]} steps, {meta['loop_state']['total_training_time']:.0f} s; "
              f"RoPE {'on' if meta['loop_state']['use_rope'] else 'off'}   {folder}")
        for r in records:
            if "switch" in r:
                print(f"  RoPE dropped at step {r['step']}: {r['val_bpb_with_rope']:.3f} with it, {r['val_bpb_without_rope']:.3f} without")
        if meta.get("sample"):
            print(f"  sample: {meta['sample']!r}")
    folder = base / "hf_sft" / tag
    if not (folder / "config.json").exists():
        sys.exit(f"no export in {folder}: `python export_hf.py --tag {tag}` makes one")
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    question = [{"role": "user", "content": "What does os.path.join do?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    print(f"exports: {base / 'hf_base' / tag} and {folder}\n  user: {question[0]['content']}\n"
          f"  assistant: {tokenizer.decode(output[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True)!r}")


# ---- Main ------------------------------------------------------------------------------------------------------------

def demonstrate(config, base):
    """Trains, evaluates, writes and prints everything."""
    for field in ("seeds", "steps"):
        if getattr(config, field) < 1:
            sys.exit(f"--{field} {getattr(config, field)}: at least 1")
    start, data, out = time.time(), write_corpus(base / "data" / "demo"), base / "demo"
    tok = [sys.executable, Path(__file__).with_name("tok.py"), "--data-dir", data, "--out-dir", out / "tokenizer", "--vocab-size", str(TEXT_IDS)]
    if subprocess.run(tok, stdout=subprocess.DEVNULL).returncode:
        sys.exit(1)                                         # tok.py has said why
    code = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in ("demo.py", "model.py", "muon.py")))
    code.update((data / "shard_00000.parquet").read_bytes())        # other code or text: other models
    jobs = [(arm, seed, config.steps, data, out / "tokenizer", out / code.hexdigest()[:8] / f"{arm.replace(' ', '')}_{config.steps}_{seed}.json")
            for seed in range(config.seeds) for arm in ARMS]
    finished, workers = sum(job[-1].exists() for job in jobs), min(len(jobs), os.cpu_count() or 1)
    print(f"{len(jobs)} models, {finished} of them finished before, {workers} at a time, {config.steps * ROWS * T / 1e6:.2f} million tokens each", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))         # leaves the with block, which ends the workers
    with multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        results = [result for arm in pool.imap(run_arm, jobs, chunksize=1) for result in arm]
    atomic_write(out / "results.json", json.dumps(dict(seeds=config.seeds, steps=config.steps, prompts=PROMPTS, results=results), indent=1))
    print(f"\nShare of questions answered right at 1 to {LENGTHS[-1]} times the training length of {T} tokens, guessing {FLOOR:.2f}; "
          f"{'range over the seeds' if config.seeds > 1 else '95% interval'}\n\n{table(results)}\n\n{conclusion(results)}\n")
    figure = Path(config.figure or out / "demo.png")
    if draw(results, figure):
        print(f"figure: {figure}")
    print(f"numbers: {out / 'results.json'} | {(time.time() - start) / 60:.1f} minutes")


def main():
    what = sys.argv[1] if sys.argv[1:] and not sys.argv[1].startswith("-") else ""
    if what not in ("", "corpus", "report"):
        sys.exit(f"demo.py: {what!r} is unknown: say corpus, report --tag TAG, or nothing")
    config = parse_config(Config, __doc__, sys.argv[2 if what else 1:])
    base = Path(config.base_dir or base_dir())
    if what == "corpus":
        write_corpus(base / "data" / "demo")
    elif what == "report":
        report(base, config.tag or sys.exit("demo.py report: which run? --tag TAG"))
    else:
        demonstrate(config, base)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped: what is finished stays, the same command does the rest")
