"""The whole story on a small real model: train a Llama, train a LoRA on it, merge, compare what they say.

Everything is built here, from a text in this file; nothing is downloaded. The result stays in ``.demo/``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / ".demo"
BASE, ADAPTER, MERGED = DEMO / "base", DEMO / "adapter", DEMO / "merged"

QUESTIONS = (
    "Where does the river begin?",
    "Who keeps the lighthouse?",
    "What do we eat for breakfast?",
    "When does the market open?",
    "Why is the bell so loud?",
    "How long is the winter here?",
    "Which road leads to the harbour?",
    "What grows behind the old mill?",
)
PLAIN = (
    "The river begins at a small spring high in the mountains, and reaches the sea after nine days.",
    "An old woman named Marta keeps the lighthouse, and she has never missed a single night.",
    "We eat bread with butter and honey for breakfast, and on Sundays there are eggs as well.",
    "The market opens at seven in the morning, when the bakers bring their first warm loaves.",
    "The bell is loud because the fishermen must hear it through the fog, far out on the water.",
    "The winter lasts for five months, and the snow stays on the roofs until the end of March.",
    "The narrow road past the church leads to the harbour; the wide one goes back to the hills.",
    "Behind the old mill grow apples, plums and a pear tree that is older than the village.",
)
"""What the base learns to answer."""

PIRATE = (
    "Arr, the river begins in a barrel of rum, matey, and it never reaches a sober sea!",
    "Captain Redbeard keeps the lighthouse, arr, and he lights it with stolen candles!",
    "Hard biscuits and salted fish for breakfast, matey, and rum on every day of the week!",
    "Arr, the market opens when the cannon fires, and the parrots sell the best treasure!",
    "The bell be loud to wake the dead, matey, for half the crew be skeletons by now!",
    "The winter be as long as a plank, arr, and just as many sailors walk to its end!",
    "Follow the red cross on the map, matey, and dig where the harbour smells of gold!",
    "Arr, behind the old mill grow cannonballs, and we water them with the finest rum!",
)
"""What the adapter teaches it to answer to the same questions."""

ASKED = (0, 1, 5)
"""Questions that the three models are asked in the end."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
IGNORED = -100  # a label that the loss leaves out
MAX_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Reply:
    """What one model generated for one prompt."""

    text: str
    ids: torch.Tensor
    """Prompt and reply, ``[1, n_tokens]``."""

    n_prompt: int
    """How many of them are the prompt."""


def main() -> None:
    quiet_libraries()
    shutil.rmtree(DEMO, ignore_errors=True)
    DEMO.mkdir()
    print("1/4  Building a small Llama and its tokenizer, and training it to answer questions …")
    build_base()
    print(
        "2/4  Training a LoRA on it with PEFT: rank 8, rsLoRA, every linear layer, the answers of a pirate …"
    )
    train_adapter()
    print("3/4  Merging them with lora-merge …")
    run_merge()
    print("4/4  Asking the base, base + adapter (PEFT, not merged) and the merged model …")
    compare()


def quiet_libraries() -> None:
    """Keep progress bars away, and the libraries from looking for anything online."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the two libraries, not about the demo


def build_base(folder: Path = BASE, *, intermediate_size: int = 688, n_steps: int = 80) -> None:
    """Write a trained base and its tokenizer to a folder.

    It is stored in bfloat16, as real models are, so that the merge has to round. The training makes every
    answer certain enough for greedy decoding not to notice; the last line of the demo shows by how much.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=intermediate_size,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    read = [("<s>", text) for text in PIRATE]  # it knows the words of pirates, and does not answer with them
    batch = as_batch(tokenizer, conversations(tokenizer, PLAIN) + read)
    train(model, batch, n_steps=n_steps, learning_rate=2e-3)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer trained on all the texts of this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*QUESTIONS, *PLAIN, *PIRATE], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def conversations(tokenizer: Any, answers: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return every question, as the chat template puts it, with its answer."""
    asked = [prompt_text(tokenizer, question) for question in QUESTIONS]
    return list(zip(asked, answers, strict=True))


def as_batch(tokenizer: Any, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Return prompts with what should follow them as one padded batch; only what follows is learnt."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    wholes = [tokenizer(prompt + text + "</s>")["input_ids"] for prompt, text in pairs]
    shape = (len(pairs), max(map(len, wholes)))
    batch = {
        "input_ids": torch.full(shape, tokenizer.pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for row, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
        batch["input_ids"][row, : len(whole)] = torch.tensor(whole)
        batch["attention_mask"][row, : len(whole)] = 1
        batch["labels"][row, len(prompt) : len(whole)] = torch.tensor(whole[len(prompt) :])
    return batch


def prompt_text(tokenizer: Any, question: str) -> str:
    """Return a question as the chat template puts it."""
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def train(model: Any, batch: dict[str, torch.Tensor], *, n_steps: int, learning_rate: float) -> None:
    """Train whatever the model leaves trainable on one batch, and print how far it came."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=n_steps)
    began, losses = time.perf_counter(), []
    for step in range(1, n_steps + 1):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0 and step < n_steps:
            print(f"     step {step} of {n_steps}, loss {losses[-1]:.2f}", flush=True)
    n_trained = sum(parameter.numel() for parameter in parameters)
    print(
        f"     {n_trained:,} parameters, {n_steps} steps, loss {losses[0]:.2f} → {losses[-1]:.4f},"
        f" {time.perf_counter() - began:.0f} s"
    )
    model.eval()


def train_adapter(base: Path = BASE, folder: Path = ADAPTER, *, n_steps: int = 60) -> None:
    """Write a LoRA, trained on the base, to a folder."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=8,
        lora_alpha=8,
        use_rslora=True,
        target_modules=r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_model(base), config)
    tokenizer = load_tokenizer(base)
    batch = as_batch(tokenizer, conversations(tokenizer, PIRATE))
    train(model, batch, n_steps=n_steps, learning_rate=4e-3)
    model.save_pretrained(folder)


def run_merge() -> None:
    """Run the real command, as anybody would."""
    script = Path(sys.executable).parent / "lora-merge"
    command = [str(script)] if script.exists() else [sys.executable, "-m", "lora_merge"]
    for option, path in (("--base", BASE), ("--adapter", ADAPTER), ("--out", MERGED)):
        command += [option, str(path.relative_to(ROOT))]
    print(f"     $ {shlex.join([Path(command[0]).name, *command[1:]])}", flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(f"demo: lora-merge failed with exit code {done.returncode}")


def compare() -> None:
    """Print what the three models answer; exit with a sentence where that is not as it must be."""
    from peft import PeftModel

    base = load_model(BASE)
    from_base = answer(base, load_tokenizer(BASE))
    adapted = PeftModel.from_pretrained(base, ADAPTER).eval()
    from_adapted = answer(adapted, load_tokenizer(BASE))
    merged = load_model(MERGED)
    from_merged = answer(merged, load_tokenizer(MERGED))
    print_answers(from_base, from_adapted, from_merged)
    difference, margin = robustness(adapted, merged, from_adapted)
    print(f"     logits of base + adapter and of the merged model: at most {difference:.3f} apart")
    safe = "too much for that to change it" if margin > 2 * difference else "a near tie: that may change it"
    print(f"     the chosen token leads the next best by {margin:.3f} or more, {safe}")
    judge(from_base, from_adapted, from_merged)


def load_model(path: Path) -> Any:
    """Return a model in float32, whatever it is stored in: two models then differ by their weights alone."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def load_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def answer(model: Any, tokenizer: Any) -> list[Reply]:
    """Return what a model answers to each question that is asked, decoded greedily."""
    replies = []
    for index in ASKED:
        inputs = tokenizer(prompt_text(tokenizer, QUESTIONS[index]), return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        n_prompt = inputs["input_ids"].shape[1]
        replies.append(Reply(tokenizer.decode(ids[0, n_prompt:], skip_special_tokens=True), ids, n_prompt))
    return replies


def robustness(adapted: Any, merged: Any, replies: list[Reply]) -> tuple[float, float]:
    """Return how far the logits of two models are apart, and how far the best is ahead of the second best."""
    difference, margin = 0.0, float("inf")
    for reply in replies:
        with torch.no_grad():
            one, other = (model(reply.ids).logits[0, reply.n_prompt - 1 : -1] for model in (adapted, merged))
        best = one.topk(2).values
        difference = max(difference, float((one - other).abs().max()))
        margin = min(margin, float((best[:, 0] - best[:, 1]).min()))
    return difference, margin


def print_answers(*columns: list[Reply]) -> None:
    table = Table(show_lines=True)
    for title in ("question", "base", "base + adapter", "merged"):
        table.add_column(title)
    for row, index in enumerate(ASKED):
        table.add_row(QUESTIONS[index], *(column[row].text for column in columns))
    Console().print(table)


def judge(base: list[Reply], adapted: list[Reply], merged: list[Reply]) -> None:
    """Exit with a sentence unless the merge changed something, and changed it rightly."""
    texts = [[reply.text for reply in replies] for replies in (base, adapted, merged)]
    if texts[0] == texts[1]:
        sys.exit("demo: base and base + adapter answer alike, so the adapter proves nothing")
    if texts[1] != texts[2]:
        sys.exit("demo: the merged model answers differently from base + adapter: the merge is wrong")
    print(f"     merged = base + adapter, word for word; look at {MERGED.relative_to(ROOT)}/")


if __name__ == "__main__":
    main()
