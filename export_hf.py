"""Exports finished checkpoints to Hugging Face transformers, and moves them to and from the hub.

    python export_hf.py --tag d18_9tpp_drope_50                 # to hf_base/TAG and hf_sft/TAG
    python export_hf.py --tag d18_9tpp_drope_50 --push USER     # to four repositories of USER
    python export_hf.py --push USER --all --dry-run             # what a push of all would upload
    python export_hf.py --pull USER/nanochat-d18-9tpp           # a published tag, to train on here

Reads base_checkpoints/TAG, chatsft_checkpoints/TAG (a _long tag shares the base of the tag without
_long) and the tokenizer. Writes, in seconds, folders that transformers loads with
AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True). The same checkpoint always
gives the same bytes; a damaged export is rebuilt, and readers never see a partial one. Uploads and
downloads are checked against the hub's hashes. To resume one, run the same command again. HF_TOKEN
or `hf auth login` authenticates you.
"""
import base64, contextlib, functools, json, os, pickle, re, shutil, sys, tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch

from model import (FOLDERS, Damaged, GPTConfig, atomic_write, base_dir, checkpoint_files, download,
                   folder_of, guard, has_hub_hash, load_part, load_tokenizer, lock_file,
                   newest_checkpoint, option, parse_config, parse_tag, read_lines, read_meta,
                   results_of, retry, token_bytes, tokenizer_hash, tokenizer_of, unfinished,
                   weights_hash)

HERE = Path(__file__).parent
STOP = {"base": "<|bos|>", "sft": "<|assistant_end|>"}  # the token that ends generation


@dataclass
class Config:
    tag: str = option("", "which model, such as d18_9tpp_drope_50")
    stage: str = option("all", "base, sft or all: whichever of the two exist")
    push: str = option("", "a user or organisation of the hub: publish the tag there")
    all: bool = option(False, "with --push: every finished tag instead of one")
    private: bool = option(False, "with --push: make the repositories private")
    dry_run: bool = option(False, "with --push: only list the files and their sizes")
    pull: str = option("", "USER/nanochat-d18-9tpp: download that published tag")


# ---- The tokenizer: tiktoken's ranks as tokenizer.json -------------------------------------------

# A user may write "<|bos|>", and transformers would take it for the control token. So the chat
# template inserts GUARD between "<" and "|" in messages, and tokenizer.json deletes it after it has
# searched for control tokens. A "<GUARD" in a message becomes "<GUARDGUARD", so that only what was
# inserted is deleted. No tool has to run our code for this. (In text outside of messages, "<GUARD|"
# and "<GUARDGUARD" lose one GUARD. Unicode reserves both characters for programs.)
GUARD = "\ufdd0\ufdef"


def byte_alphabet():
    """The printable character for each of the 256 bytes in tokenizer.json, as in GPT-2."""
    ranges = ("!", "~"), ("\u00a1", "\u00ac"), ("\u00ae", "\u00ff")
    printable = [b for first, last in ranges for b in range(ord(first), ord(last) + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def tokenizer_json(enc):
    """The text of tokenizer.json, which encodes any text as tiktoken's `enc` does (control tokens
    aside). tiktoken merges the neighbours whose union has the lowest rank, whichever they are; so
    every split of a token into two tokens is a merge here."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    ranks, special, alphabet = enc._mergeable_ranks, enc._special_tokens, byte_alphabet()
    spell = {token: "".join(alphabet[b] for b in token) for token in ranks}
    merges = [(spell[token[:i]], spell[token[i:]]) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))  # whole chunks first
    tokenizer.normalizer = normalizers.Replace(Regex(f"(?<=<){GUARD}(?={GUARD}|\\|)"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(enc._pat_str), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(special, key=special.get))  # they get the last ids
    bos = ("<|bos|>", special["<|bos|>"])
    tokenizer.post_processor = TemplateProcessing("<|bos|> $A", "<|bos|> $A $B", [bos])
    return tokenizer.to_str(pretty=True).encode() + b"\n"


def tokenizer_from_json(text, folder):
    """The inverse: tokenizer.json -> the two files of tok.py, in `folder`."""
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
    """config.json and tokenizer_config.json of a model. special: control token -> id. The files in
    templates/ hold what all models have in common (and some values of d18)."""
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
    """Renames the weights for transformers, in bfloat16, without the padding of the vocabulary."""
    weights = {}
    for name, w in state.items():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            w = w[:vocab_size]
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = w.to(torch.bfloat16).contiguous()
    return weights


def export_files(source):
    """{name: bytes} of all files of an export, always the same for a checkpoint."""
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
    about = {"step": source.step, "finished": not source.lacks}
    return {**files, "export.json": dump(about)}


class Source(NamedTuple):
    """A model to export: its newest undamaged checkpoint."""
    stage: str  # base or sft
    folder: Path
    dest: Path  # of the export
    step: int  # None if there is no checkpoint
    meta: dict
    lacks: str  # why it must not be published, or ""


def find_source(stage, tag):
    folder, dest = folder_of(stage, tag), folder_of(f"hf-{stage}", tag)
    step = newest_checkpoint(folder)
    if step is None:
        return Source(stage, folder, dest, step, {}, f"no checkpoint in {folder}")
    meta = read_meta(folder, step)
    return Source(stage, folder, dest, step, meta, unfinished(folder, meta))


def settle(temp, dest, ours):
    """Cleans up after an export, even one that was killed. If there is a new folder, it gets the
    files that others have put into the old one; if not, the old folder is put back."""
    old = temp / "old"
    if old.exists() and not dest.exists():
        os.rename(old, dest)
    if old.exists():
        for path in old.iterdir():
            if path.name not in ours:
                os.rename(path, dest / path.name)
    shutil.rmtree(temp, ignore_errors=True)


def export(source):
    """Exports a model unless already exported; returns the names of the files."""
    dest, temp = source.dest, source.dest.with_name(f".{source.dest.name}.temp")
    if source.step is None:
        sys.exit(f"{source.lacks}: `bash run_all.sh {dest.name}` trains that model")
    if dest.exists() and not dest.is_dir():
        sys.exit(f"{dest} is a file, but exports are folders: move it")
    files = export_files(source)
    busy = f"another process has been exporting to {dest} for 10 minutes: wait for it"
    with lock_file(dest.with_name(f".{dest.name}.lock"), busy, patience=600):
        settle(temp, dest, files)
        if all((dest / name).exists() and (dest / name).read_bytes() == content
               for name, content in files.items()):
            print(f"{dest} is up to date (step {source.step}): skipped")
            return list(files)
        if dest.exists() and source.lacks:
            sys.exit(f"{source.lacks}; until then {dest} is unchanged")
        if dest.exists():
            print(f"{dest} is damaged or out of date: exporting again", file=sys.stderr)
        try:
            for name, content in files.items():
                atomic_write(temp / "new" / name, content)
            if dest.exists():  # os.rename cannot replace a folder
                os.rename(dest, temp / "old")
            os.rename(temp / "new", dest)
        finally:
            settle(temp, dest, files)
    print(f"{source.folder} step {source.step} -> {dest}", "(unfinished)" if source.lacks else "")
    return list(files)


# ---- The hub: push -------------------------------------------------------------------------------

def repo_name(user, tag, kind):
    return f"{user}/nanochat-{tag}-{kind}".replace("_", "-")


def card(kind, tag, user, sources):
    """README.md of a repository: templates/model_card.jinja, filled in. sources: {stage: Source}"""
    import jinja2
    _, tested = results_of(sources["base"].folder, "eval.json")
    numbers = {"val_bpb_with_rope": float, "val_bpb_without_rope": float}
    lines = read_lines(sources["base"].folder / "metrics.jsonl", {"step": int}, numbers)
    text = (HERE / "templates" / "model_card.jinja").read_text("utf-8")
    return jinja2.Template(text, trim_blocks=True, lstrip_blocks=True).render(
        kind=kind, tag=tag, user=user, repo_name=repo_name,
        metas={stage: source.meta for stage, source in sources.items()},
        jump=next((line for line in lines if line.keys() >= numbers.keys()), None),
        logn_scale=tested.get("c fitted", {}).get("fit", {}).get("c"))


def gather(kind, tag, user, sources, folder):
    """Fills `folder` with the files of a repository: links to the model's files, and new files."""
    source = sources[kind.removeprefix("hf-")]
    atomic_write(folder / "README.md", card(kind, tag, user, sources) + "\n")
    if kind.startswith("hf-"):
        paths = [source.dest / name for name in export(source)]
    else:
        files = checkpoint_files(source.folder, source.step)
        paths = [files["model"], files["optim"], files["meta"], source.folder / "metrics.jsonl",
                 source.folder / "questions.jsonl"]
        enc = load_tokenizer(base_dir() / "tokenizer")  # as the nanochat repo reads it
        atomic_write(folder / "tokenizer" / "tokenizer.pkl", pickle.dumps(enc, protocol=4))
        atomic_write(folder / "tokenizer" / "token_bytes.pt",
                     functools.partial(torch.save, token_bytes(enc).int()))
    for path in paths:
        if path.exists():
            (folder / path.name).symlink_to(path.resolve())


def upload(repo, folder, private):
    """Uploads a folder to a repository in one commit, which also deletes the files of other steps.
    Files that the hub has already are not sent again. Compares the hub's hashes at the end."""
    api = huggingface_hub.HfApi()
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo).private:
        sys.exit(f"{repo} is public already: make it private on the hub, or leave out --private")
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="nanochat miniseries",
                      delete_patterns=["model_*", "optim_*", "meta_*"])
    for name, expected in hub_hashes(api, repo).items():
        path = folder / name
        if path.is_file() and not has_hub_hash(path, expected):
            raise ConnectionError(f"{name} on the hub is not what was sent")


def hub_hashes(api, repo):
    """{file: its sha256, or for a small file git's sha1} of a repository."""
    files = api.model_info(repo, files_metadata=True).siblings
    return {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def push(cfg, tag):
    """Publishes a tag, or with --dry-run only lists its files. Returns whether it is finished."""
    kinds = [kind for kind in FOLDERS if cfg.stage in ("all", kind.removeprefix("hf-"))]
    sources = {stage: find_source(stage, tag) for stage in ("base", "sft")}
    lacks = [sources[kind].lacks for kind in kinds if kind in sources and sources[kind].lacks]
    if lacks and cfg.all:
        print(f"skipping {tag}: {lacks[0]}")
    elif lacks:
        sys.exit(f"{lacks[0]}. Only finished models are published")
    for kind in [] if lacks else kinds:
        with tempfile.TemporaryDirectory() as temp:
            repo, folder = repo_name(cfg.push, tag, kind), Path(temp).resolve()
            gather(kind, tag, cfg.push, sources, folder)
            sizes = {path.relative_to(folder): path.stat().st_size
                     for path in sorted(folder.rglob("*")) if path.is_file()}
            print(repo, *(f"{size:>15,}  {name}" for name, size in sizes.items()), sep="\n")
            if not cfg.dry_run:  # at least at 1 MB/s
                retry(repo, 300 + sum(sizes.values()) / 1e6,
                      functools.partial(upload, repo, folder, cfg.private))
                print(f"{repo}: published; its hashes match the hub's", flush=True)
    return not lacks


# ---- The hub: pull -------------------------------------------------------------------------------

def find_repo(user, tag, kind):
    """(name, hub_hashes) of a repository of a tag, under our name or the public nanochat repo's.
    A _long tag's base may be published only under the short tag."""
    def look(name):
        with contextlib.suppress(huggingface_hub.errors.RepositoryNotFoundError):
            return hub_hashes(huggingface_hub.HfApi(), name)

    tags = [tag, tag.removesuffix("_long")] if kind == "base" else [tag]
    their_kind = FOLDERS[kind].replace("hf_", "hf-")
    names = [repo_name(user, t, kind) for t in tags]
    names += [f"{user}/{t.replace('_', '-')}-{their_kind}" for t in tags]
    for name in names:
        hashes = retry(name, 60, functools.partial(look, name))
        if hashes is not None:
            return name, hashes
    sys.exit(f"the hub has none of {', '.join(names)}, or HF_TOKEN may not read them")


def pull(name):
    """Downloads a published tag: both native checkpoints, and tokenizer.json, not the pickle."""
    found = re.fullmatch(r"([\w.-]+)/(?:nanochat-)?(d[\d.]+-[\d.]+tpp(?:-drope-\d+)?(?:-long)?)"
                         r"(?:-(?:base|sft|chatsft|hf).*)?", name)
    if not found:
        sys.exit(f"--pull {name}: give it as USER/nanochat-d18-9tpp-drope-50")
    user, tag = found[1], found[2].replace("-", "_")
    with tempfile.TemporaryDirectory() as temp:
        repo, new, folder = find_repo(user, tag, "hf-sft")[0], Path(temp), base_dir() / "tokenizer"
        path = download(repo, "tokenizer.json", new / "tokenizer.json", "model")
        try:
            tokenizer_from_json(path.read_text("utf-8"), new)
        except (ValueError, LookupError, TypeError, AttributeError):
            sys.exit(f"{repo}: its tokenizer.json was not written by export_hf.py")
        ours = load_tokenizer(folder if (folder / "config.json").exists() else new)
        if tokenizer_hash(ours) != tokenizer_hash(load_tokenizer(new)):
            sys.exit(f"{repo} has another tokenizer than {folder}: change NANOCHAT_BASE_DIR")
        for file in ("tokenizer.tiktoken", "config.json"):  # config.json implies both
            atomic_write(folder / file, (new / file).read_bytes())
        for stage in ("base", "sft"):
            pull_checkpoint(*find_repo(user, tag, stage), folder_of(stage, tag), new / stage)


def pull_checkpoint(repo, hashes, folder, temp):
    """Downloads those files of a repository's newest checkpoint that `folder` lacks."""
    steps = [int(name[5:-5]) for name in hashes if re.fullmatch(r"meta_\d{6,}\.json", name)]
    step = max(steps, default=0)
    files = checkpoint_files(folder, step)
    parts = [files["model"].name, files["optim"].name]
    missing = {*parts, files["meta"].name} - hashes.keys()
    if missing:
        sys.exit(f"{repo} is not a native checkpoint: it lacks {min(missing)}")
    busy = f"{folder} is in use by another pull, or a run: wait for it, then pull again"
    with lock_file(folder / ".lock", busy):
        try:
            here = newest_checkpoint(folder)
        except Damaged:
            here = None  # will be refetched
        if here not in (None, step) or here and weights_hash(folder, here) != hashes[parts[0]]:
            sys.exit(f"{folder} holds another run (step {here}): choose another NANOCHAT_BASE_DIR")
        for name in [*parts, *({"metrics.jsonl", "questions.jsonl"} & hashes.keys())]:
            path = folder / name
            if path.exists() and not has_hub_hash(path, hashes[name]):
                path.unlink()  # left over from something else
            download(repo, name, path, "model")
        meta = json.loads(download(repo, files["meta"].name, temp, "model").read_text())
        # The nanochat repo's chat checkpoints do not say if they have RoPE; the folder's name does
        said = meta.setdefault("loop_state", {}).get("use_rope")
        meta["loop_state"]["use_rope"] = use_rope = "_drope_" not in folder.name
        if said != use_rope:
            print(f"{repo} says use_rope {said}; set to {use_rope}, per its name")
        meta["sha256"] = {name: hashes[name] for name in parts}
        atomic_write(files["meta"], dump(meta))  # last: it vouches for the rest
    print(f"{repo} -> {folder}, step {step}")


# ---- Main ----------------------------------------------------------------------------------------

def main(args=None):
    cfg = parse_config(Config, __doc__, args)
    for word in ("all", "private", "dry_run"):
        if getattr(cfg, word) and not cfg.push:
            sys.exit(f"--{word.replace('_', '-')} needs --push")
    if cfg.stage not in ("base", "sft", "all"):
        sys.exit(f"--stage {cfg.stage}: choose base, sft or all")
    if [cfg.tag != "", cfg.pull != "", cfg.all].count(True) != 1 or cfg.pull and cfg.push:
        sys.exit("give one of --tag d18_9tpp_drope_50, --pull USER/..., and --push USER --all")
    if "/" in cfg.push:
        sys.exit(f"--push {cfg.push}: the name of a user or organisation, without a repository")
    if cfg.push and not cfg.dry_run and not huggingface_hub.get_token():
        sys.exit("publishing needs a token with write access: set HF_TOKEN, or `hf auth login`")
    if cfg.pull:
        pull(cfg.pull)
    elif cfg.push:
        tags = [cfg.tag]
        if cfg.all:
            names = {path.name for path in base_dir().glob("*_checkpoints/*")}
            tags = sorted(filter(parse_tag, names))
        if not any([push(cfg, tag) for tag in tags]):
            sys.exit(f"no finished model in {base_dir()} to publish")
    else:
        stages = ["base", "sft"] if cfg.stage == "all" else [cfg.stage]
        there = [stage for stage in stages if folder_of(stage, cfg.tag).is_dir()]
        for stage in there or stages:
            export(find_source(stage, cfg.tag))


if __name__ == "__main__":
    guard(main)
