"""What a GPU alone does, and that it does what a CPU does: pytest -m gpu python/tests."""

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

from cache_testing import attention, filled, relative  # noqa: E402
from turboquant import PagedCache  # noqa: E402


def test_a_graph_replays_with_other_lengths():
    cache, table, lengths, _ = filled("cuda", 1, 640)
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


def test_a_mean_for_every_256_positions():
    """Keys whose mean moves with the position: the mean of their block is taken off, so they come back better."""
    context, kv_heads = 700, 2
    mu = 3 * torch.randn(3, kv_heads, 128, device="cuda")
    positions = torch.arange(context, device="cuda")
    table = torch.arange(11, device="cuda", dtype=torch.int32)[None]
    keys = mu[positions // 256] + torch.randn(context, kv_heads, 128, device="cuda")
    values = torch.randn(context, kv_heads, 128, device="cuda")
    q = torch.randn(1, 40, 8, 128, device="cuda")
    for blocks, low, high in ((mu, 0, .05), (mu.mean(0), .06, .2)):
        cache = PagedCache(11, kv_heads, 128, mu=blocks)
        lengths = torch.zeros(1, dtype=torch.int32, device="cuda")
        cache.append(keys[None], values[None], table, lengths)
        slots = cache.slots_of(table, positions[None])[0]
        k, v = cache.read(slots, positions=positions)
        assert low < relative(k, keys) < high
        want = attention(q, k[None], v[None])
        for part in (slice(0, 40), slice(30, 40)):
            call = cache.prefill if part.start == 0 else cache.attend
            assert relative(call(q[:, part].contiguous(), table, lengths).cpu(), want[:, part]) < 2e-3
    with pytest.raises(ValueError, match="positions: a cache with a mean"):
        PagedCache(11, kv_heads, 128, mu=mu).write(keys, values, slots)


def test_what_a_gpu_does_not_serve():
    for call, words in (
            (lambda: PagedCache(1, 1, 80), "head_size 80"),
            (lambda: PagedCache(1, 1, 128, 5), "key_bits 5")):
        with pytest.raises(ValueError, match=words):
            call()
    cache, table, lengths, _ = filled("cuda", 1, 64)
    q = torch.randn(1, 17, 8, 128, device="cuda", dtype=torch.float16)
    with pytest.raises(ValueError, match="q_len 17"):
        cache.attend(q, table, lengths)
    with pytest.raises(ValueError, match="scale must not be negative"):
        cache.prefill(q, table, lengths, scale=-1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize("bits", [(2, 2), (3, 3), (4, 4), (8, 8), (4, 2)])
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_gpu_and_a_cpu_store_and_say_the_same(dtype, head_size, bits, conditioned):
    torch.manual_seed(1)
    context, batch = 200, 2
    options = {}
    if conditioned:
        options = dict(mu=torch.randn(2, head_size), lambda_=torch.rand(2, head_size) + .5)
    rows = torch.randn(2, batch, context, 2, head_size).to(dtype)
    q = torch.randn(batch, 3, 8, head_size)
    q_exact, all_slots = {}, torch.arange(batch, dtype=torch.int32)
    found = {}
    for device in ("cuda", "cpu"):
        table = torch.tensor([[7, 2, 0, 5], [1, 3, 6, 4]], dtype=torch.int32, device=device)
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        cache = PagedCache(8, 2, head_size, *bits, device=device, **options)
        cache.append(rows[0].to(device), rows[1].to(device), table, lengths)
        slots = cache.slots_of(table, torch.arange(context, device=device).expand(batch, context)).flatten()
        found[device] = [x.cpu() for x in (*cache.codes(slots), *cache.read(slots),
                                           cache.attend(q.to(device), table, lengths),
                                           cache.prefill(q.to(device), table, lengths))]
        exact = PagedCache(8, 2, head_size, *bits, device=device, sinks=3, window=20, sequences=2, q_len=3, **options)
        lengths.zero_()
        exact.append(rows[0].to(device), rows[1].to(device), table, lengths)
        q_exact[device] = exact.attend(q.to(device), table, lengths, sequence_slots=all_slots.to(device)).cpu()
    (codes, scales, keys, values, out, _), theirs = found["cuda"], found["cpu"]
    assert torch.equal(codes, theirs[0])
    assert torch.equal(scales, theirs[1])
    assert relative(keys, theirs[2]) < 1e-5 and relative(values, theirs[3]) < 1e-5
    assert relative(out, theirs[4]) < 8e-4
    assert relative(found["cuda"][5], theirs[5]) < 1e-3
    assert relative(q_exact["cuda"], q_exact["cpu"]) < 1.5e-3
