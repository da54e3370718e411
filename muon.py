"""Muon for matrices, AdamW for the rest: one optimizer to copy anywhere (needs only torch).

    optimizer = MuonAdamW([dict(kind="muon", params=matrices_of_one_shape, lr=0.02),
                           dict(kind="adamw", params=[embedding, head], lr=0.003)])
    loss.backward(); optimizer.step(); optimizer.zero_grad()

An update's singular values say how far it moves a matrix in each direction. In plain momentum
they differ widely: after 150 steps of a 4-layer model of width 256, the ten largest of 256 held 46
to 82% of the squared norm, and the median was 2 to 8% of the largest. So momentum alone learns a
few directions and neglects the rest. Muon (https://kellerjordan.github.io/posts/muon) sets all
singular values to about 1, so that every direction moves equally far.

Also here: the groups of model.py's GPT, and the schedules of pretraining. Left out: sharding of the
optimizer's state (it is small).
"""
import math

import torch
import torch.distributed as dist

# ---- Muon, for K matrices of one shape at a time -------------------------------------------------

# (a, b, c) of the five steps of polar_express, with a safety factor of 2%
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def polar_express(G, dtype=torch.float32):
    """Orthogonalises each matrix of G (K, rows, cols): keeps its singular vectors, brings its
    singular values near 1. Matmuls only, in `dtype` (Polar Express, arXiv:2505.16932).

    If X = U S V^T, then X X^T X = U S^3 V^T. So aX + b XX^TX + c XX^TXX^TX keeps U and V and maps
    each singular value s to a s + b s^3 + c s^5. Small ones grow fast; all end near 1:

        start    step 1   step 2   step 3   step 4   step 5
        0.001     0.008    0.033    0.128    0.416    0.859
        0.01      0.082    0.328    1.181    1.047    1.027
        0.1       0.793    1.962    1.409    0.585    1.059
        1         1.552    0.276    1.018    1.355    0.859

    Values that start between 0.001 and 1 end between 0.85 and 1.15, which is close enough."""
    X = G.to(dtype)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)  # all singular values below 1
    tall = G.size(-2) > G.size(-1)
    for a, b, c in POLAR_EXPRESS:
        A = X.mT @ X if tall else X @ X.mT  # (K, n, n), n the smaller of rows and cols
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # bA + cA^2, (K, n, n)
        # aX + XB or aX + BX, (K, rows, cols)
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


def orthogonalize_shared(G, dtype):
    """polar_express of G (K, rows, cols), with the K matrices divided among the processes."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return polar_express(G, dtype)
    world, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(G) // world)  # matrices for each process, rounded up
    padded = torch.cat([G, G.new_zeros(share * world - len(G), *G.shape[1:])])
    mine = polar_express(padded[rank * share:(rank + 1) * share], dtype)
    everyone = mine.new_empty(padded.shape)
    dist.all_gather(list(everyone.chunk(world)), mine.contiguous())
    return everyone[:len(G)]


def normuon(X, second_momentum, beta2):
    """Some rows of an orthogonalized matrix may still be much longer than others. So each row of X
    (K, rows, cols), or each column if cols > rows, is divided by the root of its running mean
    square, and each matrix is scaled back to its norm (NorMuon, arXiv:2510.05491). Updates
    second_momentum, (K, rows, 1) or (K, 1, cols). Returns float32."""
    X = X.float()
    dim = -1 if X.size(-2) >= X.size(-1) else -2
    mean_square = X.square().mean(dim=dim, keepdim=True)  # (K, rows, 1) or (K, 1, cols)
    second_momentum.lerp_(mean_square, 1 - beta2)
    scale = second_momentum.clamp_min(1e-10).rsqrt()
    old_norm = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()  # (K, 1, 1), up to a factor
    new_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return X * (scale * old_norm / new_norm.clamp_min(1e-10))


def cautious_step(params, update, lr, weight_decay):
    """params -= lr (update + weight_decay x params), in place. Weights whose sign differs from the
    update's do not decay, because that would undo the update (arXiv:2510.12402)."""
    decay = weight_decay * params * (update * params >= 0)
    params.sub_(lr * (update + decay))


def update_matrices(grads, weights, momentum_buffer, second_momentum_buffer,
                    lr, momentum, beta2, weight_decay, dtype):
    """One step of Muon in place. All tensors but second_momentum_buffer are (K, rows, cols), see
    normuon; lr, momentum, beta2 and weight_decay are floats or 0-d tensors."""
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = grads.lerp(momentum_buffer, momentum)  # Nesterov lookahead
    update = orthogonalize_shared(update, dtype)
    update = normuon(update, second_momentum_buffer, beta2)
    cautious_step(weights, update, lr, weight_decay)


def matmul_dtype(device):
    """bfloat16 on a GPU that has it (a V100 or T4 only emulates it), float32 elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


# ---- The optimizer -------------------------------------------------------------------------------

DEFAULTS = {"adamw": dict(betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0),
            "muon": dict(momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=0.0)}
EXAMPLES = ("a group is dict(kind='muon', params=matrices_of_one_shape, lr=0.02) "
            "or dict(kind='adamw', params=all_others, lr=0.003)")


class MuonAdamW(torch.optim.Optimizer):
    """A group has kind, params and lr. It may also have (see DEFAULTS):

    adamw: betas, eps, weight_decay. State of each parameter: step, exp_avg, exp_avg_sq.
    muon, for K float32 matrices of one shape: momentum, beta2 (of normuon), weight_decay, and
        ns_steps, always 5, which only the nanochat repo reads. State of the group, kept at its
        first parameter: momentum_buffer (K, rows, cols), second_momentum_buffer (K, rows, 1) or
        (K, 1, cols).

    Parameters without gradients are skipped, state included.
    compile: torch.compile for Muon's update in a single process, one graph for each of <= 8 shapes.
    Several processes (DDP): each holds all weights and all state, and expects gradients already
    averaged. Sharded parameters (FSDP) are rejected: a shard's singular values differ.
    ValueError: no kind, no lr, or a muon group of anything but float32 matrices of one shape."""

    # Class attributes, because a copied or unpickled optimizer has none of its own
    compiled = False
    update_matrices = staticmethod(update_matrices)

    def __init__(self, groups, compile=False):
        super().__init__(groups, defaults={})  # calls add_param_group for each
        if compile and not dist.is_initialized():
            self.compiled = True
            self.update_matrices = torch.compile(update_matrices, fullgraph=True, dynamic=False)

    def add_param_group(self, group):
        missing = [field for field in ("kind", "lr") if field not in group]
        if missing:
            raise ValueError(f"MuonAdamW: a group without {' and '.join(missing)}; {EXAMPLES}")
        kind = group["kind"]
        if kind not in DEFAULTS:
            raise ValueError(f"MuonAdamW: kind {kind!r}; {EXAMPLES}")
        super().add_param_group({**DEFAULTS[kind], "initial_lr": group["lr"], **group})
        params = self.param_groups[-1]["params"]
        found = sorted({f"{tuple(p.shape)} {p.dtype}" for p in params})
        if any(hasattr(p, "full_tensor") for p in params):  # a DTensor
            self.param_groups.pop()
            raise ValueError("MuonAdamW: parameters sharded by FSDP are not supported: use DDP, or "
                             "build it from whole parameters")
        good = len(found) == 1 and params[0].ndim == 2 and params[0].dtype == torch.float32
        if kind == "muon" and params and not good:
            self.param_groups.pop()
            raise ValueError("MuonAdamW: a muon group has float32 matrices of one shape, "
                             f"not {', '.join(found)}; {EXAMPLES}")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["kind"] == "adamw":
                self.step_adamw(group)
            else:
                self.step_muon(group)

    def step_adamw(self, group):
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            t = state["step"]
            p.mul_(1 - group["lr"] * group["weight_decay"])
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
            root = (state["exp_avg_sq"] / (1 - beta2 ** t)).sqrt_().add_(group["eps"])
            p.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta1 ** t))

    def step_muon(self, group):
        params = group["params"]
        unused = [i for i, p in enumerate(params) if p.grad is None]
        if len(unused) == len(params):
            return
        K, (rows, cols), device = len(params), params[0].shape, params[0].device
        state = self.state[params[0]]
        if not state:
            second = (K, rows, 1) if rows >= cols else (K, 1, cols)
            state["momentum_buffer"] = torch.zeros(K, rows, cols, device=device)
            state["second_momentum_buffer"] = torch.zeros(second, device=device)
        weights = torch.stack(params)  # (K, rows, cols)
        grads = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])

        # Unused matrices take part, so that the batch keeps its shape, and are restored afterwards
        changing = [weights, state["momentum_buffer"], state["second_momentum_buffer"]]
        before = [tensor[unused] for tensor in changing] if unused else []
        # A tall orthogonal matrix has columns of length 1, but rows of sqrt(cols / rows)
        lr = group["lr"] * max(1, rows / cols) ** 0.5
        numbers = [lr, group["momentum"], group["beta2"], group["weight_decay"]]
        if self.compiled:  # floats are constants: each new value recompiles
            numbers = [torch.tensor(number) for number in numbers]
        self.update_matrices(grads, *changing, *numbers, matmul_dtype(device))
        for tensor, old in zip(changing, before):
            tensor[unused] = old
        torch._foreach_copy_(params, list(weights.unbind(0)))


def build_optimizer(model, embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02,
                    weight_decay=0.0, compile=False):
    """The optimizer of model.py's GPT, with groups for head, embedding, and the block matrices by
    shape. The learning rates of head and embedding hold for width 768 and scale with
    (width/768)^-0.5."""
    factor = (model.config.n_embd / 768) ** -0.5
    groups = [dict(kind="adamw", params=[model.lm_head.weight], lr=unembedding_lr * factor,
                   betas=(0.8, 0.96), weight_decay=0.01),
              dict(kind="adamw", params=[model.transformer.wte.weight], lr=embedding_lr * factor,
                   betas=(0.8, 0.995), weight_decay=0.001)]
    matrices = list(model.transformer.h.parameters())
    for shape in sorted({p.shape for p in matrices}):
        groups.append(dict(kind="muon", params=[p for p in matrices if p.shape == shape],
                           lr=matrix_lr, weight_decay=weight_decay))
    return MuonAdamW(groups, compile)


# ---- The schedules of pretraining: pure functions of the step ------------------------------------

WARMUP, FINAL_LR = 40, 0.05


def warmdown_start(steps):
    """The step from which the learning rate falls: 35% of the run."""
    return steps - round(0.65 * steps)


def lr_factor(step, steps):
    """(step + 1)/40 in the first 40 steps, then 1, then linear to 5% at step `steps`. After 25, 50
    and 75% of a long run: 1.00, 0.78, 0.42."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    start = warmdown_start(steps)
    if step < start:
        return 1.0
    return 1 - (1 - FINAL_LR) * (step - start) / (steps - start)


def muon_momentum(step, steps):
    """0.85 -> 0.97 over the first 400 steps, then constant, then 0.97 -> 0.90 over the warm-down.
    If these overlap in a short run, the first wins."""
    if step < 400:
        return 0.85 + (0.97 - 0.85) * step / 400
    start = warmdown_start(steps)
    if step < start:
        return 0.97
    return 0.97 + (0.90 - 0.97) * (step - start) / (steps - start)


def muon_weight_decay(step, steps, initial):
    """Half a cosine from `initial` to 0 over the run."""
    return initial * 0.5 * (1 + math.cos(math.pi * step / steps))
