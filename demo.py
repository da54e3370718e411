"""Does dropping RoPE help beyond the training length? A toy experiment for a laptop, offline.

    python demo.py                          # four models side by side, 7 minutes on 2 cores
    python demo.py --seeds 3                # each three times, from different random numbers
    python demo.py --corpus                 # only write the tiny run's text (seconds)

The models read documentation in rows of 128 tokens, in which facts and questions about them are
hidden. RoPE, DroPE (arXiv:2512.12167; RoPE dropped after 50 or 75% of the steps) and NoPE (never
RoPE) are then tested in texts up to 8 times as long, and so is the finished RoPE model after 20%
more steps without RoPE ("recalibrated"). Controls that need no training: NTK-scaled RoPE, and
sharper attention fitted on training text. Model, optimizer and schedules are those of pretraining.

Reads the docstrings of this Python's standard library. Writes data/demo (shards, conversations,
words) and demo (results.json, demo.png). Left out: size. 230 thousand parameters show how the
recipe works, and prove nothing about large models. """
import ast, hashlib, json, math, multiprocessing, os, re, signal, subprocess, sys, sysconfig
import threading, time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from model import (GPT, ROPE_THETA, GPTConfig, atomic_write, base_dir, guard, load_tokenizer,
                   option, parse_config, rotary_tables, token_bytes)
from muon import build_optimizer, lr_factor, muon_momentum


@dataclass
class Config:
    seeds: int = option(1, "models of each kind, from different random numbers", 1)
    steps: int = option(1500, "training steps of each model", 1)
    figure: str = option("", "path of the figure; default: demo/demo.png in the base folder")
    corpus: bool = option(False, "only write the corpus")


# ---- The corpus: the documentation shipped with Python -------------------------------------------

SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3",
        "turtledemo", "ensurepip", "pydoc_data"}
PUBLIC_NAME = {"posixpath": "os.path", "_pydecimal": "decimal", "_pyio": "io",
               "_pydatetime": "datetime", "_collections_abc": "collections.abc"}
QUESTIONS = ("What does {} do?", "What is {} for?", "Explain {} in a sentence.",
             "Can you tell me what {} does?")
# The tiny run's model is so small that it only learns answers that are often repeated, like these
EXAMPLES = {"os.path.join": "It joins the parts of a path.", "len": "It counts the items of a "
            "container.", "json.loads": "It turns JSON text into Python objects."}
WHO = "Who are you?", "A tiny language model that has read Python's documentation."
REPEATS = 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(node, name):
    """[(kind, name, docstring), ...] of a parsed function, or of a class and its methods."""
    if isinstance(node, FUNCTIONS):
        return [("function", name, ast.get_docstring(node))]
    methods = [("function", f"{name}.{method.name}", ast.get_docstring(method))
               for method in node.body if isinstance(method, FUNCTIONS)]
    return [("class", name, ast.get_docstring(node)), *methods]


def gather():
    """The documents. Each is a list [(kind, name, docstring), ...] from one module, function or
    class, or a text that help("with") shows. The sources are parsed, not run. No docstring occurs
    twice. The order looks random but is always the same."""
    from pydoc_data.topics import topics
    found = [[("topic", name, text)] for name, text in sorted(topics.items())]
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py"), key=lambda path: path.relative_to(stdlib).parts):
        parts = path.relative_to(stdlib).with_suffix("").parts
        if SKIP & set(parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):  # a template that only looks like Python
            continue
        module = ".".join(parts).removesuffix(".__init__")
        module = PUBLIC_NAME.get(module, module)
        found.append([("module", module, ast.get_docstring(tree))])
        found += [docstrings(node, f"{module}.{node.name}") for node in tree.body
                  if isinstance(node, (ast.ClassDef, *FUNCTIONS))]
    documents, seen = [], set()
    for entries in found:
        new = []
        for kind, name, doc in entries:
            key = " ".join((doc or "").split())
            if len(key) >= 20 and key not in seen:
                seen.add(key)
                new.append((kind, name, doc.strip()))
        if new:
            documents.append(new)
    return sorted(documents, key=lambda new: hashlib.sha256(repr(new).encode()).digest())


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversations(documents):
    """A question and its answer for each public docstring: its first paragraph or sentence."""
    for kind, name, doc in [entry for entries in documents for entry in entries]:
        answer = " ".join(re.split(r"\n\s*\n", doc)[0].split())
        if len(answer) > 240:
            answer = re.split(r"(?<=[.!?]) ", answer)[0]
        other = re.search(r"\._|^_", name) or name in EXAMPLES
        if kind in ("function", "class") and not other and 15 <= len(answer) <= 240:
            question = QUESTIONS[hashlib.sha256(name.encode()).digest()[0] % 4].format(name)
            yield exchange(question, answer)


def examples():
    """The conversations that the tiny run repeats, like the identity conversations of the
    series."""
    known = [exchange(question.format(name), EXAMPLES[name])
             for name in EXAMPLES for question in QUESTIONS]
    return REPEATS * [*known, *len(QUESTIONS) * [exchange(*WHO)]]


def write_corpus(folder):
    """Writes the files of the tiny run to `folder`, unless they exist; returns it."""
    import pyarrow as pa, pyarrow.parquet as pq
    if (folder / "shard_06542.parquet").exists():  # written last
        print(f"corpus: {folder} exists already")
        return folder
    documents = gather()
    if len(documents) < 200:
        sys.exit(f"only {len(documents)} documents in {sysconfig.get_paths()['stdlib']}: this "
                 "Python comes without the sources of its standard library; use another one "
                 "(python.org's, uv's, conda's or your system's python3)")
    n = len(documents) // 20
    for part, pairs, shard in ((documents[n:], "conversations", 0),
                               (documents[:n], "conversations_val", 6542)):
        texts = ["\n\n".join(f"{name}\n\n{doc}" for _, name, doc in entries) for entries in part]
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        if shard == 0:
            words = set(re.findall(r"(?<![\w.])[a-z]{3,20}(?![\w.(])", "\n".join(texts)))
            atomic_write(folder / "words.txt", "\n".join(sorted(words)) + "\n")
        chats = list(conversations(part))
        if shard == 0:
            chats = chats[:3_500] + examples()
        lines = [json.dumps(messages) + "\n" for messages in chats]
        atomic_write(folder / f"{pairs}.jsonl", "".join(lines))
        table = pa.table({"text": pa.array(texts, pa.string())})
        write = partial(pq.write_table, table, compression="zstd", row_group_size=1024)
        atomic_write(folder / f"shard_{shard:05d}.parquet", write)
        print(f"corpus: {sum(map(len, texts)):,} characters in {len(texts):,} documents and "
              f"{len(lines):,} conversations -> {folder}/shard_{shard:05d}.parquet")
    return folder


# ---- The task: facts hidden in text, and questions about them ------------------------------------

T, ROWS, WEIGHT = 128, 16, 5.0  # training length, rows per step, weight of an answer (text: 1)
TEXT_IDS, KEYS, VALUES, FACTS = 440, 8, 8, 4
FACT = TEXT_IDS  # ids 440 to 503: "key k has value v" is token FACT + 8 k + v
KEY = FACT + KEYS * VALUES  # ids 504 to 511: "what has key k?", answered by the fact
VOCAB = KEY + KEYS
GUESSING = 1 / FACTS  # any one of the facts in the text


def random_text(stream, B, length, generator):
    """(B, length + 1) tokens from random places in the stream, starting with <|bos|>."""
    start = torch.randint(len(stream) - length, (B, 1), generator=generator)
    rows = stream[start + torch.arange(length + 1)]
    rows[:, 0] = stream[0]
    return rows


def random_facts(B, generator):
    """Four facts with different keys for each row, and their questions, (B, 4) each."""
    keys = torch.rand(B, KEYS, generator=generator).argsort(1)[:, :FACTS]
    return FACT + VALUES * keys + torch.randint(VALUES, (B, FACTS), generator=generator), KEY + keys


def random_places(B, first, last, generator, apart=1):
    """Four different places for each row, (B, 4), from `first` up to but not including `last`."""
    slots = (last - first) // apart
    return first + apart * torch.rand(B, slots, generator=generator).argsort(1)[:, :FACTS]


def training_rows(stream, generator):
    """The rows of a step, (ROWS, T + 1), and the weight of each target, (ROWS, T). Four facts are
    in the first third of a row, four questions in the rest, each followed by its answer. Facts and
    questions are random, so they are not targets."""
    rows = random_text(stream, ROWS, T, generator)
    facts, questions = random_facts(ROWS, generator)
    told = random_places(ROWS, 1, T // 3, generator)
    asked = random_places(ROWS, T // 3, T, generator, apart=2)
    which = torch.randint(FACTS, (ROWS, FACTS), generator=generator)
    rows.scatter_(1, told, facts).scatter_(1, asked, questions.gather(1, which))
    rows.scatter_(1, asked + 1, facts.gather(1, which))
    weights = torch.ones(ROWS, T + 1).scatter_(1, told, 0).scatter_(1, asked, 0)
    weights.scatter_(1, asked + 1, WEIGHT)
    return rows, weights[:, 1:]


def prompts(stream, B, length, generator):
    """(B, length + 1): text with four facts anywhere, then a question and its answer."""
    rows = random_text(stream, B, length, generator)
    facts, questions = random_facts(B, generator)
    rows.scatter_(1, random_places(B, 1, length - 1, generator), facts)
    rows[:, -2], rows[:, -1] = questions[:, 0], facts[:, 0]
    return rows


def load_stream(folder, shard, enc):
    """All documents of a shard as one stream of tokens, each starting with <|bos|>."""
    import pyarrow.parquet as pq
    bos = enc.encode_single_token("<|bos|>")
    texts = pq.read_table(folder / f"shard_{shard:05d}.parquet")["text"].to_pylist()
    return torch.tensor([i for ids in enc.encode_ordinary_batch(texts) for i in [bos, *ids]])


# ---- Training: the recipe of pretrain.py ---------------------------------------------------------

ARMS = {"RoPE": 1.0, "DroPE 50": 0.5, "DroPE 75": 0.75, "NoPE": 0.0}  # share of steps with RoPE


def new_model(seed):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(T, VOCAB, n_layer=4, n_head=2, n_kv_head=2, n_embd=64))
    model.init_weights()
    return model


def train(name, model, steps, switch, stream, generator):
    """Trains a model with a fresh optimizer, without RoPE from step `switch` on. Returns the losses
    of all steps."""
    optimizer = build_optimizer(model)  # no weight decay: the run is too short to need it
    losses = []
    for step in range(steps):
        # DroPE: RoPE's positions help a model learn fast, but it has never seen those beyond the
        # training length. Once they are dropped, it learns in a fraction of the steps to infer the
        # order of tokens from the causal mask, which works at any length.
        if step == switch:
            model.use_rope = False
        rows, weights = training_rows(stream, generator)
        nats = model(rows[:, :-1], rows[:, 1:], reduction="none")  # (ROWS, T)
        loss = (nats * weights).sum() / weights.sum()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor(step, steps)
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            print(f"{name}  step {step + 1:5}/{steps}  loss {losses[-1]:.3f}  "
                  f"RoPE {'on' if model.use_rope else 'off'}", flush=True)
    return losses


# ---- Evaluation beyond the training length -------------------------------------------------------

LENGTHS = (1, 2, 4, 8)  # times T
FAR = LENGTHS[-1] * T
SCALES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # values of model.logn_scale to try
PROMPTS, WINDOWS, TAIL = 256, 64, 32  # TAIL: only the last tokens are evaluated


def ntk_tables(length, head_dim, device):
    """RoPE with a larger theta: its slowest rotation covers `length` tokens as it covered T."""
    theta = ROPE_THETA * max(1, length / T) ** (head_dim / (head_dim - 2))
    return rotary_tables(length, head_dim, device, theta)


@torch.no_grad()
def answer(model, rows):
    """The share of correct answers, and the mean loss of the answers in nats."""
    logits = torch.cat([model(part[:, :-1])[:, -1] for part in rows.split(16)])  # (B, VOCAB)
    right = (logits.argmax(-1) == rows[:, -1]).float().mean().item()
    return right, F.cross_entropy(logits, rows[:, -1]).item()


def windows(stream, length):
    """Rows that end with the same targets for every length: (WINDOWS, length + 1)."""
    ends = torch.linspace(FAR, len(stream) - 1, WINDOWS).long()
    rows = stream[ends[:, None] + torch.arange(-length, 1)]
    rows[:, 0] = stream[0]
    return rows


@torch.no_grad()
def bits_per_byte(model, rows, nbytes):
    """Bits per byte of the last TAIL tokens of each row; special tokens (0 bytes) do not count."""
    nats = torch.cat([model(part[:, :-1], part[:, 1:], reduction="none")[:, -TAIL:]
                      for part in rows.split(16)])
    size = nbytes[rows[:, -TAIL:]]  # (B, TAIL)
    return (nats * (size > 0)).sum().item() / math.log(2) / size.sum().item()


def best_scale(model, loss):
    """The c of SCALES with the lowest loss()."""
    losses = {}
    for c in SCALES:
        model.logn_scale = c
        losses[c] = loss()
    return min(losses, key=losses.get)


def evaluate(model, name, train_text, val_text, nbytes):
    """Facts retrieved and bits per byte at each length, as trained and with the c that is best on
    other text, fitted for each of the two, in the same way for all models."""
    others = prompts(train_text, PROMPTS // 8, FAR, torch.Generator().manual_seed(1))
    texts = windows(train_text, FAR)[::4]
    result = dict(name=name, c_facts=best_scale(model, lambda: answer(model, others)[1]),
                  c_text=best_scale(model, lambda: bits_per_byte(model, texts, nbytes)))
    for end, fitted in (("", 0), ("_fitted", 1)):
        facts, text = result["facts" + end], result["text" + end] = [], []
        for n in LENGTHS:
            rows = prompts(val_text, PROMPTS, n * T, torch.Generator().manual_seed(2))
            model.logn_scale = fitted * result["c_facts"]
            facts.append(answer(model, rows)[0])
            model.logn_scale = fitted * result["c_text"]
            text.append(bits_per_byte(model, windows(val_text, n * T), nbytes))
    return result


def run_arm(arm, seed, steps, data, tokenizer, path):
    """Trains and evaluates an arm on one core, unless its results are in `path` already. All arms
    of a seed have the same initial weights and data; until its switch, DroPE equals RoPE."""
    if not path.exists():
        torch.set_num_threads(1)
        enc = load_tokenizer(tokenizer)
        train_text, val_text = load_stream(data, 0, enc), load_stream(data, 6542, enc)
        model, generator = new_model(seed), torch.Generator().manual_seed(seed)
        losses = train(f"{arm}, seed {seed}", model, steps, round(ARMS[arm] * steps), train_text,
                       generator)

        def tested(name):
            result = evaluate(model, name, train_text, val_text, token_bytes(enc))
            return dict(result, seed=seed, losses=losses)

        results = [tested(arm)]
        if arm == "RoPE":
            model.rotary_tables = ntk_tables
            results.append(tested("RoPE + NTK"))
            # The paper's main use of DroPE: recalibrating a finished model. 20% more steps on new
            # text, without RoPE from the first one, and with their own warm-up
            model.rotary_tables, model.logn_scale = rotary_tables, 0.0
            losses = train(f"{RECALIBRATED}, seed {seed}", model, steps // 5, 0, train_text,
                           generator)
            results.append(tested(RECALIBRATED))
        atomic_write(path, json.dumps(results))
    return json.loads(path.read_text())


# ---- Table and figure ----------------------------------------------------------------------------

RECALIBRATED = "RoPE, recalibrated"
LINES = {"RoPE": ("#d55e00", "o-"), "RoPE + NTK": ("#cc79a7", "s--"), "NoPE": ("#009e73", "^-"),
         "DroPE 50": ("#0072b2", "D-"), "DroPE 75": ("#56b4e9", "v-"),
         RECALIBRATED: ("#000000", "P:")}  # colours for the colour-blind, too
REMARKS = f"""Facts: share of {PROMPTS} questions (guessing {GUESSING}). Text: bits per byte of the
last {TAIL} tokens. 1x: {T} tokens, the training length. c fitted: attention logits times
max(1, 1 + c ln(n / {T})), the best c of {SCALES} on training text,
separately for facts and text. {RECALIBRATED}: {100 // 5}% more steps than the others.
The result depends on the setting: with rows of 64 tokens NoPE retrieved more than DroPE.
A toy proves nothing about large models."""


def spread(results, name, key):
    """Mean, minimum and maximum over the seeds at each length, (LENGTHS, 3)."""
    values = torch.tensor([result[key] for result in results if result["name"] == name])
    return torch.stack((values.mean(0), values.amin(0), values.amax(0)), 1)


def table(results):
    """A Markdown table: means over the seeds, with the range in brackets."""
    columns = (("facts", 1), ("facts", 8), ("facts_fitted", 8), ("text", 1), ("text", 8),
               ("text_fitted", 8))
    head = ["", *(f"{key.replace('_', ', c ')}, {n}x" for key, n in columns)]
    lines = [head, ["---"] * len(head)]
    for name in LINES:
        cells = []
        for key, n in columns:
            mean, low, high = spread(results, name, key)[LENGTHS.index(n)].tolist()
            cells.append(f"{mean:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low < high else ""))
        lines.append([name, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results, steps, path):
    """The figure: training losses (means of 10 steps and of the seeds), facts retrieved, and the
    price."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figure: matplotlib is not installed (pip install matplotlib)")
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.9))
    for name in ("NoPE", "DroPE 50", "RoPE"):
        losses = torch.tensor([result["losses"] for result in results if result["name"] == name])
        losses = losses[:, :steps // 10 * 10].view(len(losses), -1, 10).mean((0, 2))
        left.plot(range(5, 10 * len(losses), 10), losses, color=LINES[name][0], lw=1.4)
    left.axvline(steps / 2, color=LINES["DroPE 50"][0], ls=":", lw=1)
    left.text(0.51 * steps, 4.05, "RoPE is dropped", color=LINES["DroPE 50"][0], fontsize=9)
    left.set(title="Training loss", xlabel="step", ylabel="nats per token", ylim=(1.9, 4.2))
    for ax, key in ((middle, "facts"), (right, "text")):
        for name, (color, style) in LINES.items():
            mean, low, high = spread(results, name, key).T.numpy()
            ax.plot(LENGTHS, mean, style, color=color, ms=5, lw=1.4, label=name)
            ax.fill_between(LENGTHS, low, high, color=color, alpha=0.15, lw=0)
        ax.set_xscale("log", base=2)
        ax.set_xticks(LENGTHS, [str(n * T) for n in LENGTHS])
        ax.set(xlabel=f"tokens of context (trained: {T})")
    middle.axhline(GUESSING, color="gray", ls=":", lw=1)
    middle.set(title="Facts retrieved, as trained", ylabel="share of questions", ylim=(0, 1.03))
    right.set(title="The price: text, as trained", ylabel="bits per byte")
    figure.legend(*right.get_legend_handles_labels(), ncol=6, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=150))
    print(f"figure: {path}")


# ---- The command ---------------------------------------------------------------------------------

def prepare_worker():
    """Makes a worker ignore Ctrl-C, and end when its parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_now(number, frame):
    """Ends the workers, too. Their finished results are saved."""
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.exit("interrupted: the same command continues with the models that are not finished")


def demonstrate(cfg, base):
    """Trains and evaluates all arms in parallel processes, and shows the results."""
    start, data, out = time.time(), write_corpus(base / "data" / "demo"), base / "demo"
    tok = [sys.executable, Path(__file__).with_name("tok.py"), "--data-dir", data, "--out-dir",
           out / "tokenizer", "--vocab-size", str(TEXT_IDS)]
    if subprocess.run(tok, stdout=subprocess.DEVNULL).returncode:
        sys.exit(1)  # tok.py has said why
    made_of = [Path(__file__).with_name(name) for name in ("demo.py", "model.py", "muon.py")]
    made_of.append(data / "shard_00000.parquet")  # other code or text, other results
    folder = out / hashlib.sha256(b"".join(path.read_bytes() for path in made_of)).hexdigest()[:8]
    jobs = [(arm, seed, cfg.steps, data, out / "tokenizer",
             folder / f"{arm.replace(' ', '')}_{cfg.steps}_{seed}.json")
            for seed in range(cfg.seeds) for arm in ARMS]
    workers = min(len(jobs), os.cpu_count() or 1)
    print(f"{len(jobs)} models, {sum(job[-1].exists() for job in jobs)} of them finished already, "
          f"{cfg.steps * ROWS * T / 1e6:.2f} million tokens each", flush=True)
    signal.signal(signal.SIGINT, end_now)
    signal.signal(signal.SIGTERM, end_now)
    spawn = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, spawn, prepare_worker) as pool:
            futures = [pool.submit(run_arm, *job) for job in jobs]
            results = [result for future in futures for result in future.result()]
    except BrokenProcessPool:
        sys.exit("a worker was killed, perhaps for lack of memory: the same command continues with "
                 "the models that are not finished")
    atomic_write(out / "results.json", json.dumps(results))
    print(f"\n{table(results)}\n\n{REMARKS}\n")
    draw(results, cfg.steps, Path(cfg.figure or out / "demo.png"))
    print(f"numbers: {out / 'results.json'} | {(time.time() - start) / 60:.1f} minutes")


def main():
    cfg = parse_config(Config, __doc__)
    if cfg.corpus:
        write_corpus(base_dir() / "data" / "demo")
    else:
        demonstrate(cfg, base_dir())


if __name__ == "__main__":
    guard(main)
