"""Exports finished checkpoints to Hugging Face transformers, and moves them to and from the hub.

    python export_hf.py --tag d18_9tpp_drope_50             {base,chatsft}_checkpoints/TAG -> hf_base/TAG, hf_sft/TAG
    python export_hf.py --tag d18_9tpp_drope_50 --push USER     to USER/nanochat-d18-9tpp-drope-50-{base,sft,hf-...}
    python export_hf.py --push USER --all --dry-run         what a push of every finished tag would upload
    python export_hf.py --pull USER/nanochat-d18-9tpp       the way back: a published tag becomes checkpoints here

An export is a folder that AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) loads: config.json,
model.safetensors (bfloat16), tokenizer.json, their side files, a chat template (sft only) and modeling_nanochat.py,
which computes it. A _long tag shares the base of the tag without _long. An export takes seconds, is the same byte for
byte whenever it is made, and appears whole or not at all. Uploads are checked against the hub's own hashes; what the
hub has already is not sent again, so an interrupted push is simply run again. HF_TOKEN or `hf auth login` identify you.
"""
import base64
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import (FetchError, atomic_write, base_dir, checkpoint_files, fetch, load_part, load_tokenizer,
                   newest_checkpoint, parse_config, read_meta, token_bytes, tokenizer_hash)

CODE = Path(__file__).with_name("modeling_nanochat.py")
MAX_POSITIONS = 32768                   # announced to transformers: RoPE and DroPE both compute beyond it
DOCUMENT, STOP = "<|bos|>", "<|assistant_end|>"     # what ends a text for a base and for a chat model


@dataclass
class Config:
    tag: str = ""                       # which model, such as d18_9tpp_drope_50
    stage: str = "all"                  # base, sft, or all: those of the two that are there
    push: str = ""                      # name of a user or organisation: publish the tag there
    all: bool = False                   # with --push: every tag that has been fine-tuned, instead of one
    dry_run: bool = False               # with --push: list files and sizes, upload nothing
    pull: str = ""                      # USER/nanochat-d18-9tpp: fetch that published tag


# ---- The tokenizer: tiktoken's ranks as tokenizer.json ---------------------------------------------------------

# Text can spell a control token ("<|bos|>"), and transformers would take it for one. So the chat template puts a
# character between "<" and "|" of whatever a message holds, one that Unicode keeps for uses inside a program, and the
# tokenizer takes it out again after it has looked for control tokens. Both are data (Jinja, JSON), so no tool has to
# run our code for it.
GUARD = "\ufdd0"


def byte_alphabet():
    """GPT-2's way to write bytes as printable characters, in which tokenizer.json spells tokens: a list of 256."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def tokenizer_json(enc):
    """The text of tokenizer.json, equal to tiktoken's `enc` on any text, control tokens aside. tiktoken joins the
    neighbours whose joint has the lowest rank, however it is divided; so every division of a token into two tokens is a
    merge here."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    ranks, alphabet = enc._mergeable_ranks, byte_alphabet()
    spell = {token: "".join(alphabet[b] for b in token) for token in ranks}
    merges = [(spell[token[:i]], spell[token[i:]]) for token in sorted(ranks, key=ranks.get)
              for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
    vocab = {spell[token]: rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))    # a chunk that is a token is that token
    tokenizer.normalizer = normalizers.Replace(Regex(f"(?<=<){GUARD}(?=\\|)"), "")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(enc._pat_str), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(sorted(enc._special_tokens, key=enc._special_tokens.get))
    bos = enc._special_tokens[DOCUMENT]
    tokenizer.post_processor = processors.TemplateProcessing(f"{DOCUMENT} $A", f"{DOCUMENT} $A $B", [(DOCUMENT, bos)])
    if any(tokenizer.token_to_id(t) != i for t, i in enc._special_tokens.items()):
        sys.exit("the special tokens of the tokenizer do not come last: make it again with `python tok.py`")
    return tokenizer.to_str(pretty=True) + "\n"


def tokenizer_config(enc, stop):
    special = sorted(enc._special_tokens, key=enc._special_tokens.get)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "auto_map": {"AutoTokenizer": [None, "modeling_nanochat.NanoChatTokenizer"]},
        "bos_token": DOCUMENT, "eos_token": stop, "pad_token": stop,
        "additional_special_tokens": [t for t in special if t not in (DOCUMENT, stop)],
        "padding_side": "left", "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_POSITIONS, "clean_up_tokenization_spaces": False}


# The format of fine-tuning, as sft.py renders it. {% generation %} marks what was trained: the answer and its python
# calls up to <|assistant_end|>, not the calls' outputs, which a tool writes. An answer is a string or a list of parts.
CHAT_TEMPLATE = r"""
{%- macro text(content) -%}
    {%- for part in ([{'text': content}] if content is string else content) -%}
        {{- part.text | replace('<|', '<\ufdd0|') -}}
    {%- endfor -%}
{%- endmacro -%}
{{- '<|bos|>' -}}
{%- set system = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- set turns = messages[1:] if system else messages -%}
{%- if not turns -%}
    {{- raise_exception('a conversation needs a user message') -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('roles must be [system,] user, assistant, user, ..., but there is ' ~ message.role) -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {{- '<|user_start|>' ~ (text(system.content) ~ '\n\n' if system and loop.first) -}}
        {{- text(message.content) ~ '<|user_end|>' -}}
    {%- else -%}
        {{- '<|assistant_start|>' -}}
        {%- set content = message.content -%}
        {%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
        {%- set run = namespace(start=0) -%}
        {%- for i in range(parts | length + 1) -%}
            {%- set last = i == parts | length -%}
            {%- if last or parts[i].type == 'python_output' -%}
                {%- generation -%}
                {%- for part in parts[run.start:i] -%}
                    {%- if part.type == 'python' -%}
                        {{- '<|python_start|>' ~ text(part.text) ~ '<|python_end|>' -}}
                    {%- elif part.type == 'text' -%}
                        {{- text(part.text) -}}
                    {%- else -%}
                        {{- raise_exception('parts are of type text, python or python_output, not ' ~ part.type) -}}
                    {%- endif -%}
                {%- endfor -%}
                {{- '<|assistant_end|>' if last -}}
                {%- endgeneration -%}
                {{- '<|output_start|>' ~ text(parts[i].text) ~ '<|output_end|>' if not last -}}
                {%- set run.start = i + 1 -%}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
{{- '<|assistant_start|>' if add_generation_prompt -}}
""".lstrip()


# ---- One export ------------------------------------------------------------------------------------------------

def source_of(stage, tag):
    """The checkpoint folder of a tag. Long-context models are fine-tuned from the same base as the others."""
    return base_dir() / ("chatsft_checkpoints" if stage == "sft" else "base_checkpoints") / export_of(stage, tag).name


def export_of(stage, tag):
    return base_dir() / f"hf_{stage}" / (tag if stage == "sft" else tag.removesuffix("_long"))


def read_use_rope(meta, path):
    """Whether the model has RoPE. Never guessed: a model that is run the wrong way answers nonsense."""
    use_rope = meta.get("loop_state", {}).get("use_rope")
    if not isinstance(use_rope, bool):
        sys.exit(f"{path} does not say whether the model has RoPE: set loop_state.use_rope to true or false in it")
    return use_rope


def config_json(meta, use_rope, intermediate_size, enc, stop):
    m = meta["model_config"]
    return {
        "architectures": ["NanoChatForCausalLM"], "model_type": "nanochat",
        "auto_map": {"AutoConfig": "modeling_nanochat.NanoChatConfig", "AutoModel": "modeling_nanochat.NanoChatModel",
                     "AutoModelForCausalLM": "modeling_nanochat.NanoChatForCausalLM"},
        "vocab_size": m["vocab_size"], "hidden_size": m["n_embd"], "intermediate_size": intermediate_size,
        "num_hidden_layers": m["n_layer"], "num_attention_heads": m["n_head"], "num_key_value_heads": m["n_kv_head"],
        "head_dim": m["n_embd"] // m["n_head"], "hidden_act": "swiglu", "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "use_rope": use_rope,
        "final_logit_softcapping": 15.0, "max_position_embeddings": MAX_POSITIONS, "tie_word_embeddings": False,
        "bos_token_id": enc._special_tokens[DOCUMENT], "eos_token_id": enc._special_tokens[stop],
        "pad_token_id": enc._special_tokens[stop], "use_cache": True, "dtype": "bfloat16", "torch_dtype": "bfloat16"}


NAMES = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
         "attn.c_proj": "self_attn.o_proj", "mlp.w_gate": "mlp.gate_proj", "mlp.w_up": "mlp.up_proj",
         "mlp.c_proj": "mlp.down_proj"}


def hf_weights(state, meta):
    """nanochat's names -> transformers', bfloat16; without the rows that pad the vocabulary to a multiple of 64."""
    m = meta["model_config"]
    weights = {"model.embed_tokens.weight": state["transformer.wte.weight"][:m["vocab_size"]],
               "lm_head.weight": state["lm_head.weight"][:m["vocab_size"]]}
    for i in range(m["n_layer"]):
        for ours, theirs in NAMES.items():
            weights[f"model.layers.{i}.{theirs}.weight"] = state[f"transformer.h.{i}.{ours}.weight"]
    return {name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}


def digests(content):
    """(size, sha256, git's hash) of a file's path, or of bytes. The hub knows large files by the one, small ones by the
    other."""
    size = len(content) if isinstance(content, bytes) else Path(content).stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as f:
        while block := f.read(1 << 24):
            sha256.update(block)
            git.update(block)
    return size, sha256.hexdigest(), git.hexdigest()


def dump(obj):
    return json.dumps(obj, indent=2) + "\n"


def export(stage, tag):
    """Makes the export of one checkpoint, unless it is there already. Returns its folder."""
    source, dest = source_of(stage, tag), export_of(stage, tag)
    step = newest_checkpoint(source)
    if step is None:
        sys.exit(f"no checkpoint in {source}: `bash run_all.sh {tag}` trains that model (it is made by "
                 f"{'sft.py' if stage == 'sft' else 'pretrain.py'})")
    files, meta = checkpoint_files(source, step), read_meta(source, step)
    use_rope = read_use_rope(meta, files["meta"])
    enc = load_tokenizer(base_dir() / "tokenizer")
    ids, name = meta["model_config"]["vocab_size"], tokenizer_hash(enc)
    if enc.n_vocab != ids or meta.get("tokenizer", name) != name:
        sys.exit(f"{source} was not trained with the tokenizer in {base_dir() / 'tokenizer'} ({enc.n_vocab} ids, "
                 f"{name}; the model: {ids}, {meta.get('tokenizer', 'unnamed')}): put the tokenizer of that run there")

    # What the export is made of; if nothing of it changed, there is nothing to do
    made_of = {"model": meta.get("sha256", {}).get(files["model"].name) or digests(files["model"])[1],
               "use_rope": use_rope, "tokenizer": name,
               "modeling_nanochat.py": digests(CODE)[1], "export_hf.py": digests(__file__)[1]}
    if (dest / "export.json").exists() and (dest / "export.json").read_text() == dump(made_of):
        print(f"{dest} is up to date (step {step}): skipped")
        return dest

    stop = STOP if stage == "sft" else DOCUMENT
    state = load_part(source, step, "model")
    config = config_json(meta, use_rope, state["transformer.h.0.mlp.w_up.weight"].size(0), enc, stop)
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    temp = dest.with_name(f".{dest.name}.new")
    try:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
        save_file(hf_weights(state, meta), temp / "model.safetensors", metadata={"format": "pt"})
    except Exception as e:                                  # safetensors has its own class for a full disk
        shutil.rmtree(temp, ignore_errors=True)
        sys.exit(f"cannot write {temp}: {e}; the earlier export is untouched. Free some space or set NANOCHAT_BASE_DIR")
    atomic_write(temp / "config.json", dump(config))
    atomic_write(temp / "generation_config.json", dump(ids))
    atomic_write(temp / "tokenizer.json", tokenizer_json(enc))
    atomic_write(temp / "tokenizer_config.json", dump(tokenizer_config(enc, stop)))
    atomic_write(temp / "modeling_nanochat.py", CODE.read_bytes())
    if stage == "sft":
        atomic_write(temp / "chat_template.jinja", CHAT_TEMPLATE)
    atomic_write(temp / "export.json", dump(made_of))
    if dest.exists():                                       # a folder cannot be replaced in one go: old out, new in
        old = dest.with_name(f".{dest.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(dest, old)
        os.rename(temp, dest)
        shutil.rmtree(old)
    else:
        os.rename(temp, dest)
    size = (dest / "model.safetensors").stat().st_size / 1e6
    print(f"{source} step {step} -> {dest} (use_rope {str(use_rope).lower()}, {size:,.1f} MB)")
    return dest


# ---- The model card --------------------------------------------------------------------------------------------

LICENCES = {"base": """
| NVIDIA ClimbMix, through karpathy/climbmix-400b-shuffle | CC BY-NC 4.0 (non-commercial) |
""", "sft": """
| HuggingFaceTB/smol-smoltalk | Apache 2.0 |
| identity conversations of karpathy/nanochat | MIT |
| cais/mmlu, auxiliary_train | MIT; from ARC (CC BY-SA 4.0), OpenBookQA (Apache 2.0), MCTest, RACE (non-commercial) |
| openai/gsm8k | MIT |
| dwyl/english-words (spelling tasks) | Unlicense |
""", "long": """
| allenai/tulu-v2-sft-long-mixture | ODC-By 1.0; parts non-commercial (GPT4-Alpaca, Code-Alpaca: CC BY-NC 4.0; LIMA: \
CC BY-NC-SA), Apache 2.0, MIT, or without a stated licence (ShareGPT, Evol-Instruct) |
"""}

CHAT_SNIPPET = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
repo = "{repo}"
tok = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, torch_dtype=torch.bfloat16, trust_remote_code=True).cuda()
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tok.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").cuda()
out = model.generate(inputs, max_new_tokens=256)
print(tok.decode(out[0][inputs.shape[1]:], skip_special_tokens=True))
```

With `return_dict=True` it gives ids and attention mask, for `model.generate(**inputs)`. For transformers 4.57 and 5.x.

- A system message is put before the first user message. An answer may be a list of parts, `{{"type": "text" | "python"
  | "python_output", "text": ...}}`: the model was taught to call Python; running the call and writing its output back
  is up to you.
- Text that spells a control token, such as `<|assistant_start|>`, stays text in any message. The template and
  tokenizer.json see to that, also without `trust_remote_code`. For text outside of messages, pass
  `split_special_tokens=True`.
- Without `trust_remote_code` the tokenizer is transformers' own class: the same ids, but the snippet then needs
  `return_dict=False` in transformers 5, and a chat rendered to a string `add_special_tokens=False` when it is tokenized
  (else it begins with `<|bos|>` twice). The model needs `trust_remote_code`; transformers refuses it otherwise.
- vLLM serves it through its Transformers backend, softcap included (checked with 0.32, `--trust-remote-code`). A server
  that does not know `final_logit_softcapping` gives the same greedy answers, but other probabilities.
"""
TEXT_SNIPPET = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer
repo = "{repo}"
tok = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
inputs = tok("The capital of France is", return_tensors="pt")
print(tok.decode(model.generate(**inputs, max_new_tokens=32)[0], skip_special_tokens=True))
```

A base model continues text; it knows no chat format. Needs `trust_remote_code`: modeling_nanochat.py is the model.
"""
NATIVE_SNIPPET = """
A native checkpoint of nanochat: weights, optimizer state and meta data, to train on. `tokenizer/` is the tokenizer as
the nanochat repository reads it (a pickle: unpickle it only if you trust its publisher). In this miniseries' repository

    python export_hf.py --pull {name}

fetches the tag, and its tokenizer as text, to fine-tune, evaluate or export it. To use the model, take {hf}.
"""


def card(kind, tag, user):
    """README.md of a repository: front matter, what the tag is, its figures, how to load it, licences."""
    stage, native, long = kind.removeprefix("hf-"), not kind.startswith("hf-"), tag.endswith("_long")
    folders = {s: source_of(s, tag) for s in ("base", stage)}
    metas = {s: read_meta(folder, newest_checkpoint(folder)) for s, folder in folders.items()}
    base, m, use_rope = metas["base"], metas["base"]["model_config"], metas[stage]["loop_state"]["use_rope"]
    parts = ["base"] + ["sft"] * (stage == "sft") + ["long"] * (stage == "sft" and long)
    datasets = {"base": ["karpathy/climbmix-400b-shuffle"], "long": ["allenai/tulu-v2-sft-long-mixture"],
                "sft": ["HuggingFaceTB/smol-smoltalk", "cais/mmlu", "openai/gsm8k"]}
    front = ["license: mit", "language:", "- en", f"library_name: {'nanochat' if native else 'transformers'}",
             "pipeline_tag: text-generation", "datasets:", *(f"- {d}" for part in parts for d in datasets[part]),
             "tags:", "- nanochat", f"- {'rope' if use_rope else 'drope'}"]
    if stage == "sft":
        front += ["- conversational", f"base_model: {repo_name(user, tag, kind.replace('sft', 'base'))}"]
    switch = "on in all layers, to the end"
    if not use_rope:
        switch = f"dropped before step {base.get('switch', '?')} of {base['step']}"
        metrics = folders["base"] / "metrics.jsonl"
        for r in map(json.loads, metrics.read_text().splitlines() if metrics.exists() else []):
            if r.get("switch"):
                switch += f" (val bpb {r['val_bpb_with_rope']:.4f} with it, {r['val_bpb_without_rope']:.4f} just after)"
    rows = {"layers, width, heads": f"{m['n_layer']}, {m['n_embd']}, {m['n_head']}",
            "vocabulary": f"{m['vocab_size']:,}",
            "pretraining tokens": f"{base['step'] * base['total_batch_size']:,}", "RoPE": switch,
            "revision of the pretraining data": base.get("revision") or "-"}
    for s, meta in metas.items():
        rows[f"{s}: tokens in a row"] = f"{meta['max_seq_len']:,}"
        rows[f"{s}: validation bits per byte"] = f"{meta['val_bpb']:.4f}" if meta.get("val_bpb") else "-"
    snippet = NATIVE_SNIPPET if native else CHAT_SNIPPET if stage == "sft" else TEXT_SNIPPET
    use = snippet.format(repo=repo_name(user, tag, kind), name=repo_name(user, tag),
                         hf=repo_name(user, tag, f"hf-{stage}"))
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items())
    return "\n".join(["---", *front, "---", f"""
# {repo_name(user, tag, kind).split("/")[1]}

`{tag}` of the nanochat miniseries: {"fine-tuned for chat" if stage == "sft" else "pretrained"}, \
{"native checkpoint" if native else "for transformers"}. The series varies depth, tokens per parameter (tpp) and the
part of pretraining after which RoPE is dropped (DroPE, [arXiv:2512.12167](https://arxiv.org/abs/2512.12167)).

| | |
|---|---|
{table}
## Use
{use}
## Licence

The weights are under the MIT licence. The training data keep their own terms, as far as we know these:

| data | licence |
|---|---|
{"".join(LICENCES[part].lstrip() for part in parts)}"""])


# ---- The hub: push and pull -------------------------------------------------------------------------------------

KINDS = ("base", "sft", "hf-base", "hf-sft")


def repo_name(user, tag, kind=None):
    return "-".join([f"{user}/nanochat", tag.replace("_", "-"), *([kind] if kind else [])])


def repo_files(kind, tag, user):
    """What belongs into a repository: its path there -> a path here, or bytes."""
    stage = kind.removeprefix("hf-")
    folder = export(stage, tag)
    files = {path.name: path for path in sorted(folder.iterdir())}
    if kind == stage:                                       # native
        source, enc, buffer = source_of(stage, tag), load_tokenizer(base_dir() / "tokenizer"), io.BytesIO()
        checkpoint = checkpoint_files(source, newest_checkpoint(source))
        torch.save(token_bytes(enc).int(), buffer)
        files = {checkpoint[part].name: checkpoint[part] for part in ("model", "optim", "meta")}
        files["tokenizer/tokenizer.pkl"] = pickle.dumps(enc, protocol=4)
        files["tokenizer/token_bytes.pt"] = buffer.getvalue()
    return {"README.md": card(kind, tag, user).encode(), **files}


def one_line(error):
    """An error of the hub's client in one line, without the token that it may have been sent with."""
    from huggingface_hub import get_token
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].replace(get_token() or "\0", "***")


def hub_files(repo):
    """Every file of a hub repository: path -> its hash there, as model.py's fetch takes it."""
    from huggingface_hub import HfApi
    files = [f for f in HfApi().list_repo_tree(repo, recursive=True) if hasattr(f, "blob_id")]
    return {f.path: f.lfs.sha256 if f.lfs else f"git:{f.blob_id}" for f in files}


def push(user, tags, dry_run):
    """Fills four repositories for each tag: one commit each of what the hub has not got, then checked there."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    if not dry_run and not get_token():
        sys.exit("publishing needs a token with write access: `hf auth login`, or set HF_TOKEN")
    total = 0
    for tag, kind in ((tag, kind) for tag in tags for kind in KINDS):
        repo, files = repo_name(user, tag, kind), repo_files(kind, tag, user)
        known = {path: digests(content) for path, content in files.items()}      # (size, sha256, git's hash)
        if dry_run:
            print("\n".join([repo, *(f"{size:>15,}  {path}" for path, (size, _, _) in known.items())]))
            total += sum(size for size, _, _ in known.values())
            continue

        def missing():
            there = hub_files(repo)
            return [path for path, (_, sha256, git) in known.items() if there.get(path) not in (sha256, f"git:{git}")]

        try:
            HfApi().create_repo(repo, exist_ok=True)
            if new := missing():
                HfApi().create_commit(repo, [CommitOperationAdd(path, files[path]) for path in new],
                                      commit_message=f"{tag}, {kind}")
            wrong = missing() if new else []
        except Exception as e:                              # the many ways in which an upload fails
            sys.exit(f"{repo} could not be filled: {one_line(e)}. Run the same command again: it goes on from here")
        if wrong:
            sys.exit(f"{repo}: what arrived of {', '.join(wrong)} is not what was sent. Run the same command again")
        print(f"{repo}: {len(new)} files sent and checked, {len(files) - len(new)} were there", flush=True)
    if dry_run:
        print(f"{len(tags) * len(KINDS)} repositories, {total / 1e9:,.2f} GB; nothing was uploaded")


def tokenizer_from_json(text):
    """tokenizer.json -> tok.py's two text files: tokenizer.tiktoken and config.json."""
    data, byte_of = json.loads(text), {c: b for b, c in enumerate(byte_alphabet())}
    special = {t["content"]: t["id"] for t in data["added_tokens"]}
    ranks = sorted((rank, t) for t, rank in data["model"]["vocab"].items() if t not in special)
    splits = data["pre_tokenizer"].get("pretokenizers", [data["pre_tokenizer"]])
    pattern = next(split["pattern"]["Regex"] for split in splits if split["type"] == "Split")
    lines = [f"{base64.b64encode(bytes(byte_of[c] for c in t)).decode()} {rank}\n" for rank, t in ranks]
    return "".join(lines), dump({"pat_str": pattern, "special_tokens": special})


def pull(name):
    """Fetches a published tag: the native checkpoints of both stages and tokenizer.json, never the pickle."""
    pattern = r"([\w.-]+)/nanochat-(d\d+-\d+tpp(?:-drope-\d+)?(?:-long)?)(?:-hf)?(?:-base|-sft)?"
    if not (found := re.fullmatch(pattern, name)):
        sys.exit(f"--pull {name}: give it as USER/nanochat-d18-9tpp-drope-50")
    user, tag = found[1], found[2].replace("-", "_")
    other = "set NANOCHAT_BASE_DIR to another folder"

    def get(path, dest):
        return fetch(repo, path, dest, repo_type="model", sha256=there[path])

    try:
        repo, folder = repo_name(user, tag, "hf-sft"), base_dir() / "tokenizer"
        there = hub_files(repo)
        with tempfile.TemporaryDirectory() as temp:
            path = get("tokenizer.json", Path(temp) / "tokenizer.json")
            ranks, config = tokenizer_from_json(path.read_text(encoding="utf-8"))
        if (folder / "tokenizer.tiktoken").exists() and (folder / "tokenizer.tiktoken").read_text() != ranks:
            sys.exit(f"{folder} holds another tokenizer than {repo}: {other}")
        atomic_write(folder / "tokenizer.tiktoken", ranks)
        atomic_write(folder / "config.json", config)
        for stage in ("base", "sft"):
            repo, folder = repo_name(user, tag, stage), source_of(stage, tag)
            there = hub_files(repo)
            step = max(int(m[1]) for m in map(re.compile(r"meta_(\d+)\.json").fullmatch, there) if m)
            files, newest = checkpoint_files(folder, step), newest_checkpoint(folder)
            if newest == step:
                print(f"{folder} is there already: skipped")
                continue
            if newest is not None:
                sys.exit(f"{folder} holds another run (step {newest}, not {step}): {other}")
            for part in ("model", "optim"):
                get(files[part].name, files[part])
            fetched = get(files["meta"].name, folder / "meta.json.part")
            meta = json.loads(fetched.read_text())
            # Early published checkpoints lost use_rope after fine-tuning; the tag says what the model was trained to be
            said, use_rope = meta.setdefault("loop_state", {}).get("use_rope"), "_drope_" not in tag
            if said != use_rope:
                print(f"{repo} says use_rope {said}; set to {use_rope}, as its name says")
                meta["loop_state"]["use_rope"] = use_rope
            meta["sha256"] = {file: h for file, h in meta.get("sha256", {}).items() if file in there}
            atomic_write(files["meta"], json.dumps(meta, indent=1))
            fetched.unlink()
            print(f"{repo} -> {folder}, step {step}")
    except FetchError as e:
        sys.exit(f"{e}. Run the same command again: what arrived is kept")
    except Exception as e:                                  # no such repository, no hub, a file of another kind ...
        sys.exit(f"{repo} could not be fetched: {one_line(e)}")


# ---- Main ------------------------------------------------------------------------------------------------------

def main(args=None):
    cfg = parse_config(Config, __doc__, args)
    if cfg.stage not in ("base", "sft", "all"):
        sys.exit(f"--stage {cfg.stage}: choose base, sft or all")
    if cfg.pull:
        return pull(cfg.pull)
    tags = [cfg.tag]
    if cfg.push and cfg.all:
        folders = (base_dir() / "chatsft_checkpoints").glob("d*tpp*")
        tags = sorted(f.name for f in folders if re.fullmatch(r"d\d+_\d+tpp(_drope_\d+)?(_long)?", f.name))
        if not tags:
            sys.exit(f"no tags in {base_dir() / 'chatsft_checkpoints'}: `bash run_all.sh release` makes them")
    elif not re.fullmatch(r"[\w.-]+", cfg.tag):
        sys.exit("which model? --tag d18_9tpp_drope_50 (see --help)")
    if cfg.push:
        return push(cfg.push, tags, cfg.dry_run)
    stages = ["base", "sft"] if cfg.stage == "all" else [cfg.stage]
    for stage in [s for s in stages if source_of(s, cfg.tag).is_dir()] or stages:
        export(stage, cfg.tag)


if __name__ == "__main__":
    main()
