"""Traces are read as meant or refused by file, line and field.

The long run: MNEMOSYNE_TRACES=20000 pytest tests/test_traces.py
"""

import json
import math
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.traces import (
    Arrival,
    TraceError,
    describe,
    read,
)

FUZZED = int(os.environ.get("MNEMOSYNE_TRACES", 500))
SHARED = Path(__file__).parent.parent.parent / "shared" / "traces"

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951691,396,109
2023-11-17 00:00:00.0000000,879,55
"""
MOONCAKE = """{"timestamp": 5000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 5250, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}
"""
BURST = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45.5,"GPT-4, new",1087,230,1317,Conversation log
"""
LENGTHS = """num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio
74,918,992,0.0806100217864923
290,905,1195,0.3204419889502762
"""
VALID = {"azure": AZURE, "mooncake": MOONCAKE, "burst": BURST, "lengths": LENGTHS}


@pytest.fixture
def trace(tmp_path):
    """A function that writes a trace and reads it."""

    def written(content: str | bytes):
        path = tmp_path / "trace.csv"  # whatever it holds
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read(path)

    return written


def lengths(arrivals):
    return [(one.prompt_tokens, one.new_tokens) for one in arrivals]


def times_s(arrivals):
    return [one.arrival_s for one in arrivals]


# What is in shared/traces/README.md: requests; p50, p99, max of the prompt; p50, max of the output; span and pace.
@pytest.mark.parametrize(
    "name,requests,prompt,output,span_s,per_s",
    [
        ("azure23_conv.csv", 19_366, (1020, 4142, 14_050), (129, 1000), 3502, 5.5),
        ("mooncake_conversation_trace.jsonl", 12_031, (6909, 85_400, 126_195), (350, 2000), 3537, 3.4),
        ("sharegpt_8k_lengths.csv", 30_731, (1730, 7434, 8141), (415, 1024), None, None),
    ],
)
def test_shared_traces_are_as_their_readme_says(name, requests, prompt, output, span_s, per_s):
    if not (SHARED / name).is_file():
        pytest.skip(f"needs {SHARED / name}")
    found = describe(read(SHARED / name))
    assert found["requests"] == requests and found["long_requests"] == 0
    assert tuple(round(found[f"prompt_tokens_{k}"]) for k in ("p50", "p99", "max")) == prompt
    assert tuple(round(found[f"new_tokens_{k}"]) for k in ("p50", "max")) == output
    if span_s is None:
        assert found["span_s"] is found["requests_per_s"] is None
    else:
        assert round(found["span_s"]) == span_s and round(found["requests_per_s"], 1) == per_s


def test_azure(trace):
    assert trace(AZURE) == [
        Arrival("2", 0.0, 374, 44),
        Arrival("3", 4.3145791, 396, 109),  # to the 100 ns
        Arrival("4", 20653.31941, 879, 55),
    ]


def test_dates_may_be_of_any_year(trace):
    first, last = "0001-01-01 00:00:00+23:59", "9999-12-31 23:59:59-23:59"
    assert times_s(trace(f"timestamp,ContextTokens,GeneratedTokens\n{last},1,1\n{first},1,1\n"))[0] == 0


@pytest.mark.parametrize("zone", ["", "Z", "+00:00", " +00:00", "-00:00"])
@pytest.mark.parametrize("between", " T")
@pytest.mark.parametrize("fraction", ["", ".5", ".5000000", ".500000000"])
def test_dates_however_written(trace, zone, between, fraction):
    first, second = (f"2024-05-10{between}00:00:0{n}{fraction}{zone}" for n in (0, 9))
    assert times_s(trace(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{first},1,1\n{second},1,1")) == [0.0, 9.0]


def test_other_time_zones_are_honoured(trace):
    rows = ["2024-05-10 02:00:00+02:00,1,1", "2024-05-10 00:00:01,2,2", "2024-05-09 19:30:02-04:30,3,3"]
    assert times_s(trace("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))) == [0.0, 1.0, 2.0]


def test_mooncake(trace):
    assert trace(MOONCAKE) == [Arrival("1", 0.0, 6758, 500), Arrival("2", 0.25, 7322, 490)]


def test_burst(trace):
    assert trace(BURST) == [Arrival("2", 0.0, 472, 18), Arrival("3", 40.5, 1087, 230)]


@pytest.mark.parametrize(
    "names",
    [
        "num_prefill_tokens,num_decode_tokens",
        "prompt_tokens,output_tokens",
        "input_length,output_length",
        "ContextTokens,GeneratedTokens",
        "Request tokens,Response tokens",
        " PROMPT_TOKENS , OUTPUT_TOKENS",
    ],
)
@pytest.mark.parametrize("arrival", ["arrived_at", "arrival_s", "timestamp"])
def test_lengths_with_or_without_seconds(trace, names, arrival):
    found = trace(f"{names}\n74,918\n290,905\n")
    assert lengths(found) == [(74, 918), (290, 905)] and [one.id for one in found] == ["2", "3"]
    assert all(math.isnan(at_s) for at_s in times_s(found))
    assert times_s(trace(f"{arrival},{names}\n0.5,74,918\n2e+00,290,905\n")) == [0.0, 1.5]


@pytest.mark.parametrize("text", VALID.values(), ids=VALID)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.removesuffix("\n"),
        lambda text: text + "\n \t\n\n",
    ],
    ids=["byte order mark", "CRLF", "CR", "no last newline", "blank lines"],
)
def test_a_file_is_read_whatever_surrounds_its_lines(trace, text, change):
    assert repr(trace(change(text))) == repr(trace(text))  # as text, in which NaN equals NaN


def test_columns_and_keys_come_in_any_order_among_others(trace):
    assert trace("other,GeneratedTokens,ContextTokens\nü, 44 ,374\n")[0].prompt_tokens == 374
    line = {"output_length": 2, "more": "\u2028", "input_length": 1, "timestamp": 0.5}
    assert trace(json.dumps(line, ensure_ascii=False)) == [Arrival("1", 0.0, 1, 2)]


def test_arrivals_out_of_order_are_sorted_and_keep_their_lines(trace):
    found = trace("arrival_s,prompt_tokens,output_tokens\n3,1,1\n\n1,2,2\n3,3,3\n1,4,4\n")
    assert [(one.id, one.arrival_s) for one in found] == [("4", 0.0), ("6", 0.0), ("2", 2.0), ("5", 2.0)]


def test_an_output_of_no_tokens_counts_as_one(trace):
    assert lengths(trace("prompt_tokens,output_tokens\n7,0\n")) == [(7, 1)]
    assert lengths(trace('{"timestamp": 0, "input_length": 7, "output_length": 0}')) == [(7, 1)]


def csv_row(tokens="7", new="8", at="1"):
    return f"arrived_at,prompt_tokens,output_tokens\n0,1,1\n\n{at},{tokens},{new}\n0,1,1\n"


def json_row(**changed):
    good = '{"timestamp": 0, "input_length": 1, "output_length": 1}'
    cells = {"timestamp": "1", "input_length": "7", "output_length": "8"} | changed
    row = ", ".join(f'"{key}": {value}' for key, value in cells.items() if value is not None)
    return f"{good}\n\n \n{{{row}}}\n{good}\n"


AZURE_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
DAY = "2023-11-16 18:15:46.6805900"
BAD_COUNTS = ["abc", "", "-1", "1.5", "2.0", "1e3", "nan", "inf", "NaN", "true", "1_000", "0x10", "٣", "2147483648"]
BAD_COUNTS += ["9" * 5000, "null", "[1]", '"""1"""', "+5", "[" * 100_000]
BAD_TIMES = ["abc", "", "-1", "-0.5", "nan", "inf", "1e999", "true", "1_0", DAY, "9007199254740992", "9" * 5000]
BAD_JSON = ['"7"', "-1", "1.5", "2.0", "true", "null", "NaN", "Infinity", "1e999", "[7]", "{}", "2147483648", None]
BAD_DATES = ["17", "2023-11-16", "2023-02-30 00:00:00", "2023-11-16 24:00:01", "2023-11-16 18:15:60", f"{DAY}000"]
BAD_DATES += ["2023-11-16 18:15", f"{DAY}+25:00", f"{DAY} UTC", "16/11/2023 18:15:46", "2023-11-16 18:15:46.٢"]
BAD_DATES += ["0000-01-01 00:00:00"]
REFUSED = [
    # content, part of the message
    ("", ".csv: got 'no requests', must hold at least one"),
    (" \n\r\n", ".csv: got 'no requests'"),
    ("\ufeff", ".csv: got 'no requests'"),
    ("\n\nprompt_tokens,output_tokens\n", ".csv: got 'no requests'"),
    *[(csv_row(tokens=bad), "line 4, prompt_tokens: got") for bad in ["0", *BAD_COUNTS]],
    *[(csv_row(new=bad), "line 4, output_tokens: got") for bad in BAD_COUNTS],
    *[(csv_row(at=bad), "line 4, arrived_at: got") for bad in BAD_TIMES],
    (csv_row(tokens="abc"), "line 4, prompt_tokens: got 'abc', must be an integer of at least 1"),
    (csv_row(new="-3"), "line 4, output_tokens: got -3, must be an integer of at least 0"),
    (csv_row(new="8,9"), "line 4, columns: got ['1', '7', '8', '9'], must be 3 cells"),
    ("prompt_tokens,output_tokens\r\n\r\n1,1\r\n7\r\n", "line 4, output_tokens: got ['7'], must be 2 cells"),
    ("prompt_tokens,output_tokens\n1,1\n,\n", "line 3, prompt_tokens: got ''"),
    ('prompt_tokens,output_tokens\n1,1\n"7,8\n1,1\n', "line 3: got '\"7,8', must be CSV"),
    ('prompt_tokens,output_tokens\n1,1\n"7"7,8\n', "line 3: got '\"7\"7,8', must be CSV"),
    ('""\n', "line 1, columns: got [''], must hold exactly one of num_prefill_tokens"),
    ("\nprompt_tokens;output_tokens\n7;8\n", "line 2, columns: got ['prompt_tokens;output_tokens']"),
    (
        "TIMESTAMP,ContextTokens\n",
        "line 1, columns: got ['TIMESTAMP', 'ContextTokens'], must hold exactly one of num_dec",
    ),
    ("7,8\n9,10\n", "line 1, columns: got ['7', '8']"),
    ("prompt_tokens,input_length,output_tokens\n1,1,1\n", "line 1, columns: got"),
    ("prompt_tokens,output_tokens,Output_Tokens\n1,1,1\n", "line 1, columns: got"),
    ("prompt_tokens,output_tokens,arrived_at,timestamp\n1,1,1,1\n", "must hold at most one of arrived_at"),
    *[(f"{AZURE_HEADER}\n{DAY},1,1\n{bad},1,1\n", "line 4, TIMESTAMP: got") for bad in ["", "abc", *BAD_DATES]],
    (
        f"{AZURE_HEADER}yesterday,1,1\n",
        "line 2, TIMESTAMP: got 'yesterday', must be a number of seconds (or in every row a",
    ),
    (f"{AZURE_HEADER}{DAY},374,44\n{DAY},37", "line 3, GeneratedTokens: got"),
    *[(json_row(input_length=bad), "line 4, input_length: got") for bad in ["0", *BAD_JSON]],
    *[(json_row(output_length=bad), "line 4, output_length: got") for bad in BAD_JSON],
    *[
        (json_row(timestamp=bad), "line 4, timestamp: got")
        for bad in ["-1", '"1"', "true", "null", "NaN", "1e999", f'"{DAY}"', "9007199254740992", "1" + "0" * 400, None]
    ],
    (json_row(timestamp="-1"), "line 4, timestamp: got -1, must be a number of milliseconds of at least 0"),
    (json_row(input_length=None), "line 4, input_length: got 'nothing', must be an integer of at least 1"),
    (MOONCAKE[:-3], "line 2: got "),
    (json_row(input_length="9" * 5000), "line 4: got "),
    (MOONCAKE + "\n[1, 2]\n", "line 4: got '[1, 2]', must be one whole JSON object"),
    (MOONCAKE + "{}" + MOONCAKE, "line 3: got "),
    (json_row(more="[" * 100_000), "line 4: got "),
    (json.dumps(json.loads(MOONCAKE.splitlines()[0]), indent=1), "line 1: got '{', must be one whole JSON object"),
    (b"prompt_tokens,output_tokens\r\n\r\n1,1\n7,\xff8\n", "line 4: got b'\\xff', must be UTF-8 text"),
    (b"\xef\xbb\xbfprompt_tokens,output_tokens\n7,\xe28\n", "line 2: got b'\\xe2', must be UTF-8 text"),
    (AZURE.encode("utf-16"), "line 1: got b'\\xff', must be UTF-8 text"),
    (b"\x00\x01\x02", "line 1, columns: got"),
]


@pytest.mark.parametrize("content,message", REFUSED, ids=range(len(REFUSED)))
def test_refusals_name_file_line_and_field(trace, tmp_path, content, message):
    with pytest.raises(TraceError) as refused:
        trace(content)
    assert str(refused.value).startswith(str(tmp_path / "trace.csv"))
    assert message in str(refused.value)
    assert len(str(refused.value).removeprefix(str(tmp_path))) < 400
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "absent.csv", str(tmp_path / "absent.csv")):
        with pytest.raises(TraceError, match="must be a readable file"):
            read(path)


PIECES = st.sampled_from(
    [
        *b"\n\r,\"{}[]:0-.eE '\x00\xff",
        b"\xef\xbb\xbf",
        b"NaN",
        b"true",
        b"null",
        b"1e999",
        b"9" * 5000,
        b"[" * 9999,
        b"\n\n",
    ]
).map(lambda piece: piece if isinstance(piece, bytes) else bytes([piece]))


@st.composite
def mutated(draw):
    content = draw(st.sampled_from(sorted(VALID.values()))).encode()
    for _ in range(draw(st.integers(1, 4))):
        at, gone = draw(st.integers(0, len(content))), draw(st.integers(0, 8))
        content = content[:at] + draw(PIECES | st.binary(max_size=4)) + content[at + gone :]
    return content


@pytest.fixture(scope="module")
def fuzzed_path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzzed") / "trace"


@settings(max_examples=FUZZED, deadline=None)
@given(content=mutated() | st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_whatever_a_file_holds_it_is_read_or_refused(fuzzed_path, content):
    fuzzed_path.write_bytes(content)
    try:
        found = read(fuzzed_path)
    except TraceError:
        return
    assert found and len({one.id for one in found}) == len(found)
    assert all(1 <= tokens < 2**31 and type(tokens) is int for pair in lengths(found) for tokens in pair)
    if not all(map(math.isnan, times_s(found))):
        assert times_s(found) == sorted(times_s(found)) and found[0].arrival_s == 0
        assert all(map(math.isfinite, times_s(found)))
