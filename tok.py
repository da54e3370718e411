"""Trains the tokenizer: byte-level BPE (arXiv:1508.07909), in numpy, without a training library.

    python tok.py                      # 32,768 ids from the first 2 billion characters
    python tok.py --vocab-size 4096 --data-dir my/shards --out-dir my/tokenizer

Reads DATA_DIR/*.parquet with a string column `text` (`python pretrain.py --fetch 8` downloads the
first 8 shards of ClimbMix), except the last file by name, which is the validation set. Writes
OUT_DIR/tokenizer.tiktoken (a token and its rank per line, as tiktoken.load reads it) and, last,
OUT_DIR/config.json. Takes some minutes and 4 GB of memory.

The text is split into chunks, roughly words, and equal ones are counted. train_slowly() then shows
the algorithm; train() does the same thing fast, and finds exactly rustbpe's tokens. Left out:
encoding (use tiktoken), more than 65,536 ids.
"""
import argparse
import base64
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from heapq import heapify, heappop, heappush
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import regex  # comes with tiktoken
import tiktoken

# GPT-4's split pattern, but with at most two digits. A chunk is: 's 'll ..., or letters after at
# most one space or sign, or digits, or signs and the line ends after them, or white space up to a
# line end, or other white space (whose last character goes with a following word)
PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
           r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>",
           "<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>",
           "<|output_end|>"]  # the last ids, in this order
FETCH = "`python pretrain.py --fetch 8`"

# ---- Counting: text -> {chunk: how often} --------------------------------------------------------

split = regex.compile(PATTERN).findall  # text -> its chunks, which together are the text


class Shards(NamedTuple):
    """The files to read, their text column, and how many characters of each document to use."""
    paths: list
    column: str
    doc_cap: int

    def row_groups(self):
        """(path, index) of every row group, in order. ValueError names a file that has no rows, or
        no column of strings."""
        for path in self.paths:
            try:
                with pq.ParquetFile(path) as file:
                    kinds = {field.name: str(field.type) for field in file.schema_arrow}
                    rows, groups = file.metadata.num_rows, file.num_row_groups
            except (OSError, ValueError) as e:
                raise ValueError(f"{path}: {e}") from None
            if kinds.get(self.column) not in ("string", "large_string", "string_view"):
                found = f"of type {kinds[self.column]}" if self.column in kinds else "missing"
                raise ValueError(f"{path}: column {self.column!r}, which must hold strings, is "
                                 f"{found}")
            if rows == 0:
                raise ValueError(f"{path}: no documents in it")
            for group in range(groups):
                yield path, group

    def documents(self, path, group):
        """The documents of a row group, each cut at doc_cap characters. ValueError names a bad
        file."""
        try:
            with pq.ParquetFile(path) as file:
                texts = file.read_row_group(group, [self.column])[self.column].to_pylist()
        except (OSError, ValueError, KeyError) as e:
            raise ValueError(f"{path}: {e}") from None
        return [(text or "")[:self.doc_cap] for text in texts]


def count_row_group(shards, path, group, max_chars):
    """-> {chunk: count}, characters and documents of a row group, up to the document that reaches
    max_chars characters."""
    counts, chars, docs = Counter(), 0, 0
    for text in shards.documents(path, group):
        counts.update(split(text))
        chars, docs = chars + len(text), docs + 1
        if chars >= max_chars:
            break
    return counts, chars, docs


def count_row_groups(shards, max_chars, workers):
    """Yields path, group and what count_row_group returns, for all row groups in order."""
    if workers == 1:
        for path, group in shards.row_groups():
            yield path, group, *count_row_group(shards, path, group, max_chars)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    row_groups, waiting = shards.row_groups(), deque()
    try:
        while True:
            # Workers start here and inherit the block on Ctrl-C: the main process ends them
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            for path, group in islice(row_groups, 2 * workers - len(waiting)):
                counted = pool.submit(count_row_group, shards, path, group, max_chars)
                waiting.append((path, group, counted))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            if not waiting:
                return
            path, group, counted = waiting.popleft()
            yield path, group, *counted.result()
    finally:
        pool.shutdown(cancel_futures=True)


def count_chunks(shards, max_chars, workers):
    """The first max_chars characters -> {chunk: count}, characters, documents, shards read."""
    total, total_chars, total_docs, n_shards = Counter(), 0, 0, 0
    with closing(count_row_groups(shards, max_chars, workers)) as results:
        for path, group, counts, chars, docs in results:
            if shards.paths.index(path) == n_shards:  # the next shard begins
                n_shards += 1
                print(f"counting {path.name}, {total_chars:,} characters so far", flush=True)
            left = max_chars - total_chars
            if chars > left:  # the last one: recount only as far as needed
                counts, chars, docs = count_row_group(shards, path, group, left)
            total.update(counts)
            total_chars, total_docs = total_chars + chars, total_docs + docs
            if total_chars >= max_chars:
                break
    return total, total_chars, total_docs, n_shards


# ---- Merging: {chunk: how often} -> tokens -------------------------------------------------------

def train_slowly(counts, n_merges):
    """Byte pair encoding of {chunk: count} -> the tokens in the order of their ids: 256 bytes, then
    up to n_merges merges. Each merge joins the most frequent pair of adjacent tokens into a new
    token (ties: the smallest (left id, right id))."""
    tokens = [bytes([i]) for i in range(256)]
    chunks = [(list(chunk.encode()), count) for chunk, count in counts.items()]
    while len(tokens) < 256 + n_merges:
        pairs = Counter()
        for ids, count in chunks:
            for pair in zip(ids, ids[1:]):
                pairs[pair] += count
        if not pairs:
            break
        _, left, right = min((-count, *pair) for pair, count in pairs.items())
        for ids, _ in chunks:
            for i in range(len(ids)):  # from the left; ids shrinks on the way
                if ids[i:i + 2] == [left, right]:
                    ids[i:i + 2] = [len(tokens)]
        tokens.append(tokens[left] + tokens[right])
    return tokens


GAP, DEAD = 255, 254  # as ids: the bytes 0xFF and 0xFE never occur in UTF-8


def train(counts, n_merges):
    """The same tokens, fast: 32,503 merges in 168 million characters take 3.5 s, while train_slowly
    takes 2.6 s for each one. Three ideas:

    1. All chunks are in one array, with a GAP around each, so that numpy merges all occurrences of
       a pair at once. A token is written at its first and its last byte, with DEAD in between. So
       its neighbours are right beside it:

           GAP t h e GAP   -- t + h -->   GAP th th e GAP   -- th + e -->   GAP the DEAD the GAP

    2. A merge only looks at the places of its pair. They are found when the newer of its tokens is
       created; later, a pair can only lose places. So counts in the heap may be too high, never too
       low. The top one is counted again: if it was right, no pair is more frequent.
    3. Pairs rarer than a floor stay out of the heap. When it is empty, the floor is lowered."""
    ids, weight = lay_out(counts)
    length = np.ones(256 + n_merges, np.int64)  # bytes of each token
    tokens = [bytes([i]) for i in range(256)]

    # The last of 32,000 merges has a count near total / (10 x merges), by Zipf's law
    floor = max(1, sum(counts.values()) // (6 * max(1, n_merges)))
    while True:
        heap = find_pairs(ids, weight, length, first_places(ids, length), floor)
        heapify(heap)
        while heap and len(tokens) < 256 + n_merges:
            old_count, left, right, at = heappop(heap)  # the count is negative: most frequent first
            at = at[(ids[at] == left) & (ids[at + length[left]] == right)]
            count = -int(weight[at].sum())
            if count == old_count:
                new = len(tokens)
                tokens.append(tokens[left] + tokens[right])
                length[new] = len(tokens[new])
                changed = merge(ids, length, at, left, right, new)
                for pair in find_pairs(ids, weight, length, changed, floor):
                    heappush(heap, pair)
            elif -count >= floor:
                heappush(heap, (count, left, right, at))
        if floor == 1 or len(tokens) == 256 + n_merges:
            return tokens
        floor = max(1, floor // 4)


def lay_out(counts):
    """-> the ids of all places (uint16), and the count of the chunk at each place (int64)."""
    text = b"\xff" + b"".join([chunk.encode() + b"\xff" for chunk in counts])
    ids = np.frombuffer(text, np.uint8).astype(np.uint16)
    times = np.fromiter(counts.values(), np.int64, len(counts))
    return ids, np.repeat(times, np.diff(np.flatnonzero(ids == GAP)))


def first_places(ids, length):
    """The first place of every token, ascending for equal tokens."""
    live = np.flatnonzero((ids != GAP) & (ids != DEAD))
    longer = length[ids[live]] > 1  # these stand at two places each
    return np.concatenate((live[~longer], live[longer][::2]))


def find_pairs(ids, weight, length, at, floor):
    """The pairs whose left token is at one of the places `at` and whose count is >= floor -> a list
    of (-count, left id, right id, places of the left token). `at` ascends for equal tokens, and so
    do the places."""
    left = ids[at]
    right = ids[at + length[left]]
    inside = np.flatnonzero(right != GAP)
    order = inside[np.lexsort((right[inside], left[inside]))]  # equal pairs side by side
    if len(order) == 0:
        return []
    at, left, right = at[order], left[order], right[order]
    differs = (left[1:] != left[:-1]) | (right[1:] != right[:-1])
    begins = np.concatenate(([0], np.flatnonzero(differs) + 1))  # start of each pair
    ends = np.append(begins[1:], len(at))
    sums = np.add.reduceat(weight[at], begins)
    frequent = np.flatnonzero(sums >= floor)
    # Copies, because views would keep all of `at` in memory
    return [(-int(sums[i]), int(left[begins[i]]), int(right[begins[i]]),
             at[begins[i]:ends[i]].copy()) for i in frequent]


def merge(ids, length, at, left, right, new):
    """Writes `new` over the pair (left, right) at places `at` -> the places where new pairs
    begin."""
    size = length[left]
    if left == right:  # in a run a a a a, merge at the 1st, 3rd, ...
        run = np.flatnonzero(np.diff(at, prepend=at[0]) != size)  # where each run begins
        nth = np.arange(len(at)) - np.repeat(run, np.diff(run, append=len(at)))
        at = at[nth % 2 == 0]
    middle = at + size
    ids[middle - 1] = ids[middle] = DEAD
    ids[at] = ids[at + length[new] - 1] = new
    # New pairs begin at each new token, and at the token before it unless that is new, too
    before = ids[at - 1]
    old = np.flatnonzero((before != GAP) & (before != new))
    return np.concatenate((at, at[old] - length[before[old]]))


# ---- The command ---------------------------------------------------------------------------------

def check(tokens, special, texts):
    """Encodes and decodes texts with tiktoken -> bytes per token."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("tok", pat_str=PATTERN, mergeable_ranks=ranks,
                                 special_tokens=special,
                                 explicit_n_vocab=len(tokens) + len(special))
    ids = encoding.encode_ordinary_batch(texts)
    assert encoding.decode_batch(ids) == texts, "the round trip through tiktoken failed"
    return sum(len(text.encode()) for text in texts) / max(1, sum(map(len, ids)))


def save(path, text):
    """Writes to a temporary file, then renames it."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as e:
        part.unlink(missing_ok=True)
        sys.exit(f"cannot write {path} ({e.strerror}): make room or choose another --out-dir")


def above_zero(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_args():
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or "out")
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on a Mac
        cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"tok.py: {message}")  # one line, without the usage
    for name, default, text in (
            ("--data-dir", base / "data/climbmix", "folder with the parquet shards"),
            ("--text-column", "text", "the column of the shards that holds the text"),
            ("--out-dir", base / "tokenizer", "tokenizer folder; an existing one is kept"),
            ("--vocab-size", 32768, "ids in all: 256 bytes, the merges, 9 special tokens"),
            ("--max-chars", 2_000_000_000, "characters to train on, all if there are fewer"),
            ("--doc-cap", 10_000, "truncate documents to this length"),
            ("--workers", min(cores, 16), "counting processes; tokens are unaffected")):
        kind = above_zero if isinstance(default, int) else type(default)
        parser.add_argument(name, type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--check", action="store_true", help="only check the options")
    args = parser.parse_args()
    if not 256 + len(SPECIAL) <= args.vocab_size <= 2**16:
        parser.error(f"--vocab-size {args.vocab_size}: give {256 + len(SPECIAL)} to {2**16}")
    return args


def is_there(out, vocab_size):
    """Whether there is a complete tokenizer of that size. Exits if there is one of another size."""
    config = out / "config.json"
    if not (config.exists() and (out / "tokenizer.tiktoken").exists()):
        return False
    try:
        size = 1 + max(json.loads(config.read_text())["special_tokens"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        sys.exit(f"cannot read {config} ({e}): remove {out}, or choose another --out-dir")
    if size != vocab_size:
        sys.exit(f"the tokenizer in {out} has {size} ids, not {vocab_size}: remove that folder, "
                 "or choose another --out-dir")
    return True


def main():
    args, start = parse_args(), time.time()
    if args.check:
        return
    out, n_merges = args.out_dir, args.vocab_size - 256 - len(SPECIAL)
    if is_there(out, args.vocab_size):
        print(f"tokenizer exists, skipped: {out} (remove that folder to train another)")
        return
    paths = sorted(args.data_dir.glob("[!.]*.parquet"))[:-1]  # the last one is for validation
    if not paths:
        sys.exit(f"{args.data_dir} has fewer than 2 .parquet files (the last one by name is for "
                 f"validation): add some, or download some of ClimbMix with {FETCH}")
    shards = Shards(paths, args.text_column, args.doc_cap)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()  # better to fail now than after training
    except OSError as e:
        sys.exit(f"cannot write to {out} ({e.strerror}): choose another --out-dir")

    try:
        counts, chars, docs, n_shards = count_chunks(shards, args.max_chars, args.workers)
        sample = shards.documents(paths[0], 0)[:100]
    except ValueError as e:
        sys.exit(f"cannot read a shard: {' '.join(str(e).split())}; replace or remove it "
                 f"({FETCH} downloads missing shards of ClimbMix)")
    except BrokenProcessPool:
        sys.exit("a worker died, perhaps out of memory: try again with --workers 1")
    print(f"counted {chars:,} characters, {len(counts):,} distinct chunks "
          f"in {time.time() - start:.1f} s", flush=True)
    if chars < args.max_chars:
        print(f"fewer than the {args.max_chars:,} characters asked for: training on all of them")

    counted = time.time()
    tokens = train(counts, n_merges)
    print(f"merged {len(tokens) - 256:,} of {n_merges:,} pairs in {time.time() - counted:.1f} s")
    if len(tokens) < 256 + n_merges:
        sys.exit(f"{chars:,} characters are too few for --vocab-size {args.vocab_size}: "
                 f"give --vocab-size {len(tokens) + len(SPECIAL)} or less, or more text")

    special = {name: len(tokens) + i for i, name in enumerate(SPECIAL)}
    bytes_per_token = check(tokens, special, sample)
    config = {"pat_str": PATTERN, "special_tokens": special, "chars": chars, "docs": docs,
              "shards": n_shards, "seconds": round(time.time() - start, 1)}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the rest takes milliseconds
    for half in [out / "config.json", *out.glob(".*.part")]:  # of an unfinished tokenizer
        half.unlink(missing_ok=True)
    save(out / "tokenizer.tiktoken", "".join(lines))
    save(out / "config.json", json.dumps(config, indent=2) + "\n")
    print(f"saved in {out}: {args.vocab_size:,} ids, {bytes_per_token:.2f} bytes per token, "
          "round trip through tiktoken ok")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        sys.exit(f"tok.py: {e.filename}: {e.strerror}")
