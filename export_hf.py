"""Exports finished checkpoints to Hugging Face transformers, and moves them to and from the hub.

    python export_hf.py --tag d18_9tpp_drope_50                 # to hf_base/TAG and hf_sft/TAG
    python export_hf.py --tag d18_9tpp_drope_50 --push USER     # to four repositories of USER
    python export_hf.py --push USER --all --dry-run             # what a push of all would upload
    python export_hf.py --pull USER/nanochat-d18-9tpp           # a published tag, to train on here

Takes base_checkpoints/TAG, chatsft_checkpoints/TAG (a _long tag shares the base of the tag without
_long) and tokenizer. Gives, in seconds, folders for AutoModelForCausalLM.from_pretrained(folder,
trust_remote_code=True), the same byte for byte whenever they are made. An export appears whole or
not at all, and is made again where a byte is wrong. Uploads and downloads are compared with the
hub's hashes; run an interrupted one again. HF_TOKEN or `hf auth login` authenticates you.
"""
import signal, sys
if __name__ == "__main__":                                  # Ctrl-C while Python imports
    signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted"))
import base64, functools, hashlib, itertools, json, os, pickle, re, shutil, tempfile, types
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch

from model import (Damaged, GPTConfig, atomic_write, base_dir, checkpoint_files, fetch, file_hash,
                   guard, hub_file, load_part, load_tokenizer, lock_file, newest_checkpoint,
                   parse_config, read_lines, read_meta, results_of, retry, token_bytes,
                   tokenizer_hash, tokenizer_of, weights_hash)

HERE = Path(__file__).parent
TAG = r"d\d+_\d+(?:\.\d+)?tpp(?:_drope_\d+)?(?:_long)?"
STOP = {"base": "<|bos|>", "sft": "<|assistant_end|>"}      # what ends a text that a model writes
# The four repositories of a tag, by the end of their names: ours, and the nanochat series' own
KINDS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "hf-base": "hf-base",
         "hf-sft": "hf-sft"}


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
# looked for control tokens. A message's own "<GUARD" becomes "<GUARDGUARD", so that just what was
# put there is deleted. All of that is data: no tool has to run our code for it. (In text outside of
# messages "<GUARD|" and "<GUARDGUARD" lose one GUARD. Unicode keeps both characters for programs.)
GUARD = "\ufdd0\ufdef"


def byte_alphabet():
    """GPT-2's way to write each of the 256 bytes as a printable character, in tokenizer.json."""
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
    ranks, special, alphabet = enc._mergeable_ranks, enc._special_tokens, byte_alphabet()
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
    tokenizer.add_special_tokens(sorted(special, key=special.get))          # they get the last ids
    bos = ("<|bos|>", special["<|bos|>"])
    tokenizer.post_processor = TemplateProcessing("<|bos|> $A", "<|bos|> $A $B", [bos])
    return tokenizer.to_str(pretty=True).encode() + b"\n"


def tokenizer_from_json(text, folder):
    """The way back: tokenizer.json -> tok.py's two files, in `folder`."""
    data, alphabet = json.loads(text), byte_alphabet()
    pattern = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    lines, vocab = "", data["model"]["vocab"]
    for spelled in sorted(vocab, key=vocab.get):
        if spelled not in special:
            token = base64.b64encode(bytes(map(alphabet.index, spelled))).decode()
            lines += f"{token} {vocab[spelled]}\n"
    atomic_write(folder / "tokenizer.tiktoken", lines)
    atomic_write(folder / "config.json", dump({"pat_str": pattern, "special_tokens": special}))


# ---- The files of an export ----------------------------------------------------------------------

def dump(obj):
    return json.dumps(obj, indent=2).encode() + b"\n"


def configs(meta, use_rope, special, stop):
    """config.json and tokenizer_config.json of a model. special: control token -> id. templates/
    holds what all have in common (and some values of d18)."""
    m, texts = GPTConfig(**meta["model_config"]), HERE / "templates"
    config = json.loads((texts / "config.json").read_text())
    config.update(
        vocab_size=m.vocab_size, hidden_size=m.n_embd, intermediate_size=m.intermediate_size,
        num_hidden_layers=m.n_layer, num_attention_heads=m.n_head, num_key_value_heads=m.n_kv_head,
        head_dim=m.n_embd // m.n_head, original_max_position_embeddings=m.sequence_len,
        use_rope=use_rope, bos_token_id=special["<|bos|>"], eos_token_id=special[stop],
        pad_token_id=special[stop])
    others = [token for token in special if token not in ("<|bos|>", stop)]
    tokenizer_config = json.loads((texts / "tokenizer_config.json").read_text())
    tokenizer_config.update(eos_token=stop, pad_token=stop, additional_special_tokens=others)
    return config, tokenizer_config


NAMES = {"transformer.wte": "model.embed_tokens", "transformer.h.": "model.layers.",
         "attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj",
         "attn.c_v": "self_attn.v_proj", "attn.c_proj": "self_attn.o_proj",
         "mlp.w_gate": "mlp.gate_proj", "mlp.w_up": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}


def hf_weights(state, vocab_size):
    """nanochat's names -> transformers', bfloat16; without the rows that pad the vocabulary."""
    weights = {}
    for name, w in state.items():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            w = w[:vocab_size]
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = w.to(torch.bfloat16).contiguous()
    return weights


def export_files(source):
    """Name -> content of all files of an export, in bytes; the same whenever they are made."""
    from safetensors.torch import save
    enc, m = tokenizer_of(source.meta, base_dir()), source.meta["model_config"]
    use_rope, stop = source.meta["loop_state"]["use_rope"], STOP[source.stage]
    weights = hf_weights(load_part(source.folder, source.step, "model"), m["vocab_size"])
    config, tokenizer_config = configs(source.meta, use_rope, enc._special_tokens, stop)
    stops = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    files = {"config.json": dump(config), "generation_config.json": dump(stops),
             "tokenizer.json": tokenizer_json(enc), "tokenizer_config.json": dump(tokenizer_config),
             "modeling_nanochat.py": (HERE / "modeling_nanochat.py").read_bytes(),
             "model.safetensors": save(weights, {"format": "pt"})}
    if source.stage == "sft":
        files["chat_template.jinja"] = (HERE / "templates/chat_template.jinja").read_bytes()
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    about = {"step": source.step, "finished": not source.lacks, "files": hashes}
    return {**files, "export.json": dump(about)}


def folders(stage, tag):
    """(checkpoints, export) of a tag; long-context models share the base of the others."""
    name = tag if stage == "sft" else tag.removesuffix("_long")
    return base_dir() / KINDS[stage] / name, base_dir() / f"hf_{stage}" / name


def newest(stage, tag):
    """A tag's newest undamaged checkpoint, if any, and what it lacks to be published, in words."""
    folder, dest = folders(stage, tag)
    step, meta, lacks = newest_checkpoint(folder), {}, f"no checkpoint in {folder}"
    if step is not None:
        meta, lacks = read_meta(folder, step), ""
        steps = meta.get("steps", step)     # the nanochat repo's own metas say neither of the two
        if step != steps or not meta.get("finished", True):
            lacks = f"{folder} is unfinished, at step {step} of {steps}"
    return types.SimpleNamespace(stage=stage, folder=folder, dest=dest, step=step, meta=meta,
                                 lacks=lacks)


def settle(temp, dest):
    """Cleans up after an export, also an interrupted one: there is always an old or a new folder,
    and the new one gets the files that somebody else has put into the old one."""
    old = temp / "old"
    if old.exists() and not dest.exists():
        os.rename(old, dest)
    if old.exists():
        try:
            ours = json.loads((old / "export.json").read_text())["files"].keys() | {"export.json"}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            ours = set()
        for path in old.iterdir():
            if path.name not in ours and not (dest / path.name).exists():
                os.rename(path, dest / path.name)
    shutil.rmtree(temp, ignore_errors=True)


def export(source):
    """Makes the export of newest()'s checkpoint, unless just that is there; returns its files."""
    dest, temp = source.dest, source.dest.with_name(f".{source.dest.name}.temp")
    if source.step is None:
        sys.exit(f"{source.lacks}: `bash run_all.sh {dest.name}` trains that model")
    if dest.exists() and not dest.is_dir():
        sys.exit(f"{dest} is a file: move it away, an export is a folder")
    with lock_file(dest.with_name(f".{dest.name}.lock"), wait=600):    # of two at once, one waits
        settle(temp, dest)                                  # of an export that was killed
        files = export_files(source)
        paths = {dest / name: content for name, content in files.items()}
        if all(path.exists() and path.read_bytes() == paths[path] for path in paths):
            print(f"{dest} is up to date (step {source.step}): skipped")
            return list(files)
        if dest.exists() and source.lacks:
            sys.exit(f"{source.lacks}: an unfinished model does not replace {dest}. Finish the "
                     "training first, or delete that folder")
        if dest.exists():
            print(f"{dest} is damaged or out of date: exported again", file=sys.stderr)
        try:
            for name, content in files.items():
                atomic_write(temp / "new" / name, content)
            if dest.exists():               # a folder cannot be replaced in one go
                os.rename(dest, temp / "old")
            os.rename(temp / "new", dest)
        finally:
            settle(temp, dest)
    print(f"{source.folder} step {source.step} -> {dest}", "(unfinished)" * bool(source.lacks))
    return list(files)


# ---- The hub: push -------------------------------------------------------------------------------

def repo_name(user, tag, kind):
    return f"{user}/nanochat-{tag}-{kind}".replace("_", "-")


def card(kind, tag, user, found):
    """README.md of a repository: templates/model_card.jinja, filled in. found: as in push()."""
    import jinja2
    _, tested = results_of(found["base"].folder, "eval.json")
    numbers = {"val_bpb_with_rope": float, "val_bpb_without_rope": float}
    lines = read_lines(found["base"].folder / "metrics.jsonl", {"step": int}, numbers)
    text = (HERE / "templates" / "model_card.jinja").read_text("utf-8")
    return jinja2.Template(text, trim_blocks=True, lstrip_blocks=True).render(
        kind=kind, tag=tag, user=user, repo_name=repo_name,
        metas={stage: source.meta for stage, source in found.items()},
        jump=next((line for line in lines if line.keys() >= numbers.keys()), None),
        logn_scale=tested.get("c fitted", {}).get("fit", {}).get("c"))


def repo_files(kind, tag, user, found, temp):
    """What belongs into a repository: its path there -> a file here, some of them new in temp."""
    source, files = found[kind.removeprefix("hf-")], {"README.md": temp / "README.md"}
    atomic_write(files["README.md"], card(kind, tag, user, found) + "\n")
    if kind.startswith("hf-"):
        return {**files, **{name: source.dest / name for name in export(source)}}
    parts = checkpoint_files(source.folder, source.step)
    paths = [parts["model"], parts["optim"], parts["meta"], source.folder / "metrics.jsonl",
             source.folder / "questions.jsonl"]
    enc = load_tokenizer(base_dir() / "tokenizer")
    atomic_write(temp / "tokenizer.pkl", pickle.dumps(enc, protocol=4))
    atomic_write(temp / "token_bytes.pt", functools.partial(torch.save, token_bytes(enc).int()))
    for name in ("tokenizer.pkl", "token_bytes.pt"):
        files[f"tokenizer/{name}"] = temp / name
    return {**files, **{path.name: path for path in paths if path.exists()}}


def fill(repo, files, private):
    """Replaces the files of a repository, those of another step too, in one commit; then compares
    all with the hub's hashes. Returns how many were sent."""
    api = huggingface_hub.HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo).private:
        sys.exit(f"{repo} is public already: make it private on the hub, or leave out --private")

    def differing():
        """What the hub lacks, {path: file}, and what it has of another step, [path]."""
        new, old = dict(files), []
        for entry in api.list_repo_tree(repo, recursive=True):
            if entry.path in files:                         # git's hash for small files
                there = entry.lfs.sha256 if entry.lfs else entry.blob_id
                if file_hash(files[entry.path], git=not entry.lfs) == there:
                    del new[entry.path]
            elif re.fullmatch(r"(model|optim|meta|loader)_\d{6,}\w*\.\w+", entry.path):
                old.append(entry.path)
        return new, old

    new, old = differing()
    if new or old:
        operations = [huggingface_hub.CommitOperationAdd(*item) for item in new.items()]
        operations += [huggingface_hub.CommitOperationDelete(path) for path in old]
        api.create_commit(repo, operations, commit_message="Files of nanochat-miniseries")
        wrong = [*itertools.chain(*differing())]
        if wrong:
            raise ConnectionError(f"what arrived of {', '.join(wrong)} is not what was sent")
    return len(new)


def push(cfg, tag):
    """Fills the repositories of a tag, or with --dry-run only lists what would go there. Returns
    whether the tag is finished."""
    kinds = [kind for kind in KINDS if cfg.stage in ("all", kind.removeprefix("hf-"))]
    found = {stage: newest(stage, tag) for stage in ("base", "sft")}
    problem = next((found[stage].lacks for stage in found
                    if stage in kinds and found[stage].lacks), "")
    if problem and cfg.all:
        print(f"{tag} is left out: {problem}")
        return False
    if problem:
        sys.exit(f"{problem}: only finished tags are published")
    for kind in kinds:
        with tempfile.TemporaryDirectory() as temp:
            repo = repo_name(cfg.push, tag, kind)
            files = repo_files(kind, tag, cfg.push, found, Path(temp))
            print(repo)
            for path, file in files.items():
                print(f"{file.stat().st_size:>15,}  {path}")
            if not cfg.dry_run:                             # at least at 1 MB/s
                patience = 300 + sum(file.stat().st_size for file in files.values()) / 1e6
                sent = retry(repo, patience, functools.partial(fill, repo, files, cfg.private))
                print(f"{repo}: {sent} files sent, all {len(files)} checked", flush=True)
    return True


# ---- The hub: pull -------------------------------------------------------------------------------

def find(user, tag, kind):
    """(repository, names of its files) of a published tag, under our name or the nanochat series'
    own. The base of a _long tag may be there without the _long only."""
    api = huggingface_hub.HfApi()
    tags = [tag, tag.removesuffix("_long")] if kind == "base" else [tag]
    names = [repo_name(user, t, kind) for t in tags]
    names += [f"{user}/{t.replace('_', '-')}-{KINDS[kind]}" for t in tags]
    for name in names:
        if retry(name, 60, functools.partial(api.repo_exists, name)):
            return name, retry(name, 60, functools.partial(api.list_repo_files, name))
    sys.exit(f"the hub has none of {', '.join(names)}, or they are not for you: HF_TOKEN takes a "
             "token that may read them")


def pull(name):
    """Fetches a published tag: both native checkpoints and tokenizer.json, never the pickle."""
    tag = TAG.replace("_", "-")
    found = re.fullmatch(rf"([\w.-]+)/(?:nanochat-)?({tag})(-(base|sft|chatsft|hf).*)?", name)
    if not found:
        sys.exit(f"--pull {name}: give it as USER/nanochat-d18-9tpp-drope-50")
    user, tag = found[1], found[2].replace("-", "_")
    with tempfile.TemporaryDirectory() as temp:
        repo, new, folder = find(user, tag, "hf-sft")[0], Path(temp), base_dir() / "tokenizer"
        path = fetch(repo, "tokenizer.json", new / "tokenizer.json", "model")
        try:
            tokenizer_from_json(path.read_text("utf-8"), new)
        except (ValueError, LookupError, TypeError, AttributeError):
            sys.exit(f"{repo}: its tokenizer.json is none that export_hf.py wrote")
        ours = load_tokenizer(folder if (folder / "config.json").exists() else new)
        if tokenizer_hash(ours) != tokenizer_hash(load_tokenizer(new)):
            sys.exit(f"{repo} has another tokenizer than {folder}: change NANOCHAT_BASE_DIR")
        for file in ("tokenizer.tiktoken", "config.json"):  # where config.json is, both are
            atomic_write(folder / file, (new / file).read_bytes())
        for stage in ("base", "sft"):
            pull_checkpoint(user, tag, stage, new)


def pull_checkpoint(user, tag, stage, temp):
    (repo, there), folder = find(user, tag, stage), folders(stage, tag)[0]
    steps = [int(name[5:-5]) for name in there if re.fullmatch(r"meta_\d{6,}\.json", name)]
    step = max(steps, default=0)
    files = checkpoint_files(folder, step)
    parts = [files["model"].name, files["optim"].name]
    try:
        lock = lock_file(folder / ".lock", wait=0)
    except BlockingIOError:
        sys.exit(f"{folder} is in use by another pull, or a run: wait for it, then pull again")
    with lock:
        try:
            here = newest_checkpoint(folder)
        except Damaged:
            here = None                     # it is fetched again
        if here == step:
            theirs = retry(repo, 60, lambda: hub_file(repo, files["model"].name).etag)
            if theirs == weights_hash(folder, step):
                return print(f"{folder} is there already: skipped")
        if here is not None:
            sys.exit(f"{folder} holds another run (step {here}): choose another NANOCHAT_BASE_DIR")
        for name in parts + [n for n in ("metrics.jsonl", "questions.jsonl") if n in there]:
            etag = retry(repo, 60, functools.partial(hub_file, repo, name)).etag
            path = folder / name
            if path.exists() and file_hash(path, git=len(etag) == 40) != etag:
                path.unlink()               # a leftover of something else
            fetch(repo, name, path, "model")
        meta = json.loads(fetch(repo, files["meta"].name, temp / stage, "model").read_text())
        # Checkpoints of the nanochat repo lost use_rope in fine-tuning; the tag says what it was
        said = meta.setdefault("loop_state", {}).get("use_rope")
        meta["loop_state"]["use_rope"] = use_rope = "_drope_" not in tag
        if said != use_rope:
            print(f"{repo} says use_rope {said}; set to {use_rope}, as its name says")
        meta["sha256"] = {name: file_hash(folder / name) for name in parts}
        atomic_write(files["meta"], dump(meta))             # last: it vouches for the rest
        print(f"{repo} -> {folder}, step {step}")


# ---- Main ----------------------------------------------------------------------------------------

def main(args=None):
    cfg = parse_config(Config, __doc__, args)
    for word in ("all", "private", "dry_run"):
        if getattr(cfg, word) and not cfg.push:
            sys.exit(f"--{word.replace('_', '-')} goes with --push")
    if cfg.stage not in ("base", "sft", "all"):
        sys.exit(f"--stage {cfg.stage}: choose base, sft or all")
    if [cfg.tag != "", cfg.pull != "", cfg.all].count(True) != 1 or cfg.pull and cfg.push:
        sys.exit("give one of --tag d18_9tpp_drope_50, --pull USER/..., and --push USER --all")
    if not re.fullmatch(r"\w[\w.-]*", cfg.tag or "x") or "/" in cfg.push:
        sys.exit(f"--tag {cfg.tag} --push {cfg.push}: they are names, without folders")
    if cfg.push and not cfg.dry_run and not huggingface_hub.get_token():
        sys.exit("publishing needs a token with write access: set HF_TOKEN, or `hf auth login`")
    if cfg.pull:
        pull(cfg.pull)
    elif cfg.push:
        trained = [*(base_dir() / KINDS["base"]).glob("*"), *(base_dir() / KINDS["sft"]).glob("*")]
        tags = sorted({folder.name for folder in trained if re.fullmatch(TAG, folder.name)})
        done = [push(cfg, tag) for tag in (tags if cfg.all else [cfg.tag])]
        if not any(done):
            sys.exit(f"no finished tag in {base_dir()} to publish")
    else:
        stages = ["base", "sft"] if cfg.stage == "all" else [cfg.stage]
        there = [stage for stage in stages if folders(stage, cfg.tag)[0].is_dir()]
        for stage in there or stages:
            export(newest(stage, cfg.tag))


if __name__ == "__main__":
    guard(main)
