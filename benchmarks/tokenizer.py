"""The tokenizer beside its peers, in one run on one core: `python benchmarks/tokenizer.py` (needs `pip install -e '.[test]'`).

CLIP's merges for all. Microseconds for a text: "new", by a tokenizer that has read nothing yet, and "again", the same texts a second time,
when words are remembered. The ids are compared with ours first. The tokenizer of transformers is written in Rust from version 5 on; with an
older transformers its slow one, in Python, is measured too. Training is compared with the library tokenizers, which is written in Rust.
"""

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import torch
import transformers
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

from minisd.postcards import captions, sample_scenes
from minisd.tokenizer import Tokenizer, clean_text
from minisd.utils import processor_name

LESSONS = Path(__file__).resolve().parent.parent / "lessons"


def prose() -> list[str]:
    """The paragraphs of the lessons."""
    paragraphs = []
    for path in sorted(LESSONS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        paragraphs += [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    return paragraphs


def contenders(folder: str) -> dict[str, Callable[[], Callable[[str], list[int]]]]:
    """Name to a function that loads a tokenizer and returns its encoder: text -> ids without start and end."""

    def from_transformers(name: str) -> Callable[[], Callable[[str], list[int]]]:
        def load() -> Callable[[str], list[int]]:
            tokenizer = getattr(transformers, name).from_pretrained(folder)
            return lambda text: tokenizer(text)["input_ids"][1:-1]

        return load

    found = {"minisd": lambda: Tokenizer.load(folder).encode, "open_clip": lambda: SimpleTokenizer().encode}
    if int(transformers.__version__.split(".")[0]) < 5:
        found["transformers, slow"] = from_transformers("CLIPTokenizer")
        found["transformers, fast (Rust)"] = from_transformers("CLIPTokenizerFast")
    else:
        found["transformers (Rust)"] = from_transformers("CLIPTokenizer")
    return found


def seconds(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds of processor time, which other work on the machine disturbs less, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def train_rust(texts: list[str], vocab_size: int) -> int:
    """The same training by the library tokenizers, on texts already cleaned; returns the size of the vocabulary."""
    tokenizer = RustTokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab_size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="the best of so many runs counts")
    parser.add_argument("--texts", type=int, default=2000, help="captions to encode")
    parser.add_argument("--train", type=int, default=20_000, help="captions to learn from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print(f"{processor_name()}, 1 thread, transformers {transformers.__version__}")

    paragraphs = prose()
    plain = [text for text in paragraphs if clean_text(text) == " ".join(text.split()).lower()]
    sets = {
        "captions": captions(sample_scenes(options.texts, seed=1)),
        "plain prose": plain,
        "prose to mend": [f"{text} It’s &amp; café" for text in plain],
    }
    best: dict[tuple[str, ...], float] = {}

    def keep(key: tuple[str, ...], value: float) -> None:
        best[key] = min(value, best.get(key, value))

    with tempfile.TemporaryDirectory() as folder:
        ours = Tokenizer.load("clip")
        ours.save(folder)
        names = contenders(folder)
        for name, load in names.items():
            encode = load()
            for set_name in ("captions", "plain prose"):
                assert all(encode(text) == ours.encode(text) for text in sets[set_name]), f"{name} gives other ids for {set_name}"
        for _ in range(options.rounds):
            for name, load in names.items():
                for set_name, texts in sets.items():
                    taken, encode = seconds(load)
                    keep((name, "load"), taken)
                    for state in ("new", "again"):
                        taken, _ = seconds(lambda encode=encode, texts=texts: [encode(text) for text in texts])
                        keep((name, set_name, state), 1e6 * taken / len(texts))

    print("\nmicroseconds of processor time for a text; prose: the paragraphs of the lessons")
    print(f"{'':28}{'load, ms':>10}" + "".join(f"{f'{name} ({len(texts)})':>24}" for name, texts in sets.items()))
    print(" " * 38 + f"{'new':>12}{'again':>12}" * len(sets))
    for name in names:
        row = "".join(f"{best[name, set_name, state]:12.1f}" for set_name in sets for state in ("new", "again"))
        print(f"{name:28}{1000 * best[name, 'load']:10.0f}{row}")

    learned = captions(sample_scenes(options.train, seed=0))
    print(f"\nseconds of training{'':9}{f'{len(learned):,} captions':>18}{f'{len(paragraphs)} paragraphs, vocabulary 5,000':>34}")
    for texts, size in ((learned, 1000), (paragraphs, 5000)):
        for _ in range(options.rounds):
            keep(("minisd", f"train {size}"), seconds(lambda texts=texts, size=size: Tokenizer.train(texts, size))[0])
            keep(("tokenizers (Rust)", f"train {size}"), seconds(lambda texts=texts, size=size: train_rust(texts, size))[0])
    for name in ("minisd", "tokenizers (Rust)"):
        print(f"{name:28}{best[name, 'train 1000']:18.2f}{best[name, 'train 5000']:34.2f}")


if __name__ == "__main__":
    main()
