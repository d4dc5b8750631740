"""Serving: greedy decoding of a batch in which every request has its own LoRA adapter, three ways.

* pool: `AdapterPool` and `MultiLoRALinear`: one forward for the whole batch;
* PEFT mixed batch: one forward with `adapter_names`, in which PEFT loops over the adapters of every layer;
* one by one: PEFT's `set_adapter`, then that request alone.

The model is a Llama of random weights, so that nothing is downloaded. Each row of the first way is compared with the
third. Prints tokens per second and draws them over the number of adapters:

    python examples/serve_adapters.py                     # 1, 8, 64 and 256 adapters: some minutes on a CPU
    python examples/serve_adapters.py --adapters 1 8      # seconds
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from peft_kernels import AdapterPool, attach_pool

RANKS = (8, 16, 32)  # adapters take them in turn
SCALING = 2.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT_TOKENS = 8
BUDGET = 2 * 2**30  # bytes for adapters on the device; what does not fit waits in host memory

WAYS = ("pool", "PEFT mixed batch", "one by one")


class Decoded(NamedTuple):
    tokens: Tensor  # [requests, new tokens]
    logits: Tensor  # [requests, new tokens, vocabulary]


class Measured(NamedTuple):
    adapters: int
    tokens_per_second: dict[str, float]
    same_tokens: float  # part of the rows whose tokens are those of the adapter alone
    logit_error: float  # largest |difference| / largest |logit|, while the tokens agree


def new_model(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def with_adapters(model: LlamaForCausalLM, names: Sequence[str]) -> PeftModel:
    """The model in PEFT with one drawn adapter for each name: as if each had been trained."""
    peft_model: PeftModel | None = None
    for i, name in enumerate(tqdm(names, desc="drawing adapters", leave=False)):
        r = RANKS[i % len(RANKS)]
        config = LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=TARGETS, task_type="CAUSAL_LM")
        if peft_model is None:
            peft_model = get_peft_model(model, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    assert peft_model is not None
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return peft_model.eval()


def factors_by_adapter(peft_model: PeftModel) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """{adapter: {layer: (A, B)}}, the tensors themselves. Where adapters lie in folders, a pool loads those."""
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for path, module in peft_model.base_model.model.named_modules():
        for name in module.lora_A if isinstance(module, LoraLayer) else ():
            pair = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
            found.setdefault(name, {})[path] = pair
    return found


def decode(model: nn.Module, prompts: Tensor, new_tokens: int, **options) -> Decoded:
    found = model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return Decoded(found.sequences[:, prompts.shape[1] :], torch.stack(found.logits, 1))


def one_by_one(model: PeftModel, names: Sequence[str], prompts: Tensor, new_tokens: int) -> Decoded:
    rows = []
    for name, prompt in zip(tqdm(names, desc="one by one", leave=False), prompts, strict=True):
        model.set_adapter(name)
        rows.append(decode(model, prompt[None], new_tokens))
    return Decoded(*(torch.cat(parts) for parts in zip(*rows, strict=True)))


def agreement(ours: Decoded, alone: Decoded) -> tuple[float, float]:
    """(part of the rows with the same tokens, largest error of a logit up to the first token that differs)."""
    same = ours.tokens == alone.tokens
    before = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1].cumprod(1).bool()], 1)
    difference = (ours.logits - alone.logits).abs().amax(-1)[before]
    return float(same.all(1).float().mean()), float(difference.max() / alone.logits.abs().max())


def timed(call: Callable[[], Decoded], warm_up: Callable[[], Decoded], repeats: int) -> tuple[Decoded, float]:
    """The result and the seconds of the fastest call."""
    result, best = warm_up(), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        best = min(best, time.perf_counter() - start)
    return result, best


def measure(adapters: int, new_tokens: int, hidden: int, layers: int) -> Measured:
    names = [f"user_{i:03d}" for i in range(adapters)]
    base = new_model(hidden, layers)
    served = copy.deepcopy(base)
    peft_model = with_adapters(base, names)
    prompts = torch.randint(1, base.config.vocab_size, (adapters, PROMPT_TOKENS))

    pool = AdapterPool.for_model(served, budget=BUDGET, target_modules=TARGETS, slots=max(adapters, 8))
    for name, factors in tqdm(factors_by_adapter(peft_model).items(), desc="loading the pool", leave=False):
        pool.load(name, factors, scaling=SCALING)
    attach_pool(served, pool)

    def by_pool() -> Decoded:
        with pool.use(names):
            return decode(served, prompts, new_tokens)

    with torch.inference_mode():
        ours, pool_time = timed(by_pool, by_pool, repeats=3)
        mixed = partial(decode, peft_model, prompts, adapter_names=names)
        _, mixed_time = timed(partial(mixed, new_tokens=new_tokens), partial(mixed, new_tokens=1), repeats=1)
        alone_calls = (
            partial(one_by_one, peft_model, names[:many], prompts[:many], new_tokens) for many in (adapters, 1)
        )
        alone, alone_time = timed(*alone_calls, repeats=1)
    seconds = dict(zip(WAYS, (pool_time, mixed_time, alone_time), strict=True))
    rates = {way: adapters * new_tokens / taken for way, taken in seconds.items()}
    return Measured(adapters, rates, *agreement(ours, alone))


def table(rows: Sequence[Measured]) -> str:
    lines = [
        f"{'adapters':>8} | " + " | ".join(f"{way + ', tokens/s':>26}" for way in WAYS) + " | same tokens | logits"
    ]
    for row in rows:
        rates = " | ".join(f"{row.tokens_per_second[way]:>26,.0f}" for way in WAYS)
        lines.append(f"{row.adapters:>8} | {rates} | {row.same_tokens:>11.1%} | {row.logit_error:.1e}")
    return "\n".join(lines)


def draw(rows: Sequence[Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    for way in WAYS:
        axes.plot([row.adapters for row in rows], [row.tokens_per_second[way] for row in rows], "o-", label=way)
    axes.set(
        xscale="log", yscale="log", xlabel="adapters = requests in the batch, each with its own",
        ylabel="tokens per second",
    )  # fmt: skip
    ticks = [row.adapters for row in rows]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"Greedy decoding on {torch.get_num_threads()} CPU threads, Llama of random weights", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(
    adapters: Sequence[int] = (1, 8, 64, 256), new_tokens: int = 8, hidden: int = 256, layers: int = 2,
    output: Path = Path("outputs/serve_adapters.png"),
) -> list[Measured]:  # fmt: skip
    rows = []
    for count in tqdm(adapters, desc="numbers of adapters"):
        rows.append(measure(count, new_tokens, hidden, layers))
        tqdm.write(table(rows[-1:]))
    print(table(rows))
    draw(rows, output)
    print(f"plot: {output}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/serve_adapters.png"))
    main(**vars(parser.parse_args()))
