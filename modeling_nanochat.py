"""The nanochat miniseries for Hugging Face transformers: configuration, model and tokenizer.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    repo = "out/hf_sft/TAG"                         # made by export_hf.py, or a name on the hub
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)

The same model as in model.py, with what transformers (tried with 5.0, 5.20 and 5.24) needs: a
key-value cache, padding, interchangeable kernels, and outputs for its trainers and generators.

What sets it apart is config.use_rope. True: q and k are rotated by their positions (RoPE,
arXiv:2104.09864). False: no positional embeddings at all (DroPE, arXiv:2512.12167). Left out:
dropout, biases, scaled RoPE, tied embeddings.
"""
import inspect

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
if transformers.__version__.startswith(("3.", "4.")):
    raise ImportError("modeling_nanochat.py needs transformers 5.0 or newer, not "
                      f"{transformers.__version__}: pip install -U transformers")
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg
try:
    from transformers.utils.output_capturing import capture_outputs
except ImportError:  # 5.0
    from transformers.utils.generic import check_model_inputs as capture_outputs

# The names of the cache and of the mask's arguments depend on the version
MASK_ARGUMENTS = set(inspect.signature(create_causal_mask).parameters)
CACHE = "cache" if "cache" in MASK_ARGUMENTS else "past_key_values"


def takes_cache(forward):
    """Since 5.24 past_key_values is the deprecated name of cache. Before, `cache` was an argument
    for the kernels of continuous batching, beside past_key_values."""
    if CACHE == "cache":
        return deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward)
    return forward


# ---- Configuration -------------------------------------------------------------------------------

DEFAULTS = dict(  # of d18, which was trained on 4096 tokens at a time
    vocab_size=32768, hidden_size=1152, intermediate_size=3072, num_hidden_layers=18,
    num_attention_heads=9, head_dim=128, rms_norm_eps=1e-6, hidden_act="swiglu", use_rope=True,
    logn_scale=0.0, final_logit_softcapping=15.0, max_position_embeddings=32768,
    original_max_position_embeddings=4096, use_cache=True, tie_word_embeddings=False)


class NanoChatConfig(PreTrainedConfig):
    """The contents of config.json: DEFAULTS and rope_parameters. hidden_act is "swiglu" (other
    exports say "silu"), because transformers has its own nanochat class with another MLP, and the
    name makes that class refuse our files instead of misreading them."""

    model_type = "nanochat"
    keys_to_ignore_at_inference = [CACHE]
    rope_scaling = rope_theta = None  # of transformers 4, only here to be refused
    base_model_tp_plan = {  # how servers may shard the matrices
        "layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise", "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise", "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise"}

    def __init__(self, num_key_value_heads=None, rope_parameters=None, **kwargs):
        own = {name: kwargs.pop(name, default) for name, default in DEFAULTS.items()}
        own["num_key_value_heads"] = num_key_value_heads or own["num_attention_heads"]
        plain = {"rope_type": "default", "rope_theta": 100000.0}
        own["rope_parameters"] = {**plain, **(rope_parameters or {})}
        for name, value in own.items():
            setattr(self, name, value)
        super().__init__(tie_word_embeddings=own["tie_word_embeddings"], **kwargs)

    def refuse_what_is_not_computed(self):
        """Called by the model, because from_pretrained(name=value) sets values after __init__."""
        known = {"hidden_act": ("swiglu", "silu"), "tie_word_embeddings": (False,),
                 "use_rope": (True, False), "rope_scaling": (None,), "rope_theta": (None,)}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: this model only has {values}")
        rope = {"rope_type": "default", **(self.rope_parameters or {})}
        rope.pop("original_max_position_embeddings", None)  # some servers put it there
        if rope != {"rope_type": "default", "rope_theta": rope.get("rope_theta") or "missing"}:
            raise ValueError(f"rope_parameters={rope}: this model only has a plain rope_theta")


# ---- The layers ----------------------------------------------------------------------------------
# Shapes: B rows of T new tokens, S tokens with those in the cache, n_head heads of head_dim

def norm(x, eps):
    """RMSNorm without weights (arXiv:1910.07467). It is a function, because servers replace RMSNorm
    modules by their own, which expect weights."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotary_tables(position_ids, config, dtype):
    """position_ids (B, T) -> cos and sin of position x frequency, (B, 1, T, head_dim/2) each.
    Computed in every forward pass, in float32: transformers 5 would not load a buffer."""
    theta, head_dim = config.rope_parameters["rope_theta"], config.head_dim
    powers = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device)
    angles = position_ids[:, None, :, None].float() * theta ** (-powers / head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def logit_scale(position_ids, config):
    """The factor of each query's attention logits, float32 (B, 1, T, 1): at position n (from 1),
    max(1, 1 + c ln(n / n_train)), which is 1 up to the training length n_train. The more tokens
    compete in a softmax, the less the right one can get; sharper logits compensate for that."""
    n = position_ids[:, None, :, None].float() + 1
    scale = 1 + config.logn_scale * (n / config.original_max_position_embeddings).log()
    return scale.clamp(min=1)


def rotate(x, cos, sin):
    """Rotates each pair (x1[i], x2[i]) of x (B, n_head, T, head_dim), x1 and x2 being the halves of
    head_dim. The released checkpoints rotate in this direction, opposite to the textbook's."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, -x1 * sin + x2 * cos), dim=-1)


def linear(n_in, n_out, init_std):
    """nn.Linear without bias whose initial weights are uniform with this std: 0 in the last
    matrices of the residual branches, so that every layer starts as the identity."""
    layer = nn.Linear(n_in, n_out, bias=False)
    layer.init_std = init_std
    return layer


class NanoChatAttention(nn.Module):
    """Causal self-attention over all tokens so far."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        C, n_q, n_kv = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.num_key_value_groups = config.head_dim, n_q // n_kv
        self.scaling = self.head_dim ** -0.5  # vLLM reads this attribute
        self.q_proj = linear(C, n_q * self.head_dim, C ** -0.5)
        self.k_proj = linear(C, n_kv * self.head_dim, C ** -0.5)
        self.v_proj = linear(C, n_kv * self.head_dim, C ** -0.5)
        self.o_proj = linear(n_q * self.head_dim, C, 0)

    def forward(self, x, rotary, scale, attention_mask, past, cache_position, **kwargs):
        B, T, _ = x.shape  # rotary: cos and sin, or None without RoPE
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(x).view(B, T, -1, self.head_dim).transpose(1, 2) for proj in projections)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        eps = self.config.rms_norm_eps
        q, k = norm(q, eps).to(v.dtype), norm(k, eps).to(v.dtype)  # QK-norm, arXiv:2302.05442
        if scale is not None:
            q = (q * scale).to(v.dtype)  # scales the logits, whatever the kernel
        if past is not None:  # puts in this layer's T new tokens, gets all S
            more = kwargs if CACHE == "cache" else {"cache_position": cache_position}
            k, v = past.update(k, v, self.layer_idx, more)
        # transformers searches this file for the text ALL_ATTENTION_FUNCTIONS.get_interface(
        attention = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, weights = attention(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(B, T, -1)), weights  # y (B, T, n_head, head_dim)


class NanoChatMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config):
        super().__init__()
        C, I = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(C, I, 0.4 * C ** -0.5)
        self.up_proj = linear(C, I, 0.4 * C ** -0.5)
        self.down_proj = linear(I, C, 0)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class NanoChatDecoderLayer(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += mlp(norm(x)). The base class adds gradient checkpointing."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = NanoChatAttention(config, layer_idx)
        self.mlp = NanoChatMLP(config)

    def forward(self, x, **kwargs):
        x = x + self.self_attn(norm(x, self.eps), **kwargs)[0]
        return x + self.mlp(norm(x, self.eps))


# ---- The model -----------------------------------------------------------------------------------

class NanoChatPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the classes below, and the initial weights."""

    config_class = NanoChatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _can_record_outputs = {"hidden_states": NanoChatDecoderLayer, "attentions": NanoChatAttention}
    _no_split_modules = ["NanoChatDecoderLayer"]  # device_map must not split these
    _skip_keys_device_placement = [CACHE]
    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = True
    _supports_attention_backend = True  # external kernels (vLLM and others)
    _can_compile_fullgraph = True  # allows static caches

    def _init_weights(self, module):
        """As in model.py. transformers makes nn.init skip weights that a checkpoint has filled."""
        if hasattr(module, "init_std"):
            bound = 3 ** 0.5 * module.init_std  # U(-a, a) has std a / sqrt(3)
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, (nn.Embedding, nn.Linear)):
            nn.init.normal_(module.weight, std=0.8 if isinstance(module, nn.Embedding) else 0.001)


class NanoChatModel(NanoChatPreTrainedModel):
    """The transformer without its head: token ids in, hidden states out."""

    def __init__(self, config):
        config.refuse_what_is_not_computed()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [NanoChatDecoderLayer(config, i) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @capture_outputs  # collects hidden_states and attentions on request
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None,
                use_cache=None, **kwargs):
        """input_ids (B, T) or inputs_embeds (B, T, C) -> last_hidden_state (B, T, C), normalized.
        attention_mask (B, S): 0 for padding, on either side. position_ids (B, T): only needed for
        packed rows, in which each document starts at 0 and sees nothing before it. cache (before
        transformers 5.24: past_key_values): keys and values of the S - T previous tokens."""
        config, cache = self.config, kwargs.pop(CACHE, None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            cache, use_cache = None, False  # a recomputed layer would fill it twice
        position_ids, shared = self.place(x, attention_mask, position_ids, cache, kwargs)
        if use_cache and cache is None:  # not before: see place()
            cache = DynamicCache(config=config)
        rotary = rotary_tables(position_ids, config, x.dtype) if config.use_rope else None
        scale = logit_scale(position_ids, config) if config.logn_scale else None
        for layer in self.layers[:config.num_hidden_layers]:
            x = layer(x, rotary=rotary, scale=scale, past=cache, **shared, **kwargs)
        x = norm(x, config.rms_norm_eps)
        return BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache})

    def place(self, x, attention_mask, position_ids, cache, kwargs):
        """The position_ids of the new tokens x (B, T, C), and what the layers get: mask,
        positions."""
        T, cache_position = x.size(1), kwargs.pop("cache_position", None)  # from generate() in 5.0
        needed = position_ids is None or "cache_position" in MASK_ARGUMENTS
        if cache_position is None and needed:  # (a paged cache does not know its length)
            seen = cache.get_seq_length() if cache is not None else 0
            cache_position = torch.arange(T, device=x.device) + seen
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
            if attention_mask is not None and attention_mask.ndim == 2:  # do not count padding
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -T:]
        shared = {"attention_mask": attention_mask, "position_ids": position_ids,
                  "cache_position": cache_position}
        # create_causal_mask finds packed rows in position_ids, but only without a cache
        offered = {"config": self.config, "inputs_embeds": x, "input_embeds": x, CACHE: cache}
        wanted = {k: v for k, v in {**shared, **offered}.items() if k in MASK_ARGUMENTS}
        return position_ids, {**shared, "attention_mask": create_causal_mask(**wanted)}


class NanoChatForCausalLM(NanoChatPreTrainedModel, GenerationMixin):
    """The transformer and its head: token ids in, logits for the next token out."""

    def __init__(self, config):
        super().__init__(config)
        self.model = NanoChatModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None,
                labels=None, logits_to_keep=0, **kwargs):
        """Arguments as in NanoChatModel, and: labels (B, T), input_ids with -100 for no loss, not
        shifted; logits_to_keep: the last so many positions only (0: all), or a tensor of positions.
        Logits are float32."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask,
                             position_ids=position_ids, inputs_embeds=inputs_embeds, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep]).float()  # (B, T, vocab_size)
        cap, loss = self.config.final_logit_softcapping, None
        if cap:
            logits = cap * torch.tanh(logits / cap)  # arXiv:2408.00118
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels,
                                      vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(outputs, CACHE)},
                                      hidden_states=outputs.hidden_states,
                                      attentions=outputs.attentions)


# ---- The tokenizer -------------------------------------------------------------------------------

class NanoChatTokenizer(PreTrainedTokenizerFast):
    """tokenizer.json with some conveniences; the model card says how to do without."""

    def apply_chat_template(self, conversation, *args, return_dict=False, **kwargs):
        """As in the base class, but returns ids unless return_dict=True.
        continue_final_message: transformers cuts the chat after its last text, which it has to find
        in it. Since the template changes "<|", it also appends the original text (`echo`)."""
        if kwargs.get("continue_final_message"):
            chats = conversation if isinstance(conversation[0], (list, tuple)) else [conversation]
            last = [chat[-1]["content"] for chat in chats]
            kwargs["echo"] = "\n".join(c if isinstance(c, str) else c[-1]["text"] for c in last)
        return super().apply_chat_template(conversation, *args, return_dict=return_dict, **kwargs)

    def _without_bos(self, text):
        """Removes a leading <|bos|> from a text, or from the first text of a pair or of words."""
        if isinstance(text, str):
            return text.removeprefix(self.bos_token)
        return type(text)([self._without_bos(text[0]), *text[1:]]) if text else text

    def _bos_once(self, texts, add, split_special_tokens=False, **kwargs):
        """(texts, add_special_tokens) that give each text one <|bos|>; a rendered chat has its own.
        If only some texts have one, it is removed and added again (offsets then start after it)."""
        bare = [self._without_bos(text) for text in texts]
        begins = [a != b for a, b in zip(texts, bare)]
        if split_special_tokens or not (add and any(begins)):
            return texts, add
        return (texts, False) if all(begins) else (bare, True)

    def _encode_plus(self, text, *args, add_special_tokens=True, **kwargs):
        words = kwargs.get("is_split_into_words") and text and isinstance(text[0], str)
        one = isinstance(text, str) or words
        texts, add = self._bos_once([text] if one else text, add_special_tokens, **kwargs)
        texts = texts[0] if one else texts
        return super()._encode_plus(texts, *args, add_special_tokens=add, **kwargs)
