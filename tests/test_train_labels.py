"""Labels of conversations, token for token, and batches that give the same loss however they are padded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, EOS, IMAGE_TAG, make_picture
from transformers import DynamicCache, TrainingArguments

from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.data.rows import DataError, TrainingRow, parse_row
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor, VLMImageProcessor
from deepseek_vl.train.collator import NOT_LEARNT, EncodedRow, TrainingCollator, encode_row
from deepseek_vl.train.stages import parts_of, set_trainable
from deepseek_vl.train.trainer import VLTrainer
from deepseek_vl.utils.io import load_pil_images, load_pretrained_model

FEATURES = 16
"""Positions per image in all of the tests' models."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Three image files of different shapes."""
    directory = tmp_path_factory.mktemp("pictures")
    sizes = ((40, 30), (30, 40), (64, 64))
    return [make_picture(directory / f"{i}.png", size, seed=i) for i, size in enumerate(sizes)]


@pytest.fixture(scope="module", params=["small", "published"])
def processor(request) -> VLChatProcessor:
    """A processor with the small tokenizer, and one with the published tokenizer."""
    tokenizer = load_tokenizer(str(request.getfixturevalue(f"{request.param}_tokenizer_dir")))
    return VLChatProcessor(VLMImageProcessor(32), tokenizer, num_image_tokens=FEATURES)


@pytest.fixture(scope="module")
def opened(checkpoint) -> tuple[VLChatProcessor, MultiModalityCausalLM]:
    """The processor and the float32 model of each kind, with all parts trainable."""
    _, processor, model = load_pretrained_model(checkpoint, device="cpu", dtype="float32")
    set_trainable(model, parts_of(model))
    return processor, model.train()


def conversation(pictures: list[Path], *turns: tuple[str, str], system: str | None = None) -> TrainingRow:
    """A training row of (question, answer) turns; the image tags get the pictures in order."""
    remaining = iter(pictures * 3)
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        images = [next(remaining) for _ in range(question.count(IMAGE_TAG))]
        messages += [
            {"role": "User", "content": question, "images": images},
            {"role": "Assistant", "content": answer},
        ]
    return TrainingRow(messages, system, origin="here:1")


CONVERSATIONS: dict[str, list[tuple[str, str]]] = {
    "one turn": [("Hello.", "Good day to you.")],
    "one word": [("Yes or no?", "no")],
    "several turns": [("One?", "1"), ("Two?", "2, I think."), ("Three?", "3")],
    "image": [(f"{IMAGE_TAG}What is it?", "A picture.")],
    "images in later turns": [("Look.", "At what?"), (f"This {IMAGE_TAG}, or {IMAGE_TAG}?", "Both."),
                              ("So?", "Show more."), (f"Here:\n{IMAGE_TAG}", "Nice.")],
    "bytes": [("Wave.", "👋🏽 Ça va, Жук, 世界! 🙂🎉"), ("Again 🙂?", "🙂")],
    "the template's words": [("Say User:", "User: Assistant: User:"), ("Assistant: yes", "Assistant:\n\nUser: no")],
    "the question's words": [("Yes.", "Yes."), ("Yes.", "Yes.")],
    "spaces and lines": [("  a \n", "\n  two  spaces,\n\n\nthree lines \n"), ("b", ":) ... 12345 +1 {x: [1]}")],
}  # fmt: skip


def pieces(row: TrainingRow, processor: VLChatProcessor) -> list[tuple[str, bool]]:
    """The parts of a row's prompt by the paper's template, as (text, whether it is learnt)."""
    system = processor.system_prompt if row.system is None else row.system
    result = [(BOS, False)]
    between = f"{system}\n\n" if system else ""
    for question, answer in zip(row.messages[::2], row.messages[1::2], strict=True):
        result.append((f"{between}User: {question['content'].strip()}\n\nAssistant:", False))
        result.append((f" {answer['content'].strip()}{EOS}", True))
        between = ""
    return result


def expected_tokens(row: TrainingRow, processor: VLChatProcessor) -> tuple[list[int], list[bool]]:
    """The ids of a row, tokenised piece by piece, and for each whether it is learnt."""
    ids: list[int] = []
    learnt: list[bool] = []
    for text, is_learnt in pieces(row, processor):
        for token in processor.tokenizer.encode(text, add_special_tokens=False):
            copies = FEATURES + processor.add_special_token if token == processor.image_id else 1
            ids += [token] * copies
            learnt += [is_learnt] * copies
    return ids, learnt


# What is learnt


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_answers_and_their_ends_are_learnt_and_nothing_else(processor, pictures, name):
    row = conversation(pictures, *CONVERSATIONS[name])
    encoded = encode_row(row, processor)
    ids, learnt = expected_tokens(row, processor)
    assert encoded.item.input_ids.tolist() == ids
    assert encoded.labels.tolist() == [
        token if is_learnt else NOT_LEARNT for token, is_learnt in zip(ids, learnt, strict=True)
    ]

    text = processor.tokenizer.decode(encoded.labels[encoded.labels != NOT_LEARNT], clean_up_tokenization_spaces=False)
    assert text == "".join(f" {answer.strip()}{EOS}" for _, answer in CONVERSATIONS[name])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_tokens_and_pixels_are_those_of_the_chat(processor, pictures, name):
    row = conversation(pictures, *CONVERSATIONS[name])
    chat = processor(conversations=row.messages, images=load_pil_images(row.messages))
    batch = TrainingCollator(processor)([row])
    assert batch.keys() - {"labels"} == chat.keys() - {"sft_format", "attention_mask"}
    for key in batch.keys() - {"labels"}:
        assert torch.equal(batch[key], chat[key]), key


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("withheld", [(0,), (1,), (0, 2)])
def test_an_answer_without_weight_is_not_learnt_and_all_else_is_as_it_was(
    processor, pictures, withheld, mask_prompt, monkeypatch
):
    """Answers of weight 0 are not learnt, and all other tokens have the same labels; rows are in OpenAI's form."""
    monkeypatch.setattr(processor, "mask_prompt", mask_prompt)
    turns = [("Look.", "At what?"), (f"This {IMAGE_TAG}?", "Yes. 🙂"), ("So?", " Fine.\n")]
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages.append({"role": "user", "content": question.replace(IMAGE_TAG, "<image>")})
        messages.append({"role": "assistant", "content": answer, "weight": int(i not in withheld)})
    row = parse_row({"messages": messages, "images": [str(pictures[0])]}, Path(), "here:1")
    encoded = encode_row(row, processor)

    expected, answers = [], 0
    for text, is_answer in pieces(row, processor):
        is_learnt = answers not in withheld if is_answer else not mask_prompt and text != BOS
        answers += is_answer
        for token in processor.tokenizer.encode(text, add_special_tokens=False):
            copies = FEATURES if token == processor.image_id else 1
            expected += [(token, token if is_learnt and copies == 1 else NOT_LEARNT)] * copies
    assert list(zip(encoded.item.input_ids.tolist(), encoded.labels.tolist(), strict=True)) == expected
    for pack in (False, True):
        batch = TrainingCollator(processor, pack=pack)([row, row])
        learnt = batch["labels"][batch["labels"] != NOT_LEARNT].tolist()
        assert learnt == [label for _, label in expected if label != NOT_LEARNT] * 2


def test_the_loss_is_that_of_the_answers_that_are_learnt(opened, pictures):
    processor, model = opened
    row = conversation(pictures, *CONVERSATIONS["images in later turns"])
    weights = (1, 0, 1, 0)
    partial = replace(row, messages=[
        {**message, **({"weight": weights[i // 2]} if i % 2 else {})} for i, message in enumerate(row.messages)
    ])  # fmt: skip
    with torch.no_grad():
        whole = TrainingCollator(processor)([row])
        per_token = torch.nn.functional.cross_entropy(
            model(**{**whole, "labels": None}).logits[0, :-1], whole["labels"][0, 1:], reduction="none"
        )
        loss = model(**TrainingCollator(processor)([partial])).loss
    is_learnt = whole["labels"][0, 1:] != NOT_LEARNT
    answer = (is_learnt & ~torch.nn.functional.pad(is_learnt, (1, 0))[:-1]).cumsum(0) - 1  # its answer's index
    kept = is_learnt & torch.isin(answer, torch.tensor([i for i, weight in enumerate(weights) if weight]))
    torch.testing.assert_close(loss, per_token[kept].mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("special", [False, True])
def test_image_positions_are_never_learnt(processor, pictures, special, monkeypatch):
    monkeypatch.setattr(processor, "add_special_token", special)
    row = conversation(pictures, *CONVERSATIONS["images in later turns"])
    for mask_prompt in (True, False):
        monkeypatch.setattr(processor, "mask_prompt", mask_prompt)
        encoded = encode_row(row, processor)
        is_image = encoded.item.input_ids == processor.image_id
        assert is_image.sum() == 3 * (FEATURES + special)
        assert (encoded.labels[is_image] == NOT_LEARNT).all()


def test_without_masking_the_prompt_all_text_is_learnt(processor, pictures, monkeypatch):
    monkeypatch.setattr(processor, "mask_prompt", False)
    encoded = encode_row(conversation(pictures, *CONVERSATIONS["images in later turns"]), processor)
    ids = encoded.item.input_ids
    not_text = (ids == processor.image_id) | (ids == processor.tokenizer.bos_token_id)
    assert not_text.sum() == 3 * FEATURES + 1
    assert torch.equal(encoded.labels, ids.masked_fill(not_text, NOT_LEARNT))


@pytest.mark.parametrize("pack", [False, True])
def test_the_processors_ignore_id_becomes_the_losses_in_a_batch(processor, pictures, pack, monkeypatch):
    rows = [conversation(pictures, *CONVERSATIONS[name]) for name in ("image", "several turns")]
    usual = [encode_row(row, processor).labels for row in rows]
    usual_batch = TrainingCollator(processor, pack=pack)(rows)
    monkeypatch.setattr(processor, "ignore_id", -7)
    for row, labels in zip(rows, usual, strict=True):
        assert torch.equal(encode_row(row, processor).labels, labels.masked_fill(labels == NOT_LEARNT, -7))
    assert torch.equal(TrainingCollator(processor, pack=pack)(rows)["labels"], usual_batch["labels"])


@pytest.mark.parametrize("system", [None, "", "Answer in one word. 🙂"])
def test_the_rows_system_text_replaces_the_processors(processor, pictures, system):
    row = conversation(pictures, *CONVERSATIONS["image"], system=system)
    encoded = encode_row(row, processor)
    ids, learnt = expected_tokens(row, processor)
    assert encoded.item.input_ids.tolist() == ids and (encoded.labels != NOT_LEARNT).tolist() == learnt
    begin = {None: processor.system_prompt, "": "User:"}.get(system, system)
    assert encoded.item.sft_format.startswith(begin)


# Truncation


@pytest.mark.parametrize("special", [False, True])
def test_no_length_keeps_part_of_an_image(opened, pictures, special, monkeypatch):
    processor, _ = opened
    monkeypatch.setattr(processor, "add_special_token", special)
    run = FEATURES + special
    row = conversation(pictures, (f"{IMAGE_TAG}A{IMAGE_TAG}{IMAGE_TAG}?", "Yes."), (f"B {IMAGE_TAG}", "No."), system="")
    whole = encode_row(row, processor)
    is_image = (whole.item.input_ids == processor.image_id).tolist()
    starts = [i for i, image in enumerate(is_image) if image][::run]
    assert len(starts) == 4

    for max_length in range(1, len(whole.item) + 2):
        cut_images = [start for start in starts if start < max_length < start + run]
        kept = min([*cut_images, max_length, len(whole.item)])
        images = sum(start + run <= kept for start in starts)
        if (whole.labels[:kept] == NOT_LEARNT).all():
            with pytest.raises(DataError, match=f"^here:1: nothing to learn: .* within {max_length} tokens"):
                encode_row(row, processor, max_length)
            continue
        encoded = encode_row(row, processor, max_length)
        assert torch.equal(encoded.item.input_ids, whole.item.input_ids[:kept]), max_length
        assert torch.equal(encoded.labels, whole.labels[:kept])
        assert encoded.item.num_image_tokens.tolist() == [FEATURES] * images
        assert torch.equal(encoded.item.pixel_values, whole.item.pixel_values[:images])
        batch = TrainingCollator(processor, max_length)([row])
        assert batch["images_seq_mask"].sum() == batch["images_emb_mask"].sum() == FEATURES * images
        assert (batch["input_ids"] == processor.image_id).sum() == run * images


def test_images_behind_the_cut_are_left_out(opened, pictures):
    processor, model = opened
    row = conversation(pictures, ("Hello.", "Good day."), (f"{IMAGE_TAG}And?", "Now."), system="")
    length = len(encode_row(conversation(pictures, ("Hello.", "Good day."), system=""), processor).item)
    encoded = encode_row(row, processor, length)
    assert encoded.item.pixel_values is None and len(encoded.item) == length
    with torch.no_grad():
        assert model(**TrainingCollator(processor, length)([row])).loss.isfinite()


# Batches

BATCHES: dict[str, list[str]] = {
    "0, 1 and 3 images": ["several turns", "image", "images in later turns"],
    "3, 0, 1 and 0 images": ["images in later turns", "one word", "image", "bytes"],
    "no images": ["one word", "several turns"],
    "equal lengths": ["image", "image"],
    "one row": ["images in later turns"],
}


def loss_and_tokens(model: MultiModalityCausalLM, batch: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """The mean loss of a batch, and its number of learnt tokens."""
    return model(**batch, use_cache=False).loss, int((batch["labels"][:, 1:] != NOT_LEARNT).sum())


def left_padded(encoded: list[EncodedRow], processor: VLChatProcessor) -> dict[str, Any]:
    """A batch like the collator's, but padded on the left."""
    batch = dict(processor.batchify([row.item for row in encoded], padding_side="left"))
    batch["labels"] = torch.full_like(batch["input_ids"], NOT_LEARNT)
    for labels, row in zip(batch["labels"], encoded, strict=True):
        labels[-len(row.labels) :] = row.labels
    return batch


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_padding_right_or_left_or_not_at_all_gives_the_same_loss(opened, pictures, name, special, monkeypatch):
    processor, model = opened
    monkeypatch.setattr(processor, "add_special_token", special)
    rows = [conversation(pictures, *CONVERSATIONS[part]) for part in BATCHES[name]]
    encoded = [encode_row(row, processor) for row in rows]
    collator = TrainingCollator(processor)
    with torch.no_grad():
        loss, tokens = loss_and_tokens(model, collator(rows))
        left, left_tokens = loss_and_tokens(model, left_padded(encoded, processor))
        alone = [loss_and_tokens(model, collator([row])) for row in rows]
    assert tokens == left_tokens == sum(count for _, count in alone)
    torch.testing.assert_close(left, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(sum(part * count for part, count in alone) / tokens, loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_a_packed_batch_has_the_loss_and_gradients_of_the_padded_one(opened, pictures, name, mask_prompt, monkeypatch):
    processor, model = opened
    monkeypatch.setattr(processor, "mask_prompt", mask_prompt)
    rows = [conversation(pictures, *CONVERSATIONS[part]) for part in BATCHES[name]]
    results = []
    for pack in (False, True):
        batch = TrainingCollator(processor, pack=pack)(rows)
        model.zero_grad()
        loss, tokens = loss_and_tokens(model, batch)
        loss.backward()
        gradients = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
        results.append((loss.detach(), tokens, gradients))
    assert batch["input_ids"].shape == (1, sum(len(encode_row(row, processor).item) for row in rows))

    (loss, tokens, gradients), (packed_loss, packed_tokens, packed_gradients) = results
    assert tokens == packed_tokens and gradients.keys() == packed_gradients.keys()
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[key], gradient, rtol=1e-3, atol=1e-6 * scale, msg=key)


@pytest.mark.parametrize("items", [None, 77])
@pytest.mark.parametrize("made", ["padded", "padded on the left", "packed"])
@pytest.mark.parametrize("name", BATCHES)
def test_the_loss_only_is_the_loss_with_its_gradients(opened, pictures, name, made, items):
    processor, model = opened
    rows = [conversation(pictures, *CONVERSATIONS[part]) for part in BATCHES[name]]
    if made == "padded on the left":
        batch = left_padded([encode_row(row, processor) for row in rows], processor)
    else:
        batch = TrainingCollator(processor, pack=made == "packed")(rows)
    batch["num_items_in_batch"] = None if items is None else torch.tensor(items)
    results = []
    for loss_only in (False, True):
        model.zero_grad()
        output = model(**batch, use_cache=False, loss_only=loss_only)
        assert (output.logits is None) == loss_only
        output.loss.backward()
        gradients = {key: weight.grad.clone() for key, weight in model.named_parameters() if weight.grad is not None}
        results.append((output.loss.detach(), gradients))
    (loss, gradients), (only, only_gradients) = results
    torch.testing.assert_close(only, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == only_gradients.keys()
    scale = max(gradient.abs().max() for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(only_gradients[key], gradient, rtol=1e-4, atol=1e-7 * scale, msg=key)


def test_the_loss_only_needs_labels_and_no_past(opened):
    _, model = opened
    ids = torch.ones(1, 2, dtype=torch.long)
    for given in ({}, {"labels": ids, "past_key_values": DynamicCache()}):
        with pytest.raises(ValueError, match=r"^loss_only needs labels, and no past_key_values\.$"):
            model(input_ids=ids, loss_only=True, **given)


def test_where_nothing_is_learnt_the_loss_only_is_zero(opened):
    _, model = opened
    ids = torch.ones(2, 5, dtype=torch.long)
    loss = model(input_ids=ids, labels=torch.full_like(ids, NOT_LEARNT), loss_only=True, num_items_in_batch=3).loss
    loss.backward()
    assert loss == 0


def test_the_trainer_computes_no_logits_but_those_that_are_asked_for(opened, pictures, tmp_path):
    processor, model = opened
    rows = [conversation(pictures, *CONVERSATIONS[name]) for name in ("one turn", "image")]
    has_logits: list[bool] = []
    hook = model.register_forward_hook(lambda *run: has_logits.append(run[-1].logits is not None))

    def trainer(loss: Callable[..., torch.Tensor] | None = None, **options: Any) -> VLTrainer:
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=2,
            use_cpu=True,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
            **options,
        )
        return VLTrainer(
            model=model,
            args=arguments,
            processing_class=processor,
            data_collator=TrainingCollator(processor),
            train_dataset=rows,
            eval_dataset=rows,
            compute_loss_func=loss,
        )

    def mean_of_logits(output: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return output.logits.float().mean()

    plain = trainer()
    losses = [
        each.train().training_loss for each in (plain, trainer(label_smoothing_factor=0.2), trainer(mean_of_logits))
    ]
    assert has_logits == [False, True, True]
    assert len({round(loss, 4) for loss in losses}) == 3
    assert plain.evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert plain.predict(rows).predictions.shape[0] == len(rows)
    assert trainer(prediction_loss_only=True).evaluate()["eval_loss"] == pytest.approx(losses[0], rel=1e-5)
    assert has_logits[3:] == [True, True, False]
    hook.remove()
    model.train()


@pytest.mark.parametrize("name", BATCHES)
def test_a_padded_batch_has_the_loss_of_its_rows_alone(opened, pictures, name):
    processor, model = opened
    rows = [conversation(pictures, *CONVERSATIONS[part]) for part in BATCHES[name]]
    with torch.no_grad():
        loss, tokens = loss_and_tokens(model, TrainingCollator(processor)(rows))
        alone = [loss_and_tokens(model, TrainingCollator(processor)([row])) for row in rows]
    assert tokens == sum(count for _, count in alone)
    torch.testing.assert_close(loss, sum(loss * count for loss, count in alone) / tokens, rtol=1e-5, atol=0)


def test_a_packed_batch_may_be_longer_than_the_models_positions(opened, pictures):
    processor, model = opened
    row = conversation(pictures, (f"{IMAGE_TAG}Talk.", "la " * 200))
    positions = model.config.language_config.max_position_embeddings
    rows = [row] * (1 + positions // len(encode_row(row, processor).item))
    with torch.no_grad():
        losses = [loss_and_tokens(model, TrainingCollator(processor, pack=pack)(rows))[0] for pack in (False, True)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_a_slow_tokenizer_is_refused(opened, pictures, monkeypatch):
    processor, _ = opened
    monkeypatch.setattr(type(processor.tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="a fast one"):
        encode_row(replace(conversation(pictures, ("Hello.", "Yes."))), processor)
