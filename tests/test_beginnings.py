"""A row begins as the model was trained to begin.

That is with what the tokenizer puts before a text, or, where it puts nothing, with the separator.
"""

import hashlib
import random

import pytest
import torch
from conftest import CONFIGS, random_sae, tiny
from worlds import BOS, EOS, FAMILIES, TWO, texts, tokenizer

from sae_lora.files import UsageError
from sae_lora.hidden import hidden
from sae_lora.lm import decoder_blocks, load_lm, special_ids
from sae_lora.metrics import fidelity
from sae_lora.splice import splice
from sae_lora.text import beginning, model_inputs, separator, targets, text_rows, token_blocks

ADDS = {
    "bos": ("<bos> $A", [BOS]),
    "bos and eos": ("<bos> $A <eos>", [BOS]),
    "two": ("<bos> <two> $A", [BOS, TWO]),
    "nothing": (None, [EOS]),
    "eos after": ("$A <eos>", [EOS]),
    "eos before": ("<eos> $A", [EOS]),
}


@pytest.mark.parametrize("kind", ADDS)
def test_a_beginning_is_what_the_tokenizer_puts_before_a_text(kind):
    template, begins = ADDS[kind]
    tok = tokenizer(template)
    assert beginning(tok) == begins and separator(tok) == EOS
    assert beginning(tok, "<two>") == [TWO]  # a separator that is given stands at the beginning too


def test_endoftext_parts_documents_where_the_vocabulary_has_it():
    assert beginning(tokenizer(endoftext=True)) == [EOS]
    assert beginning(tokenizer("<bos> $A", endoftext=True)) == [BOS]
    tok = tokenizer("<bos> $A", endoftext=True)
    tok.eos_token = "<two>"
    assert separator(tok) == EOS


def test_no_separator_and_no_room_are_told():
    tok = tokenizer("<bos> <two> $A")
    with pytest.raises(UsageError, match="length=2 is taken up.*give 3 or more"):
        token_blocks(texts(), tok, 2)
    with pytest.raises(UsageError, match="too short"):
        token_blocks(["w5 w6"], tok, 64, per_document=True)
    with pytest.raises(UsageError, match="too short.*one side fills no row"):
        token_blocks(texts(), tok, 16, share=1.0)  # all is held out, and rows to train on are asked
    tok.eos_token = None
    with pytest.raises(UsageError, match="neither <|endoftext|> nor"):
        token_blocks(texts(), tok, 8)


def documents_of(rows, start) -> list[list[int]]:
    """The documents in rows that keep them apart, by where positions begin again.

    The row's own first one is left out.
    """
    found = []
    for ids, positions in rows.tolist():
        at = [i for i, p in enumerate(positions) if p in (0, -1)] + [len(ids)]
        found += [ids[a:b] for a, b in zip(at[1:], at[2:])]
    return found


@pytest.mark.parametrize("kind", ADDS)
def test_rows_of_every_mode(kind):
    template, start = ADDS[kind]
    tok, given = tokenizer(template), [tokenizer()(t).input_ids for t in texts()]
    packed = token_blocks(texts(), tok, 16, 2**12, 0, share=0.0).train
    whole = [i for row in packed.tolist() for i in row[len(start) :]]
    parted = [i for d in given for i in d + [EOS]]
    assert (packed[:, : len(start)] == torch.tensor(start)).all() and whole == parted[: len(whole)]

    padded = token_blocks(texts(), tok, 48, 2**12, 0, share=0.0, pack=False).train
    unpadded = [row[row >= 0].tolist() for row in padded]
    assert unpadded == [start + d for d in given]

    apart = token_blocks(texts(), tok, 48, 2**12, 0, share=0.0, per_document=True).train
    assert (apart[:, 0, : len(start)] == torch.tensor(start)).all()
    inside = documents_of(apart, start)
    assert len(inside) > 5
    for d in inside:
        assert (
            d[: len(start)] == start
        )  # each has a beginning of its own, but perhaps at the end of a row
        if start == [EOS]:
            assert EOS not in d[1:]
        elif EOS in d:
            assert d.index(EOS) == len(d) - 1 and d[len(start) : -1] in given


def test_a_beginning_within_a_row_is_not_to_be_predicted():
    tok = tokenizer("<bos> <two> $A")
    rows = token_blocks(texts(), tok, 48, 2**12, 0, share=0.0, per_document=True).train
    ids, wanted = rows[:, 0], targets(rows)
    inputs = model_inputs(rows)
    new = (ids == BOS) | (ids == TWO)
    assert (
        new[:, 2:].any()
        and ((wanted == -1) == new[:, 1:]).all()
        and (wanted == ids[:, 1:])[~new[:, 1:]].all()
    )
    assert (inputs["position_ids"] >= 0).all() and (
        (inputs["position_ids"] == 0) == (ids == BOS)
    ).all()
    assert (inputs["position_ids"][ids == TWO] == 1).all() and "attention_mask" not in inputs
    plain = token_blocks(texts(), tokenizer(), 48, 2**12, 0, share=0.0, per_document=True).train
    assert targets(plain).equal(plain[:, 0, 1:]) and targets(rows[:, 0]).equal(rows[:, 0, 1:])


def test_no_row_has_two_beginnings_at_its_start():
    tok = tokenizer("<bos> $A")
    for length in range(4, 24):
        rows = token_blocks(texts(), tok, length, 2**12, 0, share=0.0, per_document=True).train
        assert (rows[:, 0, 1] != BOS).all()


def test_a_text_to_steer_begins_like_a_row():
    assert text_rows(["w5 w6", "w7"], tokenizer("<bos> $A <eos>")).tolist() == [
        [BOS, 5, 6],
        [BOS, 7, -1],
    ]


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_in_every_mode(name, adds):
    lm, saes = tiny(name), {1: random_sae()}
    tok = tokenizer("<bos> $A" if adds else None, endoftext=name.startswith("qwen"))
    for mode in ({}, dict(per_document=True), dict(pack=False)):
        rows = token_blocks(texts(), tok, 32, 2**10, 0, share=0.0, **mode).train[:4]
        ids = rows.flatten(1)[:, 0]
        assert (ids == (BOS if adds else EOS)).all()
        inputs, seen = model_inputs(rows), []
        handle = decoder_blocks(lm)[1].register_forward_hook(
            lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        h = hidden(lm, inputs, 1)
        with splice(lm, saes):
            lm(**inputs)
        handle.remove()
        assert seen[-1][:, 0].equal(h[:, 0]) and not seen[-1][:, 1].equal(
            h[:, 1]
        )  # the first position is kept, the second not
        report = fidelity(lm, saes, rows)
        assert report["ce"]["base"] > 0 and report["kl"]["spliced"] > 0


@pytest.mark.parametrize(
    "name", sorted(set(CONFIGS) - {"opt", "bloom", "falcon"})
)  # their masks take no heed of positions
@torch.no_grad()
def test_a_document_in_a_row_is_the_document_alone(name):
    lm, tok = tiny(name), tokenizer("<bos> $A")
    row = token_blocks(texts(), tok, 48, 2**12, 0, share=0.0, per_document=True).train[:1]
    starts = (row[0, 1] < 0).nonzero()[:, 0].tolist()
    a, b = starts[1], starts[2] if len(starts) > 2 else row.shape[-1]
    together = lm(**model_inputs(row)).logits[:, a:b]
    torch.testing.assert_close(together, lm(input_ids=row[:, 0, a:b]).logits, rtol=1e-4, atol=1e-4)


WORDS = (
    "the sea tide lighthouse keeper wrote a letter about two small boats and one storm "
    "that nobody saw coming"
).split()


def stories(n: int = 160) -> list[str]:
    "Texts of a few to a few hundred words; two are blank, and one holds the separator itself."
    draw, found = random.Random(0), []
    for i in range(n):
        sentences = [
            " ".join(draw.choices(WORDS, k=draw.randint(3, 14))).capitalize() + "."
            for _ in range(draw.randint(1, 24))
        ]
        found.append(f"{i}. " + " ".join(sentences))
    return found[:40] + ["", " \n"] + found[40:] + ["One<|endoftext|>two."]


KNOWN = {  # options, sha256 of train and valid ids, shapes, hash; computed with 0.1.0
    "packed": ({}, "750cc8b2be571186", (256, 64), (32, 64), "d07d9e9d9dfb"),
    "per_document": (
        dict(per_document=True),
        "7d3cb3f8f537ea0d",
        (256, 2, 64),
        (32, 2, 64),
        "ded9364e31fd",
    ),
    "padded": (dict(pack=False), "aa0415ce1fae9891", (124, 64), (18, 64), "b03a2c0cb56f"),
    "cut": (dict(cut=0.75), "e5010905778ccc76", (233, 64), (32, 64), "d07d9e9d9dfb"),
    "sentences": (
        dict(per_document=True, cut=1.0, between=(20, 20), sep="<|im_start|>", lead=" "),
        "32c24e96b3632e65",
        (256, 2, 64),
        (32, 2, 64),
        "0052e36cace6",
    ),
    "sep": (dict(sep="<|im_end|>"), "d67c034b1eaddfaf", (256, 64), (32, 64), "0c96f1231c8a"),
    "lead": (dict(lead="\n"), "e3d9eea1921d21e3", (256, 64), (32, 64), "28e95c4db5ba"),
    "padded_sep": (
        dict(pack=False, sep="<|im_start|>"),
        "7c4475cefe79ac80",
        (124, 64),
        (18, 64),
        "440b7203e4af",
    ),
    "odd": (
        dict(length=37, share=0.3, cut=0.5, per_document=True),
        "a28090ef49b1e4f8",
        (373, 2, 37),
        (55, 2, 37),
        "d5c3d94f875c",
    ),
}


@pytest.mark.parametrize("mode", KNOWN)
def test_rows_of_smollm2_are_as_they_were(world, mode):
    options, digest, train, valid, name = KNOWN[mode]
    blocks = token_blocks(
        stories(),
        world[1],
        **dict(length=64, tokens=2**14, valid_tokens=2**11, share=0.2) | options,
    )
    assert (tuple(blocks.train.shape), tuple(blocks.valid.shape), blocks.hash) == (
        train,
        valid,
        name,
    )
    assert (
        hashlib.sha256(blocks.train.numpy().tobytes() + blocks.valid.numpy().tobytes()).hexdigest()[
            :16
        ]
        == digest
    )
    assert (
        blocks.train >= (0 if mode not in ("padded", "padded_sep") else -1)
    ).all() and beginning(world[1]) == [0]


@torch.no_grad()
def test_gemma_is_what_it_should_be():
    lm, tok = load_lm("gemma-3-270m", dtype=torch.float32)
    config = lm.config
    assert (
        lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
        and config.num_hidden_layers == 18
    )
    assert [i for i, b in enumerate(decoder_blocks(lm)) if not b.self_attn.sliding_window] == [
        5,
        11,
        17,
    ] and config.sliding_window == 512
    assert (
        tok("x").input_ids[0] == tok.bos_token_id
        and tok.decode(beginning(tok)) == "<bos>"
        and tok.decode(separator(tok)) == "<eos>"
    )
    long = token_blocks("docs", tok, 700, 1400, 0, share=0.0).train[:1]
    other = long.clone()
    other[0, 100] = 500
    reached = (
        (hidden(lm, model_inputs(long), 0) != hidden(lm, model_inputs(other), 0))
        .any(-1)[0]
        .nonzero()[:, 0]
    )
    assert (int(reached.min()), int(reached.max())) == (100, 100 + config.sliding_window - 1)
    said = lm.generate(
        **tok("Monday, Tuesday, Wednesday,", return_tensors="pt"), max_new_tokens=3, do_sample=False
    )
    assert tok.decode(
        said[0]
    ) == "<bos>Monday, Tuesday, Wednesday, Thursday, Friday" and special_ids(lm) == [0, 1, 2, 3]

    def ce(**options):
        total = count = 0
        for rows in token_blocks("default", tok, 256, 256, 4 * 256, **options).valid.split(2):
            z, wanted = lm(**model_inputs(rows)).logits[:, :-1], targets(rows)
            total += float(
                torch.nn.functional.cross_entropy(
                    z.flatten(0, 1), wanted.flatten(), reduction="sum"
                )
            )
            count += wanted.numel()
        return total / count

    right, wrong = ce(), ce(sep="<eos>")
    assert right < 3.05 and wrong > right + 0.8
