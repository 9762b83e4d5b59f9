"""A compressed cache for Hugging Face transformers, on the device of the model: a CPU or a GPU.

    from turboquant.huggingface import TurboQuantCache
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="turboquant")
    cache = TurboQuantCache(model.config, batch=2, max_tokens=4096, attention_mask=inputs["attention_mask"])
    model.generate(**inputs, past_key_values=cache)

With attn_implementation "turboquant" queries attend to the codes; on a GPU prompts of more than 16 tokens attend to tiles
decoded from them (PagedCache.prefill). With any other implementation every step decodes the whole cache for it: right, but slow.
"""

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from .paged import PagedCache

_NAME = "turboquant"
_MOST_QUERIES = 16  # of one PagedCache.attend on a GPU


class _Layer(CacheLayerMixin):
    """One layer: every sequence has its own run of pages, as long as max_tokens."""

    is_sliding = False
    is_compileable = False

    def __init__(self, batch, max_tokens, bits, page_size, padding, fused):
        super().__init__()
        self.batch, self.max_tokens, self.bits, self.page_size = batch, max_tokens, bits, page_size
        self.padding, self.fused = padding, fused
        self.total = 0  # columns of the batch, padding included
        self.cache = None

    def lazy_initialization(self, key_states, value_states=None):
        kv_heads, head_size = key_states.shape[1], key_states.shape[3]
        device = key_states.device
        pages = (self.max_tokens + self.page_size - 1) // self.page_size
        self.cache = PagedCache(self.batch * pages, kv_heads, head_size, *self.bits, self.page_size, device=device)
        self.page_table = torch.arange(self.batch * pages, dtype=torch.int32, device=device).view(self.batch, pages)
        self.padding = self.padding.to(device)
        self.dtype, self.device = key_states.dtype, device
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, n, _ = key_states.shape
        if batch != self.batch:
            raise ValueError(f"key_states: batch {batch}, but the cache was made for {self.batch}")
        if self.total + n > self.max_tokens:
            raise ValueError(f"the cache holds {self.max_tokens} tokens; {self.total + n} are needed: raise max_tokens")
        columns = torch.arange(self.total, self.total + n, device=self.device)
        positions = columns[None] - self.padding[:, None]  # negative: padding, which is not stored
        slots = self.cache.slots_of(self.page_table, positions).flatten().contiguous()
        self.cache.write(key_states.transpose(1, 2).flatten(0, 1).contiguous(),
                         value_states.transpose(1, 2).flatten(0, 1).contiguous(), slots)
        self.total += n
        if self.fused:
            key_states._turboquant_layer = self
            return key_states, value_states
        columns = torch.arange(self.total, device=self.device)[None] - self.padding[:, None]
        keys, values = self.cache.read(self.cache.slots_of(self.page_table, columns).flatten().contiguous(), self.dtype)
        shape = (batch, self.total, self.cache.kv_heads, self.cache.head_size)
        return keys.view(shape).transpose(1, 2), values.view(shape).transpose(1, 2)

    def attend(self, query, scaling, sliding_window, softcap, sink_logits):
        """query [batch, heads, q_len, head_size] -> [batch, q_len, heads, head_size]."""
        q = query.transpose(1, 2).contiguous()
        lengths = (self.total - self.padding).clamp(min=0).to(torch.int32)
        options = dict(scale=scaling, sliding_window=sliding_window or 0, softcap=softcap or 0.0, sink_logits=sink_logits)
        if q.shape[1] <= _MOST_QUERIES:
            return self.cache.attend(q, self.page_table, lengths, **options)
        return self.cache.prefill(q, self.page_table, lengths, max_length=self.total, **options)

    def get_mask_sizes(self, query):
        n = query if isinstance(query, int) else query.shape[0]
        return self.total + n, 0

    def get_seq_length(self):
        return self.total

    def get_max_cache_shape(self):
        return self.max_tokens

    def get_max_length(self):
        return self.max_tokens

    def reset(self):
        self.total = 0

    def reorder_cache(self, beam_idx):
        raise NotImplementedError("TurboQuantCache: beam search is not served")


class TurboQuantCache(Cache):
    """Compressed keys and values of all layers. attention_mask [batch, tokens] of a left-padded batch says where each
    sequence begins; padding is not stored."""

    def __init__(self, config, batch, max_tokens, key_bits=4, value_bits=4, page_size=64, attention_mask=None):
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        padding = torch.zeros(batch, dtype=torch.int64)
        if attention_mask is not None:
            if tuple(attention_mask.shape)[:1] != (batch,) or attention_mask.dim() != 2:
                raise ValueError(f"attention_mask: shape {tuple(attention_mask.shape)}, expected [{batch}, tokens]")
            seen = attention_mask.cpu().long()
            padding = (seen.cumsum(1) == 0).sum(1)
            if not bool((seen.sum(1) + padding == seen.shape[1]).all()):
                raise ValueError("attention_mask: only padding on the left is served")
        fused = text._attn_implementation == _NAME
        super().__init__(layers=[_Layer(batch, max_tokens, (key_bits, value_bits), page_size, padding, fused)
                                 for _ in range(text.num_hidden_layers)])

    @property
    def kv_bytes(self):
        """Bytes of all layers' pages, those not written to yet included; 0 before the first tokens."""
        return sum(layer.cache.kv_bytes for layer in self.layers if layer.cache is not None)


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None, softcap=None,
               s_aux=None, **kwargs):
    layer = getattr(key, "_turboquant_layer", None)
    if layer is None:
        raise ValueError("attn_implementation='turboquant' needs past_key_values=TurboQuantCache(...), made after the "
                         "implementation was chosen")
    if s_aux is not None:  # gpt-oss: one more logit a head
        s_aux = s_aux.float().contiguous()
    return layer.attend(query, scaling, sliding_window, softcap, s_aux), None


AttentionInterface.register(_NAME, _attention)
