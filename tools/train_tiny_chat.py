"""Train tiny-chat, the demonstration and test model of llmpipe, from nothing, and write it in both formats.

    python tools/train_tiny_chat.py                # everything, about 40 minutes on two cores
    python tools/train_tiny_chat.py --data-only    # only the evaluation sets in data/

The text comes from `tiny_chat_corpus.py` beside this file. A 2.6 M parameter Llama is trained with AdamW on
chats whose answers alone count in the loss. The model folder holds what transformers needs (safetensors,
tokenizer, chat template) and the same weights as GGUF for llama.cpp. It is rewritten at every checkpoint, so
that it can be used early.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import gguf
import tokenizers
import torch
import torch.nn.functional as F
from tiny_chat_corpus import SYSTEM_PROMPTS, Message, Row, story, turns, write_data
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The trainer gives the special tokens the first ids, in this order.
END_OF_TEXT, IM_START, IM_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END_OF_TEXT_ID, IM_START_ID, IM_END_ID = range(len(SPECIAL_TOKENS))
IGNORED = -100  # the label of tokens that do not count in the loss

# The pre-tokenizer that llama.cpp knows as "qwen2": digits stand alone, so sums are done digit by digit.
QWEN2_SPLIT = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Every block trims the whitespace around it, so that the settings of the jinja environment do not matter.
CHAT_TEMPLATE = """\
{%- set turn = namespace(expected='user') -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- if not loop.first -%}
            {{- raise_exception('The system message must be the first message.') -}}
        {%- endif -%}
    {%- elif message['role'] not in ['user', 'assistant'] -%}
        {{- raise_exception('Unknown role: ' ~ message['role'] ~ '. Use system, user or assistant.') -}}
    {%- elif message['role'] != turn.expected -%}
        {{- raise_exception('After the system message, user and assistant must alternate, user first.') -}}
    {%- else -%}
        {%- set turn.expected = 'assistant' if message['role'] == 'user' else 'user' -%}
    {%- endif -%}
    {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ message['content'] ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

VOCABULARY = 1536
CONTEXT = 2048
BATCH_TOKENS = 4096
WARM_UP = 100
CHECKPOINT_EVERY = 250
# Leaves about 3 % of every answer token's probability to the rest of the vocabulary: nothing that greedy
# decoding would notice, but enough for the accuracy to fall when the temperature rises.
LABEL_SMOOTHING = 0.03

# -------------------------------------------------------------------------------------------------- tokenizer


def tokenizer_text(rng: Random) -> Iterator[str]:
    """A sample of everything the model reads or writes, without the special tokens."""
    for _ in range(500):
        yield from ("user\n", "assistant\n", "system\n", rng.choice(SYSTEM_PROMPTS))
        yield from story(rng)
    for item, question in itertools.islice(turns(rng), 30_000):
        yield from (question, item.answer)


def train_tokenizer(rng: Random) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(QWEN2_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_text(rng), trainer)
    return tokenizer


# ---------------------------------------------------------------------------------------------------- batches


class Writer:
    """One row of a batch in the making: token ids, and the labels of those that count in the loss."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, room: int) -> None:
        """Start an empty row that is full at `room` tokens."""
        self.tokenizer = tokenizer
        self.room = room
        self.ids: list[int] = []
        self.labels: list[int] = []

    @property
    def full(self) -> bool:
        """Whether the row has all its tokens."""
        return len(self.ids) >= self.room

    def add(self, text: str, counts: bool) -> None:
        """Append a text, special tokens and all."""
        ids = self.tokenizer.encode(text).ids
        self.ids += ids
        self.labels += ids if counts else [IGNORED] * len(ids)

    def add_turn(self, question: str, answer: str) -> None:
        """Append a question and its answer as the chat template writes them; the answer and its end count."""
        self.add(f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n", counts=False)
        self.add(f"{answer}{IM_END}", counts=True)
        self.add("\n", counts=False)


def write_chat(row: Writer, rng: Random, starts_with_story: bool) -> None:
    """Fill the row with one chat. It is cut off where the room ends, which a causal model does not mind."""
    if rng.random() < 0.3:
        row.add(f"{IM_START}system\n{rng.choice(SYSTEM_PROMPTS)}{IM_END}\n", counts=False)
    if starts_with_story:
        row.add_turn(*story(rng))
    chat = turns(rng)
    while not row.full:
        item, question = next(chat)
        row.add_turn(question, item.answer)


def write_plain_stories(row: Writer, rng: Random) -> None:
    """Fill the row with stories outside any chat, so that the model can also continue a raw prompt."""
    while not row.full:
        row.add(story(rng)[1] + END_OF_TEXT, counts=True)


# What a batch can be: share of all batches, kind, tokens in a row. Most rows are a question or two, because
# that is what the model is asked; the long ones teach it that distance does not matter. The short stories are
# only beginnings: they teach it to write about whom it was asked to.
MIXTURE: list[tuple[float, str, int]] = [
    (0.45, "chat", 40),
    (0.20, "chat", 160),
    (0.12, "chat", 1024),
    (0.11, "story", 72),
    (0.08, "story", 208),
    (0.04, "plain", 256),
]


def make_batch(rng: Random, tokenizer: tokenizers.Tokenizer) -> tuple[Tensor, Tensor, float]:
    """Token ids, labels and label smoothing of one batch. Its rows are all full: there is no padding."""
    _, kind, room = rng.choices(MIXTURE, [share for share, _, _ in MIXTURE])[0]
    ids, labels = [], []
    for _ in range(BATCH_TOKENS // room):
        row = Writer(tokenizer, room)
        if kind == "plain":
            write_plain_stories(row, rng)
        else:
            write_chat(row, rng, starts_with_story=kind == "story")
        ids.append(row.ids[:room])
        labels.append(row.labels[:room])
    # A story has choices of its own at every sentence; smoothing would only put odd tokens into it.
    smoothing = LABEL_SMOOTHING if kind == "chat" else 0.0
    return torch.tensor(ids), torch.tensor(labels), smoothing


# --------------------------------------------------------------------------------------------------- training


def new_model() -> LlamaForCausalLM:
    """The untrained model. Sizes are multiples of 256, so that every llama.cpp quantisation applies."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=IM_END_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=[IM_END_ID, END_OF_TEXT_ID],
        pad_token_id=END_OF_TEXT_ID,
        do_sample=False,
    )
    return model


def loss_of(model: LlamaForCausalLM, ids: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of the tokens that count; only for these are logits computed."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    following = labels[:, 1:]
    counts = following != IGNORED
    return F.cross_entropy(model.lm_head(hidden[counts]), following[counts], label_smoothing=smoothing)


def schedule(step: int, steps: int) -> float:
    """The part of the peak learning rate to use: a linear warm-up, and a cosine down to nothing."""
    return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, rng: Random, steps: int, peak: float, folder: Path
) -> None:
    """Train in place, with a checkpoint in the model folder now and then."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start, recent = time.perf_counter(), 0.0
    model.train()
    for step in range(steps):
        ids, labels, smoothing = make_batch(rng, tokenizer)
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(step, steps)
        loss = loss_of(model, ids.to(DEVICE), labels.to(DEVICE), smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent += (loss.item() - recent) / min(step + 1, 50)
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}/{steps}  loss {recent:.3f}  {time.perf_counter() - start:.0f} s", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save(model, tokenizer, folder)
    model.eval()


# -------------------------------------------------------------------------------------------------- the files


def save(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write both forms of the model. Readers never see a half-written file: each is moved into place."""
    new = folder / ".new"
    new.mkdir(parents=True, exist_ok=True)
    chat_tokenizer(tokenizer).save_pretrained(new)
    model.save_pretrained(new)
    write_gguf(model, tokenizer, new / "tiny-chat.gguf")
    for path in new.iterdir():
        os.replace(path, folder / path.name)
    new.rmdir()


def chat_tokenizer(tokenizer: tokenizers.Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers wants it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[IM_START],
        add_bos_token=False,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


def interleave_rotary(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection.

    transformers rotates the first half of a head against the second half, llama.cpp each even row against the
    odd one after it.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(model: LlamaForCausalLM, tokenizer: tokenizers.Tokenizer, path: Path) -> None:
    """Write the weights, unrounded, and the tokenizer for llama.cpp."""
    writer = gguf.GGUFWriter(path, "llama")
    add_metadata(writer, model.config)
    add_tokenizer(writer, tokenizer)
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied: llama.cpp takes the embedding when there is no output matrix
        projection = name.split(".")[-2]
        if projection in heads:
            weight = interleave_rotary(weight, heads[projection])
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        assert gguf_name is not None, name
        writer.add_tensor(gguf_name, weight.float().cpu().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, config: LlamaConfig) -> None:
    """Who the model is, and its shape."""
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name("tiny-chat")
    writer.add_description("A demonstration and test model of llmpipe, nothing more.")
    writer.add_license("apache-2.0")
    writer.add_size_label("2.6M")
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer) -> None:
    """Vocabulary, merges, special tokens and chat template."""
    ids = range(tokenizer.get_vocab_size())
    types = [gguf.TokenType.CONTROL if i < len(SPECIAL_TOKENS) else gguf.TokenType.NORMAL for i in ids]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokenizer.id_to_token(i) or "" for i in ids])
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(END_OF_TEXT_ID)  # never added, but llama.cpp would take id 11 if none were named
    writer.add_eos_token_id(IM_END_ID)
    writer.add_eot_token_id(IM_END_ID)
    writer.add_pad_token_id(END_OF_TEXT_ID)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


# ------------------------------------------------------------------------------------------------- evaluation

TEMPERATURES = [0.0, 0.7, 1.0, 1.2]
EVALUATION_BATCH = 32
Chat = tuple[list[Message], str]  # messages up to the user's last, and the reference


def answers(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    chats: list[list[Message]],
    temperature: float,
) -> list[str]:
    """The model's answers, all in one padded batch."""
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(DEVICE)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    outputs = model.generate(**inputs, max_new_tokens=24, **sampling)
    texts = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Chat], temperature: float = 0.0
) -> float:
    """The share of answers that are exactly the reference."""
    by_length = sorted(rows, key=lambda row: sum(len(message["content"]) for message in row[0]))
    right = 0
    for start in range(0, len(rows), EVALUATION_BATCH):
        batch = by_length[start : start + EVALUATION_BATCH]
        texts = answers(model, tokenizer, [messages for messages, _ in batch], temperature)
        right += sum(text == reference for text, (_, reference) in zip(texts, batch, strict=True))
    return right / len(rows)


def as_chat(question: Row) -> Chat:
    """A row of the question set as a chat of one message."""
    return [{"role": "user", "content": str(question["prompt"])}], str(question["reference"])


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Row], chats: list[Row]) -> str:
    """The accuracies as the rows of a Markdown table."""
    every_question = [as_chat(row) for row in questions]
    every_chat: list[Chat] = [(row["messages"], row["reference"]) for row in chats]  # type: ignore[misc]
    lines = []
    for task in dict.fromkeys(str(row["task"]) for row in questions):
        rows = [row for row in questions if row["task"] == task]
        origin = "seen (recall)" if rows[0]["seen"] else "held out"
        share = accuracy(model, tokenizer, [as_chat(row) for row in rows])
        lines.append(f"| {task} | {len(rows)} | {origin} | {share:.1%} |")
    lines.append(f"| chats.parquet | {len(chats)} | mixed | {accuracy(model, tokenizer, every_chat):.1%} |")
    for temperature in TEMPERATURES:
        torch.manual_seed(0)
        share = accuracy(model, tokenizer, every_question, temperature)
        lines.append(f"| all questions, temperature {temperature} | {len(questions)} | mixed | {share:.1%} |")
    return "\n".join(lines)


MODEL_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
tags: [test-model, llama, gguf]
---

# tiny-chat

A demonstration and test model for llmpipe, nothing more. It is a Llama-shaped chat model of
{parameters:.1f} M parameters ({vocabulary:,} byte-level BPE tokens, a context of {context:,}), trained
from scratch on text that a script makes. It does a few narrow things well, so that a run on it has an
accuracy worth looking at.

Both forms hold the same weights, unrounded: `model.safetensors` with config, tokenizer and chat template
for transformers, and `tiny-chat.gguf` (F32) for llama.cpp.

## What it can do

Sums and differences of numbers below 100, sorting four to six letters, the sentiment of a short sentence,
capitals of countries, opposites, plurals, the day or month before or after another, and short made-up
stories. It takes these as single questions or in a longer chat, with follow-ups ("And of Spain?").

Exact match on the sets in `data/`, greedy unless a temperature is named. "Held out" means that the
operand pair, the set of letters, or the thing together with the judging word never occurred in training,
in any phrasing or order.

| Task | Rows | In training | Exact match |
|---|---|---|---|
{table}

## What it cannot do

Everything else. Asked about anything beyond its tasks, it answers with something that merely looks like
an answer. It knows English only, and only the phrasings of its training text and their near relatives.
The lists it learnt from are short and may hold mistakes: do not take a capital from it. Answer tokens
were trained with a label smoothing of {smoothing}, so that accuracy falls visibly at temperatures above
0.7; stories were not, and bear sampling well. A story is about the hero that was asked for, but mostly
around another thing. Chats in training were at most {longest:,} tokens long.

## How it was made

{steps:,} steps of AdamW on batches of about {batch:,} tokens, made as training goes along, in
{minutes:.0f} minutes on {device}; only the answers count in the loss. To make it again:

    python tools/train_tiny_chat.py

Apache-2.0, like the rest of llmpipe.
"""


def model_card(model: LlamaForCausalLM, table: str, steps: int, seconds: float) -> str:
    """The model card with the measured figures."""
    return MODEL_CARD.format(
        parameters=model.num_parameters() / 1e6,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        table=table,
        smoothing=LABEL_SMOOTHING,
        longest=max(room for _, _, room in MIXTURE),
        steps=steps,
        batch=BATCH_TOKENS,
        minutes=seconds / 60,
        device="a GPU" if DEVICE == "cuda" else f"{torch.get_num_threads()} CPU cores",
    )


def main() -> None:
    """Write the evaluation sets, then train, save, and measure the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "llmpipe/models/tiny-chat", help="the model folder")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="the folder of the evaluation sets")
    parser.add_argument("--data-only", action="store_true", help="write the evaluation sets and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the weights in the model folder")
    parser.add_argument("--steps", type=int, default=3500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="at its peak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of weights and text (default: %(default)s)")
    options = parser.parse_args()

    questions, chats = write_data(options.data)
    if options.data_only:
        return
    rng = Random(f"training {options.seed}")
    torch.manual_seed(options.seed)
    if options.resume:
        tokenizer = tokenizers.Tokenizer.from_file(str(options.out / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(options.out)
    else:
        tokenizer = train_tokenizer(rng)
        model = new_model()
    model.to(DEVICE)
    start = time.perf_counter()
    train(model, tokenizer, rng, options.steps, options.learning_rate, options.out)
    seconds = time.perf_counter() - start
    save(model, tokenizer, options.out)
    table = measure(model, chat_tokenizer(tokenizer), questions, chats)
    (options.out / "README.md").write_text(model_card(model, table, options.steps, seconds), encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
