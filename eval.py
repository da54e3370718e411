"""Evaluation of base models in long contexts: does dropping RoPE help beyond the training length?

    python eval.py d18_9tpp d18_9tpp_drope_50       # --quick: less of everything, for CPUs
    python eval.py --table d18_9tpp d20_9tpp        # only table and figures of what is evaluated

Tests base_checkpoints/TAG in contexts of 1/2 to 8 training lengths, with needles, which are numbers
hidden in a text (four kinds, as in RULER, arXiv:2404.06654), and by the bits per byte of the same
tokens. Each model as trained; cropped to its training length, as a user of a model with RoPE would
do; with sharper attention (model.logn_scale, fitted to other documents); and if it has RoPE, with
two ways to scale that which need no training.

Writes eval.json beside the checkpoint, a table and figures into the folder eval. Interrupted, it
resumes with the same command. About 20 minutes a tag on an H100 (estimated). Left out: chat models
(see chat.py), and short tasks, for which lm-evaluation-harness takes the exports.
"""
import math, random, re, sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import (ROPE_THETA, Results, atomic_write, base_dir, encode, fetch, file_hash, guard,
                   load_model, one_line, parse_config, read_lines, results_of, rotary_tables,
                   setup_env, text_column, token_bytes, tokenizer_hash, tokenizer_of, weights_hash,
                   wilson)


@dataclass
class Config:
    tags: tuple = ()  # the base models, such as d18_9tpp_drope_50
    quick: bool = False  # fewer contexts, prompts and documents
    table: bool = False  # evaluate nothing, only make the table and the figures
    check: bool = False  # only check the options


@dataclass
class Sizes:
    contexts: tuple = (0.5, 1, 2, 4, 8)     # in training lengths
    prompts: int = 100                      # of each kind, for each context
    documents: int = 96                     # and a quarter as many to fit c on


QUICK = Sizes((0.5, 1, 2, 4), prompts=10, documents=12)
SCALES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)        # values of c that are tried


# ---- Statistics ----------------------------------------------------------------------------------

def mcnemar(a, b):
    """Exact two-sided p of "a and b succeed equally often", outcomes on the same prompts. Only
    prompts on which they differ tell anything: under the hypothesis each is the toss of a coin."""
    only_a = sum(x > y for x, y in zip(a, b))
    only_b = sum(y > x for x, y in zip(a, b))
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2 ** n)


def bootstrap(x, size):
    """[sum(x) / sum(size), low, high]: 95% interval by resampling the examples 2,000 times; without
    one if they are fewer than 10. Where x are differences of two measurements of one example, the
    interval is paired."""
    x, size = np.array(x), np.array(size)
    if len(x) < 10:
        return [x.sum() / size.sum()]
    drawn = np.random.default_rng(0).integers(0, len(x), (2000, len(x)))
    ratios = x[drawn].sum(1) / size[drawn].sum(1)
    return [x.sum() / size.sum(), *np.percentile(ratios, [2.5, 97.5])]


# ---- The arms ------------------------------------------------------------------------------------
# c is model.logn_scale: the attention logits of the query at position n (from 1) are multiplied by
# max(1, 1 + c ln(n / n_train)), where n_train is the training length. Up to n_train all arms are
# the same.

ARMS = {            # name: (how RoPE is scaled; where c is fitted, the arm without c, else None)
    "as trained": ("", None), "cropped": ("", None), "c fitted": ("", "as trained"),
    "NTK": ("ntk", None), "NTK, c fitted": ("ntk", "NTK"),
    "NTK by parts": ("by parts", None), "NTK by parts, c fitted": ("by parts", "NTK by parts")}


def scaled_tables(T, head_dim, device, n_train, scaling):
    """The model's rotary_tables for s = T / n_train > 1 training lengths. ntk ("NTK-aware"): a
    larger theta; the slowest rotation takes s times as many tokens, the fastest stays. by parts:
    frequencies with less than 1 rotation in n_train tokens are divided by s, those with more than
    32 stay, between them is a ramp. YaRN (arXiv:2309.00071) is by parts and a temperature, for
    which c stands here."""
    s = T / n_train
    if s <= 1:
        return rotary_tables(T, head_dim, device)
    if scaling == "ntk":
        return rotary_tables(T, head_dim, device, ROPE_THETA * s ** (head_dim / (head_dim - 2)))
    freqs = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    keep = ((n_train * freqs / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
    angles = torch.outer(torch.arange(T, dtype=torch.float32), freqs * (keep + (1 - keep) / s))
    return angles.cos().to(device), angles.sin().to(device)


def set_arm(model, scaling, c):
    """model.forward reads both attributes."""
    model.logn_scale, model.rotary_tables = c, rotary_tables
    if scaling:
        n_train = model.config.sequence_len
        model.rotary_tables = partial(scaled_tables, n_train=n_train, scaling=scaling)


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
    """The loss of each token but the first, in nats: list of n + 1 ids -> float64 (n,)."""
    row = torch.tensor([ids], device=model.lm_head.weight.device)
    return model(row[:, :-1], row[:, 1:], reduction="none")[0].cpu().double().numpy()


def text_bits(model, texts, contexts, cropped):
    """{context: bits per byte of the last 512 tokens (n_train / 8, if that is less) of documents
    as long as the context}, with the bits and bytes of each document. The longest come first in
    every context, so that two arms are compared on the same ones."""
    n_train, found = model.config.sequence_len, {}
    tail = min(512, n_train // 8)
    for m in contexts:
        L = int(m * n_train)
        documents = [d for d in texts.documents if len(d) >= L]
        if documents:
            seen = min(L, n_train) if cropped else L
            rows = [[texts.bos] + d[-seen:] for d in documents]
            bits = [token_nats(model, row)[-tail:].sum() / math.log(2) for row in rows]
            size = [texts.nbytes[d[-tail:]].sum() for d in documents]
            found[f"{m:g}"] = dict(n=len(bits), bpb=bootstrap(bits, size), bits=bits, bytes=size)
    return found


def fit_scale(model, texts, contexts, scaling):
    """One c for all contexts: that of SCALES with the lowest loss on all tokens beyond n_train of
    the documents that are kept for this, each in the longest of the contexts that it fills."""
    n_train, rows, losses = model.config.sequence_len, [], {}
    for document in texts.fit:
        filled = [int(m * n_train) for m in contexts if m <= len(document) / n_train]
        if filled:
            rows.append([texts.bos] + document[-max(filled):])
    if not rows:
        return dict(c=0.0, n=0, losses={})
    for c in SCALES:
        set_arm(model, scaling, c)
        losses[c] = np.concatenate([token_nats(model, row)[n_train:] for row in rows]).mean()
    return dict(c=min(losses, key=losses.get), n=len(rows), losses=losses)


# ---- Needles -------------------------------------------------------------------------------------

KINDS = {                   # keys in the text, values of each key, keys that are asked for
    "single": (1, 1, 1),        # no need to read the key: there is only one number
    "multi-key": (4, 1, 1),     # the key decides between four; guessing among them finds 1/4
    "multi-value": (1, 4, 1),   # four numbers of one key, to be told in the order of the text
    "multi-query": (4, 1, 4),   # four keys, asked for in another order than that of the text
}
CITIES = "Berlin Boston Cairo Chicago Delhi Lima London Madrid Oslo Paris Rome Tokyo".split()
DIGITS = 4                      # of a number


class Prompt(NamedTuple):
    ids: list           # L + 1 tokens
    n_tail: int         # so many of them are the questions and answers
    answers: list       # slices of the tail: the numbers asked for
    places: list        # where in ids these numbers stand in the text


def make_prompt(texts, L, kind, i, without=False):
    """The i-th Prompt of a kind, the same for all models; None where L is too short:

        <|bos|> text ...
        A secret number of Oslo is 4821.        the needle, after 5, 15 ... or 95% of the text
        text ...
        A secret number of Rome is 0775.        with four needles, the others a quarter further
        text ...
        A secret number of Oslo is 4821         the question, and its answer

    Several answers stand one below the other. without: the needles asked for are left out."""
    n_keys, n_values, n_asked = KINDS[kind]
    rng, encode = random.Random(f"{kind} {L} {i}"), texts.enc.encode_ordinary
    n, n_asked = n_keys * n_values, n_asked * n_values
    questions = [encode(f"\nA secret number of {city} is ")
                 for city in rng.sample(CITIES, n_keys) * n_values]
    numbers = [encode(f"{number:0{DIGITS}d}") for number in rng.sample(range(10 ** DIGITS), n)]
    depths = [((i % 10 + 0.5) / 10 + j / n) % 1 for j in range(n)]          # parts of the text
    rng.shuffle(depths)
    if n_values > 1:
        depths.sort()                                       # asked for in the order of the text

    tail, answers = [], []
    for question, number in zip(questions[:n_asked], numbers):
        tail += question
        answers.append(slice(len(tail), len(tail) + len(number)))
        tail += number + encode(".")
    tail = tail[:answers[-1].stop]
    needles = [question + number + encode(".\n") for question, number in zip(questions, numbers)]
    hidden = sorted(range(n_asked if without else 0, n), key=lambda j: depths[j])
    room = L - len(tail) - sum(len(needles[j]) for j in hidden)             # tokens of text
    if room < L // 4 or len(texts.hay) <= L:
        return None
    start = rng.randrange(len(texts.hay) - L)
    hay, ids, at, places = texts.hay[start:start + room], [texts.bos], 0, []
    for j in hidden:
        ids += hay[at:int(depths[j] * room)]
        at = int(depths[j] * room)
        if j < n_asked:
            places.append(len(ids) + len(questions[j]))
        ids += needles[j]
    return Prompt(ids + hay[at:] + tail, len(tail), answers, places)


@torch.no_grad()
def told(model, prompt, cropped):
    """For each number asked for: whether all its tokens are the most likely after the right ones
    before them, and their loss in nats. With one number, greedy decoding would write just that; so
    nothing has to be generated ("teacher forcing")."""
    ids, n = prompt.ids, prompt.n_tail
    if cropped:
        ids = [ids[0], *ids[1:][-model.config.sequence_len:]]
    row = torch.tensor([ids], device=model.lm_head.weight.device)
    logits, targets = model(row[:, :-1], last=n)[0], row[0, -n:]            # (n, V), (n,)
    right = (logits.argmax(-1) == targets).cpu()
    nats = F.cross_entropy(logits, targets, reduction="none").cpu()
    return ([right[answer].all().item() for answer in prompt.answers],
            [nats[answer].sum().item() for answer in prompt.answers])


def needles(model, texts, contexts, cropped, kind, prompts):
    """{context: the share of the numbers asked for that are right}, "found" in each prompt.
    "ceiling": the share that stands in the last n_train tokens, the most that a cropped context can
    give. "gain": what an answer costs more without its needle, in nats per digit, of the first 20
    prompts; it shows what is learnt before any is found."""
    n_train, summary = model.config.sequence_len, {}
    for m in contexts:
        L = int(m * n_train)
        made = [make_prompt(texts, L, kind, i) for i in range(prompts)]
        blank = [make_prompt(texts, L, kind, i, without=True) for i in range(min(prompts, 20))]
        if None in made + blank:
            continue
        right, nats = zip(*(told(model, prompt, cropped) for prompt in made))
        _, without = zip(*(told(model, prompt, cropped) for prompt in blank))
        found = [np.mean(values) for values in right]
        gain = [np.mean(a) - np.mean(b) for a, b in zip(without, nats)]
        in_sight = [place > L - n_train for prompt in made for place in prompt.places]
        summary[f"{m:g}"] = dict(n=prompts, rate=wilson(sum(found), prompts), found=found,
                                 gain=bootstrap(gain, [DIGITS] * len(gain)),
                                 ceiling=np.mean(in_sight))
    return summary


# ---- One tag after the other ---------------------------------------------------------------------

def folder_of(tag):
    """A _long tag is another fine-tuning of the base model without _long."""
    return base_dir() / "base_checkpoints" / tag.removesuffix("_long")


def validation_shard(meta):
    """(path, text column) of the very file that the run was validated on. Of the series' own it is
    downloaded if it is gone."""
    config, name = meta["user_config"], meta.get("validation_file", "shard_06542.parquet")
    sha256 = meta.get("data", {}).get("validation_sha256")  # other code does not say
    column = config.get("text_column", "text")
    places = [Path(str(config.get("data_dir", ""))) / name, base_dir() / "data" / "climbmix" / name]
    there = [path for path in places if path.is_file()]
    for path in there:
        if sha256 in (None, file_hash(path)):
            return path, column
    if there or config.get("dataset") == "local":
        sys.exit(f"{places[0]} is not the file that the run was validated on: put that one there, "
                 f"or into {places[1].parent}")
    return fetch("karpathy/climbmix-400b-shuffle", name, places[1], patience=60), column


def evaluate(folder, name, sizes, env):
    """Tests all arms of a model; the results go into the file `name` in its folder."""
    model, meta = load_model(folder, env.device, env.dtype)
    enc, n_train = tokenizer_of(meta, base_dir()), model.config.sequence_len
    shard, column = validation_shard(meta)
    texts = Texts(shard, column, enc, sizes)
    if not texts.documents or len(texts.documents[0]) < n_train:
        sys.exit(f"{shard} has no document of {n_train} tokens to test on")
    key = dict(sha256=weights_hash(folder, meta["step"]), use_rope=model.use_rope, n_train=n_train,
               texts=texts.name, sizes=str(sizes))
    results, beyond = Results(folder / name, key), [m for m in sizes.contexts if m > 1]
    for arm, (scaling, without_c) in ARMS.items():
        if scaling and not model.use_rope:
            continue
        c = 0.0
        if without_c:
            c = results.part([arm, "fit"], fit_scale, model, texts, beyond, scaling)["c"]
            if c == 0:                                      # tested() knows that they are the same
                continue
        set_arm(model, scaling, c)
        given = (model, texts, sizes.contexts if arm == "as trained" else beyond, arm == "cropped")
        results.part([arm, "text"], text_bits, *given)
        for kind in KINDS:
            results.part([arm, kind], needles, *given, kind, sizes.prompts)


# ---- The table -----------------------------------------------------------------------------------

NOTES = f"""
1x is the training length; [95% intervals], none from fewer than 10 examples: Wilson for shares,
else bootstrap. c: attention logits are multiplied by max(1, 1 + c ln(n / n_train)); "c fitted" is
the best of {SCALES} on other documents, by the same sweep for all; a * marks one at the end of that
list. Cropped: the last n_train tokens only. Needles are {DIGITS}-digit numbers; the share of those
asked for that is told right. Gain: what a number costs more without its needle, in nats per digit.
Bits per byte beyond 1x: the difference from "cropped" on the same documents.
"""


def tested(result, arm, test):
    """{context: summary} of an arm, as far as it is tested; up to 1x that of the model as
    trained."""
    parts = result["parts"]
    if parts[arm].get("fit", {}).get("c") == 0:
        arm = ARMS[arm][1]
    as_trained = parts["as trained"].get(test, {})
    return {**{m: as_trained[m] for m in as_trained if float(m) <= 1}, **parts[arm].get(test, {})}


def cell(interval, form="{:.2f}"):
    """A value with its interval, if it has one."""
    value, *bounds = map(form.format, interval)
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def change(a, b):
    """The difference in bits per byte between two summaries of text_bits, a - b."""
    return bootstrap(np.subtract(a["bits"], b["bits"]), a["bytes"])


def needle_cells(result, arm, kind, contexts):
    summaries = tested(result, arm, kind)
    cells = [cell(summaries[m]["gain"]) if m in summaries else "-" for m in ("1", contexts[-1])]
    for m in contexts:
        cells.append(cell(summaries[m]["rate"]) if m in summaries else "-")
        if arm == "cropped" and m in summaries and float(m) > 1:
            cells[-1] += f", at best {summaries[m]['ceiling']:.2f}"
    return cells


def text_cells(result, arm, contexts):
    summaries, cropped = tested(result, arm, "text"), tested(result, "cropped", "text")
    cells = []
    for m in contexts:
        if m not in summaries:
            cells.append("-")
        elif arm == "cropped" or float(m) <= 1:
            cells.append(f"{cell(summaries[m]['bpb'], '{:.3f}')} n={summaries[m]['n']}")
        else:
            cells.append(cell(change(summaries[m], cropped[m]), "{:+.3f}"))
    return cells


def make_tables(base, contexts, prompts):
    """Markdown, a table for each test. base: {tag: {"key", "parts"}}; contexts: their names."""
    text, lengths = f"# Results\n{NOTES}", [f"{m}x" for m in contexts]
    for test in (*KINDS, "text"):
        title, head = "Bits per byte", ["tag", "arm", "c", *lengths]
        if test in KINDS:
            n_keys, n_values, _ = KINDS[test]
            title = (f"Needles, {test}: {prompts} prompts for each context; guessing among the "
                     f"numbers in the text: {1 / (n_keys * n_values):g}")
            head = [*head[:3], "gain, 1x", f"gain, {lengths[-1]}", *lengths]
        lines = [head, ["---"] * len(head)]
        for tag, result in base.items():
            for arm, parts in result["parts"].items():
                c = parts.get("fit", {"c": 0.0})["c"]
                cells = (needle_cells(result, arm, test, contexts) if test in KINDS else
                         text_cells(result, arm, contexts))
                lines.append([tag, arm, f"{c:g}{'*' if c == SCALES[-1] else ''}", *cells])
        text += f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def conclude(base, far):
    """What the tables say of the longest context, a line for needles and one for text: the best arm
    against the best control. Controls are cropping and, if there are models without RoPE, all arms
    of those with it."""
    def conditions(result):
        return [result["key"][name] for name in ("texts", "n_train", "sizes")]

    first, lines = next(iter(base.values())), []
    comparable = {tag: result for tag, result in base.items()
                  if conditions(result) == conditions(first)}
    without_rope = any(not result["key"]["use_rope"] for result in comparable.values())
    for test, value, sign in (("multi-key", "rate", 1), ("text", "bpb", -1)):
        found = {False: [], True: []}                       # of controls: True
        for tag, result in comparable.items():
            for arm in result["parts"]:
                summary = tested(result, arm, test).get(far)
                if summary:
                    control = arm == "cropped" or without_rope and result["key"]["use_rope"]
                    found[control].append((sign * summary[value][0], f"{tag}, {arm}", summary))
        if found[False] and found[True]:
            (_, name, mine), (_, control, theirs) = (max(some, key=lambda entry: entry[0])
                                                     for some in (found[False], found[True]))
            lines.append(f"{far}x, {test}: {mine[value][0]:.3f} ({name}), best control "
                         f"{theirs[value][0]:.3f} ({control}); {compare(test, mine, theirs)}")
    return lines


def compare(test, a, b):
    """Whether two summaries differ at the 5% level."""
    if test == "text":
        interval = change(a, b)
        if len(interval) == 1:
            return f"{a['n']} documents are too few for an interval"
        differ = interval[1] > 0 or interval[2] < 0
        how = f"paired interval of the difference: {cell(interval, '{:+.3f}')}"
    else:
        p = mcnemar(a["found"], b["found"])
        differ, how = p < 0.05, f"McNemar's test, p = {p:.2g}"
    return f"{'different' if differ else 'no difference'} at the 5% level ({how})"


# ---- The figures ---------------------------------------------------------------------------------

LOOKS = {100: dict(color="#d55e00", marker="o"), 75: dict(color="#56b4e9", marker="^"),
         50: dict(color="#0072b2", marker="D"), 25: dict(color="#009e73", marker="v")}
NTK_LOOK = dict(color="#cc79a7", marker="s", ls="--")
CROPPED_LOOK = dict(color="#000000", marker="x", ls=":")


def families(tags):
    """{tag without drope: [(percent of the steps with RoPE, tag), ...]}, RoPE (100) first."""
    found = {}
    for tag in tags:
        family, percent = re.fullmatch(r"(.*?)(?:_drope_(\d+))?", tag).groups()
        found.setdefault(family, []).append((int(percent or 100), tag))
    return {family: sorted(members, reverse=True) for family, members in found.items()}


def look(percent):
    return LOOKS.get(percent, dict(color="#999999", marker="P"))


def line(ax, label, style, points):
    """points: {x: [y, low, high]}, or [y] where there is no interval."""
    if points:
        y = np.array([values if len(values) == 3 else values * 3 for values in points.values()])
        ax.plot(list(points), y[:, 0], label=label, ms=4, **style)
        ax.fill_between(list(points), y[:, 1], y[:, 2], color=style["color"], alpha=0.15, lw=0)


def draw_contexts(base, contexts, plt):
    """A row for each family: multi-key needles as trained and with fitted c, and what more context
    than 1x does to the bits per byte of the same tokens."""
    groups = families(base)
    fig, axes = plt.subplots(len(groups), 3, figsize=(11, 3.3 * len(groups)), squeeze=False)
    for row, (family, members) in zip(axes, groups.items()):
        first = members[0][1]
        for ax, arm, ntk in zip(row, ("as trained", "c fitted"), ("NTK", "NTK, c fitted")):
            lines = [(tag, arm, tag, look(percent)) for percent, tag in members]
            lines += [(first, ntk, "NTK", NTK_LOOK), (first, "cropped", "cropped", CROPPED_LOOK)]
            for tag, arm, label, style in lines:
                if arm in base[tag]["parts"]:
                    found = tested(base[tag], arm, "multi-key")
                    line(ax, label, style, {float(m): found[m]["rate"] for m in found})
            ax.set(ylim=(-0.03, 1.03), title=f"multi-key needles, {lines[0][1]}")
        for percent, tag in members:
            whole, cropped = (tested(base[tag], arm, "text") for arm in ("as trained", "cropped"))
            line(row[2], tag, look(percent), {float(m): change(whole[m], cropped[m])
                                              for m in cropped if float(m) >= 1})
        row[2].axhline(0, **CROPPED_LOOK)
        row[2].set(title="bits per byte, as trained - cropped")
        for ax in row:
            ax.set_xscale("log", base=2)
            ax.set_xticks(contexts, [f"{m:g}x" for m in contexts])
            ax.set(xlabel="context, in training lengths")
    return fig


def draw_drop(base, contexts, plt):
    """Retrieval in the longest context against the moment of the drop, a line for each family."""
    far = f"{contexts[-1]:g}"
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for ax, arm in zip(axes, ("as trained", "c fitted")):
        for style, (family, members) in zip(LOOKS.values(), families(base).items()):
            found = {p: tested(base[tag], arm, "multi-key").get(far) for p, tag in members}
            line(ax, family, style, {p: point["rate"] for p, point in found.items() if point})
        ax.set(ylim=(-0.03, 1.03), xlim=(-3, 103), title=f"multi-key needles at {far}x, {arm}",
               xlabel="percent of the steps with RoPE (100: always)")
    return fig


def draw_training(base, _, plt):
    """The jump at the switch and the way back, beside RoPE's curve: a panel for each family."""
    groups = families(base)
    fig, axes = plt.subplots(1, len(groups), figsize=(max(6, 4 * len(groups)), 3.8), squeeze=False)
    for ax, (family, members) in zip(axes[0], groups.items()):
        seen = []
        for percent, tag in members:
            names = "val_bpb", "val_bpb_with_rope", "val_bpb_without_rope"
            records = read_lines(folder_of(tag) / "metrics.jsonl", {"step": int},
                                 dict.fromkeys(names, float))
            points = [(record["step"], record[name])
                      for record in records for name in names if name in record]
            ax.plot(*zip(*points), label=tag, ms=4, **look(percent))
            seen += [bpb for _, bpb in points[(len(points) + 3) // 4:]]     # not the first fall
            for record in records:
                if "switch" in record:
                    ax.axvline(record["step"], color=look(percent)["color"], ls=":", lw=1)
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

def main():
    cfg = parse_config(Config, __doc__)
    if not cfg.tags:
        sys.exit("eval.py: which tag? For example `python eval.py d18_9tpp d18_9tpp_drope_50`")
    if cfg.check:
        return
    sizes, name = (QUICK, "eval_quick.json") if cfg.quick else (Sizes(), "eval.json")
    if not cfg.table:
        env = setup_env(compile=0)
        for tag in cfg.tags:
            print(f"{tag}, on {env.device}", flush=True)
            evaluate(folder_of(tag), name, sizes, env)
    base = {}
    for tag in cfg.tags:
        key, parts = results_of(folder_of(tag), name)
        if "cropped" not in parts:
            sys.exit(f"{tag} is not evaluated: leave it out, or run `python eval.py {tag}` first")
        base[folder_of(tag).name] = dict(key=key, parts=parts)
    folder, end = base_dir() / "eval", "_quick" if cfg.quick else ""
    contexts = [f"{m:g}" for m in sizes.contexts]
    tables = make_tables(base, contexts, sizes.prompts)
    text = "\n".join([tables, *conclude(base, contexts[-1]), ""])
    atomic_write(folder / f"results{end}.md", text)
    print(f"\n{text}\n{folder}/results{end}.md written")
    draw_all(base, sizes.contexts, folder, end)


if __name__ == "__main__":
    guard(main)
