#!/usr/bin/env python3
"""Decode attention of the PyTorch package on a CPU, beside torch's own over uncompressed rows.

One run measures everything, interleaved; medians, and the best for a machine that is not quiet. torch is asked twice: with
enable_gqa, and with the heads of a group as queries of their KV head, which is the same and reads a row once. Two caches of each take turns, so that a short context is not served
from the cache of the processor for one side alone.

    bench/cpu_torch_attention.py --threads 1,2 --contexts 4096,32768 [--json FILE]
"""

import argparse
import json
import pathlib
import platform
import statistics
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "python"))
import turboquant  # noqa: E402

PAGE = 64


def numbers(text):
    return [int(x) for x in text.split(",")]


def ours(args, context, bits):
    calls = []
    for _ in range(2):
        pages = -(-context // PAGE)
        cache = turboquant.PagedCache(pages, args.kv_heads, args.head_size, *bits, PAGE, device="cpu")
        table = torch.randperm(pages).to(torch.int32)[None]
        lengths = torch.zeros(1, dtype=torch.int32)
        for at in range(0, context, 4096):
            rows = torch.randn(2, 1, min(4096, context - at), args.kv_heads, args.head_size)
            cache.append(rows[0], rows[1], table, lengths)
        q = torch.randn(1, 1, args.heads, args.head_size)
        calls.append(lambda cache=cache, table=table, lengths=lengths, q=q: cache.attend(q, table, lengths))
    return calls, int(cache.bytes_per_token * context)


def torchs(args, context, dtype, grouped):
    calls = []
    for _ in range(2):
        k, v = (torch.randn(1, args.kv_heads, context, args.head_size, dtype=dtype) for _ in range(2))
        q = torch.randn(1, args.heads, 1, args.head_size, dtype=dtype)
        if grouped:
            q = q.view(1, args.kv_heads, -1, args.head_size)
        calls.append(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, enable_gqa=not grouped))
    return calls, 2 * k.numel() * k.element_size()


def measure(sets, rounds):
    """Microseconds a call, the median and the best of each; all take turns."""
    times = {name: [] for name in sets}
    for r in range(-1, rounds):
        for name, (calls, _) in sets.items():
            begin = time.perf_counter()
            calls[r % 2]()
            if r >= 0:
                times[name].append((time.perf_counter() - begin) * 1e6)
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=numbers, default=[4096, 32768])
    parser.add_argument("--threads", type=numbers, default=[1, torch.get_num_threads()])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows to this file as well")
    args = parser.parse_args()
    rows = []
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {args.heads}/{args.kv_heads} heads of "
          f"{args.head_size}, one query")
    print(f"{'engine':16} {'kv':6} {'threads':>7} {'context':>8} {'us':>9} {'best':>9} {'ns a (head, token)':>19} {'MiB':>7}")
    for context in args.contexts:
        sets = {("turboquant", f"{k}/{v}"): ours(args, context, (k, v)) for k, v in ((4, 4), (3, 3), (8, 4))}
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            sets[("torch sdpa", name)] = torchs(args, context, dtype, False)
            sets[("sdpa, grouped", name)] = torchs(args, context, dtype, True)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for (engine, kv), (us, best) in measure(sets, args.rounds).items():
                size = sets[(engine, kv)][1]
                print(f"{engine:16} {kv:6} {threads:7} {context:8} {us:9.0f} {best:9.0f} {us * 1e3 / args.heads / context:19.2f} "
                      f"{size / 2**20:7.1f}", flush=True)
                rows.append(dict(engine=engine, kv=kv, threads=threads, context=context, us=us, best_us=best,
                                 kv_bytes=size))
    if args.json:
        args.json.write_text(json.dumps(dict(torch=torch.__version__, rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
