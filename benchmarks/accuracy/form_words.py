"""Frequent words of the form reader's questions as single tokens.

A question about a value then has 12 rows behind the image, not 40. Everything else stays a token a
character, so that keys, values and answers are read and written as before.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

MARKS = ("USER: ", " ASSISTANT: ")  # of the chat template
WORDS = (
    *("What", " is", " the", " value", " of", "Which", " field", " has", " comes", " after"),
    *("How", " many", " fields", " are", " there", "List", " this", " form"),
)
#: One token a match, for `re` and for the tokenizer alike; a word that goes on is no match.
PATTERN = "|".join([*MARKS, f"(?:{'|'.join(WORDS)})(?![A-Za-z])", r"[\s\S]"])


def encode(vocabulary: dict[str, int], text: str) -> list[int]:
    """What the tokenizer makes of a text without special tokens, without its overhead."""
    return [vocabulary[token] for token in re.findall(PATTERN, text)]


@torch.no_grad()
def with_words(model: Any, processor: Any) -> Any:
    """A processor whose tokenizer knows the words; the model's embeddings grow in place.

    A new word is read as its last character was, and written as the mean of its characters. A
    model that has the words stays as it is.
    """
    with TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        path = Path(folder, "tokenizer.json")
        state = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = state["model"]["vocab"]
        new = [word for word in (*MARKS, *WORDS) if word not in vocabulary]
        size = len(vocabulary)
        characters = [[vocabulary[character] for character in word] for word in new]
        vocabulary.update((word, size + i) for i, word in enumerate(new))
        state["pre_tokenizer"]["pattern"]["Regex"] = PATTERN
        path.write_text(json.dumps(state), encoding="utf-8")
        processor = type(processor).from_pretrained(folder, local_files_only=True)
    if new:
        model.resize_token_embeddings(size + len(new), mean_resizing=False)
        read, write = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        for i, ids in enumerate(characters):
            read[size + i] = read[ids[-1]]
            write[size + i] = write[ids].mean(0)
    return processor
