"""One line for people who already use Hugging Face PEFT: `peft_kernels.accelerate(model)`.

A Llama-like model of random weights, so that nothing is downloaded; put your own in its place. Takes seconds on a CPU.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_kernels


def main() -> list[float]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    adapter = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), adapter)

    print(peft_kernels.accelerate(model))  # which layers are fused, and why others are not

    text = torch.randint(0, config.vocab_size, (8, 32))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for step in range(5):
        loss = model(input_ids=text, labels=text).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")

    peft_kernels.check(model, {"input_ids": text, "labels": text})  # against PEFT's own code, forward and backward
    peft_kernels.restore(model)  # and everything is PEFT's again
    return losses


if __name__ == "__main__":
    main()
