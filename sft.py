"""Fine-tuning: turns a base model into a chat model, in one pass over 1,071,759 conversations.

    python sft.py --tag d18_9tpp_drope_50    # from base_checkpoints/d18_9tpp_drope_50
    python sft.py --tag d20_20tpp_long       # from d20_20tpp: longer rows, and 100,000 long chats
    python sft.py --dry-run                  # just show three conversations per source

Reads a base model, its tokenizer, and the sources below, which it downloads to out/data/sft. Writes
out/chatsft_checkpoints/TAG: checkpoints, metrics.jsonl, and questions.jsonl for chat.py. Takes 30
to 90 minutes on one H100 (estimated). After an interruption the same command resumes.

The loss covers only what the assistant writes (as in InstructGPT, arXiv:2203.02155). Whole
conversations are packed into rows by best fit (arXiv:2404.10830); those in one row can see each
other. A quarter of the conversations are generated here, about spelling and counting letters: a
model that sees tokens has to be taught that words have letters. Left out: preference tuning,
reinforcement learning.

Four deliberate differences from karpathy/nanochat: the loss of a step is the mean over its trained
tokens (there, of the means of micro-batches); the learning rate depends on the conversations used
before the step; the last batch is filled with padding (there, from a second epoch); conversations
without a trained token in their row are left out.
"""
import functools, hashlib, itertools, json, random, re, sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model import (GPT, DataError, GPTConfig, Run, ValidationRows, accumulate_gradients,
                   atomic_write, attention_kernel, base_dir, checkpoint_files, checkpoint_steps,
                   compile_model, download, download_url, encode, file_hash, finished_checkpoint,
                   folder_of, from_rank_0, generate, guard, has_kind, load_tokenizer, load_weights,
                   log_head, one_line, option, parse_config, read_meta, rows_at_a_time,
                   rows_of_a_step, set_fp8, setup_env, text_column, token_bytes, tokenizer_hash,
                   weights_hash)
from muon import build_optimizer

IDENTITY = "https://karpathy-public.s3.us-west-2.amazonaws.com/identity_conversations.jsonl"
WORDS = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"


@dataclass
class Config:
    tag: str = option("", "the model to fine-tune, such as d18_9tpp_drope_50; X_long starts from X")
    max_seq_len: int | None = option(
        None, "tokens in a row; default: 4096, for a _long tag 8192", 1, 2 ** 20)
    total_batch_size: int = option(1_048_576, "tokens in a step", 1, 2 ** 30)
    device_batch_size: int | None = option(None, "rows at a time on a device, at most", 1, 10 ** 6)
    init_lr_frac: float = option(0.8, "times pretraining's reference learning rates", 0, 100)
    eval_every: int = option(200, "steps between validations", 1)
    eval_tokens: int = option(20_971_520, "tokens in a validation", 1)
    save_every: int = option(200, "steps between checkpoints; the last two are kept", 1)
    skip: str = option("", "sources to leave out, separated by commas: identity,gsm8k")
    conversations: str = option(
        "", "X.jsonl: train on these instead of the hub's, and validate on X_val.jsonl")
    spelling_rows: int = option(200_000, "rows of SimpleSpelling", 0, 10 ** 8)
    bee_rows: int = option(80_000, "rows of SpellingBee", 0, 10 ** 8)
    identity: str = option(IDENTITY, "URL or path of the identity conversations")
    words: str = option(WORDS, "URL or path of the word list for the two spelling tasks")
    patience: int = option(600, "seconds after which to give up on a download")
    compile: int | None = option(None, "torch.compile: 0 or 1; default: 1 on a GPU", 0, 1)
    fp8: bool = option(False, "float8 matmuls in the blocks (H100 or newer)")
    check: bool = option(False, "only check the options and the files they name")
    dry_run: bool = option(False, "only show three conversations of each source")


# What changes the weights: a resumed run must have the same (and the same data, see main)
RECIPE = ("max_seq_len", "total_batch_size", "init_lr_frac", "skip", "spelling_rows", "bee_rows",
          "fp8")


# ---- A conversation: messages -> token ids, and which of them are trained on ---------------------

PARTS = {  # type of a part: (special token before it, after it, whether the three are trained on)
    "text": ("", "", True),
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}


def parts_of(message):
    """The content of a message as a list of parts, {"type": a key of PARTS, "text": text}."""
    content = message.get("content")
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def joined(parts):
    """The parts, with adjacent texts joined, because a token may span the two."""
    merged = []
    for part in parts:
        if merged and part["type"] == merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + part["text"]}
        else:
            merged.append(part)
    return merged


def what_is_wrong(messages, finished=False):
    """Why a conversation cannot be rendered, or "".

    It must be [system] user assistant user assistant ..., each {"role": ..., "content": text or a
    list of parts}; only the assistant may call python. `finished`: it must also end with an answer,
    and no message may be empty."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return "not a list of messages"
    first_turn = 1 if messages and messages[0].get("role") == "system" else 0
    for n, message in enumerate(messages):
        role, expected = message.get("role"), "assistant" if (n - first_turn) % 2 else "user"
        if n >= first_turn and role != expected:
            return f"message {n + 1} has role {role!r} instead of {expected!r}"
        for part in parts_of(message):
            types = PARTS if role == "assistant" else ["text"]
            known = isinstance(part, dict) and str(part.get("type")) in types
            if not known or not isinstance(part.get("text"), str):
                return f"message {n + 1} has content that is neither text nor parts: {part!r:.60}"
        if finished and not any(part["text"].strip() for part in parts_of(message)):
            return f"message {n + 1} is empty"
    if len(messages) == first_turn or finished and messages[-1]["role"] == "user":
        return "it ends before an answer"
    return ""


def render(enc, messages):
    """Messages -> (ids, mask), two lists of the same length; mask is 1 for tokens to train on.

    Text never becomes a special token, whatever it says. A system message is joined to the first
    user message by a blank line. ValueError if it is malformed."""
    wrong = what_is_wrong(messages)
    if wrong:
        raise ValueError(wrong)
    if messages[0]["role"] == "system":
        system, user, *rest = messages
        blank_line = {"type": "text", "text": "\n\n"}
        first = [*parts_of(system), blank_line, *parts_of(user)]
        messages = [{"role": "user", "content": first}, *rest]
    ids, mask = [enc.encode_single_token("<|bos|>")], [0]

    def add(text, trained, special=False):
        if text:
            new = [enc.encode_single_token(text)] if special else encode(enc, [text])[0]
            ids.extend(new)
            mask.extend([int(trained)] * len(new))

    for message in messages:
        is_answer = message["role"] == "assistant"
        add(f"<|{message['role']}_start|>", False, special=True)
        for part in joined(parts_of(message)):
            before, after, learnable = PARTS[part["type"]]
            add(before, is_answer and learnable, special=True)
            add(part["text"], is_answer and learnable)
            add(after, is_answer and learnable, special=True)
        add(f"<|{message['role']}_end|>", is_answer, special=True)  # teaches when to stop
    return ids, mask


# ---- Files ---------------------------------------------------------------------------------------

class Source(NamedTuple):
    n_rows: int
    get: Callable  # from the number of a row to its messages
    sha256: str  # of the files that the rows are made of


def hub_rows(cfg, repo, name, n_files, to_messages, column=None):
    """The hub's parquet files NAME-00000-of-... as a Source, in the order of datasets'
    shuffle(seed=42). to_messages(row as a dict) -> messages; a row is converted when it is needed.
    column: one that must hold strings."""
    tables, hashes = [], ""
    for i in range(n_files):
        file = f"{name}-{i:05d}-of-{n_files:05d}.parquet"
        dest = base_dir() / "data" / "sft" / Path(repo).name / Path(file).name
        path = download(repo, file, dest, patience=cfg.patience)
        try:
            if column:
                text_column(path, column).close()
            tables.append(pq.read_table(path))
        except (pa.ArrowException, OSError, ValueError) as e:
            sys.exit(f"{path} cannot be used ({one_line(e)}): delete it to download it again")
        hashes += file_hash(path)
    table = pa.concat_tables(tables)
    order = np.random.default_rng(42).permutation(len(table))
    def get(i):
        return to_messages(table.slice(order[i], 1).to_pylist()[0])
    return Source(len(table), get, hashlib.sha256(hashes.encode()).hexdigest())


def plain_file(cfg, where, check):
    """The bytes of a URL, downloaded once to data/sft, or of a path. check(bytes) says what is
    wrong with them, or "". DataError if there is no such file."""
    if "://" in where:
        # named after the whole URL, so that files of two servers differ
        dest = base_dir() / "data" / "sft" / quote(where, safe="")
        path = download_url(where, dest, cfg.patience, check)
        advice = "delete it to download it again"
    elif Path(where).is_file():
        path, advice = Path(where), "correct it, or give another file"
    else:
        raise DataError(f"no file {where}")
    data = path.read_bytes()
    wrong = check(data)
    if wrong:
        sys.exit(f"{path}: {wrong}; {advice}")
    return data


def json_lines(cfg, where):
    """A file with one JSON array of messages per line, as a Source."""
    data = plain_file(cfg, where, wrong_line)
    rows = [json.loads(line) for line in data.splitlines() if line.strip()]
    return Source(len(rows), rows.__getitem__, hashlib.sha256(data).hexdigest())


def wrong_line(data):
    """The first bad line of such a file and what is wrong with it, or ""."""
    for n, line in enumerate(data.splitlines(), 1):
        try:
            wrong = what_is_wrong(json.loads(line), finished=True) if line.strip() else ""
        except (ValueError, RecursionError) as e:
            wrong = f"not a JSON array of messages ({one_line(e)})"
        if wrong:
            return f"line {n}: {wrong}"
    return "" if data.strip() else "it has no conversations"


# ---- The sources, each a function of the config and the split, "train" or "val" ------------------

def exchange(question, answer):
    """A conversation of two messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def smoltalk(cfg, split):
    """Conversations about everything (arXiv:2502.02737)."""
    name, n_files = ("data/train", 4) if split == "train" else ("data/test", 1)
    return hub_rows(cfg, "HuggingFaceTB/smol-smoltalk", name, n_files,
                    lambda row: row["messages"])


def identity(cfg, split):
    """Who the model is, and who made it."""
    return json_lines(cfg, cfg.identity)


def mmlu(cfg, split):
    """Multiple choice (arXiv:2009.03300). Each letter ends its line without a space before it, so
    that it is the same token as the answer."""
    def to_messages(row):
        letters = "ABCDEFGH"
        choices = "".join(f"- {text}={c}\n" for text, c in zip(row["choices"], letters))
        return exchange(f"Multiple Choice question: {row['question']}\n{choices}\n"
                    "Respond only with the letter of the correct answer.", letters[row["answer"]])
    name = "all/auxiliary_train" if split == "train" else "all/test"
    return hub_rows(cfg, "cais/mmlu", name, 1, to_messages, "question")


def gsm8k(cfg, split):
    """Math word problems, with calls to Python (arXiv:2110.14168)."""
    def to_messages(row):
        return exchange(row["question"], calculator_parts(row["answer"]))
    name = "main/train" if split == "train" else "main/test"
    return hub_rows(cfg, "openai/gsm8k", name, 1, to_messages, "question")


def calculator_parts(answer):
    """"50 x <<50*2=100>>100" -> text "50 x ", python "50*2", python_output "100", text "100".
    Without "=", the output is empty."""
    parts = []
    for k, piece in enumerate(re.split(r"<<([^>]*)>>", answer)):
        if k % 2:  # inside << >>
            call, output = piece.rsplit("=", 1) if "=" in piece else (piece, "")
            parts += [{"type": "python", "text": call}, {"type": "python_output", "text": output}]
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def tulu(cfg, split):
    """Longer conversations (arXiv:2311.10702). The valid rows are shuffled; the last 1,500 (a
    twentieth of a small file) are held out, and the first 100,000 of the others are trained on."""
    dest = base_dir() / "data" / "sft" / "tulu" / "tulu_v2_data.jsonl"
    path = download("allenai/tulu-v2-sft-long-mixture", dest.name, dest, patience=cfg.patience)
    starts = tulu_rows(path)
    n_train = len(starts) - min(1_500, len(starts) // 20)
    starts = starts[:n_train][:100_000] if split == "train" else starts[n_train:]
    def get(i):
        with open(path, "rb") as f:
            f.seek(starts[i])
            return json.loads(f.readline())["messages"]
    return Source(len(starts), get, file_hash(path))


@functools.lru_cache(None)
def tulu_rows(path):
    """The offsets in bytes of the valid rows, shuffled with seed 42; the text stays on the disk.
    Valid means [system] user assistant ... with text, as in the public series: the last message may
    be the user's, and messages may be empty."""
    starts, position, n = [], 0, 0
    with open(path, "rb") as f:
        for line in f:
            try:
                messages = json.loads(line)["messages"]
                texts_only = all(isinstance(m["content"], str) for m in messages)
                if texts_only and not what_is_wrong(messages):
                    starts.append(position)
            except (ValueError, KeyError, TypeError, RecursionError):
                pass  # counted as dropped below
            position += len(line)
            n += 1
    print(f"tulu: {n - len(starts):,} of {n:,} rows dropped (roles that do not alternate, no text)")
    random.Random(42).shuffle(starts)
    return starts


def own_conversations(cfg, split):
    """--conversations, instead of all sources above."""
    path = Path(cfg.conversations)
    if split == "val":
        path = path.with_name(f"{path.stem}_val{path.suffix}")
    if not path.is_file():
        sys.exit(f"no file {path}: --conversations X.jsonl trains on X.jsonl and validates on "
                 "X_val.jsonl beside it")
    return json_lines(cfg, str(path))


# ---- Generated here: spelling. Row i is made from seed SEED + i, so that nothing is stored -------

SEED = {"train": 0, "val": 10_000_000}

WORDINGS = """\
How many {c} are in {w}|How many {c}'s does {w} have|How many {c} in {w}|Count the {c} in {w}
{w}: how many {c}|Count how often {c} appears in the word {w}|How often does {c} occur in {w}
What is the number of {c} in {w}|How many times is {c} used in {w}|In {w}, how many {c} do you find
Tell me how many {c} {w} contains|Please count the letter {c} in the word {w}|{c} in {w}, how many
If I write {w}, how many {c} do I write|My daughter asks how many {c} there are in {w}
¿Cuántas {c} hay en {w}|¿Cuántas veces aparece {c} en la palabra {w}|Wie viele {c} hat {w}
Combien de fois trouve-t-on {c} dans {w}|Quante {c} ci sono in {w}|Quantas letras {c} tem {w}
Hoeveel {c} zitten er in {w}|Hur många {c} finns det i {w}|Ile razy {c} występuje w słowie {w}
{w} kelimesinde kaç tane {c} var|Сколько букв {c} в слове {w}|Πόσα {c} έχει η λέξη {w}
{w} में कितने {c} हैं|{w}里有几个{c}|{w}に{c}はいくつありますか|{w}에 {c}가 몇 개 있나요"""
WORDINGS = re.split(r"[|\n]", WORDINGS)  # {c}: the letter, {w}: the word


def word_list(cfg):
    """The words, and the sha256 of their file."""
    def check(data):
        only_words = re.fullmatch(rb"\s*[A-Za-z][A-Za-z\s]*", data)
        return "" if only_words else "a word list consists of words of the letters a-z"
    data = plain_file(cfg, cfg.words, check)
    return data.decode().lower().split(), hashlib.sha256(data).hexdigest()


def simple_spelling(cfg, split):
    """"Spell the word: apple" -> "apple:a,p,p,l,e"."""
    words, sha256 = word_list(cfg)
    random.Random(42).shuffle(words)  # else row i would draw the same word as SpellingBee's row i
    def get(i):
        word = random.Random(SEED[split] + i).choice(words)
        return exchange(f"Spell the word: {word}", f"{word}:{','.join(word)}")
    return Source(cfg.spelling_rows, get, sha256)


def spelling_bee(cfg, split):
    """Counting a letter of a word by hand, then with Python."""
    words, sha256 = word_list(cfg)
    def get(i):
        return count_letter(random.Random(SEED[split] + i), words)
    return Source(cfg.bee_rows, get, sha256)


def count_letter(rng, words):
    """A question about a random word and letter, and the answer: spelled, counted, and checked with
    Python. No letter in the answer follows a space, because " r" and "r" are different tokens."""
    word = rng.choice(words)
    absent = [c for c in "abcdefghijklmnopqrstuvwxyz" if c not in word]
    letter = rng.choice(word) if rng.random() < 0.9 or not absent else rng.choice(absent)
    wording = rng.choice(WORDINGS)
    if rng.random() < 0.3:
        wording = wording.lower()
    quotes = ["{}", "{}", "'{}'", '"{}"', "`{}`", "“{}”"]
    c, w = rng.choice(quotes).format(letter), rng.choice(quotes).format(word)
    question = wording.format(c=c, w=w) + rng.choice(["?", "?", "", "."])

    text = f"I look for '{letter}' in '{word}'. First I spell it:\n{word}:{','.join(word)}\n\n"
    text += "Then I go through the letters:\n"
    count = 0
    for n, here in enumerate(word, 1):
        count += here == letter
        text += f"{n}:{here} hit! count={count}\n" if here == letter else f"{n}:{here}\n"
    return exchange(question, [
        {"type": "text", "text": f"{text}\nThat makes {count}. Now the same with Python:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython counts {count} as well.\n\n#### {count}"}])


# ---- The mixture: all rows of all sources in one shuffled order ----------------------------------

class Ingredient(NamedTuple):
    open: Callable  # from config and split to a Source
    n_rows: int  # as published
    epochs: int
    n_held_out: int  # rows to validate on
    n_questions: int = 0  # held-out rows that chat.py asks


ALL = sys.maxsize
INGREDIENTS = {
    "smoltalk": Ingredient(smoltalk, 460_341, 1, ALL),
    "identity": Ingredient(identity, 1_000, 2, 0),
    "mmlu": Ingredient(mmlu, 99_842, 3, 5_200, ALL),
    "gsm8k": Ingredient(gsm8k, 7_473, 4, 420, ALL),
    "spelling": Ingredient(simple_spelling, 200_000, 1, 0),
    "spellingbee": Ingredient(spelling_bee, 80_000, 1, 0, 256),
    "tulu": Ingredient(tulu, 100_000, 1, 1_500),  # for a _long tag
    "conversations": Ingredient(own_conversations, ALL, 1, ALL),  # with --conversations
}


class Mixture:
    """All rows of all sources, repeated by their epochs and shuffled with seed 42. sources: [(name,
    epochs, Source)]."""

    def __init__(self, sources):
        self.sources = sources
        sizes = [source.n_rows * epochs for _, epochs, source in sources]
        source_of = np.repeat(np.arange(len(sources)), sizes)
        row_of = [np.tile(np.arange(source.n_rows), epochs) for _, epochs, source in sources]
        order = list(range(sum(sizes)))
        random.Random(42).shuffle(order)  # the same as shuffling the list of (source, row) pairs
        self.source_of, self.row_of = source_of[order], np.concatenate(row_of)[order]

    def __len__(self):
        return len(self.row_of)

    def identity(self):
        """{source: rows, epochs, hash}, which must be the same when a run is resumed."""
        return {name: f"{source.n_rows} rows x {epochs}, sha256 {source.sha256}"
                for name, epochs, source in self.sources}

    def table(self):
        lines = [f"{name:13} {source.n_rows:9,} rows x {epochs} = {source.n_rows * epochs:9,}"
                 for name, epochs, source in self.sources]
        return "\n".join([*lines, f"{'conversations':29}= {len(self):9,}"])

    def rendered(self, i, enc):
        """(ids, mask) of conversation i."""
        name, _, source = self.sources[self.source_of[i]]
        row = int(self.row_of[i])
        try:
            return render(enc, source.get(row))
        except (ValueError, LookupError, TypeError) as e:
            sys.exit(f"row {row} of {name} is not a conversation ({one_line(e)}): --skip {name} "
                     "leaves that source out")


def source_names(cfg):
    """The names of the sources in this mixture."""
    names = ["smoltalk", "identity", "mmlu", "gsm8k", "spelling", "spellingbee"]
    if cfg.tag.endswith("_long"):
        names.append("tulu")
    if cfg.conversations:
        names = ["conversations", "spelling", "spellingbee"]
    skipped = [name for name in cfg.skip.split(",") if name]
    for name in skipped:
        if name not in INGREDIENTS:
            sys.exit(f"--skip {name}: the sources are {', '.join(INGREDIENTS)}")
    return [name for name in names if name not in skipped]


def open_mixture(cfg, split):
    """The Mixture of "train" or "val". Nothing goes missing silently: a source whose size differs
    from the published one prints a notice; sources that cannot be downloaded end the program, with
    one line each."""
    sources, lost = [], []
    for name in source_names(cfg):
        ingredient = INGREDIENTS[name]
        expected = ingredient.n_rows if split == "train" else ingredient.n_held_out
        if expected == 0:
            continue
        try:
            source = ingredient.open(cfg, split)
        except DataError as e:
            n = ingredient.n_rows * ingredient.epochs
            use = f"{n:,} conversations of the mixture" if split == "train" else "the validation"
            lost.append(f"{name}: {e}. It is needed for {use}; add --skip {name} to train without "
                        "it")
            cfg = replace(cfg, patience=min(cfg.patience, 10))  # for the other sources
            continue
        if split == "val":
            source = source._replace(n_rows=min(source.n_rows, expected))
        if expected not in (ALL, source.n_rows) and not cfg.conversations:
            kind = "mixture" if split == "train" else "validation"
            print(f"{name}: {source.n_rows:,} rows, but the published {kind} has {expected:,}",
                  file=sys.stderr)
        sources.append((name, ingredient.epochs if split == "train" else 1, source))
    if lost:
        sys.exit("\n".join(lost))
    if not any(source.n_rows for _, _, source in sources):
        purpose = "train on" if split == "train" else "validate with"
        sys.exit(f"no conversation is left to {purpose}: skip fewer sources, or use more rows")
    return Mixture(sources)


def write_questions(cfg, path):
    """Held-out conversations for chat.py, formatted as in training: {"source", "messages"} on each
    line. The file is empty if the mixture has no such source."""
    lines = []
    for name in source_names(cfg):
        if INGREDIENTS[name].n_questions:
            source = INGREDIENTS[name].open(cfg, "val")
            for i in range(min(source.n_rows, INGREDIENTS[name].n_questions)):
                lines.append(json.dumps({"source": name, "messages": source.get(i)}) + "\n")
    atomic_write(path, "".join(lines))


def dry_run(cfg):
    """Prints the mixture and three conversations of each source, with the trained tokens in
    green."""
    enc = load_tokenizer(base_dir() / "tokenizer")
    mixtures = {split: open_mixture(cfg, split) for split in ("train", "val")}
    for split, mixture in mixtures.items():
        print(f"{split}:\n{mixture.table()}\n")
    for name, _, source in mixtures["train"].sources:
        for row in range(min(3, source.n_rows)):
            ids, mask = render(enc, source.get(row))
            print(f"\033[1m{name}, row {row}: {len(ids):,} tokens, {sum(mask):,} trained\033[0m")
            print(coloured(enc, ids[:400], mask), "...\n" if len(ids) > 400 else "\n")


def coloured(enc, ids, mask):
    """The text of ids for a terminal: trained tokens in green, others in grey."""
    text = ""
    for trained, run in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]):
        text += f"\033[{32 if trained else 90}m{enc.decode([token for token, _ in run])}\033[0m"
    return text


# ---- Rows: best-fit packing, whole conversations only --------------------------------------------

class Packer:
    """Packs whole conversations into rows of row_len = T + 1 tokens; uses each one once.

    A buffer holds the next 100 conversations. A row takes the longest one that fits (ties: the
    earliest), again and again; if none fits, the rest of the row is padding. A conversation is cut
    at T tokens, and skipped if none of those is trained on (after a very long question). state() is
    small: it lists the conversations in the buffer, which are rendered again."""

    def __init__(self, mixture, enc, row_len, state=None):
        self.mixture, self.enc, self.row_len = mixture, enc, row_len
        state = state or {"next": 0, "buffer": [], "rows": 0, "tokens": 0, "cut": 0, "skipped": 0}
        try:
            self.next = state["next"]  # the next conversation to enter the buffer
            self.rows, self.tokens = state["rows"], state["tokens"]
            self.cut, self.skipped = state["cut"], state["skipped"]
            self.buffer = [(i, *mixture.rendered(i, enc)) for i in state["buffer"]]  # ids, mask
        except (LookupError, TypeError) as e:
            sys.exit(f"the loader's state does not fit the mixture ({one_line(e)})")
        self.fill()
        if not state["next"] and not self.buffer:
            sys.exit(f"no conversation has an answer within its first {row_len - 1} tokens: use a "
                     "larger --max-seq-len, or other conversations")

    def state(self):
        """What is needed to resume from here. "used": the number of conversations in rows."""
        return {"next": self.next, "buffer": [i for i, _, _ in self.buffer],
                "used": self.next - len(self.buffer), "rows": self.rows, "tokens": self.tokens,
                "cut": self.cut, "skipped": self.skipped}

    def fill(self):
        """Fills the buffer up to 100 conversations."""
        while len(self.buffer) < 100 and self.next < len(self.mixture):
            ids, mask = self.mixture.rendered(self.next, self.enc)
            if any(mask[:self.row_len - 1]):
                self.buffer.append((self.next, ids, mask))
            else:
                self.skipped += 1
            self.next += 1

    def next_row(self):
        """ids and mask, two lists of up to row_len; empty if the conversations have run out."""
        ids, mask = [], []
        while True:
            self.fill()
            lengths = [min(len(tokens), self.row_len - 1) for _, tokens, _ in self.buffer]
            longest = max((n for n in lengths if n <= self.row_len - len(ids)), default=0)
            if longest == 0:
                break
            _, new_ids, new_mask = self.buffer.pop(lengths.index(longest))
            self.cut += len(new_ids) > longest
            ids += new_ids[:longest]
            mask += new_mask[:longest]
        self.rows += len(ids) > 0
        self.tokens += len(ids)
        return ids, mask

    def batch(self, n_rows):
        """int32 (2, n_rows, T): inputs, and targets, which are -1 where there is no loss. If the
        conversations run out, the remaining rows are padding; None if nothing is left."""
        T = self.row_len - 1
        inputs = np.full((n_rows, T), self.enc.encode_single_token("<|bos|>"), np.int32)
        targets = np.full((n_rows, T), -1, np.int32)
        for r in range(n_rows):
            ids, mask = (np.array(row, np.int32) for row in self.next_row())
            if len(ids) == 0 and r == 0:
                return None
            inputs[r, :len(ids)] = ids[:T]
            targets[r, :max(0, len(ids) - 1)] = np.where(mask[1:], ids[1:], -1)
        return np.stack([inputs, targets])

    def filled(self, n_rows):
        """A batch without the rows that are only padding."""
        before, batch = self.rows, self.batch(n_rows)
        return None if batch is None else batch[:, :self.rows - before]


# ---- The run -------------------------------------------------------------------------------------

def set_schedules(optimizer, step, progress):
    """Sets the learning rates, constant for the first half of the conversations, then linear to 0,
    and Muon's momentum, 0.85 -> 0.95 over 300 steps. progress: 0 to 1. Returns the factor of the
    learning rates."""
    factor = min(1.0, 2 * (1 - progress))
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if group["kind"] == "muon":
            group["momentum"] = 0.85 + (0.95 - 0.85) * min(step / 300, 1)
    return factor


def check_files(cfg):
    """Exits if a source or a local file cannot be used. Downloads nothing."""
    names = source_names(cfg)
    if "conversations" in names:
        own_conversations(cfg, "train")
        own_conversations(cfg, "val")
    if "identity" in names and "://" not in cfg.identity:
        identity(cfg, "train")
    if "://" not in cfg.words:
        word_list(cfg)


REFERENCE_LRS = ("embedding_lr", "unembedding_lr", "matrix_lr")


def sample(model, enc, source, n=64):
    """The first question of a Source, and the model's greedy answer."""
    asked = list(itertools.takewhile(lambda m: m["role"] != "assistant", source.get(0)))
    ids = [*render(enc, asked)[0], enc.encode_single_token("<|assistant_start|>")]
    end, answer = enc.encode_single_token("<|assistant_end|>"), []
    for [token] in generate(model, [ids], n):
        if token == end:
            break
        answer.append(token)
    question = "".join(part["text"] for part in parts_of(asked[-1]))
    return f"sample: {question[:200]!r} -> {enc.decode(answer)!r}"


def find_base(cfg):
    """(folder, step, hash of the weights) of the model to fine-tune; (folder, None, None) if there
    is none. Exits if it cannot be used."""
    folder = folder_of("base", cfg.tag)
    step = finished_checkpoint(folder)
    if step is None:
        return folder, None, None
    meta = read_meta(folder, step)
    missing = [lr for lr in REFERENCE_LRS if not has_kind(meta["user_config"].get(lr), float)]
    if missing:
        sys.exit(f"{checkpoint_files(folder, step)['meta']} lacks learning rates: add "
                 f"user_config.{missing[0]} (pretrain.py --help shows the usual values)")
    return folder, step, weights_hash(folder, step)


def open_run(cfg, enc, env):
    """The Run, and folder and step of the base model. Exits without creating a folder if there is
    neither a base model nor a fine-tuning checkpoint."""
    found = find_base(cfg) if env.rank == 0 else None
    base, base_step, base_hash = from_rank_0(found, env)
    folder = folder_of("sft", cfg.tag)
    if base_step is None and not checkpoint_steps(folder):
        sys.exit(f"no base model in {base}: `bash run_all.sh {cfg.tag}` trains it, or pretrain.py")
    recipe = {field: getattr(cfg, field) for field in RECIPE}
    own = Path(cfg.conversations)
    recipe.update(tokenizer=tokenizer_hash(enc), conversations=own.is_file() and file_hash(own))
    if base_step is not None:
        recipe["base"] = base_hash
    return Run(folder, cfg, recipe, env), base, base_step


def open_data(cfg, enc, run):
    """On rank 0 (training stream, validation stream, identity of the data), elsewhere Nones."""
    if run.env.rank != 0:
        return None, None, None
    training, validation = open_mixture(cfg, "train"), open_mixture(cfg, "val")
    print(training.table(), flush=True)
    data = {**training.identity(),
            **{f"{name} (validation)": said for name, said in validation.identity().items()}}
    stream = Packer(training, enc, cfg.max_seq_len + 1, run.loader_state())
    return stream, Packer(validation, enc, cfg.max_seq_len + 1), data


def main():
    cfg = parse_config(Config, __doc__)
    if cfg.max_seq_len is None:
        cfg.max_seq_len = 8192 if cfg.tag.endswith("_long") else 4096
    if cfg.dry_run:
        return dry_run(cfg)
    if not cfg.tag:
        sys.exit("which model? --tag d18_9tpp_drope_50, for example: a folder in base_checkpoints")
    env = setup_env(compile=cfg.compile)
    n_rows = rows_of_a_step(cfg.total_batch_size, cfg.max_seq_len, env.world)
    if cfg.check:
        return check_files(cfg)
    env.micro = rows_at_a_time(env, cfg.max_seq_len, cfg.device_batch_size)
    enc = load_tokenizer(base_dir() / "tokenizer")
    run, base, base_step = open_run(cfg, enc, env)
    if run.meta.get("finished"):
        return run.say(f"{run.folder} is finished (step {run.step}), skipped")

    # The model has RoPE if the base model has. The optimizer keeps its moments, but the learning
    # rates start over at 0.8 x pretraining's reference values (without pretraining's factor
    # sqrt(batch / 2^19)). Muon's weight decay is 0 from here on.
    meta = run.meta or read_meta(base, base_step)
    config = GPTConfig(**{**meta["model_config"], "sequence_len": cfg.max_seq_len})
    model = GPT(config, meta["loop_state"]["use_rope"], env.dtype).to(env.device)
    reference = {name: meta["user_config"][name] for name in REFERENCE_LRS}
    lrs = {name: lr * cfg.init_lr_frac for name, lr in reference.items()}
    optimizer = build_optimizer(model, **lrs, weight_decay=0.0, compile=env.compile)
    if not run.source:
        fresh = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        load_weights(model, optimizer, base, base_step, env.device)  # sets model.use_rope, too
        for group, (lr, weight_decay) in zip(optimizer.param_groups, fresh):
            group.update(initial_lr=lr, weight_decay=weight_decay)
        run.say(f"starting from step {base_step} of {base}")
    if cfg.fp8:
        set_fp8(model, env)
    compiled = compile_model(model, env)

    if env.rank == 0:
        log_head(cfg, env, rows_per_step=n_rows, attention=attention_kernel(env, config),
                 use_rope=model.use_rope, **reference)
    stream, held_out, data = open_data(cfg, enc, run)
    run.same_data(data)
    total = from_rank_0(stream and len(stream.mixture), env)  # conversations
    validation_rows = ValidationRows(held_out and held_out.filled, cfg.max_seq_len,
                                     token_bytes(enc), env)
    run.start(model, optimizer, stream, n_rows, tokenizer=run.recipe["tokenizer"],
              user_config={**asdict(cfg), **reference}, base=run.recipe.get("base"))

    def validate():
        n = max(1, cfg.eval_tokens // cfg.max_seq_len)
        run.log_validation(*run.validate(compiled, validation_rows, n))
        if env.rank == 0:
            run.say(sample(model, enc, held_out.mixture.sources[0][-1]))

    while run.progress < 1:
        if run.step % cfg.eval_every == 0:
            validate()
        x, y = run.next_batch()  # (rows, T) each
        used = from_rank_0(run.position and run.position["used"], env)  # conversations so far
        factor = set_schedules(optimizer, run.step, run.progress)
        loss = accumulate_gradients(compiled, x, y, env)
        optimizer.step()
        optimizer.zero_grad()
        run.end_of_step(loss, used / total, factor, conversations=used)

    validate()  # the last checkpoint is saved by now
    if env.rank == 0:
        write_questions(cfg, run.folder / "questions.jsonl")
        position = run.position
        padding = 1 - position["tokens"] / (position["rows"] * (cfg.max_seq_len + 1))
        run.say(f"{total:,} conversations in {position['rows']:,} rows: {100 * padding:.2f}% of "
                f"padding, {position['cut']:,} cut at the end of a row, {position['skipped']:,} "
                "skipped because their question fills a row")
    run.finish()


if __name__ == "__main__":
    guard(main)
