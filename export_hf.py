"""Exports finished checkpoints to Hugging Face transformers, and moves them to and from the hub.

    python export_hf.py --tag d18_9tpp_drope_50                 # to hf_base/TAG and hf_sft/TAG
    python export_hf.py --tag d18_9tpp_drope_50 --push USER     # to four repositories of USER
    python export_hf.py --push USER --all --dry-run             # what a push of all would upload
    python export_hf.py --pull USER/nanochat-d18-9tpp           # a published tag, to train on here

Takes base_checkpoints/TAG, chatsft_checkpoints/TAG (a _long tag shares the base of the tag without
_long) and tokenizer. Gives folders that AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True) loads. An export takes seconds, is the same byte for byte whenever it is
made, and appears whole or not at all; export.json holds the hash of each of its files, and what is
damaged is made again. Uploads and downloads are compared with the hub's own hashes; an interrupted
push or pull is run again. HF_TOKEN or `hf auth login` say who you are.
"""
import signal, sys
if __name__ == "__main__":                                  # Ctrl-C while Python imports
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
import base64, functools, json, os, pickle, re, shutil, tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from model import (atomic_write, base_dir, checkpoint_files, fetch, file_hash, guard, load_part,
                   load_tokenizer, lock_file, newest_checkpoint, parse_config, read_meta,
                   read_use_rope, retry, token_bytes, tokenizer_hash)

HERE = Path(__file__).parent
MAX_POSITIONS = 32768                   # announced to transformers; RoPE and DroPE compute beyond
DOCUMENT, STOP = "<|bos|>", "<|assistant_end|>"     # what ends a text for a base, for a chat model
TAG = r"d\d+_\d+(\.\d+)?tpp(_drope_\d+)?(_long)?"


@dataclass
class Config:
    tag: str = ""                       # which model, such as d18_9tpp_drope_50
    stage: str = "all"                  # base, sft, or all: those of the two that are there
    push: str = ""                      # name of a user or organisation: publish the tag there
    all: bool = False                   # with --push: every finished tag instead of one
    private: bool = False               # with --push: make the repositories private
    dry_run: bool = False               # with --push: list files and sizes, upload nothing
    pull: str = ""                      # USER/nanochat-d18-9tpp: fetch that published tag


# ---- The tokenizer: tiktoken's ranks as tokenizer.json -------------------------------------------

# Text can spell a control token, and transformers would take it for one. So the chat template puts
# GUARD between "<" and "|" of what a message holds, and tokenizer.json deletes it after it has
# looked for control tokens. Where a message holds "<GUARD" itself, it becomes "<GUARDGUARD": just
# what was put there is deleted. All of that is data, so no tool has to run our code for it. (Only
# text outside of messages must not hold "<GUARD|": Unicode keeps both characters for programs.)
GUARD = "\ufdd0\ufdef"


def byte_alphabet():
    """GPT-2's way to write bytes as printable characters, in which tokenizer.json spells tokens:
    a list of 256."""
    ranges = ("!", "~"), ("\u00a1", "\u00ac"), ("\u00ae", "\u00ff")
    printable = [b for first, last in ranges for b in range(ord(first), ord(last) + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def tokenizer_json(enc):
    """The text of tokenizer.json, equal to tiktoken's `enc` on any text, control tokens aside.

    tiktoken joins the neighbours whose joint has the lowest rank, however it is divided; so every
    division of a token into two tokens is a merge here."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    ranks, alphabet = enc._mergeable_ranks, byte_alphabet()
    spell = {token: "".join(alphabet[b] for b in token) for token in ranks}
    merges = [(spell[token[:i]], spell[token[i:]]) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))    # whole chunks first
    tokenizer.normalizer = normalizers.Replace(Regex(f"(?<=<){GUARD}(?={GUARD}|\\|)"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(enc._pat_str), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(enc._special_tokens, key=enc._special_tokens.get))
    bos = (DOCUMENT, enc._special_tokens[DOCUMENT])
    tokenizer.post_processor = TemplateProcessing(f"{DOCUMENT} $A", f"{DOCUMENT} $A $B", [bos])
    if any(tokenizer.token_to_id(t) != i for t, i in enc._special_tokens.items()):
        sys.exit("the special tokens of the tokenizer do not come last: make it again with tok.py")
    return tokenizer.to_str(pretty=True) + "\n"


def tokenizer_from_json(text, folder):
    """The way back: tokenizer.json -> tok.py's two files, in `folder`."""
    data, byte_of = json.loads(text), {c: b for b, c in enumerate(byte_alphabet())}
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    steps = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
    pattern = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"][0]
    lines = ""
    for spelled, rank in sorted(data["model"]["vocab"].items(), key=lambda item: item[1]):
        if spelled not in special:
            token = base64.b64encode(bytes(byte_of[c] for c in spelled)).decode()
            lines += f"{token} {rank}\n"
    atomic_write(folder / "tokenizer.tiktoken", lines)
    atomic_write(folder / "config.json", dump({"pat_str": pattern, "special_tokens": special}))


def tokenizer_config(enc, stop):
    special = sorted(enc._special_tokens, key=enc._special_tokens.get)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, "modeling_nanochat.NanoChatTokenizer"]},
        "bos_token": DOCUMENT, "eos_token": stop, "pad_token": stop,
        "additional_special_tokens": [t for t in special if t not in (DOCUMENT, stop)],
        "padding_side": "left", "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_POSITIONS, "clean_up_tokenization_spaces": False}


# ---- One export ----------------------------------------------------------------------------------

def source_of(stage, tag):
    """The checkpoint folder of a tag; long-context models share the base of the others."""
    name = "chatsft_checkpoints" if stage == "sft" else "base_checkpoints"
    return base_dir() / name / export_of(stage, tag).name


def export_of(stage, tag):
    return base_dir() / f"hf_{stage}" / (tag if stage == "sft" else tag.removesuffix("_long"))


def newest(stage, tag):
    """(folder, step, meta) of a tag's newest undamaged checkpoint; without one, step is None."""
    folder = source_of(stage, tag)
    step = newest_checkpoint(folder)
    return folder, step, read_meta(folder, step) if step is not None else {}


def lacks(source, step, meta):
    """What a checkpoint lacks to be published, in words, or ""."""
    if step is None:
        return f"no checkpoint in {source}"
    if meta.get("finished", True) and meta.get("steps", step) == step:
        return ""                           # the nanochat repo's own metas say neither
    of = f" of {meta['steps']}" if "steps" in meta else ""
    return f"{source} is unfinished, at step {step}{of}"


def config_json(meta, use_rope, intermediate_size, enc, stop):
    m, code = meta["model_config"], "modeling_nanochat."
    return {
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat",
        "auto_map": {"AutoConfig": code + "NanoChatConfig", "AutoModel": code + "NanoChatModel",
                     "AutoModelForCausalLM": code + "NanoChatForCausalLM"},
        "vocab_size": m["vocab_size"], "hidden_size": m["n_embd"],
        "intermediate_size": intermediate_size, "num_hidden_layers": m["n_layer"],
        "num_attention_heads": m["n_head"], "num_key_value_heads": m["n_kv_head"],
        "head_dim": m["n_embd"] // m["n_head"], "hidden_act": "swiglu", "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "use_rope": use_rope, "logn_scale": 0.0, "final_logit_softcapping": 15.0,
        "max_position_embeddings": MAX_POSITIONS,
        "original_max_position_embeddings": m["sequence_len"],          # the training length
        "tie_word_embeddings": False, "bos_token_id": enc._special_tokens[DOCUMENT],
        "eos_token_id": enc._special_tokens[stop], "pad_token_id": enc._special_tokens[stop],
        "use_cache": True, "dtype": "bfloat16", "torch_dtype": "bfloat16"}


NAMES = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
         "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
         "mlp.w_gate": "mlp.gate_proj", "mlp.w_up": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}


def hf_weights(state, meta):
    """nanochat's names -> transformers', bfloat16; without the rows that pad the vocabulary."""
    m = meta["model_config"]
    weights = {"model.embed_tokens.weight": state["transformer.wte.weight"][:m["vocab_size"]],
               "lm_head.weight": state["lm_head.weight"][:m["vocab_size"]]}
    for i in range(m["n_layer"]):
        for ours, theirs in NAMES.items():
            weights[f"model.layers.{i}.{theirs}.weight"] = state[f"transformer.h.{i}.{ours}.weight"]
    return {name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}


def dump(obj):
    return json.dumps(obj, indent=2) + "\n"


def ingredients(source, step, meta):
    """What an export is made of, after one line and exit where that does not fit together. As long
    as nothing of it changes, there is nothing to do."""
    name, folder = checkpoint_files(source, step)["model"].name, base_dir() / "tokenizer"
    enc, vocab_size = load_tokenizer(folder), meta["model_config"]["vocab_size"]
    ours = tokenizer_hash(enc)
    if enc.n_vocab != vocab_size or meta.get("tokenizer", ours) != ours:
        sys.exit(f"{source} was not trained with the tokenizer in {folder} ({enc.n_vocab} ids, "
                 f"{ours}; the model: {vocab_size}, {meta.get('tokenizer', 'unnamed')}): put the "
                 "tokenizer of that run there")
    code = ("export_hf.py", "modeling_nanochat.py", "templates/chat_template.jinja")
    return {"model": meta.get("sha256", {}).get(name) or file_hash(source / name),
            "use_rope": read_use_rope(source, step), "tokenizer": ours,
            "finished": not lacks(source, step, meta),
            **{name: file_hash(HERE / name) for name in code}}


def inspect_export(folder):
    """(what export.json says, "" or what is wrong with the export)."""
    said = {}
    try:
        said = dict(json.loads((folder / "export.json").read_text()))
        damaged = [name for name, h in said["files"].items() if file_hash(folder / name) != h]
        return said, f"{damaged[0]} is damaged" if damaged else ""
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        return said, f"{type(e).__name__}: {e}"


def export(stage, tag, found=None):
    """Makes the export of a tag's newest checkpoint, unless it is there and whole; returns its
    folder. Of two at once, the second waits. found: what newest() found, to save a search."""
    source, step, meta = found or newest(stage, tag)
    if step is None:
        sys.exit(f"no checkpoint in {source}: `bash run_all.sh {tag}` trains that model (it is "
                 f"made by {'sft.py' if stage == 'sft' else 'pretrain.py'})")
    dest = export_of(stage, tag)
    with lock_file(dest.with_name(f".{dest.name}.lock"), wait=True):
        made_of = ingredients(source, step, meta)
        said, problem = inspect_export(dest)
        if not problem and said == {**made_of, "files": said["files"]}:
            print(f"{dest} is up to date (step {step}): skipped")
            return dest
        if not made_of["finished"] and dest.exists() and said.get("finished", True):
            sys.exit(f"{lacks(source, step, meta)}, and {dest} is the export of a finished model, "
                     "which stays: finish the training first, or delete that folder")
        if problem and dest.exists():
            print(f"{dest}: {problem}. It is exported again", file=sys.stderr)
        temp, old = dest.with_name(f".{dest.name}.new"), dest.with_name(f".{dest.name}.old")
        for leftover in (temp, old):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            write_export(temp, stage, source, step, meta, made_of)
        except OSError:
            shutil.rmtree(temp, ignore_errors=True)
            raise
        if dest.exists():                   # a folder cannot be replaced in one go
            os.rename(dest, old)
        os.rename(temp, dest)
        shutil.rmtree(old, ignore_errors=True)
    size = (dest / "model.safetensors").stat().st_size / 1e6
    use_rope = str(made_of["use_rope"]).lower()
    print(f"{source} step {step} -> {dest} (use_rope {use_rope}, {size:,.1f} MB)")
    return dest


def write_export(folder, stage, source, step, meta, made_of):
    from safetensors.torch import save     # (save_file gives files that only their owner may read)
    state, enc = load_part(source, step, "model"), load_tokenizer(base_dir() / "tokenizer")
    stop = STOP if stage == "sft" else DOCUMENT
    inner = state["transformer.h.0.mlp.w_up.weight"].size(0)
    config = config_json(meta, made_of["use_rope"], inner, enc, stop)
    stops = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {"config.json": dump(config), "generation_config.json": dump(stops),
             "tokenizer.json": tokenizer_json(enc),
             "tokenizer_config.json": dump(tokenizer_config(enc, stop)),
             "modeling_nanochat.py": (HERE / "modeling_nanochat.py").read_text("utf-8"),
             "model.safetensors": save(hf_weights(state, meta), {"format": "pt"})}
    if stage == "sft":
        template = HERE / "templates" / "chat_template.jinja"
        files["chat_template.jinja"] = template.read_text("utf-8")
    for name, content in files.items():
        atomic_write(folder / name, content)
    hashes = {name: file_hash(folder / name) for name in files}
    atomic_write(folder / "export.json", dump({**made_of, "files": hashes}))


# ---- The hub: push and pull ----------------------------------------------------------------------

# The four repositories of a tag, by the end of their names: ours, and the nanochat series' own
KINDS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "hf-base": "hf-base",
         "hf-sft": "hf-sft"}


def repo_name(user, tag, kind):
    return f"{user}/nanochat-{tag}-{kind}".replace("_", "-")


def card(kind, tag, user, found):
    """README.md of a repository: templates/model_card.jinja, filled in. found: newest() of base and
    sft."""
    import jinja2
    folder, jump, evaluation = found["base"][0], None, {}
    if (folder / "metrics.jsonl").exists():
        lines = map(json.loads, (folder / "metrics.jsonl").open())
        jump = next((line for line in lines if line.get("switch")), None)
    if (folder / "eval.json").exists():
        try:
            evaluation = json.loads((folder / "eval.json").read_text())
        except ValueError:
            sys.exit(f"{folder / 'eval.json'} is damaged: delete it, and run eval.py again")
    text = (HERE / "templates" / "model_card.jinja").read_text("utf-8")
    metas = {stage: meta for stage, (_, _, meta) in found.items()}
    return jinja2.Template(text, trim_blocks=True, lstrip_blocks=True).render(
        kind=kind, tag=tag, user=user, metas=metas, jump=jump, repo_name=repo_name,
        logn_scale=evaluation.get("sections", {}).get("scale", {}).get("c"))


def repo_files(kind, tag, user, found, temp):
    """What belongs into a repository: its path there -> a file here, some of them new in temp."""
    stage = kind.removeprefix("hf-")
    atomic_write(temp / "README.md", card(kind, tag, user, found) + "\n")
    if kind != stage:
        folder = export(stage, tag, found[stage])
        paths = [folder / name for name in (*inspect_export(folder)[0]["files"], "export.json")]
    else:
        folder, step, _ = found[stage]
        parts = checkpoint_files(folder, step)
        paths = [parts["model"], parts["optim"], parts["meta"], folder / "metrics.jsonl",
                 folder / "questions.jsonl"]
        enc = load_tokenizer(base_dir() / "tokenizer")
        atomic_write(temp / "tokenizer" / "tokenizer.pkl", pickle.dumps(enc, protocol=4))
        nbytes = token_bytes(enc).int()
        atomic_write(temp / "tokenizer" / "token_bytes.pt", lambda file: torch.save(nbytes, file))
    files = {path.name: path for path in paths if path.exists()}
    made = {str(path.relative_to(temp)): path for path in temp.rglob("*") if path.is_file()}
    return {**files, **made}


def hub_files(repo):
    """Every file of a hub repository: path -> its hash there, as model.py's fetch takes it."""
    from huggingface_hub import HfApi
    files = [f for f in HfApi().list_repo_tree(repo, recursive=True) if hasattr(f, "blob_id")]
    return {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in files}


def fill(repo, files, private, message):
    """Uploads in one commit what the hub has not got, then compares all with its hashes. Returns
    how many files were sent."""
    from huggingface_hub import CommitOperationAdd, HfApi
    api, hashed = HfApi(), functools.cache(file_hash)

    def missing():
        there = hub_files(repo)
        return [path for path, file in files.items() if path not in there
                or hashed(file, git=len(there[path]) == 40) != there[path]]

    if private and api.repo_exists(repo) and not api.repo_info(repo).private:
        sys.exit(f"{repo} is public already: make it private on the hub, or leave out --private")
    api.create_repo(repo, private=private or None, exist_ok=True)
    new = missing()
    if new:
        operations = [CommitOperationAdd(path, files[path]) for path in new]
        api.create_commit(repo, operations, commit_message=message)
        wrong = missing()
        if wrong:
            raise ValueError(f"what arrived of {', '.join(wrong)} is not what was sent")
    return len(new)


def push(user, tags, cfg):
    """Fills four repositories for each tag, or with --dry-run lists what would go there. Of several
    tags, those that are not finished are left out."""
    from huggingface_hub import get_token
    if not cfg.dry_run and not get_token():
        sys.exit("publishing needs a token with write access: set HF_TOKEN, or `hf auth login`")
    total = 0
    for tag in tags:
        found = {stage: newest(stage, tag) for stage in ("base", "sft")}
        problem = lacks(*found["base"]) or lacks(*found["sft"])
        if problem and not cfg.all:
            sys.exit(f"{problem}: only finished tags are published")
        if problem:
            print(f"{tag} is left out: {problem}")
            continue
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as temp:
                repo = repo_name(user, tag, kind)
                files = repo_files(kind, tag, user, found, Path(temp))
                if cfg.dry_run:
                    sizes = {path: file.stat().st_size for path, file in files.items()}
                    print("\n".join([repo, *(f"{n:>15,}  {path}" for path, n in sizes.items())]))
                    total += sum(sizes.values())
                    continue
                fill_it = functools.partial(fill, repo, files, cfg.private, f"{tag}, {kind}")
                sent = retry(repo, 300, fill_it)
                print(f"{repo}: {sent} files sent, all {len(files)} checked", flush=True)
    if cfg.dry_run:
        print(f"{total / 1e9:,.2f} GB; nothing was uploaded")


def find(user, tag, kind):
    """(repository, hub_files of it) of a published tag, under our name or the nanochat series' own.
    The base of a _long tag may be there without the _long only."""
    from huggingface_hub.errors import RepositoryNotFoundError
    tags = dict.fromkeys([tag, tag.removesuffix("_long")] if kind == "base" else [tag])
    names = [repo_name(user, t, kind) for t in tags]
    names += [f"{user}/{t.replace('_', '-')}-{KINDS[kind]}" for t in tags]

    def attempt():
        for name in names:
            try:
                return name, hub_files(name)
            except RepositoryNotFoundError:
                pass
        sys.exit(f"the hub has neither {' nor '.join(names)}, or they are not for "
                 "you: HF_TOKEN takes a token that may read them")

    return retry(names[0], 60, attempt)


def get(repo, there, path, dest):
    """Downloads a file of a repository with the hashes `there`, unless it is here undamaged."""
    if path not in there:
        sys.exit(f"{repo} has no {path}")
    if dest.exists() and file_hash(dest, git=len(there[path]) == 40) != there[path]:
        dest.unlink()
    return fetch(repo, path, dest, repo_type="model", sha256=there[path])


def pull(name):
    """Fetches a published tag: the native checkpoints of both stages and tokenizer.json, never the
    pickle."""
    kinds = "|".join([*KINDS, *KINDS.values()])
    tag = TAG.replace("_", "-").replace("(", "(?:")
    found = re.fullmatch(rf"([\w.-]+)/(?:nanochat-)?({tag})(?:-(?:{kinds}))?", name)
    if not found:
        sys.exit(f"--pull {name}: give it as USER/nanochat-d18-9tpp-drope-50")
    user, tag = found[1], found[2].replace("-", "_")
    with tempfile.TemporaryDirectory() as temp:
        pull_tokenizer(user, tag, Path(temp))
        for stage in ("base", "sft"):
            pull_checkpoint(user, tag, stage, Path(temp))


def pull_tokenizer(user, tag, temp):
    repo, there = find(user, tag, "hf-sft")
    try:
        path = get(repo, there, "tokenizer.json", temp / "tokenizer.json")
        tokenizer_from_json(path.read_text("utf-8"), temp)
    except (ValueError, KeyError, IndexError) as e:
        sys.exit(f"tokenizer.json of {repo} cannot be read as one of nanochat ({e!r})")
    folder, new = base_dir() / "tokenizer", load_tokenizer(temp)
    if (folder / "tokenizer.tiktoken").exists() and (folder / "config.json").exists():
        if tokenizer_hash(load_tokenizer(folder)) != tokenizer_hash(new):
            sys.exit(f"{folder} holds another tokenizer than {repo}: set NANOCHAT_BASE_DIR to "
                     "another folder")
    for file in ("tokenizer.tiktoken", "config.json"):
        atomic_write(folder / file, (temp / file).read_bytes())


def pull_checkpoint(user, tag, stage, temp):
    (repo, there), folder = find(user, tag, stage), source_of(stage, tag)
    steps = [int(path[5:-5]) for path in there if re.fullmatch(r"meta_\d{6,}\.json", path)]
    if not steps:
        sys.exit(f"{repo} holds no checkpoint")
    step, files = max(steps), checkpoint_files(folder, max(steps))
    try:
        lock = lock_file(folder / ".lock", wait=False)
    except BlockingIOError:
        sys.exit(f"{folder} is in use by another pull, or a run: wait for it, then pull again")
    with lock:
        here = newest_checkpoint(folder)
        if here == step:
            return print(f"{folder} is there already: skipped")
        if here is not None:
            sys.exit(f"{folder} holds another run (step {here}, not {step}): set NANOCHAT_BASE_DIR "
                     "to another folder")
        parts = [files["model"].name, files["optim"].name]
        for path in parts + [p for p in ("metrics.jsonl", "questions.jsonl") if p in there]:
            get(repo, there, path, folder / path)
        meta = json.loads(get(repo, there, files["meta"].name, temp / f"{stage}.json").read_text())
        # Checkpoints of the nanochat repo lost use_rope in fine-tuning; the tag says what it was
        said = meta.setdefault("loop_state", {}).get("use_rope")
        meta["loop_state"]["use_rope"] = use_rope = "_drope_" not in tag
        if said != use_rope:
            print(f"{repo} says use_rope {said}; set to {use_rope}, as its name says")
        meta["sha256"] = {path: file_hash(folder / path) for path in parts}
        atomic_write(files["meta"], json.dumps(meta, indent=1))     # last: it vouches for the rest
        print(f"{repo} -> {folder}, step {step}")


# ---- Main ----------------------------------------------------------------------------------------

def refuse_what_does_not_fit(cfg):
    for word in ("all", "private", "dry_run"):
        if getattr(cfg, word) and not cfg.push:
            sys.exit(f"--{word.replace('_', '-')} goes with --push")
    if cfg.stage not in ("base", "sft", "all"):
        sys.exit(f"--stage {cfg.stage}: choose base, sft or all")
    if (cfg.pull != "") + (cfg.tag != "") + cfg.all > 1 or cfg.pull and cfg.push:
        sys.exit("--tag, --all and --pull each say which model: give one; --pull without --push")
    if cfg.push and not re.fullmatch(r"[\w.-]+", cfg.push):
        sys.exit(f"--push {cfg.push}: give the name of a user or an organisation of the hub")
    if not (cfg.pull or cfg.all or re.fullmatch(r"\w[\w.-]*", cfg.tag)):
        sys.exit("which model? --tag d18_9tpp_drope_50 (see --help)")


def main(args=None):
    cfg = parse_config(Config, __doc__, args)
    refuse_what_does_not_fit(cfg)
    if cfg.pull:
        return pull(cfg.pull)
    tags = [cfg.tag]
    if cfg.all:
        folders = base_dir() / "chatsft_checkpoints"
        tags = sorted(f.name for f in folders.glob("d*tpp*") if re.fullmatch(TAG, f.name))
        if not tags:
            sys.exit(f"no tags in {folders}: `bash run_all.sh release` makes them")
    if cfg.push:
        return push(cfg.push, tags, cfg)
    stages = ["base", "sft"] if cfg.stage == "all" else [cfg.stage]
    there = [stage for stage in stages if source_of(stage, cfg.tag).is_dir()]
    for stage in there or stages:
        export(stage, cfg.tag)


if __name__ == "__main__":
    guard(main)
