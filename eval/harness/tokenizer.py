"""Tokenizers: a checkpoint's own, or for a model of a task one whose words are its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, PreTrainedTokenizer

if TYPE_CHECKING:
    from hybrid_sleep.eval.tasks import Task
    from hybrid_sleep.training import RunConfig

END, PAD, UNKNOWN = "<end>", "<pad>", "<unk>"


class WordTokenizer(PreTrainedTokenizer):
    """Words between spaces, each one token: `words[i]` is token i.

    `<end>` is the end of a text, a word of its own where `words` have none. It, `<pad>` and
    `<unk>` then come after all words, where a model of the task has no logits for them.

    Raises ValueError for a word that is empty, has a space in it, or comes twice.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, words: list[str], **kwargs: Any):
        wrong = [word for word in words if word.split() != [word]]
        if wrong or len(set(words)) < len(words):
            what = repr(wrong[0]) if wrong else "one twice"
            raise ValueError(f"words must be different and without spaces, got {what}")
        special = [word for word in (END, PAD, UNKNOWN) if word not in words]
        self.words = [*words, *special]
        self.ids = {word: i for i, word in enumerate(self.words)}
        super().__init__(eos_token=END, pad_token=PAD, unk_token=UNKNOWN, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Tokens, special ones included."""
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        """Id of each word."""
        return dict(self.ids)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.ids[UNKNOWN])

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index] if 0 <= index < len(self.words) else UNKNOWN

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The words with a space between them."""
        return " ".join(tokens)


def task_words(task: Task) -> list[str]:
    """A word for each token of `task`: those of its `vocabulary`, or else the tokens' numbers."""
    vocabulary = getattr(task, "vocabulary", None)
    if vocabulary is not None:
        return list(vocabulary.tokens)
    return [str(token) for token in range(task.vocab_size)]


def load_tokenizer(folder: Path, run: RunConfig | None) -> Any:
    """The tokenizer saved in `folder` or above it, else that of the `run` it was trained by.

    Raises ValueError if there is none of them, or if its files are damaged.
    """
    # A checkpoint taken on the way lies inside the folder of its run.
    for place in (folder, folder.parent) if run is not None else (folder,):
        if (place / "tokenizer_config.json").is_file():
            return _saved(place)
    if run is None:
        raise ValueError(
            "a checkpoint must have a tokenizer or a run.yaml beside it, got neither in "
            f"{str(folder)!r}"
        )
    return WordTokenizer(task_words(run.load_task())) if run.text is None else run.load_tokenizer()


def _saved(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise their own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"a tokenizer must have been saved whole, got one in {str(folder)!r} that cannot be "
            f"loaded ({reason})"
        ) from error
