"""Pretraining: next-token prediction on a stream of parquet shards, with DroPE as an option.

    python pretrain.py --depth 18 --tpp 9 --drope 50        # one H100
    torchrun --nproc_per_node 8 pretrain.py --depth 18      # the same batches, the same losses
    python pretrain.py --fetch 8                            # only downloads 8 training shards and the validation shard

Takes the tokenizer (tok.py) and the shards, of which missing ones are downloaded while it trains. Gives
base_checkpoints/TAG/: model_, optim_, loader_ and meta_ files of a step, and metrics.jsonl. Run the same command again
to go on after an interruption: the result is the same to the bit. The published 4 hours for d18 at 9 tokens per parameter are 50% of
an H100's bfloat16 peak.

DroPE (arXiv:2512.12167): RoPE for the first part of the steps, then none at all; look for "the switch" below. Batch size, learning
rates and weight decay follow from the depth, the one dial (see `derive`). Left out: mid-training, other optimizers, sharding.
"""
import atexit, gc, json, math, multiprocessing, os, queue, re, resource, signal, sys, threading, time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from model import (GPT, GPTConfig, INTERRUPTED, FetchError, StopRequest, accumulate_gradients, any_process, append_record, atomic_write, attention_kernel, base_dir,
                   bits_per_byte, broadcast, checkpoint_steps, fetch, load_part, load_tokenizer, lock, log_head, newest_checkpoint,
                   parse_config, read_meta, save_checkpoint, set_fp8, setup_env, token_bytes, tokenizer_hash, try_compile)
from muon import build_optimizer, lr_factor, muon_momentum, muon_weight_decay


@dataclass
class Config:
    depth: int = 18                     # layers; width, batch size and learning rates follow from it
    tpp: float = 9                      # tokens per scaling parameter: how long to train
    drope: int | None = None            # percent of the steps with RoPE, 0 to 99 (0: never RoPE); not given: RoPE stays
    tag: str = ""                       # name of the run; not given: made of the three above, as in d18_9tpp_drope_50
    dataset: str = "karpathy/climbmix-400b-shuffle"     # where missing shards come from; "local": only what data_dir holds
    data_dir: str = ""                  # folder of the shards; not given: data/climbmix in the base folder
    tokenizer_dir: str = ""             # folder of the tokenizer; not given: tokenizer in the base folder
    epochs: int = 1                     # passes over the training shards that are allowed
    max_seq_len: int = 4096             # tokens of a row
    total_batch_size: int | None = None # tokens of a step; not given: from the depth (1,048,576 for d18 and d20)
    device_batch_size: int | None = None    # rows at a time on a device; not given: as many as its memory holds
    embedding_lr: float = 0.3           # AdamW, reference value (see derive)
    unembedding_lr: float = 0.008       # AdamW, reference value
    matrix_lr: float = 0.02             # Muon, reference value
    weight_decay: float = 0.28          # Muon, reference value
    eval_every: int = 250               # steps between validations
    eval_tokens: int = 41_943_040       # validation tokens at the end
    eval_sample: int = 4_194_304        # validation tokens on the way and at the switch: the first of those
    save_every: int = 500               # steps between checkpoints; the last two are kept
    keep: str = ""                      # percents of the run whose checkpoints stay too, for branches: 25,50,75
    trunk: str = ""                     # with drope: start at the switch from the checkpoint that this tag kept there
    compile: int | None = None          # torch.compile, 1 or 0; not given: 1 on a GPU
    fp8: bool = False                   # matmuls of the blocks in float8 while training (H100 or newer)
    bench: bool = False                 # time 20 steps on random tokens, print one JSON line, and stop; needs no files
    vocab_size: int = 32768             # of --bench; a run takes its tokenizer's
    fetch: int | None = None            # download so many training shards (0: those that this run needs), and stop
    patience: float = 600               # seconds to keep asking a hub that does not answer


# What must not change between an interruption and its continuation
RECIPE = ("depth", "tpp", "drope", "dataset", "max_seq_len", "total_batch_size", "embedding_lr", "unembedding_lr", "matrix_lr",
          "weight_decay", "eval_every", "eval_tokens", "eval_sample", "fp8")
VALIDATION = 6542                       # the number of the validation shard, never trained on


# ---- Everything that follows from depth, tpp and drope -----------------------------------------------------------------

def derive(cfg, vocab_size):
    """Sets the batch size and returns (GPTConfig, dict of what else follows): the one place where numbers are derived."""
    config = GPTConfig.from_depth(cfg.depth, vocab_size, cfg.max_seq_len)
    with torch.device("meta"):
        N = GPT(config).num_scaling_params()
        N12 = GPT(GPTConfig.from_depth(12, vocab_size)).num_scaling_params()    # the depth that was tuned
    if cfg.total_batch_size is None:    # the best batch grows like tokens^0.383 (arXiv:2505.13738)
        cfg.total_batch_size = 2 ** round(math.log2(2 ** 19 * (N / N12) ** 0.383))
    batch = cfg.total_batch_size
    steps = int(cfg.tpp * N / batch)
    scale = math.sqrt(batch / 2 ** 19)  # a batch k times as large carries sqrt(k) times the learning rate
    return config, dict(
        N=N, steps=steps, tokens=steps * batch,
        switch=None if cfg.drope is None else round(cfg.drope / 100 * steps),       # the first step without RoPE
        lrs=dict(embedding_lr=cfg.embedding_lr * scale, unembedding_lr=cfg.unembedding_lr * scale, matrix_lr=cfg.matrix_lr * scale),
        weight_decay=cfg.weight_decay * scale * N12 / N)        # a longer run wants less of it (arXiv:2405.13698)


def check(cfg):
    """One line and exit for numbers that cannot be."""
    if cfg.depth < 1 or cfg.tpp <= 0:
        sys.exit(f"--depth {cfg.depth} --tpp {cfg.tpp:g}: both must be positive, as in --depth 18 --tpp 9")
    for name in ("eval_every", "save_every", "max_seq_len", "epochs", "eval_tokens", "eval_sample"):
        if getattr(cfg, name) < 1:
            sys.exit(f"--{name.replace('_', '-')} {getattr(cfg, name)}: at least 1")
    if cfg.keep and not re.fullmatch(r"[\d.]+(,[\d.]+)*", cfg.keep):
        sys.exit(f"--keep {cfg.keep}: percents with commas between them, such as 25,50,75")
    if cfg.drope is not None and not 0 <= cfg.drope <= 99:
        sys.exit(f"--drope {cfg.drope}: percent of the steps with RoPE, 0 to 99; leave it out to keep RoPE throughout")
    if cfg.trunk and not cfg.drope:
        sys.exit("--trunk goes with --drope 1 to 99: a branch starts where RoPE is dropped")
    cfg.tag = cfg.tag or f"d{cfg.depth}_{cfg.tpp:g}tpp" + ("" if cfg.drope is None else f"_drope_{cfg.drope}")
    if not re.fullmatch(r"\w[\w.-]*", cfg.tag):
        sys.exit(f"--tag {cfg.tag!r}: a folder name of letters, digits, _ - and .")
    cfg.data_dir = cfg.data_dir or str(base_dir() / "data" / "climbmix")
    cfg.tokenizer_dir = cfg.tokenizer_dir or str(base_dir() / "tokenizer")


def check_batch(cfg, env, config, steps):
    rows, rest = divmod(cfg.total_batch_size, cfg.max_seq_len)
    if rest or rows % env.world or rows == 0:
        sys.exit(f"--total-batch-size {cfg.total_batch_size} must be a multiple of max_seq_len x processes = "
                 f"{cfg.max_seq_len} x {env.world}: take {max(1, round(rows / env.world)) * env.world * cfg.max_seq_len}")
    if steps < 1:
        sys.exit(f"--tpp {cfg.tpp:g} at depth {cfg.depth} is less than one batch of {cfg.total_batch_size} tokens: raise --tpp or lower --total-batch-size")
    share = rows // env.world
    micro = cfg.device_batch_size or rows_that_fit(config, cfg.max_seq_len, env, cfg.fp8)
    while share % micro and not cfg.device_batch_size:
        micro -= 1
    if share % micro:
        sys.exit(f"--device-batch-size {micro} must divide the {share} rows of a process")
    return rows, min(micro, share)


def step_memory(config, rows, T, size=2, fp8=False):
    """Bytes that a compiled step takes with `rows` rows at a time (size: bytes of an activation, 2 in bfloat16).

    For each parameter 16: weight, gradient, and two moments (AdamW) or one and a cast weight (Muon). For backward a layer keeps, of
    each token, 19 C (C = n_embd): its 2 residual inputs, their norms, q and k as rotated, q, k and v as attention takes them,
    attention's output with heads apart and together, gate, up and their product (8/3 C each); with float8 all but the norms and
    the product, 14.3 C. 15 C more are at work at a time. The loss holds logits and their gradient for a chunk of 4,096 positions, and
    of every chunk the head's gradient. In GB, with T = 4,096 and bfloat16 (float8):

               8 rows      16 rows      32 rows
        d18   34 (28)      61 (49)     117 (91)
        d20   42 (34)      76 (60)     143 (112)
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPT(config).parameters())
    tokens, C = rows * T, config.n_embd
    layers = (19 - fp8 * (2 + 8 / 3)) * config.n_layer + 15
    loss = 2 * min(4096, tokens) * config.vocab_size + -(-tokens // 4096) * config.vocab_size * C
    return round(16 * parameters + size * (layers * C * tokens + loss))


def rows_that_fit(config, T, env, fp8=False):
    """The largest power of two of rows, at most 32, that 85% of a device's free memory holds (6 GB on a CPU). Uncompiled, a step takes
    more than the formula says: a layer keeps about 22 C."""
    free = 0.85 * torch.cuda.mem_get_info(env.device)[0] if env.device.type == "cuda" else 6e9
    return max((n for n in (2, 4, 8, 16, 32) if step_memory(config, n, T, env.dtype.itemsize, fp8) <= free), default=1)


# ---- Shards: which are there, which are needed, and the downloader ------------------------------------------------------

class Shards:
    """The training shards in their order and the validation shard, in one folder, some of them still at the hub."""

    def __init__(self, cfg):
        self.cfg, self.folder = cfg, Path(cfg.data_dir)
        self.index, index_file = {"revision": "local", "sha256": {}}, self.folder / "index.json"
        if cfg.dataset != "local":      # the listing of the hub is kept, so that the revision stays and no network is needed later
            if index_file.exists():
                self.index = json.loads(index_file.read_text())
                if self.index["dataset"] != cfg.dataset:
                    sys.exit(f"{self.folder} holds shards of {self.index['dataset']}, not of {cfg.dataset}: choose another --data-dir")
            else:
                self.index = self.ask_hub()
                atomic_write(index_file, json.dumps(self.index, indent=0))
        names = set(self.index["sha256"]) | {p.name for p in self.folder.glob("shard_*.parquet")}
        names = sorted(n for n in names if re.fullmatch(r"shard_\d{5}\.parquet", n))
        self.validation = self.folder / f"shard_{VALIDATION:05d}.parquet"
        self.train = [self.folder / n for n in names if n != self.validation.name]
        if not self.train or self.validation.name not in names:
            sys.exit(f"{self.folder}: no shard_*.parquet or no validation shard {self.validation.name} there; "
                     f"`python pretrain.py --fetch 8` downloads the first 8 and it")

    def ask_hub(self):
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError
        start, pause = time.time(), 1.0
        while True:
            try:
                info = HfApi().dataset_info(self.cfg.dataset, files_metadata=True)
                return {"dataset": self.cfg.dataset, "revision": info.sha,
                        "sha256": {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs and s.rfilename.endswith(".parquet")}}
            except RepositoryNotFoundError:
                sys.exit(f"--dataset {self.cfg.dataset}: the hub has no such dataset, or not for you (HF_TOKEN)")
            except Exception as e:
                if time.time() - start + pause > self.cfg.patience:
                    sys.exit(f"{self.cfg.dataset} cannot be reached: {str(e).splitlines()[0][:160]}; "
                             f"to train on the shards in {self.folder} alone add --dataset local")
                print(f"{self.cfg.dataset}: {str(e).splitlines()[0][:120]}; again in {pause:.0f} s", file=sys.stderr)
                time.sleep(pause)
                pause = min(2 * pause, 60.0)

    def get(self, path):
        """Downloads a shard where it is missing; FetchError after cfg.patience seconds."""
        if not path.exists() and self.cfg.dataset == "local":
            raise FetchError(f"{path} is missing")
        return fetch(self.cfg.dataset, path.name, path, revision=self.index["revision"],
                     sha256=self.index["sha256"].get(path.name), patience=self.cfg.patience)

    def needed(self, tokens, enc):
        """The shards that `tokens` tokens take, told from a sample of the first; exits if there are too few."""
        per_byte = tokens_per_byte(self.get(self.train[0]), enc)
        local = {p: text_bytes(p) for p in self.train if p.exists()}
        usual = sum(local.values()) / len(local)
        total, count = 0.0, 0
        for count, path in enumerate(self.train, 1):
            total += local.get(path, usual) * per_byte * 0.95       # 5% for what packing cuts and for the sample's error
            if total >= tokens:
                return self.train[:count]
        if total * self.cfg.epochs < tokens:
            sys.exit(f"{tokens:,.0f} tokens need about {tokens / total:.1f} passes over the {count} training shards of {self.folder} "
                     f"(~{total:,.0f} tokens a pass): add shards, lower --tpp, or allow it with --epochs {math.ceil(tokens / total)}")
        print(f"{tokens:,.0f} tokens are about {tokens / total:.1f} passes over the {count} training shards: documents will repeat (--epochs {self.cfg.epochs})")
        return self.train


def open_shard(path):
    import pyarrow, pyarrow.parquet as pq
    try:
        shard = pq.ParquetFile(path)
        if "text" not in shard.schema_arrow.names or shard.metadata.num_rows == 0:
            raise pyarrow.ArrowInvalid("it has no rows in a column `text`")
        return shard
    except (pyarrow.ArrowException, OSError) as e:
        raise FetchError(f"shard {path} is damaged or empty ({str(e).splitlines()[0][:120]}): delete it and run again, it is fetched anew") from None


def read_texts(path, shard, group):
    """The documents of a row group; FetchError where they cannot be read."""
    import pyarrow
    try:
        return [t or "" for t in shard.read_row_group(group, columns=["text"]).column("text").to_pylist()]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        raise FetchError(f"shard {path} is damaged ({str(e).splitlines()[0][:120]}): delete it and run again, it is fetched anew") from None


def text_bytes(path):
    """Bytes of text in a shard, from its footer alone."""
    meta = open_shard(path).metadata
    column = [meta.schema.column(i).name for i in range(meta.num_columns)].index("text")
    return sum(meta.row_group(g).column(column).total_uncompressed_size - 4 * meta.row_group(g).num_rows for g in range(meta.num_row_groups))


def tokens_per_byte(path, enc):
    texts = read_texts(path, open_shard(path), 0)
    return sum(1 + len(ids) for ids in enc.encode_ordinary_batch(texts)) / max(1, sum(len(t.encode()) for t in texts))


# ---- Rows: best-fit packing ---------------------------------------------------------------------------------------------

class PackedRows:
    """Rows of T + 1 tokens, each beginning with <|bos|>, packed from whole documents wherever one fits.

    A buffer holds at least 1,000 documents (refilled by 128). A row takes the longest document that fits, again and again;
    when none fits, the shortest is cut to fill the row, the rest of it is lost (~1.3% of the tokens; no padding). A document longer than
    a row is split into row-long pieces when it enters the buffer; it would never fit and never be the shortest.
    `wait(path)` is called before a shard is opened. state() is all that is needed to go on from here."""

    def __init__(self, shards, enc, row_len, epochs=1, state=None, threads=4, wait=lambda path: path):
        self.shards, self.enc, self.row_len, self.epochs, self.threads, self.wait = shards, enc, row_len, epochs, threads, wait
        self.bos = enc.encode_single_token("<|bos|>")
        self.epoch, self.shard, self.group, self.row = state["position"] if state else (0, 0, 0, 0)
        self.tokens, self.cut = state["counts"] if state else (0, 0)
        self.lengths = state["lengths"] if state else np.empty(0, np.int64)     # of the documents in the buffer
        self.buffer = np.split(state["tokens"], np.cumsum(self.lengths)[:-1]) if len(self.lengths) else []
        self.texts = self.file = None
        seen = state["shards"] if state else []
        if seen != [path.name for path in shards[:len(seen)]]:
            raise FetchError(f"the run has read the shards {', '.join(seen)}, but they are not the first ones any more: put them back")

    def state(self):
        tokens = np.concatenate(self.buffer) if self.buffer else np.empty(0, np.uint16)
        return {"position": (self.epoch, self.shard, self.group, self.row), "counts": (self.tokens, self.cut),
                "tokens": tokens, "lengths": self.lengths, "shards": [path.name for path in self.shards[:self.shard + 1]]}

    def refill(self):
        """Adds the next 128 documents to the buffer; False after the last of the last epoch."""
        while self.texts is None:
            if self.shard == len(self.shards):
                self.epoch, self.shard, self.group, self.row = self.epoch + 1, 0, 0, 0
            if self.epoch == self.epochs:
                return False
            if self.file is None:
                self.file = open_shard(self.wait(self.shards[self.shard]))
            if self.group == self.file.num_row_groups:
                self.file, self.shard, self.group = None, self.shard + 1, 0
                continue
            self.texts = read_texts(self.shards[self.shard], self.file, self.group)
        texts, body, new = self.texts[self.row:self.row + 128], self.row_len - 1, []
        for ids in self.enc.encode_ordinary_batch(texts, num_threads=self.threads):
            for start in range(0, max(1, len(ids)), body):
                new.append(np.array([self.bos] + ids[start:start + body], dtype=np.uint16))
        self.buffer += new
        self.lengths = np.concatenate([self.lengths, [len(d) for d in new]])
        self.tokens += sum(map(len, new))
        self.row += 128
        if self.row >= len(self.texts):
            self.texts, self.group, self.row = None, self.group + 1, 0
        return True

    def next_row(self):
        """uint16 (T+1,), or None when the documents have run out."""
        row, room = [], self.row_len
        while room:
            while len(self.buffer) < 1000 and self.refill():
                pass
            if not self.buffer:
                return None
            best = int(np.where(self.lengths <= room, self.lengths, 0).argmax())    # the longest that fits, the earliest of equals
            if self.lengths[best] > room:                                   # none fits
                best = int(self.lengths.argmin())
                self.cut += int(self.lengths[best]) - room
            row.append(self.buffer.pop(best)[:room])
            self.lengths = np.delete(self.lengths, best)
            room -= len(row[-1])
        return np.concatenate(row)


QUIET = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def feed(conn, cfg, shards, paths, rows, state):
    """The loader's process: downloads ahead in a thread, packs, and sends (rows, state) for one step at a time."""
    for s in QUIET:
        signal.signal(s, signal.SIG_IGN)                    # the trainer decides when to stop
    parent, failed = os.getppid(), []

    def download():
        for path in paths:
            while not path.exists():
                try:
                    shards.get(path)
                    failed.clear()
                except FetchError as e:                     # whoever waits for it is told; the hub may be back later
                    failed[:] = [str(e)]
                    time.sleep(10)

    def wait(path):
        since = time.time()
        while not path.exists():
            if failed:
                raise FetchError(failed[0])
            if os.getppid() != parent:
                os._exit(1)
            if time.time() - since > 30:
                print(f"waiting for {path.name}", file=sys.stderr, flush=True)
                since = time.time()
            time.sleep(0.1)
        return path

    threading.Thread(target=download, daemon=True).start()
    try:
        enc = load_tokenizer(cfg.tokenizer_dir)
        stream = PackedRows(paths, enc, cfg.max_seq_len + 1, cfg.epochs, state, wait=wait)
        while True:
            batch = [stream.next_row() for _ in range(rows)]
            if batch[-1] is None:
                raise FetchError(f"the {len(paths)} training shards ran out after {stream.epoch} epochs: allow one more with --epochs {cfg.epochs + 1}")
            conn.send((np.stack(batch), stream.state()))
    except FetchError as e:
        conn.send((None, str(e)))
    except BrokenPipeError:                                 # the trainer is gone
        pass
    os._exit(0)                                             # the downloader's thread may be in the middle of something


def start_loader(cfg, shards, paths, rows, state):
    """Starts the loader's process; returns a queue of (rows, state), or (None, why not). A thread empties the pipe into it, so that
    the next batch is there when a step ends."""
    context, batches = multiprocessing.get_context("spawn"), queue.Queue(maxsize=1)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=feed, args=(send, cfg, shards, paths, rows, state), daemon=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, QUIET)         # the child inherits it: a signal must not end it while it starts
    process.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, QUIET)
    atexit.register(process.kill)                           # it takes no other signal
    send.close()

    def forward():
        try:
            while True:
                batches.put(receive.recv())
        except (EOFError, OSError):
            batches.put((None, "the loader's process died (out of memory?)"))

    threading.Thread(target=forward, daemon=True).start()
    return batches


def next_batch(batches, stop):
    """(rows, state) of one step, or (None, why not); a request to stop is heeded while the loader waits for a shard."""
    while True:
        try:
            return batches.get(timeout=1)
        except queue.Empty:
            if stop:
                return None, f"stopped by {stop.signal} while waiting for data"


# ---- Validation -----------------------------------------------------------------------------------------------------------

class Validation:
    """Bits per byte of the first rows of the packed validation shard: the same rows, however they are divided."""

    def __init__(self, cfg, shards, enc, env, micro):
        self.cfg, self.env, self.micro, self.rows, self.all_used = cfg, env, micro, [], False
        if env.rank == 0:
            self.stream = PackedRows([shards.validation], enc, cfg.max_seq_len + 1)
        self.nbytes = token_bytes(enc).to(env.device)

    def __call__(self, model, tokens):
        wanted = max(1, tokens // self.cfg.max_seq_len)
        if self.env.rank == 0:
            while len(self.rows) < wanted and (row := self.stream.next_row()) is not None:
                self.rows.append(torch.from_numpy(row.astype(np.int32)))
            if len(self.rows) < wanted and not self.all_used:
                self.all_used = True
                print(f"the validation shard holds {len(self.rows)} rows, not {wanted}: all are used")
        count = broadcast(torch.tensor([min(wanted, len(self.rows))]), self.env, (1,), torch.int64).item()
        rows = broadcast(torch.stack(self.rows[:count]) if self.env.rank == 0 else None, self.env, (count, self.cfg.max_seq_len + 1), torch.int32)
        return bits_per_byte(model, ((r[:, :-1].long(), r[:, 1:].long()) for r in rows.split(self.micro)), self.nbytes, self.env)


@torch.no_grad()
def sample(model, enc, prompt, n=48):
    """Greedy continuation of a text, without a cache: n forward passes."""
    ids = [enc.encode_single_token("<|bos|>")] + enc.encode_ordinary(prompt)
    device = model.lm_head.weight.device
    for _ in range(n):
        ids.append(model(torch.tensor([ids[-model.config.sequence_len:]], device=device))[0, -1].argmax().item())
    return enc.decode(ids[1:])


# ---- Speed ------------------------------------------------------------------------------------------------------------------

def bench(cfg, env):
    """One JSON line: the median of 20 real steps on random tokens, after 3 to warm up. On a CPU compiled and not, the faster of the
    two counts, and beside a plain step: the same model uncompiled, all logits at once, torch's AdamW."""
    config, derived = derive(cfg, cfg.vocab_size)
    rows, micro = check_batch(cfg, env, config, 1)
    kernel, cuda = attention_kernel(env, config), env.device.type == "cuda"
    sync = torch.cuda.synchronize if cuda else lambda: None
    memory = torch.cuda.max_memory_allocated if cuda else lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    tokens = torch.randint(cfg.vocab_size, (rows, cfg.max_seq_len + 1), dtype=torch.int32, pin_memory=cuda)
    before = memory()
    torch.manual_seed(42)
    model = GPT(config, dtype=env.dtype)
    model.init_weights()
    model.to(env.device)
    if cfg.fp8:
        set_fp8(model, env.device)

    def ours(compile):
        compiled = try_compile(model, env.device, compile)
        optimizer = build_optimizer(model, **derived["lrs"], weight_decay=derived["weight_decay"], compile=compiled is not model)
        return int(compiled is not model), (lambda x, y: accumulate_gradients(compiled, x, y, micro, env), optimizer)

    def plain(x, y):
        loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        return loss

    def step(gradients, optimizer):
        """Seconds of its parts: data, forward and backward, optimizer."""
        marks = [time.time()]
        batch = broadcast(tokens, env, tokens.shape, torch.int32).long()
        sync(), marks.append(time.time())
        gradients(batch[:, :-1], batch[:, 1:]).item()
        sync(), marks.append(time.time())
        optimizer.step()
        optimizer.zero_grad()
        sync(), marks.append(time.time())
        return np.diff(marks)

    cpu = env.device.type == "cpu"
    ways = dict(ours(c) for c in ((0, 1) if cfg.compile is None and cpu else (cfg.compile != 0,)))
    for _ in range(2):
        step(*next(iter(ways.values())))
    peak = memory() - before                                # on a CPU of the uncompiled step (with --compile 1, of the compiler too)
    if cpu:
        ways["plain"] = plain, torch.optim.AdamW(model.parameters(), lr=1e-4)
    seconds = {way: [] for way in ways}
    for _ in range(3 + 20):
        for way in ways:                                    # in turn, so that a machine that others use is as fast for each
            seconds[way].append(step(*ways[way]))
    medians = {way: np.median([sum(parts) for parts in times[3:]]) for way, times in seconds.items()}
    plain_step = medians.pop("plain", None)
    compiled = min(medians, key=medians.get)
    shares = np.sum(seconds[compiled][3:], axis=0) / np.sum(seconds[compiled][3:])
    speed = cfg.total_batch_size / medians[compiled]
    flops = speed * model.flops_per_token() / env.world
    size = 8192 if cuda else 2048
    a, matmuls = torch.randn(size, size, device=env.device, dtype=env.dtype), []
    for _ in range(10):
        sync(), (start := time.time()), a @ a, sync()
        matmuls.append(2 * size ** 3 / (time.time() - start))
    if env.rank == 0:
        print(json.dumps(dict(
            device=torch.cuda.get_device_name() if cuda else env.device.type, torch=torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0], depth=cfg.depth,
            dtype="fp8" if cfg.fp8 else str(env.dtype).removeprefix("torch."), batch=cfg.total_batch_size, rows=micro, attention=kernel,
            compile=compiled, processes=env.world, tokens_per_second=round(speed), step_seconds=round(medians[compiled], 4),
            mfu=env.peak_flops and round(flops / env.peak_flops, 4), model_tflops=round(flops / 1e12, 3),
            matmul_tflops=round(np.median(matmuls) / 1e12, 3), of_matmul_rate=round(flops / np.median(matmuls), 3),
            **dict(zip(("share_data", "share_forward_backward", "share_optimizer"), (round(s, 4) for s in shares.tolist()))),
            peak_memory_gb=round(peak / 1e9, 2), memory_formula_gb=round(step_memory(config, micro, cfg.max_seq_len, env.dtype.itemsize, cfg.fp8) / 1e9, 2),
            of_plain_step=plain_step and round(medians[compiled] / plain_step, 3))))


# ---- Starting: fresh, resumed, or branched off a trunk ---------------------------------------------------------------------

def check_recipe(cfg, folder, meta, tokenizer, revision, but=()):
    """Exits if the checkpoint was made by another recipe than this command's, naming the first field that differs."""
    then = {**meta["user_config"], "tokenizer": meta["tokenizer"], "revision": meta["revision"]}
    now = {**asdict(cfg), "tokenizer": tokenizer, "revision": revision or meta["revision"]}
    for field in RECIPE + ("tokenizer", "revision"):
        if then.get(field) != now[field] and field not in but:
            sys.exit(f"{folder} was trained with {field} = {then.get(field)}, not {now[field]}: use the same, or another --tag for a new run")


def starting_point(cfg, folder, newest, switch, tokenizer, revision):
    """(folder, step) of the checkpoint to start from: the newest of the run's own, or the trunk's at the switch, or (None, 0)."""
    if newest is not None:
        check_recipe(cfg, folder, read_meta(folder, newest), tokenizer, revision)
        return folder, newest
    if not cfg.trunk:
        return None, 0
    trunk = folder.parent / cfg.trunk
    if not checkpoint_steps(trunk):
        sys.exit(f"--trunk {cfg.trunk}: no checkpoint in {trunk}; train it with --keep {cfg.drope}, or leave out --trunk")
    if newest_checkpoint(trunk, [s for s in checkpoint_steps(trunk) if s == switch]) is None:
        print(f"{trunk} kept no checkpoint of step {switch} (--keep {cfg.drope}): training {cfg.tag} from the beginning, to the same end")
        return None, 0
    meta = read_meta(trunk, switch)
    if not meta["loop_state"]["use_rope"]:
        sys.exit(f"--trunk {cfg.trunk}: it has dropped RoPE already; a trunk is a run without --drope")
    check_recipe(cfg, trunk, meta, tokenizer, revision, but=("drope",))
    return trunk, switch


def restore_metrics(source, target, size):
    """metrics.jsonl as it was when the checkpoint was made: `size` bytes of it."""
    atomic_write(target / "metrics.jsonl", (source / "metrics.jsonl").read_bytes()[:size] if size else b"")


# ---- The run ----------------------------------------------------------------------------------------------------------------

def main():
    cfg = parse_config(Config, __doc__)
    env = setup_env()
    check(cfg)
    if cfg.bench:
        return bench(cfg, env)
    if cfg.fetch:
        return fetch_only(Shards(cfg), cfg.fetch)
    say = print if env.rank == 0 else lambda *a, **k: None
    enc = load_tokenizer(cfg.tokenizer_dir)
    if cfg.total_batch_size is not None and cfg.total_batch_size <= 0:
        sys.exit(f"--total-batch-size {cfg.total_batch_size}: a positive number of tokens")
    config, derived = derive(cfg, enc.n_vocab)
    steps, switch = derived["steps"], derived["switch"]
    rows, micro = check_batch(cfg, env, config, steps)
    micro = broadcast(torch.tensor([micro]), env, (1,), torch.int64).item()     # free memory may differ among devices
    folder = base_dir() / "base_checkpoints" / cfg.tag
    guard = lock(folder) if env.rank == 0 else None
    stop = StopRequest()
    tokenizer = tokenizer_hash(enc)
    newest = newest_checkpoint(folder) if env.rank == 0 else None
    if newest is not None:
        check_recipe(cfg, folder, read_meta(folder, newest), tokenizer, None)
    if any_process(newest == steps, env) and cfg.fetch is None:
        return say(f"{folder} is finished (step {steps}), skipped")

    # the shards
    try:
        shards = Shards(cfg) if env.rank == 0 else None
        if env.rank == 0:
            paths = shards.needed(derived["tokens"] * (cfg.max_seq_len + 1) / cfg.max_seq_len, enc)
            if cfg.fetch is not None:
                return fetch_only(shards, len(paths))
            shards.get(shards.validation)
    except FetchError as e:
        sys.exit(str(e))
    revision = shards.index["revision"] if env.rank == 0 else None
    start = [starting_point(cfg, folder, newest, switch, tokenizer, revision) if env.rank == 0 else None]
    if env.world > 1:
        torch.distributed.broadcast_object_list(start)
    source, step = start[0]

    # the model and its optimizer
    torch.manual_seed(42)
    model = GPT(config, use_rope=switch != 0, dtype=env.dtype)
    model.init_weights()
    model.to(env.device)
    compiled = try_compile(model, env.device, cfg.compile if cfg.compile is not None else env.device.type == "cuda")
    optimizer = build_optimizer(model, **derived["lrs"], weight_decay=derived["weight_decay"], compile=compiled is not model)
    loop = dict(use_rope=model.use_rope, min_val_bpb=float("inf"), smooth_train_loss=0.0, total_training_time=0.0)
    loader_state, metrics_size = None, 0
    if source:
        meta = read_meta(source, step)
        loop, metrics_size = meta["loop_state"], meta["metrics_bytes"]
        model.load_state_dict(load_part(source, step, "model", env.device))
        optimizer.load_state_dict(load_part(source, step, "optim", env.device))
        loader_state = {k: v.numpy() if torch.is_tensor(v) else v for k, v in load_part(source, step, "loader").items()}
        model.use_rope = loop["use_rope"]
    if cfg.fp8:
        set_fp8(model, env.device)
    kernel = attention_kernel(env, config)
    validate = Validation(cfg, shards, enc, env, micro)
    if env.rank == 0:
        log_head(cfg, **derived, rows=rows, micro_batch=micro, device=env.device, dtype=env.dtype, attention=kernel, processes=env.world,
                 parameters=sum(p.numel() for p in model.parameters()), tokenizer=tokenizer, revision=revision)
        if source:
            print(f"going on from step {step} of {source}")
        restore_metrics(source or folder, folder, metrics_size)
        metrics = open(folder / "metrics.jsonl", "a")
        batches = start_loader(cfg, shards, paths, rows, loader_state)

    def log(**record):
        if env.rank == 0:
            append_record(metrics, record)

    keep = {round(float(p) / 100 * steps) for p in cfg.keep.split(",") if p}
    started_at, resumed_at = time.time(), step
    val_bpb, text = meta["val_bpb"] if source else None, None

    def save():
        if env.rank == 0:
            for name, p in model.named_parameters():
                if not torch.isfinite(p).all():
                    sys.exit(f"step {step}: {name} is not finite; nothing was saved. The last good checkpoint is step {max(checkpoint_steps(folder), default=None)}: lower --matrix-lr or --embedding-lr")
            try:
                os.fsync(metrics.fileno())
            except OSError as e:
                sys.exit(f"cannot write {metrics.name}: {e.strerror}; earlier checkpoints are untouched")
            tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in loader_state.items()}
            save_checkpoint(folder, step, model, optimizer, tensors, dict(
                step=step, val_bpb=val_bpb, model_config=asdict(config), user_config=asdict(cfg), device_batch_size=micro,
                max_seq_len=cfg.max_seq_len, total_batch_size=cfg.total_batch_size,
                dataloader_state_dict=dict(zip(("epoch", "pq_idx", "rg_idx"), loader_state["position"])),
                loop_state={**loop, "use_rope": model.use_rope}, steps=steps, switch=switch, tokenizer=tokenizer, revision=revision,
                metrics_bytes=metrics.tell(), processes=env.world, sample=text), keep)

    while True:
        # the batch of this step comes first: where there is none, all processes stop together, as they do on request
        t0, batch, state = time.time(), None, ""
        if env.rank == 0 and step < steps:
            batch, state = next_batch(batches, stop)
        waited = time.time() - t0
        stopping = any_process(stop and step < steps, env)
        no_data = any_process(env.rank == 0 and step < steps and batch is None, env)
        # A checkpoint of step s is taken before anything else happens at step s, so that whoever starts from it does the rest
        if resumed_at < step < steps and (stopping or no_data or step % cfg.save_every == 0 or step in keep):
            save()
        if stopping or no_data:
            why = state if no_data else f"stopped by {stop.signal or 'another process'}"
            say(f"stopped at step {step}: {why}. {'Checkpoint saved: t' if step else 'T'}he same command goes on from here", file=sys.stderr)
            return INTERRUPTED if stopping else 1
        loader_state = state if step < steps else loader_state

        # ---- the switch: DroPE ----
        # RoPE makes attention learn fast, but ties it to positions that it has seen. So it is dropped here, for good, and the rest of
        # the run, same data, same schedule, lets the model recalibrate without it (arXiv:2512.12167).
        if step == switch and model.use_rope:
            with_rope = validate(compiled, cfg.eval_sample)
            model.use_rope = False
            without_rope = validate(compiled, cfg.eval_sample)
            say(f"step {step}: RoPE is dropped | val bpb with RoPE {with_rope:.4f}, without {without_rope:.4f}")
            log(step=step, switch=True, val_bpb_with_rope=with_rope, val_bpb_without_rope=without_rope)

        if step == steps or step % cfg.eval_every == 0:
            tokens = cfg.eval_tokens if step == steps else cfg.eval_sample
            val_bpb = validate(compiled, tokens)
            loop["min_val_bpb"] = min(loop["min_val_bpb"], val_bpb)
            say(f"step {step}: val bpb {val_bpb:.4f} on {tokens:,} tokens, RoPE {'on' if model.use_rope else 'off'}")
            log(step=step, val_bpb=val_bpb, eval_tokens=tokens, use_rope=model.use_rope)
        if step == steps:
            break

        # ---- one step ----
        t0 = time.time() - waited
        if env.rank == 0:
            batch = torch.from_numpy(batch.astype(np.int32))
            batch = batch.pin_memory() if env.device.type == "cuda" else batch
        batch = broadcast(batch if env.rank == 0 else None, env, (rows, cfg.max_seq_len + 1), torch.int32)
        factor = lr_factor(step, steps)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step, steps)
                group["weight_decay"] = muon_weight_decay(step, steps, derived["weight_decay"])
        loss = accumulate_gradients(compiled, batch[:, :-1].long(), batch[:, 1:].long(), micro, env)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()                                  # the step's one wait for the device
        if not math.isfinite(loss):
            sys.exit(f"step {step}: the loss is {loss}. The last good checkpoint is step {max(checkpoint_steps(folder), default='(none)')} in {folder}; "
                     f"run again from it, or start anew with a lower --matrix-lr or --embedding-lr")
        seconds = time.time() - t0
        step += 1
        loop["total_training_time"] += seconds
        loop["smooth_train_loss"] = 0.9 * loop["smooth_train_loss"] + 0.1 * loss
        smooth = loop["smooth_train_loss"] / (1 - 0.9 ** step)
        speed = cfg.total_batch_size / seconds
        mfu = f" | mfu {100 * speed * model.flops_per_token() / env.peak_flops / env.world:.1f}%" if env.peak_flops else ""
        left = (time.time() - started_at) / (step - resumed_at) * (steps - step)
        say(f"step {step:05d}/{steps:05d} | loss {smooth:.4f} | lr {factor:.3f} | {speed:,.0f} tok/s{mfu} | "
            f"{seconds:.2f} s | left {left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f}")
        log(step=step, loss=loss, lr_factor=factor, use_rope=model.use_rope, tokens=step * cfg.total_batch_size,
            seconds=seconds, waited=waited)
        if step == resumed_at + 1:
            gc.collect()
            gc.freeze()                                     # the collector need not look at what lives for the whole run

    text = sample(model, enc, "The ")
    say(f"sample: {text!r}")
    if env.rank == 0:
        cut, seen = loader_state["counts"][1], loader_state["counts"][0]
        print(f"packing cut {100 * cut / seen:.2f}% of the tokens")
        save()
        print(f"finished: {folder}, val bpb {val_bpb:.4f}, {loop['total_training_time'] / 60:.1f} minutes of training")


def fetch_only(shards, count):
    try:
        for path in shards.train[:count] + [shards.validation]:
            start = time.time()
            there = path.exists()
            shards.get(path)
            print(f"{path}: {'there' if there else f'fetched in {time.time() - start:.1f} s'}", flush=True)
    except FetchError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    try:
        code = main()
    except FetchError as e:
        sys.exit(str(e))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
