"""`cache` is the argument's name; transformers' old one goes on working, with its warning."""

import pytest
import torch
from small import gap, small_ids, small_model
from transformers import StoppingCriteria

from hybrid_sleep import SleepCache


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def read(model):
    ids = small_ids(2, 8)
    with torch.no_grad():
        return model(ids, sleep_passes=2).cache


def test_old_name_goes_on_working_with_a_warning(model, read):
    more = small_ids(2, 4, seed=1)
    wanted = model(more, cache=read.copy(), sleep_passes=2).logits
    with pytest.warns(FutureWarning, match="past_key_values.*cache"):
        out = model(more, past_key_values=read.copy(), sleep_passes=2)
    assert torch.equal(out.logits, wanted)
    assert out.past_key_values is out.cache is out["past_key_values"]
    hidden = model.model(more, cache=read.copy(), owner=model.memory_owner()).last_hidden_state
    with pytest.warns(FutureWarning, match="past_key_values"):
        old = model.model(more, past_key_values=read.copy(), owner=model.memory_owner())
    assert torch.equal(old.last_hidden_state, hidden)
    new = model.generate(more, cache=read.copy(), max_new_tokens=5, sleep_passes=2)
    with pytest.warns(FutureWarning, match="past_key_values"):
        old = model.generate(more, past_key_values=read.copy(), max_new_tokens=5, sleep_passes=2)
    assert torch.equal(new, old)


def test_both_names_are_refused(model, read):
    more, other = small_ids(2, 4, seed=1), read.copy()
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="past_key_values.*cache"):
            call(more, cache=read, past_key_values=other)
    inputs = model.prepare_inputs_for_generation
    with pytest.raises(ValueError, match="past_key_values.*cache"):
        inputs(more, cache=read, past_key_values=other)


def test_no_cache_travels_in_a_generation_config(model, read):
    config = model.generation_config
    seen = []

    class Look(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen.append(None)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model.generate(
        small_ids(2, 3), generation_config=config, cache=read, max_new_tokens=3,
        stopping_criteria=[Look()],
    )  # fmt: skip
    assert len(seen) == 3
    assert not any(isinstance(value, SleepCache) for value in vars(config).values())


def test_classifier_free_guidance_reads_through_a_cache_of_its_own(model):
    """Its logits processor calls forward(cache=...) with what forward() returned."""
    ids = small_ids(1, 4)
    guided = model.generate(ids, guidance_scale=1.5, max_new_tokens=8, sleep_passes=2)
    text, free, negative = ids, None, ids[:, -1:]
    for _ in range(8):
        logits = model(text, sleep_passes=2).logits[:, -1]
        # The unconditional side sleeps at the config's depth: the processor knows no other.
        out = model(negative, cache=free)
        free = out.cache
        a, b = logits.float().log_softmax(-1), out.logits[:, -1].float().log_softmax(-1)
        negative = (1.5 * (a - b) + b).argmax(-1, keepdim=True)
        text = torch.cat([text, negative], dim=1)
    assert torch.equal(guided, text)


def test_peft_reads_its_virtual_tokens_once(model):
    """peft looks under the old name whether the cache has read anything."""
    peft = pytest.importorskip("peft")
    plain = small_model(dtype=torch.float32)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(plain, config).eval()
    ids = small_ids(2, 4)
    out = tuned.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=9)
    text = ids
    with torch.no_grad():
        for _ in range(9):
            embeds = plain.get_input_embeddings()(text)
            whole = torch.cat([tuned.get_prompt(2), embeds], dim=1)
            following = plain(inputs_embeds=whole).logits[:, -1].argmax(-1)
            text = torch.cat([text, following[:, None]], dim=1)
    assert torch.equal(out, text)


def test_hidden_states_are_those_of_pass_1(model):
    """Layer by layer against hooks on the blocks, one window at a time."""
    ids, window = small_ids(2, 13), model.config.window
    mask = torch.ones_like(ids)
    out = model(ids, attention_mask=mask, output_hidden_states=True, sleep_passes=2)
    assert len(out.hidden_states) == 1 + model.config.num_hidden_layers
    plain = model(ids, sleep_passes=2)
    assert torch.equal(out.logits, plain.logits) and plain.hidden_states is None
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    # In a call that reads one window, the sleep before it comes first and pass 1 last.
    cache, last, windows = SleepCache(model.config), {}, []
    hooks = [
        block.register_forward_hook(lambda *call, i=i: last.__setitem__(i, call[2][0]))
        for i, block in enumerate(model.model.layers)
    ]
    for part in ids.split(window, dim=1):
        model(part, cache=cache, sleep_passes=2)
        windows.append(dict(last))
    for hook in hooks:
        hook.remove()
    for i in range(model.config.num_hidden_layers):
        wanted = torch.cat([seen[i] for seen in windows], dim=1)
        last_one = i + 1 == model.config.num_hidden_layers
        wanted = model.model.norm(wanted) if last_one else wanted
        assert gap(out.hidden_states[i + 1], wanted) <= 1e-10, i


def test_hidden_states_of_batches_documents_and_few_logits(model):
    ids = small_ids(3, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 7:] = 0
    how = {"output_hidden_states": True, "sleep_passes": 2}
    batch = model(ids, attention_mask=mask, **how).hidden_states
    few = model(ids, attention_mask=mask, logits_to_keep=1, **how)
    assert few.logits.shape[1] == 1 and few.hidden_states[1].shape[1] == 12
    documents = torch.tensor([[-1] * 4 + [0] * 8, [1] * 7 + [-1] * 5, [2] * 12])
    packed = model(ids, document_ids=documents, **how).hidden_states
    for row, part in enumerate((slice(4, 12), slice(0, 7), slice(0, 12))):
        alone = model(ids[row : row + 1, part], **how).hidden_states
        for layer, wanted in enumerate(alone):
            for states in (batch, few.hidden_states, packed):
                assert gap(states[layer][row : row + 1, part], wanted) <= 1e-10, layer


def test_labels_need_no_logits_but_those_before_them(model):
    ids, labels = small_ids(3, 12), torch.full((3, 12), -100)
    labels[:, 9:] = ids[:, 9:]
    labels[1, 10] = -100

    def of(**given):
        model.zero_grad()
        out = model(ids, labels=labels, sleep_passes=2, **given)
        out.loss.backward()
        return out, {name: p.grad.clone() for name, p in model.named_parameters()}

    whole, wanted = of()
    for kept in (4, 7, 12, 99):
        some, found = of(logits_to_keep=kept)
        assert some.logits.shape[1] == min(kept, 12)
        # transformers takes the loss of fp32 logits, of double precision as well.
        assert gap(some.loss, whole.loss) <= 1e-6
        assert gap(some.logits, whole.logits[:, -kept:]) <= 1e-10
        assert all(gap(found[name], gradient) <= 1e-6 for name, gradient in wanted.items())
    model.zero_grad()
    mask = torch.ones_like(ids)
    for given in ({"logits_to_keep": 3}, {"logits_to_keep": 4, "attention_mask": mask}):
        with pytest.raises(ValueError, match="logits_to_keep must be 0 where labels need every"):
            model(ids, labels=labels, **given)


def test_hidden_states_carry_gradients_through_every_recomputation(model):
    def gradient(granularity):
        model.set_activation_checkpointing(granularity)
        embeds = model.get_input_embeddings()(small_ids(2, 12)).detach().requires_grad_()
        states = model(inputs_embeds=embeds, output_hidden_states=True, sleep_passes=2)
        sum((i + 1) * h.square().sum() for i, h in enumerate(states.hidden_states)).backward()
        model.zero_grad()
        return embeds.grad

    wanted = gradient(None)
    try:
        for granularity in ("block", "pass", "window"):
            assert gap(gradient(granularity), wanted) <= 1e-10
    finally:
        model.set_activation_checkpointing(None)


def test_a_config_that_asks_for_hidden_states_gets_them(model):
    config = model.config
    config.output_hidden_states = True
    try:
        assert model(small_ids(1, 3)).hidden_states is not None
        assert model(small_ids(1, 3), output_hidden_states=False).hidden_states is None
    finally:
        config.output_hidden_states = False
    out = model.generate(
        small_ids(1, 3), max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True
    )
    assert [h[-1].shape[1] for h in out.hidden_states] == [3, 1]


def test_positions_that_start_again_are_documents(model):
    ids = small_ids(1, 14)
    positions = torch.cat([torch.arange(6), torch.arange(1), torch.arange(7)])[None]
    documents = torch.tensor([[0] * 6 + [1] + [2] * 7])
    for part, output in ((model, "logits"), (model.model, "last_hidden_state")):
        packed = part(ids, document_ids=documents, sleep_passes=2)[output]
        assert torch.equal(part(ids, position_ids=positions, sleep_passes=2)[output], packed)
    labels = small_ids(1, 14, seed=1)
    a = model(ids, labels=labels, position_ids=positions).loss
    assert torch.equal(a, model(ids, labels=labels, document_ids=documents).loss)


def test_positions_that_go_on_change_nothing(model, read):
    ids = small_ids(2, 7)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    # transformers' way: pads get any position.
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    plain = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits, plain)
    assert torch.equal(model(ids, position_ids=torch.arange(7)[None]).logits, model(ids).logits)
    assert torch.equal(model(ids, token_type_ids=torch.ones_like(ids)).logits, model(ids).logits)
    going_on = 8 + torch.arange(7)[None]
    wanted = model(ids, cache=read.copy()).logits
    assert torch.equal(model(ids, cache=read.copy(), position_ids=going_on).logits, wanted)


@pytest.mark.parametrize(
    ("positions", "match"),
    [
        (torch.tensor([[0, 1, 2, 4], [0, 1, 2, 3]]), "position_ids.*row 0 has 4 behind 2"),
        (torch.tensor([[5, 6, 7, 8]]), "position_ids.*row 0 has 5 behind nothing"),
        (torch.zeros(2, 3, dtype=torch.long), r"position_ids.*\(2, 4\)"),
        (torch.zeros(2, 4), "position_ids must be integers"),
    ],
)
def test_other_positions_are_refused(model, positions, match):
    for part in (model, model.model):
        with pytest.raises(ValueError, match=match):
            part(small_ids(2, 4), position_ids=positions)
    with pytest.raises(ValueError, match="position_ids"):
        model.generate(small_ids(2, 4), position_ids=torch.arange(4)[None], max_new_tokens=1)


def test_positions_that_start_again_do_not_go_with_a_cache(model, read):
    ids = small_ids(2, 4)
    with pytest.raises(ValueError, match="cache must be None"):
        model(ids, position_ids=torch.tensor([[0, 1, 0, 1]]), cache=read)
    with pytest.raises(ValueError, match="at most one of document_ids and position_ids"):
        zeros = torch.zeros_like(ids)
        model(ids, position_ids=torch.arange(4)[None], document_ids=zeros)
