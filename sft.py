"""Fine-tuning: turns a base model into a chat model, one epoch over 1,071,759 conversations (_long: 1,171,759).

    python sft.py --tag d18_9tpp_drope_50       base_checkpoints/d18_9tpp_drope_50 -> chatsft_checkpoints/d18_9tpp_drope_50
    python sft.py --tag d20_20tpp_long          from the base of d20_20tpp: rows of 8,192 tokens, 100,000 rows of Tulu more
    python sft.py --dry-run                     counts and shows three conversations of each source, trains nothing
    torchrun --nproc_per_node 8 sft.py --tag ...

A source is a function that says how many rows it has and makes a conversation of a row: a list of messages, the way
chat programs keep them. render() makes token ids and a loss mask of it: only what the assistant writes is learnt, not
what users and tools say. Whole conversations are packed into rows, best fit first; the rest of a row is padding. A
quarter of the mixture is made up here (spelling words, counting letters), because a model that sees tokens has to be
taught that words have letters. Interrupted, it goes on where it stopped when the same command is run again. About 30
to 90 minutes on one H100. Left out: preference tuning, reinforcement learning, other chat formats.
"""
import atexit, collections, functools, gc, json, math, os, random, re, signal, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model import (INTERRUPTED, FetchError, StopRequest, accumulate_gradients, any_process, append_record, atomic_write,
                   attention_kernel, base_dir, bits_per_byte, broadcast, checkpoint_steps, fetch, load_model, load_part,
                   load_tokenizer, lock, log_head, newest_checkpoint, parse_config, read_meta, save_checkpoint, set_fp8,
                   setup_env, token_bytes, tokenizer_hash, try_compile)
from muon import build_optimizer


IDENTITY = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
WORDS = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"


@dataclass
class Config:
    tag: str = ""                       # the model to fine-tune, such as d18_9tpp_drope_50; X_long takes the base of X
    max_seq_len: int = 0                # tokens in a row; 0 means 4096, or 8192 for a _long tag
    total_batch_size: int = 1_048_576   # tokens in a step
    device_batch_size: int = 0          # rows in a micro-batch; 0 means as many tokens as pretraining had in one
    init_lr_frac: float = 0.8           # learning rates start at this part of pretraining's reference values
    eval_every: int = 200               # steps between validations
    eval_tokens: int = 20_971_520       # tokens in a validation (20 x 2^20)
    save_every: int = 200               # steps between checkpoints; the last two are kept
    skip: str = ""                      # sources to leave out, with commas between them, such as identity,gsm8k
    any_size: bool = False              # accept sources of other sizes than the published ones (a mirror, a part)
    conversations: str = ""             # X.jsonl: your own instead of the hub's; X_val.jsonl beside it validates
    spelling_rows: int = 200_000        # rows of SimpleSpelling
    bee_rows: int = 80_000              # rows of SpellingBee
    identity: str = IDENTITY            # URL or path of the identity conversations
    words: str = WORDS                  # URL or path of the word list for the two spelling tasks
    patience: int = 600                 # seconds to go on trying to fetch a file
    compile: int | None = None          # torch.compile, 1 or 0; not given: 1 on a GPU
    fp8: bool = False                   # float8 matmuls in the blocks (H100 and newer)
    dry_run: bool = False               # only show three conversations of each source, what is learnt in green


# What must not change between an interruption and its continuation
RECIPE = ("max_seq_len", "total_batch_size", "init_lr_frac", "eval_every", "eval_tokens", "skip", "fp8")


# ---- A conversation: messages -> token ids and loss mask -----------------------------------------------------------

def problem(messages, finished=False):
    """What is wrong with a conversation, in words, or "": [system] user assistant user assistant ..., text in each. An
    assistant's content may be a list of parts {"type": "text" | "python" | "python_output", "text": ...} instead.
    A `finished` one ends with the assistant and has no empty message."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return "not a list of messages"
    system = bool(messages) and messages[0].get("role") == "system"
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        expected = "system" if system and i == 0 else ("user", "assistant")[(i - system) % 2]
        if role != expected:
            return f"message {i + 1} is of role {role!r} where {expected!r} was expected"
        if role == "assistant" and isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") not in PARTS or not isinstance(part.get("text"), str):
                    return f"message {i + 1} has the part {part!r:.60}, which is none of {', '.join(PARTS)}"
        elif not isinstance(content, str):
            return f"message {i + 1} has content that is not text: {content!r:.60}"
        if finished and not (content.strip() if isinstance(content, str) else content):
            return f"message {i + 1} is empty"
    if len(messages) - system < (2 if finished else 1) or finished and role != "assistant":
        return "it ends before an answer"
    return ""


PARTS = {   # type of a part -> special token before, after, and whether the three are learnt
    "text": ("", "", True), "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False)}


def render(enc, messages, max_tokens=None):
    """-> (ids, mask), two lists of one length, cut at max_tokens; mask is 1 where the token is to be learnt.

    Text never becomes a special token, whatever it says. A system message is put before the first user message, with a
    blank line between. Raises ValueError where messages are not [system] user assistant user ..."""
    if wrong := problem(messages):
        raise ValueError(wrong)
    if messages[0]["role"] == "system":
        (system, first), messages = messages[:2], messages[2:]
        messages = [{"role": "user", "content": f"{system['content']}\n\n{first['content']}"}, *messages]
    ids, mask = [], []

    def add(text, learnt, special=False):
        if text:
            new = [enc.encode_single_token(text)] if special else enc.encode_ordinary(text)
            ids.extend(new)
            mask.extend([int(learnt)] * len(new))

    add("<|bos|>", False, special=True)
    for message in messages:
        role, parts = message["role"], message["content"]
        learnt = role == "assistant"
        add(f"<|{role}_start|>", False, special=True)
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            before, after, learnable = PARTS[part["type"]]
            add(before, learnt and learnable, special=True)
            add(part["text"], learnt and learnable)
            add(after, learnt and learnable, special=True)
        add(f"<|{role}_end|>", learnt, special=True)    # to stop is learnt too
    return ids[:max_tokens], mask[:max_tokens]


def coloured(enc, ids, mask, most=400):
    """A rendered conversation for the terminal: learnt tokens green, the others grey; the first `most` tokens."""
    text, end = "", min(len(ids), most)
    starts = [i for i in range(end) if i == 0 or mask[i] != mask[i - 1]]
    for a, b in zip(starts, [*starts[1:], end]):
        text += f"\033[{'32' if mask[a] else '90'}m{enc.decode(ids[a:b])}\033[0m"
    return text + (f" ... and {len(ids) - end:,} tokens more" if end < len(ids) else "")


# ---- The sources: (config, split "train" or "val") -> number of rows, function from a row to its messages ----------

def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def parquet(config, repo, files, columns):
    """Rows of the hub's parquet files. They stay in arrow's memory; a row becomes Python objects when asked for."""
    import pyarrow as pa, pyarrow.parquet as pq
    tables = []
    for name in files:
        dest = base_dir() / "data" / "sft" / repo.split("/")[1] / Path(name).name
        path = fetch(repo, name, dest, patience=config.patience)
        try:
            nested = "train" in pq.read_schema(path).names      # one of MMLU's layouts has its columns inside `train`
            tables.append(pq.read_table(path, columns=["train"] if nested else columns))
        except (pa.ArrowException, OSError) as e:
            sys.exit(f"{path} cannot be read ({str(e).splitlines()[0]:.100}): delete it and run the same command again")
    table = pa.concat_tables(tables)
    def row(i):
        [row] = table.slice(i, 1).to_pylist()
        return row.get("train", row)
    return len(table), row


def smoltalk(config, split):
    files = [f"train-{i:05d}-of-00004" for i in range(4)] if split == "train" else ["test-00000-of-00001"]
    n, row = parquet(config, "HuggingFaceTB/smol-smoltalk", [f"data/{f}.parquet" for f in files], ["messages"])
    return n, lambda i: row(i)["messages"]


def mmlu(config, split):
    """Multiple choice. The letter comes after the choice and without a space, so that it is the token to be answered."""
    name = "auxiliary_train" if split == "train" else "test"
    n, row = parquet(config, "cais/mmlu", [f"all/{name}-00000-of-00001.parquet"], ["question", "choices", "answer"])
    def conversation(i):
        r = row(i)
        choices = "".join(f"- {choice}={letter}\n" for choice, letter in zip(r["choices"], "ABCDEFGH"))
        return chat(f"Multiple Choice question: {r['question']}\n{choices}\n"
                    "Respond only with the letter of the correct answer.", "ABCDEFGH"[r["answer"]])
    return n, conversation


def gsm8k(config, split):
    name = "train" if split == "train" else "test"
    n, row = parquet(config, "openai/gsm8k", [f"main/{name}-00000-of-00001.parquet"], ["question", "answer"])
    def conversation(i):
        r = row(i)
        return chat(r["question"], calculator_parts(r["answer"]))
    return n, conversation


def calculator_parts(answer):
    """"50 x <<50*2=100>>100" -> text "50 x ", python "50*2", python_output "100", text "100"."""
    parts = []
    for piece in re.split(r"(<<[^>]*>>)", answer):
        if piece.startswith("<<"):
            expression, _, result = piece[2:-2].rpartition("=")
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def jsonl(path):
    """A file with a JSON array of messages on each line, checked."""
    rows = []
    for n, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
            wrong = problem(rows[-1], finished=True)
        except ValueError as e:
            wrong = str(e)
        if wrong:
            sys.exit(f"{path}, line {n}: {wrong}; a line has to be a JSON array of messages "
                     '[{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]')
    return rows


def identity(config, split):
    def check(data):
        return next((w for line in data.splitlines() if (w := problem(json.loads(line), finished=True))), "")
    rows = jsonl(fetch_url(config.identity, check, config.patience))
    return len(rows), rows.__getitem__


def conversations(config, split):
    """One's own file, in place of the hub's sources: NAME.jsonl to learn from, NAME_val.jsonl to validate with."""
    path = Path(config.conversations)
    path = path if split == "train" else path.with_name(path.stem + "_val" + path.suffix)
    if not path.exists():
        sys.exit(f"no file {path}: --conversations NAME.jsonl needs NAME.jsonl and NAME_val.jsonl")
    rows = jsonl(path)
    return len(rows), rows.__getitem__


@functools.lru_cache(None)
def tulu_rows(path):
    """The byte at which each good row of Tulu's file begins, shuffled with seed 42: the text stays on the disk."""
    starts, position, dropped = [], 0, 0
    with open(path, "rb") as f:
        for line in f:
            try:
                messages = json.loads(line)["messages"]
                good = not problem(messages, finished=True) and all(isinstance(m["content"], str) for m in messages)
            except (ValueError, KeyError, TypeError):
                good = False
            starts += [position] if good else []
            dropped += not good
            position += len(line)
    print(f"tulu: {dropped:,} of {dropped + len(starts):,} rows dropped (roles that do not alternate, empty or not text)")
    return np.random.RandomState(42).permutation(np.array(starts, dtype=np.int64))


def tulu(config, split):
    """The first 1,500 of the shuffled rows are held out (fewer of a smaller file), the next 100,000 are learnt."""
    dest = base_dir() / "data" / "sft" / "tulu" / "tulu_v2_data.jsonl"
    path = fetch("allenai/tulu-v2-sft-long-mixture", dest.name, dest, patience=config.patience)
    starts = tulu_rows(path)
    held = min(1_500, len(starts) // 20)
    starts = starts[held:held + 100_000] if split == "train" else starts[:held]
    def conversation(i):
        with open(path, "rb") as f:
            f.seek(starts[i])
            return json.loads(f.readline())["messages"]
    return len(starts), conversation


# Spelling. Row i is made from seed i (validation: 10,000,000 + i), so nothing needs to be stored

@functools.lru_cache(None)
def word_list(url, patience):
    def check(data):
        return "" if re.fullmatch(rb"[A-Za-z\s]+", data) else "damaged on the way: a word list has letters only"
    path = fetch_url(url, check, patience)
    if wrong := check(path.read_bytes()):
        sys.exit(f"{path} has other things than words of a-z: give another list with --words")
    return path.read_text().lower().split()     # split() takes CRLF as well


def simple_spelling(config, split):
    words = word_list(config.words, config.patience)
    def conversation(i):
        word = random.Random(i + (0 if split == "train" else 10_000_000)).choice(words)
        return chat(f"Spell the word: {word}", f"{word}:{','.join(word)}")
    return config.spelling_rows, conversation


WORDINGS = (    # {c}: the letter, {w}: the word
    "How many {c} are in {w}", "How many {c} are there in {w}", "How many {c}'s does {w} have", "How many {c} in {w}",
    "Count the {c} in {w}", "Count how often {c} appears in the word {w}", "How often does the letter {c} occur in {w}",
    "What is the number of {c} in {w}", "How many times is {c} used in {w}", "In {w}, how many {c} do you find",
    "Number of {c} in {w}", "Tell me how many {c} {w} contains", "Please count the letter {c} in the word {w}",
    "Can you count every {c} in {w}", "I need to know how many {c} are in {w}", "{w}: how many {c}",
    "If I write {w}, how many {c} do I write", "Look at {w}. How many of its letters are {c}",
    "Does {w} have any {c}, and how many", "Spelling check: how many {c} in {w}",
    "Quick question, how many {c} are in the word {w}", "How frequent is {c} in {w}", "{c} in {w}, how many",
    "My daughter asks how many {c} there are in {w}", "For a crossword: how many times does {c} show up in {w}",
    "Find all {c} in {w} and count them", "¿Cuántas {c} hay en {w}", "¿Cuántas veces aparece {c} en la palabra {w}",
    "Combien de {c} y a-t-il dans {w}", "Combien de fois trouve-t-on {c} dans {w}", "Wie viele {c} hat {w}",
    "Wie oft kommt {c} in {w} vor", "Quante {c} ci sono in {w}", "Quantas letras {c} tem {w}",
    "Hoeveel {c} zitten er in {w}", "Hur många {c} finns det i {w}", "Ile razy {c} występuje w słowie {w}",
    "Kolik {c} je ve slově {w}", "{w} kelimesinde kaç tane {c} var", "Сколько букв {c} в слове {w}",
    "Πόσα {c} έχει η λέξη {w}", "{w} में कितने {c} हैं", "{w}里有几个{c}", "单词{w}中{c}出现了多少次", "{w}に{c}はいくつありますか",
    "{w}에 {c}가 몇 개 있나요")


def spelling_bee(config, split):
    """Counting letters by hand, then with Python. Each letter stands alone after a colon or comma and never after a space,
    since " r" and "r" are different tokens."""
    words = word_list(config.words, config.patience)
    def conversation(i):
        rng = random.Random(i + (0 if split == "train" else 10_000_000))
        word = rng.choice(words)
        absent = [c for c in "abcdefghijklmnopqrstuvwxyz" if c not in word]
        c = rng.choice(word) if rng.random() < 0.9 or not absent else rng.choice(absent)
        wording = rng.choice(WORDINGS)
        wording = wording.lower() if rng.random() < 0.3 else wording
        quotes = ["{}", "{}", "'{}'", '"{}"', "`{}`", "“{}”"]
        question = wording.format(c=rng.choice(quotes).format(c), w=rng.choice(quotes).format(word))
        count, lines = 0, []
        for n, letter in enumerate(word, 1):
            count += letter == c
            lines.append(f"{n}:{letter}" + (f" hit! count={count}" if letter == c else ""))
        by_hand = (f"I look for '{c}' in '{word}'. First I spell it:\n{word}:{','.join(word)}\n\nThen I go through the "
                   "letters:\n" + "\n".join(lines) + f"\n\nThat makes {count}. Now the same with Python:\n\n")
        return chat(question + rng.choice(["?", "?", "", "."]), [
            {"type": "text", "text": by_hand}, {"type": "python", "text": f"'{word}'.count('{c}')"},
            {"type": "python_output", "text": str(word.count(c))},
            {"type": "text", "text": f"\n\nPython counts {count} as well.\n\n#### {count}"}])
    return config.bee_rows, conversation


def fetch_url(url, check, patience):
    """Path of a plain file of the net, which is stored in data/sft/, or of a local file. check(bytes) says what is wrong with
    what came, or "". Tries again with growing pauses that heed Retry-After, for `patience` seconds; then FetchError."""
    if "://" not in url:
        if not Path(url).is_file():
            raise FetchError(f"no file {url}")
        return Path(url)
    dest = base_dir() / "data" / "sft" / url.rsplit("/", 1)[1]
    import requests
    start, pause = time.time(), 1.0
    while not dest.exists():
        asked = ""
        try:
            reply = requests.get(url, timeout=30)
            asked = reply.headers.get("Retry-After", "")
            if 400 <= reply.status_code < 500 and reply.status_code not in (408, 429):
                raise FetchError(f"{url}: {reply.status_code} {reply.reason}")
            reply.raise_for_status()
            if wrong := check(reply.content):
                raise ValueError(wrong)
            atomic_write(dest, reply.content)
        except (requests.RequestException, ValueError) as e:
            wait = max(pause, float(asked)) if asked.isdigit() else pause
            if time.time() - start + wait > patience:
                raise FetchError(f"{url} could not be fetched in {patience} s: {e!s:.160}") from None
            print(f"fetching {dest.name}: {e!s:.160}; again in {wait:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait)
            pause = min(2 * pause, 60.0)
    return dest


# ---- The mixture: all rows of all sources in one shuffled order ----------------------------------------------------

SOURCES = {     # name: (function, published rows, epochs, rows of validation)
    "smoltalk": (smoltalk, 460_341, 1, 1_000_000),
    "identity": (identity, 1_000, 2, 0),
    "mmlu": (mmlu, 99_842, 3, 5_200),
    "gsm8k": (gsm8k, 7_473, 4, 420),
    "spelling": (simple_spelling, 200_000, 1, 0),
    "spellingbee": (spelling_bee, 80_000, 1, 0),
    "tulu": (tulu, 100_000, 1, 1_500),      # _long only
    "conversations": (conversations, None, 1, 1_000_000)}


class Mixture:
    """Conversations of several sources, each as often as its epochs say, in one order shuffled with seed 42."""

    def __init__(self, sources):
        self.sources = sources                                          # [(name, rows, epochs, row -> messages)]
        self.ends = np.cumsum([rows * epochs for _, rows, epochs, _ in sources])
        self.order = np.random.RandomState(42).permutation(self.ends[-1])   # RandomState: the same in every version of numpy

    def __len__(self):
        return len(self.order)

    def counts(self):
        return {name: [rows, epochs] for name, rows, epochs, _ in self.sources}

    def table(self):
        lines = [f"{name:13} {rows:9,} rows x {epochs} = {rows * epochs:9,}" for name, rows, epochs, _ in self.sources]
        return "\n".join([*lines, f"{'conversations':29}= {len(self):9,}"])

    def where(self, i):
        """The source of conversation i and the row in it."""
        j = self.order[i]
        s = int(np.searchsorted(self.ends, j, side="right"))
        name, rows, epochs, messages = self.sources[s]
        start = self.ends[s] - rows * epochs
        return name, int(j - start) % rows, messages

    def rendered(self, i, enc, max_tokens):
        """(ids, mask, tokens before the cut) of conversation i."""
        name, row, messages = self.where(i)
        try:
            ids, mask = render(enc, messages(row))
        except ValueError as e:
            sys.exit(f"row {row} of {name} is no conversation: {e}. Mend it, or leave the source out with --skip {name}")
        return ids[:max_tokens], mask[:max_tokens], len(ids)


def source_names(config):
    """Of the sources, those that this mixture takes."""
    skip = [name for name in config.skip.split(",") if name]
    if unknown := [name for name in skip if name not in SOURCES]:
        sys.exit(f"--skip {unknown[0]}: the sources are {', '.join(SOURCES)}")
    names = ["smoltalk", "identity", "mmlu", "gsm8k", "spelling", "spellingbee"] + ["tulu"] * config.tag.endswith("_long")
    names = ["conversations", "spelling", "spellingbee"] if config.conversations else names
    return [name for name in names if name not in skip]


def write_questions(config, path):
    """Held-out conversations for eval.py to ask, in the words that were learnt: {"source", "messages"} on each line."""
    lines = []
    for name in source_names(config):
        if name in ("mmlu", "gsm8k", "spellingbee"):
            rows, messages = SOURCES[name][0](config, "val")
            lines += [json.dumps({"source": name, "messages": messages(i)}) for i in range(min(rows, 20_000 if name != "spellingbee" else 256))]
    atomic_write(path, "\n".join(lines) + "\n")


def open_mixture(config, split):
    """The Mixture of a split ("train" or "val"). What cannot be fetched ends the program with a line for each source, and so
    does a source that is not of the published size, unless --any-size is given: never a smaller mixture in silence."""
    sources, errors = [], []
    for name in source_names(config):
        function, published, epochs, val_rows = SOURCES[name]
        if split == "val" and not val_rows:
            continue
        try:
            rows, messages = function(config, split)
        except FetchError as e:
            errors.append(f"{name}: {e}. It would have added {published * epochs:,} conversations; "
                          f"to go on without it: --skip {name}")
            config = replace(config, patience=min(config.patience, 10))     # the net has had its chance
            continue
        if split == "val":
            chosen = np.random.RandomState(42).permutation(rows)[:val_rows]
            sources.append((name, len(chosen), 1, lambda i, messages=messages, chosen=chosen: messages(int(chosen[i]))))
            continue
        if rows != published and not config.any_size and not config.conversations:
            errors.append(f"{name}: {rows:,} rows where the published mixture has {published:,}; "
                          "to go on with them: --any-size")
        sources.append((name, rows, epochs, messages))
    if errors:
        sys.exit("\n".join(errors))
    if not sources:
        sys.exit(f"--skip {config.skip} leaves no source to {'train on' if split == 'train' else 'validate with'}")
    return Mixture(sources)


# ---- Rows: best-fit packing, whole conversations only --------------------------------------------------------------

class Packer:
    """Rows of T + 1 tokens, packed from whole conversations in the mixture's order, each used exactly once.

    A row takes the longest of the 100 conversations in the buffer that fits, the earliest of equals, again and again; when
    none fits, the rest of the row is padding. A conversation longer than a row is cut when it enters the buffer, so
    that all fit somewhere. Threads render ahead, in order. state() is all that is needed to go on from here: small, and
    fit for JSON, because the buffer is kept as indices and rendered anew."""

    def __init__(self, mixture, enc, row_len, state=None, threads=4):
        self.mixture, self.enc, self.row_len, self.pool = mixture, enc, row_len, ThreadPoolExecutor(threads)
        self.bos = enc.encode_single_token("<|bos|>")
        state = state or {"next": 0, "buffer": [], "cut": 0, "rows": 0, "tokens": 0}
        self.next, self.cut, self.rows, self.tokens = (state[k] for k in ("next", "cut", "rows", "tokens"))
        self.buffer = list(self.pool.map(self.load, state["buffer"]))
        self.ahead = collections.deque()                        # rendered, but not in the buffer yet

    def load(self, i):
        ids, mask, length = self.mixture.rendered(i, self.enc, self.row_len)
        return i, np.array(ids, np.int32), np.array(mask, bool), length

    def state(self):
        return {"next": self.next, "buffer": [i for i, *_ in self.buffer], "used": self.next - len(self.buffer),
                "cut": self.cut, "rows": self.rows, "tokens": self.tokens, "sources": self.mixture.counts()}

    def refill(self):
        """Adds the next conversation to the buffer; False after the last."""
        if not self.ahead:
            self.ahead.extend(self.pool.map(self.load, range(self.next, min(self.next + 256, len(self.mixture)))))
        if not self.ahead:
            return False
        self.buffer.append(self.ahead.popleft())
        self.next += 1
        self.cut += self.buffer[-1][3] > self.row_len
        return True

    def next_row(self):
        """ids int32 (T+1,) and mask bool (T+1,), or None when the conversations have run out."""
        ids, mask, filled = np.full(self.row_len, self.bos, np.int32), np.zeros(self.row_len, bool), 0
        while True:
            while len(self.buffer) < 100 and self.refill():
                pass
            lengths = [len(b[1]) for b in self.buffer]
            best = max((n for n in lengths if n <= self.row_len - filled), default=0)
            if best == 0:
                break
            _, new_ids, new_mask, _ = self.buffer.pop(lengths.index(best))
            ids[filled:filled + best], mask[filled:filled + best] = new_ids, new_mask
            filled += best
        self.rows += filled > 0
        self.tokens += filled
        return (ids, mask) if filled else None

    def batch(self, rows):
        """int32 (2, rows, T): inputs, and targets that are -1 where nothing is to be learnt. Where the conversations run out,
        the remaining rows are padding; None when nothing is left."""
        out = np.full((2, rows, self.row_len - 1), -1, np.int32)
        out[0] = self.bos
        for r in range(rows):
            if (row := self.next_row()) is None:
                return out if r else None
            ids, mask = row
            out[0, r], out[1, r] = ids[:-1], np.where(mask[1:], ids[1:], -1)
        return out


def feed(conn, cfg, rows, state):
    """The loader's process. First it sends (validation rows, number of conversations), then (rows, state, rows packed a second)
    for one step at a time, and where something is wrong (None, why, 0)."""
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, signal.SIG_IGN)                        # the trainer decides when to stop
    try:
        enc = load_tokenizer(base_dir() / "tokenizer")
        mixture = open_mixture(cfg, "train")
        print(mixture.table(), flush=True)
        if state and state["sources"] != mixture.counts():
            sys.exit(f"the sources are no longer those of the checkpoint ({state['sources']}): restore them, or delete "
                     f"chatsft_checkpoints/{cfg.tag} to begin anew")
        wanted = max(1, cfg.eval_tokens // cfg.max_seq_len)
        validation = Packer(open_mixture(cfg, "val"), enc, cfg.max_seq_len + 1)
        val = validation.batch(wanted)[:, :wanted]
        conn.send((val[:, :validation.rows], len(mixture)))
        packer = Packer(mixture, enc, cfg.max_seq_len + 1, state)
        start, seconds = packer.rows, 0.0
        while True:
            t0 = time.time()
            if (batch := packer.batch(rows)) is None:
                break
            seconds += time.time() - t0
            conn.send((batch, packer.state(), (packer.rows - start) / seconds))
    except SystemExit as e:
        conn.send((None, str(e), 0.0))
    except BrokenPipeError:                                     # the trainer is gone
        pass


def start_loader(cfg, rows, state):
    """The receiving end of the loader's process."""
    context = torch.multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=feed, args=(send, cfg, rows, state), daemon=True)
    process.start()
    atexit.register(process.kill)                               # or leaving would wait for a download of the loader to end
    send.close()
    return receive


def next_message(receive):
    try:
        return receive.recv()
    except EOFError:
        return None, "the loader's process died (out of memory?)", 0


def dry_run(cfg):
    """The mixture and three conversations of each source."""
    enc = load_tokenizer(base_dir() / "tokenizer")
    for split in ("train", "val"):
        mixture = open_mixture(cfg, split)
        print(f"{split}:\n{mixture.table()}\n")
        for name, rows, _, messages in mixture.sources if split == "train" else []:
            for row in range(min(3, rows)):
                ids, mask = render(enc, messages(row))
                print(f"\033[1m{name}, row {row}: {len(ids):,} tokens, {sum(mask):,} learnt\033[0m")
                print(coloured(enc, ids, mask), end="\n\n")


# ---- The run -------------------------------------------------------------------------------------------------------

def lr_factor(progress):
    """1 over the first half of the conversations, then linear to 0."""
    return min(1.0, 2 * (1 - progress))


def muon_momentum(step):
    """0.85 -> 0.95 over 300 steps."""
    return 0.85 + (0.95 - 0.85) * min(step / 300, 1)


def check(cfg, env):
    """One line and exit for numbers that cannot be; returns the rows of a step."""
    if not re.fullmatch(r"\w[\w.-]*", cfg.tag):
        sys.exit("which model? --tag d18_9tpp_drope_50, for example: the name of a folder in base_checkpoints")
    rows, rest = divmod(cfg.total_batch_size, cfg.max_seq_len)
    if rest or rows < 1 or rows % env.world:
        sys.exit(f"--total-batch-size {cfg.total_batch_size} must be a multiple of max_seq_len x processes = "
                 f"{cfg.max_seq_len} x {env.world}")
    return rows


def base_name(base):
    """What tells base models apart: the step and the hash of the model file; "" where there is none."""
    if not (steps := checkpoint_steps(base)):
        return ""
    return f"step {steps[-1]} " + read_meta(base, steps[-1]).get("sha256", {}).get(f"model_{steps[-1]:06d}.pt", "")


def starting_point(cfg, folder, tokenizer):
    """(folder, step) of the checkpoint to start from: the newest of this run, else the last of the base model."""
    base = base_dir() / "base_checkpoints" / cfg.tag.removesuffix("_long")
    source = folder if (step := newest_checkpoint(folder)) is not None else base
    step = newest_checkpoint(base) if step is None else step
    if step is None:
        sys.exit(f"no base model in {base}: `bash run_all.sh {base.name}` trains it, and so does python pretrain.py")
    meta = read_meta(source, step)
    made_from = base_name(base)
    if source == folder and made_from and meta["base"] != made_from:
        sys.exit(f"{folder} was made from another base model than the one in {base}: delete that folder to begin anew")
    if meta.get("tokenizer", tokenizer) != tokenizer:
        sys.exit(f"{source} was trained with another tokenizer than {base_dir() / 'tokenizer'}: put its own back")
    if source == base and meta.get("steps", step) != step:
        sys.exit(f"{base} is at step {step} of {meta['steps']}: finish it first, with the command of pretrain.py that began it")
    for field in RECIPE if source == folder else ():
        if (then := meta["user_config"].get(field)) != (now := getattr(cfg, field)):
            sys.exit(f"{folder} was trained with {field} = {then}, not {now}: use the same, or delete it to begin anew")
    return source, step


def main():
    cfg = parse_config(Config, __doc__)
    cfg.max_seq_len = cfg.max_seq_len or (8192 if cfg.tag.endswith("_long") else 4096)
    if cfg.dry_run:
        return dry_run(cfg)
    env = setup_env()
    say = print if env.rank == 0 else lambda *a, **k: None
    rows = check(cfg, env)
    enc = load_tokenizer(base_dir() / "tokenizer")
    folder = base_dir() / "chatsft_checkpoints" / cfg.tag
    guard = lock(folder) if env.rank == 0 else None
    stop = StopRequest()
    start = [starting_point(cfg, folder, tokenizer_hash(enc)) if env.rank == 0 else None]
    if env.world > 1:
        torch.distributed.broadcast_object_list(start)
    source, step = start[0]
    resumed = source == folder
    meta = read_meta(source, step)
    if resumed and meta["finished"]:
        return say(f"{folder} is finished (step {step}), skipped")
    loader_state = load_part(folder, step, "loader") if resumed else None
    if env.rank == 0:
        receive = start_loader(cfg, rows, loader_state)

    # the model, with RoPE or without as it comes, and its optimizer: its state goes on, the learning rates begin anew
    model, _ = load_model(source, step, env.device, env.dtype)
    model.config.sequence_len = cfg.max_seq_len
    if cfg.fp8:
        set_fp8(model, env.device)
    kernel = attention_kernel(env, model.config)
    reference = {name: meta["user_config"][name] for name in ("embedding_lr", "unembedding_lr", "matrix_lr")}
    compiled = try_compile(model, env.device, cfg.compile if cfg.compile is not None else env.device.type == "cuda")
    optimizer = build_optimizer(model, **{name: lr * cfg.init_lr_frac for name, lr in reference.items()}, compile=compiled is not model)
    fresh = [dict(initial_lr=group["lr"], weight_decay=group["weight_decay"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(load_part(source, step, "optim", env.device))
    for group, values in zip(optimizer.param_groups, fresh):
        group.update(values)
    micro = cfg.device_batch_size or max(1, meta["device_batch_size"] * meta["max_seq_len"] // cfg.max_seq_len)
    micro = next(m for m in range(min(micro, rows // env.world), 0, -1) if rows // env.world % m == 0)
    say(f"{'going on' if resumed else 'starting'} from step {step} of {source}", flush=True)
    base, step = (meta["base"], step) if resumed else (base_name(source), 0)
    loop = meta["loop_state"] if resumed else dict(
        use_rope=model.use_rope, min_val_bpb=math.inf, smooth_train_loss=0.0, total_training_time=0.0)

    # the conversations
    val, total = None, torch.zeros(2, dtype=torch.int64)
    if env.rank == 0:
        log_head(cfg, rows=rows, micro_batch=micro, device=env.device, dtype=env.dtype, attention=kernel,
                 processes=env.world, use_rope=model.use_rope, **reference)
        sys.stdout.flush()
        while not receive.poll(0.5):                            # sources are being fetched, which may take a while
            if stop:
                sys.exit(INTERRUPTED)
        val, n, *_ = next_message(receive)
        if val is None:
            sys.exit(n)
        val, total = torch.from_numpy(val), torch.tensor([n, val.shape[1]])
        metrics = folder / "metrics.jsonl"                      # as it was when the checkpoint was made
        atomic_write(metrics, metrics.read_bytes()[:meta["metrics_bytes"]] if resumed else b"")
        metrics = open(metrics, "a")
    total, val_rows = broadcast(total, env, (2,), torch.int64).tolist()
    val = broadcast(val, env, (2, val_rows, cfg.max_seq_len), torch.int32).cpu()
    nbytes = token_bytes(enc).to(env.device)

    def validate():
        x, y = (v.split(micro) for v in val.long())
        return bits_per_byte(compiled, zip(x, y), nbytes, env)

    def log(**record):
        if env.rank == 0:
            append_record(metrics, record)

    not_finite = f"nothing more was saved in {folder}: run again from its last checkpoint, or anew with a lower --init-lr-frac"

    def save(finished=False):
        if env.rank == 0:
            for name, p in model.named_parameters():
                if not torch.isfinite(p).all():
                    sys.exit(f"step {step}: {name} is not finite; {not_finite}")
            os.fsync(metrics.fileno())
            save_checkpoint(folder, step, model, optimizer, loader_state, dict(
                step=step, val_bpb=val_bpb, model_config=asdict(model.config), user_config={**asdict(cfg), **reference},
                device_batch_size=micro, max_seq_len=cfg.max_seq_len, total_batch_size=cfg.total_batch_size,
                dataloader_state_dict=loader_state, loop_state=loop, finished=finished, base=base,
                tokenizer=tokenizer_hash(enc), metrics_bytes=metrics.tell(), processes=env.world))

    used = loader_state["used"] if resumed else 0
    resumed_at, used_before, started_at, val_bpb = step, used, time.time(), meta["val_bpb"] if resumed else None
    while True:
        # the batch of this step comes first: where there is none, all processes stop together, as they do on request
        t0, batch, state, packing = time.time(), None, "", 0.0
        if env.rank == 0 and used < total:
            batch, state, packing = next_message(receive)
        waited = time.time() - t0
        stopping = any_process(stop, env)
        no_data = any_process(env.rank == 0 and used < total and batch is None, env)
        # A checkpoint of step s is taken before anything else happens at step s, so that whoever starts from it does the rest
        if step > resumed_at and (stopping or no_data or step % cfg.save_every == 0 and used < total):
            save()
        if no_data:                                             # a conversation that is none, or a dead loader
            say(f"stopped at step {step}: {state}", file=sys.stderr)
            return 1
        if stopping:
            say(f"stopped by {stop.signal or 'another process'} at step {step}, all saved: the same command goes on from here")
            return INTERRUPTED
        if used == total or step % cfg.eval_every == 0:
            val_bpb = validate()
            loop["min_val_bpb"] = min(loop["min_val_bpb"], val_bpb)
            say(f"step {step}: val bpb {val_bpb:.4f} on {val_rows:,} rows, RoPE {'on' if model.use_rope else 'off'}")
            log(step=step, val_bpb=val_bpb, val_rows=val_rows, use_rope=model.use_rope)
        if used == total:
            break

        # ---- one step ----
        t0, factor = time.time() - waited, lr_factor(used / total)
        if env.rank == 0:
            loader_state, used, batch = state, state["used"], torch.from_numpy(batch)
        used = broadcast(torch.tensor([used]), env, (1,), torch.int64).item()
        batch = broadcast(batch, env, (2, rows, cfg.max_seq_len), torch.int32)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"] = muon_momentum(step)
        loss = accumulate_gradients(compiled, batch[0].long(), batch[1].long(), micro, env)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()                                      # the step's one wait for the device
        if not math.isfinite(loss):
            sys.exit(f"step {step}: the loss is {loss}; {not_finite}")
        seconds = time.time() - t0
        step += 1
        loop["total_training_time"] += seconds
        loop["smooth_train_loss"] = 0.9 * loop["smooth_train_loss"] + 0.1 * loss
        smooth = loop["smooth_train_loss"] / (1 - 0.9 ** step)
        left = (time.time() - started_at) / max(1, used - used_before) * (total - used)
        say(f"step {step:05d} | {100 * used / total:5.1f}% | loss {smooth:.4f} | lr {factor:.3f} | "
            f"{cfg.total_batch_size / seconds:,.0f} tok/s | packing {packing:,.0f} rows/s | {seconds:.2f} s | "
            f"left {left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f}")
        log(step=step, loss=loss, lr_factor=factor, conversations=used, use_rope=model.use_rope, seconds=seconds,
            waited=waited, packed_rows_per_second=packing)
        if step == resumed_at + 1:
            gc.collect()
            gc.freeze()                                         # the collector need not look at what lives for the whole run

    if env.rank == 0:
        write_questions(cfg, folder / "questions.jsonl")
        save(finished=True)
        padding = 1 - loader_state["tokens"] / (loader_state["rows"] * (cfg.max_seq_len + 1))
        print(f"{total:,} conversations in {loader_state['rows']:,} rows: {100 * padding:.2f}% padding, "
              f"{loader_state['cut']:,} cut at the end of a row")
        print(f"finished: {folder}, val bpb {val_bpb:.4f}, {loop['total_training_time'] / 60:.1f} minutes of training")


if __name__ == "__main__":
    code = main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(code)
