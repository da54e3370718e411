"""The model of the miniseries: a decoder-only transformer with one size dial, its depth. And a switch: use_rope.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig.from_depth(18))       # 362,151,936 parameters
    loss = model(idx, targets)                  # sum of the cross entropies of a batch, ready for backward()
    model.use_rope = False                      # DroPE: from here on without positional embeddings

Pre-norm blocks, RMSNorm without weights, RoPE followed by QK-norm, SwiGLU, no biases, untied head, softcapped logits.
RoPE (arXiv:2104.09864) helps a transformer to learn fast; dropped in the middle of pretraining (DroPE,
arXiv:2512.12167) it no longer ties the model to the lengths it was trained at. Causal attention alone
still lets the model know the order of tokens, so nothing takes RoPE's place.

This file can be copied alone: it needs torch only. Its last section is the plumbing that pretrain.py, sft.py, export_hf.py
and eval.py share (checkpoints, downloads, processes); it imports what it needs inside its functions, so whoever
copies the model can delete it. Left out: a key-value cache (modeling_nanochat.py has it), dropout, GQA.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

HEAD_DIM = 128
ROPE_THETA = 100_000.0
SOFTCAP = 15.0


# ---- Sizes: everything follows from the depth ------------------------------------------------------------------

@dataclass
class GPTConfig:
    sequence_len: int = 4096
    vocab_size: int = 32768
    n_layer: int = 18
    n_head: int = 9
    n_kv_head: int = 9      # always n_head here; the field keeps checkpoints readable for the nanochat repo
    n_embd: int = 1152

    @classmethod
    def from_depth(cls, depth, vocab_size=32768, sequence_len=4096):
        """64 channels a layer, rounded up to whole heads of 128."""
        n_head = -(-64 * depth // HEAD_DIM)
        return cls(sequence_len, vocab_size, depth, n_head, n_head, n_head * HEAD_DIM)

    @property
    def intermediate_size(self):
        """Two thirds of 4 x n_embd, so that SwiGLU's three matrices cost what two would (arXiv:2002.05202)."""
        return round(8 / 3 * self.n_embd / 128) * 128


# ---- The layers ------------------------------------------------------------------------------------------------

def norm(x):
    """RMSNorm without weights over the last dimension (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotary_tables(T, head_dim, device, theta=ROPE_THETA):
    """cos and sin of position x frequency, each (T, head_dim/2), float32 (arXiv:2104.09864)."""
    freqs = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(T, dtype=torch.float32, device=device), freqs)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates each pair (x1[i], x2[i]) of a (B, T, n_head, head_dim) tensor by its angle, x1 and x2 being the halves of
    head_dim: (x1 cos + x2 sin, x2 cos - x1 sin). cos and sin: (T, 1, head_dim), the latter with -sin in its second half.
    The direction is the released checkpoints' own: the transpose of the textbook's rotation."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)     # (x2, x1)
    return x * cos + swapped * sin


class Linear(nn.Linear):
    """No bias; weights stay float32 and are cast to the activations' dtype where they are used, or, for training, once for all
    micro-batches of a step (`cast`, see accumulate_gradients). With fp8 set, training (not evaluation) multiplies in float8."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.fp8, self.cast = False, None

    def forward(self, x):
        weight = self.weight.to(x.dtype) if self.cast is None else self.cast
        if self.fp8 and torch.is_grad_enabled():
            return Float8Matmul.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return F.linear(x, weight)


def to_float8(x, dtype):
    """x in float8 and the float32 scale that brings it back: the largest entry becomes the largest number of the dtype."""
    most = torch.finfo(dtype).max
    scale = most / x.abs().max().float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-most, most).to(dtype), 1 / scale


def float8_mm(a, a_scale, b, b_scale, dtype, fast=False):
    """(M, K) @ (K, N) of float8. The GPU wants `a` by rows and `b` by columns in memory; elsewhere it is emulated. Sums are in float32,
    or with `fast` on a GPU in the fewer bits of Hopper's tensor cores: good enough forward, not for gradients (torchao's defaults)."""
    if a.is_cuda:
        return torch._scaled_mm(a.contiguous(), b.t().contiguous().t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast)
    return ((a.float() @ b.float()) * (a_scale * b_scale)).to(dtype)


class Float8Matmul(torch.autograd.Function):
    """x W^T: forward in e4m3, which has more precision, gradients in e5m2, which has more range (arXiv:2209.05433)."""

    @staticmethod
    def forward(ctx, x, weight):                            # (N, C_in), (C_out, C_in)
        (x8, x_scale), (w8, w_scale) = to_float8(x, torch.float8_e4m3fn), to_float8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return float8_mm(x8, x_scale, w8.t(), w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):                                # (N, C_out)
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = to_float8(grad, torch.float8_e5m2)
        return float8_mm(g8, g_scale, w8, w_scale, grad.dtype), float8_mm(g8.t(), g_scale, x8, x_scale, grad.dtype)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.n_head, self.head_dim = config.n_head, C // config.n_head
        self.c_q, self.c_k, self.c_v, self.c_proj = Linear(C, C), Linear(C, C), Linear(C, C), Linear(C, C)

    def attend(self, q, k, v):
        """Full causal attention, scale 1/sqrt(head_dim); (B, n_head, T, head_dim) each."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def forward(self, x, rotary):
        B, T, C = x.shape
        q, k, v = (f(x).view(B, T, self.n_head, self.head_dim) for f in (self.c_q, self.c_k, self.c_v))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k = norm(q), norm(k)                             # QK-norm, after the rotation (arXiv:2302.05442)
        y = self.attend(*(t.transpose(1, 2) for t in (q, k, v)))    # (B, n_head, T, head_dim)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, I = config.n_embd, config.intermediate_size
        self.w_gate, self.w_up, self.c_proj = Linear(C, I), Linear(C, I), Linear(I, C)

    def forward(self, x):
        return self.c_proj(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(config), MLP(config)

    def forward(self, x, rotary):
        x = x + self.attn(norm(x), rotary)
        return x + self.mlp(norm(x))


# ---- The loss, without ever holding the logits of the whole batch ------------------------------------------------

def softcapped(x, weight):
    """Logits 15 tanh(x W^T / 15) in float32 (arXiv:2408.00118): (N, C), (V, C) -> (N, V)."""
    return SOFTCAP * torch.tanh(F.linear(x, weight).float() / SOFTCAP)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross entropies, computed together with its gradients one chunk of positions at a time.

    At 16 x 4,096 positions and 32,768 ids one float32 copy of the logits takes 8.6 GB, and a plain loss holds several.
    Nothing needs them all at once: the loss is a sum, so its gradients with respect to x and W can be made as soon as a
    chunk's logits are there (Liger Kernel, arXiv:2410.10989). backward() only scales them."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):
        w = weight.to(x.dtype)                              # (V, C)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        slope = lambda z: 1 - (z / SOFTCAP).square()        # derivative of the softcap
        for i in range(0, x.size(0), chunk):
            xs, ts = x[i:i + chunk], targets[i:i + chunk].unsqueeze(1)      # (n, C), (n, 1)
            counted, ts = ts != -1, ts.clamp(min=0)         # (n, 1) each
            logits = softcapped(xs, w)                      # (n, V), at most 15: exp() cannot overflow
            e, hit = logits.exp(), logits.gather(1, ts)     # (n, V), (n, 1)
            total = e.sum(dim=1, keepdim=True)              # (n, 1)
            loss = loss + ((total.log() - hit) * counted).sum()
            # softmax - one-hot; first as if no id were the target, then the targets' own entries (1 of V) in their places
            grad = (e * slope(logits) * (counted / total)).to(x.dtype)      # (n, V)
            grad.scatter_(1, ts, ((hit.exp() / total - 1) * slope(hit) * counted).to(x.dtype))
            grad_x[i:i + chunk] = grad @ w
            grad_w += grad.T @ xs
        ctx.save_for_backward(grad_x, grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), grad_w * grad_loss, None, None


# ---- The model -------------------------------------------------------------------------------------------------

class GPT(nn.Module):
    """Decoder-only transformer. `use_rope` is part of the model, like its weights: save it with them.

    Activations are in `dtype` (bfloat16 on a GPU that has it, set by the caller; float32 otherwise)."""

    def __init__(self, config, use_rope=True, dtype=torch.float32):
        super().__init__()
        if config.n_kv_head != config.n_head:
            raise ValueError(f"n_kv_head {config.n_kv_head}: this model has as many key heads as heads ({config.n_head})")
        self.config, self.use_rope, self.dtype = config, use_rope, dtype
        rows = -(-config.vocab_size // 64) * 64             # a multiple of 64 suits the matmul units
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(rows, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer))})
        self.lm_head = Linear(config.n_embd, rows)
        self.rotary_tables = rotary_tables                  # an attribute, so that eval.py can try other tables

    @torch.no_grad()
    def init_weights(self):
        """Residual branches start at zero (both c_proj), so every block begins as the identity."""
        uniform = 3 ** 0.5 * self.config.n_embd ** -0.5     # U(-a, a) has std a / sqrt(3)
        nn.init.normal_(self.transformer.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(linear.weight, -uniform, uniform)
            for linear in (block.mlp.w_gate, block.mlp.w_up):
                nn.init.uniform_(linear.weight, -0.4 * uniform, 0.4 * uniform)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)

    def forward(self, idx, targets=None, reduction="sum", chunk=None):
        """idx (B, T) int64 -> float32 logits (B, T, vocab_size); with targets (B, T; -1 is not counted) the sum of
        the cross entropies in nats, or with reduction="none" each of them, (B, T). chunk: positions whose logits are held at a
        time; 4,096 keep a GPU busy, 512 suit a CPU's caches."""
        B, T = idx.shape
        chunk = chunk or (4096 if idx.is_cuda else 512)
        rotary = None
        if self.use_rope:                                   # DroPE: this line is all that the model knows of it
            rotary = self.rotary(T, idx.device)
        x = self.transformer.wte(idx).to(self.dtype)        # (B, T, C)
        for block in self.transformer.h:
            x = block(x, rotary)
        x = norm(x)
        head = self.lm_head.weight[:self.config.vocab_size]
        if targets is None:
            return softcapped(x, head.to(x.dtype))
        x, targets = x.reshape(B * T, -1), targets.reshape(B * T)
        if reduction == "sum":
            return ChunkedCrossEntropy.apply(x, head, targets, chunk)
        losses = [F.cross_entropy(softcapped(xs, head.to(x.dtype)), ts, ignore_index=-1, reduction="none")
                  for xs, ts in zip(x.split(chunk), targets.split(chunk))]
        return torch.cat(losses).view(B, T)

    # Constant in a compiled graph, or all its layers would compute cosines; so rotary_tables must not change once it is compiled
    @torch.compiler.assume_constant_result
    def rotary(self, T, device):
        """The tables as rotate() wants them, cos and sin in one tensor, (2, T, 1, head_dim)."""
        cos, sin = self.rotary_tables(T, self.config.n_embd // self.config.n_head, device)
        return torch.stack((torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1))).unsqueeze(2).to(self.dtype)

    def num_scaling_params(self):
        """N of the scaling rules: block matrices + lm_head, the parameters that do a token's matmuls."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wte.weight.numel()

    def flops_per_token(self, T=None):
        """Forward + backward: 6 for each parameter of N, and 12 x T/2 (causal) x n_embd for each layer's attention."""
        return 6 * self.num_scaling_params() + 6 * self.config.n_layer * self.config.n_embd * (T or self.config.sequence_len)


# ---- Plumbing shared by the scripts (delete from here when you copy the model) ---------------------------------------
# Errors that a user can mend end the program by sys.exit(one line): what, where, how to mend.

INTERRUPTED = 75        # exit status "stopped on request, everything saved: run the same command again" (EX_TEMPFAIL)


def base_dir():
    """The folder of all artifacts: $NANOCHAT_BASE_DIR, or out/ here."""
    import os
    from pathlib import Path
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "out")


def parse_config(cls, doc, args=None):
    """Fills the dataclass `cls` from the command line. A field `batch_size: int = 8  # rows a step` becomes the option
    --batch-size with that help; a bool becomes a switch; a type `int | None` means "worked out when not given"."""
    import argparse, dataclasses, inspect, re, sys, types, typing
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            sys.exit(f"{self.prog}: {message} (see {self.prog} --help)")
    helps = dict(re.findall(r"^\s+(\w+): [^#\n]*#\s*(.*)$", inspect.getsource(cls), re.M))
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        flag, text = "--" + f.name.replace("_", "-"), helps.get(f.name, "").replace("%", "%%")
        kind = next((t for t in typing.get_args(f.type) if t is not types.NoneType), f.type) if not isinstance(f.type, type) else f.type
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            text += "" if f.default in (None, "") else f" (default: {f.default})"
            parser.add_argument(flag, type=kind, default=f.default, metavar=kind.__name__.upper(), help=text)
    return cls(**vars(parser.parse_args(args)))


def log_head(config, **more):
    """The head of a log: commit, versions, resolved config."""
    import platform, subprocess, sys
    from pathlib import Path
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    print(f"# {' '.join(sys.argv)}\n# commit {commit or 'unknown'} | python {platform.python_version()} | torch {torch.__version__} | {platform.machine()}")
    for key, value in {**vars(config), **more}.items():
        print(f"# {key} = {value}")


# Tokenizer

def load_tokenizer(folder):
    """The tiktoken.Encoding that tok.py stored in `folder`."""
    import json, sys
    from pathlib import Path
    folder = Path(folder)
    if not (folder / "config.json").exists() or not (folder / "tokenizer.tiktoken").exists():
        sys.exit(f"no tokenizer in {folder}: make one with `python tok.py --out-dir {folder}`")
    import base64, tiktoken
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = (folder / "tokenizer.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
        return tiktoken.Encoding("nanochat", pat_str=config["pat_str"], mergeable_ranks=ranks,
                                 special_tokens=config["special_tokens"])
    except (ValueError, KeyError) as e:
        sys.exit(f"the tokenizer in {folder} is damaged ({e}): delete the folder and run `python tok.py --out-dir {folder}`")


def token_bytes(enc):
    """Bytes of each id, int64 (n_vocab,), 0 for special tokens: what bits per byte divides by."""
    special = set(enc._special_tokens.values())
    return torch.tensor([0 if i in special else len(enc.decode_single_token_bytes(i)) for i in range(enc.n_vocab)])


def tokenizer_hash(enc):
    """A short name for what the tokenizer does, so that a checkpoint tells which one it was trained with."""
    import hashlib
    text = repr((enc._pat_str, sorted(enc._mergeable_ranks.items()), sorted(enc._special_tokens.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Files

def sync_dir(folder):
    import os
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path, write):
    """Makes the file `path` whole or not at all: `write` (bytes, str, or a function of the open file) goes to a temporary
    name, is synced and renamed. Returns the sha256 of what was written. Disk full, read-only...: one line and exit."""
    import hashlib, os, sys
    from pathlib import Path
    path, sha256 = Path(path), hashlib.sha256()
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    class Hashed:                                           # torch.save needs no more of a file than this
        def __init__(self, file): self.file = file
        def write(self, data): sha256.update(data); return self.file.write(data)
        def flush(self): self.file.flush()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, "wb") as f:
            if callable(write):
                write(Hashed(f))
            else:
                Hashed(f).write(write.encode() if isinstance(write, str) else write)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
        sync_dir(path.parent)
    except (OSError, RuntimeError) as e:                    # torch.save turns a full disk into a RuntimeError
        temp.unlink(missing_ok=True) if os.access(path.parent, os.W_OK) else None
        cause = e if isinstance(e, OSError) else e.__context__ or e
        sys.exit(f"cannot write {path}: {cause}; what was there before is untouched. Free some space or choose another folder (NANOCHAT_BASE_DIR)")
    return sha256.hexdigest()


def append_record(file, record):
    """Adds a line of JSON to an open file. A full disk: one line and exit."""
    import json, sys
    try:
        file.write(json.dumps(record) + "\n")
        file.flush()
    except OSError as e:
        sys.exit(f"cannot write {file.name}: {e.strerror}; earlier checkpoints are untouched")


def lock(folder):
    """Lets one run at a time write to `folder`. The lock goes with the process, however that ends (flock)."""
    import fcntl, os, socket, sys
    from pathlib import Path
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder) / ".lock", "a+")
    except OSError as e:
        sys.exit(f"cannot write to {folder}: {e.strerror}; choose another folder with NANOCHAT_BASE_DIR")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        sys.exit(f"{folder} is in use by {file.read().strip() or 'another run'}: wait for it or stop it")
    for half_written in Path(folder).glob(".*.tmp"):        # by a run that was killed
        half_written.unlink(missing_ok=True)
    file.truncate(0)
    file.write(f"host {socket.gethostname()} pid {os.getpid()}\n")
    file.flush()
    return file                                             # keep it: closing the file ends the lock


# Checkpoints: model_, optim_ and loader_ files, then meta_*.json last, so that a meta file means a whole checkpoint

def checkpoint_files(folder, step):
    from pathlib import Path
    return {name: Path(folder) / file for name, file in (
        ("model", f"model_{step:06d}.pt"), ("optim", f"optim_{step:06d}_rank0.pt"),
        ("loader", f"loader_{step:06d}.pt"), ("meta", f"meta_{step:06d}.json"))}


def checkpoint_steps(folder):
    """The steps of the whole checkpoints in `folder`, ascending."""
    import re
    from pathlib import Path
    names = (re.fullmatch(r"meta_(\d{6,})\.json", p.name) for p in Path(folder).glob("meta_*.json"))
    return sorted(int(m[1]) for m in names if m)


def save_checkpoint(folder, step, model, optimizer, loader_state, meta, keep=()):
    """Writes a checkpoint, then deletes the others but for the one before it and those of the steps in `keep`."""
    import json, re
    from pathlib import Path
    files = checkpoint_files(folder, step)
    parts = {"model": model.state_dict(), "optim": optimizer.state_dict(), "loader": loader_state}
    meta["sha256"] = {files[name].name: atomic_write(files[name], lambda f: torch.save(part, f)) for name, part in parts.items()}
    atomic_write(files["meta"], json.dumps(meta, indent=1))
    kept = {*keep, *[s for s in checkpoint_steps(folder) if s <= step][-2:]}
    for path in sorted(Path(folder).glob("*_*.*")):         # meta_ before model_ and optim_: never a meta without its files
        number = re.fullmatch(r"(?:meta|model|optim|loader)_(\d{6,})(?:_rank0)?\.(?:pt|json)", path.name)
        if number and int(number[1]) not in kept:
            path.unlink(missing_ok=True)


def read_meta(folder, step):
    import json
    return json.loads(checkpoint_files(folder, step)["meta"].read_text())


def check_checkpoint(folder, step):
    """Says in a few words what is wrong with a checkpoint, or "" where all its sha256 are as its meta file says."""
    import hashlib
    try:
        meta = read_meta(folder, step)
        for name, expected in meta.get("sha256", {}).items():
            with open(checkpoint_files(folder, step)["meta"].with_name(name), "rb") as f:
                sha256 = hashlib.sha256()
                while block := f.read(1 << 24):
                    sha256.update(block)
                if sha256.hexdigest() != expected:
                    return f"{name} is damaged (its sha256 is not the one in its meta file)"
    except (OSError, ValueError) as e:
        return str(e)
    return ""


def newest_checkpoint(folder, steps=None):
    """The step of the newest undamaged checkpoint, None where there is none; damaged ones are named and passed over."""
    import sys
    for path in sorted(folder.glob("model_*.pt")):
        if not path.with_name(path.name.replace("model_", "meta_").replace(".pt", ".json")).exists():
            print(f"passing over {path}: it has no meta file, so its checkpoint was never finished (or lost its meta)", file=sys.stderr)
    for step in reversed(checkpoint_steps(folder) if steps is None else steps):
        problem = check_checkpoint(folder, step)
        if not problem:
            return step
        print(f"passing over the checkpoint of step {step} in {folder}: {problem}", file=sys.stderr)


def load_part(folder, step, part, device="cpu"):
    """One file ("model", "optim" or "loader") of a checkpoint."""
    return torch.load(checkpoint_files(folder, step)[part], map_location=device, weights_only=True)


def load_model(folder, step=None, device="cpu", dtype=torch.float32):
    """The GPT of a checkpoint (the newest undamaged one) and its meta, use_rope included."""
    import sys
    from pathlib import Path
    folder = Path(folder)
    step = newest_checkpoint(folder) if step is None else step
    if step is None:
        stage = "sft.py" if "chatsft" in str(folder) else "pretrain.py"
        sys.exit(f"no checkpoint in {folder}: make one with `python {stage} --tag {folder.name}`")
    meta = read_meta(folder, step)
    use_rope = meta.get("loop_state", {}).get("use_rope")
    if use_rope is None:
        sys.exit(f"{checkpoint_files(folder, step)['meta']} does not say whether the model has RoPE (loop_state.use_rope): add true or false")
    model = GPT(GPTConfig(**meta["model_config"]), use_rope, dtype)
    model.load_state_dict({k: v.float() for k, v in load_part(folder, step, "model").items()})
    return model.to(device), meta


# Downloads

class FetchError(Exception):
    """A file that could not be had, in one line."""


def fetch(repo_id, filename, dest, repo_type="dataset", revision="main", sha256=None, patience=600):
    """Downloads a file of a hub repository to the path `dest` through huggingface_hub, which heeds HF_ENDPOINT, HF_TOKEN and
    proxies, and checks the hub's own hash (huggingface_hub does not). Tries again, with pauses that grow and heed Retry-After,
    for `patience` seconds; then raises FetchError. Several processes may ask for one file: it is fetched once."""
    import fcntl, hashlib, os, shutil, sys, time
    from pathlib import Path
    dest = Path(dest)
    if dest.exists():
        return dest
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    dest.parent.mkdir(parents=True, exist_ok=True)
    part = dest.parent / ".part" / dest.name                # a folder: huggingface_hub keeps its own files in it
    part.mkdir(parents=True, exist_ok=True)
    with open(dest.parent / ".part" / f"{dest.name}.lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        start, pause = time.time(), 1.0
        while not dest.exists():
            try:
                if sha256 is None:
                    etag = get_hf_file_metadata(hf_hub_url(repo_id, filename, repo_type=repo_type, revision=revision)).etag
                    sha256 = etag if len(etag) == 64 else "git:" + etag     # small files have git's hash only
                got = Path(hf_hub_download(repo_id, filename, repo_type=repo_type, revision=revision, local_dir=part))
                if sha256.startswith("git:"):
                    digest = hashlib.sha1(b"blob %d\0" % got.stat().st_size)
                else:
                    digest = hashlib.sha256()
                with open(got, "rb+") as f:
                    while block := f.read(1 << 22):
                        digest.update(block)
                    os.fsync(f.fileno())
                if digest.hexdigest() != sha256.removeprefix("git:"):
                    shutil.rmtree(part)
                    raise OSError("damaged on the way: its hash is not the hub's")
                os.replace(got, dest)
                shutil.rmtree(part)
            except Exception as e:                          # the many ways in which a download fails
                absent = isinstance(e, (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError))
                if absent and not isinstance(e, LocalEntryNotFoundError):       # the latter means: no connection
                    raise FetchError(f"the hub has no {filename} in {repo_id} (revision {revision}): {type(e).__name__}") from None
                if isinstance(e, OSError) and e.errno in (28, 30, 13, 122):     # full, read-only, not allowed, quota
                    raise FetchError(f"cannot write {dest}: {e.strerror}") from None
                headers = getattr(getattr(e, "response", None), "headers", None) or {}
                asked = headers.get("Retry-After", "")
                wait = max(pause, float(asked)) if asked.isdigit() else pause
                reason = (str(e).strip() or type(e).__name__).splitlines()[0][:160]
                if time.time() - start + wait > patience:
                    raise FetchError(f"{filename} of {repo_id} could not be fetched in {patience:.0f} s: {reason}") from None
                print(f"fetching {filename}: {reason}; again in {wait:.0f} s", file=sys.stderr, flush=True)
                time.sleep(wait)
                pause = min(2 * pause, 60.0)
    return dest


# Processes and devices

@dataclass
class Env:
    """Where a process runs. rank 0 of `world` processes writes, logs and downloads."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype                                      # of activations
    peak_flops: float | None                                # of the device in that dtype, dense, where known


def setup_env(dtype=""):
    """Device, dtype and, under torchrun, the process group (NCCL on GPUs, else gloo)."""
    import datetime, os
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name(device)
        peak = 989e12 if "H100" in name or "H200" in name else 312e12 if "A100" in name else None
    else:
        mps = torch.backends.mps.is_available() and "RANK" not in os.environ        # gloo has no tensors of MPS
        device, peak = torch.device("mps" if mps else "cpu"), None
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = getattr(torch, dtype) if dtype else torch.bfloat16 if bf16 else torch.float32
    if "RANK" in os.environ:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=1))
        return Env(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, dtype, peak)
    return Env(0, 1, device, dtype, peak)


class StopRequest:
    """True once SIGTERM, SIGUSR1 (a scheduler's warning) or Ctrl-C came; a second Ctrl-C interrupts at once."""

    def __init__(self):
        import signal
        self.signal = None
        for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(s, self.take)

    def take(self, number, frame):
        import signal
        self.signal = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __bool__(self):
        return self.signal is not None


def set_fp8(model, device):
    """Float8 for the matmuls of the blocks (not the head); exits where the device has none."""
    import sys
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        sys.exit(f"--fp8 needs a GPU with float8 matmuls (H100 or newer), not {device.type}: leave it out")
    for module in model.transformer.h.modules():
        if isinstance(module, Linear):
            module.fp8 = True


def attention_kernel(env, config):
    """Asks for cuDNN's attention first, then flash, for the rest of the process; returns the name of what will be used."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    if env.device.type == "cuda":
        sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
                    set_priority=True).__enter__()
    if env.device.type == "mps":
        return "MPS"
    q = torch.empty(1, config.n_head, config.sequence_len, config.n_embd // config.n_head, device=env.device, dtype=env.dtype)
    return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name


def any_process(flag, env):
    """Whether `flag` is true on any of the processes."""
    if env.world == 1:
        return bool(flag)
    flag = torch.tensor(int(bool(flag)), device=env.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def try_compile(model, device, wanted):
    """torch.compile of model and loss in one graph; without it where it is not wanted or there is no compiler."""
    import shutil, sys
    if not wanted:
        return model
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))) or device.type == "mps" or sys.platform == "win32":
        print("torch.compile is left out: no C++ compiler here" if device.type == "cpu" else f"torch.compile is left out on {device.type}", file=sys.stderr)
        return model
    torch._dynamo.config.recompile_limit = 32               # a graph for training and for validation, with and without RoPE, and for the
    return torch.compile(model, fullgraph=True, dynamic=False)      # sizes of last batches; each of a fixed shape


def broadcast(tensor, env, shape, dtype):
    """Rank 0's tensor on every process' device."""
    tensor = tensor.to(env.device, non_blocking=True) if env.rank == 0 else torch.empty(shape, dtype=dtype, device=env.device)
    if env.world > 1:
        torch.distributed.broadcast(tensor, 0)
    return tensor


def accumulate_gradients(model, inputs, targets, micro, env):
    """Gradients of the mean loss over the counted targets (not -1) of a whole batch of rows, (rows, T) each, the same on
    all processes; every process runs its share of the rows, `micro` at a time. Returns the mean loss, a tensor."""
    counted = (targets != -1).sum().clamp(min=1)            # of the whole batch: no micro-batch can divide by zero
    share = len(inputs) // env.world
    mine = slice(env.rank * share, (env.rank + 1) * share)
    loss = torch.zeros((), device=env.device)
    # In place of each weight of the blocks stands a copy in the activations' dtype: made once, it collects the micro-batch's gradient
    linears = [m for m in model.transformer.h.modules() if isinstance(m, Linear) and model.dtype != m.weight.dtype]
    try:
        for m in linears:
            m.cast = m.weight.detach().to(model.dtype).requires_grad_()
        for x, y in zip(inputs[mine].split(micro), targets[mine].split(micro)):
            part = model(x, y) / counted
            part.backward()
            loss += part.detach()
            for m in linears:                               # the sum over the micro-batches is in float32
                m.weight.grad = m.cast.grad.float() if m.weight.grad is None else m.weight.grad.add_(m.cast.grad)
                m.cast.grad = None
    finally:
        for m in linears:
            m.cast = None
    if env.world > 1:
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
        torch.distributed.all_reduce(loss)
    return loss


@torch.no_grad()
def bits_per_byte(model, batches, nbytes, env):
    """Bits per byte of the targets of `batches`, an iterable of (inputs, targets) that is the same on all processes; each
    takes every world-th batch. nbytes: bytes of each id; targets of 0 bytes (special) and -1 are not counted."""
    total = torch.zeros(2, dtype=torch.float64 if env.device.type != "mps" else torch.float32)     # nats, bytes
    for i, (x, y) in enumerate(batches):
        if i % env.world == env.rank:
            y = y.to(env.device)
            size = nbytes[y.clamp(min=0)] * (y != -1)       # (B, T)
            losses = model(x.to(env.device), y, reduction="none") * (size > 0)
            total += torch.stack([losses.sum().double() if total.dtype == torch.float64 else losses.sum(), size.sum()]).to(total)
    if env.world > 1:
        total = total.to(env.device)
        torch.distributed.all_reduce(total)
    nats, size = total.tolist()
    return nats / (math.log(2) * size) if size else float("nan")
