"""Muon for matrices, AdamW for the rest: one optimizer in one file, to be copied into other projects (needs torch only).

    optimizer = MuonAdamW([
        dict(kind="adamw", params=[embedding], lr=0.3, betas=(0.8, 0.995), eps=1e-10, weight_decay=0.001),
        dict(kind="muon", params=same_shaped_matrices, lr=0.02, momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=0.0)])
    loss.backward(); optimizer.step(); optimizer.zero_grad()

Muon (https://kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest orthogonal matrix, so that
every direction moves equally far. Here: Nesterov momentum, five Polar Express steps (arXiv:2505.16932), NorMuon's second
moment (arXiv:2510.05491), cautious weight decay (arXiv:2510.12402). Matrices of one shape are a group and are
orthogonalised in one batch; under torch.distributed each process does its share of that batch.

Also here, because they belong to the optimizer: build_optimizer (groups and reference values for the model of model.py) and the
schedules of pretraining, pure functions of the step. Left out: sharding of the state (it is small).
"""
import math

import torch
import torch.distributed as dist

# Coefficients of the polynomial aX + X(bA + cA^2) of each step (Polar Express, 5 steps, safety factor of 2%)
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


# ---- Muon, a batch of same-shaped matrices at a time ---------------------------------------------------------------

def polar_express(G, steps=5):
    """Replaces the singular values of each matrix of G (K, rows, cols) by values near 1 (arXiv:2505.16932).

    Matmuls only, bfloat16 on a GPU, float32 elsewhere; A is always the smaller of the two Gram matrices."""
    X = G.bfloat16() if G.is_cuda else G.float()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)      # all singular values below 1
    for a, b, c in POLAR_EXPRESS[:steps]:
        tall = G.size(-2) > G.size(-1)
        A = X.mT @ X if tall else X @ X.mT                          # (K, cols, cols) or (K, rows, rows)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)                 # bA + cA^2, added inside the matmul
        X = torch.baddbmm(X, X, B, beta=a) if tall else torch.baddbmm(X, B, X, beta=a)
    return X


def normuon(X, second_momentum, beta2):
    """Divides each row (column, where cols > rows) of X (K, rows, cols) by the root of its running mean square, then
    restores the norm of each matrix (arXiv:2510.05491). second_momentum, (K, rows, 1) or (K, 1, cols), is updated."""
    X = X.float()
    dim = -1 if X.size(-2) >= X.size(-1) else -2
    mean_square = X.square().mean(dim=dim, keepdim=True)            # (K, rows, 1) or (K, 1, cols)
    second_momentum.lerp_(mean_square, 1 - beta2)
    scale = second_momentum.clamp_min(1e-10).rsqrt()
    old_norm = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    new_norm = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return X * (scale * old_norm / new_norm.clamp_min(1e-10))


def cautious_step(params, update, lr, weight_decay):
    """params -= lr (update + weight_decay x params where the two agree in sign), in place (arXiv:2510.12402)."""
    decay = weight_decay * params * (update * params >= 0)
    params.sub_(lr * (update + decay))


def orthogonalize_shared(G, steps):
    """polar_express(G) with the K matrices divided among the processes."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return polar_express(G, steps)
    world, rank = dist.get_world_size(), dist.get_rank()
    share = -(-len(G) // world)                                     # matrices a process, rounded up
    padded = torch.cat([G, G.new_zeros(share * world - len(G), *G.shape[1:])])
    mine = polar_express(padded[rank * share:(rank + 1) * share], steps)
    everyone = mine.new_empty(padded.shape)
    dist.all_gather_into_tensor(everyone, mine.contiguous())
    return everyone[:len(G)]


def update_matrices(weights, grads, momentum_buffer, second_momentum_buffer, lr, momentum, beta2, weight_decay, ns_steps):
    """One step of Muon for K matrices of one shape, all (K, rows, cols), in place. The numbers may be floats or
    0-d tensors; to torch.compile floats are constants, and each new value would mean a new compilation."""
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = grads.lerp(momentum_buffer, momentum)                  # Nesterov's look ahead
    update = orthogonalize_shared(update, ns_steps)
    update = normuon(update, second_momentum_buffer, beta2)
    cautious_step(weights, update, lr, weight_decay)


# ---- The optimizer -------------------------------------------------------------------------------------------------

class MuonAdamW(torch.optim.Optimizer):
    """Groups of kind "muon" (matrices of one shape) and of kind "adamw". Fields of a group:

    adamw: lr, betas, eps, weight_decay; state of each parameter: step, exp_avg, exp_avg_sq.
    muon: lr, momentum, ns_steps, beta2, weight_decay; state of the group, kept at its first parameter: momentum_buffer
    (K, rows, cols) and second_momentum_buffer (K, rows, 1) or (K, 1, cols). lr is multiplied by sqrt(max(1, rows/cols)).

    compile: torch.compile for Muon's update (of a single process), one graph for each shape, of which torch allows 8.

    All processes hold the whole state and make the same step, given gradients that are already averaged among them."""

    compiled, update_matrices = False, staticmethod(update_matrices)        # also of an optimizer that was copied or unpickled

    def __init__(self, groups, compile=False):
        if compile and not dist.is_initialized():
            self.compiled, self.update_matrices = True, torch.compile(update_matrices, fullgraph=True, dynamic=False)
        for group in groups:
            if group["kind"] not in ("adamw", "muon"):
                raise ValueError(f"kind {group['kind']!r}: a group is of kind 'adamw' or 'muon'")
            if group["kind"] == "muon" and len({p.shape for p in group["params"]}) > 1:
                raise ValueError(f"the matrices of a muon group have one shape, not {[tuple(p.shape) for p in group['params']]}")
            group.setdefault("initial_lr", group["lr"])
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            self.step_adamw(group) if group["kind"] == "adamw" else self.step_muon(group)

    def step_adamw(self, group):
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            state["step"] += 1
            p.mul_(1 - group["lr"] * group["weight_decay"])
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].lerp_(p.grad.square(), 1 - beta2)
            denominator = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            p.addcdiv_(state["exp_avg"], denominator, value=-group["lr"] / (1 - beta1 ** state["step"]))

    def step_muon(self, group):
        params = group["params"]
        rows, cols = params[0].shape
        state = self.state[params[0]]
        if not state:
            column = (len(params), rows, 1) if rows >= cols else (len(params), 1, cols)
            state["momentum_buffer"] = torch.zeros(len(params), rows, cols, device=params[0].device)
            state["second_momentum_buffer"] = torch.zeros(column, device=params[0].device)
        grads, weights = torch.stack([p.grad for p in params]), torch.stack(list(params))       # (K, rows, cols)
        numbers = [group["lr"] * max(1, rows / cols) ** 0.5, group["momentum"], group["beta2"], group["weight_decay"]]
        self.update_matrices(weights, grads, state["momentum_buffer"], state["second_momentum_buffer"],
                             *(map(torch.tensor, numbers) if self.compiled else numbers), group["ns_steps"])
        torch._foreach_copy_(params, list(weights.unbind(0)))


def build_optimizer(model, embedding_lr=0.3, unembedding_lr=0.008, matrix_lr=0.02, weight_decay=0.0, compile=False):
    """The groups of model.py's GPT, in the order head, embedding, block matrices by shape. The two AdamW learning rates are
    references for width 768 and scale with (width/768)^-0.5."""
    width = (model.config.n_embd / 768) ** -0.5
    matrices = list(model.transformer.h.parameters())
    groups = [
        dict(kind="adamw", params=[model.lm_head.weight], lr=unembedding_lr * width, betas=(0.8, 0.96), eps=1e-10, weight_decay=0.01),
        dict(kind="adamw", params=[model.transformer.wte.weight], lr=embedding_lr * width, betas=(0.8, 0.995), eps=1e-10, weight_decay=0.001)]
    for shape in sorted({p.shape for p in matrices}):
        groups.append(dict(kind="muon", params=[p for p in matrices if p.shape == shape], lr=matrix_lr,
                           momentum=0.95, ns_steps=5, beta2=0.9, weight_decay=weight_decay))
    return MuonAdamW(groups, compile)


# ---- The schedules of pretraining: pure functions of the step --------------------------------------------------------

WARMUP, FINAL_LR = 40, 0.05


def warmdown_start(steps):
    """The step at which the learning rate begins to fall: the last 65% of the run."""
    return steps - round(0.65 * steps)


def lr_factor(step, steps):
    """(step+1)/40 during the first 40 steps, then 1, then linear to 5% (which step `steps` would reach)."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    start = warmdown_start(steps)
    return 1.0 if step < start else 1 - (1 - FINAL_LR) * (step - start) / (steps - start)


def muon_momentum(step, steps):
    """0.85 -> 0.97 over the first 400 steps, 0.97 -> 0.90 over the warm-down; where they overlap the first holds."""
    start = warmdown_start(steps)
    if step < 400:
        return 0.85 + (0.97 - 0.85) * step / 400
    return 0.97 if step < start else 0.97 + (0.90 - 0.97) * (step - start) / (steps - start)


def muon_weight_decay(step, steps, initial):
    """Half a cosine from `initial` to 0 over the run."""
    return initial * 0.5 * (1 + math.cos(math.pi * step / steps))
