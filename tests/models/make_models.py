#!/usr/bin/env python3
"""Writes tiny GGUF models with random F32 weights, one for each kind of KV cache that llama.cpp builds.

    make_models.py OUT_DIR [NAME ...]      writes NAME.gguf (default: all); a file that is up to date is left alone
    make_models.py --list                  names, one a line
    make_models.py --dequantize IN OUT     the model IN with every tensor as F32

They are for comparing one cache with another, teacher-forced by token id, so the vocabulary is llama.cpp's built-in
"test" tokenizer and the weights mean nothing. Same bytes on every run: each tensor is drawn from a generator seeded by
the model's and the tensor's name. Weights have variance 1/inputs, keys and queries twice that, so that attention is
neither uniform nor a single token. Needs numpy and gguf.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Callable, Sequence

import gguf
import numpy as np

VOCABULARY = 256
SLIDING_WINDOW = 32


class Model:
    """A GGUF file in the making. Shapes are given as ggml has them: (inputs, outputs)."""

    def __init__(self, path: Path, name: str, architecture: str, layers: int, embedding: int, feed_forward: int):
        self.name = name
        self.arch = architecture
        self.layers = layers
        self.embedding = embedding
        self.feed_forward = feed_forward
        self.writer = gguf.GGUFWriter(str(path), architecture)
        self.writer.add_name(f"turboquant test model {name}")
        self.number("context_length", 16384)
        self.number("embedding_length", embedding)
        self.number("block_count", layers)
        self.writer.add_string("tokenizer.ggml.model", "test")
        self.writer.add_array("tokenizer.ggml.tokens", [f"tok_{i}" for i in range(VOCABULARY)])
        self.writer.add_array("tokenizer.ggml.scores", [0.0] * VOCABULARY)

    # Metadata ------------------------------------------------------------------------------------------------------

    def number(self, key: str, value: int | Sequence[int]) -> None:
        key = f"{self.arch}.{key}"
        if isinstance(value, int):
            self.writer.add_uint32(key, value)
        else:
            self.writer.add_array(key, [int(v) for v in value])

    def real(self, key: str, value: float) -> None:
        self.writer.add_float32(f"{self.arch}.{key}", value)

    def flags(self, key: str, value: Sequence[bool]) -> None:
        self.writer.add_array(f"{self.arch}.{key}", [bool(v) for v in value])

    def heads(self, query: int | Sequence[int], kv: int | Sequence[int], key_size: int, value_size: int = 0,
              rotary: int = 0) -> None:
        self.number("attention.head_count", query)
        self.number("attention.head_count_kv", kv)
        self.number("attention.key_length", key_size)
        self.number("attention.value_length", value_size or key_size)
        self.number("rope.dimension_count", rotary or key_size)

    # Tensors -------------------------------------------------------------------------------------------------------

    def _random(self, tensor: str, shape: Sequence[int]) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(f"{self.name}/{tensor}".encode()).digest()[:8], "little")
        return np.random.default_rng(seed).standard_normal(tuple(reversed(shape)), dtype=np.float32)

    def put(self, tensor: str, values: np.ndarray) -> None:
        self.writer.add_tensor(tensor, np.ascontiguousarray(values, dtype=np.float32))

    def weight(self, tensor: str, *shape: int, gain: float = 1.0) -> None:
        self.put(f"{tensor}.weight", self._random(tensor, shape) * np.float32(gain / np.sqrt(shape[0])))

    def bias(self, tensor: str, *shape: int, spread: float = 0.1) -> None:
        self.put(f"{tensor}.bias", self._random(f"{tensor}.bias", shape) * np.float32(spread))

    def norm(self, tensor: str, size: int, with_bias: bool = False, level: float = 1.0) -> None:
        self.put(f"{tensor}.weight", np.float32(level) * (1 + self._random(tensor, (size,)) * np.float32(0.1)))
        if with_bias:
            self.bias(tensor, size)

    def ends(self, with_bias: bool = False, tied: bool = False) -> None:
        self.weight("token_embd", self.embedding, VOCABULARY, gain=float(np.sqrt(self.embedding)))
        self.norm("output_norm", self.embedding, with_bias)
        if not tied:
            self.weight("output", self.embedding, VOCABULARY)

    def attention(self, block: str, query: int, kv: int, key_size: int, value_size: int = 0, gain: float = 1.4) -> None:
        value_size = value_size or key_size
        self.norm(f"{block}.attn_norm", self.embedding)
        self.weight(f"{block}.attn_q", self.embedding, query * key_size, gain=gain)
        self.weight(f"{block}.attn_k", self.embedding, kv * key_size, gain=gain)
        self.weight(f"{block}.attn_v", self.embedding, kv * value_size)
        self.weight(f"{block}.attn_output", query * value_size, self.embedding)

    def gated_ffn(self, block: str) -> None:
        self.norm(f"{block}.ffn_norm", self.embedding)
        self.weight(f"{block}.ffn_gate", self.embedding, self.feed_forward)
        self.weight(f"{block}.ffn_up", self.embedding, self.feed_forward)
        self.weight(f"{block}.ffn_down", self.feed_forward, self.embedding)

    def blocks(self) -> list[str]:
        return [f"blk.{i}" for i in range(self.layers)]

    def finish(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


Recipe = Callable[[Path, str], Model]


def llama(head_size: int, query: int, kv: int, layers: int = 2, embedding: int = 128) -> Recipe:
    def make(path: Path, name: str) -> Model:
        m = Model(path, name, "llama", layers, embedding, 128)
        m.number("feed_forward_length", 128)
        m.heads(query, kv, head_size)
        m.real("attention.layer_norm_rms_epsilon", 1e-5)
        m.ends()
        for b in m.blocks():
            m.attention(b, query, kv, head_size)
            m.gated_ffn(b)
        return m

    return make


def gemma2(path: Path, name: str) -> Model:
    """Soft-capped scores; every other layer slides."""
    m = Model(path, name, "gemma2", 4, 128, 128)
    m.number("feed_forward_length", 128)
    m.heads(4, 2, 64)
    m.number("attention.sliding_window", SLIDING_WINDOW)
    m.real("attention.layer_norm_rms_epsilon", 1e-5)
    m.real("attn_logit_softcapping", 3.0)
    m.real("final_logit_softcapping", 30.0)
    m.ends(tied=True)
    for b in m.blocks():
        m.attention(b, 4, 2, 64)
        m.norm(f"{b}.post_attention_norm", 128)
        m.gated_ffn(b)
        m.norm(f"{b}.post_ffw_norm", 128)
    return m


def gemma3(path: Path, name: str) -> Model:
    """Head size 256, one KV head, normalised queries and keys, two sliding layers to each global one."""
    m = Model(path, name, "gemma3", 6, 64, 64)
    m.number("feed_forward_length", 64)
    m.heads(4, 1, 256)
    m.number("attention.sliding_window", SLIDING_WINDOW)
    m.number("attention.sliding_window_pattern", 3)
    m.real("attention.layer_norm_rms_epsilon", 1e-5)
    m.real("rope.freq_base", 1000000.0)
    m.ends()
    for b in m.blocks():
        m.attention(b, 4, 1, 256)
        m.norm(f"{b}.attn_q_norm", 256, level=1.3)
        m.norm(f"{b}.attn_k_norm", 256, level=1.3)
        m.norm(f"{b}.post_attention_norm", 64)
        m.gated_ffn(b)
        m.norm(f"{b}.post_ffw_norm", 64)
    return m


def gemma4(path: Path, name: str) -> Model:
    """Mixed head sizes: 128 in the global layers, 64 in the sliding ones; KV heads differ too; the last two layers read
    the KV cache of earlier ones."""
    sliding = [True, True, False, True, False]
    kv = [2, 2, 1, 2, 1]
    m = Model(path, name, "gemma4", 5, 128, 128)
    m.number("feed_forward_length", 128)
    m.heads(4, kv, 128)
    m.number("attention.key_length_swa", 64)
    m.number("attention.value_length_swa", 64)
    m.number("rope.dimension_count_swa", 64)
    m.number("attention.sliding_window", SLIDING_WINDOW)
    m.flags("attention.sliding_window_pattern", sliding)
    m.number("attention.shared_kv_layers", 2)
    m.number("embedding_length_per_layer_input", 0)
    m.real("attention.layer_norm_rms_epsilon", 1e-5)
    m.real("rope.freq_base", 1000000.0)
    m.real("rope.freq_base_swa", 10000.0)
    m.ends()
    m.put("rope_freqs.weight", np.ones(64, dtype=np.float32))
    for i, b in enumerate(m.blocks()):
        size = 64 if sliding[i] else 128
        m.attention(b, 4, kv[i], size)
        # No 1/sqrt(d) here: the norms alone set the spread of the scores.
        m.norm(f"{b}.attn_q_norm", size, level=size**-0.25)
        m.norm(f"{b}.attn_k_norm", size, level=1.4 * size**-0.25)
        m.norm(f"{b}.post_attention_norm", 128)
        m.gated_ffn(b)
        m.norm(f"{b}.post_ffw_norm", 128)
    return m


def qwen3(path: Path, name: str) -> Model:
    m = Model(path, name, "qwen3", 2, 128, 128)
    m.number("feed_forward_length", 128)
    m.heads(4, 2, 128)
    m.real("attention.layer_norm_rms_epsilon", 1e-6)
    m.ends()
    for b in m.blocks():
        m.attention(b, 4, 2, 128)
        m.norm(f"{b}.attn_q_norm", 128, level=1.4)
        m.norm(f"{b}.attn_k_norm", 128, level=1.4)
        m.gated_ffn(b)
    return m


def qwen2(path: Path, name: str) -> Model:
    """Biased keys: a few channels carry an offset far above the rest, as in Qwen2.5."""
    m = Model(path, name, "qwen2", 2, 256, 128)
    m.number("feed_forward_length", 128)
    m.heads(4, 2, 64)
    m.real("attention.layer_norm_rms_epsilon", 1e-6)
    m.real("rope.freq_base", 1000000.0)
    m.ends()
    for b in m.blocks():
        m.attention(b, 4, 2, 64)
        for part, size in (("q", 256), ("k", 128), ("v", 128)):
            m.bias(f"{b}.attn_{part}", size) if part != "k" else None
        bias = m._random(f"{b}.attn_k.bias", (128,)) * np.float32(0.3)
        bias[5::32] += 8.0
        m.put(f"{b}.attn_k.bias", bias)
        m.gated_ffn(b)
    return m


def qwen2_biased(path: Path, name: str) -> Model:
    """As qwen2, but the keys' offsets (30 to 100, on pairs that RoPE hardly turns) dwarf what the tokens put into them.
    A constant offset changes no softmax, so the model answers as if it had none."""
    m = Model(path, name, "qwen2", 2, 256, 128)
    m.number("feed_forward_length", 128)
    m.heads(4, 2, 64)
    m.real("attention.layer_norm_rms_epsilon", 1e-6)
    m.real("rope.freq_base", 1000000.0)
    m.ends()
    offsets = {24: 60.0, 27: -100.0, 28: 30.0, 57: 45.0, 60: -80.0, 62: 35.0}  # pairs are (i, i + 32)
    for b in m.blocks():
        m.attention(b, 4, 2, 64)
        for part, size in (("q", 256), ("v", 128)):
            m.bias(f"{b}.attn_{part}", size)
        bias = m._random(f"{b}.attn_k.bias", (128,)) * np.float32(0.3)
        for channel, offset in offsets.items():
            bias[channel] += offset
            bias[64 + channel] -= offset
        m.put(f"{b}.attn_k.bias", bias)
        m.gated_ffn(b)
    return m


def state_space(m: Model, block: str, inner: int, state: int, rank: int) -> None:
    m.weight(f"{block}.ssm_in", m.embedding, 2 * inner)
    m.weight(f"{block}.ssm_conv1d", 4, inner)
    m.bias(f"{block}.ssm_conv1d", inner)
    m.weight(f"{block}.ssm_x", inner, rank + 2 * state)
    m.weight(f"{block}.ssm_dt", rank, inner)
    m.bias(f"{block}.ssm_dt", inner)
    # A decays: negative.
    m.put(f"{block}.ssm_a", -np.abs(m._random(f"{block}.ssm_a", (state, inner))) - np.float32(0.1))
    m.put(f"{block}.ssm_d", m._random(f"{block}.ssm_d", (inner,)))
    m.weight(f"{block}.ssm_out", inner, m.embedding)


def jamba(path: Path, name: str) -> Model:
    """Hybrid: attention (no RoPE) in layers 1 and 3, state space in 0 and 2."""
    m = Model(path, name, "jamba", 4, 128, 128)
    m.number("feed_forward_length", 128)
    m.number("attention.head_count", 2)
    m.number("attention.head_count_kv", [0, 1, 0, 2])
    m.number("ssm.conv_kernel", 4)
    m.number("ssm.inner_size", 256)
    m.number("ssm.state_size", 16)
    m.number("ssm.time_step_rank", 8)
    m.real("attention.layer_norm_rms_epsilon", 1e-6)
    m.ends()
    for i, b in enumerate(m.blocks()):
        if i % 2:
            m.attention(b, 2, [1, 2][i // 2], 64)
        else:
            m.norm(f"{b}.attn_norm", 128)
            state_space(m, b, 256, 16, 8)
            m.norm(f"{b}.ssm_dt_norm", 8)
            m.norm(f"{b}.ssm_b_norm", 16)
            m.norm(f"{b}.ssm_c_norm", 16)
        m.gated_ffn(b)
    return m


def mamba(path: Path, name: str) -> Model:
    """No KV cache at all."""
    m = Model(path, name, "mamba", 2, 128, 0)
    m.number("feed_forward_length", 0)
    m.number("attention.head_count", 0)
    m.number("ssm.conv_kernel", 4)
    m.number("ssm.inner_size", 256)
    m.number("ssm.state_size", 16)
    m.number("ssm.time_step_rank", 8)
    m.real("attention.layer_norm_rms_epsilon", 1e-6)
    m.ends()
    for b in m.blocks():
        m.norm(f"{b}.attn_norm", 128)
        state_space(m, b, 256, 16, 8)
    return m


def deepseek2(absorbed: bool) -> Recipe:
    """Multi-head latent attention. Absorbed: one KV head of 576, whose first 512 are the values. Otherwise the old
    form: each head has keys of 192 and values of 128."""

    def make(path: Path, name: str) -> Model:
        heads, nope, rope, value, rank, q_rank = 3, 128, 64, 128, 512 if absorbed else 64, 64
        m = Model(path, name, "deepseek2", 2, 64, 64)
        m.number("feed_forward_length", 64)
        m.number("leading_dense_block_count", 2)
        m.number("expert_feed_forward_length", 64)
        m.number("expert_shared_count", 0)
        m.number("attention.q_lora_rank", q_rank)
        m.number("attention.kv_lora_rank", rank)
        if absorbed:
            m.heads(heads, 1, rank + rope, rank, rotary=rope)
            m.number("attention.key_length_mla", nope + rope)
            m.number("attention.value_length_mla", value)
        else:
            m.heads(heads, heads, nope + rope, value, rotary=rope)
        m.real("attention.layer_norm_rms_epsilon", 1e-6)
        m.ends()
        for b in m.blocks():
            m.norm(f"{b}.attn_norm", 64)
            m.weight(f"{b}.attn_q_a", 64, q_rank)
            m.norm(f"{b}.attn_q_a_norm", q_rank)
            m.weight(f"{b}.attn_q_b", q_rank, heads * (nope + rope), gain=1.4)
            m.weight(f"{b}.attn_kv_a_mqa", 64, rank + rope, gain=1.4)
            m.norm(f"{b}.attn_kv_a_norm", rank)
            if absorbed:
                m.weight(f"{b}.attn_k_b", nope, rank, heads, gain=0.7)
                m.weight(f"{b}.attn_v_b", rank, value, heads)
            else:
                m.weight(f"{b}.attn_kv_b", rank, heads * (nope + value), gain=1.4)
            m.weight(f"{b}.attn_output", heads * value, 64)
            m.gated_ffn(b)
        return m

    return make


def bloom(path: Path, name: str) -> Model:
    """ALiBi with six heads (not a power of two) of 32; fused QKV; no GQA."""
    width = 192
    m = Model(path, name, "bloom", 2, width, 128)
    m.number("feed_forward_length", 128)
    m.number("attention.head_count", 6)
    m.real("attention.layer_norm_epsilon", 1e-5)
    m.ends(with_bias=True)
    m.norm("token_embd_norm", width, with_bias=True)
    for b in m.blocks():
        m.norm(f"{b}.attn_norm", width, with_bias=True)
        m.weight(f"{b}.attn_qkv", width, 3 * width, gain=1.4)
        m.bias(f"{b}.attn_qkv", 3 * width)
        m.weight(f"{b}.attn_output", width, width)
        m.bias(f"{b}.attn_output", width)
        m.norm(f"{b}.ffn_norm", width, with_bias=True)
        m.weight(f"{b}.ffn_up", width, 128)
        m.bias(f"{b}.ffn_up", 128)
        m.weight(f"{b}.ffn_down", 128, width)
        m.bias(f"{b}.ffn_down", width)
    return m


def gpt_oss(path: Path, name: str) -> Model:
    """Sink logits; every other layer slides; two experts, both always used (a router's choice would amplify noise)."""
    m = Model(path, name, "gpt-oss", 4, 128, 64)
    m.number("feed_forward_length", 64)
    m.number("expert_feed_forward_length", 64)
    m.number("expert_count", 2)
    m.number("expert_used_count", 2)
    m.heads(4, 2, 64)
    m.number("attention.sliding_window", SLIDING_WINDOW)
    m.real("attention.layer_norm_rms_epsilon", 1e-5)
    m.ends()
    for b in m.blocks():
        m.attention(b, 4, 2, 64)
        for part, size in (("q", 256), ("k", 128), ("v", 128), ("output", 128)):
            m.bias(f"{b}.attn_{part}", size)
        m.put(f"{b}.attn_sinks.weight", 2 * m._random(f"{b}.attn_sinks", (4,)))
        m.norm(f"{b}.post_attention_norm", 128)
        m.weight(f"{b}.ffn_gate_inp", 128, 2)
        m.bias(f"{b}.ffn_gate_inp", 2)
        for part, i, o in (("gate", 128, 64), ("up", 128, 64), ("down", 64, 128)):
            m.weight(f"{b}.ffn_{part}_exps", i, o, 2)
            m.bias(f"{b}.ffn_{part}_exps", o, 2)
    return m


def deci(path: Path, name: str) -> Model:
    """Head counts that differ by layer: 4/2, none at all, 4/1, 8/4."""
    query, kv = [4, 0, 4, 8], [2, 0, 1, 4]
    m = Model(path, name, "deci", 4, 128, 64)
    m.number("feed_forward_length", [64, 64, 64, 64])
    m.heads(query, kv, 64)
    m.real("attention.layer_norm_rms_epsilon", 1e-5)
    m.ends()
    for i, b in enumerate(m.blocks()):
        if query[i]:
            m.attention(b, query[i], kv[i], 64)
        m.gated_ffn(b)
    return m


RECIPES: dict[str, Recipe] = {
    "llama_64": llama(64, 6, 2),
    "llama_80": llama(80, 4, 2),
    "llama_96": llama(96, 4, 2),
    "llama_128": llama(128, 4, 1),
    "llama_group16": llama(64, 32, 2, embedding=64),
    # Much cache, few weights: 2 KiB a token and layer in f16.
    "llama_memory": llama(128, 4, 4, layers=2, embedding=64),
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "qwen2": qwen2,
    "qwen2_biased": qwen2_biased,
    "qwen3": qwen3,
    "jamba": jamba,
    "mamba": mamba,
    "deepseek2_mla": deepseek2(absorbed=True),
    "deepseek2_mha": deepseek2(absorbed=False),
    "bloom": bloom,
    "gpt_oss": gpt_oss,
    "deci": deci,
}


def dequantize(source: Path, target: Path) -> None:
    """Copies a model with all tensors as F32: the weights that the quantised model stands for, without its rounding of
    the activations (which would hide differences between caches)."""
    reader = gguf.GGUFReader(str(source))
    architecture = bytes(reader.get_field("general.architecture").parts[-1]).decode()
    part = target.with_suffix(f".{os.getpid()}.part")
    writer = gguf.GGUFWriter(str(part), architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, target)


def write_models(directory: Path, names: Sequence[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    stamp = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    for name in names:
        target, mark = directory / f"{name}.gguf", directory / f"{name}.stamp"
        if target.exists() and mark.exists() and mark.read_text() == stamp:
            continue
        with tempfile.NamedTemporaryFile(dir=directory, suffix=".part", delete=False) as file:
            part = Path(file.name)
        RECIPES[name](part, name).finish()
        os.replace(part, target)
        mark.write_text(stamp)
        print(f"{target}  {target.stat().st_size / 1e6:.1f} MB")


def main(arguments: list[str]) -> int:
    if arguments == ["--list"]:
        print("\n".join(RECIPES))
        return 0
    if len(arguments) == 3 and arguments[0] == "--dequantize":
        dequantize(Path(arguments[1]), Path(arguments[2]))
        return 0
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    unknown = [n for n in arguments[1:] if n not in RECIPES]
    if unknown:
        print(f"make_models.py: no model named {unknown[0]}; --list prints the names", file=sys.stderr)
        return 2
    write_models(Path(arguments[0]), arguments[1:] or list(RECIPES))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
