"""Sliding window attention for a model that was trained with full attention, from top to bottom, on a CPU in a minute.

The model is a small one that has read CPython's documentation for some seconds. It gets a window of 32 tokens for its
prompts, with four kept tokens, full attention while decoding, and every other layer left as it is (SWAA, arXiv
2512.10411); it is trained on for that, its prompts with the window and its answers with full attention in one call; and
it writes. With a model of yours only the first step differs: it is from_pretrained(...).

    pip install strobe transformers && python examples/hf_swaa.py
"""

import time
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

import strobe.hf

PROMPT, ANSWER, BATCH = 128, 64, 8
SWAA = dict(window=32, keep_first=4, force_fa_decode=True, full_layers=[1, 3])

TEXT = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))  # one token is one byte
HELD_OUT = TEXT[-50_000:]


def batch_of(text: torch.Tensor, generator: torch.Generator) -> dict:
    """Pieces of text: a prompt, and an answer which the loss is of."""
    starts = torch.randint(len(text) - PROMPT - ANSWER, (BATCH,), generator=generator).tolist()
    ids = torch.stack([text[at : at + PROMPT + ANSWER] for at in starts])
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return dict(input_ids=ids, labels=labels)


def loss_of(model, batch: dict, whole: bool = False) -> torch.Tensor:
    """full_from gives the answer's tokens, in one call, what decoding will give them: full attention."""
    full_from = strobe.hf.answer_start(batch["labels"])
    labels = batch["input_ids"] if whole else batch["labels"]
    return model(batch["input_ids"], labels=labels, full_from=full_from, use_cache=False).loss


def train(model, optimizer, steps: int, whole: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], steps, pct_start=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch_of(TEXT[:-50_000], generator), whole).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def evaluate(model) -> float:
    generator = torch.Generator().manual_seed(2)
    return sum(loss_of(model, batch_of(HELD_OUT, generator)).item() for _ in range(8)) / 8


def main(folder: str, steps: int = 160) -> dict:
    """The three losses, in nats per byte."""
    started = time.perf_counter()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    strobe.hf.register()
    model = Qwen3ForCausalLM(config)
    model.set_attn_implementation("strobe")
    train(model, torch.optim.AdamW(model.parameters(), 5e-3), steps, whole=True)
    model.save_pretrained(folder)

    # Here begins what a user does who has a model.
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="strobe")
    losses = {"full attention": evaluate(model)}
    strobe.hf.apply(model, **SWAA)
    losses["SWAA"] = evaluate(model)
    train(model, torch.optim.SGD(model.parameters(), 0.2), steps // 2)
    losses["SWAA, trained"] = evaluate(model)

    prompt = HELD_OUT[:PROMPT][None]
    made = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=80, do_sample=True, temperature=0.7
    )
    for name, loss in losses.items():
        print(f"{name:15} {loss:.4f} nats per byte")
    print(f"it writes: {bytes(made[0, PROMPT:].tolist()).decode(errors='replace')!r}")
    print(f"{time.perf_counter() - started:.0f} s")
    return losses


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        main(folder)
