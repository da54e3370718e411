"""Talk to a fine-tuned model, or score it on questions whose answers are known.

    python chat.py d18_9tpp_drope_50                    # a conversation in the terminal
    python chat.py d18_9tpp_drope_50 --prompt "Hi!"     # one answer (without --prompt: to stdin)
    python chat.py d18_9tpp d18_9tpp_drope_50 --score   # MMLU, GSM8K, SpellingBee: a table

In a conversation, Ctrl-C interrupts an answer, /clear starts over and /quit ends it. Reads
chatsft_checkpoints/TAG and the tokenizer. --score asks the held-out questions that sft.py left
there, writes chat.json beside them, and takes about 10 minutes per model on an H100 (estimated).

The model can use Python as a calculator: it writes a call, and this program inserts the result, as
in the conversations of sft.py. Left out: few-shot prompts, beam search, speculative decoding.
"""
import codecs, random, re, sys, warnings
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F

from model import (KVCache, Results, base_dir, checkpoint_steps, encode, file_hash, folder_of,
                   generate, guard, load_model, most_likely, one_line, option, parse_config,
                   read_lines, setup_env, tokenizer_of, weights_hash, wilson)


@dataclass
class Config:
    tags: tuple = option((), "the models, such as d18_9tpp_drope_50; several with --score",
                         positional=True)
    prompt: str = option("", "print one answer to this, and stop")
    temperature: float = option(0.6, "0: always the most likely token")
    top_k: int = option(50, "sample from this many of the most likely tokens", 1)
    seed: int = option(42, "of the sampling", 0, 2 ** 32 - 1)
    max_tokens: int = option(512, "of an answer", 1)
    score: bool = option(False, "score the models on the held-out questions")
    questions: int = option(100_000, "of each kind, at most", 1)
    check: bool = option(False, "only check the options")


# ---- The python tool -----------------------------------------------------------------------------

def calculator(call):
    """The python tool: the result of arithmetic or of 'word'.count('x') as text; None for other
    calls. A model wrote the call, so eval() only gets up to 200 digits, + - * / % ( ), no
    powers."""
    call = call.strip()
    count = re.fullmatch(r"""(["'])(\w*)\1\.count\((["'])(\w)\3\)""", call)
    if count:
        return str(count[2].count(count[4]))
    if not re.fullmatch(r"[0-9.+\-*/%() ]{1,200}", call) or "**" in call:
        return None
    try:
        with warnings.catch_warnings():  # Python warns about "1(2)"
            warnings.simplefilter("ignore")
            value = eval(call, {"__builtins__": {}})
        if abs(value) < 1e15:  # neither infinite nor nan
            return f"{round(value, 10) + 0:.10f}".rstrip("0").rstrip(".")
    except (SyntaxError, TypeError, ArithmeticError, RecursionError, MemoryError):
        pass
    return None


# ---- A model and its chat format -----------------------------------------------------------------

class Chat:
    """A fine-tuned model, its tokenizer, and the chat format between them."""

    def __init__(self, tag, env):
        found = [base for base in (base_dir(), base_dir() / "tiny")
                 if checkpoint_steps(folder_of("sft", tag, base))]
        base = found[0] if found else base_dir()
        self.folder = folder_of("sft", tag, base)
        self.model, meta = load_model(self.folder, env.device, env.dtype)
        self.enc, self.step = tokenizer_of(meta, base), meta["step"]

    def special(self, name):
        """The id of the special token <|name|>. Text is never encoded to it."""
        return self.enc.encode_single_token(f"<|{name}|>")

    def question(self, text):
        """The ids of a question, up to the beginning of the answer."""
        return [self.special("user_start"), *encode(self.enc, [text])[0], self.special("user_end"),
                self.special("assistant_start")]

    def answer(self, texts, n, choose=most_likely, cache=None):
        """Like generate(), for texts that end where an answer begins: yields the next id of each,
        up to n times, until all answers have ended. Inserts the results of calls to Python."""
        call_start, call_end = self.special("python_start"), self.special("python_end")
        outside = [self.special(name) for name in ("bos", "user_start", "user_end",
                                                   "assistant_start", "assistant_end")]
        rows, forced = [[] for _ in texts], [[] for _ in texts]
        ended = [False] * len(texts)
        for ids in generate(self.model, texts, n, choose, cache):
            for b, row in enumerate(rows):
                if forced[b]:  # the result of a call
                    ids[b] = forced[b].pop(0)
                elif ids[b] in outside:  # the end, or not part of an answer
                    ids[b], ended[b] = self.special("assistant_end"), True
                elif ids[b] == call_end and call_start in row:
                    start = len(row) - row[::-1].index(call_start)
                    result = calculator(self.enc.decode(row[start:]))
                    if result is not None:
                        forced[b] = [self.special("output_start"), *encode(self.enc, [result])[0],
                                     self.special("output_end")]
                row.append(ids[b])
            yield ids
            if all(ended):
                return


def sampler(temperature, top_k, seed):
    """A function from logits (B, V) to ids (B,), each drawn from the top_k of its row."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits):
        top, ids = logits.cpu().double().topk(min(top_k, logits.size(-1)))  # (B, k), sorted
        probs = F.softmax((top - top[:, :1]) / temperature, dim=-1)
        return ids.gather(1, torch.multinomial(probs, 1, generator=generator))[:, 0]

    return choose if temperature else most_likely


# ---- Talking -------------------------------------------------------------------------------------

class Conversation:
    """Questions and answers in turn, as ids, and the cache of what the model has read of them."""

    def __init__(self, chat, max_tokens, choose):
        self.chat, self.choose, self.turns = chat, choose, []
        self.limit = chat.model.config.sequence_len  # it was not trained on longer ones
        self.room = min(max_tokens, self.limit // 2)  # for an answer
        self.cache = KVCache(chat.model, 1, self.limit)

    def ids(self):
        return [self.chat.special("bos")] + sum(self.turns, [])

    def ask(self, text):
        """Yields the ids of the answer. However the answer ends (by itself, at its limit, or
        because the caller stops it), the conversation stays well-formed. ValueError if the question
        is too long."""
        turn = self.chat.question(text)
        if 1 + len(turn) + self.room > self.limit:
            raise ValueError(f"that has {len(turn)} tokens, but the model can read "
                             f"{self.limit - self.room - 1}: say it in fewer words")
        self.turns.append(turn)
        try:
            dropped = 0
            while len(self.ids()) + self.room > self.limit:
                self.cache.lengths.zero_()  # the remaining tokens change position
                dropped += 1
                del self.turns[0]
            if dropped:
                print(f"(the conversation is too long: forgetting its first {dropped} turns)",
                      file=sys.stderr)
            for [token] in self.chat.answer([self.ids()], self.room, self.choose, self.cache):
                turn.append(token)
                yield token
        finally:
            self.close(turn)

    def close(self, turn):
        """Ends an answer that was cut short, and removes an incomplete call to Python."""
        def last(name):
            token = self.chat.special(name)
            return len(turn) - 1 - turn[::-1].index(token) if token in turn else -1

        if (last("python_start") > last("python_end") or last("output_start") > last("output_end")
                or turn[-1] == self.chat.special("python_end")):
            del turn[last("python_start"):]
        if turn[-1] != self.chat.special("assistant_end"):
            turn.append(self.chat.special("assistant_end"))
        self.cache.lengths.clamp_(max=len(self.ids()) - 1)  # forgets what was removed


def show(chat, tokens):
    """Prints an answer as it is generated, a call to Python as <<12*3>>[36]."""
    shown = {"python_start": "<<", "python_end": ">>", "output_start": "[", "output_end": "]"}
    shown = {chat.special(name): text for name, text in shown.items()}
    characters = codecs.getincrementaldecoder("utf-8")("replace")  # may span tokens
    specials = chat.enc._special_tokens.values()
    with closing(tokens):  # at Ctrl-C, too
        for token in tokens:
            text = shown.get(token, "")
            if token not in specials:
                text = characters.decode(chat.enc.decode_single_token_bytes(token))
            print(text, end="", flush=True)
    print(characters.decode(b"", final=True))


def talk(chat, conversation):
    with suppress(ImportError):  # gives input() arrow keys
        import_module("readline")
    print(f"{chat.folder}. Ctrl-C interrupts an answer, /clear starts over, Ctrl-D or /quit ends.")
    while True:
        try:
            text = input("> ").strip()
            if text == "/quit":
                return
            if text == "/clear":
                conversation.turns.clear()
                conversation.cache.lengths.zero_()
            elif "\ufffd" in text:
                print("that was not UTF-8: say it again")
            elif text:
                show(chat, conversation.ask(text))
        except ValueError as e:
            print(e)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return print()


# ---- Scoring -------------------------------------------------------------------------------------

def final_answer(content):
    """The number after the last #### of an answer (text or a list of parts), without commas; or the
    letter that is the whole answer; else None."""
    text = content if isinstance(content, str) else content[-1]["text"]
    found = re.findall(r"#### *(-?[\d.,]*\d)|^([A-H])$", text)
    return "".join(found[-1]).replace(",", "") if found else None


def letters_only(chat, questions):
    """For generate(): chooses the most likely of the letters that each question offers."""
    offered = [re.findall(r"=([A-H])$", question, re.M) for question in questions]
    offered = [[chat.enc.encode_single_token(letter) for letter in some] for some in offered]

    def choose(logits):
        best = [some[row[some].argmax()] for some, row in zip(offered, logits.cpu())]
        return torch.tensor(best)

    return choose


def score(chat, examples, n, at_once):
    """Asks questions whose answers are known, those of similar length together, and decodes
    greedily. examples: [(question, answer), ...]; n: most tokens of an answer, 0 for a letter."""
    examples, given = sorted(examples, key=lambda pair: len(pair[0])), []
    for i in range(0, len(examples), at_once):
        questions = [question for question, _ in examples[i:i + at_once]]
        texts = [[chat.special("bos"), *chat.question(question)] for question in questions]
        choose = most_likely if n else letters_only(chat, questions)
        given += zip(*chat.answer(texts, n or 1, choose))  # the ids of each answer
    end, records = chat.special("assistant_end"), []
    for (question, expected), ids in zip(examples, given):
        stops = end in ids
        answer = chat.enc.decode(ids[:ids.index(end)] if stops else ids)
        records.append(dict(question=question, expected=expected, answer=answer, stops=stops,
                            right=final_answer(answer) == expected))
    count = len(records)
    return dict(n=count, rate=wilson(sum(record["right"] for record in records), count),
                stops=wilson(sum(record["stops"] for record in records), count), examples=records)


def read_questions(path):
    """{kind: [(question, correct answer), ...]} from the questions.jsonl that sft.py wrote."""
    records, kinds = read_lines(path, {"source": str, "messages": list}), {}
    try:
        for record in records:
            question, answer = record["messages"]
            right = final_answer(answer["content"])
            if right is None or not isinstance(question["content"], str):
                raise ValueError("a question has no text, or an answer no result")
            if record["source"] == "mmlu" and not re.search("=[A-H]$", question["content"], re.M):
                raise ValueError("multiple choice without choices")
            kinds.setdefault(record["source"], []).append((question["content"], right))
    except (ValueError, LookupError, TypeError) as e:
        sys.exit(f"{path} is damaged ({one_line(e)}): sft.py wrote it at the end of its run")
    return kinds


KINDS = {"mmlu": "MMLU", "gsm8k": "GSM8K", "spellingbee": "SpellingBee"}


def score_tag(tag, cfg, env):
    """Scores a model, unless its scores are in chat.json. Returns a row of the table."""
    chat = Chat(tag, env)
    path = chat.folder / "questions.jsonl"
    kinds = read_questions(path)
    if not kinds:
        print(f"no questions in {path}: sft.py writes those of its held-out sources",
              file=sys.stderr)
    key = dict(sha256=weights_hash(chat.folder, chat.step), max_tokens=cfg.max_tokens,
               questions=cfg.questions, file=file_hash(path) if kinds else "")
    results, cells = Results(chat.folder / "chat.json", key), [tag]
    at_once = 64 if env.device.type == "cuda" else 16
    for kind in KINDS:
        if kind in kinds:
            some = kinds[kind]
            some = random.Random(42).sample(some, min(len(some), cfg.questions))
            n = 0 if kind == "mmlu" else cfg.max_tokens
            found = results.part([kind], score, chat, some, n, at_once)
            cells.append("{:.3f} [{:.3f}, {:.3f}]".format(*found["rate"]) + f" of {found['n']}")
        else:
            cells.append("-")
    bee = results.parts.get("spellingbee")
    return [*cells, f"{bee['stops'][0]:.2f}" if bee else "-"]


def main():
    cfg = parse_config(Config, __doc__)
    if not cfg.tags or len(cfg.tags) > 1 and not cfg.score:
        sys.exit("which model? `python chat.py d18_9tpp_drope_50`, for example (with --score also "
                 "several)")
    if cfg.check:
        return
    env = setup_env(compile=0)
    if cfg.score:
        rows = [score_tag(tag, cfg, env) for tag in cfg.tags]
        head = ["right answers [95% interval]", *KINDS.values(), "SpellingBee ends its turn"]
        for line in [head, ["---"] * len(head), *rows]:
            print(f"| {' | '.join(line)} |")
        return
    chat = Chat(cfg.tags[0], env)
    choose = sampler(cfg.temperature, cfg.top_k, cfg.seed)
    conversation = Conversation(chat, cfg.max_tokens, choose)
    prompt = cfg.prompt
    if not prompt and sys.stdin:  # None if it is closed
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8
        if sys.stdin.isatty():
            return talk(chat, conversation)
        prompt = sys.stdin.read()
    prompt = prompt.strip()
    if not prompt:
        sys.exit("nothing to answer: give --prompt TEXT, or text on stdin")
    try:
        show(chat, conversation.ask(prompt))
    except ValueError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    guard(main)
