"""Evaluates base models at long context: does dropping RoPE help beyond the training length?

    python eval.py d18_9tpp d18_9tpp_drope_50       # --quick: less of everything, for CPUs
    python eval.py --table d18_9tpp d20_9tpp        # only tables and figures of past results

Tests base_checkpoints/TAG in contexts of 1/2 to 8 training lengths, by needles (numbers hidden in
text; four kinds, as in RULER, arXiv:2404.06654) and by bits per byte. Each model is tested as
trained; cropped to the training length, as a user of a RoPE model would; with sharper attention
(model.logn_scale); and, if it has RoPE, with RoPE scaled in two ways.

Writes eval.json beside the checkpoint, and a table and figures to the folder eval. The same command
resumes an interrupted evaluation. Takes about 20 minutes per tag on an H100 (estimated). Left out:
chat models (see chat.py) and short tasks (run lm-evaluation-harness on the exports).
"""
import math, random, sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model import (ROPE_THETA, Results, atomic_write, base_dir, download, encode, file_hash,
                   folder_of, guard, load_model, one_line, option, parse_config, read_lines,
                   results_of, rotary_tables, setup_env, text_column, token_bytes, tokenizer_hash,
                   tokenizer_of, weights_hash, wilson)


@dataclass
class Config:
    tags: tuple = option((), "the base models, such as d18_9tpp_drope_50", positional=True)
    quick: bool = option(False, "fewer contexts, prompts and documents")
    table: bool = option(False, "evaluate nothing, only make the table and the figures")
    check: bool = option(False, "only check the options")


@dataclass
class Sizes:
    contexts: tuple = (0.5, 1, 2, 4, 8)  # in training lengths
    prompts: int = 100  # of each kind, for each context
    documents: int = 96  # to test on, and a quarter as many to fit c on


QUICK = Sizes((0.5, 1, 2, 4), prompts=10, documents=12)
SCALES = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # values of c to try


# ---- Statistics ----------------------------------------------------------------------------------

def mcnemar(a, b):
    """Exact two-sided p-value of "a and b succeed equally often", from results on the same prompts.
    Only prompts with different results count; under the null hypothesis each is a coin flip."""
    only_a = sum(x > y for x, y in zip(a, b))
    only_b = sum(y > x for x, y in zip(a, b))
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1)) / 2 ** n)


def bootstrap(x, size):
    """[sum(x) / sum(size), low, high]: a 95% interval from resampling the examples 2,000 times (no
    interval for fewer than 10). It is a paired interval if x are differences."""
    x, size = np.array(x), np.array(size)
    if len(x) < 10:
        return [x.sum() / size.sum()]
    drawn = np.random.default_rng(0).integers(0, len(x), (2000, len(x)))
    ratios = x[drawn].sum(1) / size[drawn].sum(1)
    return [x.sum() / size.sum(), *np.percentile(ratios, [2.5, 97.5])]


# ---- The arms ------------------------------------------------------------------------------------
# c is model.logn_scale: it multiplies the attention logits of the query at position n (from 1) by
# max(1, 1 + c ln(n / n_train)), n_train being the training length. Up to n_train all arms are
# equal.

ARMS = {  # name: (RoPE scaling, the arm without c if c is fitted)
    "as trained": ("", None), "cropped": ("", None), "c fitted": ("", "as trained"),
    "NTK": ("ntk", None), "NTK, c fitted": ("ntk", "NTK"),
    "NTK by parts": ("by parts", None), "NTK by parts, c fitted": ("by parts", "NTK by parts")}


def scaled_tables(T, head_dim, device, n_train, scaling):
    """rotary_tables for s = T / n_train > 1 training lengths. ntk ("NTK-aware"): a larger theta, so
    that the slowest rotation becomes s times slower and the fastest stays. by parts: frequencies
    with fewer than 1 rotation in n_train tokens are divided by s, those with more than 32 stay,
    with a ramp between. YaRN (arXiv:2309.00071) is "by parts" with a temperature, whose role c
    plays."""
    s = T / n_train
    if s <= 1 or not scaling:
        return rotary_tables(T, head_dim, device)
    if scaling == "ntk":
        return rotary_tables(T, head_dim, device, ROPE_THETA * s ** (head_dim / (head_dim - 2)))
    freqs = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    unscaled = ((n_train * freqs / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
    freqs = freqs * (unscaled + (1 - unscaled) / s)
    angles = torch.outer(torch.arange(T, dtype=torch.float32), freqs)
    return angles.cos().to(device), angles.sin().to(device)


def set_arm(model, scaling, c):
    """Sets the two attributes that GPT.forward reads."""
    n_train, model.logn_scale = model.config.sequence_len, c
    model.rotary_tables = partial(scaled_tables, n_train=n_train, scaling=scaling)


class Texts:
    """The validation shard as tokens. Of its 150 longest documents, a third is for fitting c and
    the rest for testing; sizes.documents limits both. All other documents, shuffled, are the
    haystack."""

    def __init__(self, path, column, enc, sizes):
        import pyarrow as pa
        try:
            with text_column(path, column) as shard:
                texts = shard.read([column])[column].to_pylist()
        except (pa.ArrowException, OSError, ValueError) as e:
            sys.exit(f"cannot read {path} ({one_line(e)}): replace it with an intact copy")
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
    """The loss of each token except the first, in nats: list of n + 1 ids -> float64 (n,)."""
    row = torch.tensor([ids], device=model.lm_head.weight.device)
    return model(row[:, :-1], row[:, 1:], reduction="none")[0].cpu().double().numpy()


def text_bits(model, texts, contexts, cropped):
    """{context: bits per byte of the last 512 tokens (or n_train / 8, if less) of documents that
    fill the context}, with the bits and bytes of each document. All arms use the same documents, so
    their differences are paired."""
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
    """One c for all contexts: the one of SCALES with the lowest loss on the tokens beyond n_train
    of texts.fit, each document in the longest context that it fills."""
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

KINDS = {  # keys in the text, values per key, keys asked for
    "single": (1, 1, 1),  # no need to read the key: there is only one number
    "multi-key": (4, 1, 1),  # the key decides between four numbers
    "multi-value": (1, 4, 1),  # one key has four numbers, asked for in the order of the text
    "multi-query": (4, 1, 4),  # all four keys are asked for, in any order
}
CITIES = "Berlin Boston Cairo Chicago Delhi Lima London Madrid Oslo Paris Rome Tokyo".split()
DIGITS = 4  # of a number


class Prompt(NamedTuple):
    ids: list  # L + 1 tokens
    n_tail: int  # the last n_tail of them are the questions and answers
    answers: list  # slices of that tail: the numbers asked for
    places: list  # where in ids these numbers are hidden


def make_prompt(texts, L, kind, i, without=False):
    """The i-th Prompt of a kind, the same for all models; None if L is too short:

        <|bos|> text ...
        A secret number of Oslo is 4821.        the needle, after 5, 15 ... or 95% of the text
        text ...
        A secret number of Rome is 0775.        with four needles, each a quarter further on
        text ...
        A secret number of Oslo is 4821         the question, and its answer

    Several questions follow one another. without: leaves out the needles asked for."""
    n_keys, n_values, n_asked = KINDS[kind]
    rng, encode = random.Random(f"{kind} {L} {i}"), texts.enc.encode_ordinary
    n, n_asked = n_keys * n_values, n_asked * n_values
    questions = [encode(f"\nA secret number of {city} is ")
                 for city in rng.sample(CITIES, n_keys) * n_values]
    numbers = [encode(f"{number:0{DIGITS}d}") for number in rng.sample(range(10 ** DIGITS), n)]
    depths = [((i % 10 + 0.5) / 10 + j / n) % 1 for j in range(n)]  # 0: start of the text
    rng.shuffle(depths)
    if n_values > 1:
        depths.sort()  # asked for in the order of the text

    tail, answers = [], []
    for question, number in zip(questions[:n_asked], numbers):
        tail += question
        answers.append(slice(len(tail), len(tail) + len(number)))
        tail += number + encode(".")
    tail = tail[:answers[-1].stop]
    needles = [question + number + encode(".\n") for question, number in zip(questions, numbers)]
    hidden = sorted(range(n_asked if without else 0, n), key=lambda j: depths[j])
    room = L - len(tail) - sum(len(needles[j]) for j in hidden)  # tokens of text
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
def score_answers(model, prompt, cropped):
    """For each number asked for: is every token of it the most likely one, given the correct tokens
    before ("teacher forcing"; nothing is generated)? And what is its loss in nats?"""
    ids, n = prompt.ids, prompt.n_tail
    if cropped:
        ids = [ids[0], *ids[1:][-model.config.sequence_len:]]
    row = torch.tensor([ids], device=model.lm_head.weight.device)
    logits, targets = model(row[:, :-1], last=n)[0], row[0, -n:]  # (n, V), (n,)
    right = (logits.argmax(-1) == targets).cpu()
    nats = F.cross_entropy(logits, targets, reduction="none").cpu()
    return ([right[answer].all().item() for answer in prompt.answers],
            [nats[answer].sum().item() for answer in prompt.answers])


def needles(model, texts, contexts, cropped, kind, prompts):
    """{context: the share of correct numbers}, with "found", the share in each prompt. "ceiling":
    the share hidden in the last n_train tokens, the most that a cropped context can find. "gain":
    how much more a number costs without its needle, in nats per digit (first 20 prompts); it rises
    before the first number is found."""
    n_train, summary = model.config.sequence_len, {}
    for m in contexts:
        L = int(m * n_train)
        made = [make_prompt(texts, L, kind, i) for i in range(prompts)]
        blank = [make_prompt(texts, L, kind, i, without=True) for i in range(min(prompts, 20))]
        if None in made + blank:
            continue
        right, nats = zip(*(score_answers(model, prompt, cropped) for prompt in made))
        _, without = zip(*(score_answers(model, prompt, cropped) for prompt in blank))
        found = [np.mean(values) for values in right]
        gain = [np.mean(a) - np.mean(b) for a, b in zip(without, nats)]
        in_sight = [place > L - n_train for prompt in made for place in prompt.places]
        summary[f"{m:g}"] = dict(n=prompts, rate=wilson(sum(found), prompts), found=found,
                                 gain=bootstrap(gain, [DIGITS] * len(gain)),
                                 ceiling=np.mean(in_sight))
    return summary


# ---- One tag at a time ---------------------------------------------------------------------------

def validation_shard(meta):
    """(path, text column) of the file that the run was validated on. A missing ClimbMix shard is
    downloaded."""
    config, name = meta["user_config"], meta.get("validation_file", "shard_06542.parquet")
    sha256 = meta.get("data", {}).get("validation_sha256")  # absent from other code
    column = config.get("text_column", "text")
    places = [Path(str(config.get("data_dir", ""))) / name, base_dir() / "data" / "climbmix" / name]
    there = [path for path in places if path.is_file()]
    for path in there:
        if sha256 in (None, file_hash(path)):
            return path, column
    if there or config.get("dataset") == "local":
        sys.exit(f"{places[0]} is not the file that the run was validated on: put that file there "
                 f"or into {places[1].parent}")
    return download("karpathy/climbmix-400b-shuffle", name, places[1], patience=60), column


def evaluate(folder, name, sizes, env):
    """Tests all arms of a model. The results go to the file `name` in its folder."""
    model, meta = load_model(folder, env.device, env.dtype)
    enc, n_train = tokenizer_of(meta, base_dir()), model.config.sequence_len
    shard, column = validation_shard(meta)
    texts = Texts(shard, column, enc, sizes)
    if not texts.documents or len(texts.documents[0]) < n_train:
        sys.exit(f"{shard} has no document of {n_train} tokens to test on")
    key = dict(sha256=weights_hash(folder, meta["step"]), use_rope=model.use_rope,
               conditions=f"{model.num_scaling_params():,} parameters, {n_train} tokens, "
                          f"{texts.name} {column} {sizes} {SCALES}")
    results, beyond = Results(folder / name, key), [m for m in sizes.contexts if m > 1]
    for arm, (scaling, without_c) in ARMS.items():
        if scaling and not model.use_rope:
            continue
        c = 0.0
        if without_c:
            c = results.part([arm, "fit"], fit_scale, model, texts, beyond, scaling)["c"]
            if c == 0:  # tested() treats them as the same
                continue
        set_arm(model, scaling, c)
        given = (model, texts, sizes.contexts if arm == "as trained" else beyond, arm == "cropped")
        results.part([arm, "text"], text_bits, *given)
        for kind in KINDS:
            results.part([arm, kind], needles, *given, kind, sizes.prompts)


# ---- The table -----------------------------------------------------------------------------------

NOTES = f"""
1x is the training length. [95% intervals]: Wilson for shares, else bootstrap (none for fewer than
10 examples). c multiplies attention logits by max(1, 1 + c ln(n / n_train)); "c fitted" is the best
of {SCALES} on other documents, marked * if it is the last. Cropped: only the last n_train tokens;
"at best": the share of the numbers that are in them. Needles: the share of correct {DIGITS}-digit
numbers. Gain: how much more a number costs without its needle, in nats per digit. Bits per byte
beyond 1x: the difference from "cropped" on the same documents. The conclusions compare arms that
were chosen on the same prompts, which favours the best arm. """


def tested(result, arm, test):
    """{context: summary} of an arm; up to 1x that of the model as trained."""
    parts = result["parts"]
    if parts[arm].get("fit", {}).get("c") == 0:
        arm = ARMS[arm][1]
    as_trained = parts["as trained"].get(test, {})
    return {**{m: as_trained[m] for m in as_trained if float(m) <= 1}, **parts[arm].get(test, {})}


def cell(interval, form="{:.2f}"):
    """A value and its interval, if it has one."""
    value, *bounds = map(form.format, interval)
    return f"{value} [{', '.join(bounds)}]" if bounds else value


def change(a, b):
    """The difference in bits per byte between two summaries of text_bits, a - b."""
    return bootstrap(np.subtract(a["bits"], b["bits"]), a["bytes"])


def cells(result, arm, test, contexts):
    """The cells of one row of the table."""
    summaries, cropped = tested(result, arm, test), tested(result, "cropped", test)
    row = []
    if test in KINDS:
        row = [cell(summaries[m]["gain"]) if m in summaries else "-" for m in ("1", contexts[-1])]
    for m in contexts:
        beyond, summary = float(m) > 1, summaries.get(m)
        if not summary:
            row.append("-")
        elif test in KINDS:
            best = f", at best {summary['ceiling']:.2f}" if arm == "cropped" and beyond else ""
            row.append(cell(summary["rate"]) + best)
        elif arm == "cropped" or not beyond:
            row.append(f"{cell(summary['bpb'], '{:.3f}')} n={summary['n']}")
        else:
            row.append(cell(change(summary, cropped[m]), "{:+.3f}"))
    return row


def make_tables(base, contexts, prompts):
    """Markdown with one table per test. base: {tag: {"key", "parts"}}; contexts: their names."""
    text, lengths = f"# Results\n{NOTES}", [f"{m}x" for m in contexts]
    for test in (*KINDS, "text"):
        title, head = "Bits per byte", ["tag", "arm", "c", *lengths]
        if test in KINDS:
            n_keys, n_values, n_asked = KINDS[test]
            guess = np.mean([1 / (n_keys * n_values - told) for told in range(n_asked * n_values)])
            title = (f"Needles, {test}: {prompts} prompts per context; chance among the numbers "
                     f"in the text that are still open: {guess:.2f}")
            head = [*head[:3], "gain, 1x", f"gain, {lengths[-1]}", *lengths]
        lines = [head, ["---"] * len(head)]
        for tag, result in base.items():
            for arm, parts in result["parts"].items():
                fit = parts.get("fit", {"c": 0.0, "n": 1})
                c = f"{fit['c']:g}{'*' if fit['c'] == SCALES[-1] else ''}" if fit["n"] else "-"
                lines.append([tag, arm, c, *cells(result, arm, test, contexts)])
        text += f"\n## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text


def conclude(base, longest):
    """Conclusions about the longest context, for each group of comparable models: those of one size
    tested on the same texts."""
    groups = {}
    for tag, result in base.items():
        groups.setdefault(result["key"]["conditions"], {})[tag] = result
    lines = []
    for group in groups.values():
        lines += ["", f"{', '.join(group)} at {longest}x:", ""]
        lines += [best_against_control(group, longest, test) for test in ("multi-key", "text")]
    return lines


def best_against_control(group, longest, test):
    """One line that compares the best arm with the best control. Controls are cropping and, if
    there are models without RoPE, all arms of models with RoPE."""
    value = (lambda summary: -summary["bpb"][0]) if test == "text" else (
        lambda summary: summary["rate"][0])
    without_rope = any(not result["key"]["use_rope"] for result in group.values())
    arms, controls = [], []
    for tag, result in group.items():
        for arm in result["parts"]:
            summary = tested(result, arm, test).get(longest)
            is_control = arm == "cropped" or without_rope and result["key"]["use_rope"]
            if summary:
                entry = value(summary), f"{tag}, {arm}", summary
                (controls if is_control else arms).append(entry)
    if not arms or not controls:
        return f"- {test}: nothing to compare"
    (a, name, summary), (b, control, control_summary) = (
        max(some, key=lambda entry: entry[0]) for some in (arms, controls))
    if test != "text" and a == b == 0:
        return f"- {test}: no arm finds anything"
    return (f"- {test}: {abs(a):.3f} ({name}), best control {abs(b):.3f} ({control}): "
            f"{compare(test, summary, control_summary)}")


def compare(test, a, b):
    """Whether one summary of a test is better or worse than another, at the 5% level."""
    if test == "text":
        interval = change(a, b)
        if len(interval) == 1:
            return f"{a['n']} documents are too few for an interval"
        differ, better = interval[1] > 0 or interval[2] < 0, interval[0] < 0
        how = f"paired interval of the difference: {cell(interval, '{:+.3f}')}"
    else:
        p = mcnemar(a["found"], b["found"])
        differ, better = p < 0.05, sum(a["found"]) > sum(b["found"])
        how = f"McNemar's test, p = {p:.2g}"
    if not differ:
        return f"no significant difference ({how})"
    return f"significantly {'better' if better else 'worse'} ({how})"


# ---- The figures ---------------------------------------------------------------------------------

LOOKS = {100: dict(color="#d55e00", marker="o"), 75: dict(color="#56b4e9", marker="^"),
         50: dict(color="#0072b2", marker="D"), 25: dict(color="#009e73", marker="v")}
OTHER_LOOK = dict(color="#999999", marker="P")
NTK_LOOK = dict(color="#cc79a7", marker="s", ls="--")
CROPPED_LOOK = dict(color="#000000", marker="x", ls=":")


def families(base):
    """{tag without drope: [(percent of the steps with RoPE, tag, look), ...]}, RoPE (100) first.
    The percent is None for a model without RoPE whose name does not tell."""
    found = {}
    for tag in sorted(base):
        family, _, percent = tag.partition("_drope_")
        if percent.isdecimal():
            percent = int(percent)
        else:
            percent = 100 if base[tag]["key"]["use_rope"] else None
        found.setdefault(family, []).append((percent, tag, LOOKS.get(percent, OTHER_LOOK)))
    return found


def line(ax, label, look, points):
    """Draws points, {x: [y, low, high]} or {x: [y]} without interval."""
    if points:
        y = np.array([values if len(values) == 3 else values * 3 for values in points.values()])
        ax.plot(list(points), y[:, 0], label=label, ms=4, **look)
        ax.fill_between(list(points), y[:, 1], y[:, 2], color=look["color"], alpha=0.15, lw=0)


def draw_contexts(base, contexts, plt):
    """A row per family: multi-key needles as trained and with fitted c, and what context beyond 1x
    does to the bits per byte of the same tokens."""
    groups = families(base)
    fig, axes = plt.subplots(len(groups), 3, figsize=(11, 3.3 * len(groups)), squeeze=False)
    for row, (family, members) in zip(axes, groups.items()):
        (_, first, _), *_ = members
        for ax, arm, ntk in zip(row, ("as trained", "c fitted"), ("NTK", "NTK, c fitted")):
            lines = [(tag, arm, tag, look) for _, tag, look in members]
            lines += [(first, ntk, "NTK", NTK_LOOK), (first, "cropped", "cropped", CROPPED_LOOK)]
            for tag, shown, label, look in lines:
                if shown in base[tag]["parts"]:
                    found = tested(base[tag], shown, "multi-key")
                    line(ax, label, look, {float(m): found[m]["rate"] for m in found})
            ax.set(ylim=(-0.03, 1.03), title=f"multi-key needles, {arm}")
        for _, tag, look in members:
            whole, cropped = (tested(base[tag], arm, "text") for arm in ("as trained", "cropped"))
            line(row[2], tag, look, {float(m): change(whole[m], cropped[m])
                                     for m in cropped if float(m) >= 1})
        row[2].axhline(0, color="black", ls=":")
        row[2].set(title="bits per byte, as trained - cropped")
        for ax in row:
            ax.set_xscale("log", base=2)
            ax.set_xticks([float(m) for m in contexts], [f"{m}x" for m in contexts])
            ax.set(xlabel="context, in training lengths")
    return fig


def draw_drop(base, contexts, plt):
    """Retrieval in the longest context against the time of the drop, one line per family."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for ax, arm in zip(axes, ("as trained", "c fitted")):
        for i, (family, members) in enumerate(families(base).items()):
            found = {percent: tested(base[tag], arm, "multi-key")
                     for percent, tag, _ in members if percent is not None}
            line(ax, family, dict(color=f"C{i}", marker="o"),
                 {percent: summaries[contexts[-1]]["rate"]
                  for percent, summaries in sorted(found.items()) if contexts[-1] in summaries})
        ax.set(ylim=(-0.03, 1.03), xlim=(-3, 103), title=f"multi-key at {contexts[-1]}x, {arm}",
               xlabel="percent of the steps with RoPE (100: always)")
    return fig


def draw_training(base, _, plt):
    """The jump in validation loss when RoPE is dropped, and the recovery, beside the RoPE run."""
    groups = families(base)
    fig, axes = plt.subplots(1, len(groups), figsize=(max(6, 4 * len(groups)), 3.8), squeeze=False)
    for ax, (family, members) in zip(axes[0], groups.items()):
        seen = []
        for _, tag, look in members:
            names = "val_bpb", "val_bpb_with_rope", "val_bpb_without_rope"
            records = read_lines(folder_of("base", tag) / "metrics.jsonl", {"step": int},
                                 dict.fromkeys(names, float))
            points = [(record["step"], record[name])
                      for record in records for name in names if name in record]
            ax.plot(*zip(*points), label=tag, ms=4, **look)
            seen += [bpb for _, bpb in points[(len(points) + 3) // 4:]]  # not the first fall
            for step in (record["step"] for record in records if "switch" in record):
                ax.axvline(step, color=look["color"], ls=":", lw=1)
        ax.set(title=f"{family} (dotted: RoPE is dropped)", xlabel="step",
               ylabel="validation bits per byte", ylim=(None, 1.02 * max(seen) if seen else None))
    return fig


def draw_all(base, contexts, folder, end):
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no figures: matplotlib is not installed (pip install matplotlib)")
    plt.rcParams.update({"axes.titlesize": 10, "legend.fontsize": 8, "legend.frameon": False})
    for draw in (draw_contexts, draw_drop, draw_training):
        path = folder / f"{draw.__name__.removeprefix('draw_')}{end}.png"
        fig = draw(base, contexts, plt)
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
            evaluate(folder_of("base", tag), name, sizes, env)
    base = {}
    for tag in cfg.tags:
        key, parts = results_of(folder_of("base", tag), name)
        if "c fitted" not in parts:
            sys.exit(f"{tag} is not evaluated: omit it, or first run `python eval.py {tag}"
                     f"{' --quick' if cfg.quick else ''}`")
        base[folder_of("base", tag).name] = dict(key=key, parts=parts)
    folder, end = base_dir() / "eval", "_quick" if cfg.quick else ""
    contexts = [f"{m:g}" for m in sizes.contexts]
    tables = make_tables(base, contexts, sizes.prompts)
    text = "\n".join([tables, *conclude(base, contexts[-1]), ""])
    atomic_write(folder / f"results{end}.md", text)
    print(f"\n{text}\n{folder}/results{end}.md written")
    draw_all(base, contexts, folder, end)


if __name__ == "__main__":
    guard(main)
