"""
Train the tokenizer: byte-level BPE (arXiv:1508.07909) over local parquet shards, in numpy, without a training library.

    python tok.py                      # 32,768 ids from the first 2 billion characters: some minutes, 4 GB of memory
    python tok.py --vocab-size 4096 --data-dir my/shards --out-dir my/tokenizer

Takes  DATA_DIR/shard_*.parquet with a string column `text` (`python pretrain.py --fetch 8` fetches the first 8); the
       last shard, shard_06542, is the validation set and never read
Gives  OUT_DIR/tokenizer.tiktoken: a token a line, base64 and rank, as tiktoken.load.load_tiktoken_bpe reads it
       OUT_DIR/config.json: split pattern, special tokens, what it was trained on; written last: present = complete

Counting cuts the text into chunks with a regular expression and counts the distinct ones, which is all that the rest
needs. Merging starts with bytes and makes the most frequent pair of neighbours one new token, again and again, never
across chunks. The tokens are those of rustbpe, one by one. Left out: encoding (tiktoken does that), over 65,536 ids.
"""

import argparse
import base64
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from heapq import heapify, heappop, heappush, heapreplace
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import regex  # comes with tiktoken
import tiktoken

# GPT-4's split pattern, with digits in ones and twos: 's 'll ..., a word with the one space or sign before it, digits,
# signs with the line ends after them, white space up to a line end, other white space (its last one left to a word)
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
           r"|\s*[\r\n]|\s+(?!\S)|\s+")
SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
           "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"]  # the last ids, in this order
VALIDATION = "shard_06542.parquet"
FETCH = "`python pretrain.py --fetch 8`"

# ---- counting: text -> {chunk: how often} ----------------------------------------------------------------------------

# Python's own re is 1.6 times as fast as regex, but it knows no \p{L}, no \p{N} and another \s. So these are spelled
# out for it up to U+FFFF, and texts with characters beyond that (emoji) are left to regex. The possessive ?+ and ++
# are plain ones here: where they forbid to go back, going back would not lead to a match either.
plane = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))  # all characters up to U+FFFF
L, N, S = ("".join(f"{run[0]}-{run[-1]}" for run in regex.findall(c, plane)) for c in (r"\p{L}+", r"\p{N}+", r"\s+"))
fast = re.compile(rf"'(?i:[sdmt]|ll|ve|re)|[^\r\n{L}{N}]?[{L}]+|[{N}]{{1,2}}| ?[^{S}{L}{N}]+[\r\n]*"
                  rf"|[{S}]*[\r\n]|[{S}]+(?![^{S}])|[{S}]+")
full = regex.compile(PATTERN)
beyond = re.compile("[\U00010000-\U0010FFFF]")


def split(text):
    """The chunks of a text: end to end they are the text again."""
    return (full if beyond.search(text) else fast).findall(text)


def read_documents(path, group, doc_cap):
    """The documents of one row group, each cut at doc_cap characters. ValueError names a shard that cannot be read."""
    try:
        texts = pq.ParquetFile(path).read_row_group(group, columns=["text"])["text"].to_pylist()
    except (OSError, ValueError, KeyError) as e:
        raise ValueError(f"{path}: {e}") from None
    return [(text or "")[:doc_cap] for text in texts]


def count_row_group(path, group, doc_cap, max_chars):
    """-> {chunk: count}, characters, documents of one row group, up to the document that reaches max_chars."""
    counts, chars, docs = Counter(), 0, 0
    for text in read_documents(path, group, doc_cap):
        counts.update(split(text))
        chars, docs = chars + len(text), docs + 1
        if chars >= max_chars:
            break
    return counts, chars, docs


def row_groups(shards):
    """(path, index) of every row group, in order. ValueError names a shard that is empty or cannot be read."""
    for path in shards:
        try:
            meta = pq.read_metadata(path)
        except (OSError, ValueError) as e:
            raise ValueError(f"{path}: {e}") from None
        if meta.num_rows == 0:
            raise ValueError(f"{path}: no documents in it")
        yield from ((path, group) for group in range(meta.num_row_groups))


def start_worker():
    """A worker leaves Ctrl-C to the main process, and ends when that is gone (even killed)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def in_order(tasks, workers):
    """(task, count_row_group(*task)) in the order of the tasks, whatever the number of processes."""
    if workers == 1:
        yield from ((task, count_row_group(*task)) for task in tasks)
        return
    tasks = iter(tasks)
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:  # spawn is what macOS does
        while batch := list(islice(tasks, 8 * workers)):  # in batches, so that results do not pile up in memory
            yield from zip(batch, pool.map(count_row_group, *zip(*batch)))


def count_chunks(shards, max_chars, doc_cap, workers):
    """Count the chunks of the first max_chars characters -> {chunk: count}, characters, documents, number of shards."""
    counts, chars, docs, n_shards = {}, 0, 0, 0
    tasks = ((path, group, doc_cap, max_chars) for path, group in row_groups(shards))
    with closing(in_order(tasks, workers)) as results:
        for (path, group, *_), (more, more_chars, more_docs) in results:
            if chars + more_chars > max_chars:  # the last one: count it again, only as far as needed
                more, more_chars, more_docs = count_row_group(path, group, doc_cap, max_chars - chars)
            for chunk, n in more.items():
                counts[chunk] = counts.get(chunk, 0) + n
            chars, docs, n_shards = chars + more_chars, docs + more_docs, shards.index(path) + 1
            progress(f"counted {chars:,} characters, {len(counts):,} distinct chunks")
            if chars >= max_chars:
                break
    return counts, chars, docs, n_shards

# ---- merging: {chunk: how often} -> tokens ---------------------------------------------------------------------------

GAP, DEAD = 255, 254  # the bytes 0xFF and 0xFE never occur in UTF-8, so their ids can mark places without a token


def train(counts, n_merges):
    """
    Byte pair encoding of {chunk: count} -> list of tokens (bytes): the 256 bytes, then one for each merge; fewer if no
    pair is left. The pair with the highest count first, ties to the smallest (left id, right id). Overlapping pairs are
    counted (aaa has two of aa) and merged from the left.

    The chunks lie in one array, with a GAP around each. A token stands at its first and its last place and the places
    between are DEAD, so that both neighbours of a token are found without links:

        GAP t h e GAP   -- t + h -->   GAP th th e GAP   -- th + e -->   GAP the DEAD the GAP
    """
    text = b"\xff" + b"".join([chunk.encode() + b"\xff" for chunk in counts])
    ids = np.frombuffer(text, np.uint8).astype(np.uint16)
    times = np.fromiter(counts.values(), np.int64, len(counts))
    weight = np.repeat(times, np.diff(np.flatnonzero(ids == GAP)))  # at each place, how often its chunk was counted
    length = np.ones(256 + n_merges, np.int64)  # bytes of each token
    tokens = [bytes([i]) for i in range(256)]

    def find_pairs(at, floor):
        """The pairs with their left tokens at places `at` -> [(-count, left id, right id, places)], count >= floor."""
        left = ids.take(at)
        right = ids.take(at + length.take(left))
        inside = (right != GAP).nonzero()[0]
        order = inside.take(np.lexsort((right.take(inside), left.take(inside))))  # equal pairs side by side
        if len(order) == 0:
            return []
        at, left, right = at.take(order), left.take(order), right.take(order)
        bounds = np.ones(len(at) + 1, bool)
        bounds[1:-1] = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
        bounds = bounds.nonzero()[0]  # where each pair begins, and the end
        sums = np.add.reduceat(weight.take(at), bounds[:-1])
        return [(-int(sums[i]), int(left[bounds[i]]), int(right[bounds[i]]), at[bounds[i]:bounds[i + 1]].copy())
                for i in (sums >= floor).nonzero()[0]]

    # The heap holds only pairs with a count >= floor; when it runs dry, the floor sinks and the heap is filled anew.
    # By Zipf's law the last of 32,000 merges has a count near total / (10 x merges): mostly the second floor suffices.
    floor = 4 * max(1, sum(counts.values()) // (6 * max(1, n_merges)))
    while len(tokens) < len(length) and floor > 1:
        floor = max(1, floor // 4)
        live = np.flatnonzero((ids != GAP) & (ids != DEAD))
        longer = length.take(ids.take(live)) > 1  # these tokens stand at two places: every other one is a beginning
        heap = find_pairs(np.concatenate((live[~longer], live[longer][::2])), floor)
        heapify(heap)
        while heap and len(tokens) < len(length):
            # A pair appears with the newer of its tokens and can only lose places after that, so the counts in the heap
            # are upper bounds: where the top one is still exact, no other pair is more frequent.
            bound, a, b, at = heap[0]
            at = at.compress((ids.take(at) == a) & (ids.take(at + len(tokens[a])) == b))
            count = int(weight.take(at).sum())
            if count < -bound:
                heapreplace(heap, (-count, a, b, at)) if count >= floor else heappop(heap)
                continue
            heappop(heap)
            if a == b:  # of a run a a a a take the 1st, 3rd, ... place (places are always in ascending order)
                run = np.flatnonzero(np.diff(at, prepend=at[0]) != len(tokens[a]))  # where each run begins
                nth = np.arange(len(at)) - np.repeat(run, np.diff(run, append=len(at)))
                at = at[nth % 2 == 0]
            new = len(tokens)
            tokens.append(tokens[a] + tokens[b])
            length[new] = size = len(tokens[new])
            middle = at + len(tokens[a])
            ids[middle - 1] = ids[middle] = DEAD
            ids[at] = ids[at + size - 1] = new  # all places at once
            before = ids.take(at - 1)  # new pairs: each new token with the one after it, and with the one before it
            old = ((before != GAP) & (before != new)).nonzero()[0]  # (of two new ones in a row, only the former case)
            for pair in find_pairs(np.concatenate((at, at.take(old) - length.take(before.take(old)))), floor):
                heappush(heap, pair)
            if new % 100 == 0:
                progress(f"merged {new - 255:,} of {n_merges:,} pairs")
    return tokens

# ---- checking and saving ---------------------------------------------------------------------------------------------

def check(tokens, special, texts):
    """Encode texts with tiktoken and decode them again -> bytes per token."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    assert len(ranks) == len(tokens), "the same token was made twice"
    encoding = tiktoken.Encoding("tok", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special,
                                 explicit_n_vocab=len(tokens) + len(special))
    ids = encoding.encode_ordinary_batch(texts)
    assert encoding.decode_batch(ids) == texts, "tiktoken does not give back the text that it encoded"
    return sum(len(text.encode()) for text in texts) / max(1, sum(map(len, ids)))


def save(path, text):
    """Write a file that is complete before it takes its name."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        sys.exit(f"cannot write {path} ({e.strerror}): make room or choose another --out-dir")

# ---- command line ----------------------------------------------------------------------------------------------------

def progress(text, last=False, shown=[0.0]):
    """A line that rewrites itself on a terminal; in a log file, a line every ten seconds at most."""
    terminal = sys.stdout.isatty()
    if last or time.monotonic() - shown[0] > (0.2 if terminal else 10):
        shown[0] = time.monotonic()
        print(f"\r{text:<79}" if terminal else text, end="\n" if last or not terminal else "", flush=True)


def parse_args():
    base = Path(os.environ.get("NANOCHAT_BASE_DIR", "out"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
            ("--data-dir", str(base / "data/climbmix"), "folder with the parquet shards"),
            ("--out-dir", str(base / "tokenizer"), "folder for the tokenizer; one that is there already is kept"),
            ("--vocab-size", 32768, "ids in all: 256 bytes, the merges and 9 special tokens"),
            ("--max-chars", 2_000_000_000, "characters to train on; if there are fewer, all of them"),
            ("--doc-cap", 10_000, "cut every document at so many characters"),
            ("--workers", min(cores, 16), "processes that count; the result does not depend on it")):
        parser.add_argument(name, type=type(default), default=default, help=f"{text} (default: {default})")
    args = parser.parse_args()
    if not 256 + len(SPECIAL) <= args.vocab_size <= 2**16:
        sys.exit(f"--vocab-size {args.vocab_size}: give a number from {256 + len(SPECIAL)} to {2**16}")
    if min(args.max_chars, args.doc_cap, args.workers) < 1:
        sys.exit("--max-chars, --doc-cap and --workers: give numbers above 0")
    return args


def main():
    args, start = parse_args(), time.time()
    out = Path(args.out_dir)
    if (out / "tokenizer.tiktoken").exists() and (out / "config.json").exists():
        size = 1 + max(json.loads((out / "config.json").read_text())["special_tokens"].values())
        if size != args.vocab_size:
            sys.exit(f"the tokenizer in {out} has {size} ids, not {args.vocab_size}: remove that folder, or choose another --out-dir")
        print(f"tokenizer exists, skipped: {out} (remove that folder to train another)")
        return
    shards = sorted(p for p in Path(args.data_dir).glob("shard_*.parquet") if p.name != VALIDATION)
    if not shards:
        sys.exit(f"no training shards (shard_*.parquet) in {args.data_dir}: {FETCH} fetches them")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # to find out now and not after the training
    except OSError as e:
        sys.exit(f"cannot write to {out} ({e.strerror}): choose another --out-dir")
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, lambda number, frame: sys.exit(128 + number))  # ends the workers as well

    try:
        counts, chars, docs, n_shards = count_chunks(shards, args.max_chars, args.doc_cap, args.workers)
    except ValueError as e:
        sys.exit(f"cannot read a shard: {' '.join(str(e).split())}; remove it, {FETCH} fetches it again")
    except BrokenProcessPool:
        sys.exit("a worker process died, perhaps for want of memory: try again with --workers 1")
    progress(f"counted {chars:,} characters, {len(counts):,} distinct chunks in {time.time() - start:.1f} s", last=True)
    if chars < args.max_chars:
        print(f"fewer than the {args.max_chars:,} characters asked for are in {args.data_dir}: going on with these")

    merging, n_merges = time.time(), args.vocab_size - 256 - len(SPECIAL)
    tokens = train(counts, n_merges)
    progress(f"merged {len(tokens) - 256:,} of {n_merges:,} pairs in {time.time() - merging:.1f} s", last=True)
    if len(tokens) < 256 + n_merges:
        sys.exit(f"{chars:,} characters are too few for --vocab-size {args.vocab_size}: give "
                 f"--vocab-size {len(tokens) + len(SPECIAL)} or less, or more text ({FETCH})")

    special = {name: len(tokens) + i for i, name in enumerate(SPECIAL)}
    bytes_per_token = check(tokens, special, read_documents(shards[0], 0, args.doc_cap)[:100])
    config = {"pat_str": PATTERN, "special_tokens": special, "chars": chars, "docs": docs, "shards": n_shards,
              "seconds": round(time.time() - start, 1)}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    for s in (signal.SIGTERM, signal.SIGINT):
        signal.signal(s, signal.SIG_IGN)  # from here on it takes milliseconds: all or nothing
    (out / "config.json").unlink(missing_ok=True)  # of an earlier tokenizer without tokenizer.tiktoken
    save(out / "tokenizer.tiktoken", "".join(lines))
    save(out / "config.json", json.dumps(config, indent=2) + "\n")
    print(f"saved in {out}: {args.vocab_size:,} ids, {bytes_per_token:.2f} bytes per token on its first 100 documents, "
          "round trip through tiktoken ok")


if __name__ == "__main__":
    main()
