"""The nanochat miniseries for Hugging Face transformers: configuration, model and tokenizer in one file.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)     # repo: out/hf_sft/TAG or a hub name
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)

export_hf.py puts a copy beside each exported model. The mathematics is that of model.py, read again with what
transformers adds: a key-value cache (each token is computed once), padding (rows of different lengths in a batch),
exchangeable attention kernels, and outputs that its trainers and generators know. Where transformers wants something
particular, a comment says so. Runs on transformers 4.57 and 5.x; they differ in MASK_ARGUMENTS and cache_position.

One switch sets this model apart: config.use_rope. True: q and k are rotated by their positions (RoPE,
arXiv:2104.09864). False: no positional embedding at all (DroPE, arXiv:2512.12167): no length is out of its range.
Left out: dropout, biases, scaled RoPE, tied embeddings.
"""
import inspect
from typing import Callable, Optional, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple, logging

logger = logging.get_logger(__name__)

MASK_ARGUMENTS = set(inspect.signature(create_causal_mask).parameters)      # 4.57 and 5.x do not take the same ones


# ---- Configuration ---------------------------------------------------------------------------------------------

class NanoChatConfig(PretrainedConfig):
    """What config.json holds. The defaults are the miniseries' d18.

    hidden_act is "swiglu". Other exports of this model say "silu", which is read too; but transformers 5 has a nanochat
    class of its own with another MLP, and the name makes that class refuse our files instead of misreading them."""

    model_type = "nanochat"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {                                  # how servers may split the matrices among processes
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    def __init__(self, vocab_size=32768, hidden_size=1152, intermediate_size=3072, num_hidden_layers=18,
                 num_attention_heads=9, num_key_value_heads=None, head_dim=128, hidden_act="swiglu", rms_norm_eps=1e-6,
                 rope_parameters=None, use_rope=True, final_logit_softcapping=15.0, max_position_embeddings=32768,
                 use_cache=True, bos_token_id=32759, eos_token_id=32759, pad_token_id=32759, tie_word_embeddings=False,
                 **kwargs):
        if hidden_act not in ("swiglu", "silu"):
            raise ValueError(f'hidden_act "{hidden_act}": this class computes SwiGLU ("swiglu") only')
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 100000.0}
        if self.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError(f"rope_parameters {self.rope_parameters}: this class computes rope_type default only")
        self.use_rope = use_rope
        self.final_logit_softcapping = final_logit_softcapping
        self.max_position_embeddings = max_position_embeddings
        self.use_cache = use_cache
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
                         tie_word_embeddings=tie_word_embeddings, **kwargs)


# ---- The layers ------------------------------------------------------------------------------------------------

def norm(x, eps):
    """RMSNorm without weights over the last dimension (arXiv:1910.07467). A function, not a module: there is
    nothing to learn, and servers that exchange modules named ...RMSNorm would expect weights in it."""
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotary_tables(position_ids, config, dtype):
    """position_ids (B, T) -> cos and sin of position x frequency, each (B, 1, T, head_dim/2), to be used by all layers.

    Computed in each forward pass, in float32: a table kept as a buffer would not survive transformers 5's loading."""
    theta, head_dim = config.rope_parameters["rope_theta"], config.head_dim
    freqs = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim)
    angles = position_ids[:, None, :, None].float() * freqs
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Rotates each pair (x1[i], x2[i]) of a (B, n_head, T, head_dim) tensor by its angle, x1 and x2 being the halves of
    head_dim. The direction is the released checkpoints' own: the transpose of the textbook's rotation."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, -x1 * sin + x2 * cos), dim=-1)


def linear(n_in, n_out, init_std):
    """nn.Linear without bias that remembers how its fresh weights begin: uniform, with this standard deviation. The
    residual branches' last matrices begin at zero, so every layer begins as the identity."""
    layer = nn.Linear(n_in, n_out, bias=False)
    layer.init_std = init_std
    return layer


def eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs):
    """Attention written out. query (B, n_head, T, head_dim); key, value (B, n_kv_head, S, head_dim), S the tokens so
    far; attention_mask (B or 1, 1, T, S), 0 where a query may look, the most negative number where not.
    Returns (B, T, n_head, head_dim) and the weights (B, n_head, T, S)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = query @ key.transpose(2, 3) * scaling                                     # (B, n_head, T, S)
    if attention_mask is not None:
        weights = weights + attention_mask[:, :, :, :key.size(2)]
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class NanoChatAttention(nn.Module):
    """Causal self-attention over all tokens so far."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim ** -0.5
        C = config.hidden_size
        q_size, kv_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = linear(C, q_size, C ** -0.5)
        self.k_proj = linear(C, kv_size, C ** -0.5)
        self.v_proj = linear(C, kv_size, C ** -0.5)
        self.o_proj = linear(q_size, C, 0)

    def forward(self, x, rotary, attention_mask, past_key_values=None, cache_position=None, **kwargs):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, self.head_dim).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        if rotary is not None:                              # None: use_rope is off, the model has no positions
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        eps = self.config.rms_norm_eps
        q, k = norm(q, eps).to(v.dtype), norm(k, eps).to(v.dtype)       # QK-norm, after the rotation (arXiv:2302.05442)
        if past_key_values is not None:                     # this layer's part of the cache: T new ones in, all S out
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": cache_position})
        # The user chooses the kernel by attn_implementation. One plain look-up: transformers 4.57 searches this file
        # for it to learn that there is a choice, as 5.x searches for ALL_ATTENTION_FUNCTIONS.get_interface(...).
        attention: Callable = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        y, weights = attention(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(B, T, -1)), weights    # y (B, T, n_head, head_dim)


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
    """x += attention(norm(x)); x += mlp(norm(x)). The base class recomputes the layer in backward if asked to."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.self_attn = NanoChatAttention(config, layer_idx)
        self.mlp = NanoChatMLP(config)

    def forward(self, x, **kwargs):
        y, weights = self.self_attn(norm(x, self.eps), **kwargs)
        x = x + y
        return x + self.mlp(norm(x, self.eps)), weights


# ---- The model -------------------------------------------------------------------------------------------------

class NanoChatPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of the classes below, and how fresh weights begin."""

    config_class = NanoChatConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoChatDecoderLayer"]            # device_map may cut between layers, not inside one
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True                      # kernels that come from outside (vLLM and others)
    _can_compile_fullgraph = True                           # and so a static cache may be used

    def _init_weights(self, module):
        """As model.py does it. Called for every module that has weights of its own; through nn.init only, which
        transformers makes skip what a checkpoint has filled."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.8)
        elif isinstance(module, nn.Linear) and hasattr(module, "init_std"):
            bound = 3 ** 0.5 * module.init_std              # U(-a, a) has std a / sqrt(3)
            nn.init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, nn.Linear):                 # the head
            nn.init.normal_(module.weight, std=0.001)


class NanoChatModel(NanoChatPreTrainedModel):
    """The transformer without its head: token ids in, hidden states out."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NanoChatDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Optional[torch.LongTensor] = None, attention_mask: Optional[torch.Tensor] = None,
                position_ids: Optional[torch.LongTensor] = None, past_key_values: Optional[Cache] = None,
                inputs_embeds: Optional[torch.FloatTensor] = None, use_cache: Optional[bool] = None,
                output_attentions: Optional[bool] = None, output_hidden_states: Optional[bool] = None, **kwargs):
        """input_ids (B, T), or inputs_embeds (B, T, C) -> last_hidden_state (B, T, C), after the last norm.

        attention_mask (B, S): 0 for padding, on either side; S counts the cached tokens too. position_ids (B, T):
        needed only for packed rows, where each document starts again at 0 and sees nothing before it. past_key_values:
        the cache of earlier calls."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.size(1)
        if T > self.config.max_position_embeddings:
            logger.warning_once(f"{T} tokens are over max_position_embeddings {self.config.max_position_embeddings}:"
                                " that works; how well depends on the model (use_rope false is made for it)")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        # Where are the new tokens? 4.57's generate() says it by cache_position (T,), which 5.x no longer has.
        cache_position = kwargs.pop("cache_position", None)
        if cache_position is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            cache_position = torch.arange(T, device=x.device) + seen
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        # Made before a cache is: only without one does create_causal_mask look for packed rows in position_ids.
        arguments = {"config": self.config, "inputs_embeds": x, "input_embeds": x, "attention_mask": attention_mask,
                     "cache_position": cache_position, "past_key_values": past_key_values, "position_ids": position_ids}
        mask = create_causal_mask(**{k: v for k, v in arguments.items() if k in MASK_ARGUMENTS})
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        rotary = None
        if self.config.use_rope:                            # DroPE: this line is all that the model knows of it
            rotary = rotary_tables(position_ids, self.config, x.dtype)
        hidden_states = (x,) if output_hidden_states else None          # what enters each layer, and the last norm's
        attentions = () if output_attentions else None
        for layer in self.layers:
            x, weights = layer(x, rotary=rotary, attention_mask=mask, position_ids=position_ids, use_cache=use_cache,
                               past_key_values=past_key_values, cache_position=cache_position, **kwargs)
            if output_hidden_states:
                hidden_states += (x,)
            if output_attentions:
                attentions += (weights,)
        x = norm(x, self.config.rms_norm_eps)
        if output_hidden_states:
            hidden_states = hidden_states[:-1] + (x,)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values,
                                       hidden_states=hidden_states, attentions=attentions)


class NanoChatForCausalLM(NanoChatPreTrainedModel, GenerationMixin):
    """The transformer and its head: token ids in, logits for the next token out. GenerationMixin brings generate()."""

    def __init__(self, config):
        super().__init__(config)
        self.model = NanoChatModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids: Optional[torch.LongTensor] = None, attention_mask: Optional[torch.Tensor] = None,
                position_ids: Optional[torch.LongTensor] = None, past_key_values: Optional[Cache] = None,
                inputs_embeds: Optional[torch.FloatTensor] = None, labels: Optional[torch.LongTensor] = None,
                use_cache: Optional[bool] = None, logits_to_keep: Union[int, torch.Tensor] = 0, **kwargs):
        """NanoChatModel's arguments, and: labels (B, T), the input_ids with -100 where no loss is wanted, unshifted;
        logits_to_keep: only the last so many positions (0: all), or a tensor of positions. Logits are float32."""
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                             past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
                             **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        cap = self.config.final_logit_softcapping
        logits = self.lm_head(outputs.last_hidden_state[:, keep])           # (B, T, vocab_size)
        logits = cap * torch.tanh(logits.float() / cap)                     # arXiv:2408.00118
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                                      hidden_states=outputs.hidden_states, attentions=outputs.attentions)


# ---- The tokenizer ---------------------------------------------------------------------------------------------

class NanoChatTokenizer(PreTrainedTokenizerFast):
    """tokenizer.json with two conveniences. Without trust_remote_code the plain PreTrainedTokenizerFast is loaded: the
    same ids, but a rendered chat then needs add_special_tokens=False, and transformers 5 gives ids alone only if
    return_dict=False is said."""

    def apply_chat_template(self, conversation, *args, return_dict=False, **kwargs):
        """As in the base class; returns ids unless return_dict=True (the default in transformers 4, not in 5)."""
        return super().apply_chat_template(conversation, *args, return_dict=return_dict, **kwargs)

    def _starts_with_bos(self, text):
        texts = [text] if isinstance(text, str) else text
        return bool(texts) and all(isinstance(t, str) and t.startswith(self.bos_token) for t in texts)

    def _encode_plus(self, text, *args, add_special_tokens=True, **kwargs):
        """<|bos|> goes before a text, but not a second one before a rendered chat, which brings its own."""
        kwargs["add_special_tokens"] = add_special_tokens and not self._starts_with_bos(text)
        return super()._encode_plus(text, *args, **kwargs)

    def _batch_encode_plus(self, batch_text_or_text_pairs, *args, add_special_tokens=True, **kwargs):
        """The same for a batch in transformers 4.57 (5.x has one method for both)."""
        kwargs["add_special_tokens"] = add_special_tokens and not self._starts_with_bos(batch_text_or_text_pairs)
        return super()._batch_encode_plus(batch_text_or_text_pairs, *args, **kwargs)

    def _set_model_specific_special_tokens(self, special_tokens):
        """Lets 4.57 read what 5.x saved: a list of special tokens, where it expects a dict. An __init__ would be the
        place for that, but makes 5.x build the tokenizer anew from the vocabulary, without its split pattern."""
        if isinstance(special_tokens, list):
            self.additional_special_tokens, self.extra_special_tokens = special_tokens, {}
        else:
            super()._set_model_specific_special_tokens(special_tokens)
