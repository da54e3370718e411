"""The model of the miniseries: a decoder-only transformer with one dial, its depth, and a switch.

    from model import GPT, GPTConfig
    model = GPT(GPTConfig.from_depth(18))       # 362,151,936 parameters
    model.init_weights()
    loss = model(idx, targets)                  # sum of the cross entropies, ready for backward()
    model.use_rope = False                      # DroPE: from here on without positional embeddings

Pre-norm blocks, RMSNorm without weights, RoPE followed by QK-norm, SwiGLU, no biases, untied head,
softcapped logits. RoPE (arXiv:2104.09864) helps a transformer learn fast. Once it is dropped in the
middle of pretraining (DroPE, arXiv:2512.12167), the model is no longer tied to the lengths it was
trained at. Nothing replaces it: the causal mask alone lets a model learn the order of tokens.

To copy the model into another project, delete everything below "What the scripts share": the model
itself needs only torch, math, copy and dataclass. Left out: dropout,
grouped-query attention.
"""
import copy
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

HEAD_DIM = 128
ROPE_THETA = 100_000.0
SOFTCAP = 15.0


# ---- Sizes: everything follows from the depth ----------------------------------------------------

@dataclass
class GPTConfig:
    sequence_len: int = 4096
    vocab_size: int = 32768
    n_layer: int = 18
    n_head: int = 9
    n_kv_head: int = 9  # always n_head here; karpathy/nanochat reads this field
    n_embd: int = 1152

    @classmethod
    def from_depth(cls, depth, vocab_size=32768, sequence_len=4096):
        """64 channels/layer, rounded up to whole heads of 128."""
        n_head = math.ceil(64 * depth / HEAD_DIM)
        return cls(sequence_len, vocab_size, depth, n_head, n_head, n_head * HEAD_DIM)

    @property
    def intermediate_size(self):
        """8/3 n_embd: SwiGLU's 3 matrices cost as much as an MLP's 2 at 4 n_embd
        (arXiv:2002.05202)."""
        return round(8 / 3 * self.n_embd / 128) * 128


# ---- Building blocks -----------------------------------------------------------------------------
# Shapes: B rows of T tokens, C = n_embd channels, n_head heads of head_dim, V = vocabulary

def norm(x):
    """RMSNorm without weights over the last dimension (arXiv:1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rotary_tables(T, head_dim, device, theta=ROPE_THETA):
    """cos and sin of position x frequency, each (T, head_dim/2), float32 (arXiv:2104.09864)."""
    freqs = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(T, dtype=torch.float32, device=device), freqs)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotates each pair (x1[i], x2[i]) of x (B, T, n_head, head_dim), x1 and x2 being the halves of
    head_dim, to (x1 cos + x2 sin, x2 cos - x1 sin). cos and sin: (T, 1, head_dim) as GPT.rotary
    makes them, sin with its second half negated. The published models rotate in this direction,
    textbooks in the other."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # (x2, x1)
    return x * cos + swapped * sin


def query_scale(positions, n_train, c):
    """max(1, 1 + c ln(n / n_train)) for queries at `positions` (..., T), which attend to n =
    position + 1 tokens: float32 (..., T, 1, 1). The more tokens compete in a softmax, the smaller
    the right one's share. Sharper logits compensate for that (arXiv:2501.19399)."""
    n = (positions + 1).float()
    return (1 + c * (n / n_train).log()).clamp(min=1)[..., None, None]


class Linear(nn.Linear):
    """No bias. The weight is stored in float32 and cast to the dtype of the activations. With fp8
    set, training (not evaluation) multiplies in float8."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.fp8 = False

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if self.fp8 and torch.is_grad_enabled():
            return Float8Matmul.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return F.linear(x, weight)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, self.layer = config.n_embd, layer
        self.n_head, self.head_dim = config.n_head, C // config.n_head
        self.c_q, self.c_k, self.c_v = Linear(C, C), Linear(C, C), Linear(C, C)
        self.c_proj = Linear(C, C)

    def forward(self, x, rotary=None, q_scale=None, cache=None):
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_dim)
        q, k, v = self.c_q(x).view(heads), self.c_k(x).view(heads), self.c_v(x).view(heads)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        q, k = norm(q), norm(k)  # QK-norm, after the rotation (arXiv:2302.05442)
        if q_scale is not None:
            q = q * q_scale
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n_head, T, ...)
        mask = None
        if cache is not None:
            k, v, mask = cache.extend(self.layer, k, v)  # now with all earlier tokens
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))  # concatenate heads


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, I = config.n_embd, config.intermediate_size
        self.w_gate, self.w_up, self.c_proj = Linear(C, I), Linear(C, I), Linear(I, C)

    def forward(self, x):
        return self.c_proj(F.silu(self.w_gate(x)) * self.w_up(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(config, layer), MLP(config)

    def forward(self, x, rotary=None, q_scale=None, cache=None):
        x = x + self.attn(norm(x), rotary, q_scale, cache)
        return x + self.mlp(norm(x))


# ---- The loss, without holding all logits at once ------------------------------------------------

def softcapped(x, weight):
    """Logits 15 tanh(x W^T / 15) in float32 (arXiv:2408.00118): (N, C), (V, C) -> (N, V)."""
    return SOFTCAP * torch.tanh(F.linear(x, weight).float() / SOFTCAP)


def softcap_slope(logits):
    """The derivative of the softcap, from its own output."""
    return 1 - (logits / SOFTCAP).square()


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies and its gradients, computed one chunk of positions at a time.

    At 16 x 4,096 positions and 32,768 ids, one float32 copy of the logits takes 8.6 GB, and a plain
    loss holds several. But the loss is a sum, so the gradients of a chunk can be computed as soon
    as its logits are (Liger Kernel, arXiv:2410.10989). backward() only scales them."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):  # (N, C), (V, C), (N,)
        w = weight.to(x.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x, grad_w = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, x.size(0), chunk):
            xs, target = x[i:i + chunk], targets[i:i + chunk].unsqueeze(1)  # (n, C), (n, 1)
            counted, target = target != -1, target.clamp(min=0)
            logits = softcapped(xs, w)  # (n, V), at most 15: exp() is finite
            e, hit = logits.exp(), logits.gather(1, target)  # (n, V), (n, 1)
            total = e.sum(dim=1, keepdim=True)  # (n, 1)
            loss = loss + ((total.log() - hit) * counted).sum()
            # The gradient of the logits is softmax - one_hot(target). First the softmax, ...
            grad = (e * softcap_slope(logits) * (counted / total)).to(x.dtype)  # (n, V)
            # ... then each row's target entry is recomputed with the - 1
            at_target = (hit.exp() / total - 1) * softcap_slope(hit) * counted
            grad.scatter_(1, target, at_target.to(x.dtype))
            grad_x[i:i + chunk] = grad @ w
            grad_w += grad.T @ xs
        ctx.save_for_backward(grad_x, grad_w)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * grad_loss.to(grad_x.dtype), grad_w * grad_loss, None, None


# ---- Float8: half the bits of bfloat16, twice the speed of a matmul on an H100 -------------------
# There are two formats (arXiv:2209.05433). e4m3 has 4 bits for the exponent and 3 for the mantissa:
# steps of 1/8, up to 448. e5m2 has 5 and 2: steps of 1/4, up to 57,344. Weights and activations
# need the precision, gradients the range.

def to_float8(x, dtype):
    """x in float8, scaled so that the largest |x| becomes the largest number of the dtype; and the
    float32 factor that undoes the scaling."""
    most = torch.finfo(dtype).max
    scale = most / x.abs().max().float().clamp(min=1e-12)
    return (x.float() * scale).clamp(-most, most).to(dtype), 1 / scale


def float8_mm(a, a_scale, b, b_scale, dtype, fast=False):
    """(M, K) @ (K, N) in float8, summed in float32. A GPU needs `a` in row-major and `b` in
    column-major order; a CPU emulates it, for tests. fast: Hopper sums in fewer bits, which is good
    enough for the forward pass, but not for gradients (the defaults of torchao)."""
    if not a.is_cuda:
        return ((a.float() @ b.float()) * (a_scale * b_scale)).to(dtype)
    a, b = a.contiguous(), b.t().contiguous().t()
    return torch._scaled_mm(a, b, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype,
                            use_fast_accum=fast)


class Float8Matmul(torch.autograd.Function):
    """y = x W^T and its gradients, grad_x = grad_y W and grad_W = grad_y^T x, all in float8."""

    @staticmethod
    def forward(ctx, x, weight):  # (N, C_in), (C_out, C_in) -> (N, C_out)
        x8, x_scale = to_float8(x, torch.float8_e4m3fn)
        w8, w_scale = to_float8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        return float8_mm(x8, x_scale, w8.t(), w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx, grad):  # (N, C_out)
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = to_float8(grad, torch.float8_e5m2)
        grad_x = float8_mm(g8, g_scale, w8, w_scale, grad.dtype)  # (N, C_in)
        grad_w = float8_mm(g8.t(), g_scale, x8, x_scale, grad.dtype)  # (C_out, C_in)
        return grad_x, grad_w


# ---- The model -----------------------------------------------------------------------------------

class GPT(nn.Module):
    """Decoder-only transformer. `use_rope` belongs to it like its weights: save it with them.

    Two attributes are for inference beyond the training length, config.sequence_len. logn_scale:
    the c of query_scale(), 0 as trained. rotary_tables: a function like the one above, for scaled
    RoPE. dtype: of the activations, bfloat16 on a GPU that has it, else float32."""

    def __init__(self, config, use_rope=True, dtype=torch.float32):
        super().__init__()
        if config.n_kv_head != config.n_head:
            raise ValueError(f"n_kv_head {config.n_kv_head}: this model has as many key heads as "
                             f"query heads ({config.n_head})")
        self.config, self.use_rope, self.dtype = config, use_rope, dtype
        V = math.ceil(config.vocab_size / 64) * 64  # a hardware-friendly multiple of 64
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(V, config.n_embd),
            "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer))})
        self.lm_head = Linear(config.n_embd, V)
        self.logn_scale = 0.0
        self.rotary_tables = rotary_tables

    @torch.no_grad()
    def init_weights(self):
        """Both c_proj are zero, so every block starts as the identity."""
        uniform = 3 ** 0.5 * self.config.n_embd ** -0.5  # U(-a, a) has std a / sqrt(3)
        nn.init.normal_(self.transformer.wte.weight, std=0.8)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                nn.init.uniform_(linear.weight, -uniform, uniform)
            for linear in (block.mlp.w_gate, block.mlp.w_up):
                nn.init.uniform_(linear.weight, -0.4 * uniform, 0.4 * uniform)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)

    def forward(self, idx, targets=None, reduction="sum", chunk=None, cache=None, last=0):
        """idx (B, T) int64 -> float32 logits (B, T, V), or (B, last, V) of the last positions only.
        With targets (B, T; -1: ignored): the sum of the cross entropies in nats, or, with
        reduction="none", each of them, (B, T).
        chunk: positions whose logits are in memory at a time; default: 4,096 on a GPU, else 512.
        cache: a KVCache whose rows idx continues, and which then also holds idx."""
        B, T = idx.shape
        chunk = chunk or (4096 if idx.is_cuda else 512)
        positions = torch.arange(T, device=idx.device) if cache is None else cache.start(T)
        rotary = q_scale = None
        if self.use_rope:  # DroPE: only here forward() depends on it
            rotary = self.rotary(T, idx.device) if cache is None else cache.rotary[:, positions]
            rotary = rotary.unbind()  # cos, sin: (..., T, 1, head_dim) each
        if self.logn_scale:  # never in training
            q_scale = query_scale(positions, self.config.sequence_len, self.logn_scale)
            q_scale = q_scale.to(self.dtype)
        x = self.transformer.wte(idx).to(self.dtype)  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, rotary, q_scale, cache)
        if cache is not None:
            cache.lengths += T
        x = norm(x[:, -last:])  # -0: all of them
        head = self.lm_head.weight[:self.config.vocab_size]
        if targets is None:
            return softcapped(x, head.to(x.dtype))
        x, targets = x.reshape(B * T, -1), targets.reshape(B * T)
        if reduction == "sum":
            return ChunkedCrossEntropy.apply(x, head, targets, chunk)
        losses = []
        for xs, ts in zip(x.split(chunk), targets.split(chunk)):
            logits = softcapped(xs, head.to(x.dtype))
            losses.append(F.cross_entropy(logits, ts, ignore_index=-1, reduction="none"))
        return torch.cat(losses).view(B, T)

    def rotary(self, T, device):
        """The tables as rotate() wants them, cos and sin in one tensor, (2, T, 1, head_dim)."""
        cos, sin = self.rotary_tables(T, self.config.n_embd // self.config.n_head, device)
        both = torch.stack((torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)))
        return both.unsqueeze(2).to(self.dtype)

    def num_scaling_params(self):
        """N of the scaling rules: block matrices + lm_head, the parameters of the matmuls."""
        return sum(p.numel() for p in self.parameters()) - self.transformer.wte.weight.numel()

    def flops_per_token(self, T=None):
        """Forward and backward: 6 per parameter of N, and in each layer 12 x T/2 x n_embd for
        causal attention."""
        T = T or self.config.sequence_len
        return 6 * self.num_scaling_params() + 6 * self.config.n_layer * self.config.n_embd * T


# ---- Generation, with a cache of keys and values -------------------------------------------------

class KVCache:
    """The keys and values of B texts, each of its own length, up to S tokens.

    A token's keys and values never change, because no token attends to later ones. So they are
    computed once and kept: for the next token the model runs on one position, not on the whole
    text."""

    def __init__(self, model, B, S):
        config, device = model.config, model.lm_head.weight.device
        shape = (config.n_layer, B, config.n_head, S, config.n_embd // config.n_head)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(B, dtype=torch.long)  # tokens per row, on the CPU
        self.rotary = model.rotary(S, device)  # (2, S, 1, head_dim)
        self.slots = torch.arange(S, device=device)

    def row(self, b):
        """A view of row b as its own cache."""
        one = copy.copy(self)
        one.keys, one.values = self.keys[:, b:b + 1], self.values[:, b:b + 1]
        one.lengths = self.lengths[b:b + 1]
        return one

    def start(self, T):
        """Prepares for T more tokens in each row. Returns their positions, (B, T)."""
        _, B, n_head, S, head_dim = self.keys.shape
        longest = int(self.lengths.max())
        if longest + T > S:
            raise ValueError(f"{longest + T} tokens do not fit into a cache of {S}")
        positions = self.lengths.to(self.slots.device).view(B, 1) + self.slots[:T]
        self.places = positions.view(B, 1, T, 1).expand(B, n_head, T, head_dim)
        self.mask = None  # for an empty cache, the usual causal mask will do
        if longest > 0:  # else each token attends to its row, up to itself
            filled = math.ceil((longest + T) / 64) * 64  # few shapes, so few kernels
            self.mask = self.slots[:filled] <= positions.view(B, 1, T, 1)  # (B, 1, T, filled)
        return positions

    def extend(self, layer, k, v):
        """Stores a layer's keys and values of the new tokens, (B, n_head, T, head_dim). Returns
        those of the whole rows, and the mask."""
        keys, values = self.keys[layer], self.values[layer]  # (B, n_head, S, head_dim)
        keys.scatter_(2, self.places, k)
        values.scatter_(2, self.places, v)
        if self.mask is None:
            return k, v, None
        filled = self.mask.size(-1)
        return keys[:, :, :filled], values[:, :, :filled], self.mask


def most_likely(logits):
    """Greedy decoding: (B, V) -> (B,)."""
    return logits.argmax(-1)


@torch.inference_mode()
def generate(model, texts, n, choose=most_likely, cache=None):
    """Continues B texts, lists of ids. Yields n lists of B ids: the next token of each text.

    The texts are read one by one, because they differ in length; then all grow by one token per
    step. The caller may replace ids in a yielded list: generation continues from those. choose:
    from logits (B, V) to ids (B,). cache: from an earlier call, holding the beginnings of these
    texts; only the rest, at least one token, is computed."""
    device = model.lm_head.weight.device
    cache = cache or KVCache(model, len(texts), max(map(len, texts)) + n)
    logits = []
    for b, ids in enumerate(texts):
        new = torch.tensor([ids[cache.lengths[b]:]], device=device)  # (1, T)
        logits.append(model(new, cache=cache.row(b), last=1)[:, 0])  # (1, V)
    logits = torch.cat(logits)
    for step in range(n):
        if step > 0:
            new = torch.tensor(ids, device=device).view(-1, 1)  # (B, 1)
            logits = model(new, cache=cache)[:, 0]  # (B, V)
        ids = choose(logits).tolist()
        yield ids


# ---- What the scripts share (when you copy the model, delete from here to the end) ---------------
# From here on the file is about operations: files, downloads, processes. Errors that a user can fix
# end the program with sys.exit(one line): what is wrong, where, and how to fix it.

import argparse, atexit, base64, contextlib, dataclasses, datetime, errno, functools, hashlib
import itertools, json, os, platform, queue, re, shutil, signal, socket, subprocess, sys, sysconfig
import threading, time, traceback, typing
from pathlib import Path

INTERRUPTED = 75  # exit status: stopped on request and saved; the same command resumes
SPECIAL_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>",
                  "<|assistant_end|>", "<|python_start|>", "<|python_end|>", "<|output_start|>",
                  "<|output_end|>")  # the last ids, in this order


# Tags and folders

def base_dir():
    """The folder of all artifacts: $NANOCHAT_BASE_DIR, or out/ here."""
    return Path(os.environ.get("NANOCHAT_BASE_DIR") or "out")


FOLDERS = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "hf-base": "hf_base",
           "hf-sft": "hf_sft"}


def folder_of(kind, tag, base=None):
    """The folder of a model, `kind` being one of FOLDERS. A _long tag fine-tunes the base model of
    the tag without _long. Exits unless the tag is a plain name."""
    if not re.fullmatch(r"\w[\w.-]*", tag):
        sys.exit(f"{tag!r} cannot be a tag: use letters, digits, _, - and .")
    name = tag if kind.endswith("sft") else tag.removesuffix("_long")
    return (base or base_dir()) / FOLDERS[kind] / name


def name_of(depth, tpp, drope):
    """The tag of a base model: d18_9tpp, or d18_9tpp_drope_50."""
    return f"d{depth}_{tpp:g}tpp" + ("" if drope is None else f"_drope_{drope}")


def parse_tag(tag):
    """(depth, tpp, drope) of a tag of the series, with or without _long; None for other names."""
    found = re.fullmatch(r"d(\d+)_(\d+(?:\.\d+)?)tpp(?:_drope_(\d+))?(?:_long)?", tag)
    if not found:
        return None
    return int(found[1]), float(found[2]), None if found[3] is None else int(found[3])


def one_line(error):
    """The first line of an error's text, or its name if it has no text. For an OSError: the file
    and the system's message."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def say(text):
    """Prints a line. If the output is closed (`| head`, a closed terminal), sends this process
    SIGTERM, so that a training run saves and stops."""
    try:
        print(text, flush=True)
    except OSError:
        discard_output()
        signal.raise_signal(signal.SIGTERM)


def discard_output():
    """Sends the rest of the output, and what Python flushes at its end, to /dev/null."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def guard(main):
    """Runs a script's main(). Errors that are not bugs (files, memory, Ctrl-C) become one line on
    stderr, without a traceback. Of several processes on a machine only the first one prints it."""
    try:
        code = main()
        print(end="", flush=True)
    except SystemExit as e:
        code = e.code
    except KeyboardInterrupt:
        code = "interrupted"
    except BrokenPipeError:  # `| head`: the reader has enough
        discard_output()
        code = 128 + signal.SIGPIPE
    except ModuleNotFoundError as e:
        code = f"{one_line(e)}: pip install -r requirements.txt -r requirements-dev.txt"
    except OSError as e:
        code = one_line(e)
    except (MemoryError, torch.OutOfMemoryError) as e:
        code = f"out of memory ({one_line(e)}): use a smaller --device-batch-size"
    except RuntimeError as e:
        if "can't allocate memory" in str(e):  # what torch says of a CPU's
            sys.exit(f"out of memory ({one_line(e)}): use a smaller --device-batch-size")
        if not isinstance(e, torch.distributed.DistError) and "gloo" not in str(e):
            raise
        code = ("another process has ended (its message is above, if it had one): the same command "
                "resumes from the last checkpoint")
    if isinstance(code, str) and os.environ.get("LOCAL_RANK", "0") != "0":
        code = 1
    sys.exit(code)


# The command line

def option(default, help, low=0, high=math.inf, positional=False):
    """A field of a Config: its default, its help text, and the limits of a number."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, low=low, high=high, positional=positional))


def parse_config(cls, doc, args=None):
    """Fills a dataclass of option()s from the command line: max_seq_len becomes --max-seq-len. A
    bool is a switch, a tuple takes several words. `int | None`: the script computes a default."""
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message} (see --help)")
    fields = {"--" + field.name.replace("_", "-"): field for field in dataclasses.fields(cls)}
    for flag, field in fields.items():
        kind = next(iter(typing.get_args(field.type)), field.type)  # int | None -> int
        about = dict(default=field.default, help=field.metadata["help"].replace("%", "%%"))
        if field.metadata["positional"]:
            parser.add_argument(field.name, nargs="*", metavar="TAG", **about)
        elif kind is bool:
            parser.add_argument(flag, action="store_true", **about)
        elif kind is tuple:
            parser.add_argument(flag, nargs="+", metavar="TAG", **about)
        else:
            if field.default not in (None, ""):
                about["help"] += " (default: %(default)s)"
            parser.add_argument(flag, type=kind, metavar=kind.__name__.upper(), **about)
    config = cls(**vars(parser.parse_intermixed_args(args)))
    for flag, field in fields.items():
        low, high = field.metadata["low"], field.metadata["high"]
        value = getattr(config, field.name)
        if type(value) in (int, float) and not (math.isfinite(value) and low <= value <= high):
            limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            parser.error(f"{flag} {value}: must be {limits}")
    return config


def log_head(*parts, **more):
    """The head of a log: command, commit, versions, and the fields of `parts` (the config ...)."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = "unknown"
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or commit
    print(f"# {' '.join(sys.argv)}\n# commit {commit} | python {platform.python_version()} | "
          f"torch {torch.__version__} | {platform.machine()}")
    for key, value in [*(pair for part in parts for pair in vars(part).items()), *more.items()]:
        print(f"# {key} = {value}", flush=True)


# The tokenizer

def load_tokenizer(folder):
    """The tiktoken.Encoding that tok.py stored in `folder`. Exits unless its ids are 0 ... n - 1,
    one per token, with all single bytes among them, followed by the special tokens."""
    import tiktoken
    config_file, ranks_file = Path(folder) / "config.json", Path(folder) / "tokenizer.tiktoken"
    if not config_file.exists() or not ranks_file.exists():
        sys.exit(f"no tokenizer in {folder}: make one with `python tok.py --out-dir {folder}`")
    try:
        config = json.loads(config_file.read_text("utf-8"))
        pairs = [line.split() for line in ranks_file.read_bytes().splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        special = {token: len(pairs) + i for i, token in enumerate(SPECIAL_TOKENS)}
        if sorted(ranks.values()) != list(range(len(pairs))) or b"" in ranks:
            raise ValueError(f"its ids are not 0 to {len(pairs) - 1}, each of one token")
        if not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("it lacks tokens for some of the 256 bytes")
        if config["special_tokens"] != special:
            raise ValueError(f"its special tokens are not ids {len(pairs)} to "
                             f"{len(pairs) + len(special) - 1}, in their order")
        return tiktoken.Encoding("nanochat", pat_str=config["pat_str"], mergeable_ranks=ranks,
                                 special_tokens=special)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        sys.exit(f"the tokenizer in {folder} is damaged ({one_line(e)}): delete it and run "
                 f"`python tok.py --out-dir {folder}`")


LONG_SPACE = 100_000


def encode(enc, texts):
    """Texts -> a list of ids for each. "<|bos|>" in a text stays text. tiktoken panics on millions
    of white-space characters in a row, so such runs are cut into pieces of LONG_SPACE."""
    pieces, numbers = [], []
    for text in texts:
        cuts = [0, len(text)]
        if len(text) > LONG_SPACE:
            cuts[1:1] = (match.start() + i for match in re.finditer(r"\s+", text)
                         for i in range(LONG_SPACE, len(match[0]), LONG_SPACE))
        pieces += [text[a:b] for a, b in zip(cuts, cuts[1:])]
        numbers.append(len(cuts) - 1)  # pieces of this text, nearly always 1
    ids = iter(enc.encode_ordinary_batch(pieces, num_threads=4))
    return [list(itertools.chain(*itertools.islice(ids, n))) for n in numbers]


def token_bytes(enc):
    """Bytes of each id, int64 (n_vocab,), 0 for special tokens: for bits per byte."""
    special = set(enc._special_tokens.values())
    return torch.tensor([0 if i in special else len(enc.decode_single_token_bytes(i))
                         for i in range(enc.n_vocab)])


def tokenizer_hash(enc):
    """A short hash: every checkpoint names the tokenizer it was trained with."""
    ranks, special = sorted(enc._mergeable_ranks.items()), sorted(enc._special_tokens.items())
    return hashlib.sha256(repr((enc._pat_str, ranks, special)).encode()).hexdigest()[:16]


# Files: written to a temporary file, then renamed, so readers never see half a file

def atomic_write(path, content):
    """Writes bytes, a str, or what the function `content(file)` writes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temp, "wb") as f:
            if callable(content):
                content(f)
            else:
                f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except (OSError, RuntimeError) as e:  # torch.save turns a full disk into a RuntimeError
        temp.unlink(missing_ok=True)
        cause = e if isinstance(e, OSError) else e.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None


def file_hash(path, git=False):
    """The sha256 of a file, in hex. git: git's sha1, which the hub gives for small files."""
    digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path)) if git else hashlib.sha256()
    with open(path, "rb") as f:
        for block in iter(lambda: f.read(1 << 24), b""):
            digest.update(block)
    return digest.hexdigest()


def has_hub_hash(path, expected):
    """Whether a file has the hash that the hub gives: its sha256, or for a small file git's sha1,
    which has 40 digits."""
    return file_hash(path, git=len(expected) == 40) == expected


def lock_file(path, busy, patience=0):
    """Opens `path` and locks it until the file is closed or the process ends, however that happens.
    If another process holds the lock, tries for `patience` seconds, then exits with the line
    `busy`. Without file-system locks, warns and continues."""
    import fcntl
    path.parent.mkdir(parents=True, exist_ok=True)
    file, deadline = open(path, "a+"), time.time() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.time() >= deadline:
                sys.exit(busy)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"{path}: this file system has no locks ({e.strerror}), so make sure that only "
                  "one process writes there", file=sys.stderr)
            return file
        time.sleep(0.2)


def has_kind(value, kind):
    """Whether a value read from JSON has a type. An int passes as a float; a bool does not."""
    if kind in (int, float):
        number = type(value) is int or kind is float and type(value) is float
        return number and abs(value) < 1e15  # not nan either
    return isinstance(value, kind)


def read_lines(path, fields, optional={}):
    """The records of a .jsonl file, [] if it does not exist. fields: {name: type} that a record
    must have; optional: that it may have."""
    records = []
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
        for number, record in enumerate(map(json.loads, lines), 1):
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not a record")
            for name, kind in {**optional, **fields}.items():
                if (name in fields or name in record) and not has_kind(record.get(name), kind):
                    raise ValueError(f"{name} in line {number} is {record.get(name)!r:.40}, not "
                                     f"of type {kind.__name__}")
            records.append(record)
    except (ValueError, RecursionError) as e:
        sys.exit(f"{path} is damaged ({one_line(e)}): delete it to go on without it")
    return records


def wilson(k, n):
    """[k / n, low, high]: a rate and its 95% interval, also good near 0 and 1 (Wilson 1927)."""
    z = 1.96
    center = (k + z * z / 2) / (n + z * z)
    width = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return [k / n, max(0.0, center - width), min(1.0, center + width)]


class Results:
    """eval.json or chat.json beside a checkpoint. parts: the finished parts of a test, nested
    dicts. key: what was tested, such as the sha256 of the weights, texts and sizes."""

    def __init__(self, path, key):
        self.path, self.key = path, key
        found_key, self.parts = read_results(path)
        if self.parts and found_key != key:
            print(f"  {path} belongs to another checkpoint, text or size: testing again")
            self.parts = {}

    def part(self, names, test, *args):
        """parts[names[0]][names[1]] ...: the result of test(*args), unless it exists already."""
        *outer, name = names
        place = self.parts
        for step in outer:
            place = place.setdefault(step, {})
        if name not in place:
            start = time.time()
            place[name] = json.loads(json.dumps(test(*args), default=float))
            content = dict(key=self.key, parts=self.parts)
            content["sha256"] = content_hash(content)  # detects edited results
            atomic_write(self.path, json.dumps(content, indent=1))
            print(f"  {', '.join(names)}: {time.time() - start:.0f} s", flush=True)
        return place[name]


def content_hash(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_results(path):
    """(key, parts) of a file that Results wrote; ({}, {}) if there is none. Exits if it is
    damaged."""
    try:
        content = json.loads(path.read_text("utf-8")) if path.exists() else None
        if content is None:
            return {}, {}
        if content.pop("sha256") != content_hash(content):
            raise ValueError("its sha256 is not that of its content")
        return content["key"], content["parts"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        sys.exit(f"{path} is damaged ({one_line(e)}): delete it and test again")


def results_of(folder, name):
    """read_results() of a file beside the newest checkpoint in `folder`. Exits if it belongs to
    another checkpoint."""
    key, parts = read_results(folder / name)
    steps = checkpoint_steps(folder)
    if parts and steps and key["sha256"] != weights_hash(folder, steps[-1]):
        sys.exit(f"{folder / name} belongs to another checkpoint than {folder} holds: test again")
    return key, parts


def text_column(path, column):
    """Opens a ParquetFile that has rows and a column of strings. Otherwise raises ValueError,
    ArrowException or OSError; the caller adds the name of the file."""
    import pyarrow.parquet as pq
    file = pq.ParquetFile(path)
    there = {field.name: str(field.type) for field in file.schema_arrow}
    if there.get(column) not in ("string", "large_string", "string_view"):
        found = f"of type {there[column]}" if column in there else "missing"
        raise ValueError(f"column {column!r}, which must hold strings, is {found}")
    if file.metadata.num_rows == 0:
        raise ValueError("it has no rows")
    return file


# Checkpoints: model_, optim_ and loader_ files, then meta_*.json, which says that they are complete

class Damaged(SystemExit):
    """A checkpoint has damaged files, but an older one may be intact. Unless caught, it ends the
    program with one line. (A file that cannot be read is an OSError instead.)"""


def checkpoint_files(folder, step):
    """The paths of a checkpoint's four files, by name."""
    names = dict(model=f"model_{step:06d}.pt", optim=f"optim_{step:06d}_rank0.pt",
                 loader=f"loader_{step:06d}.pt", meta=f"meta_{step:06d}.json")
    return {part: Path(folder) / name for part, name in names.items()}


def checkpoint_steps(folder):
    """The steps of the checkpoints in `folder`, ascending; [] if it does not exist."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name[5:-5]) for name in names if re.fullmatch(r"meta_\d{6,}\.json", name))


def save_checkpoint(folder, step, model, optimizer, loader_state, meta, keep=()):
    """Writes a checkpoint, then deletes all others except the previous one and the steps in
    `keep`."""
    files = checkpoint_files(folder, step)
    parts = dict(model=model.state_dict(), optim=optimizer.state_dict(), loader=loader_state)
    for part, content in parts.items():
        atomic_write(files[part], functools.partial(torch.save, content))
    meta["sha256"] = {files[part].name: file_hash(files[part]) for part in parts}
    atomic_write(files["meta"], json.dumps(meta, indent=1))
    before = [s for s in checkpoint_steps(folder) if s < step][-1:]
    names = " ".join(path.name for path in Path(folder).iterdir())
    there = set(map(int, re.findall(r"(?:model|optim|loader|meta)_(\d{6,})", names)))
    for old in there - {step, *before, *keep}:
        for path in reversed(checkpoint_files(folder, old).values()):  # meta_ goes first
            path.unlink(missing_ok=True)


MODEL_LIMITS = dict(sequence_len=2 ** 24, vocab_size=2 ** 24, n_layer=999, n_head=999,
                    n_kv_head=999, n_embd=2 ** 17)
META_NUMBERS = ("val_bpb", "switch", "min_val_bpb", "smooth_train_loss", "total_training_time")
META_FIELDS = dict(step=int, model_config=dict, loop_state=dict, user_config=dict, recipe=dict,
                   data=dict, sha256=dict, steps=int, finished=bool, tokenizer=str, progress=float,
                   metrics_bytes=int, validation_file=str)


def read_meta(folder, step):
    """The meta file of a checkpoint; all scripts read it here. Exits unless it describes a model
    that model.py can run and says whether that model has RoPE, which is never guessed."""
    path = checkpoint_files(folder, step)["meta"]
    try:
        meta = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise Damaged(f"{path} is damaged ({one_line(e)})") from None
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise Damaged(f"{path} is damaged: it has no model_config")
    for name, kind in META_FIELDS.items():
        if name in meta and not has_kind(meta[name], kind):
            sys.exit(f"{path}: {name} is {meta[name]!r:.40}, not of type {kind.__name__}")
    sizes, loop = meta["model_config"], meta.get("loop_state", {})
    other = [name for name in sizes if name not in MODEL_LIMITS]
    if other:
        sys.exit(f"{path}: its model has {', '.join(other)}, so it is of another version of "
                 "nanochat, which model.py cannot run: use it with that version")
    for name, most in MODEL_LIMITS.items():
        if not has_kind(sizes.get(name), int) or not 1 <= sizes[name] <= most:
            sys.exit(f"{path}: model_config.{name} is {sizes.get(name)!r:.40}, not a number from 1 "
                     f"to {most:,}")
    if sizes["n_embd"] % (2 * sizes["n_head"]) or sizes["n_kv_head"] != sizes["n_head"]:
        sys.exit(f"{path}: n_embd {sizes['n_embd']} does not divide into n_head {sizes['n_head']} "
                 "heads of an even size, or n_kv_head differs from n_head")
    if not isinstance(loop.get("use_rope"), bool):
        sys.exit(f"{path} does not say if the model has RoPE (chat checkpoints of the nanochat "
                 "repo do not): set loop_state.use_rope in it to true or false")
    for name, value in {**meta, **loop}.items():
        if name in META_NUMBERS and not (value is None or isinstance(value, (int, float))):
            sys.exit(f"{path}: {name} is {value!r:.40}, not a number")
    if meta.get("step", step) != step:
        sys.exit(f"{path} is of step {meta['step']}")
    return {"step": step, "user_config": {}, **meta}


def check_checkpoint(folder, step):
    """Exits unless a checkpoint's files match its meta file: their sha256, if it has them (raises
    Damaged), and the names and shapes of the weights."""
    meta, files = read_meta(folder, step), checkpoint_files(folder, step)
    weights = files["model"]
    for name, expected in meta.get("sha256", {}).items():
        path = Path(folder) / Path(name).name
        if not path.exists():
            if meta.get("finished") and path in (files["optim"], files["loader"]):
                continue  # only fine-tuning needs them
            raise Damaged(f"{path} is missing")
        if file_hash(path) != expected:
            raise Damaged(f"{path} is damaged: its sha256 is not the one in its meta file")
    with torch.device("meta"):
        ours = GPT(GPTConfig(**meta["model_config"])).state_dict()
    theirs = load_part(folder, step, "model", "meta")  # reads no weights
    if not isinstance(theirs, dict):
        sys.exit(f"{weights} holds no weights")
    for name in [*ours, *theirs]:
        found, described = (getattr(x.get(name), "shape", None) for x in (theirs, ours))
        if found != described:
            sys.exit(f"{weights}: {name} has shape {found}, but its meta file describes a model "
                     f"with {described}")


def newest_checkpoint(folder):
    """The newest step that check_checkpoint accepts; None if there is no checkpoint at all. Skips
    damaged ones with a notice. Exits if all are damaged, rather than starting over unasked. OSError
    if a file cannot be read."""
    problems, steps = [], checkpoint_steps(folder)
    if not steps and len(list(Path(folder).glob("model_*.pt"))) > 1:  # 1: a first save failed
        raise Damaged(f"{folder} has model_*.pt files but no meta_*.json: put these back, or move "
                      "that folder away to start over")
    for step in reversed(steps):
        try:
            check_checkpoint(folder, step)
        except Damaged as e:
            problems.append(str(e))
            continue
        for problem in problems:
            print(f"skipping a checkpoint: {problem}", file=sys.stderr)
        return step
    if problems:
        raise Damaged(f"{folder} has no usable checkpoint ({problems[0]}): repair it, or "
                      "move that folder away to start over")
    return None


def tokenizer_of(meta, base):
    """The tokenizer in a base folder. Exits unless the model of `meta` was trained with it. (Meta
    files of other code do not name theirs.)"""
    enc = load_tokenizer(base / "tokenizer")
    ours = tokenizer_hash(enc)
    if meta.get("tokenizer", ours) != ours or meta["model_config"]["vocab_size"] != enc.n_vocab:
        sys.exit(f"the model was trained with another tokenizer than that in {base / 'tokenizer'}: "
                 "put its own there")
    return enc


def unfinished(folder, meta):
    """Why a run is not finished, or "". (Meta files from other code lack the step count.)"""
    step = meta["step"]
    if meta.get("steps", step) == step and meta.get("finished", True):
        return ""
    return (f"{folder} is at step {step} of {meta.get('steps')}: finish it first, with the command "
            "that started it")


def finished_checkpoint(folder):
    """The newest step of a model that another run starts from; None if there is no checkpoint.
    Exits unless it is finished and was trained with the tokenizer in base_dir()."""
    step = newest_checkpoint(folder)
    if step is not None:
        meta = read_meta(folder, step)
        problem = unfinished(folder, meta)
        if problem:
            sys.exit(problem)
        tokenizer_of(meta, base_dir())
    return step


def weights_hash(folder, step):
    """The sha256 of a checkpoint's weights, from the meta file, once
    newest_checkpoint() has checked it, or computed, if the meta file (from other code) has none."""
    weights = checkpoint_files(folder, step)["model"]
    return read_meta(folder, step).get("sha256", {}).get(weights.name) or file_hash(weights)


def load_part(folder, step, part, device="cpu"):
    """Loads one file ("model", "optim" or "loader") of a checkpoint, without executing anything in
    it. On the device "meta", tensors have shapes but no data, and none is read."""
    path = checkpoint_files(folder, step)[part]
    if not path.exists():
        raise Damaged(f"{path} is missing")
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=device == "meta")
    except OSError:
        raise
    except Exception as e:  # a damaged file fails in many ways
        raise Damaged(f"{path} is damaged ({one_line(e)})") from None


def load_weights(model, optimizer, folder, step, device):
    """Loads model and optimizer in place, and sets model.use_rope."""
    model.load_state_dict(load_part(folder, step, "model", device))
    try:
        optimizer.load_state_dict(load_part(folder, step, "optim", device))
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise Damaged(f"{checkpoint_files(folder, step)['optim']} is not of this model's optimizer "
                      f"({one_line(e)})") from None
    model.use_rope = read_meta(folder, step)["loop_state"]["use_rope"]


def load_model(folder, device="cpu", dtype=torch.float32):
    """The GPT of the newest undamaged checkpoint, with RoPE on or off as saved, and its meta. Not
    for training: the weights are in `dtype`."""
    folder = Path(folder)
    step = newest_checkpoint(folder)
    if step is None:
        stage = "sft.py" if "chatsft" in str(folder) else "pretrain.py"
        sys.exit(f"no checkpoint in {folder}: make one with `python {stage} --tag {folder.name}`")
    meta = read_meta(folder, step)
    model = GPT(GPTConfig(**meta["model_config"]), meta["loop_state"]["use_rope"], dtype)
    model.load_state_dict(load_part(folder, step, "model"))
    return model.to(device, dtype), meta


# Downloads

class DataError(SystemExit):
    """A data file is missing, unusable, or cannot be downloaded. As a SystemExit it passes `except
    Exception`; unless caught, it ends the program with one line."""


def within(seconds, work):
    """Runs work() in its own thread; TimeoutError if it takes longer. A thread cannot be killed, so
    one that waits forever for a server is left behind."""
    results = queue.Queue()

    def run():
        try:
            results.put((work(), None))
        except BaseException as e:
            results.put((None, e))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("the server did not answer in time") from None
    if error is not None:
        raise error
    return result


def retry(name, patience, attempt,
          denied="it does not exist, or the token in HF_TOKEN may not read or write it"):
    """Repeats attempt() for `patience` seconds in total, with growing pauses, or the pause that the
    server asks for (Retry-After). Raises DataError at the end, or at once if repeating cannot
    help. denied: what to do about the statuses 401 and 403."""
    start, pause = time.time(), 1.0
    while True:
        try:
            return within(max(1.0, patience - (time.time() - start)), attempt)
        except (TypeError, LookupError, AttributeError):
            raise  # a bug, here or there
        except Exception as e:  # downloads fail in many ways
            replies = [getattr(error, "response", None) for error in (e, e.__cause__)]
            reply = next((r for r in replies if r is not None), None)
            status = 0 if reply is None else reply.status_code
            text = f"{name}: {one_line(e)}"
            if status in (401, 403):
                raise DataError(f"{name}: the server answers {status}: {denied}") from None
            if 400 <= status < 500 and status not in (408, 429) or status == 501:
                raise DataError(f"{text} ({status})") from None
            if isinstance(e, ValueError):  # no URL, no name of a repository ...
                raise DataError(text) from None
            network = isinstance(e, (ConnectionError, TimeoutError))
            if isinstance(e, OSError) and e.errno and not network:
                raise  # a disk: asking the server cannot help
            asked = "" if reply is None else reply.headers.get("Retry-After", "")
            wait = max(pause, float(asked)) if asked.isdigit() else pause
            if time.time() - start + wait > patience:
                raise DataError(f"{text}; gave up after {patience:.0f} s") from None
            print(f"{text}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
            time.sleep(wait)
            pause = min(2 * pause, 60.0)


def download(repo_id, filename, dest, repo_type="dataset", revision="main", patience=600):
    """Downloads a file of a hub repository to `dest`, unless it exists; returns the path. On top of
    huggingface_hub it compares the hub's hash, retries, and lets only one of several processes
    download. patience: seconds, plus what the file takes at 1 MB/s."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    name, dest = f"{filename} of {repo_id}", Path(dest)
    where = dict(repo_type=repo_type, revision=revision)
    part = dest.with_name(f".{dest.name}.part")  # a folder, in which huggingface_hub works
    lock_path = dest.with_name(f".{dest.name}.lock")

    def attempt():
        if part.exists():  # an earlier attempt, perhaps another program's
            kept = sum(path.stat().st_size for path in part.rglob("*.incomplete"))
            then = f"continuing after {kept:,} bytes" if kept else "starting over"
            print(f"{name} was interrupted: {then}", file=sys.stderr, flush=True)
        got = hf_hub_download(repo_id, filename, local_dir=part, **where)
        damaged = not has_hub_hash(got, about.etag)
        if not damaged:
            os.replace(got, dest)
        shutil.rmtree(part)
        if damaged:
            raise ConnectionError("damaged in transit: its hash is not the hub's")

    if dest.exists():
        return dest
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{name} is not at {dest}, and HF_HUB_OFFLINE forbids downloads")
    busy = f"{name}: another process has been downloading it for more than {patience:.0f} s"
    with lock_file(lock_path, busy, patience):
        if not dest.exists():
            url = hf_hub_url(repo_id, filename, **where)
            about = retry(name, patience, lambda: get_hf_file_metadata(url))
            retry(name, patience + (about.size or 0) / 1e6, attempt)
        lock_path.unlink(missing_ok=True)  # whoever waits for it will find dest
    return dest


def download_url(url, dest, patience=600, check=None):
    """Downloads a plain file to `dest`, unless it exists; returns the path. check(bytes) says what
    is wrong with the content, or ""."""
    import requests

    def attempt():
        reply = requests.get(url, timeout=30)
        reply.raise_for_status()
        if reply.content.lstrip()[:1] == b"<":
            raise ValueError("the server sent a web page, not this file: does the network need a "
                             "login?")
        problem = check(reply.content) if check else ""
        if problem:
            raise ConnectionError(f"{problem}; starting over")
        atomic_write(dest, reply.content)

    if not Path(dest).exists():
        retry(url, patience, attempt, "download it in another way and pass its path instead of "
                                      "the URL, as with --identity FILE or --words FILE")
    return Path(dest)


# Devices and processes

@dataclass
class Env:
    """Where a process runs. Of `world` processes, rank 0 downloads, reads, writes and logs."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of activations
    peak_flops: float | None  # of the device, dense bfloat16, if known
    compile: bool = False  # use torch.compile
    micro: int = 1  # most rows that go through the model at a time
    control: object = None  # process group for data that are not on the device


# In bfloat16, dense, without a power limit. "H100 PCIe" must come before "H100"
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
              "H200": 989e12, "A100": 312e12}


def setup_env(compile=None):
    """Device, dtype and, under torchrun, the process groups. compile: 1, 0, or None: only on a GPU.
    Exits if there is a GPU that torch cannot use."""
    check_driver()
    bf16, peak = False, None
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        name = torch.cuda.get_device_name(device)
        peak = next((flops for chip, flops in PEAK_FLOPS.items() if chip in name), None)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # a V100 only emulates it
    else:
        mps = torch.backends.mps.is_available() and "RANK" not in os.environ  # gloo has no MPS
        device = torch.device("mps" if mps else "cpu")
    compile = device.type == "cuda" if compile is None else bool(compile)
    if device.type == "cuda" and compile:
        check_compiler()
    env = Env(0, 1, device, torch.bfloat16 if bf16 else torch.float32, peak, compile)
    if "RANK" in os.environ:
        join_processes(env)
    return env


def join_processes(env):
    """Connects the processes of torchrun. Gradients use NCCL, or gloo on CPUs. Rows and messages
    use gloo (`control`): there a process waits without its GPU for as long as rank 0 needs, perhaps
    for a download, and notices at once if another process ends."""
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
               if name not in os.environ]
    if missing:
        sys.exit(f"RANK is set, but not {', '.join(missing)}: start several processes with "
                 "torchrun, or unset RANK")
    long = datetime.timedelta(days=7)
    if env.device.type == "cuda":
        torch.distributed.init_process_group("nccl", timeout=datetime.timedelta(minutes=30))
        env.control = torch.distributed.new_group(backend="gloo", timeout=long)
    else:
        torch.distributed.init_process_group("gloo", timeout=long)
    atexit.register(torch.distributed.destroy_process_group)
    env.rank, env.world = torch.distributed.get_rank(), torch.distributed.get_world_size()


def check_driver(driver_file="/proc/driver/nvidia/version"):
    """Exits if the machine has a GPU that torch cannot use, rather than train on the CPU for hours.
    CUDA_VISIBLE_DEVICES= or -1 asks for the CPU."""
    usable = torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if usable or not os.path.exists(driver_file):
        return
    if torch.version.cuda is None:
        sys.exit(f"this machine has an NVIDIA GPU, but torch {torch.__version__} is a build for "
                 "CPUs: install the default build. To use the CPU, put CUDA_VISIBLE_DEVICES= "
                 "before the command")
    driver = re.search(r"\b(\d{3})\.[\d.]+", Path(driver_file).read_text())
    needed = {"12": 525, "13": 580}.get(torch.version.cuda.split(".")[0], 1000)
    why = ("it is not visible here (in a container, add --gpus all; under Slurm, --gres=gpu:1)")
    if not driver or int(driver[1]) < needed:
        why = (f"the driver is {driver[0] if driver else 'unknown'}, and torch {torch.__version__} "
               f"(CUDA {torch.version.cuda}) needs {needed} or newer. For drivers from 525: `pip "
               "install torch --index-url https://download.pytorch.org/whl/cu126`")
    sys.exit(f"this machine has an NVIDIA GPU that torch cannot use: {why}. To use the CPU, put "
             "CUDA_VISIBLE_DEVICES= before the command")


def check_compiler():
    """Exits if Triton cannot compile its launcher, before anything is downloaded."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = []
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        missing.append("a C compiler (Debian: gcc)")
    if not header.exists():
        missing.append(f"{header} (Debian: python3-dev)")
    if missing:
        sys.exit(f"torch.compile needs {' and '.join(missing)}: install that, or add --compile 0, "
                 "which is much slower")


def compile_model(model, env):
    """torch.compile of model and loss in one graph, if env.compile. There is one graph for training
    and one for validation, with and without RoPE, per number of rows: more than torch's limit of
    8."""
    if not env.compile:
        return model
    torch._dynamo.config.recompile_limit = 32
    # The tables become a constant of the graph: else each layer would compute its cosines again
    GPT.rotary = torch.compiler.assume_constant_result(GPT.rotary)
    return torch.compile(model, fullgraph=True, dynamic=False)


def set_fp8(model, env):
    """Uses float8 for the matmuls in the blocks (not the head). Exits if the device has none."""
    if env.device.type != "cuda" or torch.cuda.get_device_capability(env.device) < (8, 9):
        sys.exit(f"--fp8 needs a GPU with float8 matmuls (H100 or newer), not {env.device.type}: "
                 "leave it out")
    for module in model.transformer.h.modules():
        if isinstance(module, Linear):
            module.fp8 = True


def attention_kernel(env, config):
    """The name of the attention kernel that torch chooses. Warns if a Hopper GPU is using a slower
    kernel than it could."""
    if env.device.type == "mps":
        return "MPS"
    shape = (1, config.n_head, config.sequence_len, HEAD_DIM)
    q = torch.empty(shape, device=env.device, dtype=env.dtype)
    name = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name
    hopper = env.device.type == "cuda" and torch.cuda.get_device_capability(env.device)[0] == 9
    if hopper and name != "CUDNN_ATTENTION" and env.rank == 0:
        print(f"attention is {name}: cuDNN's is faster on this GPU. A newer torch has it; "
              "TORCH_CUDNN_SDPA_PREFERRED must not be 0", file=sys.stderr)
    return name


def largest_of_all(numbers, env):
    """For each of some integers, the largest that any process has. Waits for all processes."""
    if env.world > 1:
        numbers = torch.tensor(numbers)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=env.control)
        numbers = numbers.tolist()
    return numbers


def barrier(env):
    """Waits for all processes. (torch's own would use the device.)"""
    largest_of_all([0], env)


def from_rank_0(value, env):
    """Sends a Python value of rank 0 (an array, too) to all processes; returns it."""
    values = [value]
    if env.world > 1:
        torch.distributed.broadcast_object_list(values, group=env.control)
    return values[0]


# Gradients and validation

def largest_divisor(n, most):
    """The largest divisor of n that is at most `most`."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def rows_of_a_step(batch, T, world=1):
    """The number of rows of T tokens in a step of `batch` tokens. Exits unless it is an integer
    that the processes can share equally."""
    n_rows, rest = divmod(batch, T)
    if rest or n_rows % world or n_rows == 0:
        nearest = max(1, round(batch / (T * world))) * T * world
        sys.exit(f"--total-batch-size {batch} must be a multiple of max_seq_len x processes = "
                 f"{T} x {world}: use {nearest}")
    return n_rows


def rows_at_a_time(env, T, most=None):
    """How many rows of T tokens go through the model at a time: `most`, or by default 16 x 4,096
    tokens on a GPU, where with_memory() halves them if need be, and 4,096 on a CPU, where running
    out of memory ends the program (d18 takes 11.6 GB)."""
    return most or max(1, (16 if env.device.type == "cuda" else 1) * 4096 // T)


def with_memory(env, n_rows, work):
    """Calls work(micro), which processes `n_rows` rows at most `micro` at a time. If the device
    runs out of memory, tries again with half as many; exits if one row is too much. Processes may
    end up with different numbers: the gradients are the same."""
    while True:
        micro = min(env.micro, n_rows)
        try:
            return work(micro)
        except torch.OutOfMemoryError:
            pass  # handled below: the exception keeps its tensors alive
        if micro == 1:
            print(f"{env.device} has too little memory for one row at a time: use a smaller "
                  "--max-seq-len or --depth", file=sys.stderr)
            sys.exit(1)
        env.micro = micro // 2
        if env.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"rank {env.rank}: out of memory with {micro} rows at a time, trying again with "
              f"{env.micro} (--device-batch-size {env.micro})", file=sys.stderr, flush=True)


def accumulate_gradients(model, x, y, env):
    """Computes the gradients of the mean loss over all targets of a batch that are not -1. x and y,
    (rows, T) each, are the same on all processes; each runs its share. Returns the loss."""
    counted = (y != -1).sum().clamp(min=1).to(env.device)  # of the whole batch: never 0
    share = len(x) // env.world
    mine = slice(env.rank * share, (env.rank + 1) * share)
    x, y = (rows[mine].to(env.device).long() for rows in (x, y))

    def add_gradients(micro):
        model.zero_grad()  # from an attempt that ran out of memory
        size, total = largest_divisor(share, micro), 0.0
        for xs, ys in zip(x.split(size), y.split(size)):
            loss = model(xs, ys) / counted
            loss.backward()
            total += loss.detach()
        return total

    loss = with_memory(env, share, add_gradients)
    if env.world > 1:
        for p in model.parameters():
            torch.distributed.all_reduce(p.grad)
        torch.distributed.all_reduce(loss)
    return loss


class ValidationRows:
    """The rows to validate on, in blocks of env.micro rows that are dealt to the processes in turn.
    Each process keeps its blocks for all validations. make_rows, on rank 0: a function from a
    number of rows to that many or fewer, int32 (2, n, T), inputs and targets; None if there are no
    more."""

    def __init__(self, make_rows, T, nbytes, env):
        self.make_rows, self.T, self.nbytes, self.env = make_rows, T, nbytes.to(env.device), env
        self.block, self.n, self.mine, self.complete = env.micro, 0, {}, False

    def pack(self, n, check_stop):
        """Packs rows until there are n, or no more. check_stop() is called before each block."""
        while self.n < n and not self.complete:
            check_stop()
            block = self.make_rows(self.block) if self.env.rank == 0 else None
            block = from_rank_0(block, self.env)
            size = 0 if block is None else block.shape[1]
            if size and self.n // self.block % self.env.world == self.env.rank:
                self.mine[self.n] = torch.from_numpy(block)
            self.n, self.complete = self.n + size, size < self.block

    def losses(self, model, x, y):
        """The loss at each position, in nats, (B, T)."""
        def forward(micro):
            turns = zip(x.split(micro), y.split(micro))
            return torch.cat([model(xs, ys, reduction="none") for xs, ys in turns])
        return with_memory(self.env, len(x), forward)

    @torch.no_grad()
    def bits_per_byte(self, model, n, stop=lambda: False):
        """(bits per byte of the first n rows, their tokens, whether stop() was true). Targets that
        are -1 or have no bytes (special tokens) do not count. Each process sums its blocks in
        float64; the processes meet only at the end. One on which stop() is true skips its rest."""
        total, n = torch.zeros(3, dtype=torch.float64), min(n, self.n)  # nats, bytes, stopped
        for first, rows in self.mine.items():
            if first >= n:
                break
            if stop():
                total[2] = 1
                break
            x, y = rows[:, :n - first].to(self.env.device).long()  # (B, T) each
            size = self.nbytes[y.clamp(min=0)] * (y != -1)
            nats = self.losses(model, x, y) * (size > 0)
            total[0] += nats.cpu().double().sum()
            total[1] += size.sum().cpu()
        if self.env.world > 1:
            torch.distributed.all_reduce(total, group=self.env.control)
        nats, size, stopped = total.tolist()
        if size == 0 and not stopped:
            sys.exit("the validation set has no token that counts: it needs a row full of text, or "
                     "in a chat an answer that begins within a row")
        return nats / (math.log(2) * max(size, 1)), n * self.T, bool(stopped)


# A run: what both training loops need

def difference(then, now):
    """The first difference between two dicts, in words, or ""."""
    for field in {**now, **then}:
        if then.get(field) != now.get(field):
            return f"{field} = {then.get(field)}, not {now.get(field)}"
    return ""


class Run:
    """A training run and its folder: lock, starting point, batches, metrics.jsonl, requests to
    stop, and checkpoints.

    A checkpoint describes the moment between two steps. At the end of a step, capture() notes the
    counters, the size of metrics.jsonl, and the loader's state right after the batch just used (a
    batch that waits in the queue does not count). Weights are not copied: save() writes them as
    they are, so it may only be called before the next step changes them. That is why requests to
    stop are only noted when they come, and obeyed in next_batch() and validate(). What precedes
    next_batch() in a step, the switch or a validation, is simply done again after resuming. A
    resumed run ends with the same tensors: to the bit on a CPU, to rounding on a GPU, where sums
    have no fixed order."""

    def __init__(self, folder, cfg, recipe, env):
        """Locks the folder and finds its newest checkpoint. recipe: names and values of what
        changes the weights, which must equal the checkpoint's. env: see setup_env."""
        self.folder, self.cfg, self.recipe, self.env = Path(folder), cfg, recipe, env
        # source: folder of the checkpoint to start from, this run's or its trunk's; else None
        self.source, self.meta, self.stop_reason = None, {}, None
        self.now = dict(step=0, progress=0.0, val_bpb=None, loop_state=dict(
            min_val_bpb=float("inf"), smooth_train_loss=0.0, total_training_time=0.0))
        newest = None
        if env.rank == 0:
            self.lock = lock_file(self.folder / ".lock",
                                  f"{folder} is in use by another run: wait for it or stop it")
            for half_written in self.folder.glob(".*_[0-9]*.tmp"):  # by a run that was killed
                half_written.unlink(missing_ok=True)
            newest = newest_checkpoint(self.folder)
        newest = from_rank_0(newest, env)
        if newest is not None:
            self.start_from(self.folder, newest)
            self.refuse(self.difference(self.meta))

    @property
    def step(self):
        """The number of steps done, which is the number of the next one."""
        return self.now["step"]

    @property
    def progress(self):
        """How much of the run is done, 0 to 1."""
        return self.now["progress"]

    def difference(self, meta, but=()):
        """How a checkpoint's recipe differs from this run's (except those in `but`), or ""."""
        if "recipe" not in meta:
            return "other code, so it lacks what resuming needs; sft.py can use it"
        now = {field: value for field, value in self.recipe.items() if field not in but}
        return difference({field: meta["recipe"].get(field) for field in now}, now)

    def same_data(self, data):
        """Exits if the run began with other data. data: {what: its file, size or hash}, which goes
        into the meta file."""
        self.data = from_rank_0(data, self.env)
        if self.source == self.folder:
            self.refuse(difference(self.meta.get("data", {}), self.data))

    def refuse(self, different):
        if different:
            sys.exit(f"{self.folder} was trained with {different}. Use the same, or for a new run "
                     "another --tag or NANOCHAT_BASE_DIR")

    def start_from(self, folder, step):
        """Sets the starting point: a checkpoint of this run, or of the run that it branches off."""
        self.source, self.meta = Path(folder), read_meta(folder, step)
        self.now = {key: self.meta.get(key, value) for key, value in self.now.items()}

    def loader_state(self):
        """What the stream of batches needs to resume from the starting point, or None."""
        return load_part(self.source, self.step, "loader") if self.source else None

    def start(self, model, optimizer, stream, n_rows, keep=(), **facts):
        """Loads the starting point (weights, optimizer, RoPE on or off) and starts making batches.
        model: not the compiled one. stream, on rank 0: batch(n_rows) -> int32 (2, n_rows, T),
        inputs and targets, or sys.exit(why not); state() -> what resumes it. facts: more for the
        meta."""
        self.model, self.optimizer, self.keep, self.facts = model, optimizer, keep, facts
        self.n_rows, self.position = n_rows, None
        if self.source:
            load_weights(model, optimizer, self.source, self.step, self.env.device)
            how = "resuming" if self.source == self.folder else "continuing"
            self.say(f"{how} from step {self.step} of {self.source}")
        if self.env.rank == 0:
            self.open_metrics()
            self.position, self.batches = stream.state(), queue.Queue(maxsize=1)
            threading.Thread(target=self.make_batches, args=(stream, n_rows), daemon=True).start()
        self.started, self.progress_before, self.saved = time.time(), self.progress, self.step
        self.capture()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT,
                       signal.SIGXCPU):
            signal.signal(number, self.take_signal)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # it is ignored under nohup
            signal.signal(signal.SIGHUP, self.take_signal)

    def open_metrics(self):
        """Opens metrics.jsonl, cut to its size when the checkpoint was made."""
        before, size = b"", self.meta.get("metrics_bytes", 0)
        if self.source:
            path = self.source / "metrics.jsonl"
            before = path.read_bytes()[:size] if path.exists() else b""
            if len(before) < size:
                before = before[:before.rfind(b"\n") + 1]
                self.say(f"{path} is missing, or shorter than at step {self.step}: what it held is "
                         "lost, the run continues")
        atomic_write(self.folder / "metrics.jsonl", before)
        self.metrics = open(self.folder / "metrics.jsonl", "a")

    def make_batches(self, stream, n_rows):
        """The loader's thread: makes the next batch while a step is computed. It is a daemon, so it
        never keeps the program from ending. The main thread reports what goes wrong here."""
        batch = problem = None
        while problem is None:
            try:
                batch = stream.batch(n_rows)
                problem = "the data have run out" if batch is None else None
            except SystemExit as e:  # an error the user can fix
                problem = str(e)
            except OSError as e:
                problem = one_line(e)
            except BaseException:
                problem = f"the loader failed:\n{traceback.format_exc()}"
            self.batches.put((batch, problem, stream.state()))

    def next_batch(self):
        """Inputs and targets of the next step, (rows, T) each, the same on all processes. If there
        are none, or the run was asked to stop, saves and ends the program."""
        self.step_began, ready = time.time(), False
        batch = problem = position = None
        while not ready:
            with contextlib.suppress(queue.Empty):
                if self.env.rank == 0 and not self.stop_reason:
                    batch, problem, position = self.batches.get(timeout=0.5)
            # All processes must agree: what any one of them reports holds for all
            ready, failed, stop = largest_of_all(
                [batch is not None, bool(problem), bool(self.stop_reason)], self.env)
            if stop:
                self.stop()
            if failed:
                self.save()
                self.end(problem, 1)
        self.waited, self.position = time.time() - self.step_began, position
        return torch.from_numpy(from_rank_0(batch, self.env))

    def end_of_step(self, loss, progress, lr_factor, **record):
        """Counts, prints and logs a step, and saves if a checkpoint is due. loss: a tensor.
        progress: how much of the run is done now, 0 to 1."""
        loss = loss.item()  # the step's only device sync
        step, loop = self.step + 1, self.now["loop_state"]
        self.now.update(step=step, progress=progress)
        if not math.isfinite(loss):
            self.not_finite(f"the loss of step {step} is {loss}")
        seconds = time.time() - self.step_began
        loop["total_training_time"] += seconds
        loop["smooth_train_loss"] = 0.9 * loop["smooth_train_loss"] + 0.1 * loss
        smooth = loop["smooth_train_loss"] / (1 - 0.9 ** step)
        speed = self.cfg.total_batch_size / seconds
        flops = speed * self.model.flops_per_token() / self.env.world
        mfu = f" | mfu {100 * flops / self.env.peak_flops:.1f}%" if self.env.peak_flops else ""
        rate = (progress - self.progress_before) / (time.time() - self.started)
        left = datetime.timedelta(seconds=round((1 - progress) / rate))
        self.say(f"step {step:05d} | {100 * progress:5.1f}% | loss {smooth:.4f} | "
                 f"lr {lr_factor:.3f} | {speed:,.0f} tok/s{mfu} | {seconds:.2f} s | left {left}")
        self.log(step=step, loss=loss, lr_factor=lr_factor, use_rope=self.model.use_rope,
                 tokens=step * self.cfg.total_batch_size, seconds=seconds, waited=self.waited,
                 **record)
        self.capture()
        if progress == 1 or step % self.cfg.save_every == 0 or step in self.keep:
            self.save()

    def capture(self):
        """Sets self.saveable: what the meta file says, and the position in the data."""
        meta = copy.deepcopy(self.now)
        meta["loop_state"]["use_rope"] = self.model.use_rope
        if self.env.rank == 0:
            meta["metrics_bytes"] = self.metrics.tell()
        self.saveable = meta, self.position

    def validate(self, model, rows, n):
        """(bits per byte of the first n of the ValidationRows, their tokens). model: compiled or
        not. Obeys a stop request at once; until then no process waits for another."""
        rows.pack(n, self.check_stop)
        val_bpb, tokens, stopped = rows.bits_per_byte(model, n, lambda: self.stop_reason)
        if stopped:
            self.stop()
        return val_bpb, tokens

    def log_validation(self, val_bpb, tokens, sample=True):
        """Prints and logs a validation on so many tokens. sample: a regular mid-run validation,
        whose minimum goes into the meta file."""
        self.now["val_bpb"] = val_bpb
        if sample:
            loop = self.now["loop_state"]
            loop["min_val_bpb"] = min(loop["min_val_bpb"], val_bpb)
        self.say(f"step {self.step:05d} | val bpb {val_bpb:.4f} on {tokens:,} tokens, "
                 f"RoPE {'on' if self.model.use_rope else 'off'}")
        self.log(step=self.step, val_bpb=val_bpb, eval_tokens=tokens, use_rope=self.model.use_rope)

    def say(self, text):
        """Prints on rank 0."""
        if self.env.rank == 0:
            say(text)

    def log(self, **record):
        """Adds a line to metrics.jsonl."""
        if self.env.rank == 0:
            try:
                self.metrics.write(json.dumps(record) + "\n")
                self.metrics.flush()
            except OSError as e:  # a full disk: saves, if it can
                self.stop_reason = f"metrics.jsonl cannot be written ({one_line(e)})"

    def take_signal(self, number, frame):
        """SIGTERM, SIGUSR1 (a scheduler's warning), SIGHUP (a closed terminal), Ctrl-C and others
        ask the run to stop. If it is stopping already, Ctrl-C ends it at once, without saving."""
        if number == signal.SIGINT and self.stop_reason:
            sys.exit("interrupted")
        if self.stop_reason is None and self.env.rank == 0:
            with contextlib.suppress(OSError):
                os.write(2, b"\nsaving, then stopping; Ctrl-C again to stop at once, unsaved\n")
        self.stop_reason = signal.Signals(number).name

    def check_stop(self):
        """Saves and ends the run if any process was asked to stop."""
        if largest_of_all([bool(self.stop_reason)], self.env)[0]:
            self.stop()

    def stop(self):
        self.save()
        self.end(self.stop_reason or "a signal to another process", INTERRUPTED)

    def end(self, why, status):
        """Ends the program before the run is done."""
        if self.env.rank == 0:
            with contextlib.suppress(OSError):  # if the terminal is gone
                print(f"stopped at step {self.step}: {why}. The same command resumes from step "
                      f"{self.saved}", file=sys.stderr, flush=True)
        sys.exit(status)

    def save(self):
        """Writes self.saveable, weights and optimizer, unless they were written already. All
        processes wait for it: torchrun kills the others soon after one has ended."""
        meta, position = self.saveable
        step = meta["step"]
        if step != self.saved and self.env.rank == 0:
            for name, p in self.model.named_parameters():
                if not torch.isfinite(p).all():
                    self.not_finite(f"at step {step} {name} is not finite")
            os.fsync(self.metrics.fileno())
            shown = {k: v for k, v in position.items() if not torch.is_tensor(v)}
            micro = largest_divisor(self.n_rows // self.env.world, self.env.micro)
            meta = dict(meta, model_config=dataclasses.asdict(self.model.config),
                        recipe=self.recipe, data=self.data,
                        user_config=dataclasses.asdict(self.cfg), max_seq_len=self.cfg.max_seq_len,
                        device_batch_size=micro, total_batch_size=self.cfg.total_batch_size,
                        processes=self.env.world, dataloader_state_dict=shown, finished=False)
            save_checkpoint(self.folder, step, self.model, self.optimizer, position,
                            {**meta, **self.facts}, self.keep)
        barrier(self.env)
        self.saved = step

    def finish(self, **more):
        """Marks the last checkpoint as finished, and adds the last validation to its meta file."""
        if self.env.rank == 0:
            self.capture()
            os.fsync(self.metrics.fileno())
            meta = {**read_meta(self.folder, self.saved), **self.saveable[0], **more}
            path = checkpoint_files(self.folder, self.saved)["meta"]
            atomic_write(path, json.dumps({**meta, "finished": True}, indent=1))
        barrier(self.env)
        self.say(f"finished: {self.folder}, val bpb {self.now['val_bpb']:.4f}, "
                 f"{self.now['loop_state']['total_training_time'] / 60:.1f} minutes of training")

    def not_finite(self, what):
        sys.exit(f"{what}. The same command resumes from the last checkpoint (step {self.saved}), "
                 "or start over with lower learning rates")
