"""TurboQuantCache in Hugging Face transformers: generation on tiny models of random weights, on a CPU and on a GPU."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from cache_testing import relative  # noqa: E402
from turboquant.huggingface import TurboQuantCache  # noqa: E402

NEW_TOKENS = 16


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small are slower on several, and many times so beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(kind, implementation, device="cpu", dtype=torch.float32, head_dim=64, **options):
    shape = dict(vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
                 num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=512, **options)
    config = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config,
              "gemma2": transformers.Gemma2Config}[kind](**shape)
    torch.manual_seed(7)  # the same weights for all
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.to(dtype).to(device).eval()


def prompt(device="cpu"):
    torch.manual_seed(3)
    ids = torch.randint(5, 500, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, :13] = 0  # left padding
    return ids.to(device), mask.to(device)


def generate(model, ids, mask, cache=None, n=NEW_TOKENS):
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=n, min_new_tokens=n,
                          do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)


@torch.no_grad()
def forced(model, ids, mask, cache, answer):
    """The logits [batch, tokens, words] of a model that is made to say `answer`, by prompt and single steps."""
    n, tokens = ids.shape[1], answer.to(ids.device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    steps = [model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits[:, -1]]
    for t in range(n, tokens.shape[1] - 1):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = position[:, -1:] + 1
        steps.append(model(tokens[:, t:t + 1], attention_mask=mask, position_ids=position,
                           past_key_values=cache).logits[:, -1])
    return torch.stack(steps, 1).double().cpu()


def assert_says_the_same(model, ids, mask, new_cache, want, bound):
    """Greedy generation gives want's tokens, up to a near tie: random weights have no strong opinions, and where want's
    best two words are as close as the logits are, either may win and what follows is another text. So the rest is judged
    with want's words put into the model's mouth: logits within `bound` (relative) at every step, and its best word want's
    unless there is a tie; there are few of those."""
    theirs = torch.stack(want.logits, 1).double().cpu()
    answer = want.sequences.cpu()
    mine = forced(model, ids, mask, new_cache(), answer)
    agreed = mine.argmax(2) == theirs.argmax(2)
    for b in range(mine.shape[0]):
        for t in range(mine.shape[1]):
            assert relative(mine[b, t], theirs[b, t]) < bound, (b, t)
            if not agreed[b, t]:
                best = theirs[b, t].topk(2).values
                assert best[0] - best[1] <= 2 * (mine[b, t] - theirs[b, t]).abs().max(), (b, t)
    assert agreed.double().mean() > .8
    said = generate(model, ids, mask, new_cache()).sequences.cpu()
    for b in range(mine.shape[0]):
        until = ids.shape[1] + int(agreed[b].long().cumprod(0).sum())
        assert torch.equal(said[b, :until], answer[b, :until])


@pytest.mark.parametrize("kind,head_dim", [("llama", 64), ("qwen3", 64), ("qwen3", 128)])
def test_generation_over_codes_is_generation_over_decoded_rows(device, kind, head_dim):
    ids, mask = prompt(device)
    plain, model = (tiny_model(kind, how, device, head_dim=head_dim) for how in ("sdpa", "turboquant"))
    cache = TurboQuantCache(plain.config, 2, 128, attention_mask=mask)
    want = generate(plain, ids, mask, cache)
    assert cache.get_seq_length() == 40 + NEW_TOKENS - 1
    assert cache.kv_bytes == 3 * 2 * 2 * 64 * 2 * (head_dim + 4)
    # Where a number lies at a threshold, later layers store another code.
    assert_says_the_same(model, ids, mask, lambda: TurboQuantCache(model.config, 2, 128, attention_mask=mask), want, 2e-2)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_padded_sequence_says_what_it_says_alone(device, kind):
    ids, mask = prompt(device)
    model = tiny_model(kind, "turboquant", device)
    together = generate(model, ids, mask, TurboQuantCache(model.config, 2, 128, attention_mask=mask))
    for b, begin in ((0, 0), (1, 13)):
        together_b = type(together)(sequences=together.sequences[b:b + 1, begin:],
                                    logits=[x[b:b + 1] for x in together.logits])
        assert_says_the_same(model, ids[b:b + 1, begin:], mask[b:b + 1, begin:],
                             lambda: TurboQuantCache(model.config, 1, 128), together_b, 2e-2)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_eight_bits_generate_what_no_compression_generates(device, kind):
    ids, mask = prompt(device)
    model, plain = tiny_model(kind, "turboquant", device), tiny_model(kind, "sdpa", device)
    want = generate(plain, ids, mask, transformers.DynamicCache(config=plain.config))
    assert_says_the_same(model, ids, mask, lambda: TurboQuantCache(model.config, 2, 128, 8, 8, attention_mask=mask), want,
                         2e-2)
    # Fewer bits are further away: the bound says something.
    few = forced(model, ids, mask, TurboQuantCache(model.config, 2, 128, 4, 4, attention_mask=mask), want.sequences)
    assert relative(few, torch.stack(want.logits, 1).cpu()) > 4e-2


@pytest.mark.parametrize("dtype,bound", [(torch.float16, 1.5e-2), (torch.bfloat16, 6e-2)])
def test_half_precision_models(device, dtype, bound):
    ids, mask = prompt(device)
    model, exact = tiny_model("llama", "turboquant", device, dtype), tiny_model("llama", "turboquant", device)
    caches = [TurboQuantCache(m.config, 2, 128, 8, 8, attention_mask=mask) for m in (model, exact)]
    got, want = (generate(m, ids, mask, c, n=1) for m, c in zip((model, exact), caches))
    assert got.logits[0].dtype in (dtype, torch.float32)
    assert relative(got.logits[0].cpu(), want.logits[0].cpu()) < bound


def test_a_prompt_in_parts(device):
    model = tiny_model("llama", "turboquant", device)
    ids, _ = prompt(device)
    whole, parts = (TurboQuantCache(model.config, 2, 64) for _ in range(2))
    with torch.no_grad():
        want = model(ids, past_key_values=whole).logits[:, -1]
        model(ids[:, :7], past_key_values=parts)
        model(ids[:, 7:30], past_key_values=parts)
        got = model(ids[:, 30:], past_key_values=parts).logits[:, -1]
    assert relative(got.cpu(), want.cpu()) < 5e-3


def test_soft_caps_and_sliding_windows():
    """Gemma 2 has both, in every other layer, and prompts longer than its window: on a CPU."""
    options = dict(sliding_window=16, attn_logit_softcapping=.5, query_pre_attn_scalar=1, initializer_range=.05)
    ids, mask = prompt()
    models = [tiny_model("gemma2", how, **options) for how in ("eager", "turboquant")]
    new_cache = lambda: TurboQuantCache(models[0].config, 2, 128, 8, 8, attention_mask=mask)  # noqa: E731
    want = generate(models[0], ids, mask, new_cache())
    fused_cache = lambda: TurboQuantCache(models[1].config, 2, 128, 8, 8, attention_mask=mask)  # noqa: E731
    assert_says_the_same(models[1], ids, mask, fused_cache, want, 1e-2)
    for change in (dict(attn_logit_softcapping=1e4), dict(sliding_window=400)):  # either is felt
        other = tiny_model("gemma2", "turboquant", **{**options, **change})
        cache = TurboQuantCache(other.config, 2, 128, 8, 8, attention_mask=mask)
        assert relative(forced(other, ids, mask, cache, want.sequences), torch.stack(want.logits, 1)) > 3e-2


def test_what_is_not_served_is_said(device):
    model = tiny_model("llama", "turboquant", device)
    ids, _ = prompt(device)
    ids = ids[:1, :20]
    with pytest.raises(ValueError, match="past_key_values=TurboQuantCache"):
        model(ids)
    with pytest.raises(ValueError, match="raise max_tokens"):
        model(ids, past_key_values=TurboQuantCache(model.config, 1, 10))
    with pytest.raises(ValueError, match="batch 1, but the cache was made for 2"):
        model(ids, past_key_values=TurboQuantCache(model.config, 2, 40))
    with pytest.raises(ValueError, match="only padding on the left"):
        TurboQuantCache(model.config, 1, 10, attention_mask=torch.tensor([[1, 1, 0]]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind,head_dim", [("llama", 64), ("qwen3", 64), ("qwen3", 128)])
@pytest.mark.parametrize("bits", [(4, 4), (8, 4)], ids=str)
def test_a_gpu_generates_what_a_cpu_generates(kind, head_dim, bits):
    ids, mask = prompt("cpu")
    cpu, gpu = (tiny_model(kind, "turboquant", device, head_dim=head_dim) for device in ("cpu", "cuda"))
    want = generate(cpu, ids, mask, TurboQuantCache(cpu.config, 2, 128, *bits, attention_mask=mask))
    assert_says_the_same(gpu, ids.cuda(), mask.cuda(),
                         lambda: TurboQuantCache(gpu.config, 2, 128, *bits, attention_mask=mask), want, 2e-2)
