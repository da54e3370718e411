"""Evaluation: does dropping RoPE help beyond the training length, and what can the chat model do?

    python eval.py d18_9tpp d18_9tpp_drope_50       # tags, or folders of Hugging Face exports; --quick: less, for CPUs
    python eval.py --table d18_9tpp d20_9tpp ...    # only the table and the figures, of what was evaluated before

Takes base_checkpoints/TAG, hf_sft/TAG (export_hf.py) and the validation shard. Base models are tested at 1/4 to 8 x the
training length: bits per byte of the same last tokens under growing context, needles in a haystack, repeated random spans;
each as trained and with a logit scale (beta) that is fitted in one way for every model, and RoPE also with its own
remedies. Chat models answer MMLU, GSM8K and SpellingBee. Gives eval.json and eval/*.jsonl (each example) beside the
checkpoint, and in the folder eval the table (results.md, .json) and figures. What is finished is kept: the same command
goes on after an interruption. About 10 minutes a tag on an H100 (an estimate, not measured).

DroPE's paper (arXiv:2512.12167) has no intervals, no curve of retrieval against the moment of the drop, no RoPE control
of the same tokens; here they are. Left out: few-shot prompts, sampling, generation by base models (teacher forcing does).
"""
import ast, hashlib, json, math, operator, random, re, sys, time, warnings
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import (GPT, ROPE_THETA, FetchError, GPTConfig, atomic_write, base_dir, fetch, load_model, load_tokenizer,
                   newest_checkpoint, parse_config, rotary_tables, setup_env, token_bytes, tokenizer_hash)


@dataclass
class Config:
    quick: bool = False                 # fewer lengths, prompts, documents and questions
    table: bool = False                 # evaluate nothing, only make the table and the figures of the tags
    data_dir: str = ""                  # folder of the validation shard; not given: data/climbmix in the base folder
    tokenizer_dir: str = ""             # folder of the tokenizer; not given: tokenizer in the base folder
    train_len: int = 4096               # training length of an export (a checkpoint says it itself)


@dataclass
class Sizes:
    multiples: tuple = (0.25, 0.5, 1, 2, 4, 8)      # contexts, in training lengths
    depths: int = 10                    # places of the needle, from the start of the haystack to its end
    prompts: int = 16                   # for each length and depth
    few: int = 4                        # of these, for four needles at once and for RoPE's remedies
    documents: int = 96
    fit_documents: int = 24             # others, to fit the logit scale on
    spans: int = 32                     # repeated random spans for each distance
    questions: int = 100_000            # of MMLU and of GSM8K: all
    words: int = 256                    # of SpellingBee
    new_tokens: int = 512               # of an answer, at most


QUICK = Sizes((0.5, 1, 2, 4), depths=5, prompts=2, few=1, documents=8, fit_documents=4, spans=4, questions=16, words=16,
              new_tokens=256)
SCALES = (0.0, 0.1, 0.2, 0.4, 0.6)      # c of the logit scale
DISTANCES = (64, 256, 1024, 3072, 7168) # of repeated spans
REMEDIES = ("pi", "ntk", "yarn")


# ---- Statistics --------------------------------------------------------------------------------------------------

def wilson(k, n, z=1.96):
    """[k / n, low, high], a rate with its 95% interval (Wilson 1927): honest near 0 and 1, where the usual one is not."""
    center, width = (k + z * z / 2) / (n + z * z), z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return [k / n, max(0.0, center - width), min(1.0, center + width)]


def mcnemar(a, b):
    """Exact two-sided p of "a and b succeed equally often", outcomes on the same prompts. Only prompts on which they
    differ tell anything: under the hypothesis each is the toss of a coin."""
    only_a, only_b = sum(x and not y for x, y in zip(a, b)), sum(y and not x for x, y in zip(a, b))
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2 ** n)


def ratio(x, size):
    """[sum(x) / sum(size), low, high]: 95% interval by drawing examples anew, 2,000 times (bootstrap). Where x are
    differences of two measurements of one example, the interval is paired."""
    i = np.random.default_rng(0).integers(0, len(x), (2000, len(x)))
    return [x.sum() / size.sum(), *np.percentile(x[i].sum(1) / size[i].sum(1), [2.5, 97.5])]


# ---- The model under test ----------------------------------------------------------------------------------------

NAMES = (("model.embed_tokens", "transformer.wte"), ("model.layers", "transformer.h"), ("self_attn.q_proj", "attn.c_q"),
         ("self_attn.k_proj", "attn.c_k"), ("self_attn.v_proj", "attn.c_v"), ("self_attn.o_proj", "attn.c_proj"),
         ("mlp.gate_proj", "mlp.w_gate"), ("mlp.up_proj", "mlp.w_up"), ("mlp.down_proj", "mlp.c_proj"))


def load_export(folder, enc, train_len, dtype):
    """model.py's GPT from a Hugging Face folder, so that the same code tests it."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    config, probe = json.loads((folder / "config.json").read_text()), "In 1984, naïve  people\n\tpaid $3.50."
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tokenizer.encode(probe, add_special_tokens=False).ids != enc.encode_ordinary(probe):
        sys.exit(f"{folder} has another tokenizer than the one here: give the folder of its own by --tokenizer-dir")
    heads = config["num_attention_heads"]
    model = GPT(GPTConfig(train_len, config["vocab_size"], config["num_hidden_layers"], heads, heads, config["hidden_size"]),
                config["use_rope"], dtype)
    state = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        for theirs, ours in NAMES:
            name = name.replace(theirs, ours)
        padding = model.get_parameter(name).size(0) - weight.size(0)        # rows up to a multiple of 64
        state[name] = F.pad(weight.float(), (0, 0, 0, padding))
    model.load_state_dict(state)
    return model


def remedied_tables(T, head_dim, device, remedy, n_train):
    """model.rotary_tables for contexts of s = T / n_train training lengths, with one of RoPE's own remedies.

    pi (arXiv:2306.15595): all frequencies / s. ntk: a larger theta, by which the slowest frequency is divided by s and the
    fastest stays. yarn (arXiv:2309.00071): frequencies with less than 1 turn in n_train are divided by s, those with more
    than 32 stay, a ramp between. (YaRN also scales the logits: our beta. In the tables QK-norm would undo it.)"""
    s = T / n_train
    if s <= 1 or not remedy:
        return rotary_tables(T, head_dim, device)
    if remedy == "ntk":
        return rotary_tables(T, head_dim, device, theta=ROPE_THETA * s ** (head_dim / (head_dim - 2)))
    freqs = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    keep = ((n_train * freqs / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1) if remedy == "yarn" else 0.0
    angles = torch.outer(torch.arange(T, dtype=torch.float32, device=device), freqs * (keep + (1 - keep) / s))
    return angles.cos(), angles.sin()


def scaled_attend(q, k, v, c, n_train):
    """Attention with logits times beta = max(1, 1 + c ln(n / n_train)), n counting the query's position from 1.

    The more tokens, the less of a softmax can go to the one that matters; sharper logits make up for it. Scaling q does it
    without a T x T matrix."""
    n = torch.arange(1, q.size(-2) + 1, device=q.device)
    beta = (1 + c * (n / n_train).log()).clamp(min=1)       # (T,)
    return F.scaled_dot_product_attention(q * beta.to(q.dtype)[:, None], k, v, is_causal=True)


def set_arm(model, n_train, c=0.0, remedy=""):
    """Changes what the model computes beyond n_train, nothing up to it; c = 0 without remedy is the model as trained."""
    model.rotary_tables = partial(remedied_tables, remedy=remedy, n_train=n_train)
    for block in model.transformer.h:
        block.attn.attend = partial(scaled_attend, c=c, n_train=n_train)


@torch.no_grad()
def last_logits(model, ids, n):
    """model(ids)[:, -n:], (B, n, vocab_size), without making the logits of the other positions."""
    hook = model.transformer.h[-1].register_forward_hook(lambda block, args, x: x[:, -n:])
    try:
        return model(ids)
    finally:
        hook.remove()


def batches(model, rows):
    """Rows of one length as tensors of at most 32,768 tokens (8,192 on a CPU), but of one row at least."""
    device = model.lm_head.weight.device
    size = max(1, (8192 if device.type == "cpu" else 32768) // len(rows[0]))
    for i in range(0, len(rows), size):
        yield torch.tensor(rows[i:i + size], device=device)


# ---- The texts, the same for all tags ----------------------------------------------------------------------------

class Texts:
    """The validation shard as tokens: long documents to test on, others to fit on, and a haystack of the rest."""

    def __init__(self, path, enc, sizes):
        import pyarrow as pa, pyarrow.parquet as pq
        try:
            texts = [text or "" for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
        except (pa.ArrowException, OSError) as e:
            sys.exit(f"{path} cannot be read ({str(e).splitlines()[0]:.100}): delete it and run again, it is fetched anew")
        self.enc, self.bos, self.nbytes = enc, enc._special_tokens["<|bos|>"], token_bytes(enc)
        self.name = f"{tokenizer_hash(enc)} {path.name} {path.stat().st_size}"
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        chosen = order[:min(150, len(order) // 4)]
        long = sorted((enc.encode_ordinary(texts[i]) for i in chosen), key=len, reverse=True)
        self.fit = long[2::3][:sizes.fit_documents]         # every third of the longest is fitted on, and never tested on
        self.documents = [d for i, d in enumerate(long) if i % 3 != 2 or i // 3 >= len(self.fit)][:sizes.documents]
        rest = "\n\n".join(texts[i] for i in sorted(set(order) - set(chosen)))
        self.hay = enc.encode_ordinary(rest[:4_000_000])


CITIES = ("Amsterdam Athens Bangkok Barcelona Beijing Berlin Boston Brussels Cairo Chicago Copenhagen Dallas Delhi Denver "
          "Dublin Geneva Helsinki Houston Istanbul Jakarta Lima Lisbon London Madrid Manila Melbourne Miami Milan Moscow "
          "Munich Nairobi Oslo Paris Prague Rome Seattle Seoul Singapore Stockholm Sydney Tokyo Toronto Vienna Warsaw").split()


def make_prompt(texts, L, depth, i, pairs=1):
    """L + 1 tokens: <|bos|>, text with `pairs` needles in it (the first at `depth`, 0 to 1, the others anywhere), as many
    questions with their answers. Returns ids, the (start, end) of each answer, how far before the last input each needle
    begins, and the ids of the prompt without its needles; None where L is too short. Nothing but the arguments decides."""
    rng, encode = random.Random(f"needle {L} {depth} {i} {pairs}"), texts.enc.encode_ordinary
    ids, tail, spans, needles = [texts.bos], [], [], []
    for city, number in zip(rng.sample(CITIES, pairs), rng.sample(range(10_000), pairs)):
        question, answer = encode(f"\nThe secret number of {city} is "), encode(f"{number:04d}")
        needles.append(question + answer + encode(".\n"))
        spans.append((len(tail) + len(question), len(tail) + len(question) + len(answer)))
        tail += needles[-1]
    tail = tail[:spans[-1][1]]
    room = L - len(tail) - sum(map(len, needles))           # tokens of text
    if room < L // 4 or len(texts.hay) <= L:
        return None
    start = rng.randrange(len(texts.hay) - L)
    hay = texts.hay[start:start + L]
    places = [int(depth * room)] + [rng.randrange(room) for _ in needles[1:]]
    used, reach = 0, [0] * pairs
    for place, j in sorted(zip(places, range(pairs))):
        ids += hay[used:place]
        reach[j] = L - len(ids)
        ids += needles[j]
        used = place
    ids += hay[used:room] + tail
    blank = [texts.bos] + hay[:L - len(tail)] + tail
    return ids, [(L + 1 - len(tail) + a, L + 1 - len(tail) + b) for a, b in spans], reach, blank


# ---- Base models: bits per byte, needles, repeated spans -----------------------------------------------------------
# Each returns (summary {length: figures}, examples).

def bits_per_byte(model, texts, n_train, multiples, most):
    """The same last tokens (512, or an eighth of n_train) of the same documents under growing context: flat means that it
    is ignored, rising that it hurts. The longest documents come first, so those of a long context have all shorter ones
    too. "change" is against 1 x on the same documents."""
    n, nats, summary, examples = min(512, n_train // 8), {}, {}, []
    size = np.array([texts.nbytes[torch.tensor(d[-n:])].sum().item() for d in texts.documents]) * math.log(2)
    for m in sorted({1, *multiples}):
        L = int(m * n_train)
        rows = [[texts.bos] + d[-L:] for d in texts.documents[:most] if len(d) >= L]
        nats[m] = np.array([F.cross_entropy(last_logits(model, ids[:, :-1], n)[0], ids[0, -n:], reduction="sum").item()
                            for row in rows for ids in batches(model, [row])])
        examples += [{"context": L, "document": i, "nats": x, "bytes": size[i] / math.log(2)} for i, x in enumerate(nats[m])]
        if rows and m in multiples:
            change = ratio(nats[m] - nats[1][:len(rows)], size[:len(rows)]) if m > 1 else None
            summary[f"{m:g}"] = dict(n=len(rows), targets=n, bpb=ratio(nats[m], size[:len(rows)]), change=change)
    return summary, examples


@torch.no_grad()
def fit_scale(model, texts, n_train, multiples, remedy=""):
    """The c of SCALES with the lowest loss on all tokens beyond n_train of the documents kept for this, each at the longest
    context that it reaches."""
    longest = [max((int(m * n_train) for m in multiples if 1 < m <= len(d) / n_train), default=0) for d in texts.fit]
    rows = [[texts.bos] + d[-L:] for d, L in zip(texts.fit, longest) if L]
    losses, examples = {}, []
    for c in SCALES if rows else ():
        set_arm(model, n_train, c, remedy)
        for i, row in enumerate(rows):
            [ids] = batches(model, [row])
            nats = model(ids[:, :-1], ids[:, 1:], reduction="none")[0, n_train:].sum().item()
            examples.append({"c": c, "document": i, "context": len(row) - 1, "nats": nats})
        losses[c] = sum(e["nats"] for e in examples[-len(rows):]) / sum(len(row) - 1 - n_train for row in rows)
    return {"c": min(losses, key=losses.get, default=0.0), "n": len(rows), "losses": losses}, examples


def answers(model, texts, prompts):
    """For each (ids, spans, ...) of one length, for each of its answers: (is every token the argmax, nats, right digits).
    Where every token is the argmax after the right tokens before it, greedy decoding would have written just this answer."""
    for batch in batches(model, [p[0] for p in prompts]):
        rows, prompts = prompts[:len(batch)], prompts[len(batch):]
        first = min(spans[0][0] for _, spans, *_ in rows)
        logits = last_logits(model, batch[:, :-1], batch.size(1) - first)           # (B, tail, vocab_size)
        nats = F.cross_entropy(logits.transpose(1, 2), batch[:, first:], reduction="none").tolist()
        for (ids, spans, *_), x, best in zip(rows, nats, logits.argmax(-1).tolist()):
            result = []
            for a, b in spans:
                guess = best[a - first:b - first]
                text = [(texts.enc.decode([t]), texts.enc.decode([g])) for t, g in zip(ids[a:b], guess)]
                digits = sum(s == u for t, g in text for s, u in zip(t, g))
                result.append((ids[a:b] == guess, sum(x[a - first:b - first]), digits))
            yield result


def needle(model, texts, n_train, multiples, sizes, prompts, pairs=1):
    """Needles in a haystack by teacher forcing, `prompts` for each length and depth. Of four pairs (as in RULER,
    arXiv:2404.06654) the first answer makes "multi-key", all four together "multi-query"."""
    summary, examples = {}, []
    cells = [((d + 0.5) / sizes.depths, i) for d in range(sizes.depths) for i in range(prompts)]
    for m in multiples:
        made = [make_prompt(texts, int(m * n_train), depth, i, pairs) for depth, i in cells]
        if None in made:
            continue
        new = []
        for (depth, i), (_, _, reach, _), got in zip(cells, made, answers(model, texts, made)):
            exact, nats, digits = zip(*got)
            new.append(dict(length=m, depth=depth, i=i, reach=reach, exact=exact, nats=nats, digits=digits))
        some = slice(None, None, max(1, len(new) // 20))    # what would these answers cost without their needles?
        for example, [(_, nats, _), *_] in zip(new[some], answers(model, texts, [(p[3], p[1]) for p in made[some]])):
            example["nats_without"] = nats
        gain = np.array([e["nats_without"] - e["nats"][0] for e in new[some]])
        n = len(new)
        summary[f"{m:g}"] = dict(
            n=n, rate=wilson(sum(e["exact"][0] for e in new), n), all=wilson(sum(all(e["exact"]) for e in new), n),
            nats=sum(e["nats"][0] for e in new) / n / 4, gain=ratio(gain, 0 * gain + 4),        # per digit
            digits=sum(e["digits"][0] for e in new) / n / 4,
            # what a perfect model could find that sees the last n_train tokens only
            ceiling=np.mean([e["reach"][0] <= n_train for e in new]),
            ceiling_all=np.mean([max(e["reach"]) <= n_train for e in new]))
        examples += new
    return summary, examples


def induction(model, texts, distances, spans):
    """32 random tokens and the same again at a distance, with text before and between: how many of them are foreseen?"""
    ordinary, summary, examples, size = texts.nbytes.nonzero().flatten().tolist(), {}, [], 32
    for distance in (d for d in distances if d < len(texts.hay)):
        rows = []
        for i in range(spans):
            rng = random.Random(f"induction {distance} {i}")
            span, start = rng.choices(ordinary, k=size), rng.randrange(len(texts.hay) - distance)
            hay = texts.hay[start:start + distance]
            rows.append([texts.bos] + hay[:size] + span + hay[size:] + span)
        new = []
        for batch in batches(model, rows):
            logits, targets = last_logits(model, batch[:, :-1], size - 1), batch[:, 1 - size:]  # nobody knows the first
            nats = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
            right = (logits.argmax(-1) == targets).float().mean(1)
            new += [{"distance": distance, "right": r, "nats": x} for r, x in zip(right.tolist(), nats.tolist())]
        right = np.array([e["right"] for e in new])
        summary[str(distance)] = dict(n=len(new), rate=ratio(right, 0 * right + 1), nats=np.mean([e["nats"] for e in new]))
        examples += new
    return summary, examples


# ---- Chat models: answers through the export -------------------------------------------------------------------------

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
             ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculator(call):
    """The python tool: the result of arithmetic or of 'word'.count('x') as text, None for all else. A model wrote the call,
    so it is parsed and worked out here, never run. Its length, its numbers and their powers are bounded."""
    def number(node):
        if isinstance(node, ast.BinOp):
            a, b = number(node.left), number(node.right)
            if isinstance(node.op, ast.Pow) and (abs(a) > 1e6 or abs(b) > 64):
                raise ValueError("too large a power")
            value = OPERATORS[type(node.op)](a, b)
        elif isinstance(node, ast.UnaryOp):
            value = OPERATORS[type(node.op)](number(node.operand))
        else:
            value = node.value if isinstance(node, ast.Constant) else None
        if type(value) not in (int, float) or not abs(value) < 1e15:
            raise ValueError("not a number, or too large a one")
        return value
    try:
        if len(call) > 200:
            return None
        with warnings.catch_warnings():                     # Python has opinions on "1is 1"
            warnings.simplefilter("ignore")
            node = ast.parse(call.strip(), mode="eval").body
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(word)), attr="count"),
                          args=[ast.Constant(value=str(part))], keywords=[]):
                return str(word.count(part))
        value = number(node)
        return str(int(value)) if value == int(value) else str(round(value, 10))
    except (SyntaxError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return None


class PythonTool:
    """A logits processor: after a finished call its row goes on with <|output_start|>, the result, <|output_end|>."""

    def __init__(self, tokenizer, rows):
        self.tokenizer, self.waiting = tokenizer, [[] for _ in range(rows)]
        names = ["<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]
        self.start, self.end, self.output, self.output_end = tokenizer.convert_tokens_to_ids(names)

    def __call__(self, input_ids, scores):
        for row, last in enumerate(input_ids[:, -1].tolist()):
            if last == self.end:
                ids = input_ids[row, :-1].tolist()
                begin = max((i for i, t in enumerate(ids) if t == self.start), default=len(ids))
                result = calculator(self.tokenizer.decode(ids[begin + 1:]))
                if result is not None:
                    result = self.tokenizer.encode(result, add_special_tokens=False)
                    self.waiting[row] = [self.output, *result, self.output_end]
            if self.waiting[row]:
                scores[row] = -torch.inf
                scores[row, self.waiting[row].pop(0)] = 0.0
        return scores


class Chat:
    """An exported chat model and its tokenizer. A conversation is a question and its right answer."""

    def __init__(self, folder, env):
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
        disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=env.dtype)
        self.model.to(env.device).eval()
        self.stop = self.tokenizer.convert_tokens_to_ids("<|assistant_end|>")
        self.rows = 256 if env.device.type == "cuda" else 16

    def batches(self, conversations, size):
        """Yields (conversations, {input_ids, attention_mask} of their questions), of like length, padded on the left."""
        template = partial(self.tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=True, return_dict=True)
        rows = [template(c[:1])["input_ids"] for c in conversations]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for some in (order[i:i + size] for i in range(0, len(order), size)):
            T = max(len(rows[i]) for i in some)
            ids = torch.tensor([[self.stop] * (T - len(rows[i])) + rows[i] for i in some], device=self.model.device)
            mask = torch.tensor([[0] * (T - len(rows[i])) + [1] * len(rows[i]) for i in some], device=self.model.device)
            yield [conversations[i] for i in some], dict(input_ids=ids, attention_mask=mask)

    @torch.no_grad()
    def choose(self, conversations):
        """Multiple choice by likelihood: of the letters that the question offers, the likeliest as first token."""
        examples = []
        for some, inputs in self.batches(conversations, min(self.rows, 64)):
            logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]   # (B, vocab_size)
            for (question, answer), row in zip(some, logits):
                letters = re.findall(r"=([A-H])$", question["content"], re.M)
                best = row[[self.tokenizer.encode(x, add_special_tokens=False)[0] for x in letters]].argmax().item()
                examples.append({"question": question["content"], "expected": answer["content"], "answer": letters[best],
                                 "right": letters[best] == answer["content"]})
        return {"n": len(examples), "rate": wilson(sum(e["right"] for e in examples), len(examples))}, examples

    @torch.no_grad()
    def answer(self, conversations, new_tokens):
        """Greedy answers with the tool at hand; right is the right number after ####."""
        from transformers import LogitsProcessorList
        examples = []
        for some, inputs in self.batches(conversations, self.rows):
            tool = LogitsProcessorList([PythonTool(self.tokenizer, len(some))])
            out = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, logits_processor=tool,
                                      eos_token_id=self.stop, pad_token_id=self.stop)
            for (question, answer), ids in zip(some, out[:, inputs["input_ids"].size(1):].tolist()):
                stopped, expected = self.stop in ids, final_number(answer["content"])
                text = self.tokenizer.decode(ids[:ids.index(self.stop)] if stopped else ids)
                examples.append({"question": question["content"], "expected": expected, "answer": text,
                                 "right": final_number(text) == expected, "stopped": stopped})
        n = len(examples)
        return {"n": n, "rate": wilson(sum(e["right"] for e in examples), n),
                "stops": wilson(sum(e["stopped"] for e in examples), n)}, examples


def final_number(content):
    """The number after the last #### of an answer (text, or a list of parts), without its commas; or None."""
    numbers = re.findall(r"#### *(-?[\d.,]*\d)", content if isinstance(content, str) else content[-1]["text"])
    return numbers[-1].replace(",", "") if numbers else None


# ---- One tag after the other --------------------------------------------------------------------------------------

def eval_json(quick):
    return "eval_quick.json" if quick else "eval.json"


def read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        sys.exit(f"{path} is damaged ({e}): delete it and run eval.py again")


def read_examples(folder, section):
    return [json.loads(line) for line in (folder / f"{section.replace(' ', '_')}.jsonl").read_text().splitlines()]


class Results:
    """eval.json beside a checkpoint: its finished sections. `key` says of what; for another key all is done again."""

    def __init__(self, folder, key, quick):
        self.path = folder / eval_json(quick)
        self.examples, self.data = folder / self.path.stem, read_json(self.path)
        if self.data.get("key") != key:
            if self.data:
                print(f"  {self.path} is of another checkpoint, other texts or another form of this evaluation: done again")
            self.data = {"key": key, "sections": {}}

    def section(self, name, make):
        """The section's summary; make() -> (summary, examples) is called only where it is not there yet."""
        if name not in self.data["sections"]:
            start = time.time()
            summary, examples = make()
            lines = "".join(json.dumps(e, default=float) + "\n" for e in examples)
            atomic_write(self.examples / f"{name.replace(' ', '_')}.jsonl", lines)
            self.data["sections"][name] = json.loads(json.dumps(summary, default=float))    # as it will be read
            atomic_write(self.path, json.dumps(self.data, indent=1))
            print(f"  {name}: {time.time() - start:.0f} s", flush=True)
        return self.data["sections"][name]


def places(tag):
    """{"base": (what is tested, where its eval.json goes), "chat": ...} of a tag or of a Hugging Face folder. The base model
    of a _long tag is that of the tag without it."""
    if (Path(tag) / "config.json").exists():
        return {"chat" if (Path(tag) / "chat_template.jinja").exists() else "base": (Path(tag), Path(tag))}
    base = base_dir() / "base_checkpoints" / tag.removesuffix("_long")
    return {"base": (base, base), "chat": (base_dir() / "hf_sft" / tag, base_dir() / "chatsft_checkpoints" / tag)}


def evaluate_base(folder, out, cfg, sizes, env):
    enc = load_tokenizer(cfg.tokenizer_dir or base_dir() / "tokenizer")
    if (folder / "config.json").exists():
        model, n_train = load_export(folder, enc, cfg.train_len, env.dtype), cfg.train_len
        step, weights = None, "model.safetensors"
    else:
        step = newest_checkpoint(folder)
        model, meta = load_model(folder, step, dtype=env.dtype)
        n_train, weights = meta["max_seq_len"], f"model_{step:06d}.pt"
    if enc.n_vocab != model.config.vocab_size:
        sys.exit(f"{folder} has {model.config.vocab_size} token ids, the tokenizer {enc.n_vocab}: "
                 "give the folder of the right one by --tokenizer-dir")
    model.to(env.device, env.dtype).eval()                  # cast once, not in each forward pass
    shard = Path(cfg.data_dir or base_dir() / "data" / "climbmix") / "shard_06542.parquet"
    texts = Texts(fetch("karpathy/climbmix-400b-shuffle", shard.name, shard, patience=60), enc, sizes)
    key = dict(step=step, sha256=hashlib.sha256((folder / weights).read_bytes()).hexdigest(), use_rope=model.use_rope,
               n_train=n_train, texts=texts.name, sizes=str(sizes))
    results = Results(out, key, cfg.quick)
    print(f"  step {step}, RoPE {'on' if model.use_rope else 'off'}, trained at {n_train:,}; "
          f"{len(texts.documents)} documents to test on, {len(texts.fit)} to fit on", flush=True)

    def section(kind, arm, beta, test, lengths):
        """A test of a variant of the model. Up to 1 x each is the model as trained, and so is beta with c = 0."""
        def make():
            if beta and c == 0:
                return results.data["sections"][f"{kind} {arm}"], read_examples(results.examples, f"{kind} {arm}")
            set_arm(model, n_train, c if beta else 0.0, remedy)
            if arm + beta == "plain":
                return test(lengths)
            summary, examples = test([m for m in lengths if m > 1])
            plain = results.data["sections"][f"{kind} plain"]
            return {**{m: plain[m] for m in plain if float(m) <= 1}, **summary}, examples
        results.section(f"{kind} {arm}{beta}", make)

    lengths = sizes.multiples
    distances = [d for d in DISTANCES if d + 65 < max(lengths) * n_train]
    for remedy in ("", *REMEDIES) if model.use_rope else ("",):
        arm = remedy or "plain"
        documents, prompts = (sizes.fit_documents, sizes.few) if remedy else (sizes.documents, sizes.prompts)
        c = results.section(f"scale {arm}", lambda: fit_scale(model, texts, n_train, lengths, remedy))["c"]
        for beta in ("", " beta"):
            section("bpb", arm, beta, lambda some: bits_per_byte(model, texts, n_train, some, documents), lengths)
            section("needle", arm, beta, lambda some: needle(model, texts, n_train, some, sizes, prompts), lengths)
            if not remedy:
                section("multi", arm, beta, lambda some: needle(model, texts, n_train, some, sizes, sizes.few, 4), lengths)
                section("repeat", arm, beta, lambda some: induction(model, texts, some, sizes.spans), distances)


def evaluate_chat(folder, out, cfg, sizes, env):
    if not (out / "questions.jsonl").exists():
        print(f"  no {out / 'questions.jsonl'} to ask from, which sft.py leaves beside its checkpoint: skipped", file=sys.stderr)
        return
    questions = {}
    for line in (out / "questions.jsonl").read_text().splitlines():
        record = json.loads(line)
        questions.setdefault(record["source"], []).append(record["messages"])
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    results, chat = Results(out, dict(sha256=sha256, sizes=str(sizes)), cfg.quick), None
    for name, source, most in (("mmlu", "mmlu", sizes.questions), ("gsm8k", "gsm8k", sizes.questions), ("bee", "spellingbee", sizes.words)):
        n = len(questions.get(source, []))
        if n and name not in results.data["sections"]:
            some = [questions[source][i] for i in sorted(random.Random(42).sample(range(n), min(n, most)))]
            chat = chat or Chat(folder, env)
            results.section(name, lambda: chat.choose(some) if name == "mmlu" else chat.answer(some, sizes.new_tokens))


# ---- The table ---------------------------------------------------------------------------------------------------

def gather(tags, quick):
    """{tag: {sections, base: the key of the base model's results, examples: their folder}}; empty where nothing was run."""
    found = {tag: {"sections": {}, "base": {}} for tag in tags}
    for tag in tags:
        for kind, (_, out) in places(tag).items():
            data = read_json(out / eval_json(quick))
            found[tag]["sections"].update(data.get("sections", {}))
            if kind == "base" and data:
                found[tag].update(base=data["key"], examples=out / Path(eval_json(quick)).stem)
    return found


def distinct(found):
    """Without tags of which there is no base model or whose base model is another tag's too."""
    return {tag: r for tag, r in found.items() if r["base"] and (not tag.endswith("_long") or tag[:-5] not in found)}


def cell(result, section, m):
    return result["sections"].get(section, {}).get(f"{m:g}", {})


def by_likelihood(result):
    """Where fewer than 20% of the needles are found at 1 x, rates say little: the answer's NLL is the figure."""
    return cell(result, "needle plain", 1).get("rate", [1])[0] < 0.2


def compare(a, section_a, b, section_b, m):
    """McNemar between two results on the needles of m x that both were given: p, both rates, n; or None."""
    if any(a["base"][k] != b["base"][k] for k in ("texts", "n_train")) or \
            section_a not in a["sections"] or section_b not in b["sections"]:
        return None
    a, b = ({(e["depth"], e["i"]): e["exact"][0] for e in read_examples(r["examples"], section) if e["length"] == m}
            for r, section in ((a, section_a), (b, section_b)))
    x, y = ([r[k] for k in a if k in b] for r in (a, b))
    return dict(p=mcnemar(x, y), a=np.mean(x), b=np.mean(y), n=len(x)) if x else None


def verdicts(found, multiples):
    """A line for each model without RoPE and length beyond 1 x: a win is called only if it beats both what cropping to 1 x
    could give and NTK with beta on the model with RoPE of the same size and budget."""
    def versus(c):
        return f"{c['a']:.2f} against {c['b']:.2f} (n = {c['n']}, McNemar p = {c['p']:.2g})" if c else "not run"
    for tag, mine in distinct(found).items():
        twin = found.get(re.sub(r"_drope_\d+", "", tag), {"base": {}})
        if mine["base"]["use_rope"]:
            continue
        if by_likelihood(mine):
            at_1x = cell(mine, "needle plain", 1)["rate"][0]
            yield f"{tag}: not judged, it finds {at_1x:.0%} of the needles at 1x; the NLL is the figure."
        elif not twin["base"] or twin is mine:
            yield f"{tag}: not judged, the model with RoPE to compare it with was not evaluated."
        else:
            for m in (m for m in multiples if m > 1 and cell(mine, "needle plain beta", m)):
                got, ntk = cell(mine, "needle plain beta", m), compare(mine, "needle plain beta", twin, "needle ntk beta", m)
                as_trained = compare(mine, "needle plain", twin, "needle plain", m)
                above, better = got["rate"][1] > got["ceiling"], ntk and ntk["a"] > ntk["b"] and ntk["p"] < 0.05
                yield (f"{tag} at {m:g}x: **{'a win' if above and better else 'no win'}**. "
                       f"With beta {interval(got['rate'])}, {'above' if above else 'not above'} the cropping ceiling of "
                       f"{got['ceiling']:.2f}. RoPE with NTK and beta, on the same prompts: {versus(ntk)}. "
                       f"Both as trained: {versus(as_trained)}.")


def interval(values, form="{:.2f}"):
    return "{} [{}, {}]".format(*map(form.format, values)) if values else "-"


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def make_table(found, multiples):
    """Markdown: a row for each tag, then all lengths and arms, then the verdicts."""
    far = max(multiples)
    def needles(result, section, m, of="rate"):
        got = cell(result, section, m)
        if got and by_likelihood(result):
            return f"NLL {got['nats']:.2f}, gain {interval(got['gain'])}"
        return interval(got.get(of))
    def bits(result, section, m):
        got = cell(result, section, m)
        change = f", {interval(got['change'], '{:+.3f}')}" if got and m > 1 else ""
        return f"{got['bpb'][0]:.3f}{change}, n={got['n']}" if got else "-"
    def row(tag, result):
        s, three = result["sections"], (("plain", 1), ("plain", far), ("plain beta", far))
        repeat = next((x["rate"] for x in reversed(s.get("repeat plain beta", {}).values())), None)
        return [tag, {True: "on", False: "off"}.get(result["base"].get("use_rope"), "-"),
                *(interval(cell(result, f"bpb {arm}", m).get("bpb"), "{:.3f}") for arm, m in three),
                *(needles(result, f"needle {arm}", m) for arm, m in three),
                *(needles(result, "multi plain beta", far, of) for of in ("rate", "all")), interval(repeat),
                *(interval(s.get(name, {}).get("rate")) for name in ("mmlu", "gsm8k", "bee")),
                interval(s.get("gsm8k", s.get("bee", {})).get("stops"))]
    head = ["tag", "RoPE", "bits per byte 1x", f"{far:g}x", f"{far:g}x beta", "needle 1x", f"{far:g}x", f"{far:g}x beta",
            f"multi-key {far:g}x beta", f"multi-query {far:g}x beta", "repeat beta", "MMLU", "GSM8K", "SpellingBee", "stops"]
    text = "# Results\n\n" + markdown(head, [row(tag, result) for tag, result in found.items()]) + f"""
1x is the training length; [95% intervals]: Wilson for rates, else bootstrap; -: not run. Beta: beyond 1x attention logits
are multiplied by 1 + c ln(n / n_train), c from {SCALES} fitted on other documents by the same sweep for
every row. Needle: 4-digit numbers found (guessing .0001). Where fewer than 20% are found at 1x, NLL: nats per digit of the
(first) answer (guessing 2.30), and its gain from the needle's being there. Repeat: tokens of a random span foreseen at the
largest distance. MMLU: guessing .25. Stops: answers to GSM8K (else to SpellingBee) that end by themselves.
"""
    arms = [(tag, r, arm, beta) for tag, r in distinct(found).items() for arm in ("plain", *REMEDIES)
            if f"scale {arm}" in r["sections"] for beta in ("", " beta")]
    for title, kind, form in (("Needles found, by context", "needle", needles),
                              ("Bits per byte, and change from 1x on the same documents, by context", "bpb", bits)):
        rows = [[tag, arm + beta, r["sections"][f"scale {arm}"]["c"] if beta else "",
                 *(form(r, f"{kind} {arm}{beta}", m) for m in multiples)] for tag, r, arm, beta in arms]
        if kind == "needle" and arms:
            ceilings = [cell(arms[0][1], "needle plain", m).get("ceiling") for m in multiples]
            rows.append(["cropping to 1x, if perfect", "", "", *("-" if x is None else f"{x:.2f}" for x in ceilings)])
        text += f"\n## {title}\n\n" + markdown(["tag", "arm", "c", *(f"{m:g}x" for m in multiples)], rows)
    calls = "".join(f"- {line}\n" for line in verdicts(found, multiples))
    return text + (f"\n## Is it a win?\n\n{calls}" if calls else "")


# ---- The figures -------------------------------------------------------------------------------------------------

def make_figures(found, multiples, folder, suffix):
    """contexts.png: what happens beyond the training length. drop.png: retrieval against the moment of the drop."""
    found = distinct(found)
    if not found:
        return
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figures: matplotlib is not installed (pip install matplotlib)")
    arms = (("plain", "-"), ("plain beta", "--"))
    def save(fig, name):
        fig.tight_layout()
        atomic_write(folder / f"{name}{suffix}.png", lambda f: fig.savefig(f, dpi=130, format="png"))
        plt.close(fig)
        print(f"{folder / name}{suffix}.png written")

    fig, axes = plt.subplots(2, 2, figsize=(13, 9))
    rate, nats = (lambda x: x["rate"]), (lambda x: [x["nats"]] * 3)         # value, low, high
    bits = lambda x: [x["bpb"][0] + d - x["change"][0] for d in x["change"]] if x["change"] else [x["bpb"][0]] * 3
    panels = (("needle", rate, "Needles found [95% Wilson]"), ("needle", nats, "Nats per digit of the needle"),
              ("bpb", bits, "Bits per byte of the same last tokens [change from 1x: 95% paired bootstrap]"),
              ("repeat", rate, "Random span repeated: share of its tokens foreseen [95% bootstrap]"))
    for ax, (kind, value, title) in zip(axes.flat, panels):
        for i, (tag, result) in enumerate(found.items()):
            color = plt.get_cmap("tab10" if len(found) <= 10 else "tab20")(i)
            for arm, style in arms:
                points = result["sections"].get(f"{kind} {arm}", {})
                x, y = [float(m) for m in points], np.array([value(p) for p in points.values()]).reshape(-1, 3)
                ax.plot(x, y[:, 0], style, color=color, marker="o", ms=3, label=tag + arm.removeprefix("plain"))
                ax.fill_between(x, y[:, 1], y[:, 2], color=color, alpha=0.1, lw=0)
        ticks = DISTANCES if kind == "repeat" else multiples
        ax.set(title=title, xlabel="distance in tokens" if kind == "repeat" else "context, in training lengths")
        ax.set_ylim((-0.03, 1.03) if value is rate else (None, None))
        ax.set_xscale("log", base=2)
        ax.set_xlim(0.9 * ticks[0], 1.1 * ticks[-1])
        ax.set_xticks(ticks, [f"{m:g}" for m in ticks])
    points = next(iter(found.values()))["sections"].get("needle plain", {})
    for ax, line, label, floor in ((axes[0, 0], lambda x: x["ceiling"], "cropping to 1x, if perfect", 1e-4),
                                   (axes[0, 1], lambda x: x["nats"] + x["gain"][0], "first tag, no needle", math.log(10))):
        ax.plot([float(m) for m in points], [line(x) for x in points.values()], "k:", label=label)
        ax.axhline(floor, color="grey", lw=0.8, label="guessing")
        ax.legend(fontsize=7)
    save(fig, "contexts")

    families, far = {}, max(multiples)                      # {tag without drope: [(percent of the steps with RoPE, result)]}
    for tag, result in found.items():
        drop = re.search(r"_drope_(\d+)", tag)
        families.setdefault(re.sub(r"_drope_\d+", "", tag), []).append((int(drop[1]) if drop else 100, result))
    fig, ax = plt.subplots(figsize=(7, 4.5))
    for i, (name, some) in enumerate(families.items()):
        for arm, style in arms:
            points = sorted((percent, x["rate"]) for percent, r in some if (x := cell(r, f"needle {arm}", far)))
            x, y = [percent for percent, _ in points], np.array([found for _, found in points]).reshape(-1, 3)
            ax.errorbar(x, y[:, 0], np.abs(y[:, 1:].T - y[:, 0]), fmt=style, marker="o", color=f"C{i}", capsize=3,
                        label=name + arm.removeprefix("plain"))
    ax.set(xlabel="percent of the steps with RoPE (0: never, 100: always)", ylim=(-0.03, 1.03),
           title=f"Needles found at {far:g} x the training length [95% Wilson]")
    ax.legend(fontsize=7)
    save(fig, "drop")


# ---- The command -------------------------------------------------------------------------------------------------

def command_line(args):
    """Tags, and the Config from the options, in any order."""
    with_value = {"--" + f.name.replace("_", "-") for f in fields(Config) if f.type is not bool}
    is_tag = [not a.startswith("-") and before not in with_value for before, a in zip(["", *args], args)]
    cfg = parse_config(Config, __doc__, [a for a, tag in zip(args, is_tag) if not tag])
    if not any(is_tag):
        sys.exit("eval.py: which tags? For example `python eval.py d18_9tpp d18_9tpp_drope_50`; --help says more")
    return list(dict.fromkeys(a for a, tag in zip(args, is_tag) if tag)), cfg


def main():
    tags, cfg = command_line(sys.argv[1:])
    sizes, env, evaluated = QUICK if cfg.quick else Sizes(), setup_env(), cfg.table
    for tag in tags if not cfg.table else ():
        for kind, (folder, out) in places(tag).items():
            if not any(folder.glob("meta_*.json")) and not (folder / "config.json").exists():
                command = f"export_hf.py --tag {tag}" if kind == "chat" else f"pretrain.py --tag {folder.name}"
                print(f"{tag}: no {kind} model in {folder} (`python {command}` makes it): skipped", file=sys.stderr)
                continue
            print(f"{tag}: {kind} model in {folder}, on {env.device}", flush=True)
            try:
                (evaluate_chat if kind == "chat" else evaluate_base)(folder, out, cfg, sizes, env)
                evaluated = True
            except FetchError as e:
                print(f"  skipped, its texts cannot be had ({e})", file=sys.stderr)
    if not evaluated:
        sys.exit(f"nothing evaluated: no model of {', '.join(tags)} in {base_dir()}")
    found, folder, suffix = gather(tags, cfg.quick), base_dir() / "eval", "_quick" if cfg.quick else ""
    text = make_table(found, sizes.multiples)
    atomic_write(folder / f"results{suffix}.md", text)
    data = {tag: {"base": r["base"], **r["sections"]} for tag, r in found.items()}
    atomic_write(folder / f"results{suffix}.json", json.dumps(data, indent=1))
    print(f"\n{text}\n{folder}/results{suffix}.md and .json written")
    make_figures(found, sizes.multiples, folder, suffix)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on after the last finished section")
