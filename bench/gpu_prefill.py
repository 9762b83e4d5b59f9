#!/usr/bin/env python3
"""Prefill attention on a GPU: our flash kernel over codes beside torch's attention over rows decoded from them, and
beside torch's attention over fp16 rows that were never compressed.

One run measures everything, interleaved; medians over replays of CUDA graphs of several calls. TFLOP/s count the visible
(query, token) pairs only, 4 * head size operations each.

    TURBOQUANT_CUDA_LIBRARY=build/release/lib/libturboquant_cuda.so bench/gpu_prefill.py --json bench/results
"""

import argparse
import datetime
import json
import pathlib
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from gpu_attention import HEAD_SIZE, HEADS, KV_HEADS, Graph

import turboquant

SHAPES = ["1x512x8192", "1x4096x4096", "1x512x32768", "1x2048x32768", "4x1024x4096", "1x128x8192"]


def mask_of(queries, context, backend):
    """What says "causal" to a backend: fp16 attention of the last `queries` tokens."""
    if queries == context:
        return {"is_causal": True}
    if backend == SDPBackend.FLASH_ATTENTION:
        return {"attn_mask": causal_lower_right(queries, context)}
    return {"attn_mask": torch.arange(context, device="cuda") <=
            torch.arange(context - queries, context, device="cuda")[:, None]}


def contestants(batch, queries, context, args):
    pages = batch * context // args.page_size
    rows = torch.randn(2, batch * context, KV_HEADS, HEAD_SIZE, device="cuda", dtype=torch.float16)
    slots = torch.arange(batch * context, device="cuda")
    q = torch.randn(batch, queries, HEADS, HEAD_SIZE, device="cuda", dtype=torch.float16)
    q_heads = q.transpose(1, 2).contiguous()
    table = torch.arange(pages, device="cuda", dtype=torch.int32).view(batch, -1)
    lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    calls = max(1, args.operations // (batch * queries * context))
    heads = (batch, context, KV_HEADS, HEAD_SIZE)
    for kv in args.kv:
        key_bits, value_bits = map(int, kv.split("/"))
        cache = turboquant.PagedCache(pages, KV_HEADS, HEAD_SIZE, key_bits, value_bits, args.page_size)
        cache.write(rows[0], rows[1], slots)
        out = torch.empty_like(q)
        yield "turboquant", kv, Graph([lambda cache=cache, out=out: cache.prefill(q, table, lengths, out=out)] * calls)
        check(cache, q, out, slots, batch, context)
        if kv != args.kv[0]:
            continue
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            name = backend.name.split("_")[0].lower()
            mask = mask_of(queries, context, backend)

            def decoded(cache=cache, mask=mask, backend=backend):
                k, v = (x.view(heads).transpose(1, 2) for x in cache.read(slots, torch.float16))
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q_heads, k, v, enable_gqa=True, **mask)

            plain_k, plain_v = (x.view(heads).transpose(1, 2).contiguous() for x in rows)

            def plain(mask=mask, backend=backend, plain_k=plain_k, plain_v=plain_v):
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q_heads, plain_k, plain_v, enable_gqa=True, **mask)

            for engine, call in (("decoded rows, " + name, decoded), ("f16 rows, " + name, plain)):
                try:
                    yield engine, kv if call is decoded else "f16", Graph([call] * calls)
                except Exception as error:
                    print(f"{engine}: left out: {str(error).splitlines()[0]}", file=sys.stderr)


def check(cache, q, out, slots, batch, context):
    """The output that is timed is attention over the decoded rows: the last sequence's last KV head."""
    k, v = (x.view(batch, context, KV_HEADS, HEAD_SIZE)[-1, :, -1].double() for x in cache.read(slots))
    group = HEADS // KV_HEADS
    queries = q.shape[1]
    mask = torch.arange(context, device="cuda") <= torch.arange(context - queries, context, device="cuda")[:, None]
    worst = 0
    for head in range(HEADS - group, HEADS):
        scores = (q[-1, :, head].double() @ k.T / HEAD_SIZE ** .5).masked_fill(~mask, -torch.inf)
        want = scores.softmax(-1) @ v
        worst = max(worst, ((out[-1, :, head].double() - want).norm() / want.norm()).item())
    print(f"check {cache.key_bits}/{cache.value_bits}, {batch}x{queries}x{context}: relative error {worst:.2e} against fp64")
    if not worst < 1e-3:
        sys.exit("wrong results are not timed")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="batch x queries x context")
    parser.add_argument("--kv", nargs="*", default=["4/4", "3/3"])
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--operations", type=int, default=1 << 26, help="(query, token) pairs in a graph")
    parser.add_argument("--json", help="folder to write <GPU model>-prefill.json to")
    args = parser.parse_args()
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}; head size {HEAD_SIZE}, "
          f"{HEADS}/{KV_HEADS} heads, page {args.page_size}, causal")
    results = []
    for shape in args.shapes:
        batch, queries, context = map(int, shape.split("x"))
        torch.cuda.empty_cache()
        entries = list(contestants(batch, queries, context, args))
        times = [[] for _ in entries]
        for _ in range(args.repeats):
            for (_, _, graph), samples in zip(entries, times):
                samples.append(graph.time())
        pairs = batch * (queries * context - queries * (queries - 1) // 2)
        for (engine, kv, _), samples in zip(entries, times):
            us = statistics.median(samples)
            rate = pairs * HEADS * HEAD_SIZE * 4 / us / 1e6
            results.append({"engine": engine, "kv": kv, "batch": batch, "queries": queries, "context": context,
                            "us": round(us, 1), "spread": round((max(samples) - min(samples)) / us, 3),
                            "tflop_per_s": round(rate, 1)})
            print(f"{shape:>13} {engine:>24} {kv:>4} {us:9.1f} us  {rate:6.1f} TFLOP/s  spread "
                  f"{results[-1]['spread']:5.1%}", flush=True)
        del entries
    if args.json:
        model = properties.name.replace("NVIDIA ", "").split()[0]
        path = pathlib.Path(args.json) / f"{model}-prefill.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({
            "gpu": properties.name, "date": datetime.date.today().isoformat(), "torch": torch.__version__,
            "cuda": torch.version.cuda, "head_size": HEAD_SIZE, "heads": HEADS, "kv_heads": KV_HEADS,
            "page_size": args.page_size, "repeats": args.repeats, "causal": True,
            "method": "CUDA graphs, interleaved, median", "results": results}, indent=1) + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
