"""Small models and data sets on disk, for the tests of training and of the command line."""

import json
import random
from pathlib import Path

import transformers

from tests.tiny import save_tiny, tiny_bert_classifier, tiny_llama, tiny_t5, tiny_tokenizer

WORDS = "the a film movie team match goal player bank market stock price was it this of".split()


def texts(label_words: dict[str, list[str]], count: int, seed: int) -> list[dict[str, str]]:
    """Rows whose label is told by one word in them."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        label = list(label_words)[i % len(label_words)]
        words = [*rng.choices(WORDS, k=rng.randint(3, 7)), rng.choice(label_words[label])]
        rng.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_world(folder: Path) -> dict[str, str]:
    """Write models (bert without a head, llama, t5) and data (mood, topic, qa, plain); returns their paths by name."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = tiny_tokenizer()
    config = tiny_bert_classifier(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).config
    bert = transformers.BertModel(config, add_pooling_layer=False)
    world = {
        "bert": str(save_tiny(bert, tokenizer, folder / "bert")),
        "llama": str(save_tiny(tiny_llama(), tokenizer, folder / "llama")),
        "t5": str(save_tiny(tiny_t5(), tokenizer, folder / "t5")),
    }
    mood = texts({"good": ["good", "great"], "bad": ["bad", "poor"]}, 24, 1)
    topic = texts({"space": ["planet", "star"], "health": ["virus", "doctor"], "matter": ["atom", "cell"]}, 18, 2)
    rng = random.Random(3)
    qa = [{"prompt": f"what is {w} ?", "answer": w} for w in rng.choices(WORDS, k=12)]
    plain = [{"text": " ".join(rng.choices(WORDS, k=12))} for _ in range(10)]
    for name, rows in (("mood", mood), ("topic", topic), ("qa", qa), ("plain", plain)):
        world[name] = write_jsonl(folder / f"{name}.jsonl", rows)
    recipe = folder / "small.yaml"
    recipe.write_text(RECIPE)
    return world | {"recipe": str(recipe)}


# Everything that a resumed run could lose: random dropout, a price, schedules of a selector option and a loss weight,
# an optimizer with moments, a learning rate that moves.
RECIPE = """\
target_modules: all-linear
experts: {num: 3, rank: 2, alpha: 4, dropout: 0.1}
selector: {name: top_k, k: {schedule: step, from: 3, to: 2, end: 0.5}, normalise: none}
price: {name: sign, rate: 0.01}
losses: [{name: switch_balance, weight: {schedule: linear, from: 0.5, to: 0.0}}]
train: {learning_rate: 0.01, lr_scheduler_type: linear, per_device_train_batch_size: 4, num_train_epochs: 1}
"""
