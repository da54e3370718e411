"""Evaluation: does dropping RoPE help beyond the training length, and what can the chat model do?

    python eval.py d18_9tpp d18_9tpp_drope_50       # --quick: less of everything, for CPUs
    python eval.py --table d18_9tpp d20_9tpp        # only table and figures of what is evaluated
    python eval.py --status                         # which tags there are, and how far each is
    python eval.py --chat d18_9tpp_drope_50         # talk to an exported model

Base models (base_checkpoints/TAG) are tested in contexts of 1/2 to 8 training lengths: bits per
byte of the same tokens, and needles, numbers hidden in a text. Each as trained and with
model.logn_scale, whose c is fitted in one way for all; RoPE also with NTK and YaRN, which need no
training either. Chat models (hf_sft/TAG) answer MMLU, GSM8K and SpellingBee. Gives eval.json beside
the checkpoint, a table and figures in the folder eval. What is finished is kept: the same command
resumes. About 10 minutes a tag on an H100 (estimated). Left out: few-shot prompts, sampling, text
written by base models.
"""
import signal, sys
if __name__ == "__main__":                                  # Ctrl-C while Python imports
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
import json, math, random, re, time, warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import (ROPE_THETA, atomic_write, base_dir, checkpoint_steps, encode, fetch, file_hash,
                   guard, load_model, load_tokenizer, one_line, parse_config, read_lines,
                   read_meta, read_results, rotary_tables, setup_env, text_column, token_bytes,
                   tokenizer_hash, weights_hash, write_results)


@dataclass
class Config:
    quick: bool = False  # fewer contexts, prompts, documents and questions
    table: bool = False  # evaluate nothing, only make the table and the figures of the tags
    status: bool = False  # only list the tags and how far each is
    chat: bool = False  # talk to the exported model of a tag
    check: bool = False  # only check the options


@dataclass
class Sizes:
    contexts: tuple = (0.5, 1, 2, 4, 8)     # in training lengths
    prompts: int = 160                      # with a needle, for each context
    documents: int = 96                     # and a quarter as many to fit c on
    questions: int = 100_000                # of MMLU and of GSM8K: all
    words: int = 256                        # of SpellingBee
    new_tokens: int = 512                   # of an answer, at most


QUICK = Sizes((0.5, 1, 2, 4), prompts=10, documents=8, questions=16, words=16, new_tokens=256)
SCALES = (0.0, 0.1, 0.2, 0.4, 0.6)          # values of c that are tried


# ---- Statistics ----------------------------------------------------------------------------------

def wilson(k, n):
    """[k / n, low, high]: a rate with its 95% interval, which is good near 0 and 1, too (Wilson
    1927)."""
    z = 1.96
    center = (k + z * z / 2) / (n + z * z)
    width = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return [k / n, max(0.0, center - width), min(1.0, center + width)]


def mcnemar(a, b):
    """Exact two-sided p of "a and b succeed equally often", outcomes on the same prompts. Only
    prompts on which they differ tell anything: under the hypothesis each is the toss of a coin."""
    only_a = sum(x and not y for x, y in zip(a, b))
    only_b = sum(y and not x for x, y in zip(a, b))
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2 ** n)


def bootstrap(x, size):
    """[sum(x) / sum(size), low, high]: 95% interval by resampling the examples 2,000 times. Where x
    are differences of two measurements of one example, the interval is paired."""
    drawn = np.random.default_rng(0).integers(0, len(x), (2000, len(x)))
    ratios = x[drawn].sum(1) / size[drawn].sum(1)
    return [x.sum() / size.sum(), *np.percentile(ratios, [2.5, 97.5])]


# ---- The arms: a base model as trained, with its logits scaled, with RoPE's remedies -------------
# c is model.logn_scale: the attention logits of the query at position n (from 1) are multiplied by
# max(1, 1 + c ln(n / n_train)), where n_train is the training length. Up to n_train neither c nor a
# remedy changes anything.

REMEDIES = ("", "ntk", "yarn")


def remedied_tables(T, head_dim, device, n_train, remedy):
    """The model's rotary_tables for s = T / n_train > 1 training lengths. ntk ("NTK-aware"
    scaling): a larger theta; the slowest turn takes s times as many tokens, the fastest stays. yarn
    (arXiv:2309.00071): frequencies with less than 1 turn in n_train tokens are divided by s, those
    with more than 32 stay, between them is a ramp. (YaRN's scale of the logits is our c.)"""
    s = T / n_train
    if s <= 1:
        return rotary_tables(T, head_dim, device)
    if remedy == "ntk":
        return rotary_tables(T, head_dim, device, ROPE_THETA * s ** (head_dim / (head_dim - 2)))
    freqs = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    keep = ((n_train * freqs / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
    angles = torch.outer(torch.arange(T, dtype=torch.float32), freqs * (keep + (1 - keep) / s))
    return angles.cos().to(device), angles.sin().to(device)


def set_arm(model, remedy="", c=0.0):
    """model.forward reads both attributes; it calls rotary_tables(T, head_dim, device)."""
    model.logn_scale = c
    model.rotary_tables = rotary_tables
    if remedy:
        n_train = model.config.sequence_len
        model.rotary_tables = partial(remedied_tables, n_train=n_train, remedy=remedy)


def join(*words):
    """The name of an arm, or of its section in eval.json: join("needle", "", "fitted")."""
    return " ".join(word for word in words if word)


class Texts:
    """The validation shard as tokens. Of its 150 longest documents, every third is kept apart, to
    fit c on, the others are tested on, the longest first; of both no more than sizes.documents
    says. The text of all other documents, mixed, is the haystack."""

    def __init__(self, path, column, enc, sizes):
        import pyarrow as pa
        try:
            with text_column(path, column) as shard:
                texts = shard.read([column])[column].to_pylist()
        except (pa.ArrowException, OSError, ValueError) as e:
            sys.exit(f"{path} cannot be read ({one_line(e)}): put a whole one there")
        texts = sorted((text or "" for text in texts), key=len, reverse=True)
        self.enc, self.nbytes = enc, token_bytes(enc).numpy()
        self.bos = enc.encode_single_token("<|bos|>")
        self.name = f"{tokenizer_hash(enc)} {path.name} {file_hash(path)}"
        n = min(150, len(texts) // 4)
        longest = sorted(encode(enc, texts[:n]), key=len, reverse=True)
        self.fit = longest[2::3][:sizes.documents // 4]
        self.documents = [d for d in longest if d not in self.fit][:sizes.documents]
        rest = random.Random(0).sample(texts[n:], len(texts) - n)
        self.hay = encode(enc, ["\n\n".join(rest)[:4_000_000]])[0]


# ---- Bits per byte, and how c is fitted ----------------------------------------------------------

@torch.no_grad()
def token_nats(model, ids):
    """The loss of each token of a row but the first, in nats: list of n + 1 ids -> float64 (n,)."""
    row = torch.tensor([ids], device=model.lm_head.weight.device)
    return model(row[:, :-1], row[:, 1:], reduction="none")[0].double().cpu().numpy()


def text_bits(model, texts, contexts):
    """{context: bits per byte of the last 512 tokens (n_train / 8, if that is less) of documents
    as long as the context}. A flat curve says that context is ignored, a rising one that it hurts.
    "change" is against 1 x on the same documents, with a paired interval."""
    n_train = model.config.sequence_len
    tail = min(512, n_train // 8)
    summary, nats = {}, {}
    for m in sorted({1, *contexts}):            # 1 x always, for the change from it
        L = int(m * n_train)
        documents = [d for d in texts.documents if len(d) >= L]
        rows = [[texts.bos] + d[-L:] for d in documents]
        nats[m] = np.array([token_nats(model, row)[-tail:].sum() for row in rows])
        if documents and m in contexts:
            nats_per_bit = math.log(2)
            size = np.array([texts.nbytes[d[-tail:]].sum() for d in documents]) * nats_per_bit
            change = None
            if m >= 1:                          # the longest documents come first, at 1 x, too
                change = bootstrap(nats[m] - nats[1][:len(documents)], size)
            summary[f"{m:g}"] = dict(n=len(documents), bpb=bootstrap(nats[m], size), change=change)
    return summary


def fit_scale(model, texts, contexts, remedy):
    """One c for all contexts: that of SCALES with the lowest loss on all tokens beyond n_train of
    the documents that are kept for this, each in the longest of the contexts that it fills."""
    n_train, rows, losses = model.config.sequence_len, [], {}
    for document in texts.fit:
        filled = [int(m * n_train) for m in contexts if 1 < m <= len(document) / n_train]
        if filled:
            rows.append([texts.bos] + document[-max(filled):])
    if not rows:
        return dict(c=0.0, n=0, losses={})
    for c in SCALES:
        set_arm(model, remedy, c)
        losses[c] = np.concatenate([token_nats(model, row)[n_train:] for row in rows]).mean()
    return dict(c=min(losses, key=losses.get), n=len(rows), losses=losses)


# ---- Needles -------------------------------------------------------------------------------------

CITIES = "Berlin Boston Cairo Chicago Delhi Lima London Madrid Oslo Paris Rome Tokyo".split()


class Prompt(NamedTuple):
    ids: list           # <|bos|> text, needle, text, question, answer: L + 1 tokens
    number: int         # the index of the needle's number in ids
    digits: int         # how many tokens the answer has
    blank: list         # ids with text in the needle's place


def make_prompt(texts, L, i):
    """The i-th Prompt of L + 1 tokens, the same for all models; None where L is too short:

        <|bos|> text ...
        The secret number of Oslo is 4821.
        text ...
        The secret number of Oslo is 4821

    The needle, the second line, stands after 5, 15 ... or 95% of the text. The tokens of the last
    4821 are the answer."""
    rng, encode = random.Random(f"needle {L} {i}"), texts.enc.encode_ordinary
    question = encode(f"\nThe secret number of {rng.choice(CITIES)} is ")
    answer = encode(f"{rng.randrange(10_000):04d}")
    needle = question + answer + encode(".\n")
    room = L - len(needle) - len(question + answer)         # tokens of text
    if room < L // 4 or len(texts.hay) <= L:
        return None
    start = rng.randrange(len(texts.hay) - L)
    place = int((i % 10 + 0.5) / 10 * room)
    hay = texts.hay[start:start + L]
    ids = [texts.bos] + hay[:place] + needle + hay[place:room] + question + answer
    blank = [texts.bos] + hay[:room + len(needle)] + question + answer
    return Prompt(ids, 1 + place + len(question), len(answer), blank)


@torch.no_grad()
def answers(model, rows):
    """For each row (ids, n): whether each of its last n ids is the likeliest after the right ones
    before it, and their loss in nats. Where all are, greedy decoding would have written them; so
    nothing has to be generated ("teacher forcing")."""
    device = model.lm_head.weight.device
    for ids, n in rows:
        row = torch.tensor([ids], device=device)
        logits, targets = model(row[:, :-1])[0, -n:], row[0, -n:]       # (n, vocab_size), (n,)
        right = (logits.argmax(-1) == targets).all().item()
        yield right, F.cross_entropy(logits, targets, reduction="sum").item()


def needles(model, texts, contexts, prompts):
    """{context: how many needles are found}. "ceiling": what a model could find at best that sees
    only the last n_train tokens. "gain": what an answer costs more without its needle, in nats per
    digit, of the first 20 prompts; it shows what is learnt before any is found."""
    n_train, summary = model.config.sequence_len, {}
    for m in contexts:
        L = int(m * n_train)
        made = [make_prompt(texts, L, i) for i in range(prompts)]
        if None in made:
            continue
        found, nats = zip(*answers(model, [(p.ids, p.digits) for p in made]))
        _, without = zip(*answers(model, [(p.blank, p.digits) for p in made[:20]]))
        gain = np.subtract(without, nats[:20])
        summary[f"{m:g}"] = dict(
            n=prompts, rate=wilson(sum(found), prompts), found=found,
            gain=bootstrap(gain, np.full(len(gain), 4)),                # an answer has 4 digits
            ceiling=np.mean([p.number >= L - n_train for p in made]))   # inputs: ids[0] to ids[L-1]
    return summary


# ---- Chat models, through their export -----------------------------------------------------------

def calculator(call):
    """The python tool: the result of arithmetic or of 'word'.count('x') as text, None for all else.
    A model wrote the call, so only digits, + - * / % ( ) and no power reach Python's eval, and
    200 characters at most."""
    call = call.strip()
    count = re.fullmatch(r"""(["'])(\w*)\1\.count\((["'])(\w)\3\)""", call)
    if count:
        return str(count[2].count(count[4]))
    if not re.fullmatch(r"[0-9.+\-*/%() ]{1,200}", call) or "**" in call:
        return None
    try:
        with warnings.catch_warnings():                     # Python has opinions on "1(2)"
            warnings.simplefilter("ignore")
            value = eval(call, {"__builtins__": {}})
        if abs(value) < 1e15:                               # neither infinite nor nan
            return str(int(value)) if value == int(value) else str(round(value, 10))
    except (SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError):
        pass
    return None


class PythonTool:
    """A logits processor: a call is followed by <|output_start|> its result <|output_end|>, as in
    fine-tuning."""

    def __init__(self, tokenizer, rows):
        self.tokenizer, self.waiting = tokenizer, [[] for _ in range(rows)]
        names = ["<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
        self.start, self.end, self.output, self.output_end = tokenizer.convert_tokens_to_ids(names)

    def __call__(self, input_ids, scores):                  # (B, tokens so far), (B, vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            if ids[-1] == self.end and self.start in ids:
                call = ids[len(ids) - ids[::-1].index(self.start):-1]
                result = calculator(self.tokenizer.decode(call))
                if result is not None:
                    digits = self.tokenizer.encode(result, add_special_tokens=False)
                    self.waiting[row] = [self.output, *digits, self.output_end]
            if self.waiting[row]:
                scores[row] = -torch.inf
                scores[row, self.waiting[row].pop(0)] = 0.0
        return scores


class Chat:
    """An exported chat model and its tokenizer."""

    def __init__(self, folder, env):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            self.model, report = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=True, dtype=env.dtype, output_loading_info=True)
            problem = " ".join(report["missing_keys"])[:80]
        except Exception as e:                              # damage has many shapes
            problem = one_line(e)
        if problem:
            sys.exit(f"{folder} is damaged ({problem}): delete it and make it again with `python "
                     f"export_hf.py --tag {folder.name}`")
        self.model.to(env.device).eval()
        self.stop = self.tokenizer.convert_tokens_to_ids("<|assistant_end|>")
        self.at_once = 256 if env.device.type == "cuda" else 16
        if env.device.type == "cuda":       # cuDNN's attention plans again for each length
            torch.backends.cuda.enable_cudnn_sdp(False)

    def inputs(self, texts):
        """ids and attention mask of questions, (B, T), padded on the left."""
        conversations = [[{"role": "user", "content": text}] for text in texts]
        return self.tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt", padding=True).to(self.model.device)

    def generate(self, inputs, new_tokens, **more):
        """Greedy answers with the tool at hand: the new ids of each row. more: for transformers."""
        from transformers import LogitsProcessorList
        B, T = inputs["input_ids"].shape
        tool = LogitsProcessorList([PythonTool(self.tokenizer, B)])
        ids = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False,
                                  logits_processor=tool, eos_token_id=self.stop,
                                  pad_token_id=self.stop, **more)
        return ids[:, T:].tolist()

    @torch.no_grad()
    def choose(self, questions):
        """Of the letters that each question offers, the one that is likeliest as first token."""
        logits = self.model(**self.inputs(questions), logits_to_keep=1).logits[:, -1]   # (B, V)
        chosen = []
        for question, row in zip(questions, logits):
            letters = re.findall(r"=([A-H])$", question, re.M)
            ids = [self.tokenizer.encode(letter, add_special_tokens=False)[0] for letter in letters]
            chosen.append(letters[row[ids].argmax().item()])
        return chosen

    def ask(self, conversations, new_tokens):
        """Asks questions whose right answers are known, those of like length together. new_tokens:
        of an answer in words, at most; 0 to choose a letter."""
        conversations = sorted(conversations, key=lambda pair: len(pair[0]["content"]))
        examples = []
        for i in range(0, len(conversations), self.at_once):
            some = conversations[i:i + self.at_once]
            questions = [question["content"] for question, _ in some]
            if new_tokens:
                rows = self.generate(self.inputs(questions), new_tokens)
                given = [self.tokenizer.decode(ids).partition("<|assistant_end|>") for ids in rows]
            else:
                given = [(letter, "", "") for letter in self.choose(questions)]
            for (_, right), question, (text, end, _) in zip(some, questions, given):
                expected = final_answer(right["content"])
                examples.append(dict(question=question, expected=expected, answer=text,
                                     right=final_answer(text) == expected, stops=bool(end)))
        n = len(examples)
        return dict(n=n, rate=wilson(sum(e["right"] for e in examples), n),
                    stops=wilson(sum(e["stops"] for e in examples), n), examples=examples)


def final_answer(content):
    """The number after the last #### of an answer (text, or a list of parts), without commas; a
    single letter as it is; else None."""
    text = content if isinstance(content, str) else content[-1]["text"]
    found = re.findall(r"#### *(-?[\d.,]*\d)|^([A-H])$", text)
    return "".join(found[-1]).replace(",", "") if found else None


def talk(tag, env):
    """A conversation in the terminal, kept as ids, so that calls and outputs stay what they are."""
    folders = [base / "hf_sft" / tag for base in (base_dir(), base_dir() / "tiny")]
    folder = next((folder for folder in folders if (folder / "config.json").exists()), None)
    if folder is None:
        sys.exit(f"no export in {folders[0]}: `python export_hf.py --tag {tag}` makes it")
    from transformers import TextStreamer

    class Printer(TextStreamer):                            # prints words as they are generated
        def on_finalized_text(self, text, stream_end=False):
            super().on_finalized_text(text.replace("<|assistant_end|>", ""), stream_end)

    chat, ids = Chat(folder, env), []
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    print(f"{folder} on {env.device}. Ctrl-C stops an answer, /clear starts over, Ctrl-D ends.")
    while True:
        try:
            text = input("> ").strip()
            if not sys.stdin.isatty():                      # as it looks when somebody types
                print(text)
            if text == "/clear":
                ids = []
            elif "\ufffd" in text:
                print("that is not UTF-8: say it again")
            elif text:
                turn = chat.inputs([text])["input_ids"][:, 1 if ids else 0:]    # <|bos|> comes once
                row = torch.cat((torch.tensor([ids], device=turn.device).long(), turn), 1)  # (1, T)
                inputs = dict(input_ids=row, attention_mask=torch.ones_like(row))
                printer = Printer(chat.tokenizer, skip_prompt=True)
                # Evaluations are greedy; here a word that was said becomes a little less likely, or
                # small models would repeat themselves for ever
                ids = row[0].tolist() + chat.generate(inputs, 512, streamer=printer,
                                                      repetition_penalty=1.1)[0]
        except KeyboardInterrupt:                           # question and answer are forgotten
            print()
        except EOFError:
            return print()


# ---- What is finished ----------------------------------------------------------------------------

def places(tag):
    """The folders of a tag: base checkpoints, chat checkpoints, export. A _long tag is another
    fine-tuning of the base model without _long."""
    return [base_dir() / "base_checkpoints" / tag.removesuffix("_long"),
            base_dir() / "chatsft_checkpoints" / tag, base_dir() / "hf_sft" / tag]


class Results:
    """eval.json beside a checkpoint: the sections that are finished, and of what they are. If that
    is another checkpoint, or other texts, all is done again."""

    def __init__(self, folder, quick, key=None):
        self.path = folder / ("eval_quick.json" if quick else "eval.json")
        self.key, self.sections = read_results(self.path)
        self.key = self.key or key
        if key and self.key != key:
            print(f"  {self.path} is of another checkpoint, text or size: done again")
            self.key, self.sections = key, {}

    def section(self, name, test, *args):
        """test(*args), unless it is there already."""
        if name not in self.sections:
            start = time.time()
            self.sections[name] = json.loads(json.dumps(test(*args), default=float))
            write_results(self.path, self.key, self.sections)
            print(f"  {name}: {time.time() - start:.0f} s", flush=True)
        return self.sections[name]


def validations(folder):
    """A run's validations: [(step, bits per byte), ...], two at the switch, with RoPE and without;
    and the step of the switch, None where there was none."""
    points, switch = [], None
    names = ("val_bpb_with_rope", "val_bpb_without_rope", "val_bpb")
    numbers = dict.fromkeys(names, float)
    for record in read_lines(folder / "metrics.jsonl", {"step": int}, {**numbers, "switch": bool}):
        for name in names:
            if name in record:
                points.append((record["step"], record[name]))
        if "switch" in record:
            switch = record["step"]
    return points, switch


def status():
    """Lists the runs and how far each is, from their metas and metrics alone."""
    for base in (base_dir(), base_dir() / "tiny"):
        for stage, export in (("base_checkpoints", "hf_base"), ("chatsft_checkpoints", "hf_sft")):
            for folder in sorted((base / stage).glob("*")):
                if checkpoint_steps(folder):
                    exported = (base / export / folder.name / "config.json").exists()
                    try:
                        said = how_far(folder)
                    except (SystemExit, OSError, ValueError, LookupError) as e:
                        said = f"unclear: {one_line(e)}"
                    print(f"{folder}{', exported' if exported else ''}\n    {said}")


def how_far(folder):
    step = checkpoint_steps(folder)[-1]
    meta, (points, switch) = read_meta(folder, step), validations(folder)
    of = "" if meta.get("finished") else f" of {meta.get('steps', 'unknown')}"
    said = f"{'step' if of else 'finished at step'} {step}{of}"
    if points:
        said += f", bits per byte {points[0][1]:.3f} -> {points[-1][1]:.3f}"
    if switch is None:
        return said + f", RoPE {'on' if meta['loop_state']['use_rope'] else 'off'}"
    with_rope, without = [bpb for at, bpb in points if at == switch][:2]
    return said + f", RoPE dropped at {switch}: {with_rope:.3f} with it, {without:.3f} without"


# ---- One tag after the other ---------------------------------------------------------------------

def validation_shard(meta):
    """(path, text column) of the file that the run was validated on. Of the series' own it is
    downloaded if it is gone. Exits if there is only another file of that name."""
    config, data = meta["user_config"], meta.get("data", {})
    name = meta.get("validation_file", "shard_06542.parquet")
    column = config.get("text_column", "text")
    places = [Path(str(config.get("data_dir", ""))) / name, base_dir() / "data" / "climbmix" / name]
    there = [path for path in places if path.is_file()]
    for path in there:
        if data.get("validation_sha256", "") in ("", file_hash(path)):
            return path, column
    if there:
        sys.exit(f"{there[0]} is not the file that the run was validated on: put that one there")
    if config.get("dataset") == "local":
        sys.exit(f"{places[0]}, which the run was validated on, is missing: put it there, or into "
                 f"{places[1].parent}")
    return fetch("karpathy/climbmix-400b-shuffle", name, places[1], patience=60), column


def evaluate_base(folder, cfg, sizes, env):
    """Tests all arms of a base model."""
    enc = load_tokenizer(base_dir() / "tokenizer")
    model, meta = load_model(folder, device=env.device, dtype=env.dtype)
    n_train, trained_with = model.config.sequence_len, meta.get("tokenizer", tokenizer_hash(enc))
    if trained_with != tokenizer_hash(enc) or enc.n_vocab != model.config.vocab_size:
        sys.exit(f"{folder} was not trained with the tokenizer in {base_dir() / 'tokenizer'}: put "
                 "the one of that run there")
    shard, column = validation_shard(meta)
    texts = Texts(shard, column, enc, sizes)
    if not texts.documents or len(texts.documents[0]) < n_train:
        sys.exit(f"{shard} has no document of {n_train} tokens to test on")
    step = meta["step"]
    key = dict(step=step, sha256=weights_hash(folder, step), use_rope=model.use_rope,
               n_train=n_train, texts=texts.name, sizes=str(sizes))
    results, beyond = Results(folder, cfg.quick, key), [m for m in sizes.contexts if m > 1]
    for remedy in REMEDIES if model.use_rope else ("",):
        scale = results.section(join("scale", remedy), fit_scale, model, texts, beyond, remedy)
        for c in sorted({0.0, scale["c"]}):
            set_arm(model, remedy, c)
            arm = join(remedy, "fitted" if c else "")
            contexts = beyond if arm else sizes.contexts    # up to 1 x all arms are the same
            results.section(join("bpb", arm), text_bits, model, texts, contexts)
            results.section(join("needle", arm), needles, model, texts, contexts, sizes.prompts)


def evaluate_chat(folder, export, cfg, sizes, env):
    """Asks the questions that sft.py left beside its checkpoint."""
    records = read_lines(folder / "questions.jsonl", {"source": str, "messages": list})
    if not records:
        return print(f"  no questions in {folder / 'questions.jsonl'}: skipped", file=sys.stderr)
    try:
        for record in records:
            question, right = record["messages"]
            question["content"].lower()
            if final_answer(right["content"]) is None:
                raise ValueError("an answer without a result")
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        sys.exit(f"{folder / 'questions.jsonl'} is damaged ({one_line(e)}): sft.py writes it")
    chat = Chat(export, env)
    key = dict(sha256=file_hash(export / "model.safetensors"), sizes=str(sizes),
               questions=file_hash(folder / "questions.jsonl"))
    results = Results(folder, cfg.quick, key)
    for source, most, new_tokens in (("mmlu", sizes.questions, 0),
                                     ("gsm8k", sizes.questions, sizes.new_tokens),
                                     ("spellingbee", sizes.words, sizes.new_tokens)):
        some = [record["messages"] for record in records if record["source"] == source]
        if some:
            chosen = random.Random(42).sample(some, min(len(some), most))
            results.section(source, chat.ask, chosen, new_tokens)


# ---- The table -----------------------------------------------------------------------------------

NOTES = f"""
1x is the training length; [95% intervals]: Wilson for rates, else bootstrap. c: attention logits
are multiplied by max(1, 1 + c ln(n / n_train)); "fitted" is the c of {SCALES} that
is best for other documents, by the same sweep for all. Needles are 4-digit numbers (guessing
.0001). Gain: what an answer costs more without its needle, at 1x, in nats per digit. Ceiling: what
cropping to 1x could find at best. NTK: RoPE with NTK and fitted c on the same prompts (McNemar's
test, 5%). Bits per byte beyond 1x: the change from 1x on the same documents. MMLU: guessing .25.
Stops: answers to SpellingBee that end by themselves.
"""


def arms_of(sections):
    """{arm: {"c": c, "needle": {context: summary}, "bpb": the same}} of a base model. Up to 1 x
    each arm is the model as trained; where c = 0, "fitted" is what it was fitted for."""
    arms = {}
    for remedy in REMEDIES:
        best = sections.get(join("scale", remedy), {}).get("c")
        if best is None:
            continue                                        # without RoPE there are no remedies
        for fitted in ("", "fitted"):
            arm = arms[join(remedy, fitted)] = {"c": best if fitted else 0.0}
            for kind in ("needle", "bpb"):
                same = "" if best == 0 else fitted          # c = 0 was not tested twice
                tested = sections.get(join(kind, remedy, same), {})
                arm[kind] = {**sections.get(kind, {}), **tested} if tested else {}
    return arms


def verdict(mine, twin, far):
    """The last cell of a model without RoPE, c fitted: whether it finds more needles than cropping
    could at best / and more than its twin with RoPE, NTK and fitted c (None: there is no twin)."""
    got = mine["arms"]["fitted"]["needle"].get(far)
    if mine["key"]["use_rope"] or not got:
        return "-"
    ceiling = "yes" if got["rate"][1] > got["ceiling"] else "no"
    if not twin or any(mine["key"][k] != twin["key"][k] for k in ("texts", "n_train", "sizes")):
        return f"{ceiling} / -"
    theirs = twin["arms"].get("ntk fitted", {"needle": {}})["needle"].get(far)
    if not theirs:
        return f"{ceiling} / -"
    p = mcnemar(got["found"], theirs["found"])
    better = "yes" if p < 0.05 and got["rate"][0] > theirs["rate"][0] else "no"
    return f"{ceiling} / {better}, p = {p:.2g}"


def cell(summary, value, form="{:.2f}"):
    numbers = summary.get(value) if summary else None
    return "{} [{}, {}]".format(*map(form.format, numbers)) if numbers else "-"


def markdown(title, head, rows):
    lines = [head, ["---"] * len(head), *rows]
    table = "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
    return f"\n## {title}\n\n{table}" if rows else ""


def make_tables(base, chat, contexts):
    """Markdown. base: {tag: {"key", "arms"}}; chat: {tag: sections}."""
    names = [f"{m:g}" for m in contexts]
    needle, text, answered = [], [], []
    for tag, result in base.items():
        twin = base.get(re.sub(r"_drope_\d+", "", tag))
        for name, arm in result["arms"].items():
            start = [tag, name or "as trained", arm["c"]]
            rates = [cell(arm["needle"].get(m), "rate") for m in names]
            gain = cell(arm["needle"].get("1"), "gain")
            last = verdict(result, twin, names[-1]) if name == "fitted" else "-"
            needle.append([*start, gain, *rates, last])
            bits = [cell(arm["bpb"].get(m), "bpb", "{:.3f}") for m in names if float(m) <= 1]
            more = [cell(arm["bpb"].get(m), "change", "{:+.3f}") for m in names if float(m) > 1]
            text.append([*start, *bits, *more])
    for tag, sections in chat.items():
        mmlu, gsm8k, bee = (sections.get(name) for name in ("mmlu", "gsm8k", "spellingbee"))
        answered.append([tag, *(cell(x, "rate") for x in (mmlu, gsm8k, bee)), cell(bee, "stops")])
    head, lengths = ["tag", "arm", "c"], [f"{name}x" for name in names]
    last = f"{lengths[-1]}: beats the ceiling / NTK"
    return (f"# Results\n{NOTES}"
            + markdown("Needles found", [*head, "gain", *lengths, last], needle)
            + markdown("Bits per byte", [*head, *lengths], text)
            + markdown("Chat", ["tag", "MMLU", "GSM8K", "SpellingBee", "stops"], answered))


# ---- The figures: at most five lines in a panel --------------------------------------------------

ROPE = dict(color="#d55e00", marker="o", ms=4)
NTK = dict(color="#cc79a7", marker="s", ms=4, ls="--")
DROPE = [dict(color="#0072b2", marker="D", ms=4), dict(color="#56b4e9", marker="^", ms=4),
         dict(color="#009e73", marker="v", ms=4), dict(color="#999999", marker="P", ms=4)]


def families(tags):
    """{tag without drope: [(tag, percent of the steps with RoPE, label, look), ...]}: RoPE first,
    and at most three others."""
    found = {}
    for tag in tags:
        family, percent = re.fullmatch(r"(.*?)(?:_drope_(\d+))?", tag).groups()
        found.setdefault(family, []).append((int(percent or 100), tag))
    for family, members in found.items():
        members = sorted(members, reverse=True)[:4]
        looks = [ROPE, *DROPE] if members[0][0] == 100 else DROPE
        found[family] = [(tag, percent, f"DroPE {percent}" if percent < 100 else "RoPE", look)
                         for (percent, tag), look in zip(members, looks)]
    return found


def line(ax, label, look, points):
    """points: {x: [y, low, high]}."""
    if points:
        y = np.array(list(points.values()))
        ax.plot(list(points), y[:, 0], label=label, **look)
        ax.fill_between(list(points), y[:, 1], y[:, 2], color=look["color"], alpha=0.15, lw=0)


def draw_contexts(base, contexts, plt):
    """A row for each family: needles as trained and with fitted c, and what more context does to
    the bits per byte of the same tokens."""
    groups = families(base)
    panels = (("needles found, as trained", "needle", "rate", ""),
              ("needles found, c fitted", "needle", "rate", "fitted"),
              ("bits per byte: change from 1x", "bpb", "change", ""))
    fig, axes = plt.subplots(len(groups), 3, figsize=(11, 3.3 * len(groups)), squeeze=False)
    for row, (family, members) in zip(axes, groups.items()):
        for ax, (title, kind, value, fitted) in zip(row, panels):
            lines = [(tag, fitted, label, look) for tag, _, label, look in members]
            lines.insert(1, (members[0][0], join("ntk", fitted), "RoPE + NTK", NTK))
            for tag, arm, label, look in lines:
                some = base[tag]["arms"].get(arm, {kind: {}})[kind]
                line(ax, label, look, {float(m): p[value] for m, p in some.items() if p[value]})
            ax.set_xscale("log", base=2)
            ax.set_xticks(contexts, [f"{m:g}x" for m in contexts])
            ax.set(title=f"{family}: {title}", xlabel="context, in training lengths")
        for ax in row[:2]:
            ax.set(ylim=(-0.03, 1.03))
    return fig


def draw_drop(base, contexts, plt):
    """Retrieval in the longest context against the moment of the drop, a line for each family."""
    far = f"{contexts[-1]:g}"
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for ax, arm, title in zip(axes, ("", "fitted"), ("as trained", "c fitted")):
        for look, (family, members) in zip([ROPE, NTK, *DROPE], families(base).items()):
            found = {p: base[tag]["arms"][arm]["needle"].get(far) for tag, p, _, _ in members}
            line(ax, family, look, {p: point["rate"] for p, point in found.items() if point})
        ax.set(ylim=(-0.03, 1.03), xlim=(-3, 103), title=f"needles found at {far}x, {title}",
               xlabel="percent of the steps with RoPE (100: always)")
    return fig


def draw_training(base, _, plt):
    """The jump at the switch and the way back, beside RoPE's curve: a panel for each family."""
    groups = families(base)
    fig, axes = plt.subplots(1, len(groups), figsize=(max(6, 4 * len(groups)), 3.8), squeeze=False)
    for ax, (family, members) in zip(axes[0], groups.items()):
        seen = []
        for tag, _, label, look in members:
            points, switch = validations(places(tag)[0])
            ax.plot([step for step, _ in points], [bpb for _, bpb in points], label=label, **look)
            seen += [bpb for _, bpb in points[(len(points) + 3) // 4:]]     # not the first fall
            if switch is not None:
                ax.axvline(switch, color=look["color"], ls=":", lw=1)
        ax.set(title=f"{family} (dotted: RoPE is dropped)", xlabel="step",
               ylabel="validation bits per byte", ylim=(None, 1.02 * max(seen, default=1)))
    return fig


def draw_all(base, contexts, folder, end):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figures: matplotlib is not installed (pip install matplotlib)")
    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False,
                         "axes.titlesize": 10, "legend.fontsize": 8, "legend.frameon": False})
    for name, draw in (("contexts", draw_contexts), ("drop", draw_drop),
                       ("training", draw_training)):
        fig, path = draw(base, contexts, plt), folder / f"{name}{end}.png"
        for ax in fig.axes:
            ax.legend()
        fig.tight_layout()
        atomic_write(path, lambda file: fig.savefig(file, dpi=150, format="png"))
        print(f"{path} written")


# ---- The command ---------------------------------------------------------------------------------

def gather(tags, quick):
    """{tag: {"key", "arms"}} of the base models, {tag: sections} of the chat models."""
    base, chat = {}, {}
    for tag in tags:
        base_folder, sft_folder, _ = places(tag)
        result = Results(base_folder, quick)
        if result.sections:
            base[base_folder.name] = dict(key=result.key, arms=arms_of(result.sections))
        answered = Results(sft_folder, quick).sections
        if answered:
            chat[tag] = answered
        if not result.sections and not answered:
            sys.exit(f"{tag} is not evaluated: leave it out, or run `python eval.py {tag}` first")
    return base, chat


def evaluate(tags, cfg, sizes):
    env = setup_env(compile=0)
    for tag in tags:
        base_folder, sft_folder, export = places(tag)
        exported = (export / "config.json").exists()
        print(f"{tag}, on {env.device}", flush=True)
        if base_folder.exists() or not exported:
            evaluate_base(base_folder, cfg, sizes, env)
        if exported:
            evaluate_chat(sft_folder, export, cfg, sizes, env)


def main():
    tags = list(dict.fromkeys(arg for arg in sys.argv[1:] if not arg.startswith("-")))
    cfg = parse_config(Config, __doc__, [arg for arg in sys.argv[1:] if arg.startswith("-")])
    if cfg.status:
        return status()
    if not tags:
        sys.exit("eval.py: which tag? For example `python eval.py d18_9tpp d18_9tpp_drope_50`")
    if cfg.check:
        return
    if cfg.chat:
        return talk(tags[0], setup_env(compile=0))
    sizes = QUICK if cfg.quick else Sizes()
    if not cfg.table:
        evaluate(tags, cfg, sizes)
    base, chat = gather(tags, cfg.quick)
    folder, end = base_dir() / "eval", "_quick" if cfg.quick else ""
    text = make_tables(base, chat, sizes.contexts)
    atomic_write(folder / f"results{end}.md", text)
    print(f"\n{text}\n{folder}/results{end}.md written")
    if base:
        draw_all(base, sizes.contexts, folder, end)


if __name__ == "__main__":
    guard(main)
