"""Pretraining: next-token prediction on a stream of parquet shards, with DroPE. In code:

    for step in range(steps):
        if step == switch:                  # for example half-way
            model.use_rope = False          # no positional embeddings from here on, in any layer
        train(model, next_batch(), step)    # data, learning rates and budget do not change

The model recovers, and is no longer tied to the lengths it was trained on (arXiv:2512.12167).

    python pretrain.py --tag d18_9tpp_drope_50              # 18 layers, 9 tokens a parameter
    torchrun --nproc_per_node 8 pretrain.py --depth 18      # the same batches, the same losses
    python pretrain.py --init d18_9tpp --tpp 1 --drope 0 --tag recalibrated     # see below
    python pretrain.py --fetch 8                            # downloads 8 training shards, and stops
    python pretrain.py --status                             # all models and their progress

Reads tok.py's tokenizer and the shards; downloads the next shards while it trains. Writes to
base_checkpoints/TAG/ the files of a step (model_, optim_, loader_, meta_) and metrics.jsonl. The
same command resumes an interrupted run. d18 at 9 tokens per parameter takes 4.8 hours on an H100 in
bfloat16 (modelled at 170,000 tokens/s, not measured). Left out: sharding of weights, so a model has
to fit on one GPU.

A drope run continues the checkpoint that the run with RoPE kept at the switch, optimizer and data
included, if there is one; else it trains from scratch.

--init starts from the weights of a finished model, with a fresh optimizer and schedule, at the
place in the data where its training stopped. With --drope 0 this recalibrates a model with RoPE to
do without it, the paper's main use of DroPE. Keep the learning rates high, as they are by default:
QK-norm keeps training stable, and at low rates the model recovers less. Without --drope it is plain
continued pretraining.
"""
import contextlib, hashlib, json, math, os, re, resource, sys, threading, time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model import (FOLDERS, GPT, DataError, GPTConfig, Run, ValidationRows, accumulate_gradients,
                   atomic_write, attention_kernel, base_dir, check_checkpoint, checkpoint_steps,
                   compile_model, difference, download, encode, file_hash, finished_checkpoint,
                   folder_of, from_rank_0, generate, guard, largest_divisor, load_part,
                   load_tokenizer, log_head, name_of, one_line, option, parse_config, parse_tag,
                   read_lines, read_meta, retry, rows_at_a_time, rows_of_a_step, say, set_fp8,
                   setup_env, text_column, token_bytes, tokenizer_hash, weights_hash)
from muon import WARMUP, build_optimizer, lr_factor, muon_momentum, muon_weight_decay


@dataclass
class Config:
    depth: int | None = option(None, "layers; default: from --tag, else 18", 1, 99)
    tpp: float | None = option(None, "tokens per parameter; default: from --tag, else 9", 0, 9999)
    drope: int | None = option(None, "percent of the steps with RoPE; default: RoPE stays", 0, 99)
    tag: str = option("", "name of the run; default: made of the three, as in d18_9tpp_drope_50")
    init: str = option("", "start from the weights of this finished model, such as d18_9tpp")
    dataset: str = option("karpathy/climbmix-400b-shuffle", "on the hub; local: only --data-dir")
    data_dir: str = option("", "folder of the shards; default: data/climbmix in the base folder")
    text_column: str = option("text", "column of the shards")
    max_seq_len: int = option(4096, "tokens in a row", 1, 2 ** 20)
    total_batch_size: int | None = option(None, "tokens in a step; default: by depth", 1, 2 ** 30)
    device_batch_size: int | None = option(None, "rows at a time on a device, at most", 1, 10 ** 6)
    embedding_lr: float = option(0.3, "AdamW, reference value (see derive)", 0, 100)
    unembedding_lr: float = option(0.008, "AdamW, reference value", 0, 100)
    matrix_lr: float = option(0.02, "Muon, reference value", 0, 100)
    weight_decay: float = option(0.28, "Muon, reference value", 0, 100)
    eval_every: int = option(250, "steps between validations", 1)
    eval_tokens: int = option(41_943_040, "tokens of the validation at the end", 1)
    eval_sample: int = option(4_194_304, "how many of those for the validations before", 1)
    save_every: int = option(500, "steps between checkpoints; the last two are kept", 1)
    keep: str = option("25,50,75", "percents at which a run with RoPE keeps one for drope runs")
    compile: int | None = option(None, "torch.compile: 0 or 1; default: 1 on a GPU", 0, 1)
    fp8: bool = option(False, "float8 matmuls in the blocks (H100 or newer)")
    patience: float = option(600, "seconds after which to give up on a hub that does not answer")
    fetch: int | None = option(None, "download this many training shards, and stop", 1)
    status: bool = option(False, "list the models and how far each is, and stop")
    plan: tuple = option((), "print steps, tokens, hours and disk of these tags, and stop")
    speed: float = option(170_000, "for --plan: tokens/s of d18, modelled for an H100", 1)
    bench: bool = option(False, "time steps on random tokens, print one JSON line, and stop")
    vocab_size: int | None = option(None, "for --bench, --plan; default: 32768", 1, 10 ** 6)


# What changes the weights: a resumed run must have the same (for init see find_init)
RECIPE = ("depth", "tpp", "drope", "text_column", "max_seq_len", "total_batch_size", "embedding_lr",
          "unembedding_lr", "matrix_lr", "weight_decay", "fp8")
SHARD_TOKENS, SHARD_BYTES = 54e6, 92e6  # of a shard of the dataset, roughly


# ---- Everything that follows from depth, tokens per parameter and drope --------------------------

def resolve(cfg):
    """Makes depth, tpp, drope and tag agree: a tag like d18_9tpp_drope_50 names all three."""
    if cfg.tag.endswith("_long"):
        sys.exit(f"--tag {cfg.tag}: names in _long are for fine-tuning, sft.py --tag {cfg.tag}, "
                 f"which takes the base model {cfg.tag.removesuffix('_long')}")
    said = parse_tag(cfg.tag)
    if cfg.init:
        folder = folder_of("base", cfg.init)
        steps = checkpoint_steps(folder)
        if not steps:
            there = ", ".join(sorted(path.name for path in folder.parent.glob("*")))
            sys.exit(f"--init {cfg.init}: no model in {folder} (models: {there or 'none'})")
        if said or not cfg.tag:
            sys.exit(f"--init needs a --tag of your own, such as {cfg.init.split('_')[0]}-"
                     "recalibrated; a tag like d18_9tpp is trained from random weights")
        if cfg.depth is None:
            cfg.depth = read_meta(folder, steps[-1])["model_config"]["n_layer"]
    elif not said and re.match(r"d\d", cfg.tag):
        sys.exit(f"--tag {cfg.tag}: a tag is like d18_9tpp or d18_9tpp_drope_50; other names must "
                 "not begin with d and a digit")
    if said:
        if cfg.tag != name_of(*said):
            sys.exit(f"--tag {cfg.tag}: this tag is written {name_of(*said)}")
        for name, value in zip(("depth", "tpp", "drope"), said):
            if getattr(cfg, name) not in (None, value):
                sys.exit(f"--tag {cfg.tag} and --{name} {getattr(cfg, name)} contradict each other")
            setattr(cfg, name, value)
    cfg.depth = 18 if cfg.depth is None else cfg.depth
    cfg.tpp = 9.0 if cfg.tpp is None else cfg.tpp
    if not 1 <= cfg.depth <= 99 or cfg.tpp == 0 or not 0 <= (cfg.drope or 0) <= 99:
        sys.exit(f"--tag {cfg.tag}: depth is 1 to 99, tokens per parameter above 0, drope 0 to 99")
    cfg.tag = cfg.tag or name_of(cfg.depth, cfg.tpp, cfg.drope)
    if cfg.keep and not re.fullmatch(r"\d{1,2}(\.\d+)?(,\d{1,2}(\.\d+)?)*", cfg.keep):
        sys.exit(f"--keep {cfg.keep}: comma-separated percents below 100, such as 25,50,75")
    cfg.data_dir = cfg.data_dir or str(base_dir() / "data" / "climbmix")


@dataclass
class Derived:
    config: GPTConfig
    N: int  # scaling parameters
    batch_size: int  # tokens in a step
    steps: int
    switch: int | None  # the first step without RoPE; None: RoPE stays
    lrs: dict  # peak learning rates
    weight_decay: float  # Muon's, at the start


def derive(cfg, vocab_size):
    """Derives everything from the depth. The reference values in Config were tuned at depth 12 with
    batches of 2^19 tokens; the rules below transfer them to other sizes."""
    # 1. The depth gives the width (GPTConfig.from_depth), and both give N, the number of parameters
    #    in matmuls. N12 is N at depth 12.
    config = GPTConfig.from_depth(cfg.depth, vocab_size, cfg.max_seq_len)
    with torch.device("meta"):
        N = GPT(config).num_scaling_params()
        N12 = GPT(GPTConfig.from_depth(12, vocab_size)).num_scaling_params()

    # 2. The best batch size grows like (training tokens)^0.383 (arXiv:2505.13738). At a fixed tpp
    #    these grow like N, so the batch grows like N^0.383, with the same factor for every tpp.
    #    Rounded to a power of two, it is 2^20 for d18 and d20.
    batch_size = cfg.total_batch_size or 2 ** round(math.log2(2 ** 19 * (N / N12) ** 0.383))

    # 3. The budget is tpp tokens for each of the N parameters, in whole steps. DroPE splits the
    #    same steps into a part with RoPE and a part without.
    steps = int(cfg.tpp * N / batch_size)
    switch = None if cfg.drope is None else round(cfg.drope / 100 * steps)

    # 4. A batch k times as large has less noise, which allows sqrt(k) times the learning rate
    #    (arXiv:2205.10287). AdamW's rates also shrink with the width: see muon.build_optimizer.
    factor = math.sqrt(batch_size / 2 ** 19)
    lrs = dict(embedding_lr=cfg.embedding_lr * factor, unembedding_lr=cfg.unembedding_lr * factor,
               matrix_lr=cfg.matrix_lr * factor)

    # 5. Weight decay makes weights forget old updates. The time this takes, in tokens, should grow
    #    with the length of the run (arXiv:2405.13698), so Muon's decay shrinks like 1 / N.
    weight_decay = cfg.weight_decay * factor * N12 / N
    return Derived(config, N, batch_size, steps, switch, lrs, weight_decay)


def check_sizes(cfg, derived, world=1):
    """The number of rows in a step. Exits if the sizes do not fit together."""
    n_rows, steps = rows_of_a_step(derived.batch_size, cfg.max_seq_len, world), derived.steps
    if not 1 <= steps < 1_000_000:
        sys.exit(f"--tpp {cfg.tpp:g} at depth {cfg.depth} makes {steps:,} steps of "
                 f"{derived.batch_size:,} tokens, not 1 to 999,999: change --tpp or "
                 "--total-batch-size")
    if cfg.drope and not 0 < derived.switch < steps:
        sys.exit(f"--drope {cfg.drope}: of only {steps:,} steps that is step {derived.switch:,}, "
                 "leaving none with RoPE, or none without: choose another percentage")
    return n_rows


# ---- Shards: listing, checking and downloading them ----------------------------------------------

def stat_of(path):
    """Changes when a file is replaced."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


class Shards:
    """The training shards, sorted by name; the last file is the validation set. Missing ones are
    downloaded. sha256: {name: hash} of those known so far, from the hub or from reading them."""

    def __init__(self, cfg):
        self.cfg, self.folder = cfg, Path(cfg.data_dir)
        self.revision, self.sha256 = "local", {}
        self.advice = "put the right file there"
        names = [path.name for path in self.folder.glob("[!.]*.parquet")]
        if cfg.dataset != "local":
            self.revision, self.sha256 = self.index()
            self.advice = "delete it to download it again"
            names = [name for name in self.sha256 if name.endswith(".parquet")]
        if len(names) < 2:
            sys.exit(f"{self.folder} has {len(names)} .parquet files, but 2 are needed: the last "
                     "one by name is the validation set. Add some, or leave out --dataset local")
        *self.names, self.validation = sorted(names)
        self.stats = {}  # size and time of each file when it was hashed

    def fingerprint(self):
        """Identifies the training files: those of the hub by their hashes, local ones, which would
        take long to hash, by size and last 64 KiB, where parquet describes the contents."""
        digest = hashlib.sha256(repr(self.names).encode())
        for name in self.names:
            if self.cfg.dataset != "local":
                digest.update(self.sha256[name].encode())
                continue
            with open(self.folder / name, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 65536))
                digest.update(b"%d " % size + file.read())
        return f"{len(self.names)} files, {digest.hexdigest()[:16]}"

    def index(self):
        """(revision, {name: sha256}) of the hub, stored in the folder so that later runs use the
        same revision."""
        path, dataset = self.folder / "index.json", self.cfg.dataset
        if not path.exists():
            from huggingface_hub import HfApi
            info = retry(f"the list of {dataset}", self.cfg.patience,
                         lambda: HfApi().dataset_info(dataset, files_metadata=True))
            sha256 = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
            index = dict(dataset=dataset, revision=info.sha, sha256=sha256)
            atomic_write(path, json.dumps(index, indent=0))
        try:
            index = json.loads(path.read_text("utf-8"))
            there, revision, sha256 = index["dataset"], index["revision"], index["sha256"]
            if not all(isinstance(value, str) for value in [revision, *sha256.values()]):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError):
            sys.exit(f"{path} is damaged: delete it to download it again")
        if there != dataset:
            sys.exit(f"{self.folder} holds shards of {there}, not of {dataset}: choose another "
                     "--data-dir")
        return revision, sha256

    def get(self, name):
        """The path of a shard, downloaded if need be. DataError after cfg.patience seconds."""
        path = self.folder / name
        if path.exists():
            return path
        if self.cfg.dataset == "local":
            raise DataError(f"{path} is missing")
        return download(self.cfg.dataset, name, path, revision=self.revision,
                     patience=self.cfg.patience)

    def hash(self, name):
        """The sha256 of a shard, downloaded if need be. DataError unless it is the known one: the
        hub's, or that of the file that this run (or the run it branches off) has read before."""
        path = self.get(name)
        self.stats[name] = stat_of(path)
        sha256 = file_hash(path)
        if self.sha256.setdefault(name, sha256) != sha256:
            raise DataError(f"{path} is damaged, or not the file that this run began with (its "
                             f"sha256 is another): {self.advice}")
        return sha256

    def n_row_groups(self, name):
        return self.read(name, lambda shard, column: shard.num_row_groups)

    def documents(self, name, group):
        """The texts of a row group."""
        def texts(shard, column):
            return shard.read_row_group(group, [column])[column].to_pylist()
        return [text or "" for text in self.read(name, texts)]

    def fetch_ahead(self, name):
        """Starts downloading a shard in the background. get() waits for it; if it failed, get()
        tries again and reports why."""
        def attempt():
            with contextlib.suppress(OSError, DataError):
                self.get(name)

        threading.Thread(target=attempt, daemon=True).start()

    def read(self, name, work):
        """work(the opened shard, its text column); DataError if that fails."""
        import pyarrow
        path, column = self.get(name), self.cfg.text_column
        if self.stats.setdefault(name, stat_of(path)) != stat_of(path):
            raise DataError(f"{path} was replaced while it was being read: {self.advice}")
        try:
            with text_column(path, column) as shard:
                return work(shard, column)
        except (pyarrow.ArrowException, OSError, ValueError, LookupError) as e:
            raise DataError(f"{path} cannot be read ({one_line(e)}): {self.advice}") from None


# ---- Rows: best-fit packing ----------------------------------------------------------------------

class PackedRows:
    """Packs documents into rows of T + 1 tokens, each starting with <|bos|>.

    A buffer holds at least 1,000 documents and is refilled by 128. A row takes the longest document
    that fits, again and again. If none fits, the shortest is cut to fill the row and its rest is
    lost: ~1.3% of the tokens, but no padding. A document longer than a row would never fit and
    never be the shortest, so it is split into row-long pieces when it enters the buffer. After the
    last shard the first one is read again; with epochs=1 the rows end there."""

    def __init__(self, shards, names, enc, row_len, state=None, epochs=None):
        self.shards, self.names, self.row_len, self.epochs = shards, names, row_len, epochs
        self.enc, self.bos = enc, enc.encode_single_token("<|bos|>")
        self.epoch = self.shard = self.group = self.doc = 0  # place of the next document
        self.n_groups = self.texts = None  # of the shard being read
        self.buffer, self.lengths = [], np.empty(0, np.int64)  # documents, and their tokens
        self.seen = self.cut = 0  # tokens that entered the buffer, and those of them cut off
        self.found_text = bool(state)
        if state:
            self.resume(state)

    def resume(self, state):
        """Continues from a state(). Exits if it does not fit the shards."""
        try:
            self.epoch, self.shard, self.group = state["epoch"], state["pq_idx"], state["rg_idx"]
            self.doc, self.seen, self.cut = state["row"], state["seen"], state["cut"]
            self.lengths = state["lengths"].numpy()
            self.buffer = [d.numpy() for d in state["tokens"].split(self.lengths.tolist())]
            known, read = self.shards.sha256, state["shards"]
            names = list(self.names) if self.epoch else list(self.names[:len(read)])
            if list(read) != names or any(known.get(n, sha) != sha for n, sha in read.items()):
                sys.exit(f"{self.shards.folder} does not hold the shards that this run has read "
                         f"({', '.join(read)}), or has others too: restore just those")
            known.update(read)
            for name in read if self.shards.cfg.dataset == "local" else ():
                self.shards.hash(name)  # the hub's are compared when opened
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as e:
            sys.exit(f"the loader's state does not fit the shards ({one_line(e)})")

    def state(self):
        """All that is needed to continue from here."""
        tokens = np.concatenate([np.empty(0, np.int32), *self.buffer])
        names = self.names if self.epoch else self.names[:self.shard + 1]
        read = {name: self.shards.sha256[name] for name in names if name in self.shards.sha256}
        return dict(epoch=self.epoch, pq_idx=self.shard, rg_idx=self.group, row=self.doc,
                    seen=self.seen, cut=self.cut, tokens=torch.from_numpy(tokens),
                    lengths=torch.from_numpy(self.lengths.copy()), shards=read)

    def next_texts(self):
        """Reads the next row group into self.texts; False after the last epoch."""
        if self.shard == len(self.names):
            self.epoch, self.shard = self.epoch + 1, 0
            if self.epoch != self.epochs:
                say(f"epoch {self.epoch + 1}: documents repeat, all {len(self.names)} shards are "
                    f"read (and {len(self.buffer)} short documents still wait in the buffer)")
        if self.epoch == self.epochs:
            return False
        name = self.names[self.shard]
        if self.n_groups is None:
            self.shards.hash(name)  # downloads it if it is missing
            self.n_groups = self.shards.n_row_groups(name)
            for ahead in self.names[self.shard + 1:self.shard + 3]:
                self.shards.fetch_ahead(ahead)
        self.texts = self.shards.documents(name, self.group)
        return True

    def refill(self):
        """Adds the next 128 documents to the buffer; False if there are no more."""
        if self.texts is None and not self.next_texts():
            return False
        texts, new = self.texts[self.doc:self.doc + 128], []
        body = self.row_len - 1  # a row of one document has <|bos|> and this many tokens of it
        for ids in encode(self.enc, texts):
            for start in range(0, max(1, len(ids)), body):
                new.append(np.array([self.bos] + ids[start:start + body], dtype=np.int32))
        self.found_text |= any(len(document) > 1 for document in new)
        self.buffer += new
        self.lengths = np.concatenate([self.lengths, [len(document) for document in new]])
        self.seen += sum(map(len, new))
        self.doc += 128
        if self.doc >= len(self.texts):
            self.texts, self.group, self.doc = None, self.group + 1, 0
            if self.group == self.n_groups:
                self.shard, self.group, self.n_groups = self.shard + 1, 0, None
        return True

    def next_row(self):
        """int32 (T + 1,), or None if the documents have run out."""
        row, room = [], self.row_len
        while room:
            while len(self.buffer) < 1000 and self.refill():
                pass
            if not self.buffer:
                return None
            fitting = np.where(self.lengths <= room, self.lengths, 0)
            best = int(fitting.argmax())  # the longest (ties: the earliest)
            if fitting[best] == 0:  # none fits
                best = int(self.lengths.argmin())
                self.cut += int(self.lengths[best]) - room
            row.append(self.buffer.pop(best)[:room])
            self.lengths = np.delete(self.lengths, best)
            room -= len(row[-1])
        return np.concatenate(row)

    def batch(self, n_rows):
        """int32 (2, n_rows, T), inputs and targets; fewer rows if the documents run out, None if
        none is left. DataError if no document has text."""
        made = []
        while len(made) < n_rows and (row := self.next_row()) is not None:
            made.append(row)
        if not made:
            return None
        made = np.array(made, dtype=np.int32)
        if not self.found_text:
            raise DataError(f"{self.shards.folder} holds documents without text in column "
                             f"{self.shards.cfg.text_column!r}: use other shards")
        return np.stack((made[:, :-1], made[:, 1:]))


def sample(model, enc, prompt, n=48):
    """The prompt and n more tokens, chosen greedily."""
    ids = [enc.encode_single_token("<|bos|>")] + enc.encode_ordinary(prompt)
    ids += [token for [token] in generate(model, [ids], n)]
    return enc.decode(ids[1:])


# ---- The run -------------------------------------------------------------------------------------

def make_model(cfg, derived, env):
    """A model with random weights, its compiled version, and its optimizer."""
    torch.manual_seed(42)
    model = GPT(derived.config, dtype=env.dtype)
    model.init_weights()
    model.to(env.device)
    if cfg.fp8:
        set_fp8(model, env)
    compiled = compile_model(model, env)
    optimizer = build_optimizer(model, **derived.lrs, weight_decay=derived.weight_decay,
                                compile=env.compile)
    return model, compiled, optimizer


def open_shards(cfg, run):
    """The Shards, on rank 0. Exits unless the run began with the same."""
    shards = data = None
    if run.env.rank == 0:
        shards = Shards(cfg)
        data = {"training_files": shards.fingerprint(), "validation_file": shards.validation,
                "validation_sha256": shards.hash(shards.validation)}
    run.same_data(data)
    return shards


def open_streams(cfg, run, shards, enc, position):
    """The training rows (on rank 0), from `position` or where the run was saved; the validation
    rows."""
    stream, make_rows, row_len = None, None, cfg.max_seq_len + 1
    if run.env.rank == 0:
        stream = PackedRows(shards, shards.names, enc, row_len, position or run.loader_state())
        make_rows = PackedRows(shards, [shards.validation], enc, row_len, epochs=1).batch
    return stream, ValidationRows(make_rows, cfg.max_seq_len, token_bytes(enc), run.env)


def find_init(cfg, config, steps, env):
    """For --init, on rank 0: (folder, step, its description with the weights' sha256) of the model
    to start from. Exits unless that is finished, with the same tokenizer and sizes."""
    if not cfg.init or env.rank != 0:
        return None
    folder = folder_of("base", cfg.init)
    step = finished_checkpoint(folder)
    theirs = read_meta(folder, step)
    sizes = {**theirs["model_config"], "sequence_len": config.sequence_len}
    different = difference(sizes, asdict(config))
    if different:
        sys.exit(f"--init {cfg.init}: its model has {different}")
    if cfg.drope is not None and not theirs["loop_state"]["use_rope"]:
        sys.exit(f"--init {cfg.init}: it no longer has RoPE; omit --drope")
    if steps < 2 * WARMUP:
        print(f"--init: only {steps} steps, of which the first {WARMUP} warm up the learning rate: "
              "expect a worse model than the one it starts from", file=sys.stderr)
    return folder, step, f"step {step} of {cfg.init}, sha256 {weights_hash(folder, step)}"


def start_from_init(model, run, folder, step):
    """Loads the weights, and whether the model has RoPE. Returns the position in the data at which
    its training stopped, for PackedRows (without the ~1,000 documents in its buffer); None if it
    was trained on other data."""
    meta = read_meta(folder, step)
    model.load_state_dict(load_part(folder, step, "model", run.env.device))
    model.use_rope = meta["loop_state"]["use_rope"]
    different = difference(meta.get("data", {}), run.data)
    where = f"at the beginning of the data (that model's: {different})" if different else (
        "where in the data its training stopped")
    run.say(f"starting from the weights of step {step} of {folder}, {where}")
    if not different and "dataloader_state_dict" in meta:
        nothing = dict(tokens=torch.empty(0, dtype=torch.int32), lengths=torch.empty(0).long())
        return {**meta["dataloader_state_dict"], "seen": 0, "cut": 0, **nothing}


def find_trunk(run, shards, derived):
    """The trunk of a drope run is the run with RoPE of the same depth and tpp. The two are equal up
    to the switch, so a drope run may continue the checkpoint that its trunk kept there. Returns
    (folder, step) of that checkpoint; None if there is none, or this run has begun already."""
    cfg, switch = run.cfg, derived.switch
    if not cfg.drope or cfg.init or run.source:
        return None
    folder = run.folder.parent / name_of(cfg.depth, cfg.tpp, None)
    problem = trunk_problem(run, shards, folder, switch)
    if not problem:
        return folder, switch
    tokens, hours = switch * derived.batch_size, hours_of(cfg, derived, switch)
    run.say(f"training from scratch: {problem}. After the run with RoPE, this one would share its "
            f"first {switch:,} of {derived.steps:,} steps: {tokens / 1e9:.3g}B tokens, {hours:.1f} "
            f"hours at {cfg.speed:,.0f} tokens/s for d18")


def trunk_problem(run, shards, folder, switch):
    """Why a run cannot branch off at step `switch` of the run in `folder`, or ""."""
    steps = checkpoint_steps(folder)
    if not steps:
        return f"{folder}, the same run with RoPE, is missing"
    if switch not in steps:
        return (f"{folder} has no checkpoint of step {switch:,}, only {steps}: it has not got that "
                "far, or was trained with another --keep")
    try:
        check_checkpoint(folder, switch)
    except SystemExit as e:
        return str(e)
    meta = read_meta(folder, switch)
    different = run.difference(meta, but=("drope",)) or difference(meta.get("data", {}), run.data)
    if different:
        return f"{folder} was trained with {different}"
    for name, sha256 in load_part(folder, switch, "loader")["shards"].items():
        if (shards.sha256.get(name) or shards.hash(name)) != sha256:
            return f"{folder} was trained with another {name}"
    return ""


def kept_steps(cfg, steps, before=""):
    """The steps at which a run with RoPE keeps a checkpoint for drope runs to start from: those of
    --keep, and of the --keep that it had before an interruption."""
    trunk = cfg.drope is None and not cfg.init
    percents = re.findall(r"[\d.]+", f"{cfg.keep} {before}") if trunk else []
    return {round(float(percent) / 100 * steps) for percent in percents}


def set_schedules(optimizer, step, steps, weight_decay):
    """Sets the learning rates, and Muon's momentum and weight decay. Returns lr_factor."""
    factor = lr_factor(step, steps)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(step, steps)
            group["weight_decay"] = muon_weight_decay(step, steps, weight_decay)
    return factor


def train(cfg, env):
    # What to train, and where to start: from this run's newest checkpoint; or from the checkpoint
    # that the run with RoPE, the trunk, kept at the switch; or from the model of --init; or from
    # scratch
    enc = load_tokenizer(base_dir() / "tokenizer")
    derived = derive(cfg, enc.n_vocab)
    steps, switch = derived.steps, derived.switch
    cfg.total_batch_size = derived.batch_size
    n_rows = check_sizes(cfg, derived, env.world)
    env.micro = rows_at_a_time(env, cfg.max_seq_len, cfg.device_batch_size)
    init = from_rank_0(find_init(cfg, derived.config, steps, env), env)
    recipe = {**{field: getattr(cfg, field) for field in RECIPE},
              "tokenizer": tokenizer_hash(enc), "init": init and init[2]}
    run = Run(folder_of("base", cfg.tag), cfg, recipe, env)
    if run.meta.get("finished"):
        return run.say(f"{run.folder} is finished (step {run.step}), skipped")
    shards = open_shards(cfg, run)
    trunk = from_rank_0(shards and find_trunk(run, shards, derived), env)
    if trunk:
        run.start_from(*trunk)
        run.say(f"branching off {trunk[0]}, which is the same run up to the switch")

    model, compiled, optimizer = make_model(cfg, derived, env)
    position = None
    if init and not run.source:
        position = start_from_init(model, run, *init[:2])
    if env.rank == 0:
        log_head(cfg, derived, env, attention=attention_kernel(env, derived.config),
                 rows_per_step=n_rows, tokenizer=recipe["tokenizer"],
                 starting_from=recipe["init"], revision=shards.revision, **run.data)
    stream, validation_rows = open_streams(cfg, run, shards, enc, position)
    keep = kept_steps(cfg, steps, run.meta.get("user_config", {}).get("keep", ""))
    run.start(model, optimizer, stream, n_rows, keep, steps=steps, switch=switch,
              tokenizer=recipe["tokenizer"], revision=shards and shards.revision,
              validation_file=run.data["validation_file"])

    def validate(tokens):
        """Bits per byte of the first `tokens` of the validation set, or of all if it has fewer."""
        return run.validate(compiled, validation_rows, max(1, tokens // cfg.max_seq_len))

    for step in range(run.step, steps):
        # DroPE: RoPE makes attention learn fast, but ties it to the positions it has seen; beyond
        # them the model is lost. So RoPE is dropped here, for good. In the rest of the run, with
        # the same data and schedule, the model recovers (arXiv:2512.12167). How well depends on the
        # learning rate that is left: it falls from 35% of the run on, so after 25, 50 and 75% it is
        # at 1.00, 0.78 and 0.42 of its peak. The later the drop, the more the model has learned
        # with RoPE, and the less it can still change.
        if step == switch:
            with_rope, _ = validate(cfg.eval_sample)
            model.use_rope = False
            without, _ = validate(cfg.eval_sample)
            run.say(f"step {step:05d} | RoPE is dropped: val bpb {with_rope:.4f} with it, "
                    f"{without:.4f} without")
            run.log(step=step, switch=True, val_bpb_with_rope=with_rope,
                    val_bpb_without_rope=without)

        if step % cfg.eval_every == 0:
            run.log_validation(*validate(cfg.eval_sample))

        x, y = run.next_batch()  # or saves and exits, if it was asked to stop
        factor = set_schedules(optimizer, step, steps, derived.weight_decay)
        loss = accumulate_gradients(compiled, x, y, env)
        optimizer.step()
        optimizer.zero_grad()
        run.end_of_step(loss, (step + 1) / steps, factor)

    # The last checkpoint is saved by now: this validation takes minutes
    run.log_validation(*validate(cfg.eval_tokens), sample=False)
    text = sample(model, enc, "The")
    run.say(f"sample: {text!r}")
    if env.rank == 0:
        cut = run.position["cut"] / run.position["seen"]
        run.say(f"packing cut {100 * cut:.2f}% of the tokens")
    run.finish(sample=text)


# ---- Operations: --fetch, --plan, --status, --bench ----------------------------------------------

def fetch_only(cfg):
    """Downloads the first shards and the validation shard."""
    shards = Shards(cfg)
    for name in [*shards.names[:cfg.fetch], shards.validation]:
        start, there = time.time(), (shards.folder / name).exists()
        path = shards.get(name)
        how = "there" if there else f"fetched in {time.time() - start:.1f} s"
        print(f"{path}: {how}", flush=True)
    if cfg.fetch > len(shards.names):
        print(f"--fetch {cfg.fetch}: there are only {len(shards.names)} training shards")


def hours_of(cfg, derived, steps):
    """Hours for this many steps, if the FLOPs per second are those of d18 at cfg.speed."""
    def flops_per_token(sizes):
        return 6 * sizes.N + 6 * sizes.config.n_layer * sizes.config.n_embd * cfg.max_seq_len

    d18 = derive(replace(cfg, depth=18, tpp=9.0, drope=None, tag="", total_batch_size=None), 32768)
    tokens = steps * derived.batch_size
    return tokens * flops_per_token(derived) / (cfg.speed * flops_per_token(d18)) / 3600


def plan(cfg):
    """Prints the cost of each tag. Exits if its sizes do not fit together. Vocabulary:
    --vocab-size, else the tokenizer's, else 32,768."""
    if cfg.vocab_size is None and (base_dir() / "tokenizer" / "config.json").exists():
        cfg.vocab_size = load_tokenizer(base_dir() / "tokenizer").n_vocab
    cfg.vocab_size = cfg.vocab_size or 32768
    planned, total_hours, total_disk, most_shards = set(), 0.0, 0.0, 0
    print("tag                         steps  tokens shards hours   disk  pretraining")
    for tag in cfg.plan:
        base = tag.removesuffix("_long")
        one = replace(cfg, depth=None, tpp=None, drope=None, tag=base)
        resolve(one)
        derived, trunk = derive(one, cfg.vocab_size), name_of(one.depth, one.tpp, None)
        check_sizes(one, derived)
        kept = set(checkpoint_steps(folder_of("base", trunk)))
        if trunk in planned:
            kept |= kept_steps(replace(one, drope=None), derived.steps)
        steps, how = derived.steps, "from scratch"
        if base in planned:
            steps, how = 0, f"that of {base}"
        elif one.drope and derived.switch in kept:
            steps, how = derived.steps - derived.switch, f"from step {derived.switch:,} of {trunk}"
        # A checkpoint holds for each parameter 4 bytes of weight and 4 of Muon's momentum, or 8 of
        # AdamW's moments in embedding and head. Pretraining and fine-tuning keep two each, a run
        # with RoPE three more for drope runs. Base and chat exports take 2 bytes a parameter each.
        embedding = cfg.vocab_size * derived.config.n_embd
        checkpoint = 8 * (derived.N + embedding) + 4 * 2 * embedding
        checkpoints = 2 + (0 if steps == 0 else 2) + (3 if steps and one.drope is None else 0)
        disk = checkpoints * checkpoint + 2 * 2 * (derived.N + embedding)
        hours = hours_of(one, derived, steps)
        tokens = derived.steps * derived.batch_size
        shards = math.ceil(tokens / SHARD_TOKENS)
        print(f"{tag:26} {derived.steps:6,} {tokens / 1e9:6.2f}B {shards:6} {hours:5.1f} "
              f"{disk / 1e9:3.0f} GB  {how}")
        planned.add(base)
        total_hours, total_disk = total_hours + hours, total_disk + disk
        most_shards = max(most_shards, shards)
    print(f"{total_hours:.0f} hours of pretraining at {cfg.speed:,.0f} tokens/s for d18, other "
          "depths by their FLOPs (170,000 is an estimate for an H100 in bfloat16)")
    print(f"{total_disk / 1e9:.0f} GB of checkpoints and exports, plus "
          f"{most_shards * SHARD_BYTES / 1e9:.0f} GB for the {most_shards} shards that they share")


def status():
    """Lists all models and how far each is."""
    for base in (base_dir(), base_dir() / "tiny"):
        for stage in ("base", "sft"):
            for folder in sorted((base / FOLDERS[stage]).glob("*")):
                if not any(folder.glob("model_*.pt")) and not checkpoint_steps(folder):
                    continue
                export = folder_of(f"hf-{stage}", folder.name, base)
                try:
                    words = how_far(folder)
                except (SystemExit, OSError) as e:
                    words = f"unclear: {one_line(e)}"
                exported = ", exported" if (export / "config.json").exists() else ""
                print(f"{folder}{exported}\n    {words}")


def how_far(folder):
    """One line about a run, from its meta file and metrics.jsonl alone."""
    steps = checkpoint_steps(folder)
    if not steps:
        return "model_*.pt without a meta_*.json: an interrupted first save, or a lost file"
    meta = read_meta(folder, steps[-1])
    words = f"step {meta['step']} of {meta.get('steps', 'unknown')}"
    if meta.get("finished"):
        words = f"finished at step {meta['step']}"
    if meta.get("recipe", {}).get("init"):
        words += f", starting from {meta['recipe']['init'].split(',')[0]}"
    if meta.get("val_bpb") is not None:
        words += f", val bpb {meta['val_bpb']:.3f}"
    numbers = dict(val_bpb_with_rope=float, val_bpb_without_rope=float)
    for record in read_lines(folder / "metrics.jsonl", {"step": int}, numbers):
        if numbers.keys() <= record.keys():
            return (f"{words}, RoPE dropped at step {record['step']} (val bpb "
                    f"{record['val_bpb_with_rope']:.3f} with it, "
                    f"{record['val_bpb_without_rope']:.3f} without)")
    return f"{words}, RoPE {'on' if meta['loop_state']['use_rope'] else 'off'}"


def bench(cfg, env):
    """Prints one JSON line: the median time of 20 steps on random tokens, after 3 warm-up steps."""
    cfg.vocab_size = cfg.vocab_size or 32768
    derived = derive(cfg, cfg.vocab_size)
    derived.steps = 1  # for any tpp
    n_rows = check_sizes(replace(cfg, drope=None), derived, env.world)
    env.micro = rows_at_a_time(env, cfg.max_seq_len, cfg.device_batch_size)
    model, compiled, optimizer = make_model(cfg, derived, env)
    cuda = env.device.type == "cuda"

    def seconds(work):
        start = time.time()
        work()
        if cuda:
            torch.cuda.synchronize()
        elif env.device.type == "mps":
            torch.mps.synchronize()
        return time.time() - start

    x, y = torch.randint(cfg.vocab_size, (2, n_rows, cfg.max_seq_len), device=env.device)

    def step():
        accumulate_gradients(compiled, x, y, env)
        optimizer.step()
        optimizer.zero_grad()

    step_seconds = np.median([seconds(step) for _ in range(3 + 20)][3:])
    size = 8192 if cuda else 2048
    a = torch.randn(size, size, device=env.device, dtype=env.dtype)
    matmul_seconds = np.median([seconds(lambda: a @ a) for _ in range(10)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # a Mac counts bytes, Linux KiB
    peak = torch.cuda.max_memory_allocated() if cuda else peak
    speed = derived.batch_size / step_seconds
    flops, matmul = speed * model.flops_per_token() / env.world, 2 * size ** 3 / matmul_seconds
    if env.rank == 0:
        print(json.dumps(dict(
            device=torch.cuda.get_device_name() if cuda else env.device.type,
            torch=torch.__version__, depth=cfg.depth, compile=env.compile,
            dtype="fp8" if cfg.fp8 else str(env.dtype).removeprefix("torch."),
            attention=attention_kernel(env, model.config), processes=env.world,
            batch=derived.batch_size,
            rows_at_a_time=largest_divisor(n_rows // env.world, env.micro),
            tokens_per_second=round(speed),
            step_seconds=round(step_seconds, 4),
            mfu=env.peak_flops and round(flops / env.peak_flops, 4), tflops=round(flops / 1e12, 3),
            matmul_tflops=round(matmul / 1e12, 3), of_matmul_rate=round(flops / matmul, 3),
            peak_memory_gb=round(peak / 1e9, 2))))


def main():
    cfg = parse_config(Config, __doc__)
    resolve(cfg)
    if cfg.plan:
        return plan(cfg)
    if cfg.fetch:
        return fetch_only(cfg)
    if cfg.status:
        return status()
    env = setup_env(compile=cfg.compile)
    if cfg.bench:
        return bench(cfg, env)
    train(cfg, env)


if __name__ == "__main__":
    guard(main)
