"""Train the embedded model on, from the weights that the package ships.

    python benchmarks/accuracy/train_form_reader.py OUT --seconds 600

On one GPU, bf16 and compiled by layer; on a CPU it runs, for tests. OUT/model is what
`load_form_reader(OUT/model)` reads, replaced as training goes on: a run that is cut off, or gets
SIGINT or SIGTERM, leaves the last state. OUT/train.jsonl has loss and exact match over time.

`--seconds` is the wall time of all of it, compiling, evaluations and the last `--reserve` seconds
included, in which the finished model is saved and evaluated. The learning rate falls to 0 over
the time that is trained: what compiling and evaluations take moves it on, but not up or down.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from form_batches import (
    FIRST_IMAGE_TOKEN,
    IGNORED,
    NUM_CHARACTERS,
    Batch,
    Forms,
    draw_batch,
    draw_stamps,
    page_codes,
)
from form_words import with_words
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlcache_triton.apps.evaluation import SUITES, Suite
from vlcache_triton.apps.formreader import chat, draw_dialogue, load_form_reader
from vlcache_triton.apps.formreader.model import WEIGHTS
from vlcache_triton.apps.formreader.pages import GRID_SIZE, WORD_LENGTH

BLANK_WEIGHT = 0.03  # of blank cells in the reading loss: most cells are
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.05
LOG_EVERY = 50  # steps
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def vision_layer(layer: Any, hidden: Tensor) -> Tensor:
    out = layer(hidden, attention_mask=None)
    return out[0] if isinstance(out, tuple) else out


def decoder_layer(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = layer(hidden, attention_mask=None, position_embeddings=(cos, sin), use_cache=False)
    return out[0] if isinstance(out, tuple) else out


class Trainer(nn.Module):
    """The model, and a head that must name each cell's characters from its visual token.

    Without that reading loss the vision side does not learn to read; the head is not shipped.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        width = model.config.text_config.hidden_size
        # From zero, on normalised tokens: a new head must not drag the trained tower along.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.reader = nn.Linear(width, WORD_LENGTH * NUM_CHARACTERS)
        nn.init.zeros_(self.reader.weight)
        nn.init.zeros_(self.reader.bias)
        self.vision_layer, self.decoder_layer = vision_layer, decoder_layer

    def compile(self) -> None:
        """Layers share their code: one is compiled for all, in seconds, for each shape."""
        self.vision_layer = torch.compile(vision_layer, dynamic=False)
        self.decoder_layer = torch.compile(decoder_layer, dynamic=False)

    def see(self, pixels: Tensor) -> Tensor:
        """Visual tokens `[n, 576, hidden]` of pages `[n, 3, 672, 672]`."""
        tower = self.model.model.vision_tower
        tower = getattr(tower, "vision_model", tower)  # transformers < 5
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers:
            hidden = self.vision_layer(layer, hidden)
        return self.model.model.multi_modal_projector(hidden[:, 1:])

    def write(self, visual: Tensor, input_ids: Tensor) -> Tensor:
        """Last hidden states `[n, length, hidden]` of prompts that are laid out as in `Batch`,
        with visual tokens `[n, pages * 576, hidden]`."""
        language_model = self.model.model.language_model
        embed = language_model.embed_tokens
        first, last = FIRST_IMAGE_TOKEN, FIRST_IMAGE_TOKEN + visual.shape[1]
        parts = [embed(input_ids[:, :first]), visual.float(), embed(input_ids[:, last:])]
        # Right padding needs no mask: causal rows do not see it, and it has no labels.
        hidden = torch.cat(parts, 1)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        cos, sin = language_model.rotary_emb(hidden, positions)
        for layer in language_model.layers:
            hidden = self.decoder_layer(layer, hidden, cos, sin)
        return language_model.norm(hidden)

    def losses(self, batch: Batch, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(answers, reading): mean cross-entropies."""
        visual = self.see(pixels)
        visual_of_prompt = visual.reshape(len(batch.cells), -1, visual.shape[-1])
        hidden = self.write(visual_of_prompt, batch.input_ids)
        text = FIRST_IMAGE_TOKEN + visual_of_prompt.shape[1]
        logits = self.model.lm_head(hidden[:, text - 1 : -1]).float().flatten(0, 1)
        target, weight = batch.labels[:, text:].flatten(), batch.weights[:, text:].flatten()
        per_token = F.cross_entropy(logits, target, ignore_index=IGNORED, reduction="none")
        answers = (per_token * weight).sum() / weight.sum()
        letters = self.reader(self.norm(visual)).float().view(-1, NUM_CHARACTERS)
        truth = batch.cells.flatten().long()
        weight = torch.where(truth == 0, BLANK_WEIGHT, 1.0)
        per_letter = F.cross_entropy(letters, truth, reduction="none")
        return answers, (per_letter * weight).sum() / weight.sum()


class Painter:
    """Draws pages on the device as the processor would give them to the model."""

    def __init__(self, image_processor: Any, device: str) -> None:
        self.stamps = draw_stamps(device)
        self.mean = torch.tensor(image_processor.image_mean, device=device)
        self.std = torch.tensor(image_processor.image_std, device=device)

    def __call__(self, cells: Tensor, *, augment: bool = True) -> Tensor:
        """`[..., 24, 24, 4]` to `[n, 3, 672, 672]`."""
        cells = cells.reshape(-1, *cells.shape[-3:]).to(self.mean.device)
        return draw_batch(cells, self.stamps, self.mean, self.std, augment=augment)


def initial(init: str, device: str) -> tuple[Any, Any]:
    """(model, processor), with words as tokens, in fp32.

    init: "shipped", "scratch" (the shipped model's sizes, random weights), or a folder.
    """
    model, processor = load_form_reader(WEIGHTS if init in ("shipped", "scratch") else init)
    processor = with_words(model, processor)
    if init == "scratch":
        model = type(model)(model.config)
    return model.to(device), processor


def save(model: Any, processor: Any, folder: Path) -> None:
    """Write model (as fp16) and processor; there is a whole model at every moment."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    state = {name: x.half() for name, x in model.state_dict().items()}
    config = model.config
    dtype, config.dtype = config.dtype, torch.float16
    try:
        model.save_pretrained(new, state_dict=state, max_shard_size="12MB")
    finally:
        config.dtype = dtype
    processor.save_pretrained(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def train(
    out: Path,
    *,
    init: str,
    seconds: float,
    max_steps: int | None,
    reserve: float,
    batch_size: int,
    text_length: int,
    learning_rate: float,
    workers: int,
    checkpoint_every: float,
    eval_every: float,
    eval_pages: int,
    seed: int,
    pages: type[Forms] = Forms,
    suites: Sequence[Suite] = SUITES,
) -> list[dict[str, Any]]:
    """Train for a time, or a number of steps; save, and return the log's entries.

    pages, suites: what it trains on, and what it is asked to see how far it is.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = device == "cuda"
    torch.set_float32_matmul_precision("high")
    model, processor = initial(init, "cpu")
    forms = pages(processor.tokenizer.get_vocab(), batch_size, text_length, seed)
    # The workers start first: they draw while the rest loads and compiles.
    loader = DataLoader(
        forms,
        batch_size=None,
        num_workers=workers,
        pin_memory=on_gpu,
        worker_init_fn=_leave_signals_to_the_trainer,
    )
    batches = iter(loader)
    trainer = Trainer(model.train()).to(device)
    painter = Painter(processor.image_processor, device)
    parameters = list(trainer.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=on_gpu,
    )
    out.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    stopped = False

    def stop(*_: Any) -> None:
        nonlocal stopped
        stopped = True

    def now() -> float:
        return time.perf_counter() - start

    def backward(batch: Batch) -> tuple[Tensor, Tensor]:
        batch = Batch(*(x.to(device, non_blocking=True) for x in batch))
        pixels = painter(batch.cells, augment=forms.augment)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            answers, reading = trainer.losses(batch, pixels)
        (answers + reading).backward()
        return answers.detach(), reading.detach()

    handlers = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        with (out / "train.jsonl").open("w") as file:

            def log(**entry: Any) -> None:
                entry = {"step": step, "seconds": round(now(), 1), **entry}
                entries.append(entry)
                file.write(json.dumps(entry) + "\n")
                file.flush()
                print(entry, flush=True)

            step = 0
            if on_gpu:
                trainer.compile()
                for num_pages in forms.page_weights:  # all shapes, before the schedule starts
                    backward(forms.blank(num_pages))
                    log(compiled=num_pages)
                optimizer.zero_grad(set_to_none=True)
            trained = waited = 0.0
            norm = torch.zeros(())
            saved = evaluated = now()
            while not stopped:
                step_start = now()
                left = seconds - reserve - step_start
                progress = trained / (trained + left) if left > 0 else 1.0
                if max_steps is not None:
                    progress = step / max_steps
                if progress >= 1:
                    break
                rate = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
                rate *= 0.5 * (1 + math.cos(math.pi * progress))
                for group in optimizer.param_groups:
                    group["lr"] = rate
                batch = next(batches)
                waited += now() - step_start
                answers, reading = backward(batch)
                norm.item()  # of the step before: the host's clock is then the device's
                norm = nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                if step <= 3 or step % LOG_EVERY == 0:
                    log(
                        loss=round(answers.item(), 4),
                        reading_loss=round(reading.item(), 4),
                        grad_norm=round(norm.item(), 3),
                        learning_rate=rate,
                        progress=round(progress, 3),
                        waited=round(waited, 1),
                        pages=batch.cells.shape[1],
                    )
                trained += now() - step_start
                if now() - saved >= checkpoint_every:
                    save(model, processor, out / "model")
                    saved = now()
                if now() - evaluated >= eval_every:
                    log(exact=exact_match(model, processor, painter, eval_pages, suites))
                    evaluated = now()
            save(model, processor, out / "model")
            log(saved=True)
            if not stopped:
                log(exact=exact_match(model, processor, painter, eval_pages, suites), final=True)
            if on_gpu:
                log(peak_memory_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return entries


def _leave_signals_to_the_trainer(_: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@torch.no_grad()
def exact_match(
    model: Any,
    processor: Any,
    painter: Painter,
    num_items: int,
    suites: Sequence[Suite] = SUITES,
) -> dict[str, float]:
    """The share of answers that are exact, of `num_items` fixed dialogues a suite.

    By default the suites of `vlcache eval`, on pages of their own, drawn as `render` does.
    """
    was_training = model.training
    model.eval()
    try:
        return {s.name: _exact_match(model, processor, painter, num_items, s) for s in suites}
    finally:
        model.train(was_training)


def _exact_match(
    model: Any, processor: Any, painter: Painter, num_items: int, suite: Suite
) -> float:
    right = 0
    for first in range(0, num_items, 128):
        items = range(first, min(first + 128, num_items))
        dialogues = [
            draw_dialogue(f"trained-{suite.name}-{i}", suite.tasks, num_pages=suite.num_pages)
            for i in items
        ]
        pages = np.stack([page_codes(page) for d in dialogues for page in d.pages])
        inputs = encode_texts(processor, [_text(processor, d) for d in dialogues])
        inputs = inputs.to(model.device)
        pixels = painter(torch.from_numpy(pages), augment=False)
        on_gpu = model.device.type == "cuda"
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            ids = model.generate(
                **inputs, pixel_values=pixels, max_new_tokens=suite.max_new_tokens, do_sample=False
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        pairs = zip(texts, dialogues, strict=True)
        right += sum(text == d.questions[-1].answer for text, d in pairs)
    return right / num_items


def _text(processor: Any, dialogue: Any) -> str:
    """The dialogue up to its last question, for the model to answer."""
    questions, pages = dialogue.questions, [None] * len(dialogue.pages)
    replies = [question.answer for question in questions[:-1]]
    messages = chat(pages, [question.text for question in questions], replies)
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def encode_texts(processor: Any, texts: list[str], visual_tokens: int = GRID_SIZE**2) -> Any:
    """What `encode_chats` makes of the chats' texts, without their images."""
    texts = [text.replace("<image>", "<image>" * visual_tokens) for text in texts]
    return processor.tokenizer(texts, padding=True, return_tensors="pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for model and log")
    parser.add_argument("--init", default="shipped", help="shipped, scratch, or a model's folder")
    parser.add_argument("--seconds", type=float, default=600.0, help="wall time of the whole run")
    parser.add_argument("--max-steps", type=int, help="steps to train, in place of a time")
    parser.add_argument(
        "--reserve", type=float, default=20.0, help="seconds of it for the last save and evaluation"
    )
    parser.add_argument("--batch-size", type=int, default=240, help="pages a step")
    parser.add_argument("--text-length", type=int, default=192, help="tokens of text a page")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=14, help="processes that draw pages")
    parser.add_argument("--checkpoint-every", type=float, default=120.0, help="seconds")
    parser.add_argument("--eval-every", type=float, default=120.0, help="seconds")
    parser.add_argument("--eval-pages", type=int, default=256, help="dialogues a suite")
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
