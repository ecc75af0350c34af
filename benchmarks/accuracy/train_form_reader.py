"""Train the embedded model on, from the weights that the package ships.

    python benchmarks/accuracy/train_form_reader.py OUT --seconds 600

On one GPU, bf16 and compiled; ten minutes are its design. On a CPU it runs, for tests. OUT receives
the weights and the processor, as `load_form_reader` reads them (copy them over
vlcache_triton/formreader/weights), and train.jsonl: loss and exact match over time. The goal is
98 % exact on value look-ups on pages of 8 to 16 fields.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from form_batches import (
    FIRST_IMAGE_TOKEN,
    IGNORED,
    NUM_CHARACTERS,
    Batch,
    Forms,
    draw_batch,
    draw_glyphs,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vlcache_triton.formreader import (
    chat,
    draw_dialogue,
    encode_chats,
    load_form_reader,
    render,
)
from vlcache_triton.formreader.pages import WORD_LENGTH

BLANK_WEIGHT = 0.03  # of blank cells in the reading loss: most cells are
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
LONGEST_VALUE = 9  # tokens, the end included
EVALUATED_FIELDS = (8, 16)


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

    def see(self, pixels: Tensor) -> Tensor:
        """Visual tokens `[n, 576, hidden]` of pages `[n, 3, 672, 672]`."""
        hidden = self.model.model.vision_tower(pixel_values=pixels).last_hidden_state
        return self.model.model.multi_modal_projector(hidden[:, 1:])

    def write(self, visual: Tensor, input_ids: Tensor) -> Tensor:
        """Last hidden states `[n, length, hidden]` of prompts that are laid out as `Forms` does."""
        language_model = self.model.model.language_model
        embed = language_model.embed_tokens
        first, last = FIRST_IMAGE_TOKEN, FIRST_IMAGE_TOKEN + visual.shape[1]
        parts = [embed(input_ids[:, :first]), visual.float(), embed(input_ids[:, last:])]
        # Right padding needs no mask: causal rows do not see it, and it has no labels.
        out = language_model(inputs_embeds=torch.cat(parts, 1), use_cache=False)
        return out.last_hidden_state

    def losses(self, batch: Batch, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(answers, reading): mean cross-entropies."""
        visual = self.see(pixels)
        hidden = self.write(visual, batch.input_ids)[:, :-1]
        target = batch.labels[:, 1:]
        counts = target != IGNORED
        answers = F.cross_entropy(self.model.lm_head(hidden[counts]).float(), target[counts])
        letters = self.reader(self.norm(visual)).float().view(-1, NUM_CHARACTERS)
        truth = batch.cells.reshape(-1)
        weight = torch.where(truth == 0, BLANK_WEIGHT, 1.0)
        per_letter = F.cross_entropy(letters, truth, reduction="none")
        return answers, (per_letter * weight).sum() / weight.sum()


def train(
    out: Path,
    *,
    seconds: float,
    max_steps: int | None,
    batch_size: int,
    text_length: int,
    learning_rate: float,
    workers: int,
    eval_every: int,
    eval_pages: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Train for a time, or a number of steps; save, and return the log's entries."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_form_reader(device=device)
    trainer = Trainer(model.train()).to(device)
    if device == "cuda":
        trainer.see = torch.compile(trainer.see)  # type: ignore[method-assign]
        trainer.write = torch.compile(trainer.write)  # type: ignore[method-assign]
    vocabulary = processor.tokenizer.get_vocab()
    forms = Forms(vocabulary, batch_size, text_length, seed)
    on_gpu = device == "cuda"
    batches = iter(DataLoader(forms, batch_size=None, num_workers=workers, pin_memory=on_gpu))
    images = processor.image_processor
    mean, std = (torch.tensor(x, device=device) for x in (images.image_mean, images.image_std))
    glyphs = draw_glyphs().to(device)
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
    with (out / "train.jsonl").open("w") as file:

        def log(**entry: Any) -> None:
            entries.append(entry)
            file.write(json.dumps(entry) + "\n")
            file.flush()
            print(entry, flush=True)

        start, step = time.perf_counter(), 0
        while True:
            elapsed = time.perf_counter() - start
            progress = elapsed / seconds if max_steps is None else step / max_steps
            if progress >= 1:
                break
            rate = learning_rate * min(1.0, (step + 1) / WARMUP_STEPS)
            rate *= 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = Batch(*(x.to(device, non_blocking=True) for x in next(batches)))
            pixels = draw_batch(batch.cells, glyphs, mean, std)
            with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
                answers, reading = trainer.losses(batch, pixels)
            (answers + reading).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step <= 3 or step % 50 == 0:
                log(
                    step=step,
                    seconds=round(time.perf_counter() - start, 1),
                    loss=round(answers.item(), 4),
                    reading_loss=round(reading.item(), 4),
                    learning_rate=rate,
                )
            if step % eval_every == 0:
                log(step=step, exact=exact_match(model, processor, eval_pages, on_gpu))
        log(step=step, exact=exact_match(model, processor, eval_pages, on_gpu), final=True)
    model.eval().half().save_pretrained(out, max_shard_size="12MB")
    processor.save_pretrained(out)
    return entries


@torch.no_grad()
def exact_match(model: Any, processor: Any, num_pages: int, on_gpu: bool) -> float:
    """The share of value look-ups answered exactly, on fixed pages of 8 to 16 fields, drawn as
    users draw them."""
    was_training = model.training
    model.eval()
    right = 0
    for first in range(0, num_pages, 64):
        dialogues = [
            draw_dialogue(f"trained-{i}", ["value"], fields=EVALUATED_FIELDS)
            for i in range(first, min(first + 64, num_pages))
        ]
        chats = [chat([render(d.pages[0])], [d.questions[0].text]) for d in dialogues]
        inputs = encode_chats(processor, chats).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            ids = model.generate(**inputs, max_new_tokens=LONGEST_VALUE, do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = processor.batch_decode(new, skip_special_tokens=True)
        right += sum(
            text == d.questions[0].answer for text, d in zip(texts, dialogues, strict=True)
        )
    model.train(was_training)
    return right / num_pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder for weights and log")
    parser.add_argument("--seconds", type=float, default=600.0, help="time to train")
    parser.add_argument("--max-steps", type=int, help="steps to train, in place of a time")
    parser.add_argument("--batch-size", type=int, default=256, help="pages a step")
    parser.add_argument("--text-length", type=int, default=160, help="tokens behind the image")
    parser.add_argument("--learning-rate", type=float, default=8e-4)
    parser.add_argument("--workers", type=int, default=14, help="processes that draw pages")
    parser.add_argument("--eval-every", type=int, default=500, help="steps")
    parser.add_argument("--eval-pages", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
