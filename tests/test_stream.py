"""SAEs from a stream: what is handed out, how much is held, and that it goes on exactly."""

import os
import signal

import pytest
import torch
from conftest import tiny

from sae_lora import stream as room
from sae_lora.files import Stopped, UsageError
from sae_lora.metrics import sparsity, usual
from sae_lora.new_saes import new_sae, new_transcoder, training_loss
from sae_lora.sites import Site, hook_point
from sae_lora.states import harvest
from sae_lora.stream import Stream, fit_stream
from sae_lora.train_sae import fit_sae

MLP = Site(2, "hook_mlp_out")
READS = Site(2, "mlp.hook_in")


def some_rows(n: int = 40, seed: int = 1):
    return torch.randint(3, 97, (n, 16), generator=torch.Generator().manual_seed(seed))


def timeless(row: dict) -> dict:
    "A row of a curve without the seconds that it took."
    return {name: value for name, value in row.items() if "seconds" not in name}


def told_apart(x) -> list:
    "Hidden states as a sorted list, in which each is told from the others."
    return sorted(x.double().cumsum(1).sum(1).tolist())


def test_an_sae_goes_on_with_the_states_it_had_alone(tmp_path):
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    given = dict(tokens=1024, width=32, k=4, batch=64, metadata=dict(hook_name="x"))
    given["checkpoint"] = tmp_path / "state.safetensors"
    fit_sae(x, **given)
    fit_sae(x.clone(), **given)
    with pytest.raises(UsageError, match="states="):
        fit_sae(x + 1, **given)


@pytest.mark.parametrize("size", [64, 150, 100_000])
def test_a_pass_gives_each_position_once(size):
    lm, rows = tiny("llama"), some_rows()
    gathered = harvest(lm, rows, 1)
    gathered = gathered[usual(gathered.float().norm(dim=-1))]
    n = len(gathered)
    assert n == 40 * 15
    stream = Stream(lm, rows, at=[1], written=[1], size=size)

    def one_pass():
        return torch.cat([stream.take(25)[1] for _ in range(n // 25)])

    first, second = one_pass(), one_pass()
    assert told_apart(first) == told_apart(second) == told_apart(gathered)
    assert not torch.equal(first, gathered) and not torch.equal(first, second)
    assert stream.told()["positions"] == n and stream.told()["passes"] == 2
    assert float(stream.told()["model_seconds"]) > 0


def test_batches_go_on_over_the_end_of_a_pass():
    lm, rows = tiny("llama"), some_rows(7)
    gathered = harvest(lm, rows, 1)
    stream = Stream(lm, rows, at=[1], written=[1], size=64)
    found = torch.cat([stream.take(32)[1] for _ in range(105)])  # 32 passes of 105
    for i in range(32):
        assert told_apart(found[105 * i : 105 * (i + 1)]) == told_apart(gathered)


def test_sites_of_a_batch_are_of_the_same_positions():
    lm, rows = tiny("llama"), some_rows()
    stream = Stream(lm, rows, at=[1, READS, MLP], written=[1, MLP], size=128)
    one, reads, writes = harvest(lm, rows, [1, READS, MLP])
    place = {tuple(x.tolist()): i for i, x in enumerate(one)}
    found = stream.take(60)
    which = [place[tuple(x.tolist())] for x in found[1]]
    assert torch.equal(found[READS], reads[which]) and torch.equal(found[MLP], writes[which])
    assert sorted(which) != which and len(set(which)) == 60


def test_neighbours_are_parted():
    "A batch is of many rows, and of the whole buffer."
    lm, rows = tiny("llama"), some_rows(200)
    stream = Stream(lm, rows, at=[0], written=[0], size=1200)
    row_of = {tuple(x.tolist()): i // 15 for i, x in enumerate(harvest(lm, rows, 0))}

    def rows_of_a_batch():
        return {row_of[tuple(x.tolist())] for x in stream.take(50)[0]}

    assert min(len(rows_of_a_batch()) for _ in range(20)) > 25


def test_the_buffer_is_bounded(monkeypatch):
    lm, rows = tiny("llama"), some_rows()
    most = []
    stream = Stream(lm, rows, at=[1, 2], written=[1, 2], size=100)
    before = [x.data_ptr() for x in stream.buffer.states]
    assert all(x.shape == (100, 32) and x.dtype == torch.bfloat16 for x in stream.buffer.states)
    put = type(stream.buffer).put

    def watched(buffer, found):
        put(buffer, found)
        most.append(int(buffer.held))

    monkeypatch.setattr(type(stream.buffer), "put", watched)
    for _ in range(40):
        stream.take(50)
        held = stream.buffer.slots.sort().values
        assert torch.equal(held, torch.arange(100))
    assert 50 < max(most) <= 100
    assert [x.data_ptr() for x in stream.buffer.states] == before


def test_stray_sinks_are_left_out():
    lm, rows = tiny("llama"), some_rows()
    gathered = harvest(lm, rows, 1)
    with torch.no_grad():  # one token becomes a sink
        lm.get_input_embeddings().weight[50] *= 1000
    kept = usual(harvest(lm, rows, 1).float().norm(dim=-1))
    assert 0 < int((~kept).sum()) < 30
    stream = Stream(lm, rows, at=[1], written=[1], size=300)
    found = stream.take(100)[1]
    while stream.told()["positions"] < int(kept.sum()):
        found = torch.cat([found, stream.take(1)[1]])
    assert told_apart(found) == told_apart(harvest(lm, rows, 1)[kept])
    assert len(found) < len(gathered)


SPECS = [
    dict(site=1, width=64, k=4),
    dict(site=1, width=48, k=8, seed=5),
    dict(site=MLP, width=64, k=4, transcoder=True, skip=True),
]
GIVEN = dict(tokens=1600, batch=50, buffer=128, lr=1e-2, dead_after=300, points=8)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_saes_together_are_those_trained_alone():
    lm, rows = tiny("llama"), some_rows()
    together = fit_stream(lm, rows, SPECS, **GIVEN)
    for spec, (sae, curve) in zip(SPECS, together):
        ((alone, own),) = fit_stream(lm, rows, [spec], **GIVEN)
        assert same(sae, alone)
        assert [row["loss"] for row in curve] == [row["loss"] for row in own]
    assert not same(together[0][0], together[1][0])
    meta = together[2][0].cfg.metadata
    assert (meta.hook_name, meta.hook_name_out) == (hook_point(READS), hook_point(MLP))
    assert meta.model_name == "tiny-llama"


@pytest.mark.parametrize("stop", [4, 12, 28])
def test_a_stopped_run_goes_on_exactly(stop, tmp_path):
    lm, rows = tiny("llama"), some_rows()
    file = tmp_path / "state.safetensors"
    whole = fit_stream(lm, rows, SPECS, **GIVEN)

    def stopping(row):
        if row["step"] == stop:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped):
        fit_stream(lm, rows, SPECS, **GIVEN, checkpoint=file, callback=stopping)
    again = fit_stream(lm, rows, SPECS, **GIVEN, checkpoint=file)
    for (a, curve), (b, other) in zip(whole, again):
        assert same(a, b)
        assert [timeless(row) for row in curve] == [timeless(row) for row in other]
    with pytest.raises(UsageError, match="seed=0, not seed=1"):
        fit_stream(lm, rows, SPECS, **GIVEN, checkpoint=file, seed=1)
    with pytest.raises(UsageError, match="holds a run with rows="):
        fit_stream(lm, rows.flip(0), SPECS, **GIVEN, checkpoint=file)


def test_a_large_buffer_is_as_good_as_gathering():
    lm, rows = tiny("llama"), some_rows(200)
    given = dict(tokens=15_000, width=64, k=8, lr=1e-2, batch=100)
    plain, _ = fit_sae(harvest(lm, rows, 1), **given, metadata=dict(hook_name="x"))
    spec = dict(site=1, width=given.pop("width"), k=given.pop("k"))
    found = [sparsity(lm, plain, 1, rows)["fvu"]]
    for buffer in (10**6, 500):
        ((sae, curve),) = fit_stream(lm, rows, [spec], **given, buffer=buffer)
        found.append(sparsity(lm, sae, 1, rows)["fvu"])
    assert found[0] < 0.6 and max(found) - min(found) < 0.05 * found[0]
    assert curve[-1]["positions"] == 3000 and 5 <= curve[-1]["passes"] < 5.5
    assert 0 < curve[-1]["model_seconds"] < curve[-1]["seconds"]


def test_the_model_does_not_run_for_more_than_is_taken():
    lm, rows = tiny("llama"), some_rows(40)
    given = dict(batch=32, buffer=640)
    passes = {}
    for tokens in (128, 608, 640):  # of 600 positions
        ((_, curve),) = fit_stream(lm, rows, [dict(site=1, width=32, k=4)], tokens, **given)
        passes[tokens] = curve[-1]["passes"]
        assert curve[-1]["positions"] == min(tokens, 600)
    assert passes == {128: 0.4, 608: 1.2, 640: 1.2}  # eight rows at a time


def test_what_is_not_yet_seen_is_not_counted():
    lm, rows = tiny("llama"), some_rows()
    told = []
    given = GIVEN | dict(points=32, tokens=800)
    fit_stream(lm, rows, SPECS[:1], **given, callback=lambda row: told.append(row["positions"]))
    assert told == [50 * i for i in range(1, 13)] + [600] * 4


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(specs=[]), "no SAE"),
        (dict(specs=[dict(width=8)]), "no site"),
        (dict(specs=[dict(site=1, widht=8)]), "widht"),
        (dict(specs=[dict(site=1, width=8, k=9)]), "k 9"),
        (dict(specs=[dict(site=1, skip=True)]), "transcoder=True"),
        (dict(specs=[dict(site=1, transcoder=True)]), "a transcoder at"),
        (dict(specs=[dict(site=9)]), "layer 9"),
        (dict(buffer=99), "buffer 99; give 100"),
        (dict(buffr=99), "buffr"),
    ],
)
def test_mistakes_are_told(wrong, said):
    given = dict(specs=SPECS) | GIVEN | wrong
    with pytest.raises(UsageError, match=said):
        fit_stream(tiny("llama"), some_rows(), **given)


def test_rows_without_positions_are_refused():
    with pytest.raises(UsageError, match="no position"):
        fit_stream(tiny("llama"), torch.ones(4, 16, dtype=torch.long), SPECS, **GIVEN)


@pytest.mark.parametrize("dead", [0, 3, 20, 64])
@pytest.mark.parametrize("kind", ["sae", "transcoder"])
def test_the_sparse_loss_is_the_dense_one(kind, dead):
    "Loss and gradients of every parameter, against SAELens' dense step."
    torch.manual_seed(0)
    x, y = torch.randn(200, 32), torch.randn(200, 32)
    if kind == "sae":
        (sae, _), y = new_sae(x, width=64, k=6), x
    else:
        sae, _, _ = new_transcoder(x, y, width=64, k=6, skip=True)
    for p in sae.parameters():
        p.data += 0.1 * torch.randn_like(p)
    mask = torch.arange(64) < dead
    latents, before = sae.encode_with_hidden_pre(x)
    out = sae.decode(latents) + (x @ sae.W_skip.T if kind == "transcoder" else 0)
    dense = (out - y).pow(2).sum(-1).mean() + sae.calculate_topk_aux_loss(y, out, before, mask)
    wanted = torch.autograd.grad(dense, list(sae.parameters()))
    loss, fired = training_loss(sae, x, y, mask)
    found = torch.autograd.grad(loss, list(sae.parameters()))
    torch.testing.assert_close(loss, dense)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(fired, (latents > 0).any(0))


def test_experiments_take_saes_from_a_stream(tmp_path, monkeypatch):
    from sae_lora import experiments
    from sae_lora.text import Blocks

    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path / "cache"))
    lm, rows = tiny("llama"), some_rows(200)
    blocks = Blocks(rows, rows[:4], "made up", "0" * 12, {})
    spec = dict(layer=1, width=64, k=4, tokens=3000)
    plain = experiments.trained_sae(lm, blocks, **spec)
    streamed = experiments.trained_sae(lm, blocks, **spec, stream=True)
    assert not torch.equal(plain.W_dec, streamed.W_dec)
    gathered, passed = plain.cfg.metadata.training, streamed.cfg.metadata.training
    assert 0 < passed["model_seconds"] < passed["seconds"]
    assert gathered["positions"] == 3000 and passed["positions"] == 2048  # 2 steps
    runs = [dict(sae=[spec | dict(layer=2, stream=True), spec | dict(layer=3)])]
    assert experiments._untrained(lm, blocks, runs) == [3]  # what is streamed is not gathered


def test_the_room_says_so_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(room, "memory_of", lambda device: 1000)
    with pytest.raises(UsageError, match="give fewer positions"):
        fit_stream(tiny("llama"), some_rows(), SPECS, **GIVEN)
