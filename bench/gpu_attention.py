#!/usr/bin/env python3
"""Decode attention on a GPU: ours beside torch's, FlashInfer's where it is installed, and a plain read of our bytes.

One run measures everything, interleaved. Each figure is a median over replays of a CUDA graph that holds enough calls
on different caches that none of them finds its keys in L2, divided by the calls; so launches are in, the host is not.

    TURBOQUANT_CUDA_LIBRARY=build/release/lib/libturboquant_cuda.so bench/gpu_attention.py --json bench/results
"""

import argparse
import datetime
import json
import math
import pathlib
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "python"))
import turboquant  # noqa: E402

HEAD_SIZE, HEADS, KV_HEADS = 128, 32, 8
SHAPES = ["1x4096", "1x32768", "1x131072", "8x32768", "32x4096", "32x32768"]


def reader():
    """A kernel that reads a buffer of bytes and does as little else as possible."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(source, target, n, BLOCK: tl.constexpr):
        total = tl.zeros([BLOCK], dtype=tl.int32)
        for at in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
            index = at + tl.arange(0, BLOCK)
            total += tl.load(source + index, mask=index < n, other=0)
        tl.store(target + tl.program_id(0), tl.sum(total))

    processors = torch.cuda.get_device_properties(0).multi_processor_count
    target = torch.empty(processors * 8, dtype=torch.int32, device="cuda")

    def call(buffer):
        words = buffer.view(torch.int32).view(-1)
        read[(processors * 8,)](words, target, words.numel(), BLOCK=4096, num_warps=8)

    return call


class Graph:
    """Calls captured once; time() replays them and gives microseconds a call."""

    def __init__(self, calls):
        self.n = len(calls)
        self.calls = calls  # and with them every tensor that the graph reads
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for call in calls:
                call()
        self.replay()

    def replay(self):
        self.graph.replay()
        torch.cuda.synchronize()

    def time(self):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1000 / self.n


def copies(cache_bytes, l2):
    """Enough caches that a round over them passes the L2 several times, and enough calls for the clock."""
    return max(1, min(64, math.ceil(4 * l2 / cache_bytes)))


def ours(batch, context, key_bits, value_bits, n, q, args):
    pages = batch * context // args.page_size
    calls, caches = [], []
    page_table = torch.randperm(pages, device="cuda", dtype=torch.int64).to(torch.int32).view(batch, -1)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    step = min(pages * args.page_size, 65536)
    slots = torch.arange(step, device="cuda")
    for _ in range(n):
        cache = turboquant.PagedCache(pages, KV_HEADS, HEAD_SIZE, key_bits, value_bits, args.page_size)
        rows = torch.randn(step, KV_HEADS, HEAD_SIZE, device="cuda", dtype=torch.float16)
        for at in range(0, pages * args.page_size, step):
            cache.write(rows, rows, slots + at)
        out = torch.empty_like(q)
        caches.append(cache)
        calls.append(lambda cache=cache, out=out: cache.attend(q, page_table, lengths, out=out))
    return calls, caches, caches[0].pages.numel()


def sdpa(batch, context, backend, n, q, dtype=torch.float16):
    query = q.transpose(1, 2).contiguous()
    calls = []
    for _ in range(n):
        k = torch.randn(batch, KV_HEADS, context, HEAD_SIZE, device="cuda", dtype=dtype)
        v = torch.randn(batch, KV_HEADS, context, HEAD_SIZE, device="cuda", dtype=dtype)

        def call(k=k, v=v):
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(query, k, v, enable_gqa=True)

        calls.append(call)
    return calls, 2 * batch * context * KV_HEADS * HEAD_SIZE * 2


def flashinfer_calls(batch, context, dtype, n, q, page_size):
    import flashinfer

    pages = batch * context // page_size
    calls = []
    for _ in range(n):
        kv = torch.randn(pages, 2, page_size, KV_HEADS, HEAD_SIZE, device="cuda", dtype=torch.float16).to(dtype)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.empty(256 << 20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True)
        wrapper.plan(torch.arange(0, pages + 1, pages // batch, dtype=torch.int32, device="cuda"),
                     torch.randperm(pages, device="cuda").to(torch.int32),
                     torch.full((batch,), page_size, dtype=torch.int32, device="cuda"),
                     HEADS, KV_HEADS, HEAD_SIZE, page_size, q_data_type=torch.float16, kv_data_type=dtype)
        calls.append(lambda wrapper=wrapper, kv=kv: wrapper.run(q[:, 0], kv))
    return calls, 2 * batch * context * KV_HEADS * HEAD_SIZE * (1 if dtype != torch.float16 else 2)


def contestants(batch, context, args, l2, read):
    """(engine, kv, graph, bytes) of one shape; what cannot run is said and left out."""
    q = torch.randn(batch, 1, HEADS, HEAD_SIZE, device="cuda", dtype=torch.float16)
    keep = []
    for kv in args.kv:
        key_bits, value_bits = map(int, kv.split("/"))
        bytes_ = batch * context * KV_HEADS * (HEAD_SIZE * (key_bits + value_bits) / 8 + 4)
        calls, caches, size = ours(batch, context, key_bits, value_bits, copies(bytes_, l2), q, args)
        keep.append(caches)
        yield "turboquant", kv, Graph(calls), size
        yield "read", kv, Graph([lambda cache=cache: read(cache.pages) for cache in caches]), size
    if not args.no_peers:
        size = 2 * batch * context * KV_HEADS * HEAD_SIZE * 2
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            try:
                calls, size = sdpa(batch, context, backend, copies(size, l2), q)
                yield f"sdpa {backend.name.split('_')[0].lower()}", "f16", Graph(calls), size
            except Exception as error:
                print(f"{batch}x{context} sdpa {backend.name}: left out: {str(error).splitlines()[0]}", file=sys.stderr)
        for name, dtype in (("f16", torch.float16), ("fp8", torch.float8_e4m3fn)):
            try:
                calls, size = flashinfer_calls(batch, context, dtype, copies(size, l2), q, args.page_size)
                yield "flashinfer", name, Graph(calls), size
            except ImportError:
                break
            except Exception as error:
                print(f"{batch}x{context} flashinfer {name}: left out: {str(error).splitlines()[0]}", file=sys.stderr)


def encode_rates(args, l2):
    """Quantise on write: one token a sequence, and prompts, beside a copy that moves as many bytes."""
    rows = []
    for tokens, name in ((1, "1 token"), (32, "32 sequences, 1 token"), (4096, "4096 tokens"), (65536, "65536 tokens")):
        read = 2 * tokens * KV_HEADS * HEAD_SIZE * 2
        n = max(1, min(32, math.ceil(4 * l2 / read)))
        calls, copies_ = [], []
        for _ in range(n):
            pages = max(tokens * (64 // args.page_size if tokens == 32 else 1), args.page_size) // args.page_size + 32
            cache = turboquant.PagedCache(pages, KV_HEADS, HEAD_SIZE, 4, 4, args.page_size)
            k, v = torch.randn(2, tokens, KV_HEADS, HEAD_SIZE, device="cuda", dtype=torch.float16)
            slots = torch.arange(tokens, device="cuda") * (args.page_size if tokens == 32 else 1)
            calls.append(lambda cache=cache, k=k, v=v, slots=slots: cache.write(k, v, slots))
            written = int(tokens * cache.bytes_per_token)
            source = torch.empty((read + written) // 2, dtype=torch.uint8, device="cuda").random_()
            target = torch.empty_like(source)
            copies_.append(lambda source=source, target=target: target.copy_(source))
        ours, copy = Graph(calls), Graph(copies_)
        times = [(ours.time(), copy.time()) for _ in range(args.repeats)]
        us, copy_us = (statistics.median(t) for t in zip(*times))
        rows.append({"engine": "encode", "kv": "4/4", "tokens": tokens, "us": round(us, 2),
                     "gb_per_s": round((read + written) / us / 1e3, 1), "copy_us": round(copy_us, 2)})
        print(f"encode 4/4, {name:>22}: {us:8.2f} us, {rows[-1]['gb_per_s']:7.1f} GB/s read and written; a copy of as many "
              f"bytes {copy_us:8.2f} us", flush=True)
    return rows


def check(args):
    """The outputs that are timed are attention over the decoded rows."""
    for kv in args.kv:
        key_bits, value_bits = map(int, kv.split("/"))
        context = 2048
        q = torch.randn(2, 1, HEADS, HEAD_SIZE, device="cuda", dtype=torch.float16)
        cache = turboquant.PagedCache(2 * context // args.page_size, KV_HEADS, HEAD_SIZE, key_bits, value_bits,
                                      args.page_size)
        rows = torch.randn(2, 2 * context, KV_HEADS, HEAD_SIZE, device="cuda", dtype=torch.float16)
        slots = torch.arange(2 * context, device="cuda")
        cache.write(rows[0], rows[1], slots)
        table = torch.arange(2 * context // args.page_size, device="cuda", dtype=torch.int32).view(2, -1)
        lengths = torch.full((2,), context, device="cuda", dtype=torch.int32)
        got = cache.attend(q, table, lengths).double()
        k, v = (x.view(2, context, KV_HEADS, HEAD_SIZE).transpose(1, 2).double() for x in cache.read(slots))
        want = F.scaled_dot_product_attention(q.double().transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2)
        error = ((got - want).norm() / want.norm()).item()
        print(f"check {kv}: relative error {error:.2e} against fp64 over the decoded rows")
        if not error < 1e-3:
            sys.exit(f"{kv}: wrong results are not timed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="batch x context")
    parser.add_argument("--kv", nargs="*", default=["4/4", "4/2", "3/3", "8/4"])
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", help="folder to write <GPU model>.json to")
    args = parser.parse_args()
    properties = torch.cuda.get_device_properties(0)
    l2 = properties.L2_cache_size
    print(f"{properties.name}, {properties.multi_processor_count} SMs, L2 {l2 >> 20} MB, torch {torch.__version__}, "
          f"CUDA {torch.version.cuda}; head size {HEAD_SIZE}, {HEADS}/{KV_HEADS} heads, page {args.page_size}, q_len 1")
    check(args)
    read = reader()
    results = encode_rates(args, l2)
    for shape in args.shapes:
        batch, context = map(int, shape.split("x"))
        torch.cuda.empty_cache()
        entries = list(contestants(batch, context, args, l2, read))
        times = [[] for _ in entries]
        for _ in range(args.repeats):
            for (_, _, graph, _), samples in zip(entries, times):
                samples.append(graph.time())
        floor = {kv: statistics.median(t) for (engine, kv, _, _), t in zip(entries, times) if engine == "read"}
        best16 = min((statistics.median(t) for (engine, kv, _, _), t in zip(entries, times)
                      if kv == "f16" and engine != "read"), default=None)
        for (engine, kv, _, size), samples in zip(entries, times):
            us = statistics.median(samples)
            spread = (max(samples) - min(samples)) / us
            row = {"engine": engine, "kv": kv, "batch": batch, "context": context, "us": round(us, 2),
                   "spread": round(spread, 3), "kv_bytes": size, "gb_per_s": round(size / us / 1e3, 1)}
            if kv in floor and engine != "read":
                row["over_read"] = round(us / floor[kv], 2)
            if best16 and engine != "read":
                row["times_best_f16"] = round(best16 / us, 2)
            results.append(row)
            print(f"{shape:>9} {engine:>12} {kv:>4} {us:9.2f} us  {row['gb_per_s']:7.1f} GB/s  spread {spread:5.1%}  "
                  f"{'x read ' + str(row['over_read']) if 'over_read' in row else '':>12}  "
                  f"{'x f16 ' + str(row['times_best_f16']) if 'times_best_f16' in row else ''}", flush=True)
        del entries
    if args.json:
        driver = torch.cuda.driver_version() if hasattr(torch.cuda, "driver_version") else None
        try:
            import pynvml
            pynvml.nvmlInit()
            driver = pynvml.nvmlSystemGetDriverVersion()
        except Exception:
            pass
        model = properties.name.replace("NVIDIA ", "").split()[0]
        path = pathlib.Path(args.json) / f"{model}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({
            "gpu": properties.name, "date": datetime.date.today().isoformat(), "driver": driver,
            "torch": torch.__version__, "cuda": torch.version.cuda,
            "flashinfer": getattr(sys.modules.get("flashinfer"), "__version__", None), "head_size": HEAD_SIZE, "heads": HEADS,
            "kv_heads": KV_HEADS, "page_size": args.page_size, "repeats": args.repeats,
            "method": "CUDA graph over rotated caches, median", "results": results}, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
