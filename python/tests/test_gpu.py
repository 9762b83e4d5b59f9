"""The PyTorch package on a GPU: pytest -m gpu python/tests."""

import math
import pathlib
import sys

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import turboquant  # noqa: E402
from turboquant import PagedCache  # noqa: E402


def filled(batch, context, kv_heads=2, head_size=128, bits=(4, 4), page_size=64, dtype=torch.float16, **options):
    """A cache of `batch` sequences of `context` tokens, its page table, and the rows that were written."""
    pages = -(-context // page_size)
    cache = PagedCache(batch * pages + 1, kv_heads, head_size, *bits, page_size, **options)
    table = torch.randperm(batch * pages + 1, device="cuda")[: batch * pages].to(torch.int32).view(batch, pages)
    rows = torch.randn(2, batch, context, kv_heads, head_size, device="cuda").to(dtype)
    lengths = torch.zeros(batch, dtype=torch.int32, device="cuda")
    turboquant.append(cache, rows[0], rows[1], table, lengths)
    assert lengths.tolist() == [context] * batch
    return cache, table, lengths, rows


def decoded(cache, table, context):
    positions = torch.arange(context, device="cuda").expand(table.shape[0], context)
    k, v = turboquant.decode(cache, cache.slots_of(table, positions).flatten())
    shape = (table.shape[0], context, cache.kv_heads, cache.head_size)
    return k.view(shape).transpose(1, 2), v.view(shape).transpose(1, 2)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("bits,bound", [((2, 2), .40), ((3, 3), .20), ((4, 4), .105), ((8, 8), .01)])
def test_decode_is_the_rows_up_to_the_codec(bits, bound):
    cache, table, _, rows = filled(2, 300, bits=bits)
    for got, want in zip(decoded(cache, table, 300), rows):
        error = relative(got, want.transpose(1, 2))
        assert bound / 3 < error < bound


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("group,q_len", [(1, 1), (4, 1), (8, 1), (4, 5), (7, 16)])
def test_attend_is_attention_over_the_decoded_rows(head_size, group, q_len):
    context = 500
    cache, table, lengths, _ = filled(3, context, head_size=head_size)
    q = torch.randn(3, q_len, cache.kv_heads * group, head_size, device="cuda", dtype=torch.float16)
    got = turboquant.attend(cache, q, table, lengths)
    k, v = decoded(cache, table, context)
    mask = torch.arange(context, device="cuda") <= torch.arange(context - q_len, context, device="cuda")[:, None]
    want = F.scaled_dot_product_attention(q.double().transpose(1, 2), k.double(), v.double(), attn_mask=mask,
                                          enable_gqa=True)
    assert relative(got, want.transpose(1, 2)) < 1e-3


def test_a_mean_for_every_256_positions():
    """Keys whose mean moves with the position: the mean of their block is taken off, so they come back better."""
    context, kv_heads = 700, 2
    mu = 3 * torch.randn(3, kv_heads, 128, device="cuda")
    positions = torch.arange(context, device="cuda")
    table = torch.arange(11, device="cuda", dtype=torch.int32)[None]
    keys = mu[positions // 256] + torch.randn(context, kv_heads, 128, device="cuda")
    values = torch.randn(context, kv_heads, 128, device="cuda")
    q = torch.randn(1, 40, 8, 128, device="cuda")
    mask = torch.arange(context, device="cuda") <= torch.arange(context - 40, context, device="cuda")[:, None]
    for blocks, low, high in ((mu, 0, .05), (mu.mean(0), .06, .2)):
        cache = PagedCache(11, kv_heads, 128, mu=blocks)
        lengths = torch.zeros(1, dtype=torch.int32, device="cuda")
        cache.append(keys[None], values[None], table, lengths)
        slots = cache.slots_of(table, positions[None])[0]
        k, v = cache.read(slots, positions=positions)
        assert low < relative(k, keys) < high
        want = F.scaled_dot_product_attention(q.transpose(1, 2).double(), k.transpose(0, 1)[None].double(),
                                              v.transpose(0, 1)[None].double(), attn_mask=mask, enable_gqa=True)
        for part in (slice(0, 40), slice(30, 40)):
            call = cache.prefill if part.start == 0 else cache.attend
            assert relative(call(q[:, part].contiguous(), table, lengths), want.transpose(1, 2)[:, part]) < 2e-3
    with pytest.raises(ValueError, match="positions: a cache with a mean"):
        PagedCache(11, kv_heads, 128, mu=mu).write(keys, values, slots)


def test_exact_rows_are_attended_to():
    context = 200
    cache, table, lengths, rows = filled(2, context, sinks=4, window=32, sequences=2)
    q = torch.randn(2, 1, 8, 128, device="cuda", dtype=torch.float16)
    slots = torch.arange(2, dtype=torch.int32, device="cuda")
    got = cache.attend(q, table, lengths, sequence_slots=slots)
    k, v = (x.clone() for x in decoded(cache, table, context))
    plain = F.scaled_dot_product_attention(q.float().transpose(1, 2), k, v, enable_gqa=True)
    for x, row in ((k, rows[0]), (v, rows[1])):
        for part in (slice(0, 4), slice(context - 32, context)):
            x[:, :, part] = row.transpose(1, 2)[:, :, part].float()
    want = F.scaled_dot_product_attention(q.float().transpose(1, 2), k, v, enable_gqa=True)
    assert relative(got, want.transpose(1, 2)) < 1.5e-3
    assert relative(got, plain.transpose(1, 2)) > 5e-3  # the exact rows made a difference


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 6e-4), (torch.float16, 8e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("q_len", [1, 37, 300])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_prefill_is_attention_over_the_decoded_rows(head_size, q_len, dtype, bound):
    context = 300
    cache, table, lengths, _ = filled(2, context, head_size=head_size)
    q = torch.randn(2, q_len, 8, head_size, device="cuda", dtype=dtype)
    got = turboquant.prefill(cache, q, table, lengths)
    k, v = decoded(cache, table, context)
    mask = torch.arange(context, device="cuda") <= torch.arange(context - q_len, context, device="cuda")[:, None]
    want = F.scaled_dot_product_attention(q.double().transpose(1, 2), k.double(), v.double(), attn_mask=mask,
                                          enable_gqa=True)
    assert relative(got, want.transpose(1, 2)) < bound


def test_prefill_is_attend_query_by_query():
    """Soft-cap, sliding window, sink logits, exact rows and left padding, against the decoding kernel."""
    context, q_len = 200, 60
    cache, table, lengths, _ = filled(2, context, sinks=4, window=32, sequences=2, q_len=q_len)
    slots = torch.arange(2, dtype=torch.int32, device="cuda")
    options = dict(softcap=25.0, sliding_window=90, sequence_slots=slots,
                   sink_logits=torch.randn(8, device="cuda"), scale=.2)
    q = torch.randn(2, q_len, 8, 128, device="cuda", dtype=torch.float16)
    got = cache.prefill(q, table, lengths, **options)
    for start in range(0, q_len, 15):
        part = cache.attend(q[:, start:start + 15].contiguous(), table, lengths - (q_len - start - 15), **options)
        assert relative(got[:, start:start + 15], part) < 1.5e-3
    lengths[1] = 20  # 40 of its 60 queries are padding
    got = cache.prefill(q, table, lengths, workspace_bytes=0, **options)  # a KV head at a time
    assert not got[1, :40].any() and bool(got[1, 40:].any())
    alone = cache.prefill(q[1:, 40:], table[1:], lengths[1:], **{**options, "sequence_slots": slots[1:]})
    assert torch.equal(got[1:, 40:], alone)


def test_appending_one_by_one_is_one_append():
    cache, table, lengths, rows = filled(2, 90)
    other = PagedCache(cache.n_pages, 2, 128)
    count = torch.zeros(2, dtype=torch.int32, device="cuda")
    for t in range(90):
        other.append(rows[0][:, t:t + 1].contiguous(), rows[1][:, t:t + 1].contiguous(), table, count)
    slots = cache.slots_of(table, torch.arange(90, device="cuda").expand(2, 90)).flatten()
    for mine, theirs in zip(cache.codes(slots), other.codes(slots)):
        assert torch.equal(mine, theirs)


def test_a_graph_replays_with_other_lengths():
    cache, table, lengths, _ = filled(1, 640)
    q = torch.randn(1, 1, 8, 128, device="cuda", dtype=torch.float16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = cache.attend(q, table, lengths)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        cache.attend(q, table, lengths, out=out)
    for length in (640, 65, 1, 333):
        lengths.fill_(length)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, cache.attend(q, table, lengths))


def test_wrong_arguments_are_named():
    cache, table, lengths, rows = filled(1, 64)
    q = torch.randn(1, 1, 8, 128, device="cuda", dtype=torch.float16)
    slots = torch.arange(64, device="cuda")
    for call, words in (
            (lambda: cache.attend(q[..., :64], table, lengths), "q: shape"),
            (lambda: cache.attend(q.to(torch.int32), table, lengths), "q: torch.int32"),
            (lambda: cache.attend(q, table.long(), lengths), "page_table: torch.int64"),
            (lambda: cache.attend(q, table, lengths.repeat(2)), "lengths: shape"),
            (lambda: cache.attend(q[:, :, :7], table, lengths), "heads 7"),
            (lambda: cache.attend(q.repeat(1, 17, 1, 1), table, lengths), "q_len 17"),
            (lambda: cache.prefill(q[:, :, :7], table, lengths), "heads 7"),
            (lambda: cache.prefill(q, table, lengths, max_length=0), "max_length 0"),
            (lambda: cache.prefill(q, table, lengths, scale=-1.0), "scale must not be negative"),
            (lambda: cache.write(rows[0][0, :, :1], rows[1][0], slots), "keys: shape"),
            (lambda: cache.write(rows[0][0], rows[1][0].float(), slots), "values: "),
            (lambda: cache.write(rows[0][0], rows[1][0], slots.int()), "slots: torch.int32"),
            (lambda: cache.write(rows[0][0].cpu(), rows[1][0], slots), "keys: not a CUDA tensor"),
            (lambda: PagedCache(1, 1, 80), "head_size 80"),
            (lambda: PagedCache(1, 1, 128, 5), "key_bits 5")):
        with pytest.raises(ValueError, match=words):
            call()


# ---- Hugging Face ----------------------------------------------------------------------------------------------------

def tiny_model(kind, implementation):
    transformers = pytest.importorskip("transformers")
    shape = dict(vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
                 num_key_value_heads=2, head_dim=64, max_position_embeddings=512, attn_implementation=implementation)
    config = (transformers.LlamaConfig if kind == "llama" else transformers.Qwen3Config)(**shape)
    torch.manual_seed(7)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).half().cuda().eval()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_generation_over_codes_is_generation_over_decoded_rows(kind):
    pytest.importorskip("transformers")
    from turboquant.huggingface import TurboQuantCache
    fused, plain = tiny_model(kind, "turboquant"), tiny_model(kind, "sdpa")
    ids = torch.randint(5, 500, (2, 40), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :13] = 0  # left padding
    results = []
    for model in (fused, plain):
        cache = TurboQuantCache(model.config, 2, 128, attention_mask=mask)
        results.append(model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=24,
                                      do_sample=False, output_logits=True, return_dict_in_generate=True,
                                      pad_token_id=0))
        assert cache.get_seq_length() == 40 + 23
        assert cache.kv_bytes > 0
    logits = [torch.stack(r.logits) for r in results]
    # Up to the first token where rounding decides between two words, both must say the same.
    same = (results[0].sequences == results[1].sequences).all(0)
    upto = int(same.long().cumprod(0).sum()) - 40
    assert upto >= 8
    # Prompts went through two kernels: where a number lies at a threshold, later layers store another code.
    assert relative(logits[0][:upto], logits[1][:upto]) < 2e-2
    # Alone, without padding: the second sequence says the same.
    cache = TurboQuantCache(fused.config, 1, 128)
    alone = fused.generate(ids[1:, 13:], attention_mask=mask[1:, 13:], past_key_values=cache, max_new_tokens=8,
                           do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    assert relative(torch.stack(alone.logits)[:1, 0], logits[0][:1, 1]) < 5e-3


def test_eight_bits_are_close_to_no_compression():
    pytest.importorskip("transformers")
    from turboquant.huggingface import TurboQuantCache
    model, plain = tiny_model("llama", "turboquant"), tiny_model("llama", "sdpa")
    ids = torch.randint(5, 500, (1, 60), device="cuda")
    cache = TurboQuantCache(model.config, 1, 128, key_bits=8, value_bits=8)
    with torch.no_grad():
        want = plain(ids).logits
        model(ids[:, :50], past_key_values=cache)
        got = torch.cat([model(ids[:, t:t + 1], past_key_values=cache).logits for t in range(50, 60)], 1)
    assert relative(got, want[:, 50:]) < 2e-2


def test_what_is_not_served_is_said():
    pytest.importorskip("transformers")
    from turboquant.huggingface import TurboQuantCache
    model = tiny_model("llama", "turboquant")
    ids = torch.randint(5, 500, (1, 20), device="cuda")
    with pytest.raises(ValueError, match="past_key_values=TurboQuantCache"):
        model(ids)
    with pytest.raises(ValueError, match="raise max_tokens"):
        model(ids, past_key_values=TurboQuantCache(model.config, 1, 10))
    with pytest.raises(ValueError, match="only padding on the left"):
        TurboQuantCache(model.config, 1, 10, attention_mask=torch.tensor([[1, 1, 0]]))


def test_scale_defaults_to_one_over_the_root_of_the_head_size():
    cache, table, lengths, _ = filled(1, 64)
    q = torch.randn(1, 1, 8, 128, device="cuda", dtype=torch.float16)
    assert torch.equal(cache.attend(q, table, lengths), cache.attend(q, table, lengths, scale=1 / math.sqrt(128)))
