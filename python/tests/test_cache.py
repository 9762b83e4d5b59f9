"""PagedCache and its operators: the same calls on a CPU and on a GPU."""

import math
import threading

import pytest

torch = pytest.importorskip("torch")

import turboquant  # noqa: E402
from cache_testing import attention, decoded, filled, relative  # noqa: E402
from turboquant import PagedCache  # noqa: E402


@pytest.fixture(autouse=True)
def _same_numbers():
    """One thread: PyTorch's own spin, and beside other work small calls then take many times as long. Tests of threads
    set their number themselves."""
    torch.manual_seed(11)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def queries(device, batch, q_len, heads, head_size=128, dtype=torch.float16):
    return torch.randn(batch, q_len, heads, head_size).to(dtype).to(device)


# What the rounding of the output itself may cost, and the kernels' 16-bit integers.
BOUND = {torch.float32: 4e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("bits,bound", [((2, 2), .40), ((3, 3), .20), ((4, 4), .105), ((8, 8), .01)])
def test_decode_is_the_rows_up_to_the_codec(device, bits, bound):
    cache, table, _, rows = filled(device, 2, 300, bits=bits)
    for got, want in zip(decoded(cache, table, 300), rows):
        assert bound / 3 < relative(got, want) < bound


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("group,q_len", [(1, 1), (4, 1), (8, 1), (4, 5), (7, 16)])
def test_attend_is_attention_over_the_decoded_rows(device, head_size, group, q_len):
    cache, table, lengths, _ = filled(device, 3, 500, head_size=head_size)
    q = queries(device, 3, q_len, cache.kv_heads * group, head_size)
    got = turboquant.attend(cache, q, table, lengths)
    assert got.dtype == q.dtype and got.device.type == device
    assert relative(got.cpu(), attention(q, *decoded(cache, table, 500))) < BOUND[q.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (8, 4), (4, 2)])
def test_types_and_bits(device, dtype, bits):
    cache, table, lengths, rows = filled(device, 2, 200, bits=bits, dtype=dtype)
    assert relative(decoded(cache, table, 200)[0], rows[0]) < .4
    q = queries(device, 2, 2, 8, dtype=dtype)
    got = cache.attend(q, table, lengths)
    assert got.dtype == dtype
    assert relative(got.cpu(), attention(q, *decoded(cache, table, 200))) < BOUND[dtype]
    # In the caller's tensor, whatever its strides.
    wide = torch.full((2, 2, 8, 200), 7.0, dtype=dtype, device=device)
    cache.attend(q.transpose(1, 2).contiguous().transpose(1, 2), table, lengths, out=wide[..., 10:138])
    assert torch.equal(wide[..., 10:138], got)
    assert bool((wide[..., :10] == 7).all()) and bool((wide[..., 138:] == 7).all())


@pytest.mark.parametrize("options", [
    dict(softcap=5.0), dict(causal=False), dict(scale=.2), dict(sliding_window=70), dict(sliding_window=1),
    dict(sliding_window=100, softcap=3.0), dict(sliding_window=33, causal=False)], ids=str)
@pytest.mark.parametrize("q_len", [1, 6])
def test_options_of_attention(device, q_len, options):
    cache, table, lengths, _ = filled(device, 2, 300, dtype=torch.float32)
    q = 3 * queries(device, 2, q_len, 8, dtype=torch.float32)
    got = cache.attend(q, table, lengths, **options)
    want = attention(q, *decoded(cache, table, 300), **options)
    assert relative(got.cpu(), want) < 1e-3
    # They mean something.
    other = cache.attend(q, table, lengths)
    assert relative(other.cpu(), want) > 1e-2 or (q_len == 1 and options == dict(causal=False))


def test_sink_logits(device):
    cache, table, lengths, _ = filled(device, 2, 100, dtype=torch.float32)
    q = queries(device, 2, 3, 8, dtype=torch.float32)
    logits = torch.linspace(-2, 6, 8, device=device)
    got = cache.attend(q, table, lengths, sink_logits=logits)
    assert relative(got.cpu(), attention(q, *decoded(cache, table, 100), sink_logits=logits)) < 4e-4
    assert relative(got, cache.attend(q, table, lengths)) > .1


@pytest.mark.parametrize("q_len", [1, 4])
def test_sequences_of_different_lengths(device, q_len):
    cache, table, _, _ = filled(device, 5, 260)
    lengths = torch.tensor([260, 1, 64, 0, 131], dtype=torch.int32, device=device)
    q = queries(device, 5, q_len, 8)
    got = cache.attend(q, table, lengths)
    assert relative(got.cpu(), attention(q, *decoded(cache, table, 260), lengths)) < 1e-3
    assert bool((got[3] == 0).all())  # it sees nothing
    assert q_len == 1 or bool((got[1, 0] == 0).all())  # nor does a query in front of its sequence
    for b in range(5):  # alone, it says the same
        alone = cache.attend(q[b:b + 1], table[b:b + 1], lengths[b:b + 1])
        assert relative(alone, got[b:b + 1]) < 5e-4 if b != 3 else bool((alone == 0).all())


def test_pages_are_used_again(device):
    cache, table, lengths, _ = filled(device, 2, 192, dtype=torch.float32)
    # Sequence 0 ends; another begins in its pages, in another order, and does not see what is left of it.
    rows = torch.randn(2, 1, 80, 2, 128).to(device)
    mine = table[:1].flip(1).contiguous()
    count = torch.zeros(1, dtype=torch.int32, device=device)
    q = queries(device, 1, 3, 8, dtype=torch.float32)
    other = cache.attend(q, table[1:], lengths[1:])
    cache.append(rows[0], rows[1], mine, count)
    fresh = PagedCache(3, 2, 128, device=device)
    own = torch.arange(3, dtype=torch.int32, device=device)[None]
    count.zero_()
    fresh.append(rows[0], rows[1], own, count)
    assert torch.equal(cache.attend(q, mine, count), fresh.attend(q, own, count))
    again = cache.attend(q, table[1:], lengths[1:])
    assert torch.equal(again, other)  # sequence 1 is as it was


@pytest.mark.parametrize("q_len,options", [(1, dict(sinks=4, window=32)), (1, dict(sinks=3)), (5, dict(window=20)),
                                           (16, dict(sinks=4, window=32))], ids=str)
def test_exact_rows_are_attended_to(device, q_len, options):
    context = 200
    cache, table, lengths, rows = filled(device, 2, context, bits=(3, 3), sequences=2, q_len=q_len, **options)
    q = queries(device, 2, q_len, 8)
    slots = torch.arange(2, dtype=torch.int32, device=device)
    got = cache.attend(q, table, lengths, sequence_slots=slots)
    k, v = decoded(cache, table, context)
    assert relative(got.cpu(), attention(q, k, v, exact=rows, **options)) < 1.5e-3
    assert relative(got.cpu(), attention(q, k, v)) > 5e-3  # the exact rows made a difference


def test_exact_rows_follow_a_growing_sequence(device):
    options = dict(sinks=2, window=8)
    cache = PagedCache(8, 2, 128, 3, 3, device=device, sequences=3, q_len=2, **options)
    table = torch.tensor([[3, 0, 7], [1, 5, 2]], dtype=torch.int32, device=device)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
    lengths = torch.zeros(2, dtype=torch.int32, device=device)
    rows = torch.randn(2, 2, 100, 2, 128).half().to(device)
    at = 0
    for n in (1, 50, 1, 1, 2, 1, 30, 1):
        cache.append(rows[0][:, at:at + n], rows[1][:, at:at + n], table, lengths, slots)
        at += n
        q_len = min(n, 2)
        q = queries(device, 2, q_len, 4)
        got = cache.attend(q, table, lengths, sequence_slots=slots)
        k, v = decoded(cache, table, at)
        assert relative(got.cpu(), attention(q, k, v, exact=rows[:, :, :at], **options)) < 1.5e-3


def test_conditioning_of_keys(device):
    mu, lambda_ = 4 * torch.randn(2, 128), torch.rand(2, 128) + .5
    torch.manual_seed(5)
    plain, table, lengths, _ = filled(device, 1, 150)
    keys = (torch.randn(1, 150, 2, 128) + mu).to(device)
    values = torch.randn(1, 150, 2, 128).to(device)
    errors = []
    for options in ({}, dict(mu=mu, lambda_=lambda_)):
        cache = PagedCache(plain.n_pages, 2, 128, device=device, **options)
        count = torch.zeros(1, dtype=torch.int32, device=device)
        cache.append(keys, values, table, count)
        errors.append(relative(decoded(cache, table, 150)[0], keys))
    assert errors[1] < errors[0] / 2
    q = queries(device, 1, 2, 8, dtype=torch.float32)
    assert relative(cache.attend(q, table, lengths).cpu(), attention(q, *decoded(cache, table, 150))) < 1e-3


@pytest.mark.parametrize("dtype,bound", [(torch.float32, 6e-4), (torch.float16, 8e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("q_len", [1, 37, 300])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_prefill_is_attention_over_the_decoded_rows(device, head_size, q_len, dtype, bound):
    cache, table, lengths, _ = filled(device, 2, 300, head_size=head_size)
    q = queries(device, 2, q_len, 8, head_size, dtype)
    got = turboquant.prefill(cache, q, table, lengths)
    assert relative(got.cpu(), attention(q, *decoded(cache, table, 300))) < bound


def test_prefill_is_attend_query_by_query(device):
    """Soft-cap, sliding window, sink logits, exact rows and left padding, against decoding."""
    context, q_len = 200, 60
    cache, table, lengths, _ = filled(device, 2, context, sinks=4, window=32, sequences=2, q_len=q_len)
    slots = torch.arange(2, dtype=torch.int32, device=device)
    options = dict(softcap=25.0, sliding_window=90, sequence_slots=slots,
                   sink_logits=torch.randn(8).to(device), scale=.2)
    q = queries(device, 2, q_len, 8)
    got = cache.prefill(q, table, lengths, **options)
    for start in range(0, q_len, 15):
        part = cache.attend(q[:, start:start + 15].contiguous(), table, lengths - (q_len - start - 15), **options)
        assert relative(got[:, start:start + 15], part) < 1.5e-3
    lengths[1] = 20  # 40 of its 60 queries are padding
    got = cache.prefill(q, table, lengths, workspace_bytes=0, **options)  # a KV head at a time
    assert bool((got[1, :40] == 0).all()) and bool((got[1, 40:] != 0).any())
    alone = cache.prefill(q[1:, 40:], table[1:], lengths[1:], **{**options, "sequence_slots": slots[1:]})
    assert relative(got[1:, 40:], alone) < 5e-4


def test_prefill_takes_codes_where_the_ring_has_moved_on(device):
    """The ring holds the latest 8 tokens: of the window of 8, query i of 20 sees what is among them."""
    cache, table, lengths, rows = filled(device, 1, 100, bits=(2, 2), window=8, sequences=1)
    q = queries(device, 1, 20, 8)
    got = cache.prefill(q, table, lengths, sequence_slots=torch.zeros(1, dtype=torch.int32, device=device))
    k, v = decoded(cache, table, 100)
    seen = [x.clone() for x in (k, v)]
    for x, row in zip(seen, rows):
        x[:, 92:] = row[:, 92:].float()
    assert relative(got.cpu(), attention(q, *seen)) < 1.5e-3
    assert relative(got.cpu(), attention(q, k, v)) > 5e-3


def test_appending_one_by_one_is_one_append(device):
    cache, table, _, rows = filled(device, 2, 90)
    other = PagedCache(cache.n_pages, 2, 128, device=device)
    count = torch.zeros(2, dtype=torch.int32, device=device)
    for t in range(90):
        other.append(rows[0][:, t:t + 1], rows[1][:, t:t + 1], table, count)
    slots = cache.slots_of(table, torch.arange(90, device=device).expand(2, 90)).flatten()
    for mine, theirs in zip(cache.codes(slots), other.codes(slots)):
        assert torch.equal(mine, theirs)


def test_rows_that_are_left_out(device):
    cache, table, _, rows = filled(device, 1, 64)
    slots = torch.arange(64, device=device) + int(table[0, 0]) * 64
    before = cache.codes(slots)[0]
    left_out = torch.where(torch.arange(64, device=device) % 3 == 0, slots, -1)
    cache.write(-rows[0][0], -rows[1][0], left_out)
    after = cache.codes(slots)[0]
    same = (before == after).flatten(2).all(2).all(0)
    assert same.tolist() == [t % 3 != 0 for t in range(64)]
    keys, values = cache.read(left_out)
    assert [bool((keys[t] == 0).all() and (values[t] == 0).all()) for t in range(64)] == same.tolist()


def test_reading_in_the_rotated_basis_keeps_lengths(device):
    cache, table, _, rows = filled(device, 1, 64, bits=(8, 8))
    slots = torch.arange(64, device=device) + int(table[0, 0]) * 64
    plain, rotated = cache.read(slots), cache.read(slots, rotated=True)
    for a, b in zip(plain, rotated):
        assert torch.allclose(a.norm(dim=2), b.norm(dim=2), rtol=1e-3)
        assert relative(a, b) > .5
    assert cache.read(slots, torch.bfloat16)[0].dtype == torch.bfloat16
    del rows


def test_bytes(device):
    cache = PagedCache(10, 2, 128, device=device, sinks=2, window=6, sequences=3)
    assert cache.bytes_per_token == 2 * (64 + 64 + 4)
    assert cache.kv_bytes == 10 * 64 * cache.bytes_per_token + 2 * 3 * 8 * 2 * 128 * 2


def test_wrong_arguments_are_named(device):
    cache, table, lengths, rows = filled(device, 1, 64)
    q = queries(device, 1, 1, 8)
    slots = torch.arange(64, device=device)
    elsewhere = torch.device("meta")
    for call, words in (
            (lambda: cache.attend(q[..., :64], table, lengths), "q: shape"),
            (lambda: cache.attend(q.to(torch.int32), table, lengths), "q: torch.int32"),
            (lambda: cache.attend(q.to(elsewhere), table, lengths), "q: not a C"),
            (lambda: cache.attend(q, table.long(), lengths), "page_table: torch.int64"),
            (lambda: cache.attend(q, table, lengths.repeat(2)), "lengths: shape"),
            (lambda: cache.attend(q, table, lengths, out=q[:, :, :4]), "out: shape"),
            (lambda: cache.attend(q, table, lengths, sink_logits=lengths), "sink_logits: torch.int32"),
            (lambda: cache.attend(q[:, :, :7], table, lengths), "heads 7"),
            (lambda: cache.attend(q, table, lengths, softcap=-1.0), "softcap"),
            (lambda: cache.prefill(q[:, :, :7], table, lengths), "heads 7"),
            (lambda: cache.prefill(q, table, lengths, max_length=0), "max_length"),
            (lambda: cache.write(rows[0][0, :, :1], rows[1][0], slots), "keys: shape"),
            (lambda: cache.write(rows[0][0], rows[1][0].float(), slots), "values: "),
            (lambda: cache.write(rows[0][0], rows[1][0], slots.int()), "slots: torch.int32"),
            (lambda: cache.write(rows[0][0], rows[1][0], slots, slots), "exact_rows: this cache keeps"),
            (lambda: cache.write(rows[0][0].to(elsewhere), rows[1][0], slots), "keys: not a C"),
            (lambda: cache.read(slots, torch.int8), "dtype: torch.int8"),
            (lambda: PagedCache(1, 1, 66, device=device), r"head.size 66"),
            (lambda: PagedCache(1, 1, 128, 7, device=device), "7"),
            (lambda: PagedCache(1, 1, 128, window=4, device=device), "sequences: "),
            (lambda: PagedCache(1, 1, 128, mu=torch.zeros(3), device=device), "mu: shape"),
            (lambda: PagedCache(1, 1, 128, device="meta"), "device: meta")):
        with pytest.raises(ValueError, match=words):
            call()
    exact = PagedCache(1, 1, 128, window=4, sequences=1, device=device)
    with pytest.raises(ValueError, match="sequence_slots: a cache with exact rows"):
        exact.attend(q[:, :, :1].contiguous(), torch.zeros(1, 1, dtype=torch.int32, device=device), lengths)


def test_scale_defaults_to_one_over_the_root_of_the_head_size(device):
    cache, table, lengths, _ = filled(device, 1, 64)
    q = queries(device, 1, 1, 8)
    assert torch.equal(cache.attend(q, table, lengths), cache.attend(q, table, lengths, scale=1 / math.sqrt(128)))


# ---- the CPU alone ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("head_size,bits", [(128, (5, 6)), (80, (4, 4)), (96, (6, 3)), (36, (8, 5))])
def test_what_only_a_cpu_serves(head_size, bits):
    cache, table, lengths, rows = filled("cpu", 2, 200, head_size=head_size, bits=bits, page_size=192)
    keys, values = decoded(cache, table, 200)
    assert relative(keys, rows[0]) < .2 and relative(values, rows[1]) < .25
    q = queries("cpu", 2, 40, 40, head_size)  # 20 query heads a KV head, 40 queries
    assert relative(cache.attend(q, table, lengths), attention(q, keys, values)) < 1e-3
    codes, scales = cache.codes(torch.arange(5))
    assert codes.shape == (2, 5, 2, head_size) and scales.shape[:3] == (2, 5, 2)
    assert scales.dim() == (4 if head_size == 36 else 3)


def test_what_a_cpu_does_not_serve():
    for call, words in (
            (lambda: PagedCache(1, 1, 128, page_size=16, device="cpu"), "page_size 16; .* a multiple of 64"),
            (lambda: PagedCache(1, 1, 128, mu=torch.zeros(3, 1, 128), device="cpu"), "every 256 positions is not served"),
            (lambda: PagedCache(1, 1, 128, 16, device="cpu"), "16 bits; pass 2, 3, 4, 5, 6 or 8"),
            (lambda: PagedCache(1, 1, 128, device="cpu").pages, "no tensor")):
        with pytest.raises(ValueError, match=words):
            call()
    cache, table, lengths, _ = filled("cpu", 1, 64)
    q = queries("cpu", 1, 1, 8)
    for call, words in (
            (lambda: cache.attend(q, table, lengths, n_blocks=4), "n_blocks: 4"),
            (lambda: cache.attend(q, table, lengths + 1), r"lengths\[0\] is 65, the page table has room for 64"),
            (lambda: cache.attend(q, table + 9, lengths), "the cache has 2 pages"),
            (lambda: cache.write(*torch.zeros(2, 1, 2, 128), torch.tensor([128])), r"slots\[0\] is 128"),
            (lambda: cache.read(torch.tensor([128])), r"slots\[0\] is 128")):
        with pytest.raises(ValueError, match=words):
            call()
    exact, table, lengths, _ = filled("cpu", 1, 64, window=8, sequences=1)
    with pytest.raises(ValueError, match=r"ring 8 is less than window \+ q_len - 1 = 9"):
        exact.attend(queries("cpu", 1, 2, 8), table, lengths, sequence_slots=torch.zeros(1, dtype=torch.int32))


def test_one_thread_and_several_say_the_same():
    cache, table, lengths, _ = filled("cpu", 2, 2000)
    q = queries("cpu", 2, 1, 8, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        outs = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outs.append(cache.attend(q, table, lengths))
        assert relative(outs[1], outs[0]) < 1e-4 and relative(outs[2], outs[0]) < 1e-4
    finally:
        torch.set_num_threads(before)


def test_work_is_shared_by_pytorchs_threads():
    from turboquant import _cpu_library
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert _cpu_library.threads().n_workers == 3 and _cpu_library.threads().run
        torch.set_num_threads(1)
        assert not _cpu_library.threads().run
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_python_threads():
    cache, table, lengths, _ = filled("cpu", 4, 500)
    q = queries("cpu", 4, 1, 8)
    want = [cache.attend(q[b:b + 1], table[b:b + 1], lengths[b:b + 1]) for b in range(4)]
    wrong = []

    def work(b):
        for _ in range(50):
            if not torch.equal(cache.attend(q[b:b + 1], table[b:b + 1], lengths[b:b + 1]), want[b]):
                wrong.append(b)

    threads = [threading.Thread(target=work, args=(b,)) for b in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
