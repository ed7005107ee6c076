"""Payloads are bytes: another process reads them, and what is no payload of this client and round is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transforms_zoo import TRANSFORMS, decoded, task, tree

from fl_lightning import ErrorFeedback, Quantize, RandomK, TopK
from fl_lightning.transforms import Codec, Eden, PayloadError, ServerCodec
from fl_lightning.types import ClientTask, Contribution
from fl_lightning.wire import pack, unpack

BUFFERS = {"norm.running_mean": torch.arange(3.0), "norm.num_batches_tracked": torch.tensor(4)}


def contribution(**scalars: float) -> Contribution:
    buffers = {name: tensor.double() * 2 for name, tensor in BUFFERS.items()}
    return Contribution({"delta": tree(), "control": tree(1), "buffers": buffers}, {"weight": 2.5, **scalars})


def codec(*transforms: Any, model: Any = None, seed: int = 5) -> Codec:
    return Codec(list(transforms), seed, tree() if model is None else model, BUFFERS)


READER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {here!r})
from transforms_zoo import TRANSFORMS, task, tree
from fl_lightning.transforms import Codec
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.payload")):
    codec = Codec([TRANSFORMS[path.stem]()], 5, tree(), torch.load(folder / "buffers.pt"))
    found = codec.decode(path.read_bytes(), task())
    torch.save({{"trees": found.trees, "scalars": found.scalars}}, path.with_suffix(".pt"))
"""


def test_a_new_process_reads_every_payload(tmp_path: Path) -> None:
    expected = {}
    torch.save(BUFFERS, tmp_path / "buffers.pt")
    for name, make in TRANSFORMS.items():
        own = codec(make())
        data, _ = own.encode(contribution(), task(), {})
        assert type(data) is bytes
        expected[name] = own.decode(data, task())
        (tmp_path / f"{name}.payload").write_bytes(data)
    program = READER.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, own in expected.items():
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert found["scalars"] == own.scalars
        assert found["trees"].keys() == own.trees.keys() == {"delta", "control", "buffers"}
        for key, values in own.trees.items():
            assert all(torch.equal(values[n], found["trees"][key][n]) for n in values), (name, key)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_buffers_and_scalars_travel_exactly(name: str) -> None:
    own = codec(TRANSFORMS[name]())
    data, _ = own.encode(contribution(norm=1 / 3), task(), {})
    found = own.decode(data, task())
    assert found.scalars == {"weight": 2.5, "norm": 1 / 3}
    assert all(torch.equal(found.trees["buffers"][n], BUFFERS[n].double() * 2) for n in BUFFERS)


@pytest.mark.parametrize("client_id", ["a", 'quoted "é" \\ id', 12, 10**12])
@pytest.mark.parametrize("weight", [1.0, 1 / 3, 1e-300, 123456789.0])
def test_the_size_that_is_computed_is_the_length_that_is_written(client_id: Any, weight: float) -> None:
    own = codec()
    for round in (0, 9, 10, 12345):
        for given in (contribution(weight=weight), Contribution({"delta": tree()}, {"weight": weight})):
            address = ClientTask(client_id, round, round * 7, {}, seed=0)
            data, _ = own.encode(given, address, {})
            assert own.size(given, address) == len(data)


def test_a_broadcast_counts_the_length_that_is_written() -> None:
    trees = {"model": tree(), "buffers": BUFFERS, "control": tree(2)}
    sent, lengths, state = codec().broadcast(trees, ["a", "b", "c"], 0, {})
    assert lengths == [len(pack(trees))] * 3
    assert sent["model"] is trees["model"]
    assert state == {}


def test_compression_is_what_it_promises_in_bytes() -> None:
    model = {"w": torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))}
    update = Contribution({"delta": model}, {"weight": 1.0})
    header = 600
    expected = {
        TopK(0.01): 1000 * 4 + 1000 * 8.6 / 8,
        RandomK(0.01): 1000 * 4,
        Quantize(4): 50_000,
        Eden(1): 12_500 + 100,
    }
    for transform, size in expected.items():
        data, _ = Codec([transform], 0, model).encode(update, task(), {})
        assert size <= len(data) <= size * 1.03 + header, transform


def test_bytes_that_were_cut_or_changed_are_refused_and_nothing_else_happens() -> None:
    for name in ("top quantised", "eden 1", "feedback low rank", "cast fp8", "random shared"):
        own = codec(TRANSFORMS[name]())
        data, _ = own.encode(contribution(), task(), {})
        draw = random.Random(0)
        for end in {0, 7, 8, 40, len(data) // 2, len(data) - 1}:
            with pytest.raises(PayloadError, match=r"its payload cannot be read"):
                own.decode(data[:end], task())
        with pytest.raises(PayloadError, match=r"its payload cannot be read"):
            own.decode(data + b"more", task())
        for _ in range(300):
            changed = bytearray(data)
            for _ in range(draw.choice((1, 5))):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            if bytes(changed) != data:
                with pytest.raises(PayloadError):
                    own.decode(bytes(changed), task())


@pytest.mark.parametrize("transforms", [[], [Quantize(8)], [TopK(0.2)]])
def test_a_single_bit_that_flipped_is_found(transforms: list[Any]) -> None:
    """Also inside of a number, where it would leave a payload that can be read, with another number in it."""
    own = codec(*transforms)
    data, _ = own.encode(contribution(), task(), {})
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(PayloadError):
            own.decode(bytes(changed), task())
    changed = bytearray(data)
    changed[-1] ^= 1
    with pytest.raises(PayloadError, match=r"checksum is \w{8}, and they say \w{8}.*[Ss]end them again"):
        own.decode(bytes(changed), task())


def test_a_payload_that_is_too_long_is_not_even_read() -> None:
    own = codec(TopK(0.5))
    with pytest.raises(PayloadError, match=r"expected at most \d+ bytes, got 3000000"):
        own.decode(bytes(3_000_000), task())


def test_a_payload_for_something_else_is_refused() -> None:
    own = codec(TopK(0.5))
    data, _ = own.encode(contribution(), task(), {})
    for other in (task(round=4), task(client_id="b"), task(dispatch_id=18)):
        with pytest.raises(PayloadError, match=r"expected \[client, round, dispatch\] .*, got \['a', 3, 17\]"):
            own.decode(data, other)
    small = {"w": torch.zeros(2)}
    for receiver in (codec(TopK(0.4)), codec(Quantize(8)), codec(TopK(0.5), model=small)):
        with pytest.raises(PayloadError, match=r"a model of other shapes, or by other transforms"):
            receiver.decode(data, task())
    message = unpack(data)
    message[0] = 99
    with pytest.raises(PayloadError, match=r"expected format 3, got 99"):
        own.decode(pack(message), task())


FORGED: dict[str, tuple[Any, str]] = {
    "other shapes": (lambda m: m[5]["delta"].update(w=torch.zeros(3)), r"'delta' have other names or shapes"),
    "other names": (lambda m: m[5]["delta"].update(extra=torch.zeros(3)), r"'delta' have other names or shapes"),
    "NaN": (lambda m: m[5]["delta"]["w"].fill_(float("nan")), r"NaN or infinite values in delta/w"),
    "infinite buffer": (
        lambda m: m[7]["buffers"]["norm.running_mean"].fill_(float("inf")),
        r"buffers/norm.running_mean",
    ),
    "other buffers": (lambda m: m[7]["buffers"].pop("norm.running_mean"), r"'buffers' have other names or shapes"),
    "infinite weight": (lambda m: m[4].update(weight=float("inf")), r"a finite number as 'weight', got inf"),
    "a word for a weight": (lambda m: m[4].update(weight="much"), r"a finite number as 'weight', got 'much'"),
    "no trees": (lambda m: m.__setitem__(5, None), r"its payload is malformed"),
    "no list": (lambda m: m.__setitem__(6, {}), r"expected codes of 0 transforms, got dict"),
    "a word for a buffer": (
        lambda m: m[7].update(buffers={"x": "y"}),
        r"'buffers' have other names or shapes|malformed",
    ),
    "complex": (lambda m: m[7].update(more={"x": torch.zeros(2, dtype=torch.complex64)}), r"real numbers"),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_payload_is_refused(what: str) -> None:
    forge, message = FORGED[what]
    own = codec()
    content = unpack(own.encode(contribution(), task(), {})[0])
    forge(content)
    with pytest.raises(PayloadError, match=message):
        own.decode(pack(content), task())


def test_forged_codes_are_refused() -> None:
    for transform, forge in (
        (TopK(0.5), lambda sealed: sealed[0]["delta"].__setitem__(0, torch.zeros(3, dtype=torch.uint8))),
        (TopK(0.5), lambda sealed: sealed[0].update(delta=None)),
        (Quantize(8), lambda sealed: sealed[0]["delta"].__setitem__(0, torch.full((4,), float("inf")))),
        (Quantize(8), lambda sealed: sealed[0]["delta"].__setitem__(1, torch.zeros(9, dtype=torch.uint8))),
        (Eden(2), lambda sealed: sealed[0].clear()),
        (ErrorFeedback(Quantize(3)), lambda sealed: sealed.append({})),
    ):
        own = codec(transform)
        content = unpack(own.encode(contribution(), task(), {})[0])
        forge(content[6])
        with pytest.raises(PayloadError, match=r"its payload (cannot be used|is malformed)"):
            own.decode(pack(content), task())


def test_a_payload_without_the_update_does_not_bring_its_weight() -> None:
    server = ServerCodec(codec(), torch.device("cpu"))
    server.open(codec().encode(contribution(), task(), {})[0], task())
    light, _ = codec().encode(Contribution({"control": tree()}, {"weight": 1e9}), task(), {})
    with pytest.raises(PayloadError, match=r"other tensors than those of clients before it"):
        server.open(light, task())


def test_seeds_are_not_in_the_payload_and_must_be_the_same() -> None:
    data, _ = codec(RandomK(0.5)).encode(contribution(), task(), {})
    right = codec(RandomK(0.5)).decode(data, task()).trees["delta"]
    wrong = codec(RandomK(0.5), seed=6).decode(data, task()).trees["delta"]
    assert any(not torch.equal(right[n], wrong[n]) for n in right)


def test_shared_places_are_decoded_once_on_the_sum() -> None:
    own = codec(RandomK(0.5, shared=True))
    total, each = {n: torch.zeros_like(t) for n, t in tree().items()}, None
    for client in ("a", "b"):
        data, _ = own.encode(Contribution({"delta": tree(ord(client))}, {"weight": 1.0}), task(client), {})
        part = own.decode(data, task(client)).trees["delta"]
        assert [t.numel() for t in part.values()] == [76]  # of 151 elements
        each = part if each is None else {n: t + each[n] for n, t in part.items()}
        for name, tensor in decoded(RandomK(0.5, shared=True), tree(ord(client)), seed=5, client_id=client).items():
            total[name] += tensor
    assert each is not None
    finished, _ = own.finish(Contribution({"delta": each}, {"weight": 2.0}), task().round, {})
    for name in total:
        torch.testing.assert_close(finished.trees["delta"][name], total[name])
    assert json.loads(json.dumps(finished.scalars)) == {"weight": 2.0}
