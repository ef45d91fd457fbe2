"""The closed pickle reader: equal to pickle.loads on builtin values, and refusing, without running it, all else."""
import collections
import datetime
import decimal
import math
import pickle
import time
from fractions import Fraction

import numpy as np
import pytest

from reward_utils.legacy_pickle import MAX_BYTES, dumps, loads

SHARED = [1.5]
VALUES = [
    {"outputs": [0.5, 1.0, 0.25]}, {"scores": [1, 0.5], "group_rewards": {"counting": [1.0, -10.0], "colors": []}},
    None, True, False, 0, -1, 255, 256, 65536, -2 ** 31, 2 ** 63, -(2 ** 200), 2 ** 2000, 0.1, -0.0, math.inf,
    "", "ü 🏠\n", "x" * 300, "x" * 70000, b"", b"\x00\xff" * 200, b"x" * 70000,
    [], {}, (), set(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[], [[]]], {"a": {"b": (1, [2])}},
    {1: 2, None: 3, 1.5: 4},
    [SHARED, SHARED, {"again": SHARED}], list(range(5000)),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_builtin_values_are_read_as_pickle_reads_them(value, protocol):
    data = pickle.dumps(value, protocol)
    needs_a_call = protocol < 3 and isinstance(value, bytes) or protocol < 4 and isinstance(value, set)
    if needs_a_call:  # these protocols write bytes and sets as calls of codecs.encode and set
        with pytest.raises(ValueError, match="refused a pickle"):
            loads(data)
    else:
        assert loads(data) == value and type(loads(data)) is type(value)


def test_sets_sharing_and_nan():
    for value in ({1, "a"}, frozenset({1, "a"}), {b"k": {2.5, None}}):
        assert loads(pickle.dumps(value, 4)) == value
    outer = loads(pickle.dumps([SHARED, SHARED]))
    assert outer[0] is outer[1]
    assert math.isnan(loads(pickle.dumps(math.nan)))
    recursive = []
    recursive.append(recursive)
    copy = loads(pickle.dumps(recursive))
    assert copy[0] is copy
    assert loads(pickle.dumps([0.5])[:-1] + b"q\x01.") == [0.5]  # a memo that nobody uses


def test_requests_can_be_read_by_any_pickle():
    request = {"images": [b"jpeg"], "meta_datas": [{"tag": "a", "include": []}], "only_strict": False}
    assert pickle.loads(dumps(request)) == request == loads(dumps(request))


class Runs:
    """Calls `function(*arguments)` when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Plain:
    pass


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_called(tmp_path, protocol):
    made = tmp_path / "made"
    data = pickle.dumps({"outputs": Runs(open, str(made), "w")}, protocol)
    with pytest.raises(ValueError, match="holds more than builtin containers and numbers") as error:
        loads(data)
    assert not made.exists() and "\n" not in str(error.value)
    pickle.loads(data)["outputs"].close()
    assert made.exists()  # what the test guards against is real


@pytest.mark.parametrize("value", [
    np.float32(0.5), np.float64(0.5), np.zeros(2), Plain(), Plain, len, complex(1, 2), bytearray(b"x"), range(3),
    decimal.Decimal(1), Fraction(1, 2), datetime.date(2026, 1, 1), collections.OrderedDict(a=1), Exception("x"),
    slice(1), object(), Ellipsis, eval,
], ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_everything_else_is_refused(value, protocol):
    with pytest.raises(ValueError, match="refused a pickle"):
        loads(pickle.dumps([1.0, value], protocol))


@pytest.mark.parametrize("program", [
    b"cos\nsystem\n(S'true'\ntR.",  # GLOBAL, REDUCE
    b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
    b"(ios\nsystem\n.", b"(cos\nsystem\no.",  # INST, OBJ
    b"\x80\x02]q\x00}q\x01b.",  # BUILD on a list
    b"\x80\x02\x82\x01.", b"\x80\x02\x83\x01\x00.", b"\x80\x02\x84\x01\x00\x00\x00.",  # extension registry
    b"Pid\n.", b"\x80\x02K\x01Q.",  # persistent ids
    b"\x80\x02]K\x01\x81.", b"\x80\x04]]}\x92.",  # NEWOBJ, NEWOBJ_EX
    b"\x80\x05\x97.", b"\x80\x05K\x01\x98.",  # out-of-band buffers
    b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00x.",  # BYTEARRAY8
], ids=repr)
def test_instructions_that_make_or_call_things_are_refused(program):
    with pytest.raises(ValueError, match="refused a pickle"):
        loads(program)


@pytest.mark.parametrize("data", [
    b"", b".", b"<html>", b"not a pickle", b"\x80\x04", b"K\x01K\x02.", b"(.", b"a.", b"]a.",
    b"K\x01K\x02a.", b"]K\x01s.", b"}K\x01s.", b"}(K\x01u.", b"(K\x01d.", b"h\x05.", b"q\x05.", b"t.", b"u.", b"\x85.",
    b"\x86.", b"X\xff\xff\xff\xff", b"Ix\n.", b"Lx\n.", b"Fx\n.", b"\x8b\xff\xff\xff\xff.", b"\x80\x04K\x01\x90.",
    pickle.dumps({"outputs": [0.5] * 20})[:-9],
], ids=repr)
def test_damaged_pickles_are_value_errors(data):
    with pytest.raises(ValueError, match="pickle"):
        loads(data)


def test_every_damaged_byte_is_a_value_error_or_a_value():
    data = pickle.dumps({"scores": [0.5, 1], "group": {"a": (1, None, {2})}, "text": "ä"})
    rng = np.random.default_rng(0)
    for _ in range(2000):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            broken[position] = rng.integers(256)
        try:
            loads(bytes(broken))
        except ValueError as error:
            assert "pickle" in str(error)


def test_hostile_sizes():
    """Bombs that pickle.loads itself would fall for; none takes memory or time here."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"at most {MAX_BYTES}"):
        loads(b"]" * (MAX_BYTES + 1))
    assert loads(b"\x80\x02]r\xff\xff\xff\x7f.") == []  # a memo index that makes pickle allocate 34 GB
    exabyte = b"\xff" * 7 + b"\x0f."
    for claim in (b"\x8e" + exabyte, b"\x8d" + exabyte, b"B\xff\xff\xff\x7f."):
        with pytest.raises(ValueError, match="pickle"):
            loads(b"\x80\x04" + claim)
    doubling = b")" + b"q\x00h\x00\x86" * 60  # tuples of tuples: 2 ** 60 leaves for whoever hashes it
    with pytest.raises(ValueError, match="a tuple as a key or member"):
        loads(b"}" + doubling + b"K\x01s.")
    with pytest.raises(ValueError, match="a tuple as a key or member"):
        loads(b"\x8f(" + doubling + b"\x90.")
    with pytest.raises(ValueError, match="a tuple as a key or member"):
        loads(b"(" + doubling + b"\x91.")
    deep = loads(b"]" * 100_000 + b"a" * 99_999 + b".")
    assert len(deep) == 1
    assert time.monotonic() - start < 20
